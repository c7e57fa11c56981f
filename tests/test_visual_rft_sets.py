"""Visual-RFT's nine data sets: from the official layout, small, to a model evaluated on it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import read_jsonl
from PIL import Image
from test_build import aircraft, cars, flowers, pets

from virft_fast.data.__main__ import main as data_main
from virft_fast.evaluate import main as evaluate_main
from virft_fast.tasks.prompts import COCO_8, LVIS_6, NOVEL_15
from virft_fast.train import main as train_main

NUM_IMAGES = 5


def instances(root, names, key):
    """Each image with one box of every category, in COCO's or LVIS's layout."""
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for number in range(1, NUM_IMAGES + 1):
        file = f"val2017/{number:012d}.jpg"
        (root / "images/val2017").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + 20 * number, 80), (40 * number, 90, 30)).save(root / "images" / file)
        where = {"coco_url": f"http://images.cocodataset.org/{file}"}
        image = {"id": number, "width": 60 + 20 * number, "height": 80}
        image |= where if key == "lvis" else {"file_name": file.split("/")[1]}
        if key == "lvis":
            image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        images.append(image)
        for category in range(len(names)):
            x, y = rng.uniform(0, 30, 2).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category + 1,
                 "bbox": [x, y, 30.0, 20.0], "area": 600.0, "iscrowd": 0}
            )  # fmt: skip
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(data))
    return root / "instances.json"


def lisa(root):
    for split in ("train", "test"):
        folder = root / split
        folder.mkdir(parents=True)
        Image.new("RGB", (100, 60), (9, 90, 200)).save(folder / "1.jpg")
        square = [[10, 10], [39, 10], [39, 39], [10, 39]]
        shapes = [{"label": "target", "points": square}]
        (folder / "1.json").write_text(json.dumps({"text": ["a", "b"], "shapes": shapes}))


DETECTION = {
    # name: (kind, categories there, what is trained on, what is evaluated)
    "coco_all": ("coco", ("person", "cat", "dog"), ("all",), "all"),
    "coco_base65": ("coco", ("person", "dog", *NOVEL_15), ("base65",), "novel15"),
    "coco_8_cate_4_shot": ("coco", COCO_8, ("few8", "--shots", "4"), "few8"),
    "lvis_few_shot": ("lvis", (*LVIS_6, "zebra"), ("lvis6", "--shots", "10"), "lvis6"),
}
CLASSIFICATION = {"flowers102": flowers, "aircraft": aircraft, "cars196": cars, "pets37": pets}


def build(*argv):
    assert data_main(["build", *map(str, argv)]) == 0


@pytest.mark.parametrize("name", [*DETECTION, *CLASSIFICATION, "lisa"])
def test_build_train_evaluate(name, tmp_path, sam_path):
    source, data, model = tmp_path / "source", tmp_path / "data", tmp_path / "model"
    source.mkdir()
    argv = ["--dataset_name", data, "--split", "test"]
    if name in DETECTION:
        kind, names, trained, evaluated = DETECTION[name]
        file = instances(source, names, kind)
        images = source / "images" / ("val2017" if kind == "coco" else "")
        build(kind, "--annotations", file, "--images", images, "--categories", *trained,
              "--output", data)  # fmt: skip
        argv = ["--task", kind, "--annotations", file, "--images", images,
                "--categories", evaluated]  # fmt: skip
        measures, task = {"mAP", "mAP50"}, "detection"
    elif name == "lisa":
        lisa(source)
        build("grounding", "--source", source, "--output", data)
        argv += ["--task", "grounding", "--sam_path", sam_path]
        measures, task = {"box_iou", "gIoU", "cIoU"}, "grounding"
    else:
        CLASSIFICATION[name](source)
        shots = ("--shots", 2 if name == "flowers102" else 1)
        build("classification", "--reader", name, "--source", source, *shots, "--output", data)
        argv += ["--task", "classification"]
        measures, task = {"closed_set_accuracy", "mean_class_accuracy"}, "classification"
    train = ["--dataset_name", data, "--output_dir", model, "--max_steps", 2, "--beta", 0,
             "--num_generations", 2, "--max_completion_length", 8, "--save_steps", 0]  # fmt: skip
    assert train_main([str(part) for part in train]) == 0
    steps = read_jsonl(model / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    output = tmp_path / "answers.jsonl"
    argv += ["--model_name_or_path", model, "--output", output, "--max_samples", 4,
             "--max_completion_length", 8, "--bootstrap", 20, "--pictures", 1]  # fmt: skip
    assert evaluate_main([str(part) for part in argv]) == 0
    summary = json.loads(output.with_suffix(".summary.json").read_text())
    assert summary["task"] == task
    assert summary["num_samples"] == len(read_jsonl(output)) > 0
    assert summary["counts"]["rows that can't be used"] == 0
    assert measures <= set(summary["means"])
    assert all(0 <= summary["means"][measure] <= 1 for measure in measures)
    assert output.with_suffix(".html").read_text().count("data:image/jpeg") == 1
