"""Stored files hold these digests: another value would discard people's answers and results."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from virft_fast.algorithms.dpo import pair_digest
from virft_fast.batch import Sample
from virft_fast.config import EvalConfig
from virft_fast.digests import digest_of, file_stamp, image_digest, json_digest
from virft_fast.evaluate import output_path
from virft_fast.evaluation import files, run, sources
from virft_fast.mia.scenes import ScenePlan, SceneRow, Scenes


def striped(step: int) -> Image.Image:
    pixels = (np.arange(8 * 12 * 3) * step % 251).astype(np.uint8)
    return Image.fromarray(pixels.reshape(8, 12, 3))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with one file of known size and time; digests see relative paths."""
    monkeypatch.chdir(tmp_path)
    Path("one.png").write_bytes(b"not decoded")
    os.utime("one.png", ns=(10**18, 10**18 + 7))
    return tmp_path


def test_stored_images_by_bytes_path_and_list(folder):
    import datasets

    rows = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": b"\x89PNG one", "path": None},
                {"bytes": None, "path": "one.png"},
                {"bytes": None, "path": "no such.png"},
                None,
            ],
            "images": [["one.png", "absent.png"], [], None, ["one.png"]],
            "problem": ["a", "b", "c", "d"],
        }
    )
    stamp = sources.content_stamp(rows, ["images", "image", "other"])
    assert stamp == "265c3ca83811ce2f81735ef228aac93a9d572ecd89159769135c1debdacd0df9"
    # Without such a column, it is the SHA-256 of nothing.
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sources.content_stamp(rows, ["other"]) == empty == digest_of([])


def test_files_by_path_size_and_time(folder):
    assert file_stamp("one.png") == ["one.png", 11, 10**18 + 7]
    assert file_stamp("absent.png") == ["absent.png"] and file_stamp("\0") == ["\0"]


def test_values(folder):
    assert json_digest([{"a": [1, 2.5, None, "é"]}, ["x"]]) == "1d671cf13abe9f42"
    images = SimpleNamespace(
        digest="ab" * 32,
        paths={4: Path("one.png"), 9: Path("absent.png")},
        categories={1: "x", 7: "y"},
    )
    assert json_digest(sources.images_stamp(images)) == "7ff09afd78ac7070"
    Path("r.py").write_text("def f(): pass\n")
    assert run._reward_stamp(["format", "r.py:f"]) == "82ed67c4f2375734"
    places = files.of_models(Path("x.jsonl"), ["a/b", "a-b"])
    assert [path.name for path in places] == ["x.a-b-c14cdd.jsonl", "x.a-b-d44362.jsonl"]
    config = EvalConfig(dataset_name="org/data", split="train", model_name_or_path="tiny")
    assert output_path(config).name == "eval_tiny_data_train_4b49fe.jsonl"


def test_decoded_images():
    assert image_digest(striped(1)) == "43c0e84a7f28ea964ec6dd3eb06fdb49635aa8c1"
    assert image_digest(striped(3)) == "e3edb4092ea047d5ad909cc7caf8d1c5f2e1cef4"


def test_pairs_of_dpo():
    def pair(messages, images, chosen, rejected):
        answers = {"chosen": chosen, "rejected": rejected}
        return pair_digest(Sample(0, ({"role": "user", "content": messages},), images, "", answers))

    # A lone surrogate, as a broken \ud83d in JSON gives, has no UTF-8 form.
    parts = [{"type": "image"}, {"type": "text", "text": "Où est le chat?\ud800"}]
    digest = pair(parts, (striped(1), striped(3)), "Here.", "There.")
    assert digest == "41347e9339b7c6a715b92f1888a029b549203261"
    assert pair("Why?", (), "A", "B") == "f71f21cf813330c1c0ade2576bb8911c68d26c81"


def test_scenes_and_their_split():
    scenes = object.__new__(Scenes)
    scenes.seed, scenes.test_share = 4, 0.3
    rows = [SceneRow(image_digest(striped(n + 1)), "What is it?", "A Plan(x) é.") for n in range(9)]
    scenes._row = rows.__getitem__
    plan = ScenePlan(2, "collage", (5, 2), 1, "In Image2,")
    assert scenes.digest(plan) == "e530ef7cace6fb8b"
    assert [n for n in range(9) if scenes.held_out(n)] == [5, 6, 8]


@pytest.mark.parametrize(
    ("box_space", "digest"),
    [
        ("auto", "4fe921dfbff4e848"),
        ("thousandths", "4fe921dfbff4e848"),
        ("pixels", "df81c5655f318e6c"),
    ],
)
def test_questions_of_a_data_set(folder, box_space, digest):
    import datasets

    rows = [
        {
            "image": {"bytes": bytes([number]) * 9, "path": None},
            "problem": "Where is the cat?",
            "solution": "<answer>[{'Position': [1, 2, 30, 40], 'Confidence': 1}]</answer>",
            "conversations": [{"from": "human", "value": "<img>one.png</img> and text"}],
        }
        for number in range(2)
    ]
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    config = EvalConfig(
        dataset_name="rows.parquet", split="train", task="detection", box_space=box_space
    )
    assert sources.of_dataset(config).digest == digest
