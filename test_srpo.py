"""Tests, from the method to the command line. `python -m pytest test_srpo.py`, on a CPU.

The method comes first, written as Python loops over one response: its shortest statement.
"""

import json
import math
import os
import re
import shlex
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
from corrupt import CORRUPTIONS, corrupt, open_image
from data import Example, Fact, Query
from srpo import (
    Response,
    Role,
    Tags,
    contrast_scores,
    group_advantages,
    kl_to_reference,
    parse_response,
    policy_loss,
    role_aware_advantages,
    shared_baseline,
    text_and_offsets,
    token_bytes,
    token_roles,
    token_weights,
    without_perception,
)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
MORE = (HERE / "extras/README.md").read_text(encoding="utf-8")
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
    roles[2] = P * (roles[2] > 0)  # one that perceives and does not reason
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


def test_tensors_equal_the_loops(batch):
    A = group_advantages(batch["rewards"], 4)
    delta = delta_of(batch)
    b = shared_baseline(delta, batch["roles"])
    w = token_weights(delta, batch["roles"], tau=0.7)
    A_hat = role_aware_advantages(A, w, lam=0.8)
    clip = {"clip_low": 0.1, "clip_high": 0.3}
    loss, stats = policy_loss(batch["logp"], batch["old_logp"], A_hat, batch["mask"], **clip)
    kl = kl_to_reference(batch["logp"], batch["ref_logp"], batch["mask"])

    lists = {name: x.tolist() for name, x in batch.items()}
    J = 0.0
    kl_sum = 0.0
    for i in range(12):
        first = i // 4 * 4  # of the group
        group = lists["rewards"][first : first + 4]
        roles = lists["roles"][i]
        length = sum(lists["mask"][i])
        contexts = (lists["old_logp"][i], lists["corrupted"][i], lists["blank"][i])
        near = {"abs": 1e-12}
        assert A[i].item() == pytest.approx(loop_advantages(group)[i % 4], **near)
        assert delta[i].tolist() == pytest.approx(loop_delta(*contexts, roles), **near)
        scored = [delta[i, t].item() for t in range(11) if roles[t] != O]
        expected_b = sum(scored) / max(1, len(scored))
        assert b[i].item() == pytest.approx(expected_b, **near)
        expected_w = loop_weights(delta[i].tolist(), roles, tau=0.7)
        assert w[i].tolist() == pytest.approx(expected_w, **near)
        expected_A_hat = loop_A_hat(A[i].item(), w[i].tolist(), lam=0.8)
        assert A_hat[i].tolist() == pytest.approx(expected_A_hat, **near)
        logp = lists["logp"][i][:length]
        old_logp = lists["old_logp"][i][:length]
        J += loop_objective(logp, old_logp, A_hat[i].tolist(), low=0.1, high=0.3)
        kl_sum += loop_kl(logp, lists["ref_logp"][i][:length])
    n_tokens = batch["mask"].sum().item()
    assert loss.item() == pytest.approx(-J / n_tokens, abs=1e-12)
    assert kl.item() == pytest.approx(kl_sum / n_tokens, abs=1e-12)
    assert 0 < stats["clip_frac"] < 1


def test_large_rewards_keep_their_spread():
    A = group_advantages([1e9, 1e9 + 1, 1e9 + 2], 3)
    assert A.tolist() == pytest.approx([-1, 0, 1], abs=1e-3)
    assert A.dtype == torch.float32


def test_the_advantage_uses_the_sample_std_and_leaves_no_residue():
    assert group_advantages([1, 0, 0, 0], 4)[0].item() == pytest.approx(1.5, abs=1e-3)
    no_spread = torch.full((6,), 0.1)
    assert group_advantages(no_spread, 3).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("rewards", "group_size"),
    [([1.0, 0.0], 1), ([1.0, 0.0, 0.0], 2), ([], 2), ([[1.0, 0.0]], 2)],
)
def test_rewards_that_are_no_groups_are_refused(rewards, group_size):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(rewards, group_size)


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


def test_equal_contrasts_and_lambda_0_are_grpo(batch):
    one = torch.ones(12, 11, dtype=torch.float64)
    constant = torch.full_like(batch["logp"], 0.3)
    assert torch.allclose(token_weights(constant, batch["roles"]), one)
    nothing_removed = {**batch, "corrupted": batch["old_logp"], "blank": batch["old_logp"]}
    assert torch.equal(weights_of(nothing_removed), one)

    A = group_advantages(batch["rewards"].float(), 4)
    A_hat = role_aware_advantages(A, weights_of(batch).float(), lam=0.0)
    assert torch.equal(A_hat, A[:, None].expand_as(A_hat))
    logps = (batch["logp"].float(), batch["old_logp"].float())
    srpo_loss, _ = policy_loss(*logps, A_hat, batch["mask"])
    grpo_loss, _ = policy_loss(*logps, A, batch["mask"])
    assert torch.equal(srpo_loss, grpo_loss)


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


def test_micro_batches_and_other_rows_do_not_matter(batch):
    w = weights_of(batch)
    A_hat = role_aware_advantages(group_advantages(batch["rewards"], 4), w)
    inputs = (batch["logp"], batch["old_logp"], A_hat, batch["mask"])
    whole, _ = policy_loss(*inputs)
    parts = 0.0
    for start in range(0, 12, 5):
        rows = [x[start : start + 5] for x in inputs]
        loss, _ = policy_loss(*rows, denominator=batch["mask"].sum())
        parts = parts + loss
    assert torch.allclose(parts, whole)
    alone = {name: x[4:5] for name, x in batch.items()}
    assert (w[4] != 1).any()
    assert torch.equal(weights_of(alone), w[4:5])


