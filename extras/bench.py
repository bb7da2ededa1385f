"""What a training step costs: GRPO, SRPO, TRL's GRPOTrainer on the same model, another version of this.

    python extras/bench.py                        both shapes on this machine; TRL too where it is installed
    python extras/bench.py --conditions grpo,srpo --against ../before
                                                  beside another version: git worktree add ../before COMMIT
    python extras/bench.py --shape real           Qwen2-VL-2B from its configuration, full and LoRA, beside
                                                  `generate`; on a CPU four layers of it, short responses
    python extras/bench.py --shape group --model qwen3.5-0.8b --conditions srpo-lora,srpo-lora-recompute
                                                  one group, what a micro-batch holds: peak memory

Every condition runs in a process of its own, in turns, so that a busy machine slows all of them; the table
has the median over the steps of all turns, after two warm-up steps a turn (of two steps one, of one none; in
the first there are no moments of Adam yet, so peak memory takes two). Weights are random, so no response has
the tags and none is right: rewards and roles are drawn instead (40 % of the tokens perception, 40 %
reasoning). That changes what is learned, not what it costs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model  # noqa: E402
import recompute  # noqa: E402
import train  # noqa: E402

WARMUP = 2
# image side, prompts, group, new tokens, layers, width, words of vocabulary
SHAPES = {
    "short": (96, 1, 8, 64, 4, 256, 4000),  # 36 visual tokens
    "long": (512, 1, 8, 64, 4, 256, 4000),  # 1,024 visual tokens
}
# of --model, at its sizes: image side in patches, prompts, group, new tokens; "cut" has four layers
REAL = {"real": (45, 8, 8, 256), "group": (45, 1, 8, 256), "cut": (8, 1, 8, 16)}  # 45: 506 visual tokens
CONDITIONS = ("grpo", "srpo", "trl-grpo")
CONDITIONS_REAL = ("generate", "grpo", "srpo", "grpo-lora", "srpo-lora")
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense operations a second, by the data sheets
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
ROPE_3_5 = ROPE | {"rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
QWEN3_5 = {
    "vocab_size": 248320, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
    "linear_num_value_heads": 16, "rope_parameters": ROPE_3_5,
}  # fmt: skip
MODELS = {  # class, text and vision configuration, as on the hub; the class's own values are left out
    "qwen2-vl-2b": ("Qwen2VL", {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "rope_parameters": ROPE,
    }, {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "patch_size": 14}),
    "qwen3.5-0.8b": ("Qwen3_5", QWEN3_5 | {"hidden_size": 1024, "intermediate_size": 3584}, {
        "depth": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072, "patch_size": 16}),
    "qwen3.5-2b": ("Qwen3_5", QWEN3_5 | {"hidden_size": 2048, "intermediate_size": 6144}, {
        "depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 16}),
}  # fmt: skip
MAKE = """import json, sys; from pathlib import Path
tree, folder, shape, sizes = sys.argv[1:]
sys.path.insert(0, tree + "/extras"); import bench
bench.SHAPES[shape] = tuple(json.loads(sizes))
bench.make_folder(Path(folder), shape)"""


def make_folder(folder: Path, shape: str) -> None:
    """Random weights in the layout of the hub; the words are the tiny model's and made-up ones."""
    _, _, _, _, layers, width, words = SHAPES[shape]
    policy = model.build_tiny()
    if words:
        policy.tokenizer.add_tokens([f"w{i}" for i in range(words - len(policy.tokenizer))])
        text = {"vocab_size": words, "hidden_size": width, "intermediate_size": 3 * width}
        text |= {"num_attention_heads": width // 64, "num_key_value_heads": 2}
        text |= {"rope_parameters": ROPE | {"rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
        eyes = {"depth": 2, "embed_dim": 64, "hidden_size": width, "num_heads": 4, "patch_size": 8}
    kind, text, eyes = ("Qwen2VL", text, eyes) if words else MODELS[width]
    eyes |= {"out_hidden_size": text["hidden_size"]} if kind == "Qwen3_5" else {}
    eyes |= {"depth": 4} if shape == "cut" else {}
    special = {k: v for k, v in policy.model.config.to_dict().items() if k.endswith("_token_id")}
    text |= {"bos_token_id": None, "eos_token_id": policy.eos[0], "pad_token_id": policy.pad}
    text |= {"num_hidden_layers": layers} | (tied := {"tie_word_embeddings": True})
    config = getattr(transformers, f"{kind}Config")
    config = config(text_config=text, vision_config=eyes, **special, **tied, instruction="")
    torch.manual_seed(0)
    policy.model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    policy.model.to(torch.float32 if words else torch.bfloat16)  # as on the hub
    policy.image_processor.patch_size = eyes["patch_size"]
    policy.image_processor.size = {"shortest_edge": 256, "longest_edge": 2**20}
    policy.save(folder)


# ---------------------------------------------------------------------------------------------- one condition


def draw_roles(text, offsets, **_) -> torch.Tensor:
    """Roles in a response without tags: token 0, 40 % perception, a gap, 40 % reasoning, the answer."""
    T = len(offsets)
    roles = torch.zeros(T, dtype=torch.long)
    roles[1 : 1 + 2 * T // 5], roles[3 + 2 * T // 5 : 3 + 4 * T // 5] = 1, 2
    return roles


def run_ours(args, condition: str, shape: str, folder: str) -> dict:
    side, prompts, group, new_tokens, *_ = SHAPES[shape]
    group = int(condition.split("-G")[1]) if "-G" in condition else group
    rng = np.random.default_rng(0)
    train.token_roles = draw_roles
    train.verify = lambda text, example: data.Verdict(float(rng.random()), 0.0, 0.0)
    train.summarize = train.Run.save = lambda *_: None
    train.evaluate = lambda *_, **__: {"step": 0, "eval": {}}
    options = {
        "--model": folder, "--task": "count", "--image-size": side, "--prompts": prompts,
        "--group-size": group, "--max-new-tokens": new_tokens, "--steps": args.steps, "--eval-size": 1,
        "--eval-every": 0, "--save-every": 0, "--algo": condition.split("-")[0], "--device": args.device,
        "--micro-batch": args.micro_batch or (4096 if shape in REAL else 10**6),
    }  # fmt: skip
    argv = [str(x) for pair in options.items() for x in pair]
    argv += ["--lora", "16"] * ("lora" in condition) + (["--dtype", args.dtype] if args.dtype else [])
    with tempfile.TemporaryDirectory() as out:
        if (recompute if "recompute" in condition else train).main([*argv, "--out", out]) != 0:
            sys.exit(2)
        records = [r for r in train.Run(out).log() if "eval" not in r][WARMUP:]
    phases = [[r["sec_generate"], r["sec_score"], r["sec_update"]] for r in records]
    tokens = [r["length"] * prompts * group for r in records]
    return {"phases": phases, "tokens": tokens, "peak": peak_memory(args.device)}


def run_generate(args, condition: str, shape: str, folder: str) -> dict:
    """`generate` of transformers as it comes, on the same prompts; bf16 weights on a GPU."""
    policy = model.load(folder, device=args.device)
    side, prompts, group, new_tokens, *_ = SHAPES[shape]
    if args.device != "cpu":
        policy.model.to(torch.bfloat16)
    read = policy.encode(data.DrawnTask("count", size=side).train_batch(0, prompts))
    ids = read.ids.repeat_interleave(group, 0)
    inputs = {"input_ids": ids, "attention_mask": read.mask.repeat_interleave(group, 0)}
    inputs["pixel_values"] = torch.cat([x for x in read.pixels for _ in range(group)])
    inputs["image_grid_thw"] = torch.cat([x for x in read.grids for _ in range(group)])
    inputs["mm_token_type_ids"] = (ids == policy.image_token).int()
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        policy.model.generate(**inputs, **options)
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    phases, tokens = [[x, 0.0, 0.0] for x in seconds[WARMUP:]], prompts * group * new_tokens
    return {"phases": phases, "tokens": [tokens] * len(phases), "peak": peak_memory(args.device)}


def processor_for(policy):
    """What GRPOTrainer asks of a Qwen2-VL processor, without the video part, which needs torchvision."""

    class Processor(transformers.ProcessorMixin):
        def __init__(self):
            self.tokenizer, self.image_processor = policy.tokenizer, policy.image_processor
            self.chat_template = policy.tokenizer.chat_template

        def apply_chat_template(
            self, conversation, tokenize=False, return_dict=False, add_generation_prompt=True, **_
        ):
            one = isinstance(conversation[0], dict)
            options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            conversations = [conversation] if one else conversation
            texts = [self.tokenizer.apply_chat_template(c, **options) for c in conversations]
            if not tokenize:
                return texts[0] if one else texts
            parts = [[part for turn in c for part in turn["content"]] for c in conversation]
            images = [[part["image"] for part in c if part["type"] == "image"] for c in parts]
            return self(images=images, text=texts)

        def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
            vision = self.image_processor([i for row in images for i in row], return_tensors="pt")
            counts = iter((vision["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist())
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            times = lambda i: next(counts) if i == policy.image_token else 1  # noqa: E731
            rows = [[x for i in row for x in [i] * times(i)] for row in ids]
            fields = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
            fields["mm_token_type_ids"] = [[int(i == policy.image_token) for i in row] for row in rows]
            if return_tensors:  # padded on the left
                L, filler = max(map(len, rows)), {"input_ids": policy.pad}
                padded = lambda k, row: [filler.get(k, 0)] * (L - len(row)) + row  # noqa: E731
                fields = {k: torch.tensor([padded(k, row) for row in v]) for k, v in fields.items()}
            return fields | dict(vision)

        def batch_decode(self, *args, **kwargs):
            return self.tokenizer.batch_decode(*args, **kwargs)

        def save_pretrained(self, *_, **__):
            pass

    return Processor()


def run_trl(args, condition: str, shape: str, folder: str) -> dict:
    """TRL's GRPOTrainer as it comes, less what would slow it down: gradient checkpointing and logging."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy = model.load(folder)
    side, prompts, group, new_tokens, *_ = SHAPES[shape]
    examples = data.DrawnTask("count", size=side).train_batch(0, args.steps * prompts)
    rows = [{"prompt": [{"role": "user", "content": e.question}], "image": e.images[0]} for e in examples]
    net = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    net.model.visual.requires_grad_(False)  # as in our default
    rng, clock, phases, generate = np.random.default_rng(0), [], [], []

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._generate(*args, **kwargs)
            generate.append(time.perf_counter() - start)
            return result

        def _generate_and_score_completions(self, *args, **kwargs):
            clock.append(time.perf_counter())
            result = super()._generate_and_score_completions(*args, **kwargs)
            clock.append(time.perf_counter())
            return result

    class StepEnd(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            begin, scored = clock[-2:]
            phases.append([generate[-1], scored - begin - generate[-1], time.perf_counter() - scored])

    def reward(completions, **_):
        return rng.random(len(completions)).tolist()

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out, per_device_train_batch_size=prompts * group, num_generations=group, max_steps=args.steps,
            max_completion_length=new_tokens, temperature=1.0, learning_rate=1e-6, beta=0.0, bf16=False,
            gradient_checkpointing=False, use_cpu=args.device == "cpu", report_to=[], save_strategy="no",
            logging_steps=10**6, disable_tqdm=True, seed=0,
        )  # fmt: skip
        more = {"processing_class": processor_for(policy), "callbacks": [StepEnd()]}
        Timed(net, reward, config, Dataset.from_list(rows), **more).train()
    tokens = [prompts * group * new_tokens] * (args.steps - WARMUP)
    return {"phases": phases[WARMUP:], "tokens": tokens, "peak": peak_memory(args.device)}


def peak_memory(device: str) -> float:
    """GiB: the tensors' peak on a GPU, the process's resident peak on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


# ------------------------------------------------------------------------------------ all of them, and tables


def measure(args, shape: str, folders: dict[str, str]) -> dict[str, dict]:
    """Phases of every condition, under "old CONDITION" those of the other version; `folders` of its model."""
    results = {}
    common = ["--steps", str(args.steps), "--device", args.device]
    for option in ("layers", "dtype", "model", "micro_batch"):  # unasked for, another version may lack it
        if getattr(args, option):
            common += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    for turn in range(args.turns):
        for condition in args.conditions.split(","):
            ours = condition.startswith(("grpo", "srpo"))
            trees = [ROOT] + [args.against] * bool(args.against and ours)
            for tree in trees[:: (-1) ** turn]:
                one = ["--one", condition, shape, folders[str(tree)]]
                said = call(condition, [f"{tree}/extras/bench.py", *one, *common])
                found, name = json.loads(said.split("RESULT ")[1]), f"{'old ' * (tree != ROOT)}{condition}"
                kept = results.setdefault(name, {"phases": [], "tokens": [], "peak": 0.0})
                kept["phases"] += found["phases"]
                kept["tokens"] += found["tokens"]
                kept["peak"] = max(kept["peak"], found["peak"])
    return results


def call(name: str, command: list[str]) -> str:
    """Output of Python with the arguments `command`."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    if "group" in command:  # glibc would keep what is freed, and the peak be more than what is in use
        environment |= {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def table(shape: str, results: dict[str, dict], device: str) -> None:
    side, prompts, group, new_tokens, *_ = SHAPES[shape]
    sizes = f"{side}x{side} image, {prompts} prompt(s) x {group} responses x {new_tokens} tokens"
    print(f"\n{shape}: {sizes}; median seconds a step")
    names = "generate,score,update,step,vs grpo,tokens/s,peak GiB,steps,of peak".split(",")
    print(" " * 20 + "".join(f"{n:>10}" for n in names))
    step = {name: statistics.median(map(sum, r["phases"])) for name, r in results.items()}
    for name, r in results.items():
        phases = [statistics.median(p) for p in zip(*r["phases"], strict=True)]
        figures = [*phases, step[name], step[name] / step.get("grpo", step[name])]
        speed = statistics.median(n / p[0] for n, p in zip(r["tokens"], r["phases"], strict=True))
        shown = "".join(f"{x:10.3f}" for x in figures)
        shown += f"{speed:10.0f}{r['peak']:10.2f}{len(r['phases']):10d} "
        print(f"{name:20}{shown}{share_of_peak(name, shape, device, phases[2])}")
    for a, b in (("srpo", "trl-grpo"), ("grpo", "trl-grpo"), ("srpo", "grpo")):
        if a in step and b in step:
            least = f" (floor {floor(shape, results):.2f})" if (a, b) == ("srpo", "grpo") else ""
            print(f"{a} / {b}: {step[a] / step[b]:.2f}{least}")
    for name in [name for name in step if f"old {name}" in step]:
        old, new = step[f"old {name}"], step[name]
        print(f"{name}, seconds a step: old {old:.3f}, new {new:.3f}, new / old {new / old:.3f}")


def by_group(shape: str, results: dict[str, dict]) -> None:
    """Seconds a step = prompt + G * response, fitted to the medians."""
    groups = [int(name.split("-G")[1]) for name in results]
    steps = [statistics.median(map(sum, r["phases"])) for r in results.values()]
    response, prompt = np.polyfit(groups, steps, 1)
    print(f"\n{shape}: prompt {prompt:.3f} s + G x {response:.3f} s a step")
    for G, step in zip(groups, steps, strict=True):
        share = f"share of the prompt {prompt / step:.2f}"
        print(f"G = {G:3d}: {step:.3f} s, {step / G:.3f} s a response; {share}")


def floor(shape: str, results: dict[str, dict]) -> float:
    """SRPO / GRPO if both counterfactual passes cost what their tokens cost forward in the update, a third:
    prompts and responses to the last of perception; responses to the last of reasoning without perception."""
    side, prompts, group, T, _, width, words = SHAPES[shape]
    square = (8 if words else MODELS[width][2]["patch_size"]) * 2
    L = prompts * ((side / square) ** 2 + 10)
    roles = draw_roles("", [None] * T)
    last = [int((roles == role).nonzero().max()) + 1 for role in (1, 2)]
    extra = L + prompts * group * (last[0] + last[1] - int((roles == 1).sum()))
    update = statistics.median(p[2] for p in results["grpo"]["phases"])
    step = statistics.median(map(sum, results["grpo"]["phases"]))
    return 1 + update / 3 * extra / (L + prompts * group * T) / step


def share_of_peak(condition: str, shape: str, device: str, seconds: float) -> str:
    """Of the card's bf16 peak, reached in the update: matrix products of the language model and its head,
    6 operations a weight and token (4 with LoRA: no gradient of frozen weights), each prompt read once."""
    card = "" if device == "cpu" else torch.cuda.get_device_name(device)
    peak = [p for name, p in BF16_PEAK.items() if name in card]
    side, prompts, group, T, layers, width, _ = SHAPES[shape]
    if not peak or width != "qwen2-vl-2b" or not seconds:
        return ""
    responses = prompts * group * T  # all that the head sees
    weights = 1536 * 1536 * (2 + 2 * 2 / 12) + 3 * 1536 * 8960
    tokens = prompts * ((side / 28) ** 2 + 10) + responses
    operations = layers * weights * tokens + 1536 * 151936 * responses
    return f"{operations * (4 if 'lora' in condition else 6) / seconds / peak[0]:9.0%}"


def options() -> argparse.Namespace:
    """The command line's, checked."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    add = parser.add_argument
    add("--shape", default="short,long", help=f"of {', '.join([*SHAPES, *REAL])}")
    add("--model", choices=MODELS, help=f"of {', '.join(REAL)}; else qwen2-vl-2b")
    add("--micro-batch", type=train.number(int, 1), help="as in train.py; else all, of a --model 4096")
    add("--conditions", help=f"default: {','.join(CONDITIONS)}; of a --model: {','.join(CONDITIONS_REAL)}")
    add("--turns", type=int, default=3, help="how often each condition runs")
    add("--steps", type=train.number(int, 1), default=7, help=f"steps a turn, of which {WARMUP} warm up")
    add("--against", type=Path, metavar="DIR", help="run ours from this other version, too, and compare")
    add("--groups", metavar="G,G,...", help="only this: our SRPO step with these group sizes, in turns")
    add("--layers", type=train.number(int, 1), help="of the language model of --model; else all")
    add("--dtype", choices=("float32", "bfloat16"), help="of computing; by default as train.py")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of all that runs")
    add("--one", nargs=3, metavar=("CONDITION", "SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.against and (args.groups or not (args.against / "extras/bench.py").exists()):
        parser.error(f"--against {args.against}: no extras/bench.py there, or --groups, too")
    return args


def main() -> None:
    global WARMUP
    args = options()
    WARMUP = min(WARMUP, args.steps - 1)
    _, text, eyes = MODELS[name := args.model or "qwen2-vl-2b"]
    for shape, (side, *sizes) in REAL.items():
        layers = 4 if shape == "cut" else args.layers or text["num_hidden_layers"]
        SHAPES[shape] = (side * eyes["patch_size"], *sizes, layers, name, None)
    model.smart_resize = lambda h, w, side, *_: (h // side * side, -(-w // side) * side)  # 22 x 23 tokens
    if args.one:
        run = {"trl-grpo": run_trl, "generate": run_generate}.get(args.one[0], run_ours)
        print("RESULT " + json.dumps(run(args, *args.one)), flush=True)
        return
    try:
        import trl  # noqa: F401
    except ImportError:
        trl = None
    asked = args.conditions
    for shape in args.shape.split(","):
        if shape == "real" and args.device == "cpu":
            print(f"no GPU: four layers of {name} and 16 tokens a response")
            shape = "cut"
        chosen = asked or ",".join(CONDITIONS_REAL if shape in REAL else CONDITIONS)
        args.conditions = ",".join(c for c in chosen.split(",") if trl or not c.startswith("trl"))
        if args.conditions != chosen:
            print("trl-grpo is left out: pip install trl==1.16.0")
        with tempfile.TemporaryDirectory() as temporary:
            trees = map(str, [ROOT] + [args.against] * bool(args.against))
            folders = {tree: f"{temporary}/{i}" for i, tree in enumerate(trees)}
            for tree, folder in folders.items():  # each version saves a model of its own
                call("the model", ["-c", MAKE, tree, folder, shape, json.dumps(SHAPES[shape])])
            if args.groups:
                args.conditions = ",".join(f"srpo-G{g}" for g in args.groups.split(","))
                by_group(shape, measure(args, shape, folders))
            else:
                table(shape, measure(args, shape, folders), args.device)


if __name__ == "__main__":
    main()
