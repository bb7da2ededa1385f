"""The tables of the study, in Markdown, from the rows of its study.csv. Needs scipy.

Interquartile means with 95 % stratified bootstrap intervals, paired differences to GRPO, and the
probability of improvement over it (Agarwal et al. 2021, "Deep RL at the statistical precipice");
p-values of Wilcoxon's signed-rank test with Holm's correction.
"""

import numpy as np
from study_conditions import CONDITIONS, GROUPS

FRESH = 10  # the first seed of those kept for what was decided on the seeds before
TASKS = ("count", "compare", "add")
# wrong_reason: accuracy - grounded. corrupted, swapped: accuracy with the image painted over, with
# another question's image. curve: mean accuracy over training. seconds: of one core, evaluations
# included (extras/bench.py has the cost of a step).
OUTCOMES = ("accuracy", "grounded", "wrong_reason", "consistent", "perception", "corrupted")
OUTCOMES += ("swapped", "curve", "seconds")
# Means over the steps. w_...: weight of the role. The others are known of the recorded runs alone,
# whose commits measured them. r_...: correlation of a token's weight with the entropy of the policy
# there, and with being right (words for a color or a shape). at_limit: share of scored tokens that
# step 6 limited, before what a control made of the weights.
CREDIT = ("w_perception", "w_reasoning", "r_entropy", "r_right", "at_limit")
COMPARED = ("accuracy", "grounded", "wrong_reason", "curve")
TESTED = ("accuracy", "grounded")


# ---- statistics


def iqm(*strata, axis=-1):
    """Interquartile mean of all values, whatever stratum (task) they come from."""
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def has_spread(strata: list[np.ndarray]) -> bool:
    """Whether drawing the seeds again says anything."""
    return min(len(x) for x in strata) > 1 and any(np.ptp(x) > 0 for x in strata)


def bounds(strata: list[np.ndarray], statistic=iqm) -> tuple[float, float]:
    """The 95 % percentile interval; seeds are drawn again within each stratum."""
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    options = {"n_resamples": 2000, "method": "percentile", "rng": rng, "vectorized": True}
    low, high = bootstrap(strata, statistic, **options).confidence_interval
    return float(low), float(high)


def interval(strata: list[np.ndarray], statistic=iqm) -> str:
    """Statistic and its interval, as text."""
    value = float(statistic(*strata))
    if not has_spread(strata):
        return f"{value:.3f}"
    low, high = bounds(strata, statistic)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that a run of x is better than one of y, over all pairs of seeds."""
    x = x[..., :, None]
    y = y[..., None, :]
    return np.mean((x > y) + 0.5 * (x == y), axis=(-2, -1))


def chance(xs: list[np.ndarray], ys: list[np.ndarray]) -> str:
    """Probability of improvement, averaged over tasks, with its interval."""

    def statistic(*strata, axis=-1):
        pairs = zip(strata[: len(xs)], strata[len(xs) :], strict=True)
        return np.mean([improvement(x, y) for x, y in pairs], axis=0)

    return interval([*xs, *ys], statistic)


def signed_rank(differences: np.ndarray) -> float:
    """p of Wilcoxon's signed-rank test, two-sided."""
    from scipy.stats import wilcoxon

    if not differences.any():
        return 1.0
    return float(wilcoxon(differences).pvalue)


def holm(p: list[float]) -> np.ndarray:
    """Holm's step-down correction (1979): p-values that keep the family-wise error."""
    p = np.array(p)
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.maximum.accumulate(p[order] * factors).clip(max=1)
    return corrected[np.argsort(order)]


# ---- the rows of one part of the study


