"""The remote decoder in vLLM: its Transformers backend, with the caches of sharing layers joined. Needs vLLM."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

# Cache types without scales, which each attention layer would have of its own.
UNSCALED = ("auto", "float16", "bfloat16", "float32")


class KVFrontierForCausalLM(TransformersForCausalLM):
    """Layers that reuse keys and values name the layer that writes them as the target of vLLM's KV sharing.

    Raises ValueError where vLLM would run the model wrongly, or without what it promises.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        vllm_config.model_config.hf_config.vllm_cache = "joined"
        registered = vllm_config.compilation_config.static_forward_context
        others = set(registered)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers = {
            extract_layer_index(name): layer
            for name, layer in registered.items()
            if name not in others and isinstance(layer, Attention)
        }
        share_caches(self.config, layers, vllm_config.cache_config.cache_dtype)


def share_caches(config: Any, layers: dict[int, Attention], cache_dtype: str) -> None:
    """Point each attention layer of `layers`, by index, to the one whose cache it reads, before caches are made.

    Backends read the target from their implementation object, the planner of the cache from the layer.
    """
    problems = []
    if sorted(layers) != list(range(config.num_hidden_layers)):
        problems.append(
            f"this process has the layers {sorted(layers)} of {config.num_hidden_layers}; a cache cannot be shared "
            "between pipeline stages: set pipeline_parallel_size=1"
        )
    for name in ("layer_sliding_windows", "layer_key_value_heads"):
        if getattr(config, name) is not None:
            problems.append(f"{name} differ, and vLLM's Transformers backend builds all layers alike")
    sinks = [layer for layer, has in enumerate(config.sinks) if has and layer in layers and not layers[layer].has_sink]
    if sinks:
        problems.append(f"layers {sinks} have attention sinks, which this version of vLLM leaves out")
    if cache_dtype not in UNSCALED:
        problems.append(f"kv_cache_dtype is {cache_dtype}; shared caches are tested without scales alone")
    if problems:
        raise ValueError("vLLM cannot serve this model: " + "; ".join(problems))
    for index, source in enumerate(config.kv_source_layers):
        if source == index:
            continue
        layer, target = layers[index], layers[source].layer_name
        if layer.kv_sharing_target_layer_name is not None:
            raise ValueError(f"{layer.layer_name} already reads the cache of {layer.kv_sharing_target_layer_name}")
        layer.kv_sharing_target_layer_name = target
        layer.impl.kv_sharing_target_layer_name = target
