"""References for the fused functions, with all logits in memory and autograd's log-softmax.

`--loss_impl reference` uses them. Both implementations compute a token's loss with `token_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from virft_fast.kernels.grpo_loss import GRPOLoss, make_result, make_terms
from virft_fast.kernels.layout import make_layout
from virft_fast.kernels.logprobs import compute_dtype
from virft_fast.kernels.loss_args import LossArgs, takes_loss_args


def logps_reference(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`linear_logps`, with the (..., V) logits and their log-softmax held in memory."""
    dtype = compute_dtype(hidden, weight)
    logits = (hidden @ weight.T).to(dtype)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    log_p = (logits / temperature).log_softmax(-1)
    logps = log_p.gather(-1, index[..., None])[..., 0]
    return logps, -(log_p.exp() * log_p).sum(-1)


@takes_loss_args
def grpo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    **loss: Any,
) -> GRPOLoss:
    """`linear_grpo_loss`, with the same formulas applied to autograd's log-probs."""
    layout = make_layout(completion_ids, completion_mask, cu_seqlens)
    terms = make_terms(layout, compute_dtype(hidden, weight), LossArgs(**loss))
    # Masked hidden states and ids may hold anything.
    mask = layout.mask.view(layout.shape)
    hidden = torch.where(mask[..., None], hidden, 0.0)
    ids = completion_ids.masked_fill(~mask, 0)
    logps, entropy = logps_reference(
        hidden, weight, ids, bias=bias, softcap=softcap, temperature=temperature
    )
    logps = logps.reshape(-1).masked_fill(~layout.mask, 0.0)
    entropy = entropy.reshape(-1).masked_fill(~layout.mask, 0.0)
    evaluated = terms.evaluate(logps, entropy.detach())
    # The value of the loss, with its gradients in the log-probs and the entropy.
    value = evaluated.loss + ((logps - logps.detach()) * evaluated.d_logps).sum()
    if evaluated.d_entropy is not None:
        value = value + ((entropy - entropy.detach()) * evaluated.d_entropy).sum()
    rest = (evaluated.logps, entropy.detach(), evaluated.kl, evaluated.clipped)
    return make_result(terms, value, *rest)
