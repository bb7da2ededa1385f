"""Tests of host.py, and of easyr1_srpo.py on stand-ins: a batch with EasyR1's fields, and a worker that keeps
pixels by uid, as its workers do."""

import copy
import math
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import easyr1_srpo  # noqa: E402
import host  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import srpo  # noqa: E402

G = 3
TEXT = "<perception> a1 red circle</perception><reasoning> a1 red so 1</reasoning><answer> 1</answer>"


def scored(policy, prompts, rollout):
    """Roles and the three log-probs, each [B, T], by this project's own model code."""
    roles = torch.zeros_like(rollout.ids)
    for row, (text, offsets) in enumerate(policy.decode(rollout)):
        roles[row, : len(offsets)] = srpo.token_roles(text, offsets)
    visible = srpo.without_perception(rollout.mask, roles)
    with torch.no_grad():
        logp, _ = policy.log_probs(prompts, rollout, temperature=1.0)
        corrupted, _ = policy.log_probs(prompts, rollout, temperature=1.0, corrupted=True)
        blank, _ = policy.log_probs(prompts, rollout, temperature=1.0, visible=visible, wanted=roles == 2)
    return roles, logp, corrupted, blank


# ---------------------------------------------------------------------------------------------------- host.py


@pytest.fixture(scope="module")
def policy():
    return model.build_tiny(seed=0)


def test_roles_stay_in_place_around_special_tokens(policy):
    ids = policy.as_rollout([TEXT]).ids[0]
    eos = ids[-1:]
    mixed = torch.cat([ids[:2], eos, ids[2:]])
    rows = torch.stack([torch.cat([ids, eos]), mixed, mixed])
    mask = torch.ones_like(rows)
    mask[0, -1] = 0
    plain, around, unseen = host.roles_of(rows, mask, [True, True, False], policy.tokenizer)
    assert plain.unique().tolist() == [0, 1, 2]
    assert torch.equal(around, torch.cat([plain[:2], torch.tensor([0]), plain[2:-1]]))
    assert not unseen.any()  # without an image, step 9
    other = srpo.Tags(perception="see")
    assert not host.roles_of(rows, mask, [True] * 3, policy.tokenizer, other).any()


