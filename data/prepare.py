"""Turn text into token shards: `python data/prepare.py [corpus=stdlib] [vocab_size=4096] [out=FOLDER]`.

Trains a byte-level BPE tokenizer on the corpus's training split, encodes every split, and writes the folder that
`data/shards.py` describes. Training does this by itself the first time it needs the folder.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.corpora import CORPORA, SPLITS
from data.shards import FORMAT, DataError, Manifest, Shard, Split, sha256

END_OF_TEXT = "<|endoftext|>"
BATCH = 256


def default_folder(corpus: str, vocab_size: int) -> Path:
    """Where prepared data goes unless told: beside this file, ignored by git."""
    return Path(__file__).resolve().parent / "prepared" / f"{corpus}-bpe{vocab_size}"


def prepare(corpus: str, vocab_size: int, folder: Path) -> Manifest:
    """Write `folder` and return its manifest; if it is there already, only read it.

    The folder appears whole or not at all: it is written under another name and renamed.
    """
    if (folder / "manifest.json").exists():
        return Manifest.load(folder)
    if corpus not in CORPORA:
        raise DataError(f"no corpus {corpus!r}; choose {', '.join(CORPORA)}, or name a prepared folder in data.path")
    if not 512 <= vocab_size <= 65536:
        raise DataError(f"vocab_size is {vocab_size}; choose 512 to 65536")
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, text in CORPORA[corpus]():
        texts[split].append(text)
    empty = [split for split in SPLITS if not texts[split]]
    if empty:
        raise DataError(f"corpus {corpus} has no text for {', '.join(empty)} on this machine; prepare another corpus")

    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        tokenizer = train_tokenizer(texts["train"], vocab_size)
        tokenizer.save(str(partial / "tokenizer.json"))
        np.save(partial / "token_bytes.npy", token_bytes(tokenizer))
        manifest = Manifest(
            format=FORMAT,
            corpus=corpus,
            tokenizer_sha256=sha256(partial / "tokenizer.json"),
            vocab_size=tokenizer.get_vocab_size(),
            end_of_text=tokenizer.token_to_id(END_OF_TEXT),
            dtype="<u2",
            splits={split: _write_split(partial, split, texts[split], tokenizer) for split in SPLITS},
        )
        manifest.save(partial)
        os.rename(partial, folder)
    except OSError as error:
        if (folder / "manifest.json").exists():  # another process was faster
            return Manifest.load(folder)
        raise DataError(
            f"cannot write {folder}: {error}; free some space, or set data.path to another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text can be encoded and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for; 0 for the end of text. A character of a byte-level token is a byte."""
    sizes = [len(tokenizer.id_to_token(token)) for token in range(tokenizer.get_vocab_size())]
    sizes[tokenizer.token_to_id(END_OF_TEXT)] = 0
    return np.array(sizes, dtype=np.uint16)


def _write_split(folder: Path, split: str, texts: list[str], tokenizer: Tokenizer) -> Split:
    end = tokenizer.token_to_id(END_OF_TEXT)
    path = folder / f"{split}-00000.bin"
    tokens = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with path.open("wb") as file, Progress(*columns) as progress:
        task = progress.add_task(f"tokens of {split}", total=len(texts))
        for batch in _batches(texts):
            for encoding in tokenizer.encode_batch_fast(batch):
                ids = np.array([*encoding.ids, end], dtype="<u2")
                tokens += len(ids)
                file.write(ids.tobytes())
            progress.advance(task, len(batch))
    shard = Shard(path.name, tokens, sha256(path))
    return Split(tokens, sum(len(text.encode()) for text in texts), len(texts), (shard,))


def _batches(texts: list[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def main(arguments: list[str]) -> None:
    options = {"corpus": "stdlib", "vocab_size": "4096", "out": ""}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("-h", "--help"):
            print(__doc__)
            return
        if key not in options or not value:
            raise DataError(f"cannot read {argument!r}; write key=value with a key of {', '.join(options)}")
        options[key] = value
    if not options["vocab_size"].isdecimal():
        raise DataError(f"vocab_size is {options['vocab_size']}; it is a whole number")
    vocab_size = int(options["vocab_size"])
    folder = Path(options["out"]) if options["out"] else default_folder(options["corpus"], vocab_size)
    manifest = prepare(options["corpus"], vocab_size, folder)
    counts = ", ".join(f"{name} {split.tokens:,} tokens" for name, split in manifest.splits.items())
    print(f"{folder}: {counts}, vocabulary {manifest.vocab_size}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
