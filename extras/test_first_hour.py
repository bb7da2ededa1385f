"""Tests of what meets a user first: a model without the tags, a second process, Ctrl-C, curves, bad files.

pip install peft tensorboard wandb trackio pytest, then python -m pytest -q extras/test_first_hour.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from srpo import Role  # noqa: E402
from test_real_models import hub_folder  # noqa: E402
from test_srpo import ONE, complaint, numbers, run  # noqa: E402
from test_srpo import cache, jsonl  # noqa: E402, F401  fixtures

COLD = ["--warmup-steps", 0, "--eval-size", 16, "--eval-every", 0, "--max-new-tokens", 64]  # tiny, untrained
IMITATE = ["--warmup-steps", 150, "--prompts", 8, "--warmup-lr", 3e-3, "--image-size", 48]
FORM = "<perception> red</perception><reasoning> so</reasoning><answer> 1</answer>"

# ------------------------------------------------------------------------------- a model that lacks the tags


@pytest.mark.parametrize("lora", [(), ("--lora", 16)])
def test_a_cold_start_teaches_any_model_the_form(lora, tmp_path):
    if lora:
        pytest.importorskip("peft", reason="pip install peft")
    folder, out = hub_folder(tmp_path / "hub", "Qwen2VLConfig"), tmp_path / "out"
    argv = ["--model", folder, *COLD, *IMITATE, "--max-new-tokens", 90, *lora, "--kl-coef", 0.1]
    (start, _), (step,) = run(out, *argv, "--group-size", 2, "--steps", 1)
    assert lora or start["eval"]["format"] > 0.3
    assert step["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the model after its cold start
    examples = data.DrawnTask("count").eval_set(8)
    likely = []
    for name in (folder, out / "warmed-up"):
        policy = model.load(str(name))
        written = policy.as_rollout([data.demonstrate(e, 0, np.random.default_rng(0)) for e in examples])
        with torch.no_grad():
            logp, _ = policy.log_probs(policy.encode(examples), written, temperature=1.0)
        likely.append((logp.sum() / written.mask.sum()).item())
    assert likely[1] > likely[0] + 1 and not list(out.glob("*.tmp"))


def test_demonstrations_of_your_own_are_imitated(jsonl, tmp_path, capsys):  # noqa: F811
    rows = [json.loads(line) | {"response": FORM} for line in jsonl().read_text().splitlines()]
    path = jsonl(lines=[json.dumps(row) for row in rows])
    argv = [*COLD, "--steps", 0, "--data", path, "--demonstrations", path, "--warmup-steps", 40]
    (only,), _ = run(tmp_path / "own", *argv)
    assert FORM in [sample["response"] for sample in only["samples"]]
    for response, said in (("<answer>1</answer>", "lacks the form"), ("", "needs a response"), (7, "needs")):
        lines = [json.dumps(row | {"response": response}) for row in rows]
        message = complaint(capsys, *argv, "--out", tmp_path / "bad", "--demonstrations", jsonl(lines=lines))
        assert "rows.jsonl:" in message and said in message


def test_each_tag_in_its_place_earns_its_share_of_the_format_reward():
    def reward(text):
        return data.verify(text, data.Example((), "How many red?", "1")).reward

    tags = [f"<{end}{tag}>" for tag in ("perception", "reasoning", "answer") for end in ("", "/")]
    earned = [reward("hm".join(tags[:n])) for n in range(6)]
    assert earned == pytest.approx([n / 60 for n in range(6)])
    whole = "{}a{} {}b{} {}2{}".format(*tags)
    assert reward(whole) == pytest.approx(0.1) and reward(whole.replace("2", "1")) == pytest.approx(1)
    assert reward(whole + "hm") == reward(whole.replace(">a<", "><")) == pytest.approx(5 / 60)
    assert reward("".join(reversed(tags))) == pytest.approx(1 / 60)
    assert reward(whole * 2) == reward("What is it?") == 0


def test_steps_without_a_spread_of_rewards_are_explained(tmp_path, capsys, monkeypatch):
    argv = ["--prompts", 1, "--group-size", 2, *COLD, "--eval-size", 1, "--max-new-tokens", 4]
    verdicts = {"lack the tags": (0, 0), "are wrong": (0, 1), "are right": (1, 1)}
    for said, (accuracy, form) in verdicts.items():
        verdict = data.Verdict(0.25, accuracy, form)
        monkeypatch.setattr(train, "verify", lambda text, example, verdict=verdict: verdict)
        tokens = ["--max-new-tokens", 99] if form else ["--max-new-tokens", 200]
        run(tmp_path / said, *argv, *tokens, "--steps", 6)
        lines = [line for line in capsys.readouterr().err.splitlines() if "did not differ" in line]
        assert len(lines) == 1 and "for 5 steps" in lines[0] and "mean reward 0.25" in lines[0], lines
        assert f"{form:.0%} well-formed" in lines[0]
        assert any(why in lines[0] for why in (said, "are cut off")), lines
    run(tmp_path / "cut", *argv, "--steps", 5)
    assert "are cut off; try a larger --max-new-tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the folder, and signals


def start(*argv):
    command = [sys.executable, str(HERE.parent / "train.py"), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(out, lines: int):
    deadline = time.monotonic() + 120
    while len(train.Run(out).log()) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_and_loses_nothing(number, code, tmp_path, capsys):
    argv = [*ONE, *COLD, "--steps", 8, "--save-every", 1, "--eval-size", 2]
    run(tmp_path / "whole", *argv)
    out = tmp_path / "stopped"
    process = start(*argv, "--out", out)
    wait_for(out, 3)
    again = complaint(capsys, "--resume", out)  # the folder belongs to the first
    assert f"process {process.pid} is at work" in again and str(out) in again
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert said.strip().splitlines()[-1] == f"stopped; go on with: python train.py --resume {out}"
    assert "Traceback" not in said
    assert train.main(["--resume", str(out)]) == 0
    assert numbers(out) == numbers(tmp_path / "whole")


def test_records_of_a_run_that_are_not_whole_are_named(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, *ONE, *COLD, "--eval-size", 2)
    kept, options = (out / "metrics.jsonl").read_bytes(), (out / "args.json").read_text()
    for line in (b"[1]\n", b'{"a": 1}\n', b'{"step": "1"}\n', b'{"step"\n', b"[" * 10**5 + b"\n"):
        (out / "metrics.jsonl").write_bytes(kept + line)
        assert "metrics.jsonl:4: " in complaint(capsys, "--resume", out)
    (out / "metrics.jsonl").write_bytes(kept + b"\xff\xfe\n")
    assert "metrics.jsonl: cannot be read" in complaint(capsys, "--resume", out)
    (out / "metrics.jsonl").write_bytes(kept)
    for argv in (["--dtype", "float16"], ["--lr", "fast"], [1], "x", None):
        (out / "args.json").write_text(json.dumps({"argv": argv}))
        message = complaint(capsys, "--resume", out)
        assert any(x in message for x in ("--dtype", "--lr", "not the folder", "unrecognized")), message
    (out / "args.json").write_text("{}")
    assert "not the folder of a run" in complaint(capsys, "--resume", out)
    (out / "args.json").write_text(options)
    checkpoint = train.Run(out).checkpoint()
    (out / "checkpoint-²").mkdir()
    (out / "checkpoint-x").mkdir()
    for state in ({"optimizer": {}}, [1], {"step": 1}):
        torch.save(state, checkpoint / "trainer.pt")
        message = complaint(capsys, "--resume", out)
        assert "trainer.pt is broken" in message and checkpoint.name in message
    assert (out / "metrics.jsonl").read_bytes() == kept


# -------------------------------------------------------------------------------------------- bounds, memory


def test_what_would_take_forever_or_all_memory_is_refused(tmp_path, capsys, monkeypatch, jsonl):  # noqa: F811
    for option, value in (("--image-size", 100_000), ("--eval-size", 5_000_000), ("--group-size", 10**9)):
        assert option in complaint(capsys, *ONE, *COLD, option, value)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in complaint(capsys, "--data", tmp_path / "pipe", "--out", tmp_path / "out")
    huge = '{"image": "0.png", "question": "' + "q" * 10**7
    assert "rows.jsonl:3" in complaint(capsys, "--data", jsonl(huge), "--out", tmp_path / "out")
    row = {"image": "0.png", "question": "q", "answer": "\ud83d"}
    assert "rows.jsonl:3" in complaint(capsys, "--data", jsonl(json.dumps(row)), "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda file: (_ for _ in ()).throw(RecursionError("too deep")))
        assert "0.png cannot be read" in complaint(capsys, "--data", jsonl(), "--out", tmp_path / "out")
    for device in ("hpu", "xpu", "mps"):
        assert f"--device {device}" in complaint(capsys, "--device", device, "--out", tmp_path / "out")
    argv = [*ONE, *COLD, "--eval-size", 2, "--prompts", 99, "--group-size", 10_000]
    argv += ["--max-new-tokens", 20_000]
    assert "out of memory: lower --micro-batch" in complaint(capsys, *argv, "--out", tmp_path / "much")


# ------------------------------------------------------------------------------------------------ live curves


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_live_curves_hold_what_the_metrics_hold_after_resuming_too(kind, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, kind, None)
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        said = complaint(capsys, *ONE, *COLD, "--log", kind, "--out", tmp_path / "none")
        assert f"pip install {kind}" in said
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": "trackio"}.items():
        monkeypatch.setenv(name, value)
    package = pytest.importorskip(kind, reason=f"pip install {kind}")
    out, argv = tmp_path / "run", [*ONE, *COLD, "--eval-size", 2, "--log", kind]
    run(out, *argv)
    capsys.readouterr()
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    records = {r["step"]: r["reward"] for r in train.Run(out).log() if "eval" not in r}
    assert sorted(records) == [1, 2]
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(out)).Reload()
        shown = {event.step: event.value for event in board.Scalars("train/reward")}
        assert shown == pytest.approx(records) and len(board.Scalars("eval/accuracy")) >= 2
    else:
        package.finish()
        written = [p for p in tmp_path.rglob("*") if p.suffix in (".wandb", ".db", ".sqlite")]
        assert written and any(b"train/reward" in p.read_bytes() for p in written), written


# ------------------------------------------------------------------------------------------ credit, displayed


def test_credit_is_shaded_in_a_terminal_and_bracketed_in_a_pipe(monkeypatch):
    text, offsets = "<p>a b</p>", [(0, 3), (3, 4), (4, 6), (6, 10)]
    roles, w = [0, Role.PERCEPTION, Role.REASONING, 0], [1.0, 1.75, 0.25, 1.0]
    plain = train.shaded(text, offsets, roles, w)
    assert plain == "<p>a[1.8] b[0.2]</p>"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colored = train.shaded(text, offsets, roles, w)
    assert colored.count("\x1b[0m") == 2 and "[1.8]" not in colored
    shades = [piece.split("m")[0].split(";")[3:] for piece in colored.split("\x1b[30;")[1:]]
    assert shades[0] != shades[1]  # by role, and by weight
    assert train.shaded(text, offsets, roles, [1.0] * 4) == text  # GRPO
    monkeypatch.setenv("NO_COLOR", "1")
    assert train.shaded(text, offsets, roles, w) == plain
