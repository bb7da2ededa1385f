"""Does role-aware credit help? GRPO against SRPO, its readings and controls, on tasks with a ground truth.

    python extras/study.py --quick               2 seeds, one task, four conditions: under ten minutes
    python extras/study.py                       all conditions; stop it at will, it goes on where it stopped
    python extras/study.py --regime sentences    the main ones where the answer may turn; or: slow
    python extras/study.py --first-seed 10 --seeds 10 --other-seeds 10 --conditions grpo,srpo,entropy
    python extras/study.py --table               only the tables, from what has been run

Needs `pip install scipy`. Runs are paired: for one task and seed, every condition starts from the same model
and sees the same questions in the same order. `readings.CONDITIONS` has the conditions. Results go to
DIR/study.csv, one row a run, and DIR/study.md; the runs themselves are kept beside them (`extras/report.py`
draws them). The tables give interquartile means with 95 % stratified bootstrap intervals, paired differences
to GRPO and the probability of improvement over it (Agarwal et al. 2021, "Deep RL at the statistical
precipice"). Seeds from 10 on are fresh: kept for what was decided on the seeds before, and tabled apart.
"""

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import credit  # noqa: E402
import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from corrupt import CELLS, corrupt  # noqa: E402
from readings import CONDITIONS, GROUPS, Recorder  # noqa: E402
from srpo import parse_response  # noqa: E402

MAIN = ("grpo", "srpo", "range-0.5-2", "shuffled")
MAIN_SEEDS, OTHER_SEEDS, FRESH = 10, 5, 10  # FRESH: the first such seed
TASKS = ("count", "compare", "add")
OPTIONS = "--steps 40 --prompts 16 --lr 1e-4 --warmup-noise 0.25 --eval-every 10 --eval-size 256"
OPTIONS += " --save-every 0"
FINAL = 512  # held-out examples of the last evaluation
# wrong_reason: accuracy - grounded. corrupted, swapped: accuracy with the image painted over, with another
# question's image. curve: mean accuracy over training. seconds: of one core, evaluations included
# (extras/bench.py has the cost of a step).
OUTCOMES = ("accuracy", "grounded", "wrong_reason", "consistent", "perception", "corrupted", "swapped")
OUTCOMES += ("curve", "seconds")
# Means over the steps. w_...: weight of the role. r_...: correlation of a token's weight with the entropy of
# pi there, and with being right (words for a color or a shape). at_limit: share of scored tokens that step 6
# limited, before what a control made of the weights.
CREDIT = ("w_perception", "w_reasoning", "r_entropy", "r_right", "at_limit")


# ------------------------------------------------------------------------- regimes, where the answer may turn


OPENERS = "well here now also then clearly again there look indeed next see".split()
FILLER = [*OPENERS, "has", "a", "the", "10", "11", "12"]  # what the tiny model's vocabulary lacks


def in_sentences(example: data.Example, noise: float, rng: np.random.Generator) -> str:
    """A demonstration whose facts stand in sentences, like " look indeed a1 has the red circle.": as many
    words of filler, drawn at random, as there are words of facts."""
    text = data.demonstrate(example, noise, rng)
    start, end = parse_response(text).perception
    sentences, said = "", iter(text[start:end].split())
    for cell, color, shape in zip(said, said, said, strict=True):
        copula = rng.choice(["is", "has"]), rng.choice(["a", "the"])
        words = [*rng.choice(OPENERS, rng.integers(3)), cell, *copula, color, shape]
        sentences += " " + " ".join(words) + str(rng.choice([",", "."]))
    return text[:start] + sentences + text[end:]


def install_sentences() -> None:
    """Into what makes demonstrations, scenes and the tiny model's vocabulary, for this process."""
    train.demonstrate = in_sentences
    train.DrawnTask = partial(data.DrawnTask, objects=(4, 6))
    model.CELLS = (*CELLS, *FILLER)


class Regime(NamedTuple):
    what: str
    options: str = ""  # of train.py, besides OPTIONS
    tasks: tuple[str, ...] = TASKS
    conditions: tuple[str, ...] = ("grpo", "srpo", "range-0.5-2", "entropy")
    install: Callable[[], None] = lambda: None


