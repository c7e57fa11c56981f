"""Rows as other tools write them: one question, the same images and the same truth from each."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json

import pytest
from PIL import Image

from virft_fast import tasks
from virft_fast.batch import Sample
from virft_fast.data.loading import load_rows
from virft_fast.data.samples import BadRow, SampleDataset

IMAGE = Image.new("RGB", (56, 28), "red")


def encoded():
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def turn(role, content, keys=("role", "content")):
    return dict(zip(keys, (role, content), strict=True))


USER, GPT = turn("user", "<image>What?"), turn("assistant", "cat")
PARTS = [{"type": "image"}, {"type": "text", "text": "What?"}]
OLD = ("from", "value")
LAYOUTS = {
    "Visual-RFT": {"image": IMAGE, "problem": "What?", "solution": "cat"},
    "EasyR1": {"images": [IMAGE], "problem": "<image>What?", "answer": "cat"},
    "TRL": {"images": [IMAGE], "prompt": "What?", "completion": "cat"},
    "TRL's chats": {"images": [IMAGE], "prompt": [turn("user", PARTS)], "completion": [GPT]},
    "verl": {"images": [IMAGE], "prompt": [USER], "reward_model": {"ground_truth": "cat"}},
    "ms-swift": {"images": [IMAGE], "query": "<image>What?", "response": "cat"},
    "messages": {"images": [IMAGE], "messages": [USER, GPT]},
    "message parts": {"images": [IMAGE], "messages": [turn("user", PARTS), GPT]},
    "OpenAI": {"messages": [turn("user", [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded()}"}},
        {"type": "text", "text": "What?"}]), GPT]},
    "images in parts": {"messages": [turn("user", [
        {"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]), GPT]},
    "conversations": {"image": IMAGE, "conversations": [
        turn("human", "<image>What?", OLD), turn("gpt", "cat", OLD)]},
    "conversations of roles": {"image": IMAGE, "conversations": [USER, GPT]},
    "base64": {"image": encoded(), "problem": "What?", "solution": "cat"},
}  # fmt: skip


def read(row):
    return SampleDataset([row]).get(0)


def words(sample):
    """Each turn's role and text, an image as <>."""
    return [(m["role"], "".join("<>" if part["type"] == "image" else part["text"]
                                for part in m["content"]) if not isinstance(m["content"], str)
             else m["content"]) for m in sample.messages]  # fmt: skip


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_one_question(row):
    sample = read(row)
    assert not isinstance(sample, BadRow), sample.reason
    assert words(sample) == [("user", "<>What?")]
    assert sample.solution in ("cat", "<answer> cat </answer>")  # conversations: as LISA's
    assert [image.size for image in sample.images] == [(56, 28)]


