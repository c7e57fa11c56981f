"""Answers that are no class names: an option, a number, a formula.

As with labels, an answer is read as a whole, maybe after a lead-in; one that names two is none.
No function raises on any text, and each takes a bounded time on any thread.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from virft_fast.tasks.labels import answer_text, fold, mentioned, peel, readings, same_label, words

# --- Options ---------------------------------------------------------------------------------

LETTERS = "abcdefghij"  # of options that a row doesn't list
_MAX_CHOICE = 2000  # characters
_ROMAN = dict(zip("i ii iii iv v vi vii viii ix x xi xii".split(), range(1, 13), strict=True))
_OPTION = re.compile(
    r"(?:(?:option|choice|answer|opción|opção|opzione|вариант|विकल्प|选项|選項|选择?|選擇?|選択肢|"
    r"선택지)(?: is)? ?[:#]? ?)?[(\[]?(?P<name>[a-z]|\d{1,2}|[ivx]{2,4})[)\]]?"
    r"(?:[.:)\]、](?!\d) ?(?P<text>.+))?"
)
# A letter or number alone, also among characters that no spaces part.
_LATIN = "[a-z0-9\u00c0-\u024f\u1e00-\u1eff]"
_ALONE = re.compile(rf"(?<!{_LATIN})(?:[ivx]{{2,4}}|[a-z]|\d{{1,2}})(?!{_LATIN}|'{_LATIN}|\.\d)")
_ARTICLE = re.compile(r"[ai] [^\W\d_]{2}")
# Words after an option's letter that take it back or doubt it.
_TAKEN_BACK = frozenset(
    """
    not no nor never none neither nobody nothing hardly unlikely untrue invalid rejected cannot
    isnt dont except excluding excluded without wrong incorrect false nope nah but both either
    beide ambos maybe perhaps rather else other instead opposite ruled eliminated discarded
    dismissed impossible refuted nicht kein keine keinen keiner keinem nie niemals weder außer ohne
    falsch inkorrekt nein keinesfalls keineswegs mitnichten ausgeschlossen unmöglich
    unwahrscheinlich sondern pas ne non aucun aucune jamais ni sauf sans faux fausse incorrecte
    exclu exclue éliminé éliminée nunca ningún ninguno ninguna sin excepto salvo falso falsa
    incorrecto incorrecta tampoco menos imposible descartado descartada não nenhum nenhuma nem sem
    exceto errado errada incorreto impossível nessun nessuno nessuna senza tranne eccetto sbagliato
    escluso esclusa impossibile не нет ни без кроме неверно неправильно исключено исключён исключен
    невозможно नहीं न ना मत बिना सिवा सिवाय अलावा गलत ग़लत không chẳng chưa sai trừ
    """.casefold().split()
)
_TAKEN_BACK_WITHIN = re.compile(
    r"n't|\bn'|[≠¬❌✗✘]|[不没沒非无無未否错錯除别別違誤]|以外|ない|なく|なし|ませ|"
    r"じゃな|あらず|ちが|아[니닌님닙닐]|않|못|없|제외|틀[렸린림]|말고|빼고"
)
# The letter of "vitamin C" is no option's.
_LETTERED = re.compile(
    rf"(vitamin[ae]? |hepatitis |type |class |grade |维生素 ?|ビタミン|비타민 ?)[a-z](?!{_LATIN})"
)


def option_of(text: str, options: Sequence[str] | None = None) -> str | None:
    """The option that an answer picks by its letter or number, in lower case: "B", "(b)", "2",
    "iv", "option B", "B. a cat". None if it picks none, or several, or takes back what it picks.

    Args:
        options: their texts, in order, where the row lists them. Letters and numbers then go as
            far as they do, else letters to "j" (and Roman "v" and "x"), and a text after the
            letter may be that of its option, whatever words are in it, but of no other. Else it
            may be any text that negates nothing and names no second letter.
    """
    text = answer_text(text)
    if len(text) > _MAX_CHOICE:
        return None
    found = next(filter(None, map(_OPTION.fullmatch, readings(text))), None)
    if found is None:
        return None
    name, said = found["name"], found["text"]
    place = _place(name, options)
    if place is None:
        return None
    texts = list(enumerate(map(_text_of, options or ()), start=1))
    named = [n for n, option in texts if said and same_label(said, option)]
    if said is None or place in named:
        return name
    others = [readings(option)[-1] for n, option in texts if n != place]
    return None if named or mentioned(said, others) or _takes_back(said, name, options) else name


def _place(name: str, options: Sequence[str] | None) -> int | None:
    """Which option a name is, from 1; None if there are not so many."""
    if name.isdecimal():
        place, most = int(name), 99
    elif len(name) == 1 and (options or name in LETTERS):
        place, most = ord(name) - ord("a") + 1, len(LETTERS)
        if options and place > len(options):
            place = _ROMAN.get(name, place)
    else:
        place, most = _ROMAN.get(name, 100), 99
    return place if place <= (len(options) if options else most) else None


def _text_of(option: str) -> str:
    """An option's text, without a letter of its own."""
    found = _OPTION.fullmatch(peel(fold(option)))
    return found["text"] if found and found["text"] else option


