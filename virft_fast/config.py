"""The arguments of a training run and of an evaluation: small dataclasses, checked on creation.

Names are those of TRL and Visual-RFT, so that their launch lines start this program; defaults are
those of the Visual-RFT paper (lr 1e-6, beta 0.04, 256 tokens, 8 completions). `virft_fast.cli`
parses them. Only the commands and the algorithms use these objects.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, fields

from virft_fast.arguments import Arguments, arg, check_choices, check_limit, require, was_given
from virft_fast.arguments import UsageError as UsageError
from virft_fast.arguments import flag_names as known_flags  # noqa: F401
from virft_fast.arguments import given_flags as given_flags
from virft_fast.arguments import unknown_flag_message as unknown_flag_message
from virft_fast.arguments import usage as usage
from virft_fast.batch import Row
from virft_fast.kernels.advantages import AGGREGATIONS, ESTIMATORS, SCALES
from virft_fast.kernels.loss_args import CORRECTIONS, LEVELS, LOSS_TYPES, LossArgs

logger = logging.getLogger("virft_fast")

# Name -> the module whose ALGORITHM it is; see `virft_fast.algorithms`.
ALGORITHMS = {name: f"virft_fast.algorithms.{name}" for name in ("grpo", "sft", "dpo")}
TASKS = ("auto", "detection", "classification", "grounding", "choice", "number")
EVAL_TASKS = (*TASKS, "coco", "lvis")
BOX_SPACES = ("auto", "thousandths", "pixels", "unit")
ANSWERS = ("lenient", "visual_rft")
DTYPES = ("auto", "float32", "bfloat16")
HUB_ATTENTIONS = ("kernels-community/flash-attn2", "kernels-community/flash-attn3")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", *HUB_ATTENTIONS)
SAVE_DTYPES = (*DTYPES, "float16")
LOSS_IMPLS = ("fused", "reference")
ROLLOUT_BACKENDS = ("native", "hf")
SPECULATION = ("auto", "off")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit")
PREFIX_ATTENTIONS = ("auto", "fused", "two_part", "flex", "dense")

# GRPO options that also apply to SFT and DPO.
BESIDE_GRPO = """
    max_completion_length loss_impl prefix_sharing prefix_attention rollout_backend
    rollout_cache_tokens offload_rollout_weights speculation
""".split()

NEEDED = {"load_in_4bit": "use_peft", "offload_activations": "gradient_checkpointing"}


class Speculating(Arguments):
    """Arguments that choose a rollout backend, and whether it speculates."""

    rollout_backend: str
    speculation: str

    @property
    def speculates(self) -> bool:
        return self.speculation == "auto" and self.rollout_backend == "native"

    def settle_backend(self, why_not_native: str | None) -> None:
        """Turn the default, native, into hf for a model that can't use it."""
        native = self.rollout_backend == "native"
        if why_not_native and native and not was_given(self, "rollout_backend"):
            logger.warning("--rollout_backend hf, because %s", why_not_native)
            self.rollout_backend = "hf"
            self.settle_speculation()

    def settle_speculation(self) -> None:
        """Turn the default off for a backend that draws one token a pass.

        Raises:
            UsageError: the user asked for it nevertheless.
        """
        if self.speculation == "auto" and not self.speculates:
            if was_given(self, "speculation"):
                raise UsageError(
                    f"--speculation auto: expected --rollout_backend native, got "
                    f"{self.rollout_backend}, which draws one token a pass; leave out one of them"
                )
            self.speculation = "off"


