"""Decodes one batch of the native rollout, from its prompts to the last token of its completions.

Shapes: B prompts, G completions each, R rows, sorted by prompt. R starts at N = B*G and shrinks as
completions end; a prompt may have no rows left. Q tokens of each row are read in one pass. P prompt
tokens, T completion tokens, both padded as in `CachePlan`. H query heads, K key/value heads, E
numbers per head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from virft_fast import progress
from virft_fast.batch import Prompt
from virft_fast.devices import to_device
from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.decode import DecodeMasks, attention_shares, decode_attention
from virft_fast.kernels.speculation import (
    DRAWN_AT,
    LENGTHS,
    MAX_READ,
    PLACE,
    POSITIONS,
    Pool,
    keep_drawn,
    look_up,
)
from virft_fast.models.decode_step import Caches, DecodeStep, LayerCache, Take
from virft_fast.models.families import Tokenizer, core
from virft_fast.models.inputs import ModelInputs
from virft_fast.models.policy import Policy
from virft_fast.models.recurrent import RecurrentCache
from virft_fast.models.shared_prefix import attention_layers, windows
from virft_fast.rollout.cache import (
    WIDTH_STEP,
    Buffers,
    CachePlan,
    allocate_layer,
    for_device,
    select,
    select_rows,
    store_states,
)
from virft_fast.rollout.observers import Observer
from virft_fast.rollout.sampling import Sampler
from virft_fast.rollout.shrinking import Kept, kept_rectangle, kept_rows
from virft_fast.rollout.speculation import Speculation, Stats

# Prompt tokens per call of the model. On two CPU cores, 2,048 took 0 to 14 % less time and 60 %
# less memory than 8,192 (64 prompts of 130 tokens, 16 of 500, 16 of 650; a small model, one run).
# The GPU value is a choice, not measured yet.
PREFILL_TOKENS = {"cpu": 2_048, "cuda": 16_384}
# Tokens between checks for finished completions; on CUDA, a check waits for the device.
CHECK_EVERY = {"cpu": 4, "cuda": 16}


@dataclass(frozen=True)
class DecodeState:
    """The tensors of a pass. A smaller batch gets a new state at the start of the same memory.

    Attributes:
        tokens: (R, 1) int64, each row's last token, which the next pass reads; with speculation
            (R, 1 + MAX_READ), guesses after it.
        counters: (7, R) int64. `lengths`, how many tokens of the completion have keys and values in
            the cache; `positions`, the rotary position of the next token to read; `drawn_at`, the
            index in its completion of the next token to sample. The others are those of
            `kernels.speculation`.
        active: (R,) int64, 1 until the row's completion has ended, then 0.
        slots: (R,) int64, the row of `drawn` and `logps` that each row writes to.
        first_rows: (B + 1,) int64; prompt b has the rows from `first_rows[b]` to
            `first_rows[b + 1]`.
        prompt_lengths: (B,) int64.
        drawn: (N, max_completion_length or more) int64, the sampled tokens; after a completion's
            end they mean nothing. logps: the same shape, float32. plain: the same under temperature
            alone, or None if that is equal.
        caches: one per layer; the prefill of the prompts allocates and fills them.
    """

    tokens: Tensor
    counters: Tensor
    active: Tensor
    slots: Tensor
    first_rows: Tensor
    prompt_lengths: Tensor
    drawn: Tensor
    logps: Tensor
    plain: Tensor | None
    caches: Caches = field(default_factory=dict)

    @classmethod
    def allocate(
        cls, plan: CachePlan, length: int, take: Take, pool: Pool | None, *, filtered: bool
    ) -> DecodeState:
        """The state before the first token."""
        rows, size = plan.groups * plan.num_generations, plan.num_generations
        counters = take("counters", (7, rows), torch.long).zero_()
        counters[LENGTHS] = -1  # the first token isn't read yet
        if pool is None:
            drawn = take("drawn", (rows, length), torch.long)
        else:
            drawn = pool.completions(rows)
        return cls(
            tokens=take("tokens", (rows, 1 if pool is None else 1 + MAX_READ), torch.long).zero_(),
            counters=counters,
            active=take("active", (rows,), torch.long).fill_(1),
            slots=torch.arange(rows, out=take("slots", (rows,), torch.long)),
            first_rows=torch.arange(
                0, rows + 1, size, out=take("first_rows", (plan.groups + 1,), torch.long)
            ),
            prompt_lengths=take("prompt_lengths", (plan.groups,), torch.long),
            drawn=drawn,
            logps=take("logps", drawn.shape, torch.float32),
            plain=take("plain", drawn.shape, torch.float32) if filtered else None,
        )

    def select(self, kept: Kept, used: int) -> tuple[DecodeState, Tensor]:
        """The state of the kept rows, and their indices in the current state, (R',).

        Args:
            used: no row has more tokens in the cache.
        """
        device, first_rows = self.tokens.device, [0]
        for size in kept.sizes:
            first_rows.append(first_rows[-1] + size)
        rows, starts = (to_device(torch.tensor(v), device) for v in (kept.rows, first_rows))
        prompts = None
        if kept.prompts is not None:
            prompts = to_device(torch.tensor(kept.prompts), device)
        state = replace(
            self,
            tokens=select(self.tokens, rows),
            counters=self.counters[:, : len(rows)].copy_(self.counters[:, rows]),
            active=select(self.active, rows),
            slots=select(self.slots, rows),
            first_rows=self.first_rows[: len(starts)].copy_(starts),
            caches={
                layer: select_rows(cache, rows, prompts, used)
                for layer, cache in self.caches.items()
            },
        )
        if prompts is not None:
            state = replace(state, prompt_lengths=select(self.prompt_lengths, prompts))
        return state, rows


@dataclass(eq=False)
class Decoding:
    """One batch of groups. Call `prefill`, then `run`.

    Args:
        policy: with whole weights, in evaluation mode.
        buffers: memory for all tensors and graphs of the batch.
        sampler: samples for the batch's rows.
        plan: at least as large as the batch.
        tokenizer: supplies the padding and EOS tokens.
        graphs: whether steps run as CUDA graphs.
        observer: receives the attention of the rows.
        speculation: guesses tokens of the rows.
        stats: counts the passes and guesses.
    """

    policy: Policy
    buffers: Buffers
    sampler: Sampler
    _: KW_ONLY
    plan: CachePlan
    tokenizer: Tokenizer
    graphs: bool
    observer: Observer | None
    speculation: Speculation | None
    stats: Stats

    def __post_init__(self) -> None:
        self.pool = None if self.speculation is None else self.speculation.pool
        self.read = 1  # how many tokens of each row a pass reads
        self.device = self.buffers.device
        self.length = self.sampler.sampling.max_completion_length
        self.read_tokens = DecodeStep(core(self.policy.model).get_decoder())
        self.graphs &= not self.read_tokens.waits
        # The kernels take any number of rows of a prompt; torch's products need equal numbers.
        self.ragged = self.graphs or self.device.type == "cuda"
        self.max_rows = self.plan.num_generations
        self.sizes = [self.max_rows] * self.plan.groups  # rows of each prompt
        self.state = DecodeState.allocate(
            self.plan, self.length, self.buffers.take, self.pool,
            filtered=self.sampler.sampling.filtered,
        )  # fmt: skip
        stop_ids = (self.tokenizer.eos_token_id, *self.sampler.sampling.stop_token_ids)
        # (V,) int64, 0 at the tokens that end a completion, else 1. A lookup is one operation, and
        # unlike torch.isin it never waits for the device.
        vocab = self.policy.config.text_config.vocab_size
        self.goes_on = self.buffers.take("goes_on", (vocab,), torch.long).fill_(1)
        known = torch.tensor([token for token in stop_ids if token < vocab], dtype=torch.long)
        self.goes_on.index_fill_(0, to_device(known, self.device), 0)

    # Prefill

    def prefill(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Prefill all prompts and sample the first token of every row.

        Returns:
            Each prompt's image features if the vision tower is frozen, otherwise an empty list.
        """
        plan, state, take, observer = self.plan, self.state, self.buffers.take, self.observer
        # The observer's tensors that a step changes.
        self.observed = () if observer is None else observer.start(prompts, plan, take)
        features: list[Tensor] = []
        last_states, starts = [], []
        lengths = [len(prompt.input_ids) for prompt in prompts]
        self.windows = windows(self.policy.config.text_config, max(lengths) + self.length)
        for first, last in token_chunks(lengths, for_device(PREFILL_TOKENS, self.device.type)):
            chunk = prompts[first:last]
            inputs = self.policy.collate(
                chunk,
                [()] * len(chunk),
                pad_token_id=self.tokenizer.pad_token_id,
                device=self.device,
                packed=True,
            )
            images = self.policy.image_features(inputs)
            if self.policy.vision_frozen:  # else the next update invalidates them
                features += inputs.per_prompt(images)
            last_states.append(self._read_prompts(inputs, images, first))
            places = inputs.position_ids[:, 0]
            starts += [places[:, group.start : group.first].max() + 1 for group in inputs.groups]
        state.prompt_lengths.copy_(to_device(torch.tensor(lengths), self.device))
        # No position exceeds the number of tokens, and the graphs' key includes P and T.
        self.read_tokens.prepare(plan.prompt_length + plan.completion_length, take)
        state.counters[POSITIONS] = torch.stack(starts).repeat_interleave(plan.num_generations) - 1
        if self.speculation is not None:
            state.counters[PLACE] = self.speculation.starts
            look_up(self.speculation.pool, state.tokens, state.counters, state.slots)
        logits = self.policy.head.logits(torch.cat(last_states))  # (B, V)
        logits = logits.repeat_interleave(plan.num_generations, 0)
        self._sample(logits, state.tokens[:, :1])
        return features

    def _read_prompts(self, inputs: ModelInputs, images: Tensor, first: int) -> Tensor:
        """Store the keys and values of a packed row of prompts.

        Args:
            first: number of the row's first prompt in the batch.
        Returns:
            (prompts, D) last hidden states, at each prompt's last token.
        """
        attention = self.policy.attention(inputs)
        caches, plan, take = self.state.caches, self.plan, self.buffers.take

        def store(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            # Use the values' dtype, because rotated keys are float32 under autocast.
            cache = caches[layer] = allocate_layer(plan, layer, value, take)
            for number, group in enumerate(inputs.groups, first):
                place = slice(group.start, group.first)
                cache.prompt_keys[number, :, : group.prompt_length] = key[0, :, place]
                cache.prompt_values[number, :, : group.prompt_length] = value[0, :, place]
                if self.observer is not None:
                    states = (query[0], key[0], group, scaling, self.windows.get(layer))
                    self.observer.prompt_attention(layer, number, *states)
            return attention(layer, query, key, value, scaling)

        def keep(layer: int, last: Tensor, states: Tensor) -> None:
            caches[layer] = store_states(plan, layer, last, states, first, take)

        states = self.policy.language(inputs, images, keep, attention_core=store)
        attention.check(len(attention_layers(self.policy.config.text_config)))
        ends = torch.tensor([group.first - 1 for group in inputs.groups])
        return states[0].index_select(0, to_device(ends, self.device))

    # Decoding

    def run(self) -> tuple[Tensor, ...]:
        """(N, T) tokens and log-probs, the latter also under temperature alone if that differs.
        They mean nothing after a completion's end."""
        every = for_device(CHECK_EVERY, self.device.type)
        with torch.inference_mode():  # a little cheaper per operation than no_grad
            unchecked = float(every)  # tokens of a row since the last check, as expected
            for used in range(self.length - 1):  # tokens of a row in the cache, at most, if Q = 1
                if unchecked >= every:
                    if not self._check(used):
                        break
                    unchecked = 0.0
                self._run_step()
                self.stats.passes += 1
                unchecked += 1 if self.speculation is None else self.speculation.kept
                progress.mark("rollout")
            if self.speculation is not None:
                self._note(self.speculation)
                self.speculation.finish()
        if self.observer is not None:
            self.observer.finish()
        # Copies, because the next rollout reuses the buffers.
        found = (self.state.drawn, self.state.logps, self.state.plain)
        return tuple(whole[:, : self.length].clone() for whole in found if whole is not None)

    def _run_step(self) -> None:
        state, plan = self.state, self.plan
        if not self.graphs:
            self._decode()
            return
        # Everything that determines addresses, shapes and operations; the seed is in a tensor.
        key = (
            (state.tokens.shape, state.drawn.shape, len(state.prompt_lengths)),
            (plan.num_generations, plan.prompt_length, plan.completion_length),
            (self.read, None if self.pool is None else self.pool.shape),
            replace(self.sampler.sampling, seed=0),
            None if self.observer is None else self.observer.key,
            tuple(self.windows.items()),
        )
        changed = [state.tokens, state.counters, state.active, state.drawn, state.logps]
        if self.pool is not None:
            changed += [self.pool.tokens, self.pool.table]
        for cache in state.caches.values():
            changed += [cache.inputs, cache.states] if isinstance(cache, RecurrentCache) else []
        seen = [] if self.sampler.seen is None else [self.sampler.seen]
        self.buffers.graphs.run(key, self._decode, [*changed, *self.observed, *seen])

    def _decode(self) -> None:
        """Read the last token of each row, and maybe guesses, and sample the next. On CUDA, nothing
        here waits for the device, and no Python number changes that is not part of the graphs'
        key."""
        state = self.state
        read = state.tokens[:, : self.read]
        lengths, positions, *_ = state.counters
        attend = CachedAttention(state, self.max_rows, self.observer, self.windows)
        states = self.read_tokens(read, positions, lengths, state.caches, attend)
        logits = self.policy.head.logits(states.flatten(0, 1))
        attend.tell(self._sample(logits, read))

    def _sample(self, logits: Tensor, read: Tensor) -> Tensor:
        """Sample a token after each that was read, (R, Q), and store those that are kept.

        Returns:
            (R,) int64, how many; 0 for rows that had ended.
        """
        state, pool = self.state, self.pool
        drawn_at = state.counters[DRAWN_AT]
        tokens, logps, plain = self.sampler(logits, drawn_at, read)
        if state.plain is not None and plain is not None:
            slots, at = state.slots, drawn_at
            if read.shape[1] > 1:
                slots, at = (
                    slots[:, None],
                    at[:, None] + torch.arange(read.shape[1], device=at.device),
                )
            state.plain.index_put_((slots, at), plain.view(at.shape))
        if pool is not None:
            kept = keep_drawn(
                pool, tokens.view(read.shape), logps.view(read.shape), state.tokens,
                state.counters, state.active, state.slots, self.goes_on, state.logps,
                length=self.length, seen=self.sampler.seen if read.shape[1] > 1 else None,
            )  # fmt: skip
            look_up(pool, state.tokens, state.counters, state.slots)
            return kept
        kept = state.active if self.observer is None else state.active.clone()
        place = (state.slots, drawn_at)
        state.drawn.index_put_(place, tokens)
        state.logps.index_put_(place, logps)
        state.counters[: DRAWN_AT + 1].add_(1)
        state.active.mul_(self.goes_on[tokens])
        state.tokens[:, 0] = tokens
        return kept

    def _check(self, used: int) -> bool:
        """Drop finished completions if that makes the batch much smaller, and choose how many
        tokens the next passes read. Returns False if all have finished.

        Args:
            used: no row has more tokens in the cache, if each pass reads one of it.
        """
        speculation = self.speculation
        if speculation is None:
            active = [bool(flag) for flag in self.state.active.tolist()]
        else:
            active = self._note(speculation)
            used = speculation.longest - 1
        if not any(active):
            return False
        kept = (kept_rows if self.ragged else kept_rectangle)(active, self.sizes)
        if kept is not None:
            self.state, rows = self.state.select(kept, used)
            self.sizes = kept.sizes
            if not self.ragged:
                self.max_rows = self.sizes[0]
            self.sampler.keep(rows)
            active = [active[row] for row in kept.rows]
            if speculation is not None:
                speculation.keep(kept.rows)
        if speculation is not None:
            speculation.choose(active)
            self.read = speculation.read
        return True

    def _note(self, speculation: Speculation) -> list[bool]:
        """Tell the counts of the rows. Returns which are active."""
        state = self.state
        counts = torch.cat([state.active[None], state.counters[DRAWN_AT:PLACE]]).cpu()
        speculation.note(counts[1:])
        return counts[0].bool().tolist()


class CachedAttention:
    """Attention of one pass over the keys and values of a state, which hold the pass's tokens."""

    def __init__(
        self,
        state: DecodeState,
        max_rows: int,
        observer: Observer | None,
        windows: Mapping[int, int] | None = None,
    ) -> None:
        self.state, self.max_rows, self.observer = state, max_rows, observer
        self.windows = windows or {}
        self.masks: dict[int | None, DecodeMasks] = {}  # by window
        self.shares: list[tuple[int, Tensor]] = []

    def __call__(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """(R, Q, H, E) -> (R, Q, H * E)."""
        state, cache = self.state, self.state.caches[layer]
        watched = self.observer is not None and layer in self.observer.layers
        window = self.windows.get(layer)
        if window not in self.masks and (
            watched or window or triton_for(query, "triton_decode") is None
        ):
            self.masks[window] = self._make_masks(query, cache, window)
        if watched:
            self._observe(layer, query, scaling)
        return decode_attention(
            query, cache.prompt_keys, cache.prompt_values, state.prompt_lengths, state.first_rows,
            cache.keys, cache.values, state.counters[0], scaling=scaling, max_rows=self.max_rows,
            window=window, masks=self.masks.get(window),
        )  # fmt: skip

    def _make_masks(self, query: Tensor, cache: LayerCache, window: int | None) -> DecodeMasks:
        lengths, width = self.state.counters[0], None
        if not query.is_cuda:  # else the host would wait
            # What an ended row attends to doesn't matter. Guesses leave it behind the others.
            longest = int((lengths * self.state.active).max())
            lengths = lengths.where(self.state.active > 0, longest)
            # Memory of changing sizes is slower on a CPU.
            step = WIDTH_STEP["cpu"]
            width = min(-(-(longest + query.shape[1]) // step) * step, cache.keys.shape[2])
            if longest == int(lengths.min()):
                lengths = lengths[:1]
        return DecodeMasks.make(
            cache.prompt_keys, self.state.prompt_lengths, self.state.first_rows, cache.keys,
            lengths, num_tokens=query.shape[1], num_heads=query.shape[2], max_rows=self.max_rows,
            width=width, window=window,
        )  # fmt: skip

    def _observe(self, layer: int, query: Tensor, scaling: float) -> None:
        """Remember the attention to the prompts until it's known which tokens are kept."""
        cache, masks = self.state.caches[layer], self.masks[self.windows.get(layer)]
        shares = attention_shares(query, cache.prompt_keys, cache.keys, masks, scaling=scaling)
        shares = shares[..., : cache.prompt_keys.shape[2]].transpose(1, 2).flatten(0, 1)
        if masks.places is not None:
            shares = shares[masks.places]  # (R, K, Q * H / K, P)
        shares = shares.unflatten(2, (query.shape[1], -1)).transpose(1, 2)
        self.shares.append((layer, shares.flatten(0, 1)))

    def tell(self, kept: Tensor) -> None:
        """Tell the observer the attention of the tokens that were read before a kept one.

        Args:
            kept: (R,) int64, how many tokens each row keeps.
        """
        for layer, shares in self.shares:
            assert self.observer is not None
            count = len(shares) // len(kept)
            done = torch.arange(count, device=kept.device) >= kept[:, None]
            rows = self.state.slots[:, None].expand(-1, count).flatten()
            self.observer.step_attention(layer, shares, rows, done.flatten())


def token_chunks(lengths: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of prompts with at most `limit` tokens; a longer prompt is alone."""
    first, total = 0, 0
    for last, length in enumerate(lengths):
        if last > first and total + length > limit:
            yield first, last
            first, total = last, 0
        total += length
    if lengths:
        yield first, len(lengths)
