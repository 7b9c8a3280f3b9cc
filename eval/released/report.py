"""Figures of released models: a table, JSON, and the stores and picture of one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from arch.footprint import kv_bytes
from eval.released import Released
from eval.units import bytes_text, counted

MEANING = """\
KV per token: bytes that each further token adds. KV constant: windows when they are full, and states of linear layers.
KV stored: the cache of one sequence. KV read: what decoding one token fetches from it, over all layers.
A window counts the current position; transformers keeps one position less of it between steps."""


@dataclass(frozen=True)
class ReleasedFootprint:
    """Bytes of one sequence, as in `arch.footprint.KVBytes`."""

    model: str
    model_type: str
    source: str
    layers: int
    kv_bytes_per_token: float
    kv_bytes_constant: int
    kv_bytes_stored: int
    kv_bytes_read: float
    context: int


def measure(model: Released, context: int, itemsize: int) -> ReleasedFootprint:
    kv = kv_bytes(model.plan, context, itemsize)
    return ReleasedFootprint(
        model=model.name,
        model_type=model.model_type,
        source=model.source,
        layers=model.plan.num_layers + model.others,
        kv_bytes_per_token=kv.per_token,
        kv_bytes_constant=kv.constant,
        kv_bytes_stored=kv.stored,
        kv_bytes_read=kv.read,
        context=context,
    )


def table(models: Sequence[Released], context: int, itemsize: int) -> Table:
    """A row for each model, the heaviest cache first."""
    elements = f"elements of {counted(itemsize, 'byte')}"
    result = Table(title=f"released models, one sequence of {context:,} tokens, {elements}", title_justify="left")
    result.add_column("model", style="bold", overflow="fold")
    result.add_column("model_type")
    for column in ("layers", "KV per token\n(slope)", "KV constant\n(windows, states)", "KV stored", "KV read"):
        result.add_column(column, justify="right")
    rows = [measure(model, context, itemsize) for model in models]
    for row in sorted(rows, key=lambda row: -row.kv_bytes_stored):
        result.add_row(
            row.model,
            row.model_type,
            str(row.layers),
            f"{row.kv_bytes_per_token:,} B",
            bytes_text(row.kv_bytes_constant) if row.kv_bytes_constant else "-",
            bytes_text(row.kv_bytes_stored),
            bytes_text(row.kv_bytes_read),
        )
    return result


def remarks(model: Released) -> list[str]:
    """Lines about one model: where its configuration was read, and layers that cache nothing."""
    lines = [f"{model.name}: {model.source}"] if model.source != model.name else []
    if model.others:
        lines.append(f"{counted(model.others, 'layer')} of its own count cache nothing, and are not numbered below")
    return lines


def as_json(models: Sequence[Released], context: int, itemsize: int) -> str:
    return json.dumps([asdict(measure(model, context, itemsize)) for model in models], indent=1)
