"""Loading and saving Qwen-VL models, their processors, and the embedded tiny model."""

from virft_fast import train_extra  # noqa: F401
