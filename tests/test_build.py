"""`python -m virft_fast.data`: each source in its official layout, small."""

from __future__ import annotations

import csv
import json
import re
from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from virft_fast.data import BadRow, SampleDataset, load_rows
from virft_fast.data.__main__ import main
from virft_fast.data.image_files import ImageFiles
from virft_fast.data.labelled_images import FLOWERS
from virft_fast.data.lisa import IGNORED, TARGET
from virft_fast.tasks import check_solution, parse_detection
from virft_fast.tasks.coordinates import extent_of, rescale, to_thousand, written
from virft_fast.tasks.prompts import NOVEL_15, detection_problem, grounding_problem


def save_image(path, width=60, height=40, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def run(*argv):
    return main([str(part) for part in argv])


def samples(path, split="train"):
    rows = SampleDataset(load_rows(str(path), split))
    return [rows.get(index) for index in range(len(rows))]


@pytest.fixture
def coco(tmp_path):
    """Six images; cats on all, dogs on two, one crowd, one box outside, one category empty."""
    images = [
        {"id": 10 + i, "file_name": f"{i:012d}.jpg", "width": 200, "height": 100} for i in range(6)
    ]
    annotations = [
        {"image_id": 10 + i, "category_id": 17, "bbox": [20, 10, 100, 50], "iscrowd": 0}
        for i in range(6)
    ]
    annotations += [
        {"image_id": 10, "category_id": 18, "bbox": [-10, 90, 60, 50], "iscrowd": 0},
        {"image_id": 11, "category_id": 18, "bbox": [0, 0, 1, 1], "iscrowd": 0},
        {"image_id": 12, "category_id": 18, "bbox": [0, 0, 50, 50], "iscrowd": 1},
        {"image_id": 13, "category_id": 18, "bbox": [250, 0, 5, 5], "iscrowd": 0},
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}, {"id": 19, "name": "horse"}]
    for image in images:
        save_image(tmp_path / "images" / image["file_name"], 200, 100)
    path = tmp_path / "instances.json"
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))
    return path


def build_coco(coco, out, *more):
    return run(
        "build", "coco", "--annotations", coco, "--images", coco.parent / "images",
        "--output", out, *more,
    )  # fmt: skip


def test_coco_rows_are_visual_rfts(coco, tmp_path, capsys):
    assert build_coco(coco, tmp_path / "out") == 0
    rows = samples(tmp_path / "out")
    assert len(rows) == 8
    cat = next(row for row in rows if row.columns["category"] == "cat")
    assert cat.columns["problem"] == detection_problem("cat")
    assert (
        "'cat' in the image, and provide the bounding boxes (between 0 and 1000, integer)"
        in (cat.columns["problem"])
    )
    assert cat.solution == (
        "<answer>[{'Position': [100, 100, 600, 600], 'Confidence': 1}]</answer>"
    )
    dogs = {r.columns["image_id"]: r.solution for r in rows if r.columns["category"] == "dog"}
    assert parse_detection(dogs[10]).boxes == ((0, 900, 250, 1000),)  # cut at the image's edge
    assert parse_detection(dogs[11]).boxes == ((0, 0, 5, 10),)
    assert set(dogs) == {10, 11}  # neither the crowd nor the box outside
    assert cat.images[0].size == (200, 100)
    shown = capsys.readouterr().out
    assert "train: 8 rows" in shown and "box without area inside its image: 1" in shown
    card = (tmp_path / "out/README.md").read_text()
    assert "categories: all" in card and "seed: 0" in card and "train: 8 rows" in card


def test_few_shot_rows_follow_the_seed(coco, tmp_path):
    solutions = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        assert (
            build_coco(coco, tmp_path / name, "--categories", "cat", "--shots", 2, "--seed", seed)
            == 0
        )
        solutions[name] = [row.columns["image_id"] for row in samples(tmp_path / name)]
    assert len(solutions["a"]) == 2
    assert solutions["a"] == solutions["b"] != solutions["c"]


def test_a_category_with_fewer_images_gives_them_all_and_says_so(coco, tmp_path, capsys):
    assert build_coco(coco, tmp_path / "out", "--categories", "cat,dog", "--shots", 3) == 0
    rows = [row.columns["category"] for row in samples(tmp_path / "out")]
    assert rows.count("cat") == 3 and rows.count("dog") == 2
    note = "fewer than 3 images, all of them used: dog 2"
    assert note in capsys.readouterr().out and note in (tmp_path / "out/README.md").read_text()


def test_missing_images_are_left_out_before_so_many_are_drawn(coco, tmp_path, capsys):
    for number in (1, 2, 3):
        (tmp_path / f"images/{number:012d}.jpg").unlink()
    for seed in range(4):
        more = ("--categories", "cat", "--shots", 3, "--allow_missing", "--seed", seed)
        assert build_coco(coco, tmp_path / str(seed), *more) == 0
        assert len(samples(tmp_path / str(seed))) == 3
        assert "left out, image missing: 3" in capsys.readouterr().out


def test_names_with_commas_and_test_files_without_a_category(coco, tmp_path, capsys):
    data = json.loads(coco.read_text())
    data["categories"] = [c | {"name": f" {c['name']}, parked"} for c in data["categories"]]
    coco.write_text(json.dumps(data))
    dogless = data | {"annotations": [a for a in data["annotations"] if a["category_id"] != 18]}
    (tmp_path / "test.json").write_text(json.dumps(dogless))
    more = ("--test_annotations", tmp_path / "test.json")
    assert build_coco(coco, tmp_path / "out", *more) == 0
    shown = capsys.readouterr().out
    assert "category without a box in the test annotations: 1 ( dog, parked)" in shown
    assert {r.columns["category"] for r in samples(tmp_path / "out", "test")} == {" cat, parked"}
    assert build_coco(coco, tmp_path / "one", "--categories", " dog, parked") == 0
    assert len(samples(tmp_path / "one")) == 2


