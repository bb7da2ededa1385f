"""Tests of faults that a user meets in extras/: one clear line, exit code 2, no hang, nothing lost.

pip install pytest, then python -m pytest -q extras/test_scripts.py
"""

import io
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench  # noqa: E402
import contrast  # noqa: E402
import credit  # noqa: E402
import distribution  # noqa: E402
import from_hub  # noqa: E402
import loggers  # noqa: E402
import script  # noqa: E402
import study  # noqa: E402

import train  # noqa: E402
from data import CELLS, InputError  # noqa: E402


def one_line(capsys, main, *argv) -> str:
    """What a script says of a fault."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:  # the parser's way
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


# ---- every script


PARTS = "trl_srpo verl_srpo easyr1_srpo host loggers credit bench_models bench_trl study_conditions"


@pytest.mark.parametrize("name", PARTS.split())
def test_what_is_no_script_says_what_to_do_with_it(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nothing of the project can be imported, as from here
    for module in ("srpo", "data", "model", "host", "trl", "verl", "transfer_queue"):
        if name not in ("credit", "bench_models"):
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("error: no script: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("module", [study, contrast, bench, from_hub])
def test_help_needs_no_docstrings(module, capsys, monkeypatch):
    monkeypatch.setattr(module, "__doc__", None)  # as under python -OO
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert "usage: " in capsys.readouterr().out


FAULTS = [
    (InputError("row 3"), 2, "error: row 3\n"),
    (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
    (MemoryError(), 2, "error: out of memory: ask for less at a time\n"),
    (RuntimeError("CUDA out of memory"), 2, "error: out of memory: ask for less at a time\n"),
    (KeyboardInterrupt(), 130, "\nstopped; go on\n"),
    (BrokenPipeError(), 0, ""),
]


@pytest.mark.parametrize(("fault", "code", "said"), FAULTS)
def test_a_fault_is_one_line(fault, code, said, capsys):
    def work(argv):
        raise fault

    assert script.exit_code(work, [], "stopped; go on") == code
    assert capsys.readouterr().err == said


def test_a_mistake_in_the_code_is_not_hidden():
    def work(argv):
        raise RuntimeError("not the user's fault")

    with pytest.raises(RuntimeError, match="not the user's"):
        script.exit_code(work, [])


def talk(argv):
    print("Δ: 0.5\n" * 5000)


def whisper(argv):
    print("Δ")


@pytest.mark.parametrize("work", [talk, whisper])  # fails when it is printed, or at the end
def test_a_reader_who_has_gone_is_no_fault(work, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert script.exit_code(work, []) == 0
        stdout.flush()  # as at the exit of Python
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line(capsys, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert script.exit_code(talk, []) == 2
        stdout.flush()
    said = capsys.readouterr().err
    assert "No space left" in said
    assert said.count("\n") == 1


def test_stdout_may_be_closed_or_not_utf_8(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert script.exit_code(talk, []) == 0
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert script.exit_code(whisper, []) == 0
    assert written.getvalue() == b"?\n"
    replaced = io.StringIO()  # as in a notebook: it cannot be reconfigured
    monkeypatch.setattr(sys, "stdout", replaced)
    assert script.exit_code(whisper, []) == 0
    assert replaced.getvalue() == "Δ\n"


# ---- loggers

PACKAGES = {  # what the package holds: what is said of it
    "import nothing_of_this_name": "No module named 'nothing_of_this_name'",
    "raise ImportError('libstdc++.so.6: version not found')": "ImportError, libstdc++",
    "raise TypeError('Descriptors cannot be created directly')": "TypeError, Descriptors",
    "raise SystemExit('no terminal')": "SystemExit, no terminal",
    "": "has no attribute 'init'",
    "def init(project): pass": "unexpected keyword argument",
    "def init(**_): raise RuntimeError('No key.\\nLog in.')": "RuntimeError, No key. Log in.",
    "def init(**_): raise PermissionError(13, 'no', '/x')": "PermissionError, [Errno 13] no: '/x'",
    "def init(**_): raise TimeoutError": "(TimeoutError)",
    "def init(**_): exit(1)": "SystemExit, 1",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that puts a package of this name and content in the place of the real one."""

    made = []

    def make(name: str, content: str) -> None:
        made.append(name)
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(content)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(folder)

    yield make
    for name in made:
        sys.modules.pop(name, None)  # then the real one comes back


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("content", PACKAGES)
def test_a_logger_that_cannot_start_is_one_line(content, name, package, tmp_path):
    package(name, content)
    with pytest.raises(InputError) as error:
        getattr(loggers, name)(tmp_path / "run", {})
    said = str(error.value)
    assert said.startswith(f"--log extras/loggers.py:{name}: cannot start (")
    assert PACKAGES[content] in said
    assert said.endswith(f"; try {loggers.WAYS_OUT[name]}")
    assert "\n" not in said


