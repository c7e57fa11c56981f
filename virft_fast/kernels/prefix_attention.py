"""Attention over a packed row, in which a prompt is read once for all its completions.

The row holds whole groups, [prompt | completion 1 | ... | completion G | next prompt | ...]. Every
completion sees its prompt and, causally, itself. CUDA tensors go to Triton
(`triton_prefix_attention`), which reads the row where it is: no copies of keys and values, no
padding, one launch for all groups. CPU and float64 tensors go to the torch reference here, with two
calls of PyTorch's attention for each group; so do rows with a sliding window or with blocks of
tokens that see each other, as in Gemma 3.

Shapes: S tokens of the row, H query heads, K key/value heads, E numbers per head, G completions of
a group, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F

from virft_fast.devices import to_device
from virft_fast.kernels.backend import triton_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_HEAD_SIZE = 128  # of the Triton kernels; larger heads go to the reference
# Of the work of a block of keys in the backward pass; see `PrefixLayout.key_blocks`.
MIN_STEPS, MAX_ITEMS = 48, 1024
Padding = tuple[Tensor, Tensor] | None  # see `_padding`
_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Group:
    """The position of a prompt and its completions in the packed row.

    Attributes:
        start: position of the prompt's first token.
        prompt_length: P.
        lengths: C of each completion, in order after the prompt; 0 is allowed.
        blocks: (first, end) of each block of the prompt's tokens that see each other in both
            directions, counted from the prompt's start.
    """

    start: int
    prompt_length: int
    lengths: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def first(self) -> int:
        """Position of the first completion token."""
        return self.start + self.prompt_length

    @property
    def end(self) -> int:
        return self.first + sum(self.lengths)

    @property
    def longest(self) -> int:
        """P and the longest C."""
        return self.prompt_length + max(self.lengths, default=0)


def _once(method: _Method) -> _Method:
    """A method of `PrefixLayout` that computes once for the same sizes."""

    @functools.wraps(method)
    def kept(self: PrefixLayout, *sizes: int) -> Any:
        key = (method.__name__, *sizes)
        if key not in self._kept:
            self._kept[key] = method(self, *sizes)
        return self._kept[key]

    return cast(_Method, kept)


@dataclass(frozen=True)
class PrefixLayout:
    """The groups of a packed row. Make it once per row: it keeps on the device what attention needs
    to know of the lengths.

    Attributes:
        groups: in order and without gaps.
        device: of the row.
        window: how many tokens of its prompt and completion, its own included, a token sees at
            most; None: all.
    """

    groups: tuple[Group, ...]
    device: torch.device
    window: int | None = None
    _kept: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        # With the number of the GPU, as tensors have it.
        object.__setattr__(self, "device", torch.empty(0, device=self.device).device)
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window: expected at least 1 token or None, got {self.window}; a token sees itself"
            )

    @classmethod
    def from_lengths(
        cls,
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[Sequence[int]],
        *,
        device: torch.device | str = "cpu",
    ) -> PrefixLayout:
        """The layout of a row.

        Args:
            prompt_lengths: P of each group.
            completion_lengths: C of each completion, for each group. Any length may be 0, and a
                group may have no completions.
            device: of the tensors that `prefix_attention` will get.
        Raises:
            ValueError: the numbers of groups differ, or lengths are no whole numbers or negative.
        """
        if len(prompt_lengths) != len(completion_lengths):
            raise ValueError(
                f"completion_lengths: expected a list for each of the {len(prompt_lengths)} "
                f"prompts, got {len(completion_lengths)}; a prompt without completions has []"
            )
        groups, start = [], 0
        for prompt, completions in zip(prompt_lengths, completion_lengths, strict=True):
            try:
                own = tuple(operator.index(length) for length in completions)
                groups.append(Group(start, operator.index(prompt), own))
            except TypeError:
                raise ValueError(
                    "expected prompt_lengths [P, ...] and completion_lengths [[C, ...], ...] in "
                    f"whole numbers, got a prompt of {prompt!r} and completions of {completions!r}"
                ) from None
            if min(groups[-1].prompt_length, *groups[-1].lengths, 0) < 0:
                raise ValueError(
                    f"expected lengths of at least 0, got a prompt of {prompt} and completions of "
                    f"{list(completions)} tokens"
                )
            start = groups[-1].end
        return cls(tuple(groups), torch.device(device))

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.groups[-1].end if self.groups else 0

    @functools.cached_property
    def causal(self) -> bool:
        """Whether a token sees all tokens before it, and none after it."""
        width = self.window
        return not any(g.blocks or (width and g.longest > width) for g in self.groups)

    @functools.cached_property
    def two_part(self) -> list[tuple[Padding, Tensor | None, Tensor]]:
        """For each group, what the reference needs of its lengths."""
        limits = (self.device, self.window)
        with torch.inference_mode(False):  # else a later backward pass couldn't use them
            return [
                (_padding(group, self.device), _prompt_mask(group, *limits),
                 _suffix_mask(group, *limits))
                for group in self.groups
            ]  # fmt: skip

    @functools.cached_property
    def segment_starts(self) -> Tensor:
        """(S,) int32 on the device, the first token of each token's prompt or completion."""
        return to_device(self._segments[0].int(), self.device)

    @functools.cached_property
    def _segments(self) -> tuple[Tensor, Tensor]:
        """Two (S,) int64 on the CPU: where each token's prompt or completion starts and ends."""
        lengths = chain.from_iterable((g.prompt_length, *g.lengths) for g in self.groups)
        sizes = torch.tensor(list(lengths), dtype=torch.long)
        ends = sizes.cumsum(0)
        return (ends - sizes).repeat_interleave(sizes), ends.repeat_interleave(sizes)

    def _blocks(self, size: int) -> tuple[Tensor, ...]:
        """Blocks of at most `size` rows, each within a prompt or within a group's completions.

        Returns:
            (n,) int64 on the CPU: first row, end, the group's start, its first completion token,
            its end, and whether the block is of completions.
        """
        bounds = torch.tensor([(g.start, g.first, g.end) for g in self.groups]).view(-1, 3).long()
        first, end = bounds[:, :2].flatten(), bounds[:, 1:].flatten()
        count = (end - first + size - 1) // size
        run = torch.arange(len(first)).repeat_interleave(count)
        number = torch.arange(len(run)) - (count.cumsum(0) - count)[run]
        first = first[run] + number * size
        return (first, torch.minimum(first + size, end[run]), *bounds[run // 2].T, run % 2)

    @_once
    def query_blocks(self, size: int) -> Tensor:
        """The work of the forward pass and of the gradient of the queries.

        A block of completions may hold several of them, of one group.

        Returns:
            (n, 5) int32 on the device, most keys first: a block's first row and end; the first key
            of its first row's own prompt or completion; its prompt's first key and end, the same
            number if the block itself is of a prompt.
        """
        first, end, prompt, prompt_end, _, completions = self._blocks(size)
        own = self._segments[0][first]
        prompt_end = torch.where(completions == 1, prompt_end, prompt)
        table = torch.stack([first, end, own, prompt, prompt_end], 1)
        return self._sorted(table, prompt_end - prompt + end - own)

    @_once
    def key_blocks(
        self, queries: int, keys: int, heads: int, repeats: int
    ) -> tuple[Tensor, Tensor, int]:
        """The work of the gradients of keys and values, in items of similar length.

        The queries that see a block of `keys` keys are the rows from the block on: up to the end of
        its group in a prompt, else up to the end of its last completion. Each of the H / K heads
        that share the keys reads them in steps of `queries` rows, one after the other.

        The rule: a block whose steps, of all its heads, are more than the larger of `MIN_STEPS` and
        1 / `MAX_ITEMS` of all the row's steps is split into equal items. Each item writes its
        share in float32, and the shares are summed in the order of the rows. A block with one item
        writes its gradients at once.

        The cost: n programs at a time finish in about (all steps) / n + (steps of the longest
        item). Unsplit, the second term is a prompt's first block: with P = 650, 8 completions of
        200 tokens and 6 heads per key head, it has 426 steps of 32 rows, where each of 132
        multiprocessors would have 73. A share is written and read once, 2 * `keys` * E * 8 bytes:
        at E = 128, about as long as 4 steps, so at most a sixth of an item, which has at least half
        of `MIN_STEPS`. A row with so many steps that every multiprocessor gets several items of
        more than `MIN_STEPS` gains nothing from shorter ones, hence `MAX_ITEMS`. Both numbers are
        estimates from the sizes of the operands, not measured. The alternative, a share of each
        query head for each block, would take 2 * S * H * E * 8 bytes.

        Args:
            queries, keys: rows per step, and keys per block.
            heads, repeats: H, and H / K.
        Returns:
            int32 on the device, longest first. (n, 7) items: the block's first key, end, and the
            end of the rows that see it; whether it is of completions; the item's first step and
            end, counted head by head; its place among the shares, -1 if it is the only one.
            (m, 4) split blocks: first key, end, the first item's place, number of items. And how
            many shares there are for each key head.
        """
        first, end, _, _, last, completions = self._blocks(keys)
        last = torch.where(completions == 1, self._segments[1][end - 1], last)
        steps = repeats * ((last - first + queries - 1) // queries)
        most = max(MIN_STEPS, -(-int(steps.sum()) * heads // repeats // MAX_ITEMS))
        count = (steps + most - 1) // most
        shares = torch.where(count > 1, count, 0)
        place = shares.cumsum(0) - shares
        split = torch.stack([first, end, place, count], 1)[count > 1]
        block = torch.arange(len(first)).repeat_interleave(count)
        number = torch.arange(len(block)) - (count.cumsum(0) - count)[block]
        start, stop = (steps[block] * (number + i) // count[block] for i in (0, 1))
        place = torch.where(count[block] > 1, place[block] + number, -1)
        columns = (first[block], end[block], last[block], completions[block], start, stop, place)
        table = torch.stack(columns, 1)
        items, split = self._sorted(table, stop - start), self._sorted(split, split[:, 3])
        return items, split, int(shares.sum())

    def _sorted(self, table: Tensor, work: Tensor) -> Tensor:
        order = work.argsort(descending=True, stable=True)
        return to_device(table[order].int(), self.device)


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, *, scaling: float
) -> Tensor:
    """Attention of every prompt to itself, and of every completion to its prompt and itself, both
    causally, up to the layout's window and blocks: softmax(scaling * query @ key.T) @ value over
    what a token sees.

    Differentiable once. Keeps its arguments, its result and the log-sum-exp of the scores, (H, S)
    float32, for the backward pass. The same inputs give the same bits: nothing is summed by
    atomics. A group's results and gradients don't depend on other groups, even if those hold NaN;
    within a group, finite numbers of one completion change nothing in another. Under autocast, the
    arguments are cast to its dtype, like those of PyTorch's attention.

    Args:
        query: (S, H, E), bfloat16, float16 or float32 (float64 by the reference).
        key, value: (S, K, E) of the same dtype. Query head h reads key/value head h * K // H.
            Any strides; only rows whose E numbers aren't next to each other are copied.
        layout: `PrefixLayout.from_lengths` of the row's S tokens, on the same device.
        scaling: factor of the scores, usually E ** -0.5.
    Returns:
        (S, H, E) in the dtype of the query.
    Raises:
        ValueError: shapes, dtypes, devices or the layout disagree; says what was expected and what
            was given.
    Computes in float32; products of 16-bit inputs have 16-bit operands. Source: FlashAttention-2,
    arXiv:2307.08691, with other sets of visible keys.
    """
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            states if states.dtype == torch.float64 else states.to(dtype)
            for states in (query, key, value)
        )
    _check(query, key, value, layout, scaling)
    kernels = triton_for(query, "triton_prefix_attention")
    if kernels is None or query.shape[2] > MAX_HEAD_SIZE or not layout.causal:
        return two_part_attention(query, key, value, layout, scaling=scaling)
    rows = (states if states.stride(2) == 1 else states.contiguous()
            for states in (query, key, value))  # fmt: skip
    out: Tensor = _PrefixAttention.apply(*rows, layout, scaling, kernels)
    return out


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scaling: float,
        kernels: ModuleType,
    ) -> Tensor:  # fmt: skip
        out, lse = kernels.forward(query, key, value, layout, scaling)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.arguments = (layout, scaling, kernels)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, scaling, kernels = ctx.arguments
        grads = kernels.backward(grad, *ctx.saved_tensors, layout, scaling)
        return (*grads, None, None, None)


def _check(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scaling: float) -> None:
    if not isinstance(scaling, Real):
        raise ValueError(
            f"scaling: expected a number, got {type(scaling).__name__}; multiply the query by a "
            "factor that is a tensor"
        )
    if query.ndim != 3 or key.ndim != 3 or not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query and key: expected (S, H, E) and (S, K, E) with H a multiple of K, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}; leave out the batch axis"
        )
    shape = (layout.num_tokens, *key.shape[1:])
    for name, states in (("query", query), ("key", key), ("value", value)):
        expected = (shape[0], query.shape[1], shape[2]) if name == "query" else shape
        if states.shape != expected:
            raise ValueError(
                f"{name}: expected {expected} for the layout's {shape[0]} tokens, got "
                f"{tuple(states.shape)}; the layout's lengths must add up to the row's"
            )
        if states.dtype != query.dtype or states.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected the query's dtype, 16, 32 or 64 bits of floating point, got "
                f"{states.dtype} with a query of {query.dtype}; cast them to one dtype"
            )
        if states.device != layout.device:
            raise ValueError(
                f"{name}: expected on the layout's {layout.device}, got {states.device}; pass "
                "device= to PrefixLayout.from_lengths"
            )


