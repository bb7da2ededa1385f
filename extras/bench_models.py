"""Shapes of a training step for bench.py, and models of these sizes with random weights."""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

import model  # noqa: E402


class Shape(NamedTuple):
    """Sizes of a step and its model."""

    side: int  # of the image, in pixels
    prompts: int
    group_size: int
    new_tokens: int
    layers: int
    model: int | str  # a name in MODELS, or the width of a made-up one
    words: int | None = None  # in the vocabulary of a made-up one


SHAPES = {
    "short": Shape(96, 1, 8, 64, 4, 256, 4000),  # 36 visual tokens
    "long": Shape(512, 1, 8, 64, 4, 256, 4000),  # 1,024 visual tokens
}
# Of --model, at its sizes: image side in patches (45: 506 visual tokens), prompts, group, new
# tokens. "cut" has four layers.
REAL = {"real": (45, 8, 8, 256), "group": (45, 1, 8, 256), "cut": (8, 1, 8, 16)}

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN3_5 = {
    "vocab_size": 248320,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
    },
}
# Class, text and vision configuration, as on the hub; what the class has by itself is left out.
MODELS = {
    "qwen2-vl-2b": (
        "Qwen2VL",
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": ROPE,
        },
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "patch_size": 14},
    ),
    "qwen3.5-0.8b": (
        "Qwen3_5",
        {**QWEN3_5, "hidden_size": 1024, "intermediate_size": 3584},
        {
            "depth": 12,
            "hidden_size": 768,
            "num_heads": 12,
            "intermediate_size": 3072,
            "patch_size": 16,
            "out_hidden_size": 1024,
        },
    ),
    "qwen3.5-2b": (
        "Qwen3_5",
        {**QWEN3_5, "hidden_size": 2048, "intermediate_size": 6144},
        {
            "depth": 24,
            "hidden_size": 1024,
            "num_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 16,
            "out_hidden_size": 2048,
        },
    ),
}


def made_up(width: int, words: int) -> tuple[str, dict, dict]:
    """A small Qwen2-VL, in the form of MODELS."""
    text = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 2,
        "rope_parameters": {**ROPE, "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    }
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": width, "num_heads": 4, "patch_size": 8}
    return "Qwen2VL", text, vision


def sizes_of(shape: str) -> Shape:
    return Shape(*SHAPES[shape])


def add_real_shapes(name: str, layers: int | None) -> None:
    """The shapes of REAL for a model; with `layers` its language model has so many."""
    _, text, vision = MODELS[name]
    if layers is None:
        layers = text["num_hidden_layers"]
    for shape, (patches, prompts, group_size, new_tokens) in REAL.items():
        sizes = Shape(patches * vision["patch_size"], prompts, group_size, new_tokens, layers, name)
        if shape == "cut":
            sizes = sizes._replace(layers=4)
        SHAPES[shape] = sizes


def make_folder(folder: Path, shape: str) -> None:
    """Random weights in the layout of the hub; the words are the tiny model's and made-up ones."""
    sizes = sizes_of(shape)
    policy = model.build_tiny()
    dtype = torch.bfloat16  # as on the hub
    if sizes.words is not None:
        more = sizes.words - len(policy.tokenizer)
        policy.tokenizer.add_tokens([f"w{i}" for i in range(more)])
        kind, text, vision = made_up(sizes.model, sizes.words)
        dtype = torch.float32
    else:
        kind, text, vision = MODELS[sizes.model]
    if shape == "cut":
        vision = {**vision, "depth": 4}
    ids = {"bos_token_id": None, "eos_token_id": policy.eos[0], "pad_token_id": policy.pad}
    tied = {"tie_word_embeddings": True}
    text = {**text, **ids, **tied, "num_hidden_layers": sizes.layers}
    tiny = policy.model.config.to_dict()
    special = {name: x for name, x in tiny.items() if name.endswith("_token_id")}
    config_class = getattr(transformers, f"{kind}Config")
    parts = {"text_config": text, "vision_config": vision}
    config = config_class(**parts, **special, **tied, instruction="")
    torch.manual_seed(0)
    policy.model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    policy.model.to(dtype)
    policy.image_processor.patch_size = vision["patch_size"]
    policy.image_processor.size = {"shortest_edge": 256, "longest_edge": 2**20}
    policy.save(folder)


if __name__ == "__main__":
    print("error: no script: python extras/bench.py", file=sys.stderr)
    sys.exit(2)
