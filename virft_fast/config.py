"""The arguments of a training run and of an evaluation: small dataclasses, checked when made.

Names are those of TRL and Visual-RFT, so that their launch lines start this program; defaults are
those of the Visual-RFT paper (lr 1e-6, beta 0.04, 256 tokens, 8 completions). `virft_fast.cli`
parses them. Only the commands and the algorithms use these objects.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field

from virft_fast.arguments import UsageError as UsageError
from virft_fast.arguments import arg, check_choices, check_limit, require
from virft_fast.arguments import flag_names as known_flags  # noqa: F401
from virft_fast.arguments import given_flags as given_flags
from virft_fast.arguments import unknown_flag_message as unknown_flag_message
from virft_fast.arguments import usage as usage
from virft_fast.batch import Row
from virft_fast.kernels.loss_args import LEVELS, LOSS_TYPES

logger = logging.getLogger("virft_fast")

# Name -> the module whose ALGORITHM it is; see `virft_fast.algorithms`.
ALGORITHMS = {name: f"virft_fast.algorithms.{name}" for name in ("grpo", "sft", "dpo")}
TASKS = ("auto", "detection", "classification", "grounding", "choice", "number")
EVAL_TASKS = (*TASKS, "coco", "lvis")
BOX_SPACES = ("auto", "thousandths", "pixels", "unit")
ANSWERS = ("lenient", "visual_rft")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
SAVE_DTYPES = (*DTYPES, "float16")
LOSS_IMPLS = ("fused", "reference")
ROLLOUT_BACKENDS = ("native", "hf")
PREFIX_ATTENTIONS = ("two_part", "flex", "dense")

# GRPO options that also apply to SFT and DPO.
BESIDE_GRPO = """
    max_completion_length loss_impl prefix_sharing prefix_attention rollout_backend
    rollout_cache_tokens
