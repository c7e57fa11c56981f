"""A model's folder is data: it runs no code, and its chat template can't hold a run up."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import threading
from pathlib import Path

import pytest
from helpers import make_sample

from virft_fast import merge
from virft_fast.config import UsageError
from virft_fast.evaluate import main as evaluate
from virft_fast.evaluation.grounding import MaskModel
from virft_fast.models import chat_template
from virft_fast.models.adapters import add_lora
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import encode_prompt, load_model, read_config
from virft_fast.models.saving import find_base_folder
from virft_fast.models.source import find_model
from virft_fast.models.tiny import TINY_PATH
from virft_fast.models.trust import AsksForCode
from virft_fast.train import main, parse_args

ROOT = Path(__file__).parent.parent
# Not load_dataset_builder: it has no such option, and no release of datasets since 4 runs scripts.
LOADERS = ("from_pretrained", "from_config", "pipeline", "load_dataset")


def untrusting(path):
    """(line, whether it refuses code) of every call that could load code of a model or data set."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in LOADERS:
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                yield node.lineno, given.get("trust_remote_code") == "False"


def test_every_loader_is_called_without_trust():
    files = [p for d in ("virft_fast", "benchmarks", "scripts", "examples")
             for p in (ROOT / d).rglob("*.py")]  # fmt: skip
    calls = {(str(f.relative_to(ROOT)), line): ok for f in files for line, ok in untrusting(f)}
    assert len(calls) >= 12 and [where for where, ok in calls.items() if not ok] == []
    texts = {str(f.relative_to(ROOT)) for f in files if "trust_remote_code=True" in f.read_text()}
    assert texts == set()


@pytest.fixture
def folder(tmp_path):
    """The embedded model's folder, with code beside it that leaves a trace when it is run."""
    copy = tmp_path / "model"
    shutil.copytree(TINY_PATH, copy)
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass C: pass\n")
    yield copy
    assert not (tmp_path / "RAN").exists()


def change(folder, name, **entries):
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | entries))


KERNEL = "someone/kernel@main:flash"
HOSTILE = [
    ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}),
    ("config.json", {"auto_map": {"AutoModelForImageTextToText": "evil.C"}}),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "evil.C"}}}),
    ("config.5.0.0.json", {"auto_map": {"AutoConfig": "evil.C"}}),
    ("config.json", {"_attn_implementation": KERNEL}),
    ("config.json", {"attn_implementation": {"vision_config": KERNEL}}),
    ("config.json", {"vision_config": {"_attn_implementation": KERNEL}}),
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("config.json", {"custom_pipelines": {"chat": {"impl": "evil.C"}}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.C", None]}}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.C"}}),
    ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.C"}}),
    ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "other/repo--evil.C"}}),
    ("generation_config.json", {"custom_generate": "someone/repo"}),
    ("adapter_config.json", {"auto_mapping": {"parent_library": "evil", "base_model_class": "C"}}),
    ("adapter_config.json", {"megatron_config": {"x": 1}, "megatron_core": "evil"}),
]


@pytest.mark.parametrize(("name", "entries"), HOSTILE)
@pytest.mark.parametrize("load", [find_model, load_processor, read_config, load_model])
def test_a_folder_that_asks_for_code_is_refused_by_every_loader(folder, name, entries, load):
    change(folder, name, **entries)
    with pytest.raises(AsksForCode, match=f"expected .*, got {name} with"):
        load(str(folder))


def test_a_folder_that_asks_for_code_after_it_was_found_is_refused_when_it_is_loaded(folder):
    source = find_model(str(folder))
    stamp = source.stamp
    load_model(source, empty=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(AsksForCode, match="auto_map"):
        load_model(source)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("ab") as weights:
        weights.write(b"0")
    assert source.stamp != stamp  # weights that changed since are noticed


@pytest.mark.parametrize("targets", [["q_proj", 7], [None]])
def test_an_adapter_of_odd_target_modules_is_named(folder, targets):
    config = {"base_model_name_or_path": "tiny", "peft_type": "LORA", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected adapter_config.json as peft writes it"):
        find_model(str(folder))


@pytest.mark.parametrize(
    "entries",
    [
        {"auto_map": {}, "quantization_config": None, "_attn_implementation": "sdpa"},
        {"attn_implementation": {"text_config": "eager", "vision_config": None}},
    ],
)
def test_entries_that_ask_for_nothing_are_accepted(folder, entries):
    change(folder, "config.json", **entries)
    assert read_config(str(folder)).model_type == "qwen2_vl"


def test_other_signs_of_code_are_refused(folder):
    (folder / "custom_generate").mkdir()
    with pytest.raises(AsksForCode, match="custom_generate"):
        load_model(str(folder))
    (folder / "custom_generate").rmdir()
    (folder / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(AsksForCode, match="nested too deep"):
        read_config(str(folder))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "RAN")))
    with pytest.raises(AsksForCode, match=r"in \.safetensors, got pytorch_model\.bin"):
        load_model(str(folder))
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle and not opened"):
        load_model(str(folder))


