"""Identity of a run: what of its configuration cannot change, its data and its tokenizer.

identity.json in the run's folder, written before the first step, and `identity` in each checkpoint.json:

config     values of config.yaml that a resumed run cannot change, by dotted key
keys       all keys of config.yaml; a file that lacks one has been cut
data       the prepared folders, in the order of data.mix: folder, name, weight, digest, and the tokens of each split
tokenizer  sha256 of their tokenizer.json

A run of an earlier version has none, and what its files cannot tell is not checked.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.cli import UsageError
from data.dotted import flat, lookup
from data.files import DataError, write_json
from data.shards import Manifest
from eval.runs import KEYS, Run, RunError

FILE = "identity.json"
# Where the data lies, what it is called, and who prepares it: the digests stand for the data itself.
NOT_COMPARED = ("data.path", "data.mix", "data.name", "data.workers")
WHOLE = ("data.mix", "evals.options")  # their keys are folders, and names of tasks
READING = ("document_mask", "block_padding")  # keys of data: what a run makes of the same text
# What two runs of the same text may differ in, if arch.block.start is not the same.
PREDICTED = "the positions that are predicted (arch.block.start=true predicts all)"
ABSENT = object()


@dataclass(frozen=True)
class DataFolder:
    """A prepared folder: `digest` is Manifest.digest, `splits` the tokens of each split."""

    folder: str
    name: str
    weight: float
    digest: str
    splits: dict[str, int]

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, weight: float) -> "DataFolder":
        splits = {name: split.tokens for name, split in manifest.splits.items()}
        return cls(str(folder), data_name(folder, manifest), weight, manifest.digest, splits)

    @property
    def content(self) -> tuple[str, dict[str, int]]:
        """The part of a record that is the same for two folders of the same data."""
        return self.digest, self.splits

    def __str__(self) -> str:
        return f"{short(self.digest)} in {self.folder}"


@dataclass(frozen=True)
class Identity:
    """The tables of the module's docstring. `config` and `keys` are empty for weights that no run has trained."""

    config: dict[str, Any]
    keys: tuple[str, ...]
    data: tuple[DataFolder, ...]
    tokenizer: str

    @classmethod
    def of(cls, config: Mapping[str, Any], folders: Mapping[Path, Manifest], weights: Sequence[float]) -> "Identity":
        """Build the identity of a run of the configuration `config`, nested, on `folders` of these weights."""
        fixed = {key: value for key, value in flat(config, WHOLE).items() if _compared(key)}
        data = [DataFolder.of(*item, weight) for item, weight in zip(folders.items(), weights, strict=True)]
        tokenizer = next(iter(folders.values())).tokenizer_sha256
        return cls(_plain(fixed), tuple(flat(config, WHOLE)), tuple(data), tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: Path) -> "Identity":
        """Raise UsageError, naming the file `where`, unless `values` are those of an identity."""
        try:
            data = tuple(
                DataFolder(
                    str(item["folder"]),
                    str(item["name"]),
                    float(item["weight"]),
                    str(item["digest"]),
                    {str(name): int(tokens) for name, tokens in item["splits"].items()},
                )
                for item in values["data"]
            )
            keys = tuple(str(key) for key in values["keys"])
            return cls(dict(values["config"]), keys, data, str(values["tokenizer"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise UsageError(
                f"{where} says nothing readable about the run's identity ({error!r}); put it back"
            ) from error

    def save(self, run: Path) -> None:
        """Write identity.json, flushed."""
        write_json(run / FILE, self.to_dict())

    @classmethod
    def load(cls, run: Path) -> "Identity | None":
        """Read identity.json of a run; None if an earlier version wrote the run.

        Raises UsageError if it cannot be read.
        """
        path = run / FILE
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} cannot be read ({error}); put it back, or delete it: every checkpoint has the same"
            ) from error
        return cls.from_dict(values, path)

    def check_config(self, path: Path, values: Mapping[str, Any]) -> None:
        """Compare `values`, the content of the config.yaml at `path`, with what the run was started with.

        Raises UsageError with every key that is missing, or has another value and decides the run.
        """
        lacking = [key for key in self.keys if lookup(values, key, ABSENT) is ABSENT]
        if lacking:
            more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
            raise UsageError(f"{path} lacks {', '.join(lacking[:4])}{more}: it has been cut or edited; put it back")
        pairs = changed_values(self.config, values)
        changed = [f"{key} is {json.dumps(now)}, it was {json.dumps(was)}" for key, was, now in pairs]
        if changed:
            raise UsageError(
                f"{path} is not what the run was trained with: {'; '.join(changed)}. Put the old values back, or start "
                "another run"
            )

    def check_data(self, who: str, folders: Mapping[Path, Manifest], weights: Sequence[float], fix: str) -> None:
        """Compare prepared folders with those that the run was trained on; they may lie elsewhere.

        Raises DataError, naming both, if they differ. `who` begins the sentence, `fix` ends it.
        """
        found = [DataFolder.of(*item, weight) for item, weight in zip(folders.items(), weights, strict=True)]
        if [folder.content for folder in found] != [folder.content for folder in self.data]:
            raise DataError(self._other_data(who, found, fix))
        shares = [[folder.weight / sum(of.weight for of in group) for folder in group] for group in (found, self.data)]
        if shares[0] != shares[1]:
            raise DataError(f"{who}: data.mix has the shares {shares[0]}, the run was trained with {shares[1]}; {fix}")

    def check_folder(self, who: str, folder: Path, manifest: Manifest, fix: str) -> None:
        """Check that a prepared folder is one of those that the run was trained on. Raises as `check_data`."""
        found = DataFolder.of(folder, manifest, 1.0)
        if found.content not in [of.content for of in self.data]:
            raise DataError(self._other_data(who, [found], fix))

    def _other_data(self, who: str, found: Iterable[DataFolder], fix: str) -> str:
        now, then = (", ".join(map(str, folders)) for folders in (found, self.data))
        if now == then:
            now, then = (", ".join(f"{of} of {of.splits}" for of in folders) for folders in (found, self.data))
        return f"{who} was trained on other data: {then}; there is now {now}. {fix}"


def digest_in_summary(run: Run) -> str | None:
    """Return the digest of the data in the summary.json of a run; None if there is none."""
    try:
        digest = run.experiment.get("data")
    except RunError:
        return None
    return digest if isinstance(digest, str) else None


def check_summary_digest(who: str, run: Path, digest: str, folders: Iterable[Path], fix: str) -> None:
    """Compare the `digest` of the data in `folders` with that in the summary of a run of an earlier version, if it has
    one. Raises as `Identity.check_data`.
    """
    recorded = digest_in_summary(Run(run))
    if recorded not in (None, digest):
        raise DataError(
            f"{who} was trained on other data: digest {short(recorded or '')}; there is now {short(digest)} in "
            f"{', '.join(map(str, folders))}. {fix}"
        )


def data_of(run: Run) -> Any:
    """The data of a run, to compare with that of others: by digest, or as its config.yaml names it where an earlier
    version wrote the run.
    """
    config, tied = run.config["data"], _tied(run)
    if tied is None:
        return config
    digests = ", ".join(of.digest for of in tied.data)
    shares = [of.weight / sum(each.weight for each in tied.data) for of in tied.data]
    options = {key: config.get(key) for key in (*READING, "val_tokens")}
    return {"data": digests, "shares": shares if len(shares) > 1 else None, **options}


def name_data(runs: Sequence[Run]) -> list[str]:
    """A line for each data that `runs` were trained on, with its digest, its folders and the runs; none if it is one.

    Runs of an earlier version that have not ended do not tell.
    """
    groups: dict[str, list[Run]] = {}
    places: dict[str, str] = {}
    for run in runs:
        tied, digest = _tied(run), digest_in_summary(run)
        key = ", ".join(of.digest for of in tied.data) if tied is not None else digest or "unknown"
        groups.setdefault(key, []).append(run)
        places.setdefault(key, "its digest is not recorded" if key == "unknown" else f"digest {short(key)}")
        if tied is not None:
            places[key] = ", ".join(map(str, tied.data))
    if len(groups) < 2:
        return []
    return [f"data: {places[key]}, of {', '.join(str(run.folder) for run in group)}" for key, group in groups.items()]


def _tied(run: Run) -> Identity | None:
    try:
        return Identity.load(run.folder)
    except UsageError:  # a damaged file stops no comparison
        return None


def short(digest: str) -> str:
    """The beginning of a digest, for messages."""
    return digest[:16]


def data_name(folder: Path, manifest: Manifest) -> str:
    """Name the text of a prepared folder: its data set, and of files the folder, which alone tells them apart."""
    source = manifest.recipe.get("source") if isinstance(manifest.recipe, dict) else None
    source = source if isinstance(source, dict) else {}
    if source.get("dataset"):
        parts = [str(source[key]) for key in ("dataset", "subset") if source.get(key)]
        return f"{manifest.name} ({', '.join(parts)})"
    return manifest.name if source.get("corpus") else f"{manifest.name} ({folder.resolve().name})"


class Change(NamedTuple):
    """A dotted key, and its value before and now."""

    key: str
    before: Any
    now: Any


def changed_values(before: Mapping[str, Any], values: Mapping[str, Any]) -> list[Change]:
    """List the keys of `before` that have another value in `values`; a null counts as absent.

    `before` has dotted keys, `values` is nested and may have more of them.
    """
    pairs = [Change(key, _plain(value), _plain(lookup(values, key))) for key, value in before.items()]
    return [pair for pair in pairs if pair.before != pair.now]


def _compared(key: str) -> bool:
    """Tell whether a resumed run cannot change the dotted `key`, and it decides what is learned."""
    parts = key.split(".")
    known = next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in KEYS), None)
    if known is None or f"{key}.".startswith(tuple(f"{name}." for name in NOT_COMPARED)):
        return False
    return KEYS[known].fixed and KEYS[known].decides in ("result", "seed")


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it."""
    return json.loads(json.dumps(value, default=str))
