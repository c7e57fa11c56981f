"""`Policy`: a vision-language model with the calls that training needs.

One module call computes the hidden states of the completion tokens and the kernels' results from
them. The vision tower runs once per prompt image. In many families, the language model also reads
each prompt once, packed with its completions (`shared_prefix`). If its attention can't be replaced,
and in other families (`plain`), it rereads the prompt for every completion.

Shapes: B prompts, N completions of any lengths, S completion tokens in all, R rows of L tokens
(packed: R = 1), D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from virft_fast.batch import Prompt, Row
from virft_fast.devices import to_device
from virft_fast.kernels import GRPOLoss, LossArgs, linear_grpo_loss, linear_logps
from virft_fast.kernels.linear import linear_logits
from virft_fast.kernels.reference import grpo_loss_reference, logps_reference
from virft_fast.models import plain, recurrent, shared_prefix
from virft_fast.models.families import (
    QwenConfig,
    base,
    core,
    family_of,
    tower_parameters,
    why_plain,
)
from virft_fast.models.inputs import ModelInputs, collate
from virft_fast.models.recurrent import Keep, PackedRecurrence
from virft_fast.models.shared_prefix import PackedAttention, read
from virft_fast.models.vision_metadata import vision_metadata

logger = logging.getLogger(__name__)


class _PatchProjection(nn.Conv3d):
    """A patch embedding as one matrix product: each patch is exactly as large as the kernel.

    A convolution takes several times as long, especially its backward pass.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels, frames, rows, columns) -> (patches, D, 1, 1, 1)."""
        out = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[:, :, None, None, None]


def _project_patches(visual: nn.Module) -> None:
    # Replace the class, not the module, to keep its parameters, hooks and checkpoint names.
    proj = getattr(getattr(visual, "patch_embed", None), "proj", None)
    if type(proj) is nn.Conv3d and proj.kernel_size == proj.stride:
        proj.__class__ = _PatchProjection


def _add_deepstack(language_model: Any, states: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Replaces a method of transformers' language model, which selects the image tokens by a mask
    and so waits for the device in every layer; `places` is `ModelInputs.image_places`."""
    if places.dtype == torch.bool:  # called by transformers itself
        return type(language_model)._deepstack_process(language_model, states, places, features)
    flat = states.flatten(0, 1)
    added = flat.index_select(0, places) + features.to(states.dtype)
    return flat.index_copy(0, places, added).view(states.shape)


