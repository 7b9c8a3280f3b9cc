"""The stock Hugging Face classes: their names, styles, and every weight under both names.

grouped heads, no window       LlamaForCausalLM (MistralForCausalLM where Llama's config refuses the widths)
grouped heads, one window size MinistralForCausalLM, each layer sliding or full
... and layers without rotation SmolLM3ForCausalLM
... and biases of Q, K and V   Qwen2ForCausalLM
... and norms of Q and K heads Qwen3ForCausalLM
... of all Q, K, and of outputs Olmo2ForCausalLM; with one window size Olmo3ForCausalLM
the style of Gemma 3           Gemma3ForCausalLM
latent                         DeepseekV3ForCausalLM, dense layers and uncompressed queries

Olmo3ForCausalLM and Gemma3ForCausalLM have a rotary base for full layers, and one for sliding ones. Import reads
MistralForCausalLM with a window, too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import STYLES, ModelConfig, Style, head_dim, style_of
from .convert import Weight, parameter_shapes
from .plan import resolve_stack

# The class of each model_type.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Properties of the style llama that these classes have otherwise.
OLMO = {"norm_placement": "after", "qk_norm": "all"}
GEMMA3 = {"norm_placement": "both", "qk_norm": "head", "mlp": "geglu", "scale_embeddings": True}
OWN_STYLES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": OLMO,
    "olmo3": OLMO,
    "gemma3_text": GEMMA3,
}
# Classes in which layers of each kind have rotations of their own, and, where no key says so, the kind of each layer:
# the last of so many is full.
ROTATED_BY_KIND = {"olmo3": 4, "gemma3_text": 6}

GEMMA3_VALUES = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
# Rotary bases of sliding layers, where no key of rope_parameters has them: a key of config.json, and its default.
LOCAL_BASES = {"olmo3": ("", 500000.0), "gemma3_text": ("rope_local_base_freq", 10000.0)}
# Rules of scaled rotations: fields of RopeScalingConfig, and their keys in rope_parameters.
SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"},
    "yarn": {"factor": "factor", "low": "beta_slow", "high": "beta_fast", "attention": "attention_factor"},
}
# Tied embeddings: the tensor that may be there as a copy, and the one it is a copy of.
TIED = ("lm_head.weight", "model.embed_tokens.weight")
# Module of a Decoder, module of the stock class: of the model, and of one layer.
MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "kv_norm": "kv_layernorm",
    "reader": "self_attn",
    "reader.q_proj": "self_attn.q_proj",
    "reader.q_norm": "self_attn.q_norm",
    "writer.k_proj": "self_attn.k_proj",
    "writer.v_proj": "self_attn.v_proj",
    "writer.kv_proj": "self_attn.kv_proj",
    "writer.k_norm": "self_attn.k_norm",
    "writer.kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "writer.latent_norm": "self_attn.kv_a_layernorm",
    "reader.kv_up_proj": "self_attn.kv_b_proj",
    "reader.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
# Of classes that norm outputs.
OUTPUT_NORMS = {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def own_style(model_type: str) -> Style:
    return replace(STYLES["llama"], **OWN_STYLES.get(model_type, {}))


def weights(config: ModelConfig, hf: Mapping[str, Any]) -> list[Weight]:
    """Every parameter of a Decoder of `config`, with its tensor in the class that the config.json `hf` describes."""
    slot = resolve_stack(config).stores[0].slot
    rotary: dict[str, tuple[int, int]] = {}
    if slot.latent_dim and hf.get("rope_interleave", True):
        rotary["reader.q_proj"] = (head_dim(config.size), slot.rope_dim)
        rotary["writer.kv_down_proj"] = (slot.latent_dim, slot.rope_dim)
    modules = LAYER_MODULES | (OUTPUT_NORMS if style_of(config.size).norm_placement != "before" else {})
    offset = 1.0 if hf.get("model_type") == "gemma3_text" else 0.0
    scalar = hf.get("query_pre_attn_scalar", 256) if offset else slot.k_dim
    table = []
    for name, shape in parameter_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if module in MODULES:
            hf_module = MODULES[module]
        else:
            _, layer, module = module.split(".", 2)
            hf_module = f"model.layers.{layer}.{modules[module]}"
        factor = (slot.k_dim / scalar) ** 0.5 if module == "reader.q_norm" else 1.0  # scores have the head's scale here
        less = offset if module.endswith("norm") else 0.0
        table.append(Weight(name, f"{hf_module}.{kind}", shape, rotary.get(module), offset=less, factor=factor))
    return table
