"""The benchmarks run, on a size that shows nothing but that; contenders take turns and become
entries of pytest-benchmark; and the peers' names are there."""

import importlib.util
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from processes import run

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SUITES = ["checkpoint", "dpo", "evaluate", "loss", "mia", "rollout", "step"]


@pytest.fixture
def module(monkeypatch):
    """module(name): a file of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load


def bench(suite, *options):
    pytest.importorskip("pytest_benchmark")
    argv = [f"{BENCHMARKS}/test_bench_{suite}.py", "-q", "-rs", "--size", "tiny", *options]
    with mock.patch.dict(os.environ):
        os.environ.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing in a worker
        done = run(*argv, "-p", "no:cacheprovider", "-p", "no:xdist", module="pytest")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr
    return done.stdout


@pytest.mark.parametrize("suite", SUITES)
def test_suite_runs(suite):
    bench(suite, "--benchmark-disable")


def test_contenders_are_entries_of_a_case_and_the_page_is_made_of_them(tmp_path, module):
    pytest.importorskip("virft_fast._C", reason="the native matcher is not built")
    file = tmp_path / "run.json"
    options = ["--benchmark-min-rounds=3", "--benchmark-max-time=0", f"--benchmark-json={file}"]
    shown = bench("matching", *options)
    assert "ours, CUDA: needs a GPU" in shown
    if importlib.util.find_spec("torch_linear_assignment") is None:
        assert "not installed; pip install torch-linear-assignment" in shown
    entries, groups = json.loads(file.read_text())["benchmarks"], {}
    for entry in entries:
        assert len(entry["stats"]["data"]) == 3 and min(entry["stats"]["data"]) > 0
        groups.setdefault(entry["group"], {})[entry["extra_info"]["contender"]] = entry
    detr = groups["DETR's matcher: 8 images, 100 queries, 1 to 20 targets"]
    theirs, ours = detr["transformers' HungarianMatcher"], detr["ours inside it"]
    assert theirs["extra_info"]["package"] == "transformers" and theirs["extra_info"]["version"]
    assert theirs["extra_info"]["threads_used"] > 0
    page = module("report").markdown(module("report").load(file))
    assert page.count("(1.00x)") >= len(groups) == page.count("\n|---")
    assert f"({theirs['stats']['min'] / ours['stats']['min']:.2f}x)" in page


def test_contenders_take_turns_in_an_order_that_reverses(module):
    case, order = module("measure").Case("c", {}), []

    def contender(name):
        order.append(name)
        time.sleep(0.06)

    case.runs = {name: partial(contender, name) for name in "abc"} | {"d": "no GPU"}
    options = {"min_rounds": 4, "max_time": 0.0, "timer": time.perf_counter}
    module("conftest").take_turns(case, ["a", "b", "d"], **options)
    assert "".join(order) == "aabb" + "ba" + "ab" + "ba" + "ab"  # first, a tenth of a second each
    assert {name: len(seconds) for name, seconds in case.seconds.items()} == {"a": 4, "b": 4}


def test_a_case_whose_contender_fails_has_no_times(module):
    def broken():
        raise RuntimeError("out of memory")

    case = module("measure").Case("c", {"ours": lambda: None, "peer": broken})
    options = {"min_rounds": 4, "max_time": 0.0, "timer": time.perf_counter}
    with pytest.raises(RuntimeError, match="out of memory"):
        module("conftest").take_turns(case, ["ours", "peer"], **options)
    assert not case.seconds


def test_the_newest_results_of_a_case_count(tmp_path, module):
    for day, cases in ((3, {"x": 8}), (1, {"x": 4, "y": 2}), (2, {"y": 3})):
        entries = [
            {
                "fullname": "benchmarks/test_bench_loss.py::test",
                "group": group,
                "extra_info": {"contender": name, "package": package, "version": "1", "tokens": 6},
                "stats": {"min": milliseconds / 1e3},
            }
            for group, milliseconds in cases.items()
            for name, package, milliseconds in (
                ("TRL", "trl", milliseconds),
                ("ours", "virft_fast", 2),
            )
        ]
        result = {
            "datetime": f"2026-01-0{day}T00:00",
            "commit_info": {"id": "0123456789"},
            "machine_info": {"cpu": "Z80"},
            "benchmarks": entries,
        }
        (tmp_path / f"{9 - day}.json").write_text(json.dumps(result))
    page = module("report").markdown(module("report").load(tmp_path))
    assert "| x | ms | tokens/s |" in page and "| TRL (1) | 8.000 (4.00x) | 750 |" in page
    assert "| TRL (1) | 3.000 (1.50x) | 2,000 |" in page and "| **ours** | 2.000" in page
    assert page.count("\n|---") == 2 and "2026-01-03, commit 0123456, cpu Z80" in page


def test_names_that_are_called_on_a_gpu_alone():
    """Of the peers that a CPU can't run."""
    import inspect

    module = pytest.importorskip("trl.kernels.logprob_entropy")
    names = list(inspect.signature(module.selective_log_softmax_and_entropy).parameters)
    assert names[:2] == ["logits", "index"]
    liger = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    names = list(inspect.signature(liger.triton_grpo_loss).parameters)
    wanted = ["logits", "old_logp", "ref_logp", "completion_ids", "advantages", "completion_mask"]
    assert names[:6] == wanted and {"eps_low", "eps_high", "reduce"} < set(names)
