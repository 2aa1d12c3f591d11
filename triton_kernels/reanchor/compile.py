"""What the compile check compiles: rotary dims and dtypes, both kinds of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .forward import reanchor_kernel
from .launch import WARPS, meta

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# rotary dim, dtype, interleaved
CASES = (
    (64, "bf16", False),
    (128, "bf16", False),
    (256, "fp32", False),
    (48, "fp16", False),
    (128, "bf16", True),
    (48, "fp32", True),
)


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options); the same for every compute capability."""
    for rotary_dim, dtype, interleaved in CASES:
        constexprs = {**meta(rotary_dim, 4 if dtype == "fp32" else 2), "STEP": 8, "INTERLEAVED": interleaved}
        types = {"x": POINTERS[dtype], "cos": "*fp32", "sin": "*fp32"} | dict.fromkeys(constexprs, "constexpr")
        signature = {n: types.get(n, "i32") for n in reanchor_kernel.arg_names}
        name = f"rotary={rotary_dim} {dtype}{' interleaved' if interleaved else ''}"
        yield name, reanchor_kernel, signature, constexprs, {"num_warps": WARPS}