def test_negatives_ask_for_what_is_not_there(coco, tmp_path, capsys):
    """Neither where there is a crowd, nor where a box lies outside the image."""
    assert build_coco(coco, tmp_path / "out", "--categories", "cat,dog", "--negatives", 0.5) == 0
    rows = samples(tmp_path / "out")
    absent = [row for row in rows if "No Objects" in row.solution]
    assert len(absent) == 2 and len(rows) == 10
    assert {(r.columns["category"], r.columns["image_id"]) for r in absent} == {
        ("dog", 14), ("dog", 15)
    }  # fmt: skip
    assert "2 rows without objects, not 4" in capsys.readouterr().out
    more = ("--categories", "cat,dog", "--negatives", 0.5, "--max_rows", 3)
    assert build_coco(coco, tmp_path / "three", *more) == 0
    assert sum("No" in row.solution for row in samples(tmp_path / "three")) == 1
    assert len(samples(tmp_path / "three")) == 3


def test_what_is_replaced_is_a_data_set_and_holds_no_source(coco, tmp_path, capsys):
    folder = coco.parent / "images"
    assert run("build", "coco", "--annotations", coco, "--images", folder, "--output", folder,
               "--overwrite") == 2  # fmt: skip
    assert "expected a data set built by this program" in capsys.readouterr().err
    assert build_coco(coco, tmp_path / "out") == 0
    inside = coco.rename(tmp_path / "out/instances.json")
    assert run("build", "coco", "--annotations", inside, "--images", folder, "--output",
               tmp_path / "out", "--overwrite") == 2  # fmt: skip
    assert "contains the input" in capsys.readouterr().err and inside.is_file()
    for place in (inside, inside / "below"):
        assert run("build", "coco", "--annotations", inside, "--images", folder, "--output",
                   place, "--overwrite") == 2  # fmt: skip
        assert "--output" in capsys.readouterr().err


def test_two_images_are_never_one_file_and_none_lies_elsewhere(coco, tmp_path, capsys):
    data = json.loads(coco.read_text())
    for image, folder in zip(data["images"], "ab", strict=False):
        image["file_name"] = f"{folder}/000000000000.jpg"
    coco.write_text(json.dumps(data))
    assert build_coco(coco, tmp_path / "out") == 0
    assert {row.columns["image_id"] for row in samples(tmp_path / "out")} == {12, 13, 14, 15}
    said = (
        "left out, several images with the same file; give the folder where the annotations' paths"
    )
    assert f"{said} start: 2 (a/000000000000.jpg, b/000000000000.jpg)" in capsys.readouterr().out
    found = ImageFiles(tmp_path / "images").find("/../etc/passwd")
    assert found == (tmp_path / "images/passwd", "")


