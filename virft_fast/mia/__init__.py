"""MIA-DPO: multi-image preference pairs, selected by where the model looked.

The model greedily answers a question about a scene with several images. If it paid little attention
to the target image, its answer is assumed to be about another image. That answer becomes the
rejected one of a pair, and the data set's own answer becomes the chosen one.
"""

from virft_fast import train_extra  # noqa: F401
from virft_fast.mia.answering import Answer, Answering, attention_ratio
from virft_fast.mia.scenes import Scene, SceneLayout, ScenePlan, Scenes, compose, source_groups
from virft_fast.mia.selection import Selection, reasons_against

__all__ = ["Answer", "Answering", "Scene", "SceneLayout", "ScenePlan", "Scenes", "Selection",
           "attention_ratio", "compose", "reasons_against", "source_groups"]  # fmt: skip
