"""Options, numbers and formulas: what equals what, and that two answers are none."""

from __future__ import annotations

import re
import sys
import threading
from fractions import Fraction

import pytest
from test_labels import JOINERS, SETS, attempts, earns, sample

from virft_fast.tasks import REWARDS, check_solution, detect_task, load_reward_funcs, values
from virft_fast.tasks.labels import key

CHOICE, NUMBER, MATH = (REWARDS[f"accuracy_{name}"] for name in ("choice", "number", "math"))


def pays(reward, answer, truth):
    (value,) = reward(None, [f"<think>A or 5</think><answer>{answer}</answer>"], [truth])
    return value == 1


@pytest.mark.parametrize(
    "answer", ["B", "b", "(B)", "B.", "[B]", "B. a cat", "B) a cat", "B: a cat", "option B",
               "Answer: B", "The answer is B.", "the correct answer is (B)", "选项", "答案是B"],
)  # fmt: skip
def test_an_option_by_its_letter(answer):
    assert pays(CHOICE, answer, "<answer>B</answer>") == (answer != "选项")
    assert not pays(CHOICE, answer, "A")


@pytest.mark.parametrize(
    "answer", ["", "A B C D", "A or B", "A, B", "A/B", "A and B", "It is a dog", "a dog", "AB",
               "not B", "A. cat or B. dog", "B. not a cat, A.", "all", "A. B. C. D."],
)  # fmt: skip
def test_no_option_and_several_pay_nothing(answer):
    assert not any(pays(CHOICE, answer, truth) for truth in "ABCD")


CHOICES = {
    "abcd": (list("ABCD"), None),
    "ten": (list("ABCDEFGHIJ"), None),
    "listed": (list("ABCDEFGHIJKLMNOP"), 16),
    "digits": (list("123456789"), None),
    "listed digits": ([str(n) for n in range(1, 13)], 12),
    "roman": (["I", "II", "III", "IV", "V", "VI"], None),
    "two": (["A", "B"], 2),
}
MORE_JOINERS = (*JOINERS, "-", "..", "~", "±", "e", "×", ":", ". ", ") ", "%", " to ", "^", "'",
                "、", "或", "と", ".", "$", "=", "<", "+", " ou ", " oder ", "。", "\u200b",
                "\t")  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_no_answer_earns_more_options_than_it_is(name):
    names, count = CHOICES[name]
    truths = sample(names)
    options = {"options": [f"thing {n}" for n in range(count)]} if count else {}
    plain, negated = attempts(names, MORE_JOINERS, 5)
    for answer, earned in earns("accuracy_choice", plain, truths, **options):
        assert earned <= sum(key(answer) == key(truth) for truth in truths), answer
    assert not any(earned for _, earned in earns("accuracy_choice", negated, truths, **options))


NUMBERS = {
    **{name: SETS[name] for name in ("digits", "numbers", "halves", "fractions", "signs")},
    "units": ["5", "5%", "$5", "5 cm", "5 mm", "5 mJ", "5 MJ", "5 m", "-$5", "5 °C"],
    "powers": ["1", "2", "10", "100", "1e2", "0.1", "12", "1,234", "234"],
    "wholes and halves": ["1", "2", "4", "0.5", "1/2", "4/2"],
}


def is_number(answer, truth):
    """By Python's own reading; a fraction is no whole number that is written as one."""
    if key(answer) == key(truth):
        return True
    written = re.fullmatch(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d*)[\d.]*(?:e\d+|/\d+)?", answer)
    try:
        value, wanted = (Fraction(text.replace(",", "")) for text in (answer, truth))
    except (ValueError, ZeroDivisionError):
        return False
    whole = "/" in answer and "/" not in truth and wanted.denominator == 1
    return bool(written) and value == wanted and not whole


