"""Configuration of a Llama-style decoder whose layers share, cut and normalise keys and values as they are told.

This file and modeling_kvfrontier.py go with every exported model: they import nothing but torch and transformers.
"""

from typing import Any

from transformers import PreTrainedConfig

TIED_FORMS = (None, "vector", "projection")
# Numbers of each rule by which rotations are scaled.
SCALING_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_slow", "beta_fast", "attention_factor", "original_max_position_embeddings", "truncate"},
}
# Values of the keys that say what all layers do.
STYLE_VALUES = {
    "qk_norm": (None, "head", "all"),
    "norm_placement": ("before", "after", "both"),
    "hidden_act": ("silu", "gelu_pytorch_tanh"),
    "scale_embeddings": (False, True),
}
LAYER_TYPES = ("full_attention", "sliding_attention")


class KVFrontierConfig(PreTrainedConfig):
    """A decoder of `num_hidden_layers` layers; entry i of every list is about layer i.

    layer_types            full_attention or sliding_attention
    kv_source_layers       the layer whose keys and values it reads: itself, or an earlier layer that reads itself
    value_source_layers    the layer whose values it reads, where that is another than that of its keys
    sliding_window         positions that sliding layers see, the current one included
    num_key_value_heads    key/value heads
    rope_parameters        {rope_type: default, rope_theta: the rotary base}
    layer_sliding_windows, layer_key_value_heads, layer_rope_thetas
                           where these three differ between layers: lists that take the place of the single value, which
                           then is the largest window, the most heads, and the first layer's base
    layer_rotary_dims      leading elements of each head that are rotated, 0 for none, where not all of `head_dim` are
    layer_sinks            whether it has a learned attention-sink logit for each query head
    layer_kv_norms         whether it computes its keys and values from a norm of their own
    layer_rope_scaling     how frequencies of its rotation are slowed down, as rope_parameters of transformers say it
                           (linear, llama3 or yarn, with every number); None: they are not
    qk_norm                norm of queries and keys before they are rotated: head, of each head; all, of all together
    norm_placement         norms of attention and MLP: before, of their inputs; after, of their outputs; or both
    hidden_act             of the gated MLP: silu or gelu_pytorch_tanh
    scale_embeddings       embeddings are multiplied by the square root of their width
    layer_tied             vector: its keys are the values, too, and its outputs are rotated back by the position of
                           the query; projection: keys and values are of one projection, and keys rotated
    vllm_cache             how vLLM keeps what layers share, which must be said there: `joined`, as its plugin says, or
                           `per_layer`, a copy for each layer, where somebody accepts that

    A list that is None says the same of all layers: no sharing, full attention, the single value, no sinks, no norms.
    Raises ValueError with everything that is wrong.
    """

    model_type = "kvfrontier"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        rope_parameters: dict[str, Any] | None = None,
        layer_types: list[str] | None = None,
        kv_source_layers: list[int] | None = None,
        value_source_layers: list[int] | None = None,
        sliding_window: int | None = None,
        layer_sliding_windows: list[int | None] | None = None,
        layer_key_value_heads: list[int] | None = None,
        layer_rope_thetas: list[float] | None = None,
        layer_rotary_dims: list[int] | None = None,
        layer_sinks: list[bool] | None = None,
        layer_kv_norms: list[bool] | None = None,
        layer_tied: list[str | None] | None = None,
        layer_rope_scaling: list[dict[str, Any] | None] | None = None,
        qk_norm: str | None = None,
        norm_placement: str = "before",
        hidden_act: str = "silu",
        scale_embeddings: bool = False,
        vllm_cache: str | None = None,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.layer_types = ["full_attention"] * num_hidden_layers if layer_types is None else layer_types
        self.kv_source_layers = list(range(num_hidden_layers)) if kv_source_layers is None else kv_source_layers
        self.value_source_layers = value_source_layers
        self.sliding_window = sliding_window
        self.layer_sliding_windows = layer_sliding_windows
        self.layer_key_value_heads = layer_key_value_heads
        self.layer_rope_thetas = layer_rope_thetas
        self.layer_rotary_dims = layer_rotary_dims
        self.layer_sinks = layer_sinks
        self.layer_kv_norms = layer_kv_norms
        self.layer_tied = layer_tied
        self.layer_rope_scaling = layer_rope_scaling
        self.qk_norm = qk_norm
        self.norm_placement = norm_placement
        self.hidden_act = hidden_act
        self.scale_embeddings = scale_embeddings
        self.vllm_cache = vllm_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        problems = _lengths(self) or _shapes(self) + _rotation(self) + _sources(self)
        if problems:
            raise ValueError("; ".join(problems))
        super().__init__(**kwargs)

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """The role of each layer for the cache builder of transformers: layers that `reuse` get no cache."""
        sources = [*enumerate(self.kv_source_layers), *enumerate(self.value_sources)]
        read = {source for layer, source in sources if source != layer}
        return [
            "reuse" if source != layer else "store" if layer in read else None
            for layer, source in enumerate(self.kv_source_layers)
        ]

    @property
    def value_sources(self) -> list[int]:
        """The layer whose values each layer reads."""
        return self.value_source_layers or self.kv_source_layers

    @property
    def windows(self) -> list[int | None]:
        """Positions that each layer sees; None: all."""
        if self.layer_sliding_windows is not None:
            return self.layer_sliding_windows
        return [self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types]

    @property
    def key_value_heads(self) -> list[int]:
        return self.layer_key_value_heads or [self.num_key_value_heads] * self.num_hidden_layers

    @property
    def rope_thetas(self) -> list[float]:
        return self.layer_rope_thetas or [self.rope_parameters["rope_theta"]] * self.num_hidden_layers

    @property
    def rope_keys(self) -> list[tuple[int, float, tuple[tuple[str, Any], ...]]]:
        """(elements that are rotated, base, scaling as pairs of key and value) of each layer."""
        dims = self.layer_rotary_dims or [self.head_dim] * self.num_hidden_layers
        scaling = self.layer_rope_scaling or [None] * self.num_hidden_layers
        pairs = [tuple(sorted((own or {}).items())) for own in scaling]
        return list(zip(dims, self.rope_thetas, pairs, strict=True))

    @property
    def sinks(self) -> list[bool]:
        return self.layer_sinks or [False] * self.num_hidden_layers

    @property
    def kv_norms(self) -> list[bool]:
        return self.layer_kv_norms or [False] * self.num_hidden_layers

    @property
    def tied(self) -> list[str | None]:
        return self.layer_tied or [None] * self.num_hidden_layers

    @property
    def mask_names(self) -> list[str]:
        """The attention mask that each layer takes: its layer type, or where windows differ that and its window."""
        return [
            kind if window in (None, self.sliding_window) else f"{kind}_{window}"
            for kind, window in zip(self.layer_types, self.windows, strict=True)
        ]


