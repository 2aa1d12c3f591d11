"""One forward and backward of span_attention on the inputs of a case, and its accuracy, output by output."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from .compare import assert_accurate
from .inputs import Inputs

NAMES = ("o", "lse", "dq", "dk", "dv", "dsink_logits")


def forward_and_backward(fn: Callable[..., tuple[Tensor, Tensor]], x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    """(o, lse, dq, dk, dv[, dsink_logits]) of `fn(q, k, v, spans, scale=, softcap=, sink_logits=, **options)` -> (o,
    lse)."""
    leaves = x.leaves()
    sink_logits = leaves[3] if len(leaves) == 4 else None
    o, lse = fn(*leaves[:3], x.spans, scale=x.scale, softcap=x.softcap, sink_logits=sink_logits, **options)
    loss = (o * x.do).sum(dtype=lse.dtype) + (lse * x.dlse)[lse > -inf].sum()
    return (o.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


def assert_all_accurate(
    x: Inputs, ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> None:
    """`assert_accurate` for each of what `forward_and_backward` returns."""
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=False):
        if name == "dsink_logits":
            # a sum over all rows and dims of numbers that were rounded to the case's dtype
            terms = (x.do * exact[0]).abs().sum((0, 2, 3))
            assert_accurate(name, a, b, c, terms=terms, dtype=x.q.dtype)
        else:
            assert_accurate(name, a, b, c)
