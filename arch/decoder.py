"""The decoder: a stack of blocks, whose loop hands an owner's slots to its readers as explicit tensors.

Shapes: B batch, T new tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attend import FLEX_ROWS, Mask, dense_backend
from .attend_step import step_mask
from .attention import build_reader, build_writer, choose_backends
from .buffers import KV, Buffer, Step
from .cache import Cache, allocate
from .config import ModelConfig, SizeConfig, style_of
from .cross_attention import CrossAttention, CrossContext
from .grouped import GroupedKV
from .language_model import Head, LanguageModel
from .layers import Rope, build_embedding, build_mlp, build_norm, compute_dtype, rope_table, step_rope
from .masks import Dense, SequenceBatch, Windowed, padded, rows_across, segment_starts
from .mixed import TwoKV
from .plan import KVPlan, resolve_stack
from .positions import TokenPositions
from .query_scale import query_table
from .static_step import StaticStep
from .store_spec import QueryScale, StoreSpec


class Block(nn.Module):
    """Attention, then the MLP; or, with parallel residuals, both on the same input. Norms apply to their inputs, their
    outputs, or both. The owner of a store also writes it.

    With `cross`, attention to the vectors of a CrossContext follows that to the sequence. `newest`: number of slots,
    the last ones of its store, that the layer reads in a step over a growing cache; None: all.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec, owner: bool, cross: bool = False, newest: int | None = None):
        super().__init__()
        self.newest = newest
        self.masked = store.masked
        style = style_of(size)
        self.parallel_residual = style.parallel_residual
        before, after = style.norm_placement != "after", style.norm_placement != "before"
        self.attn_norm = build_norm(size) if before else nn.Identity()
        self.kv_norm = build_norm(size) if owner and store.kv_norm else None
        self.writer = build_writer(size, store) if owner else None
        self.reader = build_reader(size, store)
        self.attn_out_norm = build_norm(size) if after else None
        self.cross = CrossAttention(size, store) if cross else None
        self.mlp_norm = build_norm(size) if before else nn.Identity()
        self.mlp = build_mlp(size)
        self.mlp_out_norm = build_norm(size) if after else None

    def forward(
        self,
        x_BTD: Tensor,
        kv: KV,
        rope: Rope,
        visibility: Mask | TokenPositions,
        buffer: Buffer | None = None,
        offset: int | Step = 0,
        cross_context: CrossContext | None = None,
        num_outputs: int | None = None,
        query_table: Tensor | None = None,
    ) -> tuple[Tensor, KV]:
        """Return the next residual stream [B, T, D], and the keys and values this layer read.

        `kv` is what an earlier layer wrote; an owner ignores it. `visibility` is a mask, or token positions if the
        store is not read by a mask. An owner adds the slots of the new tokens, from `offset` on, to `buffer`, and reads
        them with the earlier ones. If `offset` is a Step, there is a single token of each row, [B, D] instead of
        [B, T, D], and `rope` and `visibility` are those of a step. With `num_outputs`, 0 or 1, an owner
        writes all tokens, and the residual stream continues with that many of the last ones; `visibility` and
        `query_table` (query_scale.py) are then those of these tokens.
        """
        h_BTD = self.attn_norm(x_BTD)
        if self.writer is not None:
            source_BTD = h_BTD if self.kv_norm is None else self.kv_norm(x_BTD)
            positions = () if self.masked else (visibility,)
            kv = self.writer(source_BTD, rope, *positions, buffer, offset)
        if num_outputs is not None:
            x_BTD, h_BTD = (x[:, x.shape[1] - num_outputs :] for x in (x_BTD, h_BTD))
            if not num_outputs:
                return x_BTD, kv
            rope = last_position(rope)
        seen = kv
        if self.newest is not None and isinstance(offset, Step) and not offset.static:
            make: Any = type(kv)
            seen = make(*(tensor[:, -self.newest :] for tensor in kv))
        scaled = () if query_table is None else (query_table,)
        out_BTD = self.reader(h_BTD, seen, rope, visibility, *scaled)
        if self.attn_out_norm is not None:
            out_BTD = self.attn_out_norm(out_BTD)
        attended_BTD = x_BTD + out_BTD
        if self.cross is not None:
            assert cross_context is not None
            attended_BTD = attended_BTD + self.cross(attended_BTD, cross_context)
        out_BTD = self.mlp(self.mlp_norm(x_BTD if self.parallel_residual else attended_BTD))
        if self.mlp_out_norm is not None:
            out_BTD = self.mlp_out_norm(out_BTD)
        return attended_BTD + out_BTD, kv


