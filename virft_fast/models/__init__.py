"""Loading and saving Qwen-VL models, their processors, and the embedded tiny model."""
