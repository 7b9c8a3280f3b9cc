"""A model of lm-eval around a subject: shared prefixes are prefilled once, and text is generated over the cache."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data.cli import TaskError, UsageError, did_you_mean
from eval.tasks.harness import Options, by_prefix, window_of
from eval.tasks.likelihood import Likelihood, continuation_likelihoods, pieces, whole_likelihoods
from eval.tasks.task import Subject

MAX_GEN_TOKS = 256  # where a task does not say, as of lm-eval's `hf`
REQUESTS_PER_ROW = 16  # of one call
# Keys of generation that change nothing, or that `arch.generate` has.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class SubjectLM(TemplateLM):  # type: ignore[misc]
    """A model as lm-eval asks for one, which asks `subject`. Encoding and windows are those of lm-eval's `hf`."""

    def __init__(self, subject: Subject, batch: int):
        super().__init__()
        self.subject, self.batch = subject, batch
        self.max_length = subject.context

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        return self.subject.tokenizer.begin

    @property
    def tokenizer_name(self) -> str:
        return self.subject.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, with a begin of text where models of the tokenizer are used to it."""
        tokenizer = self.subject.tokenizer
        return tokenizer.encode(string) if add_special_tokens is False else tokenizer.prompt(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Likelihood of each continuation; the only progress that is shown is our own."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Continuations of one prefix together over its cache; all others in batches of like length."""
        pairs = [(window_of(prefix, rest, self.max_length), rest) for _, prefix, rest in requests]
        found: list[Likelihood | None] = [None] * len(pairs)
        model, pad = self.subject.model, self.eot_token_id
        groups = by_prefix([prefix for prefix, _ in pairs])
        shared = [group for group in groups if len(group) > 1]
        single = [group[0] for group in groups if len(group) == 1]
        single.sort(key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
        work = [*shared, *pieces(single, self.batch)]

        def score(numbered: tuple[int, Sequence[int]]) -> list[Likelihood]:
            number, group = numbered
            if number < len(shared):
                return continuation_likelihoods(model, pairs[group[0]][0], [pairs[index][1] for index in group], pad)
            return whole_likelihoods(model, [pairs[index] for index in group], pad)

        shown = self.subject.progress(enumerate(work), len(work), f"{self.subject.name}: lm-eval")
        for group, scored in zip(work, self.subject.each(shown, score, same_passes=False), strict=True):
            for index, likelihood in zip(group, scored, strict=True):
                found[index] = likelihood
        answers = [(likelihood.nats, likelihood.greedy) for likelihood in found if likelihood is not None]
        assert len(answers) == len(requests)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap; the first token follows a begin of text."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            tokens = self.tok_encode(text)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            found = [make_disjoint_window(pair) for pair in rolling]
            windows += [(None, *pair) for pair in found]
            counts.append(len(found))
        nats = [nats for nats, _ in self._loglikelihood_tokens(windows)]
        begins = [sum(counts[:number]) for number in range(len(counts))]
        return [sum(nats[begin : begin + count]) for begin, count in zip(begins, counts, strict=True)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each text up to one of its stop strings, over the cache; requests of like length together.

        A row that has ended takes the next request; one in a cache of transformers waits for the others.
        """
        found = [""] * len(requests)
        work: list[list[int]] = []
        size = self.batch
        if self.subject.model.plan.stacks:
            sharing = self.subject.group
            processes = 1 if sharing is None or sharing.lockstep else sharing.world_size
            size *= min(REQUESTS_PER_ROW, max(1, len(requests) // (self.batch * processes)))
        encoded = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for group in by_prefix([repr(request.args[1]) for request in requests]):
            group.sort(key=lambda index: -len(encoded[index]))
            work += [list(part) for part in pieces(group, size)]

        def write(group: list[int]) -> list[str]:
            return self._generate([encoded[index] for index in group], requests[group[0]].args[1])

        shown = self.subject.progress(work, len(work), f"{self.subject.name}: lm-eval")
        for group, texts in zip(work, self.subject.each(shown, write, same_passes=False), strict=True):
            for index, text in zip(group, texts, strict=True):
                found[index] = text
        return found

    def _generate(self, prompts: list[list[int]], gen_kwargs: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(gen_kwargs, MAX_GEN_TOKS)
        stops = handle_stop_sequences(options.pop("until", None), eos=None)
        new = options.pop("max_gen_toks")
        sampled = options.pop("do_sample", False)
        chosen = {key: options.pop(key) for key in SAMPLING if key in options}
        if options:
            raise UsageError(f"lm-eval asks for {', '.join(options)} in generation, which is not supported here")
        room = max(self.max_length - new, self.max_length // 2, 1)  # a short context keeps half of it
        tokenizer = self.subject.tokenizer
        rows: list[list[int]] = [[] for _ in prompts]

        def stopped(new: Mapping[int, int]) -> list[int]:
            for number, token in new.items():
                rows[number].append(token)
            return [number for number in new if any(stop and stop in tokenizer.decode(rows[number]) for stop in stops)]

        texts = self.subject.generate(
            [prompt[-room:] for prompt in prompts],
            new,
            stop_token=tokenizer.end,
            follow=stopped,
            max_batch=self.batch,
            **(chosen if sampled else {}),
        )
        return [postprocess_generated_text(tokenizer.decode(text), stops, None) for text in texts]


def evaluate(subject: Subject, options: Options) -> dict[str, Any]:
    """Score the tasks, and return what `simple_evaluate` does.

    Raises UsageError on one that lm-eval does not know, TaskError if its data cannot be had.
    """
    manager = None
    if options.include_path is not None:
        manager = TaskManager(include_path=options.include_path, include_defaults=False)
        if not set(options.names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=options.include_path)
    manager = manager or TaskManager()
    for name in options.names:
        if name not in manager.all_tasks:
            raise UsageError(f"lm-eval has no task {name}{did_you_mean(name, list(manager.all_tasks))}")
    with own_random_state():  # lm-eval seeds the global generators, with the same seeds as from its command line
        try:
            found = lm_eval.simple_evaluate(
                model=SubjectLM(subject, options.batch),
                tasks=list(options.names),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
            )
        except OSError as error:  # of the hub: a data set that is not on this machine, and no network
            raise TaskError(f"lm-eval: {error}") from error
    assert found is not None
    return {**found, "version": version("lm-eval")}


@contextmanager
def own_random_state() -> Iterator[None]:
    """Restore the states of the global generators afterwards: a training run may go on."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
