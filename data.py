"""Tasks whose evidence has a ground truth, their verifiers, and your own data from a JSON-lines file.

A drawn task shows a 3 x 3 grid of cells a1 .. c3 (columns a to c from the left, rows 1 to 3 from the top) with a few
coloured shapes, and asks about them. Because the scene is known, one can check not only the answer but also what the
response says it *saw*. One example of each task, with a perfect response:

    lookup   What color is at b2?           <perception> a1 red circle, b2 blue square</perception>
                                            <reasoning> b2 is blue</reasoning>
                                            <answer> blue</answer>
    count    How many red?                  <reasoning> a1 red b2 no so 1</reasoning>                         1
    compare  More blue or more circle?      <reasoning> a1 no b2 blue so 1, a1 circle b2 no so 1</reasoning>  same
    add      How many blue plus circle?     <reasoning> a1 no b2 blue so 1, a1 circle b2 no so 1</reasoning>  2

The reward is 0.9 accuracy + 0.1 format. It never looks at the perception: SRPO changes the credit, not the reward.
"""

import hashlib
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from srpo import Tags, parse_response

COLORS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (235, 200, 40)}
SHAPES = ("circle", "square", "triangle")
CELLS = tuple(column + row for row in "123" for column in "abc")
TASKS = ("lookup", "count", "compare", "add")
MARK = "<image>"  # in a question: an image goes here; without marks, all go in front
REWARD_ACCURACY, REWARD_FORMAT = 0.9, 0.1
HINT = (
    "The image is a grid of 3 columns a, b, c from left to right and 3 rows 1, 2, 3 from top to bottom. In the perception "
    "list every object as its cell, color and shape, like: a1 red circle, c2 blue square. Colors: " + ", ".join(COLORS) + "."
)


class InputError(ValueError):
    """Something the user can put right. `train.py` prints it as one line and exits with code 2."""


@dataclass(frozen=True)
class Fact:
    cell: str
    color: str
    shape: str

    def __str__(self):
        return f"{self.cell} {self.color} {self.shape}"


