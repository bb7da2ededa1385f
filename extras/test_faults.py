"""Tests of faults around a run: found before the first step, said in one line, nothing lost.

pip install pytest, then python -m pytest -q extras/test_faults.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from test_errors import complaint  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from test_srpo import QUICK, SMALL, cache, jsonl, records_of, run  # noqa: E402, F401

COLD = [*QUICK, *SMALL, "--warmup-steps", 0, "--eval-size", 2, "--max-new-tokens", 8]


@pytest.fixture
def no_training(monkeypatch):
    """Whatever is found must be found before a model is made."""

    def fail(*_):
        raise AssertionError("a model was made")

    monkeypatch.setattr(train, "prepare", fail)


def script(tmp_path, text: str) -> str:
    file = tmp_path / "mine.py"
    file.write_text(text)
    return f"{file}:f"


# ---- found before the first step


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return lenth(text)", "NameError, name 'lenth' is not defined"),
        ("return None", "TypeError"),
        ("import sys; sys.exit(0)", "SystemExit"),
    ],
)
def test_a_reward_that_fails_does_so_before_the_warm_up(body, said, tmp_path, capsys, no_training):
    place = script(tmp_path, f"def f(text, example):\n    {body}\n")
    message = complaint(capsys, "--reward", place, "--out", tmp_path / "out")
    assert f"--reward {place}: " in message
    assert f": {said}" in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return logp[:, :1]", "ValueError, weights [2, 1] for tokens [2, 3]"),
        ("return None", "AttributeError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("return missing", "NameError"),
    ],
)
def test_weights_that_fail_do_so_before_the_warm_up(body, said, tmp_path, capsys, no_training):
    text = f"def f(logp, logp_corrupted, logp_blank, roles, A, **_):\n    {body}\n"
    place = script(tmp_path, text)
    message = complaint(capsys, "--weights", place, "--out", tmp_path / "out")
    assert f"--weights {place}: {said}" in message


def test_adapters_without_peft_are_refused_before_the_warm_up(
    tmp_path, capsys, monkeypatch, no_training
):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in complaint(capsys, "--lora", 4, "--out", tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_image_that_is_a_pipe_is_not_waited_for(jsonl, tmp_path, capsys):  # noqa: F811
    path = jsonl()
    (tmp_path / "3.png").unlink()
    os.mkfifo(tmp_path / "3.png")
    message = complaint(capsys, "--data", path, "--out", tmp_path / "out")
    assert "rows.jsonl:4: image 3.png cannot be read: OSError, No such file" in message


def test_a_logger_starts_when_all_else_is_checked(tmp_path, capsys, no_training):
    text = "def f(folder, options):\n    (folder / 'events').write_text('')\n"
    log = ["--log", script(tmp_path, text), "--out", tmp_path / "out"]
    complaint(capsys, *log, "--data", tmp_path / "none.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_logger_that_cannot_start_is_one_line(tmp_path, capsys, no_training):
    place = script(tmp_path, "f = 3\n")
    message = complaint(capsys, "--log", place, "--out", tmp_path / "out")
    assert f"--log {place}: cannot start: TypeError" in message


# ---- in the middle of a run


def test_a_logger_that_fails_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    text = "def f(folder, options):\n    def send(numbers, step):\n        1 / 0\n    return send\n"
    out = tmp_path / "out"
    run(out, *COLD, "--steps", 2, "--log", script(tmp_path, text))
    assert [record["step"] for record in records_of(out)] == [0, 1, 2, 2]
    assert capsys.readouterr().err.count("--log: no more: ZeroDivisionError") == 1


def test_memory_that_runs_out_does_not_blame_the_checkpoint(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run(out, *COLD, "--steps", 1)
    load = torch.load

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB; see fragmentation")

    monkeypatch.setattr(torch, "load", fail)
    said = complaint(capsys, "--resume", out, "--steps", 2)
    assert "out of memory: lower --micro-batch" in said
    assert "expandable_segments" in said
    assert "remove" not in said
    monkeypatch.setattr(torch, "load", load)
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0


# ---- folders


def test_a_run_goes_on_from_any_folder(jsonl, tmp_path, monkeypatch):  # noqa: F811
    jsonl()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    run(Path("out"), *COLD, "--data", "rows.jsonl", "--steps", 1)
    monkeypatch.chdir(elsewhere)
    assert train.main(["--resume", "../out", "--steps", "2"]) == 0
    assert [record["step"] for record in records_of(tmp_path / "out")][-1] == 2


def test_a_foreign_folder_is_not_one_to_go_on_with(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("Dear reader")
    message = complaint(capsys, "--out", tmp_path)
    assert "not empty; give a new folder" in message
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_names_of_runs_say_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def name(*argv):
        return str(train.new_folder(train.build_parser().parse_args(argv)))

    assert name() == "out/tiny-srpo-seed0"
    assert name("--corruption", "blur", "--tau", "0.3") == (
        "out/tiny-srpo-corruption-blur-tau-0.3-seed0"
    )
    assert name("--weights", "extras/readings.py:k3") == "out/tiny-srpo-weights-k3-seed0"
    assert name("--model", "out/mine/checkpoint-000008") == "out/mine-srpo-seed0"
    Path("out/tiny-srpo-seed0").mkdir(parents=True)
    assert name() == "out/tiny-srpo-seed0-2"


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / "made.tmp").mkdir()
    (tmp_path / "made.tmp/half").write_text("x")
    train.write_folder(tmp_path / "made", lambda folder: (folder / "x").write_text("x"))
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["x"]


def test_a_folder_that_cannot_be_written_is_said_and_leaves_the_old_one(tmp_path):
    def full(folder):
        raise OSError("No space left on device")

    train.write_folder(tmp_path / "made", lambda folder: (folder / "x").write_text("old"))
    with pytest.raises(data.InputError, match="cannot be written: OSError, No space"):
        train.write_folder(tmp_path / "made", full)
    assert (tmp_path / "made/x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_without_a_home_the_warm_up_stays_with_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert train.cache_folder(train.Run(tmp_path)) == tmp_path


# ---- what is printed


def test_a_sample_comes_with_its_verdict():
    assert train.in_words(data.Verdict(0.1, 0.0, 1.0, 1.0, 0.0, 1.0)) == "wrong"
    assert train.in_words(data.Verdict(1.0, 1.0, 1.0)) == "right"
    seen = data.Verdict(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert train.in_words(seen) == "right, and what it rests on was seen"
    unseen = data.Verdict(1.0, 1.0, 1.0, 0.5, 0.0, 1.0)
    assert train.in_words(unseen) == "right, but what it rests on was not all seen"


def test_one_evaluation_prints_one_column(tmp_path, capsys):
    run(tmp_path / "out", *COLD, "--steps", 0)
    lines = capsys.readouterr().out.splitlines()
    (accuracy,) = [line for line in lines if line.startswith("accuracy")]
    assert len(accuracy.split()) == 2


def piped(tmp_path, command: str, **environment) -> subprocess.CompletedProcess:
    """A shell command in which TRAIN is a short run of train.py."""
    options = " ".join(map(str, [*COLD, "--steps", 0, "--out", tmp_path / "out"]))
    command = command.replace("TRAIN", f"{sys.executable} {HERE.parent / 'train.py'} {options}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=env
    )


def test_a_summary_that_nobody_reads_is_no_error(tmp_path):
    done = piped(tmp_path, "TRAIN | head -c 1")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[0])["step"] == 0


def test_a_terminal_without_unicode_gets_question_marks(tmp_path):
    text = "\n".join(
        [
            "import sys",
            "import train",
            "train.data.QUESTIONS['count'] = 'How many {}? \u2713'",
            "sys.exit(train.main(sys.argv[1:]))",
        ]
    )
    (tmp_path / "unicode.py").write_text(text, encoding="utf-8")
    options = [*map(str, COLD), "--steps", "0", "--out", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(tmp_path / "unicode.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "How many" in done.stdout
    assert "? ?" in done.stdout


def test_help_does_without_docstrings():  # transformers itself cannot load a model then
    command = [sys.executable, "-OO", str(HERE.parent / "train.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--w-min" in done.stdout


# ---- found before the warm-up


def test_a_response_without_room_is_said_before_the_warm_up(tmp_path, capsys):
    out = tmp_path / "out"
    argv = [*QUICK, *SMALL, "--warmup-steps", 2, "--max-new-tokens", 5000]
    assert "exceed the model's 1024" in complaint(capsys, *argv, "--out", out)
    argv[-1] = 8
    run(out, *argv, "--eval-size", 2, "--steps", 0)  # the folder can be used


# ---- what was asked for holds to the end


def test_more_steps_are_remembered_by_a_later_resume(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(out, *COLD, "--steps", 1)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "say_trouble", stop)
        assert train.main(["--resume", str(out), "--steps", "3"]) == 130
    assert train.main(["--resume", str(out)]) == 0
    steps = [record["step"] for record in records_of(out) if "eval" not in record]
    assert steps == [1, 2, 3]


def test_fewer_steps_than_were_made_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    run(out, *COLD, "--steps", 2)
    said = complaint(capsys, "--resume", out, "--steps", 1)
    assert f"--steps 1: {out} has made 2 steps already" in said
    assert json.loads((out / "args.json").read_text())["steps"] == 2


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(train, "say_trouble", stop)
        argv = [*map(str, COLD), "--steps", "1", "--out", str(out)]
        assert train.main(argv) == 130
    assert train.main(["--resume", str(out)]) == 0
    assert "no checkpoint was made yet: the run begins anew\n" in capsys.readouterr().err
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    assert "going on from step 1\n" in capsys.readouterr().err


def test_each_step_is_said_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path / "out", *COLD, "--steps", 2)
    said = capsys.readouterr().err
    assert "step 1: accuracy 0." in said
    assert "step 2: accuracy 0." in said


def test_a_step_without_any_advantage_needs_no_weights(tmp_path):
    text = "def f(logp, c, *_, **__):\n    return 1 + 0 * logp + 0 * (logp - c).abs().max()\n"
    reward = tmp_path / "reward.py"
    reward.write_text("def f(text, example):\n    return 1.0\n")
    argv = [*COLD, "--steps", 1, "--reward", f"{reward}:f", "--weights", script(tmp_path, text)]
    _, (step,) = run(tmp_path / "out", *argv)
    assert step["used_groups"] == 0


@pytest.mark.parametrize("saved", [{}, None], ids=["of float32", "of an earlier version"])
def test_a_checkpoint_without_a_scaler_is_gone_on_with_in_float16(saved, tmp_path):
    out = tmp_path / "out"
    run(out, *COLD, "--steps", 1, "--dtype", "float16")
    file = train.Run(out).checkpoint() / "trainer.pt"
    state = torch.load(file)
    assert state.pop("scaler")["scale"] > 1
    if saved is not None:
        state["scaler"] = saved
    torch.save(state, file)
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    assert records_of(out)[-1]["step"] == 2


def test_the_system_text_begins_every_chat(tmp_path, systems_of_chats):
    warm = ["--warmup-steps", 2]
    run(tmp_path / "out", *COLD, "--system", "Be kind.", *warm, "--steps", 1)
    assert len(systems_of_chats) > 20
    assert set(systems_of_chats) == {"Be kind."}


# ---- images


def test_corrupted_images_are_fitted_once():
    """A second time could give them another size, since the limits here are one and the same."""
    policy = model.build_tiny()
    policy.pixel_limits = (2304, 2304)
    image = Image.new("RGB", (83, 61), "red")
    example = data.Example((image,), "How many red?", "1")
    args = train.resolve_options(["--corruption-p", "0", "--device", "cpu"])
    (copy,) = train.corrupted_copies([example], policy, args, step=1)
    assert policy.fit(copy.images[0]).size != copy.images[0].size
    clean = policy.encode([example])
    corrupted = policy.encode([copy], fitted=True)
    assert torch.equal(clean.ids, corrupted.ids)
    assert torch.equal(clean.pixels[0], corrupted.pixels[0])


def test_rows_that_share_images_are_counted(jsonl, tmp_path, capsys):  # noqa: F811
    def write(images):
        rows = [{"images": names, "question": "q?", "answer": 1} for names in images]
        return jsonl(lines=[json.dumps(row) for row in rows])

    files = [f"{i}.png" for i in range(10)]
    ((names, _),) = data.OwnTask(write([[file] for file in files])).eval_rows
    files.remove(names[0])
    path = write([[names[0], file] for file in files[:5]] + [[file] for file in files[5:]])
    run(tmp_path / "out", *COLD, "--steps", 0, "--data", path)
    said = "note: 5 of 9 rows are held out, as rows that share an image stay together\n"
    assert said in capsys.readouterr().err


def test_images_that_change_places_are_other_data(jsonl, tmp_path):  # noqa: F811
    path = jsonl()
    before = data.OwnTask(path).fingerprint
    first, second = (tmp_path / "0.png").read_bytes(), (tmp_path / "1.png").read_bytes()
    (tmp_path / "0.png").write_bytes(second)
    (tmp_path / "1.png").write_bytes(first)
    assert data.OwnTask(path).fingerprint != before


def test_held_out_images_are_read_when_they_are_asked_about(jsonl):  # noqa: F811
    task = data.OwnTask(jsonl(), eval_all=True)
    examples = task.eval_set(20)
    assert next(examples).source.endswith(":1")
    (task.path.parent / "1.png").unlink()
    with pytest.raises(data.InputError, match="No such file"):
        next(examples)
