"""Flags of other trainers' launch lines (TRL, transformers, Visual-RFT, VLM-R1) that we don't have.

A value that changes nothing here is accepted; a warning says why. Any other value is an error that
says what to do instead. `docs/launch_lines.md` shows the table to users.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

logger = logging.getLogger("virft_fast")

# Values that mean the same as omitting the flag.
NOTHING = ("none", "null", "", "[]", "{}")
# Values of a switch; YAML turns `no` into False.
_SWITCH = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}


class Foreign(NamedTuple):
    """Flags that do nothing here.

    Attributes:
        flags: names, separated by spaces; `*` matches any ending.
        harmless: values that change nothing, separated by spaces, in addition to NOTHING; `*` is
            any value.
        why: why these have no effect.
        instead: what to do if another value is needed; empty: drop the flag, because of `why`.
    """

    flags: str
    harmless: str
    why: str
    instead: str = ""

    @property
    def advice(self) -> str:
        return self.instead or f"drop it: {self.why}"


# The first entry that matches a flag applies.
FOREIGN = (
    # Rollout
    Foreign("use_vllm", "false", "rollouts run inside the training process",
            "drop it: --rollout_backend native rolls out in the training process and computes a "
            "prompt once for its whole group"),
    Foreign("vllm_*", "*", "they configure vLLM, which is not used"),
    Foreign("use_transformers_continuous_batching use_transformers_paged "
            "transformers_continuous_batching_config cache_implementation use_cache "
            "ds3_gather_for_generation", "*", "the rollout engine manages its own cache"),
    Foreign("generation_kwargs", "", "", "pass --temperature, --top_p, --top_k, --min_p or "
            "--repetition_penalty"),
    Foreign("generation_batch_size", "", "",
            "pass --steps_per_generation: a rollout has that many times "
            "--per_device_train_batch_size prompts on each process"),
    Foreign("num_generations_eval per_device_eval_batch_size eval_accumulation_steps eval_steps "
            "eval_delay eval_do_concat_batches eval_use_gather_object prediction_loss_only "
            "include_for_metrics include_inputs_for_metrics batch_eval_metrics", "*",
            "--eval_samples answers held-out rows once each, --eval_batch_size at a time"),
    Foreign("eval_strategy evaluation_strategy do_eval do_predict eval_on_start "
            "load_best_model_at_end", "no", "held-out rows are scored only with --eval_samples",
            "pass --eval_samples N to score held-out rows before and after training, or evaluate "
            "a checkpoint with python -m virft_fast.evaluate"),
    Foreign("metric_for_best_model greater_is_better", "*", "no checkpoint is chosen as the best"),
    Foreign("bf16_full_eval fp16_full_eval", "false", "evaluation computes as training does"),
    # Loss and rewards
    Foreign("reward_clip_range", "", "", "pass --reward_clip, which clips each function's rewards"),
    Foreign("sync_ref_model", "false", "the reference is the model at the start of the run"),
    Foreign("ref_model_mixup_alpha ref_model_sync_steps", "*", "the reference is never updated"),
    Foreign("use_adaptive_entropy", "false", "--entropy_coef stays as it is"),
    Foreign("entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", "*",
            "--entropy_coef stays as it is"),
    Foreign("label_smoothing_factor", "0", "GRPO has no labels to smooth",
            "pass --label_smoothing with --algorithm dpo"),
    Foreign("average_tokens_across_devices", "true", "tokens are counted over all processes"),
    Foreign("router_aux_loss_coef", "0", "the models have no router"),
    Foreign("reward_model_name_or_path", "", "", "wrap the model in a function for --reward_funcs"),
    Foreign("is_reward_customized_from_vlm_module", "false", "rewards are those of --reward_funcs",
            "name the rewards, such as --reward_funcs grounding_giou format"),
    Foreign("reward_method", "", "", "name the rewards with --reward_funcs"),
    Foreign("max_tool_calling_iterations", "", "", "drop it: completions call no tools"),
    # Data
    Foreign("data_file_paths image_folders arrow_cache_dir", "", "",
            "pass --dataset_name FILE.jsonl, whose image paths are absolute or start at the file's "
            "folder"),
    Foreign("task_type", "", "", "drop it: a row's own problem is the prompt, and --task says what "
            "its solution is"),
    Foreign("val_split_ratio", "0", "no rows are split off", "write the held-out rows into a "
            "split of their own, and pass --dataset_test_split and --eval_samples"),
    Foreign("system_prompt chat_template chat_template_kwargs", "", "",
            "put a system turn into the rows' prompts"),
    Foreign("data_seed", "*", "--seed seeds data order and sampling"),
    Foreign("shuffle_dataset", "true", "rows are always shuffled by --seed"),
    Foreign("train_sampling_strategy", "random", "rows are always shuffled by --seed"),
    Foreign("group_by_length", "false", "rows are always shuffled",
            "drop it, and pass --max_tokens_per_microbatch to fill microbatches evenly"),
    Foreign("length_column_name label_names remove_unused_columns", "*",
            "rewards get all columns of a row"),
    Foreign("dataloader_drop_last", "false", "an epoch's last rows share a step with the next's"),
    Foreign("dataloader_* dataset_num_proc preprocessing_num_workers", "*",
            "the training process reads its own images"),
    Foreign("split_batches dispatch_batches", "false", "every process reads its own rows",
            "divide --per_device_train_batch_size by the number of processes"),
    Foreign("ignore_data_skip", "false", "a resumed run continues with the next row"),
    Foreign("max_anyres_num", "*", "it belongs to InternVL"),
    Foreign("pad_to_multiple_of", "*", "padding doesn't change results"),
    # Optimizer and precision
    Foreign("adafactor", "false", "the optimizer is AdamW"),
    Foreign("optim_args optim_target_modules", "", "", "drop it: the optimizer is AdamW with "
            "--adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay"),
    Foreign("lr_scheduler_kwargs", "", "", "choose a schedule without arguments by "
            "--lr_scheduler_type"),
    Foreign("neftune_noise_alpha", "0", "embeddings get no noise"),
    Foreign("fp16", "false", "precision is --bf16 or float32", "pass --bf16, or neither: float32"),
    Foreign("half_precision_backend fp16_backend fp16_opt_level", "*", "float16 is not used"),
    Foreign("tf32", "*", "products of float32 numbers are not rounded to TF32"),
    Foreign("cast_lm_head_to_fp32", "*", "log-probs are computed in float32"),
    Foreign("disable_dropout", "*", "the models have no dropout"),
    Foreign("torch_compile torch_compile_* torchdynamo torch_empty_cache_steps "
            "gradient_checkpointing_kwargs activation_checkpointing_kwargs liger_kernel_config "
            "use_liger_loss jit_mode_eval use_ipex", "*", "it changes speed or memory only"),
    Foreign("activation_checkpointing", "false", "--gradient_checkpointing does it",
            "pass --gradient_checkpointing"),
    Foreign("auto_find_batch_size", "false", "the batch size is as given",
            "pass --max_tokens_per_microbatch, which bounds what a microbatch holds"),
    Foreign("full_determinism", "false",
            "--seed fixes order and draws; a GPU's sums may round differently"),
    # Model
    Foreign("lora_task_type", "CAUSAL_LM", "the adapter is always a language model's"),
    Foreign("use_rslora use_dora", "false",
            "adapters are plain LoRA, with --lora_r and --lora_alpha"),
    Foreign("lora_target_parameters lora_modules_to_save", "", "",
            "name linear layers with --lora_target_modules"),
    Foreign("load_in_8bit", "false", "weights have 4, 16 or 32 bits", "pass --load_in_4bit"),
    Foreign("bnb_4bit_quant_type", "nf4", "--load_in_4bit stores NF4"),
    Foreign("bnb_* use_bnb_nested_quant", "*", "--load_in_4bit sets it, from --dtype and --bf16"),
    Foreign("trust_remote_code", "false", "no code of a checkpoint is run",
            "drop it: no code of a checkpoint is run; transformers has the Qwen-VL families"),
    Foreign("model_init_kwargs", "", "", "pass --dtype, --attn_implementation or --model_revision"),
    # Processes
    Foreign("ddp_backend", "nccl gloo", "it is nccl on GPUs and gloo on CPUs"),
    Foreign("ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph "
            "ignore_bias_buffers", "*", "gradients are averaged without DDP's wrapper"),
    Foreign("fsdp fsdp_*", "false", "--deepspeed divides a model among processes",
            "pass --deepspeed configs/zero3.json"),
    Foreign("accelerator_config parallelism_config", "", "", "pass --deepspeed with a JSON file"),
    Foreign("use_cpu no_cuda", "false", "a GPU is used where there is one",
            "set CUDA_VISIBLE_DEVICES= (nothing) to hide the GPUs"),
    # Logs
    Foreign("logging_strategy", "steps", "records are written every --logging_steps",
            "pass --logging_steps N"),
    Foreign("logging_first_step logging_dir logging_nan_inf_filter log_level log_level_replica "
            "log_on_each_node disable_tqdm include_num_input_tokens_seen include_tokens_per_second "
            "skip_memory_metrics debug project", "*",
            "metrics.jsonl and trackers have every --logging_steps' means"),
    Foreign("log_completions_hub_repo", "", "", "drop it: completions.jsonl has all completions"),
    Foreign("log_completions log_multimodal log_unique_prompts wandb_log_unique_prompts "
            "num_completions_to_print", "*",
            "completions.jsonl has all completions; --log_completions_steps prints some"),
    Foreign("wandb_* trackio_*", "*", "trackers read their own environment variables"),
    # Saving
    Foreign("save_strategy", "steps", "--save_steps says when to save",
            "pass --save_steps N; 0 saves only at the end"),
    Foreign("save_safetensors", "true", "weights are always saved as safetensors"),
    Foreign("save_on_each_node", "false", "the main process saves",
            "drop it: the main process saves; put --output_dir on a disk that all nodes share"),
    Foreign("enable_jit_checkpoint", "*", "SIGTERM and SIGUSR1 always save a checkpoint"),
    Foreign("restore_callback_states_from_checkpoint", "*", "there are no callbacks"),
    Foreign("push_to_hub push_to_hub_revision overwrite_hub_revision", "false",
            "nothing is uploaded", "upload --output_dir after the run: hf upload NAME OUTPUT_DIR"),
    Foreign("hub_* push_to_hub_*", "*", "nothing is uploaded"),
    Foreign("callbacks benchmarks", "", "", "evaluate with python -m virft_fast.evaluate"),
    Foreign("do_train", "*", "the program always trains"),
)  # fmt: skip


def find(flag: str) -> Foreign | None:
    """The table's entry for a flag, given without dashes; None if it has none."""
    name = flag.replace("-", "_")
    fits = (f for f in FOREIGN if any(fnmatchcase(name, pattern) for pattern in f.flags.split()))
    return next(fits, None)


