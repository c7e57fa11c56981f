"""Processors of Qwen2-VL checkpoints, with and without torchvision.

transformers builds the video half of `Qwen2VLProcessor` from torchvision. Nothing here needs video,
so where torchvision is missing the processor is made without it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for images and text. What it saves, a machine with torchvision loads as
    the stock class."""

    # ProcessorMixin reads the attributes off this signature, so a processor without
    # `video_processor` here has none.
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        saved = super().save_pretrained(save_directory, **kwargs)
        for path in Path(save_directory).glob("*.json"):
            text = path.read_text()
            stock = text.replace(type(self).__name__, "Qwen2VLProcessor")
            if stock != text:
                path.write_text(stock)
        return saved


def load_processor(
    name_or_path: str, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> Any:
    """The processor of a Qwen2-VL checkpoint, its tokenizer padding on the left.

    Args:
        name_or_path: a checkpoint folder or a hub id.
        min_pixels, max_pixels: bounds of an image's size after resizing; None keeps the
            checkpoint's.
    Raises:
        FileNotFoundError: there is no processor.
    """
    try:
        processor = _load(name_or_path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"--model_name_or_path: expected a folder or hub id with a tokenizer and an image "
            f"processor, got {name_or_path!r}: {str(error).splitlines()[0]}"
        ) from error
    processor.tokenizer.padding_side = "left"
    size = dict(processor.image_processor.size)
    if min_pixels is not None:
        size["shortest_edge"] = min_pixels
    if max_pixels is not None:
        size["longest_edge"] = max_pixels
    processor.image_processor.size = size
    return processor


def _load(name_or_path: str) -> Any:
    if importlib.util.find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_path)
    template = tokenizer.chat_template or _chat_template_file(name_or_path)
    return ImageOnlyQwen2VLProcessor(image_processor, tokenizer, chat_template=template)


def _chat_template_file(name_or_path: str) -> str | None:
    """Qwen2-VL's checkpoints keep the chat template in a file beside the tokenizer."""
    from transformers.utils import cached_file

    for name, read in (
        ("chat_template.jinja", lambda text: text),
        ("chat_template.json", lambda text: json.loads(text)["chat_template"]),
    ):
        path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return read(Path(path).read_text())
    return None
