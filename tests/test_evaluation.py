"""Measures of an evaluation against numbers worked out by hand and against pycocotools'."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from virft_fast.evaluation import bootstrap, classification, grounding, pages
from virft_fast.evaluation.bootstrap import Ratios
from virft_fast.evaluation.detection import (
    AveragePrecision,
    average_precisions,
    make_truth,
    results_of_records,
    truth_of_records,
)
from virft_fast.evaluation.journal import Journal
from virft_fast.evaluation.questions import read_exists_map
from virft_fast.evaluation.reading import marked, predicted_boxes, predicted_label
from virft_fast.evaluation.results import Result, measure
from virft_fast.tasks.answers import ClosedSet, mentioned
from virft_fast.tasks.labels import class_set


def answer(*boxes):
    items = [{"Position": box, "Confidence": confidence} for box, confidence in boxes]
    return f"<answer>{json.dumps(items)}</answer>"


def record(image, completion, solution, category="cat", size=(100, 100), **more):
    return {
        "index": image, "image_id": image, "category": category, "size": list(size), "prompt": "",
        "completion": completion, "solution": solution, "rewards": {}, **more,
    }  # fmt: skip


# --- Average precision -----------------------------------------------------------------------


def test_coco_case_by_hand():
    """A cat on each of two images, both found: exactly with 0.9, and with IoU 0.72 with 0.8. Up to
    threshold 0.7 (five of ten) both are hits: AP 1. Beyond, recall ends at 1/2 with precision 1: 51
    of the 101 recalls. The dog of image 1 is never found: AP 0."""
    whole = [0, 0, 1000, 1000]
    records = [
        record(1, answer((whole, 0.9)), answer((whole, 1))),
        record(2, answer(([0, 0, 1000, 720], 0.8)), answer((whole, 1))),
        record(1, "<answer>No Objects</answer>", answer((whole, 1)), "dog"),
    ]
    truth = truth_of_records(records)
    assert truth.categories == {1: "cat", 2: "dog"}
    predictions = results_of_records(records, truth)
    assert predictions == [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "score": 0.9},
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 100, 72], "score": 0.8},
    ]
    found = average_precisions(truth, predictions)
    assert found[1]["AP"] == pytest.approx((5 + 5 * 51 / 101) / 10)
    assert found[1]["AP50"] == pytest.approx(1)
    assert found[1]["AP75"] == pytest.approx(51 / 101)
    assert found[2] == {"AP": 0, "AP50": 0, "AP75": 0}


def test_boxes_are_in_pixels_of_the_original_image():
    """In Qwen2.5-VL's space the same box is written in pixels of another size."""
    box, extent = [98, 42, 196, 84], [196, 84]
    one = record(1, answer((box, 0.5)), answer((box, 1)), size=(400, 200), extent=extent)
    (prediction,) = results_of_records([one], truth_of_records([one]))
    assert prediction["bbox"] == pytest.approx([200, 100, 200, 100])


def test_what_is_no_box_counts_as_a_false_alarm_and_twice_the_same_once():
    whole = [0, 0, 1000, 1000]
    text = answer((whole, 0.4), ([9, 9, 1, 1], 0.9), (whole, 0.3), ([1, 2], 7), ("x", None))
    one = record(1, text, answer((whole, 1)))
    truth = truth_of_records([one])
    predictions = results_of_records([one], truth)
    assert [(p["bbox"], p["score"]) for p in predictions] == [
        ([0, 0, 100, 100], 0.4), ([0, 0, 0, 0], 0.9), ([0, 0, 0, 0], 0.0),
    ]  # fmt: skip
    assert average_precisions(truth, predictions)[1]["AP"] == pytest.approx(0.5)
    silent = record(1, "I see nothing", answer((whole, 1)))
    assert results_of_records([silent], truth) == []
    assert average_precisions(truth, [])[1]["AP"] == 0


