"""Text out of a Block Transformer: prefill whole blocks, then say block after block.

Shapes: B batch, T tokens, L block length, D model, C vectors of an expanded context, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block_plan import BlockPlan
from .block_transformer import BlockCache, BlockTransformer, allocate_blocks
from .cache import Cache
from .generation import check_options, sample


class Prompts(NamedTuple):
    """Prompts cut into their complete blocks and what is left of each.

    whole_BT  complete blocks, padded on the left to the most that one prompt has
    real_BT   False where a prompt was filled up to a block; None: there is no such
    start_B   the block at which a row begins
    rest_BL   the tokens after them, padded on the right to a block
    rest_B    how many those are
    """

    whole_BT: Tensor
    real_BT: Tensor | None
    start_B: Tensor
    rest_BL: Tensor
    rest_B: Tensor


@torch.inference_mode()
def generate_blocks(
    model: BlockTransformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    pad_token: int | None = None,
    positions: str = "training",
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continuations of `prompts`, as `generate` makes them of a Decoder.

    A prompt need not end with a block: what is left of it is given to the token decoder, and the first new token
    completes it. A prompt shorter than a block has no context but a learned start; a model without one needs
    `pad_token`, which fills the block from the left, as in training with random padding (paper, appendix H).

    positions  of the token decoder: `training`, or `shipped`, for the text that the authors' own generate() gives. It
               counts positions without the context: vectors of a prefix all stand at 0, the block's t-th token at t.
               Those of a prefix of 2 or more are then not where they were in training (commit 17842dd of their code)

    Raises ValueError on an empty prompt, a prompt too short, or an impossible option.
    """
    check_options(prompts, max_new_tokens, temperature, top_p, None)
    length, device = model.plan.block_length, model.token_decoder.embed.weight.device
    given = split(model, prompts, pad_token)
    last = int(given.rest_B.max()) + max_new_tokens  # tokens after the complete blocks of the prompts
    cache = room(model, given, last, cache_dtype)
    cache.tokens.origin = origin(model.plan, positions)
    generator = torch.Generator(device=device).manual_seed(seed)
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    said: list[Tensor] = list(given.rest_BL[:, : int(given.rest_B.min())].unbind(dim=1))
    begun_BL = given.rest_BL[:, : len(said)]
    was_training = model.training
    model.eval()
    try:
        context_BCD = model.expand(first_context(model, given, cache.blocks))
        logits_BV = model.begin(context_BCD, begun_BL, cache.tokens)
        while True:
            next_B = sample(logits_BV, temperature, top_p, generator)
            number = len(said)
            if number < length:
                next_B = torch.where(number < given.rest_B, given.rest_BL[:, number], next_B)
            said.append(next_B)
            if stop_token is not None:
                done_B |= (next_B == stop_token) & (number >= given.rest_B)
                done_B |= number + 1 >= given.rest_B + max_new_tokens
            if len(said) == last or (stop_token is not None and bool(done_B.all())):
                break
            if len(said) % length:
                logits_BV = model.step(context_BCD, next_B[:, None], number % length, cache.tokens)
            else:
                block_BL = torch.stack(said[-length:], dim=1)
                context_BCD = model.expand(model.encode(block_BL, cache.blocks)[:, -1])
                logits_BV = model.begin(context_BCD, block_BL[:, :0], cache.tokens)
    finally:
        model.train(was_training)
    return trim(torch.stack(said, dim=1), given.rest_B, max_new_tokens, stop_token)


def origin(plan: BlockPlan, positions: str) -> int:
    """The `origin` of the token decoder's cache. Raises ValueError where `positions` is not what it can be."""
    if positions not in ("training", "shipped"):
        raise ValueError(f"positions is {positions!r}; it is training or shipped")
    if positions == "training":
        return 0
    if any(store.num_slots for store in plan.token.stores):
        raise ValueError("positions='shipped' is of softmax attention; the token decoder has a bounded store: drop it")
    return plan.num_positions - plan.block_length


def trim(said_BT: Tensor, rest_B: Tensor, max_new_tokens: int, stop_token: int | None) -> list[list[int]]:
    """What is new in each row, up to `stop_token`."""
    rows = [row[rest : rest + max_new_tokens] for row, rest in zip(said_BT.tolist(), rest_B.tolist(), strict=True)]
    return [row[: row.index(stop_token)] if stop_token in row else row for row in rows]


def split(model: BlockTransformer, prompts: Sequence[Sequence[int]], pad_token: int | None) -> Prompts:
    """Raises ValueError where a prompt leaves the model without a context."""
    length, device = model.plan.block_length, model.token_decoder.embed.weight.device
    ids = [[int(token) for token in prompt] for prompt in prompts]
    if model.start is None:
        shortest = min(map(len, ids))
        if shortest < length and pad_token is None:
            raise ValueError(
                f"a prompt has {shortest} tokens, less than a block of {length}: this model does not predict the first "
                "block; give a longer prompt or a pad_token (or train with arch.block.start)"
            )
        ids = [[pad_token or 0] * (length - len(row)) + row for row in ids]
    filled = [len(row) - len(prompt) for row, prompt in zip(ids, prompts, strict=True)]
    whole = [len(row) // length * length for row in ids]
    most = max(whole)
    first = [fill - end for fill, end in zip(filled, whole, strict=True)]  # token of the prompt, counted from the end

    def tensor(rows: list[Any]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=device)

    first_B = tensor(first)
    return Prompts(
        tensor([[0] * (most - end) + row[:end] for row, end in zip(ids, whole, strict=True)]),
        torch.arange(-most, 0, device=device) >= first_B[:, None] if any(filled) else None,
        tensor([(most - end) // length for end in whole]),
        tensor([row[end:] + [0] * (length - len(row) + end) for row, end in zip(ids, whole, strict=True)]),
        tensor([len(row) - end for row, end in zip(ids, whole, strict=True)]),
    )


def room(model: BlockTransformer, given: Prompts, after: int, dtype: torch.dtype | None) -> BlockCache:
    """A cache for the prompts' complete blocks and `after` more tokens, the last of which is not fed back."""
    weight = model.token_decoder.embed.weight
    return allocate_blocks(
        model.plan,
        len(given.rest_B),
        given.whole_BT.shape[1] + after - 1,
        dtype=dtype or weight.dtype,
        device=weight.device,
        start_B=given.start_B if bool(given.start_B.any()) else None,
    )


def first_context(model: BlockTransformer, given: Prompts, cache: Cache) -> Tensor:
    """[B, D] after the complete blocks of the prompts; the start context of a row that has none."""
    if given.whole_BT.shape[1]:
        context_BD = model.encode(given.whole_BT, cache, given.real_BT)[:, -1]
        if model.start is None:
            return context_BD
        none_B1 = given.start_B[:, None] * model.plan.block_length == given.whole_BT.shape[1]
        return torch.where(none_B1, model.start.to(context_BD.dtype), context_BD)
    assert model.start is not None
    return model.start.expand(len(given.rest_B), -1)
