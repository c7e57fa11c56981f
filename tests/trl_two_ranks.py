"""Child of test_trl_example.py: TRL's trainer and ours on two ranks; rank 0 saves what they did.

torchrun --nproc_per_node 2 -m trl_two_ranks OUT ddp|zero3|fsdp2
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_trl_example import example, make_trainer, train
from trl import GRPOTrainer

from virft_fast.commands import end_process

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
}  # fmt: skip
OPTIONS = {
    "ddp": {"gradient_checkpointing": False, "top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    "zero3": {"deepspeed": ZERO3, "use_cpu": False, "beta": 0.1},
    "fsdp2": {},
}


def sharded(folder: Path) -> tuple[list, list]:
    """The loss and its gradients with whole parameters and with FSDP2's."""
    from torch.distributed.fsdp import fully_shard

    trainer = make_trainer(example().FusedGRPOTrainer, folder)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    results = []
    for shard in (False, True):
        if shard:
            for layer in model.model.language_model.layers:
                fully_shard(layer)
            fully_shard(model)
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if shard:
            grads = [grad.full_tensor() for grad in grads]
        else:
            for grad in grads:
                dist.all_reduce(grad)
                grad /= dist.get_world_size()
        results.append([loss.detach(), *(grad.clone() for grad in grads)])
        model.zero_grad()
    return results[0], results[1]


def trained(folder: Path, kind: str) -> tuple[list, list]:
    results = []
    for trainer in (GRPOTrainer, example().FusedGRPOTrainer):
        losses, weights = train(trainer, folder / trainer.__name__, **OPTIONS[kind])
        results.append([torch.tensor(losses), *weights.values()])
    return results[0], results[1]


if __name__ == "__main__":
    out, kind = Path(sys.argv[1]), sys.argv[2]
    folder = out / f"{kind}_{os.environ['RANK']}"
    pair = sharded(folder) if kind == "fsdp2" else trained(folder, kind)
    if dist.get_rank() == 0:
        torch.save(pair, out / f"{kind}.pt")
    end_process(0)
