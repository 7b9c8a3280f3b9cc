"""Building the model of a configuration."""

from .block_transformer import BlockTransformer
from .config import ModelConfig
from .decoder import Decoder
from .language_model import LanguageModel


def build(config: ModelConfig, backend: str = "auto", device_type: str = "cpu") -> LanguageModel:
    """Build a decoder, or with `arch.block` a Block Transformer; parameters are uninitialised until `init_weights`.

    Raises LayoutError where the layout is impossible, ValueError where the attention backend cannot run it.
    """
    model = Decoder if config.arch.block is None else BlockTransformer
    return model(config, backend, device_type)
