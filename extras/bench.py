"""What a training step costs: GRPO, SRPO, TRL's GRPOTrainer on one model, another version of this.

    python extras/bench.py
        both shapes on this machine; TRL, too, where it is installed
    python extras/bench.py --conditions grpo,srpo --against ../before
        beside another version of the project: git worktree add ../before COMMIT
    python extras/bench.py --shape real
        Qwen2-VL-2B from its configuration, full and LoRA, beside `generate`; without a GPU four
        layers of it and short responses
    python extras/bench.py --shape group --model qwen3.5-0.8b --conditions srpo-lora-recompute
        one group, what a micro-batch holds: peak memory

Every condition runs in a process of its own, in turns, so that a busy machine slows all of them.
The table has the median over the steps of all turns, after two warm-up steps a turn (of two steps
one, of one none; in the first there are no moments of Adam yet, so peak memory takes two). Weights
are random, so no response has the tags and none is right: rewards and roles are drawn instead (40 %
of the tokens perception, 40 % reasoning). That changes what is learned, not what it costs.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench_models  # noqa: E402
from bench_models import MODELS, REAL, SHAPES, sizes_of  # noqa: E402
from script import exit_code  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from data import InputError  # noqa: E402

KNOWN_CONDITION = re.compile(r"(grpo|srpo)(-lora)?(-recompute)?|generate|trl-grpo")
CONDITIONS = "grpo,srpo,trl-grpo"
CONDITIONS_REAL = "generate,grpo,srpo,grpo-lora,srpo-lora"
# Dense bf16 operations a second, by the data sheets.
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

# Each version saves a model as it reads it: this runs with the files of the version `tree`.
MAKE = """import json, sys; from pathlib import Path
tree, folder, shape, sizes = sys.argv[1:]
sys.path.insert(0, tree + "/extras"); import bench
bench.SHAPES[shape] = tuple(json.loads(sizes))
bench.make_folder(Path(folder), shape)"""
make_folder = bench_models.make_folder


# ---- one condition, in a process of its own


def draw_roles(text, offsets, tags=None) -> torch.Tensor:
    """Roles in a response without tags: a token, 40 % perception, a gap, 40 % reasoning, an end."""
    share = 2 * len(offsets) // 5
    roles = torch.zeros(len(offsets), dtype=torch.long)
    roles[1 : 1 + share] = 1
    roles[3 + share : 3 + 4 * len(offsets) // 5] = 2
    return roles


def warm_up(steps: int) -> int:
    """How many of the steps do not count."""
    return min(2, steps - 1)


def stand_in() -> None:
    """Draw roles and rewards in the place of train.py's, and leave out what is not measured."""
    rng = np.random.default_rng(0)

    def draw_verdict(text, example):
        return data.Verdict(float(rng.random()), 0.0, 0.0)

    def no_evaluation(*_, **__):
        return {"step": 0, "eval": {"accuracy": 0.0}}

    def nothing(*_):
        pass

    train.token_roles = draw_roles
    train.verify = draw_verdict
    train.evaluate = no_evaluation
    train.summarize = nothing
    train.Run.save = nothing


def train_options(args, condition: str, shape: str, folder: str) -> list[str]:
    """The command line of train.py."""
    sizes = sizes_of(shape)
    group_size = sizes.group_size
    if "-G" in condition:
        group_size = int(condition.split("-G")[1])
    micro_batch = args.micro_batch
    if micro_batch is None and shape in REAL:
        micro_batch = train.REAL["micro_batch"]
    elif micro_batch is None:
        micro_batch = sizes.prompts * group_size  # all
    argv = ["--model", folder, "--task", "count", "--image-size", sizes.side]
    argv += ["--prompts", sizes.prompts, "--group-size", group_size]
    argv += ["--max-new-tokens", sizes.new_tokens, "--micro-batch", micro_batch]
    argv += ["--algo", condition.split("-")[0], "--steps", args.steps, "--device", args.device]
    argv += ["--eval-size", 1, "--eval-every", 0, "--save-every", 0]
    if "lora" in condition:
        argv += ["--lora", 16]
    if "recompute" in condition:
        argv += ["--recompute"]
    if args.dtype is not None:
        argv += ["--dtype", args.dtype]
    elif args.device != "cpu":  # train.py takes the models made here for the tiny one
        argv += ["--dtype", "bfloat16"]
    return [str(word) for word in argv]