@pytest.mark.parametrize("name", NUMBERS)
def test_no_answer_earns_more_numbers_than_it_is(name):
    plain, negated = attempts(NUMBERS[name], MORE_JOINERS, 5)
    truths = sample(NUMBERS[name])
    for answer, earned in earns("accuracy_number", plain, truths):
        assert earned <= sum(is_number(answer.replace("\u200b", ""), truth) for truth in truths), (
            answer
        )
    # "!-5" and the like aside, a sign before a sign is none.
    assert [answer for answer, earned in earns("accuracy_number", negated, truths) if earned] == []


@pytest.mark.parametrize(
    "answer, truth",
    [("2", "2"), ("(2)", "2"), ("2. a cat", "2"), ("Option 3", "3"), ("12", "12"), ("iv", "IV"),
     ("(ii) a cat", "ii"), ("选B", "B"), ("B、猫", "B"), ("B. c'est un été", "B"), ("b)", "(B)"),
     ("C. I see it", "C"), ("Вариант B", "B"), ("B: una casa", "B"), ("A. vitamin C", "A"),
     ("A. cat and dog", "A"), ("A. 维生素C", "A"), ("D. all of the above", "D"),
     ("B: hepatitis A virus", "B"), ("A. a cat or a dog", "A")],
)  # fmt: skip
def test_options_by_number_and_in_other_languages(answer, truth):
    assert pays(CHOICE, answer, truth)


@pytest.mark.parametrize(
    "answer", ["A. B, C, D all", "A: B or C", "A. BかC", "A and C", "A. Wait, it's B.", "1.5",
    "1. 2",
               "1:2", "A (wrong)", "A. is wrong", "A. none", "A is wrong",
               "A. mitnichten", "A. ruled out", "A. keineswegs", "A. see B", "A. and B", "A. both",
               "A. vitamin C or D", "A. vitamin C. B", "A. grade A, B", "A. C",
               "A" + " " * 3000 + "or B",
               "A. x" + " " * 3000 + "not"],
)  # fmt: skip
def test_options_that_are_taken_back_or_joined(answer):
    assert not any(pays(CHOICE, answer, truth) for truth in ["A", "B", "C", "D", "1", "2", "5"])


@pytest.mark.parametrize(
    "answer, truth",
    [("B. No", "B"), ("B) NO", "B"), ("B. False", "B"), ("D. Cannot be determined", "D"),
     ("D. Can't be determined", "D"), ("B. None of the above", "B"), ("A. Not visible", "A"),
     ("B. 20 g", "B"), ("B. 20 °C", "B"), ("B. 12 V", "B"), ("B. World War II", "B"),
     ("B. x = 5", "B"), ("B. E = mc^2", "B"), ("B. y = c", "B"),
     ("D. f(x) = 2x", "D"), ("D. Triangle E", "D"),
     ("The correct option is B.", "B"), ("Option B is correct", "B"), ("B is correct", "B"),
     ("B\ncat", "B"), ("(B)\na cat", "B"), ("2\na cat", "2"), ("B - a cat", "B"),
     ("\\(B\\)", "B"), ("故选B", "B")],
)  # fmt: skip
def test_an_options_text_may_negate_or_hold_units_and_variables(answer, truth):
    assert pays(CHOICE, answer, truth) and not pays(CHOICE, answer, "C")


@pytest.mark.parametrize(
    "answer", ["A. or B", "A. not A", "A. Not A", "A. Not", "A. Not correct", "A. Not this one",
               "A. No, B", "A. No. It isn't", "A. Wrong", "A. Rejected", "A. is not it", "A - B",
               "A - not B", "A\nB", "A\nB\nC", "A. 1 C. 2", "A is not correct",
               "A is correct or B is correct", "I. V", "1 - 5"],
)  # fmt: skip
def test_a_text_that_judges_its_option_or_names_another_is_none(answer):
    assert not any(pays(CHOICE, answer, truth) for truth in ["A", "B", "C", "I", "V", "1", "5"])


