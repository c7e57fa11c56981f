"""What the fused functions replace: whole logits, plain autograd; for `--loss_impl reference`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from virft_fast.kernels.grpo_loss import GRPOLoss, make_result, make_terms
from virft_fast.kernels.layout import make_layout
from virft_fast.kernels.logprobs import compute_dtype


def logps_reference(
    hidden: Tensor, weight: Tensor, index: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`linear_logps` with (..., V) logits and their log-softmax in memory."""
    dtype = compute_dtype(hidden, weight)
    log_p = ((hidden @ weight.T).to(dtype) / temperature).log_softmax(-1)
    logps = log_p.gather(-1, index[..., None])[..., 0]
    return logps, -(log_p.exp() * log_p).sum(-1)


def grpo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> GRPOLoss:
    """`linear_grpo_loss` by the same mathematics on autograd's log-probs."""
    layout = make_layout(completion_ids, completion_mask, cu_seqlens)
    defaults = {
        "rewards": None, "advantages": None, "num_generations": None, "old_logps": None,
        "ref_logps": None, "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": None, "delta": None,
        "loss_type": "grpo", "importance_sampling_level": "token", "kl": "k3",
        "max_completion_length": None, "num_items": None,
    }  # fmt: skip
    terms = make_terms(layout, dtype=compute_dtype(hidden, weight), **(defaults | options))
    logps, entropy = logps_reference(hidden, weight, completion_ids, temperature=temperature)
    logps = logps.reshape(-1).masked_fill(~layout.mask, 0.0)
    evaluated = terms.evaluate(logps)
    # The value of the loss, with its gradient in the log-probs.
    loss = evaluated.loss + ((logps - logps.detach()) * evaluated.d_logps).sum()
    entropy = entropy.detach().reshape(-1).masked_fill(~layout.mask, 0.0)
    return make_result(terms, loss, evaluated.logps, entropy, evaluated.kl, evaluated.clipped)
