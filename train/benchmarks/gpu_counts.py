"""Kernels, bytes and FLOPs of each layout on an H100, counted without one: `python train/benchmarks/gpu_counts.py`.

A micro-step of training at the size 1b, and a decoded token, as train/benchmarks/gpu_code.py compiles them. From these
counts and assumed rates follows a roof: the time that a micro-step takes at least. Writes counts.json and README.md
into docs/results/gpu-counts. Needs torch's CUDA build, but for `toy=true`, which counts operators at a small size on
the CPU and writes operators.json: a test keeps them from growing.
"""

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()
    import train  # noqa: F401  before torch

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from arch import ModelConfig, build, resolve
from arch.footprint import num_params, train_flops_per_token
from arch.masks import BLOCK
from arch.named import names
from arch.spans import visible_pairs
from data.cli import UsageError, did_you_mean, fail, parse
from eval.environment import ROOT, git_revision
from eval.outcome import run_script
from eval.results import write_result
from train.benchmarks.gpu_case import MEASURED, Options, case_config
from train.benchmarks.gpu_code import (
    DEVICE,
    Assembled,
    Compiler,
    Lowered,
    Meta,
    Products,
    Workshop,
    always,
    as_on_an_h100,
    in_tf32,
    left_factor,
    onto,
    product,
    unavailable_reason,
)
from train.benchmarks.gpu_counts_report import BLOCK_GOAL, BOUNDED_GOAL, MASKED_GOAL, PLAIN_GOAL, report
from train.estimates.activations import Execution
from train.estimates.memory import step_memory
from train.loss import cross_entropy_sum
from train.parallel import parallelize

OUT = ROOT / "docs" / "results" / "gpu-counts"
SIZE = "1b"
MICRO_BATCH = 16
ACCUMULATE = 64  # micro-steps of an optimizer step
MEMORY = 80e9  # bytes of an H100, of which training leaves some
CONTEXT = 4096  # tokens in the cache of a decoded one
# Rates assumed, per second: FLOPs of matrix products in each type, of attention forward and backward, bytes of memory.
RATES = {"bfloat16": 700e12, "float32": 50e12, "tf32": 300e12}
ATTENTION = {"sdpa": (550e12, 430e12), "flex": (380e12, 260e12), "flex_rows": (380e12, 260e12)}
ATTENTION["dense mask"] = (200e12, 120e12)  # the efficient kernel, which computes every pair
WIDE = 0.75  # of these rates where keys are wider than 128
BANDWIDTH = 3.0e12
PEAK = 989.5e12


@dataclass(frozen=True)
class CountsConfig:
    """Options.

    archs  layouts, others that `out` has counts of stay; empty: all of configs/arch, and no others
    steps  training alone: no decoded token, and no kernel is assembled; a tenth of the time
    toy    count operators on the CPU at a small size, with any torch
    out    folder of the results
    """

    archs: tuple[str, ...] = ()
    steps: bool = False
    toy: bool = False
    out: Path = OUT


