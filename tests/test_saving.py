"""What a saved folder holds, by the rules of the programs that read it.

Versions of transformers other than the installed one, and torchvision, come from folders that
environment variables name; CONTRIBUTING.md says how to make them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import FAMILIES, random_model
from safetensors import safe_open

from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import add_lora, load_model
from virft_fast.models.saving import save_model
from virft_fast.models.tiny import TINY_PATH

SITES = {
    "4.57": "VIRFT_TRANSFORMERS_457_SITE",
    "4.49": "VIRFT_TRANSFORMERS_449_SITE",
    "torchvision": "VIRFT_TORCHVISION_SITE",
}


def write(source, folder, **processor):
    model = load_model(str(source))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    save_model(model, weights, load_processor(str(source), **processor), folder)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write("tiny", tmp_path_factory.mktemp("saved") / "model")


def python(site, script, *argv):
    """The last line that a script prints where a folder of packages comes first."""
    folder = os.environ.get(SITES[site]) if site else None
    if site and not folder:
        pytest.skip(f"{SITES[site]} names no folder")
    path = os.pathsep.join(filter(None, [folder, str(Path(__file__).parent.parent)]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, argv)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


# ---- what loaders read ---------------------------------------------------------------------------


def test_the_configuration_is_the_released_one_with_the_new_keys(saved):
    """vLLM and SGLang take the model from `architectures` and the rotary sections from
    `rope_scaling`; llama.cpp's converter reads the language model's sizes at the top level."""
    config = read(saved, "config.json")
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert config["model_type"] == "qwen2_vl" and "text_config" not in config
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [2, 7, 7]}
    assert config["rope_parameters"]["mrope_section"] == [2, 7, 7]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 20.0
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == config["torch_dtype"] == "float32"
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings",
             "image_token_id", "vision_start_token_id", "vision_end_token_id")  # fmt: skip
    assert set(sizes) <= set(config)
    vision = config["vision_config"]
    assert {"depth", "embed_dim", "num_heads", "mlp_ratio", "patch_size", "spatial_merge_size",
            "temporal_patch_size", "hidden_size"} <= set(vision)  # fmt: skip


def test_images_and_videos_are_configured_in_both_layouts(saved):
    image = read(saved, "preprocessor_config.json")
    assert image["image_processor_type"] == "Qwen2VLImageProcessor"
    assert image["processor_class"] == "Qwen2VLProcessor"
    assert (image["min_pixels"], image["max_pixels"]) == (56 * 56, 168 * 168)
    assert image["size"] == {"shortest_edge": 56 * 56, "longest_edge": 168 * 168}
    assert {"patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"} <= set(
        image
    )
    video = read(saved, "video_preprocessor_config.json")
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert read(saved, "processor_config.json")["video_processor"] == video


def test_the_tokenizer_is_readable_by_old_and_new_versions(saved):
    config = read(saved, "tokenizer_config.json")
    assert isinstance(config.get("extra_special_tokens", {}), dict)  # 4.x fails on a list
    assert config["eos_token"] == "<|im_end|>" and config["pad_token"] == "<|endoftext|>"
    by_id = {int(key): token["content"] for key, token in config["added_tokens_decoder"].items()}
    tokens = read(saved, "tokenizer.json")["added_tokens"]
    assert by_id == {token["id"]: token["content"] for token in tokens}
    template = (saved / "chat_template.jinja").read_text()
    assert read(saved, "chat_template.json")["chat_template"] == template
    assert config["chat_template"] == template


def test_weights_have_the_released_names(saved):
    with safe_open(saved / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.metadata()["format"] == "pt"
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert any(name.startswith("visual.blocks.0.") for name in names)
    assert all(name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "visual."))
               for name in names)  # fmt: skip


# ---- copies --------------------------------------------------------------------------------------


def test_saving_what_was_saved_changes_no_file(saved, tmp_path):
    again = write(saved, tmp_path / "again")
    first = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert first == {path.name: path.read_bytes() for path in again.iterdir()}


def test_files_of_the_base_are_copied_and_code_and_weights_are_not(saved, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in saved.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    kept = {
        "LICENSE": b"Apache",
        "vocab.json": b"{}",
        "merges.txt": b"#version",
        "odd.json": b"[1]",
    }
    dropped = ("modeling.py", "old.bin", "adapter_config.txt", ".hidden", "trainer_state.json")
    for name in (*kept, *dropped):
        (base / name).write_bytes(kept.get(name, b"x"))
    out = write(base, tmp_path / "out")
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert not [name for name in dropped if (out / name).exists()]


def test_bounds_of_a_run_are_saved_for_every_version(tmp_path):
    out = write("tiny", tmp_path / "out", min_pixels=6272, max_pixels=12544)
    image = read(out, "preprocessor_config.json")
    assert (image["min_pixels"], image["max_pixels"]) == (6272, 12544)
    assert image["size"] == {"shortest_edge": 6272, "longest_edge": 12544}
    assert dict(load_processor(str(out)).image_processor.size) == image["size"]


def test_an_adapter_has_a_processor_and_nothing_that_looks_like_a_model(tmp_path):
    model = add_lora(load_model("tiny"), r=2, alpha=4, target_modules=["q_proj"])
    weights = {n: w.detach() for n, w in model.named_parameters() if "lora_" in n}
    save_model(model, weights, load_processor("tiny"), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "tokenizer.json", "preprocessor_config.json"} <= names
    assert not names & {"config.json", "model.safetensors", "generation_config.json"}


# ---- other versions ------------------------------------------------------------------------------

FORWARD = """
import sys, torch, transformers
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": [{"type": "text", "text": "Detect every red."}]}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=4)
print(transformers.__version__, ids[0].tolist(), out[0, ids.shape[1]:].tolist(),
      [round(float(x), 3) for x in logits[0, -1, :8]])
