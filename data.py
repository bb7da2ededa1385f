"""Tasks whose evidence has a ground truth, their verifier, and your own data from a JSON-lines file.

A drawn task shows a 3 x 3 grid of cells a1 .. c3 (columns a to c from the left, rows 1 to 3 from the top)
with a few colored shapes. The scene is known, so one can check not only the answer but also what the response
says it *saw*. An example of each task, with a perfect response:

    lookup   What color is at b2?       <perception> a1 red circle, b2 blue square</perception>
                                        <reasoning> b2 is blue</reasoning>
                                        <answer> blue</answer>
    count    How many red?              <reasoning> a1 red b2 no so 1</reasoning>                         1
    compare  More blue or more circle?  <reasoning> a1 no b2 blue so 1, a1 circle b2 no so 1</reasoning>  same
    add      How many blue plus circle? <reasoning> a1 no b2 blue so 1, a1 circle b2 no so 1</reasoning>  2

The reward, 0.9 accuracy + 0.1 format, never looks at the perception: SRPO changes the credit, not the reward.
"""

import hashlib
import io
import json
import math
import re
import runpy
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from corrupt import open_image
from srpo import Tags, parse_response

COLORS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (235, 200, 40)}
SHAPES = ("circle", "square", "triangle")
CELLS = tuple(column + row for row in "123" for column in "abc")
TASKS = ("lookup", "count", "compare", "add")
MARK = "<image>"  # in a question: an image goes here; without marks, all go in front
HINT = (
    "The image is a grid of 3 columns a, b, c from left to right and 3 rows 1, 2, 3 from top to bottom. In "
    "the perception list every object as its cell, color and shape, like: a1 red circle, c2 blue square. "
    f"Colors: {', '.join(COLORS)}."
)
TAGS = Tags()
INSTRUCTION = (
    f"Reply in exactly this form: <{TAGS.perception}>what you see that matters</{TAGS.perception}>"
    f"<{TAGS.reasoning}>how the answer follows from it</{TAGS.reasoning}>"
    f"<{TAGS.answer}>the answer alone</{TAGS.answer}>"
)


class InputError(ValueError):
    """Something the user can put right. `train.py` prints it as one line and exits with code 2."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True)
class Fact:
    cell: str
    color: str
    shape: str

    def __str__(self):
        return f"{self.cell} {self.color} {self.shape}"


@dataclass(frozen=True)
class Query:
    """What is asked: `args` is a cell for lookup, one color or shape for count, two for the others."""

    task: str
    args: tuple[str, ...]

    def text(self) -> str:
        x, y = (self.args * 2)[:2]
        texts = {"lookup": f"What color is at {x}?", "count": f"How many {x}?"}
        return (texts | {"compare": f"More {x} or more {y}?", "add": f"How many {x} plus {y}?"})[self.task]

    def evidence(self, facts: Iterable[Fact]) -> tuple[frozenset, ...]:
        """All that the answer depends on: for each argument, the things in the scene that bear on it."""
        facts = list(facts)
        if self.task == "lookup":
            return (frozenset(f.color for f in facts if f.cell == self.args[0]),)
        return tuple(frozenset(f.cell for f in facts if arg in (f.color, f.shape)) for arg in self.args)

    def solve(self, facts: Iterable[Fact]) -> str | None:
        """The answer that follows from `facts`, right or wrong; None when they do not settle it."""
        evidence = self.evidence(facts)
        counts = [len(e) for e in evidence]
        if self.task == "lookup":
            return next(iter(evidence[0])) if counts[0] == 1 else None
        if self.task == "compare":
            return "same" if counts[0] == counts[1] else self.args[counts[0] < counts[1]]
        return str(sum(counts))

    def reasoning(self, facts: Sequence[Fact]) -> str:
        if self.task == "lookup":
            return f" {self.args[0]} is {self.solve(facts)}"
        parts = []
        for arg, cells in zip(self.args, self.evidence(facts), strict=True):
            marks = [f" {f.cell} {arg if f.cell in cells else 'no'}" for f in facts]
            parts.append("".join(marks) + f" so {len(cells)}")
        return ",".join(parts)


@dataclass(frozen=True)
class Example:
    """One question. Drawn tasks know `scene` and `query`; `source` names file and line of a user's row."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    scene: tuple[Fact, ...] | None = None
    query: Query | None = None
    hint: str = ""
    source: str = ""


