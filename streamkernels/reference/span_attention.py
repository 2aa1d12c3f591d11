"""Attention under spans: which key counts for which row, and how often; the arithmetic is `attend_rows`.

Key j of slot n counts for row i of sample b iff `begin <= j < end` of `bounds[b, i, n]`, and j is in `kept[b, head]`
when the slot is KEPT, and `class_rules[row_class[b, i], key_class[b, j]]` is not SKIP. Its mass lands on v_j when the
slot is ATTEND or KEPT and the class rule is ATTEND. Otherwise it stays in the denominator, and its mass
  - is dropped where the slot or the class says MASS,
  - lands on `v[sink_key[b, n]]` in a SINK slot,
  - lands on `v[class_sink[b]]` where only the class says SINK;
a sink key outside [0, S) drops it.

Slots add up: a key in two slots of a row counts twice, each time under its slot's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.spans import ATTEND, KEPT, MASS, SINK, SKIP
from .attend_rows import Visible, attend_rows, attend_rows_backward, compute_dtype, sink_logits_gradient


class SpanTensors(NamedTuple):
    """The content of a `core.spans.Spans` as plain tensors and ints, in the order of the registered op."""

    bounds: Tensor  # int32 [B, T, N, 2]
    rules: Sequence[int]  # N
    sink_key: Tensor | None = None  # int32 [B, N]
    kept: Tensor | None = None  # int32 [B, HK, K]
    kept_count: Tensor | None = None  # int32 [B, HK]
    key_class: Tensor | None = None  # int8 [B, S]
    row_class: Tensor | None = None  # int8 [B, T]
    class_rules: Tensor | None = None  # int8 [row classes, key classes]
    class_sink: Tensor | None = None  # int32 [B]


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: SpanTensors,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, HK, S, D] -> o [B, H, T, D] in q's dtype, lse [B, H, T] in fp32 (fp64 for fp64)."""
    o, lse = attend_rows(
        q,
        k,
        v,
        visible_rows(spans, k.shape[2], q.dtype),
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        row_elements=_row_elements(spans, k.shape[2]),
    )
    return o.to(q.dtype), lse


def span_attention_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spans: SpanTensors,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v, and d sink_logits [H], which is empty without sink_logits."""
    dq, dk, dv = attend_rows_backward(
        do,
        dlse,
        q,
        k,
        v,
        o,
        lse,
        visible_rows(spans, k.shape[2], q.dtype),
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        row_elements=_row_elements(spans, k.shape[2]),
    )
    if sink_logits is None:
        dsink_logits = q.new_empty(0)
    else:
        dsink_logits = sink_logits_gradient(do, o, lse, sink_logits).to(sink_logits.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink_logits


def visible_rows(spans: SpanTensors, S: int, dtype: torch.dtype) -> Callable[[slice], Visible]:
    """What `attend_rows` asks for: the `Visible` of a slice of rows, for q of `dtype`. Reads no value on the host."""
    dtype = compute_dtype(dtype)
    key = torch.arange(S, dtype=torch.int32, device=spans.bounds.device)
    plain = spans.class_rules is None and all(rule == ATTEND for rule in spans.rules)
    in_kept = None if spans.kept is None else kept_mask(spans.kept, spans.kept_count, S).unsqueeze(2)

    def inside(rows: slice) -> Tensor:
        # [B, c, N, S]: in which slots of a row does a key lie
        begin, end = spans.bounds[:, rows].unsqueeze(-2).unbind(-1)
        return (key >= begin) & (key < end)

    def plainly_visible(rows: slice) -> Visible:
        slots = inside(rows)
        count = slots[:, :, 0] if slots.shape[2] == 1 else slots.sum(2, dtype=dtype)
        return Visible(count.unsqueeze(1))

    def visible(rows: slice) -> Visible:
        by_class = _rule_by_class(spans, rows)
        count = own = sunk_by_class = torch.zeros((), dtype=dtype, device=key.device)
        sunk = []
        for n, (slot, rule) in enumerate(zip(inside(rows).unsqueeze(1).unbind(3), spans.rules, strict=True)):
            seen = slot & (by_class != SKIP)
            if rule == KEPT and in_kept is not None:
                seen = seen & in_kept
            count = count + seen.to(dtype)
            if rule in (ATTEND, KEPT):
                own = own + (seen & (by_class == ATTEND)).to(dtype)
                sunk_by_class = sunk_by_class + (seen & (by_class == SINK)).to(dtype)
            elif rule == SINK and spans.sink_key is not None:
                sunk.append(((seen & (by_class != MASS)).to(dtype), key == spans.sink_key[:, n, None]))
        if spans.class_sink is not None:
            sunk.append((sunk_by_class, key == spans.class_sink[:, None]))
        times = count.clamp(min=1)
        return Visible(count, (own / times).expand_as(count), tuple((share / times, at) for share, at in sunk))

    return plainly_visible if plain else visible


def kept_mask(kept: Tensor, kept_count: Tensor | None, S: int) -> Tensor:
    """bool [B, HK, S]: the keys among the first `kept_count` entries of `kept`; what is outside [0, S) is ignored."""
    named = (kept >= 0) & (kept < S)
    if kept_count is not None:
        named &= torch.arange(kept.shape[-1], device=kept.device) < kept_count.unsqueeze(-1)
    # one place more than there are keys takes what is not named
    mask = torch.zeros((*kept.shape[:2], S + 1), dtype=torch.bool, device=kept.device)
    mask.scatter_(-1, torch.where(named, kept, S).long(), True)
    return mask[..., :S]


def _rule_by_class(spans: SpanTensors, rows: slice) -> Tensor:
    # int8 [B, 1, c, S], one ATTEND without classes; a class outside the table is the nearest one in it
    if spans.class_rules is None or spans.row_class is None or spans.key_class is None:
        return torch.full((1, 1, 1, 1), int(ATTEND), dtype=torch.int8, device=spans.bounds.device)
    row = spans.row_class[:, rows].long().clamp(0, spans.class_rules.shape[0] - 1)
    key = spans.key_class.long().clamp(0, spans.class_rules.shape[1] - 1)
    return spans.class_rules[row.unsqueeze(2), key.unsqueeze(1)].unsqueeze(1)


def _row_elements(spans: SpanTensors, S: int) -> int:
    # `inside` holds every slot of a row at once
    B, _, N, _ = spans.bounds.shape
    return B * N * S
