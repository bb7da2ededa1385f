"""Train a vision-language model with SRPO, or with GRPO on the same seeds and data (--algo grpo).

    python train.py                                      the built-in tiny model, a minute on a CPU
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data my.jsonl --out out/my-run
    python train.py --resume out/my-run                  after a crash, from the last checkpoint

Read `train` from top to bottom: sample, verify, score, weigh, update, report. What is drawn in
step k depends on the seed and on k alone, so a resumed run is the same run, but for rounding on a
GPU or on several threads, where the order of sums varies.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout  # comes with torch
from torch import Tensor
from tqdm import tqdm

import data
import model
from corrupt import CORRUPTIONS, corrupt
from data import InputError, Verdict, averages, blame, demonstrate, is_out_of_memory, verify
from srpo import (
    Role,
    contrast_scores,
    group_advantages,
    kl_to_reference,
    policy_loss,
    role_aware_advantages,
    token_roles,
    token_weights,
    without_perception,
)

# What an option left out means: for the tiny model, for a real one, for a real one with --lora.
PRESETS = {
    "steps": (40, 200, 200),
    "prompts": (24, 8, 8),
    "max_new_tokens": (48, 512, 512),
    "micro_batch": (1024, 8, 8),
    "lr": (1e-4, 1e-6, 1e-5),
    "max_pixels": (None, 602_112, 602_112),
    "eval_temperature": (1.0, 0.0, 0.0),
    "image_size": (48, 336, 336),
    "warmup_steps": (320, 0, 0),
}
TINY = {name: tiny for name, (tiny, _, _) in PRESETS.items()}
REAL = {name: real for name, (_, real, _) in PRESETS.items()}
REAL_LORA = {name: lora for name, (_, _, lora) in PRESETS.items()}
WARMUP_VERSION = 2  # raise it when a change alters the warmed-up tiny model, which is cached


def train(args: argparse.Namespace, run: "Run") -> None:
    """B responses of up to T tokens a step, G to each prompt; [b, T] is a micro-batch of them."""
    judge = build_judge(args)
    task = build_task(args, judge)
    weigh = build_weigh(args)
    records = run.log()
    check_data(records, task, args)
    run.send = build_log(args, run)
    policy, reference, optimizer, scaler = prepare(args, run, task)
    run.restore(optimizer, scaler, args.device)
    check_prompts(policy, task.prompts, args)
    if not records:
        start = evaluate(policy, task.eval_set(args.eval_size), judge, args, step=0)
        run.write({**start, "data": task.fingerprint})
    history = [record for record in records if "eval" not in record]
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    clip = {"clip_low": args.clip_low, "clip_high": args.clip_high}
    if_not_finite = "lower --lr, and look at --reward and --weights"
    steps = range(run.steps_done() + 1, args.steps + 1)
    bar = tqdm(steps, args.algo, initial=run.steps_done(), total=args.steps, disable=None)
    for step in bar:
        # Sample G responses to each prompt.
        clock = [time.perf_counter()]
        examples = task.train_batch(step - 1, args.prompts)
        prompts = policy.encode(examples)
        rng = generator(args, step)
        rollout = policy.sample(prompts, args.group_size, generator=rng, **sampling)
        lengths = rollout.mask.sum(dim=1)  # [B], EOS included, padding excluded
        truncated = ~policy.ended(rollout)  # [B]
        n_tokens = lengths.sum()  # of all responses: leaving some out does not change the loss
        clock.append(time.perf_counter())

        # Verify: a reward for each response, compared within its group.
        responses = policy.decode(rollout)
        verdicts = judge_all(judge, responses, rollout, examples)
        rewards = [verdict.reward for verdict in verdicts]
        A = group_advantages(rewards, args.group_size).to(policy.device)  # [B], step 1
        used_groups = int(A.view(-1, args.group_size).any(dim=1).sum())
        if args.kl_coef == 0:  # without advantage no gradient: these responses are left out
            used = A.nonzero()[:, 0]
            responses = [responses[i] for i in used.tolist()]
            rollout = rollout[used]
            A = A[used]
        roles = response_roles(responses, rollout)  # [B, T]
        mask = rollout.mask  # [B, T]

        # Score the same tokens in other contexts, without gradient. GRPO needs none.
        if args.algo == "srpo":
            corrupted = policy.encode(corrupted_copies(examples, policy, args, step), fitted=True)
            logp_corrupted = score(policy, corrupted, rollout, args)  # [B, T], for step 2
            visible = without_perception(mask, roles)  # [B, T]
            cache = rollout.prompt_cache  # of the same prompts and images
            logp_blank = score(policy, prompts, rollout, args, visible, cache)  # for step 3
        if args.kl_coef > 0:
            ref_logp = reference_log_probs(policy, reference, prompts, rollout, args)  # [B, T]
        clock.append(time.perf_counter())

        # Weigh the tokens of each response: here SRPO leaves GRPO, which gives them all A.
        if args.algo == "srpo":
            options = weight_options(args, rollout, step)
            # Steps 2 to 6, and 9: `srpo_weights`, or what --weights puts in its place.
            w = weigh(rollout.logp, logp_corrupted, logp_blank, roles, A, **options)
            A_hat = role_aware_advantages(A, w, args.lam)  # [B, T], step 7
        else:
            w = torch.ones_like(rollout.logp)
            A_hat = A[:, None].expand_as(w)

        # Update: an optimizer step per inner epoch. Gradients of micro-batches add up.
        totals = {"loss": 0.0, "clip_frac": 0.0}
        if args.kl_coef > 0:
            totals["kl"] = 0.0
        grad_norms = []
        old_logp = torch.zeros_like(rollout.logp)  # [B, T], pi_old
        for epoch in range(args.inner_epochs):
            for start in range(0, len(A), args.micro_batch):
                rows = slice(start, start + args.micro_batch)
                logp = policy.log_probs(prompts, rollout[rows], args.temperature)  # [b, T]
                if epoch == 0:
                    # Nothing has been updated yet. `rollout.logp` is the same but for rounding,
                    # as it was computed a token at a time; with this the first ratio is 1.
                    old_logp[rows] = logp.detach()
                loss, stats = policy_loss(
                    logp, old_logp[rows], A_hat[rows], mask[rows], denominator=n_tokens, **clip
                )  # step 8
                if args.kl_coef > 0:
                    share = mask[rows].sum() / n_tokens
                    stats["kl"] = share * kl_to_reference(logp, ref_logp[rows], mask[rows])
                    loss = loss + args.kl_coef * stats["kl"]
                scaler.scale(loss).backward()  # the scaler acts in float16 alone
                stats["loss"] = loss
                for name in totals:
                    totals[name] += stats[name].item() / args.inner_epochs
            grad_norms.append(optimizer_step(optimizer, scaler, step, if_not_finite))
        clock.append(time.perf_counter())

        # Report, evaluate, save.
        record = {"step": step, **averages(verdicts), "kl": None, **totals}
        record.update(used_groups=used_groups, grad_norm=grad_norms[-1])
        record["skipped"] = grad_norms.count(None)
        record["length"] = lengths.float().mean().item()
        record["truncated"] = truncated.float().mean().item()
        record.update(token_metrics(rollout, old_logp, roles, w))
        seconds = np.diff(clock).tolist()
        record.update(sec_generate=seconds[0], sec_score=seconds[1], sec_update=seconds[2])
        run.write(record)
        history.append(record)
        say_progress(bar, record)
        say_trouble(history)
        last = step == args.steps
        if last or (args.eval_every and step % args.eval_every == 0):
            run.write(evaluate(policy, task.eval_set(args.eval_size), judge, args, step))
            run.keep_best(policy)
        if last or (args.save_every and step % args.save_every == 0):
            run.save(step, policy, optimizer, scaler)  # at the end: it holds all records so far
    summarize(run)


def generator(args, step: int, purpose: int = 0) -> torch.Generator:
    """Random numbers of one step; purpose 0 is training, 1 evaluation."""
    seed = np.random.SeedSequence((args.seed, step, purpose)).generate_state(1, np.uint64)[0]
    return torch.Generator(args.device).manual_seed(int(seed >> np.uint64(1)))


def judge_all(judge, responses: list, rollout, examples: list) -> list[Verdict]:
    """The verdict on each response, against the example that it answers."""
    rows = zip(responses, rollout.prompt.tolist(), strict=True)
    return [judge(text, examples[i]) for (text, _), i in rows]


def response_roles(responses: list, rollout) -> Tensor:
    """[B, T] of `Role` values, from the text and the token offsets of each response."""
    roles = torch.zeros(rollout.ids.shape, dtype=torch.long)
    for row, (text, offsets) in enumerate(responses):
        roles[row, : len(offsets)] = token_roles(text, offsets, data.TAGS)
    return roles.to(rollout.ids.device)


def corrupted_copies(examples: list, policy, args, step: int) -> list:
    """The examples with corrupted images: one draw per prompt, shared by its group."""
    how = {"kind": args.corruption, "p": args.corruption_p, "patch": policy.patch}
    copies = []
    for i, example in enumerate(examples):
        fitted = [policy.fit(image) for image in example.images]
        images = [corrupt(x, seed=(args.seed, step, i, k), **how) for k, x in enumerate(fitted)]
        copies.append(replace(example, images=tuple(images)))
    return copies


@torch.no_grad()
def score(policy, prompts, rollout, args, visible=None, prompt_cache=None) -> Tensor:
    """Log-probs [B, T] of a rollout, without gradient, a micro-batch at a time."""
    if visible is None:
        visible = rollout.mask
    logp = torch.zeros_like(rollout.logp)
    for start in range(0, len(logp), args.micro_batch):
        rows = slice(start, start + args.micro_batch)
        part = rollout[rows]
        logp[rows] = policy.log_probs(prompts, part, args.temperature, visible[rows], prompt_cache)
    return logp


def reference_log_probs(policy, reference, prompts, rollout, args) -> Tensor:
    """[B, T], by the reference policy: a model of its own, or this one without its adapters."""
    if reference is not None:
        return score(reference, prompts, rollout, args)
    with policy.adapter.disable_adapter():
        return score(policy, prompts, rollout, args)


def srpo_weights(logp, logp_corrupted, logp_blank, roles, A, *, tau, w_min, w_max, **_) -> Tensor:
    """w [B, T], steps 2 to 6 and 9. `--weights FILE.py:NAME` puts another function in its place.

    Args:
        logp, logp_corrupted, logp_blank: [B, T], as in `srpo.contrast_scores`, of every token;
            logp_blank is 0 at hidden ones.
        roles: [B, T] of `Role` values.
        A: [B], step 1.
        tau, w_min, w_max: as the options say. Keywords that this reading does without: entropy
            of the policy at each token, [B, T], nats; progress, 0 in the first step, 1 in the last.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)  # step 2, step 3, step 4
    return token_weights(delta, roles, tau=tau, w_min=w_min, w_max=w_max)  # step 5, step 6, step 9