@pytest.mark.parametrize("pad", [(3, 0), (0, 3)], ids=["left", "right"])
def test_padding_may_hold_anything_on_either_side(batch, pad):
    A = group_advantages(batch["rewards"], 4)
    w = weights_of(batch)
    padded = {}
    for name in ("logp", "old_logp", "corrupted", "blank"):
        padded[name] = torch.nn.functional.pad(batch[name], pad, value=NAN)
    for name in ("roles", "mask"):
        padded[name] = torch.nn.functional.pad(batch[name], pad)
    wide = weights_of(padded)
    assert torch.allclose(wide[:, pad[0] : pad[0] + 11], w)
    logp = padded["logp"].requires_grad_()
    A_hat = role_aware_advantages(A, wide)
    loss, _ = policy_loss(logp, padded["old_logp"], A_hat, padded["mask"])
    loss.backward()
    inputs = (batch["logp"], batch["old_logp"])
    expected, _ = policy_loss(*inputs, role_aware_advantages(A, w), batch["mask"])
    assert torch.allclose(loss, expected)
    assert logp.grad.isfinite().all()


def test_a_response_without_both_roles_has_weight_1():
    delta = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0], [1.0, -1.0]])
    roles = torch.tensor([[O, O], [P, P], [R, R], [P, R]])
    w = token_weights(delta, roles)
    assert (w[:3] == 1).all()
    assert (w[3] != 1).all()


def test_an_empty_mask_gives_zeros():
    empty = torch.zeros(2, 4)
    loss, stats = policy_loss(empty, empty, torch.ones(2), empty)
    assert loss == 0
    assert stats["clip_frac"] == 0
    assert kl_to_reference(empty, empty, empty) == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("context", "role"), [("corrupted", P), ("blank", R)])
def test_a_contrast_that_is_not_finite_makes_its_response_grpo(batch, bad, context, role):
    t = int((batch["roles"][0] == role).nonzero()[0])
    broken = {**batch, context: batch[context].clone()}
    broken[context][0, t] = bad
    delta = delta_of(broken)
    w = weights_of(broken)
    A = group_advantages(batch["rewards"], 4)
    assert delta[0, t].isnan()
    assert delta.isnan().sum() == 1
    assert (w[0] == 1).all()
    contexts = [broken[name][0].tolist() for name in ("old_logp", "corrupted", "blank")]
    roles = batch["roles"][0].tolist()
    assert loop_weights(loop_delta(*contexts, roles), roles) == [1.0] * 11
    assert torch.equal(w[1:], weights_of(batch)[1:])
    assert (role_aware_advantages(A, w)[0] == A[0]).all()


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


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_overflowing_ratios_stay_finite(advantage):
    logp = torch.zeros(1, 4, requires_grad=True)
    mask = torch.ones(1, 4)
    loss, _ = policy_loss(logp, logp.detach() - 120, torch.tensor([advantage]), mask)
    (loss + kl_to_reference(logp, logp.detach() + 200, mask)).backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


def in_bfloat16(batch):
    half = dict(batch)
    for name in ("logp", "old_logp", "corrupted", "blank", "ref_logp"):
        half[name] = batch[name].bfloat16()
    return half


def test_half_precision_is_computed_in_float32(batch):
    half = in_bfloat16(batch)
    same_numbers = dict(batch)
    for name in ("old_logp", "corrupted", "blank"):
        same_numbers[name] = half[name].float()
    assert weights_of(half).dtype == torch.float32
    assert torch.equal(delta_of(half), delta_of(same_numbers))


def test_masks_may_have_any_dtype(batch):
    half = in_bfloat16(batch)
    A = group_advantages(batch["rewards"], 4)
    losses = []
    for dtype in (torch.bool, torch.long, torch.float):
        mask = batch["mask"].to(dtype)
        loss, _ = policy_loss(half["logp"], half["old_logp"], A, mask)
        losses.append(loss)
    assert losses[0] == losses[1] == losses[2]
    assert losses[0].dtype != torch.bfloat16


def test_shapes_that_do_not_fit_are_named(batch):
    x = batch["logp"]
    short = x[:, :5]
    roles = batch["roles"]
    A = group_advantages(batch["rewards"], 4)
    calls = [
        (contrast_scores, (x, short, x, roles)),
        (shared_baseline, (short, roles)),
        (without_perception, (short, roles)),
        (token_weights, (x, short)),
        (role_aware_advantages, (A[:3], x)),
        (policy_loss, (x, short, A, batch["mask"])),
        (policy_loss, (x, x, short, batch["mask"])),
        (kl_to_reference, (x, short, batch["mask"])),
    ]
    for function, arguments in calls:
        with pytest.raises(ValueError, match=r"\[12, 11\]") as error:
            function(*arguments)
        assert re.search(r"\[12, 5\]|\[3\]|\[3, 1\]", str(error.value)), function


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.0},
        {"tau": -1.0},
        {"tau": 1e-320},  # 0 in float32
        {"w_min": 0.0},
        {"w_min": 1e-320},
        {"w_max": math.inf},
        {"w_min": 1e-30, "w_max": 1e30},  # a weight of 1e-60 would be 0
        {"w_min": 2.0, "w_max": 1.0},
    ],
)
def test_weights_refuse_bad_options(batch, options):
    with pytest.raises(ValueError, match="need tau"):
        weights_of(batch, **options)


@pytest.mark.parametrize("lam", [-0.1, 1.5])
def test_lambda_outside_0_to_1_is_refused(lam):
    with pytest.raises(ValueError, match="lam"):
        role_aware_advantages(torch.ones(2), torch.ones(2, 3), lam)


# ---- tags and roles

GOOD = "<perception>a</perception><reasoning>b</reasoning><answer>c</answer>"
TAG_LIST = re.findall(r"<.*?>", GOOD)