def _takes_back(said: str, name: str, options: Sequence[str] | None) -> bool:
    """Whether a text after an option's letter negates it, or may name another option."""
    said = _LETTERED.sub(r"\1", said)
    for other in _ALONE.finditer(said):
        article = _ARTICLE.match(said, other.start())
        # Where the options aren't known, those of letters are not numbered as well.
        alike = options is not None or other[0].isdecimal() == name.isdecimal()
        if other[0] != name and not article and alike and _place(other[0], options) is not None:
            return True
    return bool(_TAKEN_BACK_WITHIN.search(said)) or not _TAKEN_BACK.isdisjoint(words(said))


# --- Numbers ---------------------------------------------------------------------------------

_MAX_NUMBER = 500  # characters
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?P<currency>[$€£¥₹]?) ?(?P<whole>(?!0)\d{1,3}(?:,\d{3})+|\d{1,60})?"
    r"(?P<decimals>\.\d{1,60})?(?:e(?P<power>[-+]?\d{1,2}))?(?: ?/ ?(?P<below>\d{1,60}))?"
    r" ?(?P<unit>%|°?[^\W\d_]{0,12})"
)


class Number(NamedTuple):
    """A number, exactly; its unit or currency, "" for none; whether it is written as a fraction."""

    value: Fraction
    unit: str
    is_fraction: bool


def number_of(text: str) -> Number | None:
    """The number of an answer: "-5", "3.50", "1,234", "1/2", "2e3", "$5", "80%", "5 cm", digits of
    any script. None if it is none, or several, or about a number ("<5", "~5", "5±1")."""
    text = answer_text(text)
    if len(text) > _MAX_NUMBER:
        return None
    for reading in reversed(readings(text)):  # です is no unit
        found = _NUMBER.fullmatch(reading.replace("−", "-"))
        if not found or not (found["whole"] or found["decimals"]):
            continue
        if not (below := Fraction(found["below"] or 1)):
            continue
        value = Fraction((found["whole"] or "0").replace(",", "") + (found["decimals"] or ""))
        value = value * Fraction(10) ** int(found["power"] or 0) / below
        value = -value if found["sign"] == "-" else value
        return Number(value, found["currency"] + found["unit"], found["below"] is not None)
    return None


def same_number(answer: str, truth: str) -> bool:
    """Whether two numbers are equal, with the same unit or none. "4/2" is 2 only where the truth is
    a fraction, too: it may be two answers."""
    given, wanted = number_of(answer), number_of(truth)
    return given is not None and wanted is not None and _equal(given, wanted)


def _equal(given: Number, wanted: Number) -> bool:
    unasked = given.is_fraction and not wanted.is_fraction and wanted.value.denominator == 1
    return (given.value, given.unit) == (wanted.value, wanted.unit) and not unasked


# --- Formulas --------------------------------------------------------------------------------

MAX_FORMULA = 200  # characters
_MAX_CALLS = 4_000_000  # of functions in a comparison; the first ones of a run take up to 1,000,000
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega"
# "x = 5", "f(x) = 5", "\theta_1 = 5"
_NAMED = re.compile(
    rf"(?P<name>(?:[A-Za-z]|\\(?:{_GREEK}))(?:_\{{?\w{{1,3}}\}}?)?'?(?:\([a-z]\))?) ?= ?(?P<is>.+)"
)
_SPELLED = [  # LaTeX -> what `number_of` reads
    (re.compile(r"(?<![\d.])\\[dt]?frac ?(?:\{(\d+)\}\{(\d+)\}|(\d)(\d)(?!\d))"), r"\1\3/\2\4"),
    (re.compile(r"(?<=\d) ?(?:\\times|\\cdot|×) ?10\^(?:\{(-?\d\d?)\}|(\d))"), r"e\1\2"),
    (re.compile(r"\\(?:text|mathrm|mbox) ?\{([^{}]*)\}"), r" \1"),
    (re.compile(r"(?<=\d)\{,\}(?=\d{3})"), ","),
    (re.compile(r"\\([%$])|\^\{?(?:\\circ|°)\}?|\\[!,]"), r"\1"),
]
# What may stand anywhere in a formula of one value. All else joins values or compares them, and is
# only read where the truth has the same: = < , \pm \cup \text{or} and so on.
_PART = re.compile(r"\\(?:text|mathrm|mbox) ?\{[^{}]*\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_ONE_VALUE = frozenset(
    r"\frac \dfrac \tfrac \sqrt \cdot \times \div \left \right \circ \pi \infty \sin \cos \tan \cot"
    r" \sec \csc \arcsin \arccos \arctan \log \ln \exp \overline".split()
) | {rf"\{name}" for name in _GREEK.split("|")}
_PUNCTUATION = frozenset("0123456789+-−*/^_(){}.' ·×÷√π∞°")
_FUNCTIONS = re.compile(r"(?<![A-Za-z\\])(?:sqrt|sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])")
# Large powers, factorials and numbers, and two numbers side by side.
_UNREAD = re.compile(
    r"\^ ?\{? ?[-(]*\d{3,}|\^\d*\^|\^ ?\\(?!circ|pi|theta)|(?:\d{3}|[)}\]!]) ?!|\d{60}|"
    r"\\binom.*(?:\d{3}|\^)|\d\s+[\d.]|\*\*|[({\[]{20}"
)


