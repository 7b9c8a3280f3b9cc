"""Time and cache of decoding on the device at hand: prefill, then greedy tokens over the cache."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult


@dataclass(frozen=True)
class Options(TaskOptions):
    """Random tokens as prompts; medians over the rounds. Compare figures of one machine that does nothing else.

    prompt  tokens of each prompt; null: the context less the new tokens
    new     new tokens of each sequence
    batch   sequences at once
    rounds  measured rounds, after one to warm up
    """

    prompt: int | None = None
    new: int = 32
    batch: int = 1
    rounds: int = 5

    def problems(self) -> list[str]:
        least = {"prompt": 1, "new": 2, "batch": 1, "rounds": 1}
        return [
            f"{name} is {value}; it must be at least {low}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and value < low
        ]


def run(subject: Subject, options: Options) -> TaskResult:
    """Milliseconds of a prefill and of a token of each sequence, tokens per second, and bytes of the cache as it is."""
    from arch.static_step import choose_way

    plan = subject.model.plan
    length = options.prompt or max(subject.context - options.new, 1)
    length = max(-(-length // plan.block_length), 1) * plan.block_length  # whole blocks, of which none is predicted
    rows: list[dict[str, Any]] = []
    for number in subject.progress(range(options.rounds + 1), options.rounds + 1, f"{subject.name}: decode"):
        row = measured(subject, options, length)
        if number:  # the first warms up
            rows.append({"round": number, **row})
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "round"}
    figures = {**middle, "tokens_per_second": 1000 * options.batch / middle["token_ms"]}
    way = choose_way(subject.model, subject.steps)
    note = (
        f"prompts of {length:,} tokens, {options.new:,} new ones, {options.batch:,} at once, in {way} steps, on "
        f"{subject.device}"
    )
    return TaskResult(figures, rows, notes=(note,))


def per_step(times: Sequence[float], block: int) -> float:
    """Seconds per step: the median over blocks, one of whose steps does more, so that the steps in which a graph is
    captured do not count. The mean, where there are too few for a block."""
    step = block if len(times) > block else len(times) - 1
    ends = times[::step]
    return statistics.median(end - begin for begin, end in pairwise(ends)) / step


def measured(subject: Subject, options: Options, length: int) -> dict[str, float]:
    """One round: `prefill_ms` until the first token, `token_ms` per step after it, and `cache_bytes`."""
    import torch

    generator = torch.Generator().manual_seed(subject.seed)
    vocabulary = len(subject.model.output_weight)
    prompts = torch.randint(vocabulary, (options.batch, length), generator=generator).tolist()
    times: list[float] = []

    def on_step(_: Mapping[int, int]) -> tuple[int, ...]:
        times.append(time.perf_counter())
        return ()

    cache = subject.model.allocate_cache(options.batch, length + options.new - 1)
    began = time.perf_counter()
    subject.generate(prompts, options.new, follow=on_step, cache=cache)
    return {
        "prefill_ms": 1000 * (times[0] - began),
        "token_ms": 1000 * per_step(times, subject.model.plan.block_length),
        "cache_bytes": float(cache.nbytes),
    }
