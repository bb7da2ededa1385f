"""Tests, from the method to the command line. `python -m pytest test_srpo.py`, on a CPU.

The method comes first, written as Python loops over one response: its shortest statement. What one
can do without at a first reading, such as malformed texts and inputs that are refused, is tested in
extras/test_*.py.
"""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not there is not looked for, minutes long

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import srpo
import train
from corrupt import CORRUPTIONS, corrupt
from data import Example, Fact, Query
from srpo import (
    Role,
    contrast_scores,
    group_advantages,
    kl_to_reference,
    parse_response,
    policy_loss,
    role_aware_advantages,
    shared_baseline,
    text_and_offsets,
    token_roles,
    token_weights,
    without_perception,
)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
O = Role.OTHER  # noqa: E741
P = Role.PERCEPTION
R = Role.REASONING
NAN = float("nan")
INF = float("inf")

# ---- the method, as loops over one response


def loop_advantages(rewards, eps=1e-4):
    """Step 1, for the rewards of one group."""
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    return [(r - mean) / (math.sqrt(variance) + eps) for r in rewards]


def loop_delta(logp, corrupted, blank, roles, delta_max=5.0):
    """Steps 2 to 4."""
    delta = [0.0] * len(roles)
    for t, role in enumerate(roles):
        if role == P:
            delta[t] = logp[t] - corrupted[t]  # step 2
        elif role == R:
            delta[t] = logp[t] - blank[t]  # step 3
        if math.isfinite(delta[t]):  # what is not is left for step 9 to see
            delta[t] = min(max(delta[t], -delta_max), delta_max)  # step 4
    return delta


def loop_w_tilde(delta, roles, tau=1.0, w_min=0.8, w_max=1.2):
    """Step 5, and the first line of step 6: {t: weight} of the scored tokens."""
    S = [t for t, role in enumerate(roles) if role != O]
    b = sum(delta[t] for t in S) / len(S)  # step 5
    w_tilde = {}
    for t in S:
        relative = (delta[t] - b) / tau
        w_tilde[t] = math.exp(min(max(relative, math.log(w_min)), math.log(w_max)))  # step 6
    return w_tilde


def loop_weights(delta, roles, **options):
    """Steps 5, 6 and 9."""
    w = [1.0] * len(roles)
    S = [t for t, role in enumerate(roles) if role != O]
    finite = all(math.isfinite(delta[t]) for t in S)
    if P not in roles or R not in roles or not finite:
        return w  # step 9
    w_tilde = loop_w_tilde(delta, roles, **options)
    mean = sum(w_tilde.values()) / len(S)
    for t in S:
        w[t] = w_tilde[t] / mean  # step 6, its second line
    return w


def loop_A_hat(A, w, lam=1.0):
    """Step 7."""
    return [A * ((1 - lam) + lam * weight) for weight in w]


def loop_objective(logp, old_logp, A_hat, low=0.2, high=0.2):
    """Step 8: the part of one response in the sum."""
    J = 0.0
    for t in range(len(logp)):
        rho = math.exp(logp[t] - old_logp[t])
        clipped = min(max(rho, 1 - low), 1 + high)
        J += min(rho * A_hat[t], clipped * A_hat[t])
    return J


def loop_clipped(logp, old_logp, A_hat, low=0.2, high=0.2):
    """How many tokens of one response step 8 clips: they have gone far enough already."""
    count = 0
    for t in range(len(logp)):
        rho = math.exp(logp[t] - old_logp[t])
        if A_hat[t] > 0 and rho > 1 + high:
            count += 1
        if A_hat[t] < 0 and rho < 1 - low:
            count += 1
    return count


def loop_kl(logp, ref_logp):
    """The KL term of step 8: the part of one response in the sum."""
    kl = 0.0
    for t in range(len(logp)):
        log_r = ref_logp[t] - logp[t]
        kl += math.exp(log_r) - 1 - log_r
    return kl


# ---- the method, as tensors


@pytest.fixture
def batch():
    """Random float64 inputs: 3 groups of 4 responses over 11 positions, some without a role."""
    rng = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(5, 12, 11, generator=rng, dtype=torch.float64)
    roles = torch.randint(0, 3, (12, 11), generator=rng)
    roles[1] = O  # a response without the form
    roles[2, roles[2] == R] = P  # one that perceives and does not reason
    lengths = torch.randint(5, 12, (12, 1), generator=rng)
    mask = torch.arange(11) < lengths
    return {
        "rewards": torch.randint(0, 3, (12,), generator=rng).double(),
        "roles": roles * mask,
        "mask": mask,
        "logp": logps[0],
        "old_logp": logps[1],
        "corrupted": 4 * logps[2],
        "blank": 4 * logps[3],
        "ref_logp": logps[4],
    }


def delta_of(batch):
    return contrast_scores(batch["old_logp"], batch["corrupted"], batch["blank"], batch["roles"])


def weights_of(batch, **options):
    return token_weights(delta_of(batch), batch["roles"], **options)


def test_advantages_are_those_of_the_loops(batch):
    A = group_advantages(batch["rewards"], 4)
    rewards = batch["rewards"].tolist()
    expected = []
    for first in (0, 4, 8):
        expected += loop_advantages(rewards[first : first + 4])
    assert A.tolist() == pytest.approx(expected, abs=1e-12)


def test_weights_are_those_of_the_loops(batch):
    A = group_advantages(batch["rewards"], 4)
    delta = delta_of(batch)
    b = shared_baseline(delta, batch["roles"])
    w = token_weights(delta, batch["roles"], tau=0.7)
    A_hat = role_aware_advantages(A, w, lam=0.8)
    lists = {name: x.tolist() for name, x in batch.items()}
    for i in range(12):
        roles = lists["roles"][i]
        contexts = [lists[name][i] for name in ("old_logp", "corrupted", "blank")]
        expected_delta = loop_delta(*contexts, roles)
        assert delta[i].tolist() == pytest.approx(expected_delta, abs=1e-12)
        scored = [expected_delta[t] for t in range(11) if roles[t] != O]
        expected_b = sum(scored) / max(1, len(scored))
        assert b[i].item() == pytest.approx(expected_b, abs=1e-12)
        expected_w = loop_weights(delta[i].tolist(), roles, tau=0.7)
        assert w[i].tolist() == pytest.approx(expected_w, abs=1e-12)
        expected_A_hat = loop_A_hat(A[i].item(), w[i].tolist(), lam=0.8)
        assert A_hat[i].tolist() == pytest.approx(expected_A_hat, abs=1e-12)


