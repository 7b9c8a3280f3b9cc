"""Parameters, FLOPs and KV cache of every layout: `python eval/footprint.py +size=1b context=32768`. See --help."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from arch import ArchConfig, KVPlan, LayoutError, ModelConfig, Plan, SizeConfig, StackPlan, StoreSpec, resolve
from arch.footprint import (
    cross_bytes,
    kv_bytes,
    max_batch,
    num_params,
    prefill_flops,
    train_flops_per_token,
)
from arch.named import load_arch, names
from data.cli import UsageError
from eval.cli import Choices, launch, require
from eval.console import PlainConsole
from eval.released import load, released_names
from eval.released.report import MEANING as RELEASED_MEANING
from eval.released.report import as_json
from eval.released.report import remarks as model_remarks
from eval.released.report import table as table_of_released
from eval.remarks import remarks
from eval.units import bytes_text, count_text, counted, number_text, parse_bytes

PICTURE = "runs/footprint/<arch>-<size>.png"  # of which git ignores the folder
RELEASED_CONTEXT = 32768
MEANING = """\
FLOPs/token: forward and backward. Prefill FLOPs: a prompt of that many tokens, for the logits of the next one alone.
Largest batch: sequences whose caches fit into the memory beside the weights.
KV per token: bytes that each further token adds. KV constant: what no context changes, once windows are full.
KV stored: the cache of one sequence. KV read: what decoding one token fetches from it, over all layers."""
STORES_MEANING = """\
A layer writes a store; layers that reuse it read the same one. Slot: elements of one position, heads x (keys + values);
1 of n: one slot pools n positions; where slots are counted, positions are merged into that many; a state is a matrix
per head, heads x (key x value)."""


@dataclass
class FootprintConfig:
    """The command line.

    context   tokens per sequence; null: the size's seq_len, of released models 32,768
    memory    device memory that weights and the largest batch must fit into
    itemsize  bytes per element of cache and weights
    json      print a JSON list instead of the table
    picture   file of the ownership map of +arch; null: none
    hf        figures of a released model from its configuration alone, instead of +size and +arch: a config.json, a
              folder with one, a name of the hub (from its cache, or the network), or one of configs/released; [a,b] or
              all (those of configs/released) for a table. A model_type or a key that is not understood is refused; no
              code of a model is run
    size      one item of the size
    arch      one item of the layout
    """

    arch: ArchConfig = field(default_factory=ArchConfig)
    size: SizeConfig = field(default_factory=SizeConfig)
    context: int | None = None
    memory: str = "80GB"
    itemsize: int = 2
    json: bool = False
    picture: str | None = PICTURE
    hf: str | None = None


@dataclass(frozen=True)
class Footprint:
    """Costs of one architecture; bytes are of one sequence, as in `arch.footprint.KVBytes`.

    prefill_flops  of a prompt of `context` tokens; of a Block Transformer that needs more, of the shortest it takes
    """

    arch: str
    num_params: int
    flops_per_token: float
    kv_bytes_per_token: float
    kv_bytes_constant: int
    kv_bytes_stored: int
    kv_bytes_read: float
    context: int
    max_batch: int
    prefill_flops: int


def measure(name: str, config: ModelConfig, context: int, memory: float, itemsize: int) -> Footprint:
    """Raise LayoutError if the layout is impossible at this size."""
    plan = resolve(config)
    params, kv = num_params(config, plan), kv_bytes(plan, context, itemsize)
    return Footprint(
        arch=name,
        num_params=params,
        flops_per_token=train_flops_per_token(config, plan),
        kv_bytes_per_token=kv.per_token,
        kv_bytes_constant=kv.constant,
        kv_bytes_stored=kv.stored,
        kv_bytes_read=kv.read,
        context=context,
        max_batch=max_batch(plan, context, memory, params * itemsize, itemsize),
        prefill_flops=prefill_flops(config, plan, max(context, plan.min_prompt)),
    )


def table(rows: list[Footprint], size: str, memory: str, seq_len: int) -> Table:
    result = Table(title=f"{size}, one sequence of {rows[0].context:,} tokens", title_justify="left")
    result.add_column("arch", style="bold")
    for column in (
        "params",
        f"FLOPs/token\n(training, {seq_len:,})",
        f"prefill FLOPs\n({rows[0].context:,} tokens)",
        "KV per token\n(slope)",
        "KV constant\n(windows, slots,\ntoken decoder)",
        "KV stored\n(one sequence)",
        "KV read\n(one step)",
        f"largest batch\n({memory})",
    ):
        result.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: -row.kv_bytes_stored):
        result.add_row(
            row.arch,
            count_text(row.num_params),
            count_text(row.flops_per_token),
            count_text(row.prefill_flops),
            f"{number_text(row.kv_bytes_per_token)} B",
            bytes_text(row.kv_bytes_constant) if row.kv_bytes_constant else "-",
            bytes_text(row.kv_bytes_stored),
            bytes_text(row.kv_bytes_read),
            f"{row.max_batch:,}",
        )
    return result


def plan_tables(name: str, plan: Plan, context: int, itemsize: int) -> list[Table]:
    """One table for each stack of the model."""
    kv, titles = kv_bytes(plan, context, itemsize), [stack.title or name for stack in plan.stacks]
    if len(titles) > 1:
        titles[0] = (
            f"{name}: blocks of {plan.block_length} tokens, {number_text(kv.per_token)} B per token, "
            f"{bytes_text(kv.stored)} at {context:,} tokens\n{titles[0]}"
        )
    return [stack_table(title, stack, context, itemsize) for title, stack in zip(titles, plan.stacks, strict=True)]


def stack_table(title: str, stack: StackPlan, context: int, itemsize: int) -> Table:
    """Writers, readers and bytes of each store of a stack, after `context` tokens."""
    plan, unit, context = stack.plan, stack.unit, stack.num_positions(context)
    kv = kv_bytes(plan, context, itemsize)
    title = (
        f"{title}: {counted(len(plan.stores), 'store')} for {counted(plan.num_layers, 'layer')}, "
        f"{kv.per_token:,} B per {unit}, {bytes_text(kv.stored)} at {counted(context, unit)}"
    )
    if stack.num_cross_vectors:
        cross = bytes_text(cross_bytes(stack, itemsize))
        title = f"keys and values of a block's context, all layers: {cross}\n{title}"
    result = Table(title=title, title_justify="left")
    rows = fold(plan)
    columns = ["store", "number", "written by", "read by", "keeps", "slot", "bytes/slot", f"bytes at {context:,}"]
    sinks = any(store.sinks for store in plan.stores)
    for column in [*columns, *["sinks"] * sinks]:
        result.add_column(column, justify="right" if "bytes" in column or column == "number" else "left")
    for stores in rows:
        store, owners = stores[0], tuple(store.owner for store in stores)
        alone = all(
            (*plan.readers(store), *plan.second_readers(store)) == (store.owner,) and not plan.own_window(store.owner)
            for store in stores
        )
        readers = ranges(owners) if alone else "; ".join(readers_text(plan, store) for store in stores)
        result.add_row(
            store.name,
            str(len(stores)),
            ranges(owners),
            readers,
            " + ".join(text for text, _ in store.retention) or ("all" if store.grows else "a state"),
            store.slot_text,
            " + ".join(f"{size:,}" for size in store.slot_bytes(itemsize)),
            bytes_text(len(stores) * store.nbytes(context, itemsize)),
            *["yes" if store.sinks else "-"] * sinks,
        )
    return result


def fold(plan: KVPlan) -> list[list[StoreSpec]]:
    """The stores of `plan`, those that differ in nothing but their layers together."""
    rows: dict[tuple[StoreSpec, tuple[tuple[int, str], ...]], list[StoreSpec]] = {}
    for store in plan.stores:
        readers = tuple((layer - store.owner, text) for layer, text in reads_of(plan, store).items())
        rows.setdefault((replace(store, owner=0), readers), []).append(store)
    return list(rows.values())


def reads_of(plan: KVPlan, store: StoreSpec) -> dict[int, str]:
    """Layers that read `store`, and what they see of it where that is not all."""
    result = {}
    for layer in (*plan.readers(store), *plan.second_readers(store)):
        window, second = plan.own_window(layer), plan.second_read(layer)
        half = "keys" if store.owner == plan.owners[layer] else "values"
        seen = [] if second is None else ["mixed" if second.how == "mix" else half]
        seen += [] if window is None else [f"last {window:,}"]
        result[layer] = f" ({', '.join(seen)})" if seen else ""
    return result


def readers_text(plan: KVPlan, store: StoreSpec) -> str:
    """`0, 1-3 (last 256)` where layers 1 to 3 see so many of the positions of `store`; where they read two stores also
    `(keys)`, `(values)` or `(mixed)`."""
    layers: dict[str, list[int]] = {}
    for layer, text in reads_of(plan, store).items():
        layers.setdefault(text, []).append(layer)
    return ", ".join(ranges(tuple(numbers)) + text for text, numbers in layers.items())


def ranges(numbers: tuple[int, ...]) -> str:
    """`0-2, 5` for (0, 1, 2, 5)."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def main(config: DictConfig, choices: Choices) -> None:
    if config.hf is not None:
        show_released(config, choices)
        return
    require(size=choices.size)
    archs: dict[str, Any]
    if choices.arch is None:
        archs = {name: load_arch(name) for name in names("arch")}
    options = OmegaConf.to_object(config)
    assert isinstance(options, FootprintConfig)
    if choices.arch is not None:
        archs = {choices.arch: options.arch}
    context = options.size.seq_len if options.context is None else options.context
    check_counts(context, options.itemsize)
    try:
        memory = parse_bytes(options.memory)
    except ValueError as error:
        raise UsageError(str(error)) from error

    rows, refused = [], []
    found: dict[str, list[str]] = {}
    for name, arch in archs.items():
        try:
            rows.append(measure(name, ModelConfig(arch, options.size), context, memory, options.itemsize))
            found[name] = remarks(ModelConfig(arch, options.size))
        except LayoutError as error:
            if choices.arch is not None:
                raise
            refused.append(f"{name} is impossible at this size:\n{error}")
    print("\n".join(refused), file=sys.stderr, end="\n" if refused else "")
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    if not rows:
        raise LayoutError(["no architecture is possible at this size"])
    console = PlainConsole()
    console.print(table(rows, str(choices.size), options.memory, options.size.seq_len))
    console.print(MEANING)
    console.print("\n".join(by_remark(found)), end="\n" if any(found.values()) else "")
    if choices.arch is not None:
        plan = resolve(ModelConfig(options.arch, options.size))
        for each in plan_tables(choices.arch, plan, context, options.itemsize):
            console.print(each)
        console.print(STORES_MEANING)
        if options.picture:
            path = Path(options.picture.replace("<arch>", choices.arch).replace("<size>", str(choices.size)))
            path = drawn(plan, f"{choices.arch} at {choices.size}", context, options, path)
            console.print(f"ownership map: {path}")


