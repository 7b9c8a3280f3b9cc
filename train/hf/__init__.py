"""Exported models in Hugging Face form. Importing this registers the remote decoder with the Auto classes.

configuration_kvfrontier.py and modeling_kvfrontier.py are copied into exported folders and import nothing of ours; nor
do the files that vLLM loads, which are installed under another name (vllm_plugin.py).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_kvfrontier import KVFrontierConfig
from .modeling_kvfrontier import KVFrontierForCausalLM, KVFrontierForSequenceClassification, KVFrontierModel

AutoConfig.register(KVFrontierConfig.model_type, KVFrontierConfig, exist_ok=True)
AutoModel.register(KVFrontierConfig, KVFrontierModel, exist_ok=True)
AutoModelForCausalLM.register(KVFrontierConfig, KVFrontierForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(KVFrontierConfig, KVFrontierForSequenceClassification, exist_ok=True)

__all__ = ["KVFrontierConfig", "KVFrontierForCausalLM", "KVFrontierForSequenceClassification", "KVFrontierModel"]
