"""Questions with an image and an answer: drawn tasks, your own files, and the verifier.

A drawn task shows a 3 x 3 grid of cells a1 .. c3 (columns a to c from the left, rows 1 to 3 from
the top) with a few colored shapes. The scene is known, so one can check not only the answer but
also what the response says it *saw*. An example of each task, with a perfect response:

    count    How many red?               <perception> a1 red circle b2 blue square</perception>
                                         <reasoning> a1 red b2 no so 1</reasoning>
                                         <answer> 1</answer>
    compare  More blue or more circle?   ... a1 no b2 blue so 1, a1 circle b2 no so 1 ... same
    add      How many blue plus circle?  ... a1 no b2 blue so 1, a1 circle b2 no so 1 ... 2

The reward, 0.9 accuracy + 0.1 share of the tags in place, never looks at what the perception
says: SRPO changes the credit, not the reward.
"""

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from corrupt import open_image
from srpo import Tags, parse_response

TAGS = Tags()
OTHER_FORMS = "extras/from_hub.py turns other forms of data into JSON lines"
IMAGE_MARK = "<image>"  # in a question: an image goes here; without marks, all images go in front
INSTRUCTION = (
    f"Reply in exactly this form: <{TAGS.perception}>what you see that matters</{TAGS.perception}>"
    f"<{TAGS.reasoning}>how the answer follows from it</{TAGS.reasoning}>"
    f"<{TAGS.answer}>the answer alone</{TAGS.answer}>"
)


class InputError(ValueError):
    """Something the user can put right. `train.py` prints it as one line and exits with code 2."""


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a CPU or a GPU ran out."""
    if isinstance(error, MemoryError):
        return True
    known = ("out of memory", "not enough memory", "an't allocate memory", "ALLOC_FAILED")
    return any(words in str(error) for words in known)


@contextmanager
def blame(place: str):
    """Whatever fails inside becomes one line that begins with `place`, an InputError.

    For what may fail in ways of its own: functions and files of users, devices, decoders. Memory
    that ran out is nobody's fault, and an InputError says what it has to say.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(f"{place}: {type(error).__name__}, {first_line(error)}") from None


# ---- drawn scenes

QUESTIONS = {
    "count": "How many {}?",
    "compare": "More {} or more {}?",
    "add": "How many {} plus {}?",
}
TASKS = tuple(QUESTIONS)
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 40),
}
SHAPES = ("circle", "square", "triangle")
CELLS = tuple(column + row for row in "123" for column in "abc")
HINT = (
    "The image is a grid of 3 columns a, b, c from left to right and 3 rows 1, 2, 3 from top to "
    "bottom. In the perception list every object as its cell, color and shape, like: "
    f"a1 red circle c2 blue square. Colors: {', '.join(COLORS)}."
)


@dataclass(frozen=True)
class Fact:
    cell: str
    color: str
    shape: str

    def __str__(self):
        return f"{self.cell} {self.color} {self.shape}"


@dataclass(frozen=True)
class Query:
    """What is asked: about one color or shape in count, about two of them in compare and add."""

    task: str
    args: tuple[str, ...]

    def text(self) -> str:
        return QUESTIONS[self.task].format(*self.args)

    def evidence(self, facts: Collection[Fact]) -> list[set[str]]:
        """All that the answer depends on: for each argument, the cells that it is true of."""
        return [{f.cell for f in facts if arg in (f.color, f.shape)} for arg in self.args]

    def solve(self, facts: Collection[Fact]) -> str:
        """The answer that follows from `facts`, right or wrong."""
        counts = [len(cells) for cells in self.evidence(facts)]
        if self.task != "compare":
            return str(sum(counts))
        if counts[0] == counts[1]:
            return "same"
        if counts[0] > counts[1]:
            return self.args[0]
        return self.args[1]

    def reasoning(self, facts: Sequence[Fact]) -> str:
        """The steps from `facts` to the answer, as they stand between the reasoning tags."""
        parts = []
        for arg, cells in zip(self.args, self.evidence(facts), strict=True):
            steps = ""
            for fact in facts:
                mark = arg if fact.cell in cells else "no"
                steps += f" {fact.cell} {mark}"
            parts.append(f"{steps} so {len(cells)}")
        return ",".join(parts)


