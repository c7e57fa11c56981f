"""The layouts that rows may have, and how they are read into one form: turns, images, an answer.

The question comes from the first column of QUESTIONS that the row has, and the ground truth from
the first of ANSWERS. To add a layout, write a function and add it to one of the two tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from virft_fast.batch import Json, Row
from virft_fast.data.turns import IMAGE_TAG, Unusable, non_empty, place_images, read_turn, turn_text
from virft_fast.tasks.answers import answer_text
from virft_fast.tasks.prompts import grounding_format
from virft_fast.tasks.rewards import CLASS_COLUMNS

IMAGE_COLUMNS = ("image", "images", "image_path")
CHAT_COLUMNS = ("conversations", "messages", "history")
TURN_COLUMNS = ("prompt", "problem", "chosen", "rejected", "completion")
# Columns that may contain chats with arbitrary keys. Stored as JSON, they stay unchanged.
JSON_COLUMNS = (*CHAT_COLUMNS, *TURN_COLUMNS, "reward_model", "extra_info")
# Columns whose text may be a JSON list, as in CSV files. In TURN_COLUMNS, it is a list of turns.
LIST_COLUMNS = (*IMAGE_COLUMNS, "extent", "classes", *CLASS_COLUMNS, *CHAT_COLUMNS)
BOX_ANSWER = re.compile(r"\(\s*[\d.]+\s*,\s*[\d.]+\s*\)\s*,\s*\(\s*[\d.]+\s*,\s*[\d.]+\s*\)")
# Unsupported columns: a row with a value in one of them can't be used.
UNREAD_COLUMNS = ("video", "videos", "audio", "audios", "tools")
# ms-swift's placeholders for the names and boxes in its column `objects`.
OBJECT_TAG = re.compile(r"<(?:bbox|ref-object)>")
PIXELS = re.compile(r"\bpixels?\b|像素|ピクセル|픽셀", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """A row after reading.

    Attributes:
        layout: the columns from which the question and the ground truth were read.
        messages: the prompt's turns, with an image part for each of `sources`.
        problem: text of the last user turn.
        sources: the images as stored.
        solution: the ground truth as stored, of any type; None if there is none.
        said: the assistant's last turn, if the question is a conversation.
        converted: the rules by which something was changed.
        image_column: the images' column; None if they are in the question, or there are none.
    """

    layout: str
    messages: list[Row]
    problem: str
    sources: list[Json]
    solution: Json
    said: str | None = None
    converted: tuple[str, ...] = ()
    image_column: str | None = None


@dataclass
class _Question:
    """A question whose images haven't been placed yet. Image parts may have a `source`."""

    turns: list[Row]
    said: str | None = None
    problem: str | None = None
    converted: tuple[str, ...] = ()


def read_row(
    row: Row, names: Sequence[str], *, compat: bool = False, first: bool = False
) -> Reading:
    """Read a row's question, images and ground truth.

    Args:
        names: the data set's columns.
        compat, first: see `compat_prompt` and `first_exchange` of `SampleDataset`.
    Raises:
        Unusable: the row can't be read; the message says what was expected.
    """
    for name in UNREAD_COLUMNS:
        if row.get(name) not in (None, "", [], "[]"):
            raise Unusable(f"{name}: expected none, only texts and images are read")
    column = question_column(row, names)
    if "chosen" in row and column == "prompt":
        row = {**row, "prompt": pair_prompt(row)}
    question = QUESTIONS[column](row, column, compat, first)
    turns, system = question.turns, row.get("system")
    if not isinstance(system, (str, type(None))) or (system and system.strip()):
        system = non_empty(system, "system")
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        elif (other := turn_text(turns[0])).strip() != system.strip():
            raise Unusable(f"system: expected that in {column}, {other!r:.40}, got {system!r:.40}")
    if turns[-1]["role"] != "user":
        raise Unusable(f"{column}: expected the last turn to be the user's, got {turns[-1]!r:.80}")
    image_column = next((name for name in IMAGE_COLUMNS if _as_list(row.get(name))), None)
    stored = _as_list(row.get(image_column)) if image_column else []
    messages, sources = place_images(turns, stored, column)
    problem = non_empty(question.problem or turn_text(turns[-1]), column)
    if row.get("objects") and (tag := OBJECT_TAG.search(f"{problem} {question.said}")):
        raise Unusable(f"{column}: expected texts with their boxes, got {tag[0]} and objects")
    answered, solution = _first_answer(row, question)
    layout, said, converted = f"{column} + {answered}", question.said, question.converted
    return Reading(layout, messages, problem, sources, solution, said, converted, image_column)


def answer_column(row: Row, names: Sequence[str]) -> tuple[str, Json]:
    """Column and value of a row's ground truth, as in `read_row`, but without reading images. The
    value is None if the row has none."""
    column = question_column(row, names)
    try:
        return _first_answer(row, QUESTIONS[column](row, column, False, False))
    except Unusable:
        return column, None