def test_tensorboard_that_cannot_write_or_start_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="loggers.py:tensorboard: cannot start .*file"):
        loggers.tensorboard(tmp_path / "file" / "run", {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", object())  # an older version
    with pytest.raises(InputError, match="cannot start .*SummaryWriter.*pip install -U"):
        loggers.tensorboard(tmp_path / "run", {})


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as wandb leaves one
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="not installed; pip install wandb"):
        loggers.wandb(tmp_path / "run", {})


def test_a_folder_that_trackio_cannot_write_is_said(package, tmp_path, monkeypatch):
    package("trackio", "def init(**_): pass")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file" / "logs"))
    with pytest.raises(InputError, match="Not a directory.*try another TRACKIO_DIR"):
        loggers.trackio(tmp_path / "run", {})


def test_runs_in_folders_of_one_name_have_curves_of_their_own(package, tmp_path):
    package("wandb", "begun = []\ndef init(**options): begun.append(options)")
    for folder in ("one/run", "two/run", "one/run"):  # the last is resumed
        loggers.wandb(tmp_path / folder, {})
    ids = [options["id"] for options in sys.modules["wandb"].begun]
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("fault", [OSError("no network"), SystemExit(1)])
def test_a_logger_that_fails_later_ends_no_run(fault, tmp_path, capsys):
    def send(numbers, step):
        raise fault

    run = train.Run(tmp_path)
    run.send = send
    for step in (1, 2):
        run.write({"step": step, "reward": 0.5})
    assert [record["step"] for record in run.log()] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert type(fault).__name__ in said


# ---- from_hub

HUB = [  # arguments of from_hub.py: what is said of them
    (["", "out"], "argument name: is empty"),
    (["name", ""], "argument dir: is empty"),
    (["name", "out", "--split="], "argument --split: is empty"),
    (["/", "out"], "/: no data set"),
    (["..", "/"], "/: not empty"),
    ([".", "out"], ".: cannot be loaded"),
    (["name", "."], ".: not empty"),
    (["name", "file/out"], "Not a directory"),
]


@pytest.mark.parametrize(("argv", "said"), HUB)
def test_what_from_hub_cannot_read_or_write(argv, said, capsys, tmp_path, monkeypatch):
    if said.endswith("cannot be loaded"):
        pytest.importorskip("datasets", reason="pip install datasets")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert said in one_line(capsys, from_hub.main, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_package_that_does_not_fit_is_one_line(capsys, tmp_path, package):
    package("datasets", "raise AttributeError('module pyarrow has no attribute X')")
    said = one_line(capsys, from_hub.main, "name", tmp_path / "out")
    assert "needs datasets: pip install datasets, with -U" in said
    assert "pyarrow has no attribute X" in said


# ---- bench

BENCH = [
    ("--shape bogus", "'bogus' is none of short, long, real"),
    ("--shape short,", "'' is none of"),
    ("--turns 0", "argument --turns"),
    ("--steps 0", "argument --steps"),
    ("--against no-such-commit", "git worktree add DIR COMMIT"),
    ("--against ROOT --groups 4,8", "not with --groups"),
    ("--conditions grpo,bogus", "'bogus'; known: grpo and srpo"),
    ("--conditions=", "argument --conditions: is empty"),
    ("--conditions trl-grpo", "pip install trl"),
    ("--conditions srpo-lora", "pip install peft"),
    ("--groups x,8", "give two sizes"),
    ("--groups 8,8", "give two sizes"),
    ("--groups 1,8", "give two sizes"),
    ("--device bogus", "--device bogus: not possible here"),
]


@pytest.mark.parametrize(("options", "said"), BENCH)
def test_what_the_bench_cannot_measure_is_said_before_it_begins(options, said, capsys, monkeypatch):
    def begin(*_):
        raise AssertionError("it has begun")

    def nothing(name):
        return None

    monkeypatch.setattr(bench, "bench", begin)
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    monkeypatch.setattr(bench.importlib.util, "find_spec", nothing)
    options = options.replace("ROOT", str(HERE.parent))
    assert said in one_line(capsys, bench.main, *options.split())


def test_without_grpo_nothing_is_compared_with_it(capsys):
    result = {"phases": [(0.1, 0.1, 0.1)], "tokens": [8], "peak": 1.0}
    bench.table("short", {"srpo": result}, "cpu")
    assert " nan " in capsys.readouterr().out


def test_a_condition_that_fails_is_named_with_its_last_line():
    with pytest.raises(InputError, match="^grpo: ValueError: too much$"):
        bench.call("grpo", ["-c", "raise ValueError('too much')"])
    with pytest.raises(InputError, match="^srpo: exit code -9 "):
        bench.call("srpo", ["-c", "import os; os.kill(os.getpid(), 9)"])


# ---- contrast

CONTRAST = [
    ("--prompts 0", "argument --prompts"),
    ("--draws 0", "argument --draws"),
    ("--draws 6", "argument --draws"),
    ("--resume run", "--resume: has no part"),
    ("--out=run", "--out: has no part"),
    ("--steps 5", "--steps: has no part"),
    ("--corruption blur", "--corruption: has no part"),
    ("--bogus", "--bogus"),
    ("--weights none.py:f", "--weights none.py:f: no such function"),
    ("--model ROOT", "cannot be used"),
]


@pytest.mark.parametrize(("options", "said"), CONTRAST)
def test_what_contrast_cannot_use_is_said_before_it_begins(options, said, capsys, monkeypatch):
    def begin(*_):
        raise AssertionError("it has begun")

    monkeypatch.setattr(train, "imitate", begin)
    monkeypatch.setattr(credit, "sample", begin)
    options = options.replace("ROOT", str(HERE.parent))
    assert said in one_line(capsys, contrast.main, *options.split())


@pytest.mark.parametrize("options", ["--algo grpo", "--lam 0", "--steps 5"])
def test_options_without_a_part_in_the_distribution_are_refused(options, capsys):
    said = f"{options.split()[0]}: has no part in distribution.py"
    assert said in one_line(capsys, distribution.main, *options.split())


def test_hidden_cells_are_those_that_the_mask_covers():
    args, _ = contrast.options(["--prompts", "3", "--seed", "4"])
    policy = train.load_policy(args, "tiny")
    examples = train.build_task(args).train_batch(0, 3)
    striped = Image.new("L", (48, 48))
    striped.paste(255, (0, 0, 8, 48))  # so that the mean is neither black nor white
    pictures = [contrast.replace(example, images=(striped,)) for example in examples]
    batch = credit.Batch(examples, *[None] * 6)
    found = contrast.hidden_cells(policy, batch, args, step=7)
    assert len(set(map(frozenset, found))) > 1
    for cells, masked in zip(found, train.corrupted_copies(pictures, policy, args, 7), strict=True):
        pixels = np.asarray(masked.images[0])
        changed = (pixels % 255 != 0).any(axis=2)
        for index, cell in enumerate(CELLS):
            row, column = divmod(index, 3)
            of_cell = changed[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert (of_cell.mean() > 0.6) == (cell in cells)  # of four patches three


def test_draws_of_the_mask_are_compared_and_averaged(capsys, monkeypatch, tmp_path):
    """With a policy that has learned little, whose responses are demonstrations."""
    args, draws = contrast.options("--prompts 4 --draws 4 --group-size 2".split())
    policy = train.load_policy(args, "tiny")
    examples = train.build_task(args).train_batch(0, 4)
    rng = np.random.default_rng(0)
    rollout = policy.as_rollout([train.demonstrate(example, 0.4, rng) for example in examples])
    prompts = policy.encode(examples)
    rollout.logp = train.score(policy, prompts, rollout, args)
    responses = policy.decode(rollout)
    roles = train.response_roles(responses, rollout)
    A = rollout.logp.new_ones(4)
    batch = credit.Batch(examples, prompts, rollout, responses, [], A, roles)
    single, averaged = contrast.mask_tables(policy, batch, args, draws)
    (_, words) = single[0]
    assert set(words) >= {"true, hidden", "false, not", "AUC hidden", "AUC true, hidden"}
    assert all(np.isfinite(value) for value in words.values())
    assert [name for name, _ in averaged] == ["masks: 1", "masks: 2", "masks: 4"]
    logp_blank = credit.blank_log_probs(policy, batch, args)
    masked = [credit.corrupted_log_probs(policy, batch, args, step=draw) for draw in range(4)]
    of_all = contrast.figures(batch, sum(masked) / 4, logp_blank, args)
    of_one = [contrast.figures(batch, logp, logp_blank, args) for logp in masked]
    for name in ("Δ P", "clipped low"):
        assert averaged[2][1][name] == pytest.approx(of_all[name], abs=1e-5)
        mean = np.mean([figure[name] for figure in of_one])
        assert averaged[0][1][name] == pytest.approx(mean, abs=1e-5)
