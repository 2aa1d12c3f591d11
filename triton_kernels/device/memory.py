"""Memory for what a launch makes, without the price of asking for it in public; and what calls of one look share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")
# calls of so many kinds are remembered; beyond, all are forgotten and made anew: no compilation, only host time
MOST = 1024

Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


class Memory:
    """Uninitialised tensors of a device: by the function that torch.compile's code calls, at half the price of the
    public one, where the device is the current one."""

    def __init__(self, device: torch.device) -> None:
        guards = getattr(torch._C._dynamo, "guards", None) if device.type == "cuda" else None
        self.device, self.quick = device, getattr(guards, "_empty_strided_cuda", None)

    def here(self) -> Empty:
        """What makes a tensor of sizes, strides and dtype, until another device becomes the current one."""
        if self.quick is not None and torch._C._cuda_getDevice() == self.device.index:
            return self.quick
        return self._ordinary

    def _ordinary(self, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(sizes, strides, dtype=dtype, device=self.device)


Form = tuple[tuple[int, ...], tuple[int, ...]]


def packed(*sizes: int) -> Form:
    """Sizes and strides of a contiguous tensor."""
    strides = [1]
    for size in sizes[:0:-1]:
        strides.insert(0, strides[0] * size)
    return sizes, tuple(strides)


def rows_first(B: int, heads: int, rows: int, D: int) -> Form:
    """Sizes and strides of [B, heads, rows, D] stored [B, rows, heads, D]."""
    return (B, heads, rows, D), (rows * heads * D, D, heads * D, 1)


def remembered(plans: dict[Any, Plan], key: Any, make: Callable[[], Plan]) -> Plan:
    """The plan kept under `key`, made if there is none."""
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST:
            plans.clear()
        plan = plans[key] = make()
    return plan
