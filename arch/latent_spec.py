"""Stores of latents, as a layout declares them; latent.py has their modules."""

from dataclasses import dataclass
from typing import Any

from .config import SizeConfig, StoreConfig, head_dim, style_of
from .store_spec import HeadShape, ParamCount, SlotShape, StoreSpec, own_widths, resolve_share


@dataclass(frozen=True)
class LatentSpec(StoreSpec):
    """A latent and a rotary key for all heads (DeepSeek-V2, section 2.1), of every position or of a window.

    latents  into which the slot's latent is divided, each of which an equal part of the heads reads; None: one
    key_dim  width of the part of keys that is made of it; None: the head dimension
    """

    latents: int | None = None
    key_dim: int | None = None

    kind, key, summary = "latent", "latent", "holds latents"
    newer = (*StoreSpec.newer, "latents", "key_dim")

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        assert store.latent is not None
        width = head_dim(size)
        problems += own_widths(
            where, store, "made of latents are as wide as size.head_dim; latent.dim is the latent's width"
        )
        latent_dim = resolve_share(f"{where}.latent.dim", store.latent.dim, width, "the head dimension", problems)
        rope_dim = 0
        if store.latent.rope_dim not in (0, "0"):
            rope_dim = resolve_share(
                f"{where}.latent.rope_dim", store.latent.rope_dim, width, "the head dimension", problems
            )
        if rope_dim % 2:
            problems.append(f"{where}.latent.rope_dim is {rope_dim}; rotary embeddings need an even number")
        if style_of(size).qk_norm != "none":
            problems.append(
                f"size.qk_norm is {style_of(size).qk_norm}, and {where} holds latents, of which no keys are made over "
                "a cache; the latent has a norm of its own: take size.qk_norm=none"
            )
        return SlotShape(latent_dim=latent_dim * max(1, store.latent.heads or 1), rope_dim=rope_dim)

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        if store.latent is None:
            return {}  # reported above
        heads, k_dim = store.latent.heads, store.latent.k_dim
        if heads is not None and (heads < 1 or size.num_heads % heads):
            problems.append(
                f"{where}.latent.heads is {heads}; equal parts of the {size.num_heads} query heads read one each"
            )
        if k_dim is not None:
            width = head_dim(size)
            k_dim = resolve_share(f"{where}.latent.k_dim", k_dim, width, "the head dimension", problems)
            k_dim = None if k_dim == width else k_dim
        return {"latents": None if heads == 1 else heads, "key_dim": k_dim}

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields["slot"].latent_dim)

    @property
    def num_latents(self) -> int:
        return self.latents or 1

    @property
    def one_latent_dim(self) -> int:
        """Width of what a query head reads of the latent."""
        return self.slot.latent_dim // self.num_latents

    def expanded_dim(self, size: SizeConfig) -> int:
        """Width of the part of each key that is made of the latent."""
        return head_dim(size) if self.key_dim is None else self.key_dim

    @property
    def slot_rotary_dim(self) -> int:
        return self.slot.rope_dim

    @property
    def position_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.slot.latent_dim,), (self.slot.rope_dim,))

    def kernel_heads(self, size: SizeConfig) -> HeadShape:
        """Latents are expanded to keys and values of every query head."""
        return HeadShape(size.num_heads, self.expanded_dim(size) + self.slot.rope_dim, head_dim(size))

    def reader_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of a reader, with the expansion of latents to keys and values."""
        matrices, others = super().reader_params(size)
        expanded = size.num_heads * (self.expanded_dim(size) + head_dim(size))
        return ParamCount(matrices + self.one_latent_dim * expanded, others)

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of the writer, with the norm of the latent."""
        matrices, others = super().writer_params(size)
        return ParamCount(matrices, others + self.slot.latent_dim)

    def step_flops(self, size: SizeConfig) -> int:
        """FLOPs per key of queries that are compared with latents."""
        return 2 * size.num_heads * (2 * self.one_latent_dim + self.slot.rope_dim)

    @property
    def slot_text(self) -> str:
        rope = f" + rope {self.slot.rope_dim}" if self.slot.rope_dim else ""
        several = f"{self.num_latents} x " if self.num_latents > 1 else ""
        return f"latent {several}{self.one_latent_dim}{rope}"
