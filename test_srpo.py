"""Tests, from the equations to the command line. `python -m pytest test_srpo.py`, under 3 minutes on two cores."""

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

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import data
import model
import srpo
import train
from corrupt import CORRUPTIONS, corrupt
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
    token_roles,
    token_weights,
    without_perception,
)

HERE = Path(__file__).parent
O, P, R = Role


# ----------------------------------------------------------------------------------------------- the tag parser, roles

GOOD = "<perception>a</perception><reasoning>b</reasoning><answer>c</answer>"


@pytest.mark.parametrize(
    "text, blocks",
    [
        (GOOD, ("a", "b", "c")),
        (f"\r\n {GOOD}\t\n", ("a", "b", "c")),
        (GOOD.replace("><", ">\r\n<").replace("a<", "x\r\ny\n<"), ("x\r\ny\n", "b", "c")),
        (GOOD.replace(">a<", "><"), ("", "b", "c")),
        (GOOD.replace(">b<", "> \n<"), ("a", " \n", "c")),
        (GOOD.replace(">a<", ">红色的圆 🙂<"), ("红色的圆 🙂", "b", "c")),
        (GOOD.replace(">a<", "><b>x < y</b> <PERCEPTION><<"), ("<b>x < y</b> <PERCEPTION><", "b", "c")),
        ("", None),
        ("plain", None),
        *[(GOOD.replace(tag, ""), None) for tag in re.findall(r"<.*?>", GOOD)],  # missing
        *[(GOOD.replace(tag, tag * 2), None) for tag in re.findall(r"<.*?>", GOOD)],  # repeated
        *[(GOOD[:end], None) for end in range(len(GOOD))],  # cut off
        (GOOD.upper(), None),
        (GOOD.replace("perception>", "Perception>"), None),
        (GOOD * 2, None),
        (GOOD + "<answer>d</answer>", None),  # two answers
        ("Sure! " + GOOD, None),
        (GOOD + " Done.", None),
        (GOOD.replace("<reasoning>", "so <reasoning>"), None),
        (GOOD.replace(">b<", "><answer>b</answer><"), None),  # tags inside a block
        (GOOD.replace(">a<", ">the <reasoning> tag<"), None),
        (GOOD.replace(">a<", ">x</answer><"), None),
        ("<perception>a<reasoning>b</reasoning></perception><answer>c</answer>", None),  # nested
        ("<perception>a<reasoning>b</perception></reasoning><answer>c</answer>", None),  # crossed
        ("<reasoning>b</reasoning><perception>a</perception><answer>c</answer>", None),  # swapped
        ("<perception>a</perception><answer>c</answer><reasoning>b</reasoning>", None),
        (GOOD.replace("<perception>", "</perception>", 1), None),
        ("</perception>a<perception><reasoning>b</reasoning><answer>c</answer>", None),
        (GOOD.replace("<answer>", "<answer >"), None),
    ],
)
def test_parser_accepts_exactly_the_structure(text, blocks):
    response = parse_response(text)
    assert (response and tuple(text[slice(*span)] for span in (response.perception, response.reasoning, response.answer))) == blocks


