"""Calls that went through once are not checked again, nor dispatched where nobody listens.

A step makes the same calls for every layer and token, and their checks take longer than their kernels. All that a check
or the choice of a backend looks at is metadata: calls that look alike have the same outcome.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.select import explaining
from ..backends.tensors import reader
from ..core.spans import Rule
from ..core.staging import watched

MOST = 4096
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = frozenset((type(None), float, int, bool, str, Rule))


def look_of(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """What tells a call from another one: the tensors' shapes, strides, dtypes and devices, and the options with their
    types; an op always gives as many. None for a call that must be checked: traced, explained, with tensors or options
    of other types."""
    if torch.compiler.is_compiling() or explaining():
        return None
    if (extension := reader()) is not None:
        return extension.look(len(tensors), *tensors, *options)
    # True is 1, and 1.0 is too
    types = tuple(type(x) for x in options)
    if not _PLAIN.issuperset(types):
        return None
    look: list[Any] = [options, types]
    for x in tensors:
        if x is None:
            look.append(None)
        elif type(x) in _TENSORS:
            look += (x.shape, x.stride(), x.dtype, x.device)
        else:
            return None
    return tuple(look)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and one of the tensors asks for it."""
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def undispatched(*tensors: Tensor) -> bool:
    """Whether no tracer, mode, subclass or function transform could see a call of a registered op: then its
    implementation can be called itself. The dispatch of thirty arguments takes longer than a kernel."""
    if watched():
        return False
    # of torch.autograd.grad(is_grads_batched=True), whose tensors are of no type of their own
    batched = torch._C._functorch.is_legacy_batchedtensor
    return all([type(x) is Tensor and not batched(x) for x in tensors])


class Known:
    """What the calls of an op came to, by their look."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}

    def get(self, look: Any) -> Any:
        return None if look is None else self._held.get(look)

    def keep(self, look: Any, outcome: Any) -> None:
        if look is None:
            return
        if len(self._held) >= MOST:
            self._held.clear()
        self._held[look] = outcome
