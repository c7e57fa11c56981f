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
    assert "not a class with a box or a polygon: 3" in said and "a.txt, line 1" in said
    assert "a category that isn't listed" in said and "image can't be read: 1" in said


@pytest.mark.parametrize(
    "settings, said",
    [({"names": None}, "expected names of"), ({"train": "no"}, "train: expected a folder")],
)
def test_a_yolo_folder_that_cant_be_used(yolo, tmp_path, capsys, settings, said):
    change(yolo, **settings)
    assert build("yolo", yolo, tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert build("yolo", tmp_path / "nothing", tmp_path / "out") == 2


def test_yolo_labels_with_a_mark_or_commas(yolo, tmp_path, capsys):
    (yolo / "labels/train/a.txt").write_text("\ufeff0 .5 .5 .5 .5\n", encoding="utf-8")
    (yolo / "labels/train/b.txt").write_text("0,.5,.5,.5,.5\n\n0 .5 .5 1 1\n")
    assert build("yolo", yolo, tmp_path / "out") == 0
    assert [name for name, _ in rows(tmp_path / "out")] == ["box", "box"]
    said = capsys.readouterr().out
    assert "not a class with a box or a polygon: 1" in said and "b.txt, line 1" in said


def test_yolo_names_are_texts(yolo, tmp_path):
    text = "train: images/train\nval: null\ntest:\nkpt_shape: null\nnames: [{}]\n"
    for names in (["yes", "1.0"], ["null", "0x1F"]):
        (yolo / "data.yaml").write_text(text.format(", ".join(names)))
        assert build("yolo", yolo, tmp_path / "out", "--overwrite") == 0
        assert {name for name, _ in rows(tmp_path / "out")} == set(names)


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


def test_voc_names(voc, tmp_path, capsys):
    """A stem with spaces, sets with flags, a file name without a suffix, a path of Windows."""
    for old, new in (("000001", "my cat 1"), ("000002", "my dog"), ("000003", "other")):
        (voc / f"JPEGImages/{old}.jpg").rename(voc / f"JPEGImages/{new}.JPG")
        text = (voc / f"Annotations/{old}.xml").read_text()
        named = {"000001": "<filename>my cat 1</filename>",
                 "000002": "<filename>C:\\data\\my dog.JPG</filename>",
                 "000003": "<path>C:\\data\\other.JPG</path>"}[old]  # fmt: skip
        text = text.replace(f"<filename>{old}.jpg</filename>", named)
        (voc / f"Annotations/{new}.xml").write_text(text)
    (voc / "ImageSets/Main/train.txt").write_text("my cat 1\nmy dog  1\n")
    (voc / "ImageSets/Main/val.txt").write_text("other\n")
    assert build("voc", voc, tmp_path / "out") == 0
    assert len(rows(tmp_path / "out")) == 3 and len(rows(tmp_path / "out", "validation")) == 1
    assert "of another image" not in capsys.readouterr().out


def test_a_voc_annotation_never_takes_anothers_image(voc, tmp_path, capsys):
    """000001.xml names 000002.jpg, and its own image has another suffix."""
    (voc / "JPEGImages/000001.jpg").rename(voc / "JPEGImages/000001.png")
    file = voc / "Annotations/000001.xml"
    file.write_text(file.read_text().replace("000001.jpg", "000002.jpg"))
    assert build("voc", voc, tmp_path / "out") == 0
    taken = [row for path in (tmp_path / "out").rglob("train-*.parquet")
             for row in pq.read_table(path).to_pylist()]  # fmt: skip
    assert {(row["category"], row["image"]["path"]) for row in taken} == {
        ("dog", "000001.png"), ("cat", "000001.png"), ("cat", "000002.jpg")}  # fmt: skip
    assert "filename of another image" in capsys.readouterr().out


@pytest.mark.parametrize("name, split", [("valid", "validation"), ("minival", None)])
def test_sets_of_voc_by_other_names(voc, tmp_path, capsys, name, split):
    (voc / "ImageSets/Main/val.txt").rename(voc / f"ImageSets/Main/{name}.txt")
    assert build("voc", voc, tmp_path / "out") == 0
    assert len(rows(tmp_path / "out", "validation")) == (split is not None)
    assert ("in none of the sets: 1" in capsys.readouterr().out) == (split is None)


def test_voc_files_with_entities_are_not_expanded(voc, tmp_path, capsys):
    bomb = '<!DOCTYPE a [<!ENTITY a "aaaa">]>' + VOC.format(name="&a;", objects="")
    (voc / "Annotations/000002.xml").write_text(bomb)
    (voc / "ImageSets/Main/train.txt").write_text("000001\n000002\n000009\n")
    assert build("voc", voc, tmp_path / "out") == 0
    assert len(rows(tmp_path / "out")) == 2
    assert "missing or not plain XML: 2" in capsys.readouterr().out


def test_voc_without_sets_is_all_train(voc, tmp_path):
    for path in (voc / "ImageSets/Main").iterdir():
        path.unlink()
    assert build("voc", voc, tmp_path / "out", "--categories", "dog") == 0
    assert len(rows(tmp_path / "out")) == 2


BOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,"
    "IsDepiction,IsInside"
)
LABEL_HEADER = "ImageID,Source,LabelName,Confidence"


