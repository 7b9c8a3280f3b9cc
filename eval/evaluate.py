"""Evaluate a model: `python eval/evaluate.py checkpoint=runs/mine tasks=perplexity text=book.txt`.

The model is that of a run (results go into its folder, its summary.json and its wandb run), of a single checkpoint, or
any that transformers loads: an exported folder, or a name on the Hugging Face hub. Prints a table.
With `cache=[none,int4,snapkv@25%]` tasks run through a cache that is made smaller at test time, once for each method.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from arch.compression.checks import check_method
from data.cli import UsageError, parse, usage
from eval.methods import NONE, name_of, read_method, with_brackets
from eval.outcome import run_script
from eval.source import Source
from eval.tasks import TASKS, ChosenTask, sections, select_tasks
from eval.tasks.task import TaskResult

if TYPE_CHECKING:
    from arch.compression.method import CacheMethod
    from train.subjects import Opened


@dataclass(frozen=True)
class DataOptions:
    """Prepared data that tasks read instead of the run's own.

    path        a prepared folder, whose validation split is read
    val_tokens  number of its tokens to read; null: all
    """

    path: Path | None = None
    val_tokens: int | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """Options.

    checkpoint  a run, a checkpoint, a folder that export.py wrote, or a model of the Hugging Face hub
    tasks       names of tasks, separated by commas; empty: perplexity, or compressed if cache= is given
    cache       compression of the cache: a codec (int4), a rule of what to keep (snapkv@25%), both (int4+snapkv@25%),
                or none; several, separated by commas, are evaluated one after the other
    text        files that tasks read (.txt .md .jsonl .parquet, also packed), separated by commas; empty: the prepared
                data of data.path=, or of the run
    text_key    the key of .jsonl, or the column of .parquet, with the text
    which       newest or best (by validation loss) checkpoint of a run
    context     tokens that the model sees at once; null: the length of a training sequence
    device      cpu, cuda, ...; auto: cuda if there is one
    dtype       type of the weights: fp32, bf16, fp16; auto: fp32, or on a GPU the stored type of the hub's models
    prepared    prepared folder with the tokenizer of a checkpoint; null: that of the run
    trust       run code from the checkpoint, which an exported folder of ours may have
    revision    branch, tag or commit on the hub
    out         folder for the results; null: evaluations/ in the run, or one of the checkpoint's name in
                runs/evaluations
    wandb       log to the wandb run of the run, if it has one
    seed        seed of random draws in tasks
    """

    checkpoint: str = ""
    tasks: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()
    text: tuple[Path, ...] = ()
    text_key: str = "text"
    which: str = "newest"
    context: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    prepared: Path | None = None
    trust: bool = False
    revision: str | None = None
    out: Path | None = None
    wandb: bool = True
    seed: int = 0


def main(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(help_text())
        return
    options, data, words = read(arguments)
    tasks = select_tasks(options.tasks or (("compressed",) if options.cache else ("perplexity",)), words)
    methods = methods_of(options.cache, tasks)
    check(options, data)
    source = Source.of(options)
    source.check()
    from train.subjects import open_subject  # brings torch

    opened = open_subject(source, options.context, options.text, options.text_key, options.seed)
    evaluate(with_data(opened, tasks, data), tasks, options, data, methods)


def read(arguments: Sequence[str]) -> tuple[EvaluateConfig, DataOptions, list[str]]:
    """Split a command line into the options of the command, those of data, and the words for tasks."""
    prefixes = {"data": list[str](), "": list[str](), **{name: list[str]() for name in sections()}}
    for argument in arguments:
        prefix = argument.partition("=")[0].partition(".")[0]
        dotted = "." in argument.partition("=")[0] and prefix in prefixes
        prefixes[prefix if dotted else ""].append(argument)
    own, of_data = prefixes.pop(""), prefixes.pop("data")
    words = [word for group in prefixes.values() for word in group]
    parsed = parse(DataOptions, [word.removeprefix("data.") for word in of_data], prefix="data.")
    return parse(EvaluateConfig, own), parsed, words


def methods_of(words: Sequence[str], tasks: Sequence[ChosenTask]) -> "list[CacheMethod | None]":
    """The cache methods that `cache=` names, each once; without any, none.

    Raises UsageError on a method that there is not, and if a task does not run over a cache.
    """
    methods = dict.fromkeys(map(read_method, with_brackets(words or (NONE,))))
    if any(methods) and (others := [chosen.name for chosen in tasks if not chosen.task.compresses]):
        able = [name for name, task in TASKS.items() if task.compresses]
        raise UsageError(
            f"cache= is for tasks that run over a cache ({', '.join(able)}); {', '.join(others)} runs without one: "
            "measure it by a command of its own, without cache="
        )
    return list(methods)


def help_text() -> str:
    """The options of the command and of every task."""
    parts = [usage(EvaluateConfig), "data.:\n" + usage(DataOptions, module=False)]
    parts += [f"{name}.:\n{usage(schema, module=False)}" for name, schema in sections().items()]
    return "\n\n".join(parts)


def check(options: EvaluateConfig, data: DataOptions) -> None:
    """Raise UsageError on files that are not there and numbers that make no sense."""
    for path in options.text:
        if not path.is_file():
            rest = "; commas separate files" if len(options.text) > 1 else ""
            raise UsageError(f"text={path}: there is no such file{rest}")
    if options.text and data.path is not None:
        raise UsageError("text= and data.path= are both set; choose one")
    for name, value in (("context", options.context), ("data.val_tokens", data.val_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")


def with_data(opened: "Opened", tasks: Sequence[ChosenTask], data: DataOptions) -> "Opened":
    """`opened` with the prepared data that its tasks read: what was named, or that of the run."""
    from train.subjects import data_of_run, other_data

    if opened.subject.texts or not any(chosen.task.reads_text for chosen in tasks):
        return opened
    prepared = data_of_run(opened) if data.path is None else other_data(opened, data.path, data.val_tokens)
    return replace(opened, subject=replace(opened.subject, prepared=prepared))


def evaluate(
    opened: "Opened",
    tasks: Sequence[ChosenTask],
    options: EvaluateConfig,
    data: DataOptions,
    methods: "Sequence[CacheMethod | None]" = (None,),
) -> dict[str, TaskResult]:
    """Run `tasks`, write each result as soon as there is one, and print all of them."""
    from eval.console import PlainConsole
    from eval.evaluations import (
        FOLDER,
        comparisons,
        digest_of,
        entry,
        figures_table,
        key_of,
        rows_table,
        write_evaluation,
    )

    name = options.checkpoint.strip("/").replace("/", "--")
    folder = options.out or (opened.run or Path("runs", FOLDER, name)) / (FOLDER if opened.run else "")
    given = options.text or (() if data.path is None else (data.path,))
    about = {"checkpoint": options.checkpoint if opened.loaded is None else str(opened.loaded.checkpoint)}
    for given_method in filter(None, methods):
        try:
            check_method(opened.subject.model.plan, given_method)
        except ValueError as error:
            raise UsageError(f"cache= of {opened.subject.name}: {error}") from error
    console, results, written = PlainConsole(), {}, list[Path]()
    has_summary = is_of_summary(opened)
    try:
        for chosen, method in ((chosen, method) for chosen in tasks for method in methods):
            subject = replace(opened.subject, method=method)
            key = key_of(chosen, given, name_of(method))
            results[key] = chosen.run(subject)
            try:
                written += write_evaluation(key, chosen, subject, results[key], folder, about | {"step": opened.step})
            except OSError as error:
                line = f"cannot write to {folder} ({error.strerror}); give another folder with out="
                raise UsageError(line) from error
            if has_summary and opened.step is not None:
                found = entry(results[key], opened.step, digest_of(chosen, subject), name_of(method))
                merge_into(opened, {key: found})
            if results[key].rows:
                console.print(rows_table(key, results[key]))
            for note in results[key].notes:
                console.print(f"{key}: {note}")
    finally:  # what there is, if a later task fails or is interrupted
        for table in (figures_table(opened.subject.name, results), *comparisons(results)) if results else ():
            console.print(table)
    if options.wandb and has_summary:
        log_to_wandb(opened, results, [path for path in written if path.suffix == ".png"])
    for path in written:
        console.print(str(path), soft_wrap=True)
    return results


def is_of_summary(opened: "Opened") -> bool:
    """Tell whether the checkpoint is that of the run's summary, and if there is one that is not, say so."""
    from eval.evaluations import steps_of_summary

    if opened.run is None or opened.step is None:
        return False
    steps = steps_of_summary(opened.run)
    if steps is None:
        print("the run has not ended: it has no summary.json yet to put figures into", file=sys.stderr)
    elif steps != opened.step:
        line = f"summary.json is of step {steps}, these figures are of step {opened.step}: they are not put into it"
        print(line, file=sys.stderr)
    return steps == opened.step


def merge_into(opened: "Opened", entries: dict[str, dict[str, Any]]) -> None:
    """Put the entries of results into the summary of the run, or say that it cannot be written."""
    from eval.evaluations import merge

    assert opened.run is not None
    try:
        merge(opened.run, entries)
    except OSError as error:
        line = f"{opened.run}/summary.json cannot be written ({error.strerror}): figures are not put into it"
        print(line, file=sys.stderr)


def log_to_wandb(opened: "Opened", results: dict[str, TaskResult], pictures: list[Path]) -> None:
    """Add the figures and pictures to the wandb run of the run, where it has one."""
    if opened.run is None or opened.config is None or not (opened.run / "wandb-id.txt").is_file():
        return
    from train.loggers import log_evaluations  # brings wandb

    scalars = {
        f"evaluations/{key}/{name}": value for key, found in results.items() for name, value in found.figures.items()
    }
    log_evaluations(opened.config, opened.run, scalars, pictures)


if __name__ == "__main__":
    run_script(main)
