"""Is an exported folder the model that was trained? It is loaded in a fresh process and compared, figure by figure.

Shapes: P positions that are compared, T inputs, V vocabulary.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from arch import BlockTransformer, LanguageModel, ModelConfig, Plan, build, generate, generate_blocks
from arch.footprint import allocated_bytes, kv_bytes, num_params
from data.cli import UsageError
from data.tokenizer import Encoder
from train import checkpoint
from train.checkpoint import TrainingError
from train.hub.targets import Target

TOLERANCE = 1e-5
NEW_TOKENS = 16
COMPARED = 64  # positions of a prompt, spread over it
TEXTS = ("The quick brown fox", "def f(x):\n    return x ** 2\n", "naïve café: äöü 漢字 🙂", "  two  spaces ")


@dataclass(frozen=True)
class Check:
    """`passed` is None where a figure is reported and nothing is asked of it."""

    name: str
    found: str
    wanted: str
    passed: bool | None


@dataclass(frozen=True)
class Subject:
    """What is verified: the checkpoint `source`, exported to `folder` as `target` with weights of `dtype`.

    windows  validation windows, one token longer than their inputs; empty where the data is not there
    """

    source: Path
    folder: Path
    config: ModelConfig
    target: Target
    dtype: torch.dtype
    tokenizer: Tokenizer
    end: int
    windows: list[list[int]]


def require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("verification needs transformers: pip install transformers, or give verify=false")


def fresh_process(folder: Path, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """train/hub/verify_child.py in a process that knows the folder and nothing of this repository.

    Its memory is dirty from the start, so that what is never written shows. Raises TrainingError where it fails.
    """
    script = Path(__file__).with_name("verify_child.py")
    with tempfile.TemporaryDirectory() as work:
        Path(work, "asked.json").write_text(json.dumps(asked))
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(work, "modules")), "MALLOC_PERTURB_": "165"}
        done = subprocess.run(
            [sys.executable, "-I", str(script), str(folder.resolve()), work],
            cwd=work,
            env=os.environ | offline | {"TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise TrainingError(f"{folder} cannot be loaded or run by transformers:\n{done.stderr[-3000:]}")
        return json.loads(Path(work, "found.json").read_text()), load_file(Path(work, "found.safetensors"))


def verify(subject: Subject) -> list[Check]:
    """Every comparison. Raises TrainingError where the folder cannot be loaded at all."""
    model = build(subject.config)
    checkpoint.load(subject.source, model)
    model.eval()
    asked = questions(subject, model)
    with torch.inference_mode():
        trained = [some_logits(model, asked, number) for number in (0, 1)]
        if subject.dtype != torch.float32:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(subject.dtype))
        expected = [some_logits(model, asked, number) for number in (0, 1)]
        loss = nats(model, subject.windows)
        tokens = [continued(model, prompt) for prompt in asked["prompts"]]
        found, held = fresh_process(subject.folder, asked)
        difference = largest_difference(held, expected)
        allowed = allowance(model, asked, expected, difference)
        return [
            *check_loading(subject, found, model),
            Check("logits in fp32, largest difference", f"{difference:.1e}", f"{allowed:.1e}", difference <= allowed),
            *check_bf16(held, trained),
            *check_greedy(model, found["greedy"], asked["prompts"], tokens, allowed),
            *check_cache(subject, found["cache"], model),
            *check_text(subject, found),
            *check_loss(subject, found["nats"], loss, allowed, asked["first"]),
        ]


def questions(subject: Subject, model: LanguageModel) -> dict[str, Any]:
    """What the other process is to do, as plain data."""
    size, first = subject.config.size, unpredicted(model)
    windows = [min(window, size.seq_len) for window in spans(model.plan)]
    long, short = max(windows, default=32) + 9, first + max(1, min([8, *windows]) - 1)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(size.vocab_size, (long + NEW_TOKENS,), generator=generator).tolist()
    if subject.windows:  # what it was trained for, as far as it goes
        text[: len(subject.windows[0])] = subject.windows[0][: len(text)]
        text = text[: long + NEW_TOKENS]
    prompts = [text[:short], text[:long]]
    edges = {edge for window in windows for edge in (window - 1, window, window + 1)}
    return {
        "trust_remote_code": bool(subject.target.code),
        "own_cache": subject.target.own_cache,
        "first": first,
        "prompts": prompts,
        "positions": [
            torch.linspace(first, len(p) - 1, min(len(p) - first, COMPARED)).long().tolist() for p in prompts
        ],
        "new_tokens": NEW_TOKENS,
        "pad": subject.end,
        "cache_text": text,
        "contexts": sorted(context for context in {1, short, *edges, len(text)} if context > first),
        "windows": subject.windows,
        "texts": TEXTS,
    }


def spread(first: int, end: int) -> list[int]:
    """At most COMPARED positions from `first` to the last one before `end`."""
    return torch.linspace(first, end - 1, min(end - first, COMPARED)).long().tolist()


def spans(plan: Plan) -> list[int]:
    """Numbers of tokens after which the cache, or what is seen, is another: windows, slots, blocks."""
    stack = plan.stacks[0]
    tokens = stack.tokens_per_position
    bounds = [tokens * store.max_positions for store in stack.plan.stores if store.max_positions is not None]
    return bounds if tokens == 1 else [tokens, *bounds]


def unpredicted(model: LanguageModel) -> int:
    """The first input after which a token is predicted: 0, but where a first block has no context."""
    return max(0, model.plan.num_unpredicted + model.plan.target_offset - 1)


def next_logits(model: LanguageModel, tokens: list[int]) -> Tensor:
    """[T, V] of the token after each of `tokens`, from `unpredicted` on."""
    if not isinstance(model, BlockTransformer):
        logits_TV: Tensor = model(torch.tensor([tokens]))[0]
        return logits_TV
    whole = [
        *tokens,
        *[0] * (model.plan.block_length - len(tokens) % model.plan.block_length),
    ]  # nothing looks at what is added
    said_TV: Tensor = model(torch.tensor([whole]))[0]
    return said_TV[1 if model.start is not None else 0 :][: len(tokens) - unpredicted(model)]


def continued(model: LanguageModel, prompt: list[int]) -> list[int]:
    if isinstance(model, BlockTransformer):
        return generate_blocks(model, [prompt], NEW_TOKENS)[0]
    return generate(model, [prompt], NEW_TOKENS)[0]


def some_logits(model: LanguageModel, asked: dict[str, Any], number: int) -> Tensor:
    """[P, V]"""
    places = [place - asked["first"] for place in asked["positions"][number]]
    return next_logits(model, asked["prompts"][number])[places]


def nats(model: LanguageModel, windows: list[list[int]]) -> float:
    total = 0.0
    for window in windows:
        targets_T = torch.tensor(window[unpredicted(model) + 1 :])
        total += F.cross_entropy(next_logits(model, window[:-1]), targets_T, reduction="sum").item()
    return total


def check_loading(subject: Subject, found: dict[str, Any], model: LanguageModel) -> list[Check]:
    report = "; ".join(f"{key}: {', '.join(names[:3])}" for key, names in found["report"].items())
    wanted, params = subject.target.model_class, num_params(subject.config, model.plan)
    checks = [
        Check("class", found["class"], wanted, found["class"] == wanted),
        Check("weights missing or left over", report or "none", "none", not report),
        Check("parameters", f"{found['parameters']:,}", f"{params:,}", found["parameters"] == params),
        Check("our packages imported", ", ".join(found["ours"]) or "none", "none", not found["ours"]),
    ]
    return checks


def largest_difference(held: dict[str, Tensor], expected: list[Tensor]) -> float:
    return max((held[f"fp32.{number}"] - ours).abs().max().item() for number, ours in enumerate(expected))


def allowance(model: LanguageModel, asked: dict[str, Any], expected: list[Tensor], difference: float) -> float:
    """How far fp32 logits may lie apart: TOLERANCE; where they do not, as far as rounding alone takes two of them.

    That is twice the distance of our own from fp64, which takes some time and twice the memory. Changes `model` to fp64
    and back.
    """
    if difference <= TOLERANCE:
        return TOLERANCE
    model.double()
    exact = [some_logits(model, asked, number) for number in (0, 1)]
    model.float()
    rounding = max((a - b).abs().max().item() for a, b in zip(exact, expected, strict=True))
    return max(TOLERANCE, 2 * rounding)


def check_bf16(held: dict[str, Tensor], trained: list[Tensor]) -> list[Check]:
    """Computed in bf16 by them, in fp32 by us with the weights of the run."""
    theirs, ours = torch.cat([held["bf16.0"], held["bf16.1"]]), torch.cat(trained)
    divergence = F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="batchmean").item()
    agree = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    return [
        Check(
            "bf16: KL divergence from fp32, nats",
            f"{divergence:.1e}",
            "-",
            None if math.isfinite(divergence) else False,
        ),
        Check("bf16: the same most likely token", f"{agree:.1%}", "-", None),
    ]


def check_greedy(
    model: LanguageModel,
    found: dict[str, list[list[int]]],
    prompts: list[list[int]],
    ours: list[list[int]],
    allowed: float,
) -> list[Check]:
    """Tokens after the prompt shorter and the one longer than the window, which are two rows of each way."""
    checks = []
    for way, rows in found.items():
        for name, prompt, theirs, mine in zip(("short", "long"), prompts, rows, ours, strict=True):
            same = agreement(model, prompt, theirs, mine, allowed)
            text = f"{same} of {len(mine)} tokens"
            checks.append(Check(f"greedy, {way}, {name} prompt", text, f"{len(mine)}", same == len(mine)))
    return checks


def agreement(model: LanguageModel, prompt: list[int], theirs: list[int], ours: list[int], allowed: float) -> int:
    """Tokens that agree from the first on. Past a tie, which logits `allowed` apart cannot decide, all do."""
    same = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), len(ours))
    if same == len(ours):
        return same
    logits_V = next_logits(model, prompt + ours[:same])[-1]
    tie = (logits_V[ours[same]] - logits_V[theirs[same]]).item() <= 2 * allowed
    return len(ours) if tie else same


def check_cache(subject: Subject, found: dict[str, Any], model: LanguageModel) -> list[Check]:
    """Bytes of one sequence in fp32, exactly."""
    plan, last = model.plan, max(map(int, found["growing"]))
    wrong = [
        f"{size:,} at {context}"
        for context, (size, _) in found["growing"].items()
        if size != subject.target.cache_bytes(plan, int(context), 4)
    ]
    size, storage = found["growing"][str(last)]
    wanted, ours = subject.target.cache_bytes(plan, last, 4), kv_bytes(plan, last, 4).stored
    shown = "; ".join(wrong) if wrong else f"{size:,}"
    checks = [
        Check(f"bytes of the cache, to {last} tokens", shown, f"{wanted:,}", not wrong),
        Check(f"bytes it keeps alive, {last} tokens", f"{storage:,}", f"{ours:,} (footprint)", storage == ours),
    ]
    if found["static"] is not None:
        fixed, allocated = found["static"][1], allocated_bytes(plan, 1, last, 4)
        checks.append(
            Check("bytes of the static cache", f"{fixed:,}", f"{allocated:,} (footprint)", fixed == allocated)
        )
    return checks


def check_text(subject: Subject, found: dict[str, Any]) -> list[Check]:
    encode: Callable[[list[str]], list[Any]] = Encoder(subject.tokenizer, subject.end)
    wanted = [row[:-1].tolist() for row in encode(list(TEXTS))]
    theirs = found["tokenizer"]
    texts = [subject.tokenizer.decode(row) for row in wanted]
    equal = sum(a == b and c == d for a, b, c, d in zip(theirs["ids"], wanted, theirs["texts"], texts, strict=True))
    ends = (theirs["end"], found["generation"]["eos_token_id"])
    return [
        Check("texts tokenized and back", f"{equal} of {len(TEXTS)}", f"{len(TEXTS)}", equal == len(TEXTS)),
        Check("end of text", " and ".join(map(str, ends)), str(subject.end), ends == (subject.end, subject.end)),
    ]


def check_loss(subject: Subject, theirs: float, ours: float, allowed: float, first: int) -> list[Check]:
    count = sum(len(window) - 1 - first for window in subject.windows)
    if not count:
        return [Check("perplexity on validation text", "not compared: the data is not here", "-", None)]
    found, wanted = math.exp(theirs / count), math.exp(ours / count)
    passed = abs(theirs - ours) / count <= allowed
    return [Check(f"perplexity on {count:,} validation tokens", f"{found:.5f}", f"{wanted:.5f}", passed)]


def table(checks: list[Check], version: str) -> Table:
    result = Table(title=f"Verified with {version}", title_justify="left")
    for column in ("check", "found", "wanted", ""):
        result.add_column(column, justify="right" if column in ("found", "wanted") else "left")
    for check in checks:
        outcome = {True: "ok", False: "DIFFERS", None: "reported"}[check.passed]
        result.add_row(
            check.name, check.found, check.wanted, outcome, style="bold red" if check.passed is False else None
        )
    return result
