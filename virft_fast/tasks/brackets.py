"""Parse text with brackets into a tree, whatever its syntax.

Reads JSON, Python literals, and the variants that models write: missing quotes, closing brackets
and commas, doubled braces, curly quotes, apostrophes. Nothing raises because of a text or evaluates
it, and the time is linear in its length.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, Union

# Enough for 500 of Visual-RFT's objects; text beyond either limit is not read.
MAX_CHARACTERS = 40_000
MAX_TOKENS = 10_000
MAX_GROUPS = 1_024
MAX_DEPTH = 8  # deeper groups become children of the root

_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width characters
_ASCII |= str.maketrans("“”„‟«»‘’‚‛−", '""""""\'\'\'\'-')
# A quote ends a string only before a character that may follow a value. It doesn't start one inside
# a word. So a string extends no further than the next such quote, and the search is linear.
_TEXTS = "|".join(rf"{q}[^{q}\\]*(?:\\[\s\S][^{q}\\]*)*{q}" for q in "\"'")
NUMBER = r"[-+]?\.?\d[\d.]*(?:[eE][-+]?\d+)?"
_TOKEN = re.compile(
    rf"[\[\](){{}},:%]|(?P<number>{NUMBER})|(?P<word>[^\W\d]\w*)"
    rf"|(?<!\w)(?P<text>{_TEXTS})(?=\s*(?:[\]}}),:]|\Z))|<\|\w+\|>|\\[\s\S]"
)
_MARKS = {"<|box_start|>": "<", "<|box_end|>": ">"}
_CLOSES = {"]": "[(", ")": "[(", "}": "{", ">": "<"}

# Quoted numbers are strings, and so are numbers that can't be read, such as 1.2.3.
Item: TypeAlias = Union["BracketGroup", float, str]
Items: TypeAlias = Sequence[Item]


@dataclass(eq=False, slots=True)
class BracketGroup:
    """The content of one pair of brackets.

    Attributes:
        opening: "[", "(" or "{"; "<" for the model family's box markers; "" for the whole text.
        items: in the order written; for braces, the items of the last field.
        fields: (name, items) in braces. Items before the first name are named "".
        joined: only a comma separates it from the previous group.
        ended: false if the text ends before it closes; for the whole text, if a limit cut it off.
    """

    opening: str
    items: list[Item]
    fields: list[tuple[str, list[Item]]]
    joined: bool = False
    ended: bool = False


def read_groups(text: str) -> BracketGroup:
    """Parse the text into a root group, which has no brackets of its own."""
    root = BracketGroup("", [], [])
    stack, before, left = [root], "", MAX_GROUPS
    start = text[:MAX_CHARACTERS]
    matches = _TOKEN.finditer(start if start.isascii() else start.translate(_ASCII))
    for match in itertools.islice(matches, MAX_TOKENS):
        token = match[0]
        items = stack[-1].items
        kind = match.lastgroup
        if kind == "number":
            items.append(float_of(token))
        elif kind is not None:
            items.append(token[1:-1] if kind == "text" else token)
        else:
            token = _MARKS.get(token, token)
            if token in _CLOSES:
                _close(stack, token)
            elif token in ("[", "(", "{", "<"):
                left -= 1
                if not left:
                    return root
                _open(stack, token, before)
            elif items and not isinstance(items[-1], BracketGroup):
                _after_word(stack[-1], token)
        before = token
    root.ended = start == text and next(matches, None) is None
    return root


def float_of(token: str) -> float | str:
    """The number as a float, or the text itself if it isn't a number, such as 1.2.3."""
    try:
        return float(token)
    except ValueError:
        return token


def _after_word(group: BracketGroup, token: str) -> None:
    """Inside braces, a colon turns the last word into a name. A percent sign joins its number."""
    if token == ":" and group.opening == "{":
        name, group.items = str(group.items.pop()), []
        group.fields.append((name, group.items))
    elif token == "%":
        group.items[-1] = f"{group.items[-1]}%"


def _open(stack: list[BracketGroup], bracket: str, before: str) -> None:
    """Open a group in the innermost one. A "{" that isn't a value closes open objects first."""
    while bracket == "{" and before != ":" and stack[-1].opening == "{":
        stack.pop().ended = True
    if len(stack) > MAX_DEPTH:
        del stack[1:]
    around = stack[-1].items
    follows = before == "," and bool(around) and isinstance(around[-1], BracketGroup)
    group = BracketGroup(bracket, [], [], joined=follows)
    if bracket == "{":
        group.fields.append(("", group.items))
    around.append(group)
    stack.append(group)


def _close(stack: list[BracketGroup], bracket: str) -> None:
    """Close the innermost group that the bracket can close, if any, and all groups inside it."""
    for depth in range(len(stack) - 1, 0, -1):
        if stack[depth].opening in _CLOSES[bracket]:
            for group in stack[depth:]:
                group.ended = True
            del stack[depth:]
            return
        if bracket == ")" and stack[depth].opening == "{":
            return  # it belongs to text without quotes
