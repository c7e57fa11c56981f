"""Check and measure the package on a GPU, in at most 12 minutes, without downloads.

    python scripts/gpu_check.py --out DIR          on a GPU
    python scripts/gpu_check.py --out DIR --cpu    every stage at toy size, to try the script
    python -m virft_fast.report gpu DIR            docs/gpu.md and its plot from the results

Each stage is a process of its own with a time limit. Its figures are in DIR/STAGE.json at once, its
output is in DIR/STAGE.log. A stage that fails or takes too long ends alone. The stages are in
gpu_stages.py and gpu_speed.py. Models have random weights in the released shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "scripts", "benchmarks", "tests")]

# This process never touches the GPU, or its forks couldn't: CUDA is looked for without starting it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import gpu_speed  # noqa: E402
import gpu_stages  # noqa: E402

TOTAL_S = 720.0
# Stage -> (its time limit in seconds, the function). Together they take less than TOTAL_S.
STAGES: dict[str, tuple[float, Callable[[gpu_stages.Results], None]]] = {
    "environment": (40, gpu_stages.environment),
    "kernels": (90, gpu_stages.kernels),
    "extension": (60, gpu_stages.extension),
    "attention": (60, gpu_stages.attention),
    "pieces": (40, gpu_speed.pieces),
    "rollout": (110, gpu_stages.rollout),
    "decode": (150, gpu_speed.decode),
    "train": (100, gpu_speed.train),
    "loss": (60, gpu_speed.loss),
}


def main(argv: list[str] | None = None) -> int:
    """Run the stages and print the table; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--cpu", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    started, results, method = time.monotonic(), [], "fork"
    for name in arguments.stages:
        left = TOTAL_S - (time.monotonic() - started)
        options = {"out": arguments.out, "toy": arguments.cpu}
        options["limit"] = min(STAGES[name][0], max(left, 1))
        result = run_stage(name, method, **options)
        if "CUDA" in result["error"] and not results:  # this driver can't be used after a fork
            method = "spawn"
            result = run_stage(name, method, **options)
        results.append(result)
        print(f"{name:12} {result['status']}, {result['seconds']:.0f} s", flush=True)
    print(f"\n{table(results)}\n\n{time.monotonic() - started:.0f} s in all")
    return int(any(result["status"] != "ok" for result in results))


def run_stage(name: str, method: str, *, out: Path, limit: float, toy: bool) -> dict[str, Any]:
    """Run a stage in its own process; returns what is in its JSON file.

    Args:
        method: "fork", so that libraries are imported once, or "spawn".
    """
    path, started = out / f"{name}.json", time.monotonic()
    path.unlink(missing_ok=True)
    child = multiprocessing.get_context(method).Process(target=_stage, args=(name, out, toy))
    child.start()
    child.join(limit)
    status, error = "ok", ""
    if child.is_alive():
        status, error = "timed out", f"more than {limit:.0f} s"
    elif child.exitcode:
        status, error = "failed", f"exit status {child.exitcode}; see {name}.log"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # with what it started
    child.join()
    result = {"stage": name, "status": status, "error": error, "figures": [], "notes": []}
    if path.exists():
        result |= json.loads(path.read_text()) | {"status": status}
        result["error"] = result["error"] or error
    result["seconds"] = round(time.monotonic() - started, 1)
    path.write_text(json.dumps(result, indent=1))
    return result


def _stage(name: str, out: Path, toy: bool) -> None:
    """The stage's process: its output goes into the log, its figures into the JSON file."""
    os.setsid()
    log = open(out / f"{name}.log", "w", buffering=1)  # noqa: SIM115  # until the process ends
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log
    results = gpu_stages.Results(out / f"{name}.json", name, toy)
    status = 0
    try:
        STAGES[name][1](results)
    except BaseException as error:
        traceback.print_exc()
        results.error, status = f"{type(error).__name__}: {error!s:.500}", 1
    results.write()
    log.flush()
    os._exit(status)


def table(results: list[dict[str, Any]]) -> str:
    """All figures with their limits, a line each."""
    lines = [f"{'stage':12}{'figure':58}{'value':>12}{'limit':>10}  unit"]
    for result in results:
        for figure in result["figures"]:
            floor = "" if figure["floor"] is None else f"{figure['floor']:,.4g}"
            lines.append(
                f"{result['stage']:12}{figure['name']:58}{figure['value']:>12,.4g}{floor:>10}"
                f"  {figure['unit']}"
            )
        if result["status"] != "ok":
            lines.append(f"{result['stage']:12}{result['status'].upper()}: {result['error']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
