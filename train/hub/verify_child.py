"""Load and run an exported folder as any user would: a script with torch and transformers and nothing of ours.

`python -I verify_child.py FOLDER WORK` reads WORK/request.json; it writes WORK/response.json, WORK/logits.safetensors.

Shapes: P positions that are compared, T inputs, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, StaticCache

if TYPE_CHECKING:
    from train.hub.verify_protocol import CacheBytes, Request, Response, TokenizerReport


def load(folder: str, request: Request, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """Load the model as any user would; return it and the report of missing and unexpected weights."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=request["trust_remote_code"],
    )
    model, report = loaded
    return model.eval(), {key: sorted(map(str, value)) for key, value in report.items() if value}


def logits(model: Any, prompt: list[int], positions: list[int]) -> torch.Tensor:
    """Return the logits [P, V] in fp32."""
    logits_PV: torch.Tensor = model(torch.tensor([prompt])).logits[0, positions]
    return logits_PV.float().contiguous()


def tensors(cache: Any) -> list[torch.Tensor]:
    """List the tensors that a cache holds of the text, without its counters."""
    if not isinstance(cache, Cache):
        stacks = [cache.blocks, cache.tokens] if hasattr(cache, "blocks") else [cache]
        buffers = [buffer for stack in stacks for buffer in (*stack.buffers, *stack.cross_buffers)]
        return [tensor for buffer in buffers for tensor in buffer.tensors]
    values = (value for layer in cache.layers for value in vars(layer).values())
    return [
        value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    ]


def cached_bytes(cache: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(cache))


def storage_bytes(cache: Any) -> int:
    """Bytes of the storages behind the cache: a view keeps all of its storage alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(cache)}
    return sum(storages.values())


def greedy(model: Any, prompts: list[list[int]], request: Request, **options: Any) -> list[list[int]]:
    """Generate the new tokens of each prompt; shorter prompts are padded on the left."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[request["pad"]] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
    seen = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    count = request["num_new_tokens"]
    rows = model.generate(ids, attention_mask=seen, max_new_tokens=count, do_sample=False, **options)
    new_tokens: list[list[int]] = rows[:, longest:].tolist()
    return new_tokens


def greedy_all_ways(model: Any, request: Request) -> dict[str, list[list[int]]]:
    """Generate after the short and the long prompt: growing cache, no cache, static cache, and both in one batch.

    A model with a cache of its own has one kind of cache; without a cache, it takes a pass for each token.
    """
    prompts, first = request["prompts"], "own cache" if request["own_cache"] else "growing cache"
    tokens = {
        first: [greedy(model, [prompt], request)[0] for prompt in prompts],
        "padded on the left": greedy(model, prompts, request),
    }
    if request["own_cache"]:
        tokens["no cache"] = [recomputed(model, prompts[0], request["num_new_tokens"])]
    else:
        tokens["no cache"] = [greedy(model, [prompts[0]], request, use_cache=False)[0]]
        caches = [static_cache(model, prompt, request) for prompt in prompts]
        tokens["static cache"] = [
            greedy(model, [prompt], request, past_key_values=cache, disable_compile=True)[0]
            for prompt, cache in zip(prompts, caches, strict=True)
        ]
    whole = prompts[1] + tokens[first][1]
    argmax = model(torch.tensor([whole])).logits[0, len(prompts[1]) - 1 : -1].argmax(-1)
    tokens["no cache"].append(argmax.tolist())  # one pass over what the cache led to, or it would take a pass per token
    return tokens


def recomputed(model: Any, prompt: list[int], count: int) -> list[int]:
    """Generate greedy tokens, each by a pass over all before it."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


def static_cache(model: Any, prompt: list[int], request: Request) -> Any:
    return StaticCache(config=model.config, max_cache_len=len(prompt) + request["num_new_tokens"])


def cache_sizes(model: Any, request: Request) -> CacheBytes:
    """Count the bytes of the growing cache after each of `contexts` tokens, and of a static cache.

    A cache of the model's own is counted as generate() allocates it for so many tokens.
    """
    if request["own_cache"]:
        caches = {str(context): own_cache(model, request["cache_text"][:context]) for context in request["contexts"]}
        return {
            "growing": {key: [cached_bytes(cache), storage_bytes(cache)] for key, cache in caches.items()},
            "static": None,
        }
    text, growing, sizes, done = request["cache_text"], DynamicCache(config=model.config), {}, 0
    for context in request["contexts"]:
        for begin, end in ((done, context - 1), (context - 1, context)):  # the last token alone, as in decoding
            if end > begin:
                model(torch.tensor([text[begin:end]]), past_key_values=growing, use_cache=True)
        done = context
        sizes[str(context)] = [cached_bytes(growing), storage_bytes(growing)]
    fixed = StaticCache(config=model.config, max_cache_len=request["contexts"][-1])
    model(torch.tensor([text[:2]]), past_key_values=fixed, use_cache=True)
    return {"growing": sizes, "static": [cached_bytes(fixed), storage_bytes(fixed)]}


def own_cache(model: Any, prompt: list[int]) -> Any:
    """Return the cache that generate() allocates for `prompt` and one token after it, which is not fed back."""
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(torch.tensor([prompt]), **options).past_key_values


def nats(model: Any, windows: list[list[int]], first: int) -> float:
    """Sum the loss over the targets of `windows`, each one token longer than its inputs, from input `first` on."""
    total = 0.0
    for window in windows:
        row = torch.tensor([window])
        logits_TV = model(row[:, :-1]).logits[0, first:].float()
        total += F.cross_entropy(logits_TV, row[0, first + 1 :], reduction="sum").item()
    return total


def tokenized(folder: str, request: Request) -> TokenizerReport:
    """Tokenize the texts. Without trust in a configuration that is code, transformers would wait for an answer."""
    trust = request["trust_remote_code"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    ids = [tokenizer(text)["input_ids"] for text in request["texts"]]
    return {"ids": ids, "texts": [tokenizer.decode(row) for row in ids], "end": tokenizer.eos_token_id}


@torch.inference_mode()
def examine(folder: str, request: Request) -> tuple[Response, dict[str, torch.Tensor]]:
    """Return all that is compared: plain data, and logits by type and number of the prompt."""
    model, report = load(folder, request, torch.float32)
    prompts = list(zip(request["prompts"], request["positions"], strict=True))
    prompt_logits = {f"fp32.{number}": logits(model, *prompt) for number, prompt in enumerate(prompts)}
    cache, loss = cache_sizes(model, request), nats(model, request["windows"], request["first"])
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    response: Response = {
        "model_class": type(model).__name__,
        "loading_report": report,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "eos_token_id": eos,
        "cache": cache,
        "greedy": greedy_all_ways(model, request),  # without an end: tokens are compared past the end of a text, too
        "nats": loss,
        "tokenizer": tokenized(folder, request),
        "imported_packages": [],
    }
    del model
    low, _ = load(folder, request, torch.bfloat16)
    prompt_logits |= {f"bf16.{number}": logits(low, *prompt) for number, prompt in enumerate(prompts)}
    del low
    if request["trust_remote_code"]:  # some engines start from the model without its head: it must load
        AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    response["imported_packages"] = [name for name in ("arch", "train", "data", "eval") if name in sys.modules]
    return response, prompt_logits


def main() -> None:
    folder, work = sys.argv[1], Path(sys.argv[2])
    response, prompt_logits = examine(folder, json.loads((work / "request.json").read_text()))
    save_file(prompt_logits, work / "logits.safetensors")
    (work / "response.json").write_text(json.dumps(response))


if __name__ == "__main__":
    main()