def show_released(config: DictConfig, choices: Choices) -> None:
    """Print the figures of the models that `hf=` names; of a single one also its stores, and its picture."""
    if choices.arch or choices.size:
        raise UsageError(
            "hf= figures released models, which have layouts and sizes of their own; leave +arch= and +size= out"
        )
    options = OmegaConf.to_object(config)
    assert isinstance(options, FootprintConfig) and options.hf is not None
    context = RELEASED_CONTEXT if options.context is None else options.context
    check_counts(context, options.itemsize)
    given = options.hf.strip()
    names = (
        released_names() if given == "all" else [name.strip() for name in given.strip("[]").split(",") if name.strip()]
    )
    if not names:
        raise UsageError(f"hf={given} names no model; one of configs/released is {released_names()[0]}")
    models = [load(name) for name in names]
    if options.json:
        print(as_json(models, context, options.itemsize))
        return
    console = PlainConsole()
    console.print(table_of_released(models, context, options.itemsize))
    console.print(RELEASED_MEANING)
    if given == "all" or given.startswith("[") or len(models) > 1:
        return
    (model,) = models
    console.print("\n".join(model_remarks(model)), end="\n" if model_remarks(model) else "")
    for each in plan_tables(model.name, model.plan, context, options.itemsize):
        console.print(each)
    console.print(STORES_MEANING)
    if options.picture:
        file = f"{'--'.join(Path(model.name).parts[-2:])}.png".lstrip("/")
        path = Path(PICTURE).with_name(file) if options.picture == PICTURE else Path(options.picture)
        console.print(f"ownership map: {drawn(model.plan, model.name, context, options, path)}")


