"""Tests of the study: its conditions, its regimes, a run, its tables, and what is recorded.

pip install scipy pytest, then python -m pytest -q extras/test_study.py
"""

import re
import shlex
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import contrast  # noqa: E402
import readings  # noqa: E402
import study  # noqa: E402
import study_tables  # noqa: E402
from study_conditions import CONDITIONS, RUNNABLE  # noqa: E402
from test_readings import NAMES  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from data import CELLS, COLORS, SHAPES  # noqa: E402

# ---- conditions

# What the name of a condition says about the options of train.py.
SAID = {
    "corruption": "corruption",
    "p": "corruption_p",
    "tau": "tau",
    "lam": "lam",
}
NARROW = ["grpo", "srpo", "softmax", "sigmoid", "rlsd"]
NARROW += ["relative-rlsd", "relative-vppo", "relative-pgpo", "relative-tor"]


def options_of(condition: str) -> Namespace:
    return train.resolve_options(shlex.split(CONDITIONS[condition].options))


def test_each_condition_has_the_options_that_its_name_says():
    default = train.resolve_options([])
    for name in RUNNABLE:
        args = options_of(name)
        is_narrow = (args.w_min, args.w_max) == (default.w_min, default.w_max)
        assert is_narrow == (name in NARROW), name
        assert is_narrow or (args.w_min, args.w_max) == (0.5, 2.0)
        left, _, value = name.partition("=")
        if left in SAID:
            assert str(getattr(args, SAID[left])) in (value, f"{value}.0"), name
            assert getattr(args, SAID[left]) != getattr(default, SAID[left])
        assert args.algo == ("grpo" if name == "grpo" else "srpo")
    assert options_of("standardized-tau-3").tau == 3


def test_each_reading_is_a_condition():
    """Of the same name but for dashes, with few exceptions; none is used twice."""
    used = {}
    for name in RUNNABLE:
        place = options_of(name).weights
        if place is not None:
            assert callable(train.load_function("--weights", place))
            file, _, function = place.rpartition(":")
            assert Path(file) == HERE / "readings.py" and hasattr(readings, function)
            used.setdefault(function, []).append(name)
    assert sorted(used) == sorted(NAMES)
    assert used.pop("standardized") == ["standardized", "standardized-tau-3"]
    assert used.pop("unnormalized") == ["normalize=false"]
    assert used.pop("sign_aware_fading") == ["rlsd"]
    assert used.pop("role_baselines_sign_aware") == ["role-baselines+sign"]
    for function, names in used.items():
        assert len(names) == 1
        spelled = names[0].removeprefix("contrast=").removeprefix("relative-")
        assert spelled.removesuffix("=true").replace("-", "_") == function


