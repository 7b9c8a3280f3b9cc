"""Models for evaluation and generation, wherever they are: runs, checkpoints, exported folders, the hub."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.files import DataError
from data.mixture import weights_of
from data.recall import joined_pairs
from data.shards import Manifest
from data.tokenizer import pretrained
from eval.source import Source, kind
from eval.tasks.task import Prepared, Subject
from train import checkpoint as checkpoints
from train.device import device_type, named_device
from train.loading import LoadedModel, load, prepared_folder, run_of
from train.schema import PretrainConfig
from train.tensor_pieces import COMPUTE_DTYPES


@dataclass(frozen=True)
class Opened:
    """A model that is loaded: for tasks, as `load` returns it where it is ours, and the run it belongs to."""

    subject: Subject
    loaded: LoadedModel | None
    run: Path | None

    @property
    def step(self) -> int | None:
        """The step of the checkpoint; None if it is not ours."""
        return None if self.loaded is None else int(checkpoints.load_info(self.loaded.checkpoint)["step"])

    @property
    def config(self) -> PretrainConfig | None:
        return None if self.loaded is None else self.loaded.config


def open_subject(
    source: Source, context: int | None = None, texts: Sequence[Path] = (), text_key: str = "text", seed: int = 0
) -> Opened:
    """Load the model that `source` names. Raises UsageError, DataError or TrainingError if it cannot be."""
    device = named_device(device_type("auto") if source.device == "auto" else source.device)
    if kind(source.checkpoint) == "transformers":
        from eval.transformers_model import load_transformers

        auto = torch.float32 if device.type == "cpu" else "auto"
        dtype = COMPUTE_DTYPES.get(source.dtype, auto)
        model, tokenizer, longest = load_transformers(source.checkpoint, device, dtype, source.trust, source.revision)
        name = Path(source.checkpoint.rstrip("/")).name
        found = Subject(model, tokenizer, device, name, context or longest, tuple(texts), text_key, seed=seed)
        return Opened(found, None, None)
    dtype = COMPUTE_DTYPES.get(source.dtype, torch.float32)
    loaded = load(source.checkpoint, which=source.which, device=device, dtype=dtype, prepared=source.prepared)
    config = loaded.config
    folder = Path(source.checkpoint)
    run = run_of(folder) if (folder / checkpoints.INFO).is_file() else folder
    length = context or loaded.model.config.size.seq_len
    name = folder.name if config is None else f"{config.name}-seed{config.seed}"
    padded = config is not None and config.data.block_padding
    pad = loaded.tokenizer.end if padded else None
    subject = Subject(loaded.model, loaded.tokenizer, device, name, length, tuple(texts), text_key, None, seed, pad)
    data = prepared_folder(config, source.prepared)
    if data is not None and (config is None or not config.data.mix):
        subject = replace(subject, joined=joined_pairs(Manifest.load(data).recipe))
    return Opened(subject, loaded, run)


def data_of_run(opened: Opened) -> Prepared | None:
    """The data that the run was trained on; None if the model belongs to no run.

    Raises DataError if it is not here, or not what the run was trained on.
    """
    from train.datamodule import open_data

    if opened.loaded is None or opened.config is None:
        return None
    config = opened.config.data
    folders = open_data(config)
    weights = list(weights_of(config.mix).values()) if config.mix else [1.0]
    opened.loaded.check_data(folders, weights)
    return Prepared(folders, weights, config.val_tokens, config.document_mask)


def other_data(opened: Opened, folder: Path, val_tokens: int | None) -> Prepared:
    """Other prepared data for the model. Raises DataError unless its tokenizer is the model's."""
    manifest = Manifest.load(folder)
    manifest.check_tokenizer(folder)
    identity = None if opened.loaded is None else opened.loaded.identity
    if identity is None or identity.tokenizer != manifest.tokenizer_sha256:
        theirs = pretrained(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
        if theirs != opened.subject.tokenizer.vocabulary:
            raise DataError(
                f"data.path={folder} was prepared with another tokenizer than that of {opened.subject.name}; prepare "
                "it with that one (tokenizer.kind=pretrained tokenizer.name=FOLDER), or give text=FILE"
            )
    if "val" not in manifest.splits:
        raise DataError(
            f"data.path={folder} has no text for validation; prepare it with source.val or source.val_share"
        )
    masked = opened.config is not None and opened.config.data.document_mask
    return Prepared({folder: manifest}, [1.0], val_tokens or manifest.splits["val"].tokens, masked)
