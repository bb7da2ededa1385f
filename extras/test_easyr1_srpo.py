"""Tests of host.py, and of easyr1_srpo.py on stand-ins: a batch with EasyR1's fields, and a worker
that keeps pixels by uid, as its workers do."""

import copy
import dataclasses
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
TEXT = (
    "<perception> a1 red circle</perception><reasoning> a1 red so 1</reasoning><answer> 1</answer>"
)


def scored(policy, prompts, corrupted_prompts, rollout):
    """Roles and the three log-probs, each [B, T], by this project's own model code."""
    roles = torch.zeros_like(rollout.ids)
    for row, (text, offsets) in enumerate(policy.decode(rollout)):
        roles[row, : len(offsets)] = srpo.token_roles(text, offsets)
    visible = srpo.without_perception(rollout.mask, roles)
    with torch.no_grad():
        logp = policy.log_probs(prompts, rollout, temperature=1.0)
        logp_corrupted = policy.log_probs(corrupted_prompts, rollout, temperature=1.0)
        logp_blank = policy.log_probs(prompts, rollout, temperature=1.0, visible=visible)
    return roles, logp, logp_corrupted, logp_blank


# ----------------------------------------------------------------------------------------- host.py


@pytest.fixture(scope="module")
def policy():
    return model.build_tiny(seed=0)


def test_roles_stay_in_place_around_special_tokens(policy):
    ids = policy.as_rollout([TEXT]).ids[0]
    eos = ids[-1:]
    at_the_end = torch.cat([ids, eos])
    in_between = torch.cat([ids[:2], eos, ids[2:]])
    rows = torch.stack([at_the_end, in_between, in_between])
    mask = torch.ones_like(rows)
    mask[0, -1] = 0
    plain, around, unseen = host.roles_of(rows, mask, [True, True, False], policy.tokenizer)
    assert plain.unique().tolist() == [0, 1, 2]
    assert torch.equal(around, torch.cat([plain[:2], torch.tensor([0]), plain[2:-1]]))
    assert not unseen.any()  # without an image, step 9
    other = srpo.Tags(perception="see")
    assert not host.roles_of(rows, mask, [True] * 3, policy.tokenizer, other).any()


def test_an_id_beyond_the_tokenizer_has_no_text(policy):
    ids = policy.as_rollout([TEXT]).ids
    beyond = torch.full((1, 1), len(policy.tokenizer) + 5)
    with_beyond = torch.cat([ids[:, :4], beyond, ids[:, 4:]], dim=1)
    roles = host.roles_of(ids, torch.ones_like(ids), [True], policy.tokenizer)[0]
    around = host.roles_of(with_beyond, torch.ones_like(with_beyond), [True], policy.tokenizer)[0]
    assert roles.unique().tolist() == [0, 1, 2]
    assert torch.equal(around, torch.cat([roles[:4], torch.tensor([0]), roles[4:]]))


