"""Loading and saving Qwen-VL models, their processors, and the embedded tiny model."""

from importlib.util import find_spec

if find_spec("transformers") is None:  # it, Pillow and safetensors are enough for a policy
    from virft_fast import train_extra  # noqa: F401
