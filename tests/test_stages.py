"""One stage of training after another: what a folder holds is the model that was trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import read_jsonl
from processes import run
from safetensors.torch import load_file, save_file
from saved_layout import check_saved

from virft_fast import merge
from virft_fast.data.demo import build_demo
from virft_fast.models.adapters import BASE_FOLDER
from virft_fast.models.qwen_vl import load_model
from virft_fast.models.source import find_model
from virft_fast.models.tiny import TINY_PATH
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


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """test_report.py draws reports; a figure takes as long as these runs' steps."""
    monkeypatch.setattr("virft_fast.train.conclusion.write_report", lambda path, **_: path.touch())


def arguments(data, model, out, *flags, algorithm="grpo", rate=0.05, steps=1):
    rows = data / ("pairs.parquet" if algorithm == "dpo" else "rows.parquet")
    reward = ["--reward_funcs", data / "reward.py:second"] if algorithm == "grpo" else []
    argv = [
        "--algorithm", algorithm, "--model_name_or_path", model, "--dataset_name", rows,
        "--output_dir", out, "--max_steps", steps, "--save_steps", steps, "--learning_rate", rate,
        *SMALL, *reward, *flags,
    ]  # fmt: skip
    return [str(word) for word in argv]


def stage(data, model, out, *flags, **options):
    assert main(arguments(data, model, out, *flags, **options)) == 0
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


def assert_adapter_is(folder, weights):
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored and not any("reference" in name for name in stored)
    for name, weight in stored.items():
        of_engine = name.split("base_model.model.")[-1].replace(".weight", ".default.weight")
        assert torch.equal(weight, weights[of_engine]), name


def assert_holds_what_was_trained(folder):
    """And every folder of the run has the layout that other programs read."""
    for path in (folder, *folder.glob("checkpoint-*"), *folder.glob(BASE_FOLDER)):
        check_saved(path)
    weights = trained_weights(folder)
    if not (folder / "adapter_config.json").is_file():
        stored = load_file(folder / "model.safetensors")
        assert all(weight.dtype == torch.float32 for weight in stored.values())
    else:
        assert_adapter_is(folder, weights)
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
    assert (
        find_model(str(third)).chain[1:] == find_model(str(first)).chain[1:]
    )  # both on the same base


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
    if algorithm == "grpo":  # the second step has moved away from it
        assert of_whole[0][2] == 0 < of_whole[1][2]
    assert_same(load_model(str(whole)), load_model(str(half)))


def test_overwriting_a_run_keeps_the_new_base(data, first, tmp_path, monkeypatch):
    """Also where --output_dir is a relative path: the adapter is nothing without its base."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        stage(data, first, "out", *SECOND["stacked"], "--overwrite_output_dir", rate=1e-3)
        assert_holds_what_was_trained(tmp_path / "out")


def test_an_overwritten_folder_holds_one_model(data, first, tmp_path):
    """A whole model after an adapter, and an adapter after a whole model."""
    out = tmp_path / "out"
    for flags in (SECOND["stacked"], [], SECOND["continued"]):
        stage(data, first, out, *flags, "--overwrite_output_dir", rate=1e-3)
        assert_holds_what_was_trained(out)
        assert (out / "adapter_config.json").exists() == bool(flags)
        assert (out / "model.safetensors").exists() != bool(flags)
        assert (out / BASE_FOLDER).exists() == (flags == SECOND["stacked"])


def test_a_folder_that_the_run_needs_is_not_overwritten(data, first, tmp_path, capsys):
    """An adapter's base in the output folder, and the folder itself."""
    out = stage(data, first, tmp_path / "out", *SECOND["stacked"], rate=1e-3)
    argv = ["--dataset_name", data / "rows.parquet", "--output_dir", out, "--overwrite_output_dir"]
    for model, said in ((out / BASE_FOLDER, "would delete"), (out, "would be overwritten")):
        assert main([str(word) for word in [*argv, "--model_name_or_path", model]]) == 2
        assert said in capsys.readouterr().err
    assert_holds_what_was_trained(out)


def zero(folder, stage):
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage},
                                "train_micro_batch_size_per_gpu": "auto"}))  # fmt: skip
    return path


