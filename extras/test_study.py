"""Tests of the study: every reading and control against plain loops, its recorder, its tables.

pip install scipy pytest, then python -m pytest -q extras/test_study.py
"""

import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench  # noqa: E402
import contrast  # noqa: E402
import readings  # noqa: E402
import study  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from corrupt import CELLS, COLORS, SHAPES  # noqa: E402
from srpo import CHOICES, Role, token_weights  # noqa: E402


@pytest.fixture()
def batch():
    """Two responses with both roles, A = 0.5 and -0.5, one without reasoning, one whose contrast is NaN."""
    g = torch.Generator().manual_seed(0)
    roles = torch.tensor([[*map(int, row)] for row in ("011102220", "011022000", "011000000", "011022000")])
    logits = 2 * torch.randn(2, *roles.shape, 6, generator=g)
    logits[..., 4] = float("-inf")  # never sampled
    logp, other = logits.log_softmax(-1)
    ids = torch.multinomial(logp.exp().flatten(0, 1), 1, generator=g).view(*roles.shape, 1)
    delta = (logp - other).gather(2, ids)[..., 0].clamp(-5, 5) * (roles > 0)
    delta[3, 1] = float("nan")
    A = torch.tensor([0.5, -0.5, 0.5, 0.5])
    return readings.Batch(delta, roles, A, logp, other * (roles > 0)[..., None], 0.25, g)


OPTIONS = {"tau": 1.0, "w_min": 0.8, "w_max": 1.2, "flip": None}  # the defaults
LIMITS = {("w_min", 0.5), ("w_max", 2.0)}  # of all conditions but srpo, softmax and rlsd


def by_hand(condition, batch, tau, w_min, w_max, flip):
    """w of the two whole responses in plain loops, [{position: weight}], with normalization."""
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    std = lambda xs: mean([(x - mean(xs)) ** 2 for x in xs]) ** 0.5  # noqa: E731
    found = []
    for i in range(2):
        role = {t: r for t, r in enumerate(batch.roles[i].tolist()) if r}
        delta = {t: batch.delta[i, t].item() for t in role}
        pi, other = ({t: x[i, t].exp().tolist() for t in role} for x in (batch.logp, batch.other))
        words, sign = [v for v in range(6) if v != 4], -1 if flip is not None and flip[i] else 1
        of = {t: [delta[s] for s in role if role[s] == role[t]] for t in role}
        H = {t: -sum(pi[t][v] * np.log(pi[t][v]) for v in words) for t in role}
        ratio = {t: {v: np.clip(np.log(pi[t][v] / other[t][v]), -5, 5) for v in words} for t in role}
        middle = {t: [(p + q) / 2 for p, q in zip(pi[t], other[t], strict=True)] for t in role}
        KL = lambda p, q: sum(p[v] * np.log(p[v] / q[v]) for v in words)  # noqa: E731, B023
        exp = lambda x: float(np.clip(np.exp(sign * x / tau), w_min, w_max))  # noqa: E731, B023
        x = {
            "jensen-shannon": lambda t: (KL(pi[t], middle[t]) + KL(other[t], middle[t])) / 2,  # noqa: B023
            "standardized": lambda t: delta[t] / std(delta.values()),  # noqa: B023
            "role-standardized": lambda t: (delta[t] - mean(of[t])) / std(of[t]),  # noqa: B023
            "entropy": lambda t: H[t],  # noqa: B023
            "entropy-x-dependency": lambda t: H[t] * abs(delta[t]),  # noqa: B023
        }.get(condition.removesuffix("-tau-3"), lambda t: delta[t])  # noqa: B023
        b = mean([x(t) for t in role])
        if condition == "zero-mean":
            w = {t: exp(delta[t] - sum(pi[t][v] * ratio[t][v] for v in words)) for t in role}
        elif condition in ("state-only", "token-only"):
            expected = {t: sum(pi[t][v] * exp(ratio[t][v] - b) for v in words) for t in role}
            w = expected if condition == "state-only" else {t: exp(delta[t] - b) / expected[t] for t in role}
        else:
            w = {t: exp(x(t) - b) for t in role}
        w = {t: w[t] / mean(w.values()) for t in role}
        shared = {t: mean([w[s] for s in role if role[s] == role[t]]) for t in role}
        w = {
            "roles-only": shared,
            "pattern-only": {t: w[t] / shared[t] for t in role},
            "positive-only": w if batch.A[i] > 0 else dict.fromkeys(role, 1.0),
            "rlsd": {t: 1 + 0.5 * (1 - 0.25) * (w[t] - 1) for t in role},
        }.get(condition, w)
        found.append(w)
    return found


