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
from typing import Any

import numpy as np

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from tokenizers import Tokenizer

from data import source_record
from data.cli import fail, interrupted
from data.config import PrepareConfig, RecallConfig, SourceConfig, TokenizerConfig, problems
from data.files import DataError, sha256, write_text
from data.held_out import MIN_DOCUMENTS, no_text
from data.listing import SourceFile
from data.pool import encoded
from data.presets import load, names
from data.report import Report
from data.shards import CHUNK, FORMAT, Manifest, Split
from data.sources import Document, Position, TextSource
from data.tokenizer import (
    byte_tokenizer,
    dtype_of,
    end_token,
    number_tokenizer,
    pretrained,
    token_bytes,
    train_bpe,
    vocabulary_size,
)
from data.verify import verify
from data.writing import PROGRESS, Progress, SplitWriter, differences, discard, folder_lock

CHECKPOINT_SECONDS = 60


def prepare(config: PrepareConfig) -> Manifest:
    """Write the folder of `config` and return its manifest; a complete folder is only read.

    Raises DataError if the configuration is wrong, the text cannot be read, the folder cannot be written, or a complete
    folder is of another recipe or of sources that have changed.
    """
    errors = problems(config)
    if errors:
        raise DataError("\n".join(errors))
    folder, made = config.folder, False
    if not _complete(folder):
        source = TextSource(config.source)
        try:
            with folder_lock(folder):
                if not _complete(folder):
                    Preparation(config, folder, source).run()
                    made = True
        except OSError as error:
            raise DataError(
                f"cannot write {folder}: {error.strerror or error}\nMake room, or give another folder with path=. "
                "The same command goes on from what is done"
            ) from error
    manifest = Manifest.load(folder)
    recipe = manifest.recipe if manifest.sources else _of_earlier_preset(manifest.recipe, config.recipe)
    if recipe != config.recipe:
        raise DataError(
            f"{folder} was prepared with {differences(recipe, config.recipe)}; give another folder with path="
        )
    if not made:
        _check_sources(manifest, config)
    return manifest


def _complete(folder: Path) -> bool:
    try:
        return (folder / "manifest.json").exists()
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}; give another folder with path=") from error


def _of_earlier_preset(recorded: dict[str, Any], requested: dict[str, Any]) -> dict[str, Any]:
    """`recorded`, with the shares of `requested` where they are those that the preset `files` used to have."""
    shares = {"val_share": 0.005, "test_share": 0.005}
    if all(recorded["source"].get(key) == value for key, value in shares.items()):
        return recorded | {"source": recorded["source"] | {key: requested["source"][key] for key in shares}}
    return recorded


def _check_sources(manifest: Manifest, config: PrepareConfig) -> None:
    """Raise DataError if the sources are no longer what the complete folder was prepared from."""
    folder = config.folder
    if manifest.sources is None:
        print(
            f"note: an earlier version prepared {folder} and did not record its sources: whether they changed since is "
            "not known",
            file=sys.stderr,
        )
        return
    try:
        source = TextSource(config.source)
    except DataError as error:
        raise DataError(f"{error}. ({folder} is complete; to train on it, set data.path={folder})") from error
    changes = source_record.changes(source_record.load(folder, manifest.sources), source.states(digest=False))
    if changes:
        raise DataError(
            f"the sources of {folder} have changed since it was prepared: {changes}. Put them back, delete {folder}, "
            "or give another folder with path="
        )


