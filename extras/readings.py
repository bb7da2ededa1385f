"""What the token weights might be instead: every reading of the abstract and every control, as a function.

A function takes a `Batch`, what a step of the loop knows when it weighs, and the options of
`srpo.token_weights`; it gives w, [B, T]. Where the text says delta := x, x takes the place of the contrast,
and steps 5 and 6 (baseline, limits, mean 1 over S) stay SRPO's. w~ is the weight before it is normalized.
Step 9 holds for all: `weigh` leaves 1 where srpo would. `CONDITIONS` has each by name, with one line on what
it is; all but srpo, softmax and rlsd have the range [0.5, 2], since within the default's, [0.8, 1.2], a
weight is too near 1 to do much, good or bad. `Recorder` puts one into the loop of train.py and keeps what its
weights go along with.
"""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import contrast  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from srpo import CHOICES, Role, shared_baseline, token_weights  # noqa: E402


@dataclass
class Batch:
    """B responses of up to T tokens, over V words; none of it with gradient."""

    delta: Tensor  # [B, T], steps 2 to 4
    roles: Tensor  # [B, T], OTHER where A = 0, too
    A: Tensor  # [B], step 1
    logp: Tensor  # [B, T, V], log pi at each position, of the policy that sampled, at its temperature
    other: Tensor  # [B, T, V], the same with the corrupted image at P, without perception at R; else anything
    progress: float = 0.0  # 0 in the first step of the run, 1 in the last
    noise: torch.Generator | None = None  # for what is drawn
    max_abs: float = 5.0  # Delta_max of step 4

    def __post_init__(self):
        P, R = self.roles == Role.PERCEPTION, self.roles == Role.REASONING
        usable = P.any(1) & R.any(1) & (self.delta.isfinite() | ~(P | R)).all(1)  # [B], step 9
        self.P, self.R = P & usable[:, None], R & usable[:, None]
        self.S = self.P | self.R  # [B, T], the scored positions, without the rows of step 9
        self.at_limit = torch.zeros_like(self.S)  # [B, T], where step 6 met one of its limits

    @cached_property
    def pi(self) -> Tensor:
        return self.logp.exp()  # [B, T, V]

    @cached_property
    def entropy(self) -> Tensor:
        """H(pi) at each position, [B, T], in nats."""
        return -(self.pi * self.logp.clamp(min=-1e4)).sum(-1)  # 0 * -inf at words that cannot be sampled

    @cached_property
    def ratio(self) -> Tensor:
        """The contrast of every word, [B, T, V]; that of the sampled word is delta."""
        ratio = torch.where(self.pi > 0, self.logp - self.other, 0)
        return ratio.clamp(-self.max_abs, self.max_abs)


def mean(x: Tensor, where: Tensor) -> Tensor:
    """Row mean over `where`, [B, T] -> [B, 1]; 0 for a row without any. Elsewhere x may be NaN."""
    return x.masked_fill(~where, 0).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)


def std(x: Tensor, where: Tensor) -> Tensor:
    """Row standard deviation (of the population) over `where`, [B, T] -> [B, 1], at least 1e-6."""
    return mean((x - mean(x, where)) ** 2, where).sqrt().clamp(min=1e-6)


def turned(x: Tensor, flip: Tensor | None) -> Tensor:
    """x [B, ...] with another sign in the rows `flip` [B]."""
    return x if flip is None else torch.where(flip.view(-1, *[1] * (x.dim() - 1)), -x, x)


def step_6(
    batch: Batch, relative: Tensor, where: Tensor, *, tau, w_min, w_max, normalize=True, flip=None, **_
) -> Tensor:  # fmt: skip
    """Step 6 of any [B, T] in the place of delta - b: w over `where`, 1 elsewhere."""
    x, low, high = turned(relative, flip) / tau, math.log(w_min), math.log(w_max)
    batch.at_limit = batch.at_limit | (where & ((x <= low) | (x >= high)))
    w = x.clamp(low, high).exp()  # w~
    return torch.where(where, w / mean(w, where) if normalize else w, 1)


# ----------------------------------------------------------------------------------- readings of the abstract


def srpo(batch: Batch, delta: Tensor | None = None, **options) -> Tensor:
    """Steps 5, 6 and 9 as they are, with delta := another [B, T] where one is given."""
    delta = batch.delta if delta is None else delta
    b = shared_baseline(delta, batch.roles, role_balanced=options.get("role_balanced", False))
    step_6(batch, delta - b, batch.S, **options)  # for at_limit alone
    return token_weights(delta, batch.roles, **options)


