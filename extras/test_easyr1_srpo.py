"""Tests of easyr1_srpo.py on stand-ins: a batch with EasyR1's fields, and a worker that keeps pixels by uid, as its workers do."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import easyr1_srpo  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import srpo  # noqa: E402

G = 3


class Batch(dict):
    def clone(self, recurse=True):
        return Batch({k: v.clone() if recurse else v for k, v in self.items()})


class Workers:
    """Scores what it is given, as `compute_log_probs` does; processed pixels are kept while the uids stay the same."""

    def __init__(self, policy):
        self.policy, self.uid, self.pixels = policy, None, None

    @torch.no_grad()
    def compute_log_probs(self, batch):
        if self.uid is None or not np.all(self.uid == batch.non_tensor_batch["uid"]):
            self.uid = batch.non_tensor_batch["uid"]
            self.pixels = [self.policy._patches([self.policy.fit(i) for i in d["images"]]) for d in batch.non_tensor_batch["multi_modal_data"]]
        b, T = batch.batch, batch.batch["responses"].shape[1]
        hidden = self.policy.model.model(
            input_ids=b["input_ids"],
            attention_mask=b["attention_mask"],
            position_ids=b["position_ids"].transpose(0, 1)[1:],
            pixel_values=torch.cat([p for p, _ in self.pixels]),
            image_grid_thw=torch.cat([g for _, g in self.pixels]),
        ).last_hidden_state[:, -T - 1 : -1]
        logp = self.policy._log_softmax(hidden.flatten(0, 1), 1.0).view(*b["responses"].shape, -1)
        return SimpleNamespace(batch={"old_log_probs": logp.gather(2, b["responses"][:, :, None])[:, :, 0]})


@pytest.fixture(scope="module")
def case():
    policy = model.build_tiny(seed=0)
    examples = data.DrawnTask("count", size=96).train_batch(0, 2)  # 96: some patches of 28 stay, some go
    prompts, rng = policy.encode(examples), np.random.default_rng(0)
    rollout = policy.as_rollout([data.demonstrate(examples[i // G], 0.3, rng) for i in range(2 * G)])
    rollout.prompt = which = torch.arange(2).repeat_interleave(G)
    vision = torch.cat([prompts.positions[:, which], policy._positions(prompts, which, rollout.mask)], 2)
    mask = torch.cat([prompts.mask[which], rollout.mask.long()], 1)
    column = np.empty(2 * G, dtype=object)
    column[:] = [{"images": list(examples[i].images)} for i in which]
    batch = SimpleNamespace(
        batch=Batch(
            input_ids=torch.cat([prompts.ids[which], rollout.ids], 1), attention_mask=mask, responses=rollout.ids,
            response_mask=rollout.mask.long(), position_ids=torch.cat([mask.cumsum(1)[None] - 1, vision]).transpose(0, 1),
            advantages=torch.tensor([1.0, -0.5, -0.5, 0.0, 1.2, -1.2])[:, None].expand(rollout.ids.shape) * rollout.mask,
        ),
        meta_info={"min_pixels": None, "max_pixels": None},
        non_tensor_batch={"uid": np.array([f"u{i}" for i in which], dtype=object), "multi_modal_data": column},
    )  # fmt: skip
    workers = Workers(policy)
    batch.batch["old_log_probs"] = workers.compute_log_probs(batch).batch["old_log_probs"]
    return policy, prompts, rollout, batch, workers


def test_advantages_are_those_of_srpo_py(case):
    policy, prompts, rollout, batch, workers = case
    before = copy.deepcopy(batch)
    found = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    assert all(torch.equal(batch.batch[k], before.batch[k]) for k in before.batch) and (batch.non_tensor_batch["uid"] == before.non_tensor_batch["uid"]).all()
    pictures = [d["images"] for d in easyr1_srpo.corrupted(batch, 3, 0.6).non_tensor_batch["multi_modal_data"]]
    assert pictures[0][0].tobytes() == pictures[G - 1][0].tobytes() != before.non_tensor_batch["multi_modal_data"][0]["images"][0].tobytes()
    prompts.corrupted = [policy._patches([policy.fit(i) for i in pictures[n * G]])[0] for n in range(2)]
    roles = torch.zeros_like(rollout.ids)
    for row, (text, offsets) in enumerate(policy.decode(rollout)):
        roles[row, : len(offsets)] = srpo.token_roles(text, offsets)
    with torch.no_grad():
        logp, _ = policy.log_probs(prompts, rollout, temperature=1.0)
        corrupted, _ = policy.log_probs(prompts, rollout, temperature=1.0, corrupted=True)
        blank, _ = policy.log_probs(prompts, rollout, temperature=1.0, visible=srpo.without_perception(rollout.mask, roles), wanted=roles == 2)
    w = srpo.token_weights(srpo.contrast_scores(logp, corrupted, blank, roles), roles)
    assert w.std() > 1e-3
    torch.testing.assert_close(found, srpo.role_aware_advantages(batch.batch["advantages"], w), rtol=1e-3, atol=1e-4)
    assert torch.equal(easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3, lam=0.0), batch.batch["advantages"])


def test_the_trap_of_the_cache_is_seen(case, monkeypatch):
    """Corrupted images under the same uids: the worker takes the clean pixels again, and every image contrast is 0."""
    policy, _, _, batch, workers = case
    keep = easyr1_srpo.corrupted

    def careless(batch, step, p):
        return easyr1_srpo.changed(keep(batch, step, p), {}, {"uid": batch.non_tensor_batch["uid"]})

    monkeypatch.setattr(easyr1_srpo, "corrupted", careless)
    with pytest.raises(RuntimeError, match="do not reach the model"):
        easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)


def test_large_images_are_corrupted_at_the_size_they_are_seen(case):
    _, _, _, batch, _ = case
    limited = copy.copy(batch)
    limited.meta_info = {"min_pixels": None, "max_pixels": 48 * 48}
    images = [d["images"][0] for d in easyr1_srpo.corrupted(limited, 3, 0.6).non_tensor_batch["multi_modal_data"]]
    assert {i.size for i in images} == {(48, 48)} and batch.non_tensor_batch["multi_modal_data"][0]["images"][0].size == (96, 96)
    assert easyr1_srpo.resized(images[0], 96 * 96, None).size == (96, 96)


def test_renamed_fields_are_named(case):
    policy, _, _, batch, workers = case
    other = copy.copy(batch)
    other.batch = Batch({k: v for k, v in batch.batch.items() if k != "old_log_probs"})
    with pytest.raises(KeyError, match="26dfd97; this batch lacks old_log_probs"):
        easyr1_srpo.role_aware(other, workers, policy.tokenizer, step=3)


def test_the_readmes_patch_is_the_one_documented():
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    line = next(line.strip() for line in easyr1_srpo.__doc__.splitlines() if "role_aware(batch" in line)
    assert f"from easyr1_srpo import role_aware\n                        {line}\n" in readme
