"""One stage of training after another: what a folder holds is the model that was trained."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import read_jsonl
from safetensors.torch import load_file

from virft_fast import merge
from virft_fast.data.demo import build_demo
from virft_fast.models.adapters import BASE_FOLDER, model_chain
from virft_fast.models.qwen_vl import load_model
from virft_fast.train import main

SMALL = [
    "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
    "--num_generations", "2", "--max_completion_length", "12", "--lr_scheduler_type", "constant",
]  # fmt: skip
LORA = ["--use_peft", "--lora_r", "4", "--lora_alpha", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits with pairs: the same rows serve all three algorithms."""
    folder = tmp_path_factory.mktemp("stages")
    rows = build_demo("digits_classification", folder / "digits", num_train=8, num_test=2)["train"]
    pairs = rows.map(lambda row: {"chosen": row["solution"], "rejected": "<answer>none</answer>"})
    pairs.to_parquet(folder / "pairs.parquet")
    rows.to_parquet(folder / "rows.parquet")
    # Spread in every group, whatever is answered.
    (folder / "reward.py").write_text(
        "def second(completions, **columns):\n    return [i % 2 for i in range(len(completions))]\n"
    )
    return folder


def stage(data, model, out, *flags, algorithm="grpo", rate=0.05, steps=1):
    rows = data / ("pairs.parquet" if algorithm == "dpo" else "rows.parquet")
    reward = ["--reward_funcs", data / "reward.py:second"] if algorithm == "grpo" else []
    argv = [
        "--algorithm", algorithm, "--model_name_or_path", model, "--dataset_name", rows,
        "--output_dir", out, "--max_steps", steps, "--save_steps", steps, "--learning_rate", rate,
        *SMALL, *reward, *flags,
    ]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    return out


@pytest.fixture(scope="module")
def first(data):
    """A LoRA adapter that a first stage trained, far from its base."""
    return stage(data, "tiny", data / "sft", *LORA, algorithm="sft", rate=0.05, steps=2)


def as_peft_loads(folder):
    """The model of a folder by transformers and peft alone, adapters merged in float32."""
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    config = folder / "adapter_config.json"
    if not config.is_file():
        return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    named = json.loads(config.read_text())["base_model_name_or_path"]
    base = Qwen2VLForConditionalGeneration.from_pretrained(named, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).merge_and_unload()


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name].to(weight.dtype)), name


def trained_weights(folder):
    """What the engine held after the last step, by the names that files use."""
    (state,) = folder.glob("checkpoint-*/engine/state.pt")
    module = torch.load(state, weights_only=True)["module"]
    return {name.split("base_model.model.")[-1]: weight for name, weight in module.items()}


def assert_holds_what_was_trained(folder):
    weights = trained_weights(folder)
    if not (folder / "adapter_config.json").is_file():
        stored = load_file(folder / "model.safetensors")
        assert all(weight.dtype == torch.float32 for weight in stored.values())
    else:
        stored = load_file(folder / "adapter_model.safetensors")
        assert not any("reference" in name for name in stored)
        for name, weight in stored.items():
            of_engine = name.split("base_model.model.")[-1].replace(".weight", ".default.weight")
            assert torch.equal(weight, weights[of_engine]), name
    assert_same(load_model(str(folder)), as_peft_loads(folder))


SECOND = {
    "continued": ["--use_peft"],
    "the same shape": LORA,
    "stacked": ["--use_peft", "--lora_r", "2"],
    "other layers": ["--use_peft", "--lora_target_modules", "q_proj"],
    "full": [],
}


@pytest.mark.parametrize("flags", SECOND.values(), ids=SECOND)
def test_a_second_stage_begins_where_the_first_ended(data, first, tmp_path, flags):
    """Without a step's effect the model is the first stage's, and its own reference."""
    out = stage(data, first, tmp_path / "out", *flags, rate=0, steps=1)
    assert_same(load_model(str(out)), load_model(str(first)))
    (record,) = read_jsonl(out / "metrics.jsonl")
    assert record["kl"] == 0


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "sft"])
@pytest.mark.parametrize("flags", [SECOND["continued"], SECOND["stacked"], SECOND["full"]],
                         ids=["continued", "stacked", "full"])  # fmt: skip
def test_a_second_stage_saves_what_it_trained(data, first, tmp_path, algorithm, flags):
    before = load_model(str(first)).state_dict()
    out = stage(data, first, tmp_path / "out", *flags, algorithm=algorithm, rate=1e-3)
    assert_holds_what_was_trained(out)
    after = load_model(str(out)).state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and (not flags or all("_proj" in name for name in moved))


