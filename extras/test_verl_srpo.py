"""Tests of verl_srpo.py against the real verl, its advantage and loss functions and its data plane (Ray,
TransferQueue), on CPU.

pip install torch==2.13.0 verl==0.9.1 "TransferQueue>=0.1.10" cachetools uvicorn fastapi pytest
python -m pytest -q extras/test_verl_srpo.py

verl's actor workers need a GPU: here a stand-in takes the rows from TransferQueue and scores them.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
pytest.importorskip("verl", reason="pip install verl==0.9.1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

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
import host  # noqa: E402
import model  # noqa: E402
import srpo  # noqa: E402

G = 4
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def policy():
    policy = model.build_tiny(seed=0)
    policy.forbidden = policy.forbidden[:0]  # verl scores over the whole vocabulary
    return policy


@pytest.fixture(scope="module")
def case(policy):
    """Two questions, four well-formed responses each, and their roles and log-probs by our own code."""
    examples = data.DrawnTask("count").train_batch(0, 2)
    prompts = policy.encode(examples)
    prompts.corrupted = [host.corrupt_patches(x, 0.6, seed=7) for x in prompts.pixels]
    rng = np.random.default_rng(0)
    rollout = policy.as_rollout([data.demonstrate(examples[i // G], 0.3, rng) for i in range(2 * G)])
    rollout.prompt = torch.arange(2).repeat_interleave(G)
    return prompts, rollout, *scored(policy, prompts, rollout)


def grpo(mask):
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] = torch.tensor(REWARDS)
    index = np.array([str(i // G) for i in range(len(mask))], dtype=object)
    return core_algos.compute_grpo_outcome_advantage(rewards, mask.float(), index)[0]


def test_weights_of_one_are_verls_grpo_and_others_keep_sign_and_total(case):
    _, rollout, roles, logp, corrupted, blank = case
    A = grpo(rollout.mask)
    torch.testing.assert_close(A[:, 0], srpo.group_advantages(torch.tensor(REWARDS), G, eps=1e-6))
    assert torch.equal(verl_srpo.weigh(A, roles, logp, corrupted, blank, lam=0.0)[0], A)
    A_hat, _, _ = verl_srpo.weigh(A, roles, logp, corrupted, blank)
    assert torch.equal(A_hat.sign(), A.sign()) and (A_hat != A).any()
    torch.testing.assert_close(A_hat.sum(1), A.sum(1), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="do not reach the model"):
        verl_srpo.weigh(A, roles, logp, logp, blank)


def test_verls_loss_on_the_weighted_advantages_is_ours(case):
    _, rollout, roles, logp, corrupted, blank = case
    mask, tokens = rollout.mask.float(), int(rollout.mask.sum())
    own = {"policy_loss": PolicyLossConfig(), "ppo_micro_batch_size_per_gpu": 1}
    config = ActorConfig(strategy="fsdp", rollout_n=G, **own)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens, global_batch_size=len(logp))
    now = (logp + 0.3 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    A_hat, _, _ = verl_srpo.weigh(grpo(rollout.mask), roles, logp, corrupted, blank)
    for A in (grpo(rollout.mask), A_hat):
        theirs, stats = core_algos.compute_policy_loss_vanilla(logp, now, A, mask, "token-mean", config)
        loss, ours = srpo.policy_loss(now, logp, A, rollout.mask)
        torch.testing.assert_close(theirs, loss)
        # verl's dual clip (ratio above 3 with A < 0) is not reached here, so gradients agree too
        for a, b in zip(torch.autograd.grad(theirs, now), torch.autograd.grad(loss, now), strict=True):
            torch.testing.assert_close(a, b)
        assert stats["actor/pg_clipfrac"] == pytest.approx(ours["clip_frac"].item(), abs=1e-6)


class Workers:
    """Stands for verl's actor workers: scores the rows in TransferQueue as they are, and puts log_probs back.

    `spoiled`: {call: value}, log-probs of response 1 in the call of that number.
    """

    def __init__(self, policy):
        self.net, self.spoiled, self.calls = policy.model, {}, 0

    @torch.no_grad()
    def compute_log_prob(self, meta):
        where = {"keys": meta.keys, "partition_id": meta.partition_id}
        fields = ["input_ids", "position_ids", "multi_modal_inputs"]
        rows, found = tq.kv_batch_get(**where, select_fields=fields), []
        for i in range(len(meta.keys)):
            ids, positions, images = (verl_srpo.plain(rows[name][i]) for name in fields)
            hidden = self.net.model(
                input_ids=ids[None],
                position_ids=positions[1:, None],
                attention_mask=torch.ones_like(ids)[None],
                pixel_values=images["pixel_values"],
                image_grid_thw=images["image_grid_thw"],
            ).last_hidden_state[0]
            logp = (self.net.lm_head(hidden).float() / meta.extra_info["temperature"]).log_softmax(1)
            logp = torch.cat([logp[:-1].gather(1, ids[1:, None])[:, 0], torch.zeros(1)])
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
    trainer.tokenizer, trainer.global_steps = policy.tokenizer, 7
    algorithm = {"use_kl_in_reward": False, "adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True}
    trainer.config = OmegaConf.create(
        {
            "algorithm": algorithm | {"gamma": 1.0, "lam": 1.0},
            "actor_rollout_ref": {"rollout": {"n": G, "temperature": 1.0}},
            "trainer": {},
        }
    )
    yield trainer
    tq.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def batch(case, policy, trainer):
    """The case as verl puts it into TransferQueue: one row a response, without padding."""
    prompts, rollout, _, logp, *_ = case
    positions = policy._positions(prompts, rollout.prompt, rollout.mask)
    rows = []
    for b, i in enumerate(rollout.prompt.tolist()):
        n, real = int(rollout.mask[b].sum()), prompts.mask[i].bool()
        asked, said, ones = prompts.ids[i][real], rollout.ids[b, :n], torch.ones(n, dtype=torch.long)
        vision = torch.cat([prompts.positions[:, i][:, real], positions[:, b, :n]], 1)
        row = {"uid": f"q{i}", "prompts": asked, "responses": said, "input_ids": torch.cat([asked, said])}
        row |= {"response_mask": ones, "loss_mask": ones, "old_log_probs": logp[b, :n]}
        row["rm_scores"] = torch.zeros(n)
        row["rm_scores"][-1] = REWARDS[b]
        row["position_ids"] = torch.cat([torch.arange(vision.shape[1])[None], vision])
        row["multi_modal_inputs"] = {"pixel_values": prompts.pixels[i], "image_grid_thw": prompts.grids[i]}
        rows.append(row)
    keys = [f"q{b // G}_{b % G}_0" for b in range(len(rows))]
    fields = list_of_dict_to_tensordict(rows)
    return tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{}] * len(rows))


def weighed(trainer, batch, workers, **options):
    """The advantages that the trainer leaves in the data plane, one [T_i] a response, and its metrics."""
    trainer.actor_rollout_wg, metrics = workers, {}
    trainer.config.trainer.srpo = options
    trainer._compute_advantage(batch, metrics)
    found = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"])
    return list(found["advantages"].unbind()), metrics


def test_the_trainer_end_to_end_over_transfer_queue(case, policy, trainer, batch):
    _, rollout, roles, logp, corrupted, blank = case
    found, metrics = weighed(trainer, batch, Workers(policy), tau=0.5)
    w = srpo.token_weights(srpo.contrast_scores(logp, corrupted, blank, roles), roles, tau=0.5)
    wanted = srpo.role_aware_advantages(grpo(rollout.mask), w)
    assert w.std() > 0.01 and metrics["srpo/weight_std"] > 0
    for got, row in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, row[: len(got)], rtol=1e-3, atol=1e-4)
    assert tq.kv_list("srpo").get("srpo", {}) == {}  # nothing is left behind
    found, metrics = weighed(trainer, batch, Workers(policy), lam=0.0)  # GRPO, exactly
    assert all(torch.equal(got, A[: len(got)]) for got, A in zip(found, grpo(rollout.mask), strict=True))
    assert metrics["srpo/weight_std"] == 0


@pytest.mark.parametrize("call, bad", [(0, math.nan), (1, -math.inf)], ids=["corrupted", "blank"])
def test_a_response_that_cannot_be_scored_is_grpo(case, policy, trainer, batch, call, bad):
    """Step 9: a log-prob that is not finite in one response's counterfactual changes that response alone."""
    broken = Workers(policy)
    broken.spoiled[call] = bad
    whole, _ = weighed(trainer, batch, Workers(policy))
    found, metrics = weighed(trainer, batch, broken)
    assert broken.calls == 2 and math.isfinite(metrics["srpo/weight_std"])
    A = grpo(case[1].mask)[1, : len(found[1])]
    assert not torch.equal(whole[1], A) and torch.equal(found[1], A)
    for row, (got, wanted) in enumerate(zip(found, whole, strict=True)):
        assert got.isfinite().all() and (row == 1 or torch.equal(got, wanted))


def test_log_probs_of_two_engines_are_refused(trainer, batch, monkeypatch):
    monkeypatch.setitem(trainer.config.algorithm, "rollout_correction", {"bypass_mode": True})
    with pytest.raises(ValueError, match="bypass_mode=False"):
        trainer._compute_advantage(batch, {})


def test_verl_finds_the_trainer_by_its_name():
    code = "from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('srpo').__module__)"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_srpo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["verl_srpo"], done.stderr[-2000:]


def test_verl_takes_the_readmes_options():
    """Every option of the README's command exists in verl's own configuration."""
    from hydra import compose, initialize_config_module

    readme = (HERE / "README.md").read_text(encoding="utf-8")
    command = re.search(r"python -m verl\.trainer\.main_ppo \\\n(.*?)```", readme, re.DOTALL)[1]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=command.replace("\\\n", " ").split())
    assert config.trainer.use_v1 and config.trainer.v1.trainer_mode == "srpo"
    assert config.trainer.srpo.lam == 1.0 and config.actor_rollout_ref.rollout.n == 8
    assert config.algorithm.rollout_correction.bypass_mode is False
