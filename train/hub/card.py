"""The model card of an exported folder: the cost of its cache, its training, and code that loads it."""

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from arch import ArchConfig, KVPlan, ModelConfig, Plan, StoreConfig, resolve
from arch.footprint import kv_bytes, num_params
from eval.console import visible
from eval.plots.plan import draw_plan
from eval.units import bytes_text, count_text, number_text
from train.hub.records import Check, Corpus, Training
from train.hub.targets import TRANSFORMERS_FLOOR, Target

PICTURE = "architecture.png"
ITEMSIZE = 2  # a bf16 cache


def write_card(
    folder: Path,
    name: str,
    config: ModelConfig,
    plan: Plan,
    target: Target,
    training: Training,
    corpus: Corpus,
    checks: Sequence[Check],
    version: str,
    license_name: str | None = None,
) -> None:
    """Write README.md and its picture. `name` is what users load: the folder, or its repository on the hub.

    Without `license_name`, an identifier of the hub, the card names none.
    """
    draw_plan(plan, name, config.size.seq_len, ITEMSIZE, folder / PICTURE)
    sections = [
        front_matter(target, license_name),
        f"# {name}\n\n{summary(config, plan, target)}\n\n![who writes and who reads keys and values]({PICTURE})",
        f"## KV cache\n\n{kv_table(config, plan)}",
        f"## Training\n\n{training_list(config, training)}",
        f"## Load and generate\n\n{usage(name, target, corpus)}",
        f"## Engines\n\n{engines(target)}",
        f"## Verified\n\n{verified(checks, version)}",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def front_matter(target: Target, license_name: str | None) -> str:
    tags = ["kv-cache", *(["custom_code"] if target.code else [])]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", license=license_name, tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def summary(config: ModelConfig, plan: Plan, target: Target) -> str:
    stack, *others = plan.stacks
    kind, layers = "A base language model", writers(stack.plan)
    if others:
        kind = f"A Block Transformer, a base language model over blocks of {plan.block_length} tokens,"
        layers = f"in its {stack.title} {layers}; its token decoder keeps one block"
    return (
        f"{kind} of {count_text(num_params(config, plan))} parameters, trained with kvfrontier; "
        f"`{target.model_class}` in `transformers`. {layers[0].upper()}{layers[1:]}."
    )


def writers(plan: KVPlan) -> str:
    own = len(plan.stores)
    if own == plan.num_layers:
        return "every layer writes its own keys and values"
    return f"{own} of {plan.num_layers} layers write keys and values, the others read theirs"


def kv_table(config: ModelConfig, plan: Plan) -> str:
    """Return the bytes of one sequence, and of a model of this size with multi-head attention in every layer."""
    full = resolve(ModelConfig(ArchConfig({"kv": StoreConfig(kv_heads="all")}, ["new kv"]), config.size))
    rows = []
    for context in (config.size.seq_len, 8192, 32768, 131072):
        stored, stored_full = kv_bytes(plan, context, ITEMSIZE).stored, kv_bytes(full, context, ITEMSIZE).stored
        text = (f"at {context:,} tokens", bytes_text(stored), bytes_text(stored_full), percent(stored, stored_full))
        rows.append(text)
    ours, theirs = kv_bytes(plan, config.size.seq_len, ITEMSIZE), kv_bytes(full, config.size.seq_len, ITEMSIZE)
    slope = (
        "per token",
        f"{number_text(ours.per_token)} B",
        f"{number_text(theirs.per_token)} B",
        percent(ours.per_token, theirs.per_token),
    )
    constant = (f"constant ({constant_part(plan)})", bytes_text(ours.constant), "0 B", "")
    lines = markdown(
        ("bytes in bf16", "this model", "MHA of this size", "share"), [slope, constant, *dict.fromkeys(rows)]
    )
    longer = f"The model was trained on {config.size.seq_len:,} tokens; longer contexts show what they would cost."
    return f"{lines}\n\nOf one sequence. {longer}"


def constant_part(plan: Plan) -> str:
    """Name the part of the cache that does not grow with the context."""
    stack, *others = plan.stacks
    if others:
        return f"windows when full, the {others[0].title}"
    slots = not all(store.grows for store in stack.plan.stores)
    return "windows and slots, when full" if slots else "windows, when full"


def percent(ours: float, theirs: float) -> str:
    return f"{100 * ours / theirs:.3g} %"


def training_list(config: ModelConfig, training: Training) -> str:
    size, val = config.size, training.val or {}
    known = {
        "run": one_line(training.name),
        "step": None if training.step is None else f"{training.step:,}",
        "tokens": None if training.tokens is None else f"{training.tokens:,}, in sequences of {size.seq_len:,}",
        "data": one_line(training.data),
        "digest of the data": one_line(training.data_digest),
        "digest of the tokenizer": one_line(training.tokenizer),
        "seed": None if training.seed is None else str(training.seed),
        "validation loss": f"{val['loss']:.4f} nats per token" if "loss" in val else None,
        "validation perplexity": f"{val['ppl']:.3f}" if "ppl" in val else None,
        "bits per byte": f"{val['bpb']:.4f}" if "bpb" in val else None,
        "shape": f"{size.num_layers} layers, width {size.d_model}, {size.num_heads} heads, MLP {size.d_ff}, "
        f"vocabulary {size.vocab_size:,}",
    }
    lines = [f"- {key}: {value}" for key, value in known.items() if value is not None]
    if val:
        first = "those at the beginning of a window included"
        if unpredicted := resolve(config).num_unpredicted:
            first = f"but for the first {unpredicted} of a window, which are not predicted"
        lines.append(
            f"\nThe loss is the mean over all positions of windows of {size.seq_len:,} validation tokens, {first}."
        )
    return "\n".join(lines)


def one_line(text: str | None) -> str | None:
    """`text` of a run, which somebody else may have written, as text of one line and nothing else."""
    return None if text is None else html.escape(visible(" ".join(text.split())), quote=False)


def usage(name: str, target: Target, corpus: Corpus) -> str:
    trust = ", trust_remote_code=True" if target.code else ""
    begin = "nothing begins it" if corpus.begin is None else "the tokenizer puts its `bos_token` before it"
    chat = "there is no chat template" if corpus.chat_template is None else "the chat template is that of the import"
    needs = " and ".join((f"`transformers` {TRANSFORMERS_FLOOR} or later", *(f"`{name}`" for name in target.packages)))
    return f"""Needs {needs}.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)}{trust})
model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, dtype=torch.bfloat16{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

A document ends with the tokenizer's `eos_token`; {begin}, and {chat}."""


def engines(target: Target) -> str:
    first = (
        "The folder has the Python files of its model: whoever loads it must trust them."
        if target.code
        else f"`{target.model_class}` is part of `transformers`: no code comes with the weights."
    )
    return "\n".join(f"- {note}" for note in (first, *target.notes))


def verified(checks: Sequence[Check], version: str) -> str:
    if not checks:
        return "Not verified: it was exported with `verify=false`."
    rows = [(check.name, check.found, check.wanted) for check in checks]
    return (
        f"By the export command, in a fresh process with {version}.\n\n{markdown(('check', 'found', 'wanted'), rows)}"
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