def test_the_loss_is_that_of_the_loops(batch):
    A_hat = role_aware_advantages(group_advantages(batch["rewards"], 4), weights_of(batch))
    clip = {"clip_low": 0.1, "clip_high": 0.3}
    loss, stats = policy_loss(batch["logp"], batch["old_logp"], A_hat, batch["mask"], **clip)
    kl = kl_to_reference(batch["logp"], batch["ref_logp"], batch["mask"])

    sums = {"J": 0.0, "kl": 0.0, "clipped": 0, "rho": 0.0}
    for i in range(12):
        length = int(batch["mask"][i].sum())
        logp = batch["logp"][i, :length].tolist()
        old_logp = batch["old_logp"][i, :length].tolist()
        ref_logp = batch["ref_logp"][i, :length].tolist()
        advantages = A_hat[i, :length].tolist()
        sums["J"] += loop_objective(logp, old_logp, advantages, low=0.1, high=0.3)
        sums["clipped"] += loop_clipped(logp, old_logp, advantages, low=0.1, high=0.3)
        sums["kl"] += loop_kl(logp, ref_logp)
        for t in range(length):
            sums["rho"] += math.exp(logp[t] - old_logp[t])
    n_tokens = batch["mask"].sum().item()
    assert loss.item() == pytest.approx(-sums["J"] / n_tokens, abs=1e-12)
    assert kl.item() == pytest.approx(sums["kl"] / n_tokens, abs=1e-12)
    assert 0 < stats["clip_frac"] < 1
    assert stats["clip_frac"].item() == pytest.approx(sums["clipped"] / n_tokens, abs=1e-6)
    assert stats["ratio"].item() == pytest.approx(sums["rho"] / n_tokens, abs=1e-12)


def test_the_advantage_uses_the_sample_std_and_leaves_no_residue():
    assert group_advantages([1, 0, 0, 0], 4)[0].item() == pytest.approx(1.5, abs=1e-3)
    no_spread = torch.full((6,), 0.1)
    assert group_advantages(no_spread, 3).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("max_abs", "expected"),
    [(5.0, [4.9, 5.0, 0.5, -5.0, 0.0, -5.0]), (0.7, [0.7, 0.7, 0.5, -0.7, 0.0, -0.7])],
)
def test_each_role_is_compared_with_its_own_counterfactual_and_clamped(max_abs, expected):
    roles = torch.tensor([[P, P, R, R, O, P]])
    logp = torch.zeros(1, 6)
    corrupted = torch.tensor([[-4.9, -5.1, 9.0, 9.0, 9.0, 7.0]])
    blank = torch.tensor([[9.0, 9.0, -0.5, 80.0, 9.0, 9.0]])  # e^80 would overflow
    delta = contrast_scores(logp, corrupted, blank, roles, max_abs)
    torch.testing.assert_close(delta, torch.tensor([expected]))


def test_weights_are_positive_and_keep_the_sign(batch):
    A = group_advantages(batch["rewards"], 4)
    w = weights_of(batch)
    A_hat = role_aware_advantages(A, w)
    assert (w > 0).all()
    assert torch.equal(A_hat.sign(), A.sign()[:, None].expand_as(w))
    assert (role_aware_advantages(torch.zeros(12), w) == 0).all()


def test_weights_have_mean_one_so_a_response_keeps_its_total_advantage(batch):
    w = weights_of(batch)
    scored = batch["roles"] != O
    for row in range(12):
        if scored[row].any():
            assert w[row][scored[row]].mean().item() == pytest.approx(1)
    assert w[scored].std() > 0.01


def test_equal_contrasts_give_weights_of_1(batch):
    one = torch.ones(12, 11, dtype=torch.float64)
    constant = torch.full_like(batch["logp"], 0.3)
    assert torch.allclose(token_weights(constant, batch["roles"]), one)
    nothing_removed = {**batch, "corrupted": batch["old_logp"], "blank": batch["old_logp"]}
    assert torch.equal(weights_of(nothing_removed), one)


def test_lambda_0_is_grpo_bit_for_bit(batch):
    A = group_advantages(batch["rewards"].float(), 4)
    A_hat = role_aware_advantages(A, weights_of(batch).float(), lam=0.0)
    assert torch.equal(A_hat, A[:, None].expand_as(A_hat))
    logps = (batch["logp"].float(), batch["old_logp"].float())
    srpo_loss, _ = policy_loss(*logps, A_hat, batch["mask"])
    grpo_loss, _ = policy_loss(*logps, A, batch["mask"])
    assert torch.equal(srpo_loss, grpo_loss)


def test_advantages_may_differ_from_token_to_token():
    """GRPO's do not, but a trainer may have others."""
    A = torch.tensor([[1.0, 2.0, -3.0], [0.0, -1.0, 4.0]])
    w = torch.tensor([[0.5, 1.0, 1.5], [1.0, 0.5, 1.5]])
    expected = torch.tensor([[0.5, 2.0, -4.5], [0.0, -0.5, 6.0]])
    assert torch.equal(role_aware_advantages(A, w), expected)


def test_weights_depend_on_differences_of_contrasts_alone_and_keep_their_order(batch):
    roles = batch["roles"]
    rng = torch.Generator().manual_seed(1)
    scores = 0.1 * torch.randn(12, 11, dtype=torch.float64, generator=rng)
    w = token_weights(scores, roles)
    assert torch.allclose(token_weights(scores + 3, roles), w)
    assert torch.allclose(token_weights(7 * scores, roles, tau=7.0), w)
    assert torch.allclose(token_weights(scores, roles, tau=1e9), torch.ones_like(w))
    scored = (roles[0] != O).nonzero()[:, 0]
    assert len(scored) > 3
    assert torch.equal(scores[0, scored].argsort(), w[0, scored].argsort())


def test_normalized_weights_lie_within_w_min_over_w_max_and_its_inverse(batch):
    wild = token_weights(1000 * delta_of(batch), batch["roles"], w_min=0.5, w_max=2.0)
    assert 0.5 / 2 <= wild.min() < 0.5
    assert 1.5 < wild.max() <= 2 / 0.5


