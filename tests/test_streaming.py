"""Parquet files that are read in parts: which rows, how often each part, and how much is kept."""

from __future__ import annotations

import json

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from virft_fast.data import ParquetRows, PromptSampler, SampleDataset, load_rows
from virft_fast.data.__main__ import main as data_main
from virft_fast.train import main

SOLUTION = "<answer>cat</answer>"
NUM_ROWS, GROUP = 60, 4


def some_rows(start: int, stop: int) -> datasets.Dataset:
    """Rows of noise, so that the stored size of an image is that of its file."""
    noise = np.random.default_rng(start)
    images = [
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(start, stop)
    ]
    rows = [
        {"image": image, "problem": f"row {i}?", "solution": SOLUTION, "number": i}
        for i, image in zip(range(start, stop), images, strict=True)
    ]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def folder(tmp_path):
    """60 rows in 2 files of 32 and 28, row groups of 4; and a test split."""
    path = tmp_path / "set"
    path.mkdir()
    for number, (start, stop) in enumerate([(0, 32), (32, 60)]):
        some_rows(start, stop).to_parquet(
            path / f"train-{number:05}-of-00002.parquet", batch_size=GROUP
        )
    some_rows(60, 66).to_parquet(path / "test-00000-of-00001.parquet", batch_size=GROUP)
    return path


def windows_of(rows: ParquetRows, groups: float) -> ParquetRows:
    """The same rows with room for so many groups in a window."""
    size = max(group.num_bytes for group in rows.groups)
    return ParquetRows(rows._files, window_bytes=int(groups * size * rows._expansion))


def test_rows_are_those_of_the_whole_set(folder):
    whole, streamed = (
        load_rows(str(folder), "train"),
        load_rows(str(folder), "train", streaming=True),
    )
    assert isinstance(streamed, ParquetRows) and len(streamed) == len(whole) == NUM_ROWS
    assert streamed.column_names == whole.column_names and streamed.features == whole.features
    assert [group.num_rows for group in streamed.groups] == [GROUP] * 15
    plain, parts = SampleDataset(whole), SampleDataset(streamed)
    for index in (0, 3, 4, 31, 32, 59):
        a, b = plain.get(index), parts.get(index)
        assert a.messages == b.messages and a.columns == b.columns and a.index == b.index
        assert a.images[0].tobytes() == b.images[0].tobytes()
    assert len(load_rows(str(folder), "test", streaming=True)) == 6
    for index in (-1, 60):
        with pytest.raises(IndexError, match=rf"row in \[0, 60\), got {index}"):
            streamed[index]


def test_only_what_is_asked_for_is_read(folder):
    rows = load_rows(str(folder), "train", streaming=True)
    assert rows.num_reads == 0
    for index in (5, 6, 7, 4):
        assert rows[index].column("number").to_pylist() == [index]
    assert rows.num_reads == 1


@pytest.mark.parametrize("groups", [0.5, 1, 3.5, 100])
def test_an_epoch_reads_each_group_once(folder, groups):
    rows = windows_of(load_rows(str(folder), "train", streaming=True), groups)
    order = rows.permutation(np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(NUM_ROWS))
    assert order.tolist() != list(range(NUM_ROWS))
    largest = 0
    rows._kept.clear()
    before = rows.num_reads
    for index in order:
        assert rows[int(index)].column("number").to_pylist() == [index]
        largest = max(largest, rows._bytes_kept())
    assert rows.num_reads - before == len(rows.groups)
    one = max(table.nbytes for table in rows._kept.values())
    assert largest <= max(2 * rows._window_bytes, one)


def test_rows_are_shuffled_within_windows_and_windows_in_the_set(folder):
    rows = windows_of(load_rows(str(folder), "train", streaming=True), 3.5)
    orders = [rows.permutation(np.random.default_rng((7, epoch))) for epoch in (0, 1, 0)]
    assert np.array_equal(orders[0], orders[2]) and not np.array_equal(orders[0], orders[1])
    groups = orders[0] // GROUP
    assert [len(set(groups[i : i + 12])) for i in range(0, NUM_ROWS, 12)] == [3] * 5
    inside = groups[:12].tolist()
    assert sorted(inside) != inside and inside != sorted(inside, key=inside.index)