def question_column(row: Row, names: Sequence[str]) -> str:
    """The first of QUESTIONS with a value in the row, or else the first that is a column."""
    columns = [name for name in QUESTIONS if name in names]
    if "chosen" in names and "prompt" in names:  # preference pairs in TRL's form
        columns = ["prompt"]
    filled = [name for name in columns if row.get(name) is not None]
    return (filled or columns or ["prompt"])[0]


def check_columns(names: Sequence[str], where: str) -> None:
    """Raise ValueError if these columns include no question or no answer."""
    if not set(names) & set(QUESTIONS) and not {"chosen", "rejected"} <= set(names):
        missing = f"one of the columns {', '.join(QUESTIONS)}"
    elif not set(names) & {*ANSWERS, "messages", "conversations"}:
        missing = (
            f"the column solution, or another of {', '.join(ANSWERS)} (or conversations or "
            "messages that end with the assistant's answer)"
        )
    else:
        return
    raise ValueError(
        f"{where}: expected {missing}, and maybe one of {', '.join(IMAGE_COLUMNS)}; "
        f"got the columns {', '.join(names) or 'none'}; say which is which, such as --columns "
        "problem=question solution=answer image=picture"
    )


# --- Questions -------------------------------------------------------------------------------


def _plain(row: Row, column: str, compat: bool, first: bool) -> _Question:
    """Read text or a chat: Visual-RFT's and EasyR1's `problem`, TRL's and verl's `prompt`."""
    value = row.get(column)
    if isinstance(value, (list, tuple)):
        if not value:
            raise Unusable(f"{column}: empty")
        return _Question([read_turn(turn, column) for turn in value])
    text = non_empty(value, column)
    return _Question([{"role": "user", "content": text}], problem=text)


def _conversation(row: Row, column: str, compat: bool, first: bool) -> _Question:
    """Read a chat that ends with the answer: `messages` of OpenAI, ms-swift and LLaMA-Factory, and
    LLaVA's `conversations`.

    In `conversations`, the answer is wrapped in <answer> tags. As in Visual-RFT, the answer format
    is appended to LISA's questions for a box.
    """
    given = _as_list(row.get(column))
    turns = [read_turn(turn, column) for turn in given]
    start = next((n for n, turn in enumerate(turns) if turn["role"] == "user"), None)
    if start is None:
        raise Unusable(f"{column}: user's value: missing")
    answers = [n for n, t in enumerate(turns) if t["role"] == "assistant" and n > start]
    at = answers[0] if first and answers else len(turns) - 1
    if at not in answers:  # the last question has no answer, so the row needs a solution
        at = len(turns)
    said = turn_text(turns[at]) if at < len(turns) else None
    if said is not None:
        _check_learned(given[at], column)
    if column != "conversations":
        return _Question(turns[:at], said=said)
    return _tagged(turns[:at], said, compat=compat)


def _tagged(prompt: list[Row], said: str | None, *, compat: bool) -> _Question:
    question, converted = prompt[-1], []
    text = question["content"]
    if isinstance(text, str):
        non_empty(text, "conversations: user's value")
        plain = non_empty(IMAGE_TAG.sub("", text).strip(), "conversations: user's text")
        boxed = IMAGE_TAG.search(text) and said and BOX_ANSWER.fullmatch(answer_text(said))
        if boxed and "<answer>" not in plain:
            text = f"{text.strip()} {grounding_format(compat=compat)}"
            converted.append("questions for a box end with the form of its answer")
        prompt = [*prompt[:-1], {**question, "content": text}]
    if said and said.strip() and "<answer>" not in said:
        said = f"<answer> {said.strip()} </answer>"
        converted.append("answers of conversations are put in <answer> tags")
    return _Question(prompt, said=said, converted=tuple(converted))


def _query(row: Row, column: str, compat: bool, first: bool) -> _Question:
    """Read ms-swift's `query`, after the pairs in its `history`."""
    turns: list[Row] = []
    for pair in _as_list(row.get("history")):
        if not isinstance(pair, (list, tuple)) or list(map(type, pair)) != [str, str]:
            raise Unusable(f"history: expected pairs of a query and its response, got {pair!r:.80}")
        query, response = pair
        turns += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    text = non_empty(row.get("query"), "query")
    return _Question([*turns, {"role": "user", "content": text}], problem=text)


QUESTIONS: dict[str, Callable[[Row, str, bool, bool], _Question]] = {
    "problem": _plain, "prompt": _plain, "conversations": _conversation,
    "messages": _conversation, "query": _query,
}  # fmt: skip


# --- Answers ---------------------------------------------------------------------------------


def _first_answer(row: Row, question: _Question) -> tuple[str, Json]:
    """Name and value of the first of ANSWERS that isn't blank. If all are, those of the first that
    exists, to name it in an error."""
    answers = [(name, _number_as_text(read(row, question))) for name, read in ANSWERS.items()]
    present = [pair for pair in answers if pair[1] is not None]
    filled = [pair for pair in present if not isinstance(pair[1], str) or pair[1].strip()]
    return next(iter(filled or present), ("solution", None))


