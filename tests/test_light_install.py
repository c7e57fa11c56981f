"""What runs with torch, numpy and triton only, and what says that it needs the extra `train`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from virft_fast import train_extra
from virft_fast.commands import COMMANDS

ROOT = Path(__file__).parent.parent
# Python runs this at its start. It then finds neither the modules nor the distributions that
# `pip install .` alone doesn't install.
HIDE = """
import json, os, sys
from importlib.machinery import PathFinder
hidden, gone = map(frozenset, json.loads(os.environ["HIDDEN"]))
find, distributions = PathFinder.find_spec, PathFinder.find_distributions
def find_spec(name, path=None, target=None):
    if name == "datasets" in hidden:  # a folder of the working directory would be found
        return find(name, [os.getcwd()], target)
    return None if name.partition(".")[0] in hidden else find(name, path, target)
def find_distributions(context):
    return [] if context.name in gone else distributions(context)
PathFinder.find_spec, PathFinder.find_distributions = find_spec, find_distributions
"""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_by(*names: str) -> set[str]:
    """Distributions that come with these, themselves included."""
    known: set[str] = set()
    todo = list(names)
    while todo:
        if (name := plain(todo.pop())) in known:
            continue
        known.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found = [Requirement(line) for line in lines]
        todo += [r.name for r in found if not r.marker or r.marker.evaluate({"extra": ""})]
    return known


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Environment variables under which Python finds torch, numpy and triton only."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "sitecustomize.py").write_text(HIDE)
    kept = {*installed_by("torch", "numpy", "triton"), "virft-fast"}
    owners = metadata.packages_distributions()
    hidden = [m for m, found in owners.items() if not kept & {plain(name) for name in found}]
    assert {*train_extra.PACKAGES, "deepspeed", "peft"} <= {*hidden}
    gone = {name for module in hidden for name in owners[module]}
    path = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "HIDDEN": json.dumps([hidden, [*gone]])}


def run(light, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=light, capture_output=True, text=True)


PARTS = """
import math, torch
from virft_fast.kernels import group_advantages, linear_grpo_loss
from virft_fast.matching import assign, is_native, match_boxes, pairwise_iou, reference
from virft_fast.tasks import REWARDS
hidden = torch.randn(4, 3, 8, requires_grad=True)
ids, mask = torch.randint(16, (4, 3)), torch.ones(4, 3, dtype=torch.bool)
loss = linear_grpo_loss(hidden, torch.randn(16, 8), ids, mask,
                        advantages=group_advantages(torch.arange(4.0), 2)).loss
loss.backward()
assert hidden.grad.abs().sum() > 0
box, one = torch.tensor([[[0, 0, 10, 10.0]]]), torch.tensor([1])
assert pairwise_iou(box, box, one, one).item() == 1
if is_native():
    assert match_boxes(box, box, one, one)[0].item() == 0
    assert assign(box[:, :, :2], one, one)[0].tolist() == [[0]]
boxes = '<answer>[{"Position": [0, 0, 10, 10], "Confidence": 1}]</answer>'
answers = {"accuracy": "cat", "visual_rft_accuracy": "cat", "accuracy_choice": "B",
           "accuracy_number": "12", "accuracy_math": "x^2",
           "grounding_giou": "[0, 0, 10, 10]", "visual_rft_grounding": "[0, 0, 10, 10]"}
for name, reward in REWARDS.items():
    if name in ("hungarian_iou", "point_in_box", "point_distance") and not is_native():
        continue
    right = boxes if name not in answers else f"<answer>{answers[name]}</answer>"
    texts = [f"<think>It is there.</think>{right}", "I see nothing"]
    talks = [[{"role": "assistant", "content": text}] for text in texts]
    try:
        values = reward(prompts=[[], []], completions=talks, solution=[right, right])
    except ValueError as error:
        print(name, error)
        continue
    assert values[0] > max(values[1], 0), (name, values)
try:  # without the native module
    reference.assign_reference(box[:, :, :2], one, one, False)
except ValueError as error:
    print(error)
"""


def test_kernels_matcher_and_rewards_need_torch_and_numpy_only(light):
    done = run(light, "-c", PARTS)
    assert done.returncode == 0, done.stderr
    math, matching = done.stdout.splitlines()
    assert "accuracy_math" in math and "'.[math]'" in math
    assert "expected the package scipy; pip install scipy, or '.[train]'" in matching


@pytest.mark.parametrize("name", [*COMMANDS, "report"])
def test_every_command_names_the_missing_extra(light, name):
    module = f"virft_fast.{name}" if name == "report" else COMMANDS[name][0]
    done = run(light, "-m", module.removesuffix(".__main__"))
    said = "missing for training: " if name == "doctor" else "expected the packages of the extra"
    text = done.stdout if name == "doctor" else done.stderr
    assert done.returncode == 1 and said in text, done
    assert "transformers" in text and "pip install '.[train]' in a checkout" in text
    assert "Traceback" not in done.stderr and (name == "doctor" or text.count("\n") == 1)


def test_the_list_of_commands_needs_nothing_and_each_names_the_extra(light):
    assert "fine-tune a model" in run(light, "-m", "virft_fast").stdout
    done = run(light, "-m", "virft_fast", "train", "--help")
    assert done.returncode == 1 and done.stderr.startswith("virft_fast: error: expected the")
    assert "Traceback" not in done.stderr


def test_a_folder_named_like_a_package_is_not_that_package(light, tmp_path):
    (tmp_path / "datasets").mkdir()
    words = [sys.executable, "-c", "import virft_fast.train_extra"]
    done = subprocess.run(words, env=light, cwd=tmp_path, capture_output=True, text=True)
    assert "datasets, matplotlib" in done.stderr, done.stderr


def test_the_extra_is_what_commands_look_for():
    lines = [Requirement(line) for line in metadata.requires("virft_fast")]
    base = {r.name for r in lines if not r.marker or "extra" not in str(r.marker)}
    extra = {r.name for r in lines if r.marker and 'extra == "train"' in str(r.marker)}
    assert base == {"torch", "numpy", "triton"}
    imported = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    named = {imported.get(name, name.replace("-", "_")) for name in extra - {"deepspeed"}}
    assert named == {*train_extra.PACKAGES} and "deepspeed" in extra
