"""Activation checkpointing, compilation and sharding of a model, applied in this order."""

import warnings

import einops
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from arch import LanguageModel


def keep_einops_whole() -> None:
    """Let torch's compiler record einops' functions as operators.

    It would trace their parsing of patterns in Python, which is four fifths of the time that tracing a block takes.
    """
    for function in (einops.rearrange, einops.repeat):
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]


def hybrid_mesh(device_type: str, replicas: int) -> DeviceMesh:
    """Divide all processes into `replicas` groups of consecutive ranks. FSDP2 shards within one, and averages gradients
    across the processes of equal place in all of them.
    """
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(
    model: LanguageModel,
    *,
    activation_checkpointing: bool,
    compile_blocks: bool,
    mesh: DeviceMesh | None,
    dtype: torch.dtype,
) -> None:
    """Change `model` in place. With a mesh, FSDP2 shards each block, then the rest, as units that compute in `dtype`;
    over the last dimension of one that has two.

    Keys and values cross blocks as arguments and results, so a unit is one layer, and sharing them between layers adds
    no communication. Inputs are not cast: rotary tables stay fp32, and the embedding already produces `dtype`.
    """
    blocks: list[nn.Module] = []
    norms: list[nn.Module] = []
    for stack in model.stacks:
        assert isinstance(stack.layers, nn.ModuleList) and isinstance(stack.norm, nn.Module)
        blocks += stack.layers
        norms.append(stack.norm)
        stack.activation_checkpointing = activation_checkpointing  # type: ignore[assignment]
    if compile_blocks:
        # All blocks share one code object: each kind of block, with and without gradients, is one more variant of it.
        # Past the limit torch would go on uncompiled and say nothing, hence the error.
        torch._dynamo.reset()
        keep_einops_whole()
        torch._dynamo.config.recompile_limit = 128
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Or matrix products that the forward pass keeps in fp32 would have gradients of bf16 operands.
        torch._functorch.config.backward_pass_autocast = "off"
        # Or DDP would have each block cut into graphs of one bucket each, and none with FlexAttention in it.
        torch._dynamo.config.optimize_ddp = False
        # The shapes of one stack never change. Those of a second one torch would take for a change, and make the code
        # of both for shapes that vary.
        dynamic = False if len(model.stacks) > 1 else None
        for module in blocks + norms:
            module.compile(dynamic=dynamic)
    if mesh is not None:
        # Values leave a block as views, which nothing changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