def weight_options(args, rollout, step: int) -> dict:
    """What a function of the weights gets by keyword."""
    progress = min(1.0, (step - 1) / max(1, args.steps - 1))  # a report may ask beyond the run
    limits = {"tau": args.tau, "w_min": args.w_min, "w_max": args.w_max}
    return {**limits, "entropy": rollout.entropy, "progress": progress}


def token_metrics(rollout, old_logp, roles, w) -> dict:
    """Means over tokens of the responses that were used; None where there is no such token."""
    ratio_off = ((old_logp - rollout.logp).exp() - 1).abs()  # by rounding alone
    values = {
        "entropy": rollout.entropy[rollout.mask],
        "ratio_off": ratio_off[rollout.mask],
        "w_perception": w[roles == Role.PERCEPTION],
        "w_reasoning": w[roles == Role.REASONING],
    }
    return {name: x.mean().item() if len(x) else None for name, x in values.items()}


def optimizer_step(optimizer, scaler, step: int, cause: str) -> float | None:
    """A step along the gradients that have added up, cut to norm 1; their norm before.

    None where float16 has overflowed: the scaler leaves the step out and lowers its scale.
    InputError where the gradient is not finite for another reason, before it spoils the weights.
    """
    parameters = optimizer.param_groups[0]["params"]
    if all(parameter.grad is None for parameter in parameters):
        return 0.0  # no response has an advantage
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not math.isfinite(norm):
        if scaler.get_scale() <= 1:  # 1 in other dtypes
            raise InputError(f"step {step}: the gradient is not finite: {cause}")
        norm = None
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def say_progress(bar, record: dict) -> None:
    said = f"accuracy {record['accuracy']:.2f}"
    bar.set_postfix_str(said)
    if bar.disable:  # no terminal shows it
        print(f"step {record['step']}: {said}", file=sys.stderr, flush=True)


