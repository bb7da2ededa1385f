"""Tests, from the method to the command line. `python -m pytest test_srpo.py`, minutes on two cores.

The method comes first, as plain Python loops over one response: the shortest statement of it there is.
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
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # a model that is not there is not looked for on the hub, minutes long
)

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import srpo
import train
from corrupt import CORRUPTIONS, Example, Fact, Query, corrupt, is_held_out, open_image
from srpo import CHOICES, Response, Role, Tags, contrast_scores, group_advantages, kl_to_reference
from srpo import (
    parse_response,
    policy_loss,
    role_aware_advantages,
    shared_baseline,
    text_and_offsets,
)
from srpo import token_roles, token_weights, without_perception

HERE = Path(__file__).parent
README, MORE = (
    (HERE / name).read_text(encoding="utf-8") for name in ("README.md", "extras/README.md")
)
O, P, R = Role
NAN, INF = float("nan"), float("inf")

# --------------------------------------------------------------------------------------- the method, as loops


def loop_advantage(r, eps=1e-4):
    """Step 1, for the rewards r of one group."""
    mean = sum(r) / len(r)
    std = math.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - 1))
    return [(x - mean) / (std + eps) for x in r]


def loop_delta(logp, corrupted, blank, roles, contrast="log-ratio", delta_max=5.0):
    """Steps 2 to 4, for one response."""
    delta = [0.0] * len(roles)
    for t, role in enumerate(roles):
        if role == P:
            delta[t] = logp[t] - corrupted[t]  # step 2
        elif role == R:
            delta[t] = logp[t] - blank[t]  # step 3
        r = math.exp(-delta[t])
        delta[t] = {"log-ratio": delta[t], "absolute": abs(delta[t]), "k3": r - 1 - math.log(r)}[
            contrast
        ]
        delta[t] = min(max(delta[t], -delta_max), delta_max)  # step 4
    return delta


def loop_weights(delta, roles, tau=1.0, w_min=0.8, w_max=1.2):
    """Steps 5, 6 and 9, for one response."""
    S = [t for t, role in enumerate(roles) if role != O]
    if P not in roles or R not in roles or not all(math.isfinite(delta[t]) for t in S):
        return [1.0] * len(roles)  # step 9
    b = sum(delta[t] for t in S) / len(S)  # step 5
    low, high = math.log(w_min), math.log(w_max)
    w_tilde = {t: math.exp(min(max((delta[t] - b) / tau, low), high)) for t in S}  # step 6
    mean = sum(w_tilde.values()) / len(S)
    return [w_tilde[t] / mean if t in S else 1.0 for t in range(len(roles))]  # step 6


def loop_A_hat(A, w, lam=1.0):
    """Step 7, for one response."""
    return [A * ((1 - lam) + lam * x) for x in w]


def loop_objective(logp, old, A_hat, low=0.2, high=0.2):
    """Step 8, one response's part of the sum."""
    J = 0.0
    for t in range(len(logp)):
        rho = math.exp(logp[t] - old[t])
        J += min(rho * A_hat[t], min(max(rho, 1 - low), 1 + high) * A_hat[t])
    return J


@pytest.fixture
def batch():
    """Random float64 inputs: 3 groups of 4 responses over 11 positions, some without a role, some padded."""
    g = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(5, 12, 11, generator=g, dtype=torch.float64)
    roles = torch.randint(0, 3, (12, 11), generator=g)
    roles[1], roles[2] = O, P * (roles[2] > 0)
    mask = torch.arange(11) < torch.randint(5, 12, (12, 1), generator=g)
    rewards = torch.randint(0, 3, (12,), generator=g).double()
    found = {
        "rewards": rewards,
        "roles": roles * mask,
        "mask": mask,
        "logp": logps[0],
        "old": logps[1],
    }
    return found | {"corrupted": 4 * logps[2], "blank": 4 * logps[3], "ref": logps[4]}


def delta_of(b, **options):
    return contrast_scores(b["logp"], b["corrupted"], b["blank"], b["roles"], **options)


def weights_of(b, **options):
    return token_weights(delta_of(b), b["roles"], **options)


