"""DeepSpeed files with HF's "auto" values, and what is refused in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from virft_fast import engine
from virft_fast.engine import (
    OptimizerSettings,
    engine_dtype,
    load_deepspeed_config,
    resolve_deepspeed_config,
    zero_stage,
)
from virft_fast.optimizer import decay_groups, make_optimizer

CONFIGS = Path(__file__).parent.parent / "configs"


def resolve(config, *, bf16=True):
    return resolve_deepspeed_config(
        config,
        settings=OptimizerSettings(learning_rate=1e-6, max_grad_norm=0.5),
        micro_batch_size=2,
        gradient_accumulation_steps=3,
        bf16=bf16,
        hidden_size=10,
        world_size=4,
    )


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_shipped_files_resolve_without_an_auto(name):
    given = load_deepspeed_config(str(CONFIGS / f"{name}.json"))
    config, _ = resolve(given)
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is True and engine_dtype(config) == torch.bfloat16
    assert zero_stage(config) == int(name[4])
    assert "auto" in json.dumps(given)  # the caller's own copy is left alone


def test_hidden_size_fills_the_buckets():
    zero = resolve(load_deepspeed_config(str(CONFIGS / "zero3.json")))[0]["zero_optimization"]
    assert zero["reduce_bucket_size"] == 100
    assert zero["stage3_prefetch_bucket_size"] == 90
    assert zero["stage3_param_persistence_threshold"] == 100


def test_optimizer_block_sets_adamw_and_is_taken_out():
    params = {"lr": 2e-5, "betas": [0.8, 0.9], "eps": "auto", "weight_decay": 0.1}
    config, settings = resolve({"optimizer": {"type": "AdamW", "params": params}})
    assert "optimizer" not in config
    assert settings == OptimizerSettings(2e-5, (0.8, 0.9), 1e-8, 0.1, 0.5)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"optimizer": {"type": "Lamb"}}, "AdamW"),
        ({"train_batch_size": 7}, "train_batch_size is 7"),
        ({"fp16": {"enabled": True}}, "bf16"),
        ({"zero_optimization": {"novel": "auto"}}, "zero_optimization.novel"),
    ],
)
def test_what_can_not_work_is_refused(config, text):
    with pytest.raises(ValueError, match=text):
        resolve(config)


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="--deepspeed"):
        load_deepspeed_config(str(tmp_path / "no.json"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        load_deepspeed_config(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        load_deepspeed_config(str(tmp_path / "a.json"))


def test_biases_and_frozen_parameters_do_not_decay():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    module[1].weight.requires_grad_(False)
    first, second = decay_groups(module, 0.1)
    assert [p.shape for p in first["params"]] == [(3, 2)] and first["weight_decay"] == 0.1
    assert [p.shape for p in second["params"]] == [(3,), (1,)] and second["weight_decay"] == 0


# The optimizer's kernel


def stepped(fused, steps, state=None):
    """Weights and state of a small layer after some steps of AdamW."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = make_optimizer(layer, OptimizerSettings(0.1, weight_decay=0.1), fused)
    if state is not None:
        layer.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    for step in range(steps):
        for number, parameter in enumerate(layer.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + number + 1))
        optimizer.step()
    return layer.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize(("saved", "here"), [(None, True), (True, None), (None, None)])
def test_a_state_continues_under_another_kernel_which_stays(saved, here):
    weights, state = stepped(here, 2, stepped(saved, 2))
    expected, _ = stepped(here, 2, stepped(here, 2))
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert {group["fused"] for group in state["param_groups"]} == {here}
    assert {float(entry["step"]) for entry in state["state"].values()} == {4.0}


def test_a_state_of_other_groups_is_refused():
    weights, state = stepped(True, 1)
    state["param_groups"] = state["param_groups"][:1]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        stepped(True, 1, (weights, state))


@pytest.mark.parametrize(
    ("device", "offloaded", "fused"), [("cuda", "none", True), ("cuda", "cpu", None),
                                       ("cpu", "none", None)],
)  # fmt: skip
def test_deepspeed_steps_in_one_kernel_on_a_gpu(monkeypatch, device, offloaded, fused):
    """Not where its state is in CPU memory."""

    class Made(Exception):
        pass

    def make(policy, settings, fused=None):
        raise Made(fused)

    monkeypatch.setattr(engine, "make_optimizer", make)
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": offloaded}}}
    with pytest.raises(Made) as made:
        engine.DeepSpeedEngine(
            None, OptimizerSettings(1e-3), config=config, device=torch.device(device)
        )
    assert made.value.args == (fused,)
