"""Tests of the verifier: answers that are the same, tags in their place, time.

pip install pytest, then python -m pytest -q extras/test_verifier.py
"""

import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
from test_srpo import EXAMPLE  # noqa: E402

# ---- the reward


@pytest.mark.parametrize(
    ("response", "accuracy", "tags"),
    [
        (data.respond(" ", "y", "1"), 1, 5),  # a blank block: not the whole form
        (data.respond("x", "y", " "), 0, 5),
        (data.respond("x", "y", "1") + "<answer>2</answer>", 0, 4),
        ("hm <answer>1</answer>", 1, 2),
        ("What is it?", 0, 0),
    ],
)
def test_a_malformed_response_is_paid_for_its_tags_in_place(response, accuracy, tags):
    v = data.verify(response, EXAMPLE)
    assert v.accuracy == accuracy
    assert v.format == 0
    assert v.reward == pytest.approx(0.9 * accuracy + tags / 60)


# ---- answers

SAME = [
    ("3", "3.0"),
    ("1,000", "1000"),
    ("1/2", "0.5"),
    ("\u22127", "-7"),
    ("7.", "7"),
    ("(B)", "b"),
    ("B.", "B"),
    ("Same", "same"),
    ("Same!", "same"),
    (".5", "0.5"),
    ("  two  words ", "Two words"),
    ("nan", "NaN"),
    ("<", "<"),
    ("**3**", "3"),
    ("(3)", "3"),
    ("**.5**", "0.5"),
    ("1e-05", "0.00001"),
    ("1e-5", "0.00001"),
    ("1.5e3", "1500"),
    ("1e+3", "1,000"),
    ("'red'", "red"),
    ("e\u0301", "\u00e9"),
    ("+3", "3"),
]
DIFFERENT = [
    ("-7", "7"),
    ("12", "1"),
    ("A dog", "a"),
    ("", ""),
    (".", "."),
    ("1/0", "1"),
    ("1e999999999", "1"),
    ("**.5**", "5"),
    ("3 apples", "3"),
    ("-5 cm", "5 cm"),
    (".5 m", "5 m"),
    ("<5", ">5"),
    ("C++", "C"),
    ("(-2, 3)", "(2, 3)"),
    ("(1) + (2)", "1) + (2"),
    ("5!", "5"),
    ("f'", "f"),
    ("(0, 1)", "[0, 1]"),
    ("[1,200]", "1200"),
    ("0" * 5000, "0"),
    ("1,00", "100"),
]


@pytest.mark.parametrize(("given", "truth"), SAME)
def test_answers_that_are_the_same(given, truth):
    assert data.answers_match(given, truth)


@pytest.mark.parametrize(("given", "truth"), DIFFERENT)
def test_answers_that_differ(given, truth):
    assert not data.answers_match(given, truth)


@pytest.mark.parametrize("unit", [". ", "\n", "0", "(", "'", "*", "1,000", "!", "é", "a!"])
@pytest.mark.parametrize("end", ["", "x"])
def test_any_answer_is_compared_in_a_moment(unit, end):
    start = time.perf_counter()
    data.answers_match(unit * 20_000 + end, "1")
    data.verify(data.respond("x", "y", unit * 20_000), EXAMPLE)
    assert time.perf_counter() - start < 1
