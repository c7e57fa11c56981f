"""Tasks: how answers are read, and which rewards they earn."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from virft_fast.batch import Sample
from virft_fast.tasks import brackets, rewards, visual_rft
from virft_fast.tasks.answers import (
    MAX_OBJECTS,
    Detection,
    answer_text,
    marked_answer,
    parse_detection,
    parse_label,
    parse_points,
    unreadable,
    valid_box,
)
from virft_fast.tasks.coordinates import THOUSAND, Extent, extent_of, rescale, to_thousand
from virft_fast.tasks.labels import ClosedSet, key
from virft_fast.tasks.scoring import (
    NamedRewards,
    RewardError,
    RewardFunction,
    RewardLog,
    load_function,
    score,
)
from virft_fast.tasks.values import import_math_verify, number_of, option_of

__all__ = [
    "ACCURACY_REWARDS", "DEFAULT_REWARDS", "REWARDS", "Detection", "NamedRewards", "RewardError",
    "RewardFunction", "RewardLog", "answer_text", "check_solution", "default_rewards",
    "detect_task", "in_thousandths", "is_ours", "load_reward_funcs", "negative_share",
    "parse_detection", "parse_label", "parse_points", "score", "unearned", "with_class_set",
]  # fmt: skip

_FUNCTIONS: tuple[Callable[..., list[float]], ...] = (
    rewards.accuracy_iou, rewards.accuracy_confidence, rewards.format_reward, rewards.accuracy,
    rewards.accuracy_choice, rewards.accuracy_number, rewards.accuracy_math,
    rewards.grounding_giou, rewards.hungarian_iou, rewards.detection_map, rewards.point_in_box,
    rewards.point_distance, rewards.accuracy_count, rewards.accuracy_presence,
    visual_rft.visual_rft_accuracy_iou, visual_rft.visual_rft_accuracy_iou_v1,
    visual_rft.visual_rft_accuracy_confidence, visual_rft.visual_rft_accuracy,
    visual_rft.visual_rft_grounding,
)  # fmt: skip
REWARDS = {reward.__name__.removesuffix("_reward"): reward for reward in _FUNCTIONS}
DEFAULT_REWARDS: dict[str, list[str]] = {
    "detection": ["accuracy_iou", "accuracy_confidence", "format"],
    "classification": ["accuracy", "format"],
    "choice": ["accuracy_choice", "format"],
    "number": ["accuracy_number", "format"],
    "grounding": ["grounding_giou", "format"],
}
# Name -> the reward that a solution earns when it is given as the answer.
ACCURACY_REWARDS: dict[str, float] = {
    name: 2.0 if name == "visual_rft_grounding" else 1.0
    for name in REWARDS
    if name not in ("format", "accuracy_presence")  # the latter's maximum depends on the row
}
CLEAR_MAJORITY = 0.8
_SECTIONS = re.compile(r"(</?(?:think|answer)>)")
_NUMBER = re.compile(rf"(?<![\w.]){brackets.NUMBER}")
_ANY_OPTIONS = [""] * 26  # the most options a row may have
BOX_TASKS = ("detection", "grounding")  # other tasks have text as solutions


def default_rewards(task: str, solutions: Sequence[str]) -> list[str]:
    """The default rewards of a task.

    Leaves out `accuracy_confidence` if no solution has a confidence: not even the ground truth
    could earn it.
    """
    names = DEFAULT_REWARDS[task]
    read = [parse_detection(solution) for solution in solutions if task == "detection"]
    confidences = [c for detection in read if detection for c in detection.confidences]
    if confidences and not any(c is not None for c in confidences):
        return [name for name in names if name != "accuracy_confidence"]
    return names


def is_ours(name: str, function: RewardFunction) -> bool:
    """Whether `function` is the reward we registered as `name`, not a user's with the same name."""
    return name in REWARDS and inspect.unwrap(function) is inspect.unwrap(REWARDS[name])


def negative_share(solutions: Sequence[str]) -> float | None:
    """The share of solutions without objects among those with readable boxes or none, for
    `accuracy_presence`; None if it is 0 or 1, where there is nothing to balance."""
    read = [parse_detection(solution) for solution in solutions]
    empty = [not detection.boxes for detection in read if detection is not None]
    return sum(empty) / len(empty) if len(set(empty)) == 2 else None


