"""Visual-RFT's prompts, word for word, and the categories of its experiments."""

from __future__ import annotations

import re

# Every detection prompt asks for boxes in one of these spaces; see `virft_fast.tasks.coordinates`.
_SPACES = {
    "thousand": "between 0 and 1000, integer",
    "pixels": "absolute pixel coordinates, integer",
}

# Visual-RFT's data sets -> what the images show, and what the prompt asks for.
CLASSIFICATION_SETS: dict[str, tuple[str, str]] = {
    "flowers102": ("plant", "species"),
    "pets37": ("pet", "species"),
    "cars196": ("car", "model"),
    "aircraft": ("aircraft", "model"),
}

NOVEL_15 = (
    "mouse", "fork", "hot dog", "cat", "airplane", "suitcase", "parking meter", "sandwich",
    "train", "hair drier", "toilet", "toaster", "snowboard", "frisbee", "bear",
)  # fmt: skip
COCO_8 = ("bus", "train", "fire hydrant", "stop sign", "cat", "dog", "bed", "toilet")
LVIS_13 = (
    "casserole", "die", "egg_roll", "futon", "garbage", "handsaw", "hippopotamus",
    "kitchen_table", "mallet", "omelet", "shot_glass", "stepladder", "sugar_bowl",
)  # fmt: skip
LVIS_6 = ("horse_buggy", "die", "kitchen_table", "omelet", "papaya", "stepladder")
# base65 is all of COCO's categories that aren't in novel15.
CATEGORY_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "coco": {"novel15": NOVEL_15, "few8": COCO_8},
    "lvis": {"lvis13": LVIS_13, "lvis6": LVIS_6},
}

# Includes the words after the name, because the name itself may contain a quote (rubik's cube).
_CATEGORY = re.compile(r"category '(.+?)' in the image")
_QUOTED = re.compile(r"category '([^']+)'")

NO_OBJECTS = "<answer>No Objects</answer>"


def detection_problem(category: str, space: str = "thousand") -> str:
    """Visual-RFT's prompt that asks for all boxes of a category.

    Args:
        space: unit of the model's boxes, "thousand" or "pixels".
    """
    return (
        f"Detect all objects belonging to the category '{category}' in the image, and provide the "
        f"bounding boxes ({_SPACES[space]}) and confidence (between 0 and 1, with two decimal "
        "places).\nIf no object belonging to the category "
        f"'{category}' in the image, return 'No Objects'.\n"
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> "
        "tags.The output answer format should be as follows:\n"
        "<think> ... </think> <answer>[{'Position': [x1, y1, x2, y2], 'Confidence': number}, ...]"
        "</answer>\nPlease strictly follow the format."
    )


def category_in(problem: str) -> str | None:
    """The category that a detection prompt asks about; None for other prompts."""
    match = _CATEGORY.search(problem) or _QUOTED.search(problem)
    return match[1] if match else None


def presence_problem(categories: list[str]) -> str:
    """Ask which of the categories are in the image. Our wording: the original has only answers."""
    return (
        f"Which of these categories are in the image: {', '.join(categories)}?\n"
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> "
        "tags. The final answer is the names of the categories that are in the image, separated by "
        "commas, or 'No Objects'."
    )


def classification_problem(thing: str, kind: str) -> str:
    """Visual-RFT's prompt that asks for a class; thing and kind are e.g. "plant" and "species".

    For the original's four data sets it asks for a "species name", whatever the kind.
    """
    article = "an" if thing[:1].lower() in ("a", "e", "i", "o", "u") else "a"
    name = "species" if (thing, kind) in CLASSIFICATION_SETS.values() else kind
    return (
        f"This is an image containing {article} {thing}. Please identify the {kind} of the {thing} "
        "based on the image.\n"
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> "
        "tags.The output answer format should be as follows:\n"
        f"<think> ... </think> <answer>{name} name</answer>\nPlease strictly follow the format."
    )


def grounding_problem(instruction: str, space: str = "thousand", *, compat: bool = False) -> str:
    """Visual-RFT's prompt that asks for the one box that an instruction refers to.

    Args:
        compat: see `grounding_format`.
    """
    scale = "" if space == "thousand" else f" ({_SPACES[space]})"
    return (
        f"Output the bounding box{scale} in the image corresponding to the instruction: "
        f"{instruction} {grounding_format(compat=compat)}"
    )


def grounding_format(*, compat: bool = False) -> str:
    """The answer format that Visual-RFT adds to LISA's conversations when it loads them.

    Args:
        compat: keep the original's misspelling and stray parenthesis.
    """
    box, end = ("grouding", ")") if compat else ("grounding", "")
    return (
        f"Output the thinking process in <think> </think> and your {box} box. "
        'Following "<think> thinking process </think>\n'
        f'<answer>(x1,y1),(x2,y2)</answer>{end}" format.'
    )


def detection_solution(boxes: list[list[int]]) -> str:
    """The ground truth as Visual-RFT writes it, from xyxy boxes; 'No Objects' if there are none."""
    if not boxes:
        return NO_OBJECTS
    return f"<answer>{[{'Position': list(box), 'Confidence': 1} for box in boxes]}</answer>"


def grounding_solution(box: list[int]) -> str:
    x1, y1, x2, y2 = box
    return f"<answer> ({x1},{y1}),({x2},{y2}) </answer>"
