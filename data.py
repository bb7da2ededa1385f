"""Tasks whose evidence has a ground truth, their verifier, your own data, and what a run leaves on disk.

A drawn task shows a 3 x 3 grid of cells a1 .. c3 (columns a to c from the left, rows 1 to 3 from the top)
with a few colored shapes. The scene is known, so one can check not only the answer but also what the response
says it *saw*. An example of each task, with a perfect response:

    count    How many red?              <perception> a1 red circle b2 blue square</perception>
                                        <reasoning> a1 red b2 no so 1</reasoning>
                                        <answer> 1</answer>
    compare  More blue or more circle?  <reasoning> a1 no b2 blue so 1, a1 circle b2 no so 1</reasoning>  same
    add      How many blue plus circle? <reasoning> a1 no b2 blue so 1, a1 circle b2 no so 1</reasoning>  2

The reward, 0.9 accuracy + 0.1 share of the tags in place, never looks at what the perception says: SRPO
changes the credit, not the reward.
"""

import hashlib
import importlib
import io
import json
import math
import os
import re
import runpy
import shutil
import traceback
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout  # comes with torch
from tqdm import tqdm

from corrupt import COLORS, SHAPES, Example, Fact, draw_example, open_image, parse_facts
from srpo import Tags, parse_response

TASKS = ("count", "compare", "add")
MARK = "<image>"  # in a question: an image goes here; without marks, all go in front
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
    return "".join(f"<{tag}>{text}</{tag}>" for tag, text in blocks)


def demonstrate(example: Example, noise: float, rng: np.random.Generator) -> str:
    """A response to imitate: a row's own, or of a drawn scene, in which every color and every shape is
    misstated with probability `noise`. Reasoning and answer follow from what is stated, not from the image:
    consistent, and seeing things. InputError where there is neither."""
    if example.response:
        return example.response
    if not example.scene:
        raise InputError(f"{example.source}: needs a response, to be imitated")

    def misstate(word: str, words: Iterable[str]) -> str:
        return str(rng.choice([w for w in words if w != word])) if rng.random() < noise else word

    stated = [Fact(f.cell, misstate(f.color, COLORS), misstate(f.shape, SHAPES)) for f in example.scene]
    perception = " " + " ".join(map(str, stated))
    return respond(perception, example.query.reasoning(stated), f" {example.query.solve(stated)}")


@dataclass(frozen=True)
class Verdict:
    """What is true of one response, each in [0, 1]; the last three are None where the scene is not known."""

    reward: float  # 0.9 accuracy + 0.1 share of the tags in place, the whole of it for the whole form alone
    accuracy: float  # the answer is right
    format: float  # 1: exactly the three blocks, in order, none of them blank
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
    match, blocks = match or answers_match, parse_response(text, TAGS)
    spans = (blocks.perception, blocks.reasoning, blocks.answer) if blocks else ()
    well_formed = float(bool(spans) and all(text[a:b].strip() for a, b in spans))
    answer = extract_answer(text)
    accuracy = float(answer is not None and (match(answer, example.answer) or chosen(answer, example)))
    reward = 0.9 * accuracy + 0.1 * (well_formed or min(tags_in_place(text), 5 / 6))
    if example.scene is None:
        return Verdict(reward, accuracy, well_formed)
    stated, true = parse_facts(text[slice(*blocks.perception)]) if blocks else set(), set(example.scene)
    f1 = 2 * len(stated & true) / (len(stated) + len(true))
    once = len({f.cell for f in stated}) == len(stated)  # a cell stated twice, once right, is no evidence
    seen = blocks and once and example.query.evidence(stated) == example.query.evidence(true)
    follows = stated and answers_match(answer, example.query.solve(stated))
    return Verdict(reward, accuracy, well_formed, f1, accuracy * bool(seen), float(bool(follows)))


def tags_in_place(text: str) -> float:
    """Share of the six tags that stand exactly once, and after those before them: a first tag is a start."""
    tags = [f"<{end}{tag}>" for tag in (TAGS.perception, TAGS.reasoning, TAGS.answer) for end in ("", "/")]
    places = [text.find(tag) for tag in tags if text.count(tag) == 1]
    return sum(place == max(places[: i + 1]) for i, place in enumerate(places)) / len(tags)


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
            if not math.isfinite(found.reward):
                raise ValueError(f"{found.reward} is not finite")
            return found
        except Exception as error:
            lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
            said = f"{type(error).__name__}{f' in line {lines[-1]}' if lines else ''}, {first_line(error)}"
            raise InputError(f"--reward {place}: {said}; {example.source or example.question}") from None

    return judge


