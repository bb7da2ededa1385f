"""Train a vision-language model with SRPO, or with GRPO on the same loop, seeds and data (--algo grpo).

    python train.py                                        the built-in tiny model, minutes on two CPU cores
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data my.jsonl --out out/my-run
    python train.py --resume out/my-run                    after a crash, where it stopped

Read `train` from top to bottom: sample, verify, score, weigh, update, report. What is drawn in step k depends
on the seed and on k alone, so a resumed run is the same run.
"""

import argparse
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import data
import model
from corrupt import corrupt
from data import DrawnTask, InputError, OwnTask, averages, demonstrate, first_line, reward_from, verify
from srpo import CHOICES, Role, contrast_scores, group_advantages, kl_to_reference, policy_loss
from srpo import role_aware_advantages, token_roles, token_weights, without_perception

DEFAULTS = {  # what an option left out means: for the tiny model, and for any other
    "steps": (60, 200), "prompts": (32, 8), "max_new_tokens": (64, 512), "micro_batch": (16384, 4096),
    "lr": (5e-5, 1e-6), "image_size": (48, 336)}  # fmt: skip


def train(args: argparse.Namespace, run: "Run") -> None:
    """B responses of up to T tokens a step, G to a prompt; micro-batches, [b, T], in the update alone."""
    task = OwnTask(args.data, args.seed, args.steps == 0) if args.data else drawn_task(args)
    policy, reference, optimizer, start = prepare(args, run)
    held_out, c = task.eval_set(args.eval_size), argparse.Namespace(**args.choice)
    judge = reward_from(args.reward) if args.reward else verify
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    parameters, srpo = optimizer.param_groups[0]["params"], args.algo == "srpo"
    if not run.log():
        run.write(evaluate(policy, held_out, judge, args, step=0))
    steps = range(start + 1, args.steps + 1)
    for step in (bar := tqdm(steps, args.algo, initial=start, total=args.steps, disable=None)):
        clock = [time.perf_counter()]

        # 1. Sample G responses to each prompt. One corrupted image a prompt, shared by its group.
        examples = task.train_batch(step - 1, args.prompts)
        seed, how = (args.seed, step), {"kind": c.corruption, "patch": policy.patch, "p": c.p}
        prompts = policy.encode(examples, srpo and (lambda i, image: corrupt(image, seed=(*seed, i), **how)))
        rollout = policy.sample(prompts, args.group_size, generator=generator(args, step), **sampling)
        mask = rollout.mask  # [B, T], EOS included, padding excluded
        clock.append(time.perf_counter())

        # 2. Verify: a reward for each response, compared within its group, and a role for each token.
        responses = policy.decode(rollout)
        asked = zip(responses, rollout.prompt.tolist(), strict=True)
        verdicts = [judge(text, examples[i]) for (text, _), i in asked]
        A = group_advantages([v.reward for v in verdicts], args.group_size).to(mask.device)  # [B], step 1
        roles = torch.zeros_like(rollout.ids)  # [B, T]
        for row, (text, offsets) in enumerate(responses):
            found = token_roles(text, offsets, answer_is_reasoning=c.answer_is_reasoning)
            roles[row, : len(offsets)] = found.to(roles)
        roles[A == 0] = Role.OTHER  # nothing to weigh, so nothing to score
        P, R, used = roles == Role.PERCEPTION, roles == Role.REASONING, (A != 0) | (args.kl_coef > 0)

        # 3. Score the same tokens: with the corrupted image, without the perception, and by the reference.
        def score(who, **how):
            return who.log_probs(prompts, rollout, temperature=args.temperature, **how)[0]

        logp = logp_corrupted = logp_blank = rollout.logp  # [B, T]
        with torch.no_grad():
            if srpo:
                blank, both = without_perception(mask, roles), c.corrupt_both
                logp_corrupted = score(policy, corrupted=True, wanted=P | (R & both))  # [B, T]
                logp_blank = score(policy, visible=blank, wanted=R, corrupted=both, reuse=not both)  # [B, T]
                logp = torch.where(R & both, logp_corrupted, logp)  # [B, T]
            if reference is not None:
                with reference.as_reference():
                    ref_logp = score(reference)  # [B, T]
        clock.append(time.perf_counter())

        # 4. Weigh the tokens of each response against each other.
        options = {k: args.choice[k] for k in ("tau", "w_min", "w_max", "normalize", "role_balanced")}
        options |= {"flip": A < 0 if c.sign_aware else None}
        logps = logp, logp_corrupted, logp_blank
        delta = contrast_scores(*logps, roles, contrast=c.contrast)  # [B, T], steps 2 to 4
        w = token_weights(delta, roles, **options)  # [B, T], steps 5, 6 and 9
        A_hat = role_aware_advantages(A, w, c.lam)  # [B, T], step 7

        # 5. Update: an optimizer step an inner epoch. Micro-batches add up to the whole batch's gradient.
        total = {"loss": 0.0, "clip_frac": 0.0, "kl": None if reference is None else 0.0, "grad_norm": 0.0}
        old_logp, entropy = torch.zeros_like(logp), torch.zeros_like(logp)  # [B, T]
        for epoch in range(args.inner_epochs):
            for rows in policy.micro_batches(prompts, rollout, used):
                logp, H = policy.log_probs(prompts, rollout[rows], temperature=args.temperature)  # [b, T]
                if epoch == 0:  # no step has been taken yet: this is pi_old
                    old_logp[rows], entropy[rows] = logp.detach(), H
                clip = {"clip_low": args.clip_low, "clip_high": args.clip_high, "denominator": mask.sum()}
                loss, stats = policy_loss(logp, old_logp[rows], A_hat[rows], mask[rows], **clip)  # [], step 8
                if reference is not None:
                    share = mask[rows].sum() / mask.sum()
                    stats["kl"] = share * kl_to_reference(logp, ref_logp[rows], mask[rows])  # []
                    loss = loss + args.kl_coef * stats["kl"]
                loss.backward()
                stats["loss"] = loss
                for name in stats.keys() & total.keys():
                    total[name] += stats[name].item() / args.inner_epochs
            total["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        clock.append(time.perf_counter())

        # 6. Report. A number that nothing in this step could be measured on is null.
        scored = mask & used[:, None]  # [B, T]
        off = ((old_logp - rollout.logp).exp() - 1).abs()  # [B, T], rounding alone
        means = {"entropy": (entropy, scored), "ratio_off": (off, scored)}
        means |= {"w_perception": (w, P), "w_reasoning": (w, R)}
        record = {"step": step, **averages(verdicts), **total, "length": mask.sum(1).float().mean().item()}
        record |= {k: x[where].mean().item() if where.any() else None for k, (x, where) in means.items()}
        record["used_groups"] = int(A.view(-1, args.group_size).any(1).sum())
        record |= zip(("sec_generate", "sec_score", "sec_update"), np.diff(clock).tolist(), strict=True)
        run.write(record)
        bar.set_postfix(reward=f"{record['reward']:.2f}", accuracy=f"{record['accuracy']:.2f}")
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            run.write(evaluate(policy, held_out, judge, args, step))
        if step == args.steps or (args.save_every and step % args.save_every == 0):
            run.save(step, policy, optimizer)  # last: a checkpoint vouches for all lines up to its step
    summarize(run)


def generator(args, step: int, purpose: int = 0) -> torch.Generator:
    """Random numbers of one step; purpose 0 is training, 1 evaluation."""
    seed = np.random.SeedSequence((args.seed, step, purpose)).generate_state(1, np.uint64)[0]
    return torch.Generator(args.device).manual_seed(int(seed >> np.uint64(1)))


def evaluate(policy, examples, judge, args, step: int, batch: int = 64) -> dict:
    """Record of a response to each example, at the training temperature; the same draws every time."""
    texts, rng = [], generator(args, 0, purpose=1)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "generator": rng}
    for first in range(0, len(examples), batch):
        rollout = policy.sample(policy.encode(examples[first : first + batch]), 1, **sampling)
        texts += [text for text, _ in policy.decode(rollout)]
    both = list(zip(texts, examples, strict=True))
    scores = averages([judge(text, e) for text, e in both]) | {"n": len(both)}
    shown = [{"question": e.question, "answer": e.answer, "response": text} for text, e in both[:3]]
    return {"step": step, "eval": scores, "samples": shown}


