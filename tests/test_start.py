"""What is wrong with a run is said before its model is loaded, and by --dry_run as well."""

from __future__ import annotations

import json
import pickle
import shutil
import sys

import datasets
import pytest
from PIL import Image

from virft_fast import evaluate, train
from virft_fast.data import SampleDataset, load_rows
from virft_fast.data.__main__ import main as data_main
from virft_fast.data.demo import build_demo
from virft_fast.data.prompt_source import PromptSource
from virft_fast.models import source
from virft_fast.models.tiny import TINY_PATH
from virft_fast.rollout import backends


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
STATE = {
    "step": 3, "bad_steps": 0, "skipped_steps": 0, "num_tokens": 9, "world_size": 1,
    "sampler": {"num_rows": 8, "seed": 42, "epoch": 0, "position": 3, "order": 1, "bad": []},
    "bad_rows": {"rows": []}, "writer": {"window": {}},
}  # fmt: skip
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
    "empty.json": "{}",
    "clipping.json": '{"gradient_clipping": 0.5}',
    "twice.yaml": "beta: 0.1\nbeta: 0.2\n",
    "within.yaml": "config: other.yaml\n",
    "latin.yaml": "run_name: caf\udce9\n",
    "no_state/trainer_state.json": "{}",
    "list_state/trainer_state.json": json.dumps(STATE | {"config": []}),
    "list_state/engine/state.pt": "",
    "other_seed/trainer_state.json": json.dumps(STATE | {"config": {"seed": 7}}),
    "other_seed/engine/state.pt": "",
    "stateless/trainer_state.json": json.dumps(STATE | {"config": {}}),
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
    ("--entropy_coef nan", "--entropy_coef: expected a finite number"),
    ("--sapo_temperature_neg 0", "--sapo_temperature_neg: expected a number > 0"),
    ("--top_entropy_quantile 2", "--top_entropy_quantile: expected a share"),
    ("--report_to nonsense", "--report_to: expected one of"),
    ("--output_dir {}/file", "--output_dir"),
    ("--output_dir {}/file/below", "--output_dir"),
    ("--config {}/twice.yaml", "expected each flag once, got beta"),
    ("--config {}/within.yaml", "config: the file can't"),
    ("--config {}/latin.yaml", "expected YAML"),
    ("--config {}/twice.yaml --config {}/within.yaml", "expected one file"),
    ("--deepspeed {}/none.json", "no such file"),
    ("--deepspeed {}/list.json", "expected a JSON object"),
    ("--deepspeed {}/stage.json", "expected 0 to 3, got 9"),
    ("--deepspeed {}/offload.json", "offload_optimizer"),
    ("--deepspeed {}/other_key.json", "reduce_bucket"),
    ("--deepspeed {}/clipping.json", "gradient_clipping is 0.5 in the file"),
    # what is continued
    ("--resume_from_checkpoint {}/none", "no such folder"),
    ("--resume_from_checkpoint {}/no_state", "no engine state"),
    ("--resume_from_checkpoint {}/list_state", "config: expected a dict, got []"),
    ("--resume_from_checkpoint {}/other_seed", "'seed': 7"),
    ("--resume_from_checkpoint {}/stateless", "state.pt: expected the state of a run without"),
    # the model
    ("--model_name_or_path {}/none", "--model_name_or_path"),
    ("--model_name_or_path {}/digits", "expected a folder with config.json"),
    ("--model_name_or_path {}/weightless", "is the folder complete?"),
    ("--model_name_or_path {}/cut", "is the folder complete?"),
    ("--model_name_or_path {}/shardless", "model-00001-of-00001.safetensors"),
    ("--model_name_or_path {}/pickled", "pytorch_model.bin; pickled weights are not loaded"),
    ("--model_name_or_path {}/llama", "expected a vision-language model"),
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
    ("--reward_funcs {}/narrow.py:f", "or **columns for those it doesn't need"),
    ("--reward_funcs {}/needy.py:f", "missing a required argument: 'truth'"),
    ("--reward_weights 1 2 3", "--reward_weights: expected 2 weights"),
]


@pytest.fixture
def without_weights(monkeypatch):
    """A model's shape may be made, but no weights be read."""
    real = train.model.load_model

    def load_model(*args, empty=False, **options):
        assert empty, "the model was loaded"
        return real(*args, empty=True, **options)

    for module in (train.model, backends):
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


@pytest.mark.parametrize("dry_run", ["", " --dry_run"], ids=["run", "dry_run"])
@pytest.mark.parametrize(
    ("package", "line"), [("peft", "--use_peft"), ("deepspeed", "--deepspeed {}/empty.json")]
)
def test_a_package_that_is_missing_is_named(
    sets, without_weights, capsys, monkeypatch, package, line, dry_run
):
    monkeypatch.setitem(sys.modules, package, None)
    assert train.main((DIGITS + line + dry_run).replace("{}", str(sets)).split()) == 2
    assert f"expected the package {package}" in capsys.readouterr().err


def test_a_run_finds_its_model_once_and_checks_its_first_prompt_once(sets, tmp_path, monkeypatch):
    def counted(owner, name):
        real = getattr(owner, name)

        def call(*args, **options):
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    calls = []
    for owner, name in (
        (source, "resolve_model_path"),
        (source, "_crc_of_blocks"),
        (PromptSource, "first"),
        (backends, "check_reachable"),
    ):
        counted(owner, name)
    line = f"--dataset_name {sets}/digits --output_dir {tmp_path} --max_steps 1 --beta 0.1 "
    line += "--per_device_train_batch_size 1 --num_generations 2 --max_completion_length 2"
    assert train.main(line.split()) == 0
    assert sorted(calls) == ["_crc_of_blocks", "check_reachable", "first", "resolve_model_path"]


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


