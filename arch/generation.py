"""Text generation: prefill the prompts, then decode token by token over the cache.

Shapes: B batch, T tokens, F forced tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block_plan import Plan
from .language_model import LanguageModel, StepFn
from .static_step import step_fn

# Takes the new tokens of a step by the number of their prompts, and returns the prompts that end with them.
Follow = Callable[[Mapping[int, int]], Iterable[int]]

LOOK_EVERY = 16  # tokens, on a device that works ahead, between looks at whether all rows have ended


class PromptBatch(NamedTuple):
    """Prompts as a batch whose blocks begin together. With blocks of one token, `tokens_BT` is all there is.

    tokens_BT       tokens to prefill: complete blocks, padded on the left, and the tokens after them that every row has
    start_B         the block at which each row begins; None: the first
    segment_ids_BT  negative where `pad_token` fills up the first block of a short prompt; None: nowhere
    forced_BF       the rest of each prompt, padded on the right: tokens that are not sampled
    num_forced_B    number of these tokens in each row
    """

    tokens_BT: Tensor
    start_B: Tensor | None
    segment_ids_BT: Tensor | None
    forced_BF: Tensor
    num_forced_B: Tensor

    def capacity(self, max_new_tokens: int) -> int:
        """Tokens in the cache at the end; the last new one is not fed back."""
        return self.tokens_BT.shape[1] + self.forced_BF.shape[1] + max_new_tokens - 1


class Span(NamedTuple):
    """Place of the new tokens of a prompt: the row, and the steps from `begin` up to `end`."""

    row: int
    begin: int
    end: int


def generate(
    model: LanguageModel,
    prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_token: int | None = None,
    follow: Follow | None = None,
    pad_token: int | None = None,
    prefill_chunk: int | None = None,
    cache_dtype: torch.dtype | None = None,
    cache: Any = None,
    seed: int = 0,
    steps: str = "auto",
    max_batch: int | None = None,
) -> list[list[int]]:
    """Continue `prompts`, which may differ in length, by up to `max_new_tokens` tokens each, without `stop_token`.

    prompts        lists of tokens, one-dimensional tensors, or one tensor [B, T]
    temperature    0 takes the most likely token; otherwise logits are divided by it
    top_k          sample from this many of the most likely tokens, and any as likely as the last of them; None: all
    top_p          sample from the smallest set of tokens with this much probability, after `top_k`
    min_p          sample from tokens at least this fraction as likely as the most likely one
    follow         called after each step with the new tokens, `stop_token` too, by the number of their prompts; returns
                   the prompts that end with them. Each step then waits for the device
    pad_token      pads a prompt shorter than `plan.min_prompt` on the left, as in training with random padding (Block
                   Transformer, appendix H); None: such a prompt is an error
    prefill_chunk  tokens of prompt per forward pass; None: all at once
    cache_dtype    type of the cache's elements; None: that of the weights
    cache          an empty cache of `model.allocate_cache`, of the capacity of the PromptBatch; None allocates one. Of
                   a sharded model it must not have been made in inference mode
    max_batch      limit of rows: if there are more prompts, a row that has ended takes the next one, the longest first,
                   in a Block Transformer between two blocks; None: all at once
    steps          how a token is decoded, as in `static_step.choose_way`: auto, plain, static, compiled or graph

    Raises ValueError on an empty prompt, a prompt too short, a token that the model has not, an impossible option, a
    cache that does not fit, and one that takes no further prompts where there are more than `max_batch`.
    """
    prompts = token_lists(prompts)
    check_options(prompts, max_new_tokens, temperature, top_p, prefill_chunk, top_k, min_p)
    check_tokens(prompts, model.output_weight.shape[0])
    queue = Queue(model, prompts, max_batch, max_new_tokens, pad_token, stop_token)
    if cache is None:
        cache = queue.allocate(cache_dtype)
    if queue.used and not cache.takes_rows:
        raise ValueError(f"this cache takes no prompts later on; give max_batch of at least {len(prompts)}, or None")
    generator = torch.Generator(device=model.output_weight.device).manual_seed(seed)
    pick = partial(sample, temperature=temperature, top_p=top_p, generator=generator, top_k=top_k, min_p=min_p)
    # In inference mode FSDP would gather weights that cannot be trained.
    with torch.inference_mode() if model.takes_static_steps else torch.no_grad(), evaluating(model):
        logits_B1V = queue.prefill(cache, prefill_chunk, cache_dtype)
        with closing(step_fn(model, cache, steps)) as step:
            generated_BS = decode(step, logits_B1V, queue, pick, follow)
    return new_tokens(generated_BS, queue.spans, stop_token)


def decode(
    step: StepFn,
    logits_B1V: Tensor,
    queue: "Queue",
    pick: Callable[[Tensor], Tensor],
    follow: Follow | None,
) -> Tensor:
    """Continue the rows that `queue` has prefilled by tokens that `pick` chooses from their logits, until no prompt is
    left. Returns the tokens [B, S] of all steps, forced ones included."""
    generated: list[Tensor] = []
    while True:
        number = len(generated)
        next_B = queue.force(pick(logits_B1V[:, -1]), number)
        generated.append(next_B)
        if follow is not None:
            queue.follow(next_B, number, follow)
        ended = queue.ended(next_B, number)
        if queue.is_done(ended, number):
            break
        queue.make_room(ended)
        logits_B1V = step(next_B[:, None])
        queue.refill(ended, logits_B1V, number + 1)
    return torch.stack(generated, dim=1)


def works_ahead(device: torch.device) -> bool:
    """Tell whether to read a value of `device` is to wait for what is queued on it."""
    return device.type != "cpu"


class Queue:
    """The prompt that each row of a batch continues, and the prompts that wait for a row to end.

    prompt_of_row  number of the prompt that each row continues now
    waiting        numbers of the prompts that no row has taken, the longest first
    batch          the first prompts, which `prefill` puts into the cache
    spans          where the new tokens are, by the number of each prompt that a row has taken
    used           there were prompts that had to wait
    forced         for rows that have taken a prompt, its tokens that come after whole blocks
    begin_B        step of the first new token of the prompt of each row
    done_B         whether it has made its last token
    followed       a caller is given the tokens of each step
    known          rows that had ended when the device was asked last, and have not taken a prompt since
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[list[int]],
        max_batch: int | None,
        max_new_tokens: int,
        pad_token: int | None,
        stop_token: int | None,
    ) -> None:
        """Raise ValueError on an impossible `max_batch`, and on a prompt too short without `pad_token`."""
        self.model, self.prompts, self.max_new_tokens = model, prompts, max_new_tokens
        self.pad_token, self.stop_token, self.device = pad_token, stop_token, model.output_weight.device
        numbers = list(range(len(prompts)))
        self.used = max_batch is not None and len(prompts) > max_batch
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1, or None")
        check_lengths(model.plan, prompts, pad_token)
        if self.used:
            numbers.sort(key=lambda number: -len(prompts[number]))  # later ones then fit before what is there
        self.prompt_of_row = numbers[:max_batch]
        self.waiting = numbers[len(self.prompt_of_row) :]
        self.batch = self.batch_of(self.prompt_of_row)
        self.forced: dict[int, list[int]] = {}
        num_forced_B = self.batch.num_forced_B
        self.begin_B, self.done_B = num_forced_B.clone(), torch.zeros_like(num_forced_B, dtype=torch.bool)
        rows = enumerate(zip(self.prompt_of_row, num_forced_B.tolist(), strict=True))
        self.spans = {prompt: Span(row, begin, begin + max_new_tokens) for row, (prompt, begin) in rows}
        self.followed = False
        self.known: list[int] = []

    def batch_of(self, numbers: Sequence[int]) -> PromptBatch:
        return batch_prompts(self.model.plan, [self.prompts[number] for number in numbers], self.pad_token, self.device)

    def allocate(self, dtype: torch.dtype | None) -> Any:
        """A cache for the rows, of elements of `dtype`; None: that of the weights."""
        return self.model.allocate_cache(len(self.prompt_of_row), self.batch.capacity(self.max_new_tokens), dtype=dtype)

    def prefill(self, cache: Any, chunk: int | None, dtype: torch.dtype | None) -> Tensor:
        """Put the first prompts into the empty `cache` and return the logits [B, 1, V] of the token after them.

        Later prompts, too, are taken `chunk` tokens at a time, and into a cache of `dtype` first.
        """
        self.cache, self.chunk, self.dtype = cache, chunk, dtype
        start_B = self.batch.start_B
        if self.waiting and start_B is None:
            start_B = torch.zeros_like(self.batch.num_forced_B)
        cache.pad_left(start_B)
        return self.model.prefill(self.batch.tokens_BT, cache, chunk, self.batch.segment_ids_BT)

    def force(self, next_B: Tensor, number: int) -> Tensor:
        """Return the tokens [B] of step `number`: `next_B`, with tokens of prompts that come after whole blocks in the
        place of sampled ones."""
        if number < self.batch.forced_BF.shape[1]:
            next_B = torch.where(number < self.batch.num_forced_B, self.batch.forced_BF[:, number], next_B)
        for row, tokens in list(self.forced.items()):
            next_B[row] = tokens.pop(0)
            if not tokens:
                del self.forced[row]
        return next_B

    def follow(self, next_B: Tensor, number: int, follow: Follow) -> None:
        """Give the new tokens of step `number` to `follow`, and end the prompts of which they are the last."""
        self.followed = True
        tokens = next_B.tolist()
        spans = {prompt: self.spans[prompt] for prompt in self.prompt_of_row}
        new = {prompt: tokens[span.row] for prompt, span in spans.items() if span.begin <= number < span.end}
        stopped = [prompt for prompt, token in new.items() if token == self.stop_token]
        for prompt in {*stopped, *follow(new)} & new.keys():
            self.spans[prompt] = spans[prompt]._replace(end=number + 1)
            self.done_B[spans[prompt].row] = True

    def ended(self, next_B: Tensor, number: int) -> list[int]:
        """List the rows that made their last token by step `number`; those of an earlier step if the device was not
        asked, as may be while the cache has room."""
        if self.stop_token is None and not self.used and not self.followed:
            return []
        if self.stop_token is not None:
            self.done_B |= (next_B == self.stop_token) & (number >= self.begin_B)
        self.done_B |= number + 1 >= self.begin_B + self.max_new_tokens
        ahead = works_ahead(self.device) and not self.followed
        if ahead and (number + 1) % LOOK_EVERY and not self.must_make_room:
            return list(self.known)  # each look waits for the device
        self.known = self.done_B.nonzero().flatten().tolist()
        return list(self.known)

    def is_done(self, ended: Sequence[int], number: int) -> bool:
        """Tell whether step `number` was the last one, after which the rows `ended` have ended."""
        last = self.batch.forced_BF.shape[1] + self.max_new_tokens - 1
        return (not self.used and number == last) or (len(ended) == len(self.prompt_of_row) and not self.waiting)

    @property
    def must_make_room(self) -> bool:
        """Tell whether the cache, which refilled rows share, has no room for the next position of the first stack."""
        return bool(self.used and self.cache.stacks[0].length >= self.cache.stacks[0].capacity)

    def make_room(self, ended: Sequence[int]) -> None:
        """Drop positions that are padding in every row that continues, if the cache has no room for the next step."""
        if not self.must_make_room:
            return
        cache = self.cache.stacks[0]
        assert cache.start_B is not None
        starts, block = cache.start_B.tolist(), self.model.plan.block_length
        needed = [cache.length - start for row, start in enumerate(starts) if row not in ended]
        # The next prompt must fit in before the position that comes now.
        waiting = [max(len(self.prompts[number]), self.model.plan.min_prompt) for number in self.waiting[:1]]
        needed += [max(0, length // block - 1) for length in waiting]
        if count := cache.length - max(needed, default=cache.length):
            cache.drop(count)

    def refill(self, ended: Sequence[int], logits_B1V: Tensor, number: int) -> None:
        """Give rows that have `ended` the next prompts before step `number`, if the cache can take a row now, and put
        the logits of the tokens after the prompts' whole blocks into `logits_B1V`."""
        if not (self.waiting and self.cache.takes_rows):
            return
        for row in ended[: len(self.waiting)]:
            logits_B1V[row] = self.take_next(row, number)[0]

    def take_next(self, row: int, number: int) -> Tensor:
        """Put the next prompt into `row` and return the logits [1, 1, V] of the token after its whole blocks."""
        taken, model = self.waiting.pop(0), self.model
        batch = self.batch_of([taken])
        block, length = model.plan.block_length, batch.tokens_BT.shape[1]
        whole = length // block * block
        ids_1T = None if batch.segment_ids_BT is None else batch.segment_ids_BT[:, :whole]
        alone = model.allocate_cache(1, max(whole, block), dtype=self.dtype)
        logits_11V = model.prefill(batch.tokens_BT[:, :whole], alone, self.chunk, ids_1T)
        self.cache.take_row(row, alone)
        if whole < length:
            self.forced[row] = batch.tokens_BT[0, whole:].tolist()
        begin = number + length - whole
        self.prompt_of_row[row] = taken
        self.spans[taken] = Span(row, begin, begin + self.max_new_tokens)
        self.begin_B[row], self.done_B[row] = begin, False
        self.known.remove(row)
        return logits_11V


def new_tokens(generated_BS: Tensor, spans: Mapping[int, Span], stop_token: int | None) -> list[list[int]]:
    """List the new tokens of each prompt up to `stop_token`, in the order of their numbers."""
    rows = generated_BS.tolist()
    new = [rows[span.row][span.begin : span.end] for _, span in sorted(spans.items())]
    return [row[: row.index(stop_token)] if stop_token in row else row for row in new]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode and take compiled blocks uncompiled, and afterwards put it back as it was.

    Lengths and batches vary: each would be compiled anew.
    """
    training = model.training
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    model.eval()
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        model.train(training)


def token_lists(prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of tokens. Raises ValueError if they are one prompt, not a batch of them."""
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    if not all(isinstance(row, Iterable) and not isinstance(row, str) for row in rows):
        raise ValueError("generate takes a batch of prompts: a list of lists of tokens, or a tensor [B, T]")
    return [[int(token) for token in row] for row in rows]


def check_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ValueError if a prompt has a token that a vocabulary of `vocab_size` has not."""
    wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"a prompt has the token {wrong}; this model has a vocabulary of {vocab_size}, from 0 on")


def check_options(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    prefill_chunk: int | None,
    top_k: int | None,
    min_p: float,
) -> None:
    """Raise ValueError if an option of `generate` is impossible."""
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate needs a prompt, and in every prompt at least one token (a start token will do)")
    if max_new_tokens < 1 or (prefill_chunk is not None and prefill_chunk < 1):
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and prefill_chunk ({prefill_chunk}) must be at least 1")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature ({temperature}) must be at least 0 and finite, and top_p ({top_p}) in (0, 1]")
    if (top_k is not None and top_k < 1) or not 0 <= min_p <= 1:
        raise ValueError(f"top_k ({top_k}) must be at least 1, or None, and min_p ({min_p}) in [0, 1]")


def batch_prompts(
    plan: Plan, prompts: Sequence[Sequence[int]], pad_token: int | None, device: torch.device
) -> PromptBatch:
    """Batch prompts of any lengths. Raises ValueError as `check_lengths`.

    A prompt need not end with a block: the generated tokens complete it.
    """
    check_lengths(plan, prompts, pad_token)
    block = plan.block_length
    fill = [max(0, plan.min_prompt - len(prompt)) for prompt in prompts]
    rows = [[pad_token or 0] * pads + [int(t) for t in prompt] for pads, prompt in zip(fill, prompts, strict=True)]
    whole = [len(row) // block * block for row in rows]
    most = max(whole)
    common = min(len(row) - end for row, end in zip(rows, whole, strict=True))
    starts = [(most - end) // block for end in whole]
    forced = [row[end + common :] for row, end in zip(rows, whole, strict=True)]
    num_forced = max(map(len, forced))

    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    tokens = [[0] * (most - end) + row[: end + common] for row, end in zip(rows, whole, strict=True)]
    segment_ids = [
        [-1] * (most - end + pads) + [0] * len(row) for row, end, pads in zip(rows, whole, fill, strict=True)
    ]
    return PromptBatch(
        tokens_BT=tensor(tokens),
        start_B=tensor(starts) if any(starts) else None,
        segment_ids_BT=tensor([row[: most + common] for row in segment_ids]) if any(fill) else None,
        forced_BF=tensor([row + [0] * (num_forced - len(row)) for row in forced]).view(len(rows), num_forced),
        num_forced_B=tensor([len(row) for row in forced]),
    )


def check_lengths(plan: Plan, prompts: Sequence[Sequence[int]], pad_token: int | None) -> None:
    """Raise ValueError if a prompt is shorter than `plan.min_prompt` and has no `pad_token`."""
    shortest = min(map(len, prompts))
    if shortest < plan.min_prompt and pad_token is None:
        raise ValueError(
            f"a prompt has {shortest} tokens, less than a block of {plan.block_length}: this model does not predict "
            "the first block; give a longer prompt or a pad_token (or train with arch.block.start)"
        )


def sample(
    logits_BV: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    top_k: int | None = None,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one token [B] per row: the most likely one at temperature 0, else one of those that the options leave.

    They apply in the order of transformers: temperature, `top_k`, `top_p` of what is left, `min_p`.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    # A tiny temperature must not overflow, nor be counted as zero.
    logits_BV = logits_BV.float() - logits_BV.amax(dim=-1, keepdim=True)
    temperature = max(temperature, torch.finfo(logits_BV.dtype).tiny)
    probability_BV, token_BV = (logits_BV / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k is not None and top_k < logits_BV.shape[1]:
        probability_BV = probability_BV.masked_fill(probability_BV < probability_BV[:, top_k - 1 : top_k], 0.0)
        probability_BV = probability_BV / probability_BV.sum(dim=-1, keepdim=True)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    nucleus_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0)
    if min_p > 0:
        nucleus_BV = nucleus_BV.masked_fill(probability_BV < min_p * probability_BV[:, :1], 0.0)
    rank_B = torch.multinomial(nucleus_BV, 1, generator=generator)
    return token_BV.gather(1, rank_B).squeeze(1)
