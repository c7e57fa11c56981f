"""A pass of any family of `AutoModelForImageTextToText`, through transformers' own code.

Every completion has a row of its own, with its prompt. Each image is encoded once all the same:
during the pass, `get_image_features`, which every such model asks for its images, returns the
features that were computed before, repeated for each row.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from virft_fast.batch import Row
from virft_fast.models.families import base, core
from virft_fast.models.inputs import ModelInputs


def check_usable(model: nn.Module) -> None:
    """Raise ValueError unless the model has the parts that `Policy` calls."""
    inner = getattr(base(model), "model", None)
    features = getattr(inner, "get_image_features", None)
    usable = features is not None and "pixel_values" in _takes(features)
    if not usable or not isinstance(getattr(base(model), "lm_head", None), nn.Linear):
        raise ValueError(
            "--model_name_or_path: expected a model with `model.get_image_features(pixel_values)` "
            f"and a linear `lm_head`, got {type(base(model)).__name__}; use another family, see "
            "docs/models.md"
        )


def image_features(model: nn.Module, inputs: ModelInputs) -> Tensor:
    """(image tokens of the B prompts, D); a blank image's if the prompts have no images.

    Raises:
        ValueError: they don't fit the image tokens, so the family merges them in its own way.
    """
    encode: Any = core(model).get_image_features
    given = inputs.images or _blank_image(model)
    given = {name: value.to(inputs.input_ids.device) for name, value in given.items()}
    given = {name: value for name, value in given.items() if name in _takes(encode)}
    found = getattr(encode(**given, return_dict=True), "pooler_output", None)
    parts = [found] if isinstance(found, Tensor) else list(found or [])
    if inputs.images and parts:
        expected = sum(tokens for tokens, _ in inputs.image_copies)
        if expected != sum(part[..., 0].numel() for part in parts):
            parts = []
    if not parts:
        raise ValueError(
            f"expected {type(core(model)).__name__}.get_image_features to return one row of "
            "`pooler_output` for each image token, got another form; this family can't be trained"
        )
    return torch.cat([part.flatten(0, -2) for part in parts])


def hidden_states(model: nn.Module, inputs: ModelInputs, features: Tensor) -> Tensor:
    """(R, L, D) last hidden states of padded rows, with the result of `image_features`."""
    read: Any = core(model)
    given = row_inputs(read, inputs) | {"position_ids": rotary_positions(inputs)}
    given = {name: value for name, value in given.items() if name in _takes(read.forward)}
    with features_given(model, inputs, features):
        states = read(**given, use_cache=False).last_hidden_state
    if not inputs.images:
        # All ranks make the same module calls; the tower gets zero gradients instead of none.
        states = states + 0.0 * features.to(states.dtype).sum()
    return states


def row_inputs(model: Any, inputs: ModelInputs) -> dict[str, Tensor | None]:
    """The arguments of transformers' model that say what the rows hold. Of what the processor makes
    of tokens, the ones that the model's forward names."""
    device = inputs.input_ids.device
    rows = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    images = {name: value.to(device) for name, value in inputs.images.items()}
    tokens = {n: v for n, v in inputs.token_inputs.items() if n in _takes(model.forward)}
    return rows | images | tokens


def rotary_positions(inputs: ModelInputs) -> Tensor:
    """(R, L) positions, or (3, R, L) multimodal ones."""
    positions = inputs.position_ids
    return positions if len(positions) > 1 else positions[0]


@contextlib.contextmanager
def features_given(model: nn.Module, inputs: ModelInputs, features: Tensor) -> Iterator[None]:
    """Context in which the model doesn't encode the images of its rows, but gets `features`.

    Raises:
        RuntimeError: the model didn't ask for them.
    """
    if not inputs.images:
        yield
        return
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    owner: Any = core(model)
    repeated = inputs.per_row(features)
    asked = []

    @functools.wraps(owner.get_image_features)  # `generate` reads its signature
    def given(*arguments: object, **options: object) -> Any:
        asked.append(True)
        parts: Any = _Parts([repeated])
        return BaseModelOutputWithPooling(pooler_output=parts)

    with _replaced(owner, "get_image_features", given):
        yield
    if not asked:
        raise RuntimeError(
            f"expected {type(owner).__name__} to call get_image_features, but it didn't; this "
            "family can't be trained"
        )


