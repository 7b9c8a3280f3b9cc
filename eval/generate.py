"""Continue text with a model: `python eval/generate.py checkpoint=runs/mine prompt="def " max_new_tokens=100`.

The text is streamed. Several prompts, of any lengths, are continued at once and shown in their order. The last line
shows tokens per second and the bytes of the cache, which `cache=int4`, `cache=snapkv@25%` and other methods make
smaller after the prompt.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from data.cli import UsageError, parse
from data.files import DataError
from eval.console import visible
from eval.methods import NONE, read_method
from eval.outcome import run_script
from eval.source import Source
from eval.units import bytes_text

if TYPE_CHECKING:
    from eval.tasks.task import Subject, Tokenizer


@dataclass(frozen=True)
class GenerateConfig:
    """Options.

    checkpoint      a run, a checkpoint, a folder that export.py wrote, or a model of the Hugging Face hub
    prompt          text to continue; may be given several times
    prompts         a file of prompts, one per line; in .jsonl, its key `prompt`
    max_batch       limit of prompts at once; of more, the next one begins when one has ended. null: all at once
    max_new_tokens  limit of each continuation, which may end before, at the end of a text
    temperature     0: always the most likely token (greedy); 1: the probabilities of the model
    top_k           sample from this many of the most likely tokens; null: from all
    top_p           sample from the smallest set of tokens with this much probability
    min_p           sample from tokens at least this fraction as likely as the most likely one
    seed            seed of the sampling
    cache           compression of the cache: a codec, a rule of what to keep, both (int4+snapkv@25%), or none
    steps           how a token is decoded: plain; static, with shapes that stay the same; compiled, after seconds of
                    compiling; graph, on CUDA; auto: graph on CUDA, else plain
    stop            texts that end a continuation, separated by commas, blanks and line ends included; not printed
    which           newest or best (by validation loss) checkpoint of a run
    device          cpu, cuda, ...; auto: cuda if there is one
    dtype           type of the weights: fp32, bf16, fp16; auto: fp32, or on a GPU the stored type of the hub's models
    prepared        prepared folder with the tokenizer of a checkpoint; null: that of the run
    trust           run code from the checkpoint, which an exported folder of ours may have
    revision        branch, tag or commit on the hub
    quiet           print only the texts
    """

    checkpoint: str = ""
    prompt: str = ""
    prompts: Path | None = None
    max_batch: int | None = None
    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    cache: str = NONE
    steps: str = "auto"
    stop: tuple[str, ...] = ()
    which: str = "newest"
    device: str = "auto"
    dtype: str = "auto"
    prepared: Path | None = None
    trust: bool = False
    revision: str | None = None
    quiet: bool = False


class Stream:
    """The text of one continuation as its tokens come.

    Decoded text is shown once it cannot change any more: not while it ends within a character, or with the beginning
    of one of `stops`. `done` is set when one of these is complete.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.num_tokens = 0
        self.shown, self.done = "", False
        self._begin(prompt)

    def _begin(self, context: Sequence[int]) -> None:
        """Decode what comes from now on after `context`, tokens of whole characters, instead of the whole text.

        A tokenizer may drop a blank at the beginning of what it decodes.
        """
        self.context, self.before = context, self.tokenizer.decode(context)
        self.tokens: list[int] = []
        self.told = 0  # characters of the decoded text that are shown

    def add(self, token: int) -> str:
        """Return the text that can be shown after another token; empty if there is none yet."""
        self.tokens.append(token)
        self.num_tokens += 1
        text = self._decoded()
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.done = True
            return self._show(text[: min(found)])
        whole = text.rstrip(UNFINISHED)
        held = max((n for stop in self.stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
        new = self._show(whole[: len(whole) - held])
        if new and self.told == len(text):
            self._begin(self.tokens)
        return new

    def end(self) -> str:
        """Return what was held back."""
        return "" if self.done else self._show(self._decoded())

    def _decoded(self) -> str:
        """The text of the tokens after `context`.

        Byte fallback decodes a run of bytes to characters only if all of it is valid. A byte that is not, or not yet,
        leaves what is shown as it is: its run begins after `context`.
        """
        text = self.tokenizer.decode([*self.context, *self.tokens])
        return text[len(self.before) :] if text.startswith(self.before) else self.tokenizer.decode(self.tokens)

    def _show(self, text: str) -> str:
        new = text[self.told :]
        self.told += len(new)
        self.shown += new
        return new


UNFINISHED = "\ufffd"  # of bytes that are no whole character yet


def main(arguments: Sequence[str]) -> None:
    given = [word.removeprefix("prompt=") for word in arguments if word.startswith("prompt=")]
    stops = [word.removeprefix("stop=") for word in arguments if word.startswith("stop=")]
    words = [word for word in arguments if not word.startswith(("prompt=", "stop="))]
    options = parse(GenerateConfig, words or ["--help"])
    options = replace(options, stop=tuple(stop for text in stops for stop in text.split(",") if stop))
    check(options)
    method = read_method(options.cache)
    prompts = [*given, *(read_prompts(options.prompts) if options.prompts else [])] or [""]
    source = Source.of(options)
    source.check()
    from train.subjects import open_subject  # brings torch

    generate(replace(open_subject(source).subject, method=method), prompts, options)


def check(options: GenerateConfig) -> None:
    """Raise UsageError on a value that makes no sense."""
    if options.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 1")
    for name, limit in (("top_k", options.top_k), ("max_batch", options.max_batch)):
        if limit is not None and limit < 1:
            raise UsageError(f"{name} is {limit}; it must be at least 1, or null")
    for name, value, fits in (
        ("temperature", options.temperature, 0 <= options.temperature < float("inf")),
        ("top_p", options.top_p, 0 < options.top_p <= 1),
        ("min_p", options.min_p, 0 <= options.min_p <= 1),
    ):
        if not fits:
            what = "at least 0" if name == "temperature" else "from 0 to 1"
            raise UsageError(f"{name} is {value}; it must be {what}")
    if options.cache != NONE and options.steps not in ("auto", "plain"):
        raise UsageError(f"steps={options.steps} with cache={options.cache}: such a cache takes plain steps")
    if options.prompts is not None and not options.prompts.is_file():
        raise UsageError(f"prompts={options.prompts}: there is no such file")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: its rows, or of a text the lines that are not empty.

    Raises DataError if it cannot be read, UsageError if it has none.
    """
    from data.listing import kind_of
    from data.reading import rows_of_file

    try:
        found = list(rows_of_file(path, "prompt", by_lines=True, option=None))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"prompts={path} cannot be read: {error}") from error
    if kind_of(path) not in (".jsonl", ".parquet"):
        found = [line for row in found if (line := row.rstrip("\r\n"))]
    if not found:
        raise UsageError(f"prompts={path} has no prompt")
    return found


def generate(subject: "Subject", prompts: Sequence[str], options: GenerateConfig) -> list[str]:
    """Continue `prompts`, show the texts and what it took; return the continuations."""
    import torch

    from arch import generate as continue_prompts
    from arch.generation import batch_prompts, check_lengths
    from arch.static_step import choose_way

    tokenizer, model = subject.tokenizer, subject.model
    tokens = [tokenizer.prompt(prompt) or [tokenizer.begin] for prompt in prompts]
    rows = min(len(tokens), options.max_batch or len(tokens))
    if rows < len(tokens) and (subject.method is not None or not model.plan.stacks):
        which = "the cache of transformers" if subject.method is None else f"cache={options.cache}"
        raise UsageError(
            f"max_batch={rows}: {which} takes no prompts later on, and there are {len(tokens)}; leave max_batch out, "
            "or give fewer prompts"
        )
    try:
        check_lengths(model.plan, tokens, subject.pad_token)
        steps = choose_way(model, options.steps) if subject.method is None else "plain"
        first = sorted(tokens, key=len)[-rows:]
        batch = batch_prompts(model.plan, first, subject.pad_token, model.output_weight.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with torch.inference_mode():
        cache = subject.allocate_cache(rows, batch.capacity(options.max_new_tokens))
    streams = [Stream(tokenizer, prompt, options.stop) for prompt in tokens]
    watch = Watch(prompts, streams, options.max_new_tokens, tokenizer.end, show=print_text)

    def follow(new: Mapping[int, int]) -> list[int]:
        if not watch.first and subject.method is not None:  # the prompt is in the cache, and no step was taken
            cache.compress()
        return watch(new)

    continue_prompts(
        model,
        tokens,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        stop_token=tokenizer.end,
        follow=follow,
        steps=steps,
        pad_token=subject.pad_token,
        cache=cache,
        seed=options.seed,
        max_batch=options.max_batch,
    )
    if not options.quiet:
        before = compressed_from(subject, cache, rows, batch.capacity(options.max_new_tokens))
        print(watch.report(cache.nbytes, subject) + before, file=sys.stderr)
    return [stream.shown for stream in streams]


def compressed_from(subject: "Subject", cache: Any, rows: int, capacity: int) -> str:
    """Say what `cache` would weigh without the method of `subject`, and what of it is elsewhere; empty without one."""
    from arch import allocated_bytes
    from arch.compression.storage import offloads

    if subject.method is None:
        return ""
    model = subject.model
    whole_bytes = allocated_bytes(model.plan, rows, capacity, model.output_weight.element_size())
    text = f", {bytes_text(whole_bytes)} before {subject.method.text}"
    if offloads(subject.method):
        text += f"; {bytes_text(cache.offloaded_nbytes)} in another memory, from which "
        text += f"{bytes_text(cache.recalled_nbytes)} were copied back"
    return text


class Watch:
    """Shows the texts in the order of the prompts while they are made: of the first one that goes on, what there is.

    A text ends at the end of a text, at a stop, or after `most` tokens.
    """

    def __init__(
        self, prompts: Sequence[str], streams: Sequence[Stream], most: int, end: int, show: Callable[[str], None]
    ):
        self.prompts, self.streams, self.most, self.end, self.show = prompts, streams, most, end, show
        self.ended = [False] * len(streams)
        self.number, self.told = -1, 0  # of the text that is shown, and its characters that are
        self.later = 0  # tokens after those of the first step
        self.began, self.first, self.last = time.perf_counter(), 0.0, 0.0
        self._next()

    def __call__(self, new: Mapping[int, int]) -> list[int]:
        """Take the new tokens by the numbers of their prompts; return the prompts that end with them."""
        self.last = time.perf_counter()
        self.later += len(new) if self.first else 0
        self.first = self.first or self.last
        for number, token in new.items():
            stream = self.streams[number]
            if token != self.end:
                stream.add(token)
            self.ended[number] = token == self.end or stream.done or stream.num_tokens == self.most
            if self.ended[number]:
                stream.end()
        while self.number < len(self.streams):
            text = self.streams[self.number].shown
            self.show(text[self.told :])
            self.told = len(text)
            if not self.ended[self.number]:
                break
            self._next()
        return [number for number in new if self.ended[number]]

    def _next(self) -> None:
        """End the line of the text that is shown, and begin that of the next one with its prompt."""
        self.number, self.told = self.number + 1, 0
        if self.number:
            self.show("\n")
        if self.number < len(self.prompts):
            title = f"[{self.number + 1}] " if len(self.prompts) > 1 else ""
            self.show(("\n" if self.number else "") + title + self.prompts[self.number])

    def report(self, cache_bytes: int, subject: "Subject") -> str:
        """A line about speed and cache: decoding alone, without the first token, which the prompt takes."""
        made = sum(stream.num_tokens for stream in self.streams)
        seconds = self.last - self.first
        speed = f"{self.later / seconds:,.1f} tokens/s" if seconds > 0 else "no speed"
        return (
            f"{made:,} tokens, the first after {1000 * (self.first - self.began):,.0f} ms, then {speed} on "
            f"{subject.device}; cache {bytes_text(cache_bytes)} ({cache_bytes:,} bytes)"
        )


def print_text(text: str) -> None:
    """Print a part of a text at once; characters that a terminal would obey are shown as escapes."""
    print(visible(text), end="", flush=True)


if __name__ == "__main__":
    run_script(main)
