"""QLoRA, optimizers with 8-bit state, and layers' inputs that wait in CPU memory."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from helpers import CPU, make_prompts, make_sample, make_state, read_jsonl
from processes import environment
from safetensors.torch import load_file

from virft_fast import dist, doctor
from virft_fast import merge as merging
from virft_fast.algorithms.grpo import train_step
from virft_fast.data.demo import build_demo
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.kernels import LossArgs
from virft_fast.models import qwen_vl
from virft_fast.models.adapters import add_lora, as_reference
from virft_fast.models.policy import Policy
from virft_fast.models.qwen_vl import base, checkpoint_layers, core, load_model
from virft_fast.models.tiny import TINY_PATH
from virft_fast.optimizer import EIGHT_BIT, make_optimizer
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import make_rollout
from virft_fast.train import main, memory, parse_args

QLORA = ["--use_peft", "--load_in_4bit"]
SETTINGS = OptimizerSettings(learning_rate=1e-3)


def adapted(*, in_4bit=True, dtype=torch.float32):
    """The embedded model under an adapter that changes its answers."""
    model = load_model("tiny", dtype=dtype, load_in_4bit=in_4bit)
    torch.manual_seed(0)
    model = add_lora(model, r=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return Policy(model.train())


def linears(policy):
    """Name -> linear layer, without the adapter's."""
    named = core(policy.model).language_model.named_modules()
    return {n: m for n, m in named if isinstance(m, torch.nn.Linear) and "lora_" not in n}


def unquantized(policy):
    """The same policy with the numbers that the 4 bits stand for, in float32."""
    plain = adapted(in_4bit=False)
    for name, linear in linears(plain).items():
        weight = linears(policy)[name].weight
        linear.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return plain


def greedy(policy, processor, prompts, backend="native"):
    rollout = make_rollout(
        backend, lambda: nullcontext(policy), processor.tokenizer, device=CPU
    )  # fmt: skip
    return rollout.generate(prompts, 2, Sampling(12, greedy=True))


def gradients(policy, inputs):
    loss = LossArgs(advantages=torch.tensor([1.0, -1.0]))
    mask = torch.ones(len(inputs.completion_ids), dtype=torch.bool)
    policy(inputs, loss=loss, loss_mask=mask)[0].backward()
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


@pytest.fixture
def inputs(processor, prompts):
    policy = adapted(in_4bit=False)
    completions = [[torch.arange(9), torch.arange(5) + 20]]
    return policy.collate(prompts[:1], completions, pad_token_id=0, device=CPU)


# What is in 4 bits


def test_the_language_models_linear_layers_are_nf4_and_all_else_is_16_bits():
    policy, start = adapted(dtype=torch.bfloat16), load_model("tiny", dtype=torch.bfloat16)
    quantized = linears(policy)
    assert len(quantized) == 7 * 3
    for name, linear in quantized.items():
        original = core(start).language_model.get_submodule(name.removesuffix(".base_layer"))
        numbers, state = bnb.functional.quantize_4bit(original.weight.data, quant_type="nf4")
        assert torch.equal(linear.weight.data, numbers), name
        assert torch.equal(linear.weight.quant_state.absmax, state.absmax), name
    weights = {id(linear.weight) for linear in quantized.values()}
    rest = {n: p for n, p in policy.model.named_parameters() if id(p) not in weights}
    assert all(p.dtype == (torch.float32 if "lora_" in n else torch.bfloat16)
               for n, p in rest.items())  # fmt: skip
    assert all(p.requires_grad == ("lora_" in n) for n, p in rest.items())
    assert any("visual" in n for n in rest) and any("embed_tokens" in n for n in rest)


def test_loss_and_gradients_are_those_of_the_numbers_that_the_bits_stand_for(
    processor, prompts, inputs
):
    """Also after a rollout: on some CPUs, bitsandbytes packs weights anew when it decodes."""
    policy = adapted()
    expected = gradients(unquantized(policy), inputs)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for _ in range(2):
        ours = gradients(policy, inputs)
        assert ours.keys() == expected.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        greedy(policy, processor, prompts[:1])


