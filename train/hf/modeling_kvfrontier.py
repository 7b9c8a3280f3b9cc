"""A Llama-style decoder in which layers read keys and values of their own or of an earlier layer.

Keys and values travel as plain tensors, returned by the layer that computes them and passed to the layers that read
them, with and without a cache: training and decoding take one path. Only the layer that computes them has weights for
them, and only it has a cache.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_kvfrontier import KVFrontierConfig, check_vllm

Rope = tuple[Tensor, Tensor]

# Attention implementations that know what to do with a sink; others would leave it out in silence.
WITH_SINKS = ("eager", "paged|eager", "flex_attention", "kernels-community/vllm-flash-attn3", "vllm")


# Those of which the mask of the last query is the last row of the mask of all.
WITH_MASK_ROWS = ("eager", "sdpa")


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class KVFrontierRMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, all of it in at least fp32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(at_least_fp32(input_dtype))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class KVFrontierMLP(nn.Module):
    """A gated MLP without biases."""

    def __init__(self, config: KVFrontierConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class KVFrontierScaledEmbedding(nn.Embedding):
    """Embeddings times the square root of their width, rounded to their type."""

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = super().forward(input_ids)
        return embeds * torch.full((), self.embedding_dim**0.5, dtype=embeds.dtype, device=embeds.device)


def norm_heads(norm: KVFrontierRMSNorm | None, states: Tensor) -> Tensor:
    """Norm heads [*, heads, head_dim], each or all together, as wide as `norm` is."""
    if norm is None:
        return states
    out: Tensor = norm(states) if norm.weight.shape[0] == states.shape[-1] else norm(states.flatten(-2)).view_as(states)
    return out


def norm_unscaled(norm: KVFrontierRMSNorm | None, states: Tensor) -> Tensor:
    """Norm heads as `norm_heads`, without the weights of `norm`."""
    if norm is None:
        return states
    wide = states if norm.weight.shape[0] == states.shape[-1] else states.flatten(-2)
    wide = wide.to(at_least_fp32(states.dtype))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return wide.to(states.dtype).view_as(states)


def rope_table(position_ids: Tensor, dim: int, theta: float, scaling: tuple[tuple[str, Any], ...] = ()) -> Rope:
    """Cosines and sines, fp32, of shape [batch, 1, length, dim / 2].

    Made anew in each forward: a buffer made in a constructor is left uninitialised by `from_pretrained`.
    """
    exponent, rule = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim, dict(scaling)
    frequency = slowed(theta**exponent, theta, rule) if rule else 1.0 / theta**exponent
    angle = position_ids[:, None, :, None].float() * frequency
    if "attention_factor" not in rule:
        return angle.cos(), angle.sin()
    return angle.cos() * rule["attention_factor"], angle.sin() * rule["attention_factor"]


def slowed(period: Tensor, theta: float, rule: dict[str, Any]) -> Tensor:
    """The frequencies, 1 / `period`, scaled as transformers does it."""
    factor: float = rule["factor"]
    frequency, half = 1.0 / period, len(period)
    if rule["rope_type"] == "linear":
        return frequency / factor
    original = rule["original_max_position_embeddings"]
    if rule["rope_type"] == "yarn":
        turns = (rule["beta_fast"], rule["beta_slow"])
        first, last = ((2 * half * math.log(original / (n * 2 * math.pi))) / (2 * math.log(theta)) for n in turns)
        if rule["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        last += 0.001 * (first == last)
        index = torch.arange(half, dtype=torch.float32, device=period.device)
        kept = 1 - ((index - first) / (last - first)).clamp(0, 1)
        return 1.0 / (factor * period) * (1 - kept) + frequency * kept
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    length = 2 * math.pi / frequency
    share = (original / length - low) / (high - low)
    slow = torch.where(
        length > original / low, frequency / factor, (1 - share) * frequency / factor + share * frequency
    )
    return torch.where(length < original / high, frequency, slow)


def last_position(rope: Rope) -> Rope:
    """The tables of the last position."""
    cos, sin = rope
    return cos[:, :, -1:], sin[:, :, -1:]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """The two halves of the last axis, as far as the tables go, rotated against each other in at least fp32."""
    cos, sin = rope
    rotary = 2 * cos.shape[-1]
    if not rotary:
        return x
    if rotary < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotary], rope), x[..., rotary:]), dim=-1)
    first, second = x.to(at_least_fp32(x.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def eager_attention_forward(
    module: "KVFrontierAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in at least fp32. A sink `s_aux` [heads] is one more score, of a value that is zero."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    scores = scores.to(at_least_fp32(scores.dtype))
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def build_head_norm(config: KVFrontierConfig, heads: int) -> KVFrontierRMSNorm | None:
    """The norm of queries or keys of so many heads; None: they have none."""
    if config.qk_norm is None:
        return None
    return KVFrontierRMSNorm(config.head_dim * (heads if config.qk_norm == "all" else 1), config.rms_norm_eps)


class KVFrontierAttention(nn.Module):
    """Attention of this layer's queries over keys and values that are passed in."""

    def __init__(self, config: KVFrontierConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.key_value_heads[layer_idx]
        self.scaling = self.head_dim**-0.5
        self.sliding_window = config.windows[layer_idx]
        self.is_causal = True
        self.tied = config.tied[layer_idx]
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = build_head_norm(config, config.num_attention_heads)
        self.has_sinks = config.sinks[layer_idx]
        if self.has_sinks:  # where there are none there is no such attribute: paged attention looks for it
            self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(
        self,
        hidden_states: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        position_embeddings: Rope,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query_states = self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        query_states = rotate(norm_heads(self.q_norm, query_states).transpose(1, 2), position_embeddings)
        if self.tied == "vector":
            # A view, so that both gradients are one before they join those of other layers, as with checkpointing.
            key_states = value_states = key_states.view_as(key_states)
        sinks = self.sinks if self.has_sinks else None
        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=sinks,
            **kwargs,
        )
        if self.tied == "vector":  # values are rotated; their sum by the position of the query is not
            cos, sin = position_embeddings
            attn_output = rotate(attn_output.transpose(1, 2), (cos, -sin)).transpose(1, 2)
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class KVFrontierOwnerAttention(KVFrontierAttention):
    """Attention of a layer that also computes the keys and values that it and others read."""

    def __init__(self, config: KVFrontierConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width = config.key_value_heads[layer_idx] * self.head_dim
        if self.tied:
            self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        else:
            self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_norm = build_head_norm(config, config.key_value_heads[layer_idx])

    def write(self, hidden_states: Tensor, rope: Rope, past_key_values: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of the tokens at hand, after those of the cache that they may see. Where keys are
        values, too, those have no width."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = [self.kv_proj] if self.tied else [self.k_proj, self.v_proj]
        made = [projection(hidden_states).view(shape) for projection in projections]
        key_states = rotate(norm_heads(self.k_norm, made[0]).transpose(1, 2), rope)
        value_states = (norm_unscaled(self.k_norm, made[0]) if self.tied else made[1]).transpose(1, 2)
        if self.tied == "vector":
            value_states = key_states[..., :0]
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
        return key_states, value_states


class KVFrontierDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: KVFrontierConfig, layer_idx: int):
        super().__init__()
        owns_kv = config.kv_source_layers[layer_idx] == layer_idx
        self.self_attn = (KVFrontierOwnerAttention if owns_kv else KVFrontierAttention)(config, layer_idx)
        self.mlp = KVFrontierMLP(config)
        before, after = config.norm_placement != "after", config.norm_placement != "before"

        def norm() -> KVFrontierRMSNorm:
            return KVFrontierRMSNorm(config.hidden_size, config.rms_norm_eps)

        self.input_layernorm = norm() if before else nn.Identity()
        self.has_kv_norm = config.kv_norms[layer_idx]
        if self.has_kv_norm:
            self.kv_layernorm = norm()
        self.post_attention_layernorm = norm()  # before the MLP, or with norms of outputs that of attention's
        self.norms_outputs = after
        if after:
            self.pre_feedforward_layernorm = norm() if before else nn.Identity()
            self.post_feedforward_layernorm = norm()

    def forward(
        self,
        hidden_states: Tensor,
        key_states: Tensor | None,
        value_states: Tensor | None,
        position_embeddings: Rope,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        last_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next residual stream, and the keys and values that this layer read: its own, or those passed in.

        All three are tensors in a flat tuple, and passed by position, as gradient checkpointing requires. With
        `last_only` keys and values are computed for all positions, and the residual stream goes on with the last, of
        which `attention_mask` then is.
        """
        normed = self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, KVFrontierOwnerAttention):
            source = self.kv_layernorm(hidden_states) if self.has_kv_norm else normed
            key_states, value_states = self.self_attn.write(source, position_embeddings, past_key_values)
        assert key_states is not None and value_states is not None
        if last_only:
            length = hidden_states.shape[1]
            if attention_mask is None:  # a static cache has slots beyond the prompt
                key_states, value_states = key_states[:, :, :length], value_states[:, :, :length]
            hidden_states, normed = hidden_states[:, -1:], normed[:, -1:]
            position_embeddings = last_position(position_embeddings)
        attended, _ = self.self_attn(normed, key_states, value_states, position_embeddings, attention_mask, **kwargs)
        if self.norms_outputs:
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
            out = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            hidden_states = hidden_states + self.post_feedforward_layernorm(out)
        else:
            hidden_states = hidden_states + attended
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, key_states, value_states


class KVFrontierPreTrainedModel(PreTrainedModel):
    config: KVFrontierConfig
    config_class = KVFrontierConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KVFrontierDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": KVFrontierDecoderLayer, "attentions": KVFrontierAttention}  # noqa: RUF012

    def __init__(self, config: KVFrontierConfig):
        self._supports_sdpa = not any(config.sinks)  # read by the constructor below, which then chooses eager
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KVFrontierAttention) and module.has_sinks:
            init.zeros_(module.sinks)

    @staticmethod
    def create_masks_for_generate(
        config: KVFrontierConfig,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The masks of `config.mask_names`, each for the keys that the first layer of that name reads."""
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and len(set(config.mask_names)) > 1:
            raise ValueError(
                "one 4D attention mask for layers that see different positions; give a dict of masks by "
                f"name: {', '.join(dict.fromkeys(config.mask_names))}"
            )
        masks = {}
        for layer, name in enumerate(config.mask_names):
            if name in masks:
                continue
            window, own = config.windows[layer], config
            create = create_causal_mask if window is None else create_sliding_window_causal_mask
            if window not in (None, config.sliding_window):  # the mask function reads the window there
                own = copy.copy(config)
                own.sliding_window = window
            masks[name] = create(
                config=own,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                layer_idx=layer,
            )
        return masks


def fit_windows(cache: Cache, config: KVFrontierConfig) -> None:
    """Give each layer of a cache that holds nothing yet its own window: builders of transformers know of one, the
    largest. A cache without windows stays so."""
    for layer, (built, window) in enumerate(zip(cache.layers, config.windows, strict=False)):
        if window in (None, config.sliding_window) or built.is_initialized:
            continue
        if isinstance(built, StaticSlidingWindowLayer) and built.max_cache_len > window:
            cache.layers[layer] = StaticSlidingWindowLayer(built.max_cache_len, sliding_window=window)
        elif isinstance(built, DynamicSlidingWindowLayer) and built.sliding_window > window:
            cache.layers[layer] = fitted = DynamicSlidingWindowLayer(sliding_window=window)
            fitted.record_past = built.record_past


class KVFrontierModel(KVFrontierPreTrainedModel):
    def __init__(self, config: KVFrontierConfig):
        super().__init__(config)
        if self.config._attn_implementation == "vllm":
            check_vllm(config)
        embedding = KVFrontierScaledEmbedding if config.scale_embeddings else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KVFrontierDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = KVFrontierRMSNorm(config.hidden_size, config.rms_norm_eps)
        pairs = zip(config.kv_source_layers, config.value_sources, strict=True)
        self.last_readers = {source: layer for layer, pair in enumerate(pairs) for source in pair}
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        last_only: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden states, normalised. `attention_mask` may be a dict of masks by `config.mask_names`.

        With `last_only` no other position than the last need be returned: the layers above the last that computes keys
        and values then run on that one alone, and of that layer all but its keys and values.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if any(config.sinks) and (chosen := config._attn_implementation) not in WITH_SINKS:
            raise ValueError(
                f"{chosen} takes no attention sinks, which this model has; load it with attn_implementation='eager'"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None:
            fit_windows(past_key_values, config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks_for_generate(config, inputs_embeds, masks, past_key_values, position_ids)
        if missing := sorted(set(config.mask_names) - masks.keys()):
            raise ValueError(f"no attention mask for {', '.join(missing)}; generate_batch knows one window size alone")
        ropes = {key: rope_table(position_ids, *key) for key in set(config.rope_keys)}

        tail, length = len(self.layers), inputs_embeds.shape[1]
        if last_only and length > 1 and self.can_stop(masks, **kwargs):
            tail = max(config.kv_source_layers)
        hidden_states = inputs_embeds
        nothing = (None, None)
        written: list[tuple[Tensor | None, Tensor | None]] = [nothing] * len(self.layers)
        for layer, block in enumerate(self.layers):
            sources = config.kv_source_layers[layer], config.value_sources[layer]
            mask, rope = masks[config.mask_names[layer]], ropes[config.rope_keys[layer]]
            read = written[sources[0]][0], written[sources[1]][1]
            if layer >= tail:
                mask = None if mask is None else mask[..., -1:, :]
            if layer > tail:
                rope = last_position(rope)
                if mask is None and read[0] is not None and read[1] is not None:
                    read = (read[0][:, :, :length], read[1][:, :, :length])
            hidden_states, *states = block(
                hidden_states,
                *read,
                position_embeddings=rope,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                last_only=layer == tail,
                **kwargs,
            )
            if sources[0] == layer:
                written[layer] = (states[0], states[1])
            for source in sources:
                if layer == self.last_readers[source]:
                    written[source] = nothing  # checkpointing would keep them for nobody
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def can_stop(self, masks: dict[str, Any], **kwargs: Any) -> bool:
        """Tell whether the last position can go on alone: nobody records the others, and its mask is the last row.

        Without a mask it sees all.
        """
        recorded = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name, getattr(self.config, name, False)) for name in recorded):
            return False
        rows = [mask is None or (isinstance(mask, Tensor) and mask.ndim == 4) for mask in masks.values()]
        return self.config._attn_implementation in WITH_MASK_ROWS and all(rows)


class KVFrontierForCausalLM(KVFrontierPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KVFrontierConfig):
        super().__init__(config)
        self.model = KVFrontierModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: all; a tensor: those positions); with `labels` the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last_only=labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 1,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[Any, Any], *args: Any, **kwargs: Any
    ) -> bool:
        returned: bool = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if (built := model_kwargs.get("past_key_values")) is not None:
            fit_windows(built, self.config)
        return returned

    def _get_static_cache_init_shape(self) -> Any:
        """None, so that no layer is allocated before it is written, where they differ in what they cache."""
        config = self.config
        if config.layer_sliding_windows or config.layer_key_value_heads or "vector" in config.tied:
            return None
        return super()._get_static_cache_init_shape()


class KVFrontierForSequenceClassification(GenericForSequenceClassification, KVFrontierPreTrainedModel):
    """A linear map of the last hidden state at the last token of each row, [batch, config.num_labels]."""

    def __init__(self, config: KVFrontierConfig):
        KVFrontierPreTrainedModel.__init__(self, config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = KVFrontierModel(config)  # the class above would ask AutoModel, which may not know of this one
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