@pytest.mark.parametrize("contrast", ["log-ratio", "absolute", "k3"])
def test_tensors_equal_the_loops(batch, contrast):
    b, lists = batch, {k: v.tolist() for k, v in batch.items()}
    A, delta = group_advantages(b["rewards"], 4), delta_of(b, contrast=contrast)
    w = token_weights(delta, b["roles"], tau=0.7)
    A_hat = role_aware_advantages(A, w, lam=0.8)
    J, kl, n = 0.0, 0.0, sum(map(sum, lists["mask"]))
    near = partial(pytest.approx, abs=1e-12)
    for i in range(12):
        inputs = [lists[k][i] for k in ("logp", "corrupted", "blank", "roles")]
        roles, length = inputs[-1], sum(lists["mask"][i])
        assert A[i].item() == near(
            loop_advantage(lists["rewards"][i // 4 * 4 : i // 4 * 4 + 4])[i % 4]
        )
        assert delta[i].tolist() == near(loop_delta(*inputs, contrast))
        S = [delta[i, t].item() for t in range(11) if roles[t] != O]
        assert shared_baseline(delta, b["roles"])[i].item() == near(sum(S) / max(1, len(S)))
        assert w[i].tolist() == near(loop_weights(delta[i].tolist(), roles, tau=0.7))
        assert A_hat[i].tolist() == near(loop_A_hat(A[i].item(), w[i].tolist(), 0.8))
        logp, old, ref = (lists[k][i][:length] for k in ("logp", "old", "ref"))
        J += loop_objective(logp, old, A_hat[i].tolist(), low=0.1, high=0.3)
        kl += sum(math.exp(y - x) - 1 - (y - x) for x, y in zip(logp, ref, strict=True))
    loss, stats = policy_loss(b["logp"], b["old"], A_hat, b["mask"], clip_low=0.1, clip_high=0.3)
    assert loss.item() == near(-J / n) and 0 < stats["clip_frac"] < 1
    assert kl_to_reference(b["logp"], b["ref"], b["mask"]).item() == near(kl / n)


def test_the_advantage_uses_the_sample_std_and_leaves_no_residue():
    assert group_advantages([1, 0, 0, 0], 4)[0].item() == pytest.approx(1.5, abs=1e-3)
    assert (
        group_advantages(torch.full((6,), 0.1), 3).tolist() == [0.0] * 6
    )  # no spread: no advantage, no NaN
    for wrong in (([1.0, 0.0], 1), ([1.0, 0.0, 0.0], 2), ([], 2), ([[1.0, 0.0]], 2)):
        with pytest.raises(ValueError, match="group|rewards"):
            group_advantages(*wrong)


def test_contrasts_compare_each_role_with_its_own_counterfactual_and_are_clamped():
    roles, zero = torch.tensor([[P, P, R, R, O, P]]), torch.zeros(1, 6)
    corrupted = torch.tensor([[-4.9, -5.1, 9.0, 9.0, 9.0, 7.0]])
    blank = torch.tensor([[9.0, 9.0, -0.5, 80.0, 9.0, 9.0]])  # e^80 would overflow
    for options, expected in (
        ({}, [4.9, 5.0, 0.5, -5.0, 0.0, -5.0]),
        ({"max_abs": 0.7}, [0.7, 0.7, 0.5, -0.7, 0.0, -0.7]),
        ({"contrast": "absolute"}, [4.9, 5.0, 0.5, 5.0, 0.0, 5.0]),
        ({"contrast": "k3"}, [3.90744658, 4.10609675, math.exp(-0.5) - 0.5, 5.0, 0.0, 5.0]),
    ):
        found = contrast_scores(zero, corrupted, blank, roles, **options)
        torch.testing.assert_close(found, torch.tensor([expected]))
    with pytest.raises(ValueError, match="log-ratio, absolute or k3"):
        contrast_scores(zero, corrupted, blank, roles, contrast="k4")


def test_weights_are_positive_and_keep_the_sign(batch):
    A, w = group_advantages(batch["rewards"], 4), weights_of(batch)
    assert (w > 0).all() and torch.equal(
        role_aware_advantages(A, w).sign(), A.sign()[:, None].expand_as(w)
    )
    assert role_aware_advantages(torch.zeros(12), w).abs().max() == 0


def test_weights_have_mean_one_so_a_response_keeps_its_total_advantage(batch):
    w, scored = weights_of(batch), batch["roles"] != O
    mean = (w * scored).sum(1) / scored.sum(1).clamp(min=1)
    torch.testing.assert_close(mean[scored.any(1)], torch.ones_like(mean[scored.any(1)]))
    assert not torch.allclose(w[scored], torch.ones(1, dtype=torch.float64))
    raw = weights_of(batch, normalize=False)
    assert raw.min() >= 0.5 and raw.max() <= 2 and not torch.allclose(raw, w)


def test_constant_contrasts_and_lambda_0_are_grpo(batch):
    b, one = batch, torch.ones(1, dtype=torch.float64)
    assert torch.allclose(token_weights(torch.full_like(b["logp"], 0.3), b["roles"]), one)
    assert (weights_of(b | {"corrupted": b["logp"], "blank": b["logp"]}) == 1).all()
    A = group_advantages(b["rewards"].float(), 4)
    A_hat = role_aware_advantages(A, weights_of(b).float(), lam=0.0)
    assert torch.equal(A_hat, A[:, None].expand_as(A_hat))
    losses = [policy_loss(b["logp"].float(), b["old"].float(), a, b["mask"])[0] for a in (A_hat, A)]
    assert torch.equal(*losses)


def test_weights_under_shift_scale_and_heat_and_in_order(batch):
    scores = 0.1 * torch.randn(
        12, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    roles = batch["roles"]
    w = token_weights(scores, roles)
    assert torch.allclose(token_weights(scores + 3, roles), w)
    assert torch.allclose(token_weights(7 * scores, roles, tau=7.0), w)
    assert torch.allclose(token_weights(scores, roles, tau=1e9), torch.ones_like(w))
    t = (roles[0] != O).nonzero()[:, 0]
    assert torch.equal(scores[0, t].argsort(), w[0, t].argsort()) and len(t) > 3
    wild = token_weights(1000 * scores, roles, w_min=0.5, w_max=2.0)
    assert 0.25 <= wild.min() < 0.5 and 1.5 < wild.max() <= 4


def test_no_gradient_through_weights_and_no_input_changed(batch):
    b = {
        k: v.clone().requires_grad_() if v.is_floating_point() else v.clone()
        for k, v in batch.items()
    }
    w = weights_of(b)
    A_hat = role_aware_advantages(group_advantages(b["rewards"], 4), w)
    loss, stats = policy_loss(b["logp"], b["old"], A_hat, b["mask"])
    (loss + kl_to_reference(b["logp"], b["ref"], b["mask"])).backward()
    assert b["logp"].grad.abs().sum() > 0 and b["old"].grad is None and b["ref"].grad is None
    assert not (w.requires_grad or A_hat.requires_grad or stats["ratio"].requires_grad)
    without_perception(b["mask"], b["roles"]), token_weights(b["old"], b["roles"])
    assert all(torch.equal(b[k].detach(), batch[k]) for k in batch)


def test_the_same_positions_are_clipped_as_under_grpo(batch):
    b, A, gradients = batch, group_advantages(batch["rewards"], 4), []
    w = weights_of(b)
    for advantages in (A, role_aware_advantages(A, w)):
        logp = b["logp"].clone().requires_grad_()
        policy_loss(logp, b["old"], advantages, b["mask"])[0].backward()
        gradients.append(logp.grad)
    assert torch.allclose(gradients[1], gradients[0] * w)
    assert torch.equal(gradients[0] == 0, gradients[1] == 0)


def test_padding_micro_batches_and_other_rows_do_not_matter(batch):
    b, A, w = batch, group_advantages(batch["rewards"], 4), weights_of(batch)
    A_hat, n = role_aware_advantages(A, w), b["mask"].sum()
    loss = policy_loss(b["logp"], b["old"], A_hat, b["mask"])[0]
    parts = torch.arange(12).split(5)
    split = [
        policy_loss(b["logp"][i], b["old"][i], A_hat[i], b["mask"][i], denominator=n)[0]
        for i in parts
    ]
    assert torch.allclose(sum(split), loss)
    assert torch.equal(weights_of({k: v[3:4] for k, v in b.items()}), w[3:4])
    for pad in ((3, 0), (0, 3)):  # left, right; padding holds garbage
        names = ("logp", "old", "corrupted", "blank")
        garbage = {k: torch.nn.functional.pad(b[k], pad, value=NAN) for k in names}
        padded = garbage | {k: torch.nn.functional.pad(b[k], pad) for k in ("roles", "mask")}
        wide = weights_of(padded)
        assert torch.allclose(wide[:, pad[0] : wide.shape[1] - pad[1]], w)
        logp = garbage["logp"].requires_grad_()
        again = policy_loss(logp, garbage["old"], role_aware_advantages(A, wide), padded["mask"])[0]
        again.backward()
        assert torch.allclose(again, loss) and logp.grad.isfinite().all()


def test_a_response_without_both_roles_has_weight_1(batch):
    w = weights_of(batch)
    assert (w[1] == 1).all() and (w[2] == 1).all() and (w[0] != 1).any()
    empty = torch.zeros(2, 4)
    loss, stats = policy_loss(empty, empty, torch.ones(2), empty)
    assert loss == 0 and stats["clip_frac"] == 0 and kl_to_reference(empty, empty, empty) == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["corrupted", "blank"])
def test_a_contrast_that_is_not_finite_makes_its_response_grpo(batch, bad, side):
    row, t = 0, int((batch["roles"][0] == (P if side == "corrupted" else R)).nonzero()[0])
    broken = batch | {side: batch[side].clone()}
    broken[side][row, t] = bad
    delta, w, A = delta_of(broken), weights_of(broken), group_advantages(batch["rewards"], 4)
    assert delta[row, t].isnan() and delta.isnan().sum() == 1
    assert (w[row] == 1).all() and torch.equal(w[1:], weights_of(batch)[1:])
    assert (role_aware_advantages(A, w)[row] == A[row]).all()


def test_eos_is_trained_padding_is_not_and_overflowing_ratios_stay_finite():
    logp, old = torch.zeros(1, 6, requires_grad=True), torch.zeros(1, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])  # position 3 is EOS
    w = token_weights(torch.tensor([[1.0, 0, 0, 0, 0, 0]]), torch.tensor([[P, R, O, O, O, O]]))
    policy_loss(logp, old, role_aware_advantages(torch.tensor([2.0]), w), mask)[0].backward()
    assert logp.grad[0, 3] == -2 / 4 and (logp.grad[0, 4:] == 0).all()
    for advantage in (0.0, 1.0, -1.0):
        loss, _ = policy_loss(logp, old - 120, torch.tensor([advantage]), mask)
        (loss + kl_to_reference(logp, old + 200, mask)).backward()
        assert loss.isfinite() and logp.grad.isfinite().all()


def test_dtypes_and_bad_arguments(batch):
    b, A, wrong = batch, group_advantages(batch["rewards"], 4), batch["logp"][:, :5]
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()}
    assert weights_of(half).dtype == torch.float32
    kinds = (torch.bool, torch.long, torch.float)
    losses = [policy_loss(half["logp"], half["old"], A, b["mask"].to(t))[0] for t in kinds]
    assert losses[0] == losses[1] == losses[2] and losses[0].dtype != torch.bfloat16
    shapes = r"\[12, 11\].*\[12, 5\]|\[12, 5\].*\[12, 11\]|\[3.*\[12, 11\]"
    for call, args, options, said in (
        (contrast_scores, (b["logp"], wrong, b["blank"], b["roles"]), {}, shapes),
        (shared_baseline, (wrong, b["roles"]), {}, shapes),
        (token_weights, (b["logp"], wrong), {}, shapes),
        (role_aware_advantages, (A[:3], b["logp"]), {}, shapes),
        (policy_loss, (b["logp"], wrong, A, b["mask"]), {}, shapes),
        (policy_loss, (b["logp"], b["old"], wrong, b["mask"]), {}, shapes),
        (kl_to_reference, (b["logp"], wrong, b["mask"]), {}, shapes),
        (token_weights, (b["logp"], b["roles"]), {"tau": 0.0}, "need tau"),
        (token_weights, (b["logp"], b["roles"]), {"w_min": 0.0}, "need tau"),
        (token_weights, (b["logp"], b["roles"]), {"w_min": 2.0, "w_max": 1.0}, "need tau"),
        (role_aware_advantages, (A, b["logp"]), {"lam": 1.5}, "lam"),
    ):
        with pytest.raises(ValueError, match=said):
            call(*args, **options)


