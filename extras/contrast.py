"""Is the contrast informative? How well it ranks tokens, measured against the scene.

    python extras/contrast.py                                     the warmed-up tiny model, every corruption
    python extras/contrast.py --model out/tiny-srpo-seed0/checkpoint-000040 --task count

For sampled responses it scores every token as SRPO does and reports, averaged over responses, the area under
the ROC curve (AUC; 0.5 is chance) with which the contrast of step 2 ranks perception tokens, and that of
step 3 reasoning tokens:

    seen     words for a color or a shape above the other perception tokens (cells)
    asked    words of the kind that is asked for above the other words for one
    true     words that state the scene rightly above those that misstate it
    needed   reasoning tokens that say what was perceived (a match, "no", a count) above cells and "so"

and what becomes of it: the mean contrast of each role, the share of scored tokens whose weight is clipped in
step 6, the mean weight of each role, and the entropy of the policy (nats) at scored tokens whose weight is
above 1 and at those below: where it is 0 there is nothing left to learn. `4 masks` averages the contrast over
four corruptions before all of that.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import credit  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from corrupt import CELLS, COLORS, CORRUPTIONS, SHAPES  # noqa: E402
from data import InputError  # noqa: E402
from srpo import Role, parse_response, shared_baseline  # noqa: E402

COPULA = r"\W+(?:(?:is|has|a|an|the)\W+)*"  # as `parse_facts` reads a sentence
FACT = re.compile(rf"\b({'|'.join(CELLS)}){COPULA}({'|'.join(COLORS)})\W+({'|'.join(SHAPES)})\b")


def labels(text: str, offsets, example) -> dict[str, np.ndarray]:
    """For each question above: 1 at tokens that should rank high, 0 at those compared with, -1 elsewhere."""
    found = {name: np.full(len(offsets), -1) for name in ("seen", "asked", "true", "needed")}
    blocks = parse_response(text)
    if blocks is None:
        return found
    scene = {fact.cell: fact for fact in example.scene}

    def mark(name, span, value):
        for t, (start, end) in enumerate(offsets):
            if text[max(start, span[0]) : min(end, span[1])].strip():
                found[name][t] = value

    mark("seen", blocks.perception, 0)
    for match in FACT.finditer(text, *blocks.perception):
        cell = match[1]
        for group, kind in ((2, "color"), (3, "shape")):
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


class Responses:
    """Responses of the policy to the examples, the role of each token, and the entropy of what was drawn."""

    def __init__(self, policy, examples, args):
        self.policy, self.examples, self.args = policy, examples, args
        noise = torch.Generator(policy.device).manual_seed(args.seed)
        prompts = policy.encode(examples)
        self.rollout, self.texts, self.roles = credit.sample(policy, prompts, args, noise)
        with torch.no_grad():
            self.entropy = policy.log_probs(prompts, self.rollout, temperature=args.temperature)[1]

    def delta(self, kind: str, draw: int) -> torch.Tensor:
        """[B, T], with the images corrupted in this way."""
        corruption = credit.corruption(self.policy, self.args, draw, kind)
        prompts = self.policy.encode(self.examples, corruption)
        return credit.contrasts(self.policy, prompts, self.rollout, self.roles, self.args)

    def figures(self, delta: torch.Tensor) -> dict[str, float]:
        roles, c, found = self.roles, self.args.choice, {}
        for row, (text, offsets) in enumerate(self.texts):
            example = self.examples[int(self.rollout.prompt[row])]
            for name, label in labels(text, offsets, example).items():
                found.setdefault(name, []).append(auc(delta[row, : len(offsets)].numpy(), label))
        known = {name: [x for x in values if x is not None] for name, values in found.items()}
        figures = {name: float(np.mean(values)) if values else float("nan") for name, values in known.items()}
        w, scored = credit.weights(delta, roles, self.args), roles != Role.OTHER
        baseline = shared_baseline(delta, roles, role_balanced=c["role_balanced"])
        relative = ((delta - baseline) / c["tau"])[scored]
        P, R, mean = roles == Role.PERCEPTION, roles == Role.REASONING, lambda x: x.float().mean().item()
        figures |= {"Δ P": mean(delta[P]), "Δ R": mean(delta[R])}
        figures["clipped low"] = mean(relative <= np.log(c["w_min"]))
        figures["clipped high"] = mean(relative >= np.log(c["w_max"]))
        figures |= {"w P": mean(w[P]), "w R": mean(w[R])}
        above, below = (self.entropy[scored & where] for where in (w > 1, w < 1))
        return figures | {"entropy, w > 1": mean(above), "w < 1": mean(below)}


def main(argv: list[str] | None = None) -> int:
    form, train_py = argparse.ArgumentDefaultsHelpFormatter, train.build_parser().get_default
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=form)
    add, number = parser.add_argument, train.number
    add("--model", default="tiny", help="tiny after its warm-up, or the folder of a checkpoint of it")
    add("--task", default="count", choices=train.data.TASKS, help="which drawn task")
    add("--seed", type=number(int, 0), default=0, help="of the model and of all that is drawn")
    add("--prompts", type=number(int, 1), default=32, help="questions")
    add("--group-size", type=number(int, 1), default=8, help="responses to each")
    as_there = {"help": "as in train.py"}
    add("--choice", type=train.choice, default=[], action="append", metavar="NAME=VALUE", **as_there)
    add("--warmup-steps", type=number(int, 0), default=train_py("warmup_steps"), **as_there)
    add("--warmup-noise", type=number(float, 0, 1), default=train_py("warmup_noise"), **as_there)
    args = parser.parse_args(argv)
    args = credit.defaults(**vars(args))
    transformers.utils.logging.disable_progress_bar()
    try:
        if not model.is_tiny(args.model):
            raise InputError(f"--model {args.model}: not the tiny model; the labels here are of its words")
        policy = credit.warmed_up(args) if args.model == "tiny" else model.load(args.model)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    examples = train.drawn_task(args).draw(args.prompts, (args.seed, 0, 5), held_out=False)
    sampled = Responses(policy, examples, args)
    rows = {kind: (kind, 1) for kind in CORRUPTIONS} | {"patch, 4 masks": ("patch", 4)}
    for i, (name, (kind, masks)) in enumerate(rows.items()):
        figures = sampled.figures(torch.stack([sampled.delta(kind, draw) for draw in range(masks)]).mean(0))
        if i == 0:
            print(f"{args.task}, seed {args.seed}\n| corruption | {' | '.join(figures)} |")
            print("|---" * (len(figures) + 1) + "|")
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in figures.values()) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
