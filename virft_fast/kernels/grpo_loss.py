"""The GRPO loss family, computed from logits.

loss = sum over tokens of weight * (policy term + beta * KL term). The weights implement each loss
type's reduction and depend only on the masks, so `linear.py` can add up the loss over chunks of
tokens. Definitions follow TRL 1.16's GRPOConfig; tests/test_trl_parity.py checks against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from virft_fast.kernels.advantages import ADVANTAGE_EPS, check_rewards, group_advantages
from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.layout import Layout, make_layout
from virft_fast.kernels.logprobs import (
    check_ids,
    check_rows,
    compute_dtype,
    gradient_buffer,
    pick,
    rows_backward,
    rows_forward,
)
from virft_fast.kernels.loss_args import LossArgs, takes_loss_args
from virft_fast.kernels.token_loss import token_loss


@dataclass(frozen=True)
class GRPOLoss:
    """The result of the loss functions. Only `loss` is differentiable.

    Attributes:
        loss: 0-d.
        logps, entropy: (N, T), or (S,) packed; 0 where masked.
        kl: same shape; KL estimate against `ref_logps`, 0 without them and where masked.
        clip_fraction_low, clip_fraction_high: 0-d; share of the active tokens (or sequences, with
            sequence-level ratios) whose ratio is clipped: below with a negative advantage, above
            with a positive one. cispo clips only above.
    float32, or float64 for float64 inputs.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor


@takes_loss_args
def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    **loss: Any,
) -> GRPOLoss:
    """Policy-gradient loss of N sampled completions.

    Args:
        logits: (N, T, V) floating point, at the positions that predict `completion_ids`.
        completion_ids: (N, T) int64.
        completion_mask: (N, T) bool. Where false, logits, ids, old and reference log-probs are
            ignored, even NaN, and get no gradient.
        rewards: (N,) prompt-major, normalized here by `group_advantages` in groups of
            `num_generations`; or
        advantages: (N,), used unchanged. Pass exactly one of the two.
        num_generations: G; required with `rewards`.
        old_logps: same shape as the ids; log-probs before this step's updates. None: on-policy, the
            ratio is 1 but still has a gradient.
        ref_logps: same shape; log-probs under the reference model. Required when beta > 0; with
            beta == 0, the KL is only measured.
        beta: at least 0; weight of the KL term.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - low, 1 + high]; if high is None, it
            equals low. For cispo, the ratio's cap is `epsilon_high` itself, as in TRL: usually 5.0.
        delta: upper bound of the unclipped ratio (two-sided clipping), or None.
        loss_type: the reduction. "grpo": mean of the sequences' means; "dr_grpo": sum over
            N * max_completion_length; "bnpo" and "dapo": sum over `num_items`; "cispo": like dapo,
            but the term is the stop-gradient of the capped ratio times the log-prob; "gspo": like
            grpo, with sequence-level ratios.
        importance_sampling_level: "token": one ratio per token; "sequence": one per sequence, the
            exponential of its mean log-ratio.
        kl: with d = ref_logps - logps: "k1" -d (its expected gradient is 0: for measuring only),
            "k2" d^2/2, "k3" exp(d) - d - 1.
        temperature: above 0; divides the logits.
        max_completion_length: for dr_grpo; None: T. Required when packed.
        num_items: denominator of bnpo, dapo and cispo, >= 0; 0 means there are no tokens. A 0-d
            tensor stays on its device. None: the active tokens of this call. To make accumulation
            equal one big batch, pass the count over all microbatches (across ranks that average
            gradients: count / world size).
        cu_seqlens: packed layout: (N+1,) int32 offsets, may be on the CPU, with logits (S, V), ids,
            old and reference log-probs (S,); `completion_mask` may then be None.
        inplace: the backward pass overwrites `logits` with the gradient; nothing may use them
            afterwards.
    Returns:
        GRPOLoss. With no active token the loss is a finite 0 with a zero gradient.
    Raises:
        ValueError: wrong shapes, dtypes, devices, names or numbers; says what was expected and what
            was given. On the CPU, also for an id outside V; on the GPU, it makes the loss NaN.
    For log-ratios above 20, exp continues linearly, so that nothing overflows. Differentiable once,
    in `logits`. Sources: GRPO arXiv:2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, GSPO
    2507.18071, CISPO (MiniMax-M1) 2506.13585, two-sided clipping (INTELLECT-2) 2505.07291, KL
    estimators: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    layout = make_layout(completion_ids, completion_mask, cu_seqlens)
    check_rows(logits, completion_ids, temperature)
    ids = completion_ids.reshape(-1).masked_fill(~layout.mask, 0)
    check_ids("completion_ids", ids, logits.shape[-1])
    terms = make_terms(layout, compute_dtype(logits), LossArgs(**loss))
    return make_result(terms, *_GRPOFromLogits.apply(logits, ids, 1 / temperature, inplace, terms))


def make_result(
    terms: LossTerms, loss: Tensor, logps: Tensor, entropy: Tensor, kl: Tensor, clipped: Tensor
) -> GRPOLoss:
    """Build the result in the caller's shape from (R,) vectors, 0 where masked."""
    logps, entropy, kl = (vector.view(terms.layout.shape) for vector in (logps, entropy, kl))
    return GRPOLoss(loss, logps, entropy, kl, *terms.clip_fractions(clipped))


