"""Other readings of the abstract, controls and relatives, as functions for `train.py --weights`.

    python train.py --weights extras/readings.py:k3 --w-min 0.5 --w-max 2

Each takes the place of `train.srpo_weights`, with the same arguments: three log-probs [B, T], the
roles and A; by keyword the entropy [B, T], the progress of the run and the options; it returns w
[B, T]. Where a text says "the contrast is x", x stands for delta, and steps 5 and 6 are SRPO's.

Unless said otherwise, w is positive with mean 1 over the scored tokens of a response, 1 at OTHER
tokens, and 1 everywhere in a response without both roles or with a contrast that is not finite
(step 9). A weight of 0 gives a token no gradient: step 7 allows it, though SRPO has none.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from srpo import Role, contrast_scores, token_weights  # noqa: E402

# ---- what several of them need


def mean_over(x: Tensor, where: Tensor) -> Tensor:
    """Row mean of x over `where`, [B, T] -> [B, 1]; 0 for a row without any."""
    total = x.masked_fill(~where, 0).sum(dim=1, keepdim=True)
    return total / where.sum(dim=1, keepdim=True).clamp(min=1)


def std_over(x: Tensor, where: Tensor) -> Tensor:
    """Row standard deviation (of the population) over `where`, [B, T] -> [B, 1]; at least 1e-4."""
    variance = mean_over((x - mean_over(x, where)) ** 2, where)
    return variance.sqrt().clamp(min=1e-4)


def scored_tokens(delta: Tensor, roles: Tensor) -> Tensor:
    """[B, T] bool: tokens with a role, but for the responses that step 9 leaves to GRPO."""
    P = roles == Role.PERCEPTION
    R = roles == Role.REASONING
    finite = (delta.isfinite() | ~(P | R)).all(dim=1)  # [B]
    usable = P.any(dim=1) & R.any(dim=1) & finite  # [B]
    return (P | R) & usable[:, None]


def steps_5_and_6(contrast: Tensor, roles: Tensor, *, tau, w_min, w_max, **_) -> Tensor:
    """SRPO's own, and step 9, for any contrast [B, T]."""
    return token_weights(contrast, roles, tau=tau, w_min=w_min, w_max=w_max)


def exponential(relative: Tensor, *, tau, w_min, w_max, **_) -> Tensor:
    """The first line of step 6 alone: w_tilde of any [B, T] in the place of delta - b."""
    return torch.exp((relative / tau).clamp(math.log(w_min), math.log(w_max)))


def weights_within(where: Tensor, delta: Tensor, **options) -> Tensor:
    """Steps 5 and 6 over the tokens `where` alone, [B, T]: their own baseline, their own mean 1."""
    w_tilde = exponential(delta - mean_over(delta, where), **options)
    w = w_tilde / mean_over(w_tilde, where)
    return torch.where(where, w, torch.ones_like(w))


def with_mean_1(w_tilde: Tensor, delta: Tensor, roles: Tensor) -> Tensor:
    """The second line of step 6 alone, and step 9, for any positive w_tilde [B, T]."""
    scored = scored_tokens(delta, roles)
    return torch.where(scored, w_tilde / mean_over(w_tilde, scored), torch.ones_like(w_tilde))


def weights_of_each_role(delta: Tensor, roles: Tensor, **options) -> Tensor:
    """`weights_within` the perception, and `weights_within` the reasoning, [B, T]."""
    scored = scored_tokens(delta, roles)
    P = roles == Role.PERCEPTION
    in_perception = weights_within(scored & P, delta, **options)
    in_reasoning = weights_within(scored & ~P, delta, **options)
    return torch.where(P, in_perception, in_reasoning)


def turned_round(delta: Tensor, A: Tensor) -> Tensor:
    """-delta in the responses with a negative advantage: with -delta, low contrasts weigh more."""
    return torch.where(A[:, None] < 0, -delta, delta)


