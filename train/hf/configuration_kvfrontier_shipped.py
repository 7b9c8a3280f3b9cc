"""Configuration of a model whose own training code goes with it: a layout at a size, as they were written.

`from arch.x import` here and in modeling_kvfrontier_shipped.py becomes `from .x import` in an exported folder, where
the files of `arch` lie beside them.
"""

from typing import Any

from transformers import PreTrainedConfig

from arch.block_plan import resolve
from arch.config import ModelConfig, from_dict

# What tools look for, and where it comes from.
STANDARD = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "seq_len",
    "tie_word_embeddings": "tie_embeddings",
}
ONE_HEAD = {"stores": {"kv": {"kv_heads": 1}}, "pattern": ["new kv"]}


class KVFrontierShippedConfig(PreTrainedConfig):
    """The layout `arch` and the size `size`, as plain data; the keys in STANDARD say again what `size` says.

    block_pad_token  of a Block Transformer that was trained with random padding (data.block_padding) and has no start
                     context: the token that fills its first block from the left. None: the first block of a text is
                     not predicted, and a prompt has a block at least

    Raises ValueError where the layout is impossible or a key says something else than `size`.
    """

    model_type = "kvfrontier_shipped"

    def __init__(
        self,
        arch: dict[str, Any] | None = None,
        size: dict[str, Any] | None = None,
        block_pad_token: int | None = None,
        **kwargs: Any,
    ):
        self.arch = ONE_HEAD if arch is None else arch
        self.size = {} if size is None else size
        self.block_pad_token = block_pad_token
        model = from_dict(ModelConfig, {"arch": self.arch, "size": self.size})
        resolve(model)
        if block_pad_token is not None and not 0 <= block_pad_token < model.size.vocab_size:
            raise ValueError(f"block_pad_token is {block_pad_token}; it is no token of {model.size.vocab_size}")
        for theirs, ours in STANDARD.items():
            value = getattr(model.size, ours)
            given = kwargs.pop(theirs, value)
            if given != value:
                raise ValueError(f"{theirs} is {given!r} and size.{ours} is {value!r}; they must be the same")
            setattr(self, theirs, value)
        super().__init__(**kwargs)