class _Endless(BaseException):
    """A comparison took too many steps. No handler of `Exception` may hold it."""


def import_math_verify() -> Any:
    """The package.

    Raises:
        ValueError: it is not installed; says how to get it.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(
            "accuracy_math: expected the package math-verify; pip install 'virft_fast[math]'"
        ) from error
    return math_verify


@functools.cache
def _warm_up(math_verify: Any) -> None:
    """What it builds when it is first used is no part of a comparison."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no timeout
    for given, wanted in (("(x+1)^2", r"x^2+\frac{4}{2}x+1"), (r"2\sqrt{2}", r"\sqrt{8}")):
        _verify(math_verify, given, wanted)


def same_formula(answer: str, truth: str) -> bool:
    """Whether an answer is one value and the truth's, by math-verify.

    Where the truth is a number, so must be the answer. Else signs and words that could join several
    values, or say something about one, must be those of the truth.

    Raises:
        ValueError: math-verify is not installed.
    """
    math_verify = import_math_verify()
    given, wanted = (peel(answer_text(text).strip()) for text in (answer, truth))
    if not given or len(given) > MAX_FORMULA:
        return False
    (given_name, given), (name, wanted) = _named(given), _named(wanted)
    if given_name and name and given_name != name:
        return False
    if " ".join(given.split()) == " ".join(wanted.split()):
        return True
    if (number := number_of(_spelled(wanted))) is not None:
        read = number_of(_spelled(given))
        if read is not None and not read.unit and number.unit.isalpha():  # the unit may be missing
            read = read._replace(unit=number.unit)
        return read is not None and _equal(read, number)
    if _UNREAD.search(given) or not (_is_small(given) and _is_as_single(given, wanted)):
        return False
    _warm_up(math_verify)
    return _within(_MAX_CALLS, lambda: _verify(math_verify, given, wanted))


def _named(text: str) -> tuple[str, str]:
    """Name and value of "x = 5"; "" for a name where there is none."""
    found = _NAMED.fullmatch(text)
    return (found["name"], found["is"].strip()) if found and "=" not in found["is"] else ("", text)


def _spelled(text: str) -> str:
    for pattern, plain in _SPELLED:
        text = pattern.sub(plain, text)
    return text


def _is_small(text: str) -> bool:
    """Whether brackets are balanced and powers small, unlike 9^{9^9}, 2^{99*99*99} and
    ((9^{99}+1)^{99}+1)^{99}: a single product of large numbers can't be stopped."""
    text = text.replace(" ", "")
    opened, powers = [0], [0]  # of each bracket that is open
    for at, char in enumerate(text):
        if char in "({[":
            opened.append(at)
            powers.append(0)
        elif char == "^":
            powers[-1] += 1
        elif char in ")}]":
            start, within = opened.pop(), powers.pop()
            if not opened:
                return False
            part, is_raised = text[start:at], text[at + 1 : at + 2] == "^"
            if text[:start].endswith("^"):
                if within or is_raised or sum(map(str.isdigit, part)) > 4:
                    return False
            elif is_raised and within and (within > 2 or re.search(r"\d\d", part)):
                return False
            powers[-1] += within
    return len(opened) == 1


def _is_as_single(given: str, wanted: str) -> bool:
    """Whether a formula has no joints and no letters but those of the truth."""
    (joints, letters), (known_joints, known_letters) = _joints(given), _joints(wanted)
    return joints == known_joints and letters <= known_letters


def _joints(text: str) -> tuple[Counter[str], set[str]]:
    """What may join values, how often; and the letters, those of known functions left out."""
    parts = _PART.findall(_FUNCTIONS.sub("", text))
    letters = {part for part in parts if part.isalpha()}
    return Counter(p for p in parts if p not in _ONE_VALUE | _PUNCTUATION | letters), letters


def _verify(math_verify: Any, given: str, wanted: str) -> bool:
    # math-verify's own timeouts are signals, which only the main thread gets.
    try:
        read = [
            math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)
            for text in (wanted, given)
        ]
        return bool(all(read) and math_verify.verify(*read, timeout_seconds=None))
    # What a model writes is data, and the parser's errors share no base.
    except Exception:
        return False


def _within(most: int, compare: Callable[[], bool]) -> bool:
    """What `compare` says, or false after `most` calls of functions: a bound that holds on any
    thread and is the same on every machine. Where a profiler runs there is no bound."""
    if sys.getprofile() is not None:
        return compare()
    left = most

    def count(frame: Any, event: str, argument: Any) -> None:
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
