"""Rewards for several categories, points, counts and absence; and our rewards in other trainers."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import math
import pickle
import statistics
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rewards import HUGE, reward

from virft_fast.tasks import REWARDS, is_ours, negative_share, parse_detection, parse_points
from virft_fast.tasks.adapters import swift_orm, verl_score
from virft_fast.train import parse_args
from virft_fast.train.rows import prepare_data

OBJECTS = ("detection_map", "point_in_box", "point_distance", "accuracy_count", "accuracy_presence")
A, B, FAR = [0, 0, 100, 100], [500, 500, 700, 700], [800, 0, 900, 100]
NOTHING = "<answer>No Objects</answer>"


def boxes(*items):
    """An answer with (box, label, confidence) items, as Qwen writes them."""
    return json.dumps([{"bbox_2d": b, "label": label, "score": s} for b, label, s in items])


def points(*items):
    return json.dumps([{"point_2d": point, "label": "it"} for point in items])


TRUTH = boxes((A, "cat", 1), (B, "hot dog", 1))


# Labels and points in answers.


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ('{"bbox_2d": [1, 2, 3, 4], "label": "hot dog"}', "hot dog"),
        ("{category: hot dog, box: [1, 2, 3, 4]}", "hot dog"),
        ("{'Position': [1, 2, 3, 4], 'class': 'rubik\\'s cube'}", "rubik's cube"),
        (json.dumps({"name": "café", "bbox": [1, 2, 3, 4]}), "café"),
        ('{"class": 5, "bbox": [1, 2, 3, 4]}', "5"),
        ('{"label": "cat", "boxes": [[1, 2, 3, 4]]}', "cat"),
        ("{'Position': [1, 2, 3, 4], 'Confidence': 1}", ""),
        ("[1, 2, 3, 4]", ""),
    ],
)
def test_labels_are_read(text, label):
    read = parse_detection(text)
    assert read.boxes == ((1, 2, 3, 4),) and read.labels == (label,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>(12, 13)</answer>", [(12, 13)]),
        ("click at [12, 13.5]", [(12, 13.5)]),
        (points([1, 2], [3, 4]), [(1, 2), (3, 4)]),
        ('{"points": [[1, 2], [3, 4]]}', [(1, 2), (3, 4)]),
        ('[{"bbox_2d": [0, 0, 9, 9], "point_2d": [1, 2]}]', [(1, 2)]),
        ("(1, 2), (3, 4), (5, 6)", [(1, 2), (3, 4), (5, 6)]),
        (NOTHING, []),
        ("(1, 2", None),
        ("(1, 2, 3)", None),
        ("(1e999, 2)", None),
        ("(left, top)", None),
    ],
)
def test_points_are_read(text, expected):
    read = parse_points(text)
    assert (None if read is None else [box[:2] for box in read.boxes]) == expected
    assert read is None or all(box[:2] == box[2:] for box in read.boxes)


def test_a_box_stays_a_box_among_points():
    assert parse_points("(1,2),(3,4)").boxes == ((1, 2, 3, 4),)
    assert parse_points("(1, 2)", (10, 20)).boxes == ((100, 100, 100, 100),)


# COCO's mAP of an answer.


def random_scene(rng):
    """True and predicted (box, label, confidence) items of up to three classes; some predictions
    are near a true box, with its label or another."""
    labels = ["a", "b", "c"]

    def box():
        x, y, w, h = rng.integers([0, 0, 50, 50], [700, 700, 300, 300]).tolist()
        return [x, y, x + w, y + h]

    true = [(box(), labels[rng.integers(3)], 1) for _ in range(rng.integers(1, 6))]
    answer = [(box(), labels[rng.integers(3)]) for _ in range(rng.integers(0, 4))]
    for corners, label, _ in true:
        for _ in range(rng.integers(0, 3)):
            moved = np.array(corners) + rng.normal(0, 8, 4).round()
            other = label if rng.random() < 0.8 else "c"
            answer.append((moved.clip(0, 1000).tolist(), other))
    sure = rng.permutation(100)[: len(answer)] / 100
    return true, [(*item, s) for item, s in zip(answer, sure.tolist(), strict=True)]


def coco_ap(true, answer):
    """pycocotools' AP of one class in one image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(number, corners):
        x1, y1, x2, y2 = corners
        return {
            "id": number, "image_id": 1, "category_id": 1, "iscrowd": 0,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
        }  # fmt: skip

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": 1}], "categories": [{"id": 1}],
            "annotations": [entry(n, b) for n, (b, *_) in enumerate(true, 1)],
        }  # fmt: skip
        truth.createIndex()
        found = [entry(n, b) | {"score": s} for n, (b, _, s) in enumerate(answer, 1)]
        run = COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][:, :, 0, 0, -1].mean()


