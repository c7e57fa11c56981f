"""The one adapter between Qwen's vision-language models and the rest of the house.

`load_model` gives a plain transformers model; `Policy` wraps it so that one module call yields the
hidden states of the completion tokens and what the kernels make of them. The vision tower runs once
per prompt image; the language model reads each prompt once too, packed with its completions
(`shared_prefix`), or, where its attention can't be reached, once a completion.

Shapes: B prompts, N completions of any lengths, S completion tokens in all, R rows of L tokens that
the model reads (packed: R = 1), D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from virft_fast.batch import Prompt, Sample
from virft_fast.kernels import GRPOLoss, LossArgs, linear_grpo_loss, linear_logps
from virft_fast.kernels.linear import linear_logits
from virft_fast.kernels.reference import grpo_loss_reference, logps_reference
from virft_fast.models import chat_template, shared_prefix
from virft_fast.models.adapters import (
    CONFIG_FILE,
    merge_adapter,
    model_chain,
    peft_config,
    undivided,
)
from virft_fast.models.adapters import add_lora as add_lora
from virft_fast.models.saving import find_base_folder
from virft_fast.models.saving import save_model as save_model
from virft_fast.models.shared_prefix import Group, PackedAttention, no_mask
from virft_fast.models.trust import AsksForCode

logger = logging.getLogger(__name__)

# What differs between the families: liger-kernel's patch, and whether the vision tower also has
# features for the first language layers (DeepStack).
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"liger": "apply_liger_kernel_to_qwen2_vl", "deepstack": False},
    "qwen2_5_vl": {"liger": "apply_liger_kernel_to_qwen2_5_vl", "deepstack": False},
    "qwen3_vl": {"liger": "apply_liger_kernel_to_qwen3_vl", "deepstack": True},
}


@dataclass(frozen=True)
class ModelInputs:
    """B prompts and their N completions as the model reads them, on the model's device.

    Attributes:
        input_ids: (R, L) int64.
        attention_mask: (R, L) int64, 0 at padding; None for a packed row.
        position_ids: (3, R, L) int64, multimodal rotary positions.
        image_mask: (R, L) bool, true at image tokens; never true in a completion.
        pixel_values, image_grid_thw: the images of the B prompts, each once; None without images.
            Not to be changed in place: they may be a Prompt's own.
        image_copies: for each prompt the number of its image tokens, and of the times it is read.
        predictors: (S,) int64, positions in the R * L tokens whose hidden states predict the
            completion tokens.
        completion_ids: (S,) int64, one completion after another.
        cu_seqlens: (N + 1,) int32, where each begins.
        groups: what lies where in a packed row; None for rows of their own.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    image_mask: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    image_copies: tuple[tuple[int, int], ...]
    predictors: Tensor
    completion_ids: Tensor
    cu_seqlens: Tensor
    groups: tuple[Group, ...] | None = None

    def per_prompt(self, image_features: Tensor) -> tuple[Tensor, ...]:
        """`Policy.image_features` of all B prompts -> of each; a blank image's are nobody's."""
        if self.pixel_values is None:
            image_features = image_features[:0]
        return image_features.split([tokens for tokens, _ in self.image_copies])


