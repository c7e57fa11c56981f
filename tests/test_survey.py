"""The table at the start of a run: what is kept, left out and converted, and the boxes' space."""

from __future__ import annotations

import functools
import json

import datasets
import pytest
from PIL import Image

from virft_fast import tasks
from virft_fast.config import EvalConfig, column_names
from virft_fast.data import survey as survey_module
from virft_fast.data.inspection import inspect
from virft_fast.data.loading import load_rows
from virft_fast.data.prompt_source import PromptSource
from virft_fast.data.samples import BadRow, SampleDataset, taught_answer
from virft_fast.data.survey import survey
from virft_fast.evaluation.sources import of_dataset
from virft_fast.tasks.rewards import accuracy, knowing_classes
from virft_fast.train import main


def rows_of(boxes, size=(1920, 1080), problem="Find the red one."):
    return [
        {"image": Image.new("RGB", size), "problem": problem, "solution": f"<answer>{b}</answer>"}
        for b in boxes
    ]


def samples_of(rows, **options):
    def check(*solution, **more):
        return tasks.check_solution("detection", *solution, **more)

    return SampleDataset(rows, check_solution=check, **options)


@pytest.mark.parametrize(
    "rows, said",
    [
        (rows_of(["[1200, 100, 1800, 900]", "[10, 20, 30, 40]"]), "a box [1200.0, 100.0"),
        (rows_of(["[10, 20, 30, 40]"], problem="Give the box in pixels."), "mentions pixels"),
        (rows_of(["[0.1, 0.2, 0.5, 1.0]"]), "pass --box_space unit"),
    ],
    ids=["past 1000", "asked for", "unit"],
)
def test_signs_of_another_space_are_refused(rows, said):
    with pytest.raises(ValueError, match="--box_space auto") as caught:
        survey(samples_of(rows), boxes=True).settle_boxes()
    assert said in str(caught.value)


def test_large_images_are_warned_about_and_small_ones_are_not():
    for size, warned in (((1920, 1080), True), ((640, 480), False)):
        found = survey(samples_of(rows_of(["[10, 20, 300, 400]"], size)), boxes=True)
        assert bool(found.settle_boxes()) == warned


def test_a_column_extent_settles_it():
    rows = [row | {"extent": [1920, 1080]} for row in rows_of(["[1200, 100, 1800, 900]"])]
    found = survey(samples_of(rows), boxes=True)
    assert found.kept == 1 and found.settle_boxes() is None


@pytest.mark.parametrize(
    "space, box", [("pixels", [192, 108, 960, 540]), ("unit", [0.1, 0.1, 0.5, 0.5])]
)
def test_boxes_of_a_named_space_are_converted_to_what_the_model_answers_in(space, box, processor):
    """Up to the encoded prompt, which refuses a space that the model doesn't see."""
    samples = samples_of(rows_of([box]), box_space=space)
    prompt = PromptSource(samples, processor).load(0)
    assert not isinstance(prompt, BadRow), prompt.reason
    columns = {name: [value] for name, value in prompt.sample.columns.items()}
    assert "extent" not in columns and "completion" not in columns
    for answer, right in (([100, 100, 500, 500], 1.0), (box, 0.0)):
        completion = [f"<answer>{list(answer)}</answer>"]
        assert tasks.REWARDS["accuracy_iou"](None, completion, **columns) == [right]
    found = survey(samples, boxes=False)
    assert found.account.converted == {f"boxes in {space} to thousandths": ["row 0"]}


@pytest.mark.parametrize("solution, wanted", [
    ("<answer> (200,50),(1000,250) </answer>", "<answer> (100,100),(500,500) </answer>"),
    ("[{'Position': [200, 50, 1000, 250], 'Confidence': 0.5}]",
     "[{'Position': [100, 100, 500, 500], 'Confidence': 0.5}]"),
    ('<think>2 cats, [200, 50, 1000, 250] left.</think>\n<answer>```json\n[{"bbox_2d": [200, 50, '
     '1000, 250], "label": "cat 7", "id": 200}, {"bbox_2d": ["1000", 250, 2000, 500.0]}]\n```',
     '<think>2 cats, [100, 100, 500, 500] left.</think>\n<answer>```json\n[{"bbox_2d": [100, 100, '
     '500, 500], "label": "cat 7", "id": 200}, {"bbox_2d": ["500", 500, 1000, 1000]}]\n```'),
    ("{x1: 200, y1: 50, x2: 1e3, y2: 250, score: 80%}",
     "{x1: 100, y1: 100, x2: 500, y2: 500, score: 80%}"),
    ("<think>colors [255, 0, 0, 128]</think><answer>(200,50),(1000,250)</answer>",
     "<think>colors [255, 0, 0, 128]</think><answer>(100,100),(500,500)</answer>"),
    ("<answer>No Objects</answer>", "<answer>No Objects</answer>"),
    ("a cat of 3", "a cat of 3"),
])  # fmt: skip
def test_conversion_changes_coordinates_alone(solution, wanted):
    assert tasks.in_thousandths(solution, (2000, 500)) == wanted


