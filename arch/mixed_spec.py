"""A mix of two stores, as a layer sees it; mixed.py has its reader."""

from .config import SizeConfig
from .grouped_spec import GroupedSpec
from .store_spec import ParamCount


class MixedSpec(GroupedSpec):
    """Two grouped stores as a layer sees them: a mix of their keys, and one of their values, per channel (mixed.py).

    No store is of this kind: it stands for both, with the properties of the one that the layer reads first.
    """

    kind, key, summary = "mixed", "kv_heads", "is a mix of two stores"

    def nbytes(self, context: int, itemsize: int) -> int:
        """Bytes of both stores after `context` tokens."""
        return 2 * super().nbytes(context, itemsize)

    @property
    def mixed_keys(self) -> int:
        """Weights of the keys of one store and head: one for each pair of elements that is rotated, or element."""
        return self.slot.k_dim - self.rope_key[0] // 2

    def reader_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of a reader, with the weights of the mix."""
        matrices, others = super().reader_params(size)
        return ParamCount(matrices, others + 2 * self.slot.kv_heads * (self.mixed_keys + self.slot.v_dim))
