"""Learning curves of runs, by matplotlib. Runs of different seeds share a curve and a band.

Where GRPO runs are among them, differences to GRPO are drawn too, paired by task and seed.
"""

import io
import json
import math
import re

from pictures import Figure, matplotlib  # its settings; it says so where matplotlib is missing

EVALS = ("accuracy", "grounded", "wrong reason", "perception", "consistent")
STEPS = ("reward", "w_perception", "w_reasoning", "entropy", "length", "grad_norm")
# Quantiles of Student's distribution for intervals at 95 %, for 1, 2, 3 ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)
STUDENT += (2.13, 2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05)
# The colors of Okabe and Ito, which the color-blind can tell apart; dashes do without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
DASHES = ("-", "--", ":", "-.", (0, (1, 4)), (0, (9, 3)))
NOT_A_CONDITION = ("seed", "argv", "out", "cwd", "resume")  # options that runs of one may differ in
SHOWN = ("accuracy", "grounded", "wrong reason")  # in the picture of a README, and as differences


def label_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each condition under its label.

    The label is the name of the folders without the seed, and the options that tell runs of one
    name apart.
    """
    stems = [re.sub(r"-seed\d+(-\d+)?$", "", run["name"]) for run in runs]
    options = []
    for run in runs:
        kept = {k: v for k, v in run["args"].items() if k not in NOT_A_CONDITION}
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


def values_of(run: dict, name: str) -> dict[int, float]:
    """The metric of a run, by the steps that have it."""
    values = {}
    for record in run["records"]:
        value = value_of(record, name)
        if value is not None:
            values[record["step"]] = value
    return values


def mean_curve(series: list[dict], errors: float) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) at the steps that all series have; so many standard errors wide."""
    points = []
    for step in sorted(set.intersection(*map(set, series))):
        values = [one[step] for one in series]
        n = len(values)
        mean = sum(values) / n
        variance = sum((x - mean) ** 2 for x in values) / max(1, n - 1)
        error = errors * math.sqrt(variance / n)
        points.append((step, mean, mean - error, mean + error))
    return points


def curve(runs: list[dict], name: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) at the steps that all runs have; the band is a standard error."""
    return mean_curve([values_of(run, name) for run in runs], 1.0)


# ---- paired differences to GRPO


def pair_of(run: dict) -> tuple:
    """What two runs share that are compared: they start alike and see the same questions."""
    return run["args"].get("task"), run["args"].get("data"), run["args"].get("seed")


def baselines(labelled: dict[str, list[dict]]) -> dict[tuple, dict]:
    """The GRPO run of each pair; none at all where two of them would do for one."""
    found = {}
    for runs in labelled.values():
        for run in runs:
            if run["args"].get("algo") == "grpo":
                if pair_of(run) in found:
                    return {}
                found[pair_of(run)] = run
    return found


def differences(runs: list[dict], baseline: dict[tuple, dict], name: str) -> list[tuple]:
    """(step, mean, low, high) of runs minus the GRPO run of the same task and seed.

    The interval is Student's, at 95 %. Without two pairs there is none, and no difference.
    """
    series = []
    for run in runs:
        other = baseline.get(pair_of(run))
        if other is None or other is run:
            continue
        theirs = values_of(other, name)
        apart = {}
        for step, value in values_of(run, name).items():
            if step in theirs:
                apart[step] = value - theirs[step]
        series.append(apart)
    if len(series) < 2:
        return []
    quantile = STUDENT[min(len(series) - 1, len(STUDENT)) - 1]
    return mean_curve(series, quantile)


def draw_differences(axes, labelled: dict[str, list[dict]], baseline, name: str) -> None:
    """Of every condition, its differences with their intervals, side by side at each step."""
    axes.axhline(0, color="black", lw=0.8)
    for i, (label, runs) in enumerate(labelled.items()):
        points = differences(runs, baseline, name)
        if points:
            steps, means, lows, highs = zip(*points, strict=True)
            width = (steps[-1] - steps[0]) / max(1, len(steps) - 1)
            places = [step + 0.09 * width * (i - len(labelled) / 2) for step in steps]
            axes.vlines(places, lows, highs, color=COLORS[i % len(COLORS)], lw=2, label=label)
            axes.plot(places, means, lw=1, **look(i), marker="o", ms=3.5)
    axes.set_title(f"{name} minus GRPO's", loc="left", fontweight="bold", fontsize=10.5)
    axes.grid(axis="y", color="#dddddd")
    axes.set_xlabel("step")


# ---- figures


def look(i: int) -> dict:
    """Color and dashes of the i-th condition."""
    return {"color": COLORS[i % len(COLORS)], "ls": DASHES[i % len(DASHES)]}


def short_names(labels) -> dict[str, str]:
    """Labels without the words in front that all of them share, as the task in "count-grpo"."""
    words = [label.split("-") for label in labels]
    shared = 0
    while len(words) > 1 and all(len(some) > shared + 1 for some in words):
        if len({some[shared] for some in words}) > 1:
            break
        shared += 1
    return {"-".join(some): "-".join(some[shared:]) for some in words}


def draw_curves(axes, labelled: dict[str, list[dict]], name: str, bands: bool = True) -> list:
    """A metric of every condition, as lines with bands; the lines. None where no run has it."""
    lines = []
    shown = short_names(labelled)
    for i, (label, runs) in enumerate(labelled.items()):
        points = curve(runs, name)
        if points:
            steps, means, lows, highs = zip(*points, strict=True)
            if bands:
                axes.fill_between(steps, lows, highs, color=look(i)["color"], alpha=0.12, lw=0)
            named = f"{shown[label]} ({count(runs)})"
            style = {**look(i), "lw": 2}
            if len(steps) < 15:
                style["marker"] = "."
            lines += axes.plot(steps, means, label=named.replace("$", r"\$"), **style)
    axes.set_title(name, loc="left", fontweight="bold", fontsize=10.5)
    axes.set_xlabel("step")
    axes.grid(axis="y", color="#dddddd")
    return lines


def has_metric(runs: list[dict], name: str) -> bool:
    for run in runs:
        for record in run["records"]:
            if value_of(record, name) is not None:
                return True
    return False


def has_differences(labelled: dict[str, list[dict]], baseline, name: str) -> bool:
    return any(differences(runs, baseline, name) for runs in labelled.values())


def figure_of(labelled: dict[str, list[dict]], names, columns: int = 3) -> Figure:
    """The metrics that some run has, side by side, and the legend under them.

    Where there are GRPO runs of the same tasks and seeds, the paired differences to them stand in
    a row below, and the means of the same metrics have no bands: those would say less.
    """
    runs = sum(labelled.values(), [])
    names = [name for name in names if has_metric(runs, name)]
    baseline = baselines(labelled)
    compared = []
    for name in SHOWN:
        if name in names and has_differences(labelled, baseline, name):
            compared.append(name)
    rows_of_means = math.ceil(len(names) / columns)
    rows = max(1, rows_of_means + math.ceil(len(compared) / columns))
    height = 2.5 * rows + 0.35 + 0.22 * math.ceil(len(labelled) / 2)
    figure = Figure((9.4, height), dpi=100, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    lines = {}
    for name in names:
        axes = all_axes.pop(0)
        for line in draw_curves(axes, labelled, name, bands=name not in compared):
            lines[line.get_label()] = line
    for _ in range(rows_of_means * columns - len(names)):
        all_axes.pop(0).remove()
    for name in compared:
        draw_differences(all_axes.pop(0), labelled, baseline, name)
    for axes in all_axes:
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