""".split()


@dataclass
class ModelConfig:
    """Which model is trained, and which part of it."""

    _argument_group_name = "Model"
    model_name_or_path: str = arg(
        "tiny", "A checkpoint folder, a hub id, or `tiny` for the embedded model."
    )
    model_revision: str | None = arg(None, "Revision of a hub id.")
    dtype: str = arg(
        "auto", "auto: bfloat16 with --bf16, else float32.", "torch_dtype", choices=DTYPES
    )
    attn_implementation: str = arg(
        "sdpa", "flash_attention_2 needs flash-attn.", choices=ATTENTIONS
    )
    freeze_vision_tower: bool = arg(
        False, "Train the language model only.", "freeze_vision_modules"
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass.")
    use_liger_kernel: bool = arg(False, "Patch the model with liger-kernel (CUDA).", "use_liger")
    min_pixels: int | None = arg(None, "Images are scaled up to at least this many pixels.")
    max_pixels: int | None = arg(None, "Images are scaled down to at most this many pixels.")
    use_peft: bool = arg(
        False, "Train a LoRA adapter: a new one, or the one of the folder that the model names."
    )
    lora_r: int | None = arg(None, "Rank of the adapter; default: the folder's adapter's, or 16.")
    lora_alpha: float | None = arg(
        None, "The adapter is scaled by alpha / r; default: the folder's adapter's, or 32."
    )
    lora_dropout: float = arg(0.0, "Set to 0 with a warning: two passes must agree.")
    lora_target_modules: list[str] = arg(
        [],
        "Names of the linear layers that get an adapter; empty: the folder's adapter's, or all of "
        "the language model's layers.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self, "a positive number of pixels", "min_pixels max_pixels")
        _check_pixels(self.min_pixels, self.max_pixels)
        check_limit(self, "a positive number", "lora_r lora_alpha")
        check_limit(self, "a share in [0, 1)", "lora_dropout")
        if self.lora_dropout:
            logger.warning(
                "--lora_dropout %s: set to 0, because the loss compares log-probs of two passes, "
                "and dropout would make them differ",
                self.lora_dropout,
            )
            self.lora_dropout = 0.0
        bad = [name for name in self.lora_target_modules if name in ("lm_head", "embed_tokens")]
        require(not bad, "lora_target_modules", "no lm_head and no embed_tokens", bad)


@dataclass
class DataConfig:
    """Where the samples come from, and how many bad rows to tolerate."""

    _argument_group_name = "Data"
    dataset_name: str = arg(
        "shapes_detection",
        "A save_to_disk folder, JSON, JSONL, CSV or parquet file, hub id, or a demo data set: "
        "shapes_detection, digits_classification.",
    )
    dataset_config: str | None = arg(
        None, "Configuration name of a hub data set, or of a folder with a README.md like one."
    )
    dataset_train_split: str = arg("train", "Split to train on.")
    dataset_test_split: str = arg("test", "Split for --eval_samples.")
    dataset_streaming: bool = arg(
        False, "Read local or hub parquet files piece by piece while training."
    )
    task: str = arg("auto", "Kind of task; auto: inferred from the data.", choices=TASKS)
    columns: list[str] = arg(
        [], "Columns with other names: ours=theirs, such as problem=question solution=answer."
    )
    box_space: str = arg(
        "auto",
        "Unit of boxes in rows without a column extent: thousandths of the image's sides, its "
        "pixels, unit (0..1); auto: thousandths, or an error on signs of another unit.",
        choices=BOX_SPACES,
    )
    compat_prompt: bool = arg(
        False, "LISA's conversations: ask for the box in exactly the original's words."
    )
    max_prompt_length: int | None = arg(
        None, "Longer prompts, in tokens with their images, are skipped and counted, never cut."
    )
    max_bad_rows: int = arg(100, "Stop when more rows than this can't be used.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self, "0 or more", "max_bad_rows")
        check_limit(self, "a positive number", "max_prompt_length")


@dataclass
class GRPOConfig:
    """Rollout, rewards and loss. Definitions are those of TRL 1.16's GRPOConfig."""

    _argument_group_name = "GRPO"
    reward_funcs: list[str] = arg(
        [],
        "Names, path/to/file.py:function or package.module:function; empty: the task's default "
        "rewards.",
    )
    reward_weights: list[float] = arg([], "One weight a reward function; empty: all 1.")
    num_generations: int = arg(8, "Completions a prompt (G).")
    max_completion_length: int = arg(256, "Longest completion in tokens.")
    temperature: float = arg(1.0, "Sampling temperature; the loss uses the same.")
    top_p: float = arg(1.0, "Nucleus sampling; 1 is off. Not replayed in the loss.")
    top_k: int = arg(0, "Sample among the k likeliest tokens; 0 is off. Not replayed in the loss.")
    min_p: float = arg(
        0.0,
        "Drop tokens less likely than this share of the best one's probability; 0 is off. "
        "Not replayed in the loss.",
    )
    repetition_penalty: float = arg(
        1.0,
        "Above 1 makes tokens that occurred before less likely; 1 is off. "
        "Not replayed in the loss.",
    )
    rollout_backend: str = arg(
        "native", "hf: transformers' generate, to compare with.", choices=ROLLOUT_BACKENDS
    )
    rollout_cache_tokens: int | None = arg(
        None, "Tokens whose keys and values a rollout holds at once; None: as many as fit."
    )
    prefix_sharing: str = arg(
        "auto",
        "Read a prompt once for all its completions; auto: where possible.",
        choices=("auto", "on", "off"),
    )
    prefix_attention: str = arg(
        "two_part", "Attention over a shared prompt; flex needs CUDA.", choices=PREFIX_ATTENTIONS
    )
    beta: float = arg(0.04, "Weight of the KL to the reference model; 0 loads none.")
    epsilon_low: float = arg(0.2, "The ratio is kept above 1 - epsilon_low.", "epsilon")
    epsilon_high: float | None = arg(None, "... and below 1 + epsilon_high; None: epsilon_low.")
    delta: float | None = arg(None, "Upper bound of the unclipped ratio (two-sided clipping).")
    num_iterations: int = arg(1, "Optimizer passes over one batch of rollouts (mu).")
    loss_type: str = arg("grpo", "A token's loss, and how it is averaged.", choices=LOSS_TYPES)
    loss_impl: str = arg(
        "fused",
        "reference: whole logits and their log-softmax, to compare with.",
        choices=LOSS_IMPLS,
    )
    scale_rewards: str = arg(
        "group",
        "What divides the centered rewards; true is group, false is none.",
        choices=("group", "batch", "none"),
    )
    importance_sampling_level: str = arg(
        "token", "Whose probability ratio is clipped.", choices=LEVELS
    )
    mask_truncated_completions: bool = arg(False, "Leave completions without EOS out of the loss.")

    def __post_init__(self) -> None:
        self.scale_rewards = {"true": "group", "false": "none"}.get(
            str(self.scale_rewards).lower(), str(self.scale_rewards)
        )
        check_choices(self)
        pairs = "at least 2 (an advantage compares the completions of one prompt)"
        check_limit(self, pairs, "num_generations")
        if self.reward_funcs:  # else the task provides them, once the data set is read
            self.weights_of(self.reward_funcs)
        finite = all(math.isfinite(weight) for weight in self.reward_weights)
        require(finite, "reward_weights", "finite numbers", self.reward_weights)
        check_limit(self, "a positive number", "max_completion_length rollout_cache_tokens")
        check_limit(self, "a number above 0", "temperature repetition_penalty")
        check_limit(self, "a number in (0, 1]", "top_p")
        check_limit(self, "0 (off) or more", "top_k")
        check_limit(self, "a number in [0, 1)", "min_p epsilon_low")
        check_limit(self, "a number, 0 or more", "beta")
        check_limit(self, "0 or more", "epsilon_high")
        check_limit(self, "a ratio above 1", "delta")
        check_limit(self, "at least 1", "num_iterations")

    def weights_of(self, reward_funcs: list[str]) -> list[float]:
        """One weight for each of these reward functions, or a ValueError."""
        if self.reward_weights and len(self.reward_weights) != len(reward_funcs):
            raise ValueError(
                f"--reward_weights: expected {len(reward_funcs)} weights, one for each reward "
                f"function {reward_funcs}, got {self.reward_weights}"
            )
        return self.reward_weights or [1.0] * len(reward_funcs)


