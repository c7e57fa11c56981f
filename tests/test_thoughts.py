"""Chat templates that open a thought at the end of the prompt, as Qwen3.5's does."""

from __future__ import annotations

import json

import pytest
import torch
from family_models import write_family
from helpers import make_prompts, make_sample, read_jsonl

from virft_fast import evaluate, train
from virft_fast.algorithms.sft import given_answers
from virft_fast.models.processing import load_processor
from virft_fast.rollout.sampling import make_rollouts
from virft_fast.tasks.rewards import format_reward

# At the end of the generation prompt: open, or closed at once if thinking is switched off.
THOUGHT = (
    "{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
OFF = "{% set enable_thinking = false %}"
SAID = "It is round.\n</think>\n<answer>ball</answer>"


def prompt_of(before="", after=""):
    processor = load_processor("tiny")
    processor.chat_template = before + processor.chat_template + after
    (prompt,) = make_prompts(processor, make_sample(0))
    return processor.tokenizer, prompt


@pytest.mark.parametrize(
    ("before", "after", "opened"),
    [("", "", ""), ("", THOUGHT, "<think>\n"), (OFF, THOUGHT, "")],
)
def test_a_completion_is_scored_with_the_tag_that_its_prompt_opens(before, after, opened):
    tokenizer, prompt = prompt_of(before, after)
    rows = [tokenizer(text).input_ids for text in (SAID, "<think>" + SAID)]
    longest = max(map(len, rows)) + 1
    end = tokenizer.eos_token_id
    tokens = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    out = make_rollouts([prompt], 2, tokens, torch.zeros(tokens.shape), [end], tokenizer, None)
    assert out.texts == (opened + SAID, f"{opened}<think>{SAID}")
    assert out.completion_ids[out.completion_mask].tolist() == [*rows[0], end, *rows[1], end]
    assert format_reward(completions=list(out.texts))[0] == float(bool(opened))
    assert format_reward(completions=[out.texts[1]]) == [1.0]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("<think>\nRound.\n</think>\n\n<answer>ball</answer>",) * 2,
        ("<think>Round.</think><answer>ball</answer>",
         "<think>\nRound.</think><answer>ball</answer>"),
        ("<think>\n\n</think>\n\nball",) * 2,
        ("\n<think>\nRound.</think>ball", "<think>\nRound.</think>ball"),
        # It continues the thought itself, as recorded completions do.
        ("Round.\n</think>\n\nball", "<think>\nRound.\n</think>\n\nball"),
        # As with thinking switched off.
        ("ball", "<think>\n\n</think>\n\nball"),
    ],
)  # fmt: skip
def test_an_answer_to_learn_continues_the_opened_thought(answer, read):
    """SFT and DPO never show the model two opening tags, nor an answer within the thought."""
    tokenizer, prompt = prompt_of(after=THOUGHT)
    given = given_answers(tokenizer, [prompt], [[answer]])
    ids = torch.cat([prompt.input_ids[-20:], given.completion_ids[0]])
    text = tokenizer.decode(ids)
    assert text.endswith(f"<|im_start|>assistant\n{read}<|im_end|>")
    _, plain = prompt_of()
    assert plain.continued(answer) == answer


def test_runs_of_a_thinking_model(tmp_path, digits, capsys):
    """SFT, GRPO, DPO and an evaluation of InternVL; what is recorded of completions is what the
    rewards got, so that scoring them again gives the same."""
    folder = write_family("internvl", tmp_path / "base")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + THOUGHT)
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"Which, {n}?", "chosen": "<think>a</think>b", "rejected": "c"}
             for n in range(4)]  # fmt: skip
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    model = folder
    for algorithm, data in (("sft", digits), ("dpo", rows), ("grpo", digits)):
        out = tmp_path / algorithm
        argv = ["--algorithm", algorithm, "--model_name_or_path", model, "--output_dir", out,
                "--dataset_name", data, "--per_device_train_batch_size", 2, "--max_steps", 2,
                "--max_completion_length", 24, "--logging_steps", 1]  # fmt: skip
        argv += ["--report_to", "none"]
        argv += ["--num_generations", 2] if algorithm == "grpo" else []
        assert train.main([*map(str, argv)]) == 0, capsys.readouterr().err[-3000:]
        assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == [1, 2]
        model = out
    result = tmp_path / "answers.jsonl"
    argv = ["--model_name_or_path", model, "--dataset_name", digits, "--split", "test",
            "--output", result, "--max_completion_length", 6]  # fmt: skip
    assert evaluate.main([*map(str, argv)]) == 0, capsys.readouterr().err[-3000:]
    for path, count in ((model / "completions.jsonl", 8), (result, 8)):
        records = read_jsonl(path)
        assert len(records) == count
        for record in records:
            assert record["prompt"].endswith("<|im_start|>assistant\n<think>\n")
            assert record["completion"].startswith("<think>\n")
    before = read_jsonl(result)
    assert evaluate.main([*map(str, argv), "--reward_funcs", "format", "accuracy"]) == 0
    after = read_jsonl(result)
    assert [r["completion"] for r in before] == [r["completion"] for r in after]
    assert {"format", "accuracy"} == set(after[0]["rewards"])
