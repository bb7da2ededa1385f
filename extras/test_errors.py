"""Tests of bad input: one clear line that names option, file or row, exit code 2, nothing lost.

pip install pytest, then python -m pytest -q extras/test_errors.py
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from test_srpo import (  # noqa: E402, F401
    NAN,
    ONE,
    QUICK,
    cache,
    jsonl,
    policy,
    run,
)


def complaint(capsys, *argv):
    """The one line that `train.py` answers to bad input."""
    capsys.readouterr()
    try:
        code = train.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    stderr = re.sub(r"^step \d+: accuracy .*\n", "", capsys.readouterr().err, flags=re.MULTILINE)
    assert code == 2, stderr
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr


# ---- options

BAD_OPTIONS = [  # TMP is a folder with what `folders` puts there
    ("--model TMP/none", "none"),
    ("--model no-such-owner/no-such-model", "no-such-owner"),
    ("--model TMP/empty", "empty"),
    ("--model TMP/text-only", "not one of qwen2_vl,"),
    ("--model TMP/cut", "cannot be used"),
    ("--device cuda:99", "cuda:99"),
    ("--device banana", "banana"),
    ("--device meta", "meta"),
    ("--model ./none", "no such folder"),
    ("--model TMP/run", "take its checkpoint"),
    ("--data=", "is empty"),
    ("--resume=", "is empty"),
    ("--reward=", "is empty"),
    ("--out=", "is empty"),
    ("--temperature inf", "temperature"),
    ("--reward TMP/exit.py:f", "no such function"),
    ("--seed 999999999999999999999999999999", "seed"),
    ("--group-size 1", "group-size"),
    ("--temperature nan", "temperature"),
    ("--prompts 0", "prompts"),
    ("--temperature 0", "temperature"),
    ("--lr x", "lr"),
    ("--tau x", "tau"),
    ("--tau -1", "tau"),
    ("--tau inf", "tau"),
    ("--lam 2", "lam"),
    ("--corruption melt", "melt"),
    ("--corruption-p 2", "corruption-p"),
    ("--w-min 0", "w-min"),
    ("--w-min 3", "--w-max 1.2"),
    ("--w-max inf", "w-max"),
    ("--task chess", "chess"),
    ("--out TMP/file/sub", "Not a directory"),
    ("--what", "--what"),
    ("--resume TMP/none", "not the folder of a run"),
    ("--resume TMP/text-only", "not the folder of a run"),
    ("--reward TMP/file", "--reward"),
    ("--reward TMP/file:g", "no such function"),
    ("--weights TMP/file:g", "no such function"),
    ("--log TMP/file:g", "no such function"),
    ("--lora 4", "pip install peft"),
    ("--lora 4 --train-vision", "--train-vision"),
    ("--eval-all", "only with --data"),
    ("--eval-all --data x.jsonl", "--steps 0"),
    ("--model TMP/cut --warmup-steps 2", "extras/cold_start.py"),
]


@pytest.fixture
def folders(tmp_path, policy):  # noqa: F811
    (tmp_path / "text-only").mkdir()
    (tmp_path / "text-only/config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "exit.py").write_text("raise SystemExit")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text("{}")
    policy.save(tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    return tmp_path


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS)
def test_a_bad_option_is_named(options, said, capsys, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    argv = options.replace("TMP", str(folders)).split()
    if not any(word.startswith(("--out", "--resume")) for word in argv):
        argv += ["--out", folders / "out"]
    assert said in complaint(capsys, *argv)


# ---- the folder of a run


@pytest.fixture
def used(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    options = {"argv": ["--lr", "1e-4"], "lr": 1e-4}
    (folder / "args.json").write_text(json.dumps(options))
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval": {}}\n')
    return folder


def test_a_used_folder_is_not_written_over(capsys, used):
    before = (used / "args.json").read_text()
    assert f"--resume {used}" in complaint(capsys, "--out", used)
    assert (used / "args.json").read_text() == before
    assert (used / "metrics.jsonl").exists()


@pytest.mark.parametrize("options", [["--lr", "0.5"], ["--out", "other"]])
def test_a_resumed_run_keeps_its_options(capsys, used, options):
    assert options[0] in complaint(capsys, "--resume", used, *options)


def test_options_changed_by_hand_meet_the_same_checks(capsys, used):
    (used / "args.json").write_text(json.dumps({"argv": ["--lr", "fast"]}))
    assert "--lr" in complaint(capsys, "--resume", used)


@pytest.mark.parametrize("damage", ["{\n", "\udcff\n"])
def test_damaged_records_of_a_checkpoint_are_said(capsys, tmp_path, damage):
    run(tmp_path / "out", *ONE, "--warmup-steps", 0)
    metrics = train.Run(tmp_path / "out").checkpoint() / "metrics.jsonl"
    metrics.write_text(damage, errors="surrogateescape")
    said = complaint(capsys, "--resume", tmp_path / "out")
    assert "metrics.jsonl: not the records of a run" in said


# ---- while it runs


def test_divergence_is_said(capsys, tmp_path, monkeypatch):
    def lost(self, states, temperature):
        return torch.full((len(states), 50), NAN)

    monkeypatch.setattr(model.Policy, "_log_softmax", lost)
    said = complaint(capsys, *QUICK, "--warmup-steps", 0, "--out", tmp_path / "out")
    assert "the policy has diverged" in said


BROKEN_LATER = """
import torch
def weights(logp, *others, progress, **options):
    return torch.full_like(logp, 1.0 if progress < 0.5 else float("inf"))
