"""Loggers of a run, and the Pareto picture that compares it with its neighbours when it ends."""

import os
import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from data.cli import UsageError
from data.files import set_aside, write_text
from data.launcher import launched_rank
from eval.figures import METRICS
from eval.pareto import differences, points, write
from eval.runs import Point, Run, RunError, finished_run
from eval.units import counted
from train.schema import PretrainConfig


def loggers(config: PretrainConfig, folder: Path) -> list[Logger]:
    """Build the loggers: CSV always, in a new subfolder each time the run is started; wandb if it is switched on."""
    metrics = folder / "metrics"
    if launched_rank() == 0 and os.path.lexists(metrics) and not metrics.is_dir():
        print(f"{metrics} is no folder; it is now {set_aside(metrics).name}", file=sys.stderr)
    earlier = [int(path.name) for path in metrics.glob("*") if re.fullmatch("[0-9]{1,9}", path.name)]
    start = str(max(earlier, default=-1) + 1)
    result: list[Logger] = [CSVLogger(folder, name="metrics", version=start, flush_logs_every_n_steps=1)]
    if logs_to_wandb(config) and launched_rank() == 0:
        result.append(wandb_logger(config, folder))
    return result


def logs_to_wandb(config: PretrainConfig) -> bool:
    """Tell whether the run is logged to wandb, too."""
    return config.logger.wandb and os.environ.get("WANDB_MODE") != "disabled"


def wandb_settings(config: PretrainConfig) -> wandb.Settings:
    """Build wandb's settings of the run. Raises UsageError where wandb refuses them."""
    options = config.logger
    try:
        return wandb.Settings(
            project=options.project,
            entity=options.entity,
            run_group=options.group or config.name,
            run_tags=tuple(options.tags) or None,
            run_notes=options.notes,
        )
    except (wandb.errors.UsageError, ValueError) as error:
        reason = str(error).partition("Value error, ")[2].partition(" [type=")[0] or str(error)
        raise UsageError(
            f"wandb refuses the run: {reason.rstrip('.')}. Change logger.project (a team goes into logger.entity) or "
            "logger.tags, or set logger.wandb=false"
        ) from error


def wandb_logger(config: PretrainConfig, folder: Path) -> WandbLogger:
    """Start a wandb run; offline without a key, and, with a message on stderr, where the server cannot be reached."""
    identity = wandb_id(folder)

    def start(offline: bool) -> WandbLogger:
        # Not by the logger, which sets `anonymous` too, and so makes wandb warn of a setting that nobody chose.
        settings = wandb_settings(config)
        settings.init_timeout, settings.silent = 30, offline
        run = wandb.init(
            name=folder.name,
            id=identity,
            resume="allow",
            dir=folder,
            mode="offline" if offline else "online",
            settings=settings,
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return WandbLogger(experiment=run, save_dir=folder)

    if os.environ.get("WANDB_MODE", "online") != "online" or not wandb_key():
        return start(offline=True)
    try:
        return start(offline=False)
    except wandb.errors.CommError as error:
        later = f"wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*"
        print(f"wandb cannot be reached ({error}); logging offline. To send it later:\n  {later}", file=sys.stderr)
        wandb.teardown()  # forgets the run that did not start
        os.environ["WANDB_MODE"] = "offline"
        return start(offline=True)


def wandb_id(folder: Path) -> str:
    """Read the identity of a run, with which it continues its curves when it is resumed; make one if there is none.

    A damaged one is renamed, with a warning.
    """
    path = folder / "wandb-id.txt"
    try:
        identity = path.read_text().strip()
        if re.fullmatch(r"[\w-]{1,64}", identity, re.ASCII):
            return identity
        reason = "it holds no identity of a run"
    except FileNotFoundError:
        reason = None
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error)
    if reason is not None:
        aside = set_aside(path)
        print(f"{path} is damaged ({reason}); it is now {aside.name}, and wandb shows a new run", file=sys.stderr)
    identity = uuid.uuid4().hex[:12]
    write_text(path, identity)
    return identity


def wandb_key() -> bool:
    """Tell whether this machine has a key for wandb's server: that of WANDB_BASE_URL, or a public one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    asked = os.environ.get("WANDB_BASE_URL")
    servers = [asked] if asked else [wandb.Settings().base_url, "https://api.wandb.ai"]
    try:
        known = netrc(os.environ.get("NETRC")).hosts
    except (FileNotFoundError, NetrcParseError):
        return False
    return any(urlparse(server).hostname in known for server in servers)


def log_final(folder: Path, scalars: dict[str, float], itemsize: int, context: int, loggers: Sequence[Logger]) -> None:
    """Add `scalars` to wandb's summary; write the Pareto picture of a finished run and its neighbours, and log it.

    They are plain scalars there, so wandb's scatter panel can draw the curve across runs. The run has ended: a picture
    that cannot be made is a line on stderr.
    """
    logging = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    for logger in logging:
        logger.experiment.summary.update(scalars)
    try:
        rows = points(finished_neighbours(folder), context, "ppl", itemsize)
        picture = write(rows, context, "ppl", folder / "pareto")[0]
        for logger in logging:
            logger.experiment.log({"pareto/picture": wandb.Image(str(picture)), "pareto/table": wandb_table(rows)})
    except Exception as error:  # of other folders, the disk, or a package that draws: nothing that this run has done
        print(f"no Pareto picture: {error or type(error).__name__}; eval/pareto.py makes it", file=sys.stderr)


def log_evaluations(config: PretrainConfig, folder: Path, scalars: dict[str, float], pictures: Sequence[Path]) -> None:
    """Add `scalars` and `pictures` to the wandb run of the run in `folder`, where it has one."""
    if not logs_to_wandb(config) or not (folder / "wandb-id.txt").is_file():
        return
    logger = wandb_logger(config, folder)
    try:
        logger.experiment.summary.update(scalars)
        for path in pictures:
            logger.experiment.log({f"evaluations/{path.stem}": wandb.Image(str(path))})
    finally:
        wandb.finish()


def finished_neighbours(folder: Path) -> list[Run]:
    """Read the run in `folder` and the finished runs next to it whose values compare with its own: of the same data,
    tokens and validation.

    Folders that hold no run are skipped; those that cannot be read are named on stderr, others that differ are counted.
    """
    runs, others = [finished_run(folder.resolve())], list[list[str]]()
    for path in sorted(path for path in folder.resolve().parent.iterdir() if path != folder.resolve()):
        try:
            if not (path / "summary.json").exists():
                continue
            run = finished_run(path)
        except (RunError, OSError) as error:
            print(f"left out of the Pareto picture: {error}", file=sys.stderr)
            continue
        if found := differences([runs[0], run]):
            others.append(found)
        else:
            runs.append(run)
    if others:
        names = ", ".join(dict.fromkeys(name for found in others for name in found))
        print(f"left out of the Pareto picture: {counted(len(others), 'run')} with other {names}", file=sys.stderr)
    return runs


def wandb_table(rows: Sequence[Point]) -> wandb.Table:
    """Convert the points of a Pareto picture to a table with a row for each."""
    columns = ["name", "bytes", "value", "lowest", "highest", "runs", "frontier"]
    data = [[getattr(row, column) for column in columns] for row in rows]
    shown = {"bytes": "kv/bytes_stored", "value": METRICS["ppl"]}
    return wandb.Table(columns=[shown.get(column, column) for column in columns], data=data)
