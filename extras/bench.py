"""What a training step costs: GRPO, SRPO, the plain path, and TRL's GRPOTrainer on the same model, images and lengths.

    python extras/bench.py                        both shapes on this machine; TRL too where it is installed
    python extras/bench.py --shape short --turns 2 --steps 6
    python extras/bench.py --shape 2b             Qwen2-VL-2B from its configuration, full and with LoRA, beside plain
                                                  `generate`; on a CPU two layers of it and short responses
    python extras/bench.py --shape 2b-group --conditions srpo-lora --dtype bfloat16 --turns 1 --steps 3
                                                  one group of it, what a micro-batch holds: peak memory, on a CPU too

Every condition runs in a process of its own, in turns, so that a busy machine slows all of them; the table has the
median over the steps of all turns, after two warm-up steps a turn. Weights are random, so no response has the tags and
none is right: rewards and roles are drawn instead (40 % of the tokens perception, 40 % reasoning). That changes what is
learned, not what it costs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

WARMUP = 2
# image side, prompts, group, new tokens, layers, width, words of vocabulary
SHAPES = {
    "short": (96, 1, 8, 64, 4, 256, 4000),  # 36 visual tokens
    "long": (512, 1, 8, 64, 4, 256, 4000),  # 1,024 visual tokens
    "2b": (630, 8, 8, 256, 28, None, None),  # 506 visual tokens, the configuration of Qwen2-VL-2B
    "2b-group": (630, 1, 8, 256, 28, None, None),  # one prompt of it
    "2b-cut": (112, 1, 8, 16, 2, None, None),  # two layers of it: the same code where there is no GPU
}
CONDITIONS = ("grpo", "srpo", "grpo-plain", "srpo-plain", "trl-grpo")
CONDITIONS_2B = ("generate", "grpo", "srpo", "grpo-lora", "srpo-lora")
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense operations a second, from the makers' data sheets
QWEN2_VL_2B = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "patch_size": 14},
}


def make_folder(folder: Path, shape: str) -> None:
    """A model of random weights in the layout of the hub, with the tiny model's words and as many made-up ones as needed."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    _, _, _, _, layers, width, words = SHAPES[shape]
    policy = model.build_tiny()
    sizes = QWEN2_VL_2B
    sizes["text_config"]["num_hidden_layers"], sizes["vision_config"]["depth"] = layers, 4 if shape == "2b-cut" else 32
    if words:
        policy.tokenizer.add_tokens([f"w{i}" for i in range(words - len(policy.tokenizer))])
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
        heads = {"num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": 2}
        text = {"vocab_size": words, "hidden_size": width, "intermediate_size": 3 * width, "rope_parameters": rope}
        eyes = {"depth": 2, "embed_dim": 64, "hidden_size": width, "num_heads": 4, "patch_size": 8}
        sizes = {"text_config": text | heads, "vision_config": eyes}
    special = {k: v for k, v in policy.model.config.to_dict().items() if k.endswith("_token_id")}
    sizes["text_config"] |= {"bos_token_id": None, "eos_token_id": policy.eos[0], "pad_token_id": policy.pad}
    config = Qwen2VLConfig(**sizes, **special, tie_word_embeddings=True, instruction="")
    torch.manual_seed(0)
    policy.model = Qwen2VLForConditionalGeneration(config)
    policy.image_processor.patch_size = config.vision_config.patch_size
    policy.image_processor.size = {"shortest_edge": 256, "longest_edge": 2**20}
    policy.save(folder)


