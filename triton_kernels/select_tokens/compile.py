"""What the compile check compiles: a threshold alone, the k best, and everything at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .forward import select_tokens_kernel
from .launch import BLOCK, WARPS

PLAIN = {"THRESHOLD": True, "LIMIT": False, "LARGEST": True, "HAS_INDEX": False, "HAS_COUNT": False, "BLOCK": BLOCK}
CASES: dict[str, dict[str, Any]] = {
    "threshold": {},
    "k": {"THRESHOLD": False, "LIMIT": True},
    "all": {"LIMIT": True, "LARGEST": False, "HAS_INDEX": True, "HAS_COUNT": True},
}


def local_allowed(name: str) -> int:
    """Bytes of local memory per thread: the few that ptxas prefers to more registers here, a different handful in each
    version; none of them is inside the loads."""
    return 64


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options); the same for every compute capability."""
    for name, feature in CASES.items():
        constexprs = {**PLAIN, **feature}
        types = {"scores": "*fp32", "threshold": "fp32"}
        types |= dict.fromkeys(("index", "count", "kept", "kept_count"), "*i32")
        types |= dict.fromkeys(constexprs, "constexpr")
        signature = {n: types.get(n, "i32") for n in select_tokens_kernel.arg_names}
        yield name, select_tokens_kernel, signature, constexprs, {"num_warps": WARPS}
