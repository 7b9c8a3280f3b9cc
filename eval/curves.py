"""Training compared: `python eval/curves.py runs/* reference=mha-tiny`. Loss against tokens, seconds and FLOPs.

Folders are runs, or hold runs at any depth; runs that differ only in the seed become one curve, their mean. Prints what
each curve needs to reach the reference's final loss, and writes curves.png and curves.json. Unfinished runs are listed
and left out; with unfinished=true they are compared, too, at the tokens that all have reached.

The loss is the validation loss, interpolated linearly, if every run has four or more validations, else the smoothed
training loss. Learning rates fall towards the end of a run: a run planned to end at that loss may reach it earlier.
Seconds count only training: no validation, no checkpoints, and not the first step after a start, which compiles.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

import numpy as np
from rich.table import Table

from data.cli import UsageError, parse
from eval.console import PlainConsole, visible
from eval.histories import CLOCKS, Array, Curve, History, load_history
from eval.identity import PREDICTED, data_of, name_data
from eval.outcome import run_script
from eval.results import write_result
from eval.runs import (
    RunError,
    deciding_values,
    default_out,
    differing,
    folders_of,
    folders_of_notes,
    group_by_seed,
    look_for_runs,
    repeated_seeds,
    warn,
)
from eval.units import count_text

LOSSES = {"val": "validation loss", "train": "smoothed training loss"}
MIN_VALIDATIONS = 4  # to interpolate between them


@dataclass(frozen=True)
class CurvesConfig:
    """Options.

    reference   name of the run that the others are compared with; null: the first
    clock       wall, or cpu: CPU seconds of the process, for runs on a CPU only
    out         folder for the files; null: the folder of the runs, or the one that contains all of them
    unfinished  compare unfinished runs, too, as happens anyway if no run has ended
    """

    folders: tuple[str, ...] = ()
    reference: str | None = None
    clock: str = "wall"
    out: Path | None = None
    unfinished: bool = False


def find_curves(folders: Sequence[Path], clock: str, unfinished: bool = False) -> list[Curve]:
    """One curve for each set of runs in and below `folders` that differ in nothing but the seed.

    Names on stderr the runs that make no curve, and those that have not ended: they are left out unless `unfinished`,
    or if none has ended. Raises RunError if no run is left.
    """
    found = look_for_runs(folders, finished=False)
    histories, unusable = [], found.unreadable
    for run in found.runs:
        try:
            histories.append(load_history(run, clock))
        except RunError as error:
            unusable.append(str(error))
    if not histories:
        raise RunError("\n".join(unusable))
    warn(unusable)
    ended = [history for history in histories if history.ended]
    open_runs = [history for history in histories if not history.ended]
    if open_runs:
        left_out = bool(ended) and not unfinished
        fate = "left out; unfinished=true compares all" if left_out else "losses are taken where all have arrived"
        warn([f"not ended, {fate}: {', '.join(map(progress, open_runs))}"])
        histories = ended if left_out else histories
    return [Curve(name, tuple(group)) for name, group in group_by_seed(histories, identity).items()]


def progress(history: History) -> str:
    """A run that has not ended, and how far it is."""
    done, planned = (count_text(step * history.step_tokens) for step in (history.steps[-1], history.last_step))
    return f"{history.run.folder} ({done} of {planned} tokens)"


def identity(history: History) -> list[Any]:
    """All that decides losses and speed of a run but its seed, the name first."""
    config = history.run.config
    result = deciding_values(config, "result") | {"data": data_of(history.run)}
    return [config["name"], *result.values(), *deciding_values(config, "speed").values()]


def differences(curves: Sequence[Curve]) -> list[str]:
    """Settings that are not the same in all runs and should be, for losses and times to be compared."""
    histories = [history for curve in curves for history in curve.runs]
    configs = [history.run.config for history in histories]
    found = differing(
        {
            "data": [data_of(history.run) for history in histories],
            "tokens": [config["tokens"] for config in configs],
            "batch_size": [config["batch_size"] for config in configs],
            "size.seq_len": [config["size"]["seq_len"] for config in configs],
            PREDICTED: [history.num_unpredicted for history in histories],
            "hardware": [history.hardware for history in histories],
            "how they were executed (trainer)": [deciding_values(config, "speed") for config in configs],
        }
    )
    params = [history.params for history in histories]
    return found + ["parameters, by more than 2 %"] * (max(params) > 1.02 * min(params))


def first_crossing(steps: Array, losses: Array, target: float) -> float | None:
    """The step at which the loss first reaches `target`, linear between measurements; None if it never does.

    The first measurement if that is already below `target`: the losses before it are unknown.
    """
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    after = int(below[0])
    if after == 0:
        return float(steps[0])
    before = after - 1
    fraction = (losses[before] - target) / (losses[before] - losses[after])
    return float(steps[before] + fraction * (steps[after] - steps[before]))


def compare(curves: Sequence[Curve], reference: Curve, clock: str) -> dict[str, Any]:
    """Losses of all curves, and the costs of each up to the reference's final loss, absolute and relative to its own.

    Losses are final, or, if a run has not ended, those at the tokens that all curves have reached; `loss_tokens` says
    where. So is the target if the reference has not ended. `seconds_by_seed` has the ratio of seconds for each seed
    that both have, up to the final loss of the reference's run of that seed.
    """
    series = "val" if min(len(curve.mean("val").steps) for curve in curves) >= MIN_VALIDATIONS else "train"
    common = None
    if not all(curve.ended for curve in curves):
        common = min(float(curve.mean(series).steps[-1]) * curve.step_tokens for curve in curves)
    target_tokens, target, *_ = loss_at(reference, series, None if reference.ended else common)
    whole = reference.axes(target_tokens / reference.step_tokens)
    reference_runs = {history.seed: history for history in reference.runs}
    rows = []
    for curve in curves:
        steps, losses, _, _ = curve.mean(series)
        step = first_crossing(steps, losses, target)
        at_target = None if step is None else {key: float(value) for key, value in curve.axes(step).items()}
        relative = None if at_target is None else {key: value / float(whole[key]) for key, value in at_target.items()}
        end = curve.axes(float(steps[-1]))
        pairs = [(history, reference_runs[history.seed]) for history in curve.runs if history.seed in reference_runs]
        loss_tokens, loss, lowest, highest = loss_at(curve, series, common)
        rows.append(
            {
                "name": curve.name,
                "seeds": sorted(history.seed for history in curve.runs),
                "params": curve.runs[0].params,
                "flops_per_token": curve.runs[0].flops_per_token,
                "ended": curve.ended,
                "tokens": end["tokens"],
                "seconds": float(end["seconds"]),
                "tokens_per_second": float(end["tokens"] / end["seconds"]),
                "loss_tokens": loss_tokens,
                "loss": loss,
                "lowest": lowest,
                "highest": highest,
                "to_target": at_target,
                "relative": relative,
                "seconds_by_seed": [_ratio(*pair, series) for pair in pairs] if curve is not reference else [],
                "series": {key: _points(curve, key) for key in ("val", "train")},
            }
        )
    result = {"reference": reference.name, "loss": LOSSES[series], "which": series, "clock": clock, "target": target}
    return result | {"target_tokens": target_tokens, "final": common is None, "curves": rows}


class LossAt(NamedTuple):
    """A loss after `tokens`: the mean over seeds, the lowest and the highest."""

    tokens: float
    mean: float
    lowest: float
    highest: float


def loss_at(curve: Curve, series: str, tokens: float | None) -> LossAt:
    """The loss after so many tokens, linear between measurements; None: at the end."""
    steps, *losses = curve.mean(series)
    step = float(steps[-1]) if tokens is None else tokens / curve.step_tokens
    mean, lowest, highest = (float(np.interp(step, steps, values)) for values in losses)
    return LossAt(step * curve.step_tokens, mean, lowest, highest)


def _ratio(history: History, reference: History, series: str) -> float | None:
    """Seconds of `history` up to the final loss of `reference`, over the seconds of `reference`."""
    steps, losses = reference.losses(series)
    step = first_crossing(*history.losses(series), float(losses[-1]))
    return None if step is None else float(history.seconds_at(step) / reference.seconds_at(steps[-1]))


def _points(curve: Curve, series: str) -> dict[str, list[float]]:
    steps, losses, lowest, highest = curve.mean(series)
    values = {**curve.axes(steps), "loss": losses, "lowest": lowest, "highest": highest}
    return {key: [float(f"{value:.6g}") for value in of] for key, of in values.items()}


def table(result: dict[str, Any]) -> Table:
    at = count_text(result["target_tokens"])
    shown = Table(
        title=f"To the {result['loss']} of {result['reference']} at {at} tokens, {result['target']:.4f}",
        title_justify="left",
    )
    shown.add_column("run", style="bold", overflow="fold")
    unit = "CPU s" if result["clock"] == "cpu" else "s"
    loss = "final loss" if result["final"] else "loss"
    columns = ("runs", "params", "FLOPs/token", f"tokens/{unit}", loss, "at tokens", "spread")
    for column in (*columns, "tokens to it", "FLOPs to it", f"{unit} to it", "of reference", "by seed"):
        shown.add_column(column, justify="right")
    for row in result["curves"]:
        at, ratios = row["to_target"], row["seconds_by_seed"]
        reached = ["not reached" if row["ended"] else "not yet", "", "", ""]
        if at is not None:
            reached = [count_text(at["tokens"]), f"{at['flops']:.3g}", f"{at['seconds']:,.0f}"]
            reached.append(f"{row['relative']['seconds']:.2f}")
        shown.add_row(
            row["name"],
            str(len(row["seeds"])),
            count_text(row["params"]),
            count_text(row["flops_per_token"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['loss']:.4f}",
            count_text(row["loss_tokens"]),
            f"{row['highest'] - row['lowest']:.4f}" if len(row["seeds"]) > 1 else "-",
            *reached,
            ", ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios) if len(ratios) > 1 else "",
        )
    return shown


def main(arguments: Sequence[str]) -> None:
    options = parse(CurvesConfig, arguments, positional="folders")
    if options.clock not in CLOCKS:
        raise UsageError(f"clock is {options.clock}; choose {', '.join(CLOCKS)}")
    folders = folders_of(options.folders)
    curves = find_curves(folders, options.clock, options.unfinished)
    by_name = {curve.name: curve for curve in curves}
    if options.reference and options.reference not in by_name:
        raise UsageError(f"reference is {options.reference}; the runs are {', '.join(by_name)}")
    reference = by_name[options.reference or curves[0].name]
    curves = [reference, *(curve for curve in curves if curve is not reference)]
    result = compare(curves, reference, options.clock)
    console, groups = PlainConsole(), {curve.name: curve.runs for curve in curves}
    console.print(table(result))
    for line in folders_of_notes(groups, lambda of: str(of.run.config["name"]), lambda of: of.run.folder):
        console.print(line)
    warn(repeated_seeds(groups, lambda of: of.seed, lambda of: of.run.folder))
    if others := differences(curves):
        named = name_data([history.run for curve in curves for history in curve.runs])
        warn([f"the runs differ in {', '.join(others)}: judge by that", *named])
    out = options.out or default_out(folders)
    try:
        write(curves, result, out)
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror}); give another folder with out=") from error


def write(curves: Sequence[Curve], result: dict[str, Any], out: Path) -> None:
    """curves.png and curves.json in `out`. Raises OSError if that cannot be written."""
    from eval.plots.curves import draw_curves

    out.mkdir(parents=True, exist_ok=True)
    write_result(out / "curves.json", result)
    draw_curves(curves, result, out / "curves.png")
    for name in ("curves.png", "curves.json"):
        print(visible(str(out / name)))


if __name__ == "__main__":
    run_script(main)
