"""Is the contrast informative? How well it ranks tokens, measured against the scene.

    python extras/contrast.py                                     the warmed-up tiny model, every corruption
    python extras/contrast.py --model out/tiny-srpo-seed0/checkpoint-000060 --task count

For sampled responses it scores every token as SRPO does and reports, averaged over responses, the area under the ROC
curve (AUC; 0.5 is chance) with which the contrast of Eq. (2) ranks perception tokens, and that of Eq. (3) reasoning tokens:

    seen     words for a color or a shape above the other perception tokens (cells, commas)
    asked    words of the kind that is asked for (or of the asked cell) above the other words for a color or a shape
    true     words that state the scene rightly above those that misstate it
    needed   reasoning tokens that say what was perceived (a match, "no", a count) above the others (cells, "so")

and what becomes of it: the mean contrast of each role, the share of scored tokens whose weight is clipped in Eq. (6),
the mean weight of each role, and the entropy of the policy (nats) at scored tokens whose weight is above 1 and at those below: where it is
0 there is nothing left to learn. `4 masks` averages the contrast over four corruptions before all of that.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from corrupt import CORRUPTIONS, corrupt  # noqa: E402
from data import CELLS, COLORS, SHAPES, InputError  # noqa: E402
from srpo import Role, contrast_scores, parse_response, shared_baseline, token_roles, token_weights, without_perception  # noqa: E402

FACT = re.compile(rf"({'|'.join(CELLS)})\s+({'|'.join(COLORS)})\s+({'|'.join(SHAPES)})")


def labels(text: str, offsets, example) -> dict[str, np.ndarray]:
    """For each question above, +1 at tokens that should rank high, 0 at those they are compared with, -1 elsewhere."""
    found = {name: np.full(len(offsets), -1) for name in ("seen", "asked", "true", "needed")}
    blocks = parse_response(text)
    if blocks is None:
        return found
    scene = {fact.cell: fact for fact in example.scene}

    def mark(name, span, value):
        for t, (start, end) in enumerate(offsets):
            if max(start, span[0]) < min(end, span[1]) and text[max(start, span[0]) : min(end, span[1])].strip():
                found[name][t] = value

    mark("seen", blocks.perception, 0)
    for match in FACT.finditer(text, *blocks.perception):
        cell = match[1]
        for group, kind in ((2, "color"), (3, "shape")):
            if example.query.task == "lookup":
                asked = kind == "color" and cell in example.query.args
            else:
                asked = any(arg in (COLORS if kind == "color" else SHAPES) for arg in example.query.args)
            mark("seen", match.span(group), 1)
            mark("asked", match.span(group), int(asked))
            mark("true", match.span(group), int(cell in scene and getattr(scene[cell], kind) == match[group]))
    start, end = blocks.reasoning
    for match in re.finditer(r"[^\s,]+", text[start:end]):
        span = (start + match.start(), start + match.end())
        mark("needed", span, int(match[0] not in (*CELLS, "so", "is")))
    return found


def auc(scores: np.ndarray, label: np.ndarray) -> float | None:
    high, low = scores[label == 1], scores[label == 0]
    if not len(high) or not len(low):
        return None
    return float(np.mean((high[:, None] > low) + 0.5 * (high[:, None] == low)))


@torch.no_grad()
def measure(policy, examples, args, kind: str, masks: int) -> dict[str, float]:
    """Figures of one corruption, over the responses of all examples."""
    scores = []
    for draw in range(masks):
        corruption = lambda i, image: corrupt(image, kind, patch=policy.patch, p=args.corruption_p, seed=(args.seed, draw, i))  # noqa: B023, E731
        prompts = policy.encode(examples, corruption)
        if not scores:
            noise = torch.Generator(policy.device).manual_seed(args.seed)
            rollout = policy.sample(prompts, args.group_size, max_new_tokens=args.max_new_tokens, temperature=1.0, generator=noise)
            responses = policy.decode(rollout)
            roles = torch.zeros_like(rollout.ids)
            for row, (text, offsets) in enumerate(responses):
                roles[row, : len(offsets)] = token_roles(text, offsets)
            logp_of = partial(policy.log_probs, prompts, rollout, temperature=1.0)
            logp, entropy = logp_of()
            blank, _ = logp_of(visible=without_perception(rollout.mask, roles), wanted=roles == Role.REASONING)
        seeing = roles == Role.PERCEPTION
        corrupted, _ = policy.log_probs(prompts, rollout, temperature=1.0, corrupted=True, wanted=seeing)
        scores.append(contrast_scores(logp, corrupted, blank, roles))
    delta = torch.stack(scores).mean(0)
    w, scored = token_weights(delta, roles, tau=args.tau), roles != Role.OTHER
    relative = ((delta - shared_baseline(delta, roles)) / args.tau)[scored]
    found = {name: [] for name in ("seen", "asked", "true", "needed")}
    for row, (text, offsets) in enumerate(responses):
        for name, label in labels(text, offsets, examples[int(rollout.prompt[row])]).items():
            value = auc(delta[row, : len(offsets)].numpy(), label)
            found[name] += [] if value is None else [value]
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()} | {
        "Δ P": delta[seeing].mean().item(),
        "Δ R": delta[roles == Role.REASONING].mean().item(),
        "clipped low": (relative <= np.log(0.5)).float().mean().item(),
        "clipped high": (relative >= np.log(2.0)).float().mean().item(),
        "w P": w[seeing].mean().item(),
        "w R": w[roles == Role.REASONING].mean().item(),
        "entropy, w > 1": entropy[scored & (w > 1)].mean().item(),
        "w < 1": entropy[scored & (w < 1)].mean().item(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    defaults = train.build_parser()
    parser.add_argument("--model", default="tiny", help="tiny after its warm-up, or the folder of a checkpoint of it")
    parser.add_argument("--task", default="count", choices=train.data.TASKS, help="which drawn task")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the questions, the responses and the corruptions")
    parser.add_argument("--prompts", type=int, default=32, help="questions")
    parser.add_argument("--group-size", type=int, default=8, help="responses to each")
    parser.add_argument("--tau", type=float, default=1.0, help="tau of Eq. (6)")
    parser.add_argument("--corruption-p", type=float, default=0.6, help="strength of the corruptions")
    for name in ("warmup_steps", "noisy_steps", "warmup_noise", "cache"):
        kind = type(defaults.get_default(name))
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=defaults.get_default(name), help="as in train.py")
    args = parser.parse_args(argv)
    args.device, args.dtype = "cpu", "float32"
    args.image_size, args.max_new_tokens = (train.DEFAULTS[name][0] for name in ("image_size", "max_new_tokens"))
    try:
        if not model.is_tiny(args.model):
            raise InputError(f"--model {args.model}: not the tiny model; the labels here are of its words")
        policy = model.load(str(train.warmed_up(args)) if args.model == "tiny" else args.model)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    examples = train.drawn_task(args).draw(args.prompts, (args.seed, 0, 5), held_out=False)
    rows = {kind: (kind, 1) for kind in CORRUPTIONS} | {"patch, 4 masks": ("patch", 4)}
    for i, (name, (kind, masks)) in enumerate(rows.items()):
        figures = measure(policy, examples, args, kind, masks)
        if i == 0:
            print(f"{args.task}, seed {args.seed}\n| corruption | " + " | ".join(figures) + " |\n" + "|---" * (len(figures) + 1) + "|")
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in figures.values()) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
