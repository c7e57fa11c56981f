"""The demo data sets: schema, ground truth, seeds, and that train and test share nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from virft_fast.data.demo import (
    COLOURS,
    DEMO_DATASETS,
    GRID,
    SHAPES_SIZE,
    WORDS,
    build_demo,
    demo_dataset,
    digit_glyphs,
    digits,
    shapes,
)

NAMES = ("shapes_detection", "digits_classification")
BOX = re.compile(
    r"<answer>\[\{'Position': \[(\d+), (\d+), (\d+), (\d+)\], 'Confidence': 1\}\]</answer>"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return {name: build_demo(name, folder / name, num_train=48, num_test=24) for name in NAMES}


def pixels(split):
    return [np.asarray(image).tobytes() for image in split["image"]]


def test_both_demos_are_named():
    assert tuple(DEMO_DATASETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_visual_rfts(built, name):
    dataset = built[name]
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 48, "test": 24}
    for rows in dataset.values():
        assert rows.column_names == ["image", "problem", "solution"]
        assert {rows.features[k].dtype for k in ("problem", "solution")} == {"string"}
        size = 112 if name == "shapes_detection" else 56
        assert all(image.mode == "RGB" and image.size == (size, size) for image in rows["image"])


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_image(built, name):
    train, test = (pixels(built[name][split]) for split in ("train", "test"))
    assert len({*train, *test}) == len(train) + len(test)


def test_digits_of_train_and_test_are_different_glyphs():
    train, test = digit_glyphs()["train"], digit_glyphs()["test"]
    seen = {glyph.tobytes() for glyph in train[0]}
    assert not any(glyph.tobytes() in seen for glyph in test[0])
    assert set(train[1]) == set(test[1]) == set(range(10))


def test_boxes_hold_the_shape_of_the_colour_asked_for():
    rows = shapes(3)
    for _ in range(32):
        row = next(rows)
        x1, y1, x2, y2 = (int(v) for v in BOX.fullmatch(row["solution"]).groups())
        assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
        assert not any(v % GRID for v in (x1, y1, x2, y2))
        assert row["colour"] in row["problem"]
        # Shades vary by 20 and the noise has a deviation of 6, so the shape's pixels are within 60
        # of their colour, and there are none outside of the box.
        away = np.abs(np.asarray(row["image"], int) - COLOURS[row["colour"]]).max(-1) > 60
        ys, xs = np.nonzero(~away)
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / SHAPES_SIZE * 1000
        assert np.abs(found - (x1, y1, x2, y2)).max() <= 40


def test_digits_are_asked_for_by_the_word():
    rows = digits(3, digit_glyphs()["test"])
    words = {re.fullmatch("<answer>(.*)</answer>", next(rows)["solution"])[1] for _ in range(100)}
    assert words == set(WORDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(built, name, tmp_path):
    again = build_demo(name, tmp_path / "again", num_train=8, num_test=4)
    other = build_demo(name, tmp_path / "other", num_train=8, num_test=4, seed=1)
    first = built[name]["train"].select(range(8))
    assert pixels(again["train"]) == pixels(first)
    assert again["train"]["solution"] == first["solution"]
    assert not set(pixels(other["train"])) & set(pixels(built[name]["train"]))


def test_an_unknown_demo_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="shapes_detection, digits_classification.*'shape'"):
        build_demo("shape", tmp_path / "x")


def test_the_cache_is_built_once_and_loaded_after(tmp_path, monkeypatch):
    monkeypatch.setenv("VIRFT_FAST_CACHE", str(tmp_path))
    first = demo_dataset("digits_classification", num_train=6, num_test=3)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    second = demo_dataset("digits_classification", num_train=6, num_test=3)
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert first["test"]["solution"] == second["test"]["solution"]
    demo_dataset("digits_classification", num_train=7, num_test=3)
    assert len(list(tmp_path.iterdir())) == 2  # other sizes, other folder; nothing left aside


def test_two_that_race_for_the_cache_both_get_the_data(tmp_path):
    def get(_):
        return demo_dataset("digits_classification", tmp_path, num_train=20, num_test=4)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(get, range(2))
    assert pixels(one["train"]) == pixels(two["train"])
    assert len(list(tmp_path.iterdir())) == 1


def test_making_2500_examples_takes_seconds():
    start = time.process_time()
    rows = shapes(5)
    for _ in range(256):
        next(rows)
    # A tenth of the default sizes; about 0.4 s here.
    assert time.process_time() - start < 3


def test_demo_needs_no_transformers():
    code = "import sys, virft_fast.data.demo; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
