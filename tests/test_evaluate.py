"""`python -m virft_fast.evaluate`: same numbers on any number of ranks, resumed, side by side."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from helpers import read_jsonl
from PIL import Image
from processes import run

from virft_fast.data.__main__ import main as data_main
from virft_fast.data.demo import _split_examples, build_demo
from virft_fast.evaluate import main
from virft_fast.evaluation.scoring import task_measures
from virft_fast.rollout.native import NativeRollout


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes"
    build_demo("shapes_detection", path, num_train=2, num_test=5)
    return path


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Six images of different sizes in COCO's layout: one red shape each, in two a blue one, and a
    category without a box."""
    folder = tmp_path_factory.mktemp("coco")
    examples = (e for e in _split_examples("shapes_detection", "test", 0) if e["colour"] == "red")
    images, annotations = [], []
    (folder / "images").mkdir()
    for number, size in enumerate(
        [(112, 112), (84, 140), (168, 56), (56, 56), (100, 90), (60, 80)]
    ):
        example = next(examples)
        example["image"].resize(size).save(folder / f"images/{number:04d}.png")
        images.append(
            {"id": number + 1, "file_name": f"{number:04d}.png", "width": size[0],
             "height": size[1]}
        )  # fmt: skip
        x1, y1, x2, y2 = (v / 1000 * side for v, side in zip(example["box"], 2 * size, strict=True))
        for category in (1, 2) if number < 2 else (1,):
            annotations.append(
                {"id": len(annotations), "image_id": number + 1, "category_id": category,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
            )  # fmt: skip
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(("red", "blue", "horse"))]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))
    return folder


def coco_argv(coco, output, *more):
    argv = ["--task", "coco", "--annotations", coco / "instances.json", "--images",
            coco / "images", "--output", output, "--batch_size", 3, "--max_completion_length", 12,
            "--pictures", 2, "--bootstrap", 20, *more]  # fmt: skip
    return [str(part) for part in argv]


BOXES = "<answer>[{'Position': [0, 0, 1000, 1000], 'Confidence': 0.8}]</answer>"


@pytest.fixture
def answers(monkeypatch):
    """Canned answers in the place of the model's: a call of the rollout is written down, and says
    what `say` makes of a sample."""

    class Answers:
        calls = 0
        asked: list = []
        say = staticmethod(lambda sample: BOXES)

    def generate(self, prompts, num_generations, sampling, *, first_row=0):
        from dataclasses import replace

        Answers.calls += 1
        Answers.asked += [prompt.sample for prompt in prompts]
        rollouts = make(self, prompts, num_generations, replace(sampling, max_completion_length=1))
        return replace(rollouts, texts=tuple(Answers.say(prompt.sample) for prompt in prompts))

    make = NativeRollout.generate
    Answers.asked = []
    monkeypatch.setattr(NativeRollout, "generate", generate)
    return Answers


def evaluate(shapes, output, **options):
    argv = ["--dataset_name", shapes, "--output", output, "--batch_size", 2,
            "--max_completion_length", 48]  # fmt: skip
    return run(*argv, module="virft_fast.evaluate", **options)


def test_two_ranks_give_what_one_gives(coco, tmp_path):
    """Images of different sizes, and fewer in the last batch than ranks."""
    (tmp_path / "map.json").write_text(
        json.dumps({n: ["red", "blue"][: 1 + (n < 2)] for n in range(1, 7)})
    )
    one, two = (
        coco_argv(coco, tmp_path / f"{n}.jsonl", "--categories", "red,blue",
                  "--exists_map", tmp_path / "map.json")
        for n in (1, 2)
    )  # fmt: skip
    assert main(one) == 0
    done = run(*two, module="virft_fast.evaluate", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy_iou" in done.stdout
    one, two = (read_jsonl(tmp_path / f"{n}.jsonl") for n in (1, 2))
    assert one == two and [record["index"] for record in one] == list(range(7))
    summaries = [json.loads((tmp_path / f"{n}.summary.json").read_text()) for n in (1, 2)]
    assert summaries[0]["num_samples"] == 7
    assert set(summaries[0]["means"]) >= {"accuracy_iou", "format", "mean_iou", "ap50", "mAP"}
    for key in ("means", "intervals", "categories", "counts"):
        assert summaries[0][key] == summaries[1][key]
    assert (tmp_path / "1.predictions.json").read_bytes() == (
        tmp_path / "2.predictions.json"
    ).read_bytes()


@pytest.mark.parametrize("most, images, questions", [(1, 1, 2), (5, 2, 4), (99, 6, 12)])
def test_a_part_of_the_questions_is_about_whole_images(
    coco, tmp_path, answers, most, images, questions
):
    """What is in the others is not missed."""
    argv = coco_argv(coco, tmp_path / "out.jsonl", "--categories", "red,blue")
    assert main([*argv, "--max_samples", str(most)]) == 0
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["counts"]["images"] == images and summary["num_samples"] == questions
    assert len(json.loads((tmp_path / "out.truth.json").read_text())["images"]) == images


def test_models_and_outputs_with_similar_names_do_not_collide(tmp_path):
    from virft_fast.evaluation.files import of_models
    from virft_fast.evaluation.journal import companion

    places = of_models(tmp_path / "x.jsonl", ["a/b", "a-b", "c"])
    assert len(set(places)) == 3 and places[2] == tmp_path / "x.c.jsonl"
    assert companion(tmp_path / "v1.5", ".summary.json") == tmp_path / "v1.5.summary.json"


def test_the_tiny_model_finds_some_of_its_shapes(shapes, tmp_path, capsys):
    """End to end with the model's own answers."""
    output = tmp_path / "out.jsonl"
    argv = ["--dataset_name", shapes, "--output", output, "--task", "coco", "--bootstrap", 20]
    assert main([str(part) for part in argv]) == 0
    means = json.loads(output.with_suffix(".summary.json").read_text())["means"]
    assert means["format"] == 1.0
    assert 0 < means["mean_iou"] < 1
    # All of one class and every image asked about: COCO's AP50 is the pooled one.
    assert means["mAP50"] == pytest.approx(means["ap50"], abs=1e-6)
    assert "mAP" in capsys.readouterr().out


def test_coco_from_annotations(coco, tmp_path, answers):
    """Whole-image boxes for red on every image, 'No Objects' for blue."""
    from virft_fast.tasks.prompts import detection_problem

    answers.say = lambda s: BOXES if s.columns["category"] == "red" else "No Objects"
    output = tmp_path / "out.jsonl"
    assert main(coco_argv(coco, output, "--categories", "red,blue")) == 0
    assert len(answers.asked) == 12
    assert answers.asked[0].columns["problem"] == detection_problem("red")
    predictions = json.loads(output.with_suffix(".predictions.json").read_text())
    sizes = [list(Image.open(path).size) for path in sorted((coco / "images").iterdir())]
    assert predictions == [
        {"image_id": i + 1, "category_id": 1, "bbox": [0, 0, *size], "score": 0.8}
        for i, size in enumerate(sizes)
    ]
    summary = json.loads(output.with_suffix(".summary.json").read_text())
    found = {row["category"]: row for row in summary["categories"]}
    assert (found["red"]["objects"], found["red"]["predictions"]) == (6, 6)
    assert (found["blue"]["objects"], found["blue"]["AP"]) == (2, 0)
    assert summary["means"]["mAP"] == pytest.approx(found["red"]["AP"] / 2)
    assert set(summary["intervals"]) >= {"mAP", "AP/red", "mean_iou"}
    page = output.with_suffix(".html").read_text()
    assert page.count("data:image/jpeg") == 2 and "AP50" in page
    report = output.with_suffix(".md").read_text()
    assert re.search(r"\| red \| 6 \| 6 \| ", report) and "| mAP | " in report
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"out.{e}" for e in ("jsonl", "summary.json", "predictions.json", "truth.json",
                                         "md", "html")}  # fmt: skip


