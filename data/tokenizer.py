"""Tokenizers (trained here, bytes, or pretrained), encoding of documents, and the bytes behind each token."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .files import DataError

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot|>", "[EOS]")
PIECE = 2**20  # characters; longer documents are encoded in pieces, which bounds memory


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which encodes any text and decodes it unchanged."""
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose token i is byte i; 256 is the end of text."""
    vocabulary = {character: byte for byte, character in enumerate(_characters_of_bytes())}
    tokenizer = _byte_level(models.BPE(vocabulary, []), use_regex=False)
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


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest token id plus one; unused ids count."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, [V]; 0 for special tokens.

    In a byte-level vocabulary each character is a byte. In a SentencePiece vocabulary U+2581 is a space and <0x0A> is a
    byte. In WordPiece the prefix ## stands for nothing. Added tokens that are not special stand for their own text.
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
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes


class Encoder:
    """Encodes documents. Special tokens spelled out in a document are encoded as ordinary text."""

    def __init__(self, tokenizer: Tokenizer, end: int):
        tokenizer.encode_special_tokens = True
        self.tokenizer, self.end = tokenizer, end
        self.dtype = dtype_of(vocabulary_size(tokenizer))

    def __call__(self, documents: list[str]) -> list[np.ndarray]:
        """Encode each document, with the end of text last. Raises DataError if it occurs within a document."""
        pieces_of = [list(_pieces(document)) for document in documents]
        ids = iter(self._ids([piece for pieces in pieces_of for piece in pieces]))
        result = []
        for pieces in pieces_of:
            tokens = np.concatenate([np.array(next(ids), dtype=self.dtype) for _ in pieces])
            if (tokens == self.end).any():
                raise DataError(
                    f"a document contains the end of text, token {self.end}; set another tokenizer.end_of_text"
                )
            result.append(np.append(tokens, self.dtype.type(self.end)))
        return result

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def dtype_of(vocab_size: int) -> np.dtype:
    """Smallest little-endian unsigned integer, of 2 or 4 bytes, that holds every token."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most PIECE characters, after a line break if there is one."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = text.rfind("\n", begin, begin + PIECE) + 1 or begin + PIECE
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


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
