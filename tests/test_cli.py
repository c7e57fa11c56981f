"""The door: the list of commands, every --help, and what launch lines may say."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from processes import environment

from virft_fast import commands, dist
from virft_fast.arguments import UsageError, flag_names
from virft_fast.cli import parse
from virft_fast.config import TRAIN_GROUPS, EvalConfig
from virft_fast.data.__main__ import make_parser
from virft_fast.launch_lines import FOREIGN, find
from virft_fast.mia.__main__ import make_parser as make_mia_parser
from virft_fast.models.source import find_model
from virft_fast.output_lock import OutputLock
from virft_fast.tasks import load_reward_funcs
from virft_fast.train import main, parse_args
from virft_fast.train.setup import prepare_output_dir

DOCS = Path(__file__).parent.parent / "docs"


def subcommands(parser, path=()):
    """(words, parser) of a parser and of all commands below it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from subcommands(below, (*path, name))


PARSERS = {**dict(subcommands(make_parser(), ("data",))), ("mia",): make_mia_parser()}
ALL = [(name,) for name in commands.COMMANDS if (name,) not in PARSERS] + list(PARSERS)


def help_of(*words, capsys, monkeypatch, columns=100):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        commands.main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def squeezed(text):
    return "".join(text.split())


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_says_what_its_flags_are(words, capsys, monkeypatch):
    """Each flag once, with all of its help, whatever signs are in it, as wide as the terminal."""
    text = help_of(*words, capsys=capsys, monkeypatch=monkeypatch)
    helps = [ln for ln in text.partition("options:")[2].splitlines() if ln.startswith(" " * 32)]
    assert max(map(len, helps), default=0) <= 100
    wanted = {}
    if words in PARSERS:
        flags = [action for action in PARSERS[words]._actions if action.option_strings]
        wanted = {action.option_strings[-1]: action.help for action in flags}
    elif words[0] in ("train", "evaluate"):
        groups = TRAIN_GROUPS if words[0] == "train" else (EvalConfig,)
        wanted = {f"--{f.name}": f.metadata["help"] for group in groups for f in fields(group)}
        assert all(f"\n{group._argument_group_name}:\n" in text for group in groups)
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert set(wanted) <= set(listed) and len(set(listed)) == len(listed)
    for said in wanted.values():
        assert squeezed(said or "") in squeezed(text)


def test_help_shows_choices_defaults_and_one_spelling(capsys, monkeypatch):
    text = help_of("train", capsys=capsys, monkeypatch=monkeypatch)
    assert "--algorithm {grpo,sft,dpo}" in text and "--output-dir" not in text
    assert "(default: 1e-06)" in text and "--bf16 [true|false]" in text and "--max_steps N" in text
    assert "95% intervals" in help_of("evaluate", capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_the_commands_are_listed_with_a_line_each(argv, capsys):
    assert commands.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in commands.COMMANDS)


def test_an_unknown_command_names_the_closest(capsys):
    assert commands.main(["evalute"]) == 2
    assert "did you mean evaluate?" in capsys.readouterr().err
    assert commands.main(["zzz"]) == 2
    assert "expected one of train, " in capsys.readouterr().err


def test_the_package_runs_as_a_program_and_lists_without_torch():
    code = "import sys, runpy; sys.argv = ['virft_fast', '--help']\n" \
        "try: runpy.run_module('virft_fast', run_name='__main__')\n" \
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_a_command_gets_the_rest_of_the_line(capsys):
    assert commands.main(["train", "--learning_rat", "1"]) == 2
    assert "did you mean --learning_rate" in capsys.readouterr().err


