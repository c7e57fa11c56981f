"""Data sets in every accepted form, rows that can't be used, and the order of training."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from virft_fast.batch import Sample
from virft_fast.data import (
    BadRow,
    BadRows,
    PromptSampler,
    SampleDataset,
    TooManyBadRows,
    first_solutions,
    load_rows,
)
from virft_fast.data.images import image_size, open_image
from virft_fast.data.prompt_source import PromptSource

SOLUTION = "<answer>cat</answer>"
RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def red(size=(4, 3)) -> Image.Image:
    return Image.new("RGB", size, RED)


def one(row: dict, **options) -> Sample | BadRow:
    return SampleDataset([row], **options).get(0)


def one_image(source) -> Image.Image:
    (image,) = one({"image": source, "problem": "p", "solution": SOLUTION}).images
    assert image.mode == "RGB"
    return image


def reason(row: dict, **options) -> str:
    bad = one({"problem": "p", "solution": SOLUTION} | row, **options)
    assert isinstance(bad, BadRow) and bad.index == 0
    assert "\n" not in bad.reason
    return bad.reason


def rows_of(num: int = 3, name: str = "") -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "problem": datasets.Value("string"),
            "solution": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    columns = {
        "image": [red((4 + i, 3)) for i in range(num)],
        "problem": [f"{name}{i}?" for i in range(num)],
        "solution": [SOLUTION] * num,
        "label": [i % 2 for i in range(num)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Parquet files pass through the cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


# --- Loading ---------------------------------------------------------------------------------


def test_demo(tmp_path, monkeypatch):
    from virft_fast.data import demo

    monkeypatch.setattr(
        demo,
        "demo_dataset",
        lambda name: demo.build_demo(name, tmp_path / name, num_train=4, num_test=1),
    )
    samples = SampleDataset(load_rows("shapes_detection", "train"))
    sample = samples.get(3)
    assert len(samples) == 4 and sample.index == 3
    assert sample.images[0].size == (112, 112)
    assert sample.columns == {
        "problem": sample.messages[0]["content"][1]["text"],
        "solution": sample.solution,
    }


def test_saved_to_disk(tmp_path):
    both = datasets.DatasetDict(train=rows_of(2, "train"), test=rows_of(3, "test"))
    both.save_to_disk(tmp_path / "both")
    rows_of(5).save_to_disk(tmp_path / "single")
    test = SampleDataset(load_rows(str(tmp_path / "both"), "test"))
    assert len(test) == 3
    assert test.get(1).columns == {"problem": "test1?", "solution": SOLUTION, "label": 1}
    assert test.get(1).images[0].size == (5, 3)
    assert len(load_rows(str(tmp_path / "single"), "train")) == 5
    with pytest.raises(ValueError, match=r"no split 'val', it has train, test"):
        load_rows(str(tmp_path / "both"), "val")
    with pytest.raises(ValueError, match=r"no split 'test', it has train"):
        load_rows(str(tmp_path / "single"), "test")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], "train test"),
        (["data/train", "data/validation"], "train validation"),
        (["train/0000", "test/0000"], "train test"),
        (["coco"], "train"),
    ],
)
def test_parquet_folder(tmp_path, names, splits):
    folder = tmp_path / "set"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows_of(2, name).to_parquet(folder / f"{name}.parquet")
    for split in splits.split():
        rows = load_rows(str(folder), split)
        assert len(rows) == 2 * max(1, sum(name.startswith(split + "-") for name in names))
        sample = SampleDataset(rows).get(0)
        assert sample.images[0].getpixel((0, 0)) == RED
        assert split in sample.columns["problem"] or names == ["coco"]
    with pytest.raises(ValueError, match="no split 'other'"):
        load_rows(str(folder), "other")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("coco_train", "coco_test"),
        ("Train", "Test"),
        ("train2017", "val2017"),
        ("train", "testing"),
        ("train/a", "test/part/a"),
        ("train/0", "test_data/0"),
        ("train/data-00000-of-00001", "test/data-00000-of-00001"),
        ("training/latest", "dev-set/contest"),
    ],
)
def test_any_word_of_a_path_names_its_split(tmp_path, train, test):
    for name in (train, test):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        rows_of(2, name).to_parquet(tmp_path / f"{name}.parquet")
    other = "validation" if "val" in test or "dev" in test else "test"
    for split, name in (("train", train), (other, test)):
        problem, _ = load_rows(str(tmp_path), split)["problem"]
        assert name in problem


def test_shards_keep_their_own_name_and_a_file_without_a_split_is_not_guessed(tmp_path):
    for name in ("train_sft-00000-of-00001", "train_gen-00000-of-00001"):
        rows_of(2, name).to_parquet(tmp_path / f"{name}.parquet")
    assert len(load_rows(str(tmp_path), "train_gen")) == 2
    for name in ("trainval", "train_and_test"):
        rows_of(2, name).to_parquet(tmp_path / f"{name}.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="none in .*train_and_test.parquet, .*trainval.parq"):
            load_rows(str(tmp_path), "train_gen", streaming=streaming)
    assert len(load_rows(str(tmp_path / "trainval.parquet"), "train")) == 2


def hub_folder(folder):
    """Two configurations; the names of the files alone would mislead."""
    for name in ("easy/first", "easy/second", "train-easy", "hard/train-00000-of-00001"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows_of(2, name).to_parquet(folder / f"{name}.parquet")
    (folder / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: easy\n  data_files:\n"
        "  - split: train\n    path: [easy/first.parquet, train-*]\n"
        "  - split: test\n    path: easy/second.parquet\n"
        "- config_name: hard\n  data_files: hard/*.parquet\n---\n# A set\n"
    )
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "config, split, files",
    [
        ("easy", "train", ["easy/first", "train-easy"]),
        ("easy", "test", ["easy/second"]),
        ("hard", "train", ["hard/train-00000-of-00001"]),
    ],
)
def test_a_folders_readme_says_which_files_are_which_split(
    tmp_path, streaming, config, split, files
):
    folder = hub_folder(tmp_path / "set")
    rows = load_rows(str(folder), split, dataset_config=config, streaming=streaming)
    samples = SampleDataset(rows)
    asked = [samples.get(index).columns["problem"] for index in range(len(samples))]
    assert asked == [f"{name}{i}?" for name in files for i in range(2)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "config, split, said",
    [
        (None, "train", "Config name is missing.*easy.*hard"),
        ("other", "train", "'other' not found.*easy"),
        ("hard", "test", "no split 'test', it has train"),
    ],
)
def test_what_a_readme_does_not_have(tmp_path, streaming, config, split, said):
    folder = hub_folder(tmp_path / "set")
    with pytest.raises(ValueError, match=said):
        load_rows(str(folder), split, dataset_config=config, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_whose_files_are_there_is_read_without_the_others(tmp_path, streaming):
    folder = hub_folder(tmp_path / "set")
    (folder / "easy/second.parquet").unlink()
    rows = load_rows(str(folder), "train", dataset_config="easy", streaming=streaming)
    assert len(rows) == 4
    with pytest.raises(ValueError, match="can't be followed for 'test'.*easy, hard"):
        load_rows(str(folder), "test", dataset_config="easy", streaming=streaming)
    shard = folder / "hard/train-00000-of-00001.parquet"
    shard.rename(shard.with_name("train-00000-of-00002.parquet"))
    (folder / "easy/second.parquet").symlink_to(folder / "easy/first.parquet")
    with pytest.raises(ValueError, match="expected 2 files of the split, but number 1 is missing"):
        load_rows(str(folder), "train", dataset_config="hard", streaming=streaming)


@pytest.mark.parametrize(
    "card, said",
    [
        ("---\nconfigs:\n- config_name: a\n  data_files: '*.csv'\n---\n", "name .parquet.*got csv"),
        ("---\nconfigs:\n- config_name: a\n  data_files: no-*\n---\n", "can't be followed"),
        ("---\nconfigs: [\n---\n", "README.md: its head can't be read"),
        ("---\nconfigs: 3\n---\n", "can't be followed"),
    ],
)
def test_a_readme_that_cant_be_followed(tmp_path, card, said):
    rows_of().to_parquet(tmp_path / "train.parquet")
    (tmp_path / "rows.csv").write_text("problem,solution\na,b\n")
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(ValueError, match=said):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize(
    "card", [b"caf\xe9", b"", b"---\nlicense: mit\n---\nA set.", b"--- a line"]
)
def test_a_readme_without_configs_says_nothing(tmp_path, card):
    rows_of().to_parquet(tmp_path / "train.parquet")
    (tmp_path / "README.md").write_bytes(card)
    assert len(load_rows(str(tmp_path), "train")) == 3


@pytest.mark.parametrize("kind", ["demo", "json", "parquet", "disk", "folder"])
def test_a_config_that_cant_be_heeded_is_refused(tmp_path, kind):
    name = str(tmp_path / f"set.{kind}")
    if kind == "demo":
        name = "shapes_detection"
    elif kind == "json":
        (tmp_path / "set.json").write_text(json.dumps([{"problem": "p", "solution": "s"}]))
    elif kind == "parquet":
        rows_of().to_parquet(name)
    elif kind == "disk":
        rows_of().save_to_disk(name)
    else:
        (tmp_path / "set.folder").mkdir()
        rows_of().to_parquet(tmp_path / "set.folder/train.parquet")
    streams = [False, True] if kind in ("parquet", "folder") else [False]
    for streaming in streams:
        with pytest.raises(ValueError, match="--dataset_config small: expected a hub id"):
            load_rows(name, "train", dataset_config="small", streaming=streaming)


def test_parquet_file_without_metadata(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": encoded(red()), "path": None}
    table = pa.table({"image": [image], "problem": ["p"], "solution": [SOLUTION]})
    pq.write_table(table, tmp_path / "test.parquet")
    sample = SampleDataset(load_rows(str(tmp_path / "test.parquet"), "test")).get(0)
    assert sample.images[0].size == (4, 3)


@pytest.mark.parametrize("form", ["list", "lines", "lines in .json"])
def test_json(tmp_path, form, monkeypatch):
    (tmp_path / "images").mkdir()
    red().save(tmp_path / "images" / "a.png")
    red((9, 9)).save(tmp_path / "b.png")
    records = [
        {"image_path": "images/a.png", "problem": "a", "solution": SOLUTION, "extra": 1},
        {"image_path": str(tmp_path / "b.png"), "problem": "b", "solution": SOLUTION},
        {"image_path": ["b.png", "images/a.png"], "problem": "c\u2028", "solution": SOLUTION},
        {"problem": "d", "solution": [1, 2], "extra": "text"},
        {"image_path": 7, "problem": "e", "solution": SOLUTION},
    ]
    path = tmp_path / ("d.jsonl" if form == "lines" else "d.json")
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(json.dumps(records) if form == "list" else lines, encoding="utf-8")
    monkeypatch.chdir("/")
    samples = SampleDataset(load_rows(str(path), "train"))
    sizes = [[image.size for image in samples.get(i).images] for i in range(3)]
    assert sizes == [[(4, 3)], [(9, 9)], [(9, 9), (4, 3)]]
    assert [samples.get(i).columns["extra"] for i in range(3)] == [1, None, None]
    assert samples.get(2).columns["problem"] == "c\u2028"
    assert samples.get(3).reason == "solution: expected text, got list [1, 2]"
    assert "image" in samples.get(4).reason
    with pytest.raises(ValueError, match="no split 'test', it has train"):
        load_rows(str(path), "test")


@pytest.mark.parametrize(
    "mark, name", [(",", "d.csv"), (";", "d.csv"), ("\t", "d.tsv"), ("|", "d.csv")]
)
def test_csv(tmp_path, monkeypatch, mark, name):
    """Texts with line breaks and separators, several images, images in the cell, empty cells."""
    (tmp_path / "images").mkdir()
    red().save(tmp_path / "images" / "a.png")
    coded = base64.b64encode(encoded(Image.effect_noise((400, 400), 99))).decode()
    assert len(coded) > 131_072  # the csv module's limit, unless it is told another
    with open(tmp_path / name, "w", newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerow(["", "problem", "image", "solution", "extent", "n"])
        writer.writerow([0, "a\n,;|b", "images/a.png", SOLUTION, "[640, 480]", 7])
        writer.writerow([1, "b", '["images/a.png", "images/a.png"]', SOLUTION, "", ""])
        writer.writerow([2, "c", coded, SOLUTION, "", ""])
        writer.writerow([3, "d"])
    monkeypatch.chdir("/")
    rows = load_rows(str(tmp_path / name), "train")
    assert rows.column_names == ["problem", "image", "solution", "extent", "n"]
    samples = SampleDataset(rows)
    assert samples.get(0).columns == {
        "problem": "a\n,;|b", "solution": SOLUTION, "extent": [640, 480], "n": "7"
    }  # fmt: skip
    sizes = [[image.size for image in samples.get(i).images] for i in range(3)]
    assert sizes == [[(4, 3)], [(4, 3), (4, 3)], [(400, 400)]]
    assert "solution: missing" in samples.get(3).reason
    assert rows.account.converted == (
        {} if mark == "," else {f"cells separated by {mark!r}": [str(tmp_path / name)]}
    )


@pytest.mark.parametrize("mark", ",;\t|")
def test_csv_of_other_names_is_parted_by_what_its_rows_have_in_common(tmp_path, mark):
    path = tmp_path / "mmbench.tsv"
    lines = [["index", "file-name.or.id", "question", "truth"],
             ["1", "my-cat.png", "a, b; or c|d?", "a"], ["2", "b.png", "Which?", '"b']]  # fmt: skip
    lines[1][2] = f'"{lines[1][2]}"'
    lines[2][3] += f'{mark}x"'
    path.write_text("\n".join(map(mark.join, lines)))
    names = {"problem": "question", "solution": "truth", "image": "file-name.or.id"}
    rows = load_rows(str(path), "train", columns=names)
    assert (rows[0]["problem"], rows[1]["solution"]) == ("a, b; or c|d?", f"b{mark}x")


def test_json_with_lone_surrogate(tmp_path):
    (tmp_path / "d.json").write_text(
        '[{"problem": "\\ud800 what?", "solution": "<answer>a</answer>"}]'
    )
    assert (
        SampleDataset(load_rows(str(tmp_path / "d.json"), "train"))
        .get(0)
        .columns["problem"]
        .endswith("what?")
    )


LISA = [
    {"from": "user", "value": "<img>images/a.png</img>\n Output the bounding box of the cat."},
    {"from": "assistant", "value": "(1,2),(300,400)"},
]


@pytest.mark.parametrize("compat", [False, True])
def test_lisa(tmp_path, compat):
    """The box is asked for as Visual-RFT does when it loads the file; its spelling on demand."""
    (tmp_path / "images").mkdir()
    red().save(tmp_path / "images" / "a.png")
    (tmp_path / "lisa.json").write_text(json.dumps([{"id": "1", "conversations": LISA}]))
    rows = load_rows(str(tmp_path / "lisa.json"), "train")
    sample = SampleDataset(rows, compat_prompt=compat).get(0)
    assert sample.solution == "<answer> (1,2),(300,400) </answer>"
    assert sample.images[0].size == (4, 3)
    box, end = ("grouding", ")") if compat else ("grounding", "")
    asked = (
        "Output the bounding box of the cat. Output the thinking process in <think> </think> and "
        f'your {box} box. Following "<think> thinking process </think>\n'
        f'<answer>(x1,y1),(x2,y2)</answer>{end}" format.'
    )
    text = {"type": "text", "text": asked}
    assert sample.messages == ({"role": "user", "content": [{"type": "image"}, text]},)
    assert sample.columns["problem"] == text["text"] and sample.columns["id"] == "1"
    assert sample.columns["solution"] == sample.solution


@pytest.mark.parametrize(
    "asked, said",
    [
        ("<image>\nWhere is the cat?", "(1,2),(300,400)"),  # LLaVA's
        ("<img>{}</img> What is it?", "A cat at (1,2),(300,400)."),
        ("<img>{}</img> Answer <answer>(x1,y1),(x2,y2)</answer>", "(1,2),(300,400)"),
    ],
)
def test_other_conversations_are_asked_as_they_stand(tmp_path, asked, said):
    red().save(tmp_path / "a.png")
    asked = asked.format(tmp_path / "a.png")
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    sample = one({"conversations": turns, "image": red()}, compat_prompt=True)
    assert sample.columns["problem"] == asked.rpartition("</img>")[2].strip()


def test_compat_prompt_without_conversations_is_refused():
    with pytest.raises(ValueError, match="--compat_prompt: expected LISA's conversations"):
        SampleDataset([{"problem": "p", "solution": SOLUTION}], compat_prompt=True)


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        (None, "user's value: missing"),
        ([], "user's value: missing"),
        (LISA[1:], "user's value: missing"),
        (LISA[:1], "solution: missing"),
        ([{"from": "user", "value": "<img>a</img>"}, LISA[1]], "user's text: empty"),
        (LISA, "image images/a.png: FileNotFoundError"),
    ],
)
def test_bad_conversation(turns, match):
    bad = one({"conversations": turns})
    assert isinstance(bad, BadRow) and match in bad.reason


@pytest.mark.parametrize("address", ["https://host/a.png", "s3://bucket/a.png"])
def test_an_address_is_refused_wherever_it_stands(tmp_path, address):
    talk = [{"from": "user", "value": f"<img>{address}</img>What?"}, LISA[1]]
    rows = [
        {"image_path": address, "problem": "p", "solution": "s"},
        {"image_path": [address], "problem": "p", "solution": "s"},
    ]
    for name, records in (("rows", rows), ("talk", [{"conversations": talk}])):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(records))
        samples = SampleDataset(load_rows(str(path), "train"))
        for index in range(len(samples)):
            bad = samples.get(index)
            assert bad.reason.startswith(f"image {address}: ValueError: nothing is downloaded")


def test_a_file_with_a_colon_in_its_name_is_no_address(tmp_path):
    red().save(tmp_path / "frame:1.png")
    rows = [{"image_path": "frame:1.png", "problem": "p", "solution": "s"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert SampleDataset(load_rows(str(tmp_path / "rows.json"), "train")).get(0).images


def test_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, trust_remote_code):
        calls.append((name, config, split))
        if split == "val":
            raise ValueError("Unknown split \"val\". Should be one of ['train', 'test'].")
        return rows_of()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("owner/name", "train", dataset_config="small")) == 3
    assert calls == [("owner/name", "small", "train")]
    with pytest.raises(ValueError, match="no split 'val', it has train, test"):
        load_rows("owner/name", "val")


def test_a_set_in_the_hubs_layout_is_read_by_datasets_itself(tmp_path, monkeypatch):
    """What `load_dataset` makes of a hub id, with the id's files in a folder: Visual-RFT's schema,
    a configuration, its splits, and `datasets`' own words for one that it lacks."""
    rows = {"image": [encoded(red())] * 2, "problem": ["Which?"] * 2, "solution": [SOLUTION] * 2}
    features = datasets.Features(
        image=datasets.Image(), problem=datasets.Value("string"), solution=datasets.Value("string")
    )
    folder = tmp_path / "set"
    for split in ("train", "test"):
        (folder / "few").mkdir(parents=True, exist_ok=True)
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(folder / f"few/{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: few\n  data_files:\n"
        "  - split: train\n    path: few/train-*\n  - split: test\n    path: few/test-*\n---\n"
    )
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, **options: real(
            str(folder), config, cache_dir=str(tmp_path / "cache"), **options
        ),
    )
    loaded = load_rows("laolao77/ViRFT_set", "test", dataset_config="few")
    sample = SampleDataset(loaded).get(1)
    assert sample.solution == SOLUTION and sample.images[0].getpixel((0, 0)) == RED
    with pytest.raises(ValueError, match="no split 'val', it has train, test"):
        load_rows("laolao77/ViRFT_set", "val", dataset_config="few")
    with pytest.raises((ValueError, FileNotFoundError), match="the hub says: .*few"):
        load_rows("laolao77/ViRFT_set", "train", dataset_config="many")