def test_role_balanced_baseline_and_flip_by_hand():
    scores = torch.tensor([[0.4, 0.0, 0.2, 0.4, 0.6, 0.0]], dtype=torch.float64)
    roles = torch.tensor([[P, P, R, R, R, O]])
    assert shared_baseline(scores, roles).item() == pytest.approx(1.6 / 5)
    assert shared_baseline(scores, roles, role_balanced=True).item() == pytest.approx(
        (0.2 + 0.4) / 2
    )
    w = token_weights(scores, roles, role_balanced=True, normalize=False, w_min=0.5, w_max=2.0)
    torch.testing.assert_close(w[0, :5], (scores[0, :5] - 0.3).exp())
    flipped = token_weights(
        scores.expand(2, -1), roles.expand(2, -1), flip=torch.tensor([False, True])
    )
    torch.testing.assert_close(
        flipped, torch.cat([token_weights(x, roles) for x in (scores, -scores)])
    )


# --------------------------------------------------------------------------------------------- tags and roles

GOOD = "<perception>a</perception><reasoning>b</reasoning><answer>c</answer>"
TAGS = re.findall(r"<.*?>", GOOD)
BAD = [
    "",
    "plain",
    GOOD.upper(),
    GOOD * 2,
    "Sure! " + GOOD,
    GOOD + " Done.",
    GOOD + "<answer>d</answer>",
]
BAD += [GOOD.replace(tag, "") for tag in TAGS] + [GOOD.replace(tag, tag * 2) for tag in TAGS]
BAD += [GOOD[:end] for end in range(len(GOOD))]  # cut off
SWAPS = [
    ("perception>", "Perception>"),
    ("<answer>", "<answer >"),
    ("<reasoning>", "so <reasoning>"),
]
SWAPS += [
    ("<perception>", "</perception>"),
    (">b<", "><answer>b</answer><"),
    (">a<", ">x</answer><"),
]
SWAPS += [
    (">a<", ">the <reasoning> tag<"),
    ("<perception>a</perception>", "</perception>a<perception>"),
]
BAD += [GOOD.replace(*swap) for swap in SWAPS]
BAD += ["<perception>a<reasoning>b</reasoning></perception><answer>c</answer>"]  # nested
BAD += ["<perception>a<reasoning>b</perception></reasoning><answer>c</answer>"]  # crossed
BAD += ["<reasoning>b</reasoning><perception>a</perception><answer>c</answer>"]  # swapped
BAD += ["<perception>a</perception><answer>c</answer><reasoning>b</reasoning>"]
GOOD_ONES = [(GOOD, "a", "b", "c"), (f"\r\n {GOOD}\t\n", "a", "b", "c")]
GOOD_ONES += [(GOOD.replace("><", ">\r\n<").replace("a<", "x\r\ny\n<"), "x\r\ny\n", "b", "c")]
GOOD_ONES += [
    (GOOD.replace(">a<", "><"), "", "b", "c"),
    (GOOD.replace(">b<", "> \n<"), "a", " \n", "c"),
]
WRITTEN = ["红色的圆 🙂", "<b>x < y</b> <PERCEPTION><"]
GOOD_ONES += [(GOOD.replace(">a<", f">{a}<"), a, "b", "c") for a in WRITTEN]


@pytest.mark.parametrize(
    "text, blocks", [(text, None) for text in BAD] + [(g[0], g[1:]) for g in GOOD_ONES]
)
def test_parser_accepts_exactly_the_structure(text, blocks):
    found = parse_response(text)
    spans = found and (found.perception, found.reasoning, found.answer)
    assert (spans and tuple(text[slice(*span)] for span in spans)) == blocks


def test_parser_searches_the_text_a_fixed_number_of_times():
    """Linear: there are few searches, however many broken tags the text holds."""
    calls = []

    class Counted(str):
        def __getattribute__(self, name):
            calls.append(name)
            return super().__getattribute__(name)

    tag = "<perception>"
    for unit in ("<", tag[:-1], tag, "</perception>", f"{tag}</perception>", "a ", "\n"):
        for text in (unit * 20_000, GOOD.replace(">a<", f">{unit * 20_000}<")):
            calls.clear()
            assert parse_response(Counted(text)) is None or "perception>" not in unit
            assert 0 < len(calls) <= 12


def test_tags_can_be_renamed_and_must_differ():
    found = parse_response("<see>a</see><think></think><say>c</say>", Tags("see", "think", "say"))
    assert found == Response((5, 6), (19, 19), (32, 33))
    for wrong in ("aab", ("", "a", "b")):
        with pytest.raises(ValueError, match="different"):
            Tags(*wrong)


def roles_of(*pieces, **options):
    pieces = [p if isinstance(p, bytes) else p.encode() for p in pieces]
    return token_roles(*text_and_offsets(pieces), **options).tolist()


def test_roles_come_from_the_sampled_pieces_also_when_they_straddle_a_tag():
    # Straddling tokens (">a", "b</") count for the block; tags alone, white space and EOS (no bytes) do not.
    pieces = [
        "<percept",
        "ion",
        ">a",
        " ",
        "b",
        ".</",
        "perception",
        ">\n",
        "<reasoning",
        ">",
        "so ",
        "x",
    ]
    pieces += ["</reasoning>", "<answer>", "x", "</answer>", ""]
    assert roles_of(*pieces) == [O, O, P, O, P, P, O, O, O, O, R, R, O, O, O, O, O]
    assert roles_of(*pieces, answer_is_reasoning=True) == [
        O,
        O,
        P,
        O,
        P,
        P,
        O,
        O,
        O,
        O,
        R,
        R,
        O,
        O,
        R,
        O,
        O,
    ]
    # The same text cut in single characters, which no tokenizer would choose by itself.
    assert roles_of(*GOOD).count(P) == 1 and roles_of(*GOOD).count(R) == 1
    assert roles_of(*"".join(pieces[:-5])) == [O] * len(
        "".join(pieces[:-5])
    )  # cut off: no roles at all
    assert token_roles("", []).shape == (0,)
    smile = "🙂".encode()  # tokens of half a character
    text, offsets = text_and_offsets(
        [b"<perception>", smile[:2], smile[2:] + b"</", b"perception>\xff"]
    )
    assert (
        text == "<perception>🙂</perception>\ufffd"
        and offsets[1] == (12, 13)
        and offsets[2] == (12, 15)
    )
    pieces = [b"<perception>", smile[:1], smile[1:3], smile[3:] + b"</perception><reasoning>", b"b"]
    assert roles_of(*pieces, GOOD[38:].encode()) == [O, P, P, P, R, O]
    assert srpo.token_bytes("Ġb2") == b" b2" and srpo.token_bytes("ÃĹĊ") == "\u00d7\n".encode()
    with pytest.raises(ValueError, match="not a byte-level"):
        srpo.token_bytes("\u2581b2")


