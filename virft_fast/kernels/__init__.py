"""The numeric core of GRPO: log-probs, advantages and the loss, on plain tensors.

CUDA tensors go to Triton kernels, CPU tensors to a torch reference. Both compute in float32;
float64 inputs always use the reference, in float64. Under TRITON_INTERPRET=1, the kernels run on
CPU tensors.
"""

from virft_fast.kernels.advantages import group_advantages, normalize_then_sum
from virft_fast.kernels.grpo_loss import GRPOLoss, grpo_loss
from virft_fast.kernels.linear import linear_grpo_loss, linear_logps
from virft_fast.kernels.logprobs import logps_and_entropy, selective_log_softmax
from virft_fast.kernels.loss_args import LossArgs
from virft_fast.kernels.prefix_attention import PrefixLayout, prefix_attention

__all__ = ["GRPOLoss", "LossArgs", "PrefixLayout", "group_advantages", "grpo_loss",
           "linear_grpo_loss", "linear_logps", "logps_and_entropy", "normalize_then_sum",
           "prefix_attention", "selective_log_softmax"]  # fmt: skip
