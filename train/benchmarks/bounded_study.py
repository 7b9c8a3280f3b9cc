"""Bounded caches at equal state bytes: `python train/benchmarks/bounded_study.py [key=value ...]`.

Trains small models that differ only in their layers' KV caches, on real text (loss by position, within the
length of training and beyond) and on associative recall that no window can solve (accuracy by number of pairs):

  full         every position, without a bound: what the others should come near to
  window       a sliding window with a sink
  gated        slots alone, written by content
  ring_slots   a shorter window, slots for what leaves it, and a sink
  ring_router  slots alone, written as a ring with a leak

The bounded ones keep as many bytes as a window of `window` positions in a cache of `itemsize` bytes per element; slots
are fp32. Writes result.json, README.md and two pictures. Runs that result.json has already are not trained again.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from arch import ArchConfig, Decoder, KVPlan, ModelConfig, SizeConfig
from arch.footprint import kv_bytes, num_params
from arch.named import load_arch
from arch.plan import resolve_stack
from arch.store_spec import state_itemsize
from data.batches import EvalBatches, TrainBatches
from data.cli import UsageError, parse
from data.mixture import EvalWindows
from data.presets import load
from data.recall import RecallTask
from data.shards import Manifest, TokenWindows
from eval.console import PlainConsole
from eval.environment import ROOT, git_revision
from eval.outcome import run_script
from eval.positions import loss_by_position
from eval.recall import questions, right
from eval.results import write_result
from train.benchmarks.bounded_report import accuracy, report
from train.benchmarks.timing import timed
from train.datamodule import open_data
from train.loss import cross_entropy_sum
from train.optim import build_optimizer, schedule
from train.schema import OptimConfig

# The layouts of configs/arch that the rules are, full attention first.
RULES = {"full": "mha", "window": "swa_sinks", "gated": "bct_gated", "ring_slots": "bct", "ring_router": "bct_ring"}
LONGER = (1, 2, 4)  # validation sequences, in lengths of training
VAL_SEED = 10_000  # of recall questions that no run is trained on
VAL_BATCH = 64  # of these


@dataclass(frozen=True)
class Settings:
    """Options; lists are written with commas: lm_lr=1e-3,3e-3.

    out                  folder of the results
    window, itemsize     state of bounded layouts: as many bytes as a window of so many positions, and element size
    slots_share          fraction of the state of ring_slots that goes to slots
    tasks, rules, seeds  what is trained, and the number of runs of each
    data                 prepared folder; empty: the standard library's source in a vocabulary of lm_vocab
    lm_*                 training on that text
    lm_lr, recall_lr     peak learning rates; of several, a rule is shown at its best
    recall_*             training on recall: sequences with each number of pairs in turn, a pair being one token; half
                         of them ask at once, half beyond all windows, as in validation; recall_keys: number of keys,
                         and of values
    """

    out: Path = ROOT / "docs" / "results" / "bounded-cpu"

    window: int = 32
    itemsize: int = 2
    slots_share: float = 0.5
    tasks: tuple[str, ...] = ("lm", "recall")
    rules: tuple[str, ...] = tuple(RULES)
    seeds: int = 2
    data: str = ""
    lm_layers: int = 4
    lm_width: int = 64
    lm_vocab: int = 1024
    lm_length: int = 512
    lm_batch: int = 2
    lm_tokens: int = 400_000
    lm_lr: tuple[float, ...] = (3e-3,)
    lm_val_tokens: int = 32_768
    recall_layers: int = 1
    recall_width: int = 64
    recall_length: int = 64
    recall_pairs: tuple[int, ...] = (2, 4, 8)
    recall_keys: int = 8
    recall_batch: int = 32
    recall_steps: int = 500
    recall_lr: tuple[float, ...] = (3e-3,)
    recall_val: int = 256

    @property
    def task(self) -> RecallTask:
        """Recall with a gap that the windows of all layers together do not span."""
        gap = self.recall_layers * (self.window - 1)
        keys = self.recall_keys
        return RecallTask(self.recall_length, gap, noise=4, keys=keys, values=keys, joined=True)


Tick = Callable[[float], None]


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: str
    rule: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.rule} lr {self.lr:g} seed {self.seed}"


def layout(rule: str, settings: Settings) -> ArchConfig:
    """The layout of a rule with the state that the settings allow, and a key/value head for every query head."""
    arch = load_arch(RULES[rule])
    (store,) = arch.stores.values()
    store.kv_heads = "all"
    positions_per_slot = state_itemsize(settings.itemsize) / settings.itemsize
    if rule == "window":
        store.window = settings.window
    elif rule == "ring_slots":
        store.slots = max(1, int(settings.window * settings.slots_share / positions_per_slot))
        store.window = settings.window - int(store.slots * positions_per_slot)
    elif rule != "full":
        store.slots = int(settings.window / positions_per_slot)
    return arch


def rule_config(task: str, rule: str, settings: Settings) -> ModelConfig:
    lm = task == "lm"
    width = settings.lm_width if lm else settings.recall_width
    size = SizeConfig(
        num_layers=settings.lm_layers if lm else settings.recall_layers,
        d_model=width,
        num_heads=max(1, width // 32),
        d_ff=width * 8 // 3 // 8 * 8,
        vocab_size=settings.lm_vocab if lm else settings.task.vocab_size,
        seq_len=settings.lm_length if lm else settings.recall_length,
        init_std=0.06,
    )
    return ModelConfig(layout(rule, settings), size)


def describe_rule(task: str, rule: str, settings: Settings) -> dict[str, Any]:
    """Costs of a rule: parameters, state bytes, and the difference of these to the window's in percent."""
    config = rule_config(task, rule, settings)
    plan = resolve_stack(config)
    state_bytes = _state_bytes(plan, settings)
    window_bytes = _state_bytes(resolve_stack(rule_config(task, "window", settings)), settings)
    store = plan.stores[0]
    return {
        "arch": RULES[rule],
        "window": store.window,
        "slots": store.num_slots,
        "params": num_params(config, plan),
        "state_bytes": state_bytes,
        "off_percent": None if store.max_positions is None else 100 * (state_bytes / window_bytes - 1),
    }