class Part:
    """Runs of one regime."""

    def __init__(self, rows: list[dict]):
        self.row = {(r["task"], r["condition"], r["seed"]): r for r in rows}
        self.tasks = sorted({r["task"] for r in rows}, key=TASKS.index)
        self.seeds = {}  # of each condition, by task
        for condition in CONDITIONS:
            self.seeds[condition] = [self.seeds_of(task, condition) for task in self.tasks]
        self.complete = [name for name in CONDITIONS if all(self.seeds[name])]  # on every task
        self.others = []  # those to be compared with GRPO
        if "grpo" in self.complete:
            self.others = [name for name in self.complete if name != "grpo"]

    def seeds_of(self, task: str, condition: str) -> list[int]:
        return sorted(seed for t, c, seed in self.row if (t, c) == (task, condition))

    def column(self, condition: str, name: str, seeds=None) -> list[np.ndarray]:
        """An outcome of a condition, by task, at all of its seeds or at these."""
        if seeds is None:
            seeds = self.seeds[condition]
        columns = []
        for task, which in zip(self.tasks, seeds, strict=True):
            values = [self.row[task, condition, seed][name] for seed in which]
            columns.append(np.array(values))
        return columns

    def shared(self, condition: str) -> list[list[int]]:
        """Of each task, the seeds that a condition has in common with GRPO."""
        both = []
        for ours, theirs in zip(self.seeds[condition], self.seeds["grpo"], strict=True):
            both.append(sorted(set(ours) & set(theirs)))
        return both

    def differences(self, condition: str, name: str) -> list[np.ndarray]:
        """An outcome of a condition minus GRPO's, paired by seed, by task."""
        xs = self.column(condition, name, self.shared(condition))
        ys = self.column("grpo", name, self.shared(condition))
        return [x - y for x, y in zip(xs, ys, strict=True)]

    def runs(self, condition: str) -> int:
        return sum(len(seeds) for seeds in self.seeds[condition])

    def table(self, head, cells: dict[str, list[str]]) -> list[str]:
        """One line a condition, each group under its title."""
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        group = ""
        for condition, row in cells.items():
            if CONDITIONS[condition].group != group:
                group = CONDITIONS[condition].group
                lines.append(f"| **{group}: {GROUPS[group]}** " + "| " * (len(head) - 1) + "|")
            lines.append(f"| {condition} | " + " | ".join(row) + " |")
        return [*lines, ""]


def outcomes(part: Part) -> list[str]:
    cells = {}
    for condition in part.complete:
        row = [str(part.runs(condition))]
        for name in OUTCOMES[:-1]:
            row.append(interval(part.column(condition, name)))
        row.append(f"{iqm(*part.column(condition, 'seconds')):.0f}")
        cells[condition] = row
    title = f"Interquartile mean over {', '.join(part.tasks)} [95 % interval]."
    return [title, "", *part.table(["condition", "runs", *OUTCOMES], cells)]


def differences(part: Part) -> list[str]:
    """To GRPO, on the seeds of both."""
    cells = {}
    p = {name: [] for name in TESTED}
    for condition in part.others:
        both = part.shared(condition)
        row = [str(sum(len(seeds) for seeds in both))]
        chances = []
        for name in COMPARED:
            apart = part.differences(condition, name)
            row.append(interval(apart))
            if name in TESTED:
                xs = part.column(condition, name, both)
                ys = part.column("grpo", name, both)
                chances.append(chance(xs, ys))
                p[name].append(signed_rank(np.concatenate(apart)))
        cells[condition] = row + chances
    for name in TESTED:
        for condition, value in zip(part.others, holm(p[name]), strict=True):
            cells[condition].append(f"{value:.2g}")
    title = (
        "Paired difference to GRPO, same task and seed. P: probability of a more accurate, and of"
    )
    title += " a more grounded run. p: Wilcoxon's signed-rank test, Holm's correction for the"
    title += f" {len(part.others)} conditions compared with GRPO, each outcome by itself."
    head = ["condition", "pairs", *COMPARED]
    head += [f"P {name}" for name in TESTED]
    head += [f"p {name}" for name in TESTED]
    return [title, "", *part.table(head, cells)]


def credit(part: Part) -> list[str]:
    cells = {}
    for condition in part.complete:
        row = []
        for name in CREDIT:
            value = np.mean(np.concatenate(part.column(condition, name)))
            row.append("" if np.isnan(value) else f"{value:.2f}")
        cells[condition] = [*row, CONDITIONS[condition].what]
    title = "What the weights go along with, mean over runs."
    return [title, "", *part.table(["condition", *CREDIT, "what it is"], cells)]


def by_task(part: Part) -> list[str]:
    names = ("start", *TESTED)
    head = ["condition", "seeds"]
    for task in part.tasks:
        head += [f"{task} {name}" for name in names]
    cells = {}
    for condition in part.complete:
        row = ["/".join(str(len(seeds)) for seeds in part.seeds[condition])]
        columns = [part.column(condition, name) for name in names]
        for values in zip(*columns, strict=True):  # of one task
            row += [f"{x.mean():.3f}" for x in values]
        cells[condition] = row
    return ["By task, mean over seeds.", "", *part.table(head, cells)]


def tables(rows: list[dict], regimes: dict) -> str:
    """A part for each regime, and one for the fresh seeds of it."""
    lines = []
    for name, regime in regimes.items():
        of_regime = [r for r in rows if r["regime"] == name]
        seen = [r for r in of_regime if r["seed"] < FRESH]
        fresh = [r for r in of_regime if r["seed"] >= FRESH]
        for some in (seen, fresh):
            if some:
                seeds = [r["seed"] for r in some]
                lines += [f"## {name}: {regime.what}; seeds {min(seeds)} to {max(seeds)}", ""]
                part = Part(some)
                lines += outcomes(part) + differences(part) + credit(part) + by_task(part)
    return "\n".join(lines[:-1])
