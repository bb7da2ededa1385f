"""A reward that knows answers in the forms people write. pip install 'math-verify[antlr4_13_2]'

    python train.py --reward extras/answers.py:reward --data my.jsonl --model ...

Both sides are cleaned (notation.py): LaTeX wrappers, Unicode forms, quotes, markdown, a lead such
as "Answer:".
Then the first of these rules that has something to say decides. If none has, it is wrong.

    same_text       the same after cleaning                                  $13$ is 13
    same_choice     where the question lists options, or the truth is a      (b), or 12 cm, is B
                    letter: the same options, by their letters or texts
    same_quantity   a number and its unit; one side may leave the unit out   5cm is 5 cm, not 5 m
    same_clock      clock times, digit by digit                              09:15 is 9:15
    same_words      without case, articles, plural; short words with case    a dog is Dog
    same_formula    math-verify, where the notation leaves no doubt          2√3 is \\sqrt{12}

An answer is compared as a whole: a second number, option or word in it counts.
"""

import functools
import logging
import re
import signal
import sys
import threading
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from notation import (  # noqa: E402
    HEDGES,
    LONGEST,
    boxes,
    clean,
    is_known,
    plain_signs,
    quantity,
    replaced,
    rounded_alike,
    unit_of,
    units_agree,
    without_explanation,
)

from data import Example, InputError, Verdict, verify  # noqa: E402

TIME_LIMIT = 5.0  # seconds for one answer
LONGEST_CHOICE = 500  # characters


def reward(text: str, example: Example) -> Verdict:
    load_math_verify()  # a run without it stops at its first response

    def match(given: str, truth: str) -> bool:
        return is_right(given, truth, example.question)

    return verify(text, example, match=match)


def is_right(given: str, truth: str, question: str = "") -> bool:
    """Whether `given` is the answer `truth`; it is not if TIME_LIMIT seconds do not tell."""
    try:
        return within_time_limit(functools.partial(compare, given, truth, question))
    except TimeIsUp:
        said = f"math-verify took over {TIME_LIMIT:g} s"
        print(f"{said}, counted as wrong: {given[:60]!r} for {truth[:60]!r}", file=sys.stderr)
        return False


def compare(given: str, truth: str, question: str) -> bool:
    if matches(given, truth, question):
        return True
    alone = without_explanation(clean(given))
    if alone == clean(given) or without_explanation(clean(truth)) != clean(truth):
        return False  # where the truth explains itself, all of it counts
    return matches(alone, truth, question)


def matches(given: str, truth: str, question: str) -> bool:
    if same_text(given, truth):
        return True
    choice = same_choice(given, truth, question)
    if choice is not None:
        return choice
    return same_value(given, truth)


def same_value(given: str, truth: str) -> bool:
    """The rules that need no question."""
    for rule in (same_text, same_quantity, same_clock, same_words, same_formula):
        verdict = rule(given, truth)
        if verdict is not None:
            return verdict
    return False


def same_text(given: str, truth: str) -> bool | None:
    if clean(truth) != "" and clean(given) == clean(truth):
        return True
    return None


# ---- choices

# Where an option begins: A. (A) a) A: A、 - A. **A.**; not inside a name such as U.S.A.
OPTION = re.compile(r"(?<![\w.'])\*{0,2}(?:\(([A-Ja-j])\)|([A-Ja-j])[.):、])\*{0,2}\s?")
# A truth that brings its own option: (B) 12 cm, B. 12 cm; B. Russell is a name
OWN_OPTION = re.compile(r"\(?([A-J])(?:[):、]|\.(?! ?[^\W\d_])) ?(.+)")
LETTER = re.compile(r"[(\[{<【]? ?([A-Ja-j]) ?[)\]}>】]?[.、!]?")
LETTERS = re.compile(r"\(?[A-J]\)?(?:[ /]?\(?[A-J]\)?)+")
LETTER_AND_TEXT = re.compile(
    r"[(\[]?([A-Ja-j])(?:[)\]][.:]? ?|[.:、,] ?| ?- ?|(?<=[A-J]) )\(?(.+?)\)?"
)
BEFORE_CHOICE = [
    r"^i (?:choose|pick|select|think) ",
    r"^(?:the )?(?:correct |right )?(?:option|choice|letter)s?\b(?: is\b)?[: ]*(?=.)",
    r"^[故应]?[选選][择擇项項]?[: ]*(?=.)",
]
AFTER_CHOICE = r" is (?:the )?(?:correct|right|answer)(?: answer| option| choice)?$|选项$"
# What follows a letter is no reason for it if it names another one, or takes it back.
TAKEN_BACK = "no|not|or|actually|but|never|perhaps|maybe|none|false|wrong|incorrect|cannot"
ARTICLE = re.compile(r"A (?!(?:is|has|was|as|since|because)\b)[a-z]")  # a man; not: A is it
ANOTHER = re.compile(rf"\b(?:[A-J]|\w+n't|(?i:[b-h]|{TAKEN_BACK}))\b")