@dataclass(frozen=True)
class Query:
    """What is asked: `args` is a cell for lookup, one attribute (a color or a shape) for count, two for the others."""

    task: str
    args: tuple[str, ...]

    def text(self) -> str:
        x, y = (self.args * 2)[:2]
        return {
            "lookup": f"What color is at {x}?",
            "count": f"How many {x}?",
            "compare": f"More {x} or more {y}?",
            "add": f"How many {x} plus {y}?",
        }[self.task]

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
    """One question. `scene` and `query` are known for drawn tasks only; `source` names file and line of a user's row."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    scene: tuple[Fact, ...] | None = None
    query: Query | None = None
    hint: str = ""
    source: str = ""


# ---------------------------------------------------------------------------------------------------------- drawn tasks


def draw_scene(scene: Sequence[Fact], size: int, rng: np.random.Generator) -> Image.Image:
    """Picture of a scene, size x size pixels; place, radius, shade and background vary a little from draw to draw."""
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
    """One scene in ten belongs to the evaluation, by its content: no scene, however often drawn, is in both splits."""
    return hashlib.sha256(";".join(map(str, scene)).encode()).digest()[0] % 10 == 0


def draw_example(task: str, rng: np.random.Generator, *, held_out: bool, size: int = 48, objects=(3, 4)) -> Example:
    """One example of `task`, from the training or the held-out scenes, with `objects` = (fewest, most) shapes."""
    while True:
        n = int(rng.integers(objects[0], objects[1] + 1))
        attributes = [*COLORS, *SHAPES]
        args = tuple(str(a) for a in rng.choice(attributes, 2, replace=False))[: 1 if task == "count" else 2]
        kinds = [(color, shape) for color in COLORS for shape in SHAPES]
        match = [k for k in kinds if args[0] in k]
        other = [k for k in kinds if args[0] not in k]
        wanted = int(rng.integers(1, n + 1))  # so that no count is much more common than another
        pools = [kinds] * n if task == "lookup" else [match] * wanted + [other] * (n - wanted)
        cells = sorted(int(c) for c in rng.permutation(len(CELLS))[:n])
        pools = [pools[i] for i in rng.permutation(n)]
        scene = [Fact(CELLS[c], *pool[rng.integers(len(pool))]) for c, pool in zip(cells, pools, strict=True)]
        if task == "lookup":
            args = (str(rng.choice([f.cell for f in scene])),)
        query = Query(task, args)
        if is_held_out(scene) == held_out and all(query.evidence(scene)):  # every question has something to see
            break
    image = draw_scene(scene, size, rng)
    return Example((image,), query.text(), str(query.solve(scene)), tuple(scene), query, hint=HINT)


class DrawnTask:
    """Endless training batches and a fixed held-out set of one task. Batch k depends on the seed and k alone."""

    def __init__(self, task: str, *, seed: int = 0, size: int = 48, objects: tuple[int, int] = (3, 4)):
        if task not in TASKS:
            raise InputError(f"--task {task}: unknown; choose from {', '.join(TASKS)}")
        self.task, self.seed, self.size, self.objects = task, seed, size, objects

    def train_batch(self, step: int, n: int) -> list[Example]:
        return self.draw(n, (self.seed, step, 1), held_out=False)

    def eval_set(self, n: int) -> list[Example]:
        return self.draw(n, (0, 0, 2), held_out=True)  # the same for every seed: runs are compared on the same examples

    def draw(self, n: int, key: tuple[int, ...], held_out: bool) -> list[Example]:
        """n examples that depend on `key` alone."""
        rng = np.random.default_rng(key)
        return [draw_example(self.task, rng, held_out=held_out, size=self.size, objects=self.objects) for _ in range(n)]


def respond(perception: str, reasoning: str, answer: str, tags: Tags = Tags()) -> str:
    """Text of a well-formed response."""
    blocks = zip((tags.perception, tags.reasoning, tags.answer), (perception, reasoning, answer), strict=True)
    return "\n".join(f"<{tag}>{text}</{tag}>" for tag, text in blocks)


def demonstrate(example: Example, noise: float, rng: np.random.Generator) -> str:
    """A response to imitate in which every color and every shape is misstated with probability `noise`.

    Reasoning and answer follow from what is stated, not from the image: fluent, consistent, and seeing things.
    """

    def misstate(word: str, words: Iterable[str]) -> str:
        return str(rng.choice([w for w in words if w != word])) if rng.random() < noise else word

    stated = [Fact(f.cell, misstate(f.color, COLORS), misstate(f.shape, SHAPES)) for f in example.scene]
    perception = " " + ", ".join(map(str, stated))
    return respond(perception, example.query.reasoning(stated), f" {example.query.solve(stated)}")


# ------------------------------------------------------------------------------------------------------------ verifiers


@dataclass(frozen=True)
class Verdict:
    """What is true of one response; each in [0, 1]. The last three need a known scene and are None without one.

    accuracy    the answer is right
    format      exactly the three blocks, in order, none of them blank
    perception  F1 of the stated facts against the scene
    grounded    the answer is right, and all the evidence that it rests on is stated rightly
    consistent  the answer follows from what is stated, right or wrong
    """

    reward: float
    accuracy: float
    format: float
    perception: float | None = None
    grounded: float | None = None
    consistent: float | None = None


def verify(text: str, example: Example, tags: Tags = Tags(), match=None) -> Verdict:
    """Check a response against its example. Nothing but answer and format enters the reward.

    Args:
        match: says whether a given answer is the true one, (given, truth) -> bool; by default `answers_match`.
    """
    match = match or answers_match
    blocks = parse_response(text, tags)
    spans = (blocks.perception, blocks.reasoning, blocks.answer) if blocks else ()
    well_formed = float(bool(spans) and all(text[a:b].strip() for a, b in spans))
    answer = extract_answer(text, tags)
    accuracy = float(answer is not None and (match(answer, example.answer) or chosen(answer, example)))
    reward = REWARD_ACCURACY * accuracy + REWARD_FORMAT * well_formed
    if example.scene is None:
        return Verdict(reward, accuracy, well_formed)
    stated = parse_facts(text[slice(*blocks.perception)]) if blocks else set()
    true = set(example.scene)
    f1 = 2 * len(stated & true) / (len(stated) + len(true))
    one_each = len({f.cell for f in stated}) == len(stated)  # a cell stated twice, once right, is not evidence
    grounded = blocks is not None and one_each and example.query.evidence(stated) == example.query.evidence(true)
    implied = example.query.solve(stated) if stated else None
    consistent = blocks is not None and implied is not None and answers_match(answer, implied)
    return Verdict(reward, accuracy, well_formed, f1, accuracy * grounded, float(consistent))


def extract_answer(text: str, tags: Tags = Tags()) -> str | None:
    """Text of the only answer block, what is \\boxed in it if something is, also when the rest is malformed; None with no
    block, two, or a broken one."""
    opening, closing = f"<{tags.answer}>", f"</{tags.answer}>"
    start, end = text.find(opening), text.find(closing)
    if text.count(opening) != 1 or text.count(closing) != 1 or end < start:
        return None
    return unboxed(text[start + len(opening) : end])


def unboxed(text: str) -> str:
    """Content of the last \\boxed{...}, or the whole text without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text.strip()
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i].strip()
    return text.strip()  # never closed


