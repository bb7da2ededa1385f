"""Tests of the report, the study and the contrast figures: pip install scipy pytest, then python -m pytest -q extras/test_extras.py"""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import contrast  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402

import data  # noqa: E402
from srpo import Role, token_weights  # noqa: E402

EVIL = '<script>alert("x")</script>'


def make_run(folder: Path, seed: int, accuracy: float, text: str = "ab", name: str = "a") -> Path:
    """Files of a run of train.py, with one kept response of two tokens and EOS."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"algo": "srpo", "seed": seed, "tau": 1.0}))
    evals = {"accuracy": accuracy, "grounded": accuracy / 2, "perception": 0.5, "consistent": 1.0}
    metrics = [{"step": 0, "eval": evals}, {"step": 1, "reward": 0.5, "w_perception": 1.2}, {"step": 2, "eval": evals}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    response = {
        "text": text, "offsets": [[0, 1], [1, len(text)]], "roles": [1, 2, 0], "delta": [1.5, -0.25, 0.0], "weights": [1.75, 0.5, 1.0],
        "advantages": [1.4, 0.4, 0.8], "advantage": 0.8, "baseline": 0.625, "reward": 1.0, "accuracy": 1.0, "format": 1.0, "grounded": 0.0,
    }  # fmt: skip
    group = {"step": 1, "question": EVIL, "answer": EVIL, "images": [picture], "corrupted": [picture], "responses": [response]}
    (run / "samples.jsonl").write_text(json.dumps(group) + "\n")
    return run


class Reader(HTMLParser):
    """Tags, attributes and text as a browser would take them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text


def test_report_shows_everything_and_runs_nothing(tmp_path, capsys):
    runs = [make_run(tmp_path, s, 0.5 + 0.1 * s, text="a" + EVIL) for s in range(3)] + [make_run(tmp_path, 0, 0.9, name="b" + "&<i>")]
    out, png, svg = (tmp_path / f"report.{end}" for end in ("html", "png", "svg"))
    assert report.main([*map(str, runs), "--out", str(out), "--png", str(png), "--svg", str(svg)]) == 0
    page = Reader(out.read_text(encoding="utf-8"))
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 3 + 2  # question and answer in one run of each name, and the response of the first
    sources = [a["src"] for _, a in page.tags if "src" in a]
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources) and not any("href" in a for _, a in page.tags)
    tips = [a["data-tip"] for tag, a in page.tags if "data-tip" in a]
    assert tips[0] == "Perception: w 1.75, Â +1.40, Δ +1.50" and tips[1] == "Reasoning: w 0.50, Â +0.40, Δ -0.25" and tips[2] == "Other: w 1.00, Â +0.80"
    assert "right for the wrong reason" in page.text and "reward 1.00, A +0.80, b +0.62" in page.text
    assert "a (3 runs)" in page.text and "b&<i> (1 run)" in page.text
    assert Image.open(png).size[0] > 500 and svg.read_text().startswith("<svg xmlns=") and "NaN" not in svg.read_text()
    assert report.main([str(tmp_path)]) == 2 and "not the folder of a run" in capsys.readouterr().err


def test_bands_are_over_seeds(tmp_path):
    runs = [report.read_run(make_run(tmp_path, s, a)) for s, a in enumerate((0.4, 0.5, 0.6))]
    step, mean, low, high = report.curve(runs, "accuracy")[0]
    assert (step, round(mean, 9)) == (0, 0.5) and high - mean == pytest.approx(1.96 * 0.1 / 3**0.5) == mean - low
    assert [round(p[1], 3) for p in report.curve(runs, "wrong reason")] == [0.25, 0.25]
    runs[0]["args"]["tau"] = 2.0  # no longer the same condition
    assert sorted(map(len, report.label_runs(runs).values())) == [1, 2] and "a, tau 2.0" in report.label_runs(runs)


# ----------------------------------------------------------------------------------------------------------------- study


@pytest.fixture()
def batch():
    g = torch.Generator().manual_seed(0)
    roles = torch.tensor([[0, 1, 1, 1, 0, 2, 2, 2, 0], [0, 1, 1, 0, 2, 2, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]])
    return torch.randn(roles.shape, generator=g) * (roles > 0), roles


OPTIONS = {"tau": 1.0, "w_min": 0.5, "w_max": 2.0, "flip": None}


def test_shuffled_weights_are_the_same_numbers_elsewhere(batch):
    scores, roles = batch
    w, shuffled = token_weights(scores, roles, **OPTIONS), study.shuffled(scores, roles, **OPTIONS)
    assert torch.equal(w.sort(1).values, shuffled.sort(1).values) and not torch.equal(w, shuffled)
    assert (shuffled[roles == 0] == 1).all()


def test_weights_of_one_role_leave_the_other_alone(batch):
    scores, roles = batch
    for role, other in ((Role.PERCEPTION, Role.REASONING), (Role.REASONING, Role.PERCEPTION)):
        w = study.only(role)(scores, roles, **OPTIONS)
        assert (w[roles == other] == 1).all() and (w[roles == 0] == 1).all() and (w[2] == 1).all()  # row 2: Eq. (9)
        mine = w[0][roles[0] == role]
        assert mine.mean() == pytest.approx(1, abs=1e-6) and mine.std() > 0.01
        assert torch.equal(mine.argsort(), scores[0][roles[0] == role].argsort())


