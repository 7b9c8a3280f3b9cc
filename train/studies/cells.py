"""The runs of a study: what each is configured with, and how one learning rate per layout is chosen."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from arch import LayoutError, resolve
from arch.config import SizeConfig, to_dict
from data.cli import UsageError, hydra_value
from data.shards import Manifest
from eval.cli import explain, require, unknown_keys
from eval.overrides import as_typed
from eval.runs import deciding_values
from train.matching import BASELINE, Match, find_match
from train.run import to_object
from train.schema import PretrainConfig, problems
from train.studies.schema import StudyConfig

RATE, MAIN = "rate", "main"  # the stages
DIGITS = 8  # of a key in the name of a folder


@dataclass(frozen=True)
class Cell:
    """One run.

    key    digest of all that decides its result but the seed, and of what decides its rounding
    words  the command line of train/pretrain.py, without folder=
    """

    study: str
    stage: str
    arch: str
    lr: float
    seed: int
    tokens: int
    key: str
    words: tuple[str, ...]
    match: Match | None = None

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.arch}-lr{self.lr:g}-seed{self.seed}"

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.key[:DIGITS]}"

    def __str__(self) -> str:
        return f"{self.arch} lr {self.lr:g} seed {self.seed}" + (" (rate)" if self.stage == RATE else "")


@dataclass(frozen=True)
class Layout:
    """A layout of the study, as its runs are configured."""

    arch: str
    config: PretrainConfig
    words: tuple[str, ...]
    match: Match | None
    data: str

    def cell(self, study: StudyConfig, stage: str, lr: float, seed: int) -> Cell:
        tokens = study.lr_tokens if stage == RATE else study.tokens
        config = replace(self.config, tokens=tokens, seed=seed, optim=replace(self.config.optim, lr=lr))
        words = (*self.words, f"optim.lr={lr!r}", f"tokens={tokens}", f"seed={seed}")
        return Cell(study.name, stage, self.arch, lr, seed, tokens, key_of(config, self.data), words, self.match)


def key_of(config: PretrainConfig, data: str) -> str:
    """Digest of what decides a run on the data of digest `data`, but for its seed."""
    values = to_dict(config)
    decides = deciding_values(values, "result") | {"speed": deciding_values(values, "speed")}
    places = ("path", "mix", "name", "workers", "source", "tokenizer")  # the digest stands for them
    decides["data"] = [data, {key: value for key, value in decides["data"].items() if key not in places}]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def layouts(study: StudyConfig) -> list[Layout]:
    """Compose the runs of every layout. Raises UsageError or LayoutError if one cannot be trained."""
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)
    baseline = None
    if study.match != "none":
        words = _words(study, BASELINE, [f"+arch={BASELINE}"])  # of which a word may be of other layouts alone
        baseline = _composed(BASELINE, [word for word in words if not word.lstrip("+~").startswith("arch.")]).size
    digests: dict[Any, str] = {}
    return [_layout(study, arch, baseline, digests) for arch in study.archs]


def _words(study: StudyConfig, arch: str, words: Sequence[str]) -> list[str]:
    """The command line of the layout `arch`, which `words` choose. A match is the study's, and becomes a size."""
    name = hydra_value(f"{study.name}-{arch}")
    data = [] if study.data.path is None else [f"data.path={hydra_value(study.data.path)}"]
    return [*words, *study.run, "match=none", f"name={name}", *data]


def _composed(arch: str, words: Sequence[str]) -> PretrainConfig:
    """The configuration that `words` make. Raises UsageError, naming the layout `arch`, if they make none."""
    typed = as_typed(words, PretrainConfig, sweep=False)
    try:
        composed = compose("pretrain", typed, return_hydra_config=True)
    except Exception as error:  # Hydra's, about the words
        raise UsageError(f"{arch}: {explain(error)}") from error
    try:
        require(size=composed.hydra.runtime.choices.get("size"))
        with open_dict(composed):
            del composed["hydra"]
        if wrong := list(unknown_keys(composed)):
            raise UsageError("\n".join(f"run: {line}" for line in wrong))
        return to_object(composed)
    except OmegaConfBaseException as error:
        raise UsageError(f"{arch}: {explain(error)}") from error


