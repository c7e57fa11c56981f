"""examples/trl_grpo.py: TRL's own trainer with our loss trains as it does with its own."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from virft_fast.data.demo import build_demo
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import load_model
from virft_fast.tasks import REWARDS

EXAMPLE = Path(__file__).parent.parent / "examples/trl_grpo.py"


def example():
    spec = importlib.util.spec_from_file_location("trl_grpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["trl_grpo"] = module
    spec.loader.exec_module(module)
    return module


def characters(completions, **columns):
    """A reward in which the completions of a group differ."""
    return [sum(map(ord, c[0]["content"])) % 17 / 17 for c in completions]


def train(trainer_class, folder, **options):
    from trl import GRPOConfig

    data = build_demo("digits_classification", folder / "data", num_train=8, num_test=2)["train"]
    data = data.map(
        lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]},
        remove_columns=["problem"],
    )
    config = GRPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, max_steps=3, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, num_generations=4, max_completion_length=12, seed=3,
        learning_rate=0.05, optim="sgd", logging_steps=1, report_to="none", save_strategy="no",
        bf16=False, temperature=0.9, **options,
    )  # fmt: skip
    trainer = trainer_class(
        model=load_model("tiny"),
        processing_class=load_processor("tiny"),
        args=config,
        reward_funcs=[characters, REWARDS["format"]],
        train_dataset=data,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "dapo", "beta": 0.1}, {"loss_type": "grpo", "num_iterations": 2},
     {"loss_type": "bnpo", "importance_sampling_level": "sequence", "beta": 0.1}],
    ids=["dapo", "grpo", "bnpo"],
)  # fmt: skip
def test_three_steps_give_trls_own_losses_and_weights(tmp_path, options):
    from trl import GRPOTrainer

    wanted, reference = train(GRPOTrainer, tmp_path / "trl", **options)
    losses, weights = train(example().FusedGRPOTrainer, tmp_path / "ours", **options)
    assert len(losses) == 3 and any(abs(loss) > 1e-4 for loss in wanted)
    assert losses == pytest.approx(wanted, abs=1e-5)
    if options.get("beta"):
        return  # the KL term begins at 0, where its gradient is rounding
    start = dict(load_model("tiny").named_parameters())
    moved = torch.cat([(reference[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(reference[name] - weights[name]).flatten() for name in start])
    assert moved.norm() > 0 and apart.norm() < 1e-3 * moved.norm()
