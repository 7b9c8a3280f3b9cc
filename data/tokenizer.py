"""Tokenizers (trained here, bytes, or pretrained), encoding of documents, and the bytes behind each token."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .files import DataError

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot|>", "[EOS]")
PIECE = 2**20  # characters; a longer document is encoded piece by piece, which bounds memory
AROUND = 256  # characters on both sides of a cut between pieces that must be encoded as they are without it
CUTS = 32  # places of a kind that are tried for a cut
LONGEST = 1000  # characters of one kind in a row that BPE is trained on whole; its time grows with their square
LONG_RUN = re.compile(
    r"(?<![^\W_])[^\W_]{N,}|(?<!\s)\s{N,}|(?<![^\w\s])(?<!_)(?:[^\w\s]|_){N,}".replace("N", str(LONGEST + 1))
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which encodes any text and decodes it unchanged.

    Of a run of more than LONGEST letters and digits, blanks, or other characters, LONGEST at a time are shown to it.
    """
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _without_long_runs(text)), trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose token i is byte i; 256 is the end of text."""
    vocabulary = {character: byte for byte, character in enumerate(_characters_of_bytes())}
    tokenizer = _byte_level(models.BPE(vocabulary, []), use_regex=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def number_tokenizer(vocab_size: int) -> Tokenizer:
    """The tokenizer of numbers below `vocab_size`, between blanks, whose token i is i; `vocab_size` ends a text."""
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def pretrained(name: str, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder with a tokenizer.json, from such a file, or else from the hub.

    Raises DataError if there is none here and it cannot be downloaded.
    """
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = Tokenizer.from_pretrained(name, revision=revision or "main")
    except Exception as error:  # `tokenizers` raises bare Exception, the hub what its HTTP library raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"cannot load the tokenizer {name}: {reason}\nWithout a network, copy its tokenizer.json here and "
            "set tokenizer.name to that file or its folder; tokenizer.kind=bpe trains one instead"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_token(tokenizer: Tokenizer, name: str | None) -> int:
    """Id of the token that ends a document: `name`, or else the first of USUAL_ENDS in the vocabulary.

    Raises DataError if there is no such token, or if text is encoded to it.
    """
    candidates = (name,) if name else USUAL_ENDS
    for text in candidates:
        end = tokenizer.token_to_id(text)
        if end is None:
            continue
        if end in Encoder(tokenizer, end)._ids([text])[0]:
            raise DataError(f"the tokenizer reads the text {text!r} as the token; set tokenizer.end_of_text to another")
        return end
    raise DataError(f"the tokenizer has no token {' or '.join(candidates)}; set tokenizer.end_of_text to one it has")


