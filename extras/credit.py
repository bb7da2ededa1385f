"""Responses of a policy with the credit of every token, for report.py and contrast.py.

All of it is made by the pieces of train.py's loop, called in the loop's order: what is shown is
what is trained. The loop leaves responses without advantage out; here they stay, with weight 1.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from data import Example, InputError, Verdict  # noqa: E402
from srpo import (  # noqa: E402
    contrast_scores,
    group_advantages,
    role_aware_advantages,
    without_perception,
)

# Options of train.py that have a part in what contrast.py and distribution.py measure.
OPTIONS = "--model --task --reward --device --dtype --seed --corruption-p --tau --w-min --w-max"
OPTIONS += " --weights --group-size --temperature --max-new-tokens --micro-batch --max-pixels"
OPTIONS += " --warmup-steps --warmup-lr --warmup-noise --image-size"


@dataclass
class Batch:
    """B responses of up to T tokens to N prompts: what the loop samples and verifies."""

    examples: list[Example]  # N of them
    prompts: model.Prompts
    rollout: model.Rollout
    responses: list[tuple[str, list]]  # text, and the characters that each token touches
    verdicts: list[Verdict]
    A: Tensor  # [B]
    roles: Tensor  # [B, T]

    def __getitem__(self, rows: Tensor) -> "Batch":
        """These responses alone; the prompts stay."""
        return replace(
            self,
            rollout=self.rollout[rows],
            responses=[self.responses[row] for row in rows.tolist()],
            verdicts=[self.verdicts[row] for row in rows.tolist()],
            A=self.A[rows],
            roles=self.roles[rows],
        )


@dataclass
class Credit:
    """The credit of its tokens: as the loop scores and weighs them, each [B, T]."""

    delta: Tensor  # the contrasts of steps 2 to 4; 0 where A = 0 and under GRPO, not measured there
    w: Tensor  # 1 where A = 0 and under GRPO
    A_hat: Tensor


def sample(policy: model.Policy, examples: list[Example], args, step: int) -> Batch:
    """The batch of a step: responses to the examples, their rewards, the roles of their tokens."""
    prompts = policy.encode(examples)
    limits = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    rng = train.generator(args, step)
    rollout = policy.sample(prompts, args.group_size, generator=rng, **limits)
    responses = policy.decode(rollout)
    verdicts = train.judge_all(train.build_judge(args), responses, rollout, examples)
    rewards = [verdict.reward for verdict in verdicts]
    A = group_advantages(rewards, args.group_size).to(policy.device)  # [B], step 1
    roles = train.response_roles(responses, rollout)  # [B, T]
    return Batch(examples, prompts, rollout, responses, verdicts, A, roles)


def corrupted_log_probs(policy: model.Policy, batch: Batch, args, step: int) -> Tensor:
    """[B, T], for step 2."""
    copies = train.corrupted_copies(batch.examples, policy, args, step)
    corrupted = policy.encode(copies, fitted=True)
    return train.score(policy, corrupted, batch.rollout, args)


def blank_log_probs(policy: model.Policy, batch: Batch, args) -> Tensor:
    """[B, T], for step 3."""
    visible = without_perception(batch.rollout.mask, batch.roles)  # [B, T]
    cache = batch.rollout.prompt_cache
    return train.score(policy, batch.prompts, batch.rollout, args, visible, cache)


def weights(batch: Batch, logp_corrupted: Tensor, logp_blank: Tensor, args, step: int) -> Tensor:
    """w [B, T], SRPO's or those of --weights."""
    weigh = train.build_weigh(args)
    logps = (batch.rollout.logp, logp_corrupted, logp_blank)
    return weigh(*logps, batch.roles, batch.A, **train.weight_options(args, batch.rollout, step))


def credit(policy: model.Policy, batch: Batch, args, step: int) -> Credit:
    """What the responses are credited with in a step."""
    delta = torch.zeros_like(batch.rollout.logp)  # [B, T]
    w = torch.ones_like(delta)
    used = batch.A.nonzero()[:, 0]
    if args.algo == "grpo":
        return Credit(delta, w, batch.A[:, None].expand_as(w))
    if len(used) > 0:
        part = batch[used]
        logp_corrupted = corrupted_log_probs(policy, part, args, step)
        logp_blank = blank_log_probs(policy, part, args)
        delta[used] = contrast_scores(part.rollout.logp, logp_corrupted, logp_blank, part.roles)
        w[used] = weights(part, logp_corrupted, logp_blank, args, step)
    return Credit(delta, w, role_aware_advantages(batch.A, w, args.lam))


def finished(folder: Path) -> tuple[argparse.Namespace, model.Policy, int]:
    """Options of a run, the policy of its last checkpoint, and the step of that.

    It goes to the folder in which the run was begun.

    Raises InputError: there is no checkpoint, it cannot be loaded, or options of today are missing.
    """
    folder = folder.absolute()
    options = read_options(folder)
    checkpoint = train.Run(folder).checkpoint()
    if checkpoint is None:
        raise InputError(f"{folder}: holds no checkpoint, so nothing can be sampled")
    known = vars(train.build_parser().parse_args([]))
    if not set(known) <= set(options):
        raise InputError(f"{folder}: made by an earlier version, so nothing can be sampled")
    args = argparse.Namespace(**options)
    train.Run(folder).go_back()
    if not torch.cuda.is_available():
        args.device = "cpu"
    transformers.utils.logging.disable_progress_bar()
    step = int(checkpoint.name.split("-")[1])
    return args, train.load_policy(args, checkpoint), step


def resolve_options(words: list[str], allowed: str, script: str) -> argparse.Namespace:
    """Options of train.py with their values; InputError for one that has no part in the script."""
    known = vars(train.build_parser().parse_args([]))
    for word in words:
        option = word.split("=")[0]
        is_option = option.startswith("--") and option[2:].replace("-", "_") in known
        if is_option and option not in allowed.split():
            raise InputError(f"{option}: has no part in {script}; leave it out")
    return train.resolve_options(words)


def read_options(folder: Path) -> dict:
    """The options of a run with their values. InputError where the folder is not that of a run."""
    try:
        options = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError("args.json is not an object")
        return options
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not the folder of a run of train.py ({error})") from None


def load(args) -> model.Policy:
    """The policy to measure: the tiny model after its warm-up, or any other as it is."""
    return train.load_policy(args, train.warmed_up(args, train.Run(".")))


if __name__ == "__main__":
    print(
        "error: no script: extras/report.py shows it, extras/contrast.py measures it",
        file=sys.stderr,
    )
    sys.exit(2)