@pytest.mark.parametrize("keys", [("role", "content"), OLD], ids=["role", "from"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_system_and_earlier_turns_are_in_the_prompt(keys, column):
    names = ("human", "gpt") if keys == OLD else ("user", "assistant")
    turns = [turn("system", "Be brief.", keys), turn(names[0], "<image>What?", keys),
             turn(names[1], "a cat", keys), turn(names[0], "Color?", keys),
             turn(names[1], "red", keys)]  # fmt: skip
    sample = read({"images": [IMAGE], column: turns})
    said = [
        ("system", "Be brief."),
        ("user", "<>What?"),
        ("assistant", "a cat"),
        ("user", "Color?"),
    ]
    assert words(sample) == said and "red" in sample.solution
    history = {"images": [IMAGE], "system": "Be brief.", "history": [["<image>What?", "a cat"]],
               "query": "Color?", "response": "red"}  # fmt: skip
    assert words(read(history)) == said


def chat(*texts):
    return [turn(role, text) for role, text in zip(("user", "assistant") * 4, texts, strict=False)]


@pytest.mark.parametrize(
    "row",
    [{"image": None, "problem": "<image>What?", "solution": "cat"},
     {"problem": "<image>What?", "solution": "cat"},
     {"images": [], "messages": chat("<image>What?", "cat")},
     {"images": [IMAGE], "problem": "<image><image>Same?", "solution": "no"},
     {"images": [IMAGE, IMAGE], "problem": "<image>What?", "solution": "cat"},
     {"image": None, "conversations": [turn("human", "<image> What?", OLD), GPT]},
     {"prompt": [turn("user", PARTS)], "completion": "cat"},
     {"images": [IMAGE], "query": "<video>What?", "response": "cat"},
     {"images": [IMAGE], "problem": "What <|image_pad|>?", "solution": "cat"},
     {"videos": ["a.mp4"], "problem": "What?", "solution": "cat"},
     {"image": "data:image/png;base64,AAAA", "problem": "What?", "solution": "cat"},
     {"image": "https://example.com/a.png", "problem": "What?", "solution": "cat"},
     {"messages": chat("What?", "cat", "Color?")}, {"messages": []}, {"messages": [GPT]},
     {"messages": [turn("tool", "x"), GPT]}, {"query": "What?", "response": ""}],
    ids=lambda row: json.dumps(row, default=lambda value: "IMAGE")[:60],
)  # fmt: skip
def test_what_is_not_there_or_not_read_is_a_bad_row(row):
    bad = read(row)
    assert isinstance(bad, BadRow) and bad.reason


def test_a_system_column_is_that_of_the_system_turn():
    row = {"image": IMAGE, "messages": [turn("system", "Be brief."), USER, GPT]}
    assert words(read(row | {"system": " Be brief. "})) == words(read(row))
    assert words(read(row | {"system": ""})) == words(read(row))
    for other in ("Be long.", ["Be brief."]):
        assert "system: expected" in read(row | {"system": other}).reason


@pytest.mark.parametrize("name, value", [("weight", 0), ("weight", 0.5), ("loss", False)])
def test_an_answer_that_is_marked_is_not_learned(name, value):
    """Earlier ones are in the prompt, which is not learned anyway."""
    bad = GPT | {name: value}
    early = [USER, bad, turn("user", "And now?"), GPT | {name: 1}]
    assert len(read({"image": IMAGE, "messages": early}).messages) == 3
    for row in ({"messages": [USER, bad]}, {"conversations": [USER, bad]},
                {"problem": "<image>?", "solution": "a", "completion": [bad]},
                {"prompt": [USER], "chosen": [bad], "rejected": [GPT]}):  # fmt: skip
        assert f"got {{{name!r}: {value}" in read({"image": IMAGE} | row).reason


def test_lists_in_cells(tmp_path):
    """Under any name of the column; of Python's literals none is read."""
    IMAGE.save(tmp_path / "a.png")
    chat = json.dumps([turn("user", "Which?")])
    cells = ["problem", "pictures", "size", "options", "solution"], [
        chat, '["a.png", "a.png"]', "[10, 20]", '["yes", "no"]', "[1, 2]"], [
        "[sic] Which?", "a.png", "(10, 20)", "['yes', 'no']", "yes"]  # fmt: skip
    with open(tmp_path / "d.csv", "w", newline="") as file:
        csv.writer(file).writerows(cells)
    columns = {"images": "pictures", "extent": "size", "choices": "options"}
    samples = SampleDataset(load_rows(str(tmp_path / "d.csv"), "train", columns=columns))
    first, second = samples.get(0), samples.get(1)
    assert words(first) == [("user", "<><>Which?")] and len(first.images) == 2
    assert first.columns["extent"] == [10, 20] and first.columns["choices"] == ["yes", "no"]
    assert first.solution == "[1, 2]"
    assert words(second) == [("user", "<>[sic] Which?")]
    assert second.columns["choices"] == "['yes', 'no']"


def test_an_empty_list_in_a_cell_is_no_value(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    (tmp_path / "d.csv").write_text(
        "problem,images,extent,choices,messages,completion\n?,[],[],[],[],[]\n?,[ ],,,,[]\n"
    )
    samples = SampleDataset(load_rows(str(tmp_path / "d.csv"), "train"))
    for sample in (samples.get(0), samples.get(1)):
        assert words(sample) == [("user", "?")] and sample.solution == "[]"
        assert sample.columns["extent"] is None and sample.columns["choices"] is None


# A number may be a class, too.
@pytest.mark.parametrize("label, learned", [(False, 0), (0, 1), ("false", 0), ("False ", 0),
                                            (True, 1), (1, 1), ("1", 1), (None, 1)])  # fmt: skip
def test_an_answer_labelled_bad_is_not_learned(label, learned):
    sample = read({"prompt": "?", "completion": "cat", "label": label})
    assert isinstance(sample, Sample) == learned
    if not learned:
        assert "expected the label true, got" in sample.reason


@pytest.mark.parametrize("given", [{"A": "Yes", "B": "No", "C": None}, '{"A": "Yes", "B": "No"}'])
def test_options_by_letter_are_a_list(given):
    assert read({"problem": "?", "solution": "B", "options": given}).columns["options"] == [
        "Yes",
        "No",
    ]


@pytest.mark.parametrize("given", ["['Yes', 'No']", "Yes|No"])
@pytest.mark.parametrize("task, refused", [("choice", 1), ("classification", 1), ("number", 0)])
def test_options_that_are_no_list_are_said(given, task, refused):
    check = functools.partial(tasks.check_solution, task)
    rows = [{"problem": "?", "solution": "1", "options": given}]
    sample = SampleDataset(rows, check_solution=check).get(0)
    assert isinstance(sample, Sample) != refused
    assert not refused or "or as JSON such as" in sample.reason


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "saved"])
def test_relative_paths_start_at_the_file(tmp_path, monkeypatch, kind):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    IMAGE.save(folder / "images/a.png")
    row = {"image": "images/a.png", "problem": "What?", "solution": "cat"}
    path = folder / f"rows.{kind}"
    if kind in ("json", "jsonl"):
        path.write_text(json.dumps([row] if kind == "json" else row))
    else:
        import datasets

        rows = datasets.Dataset.from_list([row])
        path = folder if kind == "saved" else path
        rows.save_to_disk(str(path)) if kind == "saved" else rows.to_parquet(str(path))
    monkeypatch.chdir(tmp_path)
    sample = SampleDataset(load_rows(str(path), "train")).get(0)
    assert not isinstance(sample, BadRow), sample.reason
    (folder / "images").rename(tmp_path / "images")
    bad = SampleDataset(load_rows(str(path), "train")).get(0)
    assert isinstance(bad, BadRow) and f"move it to {folder}/images/a.png" in bad.reason


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "image" not in name])
def test_layouts_load_from_json(tmp_path, name):
    IMAGE.save(tmp_path / "a.png")
    text = json.dumps([LAYOUTS[name]] * 2, default=lambda image: "a.png")
    (tmp_path / "rows.json").write_text(text)
    sample = SampleDataset(load_rows(str(tmp_path / "rows.json"), "train")).get(1)
    assert not isinstance(sample, BadRow), sample.reason
    assert words(sample) == [("user", "<>What?")]
