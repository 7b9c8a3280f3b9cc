"""One training run: check, train, validate, and write the result."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb

from arch import Plan, build, resolve
from data.cli import UsageError, word
from data.files import DataError, sha256, write_json
from data.launcher import first_on_machine, launched, launched_rank, num_launched, started_by_torchrun
from data.tokenizer import pretrained
from data.verify import verify_once
from eval.console import PlainConsole, visible
from eval.evaluations import KEY, entries_of_step
from eval.footprint import plan_tables
from eval.identity import Identity, check_summary_digest, short
from eval.remarks import remarks
from train import checkpoint
from train.callbacks import CheckpointCallback, GracefulStop
from train.datamodule import TokenDataModule, check_limits
from train.device import device_type, flushing_denormals, free_memory, sdpa_kernel_name
from train.errors import TrainingError
from train.estimates.capacity import choose_micro_batch
from train.evaluations import Evaluations, check_pairs
from train.fp8 import check_fp8
from train.lightning_private import launched_processes
from train.lightning_trainer import lightning_trainer
from train.lit_module import LitModel
from train.loggers import log_final, loggers, logs_to_wandb, wandb_settings
from train.metrics import Metrics, ProgressBar
from train.processes import distributed
from train.run import static_metrics, summarize, write_start
from train.schema import PretrainConfig, TrainerConfig, num_steps
from train.signals import RunStopped, Signals


@flushing_denormals()
def run(config: PretrainConfig) -> None:
    """Train and validate; everything is written to `config.folder`.

    Raises one of MISTAKES, before any work, if the configuration cannot be run on this machine; TrainingError if
    the run fails.
    """
    assert config.name is not None and config.folder is not None  # pretrain.py chooses them
    plan, folder, options = resolve(config.model), Path(config.folder), config.trainer
    several = options.devices * options.num_nodes > 1
    if logs_to_wandb(config):
        wandb_settings(config)  # refuses what wandb would
    try:
        device, attention, source = check_on_device(config, folder)
        start = tied = None
        if config.resume is not None and launched_rank() == 0:  # reads every byte, and broadcasts the answer
            start = checkpoint.latest_valid(folder)
            tied = Identity.load(folder) if start is None else checkpoint.identity_of(start, folder)
            check_steps(config, start)
    except (TrainingError, OSError) as error:
        raise UsageError(str(error)) from error
    data = TokenDataModule(config, check=False)
    if config.resume is None:  # a resumed run keeps the limits it started with
        check_limits(config.data, data.folders)
        check_pairs(config, data.folders)
    try:
        check_data(config, folder, source, tied, data)
    except DataError as error:
        if not (several and launched()):
            raise
        data.problem = str(error)
    tied = tied or data.identity
    module = LitModel(config, data.token_bytes(), tied)
    if data.problem:  # the others wait to be told
        lightning_trainer(config, device).fit(module, data)
    if launched_rank() == 0:
        step = 0 if start is None else checkpoint.step_of(start)
        about = {"from_step": step, "attention": attention, "threads": torch.get_num_threads()}
        write_start(folder, config, plan, tied, about)
        print_start(config, plan, data, attention)
        if device == "cuda":
            print(f"fused attention: {sdpa_kernel_name(config.model, plan, torch.device('cuda', 0))}", flush=True)
    signals = Signals(folder, peers=several, rank=launched_rank())
    failed = True
    try:
        init = None if config.init is None else Path(config.init)
        every, minutes = options.checkpoint_every, options.checkpoint_minutes
        checkpoints = CheckpointCallback(
            folder, every, options.keep_checkpoints, start, init, minutes, options.checkpoint_async
        )
        with naming_the_last_checkpoint(checkpoints):
            evaluations = Evaluations(config.evals, folder)
            trainer = build_trainer(config, plan, device, checkpoints, signals, evaluations)
            fit(trainer, module, data)
            if trainer.is_global_zero:
                finish(trainer, module, checkpoints.run, plan, data.digest, evaluations.entries)
        failed = False
    finally:
        wandb.finish(exit_code=int(failed))  # or the next run of a sweep would continue this one's
        signals.restore()


def print_start(config: PretrainConfig, plan: Plan, data: TokenDataModule, attention: str) -> None:
    """Print the tables of the plan, what the size and the data are short of, and the attention kernels."""
    console = PlainConsole()
    for table in plan_tables(str(config.name), plan, config.context, config.kv_itemsize):
        console.print(table)
    for line in (*remarks(config.model), *data.remarks(), f"attention: {attention}"):
        console.print(line)


def check_on_device(config: PretrainConfig, folder: Path) -> tuple[str, str, Path | None]:
    """Return the type of device that the run in `folder` trains on, a description of the attention kernels, and the
    checkpoint whose weights it starts from.

    Raises UsageError if the model cannot be trained there as configured, TrainingError if `init` does not match it.
    """
    check_processes(config.trainer)
    device = device_type(config.trainer.accelerator)
    if config.trainer.accelerator == "cuda" and device == "cpu":
        raise UsageError("trainer.accelerator is cuda, and torch sees no CUDA device; use trainer.accelerator=auto")
    if config.trainer.precision == "fp8":
        check_fp8(device)
    try:
        with torch.device("meta"):
            model = build(config.model, device_type=device, backend=config.trainer.backend)
        attention = model.attention(config.data.document_mask)
    except ValueError as error:
        raise UsageError(f"trainer.backend: {error}") from error
    first = launched_rank() == 0 and not distributed()  # where all are there, they agree: MicroBatchByMemory
    if device == "cuda" and first:
        choose_micro_batch(config, free_memory(torch.device("cuda", 0)))
    names = [name for name, _ in model.named_parameters()]
    if config.train_only is not None and not any(re.search(config.train_only, name) for name in names):
        raise UsageError(f"train_only={config.train_only} matches no parameter; they are named like {names[1]}")
    source = None
    if config.init is not None and not checkpoint.checkpoints(folder):
        source = checkpoint.resolve(Path(config.init))
        checkpoint.check_matches(source, model)
    return device, attention, source


def check_processes(options: TrainerConfig) -> None:
    """Raise UsageError if torchrun has started another number of processes than `options` say. Lightning trusts it."""
    started = num_launched()
    if started_by_torchrun() and started != options.devices * options.num_nodes:
        raise UsageError(
            f"torchrun has started {started} processes, and trainer.devices={options.devices} on each of "
            f"trainer.num_nodes={options.num_nodes} are {options.devices * options.num_nodes}; give both as started"
        )


def check_data(
    config: PretrainConfig, folder: Path, source: Path | None, tied: Identity | None, data: TokenDataModule
) -> None:
    """Check the data for all processes: the first of the run compares it with what the run is tied to, and the first on
    each machine with its manifest. The others trust them. Raises DataError.
    """
    if launched_rank() == 0:
        if config.resume is not None:
            check_same_data(folder, tied, data)
        if source is not None:
            check_same_tokenizer(source, data)
    if first_on_machine():
        data.check_shards()
        for path, manifest in data.folders.items():
            verify_once(path, manifest)


def check_steps(config: PretrainConfig, start: Path | None) -> None:
    """Raise UsageError if a run would end before the checkpoint that it starts from."""
    if start is not None and checkpoint.step_of(start) > num_steps(config):
        raise UsageError(
            f"tokens is {config.tokens}, {num_steps(config)} steps, and the run has trained {start.name}; give more "
            "tokens, or delete the checkpoints beyond"
        )


def check_same_data(folder: Path, tied: Identity | None, data: TokenDataModule) -> None:
    """Check that the run in `folder` goes on in the data that it began with: by its identity, or as far as the summary
    of a run of an earlier version tells. Raises DataError, naming both, if it would not.
    """
    fix = "Put that data back; where it lies elsewhere now, name it with data.path= (or data.mix=)"
    if tied is not None:
        tied.check_data(f"the run {folder}", data.folders, data.train.weights, fix)
    else:
        check_summary_digest(f"the run {folder}", folder, data.digest, data.folders, fix)


def check_same_tokenizer(source: Path, data: TokenDataModule) -> None:
    """Check that the weights in `source`, a checkpoint, are of a model of the tokenizer of `data`.

    Raises DataError, naming both, if they are not. An earlier version did not write which one they are of.
    """
    fix = "Prepare the text with that tokenizer (tokenizer.kind=pretrained tokenizer.name=FOLDER), or leave out init="
    tied, beside = (
        checkpoint.identity_of(source, None) or Identity.load(source.parent.parent),
        source / "tokenizer.json",
    )
    ours = data.identity.tokenizer
    if tied is not None:
        if tied.tokenizer != ours:
            was = ", ".join(folder.folder for folder in tied.data)
            raise DataError(
                f"init={source} is of the tokenizer {short(tied.tokenizer)} of {was}; {data.folder} has "
                f"{short(ours)}. {fix}"
            )
    elif beside.is_file():  # an imported model: its tokenizer is prepared text's, written in another way
        found, other = (pretrained(str(path)) for path in (data.folder / "tokenizer.json", beside))
        if found.get_vocab(with_added_tokens=True) != other.get_vocab(with_added_tokens=True):
            raise DataError(
                f"init={source} has the tokenizer {short(sha256(beside))} beside it; {data.folder} has another, "
                f"{short(ours)}. {fix}"
            )


@contextmanager
def naming_the_last_checkpoint(checkpoints: CheckpointCallback) -> Iterator[None]:
    """Report a run that is asked to stop, and one that fails, with the checkpoint from which it can continue.

    Raises TrainingError for what fails in training, in reading data and in writing.
    """
    try:
        yield
    except RunStopped as stopped:
        if launched_rank() == 0:
            print(f"{stopped.reason}; {word('resume', checkpoints.run)} continues", file=sys.stderr)
        raise
    except (TrainingError, DataError, OSError) as error:
        raise TrainingError(f"{error}. {describe_saved(checkpoints)}.") from error


def fit(trainer: L.Trainer, module: LitModel, data: TokenDataModule) -> None:
    """Train to the last step."""
    for logger in trainer.loggers:
        logger.log_hyperparams(asdict(module.config))
    trainer.fit(module, data)
    if not module.val_metrics:  # the run had ended before
        trainer.validate(module, data, verbose=False)
    if trainer.global_step != num_steps(module.config):
        raise TrainingError(f"training ended at step {trainer.global_step} of {num_steps(module.config)}")


def describe_saved(checkpoints: CheckpointCallback) -> str:
    """Name the checkpoint from which a failed run can continue; none where it was one that could not be loaded."""
    try:
        saved = checkpoint.latest_valid(checkpoints.run)
    except TrainingError as error:
        return str(error)
    if saved is None:
        return "There was no checkpoint yet"
    if saved == checkpoints.start and not checkpoints.loaded:
        return f"Delete {saved} to continue from the one before"
    return f"The last good checkpoint is {saved}; {word('resume', checkpoints.run)} continues from it"


def finish(
    trainer: L.Trainer, module: LitModel, folder: Path, plan: Plan, data: str, evaluated: Mapping[str, Any]
) -> None:
    """Write the summary, print it, and log it with a Pareto plot.

    `data` is the digest of the data, `evaluated` the entries of tasks; what eval/evaluate.py has put into a summary of
    the same step stays.
    """
    config, val = module.config, module.val_metrics
    length = config.size.seq_len
    first = plan.num_unpredicted + 1
    counted = "" if first == 1 else f", of targets {first} to {length} of each {length}"
    summary = summarize(config, plan, data, trainer.global_step, val)
    if entries := {**entries_of_step(folder, trainer.global_step), **evaluated}:
        summary[KEY] = entries
    write_json(folder / "summary.json", summary)
    print(
        f"{visible(config.name or '')}: validation loss {val['loss']:.4f}, perplexity {val['ppl']:.3f}, "
        f"{val['bpb']:.4f} bits per byte{counted}\nrun folder: {visible(str(folder))}"
    )
    scalars = {f"final/{name}": value for name, value in val.items()} | static_metrics(config, plan)
    log_final(folder, scalars, config.kv_itemsize, config.context, trainer.loggers)


def build_trainer(
    config: PretrainConfig,
    plan: Plan,
    device: str,
    checkpoints: CheckpointCallback,
    signals: Signals,
    evaluations: Evaluations,
) -> L.Trainer:
    """Build the trainer of the run, with its loggers and callbacks."""
    options, folder = config.trainer, checkpoints.run
    bar = options.progress and sys.stdout.isatty()
    metrics = Metrics(
        options.log_every,
        checkpoints.due,
        config.batch_size * config.size.seq_len,
        static_metrics(config, plan),
        print_reports=options.progress and not bar,
        print_validations=not bar,
    )
    callbacks: list[L.Callback] = [metrics, checkpoints]
    if config.evals.tasks:
        callbacks.append(evaluations)
    callbacks.append(GracefulStop(checkpoints, signals, options.max_hours))
    if bar:
        callbacks.append(ProgressBar(leave=True))
    trainer = lightning_trainer(config, device, loggers(config, folder), callbacks, folder, bar)
    signals.children = partial(launched_processes, trainer)
    return trainer
