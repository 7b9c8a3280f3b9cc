"""Bounded stores, as a layout declares them; bounded.py has their modules."""

from typing import Any

from .config import SizeConfig, StoreConfig
from .grouped_spec import GroupedSpec
from .store_spec import CacheTensor, ParamCount, SlotShape, own_widths, state_itemsize

# Rules of bounded stores (bounded.py has the formulas), and whether they take a window. All are readings of the
# Bounded-Cache Transformer (Yi et al. 2024), whose update formula we could not obtain.
RULES = {"gated": False, "ring_slots": True, "ring_router": False}
# Tokens that the parallel form of a bounded store takes at a time; bounded_chunks.py says why not more.
CHUNK = 8
# Its scores that are made at a time on a CPU, so that they stay in a core's cache.
SCORES = 1 << 18
# Blocks that a window's queries are taken in; each looks at its own positions and a window more, a fifth in vain.
WINDOW_BLOCKS = 4


class BoundedSpec(GroupedSpec):
    """Keys and values of all positions merged into `num_slots` slots, and in some rules those of a window."""

    kind, key, summary = "bounded", "slots", "is bounded"
    masked, grows = False, False

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        if store.latent is not None:
            return SlotShape()  # reported by `check`
        return super().resolve_slot(where, store, size, problems)

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        assert store.slots is not None
        problems += own_widths(where, store, "are as wide as size.head_dim in a bounded store")
        if store.slots < 1:
            problems.append(f"{where}.slots is {store.slots}; a bounded store has at least 1 (null: not bounded)")
        if store.latent is not None:
            problems.append(f"{where}.slots cannot hold a latent; write kv_heads instead")
        if store.rule not in RULES:
            problems.append(f"{where}.rule is {store.rule!r}; stores with slots need one of {', '.join(RULES)}")
        elif RULES[store.rule] and store.window is None:
            problems.append(
                f"{where}.rule {store.rule} needs a window: the last positions, kept whole beside the slots"
            )
        elif not RULES[store.rule]:
            problems += [
                f"{where}.{key} is {getattr(store, key)}; rule {store.rule} has only slots, without positions: "
                "leave it out, or choose ring_slots"
                for key in ("window", "rope", "rope_theta")
                if getattr(store, key) is not None
            ]

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields.get("num_slots"))

    @property
    def max_positions(self) -> int | None:
        return self.num_slots + (self.window or 0)

    @property
    def address_dim(self) -> int:
        """Width of what the router reads: a write query, or the merged keys of all heads."""
        return self.slot.kv_heads * self.slot.k_dim if self.window else self.slot.k_dim

    def num_positions(self, context: int) -> int:
        """The window, which is there in full from the first token on."""
        return self.window or 0

    def cache_tensors(self, context: int) -> tuple[CacheTensor, ...]:
        """The state, and the window where there is one: keys beside values, heads first, as products take them."""
        heads, width = self.slot.kv_heads, self.slot.k_dim + self.slot.v_dim
        state = CacheTensor((heads, self.num_slots, width), True)
        return (state,) if self.window is None else (state, CacheTensor((heads, self.window, width)))

    def slot_bytes(self, itemsize: int) -> tuple[int, ...]:
        positions = super().slot_bytes(itemsize) if self.window else ()
        return (*positions, *super().slot_bytes(state_itemsize(itemsize)))

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of the writer, with the router: addresses, the gate, and a write query unless it reads the
        keys."""
        matrices, others = super().writer_params(size)
        query = 0 if self.window else size.d_model
        return ParamCount(
            matrices + self.address_dim * (self.num_slots + query), others + self.address_dim + self.num_slots
        )

    def num_written(self, length: int) -> int:
        """Tokens that the form that trains writes to the slots, and that read them, of a row of `length` in one
        segment: as many as leave a window, and all where none does."""
        window = self.window or 0
        return length - window if length > window else length

    def attention_flops(self, size: SizeConfig, seq_len: int, owner: bool) -> int:
        """FLOPs of the chunk form, which trains: M slots, chunks of C tokens, heads of H.

        Per token that is written and query head, scores and values against the state take 4 M H, against the chunk
        4 C H, and what those weigh in the slots 4 C M; every reader makes the states between chunks, 4 M H per
        key/value head, and the owner the sums of log(1 - p), 2 C M. Whole chunks and all pairs in them are computed and
        counted, unlike the pairs of softmax attention. Other tokens do without slot keys, which count as parameters.
        """
        written, slots, width = self.num_written(seq_len), self.num_slots, self.slot.k_dim
        chunk = min(CHUNK, written)
        per_token = size.num_heads * 4 * (slots * width + chunk * width + chunk * slots)
        per_token += self.slot.kv_heads * 4 * slots * width + (2 * chunk * slots if owner else 0)
        total = per_token * chunk * -(-written // chunk)
        total -= 2 * self.address_dim * slots * (seq_len - written) if owner else 0
        return total + (super().attention_flops(size, seq_len, owner) if self.window else 0)

    @property
    def mark(self) -> str:
        return "b"

    @property
    def retention(self) -> tuple[tuple[str, int], ...]:
        return (*super().retention, (f"{self.num_slots:,} slots", self.num_slots))
