"""A Hugging Face checkpoint on disk: config.json, and safetensors in one file or in several with an index.

Nothing in it is executed, nothing outside the folder is read, and whatever is malformed is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data.cli import UsageError
from train.checkpoint import refuse_adapter
from train.hub.tensor_files import SafetensorsReader
from train.tensor_pieces import Piece, StoredTensor, open_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
DOWNLOAD_PATTERNS = ["config.json", INDEX, "*.safetensors", *TOKENIZER_FILES, "adapter_config.json"]


class HFFolder(SafetensorsReader):
    """The tensors of a Hugging Face checkpoint, a TensorReader; `config` is its config.json.

    Its types are those whose every value fp32 holds exactly. Raises UsageError, on opening and on reading, with the
    file or the tensor that is malformed.
    """

    error = UsageError

    def __init__(self, folder: Path):
        refuse_adapter(folder)
        refuse_links(folder)
        self.config = _read_json(folder / "config.json")
        tensors: dict[str, StoredTensor] = {}
        for file, names in _listed_files(folder).items():
            tensors |= _tensors_of_file(folder / file, names)
        super().__init__(folder, tensors)


def refuse_links(folder: Path) -> None:
    """Raise UsageError if a file that may be read is a link out of `folder`; those of the hub's cache lead to its
    blobs."""
    real = folder.resolve()
    allowed = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise UsageError(
                f"{path} is a link out of the folder, to {path.resolve()}; put the file itself there, where you trust "
                "who made the folder"
            )


def _listed_files(folder: Path) -> dict[str, set[str] | None]:
    """Return the files, and the tensors that the index lists for each; None if there is no index."""
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return {SINGLE: None}
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise UsageError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can execute code when it is read; "
                "where you trust it, convert it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise UsageError(f"{folder} has neither {SINGLE} nor {INDEX}")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{folder / INDEX}: weight_map is missing; it names the file of each tensor")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UsageError(f"{folder / INDEX}: {name} is in {file!r}; it must be a .safetensors file beside it")
        names = files.setdefault(file, set())
        assert names is not None
        names.add(name)
    if (folder / SINGLE).exists() and set(files) != {SINGLE}:  # save_pretrained leaves files of the other kind
        if not any((folder / file).exists() for file in files):
            return {SINGLE: None}
        raise UsageError(
            f"{folder} has {SINGLE}, and an {INDEX} of other files: one of them is left of an earlier saving. "
            f"transformers reads {SINGLE}; remove the one that is not meant"
        )
    return files


def _tensors_of_file(path: Path, listed: set[str] | None) -> dict[str, StoredTensor]:
    try:
        with open_file(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({error}); it may be truncated: copy it again") from error
    for name in sorted(set(shapes) ^ (set(shapes) if listed is None else listed)):
        present, indexed = ("is", "and not") if name in shapes else ("is not", "but")
        raise UsageError(f"{path}: {name} {present} in it, {indexed} in {INDEX}")
    return {name: StoredTensor(shape, (Piece(path, 0, shape),)) for name, shape in shapes.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; give the folder that save_pretrained wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no mapping")
    return values
