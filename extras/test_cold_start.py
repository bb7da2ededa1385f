"""Tests of the cold start: what is imitated, when it ends, and what it leaves to train.py.

pip install peft pytest
python -m pytest -q extras/test_cold_start.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import cold_start  # noqa: E402
from test_real_models import hub_folder  # noqa: E402
from test_scripts import one_line  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from test_srpo import cache, jsonl, run  # noqa: E402, F401

FORM = "<perception> red</perception><reasoning> so</reasoning><answer> 1</answer>"
CPU = ["--device", "cpu", "--max-new-tokens", 48]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A small Qwen2-VL in the layout of the hub."""
    return hub_folder(tmp_path_factory.mktemp("hub"), "Qwen2VLConfig")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options for a folder with the tiny model's words and random weights, two prompts a step."""
    folder = tmp_path_factory.mktemp("random")
    model.build_tiny().save(folder)
    return [*CPU, "--model", str(folder), "--prompts", 2]


def begin(out, *argv):
    """What the script does with these options, to the end."""
    assert cold_start.main([*map(str, argv), "--out", str(out)]) == 0


def rows_with(response) -> list[str]:
    """Lines of a data file, each with this response to imitate."""
    rows = []
    for i in range(20):
        row = {"image": f"{i % 10}.png", "question": "How many red?", "answer": i % 3}
        rows.append(json.dumps({**row, "response": response}))
    return rows


# ---- what is learned


@torch.no_grad()
def likelihood(folder) -> float:
    """Mean log-prob of a token of demonstrations."""
    policy = model.load(str(folder))
    examples = data.DrawnTask("count").eval_set(8)
    rng = np.random.default_rng(0)
    written = policy.as_rollout([data.demonstrate(example, 0, rng) for example in examples])
    logp = policy.log_probs(policy.encode(examples), written, temperature=1.0)
    return (logp.sum() / written.mask.sum()).item()


@pytest.mark.parametrize("lora", [[], ["--lora", 16]])
def test_a_cold_start_teaches_any_model_the_form(hub, lora, tmp_path):
    if lora:
        pytest.importorskip("peft", reason="pip install peft")
    cold = tmp_path / "cold"
    options = ["--steps", 150, "--prompts", 8, "--lr", 3e-3, "--image-size", 48]
    begin(cold, "--model", hub, *CPU, *options, "--max-new-tokens", 90, *lora)
    assert likelihood(cold) > likelihood(hub) + 1
    assert not list(tmp_path.glob("*.tmp"))

    argv = ["--model", cold, *CPU, "--image-size", 48, "--max-new-tokens", 90, "--kl-coef", 0.1]
    argv += ["--group-size", 2, "--eval-size", 16, "--eval-every", 0, "--steps", 1]
    (start, _), (step,) = run(tmp_path / "out", *argv)
    if not lora:
        assert start["eval"]["format"] > 0.3
    assert step["kl"] == pytest.approx(0, abs=1e-6)  # the reference has had its cold start, too


def test_demonstrations_of_your_own_are_imitated(small, jsonl, tmp_path):  # noqa: F811
    path = jsonl(lines=rows_with(FORM))
    options = ["--data", path, "--demonstrations", path, "--prompts", 24, "--steps", 40]
    begin(tmp_path / "cold", *small, *options, "--lr", 2e-3)
    argv = ["--model", tmp_path / "cold", *CPU, "--data", path, "--steps", 0]
    (only,), steps = run(tmp_path / "out", *argv)
    assert steps == []
    assert FORM in [sample["response"] for sample in only["samples"]]


def test_beside_your_data_the_drawn_task_is_imitated(small, jsonl, tmp_path, monkeypatch):  # noqa: F811
    imitated = []
    demonstrate = train.demonstrate

    def noted(example, *args):
        imitated.append(example)
        return demonstrate(example, *args)

    monkeypatch.setattr(train, "demonstrate", noted)
    begin(tmp_path / "cold", *small, "--data", jsonl(), "--steps", 2)
    assert len(imitated) == 4
    assert all(example.scene is not None for example in imitated)