def test_a_third_stage_continues_the_second(data, first, tmp_path):
    second = stage(data, first, tmp_path / "second", "--use_peft", rate=1e-3)
    third = stage(data, second, tmp_path / "third", "--use_peft", rate=1e-3)
    assert_holds_what_was_trained(third)
    assert model_chain(str(third))[1:] == model_chain(str(first))[1:]  # both on the same base


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize("kind", ["continued", "stacked"])
def test_a_resumed_second_stage_keeps_its_reference(data, first, tmp_path, algorithm, kind):
    """The reference is the model as the stage began, not as it was resumed."""
    flags = SECOND[kind]
    common = {"algorithm": algorithm, "rate": 1e-3}
    whole = stage(data, first, tmp_path / "whole", *flags, steps=2, **common)
    half = stage(data, first, tmp_path / "half", *flags, steps=1, **common)
    stage(data, first, half, *flags, "--resume_from_checkpoint", "latest", steps=2, **common)
    keys = ("loss", "grad_norm", "kl") if algorithm == "grpo" else ("loss", "grad_norm")
    of_whole, of_half = (
        [[record[key] for key in keys] for record in read_jsonl(folder / "metrics.jsonl")]
        for folder in (whole, half)
    )
    assert of_whole == of_half
    assert_same(load_model(str(whole)), load_model(str(half)))


def test_a_stacked_run_can_be_moved(data, first, tmp_path):
    out = stage(data, first, tmp_path / "out", *SECOND["stacked"], rate=1e-3)
    there = load_model(str(out)).state_dict()
    out.rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / BASE_FOLDER / "config.json").is_file()
    here = load_model(str(tmp_path / "elsewhere")).state_dict()
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_merge_writes_a_whole_model(data, first, tmp_path, capsys):
    assert merge.main([str(first), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    assert_same(load_model(str(first)), as_peft_loads(tmp_path / "whole"))
    assert merge.main([str(first), str(tmp_path / "whole")]) != 0
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert merge.main(["tiny", str(tmp_path / "other")]) != 0
    assert "adapter_config.json" in capsys.readouterr().err


def test_a_lost_first_stage_is_found_again(data, first, tmp_path):
    """An adapter that was trained on a merged first stage but names the bare base: `--base` puts it
    on the model that it was trained on."""
    merged = tmp_path / "merged"
    assert merge.main([str(first), str(merged), "--dtype", "float32"]) == 0
    second = stage(data, merged, tmp_path / "second", *LORA, rate=1e-3)
    right = load_model(str(second)).state_dict()
    config = json.loads((second / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = model_chain("tiny")[0][0]
    (second / "adapter_config.json").write_text(json.dumps(config))
    argv = [str(second), str(tmp_path / "rescued"), "--base", str(merged), "--dtype", "float32"]
    assert merge.main(argv) == 0
    rescued = load_model(str(tmp_path / "rescued")).state_dict()
    assert all(torch.equal(right[name], rescued[name]) for name in right)


@pytest.mark.parametrize(
    "flags, dtype",
    [
        (["--bf16"], torch.bfloat16),  # as the base's
        ([], torch.float32),
        (["--bf16", "--save_dtype", "float32"], torch.float32),
        (["--save_dtype", "float16"], torch.float16),
    ],
    ids=["bf16", "float32", "bf16 to float32", "float16"],
)
def test_the_dtype_of_a_saved_model(data, tmp_path, flags, dtype):
    out = stage(data, "tiny", tmp_path / "out", *flags, rate=1e-3)
    for folder in (out, out / "checkpoint-1"):
        stored = load_file(folder / "model.safetensors")
        assert {weight.dtype for weight in stored.values()} == {dtype}
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_an_adapter_that_is_more_than_products_is_refused(data, first, tmp_path, capsys):
    config = json.loads((first / "adapter_config.json").read_text()) | {"bias": "all"}
    folder = tmp_path / "odd"
    folder.mkdir()
    for path in first.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    argv = ["--model_name_or_path", folder, "--dataset_name", data / "rows.parquet",
            "--output_dir", tmp_path / "out", "--use_peft"]  # fmt: skip
    assert main([str(word) for word in argv]) == 2
    assert "'bias': 'all'" in capsys.readouterr().err


def test_what_changed_is_named_on_resume(data, tmp_path, capsys, caplog):
    out = stage(data, "tiny", tmp_path / "out", rate=1e-3)
    more = ["--resume_from_checkpoint", "latest", "--temperature", "0.5", "--beta", "0"]
    stage(data, "tiny", out, *more, rate=1e-4, steps=2)
    said = capsys.readouterr()
    text = said.out + said.err + caplog.text
    for change in ("learning_rate 0.001 -> 0.0001", "temperature 1.0 -> 0.5", "beta 0.04 -> 0.0"):
        assert change in text
