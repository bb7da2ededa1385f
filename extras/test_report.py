"""Tests of the report and of the learning curves.

pip install pytest matplotlib, then python -m pytest -q extras/test_report.py
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

pytest.importorskip("matplotlib", reason="pip install matplotlib")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import charts  # noqa: E402
import credit  # noqa: E402
import report  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

EVIL = '<script>alert("x")</script>'


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
    return page, png, svg, ["--out", str(page), "--png", str(png), "--curves", str(svg)]


# ---- the page


def test_report_shows_everything_and_runs_nothing(tmp_path, files, capsys, monkeypatch):
    def kept_groups(run):
        return json.loads((run / "groups.json").read_text())

    monkeypatch.setattr(report, "sample_groups", kept_groups)
    runs = [make_run(tmp_path, seed, 0.5 + 0.1 * seed, text="a" + EVIL) for seed in range(3)]
    runs.append(make_run(tmp_path, 0, 0.9, name="b" + "&<i>"))
    page, png, svg, options = files
    assert report.main([*map(str, runs), *options]) == 0
    shown = Reader(page.read_text(encoding="utf-8"))
    assert not {"script", "i", "link"} & {tag for tag, _ in shown.tags}
    assert shown.text.count(EVIL) == 3 + 2  # question and answer for each name, and a response
    sources = shown.values("src")
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert shown.values("href") == []
    assert all(place.startswith("#") for place in shown.values("xlink:href"))
    assert "url(http" not in page.read_text(encoding="utf-8")
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
    curves = svg.read_text()
    assert "<svg" in curves
    assert "nan" not in re.sub(r"[\w-]*nan\w+", "", curves.lower())


def test_weights_stand_under_the_tokens_of_a_role(tmp_path, monkeypatch):
    response = json.loads((make_run(tmp_path, 0, 0.5) / "groups.json").read_text())
    response = response[0]["responses"][0]
    shown = Reader(report.response_html(response))
    assert [tag for tag, _ in shown.tags].count("small") == 2  # not under EOS
    assert shown.text.endswith("a1.75b0.50EOS")
    response["text"] = "a\nb"
    response["offsets"] = [[0, 2], [2, 3]]
    assert "a↵<small>1.75</small></span>\n<span" in report.response_html(response)


def test_the_page_goes_to_the_folder_of_the_first_run(tmp_path, capsys):
    first = make_run(tmp_path, 0, 0.5)
    second = make_run(tmp_path, 1, 0.5)
    assert report.main([str(first), str(second)]) == 0
    assert capsys.readouterr().out.strip() == str(first / "report.html")
    assert "a (2 runs)" in (first / "report.html").read_text(encoding="utf-8")
    assert not (second / "report.html").exists()


@pytest.mark.parametrize("options", [None, "", "[1]"])
def test_a_folder_that_is_not_of_a_run_is_named(options, tmp_path, capsys):
    if options is not None:
        (tmp_path / "args.json").write_text(options)
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: not the folder of a run")
    assert said.count("\n") == 1


DAMAGED = ["{", "[1]", '{"reward": 1}', '{"step": 0, "eval": null}', '{"step": 1, "reward": "x"}']


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_records_are_named(line, tmp_path, capsys):
    run = make_run(tmp_path, 0, 0.5)
    (run / "metrics.jsonl").write_text(f"{line}\n")
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
    assert "svg" in tags
    assert "w_perception" in shown.text
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
def test_report_of_a_real_run(cache, tmp_path, files, algo, monkeypatch):
    (tmp_path / "my.py").write_text("def reward(text, example): return len(text) % 7\n")
    run = tmp_path / f"mine-{algo}"
    argv = "--warmup-steps 20 --steps 2 --prompts 2 --group-size 4 --eval-size 4 --algo".split()
    argv += [algo, "--reward", "my.py:reward", "--out", run.name]
    monkeypatch.chdir(tmp_path)
    assert train.main(argv) == 0
    monkeypatch.chdir("/")  # the relative path of the reward begins elsewhere
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
    assert "<svg" in svg.read_text()


def test_groups_are_sought_in_further_batches(tmp_path, monkeypatch):
    """Rewards differ in the third batch for one prompt, in the fifth for two; two are wanted."""
    with_spread = {3: [1], 5: [0, 1]}
    args = Namespace(prompts=2, group_size=2, algo="grpo")
    asked = []

    def sample(policy, examples, args, step):
        asked.append(step)
        A = torch.zeros(2, 2)
        for g in with_spread.get(step - 7, []):
            A[g] = torch.tensor([0.7, -0.7])
        return Namespace(A=A.flatten(), step=step)

    class Task:
        def train_batch(self, step, n):
            return [step] * n

    monkeypatch.setattr(credit, "finished", lambda folder: (args, None, 7))
    monkeypatch.setattr(credit, "sample", sample)
    monkeypatch.setattr(credit, "credit", lambda *_: None)
    monkeypatch.setattr(train, "build_task", lambda args: Task())
    monkeypatch.setattr(train, "corrupted_copies", lambda *_: None)
    monkeypatch.setattr(report, "group_shown", lambda p, batch, f, g, a: {"of": (batch.step, g)})
    groups = report.sample_groups(tmp_path)
    assert [group["of"] for group in groups] == [(10, 1), (12, 0)]
    assert {group["step"] for group in groups} == {7}
    assert asked == [8, 9, 10, 11, 12]
    with_spread.clear()
    with pytest.raises(data.InputError, match="in the next 10 batches no group has a spread"):
        report.sample_groups(tmp_path)


def test_without_matplotlib_one_line_says_what_to_install():
    script = "import runpy, sys; sys.modules['matplotlib'] = None; "
    script += f"runpy.run_path({str(HERE / 'report.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", script, "a-run"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: pictures need matplotlib: pip install matplotlib\n"


# ---- curves


def test_bands_are_over_seeds(tmp_path):
    accuracies = (0.4, 0.5, 0.6)
    runs = [report.read_run(make_run(tmp_path, seed, x)) for seed, x in enumerate(accuracies)]
    step, mean, low, high = charts.curve(runs, "accuracy")[0]
    assert step == 0
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(0.1 / 3**0.5)
    assert mean - low == pytest.approx(high - mean)
    wrong_reason = [point[1] for point in charts.curve(runs, "wrong reason")]
    assert wrong_reason == pytest.approx([0.25, 0.25])
    assert [point[0] for point in charts.curve(runs, "reward")] == [1]
    runs[1]["args"].update(cwd="/elsewhere", resume="out/a-seed1")  # but the same condition
    assert list(charts.label_runs(runs)) == ["a"]
    runs[0]["args"]["tau"] = 2.0  # no longer
    labelled = charts.label_runs(runs)
    assert {label: len(members) for label, members in labelled.items()} == {
        "a, tau 2.0": 1,
        "a, tau 1.0": 2,
    }


def test_curves_are_drawn_as_computed(tmp_path):
    runs = [report.read_run(make_run(tmp_path, seed, x)) for seed, x in enumerate((0.4, 0.6))]
    other = report.read_run(make_run(tmp_path, 0, 0.9, name="b $x$ and $y$"))
    labelled = charts.label_runs([*runs, other])
    figure = charts.figure_of(labelled, ("accuracy", "length", "reward"))
    accuracy, reward = figure.axes  # no run has a length
    assert accuracy.get_title(loc="left") == "accuracy"
    assert [line.get_xdata().tolist() for line in accuracy.lines] == [[0, 2]] * 2
    assert np.allclose(accuracy.lines[0].get_ydata(), 0.5)
    assert np.allclose(accuracy.lines[1].get_ydata(), 0.9)
    assert reward.lines[0].get_ydata().tolist() == [0.5]
    looks = {(line.get_color(), line.get_linestyle()) for line in accuracy.lines}
    assert len(looks) == 2
    band = accuracy.collections[0].get_paths()[0].vertices[:, 1]
    error = 0.02**0.5 / 2**0.5
    assert (band.min(), band.max()) == pytest.approx((0.5 - error, 0.5 + error))
    text = charts.svg(figure)
    assert text == charts.svg(figure)
    assert "a (2 runs)" in text
    assert "b $x$ and $y$ (1 run)" in text  # not taken for a formula


def test_no_label_is_cut_off(tmp_path):
    run = report.read_run(make_run(tmp_path, 0, 0.5))
    figure = charts.figure_of(charts.label_runs([run]), charts.EVALS + charts.STEPS)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    labels = figure.legends[0].get_texts()
    for axes in figure.axes:
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        low, high = axes.get_xlim()
        labels += [label for place, label in ticks if low <= place <= high]
        labels += [axes.xaxis.label]
    for label in labels:
        box = label.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= width, label
        assert 0 <= box.y0 <= box.y1 <= height, label


def test_options_changed_by_hand_leave_the_curves(tmp_path, monkeypatch):
    run = make_run(tmp_path, 0, 0.5)

    def fail(folder):
        raise KeyError("chess")

    monkeypatch.setattr(report, "sample_groups", fail)
    assert report.main([str(run)]) == 0
    assert "its args.json does not hold the options of a run" in (run / "report.html").read_text()


# ---- curves


def some_run(algo: str, seed: int, values: list[float], task: str = "count") -> dict:
    """A run with an evaluation at step 0, 10, 20 ..."""
    records = []
    for i, value in enumerate(values):
        scores = {"accuracy": value, "grounded": value / 2}
        records.append({"step": 10 * i, "eval": scores})
    args = {"algo": algo, "seed": seed, "task": task}
    return {"name": f"{task}-{algo}-seed{seed}", "args": args, "records": records}


def test_differences_to_grpo_are_paired_by_task_and_seed():
    ours = [some_run("srpo", seed, [0.5, 0.6 + 0.1 * seed]) for seed in range(3)]
    theirs = [some_run("grpo", seed, [0.5, 0.5]) for seed in (2, 1, 0)]
    baseline = charts.baselines({"ours": ours, "theirs": theirs})
    start, end = charts.differences(ours, baseline, "accuracy")
    assert start == (0, 0.0, 0.0, 0.0)
    error = 4.30 * 0.1 / 3**0.5  # Student's, 2 degrees of freedom
    assert end == pytest.approx((10, 0.2, 0.2 - error, 0.2 + error))  # of 0.1, 0.2 and 0.3
    assert charts.differences(theirs, baseline, "accuracy") == []  # not to themselves
    assert charts.differences(ours[:1], baseline, "accuracy") == []  # one pair has no interval
    elsewhere = [some_run("srpo", seed, [0.5, 0.6], task="add") for seed in range(3)]
    assert charts.differences(elsewhere, baseline, "accuracy") == []
    again = some_run("grpo", 0, [0.1, 0.1])
    assert charts.baselines({"theirs": theirs, "again": [again]}) == {}  # which of the two?


def test_differences_stand_below_means_without_bands():
    runs = [some_run("srpo", seed, [0.5, 0.6 + 0.1 * seed]) for seed in range(3)]
    runs += [some_run("grpo", seed, [0.5, 0.5]) for seed in range(3)]
    figure = charts.figure_of(charts.label_runs(runs), charts.SHOWN)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    below = [f"{name} minus GRPO's" for name in charts.SHOWN]
    assert titles == [*charts.SHOWN, *below]
    means, apart = figure.axes[0], figure.axes[3]
    assert [len(line.get_xdata()) for line in means.lines] == [2, 2]
    assert len(means.collections) == 0
    ends = apart.collections[0].get_segments()[1][:, 1]
    error = 4.30 * 0.1 / 3**0.5
    assert sorted(ends) == pytest.approx([0.2 - error, 0.2 + error])
    assert len(apart.collections) == 1  # GRPO has none
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["srpo (3 runs)", "grpo (3 runs)"]  # without "count-"


def test_names_lose_what_all_of_them_share():
    names = charts.short_names(["count-grpo", "count-range-0.5-2"])
    assert names == {"count-grpo": "grpo", "count-range-0.5-2": "range-0.5-2"}
    for kept in (["a-b"], ["a", "a-b"], ["tiny-srpo", "smol-srpo"]):
        assert charts.short_names(kept) == dict(zip(kept, kept, strict=True))
