"""Answers that are not class names: an option, a number, a formula.

As with labels, an answer is read as a whole, possibly after a lead-in. An answer with two values
has none. No function raises because of a text, and each takes a bounded time on any thread.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from virft_fast.arguments import need_package
from virft_fast.tasks.labels import answer_text, fold, mentioned, peel, readings, same_label, words

# --- Options ---------------------------------------------------------------------------------

LETTERS = "abcdefghij"  # of the options, if a row doesn't list them
_MAX_CHOICE = 2000  # characters
_ROMAN = dict(zip("i ii iii iv v vi vii viii ix x xi xii".split(), range(1, 13), strict=True))
_OPTION = re.compile(
    r"(?:(?:option|choice|answer|opción|opção|opzione|вариант|विकल्प|选项|選項|故?选择?|故?選擇?|"
    r"選択肢|선택지)(?: is)? ?[:#]? ?)?[(\[]?(?P<name>[a-z]|\d{1,2}|[ivx]{2,4})[)\]]?"
    r"(?: is (?:the )?(?:correct|right)(?: (?:answer|option|choice))?"
    r"|(?:[.:)\]、](?!\d)|(?<!\d) - ) ?(?P<text>.+))?"
)
# A letter or number on its own, or between characters of a script without spaces.
_LATIN = "[a-z0-9\u00c0-\u024f\u1e00-\u1eff]"
_ALONE = re.compile(rf"(?<!{_LATIN})(?:[ivx]{{2,4}}|[a-z]|\d{{1,2}})(?!'?{_LATIN}|\.\d| ?=|\()")
_ARTICLE = re.compile(r"[ai] [^\W\d_]{2}")
# Words after an option's letter that retract it or express doubt.
_RETRACTIONS = Path(__file__).with_name("retractions.txt").read_text("utf-8")
_TAKEN_BACK = frozenset(_RETRACTIONS.casefold().split())
_TAKEN_BACK_WITHIN = re.compile(
    r"n't|\bn'|[≠¬❌✗✘]|[不没沒非无無未否错錯除别別違誤]|以外|ない|なく|なし|ませ|"
    r"じゃな|あらず|ちが|아[니닌님닙닐]|않|못|없|제외|틀[렸린림]|말고|빼고"
)
# Negations with which an option's text may begin: "No", "None of the above". Together with a word
# of the second set, they judge the option instead: "Not correct".
_NEGATIVE = frozenset("no non none not nothing neither never cannot can false nein faux".split())
_JUDGING = frozenset("correct right true answer option choice it this that one way".split())
# The letters in "vitamin C", "triangle E", "20 g" and "x = c" don't name an option.
_LETTERED = re.compile(
    r"((?:vitamin[ae]?|hepatitis|type|class|grade|triangle|point|angle|line|figure|group|team) |"
    r"维生素 ?|ビタミン|비타민 ?|[∠△] ?|\w ?= ?|[\d°] ?(?=[acfghj](?! ?[.:)\]、])))"
    rf"[a-z](?!{_LATIN})"
)


def option_of(text: str, options: Sequence[str] | None = None) -> str | None:
    """The option that an answer picks by letter or number, in lower case: "B", "(b)", "2", "iv",
    "option B", "B. a cat". None if it picks none or several, or retracts its choice.

    Args:
        options: the texts of the options, in order, if the row lists them. Letters and numbers must
            then be within the options. The text after the letter may be that option's own text,
            whatever its words, but not another option's. If None, letters go up to "j" (and Roman
            "v" and "x"). Any other text after the letter must not retract it or name a second one.
    """
    text = answer_text(text)
    if len(text) > _MAX_CHOICE:
        return None
    # The letter may be on a line of its own, above its text.
    spellings = (*readings(text), *readings(text.replace("\n", ": ", 1)))
    option = next(filter(None, map(_OPTION.fullmatch, spellings)), None)
    if option is None:
        return None
    name, said = option["name"], option["text"]
    place = _place(name, options)
    if place is None:
        return None
    texts = list(enumerate(map(_text_of, options or ()), start=1))
    named = [n for n, option in texts if said and same_label(said, option)]
    if said is None or place in named:
        return name
    others = [readings(option)[-1] for n, option in texts if n != place]
    unclear = named or mentioned(said, others) or _takes_back(said, name, options, text)
    return None if unclear else name


def _place(name: str, options: Sequence[str] | None) -> int | None:
    """The number of the option with this name, from 1; None if there aren't that many options."""
    count = len(options or LETTERS)
    letter = ord(name) - ord("a") + 1 if len(name) == 1 else 0
    number = letter if 0 < letter <= count else _ROMAN.get(name, 1000)
    place = int(name) if name.isdecimal() else number
    return place if place <= (count if options else 99) else None


