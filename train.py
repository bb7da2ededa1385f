"""Train a vision-language model with SRPO, or with GRPO on the same loop, seeds and data (--algo grpo).

    python train.py                                        the built-in tiny model, a minute on a CPU core
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data my.jsonl --out out/my-run
    python train.py --resume out/my-run                    after a crash, where it stopped

Read `train` from top to bottom: sample, verify, score, weigh, update, report. What is drawn in step k depends
on the seed and on k alone, so a resumed run is the same run.
"""

import argparse
import hashlib
import inspect
import os
import signal
import statistics
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
from data import DrawnTask, InputError, OwnTask, Run, averages, demonstrate, first_line, reward_from, verify
from srpo import CHOICES, Role, contrast_scores, group_advantages, kl_to_reference, policy_loss
from srpo import role_aware_advantages, token_roles, token_weights, without_perception

# What an option left out means: for the tiny model, for a real one, and for a real one with --lora.
TINY = {
    "steps": 40, "prompts": 24, "max_new_tokens": 48, "micro_batch": 16384, "lr": 1e-4, "image_size": 48,
    "warmup_steps": 320, "warmup_lr": 2e-3, "warmup_noise": 0.25,
}  # fmt: skip
REAL = {
    "steps": 200, "prompts": 8, "max_new_tokens": 512, "micro_batch": 4096, "lr": 1e-6, "image_size": 336,
    "warmup_steps": 0, "warmup_lr": 1e-5, "warmup_noise": 0.0,
}  # fmt: skip
REAL_LORA = {**REAL, "lr": 1e-5, "warmup_lr": 2e-4}


def train(args: argparse.Namespace, run: Run) -> None:
    """B responses of up to T tokens a step, G to a prompt; [b, T] is a micro-batch of the update."""
    task = OwnTask(args.data, args.seed, args.steps == 0) if args.data else drawn_task(args)
    policy, reference, optimizer, start = prepare(args, run)
    held_out = task.eval_set(None if args.data and args.steps == 0 else args.eval_size)
    judge, c = reward_from(args.reward) if args.reward else verify, argparse.Namespace(**args.choice)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    parameters, srpo = optimizer.param_groups[0]["params"], args.algo == "srpo"
    if not run.log():
        run.write(evaluate(policy, held_out, judge, args, step=0))
    steps, idle, credit = range(start + 1, args.steps + 1), 0, None
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
                with reference.as_reference(policy):
                    ref_logp = score(reference)  # [B, T]
        clock.append(time.perf_counter())

        # 4. Weigh the tokens of each response against each other.
        options = {k: args.choice[k] for k in ("tau", "w_min", "w_max", "normalize", "role_balanced")}
        options |= {"flip": A < 0 if c.sign_aware else None}
        logps = logp, logp_corrupted, logp_blank
        delta = contrast_scores(*logps, roles, contrast=c.contrast)  # [B, T], step 2, step 3, step 4
        w = token_weights(delta, roles, **options)  # [B, T], step 5, step 6, step 9
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
        bar.set_description(f"{args.algo}: accuracy {record['accuracy']:.2f}")
        idle, credit = 0 if record["used_groups"] else idle + 1, (responses, roles, w)
        if idle in (5, 50, 500):
            tqdm.write(no_spread(idle, record, verdicts, rollout, args), file=sys.stderr)
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            run.write(evaluate(policy, held_out, judge, args, step))
        if step == args.steps or (args.save_every and step % args.save_every == 0):
            run.save(step, policy, optimizer)  # last: a checkpoint vouches for all lines up to its step
    summarize(run, credit)


def generator(args, step: int, purpose: int = 0) -> torch.Generator:
    """Random numbers of one step; purpose 0 is training, 1 evaluation."""
    seed = np.random.SeedSequence((args.seed, step, purpose)).generate_state(1, np.uint64)[0]
    return torch.Generator(args.device).manual_seed(int(seed >> np.uint64(1)))


def evaluate(policy, examples, judge, args, step: int, batch: int = 64) -> dict:
    """Record of a response to each example, at the training temperature; the same draws every time."""
    texts, rng = [], generator(args, 0, purpose=1)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "generator": rng}
    for first in tqdm(range(0, len(examples), batch), "evaluating", leave=False, disable=None):
        rollout = policy.sample(policy.encode(examples[first : first + batch]), 1, **sampling)
        texts += [text for text, _ in policy.decode(rollout)]
    both = list(zip(texts, examples, strict=True))
    scores = averages([judge(text, e) for text, e in both]) | {"n": len(both)}
    shown = [{"question": e.question, "answer": e.answer, "response": text} for text, e in both[:3]]
    return {"step": step, "eval": scores, "samples": shown}


