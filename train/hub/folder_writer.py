"""The exported folder: weights in shards, their index, configuration, generation settings, tokenizer."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import Tokenizer

from arch.convert import Weight
from data.cli import UsageError
from data.files import write_json
from data.tokenizer import vocabulary_size
from train.checkpoint import TrainingError
from train.hub.checkpoint_reader import Source
from train.hub.targets import Target, flattened

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The same type in the header of a safetensors file.
HEADER_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_weights(folder: Path, source: Source, weights: list[Weight], dtype: torch.dtype, shard_bytes: float) -> None:
    """model.safetensors, or numbered shards of at most `shard_bytes` and an index.

    One weight is held in memory at a time. A weight that is larger than a shard has one to itself.
    """
    shards = split(weights, dtype.itemsize, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_shard(file, source, shard, dtype)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(weight.shape.numel() for weight in weights) * dtype.itemsize},
            "weight_map": {weight.theirs: name for name, shard in zip(names, shards, strict=True) for weight in shard},
        }
        write_json(folder / "model.safetensors.index.json", index)


def split(weights: list[Weight], itemsize: int, shard_bytes: float) -> list[list[Weight]]:
    """The weights in order, in as few shards as that takes."""
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        size = weight.shape.numel() * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    return shards


def _write_shard(file: BinaryIO, source: Source, shard: list[Weight], dtype: torch.dtype) -> None:
    """The safetensors format: length of the header, header, tensors one after the other.

    Written here because the library's own writer takes all tensors of a file at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in shard:
        begin, end = end, end + weight.shape.numel() * dtype.itemsize
        entry = {"dtype": HEADER_NAMES[dtype], "shape": list(weight.shape), "data_offsets": [begin, end]}
        header[weight.theirs] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for weight in shard:
        file.write(_bytes(source, weight, dtype))


def _bytes(source: Source, weight: Weight, dtype: torch.dtype) -> memoryview:
    """One weight as the file holds it. Raises TrainingError where it is too large for `dtype`."""
    tensor = weight.to_hf(source.read(weight.ours)).to(dtype).contiguous()
    if not tensor.isfinite().all():
        raise TrainingError(f"{source.folder}: model.{weight.ours} has elements too large for {HEADER_NAMES[dtype]}")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_settings(folder: Path, target: Target, dtype: torch.dtype, end: int) -> None:
    """config.json, its Python files, and generation_config.json. Text ends at token `end`, which also pads."""
    name = str(dtype).removeprefix("torch.")
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    # Readers older than transformers 4.56 and some converters know the second name alone.
    write_json(folder / "config.json", target.config | special | {"dtype": name, "torch_dtype": name})
    write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end, "do_sample": False})
    for path in target.code:
        (folder / path.name).write_text(flattened(path.read_text()))


def write_tokenizer(folder: Path, tokenizer: Tokenizer, end: int, vocab_size: int, seq_len: int) -> None:
    """tokenizer.json, and a tokenizer_config.json that readers older than transformers 5 understand too.

    Documents were encoded without special tokens around them, and so they are by this tokenizer. Raises UsageError
    where its tokens are not those of the model.
    """
    if vocabulary_size(tokenizer) > vocab_size:
        raise UsageError(
            f"the tokenizer has {vocabulary_size(tokenizer):,} tokens, the model {vocab_size:,}; "
            "give the prepared folder that it was trained on with prepared="
        )
    content = json.loads(tokenizer.to_str())
    if tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        content["post_processor"] = None
    write_json(folder / "tokenizer.json", content)
    token = tokenizer.id_to_token(end)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": token,
        "pad_token": token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    write_json(folder / "tokenizer_config.json", config)
