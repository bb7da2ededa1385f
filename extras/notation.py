"""What an answer says, in plain notation: `clean` text, and the `quantity` if it is a number."""

import functools
import re
import unicodedata
from fractions import Fraction

LONGEST = 20_000  # characters that are looked at
LONGEST_QUANTITY = 200


# ---- clean the notation

# NFKC, which comes after these, would make x2 of x², 11/2 of 1½ and 145o of 145º.
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
PLAIN_SUPERSCRIPTS = str.maketrans(SUPERSCRIPTS, "0123456789+-")
BEFORE_NFKC = [
    (r"(?<=\d)(?=[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " "),
    (r"[º˚]", "°"),
    (r"[\u200b-\u200f\u2060\ufeff\u00ad]", ""),  # have no width
]
AFTER_NFKC = [
    (r"[−–—‒‐]", "-"),
    (r"⁄", "/"),
    (r"[“”„]", '"'),
    (r"[‘’`]", "'"),
    (r"\s+", " "),
]
STYLE = r"\\(?:text\w*|math(?:rm|bf|it|sf)|boldsymbol|bm|mbox)\s*\{([^{}]*)\}"
LATEX = [
    (r",\\! ?|\{,\}", ","),
    (r"\\!", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad\b", " "),
    (r"\\(?:left|right|displaystyle)\b ?", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (STYLE, r"\1"),
    (STYLE, r"\1"),  # one inside another
    (r"\^ ?\{? ?\\circ ?\}?|\\degree\b", "°"),
    (r"\\%", "%"),
    (r"(?<=[\w)])\*\*(?=[\w(-])", "^"),  # a power as in Python; others are markdown
    (r"\*\*+", ""),
    (r"^\$([^$]+)\$ ?([^$ ]+(?: [^$ ]+)?)$", r"\1 \2"),  # $5$ cm
    (r"^\+/?-", r"\\pm "),
    (r"^([+-]) +", r"\1"),
]
# Around the whole, and not closed inside
WRAPPERS = [
    r"\$\$([^$]+)\$\$",
    r"\$((?:[^$\\]|\\.)+)\$",
    r"\\\(((?:[^\\]|\\[^()])*)\\\)",
    r"\\\[((?:[^\\]|\\[^\[\]])*)\\\]",
    r"\*+([^*]+)\*+",
    r"'+([^']+)'+",
    r"_+([^_]+)_+",
    r'"([^"]+)"',
]
LEADS = [
    r"^(?:so|thus|hence|therefore),? (?=.)",
    r"^(?:the |my )?(?:final |correct )?answer\b(?: is\b| ?=)?[: ]*(?=.)",
    r"^(?:it is|it's|this is|that is|there are|they are) ",
    r"^(?:正确)?答案[是为: ]*(?=.)",
    r"^= ?(?=.)",
]
HEDGES = r"\b(?:no|not|or|actually|maybe|perhaps|never)\b"
# What a sentence says besides its answer
EXPLANATIONS = [
    r"^(?:(?!\b(?:or|not|no|never|neither|none|nothing|cannot|if|half|twice)\b|n't\b).)*"
    r"\b(?:is|are|equals|it's) (?=[-+$€£]?\d)",
    r"(?<=\w) \([^()\d]+ [^()\d]+\)$",  # yes (there is one)
    r",? (?:because|since)\b.*",
    r", (?:as(?! well\b)|which(?!.*\b(?:wrong|incorrect|false|not right|not correct)\b))\b.*",
    rf"(?<=\d)\. (?!.*{HEDGES})(?=\D+$)(?:<\||\S+ \S+ \S).*",  # a sentence after a number
]


def replaced(text: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


def without_explanation(text: str) -> str:
    if len(text) > 2_000:  # for long texts the patterns are slow
        return text
    for explanation in EXPLANATIONS:
        text = re.sub(explanation, "", text, flags=re.IGNORECASE)
    return trimmed(text)


def trimmed(text: str) -> str:
    """Without space, and without the marks that end a sentence."""
    return text.lstrip(" ,;:").rstrip(" .,;:。")


def boxes(text: str) -> list[tuple[int, int]]:
    """(start, end) of what stands in each \\boxed{...} that is closed."""
    found = []
    open_braces = []  # of each one, where its box begins; None if it is no box
    for brace in re.finditer(r"\\boxed ?\{|\\[{}]|[{}]", text):
        if brace[0].startswith(r"\boxed"):
            open_braces.append(brace.end())
        elif brace[0] == "{":
            open_braces.append(None)
        elif brace[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                found.append((start, brace.start()))
    return found


def unboxed(text: str) -> str:
    """Content of the last \\boxed{...} that is closed, or the whole text without one."""
    found = boxes(text)
    if found:
        start, end = max(found)
        text = text[start:end]
    return text.strip()


def power_of(found: re.Match) -> str:
    return "^" + found[0].translate(PLAIN_SUPERSCRIPTS)


@functools.lru_cache(maxsize=1024)
def plain_signs(text: str) -> str:
    """One sign for all that Unicode has for it, and single spaces."""
    text = replaced(text, BEFORE_NFKC)
    text = re.sub(f"[{SUPERSCRIPTS}]+", power_of, text)
    text = unicodedata.normalize("NFKC", text)
    return replaced(text, AFTER_NFKC).strip()


@functools.lru_cache(maxsize=1024)
def clean(answer: str) -> str:
    """The answer alone, in plain notation."""
    text = unboxed(plain_signs(answer))
    if len(text) > LONGEST:
        return text
    text = re.sub(r"^\\boxed ", "", text)
    for _ in range(3):  # what is taken off here stands inside one another
        text = trimmed(text)
        text = re.sub(r"(?<=[^\W\d_]{2})[!?]+$", "", text)
        for wrapper in WRAPPERS:
            wrapped = re.fullmatch(wrapper, text)
            if wrapped is not None:
                text = wrapped[1].strip()
        text = replaced(text, LATEX)
        for lead in LEADS:
            text = re.sub(lead, "", text, flags=re.IGNORECASE)
    if "$" not in answer and re.fullmatch(r"\{[^\\{}]*,[^\\{}]*\}", text):
        text = rf"\{{{text[1:-1]}\}}"  # braces without LaTeX are those of a set
    text = text.replace(r"\$", "$")
    return trimmed(" ".join(text.split()))


# ---- numbers with units

# Each unit, then what else it is called; plurals, squares and cubes need no entry.
UNITS = """
° deg degree | % percent percentage pct | $ dollar usd | € euro eur | £ gbp | ¢ cent
¥ yuan rmb cny yen 元 | mm millimeter millimetre | cm centimeter centimetre CM 厘米
dm decimeter decimetre | m meter metre 米 | km kilometer kilometre KM 千米 | in inch inches
ft foot feet | yd yard | mi mile | mg milligram | g gram 克 | kg kilogram kilo KG 千克 | lb pound
oz ounce | t ton tonne | ms millisecond | s sec second 秒 | min minute 分钟 | h hr hour 小时
day 天 | week | month | year yr | L l liter litre | mL ml milliliter millilitre | N newton
J joule | kJ kilojoule | W watt | kW kilowatt | MW megawatt | mW milliwatt | V volt
A amp ampere | mA milliampere | Ω ohm | Hz hertz | Pa pascal | kPa kilopascal | K kelvin
C celsius | F fahrenheit | rad radian | mol mole | mph | unit
"""


def names_of_units() -> dict[str, str]:
    units = {}
    for line in UNITS.replace("|", "\n").strip().splitlines():
        unit = line.split()[0]
        for name in line.split():
            units[name] = unit
            if len(name) > 2:
                units[name + "s"] = unit
    return units


UNIT_NAMES = names_of_units()
UNIT_NOTATION = [
    (r"\bper cent\b", "percent"),
    (r"US\$", "$"),
    (r"\b(?:square|sq\.?) ([^\W\d_]+)", r"\1^2"),
    (r"\b(?:cubic|cu\.?) ([^\W\d_]+)", r"\1^3"),
    (r" ?\bper\b ?", "/"),
    (r"\b(?:km[hp]h?|kph)\b", "km/h"),
    (r"\^\{(-?\d)\}", r"^\1"),
    (r"(?<=[^\W\d_])(?=-?\d)", "^"),  # cm2
    (r"[ *]", "·"),
]
CURRENCY = re.compile(r"([-+]?)(US\$|USD|EUR|GBP|[$€£¥]) ?([\d.].*)")
# What may stand after a number: letters and signs, digits only as exponents
EXPONENT = r"(?<! )\^?\{?-?[1-9]\}?(?![\d/])"
UNIT = re.compile(rf" ?[^\W\d_°%$€£¥¢]?(?:[^\W\d_]|[°%$€£¥¢ ./*·]|{EXPONENT})*")
NOT_A_UNIT = re.compile(
    r"(?:half|halve|quarter|third|\w+th|ten|dozen|hundred|thousand|\w+illion|crore|lakh|score|pair"
    r"|plus?|minus?)s?$"
)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SPELLED = re.compile(
    rf"({'|'.join(TENS)})(?:[- ]({'|'.join(ONES[1:10])}))?\b|({'|'.join(ONES)})\b", re.IGNORECASE
)
NUMBER_NOTATION = [
    (r"\\frac ?\{(\d+)\} ?\{(\d+)\}", r" \1/\2"),
    (r"\\frac ?(\d) ?(\d)", r" \1/\2"),
    (r"^([-+]?) ", r"\1"),
    (r" ?(?:\\times|\\cdot|[×·*]|(?<=\d) ?x(?= ?10\^)) ?(?=10\^)", "*"),
    (r"\^\{([-+]?\d+)\}", r"^\1"),
    (r"^([-+]?)10\^", r"\g<1>1*10^"),
    (r"^([-+]?\d{1,3})\.(\d{3}),(\d+)(?!\d)", r"\1\2.\3"),
]
THOUSANDS = re.compile(
    r"(?<![\d.,])[1-9](?:\d{0,2}(?:,\d{3})+|\d?(?:,\d{2})+,\d{3}"
    r"|\d{0,2}(?: \d{3})+|\d{0,2}(?:'\d{3})+)(?![\d,/])"
)
DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+(?![\d,]).*)")
NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<whole>\d+)(?: and)? (?=\d+/))?(?P<top>\d+\.?\d*|\.\d+)"
    r"(?:/(?P<bottom>[-+]?(?:\d+\.?\d*|\.\d+)))?(?:(?:\*10\^|[eE])(?P<exponent>[-+]?\d{1,3})(?!\d))?"
)


@functools.lru_cache(maxsize=1024)
def quantity(answer: str) -> tuple[Fraction, str] | None:
    """Value and unit of an answer that is a number; None where it is anything else."""
    text = clean(answer)
    if len(text) > LONGEST_QUANTITY:
        return None
    text = CURRENCY.sub(r"\1\3 \2", text, count=1)
    if SPELLED.match(text):
        text = SPELLED.sub(spelled_number, text, count=1)
    text = replaced(text, NUMBER_NOTATION)
    text = THOUSANDS.sub(without_separators, text, count=1)
    text = DECIMAL_COMMA.sub(r"\1.\2", text, count=1)
    number = NUMBER.match(text)
    if number is None or UNIT.fullmatch(text[number.end() :]) is None:
        return None
    value = Fraction(number["top"])
    if number["bottom"]:
        bottom = Fraction(number["bottom"])
        if bottom == 0:
            return None
        value /= bottom
    if number["whole"]:
        value += int(number["whole"])
    if number["exponent"]:
        value *= Fraction(10) ** int(number["exponent"])
    if number["sign"] == "-":
        value = -value
    return value, unit_of(text[number.end() :])


def spelled_number(found: re.Match) -> str:
    tens, one, alone = found.groups()
    if alone:
        return str(ONES.index(alone.lower()))
    number = 10 * TENS.index(tens.lower()) + 20
    if one:
        number += ONES.index(one.lower())
    return str(number)


def without_separators(found: re.Match) -> str:
    return re.sub("[ ,']", "", found[0])


def unit_of(text: str) -> str:
    """A unit under its usual name: cm^2 for square centimeters."""
    text = replaced(text.strip(" ."), UNIT_NOTATION)
    return re.sub(r"[^\W\d_]+|[°%$€£¥¢]", usual_name, text)


def usual_name(found: re.Match) -> str:
    name = found[0]
    if len(name) > 2:
        return UNIT_NAMES.get(name, UNIT_NAMES.get(name.lower(), name))
    return UNIT_NAMES.get(name, name)


def is_known(unit: str) -> bool:
    words = re.findall(r"[^\W\d_]+|[°%$€£¥¢]", unit)
    return bool(words) and all(word in UNIT_NAMES.values() for word in words)


def units_agree(unit: str, true_unit: str) -> bool | None:
    """None where what follows the numbers need not be units."""
    if unit == true_unit:
        return True
    if unit and true_unit:
        if is_known(unit) and is_known(true_unit):
            return False
        return None
    either = unit + true_unit
    counted = re.fullmatch(r"[^\W\d_]{3,}s", either) and not NOT_A_UNIT.match(either)
    if is_known(either) or counted:
        return True
    return None


def rounded_alike(a: Fraction, b: Fraction) -> bool:
    """0.142857 is 1/7: to six digits after the point, as math-verify has it, and in all."""
    error = abs(a - b)  # 0 for equal ones
    return error * 10**6 <= Fraction(1, 2) and error * 10**5 <= abs(b)
