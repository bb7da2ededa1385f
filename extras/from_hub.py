"""A data set of the Hugging Face hub as JSON lines and images, which `train.py --data` reads.

    pip install datasets
    python extras/from_hub.py hiyouga/geometry3k geometry3k      rows.jsonl and images/ there
    python extras/from_hub.py FOLDER DIR --split test            a folder that `datasets` wrote

Columns may have the names in use: image or images; problem or question; answer or solution. Of a
worked solution the last \\boxed{...}, or what stands between <answer> tags, is the answer. Options
in a column choices or options are listed below the question, as A. to J.; an answer that is the
number of one of them, counted from 0, becomes its letter. Images keep their bytes.
"""

import io
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answers import listed_options  # noqa: E402
from notation import unboxed  # noqa: E402
from PIL import Image  # noqa: E402
from script import exit_code, in_one_line  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import InputError, first_line  # noqa: E402
from train import Parser, filled  # noqa: E402

LETTERS = "ABCDEFGHIJ"


@dataclass
class Columns:
    """Their names in a data set."""

    images: str
    question: str
    answer: str
    options: str | None  # where the data set has them
    classes: list[str] | None  # names of the answers, where these are numbers of classes


def load(name: str, split: str):
    """Rows of a data set whose images are not decoded, and its columns."""
    try:
        import datasets
    except Exception as error:  # it is not there, or does not fit the packages beside it
        advice = "pip install datasets, with -U where it is there"
        raise InputError(f"from_hub.py needs datasets: {advice} ({in_one_line(error)})") from None
    if Path(name).resolve() == Path("/"):  # all files there would be looked at
        raise InputError(f"{name}: no data set; give a name on the hub or a folder")
    written = ("state.json", "dataset_dict.json")  # files of a folder that `datasets` wrote
    try:
        if any((Path(name) / file).exists() for file in written):
            rows = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
            elif rows.split is not None and str(rows.split) != split:
                raise ValueError(f"the folder holds the split {rows.split}")
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # not found, no such split, no network ...
        said = f"cannot be loaded, split {split} ({in_one_line(error)})"
        raise InputError(f"{name}: {said}") from None
    if len(rows) == 0:
        raise InputError(f"{name}: has no rows, split {split}")

    def column(*names):
        for wanted in names:
            if wanted in rows.column_names:
                return wanted
        present = ", ".join(rows.column_names)
        raise InputError(f"{name}: has no column {' or '.join(names)}, only {present}")

    images = column("images", "image")
    options = None
    for wanted in ("choices", "options"):
        if wanted in rows.column_names:
            options = wanted
    question = column("problem", "question")
    answer = column("answer", "solution")
    classes = None
    if isinstance(rows.features[answer], datasets.ClassLabel):
        classes = rows.features[answer].names
    columns = Columns(images, question, answer, options, classes)
    kind = rows.features[images]
    raw = datasets.Image(decode=False)
    if isinstance(kind, datasets.Image):
        rows = rows.cast_column(images, raw)
    elif isinstance(getattr(kind, "feature", None), datasets.Image):  # a list of them
        rows = rows.cast_column(images, type(kind)(raw))
    return rows, columns


def with_options(question: str, answer, options, source: str) -> tuple[str, str | None]:
    """The question with its options listed, and the letter of the answer if it is their number."""
    if not options:
        return question, None
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise InputError(f"{source}: expected a list of texts as options, got {str(options)[:60]}")
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"{source}: {len(options)} options; expected 2 to {len(LETTERS)}")
    lettered = list(options)
    if len(listed_options("\n".join(options))) < len(options):  # else they have their letters
        lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    listed = listed_options(question)
    same_order = listed == listed_options("\n".join(lettered))
    if not listed:
        question = "\n".join([question, *lettered])
    is_text = isinstance(answer, str) and answer.strip() in options
    if not re.fullmatch(r"-?\d+", str(answer).strip()):
        return question, None
    is_number = 0 <= int(answer) < len(options)
    if is_text and is_number:
        raise InputError(f"{source}: the answer {answer!r} may be an option's text or its number")
    if is_text:
        return question, None
    if not is_number:
        last = len(options) - 1
        raise InputError(f"{source}: the answer {answer} is no option; they are 0 to {last}")
    if listed and not same_order:
        raise InputError(f"{source}: the question lists other options than {str(options)[:60]}")
    return question, LETTERS[int(answer)]


