"""The files of a checkpoint: how they are written, and that forged ones are refused alike wherever they are read."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from data.files import sha256
from train import checkpoint, tensor_pieces
from train.errors import TrainingError
from train.tensor_pieces import NewPiece, write_file


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Linear(4, 3)
    folder = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.save(folder, model, stepped(model), 1, {})
    return folder


def test_a_file_is_what_the_library_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts smaller than a row, whole ones, transposed, empty and without dimensions, of every type."""
    monkeypatch.setattr(tensor_pieces, "PART_BYTES", 40)
    tensors = {
        "matrix": torch.randn(7, 13, dtype=torch.float64),
        "transposed": torch.randn(5, 6).T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(9).bfloat16(),
        "int": torch.arange(6).reshape(2, 3)[:, 1:],
    }
    pieces = {name: NewPiece(tensor.dtype, tensor.shape, ()) for name, tensor in tensors.items()}
    path = tmp_path / "a.safetensors"
    described = write_file(path, pieces, tensors.values(), {"format": "pt"})
    assert described == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_a_checkpoint_has_the_format_of_earlier_versions(saved: Path) -> None:
    (path,) = saved.glob("*.safetensors")
    assert path.name == "shard-00001-model-00001-of-00001.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"DCP_SHARDING_INFO", "DCP_VERSION", "format"}
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        assert places["model.weight"] == {"saved_offsets": [0, 0]}
        assert places["optimizer.step.bias"] == {"saved_offsets": []}
    assert load_file(path).keys() == places.keys()


def peak() -> int:
    """Largest resident memory since the last call, in bytes."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
def test_saving_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_pieces, "PART_BYTES", 2**20)
    model = nn.Linear(2**12, 2**12, bias=False)  # 64 MiB
    optimizer = torch.optim.SGD(model.parameters())
    peak()
    before = peak()
    checkpoint.save(tmp_path / "step-00000001", model, optimizer, 1, {})
    assert peak() - before < 16 * 2**20


def forge(folder: Path, info: object = None, **more: torch.Tensor) -> None:
    """Other metadata, with the checksum that belongs to it."""
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    text = info if isinstance(info, str) else json.dumps(info)
    metadata = metadata if info is None else metadata | {"DCP_SHARDING_INFO": text}
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in more.items()}, path, metadata)
    about = json.loads((folder / "checkpoint.json").read_text())
    about["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}}
    (folder / "checkpoint.json").write_text(json.dumps(about))


def places(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["DCP_SHARDING_INFO"])


WEIGHT = "model.weight"
FORGERIES: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda folder: forge(folder, "{"),
    "nested": lambda folder: forge(folder, "[" * 200_000),
    "list": lambda folder: forge(folder, []),
    "number": lambda folder: forge(folder, 5),
    "key missing": lambda folder: forge(folder, {key: at for key, at in places(folder).items() if key != WEIGHT}),
    "no offsets": lambda folder: forge(folder, places(folder) | {WEIGHT: {}}),
    "text": lambda folder: forge(folder, places(folder) | {WEIGHT: {"saved_offsets": "00"}}),
    "text in a list": lambda folder: forge(folder, places(folder) | {WEIGHT: {"saved_offsets": ["0", "0"]}}),
    "floats": lambda folder: forge(folder, places(folder) | {WEIGHT: {"saved_offsets": [0.0, 0.0]}}),
    "negative": lambda folder: forge(folder, places(folder) | {WEIGHT: {"saved_offsets": [-1, 0]}}),
    "far away": lambda folder: forge(folder, places(folder) | {WEIGHT: {"saved_offsets": [2**62, 0]}}),
    "columns": lambda folder: forge(folder, places(folder) | {WEIGHT: {"saved_offsets": [0, 1]}}),
    "too few": lambda folder: forge(folder, places(folder) | {WEIGHT: {"saved_offsets": [0]}}),
    "one tensor more": lambda folder: forge(folder, places(folder) | {"x": {"saved_offsets": [0]}}, x=torch.ones(1)),
    "files is a list": lambda folder: edit(folder, files=["a.safetensors"]),
    "files is a pair": lambda folder: edit(folder, files=["ab"]),
}


def edit(folder: Path, **changes: object) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_refused_before_it_is_used(name: str, saved: Path) -> None:
    """In one line, as broken: `resume=` falls back to the checkpoint before, `init=` and export name it."""
    FORGERIES[name](saved)
    with pytest.raises(TrainingError) as refused:
        checkpoint.resolve(saved)
    assert str(saved) in str(refused.value) or WEIGHT in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 1000
    with pytest.raises(TrainingError, match="every checkpoint is broken"):
        checkpoint.latest_valid(saved.parent.parent)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer__step": torch.ones(1)}, r"it has optimizer\.step \[1\]"),
        ({"optimizer__exp_avg__other": torch.ones(1)}, r"it has optimizer\.exp_avg\.other \[1\]"),
        ({"model__other": torch.ones(1)}, r"is of another model: model\.other there only"),
        ({"optimizer__exp_avg__weight": torch.ones(4, 3)}, r"it has optimizer\.exp_avg\.weight \[4, 3\]"),
    ],
)
def test_tensors_of_another_model_are_refused_on_loading(
    more: dict[str, torch.Tensor], message: str, saved: Path
) -> None:
    known = {name: at for name, at in places(saved).items() if name != "optimizer.exp_avg.weight"}
    every = {name.replace("__", "."): {"saved_offsets": [0] * tensor.ndim} for name, tensor in more.items()}
    forge(saved, {"optimizer.exp_avg.weight": {"saved_offsets": [0, 0]}} | known | every, **more)
    model = nn.Linear(4, 3)
    with pytest.raises(TrainingError, match=message):
        checkpoint.load(saved, model, torch.optim.AdamW(model.parameters()))


def test_a_folder_that_cannot_be_read_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"x{300} cannot be read \(File name too long\)"):
        checkpoint.resolve(Path("x" * 300))

    def private(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", private)
    with pytest.raises(TrainingError, match=r"cannot be read \(Permission denied\)"):
        checkpoint.resolve(saved)
    with pytest.raises(TrainingError, match=r"every checkpoint is broken: .*Permission denied"):
        checkpoint.latest_valid(saved.parent.parent)
