"""Reports of any number of models: tables in Markdown and HTML, and a page with pictures.

Text from models and data sets is escaped, so that it can't add markup.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from virft_fast.batch import Sample
from virft_fast.data import BadRow
from virft_fast.data.drawing import PREDICTED, TRUE, draw_boxes
from virft_fast.evaluation import bootstrap
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_boxes, true_boxes
from virft_fast.evaluation.results import Result
from virft_fast.tasks import BOX_TASKS
from virft_fast.tasks.answers import answer_text

LoadSample = Callable[[int], Sample | BadRow]
PICTURE_SIDE = 420  # pixels
MAX_TEXT = 400  # characters of an answer


@dataclass(frozen=True)
class Table:
    """A table of strings; the first cell of each row is the row's name."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A question and each model's answer.

    Attributes:
        caption: the question. shown: for each model (a JPEG as a data URL, the answer's text).
    """

    caption: str
    solution: str
    shown: list[tuple[str, str]]


def measure_table(results: Sequence[Result]) -> Table:
    """Every measure of every model with its interval; for several models, also the change from the
    first to the last, on the same draws."""
    header = ["measure", *(result.model for result in results)]
    if len(results) > 1:
        header.append("change")
    rows = []
    for name in dict.fromkeys(name for result in results for name in result.means):
        row = [name, *(_cell(r.means.get(name, math.nan), r.interval(name)) for r in results)]
        if len(results) > 1:
            row.append(_cell(*change(results[0], results[-1], name), "+"))
        rows.append(row)
    return Table("Measures, with 95% intervals over resampled images", header, rows)


def change(first: Result, last: Result, name: str) -> tuple[float, bootstrap.Interval | None]:
    """The difference of a measure, and its interval on the same draws."""
    difference = last.means.get(name, math.nan) - first.means.get(name, math.nan)
    before, after = first.draws.get(name), last.draws.get(name)
    if before is None or after is None or first.units != last.units:
        return difference, None
    return difference, bootstrap.interval(after - before)


def _cell(value: float, interval: bootstrap.Interval | None, sign: str = "") -> str:
    shown = _number(value, sign)
    if interval is None:
        return shown
    return f"{shown} ({_number(interval[0], sign)} to {_number(interval[1], sign)})"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if math.isfinite(value) else "-"


def tables(results: Sequence[Result]) -> list[Table]:
    """The tables of a report, in order."""
    shown = [measure_table(results)]
    if all(result.categories for result in results):
        shown.append(_category_table(results))
    for result in results:
        if result.confusions:
            rows = [
                [c["true"], c["predicted"], str(c["count"]), f"{c['share']:.0%}"]
                for c in result.confusions
            ]
            header = ["true", "predicted", "images", "of the true class"]
            shown.append(Table(f"Confusions of {result.model}", header, rows))
    counts = dict.fromkeys(name for result in results for name in result.counts)
    rows = [[name, *(str(r.counts.get(name, 0)) for r in results)] for name in counts]
    shown.append(Table("Counts", ["", *(result.model for result in results)], rows))
    return shown


def _category_table(results: Sequence[Result]) -> Table:
    names = ("predictions", "AP", "AP50", "AP75")
    header = ["category", "objects"]
    for result in results:
        header += [f"{name}, {result.model}" if len(results) > 1 else name for name in names]
    rows = []
    for number, row in enumerate(results[0].categories):
        cells = [row["category"], str(row["objects"])]
        for result in results:
            of_model = result.categories[number]
            interval = result.interval(f"AP/{row['category']}")
            cells += [str(of_model["predictions"]), _cell(of_model["AP"], interval)]
            cells += [_number(of_model["AP50"]), _number(of_model["AP75"])]
        rows.append(cells)
    return Table("Average precision of each category", header, rows)


def markdown(title: str, shown: Sequence[Table]) -> str:
    parts = [f"# {_plain(title)}"]
    for table in shown:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        rows = "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)
        parts.append(f"## {_plain(table.title)}\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """The text on one line, escaped for a Markdown table."""
    text = " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;")


# --- Pictures --------------------------------------------------------------------------------


def pictures(
    results: Sequence[Result], limit: int, load: LoadSample, question: Callable[[Sample], str]
) -> list[Picture]:
    """Up to `limit` of the questions that all models answered, evenly spread.

    Args:
        load: row -> its sample. question: sample -> what it asks, in a few words.
    """
    by_index = [{record["index"]: record for record in result.records} for result in results]
    common = [index for index in by_index[0] if all(index in other for other in by_index)]
    step = max(1, len(common) // max(1, limit))
    chosen = []
    for index in common[::step][:limit]:
        sample = load(index)
        if isinstance(sample, BadRow) or not sample.images:
            continue
        shown = []
        for records, result in zip(by_index, results, strict=True):
            drawn = draw(sample.images[0], records[index], boxes=result.task in BOX_TASKS)
            text = answer_text(records[index]["completion"]) or "(nothing)"
            shown.append((_data_url(drawn), text[:MAX_TEXT]))
        solution = answer_text(by_index[0][index]["solution"])[:MAX_TEXT]
        chosen.append(Picture(f"{index}: {question(sample)}", solution, shown))
    return chosen


def draw(image: Image.Image, record: Record, *, boxes: bool) -> Image.Image:
    """A small copy of the image, with true boxes in white and predicted ones in pink."""
    image = image.copy()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    if min(image.size) and max(image.size) < PICTURE_SIDE // 2:
        factor = PICTURE_SIDE // 2 / max(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.NEAREST)
    if not boxes:
        return image
    true, predicted = true_boxes(record), predicted_boxes(record)
    if true:
        image = draw_boxes(image, true.boxes, TRUE)
    if predicted:
        labels = ["" if c is None else f"{c:.2g}" for c in predicted.confidences]
        image = draw_boxes(image, predicted.boxes, PREDICTED, labels)
    return image


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def html(
    title: str, shown: Sequence[Table], drawn: Sequence[Picture], models: Sequence[str]
) -> str:
    """A self-contained page."""
    import jinja2

    page = Path(__file__).with_name("page.html").read_text("utf-8")
    template = jinja2.Environment(autoescape=True).from_string(page)
    width = 240 * max(1, len(models))
    return template.render(title=title, tables=shown, pictures=drawn, models=models, width=width)
