"""What a data set is made of: the typed schema of `configs/data/*.yaml`, of data/prepare.py and of `data.` in training.

Plain mutable dataclasses with defaults, as Hydra's schema needs them.
"""

import difflib
import shlex
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from .files import DataError

# OmegaConf is imported where it is used: the schema itself needs nothing.

SPLITS = ("train", "val", "test")
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"
PREPARED = Path(__file__).resolve().parent / "prepared"


@dataclass
class SourceConfig:
    """Where text comes from: `corpus`, or `dataset`, or neither: files.

    corpus      text that is on every machine: stdlib (the source of Python's standard library); it has its own splits
    dataset     a data set of the Hugging Face hub, or a local folder that `datasets` reads; it is streamed
    subset      its configuration, where it has several
    revision    its branch, tag or commit
    text        column of the text in a data set, in .jsonl and in .parquet
    train       without dataset: files, folders or globs, one or a list, of .txt .md .py .jsonl (each also .gz .xz .zst)
                and .parquet; with dataset: the name of its split
    val, test   the same for the other splits
    val_share   share of the training documents that goes to val instead, by a hash: no text is in two splits
    test_share  the same for test
    document_start  a regular expression: rows (of a text file: lines) are joined, the next document starts at one that
                matches. null: every row, every text file, is a document
    """

    corpus: str | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    text: str = "text"
    train: Any = None
    val: Any = None
    test: Any = None
    val_share: float = 0.0
    test_share: float = 0.0
    document_start: str | None = None


@dataclass
class TokenizerConfig:
    """`bpe`: byte-level, trained here. `bytes`: the 256 bytes. `pretrained`: one that exists.

    vocab_size    of bpe, end of text included
    sample_bytes  text that bpe is trained on: the first of the training split, taken evenly from its files
    name          of pretrained: a tokenizer of the hub, a folder with a tokenizer.json, or such a file
    revision      its branch, tag or commit on the hub
    end_of_text   of pretrained: the token that ends a document; null: the usual ones are tried
    """

    kind: str = "bpe"
    vocab_size: int = 4096
    sample_bytes: int = 100_000_000
    name: str | None = None
    revision: str | None = None
    end_of_text: str | None = None


