"""Loggers of a run, and the Pareto picture that compares it with its neighbours when it ends."""

import os
import sys
import uuid
from collections.abc import Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from eval.pareto import METRICS, points, write
from eval.runs import Point, Run, RunError, finished_run
from train.run import launched_rank
from train.schema import PretrainConfig


def loggers(config: PretrainConfig, folder: Path) -> list[Logger]:
    """Build the loggers: CSV always, in a new subfolder each time the run is started; wandb if it is switched on."""
    starts = len(list((folder / "metrics").glob("*"))) if config.resume else 0
    result: list[Logger] = [CSVLogger(folder, name="metrics", version=str(starts), flush_logs_every_n_steps=1)]
    if config.logger.wandb and os.environ.get("WANDB_MODE") != "disabled" and launched_rank() == 0:
        result.append(wandb_logger(config, folder))
    return result


def wandb_logger(config: PretrainConfig, folder: Path) -> WandbLogger:
    """Start a wandb run; offline without a key, and, with a message on stderr, where the server cannot be reached."""
    identity = folder / "wandb-id.txt"  # a resumed run continues the same curves
    if not identity.exists():
        folder.mkdir(parents=True, exist_ok=True)
        identity.write_text(uuid.uuid4().hex[:12])

    def start(offline: bool) -> WandbLogger:
        logger = WandbLogger(
            name=folder.name,
            id=identity.read_text(),
            resume="allow",
            group=config.name,
            project=config.logger.project,
            save_dir=folder,
            offline=offline,
            settings=wandb.Settings(init_timeout=30, silent=offline),
        )
        logger.experiment  # noqa: B018  the run starts when it is first looked at
        return logger

    if os.environ.get("WANDB_MODE", "online") != "online" or not wandb_key():
        return start(offline=True)
    try:
        return start(offline=False)
    except wandb.errors.CommError as error:
        print(f"wandb cannot be reached ({error}); logging offline, `wandb sync` sends it later", file=sys.stderr)
        wandb.teardown()  # forgets the run that did not start
        os.environ["WANDB_MODE"] = "offline"
        return start(offline=True)


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


def record(folder: Path, scalars: dict[str, float], itemsize: int, context: int, loggers: Sequence[Logger]) -> None:
    """Write the Pareto picture of a finished run and its neighbours, and log it to wandb; add `scalars` to the summary.

    They are plain scalars there, so wandb's scatter panel can draw the curve across runs.
    """
    runs = finished_neighbours(folder)
    rows = points(runs, context, "ppl", itemsize)
    picture = write(rows, context, "ppl", folder / "pareto")[0]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(scalars)
            logger.experiment.log({"pareto/picture": wandb.Image(str(picture)), "pareto/table": wandb_table(rows)})


def finished_neighbours(folder: Path) -> list[Run]:
    """Read the run in `folder` and the finished runs next to it; anything else there is skipped."""
    runs = []
    for path in sorted(folder.resolve().parent.iterdir()):
        try:
            runs.append(finished_run(path))
        except RunError:
            continue
    return runs


def wandb_table(rows: Sequence[Point]) -> wandb.Table:
    """Convert the points of a Pareto picture to a table with a row for each."""
    columns = ["name", "bytes", "value", "lowest", "highest", "runs", "frontier"]
    data = [[getattr(row, column) for column in columns] for row in rows]
    shown = {"bytes": "kv/bytes_stored", "value": METRICS["ppl"]}
    return wandb.Table(columns=[shown.get(column, column) for column in columns], data=data)