def test_what_cannot_be_run_any_more_is_tabled_and_refused(capsys, tmp_path):
    past = set(CONDITIONS) - set(RUNNABLE)
    assert past == {
        "answer_is_reasoning=true",
        "corrupt_both=true",
        "jensen-shannon",
        "state-only",
        "token-only",
        "zero-mean",
    }
    assert not past & set(study.REGIMES["default"].conditions)
    pytest.importorskip("scipy", reason="pip install scipy")
    for conditions, said in (("grpo,zero-mean", "zero-mean: run by commit"), ("k9", "unknown: k9")):
        assert study.main(["--conditions", conditions, "--out", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


# ---- regimes and runs


def test_sentences_state_the_facts(monkeypatch):
    for module, name in ((train, "demonstrate"), (data, "DrawnTask"), (model, "TINY_WORDS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    study.install_sentences()
    policy = model.build_tiny()
    rng = np.random.default_rng(0)
    args = train.resolve_options(["--task", "add", "--device", "cpu"])
    examples = train.build_task(args).train_batch(0, 200)
    texts = [train.demonstrate(example, 0.0, rng) for example in examples]
    assert {len(example.scene) for example in examples} == {4, 5, 6}
    assert any(example.answer == "10" for example in examples)
    for text, example in zip(texts, examples, strict=True):
        verdict = data.verify(text, example)
        assert verdict.perception == verdict.grounded == verdict.consistent == 1
    rollout = policy.as_rollout(texts)
    responses = policy.decode(rollout)
    assert [text for text, _ in responses] == texts and rollout.ids.shape[1] < 112
    seen = " ".join(text.split("</perception>")[0].removeprefix("<perception>") for text in texts)
    words = re.findall(r"\w+", seen)
    facts = sum(word in (*CELLS, *COLORS, *SHAPES) for word in words)
    assert 0.47 < facts / len(words) < 0.53
    right = contrast.labels(*responses[0], examples[0])["true"]
    assert (right == 1).sum() == 2 * len(examples[0].scene) and (right != 0).all()


def test_a_run_becomes_a_row_and_is_not_repeated(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FINAL", 32)
    options = "--steps 2 --prompts 4 --warmup-steps 120 --eval-size 16"
    job = ("count", "contrast=k3", 3)
    row = study.run((*job, "default", tmp_path, options))
    recorded = (HERE / "study.csv").read_text(encoding="utf-8").split("\n", 1)[0]
    assert ",".join(row) == recorded.strip()  # it could be appended there
    assert (row["task"], row["condition"], row["seed"]) == job and row["options"] == options
    assert row["wrong_reason"] == row["accuracy"] - row["grounded"]
    assert 0 < row["w_perception"] < 2 and row["w_perception"] != 1
    assert np.isnan(row["r_entropy"]) and row["seconds"] > 0
    assert row["perception"] > 0 and row["accuracy"] != row["swapped"]
    args = train.resolve_options(train.Run(tmp_path / "count-contrast=k3-seed3").go_back())
    assert args.weights.endswith("readings.py:k3") and (args.seed, args.w_max) == (3, 2)
    study.append(tmp_path / "study.csv", row)

    def no_worker(*_):
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(study, "Worker", no_worker)
    study.study([job], tmp_path, "default", options, 1)
    with pytest.raises(AssertionError, match="nothing is left"):
        study.study([job], tmp_path, "slow", options, 1)  # of another regime


def test_last_evaluations_show_other_images(cache, tmp_path, monkeypatch):
    """The questions stay, the images are the own, painted over, and the next question's."""
    monkeypatch.setattr(study, "FINAL", 3)
    study.trained(tmp_path / "run", "--steps 1 --prompts 2 --warmup-steps 1 --eval-size 2")
    shown = []

    def evaluate(policy, examples, judge, args, step):
        shown.append(examples)
        return {"eval": len(shown)}

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert study.last_evaluations(tmp_path / "run") == [1, 2, 3]
    own, painted, swapped = shown
    assert [e.question for e in own] == [e.question for e in painted]
    assert [e.question for e in own] == [e.question for e in swapped]
    for i in range(3):
        assert np.ptp(np.asarray(painted[i].images[0]), axis=(0, 1)).max() == 0
        assert swapped[i].images == own[(i + 1) % 3].images != own[i].images


def test_a_failed_run_says_why(tmp_path):
    with pytest.raises(data.InputError, match="--w-min 3.0: above --w-max 2.0"):
        study.trained(tmp_path / "run", "--w-min 3 --w-max 2")


# ---- tables


def cells_of(line: str) -> list[str]:
    return [cell.strip().replace("−", "-") for cell in line.strip("|").split("|")]


def rows_of(text: str) -> list[list[str]]:
    return [cells_of(line) for line in text.splitlines() if line.startswith("| ")]


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d\.\d+", text)]


def test_the_recorded_study_is_of_these_conditions():
    pytest.importorskip("scipy", reason="pip install scipy")
    rows = study.read(HERE / "study.csv")
    assert {r["condition"] for r in rows} <= set(CONDITIONS)
    for name, regime in study.REGIMES.items():
        options = f"{study.OPTIONS} {regime.options}".strip()
        assert {r["options"] for r in rows if r["regime"] == name} <= {options}
    computed = study.tables(rows)
    written = (HERE / "study.md").read_text(encoding="utf-8")
    assert written.endswith(f"# Tables\n\n{computed}\n")  # to the letter

    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Results")[1].split("## ")[0]
    known = {}  # of a condition: runs, accuracy, grounded, then pairs and the differences to GRPO
    for name, *figures in rows_of(computed.split("By task")[0])[1:]:
        known.setdefault(name, []).extend(figures[:3])
    for name, runs, *shown in rows_of(table)[1:]:
        count, accuracy, grounded, *differences = known[name]
        assert runs == count
        expected = [accuracy.split()[0], grounded.split()[0], *differences[1:]]
        for cell, text in zip(shown, expected, strict=False):
            if cell:
                same = pytest.approx(numbers_in(text), abs=0.0051)
                assert numbers_in(cell) == same, (name, cell, text)
    assert {"grpo", "srpo", "shuffled"} <= known.keys() and "| srpo |" in table


def row_of(task, condition, seed, accuracy, grounded):
    row = {"task": task, "condition": condition, "seed": seed, "regime": "default"}
    row.update(commit="abc", options="--steps 1")
    row.update(dict.fromkeys((*study_tables.OUTCOMES, "start"), 0.5))
    row.update(accuracy=accuracy, grounded=grounded)
    row.update(dict.fromkeys(study_tables.CREDIT, 0.25))
    return row


@pytest.fixture()
def rows(tmp_path):
    """Two tasks, six seeds of GRPO and SRPO, which is 0.1 more accurate; one run of tau=3."""
    rng = np.random.default_rng(0)
    record = partial(study.append, tmp_path / "study.csv")
    for task, base in (("count", 0.5), ("add", 0.3)):
        for seed in range(6):
            x = base + 0.01 * seed
            record(row_of(task, "grpo", seed, x, x / 2))
            record(row_of(task, "srpo", seed, x + 0.1 + 0.002 * rng.random(), x / 2))
    record(row_of("count", "tau=3", 0, 0.5, 0.5))  # not on every task yet
    return study.read(tmp_path / "study.csv")


def test_rows_are_recorded_and_read(rows, tmp_path):
    assert len(rows) == 25 and rows[0]["seed"] == 0 and rows[0]["accuracy"] == 0.5
    with pytest.raises(ValueError, match="other columns"):
        study.append(tmp_path / "study.csv", {"task": "count"})


def test_tables(rows):
    pytest.importorskip("scipy", reason="pip install scipy")
    text = study.tables(rows)
    of_count = [0.5 + 0.01 * seed for seed in range(6)]
    of_add = [0.3 + 0.01 * seed for seed in range(6)]
    values = np.sort(of_count + of_add)
    assert f"| grpo | 12 | {values[3:9].mean():.3f} [" in text
    assert "tau=3" not in text  # not on every task
    second_table = text.split("\n\n")[4]
    paired = next(line for line in second_table.splitlines() if line.startswith("| srpo"))
    mean, low, high = numbers_in(cells_of(paired)[2])
    assert 0.1 <= low <= mean <= high <= 0.102
    assert re.search(r"\| 1\.000.*\| 0\.500 \[.*\| 0.00049 \| 1 \|$", paired)  # 2 in 2 ** 12 signs
    assert "the 1 conditions" in text and "seeds 0 to 5" in text
    assert text.count("## default") == 1


def test_fresh_seeds_and_other_regimes_are_tabled_apart(rows):
    pytest.importorskip("scipy", reason="pip install scipy")
    text = study.tables(rows)
    fresh = [{**r, "seed": r["seed"] + 10} for r in rows]
    slow = [{**r, "regime": "slow"} for r in rows]
    parts = study.tables(rows + fresh + slow).split("## ")
    assert [part.split(":")[0] for part in parts] == ["", "default", "default", "slow"]
    assert parts[1].strip() == text.removeprefix("## ") and "seeds 10 to 15" in parts[2]


def test_jobs_are_planned_seed_by_seed_and_those_done_are_left_out(rows):
    jobs = study.planned(["grpo", "srpo", "tau=3"], ["count", "add"], 6, 2, 0)
    assert len(jobs) == 2 * (6 + 6 + 2)
    assert jobs[0] == ("count", "grpo", 0) and jobs[-1] == ("add", "tau=3", 1)
    later = study.planned(["grpo", "srpo", "tau=3"], ["count", "add"], 6, 2, first=10)
    assert later == [(task, condition, seed + 10) for task, condition, seed in jobs]
    left = [("add", "tau=3", 0), ("count", "tau=3", 1), ("add", "tau=3", 1)]
    assert study.lacking(jobs, rows, "default") == left
    assert study.lacking(jobs, rows, "slow") == jobs


def test_improvement_counts_pairs():
    found = study_tables.improvement(np.array([1.0, 3.0]), np.array([2.0, 3.0]))
    assert found == pytest.approx((0 + 0 + 1 + 0.5) / 4)


def test_p_values_are_corrected():
    corrected = study_tables.holm([0.01, 0.04, 0.03, 0.5])
    assert corrected == pytest.approx([0.04, 0.09, 0.09, 0.5])
    pytest.importorskip("scipy", reason="pip install scipy")
    assert study_tables.signed_rank(np.array([1.0, 2.0, 3.0, 4.0])) == 2 / 2**4
    assert study_tables.signed_rank(np.zeros(4)) == 1