@pytest.mark.parametrize("condition", readings.CONDITIONS)
def test_weights_of_every_condition(batch, condition):
    """Equal to the loops, positive, mean 1 where said, 1 at OTHER and in step 9's rows, unlike srpo."""
    args = train.build_parser().parse_args(readings.CONDITIONS[condition].options.split())
    chosen = {k: v for k, v in args.choice if k in OPTIONS or k in ("normalize", "role_balanced")}
    options = OPTIONS | chosen | {"flip": batch.A < 0 if ("sign_aware", True) in args.choice else None}
    w, delta = readings.weigh(condition, batch, **options), batch.delta.clone()
    plain = token_weights(batch.delta, batch.roles, **OPTIONS)
    assert (w > 0).all() and w.isfinite().all() and (w[2:] == 1).all() and (w[batch.roles == 0] == 1).all()
    torch.testing.assert_close(batch.delta, delta, rtol=0, atol=0, equal_nan=True)
    if condition != "normalize=false":
        scored = batch.roles[:2] > 0
        torch.testing.assert_close((w[:2] * scored).sum(1) / scored.sum(1), torch.ones(2))
    own = readings.CONDITIONS[condition].weights is not readings.srpo
    assert torch.equal(w, plain) != (own or bool(chosen) or options["flip"] is not None)
    if condition in (*NEW, "srpo"):
        limits = {k: options[k] for k in OPTIONS}
        for i, row in enumerate(by_hand(condition, batch, **limits)):
            assert w[i, list(row)].tolist() == pytest.approx(list(row.values()), rel=1e-4)


NEW = "jensen-shannon rlsd range-0.5-2 positive-only standardized role-standardized roles-only".split()
NEW += "standardized-tau-3 pattern-only state-only token-only zero-mean entropy entropy-x-dependency".split()


def test_shuffled_weights_are_the_same_numbers_elsewhere(batch):
    w, shuffled = (readings.weigh(x, batch, **OPTIONS) for x in ("srpo", "shuffled"))
    assert torch.equal(w.sort(1).values, shuffled.sort(1).values) and not torch.equal(w, shuffled)
    assert batch.at_limit.any() and (batch.at_limit <= batch.S).all()


def test_weights_of_one_role_leave_the_other_alone(batch):
    options = OPTIONS | dict(LIMITS)  # else too many are at a limit, and equal
    roles, both = batch.roles, readings.weigh("role-baselines", batch, **options)
    for name, role in (("perception-only", Role.PERCEPTION), ("reasoning-only", Role.REASONING)):
        w, where = readings.weigh(name, batch, **options), roles == role
        assert (w[~where] == 1).all() and torch.equal(w[where], both[where])
        mine = w[0][where[0]]
        assert mine.mean() == pytest.approx(1, abs=1e-6) and mine.std() > 0.01
        assert torch.equal(mine.argsort(), batch.delta[0][where[0]].argsort())


def test_emphasis_is_turned_round(batch):
    turned = readings.Batch(-batch.delta, batch.roles, batch.A, batch.logp, batch.other)
    for name, as_if in (("inverted", "srpo"), ("role-baselines+sign", "role-baselines")):
        all_rows = torch.tensor([True] * 4)
        found = readings.weigh(name, batch, **OPTIONS | {"flip": all_rows})
        torch.testing.assert_close(found, readings.weigh(as_if, turned, **OPTIONS))
    half = readings.weigh("role-baselines", batch, **OPTIONS | {"flip": batch.A < 0})
    assert torch.equal(half[0], readings.weigh("role-baselines", batch, **OPTIONS)[0])
    torch.testing.assert_close(half[1], readings.weigh("role-baselines", turned, **OPTIONS)[1])


def test_there_is_a_condition_for_every_alternative():
    """Each changes one choice beside the range, to a value that train.py takes, not to the default."""
    default, seen = {name: choice[2] for name, choice in CHOICES.items()}, []
    for name, condition in readings.CONDITIONS.items():
        args = train.build_parser().parse_args(condition.options.split())
        changed = {k: value for k, value in args.choice if value != default[k]}
        assert len(changed) == len(args.choice) == condition.options.count("--choice")
        seen += changed.items()
        narrow = name in ("grpo", "srpo", "softmax", "rlsd")
        assert narrow == (not changed.items() >= LIMITS)
        if "=" in name:
            ((k, value),), text = changed.items() - LIMITS, name.partition("=")
            assert (text[0], text[2]) == (k, f"{value:g}" if type(value) is float else str(value).lower())
    assert {(k, value) for k, choice in CHOICES.items() for value in choice[3]} <= set(seen)
    assert set(NEW) < set(readings.CONDITIONS)