def jensen_shannon(batch: Batch, **options) -> Tensor:
    """delta := JS(pi, pi') over the vocabulary, in nats, pi' being pi in step 2's or 3's other context. VEPO
    (arXiv 2606.03937) takes this divergence, without the roles."""
    middle = torch.logaddexp(batch.logp, batch.other) - math.log(2)  # [B, T, V]
    kl = [torch.where(x.exp() > 0, x.exp() * (x - middle), 0).sum(-1) for x in (batch.logp, batch.other)]
    return srpo(batch, sum(kl) / 2, **options)


def rlsd(batch: Batch, **options) -> Tensor:
    """1 - lam + lam w, lam falling from 0.5 in the first step to 0 in the last (RLSD, arXiv 2604.03128). Its
    range is the default, its sign (flip where A < 0) an option; baseline and mean 1 stay SRPO's."""
    lam = 0.5 * (1 - batch.progress)
    return 1 - lam + lam * srpo(batch, **options)


def positive_only(batch: Batch, **options) -> Tensor:
    """SRPO where A > 0, weight 1 where A < 0."""
    return torch.where(batch.A[:, None] > 0, srpo(batch, **options), 1)


def standardized(batch: Batch, **options) -> Tensor:
    """delta - b over the standard deviation of delta, which is that of the trajectory, over S."""
    return srpo(batch, batch.delta / std(batch.delta, batch.S), **options)


def role_standardized(batch: Batch, **options) -> Tensor:
    """delta := (delta - its mean over the role) / its standard deviation over the role; then the baseline."""
    z = [(batch.delta - mean(batch.delta, x)) / std(batch.delta, x) for x in (batch.P, batch.R)]
    return srpo(batch, torch.where(batch.P, *z), **options)


# ---------------------------------------------------------------------------------- which part does the harm


def shuffled(batch: Batch, **options) -> Tensor:
    """SRPO's weights, permuted inside each trajectory: the same magnitudes without the information."""
    w = srpo(batch, **options)
    for row, scored in zip(w, batch.S, strict=True):
        where = scored.nonzero()[:, 0]
        row[where] = row[where[torch.randperm(len(where), generator=batch.noise)]]
    return w


def only(role: Role) -> Callable[..., Tensor]:
    """SRPO inside one role, with a baseline and a mean weight of 1 of its own; weight 1 in the other."""

    def weights(batch: Batch, **options) -> Tensor:
        where = batch.S & (batch.roles == role)
        return step_6(batch, batch.delta - mean(batch.delta, where), where, **options)

    return weights


def role_baselines(batch: Batch, **options) -> Tensor:
    """A baseline and a mean weight of 1 for each role: nothing moves from one role to the other."""
    return torch.where(batch.P, *(only(x)(batch, **options) for x in (Role.PERCEPTION, Role.REASONING)))


def roles_only(batch: Batch, **options) -> Tensor:
    """The mean of SRPO's w over the role, at each of its tokens."""
    w = srpo(batch, **options)
    return torch.where(batch.P, mean(w, batch.P), mean(w, batch.R))


def pattern_only(batch: Batch, **options) -> Tensor:
    """SRPO's w over its mean over the role."""
    return srpo(batch, **options) / roles_only(batch, **options).masked_fill(~batch.S, 1)


def sampled_and_expected(batch: Batch, *, tau, w_min, w_max, normalize=True, flip=None, **others):
    """w~(o) of the sampled token, and E[w~(v)] over v ~ pi, both [B, T]. w~(v) is step 6 for the contrast of
    the word v at this position, against the baseline b of what was sampled."""
    b = shared_baseline(batch.delta, batch.roles, role_balanced=others.get("role_balanced", False))  # [B, 1]
    step = {"tau": tau, "w_min": w_min, "w_max": w_max, "flip": flip, "normalize": False}
    sampled = step_6(batch, batch.delta - b, batch.S, **step)
    every = turned(batch.ratio - b[..., None], flip) / tau  # [B, T, V]
    return sampled, (batch.pi * every.clamp(math.log(w_min), math.log(w_max)).exp()).sum(-1)


def state_only(batch: Batch, *, normalize=True, **options) -> Tensor:
    """E[w~(v)] over v ~ pi, normalized to mean 1 over S: what the weight owes to the place."""
    _, expected = sampled_and_expected(batch, **options)
    return expected / mean(expected, batch.S) if normalize else expected


