"""Applies one-line changes to a copy of the project and reports those that no test notices.

    python scripts/mutants.py                 all changes that are not in the journal yet
    python scripts/mutants.py --only world    those with `world` in their names

Each change names the tests that must fail. Results go into a journal, so that a stopped campaign
continues where it was; `--again` starts it over. The exit status is 1 if a change survives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("virft_fast", "tests", "configs", "pyproject.toml", "scripts", "examples", "docs",
          "README.md")  # fmt: skip


class Mutant(NamedTuple):
    """A change: `old`, which occurs once in the file, becomes `new`. `tests` are pytest's arguments
    for the tests that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


GRPO, STEP = "algorithms/grpo.py", "algorithms/step.py"
GROUPS = "algorithms/groups.py"
ENGINE, SAMPLER = "engine.py", "rollout/sampling.py"
SAMPLING = "kernels/sampling.py"
DECODING, SHRINKING = "rollout/decoding.py", "rollout/shrinking.py"
DECODE = "kernels/decode.py"
GUESSES = "kernels/speculation.py"
PREFIX, INPUTS = "models/shared_prefix.py", "models/inputs.py"
RECURRENT, PLAIN = "models/recurrent.py", "models/plain.py"
PACKED = "kernels/prefix_attention.py"
PACKED_TRITON = "kernels/triton_prefix_attention.py"
TOKEN, LOSS, LINEAR = "kernels/token_loss.py", "kernels/grpo_loss.py", "kernels/linear.py"
ADVANTAGES, ROWS = "kernels/advantages.py", "kernels/logprobs.py"
REWARDS, ORIGINAL, SCORING = "tasks/rewards.py", "tasks/visual_rft.py", "tasks/scoring.py"
MATCHING, ORDER, CHECKPOINT = "matching/reference.py", "data/order.py", "checkpoint.py"
SCALES = "[(loss, len(mb.advantages) * world / num_sequences) for mb in microbatches]"
SHARES = "tests/test_grpo.py -k shares_of_two_ranks"

