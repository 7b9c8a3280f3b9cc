"""Entry point of vLLM's group `vllm.general_plugins`: exported models that share keys and values save memory there too.

An installation has these files as the package `kvfrontier_hf` (pyproject.toml), since a server has its own working
directory, and a file `train.py` in it would hide the package `train`. vLLM goes on when a plugin cannot be imported:
then the exported model itself refuses to load (`configuration_kvfrontier.check_vllm`).
"""


def register() -> None:
    """Tell vLLM of our class, by name, since importing it here would start CUDA in processes that fork.

    vLLM calls this in each of its processes, and more than once in some. By then the package this module lies in has
    registered the remote decoder with the Auto classes, so that no remote code is needed.
    """
    from vllm import ModelRegistry

    name = "KVFrontierForCausalLM"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"{__package__}.vllm_model:{name}")