REGIMES = {
    "default": Regime("three or four objects, facts alone", conditions=tuple(CONDITIONS)),
    "sentences": Regime(
        "four to six objects, questions about two kinds, half of the perception's words filler, weaker start",
        "--max-new-tokens 112 --warmup-steps 600", ("add",), install=install_sentences,
    ),
    "slow": Regime("a third of the learning rate, twice the steps", "--lr 3.3e-5 --steps 80 --eval-every 20"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- the runs


def trained(folder: Path, options: str) -> None:
    """A new run of train.py in `folder`, without a word."""
    shutil.rmtree(folder, ignore_errors=True)
    argv, said = [*f"--device cpu {options} --out".split(), str(folder)], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(argv)
    if status >= 128:  # a signal: this process is to end
        sys.exit(status)
    if status:
        raise RuntimeError(f"python train.py {' '.join(argv)}: {said.getvalue().strip().splitlines()[-1:]}")


def run(job: tuple[str, str, int, str, Path, str]) -> dict:
    """One training run and its last evaluations, as a row of the table."""
    task, condition, seed, regime, out, options = job
    folder = out / "-".join([task, condition, *[regime] * (regime != "default"), f"seed{seed}"])
    steps = train.build_parser().parse_args(options.split()).steps or train.TINY["steps"]
    start = time.process_time()  # of one thread: what it would take on an idle core
    with Recorder(condition, steps, seed).installed() as recorder:
        trained(folder, f"--task {task} --seed {seed} {options} {CONDITIONS[condition].options}")
    seconds = time.process_time() - start
    args, policy, step = credit.finished(folder)
    examples = credit.task_of(args).eval_set(FINAL)
    paint = {"kind": "patch", "patch": policy.patch, "p": 1.0}
    blind = [replace(e, images=(corrupt(e.images[0], seed=0, **paint),)) for e in examples]
    other = [replace(e, images=f.images) for e, f in zip(examples, [*examples[1:], examples[0]], strict=True)]
    measure = partial(train.evaluate, policy, judge=credit.judge_of(args), args=args, step=step)
    final, unseen, swapped = (measure(x)["eval"] for x in (examples, blind, other))
    records = train.Run(folder).log()
    curve = [r["eval"]["accuracy"] for r in records if "eval" in r]
    area = (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)
    row = {"task": task, "condition": condition, "seed": seed, "regime": regime}
    row |= {"commit": commit(), "options": options}
    row |= {"start": curve[0], "accuracy": final["accuracy"], "grounded": final["grounded"]}
    row["wrong_reason"] = final["accuracy"] - final["grounded"]
    row |= {name: final[name] for name in ("consistent", "perception")}
    row |= {"corrupted": unseen["accuracy"], "swapped": swapped["accuracy"]}
    row |= {"curve": area, "seconds": seconds}
    for name in ("w_perception", "w_reasoning"):
        row[name] = np.mean([r[name] for r in records if r.get(name) is not None])
    return row | recorder.averages()


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def begin(cache: str, regime: str) -> None:
    """A worker: two runs beside each other are faster than one on two cores."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.environ["XDG_CACHE_HOME"] = cache  # warmed-up models belong to the study, and to the regime
    REGIMES[regime].install()


def warm(job: tuple[str, int, Path, str]) -> None:
    """The warmed-up model of a task and seed, made before the runs that share it."""
    task, seed, out, options = job
    folder = out / f"warm-{task}-seed{seed}"
    trained(folder, f"--task {task} --seed {seed} {options} --steps 0 --eval-size 1")
    shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------- run and record


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = ("task", "condition", "regime", "commit", "options")
    kind = lambda k: str if k in text else int if k == "seed" else float  # noqa: E731
    before = {"regime": "default", **dict.fromkeys(CREDIT, np.nan)}  # of a file from before it had these
    return [before | {k: kind(k)(v) for k, v in row.items()} for row in rows]


def append(path: Path, row: dict) -> None:
    """One line at a time: what is recorded stays recorded."""
    new = not path.exists()
    if not new and path.read_text(encoding="utf-8").split("\n", 1)[0].strip() != ",".join(row):
        raise ValueError(f"{path} has other columns; name another --out")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def planned(conditions, tasks, seeds: int, others: int, first: int = 0) -> list[tuple[str, str, int]]:
    """(task, condition, seed): the main conditions first, then the others, each seed by seed, so that what is
    there is balanced, wherever it stops."""
    jobs = [(task, c, first + i) for i in range(max(seeds, others)) for c in conditions for task in tasks]
    main = [job for job in jobs if job[1] in MAIN and job[2] < first + seeds]
    return main + [job for job in jobs if job[1] not in MAIN and job[2] < first + others]


def study(jobs, out: Path, regime: str, options: str, workers: int) -> None:
    """Run what `DIR/study.csv` lacks."""
    done = {(r["task"], r["condition"], r["seed"]) for r in read(out / "study.csv") if r["regime"] == regime}
    todo = [job for job in jobs if job not in done]
    if not todo:
        return
    cache = str(out / ("cache" if regime == "default" else f"cache-{regime}"))
    with multiprocessing.get_context("spawn").Pool(workers, begin, [cache, regime]) as pool:
        starts = sorted({(seed, task) for task, _, seed in todo})
        print(f"{len(starts)} warmed-up models, {len(todo)} runs, {workers} at a time", flush=True)
        pool.map(warm, [(task, seed, out, options) for seed, task in starts], chunksize=1)
        start = time.perf_counter()
        rows = pool.imap_unordered(run, [(*job, regime, out, options) for job in todo])
        for i, row in enumerate(rows, 1):
            append(out / "study.csv", row)
            left = (time.perf_counter() - start) / i * (len(todo) - i) / 60
            said = f"[{i}/{len(todo)}] {row['task']} {row['condition']} seed {row['seed']}: accuracy "
            said += f"{row['start']:.2f} -> {row['accuracy']:.2f}, grounded {row['grounded']:.2f}"
            print(f"{said}; {left:.0f} minutes left", flush=True)
        pool.close()
        pool.join()


# ------------------------------------------------------------------------------------------------- the tables


def iqm(*strata, axis=-1):
    """Interquartile mean of all values, whatever stratum (task) they come from."""
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def interval(strata: list[np.ndarray], statistic=iqm) -> str:
    """Statistic and its 95 % percentile interval; seeds are drawn again within each stratum."""
    from scipy.stats import bootstrap

    value = float(statistic(*strata))
    if min(map(len, strata)) < 2 or all(np.ptp(x) == 0 for x in strata):
        return f"{value:.3f}"
    options = {"n_resamples": 2000, "method": "percentile", "rng": np.random.default_rng(0)}
    found = bootstrap(strata, statistic, vectorized=True, **options)
    low, high = found.confidence_interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that a run of x is better than one of y, over all pairs of seeds."""
    x, y = x[..., :, None], y[..., None, :]
    return np.mean((x > y) + 0.5 * (x == y), axis=(-2, -1))


def tables(rows: list[dict]) -> str:
    """Markdown, a part for each regime, and for the fresh seeds of it."""
    lines = []
    for regime, about in REGIMES.items():
        for fresh in (False, True):
            part = [r for r in rows if r["regime"] == regime and (r["seed"] >= FRESH) == fresh]
            if part:
                seeds = f"seeds {min(r['seed'] for r in part)} to {max(r['seed'] for r in part)}"
                lines += [f"## {regime}: {about.what}; {seeds}", "", *tables_of(part), ""]
    return "\n".join(lines[:-1])


def tables_of(rows: list[dict]) -> list[str]:
    """Outcomes of each condition over all tasks, then differences to GRPO on the seeds of both, then what the
    weights go along with, then the tasks; a condition is one line in each."""
    tasks = sorted({r["task"] for r in rows}, key=train.data.TASKS.index)
    value = {(r["task"], r["condition"], r["seed"]): r for r in rows}
    seeds = {c: [sorted(s for t, d, s in value if (t, d) == (task, c)) for task in tasks] for c in CONDITIONS}
    complete = [c for c in CONDITIONS if all(seeds[c])]
    others = [c for c in complete if c != "grpo" and "grpo" in complete]

    def column(condition: str, name: str, which: list[list[int]]) -> list[np.ndarray]:
        """An outcome of a condition, by task, at these seeds."""
        pairs = zip(tasks, which, strict=True)
        return [np.array([value[task, condition, seed][name] for seed in seeds]) for task, seeds in pairs]

    def table(head: str, names, cells: dict[str, list[str]]) -> list[str]:
        """One line a condition, each group under its title."""
        names, group = [*head.split(" | "), *names], ""
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for c, row in cells.items():
            if (new := CONDITIONS[c].group) != group:
                group = new
                lines.append(f"| **{group}: {GROUPS[group]}** " + "| " * (len(names) - 1) + "|")
            lines.append(f"| {c} | " + " | ".join(row) + " |")
        return [*lines, ""]

    cells = {}
    for c in complete:
        cells[c] = [f"{sum(map(len, seeds[c]))}"]
        cells[c] += [interval(column(c, name, seeds[c])) for name in OUTCOMES[:-1]]
        cells[c].append(f"{iqm(*column(c, 'seconds', seeds[c])):.0f}")
    lines = [f"Interquartile mean over {', '.join(tasks)} [95 % interval].", ""]
    lines += table("condition | runs", OUTCOMES, cells)

    compared, tested = ("accuracy", "grounded", "wrong_reason", "curve"), ("accuracy", "grounded")
    cells, p = {}, {name: [] for name in tested}
    for c in others:
        both = [sorted(set(a) & set(b)) for a, b in zip(seeds[c], seeds["grpo"], strict=True)]
        ours, theirs = ({name: column(x, name, both) for name in compared} for x in (c, "grpo"))
        pairs = {name: list(zip(ours[name], theirs[name], strict=True)) for name in compared}
        cells[c] = [f"{sum(map(len, both))}", *(interval([x - y for x, y in pairs[n]]) for n in compared)]
        cells[c] += [chance(ours[name], theirs[name]) for name in tested]
        for name in tested:
            p[name].append(signed_rank(np.concatenate([x - y for x, y in pairs[name]])))
    for found in map(holm, p.values()):
        for c, x in zip(others, found, strict=True):
            cells[c].append(f"{x:.2g}")
    told = "P: probability of a more accurate, and of a more grounded run. p: Wilcoxon's signed-rank test, "
    told += f"Holm's correction for the {len(others)} conditions compared with GRPO, each outcome by itself."
    lines += [f"Paired difference to GRPO, same task and seed. {told}", ""]
    names = [f"{kind} {name}" for kind in "Pp" for name in tested]
    lines += table("condition | pairs", (*compared, *names), cells)

    average = lambda c, name: np.mean(np.concatenate(column(c, name, seeds[c])))  # noqa: E731
    shown = lambda x: "" if np.isnan(x) else f"{x:.2f}"  # noqa: E731
    cells = {c: [*(shown(average(c, name)) for name in CREDIT), CONDITIONS[c].what] for c in complete}
    lines += ["What the weights go along with, mean over runs.", ""]
    lines += table("condition", (*CREDIT, "what it is"), cells)

    cells = {c: ["/".join(str(len(x)) for x in seeds[c])] for c in complete}
    for c in complete:
        by_task = zip(*(column(c, name, seeds[c]) for name in ("start", *tested)), strict=True)
        cells[c] += [f"{x.mean():.3f}" for values in by_task for x in values]
    names = [f"{task} {name}" for task in tasks for name in ("start", *tested)]
    lines += ["By task, mean over seeds.", "", *table("condition | seeds", names, cells)]
    return lines[:-1]


def signed_rank(differences: np.ndarray) -> float:
    """p of Wilcoxon's signed-rank test, two-sided."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(p: list[float]) -> np.ndarray:
    """Holm's step-down correction (1979): p-values that keep the family-wise error."""
    p, order = np.array(p), np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)]