def test_pycocotools_reads_what_is_written(coco, tmp_path, answers):
    from pycocotools.coco import COCO

    output = tmp_path / "out.jsonl"
    assert main(coco_argv(coco, output)) == 0
    truth = COCO(str(output.with_suffix(".truth.json")))
    results = truth.loadRes(str(output.with_suffix(".predictions.json")))
    assert len(results.anns) == 12 and len(truth.anns) == 8


def test_only_what_exists_is_asked_about(coco, tmp_path, answers):
    given = tmp_path / "map.json"
    given.write_text(json.dumps({"1": ["red", "blue", "zebra"], "0003.png": ["red"], "5": []}))
    assert main(coco_argv(coco, tmp_path / "out.jsonl", "--exists_map", given)) == 0
    asked = [(s.columns["image_id"], s.columns["category"]) for s in answers.asked]
    assert asked == [(1, "red"), (1, "blue"), (4, "red")]
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    # What nobody asked about is still to be found.
    assert [row["objects"] for row in summary["categories"]] == [6, 2]
    assert summary["counts"]["images"] == 6


def test_the_model_is_asked_what_exists(coco, tmp_path, answers):
    def say(sample):
        if "Which of these categories are in the image: red, blue?" not in str(sample.messages):
            return BOXES
        return "<answer>Blue</answer>" if sample.columns["image_id"] == 2 else "I can't see any."

    answers.say = say
    output = tmp_path / "out.jsonl"
    assert main(coco_argv(coco, output, "--ask_exists")) == 0
    assert [s.columns["category"] for s in answers.asked[6:]] == ["blue"]
    exists = {str(n): ["blue"] if n == 2 else [] for n in range(1, 7)}
    assert json.loads(output.with_suffix(".exists_map.json").read_text()) == exists
    # The map it made is one to be given.
    assert main(coco_argv(coco, tmp_path / "again.jsonl", "--exists_map",
                          output.with_suffix(".exists_map.json"))) == 0  # fmt: skip
    for name in ("out", "again"):
        assert [r["category"] for r in read_jsonl(tmp_path / f"{name}.jsonl")] == ["blue"]


def test_a_model_that_sees_nothing_has_an_ap_of_zero(coco, tmp_path, answers):
    answers.say = lambda sample: "nothing"
    assert main(coco_argv(coco, tmp_path / "out.jsonl", "--ask_exists")) == 0
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["means"]["mAP"] == 0 and summary["num_samples"] == 0


