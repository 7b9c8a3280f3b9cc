"""Command lines: Hydra over a typed schema, with errors that name the fix and exit code 2.

A script calls `launch(task, "name", Schema)`; `configs/name.yaml` is its primary config and starts from the node
`name_schema`. `task` gets a typed object, whose `arch` and `size` are filled in from `+arch=X +size=Y`.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from arch.named import CONFIGS, names
from data.cli import UsageError, did_you_mean, fail, interrupted, report, unknown_key, word
from data.launcher import launched_rank, num_launched
from eval.console import visible
from eval.help import help_text
from eval.outcome import outcome
from eval.overrides import WORD, as_typed, sweep_size
from eval.typed import mistyped_booleans


@dataclass(frozen=True)
class Choices:
    """The names given with `+arch=` and `+size=`; None if a script was started without."""

    arch: str | None
    size: str | None


def is_alone() -> bool:
    """Tell whether this is the only process. Lightning takes WORLD_SIZE away after each run, but not their group."""
    torch = sys.modules.get("torch")
    grouped = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return num_launched() == 1 and not grouped


def launch(task: Callable[[DictConfig, Choices], None], name: str, schema: type) -> None:
    """Compose `configs/<name>.yaml` with the command line, check it against `schema` and run `task` on it.

    A mistake of the user (of eval/outcome.py, or one that Hydra finds) is printed without a traceback, and the process
    ends with code 2; so is a TaskError, with code 1, and Ctrl-C, with 130. Each run of a sweep is announced, and one
    that fails so is named at the end, after the others. The script of a task imports what takes seconds (torch,
    Lightning) inside the task, after its own checks, so that help and mistakes are answered at once.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of Hydra's own printer, which exits with 1
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    typed, crashed = sys.argv, False
    words: list[str] = []
    failed: list[tuple[str, int]] = []  # runs of a sweep, and the exit code of each alone

    def end(message: str, code: int) -> None:
        # Of several processes the others may be in another run.
        if HydraConfig.get().mode != RunMode.MULTIRUN or not is_alone():
            fail(message, code)
        failed.append((visible(" ".join(HydraConfig.get().overrides.task)), code))
        report(message)

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)
    def job(config: DictConfig) -> None:
        nonlocal crashed
        sys.argv, picked = typed, HydraConfig.get()
        choices = picked.runtime.choices
        try:
            check_keys(config, schema)
            if picked.mode == RunMode.MULTIRUN and launched_rank() == 0:
                total = sweep_size(words, picked.sweeper.params or {})
                print(f"run {picked.job.num + 1} of {total}: {visible(' '.join(picked.overrides.task))}", flush=True)
            task(config, Choices(choices.get("arch"), choices.get("size")))
        except Exception as error:  # here, or Hydra would announce it with the whole command line
            found = (explain(error), 2) if isinstance(error, OmegaConfBaseException) else outcome(error)
            if found is None:
                crashed = True
                raise
            end(*found)

    try:
        flags, options, words = read_flags(typed[1:])
        words = as_typed(words, schema, sweep=options.multirun)
        if options.help:
            print(help_text(name, schema, words, options.config_dir))
            return
        sys.argv = [typed[0], *flags, *words]
        with composed_once(flags, words):
            job()
        if failed:
            runs = "\n".join(name for name, _ in failed)
            fail(f"{len(failed)} of the runs of the sweep failed:\n{runs}", min(code for _, code in failed))
    except KeyboardInterrupt:
        interrupted()
    except UsageError as error:
        fail(str(error))
    except Exception as error:
        if crashed:
            raise
        fail(explain(error, words))  # Hydra's, about the command line: no task has raised it
    finally:
        sys.argv = typed


def check_keys(config: DictConfig, schema: type) -> None:
    """End the process, a whole sweep with it, if keys of the command line are unknown or their values of no use: they
    are so in all of its runs."""
    given = typed_values()
    if wrong := [*unknown_keys(config), *mistyped_booleans(schema, given), *empty_values(given)]:
        fail("\n".join(wrong))


@contextmanager
def composed_once(flags: Sequence[str], words: Sequence[str]) -> Iterator[None]:
    """Keep Hydra 1.3 from composing everything twice, first for `hydra.mode` alone, where nothing can set that key.

    No file of `configs` does; Hydra's own flags may lead to others, and a word about `hydra` may name it.
    """
    ask = Hydra.get_mode
    named = any(re.match(r"[+~]*hydra(\.mode)?([^.\w]|$)", word) for word in words)
    if not named and not {*flags} - {"-m", "--multirun"}:
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = ask  # type: ignore[method-assign]