def test_a_row_may_list_its_options():
    listed = ["a cat", "not a cat", "C. a dog and a cat", "none of the above"]

    def scores(answer, truth, options=listed):
        return CHOICE(None, [answer], [truth], options=[options]) == [1.0]

    for answer in ("B", "B. not a cat", "(B) not a cat", "B: this is not a cat"):
        assert scores(answer, "B"), answer
    assert scores("C. a dog and a cat", "C") and scores("4. none of the above", "4")
    # another option's text, one that joins two, a letter or number that no option has
    assert not scores("A. a cat or a dog", "A", ["cat", "a dog"]) and not scores("B. cat", "B")
    assert scores("A. vitamin C", "A", ["vitamin c", "vitamin d", "iron"])
    assert not scores("B. a cat", "B") and not scores("B. no idea", "B")
    assert not scores("E", "E") and not scores("5", "5") and not scores("v", "v")
    twenty = [f"thing {n}" for n in range(20)]
    assert scores("T. thing 19", "T", twenty) and not scores("U", "U", twenty)
    assert not pays(CHOICE, "T", "T") and check_solution("choice", "T") is None


@pytest.mark.parametrize(
    "answer, truth",
    [("5", "5"), ("5.0", "5"), ("+5", "5"), ("-5", "-5"), ("−5", "-5"), ("1,234", "1234"),
     ("1/2", "0.5"), ("10/4", "2.5"), ("2", "4/2"), ("4/2", "2/1"), ("2e3", "2000"), ("1e1", "10"),
     ("５", "5"), ("५", "5"), ("5です", "5"), ("5 है", "5"), ("80%", "80 %"), ("$5", "$5.00"),
     ("12 km/h", "12 km/h"), ("5 m/s²", "5 m/s^2"), ("12 cm^2", "12cm²"),
     ("5 cm", "5cm"), ("5 KM", "5 km"), ("5 MM", "5 mm"), ("5MW", "5 MW"),
     (".5", "0.5"), ("The answer is 5.", "5"), ("\\boxed{5}", "5")],
)  # fmt: skip
def test_equal_numbers(answer, truth):
    assert pays(NUMBER, answer, f"<answer>{truth}</answer>")


@pytest.mark.parametrize(
    "answer, truth",
    [("-5", "5"), ("3.5", "35"), ("1/2", "12"), ("5%", "5"), ("$5", "5%"), ("5 or 6", "5"),
     ("5, 6", "5"), ("5 6", "56"), ("5-6", "5"), ("<5", "5"), ("5 cm", "5 mm"),
     ("12 km/h", "12 km"), ("12 cm^2", "12 cm"), ("12 cm^2", "12 cm^3"), ("5 cm/5", "5 cm"),
     ("5^2", "5"), ("5 mW", "5 MW"), ("5 M\u2126", "5 m\u2126"), ("5 pA", "5 Pa"), ("not 5", "5"),
     ("1/0", "1"), ("", "0"), ("nan", "0"), ("inf", "0"), ("5" * 400, "5"), ("1e999", "1"),
     ("1,23", "123"), ("five", "5"), ("5 5", "5"), ("0x5", "5"), ("4/2", "2"), ("0/5", "0"),
     ("2-3", "2"), ("2..3", "2"), ("2~3", "2"), ("2±1", "2"), ("~2", "2"), ("≈2", "2"),
     ("2?3", "2"),
     ("2!", "2"), ("5²", "5"), ("½", "0.5"), ("- $5", "$5"), (",5", "5"), ("0,001", "1"),
     ("५ नहीं", "5"), ("2ではない", "2"), ("2 아니다", "2"), ("5" + " " * 600 + "or 6", "5")],
)  # fmt: skip
def test_other_numbers(answer, truth):
    assert not pays(NUMBER, answer, truth)


