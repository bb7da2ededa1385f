"""Tests of the report, the credit it shows, the contrast figures and the bench.

pip install pytest, then python -m pytest -q extras/test_extras.py
"""

import argparse
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench  # noqa: E402
import charts  # noqa: E402
import contrast  # noqa: E402
import credit  # noqa: E402
import report  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import Example, Fact, Query  # noqa: E402

EVIL = '<script>alert("x")</script>'

# ---- report


def make_run(folder: Path, seed: int, accuracy: float, text: str = "ab", name: str = "a") -> Path:
    """Files of a run of train.py, and beside them a group with one response of two tokens, EOS."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir()
    options = {"algo": "srpo", "seed": seed, "argv": ["--seed", str(seed)], "tau": 1.0}
    (run / "args.json").write_text(json.dumps(options))
    scores = {"accuracy": accuracy, "grounded": accuracy / 2, "perception": 0.5, "consistent": 1.0}
    step = {"step": 1, "reward": 0.5, "w_perception": 1.2}
    records = [{"step": 0, "eval": scores}, step, {"step": 2, "eval": scores}]
    lines = [json.dumps(record) + "\n" for record in records]
    (run / "metrics.jsonl").write_text("".join(lines))
    response = {
        "text": text,
        "offsets": [[0, 1], [1, len(text)]],
        "roles": [1, 2, 0],
        "delta": [1.5, -0.25, 0.0],
        "weights": [1.75, 0.5, 1.0],
        "advantages": [1.4, 0.4, 0.8],
        "advantage": 0.8,
        "baseline": 0.625,
        "reward": 1.0,
        "accuracy": 1.0,
        "format": 1.0,
        "grounded": 0.0,
    }
    picture = report.png(Image.new("RGB", (4, 4), "red"))
    group = {
        "step": 1,
        "question": EVIL,
        "answer": EVIL,
        "images": [picture],
        "corrupted": [picture],
        "responses": [response],
    }
    (run / "groups.json").write_text(json.dumps([group]))
    return run


class Reader(HTMLParser):
    """Tags, attributes and text as a browser would take them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text

    def values(self, attribute: str) -> list[str]:
        return [found[attribute] for _, found in self.tags if attribute in found]


@pytest.fixture
def files(tmp_path):
    """Where page, picture and curves go, and the command line that says so."""
    page, png, svg = [tmp_path / f"report.{end}" for end in ("html", "png", "svg")]
    return page, png, svg, ["--out", str(page), "--png", str(png), "--svg", str(svg)]


def test_report_shows_everything_and_runs_nothing(tmp_path, files, capsys, monkeypatch):
    def kept_groups(run):
        return json.loads((run / "groups.json").read_text())

    monkeypatch.setattr(report, "sample_groups", kept_groups)
    runs = [make_run(tmp_path, seed, 0.5 + 0.1 * seed, text="a" + EVIL) for seed in range(3)]
    runs.append(make_run(tmp_path, 0, 0.9, name="b" + "&<i>"))
    page, png, svg, options = files
    assert report.main([*map(str, runs), *options]) == 0
    shown = Reader(page.read_text(encoding="utf-8"))
    assert not {"script", "i"} & {tag for tag, _ in shown.tags}
    assert shown.text.count(EVIL) == 3 + 2  # question and answer for each name, and a response
    sources = shown.values("src")
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert shown.values("href") == []
    assert shown.values("data-tip")[:3] == [
        "Perception: w 1.75, Â +1.40, Δ +1.50",
        "Reasoning: w 0.50, Â +0.40, Δ -0.25",
        "Other: w 1.00, Â +0.80",
    ]
    assert "right for the wrong reason" in shown.text
    assert "reward 1.00, A +0.80, b +0.62" in shown.text
    assert "a (3 runs)" in shown.text
    assert "b&<i> (1 run)" in shown.text
    assert Image.open(png).size[0] > 500
    assert svg.read_text().startswith("<svg xmlns=")
    assert "NaN" not in svg.read_text()