def test_weights_by_role_and_inverted(batch):
    scores, roles = batch
    w = study.role_baselines(scores, roles, **OPTIONS)
    for role in (Role.PERCEPTION, Role.REASONING):
        assert torch.equal(w[:2][roles[:2] == role], study.only(role)(scores, roles, **OPTIONS)[:2][roles[:2] == role])
    flipped = study.role_baselines(scores, roles, **OPTIONS | {"flip": torch.tensor([True, False, False])})
    torch.testing.assert_close(flipped[0], study.role_baselines(-scores, roles, **OPTIONS)[0])
    assert torch.equal(flipped[1:], w[1:])
    torch.testing.assert_close(study.inverted(scores, roles, **OPTIONS), token_weights(-scores, roles, **OPTIONS))


def row(task, condition, seed, accuracy, grounded):
    figures = dict.fromkeys((*study.OUTCOMES, "start"), 0.5) | {"accuracy": accuracy, "grounded": grounded}
    return {"task": task, "condition": condition, "seed": seed, "commit": "abc", "options": "--steps 1", **figures}


def test_tables(tmp_path):
    pytest.importorskip("scipy", reason="pip install scipy")
    rng = np.random.default_rng(0)
    for task, base in (("count", 0.5), ("add", 0.3)):
        for seed in range(6):
            x = base + 0.01 * seed
            study.append(tmp_path / "study.csv", row(task, "grpo", seed, x, x / 2))
            study.append(tmp_path / "study.csv", row(task, "srpo", seed, x + 0.1 + 0.002 * rng.random(), x / 2))
    study.append(tmp_path / "study.csv", row("count", "blur", 0, 0.5, 0.5))  # not on every task yet: left out
    rows = study.read(tmp_path / "study.csv")
    assert len(rows) == 25 and rows[0]["seed"] == 0 and rows[0]["accuracy"] == 0.5
    text = study.tables(rows)
    values = np.sort([0.5 + 0.01 * s for s in range(6)] + [0.3 + 0.01 * s for s in range(6)])
    assert f"| grpo | 12 | {values[3:9].mean():.3f} [" in text and "blur" not in text
    paired = next(line for line in text.split("\n\n")[3].splitlines() if line.startswith("| srpo"))
    mean, low, high = map(float, re.search(r"\| 12 \| ([\d.]+) \[([\d.]+), ([\d.]+)\]", paired).groups())
    assert 0.1 <= low <= mean <= high <= 0.102
    assert paired.endswith("| 1.000 | 0.500 [0.250, 0.750] |") or re.search(r"\| 1\.000.*\| 0\.500 \[", paired)
    jobs = study.planned(["grpo", "srpo", "blur"], ["count", "add"], 6, 2)
    assert len(jobs) == 2 * (6 + 6 + 2) and jobs[0] == ("count", "grpo", 0) and jobs[-1] == ("add", "blur", 1)
    done = {(r["task"], r["condition"], r["seed"]) for r in rows}
    assert [job for job in jobs if job not in done] == [("add", "blur", 0), ("count", "blur", 1), ("add", "blur", 1)]


def test_improvement_counts_pairs():
    assert study.improvement(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == pytest.approx((0 + 0 + 1 + 0.5) / 4)


# -------------------------------------------------------------------------------------------------------------- contrast


def test_labels_follow_the_scene():
    scene = (data.Fact("a1", "red", "circle"), data.Fact("b2", "blue", "square"))
    query = data.Query("count", ("red",))
    example = data.Example((), query.text(), "1", scene, query)
    pieces = ["<perception>", " a1", " red", " square", ",", " b2", " blue", " square", "</perception>", "\n", "<reasoning>"]
    pieces += [" a1", " red", " b2", " no", " so", " 1", "</reasoning>", "\n", "<answer>", " 1", "</answer>"]
    ends = np.cumsum([len(p) for p in pieces])
    found = contrast.labels("".join(pieces), list(zip(ends - [len(p) for p in pieces], ends, strict=True)), example)
    said = {name: {pieces[t] + str(t): int(v) for t, v in enumerate(values) if v >= 0} for name, values in found.items()}
    assert said["seen"] == {" a11": 0, " red2": 1, " square3": 1, ",4": 0, " b25": 0, " blue6": 1, " square7": 1}
    assert said["asked"] == {" red2": 1, " square3": 0, " blue6": 1, " square7": 0}
    assert said["true"] == {" red2": 1, " square3": 0, " blue6": 1, " square7": 1}
    assert said["needed"] == {" a111": 0, " red12": 1, " b213": 0, " no14": 1, " so15": 0, " 116": 1}
    assert contrast.auc(np.array([3.0, 1.0, 2.0, 9.0]), np.array([1, 0, 0, -1])) == 1.0
    assert contrast.auc(np.array([1.0, 1.0]), np.array([1, 0])) == 0.5 and contrast.auc(np.array([1.0]), np.array([1])) is None