def test_a_built_data_set_has_its_own_truth(coco, tmp_path, answers):
    """The same AP as from the annotations where the same is asked, boxes in thousandths apart."""
    built = tmp_path / "built"
    argv = ["build", "coco", "--annotations", coco / "instances.json", "--images", coco / "images",
            "--output", built]  # fmt: skip
    assert data_main([str(part) for part in argv]) == 0
    given = tmp_path / "map.json"
    given.write_text(json.dumps({str(n): ["red", "blue"][: 1 + (n < 3)] for n in range(1, 7)}))
    common = ["--task", "coco", "--bootstrap", "0", "--pictures", "0"]
    own = [*common, "--dataset_name", built, "--split", "train", "--output", tmp_path / "own.jsonl"]
    assert main([str(part) for part in own]) == 0
    assert main([*coco_argv(coco, tmp_path / "file.jsonl"), "--exists_map", str(given)]) == 0
    one, two = (
        json.loads((tmp_path / f"{name}.summary.json").read_text()) for name in ("own", "file")
    )
    assert one["num_samples"] == two["num_samples"] == 8
    by_name = [{row["category"]: row["objects"] for row in s["categories"]} for s in (one, two)]
    assert by_name[0] == by_name[1] == {"red": 6, "blue": 2}
    assert one["means"]["mAP50"] == pytest.approx(two["means"]["mAP50"], abs=1e-6)
    answers.asked.clear()
    assert main([*map(str, own), "--categories", "blue", "--overwrite"]) == 0
    assert [s.columns["image_id"] for s in answers.asked] and {
        s.columns["category"] for s in answers.asked
    } == {"blue"}
    given.write_text(json.dumps({"1": ["blue"], "2": []}))
    answers.asked.clear()
    assert main([*map(str, own), "--exists_map", str(given), "--overwrite"]) == 0
    asked = [(s.columns["image_id"], s.columns["category"]) for s in answers.asked]
    assert asked == [(1, "blue")]


def test_questions_are_in_the_space_of_the_models_family(coco, tmp_path, processor):
    """Qwen2.5-VL counts pixels of the image as its processor resizes it."""
    from virft_fast.config import EvalConfig
    from virft_fast.data.prompt_source import PromptSource
    from virft_fast.evaluation.run import ModelEvaluation
    from virft_fast.evaluation.sources import images_of, of_annotations
    from virft_fast.tasks import parse_detection

    config = EvalConfig(
        task="coco", annotations=str(coco / "instances.json"), images=str(coco / "images")
    )
    cpu = torch.device("cpu")
    evaluation = ModelEvaluation(config, tmp_path / "x.jsonl", cpu)
    boxes = {}
    for family in ("qwen2_vl", "qwen2_5_vl"):
        evaluation.model.family = family
        asked = of_annotations(config, images_of(config), None, evaluation.model.extent_for())
        source = PromptSource(asked.samples(), processor, check=asked.check)
        prompts = [source.load(index) for index in asked.indices]
        boxes[family] = []
        for prompt in prompts:
            extent = prompt.sample.columns["extent"]
            pixels = "absolute pixel" in prompt.sample.columns["problem"]
            assert pixels == (family == "qwen2_5_vl") == (extent is not None)
            boxes[family] += parse_detection(prompt.sample.solution, extent).boxes
    assert len(boxes["qwen2_vl"]) == 8
    for one, two in zip(*boxes.values(), strict=True):
        assert one == pytest.approx(two, abs=1 + 1000 / 56)  # a pixel of the smallest side


KILLED = """
import os, signal, sys
from virft_fast.evaluate import main
from virft_fast.evaluation.journal import Journal

add, calls = Journal.add, []

def add_or_die(self, stage, records):
    calls.append(stage)
    if len(calls) == 3:
        with self.path.open("a") as file:
            file.write('{"stage": "answer", "record": {"ind')
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, stage, records)

Journal.add = add_or_die
main(sys.argv[1:])
"""


def test_a_killed_evaluation_goes_on_without_asking_again(coco, tmp_path, monkeypatch, capsys):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    argv = coco_argv(coco, output)
    done = run(*argv, module=KILLED)
    assert done.returncode == -signal.SIGKILL
    assert not output.exists() and not output.with_suffix(".summary.json").exists()
    journal = output.with_suffix(".journal")
    assert journal.read_text().count("\n") == 1 + 6 and not journal.read_text().endswith("\n")
    # Under other settings nothing is asked, and nothing of it is lost.
    before = journal.read_bytes()
    assert main([*argv, "--max_completion_length", "13"]) == 2
    assert "max_completion_length 12 there and 13 here" in capsys.readouterr().err
    assert journal.read_bytes() == before
    asked = []
    generate = NativeRollout.generate

    def note(self, prompts, *more, **options):
        asked.extend(prompt.sample.index for prompt in prompts)
        return generate(self, prompts, *more, **options)

    monkeypatch.setattr(NativeRollout, "generate", note)
    assert main(argv) == 0
    assert asked == list(range(6, 12))
    assert not journal.exists()
    assert main(coco_argv(coco, whole)) == 0
    assert read_jsonl(output) == read_jsonl(whole)
    for name in ("means", "intervals", "categories"):
        one, two = (
            json.loads(p.with_suffix(".summary.json").read_text())[name] for p in (output, whole)
        )
        assert one == two


def test_what_is_done_is_not_asked_again_unless_the_model_changes(
    shapes, tmp_path, answers, capsys
):
    model = tmp_path / "model"
    from virft_fast.models.tiny import resolve_model_path

    shutil.copytree(resolve_model_path("tiny"), model)
    argv = ["--model_name_or_path", str(model), "--dataset_name", str(shapes), "--output",
            str(tmp_path / "out.jsonl"), "--max_samples", "3", "--pictures", "0"]  # fmt: skip
    assert main(argv) == 0
    assert main([*argv, "--bootstrap", "10"]) == 0
    assert len(answers.asked) == 3
    assert main([*argv, "--max_samples", "5"]) == 0
    assert len(answers.asked) == 5
    # The answers beyond are not counted, and not lost.
    for _ in range(2):
        assert main([*argv, "--max_samples", "2"]) == 0
        assert len(read_jsonl(tmp_path / "out.jsonl")) == 2
    assert main([*argv, "--max_samples", "5"]) == 0
    assert len(answers.asked) == 5 and not (tmp_path / "out.journal").exists()
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 5
    assert main([*argv, "--overwrite"]) == 0
    assert len(answers.asked) == 8
    weights = next(model.glob("*.safetensors"))
    os.utime(weights, ns=(0, 0))  # a copy is the same model
    assert main(argv) == 0
    assert len(answers.asked) == 8
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    before = (tmp_path / "out.jsonl").read_bytes()
    assert main(argv) == 2
    assert "out.summary.json holds a run that is done, made with" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert main([*argv, "--overwrite"]) == 0
    assert len(answers.asked) == 11


