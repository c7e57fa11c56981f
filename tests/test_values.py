"""Option letters, numbers and formulas: what equals what, and that two answers are none."""

from __future__ import annotations

import itertools
import sys

import pytest

from virft_fast.tasks import REWARDS, check_solution, detect_task, load_reward_funcs

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


def test_no_text_of_two_options_pays():
    joiners = (" ", ", ", ",", " or ", "/", " and ", "\n", "; ", "|", " (", "")
    for a, b in itertools.permutations("ABCD", 2):
        for joiner in joiners:
            assert not any(pays(CHOICE, a + joiner + b, truth) for truth in "ABCD")


@pytest.mark.parametrize(
    "answer, truth",
    [("5", "5"), ("5.0", "5"), ("+5", "5"), ("-5", "-5"), ("−5", "-5"), ("1,234", "1234"),
     ("1/2", "0.5"), ("10/4", "2.5"), ("2e3", "2000"), ("80%", "80 %"), ("$5", "$5.00"),
     ("5 cm", "5cm"), (".5", "0.5"), ("The answer is 5.", "5"), ("\\boxed{5}", "5")],
)  # fmt: skip
def test_equal_numbers(answer, truth):
    assert pays(NUMBER, answer, f"<answer>{truth}</answer>")


@pytest.mark.parametrize(
    "answer, truth",
    [("-5", "5"), ("3.5", "35"), ("1/2", "12"), ("5%", "5"), ("$5", "5%"), ("5 or 6", "5"),
     ("5, 6", "5"), ("5 6", "56"), ("5-6", "5"), ("<5", "5"), ("5 cm", "5 mm"), ("not 5", "5"),
     ("1/0", "1"), ("", "0"), ("nan", "0"), ("inf", "0"), ("5" * 400, "5"), ("1e999", "1"),
     ("1,23", "123"), ("five", "5"), ("5 5", "5"), ("0x5", "5")],
)  # fmt: skip
def test_other_numbers(answer, truth):
    assert not pays(NUMBER, answer, truth)


@pytest.mark.parametrize(
    "answer, truth, equal",
    [("\\frac{1}{2}", "0.5", True), ("x^2+2x+1", "(x+1)^2", True), ("$x=5$", "5", True),
     ("1, 2, 3", "2", False), ("2 or 3", "2", False), ("[1, 2]", "2", False), ("", "5", False),
     ("9^{9^{9^{9}}}", "5", False), ("99999!", "5", False), ("\\", "5", False),
     ("{" * 99, "5", False)],
)  # fmt: skip
def test_formulas(answer, truth, equal):
    pytest.importorskip("math_verify")
    assert pays(MATH, answer, truth) == equal


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"virft_fast\[math\]"):
        MATH(None, ["5"], ["5"])
    with pytest.raises(ValueError, match=r"virft_fast\[math\]"):
        load_reward_funcs(["accuracy_math"])


@pytest.mark.parametrize(
    "solutions, task",
    [(["A", "(B)", "C."], "choice"), (["5", "-3.5", "1,000"], "number"),
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
