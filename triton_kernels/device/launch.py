"""Calls of a kernel that were made before, made again without looking at every argument.

Triton finds the compiled form of a call by the type, alignment and special values of each argument: 40 us for the 45
arguments of an attention kernel, more than a short kernel runs. What decides the form, a caller knows from its own few
tensors: `signature` of those is the key under which it keeps a `Launch` with all its numbers. The second call of a
`Launch` hands addresses and numbers to the function of Triton that passes them to the driver, below the layers that
look at them (`direct`), where this Triton is one whose layers are known; else it goes through those layers. Where the
extension is there, it hands them to the driver itself (`relaunch`).
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import relaunch

# tensor-memory descriptors that one argument of a launch remembers, by address
MOST_MAPS = 512


# the extension, where there is one (see backends/triton.py): it reads tensors itself, ten times sooner than Python
native: Any = None


def signature(*tensors: Tensor | None) -> Any:
    """All that a call's compiled form, strides and device can depend on: sizes, strides, dtypes, devices and alignment;
    of absent tensors their absence."""
    if native is not None and (found := native.signature(len(tensors), *tensors)) is not None:
        return found
    return tuple([x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) for x in tensors])


def on_device_of(x: Tensor) -> Any:
    """The context in which x's device is the current one; nothing is entered where it is so already."""
    if not x.is_cuda or torch.cuda.current_device() == x.device.index:
        return _HERE
    return torch.cuda.device(x.device)


_HERE = contextlib.nullcontext()


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


class Launch:
    """A kernel on a grid with its numbers and constants: the call's tensors come first, in the kernel's order, then
    `numbers`, then `constants` by name. The first tensors go through `boxes`, where there is one, as descriptors.

    Calls after the first promise tensors of the first one's signature (`None` for `None`).
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...] = (),
        boxes: tuple[Box | None, ...] = (),
        **constants: Any,
    ) -> None:
        self.kernel, self.numbers, self.boxes, self.constants = kernel, numbers, boxes, constants
        self.grid = (*grid, 1, 1)[:3]
        self.again: Callable[[tuple[Tensor | None, ...]], None] = self._first

    def __call__(self, *tensors: Tensor | None) -> None:
        self.again(tensors)

    def _first(self, tensors: tuple[Tensor | None, ...]) -> None:
        compiled = self.kernel[self.grid](*self._arguments(tensors), **self.constants)
        # None in Triton's interpreter, where every call is a first one; else what the second prepares may be its last
        if compiled is not None:
            self.again = lambda tensors: self._second(compiled, tensors)

    def _second(self, compiled: Any, tensors: tuple[Tensor | None, ...]) -> None:
        given = len(tensors) + len(self.numbers)
        tail = [self.constants[name] for name in self.kernel.arg_names[given:]]
        through = compiled[self.grid]

        def ordinary(tensors: tuple[Tensor | None, ...]) -> None:
            through(*self._arguments(tensors), *tail)

        self.again = direct(compiled, self.grid, self.boxes, (*self.numbers, *tail), ordinary) or ordinary
        self.again(tensors)

    def _arguments(self, tensors: tuple[Tensor | None, ...]) -> list[Any]:
        arguments: list[Any] = list(tensors)
        for i, box in enumerate(self.boxes):
            if box is not None:
                arguments[i] = box.over(arguments[i])
        return arguments + list(self.numbers)


def direct(
    compiled: Any,
    grid: tuple[int, ...],
    boxes: tuple[Box | None, ...],
    rest: tuple[Any, ...],
    ordinary: Callable[[tuple[Tensor | None, ...]], None],
) -> Callable[[tuple[Tensor | None, ...]], None] | None:
    """What launches `compiled` over tensors by their addresses; None where Triton is not one whose launcher is known.

    It does what triton.compiler.CompiledKernel's runner, triton.backends.nvidia.driver.CudaLauncher and
    `wrap_handle_tensordesc` do, without what they do for the sake of arguments that nobody has looked at. `ordinary` is
    called while somebody listens to launches (a profiler), who is to be told more.
    """
    packs = {"3.6": False, "3.7": True}.get(triton.__version__[:3])
    try:
        launcher = compiled.run
        if packs is None or type(launcher).__name__ != "CudaLauncher":
            return None
        # memory that a launch needs of its own
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return None
        hooks = knobs.runtime
        hooks.launch_enter_hook, hooks.launch_exit_hook  # noqa: B018  (a Triton without them is not known)
        make_map = sys.modules[type(launcher).__module__].make_tensordesc_arg
        launch = launcher.launch
        if any(boxes):
            # the function that turns descriptors into arguments has the one that launches in its closure
            launch = launch.__closure__[launch.__code__.co_freevars.index("launcher")].cell_contents
        driver = triton.runtime.driver.active
        device, get_stream = driver.get_current_device(), driver.get_current_stream
        behind: tuple[Any, ...] = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
        told = (compiled.packed_metadata, None, None, None)
        if packs:
            behind += (*told, None, None, launcher.arg_annotations, launcher.kernel_signature)
        else:
            behind += (None, None, *told)
        metas = iter(compiled.metadata.tensordesc_meta or [None] * len(boxes))
        makers = [box and _maps(box, next(metas), make_map) for box in boxes]
    except (AttributeError, TypeError, ValueError, StopIteration):
        return None
    boxed = len(makers)
    kernel = native and relaunch.prepare(native, compiled, grid, makers, rest)
    if kernel is not None:
        run = native.relaunch

        def sooner(tensors: tuple[Tensor | None, ...]) -> None:
            if _told(hooks) or not run(kernel, get_stream(device), *tensors):
                ordinary(tensors)

        return sooner

    def again(tensors: tuple[Tensor | None, ...]) -> None:
        if _told(hooks):
            ordinary(tensors)
            return
        arguments: list[Any] = []
        for make, x in zip(makers, tensors):  # noqa: B905  (the tensors behind have none)
            arguments += (x if x is None else x.data_ptr(),) if make is None else make(x)
        arguments += [x if x is None else x.data_ptr() for x in tensors[boxed:]]
        arguments += rest
        if packs:
            launch(*grid, get_stream(device), *behind, arguments)
        else:
            launch(*grid, get_stream(device), *behind, *arguments)

    return again


def _told(hooks: Any) -> bool:
    """Whether somebody listens to launches; hooks that are no chain are somebody's own."""
    return bool(getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True))


def _maps(box: Box, meta: Any, make_map: Callable[[Any, Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """What the launcher takes for a box over a tensor: made once per address, since all else is the box's."""
    known: dict[int, list[Any]] = {}

    def arguments(x: Tensor) -> list[Any]:
        address = x.data_ptr()
        found = known.get(address)
        if found is None:
            if len(known) >= MOST_MAPS:
                known.clear()
            # an address in place of a tensor, which would be kept alive
            found = known[address] = [y.data_ptr() if isinstance(y, Tensor) else y for y in make_map(box.over(x), meta)]
        return found

    # what follows a map: sizes and strides
    lengths, strides = box.fields["shape"], box.fields["strides"]
    sizes = [struct.pack("<i", n) for n in lengths] + [struct.pack("<q", n) for n in strides]
    arguments.sizes = None if meta is None else sizes  # type: ignore[attr-defined]
    return arguments