def _layout(study: StudyConfig, arch: str, baseline: SizeConfig | None, digests: dict[Any, str]) -> Layout:
    """`baseline`: the size of the multi-head attention that the layout is matched with; None: it is not."""
    words = _words(study, arch, study.layout_words(arch))
    config, match = _composed(arch, words), None
    config.tokens = study.tokens
    if found := problems(replace(config, tokens=min(study.tokens, study.lr_tokens))):
        raise LayoutError(found)
    resolve(config.model)
    if baseline is not None:
        model, match = find_match(config.model, study.match, config.context, baseline)
        config = replace(config, size=model.size)
        words.append(f"size.{match.key}={match.width}")
    read = tuple(config.data.folders), tuple((config.data.mix or {}).values())
    if read not in digests:
        digests[read] = data_digest(config)
    return Layout(arch, config, tuple(words), match, digests[read])


def data_digest(config: PretrainConfig) -> str:
    """Digest of the data of a run, and the weights of a mixture; a corpus that is on every machine is prepared if it
    is missing."""
    if all((folder / "manifest.json").exists() for folder in config.data.folders):
        digests = [Manifest.load(folder).digest for folder in config.data.folders]
    else:
        from train.datamodule import open_data  # brings torch

        digests = [manifest.digest for manifest in open_data(config.data).values()]
    weights = list((config.data.mix or {}).values())
    return ", ".join(digests) + (f" by {[weight / sum(weights) for weight in weights]}" if weights else "")


@dataclass(frozen=True)
class Choice:
    """The learning rate of a layout. `losses`: validation loss of each rate that was tried; None: it failed."""

    lr: float
    losses: Mapping[float, float | None]


def rate_to_try(study: StudyConfig, losses: Mapping[float, float | None]) -> list[float]:
    """The learning rates that are still to be tried with a layout, where `losses` are known (None: it failed)."""
    if len(study.lrs) == 1:
        return []
    if left := [lr for lr in study.lrs if lr not in losses]:
        return left
    best, tried = best_rate(losses), sorted(losses)
    given = sorted(study.lrs)
    if best is None or len(losses) >= len(study.lrs) + study.lr_extra or best not in (tried[0], tried[-1]):
        return []
    factor = (given[-1] / given[0]) ** (1 / (len(given) - 1))
    further = float(f"{best * (factor if best == tried[-1] else 1 / factor):.3g}")
    return [] if further in losses else [further]  # rates that are too near to be told apart by three digits


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest loss; None if all have failed."""
    known = {lr: loss for lr, loss in losses.items() if loss is not None}
    return min(known, key=lambda lr: known[lr]) if known else None


def next_cells(
    study: StudyConfig, found: Sequence[Layout], loss_of: Callable[[Cell], float | None], failed: Callable[[Cell], bool]
) -> tuple[list[Cell], dict[str, Choice]]:
    """All cells whose configuration is known by now, those that are done included, and the rates that are chosen.

    The first stage comes first; seeds are outermost in the main one, so that a study cut short still compares layouts.
    """
    rates: list[Cell] = []
    chosen: dict[str, Choice] = {}
    for layout in found:
        losses: dict[float, float | None] = {}
        while to_try := rate_to_try(study, losses):
            cells = [layout.cell(study, RATE, lr, study.seeds[0]) for lr in to_try]
            rates += cells
            ended = {cell.lr: loss_of(cell) for cell in cells if loss_of(cell) is not None or failed(cell)}
            losses |= ended
            if len(ended) < len(cells):
                break
        else:
            lr = study.lrs[0] if len(study.lrs) == 1 else best_rate(losses)
            if lr is not None:
                chosen[layout.arch] = Choice(lr, losses)
    main = [
        layout.cell(study, MAIN, chosen[layout.arch].lr, seed)
        for seed in study.seeds
        for layout in found
        if layout.arch in chosen
    ]
    return rates + main, chosen


def describe(layout: Layout) -> dict[str, Any]:
    """Counts of a layout for the plan."""
    from arch.footprint import kv_bytes, num_params, train_flops_per_token

    config = layout.config
    plan = resolve(config.model)
    return {
        "params": num_params(config.model, plan),
        "flops": train_flops_per_token(config.model, plan),
        "kv": kv_bytes(plan, config.context, config.kv_itemsize).stored,
    }