def chosen(answer: str, example: Example) -> bool:
    """Multiple choice: "B", "(B)", "B. 12 cm", or the words that the question lists after B, where the true answer is B."""
    letter = re.fullmatch(r"\(?([A-J])\)?\.?|\(?([A-J])[).:]\s*\S.*", example.answer.strip())
    if not letter:
        return False
    truth = letter[1] or letter[2]
    said = re.fullmatch(r"(?:(?:option|choice) )?\(?([A-Ja-j])(?:[).:](?:\s.*)?)?", answer.strip(), re.DOTALL | re.IGNORECASE)
    if said:
        return said[1].upper() == truth
    listed = dict(re.findall(r"^\s*\(?([A-J])[).:]\s*(\S.*?)\s*$", example.question, re.MULTILINE))
    return truth in listed and answers_match(answer, listed[truth])


def answers_match(given: str, truth: str) -> bool:
    """Numbers are equal as numbers (3 = 3.0, 1,000 = 1000, 1/2 = 0.5), all else as words without regard to case.

    White space, quotes, brackets around the whole, `*` of markdown and the marks that end a sentence do not count;
    signs, units and symbols do: -5 cm is not 5 cm, and < is not >.
    """
    given, truth = _bare(given), _bare(truth)
    numbers = _number(given), _number(truth)
    return numbers[0] == numbers[1] if None not in numbers else given == truth != ""