def test_without_perception_hides_the_whole_span():
    roles = torch.tensor([[O, P, O, P, O, R], [O, O, R, R, O, O]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert without_perception(mask, roles).tolist() == [[1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]


# ------------------------------------------------------------------------------------------------- the README


def section(title, text=README):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code(text):
    """The first block of Python in a text."""
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_the_six_lines_run_and_the_worked_example_is_computed_from_its_own_inputs(batch):
    text = section("A worked example")
    A = group_advantages([float(x) for x in re.search(r"rewards `(.*?)`", text)[1].split(",")], 2)[
        :1
    ]
    (table,) = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    cells = ([c.strip() for c in line[1:-1].split("|")] for line in table.splitlines())
    rows = {name: values for name, *values in cells}
    roles = torch.tensor([[{"P": P, "R": R, "-": O}[c] for c in rows["role"]]])
    inputs = [
        torch.tensor([[float(c or 0) for c in rows[k]]]) for k in ("image", "corrupted", "blank")
    ]
    delta = contrast_scores(*inputs, roles)
    w = token_weights(delta, roles)
    computed = {
        "Δ": delta,
        "b": shared_baseline(delta, roles).expand(1, 6),
        "w": w,
        "A": A.expand(1, 6),
    }
    computed |= {
        "w̃": token_weights(delta, roles, normalize=False),
        "Â": role_aware_advantages(A, w),
    }
    for name, values in computed.items():
        for shown, value in zip(rows[name], values[0].tolist(), strict=True):
            assert not shown or shown == f"{value:.2f}", (name, shown, value)
    names = vars(srpo) | batch | {"group_size": 4, "old_logp": batch["old"]}
    names |= {"logp_corrupted": batch["corrupted"], "logp_blank": batch["blank"]}
    exec(code(README), names)
    assert names["grpo_loss"] != names["srpo_loss"] and names["A_hat"].shape == (12, 11)


LOGGED = {
    "reward",
    "accuracy",
    "format",
    "perception",
    "grounded",
    "consistent",
    "loss",
    "grad_norm",
    "kl",
}
LOGGED |= {
    "clip_frac",
    "ratio_off",
    "entropy",
    "length",
    "used_groups",
    "w_perception",
    "w_reasoning",
}
LOGGED |= {"sec_generate", "sec_score", "sec_update"}


def test_what_the_readmes_name_exists():
    form = r'^\| `(\w+)` \| "(.*?)" \| (.*?) \| (.*?) \| (.*?) \|$'
    shown = {
        row[0]: row[1:] for row in re.findall(form, section("What the abstract leaves open"), re.M)
    }
    lower = lambda *values: ", ".join(str(x).lower() for x in values)  # noqa: E731
    assert shown == {name: (*v[:2], lower(v[2]), lower(*v[3])) for name, v in CHOICES.items()}
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    for line in re.findall(r"^python train\.py (.*?)(?: *#.*)?$", README + MORE, re.M):
        if "--help" not in line:
            train.build_parser().parse_args(shlex.split(line))
    options = train.build_parser()._option_string_actions
    beyond = "".join(p.read_text(encoding="utf-8") for p in (HERE / "extras").glob("*.py"))
    for option in re.findall(r"`(--[a-z-]+)", README + MORE):
        assert option in options or f'"{option}"' in beyond, option
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (HERE / path).exists(), path
    cells = re.findall(r"^\| (`.*?) \|", section("What is logged", MORE), re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == LOGGED


def test_the_loss_to_copy_runs_on_a_stock_model(policy, scored, monkeypatch):
    """The README's block, with what a processor returns, against `Policy.log_probs`."""
    monkeypatch.setattr(policy, "forbidden", policy.forbidden[:0])  # stock: the whole vocabulary
    prompts, which = scored[0], torch.tensor([0, 0, 3, 3])  # two responses to a prompt
    written = replace(scored[2], prompt=which)
    roles, visible = roles_and_visible(policy, written)
    ids, mask = torch.cat([prompts.ids[which], written.ids], 1), written.mask.long()
    names = vars(srpo) | {"torch": torch, "model": policy.model, "roles": roles, "mask": mask}
    names |= {"T": mask.shape[1], "rewards": [1.0, 0.0, 0.0, 1.0], "group_size": 2}
    inputs = {"input_ids": ids, "attention_mask": torch.cat([prompts.mask[which], mask], 1)}
    inputs |= {"mm_token_type_ids": (ids == policy.image_token).long()}
    rows = lambda parts: torch.cat([parts[i] for i in which])  # noqa: E731
    names["inputs"] = inputs | {
        "pixel_values": rows(prompts.pixels),
        "image_grid_thw": rows(prompts.grids),
    }
    names["corrupted_pixels"] = rows(prompts.corrupted)
    assert (prompts.mask[which] == 0).any() and not written.mask.all()  # padding on both sides
    policy.model.zero_grad()
    exec(code(section("Copy the loss")), names)
    assert policy.model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    ours = partial(policy.log_probs, prompts, written, temperature=1.0)
    found = {"old_logp": (written.mask, {}), "logp_corrupted": (roles == P, {"corrupted": True})}
    found["logp_blank"] = roles == R, {"visible": visible}
    for name, (where, options) in found.items():
        with torch.no_grad():
            torch.testing.assert_close(
                names[name][where], ours(**options)[0][where], atol=1e-4, rtol=1e-4
            )
    assert names["delta"][roles == P].abs().min() > 0 and names["A_hat"].shape == mask.shape


# --------------------------------------------------------------------------------------------------- the loop

SMALL = [
    "--steps",
    "6",
    "--prompts",
    "4",
    "--group-size",
    "4",
    "--save-every",
    "2",
    "--eval-size",
    "16",
]
QUICK = ["--eval-size", "128", "--eval-every", "0"]  # the default task and warm-up
ONE = [*QUICK, *SMALL, "--steps", "1", "--eval-size", "2"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Warmed-up models are made once for all tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def run(out, *argv):
    """Records of a run of train.py: evaluations, steps."""
    assert train.main([*map(str, argv), "--out", str(out)]) == 0
    log = train.Run(out).log()
    return [r for r in log if "eval" in r], [r for r in log if "eval" not in r]


def numbers(out):
    """All records of a run, seconds aside."""
    return [{k: v for k, v in r.items() if not k.startswith("sec_")} for r in train.Run(out).log()]


def test_training_improves_and_its_grpo_twin_too(tmp_path, capsys):
    found = {}
    for algo in ("srpo", "grpo"):
        (first, last), steps = found[algo] = run(
            tmp_path / algo, *QUICK, "--algo", algo, "--steps", 20
        )
        shown = capsys.readouterr().out
        assert "step 0, step 20" in shown and shown.count("(answer: ") == 1 and "accuracy" in shown
        assert last["eval"]["reward"] > first["eval"]["reward"] + 0.04, (algo, first, last)
        assert [r["step"] for r in steps] == list(range(1, 21)) and steps[0].keys() == LOGGED | {
            "step"
        }
        assert all(r["grad_norm"] > 0 and r["used_groups"] > 0 and r["kl"] is None for r in steps)
        assert all(r["ratio_off"] < 1e-4 for r in steps)  # the policy that sampled
        weights = [r["w_perception"] for r in steps]
        assert (min(weights) == max(weights) == 1) == (algo == "grpo")
    (srpo, steps), (grpo, twin) = found.values()
    assert srpo[0] == grpo[0] and steps[0]["reward"] == twin[0]["reward"]  # the same start


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    options = [*QUICK, *SMALL, "--inner-epochs", "2", "--micro-batch", "300", "--kl-coef", "0.01"]
    evals, steps = run(tmp_path / "whole", *options)
    assert len(evals) == 2 and len(steps) == 6 and steps[2]["kl"] > 0
    expected, killed = numbers(tmp_path / "whole"), train.Run(tmp_path / "killed")
    for lines in (2, 5):  # before the first checkpoint, and after it
        argv = (
            [*options, "--out", str(killed.path)] if lines == 2 else ["--resume", str(killed.path)]
        )
        process = subprocess.Popen(
            [sys.executable, str(HERE / "train.py"), *argv], stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(killed.log()) < lines:
            time.sleep(0.01)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with open(killed.metrics, "a") as file:
        file.write('{"step": 9, "rew')  # cut off in the middle of a line
    torn = killed.path / "checkpoint-000006.1.tmp"
    torn.mkdir()  # left by a kill inside a save
    for _ in range(2):  # the second time nothing is left to do
        assert train.main(["--resume", str(killed.path)]) == 0
        assert numbers(killed.path) == expected and not torn.exists()
    runs = (train.Run(tmp_path / "whole"), killed)
    weights = [model.load(str(r.checkpoint())).model.state_dict() for r in runs]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_micro_batches_do_not_change_a_step(tmp_path):
    (whole,), (split,) = (run(tmp_path / str(n), *ONE, "--micro-batch", n)[1] for n in (9999, 100))
    assert whole["grad_norm"] > 0 and whole["w_perception"] != 1
    same = {k: x for k, x in whole.items() if k not in ("ratio_off", "kl") and k[:4] != "sec_"}
    assert {k: split[k] for k in same} == pytest.approx(same, rel=1e-3, abs=1e-6)
    _, (half,) = run(tmp_path / "half", *ONE, "--dtype", "bfloat16")
    assert (
        half["ratio_off"] < 0.05 and half["loss"] != whole["loss"]
    )  # under autocast, which rounds


@pytest.fixture(scope="module")
def default_step(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run") / "out", *ONE)[1][0]


VARIANTS = [f"{name}={str(x).lower()}" for name, v in CHOICES.items() for x in v[3]]


@pytest.mark.parametrize("choice", VARIANTS)
def test_every_open_choice_reaches_the_update(choice, default_step, tmp_path):
    _, (step,) = run(tmp_path / "out", *ONE, "--choice", choice)
    assert (
        step["grad_norm"] != default_step["grad_norm"] and step["reward"] == default_step["reward"]
    )


@pytest.mark.parametrize("side, bad", [("corrupted", NAN), ("visible", -INF)])
def test_in_the_loop_a_score_that_is_not_finite_makes_its_response_grpo(
    side, bad, tmp_path, monkeypatch
):
    seen, real, scored = [], train.token_weights, model.Policy.log_probs

    def recorded(*args, **options):
        seen.append((args[1], real(*args, **options)))
        return seen[-1][1]

    def faulty(self, prompts, rollout, **options):
        logp, entropy = scored(self, prompts, rollout, **options)
        if (
            options.get(side) is not None
            and options[side] is not False
            and not torch.is_grad_enabled()
        ):
            logp[options["wanted"].any(1).nonzero()[0]] += bad
        return logp, entropy

    monkeypatch.setattr(train, "token_weights", recorded)
    run(tmp_path / "good", *ONE)
    monkeypatch.setattr(model.Policy, "log_probs", faulty)
    _, (step,) = run(tmp_path / "bad", *ONE)
    _, (roles, good), _, (_, broken) = seen  # parsing the options calls it too
    changed = (good != broken).any(1).nonzero()[:, 0].tolist()
    assert len(changed) == 1 and (broken[changed] == 1).all() and len(roles[changed].unique()) == 3
    assert (
        math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) and step["grad_norm"] > 0
    )


def test_groups_without_a_spread_are_neither_scored_nor_trained(tmp_path, monkeypatch):
    read, scored = [], model.Policy._read
    monkeypatch.setattr(train, "verify", lambda text, example: data.Verdict(0.5, 0.0, 0.0))
    monkeypatch.setattr(
        model.Policy, "_read", lambda *args: read.append(len(args[2])) or scored(*args)
    )
    _, (step,) = run(tmp_path / "out", *ONE)
    assert read == [2, 4, 2]  # to sample: before, in the step, after
    assert (
        step["used_groups"] == step["grad_norm"] == 0
        and step["entropy"] is step["w_perception"] is None
    )


def test_own_data_trains_and_evaluates(jsonl, tmp_path):
    options = ["--data", jsonl(), "--max-new-tokens", 8]
    evals, (step,) = run(
        tmp_path / "out", *options, *QUICK, *SMALL, "--temperature", 3, "--steps", 1
    )
    assert step["grounded"] is None and evals[0]["eval"]["n"] == 2 and evals[1]["step"] == 1
    checkpoint = train.Run(tmp_path / "out").checkpoint()
    (only,), none = run(
        tmp_path / "eval", *options, "--steps", 0, "--eval-size", 2, "--model", checkpoint
    )
    assert only["eval"]["n"] == 20 and only["step"] == 0 and not none


REWARDS = [("float(len(text) % 3)", None), ("data.Verdict(len(text) % 3, 0.5, 0.0)", None)]
REWARDS += [("float('nan')", "not finite"), ("1 / 0", "ZeroDivisionError")]


@pytest.mark.parametrize("value, said", REWARDS)
def test_your_own_reward(value, said, tmp_path, capsys):
    (tmp_path / "my.py").write_text(f"import data\ndef f(text, example): return {value}")
    argv = [*ONE, "--reward", f"{tmp_path}/my.py:f"]
    if said:
        message = complaint(capsys, *argv, "--out", tmp_path / "out")
        assert said in message and "my.py:f" in message and "How many" in message
    else:
        _, (step,) = run(tmp_path / "out", *argv)
        assert 0.1 < step["reward"] < 1.9 and (step["format"] == 0) == ("Verdict" in value)


# ------------------------------------------------------------------------------------------------- the policy


@pytest.fixture(scope="module")
def policy():
    return model.build_tiny(seed=0)


@pytest.fixture(scope="module")
def scored(policy):
    """Four prompts of unequal length, a rollout of two responses each, and well-formed demonstrations."""
    examples = data.DrawnTask("count").train_batch(0, 3) + data.DrawnTask("compare").train_batch(
        0, 1
    )
    prompts = policy.encode(examples, lambda i, image: corrupt(image, patch=policy.patch, seed=i))
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(prompts, 2, max_new_tokens=24, temperature=0.7, generator=rng)
    written = policy.as_rollout(
        [data.demonstrate(e, 0.0, np.random.default_rng(0)) for e in examples]
    )
    assert (prompts.mask == 0).any()
    return prompts, rollout, written


def roles_and_visible(policy, written):
    roles = torch.zeros(written.mask.shape, dtype=torch.long)
    for row, (text, offsets) in enumerate(policy.decode(written)):
        roles[row, : len(offsets)] = token_roles(text, offsets)
    return roles, without_perception(written.mask, roles)


def plain(policy, prompts, rollout, temperature=0.7, corrupted=False, visible=None, cut=False):
    """Log-probs [B, T] by stock calls of the model: a prompt of its own for each row, hidden tokens masked in
    their place or cut out; 0 where hidden."""
    visible = rollout.mask if visible is None else visible.bool()
    pixels, found = (
        prompts.corrupted if corrupted else prompts.pixels,
        torch.zeros(rollout.ids.shape),
    )
    for b, i in enumerate(rollout.prompt.tolist()):
        kept = visible[b] if cut else torch.ones_like(visible[b])
        positions = policy._positions(prompts, rollout.prompt[[b]], visible[[b]])[:, :, kept]
        states = policy.model.model(
            input_ids=torch.cat([prompts.ids[i], rollout.ids[b, kept]])[None],
            attention_mask=torch.cat([prompts.mask[i], visible[b, kept].long()])[None],
            position_ids=torch.cat([prompts.positions[:, [i]], positions], 2),
            pixel_values=pixels[i],
            image_grid_thw=prompts.grids[i],
            use_cache=False,
        ).last_hidden_state[0, prompts.ids.shape[1] - 1 : -1]
        logits = (policy.model.lm_head(states) / temperature).index_fill(1, policy.forbidden, -INF)
        logp = logits.log_softmax(1).gather(1, rollout.ids[b, kept, None])
        shown = visible[b].nonzero()[:, 0]
        found = found.index_put((torch.full_like(shown, b), shown), logp[visible[b, kept], 0])
    return found


def same_scores(policy, prompts, cases, atol, cut=False):
    """log_probs against `plain`, values and gradients."""
    ours = lambda *args, **options: policy.log_probs(*args, temperature=0.7, **options)[0]  # noqa: E731
    results = []
    for way in (ours, partial(plain, policy, cut=cut)):
        policy.model.zero_grad()
        found = []
        for rollout, wanted, options in cases:
            asked = {} if way is not ours or wanted is None else {"wanted": wanted}
            found.append(
                way(prompts, rollout, **options, **asked) * (1 if wanted is None else wanted)
            )
        sum(x.sum() for x in found).backward()
        grads = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]
        results.append([x.detach() for x in found] + grads)
    assert len(results[0]) == len(results[1]) and results[0][-1].abs().sum() > 0
    for one, stock in zip(*results, strict=True):
        torch.testing.assert_close(one, stock, atol=atol, rtol=atol)


@pytest.mark.parametrize("micro_batch", [16384, 200, 1])
def test_log_probs_and_gradients_are_those_of_stock_calls(policy, scored, micro_batch, monkeypatch):
    monkeypatch.setattr(policy, "micro_batch", micro_batch)
    prompts, rollout, written = scored
    roles, visible = roles_and_visible(policy, written)
    some = rollout[torch.tensor([1, 6, 7, 0])]
    one = replace(written, ids=written.ids[:, :1], mask=written.mask[:, :1])
    cases = [(some, None, {}), (one, None, {}), (written, torch.zeros_like(written.mask), {})]
    cases += [
        (written, roles == P, {"corrupted": True}),
        (written, roles == R, {"visible": visible}),
    ]
    same_scores(policy, prompts, cases, 1e-4)
    with torch.no_grad():
        logp, entropy = policy.log_probs(prompts, rollout, temperature=0.7, reuse=True)
        assert torch.allclose(logp, rollout.logp, atol=1e-4) and (entropy[rollout.mask] > 0).all()


def test_hidden_perception_equals_removed_perception_and_contrasts_are_not_zero(policy, scored):
    prompts, _, written = scored
    roles, visible = roles_and_visible(policy, written)
    with torch.no_grad():
        blank = policy.log_probs(prompts, written, temperature=1.0, visible=visible)[0]
        for cut in (False, True):  # its attention masked, its tokens gone
            other = plain(policy, prompts, written, 1.0, visible=visible, cut=cut)
            assert ((blank - other) / other)[
                roles == R
            ].abs().max() < 5e-6  # a few float32 roundings
        logp = policy.log_probs(prompts, written, temperature=1.0)[0]
        corrupted = policy.log_probs(prompts, written, temperature=1.0, corrupted=True)[0]
    delta = contrast_scores(logp, corrupted, blank, roles)
    assert (delta[roles != O].abs() > 1e-4).all()


def test_micro_batches_stay_within_the_budget(policy, scored, monkeypatch):
    lengths, prompt = torch.randint(1, 40, (48,)), torch.arange(12).repeat_interleave(4)
    mask = torch.arange(40) < lengths[:, None]
    rollout = model.Rollout(mask.long(), mask, mask.float(), prompt)
    used, L = torch.arange(48) % 5 > 0, scored[0].ids.shape[1]
    monkeypatch.setattr(policy, "micro_batch", 400)
    batches = policy.micro_batches(scored[0], rollout, used)
    assert torch.cat(batches).tolist() == used.nonzero()[:, 0].tolist() and 3 < len(batches) < 16
    assert all(L * len(set(prompt[b].tolist())) + len(b) * lengths[b].max() <= 400 for b in batches)
    monkeypatch.setattr(policy, "micro_batch", 1)
    assert [len(b) for b in policy.micro_batches(scored[0], rollout, used)] == [1] * int(used.sum())
    assert policy.micro_batches(scored[0], rollout, ~mask[:, 0]) == []


def test_draws_have_the_given_probabilities_and_placeholders_have_none(policy):
    p = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]]).expand(20000, -1)
    drawn = model.draw(p, torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1) and set(drawn.flatten().tolist()) == {1, 3, 4}
    torch.testing.assert_close(
        drawn.flatten().bincount(minlength=6) / 20000, p[0], atol=0.015, rtol=0
    )
    probabilities = policy._log_softmax(torch.randn(5, 128), 1.0).exp()
    config = policy.model.config
    assert policy.forbidden.tolist() == [config.image_token_id, config.video_token_id]
    assert (probabilities[:, policy.forbidden] == 0).all()
    assert torch.allclose(probabilities.sum(1), torch.ones(5))
    example = data.DrawnTask("count").train_batch(0, 1)[0]
    with pytest.raises(data.InputError, match="rows.jsonl:7.*image_pad"):
        policy.encode([replace(example, question="see <|image_pad|>", source="rows.jsonl:7")])


def test_logits_exist_only_for_a_chunk_of_response_positions(policy, scored, monkeypatch):
    prompts, rollout, _ = scored
    sizes, gradients = [], []
    hook = policy.model.lm_head.register_forward_hook(
        lambda _, inputs, output: sizes.append(len(output))
    )
    for chunk in (policy.chunk, 7):
        sizes.clear()
        monkeypatch.setattr(policy, "chunk", chunk)
        policy.model.zero_grad()
        policy.log_probs(prompts, rollout, temperature=1.0)[0].sum().backward()
        gradients.append(
            policy.model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone()
        )
    hook.remove()
    assert max(sizes) == 7 and sum(sizes) == 2 * rollout.mask.sum()  # again in the backward pass
    assert torch.allclose(*gradients, atol=1e-4)


def same_weights(one, other):
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_saved_folder_restores_every_weight_and_word(policy, tmp_path):
    from safetensors.torch import load_file, save_file

    policy.save(tmp_path)
    again = model.load(str(tmp_path))
    example = data.DrawnTask("add").train_batch(0, 1)
    one, other = policy.encode(example), again.encode(example)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.pixels[0], other.pixels[0])
    assert same_weights(again, policy) and again.eos == policy.eos
    assert again.instruction == "" and model.is_tiny(str(tmp_path))
    weights = next(tmp_path.glob("*.safetensors"))
    tensors = {
        k.replace("layers.1", "layer.1"): v for k, v in load_file(weights).items()
    }  # wrong names
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(data.InputError, match="missing"):
        model.load(str(tmp_path))


def test_weights_are_fp32_masters_which_small_updates_move(tmp_path):
    """At lr 1e-6 an update is below half an ulp of a bf16 weight: it would be rounded away."""
    kept = model.build_tiny(0)
    kept.model.to(torch.bfloat16)
    kept.save(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        policy = model.load(str(tmp_path), dtype=torch.bfloat16)
        assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
        policy.model.to(dtype)
        prompts = policy.encode(data.DrawnTask("count").train_batch(0, 2))
        logp, _ = policy.log_probs(
            prompts, policy.as_rollout(["<answer> 1</answer>"] * 2), temperature=1.0
        )
        logp.sum().backward()
        weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        torch.optim.AdamW(policy.model.parameters(), lr=1e-6, weight_decay=0.0).step()
        changed = (weight != before).float().mean().item()
        assert logp.dtype == torch.float32 and (
            changed > 0.9 if dtype == torch.float32 else changed < 0.05
        )


# ----------------------------------------------------------------------------------- images, tasks, your data


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_keep_size_and_mode_and_follow_the_seed(kind):
    rng = np.random.default_rng(0)
    for mode in ("RGB", "RGBA", "L", "P"):
        for size in ((1, 1), (48, 48), (31, 17)):
            image = Image.fromarray(
                rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            ).convert(mode)
            before = image.tobytes()
            results = [corrupt(image, kind, patch=8, seed=s) for s in (5, 5, 6)]
            assert (
                all(r.size == size and r.mode == mode for r in results)
                and image.tobytes() == before
            )
            assert results[0].tobytes() == results[1].tobytes()
            if mode == "RGBA" and size[0] > 8:
                image.putalpha(77)
                assert corrupt(image, kind, patch=8).getchannel("A").getextrema() == (77, 77)
            if size[0] > 8 and mode != "L":  # grey changes nothing that is grey
                assert results[0].convert("RGB").tobytes() != image.convert("RGB").tobytes()
    if kind in ("patch", "noise", "shuffle"):
        assert results[0].tobytes() != results[2].tobytes()


def test_patch_mask_hits_exactly_its_share_of_whole_patches():
    assert set(CORRUPTIONS) == {CHOICES["corruption"][2], *CHOICES["corruption"][3]}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    changed = (np.asarray(corrupt(image, "patch", patch=8, p=0.6)) != np.asarray(image)).any(-1)
    share = changed.reshape(6, 8, 6, 8).mean((1, 3)).ravel()
    assert ((share == 0) | (share > 0.95)).all() and (share > 0).sum() == round(0.6 * 36)
    for wrong in ({"kind": "melt"}, {"p": 2.0}, {"patch": 0}):
        with pytest.raises(ValueError):
            corrupt(image, **wrong)


@pytest.mark.parametrize("task", data.TASKS)
def test_drawn_tasks_split_by_scene_and_are_not_won_by_guessing(task):
    drawn, rng = data.DrawnTask(task, seed=3), np.random.default_rng(0)
    examples, held_out = drawn.train_batch(0, 400), drawn.eval_set(200)
    scenes = [e.scene for e in examples]
    assert not any(map(is_held_out, scenes)) and all(is_held_out(e.scene) for e in held_out)
    again, other = ([e.scene for e in drawn.train_batch(k, 400)] for k in (0, 1))
    assert again == scenes != other
    assert max(np.unique([e.answer for e in examples], return_counts=True)[1]) < 0.4 * len(examples)
    wrong = 0
    for example in examples:
        assert data.verify(data.demonstrate(example, 0.0, rng), example) == data.Verdict(
            1, 1, 1, 1, 1, 1
        )
        v = data.verify(data.demonstrate(example, 0.5, rng), example)
        assert v.consistent == 1 and v.format == 1 and v.grounded <= v.accuracy
        wrong += v.accuracy > v.grounded
    assert wrong > 0  # right for the wrong reason exists


def test_verdicts_are_separate():
    scene = (Fact("a1", "red", "circle"), Fact("b2", "blue", "square"))
    example = Example((), "How many red?", "1", scene, Query("count", ("red",)))
    cases = {  # perception, answer -> accuracy, perception F1, grounded, consistent
        ("a1 red circle, b2 blue square", "1"): (1, 1, 1, 1),
        ("a1 red circle", "1.0"): (1, 2 / 3, 1, 1),
        ("A1: a Red circle. b2 is a blue square!", "1"): (1, 1, 1, 1),
        ("c3 red square", "1"): (1, 0, 0, 1),  # right for the wrong reason
        ("a1 red circle, c3 red square", "2"): (0, 0.5, 0, 1),  # wrong, but follows
        ("a1 red circle", "2"): (0, 2 / 3, 0, 0),
        ("nothing", "1"): (1, 0, 0, 0),
    }
    for (perception, answer), expected in cases.items():
        v = data.verify(data.respond(perception, "so", answer), example)
        assert (v.accuracy, v.perception, v.grounded, v.consistent) == pytest.approx(expected), (
            perception
        )
    malformed = data.verify("hm <answer>1</answer>", example)
    assert (malformed.accuracy, malformed.format, malformed.grounded) == (1, 0, 0)
    cases = (
        (*" s1", "", 1, 5),
        (*"xy ", "", 0, 5),
        (*"xy2", "", 0, 6),
        (*"xy1", "<answer>2</answer>", 0, 4),
    )
    for *blocks, after, hit, n in cases:  # n tags in place, 6 for the whole form alone
        assert data.verify(data.respond(*blocks) + after, example).reward == pytest.approx(
            0.9 * hit + n / 60
        )


ANSWERS = """3=3.0 1,000=1000 1/2=0.5 -7!7 \u22127=-7 7.=7 12!1 (B)=b B.=B A_dog!a Same=same .5=0.5 ! .! 1/0!1
_two__words_=Two_words 1e999999999!1 nan=NaN 3_apples!3 -5_cm!5_cm .5_m!5_m <5!>5 <=< C++!C (-2,_3)!(2,_3)
**3**=3 (3)=3 'red'=red (1)_+_(2)!1)_+_(2 \u00e9=e\u0301"""


@pytest.mark.parametrize("case", [*ANSWERS.split(), "0" * 5000 + "!0"])
def test_answers_are_compared_as_numbers_and_words(case):
    given, sign, truth = re.fullmatch(
        r"(<|[^!=]*)([=!])(.*)", case.replace("_", " "), re.DOTALL
    ).groups()
    assert data.answers_match(given, truth) == (sign == "=")


LISTED = "\nA. 10 cm\nB. 12 cm"
CHOSEN = [
    ("B", "", "(b)", 1),
    ("B", "", "B. 12 cm", 1),
    ("B", "", "option B", 1),
    ("B", LISTED, "12 cm", 1),
]
CHOSEN += [
    ("B", LISTED, "10 cm", 0),
    ("B. 12 cm", "", "B", 1),
    ("B", "", "Blue", 0),
    ("B", "", "A. B", 0),
]
CHOSEN += [("12", "", r"so \boxed{12}", 1), ("12", "", r"\boxed{\frac{1}{2}} or \boxed{12", 0)]
CHOSEN += [(r"\frac{1}{2}", "", r"\boxed{\frac{1}{2}}", 1)]


@pytest.mark.parametrize(("answer", "choices", "given", "right"), CHOSEN)
def test_multiple_choice_and_boxed_answers(answer, choices, given, right):
    example = Example((), "Which?" + choices, answer)
    assert data.verify(data.respond("a", "b", given), example).accuracy == right


@pytest.fixture
def jsonl(tmp_path):
    """A data file of 20 rows with 10 images; returns a function that replaces one line and gives the path."""
    for i in range(10):
        Image.new("RGB", (40 + i, 30), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [
        {"image": f"{i % 10}.png", "question": "How many red?", "answer": i % 3} for i in range(20)
    ]

    def write(line=None, lines=tuple(map(json.dumps, rows))):
        path = tmp_path / "rows.jsonl"
        path.write_text(
            "\n".join([*lines[:2], line, *lines[3:]] if line else lines), encoding="utf-8"
        )
        return path

    return write


def test_your_own_data_is_split_by_image_and_read_with_care(jsonl, tmp_path):
    row = {"images": ["2.png", "3.png"], "question": "Same?", "answer": r"\boxed{12}"}
    assert "12" in {e.answer for e in data.OwnTask(jsonl(json.dumps(row)), 0, True).eval_set(99)}
    task = data.OwnTask(jsonl(json.dumps(row)), 1)
    seen = [e.source for step in range(6) for e in task.train_batch(step, 3)]
    held_out = {e.source for e in task.eval_set(9)}
    rows = 20 - len(held_out)
    assert held_out and not held_out & set(seen)
    assert rows == len(
        {e.source for e in task.train_batch(0, rows)}
    )  # one epoch sees every row once
    assert [e.source for e in task.train_batch(4, 3)] == seen[12:15]
    assert max(len(e.images) for e in task.train_batch(0, rows) + task.eval_set(9)) == 2
    assert len(data.OwnTask(task.path, everything=True).eval_set(99)) == 20
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())  # other names
    names = ("0.png", "./0.png", "copy.png", *(f"{i}.png" for i in range(1, 10)))
    rows = [{"image": name, "question": "q\u2028?", "answer": True} for name in names]
    rows = [json.dumps(row, ensure_ascii=False) for row in rows]
    task = data.OwnTask(jsonl(lines=["\ufeff" + rows[0], *rows[1:]]))
    pixels = lambda examples: {e.images[0].tobytes() for e in examples}  # noqa: E731
    kept = pixels(task.eval_set(99))
    assert len(kept) == 1 and not kept & pixels(task.train_batch(0, 30))
    Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)).save(
        tmp_path / "deep.png"
    )
    assert len(set(open_image(tmp_path / "deep.png").getchannel(0).tobytes())) > 50
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


