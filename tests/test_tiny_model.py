"""The embedded checkpoint and its processor: a normal, small Qwen2-VL folder."""

from __future__ import annotations

import itertools
import json
import runpy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, make_prompts, make_sample
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from virft_fast.batch import Sample
from virft_fast.data.demo import digit_glyphs, digits, shapes
from virft_fast.models.processing import ImageOnlyQwen2VLProcessor, load_processor
from virft_fast.models.qwen_vl import Policy, load_model
from virft_fast.models.tiny import TINY_PATH, resolve_model_path
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import make_rollout
from virft_fast.tasks import REWARDS

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "scripts/make_tiny_model.py")
made = runpy.run_path(SCRIPT, run_name="make_tiny_model")
SPECIAL_TOKENS, TAGS = made["SPECIAL_TOKENS"], made["TAGS"]

# The template of Qwen2-VL-2B-Instruct, without its video branch and its image numbering. The
# embedded model's differs in one thing only: it adds no default system prompt.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(TINY_PATH, dtype=torch.float32)


def test_tiny_is_a_name_for_the_folder():
    assert resolve_model_path("tiny") == str(TINY_PATH)
    assert resolve_model_path("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"


def test_the_folder_is_small_and_documented():
    sizes = {path.name: path.stat().st_size for path in TINY_PATH.iterdir()}
    assert sum(sizes.values()) < 5_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= sizes.keys()


def test_it_is_transformers_own_class(model):
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert 1_400_000 < sum(p.numel() for p in model.parameters()) < 1_700_000
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_weights_are_stored_in_bfloat16():
    config = json.loads((TINY_PATH / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert AutoModelForImageTextToText.from_pretrained(TINY_PATH, dtype="auto").dtype == (
        torch.bfloat16
    )


def test_nothing_in_it_narrows_sampling():
    config = json.loads((TINY_PATH / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "top_k", "repetition_penalty"} & config.keys()


def test_special_tokens_are_qwens_and_agree_with_the_config(model, processor):
    tokenizer = processor.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert all(tokenizer(token).input_ids == [i] for token, i in ids.items())
    config = model.config
    assert config.image_token_id == processor.image_token_id == ids["<|image_pad|>"]
    assert config.video_token_id == processor.video_token_id == ids["<|video_pad|>"]
    assert config.vision_start_token_id == ids["<|vision_start|>"]
    assert config.vision_end_token_id == ids["<|vision_end|>"]
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert config.text_config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) <= config.text_config.vocab_size


def test_tags_survive_decoding_without_special_tokens(processor):
    text = "".join(TAGS)
    ids = processor.tokenizer(text).input_ids
    assert len(ids) == len(TAGS)
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_coordinates_are_one_token_each(processor):
    tokenizer = processor.tokenizer
    for number in range(0, 1001, 10):
        assert len(tokenizer(str(number)).input_ids) == 1
        # "[0", ", n", ...: a number after a comma takes its space along.
        assert len(tokenizer(f", {number},").input_ids) == 3


@pytest.mark.parametrize(
    "text", ["[{'Position': [1, 22, 333], 'x': 0.9}]", "你好, naïve 🙂\n\n  x"]
)
def test_any_text_survives_a_round_trip(processor, text):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_is_qwens_but_for_the_system_prompt(processor):
    tokenizer = AutoTokenizer.from_pretrained(TINY_PATH)
    parts = [{"type": "image"}, {"type": "image_url", "image_url": "x"}, {"type": "text"}]
    parts[2]["text"] = "Hi"
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes"}]
    system = [{"role": "system", "content": "Be brief."}]
    for messages in (system + chat, system + chat[:1]):
        for prompt in (True, False):
            ours = processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            qwens = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, chat_template=QWEN_TEMPLATE
            )
            assert ours == qwens
    assert processor.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>user\n")


def test_image_tokens_follow_the_image_size(processor):
    (prompt,) = make_prompts(processor, make_sample(0, [(112, 84)]))
    assert prompt.image_grid_thw.tolist() == [[1, 8, 6]]
    assert int(prompt.mm_token_type_ids.sum()) == 8 * 6 // 4
    assert prompt.pixel_values.shape == (48, 3 * 2 * 14 * 14)


def test_a_saved_processor_is_the_stock_class_to_others_and_loads_here(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert "ImageOnly" not in path.read_text()
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["processor_class"] == "Qwen2VLProcessor"
    again = load_processor(str(tmp_path))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3)).astype("u1"))
    text = "<|vision_start|><|image_pad|><|vision_end|>Detect"
    first, second = (
        p(text=[text], images=[image], return_tensors="pt") for p in (processor, again)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert again.chat_template == processor.chat_template


def test_without_torchvision_the_video_half_is_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(load_processor("tiny"), ImageOnlyQwen2VLProcessor)


def test_a_chat_template_in_qwens_own_file_is_found(processor, tmp_path):
    """Qwen2-VL's checkpoints on the hub have chat_template.json and preprocessor_config.json."""
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}))
    assert load_processor(str(tmp_path)).chat_template == QWEN_TEMPLATE


