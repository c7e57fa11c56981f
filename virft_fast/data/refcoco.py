"""Grounding rows from RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them.

A folder holds `instances.json`, COCO's boxes, and `refs(unc).p`, `refs(google).p` or `refs(umd).p`:
pickled references, each to one annotation, with the sentences that mean it. The same as JSON is
read as well. A pickle can make only lists, dicts, texts and numbers here.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from virft_fast.data.accounts import Built
from virft_fast.data.coco import image_paths
from virft_fast.data.image_files import Found
from virft_fast.data.instances import key_of, read_annotations
from virft_fast.data.lisa import TARGET, Asked, Shape
from virft_fast.data.texts import read_json

SPLITS = {"train": "train", "val": "validation", "test": "test", "testA": "testA", "testB": "testB"}
# Of a pickle. A byte of it can make an object of about a hundred.
MAX_BYTES = 2**27


def read_refcoco(source: Path, images: Path, built: Built) -> dict[str, list[Asked]]:
    """Split -> a row for each sentence, about the box of its annotation in pixels.

    Args:
        source: the folder, or a file of references in it.
        images: folder of COCO's images: train2014, or train2017, which holds the same pictures.
        built: told of what is left out and converted.
    Raises:
        FileNotFoundError, ValueError: there is no such file, or it can't be used; says why.
    """
    file = _refs_file(source)
    references = _references(file, built)
    annotations = read_annotations(file.parent / "instances.json", "coco", images, "--source")
    annotations = replace(annotations, find=partial(_found, annotations.find))
    by_id = defaultdict(list)
    for record in annotations.records:
        if record["id"] is not None:
            by_id[record["id"]].append(record)
    paths = image_paths(annotations, annotations.images)
    rows: dict[str, list[Asked]] = {}
    for number, reference in enumerate(references):
        where = f"reference {number}"
        meant = by_id.get(key_of(reference.get("ann_id")), [])
        split, texts = _split(reference), _sentences(reference)
        if split is None:
            built.leave_out(f"reference in none of the splits {', '.join(SPLITS)}", where)
        elif len(meant) != 1:
            built.leave_out("reference that leads to no box, or to several", where)
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
                Asked(path, record["id"], text, shapes, size) for text in texts
            )
    built.add(annotations.account)
    if not rows:
        raise ValueError(
            f"--source {file}: expected references with ann_id, image_id, split and sentences, not "
            f"one can be used; {'; '.join(built.lines())}"
        )
    train = {row.number for row in rows.get("train", ())}
    for split in rows.keys() - {"train"}:
        shared = train & {row.number for row in rows[split]}
        if shared:
            built.notes.append(f"{len(shared)} images of {split} are in train as well")
    return {split: rows[split] for split in SPLITS.values() if split in rows}


def _refs_file(source: Path) -> Path:
    if source.is_file():
        return source
    files = sorted(
        path for path in source.glob("refs*") if path.suffix in (".p", ".pkl", ".pickle", ".json")
    )
    if len(files) != 1:
        raise FileNotFoundError(
            f"--source {source}: expected one refs(...).p in it, got "
            f"{', '.join(path.name for path in files) or 'none'}; name the file"
        )
    return files[0]


def _references(file: Path, built: Built) -> list[dict[str, Any]]:
    if file.suffix == ".json":
        data = read_json(file, built, f"--source {file}")
    else:
        data = _unpickled(file)
    if not isinstance(data, list):
        raise ValueError(
            f"--source {file}: expected a list of references, got {type(data).__name__}"
        )
    references = [reference for reference in data if isinstance(reference, dict)]
    for _ in range(len(data) - len(references)):
        built.leave_out("reference that is no object", file.name)
    return references


def _split(reference: Mapping[str, Any]) -> str | None:
    split = reference.get("split")
    return SPLITS.get(split) if isinstance(split, str) else None


def _sentences(reference: Mapping[str, Any]) -> list[str]:
    """`sent` of each, which is `raw` in lower case and without punctuation."""
    given = reference.get("sentences")
    sentences = [s for s in given if isinstance(s, dict)] if isinstance(given, list) else []
    texts = [s.get("sent") or s.get("raw") for s in sentences]
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]


def _found(find: Callable[[str], Found], file: str) -> Found:
    """Where an image is; COCO's pictures of 2017 are named by their number alone."""
    found = find(file)
    if found.path is None or os.path.isfile(found.path):
        return found
    other = find(re.sub(r"COCO_(train|val)2014_", "", file))
    if other.path is None or not os.path.isfile(other.path):
        return found
    return Found(other.path, "image found by its name in COCO 2017")


# --- Pickles ---------------------------------------------------------------------------------


class _Opcodes(dict):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {chr(code)!r}, which can make other objects")


class _Memo(dict):
    """Without containers, so that what is loaded is a tree, not larger than its file."""

    def __getitem__(self, number: int) -> Any:
        value = super().__getitem__(number)
        if isinstance(value, (list, dict)):
            raise pickle.UnpicklingError("a list or dict that is used twice")
        return value


def _listed(length: int) -> Callable[[Any], None]:
    def load(unpickler: Any) -> None:
        unpickler.stack[-length:] = [unpickler.stack[-length:]]

    return load


_CODES = _Opcodes(
    {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (
            pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE,
            pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG,
            pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING,
            pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES,
            pickle.BINBYTES8, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
            pickle.BINUNICODE8, pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS,
            pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS, pickle.GET,
            pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT,
            pickle.MEMOIZE,
        )
    }
)  # fmt: skip
# Tuples become lists: as a key, one nested in itself would take forever to hash.
_CODES[pickle.TUPLE[0]] = _CODES[pickle.LIST[0]]
_CODES[pickle.EMPTY_TUPLE[0]] = _CODES[pickle.EMPTY_LIST[0]]
for _length, _code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), start=1):
    _CODES[_code[0]] = _listed(_length)


class _Plain(pickle._Unpickler):
    """Loads texts, numbers, lists and dicts; any other opcode is an error.

    It is the module's unpickler in Python; that in C takes a memo of any size.
    """

    dispatch = _CODES

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the class {module}.{name}")

    def _decode_string(self, value: bytes) -> str:
        """Python 2's texts of bytes."""
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin-1")


def _unpickled(file: Path) -> Any:
    """What a pickle of plain values holds.

    Raises:
        ValueError: it holds something else, or is damaged or too large.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise pickle.UnpicklingError(f"{size} bytes, more than {MAX_BYTES}")
        return _Plain(file.read_bytes()).load()
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise ValueError(
            f"--source {file}: expected a pickle of lists, dicts, texts and numbers, got "
            f"{type(error).__name__}: {error!s:.200}; write it as JSON if you trust it"
        ) from error
