"""What people's rows look like, and the one form that they are read into: turns, images, an answer.

A row has its question in one of QUESTIONS and its ground truth in one of ANSWERS; the first that
the row has is read. A new layout is a function and a line in one of the two tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from virft_fast.tasks.answers import answer_text
from virft_fast.tasks.prompts import grounding_format
from virft_fast.tasks.rewards import CLASS_COLUMNS

Row = Mapping[str, Any]
Turn = dict[str, Any]  # role, content: a text or a list of parts

IMAGE_COLUMNS = ("image", "images", "image_path")
CHAT_COLUMNS = ("conversations", "messages", "history")
TURN_COLUMNS = ("prompt", "problem", "chosen", "rejected", "completion")
# Columns whose values may be chats, of any keys: kept as JSON, as they are.
JSON_COLUMNS = (*CHAT_COLUMNS, *TURN_COLUMNS, "reward_model", "extra_info")
# A text in them may be a list as JSON, as in CSV; in TURN_COLUMNS a list of turns.
LIST_COLUMNS = (*IMAGE_COLUMNS, "extent", "classes", *CLASS_COLUMNS, *CHAT_COLUMNS)
IMAGE_PLACE = "<image>"
IMAGE_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)
BOX_ANSWER = re.compile(r"\(\s*[\d.]+\s*,\s*[\d.]+\s*\)\s*,\s*\(\s*[\d.]+\s*,\s*[\d.]+\s*\)")
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
# Columns that hold what is not read: a row that has something in one can't be used.
UNREAD_COLUMNS = ("video", "videos", "audio", "audios", "tools")
UNREAD_TAG = re.compile(
    r"<(?:video|audio)>|<\|(?:(?:image|video|vision)_(?:pad|start|end)|im_start|im_end|endoftext)\|>",
    re.IGNORECASE,
)
# Where ms-swift puts the names and boxes of its column `objects`.
OBJECT_TAG = re.compile(r"<(?:bbox|ref-object)>")
# <image 1>, <image_1>: labels beside images, but nothing without.
_NUMBERED = re.compile(r"<image[ _]?(\d{1,3})>", re.IGNORECASE)
PIXELS = re.compile(r"\bpixels?\b|像素|ピクセル|픽셀", re.IGNORECASE)
_LEADING_IMAGES = re.compile(r"(?:\s*<img>.*?</img>)*\s*", re.DOTALL)


class Unusable(Exception):
    """Why the row at hand is a bad one; never leaves `virft_fast.data`."""


@dataclass(frozen=True)
class Reading:
    """What a row says.

    Attributes:
        layout: the columns that question and ground truth were read from.
        image_column: that of the images; None where they are in the question, or there are none.
        messages: the prompt's turns, an image part for each of `sources`.
        problem: text of the last user's turn.
        sources: images as they are stored.
        solution: the ground truth as the row has it; any value, None if there is none.
        said: the assistant's own last turn, where the question is a conversation.
        converted: rules by which something was changed.
    """

    layout: str
    messages: list[Turn]
    problem: str
    sources: list[Any]
    solution: Any
    said: str | None = None
    converted: tuple[str, ...] = ()
    image_column: str | None = None


@dataclass
class _Question:
    """A question on its way: turns whose image parts may have a `source`."""

    turns: list[Turn]
    said: str | None = None
    problem: str | None = None
    converted: tuple[str, ...] = ()


def read_row(
    row: Row, names: Sequence[str], *, compat: bool = False, first: bool = False
) -> Reading:
    """Question, images and ground truth of a row.

    Args:
        names: the data set's columns.
        compat, first: `compat_prompt` and `first_exchange` of `SampleDataset`.
    Raises:
        Unusable: it can't be read; the text says what was expected.
    """
    for name in UNREAD_COLUMNS:
        if row.get(name) not in (None, "", [], "[]"):
            raise Unusable(f"{name}: expected none, only texts and images are read")
    column = question_column(row, names)
    if "chosen" in row and column == "prompt":
        row = {**row, "prompt": pair_prompt(row)}
    question = QUESTIONS[column](row, _Options(column, compat, first))
    turns, system = question.turns, row.get("system")
    if not isinstance(system, (str, type(None))) or (system and system.strip()):
        system = non_empty(system, "system")
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        elif (other := turn_text(turns[0])).strip() != system.strip():
            raise Unusable(f"system: expected that of {column}, {other!r:.40}, got {system!r:.40}")
    if turns[-1]["role"] != "user":
        raise Unusable(f"{column}: expected the last turn to be the user's, got {turns[-1]!r:.80}")
    held = next((name for name in IMAGE_COLUMNS if _as_list(row.get(name))), None)
    messages, sources = _place_images(turns, _as_list(row.get(held)), column)
    problem = non_empty(question.problem or turn_text(turns[-1]), column)
    if row.get("objects") and (tag := OBJECT_TAG.search(f"{problem} {question.said}")):
        raise Unusable(f"{column}: expected texts with their boxes, got {tag[0]} and objects")
    answered, solution = _first_answer(row, question)
    return Reading(
        layout=f"{column} + {answered}",
        messages=messages,
        problem=problem,
        sources=sources,
        solution=solution,
        said=question.said,
        converted=question.converted,
        image_column=held,
    )


def answer_column(row: Row, names: Sequence[str]) -> tuple[str, Any]:
    """Column and value of the ground truth of `read_row`, of a row whose images may be missing;
    None as the value if it has none."""
    column = question_column(row, names)
    try:
        return _first_answer(row, QUESTIONS[column](row, _Options(column, False, False)))
    except Unusable:
        return column, None


def question_column(row: Row, names: Sequence[str]) -> str:
    """The first of QUESTIONS that the row has something in, else the first column of them."""
    known = [name for name in QUESTIONS if name in names]
    if "chosen" in names and "prompt" in names:  # a preference set in TRL's form
        known = ["prompt"]
    filled = [name for name in known if row.get(name) is not None]
    return (filled or known or ["prompt"])[0]


def check_columns(names: Sequence[str], where: str) -> None:
    """Raise ValueError if a data set with these columns can't be made into samples."""
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