# -------------------------------------------------------------------------------------------- options, faults


def complaint(capsys, *argv):
    """The one line that `train.py` answers to bad input."""
    capsys.readouterr()
    try:
        code = train.main(list(map(str, argv)))
    except SystemExit as exit:
        code = exit.code
    stderr = capsys.readouterr().err
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, (code, stderr)
    return stderr


EXPECTED = {  # of the options that were left out
    "": {
        "steps": 40,
        "prompts": 24,
        "max_new_tokens": 48,
        "lr": 1e-4,
        "image_size": 48,
        "warmup_steps": 320,
    },
    "--model TMP/real": {
        "steps": 200,
        "prompts": 8,
        "max_new_tokens": 512,
        "lr": 1e-6,
        "image_size": 336,
    },
    "--model TMP/real --lora 16": {"steps": 200, "prompts": 8, "max_new_tokens": 512, "lr": 1e-5},
    "--model TMP/tiny": {"steps": 40, "max_new_tokens": 48, "lr": 1e-4, "warmup_steps": 0},
    "--model TMP/adapters": {"steps": 40, "max_new_tokens": 48, "lr": 1e-4, "warmup_steps": 0},
    "--model TMP/real --lora 16 --demonstrations d.jsonl": {"warmup_steps": 100, "warmup_lr": 2e-4},
}
EXPECTED[""] |= {"micro_batch": 16384, "warmup_lr": 2e-3, "warmup_noise": 0.25}
EXPECTED["--model TMP/real"] |= {
    "micro_batch": 4096,
    "warmup_steps": 0,
    "warmup_lr": 1e-5,
    "warmup_noise": 0,
}
EXPECTED["--model TMP/real --lora 16"] |= {
    "micro_batch": 4096,
    "warmup_steps": 0,
    "warmup_lr": 2e-4,
}
EXPECTED["--model TMP/real --lora 16"] |= {"image_size": 336, "warmup_noise": 0}