@dataclass
class PrepareConfig:
    """Text to token shards.

    path             the folder; null: data/prepared/<name>-<tokenizer>
    name             of the data set: that of its file in configs/data
    max_tokens       of the training split: it ends before the document that would exceed them; null: no limit
    max_documents    of the training split
    max_eval_tokens  of val and of test each
    shard_tokens     a shard holds no more, unless a single document does
    workers          processes that tokenise; 1: this one; null: one for each CPU core
    """

    path: str | None = None
    name: str = "unnamed"
    source: SourceConfig = field(default_factory=SourceConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    max_tokens: int | None = None
    max_documents: int | None = None
    max_eval_tokens: int | None = None
    shard_tokens: int = 2**27
    workers: int | None = None


@dataclass
class DataConfig(PrepareConfig):
    """Token shards to train on: of one prepared folder, or of several.

    mix            prepared folder -> weight: share of the training sequences that it gives, after division by the sum.
                   Each is shuffled and repeated on its own; validation takes from each in the same proportion
    document_mask  attention stays within a document
    block_padding  of a Block Transformer: documents begin anywhere in a block, at random, and fill whole blocks
    val_tokens     tokens of the validation split to evaluate on
    """

    mix: Any = None  # dict[str, float]; a typed one takes no new keys from Hydra's command line
    document_mask: bool = False
    block_padding: bool = False
    val_tokens: int = 32768


def default_folder(config: PrepareConfig) -> Path:
    """Where prepared data goes unless told: beside this file, ignored by git."""
    tokenizer = config.tokenizer
    if tokenizer.kind == "pretrained":
        tag = Path(tokenizer.name or "unnamed").name.removesuffix(".json")
    else:
        tag = f"bpe{tokenizer.vocab_size}" if tokenizer.kind == "bpe" else tokenizer.kind
    return PREPARED / f"{config.name}-{tag}"


def folder_of(config: PrepareConfig) -> Path:
    return Path(config.path) if config.path else default_folder(config)


def recipe(config: PrepareConfig) -> dict[str, Any]:
    """What decides the content of the folder, as plain data."""
    keys = ("source", "tokenizer", "max_tokens", "max_documents", "max_eval_tokens", "shard_tokens")
    return {key: asdict(config)[key] for key in keys}


def problems(config: PrepareConfig) -> list[str]:
    """What is wrong with a preparation, each with the fix."""
    source, tokenizer, found = config.source, config.tokenizer, []
    if source.corpus and source.dataset:
        found.append("source.corpus and source.dataset are both set; choose one")
    elif not source.corpus and not source.train:
        found.append(
            "source.train is not set; give files, folders or globs: source.train='[books/*.jsonl.xz]'"
            if not source.dataset
            else f"source.train is not set; name the split of {source.dataset}: source.train=train"
        )
    shares = (source.val_share, source.test_share)
    if not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        found.append(f"source.val_share and source.test_share are {shares}; they are at least 0 and together below 1")
    for split, share in zip(("val", "test"), shares, strict=True):
        if share and (getattr(source, split) or source.corpus):
            found.append(f"source.{split}_share is {share}, and the split has text of its own; choose one")
    if tokenizer.kind not in ("bpe", "bytes", "pretrained"):
        found.append(f"tokenizer.kind is {tokenizer.kind}; choose bpe, bytes, pretrained")
    if tokenizer.kind == "bpe" and not 257 <= tokenizer.vocab_size <= 2**20:
        found.append(f"tokenizer.vocab_size is {tokenizer.vocab_size}; choose 257 to {2**20}")
    if tokenizer.kind == "pretrained" and not tokenizer.name:
        found.append("tokenizer.name is not set; name a tokenizer of the hub, or its folder")
    for key in ("max_tokens", "max_documents", "max_eval_tokens", "shard_tokens", "workers"):
        value = getattr(config, key)
        if value is not None and value < 1:
            found.append(f"{key} is {value}; it must be at least 1")
    return found


def names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(name: str, overrides: list[str]) -> DataConfig:
    """`configs/data/<name>.yaml` changed by `key=value` of PrepareConfig. Raises DataError with the near miss."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if name not in names():
        raise DataError(f"no data set {name!r}{_near(name, names())} configs/data has {', '.join(names())}")
    for override in overrides:
        _check_key(override)
    try:
        config = OmegaConf.merge(
            OmegaConf.structured(DataConfig),
            OmegaConf.load(CONFIGS / f"{name}.yaml"),
            OmegaConf.from_dotlist(overrides),
        )
        result: DataConfig = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise DataError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise DataError(f"cannot read {' '.join(overrides)}: a value is YAML, a list is written '[a,b]'") from error
    return result


def _check_key(override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise DataError(f"cannot read {override!r}; write key=value")
    cls, parent = PrepareConfig, ""
    for part in key.split("."):
        known = [item.name for item in fields(cls)] if is_dataclass(cls) else []
        if part not in known:
            where = parent or "A preparation"
            raise DataError(f"unknown key {key}{_near(part, known)} {where} has {', '.join(known) or 'no keys'}")
        cls = {"source": SourceConfig, "tokenizer": TokenizerConfig}.get(part, str)
        parent = part


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else "."


def command(config: DataConfig) -> str:
    """The command that prepares what `config` describes."""
    written = asdict(load(config.name, []) if config.name in names() else DataConfig())
    changed = asdict(config)
    for key in _TRAINING:
        del written[key], changed[key]
    return shlex.join(["python", "data/prepare.py", config.name, *_changes("", changed, written)])


_TRAINING = {item.name for item in fields(DataConfig)} - {item.name for item in fields(PrepareConfig)}


def _changes(prefix: str, config: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """`key=value` for each value that differs from the one in `base`."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += _changes(f"{prefix}{key}.", value, base[key])
        elif value != base[key]:
            shown = f"[{','.join(value)}]" if isinstance(value, list) else "null" if value is None else value
            found.append(f"{prefix}{key}={shown}")
    return found