@dataclass
class ModelConfig:
    """Which model is trained, and which part of it."""

    _argument_group_name = "Model"
    model_name_or_path: str = arg(
        "tiny", "A checkpoint folder, a hub id, or `tiny` for the embedded model."
    )
    model_revision: str | None = arg(None, "Branch, tag or commit of a hub id.")
    dtype: str = arg(
        "auto", "Weights; auto: bfloat16 with --bf16, else float32.", "torch_dtype", choices=DTYPES
    )
    attn_implementation: str = arg(
        "sdpa",
        "How attention is computed; flash_attention_2 needs flash-attn. A kernel of "
        "kernels-community is downloaded, and needs the package kernels.",
        choices=ATTENTIONS,
    )
    freeze_vision_tower: bool = arg(
        False, "Train the language model only.", "freeze_vision_modules"
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations, which saves memory.")
    offload_activations: bool = arg(
        False,
        "Keep the layers' inputs in CPU memory until the backward pass; needs "
        "--gradient_checkpointing.",
        "activation_offloading",
    )
    use_liger_kernel: bool = arg(False, "Patch the model with liger-kernel (CUDA).", "use_liger")
    min_pixels: int | None = arg(None, "Scale smaller images up to at least this many pixels.")
    max_pixels: int | None = arg(None, "Scale larger images down to at most this many pixels.")
    use_peft: bool = arg(
        False, "Train a LoRA adapter: the one in --model_name_or_path, or else a new one."
    )
    lora_r: int | None = arg(None, "Rank; default: as in the model folder, or 16.")
    lora_alpha: float | None = arg(
        None, "The adapter is scaled by alpha / r; default: as in the model folder, or 32."
    )
    lora_dropout: float = arg(0.0, "Accepted but set to 0: the loss compares two forward passes.")
    lora_target_modules: list[str] = arg(
        [],
        "Linear layers that get an adapter; default: as in the model folder, or all of the "
        "language model.",
    )

    load_in_4bit: bool = arg(
        False,
        "QLoRA: store the language model's linear layers in 4 bits (NF4); needs --use_peft and "
        "bitsandbytes.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self, "a positive number of pixels", "min_pixels max_pixels")
        _check_pixels(self.min_pixels, self.max_pixels)
        check_limit(self, "a positive number", "lora_r lora_alpha")
        for flag, needed in NEEDED.items():
            met = getattr(self, needed) or not getattr(self, flag)
            require(met, flag, f"--{needed} as well", f"it without --{needed}")
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
        "Demo data set (shapes_detection, digits_classification), file (JSON, JSONL, CSV, "
        "parquet), folder (parquet, save_to_disk) or hub id.",
    )
    dataset_config: str | None = arg(
        None, "Configuration of a hub data set, or of a folder whose README.md lists some."
    )
    dataset_train_split: str = arg("train", "Split to train on.")
    dataset_test_split: str = arg("test", "Split for --eval_samples.")
    dataset_streaming: bool = arg(
        False, "Read parquet files, local or on the hub, in parts while training."
    )
    task: str = arg("auto", "Kind of task; auto: inferred from the data.", choices=TASKS)
    columns: list[str] = arg(
        [], "Your names of columns, as ours=yours: problem=question solution=answer."
    )
    box_space: str = arg(
        "auto",
        "Unit of boxes: thousandths of the image's sides, pixels, or unit (0 to 1); auto: "
        "thousandths, or an error on signs of another unit. A column extent overrides it.",
        choices=BOX_SPACES,
    )
    compat_prompt: bool = arg(
        False, "LISA's conversations: ask for the box in exactly Visual-RFT's words."
    )
    max_prompt_length: int | None = arg(
        None, "Skip rows whose prompt, images included, has more tokens; nothing is truncated."
    )
    max_bad_rows: int = arg(100, "Stop when more rows than this can't be used.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self, "0 or more", "max_bad_rows")
        check_limit(self, "a positive number", "max_prompt_length")


@dataclass
class GRPOConfig(Speculating):
    """Rollout, rewards and loss. Definitions are those of TRL 1.16's GRPOConfig."""

    _argument_group_name = "GRPO"
    reward_funcs: list[str] = arg(
        [],
        "Names, path/to/file.py:function or package.module:function; default: the task's rewards.",
    )
    reward_weights: list[float] = arg([], "One weight for each reward function; default: all 1.")
    reward_clip: list[float] = arg(
        [], "Two numbers: clip each reward function's values to this range, before the weights."
    )
    multi_objective_aggregation: str = arg(
        "sum_then_normalize",
        "normalize_then_sum: normalize each reward in its group, sum, and divide by the batch's "
        "std (GDPO); ignores --scale_rewards.",
        choices=AGGREGATIONS,
    )
    advantage_estimator: str = arg(
        "grpo",
        "rloo: reward minus the mean of the group's others; reinforce_pp: centered in the group, "
        "divided by the batch's std. Both ignore --scale_rewards.",
        choices=ESTIMATORS,
    )
    num_generations: int = arg(8, "Completions per prompt (G).")
    max_completion_length: int = arg(256, "Maximum tokens in a completion.")
    temperature: float = arg(1.0, "Sampling temperature; the loss uses it too.")
    top_p: float = arg(1.0, "Nucleus sampling; 1: off. The loss ignores it.")
    top_k: int = arg(0, "Sample among the k most likely tokens; 0: off. The loss ignores it.")
    min_p: float = arg(
        0.0, "Drop tokens below this fraction of the top probability; 0: off. The loss ignores it."
    )
    repetition_penalty: float = arg(
        1.0, "Above 1, repeated tokens become less likely; 1: off. The loss ignores it."
    )
    rollout_backend: str = arg(
        "native",
        "native: decode a group together; hf: transformers' generate, for comparison.",
        choices=ROLLOUT_BACKENDS,
    )
    rollout_cache_tokens: int | None = arg(
        None, "Maximum tokens whose keys and values a rollout keeps; default: what fits."
    )
    speculation: str = arg(
        "auto",
        "auto: guess tokens from earlier answers and check several in one pass of the model; the "
        "tokens stay the same. off: one token a pass, as with the hf backend.",
        choices=SPECULATION,
    )
    offload_rollout_weights: bool = arg(
        False,
        "Free the rollouts' copy of the weights while training; saves GPU memory, and each rollout "
        "takes longer to start.",
    )
    prefix_sharing: str = arg(
        "auto",
        "Compute a prompt once for all its completions; auto: if the model allows it.",
        choices=("auto", "on", "off"),
    )
    prefix_attention: str = arg(
        "auto",
        "Attention over a shared prompt; auto: our kernel (fused) on CUDA, PyTorch's (two_part) on "
        "a CPU; flex needs CUDA.",
        choices=PREFIX_ATTENTIONS,
    )
    beta: float = arg(0.04, "Weight of the KL term; 0: no term and no reference model.")
    epsilon_low: float = arg(0.2, "Clip ratios below 1 - epsilon_low.", "epsilon")
    epsilon_high: float | None = arg(
        None, "Clip ratios above 1 + epsilon_high; default: epsilon_low."
    )
    delta: float | None = arg(None, "Upper bound of the unclipped ratio (two-sided clipping).")
    num_iterations: int = arg(1, "Updates from one batch of rollouts (mu).")
    steps_per_generation: int | None = arg(
        None,
        "Microbatches that share one rollout, a multiple of --gradient_accumulation_steps; a step "
        "is then one optimizer update. Default: a step is one rollout with all its updates.",
    )
    dynamic_sampling: bool = arg(
        False,
        "Sample for new prompts until a step has enough groups whose rewards differ (DAPO).",
    )
    dynamic_sampling_max_rounds: int = arg(
        4, "Sample at most this often in a step; then groups of equal rewards fill it up."
    )
    curriculum: int = arg(
        0,
        "Use a row less often once its completions got equal rewards this many times in a row; "
        "0: off.",
    )
    loss_type: str = arg("grpo", "A token's loss, and how it is averaged.", choices=LOSS_TYPES)
    loss_impl: str = arg(
        "fused",
        "fused: logits in tiles; reference: full logits, for comparison.",
        choices=LOSS_IMPLS,
    )
    scale_rewards: str = arg(
        "group",
        "Divide centered rewards by the std of their group or batch; true: group, false: none.",
        choices=SCALES,
    )
    importance_sampling_level: str = arg(
        "token", "Clip the ratio of each token, or of the whole sequence.", choices=LEVELS
    )
    importance_sampling_correction: bool | None = arg(
        None,
        "Weight completions by the policy's probability over the sampler's; default: in bfloat16, "
        "where they round differently.",
        "vllm_importance_sampling_correction",
    )
    importance_sampling_mode: str = arg(
        "sequence_mask",
        "Whose weights, and whether they are truncated to the limits below, or 0 outside them.",
        "vllm_importance_sampling_mode",
        choices=CORRECTIONS,
    )
    importance_sampling_clip_max: float | None = arg(
        3.0, "Upper limit of these weights.", "vllm_importance_sampling_clip_max"
    )
    importance_sampling_clip_min: float | None = arg(
        None, "Lower limit of these weights.", "vllm_importance_sampling_clip_min"
    )
    mask_truncated_completions: bool = arg(False, "Leave completions without EOS out of the loss.")
    use_bias_correction_kl: bool = arg(False, "Multiply the KL term by the ratio (DeepSeek-V3.2).")
    off_policy_mask_threshold: float | None = arg(
        None,
        "Leave out sequences with a negative advantage whose log-probs fell by more than this, on "
        "average, since they were sampled.",
    )
    entropy_coef: float = arg(0.0, "Weight of an entropy bonus: the tokens' mean entropy in nats.")
    top_entropy_quantile: float = arg(
        1.0,
        "Train on this share of a step's tokens, those of the highest entropy; below 1, another "
        "forward pass finds them.",
    )
    sapo_temperature_neg: float = arg(1.05, "sapo: temperature where the advantage is not above 0.")
    sapo_temperature_pos: float = arg(1.0, "sapo: temperature where the advantage is above 0.")
    vespo_k_pos: float = arg(2.0, "vespo: exponent where the advantage is 0 or more.")
    vespo_lambda_pos: float = arg(3.0, "vespo: decay rate where the advantage is 0 or more.")
    vespo_k_neg: float = arg(3.0, "vespo: exponent where the advantage is below 0.")
    vespo_lambda_neg: float = arg(2.0, "vespo: decay rate where the advantage is below 0.")

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
        clip = self.reward_clip
        rising = not clip or (len(clip) == 2 and clip[0] < clip[1])
        require(rising, "reward_clip", "two numbers, the lower one first", clip)
        summed = self.multi_objective_aggregation == AGGREGATIONS[0]
        require(
            summed or self.advantage_estimator == "grpo",
            "advantage_estimator",
            "grpo with --multi_objective_aggregation normalize_then_sum, which has its own",
            self.advantage_estimator,
        )
        check_limit(self, "a positive number", "max_completion_length rollout_cache_tokens")
        check_limit(self, "a number above 0", "temperature repetition_penalty")
        check_limit(self, "a number in (0, 1]", "top_p")
        check_limit(self, "0 (off) or more", "top_k curriculum")
        check_limit(self, "a number in [0, 1)", "min_p epsilon_low")
        check_limit(self, "a number, 0 or more", "beta")
        check_limit(self, "0 or more", "epsilon_high")
        check_limit(self, "a ratio above 1", "delta")
        counts = "num_iterations dynamic_sampling_max_rounds steps_per_generation"
        check_limit(self, "at least 1", counts)
        try:
            self.loss_args()  # checks the rest
        except ValueError as error:
            raise ValueError(f"--{error}") from None

    def loss_args(self, differs: bool = False) -> LossArgs:
        """The flags that are arguments of the loss.

        Args:
            differs: whether the sampler computes its log-probs in another way than training. Then
                the correction is on by default, where the loss has one.
        """
        names = {entry.name for entry in fields(LossArgs)} - {"num_generations"}
        known = {k: v for k, v in vars(self).items() if k in names}
        corrects = self.importance_sampling_correction
        if corrects is None:
            whole = self.importance_sampling_mode.startswith("sequence")
            corrects = differs and not (whole and self.loss_type == "vespo")
        if not corrects:
            known["importance_sampling_mode"] = None
        return LossArgs(**known)

    @property
    def equal_rewards_train(self) -> bool:
        """Whether completions with advantage 0 can affect the gradient."""
        return self.beta > 0 or self.entropy_coef != 0 or self.top_entropy_quantile < 1

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
    dpo_beta: float = arg(0.1, "Higher keeps the model closer to the reference.")
    label_smoothing: float = arg(0.0, "Fraction of pairs assumed to be swapped (conservative DPO).")
    dpo_gamma: float = arg(0.0, "Weight of the chosen answers' mean cross entropy in the loss.")
    precompute_ref_log_probs: bool = arg(
        False, "Compute the reference's log-probs before training, so that no reference is kept."
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
        "sft trains on the solutions (or a column completion), dpo on pairs of a chosen and a "
        "rejected answer.",
        choices=ALGORITHMS,
    )
    output_dir: str = arg("runs/grpo", "Folder for everything that this run writes.")
    overwrite_output_dir: bool = arg(False, "Delete what an earlier run left in --output_dir.")
    run_name: str | None = arg(None, "Name in the trackers; default: --output_dir's.")
    config: str | None = arg(None, "YAML file of flags; the command line overrides it.")
    dry_run: bool = arg(False, "Check flags, data and rewards, estimate memory, and stop.")
    seed: int = arg(42, "Seed of the data order and of sampling.")
    per_device_train_batch_size: int = arg(
        1, "Prompts per microbatch; each gets --num_generations completions."
    )
    gradient_accumulation_steps: int = arg(1, "Microbatches per step on each process.")
    max_tokens_per_microbatch: int | None = arg(
        None,
        "Limit microbatches by tokens instead of prompts; groups stay whole. Default on a GPU, "
        "unless --per_device_train_batch_size is given: what fits, up to 16,384.",
    )
    num_train_epochs: float = arg(1.0, "Passes over the data.")
    max_steps: int = arg(-1, "Number of steps; if positive, overrides --num_train_epochs.")
    optim: str = arg(
        "adamw_torch_fused",
        "How AdamW computes; those with 8-bit state need a GPU and bitsandbytes.",
        choices=OPTIMIZERS,
    )
    learning_rate: float = arg(1e-6, "Peak learning rate of AdamW.")
    weight_decay: float = arg(0.0, "AdamW's decoupled weight decay.")
    adam_beta1: float = arg(0.9, "AdamW's beta 1.")
    adam_beta2: float = arg(0.999, "AdamW's beta 2.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    lr_scheduler_type: str = arg("linear", "Name of a schedule in transformers.")
    warmup_steps: float = arg(0.0, "Steps of linear warm-up; below 1: a fraction of all steps.")
    warmup_ratio: float = arg(0.0, "Fraction of all steps for warm-up, if --warmup_steps is 0.")
    max_grad_norm: float = arg(1.0, "Clip the gradient to this norm; 0: off.")
    bf16: bool = arg(False, "Compute in bfloat16; optimizer state stays float32.")
    deepspeed: str | None = arg(None, "DeepSpeed's JSON file; its 'auto' values are filled in.")
    logging_steps: int = arg(1, "Steps between two records in metrics.jsonl.")
    report_to: list[str] = arg(["none"], "Trackers: tensorboard, wandb, trackio, ..., all or none.")
    log_completions_steps: int = arg(0, "Steps between two printed tables of completions; 0: none.")
    save_steps: int = arg(100, "Steps between two checkpoints; 0: only at the end.")
    save_dtype: str = arg(
        "auto",
        "Dtype of saved weights: float32, bfloat16, float16, or auto: as trained, but a whole "
        "model trained with --bf16 in the dtype of the model that the run started from.",
    )
    save_only_model: bool = arg(False, "Save no engine state; such checkpoints can't be resumed.")
    save_total_limit: int | None = arg(None, "Keep only this many of the newest checkpoints.")
    resume_from_checkpoint: str | None = arg(
        None, "Folder of a checkpoint, or latest; true: the latest, or a new run if there is none."
    )
    max_bad_steps: int = arg(10, "Stop after this many non-finite steps in a row.")
    eval_samples: int = arg(0, "Held-out rows scored greedily before and after training.")
    eval_batch_size: int = arg(32, "Prompts per batch of the held-out evaluation.")
    ddp_timeout: float = arg(1800.0, "Seconds without progress until waiting processes exit.")
    reward_timeout: float = arg(300.0, "Maximum seconds for one call of a reward function.")
    local_rank: int = arg(-1, "Set by the deepspeed launcher and ignored.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_limit(self, "seconds above 0", "ddp_timeout reward_timeout")
        if str(self.resume_from_checkpoint).lower() in ("false", "none"):
            self.resume_from_checkpoint = None
        counts = "per_device_train_batch_size gradient_accumulation_steps logging_steps"
        check_limit(self, "at least 1", f"{counts} max_bad_steps eval_batch_size save_total_limit")
        amounts = "learning_rate weight_decay max_grad_norm save_steps log_completions_steps"
        check_limit(self, "a number, 0 or more", f"{amounts} eval_samples warmup_steps")
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
class EvalConfig(Speculating):
    """Arguments of `python -m virft_fast.evaluate`."""

    _argument_group_name = "Evaluation"
    model_name_or_path: str = arg("tiny", "A checkpoint folder, a hub id, or `tiny`.")
    model_revision: str | None = arg(None, "Branch, tag or commit of a hub id.")
    compare: list[str] = arg([], "Evaluate several models, side by side in one table.")
    dataset_name: str | None = arg(None, "As in training; default: shapes_detection.")
    dataset_config: str | None = arg(None, "As in training.")
    split: str = arg("test", "Split to evaluate.", "dataset_test_split")
    task: str = arg(
        "auto",
        "Kind of task; auto: inferred from the data; coco and lvis: detection by COCO's protocol.",
        choices=EVAL_TASKS,
    )
    answers: str = arg(
        "lenient",
        "How answers are read: as the rewards do, or as Visual-RFT's evaluation does.",
        choices=ANSWERS,
    )
    annotations: str | None = arg(None, "Instances file of COCO or LVIS, instead of a data set.")
    images: str | None = arg(None, "Folder of the images in --annotations.")
    categories: str = arg(
        "all",
        "coco and lvis: all, names separated by commas, or base65, novel15, few8, lvis13, lvis6.",
    )
    compat_prompt: bool = arg(False, "As in training.")
    columns: list[str] = arg([], "As in training.")
    box_space: str = arg("auto", "As in training.", choices=BOX_SPACES)
    exists_map: str | None = arg(
        None, "JSON file {image: [category, ...]}: ask only about these, as Visual-RFT does."
    )
    ask_exists: bool = arg(
        False, "Ask the model first which categories an image has, then only about these."
    )
    allow_missing: bool = arg(False, "Leave out missing images instead of stopping.")
    sam_path: str | None = arg(None, "SamModel that turns boxes into masks, for gIoU and cIoU.")
    reward_funcs: list[str] = arg([], "As in training; empty: the task's default rewards.")
    max_samples: int = arg(0, "Evaluate at most this many rows, from the first; 0: all.")
    batch_size: int = arg(16, "Prompts per batch.", "per_device_eval_batch_size")
    max_completion_length: int = arg(1024, "Maximum tokens in an answer, as in Visual-RFT.")
    max_prompt_length: int | None = arg(None, "As in training.")
    max_bad_rows: int = arg(100, "Stop when more rows than this can't be used.")
    rollout_backend: str = arg("native", "As in training.", choices=ROLLOUT_BACKENDS)
    rollout_cache_tokens: int | None = arg(None, "As in training.")
    speculation: str = arg("auto", "As in training.", choices=SPECULATION)
    dtype: str = arg(
        "auto", "Weights; auto: bfloat16 on a GPU, else float32.", "torch_dtype", choices=DTYPES
    )
    attn_implementation: str = arg("sdpa", "As in training.", choices=ATTENTIONS)
    min_pixels: int | None = arg(None, "As in training; use the same value.")
    max_pixels: int | None = arg(None, "As in training; use the same value.")
    output: str | None = arg(None, "Answers as JSONL; default: next to the model or in runs/eval.")
    overwrite: bool = arg(False, "Start over, even if there is an evaluation.")
    bootstrap: int = arg(1000, "Bootstrap draws for the 95% intervals; 0: no intervals.")
    seed: int = arg(0, "Seed of the bootstrap.")
    pictures: int = arg(24, "Number of answers drawn on the page.")
    local_rank: int = arg(-1, "Set by the deepspeed launcher and ignored.")

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
            name, expected = self.dataset_name, "none with --annotations"
            require(not name, "dataset_name", expected, name)
            compat, expected = self.compat_prompt, "only with --dataset_name"
            require(not compat, "compat_prompt", expected, compat)
        else:
            self.dataset_name = self.source
            for flag in ("images", "allow_missing", "ask_exists"):
                given = getattr(self, flag)
                require(not given, flag, "only with --annotations", given)
        for flag, default in (("categories", "all"), ("exists_map", None)):
            given = getattr(self, flag)
            require(by_coco or given == default, flag, "only with --task coco or lvis", given)
        both = bool(self.exists_map and self.ask_exists)
        require(not both, "ask_exists", "only without --exists_map", self.ask_exists)
        grounded = self.task in ("auto", "grounding")
        require(not self.sam_path or grounded, "sam_path", "only with --task grounding", self.task)


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
        raise ValueError(f"--columns: expected each name once, got {' '.join(pairs)}")
    return names