def test_a_polygon_of_an_image_that_is_shown_turned_is_of_no_known_picture(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "source").mkdir()
    for name, more in (("a", {}), ("b", {"exif": exif})):
        Image.new("RGB", (100, 60)).save(tmp_path / f"source/{name}.jpg", **more)
        shapes = [{"label": "target", "points": [[10, 10], [40, 10], [40, 40]]}]
        text = json.dumps({"text": ["what"], "shapes": shapes})
        (tmp_path / f"source/{name}.json").write_text(text)
    argv = ("build", "grounding", "--source", tmp_path / "source", "--output", tmp_path / "out")
    assert run(*argv) == 0
    assert "rotated by EXIF data, its boxes may not be: 1" in capsys.readouterr().out
    assert len(samples(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    "orientation, size, rows",
    [(1, (200, 100), 8), (3, (200, 100), 6), (6, (100, 200), 8), (6, (200, 100), 8)],
)
def test_images_that_are_shown_turned(coco, tmp_path, capsys, orientation, size, rows):
    """Sideways, the annotated size tells whether boxes are of the image as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "images/000000000000.jpg"
    Image.new("RGB", size).save(path, exif=exif)
    assert build_coco(coco, tmp_path / "out") == 0
    assert len(samples(tmp_path / "out")) == rows
    assert ("rotated by EXIF data" in capsys.readouterr().out) == (rows < 8)


def test_test_split_shares_no_image_with_train(coco, tmp_path):
    assert build_coco(coco, tmp_path / "out", "--test_share", 0.5) == 0
    train, test = (
        {row.columns["image_id"] for row in samples(tmp_path / "out", split)}
        for split in ("train", "test")
    )
    assert len(test) == 3 and not train & test


def test_test_annotations_make_the_test_split(coco, tmp_path):
    more = ("--categories", "cat", "--shots", 1, "--test_annotations", coco)
    assert build_coco(coco, tmp_path / "out", *more) == 0
    assert len(samples(tmp_path / "out")) == 1
    assert len(samples(tmp_path / "out", "test")) == 6


def test_base65_is_all_but_the_novel_ones(tmp_path):
    names = ["person", "dog", *NOVEL_15]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": i, "bbox": [1, 1, 9, 9]}
            for i in range(len(names))
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    save_image(tmp_path / "images/a.png")
    assert build_coco(path, tmp_path / "out", "--categories", "base65") == 0
    assert {r.columns["category"] for r in samples(tmp_path / "out")} == {"person", "dog"}
    assert build_coco(path, tmp_path / "novel", "--categories", "novel15") == 0
    assert {r.columns["category"] for r in samples(tmp_path / "novel")} == set(NOVEL_15)


def test_lvis_finds_images_by_url_and_heeds_what_it_left_open(tmp_path):
    data = {
        "images": [
            {
                "id": i, "coco_url": f"http://images.cocodataset.org/val2017/{i:012d}.png",
                "width": 60, "height": 40, "neg_category_ids": [2] if i == 1 else [],
                "not_exhaustive_category_ids": [1] if i == 3 else [],
            }
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [6, 4, 30, 20]} for i in (1, 2, 3)
        ] + [{"id": 9, "image_id": 2, "category_id": 2, "bbox": [6, 4, 30, 20]}],
        "categories": [{"id": 1, "name": "egg_roll"}, {"id": 2, "name": "sugar_bowl"}],
    }  # fmt: skip
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(data))
    for i in (1, 2, 3):
        save_image(tmp_path / f"images/val2017/{i:012d}.png")
    argv = ("build", "lvis", "--annotations", path, "--images", tmp_path / "images")
    assert run(*argv, "--output", tmp_path / "out", "--negatives", 0.9) == 0
    rows = [(r.columns["image_id"], r.columns["category"]) for r in samples(tmp_path / "out")]
    argv = ("build", "coco", *argv[2:], "--output", tmp_path / "coco")
    assert run(*argv) == 2  # what LVIS has not looked for would be absent
    # Image 3 may hold more egg rolls than are marked; only of image 1 a sugar bowl is known absent.
    assert sorted(rows) == [(1, "egg_roll"), (1, "sugar_bowl"), (2, "egg_roll"), (2, "sugar_bowl")]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"--categories": "catt"}, "no 'catt' (did you mean 'cat'?)"),
        ({"--categories": "horse"}, "no boxes of horse"),
        ({"--annotations": "captions"}, "these are captions"),
        ({"--annotations": "keypoints"}, "annotation of an image that isn't listed or used: 1"),
        ({"--annotations": "list"}, "expected COCO's instances file"),
        ({"--annotations": "text"}, "expected JSON"),
        ({"--annotations": "numbers"}, "image without an id or file name: 1 (1)"),
        ({"--annotations": "null"}, "annotations: expected a list of objects, got None"),
        ({"--annotations": "no file"}, "image without an id or file name: 6 ("),
        ({"--annotations": "no id"}, "image without an id or file name: 1 ("),
        ({"--annotations": "texts as ids"}, "image id of several images: 1 (x: 000000000000.jpg, "),
        ({"--annotations": "huge id"}, "image without an id or file name: 6 ("),
        ({"--annotations": "no name"}, "category without an id or name: 1 ({'id': 1})"),
        ({"--annotations": "same name"}, "annotation of a category that isn't listed or used: 10"),
        ({"--annotations": "list as id"}, "annotation None (image [1], category None)"),
        ({"--annotations": "nothing"}, "expected boxes in the annotations"),
        (
            {"--annotations": "lvis"},
            "this is LVIS's (its images have neg_category_ids); use `build lvis`",
        ),
        ({"--test_annotations": "nothing"}, "no boxes of the chosen categories"),
        ({"--annotations": "none"}, "no such file"),
        ({"--images": "elsewhere"}, "6 of 6 images are missing"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_input_that_cant_be_built_from(coco, tmp_path, capsys, change, said):
    base = json.loads(coco.read_text())
    kinds = {
        "captions": json.dumps(base | {"annotations": [{"image_id": 10, "caption": "a cat"}]}),
        "keypoints": json.dumps(base | {"annotations": [{"bbox": [0, 0, 1, 1], "keypoints": [1]}]}),
        "list": "[1]",
        "text": "not json",
        "numbers": json.dumps(base | {"images": [1]}),
        "null": json.dumps(base | {"annotations": None}),
        "no file": json.dumps(base | {"images": [i | {"file_name": ".."} for i in base["images"]]}),
        "no id": json.dumps(base | {"images": [{"file_name": "a", "width": 1, "height": 1}]}),
        "texts as ids": json.dumps(base | {"images": [i | {"id": "x"} for i in base["images"]]}),
        "huge id": json.dumps(base | {"images": [i | {"id": 2**63} for i in base["images"]]}),
        "no name": json.dumps(base | {"categories": [{"id": 1}]}),
        "same name": json.dumps(base | {"categories": [{"id": i, "name": "cat"} for i in (1, 2)]}),
        "list as id": json.dumps(base | {"annotations": [{"bbox": [], "image_id": [1]}]}),
        "nothing": json.dumps(base | {"annotations": []}),
        "lvis": json.dumps(
            base | {"images": [i | {"neg_category_ids": []} for i in base["images"]]}
        ),
    }
    arguments = {"--annotations": coco, "--images": tmp_path / "images"}
    for flag, value in change.items():
        if flag.endswith("annotations"):
            path = tmp_path / f"{value}.json"
            if value in kinds:
                path.write_text(kinds[value])
            value = path
        arguments[flag] = tmp_path / value if flag == "--images" else value
    flat = [part for pair in arguments.items() for part in pair]
    assert run("build", "coco", "--output", tmp_path / "out", *flat) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_missing_and_broken_images_are_counted(coco, tmp_path, capsys):
    (tmp_path / "images/000000000002.jpg").unlink()
    (tmp_path / "images/000000000003.jpg").write_bytes(b"no image")
    save_image(tmp_path / "images/000000000004.jpg", 100, 200)
    assert build_coco(coco, tmp_path / "out") == 2
    assert "1 of 6 images are missing: " in capsys.readouterr().err
    assert build_coco(coco, tmp_path / "out", "--categories", "cat", "--allow_missing") == 0
    assert len(samples(tmp_path / "out")) == 3
    shown = capsys.readouterr().out
    assert "image missing: 1 (" in shown and "image can't be read: 1 (" in shown
    assert "another size than its annotations say: 1 (" in shown


def test_a_build_that_stops_leaves_what_was_there(coco, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert build_coco(coco, out) == 0
    assert build_coco(coco, out) == 2
    assert "exists already" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("virft_fast.data.writing.SplitWriter.add", stop)
        assert build_coco(coco, out, "--overwrite") == 130
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not list(tmp_path.glob(".out*"))
    assert build_coco(coco, out, "--overwrite", "--categories", "dog") == 0
    assert len(samples(out)) == 2


def test_the_hubs_own_loader_reads_what_is_built(coco, tmp_path):
    import datasets

    assert build_coco(coco, tmp_path / "out", "--test_share", 0.5) == 0
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "test"}
    assert isinstance(loaded["train"].features["image"], datasets.Image)
    assert loaded["train"][0]["image"].size == (200, 100)


def test_boxes_in_pixels_of_the_resized_image(coco, tmp_path, processor):
    """Qwen2.5-VL's space, checked against what the processor makes of the image."""
    more = ("--model_family", "qwen2_5_vl", "--categories", "cat", "--max_pixels", 28224)
    assert build_coco(coco, tmp_path / "out", *more) == 0
    row = samples(tmp_path / "out")[0]
    grid = processor.image_processor(
        images=[row.images[0]], size={"shortest_edge": 3136, "longest_edge": 28224}
    )["image_grid_thw"][0]
    assert row.columns["extent"] == [int(grid[2]) * 14, int(grid[1]) * 14]
    assert "absolute pixel coordinates" in row.columns["problem"]
    width, height = row.columns["extent"]
    (box,) = parse_detection(row.solution).boxes
    assert box == tuple(int(v) for v in (0.1 * width, 0.1 * height, 0.6 * width, 0.6 * height))
    (same,) = parse_detection(row.solution, row.columns["extent"]).boxes
    assert same == pytest.approx((100, 100, 600, 600), abs=1000 / height)
    assert check_solution("detection", row.solution, row.columns["extent"]) is None


def test_pixels_of_another_size_than_the_models_are_a_bad_row(coco, tmp_path, processor):
    from virft_fast.data.prompt_source import PromptSource

    for most, fits in ((28224, True), (6272, False)):
        out = tmp_path / str(most)
        more = ("--model_family", "qwen2_5_vl", "--max_pixels", most)
        assert build_coco(coco, out, *more) == 0
        got = PromptSource(SampleDataset(load_rows(str(out), "train")), processor).load(0)
        assert isinstance(got, BadRow) is not fits
        assert fits or "--max_pixels" in got.reason


def test_one_conversion_both_ways():
    box, size, extent = (13.0, 7.0, 151.0, 83.0), (200.0, 100.0), (196.0, 84.0)
    there = rescale(box, size, extent)
    assert rescale(there, extent, size) == pytest.approx(box)
    assert to_thousand(there, extent) == pytest.approx(to_thousand(box, size))
    assert written((-3, 5.9, 3000, 6.1), (1000, 1000)) == [0, 5, 1000, 6]
    assert written((1000, 1000, 1000, 1000), (1000, 1000)) == [999, 999, 1000, 1000]
    assert extent_of(None) == (1000, 1000)
    for bad in ([1], "ab", [0, 5], [float("nan"), 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="extent: expected"):
            extent_of(bad)


# --- Classification --------------------------------------------------------------------------


def flowers(root):
    labels = np.arange(1, 103).repeat(3)
    for number in range(1, len(labels) + 1):
        save_image(root / f"jpg/image_{number:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": labels[None]})
    ids = np.arange(1, len(labels) + 1)
    splits = {"trnid": ids[0::3][None], "valid": ids[1::3][None], "tstid": ids[2::3][None]}
    savemat(root / "setid.mat", splits)


def aircraft(root):
    for part, numbers in (("trainval", (1, 2, 3)), ("test", (4,))):
        lines = [f"{n:07d} {'707-320' if n % 2 else 'Boeing 717'}\n" for n in numbers]
        path = root / f"data/images_variant_{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
        for n in numbers:
            save_image(root / f"data/images/{n:07d}.jpg")


def cars(root):
    (root / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names[None]})
    for split, file, place in (
        ("train", "cars_train_annos.mat", root / "devkit"),
        ("test", "cars_test_annos_withlabels.mat", root),
    ):
        kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        records = np.array([(1, 1, "00001.jpg"), (1, 2, "00002.jpg")], dtype=kind)
        savemat(place / file, {"annotations": records[None]})
        for name in ("00001.jpg", "00002.jpg"):
            save_image(root / f"cars_{split}" / name)