def box_line(image, label, left, right, top, bottom, group=0):
    return f"{image},xclick,{label},1,{left},{right},{top},{bottom},0,0,{group},0,0"


@pytest.fixture
def openimages(tmp_path):
    """Two images of train, of which one is there, and one of validation; its labels are in V7's
    form. -1 is what Open Images writes for unknown."""
    root = tmp_path / "openimages"
    save(tmp_path / "images/train/0a.jpg")
    save(tmp_path / "images/train/0b.jpg")
    save(tmp_path / "images/validation/0d.jpg")
    root.mkdir()
    write_lines(root / "class-descriptions-boxable.csv",
                '/m/cat,Cat', '/m/dog,"Dog, tame"', "/m/car,Car")  # fmt: skip
    write_lines(
        root / "oidv6-train-annotations-bbox.csv",
        BOX_HEADER + ",XClick1X",
        *(
            line + ",0.5"
            for line in (
                box_line("0a", "/m/cat", 0.1, 0.5, 0.2, 0.8, -1),
                box_line("0a", "/m/cat", "0.5", "1.000000", 0, 0.5),
                box_line("0a", "/m/dog", 0, 1, 0, 1, group=1),
                box_line("0b", "/m/dog", 0, 0.25, 0, 0.25),
                box_line("0c", "/m/cat", 0, 1, 0, 1),
            )
        ),
    )
    write_lines(root / "validation-annotations-bbox.csv", BOX_HEADER,
                box_line("0d", "/m/dog", 0, 0.5, 0, 1))  # fmt: skip
    write_lines(
        root / "oidv7-train-annotations-human-imagelabels.csv",
        LABEL_HEADER,
        "0a,verification,/m/car,0", "0a,verification,/m/cat,1", "0a,verification,/m/dog,0",
        "0b,crowdsource-verification,/m/cat,0.0", "0c,verification,/m/dog,0",
        "0b,verification,/m/other,0",
    )  # fmt: skip
    return root


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n")


def build_openimages(root, *more):
    images = ("--images", str(root.parent / "images"))
    return build("openimages", root, root.parent / "out", *images, *more)


CATS = solution([100, 200, 500, 800], [500, 0, 1000, 500])


def test_openimages(openimages, capsys):
    assert build_openimages(openimages) == 0
    out = openimages.parent / "out"
    assert rows(out) == [("Cat", CATS), ("Dog, tame", solution([0, 0, 250, 250]))]
    assert rows(out, "validation") == [("Dog, tame", solution([0, 0, 500, 1000]))]
    shown = capsys.readouterr().out
    assert "group of objects, ignored as a crowd: 1 (0a /m/dog)" in shown
    assert "bbox.csv: 1 boxes are of images that aren't there" in shown


