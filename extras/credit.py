"""Responses of a policy with the credit of every token, found as the loop of train.py finds it.

The same steps as paragraphs 1 to 4 of the loop, for what shows them (report.py) or measures them
(contrast.py): there they stand in one piece, here they can be asked for one at a time.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from corrupt import corrupt  # noqa: E402
from data import InputError, OwnTask, Verdict, verify  # noqa: E402
from srpo import (  # noqa: E402
    Role,
    contrast_scores,
    group_advantages,
    role_aware_advantages,
    token_roles,
    token_weights,
    without_perception,
)


@dataclass
class Credit:
    """B responses of up to T tokens, and everything about them that the loop knows."""

    rollout: model.Rollout
    responses: list[tuple[str, list]]  # text, and the characters of each token
    verdicts: list[Verdict]
    A: Tensor  # [B]
    roles: Tensor  # [B, T]
    scored: Tensor  # [B, T], the same, but none where A = 0: there is nothing to weigh
    delta: Tensor  # [B, T], 0 with --algo grpo
    w: Tensor  # [B, T], 1 with --algo grpo
    A_hat: Tensor  # [B, T]


def finished(folder: Path) -> tuple[argparse.Namespace, model.Policy, int]:
    """Options of a run, the policy of its last checkpoint, and the step of that.

    Raises:
        InputError: there is no checkpoint, or it cannot be loaded.
    """
    args = argparse.Namespace(**json.loads((folder / "args.json").read_text(encoding="utf-8")))
    if not (checkpoint := train.Run(folder).checkpoint()):
        raise InputError(f"{folder}: holds no checkpoint, so nothing can be sampled")
    if "choice" not in args:
        raise InputError(f"{folder}: made by an earlier version, so nothing can be sampled")
    transformers.utils.logging.disable_progress_bar()
    args.device = args.device if torch.cuda.is_available() else "cpu"
    options = {"device": args.device, "dtype": getattr(torch, args.dtype), "max_pixels": args.max_pixels}
    policy = model.load(str(checkpoint), **options)
    policy.micro_batch = args.micro_batch
    return args, policy, int(checkpoint.name.split("-")[1])


def defaults(**options) -> argparse.Namespace:
    """All options of train.py with the values that they have for the tiny model, but for `options`."""
    args = train.build_parser().parse_args(["--device", "cpu"])
    vars(args).update(train.TINY, dtype="float32")
    vars(args).update({k: v for k, v in options.items() if v is not None})
    args.choice = {name: v[2] for name, v in train.CHOICES.items()} | dict(args.choice)
    return args


def warmed_up(args) -> model.Policy:
    """The tiny model after its warm-up, which is made once."""
    load = partial(model.load, device=args.device, seed=args.seed)
    return load(str(train.warmed_up(args, train.Run("."), load)))


def task_of(args):
    return OwnTask(args.data, args.seed, args.steps == 0) if args.data else train.drawn_task(args)


def judge_of(args):
    return train.reward_from(args.reward) if args.reward else verify


def corruption(policy, args, step: int, kind: str | None = None):
    """What corrupts the images of a step: (i, image) -> image."""
    how = {"kind": kind or args.choice["corruption"], "patch": policy.patch, "p": args.choice["p"]}
    return lambda i, image: corrupt(image, seed=(args.seed, step, i), **how)


def sample(policy, prompts, args, generator) -> tuple[model.Rollout, list, Tensor]:
    """A group of responses to each prompt, their texts and offsets, and the role of each token, [B, T]."""
    limits = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    rollout = policy.sample(prompts, args.group_size, generator=generator, **limits)
    responses, roles = policy.decode(rollout), torch.zeros_like(rollout.ids)
    for row, (text, offsets) in enumerate(responses):
        found = token_roles(text, offsets, answer_is_reasoning=args.choice["answer_is_reasoning"])
        roles[row, : len(offsets)] = found.to(roles)
    return rollout, responses, roles


@torch.no_grad()
def contrasts(policy, prompts, rollout, roles: Tensor, args) -> Tensor:
    """delta, [B, T]: steps 2 to 4. `prompts` hold the corrupted images."""
    P, R, both = roles == Role.PERCEPTION, roles == Role.REASONING, args.choice["corrupt_both"]
    score = partial(policy.log_probs, prompts, rollout, temperature=args.temperature)
    blank = without_perception(rollout.mask, roles)
    logp_corrupted, _ = score(corrupted=True, wanted=P | (R & both))
    logp_blank, _ = score(visible=blank, wanted=R, corrupted=both, reuse=not both)
    logp = torch.where(R & both, logp_corrupted, rollout.logp)
    return contrast_scores(logp, logp_corrupted, logp_blank, roles, contrast=args.choice["contrast"])


def weights(delta: Tensor, roles: Tensor, args, flip: Tensor | None = None) -> Tensor:
    """w, [B, T]: steps 5, 6 and 9."""
    options = {k: args.choice[k] for k in ("tau", "w_min", "w_max", "normalize", "role_balanced")}
    return token_weights(delta, roles, flip=flip, **options)


def credit(policy, prompts, examples, args, generator) -> Credit:
    """Sample, verify, score and weigh one batch."""
    rollout, responses, roles = sample(policy, prompts, args, generator)
    judge, asked = judge_of(args), [examples[i] for i in rollout.prompt.tolist()]
    verdicts = [judge(text, example) for (text, _), example in zip(responses, asked, strict=True)]
    A = group_advantages([v.reward for v in verdicts], args.group_size).to(roles.device)
    scored, delta = roles.masked_fill((A == 0)[:, None], Role.OTHER), torch.zeros_like(rollout.logp)
    if args.algo == "srpo":
        delta = contrasts(policy, prompts, rollout, scored, args)
    w = weights(delta, scored, args, flip=A < 0 if args.choice["sign_aware"] else None)
    A_hat = role_aware_advantages(A, w, args.choice["lam"])
    return Credit(rollout, responses, verdicts, A, roles, scored, delta, w, A_hat)
