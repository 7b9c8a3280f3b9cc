"""The torch side of each kind of store: a writer in the layer that owns it, a reader in every layer that reads it, its
cache, and its backends.

A writer is called as `writer(x_BTD, rope, buffer, offset)`; if its store is not read by a mask, it also gets token
positions after `rope`. It adds the new slots, of tokens from `offset` on, to `buffer`, the cache of its store, and
returns them with the earlier ones. A reader is called as `reader(x_BTD, kv, rope, visibility)`, where `visibility` is a
mask or token positions: it projects queries of its own and attends over `kv`, from its own layer's writer or an earlier
one's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attend import Backend, Needs, check_name, select_backend
from .bounded import BoundedReader, BoundedWriter
from .bounded_fla import select_bounded_backend
from .buffers import Buffer, allocate_slots, allocate_state
from .config import SizeConfig
from .delta import DeltaReader, DeltaWriter
from .delta_fla import select_delta_backend
from .grouped import GroupedReader, GroupedWriter
from .latent import LatentReader, LatentWriter
from .mixed import MixedReader
from .plan import KVPlan
from .positions import NextToken, PositionsBackend, TokenPositions, cached_positions, step_positions
from .store_spec import StoreSpec
from .strided import (
    StridedWriter,
    allocate_strided,
    build_strided_reader,
    select_strided_backend,
    strided_positions,
    strided_step,
)
from .strided_latent import (
    StridedLatentReader,
    StridedLatentWriter,
    allocate_strided_latents,
    select_strided_latent_backend,
    strided_latent_positions,
    strided_latent_step,
)
from .tied import build_tied_reader, build_tied_writer

StoreBackend = Backend | PositionsBackend


class StoreCache(NamedTuple):
    """The cache of a kind of store.

    allocate   (store, batch, capacity, type, device) -> an empty buffer
    positions  positions.cached_positions or a function like it; None: the store is read by a mask
    step       positions.step_positions or a function like it
    """

    allocate: Callable[[StoreSpec, int, int, torch.dtype, torch.device | str], Buffer]
    positions: Callable[[StoreSpec, Tensor, int, int], TokenPositions] | None = None
    step: Callable[[StoreSpec, NextToken], TokenPositions] | None = None


SLOTS = StoreCache(allocate_slots)
STATE = StoreCache(allocate_state, cached_positions, step_positions)


class StoreModules(NamedTuple):
    """The torch side of a kind of store.

    select_backend  (backend name, size, store, device type, with documents) -> the backend of its readers; raises
                    ValueError if the named one cannot run the store
    own_backends    backends with a kernel for this kind only, not for stores that are read by a mask
    """

    writer: Callable[[SizeConfig, StoreSpec], nn.Module]
    reader: Callable[[SizeConfig, StoreSpec], nn.Module]
    select_backend: Callable[[str, SizeConfig, StoreSpec, str, bool], StoreBackend]
    cache: StoreCache = SLOTS
    own_backends: tuple[str, ...] = ()


def attention_needs(size: SizeConfig, store: StoreSpec, documents: bool = False) -> Needs:
    """Features and head widths that the layers that read `store` need of an attention backend."""
    heads = store.kernel_heads(size)
    needed = {
        "windows": store.window is not None and not store.chunked,
        "documents": documents or store.chunked,  # each chunk is one, to kernels of windows
        "sinks": store.sinks,
        "gqa": heads.kv_heads < size.num_heads,
        "uneven_value_width": heads.k_dim != heads.v_dim,
    }
    return Needs(frozenset(name for name, need in needed.items() if need), (heads.k_dim, heads.v_dim))


def select_masked_backend(name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool) -> Backend:
    """The attention backend of a store that is read by a mask."""
    return select_backend(name, attention_needs(size, store, documents), device)


STRIDED = StoreCache(allocate_strided, strided_positions, strided_step)
STRIDED_LATENTS = StoreCache(allocate_strided_latents, strided_latent_positions, strided_latent_step)
STORE_MODULES = {
    "grouped": StoreModules(GroupedWriter, GroupedReader, select_masked_backend),
    "mixed": StoreModules(GroupedWriter, MixedReader, select_masked_backend),  # of two grouped stores
    "latent": StoreModules(LatentWriter, LatentReader, select_masked_backend),
    "tied": StoreModules(build_tied_writer, build_tied_reader, select_masked_backend),
    "bounded": StoreModules(BoundedWriter, BoundedReader, select_bounded_backend, STATE, ("fla",)),
    "strided": StoreModules(StridedWriter, build_strided_reader, select_strided_backend, STRIDED),
    "strided_latent": StoreModules(
        StridedLatentWriter, StridedLatentReader, select_strided_latent_backend, STRIDED_LATENTS
    ),
    "matrix": StoreModules(DeltaWriter, DeltaReader, select_delta_backend, STATE, ("fla",)),
}


def build_writer(size: SizeConfig, store: StoreSpec) -> nn.Module:
    """Build the writer of `store`, for the layer that owns it; its parameters are uninitialised."""
    return STORE_MODULES[store.kind].writer(size, store)


def build_reader(size: SizeConfig, store: StoreSpec) -> nn.Module:
    """Build a reader of `store`, for a layer that reads it; its parameters are uninitialised."""
    return STORE_MODULES[store.kind].reader(size, store)


def allocate_buffer(
    store: StoreSpec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
) -> Buffer:
    """An empty buffer of `store` for `batch` sequences of up to `capacity` tokens."""
    return STORE_MODULES[store.kind].cache.allocate(store, batch, capacity, dtype, device)


def has_own_kernel(name: str, plan: KVPlan) -> bool:
    """Tell whether the backend `name` has a kernel for a kind of store of `plan` that is not read by a mask."""
    return any(name in STORE_MODULES[store.kind].own_backends for store in plan.stores)


def check_own_kernel(name: str, *plans: KVPlan) -> None:
    """Raise ValueError if the backend `name` is only for kinds of store that no plan has."""
    kinds = [f"{kind} stores" for kind, modules in STORE_MODULES.items() if name in modules.own_backends]
    if not kinds or any(has_own_kernel(name, plan) for plan in plans):
        return
    found = dict.fromkeys(f"{store.name} {store.summary}" for plan in plans for store in plan.stores)
    raise ValueError(
        f"backend {name} is for {' and '.join(kinds)}, and {', '.join(found)}; choose another backend or auto"
    )


def choose_backends(
    name: str, size: SizeConfig, plan: KVPlan, device_type: str, documents: bool = False
) -> tuple[StoreBackend, ...]:
    """The backend of each of `plan.views`, in that order, with or without packed documents.

    Raises ValueError if the backend `name` cannot run them.
    """
    check_name(name)
    check_own_kernel(name, plan)
    return tuple(
        STORE_MODULES[store.kind].select_backend(name, size, store, device_type, documents) for store in plan.views
    )
