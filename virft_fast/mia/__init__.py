"""MIA-DPO: multi-image preference pairs, selected by where the model looked.

The model answers a scene of several images greedily. Where little of its attention lies on the
target image, the answer is about another image: it becomes the rejected answer of a pair whose
chosen answer is the data set's own.
"""

from virft_fast.mia.answering import Answer, Answering, attention_ratio
from virft_fast.mia.scenes import Plan, Scene, SceneLayout, Scenes, compose, source_groups
from virft_fast.mia.selection import Selection, reasons_against

__all__ = ["Answer", "Answering", "Plan", "Scene", "SceneLayout", "Scenes", "Selection",
           "attention_ratio", "compose", "reasons_against", "source_groups"]  # fmt: skip