def test_rollouts_draw_what_generate_draws(processor, prompts):
    """With the 4-bit model and its adapter; the numbers are those of the logits of one pass."""
    policy = adapted()
    ours, theirs = (greedy(policy, processor, prompts, kind) for kind in ("native", "hf"))
    assert torch.equal(ours.completion_ids, theirs.completion_ids)
    torch.testing.assert_close(ours.sampling_logps, theirs.sampling_logps, rtol=0, atol=2e-5)
    assert greedy(adapted(in_4bit=False), processor, prompts).texts != ours.texts
    with as_reference(policy.model):
        assert greedy(policy, processor, prompts).texts != ours.texts


@pytest.mark.parametrize("in_4bit", [True, False])
def test_rollouts_on_a_gpu_need_no_copy_of_4_bit_weights(monkeypatch, in_4bit):
    monkeypatch.setattr(Policy, "to", lambda policy, device: policy)
    engine = PlainEngine(
        adapted(in_4bit=in_4bit), SETTINGS, device=torch.device("cuda"), bf16=True
    )  # fmt: skip
    assert (engine._copy is None) == in_4bit


def digits(prompts, completions, **columns):
    """A reward that an adapter learns in a few steps: the share of digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in texts]


def curve(processor, seed, rate=1e-3, *, in_4bit):
    """The mean reward of each of 12 steps."""
    config = {"num_generations": 8, "max_completion_length": 10, "beta": 0.0}
    more = {"settings": {"learning_rate": rate}, "prompts_per_microbatch": 4, "seed": seed}
    state = make_state(processor, config=config, reward=digits, **more)
    torch.manual_seed(seed)
    model = load_model("tiny", load_in_4bit=in_4bit)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    policy = Policy(add_lora(model, r=8, alpha=16, target_modules=targets).train())
    engine = PlainEngine(policy, state.engine.settings, device=CPU)
    rollout = make_rollout("native", engine.whole_weights, processor.tokenizer, device=CPU)
    state = dataclasses.replace(state, policy=policy, engine=engine, rollout=rollout)
    samples = (make_sample(i, [(56, 56)], f"Detect {i}.") for i in range(4))
    prompts = make_prompts(processor, *samples)
    return torch.tensor([train_step(state, prompts)[0]["reward"] for _ in range(12)])


def test_4_bits_learn_as_fast_as_32(processor):
    """By the mean of the curve, which half the learning rate lowers by more than is allowed. LoRA's
    own seeds 0, 1 and 2 differ by 0.04."""
    for seed in (0, 1):
        lora, qlora = (curve(processor, seed, in_4bit=in_4bit) for in_4bit in (False, True))
        assert (lora[-3:].mean() - lora[0]).item() > 0.3
        assert abs(qlora.mean() - lora.mean()).item() <= 0.05
    assert lora.mean() - curve(processor, seed, 5e-4, in_4bit=True).mean() > 0.05


# Memory


def estimate(*flags, total, trainable):
    config = parse_args(["--model_name_or_path", "tiny", *flags])
    run = SimpleNamespace(config=config, ds_config=None, keeps_reference=False)
    policy = Policy(load_model("tiny", empty=True))
    data = SimpleNamespace(prompts_per_step=1)
    return memory.memory_estimate(run, data, policy, total, trainable)


def test_the_estimate_is_what_was_counted(monkeypatch, inputs):
    monkeypatch.setattr(dist, "local_device", lambda: torch.device("cuda"))
    policy, plain = adapted(dtype=torch.bfloat16), adapted(in_4bit=False)
    total = sum(p.numel() for p in plain.parameters())
    trainable = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    sizes = estimate(*QLORA, "--bf16", total=total, trainable=trainable)
    scales = sum(linear.weight.quant_state.absmax.nbytes for linear in linears(policy).values())
    assert sizes["weights"] == sum(p.nbytes for p in policy.parameters()) + scales
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(policy, inputs)
    assert sizes["gradients"] == sum(gradient.nbytes for gradient in found.values())
    assert sizes["the largest 4-bit matrix while a product reads it"] == 2 * 128 * 384
    kept = estimate("--use_peft", "--bf16", total=total, trainable=trainable)
    assert {name for name in kept if "cop" in name} and not {n for n in sizes if "cop" in n}


# A run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("4bit") / "digits"
    build_demo("digits_classification", folder, num_train=64, num_test=8)
    return folder


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """test_report.py draws reports; a figure takes as long as these runs' steps."""
    monkeypatch.setattr("virft_fast.train.conclusion.write_report", lambda path, **_: path.touch())