@pytest.mark.parametrize("condition", ["srpo", "entropy"])
def test_the_recorder_sees_what_the_loop_sees(cache, tmp_path, monkeypatch, condition):
    """Log-probs over the vocabulary and entropies at the sampled tokens, equal to what the loop computes."""
    monkeypatch.setattr(train, "token_roles", bench.draw_roles)  # the hardly warmed-up model has no tags
    seen, score, weigh = [], train.contrast_scores, train.role_aware_advantages
    monkeypatch.setattr(train, "contrast_scores", lambda *x, **how: seen.append(x) or score(*x, **how))
    monkeypatch.setattr(train, "role_aware_advantages", lambda *x: seen.append(x) or weigh(*x))
    options = "--warmup-steps 20 --steps 1 --prompts 6 --group-size 4 --eval-size 4 --temperature 0.7"
    (tmp_path / "reward.py").write_text("reward = lambda text, example: len(text) % 7\n")
    recorder, kept = readings.Recorder(condition, 1), []
    update = model.Policy.log_probs
    with recorder.installed():
        recorded = model.Policy.log_probs
        spy = lambda *x, **how: kept.append((x[2], recorded(*x, **how))) or kept[-1][1]  # noqa: E731
        monkeypatch.setattr(model.Policy, "log_probs", spy)
        study.trained(tmp_path / "run", f"{options} --reward {tmp_path / 'reward.py'}:reward")
    monkeypatch.setattr(model.Policy, "log_probs", update)
    batch, (logp, logp_corrupted, logp_blank, roles), (A, w, _) = recorder.batch, *seen[-2:]
    ids = kept[-3][0].ids  # of the two passes of step 3, then the update's
    assert torch.equal(batch.roles, roles) and torch.equal(batch.A, A) and batch.S.sum() > 100
    here, there = (x.gather(2, ids[..., None])[..., 0] for x in (batch.logp, batch.other))
    assert torch.equal(here[batch.S], logp[batch.S]) and (logp[batch.S] < 0).all()
    torch.testing.assert_close(there[batch.P], logp_corrupted[batch.P])
    torch.testing.assert_close(there[batch.R], logp_blank[batch.R])
    torch.testing.assert_close(batch.ratio.gather(2, ids[..., None])[..., 0][batch.S], batch.delta[batch.S])
    rollout, (_, H) = kept[-1]
    assert len(rollout.ids) == (A != 0).sum()
    torch.testing.assert_close(batch.entropy[A != 0][rollout.mask], H[rollout.mask], rtol=1e-3, atol=1e-4)
    expected = batch.entropy if condition == "entropy" else batch.delta
    assert torch.equal(w, token_weights(expected, roles, **OPTIONS))
    assert recorder.averages()["r_entropy"] > (0.5 if condition == "entropy" else -1)


