"""Tests of verl_srpo.py against the real verl: its advantages, its loss and its data plane (Ray,
TransferQueue), on CPU.

pip install torch==2.13.0 verl==0.9.1 TransferQueue==0.1.11 cachetools uvicorn fastapi pytest
python -m pytest -q extras/test_verl_srpo.py

verl's actor workers need a GPU: here a stand-in takes the rows from TransferQueue and scores them.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
pytest.importorskip("verl", reason="pip install verl==0.9.1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import host  # noqa: E402
import ray  # noqa: E402
import transfer_queue as tq  # noqa: E402
import verl_srpo  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from test_easyr1_srpo import scored  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import srpo  # noqa: E402

G = 4
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0, 0.0]
STEP = 7


@pytest.fixture(scope="module")
def policy():
    policy = model.build_tiny(seed=0)
    policy.forbidden = policy.forbidden[:0]  # verl scores over the whole vocabulary
    return policy


@pytest.fixture(scope="module")
def case(policy):
    """Two questions, four well-formed responses each; roles, log-probs and A by our own code."""
    examples = data.DrawnTask("count").train_batch(0, 2)
    prompts = policy.encode(examples)
    pixels = [host.corrupt_patches(x, 0.6, seed=STEP) for x in prompts.pixels]
    corrupted_prompts = dataclasses.replace(prompts, pixels=pixels)
    rng = np.random.default_rng(0)
    texts = [data.demonstrate(examples[i // G], 0.3, rng) for i in range(2 * G)]
    which = torch.arange(2).repeat_interleave(G)
    rollout = dataclasses.replace(policy.as_rollout(texts), prompt=which)
    roles, *logps = scored(policy, prompts, corrupted_prompts, rollout)
    return SimpleNamespace(
        prompts=prompts, rollout=rollout, roles=roles, logps=logps, A=grpo(rollout.mask)
    )


def grpo(mask):
    """verl's GRPO advantages, [B, T]."""
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] = torch.tensor(REWARDS)
    index = np.array([str(i // G) for i in range(len(mask))], dtype=object)
    advantages, _ = core_algos.compute_grpo_outcome_advantage(rewards, mask.float(), index)
    return advantages


def test_weights_of_one_are_verls_grpo_and_others_keep_sign_and_total(case):
    A = case.A
    torch.testing.assert_close(A[:, 0], srpo.group_advantages(torch.tensor(REWARDS), G, eps=1e-6))
    of_lambda_0, _, _ = verl_srpo.weigh(A, case.roles, *case.logps, lam=0.0)
    assert torch.equal(of_lambda_0, A)
    A_hat, _, _ = verl_srpo.weigh(A, case.roles, *case.logps)
    assert torch.equal(A_hat.sign(), A.sign())
    assert (A_hat != A).any()
    torch.testing.assert_close(A_hat.sum(1), A.sum(1), rtol=1e-4, atol=1e-4)
    logp, _, logp_blank = case.logps
    with pytest.raises(RuntimeError, match="do not reach the model"):
        verl_srpo.weigh(A, case.roles, logp, logp, logp_blank)


def test_verls_loss_on_the_weighted_advantages_is_ours(case):
    old, _, _ = case.logps
    mask = case.rollout.mask
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=G,
        policy_loss=PolicyLossConfig(),
        ppo_micro_batch_size_per_gpu=1,
    )
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=len(old)
    )
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    now = (old + 0.3 * noise).requires_grad_()
    A_hat, _, _ = verl_srpo.weigh(case.A, case.roles, *case.logps)
    for A in (case.A, A_hat):
        theirs, their_stats = core_algos.compute_policy_loss_vanilla(
            old, now, A, mask.float(), "token-mean", config
        )
        ours, our_stats = srpo.policy_loss(now, old, A, mask)
        torch.testing.assert_close(theirs, ours)
        # verl's dual clip (ratio above 3 with A < 0) is not reached here, so gradients agree too.
        (their_gradient,) = torch.autograd.grad(theirs, now)
        (our_gradient,) = torch.autograd.grad(ours, now)
        assert our_gradient.abs().max() > 0
        torch.testing.assert_close(their_gradient, our_gradient)
        clipped = pytest.approx(our_stats["clip_frac"].item(), abs=1e-6)
        assert their_stats["actor/pg_clipfrac"] == clipped


class Workers:
    """Stands for verl's actor workers: scores the rows in TransferQueue as they are, and puts
    log_probs back.

    `spoiled`: {call: value}, log-probs of response 1 in the call of that number.
    """

    def __init__(self, policy):
        self.net = policy.model
        self.spoiled = {}
        self.calls = 0

    @torch.no_grad()
    def compute_log_prob(self, meta):
        where = {"keys": meta.keys, "partition_id": meta.partition_id}
        fields = ["input_ids", "position_ids", "multi_modal_inputs"]
        rows = tq.kv_batch_get(**where, select_fields=fields)
        found = []
        for i in range(len(meta.keys)):
            ids = verl_srpo.plain(rows["input_ids"][i])
            positions = verl_srpo.plain(rows["position_ids"][i])
            images = verl_srpo.plain(rows["multi_modal_inputs"][i])
            out = self.net.model(
                input_ids=ids[None],
                position_ids=positions[1:, None],
                attention_mask=torch.ones_like(ids)[None],
                pixel_values=images["pixel_values"],
                image_grid_thw=images["image_grid_thw"],
            )
            logits = self.net.lm_head(out.last_hidden_state[0]).float()
            logprobs = (logits / meta.extra_info["temperature"]).log_softmax(1)  # [L, V]
            logp = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
            logp = torch.cat([logp, torch.zeros(1)])  # as verl's: entry t is of token t + 1
            if i == 1 and self.calls in self.spoiled:
                logp[:] = self.spoiled[self.calls]
            found.append({"log_probs": logp})
        self.calls += 1
        tq.kv_batch_put(**where, fields=list_of_dict_to_tensordict(found))
        return meta


@pytest.fixture(scope="module")
def trainer(policy):
    """verl's trainer without what would need a GPU, beside a running data plane."""
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    tq.init()
    trainer = object.__new__(get_trainer_cls("srpo"))
    trainer.tokenizer = policy.tokenizer
    trainer.global_steps = STEP
    algorithm = {
        "use_kl_in_reward": False,
        "adv_estimator": "grpo",
        "norm_adv_by_std_in_grpo": True,
        "gamma": 1.0,
        "lam": 1.0,
    }
    rollout = {"n": G, "temperature": 1.0}
    trainer.config = OmegaConf.create(
        {"algorithm": algorithm, "actor_rollout_ref": {"rollout": rollout}, "trainer": {}}
    )
    yield trainer
    tq.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def batch(case, policy, trainer):
    """The case as verl puts it into TransferQueue: one row a response, without padding."""
    prompts = case.prompts
    rollout = case.rollout
    logp, _, _ = case.logps
    positions = policy._response_positions(prompts, rollout.prompt, rollout.mask)
    rows = []
    for b, i in enumerate(rollout.prompt.tolist()):
        n = int(rollout.mask[b].sum())
        real = prompts.mask[i].bool()
        prompt = prompts.ids[i][real]
        response = rollout.ids[b, :n]
        vision = torch.cat([prompts.positions[:, i][:, real], positions[:, b, :n]], dim=1)
        text = torch.arange(vision.shape[1])[None]
        scores = torch.zeros(n)
        scores[-1] = REWARDS[b]
        rows.append(
            {
                "uid": f"q{i}",
                "prompts": prompt,
                "responses": response,
                "input_ids": torch.cat([prompt, response]),
                "response_mask": torch.ones(n, dtype=torch.long),
                "loss_mask": torch.ones(n, dtype=torch.long),
                "old_log_probs": logp[b, :n],
                "rm_scores": scores,
                "position_ids": torch.cat([text, vision]),
                "multi_modal_inputs": {
                    "pixel_values": prompts.pixels[i],
                    "image_grid_thw": prompts.grids[i],
                },
            }
        )
    return tq.kv_batch_put(
        keys=[f"q{b // G}_{b % G}_0" for b in range(len(rows))],
        partition_id="train",
        fields=list_of_dict_to_tensordict(rows),
        tags=[{}] * len(rows),
    )


def weighed(trainer, batch, workers, **options):
    """The advantages that the trainer leaves in the data plane, one [T_i] a response, and its
    metrics."""
    metrics = {}
    trainer.actor_rollout_wg = workers
    trainer.config.trainer.srpo = options
    trainer._compute_advantage(batch, metrics)
    found = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"])
    return list(found["advantages"].unbind()), metrics


def test_the_trainer_end_to_end_over_transfer_queue(case, policy, trainer, batch):
    found, metrics = weighed(trainer, batch, Workers(policy), tau=0.5)
    delta = srpo.contrast_scores(*case.logps, case.roles)
    w = srpo.token_weights(delta, case.roles, tau=0.5)
    assert w.std() > 0.01
    assert metrics["srpo/weight_std"] > 0
    for got, wanted in zip(found, srpo.role_aware_advantages(case.A, w), strict=True):
        torch.testing.assert_close(got, wanted[: len(got)], rtol=1e-3, atol=1e-4)
    assert tq.kv_list("srpo").get("srpo", {}) == {}  # nothing is left behind


def test_lambda_0_is_grpo(case, policy, trainer, batch):
    found, metrics = weighed(trainer, batch, Workers(policy), lam=0.0)
    for got, A in zip(found, case.A, strict=True):
        assert torch.equal(got, A[: len(got)])
    assert metrics["srpo/weight_std"] == 0


def test_the_blank_has_the_perception_cut_out_and_its_images_whole(case, policy, trainer, batch):
    """What the workers get: the second call lacks the perception, and nothing else changed."""
    calls = []

    class Watched(Workers):
        def compute_log_prob(self, meta):
            where = {"keys": meta.keys, "partition_id": meta.partition_id}
            rows = tq.kv_batch_get(**where, select_fields=list(verl_srpo.FIELDS))
            calls.append(
                [
                    {name: verl_srpo.plain(rows[name][i]) for name in verl_srpo.FIELDS}
                    for i in range(len(meta.keys))
                ]
            )
            return super().compute_log_prob(meta)

    weighed(trainer, batch, Watched(policy))
    corrupted, blank = calls
    for b, i in enumerate(case.rollout.prompt.tolist()):
        response = case.rollout.ids[b][case.rollout.mask[b]]
        assert torch.equal(corrupted[b]["responses"], response)
        pixels = case.prompts.pixels[i]
        assert not torch.equal(corrupted[b]["multi_modal_inputs"]["pixel_values"], pixels)
        assert torch.equal(blank[b]["multi_modal_inputs"]["pixel_values"], pixels)
        text = policy.tokenizer.decode(blank[b]["responses"])
        whole = policy.tokenizer.decode(response)
        assert text == re.sub("(<perception>).*(</perception>)", r"\1\2", whole)
        assert blank[b]["input_ids"].tolist()[-len(blank[b]["responses"]) :] == (
            blank[b]["responses"].tolist()
        )
        positions = blank[b]["position_ids"][0]
        assert positions.tolist() == list(range(len(positions)))


@pytest.mark.parametrize("call, bad", [(0, math.nan), (1, -math.inf)], ids=["corrupted", "blank"])
def test_a_response_that_cannot_be_scored_is_grpo(case, policy, trainer, batch, call, bad):
    """Step 9: a log-prob that is not finite in one response's counterfactual changes that response
    alone."""
    broken = Workers(policy)
    broken.spoiled[call] = bad
    whole, _ = weighed(trainer, batch, Workers(policy))
    found, metrics = weighed(trainer, batch, broken)
    assert broken.calls == 2
    assert math.isfinite(metrics["srpo/weight_std"])
    A = case.A[1, : len(found[1])]
    assert not torch.equal(whole[1], A)
    assert torch.equal(found[1], A)
    for row, (got, wanted) in enumerate(zip(found, whole, strict=True)):
        assert got.isfinite().all()
        if row != 1:
            assert torch.equal(got, wanted)


def test_log_probs_of_two_engines_are_refused(trainer, batch, monkeypatch):
    correction = {"bypass_mode": True}
    monkeypatch.setitem(trainer.config.algorithm, "rollout_correction", correction)
    with pytest.raises(ValueError, match="bypass_mode=False"):
        trainer._compute_advantage(batch, {})


def test_verl_finds_the_trainer_by_its_name():
    code = "from verl.trainer.ppo.v1 import get_trainer_cls\n"
    code += "print(get_trainer_cls('srpo').__module__)"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_srpo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["verl_srpo"], done.stderr[-2000:]


def test_verl_takes_the_readmes_options():
    """Every option of the README's command exists in verl's own configuration."""
    from hydra import compose, initialize_config_module

    readme = (HERE / "README.md").read_text(encoding="utf-8")
    command = re.search(r"python -m verl\.trainer\.main_ppo \\\n(.*?)```", readme, re.DOTALL)[1]
    overrides = command.replace("\\\n", " ").split()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert config.trainer.use_v1
    assert config.trainer.v1.trainer_mode == "srpo"
    assert config.trainer.srpo.lam == 1.0
    assert config.actor_rollout_ref.rollout.n == 8
    assert config.algorithm.rollout_correction.bypass_mode is False
