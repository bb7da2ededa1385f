"""Tests of from_hub.py on data sets that `datasets` writes: pip install datasets pytest, then
python -m pytest -q extras/test_from_hub.py"""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
datasets = pytest.importorskip("datasets", reason="pip install datasets")

import answers  # noqa: E402
import from_hub  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402

PICTURES = [Image.new("RGB", (56, 56), (20 * i, 0, 0)) for i in range(12)]
ASKED = ["?"] * 12


def saved(folder: Path, rows: dict, split=None, kind=None) -> str:
    """A data set as `datasets` writes it; returns the name that from_hub.py takes.

    Images are of the type `kind`, `datasets.Image()` or a list of it; else paths.
    """
    found = datasets.Dataset.from_dict(rows)
    if kind is not None:
        (column,) = [name for name in rows if name.startswith("image")]
        found = found.cast_column(column, kind)
    if split is not None:
        found = datasets.DatasetDict({split: found})
    found.save_to_disk(str(folder))
    return str(folder)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_rows_and_images_are_those_of_the_data_set(tmp_path, capsys):
    images = [{"bytes": png(picture), "path": None} for picture in PICTURES]
    answers = [str(i) for i in range(12)]
    rows = {"image": images, "problem": ["Is it <image>red?"] * 12, "answer": answers}
    name = saved(tmp_path / "one", rows, split="test", kind=datasets.Image())
    out = tmp_path / "out"
    assert from_hub.main([name, str(out), "--split", "test"]) == 0
    assert "12 rows" in capsys.readouterr().out
    written = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    kept = [(out / row["images"][0]).read_bytes() for row in written]
    assert kept == [image["bytes"] for image in images]  # not encoded again
    task = data.OwnTask(out / "rows.jsonl")
    examples = [*task.train_batch(0, 11), *task.eval_set(9)]
    assert {example.answer for example in examples} == set(answers)
    for example in examples:
        red, _, _ = example.images[0].getpixel((5, 5))
        assert red == 20 * int(example.answer)


def test_images_stand_where_the_question_marks_them(tmp_path):
    rows = {"image": PICTURES, "problem": ["Is it <image>red?"] * 12, "answer": ["1"] * 12}
    name = saved(tmp_path / "one", rows, kind=datasets.Image())
    assert from_hub.main([name, str(tmp_path / "out")]) == 0
    examples = data.OwnTask(tmp_path / "out/rows.jsonl").train_batch(0, 1)
    policy = model.build_tiny(seed=0)
    ids = policy.encode(examples).ids[0].tolist()
    red = policy.tokenizer("red?", add_special_tokens=False)["input_ids"][0]
    place = ids.index(policy.image_token)
    assert place > 4
    assert red in ids[place:]
    assert red not in ids[:place]


def test_nothing_that_is_there_is_lost(tmp_path, capsys):
    rows = {"image": PICTURES, "question": ASKED, "answer": ASKED}
    name = saved(tmp_path / "one", rows, kind=datasets.Image())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    assert from_hub.main([name, str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_classes_are_answered_by_their_names_and_of_their_split(tmp_path, capsys):
    rows = {"image": PICTURES, "question": ASKED, "answer": [0, 1] * 6}
    found = datasets.Dataset.from_dict(rows, split="train").cast_column("image", datasets.Image())
    found = found.cast_column("answer", datasets.ClassLabel(names=["no", "yes"]))
    found.save_to_disk(str(tmp_path / "classes"))
    argv = [str(tmp_path / "classes"), str(tmp_path / "out")]
    assert from_hub.main([*argv, "--split", "test"]) == 2
    assert "the folder holds the split train" in capsys.readouterr().err
    assert from_hub.main(argv) == 0
    written = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in written] == ["no", "yes"] * 6


def test_several_images_and_boxed_solutions(tmp_path):
    rows = {
        "images": [[picture, picture] for picture in PICTURES],
        "question": ["Same?"] * 12,
        "solution": [r"So. \boxed{yes}"] * 12,
    }
    name = saved(tmp_path / "many", rows, kind=datasets.List(datasets.Image()))
    assert from_hub.main([name, str(tmp_path / "out")]) == 0
    task = data.OwnTask(tmp_path / "out/rows.jsonl")
    found = {(len(example.images), example.answer) for example in task.train_batch(0, 11)}
    assert found == {(2, "yes")}


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("So <answer> 7 </answer>", "7"),
        (r"It is <answer>\boxed{7}</answer>", "7"),
        ("7 cm", "7 cm"),
    ],
)
def test_the_answer_of_a_solution(solution, answer):
    columns = from_hub.Columns("image", "question", "solution", None, None)
    assert from_hub.answer_of({"solution": solution}, columns, "row 0") == answer


CHOICES = ["red", "dark blue", "green"]


@pytest.mark.parametrize(("answer", "letter"), [(0, "A"), (2, "C"), ("1", "B"), ("C", "C")])
@pytest.mark.parametrize("column", ["choices", "options"])
def test_the_number_of_an_option_becomes_its_letter(answer, letter, column, tmp_path):
    rows = {"image": PICTURES, "question": ASKED, column: [CHOICES] * 12, "answer": [answer] * 12}
    name = saved(tmp_path / "one", rows, kind=datasets.Image())
    assert from_hub.main([name, str(tmp_path / "out")]) == 0
    (example,) = data.OwnTask(tmp_path / "out/rows.jsonl").train_batch(0, 1)
    assert example.question == "?\nA. red\nB. dark blue\nC. green"
    assert example.answer == letter
    text = CHOICES["ABC".index(letter)]
    assert answers.is_right(text, example.answer, example.question)
    assert not answers.is_right("blue", example.answer, example.question)


