"""What README, docs and configs say is there."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import pkgutil
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import griffe
import pytest
import torch
import yaml
from packaging.requirements import Requirement

from virft_fast import evaluate, merge, report
from virft_fast.arguments import flag_names
from virft_fast.config import TRAIN_GROUPS, EvalConfig
from virft_fast.data import layouts
from virft_fast.data.__main__ import make_parser
from virft_fast.kernels import grpo_loss, linear_grpo_loss
from virft_fast.kernels.loss_args import LOSS_TYPES
from virft_fast.mia.__main__ import make_parser as make_mia_parser
from virft_fast.models.adapters import add_lora
from virft_fast.models.qwen_vl import load_model
from virft_fast.tasks import REWARDS
from virft_fast.train import main as train_main
from virft_fast.train import parse_args

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
DOCS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("csrc/**/*.md")]
    if path.is_file()
)
SCRIPTS = sorted([*CONFIGS.glob("*.sh"), *CONFIGS.glob("*.sbatch")])
YAMLS = [*sorted(CONFIGS.glob("*.yaml")), ROOT / "virft_fast/demo.yaml"]
TORCHRUN = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
SLURM = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time",
         "signal", "requeue", "kill-on-bad-exit"}  # fmt: skip
TOOLS = {
    "no-build-isolation",
    "ours",
    "pyargs",
    "branch",
    "build",
    "install",
    "prefix",
    "save-results",
    "benchmark-save",
    "benchmark-json",
    "benchmark-compare",
    "benchmark-histogram",
    "no-deps",
    "target",
}  # pip, cmake, pytest
GPU_CHECK = {"out", "cpu"}
OTHERS = {"model", *TORCHRUN, *SLURM, *TOOLS, *GPU_CHECK}


def parser_flags(parser):
    """Flags of a parser and of all its commands, without dashes."""
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parser_flags(command)


KNOWN = {*flag_names(TRAIN_GROUPS), *flag_names((EvalConfig,)), *parser_flags(make_parser()),
         *parser_flags(merge.make_parser()), *parser_flags(make_mia_parser()),
         *OTHERS}  # fmt: skip
# The flags of src/scripts/2B_base65cate_6k.sh in Visual-RFT, as in its README.
VISUAL_RFT_FLAGS = {
    "output_dir", "model_name_or_path", "dataset_name", "deepspeed", "max_prompt_length",
    "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "bf16",
    "report_to", "gradient_checkpointing", "attn_implementation", "max_pixels",
    "num_train_epochs", "run_name", "save_steps", "save_only_model", "num_generations",
}  # fmt: skip


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def by_name(path):
    return path.name


def launch_words(text):
    """Words of the torchrun line, with values put in for the shell's variables."""
    line = re.search(r"^torchrun (?:.*\\\n)*.*", text, re.MULTILINE).group(0)
    line = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", line.replace("\\\n", " ").replace('"$@"', ""))
    line = re.sub(r"\$\{NNODES:\?\}|\$\{NODE_RANK:\?\}", "1", line)
    return shlex.split(re.sub(r"\$\{\w+(?::\?)?\}", "somewhere", line))


@pytest.mark.parametrize("path", [*DOCS, *SCRIPTS], ids=by_name)
def test_flags_exist(path):
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", path.read_text()))
    assert named <= KNOWN


