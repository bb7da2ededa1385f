"""Tests of real model classes, built small: the Qwen-VL family, LoRA, a checkpoint in plain transformers.

pip install peft pytest, then python -m pytest -q extras/test_real_models.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import data  # noqa: E402
import model  # noqa: E402
import recompute  # noqa: E402
import train  # noqa: E402
from corrupt import corrupt  # noqa: E402
from srpo import contrast_scores  # noqa: E402
from test_srpo import MORE, QUICK, SMALL, O, P, R, code, plain, roles_and_visible  # noqa: E402
from test_srpo import numbers, run, same_scores, same_weights, section  # noqa: E402
from test_srpo import cache  # noqa: E402, F401  a fixture

EYES = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
FAMILY = {
    "Qwen2VLConfig": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    "Qwen2_5_VLConfig": EYES | {"window_size": 56, "fullatt_block_indexes": [1]},
    "Qwen3VLConfig": EYES | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    "Qwen3_5Config": EYES | {"num_position_embeddings": 64},
}


def byte_pairs():
    """A tokenizer like Qwen's, of byte pairs: tags do not align with its tokens."""
    rng = np.random.default_rng(0)
    texts = [data.demonstrate(e, 0.0, rng) for e in data.DrawnTask("count").train_batch(0, 200)]
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r"\s?[^\sa-zA-Z0-9]+|\s?[a-zA-Z]+|[0-9]|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    special = [f"<|{name}|>" for name in special]
    start = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=start)
    tokenizer.train_from_iterator(texts, trainer)
    words = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": model.TINY_TEMPLATE}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)


def hub_folder(folder, name):
    """A small random model of class `name` in the layout of the hub, with Qwen2-VL's generation_config."""
    tokenizer = byte_pairs()
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer) + 30, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if name == "Qwen3_5Config":  # two recurrent layers of three
        text |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
        text |= {"linear_value_head_dim": 16}
        rope |= {"partial_rotary_factor": 1.0}
    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start"}
    marks |= {"vision_end": "vision_end"}
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for k, mark in marks.items()}
    torch.manual_seed(0)
    spread = {"initializer_range": 0.1}
    text, eyes = text | spread | {"rope_parameters": rope}, FAMILY[name] | spread
    config = getattr(transformers, name)(text_config=text, vision_config=eyes, instruction="", **ids)
    net = transformers.AutoModelForImageTextToText.from_config(config)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    stop = {"eos_token_id": [eos, pad], "pad_token_id": pad}
    stop |= {"do_sample": True, "top_k": 1, "repetition_penalty": 1.05}
    net.generation_config = transformers.GenerationConfig(**stop)
    net.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").rename(folder / "chat_template.json")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}))
    side = config.vision_config.patch_size
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": side, "merge_size": 2}
    processor |= {"temporal_patch_size": 2, "min_pixels": 4 * side**2, "max_pixels": 10**6}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_runs_through_the_same_code(name, tmp_path):
    folder = hub_folder(tmp_path / "hub", name)
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 3
    its, rng = model.load(folder, max_pixels=100 * 100), np.random.default_rng(0)
    sizes = [(64, 64, 3), (90, 200, 3), (300, 300, 3)]
    images = tuple(Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for size in sizes)
    fitted = [its.fit(image).size for image in images]
    assert all(w * h <= 100 * 100 + 64 * 64 and w % its.factor == 0 for w, h in fitted)
    asked = "<image>What color is at b2?", "How many <image>red <image>more<image>?"
    examples = [data.Example(images[:1], asked[0], "red"), data.Example(images, asked[1], "2")]
    prompts = its.encode(examples, lambda i, image: corrupt(image, patch=its.patch, seed=i))
    marks = (prompts.ids[1] == its.image_token).long().diff().eq(1).sum()
    assert marks == 3  # images stand where the question marks them
    sampled = torch.Generator().manual_seed(0)
    rollout = its.sample(prompts, 8, max_new_tokens=12, temperature=1.0, generator=sampled)
    assert len({tuple(row) for row in rollout.ids[:8].tolist()}) > 4  # top_k = 1 has not leaked in
    assert not torch.isin(rollout.ids, its.forbidden).any() and len(its.forbidden) == 32
    with torch.no_grad():
        logp, _ = its.log_probs(prompts, rollout, temperature=1.0)
    assert torch.allclose(logp, rollout.logp, atol=1e-4)  # ratio 1
    said = (" a1 red circle", " a1 red so 1", " 1"), (" b2 blue square, c1 red circle", " b2 no so 0", " 0")
    written = its.as_rollout([data.respond(*blocks) for blocks in said])
    roles, visible = roles_and_visible(its, written)
    assert all((roles == role).any(1).all() for role in (P, R))
    cases = [(rollout, None, {}), (written, roles == P, {"corrupted": True})]
    cases += [(written, roles == R, {"visible": visible})]
    same_scores(its, prompts, cases, 3e-4, cut=True)  # hidden tokens are gone, not masked
    with torch.no_grad():
        masked = plain(its, prompts, written, 1.0, visible=visible)
        score = lambda **o: its.log_probs(prompts, written, temperature=1.0, **o)[0]  # noqa: E731
        delta = contrast_scores(score(), score(corrupted=True), blank := score(visible=visible), roles)
    off = (masked - blank)[roles == R].abs().max()
    assert off > 0.1 if name == "Qwen3_5Config" else off < 1e-4  # a recurrent state sees what is masked
    assert (delta[roles != O].abs() > 1e-5).all()
    its.tokenizer.chat_template += "<think>\n"  # opened whatever was asked: closed, or it would eat the tags
    assert its.tokenizer.decode(its.encode(examples).ids[1]).endswith("<think></think>\n\n")
    before = {k: v.clone() for k, v in its.model.state_dict().items()}
    torch.optim.AdamW(its.model.parameters(), lr=1e-3).step()
    its.save(tmp_path / "saved")
    assert same_weights(its, model.load(str(tmp_path / "saved")))
    after = its.model.state_dict()
    assert sum(not torch.equal(after[k], before[k]) for k in before) > len(before) / 2


