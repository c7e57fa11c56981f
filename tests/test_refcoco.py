"""RefCOCO in its official layout, and what a hostile pickle in its place can't do."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from tests.test_build import run, samples, save_image
from virft_fast.data import refcoco
from virft_fast.tasks.prompts import grounding_problem

NAME = "COCO_train2014_{:012d}.jpg"


def reference(number, image=7, ann=71, split="train", sentences=("the red one", "left")):
    """As REFER's: the file name has the annotation's id, which no image's name has."""
    return {
        "sent_ids": [0, 1], "file_name": f"{NAME[:-4].format(image)}_{ann}.jpg",
        "ann_id": ann, "ref_id": number, "image_id": image, "split": split, "category_id": 18,
        "sentences": [
            {"tokens": text.split(), "raw": f"{text.title()}.", "sent_id": place, "sent": text}
            for place, text in enumerate(sentences)
        ],
    }  # fmt: skip


REFERENCES = [
    reference(0),
    reference(1, ann=72, sentences=["the  big\none"]),
    reference(2, 8, 81, "val"),
    reference(3, 9, 91, "testA", ["café"]),
    reference(4, 9, 91, "testB"),
]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "refcoco"
    for number in (7, 8, 9):
        save_image(tmp_path / "images" / NAME.format(number), 200, 100)
    marks = [(71, 7, [20, 10, 100, 50]), (72, 7, [0, 0, 200, 100]), (81, 8, [0, 50, 50, 50]),
             (91, 9, [-4, 90, 60, 50]), (73, 7, [0, 0, 9, 9])]  # fmt: skip
    data = {
        "images": [{"id": n, "file_name": NAME.format(n), "width": 200, "height": 100}
                   for n in (7, 8, 9)],
        "annotations": [{"id": n, "image_id": image, "category_id": 18, "bbox": box, "iscrowd": 0}
                        for n, image, box in marks],
        "categories": [{"id": 18, "name": "dog"}],
    }  # fmt: skip
    root.mkdir()
    (root / "instances.json").write_text(json.dumps(data))
    write(root, REFERENCES)
    return root


def write(root, references, protocol=2, name="refs(unc).p"):
    (root / name).write_bytes(pickle.dumps(references, protocol))


def build(root, *more, source=None):
    return run("build", "refcoco", "--source", source or root, "--images", root.parent / "images",
               "--output", root.parent / "out", *more)  # fmt: skip


def rows(root, split="train"):
    return sorted(
        (row.columns["image_id"], row.columns["problem"], row.solution)
        for row in samples(root.parent / "out", split)
    )


TRAIN = sorted([
    (7, grounding_problem("the red one"), "<answer> (100,100),(600,600) </answer>"),
    (7, grounding_problem("left"), "<answer> (100,100),(600,600) </answer>"),
    (7, grounding_problem("the big one"), "<answer> (0,0),(1000,1000) </answer>"),
])  # fmt: skip


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_row_for_each_sentence(folder, protocol):
    write(folder, REFERENCES, protocol)
    assert build(folder) == 0
    assert rows(folder) == TRAIN
    assert [solution for *_, solution in rows(folder, "validation")] == [
        "<answer> (0,500),(250,1000) </answer>"
    ] * 2
    cut = "<answer> (0,900),(280,1000) </answer>"
    assert rows(folder, "testA") == [(9, grounding_problem("café"), cut)]
    assert len(rows(folder, "testB")) == 2


def test_what_python_2_wrote(folder, capsys):
    """Texts of bytes in both forms, long integers, and `sent` of Unicode."""
    text = (
        b"(lp0\n(dp1\nS'ann_id'\np2\nL71L\nsS'image_id'\nI7\nsS'split'\np3\nS'train'\np4\n"
        b"sS'sentences'\n(lp5\n(dp6\nS'sent'\np7\nV\\u732b\np8\nsa(dp9\ng7\nS'caf\\xe9'\nsa"
        b"(dp10\nS'raw'\nU\x05caf\xc3\xa9sasa."
    )
    (folder / "refs(unc).p").write_bytes(text)
    assert build(folder) == 0
    asked = {problem for _, problem, _ in rows(folder)}
    assert asked == {grounding_problem("猫"), grounding_problem("café")}


def test_json_in_the_place_of_the_pickle(folder, capsys):
    (folder / "refs(google).json").write_text(json.dumps(REFERENCES))
    assert build(folder) == 2
    assert "got refs(google).json, refs(unc).p; name the file" in capsys.readouterr().err
    assert build(folder, source=folder / "refs(google).json") == 0
    assert rows(folder) == TRAIN


