"""Turn text into token shards.

  python data/prepare.py NAME [key=value ...]     prepare configs/data/NAME.yaml
  python data/prepare.py verify=FOLDER            compare every file of a prepared folder with its manifest
  python data/prepare.py --help

Interrupted, killed or out of disk space, it goes on where it was when the same command is run again, and ends with the
same bytes. A folder is complete when it has a manifest.json.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizers import Tokenizer

from data import config as schema
from data.config import DataConfig, PrepareConfig, folder_of, load, names, problems, recipe
from data.files import DataError, sha256
from data.pool import encoded
from data.report import Report
from data.shards import FORMAT, Manifest, Split
from data.sources import Document, Position, Source
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
from data.writing import PROGRESS, Progress, SplitWriter, differences, only_process

CHECKPOINT_SECONDS = 60


def prepare(config: PrepareConfig) -> Manifest:
    """Write the folder of `config` and return its manifest; if it is there already, only read it.

    Raises DataError where the configuration, the text or the disk does not allow it.
    """
    found = problems(config)
    if found:
        raise DataError("\n".join(found))
    folder = folder_of(config)
    if not (folder / "manifest.json").exists():
        source = Source(config.source)
        try:
            with only_process(folder):
                if not (folder / "manifest.json").exists():
                    Preparation(config, folder, source).run()
        except OSError as error:
            raise DataError(
                f"cannot write {folder}: {error.strerror or error}\nMake room, or give another folder with path=. "
                "The same command goes on from what is done"
            ) from error
    manifest = Manifest.load(folder)
    if manifest.recipe != recipe(config):
        raise DataError(
            f"{folder} was prepared with {differences(manifest.recipe, recipe(config))}; give another folder with path="
        )
    return manifest


class Preparation:
    """One folder, from its first document or from where an earlier process stopped."""

    def __init__(self, config: PrepareConfig, folder: Path, source: Source):
        self.config, self.folder, self.source = config, folder, source
        asked = recipe(config) | {"files": source.fingerprint()}
        self.progress = Progress.load(folder, asked, source.splits)
        self.tokenizer = self._tokenizer()
        self.end = end_token(self.tokenizer, config.tokenizer.end_of_text)
        self.dtype = dtype_of(vocabulary_size(self.tokenizer))
        self.bytes_of = np.load(folder / "token_bytes.npy")
        self.writers: dict[str, SplitWriter] = {}
        self.saved = time.monotonic()

    def run(self) -> None:
        splits, config = self.progress.splits, self.config
        self._save(self.progress.position)  # before any shard: without it they would look like another's files
        self.writers = {
            name: SplitWriter(self.folder, name, splits[name], self.end, self.dtype, config.shard_tokens)
            for name in splits
        }
        with Report(self.folder.name, config.max_tokens, splits) as report:
            for documents in self._stretches():
                for document, tokens in encoded(documents, self.folder, self.end, config.workers):
                    full = self._add(document, tokens)
                    report.update(self.source.parts[document.after.part].name)
                    if full:
                        break
        for name, writer in self.writers.items():
            if not splits[name].documents:
                total = sum(written.documents for written in splits.values())
                raise DataError(
                    f"{config.name} has no text for the split {name}: all {total} documents are in others. Give more "
                    "documents (source.document_start cuts a file into several), a larger share, text of its own "
                    f"with source.{name}, or higher limits, and delete {self.folder}"
                )
            writer.finish()
        Manifest(
            format=FORMAT,
            name=config.name,
            recipe=recipe(config),
            tokenizer_sha256=sha256(self.folder / "tokenizer.json"),
            token_bytes_sha256=sha256(self.folder / "token_bytes.npy"),
            vocab_size=len(self.bytes_of),
            end_of_text=self.end,
            dtype=self.dtype.str,
            splits={
                name: Split(written.tokens, written.bytes, written.documents, tuple(written.shards))
                for name, written in splits.items()
            },
        ).save(self.folder)
        (self.folder / PROGRESS).unlink()
        report.warn_of_lost_text()

    def _stretches(self) -> Iterator[Iterator[Document]]:
        """The documents that are left, one stretch for each run of parts of one split; not those of a full split."""
        parts, position = self.source.parts, self.progress.position
        while position.part < len(parts):
            split = parts[position.part].split
            beyond = next((n for n in range(position.part, len(parts)) if parts[n].split != split), len(parts))
            if not self.progress.splits[split].full:
                yield self.source.documents(position, beyond)
            position = Position(beyond)

    def _add(self, document: Document, tokens: np.ndarray) -> bool:
        """Write a document unless its split is full; True if that of its part is."""
        written, config = self.progress.splits[document.split], self.config
        most, documents = config.max_eval_tokens, None
        if document.split == "train":
            most, documents = config.max_tokens, config.max_documents
        over = most is not None and written.tokens + len(tokens) > most
        written.full = written.full or over or written.documents == documents
        if not written.full:
            covered = int(self.bytes_of[tokens].sum(dtype=np.int64))
            begins = self.writers[document.split].add(tokens, len(document.text.encode()), covered)
            if begins or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
                self._save(document.after)
        return self.progress.splits[self.source.parts[document.after.part].split].full

    def _save(self, position: Position) -> None:
        for writer in self.writers.values():
            writer.sync()
        self.progress.position = position
        self.progress.save(self.folder)
        self.saved = time.monotonic()

    def _tokenizer(self) -> Tokenizer:
        """That of the folder, or a new one, saved with the bytes of its tokens."""
        path, asked = self.folder / "tokenizer.json", self.config.tokenizer
        if (self.folder / PROGRESS).exists():
            return Tokenizer.from_file(str(path))
        if asked.kind == "pretrained":
            tokenizer = pretrained(asked)
        elif asked.kind == "bytes":
            tokenizer = byte_tokenizer()
        else:
            print(f"training a tokenizer of {asked.vocab_size} tokens", file=sys.stderr)
            tokenizer = train_bpe(self.source.sample(asked.sample_bytes), asked.vocab_size)
        tokenizer.save(str(path))
        np.save(self.folder / "token_bytes.npy", token_bytes(tokenizer))
        return tokenizer


def usage() -> str:
    """The docstring, the data sets, and every key with its default."""
    from omegaconf import OmegaConf

    parts = [__doc__ or "", f"NAME is one of {', '.join(names())}.\n"]
    for cls, prefix in (
        (schema.PrepareConfig, ""),
        (schema.SourceConfig, "source."),
        (schema.TokenizerConfig, "tokenizer."),
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
    config: DataConfig = load(first, rest)
    manifest = prepare(config)
    counts = ", ".join(f"{name} {split.tokens:,} tokens" for name, split in manifest.splits.items())
    print(f"{folder_of(config)}: {counts}, vocabulary {manifest.vocab_size}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
        sys.exit(130)
