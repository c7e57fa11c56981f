"""DPO on pairs of a chosen and a rejected answer, which share one pass over the prompt and images.

A pair is a group of two given completions. Like a GRPO group, it is one packed row, takes one pass
of the vision tower, and never forms the full logits. The loss is from Rafailov et al.
(arXiv:2305.18290). Options add conservative DPO's label smoothing and MIA-DPO's cross entropy on
the chosen answer.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from virft_fast import dist, progress
from virft_fast.algorithms import step
from virft_fast.algorithms.base import Algorithm, Check, Data, HeldOut
from virft_fast.algorithms.sft import answer_ids, given_answers
from virft_fast.algorithms.step import Metrics, Microbatch, StepStats, TrainState
from virft_fast.arguments import expecting, usage
from virft_fast.batch import Prompt, Rollouts, Row, Sample
from virft_fast.config import DPOConfig, RunConfig, UsageError
from virft_fast.data import BadRow, NoUsableRows
from virft_fast.devices import to_device
from virft_fast.digests import sample_digest
from virft_fast.json_files import replace_text
from virft_fast.models.families import Tokenizer
from virft_fast.models.inputs import control_tokens_in

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference_logps.json"

# Row -> log-probs of its (chosen, rejected) answer under the reference.
RefLogps = dict[int, tuple[float, float]]
Digests = dict[int, str]  # row -> `pair_digest`
Tables = dict[str, tuple[RefLogps, Digests]]  # for the training rows and the held-out rows
Load = Callable[[int], Prompt | BadRow]


@dataclass
class DPOState(TrainState):
    """`TrainState` for pairs.

    Attributes:
        ref_logps, test_ref_logps: reference log-probs of the training and the held-out rows, if
            precomputed; None: `reference` computes them.
    """

    dpo: DPOConfig = field(default_factory=DPOConfig)
    ref_logps: RefLogps | None = None
    test_ref_logps: RefLogps | None = None


@dataclass
class Pairs:
    """Pairs that go through the model in one call: n of them, 2n completions.

    Attributes:
        rows: each pair's row in the data set; empty in an `empty_microbatch`.
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
        ref_logps: (n, 2), the same under the reference.
        beta: above 0.
        label_smoothing: share of pairs assumed to be swapped, in [0, 0.5). It comes from
            conservative DPO; TRL 1.16's "sigmoid" has none.
    Returns:
        Losses (n,), and detached rewards (n, 2): beta times the log-ratios.
    Raises:
        ValueError: wrong shapes.
    Example: with beta 1 and log-ratios that differ by 1, the loss is -log sigmoid(1) = 0.3133.
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
    """The chosen and the rejected answer of a row that has passed `check_pair`."""
    return sample.columns["chosen"], sample.columns["rejected"]


def check_pair(tokenizer: Tokenizer, limit: int, sample: Sample) -> str | None:
    """What is wrong with a row's pair of answers, or None."""
    for name in ("chosen", "rejected"):
        text = sample.columns.get(name)
        if not isinstance(text, str):
            return f"{name}: expected an answer, a text or a chat, got nothing"
        ids = answer_ids(tokenizer, text)[:-1].tolist()  # don't count EOS: cut-off answers get one
        if len(ids) > limit:
            return f"{name}: {len(ids)} tokens, more than --max_completion_length {limit}; raise it"
        if control := control_tokens_in(tokenizer, text):
            return f"{name}: holds the special token {control[0]}; remove it from the text"
    if sample.columns["chosen"] == sample.columns["rejected"]:
        return "chosen and rejected are the same answer, which prefers nothing"
    return None


def pair_digest(sample: Sample) -> str:
    """A hash of the parts of a row that the model reads: chat, answers, images."""
    return sample_digest(repr((sample.messages, pair_of(sample))), sample.images)


def check_unchanged(digests: Mapping[int, str], sample: Sample) -> str | None:
    """Why a row can't be used with precomputed reference log-probs, or None."""
    digest = digests.get(sample.index)
    if digest is None:
        return "it could not be used when the reference's log-probs were computed; start again"
    if digest != pair_digest(sample):
        return "it has changed since the reference's log-probs were computed; start again"
    return None