@pytest.mark.parametrize("far", [1e9, 1e308, 1e30])
def test_a_box_beyond_measure_is_a_false_alarm(far):
    """COCO ignores what is larger than 1e10 pixels; here both come before the hit: AP 1/3."""
    whole = [0, 0, 1000, 1000]
    boxes = [[0, 0, far, far], [-far, -far, far, far]]
    one = record(1, answer((whole, 0.4), *((box, 0.9) for box in boxes)), answer((whole, 1)))
    truth = truth_of_records([one])
    predictions = results_of_records([one], truth)
    assert [p["bbox"] for p in predictions[1:]] == [[0, 0, 0, 0]] * 2
    json.dumps(predictions, allow_nan=False)
    assert average_precisions(truth, predictions)[1]["AP"] == pytest.approx(1 / 3)
    units = {1: 0}
    ours = bootstrap.values([AveragePrecision(truth, predictions, units)], 1)
    assert ours["mAP"] == pytest.approx(1 / 3)


def random_detections(num_images=200, seed=0):
    """Crowds, near misses, ties in score, boxes without area, categories without predictions."""
    rng = np.random.default_rng(seed)
    images = {100 + i: {"width": 640, "height": 480} for i in range(num_images)}
    categories = {3: "cat", 7: "dog", 9: "bus", 11: "bed", 12: "toilet"}
    annotations, predictions = [], []
    for image in images:
        for category in categories:
            for _ in range(rng.poisson(1.2)):
                width, height = rng.uniform(5, 300, 2)
                x, y = rng.uniform(0, 640 - width), rng.uniform(0, 480 - height)
                about = {"image_id": image, "category_id": category}
                crowd = int(rng.random() < 0.1)
                annotations.append(about | {"bbox": [x, y, width, height], "iscrowd": crowd})
                for _ in range(rng.integers(0, 3) if category != 12 else 0):
                    moved = rng.normal(0, 0.1, 4) * [width, height, width, height]
                    sides = [x, y, width, height] + moved
                    box = [*sides[:2].tolist(), *sides[2:].clip(0).tolist()]
                    predictions.append(about | {"bbox": box, "score": round(rng.random(), 2)})
    return make_truth(images, categories, annotations), predictions


