"""Does role-aware credit help? GRPO, SRPO and its open choices, on tasks whose evidence has a ground truth.

    python extras/study.py --quick      2 seeds, one task, three conditions: under ten minutes on two cores
    python extras/study.py              everything; stop it at will, it goes on where it stopped
    python extras/study.py --table      only the tables, from what has been run

Needs `pip install scipy`. Runs are paired: for one task and seed, every condition starts from the same model
and sees the same questions in the same order. Results go to DIR/study.csv, one row a run, and DIR/study.md;
the runs themselves are kept beside them (`extras/report.py` draws them). The tables give interquartile means
with 95 % stratified bootstrap intervals, paired differences to GRPO and the probability of improvement over
it (Agarwal et al. 2021, "Deep RL at the statistical precipice").
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
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import credit  # noqa: E402
import train  # noqa: E402
from corrupt import corrupt  # noqa: E402
from srpo import CHOICES, Role, token_weights  # noqa: E402


def alternatives() -> dict[str, str]:
    """Condition -> options of train.py, one for every alternative of every open choice."""
    spelled = lambda x: f"{x:g}" if isinstance(x, float) else str(x).lower()  # noqa: E731
    found = [f"{name}={spelled(x)}" for name, choice in CHOICES.items() for x in choice[3]]
    limits = [text for text in found if text.startswith(("w_min", "w_max"))]
    found = {text: f"--choice {text}" for text in found if text not in limits}
    return found | {"softmax": " ".join(f"--choice {text}" for text in limits)}  # both limits out of the way


# Those without options have a function in WEIGHTS below, but for srpo itself.
CONDITIONS = {"grpo": "--algo grpo", "srpo": "", "shuffled": "", "perception-only": "", "reasoning-only": ""}
CONDITIONS |= alternatives()
# These were added after the first results, to find out why.
CONDITIONS |= {"role-baselines": "", "role-baselines+sign": "--choice sign_aware=true", "inverted": ""}
MAIN, MAIN_SEEDS, OTHER_SEEDS = ("grpo", "srpo", "shuffled"), 10, 5
TASKS = ("count", "compare", "add")
OPTIONS = "--steps 40 --prompts 16 --lr 1e-4 --warmup-noise 0.25 --eval-every 10 --eval-size 256"
OPTIONS += " --save-every 0"
FINAL = 512  # held-out examples of the last evaluation
# wrong_reason: accuracy - grounded. corrupted, swapped: accuracy with the image painted over, with another
# question's image. curve: mean accuracy over training. seconds: of one core, evaluations included
# (extras/bench.py has the cost of a step).
OUTCOMES = ("accuracy", "grounded", "wrong_reason", "consistent", "perception", "corrupted", "swapped")
OUTCOMES += ("curve", "seconds")


# ------------------------------------------------------------------------------------------- what is compared


def shuffled(scores, roles, **options):
    """SRPO's weights, permuted inside each trajectory: the same magnitudes without the information."""
    w = token_weights(scores, roles, **options)
    for row, scored in zip(w, roles != Role.OTHER, strict=True):
        where = scored.nonzero()[:, 0]
        row[where] = row[where[torch.randperm(len(where), generator=SHUFFLE)]]
    return w


def only(role: Role):
    """SRPO's weights inside one role, with a baseline of its own; weight 1 in the other."""

    def weights(scores, roles, *, tau, w_min, w_max, flip=None, **others):
        w = torch.ones_like(scores)
        same = {"tau": tau, "w_min": w_min, "w_max": w_max, "flip": flip, **others}
        usable = (token_weights(scores, roles, **same) != 1).any(1)  # not the rows of step 9
        for row in usable.nonzero()[:, 0]:
            where = roles[row] == role
            delta = scores[row, where] * (-1 if flip is not None and flip[row] else 1)
            x = torch.exp(((delta - delta.mean()) / tau).clamp(np.log(w_min), np.log(w_max)))
            w[row, where] = x / x.mean()
        return w

    return weights


def role_baselines(scores, roles, **options):
    """A baseline and a mean weight of 1 for each role: nothing moves from one role to the other."""
    perception = only(Role.PERCEPTION)(scores, roles, **options)
    return torch.where(roles == Role.PERCEPTION, perception, only(Role.REASONING)(scores, roles, **options))


def inverted(scores, roles, **options):
    """SRPO with the opposite emphasis everywhere: tokens of low contrast weigh more."""
    return token_weights(scores, roles, **options | {"flip": torch.ones(len(scores), dtype=torch.bool)})


