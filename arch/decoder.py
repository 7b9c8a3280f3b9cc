"""The decoder: a stack of blocks, whose loop hands an owner's slots to its readers as explicit tensors.

Shapes: B batch, T new tokens, D model, V vocabulary.
"""

import zlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attend import BACKENDS, Backend, Mask, check_name, choose
from .attention import Slots, attention_needs, build_reader, build_writer, rope_key
from .bounded import BoundedWriter, Steps, steps
from .cache import AnyStore, Cache, StateStore
from .config import ModelConfig, SizeConfig
from .layers import LayerNorm, RMSNorm, Rope, build_mlp, build_norm, rope_table
from .masks import Dense, Sequences, padded
from .plan import KVPlan, Store, is_neox, resolve_stack


class Block(nn.Module):
    """Pre-norm attention, then SwiGLU; or in style neox both of the same input. The owner of a store also writes it."""

    def __init__(self, size: SizeConfig, store: Store, owner: bool):
        super().__init__()
        self.parallel = is_neox(size)
        self.attn_norm = build_norm(size)
        self.kv_norm = build_norm(size) if owner and store.kv_norm else None
        self.writer = build_writer(size, store) if owner else None
        self.reader = build_reader(size, store)
        self.mlp_norm = build_norm(size)
        self.mlp = build_mlp(size)

    def forward(
        self,
        x_BTD: Tensor,
        slots: Slots,
        rope: Rope,
        mask: Mask | Steps,
        store: AnyStore | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Slots]:
        """The next residual stream, and the slots this layer read.

        `slots` is what an earlier layer wrote, ignored by an owner. With `store`, the cache of what this layer writes,
        the new slots (of tokens `offset` on) go through it and come back with the ones before.
        """
        h_BTD = self.attn_norm(x_BTD)
        if self.writer is not None:
            source_BTD = h_BTD if self.kv_norm is None else self.kv_norm(x_BTD)
            if isinstance(self.writer, BoundedWriter):
                slots, after = self.writer(source_BTD, rope, mask, () if store is None else store.tensors)
                if store is not None:
                    assert isinstance(store, StateStore)
                    store.keep(after)
            else:
                slots = self.writer(source_BTD, rope)
                if store is not None:
                    assert not isinstance(store, StateStore)
                    slots = store.update(slots, offset)
        attended_BTD = x_BTD + self.reader(h_BTD, slots, rope, mask)
        x_BTD = attended_BTD + self.mlp(self.mlp_norm(x_BTD if self.parallel else attended_BTD))
        return x_BTD, slots


class Stack(nn.Module):
    """Blocks over vectors of width D, and the norm after them, of the layout and size in `config`.

    `backend` names an attention backend (`attend.BACKENDS`), or is `auto` or `flash`, decided here for each store and
    the device the model is built on; raises ValueError where it cannot run the layout. Parameters are uninitialised
    until `init_weights` of the whole model. `activation_checkpointing` recomputes each block in the backward pass.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto", device_type: str = "cpu"):
        super().__init__()
        size = config.size
        self.config = config
        self.plan: KVPlan = resolve_stack(config)
        self.backend = backend
        self.device_type = device_type
        self.chosen = {False: choose_backends(backend, size, self.plan, device_type)}  # with documents: at first use
        self.activation_checkpointing = False
        self.layers = nn.ModuleList(
            Block(size, self.plan.store(layer), owner == layer) for layer, owner in enumerate(self.plan.owners)
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

    def masks(self, x_BTD: Tensor, cache: Cache | None, documents_BT: Tensor | None) -> list[Mask | Steps]:
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
            return [cache.steps(s, length, device) if s.slots else over[s.window] for s in stores]
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
        kernel = BACKENDS["reference" if self.backend == "reference" else "sdpa"].kernel
        return {window: Mask(kernel, mask_of(window)) for window in self.plan.windows}

    def run(
        self,
        x_BTD: Tensor,
        cache: Cache | None = None,
        documents_BT: Tensor | None = None,
        real_BT: Tensor | None = None,
    ) -> Tensor:
        """The last residual stream, not normalised, of the first one. Raises as `Decoder.forward`.

        `real_BT`, without a cache or documents: False where nobody looks; a token that would see nothing sees itself.
        """
        length, device = x_BTD.shape[1], x_BTD.device
        offset = 0
        if cache is None:
            positions = torch.arange(length, device=device)
        else:
            cache.check(self.plan, x_BTD.shape[0], length)
            offset = cache.length
            positions = cache.positions(length, device)
        ropes = {key: rope_table(positions, *key) for key in dict.fromkeys(map(rope_key, self.plan.stores))}

        if torch.is_autocast_enabled(device.type):  # the residual stream is of the type that is computed in
            x_BTD = x_BTD.to(torch.get_autocast_dtype(device.type))
        masks: list[Mask | Steps]
        if real_BT is None:
            masks = self.masks(x_BTD, cache, documents_BT)
        else:
            assert cache is None and documents_BT is None
            if any(store.slots for store in self.plan.stores):
                raise ValueError("a bounded store cannot leave out tokens in the middle; give no padding")
            over = self.dense_masks(partial(padded, real_BT))
            masks = [over[store.window] for store in self.plan.stores]
        written: list[Slots] = []
        for layer, block in enumerate(self.layers):
            read = self.plan.reads[layer]
            spec = self.plan.stores[read]
            owner = spec.owner == layer
            arguments = (
                x_BTD,
                () if owner else written[read],
                ropes[rope_key(spec)],
                masks[read],
                cache.stores[read] if owner and cache is not None else None,
                offset,
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

    def __init__(self, config: ModelConfig, backend: str = "auto", device_type: str = "cpu"):
        super().__init__(config, backend, device_type)
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


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int, own: Mapping[str, float] | None = None) -> None:
    """Linear and embedding weights from N(0, std), norms 1, all else 0. `own`: weights, by name, of another std.

    Each parameter draws from a generator of its own, seeded by its name, so that the result depends neither on how
    the parameters are sharded nor on which others exist: two layouts start from the same weights where they share
    a name.
    """
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        full = torch.zeros(parameter.shape)
        if kind == "weight" and isinstance(module, nn.Linear | nn.Embedding):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            full.normal_(0.0, (own or {}).get(name, std), generator=generator)
        elif kind == "weight" and isinstance(module, RMSNorm | LayerNorm):
            full.fill_(1.0)
        if isinstance(parameter, DTensor):
            full = full.to(parameter.device)
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(full, mesh, placements, src_data_rank=None))
        else:
            parameter.copy_(full)


def choose_backends(
    name: str, size: SizeConfig, plan: KVPlan, device_type: str, documents: bool = False
) -> tuple[Backend | None, ...]:
    """Of each store, the attention backend of the layers that read it, with or without packed documents. Bounded stores
    have none: their rules are plain torch.

    Raises ValueError where the backend `name` cannot run them.
    """
    check_name(name)
    return tuple(
        None if store.slots else choose(name, attention_needs(size, store, documents), device_type)
        for store in plan.stores
    )