def draw_scene(scene: Sequence[Fact], size: int, rng: np.random.Generator) -> Image.Image:
    """A scene, size x size pixels; place, radius, shade and background vary a little from draw to draw."""
    image = Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(225, 250, 3)))
    draw, cell = ImageDraw.Draw(image), size / 3
    for fact in scene:
        column, row = "abc".index(fact.cell[0]), "123".index(fact.cell[1])
        x, y = (np.array([column, row]) + 0.5 + rng.uniform(-0.06, 0.06, 2)) * cell
        r = cell * rng.uniform(0.32, 0.40)
        fill = tuple(int(v) for v in np.clip(np.array(COLORS[fact.color]) + rng.integers(-15, 16, 3), 0, 255))
        if fact.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif fact.shape == "square":
            draw.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=fill)
        else:
            draw.polygon([(x, y - r), (x + r, y + r * 0.9), (x - r, y + r * 0.9)], fill=fill)
    return image


def is_held_out(scene: Sequence[Fact]) -> bool:
    """One scene in ten belongs to the evaluation, by its content: no scene is ever in both splits."""
    return hashlib.sha256(";".join(map(str, scene)).encode()).digest()[0] % 10 == 0


def draw_example(task: str, rng, *, held_out: bool, size: int, objects: tuple[int, int]) -> Example:
    """An example of `task`, from training or held-out scenes, with `objects` = (fewest, most) shapes."""
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    while True:
        n = int(rng.integers(objects[0], objects[1] + 1))
        args = tuple(str(a) for a in rng.choice([*COLORS, *SHAPES], 2, replace=False))
        args = args[: 1 if task == "count" else 2]
        match = [k for k in kinds if args[0] in k]
        other = [k for k in kinds if args[0] not in k]
        wanted = int(rng.integers(1, n + 1))  # so that no count is much more common than another
        pools = [kinds] * n if task == "lookup" else [match] * wanted + [other] * (n - wanted)
        cells = sorted(int(c) for c in rng.permutation(len(CELLS))[:n])
        pools = [pools[i] for i in rng.permutation(n)]
        facts = zip(cells, pools, strict=True)
        scene = tuple(Fact(CELLS[c], *pool[rng.integers(len(pool))]) for c, pool in facts)
        if task == "lookup":
            args = (str(rng.choice([f.cell for f in scene])),)
        query = Query(task, args)
        if is_held_out(scene) == held_out and all(query.evidence(scene)):  # there is something to see
            image = draw_scene(scene, size, rng)
            return Example((image,), query.text(), str(query.solve(scene)), scene, query, hint=HINT)


class DrawnTask:
    """Endless batches and a fixed held-out set of one task. Batch k depends on the seed and k alone."""

    def __init__(self, task: str, *, seed: int = 0, size: int = 48, objects: tuple[int, int] = (3, 4)):
        self.task, self.seed, self.size, self.objects = task, seed, size, objects

    def train_batch(self, step: int, n: int) -> list[Example]:
        return self.draw(n, (self.seed, step, 1), held_out=False)

    def eval_set(self, n: int) -> list[Example]:
        return self.draw(n, (0, 0, 2), held_out=True)  # of every seed: runs are compared on the same examples

    def draw(self, n: int, key: tuple[int, ...], held_out: bool) -> list[Example]:
        """n examples that depend on `key` alone."""
        rng, options = np.random.default_rng(key), {"size": self.size, "objects": self.objects}
        return [draw_example(self.task, rng, held_out=held_out, **options) for _ in range(n)]


def respond(perception: str, reasoning: str, answer: str) -> str:
    """Text of a well-formed response."""
    blocks = zip((TAGS.perception, TAGS.reasoning, TAGS.answer), (perception, reasoning, answer), strict=True)
    return "\n".join(f"<{tag}>{text}</{tag}>" for tag, text in blocks)


def demonstrate(example: Example, noise: float, rng: np.random.Generator) -> str:
    """A response to imitate in which every color and every shape is misstated with probability `noise`.

    Reasoning and answer follow from what is stated, not from the image: consistent, and seeing things.
    """

    def misstate(word: str, words: Iterable[str]) -> str:
        return str(rng.choice([w for w in words if w != word])) if rng.random() < noise else word

    stated = [Fact(f.cell, misstate(f.color, COLORS), misstate(f.shape, SHAPES)) for f in example.scene]
    perception = " " + ", ".join(map(str, stated))
    return respond(perception, example.query.reasoning(stated), f" {example.query.solve(stated)}")


@dataclass(frozen=True)
class Verdict:
    """What is true of one response, each in [0, 1]; the last three are None where the scene is not known."""

    reward: float  # 0.9 accuracy + 0.1 format
    accuracy: float  # the answer is right
    format: float  # exactly the three blocks, in order, none of them blank
    perception: float | None = None  # F1 of the stated facts against the scene
    grounded: float | None = None  # right, and all the evidence that it rests on is stated rightly
    consistent: float | None = None  # the answer follows from what is stated, right or wrong


