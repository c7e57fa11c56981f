"""The GRPO loss family, from logits.

loss = sum over tokens of weight * (policy term + beta * KL term). The weights carry the reduction
of each loss type and depend on the masks alone, so the sum can be taken in any number of parts:
that is what `linear.py` builds on. Definitions: TRL 1.16's GRPOConfig, to which
tests/test_trl_parity.py compares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from virft_fast.kernels.advantages import group_advantages
from virft_fast.kernels.layout import Layout, make_layout
from virft_fast.kernels.logprobs import check_rows, compute_dtype, logps_and_entropy

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
LEVELS = ("token", "sequence")
KL_KINDS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class GRPOLoss:
    """What the loss functions return. Only `loss` is differentiable.

    Attributes:
        loss: 0-d.
        logps, entropy: (N, T), or (S,) packed; 0 where masked.
        kl: same shape; the estimate against `ref_logps`, 0 without one and where masked.
        clip_fraction_low, clip_fraction_high: 0-d; share of the active tokens (of the sequences,
            with ratios of sequences) whose ratio is clipped: below with a negative, above with a
            positive advantage. cispo clips above only.
    float32, or float64 for float64 inputs.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    num_generations: int | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    kl: str = "k3",
    temperature: float = 1.0,
    max_completion_length: int | None = None,
    num_items: int | float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> GRPOLoss:
    """Policy-gradient loss of N sampled completions.

    Args:
        logits: (N, T, V) floating point, at the positions that predict `completion_ids`.
        completion_ids: (N, T) int64.
        completion_mask: (N, T) bool. Where false, logits, ids, old and reference log-probs may hold
            anything, NaN included; they give and get nothing.
        rewards: (N,) prompt-major, normalised here by `group_advantages` in groups of
            `num_generations`; or
        advantages: (N,), taken as they are. Exactly one of the two.
        num_generations: G; needed with `rewards`.
        old_logps: same shape as the ids; log-probs before this step's updates. None: the ratio is 1
            and the gradient flows (on-policy).
        ref_logps: same shape; log-probs under the reference model. Needed when beta > 0; with
            beta == 0 it is only measured.
        beta: >= 0, weight of the KL term.
        epsilon_low, epsilon_high: the ratio is kept in [1 - low, 1 + high]; high None is low. For
            cispo the ratio is capped at `epsilon_high` itself, as TRL does: 5.0 is usual there.
        delta: upper bound of the unclipped ratio (two-sided clipping), or None.
        loss_type: the reduction: "grpo" mean of the sequences' means; "dr_grpo" sum over
            N * max_completion_length; "bnpo" and "dapo" sum over `num_items`; "cispo" as dapo, with
            the stop-gradient of the capped ratio times the log-prob; "gspo" is grpo with ratios of
            sequences.
        importance_sampling_level: ratio of each "token", or of the "sequence": the exponential of
            its mean log-ratio.
        kl: with d = ref_logps - logps: "k1" -d (its expected gradient is 0: for measuring only),
            "k2" d^2/2, "k3" exp(d) - d - 1.
        temperature: > 0, divides the logits.
        max_completion_length: of dr_grpo; None: T. Needed when packed.
        num_items: denominator of bnpo, dapo and cispo; 0-d tensors stay on their device. None: the
            active tokens of this call. Pass the count of all microbatches (over the ranks: count /
            world size, if gradients are averaged) to make accumulation equal one big batch.
        cu_seqlens: packed layout: (N+1,) int32 offsets, with logits (S, V), ids, old and reference
            log-probs (S,); `completion_mask` may then be None.
    Returns:
        GRPOLoss. With no active token the loss is a finite 0 with a zero gradient.
    Raises:
        ValueError: shapes, dtypes, devices, names or numbers; says what was expected and what came.
    Log-ratios beyond +20 continue exp linearly, so that nothing overflows. Differentiable once, in
    `logits`. Sources: GRPO arXiv:2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, GSPO 2507.18071,
    CISPO (MiniMax-M1) 2506.13585, two-sided clipping (INTELLECT-2) 2505.07291, KL estimators:
    Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    layout = make_layout(completion_ids, completion_mask, cu_seqlens)
    check_rows(logits, completion_ids, temperature)
    # (R, V) and (R,); the rows that do not count become harmless, and their gradient exactly 0.
    rows = logits.flatten(0, -2).masked_fill(~layout.mask[:, None], 0.0)
    index = completion_ids.reshape(-1).masked_fill(~layout.mask, 0)
    terms = make_terms(
        layout,
        dtype=compute_dtype(logits),
        rewards=rewards,
        advantages=advantages,
        num_generations=num_generations,
        old_logps=old_logps,
        ref_logps=ref_logps,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        kl=kl,
        max_completion_length=max_completion_length,
        num_items=num_items,
    )
    logps, entropy = logps_and_entropy(rows, index, temperature=temperature)
    return terms.result(terms.loss(logps), logps, entropy)


@dataclass(frozen=True)
class LossTerms:
    """All that the loss needs beside the log-probs; every vector flat over R tokens.

    Attributes:
        advantages, weights: (R,); a weight is 0 where masked.
        old_logps, ref_logps: (R,), 0 where masked, or None.
        by_sequence: ratios of sequences; the loss then needs all tokens of a sequence at once.
        capped: cispo's policy term.
    """

    layout: Layout
    advantages: Tensor
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

    def loss(self, logps: Tensor, rows: slice = slice(None)) -> Tensor:
        """0-d share of the tokens `rows` in the loss; `logps` holds those tokens alone."""
        logps = torch.where(self.layout.mask[rows], logps, 0.0)
        per_token = self._policy_term(logps, rows)
        if self.beta > 0:
            per_token = per_token + self.beta * self._kl_term(logps, rows)
        return (per_token * self.weights[rows]).sum()

    @torch.no_grad()
    def result(self, loss: Tensor, logps: Tensor, entropy: Tensor) -> GRPOLoss:
        """Attach the detached statistics to the loss; `logps` and `entropy` are (R,)."""
        mask, shape = self.layout.mask, self.layout.shape
        logps = torch.where(mask, logps.detach(), 0.0)
        kl = torch.zeros_like(logps) if self.ref_logps is None else self._kl_term(logps)
        low, high = self._clip_fractions(logps)
        return GRPOLoss(
            loss=loss,
            logps=logps.view(shape),
            entropy=torch.where(mask, entropy.detach(), 0.0).view(shape),
            kl=kl.view(shape),
            clip_fraction_low=low,
            clip_fraction_high=high,
        )

    def _log_ratio(self, logps: Tensor, rows: slice) -> Tensor:
        old = logps.detach() if self.old_logps is None else self.old_logps[rows]
        log_ratio = logps - old
        if not self.by_sequence:
            return log_ratio
        mean = self.layout.sequence_sum(log_ratio) / self.layout.lengths.clamp(min=1)
        return self.layout.per_token(mean)

    def _policy_term(self, logps: Tensor, rows: slice) -> Tensor:
        ratio = _exp(self._log_ratio(logps, rows))
        advantages = self.advantages[rows]
        if self.capped:
            return -ratio.clamp(max=self.epsilon_high).detach() * advantages * logps
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        if self.delta is not None:
            ratio = ratio.clamp(max=self.delta)
        return -torch.minimum(ratio * advantages, clipped * advantages)

    def _kl_term(self, logps: Tensor, rows: slice = slice(None)) -> Tensor:
        d = self.ref_logps[rows] - logps
        if self.kl == "k1":
            return -d
        if self.kl == "k2":
            return 0.5 * d.square()
        return _exp(d) - d - 1

    def _clip_fractions(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        ratio = _exp(self._log_ratio(logps, slice(None)))
        if self.capped:
            low = torch.zeros_like(self.layout.mask)
            high = (ratio > self.epsilon_high) & (self.advantages > 0)
        else:
            if self.delta is not None:
                ratio = ratio.clamp(max=self.delta)
            low = (ratio < 1 - self.epsilon_low) & (self.advantages < 0)
            high = (ratio > 1 + self.epsilon_high) & (self.advantages > 0)
        return self._fraction(low, logps.dtype), self._fraction(high, logps.dtype)

    def _fraction(self, clipped: Tensor, dtype: torch.dtype) -> Tensor:
        per_sequence = self.layout.sequence_sum((clipped & self.layout.mask).to(dtype))
        if self.by_sequence:  # every active token of a clipped sequence is clipped
            return (per_sequence > 0).to(dtype).sum() / max(self.layout.num_sequences, 1)
        return per_sequence.sum() / self.layout.lengths.sum().clamp(min=1)


def make_terms(
    layout: Layout,
    *,
    dtype: torch.dtype,
    rewards: Tensor | None,
    advantages: Tensor | None,
    num_generations: int | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    beta: float,
    epsilon_low: float,
    epsilon_high: float | None,
    delta: float | None,
    loss_type: str,
    importance_sampling_level: str,
    kl: str,
    max_completion_length: int | None,
    num_items: int | float | Tensor | None,
) -> LossTerms:
    """Check the options of `grpo_loss`, in its words, and turn them into LossTerms."""
    _check_choice("loss_type", loss_type, LOSS_TYPES)
    _check_choice("importance_sampling_level", importance_sampling_level, LEVELS)
    _check_choice("kl", kl, KL_KINDS)
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    numbers = {"beta": beta, "epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta: expected a number > 0 or None, got {delta}")
    if beta > 0 and ref_logps is None:
        raise ValueError(
            f"ref_logps: expected {layout.shape} log-probs of the reference model because "
            f"beta={beta}, got None; pass them, or beta=0"
        )
    per_sequence = _advantages(layout, dtype, rewards, advantages, num_generations)
    return LossTerms(
        layout=layout,
        advantages=layout.per_token(per_sequence),
        weights=_token_weights(layout, dtype, loss_type, max_completion_length, num_items),
        old_logps=_flat_logps("old_logps", old_logps, layout, dtype),
        ref_logps=_flat_logps("ref_logps", ref_logps, layout, dtype),
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        by_sequence=importance_sampling_level == "sequence" or loss_type == "gspo",
        capped=loss_type == "cispo",
        kl=kl,
    )


def _advantages(
    layout: Layout,
    dtype: torch.dtype,
    rewards: Tensor | None,
    advantages: Tensor | None,
    num_generations: int | None,
) -> Tensor:
    """(N,) advantages, whichever way they were given."""
    if (rewards is None) == (advantages is None):
        got = "neither" if rewards is None else "both"
        raise ValueError(f"rewards, advantages: expected exactly one of them, got {got}")
    name, given = ("rewards", rewards) if advantages is None else ("advantages", advantages)
    if given.shape != (layout.num_sequences,) or given.device != layout.mask.device:
        raise ValueError(
            f"{name}: expected ({layout.num_sequences},) on {layout.mask.device}, one a sequence, "
            f"got {tuple(given.shape)} on {given.device}"
        )
    if advantages is not None:
        return advantages.detach().to(dtype)
    if num_generations is None:
        raise ValueError("num_generations: expected the group size with rewards, got None")
    return group_advantages(rewards.to(dtype), num_generations)


def _token_weights(
    layout: Layout,
    dtype: torch.dtype,
    loss_type: str,
    max_completion_length: int | None,
    num_items: int | float | Tensor | None,
) -> Tensor:
    """(R,) weight of each token's term in the loss; denominators are at least 1."""
    mask = layout.mask.to(dtype)
    num_sequences = max(layout.num_sequences, 1)
    if loss_type in ("grpo", "gspo"):
        lengths = layout.lengths.clamp(min=1).to(dtype)
        return mask / layout.per_token(lengths) / num_sequences
    if loss_type == "dr_grpo":
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
    return mask / torch.as_tensor(num_items, dtype=dtype, device=mask.device).clamp(min=1)


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


def _exp(x: Tensor) -> Tensor:
    """exp, continued by its tangent beyond 20: finite, and the gradient keeps size and sign."""
    bounded = x.clamp(max=20.0)
    return bounded.exp() * (1 + (x - bounded))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