def say_trouble(history: list[dict]) -> None:
    """Every five steps: what keeps the policy from learning, and what to try."""
    if len(history) % 5 != 0:
        return
    first = history[0]
    now = history[-1]
    formless = all(record["format"] < 0.02 for record in history[-5:])
    idle = all(record["used_groups"] == 0 for record in history[-5:])
    if formless:
        said = "almost no response had the three blocks in the last five steps"
    elif idle:
        said = "rewards did not differ in any group in the last five steps"
    else:
        return
    if formless and first["format"] > 0.5:
        cause = f"{first['format']:.0%} had them in step {first['step']}; try a lower --lr"
    elif now["truncated"] > 0.5:
        cause = "most responses are cut off; try a larger --max-new-tokens"
    elif formless:
        cause = "try extras/cold_start.py, which imitates demonstrations first"
    elif now["accuracy"] > 0.5:
        cause = "most responses are right; try harder data"
    else:
        cause = "most responses are wrong; try easier data, or a larger --group-size"
    figures = f"mean reward {now['reward']:.2f}, {now['format']:.0%} well-formed"
    tqdm.write(f"{said}: {figures}; {cause}", file=sys.stderr)


def evaluate(policy, examples: Iterable, judge, args, step: int) -> dict:
    """Record of a response to each example, from the same seed each time."""
    rng = generator(args, 0, purpose=1)
    limits = {"max_new_tokens": args.max_new_tokens, "temperature": args.eval_temperature}
    verdicts = []
    samples = []
    examples = iter(tqdm(examples, "evaluating", leave=False, disable=None))
    asked = list(islice(examples, 64))
    while asked:
        rollout = policy.sample(policy.encode(asked), 1, generator=rng, **limits)
        for (text, _), example in zip(policy.decode(rollout), asked, strict=True):
            verdict = judge(text, example)
            verdicts.append(verdict)
            if len(samples) < 3:
                sample = {"question": example.question, "answer": example.answer, "response": text}
                samples.append({**sample, "verdict": in_words(verdict)})
        asked = list(islice(examples, 64))
    figures = {**averages(verdicts), "n": len(verdicts), "temperature": args.eval_temperature}
    return {"step": step, "eval": figures, "samples": samples}


def in_words(verdict: Verdict) -> str:
    if verdict.accuracy != 1:
        return "wrong"
    if verdict.grounded is None:
        return "right"
    if verdict.grounded == 1:
        return "right, and what it rests on was seen"
    return "right, but what it rests on was not all seen"


def summarize(run: "Run") -> None:
    """The first evaluation against the last, and one answer in both."""
    records = run.log()
    evaluations = [record for record in records if "eval" in record]
    shown = [evaluations[0]]
    if len(evaluations) > 1:
        shown.append(evaluations[-1])
    temperature = shown[-1]["eval"].get("temperature")  # earlier versions did not record it
    steps = ", ".join(f"step {record['step']}" for record in shown)
    n = shown[0]["eval"]["n"]
    print(f"\n{n} held-out examples, sampled at temperature {temperature}: {steps}")
    for name in Verdict.__dataclass_fields__:
        values = [record["eval"][name] for record in shown]
        if None not in values:
            print(f"{name:12}" + "".join(f"{value:10.3f}" for value in values))
    weighed = [r for r in records if r.get("w_perception") and r.get("w_reasoning")]
    if weighed:
        means = "perception {w_perception:.2f}, reasoning {w_reasoning:.2f}".format(**weighed[-1])
        print(f"mean weight in step {weighed[-1]['step']}: {means}")
    print("\n{question}  (answer: {answer})".format(**shown[0]["samples"][0]))
    for record in shown:
        sample = record["samples"][0]
        print(f"step {record['step']}, {sample.get('verdict', 'answered')}: {sample['response']}")
    print(f"\nmetrics and checkpoint: {run.path}")
    best = max(evaluations, key=lambda record: record["eval"]["accuracy"])
    if (run.path / "best").exists():
        print(f"best accuracy {best['eval']['accuracy']:.3f}, step {best['step']}: {run.path}/best")


