"""Prompts that are read once, in unmodified models of transformers: prefix_attention, plugged into
transformers' attention interface. python examples/hf_prefix_attention.py

Each group's completions follow their prompt in one row. `attend` gets the row's layout through the
keyword arguments of the model's call. The positions of a completion continue from its prompt's. The
script compares log-probs and gradients with those of one row per completion.
"""

import torch
import transformers as hf
from torch import Tensor, nn

from virft_fast.kernels import PrefixLayout, prefix_attention

NAME = "prefix_attention"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    prefix_layout: PrefixLayout | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """(1, H, S, E) queries, (1, K, S, E) keys and values -> (1, S, H, E)."""
    if prefix_layout is None or scaling is None or len(query) != 1 or options.get("dropout"):
        raise ValueError(
            "expected one packed row, without dropout; pass prefix_layout to the model"
        )
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(
                f"expected attention without {name}, got a layer that has it; use sdpa for it"
            )
    row = (states[0].transpose(0, 1) for states in (query, key, value))
    return prefix_attention(*row, prefix_layout, scaling=scaling)[None], None


hf.AttentionInterface.register(NAME, attend)


def pack(prompts: list[Tensor], completions: list[list[Tensor]]) -> tuple[Tensor, PrefixLayout]:
    """(1, S) token ids, [prompt | completion 1 | ... | next prompt | ...], and the layout."""
    parts = [part for p, group in zip(prompts, completions, strict=True) for part in (p, *group)]
    layout = PrefixLayout.from_lengths(
        [len(prompt) for prompt in prompts],
        [[len(completion) for completion in group] for group in completions],
        device=parts[0].device,
    )
    return torch.cat(parts)[None], layout


def row_positions(layout: PrefixLayout, prompt_positions: list[Tensor]) -> Tensor:
    """(..., 1, S) positions of a packed row, from (..., P) positions of each prompt."""
    parts = []
    for group, positions in zip(layout.groups, prompt_positions, strict=True):
        parts.append(positions)
        for length in group.lengths:
            steps = torch.arange(1, length + 1, device=positions.device)
            parts.append((positions.max() + steps).expand(*positions.shape[:-1], -1))
    return torch.cat(parts, -1).unsqueeze(-2)


def row_logps(logits: Tensor, ids: Tensor, layout: PrefixLayout) -> Tensor:
    """Log-probs of all completion tokens. The prompt's last token predicts each completion's
    first."""
    predictors, targets = [], []
    for group in layout.groups:
        first = group.first
        for length in group.lengths:
            own = torch.arange(first, first + length, device=ids.device)
            predictors.append(torch.cat([own.new_tensor([group.first - 1]), own[:-1]])[:length])
            targets.append(own)
            first += length
    logps = logits[0, torch.cat(predictors)].log_softmax(-1)
    return logps.gather(1, ids[0, torch.cat(targets), None])[:, 0]


def plain_logps(logits: Tensor, prompt: Tensor, completion: Tensor) -> Tensor:
    logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, completion[:, None])[:, 0]


def random_ids(*lengths: int) -> list[Tensor]:
    return [torch.randint(10, 100, (length,)) for length in lengths]


def text_model(family: str) -> float:
    """The largest difference of a Qwen2 or Llama model's log-probs and gradients."""
    config = getattr(hf, f"{family}Config")(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = getattr(hf, f"{family}ForCausalLM")(config)
    prompts, completions = random_ids(9, 5), [random_ids(4, 7, 1), random_ids(3, 6)]

    model.set_attn_implementation(NAME)
    ids, layout = pack(prompts, completions)
    positions = row_positions(layout, [torch.arange(len(prompt)) for prompt in prompts])
    logits = model(ids, position_ids=positions, prefix_layout=layout, use_cache=False).logits
    shared = row_logps(logits, ids, layout)

    model.set_attn_implementation("sdpa")
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    plain = [plain_logps(model(torch.cat(row)[None]).logits, *row) for row in rows]
    return difference(model, shared, torch.cat(plain))


def vision_model() -> float:
    """The largest difference of a Qwen2.5-VL model's log-probs and gradients. A prompt with an
    image is read once, image included."""
    image, start = 120, 121  # token ids
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2],
        },
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
        "num_heads": 2, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=122,
        vision_start_token_id=start, vision_end_token_id=123, initializer_range=0.2,
    )  # fmt: skip
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    grid, pixels = torch.tensor([[1, 4, 6]]), torch.randn(24, 3 * 2 * 14 * 14)
    prompt = torch.cat([torch.tensor([5, start, *[image] * 6, 123]), *random_ids(4)])
    completions = random_ids(5, 8, 2)
    picture = {"pixel_values": pixels, "image_grid_thw": grid}

    model.set_attn_implementation({"text_config": NAME})
    ids, layout = pack([prompt], [completions])
    types = (prompt == image).int()[None]
    positions, _ = model.model.get_rope_index(
        prompt[None], mm_token_type_ids=types, image_grid_thw=grid
    )
    positions = row_positions(layout, [positions[:, 0]])
    logits = model(
        ids, position_ids=positions, prefix_layout=layout, use_cache=False, **picture
    ).logits
    shared = row_logps(logits, ids, layout)

    model.set_attn_implementation({"text_config": "sdpa"})
    plain = []
    for completion in completions:
        row = torch.cat([prompt, completion])[None]
        output = model(row, mm_token_type_ids=(row == image).int(), **picture)
        plain.append(plain_logps(output.logits, prompt, completion))
    return difference(model, shared, torch.cat(plain))


def difference(model: nn.Module, shared: Tensor, plain: Tensor) -> float:
    """The larger of the log-probs' largest difference and the gradients' relative one."""
    weights = torch.randn(len(plain))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad((logps * weights).sum(), parameters)])
        for logps in (shared, plain)
    )
    largest = (shared - plain).detach().abs().max()
    return max(float(largest), float((ours - theirs).norm() / theirs.norm()))


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, run in (
        ("Qwen2", lambda: text_model("Qwen2")), ("Llama", lambda: text_model("Llama")),
        ("Qwen2.5-VL", vision_model),
    ):  # fmt: skip
        print(f"{name}: shared and unshared prompts differ by {run():.1e}")
