"""Tests of verl_srpo.py against the real verl, its advantage and loss functions and its data plane (Ray, TransferQueue), on CPU.

    pip install torch==2.13.0 verl==0.9.1 "TransferQueue>=0.1.10" cachetools pytest
    python -m pytest -q extras/test_verl_srpo.py

verl's actor workers need a GPU: here a stand-in takes the rows from TransferQueue and scores them.
"""

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
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

import data  # noqa: E402
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
    """Two questions, four well-formed responses each, and their log-probs by our own code."""
    examples = data.DrawnTask("count").train_batch(0, 2)
    prompts = policy.encode(examples)
    prompts.corrupted = [srpo.corrupt_patches(x, 0.6, seed=7) for x in prompts.pixels]
    rng = np.random.default_rng(0)
    texts = [data.demonstrate(examples[i // G], 0.3, rng) for i in range(2 * G)]
    rollout = policy.as_rollout(texts)
    rollout.prompt = torch.arange(2).repeat_interleave(G)
    roles = torch.zeros_like(rollout.ids)
    for row, (text, offsets) in enumerate(policy.decode(rollout)):
        roles[row, : len(offsets)] = srpo.token_roles(text, offsets)
    with torch.no_grad():
        logp, _ = policy.log_probs(prompts, rollout, temperature=1.0)
        corrupted, _ = policy.log_probs(prompts, rollout, temperature=1.0, corrupted=True, wanted=roles == 1)
        visible = srpo.without_perception(rollout.mask, roles)
        blank, _ = policy.log_probs(prompts, rollout, temperature=1.0, visible=visible, wanted=roles == 2)
    return prompts, rollout, roles, logp, corrupted, blank


def grpo(mask):
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] = torch.tensor(REWARDS)
    index = np.array([str(i // G) for i in range(len(mask))], dtype=object)
    return core_algos.compute_grpo_outcome_advantage(rewards, mask.float(), index)[0]


def test_weights_of_one_are_verls_grpo_and_others_keep_sign_and_total(case):
    _, rollout, roles, logp, corrupted, blank = case
    A = grpo(rollout.mask)
    torch.testing.assert_close(A[:, 0], srpo.group_advantages(torch.tensor(REWARDS), G, eps=1e-6))
    assert torch.equal(verl_srpo.role_aware(A, roles, logp, corrupted, blank, lam=0.0), A)
    A_hat = verl_srpo.role_aware(A, roles, logp, corrupted, blank)
    assert torch.equal(A_hat.sign(), A.sign()) and (A_hat != A).any()
    torch.testing.assert_close(A_hat.sum(1), A.sum(1), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="do not reach the model"):
        verl_srpo.role_aware(A, roles, logp, logp, blank)


def test_verls_loss_on_the_weighted_advantages_is_ours(case):
    _, rollout, roles, logp, corrupted, blank = case
    config = ActorConfig(strategy="fsdp", rollout_n=G, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig())
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(rollout.mask.sum()), global_batch_size=len(logp))
    now = (logp + 0.3 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    for A in (grpo(rollout.mask), verl_srpo.role_aware(grpo(rollout.mask), roles, logp, corrupted, blank)):
        theirs, stats = core_algos.compute_policy_loss_vanilla(logp, now, A, rollout.mask.float(), "token-mean", config)
        loss, ours = srpo.policy_loss(now, logp, A, rollout.mask)
        torch.testing.assert_close(theirs, loss)
        # verl's dual clip (ratio above 3 with A < 0) is not reached here, so gradients agree too
        for a, b in zip(torch.autograd.grad(theirs, now), torch.autograd.grad(loss, now), strict=True):
            torch.testing.assert_close(a, b)
        assert stats["actor/pg_clipfrac"] == pytest.approx(ours["clip_frac"].item(), abs=1e-6)


def test_roles_stay_in_place_around_special_tokens(policy):
    ids = policy.as_rollout(["<perception> a1 red circle</perception><reasoning> a1 red so 1</reasoning><answer> 1</answer>"]).ids[0]
    (plain,), (mixed,) = ([*verl_srpo.roles_of([x], policy.tokenizer)] for x in (ids, torch.cat([ids[:2], ids[-1:], ids[2:]])))
    assert plain.unique().tolist() == [0, 1, 2] and torch.equal(mixed, torch.cat([plain[:2], torch.tensor([0]), plain[2:]]))


class Workers:
    """Stands for verl's actor workers: takes rows from TransferQueue as they are, scores them, puts log_probs back."""

    def __init__(self, policy):
        self.net = policy.model

    @torch.no_grad()
    def compute_log_prob(self, meta):
        rows = tq.kv_batch_get(
            keys=meta.keys, partition_id=meta.partition_id, select_fields=["input_ids", "position_ids", "multi_modal_inputs"]
        )
        found = []
        for i in range(len(meta.keys)):
            ids, positions, images = (verl_srpo.plain(rows[name][i]) for name in ("input_ids", "position_ids", "multi_modal_inputs"))
            hidden = self.net.model(
                input_ids=ids[None],
                position_ids=positions[1:, None],
                attention_mask=torch.ones_like(ids)[None],
                pixel_values=images["pixel_values"],
                image_grid_thw=images["image_grid_thw"],
            ).last_hidden_state[0]
            logp = (self.net.lm_head(hidden).float() / meta.extra_info["temperature"]).log_softmax(1)
            found.append({"log_probs": torch.cat([logp[:-1].gather(1, ids[1:, None])[:, 0], torch.zeros(1)])})
        tq.kv_batch_put(keys=meta.keys, partition_id=meta.partition_id, fields=list_of_dict_to_tensordict(found))
        return meta


def test_the_trainer_end_to_end_over_transfer_queue(case, policy):
    prompts, rollout, roles, logp, corrupted, blank = case
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    tq.init()
    try:
        rows, keys = [], [f"q{b // G}_{b % G}_0" for b in range(len(logp))]
        for b in range(len(logp)):
            n, i = int(rollout.mask[b].sum()), b // G
            real = prompts.mask[i].bool()
            asked, said = prompts.ids[i][real], rollout.ids[b, :n]
            vision = torch.cat([prompts.positions[:, i][:, real], policy._positions(prompts, rollout.prompt[b : b + 1], rollout.mask[b : b + 1])[:, 0, :n]], 1)
            whole = torch.cat([asked, said])
            rewards = torch.zeros(n)
            rewards[-1] = REWARDS[b]
            rows.append({
                "uid": f"q{i}", "prompts": asked, "responses": said, "response_mask": torch.ones(n, dtype=torch.long),
                "loss_mask": torch.ones(n, dtype=torch.long), "input_ids": whole, "rm_scores": rewards, "old_log_probs": logp[b, :n],
                "position_ids": torch.cat([torch.arange(len(whole))[None], vision]),
                "multi_modal_inputs": {"pixel_values": prompts.pixels[i], "image_grid_thw": prompts.grids[i]},
            })  # fmt: skip
        batch = tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows), tags=[{}] * len(rows))
        trainer = object.__new__(get_trainer_cls("srpo"))
        trainer.config = OmegaConf.create({
            "algorithm": {"use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True},
            "actor_rollout_ref": {"rollout": {"n": G, "temperature": 1.0}}, "trainer": {"srpo": {"tau": 0.5}},
        })  # fmt: skip
        trainer.tokenizer, trainer.global_steps, trainer.actor_rollout_wg = policy.tokenizer, 7, Workers(policy)
        metrics = {}
        batch = trainer._compute_advantage(batch, metrics)
        found = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["advantages"])["advantages"]
        w = srpo.token_weights(srpo.contrast_scores(logp, corrupted, blank, roles), roles, tau=0.5)
        wanted = srpo.role_aware_advantages(grpo(rollout.mask), w)
        assert w.std() > 0.01 and metrics["srpo/weight_std"] > 0
        for b, got in enumerate(found.unbind()):
            torch.testing.assert_close(got, wanted[b, : len(got)], rtol=1e-3, atol=1e-4)
        assert tq.kv_list("srpo").get("srpo", {}) == {}  # nothing is left behind
        trainer.config.trainer.srpo = {"lam": 0.0}  # GRPO, exactly
        trainer._compute_advantage(batch, metrics)
        found = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["advantages"])["advantages"]
        assert all(torch.equal(got, a[: len(got)]) for got, a in zip(found.unbind(), grpo(rollout.mask), strict=True))
        assert metrics["srpo/weight_std"] == 0
        trainer.config.algorithm.rollout_correction = {"bypass_mode": True}
        with pytest.raises(ValueError, match="bypass_mode=False"):
            trainer._compute_advantage(batch, metrics)
    finally:
        tq.close()
        ray.shutdown()


def test_verl_finds_the_trainer_by_its_name():
    code = "from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('srpo').__module__)"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_srpo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["verl_srpo"], done.stderr[-2000:]


def test_verl_takes_the_readmes_options():
    """Every option of the README's command exists in verl's own configuration."""
    from hydra import compose, initialize_config_module

    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    command = re.search(r"python -m verl\.trainer\.main_ppo \\\n(.*?)```", readme, re.DOTALL)[1]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=command.replace("\\\n", " ").split())
    assert config.trainer.use_v1 and config.trainer.v1.trainer_mode == "srpo" and config.trainer.srpo.lam == 1.0
    assert config.actor_rollout_ref.rollout.n == 8 and config.algorithm.rollout_correction.bypass_mode is False
