"""Where a model can go: what each target holds exactly, and which one is taken.

stock   a class that transformers ships, where one computes just what ours does (arch/convert.py)
remote  the decoder of train/hf, whose two files go into the folder: layouts that share, mix windows or have sinks
shipped the files of arch/ themselves, behind two thin ones of train/hf: every layout

A target is refused, never approximated. A further one is a function from (config, plan) to Target in TARGETS.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arch import KVPlan, ModelConfig, Plan, StoreSpec
from arch.convert import UnsupportedModelError, Weight, hf_config, weight_map
from arch.convert_remote import FILES, remote_config
from arch.convert_shipped import FILES as SHIPPED_FILES
from arch.convert_shipped import shipped_config, shipped_weights
from arch.footprint import kv_bytes
from data.cli import UsageError


def sliding_bytes(plan: Plan, context: int, itemsize: int) -> int:
    """Bytes of a DynamicCache of transformers (>= 5) after `context` tokens of one sequence of a decoder.

    Between two tokens its sliding layers keep window - 1 positions: the next token brings the one that is missing.
    """

    def positions(store: StoreSpec) -> int:
        return context if store.window is None else min(context, store.window - 1)

    (stack,) = plan.stacks
    return sum(store.slot.elements * positions(store) for store in stack.plan.stores) * itemsize


def own_bytes(plan: Plan, context: int, itemsize: int) -> int:
    """Bytes of our own cache of one sequence, made for `context` tokens: what the footprint says."""
    return kv_bytes(plan, context, itemsize).stored


FROM_ARCH = r"^from arch\.(\w+) import"


@dataclass(frozen=True)
class Target:
    """What a folder of this kind holds beside tokenizer, card and generation settings.

    name         as in target=
    config       the content of config.json, without the type of the tensors and special tokens
    weights      every tensor under both names
    code         Python files that go into the folder; with any, readers must trust remote code
    packages     what those need beside torch and transformers
    cache_bytes  (plan, context, itemsize) -> bytes of one sequence in the reader's cache
    own_cache    whether that is ours, which is made at its full length, and not one of transformers
    notes        what engines do with it: lines of the model card
    """

    name: str
    config: dict[str, Any]
    weights: list[Weight]
    code: tuple[Path, ...] = ()
    packages: tuple[str, ...] = ()
    cache_bytes: Callable[[Plan, int, int], int] = sliding_bytes
    own_cache: bool = False
    notes: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        return str(self.config["architectures"][0])


STOCK_NOTES = {
    "llama": (),
    "mistral": (),
    "ministral": (
        "Sliding layers cost their window and no more in `transformers`. An engine without a cache manager for mixed "
        "layers may hold them at full length: look at the number of blocks it reports.",
    ),
    "deepseek_v3": (
        "Before 5.15 `transformers` caches expanded keys and values: the same tokens, without the saving.",
        "Queries are not compressed (`q_lora_rank` is null), and all layers are dense.",
    ),
}


HF_FILES = Path(__file__).resolve().parents[1] / "hf"
ARCH_FILES = Path(__file__).resolve().parents[2] / "arch"
REMOTE_NOTES = (
    "The two Python files in this folder are the model: `transformers` >= 5.16.1 runs them with "
    "`trust_remote_code=True`.",
    "Layers that share keys and values keep them once in the caches of `transformers`. vLLM keeps a copy per layer, "
    "unless the plugin of kvfrontier is installed; continuous batching in `transformers` does too.",
)

SHIPPED_NOTES = (
    "The Python files in this folder are the code that trained the model, behind an interface to `transformers` >= "
    "5.16.1, which runs them with `trust_remote_code=True`; they need `einops`.",
    "It generates with `generate()`, greedily or by sampling (`temperature`, `top_p`), over a cache of its own, which "
    "has the bytes above. `forward` keeps no cache. vLLM, SGLang and llama.cpp do not run it.",
)
BLOCK_NOTES = ("A prompt need not end with a block. Rows of a batch are padded on the left, and may have any lengths.",)
UNPREDICTED = (
    "The first block of a text, {length} tokens, is not predicted: `forward` has logits of 0 there, the uniform "
    "distribution, which is what an evaluation counts that asks for them; prompts have {length} tokens or more. Where "
    "it was trained with random padding (`data.block_padding`), load it with `block_pad_token=` the end of text: then "
    "the first block is filled up from the left, and all tokens but the first are predicted.",
)


def stock(config: ModelConfig, plan: Plan) -> Target:
    """Raises UnsupportedModelError where no class of transformers is this model."""
    if not isinstance(plan, KVPlan):
        raise UnsupportedModelError(["block: a Block Transformer is two decoders; a stock class is one"])
    hf = hf_config(config, plan)
    return Target("stock", hf, weight_map(config, hf), notes=STOCK_NOTES[hf["model_type"]])


def remote(config: ModelConfig, plan: Plan) -> Target:
    """Raises UnsupportedModelError where the remote-code decoder is not this model."""
    hf = remote_config(config)
    code = tuple(HF_FILES / name for name in FILES)
    return Target("remote", hf, weight_map(config, hf), code, notes=REMOTE_NOTES)


def shipped(config: ModelConfig, plan: Plan) -> Target:
    """Every model there is."""
    notes = SHIPPED_NOTES
    if len(plan.stacks) > 1:
        notes = (*notes, *BLOCK_NOTES)
    if plan.num_unpredicted:
        notes = (*notes, *(note.format(length=plan.num_unpredicted) for note in UNPREDICTED))
    thin = [HF_FILES / name for name in SHIPPED_FILES]
    return Target(
        "shipped",
        shipped_config(config),
        shipped_weights(config),
        (*thin, *needed(thin)),
        ("einops",),
        own_bytes,
        own_cache=True,
        notes=notes,
    )


def needed(files: list[Path]) -> list[Path]:
    """The files of arch/ that `files` import, and those that these import, in order of their names."""
    found: set[Path] = set()
    todo = [name for path in files for name in re.findall(FROM_ARCH, path.read_text(), re.MULTILINE)]
    while todo:
        path = ARCH_FILES / f"{todo.pop()}.py"
        if path not in found:
            found.add(path)
            todo += re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE)
    return sorted(found)


def flattened(code: str) -> str:
    """A Python file as it stands in an exported folder, where what it imports of arch/ lies beside it."""
    return re.sub(FROM_ARCH, r"from .\1 import", code, flags=re.MULTILINE)


# In the order in which they are tried.
TARGETS: dict[str, Callable[[ModelConfig, Plan], Target]] = {"stock": stock, "remote": remote, "shipped": shipped}


def choose(config: ModelConfig, plan: Plan, asked: str = "auto") -> tuple[Target, dict[str, str]]:
    """The first target that holds the model, or the one `asked` for; and why the ones before it were passed over.

    Raises UsageError where there is none.
    """
    if asked != "auto" and asked not in TARGETS:
        raise UsageError(f"target is {asked}; choose auto, {', '.join(TARGETS)}")
    passed: dict[str, str] = {}
    for name in TARGETS if asked == "auto" else [asked]:
        try:
            return TARGETS[name](config, plan), passed
        except UnsupportedModelError as error:
            passed[name] = str(error)
    reasons = "\n".join(f"target {name} does not hold it:\n{reason}" for name, reason in passed.items())
    raise UsageError(f"this model cannot be exported exactly, and is not approximated\n{reasons}")