def test_detection_map_is_pycocotools_times_the_share_of_predictions():
    pytest.importorskip("pycocotools")
    rng, seen = np.random.default_rng(0), []
    for _ in range(60):
        true, answer = random_scene(rng)
        values = []
        for label in {item[1] for item in true + answer}:
            t, a = ([item for item in side if item[1] == label] for side in (true, answer))
            values.append(coco_ap(t, a) * min(1, len(t) / len(a)) if t and a else 0.0)
        wanted = statistics.fmean(values)
        got = reward("detection_map", boxes(*answer), boxes(*true))
        assert got == pytest.approx(wanted, abs=1e-9), (true, answer)
        seen.append(got)
    assert 0.1 < statistics.fmean(seen) < 0.9 and len(set(seen)) > 40


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (TRUTH, 1.0),
        (boxes((A, "Cat", 0.1)), 0.5),
        (boxes((A, "hot dog", 1), (B, "cat", 1)), 0.0),
        (boxes((A, "", 1), (B, "", 1)), 0.0),
        # a third class, without a true box
        (boxes((A, "cat", 1), (B, "hot_dog", 1), (FAR, "bird", 0)), 2 / 3),
        # IoU 0.75: of ten thresholds, .50 to .75
        (boxes(([0, 0, 100, 75], "cat", 1), (B, "hot dog", 1)), (0.6 + 1) / 2),
        # one of two cats is right: precision 1, 1/2 and 1/2 where it comes first, second and in a
        # tie; times 1/2 in each case
        (boxes((A, "cat", 0.5), (FAR, "cat", 0.4), (B, "hot dog", 1)), 0.75),
        (boxes((A, "cat", 0.4), (FAR, "cat", 0.5), (B, "hot dog", 1)), 0.625),
        (boxes((A, "cat", 0.5), (FAR, "cat", 0.5), (B, "hot dog", 1)), 0.625),
        (boxes((A, "cat", None), (FAR, "cat", None), (B, "hot dog", None)), 0.625),
        # NaN, and more than 1, come last
        (boxes((A, "cat", 0.0), (FAR, "cat", math.nan), (B, "hot dog", 7)), 0.75),
        ("[]", 0.0),
        ("no idea", 0.0),
    ],
)
def test_detection_map_by_hand(answer, expected):
    assert reward("detection_map", answer, TRUTH) == pytest.approx(expected)


def test_labels_do_not_count_where_the_truth_has_none():
    truth = json.dumps([{"Position": A, "Confidence": 1}, {"Position": B, "Confidence": 1}])
    assert reward("detection_map", TRUTH, truth) == 1
    assert reward("detection_map", truth, TRUTH) == 0


def test_nothing_to_find():
    for name in ("detection_map", "point_in_box", "point_distance"):
        assert reward(name, NOTHING, NOTHING) == reward(name, "[]", NOTHING) == 1
        assert reward(name, TRUTH, NOTHING) == reward(name, "none", NOTHING) == 0
        assert reward(name, NOTHING, TRUTH) == 0


# Points, counts, absence.


