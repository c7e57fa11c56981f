"""The Triton kernels: interpreted on the CPU, compiled for GPUs that aren't here, run where one is.

TRITON_INTERPRET is read when Triton is imported, so the cases run in processes of their own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402

from virft_fast.kernels import (  # noqa: E402
    backend,
    triton_decode,
    triton_prefix_attention,
    triton_rows,
)

HERE = Path(__file__).parent


def run_cases(interpreted):
    env = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "-W", "ignore", str(HERE / "triton_cases.py")]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_cases_interpreted():
    run_cases(True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cases_on_the_gpu():
    run_cases(False)


def script():
    spec = importlib.util.spec_from_file_location(
        "check_triton", HERE.parent / "scripts/check_triton.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_triton"] = module
    spec.loader.exec_module(module)
    return module


check_triton = script()


@pytest.mark.parametrize("arch", check_triton.ARCHS)
def test_every_variant_compiles_without_spills(arch):
    wrong = [text for v in check_triton.variants() for text in check_triton.problems(v, arch)]
    assert not wrong


@pytest.mark.parametrize("arch", check_triton.DECODE_ARCHS)
def test_every_kernel_of_a_decoding_step_compiles_without_spills(arch):
    variants = check_triton.decode_variants(arch)
    wrong = [text for v in variants for text in check_triton.problems(v, arch)]
    assert not wrong


@pytest.mark.parametrize("arch", check_triton.DECODE_ARCHS)
def test_attention_over_packed_rows_compiles_without_spills(arch):
    """In float32 with 128 numbers per head, a few bytes may."""
    variants = check_triton.prefix_variants(arch)
    wrong = [text for v in variants for text in check_triton.problems(v, arch)]
    assert not wrong


def test_work_of_a_packed_row():
    """By hand: a prompt of 128 and two completions of 64, two heads that share their keys."""
    forward, _, backward = check_triton.prefix_work(128, [64, 64], 2, 1)
    # Prompt blocks see 1 and 2 tiles of keys; each completion sees its prompt's 2 and its own.
    assert "8 programs     18 tiles of 64 x 64" in forward
    # Key blocks of 64: 8 and 6 steps of 32 rows from the prompt's, 2 from each completion's.
    assert "4 programs     36 tiles of 32 x 64" in backward
    causal = 128 * 129 // 2 + 2 * 64 * 65 // 2 + 128 * 128
    assert f"({causal / (9 * 64 * 64):3.0%} of their pairs needed)" in forward


@pytest.mark.parametrize("arch", check_triton.ARCHS)
def test_wide_loads_stay_wide_in_the_machine_code(arch, tmp_path):
    """One kernel for all: the disassembler takes a second to start."""
    compiled = check_triton.build(check_triton.variants()[0], arch)
    (tmp_path / "k.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / "k.cubin"]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide = check_triton.resources(compiled)["wide_loads"]
    assert len(re.findall(r"\bLDG\.\S*128", sass)) == wide > 0


def specialisation(kernel, device_arguments, **flags):
    """What a launch with these arguments is compiled for."""
    target = make_backend(GPUTarget("cuda", 90, 32))
    names = list(kernel.signature.parameters)
    make_key = kernel_key_function(kernel, target)
    return make_key(**{name: (device_arguments | flags)[name] for name in names})


def kernel_key_function(kernel, target):
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(kernel.signature, kernel.params, target)

    def key(**arguments):
        _, specialization, _ = binder(**arguments)
        return [str(entry) for entry in specialization]

    return key


def launch_arguments(kernel, t, temperature, offset=0):
    """As the launches make them, for (4, t, 64) logits; vectors begin `offset` elements in."""
    logits = torch.zeros(4, t, 64)
    _, rows = triton_rows.rows_of(logits)
    vector = torch.zeros(1000)[offset:]
    ids = torch.zeros(1000, dtype=torch.int64)[offset:]
    mask = torch.zeros(1000, dtype=torch.uint8)[offset:]
    values = {"Z": logits, "OUT": logits, "IDS": ids, "SEQUENCE": ids, "MASK": mask}
    values |= dict(zip(
        ("inner", "stride_outer", "stride_inner", "stride_v"),
        triton_rows._addresses(rows), strict=True,
    ))  # fmt: skip
    values |= {"out_outer": rows.outer_stride, "out_inner": rows.inner_stride, "out_v": 1}
    values |= {"vocab": rows.vocab, "inv_temp": 1 / temperature, "blocks": t, "beta": 0.04 * t}
    values |= {"low": 0.8, "high": 1.2, "delta": 0.0, "num_generations": t}
    flags = ("HAS_LOGPS", "HAS_ENTROPY", "HAS_SCALE", "HAS_OLD", "HAS_REF", "HAS_DELTA",
             "HAS_FACTOR", "KL_RATIO", "FROM_REWARDS", "CONTIGUOUS", "OUT_CONTIGUOUS")  # fmt: skip
    values |= dict.fromkeys(flags, True)
    values |= {"UNIT": rows.unit, "BLOCK": 4096, "GROUP_BLOCK": 8, "EPS": 1e-4}
    values |= {"KL": 3, "POLICY": 0}
    names = kernel.signature.parameters
    return {name: values.get(name, vector) for name in names}


@pytest.mark.parametrize(
    "name",
    ["rows_forward_kernel", "grpo_forward_kernel", "rows_backward_kernel", "tile_backward_kernel"],
)
def test_a_new_completion_length_or_temperature_compiles_nothing(name):
    kernel = getattr(triton_rows, name)
    keys = {
        tuple(specialisation(kernel, launch_arguments(kernel, t, temperature, offset)))
        for t, temperature, offset in [(1, 1.0, 0), (5, 0.9, 1), (16, 1.0, 2), (17, 0.5, 7)]
    }
    assert len(keys) == 1


DECODE_SIZES = {
    "prompt_attention_kernel": ("prompt", "splits", "rows", "scale"),
    "own_attention_kernel": ("prompts", "own", "splits", "rows", "scale"),
    "rotate_kernel": ("own", "eps"),
}


@pytest.mark.parametrize("name", list(DECODE_SIZES))
def test_other_caches_and_row_counts_compile_nothing(name):
    kernel = getattr(triton_decode, name)
    keys = set()
    for number in (1, 5, 16, 64, 300):
        arguments = dict.fromkeys(kernel.signature.parameters, 16)
        arguments |= {key: torch.zeros(16) for key in arguments if key.isupper() and len(key) > 4}
        arguments |= dict.fromkeys(DECODE_SIZES[name], number)
        arguments |= {"scale": number / 7, "eps": number / 7}
        constants = [param.name for param in kernel.params if param.is_constexpr]
        arguments |= dict.fromkeys(constants, 16)
        arguments |= {key: torch.zeros(16) for key in ("M", "S", "ACC", "OUT")}
        keys.add(tuple(specialisation(kernel, arguments)))
    assert len(keys) == 1


@pytest.mark.parametrize(
    "name", ["forward_kernel", "backward_query_kernel", "backward_key_kernel", "sum_shares_kernel"]
)
def test_other_packed_rows_compile_nothing(name):
    kernel, keys = getattr(triton_prefix_attention, name), set()
    for number in (1, 5, 16, 64, 300):
        arguments = {key: torch.zeros(16) for key in kernel.signature.parameters if key.isupper()}
        arguments |= {param.name: 16 for param in kernel.params if param.is_constexpr}
        arguments |= {key: 1536 for key in kernel.signature.parameters if not key.isupper()}
        arguments |= {"length": number, "scale": number / 7}
        keys.add(tuple(specialisation(kernel, arguments)))
    assert len(keys) == 1


def test_the_key_would_tell():
    """A vocabulary that is no multiple of 16 is another kernel: the test above can fail."""
    kernel = triton_rows.rows_forward_kernel
    arguments = launch_arguments(kernel, 5, 1.0)
    assert specialisation(kernel, arguments) != specialisation(kernel, arguments | {"UNIT": 1})


def test_cpu_tensors_take_the_reference_unless_interpreted(monkeypatch):
    assert backend.triton_for(torch.zeros(2)) is None
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert backend.triton_for(torch.zeros(2)) is triton_rows
    assert backend.triton_for(torch.zeros(2, dtype=torch.float64)) is None


def test_without_triton_the_reference_is_said_once(monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setitem(sys.modules, "virft_fast.kernels.triton_rows", None)
    monkeypatch.delattr("virft_fast.kernels.triton_rows", raising=False)
    backend._module.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no Triton, the torch reference"):
            assert backend.triton_for(torch.zeros(2)) is None
        assert backend.triton_for(torch.zeros(2)) is None  # a second warning would be an error
    finally:
        backend._module.cache_clear()