# ---- what the loop works with


def build_task(args, judge=None):
    """The drawn task, or the rows of --data, whose answers must be right by the judge if given."""
    if args.data:
        options = {"system": args.system, "eval_all": args.eval_all, "judge": judge}
        task = data.OwnTask(args.data, args.seed, **options)
        if not args.reward:
            note_hard_answers([example.answer for example, _ in task.prompts])
        if len(task.eval_rows) > 0.3 * len(task.prompts) and not args.eval_all:
            shares = f"{len(task.eval_rows)} of {len(task.prompts)} rows are held out"
            print(f"note: {shares}, as rows that share an image stay together", file=sys.stderr)
        return task
    task = drawn_task(args)
    if judge is not None:
        (example,) = task.eval_set(1)
        judge(data.respond("a", "b", example.answer), example)  # one that fails does so now
    return task


def check_data(records: list[dict], task, args) -> None:
    """InputError where a run goes on with other rows: its held-out ones would be others."""
    if records and records[0].get("data", task.fingerprint) != task.fingerprint:
        said = "has changed since the run began; put it back, or begin a new run"
        raise InputError(f"--data {args.data}: {said}")


def drawn_task(args) -> data.DrawnTask:
    options = {"seed": args.seed, "size": args.image_size, "system": args.system}
    return data.DrawnTask(args.task, **options)


def note_hard_answers(answers: list[str]) -> None:
    """Say when many answers are more than the numbers and words that `verify` compares."""
    hard = r"\\|\$|\d ?(°|%|cm\b|kg\b|m\b)|^\(?[A-J]\)?\.?$"  # formulas, units, choices
    found = [answer for answer in answers if re.search(hard, answer)]
    if len(found) > 0.05 * len(answers):
        share = f"{len(found) / len(answers):.0%} of the answers, like {found[0]!r},"
        advice = "--reward extras/answers.py:reward grades them"
        print(f"note: {share} look like formulas, units or choices: {advice}", file=sys.stderr)


def build_weigh(args):
    """`srpo_weights`, or the function that --weights names; tried out before it is needed."""
    if not args.weights:
        return srpo_weights
    function = load_function("--weights", args.weights)

    def weigh(logp, *tensors, **options):
        if len(logp) == 0:  # no response has an advantage
            return torch.ones_like(logp)
        with blame(f"--weights {args.weights}"):
            w = function(logp, *tensors, **options)
            if w.shape != logp.shape:
                raise ValueError(f"weights {list(w.shape)} for tokens {list(logp.shape)}")
        return w

    logp = torch.full((2, 3), -1.0)
    roles = torch.tensor([[Role.PERCEPTION, Role.REASONING, Role.OTHER]] * 2)
    options = {"tau": args.tau, "w_min": args.w_min, "w_max": args.w_max, "progress": 0.0}
    weigh(logp, logp, logp, roles, torch.tensor([1.0, -1.0]), entropy=-logp, **options)
    return weigh


def build_judge(args):
    """(response text, example) -> Verdict: `verify`, or the function that --reward names."""
    if not args.reward:
        return verify
    function = load_function("--reward", args.reward)

    def judge(text: str, example: data.Example) -> Verdict:
        with blame(f"--reward {args.reward}: {example.source or example.question}"):
            found = function(text, example)
            if not isinstance(found, Verdict):
                found = replace(verify(text, example), reward=float(found))
            for figure in (found.reward, found.accuracy, found.format):
                if not math.isfinite(figure):  # TypeError where it is no number
                    raise ValueError(f"{figure} is not finite")
        return found

    return judge


def build_log(args, run: "Run"):
    """What the function that --log names returns, a function (numbers, step); None without."""
    if not args.log:
        return None
    function = load_function("--log", args.log)
    with blame(f"--log {args.log}: cannot start"):
        return function(run.path, vars(args))


def load_function(option: str, place: str):
    """The function that FILE.py:NAME says, or InputError."""
    file, _, name = place.rpartition(":")
    sys.path.insert(0, str(Path(file).resolve().parent))  # for what it imports from beside it
    with blame(f"{option} {place}: no such function FILE.py:NAME"):
        return runpy.run_path(file)[name]


