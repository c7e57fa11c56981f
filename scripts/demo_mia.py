"""MIA-DPO end to end on the embedded model: questions about one of several digits.

python scripts/demo_mia.py [--out runs/demo_mia] [--seeds 3]

The embedded model has never seen two images. It first learns the form of such questions, by
fine-tuning on sequences alone. Its own wrong answers to other scenes, selected by where it looked,
become preference pairs for DPO. Reported before and after DPO, on held-out scenes of each kind: how
many answers are right, how often the right answer is preferred to a companion's digit, and
attention on the target image.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch

from virft_fast import mia
from virft_fast.algorithms import dpo
from virft_fast.data.demo import demo_dataset
from virft_fast.mia import Scene, SceneLayout, ScenePlan
from virft_fast.mia.__main__ import main as mia_main
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, load_model
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout.backends import make_rollout
from virft_fast.tasks.answers import answer_text
from virft_fast.train import main as train_main

CPU = torch.device("cpu")
SCENE_FLAGS = [
    *("--shares", "sequence=1,collage=1,pip=1", "--sequence_images", "2,3"),
    *("--collage_images", "2", "--cell", "56", "--gutter", "14", "--label_size", "12"),
]
SIZES = {"cell": 56, "gutter": 14, "label_size": 12, "label_indent": 7}
LAYOUT = SceneLayout({"sequence": 1.0, "collage": 1.0, "pip": 1.0}, (2, 3), (2,), **SIZES)
WARM_LAYOUT = SceneLayout({"sequence": 1.0}, (2, 3), **SIZES)
MEASURES = {
    "accuracy": "right answers",
    "preference": "right answer preferred over a companion's",
    "attention": "attention on the target",
}
WARM_ROWS, WARM_SCENES, WARM_STEPS = 1000, 4, 1000
PAIR_ROWS, DPO_STEPS, HELD_OUT = 1000, 120, 240


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_mia"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    out, started = arguments.out, time.perf_counter()
    if out.exists() and any(out.iterdir()) and not (out / "warm-data").exists():
        parser.error(f"--out {out}: expected a new folder, or one of an earlier demo")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = demo_dataset("digits_classification")
    warm = warm_start(rows["train"].select(range(WARM_ROWS)), out)
    pairs = make_pairs(rows["train"].select(range(WARM_ROWS, WARM_ROWS + PAIR_ROWS)), warm, out)
    scenes = mia.Scenes(rows["test"], LAYOUT, seed=1, noise=False)
    before = measure(warm, scenes)
    after = []
    for seed in range(arguments.seeds):
        folder = out / f"dpo-{seed}"
        preferred(pairs, warm, folder, seed)
        after.append(measure(folder, scenes))
    lines = table(before, after)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "table.json").write_text(json.dumps({"before": before, "after": after}, indent=1))
    print("\n".join(["", *lines, ""]))
    print(
        f"{time.perf_counter() - started:.0f} s; pairs with the model's attention: {out}/pairs.png"
    )
    return 0


def warm_start(rows: datasets.Dataset, out: Path) -> Path:
    """A model that has learned the form of the questions, and some of their answers."""
    made = []
    for seed in range(2, 2 + WARM_SCENES):
        scenes = mia.Scenes(rows, WARM_LAYOUT, seed=seed, noise=False)
        plans = [plan for plan in map(scenes.plan, range(len(scenes))) if not isinstance(plan, str)]
        for plan in plans:
            scene = scenes.scene(plan)
            content = [{"type": p["type"], "text": p.get("text")} for p in scene.content]
            prompt, truth = [{"role": "user", "content": content}], scenes.truth(plan.index)
            made.append({"images": list(scene.images), "prompt": prompt, "solution": truth})
    data = datasets.Dataset.from_list(made).cast_column("images", datasets.List(datasets.Image()))
    data.save_to_disk(str(out / "warm-data"))
    run(
        "--algorithm", "sft", "--dataset_name", out / "warm-data", "--output_dir", out / "warm",
        "--max_steps", WARM_STEPS, "--per_device_train_batch_size", 16, "--learning_rate", 1e-3,
        "--max_completion_length", 64, "--save_steps", 0, "--warmup_steps", 5,
    )  # fmt: skip
    return out / "warm"


def make_pairs(rows: datasets.Dataset, model: Path, out: Path) -> Path:
    """Preference pairs from the model's own answers to other scenes, without noise."""
    rows.save_to_disk(str(out / "pair-rows"))
    status = mia_main(
        ["--dataset_name", str(out / "pair-rows"), "--model_name_or_path", str(model),
         "--output", str(out / "pairs"), "--mode", "clean", "--max_completion_length", "32",
         "--batch_size", "32", "--min_perplexity", "1.0", "--min_edit_distance", "0.01",
         *SCENE_FLAGS]
    )  # fmt: skip
    if status:
        raise SystemExit(status)
    return out / "pairs"


