"""Tests of the readings: each one against plain loops, what holds for all, and two in a run.

Those of related papers that weigh all tokens have their loops in test_relatives.py.

pip install pytest, then python -m pytest -q extras/test_readings.py
"""

import inspect
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_low, pstdev

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import readings  # noqa: E402

import train  # noqa: E402
from srpo import Role, contrast_scores, token_weights  # noqa: E402

DEFAULTS = {"tau": 1.0, "w_min": 0.8, "w_max": 1.2}
WIDE = {"tau": 0.7, "w_min": 0.5, "w_max": 2.0}
PROGRESS = 0.25
ALL_TOKENS = ("vppo", "pgpo", "tor")  # these know no roles
NOT_MEAN_1 = ("unnormalized", "rlsd", "vppo", "tor")


def is_reading(function) -> bool:
    return inspect.isfunction(function) and "logp_blank" in inspect.signature(function).parameters


NAMES = [name for name, function in vars(readings).items() if is_reading(function)]
NAMES.remove("contrast_scores")
ROLES = ["0111022200000", "0110220220000", "0110000000000", "0110220000000"]
LENGTHS = [12, 13, 9, 11]


@pytest.fixture()
def batch():
    """Two responses with both roles, A = 0.5 and -0.5, one without reasoning, one not finite."""
    g = torch.Generator().manual_seed(0)
    roles = torch.tensor([[int(digit) for digit in row] for row in ROLES])
    is_token = torch.arange(13) < torch.tensor(LENGTHS)[:, None]
    logp = (-2 * torch.rand(4, 13, generator=g)).masked_fill(~is_token, 0)
    spread = 1.5 * torch.randn(2, 4, 13, generator=g)
    logp_corrupted = (logp - spread[0]).masked_fill(~is_token, 0)
    logp_blank = (logp - spread[1]).masked_fill(~is_token | (roles == 1), 0)
    logp_corrupted[0, 2] = logp[0, 2] - 7  # beyond step 4
    logp_corrupted[3, 1] = -math.inf
    entropy = torch.rand(4, 13, generator=g).masked_fill(~is_token, 0)
    batch = {"logp": logp, "logp_corrupted": logp_corrupted, "logp_blank": logp_blank}
    batch.update(roles=roles, A=torch.tensor([0.5, -0.5, 0.5, 0.5]), entropy=entropy)
    return batch


def weigh(name: str, batch: dict, options: dict) -> torch.Tensor:
    return getattr(readings, name)(**batch, progress=PROGRESS, **options)


# ---- the readings in plain loops, on one response


@dataclass
class Row:
    """A response with both roles: everything by the position t of a scored token."""

    role: dict
    ratio: dict  # the log-ratio of step 2 or 3
    delta: dict  # the same after step 4
    entropy: dict
    A: float
    tau: float
    w_min: float
    w_max: float


def row_of(batch: dict, i: int, options: dict) -> Row:
    row = Row({}, {}, {}, {}, batch["A"][i].item(), **options)
    for t, role in enumerate(batch["roles"][i].tolist()):
        if role != Role.OTHER:
            other = batch["logp_corrupted"] if role == Role.PERCEPTION else batch["logp_blank"]
            row.role[t] = role
            row.ratio[t] = (batch["logp"][i, t] - other[i, t]).item()
            row.delta[t] = min(max(row.ratio[t], -5), 5)
            row.entropy[t] = batch["entropy"][i, t].item()
    return row


def over_role(row: Row, x: dict, role: int) -> list:
    return [x[t] for t in x if row.role[t] == role]


def w_tilde(row: Row, relative: float) -> float:
    return min(max(math.exp(relative / row.tau), row.w_min), row.w_max)


def scaled_to_mean_1(w: dict) -> dict:
    middle = fmean(w.values())
    return {t: w[t] / middle for t in w}


def steps_5_and_6(row: Row, x: dict) -> dict:
    """SRPO's weights for x in the place of delta."""
    b = fmean(x.values())
    return scaled_to_mean_1({t: w_tilde(row, x[t] - b) for t in x})


def loop_absolute(row):
    return steps_5_and_6(row, {t: abs(row.delta[t]) for t in row.delta})


def loop_k3(row):
    k3 = {}
    for t, ratio in row.ratio.items():
        k3[t] = min(math.exp(-ratio) - 1 + ratio, 5)
    return steps_5_and_6(row, k3)


def loop_role_balanced(row):
    of_perception = fmean(over_role(row, row.delta, 1))
    of_reasoning = fmean(over_role(row, row.delta, 2))
    b = (of_perception + of_reasoning) / 2
    return scaled_to_mean_1({t: w_tilde(row, row.delta[t] - b) for t in row.delta})


def loop_median_baseline(row):
    b = median_low(row.delta.values())
    return scaled_to_mean_1({t: w_tilde(row, row.delta[t] - b) for t in row.delta})


def loop_log_mean_exp_baseline(row):
    b = math.log(fmean(math.exp(x) for x in row.delta.values()))
    return scaled_to_mean_1({t: w_tilde(row, row.delta[t] - b) for t in row.delta})


