"""Export targets: what an exported folder of each kind contains, and which kind a model gets.

stock    a class that transformers has, if one computes exactly what ours does (arch/convert_stock.py)
remote   the decoder of train/hf, whose two files go into the folder: layouts that share, mix windows or have sinks
shipped  the files of arch/ themselves, behind two thin ones of train/hf: every layout

A target is refused, never approximated. Config and weights of each come from the format of its name in
arch/convert_formats.py. To add a target, add its format there, a function (config, plan) -> Target to TARGETS
here, and its name to TARGET_NAMES of request.py.

One duplicate is deliberate: train/hf/modeling_kvfrontier.py implements the decoder (norms, rotary embedding, SwiGLU,
the loop over layers) a second time. Only a model written against the interfaces of transformers gets its growing and
static caches, and the plugin that shares a cache between layers in vLLM. Verification compares the two on every export.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arch import ModelConfig, Plan, StoreSpec, convert_remote, convert_shipped
from arch.convert import UnsupportedModelError, Weight
from arch.convert_formats import FORMATS
from arch.footprint import kv_bytes
from data.cli import UsageError

TRANSFORMERS_FLOOR = "5.16.1"  # the oldest version that the exports are tested with; pyproject.toml has the same
HF_FILES = Path(__file__).resolve().parents[1] / "hf"
ARCH_FILES = Path(__file__).resolve().parents[2] / "arch"
FROM_ARCH = r"^from arch\.(\w+) import"


def dynamic_cache_bytes(plan: Plan, context: int, itemsize: int) -> int:
    """Bytes of a DynamicCache of transformers (>= 5) after `context` tokens of one sequence of a decoder.

    Between two tokens its sliding layers hold window - 1 positions: the next token brings the last one.
    """

    def positions(store: StoreSpec) -> int:
        return context if store.window is None else min(context, store.window - 1)

    (stack,) = plan.stacks
    return sum(store.slot.elements * positions(store) for store in stack.plan.stores) * itemsize


def footprint_bytes(plan: Plan, context: int, itemsize: int) -> int:
    """Bytes of our own cache of one sequence, allocated for `context` tokens."""
    return kv_bytes(plan, context, itemsize).stored


@dataclass(frozen=True)
class Target:
    """An exported folder of one kind, without tokenizer, card and generation settings.

    name         as in target=
    config       the content of config.json, without the type of the tensors and special tokens
    weights      every parameter, and the tensor that holds it there
    code         Python files that go into the folder; with any, readers must trust remote code
    packages     packages that those files need besides torch and transformers
    cache_bytes  (plan, context, itemsize) -> bytes of one sequence in the cache that the model uses there
    own_cache    whether that cache is ours, allocated at its full length, and none of transformers
    notes        lines about engines for the model card
    """

    name: str
    config: dict[str, Any]
    weights: list[Weight]
    code: tuple[Path, ...] = ()
    packages: tuple[str, ...] = ()
    cache_bytes: Callable[[Plan, int, int], int] = dynamic_cache_bytes
    own_cache: bool = False
    notes: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        return str(self.config["architectures"][0])


LLAMA_CPP_NOTE = (
    "llama.cpp knows byte-level BPE tokenizers by a hash, and of newly trained ones none: `convert_hf_to_gguf.py` "
    "stops with `BPE pre-tokenizer was not recognized`. One that kvfrontier trained splits text as GPT-2's does: let "
    "`get_vocab_base_pre` there return `gpt-2`, and the conversion is exact."
)
STOCK_NOTES = {
    "llama": (LLAMA_CPP_NOTE,),
    "mistral": (LLAMA_CPP_NOTE,),
    "ministral": (
        "Sliding layers cost their window and no more in `transformers`. An engine without a cache manager for mixed "
        "layers may hold them at full length: look at the number of blocks it reports.",
    ),
    **dict.fromkeys(("smollm3", "qwen2", "qwen3", "olmo2", "olmo3"), ()),
    "gemma3_text": ("Norms are stored as the class has them, less 1; it computes without `final_logit_softcapping`.",),
    "deepseek_v3": (
        "Before 5.15 `transformers` caches expanded keys and values: the same tokens, without the saving.",
        "Queries are not compressed (`q_lora_rank` is null), and all layers are dense.",
    ),
}
REMOTE_NOTES = (
    f"The two Python files in this folder are the model: `transformers` >= {TRANSFORMERS_FLOOR} runs them with "
    "`trust_remote_code=True`.",
    "Layers that share keys and values keep them once in the caches of `transformers`; continuous batching there keeps "
    "a copy per layer. vLLM needs the plugin of kvfrontier (`pip install` its checkout where vLLM runs): without it a "
    "model that shares does not load, rather than keep copies.",
    'LoRA: `LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])`; `peft` knows no defaults for it.',
)

SHIPPED_NOTES = (
    "The Python files in this folder are the code that trained the model, behind an interface to `transformers` >= "
    f"{TRANSFORMERS_FLOOR}, which runs them with `trust_remote_code=True`; they need `einops`.",
    "It generates with `generate()`, greedily or by sampling (`temperature`, `top_k`, `top_p`, `min_p`), with "
    "streamers, stopping criteria and stop strings, over a cache of its own, which has the bytes above. `forward` "
    "keeps no cache. vLLM, SGLang and llama.cpp do not run it.",
)
BLOCK_NOTE = "A prompt need not end with a block. Rows of a batch are padded on the left, and may have any lengths."
UNPREDICTED_NOTE = (
    "The first block of a text, {length} tokens, is not predicted: `forward` has logits of 0 there, the uniform "
    "distribution, which is what an evaluation counts that asks for them; prompts have {length} tokens or more. Where "
    "it was trained with random padding (`data.block_padding`), load it with `block_pad_token=` the end of text: then "
    "the first block is filled up from the left, and all tokens but the first are predicted."
)


def stock(config: ModelConfig, plan: Plan) -> Target:
    """Raise UnsupportedModelError if no class of transformers is this model."""
    hf, weights = FORMATS["stock"].to_hf(config)
    return Target("stock", hf, weights, notes=STOCK_NOTES[hf["model_type"]])


def remote(config: ModelConfig, plan: Plan) -> Target:
    """Raise UnsupportedModelError if the remote-code decoder is not this model."""
    hf, weights = FORMATS["remote"].to_hf(config)
    return Target("remote", hf, weights, tuple(HF_FILES / name for name in convert_remote.FILES), notes=REMOTE_NOTES)


def shipped(config: ModelConfig, plan: Plan) -> Target:
    """Holds every model."""
    hf, weights = FORMATS["shipped"].to_hf(config)
    notes = [*SHIPPED_NOTES]
    if len(plan.stacks) > 1:
        notes.append(BLOCK_NOTE)
    if plan.num_unpredicted:
        notes.append(UNPREDICTED_NOTE.format(length=plan.num_unpredicted))
    thin = [HF_FILES / name for name in convert_shipped.FILES]
    return Target(
        "shipped",
        hf,
        weights,
        (*thin, *import_closure(thin)),
        ("einops",),
        footprint_bytes,
        own_cache=True,
        notes=tuple(notes),
    )


def import_closure(files: list[Path]) -> list[Path]:
    """List the files of arch/ that `files` import, directly or through each other, sorted by name."""
    closure: set[Path] = set()
    todo = [name for path in files for name in re.findall(FROM_ARCH, path.read_text(), re.MULTILINE)]
    while todo:
        path = ARCH_FILES / f"{todo.pop()}.py"
        if path not in closure:
            closure.add(path)
            todo += re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE)
    return sorted(closure)


def rewrite_imports(code: str) -> str:
    """Return a Python file as an exported folder has it: files of arch/ that it imports lie beside it."""
    return re.sub(FROM_ARCH, r"from .\1 import", code, flags=re.MULTILINE)


# In the order in which `select_target` tries them.
TARGETS: dict[str, Callable[[ModelConfig, Plan], Target]] = {"stock": stock, "remote": remote, "shipped": shipped}


def select_target(config: ModelConfig, plan: Plan, name: str = "auto") -> tuple[Target, dict[str, str]]:
    """Return the target `name`, or with `auto` the first that holds the model, and why those before it do not.

    Raises UsageError if there is none.
    """
    if name != "auto" and name not in TARGETS:
        raise UsageError(f"target is {name}; choose auto, {', '.join(TARGETS)}")
    refused: dict[str, str] = {}
    for candidate in TARGETS if name == "auto" else [name]:
        try:
            return TARGETS[candidate](config, plan), refused
        except UnsupportedModelError as error:
            refused[candidate] = str(error)
    reasons = "\n".join(f"target {candidate} does not hold it:\n{reason}" for candidate, reason in refused.items())
    raise UsageError(f"this model cannot be exported exactly, and is not approximated\n{reasons}")