@dataclass(frozen=True)
class _Options:
    column: str
    compat: bool
    first: bool


def _plain(row: Row, options: _Options) -> _Question:
    """A text, or a chat of role and content.

    Visual-RFT's and EasyR1's `problem`, TRL's and verl's `prompt`.
    """
    value = row.get(options.column)
    if isinstance(value, (list, tuple)):
        if not value:
            raise Unusable(f"{options.column}: empty")
        return _Question([read_turn(turn, options.column) for turn in value])
    text = non_empty(value, options.column)
    return _Question([{"role": "user", "content": text}], problem=text)


def _conversation(row: Row, options: _Options) -> _Question:
    """Turns of role and content or from and value, of which the last is the answer.

    `messages` of OpenAI, ms-swift and LLaMA-Factory, LLaVA's `conversations`. In the latter an
    answer gets its tags, and LISA's end as Visual-RFT has them end: where the answer is a box, with
    the form it is to have.
    """
    name = options.column
    given = _as_list(row.get(name))
    turns = [read_turn(turn, name) for turn in given]
    asked = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    if not asked:
        raise Unusable(f"{name}: user's value: missing")
    later = [n for n, t in enumerate(turns) if t["role"] == "assistant" and n > asked[0]]
    at = later[0] if options.first and later else len(turns) - 1
    if at not in later:  # nobody answers the last question: the row needs a solution of its own
        at = len(turns)
    said = turn_text(turns[at]) if at < len(turns) else None
    if said is not None:
        _check_learned(given[at], name)
    prompt = turns[:at]
    if name != "conversations":
        return _Question(prompt, said=said)
    return _tagged(prompt, said, compat=options.compat)


def _tagged(prompt: list[Turn], said: str | None, *, compat: bool) -> _Question:
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