"""


def test_a_gradient_that_is_not_finite_stops_the_run_and_spoils_nothing(tmp_path, capsys):
    (tmp_path / "my.py").write_text(BROKEN_LATER)
    options = [*ONE, "--steps", 9, "--save-every", 1, "--weights", f"{tmp_path}/my.py:weights"]
    said = complaint(capsys, *options, "--out", tmp_path / "out")
    checkpoint = train.Run(tmp_path / "out").checkpoint()
    assert "step 5: the gradient is not finite" in said
    assert str(checkpoint) in said
    assert checkpoint.name == "checkpoint-000004"
    weights = model.load(str(checkpoint)).model.parameters()
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_too_little_memory_names_the_ways_out(capsys, tmp_path, monkeypatch, error):
    def fail(args, run, task):
        raise error

    monkeypatch.setattr(train, "prepare", fail)
    said = complaint(capsys, "--out", tmp_path / "out")
    for option in ("--micro-batch", "--max-new-tokens", "--max-pixels", "--lora"):
        assert option in said


@pytest.mark.parametrize(
    ("value", "said"),
    [("float('nan')", "not finite"), ("1 / 0", "ZeroDivisionError"), ("exit()", "SystemExit")],
)
def test_a_reward_that_fails_names_its_question(capsys, tmp_path, value, said):
    file = tmp_path / "my.py"
    file.write_text(f"def reward(text, example):\n    return {value}\n")
    options = [*ONE, "--warmup-steps", 0, "--reward", f"{file}:reward"]
    message = complaint(capsys, *options, "--out", tmp_path / "out")
    assert said in message
    assert "my.py:reward" in message
    assert "How many" in message


# ---- your data

ROW = {"image": "0.png", "question": "q", "answer": "a"}
BAD_ROWS = [
    ({"image": "gone.png"}, "No such file"),
    ({"image": "short.png"}, "cannot be read"),
    ({"image": "text.png"}, "cannot be read"),
    ({"image": "big.png"}, "too large"),
    ({"image": "long.png"}, "200 to 1"),
    ({"image": "."}, "cannot be read"),
    ({"image": 5}, "No such file"),
    ({"image": ["0.png"]}, "image must be text, not list"),
    ({"image": None}, "image must be text, not missing"),
    ({"image": "data:image/png;base64,iVBO"}, "extras/from_hub.py"),
    ({"images": ["0.png"]}, "image and images; give one"),
    ({"system": ["s"]}, "system must be text"),
    ({"messages": []}, "messages is not read"),
    ({"question": ["q"]}, "question must be text, not list"),
    ({"question": None}, "question must be text, not missing"),
    ({"answer": None}, "answer must be text, not missing"),
    ({"answer": ["a"]}, "answer must be text, not list"),
    ({"question": "\ud83d"}, "lone surrogate"),
    ({"answer": "\ud83d"}, "lone surrogate"),
    ({"answer": "<answer>1</answer>"}, "give the answer alone"),
    ({"answer": "so 3 #### 3"}, "give the answer alone"),
    ({"answer": r"\boxed{1} or \boxed{2}"}, "give the answer alone"),
    ({"response": ["r"]}, "response must be text, not list"),
    ({"answer": " ."}, "blank"),
    ({"question": "<|image_pad|>"}, "placeholder"),
    ({"response": "<|video_pad|>"}, "placeholder"),
    ({"question": "<image><image>"}, "1 <image>"),
    ({"response": "<answer>1</answer>"}, "lacks the form"),
    ({"response": data.respond("a", " ", "1")}, "a block of it is blank"),
]
BAD_LINES = [
    ('{"image": "0.png", "question"', "expected one JSON object"),
    ('{"image": "0.png", "question": "q"}', "answer must be text, not missing"),
    ('{"images": [], "question": "q", "answer": 1}', "images must be a list"),
    ('{"images": "0.png", "question": "q", "answer": 1}', "images must be a list"),
    ('{"image": "0.png", "question": "q", "answer": NaN}', "text, not float 'nan'"),
    ('{"image": "0.png", "question": "q", "answer": -Infinity}', "text, not float '-inf'"),
    ("[1]", "expected one JSON object, got '[1]'; jq -c '.[]' takes an array apart"),
    ("[" * 100_000, "takes an array apart"),
    ("7", "expected one JSON object, got '7'"),
]
BAD_LINES += [(json.dumps({**ROW, **change}), said) for change, said in BAD_ROWS]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line(
    line,
    said,
    capsys,
    tmp_path,
    jsonl,  # noqa: F811
    monkeypatch,
):
    path = jsonl(line)
    (tmp_path / "short.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (1500, 1000)).save(tmp_path / "big.png")
    Image.new("L", (900, 2)).save(tmp_path / "long.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    message = complaint(capsys, "--data", path, "--out", tmp_path / "out")
    assert said in message
    assert "rows.jsonl:3:" in message


@pytest.mark.parametrize(
    ("lines", "said"), [([], "empty"), ([json.dumps(ROW)] * 3, "no row is left to train on")]
)
def test_files_without_rows_to_train_on_are_refused(lines, said, capsys, tmp_path, jsonl):  # noqa: F811
    assert said in complaint(capsys, "--data", jsonl(lines=lines), "--out", tmp_path / "out")


def test_a_file_that_is_no_text_is_refused(capsys, tmp_path, jsonl):  # noqa: F811
    jsonl()
    said = complaint(capsys, "--data", tmp_path / "0.png", "--out", tmp_path / "out")
    assert "cannot be read as UTF-8" in said
    assert "extras/from_hub.py" in said


def test_columns_that_are_null_are_as_missing(jsonl):  # noqa: F811
    row = {**ROW, "images": None, "system": None, "response": None, "level": None}
    task = data.OwnTask(jsonl(json.dumps(row)), system="Be brief.")
    (example,) = [example for example, _ in task.prompts if "level" in example.row]
    assert example.system == "Be brief."
    assert example.row["level"] is None


def test_numbers_keep_the_text_of_the_file(jsonl):  # noqa: F811
    line = '{"image": "2.png", "question": "q", "answer": 0.00001}'
    task = data.OwnTask(jsonl(line), eval_all=True)
    assert "0.00001" in [example.answer for example, _ in task.prompts]


def test_a_reward_sees_all_columns_and_imports_from_beside_it(jsonl, tmp_path):  # noqa: F811
    (tmp_path / "beside.py").write_text("known = {'hard': 1.0}")
    (tmp_path / "my.py").write_text(
        "import beside\ndef reward(text, example): return beside.known[example.row['level']]"
    )
    lines = [json.dumps({**ROW, "image": f"{i}.png", "level": "hard"}) for i in range(10)]
    args = train.resolve_options(["--reward", f"{tmp_path}/my.py:reward"])
    (example, *_) = data.OwnTask(jsonl(lines=lines)).eval_set(1)
    assert train.build_judge(args)("", example).reward == 1


def test_an_answer_that_the_reward_refuses_is_said_before_the_first_step(
    capsys,
    tmp_path,
    jsonl,  # noqa: F811
):
    file = tmp_path / "my.py"
    file.write_text(
        "import data\n"
        "def reward(text, example):\n"
        "    return data.Verdict(0.0, float(example.answer != '1'), 1.0)\n"
    )
    options = ["--data", jsonl(), "--reward", f"{file}:reward", "--out", tmp_path / "out"]
    said = complaint(capsys, *options)
    assert "rows.jsonl:2: the reward does not accept '1' as its own answer" in said


@pytest.mark.parametrize("figure", ["None", "'high'"])
def test_a_verdict_without_numbers_is_refused(capsys, tmp_path, figure):
    file = tmp_path / "my.py"
    file.write_text(
        f"import data\ndef reward(text, example): return data.Verdict(0.0, {figure}, 1.0)\n"
    )
    options = [*ONE, "--warmup-steps", 0, "--reward", f"{file}:reward"]
    said = complaint(capsys, *options, "--out", tmp_path / "out")
    assert "TypeError, must be real number" in said


def test_answers_that_need_another_reward_are_noted(capsys):
    train.note_hard_answers(["3", "4", "red", "1,000"])
    assert capsys.readouterr().err == ""
    train.note_hard_answers(["3", "5 cm", "$13$", "B"])
    said = capsys.readouterr().err
    assert "75% of the answers, like '5 cm'" in said
    assert "--reward extras/answers.py:reward" in said


def test_a_run_that_never_started_leaves_its_folder_free(capsys, tmp_path, jsonl):  # noqa: F811
    out = tmp_path / "out"
    for _ in range(2):
        assert "rows.jsonl:3:" in complaint(capsys, "--data", jsonl("[1]"), "--out", out)
