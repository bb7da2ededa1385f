"""Does it work on this GPU, and how fast? One command, under eight minutes, without the hub.

    python extras/gpu_check.py                     the table for the README, for the GPU of here
    python extras/gpu_check.py --device cpu        the same checks without a GPU, smaller

Small models of all families, of random weights, run on the GPU and on the CPU, and their numbers
are compared. Then a Qwen2-VL-2B, of random weights, too, takes a training step. No row depends on
another: one that fails says why in a line, and the next goes on. The exit code is 1 then.
"""

import argparse
import importlib.util
import io
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench  # noqa: E402
import bench_models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from bench_models import MODELS, SHAPES, Shape  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from data import first_line  # noqa: E402
from srpo import without_perception  # noqa: E402

SIDE = 112  # of images in the small checks, pixels
STEPS = ["--steps", "2", "--prompts", "2", "--group-size", "4", "--max-new-tokens", "24"]
STEPS += ["--eval-size", "2", "--eval-every", "0", "--save-every", "0", "--image-size", str(SIDE)]
STEPS += ["--reward", f"{HERE}/gpu_check.py:reward", "--lr", "1e-4"]
# What a float32 log-prob may be off by. Convolutions on a GPU are in TF32 unless told otherwise,
# which has 10 bits.
TOLERANCE = 0.02


def reward(text: str, example) -> float:
    """Some number, so that rewards have a spread whatever a random model writes."""
    return float(sum(text.encode()) % 7)


# ---- small models of all families

