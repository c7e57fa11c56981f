"""Writes docs/flags.md from the parsers of all commands.

python scripts/make_flags_page.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from virft_fast import merge
from virft_fast.cli import Parser
from virft_fast.config import TRAIN_GROUPS, EvalConfig
from virft_fast.data.__main__ import make_parser as make_data_parser
from virft_fast.mia.__main__ import make_parser as make_mia_parser

PAGE = Path(__file__).parent.parent / "docs/flags.md"
# The flags of training and evaluation, by topic.
TRAINING = {
    "Model": """model_name_or_path model_revision dtype bf16 attn_implementation
        freeze_vision_tower min_pixels max_pixels""",
    "LoRA": "use_peft load_in_4bit lora_r lora_alpha lora_target_modules lora_dropout",
    "Data": """dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
        task columns box_space compat_prompt max_prompt_length max_bad_rows""",
    "Rewards": """reward_funcs reward_weights reward_clip reward_timeout scale_rewards
        multi_objective_aggregation advantage_estimator""",
    "Rollout": """num_generations max_completion_length temperature top_p top_k min_p
        repetition_penalty rollout_backend rollout_cache_tokens offload_rollout_weights
        speculation""",
    "GRPO loss": """beta epsilon_low epsilon_high delta num_iterations loss_type
        importance_sampling_level importance_sampling_correction importance_sampling_mode
        importance_sampling_clip_max importance_sampling_clip_min mask_truncated_completions
        use_bias_correction_kl
        off_policy_mask_threshold entropy_coef top_entropy_quantile sapo_temperature_neg
        sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
        loss_impl""",
    "DPO": "dpo_beta label_smoothing dpo_gamma precompute_ref_log_probs",
    "Batch and length": """per_device_train_batch_size gradient_accumulation_steps
        steps_per_generation dynamic_sampling dynamic_sampling_max_rounds curriculum
        max_tokens_per_microbatch num_train_epochs max_steps""",
    "Optimizer": """optim learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay
        adam_beta1 adam_beta2 adam_epsilon max_grad_norm max_bad_steps""",
    "Speed and memory": """prefix_sharing prefix_attention gradient_checkpointing
        offload_activations use_liger_kernel deepspeed""",
    "Logs and evaluation": """logging_steps report_to run_name log_completions_steps eval_samples
        eval_batch_size""",
    "Checkpoints": """save_steps save_dtype save_only_model save_total_limit
        resume_from_checkpoint""",
    "Run": "algorithm output_dir overwrite_output_dir config dry_run seed ddp_timeout local_rank",
}
EVALUATION = {
    "Models": """model_name_or_path model_revision compare dtype attn_implementation min_pixels
        max_pixels""",
    "Data": """dataset_name dataset_config split task columns box_space compat_prompt annotations
        images allow_missing categories exists_map ask_exists max_samples max_prompt_length
        max_bad_rows""",
    "Answers": """answers reward_funcs sam_path batch_size max_completion_length rollout_backend
        rollout_cache_tokens speculation""",
    "Output": "output overwrite bootstrap seed pictures local_rank",
}
HEAD = """# Flags

This page lists every flag of every command, its default and what it does.
`python scripts/make_flags_page.py` generates it from the program.

Flags of `train` can also be in a YAML file, passed with `--config`. A flag on the command line
overrides the file. [Launch lines](launch_lines.md) lists the flags of other trainers.
"""


def page() -> str:
    """The text of docs/flags.md.

    Raises:
        ValueError: a flag belongs to no topic, or a topic names a flag that doesn't exist.
    """
    parts = [HEAD]
    parts += _by_topic("train", Parser(TRAIN_GROUPS), TRAINING)
    parts += _by_topic("evaluate", Parser((EvalConfig,)), EVALUATION)
    parts += ["## merge\n", *_table(merge.make_parser()._actions)]
    parts += _data_commands(dict(_commands("data", make_data_parser())))
    parts += ["## mia\n"]
    for group in make_mia_parser()._action_groups:
        if any("--help" not in action.option_strings for action in group._group_actions):
            title = {"options": "data and output"}.get(group.title, group.title)
            parts += [f"### {title.capitalize()}\n", *_table(group._group_actions)]
    return "\n".join(parts)


def _by_topic(name: str, parser: argparse.ArgumentParser, topics: dict[str, str]) -> Iterator[str]:
    actions = {a.dest: a for a in parser._actions if a.dest != "help"}
    listed = [flag for flags in topics.values() for flag in flags.split()]
    if sorted(listed) != sorted(actions):
        odd = sorted(set(listed) ^ set(actions)) or "a flag twice"
        raise ValueError(f"{name}: expected each flag in one topic, got {odd}; edit {__file__}")
    yield f"## {name}\n"
    for topic, flags in topics.items():
        yield f"### {topic}\n"
        yield from _table([actions[flag] for flag in flags.split()])


def _data_commands(parsers: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    """Flags that all builds share appear once; so do commands with equal tables."""
    lines = {name: _table(parser._actions) for name, parser in parsers.items()}
    builds = [name for name in lines if name.startswith("data build ")]
    shared = [line for line in lines[builds[0]][2:-1] if all(line in lines[b] for b in builds)]
    yield from ("## data build\n", "### All kinds\n", *lines[builds[0]][:2], *shared, "")
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name in builds:
        own = tuple(line for line in lines.pop(name) if line not in shared)
        kinds.setdefault(own, []).append(name.removeprefix("data build "))
    for own, names in kinds.items():
        yield from (f"### {', '.join(names)}\n", *own)
    for name, own in lines.items():
        yield from (f"## {name}\n", *own)


def _commands(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for command, sub in inner[0].choices.items() if inner else ():
        yield from _commands(f"{name} {command}", sub)
    if not inner and name != "data mia":  # an alias of mia
        yield name, parser


def _table(actions: list[argparse.Action]) -> list[str]:
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    lines += [_line(action) for action in actions if action.dest != "help"]
    return [*lines, ""]


def _line(action: argparse.Action) -> str:
    names = [option for option in action.option_strings if "-" not in option[2:]]
    flag = ", ".join(f"`{name}`" for name in names) or f"`{action.dest.upper()}`"
    meaning = action.help or ""
    choices = action.choices or [v for v in str(action.metavar or "").strip("{}").split(",") if v]
    if choices and (action.choices or str(action.metavar).startswith("{")):
        values = f"{', '.join(map(str, choices))}"
        meaning = f"{meaning}<br>Values: {values}" if meaning else f"Values: {values}"
    meaning = " ".join(meaning.replace("|", "\\|").split())
    return f"| {flag} | {_default(action)} | {meaning} |"


def _default(action: argparse.Action) -> str:
    value = action.default
    if value in (None, argparse.SUPPRESS, [], ""):
        return "required" if action.required else ""
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