def summarize(run: Run, credit=None) -> None:
    """The first evaluation against the last, an answer before and after, and the credit of one response."""
    first, *_, last = [r for r in run.log() if "eval" in r] * 2
    print(f"\n{last['eval']['n']} held-out examples: step {first['step']}, step {last['step']}")
    rows = ((k, first["eval"][k], x) for k, x in last["eval"].items() if x is not None and k != "n")
    print(*("{:12}{:10.3f}{:10.3f}".format(*row) for row in rows), sep="\n")
    print("\n{question}  (answer: {answer})".format(**first["samples"][0]))
    for record in (first, last) if last["step"] else (last,):
        print(f"step {record['step']}: {record['samples'][0]['response']}")
    if credit:
        responses, roles, w = credit
        row = int((w - 1).square().sum(1).argmax())  # the response with the most to see; of GRPO, the first
        print("\nA response of the last step, and the weight of each token that is not 1, GRPO's:")
        print(shaded(*responses[row], roles[row].tolist(), w[row].tolist()))
        asks = "Where it is above 1: did the image, or the perception, decide this word?"
        print(asks if (w != 1).any() else "None: every token counts alike.")
    print(f"\nmetrics and checkpoint: {run.path}")


def shaded(text: str, offsets, roles, w) -> str:
    """A response with the weights of its tokens: as shades in a terminal that has them, else in brackets."""
    deep = {Role.PERCEPTION: (70, 130, 230), Role.REASONING: (240, 140, 40)}  # blue, orange
    shown, end, color = "", 0, sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    color = color and os.environ.get("COLORTERM") in ("truecolor", "24bit")
    for (start, stop), role, weight in zip(offsets, roles, w, strict=False):
        piece, end = text[max(start, end) : stop], max(stop, end)
        if weight != 1 and color:
            shade = ";".join(str(round(255 + (x - 255) * min(1, max(0, weight - 0.5)))) for x in deep[role])
            piece = f"\x1b[30;48;2;{shade}m{piece}\x1b[0m"
        elif weight != 1:
            piece += f"[{weight:.1f}]"
        shown += piece
    return shown


def no_spread(steps: int, record: dict, verdicts, rollout, args) -> str:
    """Why nothing is learned when all responses of each group have the same reward, and what to try."""
    full = (rollout.mask.sum(1) == args.max_new_tokens).tolist()
    why = ["are wrong; try easier data, a larger --group-size or --warmup-steps 30"]
    why += ["are right; try harder data", "are cut off; try a larger --max-new-tokens"]
    why += ["lack the tags; try --warmup-steps 30, which imitates demonstrations first"]
    kinds = [2 if f else v.accuracy > 0.5 if v.format else 3 for v, f in zip(verdicts, full, strict=True)]
    said = f"mean reward {record['reward']:.2f}, {record['format']:.0%} well-formed; most responses"
    return f"rewards did not differ in any group for {steps} steps: {said} {why[statistics.mode(kinds)]}"


def drawn_task(args) -> DrawnTask:
    return DrawnTask(args.task, seed=args.seed, size=args.image_size)


def prepare(args, run: Run):
    """Policy, reference policy (or None), optimizer, and the number of steps already done."""
    model.Policy.micro_batch = args.micro_batch
    if args.model == "tiny":
        torch.set_num_threads(1)  # sharing products so small costs more than it gains
    options = {k: getattr(args, k) for k in ("device", "max_pixels", "seed")}
    load = partial(model.load, dtype=getattr(torch, args.dtype), frozen=bool(args.lora), **options)
    initial = warmed_up(args, run, load)
    policy = load(str(run.checkpoint() or initial))
    trained = trainable(policy, args)
    same = args.lora and not Path(initial, "adapter_config.json").exists()  # but for its adapters
    reference = None if not args.kl_coef else policy if same else load(str(initial))
    # fp32 master weights: at lr 1e-6 an update of a bf16 weight would be rounded away.
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return policy, reference, optimizer, run.restore(optimizer, args.device)


def trainable(policy, args) -> list:
    """The parameters to train: adapters, or all but the vision tower."""
    if args.lora and policy.adapter is None:
        policy.add_lora(args.lora)
    elif not args.lora:
        policy.model.model.visual.requires_grad_(args.train_vision)
    return [p for p in policy.model.parameters() if p.requires_grad]