@pytest.mark.parametrize("options", [None, "", "[1]"])
def test_a_folder_that_is_not_of_a_run_is_named(options, tmp_path, capsys):
    if options is not None:
        (tmp_path / "args.json").write_text(options)
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: not the folder of a run")
    assert said.count("\n") == 1


def test_damaged_records_are_named(tmp_path, capsys):
    run = make_run(tmp_path, 0, 0.5)
    (run / "metrics.jsonl").write_text("{\n")
    assert report.main([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run}: its metrics.jsonl is damaged")
    assert said.count("\n") == 1


def test_without_a_checkpoint_there_are_curves_and_a_line_that_says_so(tmp_path, files, capsys):
    run = make_run(tmp_path, 0, 0.5, name="b&<i>")
    page, _, _, options = files
    assert report.main([str(run), "--out", str(page)]) == 0
    shown = Reader(page.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in shown.tags}
    assert "polyline" in tags
    assert not {"img", "i"} & tags
    assert f"No responses: {run}: holds no checkpoint" in shown.text
    capsys.readouterr()
    assert report.main([str(run), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run}: holds no checkpoint")
    assert said.count("\n") == 1


def test_a_run_of_an_earlier_version_says_so(tmp_path):
    run = make_run(tmp_path, 0, 0.5)
    (run / "checkpoint-000002").mkdir()
    with pytest.raises(data.InputError, match="earlier version"):
        credit.finished(run)


@pytest.mark.parametrize("algo", ["srpo", "grpo"])
def test_report_of_a_real_run(cache, tmp_path, files, algo):
    (tmp_path / "my.py").write_text("def reward(text, example): return len(text) % 7\n")
    run = tmp_path / f"mine-{algo}"
    argv = "--warmup-steps 20 --steps 2 --prompts 2 --group-size 4 --eval-size 4 --algo".split()
    argv += [algo, "--reward", f"{tmp_path / 'my.py'}:reward", "--out", str(run)]
    assert train.main(argv) == 0
    page, png, svg, options = files
    assert report.main([str(run), *options]) == 0
    shown = Reader(page.read_text(encoding="utf-8"))
    captions = shown.values("alt")
    assert captions.count("original image") == 2
    assert captions.count("corrupted image") == {"srpo": 2, "grpo": 0}[algo]
    question = data.DrawnTask("count", size=48).train_batch(2, 1)[0].question
    assert f"step 2: {question}" in shown.text  # what would come next
    assert "EOS" in shown.text
    assert shown.values("class").count("r") == 2 * 4
    assert Image.open(png).size[0] > 500
    assert "polyline" in svg.read_text()


def test_bands_are_over_seeds(tmp_path):
    accuracies = (0.4, 0.5, 0.6)
    runs = [report.read_run(make_run(tmp_path, seed, x)) for seed, x in enumerate(accuracies)]
    step, mean, low, high = charts.curve(runs, "accuracy")[0]
    assert step == 0
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(1.96 * 0.1 / 3**0.5)
    assert mean - low == pytest.approx(high - mean)
    wrong_reason = [point[1] for point in charts.curve(runs, "wrong reason")]
    assert wrong_reason == pytest.approx([0.25, 0.25])
    assert [point[0] for point in charts.curve(runs, "reward")] == [1]
    runs[0]["args"]["tau"] = 2.0  # no longer the same condition
    labelled = charts.label_runs(runs)
    assert {label: len(members) for label, members in labelled.items()} == {
        "a, tau 2.0": 1,
        "a, tau 1.0": 2,
    }


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
    policy = credit.warmed_up(args)
    batch = credit.sample(policy, train.build_task(args).train_batch(0, 6), args, step=1)
    found = credit.credit(policy, batch, args, step=1)
    idle = batch.A == 0  # prompts of four objects, which the loop leaves out
    assert torch.equal(found.A_hat[~idle], kept[0])
    assert found.A_hat.unique().numel() > 50
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
    for name, label in contrast.labels("".join(pieces), offsets, example).items():
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
        (["--model", "nowhere"], "not the tiny model"),
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
