"""The page of train/benchmarks/gpu_counts.py: tables of counts, and goals beside the roof."""

from typing import Any

from train.benchmarks.gpu_code import SHARED_MEMORY

# Goals of MFU: of layouts that are plainly causal throughout, and of those with windows, sinks or latents, with bounded
# stores, and of Block Transformers; states of matrices have none. Tokens/s are 1.15 times the best published.
PLAIN_GOAL, MASKED_GOAL, BOUNDED_GOAL, BLOCK_GOAL = 0.46, 0.43, 0.30, 0.44
GOAL_TOKENS = 1.15 * 45_500
REACHED = 0.80, 0.92  # shares of the roof that steps reach
VERDICTS = ("within reach", "at the upper edge", "out of reach")


def report(result: dict[str, Any]) -> str:
    """The README of the results, as Markdown."""
    layouts, size = result["layouts"], result["size"]
    rows = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for arch, counts in layouts.items():
        bound, parts = counts["roof"], counts["parts"]
        outside = sum(part["launches"] for name, part in parts.items() if "outside" in name)
        speed = counts["micro_batch"] * result["seq_len"] / bound["ms"] * 1e3
        cells = [
            f"`{arch}`",
            counts["micro_batch"],
            *(f"{parts[name]['launches']:,}" for name in ("forward", "backward", "loss")),
            f"{outside:,}",
            f"{counts['bytes'] / 1e9:.0f}",
            *(f"{counts[key] / 1e12:.0f}" for key in ("product_flops", "attention_flops")),
            *(f"{bound[key]:.0f}" for key in ("products_ms", "attention_ms", "memory_ms", "ms")),
            f"{speed / 1e3:.1f}k",
            f"{bound['mfu']:.1%}",
            *beside(counts["goal_mfu"], bound["mfu"]),
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    kernels = []
    whole = {arch: counts for arch, counts in layouts.items() if "assembled" in counts}
    for arch, counts in whole.items():
        made = counts["assembled"]
        stacks = made["stack_bytes"].values()
        kernels.append(
            f"| `{arch}` | {made['kernels']} | {made['configurations']} | {made['shared_memory']:,} | {len(stacks)} | "
            f"{max(stacks, default=0)} |"
        )
    tokens = [
        f"| `{arch}` | {number(counts, 'plain')} | {number(counts, 'static')} | {number(counts, 'compiled')} |"
        for arch, counts in whole.items()
    ]
    return README.format(
        date=result["date"][:10],
        torch=result["versions"]["torch"],
        triton=result["triton"],
        size=size,
        seq_len=result["seq_len"],
        accumulate=result["accumulate"],
        context=f"{result['context']:,}",
        rows="\n".join(rows),
        tokens="\n".join(tokens),
        kernels="\n".join(kernels),
        limit=f"{SHARED_MEMORY:,}",
        goals=goals(result),
        goal_tokens=f"{GOAL_TOKENS:,.0f}",
        slowest=slowest(result),
    )


def beside(goal: float | None, bound: float) -> tuple[str, str]:
    """A goal of MFU, and which share of the roof's it is; nothing where there is none."""
    if goal is None:
        return "", ""
    return f"{goal:.0%}", f"{goal / bound:.2f}, {verdict(goal / bound)}"


def verdict(share: float) -> str:
    """Tell whether a goal can be met that is so large a share of the roof; steps reach REACHED of it."""
    least, most = REACHED
    return "within reach" if share <= least else "at the upper edge" if share <= most else "out of reach"


def goals(result: dict[str, Any]) -> str:
    """Rows of a table of what steps should reach: layouts of one goal, by the lowest and the highest roof."""
    rows = []
    by_goal: dict[float, list[str]] = {}
    for arch, counts in result["layouts"].items():
        if counts["goal_mfu"] is not None:
            by_goal.setdefault(counts["goal_mfu"], []).append(arch)
    for wanted, archs in sorted(by_goal.items(), reverse=True):
        roofs = {arch: result["layouts"][arch]["roof"]["mfu"] for arch in archs}
        found = {kind: [arch for arch in archs if verdict(wanted / roofs[arch]) == kind] for kind in VERDICTS}
        expected = f"{REACHED[0] * min(roofs.values()):.1%} to {REACHED[1] * max(roofs.values()):.1%}"
        named = (", ".join(f"`{arch}`" for arch in found[kind]) or "none" for kind in VERDICTS)
        rows.append("| " + " | ".join((f"{wanted:.0%}", expected, *named)) + " |")
    return "\n".join(rows)


def slowest(result: dict[str, Any]) -> str:
    """The plain layout that makes fewest tokens at the least share of its roof, and how many."""
    speeds = {
        arch: REACHED[0] * counts["micro_batch"] * result["seq_len"] / counts["roof"]["ms"] * 1e3
        for arch, counts in result["layouts"].items()
        if counts["goal_mfu"] == PLAIN_GOAL
    }
    if not speeds:
        return "None was counted."
    arch = min(speeds, key=lambda name: speeds[name])
    return f"The slowest of them, `{arch}`, makes {speeds[arch]:,.0f} at {REACHED[0]:.2f} of its roof."


def number(counts: dict[str, Any], way: str) -> str:
    value = counts["launches_per_token"].get(way)
    return "" if value is None else f"{value:,.0f}"


COLUMNS = (
    "layout",
    "micro-batch",
    "forward",
    "backward",
    "loss",
    "outside",
    "GB moved",
    "TFLOP of products",
    "of attention",
    "products, ms",
    "attention",
    "memory",
    "roof, ms",
    "tokens/s",
    "MFU at the roof",
    "goal",
    "goal / roof",
)
README = """# Kernels, bytes and FLOPs on an H100, counted without one

`python train/benchmarks/gpu_counts.py`, one layout at a time (`archs=`; each has its commit in counts.json), last on
{date}, torch {torch}, Triton {triton}. No figure here was measured on a GPU: torch's compiler made sm_90 code for
tensors that are fake (train/benchmarks/gpu_code.py). The kernels, and the bytes that they read and write, are its own
count. `make gpu-code` makes the environment, assembles every kernel and compares with counts.json.

## A micro-step of training

Size {size}, micro-batch x {seq_len} tokens (16, or what fits into 80 GB by train/estimates/memory.py), bf16, compiled
block by block. One launch is one fused kernel or one operator: cuDNN's backward pass and the gradient of the embedding
launch more. Outside of blocks are embedding, masks, rotary tables, the last norm, and the sums of gradients over
micro-steps.

The roof: products at 700 TFLOP/s in bf16 (50 in fp32), bound by memory where they are narrow; attention at 550 and 430
TFLOP/s forward and backward by cuDNN and 380 and 260 by FlexAttention, in whole blocks of 128 x 128 pairs, and 200 and
120 with a dense mask, which only strided stores have, to every pair; memory at 3.0 TB/s; AdamW once in {accumulate}
micro-steps. All rates are assumed. Steps reach 0.80 to 0.92 of such a roof, so that a goal is within reach at up to
0.80 of it. MFU counts visible pairs, as the repository does, over 989.5 TFLOP/s.

{rows}

## Goals

MFU that steps are expected to have, from 0.80 of the lowest roof among the layouts of a goal to 0.92 of the highest;
and which layouts reach the goal at 0.80 of their roof, which only above that, and which not even at 0.92 of it.
Layouts with states of a matrix per head have no goal. What was changed for these figures, and its predicted gain, is in
[predicted.md](predicted.md).

| goal | expected MFU | within reach | at the upper edge | out of reach |
|---:|---:|---|---|---|
{goals}

Plain layouts should also make {goal_tokens} tokens/s on a GPU, 1.15 times the best published at this size.
{slowest}

## Kernels

Every kernel of a micro-step, also with documents, and of a decoded token, assembled for sm_90, of the layouts that were
not counted for their steps alone (`steps=true`); `make gpu-code` assembles those of all. A block of threads may have
{limit} bytes of shared memory. Stack is what a thread spills its registers to: FlexAttention's backward pass does, by
torch's own template, less with the options that wide heads are given (arch/attend_kernels.py).

| layout | kernels | configurations | shared memory, at most | kernels with a stack | its bytes |
|---|---:|---:|---:|---:|---:|
{kernels}

## A decoded token

Launches at batch 1 with {context} tokens in the cache, bf16: operator by operator; in a step of fixed shapes, as it is
captured in a CUDA graph; and that step compiled, for some layouts. For a Block Transformer it is the mean
over a block.

| layout | plain | fixed shapes | compiled |
|---|---:|---:|---:|
{tokens}
"""
