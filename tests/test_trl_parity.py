"""The loss and the advantages equal TRL 1.16's and Liger's own code, run on the same tensors."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_detection_rewards import batch

from virft_fast.kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    normalize_then_sum,
)
from virft_fast.kernels.loss_args import CORRECTIONS
from virft_fast.tasks import REWARDS, RewardLog, score

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
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
            sync_gradients=True,
        ),
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
    }
    arguments = {
        "delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1,
        "sapo_temperature_neg": 1.05, "sapo_temperature_pos": 1.0, "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    }  # fmt: skip
    arguments |= {name: options.pop(name) for name in arguments.keys() & options.keys()}
    values["args"] = SimpleNamespace(**arguments)
    options["_entropy_bonus_enabled"] = options.get("entropy_coef", 0.0) != 0
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


def our_losses(logits, inputs, **options):
    """(result, gradient in the logits) from logits and from a head, padded and packed."""
    mask = inputs["completion_mask"].bool()
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    by_token = {k: v for k, v in options.items() if getattr(v, "shape", None) == mask.shape}
    packed = options | {k: v[mask] for k, v in by_token.items()} | {"cu_seqlens": offsets}
    ids, eye = inputs["completion_ids"], torch.eye(V, dtype=logits.dtype)
    shared = {"advantages": inputs["advantages"]}
    for call in (
        lambda x: grpo_loss(x, ids, mask, **shared, **options),
        lambda x: linear_grpo_loss(x, eye, ids, mask, chunk_tokens=5, **shared, **options),
        lambda x: grpo_loss(x[mask], ids[mask], **shared, **packed),
        lambda x: linear_grpo_loss(x[mask], eye, ids[mask], chunk_tokens=5, **shared, **packed),
    ):
        leaf = logits.clone().requires_grad_()
        result = call(leaf)
        (grad,) = torch.autograd.grad(result.loss, leaf)
        yield result, grad


def trl_and_gradient(logits, inputs, trainer):
    leaf = logits.clone().requires_grad_()
    loss = trl_loss(trainer, leaf, inputs)
    return loss, torch.autograd.grad(loss, leaf)[0]


# Options with the names that TRL gives them, each with every loss type and level.
OPTIONS = [
    {"use_bias_correction_kl": True, "beta": 0.3},
    {"use_bias_correction_kl": True, "beta": 0.3, "delta": 1.1, "on_policy": True},
    {"is_weights": "token", "beta": 0.1},
    {"is_weights": "sequence", "top_entropy_quantile": 0.4, "beta": 0.1},
    {"off_policy_mask_threshold": 0.02, "beta": 0.1},
    {"off_policy_mask_threshold": 0.02, "sampling": True},
    {"entropy_coef": 0.2, "is_weights": "token"},
    {"entropy_coef": -0.1, "top_entropy_quantile": 0.2, "beta": 0.1},
    {"top_entropy_quantile": 0.0, "on_policy": True},
    {"use_bias_correction_kl": True, "beta": 0.1, "is_weights": "sequence", "entropy_coef": 0.05,
     "top_entropy_quantile": 0.7, "off_policy_mask_threshold": 0.05, "sapo_temperature_neg": 1.5,
     "sapo_temperature_pos": 0.7, "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.2},
]  # fmt: skip


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
)
def test_every_option_equals_trl_padded_packed_and_from_a_head(loss_type, level):
    for seed, given in enumerate(OPTIONS):
        logits, inputs = make_inputs(seed)
        mask = inputs["completion_mask"].bool()
        options = {"loss_type": loss_type, "importance_sampling_level": level} | given
        g = torch.Generator().manual_seed(seed)
        noise = 0.3 * torch.randn(N, T, generator=g)
        weights = {"token": noise.exp(), "sequence": noise[:, :1].exp(), None: None}
        weights = weights[options.pop("is_weights", None)]
        if weights is not None:  # TRL's own are 1 where masked
            whole = weights.shape == (N, 1)
            weights = weights if whole else torch.where(mask, weights, 1.0)
            inputs["importance_sampling_ratio"] = weights
        on_policy, sampling = options.pop("on_policy", False), options.pop("sampling", False)
        if on_policy:
            inputs["old_per_token_logps"] = None
        if sampling:
            sampled = inputs["old_per_token_logps"] + noise
            sampled[0, 0] = float("nan")  # a token that the sampler couldn't score
            inputs["sampling_per_token_logps"] = sampled
        trainer = trl_trainer(
            **options, use_vllm=weights is not None,
            vllm_importance_sampling_correction=weights is not None,
        )  # fmt: skip
        theirs, wanted = trl_and_gradient(logits, inputs, trainer)
        counted = ("dapo", "cispo", "vespo")  # TRL counts the other types' tokens itself
        results = our_losses(
            logits, inputs, is_weights=weights, old_logps=inputs["old_per_token_logps"],
            ref_logps=inputs["ref_per_token_logps"] if options.get("beta") else None,
            sampling_logps=inputs.get("sampling_per_token_logps"),
            max_completion_length=MAX_LENGTH,
            num_items=NUM_ITEMS if loss_type in counted else None, **options,
        )  # fmt: skip
        for result, grad in results:
            torch.testing.assert_close(result.loss, theirs, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)
        metrics = trainer._metrics["train"]
        if "kl" in metrics:
            kl = result.kl.sum() / mask.sum()
            assert kl.item() == pytest.approx(metrics["kl"][0], abs=1e-5)


def trl_weights(trainer, old, sampled, mask):
    """The weights of another sampler, by the statement of TRL's trainer that computes them."""
    import ast
    import inspect
    import textwrap

    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    (statement,) = (
        node
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.use_vllm and self.vllm_importance_sampling_correction"
        and "masked_fill(invalid_mis_mask" in ast.unparse(node)
    )
    names = {
        "self": trainer, "completion_mask": mask.long(), "tool_mask": None,
        "old_per_token_logps": old, "sampling_per_token_logps": sampled,
    }  # fmt: skip
    exec(compile(ast.Module([statement], []), "trl", "exec"), vars(grpo_trainer), names)
    return names["vllm_importance_sampling_ratio"]