def load_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    empty: bool = False,
) -> nn.Module:
    """A Qwen-VL model from a folder, a hub id or `tiny`, in `dtype`, on the CPU (or partitioned,
    when DeepSpeed's ZeRO-3 configuration is alive).

    Args:
        name_or_path: a folder with an adapter counts as well: its base model, with the adapter
            merged in float32.
        empty: the model's shape alone, on the meta device.
    Raises:
        FileNotFoundError: nothing is there.
        ValueError: something is there, but no Qwen-VL model, or it can't be read.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    config = read_config(name_or_path, revision)
    check_weights(name_or_path, revision)
    *adapters, (path, revision) = model_chain(name_or_path, revision)
    for folder, _ in adapters:
        peft_config(folder)
    attention = usable_attention(attn_implementation)
    if empty:
        try:
            with torch.device("meta"):
                return AutoModelForImageTextToText.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
                )
        except Exception as error:  # what sizes that don't fit each other make of themselves
            raise ValueError(
                f"--model_name_or_path {name_or_path!r}: expected the config.json of a "
                f"{config.model_type} model, got {type(error).__name__}: {str(error)[:300]}"
            ) from error
    try:
        with undivided() if adapters else contextlib.nullcontext():
            model, info = AutoModelForImageTextToText.from_pretrained(
                path,
                revision=revision,
                dtype=torch.float32 if adapters else dtype,
                attn_implementation=attention,
                use_safetensors=True,  # the other files are pickles
                output_loading_info=True,
                trust_remote_code=False,
            )
    # Safetensors and torch have errors of their own for a file that is cut off or foreign.
    except Exception as error:
        raise ValueError(
            f"--model_name_or_path {name_or_path!r}: expected the weights of a "
            f"{config.model_type} model, got {type(error).__name__}: {str(error)[:300]}; is the "
            "folder complete?"
        ) from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"--model_name_or_path {name_or_path!r}: expected all weights of the model, but "
            f"{len(info['missing_keys'])} are missing ({some}, ...); is the folder complete?"
        )
    for folder, _ in reversed(adapters):
        model = merge_adapter(model, folder)
    if adapters:
        cast_parameters(model, dtype)
    # Loaded under ZeRO-3 a model remembers every renaming that could have been needed, and would be
    # saved under names with a prefix too many; without the memory it is saved as Qwen names it.
    vars(model).pop("_weight_conversions", None)
    # A checkpoint's sampling defaults (Qwen ships a near-greedy temperature) must never steer a
    # rollout, so they are set aside; they go back into what we save.
    model.shipped_generation_config = model.generation_config
    model.generation_config = GenerationConfig()
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights; buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def read_config(name_or_path: str, revision: str | None = None) -> Any:
    """The configuration of a Qwen-VL model; of the base model for a LoRA adapter.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    from transformers import AutoConfig

    *adapters, (path, revision) = model_chain(name_or_path, revision)
    try:
        find_base_folder(path, revision)  # which refuses what asks for code
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except AsksForCode:
        raise
    except Exception as error:  # transformers has many for a file that holds something else
        named = f"{name_or_path!r}" + (f", an adapter on {path!r}" if adapters else "")
        raise FileNotFoundError(
            f"--model_name_or_path: expected a folder with config.json, a hub id or `tiny`, got "
            f"{named}: {' '.join(str(error).split())[:300]}"
        ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"--model_name_or_path {name_or_path!r}: expected one of the families "
            f"{', '.join(FAMILIES)}, got model_type {config.model_type!r}"
        )
    return config