@pytest.mark.parametrize(
    "answer, truth",
    [("\\frac{1}{2}", "0.5"), ("-\\frac12", "-0.5"), ("x^2+2x+1", "(x+1)^2"),
     ("(x^2+1)^3", "(1+x^2)^3"), ("x^2y^3", "y^3x^2"),
     ("\\sqrt{x}", "x^{\\frac{1}{2}}"), ("$x=5$", "5"),
     ("2\\sqrt{2}", "\\sqrt{8}"), ("(1,2)", "(1, 2)"), ("2x+1", "y=2x+1"), ("x > 5", "x>5"),
     ("x^2+y^2-1=0", "x^2+y^2=1"), ("1.5\\times10^3", "1500"), ("45^\\circ", "45^{\\circ}"),
     ("5", "5\\text{ cm}"), ("50\\%", "50%"), ("\\{2,1\\}", "\\{1,2\\}"),
     ("\\pi/4", "\\frac{\\pi}{4}"), ("\\(5\\)", "5"), ("\\[\n5\n\\]", "5"),
     ("6\\pi", "6π"), ("6π", "6\\pi"), ("2√3", "2\\sqrt{3}"), ("√(12)", "2\\sqrt{3}"),
     ("90°", "90^{\\circ}"), ("\\sqrt{12}^{°}", "2\\sqrt{3}^\\circ"),
     ("20^\\circ\\text{C}", "20 °C"),
     ("\\frac{-1}{3}", "-\\frac{1}{3}"), ("-\\frac13", "\\frac{1}{-3}"),
     ("x \\le 3", "x \\leq 3"), ("x≥3", "x \\ge 3"), ("\\left(1,2\\right)", "(1,2)"),
     ("36\\pi\\text{ cm}^{2}", "36\\pi\\text{ cm}^2"), ("12", "12\\text{ cm}^2"),
     ("1/2 cm", "\\frac{1}{2}\\text{ cm}"), ("5\\text{ cm}", "5cm"), ("East", "\\text{east}"),
     ("1/2x", "1/2x"), ("x/2", "\\frac{1}{2}x"), ("zyx", "xyz"), ("AB+CD", "CD + AB")],
)  # fmt: skip
def test_equal_formulas(answer, truth):
    pytest.importorskip("math_verify")
    assert pays(MATH, answer, truth)


@pytest.mark.parametrize(
    "answer, truth",
    [("1, 2, 3", "2"), ("2 or 3", "2"), ("[1, 2]", "2"), ("", "5"), ("1=2=3", "3"), ("> 5", "5"),
     ("x=3 or x=4", "3"), ("x=3 or x=4", "4"), ("x=3", "y=3"), ("x=3=4", "3"), ("x \\neq 5", "5"),
     ("\\boxed{2}\\boxed{3}", "3"), ("\\boxed{2} or \\boxed{3}", "2"), ("\\pm\\sqrt2", "\\sqrt2"),
     ("\\sqrt2, \\sqrt3", "\\sqrt2"), ("\\sqrt2 \\approx \\sqrt2", "\\sqrt2"), ("2 3", "6"),
     ("\\not=\\pi", "\\pi"), ("\\text{not }\\pi", "\\pi"), ("不是\\pi", "\\pi"),
     ("\\pi oder 2", "\\pi"),
     ("\\pi \\\\ 2\\pi", "\\pi"), ("0=0", "x+y=2"), ("x+y=2=2", "x+y=2"), ("x<5", "x>5"),
     ("3+4", "7"), ("4/2", "2"), ("\\sqrt4", "2"), ("X", "x"), ("5 km", "5\\text{ cm}"),
     ("5%", "5"),
     ("[0,1)", "[0,1]"), ("(2,1)", "(1,2)"), ("9^{9^{9^{9}}}", "5"), ("99999!", "5"), ("\\", "5"),
     ("{" * 99, "5"), ("9^{9^{9^{9}}}", "\\pi"), ("9^{1+9^9}", "\\pi"),
     ("2^{99*99*99*99}", "\\pi"), ("2^{\\frac{1}{2}99*99*99*99}", "\\pi"),
     ("2^\\frac{9^9}{1}", "\\pi"),
     ("((9^{99}+1)^{99}+1)^{99}", "\\pi"), ("2^{9}^{9}", "\\pi"), ("9^9^9", "\\pi"),
     ("(9^{99})!", "3!x"), ("99999!", "3!x"), ("\\binom{9^{99}}{9}", "\\binom{x}{2}"),
     ("36\\pi\\text{ cm}^2", "36\\pi\\text{ cm}^3"), ("12\\text{ cm}^2", "12\\text{ cm}^3"),
     ("\\sqrt{2}\\text{ cm}^2", "\\sqrt{2}\\text{ cm}"), ("\\angle BAC", "\\angle ABC"),
     ("ACB", "ABC"), ("\\text{seat}", "\\text{east}"), ("seat", "east"),
     ("2\\sqrt{2}!", "2\\sqrt{2}"), ("2\\sqrt{2}", "2\\sqrt{2}!"),
     ("\\sqrt{3}^\\circ", "\\sqrt{3}"),
     ("(1,2)", "1,2"), ("1,2", "(1,2)"), ("1/2x", "\\frac{1}{2x}"), ("1/2x", "\\frac{1}{2}x"),
     ("1/2 x", "\\frac{1}{2}x"), ("1/2\\pi", "\\frac{1}{2\\pi}"), ("2", "2x"),
     ("\\(5\\) or \\(6\\)", "5"), ("x\\le3", "x\\ge3"),
     ("2^{9", "\\pi"), ("(((" * 9 + "\\pi", "\\pi"), ("\\frac{", "\\pi")],
)  # fmt: skip
def test_other_formulas(answer, truth):
    pytest.importorskip("math_verify")
    assert not pays(MATH, answer, truth)


