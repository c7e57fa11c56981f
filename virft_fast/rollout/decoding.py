"""Decodes one batch of the native rollout, from its prompts to the last token of its completions.

Shapes: B prompts (groups), G completions each, R = B*G rows. B, G and R shrink as completions end;
N is the initial R. P prompt tokens, T completion tokens, both padded as in `CachePlan`; a step sees
W of the T. H query heads, K key/value heads, E numbers per head, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from virft_fast import progress
from virft_fast.batch import Prompt
from virft_fast.models.decode_step import DecodeStep, Take
from virft_fast.models.families import Tokenizer, core
from virft_fast.models.inputs import ModelInputs
from virft_fast.models.policy import Policy
from virft_fast.models.shared_prefix import PackedAttention
from virft_fast.rollout.cache import WIDTH_STEP, Buffers, CachePlan, LayerCache, for_device, select
from virft_fast.rollout.observers import Observer
from virft_fast.rollout.sampling import Sampler

# Prompt tokens per call of the model. On two CPU cores, 2,048 took 0 to 14 % less time and 60 %
# less memory than 8,192 (64 prompts of 130 tokens, 16 of 500, 16 of 650; a small model, one run).
# The GPU value is a choice, not measured yet.
PREFILL_TOKENS = {"cpu": 2_048, "cuda": 16_384}
# Tokens between checks for finished completions; on CUDA, a check waits for the device.
CHECK_EVERY = {"cpu": 4, "cuda": 16}
# The batch shrinks once at most this share of its rows is still needed.
SHRINK_AT = 0.75
# When this many graphs exist, all are dropped, to limit their memory. Not measured yet.
MAX_GRAPHS = 128


@dataclass(frozen=True)
class DecodeState:
    """The tensors of a step. A smaller batch gets a new state at the start of the same memory.

    Attributes:
        tokens: (R,) int64, each row's last token. positions: (R,) int64, its rotary position.
        done: (R,) bool, true where the row's completion has ended.
        slots: (R,) int64, the row of `drawn` and `logps` that each row writes to.
        prompt_bias: (B, P) float32, 0 at a prompt's tokens and -inf after them.
        step: (1,) int64, index of each row's last token in its completion.
        drawn: (N, max_completion_length + 1) int64, the sampled tokens. logps: the same shape,
            float32.
        caches: one per layer; the prefill of the prompts allocates them.
    """

    tokens: Tensor
    positions: Tensor
    done: Tensor
    slots: Tensor
    prompt_bias: Tensor
    step: Tensor
    drawn: Tensor
    logps: Tensor
    caches: list[LayerCache] = field(default_factory=list)

    @classmethod
    def allocate(cls, plan: CachePlan, length: int, pad_token_id: int, take: Take) -> DecodeState:
        """The state before the first token."""
        rows = plan.groups * plan.num_generations
        return cls(
            tokens=take("tokens", (rows,), torch.long),
            positions=take("positions", (rows,), torch.long),
            done=take("done", (rows,), torch.bool).zero_(),
            slots=take("slots", (rows,), torch.long).copy_(torch.arange(rows)),
            prompt_bias=take("prompt_bias", (plan.groups, plan.prompt_length), torch.float32),
            step=take("step", (1,), torch.long).zero_(),
            drawn=take("drawn", (rows, length + 1), torch.long).fill_(pad_token_id),
            logps=take("logps", (rows, length + 1), torch.float32).zero_(),
        )

    def select(self, groups: Tensor, order: Tensor) -> tuple[DecodeState, Tensor]:
        """The state of some groups (B',) and of some rows in each (B', G'), and these rows' indices
        in the current state, (R',)."""
        num_generations = len(self.tokens) // len(self.prompt_bias)
        rows = (groups[:, None] * num_generations + order).flatten()
        state = replace(
            self,
            tokens=select(self.tokens, rows),
            positions=select(self.positions, rows),
            done=select(self.done, rows),
            slots=select(self.slots, rows),
            prompt_bias=select(self.prompt_bias, groups),
            caches=[cache.select(groups, order) for cache in self.caches],
        )
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
    """

    policy: Policy
    buffers: Buffers
    sampler: Sampler
    _: KW_ONLY
    plan: CachePlan
    tokenizer: Tokenizer
    graphs: bool
    observer: Observer | None

    def __post_init__(self) -> None:
        self.device = self.buffers.device
        self.length = self.sampler.sampling.max_completion_length
        self.read_token = DecodeStep(core(self.policy.model).language_model)
        self.pad, take = self.tokenizer.pad_token_id, self.buffers.take
        self.state = DecodeState.allocate(self.plan, self.length, self.pad, take)
        stop_ids = (self.tokenizer.eos_token_id, *self.sampler.sampling.stop_token_ids)
        self.stop_ids = take("stop_ids", (len(stop_ids),), torch.long)
        self.stop_ids.copy_(torch.tensor(stop_ids))

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
        for first, last in token_chunks(lengths, for_device(PREFILL_TOKENS, self.device.type)):
            chunk = prompts[first:last]
            inputs = self.policy.collate(
                chunk, [()] * len(chunk), pad_token_id=self.pad, device=self.device, packed=True
            )
            images = self.policy.image_features(inputs)
            if self.policy.vision_frozen:  # else the next update invalidates them
                features += inputs.per_prompt(images)
            last_states.append(self._read_prompts(inputs, images, first))
            places = inputs.position_ids[:, 0]
            starts += [places[:, group.start : group.first].max() + 1 for group in inputs.groups]
        ends = torch.tensor(lengths, device=self.device)
        outside = torch.arange(plan.prompt_length, device=self.device) >= ends[:, None]
        state.prompt_bias.zero_().masked_fill_(outside, -torch.inf)
        # No position exceeds the number of tokens, and the graphs' key includes P and T.
        self.read_token.prepare(plan.prompt_length + plan.completion_length, take)
        state.positions.copy_(torch.stack(starts).repeat_interleave(plan.num_generations))
        logits = self.policy.head.logits(torch.cat(last_states))  # (B, V)
        logits = logits.repeat_interleave(plan.num_generations, 0)
        self._store(*self.sampler(logits, state.step[0]))
        return features

    def _read_prompts(self, inputs: ModelInputs, images: Tensor, first: int) -> Tensor:
        """Store the keys and values of a packed row of prompts.

        Args:
            first: number of the row's first prompt in the batch.
        Returns:
            (prompts, D) last hidden states, at each prompt's last token.
        """
        attention = PackedAttention(inputs.groups, self.device)
        caches = self.state.caches

        def store(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            if layer == len(caches):
                # Use the values' dtype, because rotated keys are float32 under autocast.
                caches.append(LayerCache.allocate(self.plan, layer, value, self.buffers.take))
            for number, group in enumerate(inputs.groups, first):
                place = slice(group.start, group.first)
                caches[layer].prompt_keys[number, :, : group.prompt_length] = key[0, :, place]
                caches[layer].prompt_values[number, :, : group.prompt_length] = value[0, :, place]
                if self.observer is not None:
                    self.observer.prompt_attention(layer, number, query[0], key[0], group, scaling)
            return attention(layer, query, key, value, scaling)

        states = self.policy.language(inputs, images, attention_core=store)
        attention.check(self.policy.config.text_config.num_hidden_layers)
        ends = torch.tensor([group.first - 1 for group in inputs.groups], device=self.device)
        return states[0, ends]

    # Decoding

    def run(self) -> tuple[Tensor, Tensor]:
        """(N, T) tokens and log-probs; padding and 0 after a completion's end."""
        every = for_device(CHECK_EVERY, self.device.type)
        width_step = for_device(WIDTH_STEP, self.device.type)
        with torch.inference_mode():  # a little cheaper per operation than no_grad
            for index in range(self.length - 1):  # of the token that is read
                if index % every == 0 and not self._shrink():
                    break
                width = -(-(index + 1) // width_step) * width_step
                self._run_step(min(self.plan.completion_length, width))
                progress.mark("rollout")
        if self.observer is not None:
            self.observer.finish()
        # Copies, because the next rollout reuses the buffers.
        drawn, logps = self.state.drawn, self.state.logps
        return drawn[:, : self.length].clone(), logps[:, : self.length].clone()

    def _run_step(self, width: int) -> None:
        if not self.graphs:
            self._decode(width)
            return
        # Everything that determines addresses, shapes and operations; the seed is in a tensor.
        key = (
            self.state.prompt_bias.shape,  # (B, P)
            (len(self.state.tokens), len(self.state.drawn), self.plan.completion_length, width),
            replace(self.sampler.sampling, seed=0),
            None if self.observer is None else self.observer.key,
        )
        graphs = self.buffers.graphs
        if key not in graphs:
            if len(graphs) >= MAX_GRAPHS:
                self.buffers.forget_graphs()
            graphs[key] = self._capture(width)
        graphs[key].replay()

    def _capture(self, width: int) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph; capturing leaves the state unchanged."""
        state = self.state
        changed = [state.tokens, state.positions, state.done, state.step, state.drawn, state.logps]
        changed += self.observed
        if self.sampler.seen is not None:
            changed.append(self.sampler.seen)
        before = [tensor.clone() for tensor in changed]
        if self.buffers.pool is None:
            self.buffers.pool = torch.cuda.graph_pool_handle()
        step = functools.partial(self._decode, width)
        graph = capture_graph(step, self.buffers.pool, self.device)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return graph

    def _decode(self, width: int) -> None:
        """Read the last token of each row and sample the next. On CUDA, nothing here waits for the
        device, and the only Python number that changes is `width`, which is part of the graphs'
        key."""
        state = self.state
        attention = DecodeAttention(state, width, self.observer)
        states = self.read_token(state.tokens, state.positions, attention)
        logits = self.policy.head.logits(states)
        state.step.add_(1)
        state.positions.add_(1)
        self._store(*self.sampler(logits, state.step[0]))

    def _store(self, tokens: Tensor, logps: Tensor) -> None:
        """Store the sampled tokens at index `step`."""
        state = self.state
        tokens = tokens.masked_fill(state.done, self.pad)
        place = (state.slots, state.step.expand(len(state.slots)))
        state.drawn.index_put_(place, tokens)
        state.logps.index_put_(place, logps.masked_fill(state.done, 0.0))
        state.done.logical_or_(torch.isin(tokens, self.stop_ids))
        state.tokens.copy_(tokens)

    # Shrinking

    def _shrink(self) -> bool:
        """Drop finished completions if that makes the batch much smaller. Returns False if all have
        finished."""
        active = ~self.state.done.view(len(self.state.prompt_bias), -1)  # (B, G)
        counts = active.sum(1).tolist()
        if not any(counts):
            return False
        groups = min(_bucket(sum(count > 0 for count in counts)), active.shape[0])
        rows = min(_bucket(max(counts)), active.shape[1])
        if groups * rows <= SHRINK_AT * active.numel():
            self._keep(active, groups, rows)
        return True

    def _keep(self, active: Tensor, groups: int, rows: int) -> None:
        """Keep the active groups and rows, and add finished ones to reach the numbers `groups` and
        `rows`."""
        kept = active.any(1).int().argsort(descending=True, stable=True)[:groups]  # (B',)
        if groups == len(active):
            kept = torch.arange(groups, device=self.device)  # the prompts stay in place
        order = active[kept].int().argsort(dim=1, descending=True, stable=True)[:, :rows]
        self.state, kept_rows = self.state.select(kept, order)
        self.sampler.keep(kept_rows)


def capture_graph(
    run: Callable[[], None], pool: torch.cuda._POOL_HANDLE, device: torch.device
) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph. A warm-up executes `run` once; the capture itself doesn't."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph


class DecodeAttention:
    """Attention of one decoding step. Each row's query attends to its prompt and own tokens."""

    def __init__(self, state: DecodeState, width: int, observer: Observer | None) -> None:
        self.state, self.width, self.observer = state, width, observer
        # Added to the scores: (B * K, 1, P) and (W,).
        heads = state.caches[0].keys.shape[1]
        self.prompt_bias = state.prompt_bias.repeat_interleave(heads, 0)[:, None]
        seen = torch.arange(width, device=state.step.device) <= state.step
        self.own_bias = torch.zeros(width, device=seen.device).masked_fill_(~seen, -torch.inf)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """(R, H, E), (R, K, E), (R, K, E) -> (R, H * E)."""
        # Under autocast, the rotation returns float32, but products would be in bfloat16.
        query, key = query.to(value.dtype), key.to(value.dtype)
        with torch.autocast(query.device.type, enabled=False):
            cache = self.state.caches[layer]
            groups, heads, rows, _, size = cache.keys.shape

            def by_row(tensor: Tensor) -> Tensor:  # (R, x, E) -> (B * K * G, x / K, E)
                tensor = tensor.view(groups, rows, heads, -1, size).transpose(1, 2)
                return tensor.reshape(groups * heads * rows, -1, size)

            keys, values = cache.keys.flatten(0, 2), cache.values.flatten(0, 2)
            keys.index_copy_(1, self.state.step, by_row(key))
            values.index_copy_(1, self.state.step, by_row(value))
            keys, values = keys[:, : self.width], values[:, : self.width]
            own = by_row(query)  # (B * K * G, H / K, E)
            grouped = own.view(groups * heads, -1, size)  # the same, a group's rows merged
            prompt_keys = cache.prompt_keys.flatten(0, 1).transpose(1, 2)
            to_prompt = _scores(grouped, prompt_keys, self.prompt_bias, scaling)
            to_own = _scores(own, keys.transpose(1, 2), self.own_bias, scaling)
            scores = torch.cat([to_prompt, to_own.view(*to_prompt.shape[:2], -1)], -1)
            # One softmax over both equals two, merged by their log-sum-exp.
            shares = scores.softmax(-1)
            length = cache.prompt_keys.shape[2]
            if self.observer is not None:
                on_prompt = shares[..., :length].view(groups, heads, rows, -1, length)
                self.observer.step_attention(layer, on_prompt, self.state.slots, self.state.done)
            shares = shares.to(value.dtype)
            out = torch.bmm(shares[..., :length], cache.prompt_values.flatten(0, 1))
            to_own = shares[..., length:].unflatten(1, (rows, -1)).flatten(0, 1)
            out = torch.baddbmm(out.view(own.shape), to_own, values)
            out = out.view(groups, heads, rows, -1, size).transpose(1, 2)
            return out.reshape(groups * rows, -1)


def _scores(query: Tensor, keys: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """query @ keys * scaling + bias in float32; (b, n, E), (b, E, m) -> (b, n, m)."""
    if query.dtype == torch.float32:
        return torch.baddbmm(bias, query, keys, alpha=scaling)
    if query.is_cuda:
        return torch.bmm(query, keys, out_dtype=torch.float32).mul_(scaling).add_(bias)
    return torch.baddbmm(bias, query.float(), keys.float(), alpha=scaling)


def _bucket(count: int) -> int:
    """`count` rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ...: fewer sizes need fewer graphs."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if count <= 3 * power // 4 else power


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
