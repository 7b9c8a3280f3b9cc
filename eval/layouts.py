"""The page docs/layouts.md and its pictures, made from the plans of layouts and of released models.

`python eval/readme.py` writes them. A picture carries the digest of what it shows, which a test compares.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from arch import ModelConfig, Plan, StackPlan, resolve
from arch.footprint import kv_bytes
from arch.named import CONFIGS, load_arch, load_size
from eval.families import FAMILIES, Family, family
from eval.readme import CONTEXT, SIZE, committed, description
from eval.released import Released, load, released_names
from eval.units import bytes_text, number_text

PAGE = CONFIGS.parent / "docs" / "layouts.md"
PICTURES = PAGE.with_suffix("")
RELEASED = "released"
COLUMNS = 120
HEAD = f"""# Layouts, by idea

A guide to choosing one. A layout's plan decides its family, whatever its name. Figures are those of the `{SIZE}` size
in bf16, at {CONTEXT:,} tokens of context; `python eval/footprint.py +size={SIZE} +arch=NAME` draws any layout.

A map gives for each layer the number of the layer whose store it reads; `s` marks a window, `c` a chunk, `p` pooled
positions, `b` a bounded store, `d` a matrix per head; after `/` comes the layer whose values it reads, after `+` one
whose keys and values are mixed in.

<!-- layouts: python eval/readme.py -->
"""
BESIDE = """
## Released models

The figures of `python eval/footprint.py hf=all`: computed from the models' configurations, for one sequence in bf16.
Windows count the current position.
"""


def page(layouts: dict[str, Plan], models: Sequence[Released]) -> str:
    """The Markdown of the page."""
    parts = [HEAD]
    for each in FAMILIES:
        parts.append(section(each, {name: plan for name, plan in layouts.items() if family(plan) is each}, models))
    rows = [released_row(model) for model in sorted(models, key=lambda model: -stored(model.plan))]
    header = "| model | family | bytes per token | constant | stored | read per decoded token |\n"
    parts += [BESIDE, f"\n![{RELEASED}](layouts/{RELEASED}.png)\n\n", header, "|---|---|---:|---:|---:|---:|\n", *rows]
    return "".join(parts)


def section(of: Family, layouts: dict[str, Plan], models: Sequence[Released]) -> str:
    text = f"\n## {of.title}\n\n{fill(of.idea, COLUMNS)}\n\n"
    if of.example in layouts:
        text += f"![{of.example}](layouts/{of.example}.png)\n\n"
    text += "| `+arch=` | what it is | bytes per token | stored | read | map |\n|---|---|---:|---:|---:|---|\n"
    for name, plan in sorted(layouts.items(), key=lambda item: (-stored(item[1]), item[0])):
        kv = kv_bytes(plan, CONTEXT)
        figures = (number_text(kv.per_token), bytes_text(kv.stored), bytes_text(kv.read))
        maps = " / ".join(f"`{stack.plan}`" for stack in plan.stacks)
        text += f"| `{name}` | {description(name)} | {' | '.join(figures)} | {maps} |\n"
    shown = [f"`{model.name}`" for model in models if family(model.plan) is of]
    names = fill(f"Released models: {', '.join(shown)}.", COLUMNS, break_on_hyphens=False)
    return text + (f"\n{names}\n" if shown else "")


def released_row(model: Released) -> str:
    kv = kv_bytes(model.plan, CONTEXT)
    constant = bytes_text(kv.constant) if kv.constant else "-"
    cells = (number_text(kv.per_token), constant, bytes_text(kv.stored), bytes_text(kv.read))
    return f"| `{model.name}` | {family(model.plan).title} | {' | '.join(cells)} |\n"


def stored(plan: Plan) -> int:
    return kv_bytes(plan, CONTEXT).stored


def plans() -> dict[str, Plan]:
    """The layouts that git tracks, at `SIZE`."""
    return {name: resolve(ModelConfig(load_arch(name), load_size(SIZE))) for name in committed()}


def shown(stack: StackPlan) -> list[Any]:
    """Plain data of everything that the drawing of a stack shows."""
    context = stack.num_positions(CONTEXT)
    # A change of the drawing itself is no change of what it shows: delete docs/layouts to have all drawn anew.
    stores = [
        (each.name, each.owner, each.retention, each.sinks, each.nbytes(context, 2)) for each in stack.plan.stores
    ]
    own: list[Any] = [each for each in (stack.plan.reader_windows, stack.plan.second_reads) if each]
    return [stack.title, stack.unit, context, stack.plan.owners, stores, *own]


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def pictures(layouts: dict[str, Plan], models: Sequence[Released]) -> dict[str, tuple[str, Callable[[Path], object]]]:
    """Map each picture's name to the digest of what it shows and the function that draws it."""
    from eval.plots.plan import draw_plan
    from eval.plots.released import draw_released

    result: dict[str, tuple[str, Callable[[Path], object]]] = {}
    for each in FAMILIES:
        if each.example in layouts:
            plan = layouts[each.example]

            def draw(path: Path, plan: Plan = plan, name: str = each.example) -> None:
                draw_plan(plan, f"{name} at {SIZE}", CONTEXT, path=path)

            result[each.example] = (digest(each.example, [shown(stack) for stack in plan.stacks]), draw)
    groups: list[tuple[str, Mapping[str, Plan]]] = [
        ("released models", {model.name: model.plan for model in models}),
        (f"layouts at {SIZE}", layouts),
    ]
    ends = {name: (stored(plan), family(plan).title) for _, group in groups for name, plan in group.items()}
    result[RELEASED] = (digest(ends), lambda path: draw_released(groups, CONTEXT, path))
    return result


def mark(path: Path) -> str:
    """The digest in a picture; empty if there is none."""
    if not path.is_file():
        return ""
    _, found, rest = path.read_bytes().partition(b"Shows\x00")
    return rest[:16].decode("ascii", "replace") if found else ""


def put_mark(path: Path, text: str) -> None:
    """Write a digest into a picture in PNG, as a text chunk before its data."""
    data = path.read_bytes()
    start = 8 + 25  # signature, header chunk
    chunk = b"tEXtShows\x00" + text.encode()
    framed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(data[:start] + framed + data[start:])


def write() -> list[Path]:
    """Write the page, and the pictures that show something else than they should. Return the files that changed."""
    layouts, models = plans(), [load(name) for name in released_names()]
    changed = []
    text = page(layouts, models)
    if not PAGE.is_file() or PAGE.read_text() != text:
        PAGE.write_text(text)
        changed.append(PAGE)
    PICTURES.mkdir(exist_ok=True)
    drawn = pictures(layouts, models)
    for name, (seen, draw) in drawn.items():
        path = PICTURES / f"{name}.png"
        if mark(path) != seen:
            draw(path)
            put_mark(path, seen)
            changed.append(path)
    for path in PICTURES.glob("*.png"):
        if path.stem not in drawn:
            path.unlink()
            changed.append(path)
    return changed