@pytest.mark.parametrize("options", EXPECTED)
def test_options_left_out_have_the_values_that_help_names(options, tmp_path, policy):
    policy.save(tmp_path / "tiny")
    for name in ("real", "adapters"):
        (tmp_path / name).mkdir()
    (tmp_path / "real/config.json").write_text('{"model_type": "qwen2_vl"}')
    base = {"base_model_name_or_path": str(tmp_path / "tiny")}
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(base))
    argv = [*options.replace("TMP", str(tmp_path)).split(), "--out", str(tmp_path / "out")]
    args, run = train.parse_options(argv)
    run.held.release()
    for name, value in EXPECTED[options].items():
        assert getattr(args, name) == value, name
    help_text = " ".join(train.build_parser().format_help().split())
    assert "longest response (tiny: 48, a real model: 512)" in help_text
    assert "(tiny: 0.0001, a real model: 1e-06, with --lora: 1e-05)" in help_text


OPTIONS = """--model TMP/none>none --model no-such-owner/no-such-model>no-such-owner --model TMP/empty>empty
--model TMP/text-only>not_one_of_qwen2_vl, --model TMP/cut>cannot_be_used --device cuda:99>cuda:99
--device banana>banana --device meta>meta --seed 999999999999999999999999999999>seed --group-size 1>group-size
--temperature nan>temperature --prompts 0>prompts --temperature 0>temperature --lr x>lr --choice tau=x>tau=x
--choice lam=2>lam --choice corruption=melt>melt --choice p=2>p --choice tau=-1>tau --choice w_min=3>w_min
--choice shape=round>no_such_choice --task chess>chess --out TMP/file/sub>Not_a_directory --what>--what
--resume TMP/none>not_the_folder_of_a_run --resume TMP/text-only>not_the_folder_of_a_run
--reward TMP/file>--reward --reward TMP/file:g>no_such_function --lora 4>pip_install_peft"""