def begin_token(tokenizer: Tokenizer) -> int | None:
    """Id of the token that the tokenizer puts before a text; None if it puts none."""
    whole, text = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    return whole[0] if len(whole) > len(text) and whole[1 : len(text) + 1] == text else None


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest token id plus one; unused ids count."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, [V]; 0 for special tokens.

    In a byte-level vocabulary each character is a byte. In a SentencePiece vocabulary U+2581 is a space and <0x0A> is a
    byte. In WordPiece the prefix ## stands for nothing. A word between blanks stands for the one after it, too. Added
    tokens that are not special stand for their own text.
    """
    sizes = np.zeros(vocabulary_size(tokenizer), dtype=np.uint16)
    parts = json.loads(tokenizer.to_str())
    kinds = set(re.findall(r'"type": ?"(\w+)"', json.dumps([parts["pre_tokenizer"], parts["decoder"]])))
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if "ByteLevel" in kinds:
            sizes[index] = len(token)
        elif "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            sizes[index] = 1
        elif "WordPiece" in kinds:
            sizes[index] = len(token.removeprefix("##").encode())
        elif parts["model"]["type"] == "WordLevel" and "WhitespaceSplit" in kinds:
            sizes[index] = len(token.encode()) + 1
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes


def scaled_bytes(sizes: Sequence[float], text: str) -> list[float]:
    """`sizes` as they are where they add up to the bytes of `text`, else scaled so that they do, as far as there are
    any."""
    total, actual = sum(sizes), len(text.encode())
    if total == actual:
        return list(sizes)
    return [size * actual / total for size in sizes] if total else [actual / len(sizes) for _ in sizes]


class Encoder:
    """Encodes documents. Special tokens spelled out in a document are encoded as ordinary text.

    A document longer than PIECE is encoded piece by piece. The pieces are cut where encoding the text around the cut
    gives the same tokens with and without it, and what a tokenizer puts before a text is put before the first piece
    alone. Memory at the peak of a preparation by one process: 0.2 GB and 6.5 bytes per byte of its longest document
    (bytes tokenizer, 10 and 100 MB of ASCII).
    """

    def __init__(self, tokenizer: Tokenizer, end: int):
        tokenizer.encode_special_tokens = True
        self.tokenizer, self.end = tokenizer, end
        self.dtype = dtype_of(vocabulary_size(tokenizer))
        self._continuing: Tokenizer | None = None

    def __call__(self, documents: list[str]) -> list[np.ndarray]:
        """Encode each document, with the end of text last. Raises DataError if it occurs within a document."""
        short = iter(self._ids([document for document in documents if len(document) <= PIECE]))
        result = []
        for document in documents:
            if len(document) <= PIECE:
                pieces = [np.array(next(short), dtype=self.dtype)]
            else:
                pieces = [np.array(ids, dtype=self.dtype) for ids in self._ids_of_pieces(document)]
            if any((piece == self.end).any() for piece in pieces):
                raise DataError(
                    f"a document contains the end of text, token {self.end}; set another tokenizer.end_of_text"
                )
            result.append(np.concatenate([*pieces, np.array([self.end], dtype=self.dtype)]))
        return result

    def _ids(self, texts: list[str], tokenizer: Tokenizer | None = None) -> list[list[int]]:
        encodings = (tokenizer or self.tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _ids_of_pieces(self, text: str) -> Iterator[list[int]]:
        begin = 0
        while begin < len(text):
            end = self._cut(text, begin)
            yield self._ids([text[begin:end]], self.continuing if begin else None)[0]
            begin = end

    @property
    def continuing(self) -> Tokenizer:
        """The tokenizer without what it puts before a text, for all pieces but the first."""
        if self._continuing is None:
            self._continuing = Tokenizer.from_str(json.dumps(_without_prefix(json.loads(self.tokenizer.to_str()))))
            self._continuing.encode_special_tokens = True
        return self._continuing

    def _cut(self, text: str, begin: int) -> int:
        """Find the end of the piece that starts at `begin`: the last place that changes no token around it.

        After or before the end of a line, after or before a blank, or anywhere; the end of the last line, or PIECE
        characters, where no such place is found.
        """
        limit: int = begin + PIECE
        if limit >= len(text):
            return len(text)
        places: list[int] = [
            place
            for mark in ("\n", " ")
            for found in _last_places(text, mark, begin + 1, limit)
            for place in (found + 1, found)
        ]
        places += range(limit, max(begin, limit - CUTS), -1)
        for place in places:
            left, right = text[max(begin, place - AROUND) : place], text[place : place + AROUND]
            whole, before = self._ids([left + right, left])
            if whole == before + self._ids([right], self.continuing)[0]:
                return place
        line_end: int = text.rfind("\n", begin, limit) + 1
        return line_end or limit


def dtype_of(vocab_size: int) -> np.dtype:
    """Smallest little-endian unsigned integer, of 2 or 4 bytes, that holds every token."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def _without_long_runs(text: str) -> Iterator[str]:
    """Yield `text` in pieces, none of which has a run of more than LONGEST characters of one kind."""
    begin = 0
    for run in LONG_RUN.finditer(text):
        for end in range(run.start() + LONGEST, run.end(), LONGEST):
            yield text[begin:end]
            begin = end
    yield text[begin:]


def _last_places(text: str, mark: str, begin: int, end: int) -> Iterator[int]:
    """The last CUTS places of `mark` in text[begin:end], the last one first."""
    for _ in range(CUTS):
        end = text.rfind(mark, begin, end)
        if end < 0:
            return
        yield end


def _without_prefix(parts: Any) -> Any:
    """A tokenizer.json without the normalizers and pre-tokenizers that put a blank or a mark before a text."""
    if isinstance(parts, list):
        return [
            _without_prefix(part) for part in parts if not (isinstance(part, dict) and part.get("type") == "Prepend")
        ]
    if not isinstance(parts, dict):
        return parts
    changed = {
        key: value if key in ("vocab", "merges", "added_tokens") else _without_prefix(value)
        for key, value in parts.items()
    }
    if parts.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in parts:
        changed["add_prefix_space"] = False
    if isinstance(normalizer := parts.get("normalizer"), dict) and normalizer.get("type") == "Prepend":
        changed["normalizer"] = None
    return changed


def _byte_level(model: models.BPE, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _characters_of_bytes() -> list[str]:
    """Character of each byte in a byte-level vocabulary: the byte itself if it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