@pytest.mark.parametrize("name", ("Qwen2VLConfig", "Qwen3_5Config"))
def test_layers_computed_again_give_the_same_gradient(name, tmp_path):
    its, runs, gradients = model.load(hub_folder(tmp_path, name), max_pixels=100 * 100), [], []
    prompts = its.encode(data.DrawnTask("count").train_batch(0, 2))
    sampling = {"max_new_tokens": 70, "temperature": 1.0, "generator": torch.Generator().manual_seed(0)}
    rollout = its.sample(prompts, 4, **sampling)
    layers = its.model.model.language_model.layers
    layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for _ in range(2):
        its.log_probs(prompts, rollout, temperature=1.0)[0][:, 1:].sum().backward()
        gradients.append({k: x.grad.clone() for k, x in its.model.named_parameters() if x.grad is not None})
        its.model.zero_grad()
        recompute.recompute(its)
    assert len(runs) == 2 + 4 and gradients[0].keys() == gradients[1].keys()  # prompts, responses
    assert all(torch.equal(x, gradients[1][k]) for k, x in gradients[0].items())


def test_training_with_less_memory_is_the_same_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "trainable", train.trainable)  # put back afterwards
    argv = [*QUICK, *SMALL, "--steps", "2", "--warmup-steps", "0"]
    run(tmp_path / "plain", *argv)
    assert recompute.main([*argv, "--out", str(tmp_path / "again")]) == 0
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "again")


def test_lora_trains_adapters_only_and_the_readmes_lines_merge_them(tmp_path):
    argv = [*QUICK, *SMALL, "--steps", 3, "--kl-coef", 0.01, "--lr", 1e-3, "--lora", 4]
    pytest.importorskip("peft", reason="pip install peft")
    _, steps = run(tmp_path / "lora", *argv)
    assert steps[0]["kl"] == 0 and steps[2]["kl"] > 0  # adapters start as nothing
    folder = train.Run(tmp_path / "lora").checkpoint()
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    adapted = model.load(str(folder))
    base = model.load(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    names = {"checkpoint": str(folder), "merged": tmp_path / "merged"}
    exec(code(section("Use what you trained", MORE)), names)
    base.save(tmp_path / "whole")  # its tokenizer and image processor, with the merged weights
    (tmp_path / "merged/model.safetensors").replace(tmp_path / "whole/model.safetensors")
    examples = data.DrawnTask("count").train_batch(0, 2)
    written = adapted.as_rollout([data.demonstrate(e, 0.0, np.random.default_rng(0)) for e in examples])
    score = lambda p: p.log_probs(p.encode(examples), written, temperature=1.0)[0].detach()  # noqa: E731
    assert torch.allclose(score(adapted), score(model.load(str(tmp_path / "whole"))), atol=1e-4)
    with adapted.as_reference(adapted):
        assert torch.allclose(score(adapted), score(base), atol=1e-5)
    assert not torch.allclose(score(adapted), score(base), atol=1e-3)