@pytest.mark.parametrize(
    "damage",
    [
        {"out.jsonl": "5\n{}\n"},
        {"out.jsonl": '{"index": 0}\n[1]\n'},
        {"out.jsonl": "\udcff"},
        {"out.summary.json": "[]", "out.journal": ""},
        {"out.journal": '{"settings": 0}\n{"settings": 1}\n{"stage": [], "record": {}}\n'},
        {"out.journal": '{"settings": 0}\n{"stage": "answer", "record": {"index": 0}}\n'},
        {"out.journal": '{"settings": 0}\n{"stage": "answer", "record": 5}\n'},
    ],
    ids=str,
)
def test_records_that_nobody_wrote_are_asked_again(shapes, tmp_path, answers, damage):
    argv = ["--dataset_name", str(shapes), "--output", str(tmp_path / "out.jsonl"), "--pictures",
            "0", "--bootstrap", "0"]  # fmt: skip
    assert main(argv) == 0
    summary = tmp_path / "out.summary.json"
    settings = json.dumps(json.loads(summary.read_text())["settings"])
    if "out.journal" in damage:
        summary.unlink()
    for name, text in damage.items():
        text = text.replace('"settings": 0', f'"settings": {settings}')
        (tmp_path / name).write_text(text, errors="surrogateescape")
    assert main(argv) == 0
    assert len(answers.asked) == 10 and len(read_jsonl(tmp_path / "out.jsonl")) == 5


