"""Where a run is logged, and where it stands at its end among the runs beside it."""

import os
import sys
import uuid
from collections.abc import Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from eval.pareto import METRICS, points, write
from eval.runs import Point, Run, RunError, finished_run
from train.schema import PretrainConfig


def loggers(config: PretrainConfig, folder: Path) -> list[Logger]:
    """CSV always, in a new subfolder each time the run is started; wandb if asked for."""
    starts = len(list((folder / "metrics").glob("*"))) if config.resume else 0
    result: list[Logger] = [CSVLogger(folder, name="metrics", version=str(starts), flush_logs_every_n_steps=1)]
    if config.logger.wandb and os.environ.get("WANDB_MODE") != "disabled" and rank_zero_only.rank == 0:
        result.append(wandb_logger(config, folder))
    return result


def wandb_logger(config: PretrainConfig, folder: Path) -> WandbLogger:
    """A started wandb run; offline without a key, and, said once, where the server cannot be reached."""
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
    """Whether this machine has a key for wandb's server: WANDB_BASE_URL's, or one of the public ones."""
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
    """Put a finished run's `scalars` into its wandb summary, and a Pareto picture of it and its neighbours beside it.

    The summary holds them as plain scalars, so that wandb's scatter panel can draw the curve across runs.
    """
    runs = finished_neighbours(folder)
    rows = points(runs, context, "ppl", itemsize)
    picture = write(rows, context, "ppl", folder / "pareto")[0]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(scalars)
            logger.experiment.log({"pareto/picture": wandb.Image(str(picture)), "pareto/table": wandb_table(rows)})


def finished_neighbours(folder: Path) -> list[Run]:
    """The run in `folder` and the finished runs next to it; anything else there is skipped."""
    runs = []
    for path in sorted(folder.resolve().parent.iterdir()):
        try:
            runs.append(finished_run(path))
        except RunError:
            continue
    return runs


def wandb_table(rows: Sequence[Point]) -> wandb.Table:
    columns = ["name", "bytes", "value", "lowest", "highest", "runs", "frontier"]
    data = [[getattr(row, column) for column in columns] for row in rows]
    shown = {"bytes": "kv/bytes_stored", "value": METRICS["ppl"]}
    return wandb.Table(columns=[shown.get(column, column) for column in columns], data=data)
