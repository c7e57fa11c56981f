"""The kernels of a decoding step: the torch references here, the Triton kernels in a process."""

from decode_cases import *  # noqa: F403
