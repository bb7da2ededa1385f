"""Tests of trl_srpo.py against the real TRL.

pip install trl==1.16.0 pytest
python -m pytest -q extras/test_trl_srpo.py
"""

import dataclasses
import filecmp
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="pip install trl==1.16.0")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import host  # noqa: E402
from bench_trl import Processor  # noqa: E402
from datasets import Dataset  # noqa: E402
from test_easyr1_srpo import scored  # noqa: E402
from transformers import AutoModelForImageTextToText, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl_srpo import SRPOTrainer  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import srpo  # noqa: E402

G = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of random weights, as a user would name one."""
    folder = tmp_path_factory.mktemp("model")
    model.build_tiny(seed=0).save(folder)
    return str(folder)


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def reward(completions, **_):
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


class Scripted:
    """Instead of sampling, the k-th response to each question is a given text: runs can be
    compared."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        first = self.accelerator.process_index * len(prompt_ids)
        rows = []
        for i in range(len(prompt_ids)):
            k = (first + i) % num_generations
            color = list(data.COLORS)[k % 4]
            perception = f" a1 {color} circle, b{k % 3 + 1} {color} square"
            reasoning = f" a1 {color}" * (k + 1) + f" so {k}"
            text = data.respond(perception, reasoning, f" {k}")
            rows.append(self.policy.as_rollout([text]).ids[0].tolist())
        return rows, None


class ScriptedSRPO(Scripted, SRPOTrainer):
    pass


class ScriptedGRPO(Scripted, GRPOTrainer):
    pass


def trained(kind, folder, out, batch=2 * G, steps=2, options=None, config=None):
    """Logs of a short run on four questions, and its trainer.

    `options` are SRPOTrainer's own, `config` is for GRPOConfig.
    """
    policy = model.load(folder)
    rows = []
    for example in data.DrawnTask("count").train_batch(0, 4):
        prompt = [{"role": "user", "content": example.question}]
        rows.append({"prompt": prompt, "image": example.images[0]})
    arguments = {
        "output_dir": str(out),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "seed": 0,
        "num_generations": G,
        "max_completion_length": 48,
        "shuffle_dataset": False,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments.update(config or {})
    recorder = Recorder()
    trainer = kind(
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        reward,
        GRPOConfig(**arguments),
        Dataset.from_list(rows),
        processing_class=Processor(policy),
        callbacks=[recorder],
        **(options or {}),
    )
    trainer.policy = policy
    trainer.train()
    return [logs for logs in recorder.logs if "grad_norm" in logs], trainer


def weights_of(trainer):
    net = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.fixture
def weighed(monkeypatch):
    """Fills with (batch, A, A_hat) whenever a trainer turns one into the other."""
    seen = []
    original = SRPOTrainer.role_aware

    def role_aware(self, batch):
        A_hat = original(self, batch)
        seen.append((batch, batch["advantages"], A_hat))
        return A_hat

    monkeypatch.setattr(SRPOTrainer, "role_aware", role_aware)
    return seen


CONFIGS = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "beta": 0.1},
    {
        "loss_type": "dapo",
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": G,
    },
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "sapo"},
    {"loss_type": "vespo"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=[config["loss_type"] for config in CONFIGS])
def test_lambda_0_is_grpo(folder, tmp_path, config):
    lambda_0 = {"lam": 0.0}
    ours, a = trained(ScriptedSRPO, folder, tmp_path / "a", options=lambda_0, config=config)
    theirs, b = trained(ScriptedGRPO, folder, tmp_path / "b", config=config)
    assert [logs["grad_norm"] for logs in ours] == [logs["grad_norm"] for logs in theirs]
    assert theirs[0]["grad_norm"] > 0
    assert torch.equal(weights_of(a), weights_of(b))
    weighted, c = trained(ScriptedSRPO, folder, tmp_path / "c", config=config)
    assert weighted[0]["grad_norm"] != theirs[0]["grad_norm"]
    assert not torch.equal(weights_of(c), weights_of(b))


def test_advantages_are_those_of_srpo_py(folder, tmp_path, weighed):
    """What the trainer hands to the loss is A_hat of step 7, as our own model code computes it."""
    logs, _ = trained(
        ScriptedSRPO, folder, tmp_path, steps=1, options={"weight_options": {"tau": 0.5}}
    )
    batch, A, A_hat = weighed[0]
    ids = batch["completion_ids"]
    mask = batch["completion_mask"].bool()
    policy = model.load(folder)
    policy.forbidden = policy.forbidden[:0]  # TRL samples and scores over the whole vocabulary
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 4)[:2])
    corrupted_prompts = dataclasses.replace(prompts, pixels=trainer_corruption(batch))
    unknown = torch.zeros(ids.shape)
    rollout = model.Rollout(ids, mask, unknown, unknown, torch.arange(2).repeat_interleave(G))
    roles, *logps = scored(policy, prompts, corrupted_prompts, rollout)
    assert (roles == srpo.Role.PERCEPTION).any(1).all()
    assert (roles == srpo.Role.REASONING).any(1).all()
    w = srpo.token_weights(srpo.contrast_scores(*logps, roles), roles, tau=0.5)
    assert A_hat.shape == ids.shape
    assert w.std() > 1e-3
    last = A_hat.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]  # EOS, whose weight is 1
    assert torch.equal(last, A)
    torch.testing.assert_close(A_hat, srpo.role_aware_advantages(A, w), rtol=1e-3, atol=1e-4)
    assert logs[0]["srpo/contrast_perception"] != 0
    assert logs[0]["srpo/weight_reasoning"] > 0


