"""Stores of a matrix per head, as a layout declares them; delta.py has their modules."""

from dataclasses import dataclass
from typing import Any

from .config import MAX_WIDTH, SizeConfig, StoreConfig, head_dim
from .store_spec import CacheTensor, ParamCount, SlotShape, StoreSpec, own_widths, resolve_share, state_itemsize

# Rules of stores of a matrix per head (delta.py), and tokens that their parallel form takes at a time, at most.
MATRIX_RULES = ("gated_delta", "kda")
DELTA_CHUNK = 64


@dataclass(frozen=True)
class MatrixShape:
    """Properties of a store of a matrix per head besides its states; config.MatrixConfig explains them."""

    rule: str
    key_heads: int
    conv: int


def delta_chunk(seq_len: int) -> int:
    """Tokens of a chunk of the delta rule: a power of two."""
    return min(DELTA_CHUNK, 1 << (seq_len - 1).bit_length())


@dataclass(frozen=True)
class MatrixSpec(StoreSpec):
    """A matrix per head, of `slot`'s widths, and the last inputs of a short convolution (delta.py)."""

    matrix: MatrixShape = MatrixShape("gated_delta", 0, 1)

    kind, key, summary = "matrix", "matrix", "holds a matrix per head"
    masked, grows, rotates = False, False, False
    fades = True
    unshared = "its queries pass a convolution, whose last inputs are cached with the store"

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        assert store.matrix is not None
        width = head_dim(size)
        heads = resolve_share(f"{where}.matrix.heads", store.matrix.heads, size.num_heads, "the query heads", problems)
        k_dim, v_dim = (
            resolve_share(f"{where}.matrix.{key}", getattr(store.matrix, key), width, "the head dimension", problems)
            for key in ("k_dim", "v_dim")
        )
        return SlotShape(kv_heads=heads, k_dim=k_dim, v_dim=v_dim)

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        assert store.matrix is not None
        matrix, heads = store.matrix, slot.kv_heads
        key_heads = resolve_share(
            f"{where}.matrix.key_heads", matrix.key_heads, size.num_heads, "the query heads", problems
        )
        if heads and key_heads and heads % key_heads:
            problems.append(
                f"{where}.matrix.key_heads {key_heads} does not divide its {heads} heads; each serves as many states"
            )
        if matrix.rule not in MATRIX_RULES:
            problems.append(f"{where}.matrix.rule is {matrix.rule!r}; it is {' or '.join(MATRIX_RULES)}")
        if not 1 <= matrix.conv <= MAX_WIDTH:
            problems.append(
                f"{where}.matrix.conv is {matrix.conv}; it counts the current token, so at least 1, and at most "
                f"{MAX_WIDTH:,}"
            )
        return {"matrix": MatrixShape(matrix.rule, key_heads, matrix.conv)}

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        problems += [
            f"{where}.{key} is {getattr(store, key)}; a matrix per head has no positions, slots or scores: leave it out"
            for key in ("window", "slots", "rule", "rope", "rope_theta", "sinks")
            if getattr(store, key) not in (None, False)
        ]
        problems += own_widths(where, store, "of a matrix per head have the widths of matrix.k_dim and matrix.v_dim")

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields.get("matrix"))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> StoreSpec:
        return cls(**fields | {"matrix": MatrixShape(**fields["matrix"])})

    @property
    def max_positions(self) -> int | None:
        return 0

    def num_positions(self, context: int) -> int:
        """0: a state holds no single position."""
        return 0

    @property
    def num_channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.matrix.key_heads * self.slot.k_dim + self.slot.kv_heads * self.slot.v_dim

    @property
    def num_decays(self) -> int:
        """Decays of a token."""
        return self.slot.kv_heads * (self.slot.k_dim if self.matrix.rule == "kda" else 1)

    def cache_tensors(self, context: int) -> tuple[CacheTensor, ...]:
        """The states, and the last inputs of the convolution. These are no sums, but kept in the type of states, since
        the norm of what is read would amplify their rounding."""
        states = CacheTensor((self.slot.kv_heads, self.slot.k_dim, self.slot.v_dim), True)
        return states, CacheTensor((self.matrix.conv - 1, self.num_channels), True)

    def slot_bytes(self, itemsize: int) -> tuple[int, ...]:
        """Bytes of a state."""
        return (self.slot.k_dim * self.slot.v_dim * state_itemsize(itemsize),)

    def low_rank_params(self, size: SizeConfig, width: int) -> int:
        """Parameters of a projection to `width`, in rule `kda` through as many channels as a value has."""
        inner = self.slot.v_dim
        return (size.d_model + width) * inner if self.matrix.rule == "kda" else size.d_model * width

    def reader_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of the gate, the output and the norm before it."""
        values = self.slot.kv_heads * self.slot.v_dim
        return ParamCount(self.low_rank_params(size, values) + values * size.d_model, self.slot.v_dim)

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of queries, keys, values, strengths and decays, and the convolution."""
        matrices = size.d_model * (self.num_channels + self.slot.kv_heads)
        others = self.num_channels * self.matrix.conv + self.slot.kv_heads + self.num_decays
        return ParamCount(matrices + self.low_rank_params(size, self.num_decays), others)

    def pair_flops(self, size: SizeConfig) -> int:
        """0: pairs of tokens are compared within chunks alone, which `attention_flops` counts."""
        return 0

    def attention_flops(self, size: SizeConfig, seq_len: int, owner: bool) -> int:
        """FLOPs of the chunk form, which trains: whole chunks of C tokens, states of K V.

        Per token and state, products of queries and keys with keys take 4 C K (2 (C - 1) K where channels fade on their
        own, which are those of earlier tokens alone), the triangular system C (K + V), the state's part in corrections
        and reads and the state after the chunk 6 K V, and reads of the corrections 2 C V.
        """
        chunk, k_dim, v_dim = delta_chunk(seq_len), self.slot.k_dim, self.slot.v_dim
        pairs = 2 * (chunk - 1) if self.matrix.rule == "kda" else 4 * chunk
        per_token = pairs * k_dim + chunk * (k_dim + v_dim) + 6 * k_dim * v_dim + 2 * chunk * v_dim
        return self.slot.kv_heads * per_token * chunk * -(-seq_len // chunk)

    @property
    def mark(self) -> str:
        return "d"

    @property
    def slot_text(self) -> str:
        return f"{self.slot.kv_heads} x ({self.slot.k_dim} x {self.slot.v_dim})"

    @property
    def retention(self) -> tuple[tuple[str, int], ...]:
        return ((f"{self.slot.kv_heads} states", self.slot.kv_heads),)