def averages(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Mean of each figure over the responses; None where the scene is unknown."""
    columns = {f.name: [getattr(v, f.name) for v in verdicts] for f in fields(Verdict)}
    return {name: None if None in column else float(np.mean(column)) for name, column in columns.items()}


def verify(text: str, example: Example, match=None) -> Verdict:
    """Check a response against its example. Nothing but answer and format enters the reward. `match` says of
    (given, truth) whether the answer is the true one, by default `answers_match`."""
    match = match or answers_match
    blocks = parse_response(text, TAGS)
    spans = (blocks.perception, blocks.reasoning, blocks.answer) if blocks else ()
    well_formed = float(bool(spans) and all(text[a:b].strip() for a, b in spans))
    answer = extract_answer(text)
    accuracy = float(answer is not None and (match(answer, example.answer) or chosen(answer, example)))
    reward = 0.9 * accuracy + 0.1 * well_formed
    if example.scene is None:
        return Verdict(reward, accuracy, well_formed)
    stated, true = parse_facts(text[slice(*blocks.perception)]) if blocks else set(), set(example.scene)
    f1 = 2 * len(stated & true) / (len(stated) + len(true))
    once = len({f.cell for f in stated}) == len(stated)  # a cell stated twice, once right, is no evidence
    seen = blocks and once and example.query.evidence(stated) == example.query.evidence(true)
    follows = stated and answers_match(answer, example.query.solve(stated) or "")
    return Verdict(reward, accuracy, well_formed, f1, accuracy * bool(seen), float(bool(follows)))


def reward_from(place: str):
    """What --reward FILE.py:NAME takes for `verify`: a function (text, example) -> float, or -> Verdict.
    Raises InputError where it is missing, fails, or its number is not finite."""
    file, _, name = place.rpartition(":")
    try:
        function = runpy.run_path(file)[name]
    except Exception as error:  # whatever the file does
        raise InputError(f"--reward {place}: no such function FILE.py:NAME ({first_line(error)})") from None

    def judge(text: str, example: Example) -> Verdict:
        try:
            found = function(text, example)
            if not isinstance(found, Verdict):
                found = replace(verify(text, example), reward=float(found))
            assert math.isfinite(found.reward), f"{found.reward} is not finite"
            return found
        except Exception as error:
            said = f"{type(error).__name__}, {first_line(error)}"
            raise InputError(f"--reward {place}: {said}; {example.source or example.question}") from None

    return judge


def extract_answer(text: str) -> str | None:
    """Text of the only answer block, or what is \\boxed in it, also when the rest is malformed; else None."""
    opening, closing = f"<{TAGS.answer}>", f"</{TAGS.answer}>"
    start, end = text.find(opening), text.find(closing)
    if text.count(opening) != 1 or text.count(closing) != 1 or end < start:
        return None
    return unboxed(text[start + len(opening) : end])


def unboxed(text: str) -> str:
    """Content of the last \\boxed{...}, or the whole text without one, or with one that is never closed."""
    depth, start = 0, text.rfind("\\boxed{")
    for i in range(start, len(text) if start >= 0 else start):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and depth == 0:
            return text[start + len("\\boxed{") : i].strip()
    return text.strip()


def chosen(answer: str, example: Example) -> bool:
    """Multiple choice: where B is true, "B", "(B)", "B. 12 cm", or what the question lists after B."""
    letter = re.fullmatch(r"\(?([A-J])\)?\.?|\(?([A-J])[).:]\s*\S.*", example.answer.strip())
    if not letter:
        return False
    truth, form = letter[1] or letter[2], r"(?:(?:option|choice) )?\(?([A-Ja-j])(?:[).:](?:\s.*)?)?"
    if said := re.fullmatch(form, answer.strip(), re.DOTALL | re.IGNORECASE):
        return said[1].upper() == truth
    listed = dict(re.findall(r"^\s*\(?([A-J])[).:]\s*(\S.*?)\s*$", example.question, re.MULTILINE))
    return truth in listed and answers_match(answer, listed[truth])


def answers_match(given: str, truth: str) -> bool:
    """Numbers are equal as numbers (3 = 3.0, 1,000 = 1000, 1/2 = 0.5), all else as words without case.

    White space, quotes, brackets around the whole, `*` of markdown and the marks that end a sentence do not
    count; signs, units and symbols do: -5 cm is not 5 cm, and < is not >.
    """
    given, truth = _bare(given), _bare(truth)
    numbers = _number(given), _number(truth)
    return numbers[0] == numbers[1] if None not in numbers else given == truth != ""


def _bare(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).casefold().replace("\u2212", "-").split())
    bare = text.strip(" ,;:!?\"'`*\u201c\u201d\u2018\u2019\u3002\uff0c\uff01\uff1f")
    bare = re.sub(r"^\.+(?!\d)", "", bare).rstrip(" .,;:!?")
    pairs = ("()", "[]", "{}", '""', "''")
    if len(bare) > 1 and bare[0] + bare[-1] in pairs and not re.search(r"[][(){}]", bare[1:-1]):
        bare = bare[1:-1]
    return text if bare == text else _bare(bare)


def _number(text: str) -> Fraction | None:
    digits = r"[+-]?(\d{1,3}(,\d{3})+|\d{1,30})?(\.\d{1,30}|/0*[1-9]\d{0,29})?"
    if not re.fullmatch(digits, text) or not re.search(r"\d", text) or re.match(r"[+-]?/", text):
        return None
    return Fraction(text.replace(",", ""))


def parse_facts(text: str) -> set[Fact]:
    """The facts stated in a perception: cell, color, shape, in any sentence that has them in this order."""
    cell, color, shape = ("|".join(words) for words in (CELLS, COLORS, SHAPES))
    form = rf"\b({cell})\W+(?:(?:is|has|a|an|the)\W+)*({color})\W+({shape})\b"
    return {Fact(*map(str.lower, found)) for found in re.findall(form, text, re.IGNORECASE)}


class OwnTask:
    """Your own rows of images, question and answer from a JSON-lines file, a tenth of the images held out.

    The split goes by a hash of the images' bytes, and images that share a row stay together: no image is in
    both parts, under whatever name. All are decoded at the start: a broken one is reported in the first
    minute and not in the fifth hour. With `everything` all rows are held out: nothing is to train.
    """

    def __init__(self, path: str | Path, seed: int = 0, everything: bool = False):
        self.path, self.seed = Path(path), seed
        rows = self._rows()
        digests = [{hashlib.sha256(file).digest() for file in self._load(row)[1]} for row in rows]
        images = sorted(set().union(*digests))
        held_out = set(images if everything else images[: max(1, len(images) // 10)])
        while more := {d for row in digests if row & held_out for d in row - held_out}:
            held_out |= more
        self._eval = [row for row, d in zip(rows, digests, strict=True) if d & held_out]
        self._train = [row for row, d in zip(rows, digests, strict=True) if not d & held_out]
        if not self._train and not everything:
            raise InputError(f"--data {path}: needs rows with at least two different images, one to hold out")

    def train_batch(self, step: int, n: int) -> list[Example]:
        """Batch `step` of an endless stream: each epoch is a permutation of all rows, drawn from the seed."""
        size, positions = len(self._train), range(step * n, (step + 1) * n)
        epochs = {p // size for p in positions}
        order = {epoch: np.random.default_rng((self.seed, epoch)).permutation(size) for epoch in epochs}
        return [self._load(self._train[order[p // size][p % size]])[0] for p in positions]

    def eval_set(self, n: int) -> list[Example]:
        return [self._load(row)[0] for row in self._eval[:n]]

    def _rows(self) -> list[tuple]:
        """(names of the images, question, answer, source) of each line."""
        try:
            lines = self.path.read_text(encoding="utf-8-sig").split("\n")  # splitlines cuts at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--data {self.path}: cannot be read as UTF-8 text ({error})") from None
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{self.path}:{number}"
            try:
                row = json.loads(line)
                images = row["images"] if "images" in row else [row["image"]]
                question, answer = row["question"], row["answer"]
                if not isinstance(images, list) or not images or isinstance(answer, list | dict | None):
                    raise TypeError
                if not all(isinstance(text, str) and text.encode() for text in (question, *images)):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                wanted = "one JSON object with image (or a list of images), question and answer"
                raise InputError(f"{source}: expected {wanted}, got {line[:60]!r}") from None
            if re.search(r"<\|(image|video)_pad\|>", question):
                raise InputError(f"{source}: take the image placeholder out; write <image>, or nothing")
            if (n := question.count(MARK)) not in (0, len(images)):
                raise InputError(f"{source}: {n} {MARK} marks, {len(images)} images; give as many or none")
            answer = unboxed(str(answer))
            if not answers_match(answer, answer):
                raise InputError(f"{source}: the answer {answer!r} is blank, so no response could be right")
            rows.append((tuple(images), question, answer, source))
        if not rows:
            raise InputError(f"--data {self.path}: the file is empty; it needs one JSON object a line")
        return rows

    def _load(self, row: tuple) -> tuple[Example, list[bytes]]:
        """The example of a row, and its images' files."""
        names, question, answer, source = row
        images, files = [], []
        for name in names:
            try:
                files.append((self.path.parent / name).read_bytes())
                images.append(open_image(io.BytesIO(files[-1])))
            except FileNotFoundError:
                said = f"image {name} does not exist (paths are relative to the data file)"
                raise InputError(f"{source}: {said}") from None
            except Exception as error:  # decoders raise nearly anything on damaged files
                raise InputError(f"{source}: image {name} cannot be decoded ({error})") from None
        return Example(tuple(images), question, answer, source=source), files
