"""Tests of extras/merge.py.

pip install peft pytest, then python -m pytest -q extras/test_merge.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import merge  # noqa: E402
from test_real_models import FAMILY, hub_folder  # noqa: E402
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from test_srpo import run  # noqa: E402

pytest.importorskip("peft", reason="pip install peft")

CAP = 60 * 60  # pixels; by default a real model sees images of 100 times this area
STEPS = ["--device", "cpu", "--steps", 2, "--prompts", 2, "--group-size", 4, "--image-size", 90]
STEPS += ["--max-new-tokens", 12, "--eval-size", 8, "--eval-every", 0, "--max-pixels", CAP]
STEPS += ["--eval-temperature", 0]
# A reward with a spread whatever is written, and steps large enough to be seen.
STEPS += ["--reward", f"{HERE}/test_merge.py:length", "--lr", 3e-3]
FILES = {  # what AutoProcessor, AutoModel and vLLM read
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
}


def length(text, example):
    return len(text)


def log_probs(policy):
    """Of the demonstrations for two examples, in order."""
    examples = data.DrawnTask("count", size=90).train_batch(0, 2)
    rng = np.random.default_rng(0)
    written = policy.as_rollout([data.demonstrate(example, 0.0, rng) for example in examples])
    with torch.no_grad():
        return policy.log_probs(policy.encode(examples), written, 1.0)


def evaluated(folder, out):
    """What `train.py --model FOLDER --steps 0` reports."""
    argv = ["--model", folder, *STEPS, "--steps", 0]
    (record,), steps = run(out, *argv)
    assert steps == []
    return record


@pytest.fixture(scope="module", params=FAMILY)
def adapted(request, tmp_path_factory):
    """Base model, run with adapters, and the folder that was made of them."""
    path = tmp_path_factory.mktemp("adapted")
    base = hub_folder(path / "base", request.param)
    run(path / "run", "--model", base, "--lora", 4, *STEPS)
    assert merge.main([str(path / "run"), str(path / "served")]) == 0
    return path


def test_merged_weights_score_as_the_adapters_do(adapted):
    checkpoint = train.Run(adapted / "run").checkpoint()
    by_adapters = log_probs(model.load(str(checkpoint), max_pixels=CAP))
    served = model.load(str(adapted / "served"))
    assert torch.allclose(log_probs(served), by_adapters, atol=1e-4)
    base = model.load(str(adapted / "base"), max_pixels=CAP)
    assert not torch.allclose(log_probs(base), by_adapters, atol=1e-2)


def test_an_evaluation_of_the_folder_is_that_of_the_checkpoint(adapted, tmp_path):
    checkpoint = train.Run(adapted / "run").checkpoint()
    served = evaluated(adapted / "served", tmp_path / "served")
    assert served == evaluated(checkpoint, tmp_path / "checkpoint")
    assert served["eval"]["temperature"] == 0
    assert served["eval"] == train.Run(adapted / "run").log()[-1]["eval"]


def test_the_folder_has_what_transformers_and_vllm_look_for(adapted):
    served = adapted / "served"
    assert {file.name for file in served.iterdir()} == FILES
    weights = {}
    for file in (adapted / "base").glob("*.safetensors"):
        weights.update(load_file(file))
    assert load_file(served / "model.safetensors").keys() == weights.keys()  # names of the hub
    config = transformers.AutoConfig.from_pretrained(served)
    assert config.model_type == transformers.AutoConfig.from_pretrained(adapted / "base").model_type
    assert config.architectures[0].endswith("ForConditionalGeneration")
    assert transformers.GenerationConfig.from_pretrained(served).repetition_penalty == 1.05
    tokenizer = transformers.AutoTokenizer.from_pretrained(served)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert "<|image_pad|><|vision_end|>How many?" in text
    eyes = model.Qwen2VLImageProcessorPil.from_pretrained(served)
    assert eyes.size["longest_edge"] == CAP
    assert eyes.patch_size == config.vision_config.patch_size
    # AutoProcessor itself needs torchvision: these are the files by which it finds its classes.
    processor, video_processor = merge.PROCESSORS[config.model_type]
    assert PROCESSOR_MAPPING_NAMES[config.model_type] == processor
    assert transformers.ProcessorMixin.get_processor_dict(served)[0]["processor_class"] == processor
    images = json.loads((served / "preprocessor_config.json").read_text())
    assert images["processor_class"] == processor
    assert images["image_processor_type"] == "Qwen2VLImageProcessor"
    assert images["max_pixels"] == CAP
    videos = json.loads((served / "video_preprocessor_config.json").read_text())
    assert videos["video_processor_type"] == video_processor
    assert videos["patch_size"] == config.vision_config.patch_size


def test_auto_processor_reads_the_folder(adapted):
    pytest.importorskip("torchvision", reason="pip install torchvision", exc_type=Exception)
    processor = transformers.AutoProcessor.from_pretrained(adapted / "served")
    image = Image.new("RGB", (640, 480), "red")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    policy = model.load(str(adapted / "served"))
    prompts = policy.encode([data.Example((image,), "How many?", "1")])
    assert inputs["input_ids"].tolist() == prompts.ids.tolist()
    assert inputs["image_grid_thw"].prod() <= CAP / policy.patch**2
    assert torch.allclose(inputs["pixel_values"], prompts.pixels[0], atol=0.05)


def test_a_checkpoint_of_all_weights_is_copied_in_the_dtype_asked_for(tmp_path):
    base = hub_folder(tmp_path / "base", "Qwen3VLConfig")
    run(tmp_path / "run", "--model", base, *STEPS)
    checkpoint = train.Run(tmp_path / "run").checkpoint()
    assert merge.main([str(tmp_path / "run"), str(tmp_path / "whole")]) == 0
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "whole/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    argv = [str(checkpoint), str(tmp_path / "half"), "--dtype", "bfloat16"]
    assert merge.main(argv) == 0
    half = load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(half[name], before[name].bfloat16()) for name in before)
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert model.load(str(tmp_path / "half")).image_processor.size["longest_edge"] == CAP


def test_adapters_keep_the_dtype_of_their_base_and_its_relative_path(tmp_path, monkeypatch):
    hub_folder(tmp_path / "base", "Qwen2VLConfig")
    net = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors*"):
        file.unlink()
    net.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run("run", "--model", "base", "--lora", 4, *STEPS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/served").mkdir()  # empty: it is taken
    checkpoint = train.Run(tmp_path / "run").checkpoint()
    assert merge.main([f"../run/{checkpoint.name}", "served"]) == 0
    served = load_file(tmp_path / "elsewhere/served/model.safetensors")
    assert {x.dtype for x in served.values()} == {torch.bfloat16}
    by_adapters = log_probs(model.load(str(checkpoint), max_pixels=CAP))
    merged = log_probs(model.load(str(tmp_path / "elsewhere/served")))
    assert 0 < (merged - by_adapters).abs().max() < 0.2  # rounded to bf16 once


def test_bad_input_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    def complaint(*argv):
        capsys.readouterr()
        assert merge.main([str(word) for word in argv]) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        return stderr

    new = tmp_path / "new"
    assert "no run there" in complaint(tmp_path / "none", new)
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"argv": [], "cwd": str(tmp_path)}))
    assert "without a checkpoint" in complaint(run, new)
    assert "not an empty folder" in complaint(run, run)
    checkpoint = run / "checkpoint-000003"
    checkpoint.mkdir()
    adapters = {"r": 4, "base_model_name_or_path": str(tmp_path / "gone")}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapters))
    assert "base model of its adapters is gone" in complaint(run, new)
    adapters["base_model_name_or_path"] = "gone/too"  # a relative path, or a name on the hub
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapters))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "gone/too" in complaint(run, new)
    adapters["base_model_name_or_path"] = "tiny"
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapters))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in complaint(run, new)
    (checkpoint / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in complaint(run, new)
    assert not new.exists()
