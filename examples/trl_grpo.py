"""TRL's GRPOTrainer with virft_fast's loss: the logits never exist, in float32 or otherwise.

    python examples/trl_grpo.py --model_name_or_path Qwen/Qwen2-VL-2B-Instruct \
        --dataset_name laolao77/ViRFT_COCO --output_dir runs/trl

Use `FusedGRPOTrainer` where you use `GRPOTrainer`: it takes the same options, with TRL's defaults.
The loss is computed inside the model's forward pass, where DDP, FSDP and DeepSpeed let it use the
head's weight. If the head is no plain linear layer, or the model scales or caps its logits, it is
computed from the completions' logits instead; a warning says so once.
"""

from __future__ import annotations

import logging
import types
from contextlib import contextmanager, nullcontext
from functools import partial, wraps

import torch
from trl import GRPOTrainer

from virft_fast.kernels import grpo_loss, linear_grpo_loss, linear_logps, logps_and_entropy

logger = logging.getLogger(__name__)

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
        model = self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        run_inside_forward(model)
        # Heads that peft or a quantization wraps have a forward of their own.
        self._fuses_head = type(model.get_output_embeddings()).forward is torch.nn.Linear.forward
        if not self._fuses_head:
            self._warn("the head isn't a plain linear layer")

    def _warn(self, reason):
        if self.accelerator.is_main_process:
            logger.warning("%s, so the loss is computed from logits", reason)

    def _compute_loss(self, model, inputs):
        ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        training, results = self.model.training, []
        coefficient = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coefficient = 0.0
        options = self._loss_options(inputs, training) | {"entropy_coef": coefficient}

        def inside(base, forward, given):
            results[:] = self._loss_and_aux(base, forward, given, ids, mask, options)
            out, aux_loss = results
            return out.loss if aux_loss is None else out.loss + self.router_aux_loss_coef * aux_loss

        given = {name: inputs[name] for name in IMAGE_INPUTS if inputs.get(name) is not None}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        with self.accelerator.autocast():
            loss = model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                use_cache=False,
                inside=inside,
                **given,
            )
        out, aux_loss = results
        steps = self.current_gradient_accumulation_steps if training else 1
        if self._entropy_bonus_enabled:
            self._follow_entropy(out, mask, coefficient, steps)
        self._log_loss(out, aux_loss, mask)
        return loss / steps

    def _loss_options(self, inputs, training):
        """Arguments of our loss functions but the tokens, in TRL's terms."""
        num_items = None
        if self.loss_type in COUNTED:  # over the generation batch and all ranks
            num_items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            num_items = num_items / (self.args.steps_per_generation if training else 1)
        return {name: getattr(self.args, name) for name in OPTIONS} | {
            "advantages": inputs["advantages"], "old_logps": inputs.get("old_per_token_logps"),
            "ref_logps": inputs.get("ref_per_token_logps"), "beta": self.beta,
            "temperature": self.temperature, "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high, "loss_type": self.loss_type, "num_items": num_items,
            "importance_sampling_level": self.importance_sampling_level,
            "max_completion_length": self.max_completion_length,
            "is_weights": inputs.get("importance_sampling_ratio"),
            "sampling_logps": inputs.get("sampling_per_token_logps"),
        }  # fmt: skip

    def _loss_and_aux(self, model, forward, given, ids, mask, options):
        """(GRPOLoss, the auxiliary loss of experts or None), inside the model's forward pass."""
        head, length, results = model.get_output_embeddings(), ids.shape[1], []

        def loss_of_hidden(hidden):
            inputs = {"hidden": hidden[:, -length - 1 : -1], "weight": head.weight}
            inputs["bias"] = head.bias
            functions = partial(linear_grpo_loss, **inputs), partial(linear_logps, **inputs)
            whole = self.args.cast_lm_head_to_fp32
            with torch.autocast(hidden.device.type, enabled=False) if whole else nullcontext():
                results.append(self._loss(*functions, ids, mask, options))
            return results[0].loss

        if self._fuses_head:
            with forward_replaced(head, loss_of_hidden):
                output = forward(**given)
            if output.logits is results[0].loss:
                return results[0], output.get("aux_loss")
            self._fuses_head = False
            self._warn("the model scales or caps its logits")
        output = forward(logits_to_keep=length + 1, **given)
        logits = output.logits[:, -length - 1 :]
        functions = partial(grpo_loss, logits), partial(logps_and_entropy, logits[:, :-1])
        return self._loss(*functions, ids, mask, options), output.get("aux_loss")

    def _loss(self, loss, entropies, ids, mask, options):
        if self.top_entropy_quantile < 1.0 and self.accelerator.num_processes > 1:
            with torch.no_grad():
                entropy = entropies(index=ids, temperature=self.temperature)[1]
            threshold = self._entropy_threshold(entropy, mask)
            options = options | {"top_entropy_quantile": 1.0, "entropy_threshold": threshold}
        return loss(completion_ids=ids, completion_mask=mask, **options)

    def _entropy_threshold(self, entropy, mask):
        """0-d, between the entropies of the tokens to keep and the others, of all processes."""
        chosen = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        lowest = torch.where(chosen, entropy, torch.inf).amin()
        return (lowest + torch.where(mask & ~chosen, entropy, -torch.inf).amax()) / 2

    def _log_loss(self, out, aux_loss, mask):
        """TRL's metrics of the loss."""
        count = mask.sum()
        clipped = [out.clip_fraction_low, out.clip_fraction_high]
        by_sequence = self.importance_sampling_level == "sequence"
        weight = torch.full_like(count, len(mask)) if by_sequence else count
        sums = [out.entropy.sum(), out.kl.sum(), *(share * weight for share in clipped)]
        sums = torch.stack([*sums, count, weight])
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        entropy, kl, low, high, count, weight = sums
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"].append(entropy / max(count, 1))
        if self.beta:
            metrics["kl"].append(kl / max(count, 1))
        if self.loss_type == "cispo":
            metrics["cispo_clip_ratio"].append(high / max(weight, 1))
        elif self.loss_type not in ("sapo", "vespo"):
            metrics["clip_ratio/low_mean"].append(low / max(weight, 1))
            metrics["clip_ratio/high_mean"].append(high / max(weight, 1))
            metrics["clip_ratio/region_mean"].append((low + high) / max(weight, 1))
        if aux_loss is not None:
            gathered = self.accelerator.gather_for_metrics(aux_loss.detach())
            metrics["aux_loss"].append(gathered.mean().item())

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


def run_inside_forward(model):
    """Let `model(..., inside=f)` return f(model, its own forward, the other arguments)."""
    own = model.forward

    @wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, inside=None, **kwargs):
        return own(*args, **kwargs) if inside is None else inside(self, own, kwargs)

    model.forward = types.MethodType(forward, model)


@contextmanager
def forward_replaced(module, forward):
    """Inside, calls of the module run `forward`, between the module's own hooks."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


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
