"""GRPO in 60 lines, from virft_fast's parts: python examples/minimal_grpo.py [STEPS]"""

import sys
from contextlib import nullcontext
from statistics import mean

import torch

from virft_fast.batch import Sample
from virft_fast.data.demo import shapes
from virft_fast.kernels import linear_grpo_loss
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, encode_prompt, load_model
from virft_fast.models.shared_prefix import PackedAttention
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout
from virft_fast.tasks import REWARDS

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 32
B, G = 4, 8  # prompts per step, completions per prompt: N = B * G completions
CPU = torch.device("cpu")

processor, policy = load_processor("tiny"), Policy(load_model("tiny").train())
rollout = NativeRollout(lambda: nullcontext(policy), processor.tokenizer, device=CPU)
optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-4, betas=(0.9, 0.99), weight_decay=0)
rows, history = shapes(seed=0), []
for step in range(1, STEPS + 1):
    # Prompts: an image with colored shapes and a question, such as "Detect every red."
    prompts = []
    for row in (next(rows) for _ in range(B)):
        content = [{"type": "image"}, {"type": "text", "text": row["problem"]}]
        chat = ({"role": "user", "content": content},)
        prompts.append(encode_prompt(processor, Sample(0, chat, (row["image"],), row["solution"])))

    # Rollout: G completions of each prompt. The prompt and its image are computed once.
    out = rollout.generate(prompts, G, Sampling(max_completion_length=48, seed=step))

    # Rewards (N,): how well the boxes in each completion cover the true ones.
    chats = [[{"role": "assistant", "content": text}] for text in out.texts]
    solutions = [prompt.sample.solution for prompt in prompts for _ in range(G)]
    rewards = torch.tensor(REWARDS["hungarian_iou"](completions=chats, solution=solutions))

    # Hidden states (S, D) of all S completion tokens. One packed row holds each prompt once.
    ids = [row[mask] for row, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    groups = [ids[first : first + G] for first in range(0, B * G, G)]
    inputs = policy.collate(prompts, groups, pad_token_id=0, device=CPU)
    shared = PackedAttention(inputs.groups, CPU)
    states = policy.language(inputs, policy.image_features(inputs), attention_core=shared)
    hidden = states.flatten(0, 1)[inputs.predictors]

    # Advantages within each group, loss and gradients. The full logits never exist.
    loss = linear_grpo_loss(hidden, policy.head.weight, inputs.completion_ids, rewards=rewards,
                            num_generations=G, cu_seqlens=inputs.cu_seqlens).loss  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    history.append(float(rewards.mean()))
    print(f"step {step:2}  reward {history[-1]:.3f}  last ten {mean(history[-10:]):.3f}")