def same_choice(given: str, truth: str, question: str) -> bool | None:
    plain_truth = clean(truth)
    options = listed_options(question)
    own = OWN_OPTION.fullmatch(plain_truth)
    if not options and own is not None:
        options = {own[1]: own[2]}
    if not options and (LETTER.fullmatch(plain_truth) is None or plain_truth.islower()):
        return None  # a lower-case letter alone is a variable
    right = chosen(truth, options)
    if right is None:
        return None
    return chosen(given, options) == right


@functools.lru_cache(maxsize=1024)
def listed_options(question: str) -> dict[str, str]:
    """Letter and text of each option that a question lists: A, B and so on, two at least."""
    question = unicodedata.normalize("NFKC", question)
    marks = []
    for mark in OPTION.finditer(question):
        letter = mark[mark.lastindex].upper()
        if letter == "A" and len(marks) == 1:
            marks = []  # the one before was a word
        if letter == "ABCDEFGHIJ"[len(marks) : len(marks) + 1]:
            marks.append(mark)
    if len(marks) < 2:
        return {}
    options = {}
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    for letter, mark, end in zip("ABCDEFGHIJ", marks, ends, strict=False):
        text = question[mark.end() : end].strip()
        options[letter] = text.split("\n")[0].rstrip(" -*,;")
    return options


def chosen(answer: str, options: dict[str, str]) -> set[str] | None:
    """The letters of the options that an answer names, and nothing besides; else None."""
    text = clean(answer)
    if len(text) > LONGEST_CHOICE:
        return None
    for lead in BEFORE_CHOICE:
        text = re.sub(lead, "", text, flags=re.IGNORECASE)
    text = re.sub(AFTER_CHOICE, "", text)
    letter = named_option(text, options)
    if letter is not None:
        return {letter}
    parts = re.split(r" ?(?:[,;、&+]|\band\b|和) ?", text)
    if LETTERS.fullmatch(text):
        parts = re.findall("[A-J]", text)
    letters = {named_option(part, options) for part in parts if part}
    if len(parts) == 1 or None in letters:
        return None
    return letters


def named_option(text: str, options: dict[str, str]) -> str | None:
    """The letter of the one option that a text names; without options, any letter."""
    single = LETTER.fullmatch(text)
    if single is not None:
        letter = single[1].upper()
        if options and letter not in options:
            return None
        return letter
    exact = [letter for letter in options if same_text(text, options[letter])]
    if len(exact) == 1:
        return exact[0]
    explained = LETTER_AND_TEXT.fullmatch(text)
    if explained is not None:
        letter = explained[1].upper()
        if not options and not ARTICLE.match(text) and not ANOTHER.search(explained[2]):
            return letter
        if letter in options and same_value(explained[2], options[letter]):
            return letter
        if letter in options or not options:
            return None
    similar = [letter for letter in options if same_value(text, options[letter])]
    if len(similar) == 1:
        return similar[0]
    return None


# ---- numbers with units


def same_quantity(given: str, truth: str) -> bool | None:
    if len(boxes(given)) > 1:
        return None  # the last one need not be all of the answer
    given_number = quantity(given)
    true_number = quantity(truth)
    if given_number is None or true_number is None:
        return None
    value, unit = given_number
    true_value, true_unit = true_number
    agree = units_agree(unit, true_unit)
    if not agree:
        return agree
    both = f"{clean(given)} {clean(truth)}"
    if unit == "%" and true_unit == "" and value == 100 * true_value:
        return True
    if unit == "" and true_unit == "%" and 100 * value == true_value:
        return True
    if "/" in both or "frac" in both:
        return rounded_alike(value, true_value)
    if value != true_value and "," in both:
        return None  # 1,2 may be two numbers
    return value == true_value


# ---- clock times and words

