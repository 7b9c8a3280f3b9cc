"""Data of a run: prepared shards, and the batches made of them."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from arch import resolve
from data.batches import EvalBatches, Prefetched, SequenceFormat, TrainBatches
from data.cli import UsageError
from data.config import DataConfig
from data.dotted import lookup
from data.files import DataError
from data.mixture import EvalWindows, Mixture, weights_of
from data.prepare import prepare
from data.presets import changed_limits, overridden, prepare_command
from data.shards import Manifest, TokenWindows, text_bytes_of_tokens
from data.writing import differences
from eval.identity import Identity
from train.device import device_type
from train.processes import gather
from train.schema import PretrainConfig, num_steps, sequence_format


class TokenDataModule(L.LightningDataModule):
    """Batches of a run; they depend on the configuration and the step only.

    problem  what this process has found wrong with the data; all processes end with it before the model is built
    """

    def __init__(self, config: PretrainConfig, check: bool = True):
        """Open the prepared folders; with `check`, check their shards, as `check_shards` does.

        Raises DataError if data is missing, broken, or does not fit the model.
        """
        super().__init__()
        self.config, self.problem = config, ""
        self.folders = open_data(config.data)
        self.folder, first = next(iter(self.folders.items()))
        for folder, manifest in self.folders.items():
            manifest.check_tokenizer(folder)
            if manifest.tokenizer_sha256 != first.tokenizer_sha256:
                raise DataError(f"data.mix: {folder} has another tokenizer than {self.folder}; prepare both with one")
        if first.vocab_size > config.size.vocab_size:
            raise DataError(
                f"{self.folder} has a vocabulary of {first.vocab_size} tokens, the model of {config.size.vocab_size}; "
                f"set size.vocab_size={first.vocab_size}, or prepare the data with a smaller tokenizer"
            )
        masks = [f"data.{key}" for key in ("document_mask", "block_padding") if getattr(config.data, key)]
        if masks and first.row_length is not None:
            raise DataError(f"{self.folder} holds sequences with answers, each by itself; leave out {masks[0]}")
        self.train, self.val = self._corpora("train"), self._corpora("val")
        if check:
            self.check_shards()

    def check_shards(self) -> None:
        """Compare each shard with the manifest. Raises DataError."""
        for windows in (*self.train.corpora, *self.val.corpora):
            windows.check()

    def setup(self, stage: str) -> None:
        """Raise UsageError, in all processes, with the problem that any of them has found."""
        if found := next(filter(None, gather(self.problem)), None):
            raise UsageError(found)

    def _corpora(self, split: str) -> Mixture:
        """Return one split of every folder; a single folder is a mixture of one."""
        seq_len, mix = self.config.size.seq_len, self.config.data.mix
        corpora = [TokenWindows(folder, manifest, split, seq_len, False) for folder, manifest in self.folders.items()]
        return Mixture(tuple(corpora), tuple(weights_of(mix).values()) if mix else (1.0,))

    @property
    def sequence_format(self) -> SequenceFormat:
        plan = resolve(self.config.model)
        return sequence_format(plan, self.config.data)

    @property
    def digest(self) -> str:
        """Checksum of the data: that of the folder, or of the mixture; a document mask or pads change it."""
        parts = [manifest.digest for manifest in self.folders.values()]
        options = [name for name in ("document_mask", "block_padding") if getattr(self.config.data, name)]
        if len(parts) == 1 and not options:
            return parts[0]
        parts += [repr(weight / sum(self.train.weights)) for weight in self.train.weights]
        parts += options
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def identity(self) -> Identity:
        """The identity of a run that begins now."""
        return Identity.of(asdict(self.config), self.folders, self.train.weights)

    @property
    def num_val_windows(self) -> int:
        """Sequences to validate on, if there are as many."""
        return self.config.data.val_tokens // self.config.size.seq_len

    def remarks(self) -> list[str]:
        """A line if a folder has too little validation text for its part of a mixture."""
        asked, most = self.num_val_windows, self.val.most_windows
        if len(self.folders) == 1 or most >= asked:
            return []
        sizes = ", ".join(f"{len(of)} in {folder}" for folder, of in zip(self.folders, self.val.corpora, strict=True))
        return [f"validation: {most} of the {asked} sequences asked for keep the shares of data.mix; there are {sizes}"]

    def token_bytes(self) -> Tensor:
        """Load the number of UTF-8 bytes of validation text that each token stands for, [V]."""
        sizes = self.folders[self.folder].token_bytes(self.folder)
        splits = [manifest.splits["val"] for manifest in self.folders.values()]
        return torch.from_numpy(text_bytes_of_tokens(sizes, splits, self.val.weights))

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch, which the trainer has chosen."""
        assert self.trainer is not None
        return self.config.batch_size // (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def train_dataloader(self) -> TrainBatches | Prefetched:
        trainer, config = self.trainer, self.config
        assert trainer is not None
        batches = TrainBatches(
            self.train,
            seed=config.seed,
            steps=num_steps(config),
            batch_size=config.batch_size,
            micro_batch=self.micro_batch,
            rank=trainer.global_rank,
            world=trainer.world_size,
            start_step=trainer.global_step,
            sequence_format=self.sequence_format,
        )
        return Prefetched(batches) if self.on_cuda else batches

    def val_dataloader(self) -> EvalBatches | Prefetched:
        trainer = self.trainer
        assert trainer is not None
        windows = EvalWindows.of(self.val, self.num_val_windows)
        unpadded = replace(self.sequence_format, block_padding=0)
        batches = EvalBatches(windows, self.micro_batch, trainer.global_rank, trainer.world_size, unpadded)
        return Prefetched(batches) if self.on_cuda else batches

    @property
    def on_cuda(self) -> bool:
        return device_type(self.config.trainer.accelerator) == "cuda"


