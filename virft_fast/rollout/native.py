"""The rollout engine: prompts computed and stored once, completions decoded all together.

Every prompt of the rank goes through vision tower and language model once, in packed rows. Its keys
and values are stored once and read by all its completions, whose own are stored beside them in
static buffers. One step decodes one token of every completion: attention over the prompt for a
whole group at once, attention over the own completion, one softmax over both. When enough
completions have ended, the others move together and the batch shrinks. On CUDA a step is a captured
graph, one for each size of batch, prompts and completions (the key in `_Decoding._run_step`), at
most `MAX_GRAPHS` of them; the host looks at the device every `CHECK_EVERY` tokens only.

Shapes: B prompts (groups), G completions each, R = B*G rows, P prompt tokens, padded on the right,
T completion tokens, both rounded up as in `CachePlan`, W of the T in sight of a step; H query
heads, K key/value heads, E numbers a head, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from virft_fast import progress
from virft_fast.batch import Prompt, Rollouts
from virft_fast.models.decode_step import DecodeStep
from virft_fast.models.image_attention import attention_to_prompt
from virft_fast.models.qwen_vl import ModelInputs, Policy, banned_token_ids, core
from virft_fast.models.shared_prefix import PackedAttention
from virft_fast.rollout import Sampling, Weights, check_request
from virft_fast.rollout.sampling import Sampler, make_rollouts, to_front

# Prompt tokens that go through the model in one call. On two CPU cores 2,048 took 0 to 14 % less
# time than 8,192 and 0.4 of the memory (64 prompts of 130 tokens, 16 of 500, 16 of 650; a small
# model, one run); a GPU's number is a choice, not measured yet.
PREFILL_TOKENS = {"cpu": 2_048, "cuda": 16_384}
# A step sees this many completion tokens, or a multiple: so many that graphs are few, and so few
# that little is read in vain.
WIDTH_STEP = {"cpu": 32, "cuda": 128}
# Tokens between two looks at which completions have ended.
CHECK_EVERY = {"cpu": 4, "cuda": 16}
# The batch shrinks when this share of its rows would do.
SHRINK_AT = 0.75
# Share of the free memory of a GPU that keys and values may take.
CACHE_SHARE = 0.8
# Share of a GPU's whole memory that is kept for the next rollout, and its graphs with it. Larger
# buffers make room for training, at the price of capturing anew (a choice, not measured yet).
KEPT_SHARE = 0.1
# A prompt's place on CUDA is a multiple of this or of an eighth of the next power of two, whichever
# is more: about 20 lengths up to 4,096, so that the next rollout finds its graphs.
PROMPT_STEP = 64
# More graphs than this are forgotten together, so that their memory has a bound (not measured yet).
MAX_GRAPHS = 128


@dataclass(frozen=True)
class CachePlan:
    """The keys and values of groups that are decoded together, as they are allocated.

    Attributes:
        groups: B. num_generations: G.
        prompt_length: P. completion_length: T.
    """

    groups: int
    num_generations: int
    prompt_length: int
    completion_length: int

    @classmethod
    def rounded(
        cls,
        groups: int,
        num_generations: int,
        prompt_length: int,
        completion_length: int,
        device_type: str,
    ) -> CachePlan:
        """For prompts and completions of at most so many tokens."""
        width = WIDTH_STEP.get(device_type, WIDTH_STEP["cpu"])
        step = 1
        if device_type == "cuda":
            step = max(PROMPT_STEP, (1 << (prompt_length - 1).bit_length()) // 8)
        return cls(
            groups,
            num_generations,
            -(-prompt_length // step) * step,
            -(-completion_length // width) * width,
        )

    @property
    def num_tokens(self) -> int:
        return self.groups * (self.prompt_length + self.num_generations * self.completion_length)

    def check(self, limit: float, what: str) -> None:
        """Raise ValueError, which begins with `what`, if this is more than `limit` tokens."""
        if self.num_tokens > limit:
            raise ValueError(
                f"{what}: with {self.num_generations} completions it needs a cache of "
                f"{self.num_tokens:,} tokens ({self.prompt_length:,} + {self.num_generations} * "
                f"{self.completion_length:,}, as they are allocated), expected at most {limit:,}; "
                "lower --max_prompt_length, --num_generations or --max_completion_length, or raise "
                "--rollout_cache_tokens"
            )


class NativeRollout:
    """Completions by the engine described above.

    Args:
        weights: context in which the policy holds whole weights and may be called freely. The
            weights must stay at their addresses from call to call, or `graphs` be false.
        tokenizer: its tokenizer; EOS ends a completion, no other control token is ever drawn.
        device: where the policy computes.
        max_cache_tokens: prompt and completion tokens whose keys and values are held at once; None:
            what fits into the GPU's free memory, without limit on a CPU. More prompts than fit are
            decoded one batch after another, with the same result.
        graphs: capture steps as CUDA graphs; None: on CUDA outside autocast. With graphs the memory
            of a rollout stays for the next one, up to `KEPT_SHARE` of the GPU's; else it is freed.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Any,
        *,
        device: torch.device,
        max_cache_tokens: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.weights = weights
        self.tokenizer = tokenizer
        self.device = device
        self.max_cache_tokens = max_cache_tokens
        self.graphs = graphs
        self._buffers = _Buffers(device)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        *,
        first_row: int = 0,
        watch_layer: int | None = None,
    ) -> Rollouts:
        """See `virft_fast.rollout.Rollout.generate`.

        Args:
            watch_layer: where attention on the prompt is noted, from 0; None: nowhere.
        """
        check_request(prompts, num_generations)
        with self.weights() as policy:
            check_reachable(policy)
            batches = list(self._batches(policy, prompts, num_generations, sampling))
            training = policy.training
            policy.eval()
            try:
                parts = [
                    self._generate(
                        policy,
                        prompts[first:last],
                        num_generations,
                        sampling,
                        first_row + first * num_generations,
                        watch_layer,
                    )
                    for first, last in batches
                ]
            finally:
                policy.train(training)
                self._let_go()
            frozen = policy.vision_frozen
        tokens, logps, features, attention = zip(*parts, strict=True)
        rollouts = make_rollouts(
            prompts,
            num_generations,
            torch.cat(tokens),
            torch.cat(logps),
            (self.tokenizer.eos_token_id, *sampling.stop_token_ids),
            self.tokenizer,
            [part for parts in features for part in parts] if frozen else None,
        )
        if watch_layer is None:
            return rollouts
        return replace(rollouts, attention=tuple(part for parts in attention for part in parts))

    def fits(self, prompt: Prompt, num_generations: int, sampling: Sampling) -> bool:
        """Whether there is room for the prompt and its completions; `generate` raises otherwise."""
        with self.weights() as policy:
            limit = self._cache_limit(policy)
        return self._plan([prompt], num_generations, sampling).num_tokens <= limit

    def _batches(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
    ) -> Iterator[tuple[int, int]]:
        """(first, last) prompts that are decoded together.

        Raises:
            ValueError: not even one prompt and its completions fit.
        """
        limit = self._cache_limit(policy)
        first = 0
        for last, prompt in enumerate(prompts):
            what = f"rollout: row {prompt.sample.index} has a prompt of {len(prompt.input_ids)}"
            self._plan([prompt], num_generations, sampling).check(limit, f"{what} tokens")
            together = self._plan(prompts[first : last + 1], num_generations, sampling)
            if together.num_tokens > limit:
                yield first, last
                first = last
        yield first, len(prompts)

    def _plan(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling
    ) -> CachePlan:
        longest = max(len(prompt.input_ids) for prompt in prompts)
        return CachePlan.rounded(
            len(prompts),
            num_generations,
            longest,
            sampling.max_completion_length,
            self.device.type,
        )

    def _cache_limit(self, policy: Policy) -> float:
        if self.max_cache_tokens is not None:
            return self.max_cache_tokens
        if self.device.type != "cuda":
            return float("inf")
        free, _ = torch.cuda.mem_get_info(self.device)
        # What torch holds without using it is free as well, and so is our own cache.
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free += self._buffers.num_bytes()
        size = policy.head.weight.element_size()
        return int(CACHE_SHARE * free / (cache_numbers(policy.config.text_config) * size))

    def _with_graphs(self) -> bool:
        if self.graphs is not None:
            return self.graphs
        return self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")

    def _let_go(self) -> None:
        """Free the memory of the rollout, unless graphs hold its addresses and it is little."""
        most = float("inf")
        if self.device.type == "cuda":
            most = KEPT_SHARE * torch.cuda.get_device_properties(self.device).total_memory
        if not self._with_graphs() or self._buffers.num_bytes() > most:
            self._buffers.release()

    def banned(self, policy: Policy) -> list[int]:
        """Token ids that are never drawn."""
        return banned_token_ids(self.tokenizer, policy.config.text_config.vocab_size)

    def _generate(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        first_row: int,
        watch_layer: int | None,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """(N, T) tokens, their log-probs, the image features of each prompt (of a frozen tower
        only), and the attention of each completion on its prompt."""
        sampler = Sampler(
            sampling,
            vocab_size=policy.config.text_config.vocab_size,
            banned=self.banned(policy),
            first_row=first_row,
            prompts=[prompt for prompt in prompts for _ in range(num_generations)],
            device=self.device,
            take=self._buffers.take,
        )
        decoding = _Decoding(
            policy,
            self._buffers,
            sampler,
            plan=self._plan(prompts, num_generations, sampling),
            stop_ids=(self.tokenizer.eos_token_id, *sampling.stop_token_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            graphs=self._with_graphs(),
            watch_layer=watch_layer,
        )
        features = decoding.prefill(prompts)
        tokens, logps = decoding.run()
        return tokens, logps, features, decoding.attention(prompts)


def check_reachable(policy: Policy) -> None:
    """Raise ValueError if this engine can't decode with the policy."""
    if policy.unreachable is not None:
        raise ValueError(
            f"--rollout_backend native: expected a model whose attention can be reached, but "
            f"{policy.unreachable}; pass --rollout_backend hf"
        )


def cache_numbers(text_config: Any) -> int:
    """Numbers that keys and values of one token take in all layers."""
    heads = text_config.num_key_value_heads
    return 2 * text_config.num_hidden_layers * heads * head_dim(text_config)


def head_dim(text_config: Any) -> int:
    heads = text_config.num_attention_heads
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // heads


class _Buffers:
    """Memory that stays where it is from rollout to rollout, so that captured graphs stay valid,
    and those graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}
        self.graphs: dict[tuple[Any, ...], Any] = {}
        self.pool: Any = None

    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._flat.values())

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the memory called `name`; its contents are whatever was there."""
        count = 1
        for size in shape:
            count *= size
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count or flat.dtype != dtype:
            self.forget_graphs()  # they hold the old addresses
            self._flat.pop(name, None)
            # Zeros, not whatever: a key that is masked must still not be NaN.
            flat = self._flat[name] = torch.zeros(count, dtype=dtype, device=self.device)
        return flat[:count].view(*shape)

    def forget_graphs(self) -> None:
        if self.graphs and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last of them may not have ended
        self.graphs.clear()
        self.pool = None  # a pool without graphs can't be captured into again

    def release(self) -> None:
        """Give everything back."""
        self.forget_graphs()
        self._flat.clear()


@dataclass
class _Caches:
    """Keys and values of one layer, for groups of equally many rows.

    Attributes:
        prompt_keys, prompt_values: (B, K, P, E).
        keys, values: (B, K, G, T, E), the completions' own.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class _Decoding:
    """One batch of groups from prefill to the last token."""

    def __init__(
        self,
        policy: Policy,
        buffers: _Buffers,
        sampler: Sampler,
        *,
        plan: CachePlan,
        stop_ids: Sequence[int],
        pad_token_id: int,
        graphs: bool,
        watch_layer: int | None = None,
    ) -> None:
        self.watch_layer = watch_layer
        self.policy, self.buffers, self.sampler = policy, buffers, sampler
        self.device = buffers.device
        self.read_token = DecodeStep(core(policy.model).language_model)
        self.pad_token_id = pad_token_id
        self.with_graphs = graphs
        self.B, self.G = plan.groups, plan.num_generations
        self.P, self.T = plan.prompt_length, plan.completion_length
        self.length = sampler.sampling.max_completion_length
        self.width_step = WIDTH_STEP.get(self.device.type, WIDTH_STEP["cpu"])
        rows = self.B * self.G
        state = lambda name, dtype, *shape: buffers.take(name, shape, dtype)  # noqa: E731
        self.tokens = state("tokens", torch.long, rows)
        self.positions = state("positions", torch.long, rows)  # of the token being read
        self.done = state("done", torch.bool, rows)
        self.step = state("step", torch.long, 1)  # index of the token being read
        self.slots = state("slots", torch.long, rows)  # the row of `drawn` a row writes to
        self.drawn = state("drawn", torch.long, rows, self.length + 1)
        self.logps = state("logps", torch.float32, rows, self.length + 1)
        self.prompt_bias = state("prompt_bias", torch.float32, self.B, self.P)
        self.stop_ids = state("stop_ids", torch.long, len(stop_ids))
        self.stop_ids.copy_(torch.tensor(list(stop_ids)))
        self.caches: list[_Caches] = []
        if watch_layer is not None:
            # Sums over the queries of each row, by its first slot, and their number.
            self.watched = state("watched", torch.float32, rows, self.P)
            self.num_watched = state("num_watched", torch.float32, rows)
            self.last_of_prompt = state("last_of_prompt", torch.float32, rows // self.G, self.P)

    # Prefill

    def prefill(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Read all prompts, draw the first token of every row; returns each prompt's image
        features, of a frozen tower only."""
        features, lasts, starts = [], [], []
        most = PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS["cpu"])
        for first, last in token_chunks([len(p.input_ids) for p in prompts], most):
            part = prompts[first:last]
            inputs = self.policy.collate(
                part,
                [[] for _ in part],
                pad_token_id=self.pad_token_id,
                device=self.device,
                packed=True,
            )
            images = self.policy.image_features(inputs)
            if self.policy.vision_frozen:  # nobody may use them otherwise
                features += inputs.per_prompt(images)
            lasts.append(self._read(inputs, images, first))
            places = inputs.position_ids[:, 0]
            starts += [places[:, group.start : group.first].max() + 1 for group in inputs.groups]
        lengths = torch.tensor([len(p.input_ids) for p in prompts], device=self.device)
        outside = torch.arange(self.P, device=self.device) >= lengths[:, None]
        self.prompt_bias.zero_().masked_fill_(outside, -torch.inf)
        # No position is past the prompt's tokens; and graphs are kept apart by P and T.
        self.read_token.prepare(self.P + self.T, self.buffers.take)
        self.positions.copy_(torch.stack(starts).repeat_interleave(self.G))
        self.slots.copy_(torch.arange(len(self.slots)))
        self.drawn.fill_(self.pad_token_id)
        self.logps.zero_()
        self.done.zero_()
        self.step.zero_()
        if self.watch_layer is not None:
            self.watched.zero_()
            self.num_watched.zero_()
        logits = self.policy.head.logits(torch.cat(lasts))  # (B, V)
        self._note(*self.sampler(logits.repeat_interleave(self.G, 0), self.step[0]))
        return features

    def _read(self, inputs: ModelInputs, images: Tensor, first: int) -> Tensor:
        """(prompts, D) last hidden states of a packed row of prompts, their keys and values kept.

        Args:
            first: number of the row's first prompt.
        """
        attention = PackedAttention(inputs.groups, self.device)

        def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            if layer == len(self.caches):
                self._allocate(layer, value)
            caches = self.caches[layer]
            for number, group in enumerate(inputs.groups, first):
                place = slice(group.start, group.first)
                caches.prompt_keys[number, :, : group.prompt_length] = key[0, :, place]
                caches.prompt_values[number, :, : group.prompt_length] = value[0, :, place]
                if layer == self.watch_layer:
                    found = attention_to_prompt(query[0], key[0], group, scaling)
                    self.last_of_prompt[number, : group.prompt_length] = found
            return attention(layer, query, key, value, scaling)

        states = self.policy.language(inputs, images, attention_core=keep)
        attention.check(self.policy.config.text_config.num_hidden_layers)
        ends = torch.tensor([group.first - 1 for group in inputs.groups], device=self.device)
        return states[0, ends]

    def _allocate(self, layer: int, value: Tensor) -> None:
        # In the dtype of the values: under autocast keys come out of the rotation in float32.
        heads, size = value.shape[1], value.shape[3]
        prompt, own = (self.B, heads, self.P, size), (self.B, heads, self.G, self.T, size)
        take = lambda name, shape: self.buffers.take(f"{name}{layer}", shape, value.dtype)  # noqa: E731
        self.caches.append(
            _Caches(
                take("prompt_keys", prompt),
                take("prompt_values", prompt),
                take("keys", own),
                take("values", own),
            )
        )

    # Decoding

    def run(self) -> tuple[Tensor, Tensor]:
        """(N, T) tokens and log-probs, padding and 0 behind the end of a completion."""
        every = CHECK_EVERY.get(self.device.type, CHECK_EVERY["cpu"])
        with torch.inference_mode():  # a little less to do for each operation than no_grad
            for index in range(self.length - 1):  # of the token that is read
                if index % every == 0 and not self._shrink():
                    break
                width = min(self.T, -(-(index + 1) // self.width_step) * self.width_step)
                self._run_step(width)
                progress.mark("rollout")
        # The tables are used again by the next rollout.
        return self.drawn[:, : self.length].clone(), self.logps[:, : self.length].clone()

    def _run_step(self, width: int) -> None:
        if not self.with_graphs:
            self._decode(width)
            return
        # All that decides addresses, shapes and operations; the seed is in memory.
        sampling = replace(self.sampler.sampling, seed=0)
        key = (self.B, self.G, self.P, self.T, width, len(self.drawn), sampling, self.watch_layer)
        graphs = self.buffers.graphs
        if key not in graphs:
            if len(graphs) >= MAX_GRAPHS:
                self.buffers.forget_graphs()
            graphs[key] = self._capture(width)
        graphs[key].replay()

    def _capture(self, width: int) -> Any:
        """The step as a CUDA graph, the state as it was."""
        state = (self.tokens, self.positions, self.done, self.step, self.drawn, self.logps)
        if self.watch_layer is not None:
            state = (*state, self.watched, self.num_watched)
        if self.sampler.seen is not None:
            state = (*state, self.sampler.seen)
        before = [part.clone() for part in state]
        if self.buffers.pool is None:
            self.buffers.pool = torch.cuda.graph_pool_handle()
        graph = _record(functools.partial(self._decode, width), self.buffers.pool, self.device)
        for part, value in zip(state, before, strict=True):
            part.copy_(value)
        return graph

    def _decode(self, width: int) -> None:
        """Read the last token of each row and draw the next. On CUDA nothing here reaches the host,
        and no Python number in it changes but `width`, by which graphs are kept apart."""
        watch = None if self.watch_layer is None else (self.watch_layer, self._watch)
        attention = _DecodeAttention(self.caches, self.prompt_bias, self.step, width, watch)
        states = self.read_token(self.tokens, self.positions, attention)
        logits = self.policy.head.logits(states)
        self.step += 1
        self.positions += 1
        self._note(*self.sampler(logits, self.step[0]))

    def _watch(self, shares: Tensor) -> None:
        """Add (R, P) attention of the tokens being read, but for the rows that have ended."""
        active = (~self.done).float()
        self.watched.index_add_(0, self.slots, shares * active[:, None])
        self.num_watched.index_add_(0, self.slots, active)

    def attention(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Of each completion (P,) on its prompt's tokens: mean over heads and over the queries that
        predict its tokens after the first, or the only one; empty if nothing is watched."""
        if self.watch_layer is None:
            return []
        alone = self.last_of_prompt.repeat_interleave(len(self.watched) // len(prompts), 0)
        mean = self.watched / self.num_watched.clamp(min=1)[:, None]
        found = torch.where(self.num_watched[:, None] > 0, mean, alone)
        each = len(found) // len(prompts)
        lengths = [len(prompt.input_ids) for prompt in prompts for _ in range(each)]
        return [row[:length].clone() for row, length in zip(found, lengths, strict=True)]

    def _note(self, tokens: Tensor, logps: Tensor) -> None:
        """Write down what was drawn, at index `step`."""
        tokens = tokens.masked_fill(self.done, self.pad_token_id)
        place = (self.slots, self.step.expand(len(self.slots)))
        self.drawn.index_put_(place, tokens)
        self.logps.index_put_(place, logps.masked_fill(self.done, 0.0))
        self.done |= torch.isin(tokens, self.stop_ids)
        self.tokens.copy_(tokens)

    # Shrinking

    def _shrink(self) -> bool:
        """Leave completions that have ended behind, if that makes the batch much smaller. False if
        none is left."""
        active = ~self.done.view(self.B, self.G)  # (B, G)
        counts = active.sum(1).tolist()
        if not any(counts):
            return False
        groups = min(_bucket(sum(count > 0 for count in counts)), self.B)
        rows = min(_bucket(max(counts)), self.G)
        if groups * rows <= SHRINK_AT * self.B * self.G:
            self._keep(active, groups, rows)
        return True

    def _keep(self, active: Tensor, groups: int, rows: int) -> None:
        """Keep the groups and rows that are still active, and ended ones to fill up."""
        kept = active.any(1).int().argsort(descending=True, stable=True)[:groups]  # (B',)
        if groups == self.B:
            kept = torch.arange(groups, device=self.device)  # prompts stay where they are
        # (B', G')
        order = active[kept].int().argsort(dim=1, descending=True, stable=True)[:, :rows]
        flat = (kept[:, None] * self.G + order).flatten()
        for caches in self.caches:
            if groups < self.B:
                for name in ("prompt_keys", "prompt_values"):
                    whole = getattr(caches, name)
                    setattr(caches, name, to_front(whole, whole[kept]))
            heads, _, length, size = caches.keys.shape[1:]
            index = order[:, None, :, None, None].expand(-1, heads, -1, length, size)
            for name in ("keys", "values"):
                whole = getattr(caches, name)
                setattr(caches, name, to_front(whole, whole[kept].gather(2, index)))
        for name in ("tokens", "positions", "done", "slots"):
            whole = getattr(self, name)
            setattr(self, name, to_front(whole, whole[flat]))
        self.prompt_bias = to_front(self.prompt_bias, self.prompt_bias[kept])
        self.sampler.keep(flat)
        self.B, self.G = groups, rows


def _record(run: Callable[[], None], pool: Any, device: torch.device) -> Any:
    """`run` as a CUDA graph. Recording it runs nothing, but the warm-up before it does."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph


class _DecodeAttention:
    """The core of one decoding step: each row's one query over its prompt and its own tokens."""

    def __init__(
        self,
        caches: list[_Caches],
        prompt_bias: Tensor,
        step: Tensor,
        width: int,
        watch: tuple[int, Callable[[Tensor], None]] | None = None,
    ) -> None:
        self.caches, self.step, self.width, self.watch = caches, step, width, watch
        # Added to the scores: (B * K, 1, P) and (W,).
        self.prompt_bias = prompt_bias.repeat_interleave(caches[0].keys.shape[1], 0)[:, None]
        seen = torch.arange(width, device=step.device) <= step
        self.own_bias = torch.zeros(width, device=step.device).masked_fill_(~seen, -torch.inf)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """(R, H, E), (R, K, E), (R, K, E) -> (R, H * E)."""
        # Under autocast keys come out of the rotation in float32, and products would be narrow.
        with torch.autocast(query.device.type, enabled=False):
            narrow = (part.to(value.dtype) for part in (query, key, value))
            return self._attend(layer, *narrow, scaling)

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        caches = self.caches[layer]
        groups, heads, rows, _, size = caches.keys.shape

        def by_row(part: Tensor) -> Tensor:  # (R, x, E) -> (B * K * G, x / K, E)
            part = part.view(groups, rows, heads, -1, size).transpose(1, 2)
            return part.reshape(groups * heads * rows, -1, size)

        keys, values = caches.keys.flatten(0, 2), caches.values.flatten(0, 2)
        keys.index_copy_(1, self.step, by_row(key))
        values.index_copy_(1, self.step, by_row(value))
        keys, values = keys[:, : self.width], values[:, : self.width]
        own = by_row(query)  # (B * K * G, H / K, E)
        together = own.view(groups * heads, -1, size)  # the same, all rows of a group at once
        to_prompt = _scores(
            together, caches.prompt_keys.flatten(0, 1).transpose(1, 2), self.prompt_bias, scaling
        )
        to_own = _scores(own, keys.transpose(1, 2), self.own_bias, scaling)
        scores = torch.cat([to_prompt, to_own.view(*to_prompt.shape[:2], -1)], -1)
        # One softmax over both parts is what merging two by their log-sum-exp comes to.
        shares = scores.softmax(-1)
        length = caches.prompt_keys.shape[2]
        if self.watch is not None and self.watch[0] == layer:
            to_prompt = shares[..., :length].view(groups, heads, rows, -1, length)
            self.watch[1](to_prompt.mean((1, 3)).flatten(0, 1))
        shares = shares.to(value.dtype)
        out = torch.bmm(shares[..., :length], caches.prompt_values.flatten(0, 1))
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
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few sizes, so few graphs."""
    size = 1
    while size < count:
        if 3 * size // 2 >= count and size > 1:
            return 3 * size // 2
        size *= 2
    return size


def token_chunks(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, last) of runs that add up to at most `most`, or of one that is longer alone."""
    first, total = 0, 0
    for last, length in enumerate(lengths):
        if last > first and total + length > most:
            yield first, last
            first, total = last, 0
        total += length
    if lengths:
        yield first, len(lengths)
