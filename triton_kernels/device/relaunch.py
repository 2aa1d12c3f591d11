"""A compiled kernel as the extension launches it again: the addresses of a call's tensors, and all else as it was."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

# Triton's types of numbers
_PACKED = {"i32": "<i", "i64": "<q", "fp32": "<f"}


def prepare(native: Any, compiled: Any, grid: tuple[int, ...], makers: list[Any], rest: tuple[Any, ...]) -> Any:
    """What the extension (`native`) launches again: the parameters of the kernel, by the types that Triton gave its
    arguments; None for a kind of launch or of argument that is not among those known here.

    makers: of the first arguments, what makes a tensor map and has the `sizes` behind it, or None; rest: the values of
    the last arguments.
    """
    try:
        return _prepare(native, compiled, grid, makers, rest)
    except (AttributeError, TypeError, ValueError, struct.error):
        return None


def _prepare(native: Any, compiled: Any, grid: tuple[int, ...], makers: list[Any], rest: tuple[Any, ...]) -> Any:
    metadata, types = compiled.metadata, list(compiled.src.signature.values())
    run, given = compiled.run, len(types) - len(rest)
    if metadata.num_ctas != 1 or run.launch_cooperative_grid or run.launch_pdl:
        return None
    parameters: list[tuple[str, int, bytes]] = []
    for i, kind in enumerate(types):
        make = makers[i] if i < len(makers) else None
        if kind == "constexpr":
            continue
        if make is not None and make.sizes and kind.startswith("tensordesc"):
            parameters.append(("m", i, b""))
            parameters += [("n", 0, number) for number in make.sizes]
        elif i < given and kind[0] == "*":
            parameters.append(("p", i, b""))
        elif i >= given and kind in _PACKED:
            parameters.append(("n", 0, struct.pack(_PACKED[kind], rest[i - given])))
        else:
            return None
    launch = _driver_launch()
    if launch is None:
        return None
    # scratch memory, of which there is none
    parameters += [("n", 0, bytes(8))] * 2
    over = lambda place, x: makers[place](x)[0]  # noqa: E731
    return native.make_relaunch(
        launch, compiled.function, list(grid), 32 * metadata.num_warps, metadata.shared, given, parameters, over
    )


@functools.cache
def _driver_launch() -> int | None:
    """The address of the driver's cuLaunchKernelEx."""
    try:
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
