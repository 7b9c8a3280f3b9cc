"""Queries scaled with the logarithm of their position, so that attention stays sharp over long contexts.

Shapes: B batch, T new tokens, N query heads, H head; `*` the axes before heads.
"""

import torch
from torch import Tensor, nn

from .config import SizeConfig
from .init import OwnInit
from .store_spec import QueryScale, StoreSpec


def query_table(positions: Tensor, rule: QueryScale) -> Tensor:
    """Factors of queries at `positions`, fp32, of the same shape: those of Llama 4; where heads have slopes of their
    own, the logarithms that these take."""
    count = positions.float() + 1
    if rule.slope is None:
        return count.log()
    return 1 + rule.slope * (count / rule.tokens).floor().log1p()


class HeadScale(OwnInit):
    """A slope and a bias per head, by which its queries are scaled with the logarithm of their position (Mistral Large
    4); at first all factors are 1."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.slope = nn.Parameter(torch.empty(num_heads))
        self.bias = nn.Parameter(torch.empty(num_heads))

    def draw(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        full.fill_(1.0 if name == "bias" else 0.0)

    def forward(self, log: Tensor) -> Tensor:
        """Factors [*, N] from logarithms [*]."""
        return log.unsqueeze(-1) * self.slope.to(log.dtype) + self.bias.to(log.dtype)


def build_head_scale(size: SizeConfig, store: StoreSpec) -> HeadScale | None:
    """The slopes of layers that read `store`; None: it has none, or one for all."""
    rule = store.query_scale
    return HeadScale(size.num_heads) if rule is not None and rule.slope is None else None


def scale_queries(q_BTNH: Tensor, table: Tensor | None, heads: HeadScale | None) -> Tensor:
    """Queries [*, N, H] times their factors; `table` is that of `query_table`, for axes [*] or the last of them."""
    if table is None:
        return q_BTNH
    factors = table.unsqueeze(-1) if heads is None else heads(table)
    return (q_BTNH * factors.unsqueeze(-1)).to(q_BTNH.dtype)
