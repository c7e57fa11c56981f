"""The GRPO loss family, computed from logits.

loss = sum over tokens of weight * (policy term + beta * KL term). The weights implement each loss
type's reduction and depend only on the masks, so `linear.py` can add up the loss over chunks of
tokens. Definitions follow TRL 1.16's GRPOConfig; tests/test_trl_parity.py checks against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from virft_fast.kernels.loss_args import LossArgs, check_tensors, takes_loss_args
from virft_fast.kernels.token_loss import by_sign, token_loss

Number = float | Tensor  # a tensor is 0-d and stays on its device
LOG_WEIGHTS = (math.log(1e-8), 20.0)  # vespo's bounds, as in TRL 1.16


@dataclass(frozen=True)
class GRPOLoss:
    """The result of the loss functions. Only `loss` is differentiable.

    Attributes:
        loss: 0-d.
        logps, entropy: (N, T), or (S,) packed; 0 where masked.
        kl: same shape; KL estimate against `ref_logps`, 0 without them and where masked; with
            `use_bias_correction_kl`, times the ratio.
        clip_fraction_low, clip_fraction_high: 0-d; share of the active tokens (or sequences, with
            sequence-level ratios) whose ratio is clipped: below with a negative advantage, above
            with a positive one. cispo clips only above, sapo and vespo never.
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
        logits: (N, T, V) floating point, at the positions that predict `completion_ids`; or (N, T +
            1, V) as models return them, where the last position is ignored and gets no gradient.
            Slicing it off instead costs a copy of the gradient.
        completion_ids: (N, T) int64.
        completion_mask: (N, T) bool, or 0/1 numbers. Where false, logits, ids, old and reference
            log-probs are ignored, even NaN, and get no gradient.
        rewards: (N,) prompt-major, normalized here by `group_advantages`, with its defaults, in
            groups of `num_generations`; or
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
            grpo, with sequence-level ratios; "sapo": like grpo, with a sigmoid of the ratio instead
            of clipping; "luspo": mean of the sequences' sums, meant for sequence-level ratios;
            "vespo": like dapo, but the term is a constant times the log-prob: the gamma weight of
            the sequence's summed log-ratio.
        importance_sampling_level: "token": one ratio per token; "sequence": one per sequence, the
            exponential of its mean log-ratio.
        kl: with d = ref_logps - logps: "k1" -d (its expected gradient is 0: for measuring only),
            "k2" d^2/2, "k3" exp(d) - d - 1.
        temperature: above 0; divides the logits.
        max_completion_length: for dr_grpo; None: T. Required when packed.
        num_items: denominator of bnpo, dapo, cispo and vespo, >= 0; 0 means there are no tokens. A
            0-d tensor stays on its device. None: the active tokens of this call. To make
            accumulation equal one big batch, pass the count over all microbatches (across ranks
            that average gradients: count / world size).
        use_bias_correction_kl: multiply the KL term by the ratio, before `delta` bounds it.
        is_weights: importance weights of another sampler: same shape as the ids, or (N, 1) for
            whole sequences. They multiply the policy term, not the KL; vespo adds their logarithms
            to the sequence's log-ratio.
        sapo_temperature_neg, sapo_temperature_pos: above 0; of the sigmoid, by the advantage's
            sign.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape and rate of the gamma
            weight, by the advantage's sign.
        off_policy_mask_threshold: leave the policy term out of sequences with a negative advantage
            whose mean of `sampling_logps` - log-probs is above it. None: leave out none.
        sampling_logps: same shape as the ids; log-probs as the sampler reported them, for that
            mask and the next argument; NaN counts as no difference. None: `old_logps`.
        importance_sampling_mode: multiply the policy term by exp(log-probs - `sampling_logps`), a
            constant: the trained policy's probability over the sampler's, where the two differ in
            engine, precision or filters. The log-probs are `old_logps`, or without them those of
            this call. "token_truncate", "token_mask": one weight for each token; "sequence_...":
            the product of a sequence's. Truncated to the two limits below, or 0 outside them.
            None: no weight. vespo takes a token's only.
        importance_sampling_clip_max, importance_sampling_clip_min: limits of that weight, or None.
        top_entropy_quantile: keep the policy term and the bonus of this share of the call's tokens,
            those of the highest entropy. 1: all.
        entropy_threshold: keep those of tokens with at least this entropy in nats instead; a number
            or a 0-d tensor. It makes accumulation equal one big batch, and needs one pass less.
        entropy_coef: subtract this times the mean entropy of the tokens kept.
        num_entropy_items: denominator of that mean, as `num_items`; None: this call's tokens.
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
    2507.18071, CISPO (MiniMax-M1) 2506.13585, SAPO 2511.20347, LUSPO 2602.05261, VESPO 2602.10693,
    two-sided clipping (INTELLECT-2) 2505.07291, KL correction and off-policy mask (DeepSeek-V3.2)
    2512.02556, entropy quantile 2506.01939, KL estimators: Schulman 2020,
    joschu.net/blog/kl-approx.html.
    """
    check_tensors(logits=logits)
    layout = make_layout(completion_ids, completion_mask, cu_seqlens)
    check_rows(_predicting(logits, layout), completion_ids, temperature)
    ids = completion_ids.reshape(-1).masked_fill(~layout.mask, 0)
    check_ids("completion_ids", ids, logits.shape[-1])
    terms = make_terms(layout, compute_dtype(logits), LossArgs(**loss))
    values = _GRPOFromLogits.apply(logits, ids, 1 / temperature, inplace, terms)
    return make_result(terms, *values[:5])


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
        old_logps, ref_logps, sampling_logps: (R,), 0 where masked, or None.
        factor: (R,) `is_weights`; vespo's share of its sequence's log-weight. 0 where masked.
        bonus: divisor of the entropy bonus; None: the tokens selected in this call.
        args: read for names and numbers only.
    """

    layout: Layout
    given: Tensor
    num_generations: int | None
    weights: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    sampling_logps: Tensor | None
    factor: Tensor | None
    bonus: Number | None
    args: LossArgs

    @property
    def may_drop(self) -> bool:
        """Whether tokens with an advantage can be left without a gradient."""
        args = self.args
        clips = args.loss_type not in ("cispo", "sapo", "vespo")
        clips &= self.old_logps is not None or args.delta is not None
        masks = args.selects or args.off_policy_mask_threshold is not None
        masks |= args.importance_sampling_mode is not None
        return args.beta == 0 and (clips or masks or self.factor is not None)

    @property
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
        names = ("weights", "old_logps", "ref_logps", "sampling_logps", "factor")
        picked: dict[str, Any] = {name: pick(getattr(self, name), rows) for name in names}
        return replace(self, layout=layout, **picked)

    def evaluate(self, logps: Tensor, entropy: Tensor) -> Evaluated:
        """The loss and its gradients in (R,) detached log-probs and entropies; torch reference."""
        layout, args = self.layout, self.args
        logps = torch.where(layout.mask, logps.detach(), 0.0)
        if self.old_logps is None:
            log_ratio = torch.zeros_like(logps)
        else:
            log_ratio = logps - self.old_logps
        factor = self._factor(logps)
        phi = self._vespo_phi(log_ratio, factor) if args.loss_type == "vespo" else None
        if args.by_sequence:
            lengths = layout.lengths.clamp(min=1)
            log_ratio = layout.per_token(layout.sequence_sum(log_ratio) / lengths)
        selected = self._selected(entropy)
        token = token_loss(
            logps,
            log_ratio,
            self.ref_logps,
            layout.per_token(self.advantages),
            args,
            weight=self._policy_weight(logps, selected, factor),
            phi=phi,
        )
        d_log_ratio = token.d_log_ratio * self.weights
        if args.by_sequence:
            # Each token's log-prob moves the ratio of all tokens of its sequence.
            d_log_ratio = layout.per_token(layout.sequence_sum(d_log_ratio) / lengths)
            d_log_ratio = torch.where(layout.mask, d_log_ratio, 0.0)
        evaluated = Evaluated(
            loss=(token.loss * self.weights).sum(),
            logps=logps,
            d_logps=d_log_ratio + token.d_logp * self.weights,
            kl=torch.where(layout.mask, token.kl, 0.0),
            clipped=(token.clipped_high.to(logps) - token.clipped_low.to(logps)) * layout.mask,
        )
        return self.with_bonus(evaluated, entropy, selected)

    def with_bonus(self, evaluated: Evaluated, entropy: Tensor, selected: Tensor) -> Evaluated:
        """Subtract the mean entropy of the `selected` tokens, (R,) bool, times its coefficient."""
        if self.args.entropy_coef == 0:
            return evaluated
        share = selected.to(entropy)
        divisor = share.sum().clamp(min=1) if self.bonus is None else self.bonus
        d_entropy = share * -self.args.entropy_coef / divisor
        bonus = torch.where(selected, entropy.detach() * d_entropy, 0.0).sum()
        return evaluated._replace(loss=evaluated.loss + bonus, d_entropy=d_entropy)

    def _selected(self, entropy: Tensor) -> Tensor:
        """(R,) bool, the tokens of the policy term and the entropy bonus."""
        mask, top = self.layout.mask, self.args.top_entropy_quantile
        threshold = self.args.entropy_threshold
        if not self.args.selects or not len(mask):
            return mask
        if threshold is None:  # as torch.quantile(entropy[mask], 1 - top), without its wait
            sorted_ = torch.where(mask, entropy, math.inf).sort().values
            last = (mask.sum() - 1).clamp(min=0)
            rank = last * torch.full_like(entropy[0], 1 - top)
            below = rank.floor().long()
            bounds = sorted_[torch.stack([below, torch.minimum(below + 1, last)])]
            threshold = bounds[0].lerp(bounds[1], rank - below)
        return mask & (entropy >= threshold)

    def _factor(self, logps: Tensor) -> Tensor | None:
        """(R,) `factor`, or the weights of `importance_sampling_mode` in its place."""
        args, layout = self.args, self.layout
        if args.importance_sampling_mode is None or self.sampling_logps is None:
            return self.factor
        level, action = args.importance_sampling_mode.split("_")
        low, high = args.importance_sampling_clip_min, args.importance_sampling_clip_max
        low, high = 0.0 if low is None else low, math.inf if high is None else high
        trained = logps if self.old_logps is None else self.old_logps
        weight = (trained - self.sampling_logps).nan_to_num(nan=0.0)
        if level == "sequence":
            weight = layout.per_token(layout.sequence_sum(weight))
        weight = weight.exp()
        if action == "truncate":
            weight = weight.clamp(low, high)
        else:
            weight = weight.masked_fill((weight < low) | (weight > high), 0.0)
        if args.loss_type == "vespo":
            weight = weight.log().clamp(*LOG_WEIGHTS)
        return torch.where(layout.mask, weight, 0.0)

    def _policy_weight(
        self, logps: Tensor, selected: Tensor, factor: Tensor | None
    ) -> Tensor | None:
        """(R,) weight of the policy term, or None."""
        args, layout = self.args, self.layout
        weight = None if args.loss_type == "vespo" else factor
        if args.selects:
            weight = selected.to(logps) if weight is None else weight * selected
        sampled = self.old_logps if self.sampling_logps is None else self.sampling_logps
        if args.off_policy_mask_threshold is not None and sampled is not None:
            drift = layout.sequence_sum((sampled - logps).nan_to_num(nan=0.0))
            drift = drift / layout.lengths.clamp(min=1)
            keep = (self.advantages >= 0) | (drift <= args.off_policy_mask_threshold)
            keep = layout.per_token(keep.to(logps))
            weight = keep if weight is None else weight * keep
        return weight

    def _vespo_phi(self, log_ratio: Tensor, factor: Tensor | None) -> Tensor:
        """(R,) exp(lambda) w^k exp(-lambda w) of the sequence's weight w."""
        args, layout = self.args, self.layout
        log_w = layout.sequence_sum(log_ratio.clamp(-LOG_WEIGHTS[1], LOG_WEIGHTS[1]))
        if factor is not None:
            log_w = log_w + layout.sequence_sum(factor)
        log_w = log_w.clamp(*LOG_WEIGHTS)
        positive = self.advantages >= 0
        k = by_sign(positive, args.vespo_k_pos, args.vespo_k_neg, log_w)
        rate = by_sign(positive, args.vespo_lambda_pos, args.vespo_lambda_neg, log_w)
        rate = rate.clamp(min=1e-4)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
        return layout.per_token(phi.nan_to_num(nan=0.0))

    def clip_fractions(self, clipped: Tensor) -> tuple[Tensor, Tensor]:
        """From (R,) values -1, 0 or 1, the shares clipped below and above, 0-d."""
        below, above = clipped < 0, clipped > 0
        return self._fraction(below, clipped.dtype), self._fraction(above, clipped.dtype)

    def _fraction(self, clipped: Tensor, dtype: torch.dtype) -> Tensor:
        if self.args.by_sequence:  # every active token of a clipped sequence is clipped
            per_sequence = self.layout.sequence_sum(clipped.to(dtype))
            return (per_sequence > 0).to(dtype).sum() / max(self.layout.num_sequences, 1)
        return clipped.sum().to(dtype) / self.layout.lengths.sum().clamp(min=1)


