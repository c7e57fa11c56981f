"""Child of test_trl_example.py: TRL's trainer and ours on two ranks; rank 0 saves what they did.

torchrun --nproc_per_node 2 -m trl_two_ranks OUT ddp|fsdp2
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_trl_example import example, make_trainer, train
from torch.distributed.fsdp import fully_shard
from trl import GRPOTrainer

from virft_fast.commands import end_process


def sharded(folder: Path) -> tuple[list, list]:
    """The loss and its gradients with whole parameters and with FSDP2's."""
    trainer = make_trainer(example().FusedGRPOTrainer, folder)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    whole = trainer._compute_loss(model, inputs)
    whole.backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for grad in wanted:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    model.zero_grad()
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    grads = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    return [whole.detach(), *wanted], [loss.detach(), *grads]


def trained(folder: Path) -> tuple[list, list]:
    """Losses and weights after three steps of DDP, TRL's and ours."""
    options = {"gradient_checkpointing": False, "top_entropy_quantile": 0.3, "entropy_coef": 0.05}
    results = []
    for trainer in (GRPOTrainer, example().FusedGRPOTrainer):
        losses, weights = train(trainer, folder / trainer.__name__, **options)
        results.append([torch.tensor(losses), *weights.values()])
    return results[0], results[1]


if __name__ == "__main__":
    out, kind = Path(sys.argv[1]), sys.argv[2]
    folder = out / f"{kind}_{os.environ['RANK']}"
    pair = trained(folder) if kind == "ddp" else sharded(folder)
    if dist.get_rank() == 0:
        torch.save(pair, out / f"{kind}.pt")
    end_process(0)