def _query(row: Row, options: _Options) -> _Question:
    """ms-swift's `query`, after the pairs of its `history`."""
    turns = []
    for pair in _as_list(row.get("history")):
        if not isinstance(pair, (list, tuple)) or list(map(type, pair)) != [str, str]:
            raise Unusable(f"history: expected pairs of a query and its response, got {pair!r:.80}")
        query, response = pair
        turns += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    text = non_empty(row.get("query"), "query")
    return _Question([*turns, {"role": "user", "content": text}], problem=text)


QUESTIONS: dict[str, Callable[[Row, _Options], _Question]] = {
    "problem": _plain,
    "prompt": _plain,
    "conversations": _conversation,
    "messages": _conversation,
    "query": _query,
}


# --- Answers ---------------------------------------------------------------------------------


def _first_answer(row: Row, question: _Question) -> tuple[str, Any]:
    """Name and value of the first of ANSWERS that says something; else of the first that is
    there, for an error to name."""
    found = [(name, _number_as_text(read(row, question))) for name, read in ANSWERS.items()]
    there = [pair for pair in found if pair[1] is not None]
    said = [pair for pair in there if not isinstance(pair[1], str) or pair[1].strip()]
    return next(iter(said or there), ("solution", None))


def _number_as_text(value: Any) -> Any:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if plain and math.isfinite(value) else value


def _ground_truth(row: Row, question: _Question) -> Any:
    """verl's reward_model: {"ground_truth": ...}."""
    value = row.get("reward_model")
    value = _json(value) if isinstance(value, str) else value
    return value.get("ground_truth") if isinstance(value, Mapping) else None


def _completion(row: Row, question: _Question) -> Any:
    """TRL's; one that is labelled as bad is no answer to learn."""
    label = row.get("label")
    if row.get("completion") is not None and str(label).strip().lower() == "false":
        raise Unusable(f"completion: expected a good one, got the label {label}")
    return spoken_text(row.get("completion"))


def _check_learned(turn: Any, where: str) -> None:
    """Refuse an answer that is marked as one not to learn, as OpenAI's weight 0 does."""
    marks = {name: turn.get(name) for name in ("weight", "loss", "train")}
    if wrong := {name: mark for name, mark in marks.items() if mark not in (None, 1)}:
        raise Unusable(f"{where}: expected an answer to learn last, got {wrong}; drop this turn")


ANSWERS: dict[str, Callable[[Row, _Question], Any]] = {
    "solution": lambda row, question: row.get("solution"),
    "reward_model": _ground_truth,
    "answer": lambda row, question: row.get("answer"),
    "response": lambda row, question: row.get("response"),
    "conversation": lambda row, question: question.said,
    "completion": _completion,
    "chosen": lambda row, question: spoken_text(row.get("chosen")),
}


def spoken_text(value: Any) -> str | None:
    """An answer as text: itself, or the last turn of a chat, as TRL writes answers; else None."""
    if isinstance(value, Mapping):  # LLaMA-Factory's pairs have one turn each
        value = [value]
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        turn = value[-1]
        _check_learned(turn, "answer")
        said = ROLES.get(str(turn.get("role") or turn.get("from") or "assistant")) == "assistant"
        value = turn.get("content", turn.get("value")) if said else None
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        value = "".join(str(part.get("text") or "") for part in parts)
    return value if isinstance(value, str) and value.strip() else None


# --- Preference pairs ------------------------------------------------------------------------


def pair_prompt(row: Row) -> Any:
    """The prompt of a preference pair whose answers may be chats: turns before the last are the
    prompt's, or go behind it, where both answers have the same."""
    chats = (row.get("chosen"), row.get("rejected"))
    lead, other = (list(chat[:-1]) if isinstance(chat, (list, tuple)) else [] for chat in chats)
    if list(map(_spoken, lead)) != list(map(_spoken, other)):
        raise Unusable(
            f"chosen, rejected: expected the same turns before the last in both, got {len(lead)} "
            f"and {len(other)} that differ; make the earlier ones the prompt"
        )
    return _joined(row.get("prompt"), lead) if lead else row.get("prompt")