def test_ap_is_pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, predictions = random_detections()
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = truth.as_coco()
        true.createIndex()
        run = COCOeval(true, true.loadRes([dict(p) for p in predictions]), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    expected = run.eval["precision"][:, :, :, 0, -1]  # (T, recalls, categories)
    found = average_precisions(truth, predictions)
    for place, number in enumerate(run.params.catIds):
        assert found[number]["AP"] == pytest.approx(expected[:, :, place].mean(), abs=1e-6)
        assert found[number]["AP75"] == pytest.approx(expected[5, :, place].mean(), abs=1e-6)
    assert 0.1 < run.stats[0] < 0.9
    units = {image: number for number, image in enumerate(truth.images)}
    ours = bootstrap.values([AveragePrecision(truth, predictions, units)], len(units))
    assert ours["mAP"] == pytest.approx(run.stats[0], abs=1e-6)
    assert ours["mAP50"] == pytest.approx(run.stats[1], abs=1e-6)
    assert ours["mAP75"] == pytest.approx(run.stats[2], abs=1e-6)


def test_a_resampled_ap_is_that_of_the_images_in_it():
    """Counting an image twice is evaluating a copy of it."""
    truth, predictions = random_detections(num_images=12, seed=3)
    units = {image: number for number, image in enumerate(truth.images)}
    counts = np.random.default_rng(1).integers(0, 3, (1, 12))
    got = AveragePrecision(truth, predictions, units)(counts.astype(float))
    images, annotations, copies = {}, [], []
    for image, number in units.items():
        for copy in range(counts[0, number]):
            images[1000 * image + copy] = truth.images[image]
            for records, to in ((truth.annotations, annotations), (predictions, copies)):
                here = [r for r in records if r["image_id"] == image]
                to += [r | {"image_id": 1000 * image + copy} for r in here]
    resampled = make_truth(images, truth.categories, annotations)
    expected = average_precisions(resampled, copies)
    mean = np.mean([ap["AP"] for ap in expected.values()])
    assert got["mAP"][0] == pytest.approx(mean, abs=1e-9)


def test_lvis_protocol_leaves_out_what_nobody_checked():
    """A false alarm counts where the category is known to be absent, and nowhere else."""
    box = [0.0, 0.0, 50.0, 50.0]
    annotations = [{"image_id": 1, "category_id": 5, "bbox": box}]
    result = {"category_id": 5, "bbox": box}
    predictions = [
        result | {"image_id": 1, "score": 0.5},
        result | {"image_id": 2, "score": 0.9},
    ]
    for negative, federated in (([], 1.0), ([5], 0.5)):
        images = {
            n: {"width": 100, "height": 100, "neg_category_ids": negative if n == 2 else []}
            for n in (1, 2)
        }
        truth = make_truth(images, {5: "egg_roll"}, annotations)
        assert average_precisions(truth, predictions)[5]["AP"] == pytest.approx(0.5)
        found = average_precisions(truth, predictions, federated=True)
        assert found[5]["AP"] == pytest.approx(federated)


# --- Intervals -------------------------------------------------------------------------------


def test_bootstrap_draws_images_not_rows():
    """Two images, one always right and one always wrong, however many rows each has: a resample has
    mean 0, 1/2 or 1 when weighted by image."""
    ratios = Ratios({"a": 0, "b": 1})
    ratios.add("right", [("a", 1.0, 1.0)] * 3 + [("b", 0.0, 1.0)] * 3)
    drawn = bootstrap.draws([ratios], 2, 2000, seed=0)["right"]
    assert set(drawn) == {0.0, 0.5, 1.0}
    assert np.mean(drawn == 0.5) == pytest.approx(0.5, abs=0.05)
    assert bootstrap.interval(drawn) == (0.0, 1.0)
    again = bootstrap.draws([ratios], 2, 2000, seed=0)["right"]
    assert (again == drawn).all()
    assert (bootstrap.draws([ratios], 2, 2000, seed=1)["right"] != drawn).any()


def test_interval_is_that_of_the_normal_for_a_large_sample():
    values = np.random.default_rng(0).normal(size=2000)
    ratios = Ratios({n: n for n in range(2000)})
    ratios.add("mean", [(n, value, 1.0) for n, value in enumerate(values)])
    low, high = bootstrap.interval(bootstrap.draws([ratios], 2000, 1000, seed=0)["mean"])
    error = values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_a_measure_of_nothing_has_no_interval():
    ratios = Ratios({"a": 0})
    ratios.add("none", [])
    assert math.isnan(bootstrap.values([ratios], 1)["none"])
    assert bootstrap.interval(bootstrap.draws([ratios], 1, 10, seed=0)["none"]) is None


def results(task, records, model="m", **more):
    options = {"counts": {}, "num_draws": 50, "seed": 0, **more}
    names = [*records[0]["rewards"]]
    return measure(model, task, records, names, **options)


def test_a_change_is_measured_on_the_same_images():
    """Both models are right on half of the images, one of them on one more: each interval is wide,
    that of the difference is not."""
    solutions = ["<answer>cat</answer>"] * 40
    texts = [["cat"] * 20 + ["dog"] * 20, ["cat"] * 21 + ["dog"] * 19]
    labels = ClosedSet(["cat", "dog"])
    both = [
        results(
            "classification",
            [
                record(i, text, solution, rewards={"accuracy": float(text == "cat")})
                for i, (text, solution) in enumerate(zip(column, solutions, strict=True))
            ],
            labels=labels,
            num_draws=500,
        )
        for column in texts
    ]
    difference, interval = pages.change(*both, "closed_set_accuracy")
    assert difference == pytest.approx(1 / 40)
    assert interval[0] >= 0 and interval[1] < 0.1
    low, high = both[0].interval("closed_set_accuracy")
    assert high - low > 0.2


# --- Classification --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, label",
    [
        ("<answer>Saint_Bernard</answer>", "saint bernard"),
        ("<answer>saint-bernard.</answer>", "saint bernard"),
        ("<answer>SaintBernard</answer>", "saint bernard"),
        ("<think>a pug?</think><answer>It is a pug</answer>", "pug"),
        ("<answer>a French bulldog</answer>", "french bulldog"),
        ("<answer>bulldog</answer>", "bulldog"),
        ("<answer>pug or bulldog</answer>", None),
        ("<answer>one of many dogs that is a pug</answer>", None),
        ("<answer></answer>", None),
        ("<answer>poodle</answer>", None),
        ("", None),
    ],
)
def test_closed_set(text, label):
    assert ClosedSet(["saint bernard", "pug", "bulldog", "french bulldog"])(text) == label


