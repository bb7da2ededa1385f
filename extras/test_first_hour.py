"""Tests of what meets a user first: a model without the tags, Ctrl-C, damaged files, live curves.

pip install peft tensorboard wandb trackio pytest
python -m pytest -q extras/test_first_hour.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from test_errors import complaint  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from test_srpo import ONE, cache, jsonl, records_of, run  # noqa: E402, F401

# The tiny model without its warm-up.
COLD = ["--warmup-steps", 0, "--eval-size", 16, "--eval-every", 0, "--max-new-tokens", 64]

# ---- a model that lacks the tags


def format_reward(text: str) -> float:
    return data.verify(text, data.Example((), "How many red?", "1")).reward


def test_each_tag_in_its_place_earns_its_share_of_the_format_reward():
    tags = []
    for name in ("perception", "reasoning", "answer"):
        tags += [f"<{name}>", f"</{name}>"]
    earned = [format_reward("hm".join(tags[:n])) for n in range(6)]
    assert earned == pytest.approx([n / 60 for n in range(6)])
    whole = "{}a{} {}b{} {}2{}".format(*tags)
    assert format_reward(whole) == pytest.approx(0.1)
    assert format_reward(whole.replace("2", "1")) == pytest.approx(1)
    assert format_reward(whole + "hm") == pytest.approx(5 / 60)
    assert format_reward(whole.replace(">a<", "><")) == pytest.approx(5 / 60)
    assert format_reward("".join(reversed(tags))) == pytest.approx(1 / 60)
    assert format_reward(whole * 2) == 0
    assert format_reward("What is it?") == 0


# ---- steps that teach nothing


WELL = {"reward": 0.25, "format": 1.0, "accuracy": 0.0, "used_groups": 0, "truncated": 0.0}
FORMLESS = {**WELL, "format": 0.0, "used_groups": 3}  # chance tags give a spread


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([WELL] * 5, "rewards did not differ in any group in the last five steps"),
        ([WELL] * 5, "most responses are wrong; try easier data"),
        ([WELL] * 10, "rewards did not differ in any group in the last five steps"),
        ([{**WELL, "accuracy": 0.75}] * 5, "most responses are right; try harder data"),
        ([{**WELL, "truncated": 0.75}] * 5, "most responses are cut off; try a larger"),
        ([FORMLESS] * 5, "almost no response had the three blocks in the last five steps"),
        ([FORMLESS] * 5, "try extras/cold_start.py"),
        ([{**FORMLESS, "truncated": 0.75}] * 5, "most responses are cut off; try a larger"),
        ([WELL, *[FORMLESS] * 9], "100% had them in step 1; try a lower --lr"),
        (
            [WELL, *[{**FORMLESS, "truncated": 1.0}] * 9],
            "100% had them in step 1; try a lower --lr",
        ),
        ([WELL] * 4, ""),
        ([WELL] * 6, ""),
        ([{**WELL, "used_groups": 1}, *[WELL] * 4], ""),
    ],
)
def test_what_keeps_a_policy_from_learning_is_said_by_its_cause(records, said, capsys):
    records = [{"step": step, **record} for step, record in enumerate(records, start=1)]
    train.say_trouble(records)
    err = capsys.readouterr().err
    assert said in err
    assert bool(err) == bool(said)
    if said:
        assert "mean reward 0.25" in err


def test_steps_without_a_spread_of_rewards_are_explained(tmp_path, capsys, monkeypatch):
    def all_alike(text, example):
        return data.Verdict(0.25, 0.0, 1.0)

    monkeypatch.setattr(train, "verify", all_alike)
    argv = ["--prompts", 1, "--group-size", 2, *COLD, "--eval-size", 1, "--max-new-tokens", 4]
    run(tmp_path / "out", *argv, "--steps", 6)
    said = capsys.readouterr().err
    assert said.count("did not differ") == 1
    assert "mean reward 0.25, 100% well-formed; most responses are cut off" in said


# ---- the folder, and signals


def test_memory_that_runs_out_leaves_the_name_to_another_try(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(train, "prepare", full)
    assert "out of memory" in complaint(capsys, *ONE, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stopped_in", "left"), [("fill", "old"), ("rmtree", "new")])
def test_a_folder_is_replaced_whole_or_not_at_all(stopped_in, left, tmp_path, monkeypatch):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "weights").write_text("old")
    remove = train.shutil.rmtree

    def rmtree(path, **options):
        if stopped_in == "rmtree" and path.name == "best.old" and path.exists():
            raise KeyboardInterrupt
        remove(path, **options)

    def fill(path):
        (path / "weights").write_text("new")
        if stopped_in == "fill":
            raise KeyboardInterrupt

    monkeypatch.setattr(train.shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        train.write_folder(folder, fill)
    assert (folder / "weights").read_text() == left
    stopped_in = ""
    train.write_folder(folder, fill)  # as if resumed
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def wait_for(out: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while len(train.Run(out).log()) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_and_loses_nothing(number, exit_code, tmp_path, capsys):
    argv = [*ONE, *COLD, "--steps", 8, "--save-every", 1, "--eval-size", 2]
    run(tmp_path / "whole", *argv)
    out = tmp_path / "stopped"
    command = [sys.executable, str(HERE.parent / "train.py"), *map(str, argv), "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(out, 3)
    again = complaint(capsys, "--resume", out)  # the folder belongs to the first process
    assert f"{out}: another process is at work there" in again
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == exit_code
    last_line = said.strip().splitlines()[-1]
    assert last_line == f"stopped; go on with: python train.py --resume {out}"
    assert "Traceback" not in said
    assert train.main(["--resume", str(out)]) == 0
    assert records_of(out) == records_of(tmp_path / "whole")


@pytest.fixture
def finished(tmp_path):
    """The folder of a run of one step."""
    out = tmp_path / "run"
    run(out, *ONE, *COLD, "--eval-size", 2)
    return out


def test_what_is_written_into_the_records_by_hand_is_gone_after_resuming(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    for line in (b"[1]\n", b'{"step"\n', b"\xff\xfe\n"):
        (finished / "metrics.jsonl").write_bytes(before + line)
        assert train.main(["--resume", str(finished)]) == 0
        assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_keeps_its_options_when_its_model_is_gone(finished, tmp_path):
    first = train.Run(finished).checkpoint()
    moved = first.rename(tmp_path / "moved")
    out = tmp_path / "second"
    run(out, *ONE, *COLD, "--eval-size", 2, "--model", moved, "--save-every", 1)
    before = json.loads((out / "args.json").read_text())
    moved.rename(tmp_path / "gone")
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    after = json.loads((out / "args.json").read_text())
    for name in {*train.PRESETS, "dtype", "lora"} - {"steps", "max_pixels"}:
        assert after[name] == before[name], name


def test_a_block_that_no_response_has_is_not_summarized(finished, capsys):
    records = records_of(finished)
    records[1].update(w_perception=1.0, w_reasoning=None)
    (finished / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    train.summarize(train.Run(finished))
    assert "mean weight" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ('{"argv": ["--dtype", "float8"]}', "--dtype"),
        ('{"argv": ["--lr", "fast"]}', "--lr"),
        ('{"argv": "x"}', "unrecognized"),
        ('{"argv": [1]}', "unrecognized"),
        ('{"argv": null}', "not the folder of a run"),
        ("{}", "not the folder of a run"),
        ("[]", "not the folder of a run"),
        ("{", "not the folder of a run"),
    ],
)
def test_damaged_options_are_named(options, said, tmp_path, capsys):
    (tmp_path / "args.json").write_text(options)
    assert said in complaint(capsys, "--resume", tmp_path)


@pytest.mark.parametrize("state", [{"optimizer": {}}, [1], {"step": 1}, None])
def test_a_damaged_checkpoint_is_named(state, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    checkpoint = train.Run(finished).checkpoint()
    for name in ("checkpoint-²", "checkpoint-x"):  # none of ours
        (finished / name).mkdir()
    torch.save(state, checkpoint / "trainer.pt")
    if state is None:
        (checkpoint / "trainer.pt").write_bytes(b"cut")
    message = complaint(capsys, "--resume", finished)
    assert "trainer.pt is broken" in message
    assert checkpoint.name in message
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_without_its_records_is_named(finished, capsys):
    checkpoint = train.Run(finished).checkpoint()
    (checkpoint / "metrics.jsonl").unlink()
    before = (finished / "metrics.jsonl").read_bytes()
    assert f"{checkpoint / 'metrics.jsonl'}" in complaint(capsys, "--resume", finished)
    assert (finished / "metrics.jsonl").read_bytes() == before  # nothing already written is lost


# ---- bounds, memory


@pytest.mark.parametrize(
    ("option", "value"),
    [("--image-size", 100_000), ("--eval-size", 5_000_000), ("--group-size", 10**9)],
)
def test_sizes_that_would_take_forever_are_refused(option, value, capsys):
    assert option in complaint(capsys, *ONE, *COLD, option, value)


@pytest.mark.parametrize("device", ["hpu", "xpu", "mps"])
def test_devices_that_are_not_there_are_refused(device, tmp_path, capsys):
    message = complaint(capsys, "--device", device, "--out", tmp_path / "out")
    assert f"--device {device}" in message


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    message = complaint(capsys, "--data", tmp_path / "pipe", "--out", tmp_path / "out")
    assert "not a file" in message


def test_a_line_of_ten_megabytes_is_named(tmp_path, capsys, jsonl):  # noqa: F811
    path = jsonl('{"image": "0.png", "question": "' + "q" * 10**7)
    assert "rows.jsonl:3" in complaint(capsys, "--data", path, "--out", tmp_path / "out")


def test_a_decoder_that_fails_oddly_is_one_line(tmp_path, capsys, monkeypatch, jsonl):  # noqa: F811
    def fail(file):
        raise RecursionError("too deep")

    path = jsonl()
    monkeypatch.setattr(Image, "open", fail)
    message = complaint(capsys, "--data", path, "--out", tmp_path / "out")
    assert "0.png cannot be read" in message


def test_the_error_of_too_large_an_allocation_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert data.is_out_of_memory(error.value)
    assert data.is_out_of_memory(MemoryError())
    assert data.is_out_of_memory(RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not data.is_out_of_memory(RuntimeError("size mismatch"))


# ---- live curves

LOGGERS = ["tensorboard", "wandb", "trackio"]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_installed_is_named(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    place = f"{HERE / 'loggers.py'}:{name}"
    message = complaint(capsys, *ONE, *COLD, "--log", place, "--out", tmp_path / "out")
    assert f"loggers.py:{name}: not installed; pip install {name}" in message


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A function: the folder of a run with a logger, resumed for a second step, all offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", "trackio")

    def make(name: str) -> Path:
        out = tmp_path / "run"
        run(out, *ONE, *COLD, "--eval-size", 2, "--log", f"{HERE / 'loggers.py'}:{name}")
        assert train.main(["--resume", str(out), "--steps", "2"]) == 0
        return out

    return make


def rewards(out: Path) -> dict[int, float]:
    """Of each step, in the metrics."""
    found = {}
    for record in train.Run(out).log():
        if "eval" not in record:
            found[record["step"]] = record["reward"]
    return found


def test_tensorboard_shows_what_the_metrics_hold_after_resuming_too(logged):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = logged("tensorboard")
    board = EventAccumulator(str(out)).Reload()
    shown = {event.step: event.value for event in board.Scalars("train/reward")}
    assert sorted(shown) == [1, 2]
    assert shown == pytest.approx(rewards(out))
    assert len(board.Scalars("eval/accuracy")) >= 2


@pytest.mark.parametrize(("package", "files"), [("wandb", "*.wandb"), ("trackio", "*.db")])
def test_trackers_hold_what_the_metrics_hold_after_resuming_too(package, files, logged, tmp_path):
    tracker = pytest.importorskip(package, reason=f"pip install {package}")
    out = logged(package)
    tracker.finish()
    deadline = time.monotonic() + 60  # a process of its own writes the file, in its own time
    while time.monotonic() < deadline:
        written = b"".join(path.read_bytes() for path in tmp_path.rglob(files))
        if all(str(value).encode() in written for value in rewards(out).values()):
            break
        time.sleep(0.2)
    for value in rewards(out).values():
        assert str(value).encode() in written
    assert b"train/reward" in written
    assert b"eval/accuracy" in written
