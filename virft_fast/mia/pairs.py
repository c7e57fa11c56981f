"""Write preference pairs as a data set with the columns that TRL's DPOTrainer reads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from virft_fast.batch import Row
from virft_fast.data.writing import written_aside
from virft_fast.mia.answering import Answer
from virft_fast.mia.scenes import Scenes
from virft_fast.mia.selection import Selection

if TYPE_CHECKING:
    import datasets


def write_pairs(
    out: Path,
    scenes: Scenes,
    answers: Mapping[int, Answer],
    reasons: dict[int, list[str]],
    selection: Selection,
    *,
    card: Callable[[], str],
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda rows: rows,
) -> dict[str, int]:
    """Write the kept pairs, and every row's answer and reasons to selection.jsonl.

    Args:
        reasons: why each row is dropped; empty if it is kept. A reason is added here for rows whose
            images have become unreadable.
        card: makes the text of README.md; called when all reasons are complete.
    Returns:
        Split -> number of pairs.
    Raises:
        ValueError: there is no pair to write.
    """
    kept = [index for index in answers if not reasons[index]]
    if not kept:
        raise ValueError("no pair was kept; nothing is written, see the reasons above")
    splits = ["train", "test"] if scenes.test_share else ["train"]
    with written_aside(out, splits, _features()) as (folder, writers):
        for index in progress(kept):
            row = _pair(scenes, answers[index], selection)
            if isinstance(row, str):
                reasons[index].append(row)
                continue
            size = sum(len(image["bytes"]) for image in row["images"])
            writers["test" if scenes.held_out(index) else "train"].add(row, size)
        counts = {name: writer.close() for name, writer in writers.items()}
        if not sum(counts.values()):
            raise ValueError("no pair could be written: the images can't be read any more")
        (folder / "README.md").write_text(card(), encoding="utf-8")
        with (folder / "selection.jsonl").open("w") as file:
            for index, answer in answers.items():
                record = asdict(answer) | {"kept": not reasons[index], "dropped": reasons[index]}
                file.write(json.dumps(record) + "\n")
    return counts


def _features() -> datasets.Features:
    import datasets

    text, number = datasets.Value("string"), datasets.Value("int64")
    fraction, images = datasets.Value("float64"), datasets.List(datasets.Image())
    content = datasets.List({"type": text, "text": text})
    turns = datasets.List({"role": text, "content": text})
    return datasets.Features(
        images=images, prompt=datasets.List({"role": text, "content": content}), chosen=turns,
        rejected=turns, kind=text, num_images=number, target=number, target_image=number,
        target_box=datasets.List(number), attention_ratio=fraction, perplexity=fraction,
        reasons=datasets.List(text), source_row=number,
    )  # fmt: skip


def _pair(scenes: Scenes, answer: Answer, selection: Selection) -> Row | str:
    built = scenes.build(answer.index, clean=True)
    if isinstance(built, str):
        return built
    _, scene = built
    content = [{"type": item["type"], "text": item.get("text")} for item in scene.content]
    limit = selection.limit(answer)
    return {
        "images": [_encoded(image) for image in scene.images],
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": answer.truth}],
        "rejected": [{"role": "assistant", "content": answer.text}],
        "kind": answer.kind,
        "num_images": answer.num_images,
        "target": answer.target + 1,
        "target_image": scene.target_image,
        "target_box": list(scene.box),
        "attention_ratio": answer.ratio,
        "perplexity": answer.perplexity,
        "reasons": [f"attention on the target {answer.ratio:.3f}, limit {limit}"],
        "source_row": answer.index,
    }


def _encoded(image: Image.Image) -> Row:
    """Encode a small image losslessly as PNG, a larger one as high-quality JPEG."""
    data = io.BytesIO()
    if image.width * image.height <= 256 * 256:
        image.save(data, "PNG")
        return {"bytes": data.getvalue(), "path": "scene.png"}
    image.save(data, "JPEG", quality=95, subsampling=0)
    return {"bytes": data.getvalue(), "path": "scene.jpg"}