CRAFT = ["737-200", "747-100", "A300B4", "MD-11", "DC-10", "707-320"]
OTHERS = ["saint bernard", "wallflower", "ant", "american pit bull terrier", "cat", "lotus"]


@pytest.mark.parametrize(
    "text, label",
    [
        ("Airbus A300-B4", "A300B4"),
        ("Airbus A300 B4", "A300B4"),
        ("McDonnell Douglas MD11", "MD-11"),
        ("the Boeing 737200", "737-200"),
        ("a SaintBernard dog", "saint bernard"),
        ("an American pitbull terrier", "american pit bull terrier"),
        ("a wall flower", "wallflower"),
    ],
)
def test_a_label_is_found_however_its_words_are_joined(text, label):
    assert ClosedSet([*CRAFT, *OTHERS])(f"<answer>{text}</answer>") == label


@pytest.mark.parametrize(
    "text",
    [
        "Boeing 737-2000", "Boeing 1737-200", "Boeing 7 37200", "Boeing 737-20 0", "the MD-1 1",
        "an A300B42", "an A3 00B4", "an T shirt", "the concatenation", "a c at",
        "SaintBernards are", "a Boeing 737-200 or MD11", "it may well be some MD11",
    ],
)  # fmt: skip
def test_no_label_is_found_by_halves(text):
    assert ClosedSet([*CRAFT, *OTHERS])(f"<answer>{text}</answer>") is None


def test_closed_set_measures_by_hand():
    """Three cats, of which two are named so and one is taken for a dog; one dog without a label: 2
    of 4 are right, the classes have 2/3 and 0."""
    texts = [("cat", "cat"), ("Cat", "cat"), ("dog", "cat"), ("hmm", "dog")]
    records = [
        record(i, text, f"<answer>{true}</answer>", rewards={"accuracy": None})
        for i, (text, true) in enumerate(texts)
    ]
    labels = class_set([r["solution"] for r in records])
    assert labels.labels == ["cat", "dog"]
    found = results("classification", records, labels=labels)
    assert found.means["closed_set_accuracy"] == 0.5
    assert found.means["no_label"] == 0.25
    assert found.means["mean_class_accuracy"] == pytest.approx(1 / 3)
    assert math.isnan(found.means["accuracy"])  # no reward was given
    assert found.confusions == [
        {"true": "cat", "predicted": "dog", "count": 1, "share": pytest.approx(1 / 3)},
        {"true": "dog", "predicted": classification.NO_LABEL, "count": 1, "share": 1.0},
    ]


# --- Answers as the original's evaluation reads them -------------------------------------------

WHOLE = "{'Position': [0, 0, 1000, 1000], 'Confidence': 0.9}"


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        (f"<answer>[{WHOLE}]</answer>", 1, 1),
        (f"<think>a\nb</think>\n<answer>\n[{WHOLE}]\n</answer>", 1, 1),
        (f"<answer>[[{WHOLE}]]</answer>", 1, 1),
        (f"<answer>[{WHOLE}, {WHOLE}, ...]</answer>", 2, 1),  # a position that was there before
        (f"<answer>[{WHOLE}, {{'Position': [1, 2</answer>", 1, 1),
        (f"<answer>[{WHOLE}", 1, 0),
        (f"<think>the <answer> is</think> <answer>[{WHOLE}]</answer>", 1, 0),
        (f"<answer>```json\n[{WHOLE}]\n```</answer>", 1, 0),
        (f"<answer>[{WHOLE.replace('Position', 'bbox_2d')}]</answer>", 1, 0),
        (f"<answer>[{WHOLE.replace('0.9', '90%')}]</answer>", 1, 0),
        (f"<answer>[{WHOLE}, {{'Position': [1, 2, 3], 'Confidence': 1}}]</answer>", 2, 1),
        ("<answer>[{'Position': [0, 0, 9, 9]}]</answer>", 1, 0),
        ("<answer>[0, 0, 1000, 1000]</answer>", 1, 0),
        ("<answer>No Objects</answer>", 0, 0),
        ("<answer>[]</answer>", 0, 0),
    ],
)
def test_boxes_of_either_reading(text, lenient, strict):
    one = record(1, text, answer(([0, 0, 1000, 1000], 1)))
    for answers, count in (("lenient", lenient), ("visual_rft", strict)):
        read = predicted_boxes(marked(one, answers, "detection"))
        assert len(read.boxes if read else ()) == count


