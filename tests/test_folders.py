"""Detection data in other layouts than COCO's, and what can be wrong in their folders."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from virft_fast.data.__main__ import main


def save(path, size=(200, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def build(kind, source, out, *more):
    return main(["build", kind, "--source", str(source), "--output", str(out), *more])


def rows(out, split="train"):
    """category, image size and solution of each row."""
    found = [row for path in sorted(out.rglob(f"{split}-*.parquet"))
             for row in pq.read_table(path).to_pylist()]  # fmt: skip
    return sorted((row["category"], row["solution"]) for row in found)


def solution(*boxes):
    return f"<answer>{[{'Position': list(box), 'Confidence': 1} for box in boxes]}</answer>"


@pytest.fixture
def yolo(tmp_path):
    """As Ultralytics describes it: 200x100 pixels, a box of a quarter and a triangle."""
    root = tmp_path / "shapes"
    for split, name in (("train", "a"), ("train", "b"), ("train", "none"), ("val", "c")):
        save(root / "images" / split / f"{name}.jpg")
    labels = {
        "train/a": "0 0.5 0.5 0.5 0.5\n1 0.1 0.2 0.1 0.2\n",
        "train/b": "1 .1 .1 .5 .1 .5 .9\n",
        "val/c": "0 0.25 0.25 0.5 0.5\n",
    }
    for name, text in labels.items():
        path = root / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    settings = {"path": ".", "train": "images/train", "val": "images/val",
                "names": {0: "box", 1: "triangle"}}  # fmt: skip
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    return root


def change(root, **settings):
    old = yaml.safe_load((root / "data.yaml").read_text())
    (root / "data.yaml").write_text(yaml.safe_dump(old | settings))


def test_yolo(yolo, tmp_path, capsys):
    assert build("yolo", yolo, tmp_path / "out") == 0
    assert rows(tmp_path / "out") == [
        ("box", solution([250, 250, 750, 750])),
        ("triangle", solution([100, 100, 500, 900])),
        ("triangle", solution([50, 100, 150, 300])),
    ]
    assert rows(tmp_path / "out", "validation") == [("box", solution([0, 0, 500, 500]))]
    assert "box drawn around its polygon: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [{"path": None, "train": "../images/train", "val": "../images/val"},  # Roboflow
     {"names": ["box", "triangle"], "train": ["images/train"], "path": "/not/there"},
     {"train": "train.txt"}],
    ids=["above", "lists", "a list of files"],
)  # fmt: skip
def test_yolo_paths(yolo, tmp_path, settings):
    (yolo / "train.txt").write_text("./images/train/a.jpg\nimages/train/b.jpg\n")
    change(yolo, **settings)
    assert build("yolo", yolo / "data.yaml", tmp_path / "out") == 0
    assert len(rows(tmp_path / "out")) == 3


def test_odd_labels_are_left_out_and_named(yolo, tmp_path, capsys):
    bad = "0 0.5 0.5 0.5\n0 nan 0.5 0.5 0.5\nbox 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.5 0.5\n\n"
    path = yolo / "labels/train/a.txt"
    path.write_text(bad + path.read_text())
    (yolo / "images/train/b.jpg").write_bytes(b"no image")
    assert build("yolo", yolo, tmp_path / "out") == 0
    assert [category for category, _ in rows(tmp_path / "out")] == ["box", "triangle"]
    said = capsys.readouterr().out
    assert "no class with a box or a polygon: 3" in said and "a.txt, line 1" in said
    assert "a category that isn't listed" in said and "without a size" in said


@pytest.mark.parametrize(
    "settings, said",
    [({"names": None}, "expected names of"), ({"train": "no"}, "expected images where")],
)
def test_a_yolo_folder_that_cant_be_used(yolo, tmp_path, capsys, settings, said):
    change(yolo, **settings)
    assert build("yolo", yolo, tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert build("yolo", tmp_path / "nothing", tmp_path / "out") == 2


VOC = """<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>
<size><width>200</width><height>100</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{0}</name><difficult>{1}</difficult><bndbox><xmin>{2}</xmin>
<ymin>{3}</ymin><xmax>{4}</xmax><ymax>{5}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit/VOC2007, pixels counted from 1."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets/Main").mkdir(parents=True)
    objects = {
        "000001": OBJECT.format("dog", 0, 1, 1, 100, 50)
        + OBJECT.format("cat", 0, 101, 51, 200, 100),
        "000002": OBJECT.format("dog", 1, 1, 1, 20, 10) + OBJECT.format("cat", 0, 1, 1, 20, 10),
        "000003": OBJECT.format("dog", 0, 1, 1, 200, 100),
    }
    for name, parts in objects.items():
        save(root / "JPEGImages" / f"{name}.jpg")
        text = VOC.format(name=name, objects=parts)
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets/Main/train.txt").write_text("000001\n000002\n")
    (root / "ImageSets/Main/val.txt").write_text("000003\n")
    return root


def test_voc(voc, tmp_path, capsys):
    assert build("voc", voc.parent, tmp_path / "out") == 0
    assert rows(tmp_path / "out") == [
        ("cat", solution([0, 0, 100, 100])),
        ("cat", solution([500, 500, 1000, 1000])),
        ("dog", solution([0, 0, 500, 500])),
    ]
    assert rows(tmp_path / "out", "validation") == [("dog", solution([0, 0, 1000, 1000]))]
    assert "difficult object, ignored as a crowd: 1" in capsys.readouterr().out


def test_voc_files_with_entities_are_not_expanded(voc, tmp_path, capsys):
    bomb = '<!DOCTYPE a [<!ENTITY a "aaaa">]>' + VOC.format(name="&a;", objects="")
    (voc / "Annotations/000002.xml").write_text(bomb)
    (voc / "ImageSets/Main/train.txt").write_text("000001\n000002\n000009\n")
    assert build("voc", voc, tmp_path / "out") == 0
    assert len(rows(tmp_path / "out")) == 2
    assert "missing or no plain XML: 2" in capsys.readouterr().out


def test_voc_without_sets_is_all_train(voc, tmp_path):
    for path in (voc / "ImageSets/Main").iterdir():
        path.unlink()
    assert build("voc", voc, tmp_path / "out", "--categories", "dog") == 0
    assert len(rows(tmp_path / "out")) == 2
