"""The raw call of `streamkernels::incremental_prefill`, and its gradient in this call's rows; what the cache held
before is constant."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...core.cache import SOURCE, TARGET, Staged, StreamCache
from ..known import undispatched
from .schema import OP, run


class Options(NamedTuple):
    """What a call says beside its rows, as the registered op takes it: begins and limits int32 [B, T] or None, softcap
    0 for none."""

    source_limit: Tensor | None
    source_begin: Tensor | None
    target_begin: Tensor | None
    sinks: tuple[int, int]
    scale: float
    softcap: float
    interleaved: bool
    backend: str


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    sink_logits: Tensor | None,
    staged: Staged,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The registered op on a staged layer -> o [B, H, T, D], lse [B, H, T]; its implementation itself where
    nothing listens to the dispatcher."""
    source_window, target_window = staged.windows[0] or 0, staged.windows[1] or 0
    op = run if undispatched(q, k, v) else torch.ops.streamkernels.incremental_prefill
    o, lse = op(
        q, k, v, cos, sin,
        staged.source_k, staged.source_v, staged.target_k, staged.target_v,
        staged.length, staged.status, staged.role, staged.segment,
        options.source_limit, options.source_begin, options.target_begin, None, *options.sinks,
        staged.sinks, staged.bounded, source_window, target_window,
        options.scale, options.softcap, sink_logits, options.interleaved, options.backend,
    )  # fmt: skip
    return o, lse


class IncrementalPrefill(torch.autograd.Function):
    """`attend` with gradients for q, k, v and sink_logits, through o and lse, once.

    Saved are this call's rows; the keys of earlier calls are read from the cache again, which must not have been
    rearranged. Rows that were written, committed or discarded since lie behind the length of the forward and do not
    matter, nor does growth.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_logits: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        cache: StreamCache,
        layer: int,
        staged: Staged,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        o, lse = attend(q, k, v, cos, sin, sink_logits, staged, options)
        # the length is live: a commit moves it
        ctx.save_for_backward(
            q, k, v, o, lse, sink_logits, cos, sin, staged.length.clone(), staged.role,
            options.source_limit, options.source_begin, options.target_begin,
        )  # fmt: skip
        ctx.cache, ctx.layer, ctx.epoch, ctx.segment, ctx.options = cache, layer, cache.epoch, staged.segment, options
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.cache.epoch != ctx.epoch:
            raise RuntimeError(
                f"{OP}: cache: expected the keys that the forward saw, got a cache that was "
                "rearranged since (pop, evict, keep, reanchor, reset, rollback, select, reorder): call backward first"
            )
        q, k, v, o, lse, sink_logits, cos, sin, length, role, *limits = ctx.saved_tensors
        options: Options = ctx.options
        dq, dk, dv, dsink_logits = torch.ops.streamkernels.incremental_prefill_backward(
            torch.zeros_like(o) if do is None else do, dlse, q, k, v, o, lse, cos, sin,
            *ctx.cache.segment(ctx.layer, SOURCE), *ctx.cache.segment(ctx.layer, TARGET), length, role, ctx.segment,
            *limits, None, *options.sinks,
            options.scale, options.softcap, sink_logits, options.interleaved, options.backend,
        )  # fmt: skip
        return dq, dk, dv, None if sink_logits is None else dsink_logits, None, None, None, None, None, None