def test_no_gradient_flows_through_weights_and_no_input_is_changed(batch):
    inputs = {}
    for name, x in batch.items():
        inputs[name] = x.clone()
        if x.is_floating_point():
            inputs[name].requires_grad_()
    w = weights_of(inputs)
    A_hat = role_aware_advantages(group_advantages(inputs["rewards"], 4), w)
    loss, stats = policy_loss(inputs["logp"], inputs["old_logp"], A_hat, inputs["mask"])
    kl = kl_to_reference(inputs["logp"], inputs["ref_logp"], inputs["mask"])
    (loss + kl).backward()
    assert inputs["logp"].grad.abs().sum() > 0
    assert inputs["old_logp"].grad is None
    assert inputs["ref_logp"].grad is None
    assert inputs["corrupted"].grad is None
    assert inputs["blank"].grad is None
    assert not w.requires_grad
    assert not A_hat.requires_grad
    assert not stats["ratio"].requires_grad
    without_perception(inputs["mask"], inputs["roles"])
    for name in batch:
        assert torch.equal(inputs[name].detach(), batch[name]), name


def test_by_default_the_ratio_is_clipped_to_0_8_and_1_2():
    ratios = torch.tensor([[0.5, 0.79, 1.0, 1.21, 2.0]])
    inputs = (ratios.log(), torch.zeros(1, 5))
    gain, stats = policy_loss(*inputs, torch.tensor([1.0]), torch.ones(1, 5))
    assert gain.item() == pytest.approx(-(0.5 + 0.79 + 1.0 + 1.2 + 1.2) / 5)
    assert stats["clip_frac"].item() == pytest.approx(2 / 5)
    harm, stats = policy_loss(*inputs, torch.tensor([-1.0]), torch.ones(1, 5))
    assert harm.item() == pytest.approx((0.8 + 0.8 + 1.0 + 1.21 + 2.0) / 5)
    assert stats["clip_frac"].item() == pytest.approx(2 / 5)


def test_the_same_positions_are_clipped_as_under_grpo(batch):
    A = group_advantages(batch["rewards"], 4)
    w = weights_of(batch)

    def gradient(advantages):
        logp = batch["logp"].clone().requires_grad_()
        loss, _ = policy_loss(logp, batch["old_logp"], advantages, batch["mask"])
        loss.backward()
        return logp.grad

    grpo = gradient(A)
    srpo_gradient = gradient(role_aware_advantages(A, w))
    assert torch.allclose(srpo_gradient, grpo * w)
    assert torch.equal(srpo_gradient == 0, grpo == 0)


def test_micro_batches_add_up_to_the_whole(batch):
    A_hat = role_aware_advantages(group_advantages(batch["rewards"], 4), weights_of(batch))
    inputs = (batch["logp"], batch["old_logp"], A_hat, batch["mask"])
    whole, stats_of_whole = policy_loss(*inputs)
    sums = {"loss": 0.0, "clip_frac": 0.0, "ratio": 0.0}
    for start in range(0, 12, 5):
        rows = [x[start : start + 5] for x in inputs]
        loss, stats = policy_loss(*rows, denominator=batch["mask"].sum())
        sums["loss"] += loss
        sums["clip_frac"] += stats["clip_frac"]
        sums["ratio"] += stats["ratio"]
    assert torch.allclose(sums["loss"], whole)
    assert torch.allclose(sums["clip_frac"], stats_of_whole["clip_frac"])
    assert torch.allclose(sums["ratio"], stats_of_whole["ratio"])


def test_a_response_has_the_same_weights_without_the_others(batch):
    w = weights_of(batch)
    alone = {name: x[4:5] for name, x in batch.items()}
    assert (w[4] != 1).any()
    assert torch.equal(weights_of(alone), w[4:5])


def test_a_response_without_both_roles_has_weight_1():
    delta = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0], [1.0, -1.0]])
    roles = torch.tensor([[O, O], [P, P], [R, R], [P, R]])
    w = token_weights(delta, roles)
    assert (w[:3] == 1).all()
    assert (w[3] != 1).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("context", "role"), [("corrupted", P), ("blank", R)])
def test_a_contrast_that_is_not_finite_makes_its_response_grpo(batch, bad, context, role):
    t = int((batch["roles"][0] == role).nonzero()[0])
    broken = {**batch, context: batch[context].clone()}
    broken[context][0, t] = bad
    delta = delta_of(broken)
    assert delta[0, t].isnan()
    assert delta.isnan().sum() == 1
    w = weights_of(broken)
    assert (w[0] == 1).all()
    assert torch.equal(w[1:], weights_of(batch)[1:])
    A = group_advantages(batch["rewards"], 4)
    assert (role_aware_advantages(A, w)[0] == A[0]).all()

    contexts = [broken[name][0].tolist() for name in ("old_logp", "corrupted", "blank")]
    roles = batch["roles"][0].tolist()
    assert loop_weights(loop_delta(*contexts, roles), roles) == [1.0] * 11


def test_eos_is_trained_and_padding_is_not():
    logp = torch.zeros(1, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])  # position 3 is EOS
    delta = torch.tensor([[1.0, 0, 0, 0, 0, 0]])
    w = token_weights(delta, torch.tensor([[P, R, O, O, O, O]]))
    A_hat = role_aware_advantages(torch.tensor([2.0]), w)
    loss, _ = policy_loss(logp, torch.zeros(1, 6), A_hat, mask)
    loss.backward()
    assert logp.grad[0, 3] == -2 / 4
    assert (logp.grad[0, 4:] == 0).all()


# ---- tags and roles

BLOCKS = ["<perception>a</perception>", "<reasoning>b</reasoning>", "<answer>c</answer>"]
GOOD = "".join(BLOCKS)


def test_a_response_has_three_blocks():
    found = parse_response(GOOD)
    spans = [found.perception, found.reasoning, found.answer]
    assert [GOOD[start:end] for start, end in spans] == ["a", "b", "c"]


def test_blocks_in_another_order_are_refused():
    for blocks in itertools.permutations(BLOCKS):
        text = "".join(blocks)
        if text != GOOD:
            assert parse_response(text) is None, text


def roles_of(pieces):
    """Roles of a response from the text, or the bytes, of each sampled token."""
    as_bytes = []
    for piece in pieces:
        if isinstance(piece, str):
            as_bytes.append(piece.encode())
        else:
            as_bytes.append(piece)
    text, offsets = text_and_offsets(as_bytes)
    return token_roles(text, offsets).tolist()


