"""Greedy answers to the rows of a data set, batch by batch, on any number of ranks.

The rows without an answer are dealt out to the ranks in turn. All ranks call the rollout equally
often, because under ZeRO-3 each call gathers the weights. While the model answers a batch, a thread
reads the images of the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext

from virft_fast import dist
from virft_fast.batch import Prompt, Rollouts
from virft_fast.data import BadRow, BadRows, NoUsableRows
from virft_fast.data.read_ahead import ReadAhead
from virft_fast.evaluation.journal import Record
from virft_fast.rollout import Rollout, Sampling

Load = Callable[[int], Prompt | BadRow]
Section = Callable[[str], AbstractContextManager[object]]


def answer(
    rollout: Rollout,
    load: Load,
    indices: Sequence[int],
    describe: Callable[[Rollouts], list[Record]],
    *,
    bad_rows: BadRows,
    batch_size: int,
    max_completion_length: int,
    done: Iterable[Record] = (),
    keep: Callable[[list[Record]], None] = lambda records: None,
    progress: Callable[[int], object] = lambda done: None,
    section: Section = nullcontext,
) -> list[Record]:
    """One record for each usable row of `indices`, in order, on all ranks.

    Args:
        load: row -> prompt, or the reason why it can't be used; such rows are skipped and counted.
        describe: answers -> one record per answer, with its row number as `index`.
        batch_size: prompts in one call of the rollout.
        done: earlier records; the model doesn't answer their rows again.
        keep: called on all ranks with the new records of all ranks, after each batch.
        progress: called with the number of rows done so far.
        section: makes a context for work that one rank does alone, given its name for messages; an
            error inside is raised on all ranks.
    Raises:
        NoUsableRows: a rank has rows to answer, but none can be used.
        TooManyBadRows: see `BadRows`.
    """
    chosen = set(indices)
    records = [record for record in done if record["index"] in chosen]
    answered = {record["index"] for record in records}
    rows = [index for index in indices if index not in answered]
    mine = rows[dist.rank() :: dist.world_size()]
    calls = math.ceil(len(rows) / dist.world_size() / batch_size)
    sampling = Sampling(max_completion_length=max_completion_length, greedy=True)
    spare: Prompt | None = None
    progress(len(records))

    batches = [mine[call * batch_size : (call + 1) * batch_size] for call in range(calls + 1)]
    with closing(ReadAhead(load)) as ahead:
        ahead.start(batches[0])
        for call in range(calls):
            with dist.agreed(), section("evaluation"):
                loaded = [ahead(index) for index in batches[call]]
                ahead.start(batches[call + 1])
                prompts = [prompt for prompt in loaded if not isinstance(prompt, BadRow)]
                bad = [row for row in loaded if isinstance(row, BadRow)]
                spare = prompts[0] if prompts else spare or _first_usable(ahead, indices)
                rollouts = rollout.generate(prompts or [spare], 1, sampling)
                described = describe(rollouts) if prompts else []
            gathered = dist.all_gather_object((described, bad))
            new = [record for of_rank, _ in gathered for record in of_rank]
            keep(new)
            records += new
            for row in [row for _, of_rank in gathered for row in of_rank]:
                bad_rows.add(row.index, row.reason)
            progress(min((call + 1) * batch_size * dist.world_size(), len(rows)) + len(answered))
    return sorted(records, key=lambda record: record["index"])


def _first_usable(load: Load, indices: Sequence[int]) -> Prompt:
    reason = "there are none"
    for index in indices:
        prompt = load(index)
        if not isinstance(prompt, BadRow):
            return prompt
        reason = f"the last, {prompt.index}: {prompt.reason}"
    raise NoUsableRows(f"expected at least one usable row to evaluate, got none; {reason}")
