"""Keeps the drawn tokens that were guessed right, and guesses the next ones. No host is needed.

All tokens that guesses come from are in one flat pool, least specific first. The latest place that
continues the longest equal n-gram gives the guess. CUDA tensors go to Triton
(`triton_speculation`), one launch for each of `keep_drawn` and `look_up`; CPU tensors to the
compiled module (csrc/speculation/), or without it to the torch references here. All are
deterministic, and give equal guesses.

Shapes: N rows of the batch, R of them still decoded, each of which reads Q tokens in a pass; L
places in the pool; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from virft_fast import native
from virft_fast.devices import to_device
from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.decode import _check

MAX_READ = 8  # the largest Q; a row has as many guesses
CONTEXT = 4  # tokens of the longest n-gram; the shortest has two
NOWHERE = CONTEXT  # a place without a token, where guesses end at once
# Odd 64-bit numbers from splitmix64 of 1 to 4; a sum of products with them spreads n-grams evenly.
FACTORS = (
    -2152535657050944081, 7960286522194355701, 487617019471545679, -537132696929009171,
)  # fmt: skip
# Rows of the counters.
LENGTHS, POSITIONS, DRAWN_AT, RIGHT, GUESSED, ACCEPTED, PLACE = range(7)


@dataclass(frozen=True)
class Pool:
    """The tokens that guesses come from, and where their n-grams are.

    Attributes:
        tokens: (L,) int64, -1 where there is none: at the places 0 to `NOWHERE`, between texts, and
            where a row hasn't drawn yet. At least 2 * `MAX_READ` places at the end have none.
        table: (3, S) int64, S a power of two: for n = 2, 3, 4 and a hash, the latest place that
            continues such an n-gram, or `NOWHERE`.
        first: where the rows begin.
        width: places per row: the last `CONTEXT` tokens of its prompt, its completion, and
            `MAX_READ` places without a token.
    """

    tokens: Tensor
    table: Tensor
    first: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """What a captured graph depends on, besides addresses."""
        return len(self.tokens), self.table.shape[1], self.first, self.width

    def completions(self, rows: int) -> Tensor:
        """(N, width - CONTEXT) view of what the rows have drawn."""
        own = self.tokens[self.first : self.first + rows * self.width].view(rows, self.width)
        return own[:, CONTEXT:]

    @property
    def addresses(self) -> tuple[int, ...]:
        """The pool as the compiled module takes it."""
        size = self.table.shape[1]
        return self.tokens.data_ptr(), self.table.data_ptr(), size, self.first, self.width

    def insert(self, places: Tensor) -> None:
        """Add the n-grams before some places to the table. Places without a token, or after fewer
        than n tokens, are skipped.

        Args:
            places: (...) int64.
        """
        window, entries = self.entries(places)
        known = (window >= 0).cumprod(-1)[..., 2:] > 0
        found = torch.where(known, places[..., None], NOWHERE)
        self.table.view(-1).scatter_reduce_(0, entries.flatten(), found.flatten(), "amax")

    def entries(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """What is before some places.

        Args:
            places: (...) int64.
        Returns:
            (..., 1 + CONTEXT) tokens at the places and before, backwards; and (..., 3), where the
            flattened table has the n-grams that end before the places.
        """
        device, size = places.device, self.table.shape[1]
        window = torch.take(
            self.tokens, places[..., None] - torch.arange(CONTEXT + 1, device=device)
        )
        hashes = (window * to_device(torch.tensor((0, *FACTORS)), device)).cumsum(-1)[..., 2:]
        offsets = torch.arange(0, 3 * size, size, device=device)
        return window, ((hashes >> 33) & (size - 1)) + offsets


def keep_drawn(
    pool: Pool,
    drawn: Tensor,
    logps: Tensor,
    tokens: Tensor,
    counters: Tensor,
    active: Tensor,
    slots: Tensor,
    goes_on: Tensor,
    all_logps: Tensor,
    *,
    length: int,
    seen: Tensor | None = None,
) -> Tensor:
    """Keep each row's drawn tokens up to the first that wasn't guessed, or that ends it.

    Args:
        drawn, logps: (R, Q) int64 and float32, token t drawn after the row's last token and guesses
            1 to t.
        tokens: (R, 1 + `MAX_READ`) int64: the row's last token, which is updated, and the guesses.
        counters: (7, R) int64, in the order of the constants above. The first three advance by the
            number of kept tokens. `RIGHT` counts kept tokens that were guessed, read or not,
            `GUESSED` the guesses that were read and that a completion's end didn't make useless,
            and `ACCEPTED` those among them that were kept. `PLACE`, where the first guess is in the
            pool, follows the kept tokens if all were guessed, else it is `NOWHERE`.
        active: (R,) int64, 1 until the completion has ended, then 0.
        slots: (R,) int64, each row's number among the N.
        goes_on: (V,) int64, 0 for tokens that end a completion, else 1.
        all_logps: (N, length + `MAX_READ`) float32, of the kept tokens.
        length: of a completion, at most.
        seen: (R, V) bool, to which the kept tokens are added.
    Returns:
        (R,) int64, how many tokens each row keeps; 0 for those that had ended.
    Raises:
        ValueError: shapes disagree; says what was expected and what was given.
    """
    rows, read = drawn.shape
    _check("logps", logps, (rows, read))
    _check("tokens", tokens, (rows, 1 + MAX_READ))
    _check("slots", slots, (rows,))
    _check("active", active, (rows,))
    triton_speculation = triton_for(drawn, "triton_speculation")
    if triton_speculation is not None:
        return triton_speculation.keep_drawn(
            pool, drawn, logps, tokens, counters, active, slots, goes_on, all_logps, length, seen
        )
    if _compiled(drawn):
        kept = torch.empty_like(slots)
        drawn, logps = drawn.contiguous(), logps.contiguous()
        _call(
            "keep_drawn", pool, tokens, counters, slots, drawn, logps, read, active, goes_on,
            all_logps, all_logps.shape[1], length, seen, len(goes_on), kept,
        )  # fmt: skip
        return kept
    steps = torch.arange(read, device=drawn.device)
    drawn_at = counters[DRAWN_AT]
    right = (drawn == tokens[:, 1 : 1 + read]).cumprod(1).sum(1)
    going = torch.take(goes_on, drawn)
    kept = torch.minimum(torch.minimum(right, going.cumprod(1).sum(1)) + 1, length - drawn_at)
    kept = kept.clamp_(max=read).mul_(active)
    keep = steps < kept[:, None]
    at = drawn_at[:, None] + steps
    places = at + (slots * pool.width + (pool.first + CONTEXT))[:, None]
    pool.tokens.put_(places, torch.where(keep, drawn, -1))
    all_logps.index_put_((slots[:, None], at), logps)  # the next pass overwrites what isn't kept
    if seen is not None:
        seen.scatter_(1, torch.where(keep, drawn, drawn[:, :1]), True)
    pool.insert(places)
    last = (kept - 1).clamp_(min=0)[:, None]
    tokens[:, :1] = drawn.gather(1, last)
    counters[PLACE] = torch.where(right >= kept, counters[PLACE] + kept, NOWHERE)
    accepted = kept - active
    counters[: DRAWN_AT + 1].add_(kept)  # += would copy the row once more
    active.mul_(going.gather(1, last)[:, 0]).mul_(drawn_at < length)
    counters[RIGHT].add_(torch.minimum(right, kept))
    counters[GUESSED].add_(torch.where(active > 0, read - 1, accepted))
    counters[ACCEPTED].add_(accepted)
    return kept


def look_up(pool: Pool, tokens: Tensor, counters: Tensor, slots: Tensor) -> None:
    """Guess the next tokens of each row: those that follow `PLACE` as long as there are any, else
    those that continue the latest of the longest n-grams equal to the row's last tokens.

    Args:
        tokens: (R, 1 + `MAX_READ`) int64, of which all but the first are written; 0 without guess.
        counters: (7, R) int64, of which `PLACE` is written: where the first guess is, or `NOWHERE`.
        slots: (R,) int64, each row's number among the N.
    """
    triton_speculation = triton_for(tokens, "triton_speculation")
    if triton_speculation is not None:
        triton_speculation.look_up(pool, tokens, counters, slots)
        return
    if _compiled(tokens):
        _call("look_up", pool, tokens, counters, slots)
        return
    device = tokens.device
    end = slots * pool.width + counters[DRAWN_AT] + (pool.first + CONTEXT)
    window, entries = pool.entries(end)
    found = torch.take(pool.table, entries)  # (R, 3)
    back = torch.arange(1, CONTEXT + 1, device=device)
    before = torch.take(pool.tokens, found[..., None] - back)
    equal = (before == window[:, None, 1:]).cumprod(-1).sum(-1)  # (R, 3) leading equal tokens
    two, three, four = torch.where(equal >= back[1:], found, NOWHERE).unbind(1)
    place = torch.where(four > NOWHERE, four, torch.where(three > NOWHERE, three, two))
    at = counters[PLACE]
    place = torch.where(torch.take(pool.tokens, at) >= 0, at, place)
    ahead = torch.arange(MAX_READ, device=device)
    guesses = torch.take(pool.tokens, place[:, None] + ahead)
    tokens[:, 1:] = guesses * (guesses >= 0).cumprod(1)
    counters[PLACE] = place


def _compiled(tensor: Tensor) -> bool:
    return native.module is not None and tensor.device.type == "cpu"


def _call(
    name: str, pool: Pool, tokens: Tensor, counters: Tensor, slots: Tensor, *arguments: object
) -> None:
    """Call a function of the compiled module with the tensors' addresses."""
    whole = [
        t for t in (pool.tokens, pool.table, tokens, slots, *arguments) if isinstance(t, Tensor)
    ]
    assert counters.stride(1) == 1 and all(t.is_contiguous() for t in whole)
    rows = (len(tokens), tokens.data_ptr(), counters.data_ptr(), counters.stride(0),
            slots.data_ptr())  # fmt: skip
    places = (v.data_ptr() if isinstance(v, Tensor) else v or 0 for v in arguments)
    getattr(native.module, name)(pool.addresses, rows, *places)
