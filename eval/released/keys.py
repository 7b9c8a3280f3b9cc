"""Keys of a config.json, checked as they are read; those that nobody reads and that may matter are found out."""

import re
from collections.abc import Mapping
from typing import Any

from data.cli import UsageError

LARGEST = 1 << 24  # of a count or a width in a config.json
MOST_LAYERS = 1 << 14

# Keys of such names may decide what is cached: one that no rule has read is refused.
SUSPECT = re.compile(
    r"kv|window|sliding|swa|cache|latent|compress|share|state_size|conv_kernel|ssm|mamba|linear_|index|chunk|stride"
    r"|layer_types|block_types?|blocks_type|hybrid|attn_type|per_layer_config|global_|full_attn|attention_type|retention"
    r"|recurrent|cross_layer|multi_query|attention_groups|attention_sinks?|heads?_dim|heads?_per_layer|per_layer_head"
    r"|(^|_)(mla|cla)(_|$)"
)
# Of them, those that do not.
HARMLESS = re.compile(
    r"use_cache|cache_implementation|kv_channels|max_window_layers|mlp_layer_types|moe_layer.*|.*_token_ind(ex|ices)"
    r"|.*(time_step|_dt|_chunk|chunk)_(rank|min|max|limit|init_floor|floor|size)|.*(conv|proj)_bias|use_mamba_kernels"
    r"|mamba_(hidden_act|rms_norm|norm_before_gate)|shared_(intermediate_size|moe_mode)|.*shared_expert.*"
    r"|(use_|clip_)?qkv(_bias)?|.*attn_(alpha|beta)_factor|linear_(a_log|dt)_.*|linear_allow_neg_eigval"
    r"|moe_latent_size|mamba_inner_layernorms|mla_scale_(q|kv)_lora|layernorm_(full|linear)_attention_(alpha|beta)"
    r"|use_mambapy|.*_per_layer_input|chunk_size_feed_forward|hybrid_block_size|qk_(nope_)?head_dim"
    r"|.*attention_sink_bias"
)


class ReleasedError(UsageError):
    """A config.json whose cache cannot be figured; the message names the file, the key, and the fix."""


def shown(name: str) -> str:
    """The beginning of a name out of a file, as one line."""
    return repr(name)[1:-1][:60]


class Keys:
    """Keys of a configuration, checked as they are read; `leftovers` are those that nobody has read.

    names  other names that keys have in configurations of this type
    """

    def __init__(
        self, where: str, values: Mapping[str, Any], defaults: Mapping[str, Any], names: Mapping[str, str] | None = None
    ):
        self.where, self.values, self.defaults, self.names = where, values, defaults, names or {}
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """The value as it stands, or transformers' default; None if there is none."""
        key = self.names.get(key, key)
        self.read.add(key)
        value = self.values.get(key, self.defaults.get(key))
        return value

    def refuse(self, key: str, problem: str) -> ReleasedError:
        return ReleasedError(f"{self.where}: {shown(self.names.get(key, key))} {problem}")

    def optional(self, key: str, least: int = 1) -> int | None:
        """A count, or None if the key is null or missing."""
        value = self.get(key)
        if value is None:
            return None
        most = MOST_LAYERS if key in ("num_hidden_layers", "num_layers") else LARGEST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(
                key, f"is {value!r:.60}; a whole number of at least {least}, at most {most:,}, belongs there"
            )
        return value

    def count(self, key: str, least: int = 1) -> int:
        value = self.optional(key, least)
        if value is None:
            raise self.refuse(key, "is missing, and has no default for this model_type")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value not in (None, True, False):
            raise self.refuse(key, f"is {value!r:.60}; true or false belongs there")
        return bool(value)

    def entries(self, key: str, length: int | None, kind: type) -> list[Any] | None:
        """A list of `length` entries of a type, or None if the key is null or missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(entry) is not kind for entry in value):
            raise self.refuse(key, f"is {value!r:.60}; a list of {kind.__name__} belongs there")
        if length is not None and len(value) != length:
            raise self.refuse(key, f"has {len(value)} entries for {length} layers")
        return value

    def same(self, key: str, expected: int, why: str) -> None:
        """Raise ReleasedError if a key that is given has another value than follows from others."""
        value = self.optional(key)
        if value is not None and value != expected:
            raise self.refuse(key, f"is {value} and must be {expected}, {why}")

    def ignore(self, *keys: str) -> None:
        """Take note of keys that this type of model has, and that decide nothing that is cached."""
        self.read.update(keys)

    def leftovers(self) -> list[str]:
        return [
            key
            for key, value in self.values.items()
            if key not in self.read
            and not key.startswith("_")
            and value not in (None, False, [], {})
            and SUSPECT.search(key)
            and not HARMLESS.fullmatch(key)
        ]
