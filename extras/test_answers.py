"""Tests of answers.py: pip install 'math-verify[antlr4_13_2]' pytest, then
python -m pytest -q extras/test_answers.py"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")

import answers  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

PLACE = f"{HERE / 'answers.py'}:reward"
LISTED = "Which?\nA. 10 cm\nB. 12 cm\n(C) no idea"


@pytest.mark.parametrize(
    ("given", "truth", "question", "right"),
    [
        ("(b)", "B", "", True),
        ("B. 12 cm", "B", "", True),
        ("option B", "B", "", True),
        ("12 cm", "B", LISTED, True),
        ("No idea.", "C", LISTED, True),
        ("10 cm", "B", LISTED, False),
        ("12 cm", "B", "", False),
        ("B", "B. 12 cm", "", True),
        ("12 cm", "B. 12 cm", "", True),
        ("A. 12 cm", "B. 12 cm", "", False),
        ("Blue", "B", "", False),
        ("A. B", "B", "", False),
        ("A", "B. 12 cm", LISTED, False),
    ],
)
def test_multiple_choice(given, truth, question, right):
    assert answers.is_right(given, truth, question) == right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}} or \boxed{12", r"\frac{1}{2}"),
        (r"\boxed{a{b{c{d{e{f}}}}}}", "a{b{c{d{e{f}}}}}"),
        (" none ", "none"),
        (r"\boxed{", r"\boxed{"),
    ],
)
def test_the_last_closed_box_is_the_answer(text, content):
    assert answers.unboxed(text) == content


@pytest.mark.parametrize(
    ("given", "truth", "right"),
    [
        (r"so \boxed{12}", "12", True),
        ("12", r"\boxed{12}", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\frac{1}{2}} or \boxed{12", "12", False),
        (r"$2\sqrt{3}$", r"\sqrt{12}", True),
        (r"$2\sqrt{5}$", r"\sqrt{12}", False),
        ("0.5", r"\frac{1}{2}", True),
        ("Cat.", "cat", True),
        ("act", "cat", False),  # products of the same letters
        ("no", "on", False),
        ("lube", "blue", False),
    ],
)
def test_boxed_answers_and_mathematics(given, truth, right):
    assert answers.is_right(given, truth) == right


def test_the_reward_is_the_verifiers_with_more_answers_right():
    judge = train.build_judge(train.resolve_options(["--reward", PLACE]))
    example = data.Example((), "?", r"\sqrt{12}")
    text = data.respond("a", "b", r"$2\sqrt{3}$")
    assert data.verify(text, example).accuracy == 0
    assert judge(text, example) == data.Verdict(1.0, 1.0, 1.0)
    assert judge(text.replace("3", "5"), example).accuracy == 0
    choice = data.Example((), LISTED, "B")
    assert judge(data.respond("a", "b", "12 cm"), choice).accuracy == 1
    assert judge("hm <answer>(b)</answer>", choice).accuracy == 1
    assert judge("hm <answer>(b)</answer>", choice).format == 0


def test_math_verify_is_asked_for_where_it_is_needed(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    options = ["--reward", PLACE, "--warmup-steps", "20", "--out", str(tmp_path / "run")]
    assert train.main(options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: --reward {PLACE}: ")
    assert "pip install 'math-verify[antlr4_13_2]'" in said
    assert answers.unboxed(r"\boxed{1}") == "1"
    assert answers.is_right("b", "B")
    assert not answers.is_right("on", "no")