def malformed_responses():
    """Responses that a lenient parser would take."""
    bad = ["", "plain", GOOD.upper(), GOOD * 2, "Sure! " + GOOD, GOOD + " Done."]
    bad.append(GOOD + "<answer>d</answer>")
    for tag in TAG_LIST:
        bad.append(GOOD.replace(tag, ""))
        bad.append(GOOD.replace(tag, tag * 2))
    for end in range(len(GOOD)):
        bad.append(GOOD[:end])  # cut off
    swaps = [
        ("perception>", "Perception>"),
        ("<answer>", "<answer >"),
        ("<reasoning>", "so <reasoning>"),
        ("<perception>", "</perception>"),
        (">b<", "><answer>b</answer><"),
        (">a<", ">x</answer><"),
        (">a<", ">the <reasoning> tag<"),
        ("<perception>a</perception>", "</perception>a<perception>"),
    ]
    for old, new in swaps:
        bad.append(GOOD.replace(old, new))
    answer = "<answer>c</answer>"
    bad.append(f"<perception>a<reasoning>b</reasoning></perception>{answer}")  # nested
    bad.append(f"<perception>a<reasoning>b</perception></reasoning>{answer}")  # crossed
    bad.append(f"<reasoning>b</reasoning><perception>a</perception>{answer}")  # swapped
    bad.append(f"<perception>a</perception>{answer}<reasoning>b</reasoning>")
    return bad


WELL_FORMED = [
    (GOOD, ("a", "b", "c")),
    (f"\r\n {GOOD}\t\n", ("a", "b", "c")),
    (GOOD.replace("><", ">\r\n<").replace("a<", "x\r\ny\n<"), ("x\r\ny\n", "b", "c")),
    (GOOD.replace(">a<", "><"), ("", "b", "c")),
    (GOOD.replace(">b<", "> \n<"), ("a", " \n", "c")),
    (GOOD.replace(">a<", ">红色的圆 🙂<"), ("红色的圆 🙂", "b", "c")),
    (GOOD.replace(">a<", "><b>x < y</b> <PERCEPTION><<"), ("<b>x < y</b> <PERCEPTION><", "b", "c")),
]


@pytest.mark.parametrize("text", malformed_responses())
def test_the_parser_refuses_what_is_malformed(text):
    assert parse_response(text) is None


@pytest.mark.parametrize(("text", "blocks"), WELL_FORMED)
def test_the_parser_finds_the_blocks(text, blocks):
    found = parse_response(text)
    spans = (found.perception, found.reasoning, found.answer)
    assert tuple(text[start:end] for start, end in spans) == blocks


UNITS = ["<", "<perception", "<perception>", "</perception>", "a ", "\n"]
UNITS.append("<perception></perception>")


@pytest.mark.parametrize("unit", UNITS)
def test_the_parser_searches_a_text_a_fixed_number_of_times(unit):
    """So it is linear, however many broken tags the text holds."""
    calls = []

    class Counted(str):
        def __getattribute__(self, name):
            calls.append(name)
            return super().__getattribute__(name)

    for text in (unit * 20_000, GOOD.replace(">a<", f">{unit * 20_000}<")):
        calls.clear()
        found = parse_response(Counted(text))
        assert 0 < len(calls) <= 12
        if "perception>" in unit:
            assert found is None


def test_tags_can_be_renamed():
    found = parse_response("<see>a</see><think></think><say>c</say>", Tags("see", "think", "say"))
    assert found == Response((5, 6), (19, 19), (32, 33))


@pytest.mark.parametrize("names", ["aab", ("", "a", "b")])
def test_tags_must_differ(names):
    with pytest.raises(ValueError, match="different"):
        Tags(*names)


def roles_of(pieces):
    """Roles of a response from the text, or the bytes, of each sampled token."""
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    return token_roles(*text_and_offsets(pieces)).tolist()


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


def test_a_token_of_half_a_character_touches_the_whole_one():
    smile = "🙂".encode()
    pieces = [b"<perception>", smile[:2], smile[2:] + b"</", b"perception>\xff"]
    text, offsets = text_and_offsets(pieces)
    assert text == "<perception>🙂</perception>\ufffd"  # bytes that are not UTF-8 read as U+FFFD
    assert offsets[1] == (12, 13)
    assert offsets[2] == (12, 15)
    rest = b"<reasoning>b</reasoning><answer>c</answer>"
    pieces = [b"<perception>", smile[:1], smile[1:3], smile[3:] + b"</perception>", rest]
    assert roles_of(pieces) == [O, P, P, P, R]


def test_bytes_of_a_byte_level_vocabulary():
    assert token_bytes("Ġb2") == b" b2"
    assert token_bytes("ÃĹĊ") == "\u00d7\n".encode()
    with pytest.raises(ValueError, match="not a byte-level"):
        token_bytes("\u2581b2")