def _text_of(option: str) -> str:
    """An option's text, without a leading letter."""
    match = _OPTION.fullmatch(peel(fold(option)))
    return (match and match["text"]) or option


def _takes_back(said: str, name: str, options: Sequence[str] | None, text: str) -> bool:
    """Whether the text after an option's letter rejects the option, or may name another one.

    Args:
        text: the whole answer, not folded. A capitalized negation begins an option's text.
    """
    said = _LETTERED.sub(r"\1", said)
    for other in _ALONE.finditer(said):
        article = _ARTICLE.match(said, other.start())
        # Without a list, options are either lettered or numbered; Roman numerals are numbers, too.
        numbered = other[0].isdecimal()
        alike = numbered or other[0] in LETTERS or name in _ROMAN
        alike = options is not None or (alike and numbered == name.isdecimal())
        if other[0] != name and not article and alike and _place(other[0], options) is not None:
            return True
    head, *rest = [*words(said), ""]
    capitals = {head.capitalize(), head.upper()}
    if options is None and head in _NEGATIVE and not capitals.isdisjoint(re.findall(r"\w+", text)):
        if not _JUDGING.isdisjoint(rest) or name in rest or (head == "not" and not rest[1:]):
            return True
        said = " ".join(rest[1:] if head == "can" else rest)
    return bool(_TAKEN_BACK_WITHIN.search(said)) or not _TAKEN_BACK.isdisjoint(words(said))


# --- Numbers ---------------------------------------------------------------------------------

_MAX_NUMBER = 500  # characters
_UNIT = r"[^\W\d_]{1,12}(?:\^\d|[²³])?"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?P<currency>[$€£¥₹]?) ?(?P<whole>(?!0)\d{1,3}(?:,\d{3})+|\d{1,60})?"
    r"(?P<decimals>\.\d{1,60})?(?:e(?P<power>[-+]?\d{1,2}))?(?: ?/ ?(?P<below>\d{1,60}))?"
    rf" ?(?P<unit>%|°?(?:{_UNIT}(?:/{_UNIT})?)?)"
)


class Number(NamedTuple):
    """The exact value; the unit or currency, "" if none; whether it was written as a fraction."""

    value: Fraction
    unit: str
    is_fraction: bool


def number_of(text: str) -> Number | None:
    """The number in an answer: "-5", "3.50", "1,234", "1/2", "2e3", "$5", "80%", "5 cm", digits of
    any script. None if there is none or several, or if it isn't exact ("<5", "~5", "5±1")."""
    text = answer_text(text)
    if len(text) > _MAX_NUMBER:
        return None
    for reading in reversed(readings(text)):  # otherwise です would be read as the unit
        match = _NUMBER.fullmatch(reading.replace("−", "-"))
        if match and (match["whole"] or match["decimals"]) and int(match["below"] or 1):
            value = Fraction((match["whole"] or "0").replace(",", "") + (match["decimals"] or ""))
            value = value * Fraction(10) ** int(match["power"] or 0) / int(match["below"] or 1)
            value = -value if match["sign"] == "-" else value
            unit = match["unit"].replace("²", "^2").replace("³", "^3")
            return Number(value, match["currency"] + unit, match["below"] is not None)
    return None


def same_number(answer: str, truth: str) -> bool:
    """Whether two numbers are equal and have the same unit or none.

    "4/2" equals 2 only if the truth is a fraction, too, because it may be two answers.
    """
    given, wanted = number_of(answer), number_of(truth)
    return given is not None and wanted is not None and _equal(given, wanted)


def _equal(given: Number, wanted: Number) -> bool:
    is_extra = given.is_fraction and not wanted.is_fraction and wanted.value.denominator == 1
    return (given.value, given.unit) == (wanted.value, wanted.unit) and not is_extra


# --- Formulas --------------------------------------------------------------------------------

