"""One of two gloo processes, by rank and the file that joins them: gradients of every kind of block under DDP and under
FSDP2, with and without activation checkpointing, against those of one process."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import torch.distributed as dist
from conftest import ARCHS, BLOCKS, build, covering, small, tokens, whole_depth
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import arch
from train.parallel import parallelize


def backward(model: torch.nn.Module, batch: torch.Tensor, blocks: bool) -> None:
    """Of the last 16 of 17 tokens, which a Block Transformer with a start context predicts too, from themselves."""
    logits = model(batch[:, 1:] if blocks else batch[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()


def compare(name: str, how: str, model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(
            full, expected[key.removeprefix("module.")], rtol=1e-4, atol=1e-6, msg=f"{name} {how} {key}"
        )


def main() -> None:
    rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    layouts = covering(ARCHS)
    for name in layouts:
        config, batch, blocks = small(name, num_layers=whole_depth(name, 3)), tokens(2, 17), name in BLOCKS
        model = build(config, torch.float32).train()
        backward(model, batch, blocks)
        expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
        weights = {key: value.clone() for key, value in model.state_dict().items()}

        model.zero_grad()
        ddp = DistributedDataParallel(model)
        backward(ddp, batch[rank : rank + 1], blocks)
        compare(name, "ddp", ddp, expected)

        with torch.device("meta"):
            sharded = arch.build(config)
        parallelize(sharded, activation_checkpointing=False, compile_blocks=False, mesh=mesh, dtype=torch.float32)
        sharded.to_empty(device="cpu")
        sharded.init_weights(seed=1)
        for key, parameter in sharded.named_parameters():
            assert torch.equal(parameter.full_tensor(), weights[key]), f"{name}: {key} depends on the sharding"
        for checkpointing in (False, True):
            for stack in sharded.stacks:
                stack.activation_checkpointing = checkpointing
            sharded.zero_grad()
            backward(sharded, batch[rank : rank + 1], blocks)
            compare(name, f"fsdp, activation checkpointing {checkpointing}", sharded, expected)
    print(f"{len(layouts)} layouts agree")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
