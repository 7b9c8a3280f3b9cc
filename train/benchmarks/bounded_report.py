"""Tables and pictures of train/benchmarks/bounded_study.py, from its result.json alone."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.units import bytes_text

Result = dict[str, Any]
# Colour of Okabe and Ito's palette, which colour-blind people tell apart, marker, and dashes.
STYLES = {
    "full": ("#000000", "s", (0, (1, 1))),
    "window": ("#E69F00", "o", "-"),
    "gated": ("#CC79A7", "v", (0, (3, 1, 1, 1))),
    "ring_slots": ("#0072B2", "D", "-"),
    "ring_router": ("#009E73", "^", (0, (5, 2))),
}


def report(result: Result, out: Path) -> str:
    """Write README.md and the pictures to `out`; return the tables."""
    tables = {}
    for task, (draw, table, picture) in SECTIONS.items():
        if task in result:
            runs = best_runs(result[task]["runs"].values(), task)
            draw(result[task], runs, out / picture)
            tables[task] = table(result[task], runs)
    (out / "README.md").write_text(readme(result, tables))
    return "\n\n".join(tables.values())


def best_runs(cells: Iterable[Result], task: str) -> dict[str, list[Result]]:
    """The runs of each rule at the learning rate with the best mean over seeds."""
    runs: dict[str, dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        runs[cell["rule"]][cell["lr"]].append(cell)
    best = {"lm": lambda group: -mean(group, "loss"), "recall": lambda group: mean(group, "accuracy")}[task]
    return {rule: max(rates.values(), key=best) for rule, rates in runs.items()}


def mean(runs: list[Result], key: str) -> float:
    return float(statistics.mean(run[key] for run in runs))


def mean_range(values: list[float], form: str) -> str:
    """`mean (lowest to highest)`."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def mean_nats(run: Result, length: str, first: int) -> float:
    """Mean loss at positions from `first` on."""
    buckets = [bucket for bucket in run["positions"][length] if bucket["first"] >= first]
    return float(sum(b["nats"] * b["targets"] for b in buckets) / sum(b["targets"] for b in buckets))


def accuracy(counts: Mapping[Any, Sequence[int]]) -> float:
    """Fraction of the questions answered right, over all distances."""
    return sum(right for right, _ in counts.values()) / sum(total for _, total in counts.values())


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(columns: list[str]) -> list[str]:
    return [row(columns), f"|---|{'---:|' * (len(columns) - 1)}"]


def retention_text(description: Result) -> str:
    if description["off_percent"] is None:
        return "every position"
    parts = {"positions": description["window"], "slots": description["slots"]}
    return " + ".join(f"{count} {what}" for what, count in parts.items() if count)


def costs(description: Result) -> list[str]:
    bounded = description["off_percent"] is not None
    state = f"{bytes_text(description['state_bytes'])} ({description['off_percent']:+.1f} %)" if bounded else "grows"
    return [retention_text(description), state, f"{description['params']:,}"]


def lm_table(result: Result, runs: dict[str, list[Result]]) -> str:
    window = result["settings"]["window"]
    lengths = list(next(iter(runs.values()))[0]["positions"])
    columns = ["rule", "keeps, each layer", "state", "parameters", "loss", f"from position {beyond_window(window)} on"]
    lines = head([*columns, *(f"at {length} tokens" for length in lengths[1:]), "lr"])
    for rule, group in runs.items():
        losses = [
            mean_range([run["loss"] for run in group], ".3f"),
            mean_range([mean_nats(r, lengths[0], beyond_window(window)) for r in group], ".3f"),
        ]
        losses += [mean_range([mean_nats(run, length, 0) for run in group], ".3f") for length in lengths[1:]]
        lines.append(row([f"`{rule}`", *costs(result["rules"][rule]), *losses, f"{group[0]['lr']:g}"]))
    return "\n".join(lines)


def beyond_window(window: int) -> int:
    """The first bucket whose positions all lie beyond the window."""
    return 1 << (window - 1).bit_length()


def recall_table(result: Result, runs: dict[str, list[Result]]) -> str:
    pairs = result["settings"]["recall_pairs"]
    lines = head(["rule", "keeps, each layer", "state", "parameters", *(f"{count} pairs" for count in pairs), "lr"])
    for rule, group in runs.items():
        shares = [mean_range([accuracy(run["counts"][str(count)]) for run in group], ".2f") for count in pairs]
        lines.append(row([f"`{rule}`", *costs(result["rules"][rule]), *shares, f"{group[0]['lr']:g}"]))
    return "\n".join(lines)


def clean_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)