# ---- torch reference -----------------------------------------------------------------------------


def two_part_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, *, scaling: float
) -> Tensor:
    """`prefix_attention` in torch: two dense calls per group, the prompt over itself, and the
    completions over prompt and themselves.

    Completions are padded to the longest. The padding comes last, so the causal mask hides it.
    """
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    both = for_query_heads(query[None], key[None], value[None], masked=not layout.causal)
    key, value = (states[0] for states in both)
    outputs = []
    for group, (padding, own, mask) in zip(layout.groups, layout.two_part, strict=True):
        prompt = slice(group.start, group.first)
        outputs.append(_prompt(query[:, prompt], key[:, prompt], value[:, prompt], scaling, own))
        if group.end > group.first:
            outputs.append(_suffix(group, padding, mask, (query, key, value), scaling))
    return torch.cat(outputs) if outputs else _prompt(query, key, value, scaling)


def _suffix(
    group: Group, padding: Padding, mask: Tensor, states: tuple[Tensor, ...], scaling: float
) -> Tensor:
    """(sum of C, H, E) outputs of a group's completion tokens."""
    query, key, value = states
    num, longest = len(group.lengths), max(group.lengths)
    suffix, prompt = slice(group.first, group.end), slice(group.start, group.first)

    def batched(states: Tensor) -> Tensor:  # (H, S, E) -> (G, H, longest C, E)
        states = states[:, suffix]
        if padding is not None:
            states = states.index_select(1, padding[0])
        return states.unflatten(1, (num, longest)).transpose(0, 1)

    def with_prompt(states: Tensor) -> Tensor:  # -> (G, H, P + longest C, E)
        shared = states[:, prompt].expand(num, -1, -1, -1)
        return torch.cat([shared, batched(states)], 2)

    keys, values, gqa = with_prompt(key), with_prompt(value), len(query) != len(key)
    out = F.scaled_dot_product_attention(
        batched(query), keys, values, attn_mask=mask, scale=scaling, enable_gqa=gqa
    )
    out = out.transpose(1, 2).flatten(0, 1)  # (G * longest C, H, E)
    return out if padding is None else out.index_select(0, padding[1])


