"""Where the contrasts and the weights of a model lie: percentiles, limits, roles, entropy.

    python extras/distribution.py                                          the warmed-up tiny model
    python extras/distribution.py --model cold --prompts 8                 after a cold start
    python extras/distribution.py --model RUN_DIR/checkpoint-000200 --tau 3

It samples responses to questions of the drawn task and scores them as the training loop does. Only
responses that SRPO weighs are counted: those that step 9 leaves to GRPO are not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import credit  # noqa: E402
import transformers  # noqa: E402
from readings import scored_tokens  # noqa: E402
from script import exit_code  # noqa: E402
from torch import Tensor  # noqa: E402

import train  # noqa: E402
from srpo import Role, contrast_scores, shared_baseline  # noqa: E402

# SmolLM2-135M-Instruct as the language model of a Qwen2-VL with a new vision tower, after 20 steps:
#   python extras/cold_start.py --model FOLDER --steps 60 --image-size 112 --max-new-tokens 96 \
#       --out smol
#   python extras/distribution.py --model smol --prompts 8 --max-new-tokens 128
REAL_135M = {
    "delta of perception, 5 %": -0.11,
    "delta of perception, 50 %": 0.00,
    "delta of perception, 95 %": 0.13,
    "delta of reasoning, 5 %": -0.17,
    "delta of reasoning, 50 %": 0.74,
    "delta of reasoning, 95 %": 4.85,
    "share of weights at a limit": 0.92,
    "mean weight of perception": 0.89,
    "mean weight of reasoning": 1.13,
    "entropy where w > 1": 0.42,
    "entropy where w < 1": 0.82,
}
# The same after 400 steps that trained its vision tower as well (extras/README.md has the command).
REAL_135M_SEEING = {
    "delta of perception, 5 %": -0.22,
    "delta of perception, 50 %": 0.05,
    "delta of perception, 95 %": 5.00,
    "delta of reasoning, 5 %": 0.00,
    "delta of reasoning, 50 %": 0.50,
    "delta of reasoning, 95 %": 5.00,
    "share of weights at a limit": 0.98,
    "mean weight of perception": 0.97,
    "mean weight of reasoning": 1.04,
    "entropy where w > 1": 0.11,
    "entropy where w < 1": 0.17,
}
OPTIONS = f"{credit.OPTIONS} --data --system --corruption"
ROLES = {"perception": Role.PERCEPTION, "reasoning": Role.REASONING}


def relative(delta: Tensor, roles: Tensor, tau: float = 1.0) -> Tensor:
    """(delta - b) / tau, [B, T]: what step 6 limits to log w_min .. log w_max."""
    return (delta - shared_baseline(delta, roles)) / tau


def share_at_limit(relative: Tensor, w_min: float, w_max: float) -> float:
    """Share of these numbers that step 6 limits."""
    w = relative.exp()
    return mean(((w <= w_min) | (w >= w_max)).float())


def mean(x: Tensor) -> float:
    """NaN of nothing."""
    return x.mean().item()


def figures(batch: credit.Batch, logp_corrupted: Tensor, logp_blank: Tensor, args) -> dict:
    """Figures of a batch, by their names in the table."""
    roles = batch.roles
    delta = contrast_scores(batch.rollout.logp, logp_corrupted, logp_blank, roles)  # [B, T]
    w = credit.weights(batch, logp_corrupted, logp_blank, args, step=1)
    scored = scored_tokens(delta, roles)
    found = {}
    for name, role in ROLES.items():
        of_role = delta[scored & (roles == role)]
        for percent in (5, 50, 95):
            figure = float("nan")
            if len(of_role) > 0:
                figure = of_role.quantile(percent / 100).item()
            found[f"delta of {name}, {percent} %"] = figure
    near = relative(delta, roles, args.tau)[scored]
    found["share of weights at a limit"] = share_at_limit(near, args.w_min, args.w_max)
    for name, role in ROLES.items():
        found[f"mean weight of {name}"] = mean(w[scored & (roles == role)])
    found["entropy where w > 1"] = mean(batch.rollout.entropy[scored & (w > 1)])
    found["entropy where w < 1"] = mean(batch.rollout.entropy[scored & (w < 1)])
    return found


def measure(argv: list[str] | None) -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = train.Parser(
        allow_abbrev=False,
        description="Where the contrasts and the weights of a model lie.",
        epilog=f"And of train.py: {OPTIONS}",
    )
    count = train.number(int, 1, 10**6)
    parser.add_argument("--prompts", type=count, default=24, help="questions (default: 24)")
    mine, others = parser.parse_known_args(argv)
    args = credit.resolve_options(others, OPTIONS, "distribution.py")
    args.prompts = mine.prompts
    train.build_weigh(args)  # one that fails does so now
    policy = credit.load(args)
    examples = train.build_task(args).train_batch(0, args.prompts)
    batch = credit.sample(policy, examples, args, step=1)
    logp_corrupted = credit.corrupted_log_probs(policy, batch, args, step=1)
    logp_blank = credit.blank_log_probs(policy, batch, args)
    found = figures(batch, logp_corrupted, logp_blank, args)
    responses = len(batch.responses)
    weighed = int((batch.roles > 0).any(dim=1).sum())
    asked = args.data if args.data else f"task {args.task}"
    print(f"{args.model}, {asked}: {weighed} of {responses} responses have roles")
    print("\n| figure | value |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")


def main(argv: list[str] | None = None) -> int:
    return exit_code(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