def prepare(args, run: "Run", task):
    """Policy, reference (or None), optimizer, and the scaler of float16 gradients."""
    if args.model == "tiny":
        torch.set_num_threads(1)  # sharing such small products over threads does not pay
        if args.data:
            said = "note: --model is tiny, which knows the words of drawn tasks alone"
            print(said, file=sys.stderr)
    initial = warmed_up(args, run)
    policy = load_policy(args, run.checkpoint() or initial)
    trained = trainable(policy, args)
    reference = None
    if args.kl_coef > 0 and not (args.lora and policy.adapts(initial)):
        reference = load_policy(args, initial)  # else it is the policy without its adapters
    # Trained weights are float32: at lr 1e-6 an update of a bf16 weight would be rounded away.
    options = {"lr": args.lr, "betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(trained, **options)
    return policy, reference, optimizer, gradient_scaler(args)


def gradient_scaler(args) -> torch.amp.GradScaler:
    """For float16, whose smallest numbers gradients fall below; else it does nothing."""
    options = {"init_scale": 2.0**10, "enabled": args.dtype == "float16"}
    return torch.amp.GradScaler(torch.device(args.device).type, **options)


def check_prompts(policy, prompts: list, args) -> None:
    """InputError where a prompt leaves no room for its response. Says what a real model takes."""
    context = policy.model.config.get_text_config().max_position_embeddings
    longest = (0, 0)
    for example, sizes in prompts:
        length = policy.prompt_length(example, sizes)
        if length[0] + args.max_new_tokens > context:
            said = f"{length[0]} tokens, {length[1]} of them visual, and --max-new-tokens "
            said += f"{args.max_new_tokens} exceed the model's {context}; lower --max-pixels"
            raise InputError(f"{example.source or example.question}: {said}")
        longest = max(longest, length)
    if not model.is_tiny(args.model):
        print(what_it_takes(policy, *longest, args), file=sys.stderr)


def what_it_takes(policy, tokens: int, visual_tokens: int, args) -> str:
    """Parameters, the longest prompt, and an estimate of memory (extras/README.md, what fits)."""
    total = sum(x.numel() for x in policy.model.parameters())
    trained = sum(x.numel() for x in policy.model.parameters() if x.requires_grad)
    needed = 16 * trained + 4 * (total - trained)  # weights, gradients, Adam's two moments
    if args.kl_coef > 0 and not args.lora:
        needed += 4 * total  # the reference
    if args.dtype != "float32":
        needed += 2 * total  # the copy that is computed with
    if args.dtype != "float32" and args.lora:
        needed -= 4 * (total - trained)  # frozen weights have the copy alone
    config = policy.model.config.get_text_config()
    bytes_a_layer = 22 * config.hidden_size + 8 * config.intermediate_size  # for each token
    if args.recompute:
        bytes_a_layer = 4 * config.hidden_size
    kept = tokens + min(args.micro_batch, args.group_size) * args.max_new_tokens
    needed += kept * config.num_hidden_layers * bytes_a_layer + 2**30
    there = "on the CPU, which is slow"
    if args.device.startswith("cuda"):
        _, memory = torch.cuda.mem_get_info(args.device)
        there = f"of {memory / 2**30:.0f} there"
        if needed > memory:
            there += ": try --recompute, then --lora 16, then a smaller --max-pixels"
    counts = f"{trained / 1e6:,.0f} of {total / 1e6:,.0f} million parameters are trained"
    prompt = f"the longest prompt has {tokens} tokens, {visual_tokens} of them visual"
    return f"{counts}; {prompt}; about {needed / 2**30:.0f} GiB are needed, {there}"


def load_policy(args, name) -> model.Policy:
    options = {"device": args.device, "max_pixels": args.max_pixels, "seed": args.seed}
    dtype = getattr(torch, args.dtype)
    policy = model.load(str(name), dtype=dtype, frozen=bool(args.lora), **options)
    if args.recompute:
        model.recompute_layers(policy.model)
    return policy


def trainable(policy, args) -> list:
    """The parameters to train: adapters, or all but the vision tower."""
    if not args.lora:
        policy.model.model.visual.requires_grad_(args.train_vision)
    elif policy.adapter is None:
        policy.add_lora(args.lora, args.seed)
    return [parameter for parameter in policy.model.parameters() if parameter.requires_grad]


def warmed_up(args, run: "Run") -> str:
    """What RL starts from: --model, or the folder of the tiny one after its warm-up.

    The tiny model is fluent then, and sees what is not there: that is for RL to put right. It is
    made once, and kept for other runs.
    """
    if args.model != "tiny":
        return args.model
    names = ["task", "seed", "image_size", "system", "device", "dtype"]
    names += ["warmup_steps", "warmup_lr", "warmup_noise"]
    versions = [WARMUP_VERSION, torch.__version__, transformers.__version__]
    made_by = versions + [getattr(args, name) for name in names]
    key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
    folder = cache_folder(run) / f"tiny-{key}"
    with FileLock(f"{folder}.lock"):  # another run may be making the same one
        if not folder.exists():
            policy = load_policy(args, "tiny")
            task = drawn_task(args)
            check_prompts(policy, task.prompts, args)
            parameters = list(policy.model.parameters())  # the vision tower, too, which is random
            for _ in imitate(policy, parameters, task, TINY["prompts"], args):
                pass
            write_folder(folder, policy.save)
    return str(folder)


def cache_folder(run: "Run") -> Path:
    """Where warmed-up tiny models are kept; the run's own folder where there is no cache."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    return run.path


def imitate(policy, parameters: list, demonstrations, n: int, args) -> Iterator[int]:
    """Supervised steps on n demonstrations each; yields the number of each step that is done.

    The last fifth has a tenth of --warmup-lr, and in drawn demonstrations --warmup-noise.
    """
    options = {"lr": args.warmup_lr, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(parameters, **options)
    scaler = gradient_scaler(args)
    true_steps = args.warmup_steps * 4 // 5
    ramp_steps = max(1, args.warmup_steps // 16)  # in which the rate rises
    for step in tqdm(range(args.warmup_steps), "imitating demonstrations", disable=None):
        ramp = (step + 1) / ramp_steps
        decay = max(0.1, 1.1 - step / max(1, true_steps))
        optimizer.param_groups[0]["lr"] = args.warmup_lr * min(1, ramp, decay)
        noise = args.warmup_noise if step >= true_steps else 0.0
        rng = np.random.default_rng((args.seed, step, 3))
        examples = demonstrations.train_batch(10**6 + step, n)  # RL never gets so far
        prompts = policy.encode(examples)
        written = policy.as_rollout([demonstrate(example, noise, rng) for example in examples])
        for start in range(0, len(examples), args.micro_batch):
            rows = slice(start, start + args.micro_batch)
            logp = policy.log_probs(prompts, written[rows], temperature=1.0)
            scaler.scale(-logp.sum() / written.mask.sum()).backward()
        optimizer_step(optimizer, scaler, step + 1, cause="lower --warmup-lr (cold_start.py: --lr)")
        yield step + 1


# ---- the folder of a run


class Run:
    """The folder of a run. Whatever a kill leaves in it can be resumed, to the same numbers."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.send = None  # what --log gives: a function (numbers, step)

    def lock(self) -> None:
        """Keep the folder to this process, for as long as it lives."""
        self.held = FileLock(self.path / "lock")
        try:
            self.held.acquire(blocking=False)
        except Timeout:
            said = "another process is at work there; stop it, or wait"
            raise InputError(f"{self.path}: {said}") from None

    def claim(self, options: dict) -> None:
        """Make the folder, with the run's options in it."""
        if any(self.path.glob("*")):
            advice = f"give a new folder, or go on with a run by --resume {self.path}"
            raise InputError(f"--out {self.path}: not empty; {advice}")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.keep_options(options)

    def discard(self) -> None:
        """Remove the folder of a run that never began: its name is free for another try."""
        if not self.metrics.exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def keep_options(self, options: dict) -> None:
        beside = self.path / "args.json.tmp"
        beside.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path / "args.json")

    def go_back(self) -> list[str]:
        """Change to the folder in which it was begun; the options that it was begun with."""
        with blame(f"--resume {self.path}: not the folder of a run"):
            options = json.loads((self.path / "args.json").read_text(encoding="utf-8"))
            argv = []
            for name in (*PRESETS, "lora", "dtype"):  # left out, they may mean another value by now
                if options.get(name) is not None:
                    argv += [f"--{name.replace('_', '-')}", str(options[name])]
            argv += [str(word) for word in options["argv"]]
        began_in = Path(options.get("cwd", "."))
        if began_in.is_dir():
            os.chdir(began_in)  # where the relative paths among the options begin
        return argv

    def log(self) -> list[dict]:
        """Records of the run, without a last line that a kill has cut off."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().split(b"\n")[:-1]
        with blame(f"{self.metrics}: not the records of a run"):
            return [json.loads(line) for line in lines]

    def write(self, record: dict) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.send is not None:
            kind = "eval" if "eval" in record else "train"
            figures = record.get("eval", record)
            numbers = {f"{kind}/{name}": x for name, x in figures.items() if x is not None}
            try:
                with blame("--log: no more"):
                    self.send(numbers, record["step"])
            except InputError as error:  # no run ends for want of a live curve
                tqdm.write(str(error), file=sys.stderr)
                self.send = None

    def checkpoint(self) -> Path | None:
        """The last whole one; what a kill has left half written has another name."""
        return max(self.path.glob("checkpoint-" + 6 * "[0-9]"), default=None)

    def steps_done(self) -> int:
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return 0
        return int(checkpoint.name.removeprefix("checkpoint-"))

    def keep_best(self, policy) -> None:
        """The policy in best/, if the evaluation just written has the highest accuracy so far."""
        accuracies = [record["eval"]["accuracy"] for record in self.log() if "eval" in record]
        if accuracies[-1] > max(accuracies[:-1]):
            write_folder(self.path / "best", policy.save)

    def save(self, step: int, policy, optimizer, scaler) -> None:
        """A checkpoint, in the place of the one before it."""

        def fill(folder):
            policy.save(folder)
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            torch.save(state, folder / "trainer.pt")
            shutil.copy(self.metrics, folder)

        checkpoint = self.path / f"checkpoint-{step:06d}"
        write_folder(checkpoint, fill)
        for old in self.path.glob("checkpoint-*"):
            if old != checkpoint:
                shutil.rmtree(old)

    def rewind(self) -> None:
        """Back to the records of the last checkpoint; what came after it is made again."""
        self.lock()
        checkpoint = self.checkpoint()
        if checkpoint is None:
            print("no checkpoint was made yet: the run begins anew", file=sys.stderr)
            self.metrics.unlink(missing_ok=True)
        else:  # without a copy in the checkpoint this fails, and leaves the records as they are
            shutil.copy(checkpoint / "metrics.jsonl", self.metrics)

    def restore(self, optimizer, scaler, device: str) -> None:
        """The last checkpoint's state into optimizer and scaler."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return
        with blame(f"{checkpoint}: remove it, trainer.pt is broken"):
            state = torch.load(checkpoint / "trainer.pt", map_location=device, weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            if state.get("scaler"):  # empty in other dtypes, and missing in earlier versions
                scaler.load_state_dict(state["scaler"])
        print(f"going on from step {self.steps_done()}", file=sys.stderr)


def write_folder(folder: Path, fill) -> None:
    """Make `folder` whole or leave it as it is: `fill` writes beside it, then it is renamed."""
    beside = folder.with_name(f"{folder.name}.tmp")
    before = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(beside, ignore_errors=True)  # left by a process that was killed
    try:
        with blame(f"{folder}: cannot be written"):
            beside.mkdir(parents=True)
            fill(beside)
            if folder.exists():
                shutil.rmtree(before, ignore_errors=True)
                folder.rename(before)
                beside.rename(folder)
                shutil.rmtree(before, ignore_errors=True)
            else:
                beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# ---- the options


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind, low, high=10**12):
    def number(text):  # argparse complains by this name
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: from {low} to {high}")
        return value

    return number


