"""Tests of texts: malformed responses, time that is linear, names of tags, bytes of tokens.

pip install pytest, then python -m pytest -q extras/test_text.py
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import train  # noqa: E402
from srpo import Response, Tags, parse_response, text_and_offsets, token_bytes  # noqa: E402
from test_srpo import GOOD, O, P, R, roles_of  # noqa: E402

TAG_LIST = re.findall(r"<.*?>", GOOD)


def malformed_responses():
    """Responses that a lenient parser would take."""
    bad = ["", "plain", GOOD.upper(), GOOD * 2, "Sure! " + GOOD, GOOD + " Done."]
    bad.append(GOOD + "<answer>d</answer>")
    for tag in TAG_LIST:
        bad.append(GOOD.replace(tag, ""))
        bad.append(GOOD.replace(tag, tag * 2))
    for end in range(len(GOOD)):
        bad.append(GOOD[:end])  # cut off
    swaps = [
        ("perception>", "Perception>"),
        ("<answer>", "<answer >"),
        ("<reasoning>", "so <reasoning>"),
        ("<perception>", "</perception>"),
        (">b<", "><answer>b</answer><"),
        (">a<", ">x</answer><"),
        (">a<", ">the <reasoning> tag<"),
        ("<perception>a</perception>", "</perception>a<perception>"),
    ]
    for old, new in swaps:
        bad.append(GOOD.replace(old, new))
    answer = "<answer>c</answer>"
    bad.append(f"<perception>a<reasoning>b</reasoning></perception>{answer}")  # nested
    bad.append(f"<perception>a<reasoning>b</perception></reasoning>{answer}")  # crossed
    return bad


WELL_FORMED = [
    (f"\r\n {GOOD}\t\n", ("a", "b", "c")),
    (GOOD.replace("><", ">\r\n<").replace("a<", "x\r\ny\n<"), ("x\r\ny\n", "b", "c")),
    (GOOD.replace(">a<", "><"), ("", "b", "c")),
    (GOOD.replace(">b<", "> \n<"), ("a", " \n", "c")),
    (GOOD.replace(">a<", ">红色的圆 🙂<"), ("红色的圆 🙂", "b", "c")),
    (GOOD.replace(">a<", "><b>x < y</b> <PERCEPTION><<"), ("<b>x < y</b> <PERCEPTION><", "b", "c")),
]


@pytest.mark.parametrize("text", malformed_responses())
def test_the_parser_refuses_what_is_malformed(text):
    assert parse_response(text) is None


@pytest.mark.parametrize(("text", "blocks"), WELL_FORMED)
def test_the_parser_finds_the_blocks(text, blocks):
    found = parse_response(text)
    spans = (found.perception, found.reasoning, found.answer)
    assert tuple(text[start:end] for start, end in spans) == blocks


UNITS = ["<", "<perception", "<perception>", "</perception>", "a ", "\n"]
UNITS.append("<perception></perception>")


@pytest.mark.parametrize("unit", UNITS)
def test_the_parser_searches_a_text_a_fixed_number_of_times(unit):
    """So it is linear, however many broken tags the text holds."""
    calls = []

    class Counted(str):
        def __getattribute__(self, name):
            calls.append(name)
            return super().__getattribute__(name)

    for text in (unit * 20_000, GOOD.replace(">a<", f">{unit * 20_000}<")):
        calls.clear()
        found = parse_response(Counted(text))
        assert 0 < len(calls) <= 12
        if "perception>" in unit:
            assert found is None


def test_tags_can_be_renamed():
    found = parse_response("<see>a</see><think></think><say>c</say>", Tags("see", "think", "say"))
    assert found == Response((5, 6), (19, 19), (32, 33))


def test_renamed_tags_are_those_of_the_loop_too(monkeypatch):
    monkeypatch.setattr(data, "TAGS", Tags("see", "think", "say"))
    text = data.respond("a", "b", "c")
    assert text == "<see>a</see><think>b</think><say>c</say>"
    characters = [(i, i + 1) for i in range(len(text))]
    rollout = SimpleNamespace(ids=torch.zeros(1, len(text)))
    roles = train.response_roles([(text, characters)], rollout)[0].tolist()
    assert roles.count(P) == roles.count(R) == 1


@pytest.mark.parametrize("names", ["aab", ("", "a", "b")])
def test_tags_must_differ(names):
    with pytest.raises(ValueError, match="different"):
        Tags(*names)


def test_a_token_of_half_a_character_touches_the_whole_one():
    smile = "🙂".encode()
    pieces = [b"<perception>", smile[:2], smile[2:] + b"</", b"perception>\xff"]
    text, offsets = text_and_offsets(pieces)
    assert text == "<perception>🙂</perception>\ufffd"  # bytes that are not UTF-8 read as U+FFFD
    assert offsets[1] == (12, 13)
    assert offsets[2] == (12, 15)
    rest = b"<reasoning>b</reasoning><answer>c</answer>"
    pieces = [b"<perception>", smile[:1], smile[1:3], smile[3:] + b"</perception>", rest]
    assert roles_of(pieces) == [O, P, P, P, R]


def test_bytes_of_a_byte_level_vocabulary():
    assert token_bytes("Ġb2") == b" b2"
    assert token_bytes("ÃĹĊ") == "\u00d7\n".encode()
    with pytest.raises(ValueError, match="not a byte-level"):
        token_bytes("\u2581b2")