def _joined(prompt: Any, lead: list[Any]) -> list[Any]:
    """A prompt and the turns before the answers: one of them where it holds the other."""
    if not isinstance(prompt, (str, list, tuple, type(None))):
        raise Unusable(f"prompt: expected a text or a chat, got {prompt!r:.80}")
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    if isinstance(prompt, str) and not prompt.strip():
        said = []
    one, two = list(map(_spoken, said)), list(map(_spoken, lead))
    if any(two[at : at + len(one)] == one for at in range(len(two) - len(one) + 1)):
        return lead
    if one[-len(two) :] == two:
        return said
    if two[0][0] == "system":
        raise Unusable(
            f"prompt: expected the turns before the answers to go on from it, or to hold it, got "
            f"{prompt!r:.80} and then {lead!r:.80}"
        )
    return [*said, *lead]


def _spoken(turn: Any) -> tuple[Any, str]:
    """Role and text of a turn, however its content is written."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if isinstance(content, list):
        parts = [p.get("text") or f"<{p.get('type')}>" for p in content if isinstance(p, Mapping)]
        content = "".join(str(part) for part in parts)
    return (turn.get("role") if isinstance(turn, Mapping) else None, str(content))


# --- Turns -----------------------------------------------------------------------------------


def read_turn(turn: Any, where: str) -> Turn:
    """A turn of role and content or from and value, with our names of the roles."""
    keys = turn.keys() if isinstance(turn, Mapping) else ()
    role = (turn.get("role") or turn.get("from")) if keys else None
    content = turn.get("content") if keys else None
    content = turn.get("value") if keys and content is None else content
    if keys and turn.get("tool_calls"):
        raise Unusable(f"{where}: expected turns of texts and images, got tool_calls")
    if isinstance(content, (list, tuple)):
        content = _read_parts(content, where)
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, (str, list)):
        raise Unusable(
            f"{where}: expected turns of role and content or of from and value, by "
            f"{', '.join(ROLES)}, got {turn!r:.80}"
        )
    return {"role": ROLES[role], "content": content}


def _read_parts(content: Sequence[Any], where: str) -> str | list[dict[str, Any]]:
    """A content's parts; a box, which some write as a list, is a text."""
    if content and not any(isinstance(part, (str, Mapping)) for part in content):
        return str(list(content))
    return [_read_part(part, where) for part in content]


def _read_part(part: Any, where: str) -> dict[str, Any]:
    """A part without the nulls that arrow adds for keys of other parts."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
    source = given.get("image", given.get("image_url"))
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    kind = given.get("type") or ("image" if source is not None else "text")
    if kind in ("image", "image_url"):
        source = source or given.get("path") or given.get("url")
        return {"type": "image"} if source is None else {"type": "image", "source": source}
    if kind == "text" and isinstance(given.get("text"), str):
        return {"type": "text", "text": given["text"]}
    raise Unusable(f"{where}: expected image and text parts, got {part!r:.80}")


def turn_text(turn: Turn) -> str:
    """The texts of a turn, without its images."""
    content = turn["content"]
    if isinstance(content, str):
        return IMAGE_TAG.sub("", content).strip() if IMAGE_TAG.search(content) else content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


# --- Images in the text ----------------------------------------------------------------------


def _place_images(turns: list[Turn], stored: list[Any], where: str) -> tuple[list[Turn], list[Any]]:
    """Turns with an image part for each image, and the images in their order.

    Images stand where the content has image parts or the text has <img>PATH</img> or <image>,
    and those of a row without any of these before the first text.

    Raises:
        Unusable: there are other numbers of images than of places for them.
    """
    turns = [{**turn, "content": _parts(turn)} for turn in turns]
    places = [p for t in turns if not isinstance(t["content"], str) for p in t["content"]]
    images = [part for part in places if part["type"] == "image"]
    named = [part["source"] for part in images if "source" in part]
    texts = [part["text"] for part in places if part["type"] == "text"]
    texts += [turn["content"] for turn in turns if isinstance(turn["content"], str)]
    if named and (len(named) < len(images) or (stored and len(stored) != len(named))):
        raise Unusable(
            f"{where}: expected the images in the text or in a column, got {len(images)} places, "
            f"{len(named)} of them with an image, and {len(stored)} in the column"
        )
    sources = named or stored
    _check_texts(texts, len(sources), where)
    tags = sum(text.count(IMAGE_PLACE) for text in texts)
    if images and (tags or len(images) != len(sources)):
        raise Unusable(
            f"{where}: expected {len(sources)} image parts, as images, got {len(images)}"
            + (f" and {tags} {IMAGE_PLACE} besides" if tags else "")
        )
    if tags and tags != len(sources):
        raise Unusable(
            f"{where}: expected as many {IMAGE_PLACE} as images or none, got {tags} and "
            f"{len(sources)} images"
        )
    if tags:
        turns = [{**turn, "content": _split(turn["content"])} for turn in turns]
    elif sources and not images:
        asked = next(turn for turn in turns if turn["role"] == "user")
        asked["content"] = [*({"type": "image"} for _ in sources), *asked["content"]]
    return [_without_sources(turn) for turn in turns], sources


def _parts(turn: Turn) -> str | list[dict[str, Any]]:
    """The content with <img>PATH</img> as parts; a user's always as parts."""
    content = turn["content"]
    if isinstance(content, str) and (turn["role"] == "user" or IMAGE_TAG.search(content)):
        return _split_at_paths(content)
    return content


