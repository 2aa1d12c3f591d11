"""The gradient of `streamkernels::rotate`: the rotation the other way, by the same op, so to any order.

A pair's map is `[[cos, -sin], [sin, cos]]`, whose transpose is the same map with -sin; a scale in cos and sin stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gradient import register_gradient
from .schema import LIBRARY, OP


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.backend = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError(f"{OP}: cos, sin: expected constants, got angles that require a gradient")
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return (
        torch.ops.streamkernels.rotate(do.contiguous(), cos, -sin, ctx.interleaved, ctx.backend),
        None,
        None,
        None,
        None,
    )


register_gradient(LIBRARY, OP, _backward, _save)