@dataclass(frozen=True)
class Example:
    """One question. Drawn tasks know `scene` and `query`; `source` says file and line of a row."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    scene: tuple[Fact, ...] | None = None
    query: Query | None = None
    hint: str = ""
    system: str = ""  # what the chat begins with
    source: str = ""
    response: str = ""  # a demonstration to imitate
    row: dict = field(default_factory=dict, compare=False)  # all columns of a user's row


def draw_scene(scene: Sequence[Fact], size: int, rng: np.random.Generator) -> Image.Image:
    """A scene of size x size pixels. Place, radius, shade and background vary from draw to draw."""
    y, x = np.indices((size, size)) * 160 // size
    shading = np.dstack([x, y, np.zeros_like(x)])  # less red to the right, less green below
    background = rng.integers(235, 255, 3) - shading
    image = Image.fromarray(background.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    cell = size / 3
    for fact in scene:
        row, column = divmod(CELLS.index(fact.cell), 3)
        x, y = (np.array([column, row]) + 0.5 + rng.uniform(-0.06, 0.06, 2)) * cell
        r = cell * rng.uniform(0.32, 0.40)
        color = np.array(COLORS[fact.color]) + rng.integers(-15, 16, 3)
        fill = tuple(color.clip(0, 255).tolist())
        if fact.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif fact.shape == "square":
            draw.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=fill)
        else:
            draw.polygon([(x, y - r), (x + r, y + r * 0.9), (x - r, y + r * 0.9)], fill=fill)
    return image


def is_held_out(scene: Sequence[Fact]) -> bool:
    """One scene in ten is for evaluation, by its content: no scene is ever in both splits."""
    content = ";".join(str(fact) for fact in scene)
    return hashlib.sha256(content.encode()).digest()[0] % 10 == 0


def draw_example(
    task: str, rng: np.random.Generator, *, held_out: bool, size: int, objects: tuple[int, int]
) -> Example:
    """An example from training or held-out scenes, with `objects` = (fewest, most) shapes."""
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    while True:
        n = int(rng.integers(objects[0], objects[1] + 1))
        args = rng.choice([*COLORS, *SHAPES], 2, replace=False).tolist()
        if task == "count":
            args = args[:1]
        # A uniform draw says how many objects match: every count from 1 to n is equally likely.
        n_matching = int(rng.integers(1, n + 1))
        matching = [kind for kind in kinds if args[0] in kind]
        others = [kind for kind in kinds if args[0] not in kind]
        pools = [matching] * n_matching + [others] * (n - n_matching)
        cells = sorted(rng.permutation(len(CELLS))[:n].tolist())
        scene = []
        for cell, pool in zip(cells, rng.permutation(n).tolist(), strict=True):
            color, shape = pools[pool][rng.integers(len(pools[pool]))]
            scene.append(Fact(CELLS[cell], color, shape))
        query = Query(task, tuple(args))
        if is_held_out(scene) != held_out or not all(query.evidence(scene)):
            continue  # of the other split, or nothing to see for one of the arguments
        image = draw_scene(scene, size, rng)
        answer = query.solve(scene)
        return Example((image,), query.text(), answer, tuple(scene), query, hint=HINT)


def parse_facts(text: str) -> set[Fact]:
    """The facts in a perception: any sentence that has cell, color, shape in this order."""
    cell = "|".join(CELLS)
    color = "|".join(COLORS)
    shape = "|".join(SHAPES)
    fact = rf"\b({cell})\W+(?:(?:is|has|a|an|the)\W+)*({color})\W+({shape})\b"
    return {Fact(*found) for found in re.findall(fact, text.lower())}


@dataclass
class DrawnTask:
    """Endless batches, which depend on the seed and their step, and a fixed held-out set."""

    task: str
    seed: int = 0
    size: int = 48  # side of an image in pixels
    objects: tuple[int, int] = (3, 4)  # fewest and most shapes in a scene
    system: str = ""
    held_out = frozenset()  # scenes are held out by their content, not by the bytes of an image
    fingerprint = "drawn"

    def train_batch(self, step: int, n: int) -> list[Example]:
        return self.draw(n, (self.seed, step, 1), held_out=False)

    def eval_set(self, n: int) -> list[Example]:
        # Of every seed the same, so that runs are compared on the same examples.
        return self.draw(n, (0, 0, 2), held_out=True)

    @property
    def prompts(self) -> list[tuple[Example, list]]:
        """Examples and the sizes of their images: of all prompts a sample, which are alike."""
        return [(example, [(self.size, self.size)]) for example in self.eval_set(16)]

    def draw(self, n: int, key: tuple[int, ...], held_out: bool) -> list[Example]:
        """n examples that depend on `key` alone."""
        rng = np.random.default_rng(key)
        options = {"held_out": held_out, "size": self.size, "objects": self.objects}
        drawn = [draw_example(self.task, rng, **options) for _ in range(n)]
        return [replace(example, system=self.system) for example in drawn]


def respond(perception: str, reasoning: str, answer: str) -> str:
    """Text of a well-formed response."""
    text = f"<{TAGS.perception}>{perception}</{TAGS.perception}>"
    text += f"<{TAGS.reasoning}>{reasoning}</{TAGS.reasoning}>"
    return text + f"<{TAGS.answer}>{answer}</{TAGS.answer}>"


def demonstrate(example: Example, noise: float, rng: np.random.Generator) -> str:
    """A response to imitate: the row's own, or one about a drawn scene.

    In the latter every color and every shape is misstated with probability `noise`. Reasoning and
    answer follow from what is stated, not from the image: consistent, and seeing things.
    """
    if example.response:
        return example.response

    def perhaps_misstated(word: str, words: Collection[str]) -> str:
        if rng.random() >= noise:
            return word
        return str(rng.choice([other for other in words if other != word]))

    stated = []
    for fact in example.scene:
        color = perhaps_misstated(fact.color, COLORS)
        shape = perhaps_misstated(fact.shape, SHAPES)
        stated.append(Fact(fact.cell, color, shape))
    perception = "".join(f" {fact}" for fact in stated)
    answer = f" {example.query.solve(stated)}"
    return respond(perception, example.query.reasoning(stated), answer)


# ---- the verifier


@dataclass(frozen=True)
class Verdict:
    """What is true of one response, each in [0, 1]; the last three need a known scene."""

    reward: float  # 0.9 accuracy + 0.1 share of the tags in place
    accuracy: float  # the answer is right
    format: float  # 1: exactly the three blocks, in order, none of them blank
    perception: float | None = None  # F1 of the stated facts against the scene
    grounded: float | None = None  # right, and all the evidence that it rests on is stated rightly
    consistent: float | None = None  # the answer follows from what is stated, right or wrong


def averages(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Mean of each figure over the responses; None where the scene is unknown."""
    means = {}
    for figure in fields(Verdict):
        values = [getattr(verdict, figure.name) for verdict in verdicts]
        means[figure.name] = None if None in values else float(np.mean(values))
    return means