def train(rows, out, *flags, steps=2):
    argv = [
        "--dataset_name", rows, "--output_dir", out, "--max_steps", steps, "--learning_rate", 1e-3,
        "--per_device_train_batch_size", 2, "--num_generations", 2, "--max_completion_length", 12,
        "--lr_scheduler_type", "constant", *flags,
    ]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    return out


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory):
    """Four steps, checkpointed after the second."""
    out = tmp_path_factory.mktemp("run") / "whole"
    flags = ["--save_steps", 2, "--gradient_checkpointing", "--offload_activations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("virft_fast.train.conclusion.write_report", lambda path, **_: path.touch())
        return train(rows, out, *QLORA, *flags, steps=4)


def test_the_saved_adapter_loads_on_the_16_bit_base(processor, prompts, trained, tmp_path):
    """With plain peft; and it merges into that base."""
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration as Qwen

    named = json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(TINY_PATH)
    start = Qwen.from_pretrained(named, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(start, trained)
    stored = load_file(trained / "adapter_model.safetensors")
    loaded = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    assert stored.keys() == loaded.keys() and len(stored) == 2 * 7 * 3
    for name, weight in stored.items():
        assert torch.equal(weight, loaded[name].float()) and weight.any(), name
    assert merging.merge(str(trained), str(tmp_path / "merged")) == torch.bfloat16
    merged = load_model(str(tmp_path / "merged"), dtype=torch.bfloat16)
    expected = theirs.float().merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, expected[name].to(weight.dtype)), name


def test_a_resumed_run_is_the_run_that_was_not_killed(rows, trained, tmp_path):
    half = train(rows, tmp_path / "half", *QLORA, "--save_steps", 2)
    flags = [*QLORA, "--resume_from_checkpoint", half / "checkpoint-2"]
    again = train(rows, tmp_path / "again", *flags, steps=4)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (again, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one, other = (read_jsonl(f / "metrics.jsonl")[-2:] for f in (again, trained))
    assert [r["step"] for r in one] == [3, 4]
    for key in ("loss", "reward", "grad_norm", "kl"):
        assert [r[key] for r in one] == [r[key] for r in other], key


def test_a_checkpoint_has_no_4_bit_weights_and_must_fit(rows, trained, tmp_path, capsys):
    (path,) = trained.glob("checkpoint-2/engine/state.pt")
    state = torch.load(path, weights_only=True)["module"]
    assert state and all("lora_" in name for name in state)
    flags = [*QLORA, "--lora_target_modules", "q_proj", "--max_steps", "3"]
    flags += ["--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    argv = [*flags, "--resume_from_checkpoint", str(path.parent.parent)]
    assert main(argv) == 2 and "lora_target_modules" in capsys.readouterr().err
    policy = Policy(add_lora(load_model("tiny", load_in_4bit=True), r=16, alpha=32,
                             target_modules=["q_proj"]))  # fmt: skip
    engine = PlainEngine(policy, SETTINGS, device=CPU)
    with pytest.raises(ValueError, match="KeyError.*down_proj"):
        engine.load_state(path.parent)


# What doesn't go together


@pytest.mark.parametrize(("flags", "error"), [
    (["--load_in_4bit"], "--load_in_4bit: expected --use_peft as well"),
    (["--offload_activations"], "--offload_activations: expected --gradient_checkpointing as well"),
    ([*QLORA, "--deepspeed", "zero.json"],
     "--load_in_4bit: expected a run without --deepspeed, got zero.json"),
    (["--optim", "adamw_8bit", "--deepspeed", "zero.json"],
     "--optim adamw_8bit: expected a run without --deepspeed"),
    (["--optim", "paged_adamw_8bit"], "--optim paged_adamw_8bit: expected a GPU, got the cpu"),
    (["--optim", "adafactor"], "--optim: expected one of adamw_torch_fused, adamw_torch, "),
    (["--load_in_8bit", "true"], "pass --load_in_4bit"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys, flags, error):
    assert main(["--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_a_message_about_a_missing_kernel_is_hidden():
    """bitsandbytes logs it on import, which transformers and peft do in every run."""
    code = (
        "import logging; from virft_fast.console import log_warnings; log_warnings()\n"
        "import bitsandbytes; print(logging.getLogger('bitsandbytes').getEffectiveLevel())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == str(logging.WARNING)
    assert "gemm_4bit" not in done.stdout + done.stderr


def test_without_bitsandbytes_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    assert main(["--output_dir", str(tmp_path / "out"), *QLORA, "--dry_run"]) == 2
    assert "pip install bitsandbytes, or '.[4bit]' in a checkout" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--optim adamw_8bit: expected the package bitsandbytes"):
        make_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(0.1, optim="adamw_8bit"))
    assert doctor.OPTIONAL["bitsandbytes"][1] == "4bit"


# Optimizers


@pytest.mark.parametrize("optim", [*EIGHT_BIT, "adamw_torch", "adamw_torch_fused"])
def test_every_optimizer_is_adamw(optim):
    """bitsandbytes also computes on a CPU, slowly. 8 bits round the moments, and no more."""
    settings = OptimizerSettings(1e-2, weight_decay=0.1, optim=optim)
    torch.manual_seed(0)
    start = torch.randn(128, 64)

    def moved(make, steps, state=None):
        layer = torch.nn.Linear(64, 128, bias=False)
        layer.weight.data = start.clone()
        optimizer = make(layer)
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            if step == 2 and state is not None:  # as a resumed run does
                optimizer = make(layer)
                optimizer.load_state_dict(state)
            layer.weight.grad = torch.randn(start.shape, generator=generator)
            optimizer.step()
        return layer.weight.detach() - start, optimizer

    make = lambda layer: make_optimizer(layer, settings, fused=True)  # noqa: E731
    ours, optimizer = moved(make, 6)
    plain = lambda layer: torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)  # noqa: E731
    expected, _ = moved(plain, 6)
    eight_bit = optim in EIGHT_BIT
    assert (ours - expected).norm() <= (0.02 if eight_bit else 1e-5) * expected.norm()
    (state,) = optimizer.state.values()
    numbers = {v.dtype for v in state.values() if torch.is_tensor(v) and v.numel() == start.numel()}
    assert numbers == {torch.uint8 if eight_bit else torch.float32}
    held = sum(v.nbytes for k, v in state.items() if torch.is_tensor(v) and k[:4] != "qmap")
    flags = ["--use_peft", "--optim", optim]
    sizes = estimate(*flags, total=2**20, trainable=start.numel())
    assert sizes["optimizer state"] == pytest.approx(held, abs=4)  # torch's step
    _, half = moved(make, 2)
    assert torch.equal(moved(make, 6, half.state_dict())[0], ours)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_8_bit_optimizers_train_on_a_gpu(rows, tmp_path, optim):
    out = train(rows, tmp_path / "out", *QLORA, "--bf16", "--optim", optim)
    records = read_jsonl(out / "metrics.jsonl")
    assert len(records) == 2 and records[-1]["skipped_steps"] == 0


# Layers' inputs in CPU memory


@pytest.mark.parametrize("in_4bit", [False, True])
def test_offloaded_inputs_change_no_bit(monkeypatch, inputs, in_4bit):
    policy, packed = adapted(in_4bit=in_4bit), []
    plain = gradients(policy, inputs)
    checkpoint_layers(base(policy.model), offload=False)
    recomputed = gradients(policy, inputs)

    class Noted(qwen_vl.save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (packed.append(tensor.shape), pack(tensor))[1]

    monkeypatch.setattr(qwen_vl, "save_on_cpu", Noted)
    checkpoint_layers(base(policy.model), offload=True)
    offloaded = gradients(policy, inputs)
    assert plain.keys() == recomputed.keys() == offloaded.keys()
    for name, gradient in offloaded.items():
        assert torch.equal(gradient, recomputed[name]) and torch.equal(gradient, plain[name]), name
    tokens = inputs.input_ids.numel()
    assert [shape for shape in packed if shape.numel()] == [(1, tokens, 128)] * 3  # no weight