@pytest.mark.parametrize("flags", [SECOND["continued"], SECOND["full"]], ids=["continued", "full"])
def test_a_second_stage_under_zero3_is_the_plain_one(data, first, tmp_path, flags):
    """The frozen copy is divided with the adapter; a merged model is divided after merging."""
    plain = stage(data, first, tmp_path / "plain", *flags, rate=1e-3, steps=2)
    argv = arguments(
        data, first, tmp_path / "out", *flags, "--deepspeed", zero(tmp_path, 3), rate=1e-3, steps=2
    )
    done = run(*argv)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = (read_jsonl(f / "metrics.jsonl") for f in (plain, tmp_path / "out"))
    for one, other in zip(theirs, ours, strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    assert ours[0]["kl"] == 0 < ours[1]["kl"]
    if flags:
        assert_same(load_model(str(tmp_path / "out")), as_peft_loads(tmp_path / "out"))


def test_stages_on_two_ranks_under_zero_save_what_they_trained(data, tmp_path):
    """SFT, then GRPO that continues its adapter and DPO with another one, each also resumed."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    out = {name: tmp_path / name for name in ("sft", "grpo", "dpo", "grpo-again", "dpo-again")}
    flags = {"grpo": ["--use_peft", "--deepspeed", zero(tmp_path, 3)],
             "dpo": [*SECOND["stacked"], "--deepspeed", zero(tmp_path, 2)]}  # fmt: skip
    first = [*LORA, "--deepspeed", zero(tmp_path, 2)]
    runs = [arguments(data, "tiny", out["sft"], *first, algorithm="sft")]
    for name, more in flags.items():
        for folder, resumed in (
            (out[name], []),
            (out[f"{name}-again"], ["--resume_from_checkpoint", out[name] / "checkpoint-1"]),
        ):
            argv = arguments(
                data, out["sft"], folder, *more, *resumed, algorithm=name, rate=1e-3, steps=2
            )
            runs.append([*argv, "--save_steps", "1"])
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = run(tmp_path / "runs.json", module="two_stages", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out["grpo"] / "checkpoint-2").is_dir()  # also after checkpoint-1 served another run
    models = {}
    for name, folder in out.items():
        check_saved(folder)
        *_, last = sorted(folder.glob("checkpoint-*"))
        check_saved(last)
        trained = get_fp32_state_dict_from_zero_checkpoint(last / "engine", tag="state")
        trained = {key.split("base_model.model.")[-1]: value for key, value in trained.items()}
        assert_adapter_is(folder, trained)
        models[name] = load_model(str(folder)).state_dict()
        assert_same(load_model(str(folder)), as_peft_loads(folder))
    for name in ("grpo", "dpo"):
        whole, again = (read_jsonl(out[n] / "metrics.jsonl") for n in (name, f"{name}-again"))
        assert len(whole) == 2 and whole[-1]["loss"] == again[-1]["loss"]
        same = {k for k, v in models[name].items() if torch.equal(v, models[f"{name}-again"][k])}
        assert same == models[name].keys()
        kept = {k for k, v in models[name].items() if torch.equal(v, models["sft"][k])}
        assert kept < same and all("_proj" in key for key in same - kept)
    assert read_jsonl(out["grpo"] / "metrics.jsonl")[0]["kl"] == 0


def test_a_stacked_run_can_be_moved(data, first, tmp_path):
    out = stage(data, first, tmp_path / "out", *SECOND["stacked"], rate=1e-3)
    there = load_model(str(out)).state_dict()
    out.rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / BASE_FOLDER / "config.json").is_file()
    here = load_model(str(tmp_path / "elsewhere")).state_dict()
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_the_base_that_an_adapter_names_is_used_where_it_exists(first, tmp_path):
    """As plain peft does, whatever lies beside the adapter."""
    run = tmp_path / "exp"
    named, other = tmp_path / "old" / BASE_FOLDER, run / BASE_FOLDER
    for folder in (named, other):
        shutil.copytree(find_model("tiny").chain[0][0], folder)
    odd_copy(first, run / "continued", base_model_name_or_path=str(named))
    assert find_model(str(run / "continued")).chain[1][0] == str(named)
    shutil.rmtree(named)  # the run was moved
    assert find_model(str(run / "continued")).chain[1][0] == str(other)


def test_merge_writes_a_whole_model(data, first, tmp_path, capsys, recwarn):
    assert merge.main([str(first), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    shown = [w.message for w in recwarn if w.category in (FutureWarning, UserWarning)]
    assert not shown  # nothing that the user could act on
    check_saved(tmp_path / "whole")
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
    config["base_model_name_or_path"] = find_model("tiny").chain[0][0]
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


def odd_copy(first, folder, **settings):
    """The first stage's folder with other settings of its adapter."""
    shutil.copytree(first, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((first / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "settings",
    [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}, {"peft_type": "IA3"},
     {"init_lora_weights": "pissa"}, {"trainable_token_indices": [1]}, {"r": None}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_an_adapter_that_is_more_than_products_is_refused(data, first, tmp_path, capsys, settings):
    folder = odd_copy(first, tmp_path / "odd", **settings)
    argv = ["--model_name_or_path", folder, "--dataset_name", data / "rows.parquet",
            "--output_dir", tmp_path / "out", "--use_peft"]  # fmt: skip
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert str(settings)[1:-1] in said and "virft_fast.merge" in said


def test_an_adapter_of_another_model_is_refused(first, tmp_path):
    """Peft alone leaves out weights that fit nowhere, and says nothing."""
    folder = odd_copy(first, tmp_path / "odd")
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("layers.0.", "layers.9."): value for name, value in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected an adapter of this base model"):
        load_model(str(folder))


def test_adapters_that_name_each_other_are_refused(first, tmp_path):
    for one, other in ("ab", "ba"):
        odd_copy(first, tmp_path / one, base_model_name_or_path=str(tmp_path / other))
    with pytest.raises(ValueError, match="name each other as base models"):
        load_model(str(tmp_path / "a"))


PARTS = {"patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
         "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
         "dropout": {"lora_dropout": 0.1},
         "expression": {"target_modules": r".*language_model.*q_proj"},
         "tower": {"target_modules": ["qkv", "q_proj"]}}  # fmt: skip


def peft_folder(folder, **settings):
    """What plain peft writes: an adapter with weights of its own, no tokenizer and no processor."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(load_model("tiny"), LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_pefts_kinds_of_lora_are_continued(data, tmp_path, settings):
    """With a frozen tower an adapter in it stays as it is, and stays in the folder."""
    start = peft_folder(tmp_path / "peft", **settings)
    out = stage(data, start, tmp_path / "out", "--use_peft", "--freeze_vision_tower", rate=1e-3)
    assert read_jsonl(out / "metrics.jsonl")[0]["kl"] == 0
    assert_same(load_model(str(out)), as_peft_loads(out))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (start, out))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name for name in moved)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=["head", "embedding"],
)  # fmt: skip
def test_an_adapter_on_one_of_two_tied_weights_unties_them(tmp_path, settings):
    """The embedded model's head is its embedding; merged, the two are no longer the same."""
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    start = peft_folder(tmp_path / "peft", **settings)
    assert merge.main([str(start), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    adapted = PeftModel.from_pretrained(load_model("tiny"), start).eval()
    whole = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            whole(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=0, atol=1e-4
        )


def test_a_lost_stage_of_an_older_release_is_not_resumed(data, first, tmp_path, capsys):
    out = stage(data, first, tmp_path / "out", "--use_peft")
    path = out / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["adapter"]
    path.write_text(json.dumps(state))
    (path.parent / "checksums.json").unlink()
    argv = ["--use_peft", "--model_name_or_path", first, "--dataset_name", data / "rows.parquet",
            "--output_dir", out, "--resume_from_checkpoint", "latest", *SMALL]  # fmt: skip
    assert main([str(word) for word in argv]) == 2
    assert "docs/checkpoints.md says how to rescue" in capsys.readouterr().err


@pytest.mark.parametrize("beta, status", [("0.04", 2), ("0", 0)])
def test_changed_weights_matter_to_a_reference_only(data, tmp_path, capsys, beta, status):
    model = tmp_path / "model"
    shutil.copytree(TINY_PATH, model)
    out = stage(data, model, tmp_path / "out", rate=1e-3)
    weights = load_file(model / "model.safetensors")
    save_file(
        {k: v * 1.1 for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    argv = ["--model_name_or_path", model, "--dataset_name", data / "rows.parquet", "--beta", beta,
            "--reward_funcs", data / "reward.py:second", "--output_dir", out, "--save_steps", 0,
            "--max_steps", 2, "--resume_from_checkpoint", "latest", *SMALL]  # fmt: skip
    assert main([str(word) for word in argv]) == status
    shown = capsys.readouterr()
    assert ("as they were when the run began" in shown.err) == bool(status)
    assert status or "--beta 0.04 -> 0.0" in shown.out


def test_what_changed_is_named_on_resume(data, tmp_path, capsys, caplog):
    out = stage(data, "tiny", tmp_path / "out", rate=1e-3)
    more = ["--resume_from_checkpoint", "latest", "--temperature", "0.5", "--beta", "0"]
    stage(data, "tiny", out, *more, rate=1e-4, steps=2)
    said = capsys.readouterr()
    text = said.out + said.err + caplog.text
    for change in ("learning_rate 0.001 -> 0.0001", "temperature 1.0 -> 0.5", "beta 0.04 -> 0.0"):
        assert change in text
