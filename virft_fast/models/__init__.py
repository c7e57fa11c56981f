"""Models: the Qwen-VL adapter, processors, and the embedded tiny model."""