def with_class_set(
    reward_funcs: NamedRewards, classes: ClosedSet | None, share: float | None = None
) -> list[tuple[str, RewardFunction]]:
    """The rewards, where our `accuracy` uses the class set of the split, and our
    `accuracy_presence` its `negative_share`."""

    def informed(f: RewardFunction) -> RewardFunction:
        if is_ours("accuracy", f):
            return rewards.knowing_classes(f, classes)
        return rewards.knowing(f, share, "negative_share") if is_ours("accuracy_presence", f) else f

    return [(name, informed(f)) for name, f in reward_funcs]


def unearned(
    reward_funcs: NamedRewards, samples: Sequence[Sample]
) -> list[tuple[int, str, float | None, float]]:
    """(row, name, reward, maximum) wherever a solution, given as the answer, earns less than an
    accuracy reward's maximum."""
    wrong = []
    for sample in samples:
        columns = {name: [value] for name, value in sample.columns.items()}
        completion = [[{"role": "assistant", "content": sample.solution}]]
        for name, function in reward_funcs:
            if name not in ACCURACY_REWARDS or not is_ours(name, function):
                continue
            value = function(prompts=[list(sample.messages)], completions=completion, **columns)[0]
            best = ACCURACY_REWARDS[name]
            if value is None or abs(value - best) > 1e-6:
                wrong.append((sample.index, name, value, best))
    return wrong


def load_reward_funcs(names: Sequence[str]) -> list[tuple[str, RewardFunction]]:
    """Load reward functions by registered name or from path/to/file.py:function.

    Returns:
        (name, function) in the order given; a function from a file keeps its own name.
    Raises:
        ValueError: a name, file or function doesn't exist, or a name occurs twice.
    """
    functions = [load_function(name) if ":" in name else _registered(name) for name in names]
    given = [name for name, _ in functions]
    if len(set(given)) < len(given):
        raise ValueError(f"--reward_funcs: expected different names, got {given}")
    return functions


def _registered(name: str) -> tuple[str, RewardFunction]:
    if name in REWARDS:
        if name == "accuracy_math":
            import_math_verify()  # fail now, not after the model is loaded
        return name, REWARDS[name]
    close = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(REWARDS)}"
    if "/" in name:  # a model's id, as TRL takes it
        hint = "a reward model isn't loaded here; ask one on a server with virft_fast.tasks.judge"
    raise ValueError(
        f"--reward_funcs: expected a known name or path/to/file.py:function, got {name!r}; {hint}"
    )


def detect_task(solutions: Sequence[str]) -> str:
    """The task of the solutions: detection, classification, grounding, choice or number.

    A minority that looks like another task counts as malformed; `check_solution` reports it.

    Raises:
        ValueError: there are no solutions, or the share that agrees is below CLEAR_MAJORITY.
    """
    kinds = Counter(_kind(str(solution)) for solution in solutions)
    texts = [kind for kind in kinds if kind not in BOX_TASKS]
    if len(texts) > 1:  # letters or numbers among other class names are class names, too
        kinds["classification"] = sum(kinds.pop(kind) for kind in texts)
    task, count = max(kinds.items(), key=lambda item: item[1], default=("", 0))
    if not count or count < CLEAR_MAJORITY * len(solutions):
        got = ", ".join(sorted(kinds)) or "no usable solution"
        raise ValueError(
            f"--task auto: expected solutions of one task, got {got}; pass one of --task "
            f"{', '.join(DEFAULT_REWARDS)}"
        )
    return task


def _kind(solution: str) -> str:
    detection = parse_detection(solution)
    if detection is None or (detection.boxes and all(map(unreadable, detection.boxes))):
        return _kind_of_text(solution)
    written = answer_text(solution).lstrip()
    return "grounding" if written.startswith("(") else "detection"


def _kind_of_text(solution: str) -> str:
    if number_of(solution) is not None:
        return "number"
    short = len(answer_text(solution)) <= len("(A).")
    return "choice" if short and option_of(solution) else "classification"