def summarize(run: "Run") -> None:
    """The first evaluation against the last, and three sample responses."""
    first, *_, last = [r for r in run.log() if "eval" in r] * 2
    print(f"\n{last['eval']['n']} held-out examples: step {first['step']}, step {last['step']}")
    for name, value in last["eval"].items():
        if value is not None and name != "n":
            print(f"{name:12}{first['eval'][name]:10.3f}{value:10.3f}")
    for sample in last["samples"]:
        print("\n{question}  (answer: {answer})\n{response}".format(**sample))
    print(f"\nmetrics and checkpoint: {run.path}")


def drawn_task(args) -> DrawnTask:
    return DrawnTask(args.task, seed=args.seed, size=args.image_size)


def prepare(args, run: "Run"):
    """Policy, reference policy (or None), optimizer, and the number of steps already done."""
    dtype, model.Policy.micro_batch = getattr(torch, args.dtype), args.micro_batch
    load = partial(model.load, device=args.device, dtype=dtype, max_pixels=args.max_pixels)
    initial = args.model if args.model != "tiny" else warmed_up(args)
    policy = load(str((checkpoint := run.checkpoint()) or initial))
    if args.lora and policy.adapter is None:
        policy.add_lora(args.lora)
    elif not args.lora:
        policy.model.model.visual.requires_grad_(args.train_vision)
    reference = None if not args.kl_coef else policy if args.lora else load(str(initial))
    # fp32 master weights: at lr 1e-6 an update of a bf16 weight would be rounded away.
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step = 0
    if checkpoint:
        try:
            state = torch.load(checkpoint / "trainer.pt", map_location=args.device, weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        except Exception as error:
            raise InputError(f"{checkpoint}: remove it, trainer.pt is broken ({first_line(error)})") from None
    return policy, reference, optimizer, step


def warmed_up(args) -> Path:
    """Folder of the tiny model after its warm-up, made once, found again by what made it. It is fluent then,
    consistent, and sees things that are not there: that is what RL is to put right."""
    made_by = [args.task, args.seed, args.image_size, args.warmup_steps, args.warmup_noise, args.device]
    made_by += [torch.__version__, transformers.__version__, *map(inspect.getsource, (imitate, data, model))]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo"
    folder = cache / f"tiny-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]}"
    if not folder.exists():
        policy = model.build_tiny(args.seed, device=args.device)
        imitate(policy, drawn_task(args), args)
        write_folder(folder, policy.save)
    return folder


def imitate(policy, task: DrawnTask, args, batch: int = 32, lr: float = 2e-3) -> None:
    """A cold start: supervised steps on demonstrations of a drawn task, the last fifth with wrong facts."""
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    true_steps = args.warmup_steps * 4 // 5
    for step in tqdm(range(args.warmup_steps), desc="warm-up: imitating demonstrations", disable=None):
        rate = min(1, (step + 1) / 20, max(0.1, 1.1 - step / max(1, true_steps)))  # up, then down to a tenth
        optimizer.param_groups[0]["lr"] = lr * rate
        rng = np.random.default_rng((args.seed, step, 3))
        examples = task.draw(batch, (args.seed, step, 4), held_out=False)
        noise = args.warmup_noise if step >= true_steps else 0.0
        written = policy.as_rollout([demonstrate(example, noise, rng) for example in examples])
        logp, _ = policy.log_probs(policy.encode(examples), written, temperature=1.0)
        (-logp.sum() / written.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Run:
    """The folder of a run. Whatever a kill leaves in it is whole, and resuming gives the same numbers."""

    def __init__(self, path: str | Path):
        self.path, self.metrics = Path(path), Path(path) / "metrics.jsonl"

    def claim(self, options: dict) -> None:
        """Make the folder with the run's options, at once, so that whatever is there can be resumed."""
        if any(p.name.removesuffix(".tmp") != "args.json" for p in self.path.glob("*")):
            raise InputError(f"--out {self.path}: not empty; --resume {self.path} goes on with it")
        self.path.mkdir(parents=True, exist_ok=True)
        self.put("args.json", json.dumps(options, indent=1) + "\n")

    def rewind(self) -> None:
        """Drop the steps after the last checkpoint, which are made again, and what was left half written."""
        done = int(self.checkpoint().name.split("-")[1]) if self.checkpoint() else -1
        self.put("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.log() if r["step"] <= done))

    def argv(self) -> list[str]:
        """The options that it was started with, to be checked again."""
        try:
            return json.loads((self.path / "args.json").read_text(encoding="utf-8"))["argv"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"--resume {self.path}: not the folder of a run (no args.json there)") from None

    def put(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        (self.path / f"{name}.tmp").write_text(text, encoding="utf-8")
        os.replace(self.path / f"{name}.tmp", self.path / name)

    def log(self) -> list[dict]:
        """Records of the run; a last line cut off by a kill is not one."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def write(self, record: dict) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def checkpoint(self) -> Path | None:
        """The last whole one; what a killed process left half written has another name."""
        found = [p for p in self.path.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
        return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)

    def save(self, step: int, policy, optimizer) -> None:
        def fill(folder):
            policy.save(folder)
            torch.save({"step": step, "optimizer": optimizer.state_dict()}, folder / "trainer.pt")

        write_folder(self.path / f"checkpoint-{step:06d}", fill)
        for old in {*self.path.glob("checkpoint-*")} - {self.checkpoint()}:
            shutil.rmtree(old)


def write_folder(folder: Path, fill) -> None:
    """Make `folder` whole or not at all: `fill` writes beside it, then it is renamed into place."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True, exist_ok=True)
        fill(beside)
        beside.rename(folder)
    except Exception as error:  # a full disk, too, which safetensors and torch report in ways of their own
        shutil.rmtree(beside, ignore_errors=True)
        if not folder.exists():  # else another process was first
            raise InputError(f"{folder}: cannot be written ({first_line(error)})") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def choice(text: str) -> tuple[str, object]:
    """NAME=VALUE of --choice."""
    name, _, value = text.partition("=")
    try:
        _, _, default, others = CHOICES[name]
        known = {str(x).lower(): x for x in (default, *others)}
        return name, float(value) if isinstance(default, float) else known[value.lower()]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}: no such choice") from None


def number(kind, low, high=float("inf"), above=False):
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text}: {'above' if above else 'from'} {low} to {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def build_parser() -> Parser:
    parser = Parser(allow_abbrev=False, description=__doc__.splitlines()[0])
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)

    def add(name, text, default=None, **options):
        if name in DEFAULTS:
            text += " (tiny: {:g}, else: {:g})".format(*DEFAULTS[name])
        elif default not in (None, False, []):
            text += f" (else: {default})"
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **options)

    add("model", "tiny, a folder, or a hub name such as Qwen/Qwen2-VL-2B-Instruct", "tiny")
    add("data", "JSON lines with image or images, question, answer; by default a drawn task", metavar="FILE")
    add("task", "which drawn task", "count", choices=data.TASKS)
    add("reward", "your own reward, a function (response text, example) -> float", metavar="FILE.py:NAME")
    add("algo", "grpo gives every token of a response the same advantage", "srpo", choices=("srpo", "grpo"))
    listed = (f"{k} ({', '.join(str(x).lower() for x in (v[2], *v[3]))})" for k, v in CHOICES.items())
    add("choice", "an open choice of the method, once for each: " + ", ".join(listed), [],
        action="append", type=choice, metavar="NAME=VALUE")  # fmt: skip
    add("steps", "optimizer steps; 0 only evaluates, with --data on all rows", type=number(int, 0))
    add("prompts", "prompts a step", type=count)
    add("group_size", "G, responses to each prompt", 8, type=number(int, 2))
    add("max_new_tokens", "longest response", type=count)
    add("inner_epochs", "optimizer steps on each batch of responses", 1, type=count)
    add("micro_batch", "tokens in memory at a time, prompts counted once a group", type=count)
    add("max_pixels", "area that images are shrunk to (else: the model's)", type=count)
    add("lr", "learning rate of AdamW", type=positive)
    add("temperature", "of sampling, and of every log-prob", 1.0, type=number(float, 1e-3))
    add("kl_coef", "beta of step 8; 0 loads no reference", 0.0, type=number(float, 0))
    add("clip_low", "epsilon_low of step 8", 0.2, type=share)
    add("clip_high", "epsilon_high of step 8", 0.2, type=number(float, 0))
    add("lora", "train low-rank adapters only: pip install peft", metavar="RANK", type=count)
    add("train_vision", "train the vision tower too, which is frozen otherwise", False, action="store_true")
    add("seed", "of everything that is drawn at random", 0, type=number(int, 0, 2**62))
    add("device", "cpu, cuda, cuda:1 ... (else: cuda if there is one)")
    add("dtype", "of computing (else: bfloat16 on cuda)", choices=("float32", "bfloat16"))
    add("out", "folder of the run, new or empty (else: a new one in out/)", metavar="DIR")
    add("resume", "go on with the run in DIR, with its own options", metavar="DIR")
    add("eval_every", "steps between evaluations; 0: only before and after", 20, type=number(int, 0))
    add("eval_size", "held-out examples", 256, type=count)
    add("save_every", "steps between checkpoints; 0: only the last", 20, type=number(int, 0))
    add("image_size", "side of drawn images in pixels", type=number(int, 24))
    add("warmup_steps", "tiny: steps on demonstrations before RL", 500, type=number(int, 0))
    add("warmup_noise", "tiny: rate of wrong facts in the last fifth of those", 0.2, type=share)
    return parser


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, Run]:
    """The options, checked, and the folder of the run, claimed or gone back to."""
    args = build_parser().parse_args(argv)
    if args.resume:
        if bad := {w.split("=")[0] for w in argv if w[:2] == "--"} - {"--resume", "--steps", "--micro-batch"}:
            raise InputError(f"{min(bad)}: not with --resume, which takes the options of {args.resume}")
        args = build_parser().parse_args([*Run(args.resume).argv(), *argv])
    args.choice = {name: v[2] for name, v in CHOICES.items()} | dict(args.choice)
    which = 0 if model.is_tiny(args.model) else 1
    vars(args).update({k: v[which] for k, v in DEFAULTS.items() if getattr(args, k) is None})
    if args.lora and args.train_vision:
        raise InputError("--train-vision: not with --lora, which freezes the vision tower; drop one of them")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    c, x, option = args.choice, torch.zeros(1, 1), "--choice"
    try:  # what is called knows best what it takes
        limits = {k: c[k] for k in ("tau", "w_min", "w_max")}
        role_aware_advantages(x, token_weights(x, x, **limits), c["lam"])
        corrupt(Image.new("RGB", (1, 1)), c["corruption"], p=c["p"])
        option = f"--device {args.device}"
        torch.zeros(1, device=args.device).item()
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"{option}: not possible here ({first_line(error)})") from None
    names = (f"{args.algo}-seed{args.seed}{end}" for end in ("", *range(-2, -(10**6), -1)))  # -2, -3, ...
    paths = (Path("out") / f"{Path(args.model).name}-{name}" for name in names)
    run = Run(args.resume or args.out or next(path for path in paths if not path.exists()))
    run.rewind() if args.resume else run.claim({"argv": argv, **vars(args)})
    return args, run


def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        train(*parse_options(sys.argv[1:] if argv is None else argv))
        return 0
    except (InputError, OSError) as error:
        said = error
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)):
            raise
        said = "out of memory: lower --micro-batch, --max-new-tokens or --max-pixels, or train with --lora 16"
    print(f"error: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
