"""Grounding rows from RefCOCO, RefCOCO+ and RefCOCOg in their published form.

A folder contains `instances.json`, with COCO's boxes, and `refs(unc).p`, `refs(google).p` or
`refs(umd).p`: pickled references, each to one annotation, with the sentences that refer to it. The
references may also be JSON. Here, a pickle can create only lists, dicts, strings and numbers.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from virft_fast.arguments import expecting
from virft_fast.batch import Json, Row
from virft_fast.data.accounts import Built
from virft_fast.data.coco import image_paths
from virft_fast.data.image_files import Found
from virft_fast.data.instances import key_of, read_annotations
from virft_fast.data.lisa import TARGET, Instruction, Shape
from virft_fast.data.texts import only_file, read_json

# Split of a reference -> our split.
REFERENCE_SPLITS = {"train": "train", "val": "validation", "test": "test",
                    "testA": "testA", "testB": "testB"}  # fmt: skip
# Size limit for pickles: each byte can create an object of about 100 bytes.
MAX_BYTES = 2**27


def read_refcoco(source: Path, images: Path, built: Built) -> dict[str, list[Instruction]]:
    """Split -> one instruction per sentence, about its annotation's box in pixels.

    Args:
        source: the folder, or a file of references in it.
        images: folder of COCO's images: train2014, or train2017, which contains the same images.
        built: records what is left out and converted.
    Raises:
        FileNotFoundError, ValueError: a file is missing or can't be used; says why.
    """
    file = _refs_file(source)
    references = _references(file, built)
    annotations = read_annotations(file.parent / "instances.json", "coco", images, "--source")
    annotations = replace(annotations, find=partial(_find, annotations.find))
    by_id: dict[Json, list[Row]] = defaultdict(list)
    for record in annotations.records:
        if record["id"] is not None:
            by_id[record["id"]].append(record)
    paths = image_paths(annotations, annotations.images)
    rows: dict[str, list[Instruction]] = {}
    for number, reference in enumerate(references):
        where = f"reference {number}"
        meant = by_id.get(key_of(reference.get("ann_id")), [])
        split, texts = REFERENCE_SPLITS.get(str(reference.get("split"))), _sentences(reference)
        if split is None:
            built.leave_out(f"reference in none of the splits {', '.join(REFERENCE_SPLITS)}", where)
        elif len(meant) != 1:
            built.leave_out("reference that matches no box, or several", where)
        elif key_of(reference.get("image_id")) != meant[0]["image_id"]:
            built.leave_out("reference to a box in another image", where)
        elif not texts:
            built.leave_out("reference without a sentence", where)
        elif meant[0]["image_id"] in paths:
            record = annotations.images[meant[0]["image_id"]]
            x, y, width, height = meant[0]["bbox"]
            shapes = [Shape([(x, y), (x + width, y + height)], TARGET)]
            size = (record["width"], record["height"]) if record["sized"] else None
            path = paths[record["id"]]
            rows.setdefault(split, []).extend(
                Instruction(path, record["id"], text, shapes, size) for text in texts
            )
    built.add(annotations.account)
    if not rows:
        raise ValueError(
            f"--source {file}: expected references with ann_id, image_id, split and sentences, "
            f"but none can be used; {'; '.join(built.lines())}"
        )
    train = {row.number for row in rows.get("train", ())}
    for split in rows.keys() - {"train"}:
        shared = train & {row.number for row in rows[split]}
        if shared:
            built.notes.append(f"{len(shared)} images of {split} are in train as well")
    return {split: rows[split] for split in REFERENCE_SPLITS.values() if split in rows}


def _refs_file(source: Path) -> Path:
    if source.is_file():
        return source
    suffixes = (".p", ".pkl", ".pickle", ".json")
    files = sorted(path for path in source.glob("refs*") if path.suffix in suffixes)
    return only_file(files, source, "one refs(...).p in it", "; name the file")


def _references(file: Path, built: Built) -> list[Row]:
    json = file.suffix == ".json"
    data = read_json(file, f"--source {file}", built) if json else _unpickled(file)
    if not isinstance(data, list):
        raise ValueError(
            f"--source {file}: expected a list of references, got {type(data).__name__}"
        )
    for reference in data:
        if not isinstance(reference, dict):
            built.leave_out("reference that is not an object", file.name)
    return [reference for reference in data if isinstance(reference, dict)]


def _sentences(reference: Row) -> list[str]:
    """The text `sent` of each sentence, which is `raw` in lower case and without punctuation."""
    given = reference.get("sentences")
    sentences = [s for s in given if isinstance(s, dict)] if isinstance(given, list) else []
    texts = [s.get("sent") or s.get("raw") for s in sentences]
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]


def _find(find: Callable[[str], Found], file: str) -> Found:
    """Where an image is. COCO 2017 names the images of 2014 only by number."""
    named = find(file)
    if named.path is None or os.path.isfile(named.path):
        return named
    other = find(re.sub(r"COCO_(train|val)2014_", "", file))
    if other.path is None or not os.path.isfile(other.path):
        return named
    return Found(other.path, "image found by its name in COCO 2017")


# --- Pickles ---------------------------------------------------------------------------------


class _Opcodes(dict):
    def __missing__(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"opcode {chr(code)!r}, which can make other objects")


class _Memo(dict):
    """Refuses to return containers, so the loaded value is a tree no larger than its file."""

    def __getitem__(self, number: int) -> Json:
        value = super().__getitem__(number)
        if isinstance(value, (list, dict)):
            raise pickle.UnpicklingError("a list or dict that is used twice")
        return value


def _listed(length: int) -> Callable[[Any], None]:
    def load(unpickler: Any) -> None:  # a `_Plain`; its type stubs lack `stack`
        unpickler.stack[-length:] = [unpickler.stack[-length:]]

    return load


_PLAIN_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT
    SETITEM SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
"""
_CODES = _Opcodes()
for _code in (getattr(pickle, name)[0] for name in _PLAIN_OPCODES.split()):
    _CODES[_code] = pickle._Unpickler.dispatch[_code]
# Tuples become lists: hashing a deeply nested tuple as a key could take forever.
_CODES[pickle.TUPLE[0]] = _CODES[pickle.LIST[0]]
_CODES[pickle.EMPTY_TUPLE[0]] = _CODES[pickle.EMPTY_LIST[0]]
for _length, _code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), start=1):
    _CODES[_code[0]] = _listed(_length)


class _Plain(pickle._Unpickler):
    """Loads strings, numbers, lists and dicts. Any other opcode is an error.

    Based on the pickle module's Python unpickler: the C version lets the memo grow without limit.
    """

    dispatch = _CODES

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"the class {module}.{name}")

    def _decode_string(self, value: bytes) -> str:
        """Decode strings that Python 2 pickled as bytes."""
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin-1")


def _unpickled(file: Path) -> Json:
    """Load the plain values in a pickle.

    Raises:
        ValueError: it contains something else, is damaged, or is too large.
    """
    expected = f"--source {file}: expected a pickle of lists, dicts, texts and numbers"
    with expecting(expected, hint="; write it as JSON if you trust it"):
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise pickle.UnpicklingError(f"{size} bytes, more than {MAX_BYTES}")
        return _Plain(file.read_bytes()).load()
