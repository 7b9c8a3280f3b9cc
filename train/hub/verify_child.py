"""What a stranger gets from an exported folder: run as a script, with torch and transformers and nothing of ours.

`python -I verify_child.py FOLDER WORK` reads WORK/asked.json and writes WORK/found.json and WORK/found.safetensors.

Shapes: P positions that are compared, T inputs, V vocabulary.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, StaticCache, __version__


def load(folder: str, asked: dict[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """The model as anybody would load it, and what was wrong with its weights."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=asked["trust_remote_code"],
    )
    return model.eval(), {key: sorted(map(str, value)) for key, value in report.items() if value}


def logits(model: Any, prompt: list[int], positions: list[int]) -> torch.Tensor:
    """[P, V] in fp32."""
    return model(torch.tensor([prompt])).logits[0, positions].float().contiguous()


def tensors(cache: Any) -> list[torch.Tensor]:
    """Everything that a cache holds of the text, not its counters."""
    if not isinstance(cache, Cache):
        parts = [getattr(cache, name, None) for name in ("blocks", "tokens")]
        stacks = [cache] if None in parts else parts
        return [tensor for stack in stacks for store in (*stack.stores, *stack.context) for tensor in store.tensors]
    held = (value for layer in cache.layers for value in vars(layer).values())
    return [
        value for value in held if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    ]


def cached_bytes(cache: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(cache))


def storage_bytes(cache: Any) -> int:
    """Of the storages behind the cache: a view keeps all of its own alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(cache)}
    return sum(storages.values())


def greedy(model: Any, prompts: list[list[int]], asked: dict[str, Any], **options: Any) -> list[list[int]]:
    """The new tokens of each prompt; shorter ones are padded on the left."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[asked["pad"]] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
    seen = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    count = asked["new_tokens"]
    rows = model.generate(ids, attention_mask=seen, max_new_tokens=count, do_sample=False, **options)
    return rows[:, longest:].tolist()


def greedy_all_ways(model: Any, asked: dict[str, Any]) -> dict[str, list[list[int]]]:
    """For the short and the long prompt: by growing cache, without cache, by static cache, and both in one batch.

    Where the cache is the model's own there is one kind of it, and without is a pass for each token.
    """
    prompts, first = asked["prompts"], "own cache" if asked["own_cache"] else "growing cache"
    found = {
        first: [greedy(model, [prompt], asked)[0] for prompt in prompts],
        "padded on the left": greedy(model, prompts, asked),
    }
    if asked["own_cache"]:
        found["no cache"] = [recomputed(model, prompts[0], asked["new_tokens"])]
    else:
        found["no cache"] = [greedy(model, [prompts[0]], asked, use_cache=False)[0]]
        found["static cache"] = [
            greedy(model, [prompt], asked, past_key_values=static_cache(model, prompt, asked), disable_compile=True)[0]
            for prompt in prompts
        ]
    whole = prompts[1] + found[first][1]
    argmax = model(torch.tensor([whole])).logits[0, len(prompts[1]) - 1 : -1].argmax(-1)
    found["no cache"].append(argmax.tolist())  # one pass over what the cache led to, or it would take a pass per token
    return found


def recomputed(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each by a pass over all before it."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


def static_cache(model: Any, prompt: list[int], asked: dict[str, Any]) -> Any:
    return StaticCache(config=model.config, max_cache_len=len(prompt) + asked["new_tokens"])


def cache_sizes(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the growing cache after each of `contexts` tokens, and of a static one; [bytes, with storages] each.

    Of the model's own cache, those of what generate() made for so many tokens.
    """
    if asked["own_cache"]:
        made = {str(context): own_cache(model, asked["cache_text"][:context]) for context in asked["contexts"]}
        return {
            "growing": {key: [cached_bytes(cache), storage_bytes(cache)] for key, cache in made.items()},
            "static": None,
        }
    text, growing, sizes, done = asked["cache_text"], DynamicCache(config=model.config), {}, 0
    for context in asked["contexts"]:
        for begin, end in ((done, context - 1), (context - 1, context)):  # the last token alone, as in decoding
            if end > begin:
                model(torch.tensor([text[begin:end]]), past_key_values=growing, use_cache=True)
        done = context
        sizes[str(context)] = [cached_bytes(growing), storage_bytes(growing)]
    fixed = StaticCache(config=model.config, max_cache_len=asked["contexts"][-1])
    model(torch.tensor([text[:2]]), past_key_values=fixed, use_cache=True)
    return {"growing": sizes, "static": [cached_bytes(fixed), storage_bytes(fixed)]}


def own_cache(model: Any, prompt: list[int]) -> Any:
    """What generate() allocates for `prompt` and one token after it, which is not fed back."""
    home, made = sys.modules[type(model).__module__], []
    names = {home.generate.__module__: "allocate", home.generate_blocks.__module__: "allocate_blocks"}
    real = {module: getattr(sys.modules[module], name) for module, name in names.items()}

    def recorded(module: str, *arguments: Any, **options: Any) -> Any:
        made.append(real[module](*arguments, **options))
        return made[-1]

    for module, name in names.items():
        setattr(sys.modules[module], name, partial(recorded, module))
    try:
        model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False)
    finally:
        for module, name in names.items():
            setattr(sys.modules[module], name, real[module])
    (cache,) = made
    return cache


def nats(model: Any, windows: list[list[int]], first: int) -> float:
    """Summed over the targets of `windows`, each of one token more than it has inputs, from input `first` on."""
    total = 0.0
    for window in windows:
        row = torch.tensor([window])
        logits_TV = model(row[:, :-1]).logits[0, first:].float()
        total += F.cross_entropy(logits_TV, row[0, first + 1 :], reduction="sum").item()
    return total


def tokenized(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Without trust in a configuration that is code, transformers asks whoever sits there, and waits."""
    trust = asked["trust_remote_code"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    ids = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }


@torch.inference_mode()
def examine(folder: str, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All that is compared: plain data, and logits."""
    model, report = load(folder, asked, torch.float32)
    generation = model.generation_config.to_dict()
    held = {
        f"fp32.{number}": logits(model, prompt, asked["positions"][number])
        for number, prompt in enumerate(asked["prompts"])
    }
    found = {
        "transformers": __version__,
        "class": type(model).__name__,
        "report": report,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "generation": {key: generation.get(key) for key in ("eos_token_id", "pad_token_id")},
        "cache": cache_sizes(model, asked),
        "nats": nats(model, asked["windows"], asked["first"]),
        "tokenizer": tokenized(folder, asked),
    }
    model.generation_config.eos_token_id = None  # tokens are compared past the end of a text, too
    found["greedy"] = greedy_all_ways(model, asked)
    del model
    low, _ = load(folder, asked, torch.bfloat16)
    for number, prompt in enumerate(asked["prompts"]):
        held[f"bf16.{number}"] = logits(low, prompt, asked["positions"][number])
    del low
    if asked["trust_remote_code"]:  # some engines start from the model without its head
        base = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        found["base class"] = type(base).__name__
    ours = ("arch", "train", "data", "eval")
    found["ours"] = [name for name in ours if name in sys.modules]
    return found, held


def main() -> None:
    folder, work = sys.argv[1], Path(sys.argv[2])
    found, held = examine(folder, json.loads((work / "asked.json").read_text()))
    assert math.isfinite(found["nats"])
    save_file(held, work / "found.safetensors")
    (work / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
