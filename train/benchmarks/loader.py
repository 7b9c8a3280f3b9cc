"""Tokens per second that reach the model: prepared shards against tokenising on the fly.

Both yield batches [B, T + 1] of the same text under the same tokenizer: ours shuffled and read from disk,
`datasets` in the order of the text, streamed from a JSON-lines file, tokenised and packed in `map`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from data.batches import TrainBatches
from data.corpora import CORPORA
from data.shards import Manifest, TokenWindows
from train.benchmarks.baselines import UnavailableError
from train.benchmarks.timing import summary_stats, timed

# Batches of ours for each of the baseline's, so that both take long enough to be timed.
OURS_PER_BASELINE = 20
DOCUMENTS_PER_CALL = 100  # that the stream tokenises and packs together


def write_text(corpus: str, path: Path, documents: int) -> None:
    """The first documents of the corpus' training split, one JSON object each."""
    texts = (text for split, text in CORPORA[corpus]() if split == "train")
    with path.open("w", encoding="utf-8") as file:
        for _, text in zip(range(documents), texts, strict=False):
            file.write(json.dumps({"text": text}) + "\n")


def streamed_batches(text: Path, folder: Path, manifest: Manifest, batch: int, seq_len: int) -> Iterator[torch.Tensor]:
    """Batches [B, T + 1] from `datasets`. Raises UnavailableError if it cannot be imported."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UnavailableError(f"datasets cannot be imported: {error}") from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    length = seq_len + 1

    def pack(documents: dict[str, list[str]]) -> dict[str, np.ndarray]:
        """Concatenate the documents of a map batch and cut them into rows; the remainder is dropped."""
        encoded = tokenizer.encode_batch_fast(documents["text"])
        tokens = np.concatenate([[*document.ids, manifest.end_of_text] for document in encoded])
        rows = len(tokens) // length
        return {"tokens": tokens[: rows * length].reshape(rows, length)}

    rows = load_dataset("json", data_files=str(text), split="train", streaming=True)
    rows = rows.map(pack, batched=True, batch_size=DOCUMENTS_PER_CALL, remove_columns=["text"]).with_format("torch")
    return (batch_rows["tokens"] for batch_rows in DataLoader(rows, batch_size=batch))


def shard_batches(folder: Path, manifest: Manifest, batch: int, seq_len: int, batches: int) -> Iterator[torch.Tensor]:
    """Inputs [B, T] of `batches` training batches from prepared shards."""
    windows = TokenWindows(folder, manifest, "train", seq_len)
    train = TrainBatches(windows, seed=0, steps=batches, batch_size=batch, micro_batch=batch)
    return (rows["inputs"] for rows in train)


def measure(folder: Path, manifest: Manifest, text: Path, *, batch: int, seq_len: int, repeats: int) -> dict[str, Any]:
    """Tokens/s of both, in turns: the baseline over the whole of `text`, ours over a multiple of it.

    Raises RuntimeError if the two do not read the same tokens.
    """
    batches = 0
    first = TokenWindows(folder, manifest, "train", seq_len)[0]
    for rows in streamed_batches(text, folder, manifest, batch, seq_len):
        if batches == 0 and not np.array_equal(first, rows[0].numpy()):
            raise RuntimeError("the first window of the shards is not the first row of the stream: not the same text")
        batches += 1
    speeds: dict[str, list[float]] = {"ours": [], "datasets": []}
    for _ in range(repeats):
        mine = shard_batches(folder, manifest, batch, seq_len, batches * OURS_PER_BASELINE)
        speeds["ours"].append(_speed(mine, seq_len))
        speeds["datasets"].append(_speed(streamed_batches(text, folder, manifest, batch, seq_len), seq_len))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["datasets"], strict=True)]
    return {
        "tokens_per_second": {name: summary_stats(values) for name, values in speeds.items()},
        "ours_over_datasets": summary_stats(ratios),
        "batch_size": batch,
        "seq_len": seq_len,
        "tokens": {"ours": batches * batch * seq_len * OURS_PER_BASELINE, "datasets": batches * batch * seq_len},
    }


def _speed(batches: Iterator[torch.Tensor], seq_len: int) -> float:
    rows, seconds = timed(lambda: sum(len(batch) for batch in batches))
    return rows * seq_len / seconds
