"""`span_attention`: checks, the choice of a backend, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.shapes import FLOATS, Shapes, check_number, refuse
from ...core.spans import ATTEND, KEPT, MASS, SINK, Rule, Spans
from ...reference.prepare import BLOCK
from ...reference.span_attention import SpanTensors
from ..known import Known, look_of, undispatched, wants_gradient
from . import autograd as autograd
from .schema import OP, run

SLOT_COUNTS = (1, 2, 4, 8)


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans | Tensor,
    *,
    rules: Sequence[Rule | int] | None = None,
    sink_key: Tensor | None = None,
    kept: Tensor | None = None,
    kept_count: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    prepared: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which every query row sees a few intervals of keys.

    o = softmax(scale q k^T) v over the keys of the row's spans; what rules other than ATTEND change is told in `Spans`.

    Args:
        q: [B, H, T, D], bf16, fp16, fp32 (fp64: reference), any strides, last stride 1. D a multiple of 8 up to 256.
        k, v: [B, HK, S, D] of q's dtype and device, H a multiple of HK; head h of q reads head h // (H // HK).
        spans: a `Spans`, or its bounds alone: int32 [B, T, N, 2], (begin, end) in [0, S), N in 1, 2, 4, 8. The spans
            of a row are disjoint (a key in two slots counts twice, on every backend alike), end <= begin is empty, and
            what lies outside the buffer is clipped.
        rules: one rule per slot, default ATTEND. This and the next three only with bounds: a `Spans` has its own.
        sink_key: int32 [B, N], the key whose value takes the mass of a SINK slot; other entries are ignored.
        kept: int32 [B, HK, K], ascending and unique: the keys that KEPT slots see.
        kept_count: int32 [B, HK]: how many entries of `kept` count.
        scale: default 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        sink_logits: [H] of q's dtype or fp32: a learned logit per head that joins the denominator of the softmax and
            has no value (gpt-oss, arXiv 2508.10925, section 2.2).
        prepared: what `prepare(spans, S)` returned, to share it between layers.
        return_lse: also return lse.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        o [B, H, T, D] in q's dtype, stored [B, T, H, D]. With `return_lse` (o, lse), lse [B, H, T] in fp32 (fp64 for
        fp64): the natural log of the sum of exp(score) over the visible keys, without sink_logits. A row that sees
        nothing has o = 0, lse = -inf and zero gradients. Differentiable once, in q, k, v and sink_logits, through o and
        lse. Keys that a row does not see may hold NaN or Inf, as may values that MASS and SINK drop; a row that uses
        one becomes NaN. Nothing is mutated.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value. Only metadata is checked,
            without a sync; `Spans.validate` checks the numbers.
        NotImplementedError: a named backend that cannot run the call, or a backward through the backward.
    """
    look = None
    if type(spans) is Spans and rules is None and sink_key is None and kept is None and kept_count is None:
        given = _tensors_of(spans)
        look = _look_of(q, k, v, given, sink_logits, prepared, scale, softcap, backend)
        if (known := _known.get(look)) is not None:
            own_rules, *outcome = known
            o, lse = _attend(q, k, v, given._replace(rules=own_rules), sink_logits, prepared or (None, None), *outcome)
            return (o, lse) if return_lse else o
    shapes = Shapes(OP)
    shapes.tensor("q", q, "B H T D", dtype=FLOATS, unit_last_stride=True)
    shapes.tensor("k", k, "B HK S D", dtype=q.dtype, unit_last_stride=True)
    shapes.tensor("v", v, "B HK S D", dtype=q.dtype, unit_last_stride=True)
    shapes.heads()
    given = _read_spans(shapes, spans, rules, sink_key, kept, kept_count)
    scale = shapes["D"] ** -0.5 if scale is None else check_number(OP, "scale", scale)
    softcap = 0.0 if softcap is None else check_number(OP, "softcap", softcap, positive=True)
    if sink_logits is not None:
        dtypes = torch.float32 if q.dtype == torch.float32 else (q.dtype, torch.float32)
        shapes.tensor("sink_logits", sink_logits, "H", dtype=dtypes)
    row_blocks, key_blocks = (None, None) if prepared is None else _read_prepared(shapes, prepared)
    needs_grad = wants_gradient(q, k, v, sink_logits)
    features = {
        "softcap": softcap != 0.0,
        "sink_logits": sink_logits is not None,
        "classes": given.class_rules is not None,
        "scale": scale <= 0,
        "backward": needs_grad,
        **{rule.name.lower(): rule in given.rules for rule in (MASS, SINK, KEPT)},
    }
    used = frozenset(name for name, present in features.items() if present)
    chosen = choose(Call(OP, q.device, q.dtype, dict(shapes.sizes), used), backend)
    outcome = [float(scale), float(softcap), chosen, needs_grad]
    o, lse = _attend(q, k, v, given, sink_logits, (row_blocks, key_blocks), *outcome)
    _known.keep(look, (given.rules, *outcome))
    return (o, lse) if return_lse else o