CLOCK = re.compile(r"0?(\d{1,2}(?::\d\d){1,2}) ?([ap]m)?")
MONTHS = (
    "january february march april may june july august september october november december"
).split()
YES_NO = ("yes", "no", "true", "false")
# A word of two letters may be a symbol (Pa, mW, CO), unless it is one of these.
SMALL_WORDS = (
    "am an as at be by do go he if in is it me my no of ok on or pm so to up us we".split()
)
WORD_NOTATION = [
    (r"\b([apAP])\.m\b\.?", r"\1m"),
    (r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})", " "),
    (r"^(?:[Aa]n?|[Tt]he) (?=.)", ""),
    (r"(?<=\w)[.,;:](?= |$)", ""),
    (r"(?<=[^\W\d_]{2})[!?]+(?= |$)", ""),
    (r"(?<=\d)(?=[^\W\d_])", " "),
]


def same_clock(given: str, truth: str) -> bool | None:
    """9:15 pm is 9:15 p.m. and not 9:15 am; 1:20 is not 2:40, though the ratio is the same."""
    given_time = CLOCK.fullmatch(replaced(clean(given).lower(), WORD_NOTATION[:1]))
    true_time = CLOCK.fullmatch(replaced(clean(truth).lower(), WORD_NOTATION[:1]))
    if given_time is None or true_time is None:
        return None
    return given_time.groups() == true_time.groups()


def same_words(given: str, truth: str) -> bool | None:
    """True or nothing: what differs as words may be the same formula."""
    words = replaced(clean(given), WORD_NOTATION).split()
    true_words = replaced(clean(truth), WORD_NOTATION).split()
    if not words or not true_words:
        return None
    if true_words[0].lower() in YES_NO and len(true_words) == 1:
        if re.match(r"no [^\W\d_]", clean(given).lower()):
            return False  # no idea
        return same_yes_no(words, true_words[0].lower())
    if len(words) == len(true_words) and all(map(same_word, words, true_words)):
        return True
    return None


def same_yes_no(words: list[str], truth: str) -> bool:
    """Yes, or yes with what is no doubt about it."""
    doubts = {*YES_NO, *"or but maybe perhaps not never unsure cannot can't".split()} - {truth}
    if truth in ("no", "false"):
        doubts -= {"not", "cannot", "can't"}
    return words[0].lower() == truth and doubts.isdisjoint(word.lower() for word in words)


def same_word(word: str, truth: str) -> bool:
    if word == truth:
        return True
    shorter, longer = sorted([word.casefold(), truth.casefold()], key=len)
    if shorter == longer:
        if len(word) <= 2:
            return shorter in SMALL_WORDS
        return len(word) > 4 or not re.search("[a-z][A-Z]", f"{word} {truth}")  # kPa
    if len(shorter) < 3 or not shorter.isalpha():
        return False
    plurals = [shorter + "es"]
    if not shorter.endswith("s"):
        plurals.append(shorter + "s")
    if shorter.endswith("y"):
        plurals.append(shorter[:-1] + "ies")
    return longer in plurals or (longer in MONTHS and longer[:3] == shorter)


# ---- formulas

SYMBOLS = {"π": "pi", "∞": "infty", "∪": "cup", "∩": "cap", "≤": "leq", "≥": "geq", "≠": "neq"}
SYMBOLS.update({"±": "pm", "×": "cdot", "·": "cdot", "÷": "div", "∈": "in", "θ": "theta"})
FORMULA_NOTATION = [
    (r"√ ?\{", r"\\sqrt{"),
    (r"√ ?(\d+|[^\W\d_])", r"\\sqrt{\1}"),
    (r"(?:√|(?<!\\)\bsqrt) ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])pi\b", r"\\pi "),
    (r"(?<![\\a-zA-Z])inf(?:ty|inity)?\b", r"\\infty "),
    (r"(?<=[^\W_])\*(?=[^\W_\d])", r"\\cdot "),
]
MARKED = re.compile(r"\$.+\$|\\\(|\\\[|\\boxed")  # formulas with an end and a beginning
MATHEMATICS = r"[\d\\=<>^√π∞+]"
DOUBTFUL = [  # what math-verify takes for less than it says
    r"^[-+]{2}",  # --12
    r"[-+*/^=<>]$",  # 5-
    r"\d \d",  # 12 13
    r"\d ?(?:[~|→]|\.\.+) ?\d",  # 5~6
    r"\d:\d\d ?[apAP]",  # 9:15 pm
    r"\d([-/.])\d+\1\d",  # 2021-03-05
]
# Numbers too large to work with, in a way that no time limit interrupts
HUGE = re.compile(r"\d{5,} ?!|!!|(?:\^|\*\*) ?[{(]? ?-?(?:\d{5,}|\d+ ?(?:\^|\*\*|!))")
RELATION = re.compile(r"[=<>]|\\(?:in|[lg]eq?|[lg]t|neq?|approx)(?![a-zA-Z])")
BOUND = re.compile(r"[<>]|\\(?:[lg]eq?|[lg]t|neq?)(?![a-zA-Z])")
NAMES = re.compile(r"\\[a-zA-Z]+|\b(?:and|or|sqrt|sin|cos|tan|log|ln|exp)\b")
UNIT_END = re.compile(
    r"(?:(?<=[\d)}\]])|(?<=\\pi)) ?[^\W\d_°%€£¥¢]?[^\d(){}\[\]\\+=<>]*(?:\^?\{?\d\}?)?$"
)
BRACKETS = re.compile(r"(\\\{|[(\[]).*,.*(\\\}|[)\]])")


