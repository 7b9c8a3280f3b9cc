"""Tokenizer, validation windows and results of a run, for its export."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.cli import UsageError
from data.files import DataError
from data.mixture import EvalWindows
from data.shards import Manifest
from data.tokenizer import end_token, pretrained
from train.datamodule import TokenDataModule
from train.errors import TrainingError
from train.hub.records import Corpus, Training
from train.schema import PretrainConfig


def find_run(folder: Path) -> Path | None:
    """Return the run that the checkpoint `folder` belongs to; None if it lies in no run."""
    run = folder.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def load_corpus(folder: Path, config: PretrainConfig | None, prepared: str | None, num_windows: int) -> Corpus:
    """Load tokenizer and validation windows of the checkpoint `folder`.

    They come from the folder `prepared`, else from the data folder of the run; else there is only the tokenizer.json
    beside the weights.

    Raises UsageError where there is no tokenizer, DataError where the folder is broken.
    """
    beside = folder / "tokenizer.json"
    if prepared is not None:
        return load_prepared(Path(prepared), None if config is None else _with_data(config, prepared), num_windows)
    if config is not None:
        data = config.data
        first = Path(next(iter(data.mix))) if data.mix else data.preparation.folder
        if (first / "manifest.json").is_file():
            return load_prepared(first, config, num_windows)
        where = f"the run's data folder {first} is not here"
    else:
        where = f"{folder} lies in no run"
    if beside.is_file():
        tokenizer = pretrained(str(beside))
        return Corpus(tokenizer, end_token(tokenizer, None), [])
    raise UsageError(f"there is no tokenizer: {where}; give the prepared folder that it was trained on with prepared=")


def _with_data(config: PretrainConfig, folder: str) -> PretrainConfig:
    return replace(config, data=replace(config.data, path=folder, mix={}))


def load_prepared(folder: Path, config: PretrainConfig | None, num_windows: int) -> Corpus:
    """Load a folder of shards. Only with the `config` of the run there are windows, without a document mask."""
    manifest = Manifest.load(folder)
    manifest.check_tokenizer(folder)
    tokenizer = pretrained(str(folder / "tokenizer.json"))
    if tokenizer.id_to_token(manifest.end_of_text) is None:
        raise DataError(f"{folder}: its tokenizer has no token {manifest.end_of_text}; prepare the folder again")
    if config is None:
        return Corpus(tokenizer, manifest.end_of_text, [])
    chosen = EvalWindows.of(TokenDataModule(config).val, num_windows)
    windows = [chosen[i].tolist() for i in range(len(chosen))][:num_windows]
    return Corpus(tokenizer, manifest.end_of_text, windows)


def describe_training(folder: Path, run: Path | None, config: PretrainConfig | None, info: dict[str, Any]) -> Training:
    """Describe the training up to the checkpoint `folder`.

    Its validation figures are those of the run if this is its last checkpoint, or the loss recorded for its best one.
    """
    step = info.get("step") if isinstance(info.get("step"), int) else None
    if run is None or config is None or step is None:
        return Training(None, step)
    tokens = step * config.batch_size * config.size.seq_len
    summary, best = _read_json(run / "summary.json"), _read_json(run / "checkpoints" / "best.json")
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


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if there is no such file. Raises TrainingError where it is something else."""
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise TrainingError(f"{path} is no JSON object")
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
