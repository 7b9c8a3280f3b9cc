"""What compressed stores hold, and its bytes, without torch.

Tokens leave the newest, which are whole, in blocks; a block is stored as integers with scales and zeros. Where the
cache of a store holds every position its blocks lie in order, else in a ring. A matrix per head is one block, which is
stored anew after every step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from ..block_plan import Plan
from ..footprint import cross_bytes
from ..plan import KVPlan, StackPlan
from ..store_spec import StoreSpec
from .method import BY_CONTENT, Budget, CacheMethod, CodecSpec, KeepSpec

SCALE_BYTES = 2  # scales and zeros are fp16
POSITION_BYTES = 4  # positions of kept slots, or numbers of kept channels, are int32
SCORE_BYTES = 4  # sums of attention are fp32, or of the wider type of a cache
COUNT_BYTES = 2  # counts of heads are int16


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a store.

    shape   of one position
    limit   the most tokens that it must hold
    window  None: it holds every position
    codec   None: it is stored whole
    fixed   nothing is added to it after it was first written
    block   tokens that are stored at a time: of a group over tokens, else 1
    group   elements of the last axis that share a scale; 1 where `block` tokens do
    """

    shape: tuple[int, ...]
    limit: int
    window: int | None
    codec: CodecSpec | None
    block: int
    group: int
    fixed: bool = False

    @property
    def recent(self) -> int:
        """The newest tokens, which are always whole."""
        if self.codec is None:
            return self.limit
        return 0 if self.fixed else min(self.limit, self.codec.recent)

    @property
    def whole(self) -> int:
        """Slots of whole tokens: the newest, and those of a block that is not yet complete."""
        if self.fixed and self.codec is not None:
            return self.limit % self.block
        return min(self.limit, self.recent + self.block - 1)

    @property
    def blocks(self) -> int:
        """Slots of blocks; none where a window has room among the whole tokens."""
        if self.codec is None or (self.window is not None and self.whole == self.limit):
            return 0
        most = (self.limit - self.recent) // self.block
        if self.window is None:
            return max(0, most)
        looked = self.window - 1 - self.recent  # tokens before the newest that the next token sees
        return max(0, -(-looked // self.block))  # the last block ends where whole tokens begin

    @property
    def packed_bytes(self) -> int:
        """Bytes of the last axis of one position, without scales."""
        assert self.codec is not None
        return -(-self.shape[-1] * self.codec.bits // 8)

    @property
    def groups(self) -> int:
        """Scales of the last axis, of a token or of a block."""
        return -(-self.shape[-1] // self.group)

    @property
    def scales(self) -> int:
        """Numbers of a group besides its elements: a scale, and a zero where they are integers."""
        assert self.codec is not None
        return {"bf16": 0, "fp8": 1}.get(self.codec.name, 2)

    def nbytes(self, itemsize: int) -> int:
        """Bytes of one sequence."""
        heads = math.prod(self.shape[:-1])
        total = self.whole * heads * self.shape[-1] * itemsize
        if self.codec is not None:
            per_block = self.block * self.packed_bytes + self.scales * self.groups * SCALE_BYTES
            total += self.blocks * heads * per_block
        return total


def tensor_layouts(
    store: StoreSpec, codec: CodecSpec | None, capacity: int, window: int | None = None, fixed: bool = False
) -> tuple[TensorLayout, ...]:
    """Layouts of the tensors of a store that is read by a mask, of up to `capacity` tokens of which the next one sees
    no more than `window`, itself included. Keys and values, or the latent, are coded; a rotary key for all heads is
    whole."""
    limit = capacity if window is None else min(capacity, window)
    window = window if window is not None and window < capacity else None
    layouts = []
    for index, shape in enumerate(store.position_shapes):
        coded = None if index == 1 and not store.slot.v_dim else codec
        by_channel = coded is not None and coded.keys == "channel" and index == 0 and not store.slot.latent_dim
        block = coded.group if by_channel and coded is not None else 1
        group = 1 if by_channel or coded is None else min(coded.group, shape[-1])
        layouts.append(TensorLayout(shape, limit, window, coded, block, group, fixed))
    return tuple(layouts)


def state_layout(store: StoreSpec, codec: CodecSpec | None) -> TensorLayout | None:
    """Layout of a state that is coded, of groups along its last axis; None: the store is read by a mask, or its state
    stays whole.

    Where errors of rounding do not fade, as in the slots of a bounded store, they add up.
    """
    if codec is None or not store.fades:
        return None
    shape = store.cache_tensors(0)[0].shape
    return TensorLayout(shape, 1, None, codec, 1, min(codec.group, shape[-1]), fixed=True)


def coded_layouts(store: StoreSpec, codec: CodecSpec) -> list[TensorLayout]:
    """Layouts of what `codec` codes of a store; none where it leaves the store as it is."""
    if store.masked:
        return [layout for layout in tensor_layouts(store, codec, 1) if layout.codec]
    state = state_layout(store, codec)
    return [] if state is None else [state]


def keeps(store: StoreSpec, keep: KeepSpec | None = None) -> bool:
    """Return whether a keep acts on a store: on those that hold every position, or with windows=true a window."""
    windows = keep is not None and keep.options.get("windows", False)
    return store.masked and (store.window is None or windows)


@dataclass(frozen=True)
class Kept:
    """Slots of a store after a keep acted on a prompt.

    chosen  slots for positions that were chosen, which may differ between rows and heads
    newest  tokens at the end of the prompt that stay in any case; later tokens follow them
    window  later tokens push out the earlier of those: tokens that a query sees; None: they do not
    channels  of a key that stay in the chosen slots, which are then all but the newest; 0: all
    salient  of the chosen slots, those that have 4 bits, where the others have 2
    group   elements of a group in both
    recent  newest of all tokens, which stay whole, where those before them have 4 bits
    page    tokens of a page, which all are in another memory once `newest` follow them; 0: there are none
    resident, sinks, topk  pages that are in this memory, too; the first, which always are; those that queries recall
    every   tokens after the newest for which there is room until the keep acts again; 0: it acts once
    rows    numbers for each slot and head that tell the keep then what to choose, of `row_bytes` bytes
    """

    chosen: int
    newest: int
    window: int | None = None
    channels: int = 0
    salient: int = 0
    group: int = 0
    recent: int = 0
    page: int = 0
    resident: int = 0
    sinks: int = 0
    topk: int = 0
    every: int = 0
    rows: int = 0
    row_bytes: int = 0


def kept_slots(store: StoreSpec, method: CacheMethod, prompt: int, itemsize: int, capacity: int) -> Kept | None:
    """Slots of a store for `capacity` tokens after the keep of `method` acted on a prompt; None: everything stays, now
    and later.

    Where the text decides, `chosen` is that of an even budget (PrefixKV), or the most that there can be (CORM). Raises
    ValueError where a budget in bytes holds no slot.
    """
    keep = method.keep
    assert keep is not None
    if keep.name == "think":
        recent, width = keep.options["recent"], store.slot.k_dim
        channels = max(2, int(width * (1 - keep.options["ratio"])) // 2 * 2)
        return None if prompt <= recent or channels >= width else Kept(prompt - recent, recent, None, channels)
    if keep.name == "xkv":
        recent = keep.options["recent"]
        return None if prompt <= recent else Kept(prompt - recent, recent)
    if keep.name == "zipcache":
        recent, chosen = keep.options["recent"], prompt - keep.options["recent"]
        salient = max(0, int(chosen * keep.options["salient"]))
        return None if chosen < 1 else Kept(chosen, recent, None, 0, salient, keep.options["group"], recent)
    every = keep.options.get("every", 0)
    if store.window is not None:
        prompt, capacity = min(prompt, store.window), min(capacity, store.window)
    if keep.name == "corm":
        newest = keep.options["window"]
        if store.window is not None and newest + every >= capacity:
            return None
        if prompt <= newest and (not every or not prompt or newest + every >= capacity):
            return None
        rows = newest if every else 0
        return Kept(max(0, prompt - newest), newest, every=every, rows=rows, row_bytes=COUNT_BYTES)
    assert keep.budget is not None
    in_bytes = keep.budget.unit == "bytes"
    budget = tokens_of_bytes((store,), method, itemsize, capacity) if in_bytes else keep.budget.tokens(prompt)
    if keep.name == "arkvale":
        kept = pages_of_budget(keep, budget)
        return None if budget >= capacity or kept.resident >= pages_of(kept, capacity) else kept
    if store.window is not None and budget + every >= capacity:  # more slots than those of the window
        return None
    if budget >= prompt and (not every or not prompt or budget + every >= capacity):
        return None
    return slots_of_budget(keep, budget, itemsize, prompt)


def slots_of_budget(keep: KeepSpec, budget: int, itemsize: int, prompt: int) -> Kept:
    """Slots of `budget` tokens of a prompt."""
    options = keep.options
    if keep.name == "arkvale":
        return pages_of_budget(keep, budget)
    if keep.name == "streaming":
        sinks = min(options["sinks"], budget - 1)
        return Kept(sinks, budget - sinks, budget - sinks)
    protected = options["window" if "window" in options else "recent"]
    newest = min(max(protected, options.get("ring", 0)), max(1, budget // 2), prompt - 1)
    if not options.get("every"):
        return Kept(budget - newest, newest, newest if "ring" in options else None)
    rows = {"h2o": 1, "prefixkv": 1, "snapkv": protected, "scissorhands": options.get("history", 0)}.get(keep.name, 0)
    row_bytes = COUNT_BYTES if keep.name == "scissorhands" else max(SCORE_BYTES, itemsize)
    return Kept(budget - newest, newest, every=options["every"], rows=rows, row_bytes=row_bytes)


@lru_cache(maxsize=256)
def tokens_of_bytes(stores: tuple[StoreSpec, ...], method: CacheMethod, itemsize: int, capacity: int) -> int:
    """The most tokens of a prompt of which all stores together hold no more bytes than the budget of `method`; as many
    as `capacity` where it holds that.

    A ring is counted whole, room for later tokens is not. Raises ValueError if a single token is too much, and names
    the least that is not.
    """
    keep, codec = method.keep, method.codec
    assert keep is not None and keep.budget is not None
    amount = math.floor(keep.budget.amount)
    if sum(whole_bytes(store, codec, capacity, itemsize) for store in stores) <= amount:
        return capacity
    options = keep.options

    def whole_from(store: StoreSpec) -> int:
        """Tokens from which on everything stays: a window has no more slots than these and those of `every`."""
        return capacity if store.window is None else min(store.window, capacity) - options.get("every", 0)

    def held(tokens: int) -> int:
        kept, total = slots_of_budget(keep, tokens, itemsize, tokens + 1), 0
        prompts = (capacity,) if kept.window is None else (capacity, capacity - 1)  # a token has left the ring, or none
        for store in stores:
            if tokens >= whole_from(store):
                total += whole_bytes(store, codec, capacity, itemsize)
            else:
                total += max(kept_bytes(store, codec, kept, capacity, prompt, itemsize) for prompt in prompts)
        return total

    # From `begin` on, `period` more tokens always are as many bytes more: those of a block, or of a page, until a
    # window is whole. Below it the newest tokens and the pages have less than their number or size.
    if keep.name == "arkvale":
        period = options["page"]
        begin = max(4 * period, 2 * (options["recent"] + period))
    else:
        period = max(layout.block for store in stores for layout in tensor_layouts(store, codec, 1))
        newest = max(options.get(key, 0) for key in ("sinks", "recent", "window", "ring"))
        begin = 2 * newest + 2 * period + (codec.recent if codec else 0)
    last = max(1, capacity - 1)
    begin = max(1, min(begin, last))
    edges = {whole_from(store) for store in stores if begin < whole_from(store) <= last}
    bytes_of: dict[int, int] = {}
    end = last
    for first in sorted({begin, *edges}, reverse=True):
        sizes = {tokens: held(tokens) for tokens in range(first, min(first + period, end) + 1)}
        more = max(1, held(first + period) - sizes[first])
        most = [n + min((amount - size) // more, (end - n) // period) * period for n, size in sizes.items()]
        fitting = [tokens for tokens, size in zip(most, sizes.values(), strict=True) if size <= amount]
        if fitting:
            return int(max(fitting))
        bytes_of, end = bytes_of | sizes, first - 1
    for tokens in range(begin - 1, 0, -1):
        bytes_of[tokens] = held(tokens)
        if bytes_of[tokens] <= amount:
            return tokens
    names = " and ".join(store.name for store in stores)
    least = f"{min(bytes_of.values())}B" + ("-total" if keep.budget.unit == "total" else "")
    digests = f", which has digests of all pages of {capacity:,} tokens" if keep.name == "arkvale" else ""
    raise ValueError(
        f"{method.text}: too little for a slot of store {names}{digests}; the least is {keep.name}@{least}"
    )


def pages_of_budget(keep: KeepSpec, budget: int) -> Kept:
    """Pages of `budget` resident tokens, a quarter of it at most each, besides the newest and those of a page that is
    not closed yet."""
    options = keep.options
    page = min(options["page"], max(1, budget // 4))
    newest = min(options["recent"], max(0, budget // 2 - page))
    resident = max(0, (budget - newest - page) // page)
    sinks = min(-(-options["sinks"] // page), resident // 2)
    topk = min(options["topk"] or max(1, (resident - sinks) // 2), resident - sinks)
    return Kept(0, newest, page=page, resident=resident, sinks=sinks, topk=topk)


def pages_of(kept: Kept, capacity: int) -> int:
    """Pages that are closed after `capacity` tokens."""
    return max(0, capacity - kept.newest) // kept.page


def page_layouts(store: StoreSpec, codec: CodecSpec | None, kept: Kept) -> tuple[TensorLayout, ...]:
    """Layouts of a page."""
    return tensor_layouts(store, codec, kept.page, fixed=True)


def page_ring(store: StoreSpec, kept: Kept, capacity: int) -> tuple[TensorLayout, ...]:
    """Layouts of the newest tokens, those of no closed page, which are whole."""
    return tensor_layouts(store, None, capacity, kept.newest + kept.page)


def offloads(method: CacheMethod | None) -> bool:
    """Return whether a method holds tokens in another memory."""
    return method is not None and method.keep is not None and method.keep.name == "arkvale"


def of_stack(method: CacheMethod, stack: StackPlan) -> CacheMethod:
    """The part of `method` for one stack: within a block its codec alone, since a keep acts on a prompt's positions."""
    return method if stack.fixed_positions is None else CacheMethod(method.text, method.codec)


def with_budget(plan: KVPlan, method: CacheMethod, itemsize: int, capacity: int) -> CacheMethod:
    """The method with the budget of each store, where it has one for all stores of `plan` on which the keep acts: as
    many tokens of each."""
    keep = method.keep
    if keep is None or keep.budget is None or keep.budget.unit != "total":
        return method
    stores = tuple(store for store in plan.stores if keeps(store, keep))
    if not stores:
        return method
    tokens = tokens_of_bytes(stores, method, itemsize, capacity)
    return replace(method, keep=replace(keep, budget=Budget("tokens", Fraction(tokens))))


def has_formula(method: CacheMethod) -> bool:
    """Return whether bytes follow from the length of the prompt, and not from its text alone."""
    return method.keep is None or method.keep.name not in BY_CONTENT or method.keep.budget is not None


def acts(store: StoreSpec, method: CacheMethod, capacity: int, itemsize: int) -> bool:
    """Return whether the keep of `method`, if it has one, drops something of some prompt of up to `capacity` tokens, or
    of what follows it."""
    if method.keep is None or not keeps(store, method.keep):
        return False
    return any(kept_slots(store, method, prompt, itemsize, capacity) for prompt in (1, capacity))


def position_heads(store: StoreSpec) -> int:
    """Heads whose kept positions may differ; one where something is cached for all heads."""
    return 1 if store.slot.rope_dim else store.slot.kv_heads or 1


def later_slots(kept: Kept, capacity: int, prompt: int) -> int:
    """Tokens for which there is room besides the chosen slots, or that pass through a ring."""
    later = capacity - prompt + kept.newest
    return min(later, kept.newest + kept.every) if kept.every else later


def kept_layouts(
    store: StoreSpec, codec: CodecSpec | None, kept: Kept, capacity: int, prompt: int
) -> tuple[tuple[TensorLayout, ...], ...]:
    """Layouts of the chosen slots, which may be two parts, and of the newest with later tokens, for up to `capacity`
    tokens in all."""
    later = later_slots(kept, capacity, prompt)
    if kept.group:
        four, two = (CodecSpec(name, kept.group, kept.recent, "channel") for name in ("int4", "int2"))
        return (
            tensor_layouts(store, four, kept.salient, fixed=True),
            tensor_layouts(store, two, kept.chosen - kept.salient, fixed=True),
            tensor_layouts(store, four, later),
        )
    narrow = replace(store, slot=replace(store.slot, k_dim=kept.channels)) if kept.channels else store
    return (
        tensor_layouts(narrow, codec, kept.chosen, fixed=True),
        tensor_layouts(store, codec, later, kept.window),
    )


def store_bytes(
    store: StoreSpec,
    method: CacheMethod,
    capacity: int,
    prompt: int | None,
    itemsize: int,
    chosen: int | None = None,
) -> int:
    """Bytes of one store of one sequence; `prompt` None: before compression, else after that of as many tokens.

    `chosen`: slots that the cache chose, where that depends on the text.
    """
    if not store.masked:
        state = state_layout(store, method.codec)
        if state is None:
            return store.nbytes(capacity, itemsize)
        others = store.cache_tensors(capacity)[1:]
        return state.nbytes(itemsize) + sum(tensor.nbytes(itemsize) for tensor in others)
    kept = None
    if prompt is None and acts(store, method, capacity, itemsize):  # whole until it is compressed
        return store.nbytes(capacity, itemsize)
    if prompt is not None and method.keep is not None and keeps(store, method.keep):
        kept = kept_slots(store, method, prompt, itemsize, capacity)
    if kept is None:
        return whole_bytes(store, method.codec, capacity, itemsize)
    assert prompt is not None and method.keep is not None
    if method.keep.name == "xkv":  # besides what `group_bytes` counts
        layouts = tensor_layouts(store, method.codec, capacity - prompt + kept.newest)
        return sum(layout.nbytes(itemsize) for layout in layouts)
    if chosen is not None:
        kept = replace(kept, chosen=chosen)
    return kept_bytes(store, method.codec, kept, capacity, prompt, itemsize)


def whole_bytes(store: StoreSpec, codec: CodecSpec | None, capacity: int, itemsize: int) -> int:
    """Bytes of one store of one sequence of which no keep lets go of anything."""
    if codec is None:
        return store.nbytes(capacity, itemsize)
    return sum(layout.nbytes(itemsize) for layout in tensor_layouts(store, codec, capacity, store.window))


def kept_bytes(store: StoreSpec, codec: CodecSpec | None, kept: Kept, capacity: int, prompt: int, itemsize: int) -> int:
    """Bytes of `kept`, of one store of one sequence, and of what the keep holds beside it."""
    if kept.page:
        pages = kept.resident * sum(layout.nbytes(itemsize) for layout in page_layouts(store, codec, kept))
        newest = sum(layout.nbytes(itemsize) for layout in page_ring(store, kept, capacity))
        digests = pages_of(kept, capacity) * 2 * math.prod(store.position_shapes[0]) * itemsize
        return pages + newest + digests + kept.resident * POSITION_BYTES
    parts = kept_layouts(store, codec, kept, capacity, prompt)
    numbers = (kept.channels or kept.chosen) * POSITION_BYTES
    if kept.rows:
        numbers += kept.rows * (kept.chosen + later_slots(kept, capacity, prompt)) * kept.row_bytes
    return numbers * position_heads(store) + sum(layout.nbytes(itemsize) for part in parts for layout in part)


def sharing_groups(plan: KVPlan, method: CacheMethod) -> list[tuple[StoreSpec, ...]]:
    """Stores of `plan` that share bases in xKV: neighbours among those that hold every position, each kind by itself;
    none with another keep."""
    if method.keep is None or method.keep.name != "xkv":
        return []
    groups: list[tuple[StoreSpec, ...]] = []
    size = method.keep.options["stores"]
    for store in filter(keeps, plan.stores):
        if groups and len(groups[-1]) < size and tensors_of(groups[-1][0]) == tensors_of(store):
            groups[-1] = (*groups[-1], store)
        else:
            groups.append((store,))
    return groups


def tensors_of(store: StoreSpec) -> tuple[str, int, bool]:
    """Key of the tensors of a position, whatever their widths: equal for stores that may share bases."""
    return store.kind, len(store.position_shapes), bool(store.slot.v_dim)


def ranks(stores: Sequence[StoreSpec], keep: KeepSpec, tokens: int) -> tuple[int, ...]:
    """Rank in which each tensor of a group is kept, of its first `tokens` tokens; 0 of a rotary key for all
    heads, which is whole."""
    found = []
    for index in range(len(stores[0].position_shapes)):
        width = sum(math.prod(store.position_shapes[index]) for store in stores)
        share = keep.options["rank_v" if index else "rank_k"]
        found.append(0 if index and not stores[0].slot.v_dim else max(1, int(min(tokens, width) * share)))
    return tuple(found)


def basis_layout(rank: int, tokens: int, codec: CodecSpec | None) -> TensorLayout:
    """Layout of a basis of `tokens` tokens, which has no channels of its own: a codec's groups are of one token."""
    return TensorLayout((rank,), tokens, None, codec, 1, min(codec.group, rank) if codec else 1, fixed=True)


def group_bytes(stores: Sequence[StoreSpec], method: CacheMethod, capacity: int, prompt: int, itemsize: int) -> int:
    """Bytes of bases and matrices of a group after a prompt of `prompt` tokens, of one sequence."""
    assert method.keep is not None
    kept = kept_slots(stores[0], method, prompt, itemsize, capacity)
    if kept is None:
        return 0
    total = 0
    for index, rank in enumerate(ranks(stores, method.keep, kept.chosen)):
        width = sum(math.prod(store.position_shapes[index]) for store in stores)
        basis = basis_layout(rank, kept.chosen, method.codec).nbytes(itemsize) if rank else 0
        total += basis + (rank or kept.chosen) * width * itemsize
    return total


def stack_bytes(
    stack: StackPlan,
    method: CacheMethod,
    capacity: int,
    prompt: int | None,
    itemsize: int,
    chosen: Sequence[int | None] | None = None,
) -> int:
    """`compressed_bytes` of one stack of one sequence; `capacity` and `prompt` in tokens."""
    plan, capacity = stack.plan, stack.num_positions(capacity)
    prompt = None if prompt is None else stack.num_positions(prompt)
    method = with_budget(plan, of_stack(method, stack), itemsize, capacity)
    chosen = None if method.keep is None else chosen
    stores = sum(
        store_bytes(store, method, capacity, prompt, itemsize, count)
        for store, count in zip(plan.stores, chosen or [None] * len(plan.stores), strict=True)
    )
    shared = 0
    if prompt is not None:
        groups = sharing_groups(plan, method)
        shared = sum(group_bytes(group, method, capacity, prompt, itemsize) for group in groups)
    return stores + shared + cross_bytes(stack, itemsize)


def compressed_bytes(
    plan: Plan,
    method: CacheMethod,
    batch: int,
    capacity: int,
    *,
    prompt: int | None = None,
    itemsize: int = 2,
    chosen: Sequence[int | None] | None = None,
) -> int:
    """Bytes of the tensors of a compressed cache for `batch` sequences of up to `capacity` tokens.

    `prompt` None: before `compress`; else after it, called when the cache held as many tokens. A Block Transformer's
    keep acts on its block decoder, whose positions are blocks. Where the text decides how many slots there are, tests
    give `chosen`, `CompressedCache.chosen_slots`; without, PrefixKV has the bytes of an even budget, of which it takes
    no more.

    Raises ValueError where the text decides and `chosen` is missing (CORM).
    """
    if method.keep is None or method.keep.name not in BY_CONTENT:
        chosen = None
    elif prompt is not None and chosen is None and not has_formula(method):
        raise ValueError(f"{method.text}: bytes depend on the text, not on its length alone; measure them")
    return batch * sum(stack_bytes(stack, method, capacity, prompt, itemsize, chosen) for stack in plan.stacks)


def offloaded_bytes(
    plan: Plan, method: CacheMethod, batch: int, capacity: int, *, prompt: int, itemsize: int = 2
) -> int:
    """Bytes that a compressed cache has in another memory, besides `compressed_bytes`, after a prompt, as tests compare
    them with a cache; an evaluation measures them."""
    total = 0
    for stack in plan.stacks:
        slots = stack.num_positions(capacity)
        own = with_budget(stack.plan, of_stack(method, stack), itemsize, slots)
        if own.keep is None:
            continue
        for store in filter(keeps, stack.plan.stores):
            kept = kept_slots(store, own, stack.num_positions(prompt), itemsize, slots)
            if kept is not None and kept.page:
                layouts = page_layouts(store, method.codec, kept)
                total += pages_of(kept, slots) * sum(layout.nbytes(itemsize) for layout in layouts)
    return batch * total