@dataclass(frozen=True)
class LossTerms:
    """Everything the loss needs besides log-probs. Vectors are flat over the layout's R tokens.

    Attributes:
        given: (N,) rewards if `num_generations` is set, else advantages.
        weights: (R,), 0 where masked.
        old_logps, ref_logps: (R,), 0 where masked, or None.
        by_sequence: use sequence-level ratios, which need all tokens of a sequence at once.
        capped: use cispo's policy term.
    """

    layout: Layout
    given: Tensor
    num_generations: int | None
    weights: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    beta: float
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    by_sequence: bool
    capped: bool
    kl: str

    @property
    def may_clip(self) -> bool:
        """Whether clipping can remove the policy term's gradient of a token with an advantage."""
        return not self.capped and (self.old_logps is not None or self.delta is not None)

    @cached_property
    def advantages(self) -> Tensor:
        """(N,)."""
        if self.num_generations is None:
            return self.given
        return group_advantages(self.given, self.num_generations)

    def normalized(self) -> LossTerms:
        """The same terms, with advantages computed from rewards."""
        return replace(self, given=self.advantages, num_generations=None)

    def take(self, rows: Tensor) -> LossTerms:
        """Only the tokens `rows`, (R',) int64 ascending. Needs advantages, not rewards."""
        return self._with(self.layout.take(rows), rows)

    def tile(self, rows: slice) -> LossTerms:
        """Only a slice of the tokens; not for sequence-level ratios."""
        layout = self.layout
        layout = replace(layout, mask=layout.mask[rows], sequence=layout.sequence[rows])
        return self._with(layout, rows)

    def sequences(self, first: int, last: int, rows: slice) -> LossTerms:
        """Only the sequences first:last of a packed layout, whose tokens are `rows`."""
        terms = self._with(self.layout.sequences(first, last, rows), rows)
        return replace(terms, given=self.advantages[first:last], num_generations=None)

    def _with(self, layout: Layout, rows: Tensor | slice) -> LossTerms:
        old_logps, ref_logps = pick(self.old_logps, rows), pick(self.ref_logps, rows)
        weights = self.weights[rows]
        return replace(
            self, layout=layout, weights=weights, old_logps=old_logps, ref_logps=ref_logps
        )

    def evaluate(self, logps: Tensor) -> Evaluated:
        """The loss and its gradient in the log-probs, (R,) detached; torch reference."""
        layout = self.layout
        logps = torch.where(layout.mask, logps.detach(), 0.0)
        if self.old_logps is None:
            log_ratio = torch.zeros_like(logps)
        else:
            log_ratio = logps - self.old_logps
        if self.by_sequence:
            lengths = layout.lengths.clamp(min=1)
            log_ratio = layout.per_token(layout.sequence_sum(log_ratio) / lengths)
        token = token_loss(
            logps,
            log_ratio,
            self.ref_logps,
            layout.per_token(self.advantages),
            beta=self.beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            capped=self.capped,
            kl=self.kl,
        )
        d_log_ratio = token.d_log_ratio * self.weights
        if self.by_sequence:
            # Each token's log-prob moves the ratio of all tokens of its sequence.
            d_log_ratio = layout.per_token(layout.sequence_sum(d_log_ratio) / lengths)
            d_log_ratio = torch.where(layout.mask, d_log_ratio, 0.0)
        return Evaluated(
            loss=(token.loss * self.weights).sum(),
            logps=logps,
            d_logps=d_log_ratio + token.d_logp * self.weights,
            kl=torch.where(layout.mask, token.kl, 0.0),
            clipped=(token.clipped_high.to(logps) - token.clipped_low.to(logps)) * layout.mask,
        )

    def clip_fractions(self, clipped: Tensor) -> tuple[Tensor, Tensor]:
        """From (R,) values -1, 0 or 1, the shares clipped below and above, 0-d."""
        below, above = clipped < 0, clipped > 0
        return self._fraction(below, clipped.dtype), self._fraction(above, clipped.dtype)

    def _fraction(self, clipped: Tensor, dtype: torch.dtype) -> Tensor:
        if self.by_sequence:  # every active token of a clipped sequence is clipped
            per_sequence = self.layout.sequence_sum(clipped.to(dtype))
            return (per_sequence > 0).to(dtype).sum() / max(self.layout.num_sequences, 1)
        return clipped.sum().to(dtype) / self.layout.lengths.sum().clamp(min=1)


