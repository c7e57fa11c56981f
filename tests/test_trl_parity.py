"""The loss and the advantages equal TRL 1.16's own code, run on the same tensors."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from virft_fast.kernels import group_advantages, grpo_loss

pytest.importorskip("trl")

N, T, V, MAX_LENGTH, NUM_ITEMS = 6, 7, 11, 16, 29


def trl_trainer(**options):
    """A GRPOTrainer that never loaded a model: the attributes its loss reads, and no more."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = object.__new__(GRPOTrainer)
    values = {
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "aux_loss_enabled": False,
        "max_completion_length": MAX_LENGTH,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "args": SimpleNamespace(
            delta=options.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1
        ),
    }
    trainer.__dict__.update(values | options)
    return trainer


def trl_loss(trainer, logits, inputs):
    """TRL's _compute_loss where the model's forward is replaced by the log-probs of `logits`."""

    def logps_and_entropies(model, input_ids, *args, **kwargs):
        log_p = logits.log_softmax(-1)
        logps = log_p.gather(-1, inputs["completion_ids"][..., None])[..., 0]
        return logps, -(log_p.exp() * log_p).sum(-1), None

    trainer._get_per_token_logps_and_entropies = logps_and_entropies
    return trainer._compute_loss(None, inputs)


def make_inputs(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, T, V, generator=g)
    ids = torch.randint(V, (N, T), generator=g)
    lengths = torch.randint(1, T + 1, (N,), generator=g)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return logits, {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(N, 1, dtype=torch.int64),
        "completion_ids": ids,
        "completion_mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": torch.randn(N, generator=g),
        "old_per_token_logps": logps + 0.4 * torch.randn(N, T, generator=g),
        "ref_per_token_logps": logps + 0.4 * torch.randn(N, T, generator=g),
        "num_items_in_batch": torch.tensor(NUM_ITEMS),
    }


def assert_parity(logits, inputs, loss_type, level, beta, delta, high, on_policy=False):
    ours_in, theirs_in = (logits.clone().requires_grad_() for _ in range(2))
    inputs = dict(inputs)
    if on_policy:
        inputs["old_per_token_logps"] = None
    trainer = trl_trainer(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        delta=delta,
        epsilon_high=0.2 if high is None else high,
    )
    theirs = trl_loss(trainer, theirs_in, inputs)
    # TRL counts bnpo's tokens itself; our num_items would override that.
    num_items = NUM_ITEMS if loss_type in ("dapo", "cispo") else None
    ours = grpo_loss(
        ours_in,
        inputs["completion_ids"],
        inputs["completion_mask"].bool(),
        advantages=inputs["advantages"],
        old_logps=inputs["old_per_token_logps"],
        ref_logps=inputs["ref_per_token_logps"] if beta else None,
        beta=beta,
        epsilon_high=high,
        delta=delta,
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=MAX_LENGTH,
        num_items=num_items,
    )
    theirs.backward()
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-5, atol=1e-7)
    check_metrics(ours, trainer._metrics["train"], inputs["completion_mask"].bool(), loss_type)


def check_metrics(ours, metrics, mask, loss_type):
    high = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/high_mean"
    assert ours.clip_fraction_high.item() == pytest.approx(metrics[high][0], abs=1e-6)
    if loss_type != "cispo":
        low = metrics["clip_ratio/low_mean"][0]
        assert ours.clip_fraction_low.item() == pytest.approx(low, abs=1e-6)
    assert ours.entropy[mask].mean().item() == pytest.approx(metrics["entropy"][0], abs=1e-5)
    if "kl" in metrics:
        assert ours.kl[mask].mean().item() == pytest.approx(metrics["kl"][0], abs=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_loss_gradient_and_metrics_equal_trl(loss_type, level):
    options = itertools.product([0.0, 0.04], [None, 1.3], [None, 0.28, 1.1], [False, True])
    for seed, (beta, delta, high, on_policy) in enumerate(options):
        logits, inputs = make_inputs(seed)
        assert_parity(logits, inputs, loss_type, level, beta, delta, high, on_policy)


def test_gspo_is_trl_grpo_with_sequence_ratios():
    logits, inputs = make_inputs(0)
    theirs = trl_loss(trl_trainer(importance_sampling_level="sequence"), logits, inputs)
    ours = grpo_loss(
        logits,
        inputs["completion_ids"],
        inputs["completion_mask"].bool(),
        advantages=inputs["advantages"],
        old_logps=inputs["old_per_token_logps"],
        loss_type="gspo",
    )
    torch.testing.assert_close(ours.loss, theirs)


def trl_advantages(rewards, num_generations, scale_rewards):
    """TRL computes them amid generation: those statements of its method alone are run."""
    import ast
    import inspect
    import textwrap

    from trl.trainer import grpo_trainer

    method = grpo_trainer.GRPOTrainer._generate_and_score_completions
    function = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    wanted = []
    for node in function.body:  # from the reward calls' mask to the clean-up of NaN advantages
        text = ast.unparse(node)
        if text.startswith("unscorable_mask =") or wanted:
            wanted.append(node)
        if text.startswith("advantages = torch.nan_to_num("):
            break
    else:
        pytest.skip("TRL's advantage lines moved")
    scope = dict(
        vars(grpo_trainer),
        self=SimpleNamespace(
            scale_rewards=scale_rewards,
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1),
        ),
        rewards_per_func=rewards[:, None],
        num_generations=num_generations,
        device="cpu",
    )
    exec(compile(ast.Module(wanted, []), "trl", "exec"), scope)
    return scope["advantages"]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_equal_trl(scale_rewards):
    nan = float("nan")
    g = torch.Generator().manual_seed(0)
    plain = torch.rand(24, generator=g)
    holes = plain.clone()
    holes[torch.tensor([1, 8, 9, 10, 16, 17, 18, 19])] = nan  # also one and no row left of a group
    equal = torch.tensor([0.5] * 4 + [0, 1, 0, 1]).float()
    for rewards in (plain, holes, equal):
        theirs = trl_advantages(rewards, 4, scale_rewards)
        ours = group_advantages(rewards, 4, scale_rewards=scale_rewards)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
