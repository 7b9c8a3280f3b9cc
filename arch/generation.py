"""Text out: prefill the prompts, then decode token by token over the cache.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import allocate
from .decoder import Decoder


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    prefill_chunk: int | None = None,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continuations of `prompts`, which may differ in length: up to `max_new_tokens` tokens, without `stop_token`.

    temperature    0 takes the most likely token; otherwise logits are divided by it
    top_p          sample from the smallest set of tokens that holds this much probability
    prefill_chunk  tokens of prompt per forward pass; None takes them all at once
    cache_dtype    type of the cache's elements; None takes that of the weights

    Raises ValueError on an empty prompt or an impossible option.
    """
    check_options(prompts, max_new_tokens, temperature, top_p, prefill_chunk)
    weight = model.embed.weight
    device = weight.device
    longest = max(map(len, prompts))
    start_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens_BT = torch.tensor([[0] * (longest - len(p)) + [int(t) for t in p] for p in prompts], device=device)
    cache = allocate(
        model.plan,
        len(prompts),
        longest + max_new_tokens - 1,  # the last token is not fed back
        dtype=cache_dtype or weight.dtype,
        device=device,
        start_B=start_B if bool(start_B.any()) else None,
    )
    generator = torch.Generator(device=device).manual_seed(seed)
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    new: list[Tensor] = []
    chunk = prefill_chunk or longest
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, longest, chunk):
            logits_BTV = model(tokens_BT[:, begin : begin + chunk], cache, last_only=True)
        while True:
            next_B = sample(logits_BTV[:, -1], temperature, top_p, generator)
            new.append(next_B)
            if len(new) == max_new_tokens:
                break
            if stop_token is not None:
                done_B |= next_B == stop_token
                if bool(done_B.all()):
                    break
            logits_BTV = model(next_B[:, None], cache)
    finally:
        model.train(was_training)
    rows: list[list[int]] = torch.stack(new, dim=1).tolist()
    return [row[: row.index(stop_token)] if stop_token in row else row for row in rows]


def check_options(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float, prefill_chunk: int | None
) -> None:
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate needs a prompt, and in every prompt at least one token (a start token will do)")
    if max_new_tokens < 1 or (prefill_chunk is not None and prefill_chunk < 1):
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and prefill_chunk ({prefill_chunk}) must be at least 1")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature ({temperature}) must be at least 0 and finite, and top_p ({top_p}) in (0, 1]")


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row: the most likely one at temperature 0, else drawn from the nucleus of mass `top_p`."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() - logits_BV.amax(dim=-1, keepdim=True)  # a tiny temperature must not overflow
    probability_BV, token_BV = (logits_BV / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    nucleus_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0)
    rank_B = torch.multinomial(nucleus_BV, 1, generator=generator)
    return token_BV.gather(1, rank_B).squeeze(1)