def test_sentences_state_the_facts(monkeypatch):
    for module, name in ((train, "demonstrate"), (train, "DrawnTask"), (model, "CELLS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    study.install_sentences()
    policy, rng = model.build_tiny(), np.random.default_rng(0)
    examples = train.drawn_task(Namespace(task="add", seed=0, image_size=48)).train_batch(0, 200)
    texts = [train.demonstrate(example, 0.0, rng) for example in examples]
    assert {len(e.scene) for e in examples} == {4, 5, 6} and any(e.answer == "10" for e in examples)
    verdicts = [data.verify(text, example) for text, example in zip(texts, examples, strict=True)]
    assert all(v.perception == v.grounded == v.consistent == 1 for v in verdicts)
    rollout = policy.as_rollout(texts)
    assert [text for text, _ in policy.decode(rollout)] == texts and rollout.ids.shape[1] < 112
    seen = " ".join(text.split("</perception>")[0].removeprefix("<perception>") for text in texts)
    words = re.findall(r"\w+", seen)
    facts = sum(word in (*CELLS, *COLORS, *SHAPES) for word in words)
    assert 0.47 < facts / len(words) < 0.53
    ((text, offsets),) = policy.decode(rollout[torch.tensor([0])])
    right = contrast.labels(text, offsets, examples[0])["true"]
    assert (right == 1).sum() == 2 * len(examples[0].scene) and (right != 0).all()


def test_the_recorded_study_is_of_these_conditions():
    pytest.importorskip("scipy", reason="pip install scipy")
    rows = study.read(HERE / "study.csv")
    assert {r["condition"] for r in rows} <= set(study.CONDITIONS)
    for regime, about in study.REGIMES.items():
        options = f"{study.OPTIONS} {about.options}".strip()
        assert {r["options"] for r in rows if r["regime"] == regime} <= {options}
    computed, written = study.tables(rows), (HERE / "study.md").read_text(encoding="utf-8")
    assert all(line in written for line in computed.splitlines())
    cells = lambda line: [c.strip().replace("−", "-") for c in line.strip("|").split("|")]  # noqa: E731
    rows_of = lambda text: [cells(line) for line in text.splitlines() if line.startswith("| ")]  # noqa: E731
    table = (HERE.parent / "README.md").read_text(encoding="utf-8").split("## Results")[1].split("## ")[0]
    known = {}  # of a condition: runs, accuracy, grounded, then pairs and the differences to GRPO
    for name, *figures in rows_of(computed.split("By task")[0])[1:]:
        known.setdefault(name, []).extend([figures[0], *figures[1:3]])
    for name, runs, *shown in rows_of(table)[1:]:
        count, accuracy, grounded, *differences = known[name]
        assert runs == count
        expected = [accuracy.split()[0], grounded.split()[0], *differences[1:]]
        for cell, text in zip(shown, expected, strict=False):
            numbers = [list(map(float, re.findall(r"[-+]?\d\.\d+", t))) for t in (cell, text)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.0051) or not cell, (name, cell, text)
    assert {"grpo", "srpo", "shuffled"} <= known.keys() and "| srpo |" in table


def row(task, condition, seed, accuracy, grounded):
    figures = dict.fromkeys((*study.OUTCOMES, "start"), 0.5) | {"accuracy": accuracy, "grounded": grounded}
    made = {"task": task, "condition": condition, "seed": seed, "regime": "default", "commit": "abc"}
    return made | {"options": "--steps 1"} | figures | dict.fromkeys(study.CREDIT, 0.25)


def test_tables(tmp_path):
    pytest.importorskip("scipy", reason="pip install scipy")
    rng, record = np.random.default_rng(0), partial(study.append, tmp_path / "study.csv")
    for task, base in (("count", 0.5), ("add", 0.3)):
        for seed in range(6):
            x = base + 0.01 * seed
            record(row(task, "grpo", seed, x, x / 2))
            record(row(task, "srpo", seed, x + 0.1 + 0.002 * rng.random(), x / 2))
    record(row("count", "tau=3", 0, 0.5, 0.5))  # not on every task yet: left out
    with pytest.raises(ValueError, match="other columns"):
        record({"task": "count"})
    rows = study.read(tmp_path / "study.csv")
    assert len(rows) == 25 and rows[0]["seed"] == 0 and rows[0]["accuracy"] == 0.5
    text = study.tables(rows)
    values = np.sort([0.5 + 0.01 * s for s in range(6)] + [0.3 + 0.01 * s for s in range(6)])
    assert f"| grpo | 12 | {values[3:9].mean():.3f} [" in text and "tau=3" not in text
    paired = next(line for line in text.split("\n\n")[4].splitlines() if line.startswith("| srpo"))
    mean, low, high = map(float, re.search(r"\| 12 \| ([\d.]+) \[([\d.]+), ([\d.]+)\]", paired).groups())
    assert 0.1 <= low <= mean <= high <= 0.102
    assert re.search(r"\| 1\.000.*\| 0\.500 \[.*\| 0.00049 \| 1 \|$", paired)  # 2 in 2 ** 12 signs
    assert "the 1 conditions" in text and text.count("## default") == 1 and "seeds 0 to 5" in text
    fresh = [r | {"seed": r["seed"] + 10} for r in rows] + [r | {"regime": "slow"} for r in rows]
    parts = study.tables(rows + fresh).split("## ")
    assert [part.split(":")[0] for part in parts] == ["", "default", "default", "slow"]
    assert parts[1].strip() == text.removeprefix("## ") and "seeds 10 to 15" in parts[2]
    jobs = study.planned(["grpo", "srpo", "tau=3"], ["count", "add"], 6, 2)
    assert len(jobs) == 2 * (6 + 6 + 2)
    assert jobs[0] == ("count", "grpo", 0) and jobs[-1] == ("add", "tau=3", 1)
    later = study.planned(["grpo", "srpo", "tau=3"], ["count", "add"], 6, 2, first=10)
    assert later == [(task, c, seed + 10) for task, c, seed in jobs]
    done = {(r["task"], r["condition"], r["seed"]) for r in rows}
    left = [("add", "tau=3", 0), ("count", "tau=3", 1), ("add", "tau=3", 1)]
    assert [job for job in jobs if job not in done] == left


def test_improvement_counts_pairs():
    found = study.improvement(np.array([1.0, 3.0]), np.array([2.0, 3.0]))
    assert found == pytest.approx((0 + 0 + 1 + 0.5) / 4)


def test_p_values_are_corrected():
    assert study.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    pytest.importorskip("scipy", reason="pip install scipy")
    assert study.signed_rank(np.array([1.0, 2.0, 3.0, 4.0])) == 2 / 2**4
    assert study.signed_rank(np.zeros(4)) == 1
