"""What the compile check compiles: each tile, each element size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .forward import compact_kernel
from .launch import INTEGERS, TILES, WARPS


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options); the same for every compute capability."""
    for widest, (block_k, block_q) in TILES.items():
        for size in INTEGERS:
            constexprs = {"STEP": 1 if widest == 8 else 16, "BLOCK_K": block_k, "BLOCK_Q": block_q}
            types = {"x": f"*i{8 * size}", "out": f"*i{8 * size}", "index": "*i32", "count": "*i32"}
            types |= dict.fromkeys(constexprs, "constexpr")
            signature = {n: types.get(n, "i32") for n in compact_kernel.arg_names}
            yield f"{block_k} rows, {size} bytes", compact_kernel, signature, constexprs, {"num_warps": WARPS}
