"""Tests of trl_srpo.py against the real TRL.

pip install trl==1.16.0 pytest
python -m pytest -q extras/test_trl_srpo.py
"""

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
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bench import processor_for  # noqa: E402
from datasets import Dataset  # noqa: E402
from test_easyr1_srpo import scored  # noqa: E402
from transformers import AutoModelForImageTextToText, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl_srpo import SRPOTrainer  # noqa: E402

import data  # noqa: E402
import host  # noqa: E402
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
    return [len(c[0]["content"]) % 7 / 7 for c in completions]


class Scripted:
    """Instead of sampling, the k-th response to each question is a given text: runs can be compared."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        policy, rows = self.policy, []
        for i in range(len(prompt_ids)):
            k = (self.accelerator.process_index * len(prompt_ids) + i) % num_generations
            color = list(data.COLORS)[k % 4]
            seen = f" a1 {color} circle, b{k % 3 + 1} {color} square"
            text = data.respond(seen, f" a1 {color}" * (k + 1) + f" so {k}", f" {k}")
            rows.append(policy.as_rollout([text]).ids[0].tolist())
        return rows, None


class ScriptedSRPO(Scripted, SRPOTrainer):
    pass


class ScriptedGRPO(Scripted, GRPOTrainer):
    pass


def trained(kind, folder, out, batch=2 * G, steps=2, options=(), config=()):
    """Logs of a short run on four questions, and its trainer."""
    policy = model.load(folder)
    examples = data.DrawnTask("count").train_batch(0, 4)
    rows = [{"prompt": [{"role": "user", "content": e.question}], "image": e.images[0]} for e in examples]
    arguments = {"output_dir": str(out), "per_device_train_batch_size": batch, "max_steps": steps, "seed": 0}
    arguments |= {"num_generations": G, "max_completion_length": 48, "shuffle_dataset": False}
    arguments |= {"learning_rate": 1e-2, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1}
    arguments |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    arguments |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    recorder = Recorder()
    trainer = kind(
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        reward,
        GRPOConfig(**arguments | dict(config)),
        Dataset.from_list(rows),
        processing_class=processor_for(policy),
        callbacks=[recorder],
        **dict(options),
    )
    trainer.policy = policy
    trainer.train()
    return [x for x in recorder.logs if "grad_norm" in x], trainer


def weights_of(trainer):
    net = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.fixture
def weighed(monkeypatch):
    """Fills with (batch, A, A_hat) whenever a trainer turns one into the other."""
    seen, keep = [], SRPOTrainer.role_aware

    def role_aware(self, batch):
        seen.append((batch, batch["advantages"], keep(self, batch)))
        return seen[-1][2]

    monkeypatch.setattr(SRPOTrainer, "role_aware", role_aware)
    return seen


@pytest.mark.parametrize(
    "config",
    [
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
    ],
    ids=lambda c: c["loss_type"],
)
def test_lambda_0_is_grpo(folder, tmp_path, config):
    ours, a = trained(ScriptedSRPO, folder, tmp_path / "a", options={"lam": 0.0}, config=config)
    theirs, b = trained(ScriptedGRPO, folder, tmp_path / "b", config=config)
    assert [x["grad_norm"] for x in ours] == [x["grad_norm"] for x in theirs]
    assert theirs[0]["grad_norm"] > 0 and torch.equal(weights_of(a), weights_of(b))
    weighted, c = trained(ScriptedSRPO, folder, tmp_path / "c", config=config)
    assert weighted[0]["grad_norm"] != theirs[0]["grad_norm"]
    assert not torch.equal(weights_of(c), weights_of(b))


def test_advantages_are_those_of_srpo_py(folder, tmp_path, weighed):
    """What the trainer hands to the loss is A_hat of step 7, computed again here by our own model code."""
    logs, _ = trained(ScriptedSRPO, folder, tmp_path, steps=1)
    batch, A, A_hat = weighed[0]
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    policy = model.load(folder)
    policy.forbidden = policy.forbidden[:0]  # TRL samples and scores over the whole vocabulary
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 4)[:2])
    prompts.corrupted = list(trainer_corruption(batch))
    rollout = model.Rollout(ids, mask, torch.zeros(ids.shape), torch.arange(2).repeat_interleave(G))
    roles, *logps = scored(policy, prompts, rollout)
    assert (roles == srpo.Role.PERCEPTION).any(1).all() and (roles == srpo.Role.REASONING).any(1).all()
    w = srpo.token_weights(srpo.contrast_scores(*logps, roles), roles)
    assert A_hat.shape == ids.shape and w.std() > 1e-3
    last = A_hat.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]  # EOS, whose weight is 1
    assert torch.equal(last, A)
    torch.testing.assert_close(A_hat, srpo.role_aware_advantages(A, w), rtol=1e-3, atol=1e-4)
    assert logs[0]["srpo/contrast_perception"] != 0 and logs[0]["srpo/weight_reasoning"] > 0


def trainer_corruption(batch):
    images = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
    copies = [host.corrupt_patches(image, 0.6, seed=0) for image in images]
    for i in range(0, len(copies), G):  # one draw for the responses to one prompt
        assert all(torch.equal(copies[i], c) for c in copies[i : i + G])
        assert 0 < (copies[i] != images[i]).any(1).float().mean() < 1
    return copies[::G]


@pytest.mark.parametrize(
    "which, rows, bad",
    [
        ("corrupted", [1], math.nan),
        ("blank", [1], -math.inf),
        ("corrupted", range(2 * G), math.nan),
    ],
    ids=["NaN", "-inf", "NaN everywhere"],
)
def test_a_response_that_cannot_be_scored_is_grpo(folder, tmp_path, weighed, which, rows, bad):
    """Step 9: a log-prob that is not finite in one response's counterfactual changes that response alone."""

    class Broken(ScriptedSRPO):
        def score(self, batch, completion_mask, pixel_values=None):
            logp = super().score(batch, completion_mask, pixel_values)
            hidden = not torch.equal(completion_mask, batch["completion_mask"])
            if {"corrupted": pixel_values is not None, "blank": hidden}[which]:
                logp[list(rows)] = bad
            return logp

    trained(ScriptedSRPO, folder, tmp_path / "a", steps=1)
    logs, trainer = trained(Broken, folder, tmp_path / "b", steps=1)
    (_, A, whole), (_, same, found) = weighed
    grpo, broken = A[:, None].expand(whole.shape), torch.zeros(2 * G, dtype=torch.bool)
    broken[list(rows)] = True
    assert torch.equal(A, same) and not torch.equal(whole[1], grpo[1])
    assert torch.equal(found[broken], grpo[broken]) and torch.equal(found[~broken], whole[~broken])
    assert found.isfinite().all() and weights_of(trainer).isfinite().all() and logs[0]["grad_norm"] > 0
    everywhere = len(rows) == 2 * G
    assert trainer.arrived is not everywhere  # NaN is no sign that corrupted pixels arrive
    logged = {name: logs[0][f"srpo/{name}"] for name in ("contrast_reasoning", "weight_perception")}
    assert all(math.isfinite(x) for x in logged.values())
    seen = logs[0]["srpo/contrast_perception"]
    assert seen is None if everywhere else math.isfinite(seen)


