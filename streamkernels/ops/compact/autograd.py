"""The gradient of `streamkernels::compact` puts rows back; both are linear, and each is the other's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gradient import register_gradient
from .schema import LIBRARY, OP


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, count, ctx.dim, ctx.backend = inputs
    ctx.save_for_backward(index, count)
    ctx.S = x.shape[ctx.dim]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.streamkernels.compact_backward(dy, *ctx.saved_tensors, ctx.S, ctx.dim, ctx.backend)
    return dx, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, count, _, ctx.dim, ctx.backend = inputs
    ctx.save_for_backward(index, count)


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    ddy = torch.ops.streamkernels.compact(ddx, *ctx.saved_tensors, ctx.dim, ctx.backend)
    return ddy, None, None, None, None, None


register_gradient(LIBRARY, OP, _backward, _save)
register_gradient(LIBRARY, f"{OP}_backward", _backward_backward, _save_backward)