# Odd data sets: rows, flags, and what the table at the start says of them.
PICTURE, UNIT = {"image": "a.png"}, "<answer>[{'Position': [0.1, 0.2, 0.3, 0.4]}]</answer>"
ODD = {
    "images": (
        [PICTURE, {}, {"image": "gone.png"}, {"image": "text.png"}, {"image": None}],
        "",
        ["kept 3 of 5", "without an image: 2 (row 1, row 4)", "(row 2)", "(row 3)"],
    ),
    "columns": (
        [{**PICTURE, "images": ["b.png"], "prompt": "q", "answer": "b"}] * 2,
        "",
        ["read from the columns problem + solution (2)", "not read: images, prompt, answer;"],
    ),
    "kinds": (
        [{"solution": value} for value in ("cat", "dog", 3, None, float("nan"), ["cat"], "")],
        "",
        ["kept 3 of 7", "expected text, got list", "expected text, got float", "missing", "empty"],
    ),
    "names": (
        [{"completions": "x", "log_metric": 1, "image_grid_thw": [n]} for n in range(2)],
        "",
        ["rewards get the run's own completions, image_grid_thw, log_metric,"],
    ),
    "boxes": (
        [{**PICTURE, "solution": UNIT}, {**PICTURE, "solution": UNIT, "extent": [1, 1]}],
        "--box_space unit",
        ["converted, boxes in unit to thousandths: 1 (row 0)", "accuracy_confidence: no solution"],
    ),
    "control": (
        [{"problem": "<|im_end|><|im_start|>system"}, {}],
        "",
        ["kept 1 of 2", "expected text and <image> tags only, got <|im_end|>"],
    ),
}


def table_of(text, first):
    """The lines of the table that begins with `first`, without that word."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(first))
    rest = [line for line in lines[start + 1 :]]
    end = next((n for n, line in enumerate(rest) if not line.startswith("  ")), len(rest))
    return [lines[start].removeprefix(first), *rest[:end]]


@pytest.mark.parametrize(("rows", "flags", "said"), ODD.values(), ids=ODD)
def test_run_dry_run_and_inspect_show_one_table(
    tmp_path, without_weights, capsys, rows, flags, said
):
    for name in ("a", "b"):
        Image.new("RGB", (56, 56)).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"problem": "p", "solution": "cat", **row} for row in rows]))
    argv = ["--dataset_name", str(path), *flags.split()]
    into = ["--output_dir", str(tmp_path / "out")]
    assert train.main([*argv, *into, "--dry_run"]) in (0, 1)
    shown = table_of(capsys.readouterr().err, "train:")
    with pytest.raises(AssertionError, match="the model was loaded"):
        train.main([*argv, *into])
    assert table_of(capsys.readouterr().err, "train:") == shown
    assert data_main(["inspect", *argv, "--output", str(tmp_path / "sheet.png")]) == 0
    assert table_of(capsys.readouterr().out, "training:") == shown
    for text in said:
        assert text in "\n".join(shown)


def test_a_key_that_is_there_twice_is_no_row(tmp_path):
    """JSON readers take the last, and nobody would know which was meant."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"problem": "p", "solution": "a"}\n{"problem": "p", "solution": "a", "solution": "b"}\n'
    )
    with pytest.raises(ValueError, match="line 2 .*an object has the key 'solution' twice"):
        load_rows(str(path), "train")


def test_numbers_of_classes_are_their_names(tmp_path, without_weights, capsys):
    rows = datasets.Dataset.from_dict({"problem": ["p"] * 3, "solution": [0, 1, None]})
    rows = rows.cast_column("solution", datasets.ClassLabel(names=["cat", "dog"]))
    rows.save_to_disk(tmp_path / "rows")
    assert SampleDataset(load_rows(str(tmp_path / "rows"), "train")).get(1).solution == "dog"
    argv = ["--dataset_name", str(tmp_path / "rows"), "--output_dir", str(tmp_path / "out")]
    assert train.main([*argv, "--dry_run"]) == 1
    shown = capsys.readouterr().err
    assert "numbers of the column solution to the names of its classes: 2 (row 0, row 1)" in shown
    assert "left out, solution: missing: 1 (row 2)" in shown


def test_hidden_files_are_no_rows(tmp_path):
    for number, name in enumerate(("train.parquet", ".cache/train.parquet", "._train.parquet")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict({"problem": ["p"], "solution": [str(number)]})
        rows.to_parquet(str(tmp_path / name))
    assert load_rows(str(tmp_path), "train")["solution"][:] == ["0"]


def test_held_out_rows_are_in_the_table(sets, without_weights, capsys):
    line = (DIGITS + "--eval_samples 2 --dry_run").replace("{}", str(sets))
    assert train.main(line.split()) == 0
    assert table_of(capsys.readouterr().err, "test:")[0] == " kept 2 of 2 rows"


def test_export_counts_boxes_as_it_is_told(sets, tmp_path, capsys):
    answer = "<answer>[{'Position': [1, 2, 28, 56], 'Confidence': 1}]</answer>"
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{**PICTURE, "problem": "p", "solution": answer}]))
    argv = ["export", "llamafactory", "--dataset_name", str(path), "--output", str(tmp_path / "e")]
    assert data_main([*argv, "--box_space", "pixels"]) == 0
    assert "converted, boxes in pixels to thousandths: 1 (row 0)" in capsys.readouterr().out
    assert "[18, 36, 500, 1000]" in (tmp_path / "e/rows.json").read_text()