LIMITS = [(3.0, None), (1.1, 0.9), (None, 0.8), (None, None)]


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "luspo", "vespo"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_correction_of_another_sampler_equals_trls(mode, loss_type, on_policy):
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL refuses it, and so do we")
    lost = 0
    for seed, (high, low) in enumerate(LIMITS):
        if mode.endswith("truncate") and high is low is None:
            continue  # TRL's clamp needs a limit
        logits, inputs = make_inputs(seed)
        mask = inputs["completion_mask"].bool()
        g = torch.Generator().manual_seed(seed)
        logps = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        old = logps if on_policy else inputs["old_per_token_logps"]
        sampled = old + 0.2 * torch.randn(N, T, generator=g)
        sampled[0, 0] = float("nan")  # a token that the sampler couldn't score
        limits = {"importance_sampling_clip_max": high, "importance_sampling_clip_min": low}
        trainer = trl_trainer(
            loss_type=loss_type, beta=0.1, use_vllm=True, vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode, **{f"vllm_{k}": v for k, v in limits.items()},
        )  # fmt: skip
        weights = trl_weights(trainer, old, sampled, mask)
        lost += int((weights == 0).sum())
        inputs["importance_sampling_ratio"] = weights
        inputs["old_per_token_logps"] = None if on_policy else old
        theirs, wanted = trl_and_gradient(logits, inputs, trainer)
        results = our_losses(
            logits, inputs, old_logps=inputs["old_per_token_logps"], sampling_logps=sampled,
            ref_logps=inputs["ref_per_token_logps"], beta=0.1, importance_sampling_mode=mode,
            num_items=NUM_ITEMS if loss_type in ("cispo", "vespo") else None,
            loss_type=loss_type, **limits,
        )  # fmt: skip
        for result, grad in results:
            torch.testing.assert_close(result.loss, theirs, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)
    assert (lost > 0) == mode.endswith("mask")


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_gradients_equal_trl_in_float64(loss_type):
    logits, inputs = make_inputs(1)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    options = {"loss_type": loss_type, "beta": 0.3, "use_bias_correction_kl": True}
    options |= {"off_policy_mask_threshold": 0.02, "entropy_coef": 0.1, "epsilon_high": 1.1}
    options |= {"sapo_temperature_neg": 1.25}  # TRL rounds it to float32
    inputs["importance_sampling_ratio"] = inputs["advantages"][:, None].exp()
    trainer = trl_trainer(**options, use_vllm=True, vllm_importance_sampling_correction=True)
    theirs, wanted = trl_and_gradient(logits.double(), inputs, trainer)
    results = our_losses(
        logits.double(), inputs, old_logps=inputs["old_per_token_logps"],
        ref_logps=inputs["ref_per_token_logps"], is_weights=inputs["importance_sampling_ratio"],
        num_items=NUM_ITEMS if loss_type in ("cispo", "vespo") else None, **options,
    )  # fmt: skip
    for result, grad in results:
        torch.testing.assert_close(result.loss, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.5, 0.8, 0.95])