def pets(root):
    (root / "annotations").mkdir(parents=True)
    for part, names in (
        ("trainval", ("Abyssinian_1", "saint_bernard_12")),
        ("test", ("saint_bernard_2",)),
    ):
        lines = ["#Image CLASS-ID SPECIES BREED ID\n", *(f"{name} 1 1 1\n" for name in names)]
        (root / f"annotations/{part}.txt").write_text("".join(lines))
        for name in names:
            save_image(root / f"images/{name}.jpg")


@pytest.mark.parametrize(
    "reader, make, question, labels, counts",
    [
        ("flowers102", flowers, "plant. Please identify the species of the plant", set(FLOWERS),
         (204, 102)),
        ("aircraft", aircraft, "aircraft. Please identify the model", {"707-320", "Boeing 717"},
         (3, 1)),
        ("cars196", cars, "car. Please identify the model",
         {"AM General Hummer SUV 2000", "Acura RL Sedan 2012"}, (2, 2)),
        ("pets37", pets, "pet. Please identify the species", {"Abyssinian", "saint bernard"},
         (2, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_official_archives(tmp_path, reader, make, question, labels, counts):
    root = tmp_path / "source"
    make(root)
    argv = ("build", "classification", "--reader", reader, "--source", root)
    assert run(*argv, "--output", tmp_path / "out") == 0
    train, test = samples(tmp_path / "out"), samples(tmp_path / "out", "test")
    assert (len(train), len(test)) == counts
    assert {row.columns["label"] for row in train} == labels
    assert question in train[0].columns["problem"]
    assert all(row.solution == f"<answer>{row.columns['label']}</answer>" for row in train)


def test_flowers_split_and_names_go_by_number(tmp_path):
    flowers(tmp_path / "source")
    argv = ("build", "classification", "--reader", "flowers102", "--source", tmp_path / "source")
    assert run(*argv, "--output", tmp_path / "out", "--shots", 1) == 0
    assert len(samples(tmp_path / "out")) == 102
    assert [row.columns["label"] for row in samples(tmp_path / "out", "test")] == list(FLOWERS)


def test_image_folder_with_and_without_splits(tmp_path):
    for name in ("a/x.png", "a/y.PNG", "b/x.jpg", "b/y.jpg", "b/notes.txt"):
        path = tmp_path / "plain" / name
        save_image(path) if path.suffix != ".txt" else path.write_text("")
    argv = ("build", "classification", "--source", tmp_path / "plain", "--test_share", 0.5)
    assert run(*argv, "--output", tmp_path / "out", "--thing", "shape", "--kind", "letter") == 0
    for split in ("train", "test"):
        rows = samples(tmp_path / "out", split)
        assert sorted(row.columns["label"] for row in rows) == ["a", "b"]
        assert "identify the letter of the shape" in rows[0].columns["problem"]
    for name in ("train/a/x.png", "valid/a/y.png"):
        save_image(tmp_path / "split" / name)
    assert run(*argv[:3], tmp_path / "split", "--output", tmp_path / "out2") == 0
    assert len(samples(tmp_path / "out2")) == len(samples(tmp_path / "out2", "test")) == 1


def test_csv_file(tmp_path, capsys):
    save_image(tmp_path / "pictures/1.png")
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["Image", "label", "split"], ["1.png", "oak, red", "train"]])
    argv = ("build", "classification", "--reader", "csv", "--source", path)
    assert run(*argv, "--output", tmp_path / "out") == 2
    assert "expected the columns image and label" in capsys.readouterr().err
    path.write_text(path.read_text().replace("Image", "image"))
    more = ("--images", tmp_path / "pictures", "--output", tmp_path / "out")
    assert run(*argv, *more) == 0
    assert samples(tmp_path / "out")[0].columns["label"] == "oak, red"
    path.write_text("image,label,split\n1.png,oak,dev\n")
    assert run(*argv, *more, "--overwrite") == 2
    assert "line 2: split: expected train or test, got 'dev'" in capsys.readouterr().err


@pytest.mark.parametrize("reader", ["folder", "flowers102", "aircraft", "cars196", "pets37"])
def test_a_folder_of_another_layout(tmp_path, capsys, reader):
    (tmp_path / "source").mkdir()
    argv = ("build", "classification", "--reader", reader, "--source", tmp_path / "source")
    assert run(*argv, "--output", tmp_path / "out") == 2
    assert "expected" in capsys.readouterr().err
    assert run(*argv[:-1], tmp_path / "none", "--output", tmp_path / "out") == 2
    assert "no such file or folder" in capsys.readouterr().err


def change_flowers(root, **fields):
    flowers(root)
    labels, splits = np.arange(1, 103).repeat(3), np.arange(1, 4)[None]
    given = {"labels": labels[None], "trnid": splits, "valid": splits, "tstid": splits} | fields
    given = {name: value for name, value in given.items() if value is not None}
    savemat(root / "imagelabels.mat", given)
    savemat(root / "setid.mat", given)


def change_cars(root, records=None, names=("a", "b"), field="class"):
    cars(root)
    kind = [(field, "O"), ("fname", "O")]
    given = np.array(records if records else [(1, "00001.jpg")], dtype=kind)
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": given[None]})
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(names, dtype=object)[None]})