SHUFFLE = torch.Generator()
WEIGHTS = {
    "shuffled": shuffled,
    "perception-only": only(Role.PERCEPTION),
    "reasoning-only": only(Role.REASONING),
    "role-baselines": role_baselines,
    "role-baselines+sign": role_baselines,
    "inverted": inverted,
}


def run(job: tuple[str, str, int, str, str]) -> dict:
    """One training run and its last evaluations, as a row of the table."""
    task, condition, seed, out, options = job
    folder = Path(out) / f"{task}-{condition}-seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    argv = f"--task {task} --seed {seed} --device cpu {options} {CONDITIONS[condition]}".split()
    argv += ["--out", str(folder)]
    SHUFFLE.manual_seed(seed)
    train.token_weights = WEIGHTS.get(condition, token_weights)
    start = time.process_time()  # of one thread: what it would take on an idle core
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(argv)
    if status:
        raise RuntimeError(f"python train.py {' '.join(argv)}: {said.getvalue().strip().splitlines()[-1:]}")
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
    row = {"task": task, "condition": condition, "seed": seed, "commit": commit(), "options": options}
    row |= {"start": curve[0], "accuracy": final["accuracy"], "grounded": final["grounded"]}
    row["wrong_reason"] = final["accuracy"] - final["grounded"]
    row |= {name: final[name] for name in ("consistent", "perception")}
    row |= {"corrupted": unseen["accuracy"], "swapped": swapped["accuracy"]}
    row |= {"curve": area, "seconds": seconds}
    for name in ("w_perception", "w_reasoning"):
        row[name] = np.mean([r[name] for r in records if r.get(name) is not None])
    return row


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def begin(cache: str) -> None:
    """A worker: two runs beside each other are faster than one on two cores."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.environ["XDG_CACHE_HOME"] = cache  # warmed-up models belong to the study


def warm(job: tuple[str, int, str]) -> None:
    task, seed, options = job
    args = train.build_parser().parse_args(f"--task {task} --seed {seed} --device cpu {options}".split())
    args.image_size = args.image_size or train.DEFAULTS["image_size"][0]
    train.warmed_up(args)


# --------------------------------------------------------------------------------------------- run and record


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = ("task", "condition", "commit", "options")
    kind = lambda k: str if k in text else int if k == "seed" else float  # noqa: E731
    return [{k: kind(k)(v) for k, v in row.items()} for row in rows]


def append(path: Path, row: dict) -> None:
    """One line at a time: what is recorded stays recorded."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def planned(conditions, tasks, seeds: int | None, others: int) -> list[tuple[str, str, int]]:
    """(task, condition, seed): the main conditions first, then the others, each seed by seed, so that what is
    there is balanced, wherever it stops."""
    jobs = [(task, c, seed) for seed in range(max(seeds, others)) for c in conditions for task in tasks]
    main = [job for job in jobs if job[1] in MAIN and job[2] < seeds]
    return main + [job for job in jobs if job[1] not in MAIN and job[2] < others]


