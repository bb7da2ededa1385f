"""Tests of the report, the contrast figures, the bench and the reward for formulas.

pip install 'math-verify[antlr4_13_2]' pytest, then python -m pytest -q extras/test_extras.py
"""

import json
import re
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench  # noqa: E402
import contrast  # noqa: E402
import credit  # noqa: E402
import report  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from corrupt import Example, Fact, Query  # noqa: E402

EVIL = '<script>alert("x")</script>'


# --------------------------------------------------------------------------------------------- report


def make_run(folder: Path, seed: int, accuracy: float, text: str = "ab", name: str = "a") -> Path:
    """Files of a run of train.py, and beside them a group whose one response has two tokens and EOS."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir()
    options = {"algo": "srpo", "seed": seed, "argv": ["--seed", str(seed)], "choice": {"tau": 1.0}}
    (run / "args.json").write_text(json.dumps(options))
    evals = {"accuracy": accuracy, "grounded": accuracy / 2, "perception": 0.5, "consistent": 1.0}
    step = {"step": 1, "reward": 0.5, "w_perception": 1.2}
    metrics = [{"step": 0, "eval": evals}, step, {"step": 2, "eval": evals}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    picture = report.png(Image.new("RGB", (4, 4), "red"))
    response = {
        "text": text, "offsets": [[0, 1], [1, len(text)]], "roles": [1, 2, 0], "delta": [1.5, -0.25, 0.0],
        "weights": [1.75, 0.5, 1.0], "advantages": [1.4, 0.4, 0.8], "advantage": 0.8, "baseline": 0.625,
        "reward": 1.0, "accuracy": 1.0, "format": 1.0, "grounded": 0.0,
    }  # fmt: skip
    group = {"step": 1, "question": EVIL, "answer": EVIL, "images": [picture], "corrupted": [picture]}
    (run / "groups.json").write_text(json.dumps([group | {"responses": [response]}]))
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


def test_report_shows_everything_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "sample_groups", lambda run: json.loads((run / "groups.json").read_text()))
    runs = [make_run(tmp_path, seed, 0.5 + 0.1 * seed, text="a" + EVIL) for seed in range(3)]
    runs.append(make_run(tmp_path, 0, 0.9, name="b" + "&<i>"))
    out, png, svg = (tmp_path / f"report.{end}" for end in ("html", "png", "svg"))
    assert report.main([*map(str, runs), "--out", str(out), "--png", str(png), "--svg", str(svg)]) == 0
    page = Reader(out.read_text(encoding="utf-8"))
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 3 + 2  # question and answer for each name, and a response
    sources = [a["src"] for _, a in page.tags if "src" in a]
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not any("href" in a for _, a in page.tags)
    tips = [a["data-tip"] for tag, a in page.tags if "data-tip" in a]
    assert tips[0] == "Perception: w 1.75, Â +1.40, Δ +1.50"
    assert tips[1] == "Reasoning: w 0.50, Â +0.40, Δ -0.25" and tips[2] == "Other: w 1.00, Â +0.80"
    assert "right for the wrong reason" in page.text and "reward 1.00, A +0.80, b +0.62" in page.text
    assert "a (3 runs)" in page.text and "b&<i> (1 run)" in page.text
    assert Image.open(png).size[0] > 500
    assert svg.read_text().startswith("<svg xmlns=") and "NaN" not in svg.read_text()
    assert report.main([str(tmp_path)]) == 2 and "not the folder of a run" in capsys.readouterr().err


def test_without_a_checkpoint_there_are_curves_and_a_line_that_says_so(tmp_path, capsys):
    out, run = tmp_path / "report.html", make_run(tmp_path, 0, 0.5, name="b&<i>")
    assert report.main([str(run), "--out", str(out)]) == 0
    page = Reader(out.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert "polyline" in tags and not {"img", "i"} & tags
    assert f"No responses: {run}: holds no checkpoint" in page.text
    capsys.readouterr()
    assert report.main([str(run), "--out", str(out), "--png", str(tmp_path / "credit.png")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run}: holds no checkpoint") and said.count("\n") == 1


@pytest.mark.parametrize("algo", ["srpo", "grpo"])
def test_report_of_a_real_run(cache, tmp_path, algo):
    (tmp_path / "reward.py").write_text("reward = lambda text, example: len(text) % 7\n")  # with a spread
    reward = f"{tmp_path / 'reward.py'}:reward"
    options = "--warmup-steps 20 --steps 2 --prompts 2 --group-size 4 --eval-size 4 --algo".split()
    run, files = tmp_path / f"mine-{algo}", [tmp_path / f"report.{end}" for end in ("html", "png", "svg")]
    assert train.main([*options, algo, "--reward", reward, "--out", str(run)]) == 0
    page, png, svg = map(str, files)
    assert report.main([str(run), "--out", page, "--png", png, "--svg", svg]) == 0
    page = Reader(files[0].read_text(encoding="utf-8"))
    captions = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert captions.count("original image") == 2
    assert captions.count("corrupted image") == (2 if algo == "srpo" else 0)
    question = data.DrawnTask("count", size=48).train_batch(2, 1)[0].question  # what would come next
    assert f"step 2: {question}" in page.text and page.text.count("EOS") >= 1
    assert len([a for tag, a in page.tags if a.get("class") == "r"]) == 2 * 4
    assert Image.open(files[1]).size[0] > 500 and "polyline" in files[2].read_text()


def test_bands_are_over_seeds(tmp_path):
    runs = [report.read_run(make_run(tmp_path, s, a)) for s, a in enumerate((0.4, 0.5, 0.6))]
    step, mean, low, high = report.curve(runs, "accuracy")[0]
    assert (step, round(mean, 9)) == (0, 0.5)
    assert high - mean == pytest.approx(1.96 * 0.1 / 3**0.5) == mean - low
    assert [round(p[1], 3) for p in report.curve(runs, "wrong reason")] == [0.25, 0.25]
    runs[0]["args"]["choice"]["tau"] = 2.0  # no longer the same condition
    labelled = report.label_runs(runs)
    assert sorted(map(len, labelled.values())) == [1, 2] and "a, tau 2.0" in labelled


# --------------------------------------------------------------------------------------------- credit


@pytest.mark.parametrize("choices", ["", "corrupt_both=true sign_aware=true corruption=noise lam=0.5"])
def test_credit_is_that_of_the_loop(cache, tmp_path, monkeypatch, choices):
    for module in (train, credit):  # the hardly warmed-up model seldom writes the tags
        monkeypatch.setattr(module, "token_roles", bench.draw_roles)
    kept, weigh = [], train.role_aware_advantages
    monkeypatch.setattr(train, "role_aware_advantages", lambda *a: kept.append(weigh(*a)) or kept[-1])
    reward = "reward = lambda text, example: len(text) % 7 if len(example.scene) == 3 else 0\n"
    (tmp_path / "reward.py").write_text(reward)
    argv = "--warmup-steps 20 --steps 1 --prompts 6 --group-size 4 --eval-size 4 --device cpu".split()
    argv += ["--reward", f"{tmp_path / 'reward.py'}:reward", "--out", str(tmp_path / "run")]
    argv += [word for choice in choices.split() for word in ("--choice", choice)]
    assert train.main(argv) == 0
    args = Namespace(**json.loads((tmp_path / "run" / "args.json").read_text()))
    policy, examples = credit.warmed_up(args), credit.task_of(args).train_batch(0, 6)
    prompts = policy.encode(examples, credit.corruption(policy, args, 1))
    found = credit.credit(policy, prompts, examples, args, train.generator(args, 1))
    assert torch.equal(found.A_hat, kept[-1]) and found.A_hat.unique().numel() > 50
    idle = found.A == 0  # prompts of four objects
    assert idle.any() and (found.roles[idle] > 0).any() and (found.scored[idle] == 0).all()
    assert (found.w[idle] == 1).all() and (found.w[~idle] != 1).any() and (found.delta[idle] == 0).all()
    plain = Namespace(**vars(args) | {"algo": "grpo"})
    found = credit.credit(policy, prompts, examples, plain, train.generator(args, 1))
    assert (found.w == 1).all() and torch.equal(found.A_hat, found.A[:, None].expand_as(found.w))


# ------------------------------------------------------------------------------------------- contrast


def test_labels_follow_the_scene():
    scene = (Fact("a1", "red", "circle"), Fact("b2", "blue", "square"))
    query = Query("count", ("red",))
    example = Example((), query.text(), "1", scene, query)
    pieces = ["<perception>", " a1", " red", " square", ",", " b2", " blue", " square", "</perception>", "\n"]
    pieces += ["<reasoning>", " a1", " red", " b2", " no", " so", " 1", "</reasoning>", "\n"]
    pieces += ["<answer>", " 1", "</answer>"]
    sizes = [len(p) for p in pieces]
    ends = np.cumsum(sizes)
    found = contrast.labels("".join(pieces), list(zip(ends - sizes, ends, strict=True)), example)
    names = [f"{piece}{t}" for t, piece in enumerate(pieces)]
    said = {k: {n: int(v) for n, v in zip(names, x, strict=True) if v >= 0} for k, x in found.items()}
    seen = {" a11": 0, " red2": 1, " square3": 1, ",4": 0, " b25": 0, " blue6": 1, " square7": 1}
    assert said["seen"] == seen
    assert said["asked"] == {" red2": 1, " square3": 0, " blue6": 1, " square7": 0}
    assert said["true"] == {" red2": 1, " square3": 0, " blue6": 1, " square7": 1}
    assert said["needed"] == {" a111": 0, " red12": 1, " b213": 0, " no14": 1, " so15": 0, " 116": 1}
    assert contrast.auc(np.array([3.0, 1.0, 2.0, 9.0]), np.array([1, 0, 0, -1])) == 1.0
    assert contrast.auc(np.array([1.0, 1.0]), np.array([1, 0])) == 0.5
    assert contrast.auc(np.array([1.0]), np.array([1])) is None


def test_contrast_measures_every_corruption(cache, capsys, monkeypatch):
    monkeypatch.setattr(credit, "token_roles", bench.draw_roles)
    assert contrast.main("--warmup-steps 20 --prompts 2 --choice tau=3".split()) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    assert [row[0] for row in rows] == [*contrast.CORRUPTIONS, "patch, 4 masks"]
    columns = {name: [float(row[i]) for row in rows] for i, name in enumerate(head) if i}
    assert len(set(columns["Δ R"])) == 1 < len(set(columns["Δ P"]))  # no image has a part in step 3
    assert all(0 <= x <= 1 for name in ("clipped low", "clipped high") for x in columns[name])
    assert all((p - 1) * (r - 1) < 0 for p, r in zip(columns["w P"], columns["w R"], strict=True))
    assert contrast.main(["--model", "nowhere"]) == 2 and "not the tiny model" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- math, and bench


def test_math_verify_is_asked_when_it_is_wanted(cache, monkeypatch, capsys, tmp_path):
    place = f"{HERE / 'math_reward.py'}:reward"
    monkeypatch.setitem(sys.modules, "math_verify", None)
    options = ["--reward", place, "--warmup-steps", "20", "--out", str(tmp_path / "run")]
    assert train.main(options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: --reward {place}: ") and "pip install 'math-verify[antlr4_13_2]'" in said
    monkeypatch.undo()
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")
    import math_reward

    example, text = Example((), "?", r"\sqrt{12}"), data.respond("a", "b", r"$2\sqrt{3}$")
    judge = train.reward_from(place)
    assert data.verify(text, example).accuracy == 0 and judge(text, example).accuracy == 1
    assert judge(text, example).reward == 1 and math_reward.reward(text, example) == judge(text, example)
    assert judge(text.replace("3", "5"), example).accuracy == 0
    for given, truth in (("act", "cat"), ("no", "on"), ("lube", "blue")):  # products of the same letters
        assert not math_reward.math_match(given, truth)
    assert math_reward.math_match("Cat.", "cat") and math_reward.math_match("0.5", r"\frac{1}{2}")


def test_bench_compares_with_another_version(tmp_path):
    """One that answers what is asked of it, and takes 100 s for each phase."""
    found = {"phases": [[100, 100, 100]], "tokens": [1], "peak": 0.0}
    (tmp_path / "extras").mkdir()
    lines = ["SHAPES = {'short': (0,) * 7}", "make_folder = lambda folder, shape: folder.mkdir()"]
    lines += ["if __name__ == '__main__':", f"    print('RESULT ' + {json.dumps(found)!r})"]
    (tmp_path / "extras" / "bench.py").write_text("\n".join(lines))
    asked = "--shape short --turns 1 --steps 3 --conditions srpo --device cpu --against".split()
    command = [sys.executable, str(HERE / "bench.py"), *asked, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.search(r"^srpo, seconds a step: old 300.000, new (\S+), new / old (\S+)$", said, re.MULTILINE)
    new, ratio = line.groups()
    assert 0 < float(new) < 300 and float(ratio) == pytest.approx(float(new) / 300, abs=1e-3)