def test_what_is_read_or_something_else_is_not_written_over(
    coco, shapes, tmp_path, answers, capsys
):
    """What is read not with --overwrite either."""
    for name, file in (
        ("--annotations", "val.truth.json"),
        ("--exists_map", "val.exists_map.json"),
    ):
        shutil.copy(coco / "instances.json", tmp_path / file)
        before = (tmp_path / file).read_bytes()
        argv = coco_argv(coco, tmp_path / "val.jsonl", name, tmp_path / file, "--overwrite")
        assert main(argv) == 2
        assert f"{file} is read by this evaluation" in capsys.readouterr().err
        assert (tmp_path / file).read_bytes() == before
        (tmp_path / file).unlink()
    rows = tmp_path / "mydata.jsonl"
    rows.write_text('{"problem": "?", "solution": "<answer>cat</answer>"}\n')
    argv = ["--dataset_name", str(rows), "--split", "train", "--output", str(rows)]
    assert main([*argv, "--overwrite"]) == 2
    other = ["--dataset_name", str(shapes), "--output", str(rows), "--pictures", "0"]
    assert main(other) == 2
    assert "mydata.jsonl is something else; --overwrite replaces it" in capsys.readouterr().err
    (tmp_path / "out.md").write_text("mine")
    assert main([*other, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert rows.read_text().startswith('{"problem"') and not answers.calls
    assert main([*other, "--overwrite"]) == 0 and len(read_jsonl(rows)) == 5


def test_different_questions_have_different_default_names(tmp_path, monkeypatch):
    from virft_fast.config import EvalConfig
    from virft_fast.evaluate import output_path

    monkeypatch.chdir(tmp_path)
    common = {"task": "coco", "annotations": "instances_val2017.json", "images": "val2017"}
    configs = [
        EvalConfig(**common, categories="novel15", exists_map="exist_map.json"),
        EvalConfig(**common, categories="few8", ask_exists=True),
        EvalConfig(**common, categories="few8"),
        EvalConfig(**common | {"annotations": "b/instances_val2017.json"}, categories="few8"),
        EvalConfig(**common, categories="few8", model_name_or_path="Qwen/Qwen2-VL-2B"),
        EvalConfig(**common, categories="few8", compare=["tiny", "Qwen/Qwen2-VL-2B"]),
        EvalConfig(dataset_name="x/data"),
        EvalConfig(dataset_name="y/data"),
        EvalConfig(dataset_name="y/data", task="classification"),
        EvalConfig(dataset_name="y/data", split="train"),
    ]
    names = [output_path(config).name for config in configs]
    assert len(set(names)) == len(names)
    assert re.fullmatch(r"eval_tiny_instances_val2017_coco_few8_ask_\w{6}\.jsonl", names[1])
    # Fewer samples or other rewards are no other questions.
    fewer = EvalConfig(dataset_name="x/data", max_samples=3, reward_funcs=["format"])
    assert output_path(fewer) == output_path(configs[6])


@pytest.mark.parametrize("kind", ["stored", "named", "annotated"])
def test_answers_are_about_the_images_that_were_seen(coco, shapes, tmp_path, answers, capsys, kind):
    import datasets

    def draw(colour):
        Image.new("RGB", (56, 56), colour).save(tmp_path / "image.png")
        row = {"problem": "What is it?", "solution": "<answer>cat</answer>"}
        stored = {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}
        rows = datasets.Dataset.from_list([row | {"image": stored}])
        rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "stored.parquet")
        (tmp_path / "named.jsonl").write_text(json.dumps(row | {"image_path": "image.png"}))
        shutil.copy(tmp_path / "image.png", coco_copy / "images/0000.png")

    coco_copy = tmp_path / "coco"
    shutil.copytree(coco, coco_copy)
    output = tmp_path / "out.jsonl"
    source = tmp_path / ("named.jsonl" if kind == "named" else "stored.parquet")
    argv = coco_argv(coco_copy, output) if kind == "annotated" else [
        "--dataset_name", str(source), "--split", "train", "--task", "classification",
        "--output", str(output), "--pictures", "0", "--bootstrap", "0"]  # fmt: skip
    draw("red")
    assert main(argv) == 0 == main(argv)
    draw("blue")
    os.utime(tmp_path / "image.png", ns=(0, 0))
    assert main(argv) == 2
    assert re.search("made with other settings: questions '\\w+' there", capsys.readouterr().err)


def test_stale_answers_to_what_exists_are_refused(coco, tmp_path, answers, capsys):
    shutil.copy(coco / "instances.json", tmp_path / "instances.json")
    argv = coco_argv(coco, tmp_path / "out.jsonl", "--ask_exists", "--annotations",
                     tmp_path / "instances.json")  # fmt: skip
    assert main(argv) == 0
    data = json.loads((coco / "instances.json").read_text())
    data["annotations"][0]["bbox"][2] += 3
    (tmp_path / "instances.json").write_text(json.dumps(data))
    assert main(argv) == 2
    assert "questions" in capsys.readouterr().err


def test_another_reading_measures_all_answers_again_and_asks_nothing(
    shapes, tmp_path, answers, capsys
):
    """A file holds the measures of one reading, and its summary and report say of which."""
    answers.say = staticmethod(lambda sample: BOXES.removesuffix("</answer>"))
    argv = ["--dataset_name", str(shapes), "--output", str(tmp_path / "out.jsonl"), "--pictures",
            "0", "--bootstrap", "0"]  # fmt: skip
    found = {}
    for reading in ("lenient", "visual_rft", "lenient"):
        assert main([*argv, "--answers", reading]) == 0
        summary = json.loads((tmp_path / "out.summary.json").read_text())
        assert summary["config"]["answers"] == reading
        assert found.setdefault(reading, summary["means"]) == summary["means"]
        for text in (capsys.readouterr().out, (tmp_path / "out.md").read_text()):
            assert ("read as visual_rft" in text) == (reading == "visual_rft")
    assert found["visual_rft"]["mean_iou"] == 0 < found["lenient"]["mean_iou"]
    assert len(answers.asked) == 5


def test_other_rewards_ask_nothing_again(shapes, tmp_path, answers):
    """Nor does the same function once its file is another one."""
    file = tmp_path / "mine.py"
    argv = ["--dataset_name", str(shapes), "--output", str(tmp_path / "out.jsonl"), "--pictures",
            "0", "--bootstrap", "0"]  # fmt: skip
    assert main(argv) == 0
    text = """def mine(prompts, completions, solution, completion_ids, **columns):
    assert all("Confidence" in c[0]["content"] for c in completions) and all(completion_ids)
    assert all(text.startswith("<answer>") for text in solution) and prompts[0][0]["role"]
    return [%s] * len(prompts)
"""
    for value in (0.25, 0.75):
        file.write_text(text % value)
        assert main([*argv, "--reward_funcs", f"{file}:mine", "format"]) == 0
        summary = json.loads((tmp_path / "out.summary.json").read_text())
        assert summary["means"]["mine"] == value and "accuracy_iou" not in summary["means"]
    assert len(answers.asked) == 5


@pytest.mark.parametrize(
    "given, numbers",
    [([7, 7, 9], [7, 7, 9]), (["b", "a", "b"], [0, 1, 0]), ([1, None, 1], [0, 1, 0]),
     ([None, None, None], [0, 1, 2])],
)  # fmt: skip
def test_rows_of_an_image_go_together(tmp_path, answers, given, numbers):
    rows = [
        {"problem": "A 'category 'red''?", "solution": BOXES, "image_id": image,
         "image_path": "x.png"} for image in given
    ]  # fmt: skip
    Image.new("RGB", (56, 56)).save(tmp_path / "x.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = ["--dataset_name", tmp_path / "rows.json", "--split", "train", "--task", "coco",
            "--output", tmp_path / "out.jsonl", "--pictures", "0"]  # fmt: skip
    assert main([str(part) for part in argv]) == 0
    assert [record["image_id"] for record in read_jsonl(tmp_path / "out.jsonl")] == numbers
    truth = json.loads((tmp_path / "out.truth.json").read_text())
    assert len(truth["images"]) == len(set(numbers))


@pytest.mark.parametrize("column", ["problem", "solution", "category"])
def test_a_text_that_is_none_spoils_its_row_alone(tmp_path, answers, capsys, column):
    import pyarrow as pa
    import pyarrow.parquet

    columns = {
        "problem": ["one", "two", "three"], "solution": [BOXES] * 3, "category": ["red"] * 3,
    }  # fmt: skip
    columns["image_path"] = [str(tmp_path / "x.png")] * 3
    Image.new("RGB", (56, 56)).save(tmp_path / "x.png")
    table = pa.table(columns)
    bad = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    place = table.column_names.index(column)
    bad = bad if column == "problem" else pa.chunked_array(
        [table.column(place).slice(0, 1).combine_chunks(), bad.slice(1, 1),
         table.column(place).slice(2).combine_chunks()]
    )  # fmt: skip
    pa.parquet.write_table(table.set_column(place, column, bad), tmp_path / "rows.parquet")
    argv = ["--dataset_name", tmp_path / "rows.parquet", "--split", "train", "--task", "coco",
            "--output", tmp_path / "out.jsonl", "--pictures", "0"]  # fmt: skip
    assert main([str(part) for part in argv]) == 0
    assert [record["index"] for record in read_jsonl(tmp_path / "out.jsonl")] == [0, 2]
    assert "1 rows that can't be used" in capsys.readouterr().out


def test_side_files_of_an_earlier_evaluation_go(coco, shapes, tmp_path, answers):
    output = tmp_path / "out.jsonl"
    assert main(coco_argv(coco, output, "--ask_exists")) == 0
    argv = ["--dataset_name", str(shapes), "--output", str(output), "--pictures", "0"]
    assert main([*argv, "--overwrite"]) == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"out.{ending}" for ending in ("jsonl", "summary.json", "md", "html")}


