"""What the compile check compiles: every tile row with as many key as query heads, then each feature once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from .forward import token_scores_kernel
from .launch import meta

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# HK, R, D, dtype, softcap
CASES = (
    *((32, 1, D, dtype, False) for D in (16, 32, 64, 128, 256) for dtype in ("fp16", "fp32")),
    (32, 1, 128, "bf16", False),
    (32, 1, 80, "fp16", False),
    (40, 1, 128, "fp16", False),
    (8, 4, 128, "bf16", False),
    (4, 7, 128, "bf16", False),
    (1, 8, 64, "bf16", False),
    (4, 2, 256, "bf16", True),
)


def local_allowed(name: str) -> int:
    """Bytes of local memory per thread: the few that ptxas prefers to more registers here, a different handful in each
    version; none of them is inside the loads."""
    return 64


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options); the same for every compute capability."""
    for (HK, R, D, dtype, softcap), few in product(CASES, (False, True)):
        constexprs = meta(HK, R, D, softcap, 4 if dtype == "fp32" else 2, few)
        options = {"num_warps": constexprs.pop("num_warps")}
        signature = {n: _type(n, dtype, constexprs) for n in token_scores_kernel.arg_names}
        name = f"HK={HK} R={R} D={D} {dtype}{' softcap' if softcap else ''}{' few' if few else ''}"
        yield name, token_scores_kernel, signature, constexprs, options


def _type(argument: str, dtype: str, constexprs: dict[str, Any]) -> str:
    if argument in constexprs:
        return "constexpr"
    if argument in ("q", "o", "k", "v"):
        return POINTERS[dtype]
    if argument in ("lse", "cosine", "norm", "mass"):
        return "*fp32"
    if argument in ("index", "count"):
        return "*i32"
    return "fp32" if argument in ("scale", "inner", "outer") else "i32"
