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

import from_hub  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402

PICTURES = [Image.new("RGB", (56, 56), (20 * i, 0, 0)) for i in range(12)]


def saved(folder, rows, split=None, images="image"):
    """A data set as `datasets` writes it; the name from_hub.py takes."""
    kind = datasets.Image() if images == "image" else datasets.List(datasets.Image())
    found = datasets.Dataset.from_dict(rows)
    found = (
        found.cast_column(images, kind) if images in rows and not isinstance(rows[images][0], str) else found
    )
    (datasets.DatasetDict({split: found}) if split else found).save_to_disk(str(folder))
    return str(folder)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_rows_and_images_are_those_of_the_data_set(tmp_path, capsys):
    images = [{"bytes": png(p), "path": None} for p in PICTURES]
    rows = {"image": images, "problem": ["Is it <image>red?"] * 12, "answer": [str(i) for i in range(12)]}
    name = saved(tmp_path / "one", rows, split="test")
    assert from_hub.main([name, str(tmp_path / "out"), "--split", "test"]) == 0
    assert "12 rows" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    kept = [(tmp_path / "out" / row["images"][0]).read_bytes() for row in written]
    assert kept == [image["bytes"] for image in images]  # not encoded again
    task = data.OwnTask(tmp_path / "out/rows.jsonl")
    examples = task.train_batch(0, 11) + task.eval_set(9)
    assert {e.answer for e in examples} == {str(i) for i in range(12)}
    assert all(e.images[0].getpixel((5, 5))[0] == 20 * int(e.answer) for e in examples)
    policy = model.build_tiny(seed=0)
    ids = policy.encode(examples[:1]).ids[0].tolist()  # the image stands where the question marks it
    red, image = policy.tokenizer("red?", add_special_tokens=False)["input_ids"][0], policy.image_token
    before = ids[: ids.index(image)]
    assert len(before) > 4 and red in ids[ids.index(image) :] and red not in before
    assert from_hub.main([name, str(tmp_path / "out"), "--split", "test"]) == 2  # nothing written is lost
    assert "not empty" in capsys.readouterr().err and (tmp_path / "out/rows.jsonl").exists()


def test_several_images_and_boxed_solutions(tmp_path):
    rows = {
        "images": [[p, p] for p in PICTURES],
        "question": ["Same?"] * 12,
        "solution": [r"So. \boxed{yes}"] * 12,
    }
    assert from_hub.main([saved(tmp_path / "many", rows, images="images"), str(tmp_path / "out")]) == 0
    task = data.OwnTask(tmp_path / "out/rows.jsonl")
    assert {(len(e.images), e.answer) for e in task.train_batch(0, 11)} == {(2, "yes")}


@pytest.mark.parametrize(
    "rows, split, said",
    [
        (
            {"image": PICTURES, "question": ["?"] * 12, "answer": ["1"] * 12},
            "test",
            "cannot be loaded, split train",
        ),
        (None, None, "cannot be loaded"),
        ({"image": ["a.png"], "answer": ["1"]}, None, "no column problem or question, only image, answer"),
        ({"image": ["a.png"], "question": ["?"], "answer": ["1"]}, None, "row 0: image 0 cannot be read"),
        (
            {"image": PICTURES, "question": ["?"] * 12, "solution": ["The same color, so it is yes."] * 12},
            None,
            "row 0",
        ),
        (
            {"image": PICTURES, "question": ["?"] * 12, "answer": [["yes", "yeah"]] * 12},
            None,
            "row 0: expected",
        ),
    ],
)
def test_faults_are_one_line_and_leave_nothing(rows, split, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = saved(tmp_path / "rows", rows, split) if rows else str(tmp_path / "none")
    capsys.readouterr()
    assert from_hub.main([name, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {name}") and said in error
    assert not list(tmp_path.glob("out*"))


def test_without_the_package_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert from_hub.main(["name", str(tmp_path / "out")]) == 2
    assert "pip install datasets" in capsys.readouterr().err
