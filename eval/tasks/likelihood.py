"""Likelihood of continuations, over the cache of a shared prefix or without one.

Shapes: B batch, N continuations, T tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from arch import LanguageModel
from arch.generation import batch_prompts, evaluating
from arch.precision import at_least_fp32

S = TypeVar("S")

MAX_LOGITS = 2**26  # that exist at one time


class Likelihood(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding gives it."""

    nats: float
    greedy: bool


def wide(logits: Tensor) -> Tensor:
    """`logits` in at least fp32."""
    return logits.to(at_least_fp32(logits.dtype))


def pieces(values: Sequence[S], size: int) -> Iterator[Sequence[S]]:
    """`values` in order, up to `size` at a time."""
    for begin in range(0, len(values), size):
        yield values[begin : begin + size]


@torch.no_grad()
def continuation_likelihoods(
    model: LanguageModel, prefix: Sequence[int], continuations: Sequence[Sequence[int]], pad_token: int = 0
) -> list[Likelihood]:
    """Likelihood of each continuation of `prefix`, which is prefilled once and whose cache all of them start from.

    `pad_token` fills up a prefix shorter than `plan.min_prompt`, as in `arch.generate`. Raises ValueError if the
    prefix or a continuation is empty.
    """
    if not prefix or not all(continuations):
        raise ValueError("a prefix and its continuations need at least one token each")
    device = model.output_weight.device
    prompt = batch_prompts(model.plan, [list(prefix)], pad_token, device)
    longest = max(map(len, continuations))
    with evaluating(model):
        cache = model.allocate_cache(1, prompt.capacity(longest))
        first_1V = wide(model.prefill(prompt.tokens_BT, cache, None, prompt.segment_ids_BT)[:, -1])
        vocabulary = first_1V.shape[1]
        found: list[Likelihood] = []
        for part in pieces(continuations, max(1, MAX_LOGITS // (vocabulary * longest))):
            rows = [list(continuation) for continuation in part]
            targets_NT = torch.tensor(_padded(rows, longest), device=device)
            logits_NTV = first_1V[:, None].expand(len(rows), 1, vocabulary)
            if longest > 1:
                later_NTV = _continue(model, targets_NT[:, :-1], cache.repeat(len(rows)))
                logits_NTV = torch.cat((logits_NTV, wide(later_NTV)), dim=1)
            nats_NT = logits_NTV.log_softmax(-1).gather(-1, targets_NT[..., None])[..., 0]
            greedy_NT = logits_NTV.argmax(-1) == targets_NT
            found += [
                Likelihood(nats_NT[n, : len(row)].sum().item(), bool(greedy_NT[n, : len(row)].all()))
                for n, row in enumerate(rows)
            ]
    return found


def _continue(model: LanguageModel, tokens_NT: Tensor, cache: Any) -> Tensor:
    """Logits [N, T, V] after each of `tokens_NT`, which are added to `cache`; token by token of a Block Transformer."""
    if model.plan.target_offset:
        logits_NTV: Tensor = model(tokens_NT, cache, last_only=False)
        return logits_NTV
    return torch.cat([model.decode_step(token_N1, cache) for token_N1 in torch.split(tokens_NT, 1, dim=1)], dim=1)


def _padded(rows: list[list[int]], length: int) -> list[list[int]]:
    return [row + [0] * (length - len(row)) for row in rows]


@torch.no_grad()
def whole_likelihoods(
    model: LanguageModel, requests: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token: int = 0
) -> list[Likelihood]:
    """Likelihood of each (prefix, continuation), in one pass without a cache; prefixes as in
    `continuation_likelihoods`.

    Rows are padded on the right, so requests of like length belong together.
    """
    if not all(prefix and continuation for prefix, continuation in requests):
        raise ValueError("a prefix and its continuation need at least one token each")
    device, least = model.output_weight.device, model.plan.min_prompt
    fill = [max(0, least - len(prefix)) for prefix, _ in requests]
    rows = [[pad_token] * pads + [*prefix, *rest] for pads, (prefix, rest) in zip(fill, requests, strict=True)]
    length = max(map(len, rows))
    tokens_BT = torch.tensor(_padded(rows, length), device=device)
    ids_BT = None
    if any(fill):
        ids_BT = torch.zeros_like(tokens_BT)
        for ids_T, pads in zip(ids_BT, fill, strict=True):
            ids_T[:pads] = -1
    with evaluating(model):
        nats_BT, greedy_BT = next_token_likelihoods(model, tokens_BT, ids_BT)
    found = []
    for b, (row, (_, rest)) in enumerate(zip(rows, requests, strict=True)):
        asked = slice(len(row) - len(rest) - least, len(row) - least)
        found.append(Likelihood(nats_BT[b, asked].sum().item(), bool(greedy_BT[b, asked].all())))
    return found


def next_token_likelihoods(
    model: LanguageModel, tokens_BT: Tensor, segment_ids_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of the tokens from `plan.min_prompt` on, each given those before it, [B, T - min_prompt], in at
    least fp32; and whether each is the most likely one."""

    def measure(logits_NV: Tensor, row_N: Tensor, place_N: Tensor) -> Tensor:
        target_N = tokens_BT[row_N, (place_N + 1).clamp(0, tokens_BT.shape[1] - 1)]
        nats_N = -F.cross_entropy(logits_NV, target_N, reduction="none")
        return torch.stack((nats_N, (logits_NV.argmax(-1) == target_N).to(nats_N.dtype)), dim=-1)

    ids_BT = None if segment_ids_BT is None else segment_ids_BT[:, :-1]
    out_BT2 = measure_next(model, tokens_BT[:, :-1], measure, ids_BT)
    return out_BT2[..., 0], out_BT2[..., 1] > 0


def measure_next(
    model: LanguageModel,
    tokens_BT: Tensor,
    measure: Callable[[Tensor, Tensor, Tensor], Tensor],
    segment_ids_BT: Tensor | None = None,
) -> Tensor:
    """Apply `measure` to the logits after each of `tokens_BT` from token `plan.min_prompt` - 1 on, [B, T', K].

    `measure` is given logits [N, V] in at least fp32, and the row and the token that each stands after, both [N]; it
    returns [N, K]. A token may lie outside of the row, where the result is thrown away. No more than MAX_LOGITS logits
    exist at a time in a model of ours.
    """
    plan = model.plan

    def measured(states_BTD: Tensor, first: int, logits_of: Callable[[Tensor], Tensor], width: int) -> Tensor:
        batch, length = states_BTD.shape[:2]
        index_N, rows = torch.arange(batch * length, device=states_BTD.device), max(1, MAX_LOGITS // width)
        chunks = zip(torch.split(states_BTD.flatten(0, 1), rows), torch.split(index_N, rows), strict=True)
        parts = [measure(wide(logits_of(part)), index // length, index % length + first) for part, index in chunks]
        return torch.cat(parts).view(batch, length, -1)

    if not isinstance(model, LanguageModel):
        logits_BTV = model.next_token_logits(tokens_BT)
        return measured(logits_BTV, plan.min_prompt - 1, lambda logits: logits, logits_BTV.shape[-1])

    def head(x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        first = plan.num_unpredicted + plan.target_offset - 1  # the token that the model's first logits stand after
        return measured(x_BTD, first, lambda x_ND: x_ND @ weight_VD.T, len(weight_VD))

    return model.next_token_logits(tokens_BT, head=head, segment_ids_BT=segment_ids_BT)
