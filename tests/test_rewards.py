"""The sound rewards: their definitions, ranges and symmetries, and the bugs they don't have."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_answers import BRACKETS, BROKEN, brackets, grows_linearly

from virft_fast.batch import Sample
from virft_fast.tasks import (
    ACCURACY_REWARDS,
    DEFAULT_REWARDS,
    REWARDS,
    RewardError,
    check_solution,
    detect_task,
    is_ours,
    load_reward_funcs,
    score,
    unearned,
    with_class_set,
)
from virft_fast.tasks.labels import ClosedSet

SAMPLE = json.loads((Path(__file__).parent / "data/visual_rft_rewards_sample.json").read_text())
A, B, FAR = [0, 0, 100, 100], [500, 500, 700, 700], [800, 0, 900, 100]


def boxes(*items):
    """An answer with (position, confidence) items."""
    return (
        "<answer>" + json.dumps([{"Position": p, "Confidence": c} for p, c in items]) + "</answer>"
    )


def reward(name, completion, solution):
    return REWARDS[name]([None], [completion], solution=[solution])[0]


TRUTH = boxes((A, 1), (B, 1))


@pytest.mark.parametrize("case", range(len(SAMPLE)))
def test_visual_rft_numbers(case):
    sample = SAMPLE[case]
    for name, expected in sample["rewards"].items():
        got = reward(name, sample["completion"], sample["solution"])
        assert got == pytest.approx(expected, abs=1e-9), name


def test_visual_rft_iou_v1_divides_by_predictions():
    """One of two predictions matches exactly: 1/2 by v1; with one true box 1/2 by v2 as well, with
    two found by one prediction 1 by v1 and 1/2 by v2."""
    assert reward("visual_rft_accuracy_iou_v1", boxes((A, 1), (FAR, 1)), boxes((A, 1))) == 0.5
    assert reward("visual_rft_accuracy_iou_v1", boxes((A, 1)), TRUTH) == 1.0
    assert reward("visual_rft_accuracy_iou", boxes((A, 1)), TRUTH) == 0.5


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (TRUTH, 1.0),
        (boxes((B, 0.1), (A, 0.2)), 1.0),
        (boxes((A, 1)), 0.5),
        (boxes((A, 1), (A, 1)), 0.5),
        (boxes((A, 1), (B, 1), (FAR, 0)), 2 / 3),
        # [0, 0, 100, 80] overlaps A by 0.8
        (boxes(([0, 0, 100, 80], 1)), 0.4),
        # exactly half: a match needs more
        (boxes(([0, 0, 100, 50], 1)), 0.0),
        ("<answer>[]</answer>", 0.0),
        ("nonsense", 0.0),
    ],
)
def test_accuracy_iou(answer, expected):
    assert reward("accuracy_iou", answer, TRUTH) == pytest.approx(expected, abs=1e-9)


def test_accuracy_iou_assigns_best_not_by_confidence():
    """Greedy gives the surer prediction the box that only the other one can take.

    Truths P = [0, 0, 100, 100] and Q = [20, 0, 120, 100]; prediction 1 (sure) = [12, 0, 112, 100]
    overlaps Q by 92/108 and P by 88/112; prediction 2 = [28, 0, 128, 100] overlaps Q by 92/108 and
    P by 72/128 = 0.5625. Best: 1-P, 2-Q = 0.786 + 0.852; greedy: 1-Q, 2-P = 0.852 + 0.5625.
    """
    truth = boxes(([0, 0, 100, 100], 1), ([20, 0, 120, 100], 1))
    answer = boxes(([12, 0, 112, 100], 0.9), ([28, 0, 128, 100], 0.1))
    best = (88 / 112 + 92 / 108) / 2
    greedy = (92 / 108 + 72 / 128) / 2
    assert reward("accuracy_iou", answer, truth) == pytest.approx(best, abs=1e-9)
    assert reward("visual_rft_accuracy_iou", answer, truth) == pytest.approx(greedy, abs=1e-9)


def test_hungarian_iou_needs_no_threshold():
    assert reward("hungarian_iou", boxes(([0, 0, 100, 50], 1)), boxes((A, 1))) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        (boxes((A, 1), (B, 1)), TRUTH, 1.0),
        (boxes((A, 0.5), (B, 0.5)), TRUTH, 0.5),
        (boxes((A, 1)), TRUTH, 0.5),
        (boxes((A, 1), (B, 1), (FAR, 0)), TRUTH, 1.0),
        (boxes((A, 1), (B, 1), (FAR, 1)), TRUTH, 2 / 3),
        (boxes((A, 1), (A, 1), (B, 1)), TRUTH, 2 / 3),
        (boxes((A, 5), (B, -1)), TRUTH, 0.0),
        # overlaps of 0.45 and 0.55: a match needs more than half
        (boxes(([0, 0, 100, 45], 1)), boxes((A, 1)), 0.0),
        (boxes(([0, 0, 100, 55], 1)), boxes((A, 1)), 1.0),
        (boxes((FAR, 5)), TRUTH, 0.0),
        ("<answer>No Objects</answer>", "<answer>No Objects</answer>", 1.0),
        (boxes((A, 0.5)), "<answer>No Objects</answer>", 1 / 1.5),
        (boxes((A, math.nan)), "<answer>No Objects</answer>", 0.5),
    ],
)
def test_accuracy_confidence(answer, truth, expected):
    assert reward("accuracy_confidence", answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>a\nb</think><answer>c</answer>", 1),
        ("<think>a</think>\n <answer></answer>", 1),
        ("<think>a</think> b <answer>c</answer>", 0),
        ("<think>a</think><answer>c</answer> ", 0),
        ("<answer>c</answer>", 0),
        ("<think></answer>", 0),
        ("<think></think><answer></answer>", 1),
    ],
)
def test_format(answer, expected):
    assert reward("format", answer, "") == expected


@given(BROKEN)
def test_format_equals_its_regex(text):
    import re

    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    assert reward("format", text, "") == float(pattern.fullmatch(text) is not None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<answer>Maine_Coon</answer>", 1),
        ("<answer>mainecoon</answer>", 1),
        ("<answer>this is a maine coon</answer>", 1),
        ("<answer>I think this is a maine coon</answer>", 0),
        ("<answer>maine</answer>", 0),
        ("<answer>coon maine</answer>", 0),
        ("<answer></answer>", 0),
    ],
)
def test_accuracy(answer, expected):
    assert reward("accuracy", answer, "<answer>maine coon</answer>") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<answer>(100,100),(200,200)</answer>", 1.0),
        ("(100,100),(200,150)", 0.75),  # inside: GIoU = IoU = 0.5
        ("(200,200),(300,300)", 0.25),  # hull 40,000, union 20,000: GIoU = -0.5
        ("nothing", 0.0),
    ],
)
def test_grounding_giou(answer, expected):
    truth = "<answer> (100,100),(200,200) </answer>"
    assert reward("grounding_giou", answer, truth) == pytest.approx(expected)


# The bugs of the original, by their numbers.


def test_one_equal_coordinate_pays_nothing():
    answer, truth = boxes(([300, 100, 400, 400], 1)), boxes(([100, 100, 200, 200], 1))
    for name in ("accuracy_iou", "accuracy_confidence", "visual_rft_accuracy_iou"):
        assert reward(name, answer, truth) == 0


@pytest.mark.parametrize("answer", ["(1000,1000),(0,0)", "(200,200),(100,100)"])
def test_inverted_boxes_pay_nothing(answer):
    assert reward("grounding_giou", answer, "<answer> (100,100),(200,200) </answer>") == 0
    inverted = boxes(([1000, 1000, 0, 0], 1))
    assert reward("accuracy_iou", inverted, boxes(([100, 100, 200, 200], 1))) == 0


def test_two_boxes_where_one_is_asked_for_pay_nothing():
    answer = "(100,100),(200,200) (0,0),(10,10)"
    assert reward("grounding_giou", answer, "<answer> (100,100),(200,200) </answer>") == 0


@pytest.mark.parametrize("answer", ["", "<answer></answer>", "<answer>a</answer>",
                                    "rose tulip petunia lily daisy pansy"])  # fmt: skip
def test_empty_short_and_list_all_answers_pay_nothing(answer):
    assert reward("accuracy", answer, "<answer>petunia</answer>") == 0


@pytest.mark.parametrize("name", [n for n in REWARDS if "confidence" in n or "iou" in n])
def test_confidence_nan_gives_a_finite_reward(name):
    answer = "<answer>[{'Position': [0, 0, 100, 100], 'Confidence': NaN}]</answer>"
    assert math.isfinite(reward(name, answer, boxes((A, 1))))


def test_junk_of_confidence_zero_pays_nothing():
    junk = boxes(*(([i, i, i + 10, i + 10], 0) for i in range(800, 820)))
    for name in ("accuracy_iou", "accuracy_confidence"):
        assert reward(name, junk, TRUTH) == 0
    assert reward("visual_rft_accuracy_confidence", junk, TRUTH) == 1  # the hole, kept


def test_correct_no_objects_pays():
    for name in ("accuracy_iou", "accuracy_confidence"):
        assert reward(name, "<answer>No Objects</answer>", "<answer>No Objects</answer>") == 1
        assert reward(name, "<answer>No Objects</answer>", TRUTH) == 0
    assert reward("accuracy_iou", boxes((A, 0)), "<answer>No Objects</answer>") == 0
    assert reward("accuracy_iou", "gibberish", "<answer>No Objects</answer>") == 0


def test_answers_over_several_lines_pay():
    assert reward("accuracy_iou", TRUTH.replace("[", "\n[\n", 1), TRUTH) == 1


# Properties.

SOLUTIONS = [TRUTH, "<answer>No Objects</answer>", "<answer>rose</answer>", "(1,2),(30,40)", ""]
UNBOUNDED = "visual_rft_grounding"


@given(BROKEN, st.sampled_from(SOLUTIONS))
def test_any_text_gives_a_reward_in_its_range(text, solution):
    # sympy's own time has no bound; tests/test_values.py has accuracy_math's hostile answers.
    own = {name: function for name, function in REWARDS.items() if name != "accuracy_math"}
    for name, function in own.items():
        (value,) = function([None], [text], solution=[solution])
        assert math.isfinite(value)
        if name != UNBOUNDED:
            assert 0 <= value <= 1


@pytest.mark.parametrize("form", BRACKETS, ids=range(len(BRACKETS)))
def test_rewards_of_brackets_take_linear_time(form):
    for name in REWARDS:
        scored = functools.partial(reward, name)
        scored("a", TRUTH)  # what is built or imported once is no part of it
        assert grows_linearly(lambda n, s=scored: s(brackets(form, n), TRUTH), sizes=(600,)), name


HUGE = st.sampled_from([int("9" * 310), -int("9" * 310), 1e308, -1e308, 1e-200, 5e-324, math.inf,
                        math.nan, 0, 1, 300, True])  # fmt: skip


@given(st.lists(st.tuples(st.lists(HUGE, min_size=4, max_size=4), HUGE), max_size=4))
def test_numbers_beyond_measure_give_a_finite_reward(items):
    for solution in (boxes((A, 1)), boxes(([1e-200, 0, 1e308, 300], 1))):
        for name in (name for name in REWARDS if name.startswith("visual_rft")):
            assert math.isfinite(reward(name, boxes(*items), solution)), name
            assert math.isfinite(reward(name, boxes(*items) + "(9,9),(1,1)" * 2, solution)), name


NUMBER = st.one_of(st.integers(-50, 1050), st.sampled_from([0, 100, 500, 700]))
CORNERS = st.one_of(st.lists(NUMBER, min_size=4, max_size=4), st.sampled_from([A, FAR]))
ITEM = st.tuples(CORNERS, st.one_of(st.floats(-1, 2), st.sampled_from([0, 1])))


@given(st.lists(ITEM, max_size=6), st.randoms())
def test_order_of_predictions_does_not_matter(items, random):
    shuffled = list(items)
    random.shuffle(shuffled)
    for name in ("accuracy_iou", "hungarian_iou", "accuracy_confidence"):
        assert reward(name, boxes(*items), TRUTH) == pytest.approx(
            reward(name, boxes(*shuffled), TRUTH), abs=1e-9
        )


def test_of_equal_boxes_the_surest_is_matched():
    for items in ([(A, 1), (A, 0)], [(A, 0), (A, 1)]):
        assert reward("accuracy_confidence", boxes(*items), boxes((A, 1))) == 1


def test_visual_rft_reads_a_confidence_only_where_it_uses_one():
    """The original drops a repeated position before it looks at its confidence, and sorts a single
    prediction without looking; a position matters when a true box is left to compare it with."""
    truth = boxes((A, 1))
    twice = f"<answer>[{{'Position': {A}, 'Confidence': -1}}, {{'Position': {A}}}]</answer>"
    assert reward("visual_rft_accuracy_iou", twice, truth) == 1
    null = f"<answer>[{{'Position': {A}, 'Confidence': null}}]</answer>"
    assert reward("visual_rft_accuracy_iou", null, truth) == 1
    assert reward("visual_rft_accuracy_confidence", null, truth) == 0
    late = f"<answer>[{{'Position': {A}, 'Confidence': 1}}, {{'Position': 'x', 'Confidence': 0}}]"
    assert reward("visual_rft_accuracy_iou", late + "</answer>", truth) == 0.5


@pytest.mark.parametrize("name", ACCURACY_REWARDS)
def test_solution_against_itself_is_the_maximum(name):
    solution = TRUTH
    if "grounding" in name:
        solution = "<answer> (1,2),(30,40) </answer>"
    elif name in ("accuracy", "visual_rft_accuracy"):
        solution = "<answer>rose</answer>"
    elif name in (f"accuracy_{kind}" for kind in ("choice", "number", "math")):
        solution = f"<answer>{'B' if name == 'accuracy_choice' else '5'}</answer>"
    assert reward(name, solution, solution) == pytest.approx(ACCURACY_REWARDS[name])


def test_strings_and_messages_score_alike():
    message = [{"role": "assistant", "content": TRUTH}]
    for name in REWARDS:
        assert reward(name, TRUTH, TRUTH) == reward(name, message, TRUTH)


def test_a_batch_is_its_samples():
    texts = [TRUTH, boxes((A, 0.3)), "nothing", "<answer>[]</answer>"]
    for function in REWARDS.values():
        together = function(None, texts, solution=[TRUTH] * 4)
        alone = [function(None, [text], solution=[TRUTH])[0] for text in texts]
        assert together == pytest.approx(alone)


# Registry and scoring.


def test_task_is_read_off_the_solutions():
    assert detect_task([TRUTH, "<answer>No Objects</answer>"]) == "detection"
    assert detect_task(["<answer>rose</answer>"]) == "classification"
    assert detect_task(['{"label": "rose"}']) == "classification"
    assert detect_task(["<answer> (1,2),(3,4) </answer>"]) == "grounding"
    with pytest.raises(ValueError, match="classification, detection"):
        detect_task([TRUTH, "<answer>rose</answer>"])
    with pytest.raises(ValueError, match="no usable solution"):
        detect_task([])


def test_default_rewards_are_registered():
    assert all(name in REWARDS for names in DEFAULT_REWARDS.values() for name in names)


@pytest.mark.parametrize(
    ("task", "solution", "reason"),
    [
        ("detection", TRUTH, None),
        ("detection", "<answer>No Objects</answer>", None),
        ("detection", "rose", "expected boxes"),
        ("detection", boxes(([5, 5, 1, 1], 1)), "x1 < x2"),
        ("detection", boxes((A, 1), ([5, 5, 9], 1)), "four numbers in all objects"),
        ("grounding", "{'label': 'mug'}", "four numbers in all objects"),
        ("detection", boxes(*[(A, 1)] * 499), None),
        ("detection", boxes(*[(A, 1)] * 500), "fewer than 500 boxes"),
        ("detection", TRUTH.replace("[{", "[[]]" * 600 + "[{"), "fewer than 1024 brackets"),
        ("detection", TRUTH.replace("}]", "}]" + " so" * 10_000), "10000 words"),
        ("detection", TRUTH.replace("}]", "}]" + " " * 40_000), "40000 characters"),
        ("classification", "<answer> </answer>", "class name"),
        ("grounding", TRUTH, "one box"),
        ("grounding", "(1,2),(3,4)", None),
    ],
)
def test_check_solution(task, solution, reason):
    got = check_solution(task, solution)
    assert (got is None) if reason is None else (reason in got)


def test_unknown_reward_names_the_closest():
    with pytest.raises(ValueError, match="accuracy_iou"):
        load_reward_funcs(["acuracy_iou"])


def test_reward_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def half(prompts, completions, **columns):\n    return [0.5] * len(completions)\n"
    )
    (first, second) = load_reward_funcs(["format", f"{path}:half"])
    assert first[0] == "format" and second[0] == "half"
    assert second[1](prompts=[None], completions=["x"], solution=["y"]) == [0.5]
    with pytest.raises(ValueError, match="no function 'other'"):
        load_reward_funcs([f"{path}:other"])
    with pytest.raises(ValueError, match="no file"):
        load_reward_funcs([f"{tmp_path}/missing.py:half"])


def fixed(*values):
    return lambda prompts, completions, **columns: list(values)


def run_score(*functions, weights=None, size=3):
    named = [(f"f{i}", function) for i, function in enumerate(functions)]
    texts = [f"t{i}" for i in range(size)]
    return score(named, weights or [1.0] * len(named), texts, texts, {"solution": texts})


def test_score_weighs_and_leaves_out_none_as_trl_does():
    rewards, total = run_score(fixed(1, None, None), fixed(2, 4, float("nan")), weights=[1.0, 0.5])
    assert total[:2].tolist() == [2.0, 2.0]
    assert math.isnan(total[2])
    assert torch.isnan(rewards).tolist() == [[False, False], [True, False], [True, True]]


def test_infinite_reward_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        _, total = run_score(fixed(math.inf, 1, 1e300))
    assert "2 rewards beyond the range of float32" in caplog.text
    assert torch.isnan(total).tolist() == [True, False, True]


def test_reward_that_raises_names_function_and_sample():
    def broken(prompts, completions, **columns):
        return [1 / (len(c) - 2 + c.count("0")) for c in completions]

    with pytest.raises(RewardError, match="broken.*ZeroDivisionError.*'t1'") as caught:
        score([("broken", broken)], [1.0], ["p"] * 3, ["t0", "t1", "t2"], {"solution": ["s"] * 3})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("value", ["good", [1.0, 2.0], {}])
def test_reward_that_is_no_number_names_function_and_sample(value):
    def words(prompts, completions, **columns):
        return [1.0, value, 1.0]

    with pytest.raises(RewardError, match="words.*a number or None.*'t1'"):
        score([("words", words)], [1.0], ["p"] * 3, ["t0", "t1", "t2"], {"solution": ["s"] * 3})


def test_async_rewards_and_their_errors():
    async def lengths(completions, completion_ids, **columns):
        return [len(ids) / len(text) for ids, text in zip(completion_ids, completions, strict=True)]

    ids = [[1], [1, 2], [1, 2, 3]]
    rewards, _ = score([("lengths", lengths)], [1.0], ["p"] * 3, ["t"] * 3, {"completion_ids": ids})
    assert rewards[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(RewardError, match="lengths.*ZeroDivisionError"):
        score([("lengths", lengths)], [1.0], ["p"] * 2, ["t", ""], {"completion_ids": ids[:2]})


def test_a_reward_that_exits_or_gives_no_list_is_an_error():
    def leaves(**columns):
        raise SystemExit(0)

    for function in (leaves, lambda **_: None, lambda **_: {"a": 1}, lambda **_: "abc"):
        with pytest.raises(RewardError, match="mine"):
            score([("mine", function)], [1.0], ["p"], ["t"], {})


def test_what_a_reward_does_to_its_arguments_is_its_own_affair():
    def greedy(completions, solution, **columns):
        completions[0][0]["content"] = solution[0] = "<think>a</think><answer>b</answer>"
        columns.clear()
        return [1.0]

    completions = [[{"role": "assistant", "content": "x"}]]
    functions = [("greedy", greedy), ("format", REWARDS["format"])]
    rewards, _ = score(functions, [1.0, 1.0], ["p"], completions, {"solution": ["s"]})
    assert rewards.tolist() == [[1.0, 0.0]]


def test_a_sum_too_large_is_left_out():
    big = lambda completions, **_: [3e38] * len(completions)  # noqa: E731
    rewards, total = score([("a", big), ("b", big)], [1.0, 1.0], ["p"], ["t"], {})
    assert rewards.isfinite().all() and total.isnan().all()


def test_reward_files_may_hold_dataclasses_and_share_a_name(tmp_path):
    text = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass\nclass Weights:\n    value: float = {0}\n    most: ClassVar[float] = 1.0\n"
        "def {1}(completions, **columns):\n    return [Weights().value] * len(completions)\n"
    )
    names = []
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(text.format(value, f"mine_{folder}"))
        names.append(f"{tmp_path / folder / 'mine.py'}:mine_{folder}")
    functions = load_reward_funcs(names)
    assert [function(completions=["x"])[0] for _, function in functions] == [1, 2]


def test_columns_may_have_the_names_of_a_rewards_own_arguments():
    """Inside, `scored` calls them `texts` and `truths`; a data set may have such columns."""
    columns = {name: ["x"] for name in ("texts", "truths", "reward", "columns")}
    for name, expected in (("accuracy", 1.0), ("accuracy_iou", 0.0), ("visual_rft_accuracy", 1.0)):
        assert REWARDS[name](completions=["cat"], solution=["cat"], **columns) == [expected]
    assert list(inspect.signature(REWARDS["accuracy"]).parameters) == [
        "prompts", "completions", "solution", "columns",
    ]  # fmt: skip


def test_the_task_is_what_most_solutions_show():
    good = [boxes((A, 1))] * 10
    assert detect_task([*good, "garbage"]) == "detection"
    with pytest.raises(ValueError, match="one task, got classification, detection"):
        detect_task([*good, *["a rose"] * 4])


def test_wrong_number_of_rewards_is_an_error():
    with pytest.raises(ValueError, match="expected 3 rewards.*got 2"):
        run_score(fixed(1, 2))


def test_a_reward_of_the_users_is_not_taken_for_ours_of_the_same_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def accuracy(completions, solution, **_):\n    return [0.5] * len(solution)\n")
    mine, ours = load_reward_funcs([f"{file}:accuracy"]), load_reward_funcs(["accuracy"])
    assert is_ours(*ours[0]) and not is_ours(*mine[0])
    sample = Sample(0, ({"role": "user", "content": "?"},), (), "cat", {"solution": "cat"})
    classes = ClosedSet(["cat", "dog"])
    assert with_class_set(mine, classes) == mine and is_ours(*with_class_set(ours, classes)[0])
    assert unearned(mine, [sample]) == unearned(ours, [sample]) == []
