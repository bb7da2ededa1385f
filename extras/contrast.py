"""Is the contrast informative? How well it ranks tokens, measured against the scene.

    python extras/contrast.py                                 the warmed-up tiny model
    python extras/contrast.py --model out/tiny-srpo-seed0/checkpoint-000040 --task count

For sampled responses it scores every token as SRPO does, under every corruption, and reports the
area under the ROC curve (AUC; 0.5 is chance), averaged over responses, with which the contrast of
step 2 ranks perception tokens, and that of step 3 reasoning tokens:

    seen     words for a color or a shape above the other perception tokens (cells)
    asked    words of the kind that is asked for above the other words for one
    true     words that state the scene rightly above those that misstate it
    needed   reasoning tokens that say what was perceived (a match, "no", a count) above cells, "so"

and what becomes of it: the mean contrast of each role, the share of scored tokens whose weight is
clipped in step 6, the mean weight of each role, and the entropy of the policy (nats) at scored
tokens whose weight is above 1 and at those below: where it is 0 there is nothing left to learn. The
row "patch, 4 masks" averages the log-probs under four corrupted images before all of that.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import credit  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from corrupt import CORRUPTIONS  # noqa: E402
from data import CELLS, COLORS, SHAPES, Example, InputError  # noqa: E402
from srpo import Role, contrast_scores, parse_response, shared_baseline  # noqa: E402

LABELS = ("seen", "asked", "true", "needed")
COPULA = r"\W+(?:(?:is|has|a|an|the)\W+)*"  # as `parse_facts` reads a sentence
FACT = re.compile(rf"\b({'|'.join(CELLS)}){COPULA}({'|'.join(COLORS)})\W+({'|'.join(SHAPES)})\b")


def labels(text: str, offsets, example: Example) -> dict[str, np.ndarray]:
    """For each of LABELS: 1 at tokens that should rank high, 0 at those below them, else -1."""
    found = {name: np.full(len(offsets), -1) for name in LABELS}
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
        cell, color, shape = match.groups()
        words = ((color, match.span(2), COLORS), (shape, match.span(3), SHAPES))
        for word, span, kind in words:
            asked = any(argument in kind for argument in example.query.args)
            mark("seen", span, 1)
            mark("asked", span, int(asked))
            true = cell in scene and word in (scene[cell].color, scene[cell].shape)
            mark("true", span, int(true))
    start, end = blocks.reasoning
    for match in re.finditer(r"[^\s,]+", text[start:end]):
        span = (start + match.start(), start + match.end())
        says_what_was_seen = match[0] not in (*CELLS, "so", "is")
        mark("needed", span, int(says_what_was_seen))
    return found


def auc(scores: np.ndarray, label: np.ndarray) -> float | None:
    """How often a score with label 1 is above one with label 0; None where either is missing."""
    high = scores[label == 1]
    low = scores[label == 0]
    if len(high) == 0 or len(low) == 0:
        return None
    above = high[:, None] > low
    equal = high[:, None] == low
    return float(np.mean(above + 0.5 * equal))


def mean_auc(batch: credit.Batch, delta: Tensor) -> dict[str, float]:
    """Mean over the responses, for each of LABELS; NaN where no response has such tokens."""
    found = {name: [] for name in LABELS}
    for row, (text, offsets) in enumerate(batch.responses):
        example = batch.examples[int(batch.rollout.prompt[row])]
        scores = delta[row, : len(offsets)].numpy()
        for name, label in labels(text, offsets, example).items():
            area = auc(scores, label)
            if area is not None:
                found[name].append(area)
    return {name: mean(np.array(areas)) for name, areas in found.items()}


def mean(x) -> float:
    if len(x) == 0:
        return float("nan")
    return float(x.mean())


def figures(batch: credit.Batch, logp_corrupted: Tensor, logp_blank: Tensor, args) -> dict:
    """One row of the table, by the name of its columns."""
    rollout = batch.rollout
    roles = batch.roles
    P = roles == Role.PERCEPTION
    R = roles == Role.REASONING
    S = P | R
    delta = contrast_scores(rollout.logp, logp_corrupted, logp_blank, roles)
    w = credit.weights(batch, logp_corrupted, logp_blank, args, step=1)
    relative = ((delta - shared_baseline(delta, roles)) / args.tau)[S]
    return {
        **mean_auc(batch, delta),
        "Δ P": mean(delta[P]),
        "Δ R": mean(delta[R]),
        "clipped low": mean((relative <= np.log(args.w_min)).float()),
        "clipped high": mean((relative >= np.log(args.w_max)).float()),
        "w P": mean(w[P]),
        "w R": mean(w[R]),
        "entropy, w > 1": mean(rollout.entropy[S & (w > 1)]),
        "w < 1": mean(rollout.entropy[S & (w < 1)]),
    }


def rows(policy: model.Policy, batch: credit.Batch, args):
    """(name, figures) of each corruption, and of four draws of the patch mask."""
    logp_blank = credit.blank_log_probs(policy, batch, args)

    def corrupted(kind: str, draw: int) -> Tensor:
        how = argparse.Namespace(**{**vars(args), "corruption": kind})
        return credit.corrupted_log_probs(policy, batch, how, step=draw)

    for kind in CORRUPTIONS:
        yield kind, figures(batch, corrupted(kind, 0), logp_blank, args)
    masked = torch.stack([corrupted("patch", draw) for draw in range(4)])
    yield "patch, 4 masks", figures(batch, masked.mean(dim=0), logp_blank, args)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = train.Parser(
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        epilog="And the options of train.py: --model, --task, --seed, --group-size, --tau ...",
    )
    parser.add_argument("--prompts", default="32", help="questions (else: 32)")
    mine, others = parser.parse_known_args(argv)
    return train.resolve_options(["--device", "cpu", "--prompts", mine.prompts, *others])


def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.disable_progress_bar()
    try:
        args = options(argv)
        if not model.is_tiny(args.model):
            problem = "not the tiny model; the labels here are of its words"
            raise InputError(f"--model {args.model}: {problem}")
        if args.data:
            raise InputError("--data: only drawn tasks have a scene to measure against")
        if args.model == "tiny":
            policy = credit.warmed_up(args)
        else:
            policy = train.load_policy(args, args.model)
        task = train.build_task(args)
        examples = task.draw(args.prompts, (args.seed, 0, 5), held_out=False)
        batch = credit.sample(policy, examples, args, step=1)
        for number, (name, found) in enumerate(rows(policy, batch, args)):
            if number == 0:
                print(f"{args.task}, seed {args.seed}\n| corruption | {' | '.join(found)} |")
                print("|---" * (len(found) + 1) + "|")
            shown = [f"{x:.2f}" for x in found.values()]
            print(f"| {name} | {' | '.join(shown)} |", flush=True)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
