"""Tests of the policy: tokens and positions, memory, saved weights.

pip install pytest, then python -m pytest -q extras/test_policy.py
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import model  # noqa: E402
from test_srpo import (  # noqa: E402, F401
    demonstrations,
    examples,
    policy,
    prompts,
    rollout,
    same_weights,
)

# ---- tokens and positions


def test_draws_have_the_given_probabilities():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = model.draw(p.expand(20000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    frequency = drawn.flatten().bincount(minlength=6) / 20000
    torch.testing.assert_close(frequency, p, atol=0.015, rtol=0)
    assert (frequency[p == 0] == 0).all()


def test_placeholders_are_never_sampled(policy):  # noqa: F811
    config = policy.model.config
    assert policy.forbidden.tolist() == [config.image_token_id, config.video_token_id]
    probabilities = policy._log_softmax(torch.randn(5, 128), 1.0).exp()
    assert (probabilities[:, policy.forbidden] == 0).all()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(5))


def test_a_placeholder_in_a_question_is_refused(policy):  # noqa: F811
    (example,) = data.DrawnTask("count").train_batch(0, 1)
    example = replace(example, question="see <|image_pad|>", source="rows.jsonl:7")
    with pytest.raises(data.InputError, match="rows.jsonl:7.*image_pad"):
        policy.encode([example])


def test_a_response_that_was_cut_off_lacks_eos(policy, rollout, demonstrations):  # noqa: F811
    assert policy.ended(demonstrations).all()
    last = demonstrations.mask.sum(dim=1) - 1
    cut_off = replace(demonstrations, ids=demonstrations.ids.scatter(1, last[:, None], 0))
    assert not policy.ended(cut_off).any()
    has_eos = torch.isin(rollout.ids * rollout.mask, torch.tensor(policy.eos)).any(dim=1)
    assert torch.equal(policy.ended(rollout), has_eos)


def test_positions_are_those_drawn_in_the_docstring(policy):  # noqa: F811
    drawing = re.findall(r"^    (time|height|width) +(.*)$", model.__doc__, re.MULTILINE)
    image = policy.image_token
    other = policy.tokenizer.convert_tokens_to_ids("red")
    ids = torch.tensor([[other] + [image] * 6 + [other] * 2])
    grid = torch.tensor([[1, 4, 6]])  # patches: 2 rows of 3 visual tokens
    mask = torch.ones_like(ids)
    positions, _ = policy.model.model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == image).int(),
        image_grid_thw=grid,
        attention_mask=mask,
    )
    prompt = model.Prompts(ids, mask, positions, [], [])
    response = torch.ones(1, 2, dtype=torch.long)
    after = policy._response_positions(prompt, torch.tensor([0]), response)
    assert len(drawing) == 3
    for axis, (name, numbers) in enumerate(drawing):
        before_bar, after_bar = numbers.split("|")
        assert positions[axis, 0].tolist() == [int(x) for x in before_bar.split()], name
        assert after[axis, 0].tolist() == [int(x) for x in after_bar.split()], name


# ---- scores


def test_the_entropy_is_that_of_the_policy_at_each_token(policy, prompts, rollout, monkeypatch):  # noqa: F811
    states = []
    score = policy._score

    def recorded(hidden, ids, temperature):
        states.append(hidden)
        return score(hidden, ids, temperature)

    monkeypatch.setattr(policy, "_score", recorded)
    with torch.no_grad():
        policy.log_probs(prompts, rollout, 0.7)
        logprobs = policy._log_softmax(states[0], 0.7)
    allowed = logprobs.isfinite()
    entropy = -(logprobs.exp() * logprobs.masked_fill(~allowed, 0)).sum(dim=1)
    torch.testing.assert_close(rollout.entropy[rollout.mask], entropy, atol=1e-4, rtol=1e-4)


def test_logits_exist_only_for_a_chunk_of_tokens(policy, prompts, rollout, monkeypatch):  # noqa: F811
    sizes = []
    gradients = []

    def record_size(module, inputs, output):
        sizes.append(len(output))

    hook = policy.model.lm_head.register_forward_hook(record_size)
    for chunk in (policy.logit_chunk, 7):
        sizes.clear()
        monkeypatch.setattr(policy, "logit_chunk", chunk)
        policy.model.zero_grad()
        policy.log_probs(prompts, rollout, 1.0).sum().backward()
        weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
        gradients.append(weight.grad.clone())
    hook.remove()
    assert max(sizes) == 7
    assert sum(sizes) == 2 * rollout.mask.sum()  # again in the backward pass
    assert torch.allclose(*gradients, atol=1e-4)


# ---- what is saved


def test_a_saved_folder_restores_every_weight_and_word(policy, tmp_path):  # noqa: F811
    policy.save(tmp_path)
    again = model.load(str(tmp_path))
    example = data.DrawnTask("add").train_batch(0, 1)
    prompt = policy.encode(example)
    same = again.encode(example)
    assert torch.equal(prompt.ids, same.ids)
    assert torch.equal(prompt.pixels[0], same.pixels[0])
    assert same_weights(again, policy)
    assert again.eos == policy.eos
    assert again.instruction == ""
    assert model.is_tiny(str(tmp_path))


def test_a_folder_that_lacks_weights_is_refused(policy, tmp_path):  # noqa: F811
    policy.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = {name.replace("layers.1", "layer.1"): x for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(data.InputError, match="missing"):
        model.load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_float32_masters_which_small_updates_move(tmp_path, dtype):
    """At lr 1e-6 an update is below half an ulp of a bf16 weight: it would be rounded away."""
    saved = model.build_tiny(0)
    saved.model.to(torch.bfloat16)
    saved.save(tmp_path)
    loaded = model.load(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    loaded.model.to(dtype)
    two = loaded.encode(data.DrawnTask("count").train_batch(0, 2))
    written = loaded.as_rollout(["<answer> 1</answer>"] * 2)
    logp = loaded.log_probs(two, written, 1.0)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    weight = loaded.model.model.language_model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    torch.optim.AdamW(loaded.model.parameters(), lr=1e-6, weight_decay=0.0).step()
    changed = (weight != before).float().mean()
    if dtype == torch.float32:
        assert changed > 0.9
    else:
        assert changed < 0.05


def test_a_saved_policy_shows_images_as_training_did(tmp_path):
    its = model.build_tiny(0)
    its.save(tmp_path)
    small = model.load(str(tmp_path), max_pixels=1024)
    small.save(tmp_path / "again")
    image = Image.new("RGB", (96, 96))
    assert its.fit(image).size == (96, 96)
    assert small.fit(image).size == (32, 32)
    assert model.load(str(tmp_path / "again")).fit(image).size == (32, 32)
