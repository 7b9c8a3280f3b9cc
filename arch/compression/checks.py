"""What a cache method can act on: other plans are refused, and stores that it leaves alone are named."""

from ..block_plan import Plan
from ..plan import KVPlan
from .method import KEEPS, CacheMethod
from .storage import coded_layouts, keeps, kept_slots, of_stack, with_budget


def check_method(plan: Plan, method: CacheMethod) -> None:
    """Raises ValueError where `method` has nothing to act on in a cache of `plan`, or cannot."""
    for stack in plan.stacks:
        if stack.plan.reader_windows:
            own = next(layer for layer in range(stack.plan.num_layers) if stack.plan.own_window(layer))
            raise ValueError(
                f"{method.text}: layer {own} sees the last {stack.plan.own_window(own)} positions of store "
                f"{stack.plan.store(own).name}, and a compressed cache has no mask for windows of single layers: leave "
                "cache out, or the window out of arch.pattern"
            )
        check_second_reads(stack.plan, method)
    every = [store for stack in plan.stacks for store in stack.plan.stores]
    if method.codec is not None:
        coded = [(store, layout) for store in every for layout in coded_layouts(store, method.codec)]
        for store, layout in coded:
            if method.codec.hadamard and layout.shape[-1] % 2:
                raise ValueError(
                    f"{method.text}: store {store.name} has width {layout.shape[-1]}, and a Hadamard rotation needs an "
                    "even one; leave hadamard out"
                )
        if not coded:
            states = "" if every[0].grows else ": what each token changes would be rounded again at each, which adds up"
            raise ValueError(
                f"{method.text}: every store {every[0].summary}, and codecs act on tokens that are kept apart, and on "
                f"matrices per head{states}"
            )
    kept = [(stack.plan.stores, keep) for stack in plan.stacks if (keep := of_stack(method, stack).keep) is not None]
    acted = [store for stores, keep in kept for store in stores if keeps(store, keep)]
    if method.keep is not None and method.keep.name in ("think", "zipcache", "arkvale"):
        for store in acted:
            if store.slot.latent_dim or store.slot.rope_dim:
                has = "holds latents" if store.slot.latent_dim else "has keys of which a half is that of all heads"
                raise ValueError(
                    f"{method.text}: store {store.name} {has}, and {method.keep.name} compares queries with "
                    "keys, which are not there: take a codec"
                )
            if method.keep.name in ("think", "arkvale") and not store.slot.v_dim:
                what = "drops channels of keys alone" if method.keep.name == "think" else "moves keys and values"
                raise ValueError(
                    f"{method.text}: store {store.name} {store.summary}, and {method.keep.name} {what}: take a codec, "
                    "or another keep"
                )
    if method.keep is not None and not acted:
        able = [name for name, options in KEEPS.items() if "windows" in options]
        hint = f"; {', '.join(able)} act on windows with windows=true and every=16"
        pooled = any(store.pools for store in every)
        pools = " but by entries that pool positions" if pooled else ""
        raise ValueError(
            f"{method.text}: no store grows with the context{pools}, so that {method.keep.name} has nothing to act on"
            + (hint if any(store.masked for store in every) else "")
        )


def check_second_reads(plan: KVPlan, method: CacheMethod) -> None:
    """Raises ValueError where a layer reads two stores, of which `method` would keep other positions or channels."""
    keep = method.keep
    for layer, second in enumerate(plan.second_reads):
        if keep is None or second is None or not keeps(plan.stores[plan.reads[layer]], keep):
            continue
        one, other = plan.stores[plan.reads[layer]], plan.stores[second.store]
        in_bytes = keep.budget is not None and keep.budget.unit == "bytes"
        if keep.name == "streaming" and not (in_bytes and one.slot != other.slot):
            continue  # the same positions of both
        if keep.name == "xkv" or (keep.name == "think" and second.how == "values"):
            continue  # all positions of both; of what is taken from the other store no channel goes
        what = "channels" if keep.name == "think" else "positions"
        raise ValueError(
            f"{method.text}: layer {layer} reads stores {one.name} and {other.name} together, and {keep.name} would "
            f"keep other {what} of one than of the other; take a codec, or streaming with a budget of tokens"
        )


def left_alone(plan: Plan, method: CacheMethod, capacity: int, itemsize: int = 2) -> str:
    """Name the stores on which the keep of `method` does not act in a cache for `capacity` tokens, and why; empty: it
    has none, or acts on all."""
    if method.keep is None:
        return ""
    found, bounded = [], [store for stack in plan.stacks for store in stack.plan.stores if not store.masked]
    for stack in plan.stacks:
        own = with_budget(stack.plan, method, itemsize, stack.num_positions(capacity))
        for store in (store for store in stack.plan.stores if store.masked and store.window):
            window = store.window or 0
            if not keeps(store, method.keep):
                found.append(
                    f"store {store.name}, whose {'chunks have' if store.chunked else 'window is'} {window:,} tokens"
                )
            elif kept_slots(store, own, window, itemsize, window) is None:
                found.append(
                    f"store {store.name}, whose window of {window:,} tokens holds no more than what would stay"
                )
    found += [
        f"store {store.name}, which {store.summary}" if store.grows else f"store {store.name}, whose size is fixed"
        for store in bounded
    ]
    for stack in plan.stacks:
        if of_stack(method, stack).keep is None:
            found += [f"store {store.name} of a block's tokens" for store in stack.plan.stores if keeps(store)]
    return ", ".join(dict.fromkeys(found))
