"""The gradient of `streamkernels::span_attention`: its registered backward op, which has no gradient of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gradient import register_gradient
from .schema import LIBRARY, OP, SINK_LOGITS


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in (*inputs[:3], *output, *inputs[3:]) if x is None or isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.rules, (ctx.scale, ctx.softcap, ctx.backend) = inputs[4], inputs[-3:]


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, bounds, *options = ctx.saved_tensors
    dq, dk, dv, dsink_logits = torch.ops.streamkernels.span_attention_backward(
        do, dlse, q, k, v, o, lse, bounds, ctx.rules, *options, ctx.scale, ctx.softcap, ctx.backend
    )
    none: list[Tensor | None] = [None] * (len(options) + 5)
    if ctx.needs_input_grad[3 + SINK_LOGITS]:
        none[SINK_LOGITS] = dsink_logits
    return dq, dk, dv, *none


def _refuse_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(f"{OP}: expected one backward, got a backward through its backward (create_graph=True)")


register_gradient(LIBRARY, OP, _backward, _save)
register_gradient(LIBRARY, f"{OP}_backward", _refuse_twice)