def test_an_adapter_and_its_base_are_checked(folder, tmp_path):
    adapter = tmp_path / "adapter"
    model = add_lora(load_model("tiny"), r=2, alpha=4, target_modules=["q_proj"])
    model.save_pretrained(adapter)
    change(adapter, "adapter_config.json", base_model_name_or_path=str(folder))
    assert len(find_model(str(adapter)).chain) == 2  # peft's own auto_mapping names transformers
    change(folder, "config.json", auto_map={"AutoModel": "evil.C"})
    with pytest.raises(AsksForCode, match="auto_map"):
        load_model(str(adapter))
    shutil.copy(TINY_PATH / "config.json", folder)
    (adapter / "adapter_model.safetensors").rename(adapter / "x.safetensors")
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "RAN")))
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle and not opened"):
        load_model(str(adapter))


def test_files_of_the_hub_are_checked_before_they_are_used(folder, monkeypatch):
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.C"})
    monkeypatch.setattr(
        "transformers.utils.cached_file",
        lambda name, file, **options: str(folder / file) if (folder / file).exists() else None,
    )
    for load in (find_base_folder, load_processor, read_config):
        with pytest.raises(AsksForCode, match="auto_map"):
            load("someone/model")


def test_sam_is_a_model_too(folder):
    change(folder, "config.json", auto_map={"AutoModel": "evil.C"})
    with pytest.raises(AsksForCode, match="--sam_path .*auto_map"):
        MaskModel(str(folder), "cpu")


@pytest.mark.parametrize("command", ["train", "evaluate", "merge"])
def test_commands_refuse_without_a_question(folder, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    change(folder, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    flags = ["--model_name_or_path", str(folder), "--dataset_name", "shapes_detection"]
    if command == "train":
        status = main([*flags, "--max_steps", "1", "--output_dir", str(tmp_path / "o")])
    elif command == "evaluate":
        status = evaluate([*flags, "--output", str(tmp_path / "o.jsonl")])
    else:
        status = merge.main([str(folder), str(tmp_path / "o")])
    assert status == 2
    assert "got config.json with auto_map" in capsys.readouterr().err


def test_no_flag_allows_code():
    with pytest.raises(UsageError, match="trust_remote_code True: expected false; .* no code"):
        parse_args(["--trust_remote_code", "True", "--dataset_name", "shapes_detection"])
    for name in ("someone/flash-attn2", "kernels-community/flash-attn2@main", "flash_attention_3"):
        with pytest.raises(UsageError, match="attn_implementation: expected one of sdpa"):
            parse_args(["--attn_implementation", name, "--dataset_name", "shapes_detection"])


# --- Chat templates --------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}"
ENDLESS = [
    LOOP * 4 + "{% endfor %}" * 4,
    "{{ 10 ** (10 ** 10) }}",
    "{% set n = messages | length %}{{ (n + 9) ** ((n + 9) ** (n + 9)) }}",
]
FAILING = [
    ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
    ("{{ messages[0].role | center(10 ** 10) }}", "MemoryError"),
    ("{{ 'a' * 10 ** 6 }}", "1,000,000 characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% include '/etc/hostname' %}", "no loader"),
    ("{% import '/etc/hostname' as f %}", "no loader"),
    ("{% extends '/etc/hostname' %}", "no loader"),
    ("{{ raise_exception('no images') }}", "no images"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{% for m in messages %}", "TemplateSyntaxError"),
]


def with_template(processor, template, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", template)
    return processor


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_does_not_end_is_refused(processor, template, monkeypatch):
    monkeypatch.setattr(chat_template, "LIMIT_S", 1.0)
    with pytest.raises(ValueError, match="does not end within 1 s"):
        chat_template.check_chat_template(with_template(processor, template, monkeypatch), "m")


@pytest.mark.parametrize(("template", "reason"), FAILING)
def test_a_template_that_fails_is_refused(processor, template, reason, monkeypatch):
    with pytest.raises(ValueError, match=f"expected a chat template .*got .*{reason}"):
        chat_template.check_chat_template(with_template(processor, template, monkeypatch), "m")


def test_a_template_that_fails_is_found_when_the_processor_is_loaded(folder):
    change(folder, "chat_template.json", chat_template="{% include 'x' %}")
    with pytest.raises(ValueError, match="expected a chat template"):
        load_processor(str(folder))
    assert load_processor(str(folder), renders=False).chat_template == "{% include 'x' %}"


def test_a_template_that_hangs_at_one_row_makes_that_row_bad(processor, monkeypatch):
    """It is well-behaved on the probe; the limit also holds in another thread than the main one."""
    monkeypatch.setattr(chat_template, "LIMIT_S", 0.3)
    hang = "{% if 'red' in messages[0].content | string %}" + ENDLESS[0] + "{% endif %}"
    with_template(processor, hang + processor.chat_template, monkeypatch)
    chat_template.check_chat_template(processor, "m")
    said = []

    def encode():
        try:
            encode_prompt(processor, make_sample(0, [(56, 56)], "Where is red?"))
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    assert said == ["the chat template fails: no end after 0.3 s"]
    assert encode_prompt(processor, make_sample(0, [(56, 56)], "Where is blue?")).text