MUTANTS = [
    # Several processes
    *(
        Mutant(
            f"{kind} without world",
            STEP,
            SCALES,
            SCALES.replace("* world", f'* (1 if loss.loss_type == "{kind}" else world)'),
            SHARES,
        )
        for kind in ("grpo", "gspo", "dr_grpo")
    ),
    Mutant("dapo without world", STEP, "max(num_tokens, 1.0) / world", "max(num_tokens, 1.0)",
           SHARES),
    Mutant("counts of this rank alone", STEP, "dist.sum_numbers(counts, device)", "counts",
           SHARES),
    Mutant("a veto of this rank alone", STEP, "veto = dist.any_rank(~finite, state.engine.device)",
           "veto = ~finite", "tests/test_grpo.py -k another_ranks_loss"),
    Mutant("a stop of this rank alone", "train/loop.py",
           "if dist.any_rank(watch.stopped, state.engine.device):", "if watch.stopped:",
           "tests/test_stopping.py -k another_rank_that_is_asked"),
    Mutant("errors stay on their rank", "dist.py", "        raise RankFailed(errors)", "        pass",
           "tests/test_stopping.py -k agreed"),
    # Steps
    Mutant("a gradient that is not finite is applied", ENGINE,
           "applied = math.isfinite(norm) and not veto", "applied = not veto",
           "tests/test_grpo.py -k gradient_that_is_not_finite"),
    Mutant("a veto is not heeded", ENGINE, "applied = math.isfinite(norm) and not veto",
           "applied = math.isfinite(norm)", "tests/test_grpo.py -k another_ranks_loss"),
    Mutant("bad steps are never forgotten", STEP,
           "state.bad_steps = 0 if applied else state.bad_steps + 1",
           "state.bad_steps = state.bad_steps + (not applied)", "tests/test_grpo.py -k good_step"),
    Mutant("bad steps are never counted", STEP,
           "state.bad_steps = 0 if applied else state.bad_steps + 1", "state.bad_steps = 0",
           "tests/test_grpo.py -k non_finite_step"),
    Mutant("gradients pile up", ENGINE, "self.optimizer.zero_grad(set_to_none=True)", "pass",
           "tests/test_trl_parity.py tests/test_golden.py"),
    Mutant("no clipping", ENGINE,
           "nn.utils.clip_grad_norm_(self._trained(), self.settings.max_grad_norm or math.inf)",
           "nn.utils.get_total_norm([p.grad for p in self._trained() if p.grad is not None])",
           "tests/test_grpo.py -k long_gradient"),
    Mutant("truncated completions are counted", GRPO,
           "loss_shares(microbatches, _counted(rollouts, state.config), _loss_args(state))",
           "loss_shares(microbatches, rollouts.completion_mask, _loss_args(state))",
           "tests/test_grpo.py -k not_counted_where_they_are_masked"),
    Mutant("truncated completions are not counted as drawn", STEP,
           "float(rollouts.completion_mask.sum()) * world",
           "float(rollouts.completion_mask[~rollouts.truncated].sum()) * world",
           "tests/test_grpo.py -k counted_as_drawn"),
    Mutant("truncated completions are learnt from", GRPO,
           "mask = _counted(rollouts, state.config)", "mask = rollouts.completion_mask",
           "tests/test_grpo.py -k truncated_completions_leave"),
    Mutant("groups of equal rewards are read", GRPO,
           "mask = mask & (advantages != 0).to(mask.device)[:, None]", "pass",
           "tests/test_shared_prefix.py -k equal_rewards"),
    Mutant("the policy is its own reference", STEP,
           "with adapters.as_reference(state.policy.model):", "if True:",
           "tests/test_stages.py -k reference"),
    Mutant("old log-probs move with the policy", GRPO, "logps if several else None", "None",
           "tests/test_grpo.py -k several_iterations"),
    Mutant("all updates are one minibatch's", GRPO,
           "for indices in deal(list(chosen.values()), count, (state.seed, state.step)):",
           "for indices in [list(range(len(chosen)))] * count:",
           "tests/test_minibatches.py -k one_update"),
    Mutant("a later round draws the same rows", GRPO, "(number * dist.world_size() + ", "(0 + ",
           "tests/test_minibatches.py -k later_round"),
    Mutant("groups that teach don't come first", GROUPS,
           "key=lambda g: not teaches[g[0]][g[1]][g[2]]", "key=len",
           "tests/test_minibatches.py -k chosen"),
    Mutant("the same seed in every step", GRPO,
           "seed=state.seed * 1_000_003 + state.step", "seed=state.seed * 1_000_003",
           "tests/test_grpo.py -k draws_anew"),
    Mutant("all ranks draw the same rows", GRPO,
           " + dist.rank()) * len(prompts) * size", ") * len(prompts) * size",
           "tests/test_distributed.py -k two_ranks_equal"),
    Mutant("a rank guesses from its own answers alone", GRPO,
           "[answer for answers, _ in ranks for answer in answers]", "mine[0]",
           "tests/test_speculating_runs.py -k two_processes"),
    Mutant("silent rewards are never counted", GRPO, "0 if scored_some else", "0 if True else",
           "tests/test_grpo.py -k scores_nothing"),
    Mutant("a reward weight is ignored", SCORING,
           "(rewards * torch.tensor(weights, dtype=torch.float32)).nansum(1)", "rewards.nansum(1)",
           "tests/test_rewards.py -k weighs"),
    # The loss
    Mutant("advantages by the biased deviation", ADVANTAGES,
           "std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()",
           "std = (centred.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()",
           "tests/test_kernels.py -k advantages_by_hand"),
    Mutant("rewards that are not finite enter the mean", ADVANTAGES,
           "scored = groups.isfinite()", "scored = ~groups.isnan()",
           "tests/test_kernels.py -k unscored_rows"),
    Mutant("equal rewards keep rounding", ADVANTAGES,
           "centred = torch.where(highest > lowest, centred, 0.0)", "pass",
           "tests/test_kernels.py -k exactly_zero"),
    Mutant("leave-one-out keeps its own reward", ADVANTAGES,
           "centred = centred * (count / (count - 1).clamp(min=1))", "pass",
           "tests/test_kernels.py -k estimators_by_hand"),
    Mutant("REINFORCE++ by the spread of the rewards", ADVANTAGES,
           "centred = centred / (_std(centred, scored) + eps)",
           "centred = centred / (_std(groups, scored) + eps)",
           "tests/test_kernels.py -k estimators_by_hand"),
    Mutant("rewards are summed before they are normalized", GRPO,
           'cfg.multi_objective_aggregation == "normalize_then_sum"', "False",
           "tests/test_grpo.py -k takes_the_estimator"),
    Mutant("the larger branch is taken", TOKEN, "loss = -torch.minimum(free, bound)",
           "loss = -torch.maximum(free, bound)", "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("clipped tokens have a gradient", TOKEN,
           "slope = share * below_delta + (1 - share) * inside", "slope = share + (1 - share)",
           "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("epsilon_high is epsilon_low", TOKEN, "1 - args.epsilon_low, 1 + args.upper_epsilon",
           "1 - args.epsilon_low, 1 + args.epsilon_low", "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("delta is ignored", TOKEN, "ratio = ratio.clamp(max=args.delta)", "pass",
           "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("k3 without its constant", TOKEN, "return value - d - 1, 1 - slope",
           "return value - d, 1 - slope", "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("beta is applied twice", TOKEN, "d_logp = d_logp + beta * d_estimate",
           "d_logp = d_logp + 2 * beta * d_estimate", "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("the KL's ratio is bounded by delta", TOKEN, "estimate * ratio, d_estimate * ratio",
           "estimate * ratio.clamp(max=args.delta), d_estimate * ratio",
           "tests/test_trl_parity.py -k every_option"),
    Mutant("the entropy mask spares the KL", TOKEN, "loss = loss + beta * estimate",
           "loss = loss + beta * estimate * (1 if weight is None else weight)",
           "tests/test_trl_parity.py -k every_option"),
    Mutant("vespo averages log-ratios", LOSS,
           "log_w = layout.sequence_sum(log_ratio.clamp(-LOG_WEIGHTS[1], LOG_WEIGHTS[1]))",
           "log_w = layout.sequence_sum(log_ratio) / layout.lengths.clamp(min=1)",
           "tests/test_trl_parity.py -k every_option"),
    Mutant("ratios of sequences are sums", LOSS,
           "log_ratio = layout.per_token(layout.sequence_sum(log_ratio) / lengths)",
           "log_ratio = layout.per_token(layout.sequence_sum(log_ratio))",
           "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("dr_grpo by the longest completion", LOSS,
           "return mask / (num_sequences * max_completion_length)",
           "return mask / (num_sequences * int(layout.lengths.max()))",
           "tests/test_kernels.py -k equal_the_oracle"),
    Mutant("no active token divides by zero", LOSS,
           "return torch.where(count <= 0, 1.0, count)", "return count",
           "tests/test_kernels.py -k finite_zero"),
    Mutant("the entropy forgets the probabilities", ROWS,
           "mean = e.mul_(z).sum(-1, keepdim=True) / total",
           "mean = z.sum(-1, keepdim=True) / total",
           "tests/test_kernels.py -k entropy_equal"),
    Mutant("tokens without an advantage go backward", LINEAR,
           "silent = self.terms.layout.per_token(self.terms.advantages) == 0", "pass",
           "tests/test_kernels.py -k three_products"),
    Mutant("clipped rows keep their place", LINEAR, "hidden, rows = hidden[keep], _part(rows, keep)",
           "hidden = hidden[keep]", "tests/test_kernels.py -k moved_rows"),
    # Shared prompts and rollouts
    Mutant("completions see each other", PREFIX,
           "own = (sequence[k] == 0) | (sequence[q] == sequence[k])",
           "own = sequence[k] >= 0", "tests/test_shared_prefix.py -k core_against_a_loop"),
    Mutant("a completion sees its future", PACKED, "return mask.tril(group.prompt_length)",
           "return mask.tril(group.prompt_length + 1)",
           "tests/test_shared_prefix.py -k core_against_a_loop"),
    Mutant("prompts are not causal", PACKED, "is_causal=mask is None", "is_causal=False",
           "tests/test_shared_prefix.py -k core_against_a_loop"),
    Mutant("a window is a token longer", PACKED, "return mask.triu(1 - window)",
           "return mask.triu(-window)", "tests/test_windows.py -k logps"),
    Mutant("a window of all tokens but one is none", PREFIX,
           "if config.sliding_window < longest}", "if config.sliding_window < longest - 1}",
           "tests/test_windows.py -k tests_mean"),
    Mutant("a packed row's window is a token longer", PREFIX, "(place[k] > place[q] - window)",
           "(place[k] >= place[q] - window)", "tests/test_windows.py -k every_core"),
    Mutant("an observed window is a token longer", "models/image_attention.py",
           "hidden |= places <= last[:, None] - window", "hidden |= places < last[:, None] - window",
           "tests/test_windows.py -k observed"),
    Mutant("a prompt's window is a token longer", DECODE, "(prompt <= last[..., None])",
           "(prompt < last[..., None])", "tests/test_windows.py -k greedy"),
    Mutant("a completion's window is a token longer", DECODE, "(own <= ends - window)",
           "(own < ends - window)", "tests/test_windows.py -k greedy"),
    Mutant("an image doesn't see itself whole", INPUTS, "is_image & image_blocks", "is_image & False",
           "tests/test_windows.py -k logps"),
    Mutant("the kernel's completions see each other", PACKED_TRITON,
           "return (cols[None] <= rows[:, None]) & (cols[None] >= starts[:, None])",
           "return cols[None] <= rows[:, None]",
           "tests/test_prefix_attention.py -k interpreted"),
    Mutant("shares of a split block are lost", PACKED_TRITON, "for number in range(count):",
           "for number in range(1, count):", "tests/test_prefix_attention.py -k interpreted"),
    Mutant("a layer that bypasses the routing is not noticed", PREFIX,
           "if len(layers) < num_layers:", "if False:",
           "tests/test_shared_prefix.py -k bypasses"),
    Mutant("padding changes a recurrent state", RECURRENT, "view(*self.shape, -1) * self._real",
           "view(*self.shape, -1)", "tests/test_hybrids.py -k layer_of_any"),
    Mutant("the convolution reads the row before", RECURRENT, ".index_fill_(0, self._blank, 0.0)", "",
           "tests/test_hybrids.py -k layer_of_any"),
    Mutant("a completion starts from the state of another prompt", RECURRENT,
           "state.index_select(0, self.parents)", "state.index_select(0, 0 * self.parents)",
           "tests/test_hybrids.py -k layer_of_any"),
    Mutant("a shrunk batch keeps other rows' states", "rollout/cache.py",
           "select(cache.states, rows)", "cache.states[: len(rows)]",
           "tests/test_hybrids.py -k batches_that_shrink"),
    Mutant("the nucleus' boundary", SAMPLING, "searchsorted(mass, top_p * mass[:, -1:])",
           "searchsorted(mass, top_p * mass[:, -1:], right=True)", "tests/test_rollout.py -k nucleus"),
    Mutant("top_k keeps one too few", SAMPLING, "scores < low", "scores <= low",
           "tests/test_rollout.py -k exact_probabilities"),
    Mutant("min_p by the sum", SAMPLING, "highest + math.log(min_p)",
           "scores.logsumexp(-1, keepdim=True) + math.log(min_p)", "tests/test_rollout.py -k exact_probabilities"),
    Mutant("no temperature", SAMPLING, "scores = scores / temperature", "pass",
           "tests/test_rollout.py -k exact_probabilities"),
    Mutant("positions share their draws", SAMPLING, "z = seeds + (positions + 1) *",
           "z = seeds + 0 * positions +", "tests/test_rollout.py -k independent"),
    Mutant("the end of a completion is padding", SAMPLER, "ends.int().argmax(1) + 1",
           "ends.int().argmax(1)", "tests/test_rollout.py -k mask_ends"),
    Mutant("banned tokens are drawn", SAMPLING, "logits if bias is None else logits + bias", "logits",
           "tests/test_rollout.py -k banned"),
    Mutant("positions begin at the prompt's end", DECODING, "places[:, group.start : group.first].max() + 1",
           "places[:, group.start : group.first].max()", "tests/test_rollout.py -k plain_generate"),
    Mutant("kept rows lose their order", SHRINKING, "prompt * size + row", "prompt * width + row",
           "tests/test_rollout.py -k stay_apart"),
    Mutant("rows start at the old first rows", DECODING, "first_rows.append(first_rows[-1] + size)",
           "first_rows.append(first_rows[-1] + 1)", "tests/test_rollout.py -k graph"),
    Mutant("the draw after a wrong guess is lost", GUESSES,
           "kept = torch.minimum(torch.minimum(right, going.cumprod(1).sum(1)) + 1, length - drawn_at)",
           "kept = torch.minimum(torch.minimum(right, going.cumprod(1).sum(1)), length - drawn_at)",
           "tests/test_decode.py -k lists"),
    Mutant("a completion goes on after its end", GUESSES,
           "torch.minimum(right, going.cumprod(1).sum(1)) + 1", "right + 1",
           "tests/test_decode.py -k lists"),
    Mutant("other n-grams match", GUESSES, "torch.where(equal >= back[1:], found, NOWHERE)", "found",
           "tests/test_decode.py -k lists"),
    Mutant("guesses see no repetition penalty of those before", SAMPLER,
           "read = torch.arange(MAX_READ).repeat(MAX_READ, 1).tril()",
           "read = torch.zeros(MAX_READ, MAX_READ, dtype=torch.long)", "tests/test_speculation.py -k penalty"),
    Mutant("a checkpoint has guesses of a rollout that it drops", "train/loop.py",
           '"history": copy(run.state.history)', '"history": run.state.history',
           "tests/test_speculating_runs.py -k nothing"),
    Mutant("the attention of wrong guesses counts", DECODING,
           "torch.arange(count, device=kept.device) >= kept[:, None]",
           "torch.arange(count, device=kept.device) >= 8 * kept[:, None]",
           "tests/test_speculation.py -k attention"),
    # Rewards, matching, data
    Mutant("accuracy_confidence at 0.4", REWARDS,
           "matched = _match(pairs, min_iou=0.5)[0] >= 0", "matched = _match(pairs, min_iou=0.4)[0] >= 0",
           "tests/test_rewards.py -k accuracy_confidence"),
    Mutant("further boxes cost nothing", REWARDS,
           "count = max(len(predicted.boxes), len(true.boxes))", "count = len(true.boxes)",
           "tests/test_rewards.py -k accuracy_iou"),
    Mutant("boxes after the last match are free", REWARDS,
           "precision * (num_true / num_pred.clamp(min=1)).clamp(max=1)", "precision",
           "tests/test_detection_rewards.py -k added"),
    Mutant("classes don't count", REWARDS, 'key(label) if labeled else ""', '""',
           "tests/test_detection_rewards.py -k map_by_hand"),
    Mutant("ties in confidence are an order", REWARDS,
           "ends = torch.where(sure[:, :-1] != sure[:, 1:], rank, size)",
           "ends = rank.expand(len(pairs), -1)",
           "tests/test_detection_rewards.py -k map_by_hand"),
    Mutant("denials are paid alike in all data sets", REWARDS,
           "min(1.0, other / rarer) if right and rarer > 0 else", "",
           "tests/test_detection_rewards.py -k one_answer_to_all_rows"),
    Mutant("two boxes count as one", REWARDS,
           "boxes = [d.boxes[0] if d and len(d.boxes) == 1 else NOT_A_BOX for d in detections]",
           "boxes = [d.boxes[0] if d and d.boxes else NOT_A_BOX for d in detections]",
           "tests/test_rewards.py -k two_boxes"),
    Mutant("the original's mean over all boxes", ORIGINAL,
           "return [_mean_iou(results) for results, _ in _results(texts, truths)]",
           "return [_mean_iou(*pair) for pair in _results(texts, truths)]",
           "tests/test_rewards.py -k iou_v1"),
    Mutant("a match at the threshold", MATCHING, "worth = torch.where(ious > min_iou, ious, 0.0)",
           "worth = torch.where(ious >= min_iou, ious, 0.0)",
           "tests/test_native_matching.py tests/test_matching.py"),
    Mutant("equal scores in any order", MATCHING,
           'return np.argsort(descending, axis=1, kind="stable")',
           "return np.argsort(descending[:, ::-1], axis=1)[:, ::-1]",
           "tests/test_native_matching.py tests/test_matching.py"),
    Mutant("every epoch in the same order", ORDER, "np.random.default_rng((self.seed, self._epoch))",
           "np.random.default_rng(self.seed)", "tests/test_data.py -k epoch"),
    Mutant("bad rows are tried again", ORDER, "index not in self._bad and", "",
           "tests/test_data.py"),
    Mutant("rows that teach again stay rare", ORDER, "+ 1 if equal else 0", "+ equal",
           "tests/test_minibatches.py -k teaches_again"),
    # Checkpoints
    Mutant("no fsync", CHECKPOINT, "        os.fsync(descriptor)", "        pass",
           "tests/test_checkpoint.py -k on_disk_before"),
    Mutant("a checkpoint is written where it stays", CHECKPOINT,
           'aside = output_dir / f"{final.name}{_ASIDE}"', "aside = final", "tests/test_checkpoint.py"),
    Mutant("the oldest checkpoints are kept", CHECKPOINT, "list_checkpoints(output_dir)[:-total_limit]",
           "list_checkpoints(output_dir)[total_limit:]", "tests/test_checkpoint.py -k latest_are_kept"),
    # Other families
    Mutant("a completion without the opened thought", "batch.py",
           'return tag + space if tag and not space.strip() else ""', 'return ""',
           "tests/test_thoughts.py"),
    Mutant("an answer within the opened thought", "batch.py",
           'else f"\\n</think>\\n\\n{answer}"', "else answer", "tests/test_thoughts.py"),
    Mutant("an evaluation forgets the flags", "evaluate.py", "one = copy.copy(config)",
           "one = type(config)(**{n: v for n, v in vars(config).items() if n[0] != '_'})",
           "tests/test_families.py -k native_rollouts_are"),
    Mutant("weights under other names", "models/qwen_vl.py",
           "[entry for entry in renamings if entry.was_used()]", "[]",
           "tests/test_families.py -k saved_folders"),
    Mutant("a turn's end is in other files alone", "models/processing.py",
           "*(token for token in special if token not in start)]", "]",
           "tests/test_families.py -k turns_end"),
    Mutant("a question's start ends a turn", "models/processing.py",
           "for token in special if token not in start)", "for token in special)",
           "tests/test_families.py -k turns_end"),
    Mutant("agreement on stored answers is forgotten", "rollout/speculation.py",
           "[self.known.astype(int)]", "[0 * self.known.astype(int)]",
           "tests/test_speculation.py -k rows_start"),
    Mutant("rotations that wait are captured", "models/decode_step.py",
           '{"dynamic", "longrope"}', '{"longrope"}', "tests/test_syncs.py -k are_not_captured"),
    Mutant("experts in float32 are captured", "models/decode_step.py",
           "        and weight.dtype == torch.bfloat16\n", "",
           "tests/test_syncs.py -k are_not_captured"),
    Mutant("a prompt begins with BOS twice", INPUTS,
           '{"add_special_tokens": False} if begins else {}', "{}",
           "tests/test_families.py -k bos_token"),
    Mutant("tiles are padded at the front", INPUTS, "for n in (0, size)]", "for n in (size, 0)]",
           "tests/test_families.py -k neighbor"),
    Mutant("completions have their prompt's token type", INPUTS,
           'value = completion_type if name == "token_type_ids" else 0', "value = 0",
           "tests/test_families.py -k paligemma"),
    Mutant("rows share one copy of an image", PLAIN, "repeated = inputs.per_row(features)",
           "repeated = features", "tests/test_families.py -k paligemma"),
    Mutant("a model that asks for no images is not noticed", PLAIN, "if not asked:", "if False:",
           "tests/test_families.py -k asks_for_no_images"),
    Mutant("a tower without images has no gradients", PLAIN,
           "states = states + 0.0 * features.to(states.dtype).sum()", "pass",
           "tests/test_families.py -k tower_runs"),
    Mutant("a cap of the logits is not seen", PLAIN, "return scale, cap", "return scale, None",
           "tests/test_families.py -k capped"),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, default=ROOT / "build/mutants.jsonl")
    parser.add_argument("--only", default="", help="a part of the names")
    parser.add_argument("--again", action="store_true", help="forget the journal")
    arguments = parser.parse_args()
    arguments.journal.parent.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        arguments.journal.unlink(missing_ok=True)
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    done = read_journal(arguments.journal)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_project(copy)
        for number, mutant in enumerate(chosen, 1):
            if key(mutant) in done:
                continue
            started = time.monotonic()
            if mutant.tests not in done:  # tests that fail without a mutant prove nothing
                passes = run_tests(copy, mutant.tests) == 0
                done[mutant.tests] = note(arguments.journal, mutant.tests, str(passes))
            outcome = judge(copy, mutant) if done[mutant.tests] == "True" else "fails anyway"
            done[key(mutant)] = note(arguments.journal, key(mutant), outcome)
            seconds = time.monotonic() - started
            print(
                f"{number:3}/{len(chosen)}  {outcome:9}  {seconds:5.0f} s  {mutant.name}",
                flush=True,
            )
    outcomes = [done[key(mutant)] for mutant in chosen]
    others = [m.name for m, outcome in zip(chosen, outcomes, strict=True) if outcome != "killed"]
    print(f"{outcomes.count('killed')} of {len(chosen)} killed")
    for name in others:
        print(f"not killed: {name}")
    return 1 if others else 0


def key(mutant: Mutant) -> str:
    """A key that changes with the mutant, so that no result is reused for another one."""
    return json.dumps(mutant)


def read_journal(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["mutant"]: record["outcome"] for record in records}


def note(journal: Path, name: str, outcome: str) -> str:
    with journal.open("a") as file:
        file.write(json.dumps({"mutant": name, "outcome": outcome}) + "\n")
    return outcome


def copy_project(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)


def judge(copy: Path, mutant: Mutant) -> str:
    """ "killed", "survived", or why the mutant could not be tested."""
    path = copy / "virft_fast" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return "not found"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        status = run_tests(copy, mutant.tests)
    finally:
        path.write_text(text)
    return {0: "survived", 1: "killed"}.get(status, f"pytest {status}")


def run_tests(copy: Path, tests: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1",
                   "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    chosen, _, expression = tests.partition(" -k ")
    more = ["-k", expression] if expression else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *more,
               *chosen.split()]  # fmt: skip
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode


if __name__ == "__main__":
    sys.exit(main())
