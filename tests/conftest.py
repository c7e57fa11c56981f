"""Fixtures that are costly to make, made once. Here at the top nothing imports torch: the process
that hands tests out would wait for it before it starts the ones that run them."""

from __future__ import annotations

import os
import signal

# Before torch is imported anywhere: the tests run side by side with their own child processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

# A machine that is busy is no fault of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

LONG = ["triton", "distributed", "families", "stages", "train", "crash_campaign", "dpo", "stopping"]


def pytest_collection_modifyitems(items):
    """Files with tests of half a minute first, so that none of them begins at the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture
def heard_signals():
    """Signals as they are without nohup, which ignores SIGHUP, and without a shell's &, which
    ignores SIGINT."""
    handlers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def processor():
    from virft_fast.models.processing import load_processor
    from virft_fast.models.tiny import resolve_model_path

    return load_processor(resolve_model_path("tiny"))


@pytest.fixture(scope="session")
def prompts(processor):
    """Four prompts: one image, two of different sizes, none, and one of another size."""
    from helpers import make_prompts, make_sample

    return make_prompts(
        processor,
        make_sample(0, [(112, 112)]),
        make_sample(1, [(56, 84), (112, 56)], "Which one is larger?"),
        make_sample(2, [], "Detect every blue. Think, then answer."),
        make_sample(3, [(84, 84)]),
    )


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small demo data set on disk."""
    from virft_fast.data.demo import build_demo

    path = tmp_path_factory.mktemp("data") / "digits"
    build_demo("digits_classification", path, num_train=24, num_test=8)
    return path


@pytest.fixture(scope="session")
def sam_path(tmp_path_factory):
    """A SAM of random weights for images of 64 pixels."""
    import torch
    from transformers import SamConfig, SamModel
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    shape = {"hidden_size": 16, "image_size": 64, "patch_size": 8}
    config = SamConfig(
        vision_config={
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
            "global_attn_indexes": [1], "window_size": 4, "mlp_dim": 64, "num_pos_feats": 8,
        },
        prompt_encoder_config=shape,
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(path)
    SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}
    ).save_pretrained(path)
    return path
