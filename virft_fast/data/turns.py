"""Chat turns with a role and content, and where images go in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from virft_fast.batch import Json, Row

IMAGE_PLACE = "<image>"
IMAGE_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
UNREAD_TAG = re.compile(
    r"<(?:video|audio)>|<\|(?:(?:image|video|vision)_(?:pad|start|end)|im_start|im_end|endoftext)\|>",
    re.IGNORECASE,
)
# <image 1>, <image_1>: references to the row's images. A mistake if there are no images.
_NUMBERED = re.compile(r"<image[ _]?(\d{1,3})>", re.IGNORECASE)
_LEADING_IMAGES = re.compile(r"(?:\s*<img>.*?</img>)*\s*", re.DOTALL)


class Unusable(Exception):
    """The row can't be used; the message says why. Never leaves `virft_fast.data`."""


def non_empty(value: Json, name: str) -> str:
    """The value, if it is text that isn't blank.

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


# --- Turns -----------------------------------------------------------------------------------


def read_turn(turn: Json, where: str) -> Row:
    """Convert a turn with role and content, or from and value, to {"role", "content"}. The role is
    system, user or assistant. The content is text, or a list of image and text parts."""
    given = turn if isinstance(turn, Mapping) else {}
    role = given.get("role") or given.get("from")
    content = given.get("content")
    content = given.get("value") if content is None else content
    if given.get("tool_calls"):
        raise Unusable(f"{where}: expected turns of texts and images, got tool_calls")
    if isinstance(content, (list, tuple)):
        if content and not any(isinstance(part, (str, Mapping)) for part in content):
            content = str(list(content))  # some data sets write a box as a list
        else:
            content = [_read_part(part, where) for part in content]
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, (str, list)):
        raise Unusable(
            f"{where}: expected turns of role and content or of from and value, by "
            f"{', '.join(ROLES)}, got {turn!r:.80}"
        )
    return {"role": ROLES[role], "content": content}


def _read_part(part: Json, where: str) -> Row:
    """An image or text part, without the nulls that arrow adds for the keys of other parts."""
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


def turn_text(turn: Row) -> str:
    """The text of a turn, without its images."""
    content = turn["content"]
    if isinstance(content, str):
        return IMAGE_TAG.sub("", content).strip() if IMAGE_TAG.search(content) else content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


# --- Images in the text ----------------------------------------------------------------------


def place_images(turns: list[Row], stored: list[Json], where: str) -> tuple[list[Row], list[Json]]:
    """Turns with a part for each image, and the images in order.

    An image goes where an image part, `<img>PATH</img>` or `<image>` is. Without any, a row's
    images come before its first text.

    Args:
        stored: the images in the row's image column.
    Raises:
        Unusable: the number of images differs from the number of places.
    """
    turns = [{**turn, "content": _split_at_paths(turn)} for turn in turns]
    parts = [p for t in turns if not isinstance(t["content"], str) for p in t["content"]]
    images = [part for part in parts if part["type"] == "image"]
    named = [part["source"] for part in images if "source" in part]
    texts = [part["text"] for part in parts if part["type"] == "text"]
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
        turns = [{**turn, "content": _split_at_places(turn["content"])} for turn in turns]
    elif sources and not images:
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = [*({"type": "image"} for _ in sources), *first["content"]]
    return [_without_sources(turn) for turn in turns], sources


def _split_at_paths(turn: Row) -> str | list[Row]:
    """The content with each <img>PATH</img> as a part. A user's content always becomes parts. If
    the text starts with images or white space, white space there and at its end is dropped."""
    content = turn["content"]
    tagged = isinstance(content, str) and IMAGE_TAG.search(content)
    if not isinstance(content, str) or not (turn["role"] == "user" or tagged):
        return content
    head = match.end() if tagged and (match := _LEADING_IMAGES.match(content)) else 0
    paths = IMAGE_TAG.findall(content[:head])
    parts: list[Row] = [{"type": "image", "source": path.strip()} for path in paths]
    rest = content[head:].rstrip() if head else content
    for number, piece in enumerate(IMAGE_TAG.split(rest)):
        if number % 2:
            parts.append({"type": "image", "source": piece.strip()})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_texts(texts: Sequence[str], num_images: int, where: str) -> None:
    """Raise Unusable if a text has an unsupported tag or refers to an image that doesn't exist."""
    for text in texts:
        if mark := UNREAD_TAG.search(text):
            raise Unusable(f"{where}: expected text and {IMAGE_PLACE} tags only, got {mark[0]}")
        if (named := max(map(int, _NUMBERED.findall(text)), default=0)) > num_images:
            raise Unusable(f"{where}: expected the {named} images that it names, got {num_images}")


def _split_at_places(content: str | list[Row]) -> str | list[Row]:
    """The content, which has no image parts yet, with an image part for each <image>."""
    if isinstance(content, str) and IMAGE_PLACE not in content:
        return content
    parts: list[Row] = []
    for text in [content] if isinstance(content, str) else [part["text"] for part in content]:
        for number, piece in enumerate(text.split(IMAGE_PLACE)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _without_sources(turn: Row) -> Row:
    if isinstance(turn["content"], str):
        return turn
    parts = [{k: v for k, v in part.items() if k != "source"} for part in turn["content"]]
    return {**turn, "content": parts}
