"""Turn text into token shards.

  python data/prepare.py NAME [key=value ...]     prepare configs/data/NAME.yaml
  python data/prepare.py verify=FOLDER            compare every file of a prepared folder with its manifest
  python data/prepare.py --help

After an interruption, a crash or a full disk the same command resumes and produces the same bytes. A folder is complete
when it has a manifest.json.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from tokenizers import Tokenizer

from data.cli import fail, interrupted
from data.config import PrepareConfig, SourceConfig, TokenizerConfig, problems
from data.files import DataError, sha256
from data.pool import encoded
from data.presets import load, names
from data.report import Report
from data.shards import FORMAT, Manifest, Split
from data.sources import Document, Position, TextSource
from data.tokenizer import (
    byte_tokenizer,
    dtype_of,
    end_token,
    pretrained,
    token_bytes,
    train_bpe,
    vocabulary_size,
)
from data.verify import verify
from data.writing import PROGRESS, Progress, SplitWriter, differences, folder_lock

CHECKPOINT_SECONDS = 60


def prepare(config: PrepareConfig) -> Manifest:
    """Write the folder of `config` and return its manifest; a complete folder is only read.

    Raises DataError if the configuration is wrong, the text cannot be read, or the folder cannot be written.
    """
    errors = problems(config)
    if errors:
        raise DataError("\n".join(errors))
    folder = config.folder
    if not (folder / "manifest.json").exists():
        source = TextSource(config.source)
        try:
            with folder_lock(folder):
                if not (folder / "manifest.json").exists():
                    Preparation(config, folder, source).run()
        except OSError as error:
            raise DataError(
                f"cannot write {folder}: {error.strerror or error}\nMake room, or give another folder with path=. "
                "The same command goes on from what is done"
            ) from error
    manifest = Manifest.load(folder)
    if manifest.recipe != config.recipe:
        raise DataError(
            f"{folder} was prepared with {differences(manifest.recipe, config.recipe)}; give another folder with path="
        )
    return manifest


class Preparation:
    """The writing of one folder, from its first document or from the saved progress."""

    def __init__(self, config: PrepareConfig, folder: Path, source: TextSource):
        self.config, self.folder, self.source = config, folder, source
        inputs = config.recipe | {"files": source.fingerprint()}
        self.progress = Progress.load(folder, inputs, source.splits)
        self.tokenizer = self._tokenizer()
        self.end = end_token(self.tokenizer, config.tokenizer.end_of_text)
        self.dtype = dtype_of(vocabulary_size(self.tokenizer))
        self.token_bytes = np.load(folder / "token_bytes.npy")
        self.writers: dict[str, SplitWriter] = {}
        self.saved_at = time.monotonic()

    def run(self) -> None:
        splits, config = self.progress.splits, self.config
        self._save(self.progress.position)  # before any shard, which would look like a foreign file without it
        self.writers = {
            name: SplitWriter(self.folder, name, splits[name], self.end, self.dtype, config.shard_tokens)
            for name in splits
        }
        with Report(self.folder.name, config.max_tokens, splits) as report:
            for documents in self._ranges():
                for document, tokens in encoded(documents, self.folder, self.end, config.workers):
                    full = self._add(document, tokens)
                    report.update(self.source.files[document.after.file].name)
                    if full:
                        break
        for name, writer in self.writers.items():
            if not splits[name].documents:
                total = sum(split.documents for split in splits.values())
                raise DataError(
                    f"{config.name} has no text for the split {name}: all {total} documents are in others. Give more "
                    "documents (source.document_start cuts a file into several), a larger share, text of its own "
                    f"with source.{name}, or higher limits, and delete {self.folder}"
                )
            writer.finish()
        Manifest(
            format=FORMAT,
            name=config.name,
            recipe=config.recipe,
            tokenizer_sha256=sha256(self.folder / "tokenizer.json"),
            token_bytes_sha256=sha256(self.folder / "token_bytes.npy"),
            vocab_size=len(self.token_bytes),
            end_of_text=self.end,
            dtype=self.dtype.str,
            splits={
                name: Split(split.tokens, split.bytes, split.documents, tuple(split.shards))
                for name, split in splits.items()
            },
        ).save(self.folder)
        (self.folder / PROGRESS).unlink()
        report.warn_of_lost_text()

    def _ranges(self) -> Iterator[Iterator[Document]]:
        """Yield the remaining documents of each range of source files of one split, unless that split is full."""
        files, position = self.source.files, self.progress.position
        while position.file < len(files):
            split = files[position.file].split
            end = next((n for n in range(position.file, len(files)) if files[n].split != split), len(files))
            if not self.progress.splits[split].full:
                yield self.source.documents(position, end)
            position = Position(end)

    def _add(self, document: Document, tokens: np.ndarray) -> bool:
        """Write a document unless its split is full; return True if the split of its source file is full."""
        split, config = self.progress.splits[document.split], self.config
        max_tokens, max_documents = config.max_eval_tokens, None
        if document.split == "train":
            max_tokens, max_documents = config.max_tokens, config.max_documents
        over = max_tokens is not None and split.tokens + len(tokens) > max_tokens
        split.full = split.full or over or split.documents == max_documents
        if not split.full:
            token_text_bytes = int(self.token_bytes[tokens].sum(dtype=np.int64))
            new_shard = self.writers[document.split].add(tokens, len(document.text.encode()), token_text_bytes)
            if new_shard or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self._save(document.after)
        return self.progress.splits[self.source.files[document.after.file].split].full

    def _save(self, position: Position) -> None:
        for writer in self.writers.values():
            writer.sync()
        self.progress.position = position
        self.progress.save(self.folder)
        self.saved_at = time.monotonic()

    def _tokenizer(self) -> Tokenizer:
        """Read the tokenizer of the folder, or make and save it with the bytes of its tokens."""
        path, config = self.folder / "tokenizer.json", self.config.tokenizer
        if (self.folder / PROGRESS).exists():
            return Tokenizer.from_file(str(path))
        if config.kind == "pretrained":
            assert config.name is not None  # problems() has checked it
            tokenizer = pretrained(config.name, config.revision)
        elif config.kind == "bytes":
            tokenizer = byte_tokenizer()
        else:
            print(f"training a tokenizer of {config.vocab_size} tokens", file=sys.stderr)
            tokenizer = train_bpe(self.source.sample(config.sample_bytes), config.vocab_size)
        tokenizer.save(str(path))
        np.save(self.folder / "token_bytes.npy", token_bytes(tokenizer))
        return tokenizer


def usage() -> str:
    """The help text: the docstring, the data sets, and every key with its default."""
    from omegaconf import OmegaConf

    parts = [__doc__ or "", f"NAME is one of {', '.join(names())}.\n"]
    for cls, prefix in (
        (PrepareConfig, ""),
        (SourceConfig, "source."),
        (TokenizerConfig, "tokenizer."),
    ):
        defaults = {f"{prefix}{key}": value for key, value in asdict(cls()).items() if not isinstance(value, dict)}
        parts += [cls.__doc__ or "", OmegaConf.to_yaml(OmegaConf.create(defaults))]
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return
    first, *rest = arguments
    if first.startswith("verify="):
        if rest:
            raise DataError(f"verify= stands alone, not with {rest[0]}")
        print(verify(Path(first.removeprefix("verify="))))
        return
    if "=" in first:
        raise DataError(f"{first} comes first; begin with the name of a data set: {', '.join(names())}")
    config = load(first, rest).preparation
    manifest = prepare(config)
    counts = ", ".join(f"{name} {split.tokens:,} tokens" for name, split in manifest.splits.items())
    print(f"{config.folder}: {counts}, vocabulary {manifest.vocab_size}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        fail(str(error))
    except KeyboardInterrupt:
        interrupted("interrupted; the same command goes on from what is done")
