"""`compact`: checks, the choice of a backend, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.shapes import Shapes, check_int, refuse
from ..known import Known, look_of, undispatched, wants_gradient
from . import autograd as autograd
from .schema import OP, run


def compact(x: Tensor, index: Tensor, count: Tensor, *, dim: int = 1, backend: str = "auto") -> Tensor:
    """Gather the listed tokens of every sample, padded with zeros: what is left of hidden states, positions or a cache.

    Args:
        x: a tensor of any dtype and strides, samples along axis 0 and tokens along `dim`: hidden states [B, S, C] or
            position ids [B, S] (dim=1), keys or values [B, HK, S, D] (dim=2).
        index: int32 [B, K], the tokens of each sample, in the order in which they are to stand.
        count: int32 [B], how many entries of each list count.
        dim: the token axis of x, from 1 on, or negative from the end.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        A contiguous tensor of x's dtype and shape with K instead of S along `dim`. Entries from the count on, and
        indices outside [0, S), give 0. Tokens that are not listed may hold NaN. Differentiable in x (a token listed
        twice gets the sum). No synchronisation. Nothing is mutated, nothing is aliased.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or dim.
        NotImplementedError: a named backend that cannot run the call.
    """
    look = look_of((x, index, count), (dim, backend))
    if look is not None and wants_gradient(x):
        look = None
    if (known := _known.get(look)) is not None:
        op = run if undispatched(x, index, count) else torch.ops.streamkernels.compact
        return op(x, index, count, *known)
    if not isinstance(x, Tensor):
        refuse(OP, "x", "a tensor [B, ..., S, ...]", x, TypeError)
    if x.dim() < 2:
        refuse(OP, "x", "at least two axes, samples and tokens", x)
    axis = check_int(OP, "dim", dim, minimum=1 - x.dim(), maximum=x.dim() - 1) % x.dim()
    if axis == 0:
        refuse(OP, "dim", "a token axis behind axis 0, which is the batch", dim)
    shapes = Shapes(OP)
    letters = [f"C{i}" for i in range(x.dim())]
    letters[0], letters[axis] = "B", "S"
    shapes.tensor("x", x, " ".join(letters))
    shapes.tensor("index", index, "B K", dtype=torch.int32)
    shapes.tensor("count", count, "B", dtype=torch.int32)
    features = frozenset({"backward"} if torch.is_grad_enabled() and x.requires_grad else ())
    chosen = choose(Call(OP, x.device, x.dtype, dict(shapes.sizes), features), backend)
    compacted = torch.ops.streamkernels.compact(x, index, count, axis, chosen)
    _known.keep(look, (axis, chosen))
    return compacted


_known = Known()
