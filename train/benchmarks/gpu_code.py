"""The code that torch's compiler makes for an H100, on a machine that has none.

Everything up to the machine code of a kernel is made by the host: torch's compiler traces tensors that are fake, lowers
their graphs to Triton kernels, and Triton's own assembler translates those for sm_90. What a driver would tell of the
device is written down here. Autograd asks a driver for streams, so that the joint graph of a forward and a backward
pass, alone, is made of fake tensors of the CPU. Needs torch's CUDA build, for its Triton and for the kinds of operators
that only it has.
"""

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from arch import attend, bounded_scan

MISSING = (
    "the CUDA build of torch 2.11 or later, and no GPU: make gpu-code installs it and runs tests/test_train_gpu_code.py"
)
DEVICE = torch.device("cuda", 0)
SHARED_MEMORY = 232448  # bytes that a block of threads may have: 227 KiB
# What the driver of an H100 SXM reports (CUDA C++ Programming Guide, table of compute capability 9.0).
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=SHARED_MEMORY,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    is_integrated=0,
    gcnArchName="",
)
# What the functions of torch.cuda answer, those of the compiler's interface to a device, and those of its workers.
OF_TORCH = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_properties": H100,
    "get_device_capability": (9, 0),
    "get_device_name": H100.name,
    "is_bf16_supported": True,
    "synchronize": None,
    "get_rng_state": torch.empty(0, dtype=torch.uint8),
    "set_rng_state": None,
    "_lazy_init": None,
}
OF_DYNAMO = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_properties": H100,
    "get_compute_capability": 90,
    "is_triton_capable": True,
    "raise_if_triton_unavailable": None,
    "is_bf16_supported": True,
    "synchronize": None,
    "get_raw_stream": 0,
    "exchange_device": 0,
    "maybe_exchange_device": 0,
}
OF_WORKERS = {"get_device_properties": H100, "current_device": 0, "set_device": None}


