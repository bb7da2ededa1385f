"""Does role-aware credit help? GRPO, SRPO and every open choice of SRPO, on tasks whose evidence has a ground truth.

    python extras/study.py --quick         2 seeds, one task, three conditions: under ten minutes on two CPU cores
    python extras/study.py                 everything; stop it at will, it goes on where it stopped
    python extras/study.py --table         only the tables, from what has been run

Needs `pip install scipy`. Runs are paired: for one task and seed, every condition starts from the same warmed-up model
and sees the same questions in the same order. Results go to DIR/study.csv, one row a run, and DIR/study.md; the runs themselves
are kept beside them (`extras/report.py` draws them). The tables give interquartile means with 95 % stratified bootstrap intervals, paired
differences to GRPO and the probability of improvement over it (Agarwal et al. 2021, "Deep RL at the statistical precipice").
"""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from corrupt import corrupt  # noqa: E402
from srpo import Role, token_weights  # noqa: E402

# Condition -> options of train.py. Those of SRPO that change one open choice are named after it.
CONDITIONS = {
    "grpo": "--algo grpo",
    "srpo": "",
    "shuffled": "",  # the three in WEIGHTS below exist to be compared with
    "perception-only": "",
    "reasoning-only": "",
    "role-balanced": "--role-balanced",
    "sign-aware": "--sign-aware",
    "no-renormalization": "--no-renormalization",
    "answer-is-reasoning": "--answer-is-reasoning",
    "corrupt-both": "--corrupt-both",
    "softmax": "--w-min 1e-6 --w-max 1e6",
    "noise": "--corruption noise",
    "blur": "--corruption blur",
    "grey": "--corruption grey",
    "shuffle": "--corruption shuffle",
    "pixelate": "--corruption pixelate",
    "p=0.3": "--corruption-p 0.3",
    "p=1": "--corruption-p 1",
    "tau=0.3": "--tau 0.3",
    "tau=3": "--tau 3",
    "role-baselines": "",  # the last three were added after the first results, to find out why
    "role-baselines+sign": "--sign-aware",
    "inverted": "",
}
MAIN, MAIN_SEEDS, OTHER_SEEDS = ("grpo", "srpo", "shuffled"), 10, 5
TASKS = ("count", "compare", "add")
OPTIONS = "--steps 40 --prompts 16 --lr 1e-4 --warmup-noise 0.25 --eval-every 10 --eval-size 256 --save-every 0"
FINAL = 512  # held-out examples of the last evaluation
# wrong_reason: accuracy - grounded. corrupted, swapped: accuracy with the image painted over, with another question's image.
# curve: mean accuracy over training. seconds: of one core, evaluations included (extras/bench.py has the cost of a step).
OUTCOMES = ("accuracy", "grounded", "wrong_reason", "consistent", "perception", "corrupted", "swapped", "curve", "seconds")


# ------------------------------------------------------------------------------------------------------ what is compared


def shuffled(scores, roles, **options):
    """SRPO's weights, permuted inside each trajectory: the same magnitudes without the information."""
    w = token_weights(scores, roles, **options)
    for row, scored in zip(w, roles != Role.OTHER, strict=True):
        where = scored.nonzero()[:, 0]
        row[where] = row[where[torch.randperm(len(where), generator=SHUFFLE)]]
    return w


def only(role: Role):
    """SRPO's weights inside one role, with a baseline of its own; weight 1 in the other."""

    def weights(scores, roles, **options):
        w = torch.ones_like(scores)
        usable = (token_weights(scores, roles, **options) != 1).any(1)  # not the rows of Eq. (9)
        for row in usable.nonzero()[:, 0]:
            where = roles[row] == role
            delta = scores[row, where] * (-1 if options["flip"] is not None and options["flip"][row] else 1)
            x = torch.exp(((delta - delta.mean()) / options["tau"]).clamp(np.log(options["w_min"]), np.log(options["w_max"])))
            w[row, where] = x / x.mean()
        return w

    return weights


