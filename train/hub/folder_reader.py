"""A Hugging Face checkpoint on disk: config.json, and safetensors in one file or in several with an index.

Nothing in it is executed, nothing outside the folder is read, and what is malformed is refused by name.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.cli import UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # fp32 holds the values of each exactly
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
PATTERNS = ["config.json", INDEX, "*.safetensors", *TOKENIZER]


class HFFolder:
    """Shapes of all tensors at once, and values one by one; a context manager, which holds the files open.

    config  what config.json says
    shapes  of every tensor, by name

    Raises UsageError, on opening and on reading, with the file or the tensor that is not what it must be.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _json(path / "config.json")
        self.shapes: dict[str, list[int]] = {}
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        try:
            for file, names in self._listed().items():
                self._open(file, names)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> "HFFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def get(self, name: str) -> Tensor:
        """The tensor `name`, in the type it has there, one of DTYPES."""
        try:
            tensor: Tensor = self._where[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{self.path}: {name} cannot be read ({error})") from error
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise UsageError(f"{self.path}: {name} has the type {tensor.dtype}; it must be one of {known}")
        if not tensor.isfinite().all():
            raise UsageError(f"{self.path}: {name} has values that are not finite")
        return tensor

    def _listed(self) -> dict[str, set[str] | None]:
        """Files, and the tensors that the index expects in each; None: whichever are there."""
        if not (self.path / INDEX).exists():
            if (self.path / SINGLE).exists():
                return {SINGLE: None}
            pickles = sorted(path.name for path in self.path.glob("*.bin"))
            if pickles:
                raise UsageError(
                    f"{self.path} has its weights in {pickles[0]}, a pickle, which can execute code when it is read; "
                    "where you trust it, convert it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
                )
            raise UsageError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        weights = _json(self.path / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise UsageError(f"{self.path / INDEX}: weight_map is missing; it names the file of each tensor")
        files: dict[str, set[str] | None] = {}
        for name, file in weights.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise UsageError(
                    f"{self.path / INDEX}: {name} is in {file!r}; it must be a .safetensors file beside it"
                )
            names = files.setdefault(file, set())
            assert names is not None
            names.add(name)
        return files

    def _open(self, file: str, expected: set[str] | None) -> None:
        path = self.path / file
        try:
            handle = self._files.enter_context(safe_open(path, framework="pt"))
            shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118  no mapping
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} cannot be read ({error}); it may be truncated: copy it again") from error
        for name in sorted(set(shapes) ^ (set(shapes) if expected is None else expected)):
            there, listed = ("is", "and not") if name in shapes else ("is not", "but")
            raise UsageError(f"{path}: {name} {there} in it, {listed} in {INDEX}")
        self.shapes |= shapes
        self._where |= dict.fromkeys(shapes, handle)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; give the folder that save_pretrained wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no mapping")
    return values