def unavailable_reason() -> str | None:
    """Explain what this Python lacks to make code for an H100; None if nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; needed is {MISSING}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"{error}; needed is {MISSING}"
    return None


# What torch's C++ chooses by asking the device, said in Python. Its operators are traced and lowered as on a GPU.


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention on Hopper: cuDNN (from 9.10 on for widths of up to 256, also two of them) or
    FlashAttention without a mask, else the efficient kernel."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and half and query.shape[-2] == key.shape[-2] and query.shape[-1] <= 256:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out: Tensor = cudnn(query, key, value, None, grad, dropout_p, is_causal, False, scale=scale)[0]
        return out
    if attn_mask is None and half:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
        slots = bias.shape[-1]
        bias = F.pad(bias, (0, -slots % 16))[..., :slots].expand(*query.shape[:-1], slots)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out = efficient(query, key, value, bias, grad, dropout_p, is_causal, scale=scale)[0]
    return out


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """F.rms_norm, which is one operator on CUDA and many on the CPU."""
    out: Tensor = torch.ops.aten._fused_rms_norm(x, list(shape), weight, eps)[0]
    return out


class Driver:
    """Triton's driver for a device that nothing is launched on: our own kernels are assembled, and return at once."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
        load_binary=lambda *arguments: (None, None, 0, 0, H100.max_threads_per_block),
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return always(None)

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return 9, 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def always(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value


def addmm_of(addmm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.addmm, whose form with a type of its own fake tensors of torch 2.11 take for another: a product here."""

    def add(total: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        if "out_dtype" not in options:
            return addmm(total, left, right, **options)
        torch.mm(left, right)
        return total

    return add


def tensor_of(tensor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, whose values on the device are not known: a driver would be asked to copy them."""

    def make(values: Any, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return tensor(values, device=device, **options)
        made = tensor(values, **options)
        return torch.empty(made.shape, dtype=made.dtype, device=device)

    return make


@contextlib.contextmanager
def as_on_an_h100() -> Iterator[Any]:
    """Let torch believe that there is one H100; yields the mode in which tensors on it are fake."""
    triton: Any = importlib.import_module("triton")
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor

    flex_attention = importlib.import_module("torch._higher_order_ops.flex_attention")
    create_fw_bw_graph = flex_attention.create_fw_bw_graph

    def scores_backward(score_mod: Any, values: Sequence[Tensor], *others: Any) -> Any:
        """Skip autograd, which has no stream for a fake device; of FlexAttention there only shapes are asked for."""
        if values[0].device.type == "cpu":
            return create_fw_bw_graph(score_mod, values, *others)
        return score_mod, score_mod

    before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    mode = fake_tensor.FakeTensorMode(
        allow_non_fake_inputs=True, shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)  # first: it looks for a device, and makes up a guard where there is none
        for owner, values in ((torch.cuda, OF_TORCH), (CudaInterface, OF_DYNAMO), (CudaInterface.Worker, OF_WORKERS)):
            for name, value in values.items():
                function = always(value) if owner is torch.cuda else staticmethod(always(value))
                stack.enter_context(patch.object(owner, name, function))
        for name in ("has_triton", "has_triton_package"):
            stack.enter_context(patch.object(torch.utils._triton, name, always(True)))
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", always(None)))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(patch.object(F, "rms_norm", rms_norm))
        stack.enter_context(patch.object(attend, "_fused_choice", always(SDPBackend.CUDNN_ATTENTION.value)))
        stack.enter_context(patch.object(torch, "addmm", addmm_of(torch.addmm)))
        stack.enter_context(patch.object(torch, "tensor", tensor_of(torch.tensor)))
        stack.enter_context(patch.object(flex_attention, "create_fw_bw_graph", scores_backward))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", always(None)))
        triton.runtime.driver.set_active(Driver())
        try:
            yield mode
        finally:
            if before is not None:
                triton.runtime.driver.set_active(before)


def onto(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Replace the parameters and buffers of a module on the meta device by fake ones on `device`, in `dtype`."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)
                is_weight = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake  # type: ignore[assignment]


@dataclass(frozen=True)
class Meta:
    """Shape, stride, type and device, by which a fake tensor is known."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    @classmethod
    def of(cls, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return int(x) if isinstance(x, torch.SymInt) else x
        return cls(tuple(map(int, x.shape)), tuple(map(int, x.stride())), x.dtype, x.device, x.requires_grad)

    def fake(self, device: torch.device | str | None = None, grad: bool = False) -> Tensor:
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device or self.device)
        return x.requires_grad_(grad and self.requires_grad)


def fakes(metas: Sequence[Any], device: torch.device | str | None = None, grad: bool = False) -> list[Any]:
    return [meta.fake(device, grad) if isinstance(meta, Meta) else meta for meta in metas]


@dataclass
class Traced:
    """A graph that was handed to the compiler.

    autocast  type of autocast around it; None: off
    grad      whether gradients were on
    calls     how often it was run, by the part of a step
    """

    module: fx.GraphModule
    inputs: list[Any]
    outputs: list[Any]
    autocast: torch.dtype | None
    grad: bool
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def trained(self) -> bool:
        return self.grad and any(isinstance(meta, Meta) and meta.requires_grad for meta in self.inputs)


# (FLOPs, bytes, type) of each matrix product, and how often it is computed.
Products = Counter[tuple[int, int, str]]


@dataclass
class Lowered:
    """Code of a graph, and what it takes to run it.

    kernels      source of its own kernels, by name
    calls        of its own kernels, by name
    operators    calls of others, by name
    fused_bytes  that its own kernels read and write, as the compiler counts them
    """

    backward: bool
    code: str
    kernels: dict[str, str]
    calls: Counter[str]
    operators: Counter[str]
    fused_bytes: int
    products: Products

    @property
    def launches(self) -> int:
        return self.calls.total() + self.operators.total()


class Compiler:
    """Takes the place of inductor in torch.compile: collects graphs, and lowers them when asked.

    A compiled function returns fake tensors and computes nothing. Graphs that are equal are kept once. `part` names the
    part of a step that is run, to which calls are counted.
    """

    def __init__(self) -> None:
        from torch._inductor.compile_fx import compile_fx

        self.graphs: dict[str, Traced] = {}
        self.part = ""
        self.compile_fx = compile_fx

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        metas = [Meta.of(x) for x in inputs]
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        values = [node.meta["example_value"] if isinstance(node, fx.Node) else node for node in output.args[0]]
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        grad = torch.is_grad_enabled()
        text = "\n".join((*code_of(module), str(metas), str(autocast), str(grad)))
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.graphs:
            self.graphs[key] = Traced(copy_of(module), metas, [Meta.of(value) for value in values], autocast, grad)
        traced = self.graphs[key]

        def run(*arguments: Any) -> Any:
            traced.calls[self.part] += 1
            return fakes(traced.outputs, grad=True)

        return run

    @contextlib.contextmanager
    def installed(self) -> Iterator["Compiler"]:
        """Compile every shape by itself within this context."""
        torch._dynamo.reset()
        fixed = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
        with fixed, patch("torch._inductor.compile_fx.compile_fx", self):
            yield self
        torch._dynamo.reset()


def code_of(module: fx.GraphModule) -> Iterator[str]:
    yield module.code
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            yield f"{name}: {child.code}"


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes have no values."""
    copied = fx.GraphModule(dict(module.named_children()), copy.deepcopy(module.graph))
    for name, value in (
        *vars(module).items(),
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ):
        if isinstance(value, Tensor) and not hasattr(copied, name):
            setattr(copied, name, value)
    return copied


def move(module: fx.GraphModule, device: torch.device) -> None:
    """Let a graph make its tensors on `device`. The values that it was traced with move too."""
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            move(child, device)
    for node in module.graph.nodes:
        for key in ("val", "tensor_meta", "example_value"):
            value = node.meta.pop(key, None)
            if key == "val" and isinstance(value, Tensor):
                node.meta[key] = Meta.of(value).fake(device)
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda x: moved(x, device))
        if node.target is torch.amp.autocast_mode._enter_autocast:
            node.args = (device.type, *node.args[1:])
        if node.op == "get_attr" and isinstance(value := getattr(module, node.target, None), Tensor):
            setattr(module, node.target, Meta.of(value).fake(device))
    module.recompile()


def moved(x: Any, device: torch.device) -> Any:
    return device if isinstance(x, torch.device) else x


def lower(traced: Traced, mode: Any) -> list[Lowered]:
    """Lower the forward pass of a graph and, if it is trained, the backward pass."""
    from torch._inductor.compile_fx import compile_fx

    if isinstance(compile_fx, Compiler):
        compile_fx = compile_fx.compile_fx
    joint: list[tuple[fx.GraphModule, list[Any], bool, bool]] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        backward, inference = options.get("is_backward", False), options.get("is_inference", False)
        joint.append((module, [Meta.of(x) for x in inputs], backward, inference))
        return always(None)

    module = copy_of(traced.module)
    move(module, torch.device("cpu"))
    dtype = traced.autocast
    with (
        torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
        torch.set_grad_enabled(traced.grad),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True, backward_pass_autocast="off"),
        patch.object(torch.cuda, "is_available", always(False)),
    ):
        compile_fx(module, fakes(traced.inputs, "cpu", grad=True), inner_compile=keep)  # type: ignore[arg-type]
    return [generate(*graph, mode) for graph in joint]


def generate(module: fx.GraphModule, metas: Sequence[Any], backward: bool, inference: bool, mode: Any) -> Lowered:
    """Code for an H100 of one graph of ATen operators."""
    from torch._inductor import compile_fx
    from torch._inductor import config as inductor_config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    move(module, DEVICE)
    inputs = fakes(metas, DEVICE)
    with V.set_fake_mode(mode), torch.no_grad(), inductor_config.patch(force_disable_caches=True, compile_threads=1):
        view_to_reshape(module)  # type: ignore[no-untyped-call]
        compile_fx.fake_tensor_prop(module, inputs, force_allow_non_fake_inputs=True)
        compile_fx.record_original_output_strides(module)
        post_grad_passes(module, is_inference=inference)
        graph = GraphLowering(
            module,
            example_inputs=inputs,
            shape_env=mode.shape_env,
            graph_id=0,
            is_backward=backward,
            is_inference=inference,
        )
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            code = graph.codegen()[0]
            nodes = [node for node in graph.scheduler.nodes if not node.is_extern()]
            fused = sum(node.get_read_write_buffers_sizes() for node in nodes)
    text = str(getattr(code, "value", code))
    calls, operators = called(text)
    factors, scanned = products(module)
    return Lowered(backward, text, kernels(text), calls, operators, int(fused) + scanned, factors)


def called(code: str) -> tuple[Counter[str], Counter[str]]:
    """Count the kernels and the operators that generated code calls."""
    body = code[code.find("def call(") :]
    fused = Counter(re.findall(r"(\btriton_\w+)\.run\(", body))
    return fused, Counter(re.findall(r"=?\s*((?:extern_kernels|torch\.ops)\.[\w.]+)\(", body))


def kernels(code: str) -> dict[str, str]:
    """Source of each Triton kernel in generated code, by name."""
    found = re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''\n?(.*?)'''", code, re.S | re.M)
    return dict(found)


def products(module: fx.GraphModule) -> tuple[Products, int]:
    """The matrix products of a graph, those of bounded stores' scans too, and the bytes that else these move."""
    found: Products = Counter()
    scanned = 0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if (left := left_factor(node.target, node.args)) is not None:
            found[product(left.meta["val"], node.meta["val"], in_tf32(node.target, node.args))] += 1
        elif (of_scan := scan_of(node)) is not None:
            made, size = of_scan
            found.update(made)
            scanned += size
    return found, scanned


def scan_of(node: fx.Node) -> tuple[list[tuple[int, int, str]], int] | None:
    """Products of a scan of states (bounded_scan.py), or of its backward pass, and bytes of the rest; None: it is none.

    Forward the keys and values are joined and written to every state, which the recurrence reads and writes; backward
    the gradients are copied, and summed beside the states.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in (BOUNDED.scan, BOUNDED.scan_backward):
        return None
    backward = packet is BOUNDED.scan_backward
    operands: Any = node.args[1:6] if backward else (*node.args[:4], node)
    _, share, k, _, states = (x.meta["val"] for x in operands)
    shape = (math.prod(k.shape[:3]), share.shape[3], share.shape[2])  # M slots, C tokens
    width, kind = states.shape[-1], "tf32" if in_tf32(node.target, node.args) else "float32"
    one = 2 * math.prod(shape) * width
    moved = 4 * shape[0] * (shape[1] * shape[2] + (shape[1] + shape[2]) * width)
    joined, whole = 16 * k.numel(), states.numel() * states.dtype.itemsize
    return [(one, moved, kind)] * (2 if backward else 1), joined + whole * (5 if backward else 2)


BOUNDED = getattr(torch.ops, bounded_scan.NAMESPACE)


def in_tf32(function: Any, arguments: Sequence[Any]) -> bool:
    """Tell whether an operator computes its products in TF32."""
    packet = getattr(function, "overloadpacket", None)
    return packet is BOUNDED.tf32_bmm or (packet in (BOUNDED.scan, BOUNDED.scan_backward) and arguments[-1] is True)


def left_factor(function: Any, arguments: Sequence[Any]) -> Any:
    """The first factor of a matrix product; None: it is none."""
    packet = getattr(function, "overloadpacket", None)
    if packet in (torch.ops.aten.mm, torch.ops.aten.bmm, BOUNDED.tf32_bmm):
        return arguments[0]
    sums = (torch.ops.aten.addmm, torch.ops.aten.baddbmm, torch.ops.aten.addmm_, torch.ops.aten.baddbmm_)
    return arguments[1] if packet in sums else None


def product(left: Tensor, out: Tensor, tf32: bool = False) -> tuple[int, int, str]:
    """FLOPs, 2 per multiply-add, bytes and type of a matrix product."""
    *batch, rows, columns, inner = *map(int, out.shape), int(left.shape[-1])
    count, size = math.prod(batch), left.dtype.itemsize
    moved = count * (rows * inner + inner * columns) * size + count * rows * columns * out.dtype.itemsize
    return 2 * count * rows * columns * inner, moved, "tf32" if tf32 else str(left.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Assembled:
    """Machine code of one kernel and configuration: per block bytes of shared memory, per thread registers and stack.

    stack  bytes of local memory, where registers are spilled to
    """

    name: str
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int


def assemble(source: str) -> list[Assembled]:
    """Compile a Triton kernel of inductor's for sm_90, in each configuration that it would try. Raises what fails."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("kernel", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (kernel,) = (value for value in vars(module).values() if isinstance(value, CachingAutotuner))
        for config in kernel.configs:
            binary = binary_of(kernel, config)
            used = resources(binary.asm["cubin"], Path(folder) / "kernel.cubin")
            meta = binary.metadata
            results.append(
                Assembled(meta.name, meta.num_warps, meta.num_stages, meta.shared, used["REG"], used["STACK"])
            )
    return results


class Workshop:
    """Graphs that were lowered and sources that were assembled, each once: layouts have blocks in common."""

    def __init__(self) -> None:
        self.lowered: dict[str, list[Lowered]] = {}
        self.assembled: dict[str, list[Assembled]] = {}

    def lower(self, key: str, traced: Traced, mode: Any) -> list[Lowered]:
        if key not in self.lowered:
            self.lowered[key] = lower(traced, mode)
        return self.lowered[key]

    def assemble(self, graphs: Iterable[Lowered]) -> dict[str, list[Assembled]]:
        """Assemble every kernel of `graphs`; of each, by name and digest, its configurations."""
        found = {}
        for graph in graphs:
            for name, source in graph.kernels.items():
                if source not in self.assembled:
                    with as_on_an_h100():
                        self.assembled[source] = assemble(source)
                digest = hashlib.sha256(source.encode()).hexdigest()[:8]
                found[f"{name}-{digest}"] = self.assembled[source]
        return found


def binary_of(kernel: Any, config: Any) -> Any:
    """The compiled kernel, taken from Triton before torch asks a driver to load it."""
    triton: Any = importlib.import_module("triton")

    compiled = []
    real = triton.compile

    def spy(*arguments: Any, **options: Any) -> Any:
        compiled.append(real(*arguments, **options))
        return compiled[-1]

    with patch.object(triton, "compile", spy):
        kernel._precompile_config(config)
    return compiled[0]


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """Resources of a kernel by `cuobjdump` of Triton: REG registers, STACK bytes, and so on."""
    triton: Any = importlib.import_module("triton")

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