def run_ours(args, condition: str, shape: str, folder: str) -> dict:
    stand_in()
    options = train_options(args, condition, shape, folder)
    asked = train.build_parser().parse_args(options)
    responses = asked.prompts * asked.group_size
    with tempfile.TemporaryDirectory() as out:
        if train.main([*options, "--out", out]) != 0:
            sys.exit(2)
        records = [record for record in train.Run(out).log() if "eval" not in record]
    records = records[warm_up(args.steps) :]
    phases = [[r["sec_generate"], r["sec_score"], r["sec_update"]] for r in records]
    tokens = [record["length"] * responses for record in records]
    return {"phases": phases, "tokens": tokens, "peak": peak_memory(args.device)}


def run_generate(args, condition: str, shape: str, folder: str) -> dict:
    """`generate` of transformers as it comes, on the same prompts; bf16 weights on a GPU."""
    sizes = sizes_of(shape)
    policy = model.load(folder, device=args.device)
    if args.device != "cpu":
        policy.model.to(torch.bfloat16)
    examples = data.DrawnTask("count", size=sizes.side).train_batch(0, sizes.prompts)
    prompts = policy.encode(examples)
    rows = torch.arange(sizes.prompts).repeat_interleave(sizes.group_size)
    ids = prompts.ids[rows]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": sizes.new_tokens}
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        policy.model.generate(
            input_ids=ids,
            attention_mask=prompts.mask[rows],
            pixel_values=torch.cat([prompts.pixels[i] for i in rows]),
            image_grid_thw=torch.cat([prompts.grids[i] for i in rows]),
            mm_token_type_ids=(ids == policy.image_token).int(),
            min_new_tokens=sizes.new_tokens,
            **options,
        )
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    phases = [[x, 0.0, 0.0] for x in seconds[warm_up(args.steps) :]]
    tokens = [sizes.new_tokens * len(rows)] * len(phases)
    return {"phases": phases, "tokens": tokens, "peak": peak_memory(args.device)}


def run_trl(args, condition: str, shape: str, folder: str) -> dict:
    import bench_trl

    sizes = sizes_of(shape)
    n = sizes.prompts
    examples = data.DrawnTask("count", size=sizes.side).train_batch(0, args.steps * n)
    group = (n, sizes.group_size, sizes.new_tokens)
    phases = bench_trl.run(folder, examples, *group, args.device)[warm_up(args.steps) :]
    tokens = [n * sizes.group_size * sizes.new_tokens] * len(phases)
    return {"phases": phases, "tokens": tokens, "peak": peak_memory(args.device)}


