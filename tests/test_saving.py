"""What a saved folder holds, by the rules of the programs that read it.

Versions of transformers other than the installed one, and torchvision, come from folders that
environment variables name; CONTRIBUTING.md says how to make them.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import read_saved
import torch
from models import FAMILIES, random_model
from saved_layout import check_saved, read
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import add_lora, load_model
from virft_fast.models.saving import save_model
from virft_fast.models.source import find_model
from virft_fast.models.tiny import TINY_PATH

SITES = {
    "4.57": "VIRFT_TRANSFORMERS_457_SITE",
    "4.49": "VIRFT_TRANSFORMERS_449_SITE",
    "torchvision": "VIRFT_TORCHVISION_SITE",
}


def save(model, folder, processor, dtype=torch.float32):
    weights = {name: weight.detach().to(dtype) for name, weight in model.named_parameters()}
    save_model(model, weights, processor, folder)
    return folder


def write(source, folder, **processor):
    return save(load_model(str(source)), folder, load_processor(str(source), **processor))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write("tiny", tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def families(tmp_path_factory, processor):
    """Small random models of each family."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("families") / family
        made[family] = save(random_model(family, processor.tokenizer), folder, processor)
    return made


# ---- what loaders read ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_has_the_released_layout(families, family):
    assert check_saved(families[family]) == family


def test_the_embedded_model_has_the_released_layout(saved):
    assert check_saved(saved) == check_saved(TINY_PATH) == "qwen2_vl"


def test_a_model_in_shards_has_the_released_layout(families, tmp_path, processor, monkeypatch):
    model = load_model(str(families["qwen2_5_vl"]))
    shards = functools.partial(type(model).save_pretrained, model, max_shard_size="300KB")
    monkeypatch.setattr(model, "save_pretrained", shards)
    save(model, tmp_path, processor, torch.bfloat16)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert check_saved(tmp_path) == "qwen2_5_vl"


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


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = add_lora(load_model("tiny"), r=2, alpha=4, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05, generator=generator)
    weights = {n: w.detach() for n, w in model.named_parameters() if "lora_" in n}
    folder = tmp_path_factory.mktemp("adapter") / "model"
    save_model(model, weights, load_processor("tiny"), folder)
    return folder


def test_an_adapter_has_a_processor_and_nothing_that_looks_like_a_model(adapter):
    assert check_saved(adapter) == "qwen2_vl"


def test_peft_alone_loads_an_adapter_on_its_base(adapter):
    from peft import AutoPeftModel

    model = AutoPeftModel.from_pretrained(adapter, dtype=torch.float32).eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        theirs, ours = (m(input_ids=ids).logits for m in (model, load_model(str(adapter)).eval()))
        plain = load_model("tiny").eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("config", [False, True], ids=["adapter", "and config.json"])
