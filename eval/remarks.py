"""Differences between a layout as it is written and as it is at a size: what was cut, and what coincides."""

import re
from collections.abc import Iterator

from arch import KVPlan, ModelConfig
from arch.block_plan import resolve, stack_configs
from arch.plan import allot_layers
from arch.store_spec import share_of
from eval.units import counted


def remarks(config: ModelConfig) -> list[str]:
    """A line for each window, chunk, stride, slots, tokens of a query scale or section that `size` cuts, each store
    type that no layer writes, and key/value heads that a layout gives as fewer than the query heads and are as many.
    `config` can be resolved."""
    stacks = zip(resolve(config).stacks, stack_configs(config), strict=True)
    return [
        f"{stack.title}: {line}" if stack.title else line
        for stack, part in stacks
        for line in _of_stack(part, stack.plan)
    ]


def _of_stack(config: ModelConfig, plan: KVPlan) -> Iterator[str]:
    most = config.size.max_window
    for name, store in config.arch.stores.items():
        scale = store.query_scale
        for what, number in (
            ("window", store.window),
            ("chunk", store.chunk),
            ("stride", store.stride),
            ("slots", store.slots),
            ("query_scale.tokens", None if scale is None or scale.slope == "learned" else scale.tokens),
        ):
            if number is not None and most is not None and number > most:
                yield f"{what} {number:,} of {name} cut to {most:,} by size.max_window"
    for number in dict.fromkeys(map(int, re.findall(r"\bwindow=(\d+)", str(config.arch.pattern)))):
        if most is not None and number > most:
            yield f"window={number:,} in arch.pattern cut to {most:,} by size.max_window"
    yield from _sections(config)
    yield from _store_types(config, plan)


def _sections(config: ModelConfig) -> Iterator[str]:
    sections = [entry for entry in config.arch.pattern if isinstance(entry, dict)]
    depth = config.size.num_layers
    for number, layers in enumerate(allot_layers(sections, depth, [])):
        wanted = share_of(sections[number].get("layers"), depth)
        if wanted is None and layers == 0:
            yield f"section {number}, the rest of {counted(depth, 'layer')}, has none"
        elif wanted is not None and layers < int(wanted):
            yield f"section {number} cut from {counted(int(wanted), 'layer')} to {layers} by size.num_layers {depth}"


def _store_types(config: ModelConfig, plan: KVPlan) -> Iterator[str]:
    written = {store.name: store for store in plan.stores}
    for name, store in config.arch.stores.items():
        heads = config.size.num_heads
        if name not in written:
            yield f"no layer writes {name} at size.num_layers {config.size.num_layers}"
        elif store.kv_heads not in (None, "all", "1/1") and heads > 1 and written[name].slot.kv_heads == heads:
            yield f"{name} has {heads} key/value heads for {heads} query heads: multi-head attention, as kv_heads=all"