def train_step(state: DPOState, prompts: Sequence[Prompt]) -> tuple[Metrics, list[Row]]:
    """One DPO step on this rank's B prompts and the pairs in their rows.

    Returns:
        Metrics, the same on all ranks; no records.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row were skipped.
    """
    stats, start = StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    answers = _answers(state, prompts)
    chosen = answers.completion_mask[::2]
    with stats.timed("train"):
        batches = _batches(state, answers)
        _add_reference(state, batches, state.ref_logps)
        counts = [float(len(chosen)), float(chosen.sum())]
        totals = dist.sum_numbers(counts, state.engine.device)
        learning_rate = state.learning_rate(state.step)
        finite = torch.ones((), dtype=torch.bool, device=state.engine.device)
        for number, pairs in enumerate(batches, 1):
            # Times the number of ranks, because engines average gradients over them.
            loss = _loss(state, pairs, stats, *totals) * dist.world_size()
            finite = finite & step.backward(state, loss, last=number == len(batches))
            stats.add_total("loss", loss)
        applied = step.step_optimizer(state, finite, learning_rate, stats)
    lengths = answers.completion_mask.sum(1)
    stats.add("completion_length", float(lengths.sum()), len(lengths))
    state.step += 1
    return step.finish(state, stats, answers, learning_rate, applied, start), []


@torch.no_grad()
def evaluate(state: DPOState, load: Load, count: int, batch_size: int) -> Metrics:
    """Mean loss, rewards and preference accuracy over rows 0 to count - 1, unshuffled, and
    `num_pairs`, the number of usable rows. All ranks call it.

    Raises:
        NoUsableRows: no row is usable.
    """
    sums = StepStats()
    state.policy.eval()
    num_pairs = 0
    for prompts in _own_prompts(load, count, batch_size):
        num_pairs += len(prompts)
        batches = _batches(state, _answers(state, prompts) if prompts else None)
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
            "above; fix them, or leave --eval_samples out"
        )
    # All ranks reduce the same metrics, even one without a usable row.
    names = {name for of_rank in dist.all_gather_object(list(sums.sums)) for name in of_rank}
    sums.sums = {name: sums.sums.get(name, (0.0, 0.0)) for name in sorted(names)}
    means = {name: value for name, value in sums.reduce(device).items() if not math.isnan(value)}
    return means | {"num_pairs": float(num_pairs)}


@torch.no_grad()
def reference_logps(
    state: DPOState,
    load: Load,
    count: int,
    batch_size: int,
    report: Callable[[int], object] = lambda rows: None,
) -> tuple[RefLogps, Digests]:
    """The untrained policy's log-probs of all usable rows' answers, and the rows' digests. All
    ranks get the same.

    Args:
        report: called after each batch with the number of this rank's rows in it.
    """
    own_logps: RefLogps = {}
    own_digests: Digests = {}
    state.policy.eval()
    for prompts in _own_prompts(load, count, batch_size):
        own_digests |= {prompt.sample.index: pair_digest(prompt.sample) for prompt in prompts}
        for pairs in _batches(state, _answers(state, prompts) if prompts else None):
            sums = _sums(pairs, state.engine.forward(pairs.batch.inputs)[0]).tolist()
            own_logps |= {row: (c, r) for row, (c, r) in zip(pairs.rows, sums, strict=True)}
        report(len(prompts))
    state.policy.train()
    logps: RefLogps = {}
    digests: Digests = {}
    for logps_of_rank, digests_of_rank in dist.all_gather_object((own_logps, own_digests)):
        logps |= logps_of_rank
        digests |= digests_of_rank
    return logps, digests


def _own_prompts(load: Load, count: int, batch_size: int) -> Iterator[list[Prompt]]:
    """This rank's usable prompts of rows 0 to count - 1, in the same number of batches on every
    rank."""
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


def _answers(state: DPOState, prompts: Sequence[Prompt]) -> Rollouts:
    return given_answers(state.tokenizer, prompts, [pair_of(p.sample) for p in prompts])


