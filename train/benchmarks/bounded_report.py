"""The tables and pictures of train/benchmarks/bounded_study.py, made of its result.json alone."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.units import bytes_text

Result = dict[str, Any]
# Of Okabe and Ito's palette, which colour-blind people tell apart; each with a marker and dashes of its own.
LOOK = {
    "full": ("#000000", "s", (0, (1, 1))),
    "window": ("#E69F00", "o", "-"),
    "gated": ("#CC79A7", "v", (0, (3, 1, 1, 1))),
    "ring_slots": ("#0072B2", "D", "-"),
    "ring_router": ("#009E73", "^", (0, (5, 2))),
}


def report(result: Result, out: Path) -> str:
    """Writes README.md and the pictures; returns the tables."""
    tables = {}
    for task, (draw, table, picture) in PARTS.items():
        if task in result:
            runs = chosen(result[task]["runs"].values(), task)
            draw(result[task], runs, out / picture)
            tables[task] = table(result[task], runs)
    (out / "README.md").write_text(readme(result, tables))
    return "\n\n".join(tables.values())


def chosen(cells: Iterable[Result], task: str) -> dict[str, list[Result]]:
    """Of each rule, the runs at the learning rate whose mean over the seeds is best."""
    runs: dict[str, dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        runs[cell["rule"]][cell["lr"]].append(cell)
    best = {"lm": lambda group: -mean(group, "loss"), "recall": lambda group: mean(group, "accuracy")}[task]
    return {rule: max(rates.values(), key=best) for rule, rates in runs.items()}


def mean(runs: list[Result], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def band(values: list[float], form: str) -> str:
    """`mean (lowest to highest)`."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def nats(run: Result, length: str, first: int) -> float:
    """Mean loss of the positions from `first` on."""
    late = [bucket for bucket in run["positions"][length] if bucket["first"] >= first]
    return sum(b["nats"] * b["targets"] for b in late) / sum(b["targets"] for b in late)


def accuracy(run: Result, pairs: int) -> float:
    counts = run["counts"][str(pairs)].values()
    return sum(right for right, _ in counts) / sum(total for _, total in counts)


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(columns: list[str]) -> list[str]:
    return [row(columns), f"|---|{'---:|' * (len(columns) - 1)}"]


def held(about: Result) -> str:
    if about["off_percent"] is None:
        return "every position"
    parts = {"positions": about["window"], "slots": about["slots"]}
    return " + ".join(f"{count} {what}" for what, count in parts.items() if count)


def costs(about: Result) -> list[str]:
    bounded = about["off_percent"] is not None
    state = f"{bytes_text(about['state_bytes'])} ({about['off_percent']:+.1f} %)" if bounded else "grows"
    return [held(about), state, f"{about['params']:,}"]


def lm_table(result: Result, runs: dict[str, list[Result]]) -> str:
    window = result["settings"]["window"]
    lengths = list(next(iter(runs.values()))[0]["positions"])
    columns = ["rule", "keeps, each layer", "state", "parameters", "loss", f"from position {late(window)} on"]
    lines = head([*columns, *(f"at {length} tokens" for length in lengths[1:]), "lr"])
    for rule, group in runs.items():
        losses = [
            band([run["loss"] for run in group], ".3f"),
            band([nats(r, lengths[0], late(window)) for r in group], ".3f"),
        ]
        losses += [band([nats(run, length, 0) for run in group], ".3f") for length in lengths[1:]]
        lines.append(row([f"`{rule}`", *costs(result["rules"][rule]), *losses, f"{group[0]['lr']:g}"]))
    return "\n".join(lines)


def late(window: int) -> int:
    """The first bucket of positions that lie behind a window."""
    return 1 << (window - 1).bit_length()


def recall_table(result: Result, runs: dict[str, list[Result]]) -> str:
    pairs = result["settings"]["recall_pairs"]
    lines = head(["rule", "keeps, each layer", "state", "parameters", *(f"{count} pairs" for count in pairs), "lr"])
    for rule, group in runs.items():
        shares = [band([accuracy(run, count) for run in group], ".2f") for count in pairs]
        lines.append(row([f"`{rule}`", *costs(result["rules"][rule]), *shares, f"{group[0]['lr']:g}"]))
    return "\n".join(lines)


def plain(axes: plt.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)


