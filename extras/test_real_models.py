"""Tests of real model classes, built small: the Qwen-VL family, LoRA, less memory.

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

import merge  # noqa: E402
from test_readmes import MORE  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from srpo import contrast_scores  # noqa: E402
from test_srpo import (  # noqa: E402
    QUICK,
    SMALL,
    O,
    P,
    R,
    assert_same_scores,
    cache,  # noqa: F401  a fixture
    code,
    records_of,
    roles_and_visible,
    run,
    same_weights,
    section,
    stock_log_probs,
)

EYES = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
}
FAMILY = {  # class of the configuration, and its vision part
    "Qwen2VLConfig": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    "Qwen2_5_VLConfig": {**EYES, "window_size": 56, "fullatt_block_indexes": [1]},
    "Qwen3VLConfig": {**EYES, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    "Qwen3_5Config": {**EYES, "num_position_embeddings": 64},
}


def byte_pairs():
    """A tokenizer like Qwen's, of byte pairs: tags do not align with its tokens."""
    rng = np.random.default_rng(0)
    examples = data.DrawnTask("count").train_batch(0, 200)
    texts = [data.demonstrate(example, 0.0, rng) for example in examples]
    tokenizer = Tokenizer(models.BPE())
    word = Regex(r"\s?[^\sa-zA-Z0-9]+|\s?[a-zA-Z]+|[0-9]|\s+")
    cut = pre_tokenizers.Split(word, "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    tokenizer.decoder = decoders.ByteLevel()
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[f"<|{name}|>" for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=model.TINY_TEMPLATE,
    )


def small_config(name, tokenizer):
    """Configuration of class `name` with 3 layers of width 64."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(tokenizer) + 30,
        "initializer_range": 0.1,
        "rope_parameters": rope,
    }
    if name == "Qwen3_5Config":  # two recurrent layers of three
        text["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
        text["linear_num_key_heads"] = 2
        text["linear_num_value_heads"] = 4
        text["linear_key_head_dim"] = 16
        text["linear_value_head_dim"] = 16
        rope["partial_rotary_factor"] = 1.0
    token_id = tokenizer.convert_tokens_to_ids
    return getattr(transformers, name)(
        text_config=text,
        vision_config={**FAMILY[name], "initializer_range": 0.1},
        instruction="",
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def hub_folder(folder, name):
    """A small random model in the layout of the hub, with a generation_config like Qwen2-VL's."""
    tokenizer = byte_pairs()
    config = small_config(name, tokenizer)
    torch.manual_seed(0)
    net = transformers.AutoModelForImageTextToText.from_config(config)
    net.generation_config = transformers.GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_k=1,
        repetition_penalty=1.05,
    )
    net.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    template = json.dumps({"chat_template": tokenizer.chat_template})
    (folder / "chat_template.json").write_text(template)
    side = config.vision_config.patch_size
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": side,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 4 * side**2,
        "max_pixels": 10**6,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


# ---- four families


@pytest.fixture(scope="module", params=FAMILY)
def family(request, tmp_path_factory):
    """Name, folder, and policy of one family."""
    folder = tmp_path_factory.mktemp("hub") / request.param
    hub_folder(folder, request.param)
    return request.param, folder, model.load(str(folder), max_pixels=100 * 100)