def test_repeated_text_does_not_swell_the_window(tmp_path):
    """A footer gives the size of what is stored; a text that all rows share is stored once."""
    text = "What is this? " * 200
    rows = [{"problem": text, "solution": SOLUTION} for _ in range(600)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet", batch_size=50)
    budget = 400_000  # three groups in memory; all twelve by their footers
    streamed = ParquetRows([str(tmp_path / "a.parquet")], window_bytes=budget)
    assert sum(group.num_bytes for group in streamed.groups) < budget < 600 * len(text)
    order = streamed.permutation(np.random.default_rng(0))
    before, largest = streamed.num_reads, 0
    for index in order:
        streamed[int(index)]
        largest = max(largest, streamed._bytes_kept())
    assert streamed.num_reads - before <= len(streamed.groups)
    assert largest <= 2 * budget


def take(rows: ParquetRows, world_size: int, steps: int, states: dict | None = None):
    """Rows of each step over all ranks, and the state after them."""
    samplers = [
        PromptSampler(
            len(rows), 12 // world_size, seed=3, rank=rank, world_size=world_size,
            permutation=rows.permutation,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    batches = []
    for sampler in samplers:
        if states:
            sampler.load_state_dict(states)
    for _ in range(steps):
        parts = [s.next_batch(lambda i: i, lambda value: [value], print) for s in samplers]
        batches.append(sum(parts, []))
    return batches, json.loads(json.dumps(samplers[0].state_dict()))


def test_order_is_that_of_any_number_of_ranks_and_goes_on(folder):
    rows = windows_of(load_rows(str(folder), "train", streaming=True), 3.5)
    whole, _ = take(rows, 1, 10)
    assert take(rows, 2, 10)[0] == take(rows, 4, 10)[0] == whole
    first, state = take(rows, 2, 3)
    assert first + take(rows, 1, 7, state)[0] == whole
    assert sorted(sum(whole[:5], [])) == sorted(sum(whole[5:], [])) == list(range(NUM_ROWS))
    with pytest.raises(ValueError, match="order: expected the rows in the order that was saved"):
        PromptSampler(len(rows), 12, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="the same files"):
        take(windows_of(rows, 2), 1, 1, state)


def test_hub_set_is_read_where_it_lies(folder, monkeypatch):
    """Files at addresses: the hub's are read through fsspec as these of memory are."""
    memory = fsspec.filesystem("memory")
    for file in sorted(folder.iterdir()):
        memory.pipe(f"/owner/name/data/{file.name}", file.read_bytes())
    real = datasets.load_dataset_builder(str(folder))  # finds out which file is of which split
    for split, files in real.config.data_files.items():
        names = [f"memory://owner/name/data/{file.rsplit('/', 1)[-1]}" for file in files]
        real.config.data_files[split] = names
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *given: asked.append(given) or real
    )
    rows = load_rows("owner/name", "train", dataset_config="small", streaming=True)
    assert asked == [("owner/name", "small")] and len(rows) == NUM_ROWS
    assert SampleDataset(rows).get(45).columns["number"] == 45
    assert len(load_rows("owner/name", "test", streaming=True)) == 6
    with pytest.raises(ValueError, match="no split 'val', it has train, test"):
        load_rows("owner/name", "val", streaming=True)
    real.config.data_files["train"] = ["memory://owner/name/a.jsonl"]
    with pytest.raises(ValueError, match=r"stored in .parquet files.*, got jsonl, parquet; leave"):
        load_rows("owner/name", "train", streaming=True)


def test_hub_that_does_not_answer():
    with pytest.raises(FileNotFoundError, match="the hub says: .*expected a demo") as caught:
        load_rows("nobody/virft-no-such-set", "train", streaming=True)  # conftest.py says offline
    assert caught.value.__cause__ is not None


def test_what_can_not_be_streamed(tmp_path, folder):
    some_rows(0, 2).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.json").write_text("[]")
    for name in ("shapes_detection", str(tmp_path / "saved"), str(tmp_path / "rows.json"), "a/b/c"):
        with pytest.raises(
            ValueError, match="expected a parquet file.*leave the flag out"
        ) as caught:
            load_rows(name, "train", streaming=True)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="no split 'val', it has test, train"):
        load_rows(str(folder), "val", streaming=True)
    first = folder / "train-00000-of-00002.parquet"
    some_rows(0, 2).remove_columns("number").to_parquet(first)
    with pytest.raises(ValueError, match=r"00001-of-00002.parquet: expected the columns"):
        load_rows(str(folder), "train", streaming=True)
    first.write_bytes(b"PAR1 is not all")
    with pytest.raises(ValueError, match=r"00000-of-00002.parquet: expected a parquet file"):
        load_rows(str(folder), "train", streaming=True)


def test_a_damaged_group_costs_its_rows_only(folder):
    file = folder / "train-00000-of-00002.parquet"
    rows = load_rows(str(folder), "train", streaming=True)
    content = bytearray(file.read_bytes())
    start = rows._footers[0].row_group(1).column(0).data_page_offset
    content[start : start + 64] = b"\xff" * 64
    file.write_bytes(content)
    samples = SampleDataset(rows)
    assert samples.get(0).columns["number"] == 0
    assert "the row can't be read" in samples.get(5).reason
    assert samples.get(9).columns["number"] == 9


def test_training_streams_and_goes_on_as_one_run(folder, tmp_path):
    """Stopped after step 2 and resumed: the metrics of one run of 4 steps, bit for bit."""
    args = ["--dataset_name", str(folder), "--dataset_streaming", "--task", "classification",
            "--algorithm", "sft", "--max_completion_length", "64", "--save_steps", "2",
            "--per_device_train_batch_size", "4", "--report_to", "none",
            "--lr_scheduler_type", "constant"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*args, "--output_dir", str(one), "--max_steps", "4"]) == 0
    assert main([*args, "--output_dir", str(two), "--max_steps", "2"]) == 0
    more = ["--output_dir", str(two), "--max_steps", "4", "--resume_from_checkpoint", "latest"]
    assert main([*args, *more]) == 0
    losses = []
    for path in (one, two):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert main([*(a for a in args if a != "--dataset_streaming"), *more]) == 2


def test_inspect_and_export_stream(folder, tmp_path, capsys):
    source = ["--dataset_name", str(folder), "--dataset_streaming", "--task", "classification"]
    assert data_main(["inspect", *source, "--output", str(tmp_path / "sheet.png")]) == 0
    assert "60 usable of 60 rows" in capsys.readouterr().out
    assert data_main(["export", "llamafactory", *source, "--output", str(tmp_path / "out")]) == 0
    assert "60 rows, 0 left out" in capsys.readouterr().out
