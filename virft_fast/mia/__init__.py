"""MIA-DPO: multi-image preference pairs, selected by where the model looked.

The model answers a scene of several images greedily. If it paid little attention to the target
image, the answer is about another image. It becomes the rejected answer of a pair, and the data
set's own answer the chosen one.
"""

from virft_fast.mia.answering import Answer, Answering, attention_ratio
from virft_fast.mia.scenes import Scene, SceneLayout, ScenePlan, Scenes, compose, source_groups
from virft_fast.mia.selection import Selection, reasons_against

__all__ = ["Answer", "Answering", "Scene", "SceneLayout", "ScenePlan", "Scenes", "Selection",
           "attention_ratio", "compose", "reasons_against", "source_groups"]  # fmt: skip