def extract_answer(text: str) -> str | None:
    """Text of the only answer block, or what is \\boxed in it, also when the rest is malformed; else None."""
    opening, closing = f"<{TAGS.answer}>", f"</{TAGS.answer}>"
    inside, closed, _ = text.partition(opening)[2].partition(closing)
    return unboxed(inside) if closed and text.count(opening) == text.count(closing) == 1 else None


def unboxed(text: str) -> str:
    """Content of the last \\boxed{...} that is closed, or the whole text without one."""
    inside = "[^{}]*"
    for _ in range(5):  # braces within braces
        inside = rf"[^{{}}]*(?:\{{{inside}\}}[^{{}}]*)*"
    return (re.findall(rf"\\boxed\{{({inside})\}}", text) or [text])[-1].strip()


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


class OwnTask:
    """Your own rows of images, question and answer from a JSON-lines file, a tenth of the images held out.

    The split goes by a hash of the images' bytes, and images that share a row stay together: no image is in
    both parts, under whatever name. All are decoded at the start: a broken one is reported in the first
    minute and not in the fifth hour. With `everything` all rows are held out: nothing is to train.
    """

    def __init__(self, path: str | Path, seed: int = 0, everything: bool = False):
        self.path, self.seed = Path(path), seed
        bar = tqdm(rows := self._rows(), f"checking {self.path.name}", disable=None, delay=2)
        digests = [{hashlib.sha256(file).digest() for file in self._load(row)[1]} for row in bar]
        images = sorted(set().union(*digests))
        held_out = set(images if everything else images[: max(1, len(images) // 10)])
        while more := {d for row in digests if row & held_out for d in row - held_out}:
            held_out |= more
        self._eval = [row for row, d in zip(rows, digests, strict=True) if d & held_out]
        self._train = [row for row, d in zip(rows, digests, strict=True) if not d & held_out]
        if not self._train and not everything:
            raise InputError(f"{path}: needs rows with at least two different images, one to hold out")

    def train_batch(self, step: int, n: int) -> list[Example]:
        """Batch `step` of an endless stream: each epoch is a permutation of all rows, drawn from the seed."""
        size, positions = len(self._train), range(step * n, (step + 1) * n)
        epochs = {p // size for p in positions}
        order = {epoch: np.random.default_rng((self.seed, epoch)).permutation(size) for epoch in epochs}
        return [self._load(self._train[order[p // size][p % size]])[0] for p in positions]

    def eval_set(self, n: int | None) -> list[Example]:
        return [self._load(row)[0] for row in self._eval[:n]]

    def _rows(self) -> list[tuple]:
        """(names of the images, question, answer, response, source) of each line."""
        found = []
        for source, row in json_lines(self.path):
            try:
                images = row["images"] if "images" in row else [row["image"]]
                question, answer, response = row["question"], row["answer"], row.get("response", "")
                if not isinstance(images, list) or not images or isinstance(answer, list | dict | None):
                    raise TypeError
                answer = unboxed(str(answer))
                "".join((question, answer, response, *images)).encode()  # texts, without lone surrogates
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{source}: needs image (or a list, images), question, answer") from None
            faults = {
                "take the image placeholder out": re.search(r"<\|(image|video)_pad\|>", question),
                f"give {len(images)} {MARK} marks, or none": question.count(MARK) not in (0, len(images)),
                f"the answer {answer!r} is blank": not answers_match(answer, answer),
                "the response lacks the form": response and not parse_response(response, TAGS),
            }
            if fault := next(filter(faults.get, faults), None):
                raise InputError(f"{source}: {fault}")
            found.append((tuple(images), question, answer, response, source))
        return found

    def _load(self, row: tuple) -> tuple[Example, list[bytes]]:
        """The example of a row, and its images' files."""
        names, question, answer, response, source = row
        images, files = [], []
        for name in names:
            try:
                files.append((self.path.parent / name).read_bytes())
                images.append(open_image(io.BytesIO(files[-1])))
            except Exception as error:  # decoders raise nearly anything on damaged files
                raise InputError(f"{source}: image {name} cannot be read ({first_line(error)})") from None
        return Example(tuple(images), question, answer, source=source, response=response), files


def json_lines(path: Path, torn: bool = False) -> list[tuple[str, dict]]:
    """(file:line, object) of each line of a file; the one place that parses such files, with InputError where
    one is anything else. With `torn` a last line without an end, cut off by a kill, is none."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a pipe would be waited for
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines cuts at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    found = []
    for number, line in enumerate(lines[:-1] if torn else lines, start=1):
        try:
            if line.strip():
                found.append((f"{path}:{number}", dict(json.loads(line[:10**6]).items())))
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{path}:{number}: expected one JSON object, got {line[:60]!r}") from None
    if not found and not torn:
        raise InputError(f"{path}: the file is empty; it needs one JSON object a line")
    return found


class Run:
    """The folder of a run. Whatever a kill leaves in it is whole, and resuming gives the same numbers."""

    def __init__(self, path: str | Path):
        self.path, self.metrics, self.live = Path(path), Path(path) / "metrics.jsonl", None

    def lock(self) -> None:
        """Keep the folder to this process, for as long as it lives."""
        self.held = FileLock(self.path / "lock")
        try:
            self.held.acquire(blocking=False)
        except Timeout:
            who = (self.path / "pid").read_text(encoding="utf-8")
            raise InputError(f"{self.path}: process {who} is at work there; stop it, or wait") from None
        self.put("pid", str(os.getpid()))

    def claim(self, options: dict) -> None:
        """Make the folder with the run's options, at once, so that whatever is there can be resumed."""
        if any(p.name.removesuffix(".tmp") not in ("args.json", "lock", "pid") for p in self.path.glob("*")):
            raise InputError(f"--out {self.path}: not empty; --resume {self.path} goes on with it")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.put("args.json", json.dumps(options, indent=1) + "\n")

    def rewind(self) -> None:
        """Drop the steps after the last checkpoint, which are made again, and what was left half written."""
        self.lock()
        done = int(self.checkpoint().name.split("-")[1]) if self.checkpoint() else -1
        self.put("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.log() if r["step"] <= done))

    def argv(self) -> list[str]:
        """The options that it was started with, to be checked again."""
        try:
            argv = json.loads((self.path / "args.json").read_text(encoding="utf-8"))["argv"]
            return ["".join(word) for word in argv]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"--resume {self.path}: not the folder of a run (no args.json there)") from None

    def put(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        (self.path / f"{name}.tmp").write_text(text, encoding="utf-8")
        os.replace(self.path / f"{name}.tmp", self.path / name)

    def log(self) -> list[dict]:
        """Records of the run."""
        lines = json_lines(self.metrics, torn=True) if self.metrics.exists() else []
        if bad := [source for source, record in lines if not isinstance(record.get("step"), int)]:
            raise InputError(f"{bad[0]}: not a record of a run, which has a step; take the line out")
        return [record for _, record in lines]

    def write(self, record: dict) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.live:
            kind = "eval" if "eval" in record else "train"
            numbers = {f"{kind}/{k}": v for k, v in record.get("eval", record).items() if v is not None}
            self.live(numbers, step=record["step"])

    def send_to(self, kind: str, options: dict) -> None:
        """Show the numbers of each record in tensorboard, wandb or trackio too, while it runs."""
        try:
            if kind == "tensorboard":
                board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(self.path)
                self.live = lambda numbers, step: [board.add_scalar(k, x, step) for k, x in numbers.items()]
                return
            live, os.environ["WANDB_RUN_ID"] = importlib.import_module(kind), self.path.name  # to go on with
        except ImportError:
            raise InputError(f"--log {kind}: not installed; pip install {kind}") from None
        live.init(project="srpo", name=self.path.name, config=options, resume="allow")
        self.live = live.log

    def checkpoint(self) -> Path | None:
        """The last whole one; what a killed process left half written has another name."""
        found = [p for p in self.path.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", p.name)]
        return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)

    def save(self, step: int, policy, optimizer) -> None:
        def fill(folder):
            policy.save(folder)
            torch.save({"step": step, "optimizer": optimizer.state_dict()}, folder / "trainer.pt")

        write_folder(self.path / f"checkpoint-{step:06d}", fill)
        for old in {*self.path.glob("checkpoint-*")} - {self.checkpoint()}:
            shutil.rmtree(old)

    def restore(self, optimizer, device: str) -> int:
        """Put the last checkpoint's state into the optimizer; the number of steps done."""
        if not (checkpoint := self.checkpoint()):
            return 0
        try:
            state = torch.load(checkpoint / "trainer.pt", map_location=device, weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            return int(state["step"])
        except Exception as error:  # a cut file, a foreign one
            raise InputError(f"{checkpoint}: remove it, trainer.pt is broken ({first_line(error)})") from None


def write_folder(folder: Path, fill) -> None:
    """Make `folder` whole or not at all: `fill` writes beside it, then it is renamed into place."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True, exist_ok=True)
        fill(beside)
        beside.rename(folder)
    except Exception as error:  # a full disk, too, which safetensors and torch report in ways of their own
        shutil.rmtree(beside, ignore_errors=True)
        if not folder.exists():  # else another process was first
            raise InputError(f"{folder}: cannot be written ({first_line(error)})") from None
