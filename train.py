"""Train a vision-language model with SRPO, or with GRPO on the same loop, seeds and data (--algo grpo).

    python train.py                                        the built-in tiny model, two to four minutes on two CPU cores
    python train.py --algo grpo --seed 1
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data my.jsonl --out out/my-run
    python train.py --resume out/my-run                    after a crash, where it stopped

Read `train` from top to bottom: sample, verify, advantages, contrasts, weights, loss, step. Everything drawn at random
in step k (questions, responses, corrupted images) depends on the seed and on k alone, so a resumed run is the same run.
"""

import argparse
import base64
import hashlib
import inspect
import io
import json
import os
import resource
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import data
import model
from corrupt import CORRUPTIONS, corrupt
from data import VERIFIERS, DrawnTask, InputError, demonstrate, own_task, verify
from srpo import (
    Role,
    contrast_scores,
    group_advantages,
    kl_to_reference,
    policy_loss,
    role_aware_advantages,
    shared_baseline,
    token_roles,
    token_weights,
    without_perception,
)

LOGS = ("metrics.jsonl", "samples.jsonl")  # a line a step; two groups of every --sample-every-th step
VERDICTS = ("reward", "accuracy", "format", "perception", "grounded", "consistent")
# What an option left out means: for the tiny model, and for any other.
DEFAULTS = {
    "steps": (60, 200),
    "prompts": (32, 8),
    "max_new_tokens": (64, 512),
    "micro_batch": (16384, 4096),
    "lr": (5e-5, 1e-6),
    "image_size": (48, 336),
}


