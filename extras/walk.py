"""What the walkthrough looks for in a batch of responses of the tiny model, and in srpo.py."""

import inspect
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import pictures  # noqa: E402
import torch  # noqa: E402
from contrast import labels  # noqa: E402
from credit import Batch  # noqa: E402
from torch import Tensor  # noqa: E402

from data import TAGS, Example  # noqa: E402
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
    "grey": "destroys color (it has no strength),\nkeeps brightness, shape, text, places",
    "shuffle": "destroys where things are (no strength),\nkeeps the content of every patch",
    "pixelate": "destroys all that is finer than a patch\n(no strength), keeps mean colors, layout",
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


def roles_of_pieces(pieces: list[str]) -> Tensor:
    """[T], the roles of tokens that are given by their text, found as `train.py` finds them."""
    return token_roles(*text_and_offsets([piece.encode() for piece in pieces]))


def pieces_picture(pieces: list[str], roles: Tensor, title: str):
    """These tokens in the colors of their roles."""
    tokens = []
    for piece, role in zip(pieces, roles.tolist(), strict=True):
        tokens.append(pictures.Token(piece, Role(role)))
    return pictures.token_picture(tokens, title)


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