_known = Known()


def _look_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: SpanTensors,
    sink_logits: Tensor | None,
    prepared: tuple[Tensor, Tensor] | None,
    *options: Any,
) -> Any:
    blocks = () if prepared is None else prepared
    if type(blocks) is not tuple:
        return None
    bounds, rules, *lists = given
    look = look_of((q, k, v, sink_logits, bounds, *lists, *blocks), (*options, prepared is None, *rules))
    return look and (look, wants_gradient(q, k, v, sink_logits))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: SpanTensors,
    sink_logits: Tensor | None,
    blocks: tuple[Tensor | None, Tensor | None],
    scale: float,
    softcap: float,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    rest = (*given, sink_logits, *blocks, scale, softcap, backend)
    if not undispatched(q, k, v):
        o, lse = torch.ops.streamkernels.span_attention(q, k, v, *rest)
    elif needs_grad:
        o, lse = autograd.Undispatched.apply(q, k, v, sink_logits, rest)
    else:
        o, lse = run(q, k, v, *rest)
    return o, lse


def _tensors_of(spans: Spans) -> SpanTensors:
    return SpanTensors(
        spans.bounds, spans.rules, spans.sink_key, spans.kept, spans.kept_count,
        spans.key_class, spans.row_class, spans.class_rules, spans.class_sink,
    )  # fmt: skip


def _read_spans(
    shapes: Shapes,
    spans: Spans | Tensor,
    rules: Sequence[Rule | int] | None,
    sink_key: Tensor | None,
    kept: Tensor | None,
    kept_count: Tensor | None,
) -> SpanTensors:
    """Both ways of giving spans in one form, checked against the shapes of q, k and v."""
    if isinstance(spans, Spans):
        for name, x in (("rules", rules), ("sink_key", sink_key), ("kept", kept), ("kept_count", kept_count)):
            if x is not None:
                refuse(OP, name, "None beside a Spans, which has its own", x)
        given = _tensors_of(spans)
        rules = spans.rules
    else:
        given = SpanTensors(spans, (), sink_key, kept, kept_count)
    N = shapes.tensor("spans", given.bounds, "B T N 2", dtype=torch.int32).shape[2]
    if N not in SLOT_COUNTS:
        refuse(OP, "spans", "1, 2, 4 or 8 slots (fill up with empty spans)", f"{N} slots")
    given = given._replace(rules=_read_rules(rules, N))
    for name, letters, dtype in (
        ("sink_key", "B N", torch.int32),
        ("kept", "B HK K", torch.int32),
        ("kept_count", "B HK", torch.int32),
        ("key_class", "B S", torch.int8),
        ("row_class", "B T", torch.int8),
        ("class_rules", "RC KC", torch.int8),
        ("class_sink", "B", torch.int32),
    ):
        x = getattr(given, name)
        if x is not None:
            shapes.tensor(name, x, letters, dtype=dtype)
    if not isinstance(spans, Spans):
        _check_companions(given)
    return given


def _read_rules(rules: Sequence[int] | None, N: int) -> tuple[int, ...]:
    if rules is None:
        return (int(ATTEND),) * N
    if not isinstance(rules, (tuple, list)) or len(rules) != N:
        refuse(OP, "rules", f"{N} rules, one per slot", rules)
    if any(isinstance(rule, bool) or rule not in (ATTEND, MASS, SINK, KEPT) for rule in rules):
        refuse(OP, "rules", "ATTEND, MASS, SINK or KEPT in every slot", rules)
    return tuple(int(rule) for rule in rules)


def _check_companions(given: SpanTensors) -> None:
    # an option that no slot uses would change nothing and say nothing
    for rule, names in ((SINK, ("sink_key",)), (KEPT, ("kept", "kept_count"))):
        for name in names:
            x = getattr(given, name)
            if rule in given.rules and x is None:
                refuse(OP, name, f"a tensor, because a slot has the rule {rule.name}", x)
            if rule not in given.rules and x is not None:
                refuse(OP, name, f"None, because no slot has the rule {rule.name}", x)


def _read_prepared(shapes: Shapes, prepared: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(prepared, tuple) or len(prepared) != 2:
        refuse(OP, "prepared", "the pair of tensors that prepare(spans, S) returns", prepared, TypeError)
    row_blocks, key_blocks = prepared
    # letters, not numbers in the text: a length that becomes text would compile anew for every length
    shapes.sizes["TB"], shapes.sizes["SB"] = ((shapes[x] + BLOCK - 1) // BLOCK for x in ("T", "S"))
    shapes.tensor("prepared[0]", row_blocks, "B TB N 4", dtype=torch.int32)
    shapes.tensor("prepared[1]", key_blocks, "B SB 4", dtype=torch.int32)
    return row_blocks, key_blocks