def test_layers_are_recomputed_there_too(hub, tmp_path, monkeypatch):
    recomputed = []
    monkeypatch.setattr(model, "recompute_layers", recomputed.append)
    begin(tmp_path / "cold", "--model", hub, *CPU, "--prompts", 2, "--steps", 1, "--recompute")
    assert len(recomputed) == 1


def test_the_system_text_begins_every_chat(small, tmp_path, systems_of_chats):
    begin(tmp_path / "cold", *small, "--system", "Be kind.", "--steps", 2)
    assert len(systems_of_chats) > 4
    assert set(systems_of_chats) == {"Be kind."}


def test_the_memory_is_said_once(hub, jsonl, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(model, "is_tiny", lambda name: False)
    begin(tmp_path / "cold", "--model", hub, *CPU, "--prompts", 2, "--data", jsonl(), "--steps", 1)
    assert capsys.readouterr().err.count("GiB are needed") == 1


# ---- when it ends


def test_it_says_how_many_responses_have_the_form(hub, tmp_path, capsys):
    begin(tmp_path / "cold", "--model", hub, *CPU, "--prompts", 2, "--steps", 2)
    said = capsys.readouterr()
    assert "step 2: 0 of 16 sampled responses have the form; raise --steps, --lr" in said.err
    assert said.out.startswith("go on with the same --data or --task, ")
    assert said.out.endswith(f": python train.py --model {tmp_path / 'cold'}\n")


def learns_by_and_by(monkeypatch, shares) -> None:
    """The form is found in these shares of the sampled responses, each time it is looked for."""
    evaluate = train.evaluate

    def with_shares(*args, **kwargs):
        record = evaluate(*args, **kwargs)
        record["eval"]["format"] = next(shares)
        return record

    monkeypatch.setattr(train, "evaluate", with_shares)


def test_it_ends_when_the_form_is_learned(small, tmp_path, capsys, monkeypatch):
    learns_by_and_by(monkeypatch, iter([0.2, 1.0]))
    begin(tmp_path / "cold", *small, "--steps", 50)
    said = capsys.readouterr().err
    assert "step 10: 3 of 16 sampled responses have the form\n" in said
    assert "step 20: 16 of 16 sampled responses have the form\n" in said
    assert "step 30" not in said


def test_a_vision_tower_learns_to_the_end(small, tmp_path, capsys, monkeypatch):
    learns_by_and_by(monkeypatch, iter([1.0, 1.0]))
    begin(tmp_path / "cold", *small, "--steps", 12, "--train-vision")
    said = capsys.readouterr().err
    assert "step 10: 16 of 16 sampled responses have the form\n" in said
    assert "step 12: 16 of 16 sampled responses have the form\n" in said


# ---- what is refused, before the first step


@pytest.mark.parametrize(
    ("response", "said"),
    [("<answer>1</answer>", "lacks the form"), ("", "needs a response"), (7, "lacks the form")],
)
def test_demonstrations_that_show_nothing_are_named(small, response, said, jsonl, tmp_path, capsys):  # noqa: F811
    path = jsonl(lines=rows_with(response))
    argv = [*small, "--demonstrations", path, "--out", tmp_path / "cold"]
    message = one_line(capsys, cold_start.main, *argv)
    assert "rows.jsonl:" in message
    assert said in message


def test_a_row_without_a_response_is_named(small, jsonl, tmp_path, capsys):  # noqa: F811
    lines = rows_with(FORM)
    lines[19] = json.dumps({"image": "9.png", "question": "q?", "answer": 1})
    path = jsonl(lines=lines)
    said = one_line(
        capsys, cold_start.main, *small, "--demonstrations", path, "--out", tmp_path / "cold"
    )
    assert f"{path}:20: needs a response, to be imitated" in said


def test_rows_that_are_held_out_need_no_response(small, jsonl, tmp_path):  # noqa: F811
    rows = [{"image": f"{i}.png", "question": "q?", "answer": 1} for i in range(10)]
    task = data.OwnTask(jsonl(lines=[json.dumps(row) for row in rows]))
    trained = [example.source for _, example in task.train_rows]
    for number, row in enumerate(rows, start=1):
        if f"{task.path}:{number}" in trained:
            row["response"] = FORM
    path = jsonl(lines=[json.dumps(row) for row in rows])
    argv = [*small, "--demonstrations", path, "--data", path, "--steps", 1]
    begin(tmp_path / "cold", *argv)
    assert (tmp_path / "cold/config.json").exists()


def test_images_that_are_held_out_are_not_imitated(jsonl, tmp_path):  # noqa: F811
    rows = [{"image": f"{i}.png", "question": "q?", "answer": 1} for i in range(10)]
    task = data.OwnTask(jsonl(lines=[json.dumps(row) for row in rows]))
    held_out = {Path(names[0]).name for names, _ in task.eval_rows}
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("\n".join(json.dumps({**row, "response": FORM}) for row in rows) + "\n")
    args = train.resolve_options(["--device", "cpu", "--data", str(task.path)])
    demonstrations, asked = cold_start.read_tasks(str(path), args)
    imitated = {Path(names[0]).name for names, _ in demonstrations.train_rows}
    assert len(held_out) == 1
    assert imitated == {f"{i}.png" for i in range(10)} - held_out
    assert asked.path == task.path


def test_demonstrations_alone_hold_out_what_training_on_them_will(jsonl):  # noqa: F811
    path = jsonl(lines=rows_with(FORM))
    args = train.resolve_options(["--device", "cpu"])
    demonstrations, asked = cold_start.read_tasks(str(path), args)
    assert demonstrations.held_out == data.OwnTask(path).held_out != set()
    assert asked is demonstrations  # the form is looked for in responses to these questions


def test_a_response_without_room_is_said_first(small, tmp_path, capsys):
    said = one_line(
        capsys, cold_start.main, *small, "--max-new-tokens", 5000, "--out", tmp_path / "cold"
    )
    assert "exceed the model's 1024" in said


def test_a_demonstration_longer_than_a_response_is_named(small, jsonl, tmp_path, capsys):  # noqa: F811
    path = jsonl(lines=rows_with(data.respond("red " * 60, "so", "1")))
    said = one_line(
        capsys, cold_start.main, *small, "--demonstrations", path, "--out", tmp_path / "cold"
    )
    assert "rows.jsonl:" in said
    assert "tokens; raise --max-new-tokens 48" in said


def test_a_rate_that_diverges_is_named(small, tmp_path, capsys, monkeypatch):
    load = train.load_policy

    def broken(args, name):
        policy = load(args, name)
        policy.model.lm_head.weight.data.fill_(torch.nan)
        return policy

    monkeypatch.setattr(train, "load_policy", broken)
    capsys.readouterr()
    assert cold_start.main([*map(str, small), "--out", str(tmp_path / "cold")]) == 2
    said = "error: step 1: the gradient is not finite: lower --warmup-lr (cold_start.py: --lr)"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model M", "--out"),
        ("--model M --out ''", "--out"),
        ("--model M --out FULL", "not empty"),
        ("--model M --out FULL/file", "cannot be used"),
        ("--model M --out FULL/file/sub", "cannot be used"),
        ("--out NEW", "--model: give a folder"),
        ("--model M --out NEW --demonstrations ''", "--demonstrations"),
        ("--model M --out NEW --demonstrations none.jsonl", "none.jsonl"),
        ("--model M --out NEW --steps 0", "--steps"),
        ("--model M --out NEW --lr fast", "--lr"),
        ("--model M --out NEW --tau 3", "--tau: has no part in cold_start.py"),
        ("--model M --out NEW --what", "--what"),
        ("--model ./none --out NEW", "no such folder"),
    ],
)
def test_options_that_cannot_be_are_named(options, said, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = options.replace("FULL", str(tmp_path)).replace("NEW", str(tmp_path / "cold")).split()
    assert said in one_line(capsys, cold_start.main, *[word.strip("'") for word in words])
