"""The decoder: a stack of blocks, whose loop hands an owner's slots to its readers as explicit tensors.

Shapes: B batch, T new tokens, D model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attend import Backend, Mask, check_name, choose, dense_kernel
from .attention import attention_needs, build_reader, build_writer
from .bounded import TokenPositions, steps
from .bounded_fla import BoundedBackend, choose_bounded
from .buffers import Buffer, Slots
from .cache import Cache
from .config import ModelConfig, SizeConfig, style_of
from .cross_attention import Context, CrossAttention
from .init import initialise
from .layers import Rope, build_mlp, build_norm, rope_table
from .masks import Dense, Sequences, padded
from .plan import KVPlan, StoreSpec, resolve_stack


class Block(nn.Module):
    """Pre-norm attention, then the MLP; or, with parallel residuals, both of the same input. The owner of a store also
    writes it.

    With `cross`, attention to what is outside of the sequence comes after that to the sequence.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec, owner: bool, cross: bool = False):
        super().__init__()
        self.parallel_residual = style_of(size).parallel_residual
        self.attn_norm = build_norm(size)
        self.kv_norm = build_norm(size) if owner and store.kv_norm else None
        self.writer = build_writer(size, store) if owner else None
        self.reader = build_reader(size, store)
        self.cross = CrossAttention(size, store) if cross else None
        self.mlp_norm = build_norm(size)
        self.mlp = build_mlp(size)

    def forward(
        self,
        x_BTD: Tensor,
        slots: Slots,
        rope: Rope,
        mask: Mask | TokenPositions,
        store: Buffer | None = None,
        offset: int = 0,
        context: Context | None = None,
    ) -> tuple[Tensor, Slots]:
        """The next residual stream, and the slots this layer read.

        `slots` is what an earlier layer wrote, ignored by an owner. With `store`, the cache of what this layer writes,
        the new slots (of tokens `offset` on) go through it and come back with the ones before.
        """
        h_BTD = self.attn_norm(x_BTD)
        if self.writer is not None:
            source_BTD = h_BTD if self.kv_norm is None else self.kv_norm(x_BTD)
            slots = self.writer(source_BTD, rope, mask, store, offset)
        attended_BTD = x_BTD + self.reader(h_BTD, slots, rope, mask)
        if self.cross is not None:
            assert context is not None
            attended_BTD = attended_BTD + self.cross(attended_BTD, context)
        x_BTD = attended_BTD + self.mlp(self.mlp_norm(x_BTD if self.parallel_residual else attended_BTD))
        return x_BTD, slots


