"""Learning curves of runs, by matplotlib. Runs of different seeds share a curve and a band."""

import io
import json
import math
import re

from pictures import Figure, matplotlib  # its settings; it says so where matplotlib is missing

EVALS = ("accuracy", "grounded", "wrong reason", "perception", "consistent")
STEPS = ("reward", "w_perception", "w_reasoning", "entropy", "length", "grad_norm")
# The colors of Okabe and Ito, which the color-blind can tell apart; dashes do without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
DASHES = ("-", "--", ":", "-.", (0, (1, 4)), (0, (9, 3)))
SHOWN = ("accuracy", "grounded", "wrong reason")  # in the picture of a README


def label_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each condition under its label.

    The label is the name of the folders without the seed, and the options that tell runs of one
    name apart.
    """
    stems = [re.sub(r"-seed\d+(-\d+)?$", "", run["name"]) for run in runs]
    options = []
    for run in runs:
        kept = {k: v for k, v in run["args"].items() if k not in ("seed", "argv", "out")}
        options.append(kept)
    labelled = {}
    for run, stem, mine in zip(runs, stems, options, strict=True):
        namesakes = [o for o, other in zip(options, stems, strict=True) if other == stem]
        label = stem
        for name, value in mine.items():
            values = {json.dumps(o.get(name)) for o in namesakes}
            if len(values) > 1:
                label += f", {name.replace('_', ' ')} {value}"
        labelled.setdefault(label, []).append(run)
    return labelled


def value_of(record: dict, name: str) -> float | None:
    """The metric in one record of a run; None where it has none."""
    value = None
    if name in STEPS:
        value = record.get(name)
    elif "eval" in record and name == "wrong reason":
        scores = record["eval"]
        if scores.get("grounded") is not None:
            value = scores["accuracy"] - scores["grounded"]
    elif "eval" in record:
        value = record["eval"].get(name)
    if value is None or not math.isfinite(value):
        return None
    return value


def curve(runs: list[dict], name: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) at the steps that all runs have; the band is 95 % of the error."""
    series = []
    for run in runs:
        values = {}
        for record in run["records"]:
            value = value_of(record, name)
            if value is not None:
                values[record["step"]] = value
        series.append(values)
    points = []
    for step in sorted(set.intersection(*map(set, series))):
        values = [one[step] for one in series]
        n = len(values)
        mean = sum(values) / n
        variance = sum((x - mean) ** 2 for x in values) / max(1, n - 1)
        error = 1.96 * math.sqrt(variance / n)
        points.append((step, mean, mean - error, mean + error))
    return points


def draw_curves(axes, labelled: dict[str, list[dict]], name: str) -> list:
    """A metric of every condition, as lines with bands; the lines. None where no run has it."""
    lines = []
    for i, (label, runs) in enumerate(labelled.items()):
        points = curve(runs, name)
        if points:
            steps, means, lows, highs = zip(*points, strict=True)
            color = COLORS[i % len(COLORS)]
            axes.fill_between(steps, lows, highs, color=color, alpha=0.12, lw=0)
            named = f"{label} ({count(runs)})"
            style = {"color": color, "ls": DASHES[i % len(DASHES)], "lw": 2}
            if len(steps) < 15:
                style["marker"] = "."
            lines += axes.plot(steps, means, label=named.replace("$", r"\$"), **style)
    axes.set_title(name, loc="left", fontweight="bold", fontsize=10.5)
    axes.grid(axis="y", color="#dddddd")
    return lines


def has_metric(runs: list[dict], name: str) -> bool:
    for run in runs:
        for record in run["records"]:
            if value_of(record, name) is not None:
                return True
    return False


def figure_of(labelled: dict[str, list[dict]], names, columns: int = 3) -> Figure:
    """The metrics that some run has, side by side, and the legend under them."""
    runs = sum(labelled.values(), [])
    names = [name for name in names if has_metric(runs, name)]
    rows = max(1, math.ceil(len(names) / columns))
    height = 2.5 * rows + 0.35 + 0.22 * math.ceil(len(labelled) / 2)
    figure = Figure((9.4, height), dpi=100, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    lines = {}
    for axes, name in zip(all_axes, names, strict=False):
        axes.set_xlabel("step")
        for line in draw_curves(axes, labelled, name):
            lines[line.get_label()] = line
    for axes in all_axes[len(names) :]:
        axes.remove()
    figure.legend(handles=lines.values(), loc="outside lower left", ncols=2, frameon=False)
    return figure


def count(runs: list[dict]) -> str:
    if len(runs) == 1:
        return "1 run"
    return f"{len(runs)} runs"


def svg(figure: Figure) -> str:
    """The figure as it stands in a page, its text as text; the same figure gives the same text."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "srpo"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
