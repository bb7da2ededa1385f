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
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
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
from script import exit_code, in_one_line  # noqa: E402
from study_conditions import CONDITIONS, RUNNABLE  # noqa: E402
from study_tables import CREDIT, FRESH, OUTCOMES, TASKS  # noqa: E402
from tqdm import tqdm  # noqa: E402
from workers import Worker, done  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from corrupt import corrupt  # noqa: E402
from data import InputError  # noqa: E402
from srpo import parse_response  # noqa: E402

MAIN = ("grpo", "srpo", "range-0.5-2", "shuffled")
MAIN_SEEDS = 10
OTHER_SEEDS = 5
OPTIONS = "--steps 40 --prompts 16 --lr 1e-4 --warmup-noise 0.25 --eval-every 10 --eval-size 256"
OPTIONS += " --save-every 0"
OWN_OPTIONS = {"--task", "--seed", "--data", "--out", "--resume"}  # each run has its own
TEXTS = ("task", "condition", "regime", "commit", "options")
COLUMNS = {*TEXTS, "seed", "start", *OUTCOMES, *CREDIT}
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
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = train.main(argv)
        except SystemExit as stop:  # an option that the parser refuses
            status = stop.code
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py had its own way
    if status >= 128:  # a signal: this process is to end
        sys.exit(status)
    if status != 0:
        last = said.buffer.getvalue().decode().strip().splitlines()[-1].removeprefix("error: ")
        raise InputError(f"{last} (python train.py {shlex.join(argv)})")


def name_of(task: str, condition: str, seed: int, regime: str) -> str:
    """Of a run and its folder."""
    if regime == "default":
        return f"{task}-{condition}-seed{seed}"
    return f"{task}-{condition}-{regime}-seed{seed}"


def run(job: tuple[str, str, int, str, Path, str]) -> dict:
    """One training run and its last evaluations, as a row of the table."""
    task, condition, seed, regime, out, options = job
    name = name_of(task, condition, seed, regime)
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
    args = train.resolve_options(run.go_back())
    policy = train.load_policy(args, run.checkpoint())
    examples = list(train.build_task(args).eval_set(FINAL))
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


