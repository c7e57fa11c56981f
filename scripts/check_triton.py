"""Compile every Triton kernel ahead of time, without a GPU: python scripts/check_triton.py

Prints registers, spills, shared memory, 128-bit loads and how many programs fit on a
multiprocessor, for each variant on each architecture. Fails on a spill (float32 attention with 128
numbers per head may have a few bytes), on more registers or shared memory than the variant may
have, and if aligned numbers aren't read 128 bits at a time. Rows are aligned except those of odd
vocabularies (UNIT 1) and of strided columns.

For attention over packed rows, also prints the work of a row, and the time that an H200 would need
if it only computed at its peak, or only moved memory. These are bounds from the data sheet; nothing
is measured.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any, ClassVar

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from virft_fast.kernels import PrefixLayout
from virft_fast.kernels import triton_decode as decode
from virft_fast.kernels import triton_prefix_attention as prefix
from virft_fast.kernels import triton_rows as rows
from virft_fast.kernels import triton_sampling as sampling
from virft_fast.kernels import triton_speculation as speculation

ARCHS = (80, 90)
DECODE_ARCHS = (80, 90, 100)
MAX_REGISTERS = 128  # with 4 warps: at least four programs per multiprocessor
# CUDA programming guide, table of compute capabilities: bytes of shared memory of a block, and of a
# multiprocessor.
SHARED = {80: (163 << 10, 164 << 10), 90: (227 << 10, 228 << 10), 100: (227 << 10, 228 << 10)}
PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12  # an H200's data sheet: bfloat16 without sparsity; memory
POINTERS = {
    "IDS": "*i64", "MASK": "*u8", "SEQUENCE": "*i64",
    **dict.fromkeys(
        ["LOGPS", "NORMS", "ENTROPY", "ADVANTAGES", "WEIGHTS", "OLD", "REF", "FACTOR", "KL_OUT",
         "LOSS", "D_LOGPS", "CLIPPED", "GRAD_LOGPS", "GRAD_ENTROPY", "SCALE", "M", "S", "ACC",
         "LOGITS", "BIAS", "HIGHEST", "LOW", "LSE", "DELTA", "SHARES", "ALL_LOGPS"], "*fp32",
    ),
    **dict.fromkeys(["STARTS", "BLOCKS", "ITEMS", "SPLIT"], "*i32"),
    **dict.fromkeys(
        ["LENGTHS", "FIRST_ROWS", "POSITIONS", "SEEDS", "TOKENS", "POOL", "TABLE", "DRAWN",
         "COUNTERS", "ACTIVE", "SLOTS", "GOES_ON", "KEPT"], "*i64",
    ),
    "SEEN": "*u8", "SUMS": "*fp64",
}  # fmt: skip
FLOATS = ("inv_temp", "beta", "low", "high", "delta", "scale", "eps", "temperature", "penalty",
          "log_min_p")  # fmt: skip
STRIDES = ("stride_outer", "stride_inner", "stride_v", "out_outer", "out_inner", "out_v")


@dataclass(frozen=True)
class Variant:
    kernel: Any
    logits: str
    out: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        dtypes = self.logits if self.out is None else f"{self.logits}->{self.out}"
        on = [name for name, value in self.flags.items() if value is True]
        on += [name for name in ("UNIT=1",) if not self.aligned]
        on += [
            f"not {name}" for name in ("CONTIGUOUS", "OUT_CONTIGUOUS") if not self.constants[name]
        ]
        return f"{self.kernel.__name__} {dtypes} {' '.join(on)}".strip()

    @property
    def constants(self) -> dict[str, Any]:
        return {"UNIT": 16, "CONTIGUOUS": True, "OUT_CONTIGUOUS": True} | self.flags

    @property
    def aligned(self) -> bool:
        return self.constants["UNIT"] == 16

    max_registers: ClassVar[int] = MAX_REGISTERS
    max_spilled: ClassVar[int] = 0

    @property
    def warps(self) -> int:
        backward = self.kernel is rows.rows_backward_kernel
        return rows.BACKWARD_WARPS if backward else rows.FORWARD_WARPS

    @property
    def wide(self) -> bool:
        """Whether its rows can be read 128 bits at a time."""
        return self.aligned and self.constants["CONTIGUOUS"]


def variants() -> list[Variant]:
    """The variants that the public functions launch."""
    loss = {"GROUP_BLOCK": 8, "EPS": 1e-4, "KL": 3, "FROM_REWARDS": True, "POLICY": 0,
            "HAS_FACTOR": False, "KL_RATIO": False}  # fmt: skip
    full = loss | {"HAS_OLD": True, "HAS_REF": True, "HAS_DELTA": True, "HAS_FACTOR": True,
                   "KL_RATIO": True}  # fmt: skip
    plain = loss | {"HAS_OLD": False, "HAS_REF": False, "HAS_DELTA": False, "FROM_REWARDS": False}
    capped, soft = (full | {"POLICY": policy, "HAS_DELTA": False} for policy in (1, 2))
    both = {"HAS_LOGPS": True, "HAS_ENTROPY": True}
    one = {"HAS_LOGPS": True, "HAS_ENTROPY": False}
    entropy = {"HAS_LOGPS": False, "HAS_ENTROPY": True}
    # Rows: aligned; of an odd vocabulary; with strided columns, read only or also written.
    odd = {"UNIT": 1}
    strided = odd | {"CONTIGUOUS": False}
    apart = strided | {"OUT_CONTIGUOUS": False}
    found = [Variant(rows.rows_forward_kernel, dtype) for dtype in ("fp32", "bf16", "fp16")]
    found += [Variant(rows.rows_forward_kernel, "bf16", flags=flags) for flags in (odd, strided)]
    found += [
        Variant(rows.grpo_forward_kernel, dtype, flags=flags)
        for dtype in ("fp32", "bf16")
        for flags in (full, plain, capped, soft)
    ]
    found += [
        Variant(rows.grpo_forward_kernel, dtype, flags=full | more)
        for dtype, more in (("fp16", {}), ("bf16", odd), ("fp32", odd), ("bf16", strided))
    ]
    found += [
        Variant(rows.rows_backward_kernel, dtype, dtype, flags | {"HAS_SCALE": scaled})
        for dtype in ("fp32", "bf16")
        for flags, scaled in (
            (both, False), (one, True), (entropy, False), (both | odd, True), (both | apart, True),
        )
    ]  # fmt: skip
    found += [
        Variant(rows.rows_backward_kernel, "fp16", "fp16", both | more | {"HAS_SCALE": False})
        for more in ({}, odd, strided, apart)
    ]
    found += [
        Variant(rows.tile_backward_kernel, "fp32", "bf16", flags)
        for flags in (both, one, entropy, both | odd)
    ]
    return found


@dataclass(frozen=True)
class DecodeVariant:
    """A kernel of a decoding step or of packed attention; 16-byte aligned tensors of `dtype`."""

    kernel: Any
    dtype: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    max_registers: int = MAX_REGISTERS
    max_spilled: int = 0
    wide: bool = True

    @property
    def name(self) -> str:
        telling = ("Q", "REPEATS", "E", "BM", "BN", "SEEN", "GREEDY", "D")
        shown = [f"{name}={self.constants[name]}" for name in telling if name in self.constants]
        return f"{self.kernel.__name__} {self.dtype} {' '.join(shown)}"


def decode_variants(arch: int) -> list[DecodeVariant]:
    """The variants that `kernels.decode` and `kernels.sampling` launch for Qwen models."""
    found = []
    # (dtype, heads per key/value head, tokens, head size): the 2B, 7B and 72B models, two
    # others, and Gemma 3.
    for dtype, repeats, tokens, size in (
        ("bf16", 6, 1, 128), ("bf16", 7, 4, 128), ("bf16", 3, 1, 80), ("fp32", 8, 8, 128),
        ("fp32", 2, 1, 16), ("bf16", 2, 8, 256),
    ):  # fmt: skip
        bits = 16 if dtype == "bf16" else 32
        largest = decode.queries_block(bits, arch // 10)
        shape = {"Q": tokens, "K": 2, "REPEATS": repeats, "E": size, "BE": decode._pad(size),
                 "BN": decode.keys_block(bits, size), "TILES": 2, "WIDE": False}  # fmt: skip
        for kernel, group in (
            (decode.prompt_attention_kernel, 8), (decode.own_attention_kernel, 1)
        ):  # fmt: skip
            block = decode._pad(group * repeats * tokens, largest)
            # One program per multiprocessor is enough, so it may have all registers.
            found.append(DecodeVariant(
                kernel, dtype, shape | {"BM": block}, stages=decode.STAGES[bits], max_registers=255
            ))  # fmt: skip
    for dtype in ("bf16", "fp32"):
        heads = {"Q": 1, "H": 12, "K": 2, "E": 128, "HALF": 64}
        found += [
            DecodeVariant(decode.rotate_kernel, dtype, heads, warps=1, wide=False),
            DecodeVariant(decode.silu_mul_kernel, dtype,
                          {"SIZE": 8960, "BLOCK": decode.ELEMENTS_BLOCK}),
        ]  # fmt: skip
        for size, block in ((1536, 2048), (8192, 8192)):
            constants = {"D": size, "BLOCK": block}
            warps = decode.norm_warps(block)
            found.append(DecodeVariant(decode.add_rms_norm_kernel, dtype, constants, warps))
    common = {"HIGHEST_BLOCK": 128, "BLOCKS": 128, "GREEDY": False, "HAS_K": True, "TOP_P": 0.9,
              "BLOCK": sampling.BLOCK, "Q": 4}  # fmt: skip
    for flags in (common | {"SEEN": None, "LOW": None}, common):
        kernels = (sampling.highest_kernel, sampling.sum_kernel, sampling.draw_kernel)
        found += [DecodeVariant(kernel, "fp32", flags, sampling.WARPS) for kernel in kernels]
        greedy = flags | {"GREEDY": True}
        found.append(DecodeVariant(sampling.draw_kernel, "fp32", greedy, sampling.WARPS))
        search = {name: value for name, value in flags.items() if name != "LOW"}
        found.append(DecodeVariant(sampling.filter_kernel, "fp32", search, sampling.SEARCH_WARPS))
    for flags in ({"Q": 1, "SEEN": None}, {"Q": 8}):
        found.append(DecodeVariant(speculation.keep_kernel, "fp32", flags, warps=1, wide=False))
    found.append(DecodeVariant(speculation.guess_kernel, "fp32", {}, warps=1, wide=False))
    return found


def prefix_variants(arch: int) -> list[DecodeVariant]:
    """The variants that `kernels.prefix_attention` launches for Qwen models, and other heads."""
    found = []
    for dtype, size in (("bf16", 128), ("bf16", 80), ("bf16", 16), ("fp32", 128)):
        most = 128 if dtype == "fp32" else 0
        for kernel, tiles in PREFIX_KERNELS:
            queries, keys, warps, stages = tiles[32 if dtype == "fp32" else 16, min(arch, 90)]
            shape = {"REPEATS": 6, "E": size, "BE": prefix._pad(size), "BM": queries, "BN": keys,
                     "WIDE": False}  # fmt: skip
            found.append(DecodeVariant(kernel, dtype, shape, warps, stages, 255, most))
        shape = {"E": size, "BE": prefix._pad(size), "BN": keys}
        found.append(DecodeVariant(prefix.sum_shares_kernel, dtype, shape, max_registers=255))
    return found


PREFIX_KERNELS = (
    (prefix.forward_kernel, prefix.FORWARD), (prefix.backward_query_kernel, prefix.BACKWARD_QUERY),
    (prefix.backward_key_kernel, prefix.BACKWARD_KEY),
)  # fmt: skip


def prefix_work(prompt: int, completions: list[int], heads: int, kv_heads: int) -> list[str]:
    """One line for each kernel: the tiles, products and bytes of a row of one group in bfloat16 on
    Hopper. Every tensor is read or written once, as if caches were large enough."""
    size, layout = 128, PrefixLayout.from_lengths([prompt], [completions])
    length = layout.num_tokens
    causal = sum(n * (n + 1) // 2 for n in (prompt, *completions))
    pairs = heads * (causal + prompt * (length - prompt))
    query, key = 2 * length * heads * size, 2 * length * kv_heads * size  # bytes
    lines = []
    for (kernel, tiles), products, moved in zip(
        PREFIX_KERNELS, (2, 3, 4), (2 * query + 2 * key, 4 * query + 2 * key, 2 * query + 4 * key),
        strict=True,
    ):  # fmt: skip
        queries, keys, *_ = tiles[16, 90]
        items, _, shares = layout.key_blocks(queries, keys, heads, heads // kv_heads)
        blocks = layout.query_blocks(queries)
        if kernel is prefix.backward_key_kernel:
            programs = kv_heads * len(items)
            steps = kv_heads * int((items[:, 5] - items[:, 4]).sum())
            moved += 2 * shares * kv_heads * 2 * keys * size * 4
        else:
            programs = heads * len(blocks)
            spans = (blocks[:, 4] - blocks[:, 3], blocks[:, 1] - blocks[:, 2])
            steps = heads * int(sum(-(-span // keys) for span in spans).sum())
        moved += 4 * length * heads  # the log-sum-exp
        flops = 2 * products * size * steps * queries * keys
        needed = 2 * products * size * pairs / flops
        lines.append(
            f"{kernel.__name__:22} {programs:5,} programs {steps:6,} tiles of {queries} x {keys} "
            f"({needed:3.0%} of their pairs needed) {flops / 1e9:6.1f} GFLOP, at least "
            f"{1e6 * flops / PEAK_FLOPS:.0f} us; {moved / 1e6:6.1f} MB, at least "
            f"{1e6 * moved / PEAK_BYTES:.0f} us"
        )
    return lines


def build_decode(variant: DecodeVariant, arch: int) -> Any:
    """The compiled kernel, with vocabularies and strides that are multiples of 16."""
    signature, constexprs, attrs = {}, {}, {}
    for position, param in enumerate(variant.kernel.params):
        name = param.name
        if param.is_constexpr:
            signature[name], constexprs[name] = "constexpr", variant.constants[name]
        elif name in variant.constants:  # None
            signature[name], constexprs[name] = "constexpr", variant.constants[name]
        elif name.isupper():
            signature[name] = POINTERS.get(name, f"*{variant.dtype}")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        aligned = name == "vocab" or name.endswith(("_row", "_head"))
        if name.isupper() and signature[name] != "constexpr" or aligned:
            attrs[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def build(variant: Variant | DecodeVariant, arch: int) -> Any:
    """The compiled kernel; needs neither a GPU nor a driver."""
    if isinstance(variant, DecodeVariant):
        return build_decode(variant, arch)
    constants = variant.constants
    backward = variant.kernel is rows.rows_backward_kernel
    constants["BLOCK"] = rows.BACKWARD_BLOCK if backward else rows.FORWARD_BLOCK
    if not (constants["CONTIGUOUS"] and constants["OUT_CONTIGUOUS"]):
        constants["BLOCK"] = rows.STRIDED_BLOCK
    elif variant.kernel is rows.tile_backward_kernel and not variant.aligned:
        constants["BLOCK"] = rows.ODD_TILE_BLOCK
    signature, constexprs, attrs = {}, {}, {}
    for position, param in enumerate(variant.kernel.params):
        name = param.name
        if param.is_constexpr:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name in ("Z", "OUT"):
            signature[name] = f"*{variant.logits if name == 'Z' else variant.out}"
            attrs[(position,)] = [["tt.divisibility", 16]]
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        else:
            signature[name] = "fp32" if name in FLOATS else "i64" if name in STRIDES else "i32"
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": variant.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers and bytes of local memory of the machine code, 128-bit loads of the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    wide = re.findall(
        r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)\b|\bcp\.async\.cg\b", compiled.asm["ptx"]
    )
    return {
        "registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared, "wide_loads": len(wide),
    }  # fmt: skip


def occupancy(found: dict[str, int], warps: int, arch: int) -> int:
    """How many programs fit on a multiprocessor at a time, of 65,536 registers and 64 warps."""
    registers = -(-found["registers"] // 8) * 8 * 32 * warps
    shared = found["shared"] + 1024  # that CUDA itself takes
    return min(65_536 // registers, SHARED[arch][1] // shared, 64 // warps, 32)


def problems(variant: Variant | DecodeVariant, arch: int) -> list[str]:
    """Compile, print one line, and return what is wrong."""
    found = resources(build(variant, arch))
    print(
        f"sm_{arch} {variant.name:76} {found['registers']:4} registers {found['spilled']:4} bytes "
        f"spilled {found['shared']:6} bytes shared {found['wide_loads']:3} 128-bit loads "
        f"{occupancy(found, variant.warps, arch):2} at a time"
    )
    wrong = []
    if found["spilled"] > variant.max_spilled:
        wrong.append(
            f"expected at most {variant.max_spilled} bytes spilled, got {found['spilled']}"
        )
    if found["shared"] > SHARED[arch][0]:
        wrong.append(f"expected at most {SHARED[arch][0]} bytes shared, got {found['shared']}")
    most = variant.max_registers
    if found["registers"] > most:
        wrong.append(f"expected at most {most} registers, got {found['registers']}")
    if variant.wide and not found["wide_loads"]:
        wrong.append("expected 128-bit loads, got none")
    return [f"sm_{arch} {variant.name}: {text}" for text in wrong]


def main() -> int:
    checked = [(arch, v) for arch in ARCHS for v in variants()]
    checked += [(arch, v) for arch in DECODE_ARCHS for v in decode_variants(arch)]
    checked += [(arch, v) for arch in DECODE_ARCHS for v in prefix_variants(arch)]
    wrong = [text for arch, variant in checked for text in problems(variant, arch)]
    for heads, kv_heads in ((12, 2), (28, 4)):  # the 2B and 7B models
        for prompt, completions in ((650, [200] * 8), (1300, [30, 60, 120, 250] * 2)):
            print(f"P {prompt}, C {completions}, H {heads}, K {kv_heads}, E 128, bfloat16:")
            print("\n".join(prefix_work(prompt, completions, heads, kv_heads)))
    print("\n".join(wrong) or f"{len(checked)} kernels, nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
