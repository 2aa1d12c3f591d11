"""What the compile check compiles: head dims and dtypes, then each feature once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .forward import rotate_kernel
from .launch import WARPS, meta

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# head dim, rotary dim, dtype, interleaved
CASES = (
    (64, 64, "bf16", False),
    (128, 128, "bf16", False),
    (256, 256, "bf16", False),
    (256, 256, "fp32", False),
    (80, 80, "fp16", False),
    (96, 48, "bf16", False),
    (128, 128, "bf16", True),
    (96, 48, "fp32", True),
)


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options); the same for every compute capability."""
    for D, rotary_dim, dtype, interleaved in CASES:
        constexprs = {**meta(D, rotary_dim, 4 if dtype == "fp32" else 2), "STEP": 8, "INTERLEAVED": interleaved}
        types = {"x": POINTERS[dtype], "out": POINTERS[dtype], "cos": "*fp32", "sin": "*fp32"}
        types |= dict.fromkeys(constexprs, "constexpr")
        signature = {n: types.get(n, "i32") for n in rotate_kernel.arg_names}
        name = f"D={D} rotary={rotary_dim} {dtype}{' interleaved' if interleaved else ''}"
        yield name, rotate_kernel, signature, constexprs, {"num_warps": WARPS}
