"""Checks that loading a model's folder doesn't run code from it or from elsewhere.

transformers and peft can run code that a folder contains or names: classes (`auto_map`), attention
kernels from the hub, packages for quantized weights. This package calls every loader with
`trust_remote_code=False`. This check runs first, and its error names the file and the setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from virft_fast.batch import Json

_CODE = {
    "auto_map", "custom_generate", "custom_pipelines", "kernel_config", "megatron_config",
    "use_kernels",
}  # fmt: skip
# An adapter may name classes only from these libraries.
_LIBRARIES = ("transformers", "peft")


class AsksForCode(ValueError):
    """The model's folder asks for code, so it isn't loaded."""


def refuse_code(folder: str | Path, flag: str = "--model_name_or_path") -> None:
    """Check the folder of a model or adapter; hub ids are not checked.

    Raises:
        AsksForCode: a file asks for code or for quantized weights, or the weights are pickled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    named = f"{flag} {str(folder)!r}"
    # Includes config.5.0.0.json, which transformers reads if config.json lists it.
    for file in sorted(folder.glob("*config*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except RecursionError:
            raise AsksForCode(f"{named}: {file.name}: got JSON nested too deep") from None
        except (OSError, ValueError):  # this file's loader reports it
            continue
        for key, value in _entries(content):
            if key == "quantization_config" and value:
                raise AsksForCode(
                    f"{named}: expected weights that are not quantized, got {file.name} with "
                    f"{key} {value!r:.100}; use the model before it was quantized"
                )
            if _asks_for_code(key, value):
                raise AsksForCode(
                    f"{named}: expected a model without code of its own, got {file.name} with "
                    f"{key} {value!r:.100}; such code is never run, and no flag allows it: remove "
                    "the entry if transformers has the model itself, or use another one"
                )
    if (folder / "custom_generate").exists():
        raise AsksForCode(
            f"{named}: expected a model without code of its own, got a folder custom_generate; "
            "such code is never run: remove it if the model works without"
        )
    pickled = sorted(path.name for path in folder.glob("*model*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise AsksForCode(
            f"{named}: expected weights in .safetensors, got {pickled[0]}; pickled weights are "
            "not loaded: convert them, or download the model's safetensors"
        )


def _entries(content: Json) -> Iterator[tuple[str, Json]]:
    """Every key of a JSON document with its value, at any depth."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            yield from value.items()
        if isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value


def _asks_for_code(key: str, value: Json) -> bool:
    if key.endswith(("attn_implementation", "experts_implementation")):  # "/": a kernel on the hub
        return "/" in json.dumps(value)
    if key == "parent_library":
        return str(value).split(".")[0] not in _LIBRARIES
    return key in _CODE and bool(value)
