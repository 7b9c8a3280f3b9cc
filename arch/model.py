"""The model of a configuration. Whoever trains, counts or serves asks here, and names neither kind."""

from .block_transformer import BlockTransformer
from .config import ModelConfig
from .decoder import Decoder

LanguageModel = Decoder | BlockTransformer


def build(config: ModelConfig, backend: str = "auto", device_type: str = "cpu") -> LanguageModel:
    """A decoder, or with `arch.block` a Block Transformer; parameters are uninitialised until `init_weights`.

    Raises LayoutError where the layout is impossible, ValueError where the attention backend cannot run it.
    """
    kind = Decoder if config.arch.block is None else BlockTransformer
    return kind(config, backend, device_type)