def check_solution(
    task: str,
    solution: str,
    extent: Sequence[float] | None = None,
    choices: Sequence[str] | str | None = None,
) -> str | None:
    """Why a ground truth can't be scored, or None if it can.

    Args:
        extent: (width, height) of the coordinate space of its boxes; None: 0..1000.
        choices: the row's list of class names. Text instead of a list is reported as an error.
    """
    if task in ("classification", "choice") and isinstance(choices, str):
        return (
            f'expected its options as a list, or as JSON such as ["no", "yes"], got {choices!r:.80}'
        )
    if task == "classification":
        try:
            ClosedSet(() if choices is None else choices)
        except ValueError as error:
            return str(error)
        named = key(answer_text(solution))
        return None if named else "expected a class name, got an empty solution"
    if task == "choice":
        letter = option_of(solution, _ANY_OPTIONS)
        return None if letter else f"expected an option's letter, got {solution!r:.120}"
    if task == "number":
        return None if number_of(solution) else f"expected a number, got {solution!r:.120}"
    try:
        detection = parse_detection(solution, None if extent is None else extent_of(extent))
    except ValueError as error:
        return str(error)
    if detection is not None and len(detection.boxes) >= MAX_OBJECTS:
        return f"expected fewer than {MAX_OBJECTS} boxes in the solution; split the row"
    if not brackets.read_groups(marked_answer(solution)).ended:
        return (
            f"expected at most {brackets.MAX_CHARACTERS} characters, {brackets.MAX_TOKENS} words, "
            f"numbers and signs, and fewer than {brackets.MAX_GROUPS} brackets in the solution, "
            "got more; split the row"
        )
    if detection is None:
        return f"expected boxes in the solution, got {solution!r:.120}"
    if any(map(unreadable, detection.boxes)):
        return (
            f"expected boxes of four numbers in all objects of the solution, got {solution!r:.120}"
        )
    bad = [box for box in detection.boxes if not valid_box(box)]
    if bad:
        space = "0..1000" if extent is None else f"0..{extent[0]}, 0..{extent[1]}"
        return (
            f"expected boxes with x1 < x2 and y1 < y2 in {space}, got {_as_written(bad[0], extent)}"
        )
    if task == "grounding" and len(detection.boxes) != 1:
        return f"expected one box, got {len(detection.boxes)}"
    return None


def in_thousandths(text: str, extent: Sequence[float]) -> str:
    """Convert the boxes in a text from `extent`, (width, height), to whole thousandths.

    Applies to the thinking and to the answer. All other text stays the same, including four
    numbers in the thinking that aren't a box inside `extent`.

    Raises:
        ValueError: the numbers of a box can't be told apart from other numbers.
    """
    sections = _SECTIONS.split(text)  # the last one, read as sections[-1], is not a tag
    return "".join(
        _section_in_thousandths(section, extent_of(extent), thought=sections[at - 1] == "<think>")
        for at, section in enumerate(sections)
    )


def _section_in_thousandths(text: str, extent: Extent, *, thought: bool) -> str:
    # To find the numbers that belong to boxes, replace each number by its index and parse.
    numbers, given = itertools.count(), _NUMBER.findall(text)
    places = list(map(int, _sides(_NUMBER.sub(lambda _: str(next(numbers)), text))))
    sides = _sides(text)
    if sides != [brackets.float_of(given[at]) if at < len(given) else None for at in places]:
        raise ValueError(f"expected boxes whose numbers stand alone, got {text!r:.120}")
    new: dict[int, int] = {}
    numbers = itertools.count()
    for at in range(0, len(sides), 4):
        box = to_thousand(sides[at : at + 4], extent)
        if valid_box(box) or not thought:
            new |= zip(places[at : at + 4], _whole(box), strict=True)
    return _NUMBER.sub(lambda match: str(new.get(next(numbers), match[0])), text)


def _sides(text: str) -> list[float]:
    """The coordinates of all readable boxes in the text, as one flat list."""
    read = parse_detection(text)
    return [side for b in (read.boxes if read else ()) if not unreadable(b) for side in b]


def _whole(box: Sequence[float]) -> list[int]:
    """The box in whole thousandths. A box with an area stays at least 1 wide and 1 high."""
    first, last = [round(side) for side in box[:2]], [round(side) for side in box[2:]]
    for axis in range(2):
        if first[axis] == last[axis] and box[axis] < box[axis + 2]:
            first[axis] = min(first[axis], 999)
            last[axis] = first[axis] + 1
    return [*first, *last]


def _as_written(box: Sequence[float], extent: Sequence[float] | None) -> list[float]:
    return list(box if extent is None else rescale(box, (THOUSAND, THOUSAND), extent))
