"""Record what kvpress and KVCache-Factory score and keep of a small stock model, for tests/test_arch_keeps.py.

kvpress 0.5.4 needs transformers below 5.3, which lacks what train/hf needs; so it runs in an environment of its own:

    python -m venv old
    old/bin/pip install torch einops pyyaml "transformers==4.57.6" "huggingface_hub<1" "datasets<5" cachetools fire
    git clone https://github.com/NVIDIA/kvpress && git clone https://github.com/Zefan-Cai/KVCache-Factory
    PYTHONPATH=.:kvpress:KVCache-Factory old/bin/python tests/record_keeps.py tests/recorded_keeps.json
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

import arch
from arch import ModelConfig, SizeConfig, StoreConfig
from arch.convert_stock_export import to_hf_config

LENGTH, SEED = 40, 1
WINDOW, KERNEL, SINKS = 8, 5, 3
RATIO = 0.6  # of slots that go
RECENT = 5  # of KVCache-Factory's selection


def config() -> ModelConfig:
    """Two layers with two key/value heads of two query heads each, and weights so large that attention has peaks."""
    size = SizeConfig(
        num_layers=2, d_model=32, num_heads=4, head_dim=8, d_ff=48, vocab_size=61, seq_len=64, init_std=0.3
    )
    return ModelConfig(arch.ArchConfig({"kv": StoreConfig(kv_heads=2)}, ["new kv"]), size)


def prompt() -> Tensor:
    return torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(SEED))


def model() -> Any:
    made = arch.build(config())
    made.init_weights(SEED)
    return made.double().eval()


def stock() -> Any:
    """The same model as transformers' class, with equal weights."""
    from conversions import to_hf
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = to_hf_config(config())
    llama = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).double().eval()
    missing = llama.load_state_dict(to_hf("stock", config(), model().state_dict()), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    return llama


def record() -> dict[str, Any]:
    """Scores, and kept positions in order, of each layer [B, K, ...], and versions."""
    import kvpress
    import transformers
    from pyramidkv.scissorhands import select_scissorhands_tokens

    llama, found = stock(), {}
    presses = {
        "snapkv": kvpress.SnapKVPress(RATIO, window_size=WINDOW, kernel_size=KERNEL),
        "knorm": kvpress.KnormPress(RATIO),
        "streaming": kvpress.StreamingLLMPress(RATIO, n_sink=SINKS),
        "observed": kvpress.ObservedAttentionPress(RATIO),
    }
    for name, press in presses.items():
        layers: list[dict[str, Any]] = []
        score = press.score

        def scored(*arguments: Any, score: Any = score, layers: Any = layers) -> Tensor:
            out: Tensor = score(*arguments)
            kept = out.topk(int(out.shape[-1] * (1 - RATIO)), dim=-1).indices.sort().values
            layers.append({"scores": [[[float(f"{x:.7g}") for x in k] for k in b] for b in out.tolist()]})
            layers[-1]["kept"] = kept.tolist()
            return out

        press.score = scored
        with torch.no_grad(), press(llama):
            llama(prompt(), past_key_values=transformers.DynamicCache(), use_cache=True)
        found[name] = layers
    with torch.no_grad():
        attentions = llama(prompt(), output_attentions=True).attentions
    grouped = [weight.sum(2).unflatten(1, (2, 2)).mean(2) for weight in attentions]
    budget = int(LENGTH * (1 - RATIO))
    options = {"token_budget": budget, "recent_size": RECENT, "sink_size": SINKS}
    found["scissorhands_of_kvcache_factory"] = [
        {"kept": select_scissorhands_tokens(score, **options).tolist()} for score in grouped
    ]
    made = {"torch": torch.__version__, "transformers": transformers.__version__}
    made |= {"kvpress": "0.5.4, commit 8bb29b9c3078452a86d692f29123fa6c793e2b05"}
    made |= {"KVCache-Factory": "commit c97f9d706d63d1b56e980f8b81b2a924c21162b3", "by": "tests/record_keeps.py"}
    return {"made": made, "layers": found}


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        json.dump(record(), file)
        file.write("\n")