def test_the_strict_reading_reaches_every_measure_of_detection():
    """Two images with a box each; both are found, one of them without a closing tag."""
    truth = answer(([0, 0, 1000, 1000], 1))
    records = [record(1, truth, truth), record(2, truth.removesuffix("</answer>"), truth)]
    strict = [marked(r, "visual_rft", "detection") for r in records]
    for read, share in ((records, 1), (strict, 0.5)):
        found = results("detection", read, truth=truth_of_records(read))
        assert found.means["mean_iou"] == share
        assert found.means["ap50"] == pytest.approx(share, abs=0.01)
        assert found.means["mAP"] == pytest.approx(share, abs=0.01)
    # Marked for one reading and measured by another: the last mark counts.
    assert [marked(r, "lenient", "detection") for r in strict] == records


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        ("<answer>cat</answer>", "cat", "cat"),
        ("<answer></answer>", None, "cat"),  # part of any name
        ("<answer>catalog</answer>", None, "cat"),
        ("<answer>c-a-t</answer>", None, None),
        ("<answer>dog</answer>", "dog", "dog"),
        ("it is a cat,\nsurely, and no other animal", None, "cat"),
    ],
)
def test_labels_of_either_reading(text, lenient, strict):
    labels = class_set(["cat", "dog"])
    one = record(0, text, "<answer>cat</answer>")
    for answers, expected in (("lenient", lenient), ("visual_rft", strict)):
        assert predicted_label(marked(one, answers, "classification"), labels) == expected


def test_grounding_of_either_reading():
    solution = "<answer> (100,100),(300,300) </answer>"
    thought = "<think>(0,0),(9,9)?</think>" + solution
    listed = "<answer>[100, 100, 300, 300]</answer>"
    for text, strict in ((solution, 0.04 / 0.040001), (thought, 0), (listed, 0)):
        one = record(0, text, solution)
        assert grounding.box_iou(one) == pytest.approx(0.04 / 0.040001)
        assert grounding.box_iou(marked(one, "visual_rft", "grounding")) == pytest.approx(strict)


@given(
    st.text()
    | st.lists(
        st.sampled_from(
            [
                "<answer>",
                "</answer>",
                "[",
                "{",
                "'Position': ",
                "[1, 2, 3, 4]",
                "'Confidence': ",
                "9" * 310,
                ", ",
                "}",
                "]",
                "(1,2),(3,4)",
            ]
        )
    ).map("".join)
)
def test_the_strict_reading_raises_on_no_text(text):
    for task in ("detection", "grounding"):
        read = predicted_boxes(marked(record(0, text, text), "visual_rft", task))
        assert read is None or len(read.boxes) == len(read.confidences) > 0


# --- Grounding -------------------------------------------------------------------------------


def test_box_iou_by_hand():
    """Boxes of 0.2 x 0.2 that share a half: 0.02 / (0.04 + 0.04 - 0.02 + 1e-6)."""
    solution = "<answer> (100,100),(300,300) </answer>"
    half = record(0, "<answer>(200,100),(400,300)</answer>", solution)
    assert grounding.box_iou(half) == pytest.approx(0.02 / 0.060001, abs=1e-12)
    same = record(1, solution + " (0,0),(1,1)", solution)
    assert grounding.box_iou(same) == pytest.approx(0.04 / 0.040001, abs=1e-12)
    for text in ("(300,300),(100,100)", "(1000,1000),(0,0)", "nothing", "(5,5),(5,9)"):
        assert grounding.box_iou(record(2, f"<answer>{text}</answer>", solution)) == 0
    found = results("grounding", [half, record(1, solution, solution)])
    assert found.means["box_acc50"] == 0.5
    assert found.means["box_iou"] == pytest.approx((0.02 / 0.060001 + 0.04 / 0.040001) / 2)


