"""The conditions of the study: what each of them is, and the options of train.py that make it.

A condition with the name of a recorded one is the same reading. What the weights are made of comes
from the functions of `readings.py`, numbers and corruptions are options.
"""

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
GROUPS = {
    "A": "readings of the abstract",
    "B": "which part does the harm",
    "C": "what helps",
    "D": "relatives",
}


class Condition(NamedTuple):
    group: str  # of study_tables.GROUPS
    what: str
    options: str | None  # of train.py; None: recorded by earlier commits, and not to be run here


def reading(name: str) -> str:
    """Options of train.py for a function of readings.py."""
    return f"--weights {shlex.quote(str(HERE / 'readings.py'))}:{name}"


def wide(options: str) -> str:
    """With the range [0.5, 2]: in the default's a weight is too near 1 to do much, good or bad."""
    return f"--w-min 0.5 --w-max 2 {options}".strip()


# Commits 325f1a5 and a854feb ran these. They need the log-probs of all words, other roles or
# another context, none of which a function for --weights is given.
PAST = None
READINGS = {
    "range-0.5-2": (
        "a wider range in step 6; all below but softmax, sigmoid and rlsd have it",
        wide(""),
    ),
    "answer_is_reasoning=true": (
        "reasoning tokens for deriving answers: is the answer in R?",
        PAST,
    ),
    "corruption=noise": ("corrupted visual inputs: how", wide("--corruption noise")),
    "corruption=blur": ("corrupted visual inputs: how", wide("--corruption blur")),
    "corruption=grey": ("corrupted visual inputs: how", wide("--corruption grey")),
    "corruption=shuffle": ("corrupted visual inputs: how", wide("--corruption shuffle")),
    "corruption=pixelate": ("corrupted visual inputs: how", wide("--corruption pixelate")),
    "p=0.3": ("corrupted visual inputs: how strong", wide("--corruption-p 0.3")),
    "p=1": ("corrupted visual inputs: how strong", wide("--corruption-p 1")),
    "contrast=absolute": (
        "visual dependency: what is made of the log-ratio",
        wide(reading("absolute")),
    ),
    "contrast=k3": ("visual dependency: what is made of the log-ratio", wide(reading("k3"))),
    "corrupt_both=true": (
        "consistency with the generated perception: the image of step 3 too?",
        PAST,
    ),
    "role_balanced=true": (
        "shared trajectory-level baseline: mean of the roles' means?",
        wide(reading("role_balanced")),
    ),
    "median-baseline": (
        "shared trajectory-level baseline: the median?",
        wide(reading("median_baseline")),
    ),
    "log-mean-exp-baseline": (
        "shared trajectory-level baseline: of probability ratios?",
        wide(reading("log_mean_exp_baseline")),
    ),
    "tau=0.3": ("positive token weights: temperature of step 6", wide("--tau 0.3")),
    "tau=3": ("positive token weights: temperature of step 6", wide("--tau 3")),
    "normalize=false": (
        "adjust relative update magnitudes: is the mean over S made 1?",
        wide(reading("unnormalized")),
    ),
    "lam=0.5": (
        "adjust relative update magnitudes: how far from weight 1; 0 is GRPO",
        wide("--lam 0.5"),
    ),
    "sign_aware=true": (
        "optimization direction: is the emphasis turned round where A < 0?",
        wide(reading("sign_aware")),
    ),
    "softmax": ("no limits in step 6", reading("softmax")),
    "sigmoid": ("2 sigmoid for exp in step 6, without limits", reading("sigmoid")),
    "linear": ("1 + x for exp in step 6", wide(reading("linear"))),
    "jensen-shannon": ("divergence over the vocabulary for the log-ratio", PAST),
    "rlsd": ("range (0.8 to 1.2), sign and fading of RLSD", reading("sign_aware_fading")),
    "positive-only": ("weight 1 where A < 0", wide(reading("positive_only"))),
    "standardized": ("contrasts over their standard deviation", wide(reading("standardized"))),
    "standardized-tau-3": (
        "the same, few at a limit",
        wide("--tau 3 " + reading("standardized")),
    ),
    "role-standardized": ("each role standardized by itself", wide(reading("role_standardized"))),
}
CONTROLS = {
    "shuffled": ("SRPO's weights, permuted inside the response", wide(reading("shuffled"))),
    "perception-only": (
        "SRPO inside the perception, else 1",
        wide(reading("perception_only")),
    ),
    "reasoning-only": ("SRPO inside the reasoning, else 1", wide(reading("reasoning_only"))),
    "role-baselines": ("a baseline and mean 1 for each role", wide(reading("role_baselines"))),
    "role-baselines+sign": (
        "the same, turned round where A < 0",
        wide(reading("role_baselines_sign_aware")),
    ),
    "roles-only": ("SRPO's mean weight of the role", wide(reading("roles_only"))),
    "pattern-only": ("SRPO's weight over that mean", wide(reading("pattern_only"))),
    "state-only": ("the weight to be expected at this place", PAST),
    "token-only": ("SRPO's weight over that to be expected", PAST),
    "zero-mean": ("log-ratio less its expectation at this place, no baseline", PAST),
}
HELPS = {
    "inverted": ("SRPO with the opposite emphasis", wide(reading("inverted"))),
    "entropy": ("entropy of the policy for the contrast", wide(reading("entropy"))),
    "entropy-x-dependency": (
        "entropy times size of the contrast",
        wide(reading("entropy_x_dependency")),
    ),
}
RELATIVES = {  # as they are, without SRPO's baseline and normalization
    "relative-rlsd": ("weights of RLSD, with SRPO's contrasts", reading("rlsd")),
    "relative-vppo": ("weights of VPPO", "--corruption-p 0.5 " + reading("vppo")),
    "relative-pgpo": ("weights of PGPO", reading("pgpo")),
    "relative-tor": ("weights of ToR", reading("tor")),
}
CONDITIONS = {
    "grpo": Condition("", "weight 1 everywhere", "--algo grpo"),
    "srpo": Condition("", "as in srpo.py, with the default choices", ""),
}
for group, conditions in zip("ABCD", (READINGS, CONTROLS, HELPS, RELATIVES), strict=True):
    for name, (what, options) in conditions.items():
        CONDITIONS[name] = Condition(group, what, options)
RUNNABLE = [name for name, condition in CONDITIONS.items() if condition.options is not PAST]


if __name__ == "__main__":
    print("error: no script: python extras/study.py --conditions NAME,NAME", file=sys.stderr)
    sys.exit(2)
