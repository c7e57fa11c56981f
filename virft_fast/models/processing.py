"""The processor of a Qwen-VL checkpoint: text and images in, tensors out.

transformers needs torchvision for the video part of its processors. This package uses no video, so
it builds its processor without that part. Pillow resizes the images even if torchvision is
installed, so that a run gives the same numbers on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.processing_utils import ProcessorMixin

from virft_fast.models.chat_template import check_chat_template
from virft_fast.models.families import FAMILIES, Tokenizer
from virft_fast.models.saving import read_base_files, save_processor
from virft_fast.models.source import ModelSource, find_model
from virft_fast.models.tiny import CHAT_TEMPLATE
from virft_fast.models.trust import AsksForCode

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"


class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for images and text.

    Attributes:
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
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **options: object
    ) -> None:
        """Write the files that `virft_fast.models.saving` describes; the options are ignored."""
        ProcessorMixin.save_pretrained(self, save_directory)
        save_processor(self, Path(save_directory))


def load_processor(
    name_or_path: str | ModelSource,
    *,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    renders: bool = True,
) -> ImageOnlyQwen2VLProcessor:
    """The processor of a Qwen-VL checkpoint, whose tokenizer pads on the left.

    Args:
        name_or_path: a checkpoint folder, a hub id, `tiny`, or what `find_model` returned for it.
            If an adapter's folder has no processor, the base model's is loaded.
        revision: revision of a hub id.
        min_pixels, max_pixels: bounds of an image's area after resizing, in pixels; None keeps the
            checkpoint's.
        renders: check the chat template, because the caller is going to use it.
    Raises:
        FileNotFoundError: the tokenizer or image processor is missing.
        ValueError: no size fits the bounds, the tokenizer has no image token, an adapter's base
            model can't be found, or the chat template fails or doesn't finish.
    """
    source = find_model(name_or_path, revision)
    name = source.name
    try:
        processor = _load(source)
    except AsksForCode:
        raise
    except Exception as error:  # transformers raises many kinds for unexpected content
        is_folder = Path(source.chain[0][0]).is_dir()
        got = "a folder without them" if is_folder else "neither a folder nor a reachable hub id"
        raise FileNotFoundError(
            f"--model_name_or_path {name!r}: expected a folder or hub id with a tokenizer and an "
            f"image processor, got {got} ({' '.join(str(error).split())[:300]}); check the "
            "spelling, or copy the tokenizer and (pre)processor files of the original model into "
            "the folder"
        ) from error
    if IMAGE_TOKEN not in processor.tokenizer.get_vocab():
        raise ValueError(
            f"--model_name_or_path {name!r}: expected a Qwen-VL tokenizer, got one without "
            f"{IMAGE_TOKEN}; is it a text-only model?"
        )
    tokenizer = processor.tokenizer
    if lacking := [n for n in ("eos_token", "pad_token") if getattr(tokenizer, n) is None]:
        raise ValueError(
            f"--model_name_or_path {name!r}: expected a tokenizer with {' and '.join(lacking)}; "
            "name them in its tokenizer_config.json"
        )
    tokenizer.padding_side = "left"
    bounds = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    size = dict(processor.image_processor.size)
    size |= {edge: pixels for edge, pixels in bounds.items() if pixels is not None}
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"expected 0 < min_pixels <= max_pixels, got {size['shortest_edge']} and "
            f"{size['longest_edge']}; pass both --min_pixels and --max_pixels, or neither"
        )
    processor.image_processor.size = size
    if renders:
        check_chat_template(processor, name)
    return processor


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


def build_tiny_processor(tokenizer: Tokenizer) -> ImageOnlyQwen2VLProcessor:
    """The embedded model's processor; it resizes images to an area of 56x56 to 168x168 pixels."""
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 168**2})
    return ImageOnlyQwen2VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


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
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") in FAMILIES:
            processor.model_type = config["model_type"]
    return processor