@pytest.mark.parametrize(
    ("answer", "inside", "near"),
    [
        ("(50, 50)", 0.5, 0.5),
        ("(100, 100)", 0.5, (1 - math.sqrt(5000) / 200) / 2),  # on the edge
        ("(101, 50)", 0.0, (1 - 51 / 200) / 2),
        ("(50, 250)", 0.0, 0.0),
        (points([50, 50], [600, 600]), 1.0, 1.0),
        (points([600, 600], [50, 50]), 1.0, 1.0),
        (points([50, 50], [50, 50]), 0.5, 0.5),
        (points([50, 50], [600, 600], [900, 900]), 2 / 3, 2 / 3),
        (points([50, 50], [-1, 600]), 0.5, 0.5),
        (TRUTH, 1.0, 1.0),
        # the middle of the image, outside both
        (boxes(([0, 0, 1000, 1000], "all", 1)), 0.0, (1 - math.sqrt(20000) / 200) / 2),
        (boxes(([100, 100, 0, 0], "cat", 1)), 0.0, 0.0),
    ],
)
def test_points(answer, inside, near):
    truth = boxes((A, "cat", 1), ([501, 500, 699, 700], "hot dog", 1))
    assert reward("point_in_box", answer, truth) == pytest.approx(inside)
    assert reward("point_distance", answer, truth) == pytest.approx(near)


def test_points_are_assigned_for_the_most_matches():
    """The first point lies in both boxes, the second in one of them: both match."""
    truth = boxes(([0, 0, 100, 100], "a", 1), ([0, 0, 40, 40], "a", 1))
    for answer in (points([20, 20], [80, 80]), points([80, 80], [20, 20])):
        assert reward("point_in_box", answer, truth) == 1


def test_points_in_pixels_and_points_as_truth():
    values = REWARDS["point_in_box"](
        None, ["(25, 50)"] * 2, solution=["[0, 0, 50, 100]"] * 2, extent=[(50, 100), None]
    )
    assert values == [1, 1]
    pixels = REWARDS["point_distance"](
        None, [points([25, 50])], solution=[points([25, 60])], extent=[(1000, 100)]
    )
    assert pixels == [pytest.approx(0.5)]  # 10 of 100 pixels are 100 thousandths


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("4", "4", 1), ("3", "4", 0.75), ("5", "4", 0.75), ("8", "4", 0), ("0", "4", 0),
        ("0", "0", 1), ("1", "0", 0), (NOTHING, "0", 1), ("0", NOTHING, 1), ("2", TRUTH, 1),
        (TRUTH, "2", 1), (points([1, 1], [2, 2]), "2", 1), ("-4", "4", 0), ("4.5", "4", 0),
        ("8/2", "4", 0), ("4 m", "4", 0), ("3 or 4", "4", 0), ("9e99", "4", 0), ("many", "4", 0),
        ("4", "many", 0),
    ],
)  # fmt: skip
def test_counts(answer, truth, expected):
    assert reward("accuracy_count", answer, truth) == expected


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_one_answer_to_all_rows_earns_half_of_what_being_right_does(share):
    rows = [NOTHING] * round(share * 10) + [TRUTH] * round((1 - share) * 10)
    columns = {"solution": rows, "negative_share": [share] * 10}
    right, denying, finding = (
        sum(REWARDS["accuracy_presence"](None, texts, **columns)) / 10
        for texts in (rows, [NOTHING] * 10, [boxes((FAR, "x", 1))] * 10)
    )
    assert right == pytest.approx(denying + finding)
    if 0 < share < 1:
        assert denying == pytest.approx(finding) == pytest.approx(min(share, 1 - share))
    else:
        assert min(denying, finding) == 0