def train(args: argparse.Namespace, out: Path) -> None:
    task = own_task(args.data, seed=args.seed) if args.data else drawn_task(args)
    if args.data and args.model == "tiny":
        print("note: the tiny model knows only the words of the drawn tasks; give --model for your own data")
    policy, reference, optimizer, start = prepare(args, out)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    held_out = task.eval_set(args.eval_size)
    metrics, samples = (open(out / name, "a", encoding="utf-8") for name in LOGS)
    if start == 0:
        write(metrics, {"step": 0, "eval": evaluate(policy, held_out, args)[0]})

    contrasts, match, checked = args.algo == "srpo" and args.lam > 0, VERIFIERS[args.verifier], False
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, desc=args.algo, disable=None)
    for step in bar:
        clock = [time.perf_counter()]

        # Sample G responses to each prompt. One corrupted image a prompt, shared by its group.
        examples = task.train_batch(step - 1, args.prompts)
        corruption = partial(corrupt_for_step, args, policy.patch, step)
        prompts = policy.encode(examples, corruption if contrasts else None)
        rollout = policy.sample(
            prompts,
            args.group_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            generator=generator(args, step),
        )
        mask = rollout.mask  # [B, T], EOS included, padding excluded
        n_tokens = mask.sum()  # of the whole step: the normalizer of Eq. (8), whatever the micro-batches
        clock.append(time.perf_counter())

        # Verify, and compare within the group. Without a spread of rewards A = 0: nothing to score, nothing to learn.
        responses = policy.decode(rollout)
        asked = [examples[i] for i in rollout.prompt.tolist()]
        verdicts = [verify(text, example, match=match) for (text, _), example in zip(responses, asked, strict=True)]
        A = group_advantages([v.reward for v in verdicts], args.group_size).to(mask.device)  # [B], Eq. (1)
        used = torch.arange(len(A), device=mask.device) if args.kl_coef else A.nonzero()[:, 0]
        batches = micro_batches(rollout, used, prompts.ids.shape[1], args.micro_batch)

        # Counterfactuals: the sampled perception under the corrupted image, the reasoning without the perception.
        roles = torch.zeros(mask.shape, dtype=torch.long)  # [B, T]
        for row, (text, offsets) in enumerate(responses):
            roles[row, : len(offsets)] = token_roles(text, offsets, answer_is_reasoning=args.answer_is_reasoning)
        roles = roles.to(mask.device)
        old_logp, logp_corrupted, logp_blank, ref_logp, delta, entropy = (torch.zeros_like(rollout.logp) for _ in range(6))
        w = torch.ones_like(old_logp)  # [B, T]
        with torch.no_grad():
            for rows in batches:
                logp_of = partial(policy.log_probs, prompts, rollout[rows], temperature=args.temperature)
                if contrasts:
                    visible = without_perception(mask[rows], roles[rows])
                    seeing, inferring = roles[rows] == Role.PERCEPTION, roles[rows] == Role.REASONING
                    wanted = seeing | inferring if args.corrupt_both else seeing
                    logp_corrupted[rows], _ = logp_of(corrupted=True, wanted=wanted)
                    reuse = not args.corrupt_both  # the prompts as read for sampling, with the original image
                    logp_blank[rows], _ = logp_of(corrupted=not reuse, visible=visible, wanted=inferring, reuse=reuse)
                if reference is not None:
                    with reference.as_reference():
                        ref_logp[rows], _ = reference.log_probs(prompts, rollout[rows], temperature=args.temperature)
        clock.append(time.perf_counter())

        # Update: one optimizer step an inner epoch. Micro-batches add up to the gradient of the whole batch.
        total = dict.fromkeys(("loss", "clip_frac", "kl", "grad_norm"), 0.0)
        for epoch in range(args.inner_epochs if batches else 0):
            for rows in batches:
                logp, entropy_now = policy.log_probs(prompts, rollout[rows], temperature=args.temperature)
                if epoch == 0:  # no step has been taken yet: this is pi_old
                    old_logp[rows], entropy[rows] = logp.detach(), entropy_now
                    if contrasts:
                        given = old_logp[rows]  # left side of Eq. (2) and (3)
                        if args.corrupt_both:
                            given = torch.where(roles[rows] == Role.REASONING, logp_corrupted[rows], given)
                        delta[rows] = contrast_scores(given, logp_corrupted[rows], logp_blank[rows], roles[rows])
                        w[rows] = token_weights(  # Eq. (5), (6), (9)
                            delta[rows],
                            roles[rows],
                            tau=args.tau,
                            w_min=args.w_min,
                            w_max=args.w_max,
                            normalize=not args.no_renormalization,
                            role_balanced=args.role_balanced,
                            flip=A[rows] < 0 if args.sign_aware else None,
                        )
                    if not checked:
                        checked = check_ratio(logp, rollout[rows], args.dtype)
                A_hat = role_aware_advantages(A[rows], w[rows], args.lam)  # [b, T], Eq. (7)
                loss, stats = policy_loss(  # Eq. (8)
                    logp,
                    old_logp[rows],
                    A_hat,
                    mask[rows],
                    clip_low=args.clip_low,
                    clip_high=args.clip_high,
                    denominator=n_tokens,
                )
                if reference is not None:
                    share = mask[rows].sum() / n_tokens
                    kl = share * kl_to_reference(logp, ref_logp[rows], mask[rows])
                    loss = loss + args.kl_coef * kl
                    total["kl"] += kl.item() / args.inner_epochs
                loss.backward()
                total["loss"] += loss.item() / args.inner_epochs
                total["clip_frac"] += stats["clip_frac"].item() / args.inner_epochs
            total["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        clock.append(time.perf_counter())

        # Report. A number that nothing in this step could be measured on is null.
        record = {"step": step, **averages(verdicts), **total}
        record["kl"] = total["kl"] if reference is not None else None
        scored = mask & torch.isin(torch.arange(len(A), device=mask.device), used)[:, None]
        record["entropy"] = mean_over(entropy, scored)
        record["length"] = mask.sum(1).float().mean().item()
        record["used_groups"] = int((A.view(-1, args.group_size) != 0).any(1).sum())
        record["w_perception"] = mean_over(w, scored & (roles == Role.PERCEPTION))
        record["w_reasoning"] = mean_over(w, scored & (roles == Role.REASONING))
        seconds = [b - a for a, b in zip(clock, clock[1:], strict=False)]
        record |= dict(zip(("sec_generate", "sec_score", "sec_update"), seconds, strict=True))
        write(metrics, record)
        bar.set_postfix(reward=f"{record['reward']:.2f}", accuracy=f"{record['accuracy']:.2f}", sec=f"{sum(seconds):.1f}")
        if args.sample_every and (step == 1 or step % args.sample_every == 0):
            tokens = {"roles": roles, "delta": delta, "weights": w, "advantages": role_aware_advantages(A, w, args.lam)}
            for g in A.view(-1, args.group_size).any(1).nonzero()[:2, 0].tolist():
                shown = as_shown(examples[g], policy, partial(corruption, g) if contrasts else None)
                rows = range(g * args.group_size, (g + 1) * args.group_size)
                shown["responses"] = [as_kept(b, responses[b], verdicts[b], A, tokens, mask, args, contrasts) for b in rows]
                write(samples, {"step": step, **shown})
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            write(metrics, {"step": step, "eval": evaluate(policy, held_out, args)[0]})
        if step == args.steps or (args.save_every and step % args.save_every == 0):
            save_checkpoint(out, step, policy, optimizer)  # last: a checkpoint vouches for all lines up to its step
    metrics.close()
    samples.close()
    if args.merge_lora and not (out / "merged").exists():
        write_folder(out / "merged", partial(policy.save, merged=True))
    summarize(out, policy, held_out, args)


def micro_batches(rollout, used: torch.Tensor, prompt_length: int, budget: int) -> list[torch.Tensor]:
    """Split the rows `used` so that none reads over `budget` tokens: its prompts once, its responses padded to the longest.

    Responses to one prompt stay together, and groups of similar length come together. One row goes whatever it costs.
    """
    length, prompt = rollout.mask.sum(1).tolist(), rollout.prompt.tolist()
    longest = {}
    for row in used.tolist():
        longest[prompt[row]] = max(longest.get(prompt[row], 0), length[row])
    batches = [[]]
    for row in sorted(used.tolist(), key=lambda b: (longest[prompt[b]], prompt[b], length[b])):
        batch = [*batches[-1], row]
        cost = len({prompt[b] for b in batch}) * prompt_length + len(batch) * max(length[b] for b in batch)
        batches = [*batches, [row]] if cost > budget and batches[-1] else [*batches[:-1], batch]
    return [torch.tensor(batch, device=rollout.ids.device) for batch in batches if batch]


def check_ratio(logp, rollout, dtype: str) -> bool:
    """Before the first update the policy is the one that sampled: every ratio must be 1, up to rounding."""
    off = ((logp.detach() - rollout.logp).exp() - 1)[rollout.mask].abs().max().item()
    tqdm.write(f"before the first update: ratio to the sampling policy 1 within {off:.1e}")
    if dtype == "float32" and not off <= 1e-4:
        raise RuntimeError(f"the ratio before the first update is off 1 by {off:.1e}, more than 1e-4")
    return True


def averages(verdicts) -> dict[str, float | None]:
    """Mean of each verdict over the responses; None where the scene is unknown."""
    columns = {name: [getattr(v, name) for v in verdicts] for name in VERDICTS}
    return {name: None if None in column else float(np.mean(column)) for name, column in columns.items()}


def mean_over(x: torch.Tensor, where: torch.Tensor) -> float | None:
    return x[where].mean().item() if where.any() else None


def generator(args, step: int, purpose: int = 0) -> torch.Generator:
    """Random numbers of one step; purpose 0 is training, 1 evaluation."""
    seed = np.random.SeedSequence((args.seed, step, purpose)).generate_state(1, np.uint64)[0]
    return torch.Generator(args.device).manual_seed(int(seed >> np.uint64(1)))


def corrupt_for_step(args, patch: int, step: int, i: int, image):
    return corrupt(image, args.corruption, patch=patch, p=args.corruption_p, seed=(args.seed, step, i))


@torch.no_grad()
def evaluate(policy, examples, args, batch: int = 64) -> tuple[dict, list[str]]:
    """One response to each held-out example at the training temperature; the same draws at every evaluation."""
    texts, rng = [], generator(args, 0, purpose=1)
    for first in range(0, len(examples), batch):
        prompts = policy.encode(examples[first : first + batch])
        rollout = policy.sample(
            prompts, 1, max_new_tokens=args.max_new_tokens, temperature=args.temperature, generator=rng
        )
        texts += [text for text, _ in policy.decode(rollout)]
    match = VERIFIERS[args.verifier]
    verdicts = [verify(text, example, match=match) for text, example in zip(texts, examples, strict=True)]
    return averages(verdicts) | {"n": len(examples)}, texts


def summarize(out: Path, policy, held_out, args) -> None:
    """The first evaluation against the last, and three sample responses."""
    evals = [r for r in read_log(out) if "eval" in r]
    if not evals:
        raise InputError(f"{out / 'metrics.jsonl'}: holds no evaluation; was it changed by hand?")
    first, last = evals[0], evals[-1]
    print(f"\nheld-out examples: {last['eval']['n']}, temperature {args.temperature:g}")
    print(f"{'':12}{'step ' + str(first['step']):>10}{'step ' + str(last['step']):>10}")
    for name in VERDICTS:
        if last["eval"][name] is not None:
            print(f"{name:12}{first['eval'][name]:10.3f}{last['eval'][name]:10.3f}")
    show_samples(policy, held_out[:3], args)
    print(f"\npeak memory {peak_memory(args.device):.2f} GiB; metrics and checkpoint: {out}")


def peak_memory(device: str) -> float:
    """GiB: the tensors' peak on a GPU, the process's resident peak on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def show_samples(policy, examples, args) -> None:
    for example, text in zip(examples, evaluate(policy, examples, args)[1], strict=True):
        verdict = "right" if verify(text, example, match=VERIFIERS[args.verifier]).accuracy else "wrong"
        print(f"\n{example.question}  (answer: {example.answer}; the response is {verdict})\n{text}")


# ------------------------------------------------------------------------------------------------- model and optimizer


def drawn_task(args) -> DrawnTask:
    return DrawnTask(args.task, seed=args.seed, size=args.image_size)


def prepare(args, out: Path | None = None):
    """Policy, reference policy (or None), optimizer, and the number of steps already done."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    load = partial(model.load, device=args.device, dtype=dtype, max_pixels=args.max_pixels)
    checkpoint = checkpoints(out)[-1] if out and checkpoints(out) else None
    initial = args.model if args.model != "tiny" else warmed_up(args)
    policy = load(str(checkpoint or initial))
    policy.share_prompts = not args.plain
    if args.lora and policy.adapter is None:
        policy.add_lora(args.lora)
    elif not args.lora:
        policy.model.model.visual.requires_grad_(args.train_vision)
    reference = None
    if args.kl_coef:
        reference = policy if args.lora else load(str(initial))
    # fp32 master weights: at lr 1e-6 an update of a bf16 weight would be rounded away.
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    if checkpoint is None:
        return policy, reference, optimizer, 0
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location=args.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise InputError(f"{checkpoint / 'trainer.pt'}: cannot be read ({model.first_line(error)}); remove {checkpoint}") from None
    return policy, reference, optimizer, state["step"]


def warmed_up(args) -> Path:
    """Folder of the tiny model after its warm-up, made once and then found again by what made it.

    The warm-up imitates demonstrations, first true ones, then ones that state wrong facts at a set rate: the policy ends
    up fluent and consistent, and sees things that are not there. That is what RL is to put right.
    """
    made_by = [args.task, args.seed, args.image_size, args.warmup_steps, args.noisy_steps, args.warmup_noise, args.device]
    made_by += [args.dtype, torch.__version__, transformers.__version__, inspect.getsource(warm_up)]
    made_by += [inspect.getsource(data), inspect.getsource(model)]
    folder = Path(args.cache) / f"tiny-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]}"
    if not folder.exists():
        policy = model.build_tiny(args.seed, device=args.device)
        warm_up(policy, drawn_task(args), args)
        write_folder(folder, policy.save)
    return folder


def warm_up(policy, task: DrawnTask, args, batch: int = 32, lr: float = 2e-3) -> None:
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    steps = args.warmup_steps + args.noisy_steps
    for step in tqdm(range(steps), desc="warm-up", disable=None):
        for group in optimizer.param_groups:  # linear warm-up, then linear decay to a tenth
            group["lr"] = lr * min(1, (step + 1) / 20, max(0.1, 1.1 - step / max(1, args.warmup_steps)))
        rng = np.random.default_rng((args.seed, step, 3))
        examples = task.draw(batch, (args.seed, step, 4), held_out=False)
        noise = args.warmup_noise if step >= args.warmup_steps else 0.0
        texts = [demonstrate(example, noise, rng) for example in examples]
        prompts = policy.encode(examples)
        demonstrations = policy.as_rollout(texts)
        logp, _ = policy.log_probs(prompts, demonstrations, temperature=1.0)
        loss = -logp.sum() / demonstrations.mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()


# ------------------------------------------------------------------------------------------------------- files of a run


def write_folder(folder: Path, fill) -> None:
    """Make `folder` whole or not at all: `fill` writes beside it, then it is renamed into place."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        if not folder.exists() or not any(folder.iterdir()):
            os.replace(beside, folder)
    except Exception as error:  # also a full disk, which safetensors and torch report in ways of their own
        raise InputError(f"{folder}: cannot be written ({model.first_line(error)})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_checkpoint(out: Path, step: int, policy, optimizer) -> None:
    def fill(folder):
        policy.save(folder)
        torch.save({"step": step, "optimizer": optimizer.state_dict()}, folder / "trainer.pt")

    write_folder(out / f"checkpoint-{step:06d}", fill)
    for old in checkpoints(out)[:-1]:
        shutil.rmtree(old)


def checkpoints(out: Path) -> list[Path]:
    """The whole ones, oldest first; what a killed process left half written has another name."""
    found = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def as_shown(example, policy, corrupted=None) -> dict:
    """A question with its pictures as the model gets them, original and corrupted, in a form to write down."""

    def png(image) -> str:
        file, image = io.BytesIO(), image.copy()
        image.thumbnail((448, 448))  # enough to look at
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    images = [policy.fit(image) for image in example.images]
    shown = {"question": example.question, "answer": example.answer, "images": [png(image) for image in images]}
    return shown | {"corrupted": [png(corrupted(image)) for image in images] if corrupted else []}


def as_kept(b: int, response, verdict, A, tokens: dict, mask, args, contrasts: bool) -> dict:
    """Response b of a step, token by token. What was not measured is null: contrasts under GRPO, and where A = 0."""
    roles, delta = tokens["roles"][b : b + 1], tokens["delta"][b : b + 1]
    baseline = shared_baseline(delta, roles, role_balanced=args.role_balanced).item()
    kept = {"text": response[0], "offsets": response[1], "advantage": A[b].item(), "baseline": baseline, **asdict(verdict)}
    kept |= {name: [round(v, 4) for v in x[b][mask[b]].tolist()] for name, x in tokens.items()}
    return kept | ({} if contrasts and A[b] != 0 else {"delta": None, "baseline": None})


def write(file, record: dict) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def read_log(out: Path, name: str = LOGS[0]) -> list[dict]:
    """Records of a run; a last line cut off by a kill is not one."""
    path = out / name
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def rewind(out: Path) -> None:
    """Drop what was recorded after the last checkpoint, where those steps are made again, and what was left half written."""
    done = int(checkpoints(out)[-1].name.removeprefix("checkpoint-")) if checkpoints(out) else -1
    for name in LOGS:
        kept = "".join(json.dumps(r) + "\n" for r in read_log(out, name) if r["step"] <= done)
        beside = out / f"{name}.tmp"
        beside.write_text(kept, encoding="utf-8")
        os.replace(beside, out / name)
    for leftover in out.glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def number(kind, low, high=float("inf"), above=False):
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}, or over {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def build_parser() -> Parser:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo"
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)
    auto = {name: f"(default for tiny: {tiny}, else {other})" for name, (tiny, other) in DEFAULTS.items()}
    add("--model", default="tiny", help="tiny, a folder, or a hub name such as Qwen/Qwen2-VL-2B-Instruct")
    add("--data", metavar="FILE", help="JSON lines with image or images, question, answer, or hub:NAME[:SPLIT]; by default a drawn task")
    add("--verifier", default="words", choices=VERIFIERS, help="how answers are compared; math needs: pip install 'math-verify[antlr4_13_2]'")
    add("--task", default="count", choices=data.TASKS, help="which drawn task")
    add("--algo", default="srpo", choices=("srpo", "grpo"), help="grpo gives every token of a response the same advantage")
    add("--steps", type=number(int, 0), default=None, help=f"optimizer steps {auto['steps']}")
    add("--prompts", type=count, default=None, help=f"prompts a step {auto['prompts']}")
    add("--group-size", type=number(int, 2), default=8, help="G, responses to each prompt")
    add("--max-new-tokens", type=count, default=None, help=f"longest response {auto['max_new_tokens']}")
    add("--inner-epochs", type=count, default=1, help="optimizer steps on each batch of responses")
    add("--max-pixels", type=count, default=None, help="area that images are shrunk to, to save visual tokens (default: the model's)")
    add("--micro-batch", type=count, default=None, help=f"tokens in memory at a time, prompts counted once a group {auto['micro_batch']}")
    add("--lr", type=positive, default=None, help=f"learning rate of AdamW {auto['lr']}")
    add("--max-grad-norm", type=positive, default=1.0, help="gradients are scaled down to this norm")
    add("--temperature", type=number(float, 1e-3), default=1.0, help="of sampling, and of every log-prob")
    add("--kl-coef", type=number(float, 0), default=0.0, help="beta of Eq. (8), KL to the initial policy; 0 loads no reference")
    add("--clip-low", type=share, default=0.2, help="epsilon_low of Eq. (8)")
    add("--clip-high", type=number(float, 0), default=0.2, help="epsilon_high of Eq. (8)")
    add("--tau", type=positive, default=1.0, help="tau of Eq. (6): the larger, the closer all weights are to 1")
    add("--w-min", type=positive, default=0.5, help="smallest weight of Eq. (6), before normalization")
    add("--w-max", type=positive, default=2.0, help="largest weight of Eq. (6), before normalization")
    add("--lam", type=share, default=1.0, help="lambda of Eq. (7): 0 is GRPO")
    add("--role-balanced", action="store_true", help="baseline of Eq. (5): mean of the two roles' means, not of all tokens")
    add("--sign-aware", action="store_true", help="where the advantage is negative, weigh tokens of low contrast more")
    add("--no-renormalization", action="store_true", help="leave out the second line of Eq. (6)")
    add("--answer-is-reasoning", action="store_true", help="give the answer's tokens a weight too, as reasoning")
    add("--corrupt-both", action="store_true", help="the corrupted image on both sides of Eq. (3)")
    add("--corruption", default="patch", choices=CORRUPTIONS, help="how the image of Eq. (2) is corrupted")
    add("--corruption-p", type=share, default=0.6, help="its strength: share of masked patches, noise level, blur radius")
    add("--plain", action="store_true", help="score every response with a prompt of its own: the same numbers, slower")
    add("--lora", type=count, metavar="RANK", default=None, help="train low-rank adapters only (needs: pip install peft)")
    add("--merge-lora", action="store_true", help="at the end, write the model with its adapters merged to DIR/merged")
    add("--train-vision", action="store_true", help="train the vision tower too, which is frozen otherwise")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of everything that is drawn at random")
    add("--device", default=None, help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", default=None, choices=("float32", "bfloat16"), help="of computing; weights are float32 (default: bfloat16 on cuda)")
    add("--out", metavar="DIR", help="folder of the run, new or empty (default: a new one in out/)")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its own options")
    add("--eval-only", action="store_true", help="evaluate the model, with --data on all of its rows, and stop")
    add("--eval-every", type=number(int, 0), default=20, help="steps between evaluations; 0: only before and after")
    add("--eval-size", type=count, default=256, help="held-out examples")
    add("--sample-every", type=number(int, 0), default=20, help="steps between groups kept for extras/report.py; 0: none")
    add("--save-every", type=number(int, 0), default=20, help="steps between checkpoints; 0: only the last")
    add("--image-size", type=number(int, 24), default=None, help=f"side of drawn images in pixels {auto['image_size']}")
    add("--warmup-steps", type=number(int, 0), default=400, help="tiny: steps on true demonstrations")
    add("--noisy-steps", type=number(int, 0), default=100, help="tiny: further steps on demonstrations with wrong facts")
    add("--warmup-noise", type=share, default=0.2, help="tiny: rate of wrong facts in those")
    add("--cache", metavar="DIR", default=str(cache), help="tiny: where warmed-up models are kept")
    return parser


def parse_options(argv: list[str] | None) -> tuple[argparse.Namespace, Path | None]:
    """The options, and the folder of the run, made and claimed by its args.json. None with --eval-only and no --out."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if args.out:
            raise InputError("--out: not with --resume, which goes on in its own folder")
        try:
            options = json.loads((Path(args.resume) / "args.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"--resume {args.resume}: not the folder of a run (no args.json there)") from None
        parser.set_defaults(**options)
        args = parser.parse_args(argv)
        for name, value in options.items():
            if getattr(args, name) != value and name not in ("steps", "micro_batch"):  # at most the last digits change
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {getattr(args, name)}: the run in {args.resume} was started with {value}; leave it out")
    for name, (tiny, other) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, tiny if model.is_tiny(args.model) else other)
    if args.lora and args.train_vision:
        raise InputError("--train-vision: not with --lora, whose adapters leave the vision tower frozen; drop one of them")
    if args.w_min > args.w_max:
        raise InputError(f"--w-min {args.w_min:g}: above --w-max {args.w_max:g}")
    if args.verifier == "math":
        VERIFIERS["math"]("1", "1")  # now, and not after the first batch, if it is not installed
    if args.merge_lora and not args.lora:
        raise InputError("--merge-lora: there is nothing to merge without --lora RANK")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: not available here ({model.first_line(error)}); try --device cpu") from None
    if args.eval_only and not args.out:
        return args, Path(args.resume) if args.resume else None
    return args, claim(args)


def claim(args) -> Path:
    """Make the run's folder and write its options there, or go back to it for --resume."""
    name = f"{Path(args.model).name}-{args.algo}-seed{args.seed}"
    named = (Path("out") / (name + end) for end in ("", *(f"-{i}" for i in range(2, 10**6))))
    out = Path(args.resume or args.out or next(p for p in named if not used(p)))
    options = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "eval_only")}

    def fill(folder):
        for name in LOGS:
            (folder / name).touch()
        (folder / "args.json").write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")

    try:
        if args.resume:
            rewind(out)
        elif used(out):
            raise InputError(f"--out {out}: not empty; go on with --resume {out}, or name another folder")
        elif out.exists() and any(out.iterdir()):
            shutil.rmtree(out)  # claimed before, by a run that stopped before its first evaluation
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    if not args.resume:
        write_folder(out, fill)  # at once, so that whatever is there can be resumed
    return out


def used(out: Path) -> bool:
    """Whether a folder holds anything but the options of a run that has recorded nothing yet."""
    if not out.exists():
        return False
    return {p.name for p in out.iterdir()} - {"args.json", *LOGS} != set() or bool(read_log(out))


def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        args, out = parse_options(argv)
        if not args.eval_only:
            train(args, out)
        else:
            task = own_task(args.data, eval_only=True) if args.data else drawn_task(args)
            held_out = task.eval_set(args.eval_size)
            policy, _, _, step = prepare(args, out)
            result = {"step": step, "eval": evaluate(policy, held_out, args)[0]}
            print(json.dumps(result))
            if args.out:
                with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                    write(file, result)
            show_samples(policy, held_out[:3], args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "not enough memory" not in str(error):
            raise
        advice = "lower --micro-batch, --max-new-tokens or --max-pixels, or train adapters only with --lora 16"
        print(f"error: out of memory on {args.device}: {advice}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
