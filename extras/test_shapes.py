"""Tests of inputs of the method: shapes, dtypes, padding, extremes, options that are refused.

pip install pytest, then python -m pytest -q extras/test_shapes.py
"""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from srpo import (  # noqa: E402
    contrast_scores,
    group_advantages,
    kl_to_reference,
    policy_loss,
    role_aware_advantages,
    shared_baseline,
    token_weights,
    without_perception,
)
from test_srpo import NAN, batch, delta_of, weights_of  # noqa: E402, F401

# ---- shapes and options


@pytest.mark.parametrize(
    ("rewards", "group_size"),
    [([1.0, 0.0], 1), ([1.0, 0.0, 0.0], 2), ([], 2), ([[1.0, 0.0]], 2)],
)
def test_rewards_that_are_no_groups_are_refused(rewards, group_size):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(rewards, group_size)


def test_shapes_that_do_not_fit_are_named(batch):  # noqa: F811
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
        {"tau": math.inf},
        {"w_min": 1e-30, "w_max": 1e30},  # a weight of 1e-60 would be 0
        {"w_min": 2.0, "w_max": 1.0},
    ],
)
def test_weights_refuse_bad_options(batch, options):  # noqa: F811
    with pytest.raises(ValueError, match="need tau"):
        weights_of(batch, **options)


@pytest.mark.parametrize("lam", [-0.1, 1.5])
def test_lambda_outside_0_to_1_is_refused(lam):
    with pytest.raises(ValueError, match="lam"):
        role_aware_advantages(torch.ones(2), torch.ones(2, 3), lam)


# ---- dtypes


def in_bfloat16(inputs):
    half = dict(inputs)
    for name in ("logp", "old_logp", "corrupted", "blank", "ref_logp"):
        half[name] = inputs[name].bfloat16()
    return half


def test_half_precision_is_computed_in_float32(batch):  # noqa: F811
    half = in_bfloat16(batch)
    same_numbers = dict(batch)
    for name in ("old_logp", "corrupted", "blank"):
        same_numbers[name] = half[name].float()
    assert weights_of(half).dtype == torch.float32
    assert torch.equal(delta_of(half), delta_of(same_numbers))


def test_masks_may_have_any_dtype(batch):  # noqa: F811
    half = in_bfloat16(batch)
    A = group_advantages(batch["rewards"], 4)
    losses = []
    for dtype in (torch.bool, torch.long, torch.float):
        mask = batch["mask"].to(dtype)
        loss, _ = policy_loss(half["logp"], half["old_logp"], A, mask)
        losses.append(loss)
    assert losses[0] == losses[1] == losses[2]
    assert losses[0].dtype != torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long, torch.float])
def test_without_perception_keeps_the_dtype_of_its_mask(batch, dtype):  # noqa: F811
    hidden = without_perception(batch["mask"].to(dtype), batch["roles"])
    assert hidden.dtype == dtype
    assert torch.equal(hidden.bool(), without_perception(batch["mask"], batch["roles"]))


# ---- padding, and extremes


@pytest.mark.parametrize("pad", [(3, 0), (0, 3)], ids=["left", "right"])
def test_padding_may_hold_anything_on_either_side(batch, pad):  # noqa: F811
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


def test_an_empty_mask_gives_zeros():
    empty = torch.zeros(2, 4)
    loss, stats = policy_loss(empty, empty, torch.ones(2), empty)
    assert loss == 0
    assert stats["clip_frac"] == 0
    assert kl_to_reference(empty, empty, empty) == 0


def test_large_rewards_keep_their_spread():
    A = group_advantages([1e9, 1e9 + 1, 1e9 + 2], 3)
    assert A.tolist() == pytest.approx([-1, 0, 1], abs=1e-3)
    assert A.dtype == torch.float32


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_overflowing_ratios_stay_finite(advantage):
    logp = torch.zeros(1, 4, requires_grad=True)
    mask = torch.ones(1, 4)
    loss, _ = policy_loss(logp, logp.detach() - 120, torch.tensor([advantage]), mask)
    (loss + kl_to_reference(logp, logp.detach() + 200, mask)).backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()