def test_a_run_balances_presence_by_the_share_in_its_rows(processor, tmp_path, capsys):
    """Two of eight rows have no objects: a right denial earns 1, a right box 1/3."""
    file = tmp_path / "rows.jsonl"
    solutions = [NOTHING, *[TRUTH] * 3, NOTHING, *[TRUTH] * 3]
    file.write_text("".join(json.dumps({"problem": "?", "solution": s}) + "\n" for s in solutions))
    argv = ["--dataset_name", str(file), "--reward_funcs", "accuracy_presence", "--task",
            "detection"]  # fmt: skip
    data = prepare_data(parse_args(argv), processor)
    assert "  without objects: 25.0%, for accuracy_presence" in data.table
    ((name, function),) = data.reward_funcs
    assert is_ours(name, function)
    values = partial(function, None, [TRUTH, NOTHING], solution=[TRUTH, NOTHING])
    assert values() == [pytest.approx(1 / 3), 1]
    assert values(negative_share=[0.8, 0.8]) == [1, pytest.approx(0.25)]  # the rows' column wins
    with_unreadable = negative_share([NOTHING, TRUTH, "?", TRUTH])
    assert with_unreadable == pytest.approx(1 / 3)
    # Nothing to balance: every right answer earns 1.
    assert negative_share([TRUTH]) is negative_share([NOTHING]) is negative_share([]) is None


def test_a_share_outside_0_to_1_is_an_error():
    with pytest.raises(ValueError, match="negative_share: expected a share in .0, 1., got 80"):
        REWARDS["accuracy_presence"](None, ["x"], solution=[TRUTH], negative_share=[80])


@pytest.mark.parametrize("answer", ["", "none", "[5, 5, 1, 1]", boxes(([0, 0, 9, 2000], "x", 1))])
def test_presence_needs_a_valid_box_or_a_denial(answer):
    assert reward("accuracy_presence", answer, TRUTH) == 0
    assert reward("accuracy_presence", answer, NOTHING) == 0
    assert reward("accuracy_presence", NOTHING, "unreadable") == 0


# Holes: no answer without a look at the image earns much, and no padding of a right one helps.

CONSTANT = [
    "", NOTHING, "(500, 500)", "[0, 0, 1000, 1000]",
    boxes(*(([0, 0, 1000, 1000], label, 1) for label in "abc")),
    boxes(*(([x, y, x + 200, y + 200], "a", 1) for x in range(0, 1000, 200)
            for y in range(0, 1000, 200))),
    points(*([x, y] for x in range(50, 1000, 100) for y in range(50, 1000, 100))),
    boxes(*((A, "a", 1) for _ in range(100))),
]  # fmt: skip


@pytest.mark.parametrize("name", ["detection_map", "point_in_box", "point_distance"])
def test_constant_answers_earn_little(name):
    rng = np.random.default_rng(1)
    truths = [boxes(*random_scene(rng)[0]) for _ in range(30)]
    for answer in CONSTANT:
        values = REWARDS[name](None, [answer] * len(truths), solution=truths)
        assert statistics.fmean(values) < 0.12, answer


@pytest.mark.parametrize("name", ["detection_map", "point_in_box", "point_distance"])
def test_whatever_is_added_to_a_right_answer_costs(name):
    right = [(A, "cat", 1), (B, "hot dog", 1)]
    for more in (right[0], (FAR, "cat", 0), (FAR, "bird", 0), ([9, 9, 1, 1], "cat", 0),
                 ([0, 0, 1000, 1000], "hot dog", 0), ("?", "cat", 0)):  # fmt: skip
        for answer in (boxes(*right, more), boxes(more, *right), boxes(*right, more, more)):
            assert reward(name, answer, TRUTH) < 0.9, more


CORNER = st.sampled_from([0, 100, 500, 700, 800, 900, -3, 1001])
ITEM = st.tuples(
    st.one_of(st.lists(CORNER, min_size=4, max_size=4), st.sampled_from([A, B, FAR])),
    st.sampled_from(["cat", "hot dog", "bird", ""]), st.sampled_from([0.0, 0.5, 1.0, None]),
)  # fmt: skip


@given(st.lists(ITEM, max_size=6), st.randoms())
def test_order_does_not_matter_and_rewards_stay_in_range(items, random):
    shuffled = random.sample(items, len(items))
    for name in OBJECTS:
        value = reward(name, boxes(*items), TRUTH)
        assert 0 <= value <= 1
        assert reward(name, boxes(*shuffled), TRUTH) == pytest.approx(value, abs=1e-9), name