def check_vllm(config: KVFrontierConfig) -> None:
    """Raise ValueError where vLLM would run the model wrongly, or keep a copy per layer that nobody asked for."""
    if config.value_sources != config.kv_source_layers:
        raise ValueError("vLLM cannot serve this model: its layers read keys of one layer and values of another")
    if config.scale_embeddings:
        raise ValueError("vLLM cannot serve this model: it puts embeddings of its own in the place of scaled ones")
    if "vector" in config.tied:
        raise ValueError("vLLM cannot serve this model: it would keep keys a second time, as the values that they are")
    unlike = [key for key in ("layer_sliding_windows", "layer_key_value_heads") if getattr(config, key) is not None]
    if unlike:
        raise ValueError(f"vLLM cannot serve this model: {', '.join(unlike)} differ, and it builds all layers alike")
    shared = sum(source != layer for layer, source in enumerate(config.kv_source_layers))
    if config.vllm_cache == "joined" or not (shared or any(config.sinks)):
        return
    plugin = "the plugin of kvfrontier is not there: pip install its checkout where vLLM runs"
    if any(config.sinks):
        raise ValueError(f"vLLM may leave out attention sinks, and {plugin}; it finds out")
    if config.vllm_cache != "per_layer":
        raise ValueError(
            f"vLLM would keep a copy of the keys and values for each of {shared} layers that share them, and {plugin}; "
            """or accept the copies: --hf-overrides '{"vllm_cache": "per_layer"}'"""
        )


def _lengths(config: KVFrontierConfig) -> list[str]:
    """List wrong lengths of lists; no list is read before they are right."""
    problems = [
        f"{name} is {getattr(config, name)!r}; it must be at least 1"
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        if getattr(config, name) < 1
    ]
    names = ("layer_types", "kv_source_layers", "layer_sliding_windows", "layer_key_value_heads", "layer_rope_thetas")
    for name in (
        *names,
        "value_source_layers",
        "layer_rotary_dims",
        "layer_sinks",
        "layer_kv_norms",
        "layer_tied",
        "layer_rope_scaling",
    ):
        values = getattr(config, name)
        if values is not None and len(values) != config.num_hidden_layers:
            problems.append(f"{name} has {len(values)} entries; num_hidden_layers is {config.num_hidden_layers}")
    return problems