def token_only(batch: Batch, *, normalize=True, **options) -> Tensor:
    """w~(o) / E[w~(v)], normalized to mean 1 over S: what it owes to the word that was drawn there."""
    sampled, expected = sampled_and_expected(batch, **options)
    w = sampled / expected
    return w / mean(w, batch.S) if normalize else w


def zero_mean(batch: Batch, **options) -> Tensor:
    """delta(o) - E[delta(v)] over v ~ pi in the place of delta - b: mean zero in every state, no baseline."""
    return step_6(batch, batch.delta - (batch.pi * batch.ratio).sum(-1), batch.S, **options)


# ------------------------------------------------------------------------------------------------ what helps


def inverted(batch: Batch, **options) -> Tensor:
    """SRPO with the opposite emphasis everywhere: tokens of low contrast weigh more."""
    return srpo(batch, **options | {"flip": torch.ones_like(batch.A, dtype=torch.bool)})


def entropy(batch: Batch, **options) -> Tensor:
    """delta := H(pi), in nats, at the position of the token."""
    return srpo(batch, batch.entropy, **options)


def entropy_x_dependency(batch: Batch, **options) -> Tensor:
    """delta := H(pi) |delta|, after the clamp of step 4; VEPO's product, with the log-ratio's size."""
    return srpo(batch, batch.entropy * batch.delta.abs(), **options)


# -------------------------------------------------------------------------------------------------- the table


class Condition(NamedTuple):
    group: str  # of GROUPS
    what: str
    weights: Callable[..., Tensor] = srpo
    options: str = ""  # of train.py


GROUPS = {"A": "readings of the abstract", "B": "which part does the harm", "C": "what helps"}


def alternatives() -> dict[str, Condition]:
    """One for every alternative of every open choice."""
    spelled = lambda x: f"{x:g}" if isinstance(x, float) else str(x).lower()  # noqa: E731
    listed = [(name, spelled(x)) for name, choice in CHOICES.items() for x in choice[3]]
    found = {
        f"{name}={x}": Condition("A", "{}: {}".format(*CHOICES[name]), options=f"--choice {name}={x}")
        for name, x in listed
        if name not in ("w_min", "w_max")
    }
    limits = " ".join(f"--choice {name}={spelled(CHOICES[name][3][-1])}" for name in ("w_min", "w_max"))
    return found | {"softmax": Condition("A", "no limits in step 6", options=limits)}


WIDE, SIGN = "--choice w_min=0.5 --choice w_max=2", "--choice sign_aware=true"
CONDITIONS = {
    "grpo": Condition("", "weight 1 everywhere", options="--algo grpo"),
    "srpo": Condition("", "as in srpo.py, with the default choices"),
    "range-0.5-2": Condition("A", "a wider range in step 6; all below but softmax and rlsd have it"),
    **alternatives(),
    "jensen-shannon": Condition("A", "divergence over the vocabulary for the log-ratio", jensen_shannon),
    "rlsd": Condition("A", "range (0.8 to 1.2), sign and fading of RLSD", rlsd, SIGN),
    "positive-only": Condition("A", "weight 1 where A < 0", positive_only),
    "standardized": Condition("A", "contrasts over their standard deviation", standardized),
    "standardized-tau-3": Condition("A", "the same, few at a limit", standardized, "--choice tau=3"),
    "role-standardized": Condition("A", "each role standardized by itself", role_standardized),
    "shuffled": Condition("B", "SRPO's weights, permuted inside the response", shuffled),
    "perception-only": Condition("B", "SRPO inside the perception, else 1", only(Role.PERCEPTION)),
    "reasoning-only": Condition("B", "SRPO inside the reasoning, else 1", only(Role.REASONING)),
    "role-baselines": Condition("B", "a baseline and mean 1 for each role", role_baselines),
    "role-baselines+sign": Condition("B", "the same, turned round where A < 0", role_baselines, SIGN),
    "roles-only": Condition("B", "SRPO's mean weight of the role", roles_only),
    "pattern-only": Condition("B", "SRPO's weight over that mean", pattern_only),
    "state-only": Condition("B", "the weight to be expected at this place", state_only),
    "token-only": Condition("B", "SRPO's weight over that to be expected", token_only),
    "zero-mean": Condition("B", "log-ratio less its expectation at this place, no baseline", zero_mean),
    "inverted": Condition("C", "SRPO with the opposite emphasis", inverted),
    "entropy": Condition("C", "entropy of the policy for the contrast", entropy),
    "entropy-x-dependency": Condition("C", "entropy times size of the contrast", entropy_x_dependency),
}
for name in CONDITIONS.keys() - {"grpo", "srpo", "softmax", "rlsd"}:
    CONDITIONS[name] = CONDITIONS[name]._replace(options=f"{WIDE} {CONDITIONS[name].options}".strip())