def test_the_entropy_quantile_selects_trls_tokens(share):
    """At every count of tokens: where the quantile lies on a token's entropy, that one counts."""
    trainer = trl_trainer()
    for count in range(1, 24):
        g = torch.Generator().manual_seed(count)
        logits = torch.randn(4, 6, V, generator=g)
        mask = torch.zeros(24, dtype=torch.int64)
        mask[torch.randperm(24, generator=g)[:count]] = 1
        mask = mask.view(4, 6)
        ids = torch.randint(V, (4, 6), generator=g)
        leaf = logits.requires_grad_()
        result = grpo_loss(
            leaf, ids, mask.bool(), advantages=torch.ones(4), loss_type="dapo",
            top_entropy_quantile=share,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(result.loss, leaf)
        wanted = trainer.get_high_entropy_mask(result.entropy, mask, 1 - share)
        assert torch.equal(grad.abs().sum(-1) > 0, wanted), count


LIGER = {
    "grpo": {}, "bnpo": {}, "dr_grpo": {"max_completion_length": MAX_LENGTH}, "dapo": {},
    "cispo": {}, "sapo": {"sapo_temperature_pos": 0.8}, "luspo": {}, "vespo": {"vespo_k_neg": 2.5},
}  # fmt: skip


@pytest.mark.parametrize("weighted", [None, "token", "sequence"])
@pytest.mark.parametrize("loss_type", list(LIGER))
def test_new_options_equal_ligers_chunked_loss(loss_type, weighted):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    options = {"loss_type": loss_type, "use_bias_correction_kl": True, "beta": 0.2}
    options |= LIGER[loss_type]
    if loss_type == "luspo":  # Liger also divides by T what is not one value a sequence, as KL is
        options |= {"importance_sampling_level": "sequence", "beta": 0.0}
        weighted = None if weighted == "token" else weighted
    logits, inputs = make_inputs(3)
    weights = inputs["old_per_token_logps"].sub(inputs["ref_per_token_logps"]).exp()
    weights = torch.where(inputs["completion_mask"].bool(), weights, 1.0)
    weights = {None: None, "token": weights, "sequence": weights[:, :1]}[weighted]
    leaf = logits.clone().requires_grad_()
    loss = liger.LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=True, **options)(
        leaf, torch.eye(V), inputs["completion_ids"], inputs["completion_mask"].float(),
        inputs["advantages"], ref_per_token_logps=inputs["ref_per_token_logps"],
        old_per_token_logps=inputs["old_per_token_logps"], vllm_is_ratio=weights,
    )[0]  # fmt: skip
    (wanted,) = torch.autograd.grad(loss, leaf)
    results = our_losses(
        logits, inputs, old_logps=inputs["old_per_token_logps"],
        ref_logps=inputs["ref_per_token_logps"] if options["beta"] else None, is_weights=weights,
        **options,
    )  # fmt: skip
    for result, grad in results:
        torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)


def trl_advantages(rewards, num_generations, module="grpo_trainer", **options):
    """TRL computes them amid generation: those statements of its method alone are run.

    `rewards` are (N,) or (N, R).
    """
    import ast
    import importlib
    import inspect
    import textwrap

    names = vars(importlib.import_module(f"trl.trainer.{module}"))
    trainer = names["GRPOTrainer" if module == "grpo_trainer" else "RLOOTrainer"]
    method = trainer._generate_and_score_completions
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
    rewards = rewards.view(len(rewards), -1)
    own = {
        "scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize",
        "reward_weights": torch.ones(rewards.shape[1]), "reward_funcs": [None] * rewards.shape[1],
        "reward_clip_range": None, "beta": 0.0, "normalize_advantages": False,
    }  # fmt: skip
    scope = {
        **names, "self": SimpleNamespace(**own | options), "rewards_per_func": rewards,
        "num_generations": num_generations, "device": "cpu",
    }  # fmt: skip
    exec(compile(ast.Module(wanted, []), "trl", "exec"), scope)
    return scope["advantages"]