def build_parser() -> Parser:
    parser = Parser(allow_abbrev=False, description="Train with SRPO, or with GRPO.")
    whole = number(int, 0, 10**6 - 1)  # a checkpoint has six digits
    count = number(int, 1, 10**6)
    positive = number(float, 1e-12, 1e12)
    share = number(float, 0, 1)
    function = "FILE.py:NAME"

    def add(option, help, default=None, **kwargs):
        name = option[2:].replace("-", "_")
        if "choices" not in kwargs and "action" not in kwargs:
            kwargs.setdefault("type", filled)
        if TINY.get(name) is not None:
            help += f" (tiny: {TINY[name]}, a real model: {REAL[name]}"
            if REAL_LORA[name] != REAL[name]:
                help += f", with --lora: {REAL_LORA[name]}"
            help += ")"
        elif default is not None and default is not False and default != "":
            help += f" (default: {default})"
        group.add_argument(option, default=default, help=help, **kwargs)  # the group begun last

    group = parser.add_argument_group("what most people need first")
    add("--model", "tiny, a folder, or a hub name such as Qwen/Qwen2-VL-2B-Instruct", "tiny")
    add("--data", "JSON lines of image(s), question, answer; else a drawn task", metavar="FILE")
    add("--system", "what each chat begins with", "", metavar="TEXT", type=str)
    add("--task", "which drawn task", "count", choices=data.TASKS)
    add("--reward", "your own reward, (response text, example) -> float", metavar=function)
    add("--algo", "grpo: the same advantage for every token", "srpo", choices=("srpo", "grpo"))
    add("--steps", "batches of responses to train on; 0 only evaluates", type=whole)
    add("--lora", "train low-rank adapters only: pip install peft", metavar="RANK", type=count)
    add("--out", "folder of the run, new or empty (default: a new one in out/)", metavar="DIR")
    add("--resume", "go on with the run in DIR, with its own options", metavar="DIR")
    add("--log", "send metrics there, too, as extras/loggers.py:wandb does", metavar=function)
    group = parser.add_argument_group("method")
    add("--corruption", "of images, for step 2", "patch", choices=list(CORRUPTIONS))
    add("--corruption-p", "how strong it is", 0.6, type=share)
    add("--tau", "temperature of step 6, nats", 1.0, type=positive)
    add("--w-min", "smallest weight in step 6, before they are normalized", 0.8, type=positive)
    add("--w-max", "largest weight in step 6, before they are normalized", 1.2, type=positive)
    add("--lam", "lambda of step 7; 0 is GRPO", 1.0, type=share)
    add("--weights", "in the place of steps 2 to 6, as srpo_weights in train.py", metavar=function)
    add("--group-size", "G, responses to each prompt", 8, type=number(int, 2, 10**4))
    add("--temperature", "of sampling, and of every log-prob", 1.0, type=number(float, 1e-3))
    add("--kl-coef", "beta of step 8; 0 loads no reference", 0.0, type=number(float, 0))
    add("--clip-low", "step 8 clips ratios below 1 - this", 0.2, type=share)
    add("--clip-high", "step 8 clips ratios above 1 + this", 0.2, type=number(float, 0))
    group = parser.add_argument_group("training")
    add("--prompts", "prompts a step", type=count)
    add("--max-new-tokens", "longest response", type=count)
    add("--inner-epochs", "optimizer steps on each batch of responses", 1, type=count)
    add("--lr", "learning rate of AdamW", type=positive)
    add("--train-vision", "the vision tower, too, else frozen", False, action="store_true")
    add("--seed", "of everything that is drawn at random", 0, type=number(int, 0, 2**62))
    group = parser.add_argument_group("memory and machine")
    add("--micro-batch", "responses in memory at a time, in scoring and update", type=count)
    add("--max-pixels", "area that images are shrunk to (a real model: 602112)", type=count)
    add("--recompute", "layers again in the backward pass: less memory", False, action="store_true")
    add("--device", "cpu, cuda, cuda:1 ...", "cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", "of computing (a real model on a GPU: 16 bits, as it can)", choices=dtypes)
    group = parser.add_argument_group("evaluation and checkpoints")
    add("--eval-every", "steps between evaluations; 0: only before and after", 20, type=whole)
    add("--eval-size", "held-out examples", 256, type=number(int, 1, 10**5))
    add("--eval-temperature", "0: the likeliest token", type=number(float, 0))
    add("--eval-all", "hold out all rows of --data", False, action="store_true")
    add("--save-every", "steps between checkpoints; 0: only the last", 20, type=whole)
    group = parser.add_argument_group("drawn tasks, and the warm-up of the tiny model")
    add("--warmup-steps", "batches of demonstrations that it imitates first", type=whole)
    add("--warmup-lr", "learning rate of that", 2e-3, type=positive)
    add("--warmup-noise", "rate of wrong facts in the last fifth of it", 0.25, type=share)
    add("--image-size", "side of drawn images in pixels", type=number(int, 24, 4096))
    return parser