# Markdown and quotes around an answer, and parentheses around a single word. The `++` never gives
# back what it took: a long row of stars would otherwise be tried in all ways, for minutes.
MARKDOWN = r"[*`]++([^*`](?:.*[^*`])?)[*`]++"
WRAPPED = re.compile(MARKDOWN + r"""|"(.+)"|'(.+)'|“(.+)”|‘(.+)’|\(([\w.%/+-]+)\)""")


def answers_match(given: str, truth: str) -> bool:
    """Numbers are equal as numbers (3 = 3.0, 1,000 = 1000, 1/2 = 0.5), all else as words.

    White space, markdown, quotes around the whole, parentheses around one word and the marks that
    end a sentence do not count. Signs, units and symbols do: -5 cm is not 5 cm, and 5! is not 5.
    """
    given = _plain_words(given)
    truth = _plain_words(truth)
    given_number = _as_number(given)
    truth_number = _as_number(truth)
    if given_number is not None and truth_number is not None:
        return given_number == truth_number
    return given == truth and truth != ""


def _plain_words(text: str) -> str:
    text = unicodedata.normalize("NFC", text).casefold().replace("\u2212", "-")
    text = " ".join(text.split()).rstrip(" .,;:")
    text = re.sub(r"(?<=[^\W\d_]{2})[!?]+$", "", text)
    wrapped = WRAPPED.fullmatch(text)
    if wrapped:
        text = wrapped[wrapped.lastindex].strip().rstrip(" .,;:")
    return text


def _as_number(text: str) -> Fraction | None:
    if len(text) > 60:
        return None
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d+|(\d+|\d*\.\d+)(e[+-]?\d\d?)?|\d+/0*[1-9]\d*)", text):
        return None
    return Fraction(text)


