"""Loss by position, within the trained length and beyond it: `python train/benchmarks/positions.py RUN ...`.

Reads the newest checkpoint and the validation text of each run, prints a table, writes positions.json into the run.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from rich.table import Table

from data.batches import EvalBatches
from data.cli import UsageError, parse
from data.mixture import weights_of
from eval.console import PlainConsole
from eval.outcome import run_script
from eval.positions import Bucket, loss_by_position
from eval.results import write_result
from eval.runs import folders_of
from eval.scoring import validation_windows
from eval.tasks.task import Prepared
from train.datamodule import open_data
from train.loading import load
from train.schema import sequence_format


@dataclass(frozen=True)
class PositionsConfig:
    """Options.

    lengths  tokens of the sequences, with commas; empty: those of training, twice and four times as many
    tokens   validation tokens of each length, of a mixture in proportion to its weights
    """

    runs: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    tokens: int = 65536


def measure(run: Path, lengths: list[int], tokens: int) -> dict[int, list[Bucket]]:
    """Loss by position at each length. Raises as `load`, and UsageError for a checkpoint that belongs to no run."""
    loaded = load(run)
    model, config = loaded.model, loaded.config
    if config is None:
        raise UsageError(f"{run}: no run there; give the folder of a run")
    folders = open_data(config.data)
    weights = list(weights_of(config.data.mix).values()) if config.data.mix else [1.0]
    loaded.check_data(folders, weights)
    prepared = Prepared(folders, weights, tokens)
    form = replace(sequence_format(model.plan, config.data), block_padding=0)
    found = {}
    for length in lengths or [times * config.size.seq_len for times in (1, 2, 4)]:
        windows = validation_windows(prepared, length, tokens // length)
        found[length] = loss_by_position(model, EvalBatches(windows, 1, sequence_format=form))
    return found


def table(name: str, found: dict[int, list[Bucket]]) -> Table:
    """A row for each bucket, a column for each length."""
    result = Table(
        "positions", title=f"{name}: validation loss in nats per token (standard error)", title_justify="left"
    )
    for length in found:
        result.add_column(f"{length:,} tokens", justify="right")
    rows: dict[tuple[int, int], dict[int, str]] = {}
    for length, buckets in found.items():
        for bucket in buckets:
            error = "-" if bucket.error is None else f"{bucket.error:.3f}"
            rows.setdefault((bucket.first, bucket.end), {})[length] = f"{bucket.nats:.4f} ({error})"
    for (first, end), cells in sorted(rows.items()):
        result.add_row(f"{first:,} to {end - 1:,}", *(cells.get(length, "") for length in found))
    return result


def main(arguments: list[str]) -> None:
    options = parse(PositionsConfig, arguments, positional="runs")
    for key, values in (("lengths", options.lengths), ("tokens", [options.tokens])):
        if any(value < 1 for value in values):
            raise UsageError(f"{key} is {getattr(options, key)}; write whole numbers of at least 1")
    console = PlainConsole()
    for run in folders_of(options.runs):
        found = measure(run, list(options.lengths), options.tokens)
        lengths = {str(length): [asdict(bucket) for bucket in buckets] for length, buckets in found.items()}
        write_result(run / "positions.json", {"lengths": lengths})
        console.print(table(run.name, found))


if __name__ == "__main__":
    run_script(main)