def chance(xs: list[np.ndarray], ys: list[np.ndarray]) -> str:
    """Probability of improvement, averaged over tasks, with its interval."""

    def statistic(*strata, axis=-1):
        pairs = zip(strata[: len(xs)], strata[len(xs) :], strict=True)
        return np.mean([improvement(x, y) for x, y in pairs], axis=0)

    return interval([*xs, *ys], statistic)


def main() -> None:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=form)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"2 seeds of the first task, {', '.join(MAIN)}")
    regimes = "; ".join(f"{name}: {regime.what}" for name, regime in REGIMES.items())
    add("--regime", default="default", choices=REGIMES, help=regimes)
    add("--conditions", help="of these, by default those of the regime: " + ", ".join(CONDITIONS))
    add("--tasks", help="of count, compare, add; by default those of the regime")
    add("--seeds", type=int, default=MAIN_SEEDS, help=f"of {', '.join(MAIN)}")
    add("--other-seeds", type=int, default=OTHER_SEEDS, help="of the other conditions")
    add("--first-seed", type=int, default=0, help=f"the first of them; from {FRESH} on, they are fresh")
    add("--options", help=f"of train.py, for every run, in the place of: {OPTIONS}, and those of the regime")
    add("--out", default="out/study", help="where study.csv and the runs go")
    add("--workers", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    add("--table", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    try:
        import scipy  # noqa: F401
    except ImportError:
        parser.error("the tables need scipy: pip install scipy")
    regime = REGIMES[args.regime]
    conditions = args.conditions.split(",") if args.conditions else regime.conditions
    tasks = args.tasks.split(",") if args.tasks else regime.tasks
    if unknown := (set(conditions) - set(CONDITIONS)) | (set(tasks) - set(train.data.TASKS)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    jobs = planned(conditions, tasks, args.seeds, args.other_seeds, args.first_seed)
    if args.quick:
        jobs = planned(MAIN, tasks[:1], 2, 2)
    own = f"{regime.options} {args.options}" if args.options else f"{OPTIONS} {regime.options}"
    out, options = Path(args.out), own.strip()
    out.mkdir(parents=True, exist_ok=True)
    there = {r["options"] for r in read(out / "study.csv") if r["regime"] == args.regime}
    if others := there - {options}:
        parser.error(f"{out} holds runs with other --options ({others.pop()}); name another --out")
    train.build_parser().parse_args(options.split())  # a mistake ends here, and not in every run
    if not args.table:
        study(jobs, out, args.regime, options, args.workers)
    rows = read(out / "study.csv")
    if not rows:
        parser.error(f"{out / 'study.csv'} has no runs yet; leave out --table")
    text = tables(rows)
    (out / "study.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
