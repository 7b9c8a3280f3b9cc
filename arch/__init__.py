"""Decoder-only language models whose KV layout is written once and read by everything."""

from .cache import Cache, allocate
from .config import ArchConfig, LatentConfig, ModelConfig, SizeConfig, StoreConfig, from_dict
from .decoder import Decoder
from .generate import generate
from .plan import KVPlan, LayoutError, Slot, Store, resolve

__all__ = [
    "ArchConfig",
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
    "allocate",
    "from_dict",
    "generate",
    "resolve",
]
