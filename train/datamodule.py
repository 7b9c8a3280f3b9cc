"""The data of a run: prepared shards, and the batches made of them."""

from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor

from data.batches import EvalBatches, TrainBatches
from data.prepare import default_folder, prepare
from data.shards import DataError, Manifest, TokenWindows

from .schema import DataConfig, PretrainConfig, micro_batch, num_steps


class Data(L.LightningDataModule):
    """Batches of a run: which ones is a function of the configuration and the step alone."""

    def __init__(self, config: PretrainConfig):
        """Raises DataError where the data is not there, is broken, or does not fit the model."""
        super().__init__()
        self.config = config
        self.folder, self.manifest = open_data(config.data)
        if self.manifest.vocab_size > config.size.vocab_size:
            raise DataError(
                f"{self.folder} has a vocabulary of {self.manifest.vocab_size} tokens, the model of "
                f"{config.size.vocab_size}; set size.vocab_size={self.manifest.vocab_size}, or data.vocab_size to at "
                f"most {config.size.vocab_size}"
            )
        self.train = TokenWindows(self.folder, self.manifest, "train", config.size.seq_len)
        self.val = TokenWindows(self.folder, self.manifest, "val", config.size.seq_len)

    def token_bytes(self) -> Tensor:
        """[V] UTF-8 bytes that each token stands for."""
        return torch.from_numpy(np.load(self.folder / "token_bytes.npy").astype(np.int64))

    def train_dataloader(self) -> TrainBatches:
        trainer, config = self.trainer, self.config
        return TrainBatches(
            self.train,
            seed=config.seed,
            steps=num_steps(config),
            batch_size=config.batch_size,
            micro_batch=micro_batch(config),
            rank=trainer.global_rank,
            world=trainer.world_size,
            start_step=trainer.global_step,
        )

    def val_dataloader(self) -> EvalBatches:
        trainer, config = self.trainer, self.config
        windows = min(len(self.val), config.data.val_tokens // config.size.seq_len)
        return EvalBatches(self.val, windows, micro_batch(config), trainer.global_rank, trainer.world_size)


def open_data(config: DataConfig) -> tuple[Path, Manifest]:
    """The prepared folder: the one named, or the corpus' own, prepared now if it is not there."""
    if config.path:
        return Path(config.path), Manifest.load(Path(config.path))
    folder = default_folder(config.corpus, config.vocab_size)
    return folder, prepare(config.corpus, config.vocab_size, folder)
