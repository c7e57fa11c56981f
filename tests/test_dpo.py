"""`--algorithm dpo`: the loss, the pairs' shared prompt, its references, runs and resumes."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, largest_difference, make_sample, make_state, parameters, read_jsonl
from helpers import make_prompts as encode
from processes import run

from virft_fast.algorithms import dpo
from virft_fast.algorithms.dpo import DPOState, dpo_loss
from virft_fast.config import DPOConfig
from virft_fast.data import SampleDataset
from virft_fast.engine import PlainEngine, make_reference
from virft_fast.models.qwen_vl import Policy, add_lora, core, freeze_vision_tower, load_model
from virft_fast.train import main

# ---- the loss ------------------------------------------------------------------------------------


def test_by_hand():
    logps = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]])
    ref = torch.tensor([[-2.0, -3.0], [-2.0, -2.0]])
    losses, rewards = dpo_loss(logps, ref, beta=1.0)
    # Log-ratios (1, 0) and (0, 0): -log sigmoid(1) and log 2.
    torch.testing.assert_close(losses, torch.tensor([0.3132617, math.log(2)]))
    assert rewards.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    smoothed, _ = dpo_loss(logps, ref, beta=1.0, label_smoothing=0.25)
    # 0.75 * 0.3132617 + 0.25 * -log sigmoid(-1)
    torch.testing.assert_close(smoothed[0], torch.tensor(0.75 * 0.3132617 + 0.25 * 1.3132617))
    assert torch.autograd.gradcheck(
        lambda x: dpo_loss(x, ref.double(), beta=0.3, label_smoothing=0.1)[0],
        logps.double().requires_grad_(),
    )


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected \(n, 2\) both"):
        dpo_loss(torch.zeros(3), torch.zeros(3), beta=0.1)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_loss_and_gradient_are_trls(gamma):
    """TRL's own `_compute_loss` on log-probs that stand in for a model's."""
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DPOTrainer

    n, length = 5, 9
    g = torch.Generator().manual_seed(0)
    per_token = -torch.rand(2 * n, length, generator=g, dtype=torch.float64)
    mask = torch.arange(length) < torch.randint(1, length, (2 * n,), generator=g)[:, None]
    ref = torch.randn(2, n, generator=g, dtype=torch.float64) - 4
    grads, losses = [], []
    leaf = per_token.clone().requires_grad_()
    sums = (leaf * mask).sum(1).view(2, n).T
    ours, _ = dpo_loss(sums, ref.T, beta=0.1)
    total = ours.mean() - gamma * sums[:, 0].sum() / mask[:n].sum()
    losses.append(total.item())
    grads += torch.autograd.grad(total, leaf)

    trainer = object.__new__(DPOTrainer)
    trainer.__dict__.update(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=0.1, use_weighting=False,
        loss_types=["sigmoid", "sft"], loss_weights=[1.0, gamma], label_smoothing=0.0,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(
            device=CPU, gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
    )  # fmt: skip
    leaf = per_token.clone().requires_grad_()
    zeros = torch.zeros(2 * n, length)
    outputs = SimpleNamespace(
        log_probs=leaf * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
        log_sum_sq_probs=zeros,
    )  # fmt: skip
    whole = torch.nn.functional.pad(mask.long(), (1, 0))  # the first token is the prompt's
    inputs = {
        "input_ids": torch.zeros_like(whole), "attention_mask": torch.ones_like(whole),
        "completion_mask": whole, "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1],
    }  # fmt: skip
    total = trainer._compute_loss(lambda **_: outputs, inputs, False)
    losses.append(total.item())
    grads += torch.autograd.grad(total, leaf)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-6)


# ---- steps ---------------------------------------------------------------------------------------

ANSWERS = [("a red box", "blue"), ("7", "a long wrong answer"), ("yes", "no"), ("three", "3.")]


@pytest.fixture(scope="module")
def pairs(processor):
    """One image, two, none, one of another size."""
    samples = [
        make_sample(0, [(112, 112)]),
        make_sample(1, [(56, 84), (112, 56)], "Which one is larger?"),
        make_sample(2, [], "Detect every blue. Think, then answer."),
        make_sample(3, [(84, 84)]),
    ]
    return encode(
        processor,
        *(
            replace(s, columns={**s.columns, "chosen": chosen, "rejected": rejected})
            for s, (chosen, rejected) in zip(samples, ANSWERS, strict=True)
        ),
    )


def state_for(processor, *, lora=False, reference=True, dpo_config=None, **options):
    plain = make_state(processor, config={"beta": 0.0}, **options)
    state = DPOState(**vars(plain), dpo=DPOConfig(**{"dpo_beta": 0.5, **(dpo_config or {})}))
    if lora:
        torch.manual_seed(0)
        policy = Policy(add_lora(load_model("tiny"), r=2, alpha=4, target_modules=["q_proj"]))
        state.policy = policy.train()
        state.engine = PlainEngine(state.policy, state.engine.settings, device=CPU)
        state.reference = state.engine.forward
    elif reference:
        state.reference = make_reference(Policy(load_model("tiny")), state.engine, None)
    return state


def test_first_step_is_the_indifferent_loss_and_training_prefers_the_chosen(processor, pairs):
    state = state_for(processor, prompts_per_microbatch=2, gradient_accumulation_steps=2)
    first, records = dpo.train_step(state, pairs)
    assert records == [] and first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    for _ in range(4):
        last, _ = dpo.train_step(state, pairs)
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0
    assert last["rewards/accuracies"] == 1.0
    for name in ("logps/chosen", "logps/rejected", "nll", "grad_norm", "num_tokens"):
        assert math.isfinite(last[name])


def gradients_of(state, pairs, monkeypatch):
    seen = {}

    def look(learning_rate, *, veto=False):
        grads = {n: p.grad for n, p in state.policy.named_parameters() if p.grad is not None}
        seen.update({name: grad.clone() for name, grad in grads.items()})
        return step(learning_rate, veto=veto)

    step = state.engine.step
    monkeypatch.setattr(state.engine, "step", look)
    metrics, _ = dpo.train_step(state, pairs)
    return metrics, seen


def apart(a, b):
    assert a.keys() == b.keys()
    difference = torch.cat([(a[n] - b[n]).flatten() for n in a])
    return (difference.norm() / torch.cat([x.flatten() for x in b.values()]).norm()).item()


def test_shared_prompt_equals_unshared_and_a_plain_computation(processor, pairs, monkeypatch):
    config = {"dpo_gamma": 0.3, "label_smoothing": 0.1}
    known = {p.sample.index: (-3.0 * i, -2.0) for i, p in enumerate(pairs)}
    results = []
    for sharing, size in (("on", 4), ("off", 1)):
        state = state_for(
            processor, reference=False, policy={"prefix_sharing": sharing}, dpo_config=config,
            prompts_per_microbatch=size, gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        state.ref_logps = known
        results.append(gradients_of(state, pairs, monkeypatch))
    (one, grads), (two, others) = results
    for name in ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "nll"):
        assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-5)
    assert apart(grads, others) <= 1e-5

    model = load_model("tiny")
    policy = Policy(model, prefix_sharing="off")
    sums, nll, tokens = [], 0.0, 0
    for prompt in pairs:
        for number, text in enumerate(dpo.pair_of(prompt.sample)):
            answer = dpo.answer_ids(processor.tokenizer, text)
            inputs = policy.collate([prompt], [[answer]], pad_token_id=0, device=CPU)
            hidden = policy._completion_hidden(inputs, policy.image_features(inputs))
            logps = model.lm_head(hidden).log_softmax(-1).gather(1, answer[:, None])
            sums.append(logps.sum())
            if number == 0:
                nll, tokens = nll - logps.sum(), tokens + len(answer)
    ref = torch.tensor([known[p.sample.index] for p in pairs])
    losses, _ = dpo_loss(torch.stack(sums).view(-1, 2), ref, beta=0.5, label_smoothing=0.1)
    total = losses.mean() + 0.3 * nll / tokens
    total.backward()
    assert one["loss"] == pytest.approx(total.item(), abs=1e-5)
    wanted = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert apart(grads, wanted) <= 1e-5


def test_pairs_stay_together_however_long_they_are(processor, pairs):
    losses = []
    for most in (None, 1, 150):
        state = state_for(processor, max_tokens_per_microbatch=most, prompts_per_microbatch=4)
        for _ in range(2):
            metrics, _ = dpo.train_step(state, pairs)
        losses.append((metrics["loss"], parameters(state.policy)))
    for loss, weights in losses[1:]:
        assert loss == pytest.approx(losses[0][0], abs=1e-4)
        assert largest_difference(weights, losses[0][1]) < 5e-3


def test_reference_by_copy_adapter_off_or_beforehand(processor, pairs):
    copied = state_for(processor, prompts_per_microbatch=4)
    beforehand = state_for(processor, prompts_per_microbatch=4, reference=False)
    table = {p.sample.index: p for p in pairs}
    beforehand.ref_logps, digests = dpo.reference_logps(beforehand, table.get, 4, 3)
    assert all(digests[row] == dpo.pair_digest(table[row].sample) for row in range(4))
    assert sorted(beforehand.ref_logps) == [0, 1, 2, 3]
    runs = [[dpo.train_step(s, pairs)[0]["loss"] for _ in range(3)] for s in (copied, beforehand)]
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    adapter = state_for(processor, lora=True, prompts_per_microbatch=4)
    losses = [dpo.train_step(adapter, pairs)[0]["loss"] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]


@pytest.mark.parametrize("lora", [True, False])
def test_a_frozen_tower_runs_once_for_policy_and_reference(processor, pairs, monkeypatch, lora):
    def state():
        made = state_for(processor, lora=lora, prompts_per_microbatch=4)
        if not lora:
            freeze_vision_tower(made.policy.model)
        made.policy.vision_frozen = True  # set where a policy is made, here before it was frozen
        made.reference = watched(made.reference)
        return made

    def watched(reference):
        def call(inputs, **options):
            own.append(options.get("image_features"))
            return reference(inputs, **options)

        return call

    own: list = []
    counted, calls = state(), []
    hook = core(counted.policy.model).visual.register_forward_hook(lambda *_: calls.append(1))
    metrics, grads = gradients_of(counted, pairs, monkeypatch)
    hook.remove()
    assert len(calls) == 1 and own[0] is not None
    apart_from = state()
    monkeypatch.setattr(apart_from.engine, "zero_stage", 3)  # there each computes its own
    others, wanted = gradients_of(apart_from, pairs, monkeypatch)
    assert own[1] is None and metrics["loss"] == others["loss"]
    assert apart(grads, wanted) == 0.0


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """TRL's form: images, a prompt, chosen and rejected, as chats; train and test."""
    import datasets

    from virft_fast.data.demo import build_demo

    folder = tmp_path_factory.mktemp("preferences")
    digits = build_demo("digits_classification", folder / "digits", num_train=12, num_test=6)

    def row(example):
        chosen = example["solution"] + " Yes." * (len(example["problem"]) % 3)  # of any length
        wrong = next(w for w in ("zero", "one") if w not in chosen.lower())
        chat = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
        return {
            "images": [example["image"]],
            "prompt": [{"role": "user", "content": example["problem"]}],
            "chosen": chat(chosen),
            "rejected": chat(f"<answer>{wrong}</answer>"),
        }

    rows = {
        name: datasets.Dataset.from_list([row(example) for example in split]).cast_column(
            "images", datasets.List(datasets.Image())
        )
        for name, split in digits.items()
    }
    datasets.DatasetDict(rows).save_to_disk(str(folder / "set"))
    return folder / "set"


