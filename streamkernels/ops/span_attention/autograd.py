"""The gradient of `streamkernels::span_attention`: its registered backward op, which has no gradient of its own; and
the same for calls that nobody looks at, without the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gradient import register_gradient
from ..known import undispatched
from .schema import LIBRARY, OP, SINK_LOGITS, run, run_backward


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


class Undispatched(torch.autograd.Function):
    """`torch.ops.streamkernels.span_attention` with its gradient where `undispatched` says that only autograd could see
    the call. `rest` are the op's other arguments in its order, sink_logits among them once more: here its gradient is
    asked for."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, rest: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        o, lse = run(q, k, v, *rest)
        bounds, ctx.rules, *options, scale, softcap, backend = rest
        ctx.save_for_backward(q, k, v, o, lse, bounds, *options)
        ctx.numbers = scale, softcap, backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if do is None and dlse is None:
            return None, None, None, None, None
        q, k, v, o, lse, bounds, *options = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        arguments = (q, k, v, o, lse, bounds, ctx.rules, *options, *ctx.numbers)
        # with create_graph=True the op refuses the backward through it; hooks may have put anything for what was saved
        plain = type(q) is type(k) is type(v) is type(o) is Tensor
        if torch.is_grad_enabled() or not plain or not undispatched(do, *(() if dlse is None else (dlse,))):
            if dlse is None:
                dlse = torch.zeros_like(lse)
            found = torch.ops.streamkernels.span_attention_backward(do, dlse, *arguments)
        else:
            found = run_backward(do, dlse, *arguments)
        dq, dk, dv, dsink_logits = found
        return dq, dk, dv, dsink_logits if ctx.needs_input_grad[3] else None, None
