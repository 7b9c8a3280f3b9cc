"""Hugging Face folders that carry the files of `arch`: every layout, under our own names."""

import json
import re
from collections.abc import Mapping
from typing import Any

from .block_plan import resolve
from .config import HF_SIZE_KEYS, ModelConfig, from_dict, to_dict
from .convert import NO_SPECIAL_TOKENS, UnsupportedModelError, Weight, parameter_shapes
from .footprint import num_params
from .store_spec import LayoutError

MODEL_TYPE = "kvfrontier_shipped"
ARCHITECTURE = "KVFrontierShippedForCausalLM"
# The files of train/hf that define its classes; they import files of `arch`.
FILES = (
    "configuration_kvfrontier_shipped.py",
    "modeling_kvfrontier_shipped.py",
    "generation_kvfrontier_shipped.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_kvfrontier_shipped.KVFrontierShippedConfig",
    "AutoModel": "modeling_kvfrontier_shipped.KVFrontierShippedModel",
    "AutoModelForCausalLM": f"modeling_kvfrontier_shipped.{ARCHITECTURE}",
}
PREFIX = "model."
# Limits on a config.json of unknown origin: larger counts describe no model, and would take unbounded time to expand.
MAX_REPEATS = 10_000
MAX_PARAMS = 2**44


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model of `config` that is shipped with its code; it repeats HF_SIZE_KEYS of the size.

    It names no tensor type and no special token. Raises LayoutError if the layout is impossible.
    """
    resolve(config)
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        **{hf_key: getattr(config.size, key) for key, hf_key in HF_SIZE_KEYS.items()},
        **to_dict(config),
        "block_pad_token": None,
        **NO_SPECIAL_TOKENS,
    }


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the model that `hf`, such a config.json, describes; the inverse of `to_hf_config`.

    Raises UnsupportedModelError if keys are missing, have an impossible value or contradict each other, and
    LayoutError if the layout is impossible.
    """
    parts = {key: hf.get(key) for key in ("arch", "size")}
    missing = [f"{key} is missing; it must be a mapping" for key, part in parts.items() if not isinstance(part, dict)]
    if missing:
        raise UnsupportedModelError(missing)
    repeats = re.findall(r"\sx(\d+)", json.dumps(hf["arch"]))
    if any(len(number) > 9 or int(number) > MAX_REPEATS for number in repeats):
        raise UnsupportedModelError([f"arch.pattern repeats an item more than {MAX_REPEATS:,} times"])
    try:
        config = from_dict(ModelConfig, parts)
        repeated = {hf_key: getattr(config.size, key) for key, hf_key in HF_SIZE_KEYS.items()}
        contradictions = [
            f"{key} is {hf.get(key)!r}; size says {value!r}" for key, value in repeated.items() if hf.get(key) != value
        ]
        if contradictions:
            raise UnsupportedModelError(contradictions)
        params = num_params(config, resolve(config))
    except (LayoutError, UnsupportedModelError):
        raise
    except (TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise UnsupportedModelError([f"arch and size describe no model: {error}"]) from error
    if params > MAX_PARAMS:
        raise UnsupportedModelError(
            [f"arch and size describe a model of {params:.1e} parameters; there is none that large"]
        )
    return config


def weights(config: ModelConfig, hf: Mapping[str, Any]) -> list[Weight]:
    """Every parameter of a model of `config`; only the prefix differs there."""
    return [Weight(name, f"{PREFIX}{name}", shape) for name, shape in parameter_shapes(config).items()]
