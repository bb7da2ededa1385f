"""Tests of what a real model on one GPU needs: 16 bits, memory, adapters, the context, the best.

pip install peft pytest
python -m pytest -q extras/test_real_options.py
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from test_errors import complaint  # noqa: E402
from test_real_models import hub_folder  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from test_srpo import QUICK, SMALL, cache, jsonl, records_of, run  # noqa: E402, F401

COLD = ["--warmup-steps", 0, "--eval-size", 4, "--eval-every", 0, "--max-new-tokens", 32]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A small Qwen2-VL in the layout of the hub, to which everything is to be said."""
    folder = Path(hub_folder(tmp_path_factory.mktemp("hub"), "Qwen2VLConfig"))
    config = json.loads((folder / "config.json").read_text())
    del config["instruction"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapters(hub, tmp_path_factory):
    """A checkpoint of adapters of rank 4."""
    pytest.importorskip("peft", reason="pip install peft")
    out = tmp_path_factory.mktemp("lora")
    run(out, "--model", hub, *COLD, *SMALL, "--lora", 4, "--steps", 1)
    return train.Run(out).checkpoint()


# ---- 16 bits


def scaler_of(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def overflowing_optimizer():
    """An optimizer of one parameter whose gradient is infinite."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, math.inf])
    return torch.optim.AdamW([parameter], lr=0.1, fused=True)


def test_float16_trains_and_samples_as_it_scores(tmp_path):
    argv = [*QUICK, *SMALL, *COLD, "--steps", 2, "--save-every", 1, "--max-new-tokens", 12]
    _, steps = run(tmp_path / "half", *argv, "--dtype", "float16")
    for record in steps:
        assert record["ratio_off"] < 0.01
        assert record["skipped"] == 0
        assert math.isfinite(record["grad_norm"])
    state = torch.load(train.Run(tmp_path / "half").checkpoint() / "trainer.pt", weights_only=True)
    assert state["scaler"]["scale"] == 1024  # goes on with a resumed run


def test_a_step_without_advantages_is_taken_in_float16_too(tmp_path):
    (tmp_path / "my.py").write_text("def same(text, example):\n    return 0.5\n")
    argv = [*QUICK, *SMALL, *COLD, "--steps", 1, "--max-new-tokens", 6, "--dtype", "float16"]
    _, (record,) = run(tmp_path / "out", *argv, "--reward", f"{tmp_path / 'my.py'}:same")
    assert record["used_groups"] == 0
    assert record["grad_norm"] == 0
    assert record["skipped"] == 0


def test_an_overflow_of_float16_leaves_the_step_out():
    optimizer = overflowing_optimizer()
    before = optimizer.param_groups[0]["params"][0].clone()
    scaler = scaler_of(8.0)
    scaler.scale(torch.ones(1))  # a scaler that was never used has no scale yet
    assert train.optimizer_step(optimizer, scaler, 3, "lower --lr") is None
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)
    assert scaler.get_scale() == 4


@pytest.mark.parametrize("scaler", [scaler_of(1.0), torch.amp.GradScaler("cpu", enabled=False)])
def test_a_gradient_that_is_not_finite_at_any_scale_stops_the_run(scaler):
    if scaler.is_enabled():
        scaler.scale(torch.ones(1))
    with pytest.raises(data.InputError, match="step 3: the gradient is not finite: lower --lr"):
        train.optimizer_step(overflowing_optimizer(), scaler, 3, "lower --lr")


@pytest.mark.parametrize(
    ("device", "has_bf16", "dtype"),
    [("cpu", True, "float32"), ("cuda", True, "bfloat16"), ("cuda:1", False, "float16")],
)
def test_a_real_model_computes_in_what_the_gpu_can(device, has_bf16, dtype, monkeypatch):
    asked = []

    def is_bf16_supported(including_emulation):
        asked.append(including_emulation)
        return has_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    args = argparse.Namespace(device=device, model="Qwen/Qwen2-VL-2B-Instruct")
    assert train.default_dtype(args) == dtype
    assert True not in asked
    args.model = "tiny"
    assert train.default_dtype(args) == "float32"


def test_sampling_keeps_keys_and_values_in_the_dtype_of_computing(hub):
    policy = model.load(str(hub), dtype=torch.bfloat16, max_pixels=100 * 100)
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 2))
    with torch.no_grad(), policy._autocast():
        read = policy.read_prompts(prompts, torch.arange(2)).keys_and_values
    kept = model.sampling_cache(read, torch.tensor([0, 0, 1]), 5, torch.bfloat16)
    for layer, prompt_layer in zip(kept.layers, read.layers, strict=True):
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
        length = prompt_layer.keys.shape[2]
        assert layer.keys.shape[2] == length + 5
        assert torch.equal(layer.keys[2, :, :length], prompt_layer.keys[1].bfloat16())


def test_weights_are_cast_once_for_prompts_and_responses(hub):
    policy = model.load(str(hub), dtype=torch.bfloat16, max_pixels=100 * 100)
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 2))
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(prompts, 2, max_new_tokens=5, temperature=1.0, generator=rng)
    shape = policy.model.model.language_model.layers[0].mlp.up_proj.weight.shape
    copies = set()

    def pack(x):
        if x.dtype == torch.bfloat16 and sorted(x.shape) == sorted(shape):
            copies.add(x.untyped_storage().data_ptr())
        return x

    def unpack(x):
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        logp = policy.log_probs(prompts, rollout, 1.0)
    assert logp.requires_grad
    layers = policy.model.model.language_model.layers
    assert len(copies) == 3 * len(layers)  # up, gate and down: one copy of each


# ---- what it takes


def test_a_prompt_beyond_the_context_is_named_before_the_first_step(hub, jsonl, tmp_path, capsys):  # noqa: F811
    argv = ["--model", hub, *COLD, "--data", jsonl(), "--out", tmp_path / "out"]
    said = complaint(capsys, *argv, "--max-new-tokens", 100_000)
    assert "rows.jsonl:1: " in said
    assert "--max-new-tokens 100000 exceed the model's" in said
    assert train.Run(tmp_path / "out").log() == []


def test_the_length_of_a_prompt_is_that_of_its_tokens(hub):
    policy = model.load(str(hub), max_pixels=100 * 100)
    for example in data.DrawnTask("compare", size=150).train_batch(0, 3):
        prompts = policy.encode([example])
        visual = int((prompts.ids == policy.image_token).sum())
        sizes = [image.size for image in example.images]
        assert policy.prompt_length(example, sizes) == (prompts.ids.shape[1], visual)


def test_a_real_model_says_what_it_takes(hub, tmp_path, capsys):
    argv = ["--model", hub, *COLD, *SMALL, "--steps", 0]
    run(tmp_path / "out", *argv)
    said = capsys.readouterr().err
    assert "million parameters are trained; the longest prompt has" in said
    assert "GiB are needed, on the CPU" in said


def test_the_estimate_of_memory_is_near_what_was_measured():
    """Qwen2-VL-2B, one group: 506 visual tokens, 8 x 256 (extras/README.md, what fits)."""
    text = argparse.Namespace(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)

    class Sized:
        def __init__(self, count, trained):
            self.count = count
            self.requires_grad = trained

        def numel(self):
            return self.count

    def needed(*options, trained, frozen):
        args = train.build_parser().parse_args(["--model", "x", "--dtype", "bfloat16", *options])
        args.micro_batch = 8
        args.max_new_tokens = 256
        args.device = "cpu"
        net = argparse.Namespace(config=argparse.Namespace(get_text_config=lambda: text))
        net.parameters = lambda: [Sized(trained, True), Sized(frozen, False)]
        said = train.what_it_takes(argparse.Namespace(model=net), 540, 506, args)
        return int(said.split("about ")[1].split(" GiB")[0])

    lora = {"trained": 18_000_000, "frozen": 2_210_000_000}
    everything = {"trained": 1_540_000_000, "frozen": 670_000_000}
    assert needed("--lora", "16", **lora) == pytest.approx(11.2, abs=2.5)
    assert needed("--lora", "16", "--recompute", **lora) == pytest.approx(5.6, abs=1.5)
    alone = needed("--recompute", **everything)
    assert alone == pytest.approx(28, abs=5)
    beside_a_reference = needed("--recompute", "--kl-coef", "0.1", **everything)
    assert beside_a_reference - alone == pytest.approx(8.2, abs=1)  # 4 bytes a parameter


# ---- adapters


def test_a_folder_of_adapters_says_its_rank_itself(adapters):
    args = train.resolve_options(["--model", str(adapters)])
    assert args.lora == 4
    assert args.lr == train.REAL_LORA["lr"]
    assert train.resolve_options(["--model", str(adapters), "--lora", "4"]).lora == 4


def test_the_reference_is_what_the_run_began_with(adapters, tmp_path, capsys):
    begun = tmp_path / "adapters"
    shutil.copytree(adapters, begun)
    out = tmp_path / "out"
    _, (step,) = run(out, "--model", begun, *COLD, *SMALL, "--kl-coef", 0.1, "--steps", 1)
    assert step["kl"] == pytest.approx(0, abs=1e-6)
    shutil.rmtree(begun)  # without it the reference would be the base model
    said = complaint_after_notes(capsys, "--resume", out, "--steps", 2)
    assert f"{begun}: cannot be used: ValueError, no such folder" in said


def test_adapters_of_a_relative_folder_are_found_from_elsewhere(hub, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="pip install peft")
    monkeypatch.chdir(hub.parent)
    policy = model.load(f"./{hub.name}", frozen=True)
    policy.add_lora(2)
    policy.save(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    assert model.load(str(tmp_path / "adapters")).adapter is not None


def test_adapters_see_images_of_the_size_they_were_trained_with(adapters, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(adapters, folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config["size"]["longest_edge"] = 5000
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert model.load(str(folder)).pixel_limits[1] == 5000
    assert model.load(str(folder), max_pixels=602_112).pixel_limits[1] == 5000
    assert model.load(str(folder), max_pixels=4000).pixel_limits[1] == 4000


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--lora", 8], "have rank 4; leave it out"), (["--train-vision"], "not with adapters")],
)
def test_options_that_adapters_cannot_follow_are_refused(options, said, adapters, tmp_path, capsys):
    argv = ["--model", adapters, *options, "--out", tmp_path / "out"]
    assert said in complaint(capsys, *argv)


def test_adapters_that_lack_weights_are_refused(adapters, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for change in ("missing", "renamed"):
        folder = tmp_path / change
        folder.mkdir()
        for file in Path(adapters).iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        weights = load_file(folder / "adapter_model.safetensors")
        name = min(weights)
        value = weights.pop(name)
        if change == "renamed":
            weights[name.replace("lora_A", "lora_C")] = value
        save_file(weights, folder / "adapter_model.safetensors")
        said = complaint(capsys, "--model", folder, *COLD, "--out", tmp_path / f"out-{change}")
        assert "its adapters are not those of the model" in said


@pytest.mark.parametrize("config", [{"r": 4}, {"r": 4, "base_model_name_or_path": None}])
def test_a_damaged_adapter_config_is_one_line(config, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    said = complaint(capsys, "--model", tmp_path, "--out", tmp_path / "out")
    assert "adapter_config.json: not the configuration of adapters" in said


# ---- evaluation


def test_the_likeliest_tokens_are_the_same_whatever_is_drawn(hub):
    policy = model.load(str(hub), max_pixels=100 * 100)
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 3))
    first, second = [
        policy.sample(
            prompts,
            1,
            max_new_tokens=6,
            temperature=0.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 1)
    ]
    assert torch.equal(first.ids, second.ids)
    logp = policy.log_probs(prompts, first, temperature=1.0)
    assert torch.allclose(logp, first.logp, atol=1e-5)
    with torch.no_grad():
        start = policy.read_prompts(prompts, torch.arange(3)).last_state
        likeliest = policy._log_softmax(start, 1.0).argmax(dim=1)
    assert torch.equal(first.ids[:, 0], likeliest)


def test_the_log_says_how_it_was_evaluated(hub, tmp_path, capsys):
    assert train.resolve_options(["--model", str(hub)]).eval_temperature == 0
    (evaluation,), _ = run(tmp_path / "a", "--model", hub, *COLD, *SMALL, "--steps", 0)
    assert evaluation["eval"]["temperature"] == 0
    assert "held-out examples, sampled at temperature 0.0: step 0\n" in capsys.readouterr().out


def test_the_best_policy_is_kept(tmp_path, capsys, monkeypatch):
    accuracies = iter([0.25, 0.5, 1.0, 0.75, 1.0])
    evaluate = train.evaluate

    def scripted(*args, **kwargs):
        record = evaluate(*args, **kwargs)
        record["eval"]["accuracy"] = next(accuracies)
        return record

    monkeypatch.setattr(train, "evaluate", scripted)
    out = tmp_path / "out"
    saved = {}
    keep_best = train.Run.keep_best

    def noted(self, policy):
        keep_best(self, policy)
        weights = out / "best/model.safetensors"
        saved[len(saved) + 1] = weights.stat().st_ino

    monkeypatch.setattr(train.Run, "keep_best", noted)
    run(out, *QUICK, *SMALL, *COLD, "--steps", 4, "--eval-every", 1)
    assert saved[1] != saved[2]
    assert saved[2] == saved[3] == saved[4]  # the first of equals
    assert f"best accuracy 1.000, step 2: {out}/best" in capsys.readouterr().out
    assert [p.name for p in out.glob("*.tmp")] == []
    monkeypatch.undo()
    run(tmp_path / "again", "--model", out / "best", *COLD, "--steps", 0)


def test_a_start_that_was_best_is_not_kept_again(tmp_path, monkeypatch):
    run(tmp_path / "out", *QUICK, *SMALL, *COLD, "--steps", 1, "--lr", 1e-9)
    assert not (tmp_path / "out/best").exists()


# ---- data


def test_other_data_on_resume_is_refused(jsonl, tmp_path, capsys):  # noqa: F811
    path = jsonl()
    out = tmp_path / "out"
    run(out, *QUICK, *SMALL, *COLD, "--data", path, "--steps", 1)
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    said = complaint_after_notes(capsys, "--resume", out, "--steps", 3)
    assert f"--data {path}: has changed since the run began" in said
    assert [record["step"] for record in records_of(out)][-1] == 2


def test_a_run_that_never_began_leaves_its_name_to_another(jsonl, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    path = jsonl()
    argv = [*QUICK, *SMALL, *COLD, "--data", path, "--steps", 1, "--out", out]
    assert train.main([*map(str, argv), "--model", str(tmp_path / "none")]) == 2
    assert not out.exists()
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]) + "\n")
    assert train.main([str(word) for word in argv]) == 0


def complaint_after_notes(capsys, *argv) -> str:
    capsys.readouterr()
    assert train.main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_the_system_text_begins_the_chat(hub, jsonl):  # noqa: F811
    rows = [{"image": f"{i}.png", "question": "q?", "answer": 1} for i in range(3)]
    rows[1]["system"] = "Be brief."
    task = data.OwnTask(jsonl(lines=[json.dumps(row) for row in rows]), system="Be kind.")
    examples = {example.source[-1]: example for example, _ in task.prompts}
    assert examples["1"].system == examples["3"].system == "Be kind."
    assert examples["2"].system == "Be brief."
    policy = model.load(str(hub))
    (ids,) = policy._tokenize([examples["2"]], [torch.tensor([[1, 4, 4]])])
    text = policy.tokenizer.decode(ids)
    assert text.index("Be brief.") < text.index("q?")
