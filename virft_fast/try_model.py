"""`virft-fast try MODEL IMAGE QUESTION`: print a model's answer and draw its boxes on the image."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from virft_fast import dist
from virft_fast.batch import Sample
from virft_fast.cli import exit_status, positive
from virft_fast.commands import end_process
from virft_fast.config import DTYPES, EvalConfig
from virft_fast.console import log_warnings, unbreakable
from virft_fast.data.drawing import PREDICTED, draw_boxes
from virft_fast.data.images import open_image
from virft_fast.evaluation.model import EvaluatedModel
from virft_fast.models.qwen_vl import encode_prompt
from virft_fast.rollout import Sampling
from virft_fast.tasks import parse_detection
from virft_fast.tasks.answers import valid_box


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Ask; returns the exit status: 0, or 2 for input that can't be used."""
    log_warnings()
    return exit_status("try", partial(ask, make_parser().parse_args(argv)))


def ask(arguments: argparse.Namespace) -> None:
    """Print the greedy answer. If it holds boxes, draw them with their confidences.

    Raises:
        ValueError, OSError: the model or the image can't be used, or `output` can't be written.
    """
    image, length = open_image(arguments.image), arguments.max_completion_length
    output = arguments.output or Path(f"{Path(arguments.image).stem}-answer.png")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output {output}: expected a file in a folder that can be written")
    if output.resolve() == Path(arguments.image).resolve():
        raise ValueError(f"--output {output}: expected another file than the image")
    config = EvalConfig(arguments.model, max_completion_length=length, dtype=arguments.dtype,
                        max_pixels=arguments.max_pixels)  # fmt: skip
    model = EvaluatedModel(config, dist.local_device())
    content = [{"type": "image"}, {"type": "text", "text": arguments.question}]
    sample = Sample(0, ({"role": "user", "content": content},), (image,), solution="")
    prompt = encode_prompt(model.processor, sample)
    rollouts = model.generate([prompt], 1, Sampling(length, greedy=True))
    (answer,) = rollouts.texts
    print(answer)
    if rollouts.truncated.any():
        print(f"\ncut off at --max_completion_length {length}")
    extent_for = model.extent_for()
    read = parse_detection(answer, extent_for(*image.size) if extent_for else None)
    if read is None or not any(map(valid_box, read.boxes)):
        print("\nno boxes in the answer, so no picture")
        return
    labels = ["" if number is None else f"{number:.2g}" for number in read.confidences]
    done = "replaced" if output.exists() else "written"
    draw_boxes(image, read.boxes, PREDICTED, labels).save(output, format="PNG")
    print(f"\n{done}: {output}; boxes: {sum(map(valid_box, read.boxes))}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="virft-fast try", description=__doc__)
    add = parser.add_argument
    add("model", help="folder of a model or adapter, hub id, or tiny")
    add("image", help="an image file")
    add("question", help="what to ask, such as 'Detect every cat.'")
    add("--output", type=Path, help="PNG to write; default: IMAGE-answer.png in the working folder")
    add("--max_completion_length", type=positive, default=512, help="maximum tokens in the answer")
    add("--max_pixels", type=positive, help="scale a larger image down to this many pixels")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    return parser


if __name__ == "__main__":
    end_process(main())