def test_only_a_finite_contrast_tells_whether_corrupted_pixels_arrive():
    roles = torch.tensor([[1, 1, 2], [1, 1, 2]])
    A = torch.tensor([1.0, -1.0])
    same = torch.zeros(2, 3)
    unlike = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    spoiled = torch.tensor([[math.nan, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    lost = torch.full((2, 3), math.nan)
    A_hat, _, _ = host.weigh(A, roles, same, unlike, same)
    assert (A_hat[0] != 1).any()
    for nothing in (same, spoiled):
        with pytest.raises(RuntimeError, match="do not reach the model"):
            host.weigh(A, roles, same, nothing, same)
    for logp_corrupted, arrived in ((same, True), (spoiled, True), (lost, False)):
        A_hat, w, _ = host.weigh(A, roles, same, logp_corrupted, same, arrived=arrived)
        assert torch.equal(A_hat, A[:, None].expand(2, 3))
        assert torch.equal(w, torch.ones(2, 3))
    no_roles = torch.zeros(2, 3, dtype=torch.long)
    _, w, _ = host.weigh(A, no_roles, same, same, same)
    assert torch.equal(w, torch.ones(2, 3))


def test_corrupted_patches_are_a_share_in_the_mean_color():
    image = torch.rand(20, 3 * 2 * 16)
    out = host.corrupt_patches(image, 0.6, seed=1)
    changed = (out != image).any(1)
    assert changed.sum() == 12
    assert torch.equal(out[~changed], image[~changed])
    color = image.view(20, 3, -1).mean((0, 2))
    filled = out[changed].view(12, 3, -1)
    torch.testing.assert_close(filled, color[None, :, None].expand(12, 3, 32))
    assert torch.equal(out, host.corrupt_patches(image.clone(), 0.6, seed=1))
    assert not torch.equal(out, host.corrupt_patches(image, 0.6, seed=2))
    assert (host.corrupt_patches(image, 1e-6, seed=1) != image).any(1).sum() == 1  # at least one
    assert (host.corrupt_patches(image, 1.0, seed=1) != image).any(1).all()
    with pytest.raises(ValueError, match="p must lie"):
        host.corrupt_patches(image, 60, seed=1)


def test_images_that_lie_one_after_the_other_are_corrupted_one_by_one():
    first = torch.rand(8, 3 * 2 * 16)
    second = torch.rand(12, 3 * 2 * 16)
    grids = torch.tensor([[1, 2, 4], [1, 4, 3]])
    both = host.corrupt_pixels(torch.cat([first, second]), grids, 0.5, seed=1)
    assert torch.equal(both[:8], host.corrupt_patches(first, 0.5, seed=1))
    assert torch.equal(both[8:], host.corrupt_patches(second, 0.5, seed=1))


# ----------------------------------------------------------------------------------- easyr1_srpo.py


class Batch(dict):
    """Stands for a TensorDict."""

    def clone(self, recurse=True):
        new = Batch(self)
        if recurse:
            for name, x in self.items():
                new[name] = x.clone()
        return new

    def __contains__(self, name):
        raise NotImplementedError("a TensorDict has no `in`")


def processed(policy, images):
    """Pixels and grid of a row's images."""
    fitted = [policy.fit(image) for image in images]
    out = policy.image_processor(images=fitted, do_resize=False, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


class Workers:
    """Scores what it is given, as `compute_log_probs` does, and keeps processed pixels while the
    uids stay the same."""

    def __init__(self, policy):
        self.policy = policy
        self.uid = None

    @torch.no_grad()
    def compute_log_probs(self, batch):
        uid = batch.non_tensor_batch["uid"]
        if self.uid is None or not np.all(self.uid == uid):
            self.uid = uid
            rows = batch.non_tensor_batch["multi_modal_data"]
            found = [processed(self.policy, row["images"]) for row in rows]
            self.pixels = torch.cat([pixels for pixels, _ in found])
            self.grids = torch.cat([grid for _, grid in found])
        b = batch.batch
        responses = b["responses"]  # [B, T]
        T = responses.shape[1]
        out = self.policy.model.model(
            input_ids=b["input_ids"],
            attention_mask=b["attention_mask"],
            position_ids=b["position_ids"].transpose(0, 1)[1:],
            pixel_values=self.pixels,
            image_grid_thw=self.grids,
        )
        states = out.last_hidden_state[:, -T - 1 : -1]  # [B, T, H]
        logprobs = self.policy._log_softmax(states.flatten(0, 1), 1.0)  # [B * T, V]
        logp = logprobs.gather(1, responses.reshape(-1, 1)).view(responses.shape)
        return SimpleNamespace(batch={"old_log_probs": logp})


@pytest.fixture(scope="module")
def case(policy):
    """Two questions, G responses each: as this project has them, and as EasyR1 does."""
    # At a size of 96, some squares of 28 stay and some go.
    examples = data.DrawnTask("count", size=96).train_batch(0, 2)
    prompts = policy.encode(examples)
    rng = np.random.default_rng(0)
    texts = [data.demonstrate(examples[i // G], 0.3, rng) for i in range(2 * G)]
    which = torch.arange(2).repeat_interleave(G)
    rollout = dataclasses.replace(policy.as_rollout(texts), prompt=which)

    mask = torch.cat([prompts.mask[which], rollout.mask.long()], dim=1)  # [B, P + T]
    text_positions = mask.cumsum(dim=1)[None] - 1  # [1, B, P + T]
    of_response = policy._response_positions(prompts, which, rollout.mask)
    vision_positions = torch.cat([prompts.positions[:, which], of_response], dim=2)
    A = torch.tensor([1.0, -0.5, -0.5, 0.0, 1.2, -1.2])[:, None].expand(rollout.ids.shape)
    images = np.empty(2 * G, dtype=object)
    images[:] = [{"images": list(examples[i].images)} for i in which]
    batch = SimpleNamespace(
        batch=Batch(
            input_ids=torch.cat([prompts.ids[which], rollout.ids], dim=1),
            attention_mask=mask,
            responses=rollout.ids,
            response_mask=rollout.mask.long(),
            position_ids=torch.cat([text_positions, vision_positions]).transpose(0, 1),
            advantages=A * rollout.mask,
        ),
        meta_info={"min_pixels": None, "max_pixels": None},
        non_tensor_batch={
            "uid": np.array([f"u{i}" for i in which], dtype=object),
            "multi_modal_data": images,
        },
    )
    workers = Workers(policy)
    batch.batch["old_log_probs"] = workers.compute_log_probs(batch).batch["old_log_probs"]
    return policy, prompts, rollout, batch, workers


def pictures(batch):
    """The first image of every row."""
    return [row["images"][0] for row in batch.non_tensor_batch["multi_modal_data"]]


def test_advantages_are_those_of_srpo_py(case):
    policy, prompts, rollout, batch, workers = case
    before = copy.deepcopy(batch)
    found = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    for name in before.batch:
        assert torch.equal(batch.batch[name], before.batch[name])
    assert (batch.non_tensor_batch["uid"] == before.non_tensor_batch["uid"]).all()
    for image, old in zip(pictures(batch), pictures(before), strict=True):
        assert image.tobytes() == old.tobytes()

    shown = pictures(easyr1_srpo.corrupted(batch, 3, 0.6))
    assert shown[0].tobytes() == shown[G - 1].tobytes()  # one draw for a prompt
    assert shown[0].tobytes() != pictures(before)[0].tobytes()
    pixels = [processed(policy, [shown[n * G]])[0] for n in range(2)]
    corrupted_prompts = dataclasses.replace(prompts, pixels=pixels)
    roles, *logps = scored(policy, prompts, corrupted_prompts, rollout)
    w = srpo.token_weights(srpo.contrast_scores(*logps, roles), roles)
    assert w.std() > 1e-3
    wanted = srpo.role_aware_advantages(batch.batch["advantages"], w)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)

    grpo = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3, lam=0.0)
    assert torch.equal(grpo, batch.batch["advantages"])


def test_weight_options_reach_srpo_py(case):
    policy, _, _, batch, workers = case
    A = batch.batch["advantages"]
    whole = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    sharp = easyr1_srpo.role_aware(
        batch, workers, policy.tokenizer, step=3, tau=0.1, w_min=0.5, w_max=2.0
    )
    assert (sharp - A).abs().max() > 1.5 * (whole - A).abs().max() > 0
    with pytest.raises(TypeError, match="normalize"):
        easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3, normalize=False)


@pytest.mark.parametrize("which, bad", [("corrupted", math.nan), ("blank", -math.inf)])
def test_a_response_that_cannot_be_scored_is_grpo(case, which, bad):
    """Step 9: a log-prob that is not finite in one response's counterfactual changes that response
    alone."""
    policy, _, _, batch, workers = case
    A = batch.batch["advantages"]
    row = 1

    class Broken:
        def compute_log_probs(self, changed):
            scores = workers.compute_log_probs(changed)
            is_corrupted = "corrupted" in changed.non_tensor_batch["uid"][0]
            if is_corrupted == (which == "corrupted"):
                scores.batch["old_log_probs"][row] = bad
            return scores

    whole = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    found = easyr1_srpo.role_aware(batch, Broken(), policy.tokenizer, step=3)
    others = torch.arange(len(A)) != row
    assert not torch.equal(whole[row], A[row])
    assert torch.equal(found[row], A[row])
    assert found.isfinite().all()
    assert torch.equal(found[others], whole[others])


def test_the_trap_of_the_cache_is_seen(case, monkeypatch):
    """Corrupted images under the same uids: the worker takes the clean pixels again, and every
    perception contrast is 0."""
    policy, _, _, batch, workers = case
    corrupted = easyr1_srpo.corrupted

    def careless(batch, step, p):
        same_uids = {"uid": batch.non_tensor_batch["uid"]}
        return easyr1_srpo.changed(corrupted(batch, step, p), {}, same_uids)

    monkeypatch.setattr(easyr1_srpo, "corrupted", careless)
    with pytest.raises(RuntimeError, match="do not reach the model"):
        easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)


def test_squares_of_28_are_masked_anew_in_every_step(case):
    _, _, _, batch, _ = case
    clean = np.asarray(pictures(batch)[0])
    shown = np.asarray(pictures(easyr1_srpo.corrupted(batch, 3, 0.6))[0])
    masked = []
    for y in range(0, 96, 28):
        for x in range(0, 96, 28):
            square = shown[y : y + 28, x : x + 28]
            if not np.array_equal(square, clean[y : y + 28, x : x + 28]):
                masked.append(square)
    assert 0 < len(masked) <= round(0.6 * 16)
    for square in masked:
        assert (square == square[0, 0]).all()
    later = np.asarray(pictures(easyr1_srpo.corrupted(batch, 4, 0.6))[0])
    assert not np.array_equal(later, shown)


@pytest.mark.parametrize("limit", ["max_pixels", "image_max_pixels"])
def test_large_images_are_corrupted_at_the_size_they_are_seen(case, limit):
    _, _, _, batch, _ = case
    limited = copy.copy(batch)
    limited.meta_info = {limit: 48 * 48}
    images = pictures(easyr1_srpo.corrupted(limited, 3, 0.6))
    assert {image.size for image in images} == {(48, 48)}
    assert pictures(batch)[0].size == (96, 96)
    assert easyr1_srpo.resized(images[0], 96 * 96, None).size == (96, 96)


def test_images_may_be_files_bytes_and_dicts(case, tmp_path):
    _, _, _, batch, _ = case
    image = pictures(batch)[0]
    file = tmp_path / "image.png"
    image.save(file)
    for given in (image, file, str(file), file.read_bytes(), {"bytes": file.read_bytes()}):
        assert easyr1_srpo.opened(given).tobytes() == image.tobytes()


def test_renamed_fields_are_named(case):
    policy, _, _, batch, workers = case
    other = copy.copy(batch)
    other.batch = Batch(batch.batch)
    del other.batch["old_log_probs"]
    with pytest.raises(KeyError, match="v0.3.2; this batch lacks old_log_probs"):
        easyr1_srpo.role_aware(other, workers, policy.tokenizer, step=3)


def test_images_under_another_name_are_not_taken_for_none(case):
    policy, _, _, batch, workers = case
    columns = [{"image": data["images"]} for data in batch.non_tensor_batch["multi_modal_data"]]
    other = easyr1_srpo.changed(batch, {}, {"multi_modal_data": columns})
    with pytest.raises(KeyError, match="take v0.3.2"):
        easyr1_srpo.role_aware(other, workers, policy.tokenizer, step=3)


def test_corrupted_images_are_not_resized_again(case):
    _, _, _, batch, _ = case
    meta_info = easyr1_srpo.corrupted(batch, step=3, p=0.6).meta_info
    assert meta_info["min_pixels"] is None
    assert meta_info["max_pixels"] is None


def test_the_readmes_patch_is_the_one_documented(case):
    policy, _, _, batch, workers = case
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    patches = [textwrap.dedent(block) for block in blocks if "easyr1_srpo" in block]
    assert textwrap.indent(patches[0], "    ") in easyr1_srpo.__doc__
    trainer = SimpleNamespace(
        actor_rollout_ref_wg=workers, tokenizer=policy.tokenizer, global_step=3
    )
    mine = easyr1_srpo.changed(batch, {}, {})
    exec(patches[0], {"batch": mine, "self": trainer})
    wanted = easyr1_srpo.role_aware(batch, workers, policy.tokenizer, step=3)
    assert torch.equal(mine.batch["advantages"], wanted)