def loop_unnormalized(row):
    b = fmean(row.delta.values())
    return {t: w_tilde(row, row.delta[t] - b) for t in row.delta}


def loop_softmax(row):
    return scaled_to_mean_1({t: math.exp(row.delta[t] / row.tau) for t in row.delta})


def loop_sigmoid(row):
    b = fmean(row.delta.values())
    return scaled_to_mean_1(
        {t: 1 / (1 + math.exp((b - x) / row.tau)) for t, x in row.delta.items()}
    )


def loop_linear(row):
    b = fmean(row.delta.values())
    w = {}
    for t in row.delta:
        w[t] = min(max(1 + (row.delta[t] - b) / row.tau, row.w_min), row.w_max)
    return scaled_to_mean_1(w)


def negative(row):
    return {t: -row.delta[t] for t in row.delta}


def loop_sign_aware(row):
    if row.A < 0:
        return steps_5_and_6(row, negative(row))
    return steps_5_and_6(row, row.delta)


def loop_sign_aware_fading(row):
    lam = 0.5 * (1 - PROGRESS)
    w = loop_sign_aware(row)
    return {t: 1 - lam + lam * w[t] for t in w}


def loop_positive_only(row):
    if row.A < 0:
        return dict.fromkeys(row.delta, 1.0)
    return steps_5_and_6(row, row.delta)


def loop_standardized(row):
    spread = pstdev(row.delta.values())
    return steps_5_and_6(row, {t: row.delta[t] / spread for t in row.delta})


def loop_role_standardized(row):
    z = {}
    for t in row.delta:
        alike = over_role(row, row.delta, row.role[t])
        z[t] = (row.delta[t] - fmean(alike)) / pstdev(alike)
    return steps_5_and_6(row, z)


def weights_in_role(row, role, delta):
    inside = {t: delta[t] for t in delta if row.role[t] == role}
    return dict.fromkeys(delta, 1.0) | steps_5_and_6(row, inside)


def loop_perception_only(row):
    return weights_in_role(row, 1, row.delta)


def loop_reasoning_only(row):
    return weights_in_role(row, 2, row.delta)


def loop_role_baselines(row, delta=None):
    delta = row.delta if delta is None else delta
    in_perception = weights_in_role(row, 1, delta)
    in_reasoning = weights_in_role(row, 2, delta)
    return {t: in_perception[t] * in_reasoning[t] for t in delta}  # one of the two is 1


def loop_role_baselines_sign_aware(row):
    if row.A < 0:
        return loop_role_baselines(row, negative(row))
    return loop_role_baselines(row)


def loop_roles_only(row):
    w = steps_5_and_6(row, row.delta)
    return {t: fmean(over_role(row, w, row.role[t])) for t in w}


def loop_pattern_only(row):
    w = steps_5_and_6(row, row.delta)
    of_role = loop_roles_only(row)
    return {t: w[t] / of_role[t] for t in w}


def loop_inverted(row):
    return steps_5_and_6(row, negative(row))


def loop_entropy(row):
    return steps_5_and_6(row, row.entropy)


def loop_entropy_x_dependency(row):
    return steps_5_and_6(row, {t: row.entropy[t] * abs(row.delta[t]) for t in row.delta})


def loop_rlsd(row):
    lam = 0.5 * (1 - PROGRESS)
    sign = math.copysign(1, row.A)
    w = {}
    for t in row.delta:
        ratio = min(max(math.exp(sign * row.delta[t]), 0.8), 1.2)
        w[t] = 1 - lam + lam * ratio
    return w


@pytest.mark.parametrize("options", [DEFAULTS, WIDE], ids=["default range", "wide range"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("shuffled", *ALL_TOKENS)])
def test_a_reading_equals_its_loop(batch, name, options):
    w = weigh(name, batch, options)
    for i in range(2):
        expected = globals()[f"loop_{name}"](row_of(batch, i, options))
        found = {t: w[i, t].item() for t in expected}
        assert found == pytest.approx(expected, rel=1e-4)


# ---- what holds for all


@pytest.mark.parametrize("name", NAMES)
def test_what_holds_for_every_reading(batch, name):
    before = {key: x.clone() for key, x in batch.items()}
    w = weigh(name, batch, WIDE)
    for key, x in before.items():
        torch.testing.assert_close(batch[key], x, rtol=0, atol=0)
    assert w.shape == batch["logp"].shape and w.isfinite().all() and not w.requires_grad
    assert (w[3] == 1).all()  # a contrast that is not finite: step 9
    scored = batch["roles"] != Role.OTHER
    if name in ALL_TOKENS:
        assert (w >= 0).all() and (w[0, 12:] == 1).all() and (w[2, 9:] == 1).all()
    else:
        assert (w > 0).all() and (w[~scored] == 1).all()
        assert (w[2] == 1).all()  # without reasoning: step 9
    if name not in (*NOT_MEAN_1, *ALL_TOKENS):
        for i in range(2):
            assert w[i, scored[i]].mean().item() == pytest.approx(1, abs=1e-6)
    if name == "pgpo":
        for i, length in enumerate(LENGTHS):
            assert w[i, :length].mean().item() == pytest.approx(1, abs=1e-6)
    srpo = train.srpo_weights(**batch, progress=PROGRESS, **WIDE)
    assert not torch.allclose(w, srpo)
    nothing = {key: x[:0] for key, x in batch.items()}  # no response has an advantage
    assert weigh(name, nothing, WIDE).shape == (0, 13)