def trainer_corruption(batch):
    """The corrupted pixels of each prompt: one draw for all responses to it."""
    patches_of_image = batch["image_grid_thw"].prod(1).tolist()
    images = batch["pixel_values"].split(patches_of_image)
    copies = [host.corrupt_patches(image, 0.6, seed=0) for image in images]
    for i, (image, copy) in enumerate(zip(images, copies, strict=True)):
        assert torch.equal(copy, copies[i // G * G])
        assert 0 < (copy != image).any(1).float().mean() < 1
    return copies[::G]


@pytest.mark.parametrize(
    "which, rows, bad",
    [
        ("corrupted", [1], math.nan),
        ("blank", [1], -math.inf),
        ("corrupted", list(range(2 * G)), math.nan),
    ],
    ids=["NaN", "-inf", "NaN everywhere"],
)
def test_a_response_that_cannot_be_scored_is_grpo(folder, tmp_path, weighed, which, rows, bad):
    """Step 9: a log-prob that is not finite in one response's counterfactual changes that response
    alone."""

    class Broken(ScriptedSRPO):
        def score(self, batch, completion_mask, pixel_values=None):
            logp = super().score(batch, completion_mask, pixel_values)
            if which == "corrupted":
                is_broken = pixel_values is not None
            else:
                is_broken = not torch.equal(completion_mask, batch["completion_mask"])
            if is_broken:
                logp[rows] = bad
            return logp

    trained(ScriptedSRPO, folder, tmp_path / "a", steps=1)
    logs, trainer = trained(Broken, folder, tmp_path / "b", steps=1)
    (_, A, whole), (_, same, found) = weighed
    grpo = A[:, None].expand(whole.shape)
    broken = torch.zeros(2 * G, dtype=torch.bool)
    broken[rows] = True
    assert torch.equal(A, same)
    assert not torch.equal(whole[1], grpo[1])
    assert torch.equal(found[broken], grpo[broken])
    assert torch.equal(found[~broken], whole[~broken])
    assert found.isfinite().all()
    assert weights_of(trainer).isfinite().all()
    assert logs[0]["grad_norm"] > 0

    assert math.isfinite(logs[0]["srpo/contrast_reasoning"])
    assert math.isfinite(logs[0]["srpo/weight_perception"])
    if len(rows) == 2 * G:
        assert trainer.arrived is False  # NaN is no sign that corrupted pixels arrive
        assert logs[0]["srpo/contrast_perception"] is None
    else:
        assert trainer.arrived is True
        assert math.isfinite(logs[0]["srpo/contrast_perception"])


def test_scores_are_without_dropout_and_training_goes_on_with_it(folder, tmp_path, monkeypatch):
    modes = []

    class Watched(ScriptedSRPO):
        def score(self, batch, completion_mask, pixel_values=None):
            modes.append(self.model.training)
            return super().score(batch, completion_mask, pixel_values)

        def _compute_loss(self, model, inputs):
            modes.append(model.training)
            return super()._compute_loss(model, inputs)

    trained(Watched, folder, tmp_path, steps=1)
    assert modes == [False, False, False, True]


def test_tokens_that_a_tool_wrote_have_no_weight(folder, tmp_path):
    found = []

    class WithTools(ScriptedSRPO):
        def role_aware(self, batch):
            plain = super().role_aware(batch)
            batch["tool_mask"] = batch["completion_mask"].clone()
            batch["tool_mask"][:, 3:6] = 0
            A_hat = super().role_aware(batch)
            used = batch["advantages"] != 0
            A = batch["advantages"][used, None]
            found.append((plain[used] / A, A_hat[used] / A))
            return A_hat

    trained(WithTools, folder, tmp_path, steps=1)
    ((w_without, w),) = found
    assert (w_without[:, 3:6] != 1).any()
    assert torch.allclose(w[:, 3:6], torch.ones(len(w), 3))
    assert torch.allclose(w.mean(dim=1), torch.ones(len(w)))  # the tokens that are trained, too


def test_what_cannot_work_is_refused(folder, tmp_path, monkeypatch):
    sequence = {"importance_sampling_level": "sequence"}
    with pytest.raises(ValueError, match="importance_sampling_level.*cancel"):
        trained(ScriptedSRPO, folder, tmp_path / "a", config=sequence)
    for options in ({"lam": 2}, {"corruption_p": 0}, {"weight_options": {"tau": 0}}):
        with pytest.raises(ValueError):  # before anything is generated
            trained(ScriptedSRPO, folder, tmp_path / "a", options=options)

    def uncorrupted(patches, p, seed):
        return patches

    monkeypatch.setattr(host, "corrupt_patches", uncorrupted)
    with pytest.raises(RuntimeError, match="do not reach the model"):
        trained(ScriptedSRPO, folder, tmp_path / "b")


def test_another_trl_fails_with_one_line():
    method = "GRPOTrainer._get_per_token_logps_and_entropies"
    code = f"import trl; trl.{method} = lambda self, model: 0\nimport trl_srpo"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    said = r"ImportError: trl [\d.]+: (\S+) has changed; trl_srpo.py needs trl==1.16.0"
    assert re.findall(said, done.stderr) == [method]


def test_sampled_responses_without_the_structure_are_grpo(folder, tmp_path):
    """A random model never writes the tags: its real samples fall back to weight 1, step 9."""
    _, a = trained(SRPOTrainer, folder, tmp_path / "a", steps=1)
    theirs, b = trained(GRPOTrainer, folder, tmp_path / "b", steps=1)
    assert torch.equal(weights_of(a), weights_of(b))
    assert theirs[0]["grad_norm"] > 0


def launched(processes, per_device, folder, out):
    """What a run under `accelerate launch` found, which is this file with so many CPU processes."""
    kind = "--cpu"
    if processes > 1:
        kind = "--multi_gpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", kind, "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [__file__, folder, str(out), str(per_device)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    # What was found counts, not the exit code: gloo now and then aborts a process that is done.
    assert (out / "found.json").exists(), done.stderr
    found = json.loads((out / "found.json").read_text())
    assert found["processes"] == processes
    return found


@pytest.mark.parametrize("batch", [G, G // 2], ids=["a group on each", "each group on both"])
def test_two_processes_are_one(folder, tmp_path, batch):
    """Two CPU processes against one process with twice the batch."""
    one = launched(1, 2 * batch, folder, tmp_path / "one")
    two = launched(2, batch, folder, tmp_path / "two")
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert one["grad_norm"][0] > 0
    torch.testing.assert_close(
        torch.tensor(one["weights"]), torch.tensor(two["weights"]), rtol=1e-4, atol=1e-6
    )


# ---------------------------------------------------------------------- the README's blocks, copied


@pytest.fixture(scope="module")
def section():
    """The README's part on other trainers."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return readme[readme.index("## Use it in TRL") :].split("\n## ")[0]


def test_what_the_readme_copies_is_enough(section, tmp_path):
    """The modules can be imported where nothing else of this repository can."""
    for line in re.findall(r"^cp .*$", section, re.MULTILINE):
        copy = line.split(" && ")[0]
        target = copy.split()[-1]
        (tmp_path / target).mkdir(exist_ok=True)
        copy = copy.replace(target, str(tmp_path / target))
        subprocess.run(copy, shell=True, check=True, cwd=ROOT)
        for source in (ROOT / "srpo.py", HERE / "host.py"):
            assert filecmp.cmp(source, tmp_path / target / source.name, shallow=False)
    names = {file.name for file in (tmp_path / "my_project").iterdir()}
    assert names == {"srpo.py", "host.py", "trl_srpo.py", "verl_srpo.py"}
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    for project, module in (("my_project", "trl_srpo"), ("EasyR1", "easyr1_srpo")):
        command = [sys.executable, "-c", f"import {module}"]
        subprocess.run(command, cwd=tmp_path / project, env=env, check=True)


def test_the_readmes_script_trains(section, folder, tmp_path, monkeypatch, capsys):
    lines = []
    for i, example in enumerate(data.DrawnTask("count").train_batch(0, 4)):
        image = str(tmp_path / f"{i}.png")
        example.images[0].save(image)
        lines.append(json.dumps({"image": image, "question": "How many red?", "answer": "1"}))
    (tmp_path / "my.jsonl").write_text("\n".join(lines) + "\n")
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (script,) = [block for block in blocks if "SRPOTrainer" in block]
    assert "Qwen/Qwen2-VL-2B-Instruct" in script

    small = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "max_completion_length": 8,
        "report_to": [],
        "save_strategy": "no",
    }

    def small_config(*args, **kwargs):
        return GRPOConfig(*args, **{**kwargs, **small})

    processor = Processor(model.load(folder))  # the real one needs torchvision

    def load_processor(*_, **__):
        return processor

    monkeypatch.setattr("trl.GRPOConfig", small_config)
    monkeypatch.setattr("trl.trainer.grpo_trainer.AutoProcessor.from_pretrained", load_processor)
    monkeypatch.chdir(tmp_path)
    script = script.replace("Qwen/Qwen2-VL-2B-Instruct", folder)
    exec(compile(script, "README.md", "exec"), {})
    assert "srpo/weight_perception" in capsys.readouterr().out


if __name__ == "__main__":  # one of the processes of `launched`
    folder, out, per_device = sys.argv[1:]
    logs, trainer = trained(ScriptedSRPO, folder, out, batch=int(per_device))
    if trainer.accelerator.is_main_process:
        Path(out).mkdir(exist_ok=True)
        found = {
            "grad_norm": [x["grad_norm"] for x in logs],
            "weights": weights_of(trainer)[::97].tolist(),
            "processes": trainer.accelerator.num_processes,
        }
        (Path(out) / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # without taking the process group down, which can abort the process