def test_hub_error_is_chained():
    with pytest.raises(FileNotFoundError, match="the hub says: .*expected a demo") as caught:
        load_rows("nobody/virft-no-such-set", "train")  # conftest.py says offline
    assert caught.value.__cause__ is not None and "\n" not in str(caught.value)


BAD_SETS = {
    "none.json": ("[]", "has no rows"),
    "broken.json": ('[{"problem": ', "not valid JSON"),
    "broken.jsonl": ('{"problem": 1}\n{"problem"\n', "line 2 is not valid JSON"),
    "records.json": ("[1, 2]", "record to be an object"),
    "latin.json": ("[\xff".encode("latin-1"), "not valid JSON"),
    "columns.json": ('[{"question": "?", "solution": "a"}]', "problem, prompt.*question, solution"),
    "solution.json": ('[{"problem": "?", "truth": "a"}]', "column solution.*problem, truth"),
    "set.xml": ("a,b", "unknown kind of file; expected a demo"),
    "head.csv": ("problem,solution\n", "has no rows"),
    "none.csv": ("", "has no rows"),
    "other.csv": ("a,b\n1,2\n", "problem, prompt.*a, b"),
    "cells.csv": ("problem,solution\n?,[1, 2]\n", "line 2: expected 2 cells, got more; .* ',' in"),
    "quote.tsv": ('problem\tsolution\n?\t"a\n', "expected CSV"),
    "zero.csv": ("problem,solution\n\0,a\n", "expected CSV, got zero bytes"),
    "twice.csv": ("problem,solution,problem\n?,a,b\n", "a name for each column, got problem, sol"),
    "broken.parquet": ("PAR1", "can't be read"),
    "damaged/dataset_dict.json": ("{", "can't be read"),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_bad_set(tmp_path, name):
    content, match = BAD_SETS[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path = path.parent if "/" in name else path
    with pytest.raises(ValueError, match=match) as caught:
        load_rows(str(path), "train")
    assert str(path) in str(caught.value)


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, match in [
        ("missing.json", "no such file, folder or demo; expected a demo .shapes_detection, "),
        ("missing/folder/deep", "no such file, folder or demo"),
        ("empty", "contains neither dataset_dict.json"),
    ]:
        with pytest.raises(FileNotFoundError, match=match):
            load_rows(str(tmp_path / name), "train")


@pytest.mark.parametrize("name", ["shape_detection", "pandas", "a/b/c", "../x"])
def test_only_owner_and_name_go_to_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("called"))
    with pytest.raises(FileNotFoundError, match="expected a demo"):
        load_rows(name, "train")


# --- Samples ---------------------------------------------------------------------------------


def test_one_user_turn_without_system_message():
    row = {"images": [red(), red((2, 2))], "problem": "Which?", "solution": SOLUTION, "n": 2}
    sample = one(row)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    assert sample.messages == ({"role": "user", "content": parts},)
    assert [image.size for image in sample.images] == [(4, 3), (2, 2)]
    assert sample.columns == {"problem": "Which?", "solution": SOLUTION, "n": 2}


@pytest.mark.parametrize("images", [{}, {"image": None}, {"images": []}])
def test_text_only(images):
    sample = one({"problem": "2+2?", "solution": "<answer>4</answer>"} | images)
    assert sample.images == ()
    assert sample.messages[0]["content"] == [{"type": "text", "text": "2+2?"}]


def test_image_sources(tmp_path):
    path = tmp_path / "a.png"
    red().save(path)
    sources = [str(path), {"bytes": None, "path": str(path)}, red(), path.read_bytes()]
    sources += [{"bytes": path.read_bytes(), "path": "elsewhere.png"}, [str(path)]]
    for source in sources:
        image = one_image(source)
        assert image.size == (4, 3) and image.getpixel((3, 2)) == RED


def test_image_modes():
    clear, half = (9, 9, 9, 0), (255, 0, 0, 128)
    rgba = Image.new("RGBA", (2, 1), clear)
    rgba.putpixel((1, 0), half)
    image = one_image(encoded(rgba))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 0)) == (255, 127, 127)
    assert one_image(encoded(Image.new("L", (1, 1), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert one_image(encoded(Image.new("LA", (1, 1), (7, 0)))).getpixel((0, 0)) == (255,) * 3
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 255, *[0] * 765])
    assert one_image(encoded(palette)).getpixel((0, 0)) == (0, 0, 255)
    assert one_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255,) * 3
    sixteen = Image.fromarray(np.full((1, 1), 0x8000, np.uint16))
    assert one_image(encoded(sixteen)).getpixel((0, 0)) == (128,) * 3
    ramp = b"P5 2 1 65535\n" + bytes([0x80, 0, 0xFF, 0xFF])  # PIL reads it as 32 bits
    assert [one_image(ramp).getpixel((x, 0)) for x in (0, 1)] == [(128,) * 3, (255,) * 3]
    assert one_image(encoded(Image.new("CMYK", (1, 1)), "JPEG")).size == (1, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_image_formats(kind):
    assert one_image(encoded(red((16, 8)), kind)).size == (16, 8)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert one_image(encoded(red((8, 4)), "JPEG", exif=exif)).size == (4, 8)


def test_bad_images(tmp_path, monkeypatch):
    whole = encoded(Image.effect_noise((64, 64), 50))
    (tmp_path / "text.png").write_text("no image")
    assert "image bytes: " in reason({"image": whole[: len(whole) // 2]})
    assert "UnidentifiedImageError" in reason({"image": b"no image"})
    assert "UnidentifiedImageError" in reason({"image": encoded(red(), "EPS")})
    assert "a.png: FileNotFoundError" in reason({"image": {"bytes": None, "path": "a.png"}})
    assert "text.png: Unidentified" in reason({"image_path": str(tmp_path / "text.png")})
    for source in ({"bytes": None, "path": None}, "", 7, [None], {}):
        assert "expected a path, bytes or an image" in reason({"image": source})
    assert "IsADirectoryError" in reason({"image": str(tmp_path)})
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png: ValueError: expected a file" in reason({"image": str(tmp_path / "pipe.png")})
    assert isinstance(one_image(whole), Image.Image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # PIL itself would warn only
    with pytest.warns(Image.DecompressionBombWarning):
        assert "64x64 is more than 4095 pixels" in reason({"image": whole})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "DecompressionBombError" in reason({"image": whole})


@pytest.mark.parametrize("mode, value", [("I", 70_000), ("I", -1), ("F", 0.5)])
def test_images_of_more_than_16_bits_are_named(mode, value):
    row = {
        "image": encoded(Image.new(mode, (1, 1), value), "TIFF"),
        "problem": "a",
        "solution": "b",
    }
    assert "expected an image of 8 or 16 bits" in SampleDataset([row]).get(0).reason


def test_a_shard_that_is_not_there_is_named(tmp_path):
    for number in (0, 2):
        rows = datasets.Dataset.from_dict({"problem": ["a"], "solution": ["b"]})
        rows.to_parquet(tmp_path / f"train-{number:05d}-of-00003.parquet")
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match="expected 3 files of the split, but number 1 is missing"
        ):
            load_rows(str(tmp_path), "train", streaming=streaming)


def test_a_task_is_not_read_off_rows_of_which_none_can_be_used():
    rows = [
        {"image": "gone.png", "problem": "a", "solution": "b"},
        {"problem": "a", "solution": "b"},
    ]
    assert first_solutions(SampleDataset(rows)) == ["b"]
    with pytest.raises(ValueError, match="among the first 1, got none; row 0: image gone.png"):
        first_solutions(SampleDataset(rows[:1]))


def test_json_nested_too_deep_is_named(tmp_path):
    deep = "[" * 800 + "]" * 800
    (tmp_path / "a.json").write_text(f'[{{"problem": {deep}, "solution": "b"}}]')
    with pytest.raises(ValueError, match="nested too deep|can't be read|not valid"):
        load_rows(str(tmp_path / "a.json"), "train")


def test_one_corrupt_image_in_a_saved_set(tmp_path):
    rows = rows_of().cast_column("image", datasets.Image(decode=False))
    images = rows["image"][:]
    images[1] = {"bytes": b"damaged", "path": "b.png"}
    rows = rows.remove_columns("image").add_column("image", images)
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    samples = SampleDataset(load_rows(str(tmp_path / "set"), "train"))
    assert samples.get(0).images and samples.get(2).images
    assert samples.get(1) == BadRow(1, samples.get(1).reason)
    assert "image b.png: UnidentifiedImageError" in samples.get(1).reason


def test_bad_texts():
    assert reason({"problem": None}) == "problem: missing"
    assert reason({"problem": " \n"}) == "problem: empty"
    assert reason({"problem": 3}) == "problem: expected text, got int 3"
    assert reason({"solution": None}) == "solution: missing"
    assert reason({"solution": ""}) == "solution: empty"
    assert reason({"solution": [1.5]}) == "solution: expected text, got list [1.5]"
    assert reason({"solution": True}) == "solution: expected text, got bool True"
    assert [one({"problem": "p", "solution": n}).solution for n in (3, 1.5)] == ["3", "1.5"]
    bad = reason({}, check_solution=lambda s: f"expected boxes, got {s!r}")
    assert bad == f"solution: expected boxes, got {SOLUTION!r}"
    assert isinstance(one({"problem": "p", "solution": "s"}, check_solution=lambda s: None), Sample)


def test_chat_prompt():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    sample = one({"prompt": chat, "image": red(), "solution": SOLUTION})
    assert sample.messages[0] == chat[0]
    text = {"type": "text", "text": "Which?"}
    assert sample.messages[1]["content"] == [{"type": "image"}, text]
    assert sample.columns["problem"] == "Which?" and sample.columns["prompt"] == chat
    assert chat[1]["content"] == "Which?"  # the row itself is left alone


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_chat_prompt_with_parts_from_arrow(kind):
    chat = [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image"}]}]
    columns = {"prompt": [chat], "image": [red()], "solution": [SOLUTION]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if kind == "json":
        rows = datasets.Dataset.from_dict(
            columns,
            features=datasets.Features(rows.features | {"prompt": datasets.Json()}),
        )
    sample = SampleDataset(rows).get(0)
    assert list(sample.messages) == chat and sample.columns["problem"] == "See"


@pytest.mark.parametrize(
    ("chat", "match"),
    [
        ([], "prompt: empty"),
        (["text"], "turns of role and content"),
        ([{"role": "robot", "content": "a"}], "turns of role and content"),
        ([{"role": "assistant", "content": "a"}], "last turn to be the user's"),
        ([{"role": "user", "content": " "}], "prompt: empty"),
        ([{"role": "user", "content": [{"type": "video"}]}], "image and text parts"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            "expected 1 image parts, as images, got 2",
        ),
    ],
)
def test_bad_chat_prompt(chat, match):
    bad = one({"prompt": chat, "image": red(), "solution": SOLUTION})
    assert isinstance(bad, BadRow) and match in bad.reason


def test_missing_columns_of_other_rows():
    with pytest.raises(ValueError, match="problem, prompt, conversations.*got the columns text"):
        SampleDataset([{"text": "a"}])


# --- Bad rows --------------------------------------------------------------------------------


def test_bad_rows_are_counted_and_named_once(caplog):
    bad_rows = BadRows(2)
    with caplog.at_level(logging.WARNING):
        for index in (7, 7, 3, 7):
            bad_rows.add(index, f"reason {index}")
    assert len(bad_rows) == 2
    assert [record.message for record in caplog.records] == [
        "skipped row 7: reason 7",
        "skipped row 3: reason 3",
    ]
    again = BadRows(2)
    again.load_state_dict(json.loads(json.dumps(bad_rows.state_dict())))
    again.add(3, "known")
    assert len(again) == 2
    with pytest.raises(TooManyBadRows, match=r"3 rows .*--max_bad_rows 2") as caught:
        again.add(5, "reason 5")
    assert "row 7: reason 7\n  row 3: reason 3\n  row 5: reason 5" in str(caught.value)


def test_long_listing_is_cut():
    bad_rows = BadRows(20)
    with pytest.raises(TooManyBadRows, match="and 11 more$"):
        for index in range(99):
            bad_rows.add(index, "r")


# --- Order -----------------------------------------------------------------------------------


def take(sampler, batches, bad=(), add_bad=lambda index, why: None, gather=lambda v: [v]):
    load = lambda index: BadRow(index, "bad") if index in bad else index  # noqa: E731
    return [sampler.next_batch(load, gather, add_bad) for _ in range(batches)]


def on_ranks(world_size, batch_size, batches, bad, num_rows=20, states=None, load=None):
    """[rank] -> (batches, bad rows told, calls of gather, state); ranks are threads."""
    barrier, slots = threading.Barrier(world_size, timeout=10), [None] * world_size

    def work(rank):
        sampler = PromptSampler(num_rows, batch_size, seed=1, rank=rank, world_size=world_size)
        told, calls = [], []
        if states:
            sampler.load_state_dict(states[rank])

        def gather(value):
            calls.append(value)
            slots[rank] = value
            barrier.wait()
            values = list(slots)
            barrier.wait()
            return values

        def default(index):
            return BadRow(index, "bad") if index in bad else index

        loader = (lambda index: load(rank, index)) if load else default
        out = []
        for _ in range(batches):
            out.append(sampler.next_batch(loader, gather, lambda i, why: told.append(i)))
        return out, told, len(calls), sampler.state_dict()

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, range(world_size)))


def test_an_epoch_is_a_permutation():
    first, second = (
        [i for batch in take(PromptSampler(12, 3, seed=s), 8) for i in batch] for s in (0, 1)
    )
    assert sorted(first[:12]) == sorted(first[12:]) == list(range(12))
    assert first[:12] != first[12:] and first != second
    plain = take(PromptSampler(5, 2, seed=0, shuffle=False), 4)
    assert plain == [[0, 1], [2, 3], [4, 0], [1, 2]]


@pytest.mark.parametrize("bad", [(), (3,), (0, 1, 2, 3, 4, 5, 11, 19), tuple(range(1, 20))])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_take_what_one_takes(world_size, bad):
    ((alone, told, _, state),) = on_ranks(1, 2 * world_size, 9, bad)
    ranks = on_ranks(world_size, 2, 9, bad)
    assert [sum(parts, []) for parts in zip(*(r[0] for r in ranks), strict=True)] == alone
    assert all(r[1] == told and r[3] == state for r in ranks)
    assert len({r[2] for r in ranks}) == 1
    assert sorted(told) == sorted(bad) if len(bad) < 19 else len(set(told)) == len(told)
    assert not set(sum(alone, [])) & set(bad)


def test_bad_rows_are_replaced_by_the_next_and_not_loaded_again():
    sampler, loads = PromptSampler(6, 2, seed=0, shuffle=False), []

    def load(index):
        loads.append(index)
        return BadRow(index, "bad") if index in (1, 2) else index

    told = []
    batches = [
        sampler.next_batch(load, lambda v: [v], lambda i, why: told.append((i, why)))
        for _ in range(4)
    ]
    assert batches == [[0, 3], [4, 5], [0, 3], [4, 5]]
    assert told == [(1, "bad"), (2, "bad")]
    assert loads.count(1) == loads.count(2) == 1
    # Nothing is loaded twice for one batch.
    assert len(loads) == 2 + 8


def test_a_row_that_fails_only_elsewhere_is_replaced_on_all_ranks():
    order = take(PromptSampler(20, 4, seed=1), 1)[0]
    flaky = order[2]  # moves from rank 1 to rank 0 when the first is bad

    def load(rank, index):
        return BadRow(index, "bad") if index == order[0] or (index, rank) == (flaky, 0) else index

    ranks = on_ranks(2, 2, 2, (), load=load)
    assert ranks[0][1] == ranks[1][1] == [order[0], flaky]
    assert ranks[0][2] == ranks[1][2] and ranks[0][3] == ranks[1][3]
    assert flaky not in sum(ranks[0][0] + ranks[1][0], [])


def test_batch_larger_than_the_set():
    (batch,) = take(PromptSampler(3, 8, seed=0), 1, bad=(1,))
    assert sorted(batch) == [0] * 4 + [2] * 4


def test_no_usable_row():
    told = []
    with pytest.raises(ValueError, match="none of the 5 rows is; the last: bad"):
        take(PromptSampler(5, 2, seed=0), 1, range(5), lambda index, why: told.append(index))
    assert sorted(told) == list(range(5))
    with pytest.raises(ValueError, match="num_rows=0"):
        PromptSampler(0, 1, seed=0)


def test_too_many_bad_rows_stops_a_batch():
    bad_rows = BadRows(3)
    with pytest.raises(TooManyBadRows, match="4 rows"):
        take(PromptSampler(9, 2, seed=0), 9, range(1, 9), bad_rows.add)


@pytest.mark.parametrize("at", [1, 3, 7])
def test_resume_mid_epoch(at):
    bad = (2, 9, 17)
    whole = on_ranks(2, 3, 10, bad)
    first = on_ranks(2, 3, at, bad)
    states = [json.loads(json.dumps(r[3])) for r in first]
    rest = on_ranks(2, 3, 10 - at, bad, states=states)
    for rank in range(2):
        assert first[rank][0] + rest[rank][0] == whole[rank][0]
        assert first[rank][1] + rest[rank][1] == whole[rank][1]
        assert rest[rank][3] == whole[rank][3]


def test_resume_of_another_set():
    state = PromptSampler(5, 2, seed=0).state_dict()
    with pytest.raises(ValueError, match="num_rows: expected 5, as saved, got 6"):
        PromptSampler(6, 2, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed: expected 0"):
        PromptSampler(5, 2, seed=1).load_state_dict(state)


def test_overlong_prompt_is_skipped_never_cut(processor):
    """Its image tokens count; one token less room and the row is gone, whole."""
    image = Image.new("RGB", (112, 112))
    row = {"image": image, "problem": "Detect every red.", "solution": "<answer>a</answer>"}
    samples = SampleDataset(datasets.Dataset.from_list([row]))
    whole = PromptSource(samples, processor).load(0)
    length = len(whole.input_ids)
    num_image_tokens = int((whole.input_ids == processor.image_token_id).sum())
    assert num_image_tokens == int(whole.image_grid_thw.prod()) // 4 == 16
    kept = PromptSource(samples, processor, max_prompt_length=length).load(0)
    assert torch.equal(kept.input_ids, whole.input_ids)
    skipped = PromptSource(samples, processor, max_prompt_length=length - 1).load(0)
    assert isinstance(skipped, BadRow)
    assert f"{length} tokens" in skipped.reason
    assert f"--max_prompt_length {length - 1}" in skipped.reason


def test_one_odd_chat_spoils_no_other_row(tmp_path):
    """Contents of both kinds, and a lone surrogate, in one column of chats."""
    chats = [
        [{"role": "user", "content": "as text"}],
        [{"role": "user", "content": [{"type": "text", "text": "as parts \ud800"}]}],
    ]
    rows = [{"prompt": chat, "solution": "<answer>a</answer>"} for chat in chats]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    samples = SampleDataset(load_rows(str(path), "train"))
    texts = [samples.get(i).columns["problem"] for i in range(2)]
    assert texts == ["as text", "as parts ?"]


def test_a_row_that_python_can_not_hold_is_a_bad_one(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    late = pa.array([0, 2**40], pa.int64()).cast(pa.timestamp("s"), safe=False)
    table = pa.table({"problem": ["p"] * 2, "solution": ["a"] * 2, "when": late})
    pq.write_table(table, tmp_path / "rows.parquet")
    samples = SampleDataset(load_rows(str(tmp_path / "rows.parquet"), "train"))
    assert samples.get(0).solution == "a"
    assert "the row can't be read" in samples.get(1).reason


# --- Preferences -----------------------------------------------------------------------------


def turn(role, text):
    return {"role": role, "content": text}


def pair_of(tmp_path, *rows):
    (tmp_path / "pairs.json").write_text(json.dumps(list(rows)))
    found = SampleDataset(load_rows(str(tmp_path / "pairs.json"), "train"))
    return [found.get(index) for index in range(len(rows))]


def spoken(sample):
    """Role and text of each turn, an image as <>."""
    return [
        (m["role"], m["content"] if isinstance(m["content"], str)
         else "".join(part.get("text", "<>") for part in m["content"]))
        for m in sample.messages
    ]  # fmt: skip


def test_texts_and_chats_in_one_column_are_read_alike(tmp_path):
    parts = [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]
    rows = pair_of(
        tmp_path,
        {"prompt": "What?", "chosen": "hi", "rejected": "no"},
        {"prompt": [turn("user", "Who?")], "chosen": [turn("assistant", "you")], "rejected": "I"},
        {"prompt": "How?", "chosen": [turn("assistant", parts)], "rejected": "so"},
    )
    asked = [spoken(row)[0][1] for row in rows]
    assert asked == ["What?", "Who?", "How?"]
    assert [row.columns["chosen"] for row in rows] == ["hi", "you", "hi there"]
    assert [row.columns["rejected"] for row in rows] == ["no", "I", "so"]


def test_earlier_turns_of_answers_belong_to_the_prompt(tmp_path):
    first = [turn("assistant", "A"), turn("user", "Sure?")]
    ask = turn("user", "What?")
    whole, behind, repeated, apart = pair_of(
        tmp_path,
        {"chosen": [ask, turn("assistant", "a")], "rejected": [ask, turn("assistant", "b")]},
        {"prompt": [ask], "chosen": [*first, turn("assistant", "a")],
         "rejected": [*first, turn("assistant", "b")]},
        {"prompt": "What?", "chosen": [ask, turn("assistant", "a")],
         "rejected": [ask, turn("assistant", "b")]},
        {"prompt": [ask], "chosen": [*first, turn("assistant", "a")],
         "rejected": [turn("assistant", "b")]},
    )  # fmt: skip
    assert spoken(whole) == spoken(repeated) == [("user", "What?")]
    assert spoken(behind) == [("user", "What?"), ("assistant", "A"), ("user", "Sure?")]
    assert all(row.columns["chosen"] == "a" for row in (whole, behind, repeated))
    assert "expected the same turns before the last in both, got 2 and 0" in apart.reason


def test_one_odd_cell_spoils_its_row_alone(tmp_path):
    chat = [turn("assistant", "a")]
    pair = {"prompt": [turn("user", "q")], "chosen": chat, "rejected": "b"}
    odd = [{"prompt": 5}, {"chosen": {"a": 1}}, {"chosen": [turn("assistant", 5)]},
           {"prompt": [{"role": 3, "content": "q"}]}, {"prompt": ["q"]}]  # fmt: skip
    for change in odd:
        spoiled, good = pair_of(tmp_path, pair | change, pair)
        assert isinstance(spoiled, BadRow), change
        assert spoken(good) == [("user", "q")] and good.columns["chosen"] == "a"


@pytest.mark.parametrize("prompt", ["q", "", None, [("system", "s"), ("user", "q")]])
def test_a_prompt_within_the_answers_chats_is_asked_once(tmp_path, prompt):
    lead = [turn("system", "s"), turn("user", "q")]
    if isinstance(prompt, list):
        prompt, lead = [turn(*said) for said in prompt], lead[1:]
    row = {"chosen": [*lead, turn("assistant", "a")], "rejected": [*lead, turn("assistant", "b")]}
    (found,) = pair_of(tmp_path, {"prompt": prompt, **row})
    assert spoken(found) == [("system", "s"), ("user", "q")]


def test_whole_numbers_among_others_stay_whole(tmp_path):
    rows = [{"problem": "?", "answer": answer} for answer in (1, 2.5, 3)]
    assert [row.solution for row in pair_of(tmp_path, *rows)] == ["1", "2.5", "3"]


def test_a_prompt_of_no_kind_is_a_bad_row():
    lead = [turn("user", "q")]
    row = {"chosen": [*lead, turn("assistant", "a")], "rejected": [*lead, turn("assistant", "b")]}
    assert "expected a text or a chat, got 5" in SampleDataset([{"prompt": 5, **row}]).get(0).reason


def test_images_go_where_the_text_has_a_place_for_them(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = ["a.png", "a.png"]
    pair = {"images": images, "chosen": "a", "rejected": "b"}
    placed, before, wrong, last, chat = pair_of(
        tmp_path,
        {"prompt": "Image1:<image>\nImage2:<image>\nWhich?", **pair},
        {"prompt": "Which?", **pair},
        {"prompt": "<image> <image> <image>?", **pair},
        {"prompt": "What is <image> beside\n<image>", **pair},
        {"prompt": [turn("user", "<image><image>Which?")], **pair},
    )
    assert spoken(last) == [("user", "What is <> beside\n<>")]
    assert spoken(chat) == [("user", "<><>Which?")]
    assert spoken(placed) == [("user", "Image1:<>\nImage2:<>\nWhich?")]
    assert spoken(before) == [("user", "<><>Which?")]
    assert "as many <image> as images or none, got 3 and 2 images" in wrong.reason


def test_an_answer_comes_after_its_question(tmp_path):
    talk = [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "What colour?"},
            {"from": "gpt", "value": "red"}]  # fmt: skip
    (row,) = pair_of(tmp_path, {"conversations": talk})
    assert row.solution == "<answer> red </answer>"


def test_an_empty_name_is_no_data_set():
    with pytest.raises(ValueError, match="got an empty name"):
        load_rows(" ", "train")


@pytest.mark.parametrize("place", ["none", "before the pixels", "behind the pixels"])
def test_the_size_of_a_png_is_read_without_decoding_it(place, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(red((8, 4)), "PNG", **({"exif": exif} if place == "before the pixels" else {}))
    if place == "behind the pixels":
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = data[:-12] + framed + data[-12:]
    assert image_size(data) == open_image(data).size == ((8, 4) if place == "none" else (4, 8))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("decoded"))
    if place != "behind the pixels":
        image_size(data)
