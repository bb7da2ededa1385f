"""What the walkthrough looks for in a batch of responses of the tiny model, and in srpo.py."""

import inspect
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distribution  # noqa: E402
import numpy as np  # noqa: E402
import pictures  # noqa: E402
import study_tables  # noqa: E402
import torch  # noqa: E402
from contrast import labels  # noqa: E402
from credit import Batch  # noqa: E402
from torch import Tensor  # noqa: E402

from corrupt import CORRUPTIONS, corrupt  # noqa: E402
from data import CELLS, TAGS, Example  # noqa: E402
from srpo import (  # noqa: E402
    Role,
    parse_response,
    shared_baseline,
    text_and_offsets,
    token_roles,
)

# What each corruption destroys, and what it keeps.
WHAT = {
    "patch": "destroys everything inside a share p\nof the patches, and keeps the others",
    "noise": "destroys fine detail and faint contrasts,\nkeeps large shapes and strong colors",
    "blur": "destroys edges, texture, fine shape,\nkeeps colors, places, coarse layout",
    "grey": "destroys color, keeps brightness,\nshape, text, places",
    "shuffle": "destroys where things are,\nkeeps the content of every patch",
    "pixelate": "destroys all that is finer than a patch,\nkeeps mean colors, layout",
}
GRADED = ("patch", "noise", "blur")  # those that have a strength
# A response as Qwen2-VL's tokenizer splits it; and one whose perception holds nothing but a space.
QWEN = ["<", "per", "ception", ">a", " red", " dot", "</", "per", "ception", "><", "reason", "ing"]
QWEN += [">", "so", " one", "</", "reason", "ing", "><", "answer", ">", "1", "</", "answer", ">"]
EMPTY = ["<perception>", " ", "</perception><reasoning>", "so", " one", "</reasoning>"]
EMPTY += ["<answer>", "1", "</answer>"]
# The conditions of the study in plain words, by groups.
WIDE = "Limits 0.5 and 2"
GREY = "#8a8a8a"
STUDY = {
    "Limits 0.8 and 1.2": {
        "srpo": "SRPO as it is by default",
        "rlsd": "round where A < 0, fading (rlsd)",
    },
    "No limits": {"softmax": "softmax of the contrasts"},
    WIDE: {"range-0.5-2": "nothing else changed (range-0.5-2)"},
    f"{WIDE}, another corruption": {
        "corruption=noise": "noise",
        "corruption=blur": "blur",
        "corruption=grey": "grey",
        "corruption=shuffle": "patches shuffled",
        "corruption=pixelate": "pixelated",
        "p=0.3": "patch mask, p = 0.3",
        "p=1": "patch mask, p = 1",
    },
    f"{WIDE}, another contrast": {
        "contrast=absolute": "its absolute value",
        "contrast=k3": "a divergence, of one sample (k3)",
        "jensen-shannon": "a divergence, over all words",
        "corrupt_both=true": "corrupted image for reasoning, too",
        "standardized": "over its standard deviation",
        "standardized-tau-3": "the same with τ = 3",
        "role-standardized": "the same in each role",
    },
    f"{WIDE}, other weights": {
        "tau=0.3": "τ = 0.3",
        "tau=3": "τ = 3",
        "lam=0.5": "λ = 0.5",
        "normalize=false": "their mean is not made 1",
        "role_balanced=true": "b is the mean of the roles' means",
        "answer_is_reasoning=true": "the answer counts as reasoning",
    },
    f"{WIDE}, by the sign of A": {
        "sign_aware=true": "turned round where A < 0",
        "role-baselines+sign": "the same in each role",
        "positive-only": "weight 1 where A < 0",
    },
    f"{WIDE}, controls": {
        "shuffled": "weights at random places (shuffled)",
        "inverted": "the opposite emphasis",
        "perception-only": "weights in the perception alone",
        "reasoning-only": "weights in the reasoning alone",
        "role-baselines": "each role by itself",
        "roles-only": "one weight for each role",
        "pattern-only": "the weight over that of its role",
        "state-only": "the weight expected at this place",
        "token-only": "the weight over the expected one",
        "zero-mean": "the contrast less the expected one",
    },
    f"{WIDE}, another signal": {
        "entropy": "entropy instead of the contrast",
        "entropy-x-dependency": "entropy times contrast",
    },
}


def show(step: str, function) -> None:
    """The lines of a function that are marked with a step, as they stand in srpo.py."""
    lines = inspect.getsource(function).splitlines()
    marked = [line.strip() for line in lines if re.search(rf"#.*\b{step}\b", line)]
    assert marked, f"no line of {function.__name__} says {step}"
    for line in marked:
        print(line)


