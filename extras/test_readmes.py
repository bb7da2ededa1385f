"""Tests of the READMEs: what they name exists, and the commands that they show can be run.

pip install pytest, then python -m pytest -q extras/test_readmes.py
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import srpo  # noqa: E402
import train  # noqa: E402
from test_srpo import LOGGED, README, section  # noqa: E402

MORE = (HERE / "README.md").read_text(encoding="utf-8")
BOTH = README + MORE
EXTRAS = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.py")}


def test_every_command_is_one():
    lines = re.findall(r"^python train\.py (.*?)(?: *#.*)?$", BOTH, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        if "--help" not in line:
            train.build_parser().parse_args(shlex.split(line))


def test_every_option_exists():
    options = train.build_parser()._option_string_actions
    for option in re.findall(r"`(--[a-z-]+)", BOTH):
        if option not in options:
            assert any(f'"{option}"' in text for text in EXTRAS.values()), option


@pytest.mark.parametrize(("folder", "text"), [(HERE.parent, README), (HERE, MORE)])
def test_every_linked_file_exists(folder, text):
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (folder / path).exists(), path


def test_every_function_of_a_file_exists():
    for file, name in re.findall(r"extras/(\w+\.py):(\w+)", BOTH):
        assert f"def {name}(" in EXTRAS[file], name


def test_every_test_exists():
    core = (HERE.parent / "test_srpo.py").read_text(encoding="utf-8")
    tests = core + "".join(EXTRAS.values())
    for name in re.findall(r"`(test_\w+)`", BOTH):
        assert f"def {name}(" in tests, name


def test_every_function_in_the_table_of_steps_exists():
    rows = re.findall(r"^\|.*", section("The method, step by step"), re.MULTILINE)
    for name in re.findall(r"`(\w+)`", "".join(rows)):
        assert hasattr(srpo, name), name


def test_the_table_of_metrics_is_complete():
    cells = re.findall(r"^\| (`.*?) \|", section("What is logged", MORE), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == LOGGED
