"""Released models: the KV plan that a config.json of the Hugging Face hub describes, without torch or transformers.

Bytes are those of the architecture, which transformers' caches agree with but for two things: a window counts the
current position, so that `window` positions are figured, of which transformers keeps `window - 1` between steps; and of
what an implementation expands before it caches (Falcon-40B's 8 heads to 128), what is expanded. A convolution keeps as
many positions as its kernel is long. What a state sums up over all positions has at least fp32, as in stores of ours.
Of a model that also sees or hears, the language model is figured alone; so are its own layers without those that
predict further tokens (MTP). Memory of the experts, of routing and of prompts of images is no cache.

Nothing is guessed: an unknown `model_type`, a key that may decide what is cached and is not understood, and keys that
contradict each other are refused by name. Where a config.json leaves a key out, its value is transformers' default.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arch import KVPlan
from arch.named import CONFIGS
from data.cli import did_you_mean
from eval.released.defaults import DEFAULTS
from eval.released.keys import Keys, ReleasedError, shown
from eval.released.rules import TEXT_TYPES, TYPES, UNFIGURED
from eval.released.stores import Layer, assemble

FOLDER = CONFIGS / "released"


@dataclass(frozen=True)
class Released:
    """A released model: its name, where its configuration was read, and the plan of its cache.

    others  layers that cache nothing, as the MLPs that Nemotron-H counts as layers
    """

    name: str
    model_type: str
    source: str
    plan: KVPlan
    others: int = 0


def released(config: Any, name: str) -> Released:
    """The model that the contents of a config.json describe. Raises ReleasedError; messages call it `name`."""
    if not isinstance(config, dict):
        raise ReleasedError(f"{name}: a config.json is an object of keys, not {type(config).__name__}")
    text = config.get("text_config")
    values = text if isinstance(text, dict) else config
    whole = config.get("model_type")
    kind = values.get("model_type") or (TEXT_TYPES.get(whole) if isinstance(whole, str) else None)
    kind = TEXT_TYPES.get(kind, kind) if isinstance(kind, str) else None
    if kind is None:
        raise ReleasedError(f"{name}: model_type is missing; it says how the other keys are to be read")
    if kind in UNFIGURED:
        raise ReleasedError(f"{name}: model_type {kind} is not figured: {UNFIGURED[kind]}")
    if kind not in TYPES:
        known = ", ".join(sorted(TYPES))
        raise ReleasedError(
            f"{name}: model_type {shown(kind)} is not understood{did_you_mean(kind, list(TYPES))} Known: {known}"
        )
    rule, names = TYPES[kind]
    keys = Keys(f"{name} ({kind})", values, DEFAULTS.get(kind, {}), names)
    layers: Sequence[Layer | None] = rule(keys)
    if unread := keys.leftovers():
        raise keys.refuse(
            unread[0], f"is {values[unread[0]]!r:.60}; it may decide what is cached, and is not understood"
        )
    caching = [layer for layer in layers if layer is not None]
    source = str(config.get("_source", name))
    return Released(name, kind, source, assemble(caching), len(layers) - len(caching))


def released_names() -> list[str]:
    """Names of the models whose configuration is in this repository, without what decides no byte of the cache."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(given: str) -> Released:
    """The model of a config.json, of a folder with one, of one of `released_names()`, or of a repository of the hub.

    Raises ReleasedError if there is none, if it cannot be read, and if its cache cannot be figured.
    """
    path = Path(given)
    if given in released_names():
        return released(_read(FOLDER / f"{given}.json"), given)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ReleasedError(f"{given} has no config.json; give the folder of a model, or the file itself")
        return released(_read(path / "config.json"), given)
    if path.is_file():
        return released(_read(path), given)
    if path.suffix == ".json" or not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        near = did_you_mean(given, released_names())
        raise ReleasedError(
            f"there is no {given}{near} Give a config.json, a folder with one, a hub name as Qwen/Qwen3-8B, or one of "
            f"{', '.join(released_names())}"
        )
    return released(_read(_of_hub(given)), given)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no JSON: {error}"
        raise ReleasedError(f"{path} cannot be read ({reason}); give a model's config.json") from error


def _of_hub(name: str) -> Path:
    """The config.json of a repository: as the hub's cache has it, or else downloaded. No code of it is run."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "config.json"))
    except HFValidationError as error:
        raise ReleasedError(f"{name} is no name of the hub ({error})") from error
    except Exception as error:  # of the HTTP client: which ones is its own affair
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReleasedError(
            f"{name} is not in the hub's cache on this machine, and cannot be had from the network ({reason:.160}); "
            "download its config.json and give the file"
        ) from error