def warmed_up(args, run: Run, load) -> str | Path:
    """What RL starts from: --model, or its folder after a cold start, which is made once. The tiny model is
    fluent then, and sees things that are not there: that is what RL is to put right."""
    folder = run.path / "warmed-up"
    if args.model == "tiny" and not args.demonstrations:  # kept for the next run, by all that it depends on
        options = "task seed image_size device warmup_steps warmup_lr warmup_noise".split()
        made_by = [torch.__version__, transformers.__version__, *(getattr(args, k) for k in options)]
        made_by += [inspect.getsource(x) for x in (imitate, data, model, inspect.getmodule(corrupt))]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo"
        folder = cache / f"tiny-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]}"
    elif not args.warmup_steps:
        return args.model
    if not folder.exists():
        policy = load(args.model)
        everything = list(policy.model.parameters())
        imitate(policy, everything if args.model == "tiny" else trainable(policy, args), args)
        data.write_folder(folder, policy.save)
    return folder


def imitate(policy, parameters: list, args) -> None:
    """A cold start: supervised steps on demonstrations, the last fifth with wrong facts if so asked."""
    task = OwnTask(args.demonstrations, args.seed) if args.demonstrations else drawn_task(args)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    true_steps, batch = args.warmup_steps * 4 // 5, 24 if args.model == "tiny" else args.prompts
    for step in tqdm(range(args.warmup_steps), desc="warm-up: imitating demonstrations", disable=None):
        rate = min(1, (step + 1) / 20, max(0.1, 1.1 - step / max(1, true_steps)))  # up, then down to a tenth
        optimizer.param_groups[0]["lr"] = args.warmup_lr * rate
        noise, rng = args.warmup_noise * (step >= true_steps), np.random.default_rng((args.seed, step, 3))
        examples = task.train_batch(10**6 + step, batch)  # not those of RL
        written = policy.as_rollout([demonstrate(example, noise, rng) for example in examples])
        prompts = policy.encode(examples)
        for rows in policy.micro_batches(prompts, written, written.mask.any(1)):
            logp, _ = policy.log_probs(prompts, written[rows], temperature=1.0)
            (-logp.sum() / written.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


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


def number(kind, low, high=float("inf")):
    def number(text):  # by this name argparse complains
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: from {low} to {high}")
        return kind(text)

    return number


def build_parser() -> Parser:
    parser = Parser(allow_abbrev=False, description=__doc__.splitlines()[0])
    count, positive, share = number(int, 1, 10**6), number(float, 1e-12), number(float, 0, 1)

    def add(name, text, default=None, **options):
        if name in TINY:
            text += f" (tiny: {TINY[name]:g}, a real model: {REAL[name]:g}"
            if REAL_LORA[name] != REAL[name]:
                text += f", with --lora: {REAL_LORA[name]:g}"
            text += ")"
        elif default not in (None, False, []):
            text += f" (else: {default})"
        group.add_argument("--" + name.replace("_", "-"), default=default, help=text, **options)

    group = parser.add_argument_group("what most people need first")
    add("model", "tiny, a folder, or a hub name such as Qwen/Qwen2-VL-2B-Instruct", "tiny")
    add("data", "JSON lines with image or images, question, answer; by default a drawn task", metavar="FILE")
    add("task", "which drawn task", "count", choices=data.TASKS)
    add("reward", "your own reward, a function (response text, example) -> float", metavar="FILE.py:NAME")
    add("algo", "grpo gives every token of a response the same advantage", "srpo", choices=("srpo", "grpo"))
    add("steps", "optimizer steps; 0 only evaluates, with --data on all rows", type=number(int, 0))
    add("lora", "train low-rank adapters only: pip install peft", metavar="RANK", type=count)
    add("out", "folder of the run, new or empty (else: a new one in out/)", metavar="DIR")
    add("resume", "go on with the run in DIR, with its own options", metavar="DIR")
    add("log", "send the metrics there too", choices=("tensorboard", "wandb", "trackio"))
    group = parser.add_argument_group("method")
    listed = (f"{k} ({', '.join(str(x).lower() for x in (v[2], *v[3]))})" for k, v in CHOICES.items())
    add("choice", "an open choice of the method, once for each: " + ", ".join(listed), [],
        action="append", type=choice, metavar="NAME=VALUE")  # fmt: skip
    add("group_size", "G, responses to each prompt", 8, type=number(int, 2, 10**4))
    add("temperature", "of sampling, and of every log-prob", 1.0, type=number(float, 1e-3))
    add("kl_coef", "beta of step 8; 0 loads no reference", 0.0, type=number(float, 0))
    add("clip_low", "epsilon_low of step 8", 0.2, type=share)
    add("clip_high", "epsilon_high of step 8", 0.2, type=number(float, 0))
    group = parser.add_argument_group("training")
    add("prompts", "prompts a step", type=count)
    add("max_new_tokens", "longest response", type=count)
    add("inner_epochs", "optimizer steps on each batch of responses", 1, type=count)
    add("lr", "learning rate of AdamW", type=positive)
    add("train_vision", "train the vision tower too, which is frozen otherwise", False, action="store_true")
    add("seed", "of everything that is drawn at random", 0, type=number(int, 0, 2**62))
    group = parser.add_argument_group("memory and machine")
    add("micro_batch", "tokens in memory at a time, prompts counted once a group", type=count)
    add("max_pixels", "area that images are shrunk to (else: the model's)", type=number(int, 1))
    add("device", "cpu, cuda, cuda:1 ...", "cuda" if torch.cuda.is_available() else "cpu")
    add("dtype", "of computing (else: bfloat16 on cuda)", choices=("float32", "bfloat16"))
    group = parser.add_argument_group("evaluation and checkpoints")
    add("eval_every", "steps between evaluations; 0: only before and after", 20, type=number(int, 0))
    add("eval_size", "held-out examples", 256, type=number(int, 1, 10**5))
    add("save_every", "steps between checkpoints; 0: only the last", 20, type=number(int, 0))
    group = parser.add_argument_group("cold start, and drawn tasks")
    add("warmup_steps", "imitate demonstrations first; 100 steps if you give some to any model but tiny", type=number(int, 0))
    add("demonstrations", "rows as in --data with a response, else of the drawn task", metavar="FILE")
    add("warmup_lr", "learning rate of that", type=positive)
    add("warmup_noise", "rate of wrong facts in the last fifth of it", type=share)
    add("image_size", "side of drawn images in pixels", type=number(int, 24, 4096))
    return parser


def presets(args: argparse.Namespace) -> dict:
    """Values of the options that were left out."""
    if args.model == "tiny":
        return TINY
    if model.is_tiny(args.model):
        found = {**TINY, "warmup_steps": 0}  # a saved tiny model has had its own
    elif args.lora:
        found = dict(REAL_LORA)
    else:
        found = dict(REAL)
    if args.demonstrations:
        found["warmup_steps"] = 100
    return found


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, Run]:
    """The options, checked, and the folder of the run, claimed or gone back to."""
    args = build_parser().parse_args(argv)
    if args.resume:
        if bad := {w.split("=")[0] for w in argv if w[:2] == "--"} - {"--resume", "--steps", "--micro-batch"}:
            raise InputError(f"{min(bad)}: not with --resume, which takes the options of {args.resume}")
        args = build_parser().parse_args([*Run(args.resume).argv(), *argv])
    args.choice = {name: v[2] for name, v in CHOICES.items()} | dict(args.choice)
    for name, value in presets(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lora and args.train_vision:
        raise InputError("--train-vision: not with --lora, which freezes the vision tower; drop one of them")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    c, x, option = args.choice, torch.zeros(1, 1), "--choice"
    try:  # what is called knows best what it takes
        w = token_weights(x, x, tau=c["tau"], w_min=c["w_min"], w_max=c["w_max"])
        role_aware_advantages(x, w, c["lam"])
        corrupt(Image.new("RGB", (1, 1)), c["corruption"], p=c["p"])
        option = f"--device {args.device}"
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # a device that is not there fails in ways of its own
        raise InputError(f"{option}: not possible here ({first_line(error)})") from None
    names = (f"{args.algo}-seed{args.seed}{end}" for end in ("", *range(-2, -(10**6), -1)))  # -2, -3, ...
    paths = (Path("out") / f"{Path(args.model).name}-{name}" for name in names)
    run = Run(args.resume or args.out or next(path for path in paths if not path.exists()))
    run.rewind() if args.resume else run.claim({"argv": argv, **vars(args)})
    if args.log:
        run.send_to(args.log, vars(args))
    return args, run


def main(argv: list[str] | None = None) -> int:
    def terminated(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminated)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = None
    try:
        args, run = parse_options(sys.argv[1:] if argv is None else argv)
        return train(args, run) or 0
    except KeyboardInterrupt as stop:  # a step or a checkpoint in progress is dropped, what was whole stays
        went = f"go on with: python train.py --resume {run.path}" if run else "nothing was begun"
        print(f"\nstopped; {went}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (InputError, OSError) as error:
        said = str(error)  # not the error, which would keep the run, and its lock
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = "not enough memory", "can't allocate memory", "out of memory"
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in known):
            raise
        said = "out of memory: lower --micro-batch, --max-new-tokens or --max-pixels, or train with --lora 16"
    print(f"error: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
