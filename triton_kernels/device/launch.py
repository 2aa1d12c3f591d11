"""Calls of a kernel that were made before, made again without looking at every argument.

Triton finds the compiled form of a call by the type, alignment and special values of each argument: 40 us for the 45
arguments of an attention kernel, more than a short kernel runs. What decides the form, a caller knows from its own few
tensors: `signature` of those is the key under which it keeps a `Launch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Plan = TypeVar("Plan")
# calls of so many kinds are remembered; beyond, all are forgotten and made anew: no compilation, only host time
MOST = 1024


def signature(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All that a call's compiled form and strides can depend on: sizes, strides, dtypes and alignment; of absent
    tensors their absence."""
    return tuple(x if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors)


def remembered(plans: dict[Any, Plan], key: Any, make: Callable[[], Plan]) -> Plan:
    """The plan kept under `key`, made if there is none."""
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST:
            plans.clear()
        plan = plans[key] = make()
    return plan


class Launch:
    """A kernel on a grid with its constants. Calls after the first promise arguments of the first one's form."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self.grid = (*grid, 1, 1)[:3]
        self.again: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self.again is not None:
            self.again(*arguments, *self.tail)
            return
        compiled = self.kernel[self.grid](*arguments, **self.constants)
        # None in Triton's interpreter, where every call is a first one
        self.again = compiled and compiled[self.grid]
        self.tail = [self.constants[name] for name in self.kernel.arg_names[len(arguments) :]]


class Box:
    """The tensor-memory descriptor of tiles [1, 1, block, columns] over tensors of one shape [B, heads, length, D]."""

    def __init__(self, x: Tensor, block: int, columns: int) -> None:
        # the stride of a dim of size 1 is never used but must be valid
        strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride(), x.shape, strict=True)]
        checked = TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, block, columns])
        # not the tensor: a plan must not keep it alive
        self.fields = {name: value for name, value in vars(checked).items() if name != "base"}

    def over(self, x: Tensor) -> TensorDescriptor:
        """The descriptor of `x`, which has the shape and strides that were checked."""
        descriptor = object.__new__(TensorDescriptor)
        vars(descriptor).update(self.fields, base=x)
        return descriptor