def read_flags(arguments: Sequence[str]) -> tuple[list[str], argparse.Namespace, list[str]]:
    """Split a command line into Hydra's flags, as they stand and as read, and the other words, in any order.

    Raises UsageError on a flag that is not Hydra's.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; options are written key=value, --help lists them")

    parser.error = refuse  # type: ignore[method-assign]
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        refuse(f"no flag {unknown[0]}")
    words, flags = [*options.overrides, *rest], list(arguments)
    for argument in words:
        flags.remove(argument)
    return flags, options, words


COMPOSING = re.compile(r": \w+ raised while composing config:\n")  # Hydra, of a file
APPEND = "To append to your "  # how Hydra begins its advice about a key, or a group, that is not there
# What OmegaConf says where a key's parent is null: `+arch.stores.kv.latent.dim=2` without a latent.
NULL_PARENT = ("Unexpected type for root", "'NoneType' object has no attribute 'get'")


def require(**chosen: str | None) -> None:
    """Raise UsageError, listing the choices, for each group that was not chosen with `+group=name`."""
    missing = [group for group, choice in chosen.items() if choice is None]
    if missing:
        raise UsageError("\n".join(f"choose +{group}= one of: {', '.join(names(group))}" for group in missing))


def require_new_folder(out: str) -> Path:
    """Return the folder `out`. Raises UsageError if it is empty or names something that exists."""
    if not out:
        raise UsageError("out= is not set; give the folder to write")
    path = Path(out)
    if path.exists():
        raise UsageError(f"out={out} is there already; give a new folder")
    return path


def unknown_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield a message for each key that its dataclass does not have (`+arch.typo=1` passes Hydra), and for each section
    that an interpolation has made a scalar."""
    cls = OmegaConf.get_type(config)
    hints = get_type_hints(cls) if is_dataclass(cls) else {}
    for key in map(str, config):
        if is_dataclass(cls) and key not in cls.__dataclass_fields__:
            yield unknown_field(f"{prefix}{key}", cls)
        elif OmegaConf.is_interpolation(config, key):
            kind = container(hints.get(key))
            if kind and config[key] is not None and not OmegaConf.is_config(config[key]):
                yield f"{prefix}{key} is {config[key]!r}; a {kind} belongs there"
        elif isinstance(config[key], DictConfig):
            yield from unknown_keys(config[key], f"{prefix}{key}.")


def unknown_field(path: str, cls: Any) -> str:
    """The message for a dotted key that the dataclass `cls` does not have: with the nearest one, or those of its name
    in the sections of `cls`."""
    parent, dot, key = path.rpartition(".")
    sections = [name for name, hint in get_type_hints(cls).items() if key in getattr(hint, "__dataclass_fields__", ())]
    return unknown_key(path, sorted(cls.__dataclass_fields__), [f"{parent}{dot}{name}.{key}" for name in sections])


def empty_values(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each key that was given nothing, as by a shell variable that is not set."""
    for key, value in given.items():
        if isinstance(value, str) and not value.strip():
            kind = "folder" if key in ("folder", "resume", "init", "out", "data.path") else "value"
            otherwise = "" if key == "out" else f", or leave {key}= out"
            yield f"{key}= is empty; give a {kind}{otherwise}"


def typed_values() -> dict[str, Any]:
    """The values on the command line of this run, by key, before the schema converts them."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {item.get_key_element().lstrip("+~"): item.value() for item in overrides if not item.is_delete()}


def container(hint: Any) -> str | None:
    """`section` or `list`, by what a field of the type `hint` holds; None: a scalar."""
    options = [hint] if get_origin(hint) in (dict, list) else [hint, *get_args(hint)]
    if any(is_dataclass(option) or get_origin(option) is dict for option in options):
        return "section"
    return "list" if any(get_origin(option) is list for option in options) else None


def explain(error: Exception, words: Sequence[str] = ()) -> str:
    """The message of Hydra or OmegaConf about the command line of `words`, in one line; for an unknown name, with the
    known ones."""
    cause = error.__context__ if COMPOSING.search(str(error)) else error.__cause__
    cause = cause if isinstance(cause, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        cls = cause.object_type
        if is_dataclass(cls) and cause.key not in cls.__dataclass_fields__:
            return unknown_field(str(cause.full_key), cls)
        where = COMPOSING.sub(rf": {cause.full_key}\n", str(error))
        place, *advice = where.splitlines() if cause is not error else [str(cause.full_key or "the configuration")]
        reason = _no_section(cause) or str(cause).splitlines()[0]
        return ". ".join([f"{place.rstrip('.')}: {reason}", *(line for line in advice if line.startswith(APPEND))])
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        near = did_you_mean(choice, error.options).rstrip(".")
        return f"Could not find '{error.missing_cfg_file}'{near or ';'} {group} is one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, AssertionError | AttributeError) and any(text in str(error) for text in NULL_PARENT):
        return "a key on the command line lies under one that is null, which OmegaConf cannot fill; write it in a file"
    if APPEND in str(error) and any(word.startswith("resume=") for word in words):
        return f"{str(error).partition(' use +')[2]}: a resumed run keeps its layout and its groups; start another run"
    message = str(error).split("Set the environment variable")[0].split("Config search path")[0]
    return " ".join(message.split()) or type(error).__name__


def _no_section(error: OmegaConfBaseException) -> str | None:
    """The message for a value where a section belongs, as of `latent: 32`, with one that is right; None: it is none."""
    hint = get_type_hints(error.object_type).get(str(error.key)) if is_dataclass(error.object_type) else None
    section: Any = next(filter(is_dataclass, (hint, *get_args(hint))), None)
    if section is None or "is not a subclass of" not in str(error):
        return None
    value = str(error).splitlines()[0].partition(" value: ")[2]
    return f"a section belongs there: {error.key}: {{{next(iter(section.__dataclass_fields__))}: {value}}}"


def _unreadable(override: str) -> str:
    """The message for a word that Hydra cannot parse."""
    match = WORD.fullmatch(override)
    if match is None:
        return f"cannot read {override!r}; write key=value, +group=name or ~key"
    if re.fullmatch(r"\[[^][{}'\"\\$]*=[^][{}'\"\\$]*\]", match["text"]):
        items = [item.strip() for item in match["text"][1:-1].split(",")]
        listed = ",".join(f'"{item}"' if "=" in item else item for item in items)
        return f"cannot read {override}: what has a = stands in quotes; write '{match['key']}=[{listed}]'"
    return (
        f"cannot read {override}: brackets, quotes and braces come in pairs, a list is [a,b]; to have the value taken "
        f"as it stands, write {word(match['key'], match['text'])}"
    )
