"""What the compile check compiles: every tile row with default features, then each feature once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import tiles
from .forward import count_chunks_kernel, rotate_append_kernel
from .launch import meta

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
INT32 = ("length", "status", "counts")
DEFAULTS = {"INTERLEAVED": False, "BOUNDED": False, "HAS_ROLE": False, "HAS_COUNTS": False, "SEGMENT": 1}
# head dim, rotary dim, dtype, feature: the first five are the rows of the table
CASES: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (32, 32, "bf16", {}),
    (64, 64, "bf16", {}),
    (128, 128, "bf16", {}),
    (256, 256, "bf16", {}),
    (256, 256, "fp32", {}),
    (128, 128, "fp16", {}),
    (96, 48, "bf16", {}),
    (80, 80, "bf16", {}),
    (128, 0, "bf16", {}),
    (128, 128, "bf16", {"INTERLEAVED": True}),
    (128, 128, "bf16", {"BOUNDED": True}),
    (128, 128, "bf16", {"HAS_ROLE": True, "SEGMENT": 0}),
    (128, 128, "bf16", {"HAS_ROLE": True, "HAS_COUNTS": True, "SEGMENT": 0}),
)


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) for one compute capability."""
    for D, rotary_dim, dtype, feature in CASES:
        constexprs = {
            **DEFAULTS,
            **meta(D, rotary_dim, tiles.tile(D * (4 if dtype == "fp32" else 2))),
            **feature,
        }
        options = {"num_warps": constexprs.pop("num_warps")}
        signature = {n: _type(n, dtype, constexprs) for n in rotate_append_kernel.arg_names}
        name = f"D={D} rotary={rotary_dim} {dtype} {' '.join(feature).lower()}".strip()
        yield name, rotate_append_kernel, signature, constexprs, options
    constexprs = {"COUNT": tiles.COUNT}
    signature = {n: _type(n, "bf16", constexprs) for n in count_chunks_kernel.arg_names}
    yield "count chunks", count_chunks_kernel, signature, constexprs, {"num_warps": 4}


def _type(argument: str, dtype: str, constexprs: dict[str, Any]) -> str:
    if argument in constexprs:
        return "constexpr"
    if argument in ("cos", "sin"):
        return "*fp32"
    if argument in INT32:
        return "*i32"
    if argument == "role":
        return "*i8"
    return POINTERS[dtype] if argument in ("k", "v", "source_k", "source_v", "target_k", "target_v") else "i32"
