"""Does role-aware credit help? GRPO against SRPO, its readings and controls, on drawn tasks.

    python extras/study.py --quick               2 seeds, one task, four conditions
    python extras/study.py                       all conditions; stop it at will, it goes on later
    python extras/study.py --regime sentences    where the answer may turn; or: slow
    python extras/study.py --first-seed 10 --other-seeds 10 --conditions grpo,entropy
    python extras/study.py --table               only the tables, from what has been run

Needs `pip install scipy`. Runs are paired: for one task and seed, every condition starts from the
same model and sees the same questions in the same order. `study_conditions.py` has the conditions.
Results go to DIR/study.csv, one row a run, and to DIR/study.md, which `study_tables.py` makes; the
runs themselves are kept beside them (`extras/report.py` draws them). Seeds from 10 on are fresh:
kept for what was decided on the seeds before, and tabled apart.
"""

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import shlex
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
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import study_tables  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from study_conditions import CONDITIONS, RUNNABLE  # noqa: E402
from study_tables import CREDIT, FRESH, TASKS  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from corrupt import corrupt  # noqa: E402
from srpo import parse_response  # noqa: E402

MAIN = ("grpo", "srpo", "range-0.5-2", "shuffled")
MAIN_SEEDS = 10
OTHER_SEEDS = 5
OPTIONS = "--steps 40 --prompts 16 --lr 1e-4 --warmup-noise 0.25 --eval-every 10 --eval-size 256"
OPTIONS += " --save-every 0"
FINAL = 512  # held-out examples of the last evaluation

# ---- regimes, where the answer may turn


OPENERS = "well here now also then clearly again there look indeed next see".split()
FILLER = [*OPENERS, "has", "a", "the", "10", "11", "12"]  # what the tiny model's vocabulary lacks


def in_sentences(example: data.Example, noise: float, rng: np.random.Generator) -> str:
    """A demonstration whose facts stand in sentences, like " look indeed a1 has the red circle.":
    as many words of filler, drawn at random, as there are words of facts."""
    text = data.demonstrate(example, noise, rng)
    start, end = parse_response(text).perception
    words = text[start:end].split()
    sentences = ""
    for first in range(0, len(words), 3):
        cell, color, shape = words[first : first + 3]
        copula = rng.choice(["is", "has"])
        article = rng.choice(["a", "the"])
        openers = rng.choice(OPENERS, rng.integers(3))
        mark = rng.choice([",", "."])
        sentences += " " + " ".join([*openers, cell, copula, article, color, shape]) + mark
    return text[:start] + sentences + text[end:]


def install_sentences() -> None:
    """Into the cold start, the tasks and the tiny model's vocabulary, for this process."""
    train.demonstrate = in_sentences
    data.DrawnTask = partial(data.DrawnTask, objects=(4, 6))
    words = model.TINY_WORDS
    place = words.index("0")
    model.TINY_WORDS = [*words[:place], *FILLER, *words[place:]]


class Regime(NamedTuple):
    what: str
    options: str  # of train.py, besides OPTIONS
    tasks: tuple[str, ...]
    conditions: tuple[str, ...]
    install: Callable[[], None] | None = None


FEW = ("grpo", "srpo", "range-0.5-2", "entropy")
REGIMES = {
    "default": Regime("three or four objects, facts alone", "", TASKS, tuple(RUNNABLE)),
    "sentences": Regime(
        "four to six objects, questions about two kinds, half of the perception's words filler, "
        "weaker start",
        "--max-new-tokens 112 --warmup-steps 600",
        ("add",),
        FEW,
        install_sentences,
    ),
    "slow": Regime(
        "a third of the learning rate, twice the steps",
        "--lr 3.3e-5 --steps 80 --eval-every 20",
        TASKS,
        FEW,
    ),
}


# ---- the runs


