"""What the compile check compiles: both kernels for each number of slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .forward import key_blocks_kernel, row_blocks_kernel


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options); the same for every compute capability."""
    for N in (1, 2, 4, 8):
        for name, kernel, sizes, num_warps in (
            ("row blocks", row_blocks_kernel, {"N": N}, 1),
            ("key blocks", key_blocks_kernel, {"N": N, "BLOCK": 256}, 4),
        ):
            tensors = ("bounds", "row_blocks", "key_blocks")
            signature = {n: "constexpr" if n in sizes else "*i32" if n in tensors else "i32" for n in kernel.arg_names}
            yield f"{name} N={N}", kernel, signature, sizes, {"num_warps": num_warps}