def draw_roles(text, offsets, **_) -> torch.Tensor:
    """Roles in a response without tags: token 0 opens, then 40 % perception, a gap, 40 % reasoning, and the answer."""
    T = len(offsets)
    roles = torch.zeros(T, dtype=torch.long)
    roles[1 : 1 + 2 * T // 5], roles[3 + 2 * T // 5 : 3 + 4 * T // 5] = 1, 2
    return roles


def run_ours(condition: str, shape: str, folder: str, steps: int, device: str, dtype: str | None = None) -> dict:
    side, prompts, group, new_tokens, *_ = SHAPES[shape]
    group = int(condition.split("-G")[1]) if "-G" in condition else group
    rng = np.random.default_rng(0)
    train.token_roles = draw_roles
    train.verify = lambda text, example, **_: data.Verdict(float(rng.random()), 0.0, 0.0)
    options = {
        "--model": folder, "--task": "count", "--image-size": side, "--prompts": prompts, "--group-size": group,
        "--max-new-tokens": new_tokens, "--steps": steps, "--eval-size": 1, "--eval-every": 0, "--save-every": 0,
        "--algo": condition.split("-")[0], "--device": device, "--micro-batch": 4096 if shape == "2b" else 10**6, "--sample-every": 0,
    }  # fmt: skip
    argv = [str(x) for pair in options.items() for x in pair]
    argv += ["--plain"] if "plain" in condition else []
    argv += ["--lora", "16"] if "lora" in condition else []
    argv += ["--dtype", dtype] if dtype else []
    train.save_checkpoint = lambda *_: None
    train.summarize = lambda *_: None
    with tempfile.TemporaryDirectory() as out:
        if train.main([*argv, "--out", out]) != 0:
            sys.exit(2)
        records = [r for r in train.read_log(Path(out)) if "eval" not in r][WARMUP:]
    phases = [[r["sec_generate"], r["sec_score"], r["sec_update"]] for r in records]
    tokens = [r["length"] * prompts * group for r in records]
    return {"phases": phases, "tokens": tokens, "peak": train.peak_memory(device)}


def run_generate(shape: str, folder: str, steps: int, device: str) -> dict:
    """`generate` of transformers as it comes, on the same prompts, each repeated for its group; bf16 weights on a GPU."""
    policy = model.load(folder, device=device)
    side, prompts, group, new_tokens, *_ = SHAPES[shape]
    if device != "cpu":
        policy.model.to(torch.bfloat16)
    inputs = policy._prompt_inputs(
        policy.encode(data.DrawnTask("count", size=side).train_batch(0, prompts)),
        torch.arange(prompts, device=policy.device).repeat_interleave(group),
    )
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == policy.image_token).int()
    inputs.pop("position_ids")  # generate counts them itself
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        policy.model.generate(**inputs, do_sample=True, top_k=0, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    phases = [[x, 0.0, 0.0] for x in seconds[WARMUP:]]
    return {"phases": phases, "tokens": [prompts * group * new_tokens] * len(phases), "peak": train.peak_memory(device)}


def share_of_peak(condition: str, shape: str, device: str, seconds: float) -> str:
    """Of the card's bf16 peak, reached in the update: matrix products of the language model and its head alone, 6 operations
    a weight and token (4 with LoRA, whose frozen weights need no gradient), every prompt read once."""
    peak = [p for name, p in BF16_PEAK.items() if device != "cpu" and name in torch.cuda.get_device_name(device)]
    if not peak or not shape.startswith("2b") or not seconds:
        return ""
    side, prompts, group, T, layers, *_ = SHAPES[shape]
    text = QWEN2_VL_2B["text_config"]
    H, I, heads = text["hidden_size"], text["intermediate_size"], text["num_key_value_heads"] / text["num_attention_heads"]
    prompt = prompts * ((side // 28) ** 2 + 10)
    operations = layers * (H * H * (2 + 2 * heads) + 3 * H * I) * (prompt + prompts * group * T)
    operations += H * text["vocab_size"] * prompts * group * T  # the head sees response positions only
    return f"{operations * (4 if 'lora' in condition else 6) / seconds / peak[0]:9.0%}"


def processor_for(policy):
    """What GRPOTrainer asks of a Qwen2-VL processor, without the video part, which needs torchvision."""
    from transformers import ProcessorMixin

    class Processor(ProcessorMixin):
        def __init__(self):
            self.tokenizer, self.image_processor = policy.tokenizer, policy.image_processor
            self.chat_template = policy.tokenizer.chat_template

        def apply_chat_template(self, conversation, tokenize=False, return_dict=False, add_generation_prompt=True, **_):
            one = isinstance(conversation[0], dict)
            texts = [
                self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=add_generation_prompt)
                for c in ([conversation] if one else conversation)
            ]
            if not tokenize:
                return texts[0] if one else texts
            images = [[p["image"] for m in c for p in m["content"] if p["type"] == "image"] for c in conversation]
            return self(images=images, text=texts)

        def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
            vision = self.image_processor([i for row in images for i in row], return_tensors="pt")
            counts = iter((vision["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist())
            rows = [self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in text]
            rows = [[x for i in row for x in ([i] * next(counts) if i == policy.image_token else [i])] for row in rows]
            kinds = [[int(i == policy.image_token) for i in row] for row in rows]
            masks = [[1] * len(row) for row in rows]
            fields = {"input_ids": rows, "attention_mask": masks, "mm_token_type_ids": kinds}
            if return_tensors:  # padded on the left
                width, filler = max(map(len, rows)), {"input_ids": policy.pad}
                fields = {
                    k: torch.tensor([[filler.get(k, 0)] * (width - len(r)) + r for r in v]) for k, v in fields.items()
                }
            return fields | dict(vision)

        def batch_decode(self, *args, **kwargs):
            return self.tokenizer.batch_decode(*args, **kwargs)

        def save_pretrained(self, *_, **__):
            pass

    return Processor()


def run_trl(shape: str, folder: str, steps: int, device: str) -> dict:
    """TRL's GRPOTrainer as a user starts it, less what would make it slower here: gradient checkpointing and logging."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    policy = model.load(folder)
    side, prompts, group, new_tokens, *_ = SHAPES[shape]

    examples = data.DrawnTask("count", size=side).train_batch(0, steps * prompts)
    rows = [{"prompt": [{"role": "user", "content": e.question}], "image": e.images[0]} for e in examples]
    net = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
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

    class StepEnd(TrainerCallback):
        def on_step_end(self, *_, **__):
            begin, scored = clock[-2:]
            phases.append([generate[-1], scored - begin - generate[-1], time.perf_counter() - scored])

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out, per_device_train_batch_size=prompts * group, num_generations=group, max_completion_length=new_tokens,
            max_steps=steps, temperature=1.0, learning_rate=1e-6, beta=0.0, gradient_checkpointing=False, bf16=False,
            use_cpu=device == "cpu", report_to=[], save_strategy="no", logging_steps=10**6, disable_tqdm=True, seed=0,
        )  # fmt: skip
        reward = lambda completions, **_: rng.random(len(completions)).tolist()  # noqa: E731
        Timed(net, reward, config, Dataset.from_list(rows), processing_class=processor_for(policy), callbacks=[StepEnd()]).train()
    tokens = prompts * group * new_tokens
    return {"phases": phases[WARMUP:], "tokens": [tokens] * (steps - WARMUP), "peak": train.peak_memory(device)}


def floor(shape: str, results: dict[str, dict]) -> float:
    """SRPO / GRPO if the two counterfactual passes cost what their tokens cost in the update, a third of it a forward.

    The update reads each prompt once and every response token, forward and backward: three forward units a token. The
    corrupted pass reads the prompts again and the responses up to the last perception token; the blank pass reuses the
    prompts as read for sampling, and reads the responses up to the last reasoning token without the perception.
    """
    side, prompts, group, T, *_ = SHAPES[shape]
    square = (14 if shape.startswith("2b") else 8) * 2
    L = prompts * ((side // square) ** 2 + 10)
    roles = draw_roles("", [None] * T)
    last = [int((roles == role).nonzero().max()) + 1 for role in (1, 2)]
    extra = L + prompts * group * (last[0] + last[1] - int((roles == 1).sum()))
    update = statistics.median(p[2] for p in results["grpo"]["phases"])
    step = statistics.median(map(sum, results["grpo"]["phases"]))
    return 1 + update / 3 * extra / (L + prompts * group * T) / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", default="short,long", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--conditions", help=f"default: {','.join(CONDITIONS)}; for 2b: {','.join(CONDITIONS_2B)}")
    parser.add_argument("--turns", type=int, default=3, help="how often each condition runs")
    parser.add_argument("--steps", type=int, default=7, help=f"steps a turn, of which {WARMUP} warm up")
    parser.add_argument("--groups", metavar="G,G,...", help="only this: our SRPO step with these group sizes, in turns")
    parser.add_argument("--profile", action="store_true", help="only this: where the time of an SRPO step goes")
    parser.add_argument("--layers", type=train.number(int, 1), default=28, help="of the language model of the 2b shapes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of computing; by default as train.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=3, metavar=("CONDITION", "SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= WARMUP:
        parser.error(f"--steps must be above {WARMUP}, which warm up")
    for shape in ("2b", "2b-group"):
        SHAPES[shape] = (*SHAPES[shape][:4], args.layers, None, None)
    if args.one:
        condition, shape, folder = args.one
        special = {"trl-grpo": run_trl, "generate": run_generate}
        run = special.get(condition) or partial(run_ours, condition, dtype=args.dtype)
        print("RESULT " + json.dumps(run(shape, folder, args.steps, args.device)), flush=True)
        return
    try:
        import trl  # noqa: F401
    except ImportError:
        trl = None
    asked = args.conditions
    for shape in args.shape.split(","):
        if shape == "2b" and args.device == "cpu":
            shape = "2b-cut"
            print("no GPU: two layers of Qwen2-VL-2B and 16 tokens a response")
        chosen = asked or ",".join(CONDITIONS_2B if shape.startswith("2b") else CONDITIONS)
        args.conditions = ",".join(c for c in chosen.split(",") if trl or not c.startswith("trl"))
        if args.conditions != chosen:
            print("trl-grpo is left out: pip install trl==1.16.0")
        with tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder), shape)
            if args.profile:
                profile(shape, folder, args.steps, args.device)
            elif args.groups:
                args.conditions = ",".join(f"srpo-G{g}" for g in args.groups.split(","))
                by_group(shape, measure(args, shape, folder))
            else:
                table(shape, measure(args, shape, folder), args.device)


def profile(shape: str, folder: str, steps: int, device: str) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * device.startswith("cuda")
    with torch.profiler.profile(activities=kinds) as found:
        run_ours("srpo", shape, folder, steps, device)
    key = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=45))


def by_group(shape: str, results: dict[str, dict]) -> None:
    """Seconds a step = prompt + G * response: fitted to the medians, the prompt's part is what G does not change."""
    groups = [int(name.split("-G")[1]) for name in results]
    steps = [statistics.median(map(sum, r["phases"])) for r in results.values()]
    response, prompt = np.polyfit(groups, steps, 1)
    print(f"\n{shape}: prompt {prompt:.3f} s + G x {response:.3f} s a step")
    for G, step in zip(groups, steps, strict=True):
        print(f"G = {G:3d}: {step:.3f} s, {step / G:.3f} s a response; the prompt's share {prompt / step:.2f}")


def measure(args, shape: str, folder: str) -> dict[str, dict]:
    results = {}
    for _ in range(args.turns):
        for condition in args.conditions.split(","):
            command = [sys.executable, __file__, "--one", condition, shape, folder]
            command += ["--steps", str(args.steps), "--device", args.device, "--layers", str(args.layers)]
            command += ["--dtype", args.dtype] if args.dtype else []
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
            if done.returncode:
                sys.exit(f"{condition} failed: {done.stderr.strip().splitlines()[-1:]}")
            found = json.loads(done.stdout.split("RESULT ")[1])
            kept = results.setdefault(condition, {"phases": [], "tokens": [], "peak": 0.0})
            kept["phases"] += found["phases"]
            kept["tokens"] += found["tokens"]
            kept["peak"] = max(kept["peak"], found["peak"])
    return results


def table(shape: str, results: dict[str, dict], device: str) -> None:
    side, prompts, group, new_tokens, *_ = SHAPES[shape]
    print(f"\n{shape}: {side}x{side} image, {prompts} prompt(s) x {group} responses x {new_tokens} tokens; median seconds a step")
    names = ("generate", "score", "update", "step", "vs grpo", "tokens/s", "peak GiB", "steps", "of peak")
    print(f"{'':12}" + "".join(f"{n:>10}" for n in names))
    step = {name: statistics.median(map(sum, r["phases"])) for name, r in results.items()}
    for name, r in results.items():
        phases = [statistics.median(p) for p in zip(*r["phases"], strict=True)]
        figures = [*phases, step[name], step[name] / step.get("grpo", step[name])]
        speed = statistics.median(n / p[0] for n, p in zip(r["tokens"], r["phases"], strict=True))
        shown = "".join(f"{x:10.3f}" for x in figures)
        print(f"{name:12}{shown}{speed:10.0f}{r['peak']:10.2f}{len(r['phases']):10d} {share_of_peak(name, shape, device, phases[2])}")
    for ours, theirs in (("srpo", "trl-grpo"), ("grpo", "trl-grpo"), ("srpo", "grpo"), ("srpo", "srpo-plain"), ("grpo", "grpo-plain")):
        if ours in step and theirs in step:
            ratio = f"{ours} / {theirs}: {step[ours] / step[theirs]:.2f}"
            print(ratio + (f" (floor {floor(shape, results):.2f})" if (ours, theirs) == ("srpo", "grpo") else ""))


if __name__ == "__main__":
    main()