def role_baselines(scores, roles, **options):
    """A baseline and a mean weight of 1 for each role: nothing moves from one role to the other."""
    perception, reasoning = (only(role)(scores, roles, **options) for role in (Role.PERCEPTION, Role.REASONING))
    return torch.where(roles == Role.PERCEPTION, perception, reasoning)


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
    torch.set_num_threads(1)  # two runs beside each other are faster than one on two cores
    folder = Path(out) / f"{task}-{condition}-seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    argv = f"--task {task} --seed {seed} --device cpu {options} {CONDITIONS[condition]} --cache {out}/cache --out {folder}".split()
    SHUFFLE.manual_seed(seed)
    train.token_weights = WEIGHTS.get(condition, token_weights)
    start = time.process_time()  # of one thread: what it would take on an idle core
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(argv)
    if status:
        raise RuntimeError(f"python train.py {' '.join(argv)}: {said.getvalue().strip().splitlines()[-1:]}")
    seconds = time.process_time() - start
    args = train.build_parser().parse_args(argv)
    args.__dict__ |= json.loads((folder / "args.json").read_text())
    policy = train.prepare(args, folder)[0]
    examples = train.drawn_task(args).eval_set(FINAL)
    blind = [replace(e, images=(corrupt(e.images[0], "patch", patch=policy.patch, p=1.0, seed=0),)) for e in examples]
    other = [replace(e, images=f.images) for e, f in zip(examples, [*examples[1:], examples[0]], strict=True)]
    final, unseen, swapped = (train.evaluate(policy, x, args)[0] for x in (examples, blind, other))
    records = train.read_log(folder)
    curve = [r["eval"]["accuracy"] for r in records if "eval" in r]
    weights = {k: np.mean([r[k] for r in records if r.get(k) is not None]) for k in ("w_perception", "w_reasoning")}
    return {
        "task": task, "condition": condition, "seed": seed, "commit": commit(), "options": options, "start": curve[0],
        "accuracy": final["accuracy"], "grounded": final["grounded"], "wrong_reason": final["accuracy"] - final["grounded"],
        "consistent": final["consistent"], "perception": final["perception"], "corrupted": unseen["accuracy"],
        "swapped": swapped["accuracy"], "curve": (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1),
        "seconds": seconds, **weights,
    }  # fmt: skip


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def warm(job: tuple[str, int, str, str]) -> None:
    task, seed, out, options = job
    torch.set_num_threads(1)
    args = train.build_parser().parse_args(f"--task {task} --seed {seed} --device cpu {options} --cache {out}/cache".split())
    args.dtype, args.image_size = "float32", train.DEFAULTS["image_size"][0]
    train.warmed_up(args)


# --------------------------------------------------------------------------------------------------------- run and record


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = ("task", "condition", "commit", "options")
    return [{k: v if k in text else int(v) if k == "seed" else float(v) for k, v in row.items()} for row in rows]


def append(path: Path, row: dict) -> None:
    """One line at a time: what is recorded stays recorded."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def planned(conditions, tasks, seeds: int | None, others: int) -> list[tuple[str, str, int]]:
    """(task, condition, seed): the main conditions first, then the others, each seed by seed, so that wherever it stops
    what is there is balanced."""
    main = [(task, c, seed) for seed in range(seeds) for c in conditions if c in MAIN for task in tasks]
    return main + [(task, c, seed) for seed in range(others) for c in conditions if c not in MAIN for task in tasks]


def study(jobs, out: Path, options: str, workers: int) -> None:
    """Run what `DIR/study.csv` lacks."""
    done = {(r["task"], r["condition"], r["seed"]) for r in read(out / "study.csv")}
    todo = [job for job in jobs if job not in done]
    if not todo:
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        starts = sorted({(seed, task) for task, _, seed in todo})
        print(f"{len(starts)} warmed-up models, {len(todo)} runs, {workers} at a time", flush=True)
        pool.map(warm, [(task, seed, str(out), options) for seed, task in starts], chunksize=1)
        begin = time.perf_counter()
        rows = pool.imap_unordered(run, [(*job, str(out), options) for job in todo])
        for i, row in enumerate(rows, 1):
            append(out / "study.csv", row)
            left = (time.perf_counter() - begin) / i * (len(todo) - i) / 60
            name = f"{row['task']} {row['condition']} seed {row['seed']}"
            print(f"[{i}/{len(todo)}] {name}: accuracy {row['start']:.2f} -> {row['accuracy']:.2f}, grounded {row['grounded']:.2f}; {left:.0f} minutes left", flush=True)


# ------------------------------------------------------------------------------------------------------------- the tables


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
    found = bootstrap(strata, statistic, n_resamples=2000, method="percentile", vectorized=True, rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that a run of x is better than one of y, over all pairs of seeds."""
    return np.mean((x[..., :, None] > y[..., None, :]) + 0.5 * (x[..., :, None] == y[..., None, :]), axis=(-2, -1))


