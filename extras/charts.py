"""Learning curves of runs as SVG, for report.py. Runs of different seeds share a curve."""

import html
import json
import math
import re

EVALS = ("accuracy", "grounded", "wrong reason", "perception", "consistent")
STEPS = ("reward", "w_perception", "w_reasoning", "entropy", "length", "grad_norm")
# The colors of Okabe and Ito, which the color-blind can tell apart; dashes do without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 5", "12 4")
WIDTH, HEIGHT = 340, 220  # of a chart, and the margins inside it
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 24, 26
STYLE = "text{font:11px sans-serif;fill:#333}.t{font-weight:bold;font-size:13px}.g{stroke:#ddd}"


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


def axis(low: float, high: float) -> tuple[float, float, float]:
    """Round numbers around low to high: where the axis starts, where it ends, and its step.

    There are three to seven steps.
    """
    margin = (high - low) * 0.05
    if margin == 0:
        margin = max(abs(high), 1) * 0.05
    low = low - margin
    high = high + margin
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = max(power * k for k in (1, 2, 5) if (high - low) / (power * k) >= 3)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def chart(labelled: dict[str, list[dict]], name: str) -> str:
    """An SVG of one metric; empty when no run has it."""
    curves = [curve(runs, name) for runs in labelled.values()]
    points = [point for one in curves for point in one]
    if not points:
        return ""
    last_step = max(1, max(point[0] for point in points))
    low, high, between = axis(min(p[2] for p in points), max(p[3] for p in points))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + step / last_step * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)
        return x, y

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)}">']
    parts.append(f'<text x="{LEFT}" y="14" class="t">{html.escape(name)}</text>')
    for i in range(round((high - low) / between) + 1):
        value = low + i * between
        _, y = place(0, value)
        line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="g"/>'
        number = f"{round(value, 9):.4g}"
        parts.append(line)
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{number}</text>')
    for step in (0, last_step / 2, last_step):
        x, _ = place(step, low)
        number = f"{step:.4g}"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number}</text>')
    for i, one in enumerate(curves):
        if one:
            parts.append(drawn(one, i, place))
    return "".join(parts) + "</svg>"


def drawn(points: list[tuple], i: int, place) -> str:
    """The i-th curve: its band, and the mean as a line."""

    def path(pairs) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)

    means = [place(step, mean) for step, mean, _, _ in points]
    lower = [place(step, low) for step, _, low, _ in points]
    upper = [place(step, high) for step, _, _, high in points]
    upper.reverse()
    color = COLORS[i % len(COLORS)]
    band = f'<polygon points="{path(lower + upper)}" fill="{color}" opacity="0.15"/>'
    return f'{band}<polyline points="{path(means)}" fill="none" {stroke(i, 2)}/>'


def stroke(i: int, width: int) -> str:
    """What the i-th curve is drawn with."""
    color = COLORS[i % len(COLORS)]
    dash = DASHES[i % len(DASHES)]
    return f'stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}"'


def legend(labelled: dict[str, list[dict]]) -> str:
    """As a list in HTML."""
    rows = []
    for i, (label, runs) in enumerate(labelled.items()):
        line = f'<line x1="0" x2="34" y1="6" y2="6" {stroke(i, 3)}/>'
        key = f'<svg class="key" viewBox="0 0 34 12">{line}</svg>'
        rows.append(f"<li>{key} {html.escape(label)} ({count(runs)})</li>")
    return f'<ul class="legend">{"".join(rows)}</ul>'


def count(runs: list[dict]) -> str:
    if len(runs) == 1:
        return "1 run"
    return f"{len(runs)} runs"


def curves_svg(labelled: dict[str, list[dict]]) -> str:
    """Three charts side by side in one SVG file with its legend, on white: for a README."""
    charts = [chart(labelled, name) for name in ("accuracy", "grounded", "wrong reason")]
    charts = [svg for svg in charts if svg]
    width = 350 * len(charts)
    height = 230 + 18 * len(labelled)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for i, svg in enumerate(charts):
        place = f'x="{350 * i}" y="0" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(svg.replace("<svg ", f"<svg {place} ", 1))
    for i, (label, runs) in enumerate(labelled.items()):
        y = 238 + 18 * i
        parts.append(f'<line x1="42" x2="82" y1="{y}" y2="{y}" {stroke(i, 3)}/>')
        said = f"{html.escape(label)} ({count(runs)}; steps along the x axis)"
        parts.append(f'<text x="90" y="{y + 4}">{said}</text>')
    return "".join(parts) + "</svg>\n"