def change_lines(make, file):
    def made(root):
        make(root)
        (root / file).write_bytes(b"0000001 caf\xe9\n")

    return made


@pytest.mark.parametrize(
    "reader, make, said",
    [
        ("flowers102", partial(change_flowers, labels=None), "the field labels, got trnid"),
        ("flowers102", partial(change_flowers, tstid=None), "setid.mat: expected the field tstid"),
        ("flowers102", partial(change_flowers, labels=np.ones((1, 2))),
         "setid.mat: image: expected a number from 1 to 2, got 3"),
        ("flowers102", partial(change_flowers, labels=np.full((1, 9), 103)),
         "label of image 1: expected a number from 1 to 102, got 103"),
        ("flowers102", partial(change_flowers, labels=np.full((1, 9), np.nan)), "got nan"),
        ("cars196", partial(change_cars, records=[(3, "00001.jpg")]),
         "annotation 1: class: expected a number from 1 to 2, got 3"),
        ("cars196", partial(change_cars, records=[("x", "00001.jpg")]), "from 1 to 2, got x"),
        ("cars196", partial(change_cars, records=[([], "00001.jpg")]), "expected one value"),
        ("cars196", partial(change_cars, field="kind"),
         "expected annotations with class and fname, got kind, fname"),
        ("aircraft", change_lines(aircraft, "data/images_variant_test.txt"),
         "images_variant_test.txt: expected UTF-8 text"),
        ("pets37", change_lines(pets, "annotations/test.txt"), "test.txt: expected UTF-8 text"),
    ],
)  # fmt: skip
def test_a_damaged_archive(tmp_path, capsys, reader, make, said):
    make(tmp_path / "source")
    argv = ("build", "classification", "--reader", reader, "--source", tmp_path / "source")
    assert run(*argv, "--output", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, said",
    [
        (b"image,label\na.png,oak,red\n", "line 2: expected 2 cells, got more"),
        (b'image,label\na.png,"oak\nb.png,red"\n', "expected a label of one line, got 'oak"),
        (b"image,label\na.png,</answer><answer>x\n", "expected a label of one line"),
        (b'image,label\na.png,"oak\n', "expected CSV"),
        (b"image,label\na.png,oak\na.png,elm\n", "line 3: image "),
        (b"image,label\na.png,cat\nhttp://host/b.png,cat\n",
         "line 3: image http://host/b.png: nothing is downloaded"),
        (b"image,label\ndata:image/png;base64,iVBO\n", "line 2: image data:image/png"),
        (b"image,label\na.png,___\n", "expected a class name, got an empty solution"),
    ],
)  # fmt: skip
def test_csv_files_that_cant_be_used(tmp_path, capsys, content, said):
    save_image(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_bytes(content)
    argv = ("build", "classification", "--reader", "csv", "--source", tmp_path / "rows.csv")
    assert run(*argv, "--output", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_could_never_be_scored_are_left_out(tmp_path, capsys):
    for name in ("cat/1.png", "___/2.png"):
        save_image(tmp_path / "source" / name)
    argv = ("build", "classification", "--source", tmp_path / "source")
    assert run(*argv, "--output", tmp_path / "out") == 0
    assert [row.columns["label"] for row in samples(tmp_path / "out")] == ["cat"]
    shown = capsys.readouterr().out
    assert "left out, solution can't be scored: 1 (" in shown and "2.png: expected a class" in shown


def test_shots_are_drawn_from_the_images_that_are_there(tmp_path, capsys, coco):
    lines = ["image,label"] + [f"{i}.png,cat" for i in range(20)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    save_image(tmp_path / "7.png"), save_image(tmp_path / "13.png")
    argv = ("build", "classification", "--reader", "csv", "--source", tmp_path / "rows.csv")
    more = ("--shots", 2, "--allow_missing")
    assert run(*argv, "--output", tmp_path / "out", *more) == 0
    assert len(samples(tmp_path / "out")) == 2
    assert "image missing: 18 (" in capsys.readouterr().out
    for number in range(4):
        (tmp_path / f"images/{number:012d}.jpg").unlink()
    assert build_coco(coco, tmp_path / "coco", "--categories", "cat", *more) == 0
    assert {row.columns["image_id"] for row in samples(tmp_path / "coco")} == {14, 15}
    assert "image missing: 4 (" in capsys.readouterr().out
    assert build_coco(coco, tmp_path / "few", "--categories", "cat", "--shots", 3, more[2]) == 0
    assert "fewer than 3 images, all of them used: cat 2" in capsys.readouterr().out
    assert run(*argv, "--output", tmp_path / "three", "--shots", 3, "--allow_missing") == 0
    assert "fewer than 3 images, all of them used: cat 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_folders_of_a_split_of_their_own(tmp_path, capsys, name):
    for part in ("train", name):
        save_image(tmp_path / "source" / part / "cat/1.png")
    argv = ("build", "classification", "--source", tmp_path / "source", "--output")
    assert run(*argv, tmp_path / "out", "--test_share", 0.5) == 2
    assert "--test_share: the source has splits of its own" in capsys.readouterr().err
    assert run(*argv, tmp_path / "out") == 0
    assert len(samples(tmp_path / "out")) == len(samples(tmp_path / "out", "test")) == 1


def test_flags_that_would_not_be_heeded(coco, tmp_path, capsys):
    more = ("--test_share", 0.5, "--test_annotations", coco)
    assert build_coco(coco, tmp_path / "out", *more) == 2
    assert "--test_share: expected no --test_annotations with it" in capsys.readouterr().err
    assert build_coco(coco, tmp_path / "out", "--test_images", tmp_path) == 2
    assert "--test_images: expected only with --test_annotations" in capsys.readouterr().err
    argv = ("build", "classification", "--source", tmp_path / "images", "--images", tmp_path)
    assert run(*argv, "--output", tmp_path / "out") == 2
    assert "--images: expected only with --reader csv, got folder" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--test_share", 0.5)])
def test_a_build_without_any_image_is_none(tmp_path, capsys, more):
    (tmp_path / "rows.csv").write_text("image,label\na.png,cat\n")
    argv = ("build", "classification", "--reader", "csv", "--source", tmp_path / "rows.csv")
    assert run(*argv, "--output", tmp_path / "out", "--allow_missing", *more) == 2
    error = capsys.readouterr().err
    assert "no row could be written" in error and "left out, image missing: 1 (" in error


@pytest.mark.parametrize("kind", ["coco", "classification", "grounding"])
@pytest.mark.parametrize("share, split", [(0.99, "train"), (0.01, "test")])
def test_an_empty_split_is_no_split(coco, lisa, tmp_path, capsys, kind, share, split):
    sources = {"classification": tmp_path / "labelled", "grounding": lisa / "train"}
    save_image(tmp_path / "labelled/cat/1.png")
    more = ("--source", sources.get(kind)) if kind != "coco" else (
        "--annotations", coco, "--images", coco.parent / "images")  # fmt: skip
    out = tmp_path / "out"
    assert run("build", kind, *more, "--output", out, "--test_share", share) == 2
    assert f"no row could be written to split {split}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("--test_share", "abc", "expected a share in [0, 1), got 'abc'"),
        ("--test_share", "nan", "expected a share in [0, 1), got 'nan'"),
        ("--shots", "x", "expected a number, 1 or more, got 'x'"),
        ("--shots", "0", "expected a number, 1 or more, got '0'"),
    ],
)
def test_what_a_flag_expects(tmp_path, capsys, flag, value, said):
    with pytest.raises(SystemExit):
        run(
            "build", "classification", "--source", tmp_path, "--output", tmp_path / "o", flag, value
        )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "inspect", "export"])