def trained(folder: Path, options: str) -> None:
    """A new run of train.py in `folder`, without a word."""
    shutil.rmtree(folder, ignore_errors=True)
    argv = ["--device", "cpu", "--out", str(folder), *shlex.split(options)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(argv)
    if status >= 128:  # a signal: this process is to end
        sys.exit(status)
    if status != 0:
        last = said.getvalue().strip().splitlines()[-1:]
        raise RuntimeError(f"python train.py {shlex.join(argv)}: {last}")


def run(job: tuple[str, str, int, str, Path, str]) -> dict:
    """One training run and its last evaluations, as a row of the table."""
    task, condition, seed, regime, out, options = job
    name = f"{task}-{condition}-{regime}-seed{seed}"
    if regime == "default":
        name = f"{task}-{condition}-seed{seed}"
    start = time.process_time()  # of one thread: what it would take on an idle core
    own = CONDITIONS[condition].options
    trained(out / name, f"--task {task} --seed {seed} {options} {own}")
    seconds = time.process_time() - start
    final, unseen, swapped = last_evaluations(out / name)
    records = train.Run(out / name).log()
    curve = [record["eval"]["accuracy"] for record in records if "eval" in record]
    row = {"task": task, "condition": condition, "seed": seed, "regime": regime}
    row.update(commit=commit(), options=options, start=curve[0])
    row.update(accuracy=final["accuracy"], grounded=final["grounded"])
    row["wrong_reason"] = final["accuracy"] - final["grounded"]
    row.update(consistent=final["consistent"], perception=final["perception"])
    row.update(corrupted=unseen["accuracy"], swapped=swapped["accuracy"])
    row["curve"] = (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)  # area under it
    row["seconds"] = seconds
    row.update(dict.fromkeys(CREDIT, np.nan))
    for name in ("w_perception", "w_reasoning"):
        measured = [record[name] for record in records if record.get(name) is not None]
        if measured:
            row[name] = float(np.mean(measured))
    return row


def last_evaluations(folder: Path) -> list[dict]:
    """Of a run's last policy: as it is, with every image painted over, with another question's."""
    run = train.Run(folder)
    args = train.resolve_options(run.argv())
    policy = train.load_policy(args, run.checkpoint())
    examples = train.build_task(args).eval_set(FINAL)
    painted = []
    swapped = []
    for i, example in enumerate(examples):
        blind = corrupt(example.images[0], "patch", patch=policy.patch, p=1.0)
        painted.append(replace(example, images=(blind,)))
        swapped.append(replace(example, images=examples[(i + 1) % len(examples)].images))
    found = []
    for some in (examples, painted, swapped):
        record = train.evaluate(policy, some, data.verify, args, args.steps)
        found.append(record["eval"])
    return found


def commit() -> str:
    command = "git describe --always --dirty --exclude *".split()
    said = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout
    return said.strip() or "unknown"


def begin(cache: str, regime: str) -> None:
    """A worker: two runs beside each other are faster than one on two cores."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.environ["XDG_CACHE_HOME"] = cache  # warmed-up models belong to the study, and to the regime
    install = REGIMES[regime].install
    if install is not None:
        install()


def warm(job: tuple[str, int, Path, str]) -> None:
    """The warmed-up model of a task and seed, made before the runs that share it."""
    task, seed, out, options = job
    folder = out / f"warm-{task}-seed{seed}"
    trained(folder, f"--task {task} --seed {seed} {options} --steps 0 --eval-size 1")
    shutil.rmtree(folder)


# ---- run and record


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, value in row.items():
            if name == "seed":
                row[name] = int(value)
            elif name not in ("task", "condition", "regime", "commit", "options"):
                row[name] = float(value)
    return rows


def append(path: Path, row: dict) -> None:
    """One line at a time: what is recorded stays recorded."""
    new = not path.exists()
    if not new and path.read_text(encoding="utf-8").split("\n", 1)[0].strip() != ",".join(row):
        raise ValueError(f"{path} has other columns; name another --out")
    rounded = {}
    for name, value in row.items():
        rounded[name] = round(value, 5) if isinstance(value, float) else value
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(rounded)


def planned(
    conditions, tasks, seeds: int, others: int, first: int = 0
) -> list[tuple[str, str, int]]:
    """(task, condition, seed): the main conditions first, then the others, each seed by seed, so
    that what is there is balanced, wherever it stops."""
    main = []
    rest = []
    for seed in range(first, first + max(seeds, others)):
        for condition in conditions:
            for task in tasks:
                if condition in MAIN and seed < first + seeds:
                    main.append((task, condition, seed))
                elif condition not in MAIN and seed < first + others:
                    rest.append((task, condition, seed))
    return main + rest


def lacking(jobs, rows: list[dict], regime: str) -> list:
    """Those of the jobs that no row is of."""
    done = {(r["task"], r["condition"], r["seed"]) for r in rows if r["regime"] == regime}
    return [job for job in jobs if job not in done]


def study(jobs, out: Path, regime: str, options: str, workers: int) -> None:
    """Run what `DIR/study.csv` lacks."""
    todo = lacking(jobs, read(out / "study.csv"), regime)
    if not todo:
        return
    name = "cache" if regime == "default" else f"cache-{regime}"
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, begin, [str(out / name), regime]) as pool:
        starts = sorted({(seed, task) for task, _, seed in todo})
        print(f"{len(starts)} warmed-up models, {len(todo)} runs, {workers} at a time", flush=True)
        pool.map(warm, [(task, seed, out, options) for seed, task in starts], chunksize=1)
        start = time.perf_counter()
        rows = pool.imap_unordered(run, [(*job, regime, out, options) for job in todo])
        for i, row in enumerate(rows, 1):
            append(out / "study.csv", row)
            left = (time.perf_counter() - start) / i * (len(todo) - i) / 60
            said = f"[{i}/{len(todo)}] {row['task']} {row['condition']} seed {row['seed']}: "
            said += f"accuracy {row['start']:.2f} -> {row['accuracy']:.2f}, "
            said += f"grounded {row['grounded']:.2f}; {left:.0f} minutes left"
            print(said, flush=True)
        pool.close()
        pool.join()


def tables(rows: list[dict]) -> str:
    return study_tables.tables(rows, REGIMES)


# ---- the options


def build_parser() -> argparse.ArgumentParser:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=form)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"2 seeds of the first task, {', '.join(MAIN)}")
    regimes = "; ".join(f"{name}: {regime.what}" for name, regime in REGIMES.items())
    add("--regime", default="default", choices=REGIMES, help=regimes)
    known = ", ".join(RUNNABLE)
    add("--conditions", help=f"of these, by default those of the regime: {known}")
    add("--tasks", help="of count, compare, add; by default those of the regime")
    add("--seeds", type=int, default=MAIN_SEEDS, help=f"of {', '.join(MAIN)}")
    add("--other-seeds", type=int, default=OTHER_SEEDS, help="of the other conditions")
    add("--first-seed", type=int, default=0, help=f"the first; from {FRESH} on, they are fresh")
    others = f"{OPTIONS}, and those of the regime"
    add("--options", help=f"of train.py, for every run, in the place of: {others}")
    add("--out", default="out/study", help="where study.csv and the runs go")
    add("--workers", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    add("--table", action="store_true", help="run nothing, print the tables")
    return parser


def asked_for(parser, args) -> list[tuple[str, str, int]]:
    """The jobs that the options ask for."""
    regime = REGIMES[args.regime]
    conditions = args.conditions.split(",") if args.conditions else regime.conditions
    tasks = args.tasks.split(",") if args.tasks else regime.tasks
    unknown = (set(conditions) - set(CONDITIONS)) | (set(tasks) - set(TASKS))
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    past = set(conditions) - set(RUNNABLE)
    if past:
        parser.error(f"{', '.join(sorted(past))}: run by commit 325f1a5 (git checkout 325f1a5)")
    if args.quick:
        return planned(MAIN, tasks[:1], 2, 2)
    return planned(conditions, tasks, args.seeds, args.other_seeds, args.first_seed)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        import scipy  # noqa: F401
    except ImportError:
        parser.error("the tables need scipy: pip install scipy")
    jobs = asked_for(parser, args)
    regime = REGIMES[args.regime]
    if args.options:
        options = f"{regime.options} {args.options}".strip()  # these have the last word
    else:
        options = f"{OPTIONS} {regime.options}".strip()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    there = {r["options"] for r in read(out / "study.csv") if r["regime"] == args.regime}
    others = there - {options}
    if others:
        said = f"{out} holds runs with other --options ({others.pop()}); name another --out"
        parser.error(said)
    train.build_parser().parse_args(shlex.split(options))  # a mistake ends here, not in every run
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
