"""The processor of a checkpoint: text and images in, tensors out.

transformers needs torchvision for the video part of its processors. This package uses no video, so
it builds its processors without that part. Pillow resizes the images even if torchvision is
installed, so that a run gives the same numbers on every machine; only a family whose image
processor has no such form needs torchvision.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.processing_utils import ProcessorMixin

from virft_fast.batch import Row
from virft_fast.models.chat_template import check_chat_template, render
from virft_fast.models.families import Processor, Tokenizer, family_of
from virft_fast.models.saving import read_base_files, save_processor
from virft_fast.models.source import BOTH, IMAGE, PROCESSOR_FILES, ModelSource, find_model
from virft_fast.models.trust import AsksForCode

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"


class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for images and text.

    Attributes:
        placeholder: the token that is repeated for each row of an image's features.
        base_files: name -> content of the files it was loaded from, which are saved again.
        model_type: the family; determines which class other programs load from a saved folder.
    """

    base_files: dict[str, bytes] = {}
    model_type = "qwen2_vl"

    # ProcessorMixin reads the names of the processor's components from this signature.
    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: Tokenizer,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.placeholder = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **options: object
    ) -> None:
        """Write the files that `virft_fast.models.saving` describes; the options are ignored."""
        ProcessorMixin.save_pretrained(self, save_directory)
        save_processor(self, Path(save_directory))


@functools.cache
def image_only(kind: type[Any]) -> type[Any]:
    """A processor class of transformers, without its video part and with the attributes of
    `ImageOnlyQwen2VLProcessor`. What it saves names the class itself."""

    class ImageOnly(kind):
        base_files: dict[str, bytes] = {}
        # SmolVLM's asks for these before it renders any chat.
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: Row, **options: Any) -> Any:
            if "video_processor" in inspect.signature(cls.__init__).parameters:
                processor_dict = processor_dict | {"video_processor": None}
            return super().from_args_and_dict(args, processor_dict, **options)

        def save_pretrained(self, save_directory: str | Path, **options: object) -> None:
            kept = {n: text for n, text in self.base_files.items() if n in PROCESSOR_FILES}
            if not kept:
                super().save_pretrained(save_directory)
            for name, content in kept.items():
                (Path(save_directory) / name).write_bytes(content)

    ImageOnly.__name__ = kind.__name__
    return ImageOnly


def load_processor(
    name_or_path: str | ModelSource,
    *,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    renders: bool = True,
) -> Processor:
    """The processor of a checkpoint, whose tokenizer pads on the left. In other families than
    Qwen-VL, the tokenizer's EOS becomes the token that ends a turn.

    Args:
        name_or_path: a checkpoint folder, a hub id, `tiny`, or what `find_model` returned for it.
            If an adapter's folder has no processor, the base model's is loaded.
        revision: revision of a hub id.
        min_pixels, max_pixels: bounds of an image's area after resizing, in pixels; None keeps the
            checkpoint's. Only Qwen-VL has such bounds.
        renders: check the chat template, because the caller is going to use it.
    Raises:
        FileNotFoundError: the tokenizer or image processor is missing.
        ValueError: no size fits the bounds, the tokenizer has no image token, an adapter's base
            model can't be found, or the chat template fails or doesn't finish.
    """
    source = find_model(name_or_path, revision)
    name = source.name
    try:
        is_qwen = family_of(_model_type(source.folder, "qwen2_vl")).is_qwen
    except OSError:
        is_qwen = True  # `_load` reports it
    config: Any = None if is_qwen else source.config  # raises unless it is a family with images
    try:
        processor: Any = _load(source) if is_qwen else _load_plain(source, config)
    except AsksForCode:
        raise
    except ImportError as error:
        raise ValueError(
            f"--model_name_or_path {name!r}: its processor needs a package: {error!s:.300}"
        ) from error
    except Exception as error:  # transformers raises many kinds for unexpected content
        is_folder = Path(source.chain[0][0]).is_dir()
        got = "a folder without them" if is_folder else "neither a folder nor a reachable hub id"
        raise FileNotFoundError(
            f"--model_name_or_path {name!r}: expected a folder or hub id with a tokenizer and an "
            f"image processor, got {got} ({' '.join(str(error).split())[:300]}); check the "
            "spelling, or copy the tokenizer and (pre)processor files of the original model into "
            "the folder"
        ) from error
    if processor.placeholder not in processor.tokenizer.get_vocab():
        raise ValueError(
            f"--model_name_or_path {name!r}: expected a tokenizer with an image token, got one "
            f"without {processor.placeholder}; is it a text-only model?"
        )
    tokenizer = processor.tokenizer
    if lacking := [n for n in ("eos_token", "pad_token") if getattr(tokenizer, n) is None]:
        raise ValueError(
            f"--model_name_or_path {name!r}: expected a tokenizer with {' and '.join(lacking)}; "
            "name them in its tokenizer_config.json"
        )
    tokenizer.padding_side = "left"
    given = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    bounds = {edge: pixels for edge, pixels in given.items() if pixels is not None}
    if is_qwen:
        _bound(processor.image_processor, bounds)
    elif bounds:
        raise ValueError(
            f"--min_pixels, --max_pixels: expected a Qwen-VL, got {config.model_type}, whose image "
            f"processor has other settings; leave them out, or change {IMAGE} of the model"
        )
    if renders:
        check_chat_template(processor, name)
        if not is_qwen:
            tokenizer.eos_token = _end_of_turn(processor, source.folder) or tokenizer.eos_token
    return processor