def test_a_comparison_of_formulas_is_bounded_on_any_thread(monkeypatch):
    """By calls: a slow comparison ends, and what follows it is compared as before."""
    pytest.importorskip("math_verify")
    pairs = [("(x+y)^{99}", "x+y"), ("2\\sqrt{2}", "\\sqrt{8}")]
    assert pays(MATH, *pairs[1])  # imports what it needs
    monkeypatch.setattr(values, "_MAX_CALLS", 50_000)
    got = []
    thread = threading.Thread(target=lambda: got.extend(pays(MATH, *pair) for pair in pairs))
    thread.start(), thread.join()
    assert got == [False, True] and sys.getprofile() is None
    calls = []
    monkeypatch.setattr(
        values, "_verify", lambda *_: [calls.append(len(calls)) for _ in iter(int, 1)]
    )
    assert not pays(MATH, *pairs[0]) and 1000 < len(calls) <= 50_000


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"'\.\[math\]' in a checkout"):
        MATH(None, ["5"], ["5"])
    with pytest.raises(ValueError, match=r"'\.\[math\]' in a checkout"):
        load_reward_funcs(["accuracy_math"])


@pytest.mark.parametrize(
    "solutions, task",
    [(["A", "(B)", "C."], "choice"), (["ii", "IV"], "choice"), (["5", "-3.5", "1,000"], "number"),
     (["A", "B", "AB", "0"], "classification"), (["0-10", "10-20"], "classification"),
     (["a cat", "a dog"], "classification"), (["+", "👍"], "classification")],
)  # fmt: skip
def test_the_task_is_read_off_the_solutions(solutions, task):
    written = [f"<answer>{solution}</answer>" for solution in solutions]
    assert detect_task(written) == task
    assert [check_solution(task, solution) for solution in written] == [None] * len(solutions)
    assert check_solution("choice", "cat") and check_solution("number", "cat")


def test_they_are_rewards_by_name():
    names = ["accuracy_choice", "accuracy_number", "accuracy_math"]
    assert [name for name, _ in load_reward_funcs(names)] == names


@pytest.mark.parametrize("text", ["A. 3", "(A) 3", "A: I see 3 cats", "A"])
def test_numbers_in_an_options_text_name_no_other_option(text):
    assert values.option_of(text) == values.option_of("A") is not None
    assert values.option_of("A or B") is None
