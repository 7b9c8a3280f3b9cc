"""Decoder-only language models whose KV layout is written once and read by everything."""

from .block_generate import generate_blocks
from .block_plan import BlockPlan, resolve_block
from .block_transformer import BlockTransformer
from .cache import Cache, allocate
from .config import (
    ArchConfig,
    BlockConfig,
    LatentConfig,
    ModelConfig,
    SizeConfig,
    StoreConfig,
    TokenDecoderConfig,
    from_dict,
)
from .decoder import Decoder
from .generate import generate
from .plan import KVPlan, LayoutError, Slot, Store, resolve

__all__ = [
    "ArchConfig",
    "BlockConfig",
    "BlockPlan",
    "BlockTransformer",
    "Cache",
    "Decoder",
    "KVPlan",
    "LatentConfig",
    "LayoutError",
    "ModelConfig",
    "SizeConfig",
    "Slot",
    "Store",
    "StoreConfig",
    "TokenDecoderConfig",
    "allocate",
    "from_dict",
    "generate",
    "generate_blocks",
    "resolve",
    "resolve_block",
]