def answer_of(row: dict, columns: Columns, source: str) -> str:
    answer = row[columns.answer]
    if columns.classes is not None:
        if not 0 <= answer < len(columns.classes):
            raise InputError(f"{source}: the answer is hidden (class {answer})")
        return columns.classes[answer]
    answer = str(answer)
    marked = "\\boxed{" in answer or "<answer>" in answer
    if columns.answer == "solution" and len(answer.split()) > 5 and not marked:
        problem = "the solution has no \\boxed{...} and no <answer>: what is right cannot be told"
        raise InputError(f"{source}: {problem}")
    answer = answer.split("<answer>")[-1]
    answer = answer.split("</answer>")[0]
    return unboxed(answer)


def image_file(image) -> tuple[bytes, str]:
    """Bytes of an image as `datasets` gives it, a path or a dict, and the name of their format."""
    content = None
    if isinstance(image, dict):
        content = image.get("bytes")
        image = image["path"]
    if not content:
        content = Path(image).read_bytes()
    return content, Image.open(io.BytesIO(content)).format.lower()


def write_images(images: list, folder: Path, number: int, source: str) -> list[str]:
    """The images of row `number` as files; returns their paths inside `folder`."""
    paths = []
    for i, image in enumerate(images):
        try:
            content, suffix = image_file(image)
        except Exception as error:  # decoders raise nearly anything
            problem = f"image {i} cannot be read ({first_line(error)})"
            raise InputError(f"{source}: {problem}") from None
        path = f"images/{number:06d}-{i}.{suffix}"
        (folder / path).write_bytes(content)
        paths.append(path)
    return paths


def rows_of(rows, name: str):
    """(where it stands, row) of each; InputError where the files are damaged."""
    for number in tqdm(range(len(rows)), desc=name, disable=None):
        source = f"{name} row {number}"
        try:
            row = rows[number]
        except Exception as error:  # what reads the files raises in ways of its own
            raise InputError(f"{source}: cannot be read ({in_one_line(error)})") from None
        yield source, row


def write(name: str, split: str, folder: Path) -> int:
    """Fill `folder`; returns the number of rows. InputError names the data set, or its row."""
    (folder / "images").mkdir(parents=True)
    rows, columns = load(name, split)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number, (source, row) in enumerate(rows_of(rows, name)):
            images = row[columns.images]
            question = row[columns.question]
            if not isinstance(images, list):
                images = [images]
            fine = images and None not in images and isinstance(question, str)
            if not fine or isinstance(row[columns.answer], list | dict | None):
                wanted = f"an image in {columns.images}, text in {columns.question}"
                wanted += f", one answer in {columns.answer}"
                raise InputError(f"{source}: expected {wanted}")
            options = None
            if columns.options is not None:
                options = row[columns.options]
            question, letter = with_options(question, row[columns.answer], options, source)
            answer = letter
            if letter is None:
                answer = answer_of(row, columns, source)
            paths = write_images(images, folder, number, source)
            line = {"images": paths, "question": question, "answer": answer}
            file.write(json.dumps(line) + "\n")
    return len(rows)


def convert(argv: list[str] | None) -> None:
    parser = Parser(description="A data set of the Hugging Face hub as JSON lines and images.")
    add = parser.add_argument
    add("name", type=filled, help="of a data set on the hub, or a folder that `datasets` wrote")
    add("dir", type=filled, help="where rows.jsonl and images/ go; new or empty")
    add("--split", type=filled, default="train", help="of the data set (default: train)")
    args = parser.parse_args(argv)
    folder = Path(args.dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: not empty; name another folder")
    whole = folder.resolve()
    beside = whole.with_name(f"{whole.name}.{os.getpid()}.tmp")  # whole or not at all
    try:
        count = write(args.name, args.split, beside)
        os.replace(beside, whole)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"{count} rows: python train.py --data {folder / 'rows.jsonl'} --model ...")


def main(argv: list[str] | None = None) -> int:
    return exit_code(convert, argv)


if __name__ == "__main__":
    sys.exit(main())