class Policy(nn.Module):
    """A vision-language model with the calls that training needs, each of them one module call.

    DeepSpeed wraps this module. The head owns the lm_head weight, which may be tied, so that ZeRO-3
    gathers it for the fused loss like any layer's weight.

    Attributes:
        family: what is special about the model.
        unreachable: the reason why training and rollout can't share prompts; None if they can.
        vision_frozen: whether the whole vision tower is frozen.
        recurrent: whether layers have a recurrent state, so that rollouts can't take tokens back.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_impl: str = "fused",
        prefix_sharing: str = "auto",
        prefix_attention: str = "auto",
    ) -> None:
        """Wrap `model`. If it shares prompts, it is changed in place: its attention goes through
        `shared_prefix.attend`, which gives the same results. So is a Qwen-VL: its patch embedding
        becomes one matrix product.

        Also turns off cuDNN's attention in this process. It builds a plan, which takes up to half a
        second, for every new combination of sizes and strides; packed rows rarely repeat one.

        Args:
            loss_impl: "fused", or "reference", which forms the full logits.
            prefix_sharing: whether the language model reads a prompt once for all its completions:
                "on", "off", or "auto" (on if the model's attention can be replaced).
            prefix_attention: of packed rows; see `shared_prefix.core_kind`.
        Raises:
            ValueError: prefix_sharing is "on", but the attention can't be replaced; or the model
                lacks a part that is needed.
        """
        super().__init__()
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = model
        self.family = family_of(base(model).config.model_type)
        self.vision_frozen = not any(p.requires_grad for p in tower_parameters(model))
        language_model: Any = core(model).get_decoder()
        rule: tuple[float, float | None] = (1.0, None)
        if self.family.is_qwen:
            _project_patches(core(model).visual)
            if hasattr(language_model, "_deepstack_process"):
                language_model._deepstack_process = MethodType(_add_deepstack, language_model)
        else:
            plain.check_usable(model)
            rule = plain.logits_rule(model)
        # Install even with prefix_sharing "off", because the rollout also shares prompts.
        reason = why_plain(base(model).config.model_type)
        self.unreachable = reason = reason or shared_prefix.install(language_model)
        self.recurrent = self.family.shares and bool(recurrent.recurrent_layers(language_model))
        self.head = Head(base(model).lm_head, loss_impl, *rule)
        if reason is not None and prefix_sharing == "on":
            raise ValueError(
                f"--prefix_sharing on: expected a model whose attention can be reached, but "
                f"{reason}; pass --prefix_sharing off"
            )
        if reason is not None and prefix_sharing == "auto":
            logger.warning("each completion computes its prompt again, because %s", reason)
        self.shares_prefix = prefix_sharing != "off" and reason is None
        self.prefix_attention = prefix_attention

    @property
    def config(self) -> QwenConfig:
        return base(self.model).config

    def forward(
        self,
        inputs: ModelInputs,
        *,
        temperature: float = 1.0,
        image_features: Tensor | None = None,
        loss: LossArgs | None = None,
        loss_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One pass over the completion tokens.

        Args:
            image_features: the result of the method `image_features`, to skip the vision tower.
            loss: compute this loss over the tokens in `loss_mask`, (S,) bool.
        Returns:
            Log-probs and entropy, (S,) float32 each; with `loss`, the fields of a GRPOLoss.
        """
        if image_features is None:
            image_features = self.image_features(inputs)
        hidden = self._completion_hidden(inputs, image_features)
        return self.head(hidden, inputs, temperature, loss, loss_mask)

    def _completion_hidden(self, inputs: ModelInputs, image_features: Tensor) -> Tensor:
        if not inputs.groups and not self.family.is_qwen:
            states = plain.hidden_states(self.model, inputs, image_features)
        elif not inputs.groups:
            mask = inputs.attention_mask
            states = self.language(inputs, image_features, attention_mask=mask)
        else:
            attention = self.attention(inputs)
            states = self.language(inputs, image_features, attention_core=attention)
            attention.check(len(shared_prefix.attention_layers(self.config.text_config)))
        return states.flatten(0, 1).index_select(0, inputs.predictors)  # (S, D)

    def attention(self, inputs: ModelInputs) -> PackedAttention:
        """The core of a packed row."""
        longest = max((group.longest for group in inputs.groups), default=0)
        windows = shared_prefix.windows(self.config.text_config, longest)
        device = inputs.input_ids.device
        return PackedAttention(inputs.groups, device, self.prefix_attention, windows)

    def language(
        self,
        inputs: ModelInputs,
        image_features: Tensor,
        keep_states: Keep | None = None,
        **options: object,
    ) -> Tensor:
        """(R, L, D) last hidden states; `options` are passed on to the transformers model.

        Args:
            keep_states: receives the recurrent layers' states after the prompts of a packed row.
        """
        embeds, deepstack = self.embed(inputs, image_features)
        if deepstack is not None:
            options["visual_pos_masks"] = inputs.image_places  # see `_add_deepstack`
            options["deepstack_visual_embeds"] = deepstack
        language_model = core(self.model).get_decoder()
        if not (self.recurrent and inputs.groups):
            return read(language_model, embeds, inputs.position_ids, **options)
        layers = recurrent.recurrent_layers(language_model)
        width = layers[0].conv_kernel_size
        rows = PackedRecurrence(inputs.groups, embeds.device, width, keep_states)
        states = read(language_model, embeds, inputs.position_ids, recurrent_core=rows, **options)
        shared_prefix.check_calls(rows.layers, len(layers))
        return states

    def embed(
        self, inputs: ModelInputs, image_features: Tensor
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(R, L, D) token embeddings, in which the images' features replace the image tokens.

        For a family with DeepStack, also the features to add after each of the first layers, (image
        tokens, D) each.
        """
        embeds = core(self.model).get_input_embeddings()(inputs.input_ids)
        image_features = image_features.to(embeds.dtype)
        if inputs.pixel_values is None:
            # The tower ran on a blank image, so that all ranks make the same module calls. Adding
            # the features with weight 0 gives the tower's parameters zero gradients instead of
            # none.
            return embeds + 0.0 * image_features.sum(), None
        features, *deepstack = inputs.per_row(image_features).split(embeds.shape[-1], -1)
        flat = embeds.flatten(0, 1).index_copy(0, inputs.image_places, features)
        embeds = flat.view(embeds.shape)
        return embeds, [features.contiguous() for features in deepstack] or None

    def image_features(self, inputs: ModelInputs) -> Tensor:
        """(image tokens of the B prompts, D), or a blank image's features if the prompts have no
        images.

        For a family with DeepStack, each row continues with the features for the first layers.
        """
        with torch.no_grad() if self.vision_frozen else contextlib.nullcontext():
            if not self.family.is_qwen:
                return plain.image_features(self.model, inputs)
            images, vision = inputs.images, inputs.vision
            if not images:
                images, vision = self._blank_image(inputs.input_ids.device)
            output = core(self.model).get_image_features(**images, return_dict=True, **vision)
        features = [output.pooler_output]
        if self.family.deepstack:
            features += output.deepstack_features
        return torch.cat([f if isinstance(f, Tensor) else torch.cat(list(f)) for f in features], -1)

    def place_images(self, prompts: Sequence[Prompt], device: torch.device) -> list[Prompt]:
        """The prompts, with their pixels on the device in the tower's dtype. All passes of a step
        then read one copy."""
        dtype = next(p.dtype for p in tower_parameters(self.model) if p.is_floating_point())
        return [
            replace(prompt, pixel_values=to_device(prompt.pixel_values, device).to(dtype))
            if prompt.pixel_values is not None
            else prompt
            for prompt in prompts
        ]

    def _blank_image(self, device: torch.device) -> tuple[dict[str, Tensor], Row]:
        images = plain.blank_patches(self.config.vision_config)
        images["pixel_values"] = to_device(images["pixel_values"], device)
        grid = images["image_grid_thw"]
        return images, vision_metadata(core(self.model).visual, grid, device)

    def collate(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        *,
        pad_token_id: int,
        device: torch.device,
        packed: bool | None = None,
    ) -> ModelInputs:
        """B prompts with their completions, ready for `forward`.

        Args:
            completions: for each prompt, any number of completions, (length,) int64 each, any
                length, on the CPU.
            pad_token_id: pads rows that are not packed.
            packed: whether to put everything into one row, each prompt once; None: only if the
                policy shares prompts.
        """
        packed = self.shares_prefix if packed is None else packed
        positions = [self.prompt_positions(prompt) for prompt in prompts]
        cpu = collate(
            prompts, positions, completions, pad_token_id=pad_token_id, packed=packed,
            image_blocks=self.family.image_blocks, completion_type=self.family.completion_type,
        )  # fmt: skip
        if self.family.is_qwen and cpu.image_grid_thw is not None:
            vision = vision_metadata(core(self.model).visual, cpu.image_grid_thw, device)
            cpu = replace(cpu, vision=vision)
        return cpu.to(device)

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """(3, P) rotary positions; a completion continues from their maximum plus 1 on all axes.
        (1, P) for a model without multimodal positions."""
        if not hasattr(core(self.model), "get_rope_index"):
            return torch.arange(len(prompt.input_ids))[None]
        positions, _ = core(self.model).get_rope_index(
            prompt.input_ids[None],
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            image_grid_thw=prompt.image_grid_thw,
        )
        return positions[:, 0]


class Head(nn.Module):
    """The lm_head's weight and bias, and everything computed with them. "fused" never forms full
    logits.

    Attributes:
        scale, softcap: see `plain.logits_rule`.
    """

    def __init__(
        self, lm_head: nn.Linear, loss_impl: str, scale: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.scale, self.softcap = (
            lm_head.weight,
            lm_head.bias,
            scale,
            softcap,
        )
        fused = loss_impl == "fused"
        self._logps = linear_logps if fused else logps_reference
        self._loss = linear_grpo_loss if fused else grpo_loss_reference

    def forward(
        self,
        hidden: Tensor,
        inputs: ModelInputs,
        temperature: float,
        loss: LossArgs | None,
        loss_mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        hidden = hidden.to(self.weight.dtype)
        cap = self.softcap and self.softcap / self.scale  # of the head's own output
        options: Row = {"bias": self.bias, "softcap": cap, "temperature": temperature / self.scale}
        if loss is None:
            return self._logps(hidden, self.weight, inputs.completion_ids, **options)
        options |= {**vars(loss), "cu_seqlens": inputs.cu_seqlens}
        out = self._loss(hidden, self.weight, inputs.completion_ids, loss_mask, **options)
        # A tuple, because ZeRO-3's hooks don't find tensors in a dataclass.
        return tuple(getattr(out, field.name) for field in fields(GRPOLoss))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V) float32, for sampling a few tokens."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = linear_logits(hidden.to(self.weight.dtype), self.weight)
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