def commands(text):
    """(module, arguments) of the commands of ours in a page's shell blocks."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            modules = [word for word in words if word.startswith("virft_fast.")]
            if modules and words[words.index(modules[0]) - 1] == "-m":
                yield modules[0], words[words.index(modules[0]) + 1 :]


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_commands_are_accepted(path):
    accept = {
        "virft_fast.data": make_parser().parse_args,
        "virft_fast.train": parse_args,
        "virft_fast.evaluate": evaluate.parse_args,
        "virft_fast.merge": merge.make_parser().parse_args,
        "virft_fast.mia": make_mia_parser().parse_args,
        "virft_fast.report": report.make_parser().parse_args,
    }
    for module, arguments in commands(path.read_text()):
        accept[module](arguments)


def trained(arguments):
    return parse_args(arguments).data


def test_reproduce_builds_and_evaluates_every_set_of_visual_rft():
    """As tests/test_visual_rft_sets.py does it, small."""
    found = list(commands((ROOT / "docs/reproduce.md").read_text()))
    built = [make_parser().parse_args(a) for m, a in found if a[0] == "build"]
    wanted = [evaluate.parse_args(a) for m, a in found if m == "virft_fast.evaluate"]
    readers = {build.reader for build in built if hasattr(build, "reader")}
    assert readers >= {"flowers102", "aircraft", "cars196", "pets37"}
    sets = {(b.kind, b.categories) for b in built if hasattr(b, "categories")}
    assert sets >= {("coco", "all"), ("coco", "base65"), ("coco", "few8"), ("lvis", "lvis6")}
    assert {c.task for c in wanted} >= {"coco", "lvis", "classification", "grounding"}
    outputs = {str(build.output) for build in built}
    named = {c.dataset_name for c in wanted if not c.annotations}
    assert {c.split(":")[0] for c in named} - {"shapes_detection"} <= outputs
    assert {c.dataset_name for m, a in found if m == "virft_fast.train" for c in [trained(a)]} <= (
        outputs
    )


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
def test_configs_are_accepted(path):
    config = parse_args(["--config", str(path)]).flat()
    for name, value in yaml.safe_load(path.read_text()).items():
        assert config[name] == value, name
    assert set(config["reward_funcs"]) <= set(REWARDS)


@pytest.mark.parametrize("size, num_generations", [("2b", 8), ("7b", 4)])
def test_the_papers_settings_stay(size, num_generations):
    config = parse_args(["--config", str(CONFIGS / f"visual_rft_{size}.yaml")]).flat()
    frozen = {
        "num_generations": num_generations, "beta": 0.04, "max_completion_length": 256,
        "learning_rate": 1e-6, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "weight_decay": 0, "max_grad_norm": 1, "temperature": 1, "num_iterations": 1,
        "loss_type": "grpo", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "max_prompt_length": 1024, "min_pixels": 3136, "max_pixels": 401408, "bf16": True,
        "attn_implementation": "flash_attention_2", "gradient_checkpointing": False,
        "save_steps": 100, "save_only_model": True,
        "reward_funcs": ["visual_rft_accuracy_iou", "visual_rft_accuracy_confidence", "format"],
    }  # fmt: skip
    assert {name: config[name] for name in frozen} == frozen


@pytest.mark.parametrize("path", [ROOT / "README.md", CONFIGS / "launch_8gpu.sh"], ids=by_name)
def test_visual_rfts_launch_line_is_accepted(path):
    words = launch_words(path.read_text())
    start = words.index("virft_fast.train")
    assert words[start - 1] == "-m"
    flags = words[start + 1 :]
    assert {word[2:] for word in flags if word.startswith("--")} == VISUAL_RFT_FLAGS
    config = parse_args(flags).flat()
    assert (config["bf16"], config["gradient_checkpointing"]) == (True, False)
    assert (ROOT / config["deepspeed"]).is_file()


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_scripts_parse_and_name_files_that_exist(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    for name in re.findall(r"configs/[\w.]+\w", path.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", path.read_text())) <= targets


def test_readme_begins_with_the_two_commands():
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == [
        "make demo",
        "make test",
    ]


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def batch():
    """What the parts are said to take."""
    return {
        "hidden": torch.randn(16, 5, 8, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 32, bias=False),
        "completion_ids": torch.randint(32, (16, 5)),
        "completion_mask": torch.ones(16, 5, dtype=torch.bool),
        "advantages": torch.randn(16),
        "rewards": torch.rand(16),
        "ref_logps": torch.full((16, 5), -3.0),
        "list_of_predicted": [[[0, 0, 10, 10], [20, 20, 30, 30]], []],
        "list_of_true": [[[0, 0, 10, 9]], [[0, 0, 5, 5]]],
    }


def test_readmes_code_runs_as_written():
    (parts,), given = python_blocks("README.md"), batch()
    exec(parts, given)
    assert given["hidden"].grad.abs().max() > 0 and given["out"].kl.shape == (16, 5)
    assert given["matches"].tolist() == [[0, -1], [-1, -1]]
    assert given["REWARDS"] is REWARDS


def test_the_rollout_runs_as_written(capsys):
    (rollout,), alone = python_blocks("docs/how_it_works.md"), {}
    exec(rollout, alone)
    out = alone["out"]
    assert capsys.readouterr().out == out.texts[0] + "\n"
    assert len(out.texts) == 8 and out.completion_ids.shape == out.sampling_logps.shape


def test_the_extensions_run_as_written(capsys, monkeypatch):
    reward, layout, loss, algorithm = python_blocks("docs/extending.md")
    given = {}
    exec(reward, given)
    answers = [[{"role": "assistant", "content": text}] for text in ("I am not sure", "a cat")]
    assert given["says_unsure"](prompts=[], completions=answers, solution=[]) == [1.0, 0.0]
    monkeypatch.setattr(layouts, "ANSWERS", {**layouts.ANSWERS})
    exec(layout, {})
    assert capsys.readouterr().out == "cat\n"
    given = batch()
    exec(loss, given)
    assert given["hidden"].grad.abs().max() > 0
    assert (ROOT / "tests/toy_algorithm.py").read_text().endswith(algorithm)


def test_api_page_names_what_there_is():
    """mkdocs drops a member that it doesn't find, or finds as a module, without a word."""
    for block in (ROOT / "docs/api.md").read_text().split("\n::: ")[1:]:
        where, members = block.split()[0], re.findall(r"^        - (\w+)", block, re.MULTILINE)
        for name in [f"{where}.{member}" for member in members] or [where]:
            assert callable(pkgutil.resolve_name(name)), name