class Stack(nn.Module):
    """Blocks over vectors of width D, and the norm after them, of the layout and size in `config`.

    `backend` names an attention backend (`attend.BACKENDS`), or is `auto` or `flash`, decided here for each store and
    the device the model is built on; raises ValueError where it cannot run the layout. Parameters are uninitialised
    until `init_weights` of the whole model. `activation_checkpointing` recomputes each block in the backward pass.
    With `cross` every layer also attends to vectors that `run` is given.
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
            Block(size, self.plan.store(layer), owner == layer, cross) for layer, owner in enumerate(self.plan.owners)
        )
        self.norm = build_norm(size)

    @property
    def stacks(self) -> tuple["Stack", ...]:
        """The stacks that the model is made of."""
        return (self,)

    def attention(self, documents: bool = False) -> str:
        """The backends in use and for which stores, for a log; ValueError where they cannot run packed documents."""
        chosen = choose_backends(self.backend, self.config.size, self.plan, self.device_type, documents)
        used: dict[str, dict[str, None]] = {}
        for backend, store in zip(chosen, self.plan.stores, strict=True):
            how = "chunks (bounded, plain torch)" if backend is None else f"{backend.name} ({backend.about})"
            used.setdefault(how, {})[store.name] = None
        return "; ".join(f"{', '.join(stores)}: {backend}" for backend, stores in used.items())

    def masks(self, x_BTD: Tensor, cache: Cache | None, documents_BT: Tensor | None) -> list[Mask | TokenPositions]:
        """Of each store, made once for each distinct window and backend; of bounded ones, where tokens stand.

        Raises as `run` where they cannot be.
        """
        packed = documents_BT is not None
        if packed and cache is not None:
            raise ValueError("documents_BT cannot be given with a cache, whose rows are one document each; drop one")
        if documents_BT is not None and documents_BT.shape != x_BTD.shape[:2]:
            shapes = f"{tuple(documents_BT.shape)}, the tokens {tuple(x_BTD.shape[:2])}"
            raise ValueError(f"documents_BT has shape {shapes}; give a document number for each token")
        (batch, length), device, stores = x_BTD.shape[:2], x_BTD.device, self.plan.stores
        if cache is not None:
            over = self.dense_masks(lambda window: cache.mask(window, length, device))
            return [cache.steps(s, length, device) if s.num_slots else over[s.window] for s in stores]
        if packed not in self.chosen:
            self.chosen[packed] = choose_backends(self.backend, self.config.size, self.plan, self.device_type, packed)
        sequences = Sequences(batch, length, documents_BT, device)
        kinds = [(backend, store.window) for backend, store in zip(self.chosen[packed], stores, strict=True)]
        made = {
            (b, window): steps(sequences) if b is None else b.mask(sequences, window, x_BTD.dtype)
            for b, window in dict.fromkeys(kinds)
        }
        return [made[kind] for kind in kinds]

    def dense_masks(self, mask_of: Callable[[int | None], Dense]) -> dict[int | None, Mask]:
        """For each window of the plan, for a kernel that takes any mask."""
        return {window: Mask(dense_kernel(self.backend), mask_of(window)) for window in self.plan.windows}

    def padded_masks(self, real_BT: Tensor) -> list[Mask]:
        """Of each store, where some tokens are padding. Raises ValueError where a store is bounded."""
        if any(store.num_slots for store in self.plan.stores):
            raise ValueError("a bounded store cannot leave out tokens in the middle; give no padding")
        over = self.dense_masks(partial(padded, real_BT))
        return [over[store.window] for store in self.plan.stores]

    def outside(self, context_BCD: Tensor | None, cache: Cache | None, layer: int) -> Context | None:
        """What `layer` attends to outside of the sequence, if it does."""
        if not self.cross:
            return None
        store = None if cache is None else cache.context[layer]
        return Context(context_BCD, store, Mask(dense_kernel(self.backend), Dense(causal=False, allowed=None)))

    def run(
        self,
        x_BTD: Tensor,
        cache: Cache | None = None,
        documents_BT: Tensor | None = None,
        real_BT: Tensor | None = None,
        context_BCD: Tensor | None = None,
    ) -> Tensor:
        """The last residual stream, not normalised, of the first one. Raises as `Decoder.forward`.

        `real_BT`, without a cache or documents: False where nobody looks; a token that would see nothing sees itself.
        `context_BCD`: the vectors of a stack with `cross`; None: those that the cache got last.
        """
        length, device = x_BTD.shape[1], x_BTD.device
        offset = 0
        if cache is None:
            positions = torch.arange(length, device=device)
        else:
            cache.check(self.plan, x_BTD.shape[0], length)
            offset = cache.length
            positions = cache.positions(length, device)
        ropes = {
            key: rope_table(positions, *key) for key in dict.fromkeys(store.rope_key for store in self.plan.stores)
        }

        if torch.is_autocast_enabled(device.type):  # the residual stream is of the type that is computed in
            x_BTD = x_BTD.to(torch.get_autocast_dtype(device.type))
        assert real_BT is None or (cache is None and documents_BT is None)
        masks = self.masks(x_BTD, cache, documents_BT) if real_BT is None else self.padded_masks(real_BT)
        written: list[Slots] = []
        for layer, block in enumerate(self.layers):
            read = self.plan.reads[layer]
            spec = self.plan.stores[read]
            owner = spec.owner == layer
            arguments = (
                x_BTD,
                () if owner else written[read],
                ropes[spec.rope_key],
                masks[read],
                cache.stores[read] if owner and cache is not None else None,
                offset,
                self.outside(context_BCD, cache, layer),
            )
            if self.activation_checkpointing and self.training:
                x_BTD, slots = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTD, slots = block(*arguments)
            if owner:
                written.append(slots)
            if layer == self.plan.readers(spec)[-1]:
                written[read] = ()  # checkpointing would keep them for nobody
        if cache is not None:
            cache.length += length
        return x_BTD


class Decoder(Stack):
    """A language model: a stack over embedded tokens, and an output matrix."""

    def __init__(self, config: ModelConfig, backend: str = "auto", device_type: str = "cpu", cross: bool = False):
        super().__init__(config, backend, device_type, cross)
        size = config.size
        self.embed = nn.Embedding(size.vocab_size, size.d_model)
        self.lm_head = None if size.tie_embeddings else nn.Linear(size.d_model, size.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [V, D]."""
        return (self.embed if self.lm_head is None else self.lm_head).weight

    def forward(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        last_only: bool = False,
        head: Callable[[Tensor, Tensor], Tensor] = F.linear,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each of `tokens_BT`; [B, 1, V], of the last alone, with `last_only`.

        With `cache` the tokens continue what it holds and are added to it. Raises ValueError if they do not fit.
        `head` gets the normalised last residual stream [B, T, D] and the output matrix [V, D]; a loss that never holds
        all logits takes the place of the product here.
        With `documents_BT` a row is several documents, each a run of equal numbers, that do not see each other.
        Positions go on counting through the row: rotary scores depend on distances alone. Not with a cache.
        """
        x_BTD = self.run(self.embed(tokens_BT), cache, documents_BT)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        return head(self.norm(x_BTD), self.output_weight)

    def predicted(self, of_targets_BT: Tensor) -> Tensor:
        """The part of the targets, or of anything else there is of each, that `forward` predicts: here all."""
        return of_targets_BT

    def init_weights(self, seed: int = 0) -> None:
        """As `initialise`, with the size's `init_std`."""
        initialise(self, self.config.size.init_std, seed)


def choose_backends(
    name: str, size: SizeConfig, plan: KVPlan, device_type: str, documents: bool = False
) -> tuple[Backend | BoundedBackend | None, ...]:
    """Of each store, the attention backend of the layers that read it, with or without packed documents. For bounded
    stores that is `fla` or none: their rules are plain torch.

    Raises ValueError where the backend `name` cannot run them.
    """
    check_name(name)
    if name == "fla" and not any(store.num_slots for store in plan.stores):
        raise ValueError("backend fla is for bounded stores, and the layout has none; choose another backend or auto")
    return tuple(
        choose_bounded(name, store, device_type, documents)
        if store.num_slots
        else choose(name, attention_needs(size, store, documents), device_type)
        for store in plan.stores
    )