def arguments(preferences, out, *more):
    return [
        "--algorithm", "dpo", "--dataset_name", str(preferences), "--output_dir", str(out),
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--learning_rate", "5e-4", "--lr_scheduler_type", "constant", "--save_steps", "2",
        "--eval_samples", "6", *more,
    ]  # fmt: skip


def losses_of(folder):
    return [(r["loss"], r["grad_norm"]) for r in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    "more",
    [(), ("--precompute_ref_log_probs",), ("--use_peft", "--gradient_checkpointing")],
    ids=["copy", "beforehand", "adapter"],
)
def test_run_and_resume_bit_for_bit(preferences, tmp_path, capsys, more):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(arguments(preferences, whole, "--max_steps", "4", *more)) == 0
    shown = capsys.readouterr().out
    assert "held-out pairs, 6 samples" in shown and "logps/accuracies" in shown
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["after"]["rewards/margins"] > 0 and (whole / "report.png").is_file()
    assert main(arguments(preferences, halves, "--max_steps", "2", *more)) == 0
    again = ["--max_steps", "4", "--resume_from_checkpoint", "latest"]
    assert main(arguments(preferences, halves, *again, *more)) == 0
    assert losses_of(whole) == losses_of(halves)
    assert losses_of(whole)[0][0] == pytest.approx(math.log(2), abs=1e-5)