@pytest.mark.parametrize("case", re.split(r"\s(?=--)", OPTIONS))
def test_a_bad_option_is_one_line(case, capsys, tmp_path, policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    argv, needle = case.replace("TMP", str(tmp_path)).split(">")
    (tmp_path / "text-only").mkdir()
    (tmp_path / "text-only/config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    if "cut" in argv:
        policy.save(tmp_path / "cut")
        weights = next((tmp_path / "cut").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:5000])
    out = () if "--out" in argv or "--resume" in argv else ("--out", tmp_path / "out")
    assert needle.replace("_", " ") in complaint(capsys, *argv.split(), *out).replace("_", " ")


def test_used_folders_divergence_and_too_little_memory_are_one_line(capsys, tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    kept = json.dumps({"argv": ["--lr", "1e-4"], "lr": 1e-4})
    (out / "args.json").write_text(kept)
    (out / "metrics.jsonl").write_text('{"step": 0, "eval": {}}\n')
    assert f"--resume {out}" in complaint(capsys, "--out", out)
    assert "--lr" in complaint(capsys, "--resume", out, "--lr", "0.5")
    assert "--out" in complaint(capsys, "--resume", out, "--out", tmp_path / "other")
    assert (out / "args.json").read_text() == kept
    (out / "args.json").write_text(kept.replace("1e-4", "fast"))
    assert "--lr" in complaint(
        capsys, "--resume", out
    )  # a file changed by hand meets the same checks
    lost = lambda self, hidden, _: torch.full((len(hidden), 50), NAN)  # noqa: E731
    monkeypatch.setattr(model.Policy, "_log_softmax", lost)
    assert "the policy has diverged" in complaint(capsys, *QUICK, "--out", tmp_path / "diverged")
    for i, error in enumerate((torch.OutOfMemoryError("CUDA out of memory."), MemoryError())):
        monkeypatch.setattr(train, "prepare", Mock(side_effect=error))
        message = complaint(capsys, "--out", tmp_path / str(i))
        assert all(
            o in message for o in ("--micro-batch", "--max-new-tokens", "--max-pixels", "--lora")
        )


def test_bad_data_names_file_and_line(capsys, tmp_path, jsonl, monkeypatch):
    row = {"image": "0.png", "question": "q", "answer": "a"}
    (tmp_path / "short.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (1500, 1000)).save(tmp_path / "big.png")
    Image.new("L", (900, 2)).save(tmp_path / "long.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    expected = "expected one JSON object"
    changes = [({"image": "gone.png"}, "No such file"), ({"image": "short.png"}, "cannot be read")]
    changes += [({"image": "text.png"}, "cannot be read"), ({"image": "big.png"}, "too large")]
    changes += [({"image": "long.png"}, "200 to 1"), ({"image": "."}, "cannot be read")]
    changes += [
        ({"images": []}, "needs"),
        ({"answer": None}, "needs"),
        ({"images": "0.png"}, "needs"),
    ]
    changes += [({"question": "\ud83d"}, "needs"), ({"answer": " ."}, "blank")]
    changes += [
        ({"question": "<|image_pad|>"}, "placeholder"),
        ({"question": "<image><image>"}, "1 <image>"),
    ]
    lines = {json.dumps(row | change): needle for change, needle in changes}
    lines |= {
        '{"image": "0.png", "question"': expected,
        '{"image": "0.png", "question": "q"}': "needs",
    }
    lines |= {"[1]": expected, "[" * 100_000: expected}
    out = ("--out", tmp_path / "out")  # the same each time: a run that never started leaves it free
    for line, needle in lines.items():
        message = complaint(capsys, "--data", jsonl(line), *out)
        assert needle in message and "rows.jsonl:3:" in message, message
    for content, needle in (([], "empty"), ([json.dumps(row)] * 3, "two different images")):
        assert needle in complaint(capsys, "--data", jsonl(lines=content), *out)
    assert "cannot be read" in complaint(capsys, "--data", tmp_path / "0.png", *out)
