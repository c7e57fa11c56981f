"""The answer parser reads what models write and survives everything else."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from virft_fast.tasks.answers import answer_text, parse_detection, parse_label, valid_box, words
from virft_fast.tasks.prompts import (
    CLASSIFICATION_SETS,
    category_in,
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
def test_boxes_are_read_however_they_are_written(text):
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


@pytest.mark.parametrize("value", ["NaN", "'high'", "true", "null", "1" + "0" * 400])
def test_confidence_that_is_no_number_is_none(value):
    detection = parse_detection("[{'Position': [1, 2, 30, 40], 'Confidence': " + value + "}]")
    assert detection.confidences == (None,)


@pytest.mark.parametrize(
    "box", [(5, 0, 1, 9), (0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 1001, 5), (math.nan,) * 4]
)
def test_invalid_boxes(box):
    assert not valid_box(box)


FIRST = "{'Position': [10, 20, 300, 400], 'Confidence': 0.9}"
FIRST_BOX = (10.0, 20.0, 300.0, 400.0)
# An object of BOX in other words: what is written, and the confidence that is read.
WRITTEN = [
    ("{'Position': [1, 2, 30, 40], 'Confidence': 0.5,}", 0.5),
    ("{'Position': [1, 2., 30, 40,], 'Confidence': .5}", 0.5),
    ("{'Position': [1, 2, 30, 40], 'Confidence': 5e-1}", 0.5),
    ("{'Position': [1, 2, 30, 40], 'Confidence': 50%}", 0.5),
    ("{'Position': [1, 2, 30, 40], 'Confidence': '50 %'}", 0.5),
    ("{'Position': [1, 2, 30, 40], 'Confidence': 50}", 50.0),
    ("{'Position': [1, 2, 30, 40], 'Confidence': None}", None),
    ("{'Position': [1, 2, 30, 40], 'Confidence': high}", None),
    ("{'Position': ['1', '2', '30', '40'], 'Confidence': '0.5'}", 0.5),
    ("{'Position': '1, 2, 30, 40', 'Confidence': 0.5}", 0.5),
    ("{'Position': (1, 2, 30, 40), 'Confidence': 0.5}", 0.5),
    ("{'Position': [[1, 2], [30, 40]], 'Confidence': 0.5}", 0.5),
    ("{'Position': (1, 2), (30, 40), 'Confidence': 0.5}", 0.5),
    ("{'Confidence': 0.5, 'Position': 1, 2, 30, 40}", 0.5),
    ("{“Position”: [1, 2, 30, 40], “Confidence”: 0.5}", 0.5),
    ("｛‘Position’：［１，２，30，40］，‘Confidence’：0．5｝", 0.5),
    ("{Position: [1, 2, 30, 40], Confidence: 0.5}", 0.5),
    ("{'Position: [1, 2, 30, 40], 'Confidence': 0.5}", 0.5),
    ("{{'Position': [1, 2, 30, 40], 'Confidence': 0.5}}", 0.5),
    ("{'Position': [1, 2, 30, 40] 'Confidence': 0.5}", 0.5),
    ('{\\"bbox_2d\\": [1, 2, 30, 40], \\"score\\": 0.5}', 0.5),
    ("{'bbox_2d': [1, 2, 30, 40], 'label': \"jack's mug\"}", None),
    ("{'label': 'jack's mug', 'bbox_2d': [1, 2, 30, 40]}", None),
    ("{'label': 'jack\\'s mug, {or} [a] (cup)', 'bbox_2d': [1, 2, 30, 40]}", None),
    ("{'bbox_2d': [1, 2, 30, 40], 'seen': {'from': 'above', 'sizes': [5, 6, 7, 8]}}", None),
    ("{'Bounding Box': [1, 2, 30, 40], 'score': 0.5}", 0.5),
    ("{'x1': 1, 'y1': 2, 'x2': 30, 'y2': 40, 'score': 0.5}", 0.5),
    ("{'box': {'xmin': 1, 'ymin': 2, 'xmax': 30, 'ymax': 40}, 'score': 0.5}", 0.5),
    ("{'Position': [1, 2, 30, 40], # jack's\n 'Confidence': 0.5 // sure\n}", 0.5),
    ("[1, 2, 30, 40]", None),
    ("(1, 2, 30, 40)", None),
    ("(1,2),(30,40)", None),
    ("[(1,2),(30,40)]", None),
    ("[[1, 2], [30, 40]]", None),
    ("<|object_ref_start|>a mug<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>", None),
]


@pytest.mark.parametrize(("written", "confidence"), WRITTEN, ids=range(len(WRITTEN)))
def test_an_object_is_read_alike_alone_and_among_others(written, confidence):
    alone = parse_detection(f"<answer>{written}</answer>")
    assert (alone.boxes, alone.confidences) == ((BOX,), (confidence,))
    three = parse_detection(f"<answer>```json\n[{FIRST}, {written}, {FIRST}]\n```</answer>")
    assert three.boxes == (FIRST_BOX, BOX, FIRST_BOX)
    assert three.confidences == (0.9, confidence, 0.9)


@pytest.mark.parametrize(
    "written",
    [
        "{'Position': [1, 2, 30], 'Confidence': 0.5}",
        "{'Position': [1, 2, 30, forty], 'Confidence': 0.5}",
        "{'Position': [1, 2, 30, 40, 'Confidence': 0.5}",
        "{'Position': [1.2.3, 2, 30, 40]}",
        "{'Position': None, 'Confidence': 0.5}",
        "{'Positions': [1, 2, 30], 'Confidence': 0.5}",
        "{'x1': 1, 'y1': 2, 'x2': 30, 'label': 'mug'}",
        "{'label': 'mug'}",
        "<|box_start|>(1,2)<|box_end|>",
    ],
)
def test_an_object_that_can_not_be_read_is_a_prediction_that_matches_nothing(written):
    for text, place in ((written, 0), (f"[{FIRST}, {written}, {FIRST}]", 1)):
        detection = parse_detection(f"<answer>{text}</answer>")
        assert len(detection.boxes) == 2 * place + 1
        assert all(map(math.isnan, detection.boxes[place]))


@pytest.mark.parametrize("junk", ["{'a': 1}", "[1, 2, 3]", "(5, 6)", "(a mug)", "{}", "[]", "mug"])
def test_junk_counts_where_it_stands_for_an_object(junk):
    """Alone it announces nothing; in a list of objects all that is no word is to be one."""
    assert (parse_detection(f"<answer>see: {junk}.</answer>") is None) or junk == "[]"
    in_list = parse_detection(f"<answer>[{FIRST}, {junk}]</answer>").boxes
    assert len(in_list) == (2 if any(c.isdigit() for c in junk) else 1)
    assert parse_detection(f"<answer>{junk} {FIRST}</answer>").boxes == (FIRST_BOX,)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[{'Position': [1, 2, 30, 40]}] and [10, 20, 300, 400]", 2),
        ("{'boxes': [[1, 2, 30, 40], [10, 20, 300, 400]], 'scores': [0.5, 0.9]}", 2),
        ("{'objects': [{'box': [1, 2, 30, 40]}, {'box': [10, 20, 300, 400]}], 'n': [2, 3]}", 2),
        ("{'size': [0, 0, 9, 9], 'objects': {'mug': {'box': [1, 2, 30, 40]}}}", 1),
        ("{'mug': [1, 2, 30, 40], 'cup': [10, 20, 300, 400]}", 2),
        ("{'box': [1, 2, 30, 40], 'parts': [{'box': [10, 20, 300, 400]}]}", 2),
        ("[{'Position': [1, 2, 30, 40], {'Position': [10, 20, 300, 400]}]", 2),
        ("[{'Position': [1, 2, 30, 40], 'Position': [10, 20, 300, 400]}]", 2),
        ("[{'Position': [1, 2, 30, 40]}, 'Position': [10, 20, 300, 400]}]", 2),
        ("[{'Position': [1, 2, 30, 40]}}, {'Position': [10, 20, 300, 400]}]", 2),
        ("the mug (5,6): (1,2),(30,40), (10,20),(300,400)", 2),
        ("[(1,2),(30,40),(10,20),(300,400)]", 2),
        ("{'Position': [1, 2, 30, 40], 'Confid", 1),
        ("[{'Position': [1, 2, 30, 40]}, {'Position': [10, 20, 30", 1),
        ("[" * 50 + "{'Position': [1, 2, 30, 40]}" + "]" * 50, 1),
    ],
)
def test_how_many_objects_are_read(text, boxes):
    detection = parse_detection(f"<answer>{text}")
    assert detection.boxes == (BOX, FIRST_BOX)[:boxes]
    if "scores" in text:
        assert detection.confidences == (0.5, 0.9)


KEYS = st.sampled_from(["'Position'", '"bbox_2d"', "Box", "“bounding box”", "'coordinates'"])
VALUES = st.sampled_from(
    ["1", "2.", ".5", "-3", "1e2", "'40'", "999", "x", "None", "NaN", "7%", ""]
)
FORMS = st.sampled_from(["[%s, %s, %s, %s]", "(%s, %s, %s, %s)", "[[%s, %s], [%s, %s]]",
                         "(%s,%s),(%s,%s)", "[%s, %s, %s, %s,]", "[%s, %s, %s], %s"])  # fmt: skip
EXTRAS = st.sampled_from(["", ", 'Confidence': 80%", ", \"label\": \"jack's\"", ", score: '.5',",
                          ", 'size': {'w': [1, 2]}", ", 'label': 'a, b: (c'"])  # fmt: skip


@given(KEYS, FORMS, st.tuples(VALUES, VALUES, VALUES, VALUES), EXTRAS)
def test_what_is_read_alone_is_read_alike_in_the_middle_of_three(key, form, values, extra):
    written = f"{{{key}: {form % values}{extra}}}"
    alone = parse_detection(f"<answer>{written}</answer>")
    three = parse_detection(f"<answer>[{FIRST}, {written}, {FIRST}]</answer>")
    assert repr(three.boxes) == repr((FIRST_BOX, *alone.boxes, FIRST_BOX))
    assert three.confidences == (0.9, *alone.confidences, 0.9)


def test_text_markers_are_no_part_of_a_label():
    text = "<answer><|object_ref_start|>a mug<|object_ref_end|></answer>"
    assert answer_text(text) == "a mug"


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


# What stands before, what is repeated, and what is repeated after it.
BRACKETS = [
    ("", "[", ""), ("", "{", ""), ("", "[", "]"), ("{'Position': ", "[", "]"), ("", "<answer>", ""),
    ("<answer>", "{", "}"), ("", "(", ""), ("", "[1,", ""), ("", "[ ", ""), ("", "{{}}", ""),
    ("", "{}", ""), ("", "{a}", ""), ("", "{a:1}", ""), ("", '{"Position": [1, 2, 3, 4]}', ""),
    ("", "'", ""), ("", "\\'", ""), ("", "1", ""), ("", "1,", ""), ("", "{a:{", ""),
    ("[[[[[[[[", "[],", ""), ("", "(1,2),", ""), ("", "<|box_start|>", ""),
    ("{'boxes': [", "[1,2,3,4],", ""),
]  # fmt: skip


def brackets(form, size):
    """A text of `size` characters."""
    before, opening, closing = form
    count = size // len(opening + closing)
    return before + opening * count + closing * count


def work(action, *arguments):
    """Lines that Python runs, and for each method of a text the characters in it."""
    done = 0

    def line(frame, event, _):
        nonlocal done
        done += 1
        return line

    def call(frame, event, function):
        nonlocal done
        text = getattr(function, "__self__", None) if event == "c_call" else None
        done += len(text) if isinstance(text, str) else 1

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(line), sys.setprofile(call)
    try:
        action(*arguments)
    finally:
        sys.settrace(before[0]), sys.setprofile(before[1])
    return done


def grows_linearly(action, sizes=(400, 4000)):
    """Whether twice the size takes about twice the work; four times would be quadratic."""
    return all(work(action, 2 * size) < 3 * work(action, size) for size in sizes)


@pytest.mark.parametrize("form", BRACKETS, ids=range(len(BRACKETS)))
def test_brackets_are_read_in_linear_time(form):
    assert grows_linearly(lambda size: parse_detection(brackets(form, size)))


def test_quadratic_code_is_found_out():
    def pops(size):
        left = ["x"] * size
        while left:
            sum(1 for _ in left)
            left.pop()

    assert not grows_linearly(pops)
    assert not grows_linearly(lambda size: [("x" * size).find("y") for _ in range(size)])


def test_what_is_past_the_longest_answer_is_not_read():
    """No more than that methods of texts pass over it, ten times at most."""
    texts = ["[1," * count for count in (14_000, 33_000)]
    longest, longer = (work(parse_detection, text) for text in texts)
    assert longer - longest <= 10 * (len(texts[1]) - len(texts[0]))


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
    assert category_in(detection_problem(category, space)) == category


@pytest.mark.parametrize(
    "problem, category", [("Find category 'cat'.", "cat"), ("A cat?", None), ("category ''", None)]
)
def test_the_category_of_other_prompts(problem, category):
    assert category_in(problem) == category
