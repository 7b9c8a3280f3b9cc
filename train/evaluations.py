"""Tasks of evaluation while a run trains and at its end: `evals.tasks` of train/schema.py."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.fsdp import FSDPModule

from arch.generation import evaluating
from data.cli import TaskError, UsageError
from data.config import DataConfig
from data.files import DataError
from data.recall import joined_pairs
from data.shards import Manifest
from data.tokenizer import pretrained
from eval.evaluations import FOLDER, KEY, digest_of, entry, json_values, key_of, recorded_step, write_evaluation
from eval.tasks import ChosenTask, compressed, recall
from eval.tasks.task import Prepared, ProcessGroup, Subject, TaskResult
from train.datamodule import TokenDataModule
from train.device import synchronize
from train.lit_module import LitModel, lit_model
from train.loading import Text
from train.processes import gather, rank, world_size
from train.schema import EvalsConfig, PretrainConfig, chosen_tasks


class Evaluations(L.Callback):
    """Run tasks every `config.every` steps and at the end; log their figures beside the loss.

    Processes share the items of a task (`Subject.each`), and each has the whole result. The training does not change:
    random states and modes are restored, and the clock is paused. A task that cannot run gives a warning and no
    figures. `entries` are those of the last evaluation, for summary.json.
    """

    def __init__(self, config: EvalsConfig, run: Path):
        self.run, self.every = run, config.every
        self.texts = tuple(Path(path) for path in config.text)
        self.tasks: list[ChosenTask] = chosen_tasks(config)
        self.step = 0  # of the last evaluation
        self.entries: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run = trainer.strategy.broadcast(self.run)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pass over the step that a resumed run starts from, unless the run ended in its evaluation."""
        recorded = recorded_step(self.run, map(self._key, self.tasks)) if trainer.is_global_zero else 0
        recorded = trainer.strategy.broadcast(recorded)
        self.step = trainer.global_step if recorded >= trainer.global_step else recorded
        self._evaluate_if_due(trainer, lit_model(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._evaluate_if_due(trainer, lit_model(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate_at_end(trainer, lit_model(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate a run whose training had ended before, and which only validates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._evaluate_at_end(trainer, lit_model(pl_module))

    def _evaluate_if_due(self, trainer: L.Trainer, module: LitModel) -> None:
        step = trainer.global_step
        if self.every is not None and step and step % self.every == 0 and step != self.step:
            self._evaluate(trainer, module)

    def _evaluate_at_end(self, trainer: L.Trainer, module: LitModel) -> None:
        if not self.entries or trainer.global_step != self.step:
            self._evaluate(trainer, module)

    def _evaluate(self, trainer: L.Trainer, module: LitModel) -> None:
        self.step, self.entries = trainer.global_step, {}
        if not self.tasks:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TokenDataModule)
        subject = subject_of(module, data, self.texts, quiet=not trainer.is_global_zero)
        bf16 = module.compute_dtype == torch.bfloat16
        synchronize(module.device)
        autocast = torch.autocast(module.device.type, dtype=torch.bfloat16, enabled=bf16)
        with module.clock.paused(), random_states_kept(), evaluating(module), torch.no_grad(), autocast:
            for chosen in self.tasks:
                try:
                    result = chosen.run(subject)
                except (UsageError, DataError, TaskError) as error:
                    if trainer.is_global_zero:
                        print(f"warning: step {self.step}: the task {chosen.name}: {error}", file=sys.stderr)
                    continue
                key = self._key(chosen)
                self.entries[key] = entry(result, self.step, digest_of(chosen, subject))
                self._log(trainer, chosen, subject, result)

    def _key(self, chosen: ChosenTask) -> str:
        return key_of(chosen, self.texts)

    def _log(self, trainer: L.Trainer, chosen: ChosenTask, subject: Subject, result: TaskResult) -> None:
        """Write the result into the folder of the run, and its figures to the loggers and a line."""
        key, figures = self._key(chosen), json_values(result.figures)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"{KEY}/{key}/{name}": value for name, value in figures.items() if value is not None}, step=self.step
            )
        if not trainer.is_global_zero:
            return
        try:
            paths = write_evaluation(key, chosen, subject, result, self.run / FOLDER, {"step": self.step})
        except OSError as error:  # a full disk ends the run with its next checkpoint, not with a picture
            print(f"warning: {self.run / FOLDER} cannot be written ({error.strerror})", file=sys.stderr)
            paths = []
        for logger in trainer.loggers:
            for path in paths:
                if isinstance(logger, WandbLogger) and path.suffix == ".png":
                    logger.log_image(f"{KEY}/{path.stem}", [str(path)], step=self.step)
        shown = "  ".join(f"{name} {value:.5g}" for name, value in figures.items() if value is not None)
        print(f"step {self.step}/{trainer.max_steps}  {key}: {shown}", flush=True)


def subject_of(module: LitModel, data: TokenDataModule, texts: tuple[Path, ...], quiet: bool) -> Subject:
    """The model as it is trained, with the tokenizer and the validation split of its data."""
    config = module.config
    manifest = data.folders[data.folder]
    tokenizer = Text(pretrained(str(data.folder / "tokenizer.json")), manifest.end_of_text)
    prepared = Prepared(data.folders, data.train.weights, config.data.val_tokens, config.data.document_mask)
    return Subject(
        module.model,
        tokenizer,
        module.device,
        f"{config.name}-seed{config.seed}",
        config.size.seq_len,
        texts,
        prepared=None if texts else prepared,
        pad_token=tokenizer.end if config.data.block_padding else None,
        quiet=quiet,
        group=process_group(module),
        steps="plain",  # while a graph is captured no other thread may call CUDA, and one fetches batches
        joined=joined_of(config.data, data.folders),
    )


def joined_of(config: DataConfig, folders: Mapping[Path, Manifest]) -> bool | None:
    """`joined_pairs` of the data of a run; None: it is a mixture, or has no pairs."""
    return None if config.mix else joined_pairs(next(iter(folders.values())).recipe)


def check_pairs(config: PretrainConfig, folders: Mapping[Path, Manifest]) -> None:
    """Raise UsageError if a task of the run asks for other pairs than those of its data, which it would refuse at each
    of its turns."""
    known = joined_of(config.data, folders)
    for chosen in chosen_tasks(config.evals):
        options = chosen.options
        if isinstance(options, recall.Options):
            asks, fix = "gap" in options.kinds, ", kinds: [gap]" if known else ""
        elif isinstance(options, compressed.Options):
            asks, fix = options.parts != ("text",), ""
        else:
            continue
        if asks and known not in (None, options.joined):
            told = f"evals.options: {chosen.name}.joined is {str(options.joined).lower()}, but in the run's data"
            pair = f"a pair is {'one token' if known else 'two tokens'}"
            raise UsageError(
                f"{told} {pair}; set evals.options={{{chosen.name}: {{joined: {str(known).lower()}{fix}}}}}"
            )


def process_group(module: LitModel) -> ProcessGroup | None:
    """The processes of the run and the rank of this one; None if it is alone."""
    if world_size() == 1:
        return None
    sharded = isinstance(module.model, FSDPModule)  # its weights may be whole between two forward passes
    return ProcessGroup(rank(), world_size(), gather, lockstep=sharded)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of torch, on all devices, numpy and Python back as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