@given(st.lists(st.tuples(st.lists(HUGE, min_size=2, max_size=4), HUGE), max_size=4))
def test_numbers_beyond_measure_give_a_reward_in_range(items):
    answer = json.dumps([{"bbox_2d": b, "label": "cat", "score": s} for b, s in items])
    answers = (answer, answer.replace("bbox", "point"), str([b for b, _ in items]))
    for name in OBJECTS:
        for text in answers:
            for solution in (TRUTH, text):
                value = reward(name, text, solution)
                assert 0 <= value <= 1, (name, text)


# Other trainers' conventions, with every registered reward. TRL's is in test_trl_parity.py.

ANSWERS = {"accuracy": "rose", "visual_rft_accuracy": "rose", "accuracy_choice": "B",
           "accuracy_number": "5", "accuracy_math": "5"}  # fmt: skip
BOX = "<answer>[{'Position': [1, 2, 30, 40], 'Confidence': 1}]</answer>"


def batch(name):
    """Completions and solutions, and what the reward gives for them."""
    right = f"<answer>{ANSWERS[name]}</answer>" if name in ANSWERS else BOX
    right = "<answer>(1,2),(30,40)</answer>" if "grounding" in name else right
    texts = [f"<think>so</think>{right}", "no idea", right.replace("30", "29"), right]
    return texts, [right] * 4, REWARDS[name](None, texts, solution=[right] * 4)


@pytest.mark.parametrize("name", REWARDS)
def test_verl_calls_compute_score(name, tmp_path):
    """From a file, by name; with all arguments by name, and `reward_kwargs` among them."""
    file = tmp_path / "mine.py"
    file.write_text(
        f"from virft_fast.tasks.adapters import verl_score\ncompute_score = verl_score({name!r})\n"
    )
    spec = importlib.util.spec_from_file_location("mine", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert not inspect.iscoroutinefunction(module.compute_score)
    score = pickle.loads(pickle.dumps(partial(module.compute_score, reward_router_address=None)))
    texts, truths, wanted = batch(name)
    extra = {"split": "train", "index": 3, "solution": "another", "prompts": 1}
    for text, truth, value in zip(texts, truths, wanted, strict=True):
        for extra_info in (None, extra):
            given = {"solution_str": text, "ground_truth": truth, "extra_info": extra_info}
            got = score(data_source="shapes", **given)
            assert type(got) is float and got == pytest.approx(value)


def test_verl_passes_columns_from_extra_info():
    score = verl_score("point_in_box")
    extra = {"extent": np.array([50, 100])}
    assert score("shapes", "(40, 90)", "[700, 800, 900, 1000]", extra) == 0
    assert score("shapes", "(40, 90)", "[30, 80, 50, 100]", extra) == 1
    choices = {"choices": np.array(["cat", "dog"])}
    assert verl_score("accuracy_choice")("x", "C", "C", choices) == 0
    assert verl_score("accuracy_choice")("x", "B", "B", choices) == 1
    with pytest.raises(ValueError, match="did you mean accuracy_iou"):
        verl_score("acuracy_iou")


@pytest.mark.parametrize("name", REWARDS)
def test_ms_swift_calls_an_orm(name):
    """Created with those of the trainer's arguments that its constructor names, and called with the
    texts and the rows' columns."""
    orms = {name: swift_orm(name)}
    trainer_args = SimpleNamespace(args=1, kwargs=2, cosine_max_len=3)
    wanted = [
        key for key in inspect.signature(orms[name].__init__).parameters
        if key not in ("self", "args", "kwargs") and hasattr(trainer_args, key)
    ]  # fmt: skip
    made = orms[name](**{key: getattr(trainer_args, key) for key in wanted})
    texts, truths, expected = batch(name)
    rows = {"solution": truths, "messages": [[]] * 4, "trainer_state": None, "prompt_id": ["a"] * 4}
    assert made(texts, **rows) == pytest.approx(expected)
    assert made.__class__.__name__ == name and isinstance(made(texts, **rows), list)