def example_of(batch: Batch, row: int) -> Example:
    """The question that a response answers."""
    return batch.examples[int(batch.rollout.prompt[row])]


def is_true(batch: Batch, row: int) -> np.ndarray:
    """Of each token: 1 where it states a color or a shape rightly, 0 where wrongly, else -1."""
    text, offsets = batch.responses[row]
    return labels(text, offsets, example_of(batch, row))["true"]


def made_up(batch: Batch, row: int) -> list[int]:
    """Indices of the tokens that misstate a color or a shape."""
    return np.flatnonzero(is_true(batch, row) == 0).tolist()


def first_group(batch: Batch, group_size: int) -> tuple[range, int, int]:
    """The rows of a group, and in it a right and a wrong response with a word that was made up."""
    for start in range(0, len(batch.A), group_size):
        group = range(start, start + group_size)
        telling = [row for row in group if made_up(batch, row)]
        right = [row for row in telling if batch.verdicts[row].accuracy == 1]
        wrong = [row for row in telling if batch.verdicts[row].accuracy == 0]
        if right and wrong:
            return group, right[0], wrong[0]
    raise LookupError("no group has a right and a wrong response with a word that was made up")


def tokens_of(batch: Batch, row: int) -> tuple[list[str], list[int]]:
    """Text and role of each token, EOS too."""
    text, offsets = batch.responses[row]
    count = int(batch.rollout.mask[row].sum())
    return pictures.token_texts(text, offsets, count), batch.roles[row, :count].tolist()


def in_short(batch: Batch, row: int) -> str:
    """Perception and answer of a response in one line, made-up words with a star."""
    text, offsets = batch.responses[row]
    blocks = parse_response(text, TAGS)
    if blocks is None:
        return "(malformed)"
    false = made_up(batch, row)
    said = ""
    for t, (start, end) in enumerate(offsets):
        if blocks.perception[0] <= start < blocks.perception[1]:
            said += text[start:end]
            if t in false:
                said += "*"
    return f"{said} -> {text[slice(*blocks.answer)].strip()}"


def print_group(batch: Batch, group: range) -> None:
    """The question of these rows, and what they say."""
    example = example_of(batch, group[0])
    print(f"{example.question} (right answer: {example.answer})")
    print("In the image:", ", ".join(str(fact) for fact in example.scene))
    print("\nreward      A   perception (* made up), and the answer")
    for row in group:
        reward = batch.verdicts[row].reward
        print(f"{reward:6.2f}  {batch.A[row]:+.2f}  {in_short(batch, row)}")


def roles_of_pieces(pieces: list[str]) -> Tensor:
    """[T], the roles of tokens that are given by their text, found as `train.py` finds them."""
    return token_roles(*text_and_offsets([piece.encode() for piece in pieces]))


def pieces_picture(pieces: list[str], roles: Tensor, title: str):
    """These tokens in the colors of their roles."""
    tokens = []
    for piece, role in zip(pieces, roles.tolist(), strict=True):
        tokens.append(pictures.Token(piece, Role(role)))
    return pictures.token_picture(tokens, title)


def corrupted_rows(image, patch: int) -> tuple[list, list[str]]:
    """The image under every corruption, and the heads, as `pictures.image_table` takes them."""
    strengths = (0.3, 0.6, 1.0)
    rows = []
    for kind in CORRUPTIONS:
        shown = [corrupt(image, kind, patch=patch, p=p, seed=0) for p in strengths]
        if kind in GRADED:
            shown = [image, *shown, None]
        else:
            shown = [image, None, None, None, shown[0]]
        rows.append((f"{kind}\n{WHAT[kind]}", shown))
    return rows, ["original", *(f"p = {p}" for p in strengths), "no strength"]