def test_options_that_the_question_lists_are_not_listed_again(tmp_path):
    question = "Which? (A) red (B) dark blue (C) green"
    rows = {
        "image": PICTURES,
        "question": [question] * 12,
        "choices": [CHOICES] * 12,
        "answer": ["dark blue"] * 12,
    }
    name = saved(tmp_path / "one", rows, kind=datasets.Image())
    assert from_hub.main([name, str(tmp_path / "out")]) == 0
    (example,) = data.OwnTask(tmp_path / "out/rows.jsonl").train_batch(0, 1)
    assert (example.question, example.answer) == (question, "dark blue")


def test_a_row_without_options_is_as_before(tmp_path):
    rows = {"image": PICTURES, "question": ASKED, "choices": [[]] * 12, "answer": [7] * 12}
    name = saved(tmp_path / "one", rows, kind=datasets.Image())
    assert from_hub.main([name, str(tmp_path / "out")]) == 0
    (example,) = data.OwnTask(tmp_path / "out/rows.jsonl").train_batch(0, 1)
    assert (example.question, example.answer) == ("?", "7")


def test_it_needs_no_math_verify(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    rows = {"image": PICTURES, "question": ASKED, "answer": [r"\boxed{1}"] * 12}
    name = saved(tmp_path / "one", rows, kind=datasets.Image())
    assert from_hub.main([name, str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("choices", [["A. red", "B. blue"], ["(A) red", "(B) blue"]])
def test_options_keep_the_letters_that_they_have(choices):
    question, letter = from_hub.with_options("?", 1, choices, "row 0")
    assert question == "\n".join(["?", *choices])
    assert letter == "B"


def test_an_answer_that_can_only_be_the_text_of_an_option_stays():
    question, letter = from_hub.with_options("?", "20", ["10", "20"], "row 0")
    assert (question, letter) == ("?\nA. 10\nB. 20", None)


def with_choices(choices, answer) -> dict:
    rows = {"image": PICTURES, "question": ASKED}
    return {**rows, "choices": [choices] * 12, "answer": [answer] * 12}


FAULTS = {
    "no column problem or question, only image, answer": {"image": ["a.png"], "answer": ["1"]},
    "row 0: image 0 cannot be read": {"image": ["a.png"], "question": ["?"], "answer": ["1"]},
    "row 0: the solution has no": {
        "image": PICTURES,
        "question": ASKED,
        "solution": ["The same color, so it is yes."] * 12,
    },
    "row 0: expected": {"image": PICTURES, "question": ASKED, "answer": [["yes", "yeah"]] * 12},
    "row 0: the answer 3 is no option; they are 0 to 2": with_choices(CHOICES, 3),
    "row 0: the answer -1 is no option": with_choices(CHOICES, -1),
    "row 0: the answer '1' may be an option's text or its number": with_choices(["1", "2"], "1"),
    "row 0: the question lists other options": {
        **with_choices(CHOICES, 1),
        "question": ["Which? (A) dark blue (B) red (C) green"] * 12,
    },
    "row 0: 1 options; expected 2 to 10": with_choices(["1"], "0"),
    "row 0: expected a list of texts as options, got red": with_choices("red", 0),
}


@pytest.mark.parametrize("said", FAULTS)
def test_faulty_rows_are_one_line_and_leave_nothing(said, tmp_path, capsys):
    rows = FAULTS[said]
    kind = None
    if rows["image"] is PICTURES:
        kind = datasets.Image()
    name = saved(tmp_path / "rows", rows, kind=kind)
    complaint(said, name, tmp_path, capsys)


def complaint(said, name, tmp_path, capsys):
    capsys.readouterr()
    assert from_hub.main([name, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {name}")
    assert said in error
    assert not list(tmp_path.glob("out*"))


def test_what_is_not_there_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    complaint("cannot be loaded", str(tmp_path / "none"), tmp_path, capsys)
    rows = {"image": PICTURES, "question": ASKED, "answer": ASKED}
    name = saved(tmp_path / "rows", rows, split="test", kind=datasets.Image())
    complaint("cannot be loaded, split train", name, tmp_path, capsys)


def test_a_data_set_without_rows_is_one_line(tmp_path, capsys, monkeypatch):
    def load_dataset(name, split):
        return datasets.Dataset.from_dict({"image": [], "question": [], "answer": []})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    complaint("has no rows, split train", "owner/name", tmp_path, capsys)


def test_a_data_set_with_damaged_files_is_one_line(tmp_path, capsys):
    rows = {"image": PICTURES, "question": ASKED, "answer": ASKED}
    name = saved(tmp_path / "rows", rows, kind=datasets.Image())
    (file,) = (tmp_path / "rows").glob("*.arrow")
    content = file.read_bytes()
    for length in (0, 100, len(content) // 2):
        file.write_bytes(content[:length])
        complaint("", name, tmp_path, capsys)


def test_without_the_package_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert from_hub.main(["name", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pip install datasets" in said
    assert said.count("\n") == 1