class Preparation:
    """The writing of one folder, from its first document or from the saved progress."""

    def __init__(self, config: PrepareConfig, folder: Path, source: TextSource):
        self.config, self.folder, self.source = config, folder, source
        self.progress = Progress.load(folder, config.recipe, source.splits)
        begun_by_earlier_version = isinstance(self.progress.sources, list)
        for line in (f"preparing {folder}", *source.listing):
            print(line, file=sys.stderr)
        self._record_sources()
        if not begun_by_earlier_version:
            source.hold_out(config.name)
        if source.held_out.summary:
            print(source.held_out.summary, file=sys.stderr, flush=True)
        self.tokenizer = self._tokenizer()
        self.end = end_token(self.tokenizer, config.tokenizer.end_of_text)
        self.dtype = dtype_of(vocabulary_size(self.tokenizer))
        self.token_bytes = np.load(folder / "token_bytes.npy")
        self.unsaved = False
        self.writers: dict[str, SplitWriter] = {}
        self.saved_at = time.monotonic()

    def run(self) -> None:
        splits, config, source = self.progress.splits, self.config, self.source
        self._save(self.progress.position)  # before any shard, which would look like a foreign file without it
        self.writers = {
            name: SplitWriter(self.folder, name, splits[name], self.end, self.dtype, config.shard_tokens)
            for name in splits
        }
        with Report(self.folder.name, config.max_tokens, splits) as report:
            for documents in self._ranges():
                for document, tokens in encoded(documents, self.folder, self.end, config.workers):
                    enough = self._add(document, tokens)
                    report.update(source.files[document.after.file].name)
                    if enough:
                        break
        for name, writer in self.writers.items():
            if not splits[name].documents:
                total = sum(split.documents for split in splits.values())
                self._close_and_discard()
                raise no_text(config.name, name, total)
            writer.finish()
        if changes := source_record.changes(self._recorded(), source.states(digest=False)):
            self._close_and_discard()
            raise DataError(
                f"source files changed while they were read: {changes}. Nothing was kept; run the same command again"
            )
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
                name: Split(split.tokens, split.bytes, split.documents, tuple(split.shards), split.token_text_bytes)
                for name, split in splits.items()
            },
            sources=sha256(self.folder / source_record.SOURCES),
        ).save(self.folder)
        (self.folder / PROGRESS).unlink()
        report.warn_of_lost_text()

    def _ranges(self) -> Iterator[Iterator[Document]]:
        """Yield the remaining documents of each range of source files of one split, unless they are not needed."""
        files, position = self.source.files, self.progress.position
        while position.file < len(files):
            split = files[position.file].split
            end = next((n for n in range(position.file, len(files)) if files[n].split != split), len(files))
            if not self._enough(files[position.file]):
                yield self.source.documents(position, end)
            position = Position(end)

    def _add(self, document: Document, tokens: np.ndarray) -> bool:
        """Write a document unless its split is full; return True if no more of its source file is needed."""
        split, config = self.progress.splits[document.split], self.config
        max_tokens, max_documents = config.max_eval_tokens, None
        if document.split == "train":
            max_tokens, max_documents = config.max_tokens, config.max_documents
        over = max_tokens is not None and split.tokens + len(tokens) > max_tokens
        split.full = split.full or over or split.documents == max_documents
        if not split.full:
            token_text_bytes = sum(
                int(self.token_bytes[tokens[at : at + CHUNK]].sum(dtype=np.int64))
                for at in range(0, len(tokens), CHUNK)
            )
            new_shard = self.writers[document.split].add(tokens, document.num_bytes, token_text_bytes)
            self.unsaved = self.unsaved or new_shard or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        if self.unsaved and document.complete:
            self._save(document.after)
        return self._enough(self.source.files[document.after.file])

    def _enough(self, file: SourceFile) -> bool:
        """Tell whether the rest of `file` is not needed: its split is full, and what is held out of it has text."""
        splits, own = self.progress.splits, file.split
        if not splits[own].full:
            return False
        # One file of a corpus has all of its splits; of text that is cut, what is held out comes last.
        if self.config.source.corpus or self.source.held_out.cuts is not None:
            return all(splits[split].full for split in self.source.can_yield(file))
        held_out = [splits[split] for split in self.source.held_out.shares] if own == "train" else []
        return all(split.full or split.documents >= MIN_DOCUMENTS for split in held_out)

    def _save(self, position: Position) -> None:
        for writer in self.writers.values():
            writer.sync()
        self.progress.position = position
        self.progress.save(self.folder)
        self.saved_at, self.unsaved = time.monotonic(), False

    def _recorded(self) -> list[source_record.SourceState]:
        return source_record.load(self.folder, sha256(self.folder / source_record.SOURCES))

    def _record_sources(self) -> None:
        """Record the sources, or compare them with what an interrupted preparation recorded.

        Raises DataError if they have changed since, unless no token was written yet.
        """
        progress, folder, source = self.progress, self.folder, self.source
        if progress.sources is not None:
            if isinstance(progress.sources, str):
                recorded = source_record.load(folder, progress.sources)
                changes = source_record.changes(recorded, source.states(digest=False))
            else:
                changes = source_record.changes_since_earlier_version(progress.sources, source.states(digest=False))
            if not changes and isinstance(progress.sources, str):
                source.pin(recorded)
                return
            if changes and any(split.tokens for split in progress.splits.values()):
                raise DataError(
                    f"{folder} was begun with other source files: {changes}. Put them back, delete {folder}, or give "
                    "another folder with path="
                )
            if changes:
                discard(folder)
                self.progress = progress = Progress.load(folder, self.config.recipe, source.splits)
        states = source.states()
        source.pin(states)
        pairs = source_record.same_content(states)
        if pairs:
            (first, second), more = pairs[0], f", and {len(pairs) - 1} more" if len(pairs) > 1 else ""
            print(
                f"warning: the same content is in two splits: {first.name} of {first.split} and {second.name} of "
                f"{second.split}{more}",
                file=sys.stderr,
            )
        progress.sources = source_record.save(folder, states)

    def _close_and_discard(self) -> None:
        for writer in self.writers.values():
            writer.file.close()
        discard(self.folder)

    def _tokenizer(self) -> Tokenizer:
        """Read the tokenizer of the folder, or make and save it with the bytes of its tokens."""
        path, config = self.folder / "tokenizer.json", self.config.tokenizer
        if (self.folder / PROGRESS).exists():  # it was saved after the tokenizer
            return Tokenizer.from_file(str(path))
        if config.kind == "pretrained":
            assert config.name is not None  # problems() has checked it
            tokenizer = pretrained(config.name, config.revision)
        elif config.kind == "bytes":
            tokenizer = byte_tokenizer()
        elif config.kind == "numbers":
            tokenizer = number_tokenizer(self.config.source.recall.vocab)
        else:
            print(f"training a tokenizer of {config.vocab_size} tokens", file=sys.stderr)
            tokenizer = train_bpe(self.source.sample(config.sample_bytes), config.vocab_size)
        write_text(path, tokenizer.to_str(pretty=True))  # its own `save` raises no OSError
        np.save(self.folder / "token_bytes.npy", token_bytes(tokenizer))
        return tokenizer


def usage() -> str:
    """The help text: the docstring, the data sets, and every key with its default."""
    from omegaconf import OmegaConf

    parts = [__doc__ or "", f"NAME is one of {', '.join(names())}.\n"]
    for cls, prefix in (
        (PrepareConfig, ""),
        (SourceConfig, "source."),
        (RecallConfig, "source.recall."),
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
    except MemoryError:
        fail("out of memory; fewer processes (workers=) or shorter documents (source.document_start) need less")
    except KeyboardInterrupt:
        interrupted("interrupted; the same command goes on from what is done")
