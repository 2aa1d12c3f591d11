"""Compile every Triton tile-table row, and each feature once, for every architecture; no GPU needed.

    python tests/compile_triton.py [compute capability ...]

Prints registers, spills and shared memory per kernel, and on Hopper which kernels' warpgroup products wait for each
other one by one; exits 1 if a kernel does not compile, uses more shared memory than the architecture has, or local
memory beyond what its op's `local_allowed` grants (none by default). Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-compile-")
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamkernels.triton_kernels.compact import compile as compact
from streamkernels.triton_kernels.incremental_prefill import compile as incremental_prefill
from streamkernels.triton_kernels.prepare import compile as prepare
from streamkernels.triton_kernels.reanchor import compile as reanchor
from streamkernels.triton_kernels.rotate import compile as rotate
from streamkernels.triton_kernels.rotate_append import compile as rotate_append
from streamkernels.triton_kernels.select_tokens import compile as select_tokens
from streamkernels.triton_kernels.span_attention import compile as span_attention
from streamkernels.triton_kernels.token_scores import compile as token_scores

ARCHITECTURES = {80: 163, 90: 227, 100: 227, 120: 99}  # compute capability -> KiB of shared memory a block may have
OPS = (rotate_append, incremental_prefill, prepare, span_attention)
OPS += (token_scores, select_tokens, compact, rotate, reanchor)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes of a cubin, by the cuobjdump that ships in the triton wheel."""
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    found = {m[1]: int(m[2]) for m in re.finditer(r"(REG|STACK|LOCAL):(\d+)", text)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count:\n{text}")
    return found


def products_wait(ptx: str) -> bool:
    """Whether ptxas serialises the warpgroup products of a Hopper kernel, which it only tells who asks."""
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder, "cubin")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "wgmma.mma_async instructions are serialized" in told


# run-time numbers that are not multiples of 16: everything else a launch passes is (strides, pointers)
UNALIGNED = {"T", "S", "H", "HK", "K", "TB", "SB", "heads", "chunks", "sinks", "source_capacity", "target_capacity"}
UNALIGNED |= {"RC", "KC", "mass_n", "P", "Q", "limit", "width", "threshold", "x_p", "scores_b", "scores_k"}
UNALIGNED |= {"cos_b", "cos_t", "sin_b", "sin_t", "index_b", "index_k", "count_b", "lse_b", "lse_h"}
UNALIGNED |= {"rows_n", "tiles_n", "inner", "outer", "scale", "length_b", "length_r", "role_b", "role_t"}


def build(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], options: dict[str, int], capability: int
) -> Any:
    """Compile as the GPU would: constants by position, and the alignment that real pointers and strides have."""
    names = list(kernel.arg_names)
    constants = {(names.index(key),): value for key, value in constexprs.items()}
    unaligned = UNALIGNED | {str(n) for n in kernel.do_not_specialize or ()}
    aligned = [
        n for n in names if n not in constexprs and n not in unaligned and not signature[n].startswith("tensordesc")
    ]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@functools.cache
def cases(op: int, capability: int) -> list[tuple[Any, ...]]:
    return list(OPS[op].compile_cases(capability))


def report(case: tuple[int, int, int]) -> tuple[str, bool]:
    """The line of one kernel, and whether it is all right; a case is (op, compute capability, place)."""
    op, capability, place = case
    name, kernel, signature, constexprs, options = cases(op, capability)[place]
    line = f"{OPS[op].__name__.split('.')[-2] + ' ' + name:52} {capability:>4}"
    try:
        built = build(kernel, signature, constexprs, options, capability)
    except Exception as error:
        return f"{line} does not compile: {error}", False
    use = resources(built.asm["cubin"])
    local = use.get("LOCAL", 0) + use.get("STACK", 0)
    allowed = OPS[op].local_allowed(name) if hasattr(OPS[op], "local_allowed") else 0
    good = local <= allowed and built.metadata.shared <= ARCHITECTURES[capability] * 1024
    notes = "" if good else "  TOO MUCH"
    if capability == 90 and products_wait(built.asm["ptx"]):
        notes += "  products wait"
    return f"{line} {use['REG']:>9} {local:>6} {built.metadata.shared:>7}{notes}", good


def main() -> int:
    print(f"triton {triton.__version__}")
    print(f"{'kernel':52} {'sm':>4} {'registers':>9} {'local':>6} {'shared':>7}")
    wanted = [int(word) for word in sys.argv[1:]] or list(ARCHITECTURES)
    places = [
        (op, capability, place)
        for op in range(len(OPS))
        for capability in wanted
        for place in range(len(cases(op, capability)))
    ]
    good = 0
    # processes that start from nothing: a compiler must not be forked
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for line, fine in pool.map(report, places, chunksize=4):
            print(line, flush=True)
            good += fine
    print(f"{good} passed, {len(places) - good} failed")
    return 0 if good == len(places) else 1


if __name__ == "__main__":
    sys.exit(main())