def reward_cases():
    """24 rewards in groups of 4: all scored; some not, up to all of a group but one, and all of a
    group; and equal ones."""
    plain = torch.rand(24, generator=torch.Generator().manual_seed(0))
    holes = plain.clone()
    holes[torch.tensor([1, 8, 9, 10, 16, 17, 18, 19])] = float("nan")
    return plain, holes, torch.tensor([0.5] * 4 + [0, 1, 0, 1]).float()


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_equal_trl(scale_rewards):
    for rewards in reward_cases():
        theirs = trl_advantages(rewards, 4, scale_rewards=scale_rewards)
        ours = group_advantages(rewards, 4, scale_rewards=scale_rewards)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rloo_advantages_equal_trls_rloo_trainer():
    for rewards in reward_cases():
        ours = group_advantages(rewards, 4, advantage_estimator="rloo")
        theirs = trl_advantages(rewards, 4, "rloo_trainer")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_reinforce_pp_is_trls_normalized_rloo_within_a_factor():
    """TRL's normalized RLOO divides n / (n - 1) times the centered rewards by their std in the
    batch. Without unscored rows, that factor cancels, apart from TRL's epsilon."""
    rewards = reward_cases()[0]
    ours = group_advantages(rewards, 4, advantage_estimator="reinforce_pp", eps=1e-12)
    theirs = trl_advantages(rewards, 4, "rloo_trainer", normalize_advantages=True)
    std = group_advantages(rewards, 4, advantage_estimator="rloo").std()
    torch.testing.assert_close(ours, theirs * (std + 1e-4) / std, rtol=1e-5, atol=1e-6)


def test_a_clipped_reward_is_clipped_as_in_trls_rloo_trainer():
    rewards = reward_cases()[1]
    values = [None if value.isnan() else float(value) for value in rewards]
    _, total = score([("r", lambda **_: values)], [1.0], values, values, {}, clip=[0.3, 0.6])
    ours = group_advantages(total, 4, advantage_estimator="rloo")
    theirs = trl_advantages(rewards, 4, "rloo_trainer", reward_clip_range=(0.3, 0.6))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, -0.5, 0.0]])
def test_normalize_then_sum_equals_trl(weights):
    """Also where only one function, or none, scored a row, and for equal rewards."""
    nan, g = float("nan"), torch.Generator().manual_seed(1)
    rewards = torch.rand(24, 3, generator=g) * torch.tensor([1.0, 100.0, 0.01])
    rewards[:4] = 0.1
    rewards[5:8, 0] = rewards[9, 1] = rewards[10:14] = rewards[16:20] = nan
    for given in (rewards, rewards[:4], rewards[4:8], rewards[16:20], rewards[:, :1].repeat(1, 3)):
        theirs = trl_advantages(
            given, 4, multi_objective_aggregation="normalize_then_sum",
            reward_weights=torch.tensor(weights),
        )  # fmt: skip
        ours = normalize_then_sum(given, weights, 4)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (normalize_then_sum(rewards, weights, 4)[:4] == 0).all()


def test_a_reward_reports_to_our_log_as_to_trls():
    """`log_metric` and `log_extra` take the same arguments by position and by name."""
    trainer, log = trl_trainer(), RewardLog()
    trainer._pending_metrics, trainer._pending_extra_logs = defaultdict(list), defaultdict(list)
    theirs = {"log_metric": trainer._log_metric, "log_extra": trainer._log_completion_extra}
    for given in (theirs, log.arguments()):
        given["log_metric"](name="hits", value=1)
        given["log_metric"]("hits", 0.5)
        given["log_extra"](column="seen", values=["a", "b"])
    assert log.metrics == trainer._pending_metrics and log.extra == trainer._pending_extra_logs


def test_trl_calls_every_reward():
    trainer = trl_trainer()
    for name, function in REWARDS.items():
        texts, truths, wanted = batch(name)
        trainer.__dict__.update(
            accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=False),
            state=SimpleNamespace(global_step=0), reward_funcs=[function],
            reward_processing_classes=[None], reward_func_names=[name],
            environments=None, args=SimpleNamespace(report_to=[]),
            _pending_metrics=defaultdict(list), _pending_extra_logs=defaultdict(list),
            _metrics=defaultdict(list),
        )  # fmt: skip
        inputs = [{"prompt": "p", "solution": truth, "image": None} for truth in truths]
        talks = [[{"role": "assistant", "content": text}] for text in texts]
        got = trainer._calculate_rewards(inputs, ["p"] * 4, talks, [[1]] * 4)
        torch.testing.assert_close(got[:, 0], torch.tensor(wanted, dtype=torch.float32))