# What flags may say.


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("loss_type", "gspoo", "expected one of grpo, bnpo, .*did you mean gspo"),
        ("scale_rewards", "std", "expected one of group, batch, none, got 'std'"),
        ("algorithm", "ppo", "expected one of grpo, sft, dpo"),
        ("advantage_estimator", "reinforce_p", "expected one of grpo, .*did you mean reinforce_pp"),
        ("dtype", "float64", "expected one of auto, float32, bfloat16"),
        ("max_steps", "many", "invalid int value: 'many'"),
    ],
)
def test_a_value_that_is_no_choice_is_named_with_those_there_are(flag, value, said):
    with pytest.raises(UsageError, match=f"--{flag}.*{said}"):
        parse_args([f"--{flag}", value])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--reward_clip 1", "expected two numbers, the lower one first, got .1.0."),
        ("--reward_clip 1 0", "expected two numbers, the lower one first"),
        ("--reward_clip nan 1", "expected two numbers, the lower one first"),
        ("--multi_objective_aggregation normalize_then_sum --advantage_estimator rloo",
         "--advantage_estimator: expected grpo with --multi_objective_aggregation"),
    ],
)  # fmt: skip
def test_what_advantages_need_is_said(line, said):
    with pytest.raises(UsageError, match=said):
        parse_args(line.split())


def test_switches_work_alone_and_with_a_word():
    for words, bf16 in ((["--bf16"], True), (["--bf16", "false"], False), (["--bf16=true"], True)):
        assert parse_args(words).train.bf16 is bf16
    assert parse_args(["--scale_rewards", "False"]).grpo.scale_rewards == "none"
    assert parse_args(["--output-dir", "a"]).train.output_dir == "a"


def test_a_word_that_is_no_flag_is_named():
    with pytest.raises(UsageError, match="expected a flag, got 'stray'"):
        parse((EvalConfig,), ["--bootstrap", "5", "stray"], "x")


# Launch lines of other trainers.


def trl_fields():
    trl = pytest.importorskip("trl")
    scripts = pytest.importorskip("trl.scripts.grpo")
    for group in (trl.GRPOConfig, scripts.GRPOScriptArguments, trl.ModelConfig):
        for field in fields(group):
            made = field.default_factory
            yield field.name, field.default if made is MISSING else made()


def test_every_field_of_trl_is_ours_or_accepted_at_its_default(tmp_path, caplog):
    """From a file, where each type of value can be written."""
    path, wrong = tmp_path / "trl.yaml", set()
    for name, default in trl_fields():
        path.write_text(yaml.safe_dump({name: default}))
        try:
            parse_args(["--config", str(path)])
        except UsageError:
            wrong.add(name)
    assert not wrong


GROUPED_REC = """
    --use_vllm False --output_dir out --resume_from_checkpoint True --model_name_or_path tiny
    --dataset-name rows.jsonl --per_device_train_batch_size 8 --gradient_accumulation_steps 2
    --gradient_checkpointing true --logging_steps 1 --num_train_epochs 2 --bf16
    --attn_implementation flash_attention_2 --run_name rec --data_seed 42 --save_steps 100
    --num_generations 8 --max_completion_length 2048 --reward_funcs grounding_giou format
    --beta 0.04 --report_to none --learning_rate 1e-5 --use_peft true --lora_r 64 --lora_alpha 128
    --lora_dropout 0.05 --lora_task_type CAUSAL_LM --freeze_vision_modules true
"""
TRAINING_ARGUMENTS = """
    --output_dir out --do_train --torch_dtype bfloat16 --optim adamw_torch --tf32 true --fp16 False
    --evaluation_strategy no --save_strategy steps --dataloader_num_workers 4 --ddp_timeout 1800
    --dataloader_pin_memory --remove_unused_columns False --logging_first_step --disable_tqdm False
    --push_to_hub False --report_to=none --label_smoothing_factor 0.0 --warmup_ratio 0.03
    --ddp_find_unused_parameters=False --save_safetensors True --log_level info
"""
ROLLOUTS = """
    --output_dir out --use_vllm=false --vllm_mode colocate --vllm_gpu_memory_utilization 0.3
    --log_completions --num_completions_to_print 4 --shuffle_dataset --disable_dropout false
    --gradient_checkpointing_kwargs '{"use_reentrant": false}' --epsilon 0.2 --loss_type dapo
    --scale_rewards True --eval_strategy no --trust_remote_code false --generation_batch_size None
    --max_prompt_length 1024 --temperature 0.9 --seed 7
"""


