"""Language models whose KV layout is written once and read by everything."""

from .block_generate import generate_blocks
from .block_plan import BlockPlan, Plan, plan_from_dict, resolve
from .block_transformer import BlockTransformer, allocate_blocks
from .cache import Cache, allocate
from .config import (
    ArchConfig,
    BlockConfig,
    EncoderConfig,
    LatentConfig,
    ModelConfig,
    SizeConfig,
    StoreConfig,
    TokenDecoderConfig,
    from_dict,
)
from .decoder import Decoder
from .generate import generate
from .model import LanguageModel, build
from .plan import KVPlan, LayoutError, SlotShape, StackPlan, StoreSpec

__all__ = [
    "ArchConfig",
    "BlockConfig",
    "BlockPlan",
    "BlockTransformer",
    "Cache",
    "Decoder",
    "EncoderConfig",
    "KVPlan",
    "LanguageModel",
    "LatentConfig",
    "LayoutError",
    "ModelConfig",
    "Plan",
    "SizeConfig",
    "SlotShape",
    "StackPlan",
    "StoreConfig",
    "StoreSpec",
    "TokenDecoderConfig",
    "allocate",
    "allocate_blocks",
    "build",
    "from_dict",
    "generate",
    "generate_blocks",
    "plan_from_dict",
    "resolve",
]