def tables(rows: list[dict]) -> str:
    """Markdown: outcomes of each condition over all tasks, then differences to GRPO on the seeds that both have."""
    tasks = sorted({r["task"] for r in rows}, key=train.data.TASKS.index)
    value = {(r["task"], r["condition"], r["seed"], k): r[k] for r in rows for k in (*OUTCOMES, "start")}
    seeds = {c: [sorted({r["seed"] for r in rows if (r["task"], r["condition"]) == (t, c)}) for t in tasks] for c in CONDITIONS}
    complete = [c for c in CONDITIONS if all(seeds[c])]
    column = lambda c, k, which: [np.array([value[t, c, s, k] for s in ss]) for t, ss in zip(tasks, which, strict=True)]  # noqa: E731

    lines = [f"Interquartile mean over {', '.join(tasks)} [95 % interval].", "", "| condition | runs | " + " | ".join(OUTCOMES) + " |"]
    lines.append("|---" * (len(OUTCOMES) + 2) + "|")
    for c in complete:
        cells = [interval(column(c, k, seeds[c])) if k != "seconds" else f"{iqm(*column(c, k, seeds[c])):.0f}" for k in OUTCOMES]
        lines.append(f"| {c} | {sum(map(len, seeds[c]))} | " + " | ".join(cells) + " |")
    compared = ("accuracy", "grounded", "wrong_reason", "curve")
    lines += ["", "Paired difference to GRPO, same task and seed; P: probability of a more accurate, and of a more grounded run.", ""]
    lines += ["| condition | pairs | " + " | ".join(compared) + " | P accuracy | P grounded |", "|---" * (len(compared) + 4) + "|"]
    for c in complete:
        if c == "grpo" or "grpo" not in complete:
            continue
        both = [sorted(set(a) & set(b)) for a, b in zip(seeds[c], seeds["grpo"], strict=True)]
        cells = [interval([x - y for x, y in zip(column(c, k, both), column("grpo", k, both), strict=True)]) for k in compared]
        cells += [chance(column(c, k, both), column("grpo", k, both)) for k in ("accuracy", "grounded")]
        lines.append(f"| {c} | {sum(map(len, both))} | " + " | ".join(cells) + " |")
    lines += ["", "By task, mean over seeds.", "", "| task | condition | seeds | start | accuracy | grounded | wrong reason | swapped |", "|---" * 8 + "|"]
    for i, t in enumerate(tasks):
        for c in complete:
            cells = [np.mean([value[t, c, s, k] for s in seeds[c][i]]) for k in ("start", "accuracy", "grounded", "wrong_reason", "swapped")]
            lines.append(f"| {t} | {c} | {len(seeds[c][i])} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    return "\n".join(lines)


def chance(xs: list[np.ndarray], ys: list[np.ndarray]) -> str:
    """Probability of improvement, averaged over tasks, with its interval."""

    def statistic(*strata, axis=-1):
        return np.mean([improvement(a, b) for a, b in zip(strata[: len(xs)], strata[len(xs) :], strict=True)], axis=0)

    return interval([*xs, *ys], statistic)


def main() -> None:
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 seeds of the first task, GRPO, SRPO and shuffled")
    parser.add_argument("--conditions", default=",".join(CONDITIONS), help="of these")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of lookup, count, compare, add")
    parser.add_argument("--seeds", type=int, default=MAIN_SEEDS, help=f"of {', '.join(MAIN)}")
    parser.add_argument("--other-seeds", type=int, default=OTHER_SEEDS, help="of the other conditions")
    parser.add_argument("--options", default=OPTIONS, help="of train.py, for every run")
    parser.add_argument("--out", default="out/study", help="where study.csv and the runs go")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
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