def set_aside(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words of a command line without the table's flags and their values. Each entry of the
    table that applies causes one warning.

    Args:
        names: our own flags, to which the table never applies.
    Raises:
        ValueError: values that would change the run; names all such flags.
    """
    kept: list[str] = []
    used: dict[Foreign, list[str]] = {}
    wrong: list[str] = []
    rest = list(words)
    while rest:
        flag, joined, value = rest.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        foreign = find(name) if flag.startswith("--") and name not in names else None
        if foreign is None:
            kept.append(flag + joined + value)
            continue
        values = [value] if joined else []
        while rest and not joined and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        said = " ".join(values) if values else "true"
        if _is_harmless(said, foreign):
            used.setdefault(foreign, []).append(f"--{name}")
        else:
            expected = " or ".join(foreign.harmless.split()) or "no such flag"
            wrong.append(f"--{name} {said}: expected {expected}; {foreign.advice}")
    if wrong:
        raise ValueError("; ".join(wrong))
    for foreign, flags in used.items():
        listed = ", ".join(dict.fromkeys(flags))
        logger.warning("without effect: %s; %s", listed, foreign.why or "it is not given")
    return kept


def _is_harmless(value: str, foreign: Foreign) -> bool:
    plain = _plain(value)
    return value.lower() in NOTHING or any(
        harmless == "*" or plain == _plain(harmless) for harmless in foreign.harmless.split()
    )


def _plain(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return _SWITCH.get(value.lower(), value.lower())
