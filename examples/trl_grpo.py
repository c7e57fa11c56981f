"""TRL's GRPOTrainer with virft_fast's loss: the logits never exist, in float32 or otherwise.

    python examples/trl_grpo.py --model_name_or_path Qwen/Qwen2-VL-2B-Instruct \
        --dataset_name laolao77/ViRFT_COCO --output_dir runs/trl

Use `FusedGRPOTrainer` where you use `GRPOTrainer`. It covers TRL 1.16's loss types grpo, bnpo,
dr_grpo, dapo and cispo with everything that goes into them but vLLM's importance ratio, the
off-policy and entropy masks and the entropy bonus.
"""

from __future__ import annotations

import contextlib

import torch
from trl import GRPOTrainer

from virft_fast.kernels import linear_grpo_loss

IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "mm_token_type_ids")


class FusedGRPOTrainer(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        whole = self.accelerator.unwrap_model(model)
        steps = self.current_gradient_accumulation_steps if model.training else 1
        num_items = None
        if self.loss_type in ("dapo", "cispo"):  # counted over the generation batch and all ranks
            num_items = inputs["num_items_in_batch"] / self.accelerator.num_processes
            num_items = num_items / self.args.steps_per_generation
        with hidden_states_as_logits(whole), self.accelerator.autocast():
            hidden = model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                **{name: inputs[name] for name in IMAGE_INPUTS if inputs.get(name) is not None},
            ).logits[:, -ids.shape[1] - 1 : -1]
        out = linear_grpo_loss(
            hidden, whole.lm_head.weight, ids, mask, advantages=inputs["advantages"],
            old_logps=inputs.get("old_per_token_logps"), beta=self.beta, delta=self.args.delta,
            ref_logps=inputs.get("ref_per_token_logps"), temperature=self.temperature,
            epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high, loss_type=self.loss_type,
            importance_sampling_level=self.importance_sampling_level, num_items=num_items,
            max_completion_length=self.max_completion_length,
        )  # fmt: skip
        metrics = self._metrics["train" if model.training else "eval"]
        metrics["entropy"].append(out.entropy.sum().item() / max(mask.sum().item(), 1))
        metrics["kl"].append(out.kl.sum().item() / max(mask.sum().item(), 1))
        return out.loss / steps


@contextlib.contextmanager
def hidden_states_as_logits(model):
    """The forward pass of the wrapper (DDP, DeepSpeed) up to the head and no further."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    try:
        yield
    finally:
        model.lm_head = head


def main() -> None:
    from datasets import load_dataset
    from trl import GRPOConfig, ModelConfig, TrlParser

    from virft_fast.tasks import REWARDS

    parser = TrlParser((GRPOConfig, ModelConfig))
    parser.add_argument("--dataset_name", required=True)
    config, model, rest = parser.parse_args_and_config()
    rows = load_dataset(rest.dataset_name, split="train")
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]})
    trainer = FusedGRPOTrainer(
        model=model.model_name_or_path,
        args=config,
        reward_funcs=[REWARDS["accuracy_iou"], REWARDS["format"]],
        train_dataset=rows,
    )
    trainer.train()


if __name__ == "__main__":
    main()