def study(jobs, out: Path, options: str, workers: int) -> None:
    """Run what `DIR/study.csv` lacks."""
    done = {(r["task"], r["condition"], r["seed"]) for r in read(out / "study.csv")}
    todo = [job for job in jobs if job not in done]
    if not todo:
        return
    with multiprocessing.get_context("spawn").Pool(workers, begin, [str(out / "cache")]) as pool:
        starts = sorted({(seed, task) for task, _, seed in todo})
        print(f"{len(starts)} warmed-up models, {len(todo)} runs, {workers} at a time", flush=True)
        pool.map(warm, [(task, seed, options) for seed, task in starts], chunksize=1)
        start = time.perf_counter()
        rows = pool.imap_unordered(run, [(*job, str(out), options) for job in todo])
        for i, row in enumerate(rows, 1):
            append(out / "study.csv", row)
            left = (time.perf_counter() - start) / i * (len(todo) - i) / 60
            said = f"[{i}/{len(todo)}] {row['task']} {row['condition']} seed {row['seed']}: accuracy "
            said += f"{row['start']:.2f} -> {row['accuracy']:.2f}, grounded {row['grounded']:.2f}"
            print(f"{said}; {left:.0f} minutes left", flush=True)


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
    """Markdown: outcomes of each condition over all tasks, then differences to GRPO on the seeds of both."""
    tasks = sorted({r["task"] for r in rows}, key=train.data.TASKS.index)
    value = {(r["task"], r["condition"], r["seed"]): r for r in rows}
    seeds = {c: [sorted(s for t, d, s in value if (t, d) == (task, c)) for task in tasks] for c in CONDITIONS}
    complete = [c for c in CONDITIONS if all(seeds[c])]

    def column(condition: str, name: str, which: list[list[int]]) -> list[np.ndarray]:
        """An outcome of a condition, by task, at these seeds."""
        pairs = zip(tasks, which, strict=True)
        return [np.array([value[task, condition, seed][name] for seed in seeds]) for task, seeds in pairs]

    def table(head: str, names) -> list[str]:
        return [f"| {head} | " + " | ".join(names) + " |", "|---" * (head.count("|") + 1 + len(names)) + "|"]

    lines = [f"Interquartile mean over {', '.join(tasks)} [95 % interval].", ""]
    lines += table("condition | runs", OUTCOMES)
    for c in complete:
        cells = [interval(column(c, name, seeds[c])) for name in OUTCOMES[:-1]]
        cells.append(f"{iqm(*column(c, 'seconds', seeds[c])):.0f}")
        lines.append(f"| {c} | {sum(map(len, seeds[c]))} | " + " | ".join(cells) + " |")
    compared = ("accuracy", "grounded", "wrong_reason", "curve")
    told = "P: probability of a more accurate, and of a more grounded run."
    lines += ["", f"Paired difference to GRPO, same task and seed; {told}", ""]
    lines += table("condition | pairs", (*compared, "P accuracy", "P grounded"))
    for c in [c for c in complete if c != "grpo" and "grpo" in complete]:
        both = [sorted(set(a) & set(b)) for a, b in zip(seeds[c], seeds["grpo"], strict=True)]
        ours, theirs = ({name: column(x, name, both) for name in compared} for x in (c, "grpo"))
        pairs = {name: list(zip(ours[name], theirs[name], strict=True)) for name in compared}
        cells = [interval([x - y for x, y in pairs[name]]) for name in compared]
        cells += [chance(ours[name], theirs[name]) for name in ("accuracy", "grounded")]
        lines.append(f"| {c} | {sum(map(len, both))} | " + " | ".join(cells) + " |")
    shown = ("start", "accuracy", "grounded", "wrong_reason", "swapped")
    lines += ["", "By task, mean over seeds.", ""]
    lines += table("task | condition | seeds", [name.replace("_", " ") for name in shown])
    for i, task in enumerate(tasks):
        for c in complete:
            cells = [f"{column(c, name, seeds[c])[i].mean():.3f}" for name in shown]
            lines.append(f"| {task} | {c} | {len(seeds[c][i])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    add("--quick", action="store_true", help="2 seeds of the first task, GRPO, SRPO and shuffled")
    add("--conditions", default=",".join(CONDITIONS), help="of these")
    add("--tasks", default=",".join(TASKS), help="of lookup, count, compare, add")
    add("--seeds", type=int, default=MAIN_SEEDS, help=f"of {', '.join(MAIN)}")
    add("--other-seeds", type=int, default=OTHER_SEEDS, help="of the other conditions")
    add("--options", default=OPTIONS, help="of train.py, for every run")
    add("--out", default="out/study", help="where study.csv and the runs go")
    add("--workers", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    add("--table", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    try:
        import scipy  # noqa: F401
    except ImportError:
        parser.error("the tables need scipy: pip install scipy")
    conditions, tasks = args.conditions.split(","), args.tasks.split(",")
    if unknown := (set(conditions) - set(CONDITIONS)) | (set(tasks) - set(train.data.TASKS)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    jobs = planned(conditions, tasks, args.seeds, args.other_seeds)
    if args.quick:
        jobs = planned(MAIN, tasks[:1], 2, 2)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if others := {r["options"] for r in read(out / "study.csv")} - {args.options}:
        parser.error(f"{out} holds runs with other --options ({others.pop()}); name another --out")
    train.build_parser().parse_args(args.options.split())  # a mistake ends here, and not in every run
    if not args.table:
        study(jobs, out, args.options, args.workers)
    rows = read(out / "study.csv")
    if not rows:
        parser.error(f"{out / 'study.csv'} has no runs yet; leave out --table")
    text = tables(rows)
    (out / "study.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
