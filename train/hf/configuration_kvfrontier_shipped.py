"""Configuration of a model whose own training code goes with it: a layout at a size, as they were written.

`from arch.x import` here and in modeling_kvfrontier_shipped.py becomes `from .x import` in an exported folder, where
the files of `arch` lie beside them.
"""

from typing import Any

from transformers import PreTrainedConfig

from arch.block_plan import resolve
from arch.config import HF_SIZE_KEYS, ModelConfig, from_dict

ONE_HEAD = {"stores": {"kv": {"kv_heads": 1}}, "pattern": ["new kv"]}


class KVFrontierShippedConfig(PreTrainedConfig):
    """The layout `arch` and the size `size`, as plain data; the keys in HF_SIZE_KEYS repeat values of `size`.

    block_pad_token  for a Block Transformer without a start context that was trained with random padding
                     (data.block_padding): the token that fills its first block from the left. None: the first block of
                     a text is not predicted, and a prompt has at least one block

    Raises ValueError where the layout is impossible or a key contradicts `size`.
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
        for key, hf_key in HF_SIZE_KEYS.items():
            value = getattr(model.size, key)
            repeated = kwargs.pop(hf_key, value)
            if repeated != value:
                raise ValueError(f"{hf_key} is {repeated!r} and size.{key} is {value!r}; they must be the same")
            setattr(self, hf_key, value)
        super().__init__(**kwargs)