class Evaluated(NamedTuple):
    """Loss, 0-d, and (R,) vectors; `d_logps` and `d_entropy`, its gradients, include the tokens'
    weights. `d_entropy` is None without an entropy bonus."""

    loss: Tensor
    logps: Tensor
    d_logps: Tensor
    kl: Tensor
    clipped: Tensor
    d_entropy: Tensor | None = None


def evaluate_rows(
    logits: Tensor, ids: Tensor, inv_temp: float, terms: LossTerms
) -> tuple[Evaluated, Tensor, Tensor]:
    """The loss of logits and its gradient in the log-probs, plus the rows' norms and entropy.

    On the GPU, one launch; two launches and some vector arithmetic where a token's loss depends on
    other tokens.
    """
    triton_rows, mask = triton_for(logits), terms.layout.mask
    if torch.compiler.is_compiling():  # which fuses the arithmetic, but doesn't look into kernels
        triton_rows = None
    if triton_rows is None or terms.args.scope != "token" or terms.args.selects:
        logps, norms, entropy = rows_forward(logits, ids, inv_temp)
        entropy = torch.where(mask, entropy, 0.0)
        return terms.evaluate(logps, entropy), norms, entropy
    out = triton_rows.grpo_forward(
        logits,
        ids,
        mask,
        terms.layout.sequence,
        terms.given,
        terms.weights,
        terms.old_logps,
        terms.ref_logps,
        terms.factor,
        terms.args,
        inv_temp=inv_temp,
        num_generations=terms.num_generations,
        eps=ADVANTAGE_EPS,
    )
    evaluated = Evaluated(out.loss.sum(), out.logps, out.d_logps, out.kl, out.clipped)
    return terms.with_bonus(evaluated, out.entropy, mask), out.norms, out.entropy