def test_only_a_finite_contrast_tells_whether_corrupted_pixels_arrive():
    roles, A = torch.tensor([[1, 1, 2], [1, 1, 2]]), torch.tensor([1.0, -1.0])
    same = torch.zeros(2, 3)
    unlike = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    spoiled = torch.tensor([[math.nan, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    lost = torch.full((2, 3), math.nan)
    assert (host.weigh(A, roles, same, unlike, same)[0][0] != 1).any()
    for nothing in (same, spoiled):
        with pytest.raises(RuntimeError, match="do not reach the model"):
            host.weigh(A, roles, same, nothing, same)
    for logp_corrupted, arrived in ((same, True), (spoiled, True), (lost, False)):
        A_hat, w, _ = host.weigh(A, roles, same, logp_corrupted, same, arrived=arrived)
        assert torch.equal(A_hat, A[:, None].expand(2, 3)) and torch.equal(w, torch.ones(2, 3))
    nobody = torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(host.weigh(A, nobody, same, same, same)[1], torch.ones(2, 3))


def test_corrupted_patches_are_a_share_in_the_mean_color():
    image = torch.rand(20, 3 * 2 * 16)
    out = host.corrupt_patches(image, 0.6, seed=1)
    changed = (out != image).any(1)
    assert changed.sum() == 12 and torch.equal(out[~changed], image[~changed])
    color = image.view(20, 3, -1).mean((0, 2))
    torch.testing.assert_close(out[changed].view(12, 3, -1), color[None, :, None].expand(12, 3, 32))
    assert torch.equal(out, host.corrupt_patches(image.clone(), 0.6, seed=1))
    assert not torch.equal(out, host.corrupt_patches(image, 0.6, seed=2))
    assert torch.equal(host.corrupt_patches(image, 0.0, seed=1), image)
    assert (host.corrupt_patches(image, 1.0, seed=1) != image).any(1).all()
    with pytest.raises(ValueError, match="p must lie"):
        host.corrupt_patches(image, 60, seed=1)


# --------------------------------------------------------------------------------------------- easyr1_srpo.py


class Batch(dict):
    def clone(self, recurse=True):
        return Batch({k: v.clone() if recurse else v for k, v in self.items()})


class Workers:
    """Scores what it is given, as `compute_log_probs` does; processed pixels are kept while the uids stay the
    same."""

    def __init__(self, policy):
        self.policy, self.uid, self.pixels = policy, None, None

    @torch.no_grad()
    def compute_log_probs(self, batch):
        if self.uid is None or not np.all(self.uid == batch.non_tensor_batch["uid"]):
            self.uid = batch.non_tensor_batch["uid"]
            images = [d["images"] for d in batch.non_tensor_batch["multi_modal_data"]]
            found = self.policy._patches([[self.policy.fit(i) for i in row] for row in images])
            self.pixels = list(zip(*found, strict=True))
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
def case(policy):
    examples = data.DrawnTask("count", size=96).train_batch(0, 2)  # 96: some patches of 28 stay, some go
    prompts, rng = policy.encode(examples), np.random.default_rng(0)
    rollout = policy.as_rollout([data.demonstrate(examples[i // G], 0.3, rng) for i in range(2 * G)])
    rollout.prompt = which = torch.arange(2).repeat_interleave(G)
    vision = torch.cat([prompts.positions[:, which], policy._positions(prompts, which, rollout.mask)], 2)
    mask = torch.cat([prompts.mask[which], rollout.mask.long()], 1)
    A = torch.tensor([1.0, -0.5, -0.5, 0.0, 1.2, -1.2])[:, None].expand(rollout.ids.shape)
    column = np.empty(2 * G, dtype=object)
    column[:] = [{"images": list(examples[i].images)} for i in which]
    uid = np.array([f"u{i}" for i in which], dtype=object)
    batch = SimpleNamespace(
        batch=Batch(
            input_ids=torch.cat([prompts.ids[which], rollout.ids], 1),
            attention_mask=mask,
            responses=rollout.ids,
            response_mask=rollout.mask.long(),
            position_ids=torch.cat([mask.cumsum(1)[None] - 1, vision]).transpose(0, 1),
            advantages=A * rollout.mask,
        ),
        meta_info={"min_pixels": None, "max_pixels": None},
        non_tensor_batch={"uid": uid, "multi_modal_data": column},
    )
    workers = Workers(policy)
    batch.batch["old_log_probs"] = workers.compute_log_probs(batch).batch["old_log_probs"]
    return policy, prompts, rollout, batch, workers


def pictures(batch):
    """The first image of every row."""
    return [d["images"][0] for d in batch.non_tensor_batch["multi_modal_data"]]


def test_advantages_are_those_of_srpo_py(case):
    policy, prompts, rollout, batch, workers = case
    before = copy.deepcopy(batch)
    found = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    assert all(torch.equal(batch.batch[k], before.batch[k]) for k in before.batch)
    assert (batch.non_tensor_batch["uid"] == before.non_tensor_batch["uid"]).all()
    shown = pictures(easyr1_srpo.corrupted(batch, 3, 0.6))
    assert shown[0].tobytes() == shown[G - 1].tobytes() != pictures(before)[0].tobytes()
    prompts.corrupted, _ = policy._patches([[policy.fit(shown[n * G])] for n in range(2)])
    roles, *logps = scored(policy, prompts, rollout)
    w = srpo.token_weights(srpo.contrast_scores(*logps, roles), roles)
    assert w.std() > 1e-3
    wanted = srpo.role_aware_advantages(batch.batch["advantages"], w)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    grpo = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3, lam=0.0)
    assert torch.equal(grpo, batch.batch["advantages"])


@pytest.mark.parametrize("which, bad", [("corrupted", math.nan), ("blank", -math.inf)])
def test_a_response_that_cannot_be_scored_is_grpo(case, which, bad):
    """Step 9: a log-prob that is not finite in one response's counterfactual changes that response alone."""
    policy, _, _, batch, workers = case
    A, row = batch.batch["advantages"], 1

    class Broken:
        def compute_log_probs(self, changed):
            scores = workers.compute_log_probs(changed)
            if which == ("corrupted" if "corrupted" in changed.non_tensor_batch["uid"][0] else "blank"):
                scores.batch["old_log_probs"][row] = bad
            return scores

    whole = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    found = easyr1_srpo.role_aware(batch, Broken(), policy.tokenizer, step=3)
    others = torch.arange(len(A)) != row
    assert not torch.equal(whole[row], A[row]) and torch.equal(found[row], A[row])
    assert found.isfinite().all() and torch.equal(found[others], whole[others])


def test_the_trap_of_the_cache_is_seen(case, monkeypatch):
    """Corrupted images under the same uids: the worker takes the clean pixels again, and every image contrast
    is 0."""
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
    images = pictures(easyr1_srpo.corrupted(limited, 3, 0.6))
    assert {i.size for i in images} == {(48, 48)} and pictures(batch)[0].size == (96, 96)
    assert easyr1_srpo.resized(images[0], 96 * 96, None).size == (96, 96)


def test_renamed_fields_are_named(case):
    policy, _, _, batch, workers = case
    other = copy.copy(batch)
    other.batch = Batch({k: v for k, v in batch.batch.items() if k != "old_log_probs"})
    with pytest.raises(KeyError, match="26dfd97; this batch lacks old_log_probs"):
        easyr1_srpo.role_aware(other, workers, policy.tokenizer, step=3)


def test_the_readmes_patch_is_the_one_documented(case):
    policy, _, _, batch, workers = case
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    patch = textwrap.dedent(next(block for block in blocks if "easyr1_srpo" in block))
    assert textwrap.indent(patch, "    ") in easyr1_srpo.__doc__
    trainer = SimpleNamespace(actor_rollout_wg=workers, tokenizer=policy.tokenizer, global_step=3)
    mine = easyr1_srpo.changed(batch, {}, {})
    exec(patch, {"batch": mine, "self": trainer})
    wanted = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    assert torch.equal(mine.batch["advantages"], wanted)