def png(pixels, mode):
    file = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8)).convert(mode).save(file, "PNG")
    return {"mask": {"bytes": file.getvalue()}}


@pytest.mark.parametrize(
    "mode, pixels, areas",
    [
        # SAM takes the whole row: the ignored third pixel is neither shared nor more.
        ("L", [[255, 0, 128, 255]], {"intersection": 2, "union": 3}),
        ("1", [[255, 0, 0, 255]], {"intersection": 2, "union": 4}),  # as sets had it before
    ],
)
def test_ignored_pixels_count_neither_way(mode, pixels, areas):
    sample = SimpleNamespace(images=(Image.new("RGB", (4, 1)),))
    true = grounding.true_mask(png(pixels, mode))
    whole = lambda images, boxes: [np.ones((1, 4), bool)] * len(images)  # noqa: E731
    answers = [record(0, text, "") for text in ("<answer>(0,0),(1000,1000)</answer>", "where?")]
    found = grounding.mask_areas(whole, answers, [sample] * 2, [true] * 2)
    assert found == [areas, {"intersection": 0, "union": 2}]


def test_mask_measures_by_hand():
    """IoU 1/2 on a small mask and 0 on a large one: gIoU 1/4, cIoU 5 / 110. A row without a mask is
    left out of both."""
    solution = "<answer> (100,100),(300,300) </answer>"
    masks = [{"intersection": 5, "union": 10}, {"intersection": 0, "union": 100}, {}]
    records = [record(i, solution, solution, mask=mask) for i, mask in enumerate(masks)]
    found = results("grounding", records)
    assert found.means["gIoU"] == pytest.approx(0.25, abs=1e-6)
    assert found.means["cIoU"] == pytest.approx(5 / 110)
    assert "gIoU" not in results("grounding", [record(0, solution, solution)]).means
    # Asked for, but no true mask is there: said, not left out.
    assert math.isnan(results("grounding", [record(0, solution, solution, mask={})]).means["gIoU"])


