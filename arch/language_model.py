"""The interface that both models fulfil: parallel passes for training, and decoding over a cache.

Shapes: B batch, T tokens, D model, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .block_plan import Plan
from .config import ModelConfig
from .init import initialise

if TYPE_CHECKING:
    from .decoder import Decoder

# Final hidden states [B, T, D] and the output matrix [V, D] -> logits, or whatever takes their place.
Head = Callable[[Tensor, Tensor], Tensor]


class StepFn(Protocol):
    """Function that adds one token [B, 1] of each row to a cache and returns the logits [B, 1, V] of the next one.

    After `close` the cache takes steps of any length again.
    """

    def __call__(self, tokens_B1: Tensor) -> Tensor: ...

    def close(self) -> None: ...


class LanguageModel(nn.Module, ABC):
    """A model that `build` makes. Callers rely on this interface and on `plan`, never on the class of the model.

    `head` is passed into `forward`, and not applied to its result, because FSDP2 gathers the output matrix only while
    `forward` runs.
    """

    config: ModelConfig
    plan: Plan

    @property
    @abstractmethod
    def stacks(self) -> tuple[nn.Module, ...]:
        """The stacks of layers, each with `layers` and `activation_checkpointing`."""

    @property
    @abstractmethod
    def decoder(self) -> "Decoder":
        """The decoder that predicts tokens."""

    @property
    @abstractmethod
    def output_weight(self) -> Tensor:
        """The output matrix [V, D]."""

    @abstractmethod
    def forward(
        self,
        tokens_BT: Tensor,
        cache: Any = None,
        last_only: bool = False,
        head: Head = F.linear,
        segment_ids_BT: Tensor | None = None,
        cache_only: bool = False,
    ) -> Tensor:
        """Return the logits [B, T', V] of the targets that the model predicts, or the result of `head`.

        Without a cache the targets are those of `select_targets`. With a cache, the tokens continue its contents and
        are added to it, and the last logits are those of the next token; `last_only` returns only these, `cache_only`
        none, [B, 0, V].
        `segment_ids_BT`: tokens see only their own segment, a run of equal numbers; negative numbers are padding.
        """

    @abstractmethod
    def allocate_cache(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, start_B: Tensor | None = None
    ) -> Any:
        """Allocate an empty cache for `batch` sequences of up to `capacity` tokens, `footprint.allocated_bytes` in all.

        `dtype`: type of its elements; None: that of the weights. `start_B`: the rows are padded on the left, row b up
        to position `start_B[b]` of the first stack (`StackPlan.tokens_per_position`).
        """

    @abstractmethod
    def static_step(self, cache: Any, way: str) -> StepFn:
        """Make a step of static shapes over `cache`, which has its prompts; `way` as in `static_step.Recorder`."""

    @property
    def takes_static_steps(self) -> bool:
        """True if the process holds the whole model; under FSDP it holds a part, and decodes by `decode_step`."""
        # FSDP2 leaves the weights outside of blocks gathered after a forward pass: all are looked at.
        return all(type(parameter.data) is Tensor for parameter in self.parameters())

    @abstractmethod
    def attention(self, documents: bool = False) -> str:
        """Name the attention backends in use, for a log. Raises ValueError if packed documents are impossible."""

    @property
    def init_stds(self) -> dict[str, float]:
        """Standard deviations, by parameter name, of initial weights that do not use the size's `init_std`."""
        return {}

    def init_weights(self, seed: int = 0) -> None:
        """Initialise every parameter, as `init.initialise`."""
        initialise(self, self.config.size.init_std, seed, self.init_stds)

    def select_targets(self, values_BT: Tensor) -> Tensor:
        """Select from the targets [B, T], or other values of each target, those that `forward` predicts."""
        return values_BT[:, self.plan.num_unpredicted :]

    def by_token(self, x_MSD: Tensor, batch: int) -> Tensor:
        """Select from the positions of `decoder` those that predict tokens, of `batch` rows: [B, T', D]."""
        return x_MSD

    def next_token_logits(
        self, tokens_BT: Tensor, head: Head = F.linear, segment_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Return the logits [B, T', V] of the token after each of `tokens_BT`, from token `plan.min_prompt` - 1 on.

        T may be any number from `plan.min_prompt` on. `head` and `segment_ids_BT` as in `forward`.
        """
        plan, length = self.plan, tokens_BT.shape[1]
        inputs = length + 1 - plan.target_offset
        fill = -(-inputs // plan.block_length) * plan.block_length - length  # no token before sees what is appended
        if segment_ids_BT is not None:
            segment_ids_BT = F.pad(segment_ids_BT, (0, fill))
        out_BTV: Tensor = self(F.pad(tokens_BT, (0, fill)), head=head, segment_ids_BT=segment_ids_BT)
        first = plan.min_prompt - plan.num_unpredicted - plan.target_offset
        return out_BTV[:, first : first + length + 1 - plan.min_prompt]

    def prefill(
        self, tokens_BT: Tensor, cache: Any, chunk: int | None = None, segment_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Add prompts to `cache` and return the logits [B, 1, V] of the token after them.

        `chunk`: tokens per forward pass, rounded up to whole blocks; None: all at once.
        """
        block, length = self.plan.block_length, tokens_BT.shape[1]
        step = -(-(chunk or length) // block) * block
        for begin in range(0, length, step) if length else (0,):  # of nothing, there is the start context
            ids_BT = None if segment_ids_BT is None else segment_ids_BT[:, begin : begin + step]
            more = begin + step < length
            logits_B1V: Tensor = self(
                tokens_BT[:, begin : begin + step], cache, last_only=True, segment_ids_BT=ids_BT, cache_only=more
            )
        return logits_B1V

    def decode_step(self, tokens_B1: Tensor, cache: Any) -> Tensor:
        """Add one token of each row to `cache` and return the logits [B, 1, V] of the next one."""
        logits_B1V: Tensor = self(tokens_B1, cache, last_only=True)
        return logits_B1V