def presets(args: argparse.Namespace) -> dict:
    """Values of the options that were left out."""
    if args.model == "tiny":
        return TINY
    if model.is_tiny(args.model):
        return {**TINY, "warmup_steps": 0}  # a saved tiny model has had its own
    if args.lora:
        return REAL_LORA
    return REAL


def default_dtype(args: argparse.Namespace) -> str:
    if not args.device.startswith("cuda") or model.is_tiny(args.model):
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16"


def resolve_options(argv: list[str]) -> argparse.Namespace:
    """All options with their values, checked."""
    args = build_parser().parse_args(argv)
    with blame(f"--device {args.device}: not possible here"):
        torch.zeros(1, device=args.device).item()
        if args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)  # kernels in Triton run on the current one
    adapters = model.adapter_config(args.model)
    if adapters is not None:
        if args.lora not in (None, adapters["r"]):
            said = f"the adapters in {args.model} have rank {adapters['r']}; leave it out"
            raise InputError(f"--lora {args.lora}: {said}")
        args.lora = adapters["r"]
    for name, value in presets(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dtype is None:
        args.dtype = default_dtype(args)
    if args.w_min > args.w_max:
        raise InputError(f"--w-min {args.w_min}: above --w-max {args.w_max}")
    if args.eval_all and not args.data:
        raise InputError("--eval-all: only with --data, whose rows it holds out")
    if args.eval_all and args.steps > 0:
        raise InputError("--eval-all: leaves no rows to train on; give --steps 0, too")
    if args.warmup_steps > 0 and args.model != "tiny":
        said = "only with --model tiny; extras/cold_start.py makes the start of any other"
        raise InputError(f"--warmup-steps {args.warmup_steps}: {said}")
    if args.weights and args.algo == "grpo":
        raise InputError("--weights: not with --algo grpo, which weighs nothing")
    if args.lora and args.train_vision:
        raise InputError("--train-vision: not with adapters, which keep the vision tower frozen")
    if args.lora:
        model.import_peft()
    return args


def open_run(argv: list[str]) -> tuple[argparse.Namespace, Run]:
    """The options, and the folder of the run, claimed or gone back to."""
    args = build_parser().parse_args(argv)
    if args.resume:
        run = Run(Path(args.resume).resolve())
        given = {word.split("=")[0] for word in argv if word.startswith("--")}
        for option in sorted(given - {"--resume", "--steps", "--micro-batch"}):
            said = f"not with --resume, which takes the options of {args.resume}"
            raise InputError(f"{option}: {said}")
        words = [*run.go_back(), *argv]
        args = resolve_options(words)
        run.rewind()
        if args.steps < run.steps_done():
            said = f"{run.path} has made {run.steps_done()} steps already"
            raise InputError(f"--steps {args.steps}: {said}")
        if len(given) > 1:  # more steps: the next --resume goes on to them, too
            run.keep_options({"argv": words, "cwd": os.getcwd(), **vars(args)})
    else:
        args = resolve_options(argv)
        run = Run(args.out or new_folder(args))
        run.claim({"argv": argv, "cwd": os.getcwd(), **vars(args)})
    return args, run


def new_folder(args) -> Path:
    """A folder in out/ that is not there yet, named by the model, the method and the seed."""
    path = Path(args.model)
    if re.fullmatch(r"checkpoint-\d+|best", path.name):
        path = path.resolve().parent
    name = f"{path.name}-{args.algo}"
    parser = build_parser()
    for option in ("task", "corruption", "tau", "w_min", "w_max", "lam", "weights", "lora"):
        value = getattr(args, option)
        if value != parser.get_default(option):
            short = str(value).rpartition(":")[2]  # of FILE.py:NAME the name
            name += f"-{option.replace('_', '-')}-{short}"
    name += f"-seed{args.seed}"
    path = Path("out", name)
    number = 1
    while path.exists():
        number += 1
        path = Path("out", f"{name}-{number}")
    return path


def main(argv: list[str] | None = None) -> int:
    def terminated(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminated)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have all characters
    run = None
    try:
        args, run = open_run(sys.argv[1:] if argv is None else argv)
        train(args, run)
        if sys.stdout is not None:
            sys.stdout.flush()  # where nobody reads, this fails here and not at the exit
        return 0
    except KeyboardInterrupt as stop:  # what was whole stays, a step in progress is dropped
        went = f"go on with: python train.py --resume {run.path}" if run else "nothing was begun"
        print(f"\nstopped; {went}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:  # nobody reads the summary to its end, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        said = str(error)  # not the error, which would keep the run, and its lock
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        ways = "lower --micro-batch, --prompts, --max-new-tokens or --max-pixels"
        said = f"out of memory: {ways}, or give --recompute or --lora 16"
        if "fragmentation" in str(error):
            said += "; PYTORCH_ALLOC_CONF=expandable_segments:True may help, too"
    if run is not None and not args.resume:
        run.discard()
    if run is not None and run.checkpoint() is not None:
        said += f"; the last checkpoint is {run.checkpoint()}"
    print(f"error: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