@pytest.mark.parametrize("junk", [b"junk", b"", None, 5, "cut", {"path": "\0"}, {"bytes": b"x"}])
def test_a_mask_that_cant_be_read_is_none(junk):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64)).astype("u1")).save(
        buffer, "PNG"
    )
    whole = buffer.getvalue()
    assert grounding.true_mask({"mask": {"bytes": whole, "path": None}}).shape == (64, 64)
    assert (
        grounding.true_mask({"mask": whole[: len(whole) // 2] if junk == "cut" else junk}) is None
    )


def test_sam_is_asked_with_the_box_in_pixels(sam_path):
    """Against SamModel called by hand, on an image that is not square."""
    from transformers import SamModel

    model = grounding.MaskModel(str(sam_path), torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 100, 3)).astype("u1"))
    box, other = (100.0, 200.0, 600.0, 900.0), (0.0, 0.0, 500.0, 500.0)
    (mask,) = model([image], [box])
    together = model([image.resize((64, 64)), image], [other, box])  # of different sizes
    assert together[0].shape == (64, 64) and (together[1] == mask).all()
    assert mask.shape == (50, 100) and mask.dtype == bool
    pixels = model.processor.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        low = SamModel.from_pretrained(sam_path)(
            pixel_values=pixels["pixel_values"],
            # 100x50 is scaled to the model's 64 on the longer side.
            input_boxes=torch.tensor([[[10.0, 10.0, 60.0, 45.0]]]) * 0.64,
            multimask_output=False,
        ).pred_masks
    size = {"size": (64, 64), "mode": "bilinear", "align_corners": False}
    whole = torch.nn.functional.interpolate(low[0], **size)[..., :32, :64]
    whole = torch.nn.functional.interpolate(whole, **(size | {"size": (50, 100)}))
    assert (torch.from_numpy(mask) == (whole[0, 0] > 0)).all()


# --- What there is ---------------------------------------------------------------------------


def test_names_that_an_answer_mentions():
    names = ["dog", "hot dog", "cat", "egg_roll"]
    assert mentioned("<answer>Hot dog, egg roll</answer>", names) == ["hot dog", "egg_roll"]
    assert mentioned("a dog and a hot dog", names) == ["dog", "hot dog"]
    assert mentioned("<think>a cat?</think> No Objects", names) == []
    assert mentioned("hotdog category", names) == []


def test_exists_map_by_id_or_file(tmp_path):
    images = {139: "val2017/000000000139.jpg", 285: "000000000285.jpg"}
    path = tmp_path / "map.json"
    data = {"139": ["cat"], "000000000285.jpg": ["dog"], "7": ["bus"]}
    path.write_text(json.dumps(data))
    found, unknown = read_exists_map(path, images, ["cat", "dog"])
    assert found == {139: ["cat"], 285: ["dog"]}
    assert list(unknown.values()) == [1, 1]
    for text, said in (
        ("[1]", 'expected {"image"'),
        ('{"139": "cat"}', 'expected {"image"'),
        ("no", "expected JSON"),
        ('{"7": ["cat"]}', "none of its images (7) is known"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            read_exists_map(path, images, ["cat"])
        assert said in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_exists_map(tmp_path / "none.json", images, ["cat"])


# --- The journal -----------------------------------------------------------------------------


def test_a_torn_line_is_dropped_and_what_was_before_stays(tmp_path):
    path, settings = tmp_path / "x.journal", {"length": 4, "flag": None}
    journal = Journal(path, settings)
    assert not path.exists()
    journal.add("answer", [{"index": 0, "iou": float("nan")}])
    journal.add("answer", [{"index": 1}])
    journal.add("mask", [{"index": 0}])
    whole = path.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 40):
        path.write_bytes(whole[:cut])
        again = Journal(path, settings)
        lines = max(whole[:cut].count(b"\n") - 1, 0)
        assert sum(map(len, again.records.values())) == lines
        if lines:
            assert again.records["answer"][0] == {"index": 0, "iou": None}
        again.add("answer", [{"index": 2}])
        assert Journal(path, settings).records["answer"][-1] == {"index": 2}
    path.write_bytes(whole + b'{"stage": "answer", "record": {"index"')
    assert Journal(path, settings).records["mask"] == [{"index": 0}]
    assert path.read_bytes() == whole


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "x.journal"
    Journal(path, {"length": 4}).add("answer", [{"index": 0}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="length 4 there and 5 here.*--overwrite"):
        Journal(path, {"length": 5})
    assert path.read_bytes() == before
    assert Journal(path, {"length": 5}, overwrite=True).records == {}
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="interrupted"):
        Journal(path, {"length": 5})
    assert path.read_text() == "something else\n"


# --- Pages -----------------------------------------------------------------------------------


def test_text_is_never_markup():
    evil = "<script>alert(1)</script> | `x`"
    one = Result(evil, "classification", {"accuracy": 0.5}, {}, [0], [], {"bad": 1})
    one.confusions = [{"true": evil, "predicted": "b", "count": 1, "share": 1.0}]
    shown = pages.tables([one])
    found = [pages.Picture(evil, evil, [("data:,", evil)])]
    page = pages.html(evil, shown, found, [evil])
    assert "<script>" not in page and "&lt;script&gt;" in page
    text = pages.markdown(evil, shown)
    assert "<script>" not in text
    assert "alert(1)&lt;/script> \\| " in text


def test_pictures_show_truth_and_prediction():
    image = Image.new("RGB", (300, 200), (0, 0, 0))
    one = record(0, answer(([500, 500, 900, 900], 0.5)), answer(([100, 100, 400, 400], 1)))
    drawn = np.asarray(pages.draw(image, one, boxes=True)).astype(int)
    white = (drawn == 255).all(2)
    pink = (abs(drawn - (255, 63, 180)) < 8).all(2)
    assert white[:, :150].sum() > 100 and not white[:, 150:].any()
    assert pink[:, 150:].sum() > 100 and not pink[:, :145].any()
