"""What `data build` does with files as people have them: odd records, paths and folders."""

from __future__ import annotations

import gzip
import json
import unicodedata

import pytest
from PIL import Image, ImageOps

from tests.test_build import run, samples, save_image
from virft_fast.data.image_files import ImageFiles
from virft_fast.data.instances import key_of, read_annotations
from virft_fast.tasks import parse_detection
from virft_fast.tasks.coordinates import rescale

NAN = float("nan")


def picture(number, file, width=60, height=40, **more):
    return {"id": number, "file_name": file, "width": width, "height": height, **more}


def mark(image, bbox=(6, 4, 30, 20), category=1, **more):
    return {"id": 1, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


class Instances:
    """An instances file and its images, which are there unless `files` says which ones are."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "instances.json"

    def write(self, images, annotations, categories=({"id": 1, "name": "cat"},), files=None):
        for file in [image["file_name"] for image in images] if files is None else files:
            save_image(self.folder / "images" / file)
        data = {"images": images, "annotations": annotations, "categories": list(categories)}
        self.path.write_text(json.dumps(data))
        return self

    def read(self, kind="coco"):
        return read_annotations(self.path, kind, self.folder / "images")

    def build(self, *more):
        argv = ("--annotations", self.path, "--images", self.folder / "images")
        return run("build", "coco", *argv, "--output", self.folder / "out", *more)

    def rows(self, split="train"):
        return {
            (row.columns["image_id"], row.columns["category"]): row.solution
            for row in samples(self.folder / "out", split)
        }


@pytest.fixture
def instances(tmp_path):
    return Instances(tmp_path)


# --- Records ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd, reason",
    [
        (mark(7), "annotation of an image that isn't listed or used"),
        (mark(1, category=7), "annotation of a category that isn't listed or used"),
        (mark(True), "annotation of an image that isn't listed or used"),
        (mark(1, [1, 2, 3]), "annotation without four finite numbers as bbox"),
        (mark(1, [1, 2, NAN, 3]), "annotation without four finite numbers as bbox"),
        (mark(1, [1, 2, "wide", 3]), "annotation without four finite numbers as bbox"),
        ({"id": 1, "image_id": 1, "category_id": 1}, "annotation without four finite numbers"),
        (mark(1, [5, 5, 0, 9]), "box without area inside its image"),
        (mark(1, [5, 5, -3, 9]), "box without area inside its image"),
        (mark(1, [99, 5, 3, 9]), "box without area inside its image"),
        (mark(1, iscrowd="maybe"), "annotation whose iscrowd is neither 0 nor 1"),
        ("text", "annotation that is not an object"),
    ],
    ids=str,
)
def test_an_odd_annotation_is_left_out_and_named(instances, capsys, odd, reason):
    assert instances.write([picture(1, "a.png")], [mark(1), odd]).build() == 0
    assert instances.rows() == {
        (1, "cat"): "<answer>[{'Position': [100, 100, 600, 600], 'Confidence': 1}]</answer>"
    }
    shown = capsys.readouterr().out
    assert f"left out, {reason}" in shown and "kept 1 images, 1 boxes of 1 categories" in shown


@pytest.mark.parametrize(
    "odd, reason",
    [
        ({"file_name": "b.png", "width": 60, "height": 40}, "image without an id or file name"),
        (picture(2, ""), "image without an id or file name"),
        (picture(2.5, "b.png"), "image without an id or file name"),
        (picture(2, "none.png", -1, -1), "image without a size, in the annotations and on disk"),
        (picture(1, "b.png"), "image id of several images"),
        ([], "image without an id or file name"),
    ],
    ids=str,
)
def test_an_odd_image_is_left_out_and_named(instances, capsys, odd, reason):
    images = [picture(1, "a.png"), picture(3, "c.png"), odd]
    marks = [mark(1), mark(2), mark(3)]
    assert instances.write(images, marks, files=["a.png", "b.png", "c.png"]).build() == 0
    kept = {3} if reason.endswith("several images") else {1, 3}
    assert {image for image, _ in instances.rows()} == kept
    assert f"left out, {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "odd",
    [{"name": "dog"}, {"id": 2}, {"id": 2, "name": " "}, {"id": 2, "name": "\ud800"}, 3,
     {"id": 2, "name": ["dog"]}],
    ids=str,
)  # fmt: skip
def test_an_odd_category_is_left_out_and_named(instances, capsys, odd):
    instances.write(
        [picture(1, "a.png")], [mark(1), mark(1, category=2)], [{"id": 1, "name": "cat"}, odd]
    )
    assert instances.build() == 0
    assert set(instances.rows()) == {(1, "cat")}
    shown = capsys.readouterr().out
    assert "left out, category without an id or name: 1 (" in shown
    assert "left out, annotation of a category that isn't listed or used: 1 (" in shown


@pytest.mark.parametrize("size", [(-1, -1), (None, None), ("", 40), (0, 0), (NAN, 40), (60.5, 40)])
def test_a_missing_size_is_that_of_the_file(instances, capsys, size):
    assert instances.write([picture(1, "a.png", *size)], [mark(1)]).build() == 0
    assert "[100, 100, 600, 600]" in instances.rows()[1, "cat"]
    assert "converted, image whose size is read from its file: 1 (a.png)" in capsys.readouterr().out


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "shown"])
def test_boxes_lie_where_the_picture_is_shown(instances, tmp_path, frame, orientation):
    """Of a red corner. Sideways, COCO's size tells which frame boxes are in, otherwise nothing
    does; YOLO's are in the shown one, and Open Images' in the stored one."""
    picture_of = Image.new("RGB", (50, 30))
    picture_of.paste((255, 0, 0), (0, 0, 10, 6))
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = tmp_path / "images"
    folder.mkdir()
    picture_of.save(folder / "a.png", exif=exif)
    if frame == "shown":
        picture_of = ImageOps.exif_transpose(Image.open(folder / "a.png"))
    (x1, y1, x2, y2), (width, height) = picture_of.getbbox(), picture_of.size
    instances.write(
        [picture(1, "a.png", width, height)], [mark(1, (x1, y1, x2 - x1, y2 - y1))], files=()
    )
    built = instances.build()
    assert built == (0 if orientation == 1 or orientation > 4 else 2)
    if frame == "shown":
        middle = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
        write(tmp_path / "labels/a.txt", f"0 {middle[0]} {middle[1]} 0.2 0.2")
        write(tmp_path / "data.yaml", "train: images\nnames: [red]\n")
        source = ("yolo", "--source", tmp_path)
    else:
        sides = f"{x1 / width},{x2 / width},{y1 / height},{y2 / height}"
        header = "ImageID,LabelName,IsGroupOf,XMin,XMax,YMin,YMax"
        write(tmp_path / "csv/train-annotations-bbox.csv", f"{header}\na,/m/red,0,{sides}\n")
        write(tmp_path / "csv/class-descriptions-boxable.csv", "/m/red,red\n")
        source = ("openimages", "--source", tmp_path / "csv", "--images", folder)
    assert run("build", *source, "--output", tmp_path / "out2") == 0
    for out in [tmp_path / "out2"] + [tmp_path / "out"] * (built == 0):
        (row,) = samples(out)
        (box,) = parse_detection(row.solution).boxes
        assert rescale(box, (1000, 1000), row.images[0].size) == row.images[0].getbbox()


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_boxes_in_shares_are_no_pixels(instances, capsys):
    instances.write([picture(1, "a.png")], [mark(1, (0, 0.1, 0.5, 0.5)), mark(1, (0, 0, 1, 1))])
    assert instances.build() == 2
    assert "expected boxes in pixels, got 2 of 2 within 0..1" in capsys.readouterr().err
    shares = [(0, 0.1, 0.5, 0.5), (0.2, 0.2, 0.5, 0.7), (0.8, 0.1, 0.3, 0.5)]
    instances.write([picture(1, "a.png")], [mark(1, box) for box in shares])
    assert instances.build() == 2
    assert "got 2 of 3 within 0..1" in capsys.readouterr().err
    pixels = [(0, 0, 1, 1), (0, 0, 9, 9), (2, 2, 5, 5), (0, 0, 0, 0), (0, 0, 0, 0)]
    instances.write([picture(1, "a.png")], [mark(1, box) for box in pixels])
    assert instances.build() == 0


def test_a_picture_shown_turned_needs_a_size_to_place_boxes(instances, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    instances.write([picture(1, "a.png", 0, 0), picture(2, "b.jpg", 0, 0)], [mark(1), mark(2)])
    Image.new("RGB", (60, 40)).save(instances.folder / "images/b.jpg", exif=exif)
    assert instances.build() == 0
    assert set(instances.rows()) == {(1, "cat")}
    assert "rotated by EXIF data" in capsys.readouterr().out


@pytest.mark.parametrize("one", [1, 1.0, "1", " 1 ", "1.0"], ids=repr)
@pytest.mark.parametrize("other", [1, 1.0, "1"], ids=repr)
def test_ids_are_equal_however_they_are_written(instances, one, other):
    instances.write(
        [picture(one, "a.png")], [mark(other, category=one)], [{"id": other, "name": "cat"}]
    )
    found = instances.read()
    assert found.boxes == {(1, 1): [(6, 4, 36, 24)]}
    odd = any(not isinstance(number, int) for number in (one, other))
    assert any("id that is a text or has a decimal point" in n for n in found.account.notes) == odd


def test_what_is_an_id():
    assert key_of("000000000139") == key_of(139.0) == 139
    assert key_of("img_7") == "img_7" and key_of("12e4") == "12e4"
    for odd in (None, True, "", "  ", [], {}, 2.5, NAN, float("inf"), 2**63, 10**400):
        assert key_of(odd) is None


def test_ids_that_are_texts_get_numbers_of_their_own(instances):
    images = [picture("left", "a.png"), picture(4, "b.png"), picture("right", "c.png")]
    instances.write(images, [mark("right"), mark(4), mark("left", [0, 0, 60, 40])])
    found = instances.read()
    assert {number: record["file"] for number, record in found.images.items()} == {
        5: "a.png", 4: "b.png", 6: "c.png"
    }  # fmt: skip
    assert found.boxes[5, 1] == [(0, 0, 60, 40)]
    assert found.account.converted == {"image id that is a text, numbered": ["left 5", "right 6"]}


@pytest.mark.parametrize(
    "value, crowd", [(0, 0), ("0", 0), ("false", 0), (None, 0), (False, 0), (1, 1), ("1", 1),
                     ("True", 1), (True, 1)],
    ids=repr,
)  # fmt: skip
def test_crowds_by_any_name(instances, value, crowd):
    found = instances.write([picture(1, "a.png")], [mark(1), mark(1, iscrowd=value)]).read()
    assert [record["iscrowd"] for record in found.records] == [0, crowd]
    assert len(found.boxes[1, 1]) == 2 - crowd


def test_boxes_beyond_the_image_are_cut_and_counted(instances):
    found = instances.write(
        [picture(1, "a.png")], [mark(1, [-5, -5, 20, 20]), mark(1, [50, 30, 10.01, 10.01])]
    ).read()
    assert found.boxes[1, 1] == [(0, 0, 15, 15), (50, 30, 60, 40)]
    (cut,) = found.account.converted["box clipped to its image"]  # the other is rounding
    assert cut == "a.png: [-5.0, -5.0, 20.0, 20.0]"


def test_numbers_that_are_texts_and_boxes_that_are_polygons(instances):
    polygon = {"segmentation": [[10, 5, 20, 5, 20, 15], [2, 3, 4, 3, 4, 7]]}
    bare = {"image_id": 1, "category_id": 1} | polygon
    found = instances.write(
        [picture(1, "a.png")], [mark(1, ["6", "4", "30", "20.0"]), bare, bare | {"bbox": []}]
    ).read()
    assert found.boxes[1, 1] == [(6, 4, 36, 24), (2, 3, 20, 15), (2, 3, 20, 15)]
    assert {rule: len(items) for rule, items in found.account.converted.items()} == {
        "box whose numbers are texts": 1, "box drawn around its segmentation": 2
    }  # fmt: skip


@pytest.mark.parametrize("more", [{"keypoints": [], "num_keypoints": 0}, {"keypoints": [1, 2, 2]}])
def test_boxes_with_keypoints_are_boxes(instances, more):
    found = instances.write([picture(1, "a.png")], [mark(1, **more)]).read()
    assert len(found.boxes[1, 1]) == 1
    said = "the annotations hold keypoints; only their boxes are used" in found.account.notes
    assert said == bool(more["keypoints"])


def test_categories_of_one_name(instances, capsys):
    """A parent category without boxes is left out; two with boxes are one; a slip is said."""
    names = ["fish", "fish", "owl", "owl", "Cat", "cat "]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    marks = [mark(1, category=number) for number in (1, 2, 3, 4, 5)]
    assert instances.write([picture(1, "a.png")], marks, categories).build() == 0
    rows = instances.rows()
    assert set(rows) == {(1, name) for name in ("fish", "owl", "Cat", "cat ")}
    assert rows[1, "owl"].count("Position") == 2
    shown = capsys.readouterr().out
    assert "left out, category without boxes, named like another: 1 (fish 0)" in shown
    assert "converted, categories with one name, merged: 1 (owl 3)" in shown
    assert "differ in case or spaces only, used as they are: 'Cat', 'cat '" in shown


def test_an_image_listed_twice_is_one(instances):
    images = [picture(1, "a.png"), picture(1, "a.png"), picture(2, "a.png"), picture(3, "b.png"),
              picture(4, "b.png", 40, 60)]  # fmt: skip
    found = instances.write(images, [mark(n) for n in (1, 2, 3, 4)]).read()
    assert list(found.images) == [1] and len(found.boxes[1, 1]) == 2
    assert found.account.left_out["file of several images of different sizes"] == ["b.png"]
    assert found.account.converted == {
        "image listed twice, used once": ["a.png"],
        "image listed under several ids, merged": ["a.png"],
    }


def test_a_file_with_nothing_usable_says_why(instances, capsys):
    instances.write([picture(1, "a.png")], [mark(2), mark(1, [NAN] * 4)])
    assert instances.build() == 2
    error = capsys.readouterr().err
    assert "but no box is usable; left out, annotation of an image" in error
    assert "annotation 1 (image 2, category 1)" in error


@pytest.mark.parametrize("form", ["gzip", "utf-8-sig", "utf-16", "utf-32", "cp1252", "gb18030"])
def test_annotations_in_any_encoding(instances, form):
    name = {"gb18030": "猫和狗在一起睡觉"}.get(
        form, "chat d’été à l’œil vif, déjà là où naît l’été"
    )
    data = {"images": [picture(1, "a.png")], "annotations": [mark(1)],
            "categories": [{"id": 1, "name": name}]}  # fmt: skip
    text = json.dumps(data, ensure_ascii=False)
    coded = gzip.compress(text.encode()) if form == "gzip" else text.encode(form)
    instances.path.write_bytes(coded)
    found = instances.read()
    assert found.categories == {1: name}
    guessed = any("which was guessed" in rule for rule in found.account.converted)
    assert guessed == (form in ("cp1252", "gb18030"))


# --- Where images are ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, there",
    [
        ("..\\label\\train\\a.png", "train/a.png"),
        ("C:\\Users\\me\\train\\a.png", "train/a.png"),
        ("C:/Users/me/a.png", "a.png"),
        ("/home/me/train/a.png", "train/a.png"),
        ("https://host/bucket/my%20cat.png?x=1", "my cat.png"),
        ("my%20cat.png", "my cat.png"),
        ("a.JPG", "a.jpg"),
        ("A.png", "a.png"),
        ("a.png", "deep/down/a.png"),
        (unicodedata.normalize("NFD", "là/été.png"), unicodedata.normalize("NFC", "là/été.png")),
        (unicodedata.normalize("NFC", "été.png"), unicodedata.normalize("NFD", "été.png")),
    ],
)  # fmt: skip
def test_paths_of_other_machines(instances, capsys, said, there):
    assert instances.write([picture(1, said)], [mark(1)], files=[there, "other.png"]).build() == 0
    assert len(instances.rows()) == 1
    assert "converted, image found by" in capsys.readouterr().out


@pytest.mark.parametrize(
    "said, there",
    [
        ("z/a.png", ["x/a.png", "y/a.png"]),  # some other folder's
        ("val/a.png", ["train/a.png"]),
        ("a.png", ["a.jpg", "aa.png", "a.png.jpg"]),
        ("../secret.png", []),
        ("..\\secret.png", []),
        ("%2e%2e/secret.png", []),
        ("a.png", [".trash/a.png"]),
        ("a.png\0", ["a.png"]),
        ("a" * 5000, ["a.png"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_another_image_is_never_taken(instances, said, there):
    save_image(instances.folder / "secret.png")
    instances.write([picture(1, "b.png"), picture(2, said)], [mark(1), mark(2)],
                    files=["b.png", *there])  # fmt: skip
    assert instances.build() == 2
    assert instances.build("--allow_missing") == 0
    assert set(instances.rows()) == {(1, "cat")}


@pytest.mark.parametrize(
    "said, there",
    [("a.png", ["x/a.png", "y/a.png"]), ("Q:\\a.png", ["x/a.png", "y/a.png"]),
     ("A.png", ["a.PNG", "a.png"]), ("p/q/a.png", ["x/q/a.png", "a.png", "y/a.png"])],
    ids=str,
)  # fmt: skip
def test_an_image_that_could_be_several_files_is_left_out(instances, capsys, said, there):
    instances.write([picture(1, "b.png"), picture(2, said)], [mark(1), mark(2)],
                    files=["b.png", *there])  # fmt: skip
    taken = said.startswith("p/")  # only at its root the folder may be the rest of the path
    assert instances.build() == 0
    assert len(instances.rows()) == 1 + taken
    assert ("left out, image whose path fits several files" in capsys.readouterr().out) != taken


def test_the_longest_end_of_a_path_counts(tmp_path):
    for file in ("a.png", "train/a.png", "x/a.png"):
        save_image(tmp_path / file)
    files = ImageFiles(tmp_path)
    assert files.find("old/train/a.png").path == tmp_path / "train/a.png"
    assert files.find("old/y/a.png").path == tmp_path / "a.png"
    assert files.find("./x//a.png") == (tmp_path / "x/a.png", "")


# --- Folders of classes ----------------------------------------------------------------------


def build_folder(source, out, *more):
    return run("build", "classification", "--source", source, "--output", out, *more)


def labels(out, split="train"):
    return sorted(row.columns["label"] for row in samples(out, split))


def test_hidden_files_and_folders_are_no_data(tmp_path, capsys):
    root = tmp_path / "source"
    for name in ("cat/1.jpg", "dog/2.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", ".git/x/3.png",
                 "cat/.ipynb_checkpoints/1-checkpoint.jpg", "__MACOSX/cat/1.jpg"):  # fmt: skip
        save_image(root / name)
    for name in ("cat/._1.jpg", "cat/Thumbs.db", "dog/.DS_Store", "desktop.ini"):
        (root / name).write_bytes(b"")
    assert build_folder(root, tmp_path / "out") == 0
    assert labels(tmp_path / "out") == ["cat", "dog"]
    assert "left out, hidden file or folder: 8 (" in capsys.readouterr().out
    (root / "train").mkdir()
    for name in ("cat", ".ipynb_checkpoints", "__MACOSX"):
        (root / name).rename(root / "train" / name)
    assert build_folder(root, tmp_path / "split") == 0
    assert labels(tmp_path / "split") == ["cat"]
    assert "left out, folder that is not a split: 1 (dog)" in capsys.readouterr().out


def test_every_suffix_that_can_be_decoded_is_read_and_the_others_are_named(tmp_path, capsys):
    root = tmp_path / "source"
    formats = {".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".webp": "WEBP",
               ".tif": "TIFF", ".avif": "AVIF", ".dib": "BMP", ".pgm": "PPM"}  # fmt: skip
    for suffix, name in formats.items():
        (root / suffix[1:]).mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(root / suffix[1:] / f"1{suffix}", name)
    for name in ("jpg/notes.txt", "empty/a.svg", "empty/b", "list.csv"):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert build_folder(root, tmp_path / "out") == 0
    assert labels(tmp_path / "out") == sorted(suffix[1:] for suffix in formats)
    shown = capsys.readouterr().out
    for said in ("not an image by its suffix '.txt': 1 (", "not an image by its suffix '.svg': 1 (",
                 "not an image by its suffix '': 1 (", "class folder without an image: 1 (empty)",
                 ".csv file outside a class folder: 1 ("):  # fmt: skip
        assert f"left out, {said}" in shown


def test_folders_below_a_class_and_a_class_named_train(tmp_path, capsys):
    root = tmp_path / "source"
    for name in ("train/1.png", "bus/2.png", "bus/red/3.png"):
        save_image(root / name)
    assert build_folder(root, tmp_path / "out") == 0
    assert labels(tmp_path / "out") == ["bus", "bus", "train"]
    assert "converted, image in a folder below its class: 1 (" in capsys.readouterr().out


def test_class_names_are_composed_and_slips_said(tmp_path, capsys):
    root = tmp_path / "source"
    for name in (unicodedata.normalize("NFD", "café"), "Oak", "oak"):
        save_image(root / name / "1.png")
    assert build_folder(root, tmp_path / "out") == 0
    assert set(labels(tmp_path / "out")) == {unicodedata.normalize("NFC", "café"), "Oak", "oak"}
    assert "classes that differ in case or spaces only" in capsys.readouterr().out


def test_split_folders_by_any_case(tmp_path):
    for name in ("Train/cat/1.png", "VALIDATION/cat/2.png"):
        save_image(tmp_path / "source" / name)
    assert build_folder(tmp_path / "source", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == labels(tmp_path / "out", "test") == ["cat"]


def test_linked_folders_are_walked_once(tmp_path):
    save_image(tmp_path / "elsewhere/1.png")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "source")
    assert build_folder(tmp_path / "source", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == ["cat"]


def test_lisa_folders_hold_other_files_too(tmp_path, capsys):
    source = tmp_path / "source"
    save_image(source / "one.JPG"), save_image(source / "two.png")
    shapes = [{"label": "target", "points": [[1, 1], [9, 1], [9, 9]]}]
    (source / "one.json").write_text(json.dumps({"text": ["it"], "shapes": shapes}))
    (source / "._one.json").write_bytes(b"\0\5\26\7")
    assert run("build", "grounding", "--source", source, "--output", tmp_path / "out") == 0
    assert len(samples(tmp_path / "out")) == 1
    shown = capsys.readouterr().out
    assert "image without a .json file of its name: 1 (two.png)" in shown and "._one" not in shown


# --- CSV -------------------------------------------------------------------------------------


def build_csv(path, out, *more):
    return build_folder(path, out, "--reader", "csv", *more)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|", ":", "^"])
def test_csv_with_any_separator(tmp_path, capsys, mark):
    save_image(tmp_path / "my pictures/a.png"), save_image(tmp_path / "b.png")
    table = [["label", "image", "split"], ["oak", "my pictures/a.png", "train"],
             [f'"red{mark.strip()} or oak"', "b.png", "Validation"]]  # fmt: skip
    path = tmp_path / "rows.csv"
    path.write_text("sep=;\r\n" * (mark == ";") + "\r\n".join(map(mark.join, table)))
    assert build_csv(path, tmp_path / "out") == 0
    assert labels(tmp_path / "out") == ["oak"]
    assert labels(tmp_path / "out", "test") == [f"red{mark.strip()} or oak"]
    assert (f"cells separated by {mark!r}: 1 (" in capsys.readouterr().out) == (mark != ",")


@pytest.mark.parametrize("form", ["gzip", "utf-16", "cp1252"])
def test_csv_in_any_encoding(tmp_path, form):
    save_image(tmp_path / "a.png")
    text = "image,label\na.png,déjà là où naît l’été à l’œil vif\n"
    coded = gzip.compress(text.encode()) if form == "gzip" else text.encode(form)
    (tmp_path / "rows.csv").write_bytes(coded)
    assert build_csv(tmp_path / "rows.csv", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == ["déjà là où naît l’été à l’œil vif"]


def test_csv_paths_of_another_machine(tmp_path, capsys):
    save_image(tmp_path / "images/train/a.png")
    (tmp_path / "rows.csv").write_text("image,label\nD:\\photos\\train\\a.PNG,oak\n")
    argv = (tmp_path / "rows.csv", tmp_path / "out", "--images", tmp_path / "images")
    assert build_csv(*argv) == 0
    assert "converted, image found by the end of its path: 1 (" in capsys.readouterr().out


def test_line_numbers_count_what_stands_before(tmp_path, capsys):
    save_image(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text('\nsep=;\nimage;label\na.png;"oak"\nb.png;\n')
    assert build_csv(tmp_path / "rows.csv", tmp_path / "out") == 2
    assert "line 5: expected an image and a label" in capsys.readouterr().err


def test_yolos_keypoints_are_no_polygon_and_odd_numbers_no_label(tmp_path, capsys):
    save_image(tmp_path / "images/a.png", 100, 100)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text(
        "0 .5 .5 .2 .2 .45 .45 .55 .55\ninf .5 .5 .2 .2\nnan .5 .5 .2 .2\n"
    )
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\nkpt_shape: [2, 2]\n")
    assert run("build", "yolo", "--source", tmp_path, "--output", tmp_path / "out") == 0
    (row,) = samples(tmp_path / "out", "train")
    assert "[400, 400, 600, 600]" in row.solution
    assert (
        "left out, label that is not a class with a box or a polygon: 2" in capsys.readouterr().out
    )
    (tmp_path / "data.yaml").write_text("train: images\nnames: cat\n")
    assert run("build", "yolo", "--source", tmp_path, "--output", tmp_path / "other") == 2
    assert "expected names of the classes, got 'cat'" in capsys.readouterr().err
