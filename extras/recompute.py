"""train.py with less memory: decoder layers are computed again in the backward pass, not kept.

    python extras/recompute.py --model Qwen/Qwen3.5-0.8B --data my.jsonl       options of train.py

Of each layer only the input is kept. What is inside, most of the memory of an update, exists for
one layer at a time. That costs about one more forward pass and leaves gradients as they are, bit
for bit. The checkpoints of transformers do without a cache; here responses need the cache of their
prompt.
"""

import copy
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers.cache_utils import Cache, DynamicCache  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402


def recompute(policy: model.Policy) -> model.Policy:
    """The same policy, whose decoder layers are from now on computed again in the backward pass."""
    for index, layer in enumerate(policy.model.model.language_model.layers):
        layer.forward = partial(compute, layer.forward, index)
    return policy


def compute(forward, index: int, hidden: Tensor, *, past_key_values: Cache, **inputs) -> Tensor:
    """Layer `index` on hidden [b, T, H]; only that is kept if a gradient is to come."""
    inputs["past_key_values"] = past_key_values
    if not torch.is_grad_enabled():
        return forward(hidden, **inputs)
    if isinstance(past_key_values, DynamicCache):
        return read_prompts(forward, index, hidden, **inputs)
    # A cache for scoring is left as it is by the pass, so the pass can be made twice.
    return checkpoint(forward, hidden, use_reentrant=False, **inputs)


def read_prompts(
    forward, index: int, hidden: Tensor, *, past_key_values: Cache, **inputs
) -> Tensor:
    """The same for prompts, whose keys and values are put into the cache, which is empty at first.

    Each time the layer is computed it fills an empty cache layer of its own. That of the first
    time, which the responses build on, goes into the cache.
    """
    empty = past_key_values.layers[index]

    def fill(hidden):
        cache = copy.copy(past_key_values)
        cache.layers = list(past_key_values.layers)
        cache.layers[index] = copy.deepcopy(empty)
        out = forward(hidden, past_key_values=cache, **inputs)
        return out, cache.layers[index]

    out, filled = checkpoint(fill, hidden, use_reentrant=False)
    past_key_values.layers[index] = filled
    return out


def main(argv: list[str] | None = None) -> int:
    load_policy = train.load_policy

    def load_and_recompute(args, name):
        return recompute(load_policy(args, name))

    train.load_policy = load_and_recompute
    try:
        return train.main(argv)
    finally:
        train.load_policy = load_policy


if __name__ == "__main__":
    sys.exit(main())