@dataclass
class DPOConfig:
    """Direct preference optimization, with --algorithm dpo."""

    _argument_group_name = "DPO"
    dpo_beta: float = arg(0.1, "Weight of staying close to the reference.")
    label_smoothing: float = arg(
        0.0,
        "Share of preferences assumed to be swapped (conservative DPO; TRL's sigmoid assumes "
        "none).",
    )
    dpo_gamma: float = arg(0.0, "Weight of the chosen answers' mean cross entropy in the loss.")
    precompute_ref_log_probs: bool = arg(
        False, "Compute the reference's log-probs once, before training, and keep no reference."
    )

    def __post_init__(self) -> None:
        check_limit(self, "a number above 0", "dpo_beta")
        check_limit(self, "a share in [0, 0.5)", "label_smoothing")
        check_limit(self, "a number, 0 or more", "dpo_gamma")


@dataclass
class TrainConfig:
    """The run: optimizer, length, logs, checkpoints."""

    _argument_group_name = "Run"
    algorithm: str = arg(
        "grpo",
        "sft: fine-tuning on the solutions (or a column completion); dpo: on pairs of a chosen and "
        "a rejected answer.",
        choices=ALGORITHMS,
    )
    output_dir: str = arg("runs/grpo", "Folder for everything that this run writes.")
    overwrite_output_dir: bool = arg(False, "Delete what an earlier run left in --output_dir.")
    run_name: str | None = arg(None, "Name of the run in the trackers; default: output_dir's.")
    config: str | None = arg(None, "A YAML file of flags; flags on the command line win.")
    dry_run: bool = arg(False, "Print and check what would run, then stop.")
    seed: int = arg(42, "Seed of the data order and of the sampling.")
    per_device_train_batch_size: int = arg(
        1, "Prompts in one microbatch; each gets num_generations completions."
    )
    gradient_accumulation_steps: int = arg(1, "Microbatches a step on each process.")
    max_tokens_per_microbatch: int | None = arg(
        None, "Fill microbatches with whole groups up to this many tokens instead."
    )
    num_train_epochs: float = arg(1.0, "Passes over the data.")
    max_steps: int = arg(-1, "Number of steps; wins over num_train_epochs when positive.")
    learning_rate: float = arg(1e-6, "Peak learning rate of AdamW.")
    weight_decay: float = arg(0.0, "AdamW's decoupled weight decay.")
    adam_beta1: float = arg(0.9, "AdamW's first beta.")
    adam_beta2: float = arg(0.999, "AdamW's second beta.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    lr_scheduler_type: str = arg("linear", "Any schedule name of transformers.")
    warmup_steps: float = arg(0.0, "Steps of linear warm-up; below 1 a share of all steps.")
    warmup_ratio: float = arg(0.0, "Share of all steps for warm-up, if warmup_steps is 0.")
    max_grad_norm: float = arg(1.0, "Gradients are scaled down to this norm; 0 is off.")
    bf16: bool = arg(False, "Compute in bfloat16; optimizer state stays float32.")
    deepspeed: str | None = arg(None, "DeepSpeed JSON; 'auto' values are filled in.")
    logging_steps: int = arg(1, "Steps between two records of metrics.jsonl.")
    report_to: list[str] = arg(["none"], "tensorboard, wandb, trackio, ..., all or none.")
    log_completions_steps: int = arg(0, "Steps between two tables of samples; 0: never.")
    save_steps: int = arg(100, "Steps between two checkpoints; 0: only at the end.")
    save_dtype: str = arg(
        "auto",
        "Dtype of saved weights: float32, bfloat16, float16, or auto: as trained, except that a "
        "whole model trained with --bf16 is stored in the dtype of the model it began with.",
    )
    save_only_model: bool = arg(False, "Checkpoints without engine state can't be resumed.")
    save_total_limit: int | None = arg(None, "Keep only this many latest checkpoints.")
    resume_from_checkpoint: str | None = arg(
        None, "A checkpoint folder, or latest; true: the latest, if there is one."
    )
    max_bad_steps: int = arg(10, "Stop after this many non-finite steps in a row.")
    eval_samples: int = arg(0, "Held-out samples scored greedily before and after training.")
    eval_batch_size: int = arg(32, "Prompts in one batch of that evaluation.")
    ddp_timeout: float = arg(1800.0, "Seconds without progress until waiting processes exit.")
    reward_timeout: float = arg(300.0, "Seconds one call of a reward function may take.")
    local_rank: int = arg(-1, "Set by the deepspeed launcher; only the environment counts.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self, "seconds above 0", "ddp_timeout reward_timeout")
        if str(self.resume_from_checkpoint).lower() in ("false", "none"):
            self.resume_from_checkpoint = None
        check_limit(self, "at least 1", "per_device_train_batch_size gradient_accumulation_steps")
        check_limit(self, "at least 1", "logging_steps max_bad_steps eval_batch_size")
        check_limit(self, "at least 1", "save_total_limit")
        check_limit(self, "a number, 0 or more", "learning_rate weight_decay max_grad_norm")
        check_limit(self, "a number, 0 or more", "save_steps log_completions_steps eval_samples")
        check_limit(self, "a number, 0 or more", "warmup_steps")
        check_limit(self, "a number in [0, 1)", "adam_beta1 adam_beta2")
        check_limit(self, "a number above 0", "adam_epsilon")
        check_limit(self, "a share in [0, 1]", "warmup_ratio")
        check_limit(self, "a number in [0, 2^32)", "seed")
        check_limit(self, "a positive number", "max_tokens_per_microbatch")
        dtypes = f"one of {SAVE_DTYPES}"
        require(self.save_dtype in SAVE_DTYPES, "save_dtype", dtypes, self.save_dtype)
        check_limit(self, "a number of steps, or -1: --num_train_epochs", "max_steps")
        if self.max_steps <= 0:
            check_limit(self, "a number above 0", "num_train_epochs")


@dataclass
class RunConfig:
    """All of a training run's arguments, grouped."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def flat(self) -> Row:
        """Every flag with its value, as in a --config file."""
        groups = (self.model, self.data, self.grpo, self.dpo, self.train)
        return {name: value for group in groups for name, value in asdict(group).items()}


@dataclass
class EvalConfig:
    """Arguments of `python -m virft_fast.evaluate`."""

    _argument_group_name = "Evaluation"
    model_name_or_path: str = arg("tiny", "A checkpoint folder, a hub id, or `tiny`.")
    model_revision: str | None = arg(None, "Revision of a hub id.")
    compare: list[str] = arg([], "Several models instead of one, side by side in one table.")
    dataset_name: str | None = arg(None, "As in training; default: shapes_detection.")
    dataset_config: str | None = arg(None, "Configuration name of a hub data set.")
    split: str = arg("test", "Split to evaluate.", "dataset_test_split")
    task: str = arg(
        "auto",
        "Kind of task; auto: inferred from the data; coco and lvis: detection by COCO's protocol.",
        choices=EVAL_TASKS,
    )
    answers: str = arg(
        "lenient",
        "How answers are read: as the rewards do, or as the original's evaluation does.",
        choices=ANSWERS,
    )
    annotations: str | None = arg(None, "An instances file of COCO or LVIS instead of a data set.")
    images: str | None = arg(None, "Folder of its images.")
    categories: str = arg(
        "all",
        "coco and lvis: all, names separated by commas, or base65, novel15, few8, lvis13, lvis6.",
    )
    compat_prompt: bool = arg(False, "As in training.")
    columns: list[str] = arg([], "As in training.")
    box_space: str = arg("auto", "As in training.", choices=BOX_SPACES)
    exists_map: str | None = arg(
        None, "JSON {image: [category, ...]}: ask only about these, as Visual-RFT does."
    )
    ask_exists: bool = arg(
        False, "First ask the model which categories an image has, then only about these."
    )
    allow_missing: bool = arg(False, "Evaluate without the images that are missing.")
    sam_path: str | None = arg(None, "grounding: a SamModel, for gIoU and cIoU of masks.")
    reward_funcs: list[str] = arg([], "As in training; empty: the task's default rewards.")
    max_samples: int = arg(0, "Evaluate only this many rows, the first; 0: all.")
    batch_size: int = arg(16, "Prompts in one batch.", "per_device_eval_batch_size")
    max_completion_length: int = arg(1024, "Longest completion in tokens; as the original's.")
    max_prompt_length: int | None = arg(None, "A longer prompt is skipped and counted.")
    max_bad_rows: int = arg(100, "Stop when more rows than this can't be used.")
    rollout_backend: str = arg("native", "hf: transformers' generate.", choices=ROLLOUT_BACKENDS)
    rollout_cache_tokens: int | None = arg(None, "As in training.")
    dtype: str = arg(
        "auto", "auto: bfloat16 on a GPU, else float32.", "torch_dtype", choices=DTYPES
    )
    attn_implementation: str = arg("sdpa", "As in training.", choices=ATTENTIONS)
    min_pixels: int | None = arg(None, "As in training; both budgets should agree.")
    max_pixels: int | None = arg(None, "As in training; both budgets should agree.")
    output: str | None = arg(None, "Per-sample JSONL; default: next to the model or in runs/eval.")
    overwrite: bool = arg(False, "Start again, even if an evaluation was interrupted or is done.")
    bootstrap: int = arg(1000, "Bootstrap draws for the 95 % intervals; 0: none.")
    seed: int = arg(0, "Seed of these draws.")
    pictures: int = arg(24, "Answers drawn on the page.")
    local_rank: int = arg(-1, "Set by the deepspeed launcher; only the environment counts.")

    @property
    def source(self) -> str:
        """The annotation file, or the data set."""
        return self.annotations or self.dataset_name or "shapes_detection"

    def __post_init__(self) -> None:
        check_choices(self)
        self._check_source()
        check_limit(self, "at least 1", "batch_size")
        check_limit(self, "0 or more", "max_samples max_bad_rows bootstrap seed pictures")
        check_limit(self, "a positive number", "max_completion_length max_prompt_length")
        check_limit(self, "a positive number", "min_pixels max_pixels rollout_cache_tokens")
        _check_pixels(self.min_pixels, self.max_pixels)
        several = len(self.compare)
        require(several != 1, "compare", "two models or more", self.compare)
        require(len(set(self.compare)) == several, "compare", "different models", self.compare)

    def _check_source(self) -> None:
        """Check that flags which need each other are given together."""
        by_coco = self.task in ("coco", "lvis")
        if self.annotations:
            require(by_coco, "task", "coco or lvis with --annotations", self.task)
            require(bool(self.images), "images", "the folder of the images", self.images)
            name, expected = self.dataset_name, "none beside --annotations"
            require(not name, "dataset_name", expected, name)
            compat, expected = self.compat_prompt, "--dataset_name with it"
            require(not compat, "compat_prompt", expected, compat)
        else:
            self.dataset_name = self.source
            for flag in ("images", "allow_missing", "ask_exists"):
                given = getattr(self, flag)
                require(not given, flag, "--annotations with it", given)
        for flag, default in (("categories", "all"), ("exists_map", None)):
            given = getattr(self, flag)
            require(by_coco or given == default, flag, "--task coco or lvis with it", given)
        both = bool(self.exists_map and self.ask_exists)
        require(not both, "ask_exists", "no --exists_map beside it", self.ask_exists)
        grounded = self.task in ("auto", "grounding")
        require(not self.sam_path or grounded, "sam_path", "--task grounding with it", self.task)


def _check_pixels(low: int | None, high: int | None) -> None:
    ordered = low is None or high is None or low <= high
    require(ordered, "min_pixels", f"at most --max_pixels ({high})", low)


TRAIN_GROUPS = (ModelConfig, DataConfig, GRPOConfig, DPOConfig, TrainConfig)


def column_names(pairs: list[str]) -> dict[str, str]:
    """--columns as a dict: our column name -> the data set's.

    Raises:
        ValueError: not of the form ours=theirs, or a name is given twice.
    """
    split = [pair.partition("=") for pair in pairs]
    for pair, (ours, _, theirs) in zip(pairs, split, strict=True):
        if not (ours and theirs):
            raise ValueError(f"--columns {pair}: expected ours=theirs, such as problem=question")
    names = {ours: theirs for ours, _, theirs in split}
    if len(names) < len(pairs) or len(set(names.values())) < len(pairs):
        raise ValueError(f"--columns: expected every name once, got {' '.join(pairs)}")
    return names
