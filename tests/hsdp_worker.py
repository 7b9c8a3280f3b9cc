"""One of four gloo processes, by rank and a folder of their own: a model sharded within each of two replicas against
one process. Gradients, their norm, steps of Muon and AdamW, and checkpoints from and for other worlds."""

import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import torch.distributed as dist
from conftest import small, tokens
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import arch
from train.checkpoint import BackgroundSave, load, named_tensors, save, stored_tensors, verify_checksums
from train.errors import TrainingError
from train.optim import build_optimizer
from train.parallel import hybrid_mesh, parallelize
from train.schema import OptimConfig

CONFIG = small("cla2", num_layers=2)
OPTIM = OptimConfig(name="muon", lr=1e-2)
torch.Tensor.bfloat16 = torch.Tensor.float  # in which Muon orthogonalises: rounding would hide all else


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{where}: {name}"


class Training:
    """A model and its optimizer, on all processes of `mesh` or, without one, on this process alone."""

    def __init__(self, mesh: DeviceMesh | None):
        self.mesh = mesh
        with torch.device("meta"):
            self.model = arch.build(CONFIG)
        parallelize(self.model, activation_checkpointing=False, compile_blocks=False, mesh=mesh, dtype=torch.float32)
        self.model.to_empty(device="cpu")
        self.model.init_weights(seed=1)
        self.optimizer = build_optimizer(self.model, OPTIM)

    def step(self, batch: Tensor) -> Tensor:
        """Step on `batch` [8, T]: with a mesh, each process takes two sequences, one after the other. Return the norm
        of the gradients before they are clipped."""
        parts = [batch] if self.mesh is None else batch.view(4, 2, 1, -1)[dist.get_rank()]
        self.optimizer.zero_grad()
        for number, part in enumerate(parts):
            if self.mesh is not None:
                self.model.set_requires_gradient_sync(number + 1 == len(parts))
            logits = self.model(part[:, :-1])
            (F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / len(parts)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        return full(norm)

    def tensors(self) -> dict[str, Tensor]:
        return {name: full(value) for name, value in named_tensors(self.model, self.optimizer).items()}


def in_background(saved: Path, training: Training) -> None:
    """A thread of each process writes what `save` has written to `saved`; where one cannot, none does."""
    group, copies = dist.new_group(backend="gloo"), {}
    folder = saved.parents[1] / "background" / "checkpoints" / saved.name
    state = folder, training.model, training.optimizer, 1, {}
    full = patch("train.checkpoint.write_file", side_effect=OSError(28, "No space left on device"))
    for broken in (True, False):
        with full if broken and dist.get_rank() == 2 else nullcontext():
            writing = BackgroundSave(*state, copies, group)
            dist.all_reduce(torch.ones(1))  # training goes on
            problem = ""
            try:
                writing.wait()
            except TrainingError as error:
                problem = str(error)
        assert problem == (f"cannot save {folder}: [Errno 28] No space left on device" if broken else "")
        dist.barrier()  # all have deleted what there was
        if dist.get_rank() == 0:
            assert [path.name for path in folder.parent.iterdir()] == ([] if broken else [folder.name])
    for path in saved.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 4), rank=rank, world_size=4)
    batches = tokens(16, 17).view(2, 8, 17)
    alone, replicated = Training(None), Training(hybrid_mesh("cpu", 2))
    parameter = next(replicated.model.parameters())
    assert parameter.to_local().numel() == parameter.numel() // 2, "half of the parameters in each of two processes"
    norms = [training.step(batches[0]) for training in (alone, replicated)]
    torch.testing.assert_close(norms[1], norms[0])
    for (name, one), other in zip(alone.model.named_parameters(), replicated.model.parameters(), strict=True):
        torch.testing.assert_close(full(other.grad), one.grad, rtol=1e-4, atol=1e-6, msg=name)

    saved = folder / "checkpoints" / "step-00000001"
    save(saved, replicated.model, replicated.optimizer, 1, {})
    verify_checksums(saved)
    in_background(saved, replicated)
    sizes = {name: tuple(value.shape) for name, value in alone.tensors().items()}
    assert {name: stored.shape for name, stored in stored_tensors(saved).items()} == sizes, "each row once"
    others = {"fsdp": Training(init_device_mesh("cpu", (4,))), "one process, or ddp": Training(None)}
    for number, (name, other) in enumerate(others.items(), start=2):
        expected = replicated.tensors()
        load(saved, other.model, other.optimizer)
        same(other.tensors(), expected, f"to {name}")
        back = saved.with_name(f"step-{number:08}")
        save(back, other.model, other.optimizer, number, {})
        again = Training(replicated.mesh)
        load(back, again.model, again.optimizer)
        same(again.tensors(), expected, f"from {name}")

    for training in (alone, again):
        training.step(batches[1])
    expected, found = alone.tensors(), again.tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    print("replicas agree")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