def mark(axes: plt.Axes, place: float, words: str, height: float = 1.0) -> None:
    """A vertical line with its meaning beside it, at a share of its height."""
    axes.axvline(place, color="#999999", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        words,
        (place, height),
        (3, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="#666666",
    )


def curve(axes: plt.Axes, rule: str, x: list[float], seeds: list[list[float]], label: str = "") -> None:
    """The mean over the seeds, and a band from the lowest to the highest."""
    columns = list(zip(*seeds, strict=True))
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axes.fill_between(x, low, high, color=LOOK[rule][0], alpha=0.15, linewidth=0)
    middle(axes, rule, x, seeds, label)


def curves(axes: plt.Axes, rule: str, x: list[float], seeds: list[list[float]], label: str = "") -> None:
    """The mean over the seeds, and each seed as a thin line: some learn a task and others do not, nothing between."""
    for values in seeds:
        axes.plot(x, values, color=LOOK[rule][0], linewidth=0.8, alpha=0.45, zorder=1)
    middle(axes, rule, x, seeds, label)


def middle(axes: plt.Axes, rule: str, x: list[float], seeds: list[list[float]], label: str) -> None:
    color, marker, dashes = LOOK[rule]
    means = [statistics.mean(column) for column in zip(*seeds, strict=True)]
    axes.plot(x, means, color=color, marker=marker, linestyle=dashes, markersize=4.5, linewidth=1.6, label=label)


def draw_positions(result: Result, runs: dict[str, list[Result]], path: Path) -> None:
    """Left: loss at the longest sequences, by position. Right: how much of it the window's is above or below."""
    window, trained = result["settings"]["window"], result["settings"]["lm_length"]
    longest = max(next(iter(runs.values()))[0]["positions"], key=int)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    ticks = [bucket["first"] for bucket in next(iter(runs.values()))[0]["positions"][longest] if bucket["first"]]
    for rule, group in runs.items():
        seeds = [[b["nats"] for b in run["positions"][longest] if b["first"]] for run in group]
        curve(left, rule, ticks, seeds, rule)
        if "window" in runs and rule != "window":
            base = {run["seed"]: [b["nats"] for b in run["positions"][longest] if b["first"]] for run in runs["window"]}
            gaps = [
                [mine - theirs for mine, theirs in zip(values, base[run["seed"]], strict=True)]
                for run, values in zip(group, seeds, strict=True)
                if run["seed"] in base
            ]
            curve(right, rule, ticks, gaps)
    right.axhline(0, color=LOOK["window"][0], linewidth=1.6)
    for axes in (left, right):
        plain(axes)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick in (1, 4, 16, 64, 256, 1024, 4096)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("position in the sequence")
        mark(axes, late(window), f"window\n{window}")
        mark(axes, 1 << (trained - 1).bit_length(), f"trained\non {trained}")
    left.set_ylabel("validation loss, nats per token")
    right.set_ylabel("nats above the window of the same seed")
    figure.legend(loc="outside upper center", ncols=len(runs), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


def draw_recall(result: Result, runs: dict[str, list[Result]], path: Path) -> None:
    """Left: accuracy by number of pairs. Right: by distance, with the most pairs, in longer sequences without a gap."""
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
        plain(axes)
        axes.set_ylim(-0.02, 1.05)
    left.annotate("chance", (ticks[0], 1 / values), (8, -10), textcoords="offset points", fontsize=8, color="#666666")
    for rule, group in runs.items():
        curves(left, rule, ticks, [[accuracy(run, count) for count in pairs] for run in group], rule)
        counts = [run["by_distance"] for run in group]
        distances = sorted(set.intersection(*(set(map(int, found)) for found in counts)))
        by_distance = [[found[str(d)][0] / found[str(d)][1] for d in distances] for found in counts]
        curves(right, rule, distances, by_distance)
    settings = result["settings"]
    for place, words in (
        (settings["window"], f"window\n{settings['window']}"),
        (settings["recall_length"], f"trained\non {settings['recall_length']}"),
    ):
        mark(right, place, words, height=0.115)
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


PARTS = {"lm": (draw_positions, lm_table, "positions.png"), "recall": (draw_recall, recall_table, "recall.png")}


WORDS = {
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
    parts = [
        "# Bounded caches at equal state bytes",
        "Written by `python train/benchmarks/bounded_study.py` from `result.json`, which has all settings and runs. "
        f"{result['environment']['hardware']}, Python {result['environment']['python']}, torch "
        f"{result['environment']['versions']['torch']}; commit of each run: {', '.join(commits(result))}.",
        NOTE.strip(),
    ]
    for task, table in tables.items():
        parts += [words(result[task], task), table, f"![{task}]({PARTS[task][2]})", verdict(result[task], task)]
    return "\n\n".join(parts) + "\n"


def words(part: Result, task: str) -> str:
    known = {key.removeprefix(f"{task}_"): value for key, value in part["settings"].items()}
    runs = part["runs"].values()
    rates, seeds = sorted({run["lr"] for run in runs}), {run["seed"] for run in runs}
    best = " (each rule at the best for it)" if len(rates) > 1 else ""
    known |= {"lr": ", ".join(f"{rate:g}" for rate in rates) + best, "seeds": len(seeds)}
    if task == "recall":
        known["gap"] = known["layers"] * (known["window"] - 1)
    return WORDS[task].format(**known)


def verdict(part: Result, task: str) -> str:
    """The bounded rules in order, and whether the first is apart from the second in every seed."""
    runs = chosen(part["runs"].values(), task)
    window, pairs = part["settings"]["window"], part["settings"].get("recall_pairs")
    trained = str(part["settings"].get("lm_length"))

    def score(run: Result) -> float:
        """Higher is better."""
        return (
            -nats(run, trained, late(window)) if task == "lm" else mean([{"x": accuracy(run, n)} for n in pairs], "x")
        )

    scores = {rule: [score(run) for run in group] for rule, group in runs.items() if rule != "full"}
    order = sorted(scores, key=lambda rule: -statistics.mean(scores[rule]))
    what = f"loss from position {late(window)} on" if task == "lm" else "mean accuracy"
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
    return sorted({str(run["git"]) for task in PARTS if task in result for run in result[task]["runs"].values()})