def test_ctrl_c_leaves_the_journal(shapes, tmp_path, answers, capsys):
    def say(sample):
        if sample.index == 2:
            raise KeyboardInterrupt
        return BOXES

    answers.say = say
    argv = ["--dataset_name", str(shapes), "--output", str(tmp_path / "out.jsonl"), "--batch_size",
            "2"]  # fmt: skip
    assert main(argv) == 130
    assert "interrupted; the same command resumes it" in capsys.readouterr().err
    assert (tmp_path / "out.journal").read_text().count("\n") == 3


def test_a_wrong_model_is_said_before_the_first_is_asked(shapes, tmp_path, answers, capsys):
    argv = ["--dataset_name", str(shapes), "--output", str(tmp_path / "out.jsonl")]
    assert main([*argv, "--compare", "tiny", "tinny"]) == 2
    assert "tinny" in capsys.readouterr().err and not answers.calls


def test_models_side_by_side(shapes, tmp_path, answers, capsys):
    """The second answers every second question with the truth."""
    from virft_fast.models.tiny import resolve_model_path

    model = tmp_path / "trained"
    shutil.copytree(resolve_model_path("tiny"), model)
    answers.say = lambda s: s.solution if answers.calls > 1 and s.index % 2 else "nothing"
    output = tmp_path / "both.jsonl"
    argv = ["--compare", "tiny", str(model), "--dataset_name", str(shapes), "--output", str(output),
            "--bootstrap", "100", "--pictures", "3"]  # fmt: skip
    assert main(argv) == 0
    assert re.search(r"measure +tiny +\S+trained +change", capsys.readouterr().out)
    summary = json.loads(output.with_suffix(".summary.json").read_text())
    assert summary["models"]["tiny"]["mean_iou"] == 0
    assert summary["change"]["mean_iou"]["change"] == pytest.approx(0.4)
    low, high = summary["change"]["mean_iou"]["interval"]
    assert 0 <= low < 0.4 < high <= 1
    assert (
        "| mean_iou | 0.0000 (0.0000 to 0.0000) | 0.4000 (" in output.with_suffix(".md").read_text()
    )
    assert output.with_suffix(".html").read_text().count("data:image/jpeg") == 6
    assert len(list(tmp_path.glob("both.*.jsonl"))) == 2
    asked = len(answers.asked)
    assert main(argv) == 0  # a comparison that was interrupted does nothing twice
    third = tmp_path / "third"
    shutil.copytree(model, third)
    assert main([*argv, "--compare", "tiny", str(model), str(third)]) == 0
    assert len(answers.asked) == asked + 5
    assert main([*argv[3:], "--model_name_or_path", "tiny"]) == 2  # would replace the comparison
    assert "both.summary.json is something else" in capsys.readouterr().err