def preferred(pairs: Path, model: Path, out: Path, seed: int) -> None:
    run(
        "--algorithm", "dpo", "--dataset_name", pairs, "--model_name_or_path", model,
        "--output_dir", out, "--max_steps", DPO_STEPS, "--per_device_train_batch_size", 16,
        "--learning_rate", 1e-4, "--dpo_beta", 0.1, "--dpo_gamma", 1.0, "--save_steps", 0,
        "--max_completion_length", 64, "--seed", seed, "--precompute_ref_log_probs", "True",
        "--warmup_steps", 5,
    )  # fmt: skip


def run(*words: Any) -> None:
    status = train_main([str(word) for word in words])
    if status:
        raise SystemExit(status)


def measure(model: Path, scenes: mia.Scenes) -> dict[str, dict[str, float]]:
    """MEASURES on the held-out scenes, as shares, for each kind and for all."""
    processor = load_processor(resolve_model_path(str(model)))
    policy = Policy(load_model(str(model)).requires_grad_(False)).eval()
    rollout = make_rollout("native", lambda: nullcontext(policy), processor.tokenizer, device=CPU)
    layer = policy.config.text_config.num_hidden_layers // 2
    answering = mia.Answering(policy, rollout, processor, layer, 32, CPU)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for first in range(0, HELD_OUT, 32):
        planned = [scenes.plan(index) for index in range(first, min(first + 32, HELD_OUT))]
        plans = [plan for plan in planned if not isinstance(plan, str)]
        made = [scenes.scene(plan) for plan in plans]
        preferred = preferences(policy, processor, answering, scenes, plans, made)
        for plan, answer in zip(plans, answering.answers(plans, made), strict=True):
            right = answer_text(answer.text) == answer_text(scenes.truth(plan.index))
            for kind in (plan.kind, "all"):
                found[kind]["accuracy"].append(right)
                found[kind]["attention"].append(answer.ratio)
                if plan.index in preferred:
                    found[kind]["preference"].append(preferred[plan.index])
    return {
        kind: {name: statistics.mean(values[name]) for name in MEASURES}
        for kind, values in sorted(found.items(), key=lambda item: (item[0] != "all", item[0]))
    }


@torch.no_grad()
def preferences(
    policy: Policy,
    processor: Any,
    answering: mia.Answering,
    scenes: mia.Scenes,
    plans: list[ScenePlan],
    made: list[Scene],
) -> dict[int, bool]:
    """Row -> whether the true digit is likelier than a companion's, if a companion's differs."""
    rows, prompts, texts = [], [], []
    for plan, scene in zip(plans, made, strict=True):
        truth = scenes.truth(plan.index)
        others = [scenes.truth(row) for row in plan.order if scenes.truth(row) != truth]
        if others:
            rows.append(plan.index)
            prompts.append(answering.prompt(plan.index, scene))
            texts.append((truth, others[0]))
    ids = [[dpo.answer_ids(processor.tokenizer, text) for text in pair] for pair in texts]
    inputs = policy.collate(prompts, ids, pad_token_id=processor.tokenizer.pad_token_id, device=CPU)
    logps, _ = policy(inputs)
    lengths = inputs.cu_seqlens.diff().long()
    sums = torch.segment_reduce(logps, "sum", lengths=lengths).view(-1, 2)
    return dict(zip(rows, (sums[:, 0] > sums[:, 1]).tolist(), strict=True))


def table(before: dict[str, Any], after: list[dict[str, Any]]) -> list[str]:
    seeds = " | ".join(f"seed {number}" for number in range(len(after)))
    lines = [f"| held-out scenes | before DPO | {seeds} | mean change |",
             "|---" * (len(after) + 3) + "|"]  # fmt: skip
    for kind in before:
        for key, name in MEASURES.items():
            values = [result[kind][key] for result in after]
            change = statistics.mean(values) - before[kind][key]
            shown = " | ".join(f"{value:.3f}" for value in values)
            lines.append(f"| {kind}: {name} | {before[kind][key]:.3f} | {shown} | {change:+.3f} |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