class Evaluated(NamedTuple):
    """Loss, 0-d, and (R,) vectors; `d_logps`, its gradient, includes the tokens' weights."""

    loss: Tensor
    logps: Tensor
    d_logps: Tensor
    kl: Tensor
    clipped: Tensor


def evaluate_rows(
    logits: Tensor, ids: Tensor, inv_temp: float, terms: LossTerms
) -> tuple[Evaluated, Tensor, Tensor]:
    """The loss of logits and its gradient in the log-probs, plus the rows' norms and entropy.

    On the GPU, one launch; two launches and some vector arithmetic for sequence-level ratios.
    """
    triton_rows = triton_for(logits)
    if triton_rows is None or terms.by_sequence:
        logps, norms, entropy = rows_forward(logits, ids, inv_temp)
        return terms.evaluate(logps), norms, torch.where(terms.layout.mask, entropy, 0.0)
    out = triton_rows.grpo_forward(
        logits,
        ids,
        terms.layout.mask,
        terms.layout.sequence,
        terms.given,
        terms.weights,
        terms.old_logps,
        terms.ref_logps,
        inv_temp=inv_temp,
        num_generations=terms.num_generations,
        eps=ADVANTAGE_EPS,
        beta=terms.beta,
        epsilon_low=terms.epsilon_low,
        epsilon_high=terms.epsilon_high,
        delta=terms.delta,
        capped=terms.capped,
        kl=terms.kl,
    )
    evaluated = Evaluated(out.loss.sum(), out.logps, out.d_logps, out.kl, out.clipped)
    return evaluated, out.norms, out.entropy