def extract_answer(text: str) -> str | None:
    """Text of the only answer block, also when the rest is malformed; else None."""
    opening = f"<{TAGS.answer}>"
    closing = f"</{TAGS.answer}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    inside, closed, _ = text.partition(opening)[2].partition(closing)
    return inside.strip() if closed else None


def tags_in_place(text: str) -> float:
    """Share of the six tags that stand exactly once, and after those before them."""
    in_place = 0
    last = -1
    for name in (TAGS.perception, TAGS.reasoning, TAGS.answer):
        for tag in (f"<{name}>", f"</{name}>"):
            place = text.find(tag)
            if text.count(tag) == 1 and place > last:
                in_place += 1
                last = place
    return in_place / 6


def verify(text: str, example: Example, match=answers_match) -> Verdict:
    """Check a response against its example. Nothing but answer and format enters the reward.

    Args:
        match: (given, truth) -> bool, whether an answer is the true one.
    """
    answer = extract_answer(text)
    accuracy = float(answer is not None and match(answer, example.answer))
    blocks = parse_response(text, TAGS)
    well_formed = blocks is not None
    if blocks is not None:
        perception = text[slice(*blocks.perception)]
        reasoning = text[slice(*blocks.reasoning)]
        well_formed = all(block.strip() for block in (perception, reasoning, answer))
    form_reward = 1.0
    if not well_formed:
        form_reward = min(tags_in_place(text), 5 / 6)
    verdict = Verdict(0.9 * accuracy + 0.1 * form_reward, accuracy, float(well_formed))
    if example.scene is None:
        return verdict
    if blocks is None:
        return replace(verdict, perception=0.0, grounded=0.0, consistent=0.0)
    scene = set(example.scene)
    stated = parse_facts(perception)
    f1 = 2 * len(stated & scene) / (len(stated) + len(scene))
    stated_once = len({fact.cell for fact in stated}) == len(stated)  # else it is no evidence
    seen = stated_once and example.query.evidence(stated) == example.query.evidence(scene)
    grounded = float(accuracy == 1 and seen)
    consistent = float(bool(stated) and answers_match(answer, example.query.solve(stated)))
    return replace(verdict, perception=f1, grounded=grounded, consistent=consistent)


# ---- your own rows


