"""Table and picture of decode_study.py."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullLocator

from eval.plots.style import Axes, Picture, line_looks, literal_text, plain_axes
from eval.units import bytes_text

Result = dict[str, Any]
COLUMNS = (
    "layout",
    "prefill s",
    "ms/token",
    "tokens/s",
    "prefill / {reference}",
    "decode / {reference}",
    "over dynamic",
    "over static",
    "at most",
    "compiled / plain",
    "compiled over static",
    "to compile",
    "cache",
    "formula",
    "read per token",
    "largest batch",
    "floor ms",
    "of the floor",
)
NOTE = """Ratios are of times in the same round, the median over rounds (lowest to highest in brackets): more than 1 is
faster than `{reference}`, or than transformers over its DynamicCache or StaticCache with the same weights. Cache and
formula are bytes of all sequences at the end of the measurement. The largest batch is of sequences of the prompt's
length, in {memory} with the weights, fp32. The floor is the time in which one thread reads the weights and the cache of
a step, at {bandwidth:.1f} GB/s as a sum over 256 MiB does; beside it the share that it is of the measured step (small
models stay in the processor's cache, and may be faster than memory). At most: how much faster than transformers' static
cache a step would be at its floor; what it reads leaves room for no more. To compile: the first round of compiled
steps, which compiles them."""


SHARED = """Layers that share a store each read it in full, one after the other. Were the queries of two layers (one key
head, {context:,} tokens) there at once, reading it once would make their attention {median:.2f} times as fast
({min:.2f}-{max:.2f} by round). They never are: the second layer's queries are computed from what the first one read. No
kernel does this here."""


def report(result: Result, out: Path) -> str:
    """Write README.md and decode.png into `out`; return the tables."""
    tables, options = table(result), result["options"]
    packages = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
    load = result["load"]
    parts = [
        "# Decoding on the CPU",
        f"`{shlex.join(['python', *result['command']])}`, {result['date'][:10]}, commit {result['git']}. "
        f"{result['hardware']}, Python {result['python']}, {packages}; load average "
        f"{load['before'][0]:.1f} before and {load['after'][0]:.1f} after. Size {options['size']}, "
        f"{result['precision']}, random weights, {options['rounds']} rounds of {options['new']} tokens per sequence.",
        "![tokens per second against context](decode.png)",
        tables.strip(),
        SHARED.format(context=result["shared_read"]["context"], **result["shared_read"]["saving"]["speed_by_round"]),
    ]
    (out / "README.md").write_text("\n\n".join(parts) + "\n")
    draw(result, out / "decode.png")
    return tables


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(result: Result) -> str:
    """A Markdown table per shape."""
    reference, parts = result["reference"], []
    for text, rivals in result["shapes"].items():
        prompt, batch = text.split("x")
        head = [column.format(reference=reference) for column in COLUMNS]
        lines = [
            f"## {int(prompt):,} tokens of prompt, batch {batch}",
            "",
            row(head),
            f"|---|{'---:|' * (len(head) - 1)}",
        ]
        lines += [row(_cells(name, text, result)) for name in rivals if "/" not in name]
        parts.append("\n".join(lines))
    parts += compressed_tables(result)
    parts.append(
        NOTE.format(
            reference=reference, memory=result["options"]["memory"], bandwidth=result.get("bandwidth", 0.0) / 1e9
        )
    )
    return "\n\n".join(parts) + "\n"


def compressed_tables(result: Result) -> list[str]:
    """A table of compressed caches per shape, if there are any: their speed over that of the same model's plain one."""
    methods = result["options"].get("cache") or ()
    if not methods:
        return []
    parts = []
    for text, rivals in result["shapes"].items():
        prompt, batch = text.split("x")
        lines = [
            f"## {int(prompt):,} tokens of prompt, batch {batch}: compressed caches",
            "",
            row(("layout", "method", "ms/token", "compressed / plain", "cache", "formula", "of the plain cache")),
            f"|---|---|{'---:|' * 5}",
        ]
        for name, values in rivals.items():
            arch, _, method = name.partition("/")
            if method not in methods:
                continue
            speed = "{median:.2f} ({min:.2f}-{max:.2f})".format(**faster(values))
            lines.append(
                row(
                    (
                        f"`{arch}`",
                        f"`{method}`",
                        f"{1e3 * values['step_seconds']['median']:.3g}",
                        speed,
                        *(
                            bytes_text(values[key]) if key in values else "by text"
                            for key in ("cache_bytes", "formula_bytes")
                        ),
                        f"{values['cache_bytes'] / rivals[arch]['cache_bytes']:.0%}",
                    )
                )
            )
        parts.append("\n".join(lines))
    reasons = result.get("without_method") or {}
    return parts + ["Not measured: " + "; ".join(reasons.values()) + "."] * bool(reasons)


def _cells(arch: str, shape: str, result: Result) -> list[str]:
    rivals = result["shapes"][shape]
    values = rivals[arch]

    def ratio(found: Result | None) -> str:
        return "" if found is None else "{median:.2f} ({min:.2f}-{max:.2f})".format(**found["speed_by_round"])

    compiled = rivals.get(f"{arch}/compiled")
    peers = [rivals.get(f"{arch}/{peer}", {}).get("decode_ours_over") for peer in ("dynamic", "static")]
    return [
        f"`{arch}`",
        f"{values['prefill_seconds']['median']:.3g}",
        f"{1e3 * values['step_seconds']['median']:.3g}",
        f"{values['tokens_per_second']:.3g}",
        ratio(values["prefill_over_reference"]),
        ratio(values["decode_over_reference"]),
        *map(ratio, peers),
        _most(arch, rivals, result),
        "" if compiled is None else "{median:.2f} ({min:.2f}-{max:.2f})".format(**faster(compiled)),
        ratio((compiled or {}).get("decode_over_static")),
        "" if compiled is None else f"{compiled['first_round_seconds']:.0f} s",
        *(bytes_text(values[key]) for key in ("cache_bytes", "formula_bytes", "read_bytes")),
        f"{result['models'][arch]['largest_batch'][shape]:,}",
        *_floor(arch, values, result),
    ]


def _floor(arch: str, values: Result, result: Result) -> tuple[str, str]:
    """Milliseconds of the floor, and its share of a step; empty if it was not measured."""
    floor = _floor_seconds(arch, values, result)
    if floor is None:
        return "", ""
    return f"{1e3 * floor:.3g}", f"{floor / values['step_seconds']['median']:.0%}"


def _most(arch: str, rivals: Result, result: Result) -> str:
    """Speed over transformers' StaticCache that no step of this model can exceed: that of the floor."""
    static, floor = rivals.get(f"{arch}/static"), _floor_seconds(arch, rivals[arch], result)
    return "" if static is None or floor is None else f"{static['step_seconds']['median'] / floor:.2f}"


def _floor_seconds(arch: str, values: Result, result: Result) -> float | None:
    """The time in which memory delivers what a step reads; None if it was not measured."""
    weights = result["models"][arch].get("weight_bytes_read")
    if weights is None or "bandwidth" not in result:
        return None
    return float((weights + values["read_bytes"]) / result["bandwidth"])


def faster(compiled: Result) -> Result:
    """Speed of compiled steps over that of plain ones, by round."""
    found = compiled["decode_ours_over"]["speed_by_round"]
    return {"median": 1 / found["median"], "min": 1 / found["max"], "max": 1 / found["min"]}


@literal_text
def draw(result: Result, path: Path | None = None) -> Picture:
    """Draw tokens/s against context, a panel for each batch; transformers on the first layout is a thin line."""
    batches: dict[int, list[str]] = {}
    for text in result["shapes"]:
        batches.setdefault(int(text.split("x")[1]), []).append(text)
    figure = Picture(figsize=(5.2 * len(batches) + 1.6, 4.4), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, (batch, shapes) in zip(panels, sorted(batches.items()), strict=True):
        _panel(axes, result, sorted(shapes, key=lambda text: int(text.split("x")[0])))
        axes.set_title(f"batch {batch}", fontsize=10)
    panels[0].set_ylabel("tokens per second, all sequences")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.write(path, dpi=160)
    return figure


def _panel(axes: Axes, result: Result, shapes: list[str]) -> None:
    contexts = [int(text.split("x")[0]) for text in shapes]
    found = result["shapes"]
    archs = [name for name in found[shapes[0]] if "/" not in name]
    for arch, look in zip(archs, line_looks(len(archs)), strict=True):
        speeds = [found[text][arch]["tokens_per_second"] for text in shapes]
        axes.plot(
            contexts, speeds, color=look.color, linestyle=look.style, marker=look.marker, markersize=4, label=arch
        )
    for peer, marker in (("dynamic", "x"), ("static", "+")):
        name = f"{result['reference']}/{peer}"
        if name in found[shapes[0]]:
            speeds = [found[text][name]["tokens_per_second"] for text in shapes]
            label = f"{result['reference']}, transformers, {peer} cache"
            axes.plot(contexts, speeds, color="#8a8a8a", linewidth=0.9, marker=marker, markersize=5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("context, tokens")
    plain_axes(axes)