def _batches(state: DPOState, answers: Rollouts | None) -> list[Pairs]:
    """The pairs in microbatches: at least one, and the same number on every rank. No pair is split.

    Args:
        answers: None: this rank has no pairs.
    """
    rows = iter([prompt.sample.index for prompt in answers.prompts] if answers else [])
    if answers is None:
        made = step.equally_many([], lambda: step.empty_microbatch(state, tower=True))
    else:
        mask = answers.completion_mask
        made = step.lay_out(state, answers, torch.ones(len(mask)), mask, split=False)
    # An empty microbatch has one completion, so it holds no pair.
    return [Pairs(batch, tuple(islice(rows, len(batch.advantages) // 2))) for batch in made]


@torch.no_grad()
def _add_reference(state: DPOState, batches: list[Pairs], computed: RefLogps | None) -> None:
    for pairs in batches:
        batch = pairs.batch
        if computed is not None:
            values = [computed[row] for row in pairs.rows]
            pairs.ref_logps = to_device(torch.tensor(values).view(-1, 2), state.engine.device)
        elif state.reference is not None:
            # Reuse image features: the reference has the same frozen tower. Only ZeRO-3 makes whole
            # weights expensive.
            if state.policy.vision_frozen and state.engine.zero_stage < 3 and pairs.rows:
                with state.engine.autocast():
                    batch.image_features = state.policy.image_features(batch.inputs)
            features = batch.image_features
            logps = step.reference_pass(state, batch.inputs, image_features=features)
            pairs.ref_logps = _sums(pairs, logps)


def _loss(
    state: DPOState, pairs: Pairs, stats: StepStats, num_pairs: float, num_tokens: float
) -> Tensor:
    """The microbatch's share of the loss.

    Args:
        num_pairs, num_tokens: the pairs of all ranks, and the tokens in their chosen answers.
    """
    batch, ref_logps = pairs.batch, pairs.ref_logps
    logps, entropy = state.engine.forward(batch.inputs, image_features=batch.image_features)
    if not pairs.rows:
        return 0.0 * logps.sum()
    sums, dpo, outcome = _sums(pairs, logps), state.dpo, None
    if ref_logps is not None:
        smoothing = dpo.label_smoothing
        outcome = dpo_loss(sums, ref_logps, beta=dpo.dpo_beta, label_smoothing=smoothing)
    _add_stats(stats, pairs, sums.detach(), entropy.detach(), outcome)
    if outcome is None:
        return 0.0 * logps.sum()
    return outcome[0].sum() / num_pairs - dpo.dpo_gamma * sums[:, 0].sum() / num_tokens


def _add_stats(
    stats: StepStats,
    pairs: Pairs,
    sums: Tensor,
    entropy: Tensor,
    loss: tuple[Tensor, Tensor] | None,
) -> None:
    """Add the sums behind the step's means over pairs or tokens.

    Args:
        loss: from `dpo_loss`.
    """
    lengths = pairs.batch.inputs.cu_seqlens.diff().view(-1, 2)  # on the host
    stats.add("nll", -sums[:, 0].sum(), int(lengths[:, 0].sum()))
    stats.add("entropy", entropy.sum(), int(lengths.sum()))
    # Log-prob accuracy is meaningful even before training; reward accuracy isn't.
    columns = {"logps/chosen": sums[:, 0], "logps/rejected": sums[:, 1],
               "logps/accuracies": sums[:, 0] > sums[:, 1]}  # fmt: skip
    if loss is not None:
        losses, rewards = loss
        margins = rewards[:, 0] - rewards[:, 1]
        columns |= {"dpo_loss": losses.detach(), "rewards/chosen": rewards[:, 0],
                    "rewards/rejected": rewards[:, 1], "rewards/margins": margins,
                    "rewards/accuracies": margins > 0}  # fmt: skip
    for name, column in columns.items():
        stats.add(name, column.sum(), len(sums))


def _sums(pairs: Pairs, logps: Tensor) -> Tensor:
    """(S,) log-probs -> (n, 2) sums over the tokens of each answer."""
    if not pairs.rows:
        return logps.new_zeros(0, 2)
    lengths = to_device(pairs.batch.inputs.cu_seqlens.diff().long(), logps.device)
    # unsafe skips checks that would wait for the device; the lengths are right by construction.
    sums = torch.segment_reduce(logps, "sum", lengths=lengths, initial=0.0, unsafe=True)
    return sums.view(-1, 2)


def _precompute_reference(config: RunConfig, state: DPOState, data: Data, *, resumed: bool) -> None:
    """Compute the reference's log-probs of all rows when a run starts; read them back when it
    resumes. From then on, only rows that have not changed can be used."""
    path = Path(config.train.output_dir) / REFERENCE_FILE
    held_out = 0 if data.test is None else min(config.train.eval_samples, len(data.test))
    counts: Row = {"train": len(data.train), "test": held_out}
    # The flags that decide which rows are usable and which part of them the model reads.
    flags = ("max_completion_length", "max_prompt_length", "min_pixels", "max_pixels")
    limits = {name: config.flat()[name] for name in flags}
    if resumed:
        tables = _read_reference(path, counts, limits)
    else:
        tables = _compute_reference(config, state, data, counts)
        content: Row = {"counts": counts, "limits": limits, "digests": {}}
        for name, (logps, digests) in tables.items():
            content[name], content["digests"][name] = logps, digests
        dist.on_main(partial(replace_text, path, json.dumps(content)))
    state.ref_logps, state.test_ref_logps = tables["train"][0], tables["test"][0]
    for source, (_, digests) in zip((data.train, data.test), tables.values(), strict=True):
        if source is not None:
            source.check = partial(_all_checks, (source.check, partial(check_unchanged, digests)))


def _compute_reference(config: RunConfig, state: DPOState, data: Data, counts: Row) -> Tables:
    from tqdm import tqdm

    tables = {}
    size = max(config.train.eval_batch_size, state.prompts_per_microbatch)
    for source, (name, count) in zip((data.train, data.test), counts.items(), strict=True):
        with tqdm(total=count, unit="row", desc="reference", disable=not dist.is_main()) as bar:
            load = (source or data.train).load  # `count` is 0 if there are no held-out rows
            tables[name] = reference_logps(state, load, count, size, bar.update)
    return tables


def _read_reference(path: Path, counts: Row, limits: Row) -> Tables:
    hint = "; it may be damaged, or of another version: start the run again"
    expected = f"{path}: expected the reference's log-probs of this run"
    with usage(), expecting(expected, hint=hint):
        saved = json.loads(path.read_text())
        had = saved["counts"]
        if had["train"] != counts["train"] or had["test"] < counts["test"]:
            raise ValueError(f"it has {had} rows, the data set has {counts}")
        if saved["limits"] != limits:
            raise ValueError(f"it was made with {saved['limits']}, this run has {limits}")
        return {
            name: (
                {int(row): (float(c), float(r)) for row, (c, r) in saved[name].items()},
                {int(row): str(d) for row, d in saved["digests"][name].items()},
            )
            for name in counts
        }


def _all_checks(checks: Sequence[Check | None], sample: Sample) -> str | None:
    return next((wrong for check in checks if check and (wrong := check(sample))), None)


class DPO(Algorithm[DPOState]):
    name = flags = "dpo"
    same_on_resume = ("dpo_beta", "label_smoothing", "dpo_gamma", "precompute_ref_log_probs")
    step = staticmethod(train_step)
    preferences = True
    files = (REFERENCE_FILE,)

    def without_effect(self, config: RunConfig) -> list[str]:
        if config.grpo.beta != type(config.grpo)().beta:  # TRL's name for dpo_beta
            raise UsageError(
                f"--beta {config.grpo.beta}: it is the weight of GRPO's KL term; for --algorithm "
                f"dpo pass --dpo_beta {config.grpo.beta}"
            )
        return super().without_effect(config) + ["task"] * (config.data.task != "auto")

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

    def check_row(self, config: RunConfig, tokenizer: Tokenizer) -> Check:
        return partial(check_pair, tokenizer, config.grpo.max_completion_length)

    def uses_reference(self, config: RunConfig) -> bool:
        return not config.dpo.precompute_ref_log_probs

    def make_state(self, config: RunConfig, **fields: Any) -> DPOState:
        return DPOState(config=config.grpo, dpo=config.dpo, **fields)

    def begin(self, config: RunConfig, state: DPOState, data: Data, *, resumed: bool) -> None:
        if config.dpo.precompute_ref_log_probs:
            _precompute_reference(config, state, data, resumed=resumed)

    def evaluate(self, config: RunConfig, state: DPOState, data: Data, num_rows: int) -> HeldOut:
        means = evaluate(state, data.held_out.load, num_rows, config.train.eval_batch_size)
        return {"means": means, "answers": {}, "num_samples": int(means.pop("num_pairs"))}

    def compare(self, before: HeldOut, after: HeldOut) -> tuple[str, Metrics, Metrics]:
        title = f"held-out pairs, {after['num_samples']} samples"
        # Before training, the policy equals the reference, so all rewards are 0.
        first = {k: v for k, v in before["means"].items() if not k.startswith("rewards/")}
        return title, first, {k: v for k, v in after["means"].items() if k in first}

    def answers(self, sample: Sample) -> dict[str, str]:
        return dict(zip(("chosen", "rejected"), pair_of(sample), strict=True))


ALGORITHM = DPO()
