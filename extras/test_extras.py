"""Tests of the credit of tokens, the contrast figures and the bench.

pip install pytest, then python -m pytest -q extras/test_extras.py
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench  # noqa: E402
import contrast  # noqa: E402
import credit  # noqa: E402

import train  # noqa: E402
from data import Example, Fact, Query  # noqa: E402

# ---- credit

REWARD = "def reward(text, example): return len(text) % 7 if len(example.scene) == 3 else 0\n"
WEIGHTS = """
def weights(logp, logp_corrupted, logp_blank, roles, A, *, entropy, progress, tau, w_min, w_max):
    return 1 + entropy * (roles == 1) + (logp - logp_blank).abs() * (A[:, None] > 0) + progress
"""


@pytest.mark.parametrize("options", ["", "--corruption noise --lam 0.5", "--weights my.py:weights"])
def test_credit_is_that_of_the_loop(cache, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(REWARD + WEIGHTS)
    monkeypatch.setattr(train, "token_roles", bench.draw_roles)  # tags are seldom written yet
    kept = []
    weigh = train.role_aware_advantages

    def kept_advantages(*args):
        kept.append(weigh(*args))
        return kept[-1]

    monkeypatch.setattr(train, "role_aware_advantages", kept_advantages)
    argv = "--warmup-steps 20 --steps 1 --prompts 6 --group-size 4 --eval-size 4 --device cpu"
    argv += f" --reward my.py:reward {options} --out run"
    assert train.main(argv.split()) == 0
    args = argparse.Namespace(**credit.read_options(tmp_path / "run"))
    policy = credit.load(args)
    batch = credit.sample(policy, train.build_task(args).train_batch(0, 6), args, step=1)
    found = credit.credit(policy, batch, args, step=1)
    idle = batch.A == 0  # prompts of four objects, which the loop leaves out
    assert torch.equal(found.A_hat[~idle], kept[0])
    assert found.A_hat.unique().numel() > 30
    assert idle.any()
    assert (batch.roles[idle] > 0).any()
    assert (found.w[idle] == 1).all()
    assert (found.delta[idle] == 0).all()
    assert (found.w[~idle] != 1).any()
    args.algo = "grpo"
    found = credit.credit(policy, batch, args, step=1)
    assert (found.w == 1).all()
    assert torch.equal(found.A_hat, batch.A[:, None].expand_as(found.w))


# ---- contrast


def test_labels_follow_the_scene():
    scene = (Fact("a1", "red", "circle"), Fact("b2", "blue", "square"))
    query = Query("count", ("red",))
    example = Example((), query.text(), "1", scene, query)
    pieces = ["<perception>", " a1", " red", " square", ",", " b2", " blue", " square"]
    pieces += ["</perception>", "\n", "<reasoning>", " a1", " red", " b2", " no", " so", " 1"]
    pieces += ["</reasoning>", "\n", "<answer>", " 1", "</answer>"]
    sizes = [len(piece) for piece in pieces]
    ends = np.cumsum(sizes)
    offsets = list(zip(ends - sizes, ends, strict=True))
    said = {}
    text = "".join(pieces)
    shouted = text.replace("red", "RED").replace("b2", "B2").replace(" so", " So")
    for name, label in contrast.labels(text, offsets, example).items():
        assert (label == contrast.labels(shouted, offsets, example)[name]).all()
        marked = np.flatnonzero(label >= 0)
        said[name] = {f"{pieces[t]}{t}": int(label[t]) for t in marked}
    a1 = {" red2": 1, " square3": 1}
    b2 = {" blue6": 1, " square7": 1}
    assert said == {
        "seen": {" a11": 0, **a1, ",4": 0, " b25": 0, **b2},
        "asked": {" red2": 1, " square3": 0, " blue6": 1, " square7": 0},
        "true": {" red2": 1, " square3": 0, " blue6": 1, " square7": 1},
        "needed": {" a111": 0, " red12": 1, " b213": 0, " no14": 1, " so15": 0, " 116": 1},
    }


def test_auc_by_hand():
    assert contrast.auc(np.array([3.0, 1.0, 2.0, 9.0]), np.array([1, 0, 0, -1])) == 1.0
    assert contrast.auc(np.array([1.0, 3.0, 2.0]), np.array([1, 0, 1])) == 0.0
    assert contrast.auc(np.array([1.0, 1.0]), np.array([1, 0])) == 0.5
    assert contrast.auc(np.array([1.0]), np.array([1])) is None


def test_contrast_measures_every_corruption(cache, capsys, monkeypatch):
    monkeypatch.setattr(train, "token_roles", bench.draw_roles)
    assert contrast.main("--warmup-steps 20 --prompts 2 --tau 3".split()) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    cells = [line.split("|")[1:-1] for line in lines[1:]]
    head, _, *rows = [[cell.strip() for cell in row] for row in cells]
    assert [row[0] for row in rows] == [*contrast.CORRUPTIONS, "patch, 4 masks"]
    columns = {}
    for i, name in enumerate(head[1:], start=1):
        columns[name] = [float(row[i]) for row in rows]
    assert len(set(columns["Δ R"])) == 1  # no image has a part in step 3
    assert len(set(columns["Δ P"])) > 1
    for share in columns["clipped low"] + columns["clipped high"]:
        assert 0 <= share <= 1
    for w_P, w_R in zip(columns["w P"], columns["w R"], strict=True):
        assert (w_P - 1) * (w_R - 1) < 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "./nowhere"], "no such folder"),
        (["--data", "my.jsonl"], "only drawn tasks"),
        (["--w-min", "2"], "--w-min 2.0: above --w-max"),
    ],
)
def test_what_contrast_cannot_measure_is_one_line(argv, said, capsys):
    assert contrast.main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# ---- bench


def test_bench_compares_with_another_version(tmp_path):
    """One that answers what is asked of it, and takes 100 s for each phase."""
    found = {"phases": [[100, 100, 100]], "tokens": [1], "peak": 0.0}
    (tmp_path / "extras").mkdir()
    lines = [
        "import sys",
        "SHAPES = {'short': (0,) * 7}",
        "make_folder = lambda folder, shape: folder.mkdir()",
        "if __name__ == '__main__':",
        "    assert '--micro-batch' not in sys.argv",  # it may count something else
        f"    print('RESULT ' + {json.dumps(found)!r})",
    ]
    (tmp_path / "extras" / "bench.py").write_text("\n".join(lines))
    options = "--shape short --turns 1 --steps 3 --conditions srpo --device cpu --against".split()
    command = [sys.executable, str(HERE / "bench.py"), *options, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    form = r"^srpo, seconds a step: old 300.000, new (\S+), new / old (\S+)$"
    new, ratio = re.search(form, said, re.MULTILINE).groups()
    assert 0 < float(new) < 300
    assert float(ratio) == pytest.approx(float(new) / 300, abs=1e-3)
