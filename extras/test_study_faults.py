"""Tests of faults that a user of the study meets: one clear line, no hang, no run lost.

pip install scipy pytest, then python -m pytest -q extras/test_study_faults.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import study  # noqa: E402
import workers  # noqa: E402
from test_scripts import one_line  # noqa: E402
from test_study import row_of  # noqa: E402

import train  # noqa: E402
from data import InputError  # noqa: E402

# ---- before it begins

STUDY = [
    ("--options", "--w-min 3", "condition grpo: --w-min 3.0: above --w-max"),
    ("--options", "--device banana", "--device banana"),
    ("--options", "--steps x", "argument --steps"),
    ("--options", "--steps 0", "--steps 0: leaves nothing to compare"),
    ("--options", "--steps 'x", "No closing quotation"),
    ("--options", "--seed 3", "not --seed"),
    ("--options", "--task add", "not --task"),
    ("--options", "--data my.jsonl", "not --data"),
    ("--options", "--resume run", "not --resume"),
    ("--options", "--reward none.py:f", "--reward none.py:f: no such function"),
    ("--options", "--log none.py:f", "--log none.py:f: no such function"),
    ("--first-seed", "-1", "argument --first-seed"),
    ("--seeds", "-1", "argument --seeds"),
    ("--workers", "0", "argument --workers"),
    ("--conditions", "", "argument --conditions: is empty"),
    ("--conditions", "grpo,", "unknown: "),
    ("--tasks", "chess", "unknown: chess"),
    ("--quick", "--table", "--conditions: not with --quick"),
    ("--out", "", "argument --out: is empty"),
    ("--out", "file/study", "Not a directory"),
    ("--table", "--out=none", "has no runs yet"),
]


@pytest.fixture
def no_worker(monkeypatch):
    def start(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(study, "Worker", start)
    pytest.importorskip("scipy", reason="pip install scipy")


@pytest.mark.parametrize(("option", "value", "said"), STUDY)
def test_what_the_study_cannot_run_is_said_before_it_begins(
    option, value, said, capsys, tmp_path, monkeypatch, no_worker
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    argv = ["--seeds", "1", "--conditions", "grpo", option, value]
    assert said in one_line(capsys, study.main, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_study_without_seeds_or_with_a_neighbor_is_refused(capsys, tmp_path, no_worker):
    argv = ["--conditions", "grpo", "--out", tmp_path, "--seeds"]
    assert "nothing to run" in one_line(capsys, study.main, *argv, "0")
    neighbor = train.Run(tmp_path)
    neighbor.lock()
    assert "another process" in one_line(capsys, study.main, *argv, "1")


# ---- workers


def test_a_job_that_fails_or_kills_its_worker_is_named():
    """What is in progress beside it ends, nothing else is begun, and the results come first."""
    pair = [workers.Worker(dict, ()) for _ in range(2)]
    assert set(workers.done(eval, {"a": "1", "b": "2", "c": "3"}, pair)) == {1, 2, 3}
    jobs = {
        "add-srpo-seed1": "int('x')",
        "slow": "__import__('time').sleep(1) or 4",
        "later": "5",
    }
    found = []
    with pytest.raises(InputError, match="^add-srpo-seed1: ValueError, .*; what is recorded stays"):
        for result in workers.done(eval, jobs, pair):
            found.append(result)
    assert found == [4]
    kill = "__import__('os').kill(__import__('os').getpid(), 9)"
    with pytest.raises(InputError, match="^count-grpo-seed7: its process ended with code -9"):
        list(workers.done(eval, {"count-grpo-seed7": kill}, pair))
    for worker in pair:
        worker.pipe.close()
        worker.process.join(20)
        assert worker.process.exitcode in (0, -9)


ALONE = """import time, workers
if __name__ == "__main__":
    print(workers.Worker(dict, ()).process.pid, flush=True)
    time.sleep(100)
"""


def test_a_worker_ends_with_the_study_however_that_ends(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    command = [sys.executable, str(tmp_path / "alone.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    end = time.time() + 30
    while time.time() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except OSError:  # it is gone
            return
        if state == "Z":  # nobody waits for it here
            return
        time.sleep(0.1)
    raise AssertionError("the worker goes on")


# ---- study.csv


@pytest.fixture
def recorded(tmp_path) -> Path:
    path = tmp_path / "study.csv"
    for seed in range(3):
        study.append(path, row_of("count", "grpo", seed, 0.5, 0.25))
    return path


def test_a_line_that_a_kill_has_cut_off_is_made_again(recorded, capsys):
    whole = recorded.read_bytes()
    before = whole[: whole[:-1].rfind(b"\n") + 1]
    for length in range(len(before) + 1, len(whole)):
        recorded.write_bytes(whole[:length])
        assert [row["seed"] for row in study.read(recorded)] == [0, 1]
        assert "the last line is cut off" in capsys.readouterr().err
    study.append(recorded, row_of("count", "grpo", 2, 0.5, 0.25))
    assert recorded.read_bytes() == whole
    recorded.write_bytes(whole[:20])  # in the first line
    assert study.read(recorded) == []
    study.append(recorded, row_of("count", "grpo", 0, 0.5, 0.25))
    assert len(study.read(recorded)) == 1


DAMAGE = [
    ("count,grpo,1", "chess,grpo,1", ":3: task 'chess': not understood; remove the line"),
    ("count,grpo,1", "count,k9,1", ":3: condition 'k9'"),
    ("grpo,1,default", "grpo,one,default", ":3: seed 'one'"),
    ("grpo,1,default", "grpo,1,night", ":3: regime 'night'"),
    ("grpo,1,default,abc", "grpo,1,default", ":3: "),
    ("grpo,1,default,abc", "grpo,1,default,abc,abc", ":3: "),
    ("task,", "what,", "has other columns; name another --out"),
    ("abc", "\udcff", "not UTF-8 text"),
]


@pytest.mark.parametrize(("old", "new", "said"), DAMAGE)
def test_damaged_rows_are_named_and_left_as_they_are(old, new, said, recorded, capsys):
    pytest.importorskip("scipy", reason="pip install scipy")
    text = recorded.read_text().replace(old, new, 1)
    recorded.write_text(text, errors="surrogateescape", newline="")
    argv = ["--table", "--out", recorded.parent]
    assert said in one_line(capsys, study.main, *argv)
    assert recorded.read_text(errors="surrogateescape") == text


def test_tables_are_shown_whatever_the_options_of_the_runs(recorded, capsys):
    pytest.importorskip("scipy", reason="pip install scipy")
    assert study.main(["--table", "--out", str(recorded.parent)]) == 0
    assert "| grpo | 3 |" in capsys.readouterr().out
    said = one_line(capsys, study.main, "--conditions", "grpo", "--out", recorded.parent)
    assert "holds runs with other --options (--steps 1)" in said


def test_what_stands_above_the_tables_stays(recorded):
    pytest.importorskip("scipy", reason="pip install scipy")
    written = recorded.with_name("study.md")
    written.write_text("# Mine\n\nδ is 5.\n\n# Tables\n\nold\n", encoding="utf-8")
    argv = ["--table", "--out", str(recorded.parent)]
    for _ in range(2):
        assert study.main(argv) == 0
    text = written.read_text(encoding="utf-8")
    assert text == f"# Mine\n\nδ is 5.\n\n# Tables\n\n{study.tables(study.read(recorded))}\n"