def k3_estimate(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r with r = exp(-log_ratio), of one sample: an estimate of a divergence, >= 0."""
    log_ratio = log_ratio.clamp(-20, 20)
    return (torch.expm1(-log_ratio) + log_ratio).clamp(min=0)


# ---- readings of the abstract


def absolute(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The contrast is |delta|, so what the image or the perception speaks against weighs more, too.

    One answer to what "visual dependency" is; ToR (arXiv 2603.25077) takes it.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    return steps_5_and_6(delta.abs(), roles, **options)


def k3(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The contrast is the k3 estimate of a divergence, made before the clamp of step 4.

    PAPO (arXiv 2507.06448), VPPO (2510.09285) and PGPO (2604.01840) measure dependency by it.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles, max_abs=math.inf)
    clamped = k3_estimate(delta).clamp(max=5.0)  # step 4
    return steps_5_and_6(clamped, roles, **options)


def role_balanced(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The baseline of step 5 is the mean of the two roles' means, whichever has more tokens.

    One answer to what a "shared trajectory-level baseline" is.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    of_perception = mean_over(delta, roles == Role.PERCEPTION)
    of_reasoning = mean_over(delta, roles == Role.REASONING)
    b = (of_perception + of_reasoning) / 2
    return with_mean_1(exponential(delta - b, **options), delta, roles)


def median_baseline(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The baseline of step 5 is the median: a few large contrasts do not move it.

    Of an even number of tokens it is the lower of the two in the middle.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    scored = scored_tokens(delta, roles)
    b = delta.masked_fill(~scored, math.nan).nanmedian(dim=1, keepdim=True).values
    return with_mean_1(exponential(delta - b, **options), delta, roles)


def log_mean_exp_baseline(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The baseline of step 5 is log mean exp(delta), as of probability ratios instead of logs."""
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    b = mean_over(delta.exp(), scored_tokens(delta, roles)).log()  # step 4 keeps exp in range
    return with_mean_1(exponential(delta - b, **options), delta, roles)


def unnormalized(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """SRPO without the second line of step 6: a response need not keep its total advantage.

    One answer to what "relative update magnitudes" are. The mean of w is not 1.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    scored = scored_tokens(delta, roles)
    w = exponential(delta - mean_over(delta, scored), **options)
    return torch.where(scored, w, torch.ones_like(w))


def softmax(logp, logp_corrupted, logp_blank, roles, A, *, tau, **_) -> Tensor:
    """Step 6 without limits: a softmax of delta / tau over the scored tokens, times their number.

    One answer to what "positive token weights" are. The baseline cancels out.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    scored = scored_tokens(delta, roles)
    share = (delta / tau).masked_fill(~scored, -math.inf).softmax(dim=1)  # NaN without any
    w = share * scored.sum(dim=1, keepdim=True)
    return torch.where(scored, w, torch.ones_like(w))


def sigmoid(logp, logp_corrupted, logp_blank, roles, A, *, tau, **_) -> Tensor:
    """Step 6 with 2 sigmoid((delta - b) / tau), which needs no limits: it lies between 0 and 2."""
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    relative = delta - mean_over(delta, scored_tokens(delta, roles))
    return with_mean_1(2 * torch.sigmoid(relative / tau), delta, roles)


def linear(logp, logp_corrupted, logp_blank, roles, A, *, tau, w_min, w_max, **_) -> Tensor:
    """Step 6 with 1 + (delta - b) / tau, within the limits."""
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    relative = delta - mean_over(delta, scored_tokens(delta, roles))
    return with_mean_1((1 + relative / tau).clamp(w_min, w_max), delta, roles)


def sign_aware(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """SRPO where A > 0; where A < 0 the emphasis is turned round, and low contrasts weigh more.

    One answer to what "preserving the optimization direction" means, as RLSD (arXiv 2604.03128).
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    return steps_5_and_6(turned_round(delta, A), roles, **options)


def sign_aware_fading(logp, logp_corrupted, logp_blank, roles, A, *, progress, **options) -> Tensor:
    """`sign_aware`, mixed with 1 by a lambda that falls from 0.5 to 0 in the course of the run.

    SRPO's baseline and mean 1 with RLSD's sign and lambda; `rlsd` below is nearer to RLSD itself.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    w = steps_5_and_6(turned_round(delta, A), roles, **options)
    lam = 0.5 * (1 - progress)
    return (1 - lam) + lam * w


def positive_only(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """SRPO where A > 0, and weight 1, which is GRPO, where A < 0.

    A negative advantage says of no token that it was well chosen.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    w = steps_5_and_6(delta, roles, **options)
    return torch.where(A[:, None] > 0, w, torch.ones_like(w))


def standardized(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The contrast is delta over its standard deviation in the response.

    What tau means then does not depend on the corruption, nor on how sure the policy is.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    contrast = delta / std_over(delta, roles != Role.OTHER)
    return steps_5_and_6(contrast, roles, **options)


def role_standardized(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The contrast is delta less its mean over the role, divided by its deviation over the role.

    Then neither role has more weight than the other for the scale of its contrasts.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    P = roles == Role.PERCEPTION
    R = roles == Role.REASONING
    z_perception = (delta - mean_over(delta, P)) / std_over(delta, P)
    z_reasoning = (delta - mean_over(delta, R)) / std_over(delta, R)
    contrast = torch.where(P, z_perception, z_reasoning)
    return steps_5_and_6(contrast, roles, **options)


# ---- controls: which part of the weights does something


def shuffled(logp, logp_corrupted, logp_blank, roles, A, *, progress, **options) -> Tensor:
    """SRPO's weights, permuted over the scored tokens of each response by the step's own seed.

    The same magnitudes without the information: what they cost or gain is due to their spread.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    w = steps_5_and_6(delta, roles, **options)
    rng = torch.Generator().manual_seed(round(1e9 * progress))
    for row in range(len(w)):
        places = (roles[row] != Role.OTHER).nonzero()[:, 0]
        order = torch.randperm(len(places), generator=rng).to(places.device)
        w[row, places] = w[row, places[order]]
    return w


def perception_only(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """SRPO inside the perception, with a baseline and a mean of 1 of its own; reasoning has 1.

    A control of this project: what the perception contrast does alone.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    where = scored_tokens(delta, roles) & (roles == Role.PERCEPTION)
    return weights_within(where, delta, **options)


def reasoning_only(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """SRPO inside the reasoning, with a baseline and a mean of 1 of its own; perception has 1.

    A control of this project: what the reasoning contrast does alone.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    where = scored_tokens(delta, roles) & (roles == Role.REASONING)
    return weights_within(where, delta, **options)


def role_baselines(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """A baseline and a mean of 1 for each role, so that nothing moves from one role to the other.

    A control of this project: what the baseline's being shared does.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    return weights_of_each_role(delta, roles, **options)


def role_baselines_sign_aware(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """`role_baselines`, turned round where A < 0.

    A control of this project: what the sign of A does when no role gains from it.
    """
    delta = turned_round(contrast_scores(logp, logp_corrupted, logp_blank, roles), A)
    return weights_of_each_role(delta, roles, **options)


def roles_only(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """The mean of SRPO's weights over the role, at each of its tokens.

    A control of this project: what moves from one role to the other.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    w = steps_5_and_6(delta, roles, **options)
    P = roles == Role.PERCEPTION
    R = roles == Role.REASONING
    of_role = torch.where(P, mean_over(w, P), mean_over(w, R))
    return torch.where(P | R, of_role, w)


def pattern_only(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """SRPO's weights over their mean in the role, which is what `roles_only` leaves out.

    A control of this project: what moves from token to token inside a role.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    w = steps_5_and_6(delta, roles, **options)
    P = roles == Role.PERCEPTION
    R = roles == Role.REASONING
    of_role = torch.where(P, mean_over(w, P), mean_over(w, R))
    return torch.where(P | R, w / of_role, w)


def inverted(logp, logp_corrupted, logp_blank, roles, A, **options) -> Tensor:
    """SRPO with the opposite emphasis everywhere: tokens of low contrast weigh more.

    A control of this project: whether the direction of the emphasis matters.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    return steps_5_and_6(-delta, roles, **options)


def entropy(logp, logp_corrupted, logp_blank, roles, A, *, entropy, **options) -> Tensor:
    """The contrast is the entropy of the policy at the token, in nats: no image, no perception.

    A control of this project: tokens at which there is something to learn.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    contrast = entropy.masked_fill(delta.isnan(), math.nan)  # for step 9
    return steps_5_and_6(contrast, roles, **options)


def entropy_x_dependency(
    logp, logp_corrupted, logp_blank, roles, A, *, entropy, **options
) -> Tensor:
    """The contrast is the entropy times |delta|, after the clamp of step 4.

    The product of VEPO (arXiv 2606.03937), with a log-ratio for its Jensen-Shannon divergence.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    contrast = entropy * delta.abs()
    return steps_5_and_6(contrast, roles, **options)


# ---- relatives that need no teacher
#
# `vppo`, `pgpo` and `tor` know no roles: they weigh all tokens of a response, tags and answer too,
# by the contrast with the corrupted image, and of step 9 only the contrasts that are not finite
# count. Of the four only `pgpo` has mean 1, over all tokens. None of them reads tau or the limits.


def image_contrast(logp: Tensor, logp_corrupted: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
    """Step 2 at every token, whatever its role, and where there are tokens: both [B, T].

    Padding is known by log-probs of 0. A token that is certain with either image looks the same,
    but has no gradient. A response with a contrast that is not finite counts as without tokens.
    """
    tokens = (logp != 0) | (logp_corrupted != 0) | (roles != Role.OTHER)
    contrast = logp - logp_corrupted
    finite = (contrast.isfinite() | ~tokens).all(dim=1, keepdim=True)
    tokens = tokens & finite
    return contrast.masked_fill(~tokens, 0), tokens


def top_percent(x: Tensor, where: Tensor, percent: int) -> Tensor:
    """[B, T] bool: the largest `percent` of x over `where` in each row, their number rounded up."""
    order = x.masked_fill(~where, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    number = (percent * where.sum(dim=1, keepdim=True) + 99) // 100
    return where & (rank < number)


def rlsd(logp, logp_corrupted, logp_blank, roles, A, *, progress, **_) -> Tensor:
    """RLSD (arXiv 2604.03128): 1 - lam + lam clip(exp(sign(A) delta), 0.8, 1.2), lam from 0.5 to 0.

    SRPO's contrasts stand for those with its teacher, which sees the answer. No baseline, and the
    weights are not normalized.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    lam = 0.5 * (1 - progress)
    ratio = torch.exp(A.sign()[:, None] * delta).clamp(0.8, 1.2)
    w = (1 - lam) + lam * ratio
    return torch.where(scored_tokens(delta, roles), w, torch.ones_like(w))


def vppo(logp, logp_corrupted, logp_blank, roles, A, **_) -> Tensor:
    """VPPO (arXiv 2510.09285): the 40 % of tokens with the largest k3 keep their gradient, else 0.

    What is kept is scaled by 0.9 plus a part that grows with the mean k3 of the response, 1 on
    average. Left out: its entropy penalty. Its corruption is that of --corruption-p 0.5.
    """
    contrast, tokens = image_contrast(logp, logp_corrupted, roles)
    if not tokens.any():
        return torch.ones_like(contrast)
    dependency = k3_estimate(contrast).clamp(max=10)
    score = mean_over(dependency, tokens)  # [B, 1]
    scale = torch.ones_like(score)
    has_tokens = tokens.any(dim=1)  # [B]; the others have no score
    scored = score[has_tokens]
    if len(scored) > 0 and scored.max() - scored.min() > 1e-6:
        share = (score - scored.min()) / (scored.max() - scored.min())
        scale = 0.9 + 0.1 * share / share[has_tokens].mean()
    top = top_percent(dependency, tokens, 40)
    w = scale.expand_as(contrast).masked_fill(~top, 0)
    return torch.where(tokens, w, torch.ones_like(w))


def pgpo(logp, logp_corrupted, logp_blank, roles, A, **_) -> Tensor:
    """PGPO (arXiv 2604.01840): d = log1p k3, min-max over the response, and a threshold of 0.4.

    w is d / 0.4 below it and 1 + 2 (d - 0.4) / 0.6 above, then scaled to mean 1; it is 0 at the
    least dependent token. A corrupted image stands for one that is hidden from attention.
    """
    contrast, tokens = image_contrast(logp, logp_corrupted, roles)
    d = torch.log1p(k3_estimate(contrast))
    smallest = d.masked_fill(~tokens, math.inf).amin(dim=1, keepdim=True)
    largest = d.masked_fill(~tokens, -math.inf).amax(dim=1, keepdim=True)
    d = (d - smallest) / (largest - smallest)  # [B, T], 0 to 1
    w = torch.where(d < 0.4, d / 0.4, 1 + 2 * (d - 0.4) / 0.6)
    w = w / mean_over(w, tokens)
    return torch.where(tokens & (largest > smallest), w, torch.ones_like(w))


def tor(logp, logp_corrupted, logp_blank, roles, A, *, entropy, **_) -> Tensor:
    """ToR (arXiv 2603.25077): 1 at the 30 % of the batch's tokens with the largest entropy, 0.5 at
    the 30 % with the largest |contrast| if not among those, 0 at the others.

    A corrupted image stands for none, and the entropy over all words for that over the likeliest.
    """
    contrast, tokens = image_contrast(logp, logp_corrupted, roles)
    everywhere = tokens.flatten()[None]  # [1, B * T]
    dependent = top_percent(contrast.abs().flatten()[None], everywhere, 30).view_as(tokens)
    uncertain = top_percent(entropy.flatten()[None], everywhere, 30).view_as(tokens)
    w = torch.zeros_like(contrast)
    w = w.masked_fill(dependent, 0.5)
    w = w.masked_fill(uncertain, 1)
    return torch.where(tokens, w, torch.ones_like(w))