def test_an_output_below_a_file(tmp_path, capsys, command):
    (tmp_path / "file").write_text("")
    save_image(tmp_path / "source/cat/1.png")
    source = json_rows(tmp_path / "rows.json", [CAT])
    output = ("--output", tmp_path / "file/x/out.png")
    argv = {
        "build": ("build", "classification", "--source", tmp_path / "source"),
        "inspect": ("inspect", "--dataset_name", source),
        "export": ("export", "llamafactory", "--dataset_name", source),
    }
    assert run(*argv[command], *output) == 2
    error = capsys.readouterr().err
    assert "--output: the folder" in error and "Errno" not in error


# --- Grounding -------------------------------------------------------------------------------


@pytest.fixture
def lisa(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "ReasonSeg" / split
        save_image(folder / "one.jpg", 100, 50)
        shapes = [
            {"label": "target", "points": [[10, 5], [30, 5], [30, 25]]},
            {"label": "ignore", "points": [[0, 0], [99, 0], [99, 49]]},
            {"label": "target", "points": [[50, 10], [60, 10], [60, 40], [50, 40]]},
        ]
        text = ["the thing that shines", "what is hot"]
        (folder / "one.json").write_text(json.dumps({"text": text, "shapes": shapes}))
        (folder / "two.json").write_text(json.dumps({"text": ["x"], "shapes": []}))
    return tmp_path / "ReasonSeg"


def test_lisa_folder(lisa, tmp_path, capsys):
    import datasets

    assert run("build", "grounding", "--source", lisa, "--output", tmp_path / "out") == 0
    rows = samples(tmp_path / "out")
    assert len(rows) == 2 and len(samples(tmp_path / "out", "validation")) == 2
    assert rows[0].solution == "<answer> (100,100),(600,800) </answer>"
    assert check_solution("grounding", rows[0].solution) is None
    assert rows[0].columns["problem"] == grounding_problem("the thing that shines")
    assert "annotation can't be used: 2 (two.json: no polygon" in capsys.readouterr().out
    stored = load_rows(str(tmp_path / "out"), "train")
    assert isinstance(stored.features["mask"], datasets.Image)
    mask = np.asarray(stored[0]["mask"])
    # The small targets are painted over the large triangle of what is ignored.
    assert mask.shape == (50, 100) and mask.dtype == np.uint8 and not mask[45, 5]
    assert mask[20, 55] == mask[10, 29] == TARGET and mask[45, 95] == mask[2, 90] == IGNORED
    assert 460 < (mask == TARGET).sum() < 640
    assert stored["image_id"][:] == [0, 0]  # two instructions, one image


def test_lisa_as_visual_rft_took_it(lisa, tmp_path):
    argv = ("build", "grounding", "--source", lisa / "train", "--first_only", "--compat_prompt")
    assert run(*argv, "--output", tmp_path / "out") == 0
    (row,) = samples(tmp_path / "out")
    assert row.solution == "<answer> (100,100),(300,500) </answer>"
    assert row.columns["problem"].endswith('<answer>(x1,y1),(x2,y2)</answer>)" format.')
    mask = np.asarray(load_rows(str(tmp_path / "out"), "train")[0]["mask"])
    assert mask[10, 29] == TARGET and set(np.unique(mask)) == {0, TARGET}
    assert not mask[20, 55]


def lisa_annotation(folder, shapes, text="what shines", encoding="utf-8"):
    save_image(folder / "one.png", 100, 50)
    data = json.dumps({"text": [text], "shapes": shapes}, ensure_ascii=False)
    (folder / "one.json").write_bytes(data.encode(encoding))
    return folder


def box(x1, y1, x2, y2, label="target"):
    return {"label": label, "points": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]}


