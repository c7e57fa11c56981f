"""DPO: from pairs of a chosen and a rejected answer, the prompt and its images read once for both.

A pair is a group of two completions that are given instead of sampled, so everything a group has
in GRPO it has here: one packed row, one pass of the vision tower, log-probs without whole logits.
The loss is that of Rafailov et al. (arXiv:2305.18290), with the smoothing of conservative DPO and
MIA-DPO's cross entropy of the chosen answer beside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from virft_fast import dist, progress
from virft_fast.algorithms.base import Algorithm, Data, HeldOut
from virft_fast.algorithms.sft import answer_ids, given_answers
from virft_fast.algorithms.step import (
    Microbatch,
    Part,
    StepStats,
    TrainState,
    as_reference,
    backward,
    empty_microbatch,
    equally_many,
    finish,
    microbatch,
    plan_microbatches,
    step_optimizer,
)
from virft_fast.batch import Prompt, Rollouts, Sample
from virft_fast.config import BESIDE_GRPO, DPOConfig, RunConfig, UsageError, given_flags
from virft_fast.data import BadRow, NoUsableRows
from virft_fast.metrics import reduce_metrics
from virft_fast.models.qwen_vl import control_tokens_in

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference_logps.json"

# Row -> the reference's log-probs of its (chosen, rejected) answer.
RefLogps = dict[int, tuple[float, float]]


@dataclass
class DPOState(TrainState):
    """`TrainState` with what pairs need.

    Attributes:
        ref_logps, test_ref_logps: of the training, of the held-out data, where they were computed
            beforehand; None: `reference` computes them.
    """

    dpo: DPOConfig = field(default_factory=DPOConfig)
    ref_logps: RefLogps | None = None
    test_ref_logps: RefLogps | None = None


@dataclass
class Pairs:
    """Pairs that go through the model in one call: n of them, 2n completions.

    Attributes:
        rows: the data set's row of each pair; none in a microbatch that only keeps others company.
        ref_logps: (n, 2), or None.
    """

    batch: Microbatch
    rows: tuple[int, ...]
    ref_logps: Tensor | None = None


def dpo_loss(
    logps: Tensor, ref_logps: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sigmoid DPO loss of pairs.

    Args:
        logps: (n, 2) summed log-probs of the chosen and the rejected answer.
        ref_logps: (n, 2), the reference's.
        beta: > 0.
        label_smoothing: share of pairs taken to be the wrong way round, in [0, 0.5): conservative
            DPO's, which TRL 1.16's "sigmoid" has not.
    Returns:
        losses (n,), and rewards (n, 2), beta times the log-ratios, detached.
    Raises:
        ValueError: shapes.
    With log-ratios that differ by 1 and beta 1 the loss is -log sigmoid(1) = 0.3133.
    """
    if logps.ndim != 2 or logps.shape[1] != 2 or ref_logps.shape != logps.shape:
        raise ValueError(
            f"logps, ref_logps: expected (n, 2) both, chosen and rejected, got "
            f"{tuple(logps.shape)} and {tuple(ref_logps.shape)}"
        )
    ratios = logps - ref_logps
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    losses = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-margin)
    return losses, beta * ratios.detach()


def pair_of(sample: Sample) -> tuple[str, str]:
    """The chosen and the rejected answer of a row that `check_pair` found nothing wrong with."""
    return sample.columns["chosen"], sample.columns["rejected"]


def check_pair(tokenizer: Any, most: int, sample: Sample) -> str | None:
    """What is wrong with a row's pair of answers, or None."""
    for name in ("chosen", "rejected"):
        text = sample.columns.get(name)
        if not isinstance(text, str):
            return f"{name}: expected an answer, a text or a chat, got nothing"
        ids = answer_ids(tokenizer, text)[:-1].tolist()  # an answer that was cut off gets an EOS
        if len(ids) > most:
            return f"{name}: {len(ids)} tokens, more than --max_completion_length {most}; raise it"
        if control := control_tokens_in(tokenizer, text):
            return f"{name}: holds the special token {control[0]}; remove it from the text"
    if sample.columns["chosen"] == sample.columns["rejected"]:
        return "chosen and rejected are the same answer, which prefers nothing"
    return None