"""


@pytest.mark.parametrize("version", ["4.57", "4.49"])
def test_older_versions_compute_the_same(saved, version):
    theirs, ours = python(version, FORWARD, saved), python(None, FORWARD, saved)
    assert theirs.startswith(version) and not ours.startswith(version)
    assert theirs.split(" ", 1)[1] == ours.split(" ", 1)[1]


PROCESSORS = """
import sys, torch
from PIL import Image
import transformers
from transformers import AutoImageProcessor, AutoProcessor, Qwen2VLProcessor
folder = sys.argv[1]
import torchvision
made = [AutoProcessor.from_pretrained(folder), Qwen2VLProcessor.from_pretrained(folder)]
AutoImageProcessor.from_pretrained(folder)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
for processor in made:
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (112, 84))], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 6, 8]], batch["image_grid_thw"]
model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder)
out = model.generate(**batch, max_new_tokens=3, do_sample=False)
pipe = transformers.pipeline("image-text-to-text", model=folder)
from virft_fast.models.processing import load_processor
assert type(load_processor(folder)).__name__ == "ImageOnlyQwen2VLProcessor"
print("good", type(made[0]).__name__)
"""


@pytest.mark.parametrize("source", ["saved", "tiny"])
def test_stock_processors_load_it_where_torchvision_is(saved, source):
    folder = saved if source == "saved" else TINY_PATH
    assert python("torchvision", PROCESSORS, folder) == "good Qwen2VLProcessor"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_is_saved_and_saved_again(family, tmp_path):
    """Only some families' weights have other names in memory; transformers empties the dict of
    weights of the others while it writes them."""
    processor = load_processor("tiny")
    model = random_model(family, processor.tokenizer)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    save_model(model, weights, processor, tmp_path / "first")
    config = read(tmp_path / "first", "config.json")
    assert config["model_type"] == family and config["torch_dtype"] == "float32"
    assert ("text_config" in config) == (family == "qwen3_vl")
    write(tmp_path / "first", tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second
    loaded = load_model(str(tmp_path / "second")).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_the_weights_are_as_saved(saved):
    ours, theirs = load_model("tiny").state_dict(), load_model(str(saved)).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