def test_classification_names_what_is_confused(tmp_path, answers, monkeypatch):
    monkeypatch.setenv("VIRFT_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "digits"
    build_demo("digits_classification", path, num_train=1, num_test=6)
    answers.say = lambda sample: "<answer>The digit is Three.</answer>"
    argv = ["--dataset_name", str(path), "--output", str(tmp_path / "out.jsonl")]
    assert main(argv) == 0
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    records = read_jsonl(tmp_path / "out.jsonl")
    known = {record["true_label"] for record in records}
    expected = "three" if "three" in known else "(none of the labels)"
    assert {record["predicted_label"] for record in records} == {expected}
    assert summary["confusions"][0]["predicted"] == expected
    right = sum(record["true_label"] == "three" for record in records) / 6
    assert summary["means"]["closed_set_accuracy"] == pytest.approx(right)
    assert "Confusions of tiny" in (tmp_path / "out.md").read_text()


@pytest.fixture
def lisa(tmp_path):
    folder = tmp_path / "ReasonSeg/test"
    folder.mkdir(parents=True)
    for name, size in (("one", (100, 50)), ("two", (60, 90))):
        Image.new("RGB", size, (9, 90, 200)).save(folder / f"{name}.jpg")
        square = [[10, 10], [39, 10], [39, 39], [10, 39]]
        shapes = [{"label": "target", "points": square}]
        text = json.dumps({"text": ["what shines"], "shapes": shapes})
        (folder / f"{name}.json").write_text(text)
    out = tmp_path / "lisa"
    assert (
        data_main(["build", "grounding", "--source", str(folder.parent), "--output", str(out)]) == 0
    )
    return out


def test_grounding_with_masks(lisa, sam_path, tmp_path, answers):
    """The first answer has a box, whose mask is SAM's; the second has none, and an empty mask."""
    import datasets

    from virft_fast.data import load_rows
    from virft_fast.evaluation.grounding import MaskModel

    answers.say = lambda s: "<answer>(0,0),(1000,1000)</answer>" if s.index == 0 else "where?"
    output = tmp_path / "out.jsonl"
    argv = ["--dataset_name", str(lisa), "--output", str(output), "--sam_path", str(sam_path),
            "--task", "grounding", "--pictures", "0", "--bootstrap", "10"]  # fmt: skip
    assert main(argv) == 0
    one, two = read_jsonl(output)
    assert [one["image_id"], two["image_id"]] == [0, 1]
    assert two["mask"]["intersection"] == 0 and two["mask"]["union"] == 30 * 30
    row = load_rows(str(lisa), "test")[0]
    sam = MaskModel(str(sam_path), torch.device("cpu"))
    mask = torch.from_numpy(sam([row["image"]], [(0, 0, 1000, 1000)])[0])
    true = torch.tensor(list(row["mask"].get_flattened_data())).view(50, 100) > 0
    assert one["mask"]["intersection"] == int((mask & true).sum())
    assert one["mask"]["union"] == int((mask | true).sum())
    means = json.loads(output.with_suffix(".summary.json").read_text())["means"]
    areas = one["mask"]["intersection"], one["mask"]["union"]
    assert means["gIoU"] == pytest.approx(areas[0] / areas[1] / 2, abs=1e-6)
    assert means["cIoU"] == pytest.approx(areas[0] / (areas[1] + 900))
    assert main(argv) == 0 and len(answers.asked) == 2
    # Other masks are measured again, and a damaged one is said to be.
    rows = load_rows(str(lisa), "test")
    for name in ("image", "mask"):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    damaged = [{**row, "mask": {"bytes": b"junk", "path": None}} for row in rows]
    shutil.rmtree(lisa)
    rows = datasets.Dataset.from_list(damaged, features=rows.features)
    datasets.DatasetDict({"test": rows}).save_to_disk(lisa)
    assert main(argv) == 0 and len(answers.asked) == 2
    report = output.with_suffix(".md").read_text()
    assert "| gIoU | - |" in report and "| rows without a true mask | 2 |" in report


@pytest.mark.parametrize(
    "change, said",
    [
        ({"--categories": "rde"}, "no 'rde' (did you mean 'red'?)"),
        ({"--categories": "horse"}, "no boxes of horse"),
        ({"--annotations": "captions"}, "these are captions"),
        ({"--annotations": "keypoints"}, "no box is usable"),
        ({"--annotations": "list"}, "expected COCO's instances file"),
        ({"--annotations": "none"}, "no such file"),
        ({"--images": "elsewhere"}, "6 of 6 images are missing: "),
        ({"--task": "detection"}, "--task: expected coco or lvis with --annotations"),
        ({"--images": ""}, "--images: expected the folder"),
        ({"--exists_map": "none"}, "--exists_map"),
        ({"--sam_path": "x"}, "--sam_path: expected only with --task grounding"),
        ({"--dataset_name": "x"}, "--dataset_name: expected none with --annotations"),
        ({"--compare": "tiny"}, "--compare: expected two models"),
        ({"--output": "out.md"}, "expected a name for the records"),
    ],
    ids=str,
)
def test_input_that_cant_be_evaluated(coco, tmp_path, capsys, answers, change, said):
    base = json.loads((coco / "instances.json").read_text())
    kinds = {
        "captions": base | {"annotations": [{"image_id": 1, "caption": "a cat"}]},
        "keypoints": base | {"annotations": [{"bbox": [0, 0, 1, 1], "keypoints": [1]}]},
        "list": [1],
    }
    flat = []
    for flag, value in change.items():
        if value in kinds:
            (tmp_path / "kind.json").write_text(json.dumps(kinds[value]))
            value = tmp_path / "kind.json"
        elif flag in ("--annotations", "--exists_map", "--output") or value == "elsewhere":
            value = tmp_path / value
        flat += [flag, str(value)]
    before = set(tmp_path.iterdir())
    assert main([*coco_argv(coco, tmp_path / "out.jsonl"), *flat]) == 2
    assert said in capsys.readouterr().err
    assert set(tmp_path.iterdir()) - {tmp_path / "kind.json"} == before - {tmp_path / "kind.json"}
    assert not answers.calls


def test_missing_and_odd_images_are_counted(coco, tmp_path, capsys, answers):
    folder = tmp_path / "coco"
    shutil.copytree(coco, folder)
    (folder / "images/0000.png").unlink()
    (folder / "images/0001.png").write_bytes(b"no image")
    Image.new("RGB", (9, 99)).save(folder / "images/0002.png")
    output = tmp_path / "out.jsonl"
    assert main(coco_argv(folder, output)) == 2
    assert "1 of 6 images are missing: " in capsys.readouterr().err and not output.exists()
    assert main(coco_argv(folder, output, "--categories", "red", "--allow_missing")) == 0
    summary = json.loads(output.with_suffix(".summary.json").read_text())
    assert summary["counts"] == {
        "questions": 5, "answers": 3, "images": 5, "images missing": 1,
        "boxes that can't be used": 0, "rows that can't be used": 2,
    }  # fmt: skip
    (missing,) = summary["images_missing"]
    assert missing.startswith(str(folder / "images"))
    assert "left out 1 missing images: " in capsys.readouterr().out
    # An image that is there is to be found in, also where it can't be read.
    assert summary["categories"][0]["objects"] == 5


def changed(coco, tmp_path, change):
    data = json.loads((coco / "instances.json").read_text())
    change(data)
    (tmp_path / "changed.json").write_text(json.dumps(data))
    return coco_argv(coco, tmp_path / "out.jsonl", "--annotations", tmp_path / "changed.json")


@pytest.mark.parametrize(
    "bbox", [[1, 2, 3], [0, 0, float("nan"), 5], [0, 0, 5, float("inf")], [3, 3, 0, 9],
             [500, 500, 9, 9]], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("crowd", [0, 1])
def test_a_true_box_that_cant_be_used_is_not_missed(coco, tmp_path, answers, capsys, bbox, crowd):
    def change(data):
        data["annotations"].append(
            {"id": 99, "image_id": 4, "category_id": 2, "bbox": bbox, "iscrowd": crowd}
        )

    assert main(changed(coco, tmp_path, change)) == 0
    assert len(json.loads((tmp_path / "out.truth.json").read_text())["annotations"]) == 8
    assert ("tiny: 1 boxes that can't be used" in capsys.readouterr().out) == (not crowd)


@pytest.mark.parametrize("more", [[], ["--ask_exists"]], ids=str)
def test_annotations_that_ask_nothing(coco, tmp_path, answers, capsys, more):
    argv = changed(coco, tmp_path, lambda data: data["annotations"].clear())
    assert main([*argv, *more]) == 2
    assert "expected boxes in the annotations" in capsys.readouterr().err and not answers.calls


def test_a_category_whose_name_is_no_text_is_left_out_and_named(coco, tmp_path, answers, caplog):
    argv = changed(coco, tmp_path, lambda data: data["categories"][0].update(name="r\ud800"))
    assert main(argv) == 0
    said = r"category without an id or name: 1 ({'id': 1, 'name': 'r\ud800'})"
    assert said in caplog.text
    assert "annotation of a category that isn't listed or used: 6" in caplog.text


def test_a_missing_image_of_an_impossible_name_is_named(coco, tmp_path, answers, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as a terminal's
    monkeypatch.setattr(sys, "stdout", stdout)
    argv = changed(coco, tmp_path, lambda data: data["images"][0].update(file_name="\ud800.png"))
    assert main([*argv, "--allow_missing"]) == 0
    stdout.flush()
    assert rb"\ud800.png" in stdout.buffer.getvalue()


def test_images_that_cant_be_asked_what_they_show_are_counted(coco, tmp_path, answers, capsys):
    folder = tmp_path / "coco"
    shutil.copytree(coco, folder)
    (folder / "images/0001.png").write_bytes(b"no image")
    answers.say = lambda sample: "red, blue"
    assert main(coco_argv(folder, tmp_path / "out.jsonl", "--ask_exists")) == 0
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["bad_rows"] == summary["counts"]["rows that can't be used"] == 1
    assert "tiny: 1 rows that can't be used" in capsys.readouterr().out


def test_what_a_map_has_beside_is_counted(coco, tmp_path, answers, capsys):
    (tmp_path / "map.json").write_text(json.dumps({"1": ["red", "rde", "zebra"], "77": ["rde"]}))
    argv = coco_argv(coco, tmp_path / "out.jsonl", "--exists_map", tmp_path / "map.json")
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "1 images of the map that are unknown" in out
    assert "2 categories of the map that are unknown" in out


@pytest.mark.parametrize("category", ["", "a", "\ud800"])
def test_rows_about_odd_categories(tmp_path, answers, capsys, category):
    row = {"problem": "?", "solution": BOXES, "image_path": "x.png", "image_id": 1}
    Image.new("RGB", (56, 56)).save(tmp_path / "x.png")
    (tmp_path / "rows.json").write_text(json.dumps([row | {"category": category}]))
    argv = ["--dataset_name", tmp_path / "rows.json", "--split", "train", "--task", "coco",
            "--output", tmp_path / "out.jsonl", "--bootstrap", 0]  # fmt: skip
    argv = [str(part) for part in argv]
    assert main(argv) == 0
    answers.asked.clear()
    (tmp_path / "map.json").write_text('{"1": ["zebra"]}')
    assert main([*argv, "--exists_map", str(tmp_path / "map.json")]) == 2
    assert "without a question there is no answer" in capsys.readouterr().err
    # Rows of which nobody knows whether the map is about them are not left out silently.
    both = [row | {"category": category}, row | {"image_id": None}]
    (tmp_path / "rows.json").write_text(json.dumps(both))
    assert main([*argv, "--exists_map", str(tmp_path / "map.json"), "--overwrite"]) == 2
    assert "expected an image_id in every row" in capsys.readouterr().err
    assert not answers.asked


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--max_prompt_length", "0"], "--max_prompt_length: expected a positive number, got 0"),
        (["--max_pixels", "-1"], "--max_pixels: expected a positive number"),
        (["--min_pixels", "9", "--max_pixels", "8"], "--min_pixels: expected at most"),
        (["--split", "dev"], "train, test"),
        (["--model_name_or_path", "nothing-here"], "--model_name_or_path"),
        (["--max_sample", "2"], "--max_samples"),
        (["--reward_funcs", "acuracy"], "accuracy"),
        (["--rollout_cache_tokens", "256"], "expected at most 256"),
    ],
)
def test_bad_arguments_say_what_was_expected(shapes, capsys, argv, text):
    assert main(["--dataset_name", str(shapes), *argv]) == 2
    assert text in capsys.readouterr().err


def answer(*boxes):
    items = [{"Position": box, "Confidence": confidence} for box, confidence in boxes]
    return f"<answer>{json.dumps(items)}</answer>"


def test_detection_measures_by_hand():
    """Two images with one true box each. Predictions by confidence: 0.9 hit, 0.8 miss, 0.7 hit:
    precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. Interpolated: 1 up to recall 0.5 (51 of the 101
    points), 2/3 beyond (50 points)."""
    box, far = [0, 0, 100, 100], [500, 500, 600, 600]
    records = [
        {"completion": answer((box, 0.9), (far, 0.8)), "solution": answer((box, 1))},
        {"completion": answer((box, 0.7)), "solution": answer((box, 1))},
    ]
    measures = task_measures("detection", records)
    assert measures["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert measures["mean_iou"] == pytest.approx(1.0)
    assert set(task_measures("grounding", records)) == {"mean_iou"}
    assert task_measures("classification", records) == {}


def test_unreadable_answers_find_nothing():
    records = [{"completion": "what?", "solution": answer(([0, 0, 9, 9], 1))}]
    assert task_measures("detection", records) == {"ap50": 0.0, "mean_iou": 0.0}