@pytest.mark.parametrize("line", [GROUPED_REC, TRAINING_ARGUMENTS, ROLLOUTS])
def test_public_launch_lines_start(line, caplog):
    with caplog.at_level(logging.WARNING):
        config = parse_args(shlex.split(line))
    assert config.train.output_dir == "out" and "without effect: --" in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        "--advantage_estimator rloo",
        "--advantage_estimator reinforce_pp",
        "--multi_objective_aggregation normalize_then_sum",
    ],
)
def test_scale_rewards_is_without_effect_on_advantages_with_a_scale_of_their_own(flags, caplog):
    """TRL ignores it as well; the default is no choice of the user's."""
    parse_args(flags.split())
    parse_args(["--scale_rewards", "batch"])
    assert not caplog.records
    for given in ("batch", "group"):
        caplog.clear()
        parse_args([*flags.split(), "--scale_rewards", given])
        assert f"without effect with {flags}: --scale_rewards" in caplog.text


def test_what_a_launch_line_says_is_kept(caplog):
    """Flags of ours beside those that are set aside, and the two that are changed or used."""
    with caplog.at_level(logging.WARNING):
        config = parse_args(shlex.split(GROUPED_REC))
    assert config.model.lora_dropout == 0 and "--lora_dropout 0.05: set to 0" in caplog.text
    assert config.model.freeze_vision_tower and config.model.use_peft and config.train.bf16
    assert config.grpo.reward_funcs == ["grounding_giou", "format"]
    assert config.data.dataset_name == "rows.jsonl"
    assert parse_args(shlex.split(TRAINING_ARGUMENTS)).train.ddp_timeout == 1800
    assert parse_args(shlex.split(ROLLOUTS)).grpo.scale_rewards == "group"


def test_each_reason_is_given_once(caplog):
    with caplog.at_level(logging.WARNING):
        parse_args(
            ["--data_seed", "1", "--data-seed=2", "--vllm_mode", "a", "--vllm_server_port=1"]
        )
    assert len(caplog.records) == 2 and "--seed seeds data order" in caplog.text
    assert "--vllm_mode, --vllm_server_port" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--use_vllm True", "--rollout_backend native rolls out in the training process"),
        ("--use_vllm", "--use_vllm true: expected false"),
        ("--adafactor true", "expected false.*the optimizer is AdamW"),
        ("--optim sgd", "expected one of adamw_torch_fused, adamw_torch, adamw_8bit"),
        ("--push_to_hub True", "hf upload"),
        ("--save_strategy no", "--save_steps N; 0 saves only at the end"),
        ("--save_strategy epoch", "--save_steps N"),
        ("--eval_strategy steps", "--eval_samples"),
        ("--fp16", "pass --bf16, or neither"),
        ("--load_in_8bit true", "pass --load_in_4bit"),
        ("--load_in_4bit true", "expected --use_peft as well"),
        ("--bnb_4bit_quant_type fp4", "stores NF4"),
        ("--label_smoothing_factor 0.1", "--label_smoothing"),
        ("--lora_task_type SEQ_CLS", "expected CAUSAL_LM"),
        ("--data_file_paths a.jsonl:b.jsonl", "--dataset_name FILE.jsonl"),
        ("--is_reward_customized_from_vlm_module True", "--reward_funcs grounding_giou"),
        ("--fsdp full_shard", "--deepspeed configs/zero3.json"),
        ("--sync_ref_model true --adafactor true", "sync_ref_model true.*; --adafactor true"),
        ("--lora_dropout 1", "a share in"),
        ("--ddp_timeout 0", "seconds above 0"),
    ],
)
def test_a_value_that_would_change_the_run_is_an_error_that_says_what_to_do(words, said):
    with pytest.raises(UsageError, match=said):
        parse_args(words.split())


