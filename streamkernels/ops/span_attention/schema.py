"""`streamkernels::span_attention` and its backward: schemas, implementations and fakes over plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...reference import span_attention as reference
from ...reference.attend_rows import compute_dtype

OP = "span_attention"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")

# what forward and backward take behind their own tensors; softcap 0 is none
OPTIONS = (
    "Tensor bounds, int[] rules, Tensor? sink_key, Tensor? kept, Tensor? kept_count, Tensor? key_class, "
    "Tensor? row_class, Tensor? class_rules, Tensor? class_sink, Tensor? sink_logits, "
    "Tensor? row_blocks, Tensor? key_blocks, float scale, float softcap, str backend"
)
SINK_LOGITS = 9  # the place of sink_logits among them
TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define(f"{OP}(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor o, Tensor lse)", tags=TAGS)
LIBRARY.define(
    f"{OP}_backward(Tensor do, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink_logits)",
    tags=TAGS,
)


def run(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """What `torch.ops.streamkernels.span_attention` does, without the dispatcher."""
    *given, backend = options
    if backend != "reference":
        room = {"triton": triton, "cuda": cuda}[backend]
        return room.span_attention(q, k, v, *given)  # type: ignore[attr-defined]
    spans, sink_logits, scale, softcap = _read(given)
    return reference.span_attention(q, k, v, spans, sink_logits, scale=scale, softcap=softcap)


def run_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the backward op does, without the dispatcher; dlse None is zeros, and d sink_logits None without them."""
    *given, backend = options
    if backend != "reference":
        return {"triton": triton, "cuda": cuda}[backend].span_attention_backward(do, dlse, q, k, v, o, lse, *given)
    spans, sink_logits, scale, softcap = _read(given)
    if dlse is None:
        dlse = torch.zeros_like(lse)
    return reference.span_attention_backward(
        do, dlse, q, k, v, o, lse, spans, sink_logits, scale=scale, softcap=softcap
    )


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dsink_logits = run_backward(*arguments)
    return dq, dk, dv, dq.new_empty(0) if dsink_logits is None else dsink_logits


def _read(options: list[Any]) -> tuple[reference.SpanTensors, Tensor | None, float, float]:
    *spans, sink_logits, _row_blocks, _key_blocks, scale, softcap = options
    return reference.SpanTensors(*spans), sink_logits, scale, softcap


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _rows_first(q), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


def _fake_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sink_logits = options[SINK_LOGITS]
    dsink_logits = q.new_empty(0) if sink_logits is None else sink_logits.new_empty(sink_logits.shape)
    return _rows_first(q), _rows_first(k), _rows_first(v), dsink_logits


def _rows_first(x: Tensor) -> Tensor:
    # [B, H, T, D] stored [B, T, H, D], which is how models go on with it
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


for name, implementation, fake in ((OP, run, _fake_forward), (f"{OP}_backward", _backward, _fake_backward)):
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"streamkernels::{name}", fake, lib=LIBRARY)