class OwnTask:
    """Your own rows of images, question and answer, a tenth of the images held out.

    The split goes by a hash of the images' bytes, and images that share a row stay together: no
    image is in both parts, under whatever name. All are decoded at the start, so that a broken
    one is reported in the first minute and not in the fifth hour.
    """

    def __init__(self, path, seed=0, *, system="", eval_all=False, judge=None, held_out=None):
        """
        Args:
            system: what the chat begins with, in rows that do not say it themselves.
            eval_all: hold all images out.
            judge: the answer of a row must be right by it, or could never be learned.
            held_out: hashes of the images to hold out, those of another file.
        """
        self.path = Path(path)
        self.seed = seed
        self.system = system
        entries = [self._parse(source, row) for source, row in read_json_lines(self.path)]
        image_hashes = []  # of each entry, the hashes of its images
        self.prompts = []  # all examples, without their images, and the sizes of these
        for names, example in tqdm(entries, f"checking {self.path.name}", disable=None, delay=2):
            loaded, files = self._load(names, example)
            if judge is not None and len(image_hashes) < 1000:  # a judge may be slow
                verdict = judge(respond("a", "b", example.answer), loaded)
                if verdict.accuracy != 1:
                    problem = f"the reward does not accept {example.answer!r} as its own answer"
                    raise InputError(f"{example.source}: {problem}")
            image_hashes.append({hashlib.sha256(file).hexdigest() for file in files})
            self.prompts.append((example, [image.size for image in loaded.images]))
        images = sorted(set().union(*image_hashes))
        content = [example.row for _, example in entries]
        content += [sorted(hashes) for hashes in image_hashes]
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()
        if held_out is None:
            held_out = images[: max(1, len(images) // 10)]
        if eval_all:
            held_out = images
        self.held_out = with_neighbors(set(held_out), image_hashes)
        pairs = list(zip(entries, image_hashes, strict=True))
        self.eval_rows = [entry for entry, hashes in pairs if hashes & self.held_out]
        self.train_rows = [entry for entry, hashes in pairs if not hashes & self.held_out]
        if not self.train_rows and not eval_all:
            left = "no row is left to train on beside those with images that are held out"
            together = "rows that share an image, directly or by others, stay together"
            raise InputError(f"{path}: {left}; {together}")

    def train_batch(self, step: int, n: int) -> list[Example]:
        """Batch `step` of an endless stream; each epoch is a permutation of all rows."""
        examples = []
        order = None
        for position in range(step * n, (step + 1) * n):
            epoch, index = divmod(position, len(self.train_rows))
            if order is None or index == 0:  # of the epoch that begins
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train_rows))
            example, _ = self._load(*self.train_rows[order[index]])
            examples.append(example)
        return examples

    def eval_set(self, n: int) -> Iterator[Example]:
        """The first n held-out rows, one at a time: their images may be large."""
        for row in self.eval_rows[:n]:
            yield self._load(*row)[0]

    def _parse(self, source: str, row: dict) -> tuple[list[str], Example]:
        """Names of the images, and the example without them."""
        given = {name: value for name, value in row.items() if value is not None}
        if "image" in given and "images" in given:
            raise InputError(f"{source}: image and images; give one of them")
        if "messages" in given:
            raise InputError(f"{source}: messages is not read; put it into question and system")
        images = given.get("images", [given.get("image")])
        if not isinstance(images, list) or not images:
            raise InputError(f"{source}: images must be a list of file names, not {shown(images)}")
        question = given.get("question")
        answer = given.get("answer")  # a number has been read as text
        if isinstance(answer, bool):
            answer = str(answer)
        response = given.get("response", "")
        system = given.get("system", self.system)
        texts = [("image", name) for name in images]
        texts += [("question", question), ("answer", answer)]
        texts += [("response", response), ("system", system)]
        for name, text in texts:
            if not isinstance(text, str):
                problem = f"{name} must be text, not {shown(text)}; {OTHER_FORMS}"
                raise InputError(f"{source}: {problem}")
            if re.search("[\ud800-\udfff]", text):
                raise InputError(f"{source}: {name} holds half a character (a lone surrogate)")
            if re.search(r"<\|(image|video)_pad\|>", text):
                raise InputError(f"{source}: take the image placeholder out of the {name}")
        if question.count(IMAGE_MARK) not in (0, len(images)):
            raise InputError(f"{source}: give {len(images)} {IMAGE_MARK} marks, or none")
        if re.search(rf"</?{TAGS.answer}>|#### |\\boxed.*\\boxed", answer, re.DOTALL):
            raise InputError(f"{source}: give the answer alone, not {shown(answer)}")
        if not answers_match(answer, answer):
            raise InputError(f"{source}: the answer {answer!r} is blank")
        more = {"system": system, "source": source, "response": response, "row": row}
        example = Example((), question, answer, **more)
        if response and verify(response, example).format != 1:
            raise InputError(f"{source}: the response lacks the form, or a block of it is blank")
        return images, example

    def _load(self, names: list[str], example: Example) -> tuple[Example, list[bytes]]:
        """The example with its images, and the bytes of their files."""
        images = []
        files = []
        for name in names:
            with blame(f"{example.source}: image {name[:80]} cannot be read"):
                if not os.path.isfile(self.path.parent / name):  # a pipe would be waited for
                    raise OSError(f"No such file; {OTHER_FORMS}")
                file = (self.path.parent / name).read_bytes()
                images.append(open_image(io.BytesIO(file)))
                files.append(file)
        return replace(example, images=tuple(images)), files


def with_neighbors(images: set[str], images_of_rows: Sequence[set[str]]) -> set[str]:
    """These images, those that share a row with one of them, and so on."""
    found = set(images)
    size = 0
    while size < len(found):
        size = len(found)
        for row_images in images_of_rows:
            if row_images & found:
                found |= row_images
    return found


def shown(value) -> str:
    """A value in a message: what it is, and how it begins."""
    if value is None:
        return "missing"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """("file:line", object) of each line. InputError where the file or a line is anything else."""
    with blame(f"{path}: cannot be read as UTF-8 text ({OTHER_FORMS})"):
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a pipe would be waited for
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also cuts at U+2028
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:  # numbers as the file writes them: 0.00001 is not to become 1e-05
            row = json.loads(line, parse_float=str, parse_int=str)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            problem = f"expected one JSON object, got {line[:60]!r}"
            raise InputError(f"{path}:{number}: {problem}; jq -c '.[]' takes an array apart")
        rows.append((f"{path}:{number}", row))
    if not rows:
        raise InputError(f"{path}: the file is empty; it needs one JSON object a line")
    return rows
