r"""A pytest plugin that puts this project's code into the test suites of other projects.

    PYTHONPATH=scripts pytest -p peer_suites --ours scipy \
        --pyargs scipy.optimize.tests.test_linear_assignment

Run it from the checkout. `--ours` takes trl, liger, scipy and transformers; docs/peer_suites.md has
a line for each. Their test files stay in their own repositories.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--ours", choices=sorted(PUT_IN), required=True, help="whose suite runs")


def pytest_configure(config):
    PUT_IN[config.getoption("--ours")]()


def linear_sum_assignment(cost_matrix, maximize=False):
    """scipy.optimize.linear_sum_assignment by `matching.assign`."""
    import numpy as np

    from virft_fast.matching import assign

    cost = np.asarray(cost_matrix)
    if cost.ndim != 2:
        raise ValueError(f"expected a matrix (2-D array), got a {cost.ndim}-D array")
    if cost.dtype.kind not in "biuf":
        raise TypeError(f"Cannot cast array data from {cost.dtype} to float64")
    try:
        matches = assign([cost.astype(np.float64)], maximize=bool(maximize))[0][0].numpy()
    except ValueError as error:
        raise ValueError("matrix contains invalid numeric entries") from error
    rows = np.flatnonzero(matches >= 0)
    if len(rows) < min(cost.shape):
        raise ValueError("cost matrix is infeasible")
    return rows, matches[rows]


class FusedLinearGRPOLoss(torch.nn.Module):
    """Liger's LigerFusedLinearGRPOLoss by `kernels.linear_grpo_loss`."""

    def __init__(
        self,
        beta=0.04,
        compiled=True,
        use_ref_model=True,
        chunk_size=1,
        loss_type="dapo",
        **options,
    ):
        super().__init__()
        self.options = options | {"beta": beta, "loss_type": loss_type}

    def forward(
        self, hidden, weight, ids, mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None,
        vllm_is_ratio=None, num_items_in_batch=None,
    ):  # fmt: skip
        from virft_fast.kernels import linear_grpo_loss, linear_logps

        beta, ref_logps = self.options["beta"], ref_per_token_logps
        if ref_logps is not None and ref_input is not None:
            warnings.warn("Using ref_per_token_logps, not ref_input", stacklevel=2)
        temperature = self.options.get("temperature", 1.0)
        if ref_logps is None and ref_input is not None and beta != 0:
            with torch.no_grad():
                ref_logps = linear_logps(
                    ref_input, ref_weight, ids, bias=ref_bias, temperature=temperature
                )[0]
        # Without any reference, Liger takes the policy itself: its KL and the gradient are 0.
        options = self.options | {"beta": beta if ref_logps is not None else 0.0}
        if vllm_is_ratio is not None and vllm_is_ratio.ndim == 1:
            vllm_is_ratio = vllm_is_ratio[:, None]
        out = linear_grpo_loss(
            hidden, weight, ids, mask, bias=bias, advantages=advantages, ref_logps=ref_logps,
            old_logps=old_per_token_logps, is_weights=vllm_is_ratio, num_items=num_items_in_batch,
            **options,
        )  # fmt: skip
        clipped = out.clip_fraction_low + out.clip_fraction_high
        kl = [out.kl.sum() / mask.sum().clamp(min=1)] if beta != 0 else []
        return out.loss, [*kl, clipped]


def put_into_liger():
    import liger_kernel.chunked_loss as liger
    from liger_kernel.chunked_loss import grpo_loss

    liger.LigerFusedLinearGRPOLoss = grpo_loss.LigerFusedLinearGRPOLoss = FusedLinearGRPOLoss


def put_into_scipy():
    import scipy.optimize

    scipy.optimize.linear_sum_assignment = linear_sum_assignment


def put_into_transformers():
    sys.path.insert(0, str(ROOT / "examples"))
    from detr_matcher import use_our_matcher

    use_our_matcher()


def put_into_trl():
    sys.path.insert(0, str(ROOT / "examples"))
    import trl
    from trl.trainer import grpo_trainer
    from trl_grpo import FusedGRPOTrainer

    trl.GRPOTrainer = grpo_trainer.GRPOTrainer = FusedGRPOTrainer


PUT_IN = {
    "liger": put_into_liger,
    "scipy": put_into_scipy,
    "transformers": put_into_transformers,
    "trl": put_into_trl,
}
