"""Child of test_saving.py: what the transformers of this process makes of saved folders.

python read_saved.py OUT FOLDER [FOLDER ...]
"""

from __future__ import annotations

import importlib.util
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

# A size that is not changed: versions differ in how they resize.
PICTURE = Image.linear_gradient("L").convert("RGB").crop((0, 0, 112, 84))
CHAT = [{"role": "user", "content": [{"type": "image", "image": PICTURE},
                                     {"type": "text", "text": "Detect every red."}]}]  # fmt: skip
NEW = int(transformers.__version__.split(".")[0]) >= 5
# From 4.52 on a processor has a part for videos, which needs torchvision.
HAS_PROCESSOR = not hasattr(transformers, "AutoVideoProcessor") or bool(
    importlib.util.find_spec("torchvision")
)


def read(folder, processor=None):
    """Image patches, token ids and logits of a prompt, the answer, and the pipeline's answer.

    Args:
        processor: the pipeline's; None takes the stock one, where it can be made.
    """
    dtype = {"dtype" if NEW else "torch_dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, **dtype).eval()
    pixels = images(images=[PICTURE], return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // images.merge_size**2
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    batch = {**tokenizer([text], return_tensors="pt"), **pixels}
    ids = batch["input_ids"]
    if NEW:
        batch["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(**batch).logits
    out = model.generate(**batch, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
    found = {"pixels": pixels["pixel_values"], "ids": ids, "logits": logits,
             "answer": tokenizer.decode(out, skip_special_tokens=True)}  # fmt: skip
    if processor is not None:
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    elif HAS_PROCESSOR:
        pipe = transformers.pipeline("image-text-to-text", model=str(folder), **dtype)
    else:
        return found
    text = pipe.processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    made = pipe.processor(text=[text], images=[PICTURE], return_tensors="pt")
    assert torch.equal(made["input_ids"], ids)
    found["reply"] = pipe(text=CHAT, max_new_tokens=4)[0]["generated_text"][-1]["content"]
    return found


if __name__ == "__main__":
    out, *folders = sys.argv[1:]
    torch.save({folder: read(folder) for folder in folders}, out)
    print(transformers.__version__, HAS_PROCESSOR)