def math_match(given: str, truth: str) -> bool:
    """Also equal as mathematics, by `math-verify`: 2\\sqrt{3} is \\sqrt{12}, and, as it leaves out units, 12 m is 12 cm.

    It reads words as products of letters, so it is asked only where the true answer holds a digit or a command.

    Raises:
        InputError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise InputError("--verifier math needs math-verify: pip install 'math-verify[antlr4_13_2]'") from None
    formula = re.search(r"\d|\\", truth) is not None
    return answers_match(given, truth) or (formula and bool(verify(parse(f"${truth}$"), parse(f"${given}$"))))


VERIFIERS = {"words": answers_match, "math": math_match}


def _bare(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).casefold().replace("\u2212", "-").split())
    bare = re.sub(r"^\.+(?!\d)", "", text.strip(" ,;:!?\"'`*\u201c\u201d\u2018\u2019\u3002\uff0c\uff01\uff1f")).rstrip(" .,;:!?")
    if len(bare) > 1 and bare[0] + bare[-1] in ("()", "[]", "{}", '""', "''") and not re.search(r"[][(){}]", bare[1:-1]):
        bare = bare[1:-1]
    return text if bare == text else _bare(bare)


def _number(text: str) -> Fraction | None:
    if not re.fullmatch(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,30})?(\.\d{1,30}|/0*[1-9]\d{0,29})?", text) or not re.search(r"\d", text):
        return None
    text = text.replace(",", "")
    return None if re.match(r"[+-]?/", text) else Fraction(text)


_FACT = re.compile(
    rf"\b({'|'.join(CELLS)})\W+(?:(?:is|has|a|an|the)\W+)*({'|'.join(COLORS)})\W+({'|'.join(SHAPES)})\b", re.IGNORECASE
)


def parse_facts(text: str) -> set[Fact]:
    """The facts stated in a perception text: cell, color, shape, in any sentence that has them in this order."""
    return {Fact(*(word.lower() for word in match.groups())) for match in _FACT.finditer(text)}


# ------------------------------------------------------------------------------------------------------------ your data


class OwnTask:
    """Your own rows of images, question and answer, a tenth of the images held out.

    The split goes by a hash of the images' bytes: no image is in both parts, under whatever name. Every image is decoded
    once at the start, so that a broken one is reported in the first minute and not in the fifth hour.
    """

    def __init__(self, name: str, rows: list[tuple], read, *, seed: int = 0, eval_only: bool = False):
        """`rows` are (images, question, answer, source); `read` opens one of the `images` for reading bytes."""
        self.name, self.seed, self.read = name, seed, read
        if not rows:
            raise InputError(f"--data {name}: has no rows")
        digest = {}
        for row in rows:
            question, source = row[1], row[3]
            if re.search(r"<\|(image|video)_pad\|>", question):
                raise InputError(f"{source}: take the image placeholder out of the question; write <image> instead, or nothing")
            if question.count(MARK) not in (0, len(row[0])):
                raise InputError(f"{source}: {question.count(MARK)} {MARK} marks and {len(row[0])} images; give as many, or no mark")
            if not answers_match(row[2], row[2]):
                raise InputError(f"{source}: the answer {row[2]!r} is blank, so no response could be right")
            self._load(row)
            for image in row[0]:
                with read(image) as file:
                    digest[image] = hashlib.sha256(file.read()).hexdigest()
        parent = {d: d for d in digest.values()}  # images that share a row belong together

        def root(d):
            while parent[d] != d:
                d = parent[d]
            return d

        for images, *_ in rows:
            for image in images:
                parent[root(digest[image])] = root(digest[images[0]])
        roots = sorted({root(d) for d in parent})
        if len(roots) < 2 and not eval_only:
            raise InputError(f"--data {name}: needs rows with at least two different images, one to hold out")
        held_out = set(roots[: max(1, len(roots) // 10)])
        self._eval = [row for row in rows if eval_only or root(digest[row[0][0]]) in held_out]
        self._train = [row for row in rows if root(digest[row[0][0]]) not in held_out]

    def train_batch(self, step: int, n: int) -> list[Example]:
        """Batch `step` of an endless stream: every epoch is a permutation of all rows, drawn from the seed."""

        def order(epoch):
            return np.random.default_rng((self.seed, epoch)).permutation(len(self._train))

        positions = range(step * n, (step + 1) * n)
        orders = {epoch: order(epoch) for epoch in {p // len(self._train) for p in positions}}
        picks = [orders[p // len(self._train)][p % len(self._train)] for p in positions]
        return [self._load(self._train[i]) for i in picks]

    def eval_set(self, n: int) -> list[Example]:
        return [self._load(row) for row in self._eval[:n]]

    def _load(self, row) -> Example:
        images, question, answer, source = row
        return Example(tuple(open_image(i, source, self.read) for i in images), question, answer, source=source)


def own_task(name: str | Path, *, seed: int = 0, eval_only: bool = False) -> OwnTask:
    """Rows of a JSON-lines file, or with "hub:NAME[:SPLIT]" of a data set of the Hugging Face hub."""
    name = str(name)
    if name.startswith("hub:"):
        rows, read = hub_rows(name)
    else:
        rows = jsonl_rows(Path(name))
        read = lambda image: (Path(name).parent / image).open("rb")  # noqa: E731
    return OwnTask(name, rows, read, seed=seed, eval_only=eval_only)


def jsonl_rows(path: Path) -> list[tuple]:
    """One object a line with `image` (or `images`: paths relative to the file), `question` and `answer`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data {path}: cannot be read as UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
            images = row["images"] if "images" in row else [row["image"]]
            question, answer = row["question"], row["answer"]
            texts = [question, *images]
            if not isinstance(images, list) or not images or not all(isinstance(t, str) and t.encode() for t in texts):
                raise TypeError
            if isinstance(answer, list | dict | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = "one JSON object with image (or a list of images), question and answer"
            raise InputError(f"{source}: expected {wanted}, got {line[:60]!r}") from None
        rows.append((tuple(images), question, unboxed(str(answer)), source))
    if not rows:
        raise InputError(f"--data {path}: the file is empty; it needs one JSON object a line")
    return rows


def hub_rows(name: str):
    """Rows of a data set, and what opens their images. "hub:NAME[:SPLIT]": NAME on the hub, or a folder that `datasets` wrote.

    Columns may have the names in use: image or images; problem or question; answer or solution. Of a worked solution
    the last \\boxed{...}, or what stands between <answer> tags, is the answer.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"--data {name} needs datasets: pip install datasets") from None
    place, _, split = name.removeprefix("hub:").partition(":")
    split = split or "train"
    try:
        if Path(place).is_dir() and any((Path(place) / f).exists() for f in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(place)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(place, split=split)
    except Exception as error:  # not found, no such split, no network ...
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--data {name}: cannot be loaded as hub:NAME:SPLIT ({first[:200]})") from None

    def column(*names):
        found = [n for n in names if n in rows.column_names]
        if not found:
            raise InputError(f"--data {name}: has no column {' or '.join(names)}, only {', '.join(rows.column_names)}")
        return found[0]

    seen, asked, told = column("images", "image"), column("problem", "question"), column("answer", "solution")
    kind = rows.features[seen]
    if isinstance(kind, datasets.Image):  # keep the bytes: they are decoded when a row's turn comes
        rows = rows.cast_column(seen, datasets.Image(decode=False))
    elif isinstance(getattr(kind, "feature", None), datasets.Image):
        rows = rows.cast_column(seen, type(kind)(datasets.Image(decode=False)))

    def read(image):
        row, i = image
        value = rows[row][seen]
        value = value[i] if isinstance(value, list) else value
        if isinstance(value, dict) and value.get("bytes"):
            return io.BytesIO(value["bytes"])
        return open(value["path"] if isinstance(value, dict) else value, "rb")

    found = []
    for number, row in enumerate(rows.remove_columns([c for c in rows.column_names if c not in (seen, asked, told)])):
        images = row[seen] if isinstance(row[seen], list) else [row[seen]]
        source, answer = f"{name} row {number}", row[told]
        if not images or None in images or not isinstance(row[asked], str) or isinstance(answer, list | dict | None):
            raise InputError(f"{source}: expected an image in {seen}, text in {asked} and one answer in {told}")
        answer = str(answer)
        if told == "solution" and len(answer.split()) > 5 and "\\boxed{" not in answer and "<answer>" not in answer:
            raise InputError(f"{source}: the solution has no \\boxed{{...}} and no <answer>, so it cannot be told what is right")
        answer = unboxed(answer.split("<answer>")[-1].split("</answer>")[0])
        found.append((tuple((number, i) for i in range(len(images))), row[asked], answer, source))
    return found, read


def open_image(path, source: str, read=lambda path: open(path, "rb")) -> Image.Image:
    """Decode an image, which `read(path)` opens, to RGB, upright and over white where it is transparent.

    Raises:
        InputError: naming `source`, when it is not there or cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
            image = Image.open(file := read(path))
        with file, image:
            limit = Image.MAX_IMAGE_PIXELS or float("inf")
            if image.width * image.height > limit:
                raise InputError(f"{source}: image {path} has {image.width}x{image.height} pixels, over {limit}; shrink it")
            if max(image.size) > 200 * min(image.size):
                raise InputError(f"{source}: image {path} is {image.width}x{image.height}, longer than 200 to 1; crop it")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits: scale, where convert would clip
                values = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((values * (255 / max(255, values.max()))).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{source}: image {path} does not exist (paths are relative to the data file)") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise InputError(f"{source}: image {path} cannot be decoded, broken or too large ({error})") from None
