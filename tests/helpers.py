"""What several tests build: samples, prompts, a training state on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from virft_fast.algorithms.step import TrainState
from virft_fast.batch import Prompt, Sample
from virft_fast.config import GRPOConfig
from virft_fast.engine import OptimizerSettings, PlainEngine, make_reference
from virft_fast.models.qwen_vl import Policy, encode_prompt, load_model
from virft_fast.rollout.backends import make_rollout
from virft_fast.rollout.decoding import DecodeState

CPU = torch.device("cpu")


def make_sample(
    index: int, sizes: Sequence[tuple[int, int]] = ((112, 112),), text: str = "Detect every red."
) -> Sample:
    """A sample with random images of the given (height, width)."""
    rng = np.random.default_rng(index)
    images = tuple(Image.fromarray(rng.integers(0, 255, (*s, 3)).astype("u1")) for s in sizes)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    columns = {"problem": text, "solution": f"solution {index}"}
    return Sample(
        index, ({"role": "user", "content": content},), images, f"solution {index}", columns
    )


def make_prompts(processor: Any, *samples: Sample) -> list[Prompt]:
    return [encode_prompt(processor, sample) for sample in samples]


def letter_count(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A reward with spread on any model's output: how many different letters there are."""
    return [len(set(c[0]["content"])) / 10 for c in completions]


def make_state(
    processor: Any,
    *,
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    reward: Any = letter_count,
    policy: dict[str, Any] | None = None,
    backend: str = "native",
    make_model: Callable[[], Any] = lambda: load_model("tiny"),
    **state: Any,
) -> TrainState:
    """A state to take steps with, on the CPU in float32."""
    torch.manual_seed(0)
    grpo = GRPOConfig(**{"num_generations": 2, "max_completion_length": 6, **(config or {})})
    policy = Policy(make_model().train(), **(policy or {}))
    optimizer = OptimizerSettings(
        **{"learning_rate": 1e-3, "max_grad_norm": 1.0, **(settings or {})}
    )
    engine = PlainEngine(policy, optimizer, device=CPU)
    reference = None
    if grpo.beta > 0:
        reference = make_reference(Policy(make_model()), engine, None)
    return TrainState(
        config=grpo,
        policy=policy,
        engine=engine,
        reference=reference,
        rollout=make_rollout(backend, engine.whole_weights, processor.tokenizer, device=CPU),
        tokenizer=processor.tokenizer,
        reward_funcs=[("reward", reward)],
        reward_weights=[1.0],
        learning_rate=lambda step: optimizer.learning_rate,
        **state,
    )


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def note_shrinks(monkeypatch: Any) -> list[Sequence[int]]:
    """A list to which each batch that shrinks from now on adds how many rows each prompt keeps."""
    sizes: list[Sequence[int]] = []
    select = DecodeState.select

    def noted(self: DecodeState, kept: Any, used: int) -> Any:
        sizes.append(kept.sizes)
        return select(self, kept, used)

    monkeypatch.setattr(DecodeState, "select", noted)
    return sizes
