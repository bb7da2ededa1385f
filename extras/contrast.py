"""Is the contrast informative? How well it ranks tokens, measured against the scene.

    python extras/contrast.py                                 the warmed-up tiny model
    python extras/contrast.py --model out/tiny-srpo-seed0/checkpoint-000040 --task count
    python extras/contrast.py --draws 8                       the patch mask, drawn up to 8 times

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

With `--draws K` it asks instead how much of a contrast is the draw of the mask. A word is hidden
where more than half of its cell is masked. First comes the mean contrast of true and
false words, hidden and not, and three AUC under one mask: of hidden words above the others, and of
true words above false ones where both are hidden and where neither is. Then the figures above for
log-probs averaged over 1, 2, 4 ... K masks; each row uses all K draws, so that all are as certain.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import credit  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from script import exit_code  # noqa: E402
from torch import Tensor  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from corrupt import CORRUPTIONS  # noqa: E402
from data import CELLS, COLORS, SHAPES, Example, InputError  # noqa: E402
from srpo import Role, contrast_scores, parse_response, shared_baseline  # noqa: E402

LABELS = ("seen", "asked", "true", "needed")
COPULA = r"\W+(?:(?:is|has|a|an|the)\W+)*"  # as `parse_facts` reads a sentence
FACT = rf"\b({'|'.join(CELLS)}){COPULA}({'|'.join(COLORS)})\W+({'|'.join(SHAPES)})\b"
FACT = re.compile(FACT, re.IGNORECASE)


def labels(text: str, offsets, example: Example, hidden=None) -> dict[str, np.ndarray]:
    """For each of LABELS: 1 at tokens that should rank high, 0 at those below them, else -1.

    With `hidden`, a set of cells, also "hidden": 1 at words for the color or the shape in one of
    them, 0 at those for others.
    """
    found = {name: np.full(len(offsets), -1) for name in LABELS}
    if hidden is not None:
        found["hidden"] = np.full(len(offsets), -1)
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
        cell, color, shape = [word.lower() for word in match.groups()]
        words = ((color, match.span(2), COLORS), (shape, match.span(3), SHAPES))
        for word, span, kind in words:
            asked = any(argument in kind for argument in example.query.args)
            mark("seen", span, 1)
            mark("asked", span, int(asked))
            true = cell in scene and word in (scene[cell].color, scene[cell].shape)
            mark("true", span, int(true))
            if hidden is not None:
                mark("hidden", span, int(cell in hidden))
    start, end = blocks.reasoning
    for match in re.finditer(r"[^\s,]+", text[start:end]):
        span = (start + match.start(), start + match.end())
        says_what_was_seen = match[0].lower() not in (*CELLS, "so", "is")
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
        label = labels(text, offsets, example)
        for name in LABELS:
            area = auc(scores, label[name])
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


# ---- how much of a contrast is the draw of the mask

BY_MASK = ("true, hidden", "true, not", "false, hidden", "false, not")
BY_MASK += ("AUC hidden", "AUC true, hidden", "AUC true, not")


def hidden_cells(policy: model.Policy, batch: credit.Batch, args, step: int) -> list[set[str]]:
    """Of each prompt, the cells of which more than half is masked in the draw of a step."""
    stand_ins = []
    for example in batch.examples:
        width, height = policy.fit(example.images[0]).size
        black = np.zeros((height, width, 3), np.uint8)
        black[0] = 255  # so that the mean, which masked patches get, is neither
        stand_ins.append(replace(example, images=(Image.fromarray(black),)))
    found = []
    for masked in train.corrupted_copies(stand_ins, policy, args, step):
        pixels = np.asarray(masked.images[0])[..., 0]
        is_masked = (pixels > 0) & (pixels < 255)
        cells = set()
        for index, cell in enumerate(CELLS):
            row, column = divmod(index, 3)
            rows = np.array_split(is_masked, 3, axis=0)[row]
            if np.array_split(rows, 3, axis=1)[column].mean() > 0.5:
                cells.add(cell)
        found.append(cells)
    return found


def by_mask(batch: credit.Batch, delta: Tensor, hidden: list[set[str]], found: dict) -> None:
    """Add to `found`: contrasts of words, true and false, hidden and not; AUC of each response."""
    for row, (text, offsets) in enumerate(batch.responses):
        prompt = int(batch.rollout.prompt[row])
        scores = delta[row, : len(offsets)].numpy()
        label = labels(text, offsets, batch.examples[prompt], hidden[prompt])
        is_hidden = label["hidden"] == 1
        is_not = label["hidden"] == 0
        found["true, hidden"].extend(scores[is_hidden & (label["true"] == 1)])
        found["true, not"].extend(scores[is_not & (label["true"] == 1)])
        found["false, hidden"].extend(scores[is_hidden & (label["true"] == 0)])
        found["false, not"].extend(scores[is_not & (label["true"] == 0)])
        areas = {
            "AUC hidden": auc(scores, label["hidden"]),
            "AUC true, hidden": auc(scores, np.where(is_hidden, label["true"], -1)),
            "AUC true, not": auc(scores, np.where(is_not, label["true"], -1)),
        }
        for name, area in areas.items():
            if area is not None:
                found[name].append(area)


def mask_tables(policy: model.Policy, batch: credit.Batch, args, draws: int):
    """Two tables, each a list of (name, figures): of single masks, and of averages over several."""
    logp_blank = credit.blank_log_probs(policy, batch, args)
    args = argparse.Namespace(**{**vars(args), "corruption": "patch"})
    masked = []  # of each draw, log-probs [B, T]
    found = {name: [] for name in BY_MASK}
    for draw in range(draws):
        logp = credit.corrupted_log_probs(policy, batch, args, step=draw)
        delta = contrast_scores(batch.rollout.logp, logp, logp_blank, batch.roles)
        hidden = hidden_cells(policy, batch, args, step=draw)
        by_mask(batch, delta, hidden, found)
        masked.append(logp)
    single = [("one mask", {name: mean(np.array(values)) for name, values in found.items()})]
    averaged = []
    size = 1
    while size <= draws:
        parts = []
        for first in range(0, draws - size + 1, size):
            logp = torch.stack(masked[first : first + size]).mean(dim=0)
            parts.append(figures(batch, logp, logp_blank, args))
        figure = {name: mean(np.array([part[name] for part in parts])) for name in parts[0]}
        averaged.append((f"masks: {size}", figure))
        size *= 2
    return single, averaged


# ---- the command line


def options(argv: list[str]) -> tuple[argparse.Namespace, int | None]:
    """Those of train.py, and --draws."""
    parser = train.Parser(
        allow_abbrev=False,
        description="Is the contrast informative? How well it ranks tokens.",
        epilog=f"And of train.py: {credit.OPTIONS}",
    )
    count = train.number(int, 1, 10**6)
    parser.add_argument("--prompts", type=count, default=32, help="questions (default: 32)")
    powers = [2**k for k in range(11)]
    help = "of the patch mask, to be averaged: a power of two"
    parser.add_argument("--draws", type=int, choices=powers, help=help, metavar="K")
    mine, others = parser.parse_known_args(argv)
    if any(word.split("=")[0] == "--data" for word in others):
        raise InputError("--data: only drawn tasks have a scene to measure against")
    args = credit.resolve_options(["--device", "cpu", *others], credit.OPTIONS, "contrast.py")
    args.prompts = mine.prompts
    return args, mine.draws


def show(table, title: str) -> None:
    """Print the rows of a table as they come."""
    for number, (name, found) in enumerate(table):
        if number == 0:
            print(f"| {title} | {' | '.join(found)} |")
            print("|---" * (len(found) + 1) + "|")
        shown = [f"{x:.2f}" for x in found.values()]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


def measure(argv: list[str] | None) -> None:
    transformers.utils.logging.disable_progress_bar()
    if argv is None:
        argv = sys.argv[1:]
    args, draws = options(argv)
    train.build_weigh(args)  # one that fails does so now
    train.build_judge(args)
    policy = credit.load(args)
    examples = train.build_task(args).draw(args.prompts, (args.seed, 0, 5), held_out=False)
    batch = credit.sample(policy, examples, args, step=1)
    print(f"{args.task}, seed {args.seed}")
    if draws is None:
        show(rows(policy, batch, args), "corruption")
        return
    single, averaged = mask_tables(policy, batch, args, draws)
    show(single, "words")
    print()
    show(averaged, "patch")


def main(argv: list[str] | None = None) -> int:
    return exit_code(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