@torch.no_grad()
def weigh(condition: str, batch: Batch, **options) -> Tensor:
    """w of a condition, [B, T]; 1 at OTHER tokens and in the rows of step 9."""
    return torch.where(batch.S, CONDITIONS[condition].weights(batch, **options), 1)


# ----------------------------------------------------------------------------------------------- in the loop


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of two [n]; NaN where one does not vary."""
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    return torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()


class Recorder:
    """Puts a condition's weights into the loop of train.py, and keeps figures of them.

    Nothing is computed twice: the log-probs over the vocabulary are taken from the loop's own passes as they
    come by, the sampling and the two of step 3 (not from the reference's, nor with `corrupt_both`).
    """

    def __init__(self, condition: str, steps: int, seed: int = 0):
        self.condition, self.steps, self.noise = condition, steps, torch.Generator().manual_seed(seed)
        self.passing, self.figures = [], []  # log-probs that came by; a dictionary a step
        self.examples = self.responses = self.A = self.logp = self.other = None  # of the step in progress

    @contextmanager
    def installed(self):
        with ExitStack() as stack:

            def watch(owner, name, then):
                def wrapped(*args, **kwargs):
                    found = original(*args, **kwargs)
                    then(found, *args, **kwargs)
                    return found

                original = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, wrapped))

            watch(model.Policy, "encode", lambda _, policy, examples, *others: self.keep(examples=examples))
            watch(model.Policy, "_log_softmax", self.pass_by)
            watch(model.Policy, "sample", self.sampled)
            watch(model.Policy, "decode", lambda responses, *_: self.keep(responses=responses))
            watch(model.Policy, "log_probs", self.scored)
            watch(train, "group_advantages", lambda A, *_: self.keep(A=A))
            stack.enter_context(mock.patch.object(train, "token_weights", self.weigh))
            yield self

    def keep(self, **what) -> None:
        vars(self).update(what)

    def pass_by(self, logprobs: Tensor, *_) -> None:
        if not torch.is_grad_enabled():  # else it is the update
            self.passing.append(logprobs)

    def sampled(self, rollout, *_, **__) -> None:
        """pi of each position that was sampled: [B, V] a token came by."""
        self.logp, self.passing = torch.stack(self.passing, 1)[:, : rollout.ids.shape[1]], []
        self.other = torch.zeros_like(self.logp)

    def scored(self, _, policy, prompts, rollout, *, wanted=None, visible=None, **__) -> None:
        """pi in another context: [n, V] came by for the n tokens wanted, row by row."""
        if not torch.is_grad_enabled() and self.passing:
            where = rollout.mask if visible is None else visible.bool()
            where = where if wanted is None else where & wanted
            self.other[where], self.passing = torch.cat(self.passing), []

    def weigh(self, delta: Tensor, roles: Tensor, **options) -> Tensor:
        """In the place of `token_weights`."""
        if self.A is None:  # nothing sampled yet: train.py asks whether it takes these options
            return token_weights(delta, roles, **options)
        progress = len(self.figures) / max(1, self.steps - 1)
        self.batch = batch = Batch(delta, roles, self.A, self.logp, self.other, progress, self.noise)
        w, right = weigh(self.condition, batch, **options), torch.full_like(roles, -1)
        for row in batch.S.any(1).nonzero()[:, 0].tolist():
            text, offsets = self.responses[row]
            example = self.examples[row * len(self.examples) // len(roles)]
            right[row, : len(offsets)] = torch.from_numpy(contrast.labels(text, offsets, example)["true"])
        stated = batch.S & (right >= 0)
        limited = (batch.at_limit & (w != 1))[batch.S].float()
        self.figures.append({
            "r_entropy": correlation(w[batch.S], batch.entropy[batch.S]),
            "r_right": correlation(w[stated], right[stated]),
            "at_limit": limited.mean().item(),
        })  # fmt: skip
        return w

    def averages(self) -> dict[str, float]:
        """Mean of each figure over the steps in which it could be told."""
        columns = {name: torch.tensor([x[name] for x in self.figures]) for name in self.figures[0]}
        return {name: column.nanmean().item() for name, column in columns.items()}
