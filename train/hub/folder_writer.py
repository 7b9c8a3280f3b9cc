"""The exported folder: weights in shards, their index, configuration, generation settings, tokenizer."""

import json
from pathlib import Path

import torch

from arch.convert import TensorReader, Weight
from arch.convert_formats import ExportedTensors
from data.cli import UsageError
from data.files import write_json
from data.tokenizer import vocabulary_size
from train.hub.folder_reader import INDEX, SINGLE
from train.hub.records import Corpus
from train.hub.targets import Target, rewrite_imports
from train.hub.tensor_files import write_shards


def write_weights(
    folder: Path, reader: TensorReader, weights: list[Weight], dtype: torch.dtype, shard_bytes: float
) -> None:
    """Write model.safetensors, or numbered shards of at most `shard_bytes` and an index.

    One weight is in memory at a time. A weight that is larger than a shard has one to itself.
    """

    def file_name(number: int, count: int) -> str:
        return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    files = write_shards(folder, ExportedTensors(weights, reader), dtype, shard_bytes, file_name)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(weight.hf_shape.numel() for weight in weights) * dtype.itemsize},
            "weight_map": {name: file for file, written in files.items() for name in written.names},
        }
        write_json(folder / INDEX, index)


def write_settings(folder: Path, target: Target, dtype: torch.dtype, corpus: Corpus) -> None:
    """Write config.json, its Python files, and generation_config.json. The token that ends a text pads, too."""
    end = corpus.end
    name = str(dtype).removeprefix("torch.")
    special = {"bos_token_id": corpus.begin, "eos_token_id": end, "pad_token_id": end}
    # Readers older than transformers 4.56 and some converters know the second name alone.
    write_json(folder / "config.json", target.config | special | {"dtype": name, "torch_dtype": name})
    begin = {} if corpus.begin is None else {"bos_token_id": corpus.begin}
    generation = begin | {"eos_token_id": end, "pad_token_id": end, "do_sample": False}
    write_json(folder / "generation_config.json", generation)
    for path in target.code:
        (folder / path.name).write_text(rewrite_imports(path.read_text()))


def write_tokenizer(folder: Path, corpus: Corpus, vocab_size: int, seq_len: int) -> None:
    """Write tokenizer.json, and a tokenizer_config.json that readers older than transformers 5 understand too.

    Training documents had no special tokens around them, so this tokenizer adds none, but for what begins a text of an
    imported model. Raises UsageError if it has more tokens than the model.
    """
    tokenizer = corpus.tokenizer
    if vocabulary_size(tokenizer) > vocab_size:
        raise UsageError(
            f"the tokenizer has {vocabulary_size(tokenizer):,} tokens, the model {vocab_size:,}; "
            "give the prepared folder that it was trained on with prepared="
        )
    content = json.loads(tokenizer.to_str())
    if corpus.begin is None and tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        content["post_processor"] = None
    write_json(folder / "tokenizer.json", content)
    token = tokenizer.id_to_token(corpus.end)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": token,
        "pad_token": token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    if corpus.begin is not None:
        config["bos_token"] = tokenizer.id_to_token(corpus.begin)
    if corpus.chat_template is not None:
        config["chat_template"] = corpus.chat_template
    write_json(folder / "tokenizer_config.json", config)