def test_equal_contrasts_give_weights_of_1(batch):
    batch["logp_corrupted"] = batch["logp"].clone()
    batch["logp_blank"] = batch["logp"].clone()
    for name in NAMES:
        if name not in ("entropy", "vppo", "tor"):
            assert torch.allclose(weigh(name, batch, WIDE), torch.ones(4, 13)), name


def test_shuffled_weights_are_the_same_numbers_elsewhere(batch):
    srpo = train.srpo_weights(**batch, **DEFAULTS)
    first = weigh("shuffled", batch, DEFAULTS)
    assert torch.equal(srpo.sort(dim=1).values, first.sort(dim=1).values)
    assert not torch.equal(srpo, first)
    assert torch.equal(first, weigh("shuffled", batch, DEFAULTS))  # the seed is the step's
    orders = set()
    for step in range(5):
        w = readings.shuffled(**batch, progress=step / 39, **DEFAULTS)
        orders.add(tuple(w[0].tolist()))
    assert len(orders) > 1


def test_weights_of_one_role_leave_the_other_alone(batch):
    free = {"tau": 1.0, "w_min": 1e-3, "w_max": 1e3}  # no weight at a limit
    both = weigh("role_baselines", batch, free)
    logps = (batch["logp"], batch["logp_corrupted"], batch["logp_blank"])
    delta = contrast_scores(*logps, batch["roles"])
    for name, role in (("perception_only", Role.PERCEPTION), ("reasoning_only", Role.REASONING)):
        w = weigh(name, batch, free)
        where = batch["roles"] == role
        assert (w[~where] == 1).all() and torch.equal(w[where], both[where])
        mine = w[1][where[1]]
        assert mine.mean().item() == pytest.approx(1, abs=1e-6) and mine.std() > 0.01
        assert torch.equal(mine.argsort(), delta[1][where[1]].argsort())


def test_emphasis_is_turned_round(batch):
    """Inverted is SRPO of -delta; sign-aware is inverted where A < 0 and SRPO where A > 0."""
    logps = (batch["logp"], batch["logp_corrupted"], batch["logp_blank"])
    delta = contrast_scores(*logps, batch["roles"])
    inverted = weigh("inverted", batch, WIDE)
    torch.testing.assert_close(inverted, token_weights(-delta, batch["roles"], **WIDE))
    sign_aware = weigh("sign_aware", batch, WIDE)
    assert torch.equal(sign_aware[1], inverted[1])
    assert torch.equal(sign_aware[0], token_weights(delta, batch["roles"], **WIDE)[0])
    plain = weigh("role_baselines", batch, WIDE)
    by_sign = weigh("role_baselines_sign_aware", batch, WIDE)
    assert torch.equal(by_sign[0], plain[0]) and not torch.allclose(by_sign[1], plain[1])


def test_what_fades_is_1_in_the_last_step(batch):
    for name in ("rlsd", "sign_aware_fading"):
        function = getattr(readings, name)
        assert (function(**batch, progress=1.0, **WIDE) == 1).all()
        first = function(**batch, progress=0.0, **WIDE)
        later = function(**batch, progress=0.5, **WIDE)
        torch.testing.assert_close((first - 1) / 2, later - 1)


# ---- in a run


def test_the_file_can_be_loaded_from_any_folder(tmp_path):
    code = f"import runpy; print(callable(runpy.run_path({str(HERE / 'readings.py')!r})['k3']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.stdout.split() == [b"True"], done.stderr


def test_a_run_takes_another_reading(cache, tmp_path):
    """The same first batch and reward, another update; shuffled is the same when run again."""
    options = "--device cpu --steps 2 --prompts 6 --warmup-steps 120 --eval-size 8".split()
    records = {}
    for run in ("srpo", "inverted", "vppo", "shuffled", "shuffled again"):
        argv = [*options, "--out", str(tmp_path / run)]
        if run != "srpo":
            argv += ["--weights", f"{HERE / 'readings.py'}:{run.split()[0]}"]
        assert train.main(argv) == 0
        records[run] = [r for r in train.Run(tmp_path / run).log() if "eval" not in r]
    first = {run: steps[0] for run, steps in records.items()}
    assert first["srpo"]["w_perception"] != 1  # some responses are well-formed
    assert len({x["reward"] for x in first.values()}) == 1
    assert len({x["grad_norm"] for x in first.values()}) == 4
    assert records["shuffled"][1]["loss"] == records["shuffled again"][1]["loss"]
