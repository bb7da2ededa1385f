"""Tests of extras/gpu_check.py, on the CPU.

pip install peft pytest, then python -m pytest -q extras/test_gpu_check.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench  # noqa: E402
import bench_models  # noqa: E402
import gpu_check  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Roles are drawn, as the command does; no test changes what others see."""
    monkeypatch.setattr(train, "token_roles", bench.draw_roles)
    monkeypatch.setattr(bench_models, "MODELS", dict(bench_models.MODELS))
    monkeypatch.setattr(bench_models, "SHAPES", dict(bench_models.SHAPES))
    for name in ("MODELS", "SHAPES"):
        monkeypatch.setattr(gpu_check, name, getattr(bench_models, name))


def small(family, folder):
    gpu_check.make_small(family, folder, 64)
    return str(folder)


@pytest.mark.parametrize("family", gpu_check.FAMILIES)
def test_a_small_model_of_each_family_depends_on_all_that_srpo_compares(family, tmp_path):
    folder = small(family, tmp_path / family)
    assert not model.is_tiny(folder)
    policy = model.load(folder)
    assert policy.model.config.model_type == family
    as_written, corrupted, blank = gpu_check.scores(policy)
    read = blank != 0
    assert (as_written - corrupted).abs().max() > 1e-3
    assert (as_written - blank)[read].abs().max() > 1e-3
    assert gpu_check.check_log_probs(folder, "cpu") == "0"
    assert float(gpu_check.check_sampling(folder, "cpu")) < 1e-4