class LayerInputs(NamedTuple):
    """Inputs of the layers that depend on positions: masks (or token positions) by view, rotary tables by `rope_key`,
    and tables of queries by `query_scale`."""

    masks: Sequence[Mask | TokenPositions | None]
    ropes: dict[Hashable, Rope]
    query_tables: dict[QueryScale | None, Tensor | None]

    def of_last(self, length: int) -> "LayerInputs":
        """Inputs of the last of `length` positions; a mask is None if its kernel takes no single query."""
        return LayerInputs(
            [mask.last_query(length) if isinstance(mask, Mask) else None for mask in self.masks],
            {key: last_position(rope) for key, rope in self.ropes.items()},
            {rule: None if table is None else table[..., -1:] for rule, table in self.query_tables.items()},
        )


class Stack(nn.Module):
    """Blocks over vectors of width D, and the norm after them, of the layout and size in `config`.

    `backend` names an attention backend (`attend.BACKENDS`), or is `auto`, `flash` or `rows`, decided here for each
    store and the device the model is built on; raises ValueError if it cannot run the layout. Parameters are
    uninitialised until `init_weights` of the whole model. `activation_checkpointing` recomputes each block in the
    backward pass. With `cross` every layer also attends to the vectors passed to `run`.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto", device_type: str = "cpu", cross: bool = False):
        super().__init__()
        size = config.size
        self.cross = cross
        self.config = config
        self.plan: KVPlan = resolve_stack(config)
        self.backend = backend
        self.device_type = device_type
        self.chosen = {False: choose_backends(backend, size, self.plan, device_type)}  # with documents: at first use
        self.activation_checkpointing = False
        self.layers = nn.ModuleList(
            Block(size, self.plan.store(layer), owner == layer, cross, self.newest_slots(layer))
            for layer, owner in enumerate(self.plan.owners)
        )
        self.norm = build_norm(size)

    @property
    def stacks(self) -> tuple["Stack", ...]:
        """The stacks that the model is made of."""
        return (self,)

    def newest_slots(self, layer: int) -> int | None:
        """The last slots that `layer` sees of a store that keeps every position, in order; None: all."""
        store_window, window = self.plan.read_windows[self.plan.view_reads[layer]]
        return window if store_window is None else None

    def attention(self, documents: bool = False) -> str:
        """Name the attention backends and their stores, for a log. Raises ValueError if they cannot run `documents`,
        several in one row."""
        chosen = choose_backends(self.backend, self.config.size, self.plan, self.device_type, documents)
        used: dict[str, dict[str, None]] = {}
        for backend, store in zip(chosen, self.plan.views, strict=True):
            used.setdefault(f"{backend.name} ({backend.about})", {})[store.name] = None
        return "; ".join(f"{', '.join(stores)}: {backend}" for backend, stores in used.items())

    def masks(self, x_BTD: Tensor, segment_ids_BT: Tensor | None = None) -> list[Mask | TokenPositions]:
        """Make one mask per view for `x_BTD` attending to itself; bounded stores get token positions instead.

        Raises ValueError if the backend cannot run segments, or computes in another type.
        """
        segmented = segment_ids_BT is not None
        if segmented not in self.chosen:
            self.chosen[segmented] = choose_backends(
                self.backend, self.config.size, self.plan, self.device_type, segmented
            )
        sequences = SequenceBatch(x_BTD.shape[0], x_BTD.shape[1], segment_ids_BT, x_BTD.device)
        kinds = [(backend, s.span) for backend, s in zip(self.chosen[segmented], self.plan.views, strict=True)]
        made = {
            (backend, window): backend.mask(sequences, window, compute_dtype(x_BTD))
            for backend, window in dict.fromkeys(kinds)
        }
        return [made[kind] for kind in kinds]

    def cached_masks(self, cache: Cache, length: int, device: torch.device) -> list[Mask | TokenPositions]:
        """Make one mask per view for the next `length` tokens over `cache`, or token positions, as `masks`."""
        form = dense_backend(self.backend).form
        kernel, plan = dense_backend(self.backend).kernel, self.plan
        read = dict.fromkeys(key for view, key in zip(plan.views, plan.read_windows, strict=True) if view.masked)
        made = {key: Mask(kernel, cache.mask(key[0], length, device, form, key[1])) for key in read}
        positions = self.bounded_positions(
            lambda store: cache.token_positions(store, length, device).with_mask(lambda form: Mask(kernel, form))
        )
        masks: list[Mask | TokenPositions] = [
            made[key] if view.masked else positions[view.positions_key]
            for view, key in zip(plan.views, plan.read_windows, strict=True)
        ]
        return cache.store_masks(masks, length, device)

    def bounded_positions(self, make: Callable[[StoreSpec], TokenPositions]) -> dict[Hashable, TokenPositions]:
        """Make token positions for each kind of store that is not read by a mask."""
        stores = {store.positions_key: store for store in self.plan.stores if not store.masked}
        return {key: make(store) for key, store in stores.items()}

    def padded_masks(self, segment_ids_BT: Tensor) -> list[Mask | TokenPositions] | None:
        """Make one mask per view where negative ids are padding; None: as without ids, since there is no padding.

        Raises ValueError if there is padding and a store merges positions.
        """
        if merging := next((store for store in self.plan.stores if not store.masked), None):
            if not bool((segment_ids_BT < 0).any()):
                return None
            what = f"store {merging.name} {merging.summary}"
            raise ValueError(f"{what}, and cannot leave out tokens in the middle; give no padding")
        if self.in_short_rows:
            batch, length = segment_ids_BT.shape
            sequences = SequenceBatch(batch, length, segment_ids_BT, segment_ids_BT.device)
            mask_by_window = {
                window: Mask(FLEX_ROWS.kernel, FLEX_ROWS.form(sequences, window)) for window in self.plan.windows
            }
        else:
            mask_by_window = self.dense_masks(partial(padded, segment_ids_BT))
        return [mask_by_window[view.window] for view in self.plan.views]

    def dense_masks(self, mask_of: Callable[[int | None], Dense | Windowed]) -> dict[int | None, Mask]:
        """Make a mask for each window of the plan, of the kernel that takes dense ones."""
        return {window: Mask(dense_backend(self.backend).kernel, mask_of(window)) for window in self.plan.windows}

    def query_tables(self, positions: Tensor) -> dict[QueryScale | None, Tensor | None]:
        """Make the table of queries at `positions` for each rule by which stores scale them."""
        rules = dict.fromkeys(store.query_scale for store in self.plan.stores)
        return {rule: None if rule is None else query_table(positions, rule) for rule in rules}

    @property
    def in_short_rows(self) -> bool:
        """True if the rows of a pass without a cache are put end to end."""
        return any(backend is FLEX_ROWS for backend in self.chosen[False])

    def cross_contexts(
        self, x_BTD: Tensor, context_BCD: Tensor | None, cache: Cache | None
    ) -> list[CrossContext | None]:
        """List for each layer the vectors outside of its sequence that it attends to, or their cached keys and values;
        None if there are none."""
        if not self.cross:
            return [None] * len(self.layers)
        if context_BCD is not None and cache is None and self.in_short_rows:
            batch, length = x_BTD.shape[:2]
            mask = Mask(FLEX_ROWS.kernel, rows_across(batch, length, context_BCD.shape[1], x_BTD.device))
        else:
            mask = Mask(dense_backend(self.backend).kernel, Dense(causal=False, allowed=None))
        buffers = [None] * len(self.layers) if cache is None else cache.cross_buffers
        return [CrossContext(context_BCD, buffer, mask) for buffer in buffers]

    def run(
        self,
        x_BTD: Tensor,
        cache: Cache | None = None,
        masks: Sequence[Mask | TokenPositions] | None = None,
        context_BCD: Tensor | None = None,
        num_outputs: int | None = None,
        starts_BT: Tensor | None = None,
    ) -> Tensor:
        """Run the layers on `x_BTD` and return the residual stream [B, T, D], before the last norm.

        With `cache`, the tokens continue what it holds and are added to it. `masks`: one per view; None: causal.
        `context_BCD`: vectors for a stack with `cross`; None: those that the cache got last. `num_outputs`: return only
        the last position (1) or none (0), and leave out what the layers from `plan.tail` on need not do; None: all.
        `starts_BT`: where the document of each token begins; None: at 0. Raises ValueError if the tokens do not fit
        into the cache, or as `masks`.
        """
        x_BTD = x_BTD.to(compute_dtype(x_BTD))  # the residual stream is of the type that is computed in
        length, plan, requested = x_BTD.shape[1], self.plan, num_outputs
        if cache is not None:
            cache.check(plan, x_BTD.shape[0], length)
            if masks is None and length == 1 and num_outputs != 0 and cache.takes_steps:
                x_BD = self.step(x_BTD.squeeze(1), cache, context_BCD)
                cache.length += 1
                return x_BD.unsqueeze(1)
            if cache.sees_queries:
                num_outputs = None
        contexts = self.cross_contexts(x_BTD, context_BCD, cache)
        inputs = self.layer_inputs(x_BTD, cache, masks, starts_BT)
        tail, of_tail = self.tail_inputs(inputs, length, num_outputs)
        written: list[KV] = []
        for layer, block in enumerate(self.layers):
            store = plan.store(layer)
            owner = store.owner == layer
            if layer == tail and not owner:
                x_BTD = x_BTD[:, -1:]
            of = of_tail if layer >= tail else inputs
            arguments = (
                x_BTD,
                () if owner else handed_on(plan, layer, written),
                (inputs if owner else of).ropes[store.rope_key],  # an owner writes every position
                of.masks[plan.view_reads[layer]],
                cache.buffers[plan.reads[layer]] if owner and cache is not None else None,
                0 if cache is None else cache.length,
                contexts[layer],
                num_outputs if layer == tail and owner else None,
                of.query_tables[store.query_scale],
            )
            if self.activation_checkpointing and self.training:
                x_BTD, kv = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTD, kv = block(*arguments)
            if owner:
                written.append(kv)
            let_go(plan, layer, written)
            if layer == tail and num_outputs == 0:
                break
        if cache is not None:
            cache.length += length
        return x_BTD if requested is None else x_BTD[:, x_BTD.shape[1] - requested :]

    def layer_inputs(
        self,
        x_BTD: Tensor,
        cache: Cache | None,
        masks: Sequence[Mask | TokenPositions] | None,
        starts_BT: Tensor | None,
    ) -> LayerInputs:
        """Make the inputs of the layers that depend on the positions of `x_BTD`; arguments as in `run`."""
        length, device = x_BTD.shape[1], x_BTD.device
        if cache is None:
            positions = torch.arange(length, device=device)
            masks = self.masks(x_BTD) if masks is None else masks
        else:
            positions = cache.positions(length, device)
            masks = self.cached_masks(cache, length, device) if masks is None else masks
        rope_keys = dict.fromkeys(store.rope_key for store in self.plan.stores)
        return LayerInputs(
            masks,
            {key: rope_table(positions, *key) for key in rope_keys},
            self.query_tables(positions if starts_BT is None else positions - starts_BT),
        )

    def tail_inputs(self, inputs: LayerInputs, length: int, num_outputs: int | None) -> tuple[int, LayerInputs]:
        """The first layer that runs only on the last `num_outputs` of `length` positions, and the inputs from it on;
        the number of layers if there is none."""
        plan = self.plan
        if num_outputs == 0:
            return plan.last_owner, inputs
        if num_outputs == 1 and length > 1:
            last = inputs.of_last(length)
            if all(last.masks[view] is not None for view in plan.view_reads[plan.tail :]):
                return plan.tail, last
        return plan.num_layers, inputs

    def step(self, x_BD: Tensor, cache: Cache, context_BCD: Tensor | None = None) -> Tensor:
        """Run the layers on one token of each row, as `run`, but leave `cache.length` as it is; [B, D]."""
        device, step = x_BD.device, cache.step()
        positions = cache.positions(1, device)
        tables = {
            key: rope_table(positions, *key) for key in dict.fromkeys(store.rope_key for store in self.plan.stores)
        }
        ropes = {key: step_rope(table, x_BD.dtype) for key, table in tables.items()}
        keys = [
            (key, view.slot.k_dim, view.slot.v_dim)
            for view, key in zip(self.plan.views, self.plan.read_windows, strict=True)
        ]
        masked = dict.fromkeys(key for view, key in zip(self.plan.views, keys, strict=True) if view.masked)
        seen = {key: cache.step_seen(key[0], device, key[1]) for key in dict.fromkeys(key for key, *_ in masked)}
        masks = {
            (key, *widths): step_mask(self.backend, seen[key], x_BD.dtype, widths[0], device, widths[1])
            for key, *widths in masked
        }
        token_positions = self.bounded_positions(
            lambda store: cache.step_positions(store, device, x_BD.dtype).with_mask(
                lambda seen: step_mask(self.backend, seen, x_BD.dtype, store.slot.k_dim, device, store.slot.v_dim)
            )
        )
        query_tables = {rule: one_token(table) for rule, table in self.query_tables(positions).items()}
        contexts = self.cross_contexts(x_BD, context_BCD, cache)
        written: list[KV] = []
        for layer, block in enumerate(self.layers):
            read = self.plan.reads[layer]
            spec = self.plan.stores[read]
            owner = spec.owner == layer
            kv, buffer = ((), cache.buffers[read]) if owner else (handed_on(self.plan, layer, written), None)
            mask = masks[keys[self.plan.view_reads[layer]]] if spec.masked else token_positions[spec.positions_key]
            table = query_tables[spec.query_scale]
            x_BD, kv = block(x_BD, kv, ropes[spec.rope_key], mask, buffer, step, contexts[layer], None, table)
            if owner:
                written.append(kv)
        return x_BD


def handed_on(plan: KVPlan, layer: int, written: list[KV]) -> KV:
    """The keys and values that `layer` reads, among those that lower layers have written, by store."""
    kv, second = written[plan.reads[layer]], plan.second_read(layer)
    if second is None:
        return kv
    other = written[second.store]
    return TwoKV(*kv, *other) if second.how == "mix" else GroupedKV(kv[0], other[1])


def let_go(plan: KVPlan, layer: int, written: list[KV]) -> None:
    """Forget what no layer above `layer` reads, which checkpointing would keep."""
    for number in {*chain(*plan.sources(layer))}:
        if layer == plan.last_reader(number):
            written[number] = ()


def last_position(rope: Rope) -> Rope:
    """Rotary tables of the last position."""
    cos, sin = rope
    return cos[..., -1:, :], sin[..., -1:, :]


def one_token(table: Tensor | None) -> Tensor | None:
    """The table of queries of one token of each row, [1 or B] from [1] or [B, 1]."""
    return None if table is None else table.flatten()


class Decoder(Stack, LanguageModel):
    """A language model: a stack over embedded tokens, and an output matrix."""

    plan: KVPlan

    def __init__(self, config: ModelConfig, backend: str = "auto", device_type: str = "cpu", cross: bool = False):
        super().__init__(config, backend, device_type, cross)
        size = config.size
        self.embed = build_embedding(size)
        self.lm_head = None if size.tie_embeddings else nn.Linear(size.d_model, size.vocab_size, bias=False)

    @property
    def decoder(self) -> "Decoder":
        return self

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [V, D]."""
        return (self.embed if self.lm_head is None else self.lm_head).weight

    def forward(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        last_only: bool = False,
        head: Head = F.linear,
        segment_ids_BT: Tensor | None = None,
        cache_only: bool = False,
    ) -> Tensor:
        """Return the logits [B, T, V] of the token after each of `tokens_BT`; with `last_only` of the last, [B, 1, V];
        with `cache_only` of none, [B, 0, V].

        With `cache` the tokens continue what it holds and are added to it. `head` gets the normalised last residual
        stream [B, T, D] and the output matrix [V, D]: a loss that never holds all logits takes the place of the
        product. `segment_ids_BT`: a run of equal numbers is a segment, and segments, such as documents, do not see each
        other. Rotary positions count through the row: their scores depend only on distances.

        Raises ValueError if the tokens do not fit into the cache, or with segments of another shape or over a cache.
        """
        x_BTD, masks, starts_BT = self.embed(tokens_BT), None, None
        if segment_ids_BT is not None:
            check_segments(tokens_BT, segment_ids_BT)
            if cache is not None:
                raise ValueError("segment_ids_BT cannot be given with a cache, whose rows are one segment; drop one")
            masks = self.masks(x_BTD, segment_ids_BT)
            if any(store.query_scale for store in self.plan.stores):
                starts_BT = segment_starts(segment_ids_BT)
        num_outputs = 0 if cache_only else 1 if last_only else None
        x_BTD = self.run(x_BTD, cache, masks, num_outputs=num_outputs, starts_BT=starts_BT)
        return head(self.norm(x_BTD), self.output_weight)

    def allocate_cache(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, start_B: Tensor | None = None
    ) -> Cache:
        weight = self.output_weight
        dtype = dtype or weight.dtype
        return allocate(self.plan, batch, capacity, dtype=dtype, device=weight.device, start_B=start_B)

    def static_step(self, cache: Cache, way: str) -> StaticStep:
        return StaticStep(self, cache, way)


def check_segments(tokens_BT: Tensor, segment_ids_BT: Tensor) -> None:
    """Raise ValueError unless there is one id per token."""
    if segment_ids_BT.shape != tokens_BT.shape:
        shapes = f"{tuple(segment_ids_BT.shape)}, the tokens {tuple(tokens_BT.shape)}"
        raise ValueError(f"segment_ids_BT has shape {shapes}; give the number of a segment for each token")
