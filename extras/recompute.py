"""train.py with less memory: decoder layers are computed again in the backward pass, instead of kept.

    python extras/recompute.py --model Qwen/Qwen3.5-0.8B --data my.jsonl        every option of train.py

Of each layer only the input is kept; what is inside, most of the memory of an update, exists for one layer at
a time. That costs about one more forward pass, and leaves gradients as they are, bit for bit. The checkpoints
of transformers do without a cache, but here a prompt is read once for all of its responses, with gradient: so
a layer gets its part of the cache as it was before.
"""

import copy
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402


def recompute(policy: model.Policy) -> model.Policy:
    """The same policy, whose decoder layers are from now on computed again in the backward pass."""
    for i, layer in enumerate(policy.model.model.language_model.layers):
        layer.forward = partial(again, layer.forward, i)
    return policy


def again(forward, i: int, hidden: Tensor, **inputs) -> Tensor:
    """Layer i on [b, T, H], of which only the input is kept when there is a gradient to come."""
    if not torch.is_grad_enabled():
        return forward(hidden, **inputs)
    name = "cache" if "cache" in inputs else "past_key_values"
    cache = inputs.pop(name)
    before, mine = cache.layers[i], copy.copy(cache)

    def run(hidden):
        mine.layers = [None] * i + [copied(before)]
        return forward(hidden, **inputs, **{name: mine}), mine.layers.pop()

    out, cache.layers[i] = checkpoint(run, hidden, use_reentrant=False)
    return out


def copied(layer):
    """A layer of a cache to go on with, while the old one stays as it is."""
    layer = copy.copy(layer)
    for name, states in [*vars(layer).items()]:
        if isinstance(states, dict):  # of a recurrent layer, which writes over its tensors
            own = {i: x.clone() if isinstance(x, Tensor) else x for i, x in states.items()}
            setattr(layer, name, own)
    return layer


def main(argv: list[str] | None = None) -> int:
    trainable = train.trainable
    train.trainable = lambda policy, args: trainable(recompute(policy), args)
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