def _split_at_paths(text: str) -> list[dict[str, Any]]:
    """Parts of a text; the spaces behind images that it begins with are theirs."""
    head = _LEADING_IMAGES.match(text).end() if IMAGE_TAG.search(text) else 0
    paths = IMAGE_TAG.findall(text[:head])
    parts: list[dict[str, Any]] = [{"type": "image", "source": path.strip()} for path in paths]
    rest = text[head:].rstrip() if head else text
    for number, piece in enumerate(IMAGE_TAG.split(rest)):
        if number % 2:
            parts.append({"type": "image", "source": piece.strip()})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_texts(texts: Sequence[str], num_images: int, where: str) -> None:
    """That texts hold no marks of what isn't there."""
    for text in texts:
        if mark := UNREAD_TAG.search(text):
            raise Unusable(f"{where}: expected texts and {IMAGE_PLACE} places, got {mark[0]}")
        if (named := max(map(int, _NUMBERED.findall(text)), default=0)) > num_images:
            raise Unusable(f"{where}: expected {named} images, as it names, got {num_images}")


def _split(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content with an image part in the place of each <image>."""
    if isinstance(content, str):
        if IMAGE_PLACE not in content:
            return content
        content = [{"type": "text", "text": content}]
    return [new for part in content for new in _split_part(part)]


def _split_part(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(part.get("text", "").split(IMAGE_PLACE)):
        if number or part["type"] == "image":
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


def _without_sources(turn: Turn) -> Turn:
    if isinstance(turn["content"], str):
        return turn
    parts = [{k: v for k, v in part.items() if k != "source"} for part in turn["content"]]
    return {**turn, "content": parts}


# --- Values ----------------------------------------------------------------------------------


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_list(name: str, value: Any) -> Any:
    """A column's value; where it is a list as JSON, and the column holds such, that list: None
    for an empty one. Options by letter, {"A": ..., "B": ...}, are the list of them."""
    listed = _json(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    if isinstance(listed, Mapping) and name in CLASS_COLUMNS:
        return [option for option in listed.values() if option is not None]
    if not isinstance(listed, list) or listed is value:
        return value
    chat = listed and all(isinstance(v, Mapping) and {"role", "from"} & set(v) for v in listed)
    held = name in LIST_COLUMNS or (name in TURN_COLUMNS and chat)
    return (listed or None) if held else value


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def non_empty(value: Any, name: str) -> str:
    """The value, if it is a text that says something.

    Raises:
        Unusable: it isn't.
    """
    if value is None:
        raise Unusable(f"{name}: missing")
    if not isinstance(value, str):
        raise Unusable(f"{name}: expected text, got {type(value).__name__} {value!r:.80}")
    if not value.strip():
        raise Unusable(f"{name}: empty")
    return value