def test_a_file_is_read_as_the_command_line_is(tmp_path, caplog):
    path = tmp_path / "run.yaml"
    path.write_text(
        "use_vllm: false\nsave_strategy: steps\nhub_model_id: null\neval_strategy: no\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\ninclude_for_metrics: []\n"
        "beta: 0.5\n"
    )
    assert parse_args(["--config", str(path)]).grpo.beta == 0.5
    assert "--use_vllm" in caplog.text and "hub_model_id" not in caplog.text
    path.write_text("use_vllm: true\n")
    with pytest.raises(UsageError, match="--use_vllm True: expected false"):
        parse_args(["--config", str(path)])


def test_the_timeout_reaches_the_process_group(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(dist.torch_dist, "init_process_group", lambda *a, **k: waits.append(k))
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["--ddp_timeout", "90", "--output_dir", " "]) == 2
    assert waits[0]["timeout"].total_seconds() == 90


def test_resuming_if_there_is_something_to_resume(tmp_path, capsys):
    """VLM-R1's meaning of true; a name, or latest, has to be there."""
    start = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint"]
    lock, source = OutputLock(tmp_path / "run"), find_model("tiny")
    assert prepare_output_dir(parse_args([*start, "True"]), lock, source) is None
    assert "no checkpoint in" in capsys.readouterr().err
    assert parse_args([*start, "false"]).train.resume_from_checkpoint is None
    with pytest.raises(FileNotFoundError, match="got none"):
        prepare_output_dir(parse_args([*start, "latest"]), lock, source)


def test_the_table_takes_none_of_our_flags_and_each_line_says_what_it_has_to():
    spelled = "vllm_importance_sampling"  # ours, though others of vLLM are not
    ours = [name for name in flag_names(TRAIN_GROUPS) if not name.startswith(spelled)]
    for foreign in FOREIGN:
        for pattern in foreign.flags.split():
            assert not [name for name in ours if fnmatchcase(name, pattern)]
            assert find(pattern.replace("*", "x")) is foreign or find(pattern) is foreign
        assert foreign.why or (foreign.instead and not foreign.harmless)


def test_the_docs_show_the_table():
    rows = []
    for foreign in FOREIGN:
        flags = ", ".join(f"`{name}`" for name in foreign.flags.split())
        values = ", ".join("any" if v == "*" else f"`{v}`" for v in foreign.harmless.split())
        advice = "" if foreign.harmless == "*" else foreign.advice
        why, advice = (re.sub(r"--\w+", r"`\g<0>`", text) for text in (foreign.why, advice))
        rows.append(f"| {flags} | {values} | {why} | {advice} |")
    assert "\n".join(rows) in (DOCS / "launch_lines.md").read_text()


REWARDS_FILE = """
def plain(completions, **_):
    return [1.0] * len(completions)

class Scorer:
    def __call__(self, completions, **_):
        return [2.0] * len(completions)
    def method(self, completions, **_):
        return [3.0] * len(completions)

class Needy:
    def __init__(self, what): pass

scorer = Scorer()
number = 1
"""


@pytest.mark.parametrize("kind", ["file", "module"])
def test_rewards_of_files_and_modules(tmp_path, monkeypatch, kind):
    (tmp_path / "some_rewards.py").write_text(REWARDS_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    where = str(tmp_path / "some_rewards.py") if kind == "file" else "some_rewards"
    found = load_reward_funcs([f"{where}:{n}" for n in ("plain", "Scorer", "scorer.method")])
    assert [name for name, _ in found] == ["plain", "Scorer", "method"]
    assert [function(completions=["a"]) for _, function in found] == [[1.0], [2.0], [3.0]]
    for name, said in (
        ("plan", "did you mean plain?"), ("Needy", "created without arguments"),
        ("number", "no function 'number'"), ("scorer.metod", "did you mean method?"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"--reward_funcs") as caught:
            load_reward_funcs([f"{where}:{name}"])
        assert said in str(caught.value)
    with pytest.raises(ValueError, match="can't be imported"):
        load_reward_funcs(["no_such_package.module:f"])


def test_a_tracker_that_is_missing_is_found_before_anything_is_loaded(tmp_path, capsys):
    argv = ["--model_name_or_path", "no/such", "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--report_to", "nonsense"]) == 2
    assert "--report_to: expected one of" in capsys.readouterr().err
