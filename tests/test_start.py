"""What is wrong with a run is said before its model is loaded, and by --dry_run as well."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest

from virft_fast import evaluate, train
from virft_fast.data.demo import build_demo
from virft_fast.evaluation import run as evaluation
from virft_fast.models.tiny import TINY_PATH


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Small demo data sets, odd files and folders: what the cases below speak of."""
    folder = tmp_path_factory.mktemp("start")
    build_demo("digits_classification", folder / "digits", num_train=6, num_test=2)
    build_demo("shapes_detection", folder / "shapes", num_train=6, num_test=2)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, errors="surrogateescape")
    for name in ("weightless", "cut", "pickled", "shardless", "llama"):
        shutil.copytree(TINY_PATH, folder / name)
    for name in ("weightless", "pickled", "shardless"):
        (folder / name / "model.safetensors").unlink()
    weights = TINY_PATH / "model.safetensors"
    (folder / "cut/model.safetensors").write_bytes(weights.read_bytes()[:100_000])
    (folder / "pickled/pytorch_model.bin").write_bytes(pickle.dumps({}))
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "shardless/model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((TINY_PATH / "config.json").read_text())
    (folder / "llama/config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return folder


BOX = "<answer>[{'Position': [1, 2, 300, 400], 'Confidence': 1}]</answer>"
FILES = {
    "file": "no folder",
    "syntax.py": "def f(:",
    "imports.py": "import no_such_package",
    "narrow.py": "def f(completions): return [1.0] * len(completions)",
    "needy.py": "def f(completions, truth, **columns): return [1.0] * len(completions)",
    "stage.json": '{"zero_optimization": {"stage": 9}}',
    "offload.json": '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
    "other_key.json": '{"zero_optimization": {"stage": 2, "reduce_bucket": 5}}',
    "list.json": "[]",
    "twice.yaml": "beta: 0.1\nbeta: 0.2\n",
    "within.yaml": "config: other.yaml\n",
    "latin.yaml": "run_name: caf\udce9\n",
    "no_state/trainer_state.json": "{}",
    "list_state/trainer_state.json": '{"config": [], "world_size": 1}',
    "list_state/engine/state.pt": "",
    "other_seed/trainer_state.json": '{"config": {"seed": 7}, "world_size": 1}',
    "other_seed/engine/state.pt": "",
    "stateless/trainer_state.json": '{"config": {}, "world_size": 1}',
    "stateless/engine/other": "",
    "adapter/adapter_config.json": json.dumps(
        {"base_model_name_or_path": "tiny", "peft_type": "LORA", "r": 4, "lora_alpha": 8,
         "target_modules": ["q_proj"]}
    ),
    "half.json": json.dumps(
        [{"problem": "p", "solution": BOX}] * 4 + [{"problem": "p", "solution": ""}] * 4
    ),
}  # fmt: skip

DIGITS = "--dataset_name {}/digits --output_dir {}/out "
# A launch line, and what the error says; {} is the folder of the cases.
CASES = [
    # the run
    ("--lr_scheduler_type magic", "such as linear or cosine"),
    ("--lr_scheduler_type cosine_with_min_lr", "such as linear or cosine"),
    ("--lr_scheduler_type polynomial --learning_rate 1e-8", "must be smaller"),
    ("--adam_beta1 1", "--adam_beta1: expected a number in [0, 1)"),
    ("--adam_epsilon nan", "--adam_epsilon: expected a number above 0"),
    ("--beta inf", "--beta: expected"),
    ("--report_to nonsense", "--report_to: expected one of"),
    ("--output_dir {}/file", "--output_dir"),
    ("--output_dir {}/file/below", "--output_dir"),
    ("--config {}/twice.yaml", "expected every flag once, got beta"),
    ("--config {}/within.yaml", "config: expected no file"),
    ("--config {}/latin.yaml", "expected YAML"),
    ("--config {}/twice.yaml --config {}/within.yaml", "expected one file"),
    ("--deepspeed {}/none.json", "no such file"),
    ("--deepspeed {}/list.json", "expected a JSON object"),
    ("--deepspeed {}/stage.json", "expected 0 to 3, got 9"),
    ("--deepspeed {}/offload.json", "offload_optimizer"),
    ("--deepspeed {}/other_key.json", "reduce_bucket"),
    # what is continued
    ("--resume_from_checkpoint {}/none", "no such folder"),
    ("--resume_from_checkpoint {}/no_state", "no engine state"),
    ("--resume_from_checkpoint {}/list_state", "expected the state of a run"),
    ("--resume_from_checkpoint {}/other_seed", "'seed': 7"),
    ("--resume_from_checkpoint {}/stateless", "state.pt: expected the state of a run without"),
    # the model
    ("--model_name_or_path {}/none", "--model_name_or_path"),
    ("--model_name_or_path {}/digits", "expected a folder or hub id with a tokenizer"),
    ("--model_name_or_path {}/weightless", "is the folder complete?"),
    ("--model_name_or_path {}/cut", "is the folder complete?"),
    ("--model_name_or_path {}/shardless", "model-00001-of-00001.safetensors"),
    ("--model_name_or_path {}/pickled", "pytorch_model.bin is a pickle and not opened"),
    ("--model_name_or_path {}/llama", "expected one of the families"),
    ("--use_peft --model_name_or_path {}/adapter", "adapter_model.safetensors"),
    ("--use_peft --lora_target_modules q_proj qproj", "--lora_target_modules qproj: expected"),
    ("--attn_implementation flash", "expected one of sdpa, eager, flash_attention_2"),
    ("--prefix_attention flex", "expected a CUDA device"),
    # the data
    ("--dataset_name {}/none", "no such file"),
    ("--dataset_train_split nope", "no split 'nope'"),
    ("--eval_samples 1 --dataset_test_split nope", "no split 'nope'"),
    ("--columns problem=question", "has no column 'question'"),
    ("--box_space pixels", "--box_space pixels: expected solutions with boxes"),
    ("--compat_prompt", "expected LISA's conversations"),
    ("--task detection", "expected at least one usable row of 6"),
    ("--max_prompt_length 3", "--max_prompt_length 3"),
    ("--dataset_name {}/half.json --max_bad_rows 3", "--max_bad_rows 3: expected"),
    # the rewards
    ("--reward_funcs acuracy", "did you mean accuracy?"),
    ("--reward_funcs {}/syntax.py:f", "can't be imported: SyntaxError"),
    ("--reward_funcs {}/imports.py:f", "No module named 'no_such_package'"),
    ("--reward_funcs {}/narrow.py:g", "no function 'g'"),
    ("--reward_funcs {}/narrow.py:f", "or **columns for what it has no use for"),
    ("--reward_funcs {}/needy.py:f", "missing a required argument: 'truth'"),
    ("--reward_weights 1 2 3", "--reward_weights: expected 2 weights"),
]


@pytest.fixture
def without_weights(monkeypatch):
    """A model's shape may be made, but no weights be read."""
    real = train.load_model

    def load_model(*args, empty=False, **options):
        assert empty, "the model was loaded"
        return real(*args, empty=True, **options)

    for module in (train, evaluation):
        monkeypatch.setattr(module, "load_model", load_model)


@pytest.mark.parametrize("dry_run", ["", " --dry_run"], ids=["run", "dry_run"])
@pytest.mark.parametrize(("line", "said"), CASES, ids=[line for line, _ in CASES])
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    sets, without_weights, capsys, line, said, dry_run
):
    words = (DIGITS + line + dry_run).replace("{}", str(sets)).split()
    assert train.main(words) == 2
    assert said in capsys.readouterr().err
    assert not (sets / "out").exists() or not any((sets / "out").iterdir())


EVALUATIONS = [
    ("--model_name_or_path {}/weightless", "is the folder complete?"),
    ("--compare tiny {}/weightless", "is the folder complete?"),
    ("--attn_implementation flash", "expected one of sdpa, eager, flash_attention_2"),
    ("--split nope", "no split 'nope'"),
    ("--box_space unit", "--box_space unit: expected solutions with boxes"),
    ("--columns problem=question", "has no column 'question'"),
    ("--sam_path {}/none", "--sam_path: expected a grounding task"),
    ("--reward_funcs acuracy", "did you mean accuracy?"),
    ("--reward_funcs {}/needy.py:f", "missing a required argument: 'truth'"),
    ("--output {}/file/answers.jsonl", "--output"),
]


@pytest.mark.parametrize(("line", "said"), EVALUATIONS, ids=[line for line, _ in EVALUATIONS])
def test_an_evaluation_says_it_before_any_answer(sets, without_weights, capsys, line, said):
    line = "--dataset_name {}/digits --output {}/answers.jsonl " + line
    assert evaluate.main(line.replace("{}", str(sets)).split()) == 2
    assert said in capsys.readouterr().err