STRADDLING = [
    ("<percept", O),
    ("ion", O),
    (">a", P),  # holds a bit of the tag, and of the block: it counts for the block
    (" ", O),  # white space alone
    ("b", P),
    (".</", P),
    ("perception", O),
    (">\n", O),
    ("<reasoning", O),
    (">", O),
    ("so ", R),
    ("x", R),
    ("</reasoning>", O),
    ("<answer>", O),
    ("x", O),
    ("</answer>", O),
    ("", O),  # EOS has no text
]


def test_roles_come_from_the_sampled_tokens_also_when_they_straddle_a_tag():
    pieces = [piece for piece, _ in STRADDLING]
    assert roles_of(pieces) == [role for _, role in STRADDLING]


def test_roles_hold_for_a_tokenization_that_no_tokenizer_would_choose():
    roles = roles_of(list(GOOD))  # single characters
    assert roles.count(P) == 1
    assert roles.count(R) == 1


def test_a_response_that_is_cut_off_has_no_roles():
    pieces = [piece for piece, _ in STRADDLING[:-2]]
    assert set(roles_of(pieces)) == {O}
    assert token_roles("", []).shape == (0,)


def test_without_perception_hides_all_from_its_first_to_its_last_token():
    roles = torch.tensor([[O, P, O, P, O, R], [O, O, R, R, O, O]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = [[1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert without_perception(mask, roles).tolist() == expected


# ---- the README


def section(title, text=README):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code(text):
    """The first block of Python in a text."""
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_six_lines_run(batch):
    names = {**vars(srpo), **batch, "group_size": 4}
    names["logp_corrupted"] = batch["corrupted"]
    names["logp_blank"] = batch["blank"]
    exec(code(README), names)
    assert names["A_hat"].shape == (12, 11)
    assert names["grpo_loss"] != names["srpo_loss"]


# ---- the policy


@pytest.fixture(scope="module")
def policy():
    return model.build_tiny(seed=0)


@pytest.fixture(scope="module")
def examples():
    return data.DrawnTask("count").train_batch(0, 3) + data.DrawnTask("compare").train_batch(0, 1)


@pytest.fixture(scope="module")
def prompts(policy, examples):
    """Four prompts of unequal length."""
    prompts = policy.encode(examples)
    assert (prompts.mask == 0).any()
    return prompts


@pytest.fixture(scope="module")
def corrupted_prompts(policy, examples):
    """The same with corrupted images."""
    options = train.resolve_options(["--device", "cpu"])
    copies = train.corrupted_copies(examples, policy, options, step=1)
    return policy.encode(copies, fitted=True)


@pytest.fixture(scope="module")
def rollout(policy, prompts):
    """Two sampled responses to each prompt; random weights seldom write a tag."""
    rng = torch.Generator().manual_seed(0)
    return policy.sample(prompts, 2, max_new_tokens=24, temperature=0.7, generator=rng)


@pytest.fixture(scope="module")
def demonstrations(policy, examples):
    """A well-formed response to each prompt, as if it had been sampled."""
    texts = [data.demonstrate(example, 0.0, np.random.default_rng(0)) for example in examples]
    return policy.as_rollout(texts)


def roles_and_visible(policy, rollout):
    roles = train.response_roles(policy.decode(rollout), rollout)
    return roles, without_perception(rollout.mask, roles)


def stock_log_probs(policy, prompts, rollout, temperature, visible=None, cut=False):
    """Log-probs [B, T] by stock calls of the model, each response with a prompt of its own.

    Hidden tokens are masked in their place, or cut out; their log-prob is 0.
    """
    if visible is None:
        visible = rollout.mask
    rows = []
    for b in range(len(rollout.ids)):
        one = rollout[b : b + 1]
        rows.append(stock_log_probs_of_one(policy, prompts, one, temperature, visible[b], cut))
    return torch.stack(rows)


def stock_log_probs_of_one(policy, prompts, one, temperature, visible, cut):
    """The same for a rollout of one response: [T]."""
    shown = visible.bool()  # [T]
    kept = torch.ones_like(shown)  # what the model reads
    if cut:
        kept = shown
    ids = one.ids[0, kept]
    i = int(one.prompt)
    positions = policy._response_positions(prompts, one.prompt, shown[None])[:, :, kept]
    out = policy.model.model(
        input_ids=torch.cat([prompts.ids[i], ids])[None],
        attention_mask=torch.cat([prompts.mask[i], shown[kept].long()])[None],
        position_ids=torch.cat([prompts.positions[:, [i]], positions], dim=2),
        pixel_values=prompts.pixels[i],
        image_grid_thw=prompts.grids[i],
        use_cache=False,
    )
    L = prompts.ids.shape[1]
    states = out.last_hidden_state[0, L - 1 : -1]  # the state before a token predicts it
    logits = policy.model.lm_head(states) / temperature
    logits = logits.index_fill(1, policy.forbidden, -INF)
    logp = logits.log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
    return torch.zeros(len(shown)).masked_scatter(shown, logp[shown[kept]])


def gradients_of(policy, logps):
    """Gradients of the sum of these log-probs, one for each weight that they depend on."""
    policy.model.zero_grad()
    torch.stack([logp.sum() for logp in logps]).sum().backward()
    return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


def assert_same_scores(policy, cases, atol, cut=False):
    """Values and gradients of `log_probs` are those of stock calls.

    Args:
        cases: (prompts, rollout, visible or None) each.
    """
    ours = []
    theirs = []
    for prompts, rollout, visible in cases:
        ours.append(policy.log_probs(prompts, rollout, 0.7, visible))
        theirs.append(stock_log_probs(policy, prompts, rollout, 0.7, visible, cut))
    ours += gradients_of(policy, ours)
    theirs += gradients_of(policy, theirs)
    assert len(ours) == len(theirs) > len(cases)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=atol)


def test_log_probs_and_gradients_are_those_of_stock_calls(
    policy, prompts, corrupted_prompts, rollout, demonstrations
):
    _, visible = roles_and_visible(policy, demonstrations)
    some = rollout[torch.tensor([1, 6, 7, 0])]
    first_tokens = replace(
        demonstrations,
        ids=demonstrations.ids[:, :1],
        mask=demonstrations.mask[:, :1],
        logp=demonstrations.logp[:, :1],
    )
    cases = [
        (prompts, some, None),
        (prompts, first_tokens, None),
        (corrupted_prompts, demonstrations, None),
        (prompts, demonstrations, visible),
    ]
    assert_same_scores(policy, cases, atol=1e-4, cut=True)


def test_scoring_gives_what_sampling_gave(policy, prompts, rollout):
    with torch.no_grad():
        logp = policy.log_probs(prompts, rollout, 0.7)
        reused = policy.log_probs(prompts, rollout, 0.7, prompt_cache=rollout.prompt_cache)
    torch.testing.assert_close(logp, rollout.logp, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reused, rollout.logp, atol=1e-4, rtol=1e-4)
    assert (rollout.logp[~rollout.mask] == 0).all()


@torch.no_grad()
def test_hidden_perception_equals_removed_perception(policy, prompts, demonstrations):
    roles, visible = roles_and_visible(policy, demonstrations)
    blank = policy.log_probs(prompts, demonstrations, 1.0, visible)
    masked = stock_log_probs(policy, prompts, demonstrations, 1.0, visible)
    removed = stock_log_probs(policy, prompts, demonstrations, 1.0, visible, cut=True)
    for other in (masked, removed):
        relative = (blank - other)[roles == R] / other[roles == R]
        assert relative.abs().max() < 5e-6  # a few roundings of float32


@torch.no_grad()
def test_contrasts_are_not_zero(policy, prompts, corrupted_prompts, demonstrations):
    roles, visible = roles_and_visible(policy, demonstrations)
    logp = policy.log_probs(prompts, demonstrations, 1.0)
    logp_corrupted = policy.log_probs(corrupted_prompts, demonstrations, 1.0)
    logp_blank = policy.log_probs(prompts, demonstrations, 1.0, visible)
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    assert (delta[roles != O].abs() > 1e-4).all()


# ---- the loss to copy


@pytest.fixture
def copied(policy, prompts, corrupted_prompts, demonstrations, monkeypatch):
    """The responses, and all names after the README's block has run on a stock model.

    Its inputs are what a processor returns, of two responses to each of two prompts.
    """
    monkeypatch.setattr(policy, "forbidden", policy.forbidden[:0])  # stock: the whole vocabulary
    which = torch.tensor([0, 0, 3, 3])
    responses = replace(demonstrations, prompt=which)
    mask = responses.mask.long()
    assert (prompts.mask[which] == 0).any()  # padding on both sides
    assert (mask == 0).any()
    ids = torch.cat([prompts.ids[which], responses.ids], dim=1)
    names = {**vars(srpo), "model": policy.model, "T": mask.shape[1], "mask": mask}
    names["roles"], _ = roles_and_visible(policy, responses)
    names["rewards"] = [1.0, 0.0, 0.0, 1.0]
    names["group_size"] = 2
    names["inputs"] = {
        "input_ids": ids,
        "attention_mask": torch.cat([prompts.mask[which], mask], dim=1),
        "mm_token_type_ids": (ids == policy.image_token).long(),
        "pixel_values": torch.cat([prompts.pixels[i] for i in which]),
        "image_grid_thw": torch.cat([prompts.grids[i] for i in which]),
    }
    names["corrupted_pixels"] = torch.cat([corrupted_prompts.pixels[i] for i in which])
    policy.model.zero_grad()
    exec(code(section("Copy the loss")), names)
    return responses, names


def test_the_loss_to_copy_trains_a_stock_model(policy, copied):
    responses, names = copied
    weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.grad.abs().sum() > 0
    assert (names["delta"][names["roles"] == P] != 0).all()
    assert names["A_hat"].shape == responses.mask.shape


def test_the_loss_to_copy_finds_the_roles(policy, copied):
    responses, names = copied
    rows = zip(names["roles"], responses.ids, responses.mask, strict=True)
    for roles, ids, is_response in rows:
        sampled = ids[is_response][:-1].tolist()  # without EOS
        assert torch.equal(names["roles_of"](policy.tokenizer, sampled, names["T"]), roles)


@torch.no_grad()
def test_the_loss_to_copy_scores_as_the_policy_does(policy, prompts, corrupted_prompts, copied):
    responses, names = copied
    roles, visible = roles_and_visible(policy, responses)
    logp = policy.log_probs(prompts, responses, 1.0)
    logp_corrupted = policy.log_probs(corrupted_prompts, responses, 1.0)
    logp_blank = policy.log_probs(prompts, responses, 1.0, visible)
    expected = [
        ("old_logp", responses.mask, logp),
        ("logp_corrupted", roles == P, logp_corrupted),
        ("logp_blank", roles == R, logp_blank),
    ]
    for name, where, ours in expected:
        torch.testing.assert_close(names[name][where], ours[where], atol=1e-4, rtol=1e-4)


# ---- corrupted images, and the verifier


def test_patch_mask_hits_exactly_its_share_of_whole_patches():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    masked = np.asarray(corrupt(Image.fromarray(pixels), "patch", patch=8, p=0.6))
    changed = (masked != pixels).any(axis=-1)
    share = changed.reshape(6, 8, 6, 8).mean(axis=(1, 3)).ravel()
    assert ((share == 0) | (share > 0.95)).all()
    assert (share > 0).sum() == round(0.6 * 36)


def test_a_masked_patch_is_one_of_the_model_with_a_draw_per_prompt(policy, examples, monkeypatch):
    calls = []

    def recorded(image, **options):
        calls.append(options)
        return image

    monkeypatch.setattr(train, "corrupt", recorded)
    monkeypatch.setattr(policy, "patch", 6)
    args = train.resolve_options(["--device", "cpu", "--corruption-p", "0.3", "--seed", "2"])
    train.corrupted_copies(examples, policy, args, step=5)
    expected = []
    for i in range(4):
        seed = (2, 5, i, 0)  # of the run; step, prompt, image
        expected.append({"kind": "patch", "p": 0.3, "patch": 6, "seed": seed})
    assert calls == expected


SCENE = (Fact("a1", "red", "circle"), Fact("b2", "blue", "square"))
EXAMPLE = Example((), "How many red?", "1", SCENE, Query("count", ("red",)))
VERDICTS = [  # perception, answer; accuracy, F1 of the perception, grounded, consistent
    ("a1 red circle, b2 blue square", "1", (1, 1, 1, 1)),
    ("a1 red circle", "1.0", (1, 2 / 3, 1, 1)),
    ("A1: a Red circle. b2 is a blue square!", "1", (1, 1, 1, 1)),
    ("c3 red square", "1", (1, 0, 0, 1)),  # right for the wrong reason
    ("a1 red circle, a1 red square", "1", (1, 0.5, 0, 1)),  # stated twice: no evidence
    ("a1 red circle, c3 red square", "2", (0, 0.5, 0, 1)),  # wrong, but follows
    ("a1 red circle", "2", (0, 2 / 3, 0, 0)),
    ("nothing", "1", (1, 0, 0, 0)),
]


@pytest.mark.parametrize(("perception", "answer", "expected"), VERDICTS)
def test_verdicts_are_separate(perception, answer, expected):
    v = data.verify(data.respond(perception, "so", answer), EXAMPLE)
    found = (v.accuracy, v.perception, v.grounded, v.consistent)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "accuracy"), [("1", 1), ("2", 0)])
def test_the_reward_is_nine_tenths_accuracy_and_a_tenth_form(answer, accuracy):
    v = data.verify(data.respond("x", "y", answer), EXAMPLE)
    assert v.accuracy == accuracy
    assert v.format == 1
    assert v.reward == pytest.approx(0.9 * accuracy + 0.1)


# ---- the loop

LOGGED = {"reward", "accuracy", "format", "perception", "grounded", "consistent"}
LOGGED |= {"loss", "clip_frac", "kl", "grad_norm", "ratio_off", "entropy", "length", "used_groups"}
LOGGED |= {"truncated", "skipped"}
LOGGED |= {"w_perception", "w_reasoning", "sec_generate", "sec_score", "sec_update"}

SMALL = ["--steps", "6", "--prompts", "4", "--group-size", "4", "--save-every", "2"]
SMALL += ["--eval-size", "16"]
QUICK = ["--device", "cpu", "--eval-size", "128", "--eval-every", "0"]  # the default warm-up
ONE = [*QUICK, *SMALL, "--steps", "1", "--eval-size", "2"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Warmed-up models are made once for all tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def run(out, *argv):
    """Records of a run of train.py: those of evaluations, and those of steps."""
    assert train.main([*map(str, argv), "--out", str(out)]) == 0
    log = train.Run(out).log()
    evaluations = [record for record in log if "eval" in record]
    steps = [record for record in log if "eval" not in record]
    return evaluations, steps


def records_of(out):
    """All records of a run, without the seconds that its phases took."""
    records = []
    for record in train.Run(out).log():
        records.append({name: x for name, x in record.items() if not name.startswith("sec_")})
    return records


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """20 steps of SRPO and of GRPO: (evaluations, steps) each."""
    found = {}
    for algo in ("srpo", "grpo"):
        out = tmp_path_factory.mktemp("twins") / algo
        found[algo] = run(out, *QUICK, "--algo", algo, "--steps", 20)
    return found


@pytest.mark.parametrize("algo", ["srpo", "grpo"])
def test_training_improves_the_reward(twins, algo):
    evaluations, steps = twins[algo]
    first, last = evaluations
    assert last["eval"]["reward"] > first["eval"]["reward"] + 0.04
    assert [record["step"] for record in steps] == list(range(1, 21))
    for record in steps:
        assert record.keys() == LOGGED | {"step"}
        assert record["grad_norm"] > 0
        assert record["used_groups"] > 0
        assert record["kl"] is None
        assert record["ratio_off"] < 1e-4  # it is the policy that sampled


def test_grpo_starts_alike_and_has_weights_of_1(twins):
    srpo_evaluations, srpo_steps = twins["srpo"]
    grpo_evaluations, grpo_steps = twins["grpo"]
    assert srpo_evaluations[0] == grpo_evaluations[0]
    assert srpo_steps[0]["reward"] == grpo_steps[0]["reward"]
    assert {record["w_perception"] for record in grpo_steps} == {1.0}
    assert len({record["w_perception"] for record in srpo_steps}) > 1


def test_a_run_ends_with_a_summary(tmp_path, capsys):
    run(tmp_path / "out", *ONE)
    shown = capsys.readouterr().out
    assert "2 held-out examples, sampled at temperature 1.0: step 0, step 1" in shown
    assert "accuracy" in shown
    assert shown.count("(answer: ") == 1
    assert "metrics and checkpoint: " in shown


def test_the_warm_up_trains_the_vision_tower_too(tmp_path):
    args = train.resolve_options(["--device", "cpu", "--warmup-steps", "2"])
    warm = model.load(train.warmed_up(args, train.Run(tmp_path)))
    cold = model.build_tiny(seed=0)
    warm_weights = warm.model.model.visual.parameters()
    cold_weights = cold.model.model.visual.parameters()
    for x, y in zip(warm_weights, cold_weights, strict=True):
        assert not torch.equal(x, y)


def same_weights(one, other):
    mine = one.model.state_dict()
    theirs = other.model.state_dict()
    if mine.keys() != theirs.keys():
        return False
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def start_and_kill(run, *argv, records):
    """Start train.py in a process of its own, and kill it when its log has so many records."""
    command = [sys.executable, str(HERE / "train.py"), *argv]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(run.log()) < records:
        time.sleep(0.01)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    options = [*QUICK, *SMALL, "--inner-epochs", "2", "--micro-batch", "5", "--kl-coef", "0.01"]
    evaluations, steps = run(tmp_path / "whole", *options)
    assert len(evaluations) == 2
    assert len(steps) == 6
    assert steps[2]["kl"] > 0
    expected = records_of(tmp_path / "whole")

    folder = str(tmp_path / "killed")
    killed = train.Run(tmp_path / "killed")
    start_and_kill(killed, *options, "--out", folder, records=2)  # before the first checkpoint
    start_and_kill(killed, "--resume", folder, records=5)  # after one
    with open(killed.metrics, "a") as file:
        file.write('{"step": 9, "rew')  # cut off in the middle of a line
    torn = killed.path / "checkpoint-000006.tmp"
    torn.mkdir()  # left by a kill inside a save
    for _ in range(2):  # the second time nothing is left to do
        assert train.main(["--resume", folder]) == 0
        assert records_of(killed.path) == expected
        assert not torn.exists()
    whole_policy = model.load(str(train.Run(tmp_path / "whole").checkpoint()))
    killed_policy = model.load(str(killed.checkpoint()))
    assert same_weights(whole_policy, killed_policy)


def sampled_and_weighed(policy, args, task):
    """Steps 1 to 7 of the first training step: prompts, rollout, old log-probs [B, T] and A_hat."""
    examples = task.train_batch(0, 4)
    prompts = policy.encode(examples)
    corrupted_prompts = policy.encode(train.corrupted_copies(examples, policy, args, step=1))
    rng = train.generator(args, 1)
    rollout = policy.sample(prompts, 4, max_new_tokens=48, temperature=0.7, generator=rng)
    responses = policy.decode(rollout)
    roles = train.response_roles(responses, rollout)
    rewards = []
    for (text, _), i in zip(responses, rollout.prompt.tolist(), strict=True):
        rewards.append(data.verify(text, examples[i]).reward)
    A = group_advantages(rewards, 4)
    assert (A == 0).any()  # the loop leaves these out where there is no KL term
    with torch.no_grad():
        old_logp = policy.log_probs(prompts, rollout, 0.7)
        logp_corrupted = policy.log_probs(corrupted_prompts, rollout, 0.7)
        visible = without_perception(rollout.mask, roles)
        logp_blank = policy.log_probs(prompts, rollout, 0.7, visible)
    delta = contrast_scores(old_logp, logp_corrupted, logp_blank, roles)
    return prompts, rollout, old_logp, role_aware_advantages(A, token_weights(delta, roles))


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_step_equals_the_method_written_out(kl_coef, tmp_path):
    """All responses at once, and none left out: the shortcuts of the loop change nothing."""
    options = [*ONE, "--temperature", 0.7, "--kl-coef", kl_coef, "--inner-epochs", 2]
    options += ["--micro-batch", 3, "--lr", 1e-3, "--clip-low", 0.01, "--clip-high", 0.02]
    _, (record,) = run(tmp_path / "out", *options)

    args = train.resolve_options([str(word) for word in options])
    task = train.drawn_task(args)
    policy = train.load_policy(args, train.warmed_up(args, train.Run(tmp_path)))
    prompts, rollout, old_logp, A_hat = sampled_and_weighed(policy, args, task)
    parameters = train.trainable(policy, args)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    means = {"loss": 0.0, "kl": 0.0, "clip_frac": 0.0}
    for _ in range(2):
        logp = policy.log_probs(prompts, rollout, 0.7)
        clip = {"clip_low": 0.01, "clip_high": 0.02}
        loss, stats = policy_loss(logp, old_logp, A_hat, rollout.mask, **clip)
        kl = kl_to_reference(logp, old_logp, rollout.mask)  # the reference is what sampled
        loss = loss + kl_coef * kl
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        means["loss"] += loss.item() / 2
        means["kl"] += kl.item() / 2
        means["clip_frac"] += stats["clip_frac"].item() / 2
    assert means["clip_frac"] > 0.05
    if kl_coef == 0:
        assert record["kl"] is None
        del means["kl"]
    for name, expected in {**means, "grad_norm": grad_norm}.items():
        assert record[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_micro_batches_do_not_change_a_step(tmp_path):
    _, (whole,) = run(tmp_path / "whole", *ONE, "--micro-batch", 999)
    _, (split,) = run(tmp_path / "split", *ONE, "--micro-batch", 3)
    assert whole["grad_norm"] > 0
    assert whole["w_perception"] != 1
    for name, x in whole.items():
        if not name.startswith("sec_") and name not in ("ratio_off", "kl"):
            assert split[name] == pytest.approx(x, rel=1e-3, abs=1e-6), name


@pytest.fixture(scope="module")
def default_step(tmp_path_factory):
    _, (step,) = run(tmp_path_factory.mktemp("default") / "out", *ONE)
    return step


def test_bfloat16_computes_under_autocast(tmp_path, default_step):
    _, (half,) = run(tmp_path / "half", *ONE, "--dtype", "bfloat16")
    assert half["ratio_off"] < 0.05
    assert half["loss"] != default_step["loss"]  # it rounds


METHOD_OPTIONS = [["--corruption", kind] for kind in CORRUPTIONS if kind != "patch"]
METHOD_OPTIONS += [
    ["--corruption-p", "0.3"],
    ["--tau", "0.3"],
    ["--w-min", "0.5"],
    ["--w-max", "2"],
    ["--lam", "0.5"],
    ["--clip-high", "0.3", "--inner-epochs", "2"],
]


@pytest.mark.parametrize("options", METHOD_OPTIONS, ids=" ".join)
def test_every_option_of_the_method_reaches_the_update(options, default_step, tmp_path):
    _, (step,) = run(tmp_path / "out", *ONE, *options)
    assert step["grad_norm"] != default_step["grad_norm"]
    assert step["reward"] == default_step["reward"]


def test_lambda_0_is_grpo_number_for_number(tmp_path):
    _, (srpo_step,) = run(tmp_path / "srpo", *ONE, "--lam", 0)
    _, (grpo_step,) = run(tmp_path / "grpo", *ONE, "--algo", "grpo")
    assert srpo_step["loss"] == grpo_step["loss"]
    assert srpo_step["grad_norm"] == grpo_step["grad_norm"]


HOOK = """
import torch, train
def same(*tensors, **options):
    torch.save((tensors, options), f"{__file__}.{options['progress']}.pt")
    return train.srpo_weights(*tensors, **options)
def doubled(logp, *others, **options):
    return 2 * torch.ones_like(logp)
"""


@pytest.fixture
def hook(tmp_path):
    """For --weights: SRPO's own weights, which keep what they were given; and 2 everywhere."""
    file = tmp_path / "hook.py"
    file.write_text(HOOK)
    return file


def test_weights_of_your_own_take_the_place_of_srpos(hook, tmp_path, default_step):
    _, (same,) = run(tmp_path / "same", *ONE, "--weights", f"{hook}:same")
    assert same["loss"] == default_step["loss"]
    assert same["grad_norm"] == default_step["grad_norm"]
    _, (grpo,) = run(tmp_path / "grpo", *ONE, "--algo", "grpo")
    _, (doubled,) = run(tmp_path / "doubled", *ONE, "--weights", f"{hook}:doubled")
    assert doubled["w_perception"] == 2
    assert doubled["grad_norm"] == pytest.approx(2 * grpo["grad_norm"], rel=1e-4)


def test_weights_of_your_own_are_given_all_that_srpo_knows(hook, tmp_path):
    run(tmp_path / "out", *ONE, "--weights", f"{hook}:same")
    (logp, logp_corrupted, logp_blank, roles, A), options = torch.load(f"{hook}.0.0.pt")
    assert logp.shape == logp_corrupted.shape == logp_blank.shape == roles.shape
    assert A.shape == (len(logp),)
    assert (A != 0).all()
    assert (logp_corrupted != 0).sum() == (logp != 0).sum()  # of every token, whatever its role
    assert (logp_blank[roles == P] == 0).all()  # hidden
    assert options["entropy"].shape == logp.shape
    assert (options["tau"], options["w_min"], options["w_max"]) == (1.0, 0.8, 1.2)


def test_weights_of_your_own_are_told_the_options_and_the_progress(hook, tmp_path):
    options = ["--steps", 3, "--tau", 0.5, "--w-min", 0.7, "--w-max", 1.4]
    run(tmp_path / "out", *ONE, *options, "--weights", f"{hook}:same")
    for progress in (0.0, 0.5, 1.0):
        _, given = torch.load(f"{hook}.{progress}.pt")
        del given["entropy"]
        assert given == {"progress": progress, "tau": 0.5, "w_min": 0.7, "w_max": 1.4}


@pytest.mark.parametrize(("context", "bad"), [("corrupted", NAN), ("blank", -INF)])
def test_in_the_loop_a_score_that_is_not_finite_makes_its_response_grpo(
    context, bad, tmp_path, monkeypatch
):
    seen = []
    token_weights_of_srpo = train.token_weights
    log_probs = model.Policy.log_probs

    def recorded(delta, roles, **options):
        w = token_weights_of_srpo(delta, roles, **options)
        seen.append((roles, w))
        return w

    def faulty(self, prompts, rollout, temperature, visible=None, prompt_cache=None):
        logp = log_probs(self, prompts, rollout, temperature, visible, prompt_cache)
        scored = "corrupted"
        if prompt_cache is not None:
            scored = "blank"  # these prompts have been read, with their images as they are
        if scored == context and not torch.is_grad_enabled():
            logp[0] += bad
        return logp

    monkeypatch.setattr(train, "token_weights", recorded)
    run(tmp_path / "good", *ONE)
    monkeypatch.setattr(model.Policy, "log_probs", faulty)
    _, (step,) = run(tmp_path / "bad", *ONE)
    (roles, good), (_, broken) = seen
    assert set(roles[0].tolist()) == {O, P, R}
    assert (good[0] != 1).any()
    assert (broken[0] == 1).all()
    assert torch.equal(broken[1:], good[1:])
    assert math.isfinite(step["loss"])
    assert step["grad_norm"] > 0


def test_groups_without_a_spread_are_neither_scored_nor_trained(tmp_path, monkeypatch):
    prompts_read = []
    read_prompts = model.Policy.read_prompts

    def counted(self, prompts, which):
        prompts_read.append(len(which))
        return read_prompts(self, prompts, which)

    monkeypatch.setattr(train, "verify", lambda text, example: data.Verdict(0.5, 0.0, 0.0))
    monkeypatch.setattr(model.Policy, "read_prompts", counted)
    _, (step,) = run(tmp_path / "out", *ONE)
    assert prompts_read == [2, 4, 2]  # to sample: before, in the step, after
    assert step["used_groups"] == 0
    assert step["grad_norm"] == 0
    assert step["entropy"] is None
    assert step["w_perception"] is None


# ---- your own data, your own reward


@pytest.fixture
def jsonl(tmp_path):
    """Writes 20 rows with 10 images, given lines, or one row replaced; gives the path."""
    rows = []
    for i in range(20):
        row = {"image": f"{i % 10}.png", "question": "How many red?", "answer": i % 3}
        rows.append(json.dumps(row))
    for i in range(10):
        Image.new("RGB", (40 + i, 30), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")

    def write(third_line=None, lines=rows):
        lines = list(lines)
        if third_line is not None:
            lines[2] = third_line
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_your_own_data_trains_and_is_evaluated(jsonl, tmp_path):
    options = ["--data", jsonl(), "--max-new-tokens", 8]
    hot = ["--temperature", 3, "--steps", 1]
    evaluations, (step,) = run(tmp_path / "out", *options, *QUICK, *SMALL, *hot)
    assert step["grounded"] is None
    assert [record["step"] for record in evaluations] == [0, 1]
    assert evaluations[0]["eval"]["n"] == 2
    checkpoint = train.Run(tmp_path / "out").checkpoint()
    only = ["--steps", 0, "--model", checkpoint]
    (held_out,), no_steps = run(tmp_path / "held-out", *options, *only)
    assert held_out["eval"]["n"] == 2
    assert no_steps == []
    (everything,), _ = run(tmp_path / "all", *options, *only, "--eval-all")
    assert everything["eval"]["n"] == 20


@pytest.mark.parametrize(
    ("value", "has_its_own_format"),
    [("float(len(text) % 3)", False), ("data.Verdict(len(text) % 3, 0.5, 0.0)", True)],
)
def test_a_reward_of_your_own(value, has_its_own_format, tmp_path):
    file = tmp_path / "my.py"
    file.write_text(f"import data\ndef reward(text, example):\n    return {value}\n")
    _, (step,) = run(tmp_path / "out", *ONE, "--reward", f"{file}:reward")
    assert 0.1 < step["reward"] < 1.9
    assert (step["format"] == 0) == has_its_own_format


# ---- the options

PRESETS = {  # values of the options that were left out
    "": train.TINY,
    "--model TMP/real": train.REAL,
    "--model TMP/real --lora 16": train.REAL_LORA,
    "--model TMP/tiny": {**train.TINY, "warmup_steps": 0},
    "--model TMP/adapters": {**train.TINY, "warmup_steps": 0},
}


@pytest.mark.parametrize("options", PRESETS)
def test_options_left_out_have_the_values_of_their_kind_of_model(
    options, tmp_path, policy, monkeypatch
):
    monkeypatch.setattr(model, "import_peft", lambda: None)  # it need not be installed for this
    policy.save(tmp_path / "tiny")
    (tmp_path / "real").mkdir()
    (tmp_path / "real/config.json").write_text('{"model_type": "qwen2_vl"}')
    (tmp_path / "adapters").mkdir()
    base = {"base_model_name_or_path": str(tmp_path / "tiny"), "r": 2}
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(base))
    args = train.resolve_options(options.replace("TMP", str(tmp_path)).split())
    for name, value in PRESETS[options].items():
        assert getattr(args, name) == value, name


def test_the_help_names_the_presets():
    help_text = " ".join(train.build_parser().format_help().split())
    assert "longest response (tiny: 48, a real model: 512)" in help_text
    assert "(tiny: 0.0001, a real model: 1e-06, with --lora: 1e-05)" in help_text
