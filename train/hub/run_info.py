"""What else a run knows that an export needs: its text, its tokenizer, and what came out."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer

from data.cli import UsageError
from data.files import DataError
from data.mixture import EvalWindows
from data.shards import Manifest
from data.tokenizer import end_token, pretrained
from train.checkpoint import TrainingError
from train.datamodule import Data
from train.hub.card import Training
from train.schema import PretrainConfig


@dataclass(frozen=True)
class Corpus:
    """The tokenizer, the token that ends a text, and validation windows where there are any."""

    tokenizer: Tokenizer
    end: int
    windows: list[list[int]]


def run_of(folder: Path) -> Path | None:
    """The run that the checkpoint `folder` lies in; None if it lies somewhere else."""
    run = folder.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def saved_config(run: Path | None) -> PretrainConfig | None:
    """What the run was asked. Raises TrainingError where its config.yaml is none."""
    if run is None:
        return None
    try:
        saved = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(run / "config.yaml"))
        config: PretrainConfig = OmegaConf.to_object(saved)
        return config
    except (OSError, ValueError, OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        raise TrainingError(f"{run / 'config.yaml'} is not the configuration of a run: {error}") from error


def corpus_of(folder: Path, config: PretrainConfig | None, given: str | None, windows: int) -> Corpus:
    """From the prepared folder `given`, or from that of the run; else the tokenizer.json beside the weights.

    Raises UsageError where there is no tokenizer, DataError where the folder is broken.
    """
    beside = folder / "tokenizer.json"
    if given is not None:
        return prepared(Path(given), None if config is None else with_data(config, given), windows)
    if config is not None:
        data = config.data
        first = Path(next(iter(data.mix))) if data.mix else data.preparation.folder
        if (first / "manifest.json").is_file():
            return prepared(first, config, windows)
        where = f"the run's data folder {first} is not here"
    else:
        where = f"{folder} lies in no run"
    if beside.is_file():
        tokenizer = pretrained(str(beside))
        return Corpus(tokenizer, end_token(tokenizer, None), [])
    raise UsageError(f"there is no tokenizer: {where}; give the prepared folder that it was trained on with prepared=")


def with_data(config: PretrainConfig, folder: str) -> PretrainConfig:
    return replace(config, data=replace(config.data, path=folder, mix={}))


def prepared(folder: Path, config: PretrainConfig | None, windows: int) -> Corpus:
    """Of a folder of shards; with windows, without a document mask, where the run is known."""
    manifest = Manifest.load(folder)
    manifest.check_tokenizer(folder)
    tokenizer = pretrained(str(folder / "tokenizer.json"))
    if tokenizer.id_to_token(manifest.end_of_text) is None:
        raise DataError(f"{folder}: its tokenizer has no token {manifest.end_of_text}; prepare the folder again")
    if config is None:
        return Corpus(tokenizer, manifest.end_of_text, [])
    chosen = EvalWindows.of(Data(config).val, windows)
    return Corpus(tokenizer, manifest.end_of_text, [chosen[i].tolist() for i in range(len(chosen))][:windows])


def training_of(folder: Path, run: Path | None, config: PretrainConfig | None, info: dict[str, Any]) -> Training:
    """What the card says. The result of the run counts where this is its last checkpoint, else what is known of it."""
    step = info.get("step") if isinstance(info.get("step"), int) else None
    if run is None or config is None or step is None:
        return Training(None, step)
    tokens = step * config.batch_size * config.size.seq_len
    summary, best = read_json(run / "summary.json"), read_json(run / "checkpoints" / "best.json")
    val = None
    if summary.get("tokens") == tokens:
        val = summary.get("val")
    elif best.get("checkpoint") == folder.name:
        val = {"loss": best.get("val_loss")}
    if val is not None and not (isinstance(val, dict) and all(_finite(value) for value in val.values())):
        raise TrainingError(
            f"{run}: its validation figures are {val!r}, which are none; delete summary.json or best.json"
        )
    data = ", ".join(map(str, config.data.mix)) if config.data.mix else config.data.name
    return Training(config.name, step, tokens, val, data, config.seed)


def read_json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises TrainingError where it is no JSON object."""
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise TrainingError(f"{path} is no JSON object")
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