def test_another_model_in_the_place_of_the_gpus_is_noticed(tmp_path, monkeypatch):
    """What a GPU that computes wrongly would give."""
    good = small("qwen2_vl", tmp_path / "good")
    bad = small("qwen2_vl", tmp_path / "bad")
    weights = load_file(f"{bad}/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] * 1.5
    save_file(weights, f"{bad}/model.safetensors", metadata={"format": "pt"})
    load = model.load

    def load_bad(name, device="cpu"):
        if device == "cpu":
            return load(good)
        return load(bad)

    checks = [gpu_check.check_log_probs, gpu_check.check_gradient]
    for check in checks:
        assert check(good, "cpu") == "0"
    monkeypatch.setattr(model, "load", load_bad)
    for check in checks:
        with pytest.raises(ValueError, match="off by"):
            check(good, "cuda")


def test_checks_train_as_the_command_line_does(tmp_path):
    folder = small("qwen3_vl", tmp_path / "small")
    whole = gpu_check.training("--dtype", "float16", "--kl-coef", "0.1")
    assert float(whole(folder, "cpu").split()[0]) < 0.05
    assert gpu_check.check_recompute(folder, "cpu") == "0"
    assert float(gpu_check.check_resume(folder, "cpu")) < 1e-4
    with pytest.raises(RuntimeError, match="--w-min 3.0: above"):
        gpu_check.trained(folder, "--w-min", "3")
    with pytest.raises(RuntimeError, match="--no-such-option"):
        gpu_check.trained(folder, "--no-such-option")


def test_ctrl_c_ends_all_rows(monkeypatch):
    def stopped(argv):
        return 130

    monkeypatch.setattr(train, "main", stopped)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.Checks()("a row", gpu_check.training(), "folder", "cpu")


def test_adapters_are_loaded_again(tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    folder = small("qwen3_5", tmp_path / "small")
    assert gpu_check.check_adapters(folder, "cpu") == "0"


def test_steps_that_are_all_skipped_fail(monkeypatch):
    def skipped(folder, *options):
        return [{"ratio_off": 0.1, "skipped": 1}] * 2

    monkeypatch.setattr(gpu_check, "trained", skipped)
    with pytest.raises(ValueError, match="all 2 steps were skipped"):
        gpu_check.training()("", "cpu")


def test_the_largest_difference_of_metrics_leaves_seconds_out():
    one = {"step": 3, "loss": 0.5, "kl": None, "sec_update": 1.0}
    other = {"step": 3, "loss": 0.25, "kl": None, "sec_update": 9.0}
    assert gpu_check.metrics_off(one, other) == 0.25
    assert gpu_check.metrics_off(one, one) == 0
    broken = {**one, "loss": float("nan")}
    assert str(gpu_check.metrics_off(broken, one)) == "nan"


@pytest.mark.parametrize(
    ("gib", "condition"), [(80, "srpo"), (24, "srpo-lora"), (15, "srpo-lora-recompute")]
)
def test_the_2b_model_is_trained_as_its_memory_allows(gib, condition, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gib * 2**30))
    assert condition in gpu_check.conditions_2b("cuda")


def test_a_row_of_the_2b_model_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    class Done:
        returncode = 0
        stderr = ""
        result = {"phases": [[2.0, 0.5, 1.0]], "tokens": [100], "peak": 3.21}
        stdout = "said by others\nRESULT " + json.dumps(result)

    def run(command, **options):
        assert options["timeout"] == 60
        assert command[2:6] == ["--one", "srpo", "group", "folder"]
        return Done

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    figures = gpu_check.row_2b("srpo", "group", "folder", "cuda", 60)
    assert figures == "50 | 2.00 | 0.50 | 1.00 | 3.50 | 3.2"
    Done.returncode = 1
    Done.stderr = "Traceback\ntorch.OutOfMemoryError: none left\n"
    with pytest.raises(RuntimeError, match=r"^torch.OutOfMemoryError: none left$"):
        gpu_check.row_2b("srpo", "group", "folder", "cuda", 60)


def test_one_condition_measures_a_step(tmp_path, monkeypatch, capsys):
    """With a small model in the place of the 2B one."""
    for name in ("token_roles", "verify", "evaluate", "summarize"):  # which bench.py replaces
        monkeypatch.setattr(train, name, getattr(train, name))
    monkeypatch.setattr(train.Run, "save", train.Run.save)
    small("qwen2_vl", tmp_path / "small")
    gpu_check.SHAPES["cut"] = gpu_check.SHAPES["qwen2_vl"]._replace(group_size=2, new_tokens=4)
    made = str(tmp_path / "made")
    try:
        gpu_check.run_one("make", "cut", made, "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in load_file(f"{made}/model.safetensors").values()} == {torch.bfloat16}
    passes = []
    score = train.score

    def counted(*args, **kwargs):
        passes.append(1)
        return score(*args, **kwargs)

    monkeypatch.setattr(train, "score", counted)
    for condition in ("grpo", "srpo", "generate"):
        capsys.readouterr()
        passes.clear()
        gpu_check.run_one(condition, "cut", made, "cpu")
        result = json.loads(capsys.readouterr().out.split("RESULT ")[1])
        (phases,) = result["phases"]
        assert phases[0] > 0
        assert bool(passes) == (condition == "srpo")
        assert len(result["tokens"]) == 1


def test_a_check_that_fails_is_a_line_and_the_next_goes_on(monkeypatch, capsys):
    def good(folder, device):
        return "1e-06"

    def bad(folder, device):
        raise RuntimeError("no kernel\nfor this, and much more")

    monkeypatch.setattr(gpu_check, "CHECKS", {"first": bad, "second": good})
    assert gpu_check.main(["--device", "cpu", "--families", "qwen2_vl,qwen3_5"]) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("CPU")
    assert "torch" in lines[0]
    assert lines[2:] == [
        "| | qwen2_vl | qwen3_5 |",
        "|---|---|---|",
        "| first | failed | failed |",
        "| second | 1e-06 | 1e-06 |",
    ]
    assert said.err.count("FAILED: RuntimeError, no kernel") == 2
    assert "much more" not in said.err
    monkeypatch.setattr(gpu_check, "CHECKS", {"second": good})
    assert gpu_check.main(["--device", "cpu", "--families", "qwen2_vl"]) == 0


@pytest.mark.parametrize("argv", [["--device", "cuda:99"], ["--families", "gpt2"], ["--minutes"]])
def test_bad_options_are_said_in_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(argv)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
