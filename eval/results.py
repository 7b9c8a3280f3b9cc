"""Result files: one JSON envelope, {date, command, git, python, versions, hardware, ...payload}, and their readers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.files import write_json
from eval.environment import environment


def envelope() -> dict[str, Any]:
    """The environment record of this process, with the time (UTC) as `date`."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}


def write_result(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` in an envelope, atomically; a key of the payload overrides the envelope's. Makes the folder.

    Raises OSError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**envelope(), **payload})


@dataclass(frozen=True)
class TrainingSpeed:
    """Measured training throughput; in a result file, a record with `part` "train" and these keys.

    gpu                torch's name of the device
    tokens_per_second  of all `devices` together
    """

    path: Path
    arch: str
    size: str
    seq_len: int
    gpu: str
    tokens_per_second: float
    devices: int = 1
    activation_checkpointing: bool = False
    peak_memory_bytes: float | None = None


def training_speeds(folder: Path) -> Iterator[TrainingSpeed]:
    """The training speeds in the JSON files in and below `folder`; everything else there is skipped.

    A file is a list of records, or has them under `cases` as a list or as a mapping.
    """
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError:
            continue
        cases = content.get("cases") if isinstance(content, dict) else content
        records = cases.values() if isinstance(cases, dict) else cases
        for record in records if isinstance(records, Iterable) else []:
            if isinstance(record, dict) and (speed := _training_speed(path, record)):
                yield speed


def _training_speed(path: Path, record: dict[str, Any]) -> TrainingSpeed | None:
    keys = [field.name for field in fields(TrainingSpeed) if field.name != "path"]
    values = {key: record[key] for key in keys if record.get(key) is not None}
    numbers = [values.get("tokens_per_second"), values.get("devices", 1)]
    complete = {"arch", "size", "seq_len", "gpu"} <= values.keys()
    if record.get("part") != "train" or not complete or not all(isinstance(n, int | float) and n > 0 for n in numbers):
        return None
    return TrainingSpeed(path, **values)