def test_lisas_labels_and_order(tmp_path):
    """The smallest on top, whatever stands first; a label says what it is in any case."""
    shapes = [
        box(10, 10, 20.9, 20, "Target"),
        box(12, 12, 14, 14, " IGNORE this"),
        box(0, 0, 99, 49, "Flag "),
        box(5, 5, 40, 40, "ignore"),
        box(60, 5, 70, 9, "the cup"),
    ]
    source = lisa_annotation(tmp_path / "source", shapes)
    assert run("build", "grounding", "--source", source, "--output", tmp_path / "out") == 0
    row = load_rows(str(tmp_path / "out"), "train")[0]
    expected = np.zeros((50, 100), np.uint8)
    expected[5:41, 5:41] = IGNORED
    expected[10:21, 10:21] = expected[5:10, 60:71] = TARGET
    expected[12:15, 12:15] = IGNORED
    assert (np.asarray(row["mask"]) == expected).all()
    assert row["solution"] == "<answer> (100,100),(700,400) </answer>"


def test_lisas_files_in_cp1252(tmp_path):
    text = "the driver\u2019s seat"
    source = lisa_annotation(tmp_path / "source", [box(1, 1, 9, 9)], text, "cp1252")
    assert run("build", "grounding", "--source", source, "--output", tmp_path / "out") == 0
    assert samples(tmp_path / "out")[0].columns["problem"] == grounding_problem(text)


@pytest.mark.parametrize(
    "shapes, said",
    [
        (None, "shapes: expected a list, got None"),
        ([None], "shapes: expected objects with label and points, got None"),
        ([{"label": "target"}], "points: expected pairs of numbers, got None"),
        ([{"label": None, "points": []}], "expected objects with label and points"),
        ([{"label": "target", "points": [1, 2, 3]}], "expected pairs of numbers, got [1, 2, 3]"),
        ([{"label": "target", "points": [[1, 2, 3]] * 3}], "expected pairs of numbers"),
        ([{"label": "target", "points": [[1, None]] * 3}], "expected pairs of numbers"),
        ([box(1, 1, float("nan"), 9)], "expected pairs of numbers"),
        ([box(1, 1, 10**400, 9)], "expected pairs of numbers"),
        ([box(1, 1, 9, 9, "ignore")], "no polygon labeled target"),
    ],
)
def test_a_lisa_annotation_that_cant_be_used(tmp_path, capsys, shapes, said):
    source = lisa_annotation(tmp_path / "source", shapes)
    assert run("build", "grounding", "--source", source, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "left out, annotation can't be used: 1 (one.json: " in error
    assert said in error


# --- Looking and exporting -------------------------------------------------------------------


def test_inspect_counts_and_draws(coco, tmp_path, capsys):
    assert build_coco(coco, tmp_path / "out", "--negatives", 0.2) == 0
    sheet = tmp_path / "sheet.png"
    argv = ("inspect", "--dataset_name", tmp_path / "out", "--output", sheet)
    assert run(*argv, "--pictures", 4) == 0
    shown = capsys.readouterr().out
    assert "task detection, 10 usable of 10 rows" in shown and f"written: {sheet}" in shown
    assert "width 200 to 200 (median 200), height 100 to 100" in shown
    assert "true boxes per row: 0 in 2 rows, 1 in 8 rows" in shown
    assert re.search(r"2 subjects: cat 6, dog 4", shown)
    with Image.open(sheet) as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    red = (abs(colours.astype(int) - (200, 30, 30)) < 20).all(1)
    assert red.mean() > 0.1  # the pictures are in it
    assert run(*argv) == 0 and f"replaced: {sheet}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sheet.pngg", "sheet", "sheet.pdf", "folder.png"])
def test_inspect_needs_a_place_for_its_picture_first(tmp_path, capsys, monkeypatch, name):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("virft_fast.data.__main__.load_rows", lambda *_, **__: pytest.fail("read"))
    assert run("inspect", "--dataset_name", "any", "--output", tmp_path / name) == 2
    assert f"{name}: expected a" in capsys.readouterr().err