def test_the_hub_id_of_an_adapter_is_refused_as_what_it_is(adapter, tmp_path, monkeypatch, config):
    """Some authors leave the base model's config.json in the repository."""
    name, commit = f"someone/{tmp_path.name}", "a" * 40
    cache = tmp_path / f"models--{name.replace('/', '--')}"
    shutil.copytree(adapter, cache / "snapshots" / commit)
    if config:
        shutil.copy(TINY_PATH / "config.json", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load in (find_model, load_model, load_processor):
        with pytest.raises(ValueError, match=f"got the hub id of an adapter, {name}; download it"):
            load(name)


# ---- vocabularies --------------------------------------------------------------------------------


def embedded_vocabulary():
    """Token -> id and the merges of the embedded model, as vocab.json and merges.txt hold them."""
    model = read(TINY_PATH, "tokenizer.json")["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@functools.cache
def qwen_vocabulary():
    """Qwen's own, which the package dashscope has as token -> rank: what a token was merged from is
    what the better-ranked merges leave of it."""
    package = importlib.util.find_spec("dashscope")
    if package is None:
        pytest.skip("dashscope, which has Qwen's vocabulary, is not installed")
    lines = (Path(package.origin).parent / "resources" / "qwen.tiktoken").read_bytes().split(b"\n")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(shown))
    character = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    merges = []
    for token in ranks:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            first = pairs.index(min(pairs))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        merges += [tuple(parts)] if len(parts) == 2 else []
    text = lambda token: "".join(character[byte] for byte in token)  # noqa: E731
    return {text(t): rank for t, rank in ranks.items()}, [(text(a), text(b)) for a, b in merges]


@pytest.mark.parametrize("fast", [True, False], ids=["tokenizer.json", "slow files alone"])
@pytest.mark.parametrize("vocabulary", [embedded_vocabulary, qwen_vocabulary],
                         ids=["embedded", "Qwen's"])  # fmt: skip
def test_a_base_with_a_vocabulary_file_keeps_it_and_tokenizes_equally(tmp_path, vocabulary, fast):
    """A folder as Qwen released it: vocab.json and merges.txt, with and without tokenizer.json."""
    vocab, merges = vocabulary()
    base = tmp_path / "base"
    base.mkdir()
    (base / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (base / "merges.txt").write_text(f"#version: 0.2\n{lines}")
    settings = read(TINY_PATH, "tokenizer_config.json")
    special = [token for token in settings["added_tokens_decoder"].values() if token["special"]]
    added = {str(len(vocab) + i): token for i, token in enumerate(special)}
    settings = {"add_prefix_space": False, "added_tokens_decoder": added, "bos_token": None,
                "chat_template": settings["chat_template"], "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer",
                "additional_special_tokens": [token["content"] for token in special]}  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(TINY_PATH / "preprocessor_config.json", base)
    theirs = AutoTokenizer.from_pretrained(base)
    if fast:
        theirs.backend_tokenizer.save(str(base / "tokenizer.json"))
    out = tmp_path / "out"
    load_processor(str(base)).save_pretrained(out)
    for path in base.iterdir():
        if path.name != "preprocessor_config.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    ours = AutoTokenizer.from_pretrained(out)
    stored = Tokenizer.from_file(str(out / "tokenizer.json"))
    plain = Tokenizer(BPE.from_file(str(out / "vocab.json"), str(out / "merges.txt")))
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    for text in (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Detect.<|im_end|>\n",
        "<think>It's [12, 340]: 3.14 %</think>\n\n  <answer>naïve café</answer><|box_start|>",
        "这是什么？हिन्दी \U0001f600 \u00e9 e\u0301\t\r\n",
    ):
        ids = theirs(text).input_ids
        assert ours(text).input_ids == stored.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids) == unicodedata.normalize("NFC", text)
    assert ours("<|image_pad|>").input_ids == [ours.convert_tokens_to_ids("<|image_pad|>")]
    assert plain.encode("Detect").ids == ours("Detect").input_ids


# ---- other versions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(families, saved):
    """What the installed transformers reads and answers; the pipeline has our processor."""
    folders = [*families.values(), saved]
    return {str(path): read_saved.read(path, load_processor(str(path))) for path in folders}


def test_the_pipeline_answers_with_our_processor(expected):
    """Without torchvision the stock processors of transformers 5 can't be made."""
    for found in expected.values():
        assert found["reply"] == found["answer"] != ""


@pytest.mark.parametrize("sites", [("torchvision",), ("4.57",), ("4.57", "torchvision"), ("4.49",)],
                         ids=" with ".join)  # fmt: skip
def test_other_versions_read_and_answer_the_same(expected, tmp_path, sites):
    """With the stock processor and pipeline, except with 4.57 alone, which can't make them."""
    paths = [os.environ.get(SITES[site]) for site in sites]
    if None in paths:
        pytest.skip(f"{' or '.join(SITES[site] for site in sites)} names no folder")
    folders = [path for path in expected if "qwen3_vl" not in path or sites != ("4.49",)]
    child = [sys.executable, read_saved.__file__, tmp_path / "found.pt", *folders, TINY_PATH]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(child, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    version, has_processor = done.stdout.split()[-2:]
    assert version.startswith(sites[0]) or (sites[0] == "torchvision" and version >= "5")
    assert has_processor == str(sites != ("4.57",))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.pop(str(TINY_PATH))["answer"]
    for path, theirs in found.items():
        ours = expected[path]
        assert torch.equal(theirs["ids"], ours["ids"]) and theirs["answer"] == ours["answer"]
        assert theirs.get("reply", ours["answer"]) == ours["answer"]
        for name in ("pixels", "logits"):
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_is_saved_again_as_it_was(families, family, tmp_path, processor):
    """Only some families' weights have other names in memory; transformers empties the dict of
    weights of the others while it writes them."""
    write(families[family], tmp_path)
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (families[family], tmp_path)
    )
    assert first == second
    loaded, made = load_model(str(tmp_path)), random_model(family, processor.tokenizer)
    loaded = loaded.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in made.state_dict().items())


def test_the_weights_are_as_saved(saved):
    ours, theirs = load_model("tiny").state_dict(), load_model(str(saved)).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_an_evaluation_writes_beside_a_model_is_not_its_descendants(tmp_path):
    """Else the evaluation of the trained model would find a finished one."""
    base = tmp_path / "base"
    shutil.copytree(TINY_PATH, base)
    made = ["eval_digits.jsonl", "eval_digits.summary.json", "eval_digits.md", "eval_digits.html",
            "eval_digits.journal", "own.predictions.json", "own.truth.json"]  # fmt: skip
    for name in [*made, "LICENSE", "notes.json"]:
        (base / name).write_text("{}")
    kept = set(load_processor(str(base)).base_files)
    assert not kept & set(made) and {"LICENSE", "notes.json"} <= kept


def test_an_adapters_descendants_keep_the_bases_files(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(TINY_PATH, base)
    (base / "LICENSE").write_text("of the base")
    (base / "README.md").write_text("about the base")
    adapter.mkdir()
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name != "config.json":
            shutil.copy(path, adapter)
    (adapter / "README.md").write_text("about the adapter")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    files = load_processor(str(adapter)).base_files
    assert files["LICENSE"] == b"of the base" and files["README.md"] == b"about the base"


def test_saving_a_model_leaves_the_processor_as_it_was(processor, tmp_path):
    before = processor.model_type
    model = random_model("qwen2_5_vl", processor.tokenizer)
    save(model, tmp_path / "out", processor)
    config = json.loads((tmp_path / "out/processor_config.json").read_text())
    assert config["processor_class"] == "Qwen2_5_VLProcessor" and processor.model_type == before