def _predicting(logits: Tensor, layout: Layout) -> Tensor:
    """The logits without a last position that predicts nothing."""
    longer = logits.ndim == 3 and logits.shape[:2] == (layout.shape[0], layout.shape[-1] + 1)
    return logits[:, :-1] if longer and len(layout.shape) == 2 else logits


class _GRPOFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(logits, ids, inv_temp, inplace, terms):
        rows = _predicting(logits, terms.layout)
        evaluated, norms, entropy = evaluate_rows(rows, ids, inv_temp, terms)
        rest = (evaluated.logps, entropy, evaluated.kl, evaluated.clipped)
        gradient = (norms, evaluated.d_logps, evaluated.d_entropy)
        return (evaluated.loss, *rest, *(x for x in gradient if x is not None))

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, ids, ctx.inv_temp, ctx.inplace, terms = inputs
        _, _, entropy, _, _, *saved = output
        ctx.save_for_backward(logits, ids, entropy, *saved)
        ctx.mark_non_differentiable(*output[1:])
        ctx.layout = terms.layout

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        logits, ids, entropy, norms, d_logps, *d_entropy = ctx.saved_tensors
        out = gradient_buffer(logits, ctx.inplace)
        rows, out_rows = _predicting(logits, ctx.layout), _predicting(out, ctx.layout)
        gradient = d_logps, d_entropy[0] if d_entropy else None
        rows_backward(rows, ids, norms, entropy, *gradient, ctx.inv_temp, out_rows, grad_loss)
        if out_rows is not out:
            out[:, -1] = 0
        return out, None, None, None, None


