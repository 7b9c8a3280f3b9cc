"""The modules of each kind of store: a writer in the layer that owns it, a reader in every layer that reads it.

A writer is called as `writer(x_BTD, rope, buffer, offset)`; where its store is not read by a mask, it gets token
positions after `rope`. With `buffer`, the cache of its store, the new slots (of tokens `offset` on) go through it and
come back with the ones before. A reader is called as `reader(x_BTD, kv, rope, visibility)`, a mask or token positions:
it projects queries of its own and attends over whatever it is handed, by its own layer's writer or an earlier one's.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .attend import Backend, Needs, check_name, select_backend
from .bounded import BoundedReader, BoundedWriter
from .bounded_fla import BoundedBackend, select_bounded_backend
from .config import SizeConfig
from .delta import DeltaReader, DeltaWriter
from .delta_fla import select_delta_backend
from .grouped import GroupedReader, GroupedWriter
from .latent import LatentReader, LatentWriter
from .mixed import MixedReader
from .plan import KVPlan
from .store_spec import StoreSpec
from .strided import StridedWriter, build_strided_reader
from .strided_backend import select_strided_backend
from .tied import build_tied_reader, build_tied_writer

StoreBackend = Backend | BoundedBackend


class StoreModules(NamedTuple):
    """The torch side of a kind of store.

    select_backend  (backend name, size, store, device type, with documents) -> the backend of its readers; raises
                    ValueError where the named one cannot run the store
    """

    writer: Callable[[SizeConfig, StoreSpec], nn.Module]
    reader: Callable[[SizeConfig, StoreSpec], nn.Module]
    select_backend: Callable[[str, SizeConfig, StoreSpec, str, bool], StoreBackend]


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


STORE_MODULES = {
    "grouped": StoreModules(GroupedWriter, GroupedReader, select_masked_backend),
    "mixed": StoreModules(GroupedWriter, MixedReader, select_masked_backend),  # of two grouped stores
    "latent": StoreModules(LatentWriter, LatentReader, select_masked_backend),
    "tied": StoreModules(build_tied_writer, build_tied_reader, select_masked_backend),
    "bounded": StoreModules(BoundedWriter, BoundedReader, select_bounded_backend),
    "strided": StoreModules(StridedWriter, build_strided_reader, select_strided_backend),
    "matrix": StoreModules(DeltaWriter, DeltaReader, select_delta_backend),
}


def build_writer(size: SizeConfig, store: StoreSpec) -> nn.Module:
    """The module that writes `store`, for the layer that owns it; its parameters are uninitialised."""
    return STORE_MODULES[store.kind].writer(size, store)


def build_reader(size: SizeConfig, store: StoreSpec) -> nn.Module:
    """The module that reads `store`, for each layer that does; its parameters are uninitialised."""
    return STORE_MODULES[store.kind].reader(size, store)


def choose_backends(
    name: str, size: SizeConfig, plan: KVPlan, device_type: str, documents: bool = False
) -> tuple[StoreBackend, ...]:
    """The backend of the layers that see each of `plan.views`, in that order; with or without packed documents.

    Raises ValueError where the backend `name` cannot run them.
    """
    check_name(name)
    if name == "fla" and all(store.masked or store.kind == "strided" for store in plan.stores):
        raise ValueError(
            "backend fla is for bounded stores and matrices, and the layout has none; choose another or auto"
        )
    return tuple(
        STORE_MODULES[store.kind].select_backend(name, size, store, device_type, documents) for store in plan.views
    )