def test_pictures_of_coco_2017(folder, capsys):
    for path in (folder.parent / "images").iterdir():
        path.rename(path.with_name(path.name.removeprefix("COCO_train2014_")))
    assert build(folder) == 0
    assert rows(folder) == TRAIN
    assert "converted, image found by its name in COCO 2017: 3 (" in capsys.readouterr().out


@pytest.mark.parametrize(
    "odd, reason",
    [
        (reference(9, split="testC"), "reference in none of the splits"),
        (reference(9) | {"split": ["train"]}, "reference in none of the splits"),
        (reference(9, ann=5), "reference that matches no box, or several"),
        (reference(9) | {"ann_id": None}, "reference that matches no box, or several"),
        (reference(9, image=8), "reference to a box in another image"),
        (reference(9, sentences=[" "]), "reference without a sentence"),
        (reference(9) | {"sentences": "left"}, "reference without a sentence"),
        (["left"], "reference that is not an object"),
    ],
)
def test_an_odd_reference_is_left_out_and_named(folder, capsys, odd, reason):
    write(folder, [*REFERENCES, odd])
    assert build(folder) == 0
    assert rows(folder) == TRAIN
    assert f"left out, {reason}" in capsys.readouterr().out


def test_images_are_of_the_size_that_boxes_are_meant_for(folder, capsys):
    save_image(folder.parent / "images" / NAME.format(8), 100, 50)
    write(folder, [*REFERENCES, reference(5, 7, 71, "val")])
    assert build(folder) == 0
    assert len(rows(folder, "validation")) == 2
    shown = capsys.readouterr().out
    assert "image of another size than its annotations say: 2 (" in shown
    assert "1 images of validation are in train as well" in shown


def test_so_many_rows_whose_images_are_there(folder):
    (folder.parent / "images" / NAME.format(7)).unlink()
    write(folder, [*REFERENCES, reference(5, 9, 91)])
    assert build(folder) == 2
    assert build(folder, "--max_rows", "2", "--allow_missing") == 0
    assert [image for image, *_ in rows(folder)] == [9, 9]


# --- Pickles ---------------------------------------------------------------------------------


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def nested(levels):
    """A list of two references to a list of two references ..., 2**levels in all."""
    return b"]" + b"q\x00h\x00h\x00\x86" * levels + b"."


@pytest.mark.parametrize(
    "data",
    [
        *(pickle.dumps([Runs()], protocol) for protocol in (0, 2, 4)),
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"(S'touch ran'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch ran'\no.",
        b"\x82\x01.", b"Pname\n.", b"(]Q.",  # an extension, persistent names
        pickle.dumps([OrderedDict()]), pickle.dumps([np.float64(1)]), pickle.dumps([{1, 2}]),
        nested(3000), b"]q\x00h\x00a.",  # itself
        b"}(]q\x00" + b"h\x00\x86q\x00" * 3000 + b"K\x01u.",  # a key
        b"}]\x85K\x01s.",
        b"Nr\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f",
        b"h\x05.", b"2.", b"a.", b"I" + b"9" * 9999 + b"\n.", b"S'\n.", b"", b"[1, 2]",
        pickle.dumps([1])[:-1],
    ],
)  # fmt: skip
def test_a_pickle_of_anything_else_is_refused(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    Path("refs.p").write_bytes(data)
    with pytest.raises(ValueError, match="expected a pickle of lists, dicts, texts and numbers"):
        refcoco._unpickled(Path("refs.p"))
    assert os.listdir() == ["refs.p"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_loaded_as_they_are(tmp_path, protocol):
    values = [None, True, False, 0, -1, 255, 65536, 2**40, -(2**70), 0.5, "", "é\n猫" * 90, [],
              {}, {"a": {"b": [1]}}, [[["a"]]], "x" * 70000]  # fmt: skip
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(values, protocol))
    assert refcoco._unpickled(path) == values
    path.write_bytes(pickle.dumps([(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], protocol))
    assert refcoco._unpickled(path) == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_a_pickle_nested_without_end_is_data(folder, capsys):
    deep = b"]" * 200_000 + b"a" * 199_999
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFERENCES, 0)[:-1] + deep + b"a.")
    assert build(folder) == 0
    assert "left out, reference that is not an object: 1 (refs(unc).p)" in capsys.readouterr().out


def test_a_pickle_past_the_limit_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(refcoco, "MAX_BYTES", 1000)
    assert build(folder) == 2
    assert "bytes, more than 1000" in capsys.readouterr().err