def asked(policy):
    """Two examples, with one image and with three, which the questions mark."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64, 3), (90, 200, 3), (300, 300, 3)]
    images = [Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for size in sizes]
    one = data.Example((images[0],), "<image>What color is at b2?", "red")
    three = data.Example(tuple(images), "How many <image>red <image>more<image>?", "2")
    return [one, three]


def written_by(policy):
    """A well-formed response to each of them, with its roles and what step 3 leaves visible."""
    first = data.respond(" a1 red circle", " a1 red so 1", " 1")
    second = data.respond(" b2 blue square, c1 red circle", " b2 no so 0", " 0")
    written = policy.as_rollout([first, second])
    return written, *roles_and_visible(policy, written)


def corrupted_copies(policy, examples):
    args = train.resolve_options(["--device", "cpu"])
    return train.corrupted_copies(examples, policy, args, step=1)


def test_a_folder_of_the_hub_is_read_whole(family):
    _, folder, policy = family
    assert len(list(folder.glob("*.safetensors"))) > 3
    for image in asked(policy)[1].images:
        width, height = policy.fit(image).size
        assert width * height <= 100 * 100 + 64 * 64
        assert width % policy.factor == 0
    prompts = policy.encode(asked(policy))
    is_image = (prompts.ids[1] == policy.image_token).long()
    assert is_image.diff().eq(1).sum() == 3  # images stand where the question marks them


def test_sampling_ignores_generation_config_and_has_ratio_1(family):
    _, _, policy = family
    prompts = policy.encode(asked(policy))
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(prompts, 8, max_new_tokens=12, temperature=1.0, generator=rng)
    assert len({tuple(row) for row in rollout.ids[:8].tolist()}) > 4  # top_k is 1 there
    assert len(policy.forbidden) == 32
    assert not torch.isin(rollout.ids, policy.forbidden).any()
    with torch.no_grad():
        logp = policy.log_probs(prompts, rollout, temperature=1.0)
    assert torch.allclose(logp, rollout.logp, atol=1e-4)


def test_scores_and_gradients_are_those_of_stock_calls(family):
    """All that SRPO scores: as sampled, with corrupted images, without the perception."""
    _, _, policy = family
    examples = asked(policy)
    prompts = policy.encode(examples)
    corrupted = policy.encode(corrupted_copies(policy, examples), fitted=True)
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(prompts, 8, max_new_tokens=12, temperature=1.0, generator=rng)
    written, roles, visible = written_by(policy)
    assert (roles == P).any(dim=1).all()
    assert (roles == R).any(dim=1).all()
    cases = [(prompts, rollout, None), (corrupted, written, None), (prompts, written, visible)]
    assert_same_scores(policy, cases, atol=3e-4, cut=True)  # hidden tokens are gone, not masked


@torch.no_grad()
def test_contrasts_are_not_zero_and_hidden_tokens_are_gone(family):
    name, _, policy = family
    examples = asked(policy)
    prompts = policy.encode(examples)
    corrupted = policy.encode(corrupted_copies(policy, examples), fitted=True)
    written, roles, visible = written_by(policy)
    logp = policy.log_probs(prompts, written, 1.0)
    logp_corrupted = policy.log_probs(corrupted, written, 1.0)
    logp_blank = policy.log_probs(prompts, written, 1.0, visible)
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    assert (delta[roles != O].abs() > 1e-5).all()
    masked = stock_log_probs(policy, prompts, written, 1.0, visible=visible)
    off = (masked - logp_blank)[roles == R].abs().max()
    if name == "Qwen3_5Config":  # its recurrent state sees what is merely masked
        assert off > 0.1
    else:
        assert off < 1e-4


def test_a_think_tag_that_a_template_opens_is_closed(family):
    _, _, policy = family
    template = policy.tokenizer.chat_template
    try:
        policy.tokenizer.chat_template += "<think>\n"  # whatever was asked
        ids = policy.encode(asked(policy)).ids[1]
    finally:
        policy.tokenizer.chat_template = template
    assert policy.tokenizer.decode(ids).endswith("<think></think>\n\n")


def test_updated_weights_are_saved_whole(family, tmp_path):
    _, folder, _ = family
    policy = model.load(str(folder))
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 2))
    written = policy.as_rollout(["a1 red", "b2 blue"])
    before = {name: x.clone() for name, x in policy.model.state_dict().items()}
    policy.log_probs(prompts, written, 1.0).sum().backward()
    torch.optim.AdamW(policy.model.parameters(), lr=1e-3).step()
    policy.save(tmp_path / "saved")
    again = model.load(str(tmp_path / "saved"))
    assert same_weights(policy, again)
    after = again.model.state_dict()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert len(changed) > len(before) / 2


# ---- less memory


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("name", FAMILY)
def test_layers_computed_again_give_the_same_gradient_with_less_memory(name, lora, tmp_path):
    policy = model.load(hub_folder(tmp_path, name), max_pixels=100 * 100)
    if lora:
        pytest.importorskip("peft", reason="pip install peft")
        policy.add_lora(lora)
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 2))
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(prompts, 4, max_new_tokens=70, temperature=1.0, generator=rng)
    layers = policy.model.model.language_model.layers
    passes = []

    def count(*_):
        passes.append(1)

    layers[0].mlp.register_forward_pre_hook(count)

    def update():
        """Gradients, passes through a layer, and bytes that are kept for the backward pass."""
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def unpack(x):
            return x

        passes.clear()
        policy.model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            logp = policy.log_probs(prompts, rollout, 1.0)
        logp[:, 1:].sum().backward()
        gradients = {}
        for name, parameter in policy.model.named_parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
            if parameter.requires_grad:
                gradients[name] = parameter.grad.clone()
        return gradients, len(passes), sum(kept.values())

    gradients, passes_before, bytes_before = update()
    model.recompute_layers(policy.model)
    again, passes_after, bytes_after = update()
    assert (passes_before, passes_after) == (2, 4)  # over prompts and over responses
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradients[key], again[key]) for key in gradients)
    assert bytes_after < bytes_before / 2


def test_training_with_less_memory_is_the_same_training(tmp_path):
    argv = [*QUICK, *SMALL, "--steps", "2", "--warmup-steps", "0"]
    run(tmp_path / "plain", *argv)
    run(tmp_path / "again", *argv, "--recompute")
    assert records_of(tmp_path / "plain") == records_of(tmp_path / "again")


def test_the_attention_that_a_folder_asks_for_does_not_change_what_is_sampled(tmp_path):
    folder = hub_folder(tmp_path, "Qwen2VLConfig")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "eager"}))
    policy = model.load(folder)
    prompts = policy.encode(data.DrawnTask("count").train_batch(0, 2))
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(prompts, 2, max_new_tokens=6, temperature=1.0, generator=rng)
    logp = policy.log_probs(prompts, rollout, temperature=1.0)
    assert torch.allclose(logp, rollout.logp, atol=1e-5)


# ---- LoRA


def test_lora_trains_adapters_only_and_the_readmes_lines_use_them_merged(tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    argv = [*QUICK, *SMALL, "--steps", 3, "--kl-coef", 0.01, "--lr", 1e-3, "--lora", 4]
    _, steps = run(tmp_path / "lora", *argv)
    assert steps[0]["kl"] == 0  # adapters start as nothing
    assert steps[2]["kl"] > 0
    folder = train.Run(tmp_path / "lora").checkpoint()
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    adapted = model.load(str(folder))
    base = model.load(model.adapter_config(str(folder))["base_model_name_or_path"])
    served = tmp_path / "served"
    assert merge.main([str(tmp_path / "lora"), str(served)]) == 0
    text = section("Use what you trained", MORE)
    assert "python extras/merge.py out/my-run served" in text
    names = {}
    exec(code(text).replace('"served"', f'"{served}"'), names)
    whole = model.load(str(served))
    whole.model = names["model"]  # by transformers alone
    assert names["tokenizer"].chat_template == adapted.tokenizer.chat_template
    examples = data.DrawnTask("count").train_batch(0, 2)
    rng = np.random.default_rng(0)
    written = adapted.as_rollout([data.demonstrate(example, 0.0, rng) for example in examples])

    @torch.no_grad()
    def score(policy):
        return policy.log_probs(policy.encode(examples), written, 1.0)

    assert torch.allclose(score(adapted), score(whole), atol=1e-4)
    assert not torch.allclose(score(adapted), score(base), atol=1e-3)
    with adapted.adapter.disable_adapter():  # as the reference of the KL term
        assert torch.allclose(score(adapted), score(base), atol=1e-5)


def test_whole_layers_among_the_adapters_of_another_trainer_are_float32(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    hub = hub_folder(tmp_path / "hub", "Qwen2VLConfig")
    policy = model.load(hub)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(policy.model, config).save_pretrained(tmp_path / "own")
    policy.tokenizer.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own/adapter_config.json").read_text())
    config["base_model_name_or_path"] = hub
    (tmp_path / "own/adapter_config.json").write_text(json.dumps(config))
    loaded = model.load(str(tmp_path / "own"), dtype=torch.bfloat16)
    trained = [x for x in loaded.model.parameters() if x.requires_grad]
    assert trained[-1].shape == loaded.model.lm_head.weight.shape
    assert {x.dtype for x in trained} == {torch.float32}