def _bound(image_processor: Any, bounds: dict[str, int]) -> None:
    """Set the bounds of an image's area, in place; raises ValueError if no size fits them."""
    size = dict(image_processor.size) | bounds
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"expected 0 < min_pixels <= max_pixels, got {size['shortest_edge']} and "
            f"{size['longest_edge']}; pass both --min_pixels and --max_pixels, or neither"
        )
    image_processor.size = size


def resized(
    width: int, height: int, *, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """The (width, height) to which Qwen-VL's processors resize an image.

    Args:
        factor: both sides become multiples of it; it is patch size times merge size.
    Raises:
        ValueError: one side is more than 200 times the other.
    """
    new_height, new_width = smart_resize(height, width, factor, min_pixels, max_pixels)
    return new_width, new_height


def _holder(source: ModelSource) -> Path:
    """The processor's folder: the first adapter's that has one, otherwise the whole model's."""
    files = ("tokenizer_config.json", "preprocessor_config.json"), ("processor_config.json",)
    for adapter in (Path(name) for name, _ in source.chain[:-1]):
        if any(all((adapter / file).is_file() for file in group) for group in files):
            return adapter
    return source.folder


def _load(source: ModelSource) -> ImageOnlyQwen2VLProcessor:
    folder = _holder(source)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(str(folder), trust_remote_code=False)
    # Use the same lookup order as transformers' own processors.
    settings, _ = ProcessorMixin.get_processor_dict(str(folder))
    template = settings.get("chat_template") or tokenizer.chat_template
    processor = ImageOnlyQwen2VLProcessor(image_processor, tokenizer, chat_template=template)
    whole = source.folder
    processor.base_files = read_base_files(folder, whole if whole != folder else None)
    processor.model_type = _model_type(folder, processor.model_type)
    return processor


def _model_type(folder: Path, default: str) -> str:
    """A folder's `model_type`, or the default without a config.json."""
    file = folder / "config.json"
    if not file.is_file():
        return default
    return str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))


def _load_plain(source: ModelSource, config: Any) -> Any:
    """The processor that the files of another family name, or else the one that goes with its
    model."""
    folder = _holder(source)
    files = [folder / name for name in (BOTH, IMAGE, "tokenizer_config.json")]
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    named = [content["processor_class"] for content in contents if content.get("processor_class")]
    name = (named or [PROCESSOR_MAPPING_NAMES.get(config.model_type, "")])[0]
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ProcessorMixin)):
        raise ValueError(f"expected the name of a processor class of transformers, got {name!r}")
    made: Any = image_only(kind)  # type: ignore[arg-type]  # a class is hashable
    processor = made.from_pretrained(str(folder), trust_remote_code=False)
    processor.image_processor = AutoImageProcessor.from_pretrained(
        str(folder), backend="pil", trust_remote_code=False
    )
    whole, tokenizer = source.folder, processor.tokenizer
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    processor.base_files = read_base_files(folder, whole if whole != folder else None)
    processor.model_type = config.model_type
    processor.placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)
    special = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
    control = {token.content for token in special if not _MARKER.search(token.content)}
    vars(tokenizer)["control_tokens"] = control | {processor.placeholder, processor.image_token}
    return processor


# Special tokens that are part of an answer: markers of boxes and of what they show, or of thoughts.
_MARKER = re.compile(r"box|ref|quad|point|poly|loc|seg|think|answer", re.IGNORECASE)


def _end_of_turn(processor: Any, folder: Path) -> str | None:
    """The special token that the chat template puts behind an answer, or None. A model is trained
    to end its answers with it. Idefics3's other files don't name it; then it must not be the token
    that a question begins with."""
    file, tokenizer = folder / "generation_config.json", processor.tokenizer
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = config.get("eos_token_id", [])
    ends = tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])
    mark = "zqz"
    turns = (("user", "?"), ("assistant", mark), ("user", "?"))
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    try:
        text = render(processor, chat)
    except ValueError:  # a template without turns
        return None
    after, start = text.rpartition(mark)[2].lstrip(), text.partition("?")[0]
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    found = [*ends, tokenizer.eos_token, *(token for token in special if token not in start)]
    return next((end for end in found if after.startswith(end)), None)