MAX_FORMULA = 200  # characters
_MAX_CALLS = 4_000_000  # function calls per comparison; a run's first ones take up to 1,000,000
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega"
# "x = 5", "f(x) = 5", "\theta_1 = 5"
_NAMED = re.compile(
    rf"(?P<name>(?:[A-Za-z]|\\(?:{_GREEK}))(?:_\{{?\w{{1,3}}\}}?)?'?(?:\([a-z]\))?) ?= ?(?P<is>.+)"
)
_TEXT = r"\\(?:text|mathrm|mbox) ?\{[^{}]*\}(?:\^(?:\{[^{}]*\}|\w))?"  # with its exponent
_SIGNS = str.maketrans({"π": r"\pi ", "≤": r"\leq ", "≥": r"\geq ", "°": r"^{\circ}"})
_NORMAL = [  # other spelling -> normal spelling
    (re.compile(r"√ ?(?:\(([^()]*)\)|(\d+|[A-Za-z](?![A-Za-z])))"), r"\\sqrt{\1\2}"),
    (re.compile(r"\^{1,2} ?(?:\\circ|\{ ?\^?\{?\\circ ?\}?\})|\\degree"), r"^{\\circ}"),
    (re.compile(r"\^ ?\{(\w)\}(?! ?[\w^])"), r"^\1"),
    (re.compile(r"(\\[lg]e)(?![A-Za-z])"), r"\1q"),
    (re.compile(r"\\(?:left|right)(?![A-Za-z]) ?|\\[!,]"), ""),
]
_SPELLED = [  # LaTeX -> a form that `number_of` reads
    (re.compile(r"^(\\[dt]?frac ?\{(?:\d+\}\{)?)-"), r"-\1"),
    (re.compile(r"(?<![\d.])\\[dt]?frac ?(?:\{(\d+)\}\{(\d+)\}|(\d)(\d)(?!\d))"), r"\1\3/\2\4"),
    (re.compile(r"(?<=\d) ?(?:\\times|\\cdot|×) ?10\^(?:\{(-?\d\d?)\}|(\d))"), r"e\1\2"),
    (re.compile(r"\\(?:text|mathrm|mbox) ?\{([^{}]*)\}"), r" \1"),
    (re.compile(r"(?<=\d)\{,\}(?=\d{3})"), ","),
    (re.compile(r"\^\{\\circ\} *(?!$)"), "°"),
    (re.compile(r"\\([%$])|\^\{\\circ\}"), r"\1"),
]
# Tokens that may occur anywhere in a formula with one value. All others join or compare values
# (= < , \pm \cup \text{or} and so on) and are allowed only if the truth has the same. A \text token
# includes its exponent. "ABC" and "east" are one token each: their letters aren't factors.
_TOKEN = re.compile(rf"{_TEXT}|\\[A-Za-z]+|\\.|[A-Z]{{2,}}|[A-Za-z]{{4,}}|.", re.DOTALL)
_ONE_VALUE = frozenset(
    r"\frac \dfrac \tfrac \sqrt \cdot \times \div \pi \infty \sin \cos \tan \cot \sec"
    r" \csc \arcsin \arccos \arctan \log \ln \exp \overline".split()
) | {rf"\{name}" for name in _GREEK.split("|")}
_PUNCTUATION = frozenset("0123456789+-−*/^_(){}.' ·×÷∞")
_FUNCTIONS = re.compile(r"(?<![A-Za-z\\])(?:sqrt|sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])")
# A division after which the next factor may or may not belong to the denominator.
_AMBIGUOUS = re.compile(rf"/ ?\d+ ?(?:[A-Za-z(]|\\(?:pi|sqrt|[dt]?frac|{_GREEK}))")
# Large powers, factorials and numbers, and two numbers next to each other.
_UNREAD = re.compile(
    r"\^ ?\{? ?[-(]*\d{3,}|\^\d*\^|\^ ?\\(?!circ|pi|theta)|(?:\d{3}|[)}\]!]) ?!|\d{60}|"
    r"\\binom.*(?:\d{3}|\^)|\d\s+[\d.]|\*\*|[({\[]{20}"
)


class _Endless(BaseException):
    """A comparison took too many steps. A BaseException, so `except Exception` doesn't catch it."""


def import_math_verify() -> ModuleType:
    """The module math-verify.

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    return need_package("accuracy_math", "math_verify", "math-verify", "math")


@functools.cache
def _warm_up() -> None:
    """Make math-verify build its tables, so that this doesn't count toward a comparison's limit."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no timeout
    for given, wanted in (("(x+1)^2", r"x^2+\frac{4}{2}x+1"), (r"2\sqrt{2}", r"\sqrt{8}")):
        _verify(given, wanted)