def pair_digest(sample: Sample) -> str:
    """Changes with anything the model reads of a row: chat, answers, pictures."""
    found = hashlib.sha1(repr((sample.messages, pair_of(sample))).encode("utf-8", "replace"))
    for image in sample.images:
        found.update(repr(image.size).encode() + image.tobytes())
    return found.hexdigest()


def check_known(digests: Mapping[int, str], sample: Sample) -> str | None:
    """What is wrong with a row whose reference log-probs were computed beforehand, or None."""
    digest = digests.get(sample.index)
    if digest is None:
        return "it could not be used when the reference's log-probs were computed; start again"
    if digest != pair_digest(sample):
        return "it has changed since the reference's log-probs were computed; start again"
    return None


def train_step(
    state: DPOState, prompts: Sequence[Prompt]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One step on this rank's B prompts and the pairs their rows hold.

    Returns:
        metrics, the same on all ranks; and no records.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row had to be skipped.
    """
    stats, start = StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    answers = _answers(state, prompts)
    chosen = answers.completion_mask[::2]
    with stats.timed("train"):
        batches = _batches(state, prompts, answers)
        _add_reference(state, batches, state.ref_logps)
        counts = torch.tensor([len(chosen), int(chosen.sum())], dtype=torch.float64)
        counts = dist.all_reduce_sum(counts.to(state.engine.device)).tolist()
        learning_rate, finite = state.learning_rate(state.step), True
        for number, pairs in enumerate(batches, 1):
            # Engines average gradients over ranks, hence the factor.
            loss = _loss(state, pairs, stats, *counts) * dist.world_size()
            finite &= backward(state, loss, last=number == len(batches))
            stats.add_total("loss", float(loss.detach()))
        applied = step_optimizer(state, finite, learning_rate, stats)
    lengths = answers.completion_mask.sum(1)
    stats.add("completion_length", float(lengths.sum()), len(lengths))
    state.step += 1
    return finish(state, stats, answers, learning_rate, applied, start), []


@torch.no_grad()
def evaluate(
    state: DPOState, load: Callable[[int], Prompt | BadRow], count: int, batch_size: int
) -> dict[str, float]:
    """Means over rows 0 to count - 1 as they are: loss, rewards, preference accuracy; `num_pairs`
    is how many of them could be used.

    Every rank has to call it.

    Raises:
        NoUsableRows: none could be used.
    """
    sums = StepStats()
    state.policy.eval()
    num_pairs = 0
    for prompts in _shares(load, count, batch_size):
        num_pairs += len(prompts)
        answers = _answers(state, prompts)
        batches = _batches(state, prompts, answers)
        _add_reference(state, batches, state.test_ref_logps)
        for pairs in batches:
            _loss(state, pairs, sums, 1.0, 1.0)
            progress.mark("evaluation")
    state.policy.train()
    device = state.engine.device
    num_pairs = sum(dist.all_gather_object(num_pairs))
    if not num_pairs:
        raise NoUsableRows(
            f"expected a held-out pair that can be used, got none in {count} rows, for the reasons "
            "above; mend them, or leave --eval_samples out"
        )
    # A rank without a usable row has counted nothing, and takes part all the same.
    names = {name for part in dist.all_gather_object(sorted(sums.sums)) for name in part}
    counted = {name: sums.sums.get(name, (0.0, 0.0)) for name in sorted(names)}
    means = reduce_metrics(counted, lambda t: dist.all_reduce_sum(t.to(device)).to(t.device))
    means = {name: value for name, value in means.items() if not math.isnan(value)}
    return means | {"num_pairs": float(num_pairs)}


@torch.no_grad()
def reference_logps(
    state: DPOState,
    load: Callable[[int], Prompt | BadRow],
    count: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[RefLogps, dict[int, str]]:
    """The untrained policy's log-probs of every usable row's answers, and the digests of these
    rows, the same on all ranks."""
    found: RefLogps = {}
    digests: dict[int, str] = {}
    state.policy.eval()
    for prompts in _shares(load, count, batch_size):
        digests |= {prompt.sample.index: pair_digest(prompt.sample) for prompt in prompts}
        for pairs in _batches(state, prompts, _answers(state, prompts)):
            logps, _ = state.engine.forward(pairs.batch.inputs)
            found |= dict(zip(pairs.rows, map(tuple, _sums(pairs, logps).tolist()), strict=True))
        progress(len(prompts))
    state.policy.train()
    parts = dist.all_gather_object((found, digests))
    return (
        {row: sums for part, _ in parts for row, sums in part.items()},
        {row: digest for _, part in parts for row, digest in part.items()},
    )


def _shares(load: Callable[[int], Prompt | BadRow], count: int, batch_size: int) -> Any:
    """This rank's usable prompts of rows 0 to count - 1, equally many batches on every rank."""
    world, rank = dist.world_size(), dist.rank()
    for first in range(0, count, batch_size * world):
        rows = range(first + rank * batch_size, min(first + (rank + 1) * batch_size, count))
        prompts = []
        for loaded in map(load, rows):
            if isinstance(loaded, BadRow):
                logger.warning("left out row %d: %s", loaded.index, loaded.reason)
            else:
                prompts.append(loaded)
        yield prompts


def _answers(state: DPOState, prompts: Sequence[Prompt]) -> Rollouts | None:
    if not prompts:
        return None
    return given_answers(state.tokenizer, prompts, [pair_of(p.sample) for p in prompts])


def _batches(state: DPOState, prompts: Sequence[Prompt], answers: Rollouts | None) -> list[Pairs]:
    """The pairs in microbatches, equally many on all ranks, at least one; no pair is split."""
    plan: list[list[Part]] = []
    if answers is not None:
        plan = plan_microbatches(
            [Part(number, (2 * number, 2 * number + 1)) for number in range(len(prompts))],
            prompt_lengths=[len(prompt.input_ids) for prompt in prompts],
            lengths=answers.completion_mask.sum(1).tolist(),
            prompts_per_microbatch=state.prompts_per_microbatch,
            max_tokens=state.max_tokens_per_microbatch,
            shared=state.policy.shares_prefix,
            split=False,
        )
        ones = torch.ones(2 * len(prompts))
    made = [
        Pairs(
            microbatch(state, answers, parts, ones, answers.completion_mask),
            tuple(prompts[part.prompt].sample.index for part in parts),
        )
        for parts in plan
    ]
    return equally_many(made, lambda: Pairs(empty_microbatch(state, tower=True), ()))


@torch.no_grad()
def _add_reference(state: DPOState, batches: list[Pairs], known: RefLogps | None) -> None:
    for pairs in batches:
        batch = pairs.batch
        if known is not None:
            values = [known[row] for row in pairs.rows]
            pairs.ref_logps = torch.tensor(values, device=state.engine.device).view(-1, 2)
        elif state.reference is not None:
            # A frozen tower is the reference's too. Whole weights are free but under ZeRO-3.
            if state.policy.vision_frozen and state.engine.zero_stage < 3 and pairs.rows:
                with state.engine.whole_weights() as policy:
                    batch.image_features = policy.image_features(batch.inputs)
            with as_reference(state):
                logps, _ = state.reference(batch.inputs, image_features=batch.image_features)
            pairs.ref_logps = _sums(pairs, logps)


def _loss(
    state: DPOState, pairs: Pairs, stats: StepStats, num_pairs: float, num_tokens: float
) -> Tensor:
    """This microbatch's share of the loss of all `num_pairs` pairs and `num_tokens` tokens of
    chosen answers, over all ranks."""
    logps, entropy = state.engine.forward(
        pairs.batch.inputs, image_features=pairs.batch.image_features
    )
    if not pairs.rows:
        return 0.0 * logps.sum()
    sums = _sums(pairs, logps)
    losses, rewards, ref_logps = None, None, pairs.ref_logps
    if ref_logps is not None:
        losses, rewards = dpo_loss(
            sums, ref_logps, beta=state.dpo.dpo_beta, label_smoothing=state.dpo.label_smoothing
        )
    _note(stats, pairs, sums.detach(), entropy.detach(), losses, rewards)
    if losses is None:
        return 0.0 * logps.sum()
    return losses.sum() / num_pairs - state.dpo.dpo_gamma * sums[:, 0].sum() / num_tokens


def _note(
    stats: StepStats,
    pairs: Pairs,
    sums: Tensor,
    entropy: Tensor,
    losses: Tensor | None,
    rewards: Tensor | None,
) -> None:
    """Sums over pairs, or tokens, for the means of the step; one wait for the device."""
    lengths = pairs.batch.inputs.cu_seqlens.diff().view(-1, 2)
    # Of the log-probs it says something before training too, unlike of the rewards.
    parts = {"num_chosen": lengths[:, 0], "num_tokens": lengths, "entropy": entropy,
             "logps/chosen": sums[:, 0], "logps/rejected": sums[:, 1],
             "logps/accuracies": sums[:, 0] > sums[:, 1]}  # fmt: skip
    if losses is not None and rewards is not None:
        margins = rewards[:, 0] - rewards[:, 1]
        parts |= {"dpo_loss": losses.detach(), "rewards/chosen": rewards[:, 0],
                  "rewards/rejected": rewards[:, 1], "rewards/margins": margins,
                  "rewards/accuracies": margins > 0}  # fmt: skip
    totals = torch.stack([part.sum().double() for part in parts.values()]).tolist()
    found = dict(zip(parts, totals, strict=True))
    num_chosen, num_tokens = found.pop("num_chosen"), found.pop("num_tokens")
    stats.add("nll", -found["logps/chosen"], num_chosen)
    stats.add("entropy", found.pop("entropy"), num_tokens)
    for name, total in found.items():
        stats.add(name, total, len(sums))


def _sums(pairs: Pairs, logps: Tensor) -> Tensor:
    """(S,) log-probs -> (n, 2) sums over the tokens of each answer."""
    if not pairs.rows:
        return logps.new_zeros(0, 2)
    lengths = pairs.batch.inputs.cu_seqlens.diff().long()
    # Its checks would wait for the device, and the lengths are ours.
    sums = torch.segment_reduce(logps, "sum", lengths=lengths, initial=0.0, unsafe=True)
    return sums.view(-1, 2)


def _reference_beforehand(config: RunConfig, state: DPOState, data: Data, *, resumed: bool) -> None:
    """The reference's log-probs of all rows: computed at the start of a run, read later on. From
    then on only rows that are as they were can be used."""
    path = Path(config.train.output_dir) / REFERENCE_FILE
    held_out = 0 if data.test is None else min(config.train.eval_samples, len(data.test))
    counts = {"train": len(data.train), "test": held_out}
    # What decides which rows can be used, and what the model reads of them.
    flags = ("max_completion_length", "max_prompt_length", "min_pixels", "max_pixels")
    limits = {name: config.flat()[name] for name in flags}
    if resumed:
        try:
            saved = json.loads(path.read_text())
            had = saved["counts"]
            if had["train"] != counts["train"] or had["test"] < held_out:
                raise ValueError(f"it is of {had} rows, these are {counts}")
            if saved["limits"] != limits:
                raise ValueError(f"it was made with {saved['limits']}, these are {limits}")
            tables = [
                (
                    {int(row): (float(c), float(r)) for row, (c, r) in saved[name].items()},
                    {int(row): str(d) for row, d in saved["digests"][name].items()},
                )
                for name in counts
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}: expected the reference's log-probs of this run, got a file that is "
                "damaged or of another version; start the run again"
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path}: expected the reference's log-probs of this run: {error}; start it again"
            ) from error
        _use_reference(state, data, tables)
        return
    from tqdm import tqdm

    tables = []
    for source, count in ((data.train, counts["train"]), (data.test, counts["test"])):
        with tqdm(total=count, unit="row", desc="reference", disable=not dist.is_main()) as bar:
            size = max(config.train.eval_batch_size, state.prompts_per_microbatch)
            load = source.load if source is not None else None
            tables.append(reference_logps(state, load, count, size, bar.update))
    _use_reference(state, data, tables)
    if dist.is_main():
        aside = path.with_suffix(".writing")
        content = {"counts": counts, "limits": limits, "digests": {}}
        for name, (logps, digests) in zip(counts, tables, strict=True):
            content |= {name: logps}
            content["digests"] |= {name: digests}
        aside.write_text(json.dumps(content))
        aside.replace(path)


