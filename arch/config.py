"""Authored configuration: what a person writes in `configs/arch` and `configs/size`.

Plain mutable dataclasses of plain types, so that they serve as Hydra schema nodes, as JSON in a checkpoint, and as
arguments in a test. A value that may be a number or a share has type Any, since OmegaConf cannot merge a union inside a
mapping. `plan.resolve` checks the values, once.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

# Keys of newer versions, left out of files where they are null.
STORE_KEYS = ("head_dim", "k_dim", "v_dim", "tied", "rope", "matrix", "query_scale", "rope_scaling", "stride", "chunk")
LATENT_KEYS = ("heads", "k_dim")

# Limits of what is resolved: above every model, and low enough for an instant answer.
MAX_LAYERS = 1024
MAX_WIDTH = 2**24  # heads, widths, slots, tokens of a vocabulary
MAX_COUNT = 10**15  # tokens, positions and steps: within 64 bits in every product that is formed
MAX_NESTING = 16  # lists in the lists of a pattern


@dataclass
class LatentConfig:
    """A multi-head latent store (DeepSeek-V2, section 2.1): one latent and one rotary key per token, for all heads.

    Widths are elements (`512`) or a share of the head dimension (`4/1`, `1/2`: the paper's choices). With a `rope_dim`
    of 0 there is no rotary key, and the layers that read the store know no positions.

    heads  latents per token, each `dim` wide and read by an equal share of the query heads, in order (grouped latent
           attention, arXiv 2505.21487), so that devices which divide the heads can divide the latents; null: 1
    k_dim  width of the part of each key that is expanded from the latent; null: the head dimension
    """

    dim: Any = "4/1"
    rope_dim: Any = "1/2"
    heads: int | None = None
    k_dim: Any = None


@dataclass
class MatrixConfig:
    """A matrix per head in place of positions, written by the gated delta rule (delta.py has the formulas).

    rule       gated_delta (Gated DeltaNet, Qwen3-Next): a decay per head; or kda (Kimi Linear): per channel of its keys
    heads      states, each with values of its own: a number, or a share of the query heads
    key_heads  heads of queries and keys, each for `heads / key_heads` states: a number, or a share of the query heads
    k_dim, v_dim   widths of keys and values: elements, or a share of the head dimension
    conv       tokens that the short convolution of queries, keys and values sees, counting the current one
    """

    rule: str = "gated_delta"
    heads: Any = "1/1"
    key_heads: Any = "1/1"
    k_dim: Any = "1/1"
    v_dim: Any = "1/1"
    conv: int = 4


@dataclass
class QueryScaleConfig:
    """Queries scaled with the logarithm of their position p, counted from 0 in each document, so that attention does
    not spread out over long contexts.

    slope   a number: factors are 1 + slope * log(1 + floor((p + 1) / tokens)) (Llama 4's temperature tuning); or
            `learned`: slope_n * log(p + 1) + bias_n, two parameters of each query head n, initially 0 and 1
            (Mistral Large 4; with a fixed bias, scalable softmax)
    tokens  with a number as slope: positions after which the factor first changes
    """

    slope: Any = "learned"
    tokens: int = 8192


@dataclass
class RopeScalingConfig:
    """Lower frequencies of rotary embeddings, for longer contexts (rope_scaling.py has the rules).

    rule       linear, llama3 or yarn
    factor     by which frequencies are divided
    original   for llama3 and yarn: the context length before the extension
    low, high  for llama3 and yarn: a frequency with fewer than `low` turns within `original` positions is divided, one
               with more than `high` is left alone; null: 1 and 4 for llama3, 1 and 32 for yarn
    attention  for yarn: factor of cosines and sines, whose square scales the scores; null: 0.1 log(factor) + 1
    truncate   for yarn: round the ends of the range between `low` and `high` to whole frequencies
    """

    rule: str = "linear"
    factor: float = 1.0
    original: int | None = None
    low: float | None = None
    high: float | None = None
    attention: float | None = None
    truncate: bool = True


@dataclass
class StoreConfig:
    """A type of store: what one cached position holds and how long it is kept.

    kv_heads    key/value heads: a number, a share of the query heads (`1/4`), or `all`
    latent      a latent instead of key/value heads
    head_dim    width of each key and value, and of the queries and outputs of layers that read them: a number, or a
                share of the size's head dimension (`2/1`); null: that dimension
    k_dim       the same for keys and queries only (thin keys: `1/4`); null: head_dim
    v_dim       the same for values and outputs only; null: head_dim
    tied        one tensor for keys and values: `vector`, the rotated key is also the value, and outputs are rotated
                back (DeepSeek-V4; plain K = V if rope is none); `half`, the first half of each value is also that of
                its key, whose rotated other half is shared by all heads (GTA); or `projection`, one projection makes
                both, and both are cached: keys are normed and rotated, values normed without a scale if keys are normed
                (Gemma 4). With the first two, keys and values are equally wide
    matrix      a matrix per head instead of positions; only the layer that writes it reads it
    window      keep this many positions, counting the current one; null keeps all, or with `slots` none
    stride      pool this many positions into one entry, by learned weights: beside a window (strided.py), or of a
                latent, which needs none (strided_latent.py)
    chunk       instead of a window: keep the positions of the current chunk of this many, counted from the start of
                each document (Llama 4); a layer sees those up to the current one
    slots       a bounded store: merge positions into this many slots, whatever the context
    rule        how a bounded store is written and read: gated, ring_slots or ring_router (bounded.py has the formulas)
    sinks       a learned attention-sink logit per query head in every layer that reads the store; needs a window,
                chunk or slots in this store or another one of the layout
    kv_norm     writers normalise the residual stream with a norm of their own before projecting (CLA paper, 3.1)
    rope        how much of each key is rotated: `full`, `none`, a leading share (`1/4`) or number of elements; null
                takes the size's rotary_fraction. Latents have `latent.rope_dim` instead, which may be 0
    rope_theta  rotary base of this store; null takes the size's
    rope_scaling  lower frequencies of its rotation, for longer contexts
    query_scale   scale the queries of layers that read the store with the logarithm of their position
    """

    kv_heads: Any = None
    latent: LatentConfig | None = None
    head_dim: Any = None
    k_dim: Any = None
    v_dim: Any = None
    tied: str | None = None
    matrix: MatrixConfig | None = None
    window: int | None = None
    stride: int | None = None
    slots: int | None = None
    rule: str | None = None
    sinks: bool = False
    kv_norm: bool = False
    rope: Any = None
    rope_theta: float | None = None
    rope_scaling: RopeScalingConfig | None = None
    query_scale: QueryScaleConfig | None = None
    chunk: int | None = None


@dataclass
class LayoutConfig:
    """A KV layout: named store types, and the layers that write and read them, from the bottom up.

    stores       name -> type of store; arch/config.py has its keys
    pattern      a tile of `new X` / `reuse X`, repeated over the depth. `new X x3` repeats an item; nested lists only
                 group items for the reader. With `window=256` after X a layer sees the last 256 of the positions that
                 X keeps. `reuse X values=Y` reads keys of X and values of Y; `reuse X mix=Y` reads keys and values that
                 are a learned mix of both stores, per channel.
                 Or a list of sections `{layers: 2 | 1/2, pattern: [...]}`: each takes that many layers (a share is
                 rounded down; sections that exceed the depth are cut, the last one first); the one section without
                 `layers` takes the rest.
    short_group  position of the incomplete tile if the tile does not divide its layers: `first` or `last`
    """

    stores: dict[str, StoreConfig] = field(default_factory=dict)
    pattern: list[Any] = field(default_factory=list)
    short_group: str = "last"


@dataclass
class TokenDecoderConfig(LayoutConfig):
    """The token decoder of a Block Transformer, with a layout of its own; its windows count positions within a block.

    kind       how a block's context enters: `prefix`, as `prefix` positions before the tokens; `summation`, added to
               the start token and the tokens; or `cross`, as vectors that every layer attends to after its own
               attention (Block Transformer, 2.4 and F.2)
    bos_token  the start token of `summation` and `cross`
    layers     a number, or its share of size.num_layers; the block decoder has the rest
    d_model, num_heads, head_dim, d_ff   null: as in the block decoder
    """

    kind: str = "prefix"
    prefix: int = 2
    bos_token: int = 0
    layers: Any = "1/2"
    d_model: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None


@dataclass
class EncoderConfig:
    """The RoBERTa-type encoder of the embedders `encoder` and `cls`; defaults are the paper's (F.1).

    cls_tokens  for `cls`: outputs that represent the block
    """

    layers: int = 3
    d_model: int = 256
    num_heads: int = 8
    d_ff: int = 1024
    cls_tokens: int = 3


@dataclass
class BlockConfig:
    """Options of a Block Transformer (Ho et al. 2024). With them, the enclosing layout is that of the block decoder.

    length     tokens of a block
    embedder   `lookup`: embeddings of width d_model / length, end to end; `projection`: embeddings of width
               `embed_dim`, end to end, then a linear map; `encoder`: outputs of an encoder over the block's tokens, end
               to end, then a linear map; `cls`: the same with the outputs at CLS tokens before the block's
    embed_dim  for `projection`; null: d_model
    encoder    for `encoder` and `cls`
    start      predict the first block too, from a learned context
    """

    length: int = 4
    embedder: str = "lookup"
    embed_dim: int | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    start: bool = False
    token: TokenDecoderConfig = field(default_factory=TokenDecoderConfig)


@dataclass
class ArchConfig(LayoutConfig):
    """The layout of a decoder; with `block`, that of a Block Transformer's block decoder: windows count blocks.

    block        options of a Block Transformer; null: a decoder
    """

    block: BlockConfig | None = None


@dataclass(frozen=True)
class Style:
    """Properties of a layer besides its KV layout; SizeConfig explains them."""

    norm: str
    mlp: str
    bias: bool
    parallel_residual: bool
    rotary_fraction: float
    qk_norm: str = "none"
    output_gate: str = "none"
    qkv_bias: bool = False
    norm_placement: str = "before"
    scale_embeddings: bool = False


# Presets of `SizeConfig.style`.
STYLES = {
    "llama": Style("rmsnorm", "swiglu", bias=False, parallel_residual=False, rotary_fraction=1.0),
    "neox": Style("layernorm", "gelu", bias=True, parallel_residual=True, rotary_fraction=0.25),
}
NORMS, MLPS = ("rmsnorm", "layernorm"), ("swiglu", "gelu", "geglu")
NORM_PLACEMENTS = ("before", "after", "both")
QK_NORMS, OUTPUT_GATES = ("none", "head", "all"), ("none", "head", "channel")
STYLE_KEYS = tuple(field.name for field in fields(Style))


@dataclass
class SizeConfig:
    """Widths and depth of a model, and the training budget that goes with them.

    num_layers         layers, at most 1024; in a Block Transformer, of both decoders together
    d_model            width of the residual stream
    num_heads          query heads
    head_dim           null: d_model / num_heads
    d_ff               width of the MLP's hidden layer
    vocab_size         tokens of the vocabulary, at least those of the data
    seq_len            tokens per training sequence
    tie_embeddings     use the embeddings as output projection too
    rope_theta         base of rotary embeddings
    norm_eps           added to the variance in norms
    init_std           standard deviation of new weights
    max_window         limit of the layout's windows, chunks, strides, slots and query_scale.tokens; set by small sizes,
                       which are trained on short sequences
    style              preset of the next ten keys, each of which overrides it unless null: llama (rmsnorm, swiglu, no
                       biases, sequential residuals, whole heads rotated) or neox (GPT-NeoX: layernorm, gelu, biases,
                       parallel residuals, a quarter of each head rotated); neither has norms of queries and keys, or
                       output gates
    norm               rmsnorm or layernorm
    mlp                swiglu, gelu, or geglu, which is gated by the tanh form of GELU (Gemma)
    bias               whether projections of attention and MLP have biases
    parallel_residual  whether attention and MLP read the same residual stream and are added to it together
    rotary_fraction    leading share of each head that is rotated; latent stores have `latent.rope_dim` instead
    qk_norm            RMSNorm of queries and of keys before they are rotated: none; head, over each head (Qwen3, Gemma
                       3); all, over all heads together (OLMo 2)
    output_gate        sigmoid of a projection of the layer's input, by which the heads' outputs are multiplied: none;
                       head, one factor per head; channel, one per element (Qwen3-Next). Like qk_norm, not in the
                       attention of a `cross` token decoder to its context
    qkv_bias           whether projections to queries, keys and values have biases even if `bias` is false (Qwen2)
    norm_placement     place of the norms of attention and MLP: before, on their inputs; after, on their outputs before
                       these are added to the residual stream (OLMo 2); or both (Gemma 3)
    scale_embeddings   multiply embeddings by the square root of d_model (Gemma); not in a Block Transformer
    tokens             training tokens: like the next two, a default of the trainer, never read by the model
    batch_size         sequences per optimizer step
    lr                 peak learning rate
    """

    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 8
    head_dim: int | None = None
    d_ff: int = 2048
    vocab_size: int = 50304
    seq_len: int = 2048
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    max_window: int | None = None
    style: str = "llama"
    norm: str | None = None
    mlp: str | None = None
    bias: bool | None = None
    parallel_residual: bool | None = None
    rotary_fraction: float | None = None
    qk_norm: str | None = None
    output_gate: str | None = None
    qkv_bias: bool | None = None
    norm_placement: str | None = None
    scale_embeddings: bool | None = None
    tokens: int = 1_000_000
    batch_size: int = 16
    lr: float = 1e-3


# Hugging Face's config.json has these fields of a size under other names, which tools look for.
HF_SIZE_KEYS = {
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}


@dataclass
class ModelConfig:
    """All that defines a model: a layout at a size. `model_config` makes one from names."""

    arch: ArchConfig = field(default_factory=ArchConfig)
    size: SizeConfig = field(default_factory=SizeConfig)

    def __post_init__(self) -> None:
        if isinstance(self.arch, str) or isinstance(self.size, str):
            raise TypeError(
                f"ModelConfig takes an ArchConfig and a SizeConfig; by name it is "
                f"arch.model_config({self.arch!r}, {self.size!r})"
            )


def head_dim(size: SizeConfig) -> int:
    """Width of a query head."""
    return size.d_model // size.num_heads if size.head_dim is None else size.head_dim


def style_of(size: SizeConfig) -> Style:
    """The preset `size.style` with what `size` overrides. Raises KeyError for an unknown style."""
    own = {key: getattr(size, key) for key in STYLE_KEYS}
    return replace(STYLES[size.style], **{key: value for key, value in own.items() if value is not None})


def has_qkv_bias(size: SizeConfig) -> bool:
    """Return whether projections to queries, keys and values, or to latents, have biases."""
    style = style_of(size)
    return style.bias or style.qkv_bias


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass `config` as plain nested dicts, which `from_dict` reads back.

    Style properties and newer keys of a store are left out if they are null, so that files, and the grouping of runs,
    are the same as before these keys existed.
    """

    def written(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = {key for key, _ in items}
        newer = STORE_KEYS if "kv_heads" in names else LATENT_KEYS if {"dim", "rope_dim"} <= names else STYLE_KEYS
        return {key: value for key, value in items if value is not None or key not in newer}

    return asdict(config, dict_factory=written)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Build the dataclass `cls` from plain nested dicts, as read from YAML or JSON.

    Raises ValueError on a key that `cls` does not have and on a value of another type.
    """
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; its keys are {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    return cls(**{key: _convert(f"{cls.__name__}.{key}", hints[key], value) for key, value in values.items()})


def _convert(where: str, hint: Any, value: Any) -> Any:
    """Return `value` as the type `hint`. Raises ValueError if it is of another."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        kind = get_origin(option) or option
        if is_dataclass(option) and isinstance(value, dict):
            return from_dict(option, value)  # type: ignore[arg-type]
        if kind is dict and isinstance(value, dict):
            return {key: _convert(f"{where}.{key}", get_args(option)[1], item) for key, item in value.items()}
        if kind is Any or (kind is float and type(value) is int) or (kind is not dict and type(value) is kind):
            return value
    names = " or ".join(
        "null" if option is type(None) else getattr(option, "__name__", str(option)) for option in options
    )
    raise ValueError(f"{where} is {value!r}; it must be {names}")