def test_in_openimages_only_what_was_looked_for_is_absent(openimages, capsys):
    """Car has no box; the dogs of 0a are a group."""
    assert build_openimages(openimages, "--negatives", "0.9") == 0
    nothing = "<answer>No Objects</answer>"
    found = rows(openimages.parent / "out")
    assert [row for row in found if row[1] == nothing] == [("Cat", nothing)]
    assert (
        "1 rows without objects, not 2: no more are known to have none" in capsys.readouterr().out
    )


def test_openimages_of_one_split(openimages, capsys):
    """Classes by the list with a header, images in one folder."""
    (openimages / "class-descriptions-boxable.csv").unlink()
    write_lines(openimages / "oidv7-class-descriptions.csv", "LabelName,DisplayName", "/m/dog,Dog")
    for path in (openimages.parent / "images").rglob("0[ab].jpg"):
        path.unlink()
    assert build_openimages(openimages) == 0
    out = openimages.parent / "out"
    assert rows(out, "validation") == [("Dog", solution([0, 0, 500, 1000]))] and not rows(out)
    assert "train-annotations-bbox.csv: none of its images is in" in capsys.readouterr().out


def test_odd_lines_of_openimages_are_left_out_and_named(openimages, capsys):
    with open(openimages / "oidv6-train-annotations-bbox.csv", "a") as file:
        for line in (box_line("0a", "/m/none", 0, 1, 0, 1) + ",", "0a,xclick",
                     box_line("0a", "/m/cat", "left", 1, 0, 1) + ",",
                     box_line("0a", "/m/cat", 0.5, 0.5, 0, 1) + ","):  # fmt: skip
            file.write(line + "\n")
    save(openimages.parent / "images/again/0b.jpg")
    assert build_openimages(openimages) == 0
    assert rows(openimages.parent / "out") == [("Cat", CATS)]
    shown = capsys.readouterr().out
    for said in ("line with more or fewer cells than the header: 1 (oidv6-train-annotations-bbox",
                 "annotation of a category that isn't listed or used: 1 (annotation 7 ",
                 "annotation without four finite numbers as bbox: 1 (",
                 "box without area inside its image: 1 (",
                 "image whose path fits several files"):  # fmt: skip
        assert f"left out, {said}" in shown


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda root: (root / "class-descriptions-boxable.csv").unlink(),
         "expected one file ...class-descriptions-boxable.csv, got none"),
        (lambda root: write_lines(root / "train-annotations-bbox.csv", BOX_HEADER),
         "expected one file of boxes of train, got oidv6-train-annotations-bbox.csv, "),
        (lambda root: [path.unlink() for path in root.glob("*bbox*")],
         "expected a file ...-annotations-bbox.csv, got none"),
        (lambda root: write_lines(root / "validation-annotations-bbox.csv", "ImageID,XMin"),
         "XMax, YMax, LabelName isn't there"),
        (lambda root: [path.unlink() for path in root.parent.rglob("*.jpg")],
         "expected images such as 000002b66c9c498e.jpg"),
    ],
    ids=["names", "two files", "no boxes", "columns", "no images"],
)  # fmt: skip
def test_openimages_that_cant_be_used(openimages, capsys, change, said):
    change(openimages)
    assert build_openimages(openimages) == 2
    assert said in capsys.readouterr().err


def test_what_is_held_out_is_of_train_alone(yolo, tmp_path):
    """The split validation has images of its own, and keeps them."""
    assert build("yolo", yolo, tmp_path / "out", "--test_share", "0.3") == 0
    out = tmp_path / "out"
    assert len(rows(out)) + len(rows(out, "test")) == 3 and len(rows(out, "test")) > 0
    assert rows(out, "validation") == [("box", solution([0, 0, 500, 500]))]