class _Parts(list[Tensor]):
    """Features as a list, which some families join, and as their tensor, which others use."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch.cat(self), name)


def logits_rule(model: nn.Module) -> tuple[float, float | None]:
    """(scale, cap): the model's logits are its head's output times `scale`, then with a cap
    cap * tanh(logits / cap). Asks transformers' forward what it makes of a few numbers.

    Raises:
        ValueError: it does something else with them.
    """
    inner: Any = base(model)
    probe = torch.tensor([[[1e-3, 0.1, 1.0, 10.0, 1e9]]])
    ids = torch.zeros(1, 1, dtype=torch.long)
    try:
        with (
            torch.no_grad(),
            _replaced(inner.model, "forward", lambda *_, **__: _Output(probe)),
            _replaced(inner.lm_head, "forward", lambda states: probe),
        ):
            logits = inner(input_ids=ids, attention_mask=ids + 1).logits.float()
        scale, cap = float(logits[0, 0, 0] / probe[0, 0, 0]), float(logits[0, 0, -1])
        if torch.allclose(logits, probe * scale, rtol=1e-4):
            return scale, None
        if torch.allclose(logits, cap * (probe * scale / cap).tanh(), rtol=1e-4):
            return scale, cap
        problem = f"{probe.flatten().tolist()} became {logits.flatten().tolist()}"
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        problem = f"its forward fails on a probe: {error!s:.200}"
    raise ValueError(
        f"expected {type(inner).__name__} to scale or soft-cap its head's output at most, but "
        f"{problem}; this family can't be trained"
    )


class _Output:
    """An output of transformers' inner model that holds hidden states alone."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _blank_image(model: nn.Module) -> dict[str, Tensor]:
    """The processor's tensors of a smallest white image, by the names that the tower asks for.

    Raises:
        ValueError: the configuration doesn't say how large an image is.
    """
    config: Any = base(model).config
    takes, vision = _takes(core(model).get_image_features), config.vision_config
    if "image_grid_thw" in takes:
        return blank_patches(vision)
    size = getattr(vision, "image_size", None)
    if size is None:
        raise ValueError(
            f"expected prompts with images for {config.model_type}, whose configuration has no "
            "image size, got prompts without; give each microbatch a row with an image"
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.ones(1, getattr(vision, "num_channels", 3), height, width)
    sizes = torch.tensor([[height, width]])
    if pinpoints := getattr(config, "image_grid_pinpoints", None):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        count = image_size_to_num_patches([height, width], pinpoints, height)
        pixels = pixels.repeat(count, 1, 1, 1)[None]
    if "pixel_attention_mask" in takes:
        pixels = pixels[None]
    mask = torch.ones(1, 1, height, width, dtype=torch.long)
    return {"pixel_values": pixels, "image_sizes": sizes, "pixel_attention_mask": mask}


def blank_patches(vision: Any) -> dict[str, Tensor]:
    """One image token's patches, of a tower that reads patches with a grid."""
    merge = vision.spatial_merge_size
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
    patch = channels * vision.temporal_patch_size * vision.patch_size**2
    pixels, grid = torch.zeros(merge * merge, patch), torch.tensor([[1, merge, merge]])
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _takes(function: Callable[..., object]) -> Any:
    """The names of a function's parameters."""
    return inspect.signature(function).parameters


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Context in which calls of a module's method go to `function`."""
    before: Row = {name: vars(owner)[name]} if name in vars(owner) else {}
    vars(owner)[name] = function
    try:
        yield
    finally:
        del vars(owner)[name]
        vars(owner).update(before)
