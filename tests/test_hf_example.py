"""examples/hf_prefix_attention.py: unmodified models of transformers with shared prompts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf

from virft_fast.kernels import PrefixLayout

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location(
    "hf_example", ROOT / "examples/hf_prefix_attention.py"
)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

RUNS = {
    "Qwen2": lambda: example.text_model("Qwen2"),
    "Llama": lambda: example.text_model("Llama"),
    "Qwen2.5-VL": example.vision_model,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_shared_prompts_equal_unshared_ones(run):
    torch.manual_seed(0)
    assert run() <= 1e-5


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_comparison_notices_completions_that_see_each_other(monkeypatch, run):
    layouts = []

    def attention(*row, scaling):
        given = row[3]
        merged = PrefixLayout.from_lengths(
            [group.prompt_length for group in given.groups],
            [[sum(group.lengths)] for group in given.groups],
        )
        layouts.append(given)
        return example_attention(*row[:3], merged, scaling=scaling)

    example_attention = example.prefix_attention
    monkeypatch.setattr(example, "prefix_attention", attention)
    torch.manual_seed(0)
    assert run() > 1e-2
    assert len(layouts) == 2  # layers


@pytest.mark.parametrize(
    ("rows", "options"),
    [(1, {}), (2, {"prefix_layout": 1}), (1, {"prefix_layout": 1, "dropout": 0.1})],
)
def test_what_it_can_not_compute_is_an_error(rows, options):
    states = torch.zeros(rows, 2, 4, 8)
    if "prefix_layout" in options:
        options = options | {"prefix_layout": PrefixLayout.from_lengths([4], [[]])}
    with pytest.raises(ValueError, match="expected one packed row, without dropout"):
        example.attend(None, states, states, states, None, scaling=1.0, **options)


def test_a_model_with_sliding_windows_is_refused():
    """It would attend to all of the row, without a word."""
    config = hf.MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = hf.MistralForCausalLM(config)
    model.set_attn_implementation(example.NAME)
    ids, layout = example.pack(example.random_ids(5), [example.random_ids(4, 2)])
    with pytest.raises(ValueError, match="expected attention without sliding_window"):
        model(ids, prefix_layout=layout, use_cache=False)
