"""Entry point of vLLM's group `vllm.general_plugins`: exported models that share keys and values save memory there too.

vLLM runs the remote decoder without this too, correctly, but gives every layer a cache of its own.
"""


def register() -> None:
    """Tell vLLM of our class, by name, since importing it here would start CUDA in processes that fork.

    vLLM calls this in each of its processes, and more than once in some. By then the package this module lies in has
    registered the remote decoder with the Auto classes, so that no remote code is needed.
    """
    from vllm import ModelRegistry

    name = "KVFrontierForCausalLM"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"train.hf.vllm_model:{name}")