def test_a_box_whose_numbers_cant_be_told_is_not_converted():
    with pytest.raises(ValueError, match="numbers stand alone"):
        tasks.in_thousandths("[[200, 50, 1000, 250], '10-20-30-40', [1.2.3, 4, 5, 6]]", (2000, 500))


def test_what_is_taught_is_converted():
    """A conversation's answer and TRL's completion are the solution; another text may be, too."""
    image, box = Image.new("RGB", (2000, 500)), "(200,50),(1000,250)"
    chat = [{"role": "user", "content": "Find it."}, {"role": "assistant", "content": box}]
    for row in ({"messages": chat}, {"prompt": "Find it.", "completion": box}):
        sample = samples_of([row | {"images": [image]}], box_space="pixels").get(0)
        assert taught_answer(sample) == "(100,100),(500,500)"
    row = {"image": image, "problem": "Find it.", "solution": box}
    for said, taught in ((f"Here: {box}.", "Here: (100,100),(500,500)."), ("There.", "There.")):
        sample = samples_of([row | {"completion": said}], box_space="pixels").get(0)
        assert (sample.solution, taught_answer(sample)) == ("(100,100),(500,500)", taught)
    asked = samples_of([row | {"problem": "Find it, in pixels."}], box_space="pixels").get(0)
    assert isinstance(asked, BadRow) and "mentions pixels" in asked.reason


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_a_run_trains_on_pixel_boxes(tmp_path, capsys, algorithm):
    Image.new("RGB", (1920, 1080)).save(tmp_path / "a.png")
    row = {"image": "a.png", "problem": "Find it.", "solution": "[1200, 100, 1800, 900]"}
    (tmp_path / "d.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    argv = ["--dataset_name", str(tmp_path / "d.jsonl"), "--max_steps", "1", "--save_steps", "0",
            "--num_generations", "2", "--max_completion_length", "48", "--algorithm", algorithm,
            "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert main(argv) == 2
    assert "pass --box_space pixels" in capsys.readouterr().err
    assert main([*argv, "--box_space", "pixels"]) == 0
    (record,) = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert record["bad_rows"] == 0


def test_a_box_outside_its_image_is_a_bad_row():
    samples = samples_of(rows_of(["[1200, 100, 2800, 900]"]), box_space="pixels")
    assert isinstance(samples.get(0), BadRow)
    assert survey(samples, boxes=False).kept == 0


def test_boxes_of_an_image_that_is_shown_turned_are_counted_as_it_is_shown(tmp_path):
    """Stored 640x480, shown 480x640: of the two boxes only the first fits."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (640, 480)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (480, 640)).save(tmp_path / "plain.jpg")
    names = ("turned", "turned", "plain")
    boxes = ("[240, 64, 480, 320]", "[400, 10, 500, 40]", "[240, 64, 480, 320]")
    rows = [{"image": str(tmp_path / f"{name}.jpg"), "problem": "?", "solution": box}
            for name, box in zip(names, boxes, strict=True)]  # fmt: skip
    samples = samples_of(rows, box_space="pixels")
    assert samples.get(0).solution == samples.get(2).solution == "[500, 100, 1000, 500]"
    assert isinstance(samples.get(1), BadRow)
    found = survey(samples, boxes=False)
    assert found.account.converted["boxes counted in the image as its EXIF data turn it"] == [
        "row 0"
    ]


@pytest.mark.parametrize("space, box", [("pixels", "[20, 5, 100, 25]"),
                                        ("unit", "[0.1, 0.1, 0.5, 0.5]")])  # fmt: skip
def test_a_prompt_with_boxes_that_would_not_be_converted_is_a_bad_row(space, box):
    """A form to answer in, or a box in thousandths where the row's are, is none."""
    image, ask = Image.new("RGB", (200, 50)), {"role": "user", "content": "Find [x1, y1, x2, y2]."}
    answer = {"role": "assistant", "content": box}
    row = {"images": [image], "messages": [ask, answer]}
    for turns in ([ask, answer, ask, answer], [ask | {"content": f"What is in {box}?"}, answer]):
        refused = samples_of([row | {"messages": turns}], box_space=space).get(0)
        assert "expected a prompt without boxes" in refused.reason
    assert samples_of([row], box_space=space).get(0).solution == "[100, 100, 500, 500]"


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    rows = [
        {"image": str(tmp_path / "no.png"), "problem": "?", "solution": "[1, 2, 3, 4]"},
        {"image": str(tmp_path / "none.png"), "problem": "?", "solution": "[1, 2, 3, 4]"},
        {"problem": "<image>?", "solution": "[1, 2, 3, 4]"},
        {"problem": "?", "solution": "a cat"},
        {"problem": "?", "solution": "[1, 2, 3, 4]"},
    ]
    found = survey(samples_of(rows), boxes=True)
    assert found.kept == 1 and sorted(map(len, found.account.left_out.values())) == [1, 1, 2]
    table = "\n".join(found.lines("train"))
    assert table.startswith("train: kept 1 of 5 rows") and "row 0, row 1" in table
    assert "problem + solution (1)" in table


def test_solutions_are_classes_only_if_they_repeat_or_are_few():
    def classes(solutions):
        rows = [{"problem": "?", "solution": solution} for solution in solutions]
        return SampleDataset(rows).classes()

    assert classes(["cat", "dog", "cat"]).labels == ["cat", "dog"]
    assert classes([f"text {n}" for n in range(300)]) is None
    with pytest.raises(ValueError, match="'Cat' and 'cat'"):
        classes(["cat", "Cat"])
    known = knowing_classes(accuracy, classes(["MD-11", "DC-10"]))
    assert known(None, ["MD11"], ["MD-11"]) == [1.0]
    assert accuracy(None, ["MD11"], ["MD-11"]) == [0.0]
    assert known(None, ["MD11"], ["MD-11"], classes=[["MD-11", "MD1-1"]]) == [0.0]


LAYOUTS = {
    "solution": lambda q, a: {"problem": q, "solution": f"<answer>{a}</answer>"},
    "answer": lambda q, a: {"problem": q, "answer": a},
    "completion": lambda q, a: {"prompt": q, "completion": a},
    "response": lambda q, a: {"query": q, "response": a},
    "ground truth": lambda q, a: {"prompt": q, "reward_model": {"ground_truth": a}},
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "conversations": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_knows_the_classes_of_every_layout(layout, tmp_path):
    rows = [LAYOUTS[layout]("Which?", name) for name in ("MD-11", "DC-10", "MD-11")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = of_dataset(EvalConfig(dataset_name=str(tmp_path / "d.jsonl"), split="train"))
    assert questions.task == "classification"
    assert questions.labels.labels == ["DC-10", "MD-11"]
    solutions = [questions.samples().get(index).solution for index in range(3)]
    assert [questions.labels(text) for text in solutions] == ["MD-11", "DC-10", "MD-11"]


def test_the_default_rewards_can_be_earned():
    assert "accuracy_confidence" not in tasks.default_rewards("detection", ["[1, 2, 3, 4]"])
    with_confidence = "[{'Position': [1, 2, 3, 4], 'Confidence': 1}]"
    for solutions in ([with_confidence], [], ["No Objects"]):
        assert tasks.default_rewards("detection", solutions) == tasks.DEFAULT_REWARDS["detection"]


def test_a_run_shows_the_table_and_warns_of_unearned_rewards(tmp_path, capsys, caplog):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "problem": "Find it.", "solution": "[100, 200, 300, 400]"}] * 3
    rows.append({"image": None, "problem": "<image>Find it.", "solution": "[1, 2, 3, 4]"})
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--dataset_name", str(tmp_path / "d.jsonl"), "--max_steps", "1", "--save_steps", "0",
            "--num_generations", "2", "--max_completion_length", "8"]  # fmt: skip
    assert main([*argv, "--output_dir", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().err
    assert "train: kept 3 of 4 rows" in said and "left out" in said
    assert "without the reward accuracy_confidence" in said
    named = ["--reward_funcs", "accuracy_confidence"]
    assert main([*argv, *named, "--output_dir", str(tmp_path / "two")]) == 0
    assert "the solution itself does not earn it in 3 of 3 rows" in caplog.text


def test_columns_of_other_names(tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    rows = [{"img": "a.png", "q": "Which?", "gold": "cat", "solution": "a note"}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    named = {"problem": "q", "solution": "gold", "image": "img"}
    read = load_rows(str(tmp_path / "d.json"), "train", columns=named)
    sample = SampleDataset(read).get(0)
    assert sample.solution == "cat" and len(sample.images) == 1
    read.to_parquet(tmp_path / "p.parquet")
    back = {"problem": "problem", "solution": "solution"}
    load_rows(str(tmp_path / "p.parquet"), "train", columns=back)
    rows[0] |= {"img": str(tmp_path / "a.png")}
    (tmp_path / "d.json").write_text(json.dumps(rows))
    load_rows(str(tmp_path / "d.json"), "train", columns={"problem": "q"}).to_parquet(
        tmp_path / "q.parquet"
    )
    named = {"solution": "gold", "image": "img"}
    streamed = load_rows(str(tmp_path / "q.parquet"), "train", columns=named, streaming=True)
    assert SampleDataset(streamed).get(0).solution == "cat"


@pytest.mark.parametrize(
    "named, said",
    [({"solution": "gold"}, "has no column 'gold', it has problem, answer"),
     ({"truth": "answer"}, "expected one of answer, ")],
)  # fmt: skip
def test_columns_that_are_not_there(tmp_path, named, said):
    (tmp_path / "d.json").write_text(json.dumps([{"problem": "?", "answer": "cat"}]))
    with pytest.raises(ValueError, match="--columns") as caught:
        load_rows(str(tmp_path / "d.json"), "train", columns=named)
    assert said in str(caught.value)


@pytest.mark.parametrize("pairs", [["problem"], ["=x"], ["a=x", "a=y"], ["a=x", "b=x"]], ids=str)
def test_columns_are_pairs(pairs):
    with pytest.raises(ValueError, match="--columns"):
        column_names(pairs)


@pytest.mark.parametrize("name", ["d.json", "d.csv"])
def test_a_guessed_encoding_is_told(tmp_path, name):
    rows = [{"problem": "¿Qué es?", "solution": "el niño pequeño está aquí, señor"}]
    text = json.dumps(rows, ensure_ascii=False)
    if name == "d.csv":
        text = "problem;solution\n" + ";".join(rows[0].values())
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    found = survey(SampleDataset(load_rows(str(tmp_path / name), "train")), boxes=False)
    assert found.solutions == [rows[0]["solution"]]
    assert any("guessed" in line for line in found.lines("train"))
    assert any("cells separated by ';'" in line for line in found.lines("train")) == (
        name == "d.csv"
    )


def test_validation_goes_by_several_names(tmp_path, caplog):
    for name in ("train", "val"):
        rows = datasets.Dataset.from_dict({"problem": ["?"], "solution": [name]})
        rows.to_parquet(tmp_path / f"{name}.parquet")
    assert load_rows(str(tmp_path), "validation")[0]["solution"] == "val"
    assert "its split val is used for validation" in caplog.text
    with pytest.raises(ValueError, match="it has train, val"):
        load_rows(str(tmp_path), "test")


def test_inspection_says_what_a_run_would(tmp_path):
    found = inspect(rows_of(["[1200, 100, 1800, 900]", "[1, 2, 3, 4]"]))
    assert any("--box_space auto" in line for line in found.lines())
    found = inspect(rows_of(["[1200, 100, 1800, 900]"]), box_space="pixels")
    assert found.usable == 1 and any(
        "boxes in pixels to thousandths" in line for line in found.lines()
    )


def test_classes_are_those_of_all_rows_whatever_their_layout(monkeypatch):
    monkeypatch.setattr(survey_module, "MAX_ROWS", 2)
    for column in ("solution", "answer", "response"):
        rows = [{"problem": "?", column: name} for name in ("cat", "dog", "emu", "cat")]
        assert SampleDataset(rows).classes().labels == ["cat", "dog", "emu"]
    turns = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": name}]
        for name in ("cat", "dog", "cat")
    ]
    rows = datasets.Dataset.from_list([{"messages": messages} for messages in turns])
    assert SampleDataset(rows).classes().labels == ["cat", "dog"]


def test_the_names_of_a_class_label_are_answers_and_class_set():
    features = datasets.Features(
        {"problem": datasets.Value("string"),
         "solution": datasets.ClassLabel(names=["cat", "dog", "emu"]),
         "label": datasets.ClassLabel(names=["no", "yes"])}
    )  # fmt: skip
    rows = datasets.Dataset.from_dict(
        {"problem": ["?", "?", "?"], "solution": [1, 0, -1], "label": [1, 0, 1]}, features=features
    )
    samples = SampleDataset(rows)
    assert [samples.get(n).solution for n in (0, 1)] == ["dog", "cat"]
    assert samples.get(2).reason == "solution: missing"
    assert samples.get(0).columns["label"] == 1  # what a reward function of the user's expects
    assert samples.classes().labels == ["cat", "dog", "emu"]


def test_what_the_algorithm_refuses_is_in_the_table():
    rows = [{"problem": "?", "solution": text} for text in ("cat", "a long answer", "dog")]
    found = survey(
        SampleDataset(rows),
        boxes=False,
        check=lambda sample: "the answer is too long" if len(sample.solution) > 5 else None,
    )
    assert found.kept == 2 and found.solutions == ["cat", "dog"]
    assert "the answer is too long" in "\n".join(found.lines("train"))


def test_a_row_whose_own_classes_collide_is_a_bad_one():
    rows = [
        {"problem": "?", "solution": "yes", "choices": ["Yes", "yes", "no"]},
        {"problem": "?", "solution": "yes", "choices": ["yes", "no"]},
    ]
    check = functools.partial(tasks.check_solution, "classification")
    samples = SampleDataset(rows, check_solution=check)
    assert "'Yes' and 'yes'" in samples.get(0).reason
    assert samples.get(1).solution == "yes"
    detection = functools.partial(tasks.check_solution, "detection")
    boxed = [{"problem": "?", "solution": "[1, 2, 3, 4]", "options": ["a", "A"]}]
    assert not isinstance(SampleDataset(boxed, check_solution=detection).get(0), BadRow)


def test_a_box_thinner_than_a_thousandth_keeps_its_place():
    rows = rows_of(["[100, 100, 101, 500]", "[3999, 100, 4000, 500]"], size=(4000, 1000))
    samples = samples_of(rows, box_space="pixels")
    assert "[25, 100, 26, 500]" in samples.get(0).solution
    assert "[999, 100, 1000, 500]" in samples.get(1).solution


def test_an_empty_list_of_images_does_not_hide_another_column(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": [], "images": [], "image_path": str(tmp_path / "a.png"), "problem": "?"}
    sample = SampleDataset([row | {"solution": "cat"}]).get(0)
    assert len(sample.images) == 1
    assert SampleDataset([row | {"solution": "cat", "image_path": None}]).get(0).images == ()


def test_advice_on_questions_that_speak_of_pixels_can_be_followed():
    rows = rows_of(["[10, 20, 30, 40]"], problem="Give the box in pixels.")
    with pytest.raises(ValueError, match="reword these questions, and pass --box_space pixels"):
        survey(samples_of(rows), boxes=True).settle_boxes()
    reworded = samples_of(rows_of(["[10, 20, 30, 40]"]), box_space="pixels")
    assert survey(reworded, boxes=False).kept == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_named_win_over_others(tmp_path, caplog, streaming):
    chat = [{"role": "user", "content": "Which?"}]
    rows = {"prompt": ["other"], "chat": [chat], "solution": ["wrong"], "gold": ["cat"]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    columns = {"messages": "chat", "answer": "gold"}
    loaded = load_rows(str(tmp_path), "train", columns=columns, streaming=streaming)
    sample = SampleDataset(loaded).get(0)
    assert sample.solution == "cat" and sample.columns["problem"] == "Which?"
    assert "because --columns names others: prompt, solution" in caplog.text