def test_rewards_page_lists_every_reward():
    named = re.findall(
        r"^\| `(\w+)` \| [\[0]", (ROOT / "docs/rewards.md").read_text(), re.MULTILINE
    )
    assert sorted(named) == sorted(REWARDS)


def test_troubleshooting_quotes_messages_that_there_are():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = [
        q for line in re.findall(r"^### (.*)", text, re.M) for q in re.findall('"(.+?)"', line)
    ]
    for table in re.findall(r"^\| (?:message|reason) \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.M):
        quoted += re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(quoted) > 25
    said = "\n".join(strings_of(path) for path in sorted((ROOT / "virft_fast").rglob("*.py")))
    parts = [part.strip() for q in quoted for part in re.split(r"\.\.\.|\bN\b", q) if part.strip()]
    assert [part for part in parts if part not in said] == []


def strings_of(path):
    """The texts of a file, a line each, with a tab for what is filled in."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            lines.append("\t".join(p.value for p in node.values if isinstance(p, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines.append(node.value)
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["flags", "memory", "models"])
def test_generated_pages_are_up_to_date(name):
    made = load_script(f"make_{name}_page")
    assert made.page() == made.PAGE.read_text(), f"run python scripts/make_{name}_page.py"
    if name == "models":
        assert made.readme() == made.README.read_text(), "run python scripts/make_models_page.py"
        cells = {cell for row in made.families().values() for cell in row}
        assert cells == {"yes", "no"}, "a family lacks a test in tests/test_families.py"


def test_metrics_page_lists_what_runs_log(tmp_path):
    answers = {
        "grpo": {"solution": "<answer>[[1, 2, 30, 40]]</answer>"},
        "sft": {"solution": "<answer>[[1, 2, 30, 40]]</answer>"},
        "dpo": {"chosen": "7", "rejected": "1"},
    }
    logged = set()
    for name, answer in answers.items():
        rows, out = tmp_path / f"{name}.jsonl", tmp_path / name
        rows.write_text(json.dumps({"prompt": "Where is it?", **answer}) + "\n")
        argv = ["--algorithm", name, "--dataset_name", str(rows), "--output_dir", str(out)]
        if name == "grpo":
            argv += ["--dynamic_sampling", "--curriculum", "1", "--top_p", "0.99"]
        assert train_main([*argv, "--max_steps", "1", "--max_completion_length", "48"]) == 0
        logged |= set(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    rewards = {f"rewards/{name}" for name in REWARDS}
    assert logged & rewards
    logged = logged - rewards - {"step"} | {"rewards/NAME"}
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    assert sorted(listed) == sorted(logged)


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_links_into_a_page_lead_to_a_heading(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([\w-]+)\)", path.read_text()):
        page = (path.parent / target) if target else path
        if page.suffix == ".md" and page.exists():
            assert anchor in set(anchors(page.read_text())), f"{target}#{anchor}"


def anchors(text):
    """Of a page's headings, as mkdocs and Git hosts make them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE):
        yield re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def drawn_tree(text):
    """Paths of the indented tree in ARCHITECTURE.md, folders with a slash at their end."""
    block = re.search(r"```\n(virft_fast/\n.*?)```", text, re.DOTALL).group(1)
    paths, folders = set(), {}
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0] if line.strip() else "--"
        if name == "--" or indent >= 10:  # a layer's heading, or a description that goes on
            continue
        path = folders.get(indent - 2, "") + name
        paths.add(path)
        if name.endswith("/"):
            folders[indent] = path
    return paths


def test_architecture_draws_the_house_as_it_is():
    drawn = drawn_tree((ROOT / "docs/ARCHITECTURE.md").read_text())
    built = {str(path.relative_to(ROOT)) for path in (ROOT / "virft_fast").rglob("*.py")}
    assert built - drawn == set()
    assert {path for path in drawn if not (ROOT / path).exists()} == set()


