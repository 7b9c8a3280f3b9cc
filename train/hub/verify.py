"""Verify that an exported folder is the trained model: a fresh process loads it, and every figure is compared.

Shapes: P positions that are compared, T inputs, V vocabulary.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from arch import LanguageModel, Plan, build, generate
from arch.footprint import allocated_bytes, kv_bytes, num_params
from data.tokenizer import Encoder
from train import checkpoint
from train.errors import TrainingError
from train.hub.records import Check, ExportUnderTest
from train.hub.verify_protocol import CacheBytes, Request, Response, TokenizerReport

TOLERANCE = 1e-5
NUM_NEW_TOKENS = 16
MAX_POSITIONS = 64  # of a prompt whose logits are compared, evenly spaced
TEXTS = ["The quick brown fox", "def f(x):\n    return x ** 2\n", "naïve café: äöü 漢字 🙂", "  two  spaces "]


def fresh_process(folder: Path, request: Request) -> tuple[Response, dict[str, Tensor]]:
    """Run verify_child.py in a process that knows `folder` and nothing of this repository; return findings and logits.

    Its memory is dirty from the start, so that reads of memory that is never written show. Raises TrainingError if it
    fails.
    """
    script = Path(__file__).with_name("verify_child.py")
    with tempfile.TemporaryDirectory() as work:
        Path(work, "request.json").write_text(json.dumps(request))
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
        return json.loads(Path(work, "response.json").read_text()), load_file(Path(work, "logits.safetensors"))


def verify(exported: ExportUnderTest) -> list[Check]:
    """Compare everything. Raises TrainingError if the folder cannot be loaded at all."""
    model = build(exported.config, init=False)
    checkpoint.load(exported.source, model)
    model.eval()
    request = make_request(exported, model)
    with torch.inference_mode():
        trained = [prompt_logits(model, request, number) for number in (0, 1)]
        if exported.dtype != torch.float32:
            parameters = dict(model.named_parameters())
            for weight in exported.target.weights:  # what is rounded is the tensor in the file
                parameter = parameters[weight.name]
                parameter.copy_(weight.from_hf(weight.to_hf(parameter).to(exported.dtype)))
        expected = [prompt_logits(model, request, number) for number in (0, 1)]
        loss = nats(model, exported.corpus.windows)
        tokens = [generate(model, [prompt], NUM_NEW_TOKENS)[0] for prompt in request["prompts"]]
        response, logits = fresh_process(exported.folder, request)
        difference = largest_difference(logits, expected)
        tolerance = logit_tolerance(model, request, expected, difference)
        return [
            *check_loading(exported, response, model),
            Check(
                "logits in fp32, largest difference", f"{difference:.1e}", f"{tolerance:.1e}", difference <= tolerance
            ),
            *check_bf16(logits, trained),
            *check_greedy(model, response["greedy"], request["prompts"], tokens, tolerance),
            *check_cache(exported, response["cache"], model),
            *check_text(exported, response["tokenizer"], response["eos_token_id"]),
            *check_loss(exported, response["nats"], loss, tolerance, request["first"]),
        ]


def make_request(exported: ExportUnderTest, model: LanguageModel) -> Request:
    size, first, windows = exported.config.size, model.plan.min_prompt - 1, exported.corpus.windows
    bounds = [min(bound, size.seq_len) for bound in spans(model.plan)]
    long, short = max(bounds, default=32) + 9, first + max(1, min([8, *bounds]) - 1)
    generator = torch.Generator().manual_seed(0)
    text: list[int] = torch.randint(size.vocab_size, (long + NUM_NEW_TOKENS,), generator=generator).tolist()
    if windows:  # text of the kind that it was trained on, as far as it goes
        text[: len(windows[0])] = windows[0][: len(text)]
        text = text[: long + NUM_NEW_TOKENS]
    prompts = [text[:short], text[:long]]
    edges = {edge for bound in bounds for edge in (bound - 1, bound, bound + 1)}
    return {
        "trust_remote_code": bool(exported.target.code),
        "own_cache": exported.target.own_cache,
        "first": first,
        "prompts": prompts,
        "positions": [
            torch.linspace(first, len(prompt) - 1, min(len(prompt) - first, MAX_POSITIONS)).long().tolist()
            for prompt in prompts
        ],
        "num_new_tokens": NUM_NEW_TOKENS,
        "pad": exported.corpus.end,
        "cache_text": text,
        "contexts": sorted(context for context in {1, short, *edges, len(text)} if context > first),
        "windows": windows,
        "texts": TEXTS,
    }


def spans(plan: Plan) -> list[int]:
    """Numbers of tokens at which a cache is full, or a query no longer sees every token: windows, slots, blocks."""
    stack = plan.stacks[0]
    tokens = stack.tokens_per_position
    bounds = [tokens * store.max_positions for store in stack.plan.stores if store.max_positions is not None]
    return bounds if tokens == 1 else [tokens, *bounds]


def prompt_logits(model: LanguageModel, request: Request, number: int) -> Tensor:
    """[P, V]"""
    places = [place - request["first"] for place in request["positions"][number]]
    return model.next_token_logits(torch.tensor([request["prompts"][number]]))[0, places]


def nats(model: LanguageModel, windows: list[list[int]]) -> float:
    total = 0.0
    for window in windows:
        logits_TV = model.next_token_logits(torch.tensor([window[:-1]]))[0]
        total += F.cross_entropy(logits_TV, torch.tensor(window[model.plan.min_prompt :]), reduction="sum").item()
    return total


def check_loading(exported: ExportUnderTest, response: Response, model: LanguageModel) -> list[Check]:
    report = "; ".join(f"{key}: {', '.join(names[:3])}" for key, names in response["loading_report"].items())
    expected, params = exported.target.model_class, num_params(exported.config, model.plan)
    packages = response["imported_packages"]
    return [
        Check("class", response["model_class"], expected, response["model_class"] == expected),
        Check("weights missing or left over", report or "none", "none", not report),
        Check("parameters", f"{response['num_parameters']:,}", f"{params:,}", response["num_parameters"] == params),
        Check("our packages imported", ", ".join(packages) or "none", "none", not packages),
    ]


def largest_difference(logits: dict[str, Tensor], expected: list[Tensor]) -> float:
    return max((logits[f"fp32.{number}"] - ours).abs().max().item() for number, ours in enumerate(expected))


def logit_tolerance(model: LanguageModel, request: Request, expected: list[Tensor], difference: float) -> float:
    """Return how far fp32 logits may lie apart: TOLERANCE, or more if rounding alone takes two computations further.

    That is twice the distance of ours from fp64, which takes some time and twice the memory, and is computed only if
    `difference` exceeds TOLERANCE. Changes `model` to fp64 and back.
    """
    if difference <= TOLERANCE:
        return TOLERANCE
    model.double()
    exact = [prompt_logits(model, request, number) for number in (0, 1)]
    model.float()
    rounding = max((a - b).abs().max().item() for a, b in zip(exact, expected, strict=True))
    return max(TOLERANCE, 2 * rounding)


def check_bf16(logits: dict[str, Tensor], trained: list[Tensor]) -> list[Check]:
    """Compare the folder computed in bf16 with the trained weights computed in fp32."""
    theirs, ours = torch.cat([logits["bf16.0"], logits["bf16.1"]]), torch.cat(trained)
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
    greedy: dict[str, list[list[int]]],
    prompts: list[list[int]],
    ours: list[list[int]],
    tolerance: float,
) -> list[Check]:
    """Compare the tokens after both prompts, for each way of generating."""
    checks = []
    for way, rows in greedy.items():
        for name, prompt, theirs, mine in zip(("short", "long"), prompts, rows, ours, strict=True):
            same = agreement(model, prompt, theirs, mine, tolerance)
            text = f"{same} of {len(mine)} tokens"
            checks.append(Check(f"greedy, {way}, {name} prompt", text, f"{len(mine)}", same == len(mine)))
    return checks


def agreement(model: LanguageModel, prompt: list[int], theirs: list[int], ours: list[int], tolerance: float) -> int:
    """Count the leading tokens that agree. All do where the first difference is a tie within `tolerance`."""
    same = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), len(ours))
    if same == len(ours):
        return same
    logits_V = model.next_token_logits(torch.tensor([prompt + ours[:same]]))[0, -1]
    tie = (logits_V[ours[same]] - logits_V[theirs[same]]).item() <= 2 * tolerance
    return len(ours) if tie else same


def check_cache(exported: ExportUnderTest, cache: CacheBytes, model: LanguageModel) -> list[Check]:
    """Compare the bytes of one sequence in fp32, exactly."""
    plan, last = model.plan, max(map(int, cache["growing"]))
    wrong = [
        f"{size:,} at {context}"
        for context, (size, _) in cache["growing"].items()
        if size != exported.target.cache_bytes(plan, int(context), 4)
    ]
    size, storage = cache["growing"][str(last)]
    expected, ours = exported.target.cache_bytes(plan, last, 4), kv_bytes(plan, last, 4).stored
    shown = "; ".join(wrong) if wrong else f"{size:,}"
    checks = [
        Check(f"bytes of the cache, to {last} tokens", shown, f"{expected:,}", not wrong),
        Check(f"bytes it keeps alive, {last} tokens", f"{storage:,}", f"{ours:,} (footprint)", storage == ours),
    ]
    if cache["static"] is not None:
        fixed, allocated = cache["static"][1], allocated_bytes(plan, 1, last, 4)
        checks.append(
            Check("bytes of the static cache", f"{fixed:,}", f"{allocated:,} (footprint)", fixed == allocated)
        )
    return checks


def check_text(exported: ExportUnderTest, report: TokenizerReport, eos_token_id: int | None) -> list[Check]:
    tokenizer, end = exported.corpus.tokenizer, exported.corpus.end
    encode: Callable[[list[str]], list[Any]] = Encoder(tokenizer, end)
    begin = [] if exported.corpus.begin is None else [exported.corpus.begin]
    rows = [[*begin, *row[:-1].tolist()] for row in encode(TEXTS)]
    expected = [(row, tokenizer.decode(row, skip_special_tokens=False)) for row in rows]
    equal = sum(a == b for a, b in zip(zip(report["ids"], report["texts"], strict=True), expected, strict=True))
    ends = (report["end"], eos_token_id)
    return [
        Check("texts tokenized and back", f"{equal} of {len(TEXTS)}", f"{len(TEXTS)}", equal == len(TEXTS)),
        Check("end of text", " and ".join(map(str, ends)), str(end), ends == (end, end)),
    ]


def check_loss(exported: ExportUnderTest, theirs: float, ours: float, tolerance: float, first: int) -> list[Check]:
    """Compare the perplexity on the validation windows; `theirs` and `ours` are nats, summed."""
    count = sum(len(window) - 1 - first for window in exported.corpus.windows)
    if not count:
        return [Check("perplexity on validation text", "not compared: the data is not here", "-", None)]
    found, expected = math.exp(theirs / count), math.exp(ours / count)
    passed = abs(theirs - ours) / count <= tolerance
    return [Check(f"perplexity on {count:,} validation tokens", f"{found:.5f}", f"{expected:.5f}", passed)]


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