def same_formula(given: str, truth: str) -> bool | None:
    """Whether math-verify says so, where it loses nothing that counts."""
    if max(len(given), len(truth)) > LONGEST or not re.search(MATHEMATICS, clean(truth)):
        return None
    if HUGE.search(plain_signs(given)) or HUGE.search(plain_signs(truth)):
        return None
    truth_in_text = stands_in_text(truth)
    if truth_in_text and not MARKED.search(truth):
        return None  # words
    if stands_in_text(given) or truth_in_text:
        if len(given) < 200 and not boxes(given) and re.search(HEDGES, given, re.IGNORECASE):
            return None
        return ask_math_verify(for_math_verify(given), for_math_verify(truth))
    given, given_unit = without_unit(formula(given))
    truth, true_unit = without_unit(formula(truth))
    if units_agree(given_unit, true_unit) is False or not comparable(given, truth):
        return None
    return ask_math_verify(f"${given}$", f"${truth}$")


def stands_in_text(answer: str) -> bool:
    """Whether the formula, or several, must be found among words."""
    text = clean(answer)
    several = len(boxes(plain_signs(answer))) > 1
    return several or MARKED.search(text) is not None or len(text.split()) > 12


def for_math_verify(answer: str) -> str:
    if stands_in_text(answer):
        return answer
    return f"${formula(answer)}$"


def formula(answer: str) -> str:
    """In the notation that math-verify reads."""
    text = clean(answer)
    for sign, name in SYMBOLS.items():
        text = text.replace(sign, f"\\{name} ")
    return replaced(text, FORMULA_NOTATION)


def without_unit(text: str) -> tuple[str, str]:
    """A formula and the unit after it; math-verify would leave it out."""
    found = UNIT_END.search(text[-40:])
    if found is None or not is_known(unit_of(found[0])):
        return text, ""
    return text[: len(text) - len(found[0])], unit_of(found[0])


def comparable(given: str, truth: str) -> bool:
    """Whether math-verify can be trusted with two formulas."""
    for text in (given, truth):
        if any(re.search(pattern, text) for pattern in DOUBTFUL):
            return False
    if given.count("'") != truth.count("'"):
        return False
    given_brackets = BRACKETS.fullmatch(given)
    true_brackets = BRACKETS.fullmatch(truth)
    if given_brackets and true_brackets and given_brackets.groups() != true_brackets.groups():
        return False
    if bool(RELATION.search(given)) != bool(RELATION.search(truth)):
        return not (BOUND.match(given) or BOUND.match(truth))  # x = 4 may be 4, and >= 4 not
    # It takes words for products of their letters, and X for x.
    return variables(given) == variables(truth)


def variables(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]", NAMES.sub("", text)))


def load_math_verify():
    try:
        import math_verify
    except ImportError:
        install = "pip install 'math-verify[antlr4_13_2]'"
        raise InputError(f"math-verify is missing: {install}") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # the time limit is ours
    return math_verify


def ask_math_verify(given: str, truth: str) -> bool:
    math_verify = load_math_verify()
    truth = math_verify.parse(truth, parsing_timeout=None)
    given = math_verify.parse(given, parsing_timeout=None)
    return bool(math_verify.verify(truth, given, timeout_seconds=None))


class TimeIsUp(BaseException):  # nothing that catches an Exception catches it
    pass


def stop(signal_number, frame):
    raise TimeIsUp


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr)


def within_time_limit(function):
    """What function() returns. TimeIsUp after TIME_LIMIT seconds; only the main thread has one."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        say_once("answers.py: outside the main thread math-verify runs without a time limit")
        return function()
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT, 1.0)  # again each second, if it was caught
    try:
        return function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
