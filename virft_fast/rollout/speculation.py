"""Lossless speculation: earlier answers as guesses of the next tokens.

A pass reads a row's last token and Q - 1 guesses, and draws a token after each. A draw depends only
on its seed, row, position and distribution. So a guess that equals the draw before it was right,
and everything after it is what would have been drawn without guessing. Guesses come from one pool:
the batch's prompts, recent answers of the run, earlier answers to the same prompts, and what the
batch's rows have drawn (`kernels.speculation`). Q follows the measured share of right guesses.

Shapes: N rows of a batch, R of them still decoded, Q tokens of each in a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts
from virft_fast.devices import to_device
from virft_fast.kernels.speculation import CONTEXT, MAX_READ, NOWHERE, Pool
from virft_fast.models.decode_step import Take

# Tokens of a `History`, each of 4 bytes: the last answers of the run, and answers by data set row.
RECENT_TOKENS = 2**13
STORED_TOKENS = 2**22
# Numbers of tokens of a row that a pass may read.
CHOICES = (1, 2, 4, 8)
# A guessing pass must promise this much.
MARGIN = 1.1
# Tokens after which a row's share of right guesses is half forgotten.
HALF_LIFE = 6
# Time of a pass by the number of tokens that it reads, R * Q, up to a factor. On a CPU, a part is
# for each pass, and the rest grows with the tokens. With 8, 16 and 64 rows of
# benchmarks/thinking.py, parts of 80 to 128 took the same time within the noise, and the larger
# ones fewer passes; with 64 rows, 48 took longer. On an H200, products of a bfloat16 model take
# longer than reading its weights from about 180 tokens on (computed from the measured rates in
# docs/gpu.md; speculation was not measured).
TIMES: dict[str, Callable[[int], float]] = {
    "cpu": lambda tokens: 112 + tokens,
    "cuda": lambda tokens: max(180, tokens),
}


@dataclass
class Stats:
    """Counts of one call of `generate`.

    Attributes:
        passes: of the language model over all rows, after the prompts. longest: tokens of the
            longest completion; both are sums over batches. `passes / longest` is about 1 without
            guesses.
        drawn: tokens of all completions.
        guessed: guesses that passes have read, up to a completion's end. accepted: those among them
            that were right.
        agreement: `History.agreement` after the call.
    """

    passes: int = 0
    longest: int = 0
    drawn: int = 0
    guessed: int = 0
    accepted: int = 0
    agreement: list[float] = field(default_factory=lambda: [0.0, 0.0])


Answers = tuple[int, Tensor]  # a row of the data set, and int32 tokens with -1 after each answer


class History:
    """Answers of a run, to guess from. Bounded, and on the CPU.

    Attributes:
        recent: (at most `recent_tokens`,) int32, the last answers, each followed by -1.
        stored: by index of the data set's row, the answers of its last rollout, likewise. If they
            exceed `stored_tokens` in all, the oldest leave.
        agreement: (2,) float64, share of right guesses at the end of the last batch, for prompts
            without and with stored answers. The next batch starts with it.
    """

    def __init__(
        self, *, recent_tokens: int = RECENT_TOKENS, stored_tokens: int = STORED_TOKENS
    ) -> None:
        self.recent_tokens, self.stored_tokens = recent_tokens, stored_tokens
        self.recent = torch.empty(0, dtype=torch.int32)
        self.stored: dict[int, Tensor] = {}
        self.agreement = torch.zeros(2, dtype=torch.float64)
        self._total = 0

    def num_bytes(self) -> int:
        """The most memory that the answers take."""
        return 4 * (self.recent_tokens + self.stored_tokens)

    def add(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> None:
        """Remember the rollouts' completions, G for each of the B prompts."""
        self.extend(answers_of(prompts, rollouts))

    def extend(self, answers: Sequence[Answers]) -> None:
        """Remember the `answers_of` rollouts."""
        recent = torch.cat([self.recent, *(group for _, group in answers)])
        self.recent = recent[max(len(recent) - self.recent_tokens, 0) :].clone()
        self.stored = self.stored.copy()  # so that a shallow copy of the history keeps its answers
        for row, group in answers:
            self._remove(row)
            self.stored[row] = group
            self._total += len(group)
        while self._total > self.stored_tokens:
            self._remove(next(iter(self.stored)))

    def _remove(self, index: int) -> None:
        self._total -= len(self.stored.pop(index, ()))

    def state_dict(self) -> dict[str, Tensor]:
        rows, groups = list(self.stored), list(self.stored.values())
        return {
            "recent": self.recent,
            "rows": torch.tensor(rows, dtype=torch.int64),
            "lengths": torch.tensor([len(group) for group in groups], dtype=torch.int64),
            "stored": torch.cat([torch.empty(0, dtype=torch.int32), *groups]),
            "agreement": self.agreement.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state isn't one of a history; says what was expected and what came.
        """
        expected = {name: (t.dtype, t.ndim) for name, t in self.state_dict().items()}
        found = {name: (t.dtype, t.ndim) for name, t in state.items()}
        if found != expected or not _is_consistent(state):
            raise ValueError(
                f"history: expected tensors {sorted(expected)}, one length for each row, as many "
                "stored tokens as these say, and two shares of right guesses, got "
                f"{ ({n: (*tuple(t.shape), t.dtype) for n, t in state.items()}) }; pass "
                "--speculation off to resume without earlier answers"
            )
        groups = state["stored"].split(state["lengths"].tolist())
        self.recent, self.agreement = state["recent"].clone(), state["agreement"].clone()
        self.stored = {
            row: group.clone() for row, group in zip(state["rows"].tolist(), groups, strict=True)
        }
        self._total = len(state["stored"])

    def texts(self, prompts: Sequence[Prompt], size: int) -> tuple[Tensor, Tensor]:
        """What the rows of a batch may repeat, and where they start.

        Returns:
            (L,) int64 tokens, -1 between texts and at the first places, which mean nowhere; and
            (B * size,) int64, the place where each row's stored answer begins, or `NOWHERE`.
        """
        nowhere = torch.full((NOWHERE + 1,), -1)
        parts = [nowhere]
        for prompt in prompts:
            parts += [prompt.input_ids.where(prompt.mm_token_type_ids == 0, -1), nowhere[:1]]
        parts.append(self.recent.long())
        length, starts = sum(map(len, parts)), []
        for prompt in prompts:
            group = self.stored.get(prompt.sample.index)
            places = [NOWHERE]
            if group is not None:
                parts.append(group.long())
                ends = (group == -1).nonzero().flatten().tolist()
                places = [length, *(length + end + 1 for end in ends[:-1])]
                length += len(group)
            starts += [places[row % len(places)] for row in range(size)]
        return torch.cat(parts), torch.tensor(starts)


def answers_of(prompts: Sequence[Prompt], rollouts: Rollouts) -> list[Answers]:
    """Each prompt's row of the data set and its G completions, as a history has them."""
    size, end = rollouts.num_generations, torch.tensor([-1], dtype=torch.int32)
    rows = zip(rollouts.completion_ids.int().cpu(), rollouts.completion_mask.cpu(), strict=True)
    texts = [torch.cat([ids[mask], end]) for ids, mask in rows]
    return [
        (prompt.sample.index, torch.cat(texts[number * size : (number + 1) * size]))
        for number, prompt in enumerate(prompts)
    ]


def _is_consistent(state: Mapping[str, Tensor]) -> bool:
    rows, lengths, agreement = (state[name] for name in ("rows", "lengths", "agreement"))
    return (
        len(rows) == len(lengths) == len(rows.unique())
        and bool((lengths > 0).all())
        and int(lengths.sum()) == len(state["stored"])
        and len(agreement) == 2
        and bool(((agreement >= 0) & (agreement <= 1)).all())  # not so for NaN
    )


class Speculation:
    """Guesses for the rows of one batch, and how many of them a pass reads.

    Attributes:
        pool: see `kernels.speculation`.
        starts: (N,) int64 places of the rows' first guesses.
        read: Q of the next passes. kept: how many of these tokens a row is expected to keep.
        longest: tokens of the longest of the decoded rows, at the last `note`.
    """

    def __init__(
        self, history: History, prompts: Sequence[Prompt], size: int, length: int,
        *, stats: Stats, device: torch.device, take: Take,
    ) -> None:  # fmt: skip
        self.stats = stats
        self.time = TIMES.get(device.type, TIMES["cpu"])
        texts, starts = history.texts(prompts, size)
        rows, width = len(starts), CONTEXT + length + MAX_READ
        first, places, entries = _sizes(len(texts), rows, width)
        self.pool = Pool(
            take("pool", (places,), torch.long).fill_(-1),
            take("ngrams", (3, entries), torch.long).fill_(NOWHERE),
            first,
            width,
        )
        tails = torch.full((len(prompts), CONTEXT), -1)
        for tail, prompt in zip(tails, prompts, strict=True):
            last = prompt.input_ids[-CONTEXT:]
            tail[CONTEXT - len(last) :] = last
        tails = to_device(tails.repeat_interleave(size, 0), device)
        self.pool.tokens[first : first + rows * width].view(rows, width)[:, :CONTEXT] = tails
        self.pool.tokens[: len(texts)] = to_device(texts, device)
        self.pool.insert(torch.arange(CONTEXT, len(texts), device=device))
        self.starts = to_device(starts, device)
        # The rows that are decoded: drawn, right, guessed and accepted tokens. By row of the batch:
        # the share of right guesses, which starts with that of the last batch. In NumPy, whose
        # small operations are faster.
        self.rows, self.counts = np.arange(rows), np.zeros((4, rows), np.int64)
        self.known = (starts > NOWHERE).numpy()
        self.share = np.array(stats.agreement)[self.known.astype(int)]
        self.read, self.kept = 1, 1.0
        self.longest = 0

    def note(self, counts: Tensor) -> None:
        """Take the counts of the rows that are decoded: (4, R) int64 on the host."""
        now = counts.numpy()
        change = now - self.counts
        new, right, self.counts = change[0], change[1], now
        self.longest = max(now[0].tolist())
        share = self.share[self.rows]
        share += (1 - 0.5 ** (new / HALF_LIFE)) * (right / np.maximum(new, 1) - share)
        self.share[self.rows] = share

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only these of the current rows."""
        self._count(np.delete(self.counts, rows, 1))
        self.rows, self.counts = self.rows[rows], self.counts[:, rows]

    def choose(self, active: Sequence[bool]) -> None:
        """Choose what the next passes read, from counts alone."""
        share = self.share[self.rows[np.array(active)]]
        self.read, self.kept = best_choice(share, len(active), self.time)

    def finish(self) -> None:
        """Leave the shares to the next batch, and the counts to the statistics."""
        for known in (False, True):
            rows = self.known == known
            if rows.any():
                self.stats.agreement[int(known)] = float(self.share[rows].mean())
        self._count(self.counts)

    def _count(self, counts: np.ndarray) -> None:
        self.stats.guessed += int(counts[2].sum())
        self.stats.accepted += int(counts[3].sum())


def _sizes(texts: int, rows: int, width: int) -> tuple[int, int, int]:
    """Places for the texts and in all, and entries of the table for each n: few different sizes, so
    that few graphs serve all batches."""
    first = 1 << (max(texts, 1024) - 1).bit_length()
    places = first + rows * width + 2 * MAX_READ
    return first, places, 1 << (2 * places - 1).bit_length()


def pool_bytes(groups: int, size: int, prompt_length: int, length: int) -> int:
    """The most device memory that guessing takes, for so many prompts with `size` completions each,
    of at most these lengths in tokens."""
    rows, texts = groups * size, NOWHERE + 1 + RECENT_TOKENS + groups * (prompt_length + 1)
    texts += rows * (length + 1)
    _, places, entries = _sizes(texts, rows, CONTEXT + length + MAX_READ)
    return 8 * (places + 3 * entries)


def best_choice(share: np.ndarray, rows: int, time: Callable[[int], float]) -> tuple[int, float]:
    """How many tokens of each row a pass should read, and how many it will keep.

    A guess of row r is right with probability `share[r]`, so that a pass of Q tokens keeps the sum
    of its powers 0 to Q - 1. The batch takes as long as its longest row, and each of the rows may
    be the longest: what counts is the mean number of passes per token.

    Args:
        share: (rows that are active,) float64.
        rows: R, the rows that a pass reads.
        time: of a pass, by its number of tokens.
    """
    kept = (share ** np.arange(MAX_READ)[:, None]).cumsum(0)
    passes = (np.add.reduce(1 / kept, 1) / len(share)).tolist()  # per token; faster than mean()
    times = {
        read: passes[read - 1] * time(rows * read) * (MARGIN if read > 1 else 1) for read in CHOICES
    }
    best = min(CHOICES, key=times.__getitem__)
    return best, 1 / passes[best - 1]