def prepare(cache: str, regime: str) -> None:
    """A worker: two runs beside each other are faster than one on two cores."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own would outlive a worker that is killed
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
    """Rows of study.csv, or InputError. A last line that a kill has cut off is no row."""
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        print(f"note: {path}: the last line is cut off; its run is made again", file=sys.stderr)
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    if whole and set(reader.fieldnames) != COLUMNS:
        raise InputError(f"{path}: has other columns; name another --out")
    return [parsed(row, f"{path}:{reader.line_num}") for row in reader]


def parsed(row: dict, place: str) -> dict:
    """A row with its numbers as numbers."""
    known = {"task": TASKS, "condition": CONDITIONS, "regime": REGIMES}
    for name, value in row.items():
        try:
            if name in known and value not in known[name]:
                raise ValueError
            if name == "seed":
                row[name] = int(value)
            elif name not in TEXTS:
                row[name] = float(value)
        except (TypeError, ValueError):  # TypeError: there is none, or there are too many
            advice = "remove the line, and its run is made again"
            raise InputError(f"{place}: {name} {value!r}: not understood; {advice}") from None
    return row


def append(path: Path, row: dict) -> None:
    """One line at a time: what is recorded stays recorded."""
    content = b""
    if path.exists():
        content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # a line that a kill has cut off
        os.truncate(path, len(whole))
    if whole and whole.split(b"\n")[0].decode().strip() != ",".join(row):
        raise InputError(f"{path}: has other columns; name another --out")
    rounded = {}
    for name, value in row.items():
        rounded[name] = round(value, 5) if isinstance(value, float) else value
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if not whole:
            writer.writeheader()
        writer.writerow(rounded)


def planned(conditions, tasks, seeds: int, others: int, first: int) -> list[tuple[str, str, int]]:
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


def study(jobs, out: Path, regime: str, options: str, count: int) -> None:
    """Run what `DIR/study.csv` lacks, `count` runs at a time."""
    rows = read(out / "study.csv")
    there = {row["options"] for row in rows if row["regime"] == regime}
    for other in there - {options}:
        raise InputError(f"{out} holds runs with other --options ({other}); name another --out")
    todo = lacking(jobs, rows, regime)
    if not todo:
        return
    (out / "study.csv").open("a").close()  # where it cannot be written, that is said now
    name = "cache" if regime == "default" else f"cache-{regime}"
    workers = [Worker(prepare, (str(out / name), regime)) for _ in range(count)]
    models = {}  # by what they are called when one fails
    for seed, task in sorted({(seed, task) for task, _, seed in todo}):
        models[f"warm-up of {task}, seed {seed}"] = (task, seed, out, options)
    said = f"{len(models)} warmed-up models, {len(todo)} runs, {count} at a time"
    print(said, file=sys.stderr)
    list(done(warm, models, workers))
    start = time.perf_counter()
    runs = {name_of(*job, regime): (*job, regime, out, options) for job in todo}
    rows = done(run, runs, workers)
    for i, row in enumerate(rows, 1):
        append(out / "study.csv", row)
        left = (time.perf_counter() - start) / i * (len(todo) - i) / 60
        said = f"[{i}/{len(todo)}] {row['task']} {row['condition']} seed {row['seed']}: "
        said += f"accuracy {row['start']:.2f} -> {row['accuracy']:.2f}, "
        said += f"grounded {row['grounded']:.2f}; {left:.0f} minutes left"
        print(said, file=sys.stderr)


def tables(rows: list[dict]) -> str:
    return study_tables.tables(rows, REGIMES)


# ---- the options


def build_parser() -> argparse.ArgumentParser:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = train.Parser(description="Does role-aware credit help?", formatter_class=form)
    add = parser.add_argument
    text = train.filled
    seeds = train.number(int, 0, 10**6)
    add("--quick", action="store_true", help=f"on 2 seeds of the first task {', '.join(MAIN)}")
    regimes = "; ".join(f"{name}: {regime.what}" for name, regime in REGIMES.items())
    add("--regime", default="default", choices=REGIMES, help=regimes)
    known = ", ".join(RUNNABLE)
    add("--conditions", type=text, help=f"of these, by default those of the regime: {known}")
    add("--tasks", type=text, help="of count, compare, add; by default those of the regime")
    add("--seeds", type=seeds, default=MAIN_SEEDS, help=f"of {', '.join(MAIN)}")
    add("--other-seeds", type=seeds, default=OTHER_SEEDS, help="of the other conditions")
    add("--first-seed", type=seeds, default=0, help=f"from {FRESH} on, they are fresh")
    others = f"{OPTIONS}, and those of the regime"
    add("--options", type=text, help=f"of train.py, for every run, in the place of: {others}")
    add("--out", type=text, default="out/study", help="where study.csv and the runs go")
    workers = train.number(int, 1, 1000)
    add("--workers", type=workers, default=os.cpu_count(), help="runs at a time, one core each")
    add("--table", action="store_true", help="run nothing, print the tables")
    return parser


def asked_for(args) -> list[tuple[str, str, int]]:
    """The jobs that the options ask for."""
    regime = REGIMES[args.regime]
    conditions = args.conditions.split(",") if args.conditions else regime.conditions
    tasks = args.tasks.split(",") if args.tasks else regime.tasks
    unknown = [name for name in conditions if name not in CONDITIONS]
    unknown += [name for name in tasks if name not in TASKS]
    if unknown:
        raise InputError(f"unknown: {', '.join(unknown)}; --help lists the conditions and tasks")
    past = set(conditions) - set(RUNNABLE)
    if past:
        raise InputError(f"{', '.join(past)}: run by commit 325f1a5 (git checkout 325f1a5)")
    if args.quick and args.conditions:
        raise InputError("--conditions: not with --quick, which has its own")
    if args.quick:
        return planned(MAIN, tasks[:1], 2, 2, args.first_seed)
    jobs = planned(conditions, tasks, args.seeds, args.other_seeds, args.first_seed)
    if not jobs and not args.table:
        raise InputError("--seeds, --other-seeds: both are 0 for these conditions: nothing to run")
    return jobs


def options_of_train(args) -> str:
    """The options of every run besides the condition's own. InputError where they make no sense."""
    options = f"{OPTIONS} {REGIMES[args.regime].options}".strip()
    if args.options:  # these have the last word
        options = f"{REGIMES[args.regime].options} {args.options}".strip()
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise InputError(f"--options {args.options!r}: {error}") from None
    for option in OWN_OPTIONS & {word.split("=")[0] for word in words}:
        raise InputError(f"--options: not {option}, of which each run has its own")
    return options


def check(jobs, options: str) -> None:
    """A mistake in the options of train.py ends here, not in every run."""
    one_of_each = {condition: (task, seed) for task, condition, seed in jobs}
    for condition, (task, seed) in one_of_each.items():
        argv = shlex.split(f"--task {task} --seed {seed} {options} {CONDITIONS[condition].options}")
        try:
            args = train.resolve_options(["--device", "cpu", *argv])
            if args.steps == 0:
                raise InputError("--steps 0: leaves nothing to compare")
            train.build_weigh(args)
            train.build_judge(args)
            if args.log:
                train.load_function("--log", args.log)
        except InputError as error:
            raise InputError(f"--options, condition {condition}: {error}") from None


def make(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    try:
        import scipy  # noqa: F401
    except Exception as error:  # it is not there, or does not fit the packages beside it
        raise InputError(f"pip install scipy, for the tables ({in_one_line(error)})") from None
    jobs = asked_for(args)
    options = options_of_train(args)
    out = Path(args.out)
    if not args.table:
        check(jobs, options)
        out.mkdir(parents=True, exist_ok=True)
        folder = train.Run(out)
        folder.lock()  # two studies there would take each other's runs away
        study(jobs, out, args.regime, options, args.workers)
    rows = read(out / "study.csv")
    if not rows:
        raise InputError(f"{out / 'study.csv'} has no runs yet; leave out --table")
    text = tables(rows)
    path = out / "study.md"
    above = ""
    if path.exists():  # what was written by hand above the tables stays
        above, title, _ = path.read_text(encoding="utf-8").rpartition("# Tables\n\n")
        above += title
    path.write_text(f"{above}{text}\n", encoding="utf-8")
    print(text)


def main(argv: list[str] | None = None) -> int:
    return exit_code(make, argv, "stopped; the same command goes on, with what is recorded")


if __name__ == "__main__":
    sys.exit(main())