@dataclass
class PartCost:
    """Cost of one part of a step: launches of kernels, bytes of those that compute no product, and the products."""

    launches: int = 0
    bytes: int = 0
    products: Products = field(default_factory=Counter)

    def add(self, lowered: Lowered, calls: int) -> None:
        self.launches += calls * lowered.launches
        self.bytes += calls * lowered.fused_bytes
        for key, count in lowered.products.items():
            self.products[key] += calls * count

    @property
    def flops(self) -> int:
        return sum(flops * count for (flops, _, _), count in self.products.items())

    @property
    def product_seconds(self) -> float:
        """Seconds of the products at the assumed rates, each bound by its FLOPs or its bytes."""
        return sum(
            count * max(flops / RATES[dtype], size / BANDWIDTH) for (flops, size, dtype), count in self.products.items()
        )


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are called one by one, each of which launches a kernel, by the part of a step."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # the compiler goes on below it

    def __init__(self, compiler: Compiler | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.compiler = compiler
        self.parts: dict[str, PartCost] = {}
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused and computes(func):
            part = self.parts.setdefault("" if self.compiler is None else self.compiler.part, PartCost())
            part.launches += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            if (left := left_factor(func, args)) is not None:
                part.products[product(left, out, in_tf32(func, args))] += 1
            else:
                part.bytes += sum(x.numel() * x.dtype.itemsize for x in tensors)
        return out


def computes(func: Any) -> bool:
    """Tell whether an operator launches a kernel: it makes no view, and more than memory."""
    if isinstance(func, HigherOrderOperator):
        return True
    schema, name = func._schema, func._schema.name.partition("::")[2]
    if name.startswith(("empty", "new_empty", "detach", "_local_scalar", "lift_fresh", "sym_", "is_", "_unsafe_view")):
        return False
    aliases = [out.alias_info for out in schema.returns if out.alias_info is not None]
    return not aliases or any(alias.is_write for alias in aliases)


def micro_batch_that_fits(config: ModelConfig) -> int:
    """The largest power of two up to MICRO_BATCH whose step fits on one H100 by our own estimate; at least 1."""
    plan, how, batch = resolve(config), Execution(accumulate=ACCUMULATE), MICRO_BATCH
    while batch > 1 and step_memory(config, plan, how, batch).total > MEMORY:
        batch //= 2
    return batch


@dataclass
class Step:
    """A micro-step of training, by its parts. `graphs`: of one call each, with the number of calls in a micro-step."""

    parts: dict[str, PartCost]
    graphs: list[tuple[str, int, list[Lowered]]]


def micro_step(
    config: ModelConfig, batch: int, compiler: Compiler, documents: bool = False, device: torch.device = DEVICE
) -> tuple[Any, Callable[[], Tensor]]:
    """A model of fake tensors on `device`, and its forward pass with the loss."""
    with torch.device("meta"):
        model = build(config, device_type="cuda", init=False)
    compiled = device == DEVICE
    parallelize(model, activation_checkpointing=False, compile_blocks=compiled, mesh=None, dtype=torch.bfloat16)
    onto(model, device)
    shape = (batch, config.size.seq_len)
    tokens, targets = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
    ids = torch.empty(shape, dtype=torch.int64, device=device) if documents else None

    def forward() -> Tensor:
        compiler.part = "model"
        with torch.autocast(device.type, dtype=torch.bfloat16):
            head = cross_entropy_sum(model.select_targets(targets), True)

            def loss(*arguments: Tensor) -> Tensor:
                compiler.part = "loss"
                total = head(*arguments)
                compiler.part = "model"
                return total

            out: Tensor = model(tokens, head=loss, segment_ids_BT=ids)
        return out

    return model, forward


def count_step(config: ModelConfig, batch: int, workshop: Workshop, documents: bool = False) -> Step:
    """Count a micro-step; with documents only inside of blocks and of the loss."""
    compiler = Compiler()
    with as_on_an_h100() as mode, compiler.installed():
        _, forward = micro_step(config, batch, compiler, documents)
        forward()  # compiles
        for traced in compiler.graphs.values():
            traced.calls.clear()
        with Operators(compiler) as eager:
            forward()
        ran = [(key, traced, traced.calls.copy()) for key, traced in compiler.graphs.items() if traced.calls]
        known = {key: workshop.lower(key, traced, mode) for key, traced, _ in ran}
        outer = None if documents else count_outer_backward(config, batch, compiler)
    parts: dict[str, PartCost] = {}
    graphs = []
    for key, _, calls in ran:
        for name, count in calls.items():
            graphs.append((name, count, known[key]))
            for lowered in known[key]:
                direction = name if name == "loss" else "backward" if lowered.backward else "forward"
                parts.setdefault(direction, PartCost()).add(lowered, count)
    parts["forward, outside of blocks"] = eager.parts.get("model", PartCost())
    loss, eagerly = parts.setdefault("loss", PartCost()), eager.parts.get("loss", PartCost())
    loss.launches, loss.bytes = loss.launches + eagerly.launches, loss.bytes + eagerly.bytes
    loss.products += eagerly.products
    if outer is not None:
        parts["backward, outside of blocks"] = outer
    return Step(parts, graphs)


def count_outer_backward(config: ModelConfig, batch: int, compiler: Compiler) -> PartCost:
    """The backward pass outside of blocks, with the sums of gradients over micro-steps, on fake tensors of the CPU.

    The second micro-step is counted, since the first has nothing to add to.
    """
    cpu = torch.device("cpu")
    model, forward = micro_step(config, batch, compiler, device=cpu)
    # The CPU has no backward pass of FlexAttention, and none is run here.
    with patch("torch.nn.attention.flex_attention._validate_device", always(None)), Operators() as eager:
        for stack in model.stacks:
            for block in stack.layers:
                block.forward = partial(opaque, block, block.forward, eager)
        for _ in range(2):
            eager.paused = True
            loss = forward()
            eager.paused = False
            eager.parts.clear()
            loss.backward()  # type: ignore[no-untyped-call]
    found: PartCost = eager.parts.get("", PartCost())
    return found


def opaque(block: nn.Module, forward: Callable[..., Any], eager: Operators, *arguments: Any, **options: Any) -> Any:
    """The outputs of a block, whose gradients cost nothing."""
    with torch.no_grad():
        out = forward(*arguments, **options)
    given = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
    inputs = [x for x in (*given, *block.parameters()) if x.is_floating_point()]
    leaves, spec = tree_flatten(out)
    made = [x for x in leaves if isinstance(x, Tensor) and not any(x is other for other in given)]
    results = iter(Opaque.apply(eager, [Meta.of(x) for x in made], *inputs))  # type: ignore[no-untyped-call]
    return tree_unflatten([next(results) if any(x is m for m in made) else x for x in leaves], spec)


class Opaque(torch.autograd.Function):
    """A function of which nothing is known but the shapes."""

    @staticmethod
    def forward(ctx: Any, eager: Operators, outputs: list[Meta], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.inputs = [Meta.of(x) for x in inputs]
        return tuple(meta.fake() for meta in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        return None, None, *(meta.fake() if need else None for meta, need in zip(ctx.inputs, needed, strict=True))


@dataclass
class Token:
    """Launches per decoded token of one row, by the way of decoding, and the graphs that were compiled."""

    launches: dict[str, float]
    graphs: list[list[Lowered]]


def count_token(config: ModelConfig, workshop: Workshop, compiled: bool = True) -> Token:
    """Count a decoded token: operator by operator, in a step of fixed shapes, and that step compiled.

    A Block Transformer's are the mean over a block. All layers are one graph of a compiled step: a minute or two.
    """
    compiler, found = Compiler(), Token({}, [])
    with as_on_an_h100() as mode, compiler.installed(), torch.no_grad():
        with torch.device("meta"):
            model = build(config, device_type="cuda", init=False)
        onto(model, DEVICE, torch.bfloat16)
        token = torch.empty(1, 1, dtype=torch.int64, device=DEVICE)
        tokens = torch.empty(1, CONTEXT, dtype=torch.int64, device=DEVICE)
        length = model.plan.block_length
        cache = model.allocate_cache(1, CONTEXT + 256)
        model.prefill(tokens, cache)
        with Operators(compiler) as eager:
            for _ in range(length):
                model.decode_step(token, cache)
        found.launches["plain"] = sum(part.launches for part in eager.parts.values()) / length
        if len(model.plan.stacks) == 1:
            for way in ("static", "compiled") if compiled else ("static",):
                step = model.static_step(cache, way)
                step(token)
                for traced in compiler.graphs.values():
                    traced.calls.clear()
                with Operators(compiler) as eager:
                    step(token)
                called = [(key, traced, sum(traced.calls.values())) for key, traced in compiler.graphs.items()]
                launches = sum(part.launches for part in eager.parts.values())
                for key, traced, count in called:
                    if count:
                        graphs = workshop.lower(key, traced, mode)
                        found.graphs.append(graphs)
                        launches += sum(count * lowered.launches for lowered in graphs)
                step.close()
                found.launches[way] = launches
    return found


def attention_seconds(config: ModelConfig) -> tuple[int, float]:
    """FLOPs of attention to visible pairs, forward and backward, over one sequence; and their time at assumed rates.

    Kernels compute whole blocks of BLOCK x BLOCK pairs, with a dense mask every pair. What bounded stores do with slots
    is not in the time: that is matrix products.
    """
    total, seconds = 0, 0.0
    with torch.device("meta"):
        model = build(config, device_type="cuda", init=False)
    length, plan = config.size.seq_len, model.plan
    runs = plan.forward_runs(length)
    decoders: Any = model.stacks[-len(runs) :]  # behind the encoder of an embedder
    for stack, (rows, positions, _) in zip(decoders, runs, strict=True):
        for layer in range(stack.plan.num_layers):
            store = stack.plan.store(layer)
            flops = rows * store.attention_flops(stack.config.size, positions, store.owner == layer)
            total += 3 * flops
            backend = stack.chosen[False][stack.plan.view_reads[layer]].name
            if backend == "chunks+flex":  # the products with slots are none of the kernel's
                pairs = visible_pairs(positions, store.window)
                backend, flops = "flex", rows * store.pair_flops(stack.config.size) * pairs
            if slots := store.dense_slots(positions):
                forward, backward = ATTENTION["dense mask"]
                computed = float(rows * store.pair_flops(stack.config.size) * positions * slots)
                seconds += computed / forward + 2.5 * computed / backward
            elif store.masked or backend == "flex":
                forward, backward = ATTENTION[backend]
                wide = WIDE if store.kernel_heads(stack.config.size).k_dim > 128 else 1.0
                computed = flops * computed_share(positions, store.window, packed=backend == "flex_rows") / wide
                seconds += computed / forward + 2.5 * computed / backward
    return total, seconds


def computed_share(length: int, window: int | None, packed: bool = False) -> float:
    """Pairs in blocks that a kernel computes, over those that are visible.

    `packed`: rows lie end to end, and a block of queries looks at its own block of keys and the one before.
    """
    window = min(window or length, length)
    visible = sum(min(t + 1, window) for t in range(length))
    if packed:
        return 2 * BLOCK * length / visible
    blocks = sum(q // BLOCK - max(0, q - window + 1) // BLOCK + 1 for q in range(0, length, BLOCK))
    return blocks * BLOCK * BLOCK / visible


def roof(config: ModelConfig, batch: int, step: Step) -> dict[str, float]:
    """Milliseconds that a micro-step takes at least, by what they go to, and the MFU that leaves."""
    parts, params = step.parts.values(), num_params(config, resolve(config))
    tokens = batch * config.size.seq_len
    seconds = {
        "products": sum(part.product_seconds for part in parts),
        "attention": batch * attention_seconds(config)[1],
        "memory": sum(part.bytes for part in parts) / BANDWIDTH,
        # AdamW reads and writes 28 bytes per parameter; clipping, and clearing of gradients, 12.
        "optimizer": 40 * params / BANDWIDTH / ACCUMULATE,
    }
    whole = sum(seconds.values())
    mfu = tokens * train_flops_per_token(config, resolve(config)) / whole / PEAK
    return {f"{name}_ms": 1e3 * value for name, value in seconds.items()} | {"ms": 1e3 * whole, "mfu": mfu}


def count(arch: str, workshop: Workshop, steps: bool) -> dict[str, Any]:
    """All counts of a layout at the size SIZE, and unless `steps`, what its kernels need, also with documents."""
    config = case_config(arch, SIZE, Options(toy=False))
    batch = micro_batch_that_fits(config)
    step = count_step(config, batch, workshop)
    more: dict[str, Any] = {}
    if not steps:
        token = count_token(config, workshop, compiled=arch in MEASURED)
        graphs = [*(lowered for _, _, lowered in step.graphs), *token.graphs]
        if config.arch.block is None:
            graphs += (lowered for _, _, lowered in count_step(config, batch, workshop, documents=True).graphs)
        made = summary(workshop.assemble(lowered for group in graphs for lowered in group))
        more = {"launches_per_token": token.launches, "assembled": made}
    return more | {
        "micro_batch": batch,
        "parts": {
            name: {"launches": part.launches, "bytes": part.bytes, "product_flops": part.flops}
            for name, part in step.parts.items()
        },
        "launches": sum(part.launches for part in step.parts.values()),
        "bytes": sum(part.bytes for part in step.parts.values()),
        "product_flops": sum(part.flops for part in step.parts.values()),
        "attention_flops": batch * attention_seconds(config)[0],
        "roof": roof(config, batch, step),
        "goal_mfu": goal(config),
        "commit": git_revision(),
    }


def goal(config: ModelConfig) -> float | None:
    """The MFU that a layout should reach, by the hardest of its stores."""
    stack, *inner = resolve(config).stacks
    if inner:
        return BLOCK_GOAL
    kinds = {store.kind for store in stack.plan.stores}
    if "matrix" in kinds:
        return None
    if "bounded" in kinds:
        return BOUNDED_GOAL
    plain = kinds == {"grouped"} and not any(view.window or view.sinks for view in stack.plan.views)
    return PLAIN_GOAL if plain else MASKED_GOAL


def summary(kernels: dict[str, list[Assembled]]) -> dict[str, Any]:
    """Count the kernels, the most shared memory that one needs, and those that spill registers.

    Of the configurations that are tried of a kernel, the most modest counts.
    """
    return {
        "kernels": len(kernels),
        "configurations": sum(map(len, kernels.values())),
        "shared_memory": max(min(made.shared for made in tried) for tried in kernels.values()),
        "stack_bytes": {name: least for name, tried in kernels.items() if (least := min(made.stack for made in tried))},
    }


def count_operators(arch: str) -> dict[str, int]:
    """Operators of a micro-step and of a decoded token at the toy size on the CPU, uncompiled."""
    config = case_config(arch, SIZE, Options(toy=True))
    model, size = build(config), config.size
    tokens = torch.zeros(2, size.seq_len, dtype=torch.int64)
    with Operators() as counter:
        for _ in range(2):  # the second adds to gradients that there are
            counter.parts.clear()
            model(tokens, head=cross_entropy_sum(model.select_targets(tokens))).backward()
    found = {"micro-step": counter.parts[""].launches}
    with torch.no_grad():
        cache = model.allocate_cache(1, size.seq_len)
        model.prefill(tokens[:1, : size.seq_len // 2], cache)
        model.decode_step(tokens[:1, :1], cache)
        with Operators() as counter:
            model.decode_step(tokens[:1, :1], cache)
    return found | {"token": counter.parts[""].launches}


def main(arguments: list[str]) -> None:
    config = parse(CountsConfig, arguments)
    if unknown := [arch for arch in config.archs if arch not in names("arch")]:
        raise UsageError(f"archs= has no {unknown[0]}{did_you_mean(unknown[0], names('arch'))}")
    archs = config.archs or tuple(names("arch"))
    if config.toy:
        path = config.out / "operators.json"
        counts = other_counts(path, config.archs) | {arch: count_operators(arch) for arch in archs}
        write_result(path, {"layouts": dict(sorted(counts.items()))})
        print(f"results: {path}")
        return
    if reason := unavailable_reason():
        fail(reason)
    assumed = {"rates": RATES, "attention": ATTENTION, "wide": WIDE, "bandwidth": BANDWIDTH, "peak": PEAK}
    triton: Any = importlib.import_module("triton")
    size = {"size": SIZE, "seq_len": 2048, "accumulate": ACCUMULATE, "context": CONTEXT, "triton": triton.__version__}
    path = config.out / "counts.json"
    layouts = other_counts(path, config.archs)
    workshop = Workshop()
    for arch in archs:
        begin = time.monotonic()
        layouts[arch] = count(arch, workshop, config.steps)
        print(f"{arch}: {line(layouts[arch])}  [{time.monotonic() - begin:.0f} s]", flush=True)
        write_result(path, {**size, "assumed": assumed, "layouts": dict(sorted(layouts.items()))})
    (config.out / "README.md").write_text(report(json.loads(path.read_text())))
    print(f"results: {config.out}")


def other_counts(path: Path, archs: Sequence[str]) -> dict[str, Any]:
    """Counts of other layouts in the file `path`, which stay where only `archs` are counted."""
    counts: dict[str, Any] = json.loads(path.read_text())["layouts"] if archs and path.exists() else {}
    return counts


def line(counts: dict[str, Any]) -> str:
    bound = counts["roof"]
    return (
        f"micro-batch {counts['micro_batch']}, {counts['launches']:,} launches, {counts['bytes'] / 1e9:.1f} GB, "
        f"roof {bound['ms']:.0f} ms, MFU {bound['mfu']:.1%}; launches per token {counts.get('launches_per_token')}"
    )


if __name__ == "__main__":
    run_script(main)