WINDOWS = {"window_size": 56, "fullatt_block_indexes": [1]}
STACKED = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
FAMILIES = {  # class, side of a patch in pixels, and what its vision tower has of its own
    "qwen2_vl": ("Qwen2VL", 14, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", 14, WINDOWS),
    "qwen3_vl": ("Qwen3VL", 16, STACKED),
    "qwen3_5": ("Qwen3_5", 16, {"num_position_embeddings": 64}),
}


def make_small(family: str, folder: Path, width: int) -> None:
    """A random model of a family in `folder`: three layers, heads of 32."""
    kind, patch, own = FAMILIES[family]
    spread = {"initializer_range": width**-0.5}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": 4000,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": rope,
        **spread,
    }
    if family == "qwen3_5":
        rope["partial_rotary_factor"] = 1.0
        text["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
        text["linear_num_key_heads"] = 2
        text["linear_num_value_heads"] = 4
        text["linear_key_head_dim"] = 32
        text["linear_value_head_dim"] = 32
    vision = {"depth": 2, "num_heads": 4, "patch_size": patch, **own, **spread}
    if family == "qwen2_vl":
        vision.update(embed_dim=64, hidden_size=width)
    else:
        vision.update(hidden_size=64, intermediate_size=128, out_hidden_size=width)
    MODELS[family] = (kind, text, vision)
    SHAPES[family] = Shape(SIDE, 1, 1, 1, 3, family)
    bench_models.make_folder(folder, family)
    # Without this entry train.py takes it for a real model, not for the tiny one.
    config = json.loads((folder / "config.json").read_text())
    del config["instruction"]
    (folder / "config.json").write_text(json.dumps(config))


# ---- checks of one family: each returns the figure of its cell, or fails


def asked(policy):
    """Two examples, and a demonstration of each as a rollout."""
    examples = data.DrawnTask("count", size=SIDE).train_batch(0, 2)
    rng = np.random.default_rng(0)
    texts = [data.demonstrate(example, 0.0, rng) for example in examples]
    return examples, policy.as_rollout(texts)


@torch.no_grad()
def scores(policy) -> torch.Tensor:
    """All log-probs that SRPO takes, on the CPU: as written, with corrupted images, and blank."""
    args = train.resolve_options(["--device", "cpu"])
    examples, written = asked(policy)
    prompts = policy.encode(examples)
    copies = train.corrupted_copies(examples, policy, args, step=1)
    corrupted = policy.encode(copies, fitted=True)
    roles = train.response_roles(policy.decode(written), written)
    visible = without_perception(written.mask, roles)
    found = [
        policy.log_probs(prompts, written, 1.0),
        policy.log_probs(corrupted, written, 1.0),
        policy.log_probs(prompts, written, 1.0, visible),
    ]
    return torch.stack(found).cpu()


def close(difference: float) -> str:
    if not difference < TOLERANCE:
        raise ValueError(f"off by {difference:.1e}, of {TOLERANCE} that are allowed")
    return short(difference)


def short(difference: float) -> str:
    if difference == 0:
        return "0"
    return f"{difference:.0e}"


def check_log_probs(folder: str, device: str) -> str:
    one = scores(model.load(folder, device=device))
    other = scores(model.load(folder))
    return close((one - other).abs().max().item())


def check_gradient(folder: str, device: str) -> str:
    """Relative difference of the gradient of all weights."""
    gradients = []
    for place in (device, "cpu"):
        policy = model.load(folder, device=place)
        examples, written = asked(policy)
        policy.log_probs(policy.encode(examples), written, 1.0).sum().backward()
        found = [x.grad.flatten() for x in policy.model.parameters() if x.grad is not None]
        gradients.append(torch.cat(found).cpu())
    return close(((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item())


@torch.no_grad()
def check_sampling(folder: str, device: str) -> str:
    """Log-probs of tokens sampled there, beside those that the CPU scores."""
    policy = model.load(folder, device=device)
    examples, _ = asked(policy)
    rng = torch.Generator(device).manual_seed(0)
    limits = {"max_new_tokens": 24, "temperature": 1.0, "generator": rng}
    there = policy.sample(policy.encode(examples), 4, **limits)
    columns = (there.ids, there.mask, there.logp, there.entropy, there.prompt)
    here = model.Rollout(*[x.cpu() for x in columns])
    policy = model.load(folder)
    logp = policy.log_probs(policy.encode(examples), here, 1.0)
    return close((logp - here.logp).abs().max().item())


def trained(folder: str, *options: str) -> list[dict]:
    """Records of the steps of a run of train.py, whose folder goes again."""
    with tempfile.TemporaryDirectory() as work:
        return train_in(f"{work}/run", "--model", folder, *STEPS, *options)


def train_in(out: str, *options: str) -> list[dict]:
    """Records of the steps of a run in `out`, new or resumed. Fails with the line that it says."""
    if "--resume" not in options:
        options = (*options, "--out", out)
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            code = train.main(list(options))
    except SystemExit as stop:  # an option that is none
        code = stop.code
    if code == 128 + signal.SIGINT:  # Ctrl-C ends all rows, not this one alone
        raise KeyboardInterrupt
    if code != 0:
        raise RuntimeError(said.buffer.getvalue().decode().strip().splitlines()[-1])
    return [record for record in train.Run(out).log() if "eval" not in record]


def training(*options: str):
    """A check of a few steps with these options: `ratio_off`, the largest of them.

    That is how far the ratio between sampling and scoring is from 1, by rounding alone.
    """

    def check(folder: str, device: str) -> str:
        records = trained(folder, *options, "--device", device)
        largest = max(record["ratio_off"] for record in records)
        skipped = sum(record["skipped"] for record in records)
        if skipped == len(records):
            raise ValueError(f"all {skipped} steps were skipped: gradients overflow")
        if skipped > 0:
            return f"{short(largest)} ({skipped} of {len(records)} steps skipped)"
        return short(largest)

    return check


def check_adapters(folder: str, device: str) -> str:
    """Adapters trained there, loaded again there and on the CPU."""
    with tempfile.TemporaryDirectory() as work:
        out = f"{work}/run"
        train_in(out, "--model", folder, *STEPS, "--lora", "4", "--device", device)
        return check_log_probs(str(train.Run(out).checkpoint()), device)


def metrics_off(record: dict, other: dict) -> float:
    """The largest difference of a metric in one step; seconds aside. NaN where one is."""
    differences = [0.0]
    for name, value in record.items():
        if value is not None and not name.startswith("sec_"):
            differences.append(abs(value - other[name]))
    return torch.tensor(differences).max().item()


def check_recompute(folder: str, device: str) -> str:
    options = ["--dtype", "float32", "--device", device]
    first, _ = trained(folder, *options)
    again, _ = trained(folder, *options, "--recompute")
    return close(metrics_off(first, again))


def check_resume(folder: str, device: str) -> str:
    """Step 3 after a pause, beside step 3 without. Rounding of a GPU may change a token."""
    options = ["--model", folder, *STEPS, "--dtype", "float32", "--device", device]
    with tempfile.TemporaryDirectory() as work:
        whole = train_in(f"{work}/whole", *options, "--steps", "3")
        train_in(f"{work}/run", *options)
        resumed = train_in(f"{work}/run", "--resume", f"{work}/run", "--steps", "3")
    difference = metrics_off(whole[2], resumed[2])
    if device == "cpu" or not math.isfinite(difference):
        return close(difference)
    return short(difference)


MORE = ["--kl-coef", "0.1", "--inner-epochs", "2", "--train-vision", "--micro-batch", "3"]
CHECKS = {
    "log-probs beside the CPU's: largest difference": check_log_probs,
    "gradient beside the CPU's: relative difference": check_gradient,
    "sampled there, scored on the CPU: largest difference": check_sampling,
    "`ratio_off`, float32": training("--dtype", "float32"),
    "`ratio_off`, bfloat16": training("--dtype", "bfloat16"),
    # The scaler begins too high, and skips steps until its scale fits.
    "`ratio_off`, float16, 10 steps": training("--dtype", "float16", "--steps", "10"),
    "`ratio_off`, `--lora 4`": training("--lora", "4"),
    "`ratio_off`, KL, two epochs, vision tower": training(*MORE),
    "adapters trained there beside the CPU's: largest difference": check_adapters,
    "`--recompute`: largest difference of a metric": check_recompute,
    "resumed: largest difference of a metric": check_resume,
}


# ---- Qwen2-VL-2B, each condition in a process of its own


def conditions_2b(device: str) -> list[str]:
    """What fits: all weights take about 34 GiB, adapters 11, adapters with --recompute 6."""
    if device == "cpu":
        how = ""
    else:
        _, total = torch.cuda.mem_get_info(device)
        if total > 40 * 2**30:
            how = ""
        elif total > 16 * 2**30:
            how = "-lora"
        else:
            how = "-lora-recompute"
    conditions = ["generate", f"grpo{how}", f"srpo{how}"]
    if how == "" and importlib.util.find_spec("trl"):
        conditions.append("trl-grpo")
    return conditions


def half(device: str) -> str:
    if device == "cpu":
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16"


def run_one(condition: str, shape: str, folder: str, device: str) -> None:
    """Two steps, of which the first warms up. Prints a dict for `one_2b`."""
    if condition == "make":
        torch.set_default_dtype(torch.bfloat16)  # half the memory while it is made
        bench_models.make_folder(Path(folder), shape)
        print("RESULT {}")
        return
    options = {"device": device, "dtype": half(device), "steps": 2, "micro_batch": None}
    runs = {"trl-grpo": bench.run_trl, "generate": bench.run_generate}
    run = runs.get(condition, bench.run_ours)
    print("RESULT " + json.dumps(run(argparse.Namespace(**options), condition, shape, folder)))


def one_2b(condition: str, shape: str, folder: str, device: str, seconds: float) -> dict:
    command = [sys.executable, __file__, "--one", condition, shape, folder, "--device", device]
    try:
        options = {"capture_output": True, "text": True, "timeout": max(1, seconds)}
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        raise RuntimeError("left out, the time is up") from None
    if done.returncode != 0:
        lines = ["killed", *done.stderr.strip().splitlines()]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.split("RESULT ")[1])


def row_2b(condition: str, shape: str, folder: str, device: str, seconds: float) -> str:
    result = one_2b(condition, shape, folder, device, seconds)
    phases = [statistics.median(column) for column in zip(*result["phases"], strict=True)]
    speed = statistics.median(result["tokens"]) / phases[0]
    cells = [f"{x:.2f}" for x in [*phases, sum(phases)]]  # those of `generate` alone are 0.00
    return " | ".join([f"{speed:.0f}", *cells, f"{result['peak']:.1f}"])


# ---- the tables


class Checks:
    """Runs one check after the other; those that fail give "failed" and are counted."""

    def __init__(self):
        self.failed = 0

    def __call__(self, name: str, function, *args):
        start = time.perf_counter()
        try:
            figure = function(*args)
            said = f"{time.perf_counter() - start:.1f} s"
        except Exception as error:  # whatever it does, the next goes on
            self.failed += 1
            figure = "failed"
            said = f"FAILED: {type(error).__name__}, {first_line(error)}"
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        return figure


def name_of(device: str) -> str:
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device)


def small_table(check: Checks, families: list[str], device: str, work: Path) -> list[str]:
    width = 256
    if device == "cpu":
        width = 128
    train.token_roles = bench.draw_roles  # random weights write no tags
    cells = {name: [] for name in CHECKS}
    for family in families:
        folder = work / family
        check(f"{family}, made", make_small, family, folder, width)
        for name, function in CHECKS.items():
            cells[name].append(check(f"{family}, {name}", function, str(folder), device))
    lines = [f"| | {' | '.join(families)} |", "|---" * (1 + len(families)) + "|"]
    for name, figures in cells.items():
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def table_2b(check: Checks, device: str, work: Path, deadline: float) -> list[str]:
    shape = "group"
    if device == "cpu":
        shape = "cut"
    sizes = SHAPES[shape]
    place = (shape, str(work / "2b"), device)
    check("Qwen2-VL-2B, made", one_2b, "make", *place, deadline - time.perf_counter())
    what = f"Qwen2-VL, {sizes.layers} layers, {sizes.prompts} x {sizes.group_size} responses"
    what += f" x {sizes.new_tokens} tokens"
    columns = ["tokens/s", "generate, s", "score, s", "update, s", "step, s", "peak, GiB"]
    lines = [f"| {what} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for condition in conditions_2b(device):
        left = deadline - time.perf_counter()
        figures = check(f"Qwen2-VL-2B, {condition}", row_2b, condition, *place, left)
        lines.append(f"| {condition} | {figures} |")
    return lines


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = train.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", help="cuda (the default), cuda:1, cpu ...")
    add("--families", default=",".join(FAMILIES), help="for the small checks, separated by commas")
    more = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--model-2b", help="a step of a Qwen2-VL-2B, too; by default on a GPU", **more)
    add("--minutes", type=float, default=8.0, help="after which no row of it begins")
    add("--one", nargs=3, metavar=("CONDITION", "SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.families = args.families.split(",")
    for family in args.families:
        if family not in FAMILIES:
            parser.error(f"--families {family}: not one of {', '.join(FAMILIES)}")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # a device that is not there fails in ways of its own
        parser.error(f"--device {args.device}: not possible here ({first_line(error)})")
    if args.model_2b is None:
        args.model_2b = args.device != "cpu"
    return args


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    args = options(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench_models.add_real_shapes("qwen2-vl-2b", None)
    if args.one:
        model.smart_resize = bench.whole_patches
        run_one(*args.one, args.device)
        return 0
    check = Checks()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"{name_of(args.device)}; {versions}", ""]
    with tempfile.TemporaryDirectory() as work:
        lines += small_table(check, args.families, args.device, Path(work))
        if args.model_2b:
            deadline = start + 60 * args.minutes
            lines += ["", *table_2b(check, args.device, Path(work), deadline)]
    print("\n".join(lines))
    minutes = (time.perf_counter() - start) / 60
    print(f"{check.failed} rows failed, {minutes:.1f} minutes", file=sys.stderr)
    return min(1, check.failed)


if __name__ == "__main__":
    sys.exit(main())
