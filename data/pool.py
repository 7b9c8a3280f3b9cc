"""Tokenisation in several processes, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .files import DataError
from .sources import Document
from .tokenizer import Encoder

BATCH = 2**19  # characters
AHEAD = 4  # batches that wait for each process

_encoder: Encoder | None = None


def encoded(
    documents: Iterator[Document], folder: Path, end: int, workers: int | None
) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document and its tokens, in the order of `documents`, by the tokenizer of `folder`."""
    if workers is None:  # macOS does not know which cores are ours
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 1:
        encode = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")), end)
        for batch in _batches(documents):
            yield from zip(batch, encode([document.text for document in batch]), strict=True)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (str(folder / "tokenizer.json"), end)
    )
    try:
        waiting = deque()
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(_encode, [document.text for document in batch])))
            if len(waiting) > workers * AHEAD:
                batch, future = waiting.popleft()
                yield from zip(batch, future.result(), strict=True)
        for batch, future in waiting:
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
    """In each process of the pool. It ends with its parent, also where that is killed; Ctrl-C is for the parent."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each
    _encoder = Encoder(Tokenizer.from_file(path), end)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return _encoder(texts)
