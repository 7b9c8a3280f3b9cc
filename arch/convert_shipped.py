"""To and from a Hugging Face folder that has the files of `arch` with it: every layout, under our own names."""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from .block_plan import resolve
from .config import ModelConfig, from_dict, to_dict
from .convert import SIZES, UnsupportedModelError, Weight
from .footprint import num_params
from .model import build
from .plan import LayoutError

MODEL_TYPE = "kvfrontier_shipped"
ARCHITECTURE = "KVFrontierShippedForCausalLM"
# The files that hold its classes, which import files of `arch`.
FILES = ("configuration_kvfrontier_shipped.py", "modeling_kvfrontier_shipped.py")
AUTO_MAP = {
    "AutoConfig": "configuration_kvfrontier_shipped.KVFrontierShippedConfig",
    "AutoModel": "modeling_kvfrontier_shipped.KVFrontierShippedModel",
    "AutoModelForCausalLM": f"modeling_kvfrontier_shipped.{ARCHITECTURE}",
}
# Keys that say again what the size says, for tools that look for them.
STANDARD = {theirs: ours for ours, theirs in SIZES.items() if ours not in ("norm_eps", "init_std")}
PREFIX = "model."
# Of what somebody else wrote: an item of a pattern, and all that it comes to.
MOST_REPEATS = 10_000
MOST_PARAMS = 2**44


def shipped_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model of `config` that is shipped with its code.

    It names no tensor type and no special token. Raises LayoutError where the layout is impossible.
    """
    resolve(config)
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config.size, ours) for theirs, ours in STANDARD.items()},
        **to_dict(config),
        "block_pad_token": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def shipped_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that `hf`, such a config.json, describes; `shipped_config` gives it back.

    Raises UnsupportedModelError where keys are missing, say what cannot be, or contradict each other; LayoutError where
    the layout is impossible.
    """
    parts = {key: hf.get(key) for key in ("arch", "size")}
    missing = [f"{key} is missing; it must be a mapping" for key, part in parts.items() if not isinstance(part, dict)]
    if missing:
        raise UnsupportedModelError(missing)
    repeats = re.findall(r"\sx(\d+)", json.dumps(hf["arch"]))
    if any(len(number) > 9 or int(number) > MOST_REPEATS for number in repeats):
        raise UnsupportedModelError([f"arch.pattern repeats an item more than {MOST_REPEATS:,} times"])
    try:
        config = from_dict(ModelConfig, parts)
        again = {theirs: getattr(config.size, ours) for theirs, ours in STANDARD.items()}
        wrong = [f"{key} is {hf.get(key)!r}; size says {own!r}" for key, own in again.items() if hf.get(key) != own]
        if wrong:
            raise UnsupportedModelError(wrong)
        params = num_params(config, resolve(config))
    except (LayoutError, UnsupportedModelError):
        raise
    except (TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise UnsupportedModelError([f"arch and size describe no model: {error}"]) from error
    if params > MOST_PARAMS:
        raise UnsupportedModelError(
            [f"arch and size describe a model of {params:.1e} parameters; there is none that large"]
        )
    return config


def shipped_weights(config: ModelConfig) -> list[Weight]:
    """Every weight of a model of `config`; theirs are ours."""
    with torch.device("meta"):
        parameters = build(config).named_parameters()
    return [Weight(name, f"{PREFIX}{name}", parameter.shape) for name, parameter in parameters]
