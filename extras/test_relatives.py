"""Tests of the readings that weigh all tokens, VPPO's, PGPO's and ToR's, against plain loops.

pip install pytest, then python -m pytest -q extras/test_relatives.py
"""

import math
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from test_readings import ALL_TOKENS, DEFAULTS, LENGTHS, batch, weigh  # noqa: E402, F401

from srpo import role_aware_advantages  # noqa: E402


def contrasts_at_tokens(responses: dict) -> list[dict]:
    """For each response the contrast with the corrupted image by position; none if not finite."""
    rows = []
    for i, length in enumerate(LENGTHS):
        row = {}
        for t in range(length):
            row[t] = (responses["logp"][i, t] - responses["logp_corrupted"][i, t]).item()
        finite = all(math.isfinite(x) for x in row.values())
        rows.append(row if finite else {})
    return rows


def k3_of(contrast: float) -> float:
    return math.exp(-contrast) - 1 + contrast


def keys_of_largest(x: dict, share: float) -> set:
    ordered = sorted(x, key=x.get, reverse=True)
    return set(ordered[: math.ceil(share * len(x))])


def loop_vppo(responses):
    dependency = []
    for row in contrasts_at_tokens(responses):
        dependency.append({t: min(k3_of(x), 10) for t, x in row.items()})
    score = [fmean(row.values()) for row in dependency if row]
    share = [(x - min(score)) / (max(score) - min(score)) for x in score]
    scales = [0.9 + 0.1 * x / fmean(share) for x in share]
    expected = []
    for row in dependency:
        top = keys_of_largest(row, 0.4)
        scale = scales.pop(0) if row else 1.0
        expected.append({t: scale if t in top else 0.0 for t in row})
    return expected


def loop_pgpo(responses):
    expected = []
    for row in contrasts_at_tokens(responses):
        d = {t: math.log(1 + k3_of(x)) for t, x in row.items()}
        w = {}
        for t in d:
            share = (d[t] - min(d.values())) / (max(d.values()) - min(d.values()))
            if share < 0.4:
                w[t] = share / 0.4
            else:
                w[t] = 1 + 2 * (share - 0.4) / 0.6
        expected.append({t: w[t] * len(w) / sum(w.values()) for t in w})
    return expected


def loop_tor(responses):
    rows = contrasts_at_tokens(responses)
    size = {}
    entropy = {}
    for i, row in enumerate(rows):
        for t in row:
            size[i, t] = abs(row[t])
            entropy[i, t] = responses["entropy"][i, t].item()
    dependent = keys_of_largest(size, 0.3)
    uncertain = keys_of_largest(entropy, 0.3)
    expected = []
    for i, row in enumerate(rows):
        w = {}
        for t in row:
            w[t] = 0.0
            if (i, t) in dependent:
                w[t] = 0.5
            if (i, t) in uncertain:
                w[t] = 1.0
        expected.append(w)
    return expected


@pytest.mark.parametrize("name", ALL_TOKENS)
def test_a_relative_equals_its_loop(batch, name):  # noqa: F811
    """At tokens without a role, too; 1 at padding and in the response that is not finite."""
    w = weigh(name, batch, DEFAULTS)
    expected = torch.ones_like(w)
    for i, row in enumerate(globals()[f"loop_{name}"](batch)):
        for t, weight in row.items():
            expected[i, t] = weight
    torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-5)
    assert (w[:3] == 0).any() and w.unique().numel() > 2  # zeros where documented


def test_a_weight_of_0_gives_no_advantage_and_is_allowed():
    w = torch.tensor([[0.0, 0.5, 1.0]])
    A_hat = role_aware_advantages(torch.tensor([-2.0]), w)
    assert A_hat.tolist() == [[0.0, -1.0, -2.0]]