def _use_reference(
    state: DPOState, data: Data, tables: Sequence[tuple[RefLogps, dict[int, str]]]
) -> None:
    (state.ref_logps, of_train), (state.test_ref_logps, of_test) = tables
    for source, digests in ((data.train, of_train), (data.test, of_test)):
        if source is not None:
            source.check = partial(_all_checks, (source.check, partial(check_known, digests)))


def _all_checks(checks: Sequence[Callable[[Sample], str | None]], sample: Sample) -> str | None:
    return next((wrong for wrong in (check(sample) for check in checks) if wrong), None)


class DPO(Algorithm):
    name = "dpo"
    step = staticmethod(train_step)
    preferences = True
    files = (REFERENCE_FILE,)

    def without_effect(self, config: RunConfig) -> list[str]:
        if config.grpo.beta != type(config.grpo)().beta:  # TRL's DPO has a --beta too
            raise UsageError(
                f"--beta {config.grpo.beta}: it is the weight of GRPO's KL term; for --algorithm "
                f"dpo pass --dpo_beta {config.grpo.beta}"
            )
        unused = [name for name in given_flags(config.grpo) if name not in BESIDE_GRPO]
        return unused + ([] if config.data.task == "auto" else ["task"])

    def check_data(self, config: RunConfig, column_names: Sequence[str]) -> None:
        if not {"chosen", "rejected"} <= set(column_names):
            raise UsageError(
                f"--algorithm dpo: expected the columns chosen and rejected, got "
                f"{', '.join(column_names)}"
            )
        if config.data.box_space != "auto":
            raise UsageError(
                f"--box_space {config.data.box_space}: expected auto with --algorithm dpo, whose "
                "answers are not converted; leave it out"
            )

    def check_row(self, config: RunConfig, tokenizer: Any) -> Callable[[Sample], str | None]:
        return partial(check_pair, tokenizer, config.grpo.max_completion_length)

    def uses_reference(self, config: RunConfig) -> bool:
        return not config.dpo.precompute_ref_log_probs

    def make_state(self, config: RunConfig, **parts: Any) -> DPOState:
        return DPOState(config=config.grpo, dpo=config.dpo, **parts)

    def begin(self, config: RunConfig, state: DPOState, data: Data, *, resumed: bool) -> None:
        if config.dpo.precompute_ref_log_probs:
            _reference_beforehand(config, state, data, resumed=resumed)

    def evaluate(self, config: RunConfig, state: DPOState, data: Data, num_rows: int) -> HeldOut:
        means = evaluate(state, data.test.load, num_rows, config.train.eval_batch_size)
        return {"means": means, "answers": {}, "num_samples": int(means.pop("num_pairs"))}

    def compare(
        self, before: HeldOut, after: HeldOut
    ) -> tuple[str, dict[str, float], dict[str, float]]:
        title = f"held-out pairs, {after['num_samples']} samples"
        # Before training the policy is the reference, and prefers nothing to it.
        first = {k: v for k, v in before["means"].items() if not k.startswith("rewards/")}
        return title, first, {k: v for k, v in after["means"].items() if k in first}

    def answers(self, sample: Sample) -> dict[str, str]:
        return dict(zip(("chosen", "rejected"), pair_of(sample), strict=True))


ALGORITHM = DPO()