class _GRPOFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, inv_temp, inplace, terms):
        evaluated, norms, entropy = evaluate_rows(logits, ids, inv_temp, terms)
        ctx.save_for_backward(logits, ids, norms, evaluated.d_logps)
        ctx.inv_temp, ctx.inplace = inv_temp, inplace
        rest = (evaluated.logps, entropy, evaluated.kl, evaluated.clipped)
        ctx.mark_non_differentiable(*rest)
        return (evaluated.loss, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        logits, ids, norms, d_logps = ctx.saved_tensors
        out = gradient_buffer(logits, ctx.inplace)
        rows_backward(logits, ids, norms, None, d_logps, None, ctx.inv_temp, out, grad_loss)
        return out, None, None, None, None


def make_terms(layout: Layout, dtype: torch.dtype, args: LossArgs) -> LossTerms:
    """Build the loss's terms from its arguments, checking them against the tokens."""
    if args.beta > 0 and args.ref_logps is None:
        raise ValueError(
            f"ref_logps: expected {layout.shape} log-probs of the reference model because "
            f"beta={args.beta}, got None; pass them, or beta=0"
        )
    return LossTerms(
        layout=layout,
        given=_rewards_or_advantages(layout, dtype, args),
        num_generations=args.num_generations if args.advantages is None else None,
        weights=_token_weights(layout, dtype, args),
        old_logps=_flat_logps("old_logps", args.old_logps, layout, dtype),
        ref_logps=_flat_logps("ref_logps", args.ref_logps, layout, dtype),
        beta=args.beta,
        epsilon_low=args.epsilon_low,
        epsilon_high=args.upper_epsilon,
        delta=args.delta,
        by_sequence=args.importance_sampling_level == "sequence" or args.loss_type == "gspo",
        capped=args.loss_type == "cispo",
        kl=args.kl,
    )


def _rewards_or_advantages(layout: Layout, dtype: torch.dtype, args: LossArgs) -> Tensor:
    """(N,), whichever was given."""
    rewards, advantages, num_generations = args.rewards, args.advantages, args.num_generations
    if rewards is not None and advantages is None:
        name, given = "rewards", rewards
    elif advantages is not None and rewards is None:
        name, given = "advantages", advantages
    else:
        got = "neither" if rewards is None else "both"
        raise ValueError(f"rewards, advantages: expected exactly one of them, got {got}")
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.shape != (layout.num_sequences,) or given.device != layout.mask.device:
        raise ValueError(
            f"{name}: expected ({layout.num_sequences},) on {layout.mask.device}, one a sequence, "
            f"got {tuple(given.shape)} on {given.device}"
        )
    given = given.detach().to(dtype).contiguous()
    if advantages is None:
        if num_generations is None:
            raise ValueError("num_generations: expected the group size with rewards, got None")
        check_rewards(given, num_generations)
    return given


def _token_weights(layout: Layout, dtype: torch.dtype, args: LossArgs) -> Tensor:
    """(R,) weight of each token's term in the loss; no denominator is 0."""
    loss_type, num_items = args.loss_type, args.num_items
    mask = layout.mask.to(dtype)
    num_sequences = max(layout.num_sequences, 1)
    if loss_type in ("grpo", "gspo"):
        lengths = layout.lengths.clamp(min=1).to(dtype)
        return mask / layout.per_token(lengths) / num_sequences
    if loss_type == "dr_grpo":
        max_completion_length = args.max_completion_length
        if max_completion_length is None and len(layout.shape) == 2:
            max_completion_length = max(layout.shape[1], 1)
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError(
                "max_completion_length: expected a length >= 1 for packed dr_grpo, got "
                f"{max_completion_length}; pass the generation limit"
            )
        return mask / (num_sequences * max_completion_length)
    if num_items is None:
        num_items = layout.lengths.sum()
    elif not isinstance(num_items, Tensor) and not 0 <= num_items < math.inf:
        raise ValueError(f"num_items: expected a count of tokens or None, got {num_items}")
    # A fraction is fine: it can be one rank's share of the count.
    if not isinstance(num_items, Tensor):
        return mask / (num_items if num_items > 0 else 1.0)
    count = num_items.to(mask)
    return mask / torch.where(count <= 0, 1.0, count)  # NaN stays NaN


def _flat_logps(
    name: str, logps: Tensor | None, layout: Layout, dtype: torch.dtype
) -> Tensor | None:
    """(R,) constants, 0 where masked."""
    if logps is None:
        return None
    if logps.shape != layout.shape or logps.device != layout.mask.device:
        raise ValueError(
            f"{name}: expected {tuple(layout.shape)} on {layout.mask.device} like completion_ids, "
            f"got {tuple(logps.shape)} on {logps.device}"
        )
    return torch.where(layout.mask, logps.detach().reshape(-1).to(dtype), 0.0)