def _number_as_text(value: Json) -> Json:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if plain and math.isfinite(value) else value


def _ground_truth(row: Row, question: _Question) -> Json:
    """The ground truth in verl's reward_model: {"ground_truth": ...}."""
    value = row.get("reward_model")
    value = _json(value) if isinstance(value, str) else value
    return value.get("ground_truth") if isinstance(value, Mapping) else None


def _completion(row: Row, question: _Question) -> str | None:
    """TRL's completion, unless it is labeled as a bad one."""
    label = row.get("label")
    if row.get("completion") is not None and str(label).strip().lower() == "false":
        raise Unusable(f"completion: expected the label true, got {label}")
    return spoken_text(row.get("completion"))


def _check_learned(turn: Mapping[str, Json], where: str) -> None:
    """Raise Unusable if an answer is marked as not to be learned, such as by OpenAI's weight 0."""
    marks = {name: turn.get(name) for name in ("weight", "loss", "train")}
    if wrong := {name: mark for name, mark in marks.items() if mark not in (None, 1)}:
        raise Unusable(f"{where}: expected a last answer to train on, got {wrong}; drop this turn")


ANSWERS: dict[str, Callable[[Row, _Question], Json]] = {
    "solution": lambda row, question: row.get("solution"),
    "reward_model": _ground_truth,
    "answer": lambda row, question: row.get("answer"),
    "response": lambda row, question: row.get("response"),
    "conversation": lambda row, question: question.said,
    "completion": _completion,
    "chosen": lambda row, question: spoken_text(row.get("chosen")),
}


def spoken_text(value: Json) -> str | None:
    """An answer as text: the text itself, or the last turn of a chat, as in TRL; else None."""
    if isinstance(value, Mapping):  # LLaMA-Factory's pairs have one turn each
        value = [value]
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        turn = value[-1]
        _check_learned(turn, "answer")
        role = str(turn.get("role") or turn.get("from") or "assistant")
        value = turn.get("content", turn.get("value")) if role in ("assistant", "gpt") else None
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        value = "".join(str(part.get("text") or "") for part in parts)
    return value if isinstance(value, str) and value.strip() else None


# --- Preference pairs ------------------------------------------------------------------------


def pair_prompt(row: Row) -> Json:
    """The prompt of a preference pair.

    If its answers are chats, the turns before the last must be the same in both. They are part of
    the prompt, or follow it.
    """
    chats = (row.get("chosen"), row.get("rejected"))
    lead, other = (list(chat[:-1]) if isinstance(chat, (list, tuple)) else [] for chat in chats)
    if list(map(_spoken, lead)) != list(map(_spoken, other)):
        raise Unusable(
            f"chosen, rejected: expected the same turns before the last in both, got {len(lead)} "
            f"and {len(other)} that differ; make the earlier ones the prompt"
        )
    return _joined(row.get("prompt"), lead) if lead else row.get("prompt")


def _joined(prompt: Json, lead: list[Json]) -> list[Json]:
    """A prompt's turns, then those before the answers; if one contains the other, only that."""
    if not isinstance(prompt, (str, list, tuple, type(None))):
        raise Unusable(f"prompt: expected a text or a chat, got {prompt!r:.80}")
    said = list(prompt or ())
    if isinstance(prompt, str):
        said = [{"role": "user", "content": prompt}] if prompt.strip() else []
    one, two = list(map(_spoken, said)), list(map(_spoken, lead))
    if any(two[at : at + len(one)] == one for at in range(len(two) - len(one) + 1)):
        return lead
    if one[-len(two) :] == two:
        return said
    if two[0][0] == "system":
        raise Unusable(
            f"prompt: expected the turns before the answers to continue or to contain it, got "
            f"{prompt!r:.80} and then {lead!r:.80}"
        )
    return [*said, *lead]


def _spoken(turn: Json) -> tuple[Json, str]:
    """Role and text of a turn, whatever the form of its content."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if isinstance(content, list):
        parts = [p.get("text") or f"<{p.get('type')}>" for p in content if isinstance(p, Mapping)]
        content = "".join(str(part) for part in parts)
    return (turn.get("role") if isinstance(turn, Mapping) else None, str(content))


# --- Values ----------------------------------------------------------------------------------


def _json(text: str) -> Json:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_list(name: str, value: Json) -> Json:
    """A column's value, parsed from JSON if the column may contain lists. An empty list becomes
    None. Options by letter, {"A": ..., "B": ...}, become a list."""
    listed = _json(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    if isinstance(listed, Mapping) and name in CLASS_COLUMNS:
        return [option for option in listed.values() if option is not None]
    if not isinstance(listed, list) or listed is value:
        return value
    chat = listed and all(isinstance(v, Mapping) and {"role", "from"} & set(v) for v in listed)
    held = name in LIST_COLUMNS or (name in TURN_COLUMNS and chat)
    return (listed or None) if held else value


def _as_list(value: Json) -> list[Json]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