def open_data(config: DataConfig) -> dict[Path, Manifest]:
    """Open the prepared folders: those of `mix`, the one named, or the data set's own.

    A corpus that is on every machine is prepared now if it is missing. Raises DataError, with the command that prepares
    it, if another one is missing, or if a folder was prepared from another source.
    """
    if config.mix:
        if config.path:
            raise DataError("data.path and data.mix are both set; choose one")
        return {Path(folder): Manifest.load(Path(folder)) for folder in weights_of(config.mix)}
    if config.path:
        return {Path(config.path): Manifest.load(Path(config.path))}
    preparation = config.preparation
    folder = preparation.folder
    if (folder / "manifest.json").exists():
        manifest = Manifest.load(folder)
        for key in ("source", "tokenizer"):  # limits may have been given when it was prepared
            if manifest.recipe[key] != preparation.recipe[key]:
                was = differences({key: manifest.recipe[key]}, {key: preparation.recipe[key]})
                raise DataError(f"{folder} was prepared with {was}; prepare another folder and name it with data.path=")
        return {folder: manifest}
    if not preparation.source.corpus:
        raise DataError(f"{folder} is not prepared yet; run\n  {prepare_command(preparation)}")
    return {folder: prepare(replace(preparation, workers=preparation.workers or 1))}


def check_limits(config: DataConfig, folders: dict[Path, Manifest]) -> None:
    """Check that the folders were prepared with the limits set for this run, which cannot change prepared data; and, if
    the folders are named, with everything else that was set about their preparation.

    Raises DataError with the key, and the command that prepares such data, if one was not.
    """
    given = changed_limits(config.preparation)
    if config.path or config.mix:
        given |= overridden(config.preparation)
    for folder, manifest in folders.items():
        recorded = {"name": manifest.name, **manifest.recipe}
        prepared = {key: lookup(recorded, key) for key in given}
        if prepared != given:
            wrong = {key: value for key, value in given.items() if prepared[key] != value}
            raise DataError(
                f"{folder} was prepared with {differences(prepared, given)}, and training does not change it. Leave "
                f"out {' and '.join(f'data.{key}' for key in wrong)}, or prepare another folder and train with "
                f"data.path=FOLDER:\n  {prepare_command(replace(config.preparation, path='FOLDER'))}"
            )
