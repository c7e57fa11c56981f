"""The answer parser reads what models write and survives everything else."""

from __future__ import annotations

import math
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from virft_fast.tasks.answers import answer_text, parse_detection, parse_label, valid_box, words
from virft_fast.tasks.prompts import (
    CLASSIFICATION_SETS,
    asked_category,
    classification_problem,
    detection_problem,
)

BOX = (1.0, 2.0, 30.0, 40.0)


@pytest.mark.parametrize(
    "text",
    [
        "<answer>[{'Position': [1, 2, 30, 40], 'Confidence': 0.5}]</answer>",
        '<answer>[{"Position": [1, 2, 30, 40], "Confidence": 0.5}]</answer>',
        "<answer>\n[{'Position': [1, 2, 30, 40],\n 'Confidence': 0.5}]\n</answer>",
        "<answer>```json\n[{'bbox_2d': [1, 2, 30, 40], 'score': 0.5}]\n```</answer>",
        "<answer>[[{'position': [[1, 2, 30, 40]], 'confidence': 0.5}]]</answer>",
        "<answer>[{'Position': [1, 2, 30, 40], 'Confidence': 0.5}, {'Position': [5, 6",
        "[{'Position': [1.0, 2.0, 30.0, 40.0], 'Confidence': 0.5}]",
        "<think>a <answer> tag</think><answer>{'Position': [1, 2, 30, 40], 'Confidence': 0.5}",
        "<answer>no</answer> then <answer>[{'Position': [1,2,30,40],'Confidence': 0.5}]</answer>",
    ],
)
def test_b8_boxes_are_read_however_they_are_written(text):
    detection = parse_detection(text)
    assert detection.boxes == (BOX,)
    assert detection.confidences == (0.5,)


@pytest.mark.parametrize("text", ["<answer>(1,2),(30,40)</answer>", "( 1 , 2 ) , ( 30, 40 )",
                                  "<answer>[1, 2, 30, 40]</answer>"])  # fmt: skip
def test_bare_boxes_have_no_confidence(text):
    detection = parse_detection(text)
    assert detection.boxes == (BOX,)
    assert detection.confidences == (None,)


@pytest.mark.parametrize(
    "text", ["<answer>No Objects</answer>", "no objects.", "<answer>[]</answer>", "<answer>[ ]"]
)
def test_explicitly_nothing(text):
    assert parse_detection(text).boxes == ()


@pytest.mark.parametrize("text", ["", "<answer></answer>", "a cat", "[", "{'Position'", "[[]"])
def test_unreadable_is_none(text):
    assert parse_detection(text) is None


@pytest.mark.parametrize(
    "value", ["[1, 2, 3]", "'a'", "[1, 2, 3, 'x']", "[1, 2, 3, NaN]", "[1, 2, 3, 1e999]", "null"]
)
def test_announced_box_that_is_none_still_counts_as_a_prediction(value):
    detection = parse_detection("[{'Position': " + value + ", 'Confidence': 1}]")
    assert len(detection.boxes) == 1
    assert not valid_box(detection.boxes[0])


@pytest.mark.parametrize("value", ["NaN", "'0.9'", "true", "null", "1" + "0" * 400])
def test_confidence_that_is_no_number_is_none(value):
    detection = parse_detection("[{'Position': [1, 2, 30, 40], 'Confidence': " + value + "}]")
    assert detection.confidences == (None,)


@pytest.mark.parametrize(
    "box", [(5, 0, 1, 9), (0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 1001, 5), (math.nan,) * 4]
)
def test_invalid_boxes(box):
    assert not valid_box(box)


def test_last_answer_counts_and_thought_is_left_out():
    assert answer_text("<answer>a</answer> no: <answer> b </answer> c") == "b"
    assert answer_text("<think>x</think> y") == "y"
    assert answer_text(" y ") == "y"


def test_words_ignore_case_and_separators():
    assert words("Boeing_737-800, (X)!") == ["boeing", "737", "800", "x"]
    assert parse_label("<answer> Été Bleu </answer>") == ["été", "bleu"]


BROKEN = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            ["<answer>", "</answer>", "<think>", "</think>", "[", "]", "{", "}", "'", '"', ",",
             "'Position':", "'Confidence':", "(1,2)", "12", "-", "1e9", "NaN", " ",
             "\n", "No Objects"]
        ),
        max_size=60,
    ).map("".join),
)  # fmt: skip


@given(BROKEN)
@example("[" * 3000)
@example("\ud800")
def test_no_text_raises(text):
    detection = parse_detection(text)
    if detection is not None:
        assert len(detection.boxes) == len(detection.confidences)
        assert all(len(box) == 4 for box in detection.boxes)
    parse_label(text)


HUNDRED_KB = [
    "[" * 100_000,
    "{" * 100_000,
    "[" * 50_000 + "]" * 50_000,
    "{'Position': " + "[" * 50_000 + "]" * 49_000 + "}",
    "<answer>" * 12_500,
    "<answer>" + "{" * 50_000 + "}" * 49_000 + "</answer>",
    "(" * 100_000,
    "[1," * 33_000,
    "[ " * 50_000,
    "{{}}" * 25_000,
    "{}" * 50_000,
    "{a}" * 33_333,
    "{a:1}" * 20_000,
    '{"Position": [1, 2, 3, 4]}' * 3_800,
]


def best_time_s(action, runs=5):
    if sys.gettrace():
        pytest.skip("under a tracer, as coverage is one, times say nothing")
    times = []
    for _ in range(runs):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("text", HUNDRED_KB, ids=range(len(HUNDRED_KB)))
def test_100_kb_of_brackets_take_less_than_50_ms(text):
    assert best_time_s(lambda: parse_detection(text)) < 0.05


@pytest.mark.parametrize(
    "name, containing",
    [
        ("flowers102", "a plant. Please identify the species of the plant"),
        ("pets37", "a pet. Please identify the species of the pet"),
        ("cars196", "a car. Please identify the model of the car"),
        ("aircraft", "an aircraft. Please identify the model of the aircraft"),
    ],
)
def test_classification_is_asked_as_the_original_does(name, containing):
    assert classification_problem(*CLASSIFICATION_SETS[name]) == (
        f"This is an image containing {containing} based on the image.\n"
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> "
        "tags.The output answer format should be as follows:\n"
        "<think> ... </think> <answer>species name</answer>\nPlease strictly follow the format."
    )


def test_classification_of_ones_own():
    asked = classification_problem("object", "class")
    assert "containing an object." in asked and "<answer>class name</answer>" in asked


@pytest.mark.parametrize("category", ["cat", "rubik's cube", "'", "hot dog", "dogs' bowl's"])
@pytest.mark.parametrize("space", ["thousand", "pixels"])
def test_the_category_is_read_back_from_the_question(category, space):
    assert asked_category(detection_problem(category, space)) == category


@pytest.mark.parametrize(
    "problem, category", [("Find category 'cat'.", "cat"), ("A cat?", None), ("category ''", None)]
)
def test_the_category_of_other_prompts(problem, category):
    assert asked_category(problem) == category