def test_pixel_bounds_override_the_checkpoints():
    size = load_processor("tiny", max_pixels=20_000).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (56 * 56, 20_000)
    with pytest.raises(ValueError, match="min_pixels <= max_pixels, got 3136 and 784"):
        load_processor("tiny", max_pixels=784)


def test_a_missing_processor_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder.*check the spelling"):
        load_processor(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="a folder without them"):
        load_processor(str(tmp_path))


def test_a_text_only_tokenizer_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for path in tmp_path.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<|image_pad|>", "<|other_pad|>"))
    with pytest.raises(ValueError, match="is it a text-only model"):
        load_processor(str(tmp_path))


def prompts_of(processor, rows):
    samples = []
    for index, row in enumerate(rows):
        content = [{"type": "image"}, {"type": "text", "text": row["problem"]}]
        message = {"role": "user", "content": content}
        samples.append(Sample(index, (message,), (row["image"],), row["solution"]))
    return make_prompts(processor, *samples)


def greedy_reward(processor, rows, name):
    policy = Policy(load_model("tiny"))
    rollout = make_rollout("native", lambda: nullcontext(policy), processor.tokenizer, device=CPU)
    texts = rollout.generate(prompts_of(processor, rows), 1, Sampling(48, greedy=True)).texts
    values = REWARDS[name](completions=texts, solution=[row["solution"] for row in rows])
    return sum(values) / len(values)


def test_the_warm_start_is_miscalibrated_but_not_ignorant(processor):
    """Room for GRPO: far from nothing, far from what the clean model reached (see its README)."""
    boxes = list(itertools.islice(shapes(21), 32))
    assert 0.12 < greedy_reward(processor, boxes, "accuracy_iou") < 0.5
    assert greedy_reward(processor, boxes, "format") > 0.9
    words = list(itertools.islice(digits(21, digit_glyphs()["test"]), 128))
    assert 0.3 < greedy_reward(processor, words, "accuracy") < 0.8  # clean: 0.94


def test_its_maker_runs(tmp_path, monkeypatch, capsys):
    """All three stages on a handful of images: what comes out loads and is no copy of the start."""
    argv = [SCRIPT, "--out", str(tmp_path / "blurred"),
            "--clean_out", str(tmp_path / "clean"),
            "--steps", "2", "--more_steps", "1", "--blur_steps", "2",
            "--max_examples", "8"]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(SCRIPT, run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert ended.value.code == 0 and "saved " in capsys.readouterr().out
    blurred, clean = (load_model(str(tmp_path / name)) for name in ("blurred", "clean"))
    assert [p.shape for p in blurred.parameters()] == [p.shape for p in clean.parameters()]
    assert not torch.equal(blurred.lm_head.weight, clean.lm_head.weight)
    assert load_processor(str(tmp_path / "blurred")).tokenizer.eos_token == "<|im_end|>"
