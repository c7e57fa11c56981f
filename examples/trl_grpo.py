"""TRL's GRPOTrainer with virft_fast's loss: the logits never exist, in float32 or otherwise.

    python examples/trl_grpo.py --model_name_or_path Qwen/Qwen2-VL-2B-Instruct \
        --dataset_name laolao77/ViRFT_COCO --output_dir runs/trl

Use `FusedGRPOTrainer` where you use `GRPOTrainer`, with whole or LoRA training, under DDP or ZeRO
0 to 2. It supports TRL 1.16's loss types and loss options with TRL's defaults; anything unsupported
raises an error at the start.
"""

from __future__ import annotations

import contextlib

import torch
from trl import GRPOTrainer

from virft_fast.kernels import linear_grpo_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
COUNTED = ("dapo", "cispo", "vespo")  # divided by the number of tokens of the whole step
# Options of TRL's configuration that our loss has under the same names.
OPTIONS = (
    "delta", "use_bias_correction_kl", "off_policy_mask_threshold", "top_entropy_quantile",
    "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos",
    "vespo_k_neg", "vespo_lambda_neg",
)  # fmt: skip
IMAGE_INPUTS = (
    "pixel_values", "image_grid_thw", "mm_token_type_ids", "pixel_attention_mask", "image_sizes",
    "spatial_shapes", "token_type_ids", "image_position_ids",
)  # fmt: skip


class FusedGRPOTrainer(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        text = self.model.config.get_text_config()
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        refused = {
            f"loss_type {self.loss_type}": self.loss_type not in LOSS_TYPES,
            # TRL takes the quantile over all processes.
            "top_entropy_quantile on several processes": self.top_entropy_quantile < 1.0
            and self.accelerator.num_processes > 1,
            "the auxiliary loss of experts": self.aux_loss_enabled,
            "use_liger_kernel": self.args.use_liger_kernel,
            "logits that are scaled or capped": any(
                getattr(text, name, None) for name in ("final_logit_softcapping", "logit_scale")
            ),
            "an adapter on lm_head": not isinstance(
                self._base(self.model).lm_head, torch.nn.Linear
            ),
            "ZeRO-3 (virft_fast.train has it)": plugin is not None and plugin.zero_stage == 3,
            "FSDP": self.is_fsdp_enabled,
            # DDP then looks for unused parameters, and mistakes the head's, used outside, for one.
            "DDP with gradient_checkpointing off": self.accelerator.num_processes > 1
            and plugin is None
            and not self.args.gradient_checkpointing,
        }
        if any(refused.values()):
            names = ", ".join(name for name, found in refused.items() if found)
            raise ValueError(f"FusedGRPOTrainer: expected a run without {names}; use GRPOTrainer")

    def _base(self, model):
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _compute_loss(self, model, inputs):
        ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        base, training = self._base(model), self.model.training
        num_items = None
        if self.loss_type in COUNTED:  # over the generation batch and all ranks
            num_items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            num_items = num_items / (self.args.steps_per_generation if training else 1)
        coefficient = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coefficient = 0.0
        # Autocast the head as well, because the wrapper returns hidden states in float32.
        with self.accelerator.autocast():
            with hidden_states_as_logits(base):
                hidden = model(
                    input_ids=torch.cat([inputs["prompt_ids"], ids], 1),
                    attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                    **{name: inputs[name] for name in IMAGE_INPUTS if inputs.get(name) is not None},
                ).logits[:, -ids.shape[1] - 1 : -1]
            out = linear_grpo_loss(
                hidden, base.lm_head.weight, ids, mask, bias=base.lm_head.bias,
                advantages=inputs["advantages"], old_logps=inputs.get("old_per_token_logps"),
                ref_logps=inputs.get("ref_per_token_logps"), beta=self.beta,
                temperature=self.temperature, epsilon_low=self.epsilon_low,
                epsilon_high=self.epsilon_high, loss_type=self.loss_type, num_items=num_items,
                importance_sampling_level=self.importance_sampling_level,
                max_completion_length=self.max_completion_length,
                is_weights=inputs.get("importance_sampling_ratio"), entropy_coef=coefficient,
                sampling_logps=inputs.get("sampling_per_token_logps"),
                **{name: getattr(self.args, name) for name in OPTIONS},
            )  # fmt: skip
        steps = self.current_gradient_accumulation_steps if training else 1
        if self._entropy_bonus_enabled:
            self._follow_entropy(out, mask, coefficient, steps)
        sums = torch.stack([out.entropy.sum(), out.kl.sum(), mask.sum()])
        entropy, kl, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train" if training else "eval"]
        metrics["entropy"].append(entropy / max(count, 1))
        if self.beta:
            metrics["kl"].append(kl / max(count, 1))
        return out.loss / steps

    def _follow_entropy(self, out, mask, coefficient, steps):
        """TRL's metrics of the bonus, and its adaptive coefficient."""
        chosen, training = mask, self.model.training
        if self.top_entropy_quantile < 1.0:
            chosen = self.get_high_entropy_mask(out.entropy, mask, 1 - self.top_entropy_quantile)
        stats = torch.stack([(out.entropy * chosen).sum(), chosen.sum()])
        policy_loss = out.loss.detach() + coefficient * stats[0] / stats[1].clamp(min=1)
        if self.loss_type in COUNTED:
            policy_loss = policy_loss / steps
        metrics = self._metrics["train" if training else "eval"]
        metrics["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
        if not training:
            return
        if self.use_adaptive_entropy:
            window = self._entropy_window_stats
            self._entropy_window_stats = stats if window is None else window + stats
        if not self.accelerator.sync_gradients:
            return
        if self.use_adaptive_entropy:
            window = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
            total, count = window.tolist()
            entropy, change = total / max(count, 1), self.args.entropy_coef_delta
            change = change if entropy <= self.args.entropy_target else -change
            limits = self.args.entropy_coef_min, self.args.entropy_coef_max
            self.entropy_coef = min(max(self.entropy_coef + change, limits[0]), limits[1])
            self._last_world_entropy, self._entropy_window_stats = entropy, None
        metrics["entropy_coef"].append(self.entropy_coef)


@contextlib.contextmanager
def hidden_states_as_logits(model):
    """Inside, the wrapper's forward pass (DDP, DeepSpeed) returns hidden states as logits."""
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
    rows = load_dataset(rest.dataset_name, split="train", trust_remote_code=False)
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
