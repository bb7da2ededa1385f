"""A reward for formulas: answers equal as mathematics are right, too. pip install 'math-verify[antlr4_13_2]'

python train.py --reward extras/math_reward.py:reward --data my.jsonl --model ...
"""

import re

from data import Example, InputError, Verdict, answers_match, verify

try:
    import math_verify
except ImportError:
    raise InputError("math-verify is missing: pip install 'math-verify[antlr4_13_2]'") from None


def math_match(given: str, truth: str) -> bool:
    """Also equal by math-verify: 2\\sqrt{3} is \\sqrt{12}, and 12 m is 12 cm, as it leaves out units.

    It reads words as products of letters, so it is asked only where the truth holds a digit or a command.
    """
    formula = re.search(r"\d|\\", truth)
    return answers_match(given, truth) or (formula is not None and equal(truth, given))


def equal(truth: str, given: str) -> bool:
    return bool(math_verify.verify(*(math_verify.parse(f"${x}$") for x in (truth, given))))


def reward(text: str, example: Example) -> Verdict:
    return verify(text, example, match=math_match)
