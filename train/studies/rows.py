"""Rows of a study: one line of JSON per run that has ended, with all that a report needs of it.

study, stage, arch, lr, seed  which run; `stage` is `rate` (the search of the learning rate) or `main`
key             digest of what decides the result but the seed: rows of one key are repetitions
config          what decides the result, of the data only how it is read; `speed`: precision, compilation, devices
match           the width that makes figures equal, and how equal they are; None: no match was asked for
data            digest and name of the text, in a mixture with its weight
loss, ppl, bpb  of validation, null where the run diverged; `curve`, `val_curve`: [tokens, loss]
diverged        why the run could not go on; null: it has ended
kv              bytes of a cache of bf16 at the length of training and each of CONTEXTS: [stored, read per token]
tasks           figures, options, rows and digest of the tasks of evaluation, the digest of all that decides the figures
jobs            runs of the study that this machine had at a time; null: a machine of SLURM, which may have had others
commit, ...     commit (`+`: changed files), date, versions, hardware, threads of the run's last start;
                `tokens_per_second`, the median of training
"""

import fcntl
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arch.config import to_dict
from arch.footprint import kv_bytes, num_params, train_flops_per_token
from eval.checks import is_finite
from eval.evaluations import FOLDER, KEY, file_name
from eval.identity import READING, Identity
from eval.runs import Run, deciding_values, finished_run
from eval.study_rows import parse_row
from train.run import load_config
from train.schema import num_steps
from train.studies.cells import Cell

CONTEXTS = (2048, 8192, 32768, 131072)
POINTS = 60  # of a curve
# Of a task's result; what else is in its file can be had from the run.
TASK_KEYS = ("figures", "options", "rows", "context", "digest")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add `row` to the file `path`, flushed to the disk, while no other study does.

    A last line that was cut off goes; a row that lacks no more than the end of its line gets that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0)
        if last := file.read().rpartition(b"\n")[2]:
            try:
                parse_row(last)
                file.write(b"\n")
            except ValueError:
                file.truncate(file.tell() - len(last))
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def row_of(cell: Cell, folder: Path, jobs: int | None, diverged: str | None = None) -> dict[str, Any]:
    """The row of the run of `cell` in `folder`, which has ended, or has `diverged` for that reason and has no result.

    Raises RunError if it cannot be read.
    """
    run, config = Run(folder) if diverged else finished_run(folder), load_config(folder)
    val, evaluated = ({}, {}) if diverged else (run.summary["val"], run.summary.get(KEY, {}))
    plan, start, seq_len = run.plan, run.starts[-1], config.size.seq_len
    tied, values = Identity.load(folder), to_dict(config)
    decides = deciding_values(values, "result")
    decides["data"] = {key: decides["data"][key] for key in READING}
    commits = list(dict.fromkeys(str(each.get("git")) for each in run.starts))
    speeds = [float(row["train/tokens_per_second"]) for row in run.metrics if row.get("train/tokens_per_second")]
    return {
        "study": cell.study,
        "stage": cell.stage,
        "arch": cell.arch,
        "lr": cell.lr,
        "seed": cell.seed,
        "key": cell.key,
        "config": decides,
        "speed": deciding_values(values, "speed"),
        "match": None if cell.match is None else {**asdict(cell.match), "off": cell.match.off},
        "data": [] if tied is None else _data(tied),
        "params": num_params(config.model, plan),
        "train_flops_per_token": train_flops_per_token(config.model, plan),
        "kv": {str(context): list(_bytes(plan, context)) for context in sorted({seq_len, *CONTEXTS})},
        "tokens": num_steps(config) * config.batch_size * seq_len,
        "seq_len": seq_len,
        **{key: value if is_finite(value := val.get(key)) else None for key in ("loss", "ppl", "bpb")},
        "diverged": diverged,
        "val_tokens": config.data.val_tokens,
        "curve": curve(run, "train/loss"),
        "val_curve": curve(run, "val/loss"),
        "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "tasks": {task: _task(folder, task) for task in evaluated},
        "commit": ", ".join(commits),
        "date": start.get("date"),
        "hardware": start.get("hardware"),
        "threads": start.get("threads"),
        "jobs": jobs,
        "python": start.get("python"),
        "versions": start.get("versions"),
        "starts": len(run.starts),
    }


def _data(tied: Identity) -> list[dict[str, Any]]:
    """Name and digest of each prepared folder, and in a mixture its weight."""
    total = sum(of.weight for of in tied.data)
    weights = [{"weight": of.weight / total} if len(tied.data) > 1 else {} for of in tied.data]
    return [{"name": of.name, "digest": of.digest} | weight for of, weight in zip(tied.data, weights, strict=True)]


def _bytes(plan: Any, context: int) -> Sequence[float]:
    found = kv_bytes(plan, context)
    return found.stored, found.read


def _task(folder: Path, task: str) -> dict[str, Any]:
    found = json.loads((folder / FOLDER / f"{file_name(task)}.json").read_text())
    return {key: found.get(key) for key in TASK_KEYS}


def curve(run: Run, name: str) -> list[list[float]]:
    """[tokens, loss] of a run where it is finite, the means of at most POINTS even parts."""
    step_tokens = int(run.config["batch_size"]) * int(run.config["size"]["seq_len"])
    points = [(int(row["step"]) * step_tokens, float(row[name])) for row in run.metrics if row.get(name)]
    points = [point for point in points if math.isfinite(point[1])]
    width = -(-len(points) // POINTS) or 1
    parts = [points[first : first + width] for first in range(0, len(points), width)]
    return [[float(part[-1][0]), round(statistics.fmean(loss for _, loss in part), 5)] for part in parts]