def test_what_cannot_work_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="importance_sampling_level.*cancel"):
        trained(ScriptedSRPO, folder, tmp_path / "a", config={"importance_sampling_level": "sequence"})
    monkeypatch.setattr(host, "corrupt_patches", lambda image, p, seed: image)
    with pytest.raises(RuntimeError, match="do not reach the model"):
        trained(ScriptedSRPO, folder, tmp_path / "b")


def test_another_trl_fails_with_one_line():
    code = "import trl; trl.GRPOTrainer._get_per_token_logps_and_entropies = lambda self, model: 0\n"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, "-c", code + "import trl_srpo"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    line = (
        r"ImportError: trl [\d.]+: GRPOTrainer\._get_per_token\w+ has changed; trl_srpo.py needs trl==1.16.0"
    )
    assert re.search(line, done.stderr)


def test_sampled_responses_without_the_structure_are_grpo(folder, tmp_path):
    """A random model never writes the tags: its real samples fall back to weight 1, step 9."""
    _, a = trained(SRPOTrainer, folder, tmp_path / "a", steps=1)
    theirs, b = trained(GRPOTrainer, folder, tmp_path / "b", steps=1)
    assert torch.equal(weights_of(a), weights_of(b)) and theirs[0]["grad_norm"] > 0


@pytest.mark.parametrize("batch", [G, G // 2], ids=["a group on each", "each group on both"])
def test_two_processes_are_one(folder, tmp_path, batch):
    """accelerate launch with two CPU processes against one process with twice the batch."""
    result = {}
    for processes, per_device in ((1, 2 * batch), (2, batch)):
        kind = "--multi_gpu" if processes > 1 else "--cpu"
        launch = f"-m accelerate.commands.launch --num_machines 1 --num_processes {processes} {kind} "
        launch += "--mixed_precision no --dynamo_backend no --main_process_port 0"
        command = [sys.executable, *launch.split(), __file__, folder]
        command += [str(tmp_path / f"{processes}"), str(per_device)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads((tmp_path / f"{processes}" / "found.json").read_text())
        assert found["processes"] == processes
        result[processes] = found
    one, two = result[1], result[2]
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4) and one["grad_norm"][0] > 0
    one, two = torch.tensor(one["weights"]), torch.tensor(two["weights"])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_readmes_blocks_run_on_a_copy(folder, tmp_path, monkeypatch, capsys):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Use it in TRL") :].split("\n## ")[0]
    project = tmp_path / "my_project"
    for line in re.findall(r"^cp .*$", section, re.MULTILINE):
        copy = line.split(" && ")[0]
        target = copy.split()[-1]
        (tmp_path / target).mkdir(exist_ok=True)
        copy = copy.replace(target, str(tmp_path / target))
        subprocess.run(copy, shell=True, check=True, cwd=HERE.parent)
        for source in (HERE.parent / "srpo.py", HERE / "host.py"):
            assert filecmp.cmp(source, tmp_path / target / source.name, shallow=False)
    names = {"srpo.py", "host.py", "trl_srpo.py", "verl_srpo.py"}
    assert {p.name for p in project.iterdir()} == names
    # What was copied is enough: nothing else of this repository can be imported there.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for folder_of, module in (("my_project", "trl_srpo"), ("EasyR1", "easyr1_srpo")):
        subprocess.run(
            [sys.executable, "-c", f"import {module}"], cwd=tmp_path / folder_of, env=env, check=True
        )

    for i in range(4):
        data.DrawnTask("count").train_batch(i, 1)[0].images[0].save(tmp_path / f"{i}.png")
    images = [str(tmp_path / f"{i}.png") for i in range(4)]
    rows = [{"image": image, "question": "How many red?", "answer": "1"} for image in images]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    block = next(b for b in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "SRPOTrainer" in b)
    assert "Qwen/Qwen2-VL-2B-Instruct" in block
    small = {"use_cpu": True, "bf16": False, "max_steps": 1, "max_completion_length": 8}
    small |= {"report_to": [], "save_strategy": "no"}
    monkeypatch.setattr("trl.GRPOConfig", lambda *a, **k: GRPOConfig(*a, **k | small))
    processor = processor_for(model.load(folder))  # the real one needs torchvision
    load = "trl.trainer.grpo_trainer.AutoProcessor.from_pretrained"
    monkeypatch.setattr(load, lambda *_, **__: processor)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("Qwen/Qwen2-VL-2B-Instruct", folder), "README.md", "exec"), {})
    assert "srpo/weight_perception" in capsys.readouterr().out


if __name__ == "__main__":  # one of the processes of test_two_processes_are_one
    folder, out, per_device = sys.argv[1:]
    logs, trainer = trained(ScriptedSRPO, folder, out, batch=int(per_device))
    if trainer.accelerator.is_main_process:
        Path(out).mkdir(exist_ok=True)
        found = {"grad_norm": [x["grad_norm"] for x in logs], "weights": weights_of(trainer)[::97].tolist()}
        found["processes"] = trainer.accelerator.num_processes
        (Path(out) / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()  # a process that ends before the others have can be aborted
    trainer.accelerator.end_training()