def test_the_front_page_names_every_loss_type():
    line = re.search(r"^Losses: (.*?), as TRL", (ROOT / "README.md").read_text(), re.M)[1]
    assert re.findall(r"[a-z_]+", line.replace(" and ", ", ")) == list(LOSS_TYPES)


def test_releases_are_required_and_the_tested_ones_are_among_them():
    """No commit of another project is pinned; any release in the range will do."""
    required = {}
    for line in metadata.requires("virft_fast"):
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": "train"}):
            continue
        assert requirement.url is None and requirement.specifier
        assert all(part.operator == ">=" for part in requirement.specifier), line
        required[requirement.name] = requirement.specifier
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.url is None
            (part,) = requirement.specifier
            pinned[requirement.name] = part.version
    for name in ("torch", "transformers", "deepspeed", "datasets", "accelerate"):
        assert pinned[name] in required[name]


def test_every_change_that_a_test_has_to_notice_can_be_made():
    """The list of scripts/mutants.py stays true to the files."""
    mutants = load_script("mutants")
    texts = {m.file: (ROOT / "virft_fast" / m.file).read_text() for m in mutants.MUTANTS}
    assert [m.name for m in mutants.MUTANTS if texts[m.file].count(m.old) != 1] == []
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 60
    files = {part for m in mutants.MUTANTS for part in m.tests.split() if part.endswith(".py")}
    assert all((ROOT / file).is_file() for file in files)


def test_the_site_keeps_flags_whole_and_docstrings_in_sections():
    hooks = load_script("site_hooks")
    line = "<p><code>run --beta 0</code> and --gamma</p><pre><code>--beta 0</code></pre>"
    whole = line.replace("run --beta", 'run <span class="flag">--beta</span>')
    assert hooks.on_page_content(line, page=None) == whole
    names = load_script("site_names")
    lines = ["Text.", "Args:", "    a, b: c.", "Returns:", "    a, b: d.", "More."]
    parted = "Text.||Args:|    a: c.|    b: c.||Returns:|    a, b: d.||More."
    assert names.separate_sections(names.split_entries(lines)) == parted.split("|")


def test_the_sites_signatures_are_those_of_the_functions():
    """mkdocs fails if a docstring describes an argument that the signature lacks."""
    extensions = griffe.load_extensions(load_script("site_names").SharedEntries())
    package = griffe.load("virft_fast", search_paths=[ROOT], extensions=extensions)
    for function in (grpo_loss, linear_grpo_loss):
        shown = package[f"{function.__module__.removeprefix('virft_fast.')}.{function.__name__}"]
        arguments = inspect.signature(function).parameters
        assert [parameter.name for parameter in shown.parameters] == list(arguments)
        assert str(shown.parameters["beta"].default) == str(arguments["beta"].default) == "0.0"


@pytest.mark.parametrize("path", DOCS, ids=by_name)
def test_lists_are_lists_on_the_site_too(path):
    """Its Markdown wants a blank line above a list, and four spaces before what follows in it."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"^::: .*\n(?: .*\n|\n)*", "", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        items = re.findall(r"^(?:[-*]|\d+\.) ", block, re.MULTILINE)
        assert not items or block.lstrip("\n").startswith(items[0]), block
        assert not re.match(r"\n* {1,3}\S", block), block


def test_the_api_pages_docstrings_lose_nothing_as_markdown():
    """A limit "x: > 0" would be a quotation, and <answer> outside of code an unknown tag."""
    shown = re.findall(r"^::: virft_fast\.(\w+)", (ROOT / "docs/api.md").read_text(), re.M)
    files = [path for name in shown for path in (ROOT / "virft_fast").glob(f"{name}*/*.py")]
    for path in [ROOT / "virft_fast/batch.py", *files]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                text = re.sub("`[^`]*`", "", ast.get_docstring(node) or "")
                assert not re.search(r": [<>]|<[|/]?[a-z]+[|]?>", text), (path, node.name)


def test_the_memory_page_counts_the_numbers_of_pefts_adapters():
    page = load_script("make_memory_page")
    model = load_model("tiny")
    text = model.config.get_text_config()
    shape = SimpleNamespace(**text.to_dict())
    shape.head_dim = text.hidden_size // text.num_attention_heads
    linear = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()
    adapted = add_lora(model, r=page.LORA_R, alpha=32, target_modules=linear)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert page.lora_parameters(shape) == trained > 0
