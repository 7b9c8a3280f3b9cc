"""Tokenization in several processes, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .cores import cores
from .files import DataError
from .sources import Document
from .tokenizer import Encoder

BATCH = 2**19  # characters
MAX_PENDING = 4  # batches per process

_encoder: Encoder  # of a process of the pool, set by _start


def encoded(
    documents: Iterator[Document], folder: Path, end: int, workers: int | None
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield each document with its tokens, in the order of `documents`, encoded by the tokenizer of `folder`.

    Raises DataError if a worker process dies.
    """
    if workers is None:
        workers = cores()
    if workers == 1:
        encode = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")), end)
        for batch in _batches(documents):
            yield from zip(batch, encode([document.text for document in batch]), strict=True)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (str(folder / "tokenizer.json"), end)
    )
    try:
        pending: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        for batch in _batches(documents):
            pending.append((batch, pool.submit(_encode, [document.text for document in batch])))
            if len(pending) > workers * MAX_PENDING:
                batch, future = pending.popleft()
                yield from zip(batch, future.result(), strict=True)
        for batch, future in pending:
            yield from zip(batch, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise DataError(
            f"a process of the tokenizer died, perhaps for want of memory; run the same command again, with fewer "
            f"than workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start(path: str, end: int) -> None:
    """Initialize a process of the pool. It ignores Ctrl-C and exits when its parent ends, even by SIGKILL."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each
    _encoder = Encoder(Tokenizer.from_file(path), end)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return _encoder(texts)