def make_terms(layout: Layout, dtype: torch.dtype, args: LossArgs) -> LossTerms:
    """Build the loss's terms from its arguments, checking them against the tokens."""
    if args.beta > 0 and args.ref_logps is None:
        raise ValueError(
            f"ref_logps: expected {layout.shape} log-probs of the reference model because "
            f"beta={args.beta}, got None; pass them, or beta=0"
        )
    logps = {
        name: _flat_logps(name, getattr(args, name), layout, dtype)
        for name in ("old_logps", "ref_logps", "sampling_logps")
    }
    if args.importance_sampling_mode is not None and args.sampling_logps is None:
        raise ValueError(
            f"sampling_logps: expected {layout.shape} log-probs of the sampler because of "
            f"importance_sampling_mode={args.importance_sampling_mode!r}, got None"
        )
    count, bonus = args.num_entropy_items, None
    if args.entropy_coef != 0 and not (count is None and args.selects):
        bonus = _divisor("num_entropy_items", count, layout, dtype)
    return LossTerms(
        layout=layout,
        given=_rewards_or_advantages(layout, dtype, args),
        num_generations=args.num_generations if args.advantages is None else None,
        weights=_token_weights(layout, dtype, args),
        **logps,
        factor=_flat_is_weights(layout, dtype, args),
        bonus=bonus,
        args=args,
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
    loss_type = args.loss_type
    mask = layout.mask.to(dtype)
    num_sequences = max(layout.num_sequences, 1)
    if loss_type in ("grpo", "gspo", "sapo"):
        lengths = layout.lengths.clamp(min=1).to(dtype)
        return mask / layout.per_token(lengths) / num_sequences
    if loss_type == "luspo":
        return mask / num_sequences
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
    return mask / _divisor("num_items", args.num_items, layout, dtype)


def _divisor(name: str, count: Number | None, layout: Layout, dtype: torch.dtype) -> Number:
    """A count of tokens, by default those of this call, or 1 if it is 0."""
    if count is None:
        count = layout.lengths.sum()
    # A fraction is fine: it can be one rank's share of the count.
    if not isinstance(count, Tensor):
        if not 0 <= count < math.inf:
            raise ValueError(f"{name}: expected a count of tokens or None, got {count}")
        return count if count > 0 else 1.0
    count = count.to(layout.mask.device, dtype)
    return torch.where(count <= 0, 1.0, count)  # NaN stays NaN


def _flat_is_weights(layout: Layout, dtype: torch.dtype, args: LossArgs) -> Tensor | None:
    """(R,) constants, 0 where masked. vespo adds them as logarithms: a token's own, or an equal
    part of its sequence's."""
    if args.is_weights is None:
        return None
    weights, by_sequence = args.is_weights.detach().to(dtype), (layout.num_sequences, 1)
    given = weights.shape
    if given not in (layout.shape, by_sequence) or weights.device != layout.mask.device:
        raise ValueError(
            f"is_weights: expected {tuple(layout.shape)}, one a token, or {by_sequence}, one a "
            f"sequence, on {layout.mask.device}, got {tuple(given)} on {weights.device}"
        )
    spread = given != layout.shape
    weights = layout.per_token(weights[:, 0]) if spread else weights.reshape(-1)
    if args.loss_type == "vespo":
        weights = weights.log().clamp(*LOG_WEIGHTS)
        if spread:
            weights = weights / layout.per_token(layout.lengths.clamp(min=1).to(dtype))
    return torch.where(layout.mask, weights, 0.0)


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