def check_weights(name_or_path: str, revision: str | None = None) -> None:
    """That the weights in a model's folder are there and whole, and those under an adapter; only
    the heads of the files are read. A hub id is let pass.

    Raises:
        ValueError: they are not.
    """
    for folder, _ in model_chain(name_or_path, revision):
        if not Path(folder).is_dir():
            continue
        try:
            for file in _weight_files(Path(folder)):
                with safe_open(file, "pt"):
                    pass
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            pickles = sorted(file.name for file in Path(folder).glob("*.bin"))
            hint = f"{pickles[0]} is a pickle and not opened, convert it" if pickles else ""
            raise ValueError(
                f"--model_name_or_path {folder!r}: expected the weights of a Qwen-VL model or of "
                f"an adapter in safetensors, got {type(error).__name__}: {error}; "
                f"{hint or 'is the folder complete?'}"
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    """Those that are loaded, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if (folder / CONFIG_FILE).is_file():
        return [folder / "adapter_model.safetensors"]
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def weights_stamp(path: str) -> list[Any]:
    """Changes when the weight files of a model's folder do, or those under an adapter, and not when
    they are copied; empty for a hub id, which has its revision. Of each file 64 MiB are read, in
    blocks all over it: a change to less than a block's distance may go unseen.
    """
    stamp: list[Any] = []
    for folder in (Path(name) for name, _ in model_chain(path) if Path(name).is_dir()):
        files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
        stamp += sorted([file.name, file.stat().st_size, _crc_of_blocks(file)] for file in files)
    return stamp


def _crc_of_blocks(file: Path, count: int = 1024, size: int = 2**16) -> int:
    total, crc = file.stat().st_size, 0
    if total <= count * size:
        return zlib.crc32(file.read_bytes())
    with file.open("rb") as opened:
        for number in range(count):
            opened.seek(number * max(0, total - size) // (count - 1))
            crc = zlib.crc32(opened.read(size), crc)
    return crc


def usable_attention(name: str) -> str:
    """`name`, or sdpa with a warning where flash_attention_2 is asked for and can't run."""
    if name != "flash_attention_2":
        return name
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return name
    warnings.warn(
        "flash_attention_2 needs the flash-attn package and a CUDA device; using sdpa instead",
        stacklevel=2,
    )
    return "sdpa"


def apply_liger(model: nn.Module, device: torch.device) -> None:
    """Patch RMSNorm, SwiGLU and rotary embedding with liger-kernel's; no effect off CUDA."""
    if device.type != "cuda":
        warnings.warn("--use_liger_kernel has no effect without CUDA", stacklevel=2)
        return
    try:
        import liger_kernel.transformers as liger
    except ImportError as error:
        raise ValueError(
            "--use_liger_kernel: expected the package liger-kernel; pip install 'virft_fast[gpu]'"
        ) from error
    patch = getattr(liger, FAMILIES[model.config.model_type]["liger"])
    # The loss is ours, so liger's fused cross entropy stays out.
    patch(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def freeze_vision_tower(model: nn.Module) -> None:
    for parameter in core(model).visual.parameters():
        parameter.requires_grad_(False)


def base(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def core(model: nn.Module) -> nn.Module:
    """The part that holds `visual` and `language_model`."""
    return base(model).model


def encode_prompt(processor: Any, sample: Sample) -> Prompt:
    """Render and tokenize a sample; image placeholders grow to the number of image tokens.

    Raises:
        ValueError: the chat template fails, the text itself holds image tokens, or the images
            can't be processed.
    """
    text = chat_template.render(processor, sample.messages)
    image_token = processor.image_token
    if text.count(image_token) != len(sample.images):
        raise ValueError(
            f"expected {len(sample.images)} image placeholders in the prompt, got "
            f"{text.count(image_token)}; the text must not hold {image_token} itself"
        )
    images = list(sample.images) or None
    encoded = processor(text=[text], images=images, return_tensors="pt")
    input_ids = encoded["input_ids"][0]
    is_image = input_ids == processor.tokenizer.convert_tokens_to_ids(image_token)
    return Prompt(
        sample=sample,
        text=text,
        input_ids=input_ids,
        mm_token_type_ids=is_image.long(),
        pixel_values=encoded["pixel_values"] if images else None,
        image_grid_thw=encoded["image_grid_thw"] if images else None,
    )


# Special tokens that are no text: the chat's, and what images and videos are read at.
_CONTROL_TOKENS = {
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
}  # fmt: skip


def control_token_ids(tokenizer: Any) -> set[int]:
    """Tokens that no answer holds: of the chat format, placeholders of images and videos, BOS, EOS
    and padding. The family's text markers, as <|box_start|>, and special tokens that a user added
    are text."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    added = tokenizer.added_tokens_decoder.items()
    control = {i for i, token in added if token.content in _CONTROL_TOKENS}
    return control | {i for i in ends if i is not None}


def control_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """Which control tokens a text holds once it is tokenized, each named once."""
    control = control_token_ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer.convert_ids_to_tokens(list(dict.fromkeys(i for i in ids if i in control)))


def banned_token_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """Tokens that must never be sampled: control tokens but EOS, and rows that name no token.

    A sampled image placeholder would be counted as an image by the next forward pass.
    """
    control = control_token_ids(tokenizer) - {tokenizer.eos_token_id}
    unused = range(len(tokenizer), vocab_size)
    return sorted(i for i in control | set(unused) if i < vocab_size)


class _PatchProjection(nn.Conv3d):
    """A patch embedding as the one matrix product that it is, each patch being as large as the
    kernel. Convolutions, their backward above all, take several times as long for it."""

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels, frames, rows, columns) -> (patches, D, 1, 1, 1)."""
        out = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[:, :, None, None, None]


def _project_patches(visual: nn.Module) -> None:
    # By class, not by another module: parameters, hooks and names of a checkpoint stay.
    proj = getattr(getattr(visual, "patch_embed", None), "proj", None)
    if type(proj) is nn.Conv3d and proj.kernel_size == proj.stride:
        proj.__class__ = _PatchProjection


class Policy(nn.Module):
    """A Qwen-VL model with the calls that training makes, each of them one module call.

    DeepSpeed wraps this module. The head owns the (maybe tied) lm_head weight, so that ZeRO-3
    gathers it for the fused loss as it does for any layer.

    Attributes:
        unreachable: why neither training nor rollout can share prompts; None where they can.

    Args:
        prefix_sharing: "auto", "on" or "off": whether the language model reads a prompt once for
            all its completions. "auto" does where the model's attention can be reached.
        prefix_attention: "two_part", "flex" or "dense", see `shared_prefix`.
    Raises:
        ValueError: "on", and the attention can't be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_impl: str = "fused",
        prefix_sharing: str = "auto",
        prefix_attention: str = "two_part",
    ) -> None:
        super().__init__()
        self.model = model
        self.head = Head(base(model).lm_head, loss_impl)
        visual = core(model).visual
        _project_patches(visual)
        self.vision_frozen = not any(p.requires_grad for p in visual.parameters())
        # The attention is always routed, because the rollout shares prompts too.
        self.unreachable = reason = shared_prefix.install(core(model).language_model)
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
    def config(self) -> Any:
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
        """Log-probs and entropy (S,) of the completion tokens; with `loss` the fields of a GRPOLoss
        instead, as a tuple, over the tokens of `loss_mask` (S,).

        Args:
            image_features: what `image_features` gave for these images, to save the tower's pass.
        """
        if image_features is None:
            image_features = self.image_features(inputs)
        hidden = self._completion_hidden(inputs, image_features)
        return self.head(hidden, inputs, temperature, loss, loss_mask)

    def _completion_hidden(self, inputs: ModelInputs, image_features: Tensor) -> Tensor:
        if inputs.groups is None:
            states = self.language(inputs, image_features, inputs.attention_mask)
        else:
            attention = PackedAttention(
                inputs.groups, inputs.input_ids.device, self.prefix_attention
            )
            states = self.language(inputs, image_features, attention_core=attention)
            attention.check(self.config.text_config.num_hidden_layers)
        return states.flatten(0, 1).index_select(0, inputs.predictors)  # (S, D)

    def language(
        self,
        inputs: ModelInputs,
        image_features: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """(R, L, D) last hidden states; the options go to the transformers model."""
        embeds, deepstack = self.embed(inputs, image_features)
        if deepstack is not None:
            options |= {"visual_pos_masks": inputs.image_mask, "deepstack_visual_embeds": deepstack}
        if attention_mask is None:
            attention_mask = no_mask(embeds.device)
        outputs = core(self.model).language_model(
            input_ids=None,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
            **options,
        )
        return outputs.last_hidden_state

    def embed(
        self, inputs: ModelInputs, image_features: Tensor
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(R, L, D) token embeddings with the images' features in their places, and, for a family
        with DeepStack, what to add after the first layers: (image tokens, D) each."""
        embeds = core(self.model).get_input_embeddings()(inputs.input_ids)
        image_features = image_features.to(embeds.dtype)
        if inputs.pixel_values is None:
            # The tower ran on a blank image so that all ranks make the same module calls; with a
            # weight of zero its parameters get zero gradients instead of none.
            return embeds + 0.0 * image_features.sum(), None
        copies = (copies for _, copies in inputs.image_copies)
        per_prompt = zip(inputs.per_prompt(image_features), copies, strict=True)
        repeated = torch.cat([part for part, n in per_prompt for _ in range(n)])
        features, *deepstack = repeated.split(embeds.shape[-1], -1)
        embeds = embeds.masked_scatter(inputs.image_mask[..., None], features)
        return embeds, [part.contiguous() for part in deepstack] or None

    def image_features(self, inputs: ModelInputs) -> Tensor:
        """(image tokens of the B prompts, D), for a family with DeepStack with its features
        beside them; of one blank image when there is none."""
        pixel_values, grid = inputs.pixel_values, inputs.image_grid_thw
        if pixel_values is None:
            pixel_values, grid = self._blank_image(inputs.input_ids.device)
        context = torch.no_grad() if self.vision_frozen else contextlib.nullcontext()
        with context:
            output = core(self.model).get_image_features(pixel_values, grid, return_dict=True)
        parts = [output.pooler_output]
        if FAMILIES[self.config.model_type]["deepstack"]:
            parts += output.deepstack_features
        return torch.cat([p if isinstance(p, Tensor) else torch.cat(list(p)) for p in parts], -1)

    def _blank_image(self, device: torch.device) -> tuple[Tensor, Tensor]:
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
        patch = channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(merge * merge, patch, device=device)
        return pixels, torch.tensor([[1, merge, merge]], device=device)

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
            completions: for each prompt its completions, (length,) int64 each, on the CPU; any
                number of them, of any lengths.
            pad_token_id: fills up rows that are not packed.
            packed: into one row, each prompt once; None: where the policy shares prompts.
        """
        packed = self.shares_prefix if packed is None else packed
        positions = [self.prompt_positions(prompt) for prompt in prompts]
        if packed:
            rows = _pack(prompts, positions, completions)
        else:
            rows = _pad(prompts, positions, completions, pad_token_id)
        flat = [ids for group in completions for ids in group]
        offsets = torch.tensor([0, *(len(ids) for ids in flat)]).cumsum(0)
        copies = [1 if packed else len(group) for group in completions]
        tokens = [int(prompt.mm_token_type_ids.sum()) for prompt in prompts]
        pixels, grid = _images(prompts)
        move = lambda part: None if part is None else part.to(device, non_blocking=True)  # noqa: E731
        return ModelInputs(
            input_ids=move(rows.input_ids),
            attention_mask=move(rows.attention_mask),
            position_ids=move(rows.position_ids),
            image_mask=move(rows.image_mask),
            pixel_values=move(pixels),
            image_grid_thw=move(grid),
            image_copies=tuple(zip(tokens, copies, strict=True)),
            predictors=move(rows.predictors),
            completion_ids=move(torch.cat([*flat, torch.zeros(0, dtype=torch.long)])),
            cu_seqlens=move(offsets.int()),
            groups=rows.groups,
        )

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """(3, P) rotary positions; a completion goes on from their largest plus 1 on all axes."""
        positions, _ = core(self.model).get_rope_index(
            prompt.input_ids[None],
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            image_grid_thw=prompt.image_grid_thw,
        )
        return positions[:, 0]


@dataclass(frozen=True)
class _Rows:
    """The fields of ModelInputs that depend on the layout, on the CPU."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    image_mask: Tensor
    predictors: Tensor
    groups: tuple[Group, ...] | None


def _images(prompts: Sequence[Prompt]) -> tuple[Tensor | None, Tensor | None]:
    with_images = [p for p in prompts if p.pixel_values is not None]
    if not with_images:
        return None, None
    if len(with_images) == 1:  # the largest tensor that goes in: not copied
        return with_images[0].pixel_values, with_images[0].image_grid_thw
    pixels = torch.cat([p.pixel_values for p in with_images])
    return pixels, torch.cat([p.image_grid_thw for p in with_images])


def _following(positions: Tensor, length: int) -> Tensor:
    """(3, length) positions of a completion behind a prompt."""
    return (int(positions.max()) + 1 + torch.arange(length)).expand(3, -1)


def _pack(
    prompts: Sequence[Prompt],
    positions: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
) -> _Rows:
    """One row. A completion's last token predicts nothing, so it is left out."""
    ids, position_ids, images, predictors, groups = [], [], [], [], []
    start = 0
    for prompt, place, group in zip(prompts, positions, completions, strict=True):
        inputs = [ids_[:-1] for ids_ in group]
        lengths = tuple(len(part) for part in inputs)
        groups.append(Group(start, len(prompt.input_ids), lengths))
        ids += [prompt.input_ids, *inputs]
        position_ids += [place, *(_following(place, n) for n in lengths)]
        images += [prompt.mm_token_type_ids.bool(), torch.zeros(sum(lengths), dtype=torch.bool)]
        position = groups[-1].first
        for length, whole in zip(lengths, group, strict=True):
            if len(whole):  # the prompt's last token predicts the first token of each
                own = torch.arange(position, position + length)
                predictors.append(torch.cat([torch.tensor([groups[-1].first - 1]), own]))
            position += length
        start = groups[-1].end
    return _Rows(
        input_ids=torch.cat(ids)[None],
        attention_mask=None,
        position_ids=torch.cat(position_ids, 1)[:, None],
        image_mask=torch.cat(images)[None],
        predictors=torch.cat([*predictors, torch.zeros(0, dtype=torch.long)]),
        groups=tuple(groups),
    )


def _pad(
    prompts: Sequence[Prompt],
    positions: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    pad_token_id: int,
) -> _Rows:
    """A row for each completion: prompts padded on the left, completions on the right."""
    before = max(len(prompt.input_ids) for prompt in prompts)
    after = max((len(ids) for group in completions for ids in group), default=0)
    rows, predictors = [], []
    for prompt, place, group in zip(prompts, positions, completions, strict=True):
        for ids in group:
            pad = (before - len(prompt.input_ids), after - len(ids))
            first = len(rows) * (before + after) + before - 1
            predictors.append(torch.arange(first, first + len(ids)))
            is_image = F.pad(prompt.mm_token_type_ids.bool(), (0, len(ids)))
            whole = torch.cat([prompt.input_ids, ids])
            place_ = torch.cat([place, _following(place, len(ids))], 1)
            rows.append(
                (
                    F.pad(whole, pad, value=pad_token_id),
                    F.pad(torch.ones_like(whole), pad),
                    F.pad(place_, pad),
                    F.pad(is_image, pad),
                )
            )
    ids, attention, places, images = (torch.stack(part) for part in zip(*rows, strict=True))
    return _Rows(
        input_ids=ids,
        attention_mask=attention,
        position_ids=places.transpose(0, 1).contiguous(),
        image_mask=images,
        predictors=torch.cat(predictors),
        groups=None,
    )


class Head(nn.Module):
    """The lm_head's weight with the calls on it; fused, logits never exist as a whole."""

    def __init__(self, lm_head: nn.Linear, loss_impl: str) -> None:
        super().__init__()
        self.weight = lm_head.weight
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
        if loss is None:
            return self._logps(hidden, self.weight, inputs.completion_ids, temperature=temperature)
        out = self._loss(
            hidden,
            self.weight,
            inputs.completion_ids,
            loss_mask,
            cu_seqlens=inputs.cu_seqlens,
            temperature=temperature,
            **vars(loss),
        )
        # ZeRO-3's hooks find tensors in tuples, but not in a dataclass.
        return tuple(getattr(out, field.name) for field in fields(GRPOLoss))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V), float32: of a few tokens, for sampling."""
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_logits(hidden.to(self.weight.dtype), self.weight)