def check_counts(context: int, itemsize: int) -> None:
    if context < 1 or itemsize < 1:
        raise UsageError(f"context ({context}) and itemsize ({itemsize}) must be at least 1")


def drawn(plan: Plan, title: str, context: int, options: FootprintConfig, path: Path) -> Path:
    """Draw the ownership map to `path`, and return the file that it became. Raises UsageError if that cannot be."""
    path = path if path.suffix else path.with_name(f"{path.name}.png")  # as matplotlib calls it
    draw(plan, title, context, options.itemsize, path)
    return path


def by_remark(found: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each remark about a layout, with the layouts that it is true of."""
    names: dict[str, list[str]] = {}
    for name, lines in found.items():
        for line in lines:
            names.setdefault(line, []).append(name)
    return [f"{line}: {', '.join(of)}" for line, of in names.items()]


def draw(plan: Plan, title: str, context: int, itemsize: int, path: Path) -> None:
    """Draw the ownership map. Raises UsageError if `path` cannot be written."""
    from eval.plots.plan import draw_plan  # matplotlib takes a second to import

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_plan(plan, title, context, itemsize, path)
    except (OSError, ValueError) as error:  # an ending that is no format of pictures
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot write {path} ({reason}); give another file with picture=") from error


if __name__ == "__main__":
    launch(main, "footprint", FootprintConfig)