def peak_memory(device: str) -> float:
    """GiB: the tensors' peak on a GPU, the process's resident peak on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # there in bytes, elsewhere in kibibytes
        return peak / 2**30
    return peak / 2**20


# ---- all of them


def measure(args, conditions: list[str], shape: str, folders: dict[str, str]) -> dict[str, dict]:
    """Phases of every condition; under "old CONDITION" those of the other version.

    `folders` holds the model that each version saved.
    """
    results = {}
    common = ["--steps", str(args.steps), "--device", args.device]
    for option in ("layers", "dtype", "model", "micro_batch"):  # another version may lack them
        value = getattr(args, option)
        if value is not None:
            common += [f"--{option.replace('_', '-')}", str(value)]
    for turn in range(args.turns):
        for condition in conditions:
            trees = [str(ROOT)]
            if condition.startswith(("grpo", "srpo")):
                trees = list(folders)
            if turn % 2 == 1:
                trees.reverse()
            for tree in trees:
                one = ["--one", condition, shape, folders[tree]]
                said = call(condition, [f"{tree}/extras/bench.py", *one, *common])
                found = json.loads(said.split("RESULT ")[1])
                name = condition
                if tree != str(ROOT):
                    name = f"old {condition}"
                kept = results.setdefault(name, {"phases": [], "tokens": [], "peak": 0.0})
                kept["phases"] += found["phases"]
                kept["tokens"] += found["tokens"]
                kept["peak"] = max(kept["peak"], found["peak"])
    return results


def call(name: str, command: list[str]) -> str:
    """Output of Python with the arguments `command`."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    if "group" in command:  # glibc would keep what is freed: the peak be more than what is in use
        environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    command = [sys.executable, *command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        code = f"exit code {done.returncode} (where it is -9: killed, as when memory runs out)"
        last = [code, *done.stderr.strip().splitlines()][-1]
        raise InputError(f"{name}: {last}")
    return done.stdout


# ---- tables


def step_seconds(result: dict) -> float:
    return statistics.median(sum(phases) for phases in result["phases"])


def table(shape: str, results: dict[str, dict], device: str) -> None:
    sizes = sizes_of(shape)
    group = f"{sizes.prompts} prompt(s) x {sizes.group_size} responses x {sizes.new_tokens} tokens"
    print(f"\n{shape}: {sizes.side}x{sizes.side} image, {group}; median seconds a step")
    names = "generate score update step vs_grpo tokens/s peak_GiB steps of_peak".split()
    print(" " * 20 + "".join(f"{name:>10}" for name in names))
    step = {name: step_seconds(result) for name, result in results.items()}
    for name, result in results.items():
        columns = zip(*result["phases"], strict=True)
        phases = [statistics.median(column) for column in columns]
        figures = [*phases, step[name], step[name] / step.get("grpo", float("nan"))]
        seconds = [generate for generate, _, _ in result["phases"]]
        speeds = [n / x for n, x in zip(result["tokens"], seconds, strict=True)]
        shown = "".join(f"{x:10.3f}" for x in figures)
        shown += f"{statistics.median(speeds):10.0f}{result['peak']:10.2f}{len(seconds):10d} "
        print(f"{name:20}{shown}{share_of_peak(name, shape, device, phases[2])}")
    for one, other in (("srpo", "trl-grpo"), ("grpo", "trl-grpo"), ("srpo", "grpo")):
        if one in step and other in step:
            print(f"{one} / {other}: {step[one] / step[other]:.2f}")
    if "srpo" in step and "grpo" in step:
        print(f"srpo / grpo if scoring read no more than it must: {floor(shape, results):.2f}")
    for name in step:
        if f"old {name}" in step:
            old = step[f"old {name}"]
            new = step[name]
            said = f"old {old:.3f}, new {new:.3f}, new / old {new / old:.3f}"
            print(f"{name}, seconds a step: {said}")


def by_group(shape: str, results: dict[str, dict]) -> None:
    """Seconds a step = prompt + G * response, fitted to the medians."""
    groups = [int(name.split("-G")[1]) for name in results]
    steps = [step_seconds(result) for result in results.values()]
    response, prompt = np.polyfit(groups, steps, 1)
    print(f"\n{shape}: prompt {prompt:.3f} s + G x {response:.3f} s a step")
    for G, step in zip(groups, steps, strict=True):
        share = f"share of the prompt {prompt / step:.2f}"
        print(f"G = {G:3d}: {step:.3f} s, {step / G:.3f} s a response; {share}")


def floor(shape: str, results: dict[str, dict]) -> float:
    """SRPO / GRPO if the two scoring passes read what they must and nothing else.

    That is prompts, and responses to the last token of perception; and responses to the last of
    reasoning, without perception. A token costs what it costs forward in the update, a third.
    """
    sizes = sizes_of(shape)
    patch = 8
    if sizes.words is None:
        patch = MODELS[sizes.model][2]["patch_size"]
    prompt_tokens = sizes.prompts * ((sizes.side / (2 * patch)) ** 2 + 10)
    responses = sizes.prompts * sizes.group_size
    roles = draw_roles("", range(sizes.new_tokens))
    last_of_perception = int((roles == 1).nonzero().max()) + 1
    last_of_reasoning = int((roles == 2).nonzero().max()) + 1
    perception = int((roles == 1).sum())
    scored = prompt_tokens + responses * (last_of_perception + last_of_reasoning - perception)
    updated = prompt_tokens + responses * sizes.new_tokens
    update = statistics.median(phases[2] for phases in results["grpo"]["phases"])
    return 1 + update / 3 * scored / updated / step_seconds(results["grpo"])


def share_of_peak(condition: str, shape: str, device: str, seconds: float) -> str:
    """Share of the card's bf16 peak that the update reaches, in the products of language model and
    head: 6 operations a weight and token, 4 with LoRA, where frozen weights have no gradient."""
    sizes = sizes_of(shape)
    if device == "cpu" or sizes.model != "qwen2-vl-2b" or seconds == 0:
        return ""
    card = torch.cuda.get_device_name(device)
    peaks = [peak for name, peak in BF16_PEAK.items() if name in card]
    if not peaks:
        return ""
    responses = sizes.prompts * sizes.group_size * sizes.new_tokens  # all that the head sees
    tokens = sizes.prompts * ((sizes.side / 28) ** 2 + 10) + responses
    weights = 1536 * 1536 * (2 + 2 * 2 / 12) + 3 * 1536 * 8960  # of a layer
    operations = sizes.layers * weights * tokens + 1536 * 151936 * responses
    times = 6
    if "lora" in condition:
        times = 4
    return f"{times * operations / seconds / peaks[0]:9.0%}"


# ---- the command line


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line's, checked."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = train.Parser(description="What a training step costs.", formatter_class=form)
    add = parser.add_argument
    count = train.number(int, 1)
    add("--shape", default="short,long", help=f"of {', '.join([*SHAPES, *REAL])}")
    add("--model", choices=MODELS, default="qwen2-vl-2b", help=f"of {', '.join(REAL)}")
    add("--micro-batch", type=count, help="responses, as in train.py; else all, of a --model 8")
    known = f"else {CONDITIONS}; of a --model: {CONDITIONS_REAL}"
    add("--conditions", type=train.filled, help=known)
    add("--turns", type=count, default=3, help="how often each condition runs")
    add("--steps", type=count, default=7, help="steps a turn, of which two warm up")
    add("--against", type=Path, metavar="DIR", help="another version, to run and compare with")
    add("--groups", metavar="G,G,...", help="only this: our SRPO step with these group sizes")
    add("--layers", type=count, help="of the language model of --model; else all")
    add("--dtype", choices=("float32", "bfloat16"), help="of computing; else bfloat16 on a GPU")
    device = train.build_parser().get_default("device")
    add("--device", default=device, help="of all that runs")
    add("--one", nargs=3, metavar=("CONDITION", "SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args) -> None:
    """InputError where something could not be measured, before anything is."""
    train.resolve_options(["--device", args.device])
    for shape in args.shape.split(","):
        if shape not in (*SHAPES, *REAL):
            known = ", ".join([*SHAPES, *REAL])
            raise InputError(f"--shape {args.shape}: {shape!r} is none of {known}")
    if args.conditions is not None:
        for condition in args.conditions.split(","):
            if not KNOWN_CONDITION.fullmatch(condition):
                known = "grpo and srpo, also with -lora, -recompute or both, generate, trl-grpo"
                raise InputError(f"--conditions {args.conditions}: {condition!r}; known: {known}")
            if condition == "trl-grpo" and importlib.util.find_spec("trl") is None:
                raise InputError("--conditions trl-grpo: pip install trl==1.16.0")
            if "lora" in condition:
                model.import_peft()
    if args.groups is not None:
        sizes = set(args.groups.split(","))
        if len(sizes) < 2 or not all(re.fullmatch("[2-9]|[1-9][0-9]{1,3}", size) for size in sizes):
            raise InputError(f"--groups {args.groups}: give two sizes or more, from 2, like 4,8")
    if args.against and not (args.against / "extras/bench.py").exists():
        advice = "git worktree add DIR COMMIT makes a folder of a commit"
        raise InputError(f"--against {args.against}: no extras/bench.py there; {advice}")
    if args.against and args.groups:
        raise InputError("--against: not with --groups")


def whole_patches(height: int, width: int, side: int, *_) -> tuple[int, int]:
    """In the place of `smart_resize`: 45 patches of side 14 are 22 x 23 visual tokens."""
    return height // side * side, -(-width // side) * side


def measure_all(argv: list[str] | None) -> None:
    args = options(argv)
    bench_models.add_real_shapes(args.model, args.layers)
    model.smart_resize = whole_patches
    if args.one:
        condition, shape, folder = args.one
        run = {"trl-grpo": run_trl, "generate": run_generate}.get(condition, run_ours)
        result = run(args, condition, shape, folder)
        print("RESULT " + json.dumps(result), flush=True)
        return
    for shape in args.shape.split(","):
        if shape == "real" and args.device == "cpu":
            print(f"no GPU: four layers of {args.model} and 16 tokens a response")
            shape = "cut"
        bench(args, shape)


def main(argv: list[str] | None = None) -> int:
    return exit_code(measure_all, argv)


def bench(args, shape: str) -> None:
    """Measure one shape and print its table."""
    trees = [str(ROOT)]
    if args.against:
        trees.append(str(args.against))
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for number, tree in enumerate(trees):
            folders[tree] = f"{temporary}/{number}"
            made = [tree, folders[tree], shape, json.dumps(SHAPES[shape])]
            call("the model", ["-c", MAKE, *made])
        if args.groups:
            conditions = [f"srpo-G{size}" for size in args.groups.split(",")]
            by_group(shape, measure(args, conditions, shape, folders))
        else:
            results = measure(args, conditions_of(args, shape), shape, folders)
            table(shape, results, args.device)


def conditions_of(args, shape: str) -> list[str]:
    if args.conditions:
        return args.conditions.split(",")
    conditions = CONDITIONS
    if shape in REAL:
        conditions = CONDITIONS_REAL
    conditions = conditions.split(",")
    if "trl-grpo" in conditions and importlib.util.find_spec("trl") is None:
        conditions.remove("trl-grpo")
        print("trl-grpo is left out: pip install trl==1.16.0")
    return conditions


if __name__ == "__main__":
    sys.exit(main())