def annotate_line(axes: Axes, x: float, text: str, height: float = 1.0) -> None:
    """Draw a vertical line at `x`, labelled at a fraction `height` of the axes."""
    axes.axvline(x, color="#999999", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        text,
        (x, height),
        (3, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="#666666",
    )


def plot_band(axes: Axes, rule: str, x: Sequence[float], seeds: list[list[float]], label: str = "") -> None:
    """Plot the mean over seeds, and a band from the lowest to the highest."""
    columns = list(zip(*seeds, strict=True))
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axes.fill_between(x, low, high, color=STYLES[rule][0], alpha=0.15, linewidth=0)
    plot_mean(axes, rule, x, seeds, label)


def plot_seeds(axes: Axes, rule: str, x: Sequence[float], seeds: list[list[float]], label: str = "") -> None:
    """Plot the mean over seeds, and each seed as a thin line, where seeds either learn the task or do not."""
    for values in seeds:
        axes.plot(x, values, color=STYLES[rule][0], linewidth=0.8, alpha=0.45, zorder=1)
    plot_mean(axes, rule, x, seeds, label)


def plot_mean(axes: Axes, rule: str, x: Sequence[float], seeds: list[list[float]], label: str) -> None:
    color, marker, dashes = STYLES[rule]
    means = [statistics.mean(column) for column in zip(*seeds, strict=True)]
    axes.plot(x, means, color=color, marker=marker, linestyle=dashes, markersize=4.5, linewidth=1.6, label=label)


def draw_positions(result: Result, runs: dict[str, list[Result]], path: Path) -> None:
    """Draw loss by position in the longest sequences (left), and its difference to the window's (right)."""
    window, trained = result["settings"]["window"], result["settings"]["lm_length"]
    longest = max(next(iter(runs.values()))[0]["positions"], key=int)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    ticks = [bucket["first"] for bucket in next(iter(runs.values()))[0]["positions"][longest] if bucket["first"]]
    for rule, group in runs.items():
        seeds = [[b["nats"] for b in run["positions"][longest] if b["first"]] for run in group]
        plot_band(left, rule, ticks, seeds, rule)
        if "window" in runs and rule != "window":
            base = {run["seed"]: [b["nats"] for b in run["positions"][longest] if b["first"]] for run in runs["window"]}
            gaps = [
                [loss - window_loss for loss, window_loss in zip(values, base[run["seed"]], strict=True)]
                for run, values in zip(group, seeds, strict=True)
                if run["seed"] in base
            ]
            plot_band(right, rule, ticks, gaps)
    right.axhline(0, color=STYLES["window"][0], linewidth=1.6)
    for axes in (left, right):
        clean_axes(axes)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick in (1, 4, 16, 64, 256, 1024, 4096)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("position in the sequence")
        annotate_line(axes, beyond_window(window), f"window\n{window}")
        annotate_line(axes, 1 << (trained - 1).bit_length(), f"trained\non {trained}")
    left.set_ylabel("validation loss, nats per token")
    right.set_ylabel("nats above the window of the same seed")
    figure.legend(loc="outside upper center", ncols=len(runs), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


def draw_recall(result: Result, runs: dict[str, list[Result]], path: Path) -> None:
    """Draw accuracy by number of pairs (left), and by distance in longer sequences without a gap (right)."""
    pairs, values = result["settings"]["recall_pairs"], result["settings"]["recall_keys"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained", width_ratios=(3, 2))
    ticks = list(range(len(pairs)))
    known = [1 / count for count in pairs]
    left.plot(ticks, known, color="#999999", linestyle=(0, (4, 3)), linewidth=1.1, zorder=0)
    left.annotate(
        "knows the values, not whose",
        (ticks[0], known[0]),
        (8, 4),
        textcoords="offset points",
        fontsize=8,
        color="#666666",
    )
    for axes in (left, right):
        axes.axhline(1 / values, color="#999999", linestyle=(0, (1, 2)), linewidth=1.1, zorder=0)
        clean_axes(axes)
        axes.set_ylim(-0.02, 1.05)
    left.annotate("chance", (ticks[0], 1 / values), (8, -10), textcoords="offset points", fontsize=8, color="#666666")
    for rule, group in runs.items():
        plot_seeds(left, rule, ticks, [[accuracy(run["counts"][str(count)]) for count in pairs] for run in group], rule)
        counts = [run["by_distance"] for run in group]
        distances = sorted(set.intersection(*(set(map(int, count)) for count in counts)))
        by_distance = [[count[str(d)][0] / count[str(d)][1] for d in distances] for count in counts]
        plot_seeds(right, rule, distances, by_distance)
    settings = result["settings"]
    for x, text in (
        (settings["window"], f"window\n{settings['window']}"),
        (settings["recall_length"], f"trained\non {settings['recall_length']}"),
    ):
        annotate_line(right, x, text, height=0.115)
    left.set_xticks(ticks, [str(count) for count in pairs])
    left.set_xlabel("pairs in the sequence")
    left.set_ylabel("share of questions answered right")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel(f"tokens from value to question, {pairs[-1]} pairs")
    figure.legend(loc="outside upper center", ncols=len(runs), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


SECTIONS = {"lm": (draw_positions, lm_table, "positions.png"), "recall": (draw_recall, recall_table, "recall.png")}


CAPTIONS = {
    "lm": """## Real text

{layers} layers of width {width}, {tokens:,} tokens of the Python standard library's source in sequences of {length}
(vocabulary {vocab}), AdamW, learning rate {lr}, {seeds} seed(s). Loss in nats per token on text not trained on: mean,
lowest and highest seed. The picture shows the longest sequences, most of which lie beyond what was trained on.""",
    "recall": """## Associative recall

{layers} layer(s) of width {width}, {steps:,} steps of {batch} sequences of {length} tokens, learning rate {lr},
{seeds} seed(s). A sequence has pairs of key and value, one token each, then questions; in half of the training and
in the table these come behind {gap} tokens of noise: as far as windows in all layers reach. {keys} keys and values.
Share of questions answered right; who remembers the values and not whose they are gets about 1 / pairs right, who
remembers nothing 1 / {keys}. Right in the picture: sequences four times as long, without noise, by distance.""",
}
NOTE = """
State is what one sequence keeps, however long, in a bf16 cache (`itemsize` in result.json): slots are fp32 there and
weigh two positions each. Percent: difference to the window's bytes. `full` keeps every position and is no competitor,
it shows what there is to gain. Rules differ in nothing but the layout, and by the parameters of the router. Bands and
brackets are the range of the seeds, no confidence interval; thin lines are single seeds.
"""


def readme(result: Result, tables: dict[str, str]) -> str:
    machine = result.get("environment", result)  # a file older than eval/results.py
    parts = [
        "# Bounded caches at equal state bytes",
        "Written by `python train/benchmarks/bounded_study.py` from `result.json`, which has all settings and runs. "
        f"{machine['hardware']}, Python {machine['python']}, torch {machine['versions']['torch']}; "
        f"commit of each run: {', '.join(commits(result))}.",
        NOTE.strip(),
    ]
    for task, table in tables.items():
        parts += [caption(result[task], task), table, f"![{task}]({SECTIONS[task][2]})", verdict(result[task], task)]
    return "\n\n".join(parts) + "\n"


def caption(part: Result, task: str) -> str:
    known = {key.removeprefix(f"{task}_"): value for key, value in part["settings"].items()}
    runs = part["runs"].values()
    rates, seeds = sorted({run["lr"] for run in runs}), {run["seed"] for run in runs}
    best = " (each rule at the best for it)" if len(rates) > 1 else ""
    known |= {"lr": ", ".join(f"{rate:g}" for rate in rates) + best, "seeds": len(seeds)}
    if task == "recall":
        known["gap"] = known["layers"] * (known["window"] - 1)
    return CAPTIONS[task].format(**known)


def verdict(part: Result, task: str) -> str:
    """Rank the bounded rules and say whether the first beats the second in every seed."""
    runs = best_runs(part["runs"].values(), task)
    window, pairs = part["settings"]["window"], part["settings"].get("recall_pairs")
    trained = str(part["settings"].get("lm_length"))

    def score(run: Result) -> float:
        """Higher is better."""
        return (
            -mean_nats(run, trained, beyond_window(window))
            if task == "lm"
            else mean([{"x": accuracy(run["counts"][str(n)])} for n in pairs], "x")
        )

    scores = {rule: [score(run) for run in group] for rule, group in runs.items() if rule != "full"}
    order = sorted(scores, key=lambda rule: -statistics.mean(scores[rule]))
    what = f"loss from position {beyond_window(window)} on" if task == "lm" else "mean accuracy"
    listed = ", ".join(f"`{rule}` {abs(statistics.mean(scores[rule])):.3f}" for rule in order)
    text = f"Bounded rules by {what}, best first: {listed}."
    if len(order) > 1:
        apart = min(scores[order[0]]) > max(scores[order[1]])
        text += (
            f" The first is {'better in every seed than' if apart else 'not apart, seeds overlap, from'} the second."
        )
    if task == "lm" and {"full", "window"} <= set(runs):
        more = statistics.mean(scores["window"]) - statistics.mean(score(run) for run in runs["full"])
        if more > 0:
            text += (
                f" `full` is {more:.3f} nats above the window there: trained this little, models make nothing yet of "
                "what lies behind a window, and the order tells how fast rules learn what is near, not what they keep."
            )
        else:
            text += f" `full` is {-more:.3f} nats below the window there: so much a longer memory could gain."
    return text


def commits(result: Result) -> list[str]:
    return sorted({str(run["git"]) for task in SECTIONS if task in result for run in result[task]["runs"].values()})