def same_formula(answer: str, truth: str) -> bool:
    """Whether an answer is one value and equals the truth according to math-verify.

    If the truth is a number, the answer must be one, too. Otherwise, the signs and words that join
    or qualify values must match the truth's. So must everything that math-verify drops or reorders:
    units, texts, factorials, degrees, names such as ABC, a tuple's brackets. "1/2x" has two
    readings and equals only itself.

    Raises:
        ValueError: math-verify is not installed.
    """
    import_math_verify()
    raw = [_rewrite(answer_text(t).translate(_SIGNS), _NORMAL).strip() for t in (answer, truth)]
    given, wanted = map(peel, raw)
    if not given or len(given) > MAX_FORMULA:
        return False
    (given_name, given), (name, wanted) = _named(given), _named(wanted)
    if given_name and name and given_name != name:
        return False
    factorials = raw[0].count("!") == raw[1].count("!")
    if " ".join(given.split()) == " ".join(wanted.split()):
        return factorials
    ambiguous = any(map(_AMBIGUOUS.search, (given, wanted)))
    spelled = [_rewrite(text, _SPELLED) for text in (given, wanted)]
    read, number = map(number_of, spelled)
    # A space distinguishes the unit in "2 m" from the variable in "2x".
    spaced, has_unit = (re.search(r"\d +[^\W\d_]", text) for text in spelled)
    is_unit = has_unit or (spaced and not ambiguous)
    if number is not None and (is_unit or not number.unit.isalpha()):
        if read is not None and not read.unit and has_unit:
            read = read._replace(unit=number.unit)  # the unit may be missing
        return read is not None and _equal(read, number)
    if any(re.search(_TEXT, text) and not re.search(_TEXT, peel(text)) for text in raw):
        return factorials and fold(given) == fold(wanted)
    if ambiguous or not factorials or _UNREAD.search(given) or not _is_small(given):
        return False
    if not _is_as_single(given, wanted):
        return False
    _warm_up()
    return _within(_MAX_CALLS, lambda: _verify(given, wanted))


def _named(text: str) -> tuple[str, str]:
    """The name and value in "x = 5"; "" if there is no name."""
    match = _NAMED.fullmatch(text)
    return (match["name"], match["is"].strip()) if match and "=" not in match["is"] else ("", text)


def _rewrite(text: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    return functools.reduce(lambda text, rule: rule[0].sub(rule[1], text), rules, text)


def _is_small(text: str) -> bool:
    """Whether brackets are balanced and powers small, unlike in 9^{9^9}, 2^{99*99*99} and
    ((9^{99}+1)^{99}+1)^{99}. A single product of large numbers can't be interrupted."""
    text = text.replace(" ", "")
    opened, powers = [0], [0]  # position of each open bracket, and the number of powers in it
    for at, char in enumerate(text):
        if char in "({[":
            opened.append(at)
            powers.append(0)
        elif char == "^":
            powers[-1] += 1
        elif char in ")}]":
            start, within = opened.pop(), powers.pop()
            chunk, is_raised = text[start:at], text[at + 1 : at + 2] == "^"
            if text[:start].endswith("^"):
                is_large = within or is_raised or sum(map(str.isdigit, chunk)) > 4
            else:
                is_large = is_raised and within and (within > 2 or bool(re.search(r"\d\d", chunk)))
            if is_large or not opened:
                return False
            powers[-1] += within
    return len(opened) == 1


def _is_as_single(given: str, wanted: str) -> bool:
    """Whether the formula joins values as the truth does and has no additional letters."""
    (joints, letters), (true_joints, true_letters) = _joints(given), _joints(wanted)
    if "," in wanted and given.startswith("(") != wanted.startswith("("):
        return False
    return joints == true_joints and letters <= true_letters


def _joints(text: str) -> tuple[Counter[str], set[str]]:
    """The counts of the tokens that may join values, and the letters outside function names."""
    tokens = _TOKEN.findall(_FUNCTIONS.sub("", text))
    letters = {token for token in tokens if token.isalpha() and len(token) == 1}
    return Counter(t for t in tokens if t not in _ONE_VALUE | _PUNCTUATION | letters), letters


def _verify(given: str, wanted: str) -> bool:
    math_verify = import_math_verify()
    # math-verify's own timeouts use signals, which reach only the main thread.
    try:
        texts = (f"\\boxed{{{text}}}" for text in (wanted, given))
        read = [math_verify.parse(text, parsing_timeout=None) for text in texts]
        return bool(all(read) and math_verify.verify(*read, timeout_seconds=None))
    # Model output is data, and the parser's errors have no common base class.
    except Exception:
        return False


def _within(limit: int, compare: Callable[[], bool]) -> bool:
    """The result of `compare`, or False after `limit` function calls.

    Unlike a timeout, this works on any thread and gives the same result on every machine. There is
    no limit while a profiler runs.
    """
    if sys.getprofile() is not None:
        return compare()
    left = limit

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Endless

    sys.setprofile(count)
    try:
        return compare()
    except _Endless:
        return False
    finally:
        sys.setprofile(None)
