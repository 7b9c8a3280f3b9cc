"""Language models whose KV layout is written once and read by everything: `arch.build("cla2", "tiny")`.

Layouts, plans and counts come without torch; the models, and torch with them, when the first of them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .block_plan import BlockPlan, Plan, plan_from_dict, resolve
from .config import (
    ArchConfig,
    BlockConfig,
    EncoderConfig,
    LatentConfig,
    MatrixConfig,
    ModelConfig,
    SizeConfig,
    StoreConfig,
    TokenDecoderConfig,
    from_dict,
)
from .footprint import (
    KVBytes,
    allocated_bytes,
    forward_flops,
    kv_bytes,
    max_batch,
    num_params,
    train_flops_per_token,
)
from .named import load_arch, load_size, model_config, names
from .plan import KVPlan, StackPlan
from .store_spec import LayoutError, SlotShape, StoreSpec

if TYPE_CHECKING:
    from .block_transformer import BlockTransformer, allocate_blocks
    from .cache import Cache, allocate
    from .decoder import Decoder
    from .generation import generate
    from .language_model import LanguageModel
    from .model import build

__all__ = [
    "ArchConfig",
    "BlockConfig",
    "BlockPlan",
    "BlockTransformer",
    "Cache",
    "Decoder",
    "EncoderConfig",
    "KVBytes",
    "KVPlan",
    "LanguageModel",
    "LatentConfig",
    "LayoutError",
    "MatrixConfig",
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
    "allocated_bytes",
    "build",
    "forward_flops",
    "from_dict",
    "generate",
    "kv_bytes",
    "load_arch",
    "load_size",
    "max_batch",
    "model_config",
    "names",
    "num_params",
    "plan_from_dict",
    "resolve",
    "train_flops_per_token",
]

# The module of each name that needs torch.
_MODULES = {
    "BlockTransformer": "block_transformer",
    "Cache": "cache",
    "Decoder": "decoder",
    "LanguageModel": "language_model",
    "allocate": "cache",
    "allocate_blocks": "block_transformer",
    "build": "model",
    "generate": "generation",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
