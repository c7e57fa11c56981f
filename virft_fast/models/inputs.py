"""Turns prompts and completions into the rows of tokens that the model reads.

Shapes: B prompts, N completions of any lengths, S completion tokens in all, R rows of L tokens
(packed: R = 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from virft_fast.batch import Prompt, Row, Sample
from virft_fast.devices import to_device
from virft_fast.models import chat_template
from virft_fast.models.families import Processor, Tokenizer, family_of
from virft_fast.models.shared_prefix import Group


@dataclass(frozen=True)
class ModelInputs:
    """B prompts and their N completions as the model reads them.

    Attributes:
        input_ids: (R, L) int64.
        attention_mask: (R, L) int64, 0 at padding; None for a packed row.
        position_ids: (3, R, L) int64, multimodal rotary positions; (1, R, L) without those.
        image_places: (image tokens,) int64, which of the R * L tokens are image tokens.
        pixel_values, image_grid_thw: the images of the B prompts, each once; None without images.
            The grid is on the CPU. Never change them in place, because they may belong to a
            Prompt.
        image_copies: for each prompt, its number of image tokens and how many times it is read.
        predictors: (S,) int64, which of the R * L hidden states predict the completion tokens.
        completion_ids: (S,) int64, one completion after another.
        cu_seqlens: (N + 1,) int32 on the CPU, the start of each completion, followed by S.
        groups: the groups' positions in a packed row; empty if each completion has its own row.
        vision: `vision_metadata` of the images, on the model's device; empty without images.
        image_inputs, token_inputs: as in Prompt; of all prompts, and (R, L) each.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    image_places: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    image_copies: tuple[tuple[int, int], ...]
    predictors: Tensor
    completion_ids: Tensor
    cu_seqlens: Tensor
    groups: tuple[Group, ...] = ()
    vision: Row = field(default_factory=dict)
    image_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    token_inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def images(self) -> dict[str, Tensor]:
        """The processor's tensors of the images, by name; empty without images."""
        own = {"pixel_values": self.pixel_values, "image_grid_thw": self.image_grid_thw}
        found = {name: value for name, value in own.items() if value is not None}
        return {**found, **self.image_inputs}

    def per_prompt(self, image_features: Tensor) -> tuple[Tensor, ...]:
        """Split `Policy.image_features` by prompt. A blank image's features belong to no prompt."""
        if self.pixel_values is None:
            image_features = image_features[:0]
        return image_features.split([tokens for tokens, _ in self.image_copies])

    def per_row(self, image_features: Tensor) -> Tensor:
        """Repeat a prompt's features for each row that reads it."""
        copies = (copies for _, copies in self.image_copies)
        per_prompt = zip(self.per_prompt(image_features), copies, strict=True)
        return torch.cat([features for features, n in per_prompt for _ in range(n)])

    def to(self, device: torch.device) -> ModelInputs:
        """The inputs on the device, except `vision` and what only the host reads."""
        moved: Row = {
            name: to_device(value, device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name not in ("image_grid_thw", "cu_seqlens")
        }
        for name in ("image_inputs", "token_inputs"):
            values = getattr(self, name).items()
            moved[name] = {key: to_device(value, device) for key, value in values}
        return replace(self, **moved)


def encode_prompt(processor: Processor, sample: Sample) -> Prompt:
    """Render and tokenize a sample. Each image placeholder is repeated once per token of its image.

    Raises:
        ValueError: the chat template fails, the text itself contains image tokens, or the images
            can't be processed.
    """
    text = chat_template.render(processor, sample.messages)
    image_token, tokenizer = processor.image_token, processor.tokenizer
    placeholder = getattr(processor, "placeholder", image_token)
    for token, expected in {placeholder: 0, image_token: len(sample.images)}.items():
        if text.count(token) != expected:
            raise ValueError(
                f"expected {expected} image placeholders in the prompt, got {text.count(token)}; "
                f"the text must not hold {token} itself"
            )
    images = list(sample.images) or None
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    # The tokenizer would add BOS again.
    options: Row = {"add_special_tokens": False} if begins else {}
    encoded = processor(text=[text], images=images, return_tensors="pt", **options)
    ids = encoded["input_ids"]
    made = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    own = _OWN_FIELDS
    if family_of(getattr(processor, "model_type", "qwen2_vl")).is_qwen:
        own = own | {"mm_token_type_ids"}
    others = {name: value for name, value in made.items() if name not in own}
    return Prompt(
        sample=sample,
        text=text,
        input_ids=ids[0],
        mm_token_type_ids=(ids[0] == tokenizer.convert_tokens_to_ids(placeholder)).long(),
        pixel_values=made["pixel_values"] if images else None,
        image_grid_thw=made.get("image_grid_thw") if images else None,
        image_inputs={n: value for n, value in others.items() if value.shape != ids.shape},
        token_inputs={n: value[0] for n, value in others.items() if value.shape == ids.shape},
    )


# A prompt has fields for these, makes them itself, or doesn't need them.
_OWN_FIELDS = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels"}
# Special tokens that are never text: those of the chat format, and image and video placeholders.
_CONTROL_TOKENS = {
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
}  # fmt: skip


def control_token_ids(tokenizer: Tokenizer) -> set[int]:
    """Tokens that no answer may contain: chat-format tokens, image and video placeholders, BOS, EOS
    and padding. The family's text markers, such as <|box_start|>, and special tokens that a user
    added count as text."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    added = tokenizer.added_tokens_decoder.items()
    names = vars(tokenizer).get("control_tokens", _CONTROL_TOKENS)  # see `load_processor`
    control = {i for i, token in added if token.content in names}
    return control | {i for i in ends if i is not None}


def control_tokens_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The control tokens in a text after tokenization, each listed once."""
    control = control_token_ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return list(tokenizer.convert_ids_to_tokens([i for i in dict.fromkeys(ids) if i in control]))


def banned_token_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Tokens that must never be sampled: control tokens except EOS, and ids without a token.

    The next forward pass would treat a sampled image placeholder as an image.
    """
    control = control_token_ids(tokenizer) - {tokenizer.eos_token_id}
    unused = range(len(tokenizer), vocab_size)
    return sorted(i for i in control | set(unused) if i < vocab_size)


def collate(
    prompts: Sequence[Prompt],
    positions: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    *,
    pad_token_id: int,
    packed: bool,
    image_blocks: bool = False,
    completion_type: int = 0,
) -> ModelInputs:
    """Like `Policy.collate`, on the CPU.

    Args:
        positions: (3, P) or (1, P) rotary positions of each prompt.
        image_blocks, completion_type: see `Family`.
    """
    given = (prompts, positions, completions)
    rows = _pack(*given, image_blocks) if packed else _pad(*given, pad_token_id, completion_type)
    is_image = rows.pop("is_image")
    flat = [ids for group in completions for ids in group]
    copies = [1 if packed else len(group) for group in completions]
    tokens = [int(prompt.mm_token_type_ids.sum()) for prompt in prompts]
    return ModelInputs(
        **rows,
        image_places=is_image.flatten().nonzero()[:, 0],
        pixel_values=_join(prompt.pixel_values for prompt in prompts),
        image_grid_thw=_join(prompt.image_grid_thw for prompt in prompts),
        image_copies=tuple(zip(tokens, copies, strict=True)),
        completion_ids=torch.cat([*flat, torch.zeros(0, dtype=torch.long)]),
        cu_seqlens=torch.tensor([0, *(len(ids) for ids in flat)]).cumsum(0).int(),
        image_inputs={
            name: _join(prompt.image_inputs.get(name) for prompt in prompts)
            for name in sorted({name for prompt in prompts for name in prompt.image_inputs})
        },
    )


def _join(tensors: Iterable[Tensor | None]) -> Any:
    """The prompts' tensors along the first axis, zeros behind shorter ones on other axes; None if
    there is none."""
    parts = [tensor for tensor in tensors if tensor is not None]
    if len(parts) < 2:  # not copied: pixels are the largest tensor
        return parts[0] if parts else None
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    for number, part in enumerate(parts):
        missing = [size - own for size, own in zip(shape, part.shape[1:], strict=True)]
        if any(missing):
            parts[number] = F.pad(part, [n for size in reversed(missing) for n in (0, size)])
    return torch.cat(parts)


def _following(positions: Tensor, length: int) -> Tensor:
    """(3, length) rotary positions of a completion, given its prompt's."""
    return (int(positions.max()) + 1 + torch.arange(length)).expand(len(positions), -1)


def _pack(
    prompts: Sequence[Prompt],
    positions: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    image_blocks: bool,
) -> Row:
    """The fields of one packed row and `is_image`, (R, L) bool. Omits completions' last tokens,
    which predict nothing."""
    ids, position_ids, images, predictors, groups = [], [], [], [], []
    start = 0
    for prompt, own_positions, group in zip(prompts, positions, completions, strict=True):
        inputs = [completion[:-1] for completion in group]
        lengths = tuple(map(len, inputs))
        is_image = prompt.mm_token_type_ids.bool()
        edges = F.pad(is_image & image_blocks, (1, 1)).int().diff().nonzero().view(-1, 2)
        blocks = tuple((first, end) for first, end in edges.tolist())
        groups.append(Group(start, len(prompt.input_ids), lengths, blocks))
        ids += [prompt.input_ids, *inputs]
        position_ids += [own_positions, *(_following(own_positions, n) for n in lengths)]
        images += [is_image, torch.zeros(sum(lengths), dtype=torch.bool)]
        position = groups[-1].first
        for length, completion in zip(lengths, group, strict=True):
            if len(completion):  # the prompt's last token predicts its first
                own = torch.arange(position, position + length)
                predictors.append(torch.cat([torch.tensor([groups[-1].first - 1]), own]))
            position += length
        start = groups[-1].end
    return dict(
        input_ids=torch.cat(ids)[None],
        attention_mask=None,
        position_ids=torch.cat(position_ids, 1)[:, None],
        is_image=torch.cat(images)[None],
        predictors=torch.cat([*predictors, torch.zeros(0, dtype=torch.long)]),
        groups=tuple(groups),
    )


def _pad(
    prompts: Sequence[Prompt],
    positions: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    pad_token_id: int,
    completion_type: int,
) -> Row:
    """As `_pack`, but one row per completion: prompts are left-padded, completions right-padded."""
    before = max(len(prompt.input_ids) for prompt in prompts)
    after = max((len(ids) for group in completions for ids in group), default=0)
    rows: list[tuple[Tensor, ...]] = []
    predictors = []
    for prompt, own_positions, group in zip(prompts, positions, completions, strict=True):
        for ids in group:
            pad = (before - len(prompt.input_ids), after - len(ids))
            first = len(rows) * (before + after) + before - 1
            predictors.append(torch.arange(first, first + len(ids)))
            is_image = F.pad(prompt.mm_token_type_ids.bool(), (0, len(ids)))
            whole = torch.cat([prompt.input_ids, ids])
            places = torch.cat([own_positions, _following(own_positions, len(ids))], 1)
            others = (F.pad(row, pad) for row in (torch.ones_like(whole), places, is_image))
            rows.append((F.pad(whole, pad, value=pad_token_id), *others))
    input_ids, attention_mask, position_ids, images = map(torch.stack, zip(*rows, strict=True))
    repeated = [(p, len(ids)) for p, g in zip(prompts, completions, strict=True) for ids in g]

    def types(name: str, prompt: Prompt, length: int) -> Tensor:
        own = prompt.token_inputs.get(name, torch.zeros_like(prompt.input_ids))
        value = completion_type if name == "token_type_ids" else 0
        row = F.pad(own, (before - len(own), length))
        row[before:] = value
        return F.pad(row, (0, after - length))

    return dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids.transpose(0, 1).contiguous(),
        is_image=images,
        predictors=torch.cat(predictors),
        token_inputs={
            name: torch.stack([types(name, *row) for row in repeated])
            for name in sorted({name for p in prompts for name in p.token_inputs})
        },
    )