def hit_patches(image, corrupted, side: int) -> np.ndarray:
    """Of each visual token of 2 x 2 patches, how many were painted over, row by row."""
    changed = (np.asarray(image) != np.asarray(corrupted)).any(axis=2)  # [H, W]
    rows = image.height // side
    columns = image.width // side
    patches = changed.reshape(rows, side, columns, side).any(axis=(1, 3))
    return patches.reshape(rows // 2, 2, columns // 2, 2).sum(axis=(1, 3))


def other_context(batch: Batch, row: int, logp_corrupted: Tensor, logp_blank: Tensor) -> list:
    """The log-prob that each token is compared with in steps 2 and 3; None where with none."""
    count = int(batch.rollout.mask[row].sum())
    found = []
    for t in range(count):
        if batch.roles[row, t] == Role.PERCEPTION:
            found.append(logp_corrupted[row, t].item())
        elif batch.roles[row, t] == Role.REASONING:
            found.append(logp_blank[row, t].item())
        else:
            found.append(None)
    return found


def words(batch: Batch, delta: Tensor, w: Tensor, A_hat: Tensor) -> dict[tuple, Tensor]:
    """Contrast, weight, A and A_hat, [n, 4], of true and made-up words, by the sign of A."""
    found = {}
    for sign in ("A > 0", "A < 0"):
        for word in ("true", "made up"):
            found[sign, word] = []
    for row, A in enumerate(batch.A):
        if A == 0:
            continue
        sign = "A < 0"
        if A > 0:
            sign = "A > 0"
        for t, true in enumerate(is_true(batch, row)):
            numbers = torch.stack([delta[row, t], w[row, t], A, A_hat[row, t]])
            if true == 1:
                found[sign, "true"].append(numbers)
            elif true == 0:
                found[sign, "made up"].append(numbers)
    return {key: torch.stack(numbers) for key, numbers in found.items() if numbers}


def credit_bars(batch: Batch, row: int, delta: Tensor, w: Tensor, A_hat: Tensor, title: str):
    """Contrasts, weights and advantages of a response; words that were made up are hatched."""
    texts, roles = tokens_of(batch, row)
    count = len(texts)
    b = shared_baseline(delta, batch.roles)[row].item()
    rows = [
        pictures.Bars("Δ", delta[row, :count].tolist(), 0.0, {"b": b}),
        pictures.Bars("w", w[row, :count].tolist(), 1.0),
        pictures.Bars("Â", A_hat[row, :count].tolist(), 0.0, {"A": batch.A[row].item()}),
    ]
    return pictures.bars_under_tokens(texts, roles, rows, title, made_up(batch, row))


# ---- numbers in rows

# Made-up log-probs of a response, without its tags: red dot so one 1 EOS.
WORDS = ("red", "dot", "so", "one", "1", "EOS")
NONE = math.nan  # is not read
BY_HAND = {
    "role": torch.tensor([[1, 1, 2, 2, 0, 0]]),
    "as sampled": torch.tensor([[-0.20, -0.10, -0.30, -0.20, -0.10, -0.10]]),
    "corrupted image": torch.tensor([[-1.20, -0.75, NONE, NONE, NONE, NONE]]),
    "without perception": torch.tensor([[NONE, NONE, -0.40, -0.95, NONE, NONE]]),
}


def print_rows(rows: dict[str, Tensor]) -> None:
    """Numbers [1, T] under WORDS: roles as letters; gaps for NaN, and for b and w̃ where no role."""
    print(f"{'':18}" + "".join(f"{word:>7}" for word in WORDS))
    for name, numbers in rows.items():
        line = f"{name:18}"
        for role, number in zip(rows["role"][0], numbers[0].tolist(), strict=True):
            shown = f"{number:.2f}"
            if name == "role":
                shown = "-PR"[number]
            elif math.isnan(number) or (name in ("b", "w̃") and role == Role.OTHER):
                shown = ""
            line += f"{shown:>7}"
        print(line.rstrip())


def print_shares(relative: Tensor) -> None:
    """How many weights lie at a limit, for numbers delta - b."""
    print("share of the weights at a limit, by limits and tau:")
    for w_min, w_max in ((0.8, 1.2), (0.5, 2.0), (0.1, 10.0)):
        line = f"{w_min} and {w_max}".ljust(15)
        for tau in (0.3, 1, 3, 10):
            share = distribution.share_at_limit(relative / tau, w_min, w_max)
            line += f"tau {tau}: {share:4.0%}".ljust(18)
        print(line.rstrip())


def print_figures(models: dict[str, dict[str, float]]) -> None:
    """Figures of `distribution.figures`, a column for each model."""
    print(f"{'':38}" + "".join(f"{name:>13}" for name in models))
    for name in next(iter(models.values())):
        print(f"{name:38}" + "".join(f"{found[name]:13.2f}" for found in models.values()))


def spreads(models: dict[str, dict]) -> list[tuple]:
    """Contrasts of each model and role at 5, 50 and 95 %, as `pictures.intervals` takes them."""
    rows = []
    for model, found in models.items():
        for name, role in distribution.ROLES.items():
            low, middle, high = [found[f"delta of {name}, {percent} %"] for percent in (5, 50, 95)]
            rows.append((f"{model}, {name}", low, middle, high, pictures.COLORS[role]))
    return rows


# ---- another perception


def partner(batch: Batch, row: int, same_question: bool) -> int | None:
    """The next response whose perception has as many tokens, but other ones; None without any."""
    P = batch.roles == Role.PERCEPTION
    ids = batch.rollout.ids
    prompt = batch.rollout.prompt
    count = int(P[row].sum())
    for ahead in range(1, len(ids)):
        other = (row + ahead) % len(ids)
        if (prompt[other] == prompt[row]) != same_question or P[other].sum() != count:
            continue
        if count > 0 and not torch.equal(ids[other, P[other]], ids[row, P[row]]):
            return other
    return None


def exchanged(batch: Batch, same_question: bool):
    """The rollout with the perceptions of partners in the place of its own, and which rows, [B]."""
    P = batch.roles == Role.PERCEPTION
    ids = batch.rollout.ids.clone()
    has_partner = torch.zeros(len(ids), dtype=torch.bool)
    for row in range(len(ids)):
        other = partner(batch, row, same_question)
        if other is not None:
            ids[row, P[row]] = batch.rollout.ids[other, P[other]]
            has_partner[row] = True
    return replace(batch.rollout, ids=ids), has_partner


def kind_of(word: str) -> str:
    """What a word of the tiny model's reasoning is."""
    if word in CELLS:
        return "name of a cell"
    if word in ("no", "so"):
        return f'"{word}"'
    if word.isdigit():
        return "result"
    return "color or shape"


def by_kind(batch: Batch, delta: Tensor, rows: Tensor) -> dict[str, float]:
    """Mean contrast of the reasoning in these rows, by the kind of word."""
    found = {}
    for row in rows.nonzero()[:, 0].tolist():
        texts, roles = tokens_of(batch, row)
        for t, (text, role) in enumerate(zip(texts, roles, strict=True)):
            if role == Role.REASONING:
                found.setdefault(kind_of(text.strip()), []).append(delta[row, t].item())
    return {kind: float(np.mean(numbers)) for kind, numbers in found.items()}


def print_kinds(found: dict[str, dict[str, float]]) -> None:
    """A row for each kind of word, a column for each perception."""
    print(f"{'mean Δ':20}" + "".join(f"{name:>22}" for name in found))
    for kind in next(iter(found.values())):
        line = f"{kind:20}"
        for numbers in found.values():
            line += f"{round(numbers[kind], 2) + 0.0:22.2f}"  # no -0.0
        print(line)


# ---- the study


def of_condition(part: study_tables.Part, condition: str) -> tuple:
    """(low, middle, high) of the difference to GRPO, in accuracy and in grounded."""
    found = []
    for outcome in ("accuracy", "grounded"):
        apart = part.differences(condition, outcome)  # of each task, of all seeds
        low, high = study_tables.bounds(apart)
        found.append((low, float(study_tables.iqm(*apart)), high))
    return tuple(found)


def study_rows(part: study_tables.Part) -> list[pictures.Compared]:
    """All conditions under the titles of their groups; grey where there are fewer than 30 pairs."""
    rows = []
    for title, conditions in STUDY.items():
        rows.append(pictures.Compared(title))
        for condition, words in conditions.items():
            pairs = sum(len(seeds) for seeds in part.shared(condition))
            color = "black"
            if pairs < 30:
                color = GREY
            rows.append(pictures.Compared(words, pairs, of_condition(part, condition), color))
    return rows


def study_line(recorded: list[dict], condition: str) -> str:
    """What `study_rows` draws of a condition, as text."""
    recorded = [row for row in recorded if row["regime"] == "default" and row["seed"] < 10]
    found = of_condition(study_tables.Part(recorded), condition)
    said = []
    for outcome, (low, middle, high) in zip(("accuracy", "grounded"), found, strict=True):
        said.append(f"{outcome} {middle:+.3f} [{low:+.3f}, {high:+.3f}]")
    return ", ".join(said)


def study_picture(recorded: list[dict]):
    """A forest plot of all conditions; the lines are `range-0.5-2` on 30 pairs and on 15."""
    recorded = [row for row in recorded if row["regime"] == "default"]
    part = study_tables.Part([row for row in recorded if row["seed"] < 10])
    few = study_tables.Part([row for row in recorded if row["seed"] < 5])
    lines = []
    for color, some in (("black", part), (GREY, few)):
        middles = [found[1] for found in of_condition(some, "range-0.5-2")]
        lines.append((color, *middles))
    rows = study_rows(part)
    first = [row.label for row in rows].index(WIDE) + 1
    heads = ["accuracy minus GRPO's", "grounded minus GRPO's"]
    return pictures.forest(rows, heads, (-0.11, 0.05), lines, first)