def for_query_heads(
    query: Tensor, key: Tensor, value: Tensor, *, masked: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, K, S, E) keys and values as they are, or copied for each of the H query heads.

    Of torch's fused kernels on CUDA, only flash attention shares keys among query heads, and it
    takes 16-bit numbers only, and no mask. With shared keys, others would go to the unfused kernel.
    """
    options = (None, 0.0, False, True)  # no mask or dropout; not causal; with shared keys
    if query.is_cuda and (
        masked or not can_use_flash_attention(SDPAParams(query, key, value, *options))
    ):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return key, value


def _prompt(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of (H, n, E) queries to (H or K, n, E) keys and values, (n, H, E): causal unless
    there is a mask."""
    out = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None,
        scale=scaling, enable_gqa=len(query) != len(key),
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _padding(group: Group, device: torch.device) -> Padding:
    """Indices that pad a group's completions to the longest, and indices that undo it; None if all
    have the same length."""
    lengths = torch.tensor(group.lengths)
    if not len(lengths) or bool((lengths == lengths[0]).all()):
        return None
    longest = int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]  # (G, longest)
    index = torch.zeros(real.shape, dtype=torch.long)
    index[real] = torch.arange(int(lengths.sum()))
    places = (index.flatten(), real.flatten().nonzero()[:, 0])
    return to_device(places[0], device), to_device(places[1], device)


def _prompt_mask(group: Group, device: torch.device, window: int | None) -> Tensor | None:
    """(P, P) mask of the prompt, or None if it's causal. A block ignores what comes after a token,
    but not the window, as in transformers' `create_masks_for_vision_model`."""
    count = group.prompt_length
    window = count if window is None else window
    if window >= count and not group.blocks:
        return None
    mask = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    for first, end in group.blocks:
        mask[first:end, first:end] = True
    return mask.triu(1 - window)


def _suffix_mask(group: Group, device: torch.device, window: int | None) -> Tensor:
    """(longest C, P + longest C) mask: all of the prompt, and the completion causally, both within
    the window."""
    longest = group.longest - group.prompt_length
    window = group.longest if window is None else window
    if device.type == "cuda" and window >= group.longest:
        from torch.nn.attention.bias import causal_lower_right

        # The same mask in a form that the flash kernels accept.
        return causal_lower_right(longest, group.prompt_length + longest)
    mask = torch.ones(longest, group.prompt_length + longest, dtype=torch.bool, device=device)
    return mask.tril(group.prompt_length).triu(group.prompt_length + 1 - window)
