"""The benchmarks run, on a size that shows nothing but that; and the peers' names are there."""

from pathlib import Path

import pytest
from processes import run

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "suite",
    [
        "test_bench_evaluate",
        "test_bench_loss",
        "test_bench_rollout",
        "test_bench_mia",
        "test_bench_dpo",
        "test_bench_step",
    ],
)
def test_suite_runs(suite, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.chdir(BENCHMARKS)
    argv = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"{suite}.py", "--size", "tiny",
            "--benchmark-disable"]  # fmt: skip
    done = run(*argv, module="pytest")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr


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
