"""Tests of tasks: drawn scenes, your own rows, and what is held out of them.

pip install pytest, then python -m pytest -q extras/test_data.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
from test_srpo import jsonl  # noqa: E402, F401

# ---- drawn tasks


@pytest.mark.parametrize("task", data.TASKS)
def test_drawn_tasks_are_split_by_scene_and_follow_the_seed(task):
    drawn = data.DrawnTask(task, seed=3)
    scenes = [example.scene for example in drawn.train_batch(0, 400)]
    assert not any(data.is_held_out(scene) for scene in scenes)
    assert all(data.is_held_out(example.scene) for example in drawn.eval_set(200))
    assert [example.scene for example in drawn.train_batch(0, 400)] == scenes
    assert [example.scene for example in drawn.train_batch(1, 400)] != scenes


@pytest.mark.parametrize("task", data.TASKS)
def test_drawn_tasks_are_not_won_by_guessing(task):
    examples = data.DrawnTask(task, seed=3).train_batch(0, 400)
    answers = [example.answer for example in examples]
    assert max(answers.count(answer) for answer in set(answers)) < 0.4 * len(answers)


@pytest.mark.parametrize("task", data.TASKS)
def test_an_answer_can_be_right_for_the_wrong_reason(task):
    rng = np.random.default_rng(0)
    wrong_reasons = 0
    for example in data.DrawnTask(task, seed=3).train_batch(0, 400):
        perfect = data.verify(data.demonstrate(example, 0.0, rng), example)
        assert perfect == data.Verdict(1, 1, 1, 1, 1, 1)
        misstated = data.verify(data.demonstrate(example, 0.5, rng), example)
        assert misstated.consistent == 1
        assert misstated.format == 1
        assert misstated.grounded <= misstated.accuracy
        if misstated.grounded < misstated.accuracy:
            wrong_reasons += 1
    assert wrong_reasons > 0


# ---- your own rows


def sources(examples):
    return {example.source for example in examples}


def test_your_rows_are_split_by_image_and_seen_once_an_epoch(jsonl):  # noqa: F811
    row = {"images": ["2.png", "3.png"], "question": "Same?", "answer": "no"}
    task = data.OwnTask(jsonl(json.dumps(row)), seed=1)
    held_out = sources(task.eval_set(9))
    n = 20 - len(held_out)
    assert held_out
    epoch = task.train_batch(0, n)
    assert len(sources(epoch)) == n
    assert not sources(epoch) & held_out
    stream = []
    for step in range(6):
        stream += [example.source for example in task.train_batch(step, 3)]
    assert [example.source for example in task.train_batch(4, 3)] == stream[12:15]
    assert max(len(example.images) for example in [*epoch, *task.eval_set(9)]) == 2


def test_with_eval_all_every_row_is_for_evaluation(jsonl):  # noqa: F811
    task = data.OwnTask(jsonl(), eval_all=True)
    assert len(list(task.eval_set(99))) == 20


def test_no_image_is_in_both_parts_under_whatever_name(jsonl, tmp_path):  # noqa: F811
    jsonl()
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    lines = []
    for name in ("0.png", "./0.png", "copy.png", *(f"{i}.png" for i in range(1, 10))):
        row = {"image": name, "question": "q\u2028?", "answer": True}
        lines.append(json.dumps(row, ensure_ascii=False))
    lines[0] = "\ufeff" + lines[0]
    task = data.OwnTask(jsonl(lines=lines))
    held_out = {example.images[0].tobytes() for example in task.eval_set(99)}
    trained = {example.images[0].tobytes() for example in task.train_batch(0, 30)}
    assert len(held_out) == 1
    assert not held_out & trained
