"""The schema of `configs/data/*.yaml`, of data/prepare.py and of the `data.` keys of training.

Plain mutable dataclasses with defaults, as Hydra's schema needs them. Imports the standard library alone.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")
LIMITS = ("max_tokens", "max_documents", "max_eval_tokens", "shard_tokens")
RECALL_KINDS = ("zoology", "gap")
PREPARED = Path(__file__).resolve().parent / "prepared"


@dataclass
class RecallConfig:
    """Sequences of the corpus `recall`: keys and values, then keys whose values are asked for (data/recall.py).

    kind      zoology, the paper's sequences, in which each key is asked for once; gap, ours, whose second half asks
    pairs     pairs per sequence; a list: sequences take its numbers in turn
    length    tokens per sequence; training takes it as size.seq_len
    vocab     number of different tokens; `gap` uses at most 72 of them, or 1,096 with joined pairs
    noise     for zoology: random tokens instead of token 0 between the questions
    joined    for gap: a pair is one token, so that one layer can answer; learned in a minute
    rows      sequences to train on
    val_rows  sequences to validate on
    seed      seed of all random draws
    """

    kind: str = "zoology"
    pairs: Any = 4
    length: int = 64
    vocab: int = 8192
    noise: bool = False
    joined: bool = False
    rows: int = 100_000
    val_rows: int = 3_000
    seed: int = 123

    @property
    def num_pairs(self) -> list[int]:
        """`pairs` as a list; text of the command line is read. Raises ValueError on what is no number."""
        return [int(pairs) for pairs in (self.pairs if isinstance(self.pairs, list) else [self.pairs])]


def as_numbers(pairs: Any) -> Any:
    """`pairs` with text of the command line read as numbers, as far as it is any."""
    if isinstance(pairs, list):
        return [as_numbers(number) for number in pairs]
    return int(pairs) if isinstance(pairs, str) and pairs.isdecimal() else pairs


@dataclass
class SourceConfig:
    """Source of the text: `corpus`, or `dataset`, or, with neither, files.

    corpus      text found on every machine, with splits of its own: stdlib (the source of Python's standard library),
                or recall (sequences of numbers with the expected answers; the keys of `recall` define them)
    dataset     a data set of the Hugging Face hub, or a local folder that `datasets` reads; it is streamed
    subset      configuration of the data set, if it has several
    revision    branch, tag or commit of the data set
    text        column with the text in a data set, in .jsonl and in .parquet
    train       without dataset: files, folders or globs, one or a list, of .txt .md .py .jsonl (each also .gz .xz .zst)
                and .parquet; with dataset: the name of its split. A line holds at most 256 MiB
    val, test   the same for the other splits
    val_share   fraction of the training documents moved to val, chosen by a hash, so that no text is in two splits; if
                the files have few documents, the end of their text instead. null: 0.005 of the documents; of few, the
                last 65,536 characters or a tenth of the text, whichever is less. A split with its own text needs none
    test_share  the same for test, which training does not read
    document_start  regular expression: join rows (lines of a text file) into documents, each of which starts at a row
                that matches. null: every row, or every text file, is a document
    """

    corpus: str | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    text: str = "text"
    train: Any = None
    val: Any = None
    test: Any = None
    val_share: float | None = 0.0
    test_share: float | None = 0.0
    document_start: str | None = None
    recall: RecallConfig = field(default_factory=RecallConfig)

    @property
    def shares(self) -> dict[str, float | None]:
        """The splits that are held out of the training documents, and their shares."""
        given = {"val": self.val_share, "test": self.test_share}
        return {
            split: share
            for split, share in given.items()
            if share != 0 and not getattr(self, split) and not self.corpus
        }


@dataclass
class TokenizerConfig:
    """Tokenizer of the data.

    kind          bpe (byte-level, trained on the text), bytes (the 256 bytes), pretrained, or numbers (below
                  source.recall.vocab)
    vocab_size    bpe: size of the vocabulary, end of text included
    sample_bytes  bpe: bytes of text to train on, taken evenly from the beginnings of the training files
    name          pretrained: a tokenizer of the hub, a folder with a tokenizer.json, or such a file
    revision      pretrained: branch, tag or commit on the hub
    end_of_text   pretrained: the token that ends a document; null: the first usual one that the tokenizer has
    """

    kind: str = "bpe"
    vocab_size: int = 4096
    sample_bytes: int = 100_000_000
    name: str | None = None
    revision: str | None = None
    end_of_text: str | None = None


@dataclass
class PrepareConfig:
    """One preparation: text to token shards.

    path             output folder; null: data/prepared/<name>-<tokenizer>
    name             name of the data set: its file in configs/data
    max_tokens       limit of the training split, which ends before the document that would exceed it; null: no limit
    max_documents    limit of the training split in documents
    max_eval_tokens  limit of val and of test, each
    shard_tokens     limit of a shard; only a single longer document exceeds it
    workers          tokenizing processes; 1: the main process; null: one per CPU core
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

    @property
    def folder(self) -> Path:
        """`path`, or data/prepared/<name>-<tokenizer>."""
        if self.path:
            return Path(self.path)
        tokenizer, recall = self.tokenizer, self.source.recall
        if tokenizer.kind == "numbers":
            pairs = "-".join(map(str, recall.pairs)) if isinstance(recall.pairs, list) else recall.pairs
            tag = f"{recall.kind}-{recall.length}-{pairs}-{recall.vocab}{'-joined' if recall.joined else ''}"
        elif tokenizer.kind == "pretrained":
            tag = Path(tokenizer.name or "unnamed").name.removesuffix(".json")
        else:
            tag = f"bpe{tokenizer.vocab_size}" if tokenizer.kind == "bpe" else tokenizer.kind
        return PREPARED / f"{self.name}-{tag}"

    @property
    def recipe(self) -> dict[str, Any]:
        """The keys that decide the content of the folder, as plain data."""
        recipe = {key: value for key, value in asdict(self).items() if key in ("source", "tokenizer", *LIMITS)}
        if self.source.corpus != "recall":
            del recipe["source"]["recall"]
            return recipe
        recall = recipe["source"]["recall"]
        recall["pairs"] = as_numbers(recall["pairs"])
        if not recall["joined"]:  # which the first such folders do not say
            del recall["joined"]
        return recipe


@dataclass
class DataConfig(PrepareConfig):
    """Token shards to train on: one prepared folder, or several.

    Without `path` or `mix`, the folder follows from the keys of its preparation, which Hydra reads with these into one
    flat group, configs/data. A corpus found on every machine is prepared at first use; any other folder must exist.

    path           prepared folder; null: data/prepared/<name>-<tokenizer>
    mix            prepared folder -> weight: its fraction of the training sequences, after division by the sum.
                   Each folder is shuffled and repeated on its own; validation windows have the same proportions, also
                   where one has so little validation text that they are few
    document_mask  restrict attention to the document of the query
    block_padding  Block Transformer: pad each document to whole blocks, with a random number of pads before it
    val_tokens     tokens of the validation split to evaluate on
    """

    mix: Any = None  # dict[str, float]; a typed one takes no new keys from Hydra's command line
    document_mask: bool = False
    block_padding: bool = False
    val_tokens: int = 32768

    @property
    def folders(self) -> list[Path]:
        """The prepared folders, whether or not they are here."""
        return [Path(str(folder)) for folder in self.mix] if self.mix else [self.preparation.folder]

    @property
    def preparation(self) -> PrepareConfig:
        """The keys of PrepareConfig."""
        return PrepareConfig(**{item.name: getattr(self, item.name) for item in fields(PrepareConfig)})


def problems(config: PrepareConfig) -> list[str]:
    """Values that no preparation can use, each with the fix."""
    source, tokenizer = config.source, config.tokenizer
    errors: list[str] = []
    if source.corpus and source.dataset:
        errors.append("source.corpus and source.dataset are both set; choose one")
    elif not source.corpus and not source.train:
        errors.append(
            "source.train is not set; give files, folders or globs: source.train='[books/*.jsonl.xz]'"
            if not source.dataset
            else f"source.train is not set; name the split of {source.dataset}: source.train=train"
        )
    shares = (source.val_share or 0.0, source.test_share or 0.0)
    if not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        errors.append(f"source.val_share and source.test_share are {shares}; they are at least 0 and together below 1")
    for split, share in zip(("val", "test"), shares, strict=True):
        if share and (getattr(source, split) or source.corpus):
            errors.append(
                f"source.{split}_share is {share}, and the split has text of its own; choose one: "
                f"source.{split}_share=0 keeps that text"
            )
    if tokenizer.kind not in ("bpe", "bytes", "pretrained", "numbers"):
        errors.append(f"tokenizer.kind is {tokenizer.kind}; choose bpe, bytes, pretrained, numbers")
    if (tokenizer.kind == "numbers") != (source.corpus == "recall"):
        errors.append(
            f"tokenizer.kind is {tokenizer.kind} and source.corpus is {source.corpus}; numbers and recall go together"
        )
    if tokenizer.kind == "bpe" and not 257 <= tokenizer.vocab_size <= 2**20:
        errors.append(f"tokenizer.vocab_size is {tokenizer.vocab_size}; choose 257 to {2**20}")
    if tokenizer.kind == "pretrained" and not tokenizer.name:
        errors.append("tokenizer.name is not set; name a tokenizer of the hub, or its folder")
    if tokenizer.sample_bytes < 1:
        errors.append(f"tokenizer.sample_bytes is {tokenizer.sample_bytes}; it must be at least 1")
    for key in (*LIMITS, "workers"):
        value = getattr(config, key)
        if value is not None and value < 1:
            errors.append(f"{key} is {value}; it must be at least 1")
    if config.workers is not None and config.workers > 1024:
        errors.append(f"workers is {config.workers}; choose at most 1024")
    return errors
