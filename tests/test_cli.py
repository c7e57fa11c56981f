"""The door: the list of commands, every --help, and what launch lines may say."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import environment

from virft_fast import commands
from virft_fast.cli import parse
from virft_fast.config import TRAIN_GROUPS, EvalConfig, UsageError
from virft_fast.data.__main__ import make_parser
from virft_fast.train import parse_args


def subcommands(parser, path=()):
    """(words, parser) of a parser and of all commands below it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from subcommands(below, (*path, name))


DATA = dict(subcommands(make_parser(), ("data",)))
ALL = [(name,) for name in commands.COMMANDS if name != "data"] + list(DATA)


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
    if words in DATA:
        wanted = {a.option_strings[-1]: a.help for a in DATA[words]._actions if a.option_strings}
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
    assert "95 % intervals" in help_of("evaluate", capsys=capsys, monkeypatch=monkeypatch)


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
        ("dtype", "float64", "expected one of auto, float32, bfloat16"),
        ("max_steps", "many", "invalid int value: 'many'"),
    ],
)
def test_a_value_that_is_no_choice_is_named_with_those_there_are(flag, value, said):
    with pytest.raises(UsageError, match=f"--{flag}.*{said}"):
        parse_args([f"--{flag}", value])


def test_switches_work_alone_and_with_a_word():
    for words, bf16 in ((["--bf16"], True), (["--bf16", "false"], False), (["--bf16=true"], True)):
        assert parse_args(words).train.bf16 is bf16
    assert parse_args(["--scale_rewards", "False"]).grpo.scale_rewards == "none"
    assert parse_args(["--output-dir", "a"]).train.output_dir == "a"


def test_a_word_that_is_no_flag_is_named():
    with pytest.raises(UsageError, match="expected a flag, got 'stray'"):
        parse((EvalConfig,), ["--bootstrap", "5", "stray"], "x")
