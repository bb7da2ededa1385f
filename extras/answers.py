"""A reward that knows answers in the forms they come in. pip install 'math-verify[antlr4_13_2]'

    python train.py --reward extras/answers.py:reward --data my.jsonl --model ...

What stands in \\boxed{...} is the answer, on either side. It is right if one of these says so:

    answers_match   numbers and words, as without this file            3.0 is 3
    chosen          multiple choice, by its letter or by what it says  (b), or 12 cm, is B. 12 cm
    same_formula    mathematics, by math-verify                        2\\sqrt{3} is \\sqrt{12}
"""

import re

from data import Example, InputError, Verdict, answers_match, verify

# B, (B), B. or, with what it stands for, B. 12 cm
TRUE_CHOICE = re.compile(r"\(?([A-J])(?:\)?\.?|[).:]\s*\S.*)")
# The same as a response may say it: also in lower case, and after "option" or "choice"
GIVEN_CHOICE = re.compile(
    r"(?:(?:option|choice) )?\(?([A-J])(?:[).:](?:\s.*)?)?", re.DOTALL | re.IGNORECASE
)
LISTED_CHOICE = re.compile(r"^\s*\(?([A-J])[).:]\s*(\S.*?)\s*$", re.MULTILINE)


def reward(text: str, example: Example) -> Verdict:
    def match(given: str, truth: str) -> bool:
        return is_right(given, truth, example.question)

    return verify(text, example, match=match)


def is_right(given: str, truth: str, question: str = "") -> bool:
    given = unboxed(given)
    truth = unboxed(truth)
    if answers_match(given, truth):
        return True
    choice = TRUE_CHOICE.fullmatch(truth)
    if choice is not None:
        listed = dict(LISTED_CHOICE.findall(f"{question}\n{truth}"))
        return chosen(given, choice[1], listed)
    return same_formula(given, truth)


def unboxed(text: str) -> str:
    """Content of the last \\boxed{...} that is closed, or the whole text without one."""
    starts = [match.end() for match in re.finditer(r"\\boxed\{", text)]
    for start in reversed(starts):
        depth = 1  # of braces
        for end in range(start, len(text)):
            if text[end] == "{":
                depth += 1
            elif text[end] == "}":
                depth -= 1
            if depth == 0:
                return text[start:end].strip()
    return text.strip()


def chosen(given: str, letter: str, listed: dict[str, str]) -> bool:
    """Whether the choice `letter` was made: by the letter, or by what is listed after it."""
    choice = GIVEN_CHOICE.fullmatch(given)
    if choice is not None:
        return choice[1].upper() == letter
    if letter not in listed:
        return False
    if answers_match(given, listed[letter]):
        return True
    return same_formula(given, listed[letter])


def same_formula(given: str, truth: str) -> bool:
    """Equal as mathematics. math-verify leaves out units: 12 m is 12 cm."""
    # It reads words as products of letters: ask it only where there is a number or a command.
    if re.search(r"\d|\\", truth) is None:
        return False
    try:
        import math_verify
    except ImportError:
        install = "pip install 'math-verify[antlr4_13_2]'"
        raise InputError(f"math-verify is missing: {install}") from None
    truth = math_verify.parse(f"${truth}$")
    given = math_verify.parse(f"${given}$")
    return bool(math_verify.verify(truth, given))
