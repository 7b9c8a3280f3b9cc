"""A task of evaluation: its options, the model that it is given, and its result."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from data.cli import TaskError, UsageError
from data.shards import Manifest

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from arch import LanguageModel
    from arch.compression.method import CacheMethod

T = TypeVar("T")
R = TypeVar("R")
LINE_SECONDS = 30  # between lines of progress where there is no terminal


class Tokenizer(Protocol):
    """Text to tokens and back. `begin` stands before the first token of a document, `end` after its last."""

    @property
    def begin(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens, as the tokenizer spells them, with their numbers."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text to continue: after `begin`, where models of the tokenizer are used to it."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def text_bytes(self, text: str, tokens: Sequence[int]) -> Sequence[float]:
        """UTF-8 bytes of `text` that each of its `tokens` stands for; together all of them."""
        ...


@dataclass(frozen=True)
class Prepared:
    """Prepared folders with the weights of their mixture; `val_tokens` of the validation split are read."""

    folders: Mapping[Path, Manifest]
    weights: Sequence[float]
    val_tokens: int
    document_mask: bool = False

    @property
    def digest(self) -> str:
        """Digests of the folders, joined."""
        return ", ".join(manifest.digest for manifest in self.folders.values())

    @property
    def has_answers(self) -> bool:
        """True if documents are questions with answers (`Manifest.row_length`), not text."""
        return any(manifest.row_length is not None for manifest in self.folders.values())


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that hold the model and divide its evaluation, and the rank of this one.

    gather    returns what every process gives it, in the order of ranks; all call it together
    lockstep  a forward pass needs all processes at once, since each has a part of the weights
    """

    rank: int
    world_size: int
    gather: Callable[[Any], list[Any]]
    lockstep: bool


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, in eval mode.

    model      a model of ours, or one with the same methods: next_token_logits, prefill, decode_step, allocate_cache
    name       in tables and file names
    context    tokens of its training sequences, or the most that it was built for
    texts      files of text given with text=; empty: none
    prepared   the data given with data.path=, or that of the run; None: there is none
    pad_token  fills up prompts that are too short; None: they are refused
    quiet      no progress is shown
    method     what is done to the cache at test time; None: nothing
    group      processes that divide the items of tasks; None: this one does all
    steps      how tokens are decoded, as in arch.static_step.choose_way
    joined     a pair is one token, or two, in the data=recall of kind gap that the model was trained on; None: in none
    """

    model: "LanguageModel"
    tokenizer: Tokenizer
    device: "torch.device"
    name: str
    context: int
    texts: tuple[Path, ...] = ()
    text_key: str = "text"
    prepared: Prepared | None = None
    seed: int = 0
    pad_token: int | None = None
    quiet: bool = False
    method: "CacheMethod | None" = None
    group: ProcessGroup | None = None
    steps: str = "auto"
    joined: bool | None = None

    @property
    def numbers(self) -> int | None:
        """Different tokens of the sequences that the model was trained on (`data=recall`, whose tokenizer is that of
        the numbers below so many); None: it was trained on text."""
        vocabulary = self.tokenizer.vocabulary
        count = len(vocabulary) - 1  # without the end of text
        return count if all(vocabulary.get(str(number)) == number for number in range(count)) else None

    def allocate_cache(self, rows: int, capacity: int, dtype: "torch.dtype | None" = None) -> Any:
        """An empty cache of the model for `rows` sequences of up to `capacity` tokens, with the method.

        `dtype`: type of what is not coded; None: that of the weights. Raises UsageError if the model, or its layout,
        does not take the method.
        """
        from arch.compression.compressed import allocate_compressed

        if self.method is None:
            return self.model.allocate_cache(rows, capacity, dtype=dtype)
        if not self.model.plan.stacks:
            text = f"cache={self.method.text}: {self.name} keeps a cache of transformers; give a run of ours"
            raise UsageError(text)
        weight = self.model.output_weight
        dtype = dtype or weight.dtype
        try:
            return allocate_compressed(
                self.model.plan, rows, capacity, dtype=dtype, device=weight.device, method=self.method
            )
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def documents(self) -> Iterator[str]:
        """The documents in `texts`: lines of .jsonl, rows of .parquet, any other file as a whole. Empty ones are
        passed over.

        Raises DataError if a file cannot be read.
        """
        from data.files import DataError
        from data.reading import rows_of_file

        for path in self.texts:
            try:
                yield from filter(None, rows_of_file(path, self.text_key, by_lines=False, option="text_key"))
            except (OSError, ValueError, EOFError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"text={path} cannot be read: {error}") from error

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Continue `prompts` over the cache of the model; `options` as of `arch.generate`.

        Raises UsageError if a prompt is too short for the model.
        """
        from arch import generate
        from arch.generation import check_lengths

        options = {"pad_token": self.pad_token, "steps": self.steps, **options}
        try:
            check_lengths(self.model.plan, prompts, options["pad_token"])
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error
        return generate(self.model, [list(prompt) for prompt in prompts], max_new_tokens, **options)

    def each(self, items: Iterable[T], run: Callable[[T], R], same_passes: bool = True) -> list[R]:
        """`run` of each of `items`, in order: by turns among the processes that share them, each of which makes all.

        same_passes  it takes as many forward passes of the model whatever the item is. Where it may not, every process
                     runs all items of a model that needs them in lockstep

        Raises the UsageError or TaskError of one process in all of them.
        """
        group = self.group
        if group is None or (group.lockstep and not same_passes):
            return [run(item) for item in items]
        mine: list[R] = []
        refusal: UsageError | TaskError | None = None
        source = iter(items)
        try:
            # A whole turn is made before any of it is run: an item that cannot be made ends it in all processes alike.
            while turn := list(islice(source, group.world_size)):
                if group.rank < len(turn):
                    mine.append(run(turn[group.rank]))
                elif group.lockstep:
                    run(turn[-1])  # for the others' sake
        except (UsageError, TaskError) as error:
            refusal = error
        for refused in filter(None, group.gather(refusal)):
            raise refused
        parts = group.gather(mine)
        return [part[number] for number in range(len(parts[0])) for part in parts if number < len(part)]

    def progress(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Yield `items` and show on standard error how many of `total` are done: a bar, or a line now and then."""
        if self.quiet:
            yield from items
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track

            yield from track(items, what, total, console=Console(stderr=True), transient=True)
        else:
            reported = time.monotonic()
            for number, item in enumerate(items):
                if time.monotonic() - reported > LINE_SECONDS:
                    reported = time.monotonic()
                    print(f"{what}: {number:,} of {total:,}", file=sys.stderr, flush=True)
                yield item


@dataclass(frozen=True)
class Options:
    """Options of a task; each task extends it with its own, and a docstring that explains them."""

    def problems(self) -> list[str]:
        """List what is wrong with them, each item beginning with the option; checked before anything is loaded."""
        return []

    def deciding(self) -> dict[str, Any]:
        """The options by name, for the digest of a result: what decides its figures."""
        return asdict(self)


@dataclass(frozen=True)
class TaskResult:
    """Figures of a task, by name; a slash groups them.

    rows      a table of details, equal keys in every row
    pictures  by name
    notes     sentences about what was measured, for the reader of the table
    samples   values of single windows or sequences, by name, the same ones for every model and cache method
    larger    for figures whose task cannot tell beforehand: whether more is better
    """

    figures: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, "Figure"] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    samples: dict[str, list[float]] = field(default_factory=dict)
    larger: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An entry of the registry. Its module imports torch inside `run`, so that --help need not wait for it.

    options     the class of its options
    run         evaluates a subject
    argument    the field of `options`, a tuple of str, that collects what follows a colon: tasks=[name:a,name:b]
    reads_text  what text= or data.path= names changes the figures
    of_numbers  asks a model of data=recall with the tokens of its data (`Subject.numbers`)
    compresses  runs over a cache of the subject's method
    timed       how the subject decodes (`Subject.steps`) changes the figures
    larger      last words of the names of figures of which more is better, whatever length or filter follows
    """

    options: type[Options]
    run: Callable[[Subject, Any], TaskResult]
    argument: str | None = None
    reads_text: bool = False
    of_numbers: bool = False
    compresses: bool = False
    timed: bool = False
    larger: tuple[str, ...] = ()