def _shapes(config: KVFrontierConfig) -> list[str]:
    """List problems of styles, heads, layer types and windows."""
    problems = [
        f"{key} is {getattr(config, key)!r}; it must be one of {', '.join(map(str, values))}"
        for key, values in STYLE_VALUES.items()
        if getattr(config, key) not in values
    ]
    for layer, heads in enumerate(config.key_value_heads):
        if heads < 1 or config.num_attention_heads % heads:
            problems.append(f"layer {layer}: {heads} key/value heads do not divide {config.num_attention_heads} heads")
    if max(config.key_value_heads) != config.num_key_value_heads:
        problems.append(f"num_key_value_heads is {config.num_key_value_heads}; the list's most are other")
    for layer, (kind, window) in enumerate(zip(config.layer_types, config.windows, strict=True)):
        if kind not in LAYER_TYPES:
            problems.append(f"layer {layer}: layer type {kind!r}; it must be one of {', '.join(LAYER_TYPES)}")
        elif (kind == "sliding_attention") != (window is not None):
            problems.append(f"layer {layer}: {kind} with a window of {window}; sliding layers, and only they, have one")
        elif window is not None and window < 2:
            problems.append(f"layer {layer}: a window of {window}; the caches of transformers hold no less than 2")
        if config.tied[layer] not in TIED_FORMS:
            problems.append(f"layer {layer}: layer_tied is {config.tied[layer]!r}; it is vector, projection or None")
    sliding = [window for window in config.windows if window is not None]
    if config.sliding_window != max(sliding, default=None):
        problems.append(
            f"sliding_window is {config.sliding_window}; the layers' largest is {max(sliding, default=None)}"
        )
    return problems


def _rotation(config: KVFrontierConfig) -> list[str]:
    problems = []
    if config.head_dim % 2:
        problems.append(f"head_dim is {config.head_dim}; rotary embeddings need an even number")
    for layer, (rotary, _, pairs) in enumerate(config.rope_keys):
        scaling = dict(pairs)
        if scaling and set(scaling) != SCALING_KEYS.get(scaling.get("rope_type", ""), set()) | {"rope_type"}:
            problems.append(f"layer {layer}: layer_rope_scaling is {scaling!r}; it is linear, llama3 or yarn, in whole")
        if rotary % 2 or not 0 <= rotary <= config.head_dim:
            problems.append(f"layer {layer}: {rotary} of {config.head_dim} elements are rotated; it is an even number")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        problems.append(f"rope_parameters is {rope!r}; it must be of rope_type default, with a rope_theta")
    return problems


def _sources(config: KVFrontierConfig) -> list[str]:
    """List problems of sharing: a reader and its source share one cache, so they must see the same of it."""
    problems = []
    for layer, source in enumerate(config.kv_source_layers):
        if not 0 <= source <= layer or config.kv_source_layers[source] != source:
            problems.append(f"layer {layer} reads layer {source}; it must read itself, or an earlier layer that does")
            continue
        for name in ("layer_types", "windows", "key_value_heads", "rope_keys", "tied"):
            values = getattr(config, name)
            if values[layer] != values[source]:
                problems.append(
                    f"layer {layer} reads layer {source}; their {name} differ: {values[layer]!r}, not "
                    f"{values[source]!r}"
                )
        if source != layer and config.kv_norms[layer]:
            problems.append(f"layer {layer} reads layer {source} and projects nothing; it can have no kv_norm")
    for layer, (keys, values) in enumerate(zip(config.kv_source_layers, config.value_sources, strict=True)):
        if values == keys or problems:
            continue
        if layer == keys or not 0 <= values < layer or config.kv_source_layers[values] != values:
            problems.append(
                f"layer {layer} reads values of layer {values}; it must write none itself, and layer {values} must "
                "read itself"
            )
            continue
        for name in ("layer_types", "windows", "key_value_heads", "tied"):
            of = getattr(config, name)
            if of[values] != of[keys]:
                problems.append(
                    f"layer {layer} reads keys of layer {keys} and values of layer {values}; their {name} differ"
                )
    return problems