TWO_RANKS = {
    "plain": (None, ()), "zero0": (0, ()), "zero2-adapter": (2, ("--use_peft", "--lora_r", "4")),
    "zero3": (3, ()), "zero3-adapter": (3, ("--use_peft",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks_folder(preferences, tmp_path_factory):
    """Runs of one rank, by their flags, and of two ranks, by the names in TWO_RANKS."""
    folder, runs = tmp_path_factory.mktemp("ranks"), []
    # All held-out rows are of one batch, so that the other rank has none.
    common = ["--max_steps", "2", "--dpo_gamma", "0.2", "--save_steps", "0", "--eval_samples", "5"]
    for more in {more for _, more in TWO_RANKS.values()}:
        assert main(arguments(preferences, folder / f"one{''.join(more)}", *common, *more)) == 0
    for name, (stage, more) in TWO_RANKS.items():
        argv = arguments(preferences, folder / name, *common, *more)
        if stage is not None:
            zero = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
            (folder / f"{stage}.json").write_text(json.dumps(zero))
            argv += ["--deepspeed", str(folder / f"{stage}.json")]
        argv[argv.index("--gradient_accumulation_steps") + 1] = "1"
        runs.append(argv)
    (folder / "runs.json").write_text(json.dumps(runs))
    done = run(folder / "runs.json", module="two_stages", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_equal_one(ranks_folder, name):
    one, two = ranks_folder / f"one{''.join(TWO_RANKS[name][1])}", ranks_folder / name
    for a, b in zip(losses_of(one), losses_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    after = [json.loads((f / "summary.json").read_text())["after"] for f in (one, two)]
    assert after[0] == pytest.approx(after[1], rel=1e-3, abs=1e-4)


def test_the_reference_beforehand_outlives_an_overwritten_run_and_knows_its_limits(
    preferences, tmp_path, capsys
):
    out = tmp_path / "out"
    first = arguments(preferences, out, "--max_steps", "2", "--precompute_ref_log_probs")
    assert main(first) == 0
    assert main([*first, "--overwrite_output_dir"]) == 0
    again = [*first, "--resume_from_checkpoint", "latest", "--eval_samples", "3"]
    again[again.index("--max_steps") + 1] = "3"
    assert main(again) == 0
    capsys.readouterr()
    assert main([*again, "--max_completion_length", "99"]) == 2
    assert "it was made with" in capsys.readouterr().err


def test_rows_that_changed_since_their_reference_was_computed_are_left_out(tmp_path, caplog):
    """One was missing its image then, another has another answer now."""
    from virft_fast.data.demo import build_demo

    images = build_demo("digits_classification", tmp_path / "digits", num_train=4, num_test=1)
    rows = []
    for number in range(4):
        images["train"][number]["image"].save(tmp_path / f"{number}.png")
        rows.append({"images": [f"{number}.png"], "prompt": "Which digit?", "chosen": "three",
                     "rejected": f"no {number}"})  # fmt: skip
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(rows))
    (tmp_path / "2.png").rename(tmp_path / "away.png")
    argv = ["--algorithm", "dpo", "--dataset_name", str(data), "--output_dir",
            str(tmp_path / "out"), "--precompute_ref_log_probs", "--save_steps", "1",
            "--per_device_train_batch_size", "1"]  # fmt: skip
    assert main([*argv, "--max_steps", "1"]) == 0
    (tmp_path / "away.png").rename(tmp_path / "2.png")
    rows[1]["rejected"] = "another"
    data.write_text(json.dumps(rows))
    caplog.clear()
    again = ["--max_steps", "6", "--resume_from_checkpoint", "latest"]
    assert main([*argv, *again]) == 0
    assert "row 1: it has changed since the reference's log-probs were computed" in caplog.text
    assert "row 2: it could not be used when" in caplog.text


def test_other_weights_under_the_reference_are_refused_on_resume(
    preferences, tmp_path, capsys, monkeypatch
):
    import shutil

    from safetensors.torch import load_file, save_file

    from virft_fast.models.tiny import TINY_PATH

    model = tmp_path / "model"
    shutil.copytree(TINY_PATH, model)
    common = ("--model_name_or_path", str(model))
    argv = arguments(preferences, tmp_path / "out", *common)
    (weights,) = model.glob("*.safetensors")
    shutil.copy(weights, tmp_path / "kept")
    step = dpo.train_step

    def replace_them_meanwhile(*given):
        save_file({k: v * 1.1 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        return step(*given)

    with monkeypatch.context() as patch:  # they are stamped when the run begins
        patch.setattr(dpo.ALGORITHM, "step", replace_them_meanwhile)
        assert main([*argv, "--max_steps", "2"]) == 0
    again = [*argv, "--max_steps", "3", "--resume_from_checkpoint", "latest"]
    assert main(again) == 2
    assert "as they were when the run began" in capsys.readouterr().err
    shutil.copy(tmp_path / "kept", weights)  # a copy is the same
    assert main(again) == 0


def test_held_out_pairs_are_counted_as_they_are_used(tmp_path, capsys, caplog):
    import datasets

    def rows(*rejected):
        return datasets.Dataset.from_list(
            [{"prompt": "Which?", "chosen": "a", "rejected": text} for text in rejected]
        )

    good, bad = rows("b", "c"), rows("a", "a")
    argv = ["--algorithm", "dpo", "--max_steps", "1", "--eval_samples", "3"]
    for name, test in (("some", rows("b", "a", "a")), ("none", bad)):
        datasets.DatasetDict({"train": good, "test": test}).save_to_disk(tmp_path / name)
        out = [
            "--dataset_name",
            str(tmp_path / name),
            "--output_dir",
            str(tmp_path / f"{name}-out"),
        ]
        status = main([*argv, *out])
        if name == "some":
            assert status == 0 and "held-out pairs, 1 samples" in capsys.readouterr().out
            assert "left out row 1: chosen and rejected are the same answer" in caplog.text
        else:
            assert status == 2  # before the model is loaded
            assert "expected at least one usable row of 2, got none" in capsys.readouterr().err


def test_flags_of_grpo_are_not_swallowed(preferences, tmp_path, capsys, caplog):
    argv = ["--algorithm", "dpo", "--dataset_name", str(preferences), "--dry_run"]
    assert main([*argv, "--beta", "0.9"]) == 2
    assert "pass --dpo_beta 0.9" in capsys.readouterr().err
    caplog.clear()
    assert main([*argv, "--temperature", "0.5", "--num_generations", "4"]) == 0
    assert "without effect on --algorithm dpo: --num_generations, --temperature" in caplog.text
    shown = capsys.readouterr().out
    assert "chosen: " in shown and "rejected: " in shown and "0 problems" in shown


def test_an_adapter_begins_the_same_in_every_run(preferences, tmp_path):
    runs = []
    for name in ("one", "two"):
        torch.manual_seed(len(runs))  # as whatever ran before may leave it
        out = tmp_path / name
        assert main(arguments(preferences, out, "--max_steps", "1", "--use_peft")) == 0
        runs.append(losses_of(out))
    assert runs[0] == runs[1]


def test_rows_that_prefer_nothing_are_named(processor):
    rows = [
        {"prompt": "Which?", "chosen": "a", "rejected": "a"},
        {"prompt": "Which?", "chosen": "a", "rejected": ""},
        {"prompt": "Which?", "chosen": "a", "rejected": "a b c d e f g"},
        {"prompt": "Which?", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "Which?", "chosen": "a", "rejected": "b<|image_pad|>"},
        {"prompt": "Which?", "chosen": None, "rejected": "b"},
        {"prompt": "Which?", "chosen": "a", "rejected": "b", "problem": "x", "solution": ""},
    ]
    samples = SampleDataset(rows)
    found = [dpo.check_pair(processor.tokenizer, 6, samples.get(i)) for i in range(5)]
    assert "chosen: expected an answer" in samples.get(5).reason
    assert samples.get(6).messages[-1]["content"][-1]["text"] == "Which?"
    assert samples.get(6).solution == "a" and "special token <|image_pad|>" in found[4]
    assert "the same answer" in found[0] and "rejected: expected an answer" in found[1]
    assert "more than --max_completion_length 6" in found[2] and found[3] is None


def test_a_data_set_without_pairs_is_refused(tmp_path, capsys):
    argv = ["--algorithm", "dpo", "--dataset_name", "digits_classification"]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert "expected the columns chosen and rejected" in capsys.readouterr().err