def test_without_perception_hides_all_from_its_first_to_its_last_token():
    roles = torch.tensor([[O, P, O, P, O, R], [O, O, R, R, O, O]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = [[1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert without_perception(mask, roles).tolist() == expected


# ---- the READMEs


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


LOGGED = {"reward", "accuracy", "format", "perception", "grounded", "consistent"}
LOGGED |= {"loss", "clip_frac", "kl", "grad_norm", "ratio_off", "entropy", "length", "used_groups"}
LOGGED |= {"truncated", "skipped"}
LOGGED |= {"w_perception", "w_reasoning", "sec_generate", "sec_score", "sec_update"}


def test_every_command_in_the_readmes_is_one():
    lines = re.findall(r"^python train\.py (.*?)(?: *#.*)?$", README + MORE, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        if "--help" not in line:
            train.build_parser().parse_args(shlex.split(line))


def test_every_option_file_and_function_that_the_readmes_name_exists():
    options = train.build_parser()._option_string_actions
    extras = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("extras/*.py")}
    for option in re.findall(r"`(--[a-z-]+)", README + MORE):
        assert option in options or any(f'"{option}"' in text for text in extras.values()), option
    for folder, text in ((HERE, README), (HERE / "extras", MORE)):
        for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (folder / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", README + MORE):
        assert name in globals(), name
    for file, name in re.findall(r"extras/(\w+\.py):(\w+)", README + MORE):
        assert f"def {name}(" in extras[file], name
    rows = re.findall(r"^\|.*", section("The method, step by step"), re.MULTILINE)
    for name in re.findall(r"`(\w+)`", "".join(rows)):
        assert hasattr(srpo, name), name


def test_the_table_of_metrics_is_complete():
    cells = re.findall(r"^\| (`.*?) \|", section("What is logged", MORE), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == LOGGED


# ---- the policy


@pytest.fixture(scope="module")
def policy():
    return model.build_tiny(seed=0)


@pytest.fixture(scope="module")
def scored(policy):
    """Four prompts of unequal length, the same with corrupted images, a rollout of two responses
    each, and a well-formed demonstration each."""
    examples = data.DrawnTask("count").train_batch(0, 3)
    examples += data.DrawnTask("compare").train_batch(0, 1)
    prompts = policy.encode(examples)
    assert (prompts.mask == 0).any()
    options = train.resolve_options(["--device", "cpu"])
    copies = train.corrupted_copies(examples, policy, options, step=1)
    corrupted_prompts = policy.encode(copies, fitted=True)
    rng = torch.Generator().manual_seed(0)
    limits = {"max_new_tokens": 24, "temperature": 0.7}
    rollout = policy.sample(prompts, 2, generator=rng, **limits)
    texts = [data.demonstrate(example, 0.0, np.random.default_rng(0)) for example in examples]
    return prompts, corrupted_prompts, rollout, policy.as_rollout(texts)


def test_a_response_that_was_cut_off_lacks_eos(policy, scored):
    _, _, rollout, written = scored
    assert policy.ended(written).all()
    last = written.mask.sum(dim=1) - 1
    written = replace(written, ids=written.ids.scatter(1, last[:, None], 0))
    assert not policy.ended(written).any()
    has_eos = torch.isin(rollout.ids * rollout.mask, torch.tensor(policy.eos)).any(dim=1)
    assert torch.equal(policy.ended(rollout), has_eos)


def roles_and_visible(policy, written):
    roles = train.response_roles(policy.decode(written), written)
    return roles, without_perception(written.mask, roles)


def stock_log_probs(policy, prompts, rollout, temperature, visible=None, cut=False):
    """Log-probs [B, T] by stock calls of the model, a prompt of its own for each response.

    Hidden tokens are masked in their place, or cut out; their log-prob is 0.
    """
    if visible is None:
        visible = rollout.mask
    rows = []
    for b, i in enumerate(rollout.prompt.tolist()):
        shown = visible[b].bool()
        kept = shown if cut else torch.ones_like(shown)
        ids = rollout.ids[b, kept]
        prompt = rollout.prompt[b : b + 1]
        positions = policy._response_positions(prompts, prompt, shown[None])[:, :, kept]
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
        logp = logp[shown[kept]]
        rows.append(torch.zeros(len(shown)).masked_scatter(shown, logp))
    return torch.stack(rows)


def same_scores(policy, cases, atol, cut=False):
    """Values and gradients of `log_probs` are those of stock calls.

    Args:
        cases: (prompts, rollout, visible or None) each.
    """
    results = []
    for stock in (False, True):
        policy.model.zero_grad()
        found = []
        for prompts, rollout, visible in cases:
            if stock:
                logp = stock_log_probs(policy, prompts, rollout, 0.7, visible, cut)
            else:
                logp = policy.log_probs(prompts, rollout, 0.7, visible)
            found.append(logp)
        sum(logp.sum() for logp in found).backward()
        gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
        results.append([x.detach().clone() for x in [*found, *gradients]])
    ours, theirs = results
    assert len(ours) == len(theirs) > len(cases)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=atol)


def test_log_probs_and_gradients_are_those_of_stock_calls(policy, scored):
    prompts, corrupted_prompts, rollout, written = scored
    _, visible = roles_and_visible(policy, written)
    some = rollout[torch.tensor([1, 6, 7, 0])]
    first_token = replace(written, ids=written.ids[:, :1], mask=written.mask[:, :1])
    first_token = replace(first_token, logp=written.logp[:, :1])
    cases = [(prompts, some, None), (prompts, first_token, None)]
    cases += [(corrupted_prompts, written, None), (prompts, written, visible)]
    same_scores(policy, cases, atol=1e-4, cut=True)


def test_scoring_gives_what_sampling_gave(policy, scored):
    prompts, _, rollout, _ = scored
    with torch.no_grad():
        logp = policy.log_probs(prompts, rollout, 0.7)
        reused = policy.log_probs(prompts, rollout, 0.7, prompt_cache=rollout.prompt_cache)
    torch.testing.assert_close(logp, rollout.logp, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reused, rollout.logp, atol=1e-4, rtol=1e-4)
    assert (rollout.logp[~rollout.mask] == 0).all()


def test_the_entropy_is_that_of_the_policy_at_each_token(policy, scored):
    prompts, _, rollout, _ = scored
    states = []
    score = policy._score

    def recorded(hidden, ids, temperature):
        states.append(hidden)
        return score(hidden, ids, temperature)

    policy._score = recorded
    try:
        with torch.no_grad():
            policy.log_probs(prompts, rollout, 0.7)
            logprobs = policy._log_softmax(states[0], 0.7)
    finally:
        del policy._score
    allowed = logprobs.isfinite()
    entropy = -(logprobs.exp() * logprobs.masked_fill(~allowed, 0)).sum(dim=1)
    torch.testing.assert_close(rollout.entropy[rollout.mask], entropy, atol=1e-4, rtol=1e-4)


def test_hidden_perception_equals_removed_perception(policy, scored):
    prompts, _, _, written = scored
    roles, visible = roles_and_visible(policy, written)
    with torch.no_grad():
        blank = policy.log_probs(prompts, written, 1.0, visible)
        masked = stock_log_probs(policy, prompts, written, 1.0, visible)
        removed = stock_log_probs(policy, prompts, written, 1.0, visible, cut=True)
    for other in (masked, removed):
        relative = (blank - other)[roles == R] / other[roles == R]
        assert relative.abs().max() < 5e-6  # a few roundings of float32


def test_contrasts_are_not_zero(policy, scored):
    prompts, corrupted_prompts, _, written = scored
    roles, visible = roles_and_visible(policy, written)
    with torch.no_grad():
        logp = policy.log_probs(prompts, written, 1.0)
        logp_corrupted = policy.log_probs(corrupted_prompts, written, 1.0)
        logp_blank = policy.log_probs(prompts, written, 1.0, visible)
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    assert (delta[roles != O].abs() > 1e-4).all()


def test_positions_are_those_drawn_in_the_docstring(policy):
    drawing = re.findall(r"^    (time|height|width) +(.*)$", model.__doc__, re.MULTILINE)
    image = policy.image_token
    other = policy.tokenizer.convert_tokens_to_ids("red")
    ids = torch.tensor([[other] + [image] * 6 + [other] * 2])
    grid = torch.tensor([[1, 4, 6]])  # patches: 2 rows of 3 visual tokens
    mask = torch.ones_like(ids)
    positions, _ = policy.model.model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == image).int(),
        image_grid_thw=grid,
        attention_mask=mask,
    )
    prompts = model.Prompts(ids, mask, positions, [], [])
    response = torch.ones(1, 2, dtype=torch.long)
    after = policy._response_positions(prompts, torch.tensor([0]), response)
    assert len(drawing) == 3
    for axis, (name, numbers) in enumerate(drawing):
        before_bar, after_bar = numbers.split("|")
        assert positions[axis, 0].tolist() == [int(x) for x in before_bar.split()], name
        assert after[axis, 0].tolist() == [int(x) for x in after_bar.split()], name


def test_draws_have_the_given_probabilities():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = model.draw(p.expand(20000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    frequency = drawn.flatten().bincount(minlength=6) / 20000
    torch.testing.assert_close(frequency, p, atol=0.015, rtol=0)
    assert (frequency[p == 0] == 0).all()


def test_placeholders_are_never_sampled(policy):
    config = policy.model.config
    assert policy.forbidden.tolist() == [config.image_token_id, config.video_token_id]
    probabilities = policy._log_softmax(torch.randn(5, 128), 1.0).exp()
    assert (probabilities[:, policy.forbidden] == 0).all()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(5))


def test_a_placeholder_in_a_question_is_refused(policy):
    (example,) = data.DrawnTask("count").train_batch(0, 1)
    example = replace(example, question="see <|image_pad|>", source="rows.jsonl:7")
    with pytest.raises(data.InputError, match="rows.jsonl:7.*image_pad"):
        policy.encode([example])


def test_logits_exist_only_for_a_chunk_of_tokens(policy, scored, monkeypatch):
    prompts, _, rollout, _ = scored
    sizes = []
    gradients = []

    def record_size(module, inputs, output):
        sizes.append(len(output))

    hook = policy.model.lm_head.register_forward_hook(record_size)
    for chunk in (policy.logit_chunk, 7):
        sizes.clear()
        monkeypatch.setattr(policy, "logit_chunk", chunk)
        policy.model.zero_grad()
        policy.log_probs(prompts, rollout, 1.0).sum().backward()
        weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
        gradients.append(weight.grad.clone())
    hook.remove()
    assert max(sizes) == 7
    assert sum(sizes) == 2 * rollout.mask.sum()  # again in the backward pass
    assert torch.allclose(*gradients, atol=1e-4)


def same_weights(one, other):
    mine = one.model.state_dict()
    theirs = other.model.state_dict()
    if mine.keys() != theirs.keys():
        return False
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_saved_folder_restores_every_weight_and_word(policy, tmp_path):
    policy.save(tmp_path)
    again = model.load(str(tmp_path))
    example = data.DrawnTask("add").train_batch(0, 1)
    prompts = policy.encode(example)
    same = again.encode(example)
    assert torch.equal(prompts.ids, same.ids)
    assert torch.equal(prompts.pixels[0], same.pixels[0])
    assert same_weights(again, policy)
    assert again.eos == policy.eos
    assert again.instruction == ""
    assert model.is_tiny(str(tmp_path))


def test_a_folder_that_lacks_weights_is_refused(policy, tmp_path):
    from safetensors.torch import load_file, save_file

    policy.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = {name.replace("layers.1", "layer.1"): x for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(data.InputError, match="missing"):
        model.load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_float32_masters_which_small_updates_move(tmp_path, dtype):
    """At lr 1e-6 an update is below half an ulp of a bf16 weight: it would be rounded away."""
    saved = model.build_tiny(0)
    saved.model.to(torch.bfloat16)
    saved.save(tmp_path)
    policy = model.load(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    policy.model.to(dtype)
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 2))
    written = policy.as_rollout(["<answer> 1</answer>"] * 2)
    logp = policy.log_probs(prompts, written, 1.0)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    torch.optim.AdamW(policy.model.parameters(), lr=1e-6, weight_decay=0.0).step()
    changed = (weight != before).float().mean()
    if dtype == torch.float32:
        assert changed > 0.9
    else:
        assert changed < 0.05


def test_the_loss_to_copy_runs_on_a_stock_model(policy, scored, monkeypatch):
    """The README's block, with what a processor returns, gives what `Policy.log_probs` gives."""
    monkeypatch.setattr(policy, "forbidden", policy.forbidden[:0])  # stock: the whole vocabulary
    prompts, corrupted_prompts, _, written = scored
    which = torch.tensor([0, 0, 3, 3])  # two responses to a prompt
    written = replace(written, prompt=which)
    roles, visible = roles_and_visible(policy, written)
    mask = written.mask.long()
    assert (prompts.mask[which] == 0).any()  # padding on both sides
    assert (mask == 0).any()
    ids = torch.cat([prompts.ids[which], written.ids], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.cat([prompts.mask[which], mask], dim=1),
        "mm_token_type_ids": (ids == policy.image_token).long(),
        "pixel_values": torch.cat([prompts.pixels[i] for i in which]),
        "image_grid_thw": torch.cat([prompts.grids[i] for i in which]),
    }
    names = {**vars(srpo), "torch": torch, "model": policy.model, "inputs": inputs}
    names.update(roles=roles, mask=mask, T=mask.shape[1], rewards=[1.0, 0.0, 0.0, 1.0])
    names.update(group_size=2)
    names["corrupted_pixels"] = torch.cat([corrupted_prompts.pixels[i] for i in which])
    policy.model.zero_grad()
    exec(code(section("Copy the loss")), names)
    for row, ids, is_response in zip(roles, written.ids, written.mask, strict=True):
        sampled = ids[is_response][:-1].tolist()  # without EOS
        assert torch.equal(names["roles_of"](policy.tokenizer, sampled, mask.shape[1]), row)

    weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        expected = [
            ("old_logp", written.mask, policy.log_probs(prompts, written, 1.0)),
            ("logp_corrupted", roles == P, policy.log_probs(corrupted_prompts, written, 1.0)),
            ("logp_blank", roles == R, policy.log_probs(prompts, written, 1.0, visible)),
        ]
    for name, where, ours in expected:
        torch.testing.assert_close(names[name][where], ours[where], atol=1e-4, rtol=1e-4)
    assert (names["delta"][roles == P] != 0).all()
    assert names["A_hat"].shape == mask.shape


# ---- images, tasks, your data


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(1, 1), (48, 48), (31, 17)])
def test_corruptions_keep_size_and_mode_and_follow_the_seed(kind, mode, size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    before = image.tobytes()
    first = corrupt(image, kind, patch=8, seed=5)
    again = corrupt(image, kind, patch=8, seed=5)
    other = corrupt(image, kind, patch=8, seed=6)
    assert first.size == size
    assert first.mode == mode
    assert image.tobytes() == before
    assert first.tobytes() == again.tobytes()
    if size == (1, 1):
        return
    if mode != "L":  # grey changes nothing that is grey
        assert first.convert("RGB").tobytes() != image.convert("RGB").tobytes()
    if kind in ("patch", "noise", "shuffle"):
        assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_leave_transparency_as_it_is(kind):
    image = Image.new("RGBA", (48, 48), (200, 10, 10, 77))
    assert corrupt(image, kind, patch=8).getchannel("A").getextrema() == (77, 77)


def test_patch_mask_hits_exactly_its_share_of_whole_patches():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    masked = np.asarray(corrupt(Image.fromarray(pixels), "patch", patch=8, p=0.6))
    changed = (masked != pixels).any(axis=-1)
    share = changed.reshape(6, 8, 6, 8).mean(axis=(1, 3)).ravel()
    assert ((share == 0) | (share > 0.95)).all()
    assert (share > 0).sum() == round(0.6 * 36)


@pytest.mark.parametrize("options", [{"kind": "melt"}, {"p": 2.0}, {"patch": 0}])
def test_a_corruption_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="corruption|need patch"):
        corrupt(Image.new("RGB", (8, 8)), **options)


@pytest.mark.parametrize("task", data.TASKS)
def test_drawn_tasks_are_split_by_scene_and_follow_the_seed(task):
    drawn = data.DrawnTask(task, seed=3)
    scenes = [example.scene for example in drawn.train_batch(0, 400)]
    assert not any(data.is_held_out(scene) for scene in scenes)
    assert all(data.is_held_out(example.scene) for example in drawn.eval_set(200))
    assert [example.scene for example in drawn.train_batch(0, 400)] == scenes
    assert [example.scene for example in drawn.train_batch(1, 400)] != scenes


@pytest.mark.parametrize("task", data.TASKS)
def test_drawn_tasks_are_not_won_by_guessing_and_can_be_right_for_the_wrong_reason(task):
    examples = data.DrawnTask(task, seed=3).train_batch(0, 400)
    answers = [example.answer for example in examples]
    assert max(answers.count(answer) for answer in set(answers)) < 0.4 * len(answers)
    rng = np.random.default_rng(0)
    wrong_reason = 0
    for example in examples:
        perfect = data.verify(data.demonstrate(example, 0.0, rng), example)
        assert perfect == data.Verdict(1, 1, 1, 1, 1, 1)
        misstated = data.verify(data.demonstrate(example, 0.5, rng), example)
        assert misstated.consistent == 1
        assert misstated.format == 1
        assert misstated.grounded <= misstated.accuracy
        wrong_reason += misstated.accuracy > misstated.grounded
    assert wrong_reason > 0


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


@pytest.mark.parametrize(
    ("response", "accuracy", "tags"),
    [
        (data.respond("x", "y", "1"), 1, 6),
        (data.respond("x", "y", "2"), 0, 6),
        (data.respond(" ", "y", "1"), 1, 5),  # a blank block: not the whole form
        (data.respond("x", "y", " "), 0, 5),
        (data.respond("x", "y", "1") + "<answer>2</answer>", 0, 4),
        ("hm <answer>1</answer>", 1, 2),
        ("What is it?", 0, 0),
    ],
)
def test_the_reward_is_accuracy_and_the_share_of_tags_in_place(response, accuracy, tags):
    v = data.verify(response, EXAMPLE)
    assert v.accuracy == accuracy
    assert v.format == (tags == 6)
    assert v.reward == pytest.approx(0.9 * accuracy + tags / 60)


SAME = [("3", "3.0"), ("1,000", "1000"), ("1/2", "0.5"), ("\u22127", "-7"), ("7.", "7")]
SAME += [("(B)", "b"), ("B.", "B"), ("Same", "same"), ("Same!", "same"), (".5", "0.5")]
SAME += [("  two  words ", "Two words"), ("nan", "NaN"), ("<", "<"), ("**3**", "3"), ("(3)", "3")]
SAME += [
    ("**.5**", "0.5"),
    ("1e-05", "0.00001"),
    ("'red'", "red"),
    ("e\u0301", "\u00e9"),
    ("+3", "3"),
]
DIFFERENT = [("-7", "7"), ("12", "1"), ("A dog", "a"), ("", ""), (".", "."), ("1/0", "1")]
DIFFERENT += [
    ("1e999999999", "1"),
    ("**.5**", "5"),
    ("3 apples", "3"),
    ("-5 cm", "5 cm"),
    (".5 m", "5 m"),
    ("<5", ">5"),
]
DIFFERENT += [
    ("C++", "C"),
    ("(-2, 3)", "(2, 3)"),
    ("(1) + (2)", "1) + (2"),
    ("5!", "5"),
    ("f'", "f"),
]
DIFFERENT += [("(0, 1)", "[0, 1]"), ("[1,200]", "1200"), ("0" * 5000, "0"), ("1,00", "100")]


@pytest.mark.parametrize(("given", "truth"), SAME)
def test_answers_that_are_the_same(given, truth):
    assert data.answers_match(given, truth)


@pytest.mark.parametrize(("given", "truth"), DIFFERENT)
def test_answers_that_differ(given, truth):
    assert not data.answers_match(given, truth)


@pytest.mark.parametrize("unit", [". ", "\n", "0", "(", "'", "*", "1,000", "!", "é", "a!"])
@pytest.mark.parametrize("end", ["", "x"])
def test_any_answer_is_compared_in_a_moment(unit, end):
    start = time.perf_counter()
    data.answers_match(unit * 20_000 + end, "1")
    data.verify(data.respond("x", "y", unit * 20_000), EXAMPLE)
    assert time.perf_counter() - start < 1


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


def sources(examples):
    return {example.source for example in examples}


def test_your_rows_are_split_by_image_and_seen_once_an_epoch(jsonl):
    row = {"images": ["2.png", "3.png"], "question": "Same?", "answer": "no"}
    task = data.OwnTask(jsonl(json.dumps(row)), seed=1)
    held_out = sources(task.eval_set(9))
    n = 20 - len(held_out)
    assert held_out
    epoch = task.train_batch(0, n)
    assert len(sources(epoch)) == n
    assert not sources(epoch) & held_out
    stream = []
    for step in range(6):
        stream += [example.source for example in task.train_batch(step, 3)]
    assert [example.source for example in task.train_batch(4, 3)] == stream[12:15]
    assert max(len(example.images) for example in [*epoch, *task.eval_set(9)]) == 2


def test_with_eval_all_every_row_is_for_evaluation(jsonl):
    task = data.OwnTask(jsonl(), eval_all=True)
    assert len(list(task.eval_set(99))) == 20


def test_no_image_is_in_both_parts_under_whatever_name(jsonl, tmp_path):
    jsonl()
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    lines = []
    for name in ("0.png", "./0.png", "copy.png", *(f"{i}.png" for i in range(1, 10))):
        row = {"image": name, "question": "q\u2028?", "answer": True}
        lines.append(json.dumps(row, ensure_ascii=False))
    lines[0] = "\ufeff" + lines[0]
    task = data.OwnTask(jsonl(lines=lines))
    held_out = {example.images[0].tobytes() for example in task.eval_set(99)}
    trained = {example.images[0].tobytes() for example in task.train_batch(0, 30)}
    assert len(held_out) == 1
    assert not held_out & trained


def test_images_of_16_bits_are_scaled_and_transparent_ones_lie_on_white(tmp_path):
    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert len(set(open_image(tmp_path / "deep.png").getchannel(0).tobytes())) > 50
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "fractions.tiff")
    assert open_image(tmp_path / "fractions.tiff").getpixel((0, 0)) == (127, 127, 127)
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


# ---- the loop

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


def complaint(capsys, *argv):
    """The one line that `train.py` answers to bad input."""
    capsys.readouterr()
    try:
        code = train.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    stderr = re.sub(r"^step \d+: accuracy .*\n", "", capsys.readouterr().err, flags=re.MULTILINE)
    assert code == 2, stderr
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr


def numbers(out):
    """All records of a run, seconds aside."""
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
    weights = zip(
        warm.model.model.visual.parameters(), cold.model.model.visual.parameters(), strict=True
    )
    assert all(not torch.equal(x, y) for x, y in weights)


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    options = [*QUICK, *SMALL, "--inner-epochs", "2", "--micro-batch", "5", "--kl-coef", "0.01"]
    evaluations, steps = run(tmp_path / "whole", *options)
    assert len(evaluations) == 2
    assert len(steps) == 6
    assert steps[2]["kl"] > 0
    expected = numbers(tmp_path / "whole")

    killed = train.Run(tmp_path / "killed")
    for argv, lines in (([*options, "--out"], 2), (["--resume"], 5)):
        # Killed before the first checkpoint, then after one.
        command = [sys.executable, str(HERE / "train.py"), *argv, str(killed.path)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(killed.log()) < lines:
            time.sleep(0.01)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with open(killed.metrics, "a") as file:
        file.write('{"step": 9, "rew')  # cut off in the middle of a line
    torn = killed.path / "checkpoint-000006.tmp"
    torn.mkdir()  # left by a kill inside a save
    for _ in range(2):  # the second time nothing is left to do
        assert train.main(["--resume", str(killed.path)]) == 0
        assert numbers(killed.path) == expected
        assert not torn.exists()
    policies = [
        model.load(str(train.Run(tmp_path / name).checkpoint())) for name in ("whole", "killed")
    ]
    assert same_weights(*policies)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_step_equals_the_method_written_out(kl_coef, tmp_path):
    """All responses at once, and none left out: the shortcuts of the loop change nothing."""
    options = [*ONE, "--temperature", 0.7, "--kl-coef", kl_coef, "--inner-epochs", 2]
    options += ["--micro-batch", 3, "--lr", 1e-3, "--clip-low", 0.01, "--clip-high", 0.02]
    _, (record,) = run(tmp_path / "out", *options)

    args = train.resolve_options([str(word) for word in options])
    task = train.drawn_task(args)
    policy = train.load_policy(args, train.warmed_up(args, train.Run(tmp_path)))
    parameters = train.trainable(policy, args)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    examples = task.train_batch(0, 4)
    prompts = policy.encode(examples)
    corrupted_prompts = policy.encode(train.corrupted_copies(examples, policy, args, step=1))
    rng = train.generator(args, step=1)
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
    A_hat = role_aware_advantages(A, token_weights(delta, roles))

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


def test_a_saved_policy_shows_images_as_training_did(tmp_path):
    its = model.build_tiny(0)
    its.save(tmp_path)
    small = model.load(str(tmp_path), max_pixels=1024)
    small.save(tmp_path / "again")
    image = Image.new("RGB", (96, 96))
    assert its.fit(image).size == (96, 96)
    assert small.fit(image).size == (32, 32)
    assert model.load(str(tmp_path / "again")).fit(image).size == (32, 32)


def test_bfloat16_computes_under_autocast(tmp_path, default_step):
    _, (half,) = run(tmp_path / "half", *ONE, "--dtype", "bfloat16")
    assert half["ratio_off"] < 0.05
    assert half["loss"] != default_step["loss"]  # it rounds


METHOD_OPTIONS = [
    *[["--corruption", kind] for kind in CORRUPTIONS if kind != "patch"],
    *[["--corruption-p", "0.3"], ["--tau", "0.3"], ["--w-min", "0.5"], ["--w-max", "2"]],
    *[["--lam", "0.5"], ["--clip-high", "0.3", "--inner-epochs", "2"]],
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
    torch.save((tensors, options), f"FOLDER/seen-{options['progress']}.pt")
    return train.srpo_weights(*tensors, **options)
def doubled(logp, *others, **options):
    return 2 * torch.ones_like(logp)
"""


def test_weights_of_your_own_take_the_place_of_srpos(tmp_path, default_step):
    file = tmp_path / "hook.py"
    file.write_text(HOOK.replace("FOLDER", str(tmp_path)))
    _, (same,) = run(tmp_path / "same", *ONE, "--weights", f"{file}:same")
    assert same["loss"] == default_step["loss"]
    assert same["grad_norm"] == default_step["grad_norm"]
    _, (grpo,) = run(tmp_path / "grpo", *ONE, "--algo", "grpo")
    _, (doubled,) = run(tmp_path / "doubled", *ONE, "--weights", f"{file}:doubled")
    assert doubled["w_perception"] == 2
    assert doubled["grad_norm"] == pytest.approx(2 * grpo["grad_norm"], rel=1e-4)

    (logp, logp_corrupted, logp_blank, roles, A), options = torch.load(tmp_path / "seen-0.0.pt")
    assert logp.shape == logp_corrupted.shape == logp_blank.shape == roles.shape
    assert A.shape == (len(logp),)
    assert (A != 0).all()
    assert (logp_corrupted != 0).sum() == (logp != 0).sum()  # of every token, whatever its role
    assert (logp_blank[roles == P] == 0).all()  # hidden
    assert options["entropy"].shape == logp.shape
    assert (options["tau"], options["w_min"], options["w_max"]) == (1.0, 0.8, 1.2)


def test_weights_of_your_own_are_told_the_options_and_the_progress(tmp_path):
    file = tmp_path / "hook.py"
    file.write_text(HOOK.replace("FOLDER", str(tmp_path)))
    options = ["--steps", 3, "--tau", 0.5, "--w-min", 0.7, "--w-max", 1.4]
    run(tmp_path / "out", *ONE, *options, "--weights", f"{file}:same")
    for progress in (0.0, 0.5, 1.0):
        _, given = torch.load(tmp_path / f"seen-{progress}.pt")
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
        scores_blank = prompt_cache is not None
        if not torch.is_grad_enabled() and scores_blank == (context == "blank"):
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


@pytest.mark.parametrize("value", ["float(len(text) % 3)", "data.Verdict(len(text) % 3, 0.5, 0.0)"])
def test_a_reward_of_your_own(value, tmp_path):
    file = tmp_path / "my.py"
    file.write_text(f"import data\ndef reward(text, example):\n    return {value}\n")
    _, (step,) = run(tmp_path / "out", *ONE, "--reward", f"{file}:reward")
    assert 0.1 < step["reward"] < 1.9
    assert (step["format"] == 0) == ("Verdict" in value)


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