def _state_bytes(plan: KVPlan, settings: Settings) -> int:
    """Bytes of the bounded stores of one sequence of any length."""
    return kv_bytes(plan, 1, settings.itemsize).constant


def fit(model: Decoder, losses: Iterator[Tensor], lr: float, steps: int, tick: Tick) -> None:
    """Take a step of AdamW on each loss, with train/pretrain.py's schedule and clipping."""
    config = OptimConfig(lr=lr)
    optimizer = build_optimizer(model, config)
    scheduler = schedule(optimizer, config, steps)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tick(loss.item())


def train_lm(model: Decoder, cell: Cell, settings: Settings, tick: Tick) -> dict[str, Any]:
    folder, manifest = text(settings)
    windows = TokenWindows(folder, manifest, "train", settings.lm_length)
    steps = lm_steps(settings)
    batches = TrainBatches(windows, cell.seed, steps, settings.lm_batch, settings.lm_batch)
    losses = (model(b["inputs"], head=cross_entropy_sum(b["targets"])) / b["step_targets"] for b in batches)
    fit(model, losses, cell.lr, steps, tick)
    positions = {}
    for times in LONGER:
        length = times * settings.lm_length
        windows = TokenWindows(folder, manifest, "val", length)
        chosen = EvalWindows.of(windows, settings.lm_val_tokens // length)
        positions[str(length)] = [asdict(b) for b in loss_by_position(model, EvalBatches(chosen, 1))]
    trained = positions[str(settings.lm_length)]
    loss = sum(b["nats"] * b["targets"] for b in trained) / sum(b["targets"] for b in trained)
    return {"loss": loss, "positions": positions, "data": manifest.digest}


def train_recall(model: Decoder, cell: Cell, settings: Settings, tick: Tick) -> dict[str, Any]:
    far, pairs = settings.task, settings.recall_pairs
    near = replace(far, gap=0)

    def losses() -> Iterator[Tensor]:
        for step in range(settings.recall_steps):
            task = near if step % 2 else far
            batch = questions(task, pairs[step // 2 % len(pairs)], settings.recall_batch, cell.seed, step)
            yield F.cross_entropy(model(batch.inputs_BT)[batch.is_question], batch.targets_BT[batch.is_question])

    fit(model, losses(), cell.lr, settings.recall_steps, tick)
    counts = {count: recall_counts(model, far, count, settings.recall_val) for count in pairs}
    long = replace(near, length=LONGER[-1] * near.length)
    by_distance = recall_counts(model, long, pairs[-1], settings.recall_val)
    mean = sum(accuracy(count) for count in counts.values()) / len(counts)
    return {"accuracy": mean, "counts": counts, "by_distance": by_distance}


def recall_counts(model: Decoder, task: RecallTask, pairs: int, sequences: int) -> dict[int, tuple[int, int]]:
    """Count (questions answered right, questions asked) by the power of 2 below the distance to the value."""
    counts: dict[int, tuple[int, int]] = {}
    for number in range(-(-sequences // VAL_BATCH)):
        batch = questions(task, pairs, min(VAL_BATCH, sequences - number * VAL_BATCH), VAL_SEED, number)
        for distance, right_B3 in right(model, batch).items():
            good, total = counts.get(distance, (0, 0))
            counts[distance] = good + int(right_B3[:, 0].sum()), total + int(right_B3[:, 2].sum())
    return counts


TASKS = {"lm": train_lm, "recall": train_recall}


def lm_steps(settings: Settings) -> int:
    return settings.lm_tokens // (settings.lm_batch * settings.lm_length)


def text(settings: Settings) -> tuple[Path, Manifest]:
    """The prepared text. Raises DataError if it cannot be used."""
    options = [f"path={settings.data}"] if settings.data else []
    config = load("stdlib", [*options, f"tokenizer.vocab_size={settings.lm_vocab}"])
    ((folder, manifest),) = open_data(config).items()
    if manifest.vocab_size > settings.lm_vocab:
        raise UsageError(f"{folder} has {manifest.vocab_size} tokens; set lm_vocab={manifest.vocab_size}")
    return folder, manifest


def cells(settings: Settings) -> list[Cell]:
    """Seeds outermost, so that a study cut short still compares rules."""
    rates = {"lm": settings.lm_lr, "recall": settings.recall_lr}
    return [
        Cell(task, rule, lr, seed)
        for seed in range(settings.seeds)
        for task in settings.tasks
        for rule in settings.rules
        for lr in rates[task]
    ]


def problems(settings: Settings) -> list[str]:
    """Everything that is wrong with the settings, and the fix."""
    found = [f"no rule {rule}; the rules are {', '.join(RULES)}" for rule in settings.rules if rule not in RULES]
    found += [f"no task {task}; the tasks are {', '.join(TASKS)}" for task in settings.tasks if task not in TASKS]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if (isinstance(value, int) and value < 1) or value == ():
            found.append(f"{field.name} is {value}; it must be at least 1, a list not empty")
    if not 0 < settings.slots_share < 1:
        found.append(f"slots_share is {settings.slots_share}; it lies between 0 and 1")
    if not found and settings.window < 2 * state_itemsize(settings.itemsize) // settings.itemsize:
        found.append(f"window is {settings.window}: too few bytes for a slot beside a window; make it larger")
    if not found and lm_steps(settings) < 1:
        found.append(f"lm_tokens is {settings.lm_tokens}; one step takes {settings.lm_batch * settings.lm_length}")
    if not found:
        found += [problem for pairs in settings.recall_pairs for problem in settings.task.problems(pairs)]
    return found


def load_result(path: Path, settings: Settings, digest: str | None) -> dict[str, Any]:
    """The tasks in `path`, with an empty section for each one of the settings that it lacks.

    `digest` is that of the text, None where no task reads it. More seeds, rules or learning rates may be added. Raises
    UsageError if it has runs of other settings, or on another text.
    """
    saved = json.loads(path.read_text()) if path.exists() else {}
    result: dict[str, Any] = {task: saved[task] for task in TASKS if task in saved}
    for task in settings.tasks:
        shared = shared_settings(task, settings)
        section = result.setdefault(task, {"settings": shared, "rules": {}, "runs": {}})
        other = [key for key, value in shared.items() if section["settings"].get(key) != value]
        if other:
            raise UsageError(f"{path} has runs with another {', '.join(other)}; give another folder with out=")
        if task == "lm" and any(run["data"] != digest for run in section["runs"].values()):
            raise UsageError(f"{path} has runs on another text; give that with data=, or another folder with out=")
        section["rules"] |= {rule: describe_rule(task, rule, settings) for rule in settings.rules}
    return result


def shared_settings(task: str, settings: Settings) -> dict[str, Any]:
    """The settings that all runs of a task share, as JSON has them."""
    common = ("window", "itemsize", "slots_share")
    shared = {
        key: value
        for key, value in asdict(settings).items()
        if key in common or (key.startswith(f"{task}_") and key != f"{task}_lr")
    }
    result: dict[str, Any] = json.loads(json.dumps(shared))
    return result


def run(cell: Cell, settings: Settings, tick: Tick) -> dict[str, Any]:
    model = Decoder(rule_config(cell.task, cell.rule, settings))
    model.init_weights(cell.seed)
    measured, took = timed(lambda: TASKS[cell.task](model, cell, settings, tick))
    return asdict(cell) | measured | {"seconds": round(took, 1)}


def main(arguments: list[str]) -> None:
    """Train what is missing and write the report. Raises one of MISTAKES, before any work."""
    settings = parse(Settings, arguments)
    if found := problems(settings):
        raise UsageError("\n".join(found))
    study(settings)


def study(settings: Settings) -> None:
    """Train every run that result.json lacks, write it after each, then the report."""
    path = settings.out / "result.json"
    digest = text(settings)[1].digest if "lm" in settings.tasks else None  # prepared, or refused, before the bar
    result, git = load_result(path, settings, digest), git_revision()
    todo = [cell for cell in cells(settings) if cell.key not in result[cell.task]["runs"]]
    steps = {"lm": lm_steps(settings), "recall": settings.recall_steps}
    console = PlainConsole()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("steps", total=sum(steps[cell.task] for cell in todo))
        for cell in todo:

            def tick(loss: float, key: str = f"{cell.task} {cell.key}") -> None:
                progress.update(bar, advance=1, description=f"{key}  loss {loss:.3f}")

            record = run(cell, settings, tick) | {"git": git}
            result[cell.task]["runs"][cell.key] = record
            write_result(path, result)
            score = f"loss {record['loss']:.4f}" if cell.task == "lm" else f"accuracy {record['accuracy']:.3f}"
            progress.console.print(f"{cell.task} {cell.key}: {score}, {record['seconds']:.0f} s")
    console.print(report(json.loads(path.read_text()), settings.out))


if __name__ == "__main__":
    run_script(main)
