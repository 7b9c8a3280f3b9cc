"""Tokenizer, validation windows and results of a run, for its export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.files import DataError
from data.mixture import EvalWindows
from data.shards import Manifest
from data.tokenizer import pretrained
from eval.checks import is_finite
from eval.identity import Identity, check_summary_digest, data_name
from eval.runs import Run
from train.datamodule import TokenDataModule
from train.errors import TrainingError
from train.hub.records import Corpus, Training
from train.loading import FIX, no_tokenizer, open_prepared, prepared_folder, run_of, tokenizer_beside
from train.schema import PretrainConfig


def load_corpus(
    folder: Path, config: PretrainConfig | None, prepared: str | None, num_windows: int, tied: Identity | None = None
) -> Corpus:
    """Load tokenizer and validation windows of the checkpoint `folder`, which must be those of its identity `tied`.

    They come from the folder `prepared`, else from the data folder of the run; else there is only the tokenizer.json
    beside the weights.

    Raises UsageError if there is no tokenizer, DataError if the folder is broken, or is not what it was trained
    on.
    """
    place = prepared_folder(config, None if prepared is None else Path(prepared))
    if place is not None:
        if prepared is not None and config is not None:
            config = replace(config, data=replace(config.data, path=prepared, mix={}))
        return load_prepared(folder, place, config, num_windows, tied)
    found = tokenizer_beside(folder, tied)
    if found is None:
        raise no_tokenizer(folder, config)
    return Corpus(found.tokenizer, found.end, [], found.own_begin, found.chat_template)


def load_prepared(
    checkpoint: Path, folder: Path, config: PretrainConfig | None, num_windows: int, tied: Identity | None
) -> Corpus:
    """Load a folder of shards. Only with the `config` of the run there are windows, without a document mask."""
    manifest = open_prepared(checkpoint, folder, tied)
    tokenizer = pretrained(str(folder / "tokenizer.json"))
    if tokenizer.id_to_token(manifest.end_of_text) is None:
        raise DataError(f"{folder}: its tokenizer has no token {manifest.end_of_text}; prepare the folder again")
    if config is None:
        return Corpus(tokenizer, manifest.end_of_text, [])
    data = TokenDataModule(config)
    if tied is not None and config.data.mix:
        tied.check_data(str(checkpoint), data.folders, data.train.weights, FIX)
    run = run_of(checkpoint)
    if run is not None and tied is None:
        check_summary_digest(str(checkpoint), run, data.digest, [folder], FIX)
    chosen = EvalWindows.of(data.val, num_windows)
    windows = [chosen[i][: config.size.seq_len + 1].tolist() for i in range(len(chosen))][:num_windows]
    return Corpus(tokenizer, manifest.end_of_text, windows)


def describe_data(config: DataConfig, prepared: str | None, tied: Identity | None) -> str:
    """Name the text of a run: as its identity does, or as its prepared folders do, where they are here."""
    if tied is not None:
        names = [(folder.name, folder.weight) for folder in tied.data]
    else:
        here = [Path(prepared)] if prepared is not None else config.folders
        weights = list(config.mix.values()) if config.mix and prepared is None else [1.0]
        names = [
            (data_name(folder, Manifest.load(folder)) if (folder / "manifest.json").is_file() else folder.name, weight)
            for folder, weight in zip(here, weights, strict=True)
        ]
    total = sum(weight for _, weight in names)
    return ", ".join(name if len(names) == 1 else f"{name} {100 * weight / total:.3g} %" for name, weight in names)


def describe_training(
    folder: Path,
    run: Path | None,
    config: PretrainConfig | None,
    info: dict[str, Any],
    prepared: str | None = None,
    tied: Identity | None = None,
) -> Training:
    """Describe the training up to the checkpoint `folder` on the data of its identity `tied`.

    Its validation figures are those of the run if this is its last checkpoint, or the loss recorded for its best one.
    Raises RunError if they cannot be read.
    """
    step = info.get("step") if isinstance(info.get("step"), int) else None
    if run is None or config is None or step is None:
        return Training(None, step)
    tokens = step * config.batch_size * config.size.seq_len
    found = Run(run)
    summary, best = found.summary if found.finished else {}, found.best
    val = None
    if summary.get("tokens") == tokens:
        val = summary.get("val")
    elif best is not None and best.checkpoint == folder.name:
        val = {"loss": best.val_loss}
    if val is not None and not (isinstance(val, dict) and all(is_finite(value) for value in val.values())):
        raise TrainingError(f"{run}: its validation figures are {val!r}, which are none; delete summary.json")
    data = describe_data(config.data, prepared, tied)
    if tied is None:
        return Training(config.name, step, tokens, val, data, config.seed)
    digests = ", ".join(of.digest for of in tied.data)
    return Training(config.name, step, tokens, val, data, config.seed, digests, tied.tokenizer)
