"""Our rewards in the call conventions of other trainers, one line each.

TRL takes `REWARDS[name]` as it is. verl takes a function by file and name; in that file:

    compute_score = verl_score("detection_map")

ms-swift takes a class by name; in its plugin:

    orms["detection_map"] = swift_orm("detection_map")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from virft_fast.batch import Json
from virft_fast.tasks import load_reward_funcs
from virft_fast.tasks.scoring import Conversation, RewardFunction, call


def verl_score(name: str) -> Callable[..., float]:
    """A reward as verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`.

    The solution is verl's ground truth; the entries of `extra_info`, if it is a dict, are the other
    columns, such as `extent` and `choices`. The function can be pickled, as Ray needs it.

    Args:
        name: of `REWARDS`, or anything that `load_reward_funcs` takes.
    Raises:
        ValueError: there is no such reward.
    """
    return partial(_verl_score, load_reward_funcs([name])[0][1])


def _verl_score(
    reward: RewardFunction,
    data_source: object,
    solution_str: str,
    ground_truth: Json,
    extra_info: object = None,
    **_: object,
) -> float:
    given = extra_info.items() if isinstance(extra_info, Mapping) else ()
    # Lists read from parquet are arrays.
    columns = {k: [v.tolist() if hasattr(v, "tolist") else v] for k, v in given}
    columns |= {"prompts": [""], "completions": [solution_str], "solution": [ground_truth]}
    (value,) = call(reward, columns)
    return 0.0 if value is None else float(value)


def swift_orm(name: str) -> type:
    """A reward as a class for ms-swift's `orms`, called with (completions, **columns).

    Args and errors: see `verl_score`. The data set needs a column `solution`.
    """
    _, reward = load_reward_funcs([name])[0]

    class Reward:
        def __init__(self, args: object = None, **_: object) -> None:
            pass

        def __call__(
            self, completions: Sequence[Conversation], **columns: Json
        ) -> list[float | None]:
            columns.setdefault("prompts", columns.get("messages") or [""] * len(completions))
            values = call(reward, {"completions": completions, **columns})
            return [None if value is None else float(value) for value in values]

    Reward.__name__ = Reward.__qualname__ = name.rpartition(":")[2]
    return Reward