def test_parser_is_linear():
    start = time.perf_counter()
    for unit in ("<", "<perception", "<perception>", "</perception>", "<perception></perception>", "a ", "\n"):
        text = unit * (100_000 // len(unit))
        assert parse_response(text) is None
        assert parse_response(GOOD.replace(">a<", f">{text}<")) is None or "perception>" not in text
    assert time.perf_counter() - start < 1.0


def test_tags_can_be_renamed_and_must_differ():
    tags = Tags("see", "think", "say")
    assert parse_response("<see>a</see><think></think><say>c</say>", tags) == Response((5, 6), (19, 19), (32, 33))
    for wrong in (("a", "a", "b"), ("", "a", "b")):
        with pytest.raises(ValueError, match="different"):
            Tags(*wrong)


def roles_of(*pieces):
    return token_roles(*text_and_offsets([p if isinstance(p, bytes) else p.encode() for p in pieces])).tolist()


def test_roles_come_from_the_sampled_pieces_also_when_they_straddle_a_tag():
    # Straddling tokens (">a", "b</") count for the block, tags alone and white space do not, EOS (no bytes) neither.
    pieces = ["<percept", "ion", ">a", " ", "b", ".</", "perception", ">\n", "<reasoning", ">", "so ", "x", "</reasoning>"]
    pieces += ["<answer>", "x", "</answer>", ""]
    assert roles_of(*pieces) == [O, O, P, O, P, P, O, O, O, O, R, R, O, O, O, O, O]
    # The same text cut in single characters, which no tokenizer would choose by itself.
    assert roles_of(*GOOD).count(P) == 1 and roles_of(*GOOD).count(R) == 1
    assert roles_of(*"".join(pieces[:-5])) == [O] * len("".join(pieces[:-5]))  # cut off: no roles at all
    assert token_roles("", []).shape == (0,)


def test_roles_of_tokens_with_half_a_character():
    smile = "🙂".encode()
    text, offsets = text_and_offsets([b"<perception>", smile[:2], smile[2:] + b"</", b"perception>\xff"])
    assert text == "<perception>🙂</perception>\ufffd" and offsets[1] == (12, 13) and offsets[2] == (12, 15)
    pieces = [b"<perception>", smile[:1], smile[1:3], smile[3:] + b"</perception><reasoning>", b"b", GOOD[38:].encode()]
    assert roles_of(*pieces) == [O, P, P, P, R, O]


def test_without_perception_hides_the_whole_span():
    roles = torch.tensor([[O, P, O, P, O, R], [O, O, R, R, O, O]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert without_perception(mask, roles).tolist() == [[1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert mask[0].tolist() == [1] * 6


# --------------------------------------------------------------------- equations (1) to (9) against plain float64 loops


def loop_weights(scores, roles, tau=1.0, w_min=0.5, w_max=2.0):
    """Eq. (5), (6), (9) of one response, in Python floats."""
    S = [t for t, role in enumerate(roles) if role != O]
    if not (P in roles and R in roles):
        return [1.0] * len(roles)
    b = sum(scores[t] for t in S) / len(S)
    raw = {t: math.exp(min(max((scores[t] - b) / tau, math.log(w_min)), math.log(w_max))) for t in S}
    mean = sum(raw.values()) / len(S)
    return [raw[t] / mean if t in raw else 1.0 for t in range(len(roles))]


def loop_scores(logp, corrupted, blank, roles, max_abs=5.0):
    """Eq. (2) to (4) of one response."""
    other = {P: corrupted, R: blank}
    return [min(max(logp[t] - other[r][t], -max_abs), max_abs) if r in other else 0.0 for t, r in enumerate(roles)]


@pytest.fixture
def batch():
    """Random float64 inputs: 3 groups of 4 responses over 11 positions, some without a role, some padded."""
    g = torch.Generator().manual_seed(0)
    draw = lambda: -3 * torch.rand(12, 11, generator=g, dtype=torch.float64)  # noqa: E731
    roles = torch.randint(0, 3, (12, 11), generator=g)
    roles[1], roles[2] = O, P * (roles[2] > 0)
    mask = torch.arange(11) < torch.randint(5, 12, (12, 1), generator=g)
    return {
        "rewards": torch.randint(0, 3, (12,), generator=g).double(),
        "logp": draw(), "old": draw(), "corrupted": 4 * draw(), "blank": 4 * draw(), "ref": draw(),
        "roles": roles * mask, "mask": mask,
    }  # fmt: skip


def weights_of(b, **options):
    return token_weights(contrast_scores(b["logp"], b["corrupted"], b["blank"], b["roles"]), b["roles"], **options)


def test_property_10_vectorized_equals_loops(batch):
    b = batch
    lists = {k: v.tolist() for k, v in b.items()}
    A = group_advantages(b["rewards"], 4)
    for i in range(12):  # Eq. (1)
        r = lists["rewards"][i // 4 * 4 : i // 4 * 4 + 4]
        std = math.sqrt(sum((x - sum(r) / 4) ** 2 for x in r) / 3)
        assert A[i].item() == pytest.approx((r[i % 4] - sum(r) / 4) / (std + 1e-4), abs=1e-12)
    scores = contrast_scores(b["logp"], b["corrupted"], b["blank"], b["roles"])
    w = token_weights(scores, b["roles"], tau=0.7)
    A_hat = role_aware_advantages(A, w, lam=0.8)
    J, kl, n = 0.0, 0.0, sum(map(sum, lists["mask"]))
    for i in range(12):
        roles = lists["roles"][i]
        s = loop_scores(lists["logp"][i], lists["corrupted"][i], lists["blank"][i], roles)
        assert scores[i].tolist() == pytest.approx(s, abs=1e-12)  # Eq. (2) to (4)
        S = [s[t] for t in range(11) if roles[t] != O]
        assert shared_baseline(scores, b["roles"])[i].item() == pytest.approx(sum(S) / max(1, len(S)), abs=1e-12)  # Eq. (5)
        expected = loop_weights(s, roles, tau=0.7)
        assert w[i].tolist() == pytest.approx(expected, abs=1e-12)  # Eq. (6), (9)
        for t in range(11):
            a = A[i].item() * (0.2 + 0.8 * expected[t])
            assert A_hat[i, t].item() == pytest.approx(a, abs=1e-12)  # Eq. (7)
            if lists["mask"][i][t]:
                rho = math.exp(lists["logp"][i][t] - lists["old"][i][t])
                J += min(rho * a, min(max(rho, 0.9), 1.3) * a)  # Eq. (8)
                d = lists["ref"][i][t] - lists["logp"][i][t]
                kl += math.exp(d) - 1 - d
    loss, stats = policy_loss(b["logp"], b["old"], A_hat, b["mask"], clip_low=0.1, clip_high=0.3)
    assert loss.item() == pytest.approx(-J / n, abs=1e-12) and 0 < stats["clip_frac"] < 1
    assert kl_to_reference(b["logp"], b["ref"], b["mask"]).item() == pytest.approx(kl / n, abs=1e-12)


def test_eq_1_uses_the_sample_std_and_leaves_no_residue():
    assert group_advantages([1, 0, 0, 0], 4)[0].item() == pytest.approx(1.5, abs=1e-3)
    assert group_advantages(torch.full((6,), 0.1), 3).tolist() == [0.0] * 6  # property 9: no spread, no advantage, no NaN
    for wrong in (([1.0, 0.0], 1), ([1.0, 0.0, 0.0], 2), ([], 2), ([[1.0, 0.0]], 2)):
        with pytest.raises(ValueError, match="group|rewards"):
            group_advantages(*wrong)


def test_property_1_weights_are_positive_and_keep_the_sign(batch):
    A = group_advantages(batch["rewards"], 4)
    w = weights_of(batch)
    assert (w > 0).all() and torch.equal(role_aware_advantages(A, w).sign(), A.sign()[:, None].expand_as(w))
    assert role_aware_advantages(torch.zeros(12), w).abs().max() == 0


def test_property_2_mean_one_so_the_summed_advantage_is_grpos(batch):
    w, scored = weights_of(batch), batch["roles"] != O
    mean = (w * scored).sum(1) / scored.sum(1).clamp(min=1)
    assert torch.allclose(mean[scored.any(1)], torch.ones(1, dtype=torch.float64))
    assert not torch.allclose(w[scored], torch.ones(1, dtype=torch.float64))
    raw = weights_of(batch, normalize=False)
    assert raw.min() >= 0.5 and raw.max() <= 2 and not torch.allclose(raw, w)


def test_property_3_constant_scores_and_lambda_0_are_grpo(batch):
    b = batch
    assert torch.allclose(token_weights(torch.full_like(b["logp"], 0.3), b["roles"]), torch.ones(1, dtype=torch.float64))
    same = contrast_scores(b["logp"], b["logp"], b["logp"], b["roles"])
    assert (token_weights(same, b["roles"]) == 1).all()
    A, w = group_advantages(b["rewards"].float(), 4), weights_of(b).float()
    A_hat = role_aware_advantages(A, w, lam=0.0)
    assert torch.equal(A_hat, A[:, None].expand_as(A_hat))
    srpo, grpo = (policy_loss(b["logp"].float(), b["old"].float(), a, b["mask"])[0] for a in (A_hat, A))
    assert torch.equal(srpo, grpo)


def test_property_4_shift_scale_limit_and_order(batch):
    scores = 0.1 * torch.randn(12, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    roles = batch["roles"]
    w = token_weights(scores, roles)
    assert torch.allclose(token_weights(scores + 3, roles), w)
    assert torch.allclose(token_weights(7 * scores, roles, tau=7.0), w)
    assert torch.allclose(token_weights(scores, roles, tau=1e9), torch.ones_like(w))
    t = (roles[0] != O).nonzero()[:, 0]
    assert torch.equal(scores[0, t].argsort(), w[0, t].argsort()) and len(t) > 3


def test_property_5_ranges(batch):
    wild = torch.randn(12, 11, generator=torch.Generator().manual_seed(2)) * 100
    w = token_weights(wild, batch["roles"], w_min=0.5, w_max=2.0)
    assert 0.25 <= w.min() < 0.5 and 1.5 < w.max() <= 4


def test_property_6_no_gradient_through_weights_and_no_input_changed(batch):
    b = {k: v.clone().requires_grad_() if v.is_floating_point() else v.clone() for k, v in batch.items()}
    w = weights_of(b)
    A_hat = role_aware_advantages(group_advantages(b["rewards"], 4), w)
    assert not w.requires_grad and not A_hat.requires_grad
    loss, stats = policy_loss(b["logp"], b["old"], A_hat, b["mask"])
    (loss + kl_to_reference(b["logp"], b["ref"], b["mask"])).backward()
    assert b["logp"].grad.abs().sum() > 0 and b["old"].grad is None and b["ref"].grad is None
    assert not stats["ratio"].requires_grad
    without_perception(b["mask"], b["roles"]), token_weights(b["old"], b["roles"])
    assert all(torch.equal(b[k].detach(), batch[k]) for k in batch)


def test_property_7_the_same_positions_are_clipped_as_under_grpo(batch):
    b, A, gradients = batch, group_advantages(batch["rewards"], 4), []
    w = weights_of(b)
    for advantages in (A, role_aware_advantages(A, w)):
        logp = b["logp"].clone().requires_grad_()
        policy_loss(logp, b["old"], advantages, b["mask"])[0].backward()
        gradients.append(logp.grad)
    assert torch.allclose(gradients[1], gradients[0] * w)
    assert torch.equal(gradients[0] == 0, gradients[1] == 0)


def test_property_8_padding_split_and_other_rows_do_not_matter(batch):
    b, A = batch, group_advantages(batch["rewards"], 4)
    w = weights_of(b)
    n = b["mask"].sum()
    loss = policy_loss(b["logp"], b["old"], role_aware_advantages(A, w), b["mask"])[0]
    parts = [
        policy_loss(b["logp"][i], b["old"][i], role_aware_advantages(A[i], w[i]), b["mask"][i], denominator=n)[0]
        for i in torch.arange(12).split(5)
    ]
    assert torch.allclose(sum(parts), loss)
    for pad in ((3, 0), (0, 3)):  # left, right; padding holds garbage
        garbage = {k: torch.nn.functional.pad(b[k], pad, value=float("nan")) for k in ("logp", "old", "corrupted", "blank")}
        clean = {k: torch.nn.functional.pad(b[k], pad) for k in ("roles", "mask")}
        padded = weights_of(garbage | clean)
        assert torch.allclose(padded[:, pad[0] : padded.shape[1] - pad[1]], w)
        logp = garbage["logp"].requires_grad_()
        again = policy_loss(logp, garbage["old"], role_aware_advantages(A, padded), clean["mask"])[0]
        again.backward()
        assert torch.allclose(again, loss) and logp.grad.isfinite().all()


def test_property_9_fallback_rows_have_weight_1(batch):
    w = weights_of(batch)
    assert (w[1] == 1).all() and (w[2] == 1).all() and (w[0] != 1).any()
    empty = torch.zeros(2, 4)
    loss, stats = policy_loss(empty, empty, torch.ones(2), torch.zeros(2, 4))
    assert loss == 0 and stats["clip_frac"] == 0 and kl_to_reference(empty, empty, empty) == 0


def test_overflowing_ratios_stay_finite():
    logp = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    for advantage in (0.0, 1.0, -1.0):
        loss, _ = policy_loss(logp, torch.tensor([[-120.0, -0.5]]), torch.tensor([advantage]), torch.ones(1, 2))
        (loss + kl_to_reference(logp, torch.tensor([[200.0, -0.5]]), torch.ones(1, 2))).backward()
        assert loss.isfinite() and logp.grad.isfinite().all()


def test_property_11_eos_is_trained_and_padding_is_not():
    logp = torch.zeros(1, 6, requires_grad=True)
    roles = torch.tensor([[P, R, O, O, O, O]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])  # position 3 is EOS
    w = token_weights(torch.tensor([[1.0, 0, 0, 0, 0, 0]]), roles)
    policy_loss(logp, torch.zeros(1, 6), role_aware_advantages(torch.tensor([2.0]), w), mask)[0].backward()
    assert logp.grad[0, 3] == -2 / 4 and (logp.grad[0, 4:] == 0).all()


def test_dtypes_bad_numbers_and_bad_shapes(batch):
    b = batch
    A = group_advantages(b["rewards"], 4)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()}
    w = weights_of(half)
    assert w.dtype == torch.float32
    losses = [policy_loss(half["logp"], half["old"], A, b["mask"].to(t))[0] for t in (torch.bool, torch.long, torch.float)]
    assert losses[0] == losses[1] == losses[2] and losses[0].dtype != torch.bfloat16
    for bad in (float("-inf"), float("nan"), float("inf")):
        broken = {**b, "corrupted": torch.full_like(b["logp"], bad), "blank": torch.full_like(b["logp"], bad)}
        assert weights_of(broken).isfinite().all()
        assert (token_weights(torch.full_like(b["logp"], bad), b["roles"]) == 1).all()
    wrong = b["logp"][:, :5]
    for call in (
        lambda: contrast_scores(b["logp"], wrong, b["blank"], b["roles"]),
        lambda: shared_baseline(wrong, b["roles"]),
        lambda: token_weights(b["logp"], wrong),
        lambda: role_aware_advantages(A[:3], b["logp"]),
        lambda: policy_loss(b["logp"], wrong, A, b["mask"]),
        lambda: policy_loss(b["logp"], b["old"], wrong, b["mask"]),
        lambda: kl_to_reference(b["logp"], wrong, b["mask"]),
    ):
        with pytest.raises(ValueError, match=r"\[12, 11\].*\[12, 5\]|\[12, 5\].*\[12, 11\]|\[3.*\[12, 11\]"):
            call()
    for options in ({"tau": 0.0}, {"w_min": 0.0}, {"w_min": 2.0, "w_max": 1.0}):
        with pytest.raises(ValueError):
            token_weights(b["logp"], b["roles"], **options)
    with pytest.raises(ValueError):
        role_aware_advantages(A, b["logp"], lam=1.5)


def test_worked_example_of_the_readme():
    """Every number of the README's worked example, computed from the README's own inputs."""
    section = (HERE / "README.md").read_text(encoding="utf-8").split("## A worked example")[1].split("\n## ")[0]
    rewards = [float(x) for x in re.search(r"rewards `(.*?)`", section)[1].split(",")]
    A = group_advantages(rewards, 2)
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.M)
    assert len(tables) == 2
    for advantage, table in zip(A, tables, strict=True):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
        rows = {name: cells for name, *cells in lines}
        roles = torch.tensor([[{"P": P, "R": R, "-": O}[c] for c in rows["role"]]])
        logp, corrupted, blank = (torch.tensor([[float(c) if c else 0.0 for c in rows[k]]]) for k in ("image", "corrupted", "blank"))
        scores = contrast_scores(logp, corrupted, blank, roles)
        raw = token_weights(scores, roles, normalize=False)
        w = token_weights(scores, roles)
        computed = {"Δ": scores, "b": shared_baseline(scores, roles).expand(1, 6), "w̃": raw, "w": w}
        computed |= {"A": advantage.expand(1, 6), "Â": role_aware_advantages(advantage[None], w)}
        for name, values in computed.items():
            for shown, value in zip(rows[name], values[0].tolist(), strict=True):
                assert not shown or shown == f"{value:.2f}", (name, shown, value)


def test_readme_code_and_table(batch):
    """The README's lines of code run and differ where they should; the tests and functions that it names exist."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    names = {**globals(), **batch, "group_size": 4, "logp_corrupted": batch["corrupted"], "logp_blank": batch["blank"]}
    names["old_logp"] = batch["old"]
    exec(re.search(r"```python\n(.*?)```", readme, re.S)[1], names)
    assert names["grpo_loss"] != names["srpo_loss"] and names["A_hat"].shape == (12, 11)
    for name in re.findall(r"`(test_\w+)`", readme):
        assert name in globals(), name
    beyond = "".join(p.read_text(encoding="utf-8") for p in (HERE / "extras").glob("*.py"))
    for option in set(re.findall(r"`(--[a-z-]+)", readme)):
        assert option in train.build_parser()._option_string_actions or f'add_argument("{option}"' in beyond, option
    logged = re.findall(r"`(\w+)`", readme.split("## What is logged")[1].split("| meaning |")[1].split("\n\n")[0])
    assert set(logged) >= {*train.VERDICTS, "loss", "grad_norm", "clip_frac", "entropy", "kl", "used_groups", "sec_score"}


# ------------------------------------------------------------------------------------------------------- the open choices


def test_role_balanced_baseline_and_flip_by_hand():
    scores = torch.tensor([[0.4, 0.0, 0.2, 0.4, 0.6, 0.0]], dtype=torch.float64)
    roles = torch.tensor([[P, P, R, R, R, O]])
    assert srpo.shared_baseline(scores, roles).item() == pytest.approx(1.6 / 5)
    assert srpo.shared_baseline(scores, roles, role_balanced=True).item() == pytest.approx((0.2 + 0.4) / 2)
    w = srpo.token_weights(scores, roles, role_balanced=True, normalize=False)
    torch.testing.assert_close(w[0, :5], (scores[0, :5] - 0.3).exp())
    both = torch.cat([scores, scores])
    flipped = srpo.token_weights(both, roles.expand(2, -1), flip=torch.tensor([False, True]))
    torch.testing.assert_close(flipped[:1], srpo.token_weights(scores, roles))
    torch.testing.assert_close(flipped[1:], srpo.token_weights(-scores, roles))


def test_the_answer_may_be_reasoning():
    pieces = [b"<perception>", b"a", b"</perception>", b"<reasoning>", b"b", b"</reasoning>", b"<answer>", b"c", b"</answer>"]
    text, offsets = srpo.text_and_offsets(pieces)
    assert srpo.token_roles(text, offsets).tolist() == [O, P, O, O, R, O, O, O, O]
    assert srpo.token_roles(text, offsets, answer_is_reasoning=True).tolist() == [O, P, O, O, R, O, O, R, O]


def test_corrupted_patches_are_a_share_in_the_mean_color():
    image = torch.rand(20, 3 * 2 * 16)
    out = srpo.corrupt_patches(image, 0.6, seed=1)
    changed = (out != image).any(1)
    assert changed.sum() == 12 and torch.equal(out[~changed], image[~changed])
    color = image.view(20, 3, -1).mean((0, 2))
    torch.testing.assert_close(out[changed].view(12, 3, -1), color[None, :, None].expand(12, 3, 32))
    assert torch.equal(out, srpo.corrupt_patches(image.clone(), 0.6, seed=1))
    assert not torch.equal(out, srpo.corrupt_patches(image, 0.6, seed=2))
    assert torch.equal(srpo.corrupt_patches(image, 0.0, seed=1), image) and (srpo.corrupt_patches(image, 1.0, seed=1) != image).any(1).all()
    with pytest.raises(ValueError, match="p must lie"):
        srpo.corrupt_patches(image, 60, seed=1)


def test_bytes_of_tokens():
    assert srpo.token_bytes("Ġb2") == b" b2" and srpo.token_bytes("ÃĹĊ") == "\u00d7\n".encode()
    with pytest.raises(ValueError, match="not byte-level"):
        srpo.token_bytes("\u2581b2")


# ---------------------------------------------------------------------------------------------------- images and tasks


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_keep_size_and_mode_and_follow_the_seed(kind):
    rng = np.random.default_rng(0)
    for mode in ("RGB", "RGBA", "L", "P"):
        for size in ((1, 1), (48, 48), (31, 17)):
            image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
            before = image.tobytes()
            results = [corrupt(image, kind, patch=8, seed=s) for s in (5, 5, 6)]
            assert all(r.size == size and r.mode == mode for r in results) and image.tobytes() == before
            assert results[0].tobytes() == results[1].tobytes()
            if mode == "RGBA" and size[0] > 8:
                image.putalpha(77)
                assert corrupt(image, kind, patch=8).getchannel("A").getextrema() == (77, 77)
            if size[0] > 8 and mode != "L":  # grey changes nothing that is grey
                assert results[0].convert("RGB").tobytes() != image.convert("RGB").tobytes()
    if kind in ("patch", "noise", "shuffle"):
        assert results[0].tobytes() != results[2].tobytes()


def test_patch_mask_hits_exactly_its_share_of_whole_patches():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    changed = (np.asarray(corrupt(image, "patch", patch=8, p=0.6)) != np.asarray(image)).any(-1)
    share = changed.reshape(6, 8, 6, 8).mean((1, 3)).ravel()
    assert ((share == 0) | (share > 0.95)).all() and (share > 0).sum() == round(0.6 * 36)
    for wrong in ({"kind": "melt"}, {"p": 2.0}, {"patch": 0}):
        with pytest.raises(ValueError):
            corrupt(image, **wrong)


@pytest.mark.parametrize("task", data.TASKS)
def test_tasks_and_verifiers(task):
    drawn = data.DrawnTask(task, seed=3)
    rng = np.random.default_rng(0)
    examples, held_out = drawn.train_batch(0, 400), drawn.eval_set(200)
    assert not {e.scene for e in examples} & {e.scene for e in held_out}  # and by construction:
    assert not any(data.is_held_out(e.scene) for e in examples) and all(data.is_held_out(e.scene) for e in held_out)
    assert [e.scene for e in drawn.train_batch(0, 400)] == [e.scene for e in examples] != [e.scene for e in drawn.train_batch(1, 400)]
    common = max(np.unique([e.answer for e in examples], return_counts=True)[1])
    assert common < 0.4 * len(examples)  # guessing does not pay
    wrong = 0
    for example in examples:
        v = data.verify(data.demonstrate(example, 0.0, rng), example)
        assert (v.reward, v.accuracy, v.format, v.perception, v.grounded, v.consistent) == (1, 1, 1, 1, 1, 1)
        v = data.verify(data.demonstrate(example, 0.5, rng), example)
        assert v.consistent == 1 and v.format == 1 and v.grounded <= v.accuracy
        wrong += v.accuracy > v.grounded
    assert wrong > 0 or task == "lookup"  # right for the wrong reason exists


def test_verdicts_are_separate():
    scene = (data.Fact("a1", "red", "circle"), data.Fact("b2", "blue", "square"))
    example = data.Example((), "How many red?", "1", scene, data.Query("count", ("red",)))
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
        assert (v.accuracy, v.perception, v.grounded, v.consistent) == pytest.approx(expected), perception
    malformed = data.verify("hm <answer>1</answer>", example)
    assert (malformed.reward, malformed.accuracy, malformed.format, malformed.grounded) == (0.9, 1, 0, 0)
    blank = data.verify(data.respond("", "so", "1"), example)
    assert blank.format == 0 and data.verify(data.respond("x", "y", ""), example).reward == 0
    assert data.verify(data.respond("x", "y", "2"), example).reward == 0.1
    assert data.verify(data.respond("x", "y", "1") + "<answer>2</answer>", example).reward == 0


@pytest.mark.parametrize(
    "given, truth, equal",
    [("3", "3.0", 1), ("1,000", "1000", 1), ("1/2", "0.5", 1), ("-7", "7", 0), ("\u22127", "-7", 1), ("7.", "7", 1), ("12", "1", 0),
     ("(B)", "b", 1), ("B.", "B", 1), ("A dog", "a", 0), ("Same", "same", 1), (" two  words ", "Two words", 1), ("", "", 0),
     ("1e999999999", "1", 0), ("nan", "NaN", 1), ("3 apples", "3", 0), (".", "", 0), ("0" * 5000, "0", 0), ("1/0", "1", 0),
     ("-5 cm", "5 cm", 0), (".5 m", "5 m", 0), ("<5", ">5", 0), ("<", "<", 1), ("C++", "C", 0), ("(-2, 3)", "(2, 3)", 0),
     ("**3**", "3", 1), ("(3)", "3", 1), ("'red'", "red", 1), ("(1) + (2)", "1) + (2", 0), ("\u00e9", "e\u0301", 1), (".5", "0.5", 1)],
)  # fmt: skip
def test_answers(given, truth, equal):
    assert data.answers_match(given, truth) == bool(equal)


@pytest.fixture
def jsonl(tmp_path):
    """A data file of 20 rows with 10 images; returns a function that replaces one line and gives the path."""
    for i in range(10):
        Image.new("RGB", (40 + i, 30), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i % 10}.png", "question": "How many red?", "answer": i % 3} for i in range(20)]
    lines = [json.dumps(row) for row in rows]

    def write(line=None, lines=lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines[:2] + [line] + lines[3:] if line else lines), encoding="utf-8")
        return path

    return write


def test_your_own_data(jsonl):
    boxed = data.own_task(jsonl(json.dumps({"image": "2.png", "question": "?", "answer": r"\\boxed{12}"})), eval_only=True)
    assert "12" in {e.answer for e in boxed.eval_set(99)}
    task = data.own_task(jsonl(json.dumps({"images": ["2.png", "3.png"], "question": "Same?", "answer": "no"})), seed=1)
    seen = [e.source for step in range(6) for e in task.train_batch(step, 3)]
    held_out = {e.source for e in task.eval_set(9)}
    assert held_out and not held_out & set(seen)
    rows = 20 - len(held_out)
    assert rows == len(set(e.source for e in task.train_batch(0, rows)))  # one epoch sees every row once
    assert [e.source for e in task.train_batch(4, 3)] == seen[12:15]
    assert max(len(e.images) for e in task.train_batch(0, rows) + task.eval_set(9)) == 2
    everything = data.own_task(task.name, eval_only=True).eval_set(99)
    assert len(everything) == 20
    folder = Path(task.name).parent
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())  # the same image by other names stays in one split
    rows = [json.dumps({"image": name, "question": "q\u2028?", "answer": True}, ensure_ascii=False) for name in
            ("0.png", "./0.png", "copy.png", *(f"{i}.png" for i in range(1, 10)))]  # fmt: skip
    task = data.own_task(jsonl(lines=["\ufeff" + rows[0], *rows[1:]]))
    pixels = lambda examples: {e.images[0].tobytes() for e in examples}  # noqa: E731
    assert len(pixels(task.eval_set(99))) == 1 and not pixels(task.eval_set(99)) & pixels(task.train_batch(0, 30))
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    deep.save(folder / "deep.png")
    assert len(set(data.open_image(folder / "deep.png", "x").getchannel(0).tobytes())) > 50
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    clear.save(folder / "clear.png")
    assert data.open_image(folder / "clear.png", "x").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("answer", "question", "given", "right"),
    [
        ("B", "Which?", "(b)", True),
        ("B", "Which?", "B. 12 cm", True),
        ("B", "Which?", "option B", True),
        ("B", "Which?\nA. 10 cm\nB. 12 cm", "12 cm", True),
        ("B", "Which?\nA. 10 cm\nB. 12 cm", "10 cm", False),
        ("B. 12 cm", "Which?", "B", True),
        ("B", "Which?", "Blue", False),
        ("B", "Which?", "A. B is wrong", False),
        ("12", "Which?", r"so \boxed{12}", True),
        ("12", "Which?", r"\boxed{\frac{1}{2}} or \boxed{12", False),
        (r"\frac{1}{2}", "Which?", r"\boxed{\frac{1}{2}}", True),
    ],
)
def test_multiple_choice_and_boxed_answers(answer, question, given, right):
    text = data.respond("a", "b", given)
    assert data.verify(text, data.Example((), question, answer)).accuracy == float(right)


def test_math_verify_is_asked_when_it_is_wanted(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert train.main(["--verifier", "math"]) == 2 and "pip install 'math-verify" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")
    example, text = data.Example((), "?", r"\sqrt{12}"), data.respond("a", "b", r"$2\sqrt{3}$")
    assert data.verify(text, example).accuracy == 0 and data.verify(text, example, match=data.math_match).accuracy == 1
    assert data.verify(text.replace("3", "5"), example, match=data.math_match).accuracy == 0
    for given, truth in (("act", "cat"), ("no", "on"), ("lube", "blue")):  # to math-verify products of the same letters
        assert not data.math_match(given, truth)


def test_data_sets_of_the_hub(tmp_path, capsys, policy, cache):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    pictures = [Image.new("RGB", (56, 56), (20 * i, 0, 0)) for i in range(12)]
    one = {"image": pictures, "problem": ["Is it <image>red?"] * 12, "answer": [str(i) for i in range(12)]}
    many = {"images": [[p, p] for p in pictures], "question": ["Same?"] * 12, "solution": [r"I see. \boxed{yes}"] * 12}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "question": datasets.Value("string"), "solution": datasets.Value("string")})
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(one).cast_column("image", datasets.Image())}).save_to_disk(str(tmp_path / "one"))
    datasets.Dataset.from_dict(many, features=features).save_to_disk(str(tmp_path / "many"))
    task = data.own_task(f"hub:{tmp_path / 'one'}:test")
    examples = task.train_batch(0, 11) + task.eval_set(9)
    assert {e.answer for e in examples} == {str(i) for i in range(12)} and examples[0].source.endswith(f"row {examples[0].answer}")
    assert all(e.images[0].getpixel((5, 5))[0] == 20 * int(e.answer) for e in examples)
    ids = policy.encode(examples[:1]).ids[0].tolist()  # the image stands where the question marks it
    red, image = policy.tokenizer("red?", add_special_tokens=False)["input_ids"][0], policy.image_token
    before = ids[: ids.index(image)]
    assert len(before) > 4 and red in ids[ids.index(image) :] and red not in before
    task = data.own_task(f"hub:{tmp_path / 'many'}")
    assert {(len(e.images), e.answer) for e in task.train_batch(0, 11)} == {(2, "yes")}
    for name, said in ((f"hub:{tmp_path / 'one'}", "cannot be loaded"), (f"hub:{tmp_path / 'none'}", "cannot be loaded")):
        assert train.main(["--data", name, "--model", "tiny", "--cache", cache, "--out", str(tmp_path / "run")]) == 2
        assert f"error: --data {name}: {said}" in capsys.readouterr().err
    datasets.Dataset.from_dict({"image": ["a.png"], "answer": ["1"]}).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(data.InputError, match="no column problem or question, only image, answer"):
        data.own_task(f"hub:{tmp_path / 'bare'}")
    told = {"image": pictures, "question": ["Same?"] * 12, "solution": ["They have the same color, so yes."] * 12}
    for name, column in (("solution", told["solution"]), ("answer", [["yes", "yeah"]] * 12)):
        rows = datasets.Dataset.from_dict({"image": pictures, "question": ["Same?"] * 12, name: column})
        rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / f"bad-{name}"))
        with pytest.raises(data.InputError, match=f"bad-{name} row 0: "):
            data.own_task(f"hub:{tmp_path / f'bad-{name}'}")


# ---------------------------------------------------------------------------------------------------------- the policy


@pytest.fixture(scope="module")
def policy():
    return model.build_tiny(seed=0)


@pytest.fixture(scope="module")
def scored(policy):
    """Four prompts of unequal length, a rollout of two responses each, and well-formed demonstrations."""
    examples = data.DrawnTask("count").train_batch(0, 3) + data.DrawnTask("compare").train_batch(0, 1)
    prompts = policy.encode(examples, lambda i, image: corrupt(image, patch=policy.patch, seed=i))
    rollout = policy.sample(
        prompts, 2, max_new_tokens=24, temperature=0.7, generator=torch.Generator().manual_seed(0)
    )
    written = policy.as_rollout([data.demonstrate(e, 0.0, np.random.default_rng(0)) for e in examples])
    return prompts, rollout, written


def roles_and_visible(policy, written):
    roles = torch.zeros(written.mask.shape, dtype=torch.long)
    for row, (text, offsets) in enumerate(policy.decode(written)):
        roles[row, : len(offsets)] = token_roles(text, offsets)
    return roles, without_perception(written.mask, roles)


def test_sampled_log_probs_are_the_scored_ones(policy, scored):
    prompts, rollout, _ = scored
    assert (prompts.mask == 0).any()
    with torch.no_grad():
        logp, entropy = policy.log_probs(prompts, rollout, temperature=0.7)
        alone, _ = policy.log_probs(prompts, rollout[torch.tensor([5])], temperature=0.7)
    assert torch.allclose(logp, rollout.logp, atol=1e-4) and (entropy[rollout.mask] > 0).all()
    assert torch.allclose(alone[0], logp[5], atol=1e-5)  # property 8: whatever else is in the batch


def test_the_fast_path_has_the_log_probs_and_gradients_of_the_plain_one(policy, scored):
    """Prompts read once, hidden and trailing tokens left out, against every row with its own prompt and all its tokens."""
    prompts, rollout, written = scored
    roles, visible = roles_and_visible(policy, written)
    rows = torch.tensor([1, 6, 7, 0])  # parts of groups, in any order
    results = []
    for policy.share_prompts in (False, True):
        policy.model.zero_grad()
        score = lambda which, **options: policy.log_probs(prompts, which, temperature=0.7, **options)[0]  # noqa: E731
        found = [score(rollout[rows]), score(written)]
        found += [score(written, corrupted=True, wanted=roles == P), score(written, visible=visible, wanted=roles == R)]
        sum(x.sum() for x in found).backward()
        with torch.no_grad():
            found.append(score(rollout, reuse=True))
            found.append(score(rollout, wanted=torch.zeros_like(rollout.mask)))
            first = replace(written, ids=written.ids[:, :1], mask=written.mask[:, :1])
            found.append(score(first))
        results.append([x.detach() for x in found] + [p.grad.clone() for p in policy.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*results, strict=True))
    assert torch.equal(results[1][3] != 0, roles == R) and not results[1][5].any()


def test_micro_batches_keep_groups_together_and_stay_within_the_budget(scored):
    lengths, prompt = torch.randint(1, 40, (48,)), torch.arange(12).repeat_interleave(4)
    mask = torch.arange(40) < lengths[:, None]
    rollout = model.Rollout(mask.long(), mask, mask.float(), prompt)
    used = torch.tensor([b for b in range(48) if b % 5])
    batches = train.micro_batches(rollout, used, prompt_length=30, budget=400)
    assert sorted(torch.cat(batches).tolist()) == used.tolist() and 3 < len(batches) < 12
    assert all(30 * len(set(prompt[b].tolist())) + len(b) * lengths[b].max() <= 400 for b in batches)
    assert [len(b) for b in train.micro_batches(rollout, used[:5], 30, 1)] == [1] * 5
    assert train.micro_batches(rollout, used[:0], 30, 400) == []


def test_draws_have_the_given_probabilities():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]]).expand(20000, -1)
    drawn = model.draw(p, torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    torch.testing.assert_close(drawn.flatten().bincount(minlength=6) / 20000, p[0], atol=0.015, rtol=0)
    assert set(drawn.flatten().tolist()) == {1, 3, 4}  # never what has no probability, at either end or between


def test_placeholders_and_unknown_ids_are_neither_sampled_nor_counted(policy):
    hidden = torch.randn(5, 128)
    probabilities = policy._log_softmax(hidden, 1.0).exp()
    assert policy.forbidden.tolist() == [policy.model.config.image_token_id, policy.model.config.video_token_id]
    assert (probabilities[:, policy.forbidden] == 0).all() and torch.allclose(probabilities.sum(1), torch.ones(5))


@pytest.mark.parametrize("share", [False, True])
def test_hidden_perception_equals_removed_perception_and_contrasts_are_not_zero(policy, scored, share, monkeypatch):
    monkeypatch.setattr(policy, "share_prompts", share)
    prompts, _, written = scored
    roles, visible = roles_and_visible(policy, written)
    with torch.no_grad():
        logp, _ = policy.log_probs(prompts, written, temperature=1.0)
        corrupted, _ = policy.log_probs(prompts, written, temperature=1.0, corrupted=True)
        blank, _ = policy.log_probs(prompts, written, temperature=1.0, visible=visible)
        for row in range(4):
            kept = visible[row].bool()
            cut = model.Rollout(written.ids[row, kept][None], kept[kept][None], torch.zeros(1), written.prompt[[row]])
            removed, _ = policy.log_probs(prompts, cut, temperature=1.0)
            reasoning = roles[row] == R
            assert reasoning.sum() > 3
            removed = removed[0, reasoning[kept]]
            assert ((blank[row, reasoning] - removed) / removed).abs().max() < 1e-6  # a few float32 roundings
    scores = contrast_scores(logp, corrupted, blank, roles)
    assert (scores[roles == P].abs() > 1e-4).all() and (scores[roles == R].abs() > 1e-4).all()


def test_logits_exist_only_for_a_chunk_of_response_positions(policy, scored):
    prompts, rollout, _ = scored
    sizes, chunk = [], policy.chunk
    hook = policy.model.lm_head.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    try:
        gradients = []
        for policy.chunk in (7, chunk):
            policy.model.zero_grad()
            logp, _ = policy.log_probs(prompts, rollout, temperature=1.0)
            logp.sum().backward()
            gradients.append(policy.model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
            if policy.chunk == 7:
                assert max(sizes) == 7 and sum(sizes) == 2 * rollout.mask.sum()  # again in the backward pass
    finally:
        hook.remove()
        policy.chunk = chunk
    assert torch.allclose(*gradients, atol=1e-4)


def test_saved_folder_restores_every_weight_and_word(policy, tmp_path):
    policy.save(tmp_path)
    again = model.load(str(tmp_path))
    mine, theirs = policy.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    example = data.DrawnTask("add").train_batch(0, 1)
    one, other = policy.encode(example), again.encode(example)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.pixels[0], other.pixels[0]) and again.eos == policy.eos
    weights = next(tmp_path.glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors = {k.replace("layers.1", "layer.1"): v for k, v in tensors.items()}  # names that do not match
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(data.InputError, match="missing"):
        model.load(str(tmp_path))


TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
EYES = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
FAMILY = {
    "Qwen2VLConfig": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    "Qwen2_5_VLConfig": EYES | {"window_size": 56, "fullatt_block_indexes": [1]},
    "Qwen3VLConfig": EYES | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
}


def hub_folder(folder, name, policy):
    """A small random model of class `name` in the layout of the hub, with the generation_config that Qwen2-VL ships."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    sizes = {"vocab_size": len(policy.tokenizer) + 30, "head_dim": 16, "initializer_range": 0.1, "rope_parameters": rope}
    ids = {k: getattr(policy.model.config, k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    torch.manual_seed(0)
    eyes = FAMILY[name] | {"initializer_range": 0.1}
    config = getattr(transformers, name)(text_config=TEXT | sizes, vision_config=eyes, instruction="", **ids)
    net = transformers.AutoModelForImageTextToText.from_config(config)
    settings = {"do_sample": True, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05, "eos_token_id": [policy.eos[0], policy.pad]}
    net.generation_config = transformers.GenerationConfig(**settings, pad_token_id=policy.pad)
    net.save_pretrained(folder, max_shard_size="100KB")
    policy.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").rename(folder / "chat_template.json")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": model.TINY_TEMPLATE}))
    side = config.vision_config.patch_size
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": side, "merge_size": 2, "temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"min_pixels": 4 * side**2, "max_pixels": 10**6}))
    return str(folder)


@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_runs_through_the_same_code(name, policy, tmp_path):
    folder = hub_folder(tmp_path / "hub", name, policy)
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 3
    its = model.load(folder, max_pixels=100 * 100)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, size, dtype=np.uint8)) for i, size in
              enumerate([(64, 64, 3), (90, 200, 3), (300, 300, 3)])]  # fmt: skip
    examples = [data.Example(tuple(images[:1]), "What color is at b2?", "red"), data.Example(tuple(images), "How many red?", "2")]
    assert all(w * h <= 100 * 100 + 64 * 64 and w % its.factor == 0 for w, h in (its.fit(i).size for i in images))
    prompts = its.encode(examples, lambda i, image: corrupt(image, patch=its.patch, seed=i))
    rollout = its.sample(prompts, 8, max_new_tokens=12, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in rollout.ids[:8].tolist()}) > 4  # top_k = 1 has not leaked in
    assert not torch.isin(rollout.ids, its.forbidden).any() and len(its.forbidden) == 32
    texts = [data.respond(" a1 red circle", " a1 red so 1", " 1"), data.respond(" b2 blue square, c1 red circle", " b2 no so 0", " 0")]
    written = its.as_rollout(texts)
    roles, visible = roles_and_visible(its, written)
    found = []
    for its.share_prompts in (False, True):
        its.model.zero_grad()
        logp, _ = its.log_probs(prompts, rollout, temperature=1.0)
        assert torch.allclose(logp, rollout.logp, atol=1e-4)  # ratio 1
        with torch.no_grad():
            plain, _ = its.log_probs(prompts, written, temperature=1.0)
            corrupted, _ = its.log_probs(prompts, written, temperature=1.0, corrupted=True, wanted=roles == P)
            blank, _ = its.log_probs(prompts, written, temperature=1.0, visible=visible, wanted=roles == R)
        scores = contrast_scores(plain, corrupted, blank, roles)
        assert (scores[roles == P].abs() > 1e-5).all() and (scores[roles == R].abs() > 1e-5).all()
        loss, _ = policy_loss(logp, rollout.logp, torch.linspace(-1, 1, 16), rollout.mask)
        loss.backward()
        found.append([scores] + [p.grad.clone() for p in its.model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(*found, strict=True))
    before = {k: v.clone() for k, v in its.model.state_dict().items()}
    torch.optim.AdamW(its.model.parameters(), lr=1e-3).step()
    its.save(tmp_path / "saved")
    mine, again = its.model.state_dict(), model.load(str(tmp_path / "saved")).model.state_dict()
    assert mine.keys() == again.keys() and all(torch.equal(mine[k], again[k]) for k in mine)
    assert sum(not torch.equal(mine[k], before[k]) for k in mine) > len(mine) / 2


def test_a_placeholder_in_the_question_is_refused(policy):
    example = data.DrawnTask("count").train_batch(0, 1)[0]
    with pytest.raises(data.InputError, match="rows.jsonl:7.*image_pad"):
        policy.encode([replace(example, question="see <|image_pad|>", source="rows.jsonl:7")])


# ------------------------------------------------------------------------------------------------- the command line

QUICK = ["--eval-size", "128", "--eval-every", "0"]  # the default task and warm-up


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def evals(folder):
    return [r["eval"] for r in train.read_log(Path(folder)) if "eval" in r]


def numbers(folder):
    """All records of a run, seconds aside."""
    return [{k: v for k, v in r.items() if not k.startswith("sec_")} for r in train.read_log(Path(folder))]


def test_training_improves_and_its_grpo_twin_too(cache, tmp_path, capsys):
    for algo in ("srpo", "grpo"):
        out = tmp_path / algo
        assert train.main([*QUICK, "--cache", cache, "--out", str(out), "--algo", algo, "--steps", "20"]) == 0
        shown = capsys.readouterr().out
        assert "before the first update: ratio" in shown and "step 20" in shown and shown.count("the response is") == 3
        first, last = evals(out)
        assert last["reward"] > first["reward"] + 0.04, (algo, first, last)
        steps = [r for r in train.read_log(out) if "eval" not in r]
        assert [r["step"] for r in steps] == list(range(1, 21))
        assert all(r["grad_norm"] > 0 and r["used_groups"] > 0 and r["kl"] is None for r in steps)
        weights = [r["w_perception"] for r in steps]
        assert (min(weights) == max(weights) == 1) == (algo == "grpo")
    twins = [train.read_log(tmp_path / algo) for algo in ("srpo", "grpo")]
    assert twins[0][0] == twins[1][0] and twins[0][1]["reward"] == twins[1][1]["reward"]  # same start, same first batch


def run(*argv):
    return subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


SMALL = ["--steps", "6", "--prompts", "4", "--group-size", "4", "--save-every", "2", "--eval-size", "16", "--kl-coef", "0.01"]


def test_a_killed_run_resumes_to_the_same_numbers(cache, tmp_path):
    options = [*QUICK, *SMALL, "--inner-epochs", "2", "--micro-batch", "300", "--cache", cache]
    assert train.main([*options, "--out", str(tmp_path / "whole")]) == 0
    expected = numbers(tmp_path / "whole")
    assert len(expected) == 8 and expected[3]["kl"] > 0
    out = tmp_path / "killed"
    for lines in (2, 5):  # before the first checkpoint, and after it
        process = run(*([*options, "--out", str(out)] if lines == 2 else ["--resume", str(out)]))
        while process.poll() is None and len(train.read_log(out)) < lines:
            time.sleep(0.01)
        assert process.poll() is None, process.stdout.read()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "rew')  # cut off in the middle of a line
    torn = out / "checkpoint-000006.1.tmp"
    torn.mkdir()  # left by a kill inside a save
    assert train.main(["--resume", str(out)]) == 0
    assert numbers(out) == expected
    assert not torn.exists()
    weights = [model.load(str(train.checkpoints(f)[-1])).model.state_dict() for f in (tmp_path / "whole", out)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert train.main(["--resume", str(out)]) == 0 and numbers(out) == expected  # nothing left to do


def test_micro_batches_and_the_plain_path_do_not_change_a_step(cache, tmp_path):
    """One step with the whole batch, in many pieces, and with every prompt read anew: the same loss, gradient and weights."""
    steps = []
    for i, options in enumerate(([], ["--micro-batch", "100"], ["--plain"])):
        out = tmp_path / str(i)
        assert train.main([*QUICK, *SMALL, *options, "--steps", "1", "--cache", cache, "--out", str(out)]) == 0
        steps.append([r for r in numbers(out) if "eval" not in r][0])
    assert steps[0]["grad_norm"] > 0 and steps[0]["w_perception"] != 1
    for other in steps[1:]:
        assert other == {k: pytest.approx(v, rel=1e-3, abs=1e-6) for k, v in steps[0].items()}


def complaint(capsys, *argv):
    """The one line that `train.py` answers to bad input."""
    try:
        code = train.main(list(map(str, argv)))
    except SystemExit as exit:
        code = exit.code
    stderr = capsys.readouterr().err
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, (code, stderr)
    return stderr


def test_every_open_choice_changes_a_step_and_groups_are_kept(cache, tmp_path):
    """Each switch of the ledger reaches the update; what is kept of a group is what the step computed."""
    base = [*QUICK, "--cache", cache, "--steps", "2", "--prompts", "8", "--eval-size", "2", "--save-every", "0"]
    norms = {}
    for switch in ("", "--role-balanced", "--sign-aware", "--no-renormalization", "--answer-is-reasoning", "--corrupt-both", "--w-max 1.1"):
        out = tmp_path / (switch or "default").split()[0]
        assert train.main([*base, *switch.split(), "--out", str(out)]) == 0
        norms[switch] = train.read_log(out)[1]["grad_norm"]
    assert len(set(norms.values())) == len(norms)
    groups = train.read_log(tmp_path / "default", "samples.jsonl")
    assert groups and {g["step"] for g in groups} == {1}
    for response in (r for g in groups for r in g["responses"] if r["delta"] and set(r["roles"]) == {0, 1, 2}):
        delta, roles = torch.tensor([response["delta"]]), torch.tensor([response["roles"]])
        w = srpo.token_weights(delta, roles)
        torch.testing.assert_close(torch.tensor([response["weights"]]), w, atol=1e-3, rtol=0)
        torch.testing.assert_close(torch.tensor([response["advantages"]]), response["advantage"] * w, atol=3e-3, rtol=0)
        assert response["baseline"] == pytest.approx(srpo.shared_baseline(delta, roles).item(), abs=1e-3)
        assert len(response["offsets"]) in (len(response["roles"]), len(response["roles"]) - 1)


def test_a_diverged_policy_is_reported(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model.Policy, "_log_softmax", lambda self, hidden, _: torch.full((len(hidden), 50), float("nan")))
    assert train.main([*QUICK, "--cache", cache, "--out", str(tmp_path / "run")]) == 2
    assert "error: the policy has diverged" in capsys.readouterr().err


def test_bad_options(capsys, tmp_path, policy, cache):
    text_only = tmp_path / "text-only"
    text_only.mkdir()
    (text_only / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    policy.save(tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    capsys.readouterr()
    for argv, needle in {
        ("--model", tmp_path / "none"): "none",
        ("--model", "no-such-owner/no-such-model"): "no-such-owner/no-such-model",
        ("--model", tmp_path / "empty"): "empty",
        ("--model", text_only): "sees no images",
        ("--model", tmp_path / "cut"): "cannot be loaded",
        ("--device", "cuda:99"): "--device cuda:99",
        ("--device", "banana"): "banana",
        ("--device", "meta"): "meta",
        ("--seed", "9" * 30): "seed",
        ("--temperature", "nan"): "temperature",
        ("--group-size", "1"): "group-size",
        ("--prompts", "0"): "prompts",
        ("--temperature", "0"): "temperature",
        ("--tau", "x"): "tau",
        ("--lam", "2"): "lam",
        ("--corruption", "melt"): "melt",
        ("--task", "chess"): "chess",
        ("--out", tmp_path / "file" / "sub"): "cannot be written",
        ("--resume", tmp_path / "none"): "not the folder of a run",
        ("--resume", text_only): "not the folder of a run",
        ("--frobnicate",): "frobnicate",
    }.items():
        out = () if "--out" in argv or "--resume" in argv else ("--out", tmp_path / f"out-{len(list(tmp_path.iterdir()))}")
        assert needle in complaint(capsys, *argv, *out), argv


def test_a_used_folder_and_contradicting_options_are_refused(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    kept = tmp_path / "run" / "args.json"
    kept.write_text(json.dumps({"lr": 1e-4, "steps": 3}))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "eval": {}}\n')
    assert "--resume" in complaint(capsys, "--out", tmp_path / "run")
    assert "--lr" in complaint(capsys, "--resume", tmp_path / "run", "--lr", "0.5")
    assert "--out" in complaint(capsys, "--resume", tmp_path / "run", "--out", tmp_path / "other")
    assert json.loads(kept.read_text()) == {"lr": 1e-4, "steps": 3}


def test_bad_data(capsys, tmp_path, jsonl, monkeypatch):
    row = {"image": "0.png", "question": "q", "answer": "a"}
    (tmp_path / "short.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (2000, 2000)).save(tmp_path / "big.png")
    Image.new("L", (900, 2)).save(tmp_path / "long.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    lines = {
        json.dumps(row | {"image": "gone.png"}): "does not exist",
        json.dumps(row | {"image": "short.png"}): "cannot be decoded",
        json.dumps(row | {"image": "text.png"}): "cannot be decoded",
        json.dumps(row | {"image": "big.png"}): "too large",
        json.dumps(row | {"image": "long.png"}): "200 to 1",
        json.dumps(row | {"image": "."}): "cannot be decoded",
        '{"image": "0.png", "question"': "expected one JSON object",
        json.dumps({"image": "0.png", "question": "q"}): "expected one JSON object",
        json.dumps([1]): "expected one JSON object",
        json.dumps(row | {"images": []}): "expected one JSON object",
        json.dumps(row | {"answer": None}): "expected one JSON object",
        json.dumps(row | {"images": "0.png"}): "expected one JSON object",
        json.dumps(row | {"question": "\ud83d"}): "expected one JSON object",
        "[" * 100_000: "expected one JSON object",
        json.dumps(row | {"answer": " ."}): "blank",
        json.dumps(row | {"question": "what is <|image_pad|>?"}): "placeholder",
    }
    out = ("--out", tmp_path / "out")  # the same each time: a run that never started leaves it free
    for line, needle in lines.items():
        message = complaint(capsys, "--data", jsonl(line), *out)
        assert needle in message and "rows.jsonl:3:" in message, message
    for content, needle in (([], "empty"), ([json.dumps(row)] * 3, "two different images")):
        assert needle in complaint(capsys, "--data", jsonl(lines=content), "--out", tmp_path / f"out{len(content)}")
    assert "cannot be read" in complaint(capsys, "--data", tmp_path / "0.png", "--out", tmp_path / "out1")


def test_out_of_memory_says_what_to_lower(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(model, "build_tiny", full)
    message = complaint(capsys, "--out", tmp_path / "out", "--cache", tmp_path)
    assert all(option in message for option in ("--micro-batch", "--max-new-tokens", "--max-pixels", "--lora"))


def test_small_updates_move_fp32_masters_and_would_not_move_bf16_weights():
    """Why weights stay fp32 when computing in bf16: at lr 1e-6 an update is below half an ulp of a bf16 weight."""
    for dtype, moved in ((torch.float32, True), (torch.bfloat16, False)):
        policy = model.build_tiny(0, dtype=torch.bfloat16)
        policy.model.to(dtype)
        examples = data.DrawnTask("count").train_batch(0, 2)
        logp, _ = policy.log_probs(policy.encode(examples), policy.as_rollout(["<answer> 1</answer>"] * 2), temperature=1.0)
        assert logp.dtype == torch.float32
        logp.sum().backward()
        weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        torch.optim.AdamW(policy.model.parameters(), lr=1e-6, weight_decay=0.0).step()
        changed = (weight != before).float().mean().item()
        assert (changed > 0.9) == moved and (moved or changed < 0.05), (dtype, changed)


def test_lora_trains_adapters_only_and_merges(cache, tmp_path, capsys, monkeypatch):
    options = [*QUICK, *SMALL, "--steps", "3", "--save-every", "2", "--cache", cache, "--lr", "1e-3"]
    try:
        import peft  # noqa: F401
    except ImportError:
        assert "pip install peft" in complaint(capsys, *options, "--lora", "4", "--out", tmp_path / "none")
        pytest.skip("peft is not installed")
    out = tmp_path / "lora"
    assert train.main([*options, "--lora", "4", "--merge-lora", "--out", str(out)]) == 0
    assert [r["kl"] for r in train.read_log(out) if r["step"] == 1 and "kl" in r] == [0.0]  # adapters start as nothing
    assert train.read_log(out)[3]["kl"] > 0
    folder = train.checkpoints(out)[-1]
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    adapted, merged = model.load(str(folder)), model.load(str(out / "merged"))
    base = model.load(str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]))
    examples = data.DrawnTask("count").train_batch(0, 2)
    written = adapted.as_rollout([data.demonstrate(e, 0.0, np.random.default_rng(0)) for e in examples])
    score = lambda policy: policy.log_probs(policy.encode(examples), written, temperature=1.0)[0].detach()  # noqa: E731
    assert torch.allclose(score(adapted), score(merged), atol=1e-4)
    with adapted.as_reference():
        assert torch.allclose(score(adapted), score(base), atol=1e-5)
    assert not torch.allclose(score(adapted), score(base), atol=1e-3)


def test_own_data_trains_and_evaluates(jsonl, tmp_path, capsys, cache):
    out = tmp_path / "out"
    options = ["--data", str(jsonl()), *QUICK, *SMALL, "--cache", cache, "--max-new-tokens", "8", "--temperature", "3"]
    assert train.main([*options, "--steps", "1", "--out", str(out)]) == 0
    start, step, end = train.read_log(out)
    assert step["grounded"] is None and start["eval"]["n"] == 2 and end["step"] == 1
    folder = str(train.checkpoints(out)[-1])
    capsys.readouterr()
    for which in (["--model", folder, "--data", str(jsonl()), "--max-new-tokens", "8"], ["--resume", str(out)]):
        assert train.main([*which, "--eval-only"]) == 0
        shown = json.loads(capsys.readouterr().out.splitlines()[0])
        assert shown["eval"]["n"] in (16, 20) and shown["step"] == (which[0] == "--resume")
    assert train.read_log(out) == [start, step, end]