def llamafactory_rules(folder, name):
    """What LLaMA-Factory's loader asks of a multimodal sharegpt set, as its documentation says."""
    info = json.loads((folder / "dataset_info.json").read_text())[name]
    assert info["formatting"] == "sharegpt"
    tags, columns = info["tags"], info["columns"]
    records = json.loads((folder / info["file_name"]).read_text())
    for record in records:
        messages = record[columns["messages"]]
        if messages[0][tags["role_tag"]] == tags["system_tag"]:
            messages = messages[1:]
        roles = [message[tags["role_tag"]] for message in messages]
        assert roles == [tags["user_tag"], tags["assistant_tag"]] * (len(roles) // 2) and roles
        text = "".join(message[tags["content_tag"]] for message in record[columns["messages"]])
        images = record[columns["images"]]
        assert text.count("<image>") == len(images)
        assert "<video>" not in text and "<audio>" not in text
        for image in images:
            with Image.open(folder / image) as opened:
                opened.load()
    return records


@pytest.mark.parametrize("task", ["detection", "classification", "grounding"])
def test_export_follows_llamafactorys_rules(coco, lisa, tmp_path, capsys, task):
    source = tmp_path / "built"
    if task == "detection":
        assert build_coco(coco, source) == 0
    elif task == "grounding":
        assert run("build", "grounding", "--source", lisa, "--output", source) == 0
    else:
        pets(tmp_path / "pets")
        argv = ("build", "classification", "--reader", "pets37", "--source", tmp_path / "pets")
        assert run(*argv, "--output", source) == 0
    out = tmp_path / "llamafactory"
    out.mkdir()
    (out / "dataset_info.json").write_text('{"other": {"file_name": "other.json"}}')
    argv = ("export", "llamafactory", "--dataset_name", source, "--output", out)
    assert run(*argv, "--name", "mine") == 0
    records = llamafactory_rules(out, "mine")
    rows = samples(source)
    assert [r["messages"][1]["content"] for r in records] == [row.solution for row in rows]
    assert records[0]["messages"][0]["content"] == "<image>" + rows[0].columns["problem"]
    assert "other" in json.loads((out / "dataset_info.json").read_text())


def export(source, out, *more):
    return run("export", "llamafactory", "--dataset_name", source, "--output", out, *more)


def json_rows(path, rows):
    path.write_text(json.dumps(rows))
    return path


CAT = {"problem": "What is it?", "solution": "<answer>cat</answer>"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "dataset_info", "x.json", ".x", "a b"])
def test_export_deletes_nothing_by_a_name(tmp_path, capsys, name):
    out = tmp_path / "factory"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    source = json_rows(tmp_path / "rows.json", [CAT])
    assert export(source, out, "--name", name) == 2
    assert "--name: expected letters" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_export_of_the_folder_one_is_in_takes_its_name(tmp_path, monkeypatch):
    source = tmp_path / "mine"
    source.mkdir()
    rows = load_rows(str(json_rows(tmp_path / "rows.json", [CAT])), "train")
    rows.to_parquet(source / "train.parquet")
    monkeypatch.chdir(source)
    assert export(".", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset_info.json", "mine", "mine.json",
    ]  # fmt: skip
    assert len(llamafactory_rules(tmp_path / "out", "mine")) == 1


@pytest.mark.parametrize("theirs", ["mine/photo.png", "mine.json"])
def test_export_replaces_what_is_there_only_when_told(tmp_path, capsys, theirs):
    source, out = json_rows(tmp_path / "rows.json", [CAT]), tmp_path / "out"
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text("mine")
    assert export(source, out, "--name", "mine") == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err
    assert (out / theirs).read_text() == "mine"
    assert export(json_rows(tmp_path / "bad.json", [{**CAT, "image": "no.png"}]), out,
                  "--name", "mine", "--overwrite") == 2  # fmt: skip
    assert (out / theirs).read_text() == "mine"
    for _ in range(2):
        assert export(source, out, "--name", "mine", "--overwrite") == 0
    assert len(llamafactory_rules(out, "mine")) == 1
    assert not list(out.glob(".*"))


def test_export_leaves_what_dataset_info_says_of_a_name(tmp_path, capsys):
    source, info = json_rows(tmp_path / "rows.json", [CAT]), tmp_path / "out/dataset_info.json"
    info.parent.mkdir()
    info.write_text('{"rows": {"hf_hub_url": "owner/name"}}')
    assert export(source, info.parent) == 2
    assert "dataset_info.json has rows already; pass --overwrite" in capsys.readouterr().err
    assert info.read_text() == '{"rows": {"hf_hub_url": "owner/name"}}'


def test_export_of_lisas_conversations_in_the_originals_words(tmp_path):
    talk = [{"from": "user", "value": f"<img>{save_image(tmp_path / 'a.png')}</img>\n Where?"},
            {"from": "assistant", "value": "(1,2),(300,400)"}]  # fmt: skip
    source = json_rows(tmp_path / "rows.json", [{"conversations": talk}])
    assert export(source, tmp_path / "out", "--compat_prompt") == 0
    (record,) = llamafactory_rules(tmp_path / "out", "rows")
    assert record["messages"][0]["content"].startswith("<image>Where? Output the thinking process")
    assert "grouding" in record["messages"][0]["content"]


def test_export_never_replaces_its_source(tmp_path, capsys):
    source = json_rows(tmp_path / "rows.json", [CAT])
    assert export(source, tmp_path, "--overwrite") == 2
    assert "the source" in capsys.readouterr().err
    assert json.loads(source.read_text()) == [CAT]
    folder = tmp_path / "v1.5"
    folder.mkdir()
    load_rows(str(source), "train").to_parquet(folder / "train.parquet")
    assert export(folder, tmp_path, "--overwrite") == 2
    assert list(folder.iterdir())


def test_export_of_odd_rows(tmp_path, capsys):
    """What is learnt is the column completion, as in fine-tuning; no text counts as a file."""
    user, model = {"role": "user", "content": "Which?"}, {"role": "assistant"}
    chats = [[user], [{"role": "system", "content": "Look."}, user, user], [model, user],
             [user, model | {"content": "b"}, user]]  # fmt: skip
    rows = [
        {"prompt": chat, "solution": "<answer>cat</answer>", "completion": completion}
        for chat, completion in zip(
            [[{"content": "a"} | turn for turn in chat] for chat in chats],
            ["It is <audio>.", None, None, None],
            strict=True,
        )
    ]
    assert export(json_rows(tmp_path / "rows.json", rows), tmp_path / "out") == 0
    records = llamafactory_rules(tmp_path / "out", "rows")
    asked = "Which?"
    assert [m["content"] for m in records[0]["messages"]] == [asked, "It is < audio >."]
    assert [m["content"] for m in records[1]["messages"]] == [
        "Look.", f"{asked}\n{asked}", "<answer>cat</answer>",
    ]  # fmt: skip
    assert len(records) == 3 and len(records[2]["messages"]) == 4
    assert "row 2 left out: prompt: expected user and assistant" in capsys.readouterr().out
