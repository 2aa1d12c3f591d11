"""span_attention computes what the spans declare: against literal loops, the dense truth, influence and poison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import exp, inf, log, tanh

import pytest
import torch
from torch import Tensor

from streamkernels import Spans, span_attention, spans
from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK, SKIP
from streamkernels.reference import attend_rows as rows
from streamkernels.testing.cases import CPU_CASES, HALF_CASES, Case
from streamkernels.testing.compare import assert_exact, influence
from streamkernels.testing.dense import dense_attention
from streamkernels.testing.gradients import NAMES, assert_all_accurate, forward_and_backward
from streamkernels.testing.inputs import Inputs, make_inputs, poison, random_kept, random_spans, strided_like

FP64 = torch.float64


def both(*args, **kwargs) -> tuple[Tensor, Tensor]:
    return span_attention(*args, return_lse=True, **kwargs)


def declared(sp: Spans, S: int, b: int, kv_head: int, row: int) -> Iterator[tuple[int, int]]:
    """Every (key, key whose value takes its mass or -1) of a row, literally as `Spans` words it."""
    for n, rule in enumerate(sp.rules):
        begin, end = sp.bounds[b, row, n].tolist()
        for j in range(max(0, begin), min(S, end)):
            if rule == KEPT and j not in sp.kept[b, kv_head, : max(0, int(sp.kept_count[b, kv_head]))].tolist():
                continue
            by_class = ATTEND
            if sp.class_rules is not None:
                r = min(max(int(sp.row_class[b, row]), 0), sp.class_rules.shape[0] - 1)
                c = min(max(int(sp.key_class[b, j]), 0), sp.class_rules.shape[1] - 1)
                by_class = int(sp.class_rules[r, c])
            if by_class == SKIP:
                continue
            lands = j
            if rule == MASS or by_class == MASS:
                lands = -1
            elif rule == SINK:
                lands = int(sp.sink_key[b, n])
            elif by_class == SINK:
                lands = -1 if sp.class_sink is None else int(sp.class_sink[b])
            yield j, lands if 0 <= lands < S else -1


def by_loops(q, k, v, sp: Spans, *, scale, softcap=None, sink_logits=None) -> tuple[Tensor, Tensor]:
    """o and lse of one number at a time in Python floats."""
    (B, H, T, D), (HK, S) = q.shape, k.shape[1:3]
    o, lse = torch.zeros(B, H, T, D, dtype=FP64), torch.full((B, H, T), -inf, dtype=FP64)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h // (H // HK)].tolist(), v[b, h // (H // HK)].tolist()
            for i, query in enumerate(q[b, h].tolist()):
                seen = []
                for j, lands in declared(sp, S, b, h // (H // HK), i):
                    s = scale * sum(x * y for x, y in zip(query, keys[j], strict=True))
                    seen.append((softcap * tanh(s / softcap) if softcap else s, lands))
                total = sum(exp(s) for s, _ in seen)
                below = total + (exp(float(sink_logits[h])) if sink_logits is not None else 0.0)
                for s, lands in seen:
                    if lands >= 0:
                        o[b, h, i] += exp(s) / below * torch.tensor(values[lands], dtype=FP64)
                if seen:
                    lse[b, h, i] = log(total)
    return o, lse


def int32(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


SMALL = {"B": 2, "H": 4, "HK": 2, "T": 7, "S": 9, "D": 8}


def small_spans(name: str) -> Spans:
    """Spans over T = 7, S = 9 for one thing each, with garbage where garbage is allowed."""
    random = torch.Generator().manual_seed(3)
    four = random_spans(2, 7, 9, 4, random)
    kept, kept_count = random_kept(2, 2, 9, 6, random)
    classes = {
        "key_class": torch.randint(-2, 5, (2, 9), generator=random).to(torch.int8),
        "row_class": torch.randint(-2, 4, (2, 7), generator=random).to(torch.int8),
        "class_rules": torch.tensor([[ATTEND, MASS, SINK, SKIP], [SINK, ATTEND, SKIP, MASS]], dtype=torch.int8),
    }
    sink_key = int32([[0, 8, 99, 5], [-1, 3, 2, 4]])
    every = Spans(
        random_spans(2, 7, 9, 8, random).bounds,
        (SINK, KEPT, MASS, ATTEND, SINK, KEPT, ATTEND, SINK),
        sink_key[:, [0, 1, 2, 3, 1, 1, 1, 3]].contiguous(),
        kept,
        kept_count,
    )
    return {
        "attend": four,
        "one slot": random_spans(2, 7, 9, 1, random),
        "overlap": Spans(int32([[0, 5], [3, 7]]).expand(2, 7, 2, 2)),
        "overlap of rules": Spans(
            int32([[0, 6], [3, 7], [1, 9], [5, 5]]).expand(2, 7, 4, 2),
            (ATTEND, MASS, SINK, ATTEND),
            sink_key,
        ),
        "mass": Spans(four.bounds, (MASS, ATTEND, MASS, ATTEND)),
        "only mass": Spans(four.bounds, (MASS,) * 4),
        "sink": Spans(four.bounds, (ATTEND, SINK, SINK, SINK), sink_key),
        "kept": Spans(four.bounds, (KEPT, ATTEND, KEPT, MASS), None, kept, kept_count),
        "kept, garbage": Spans(
            four.bounds, (KEPT, ATTEND, KEPT, MASS), None, int32([[[-7, 2, 5, 99]] * 2] * 2), int32([[4, 9], [0, -1]])
        ),
        "every rule": every,
        "classes": replace(four, **classes, class_sink=int32([4, 8])),
        "classes, no sink": replace(four, **classes),
        "classes and rules": replace(every, **classes, class_sink=int32([9, 1])),
        "outside": Spans(int32([[-(2**31), 4], [6, 2**31 - 1]]).expand(2, 7, 2, 2)),
        "nothing": Spans(int32([[4, 4], [9, 2]]).expand(2, 7, 2, 2)),
    }[name]


SPANS = (
    "attend", "one slot", "overlap", "overlap of rules", "mass", "only mass", "sink", "kept", "kept, garbage",
    "every rule", "classes", "classes, no sink", "classes and rules", "outside", "nothing",
)  # fmt: skip


def small_inputs(name: str, softcap: float = 0.0, sink_logits: bool = False) -> Inputs:
    x = make_inputs(Case(**SMALL, mask="random", dtype=FP64, softcap=softcap, sink_logits=sink_logits))
    return replace(x, spans=small_spans(name))


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "sink_logits": True}], ids=["plain", "softcap-sinklogits"])
@pytest.mark.parametrize("name", SPANS)
def test_equals_loops(name, options):
    x = small_inputs(name, **options)
    args = (x.q, x.k, x.v, x.spans)
    kwargs = {"scale": x.scale, "softcap": x.softcap, "sink_logits": x.sink_logits}
    for what, ours, truth in zip(NAMES, both(*args, **kwargs), by_loops(*args, **kwargs), strict=False):
        assert_exact(what, ours, truth)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "sink_logits": True}], ids=["plain", "softcap-sinklogits"])
@pytest.mark.parametrize("name", SPANS)
def test_gradcheck(name, options):
    x = small_inputs(name, **options)
    leaves = x.leaves()

    def fn(q, k, v, sink_logits=None):
        o, lse = both(q, k, v, x.spans, scale=x.scale, softcap=x.softcap, sink_logits=sink_logits)
        return o, lse.masked_fill(lse == -inf, 0.0)

    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("case", [*CPU_CASES, *HALF_CASES], ids=str)
def test_accuracy(case):
    x = make_inputs(case)
    exact = forward_and_backward(dense_attention, x.to(FP64))
    for what, ours, truth in zip(NAMES, forward_and_backward(both, x.to(FP64)), exact, strict=False):
        assert_exact(what, ours, truth)
    plain, ours = forward_and_backward(dense_attention, x), forward_and_backward(both, x)
    for what, mine in zip(NAMES, ours, strict=False):
        assert mine.dtype == (case.dtype if what in ("o", "dq", "dk", "dv") else torch.float32)
    assert_all_accurate(x, ours, plain, exact)


def test_layout_and_inputs_untouched():
    x = make_inputs(CPU_CASES[6])
    before = [strided_like(t) for t in (x.q, x.k, x.v, x.spans.bounds.float(), x.sink_logits)]
    o, lse = both(x.q, x.k, x.v, x.spans, sink_logits=x.sink_logits)
    assert o.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    after = (x.q, x.k, x.v, x.spans.bounds.float(), x.sink_logits)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name in SPANS if not name.startswith("overlap")])
def test_influence_is_what_the_spans_declare(name):
    x = small_inputs(name)
    B, HK, S = x.k.shape[:3]
    for head in range(HK):
        seen, used = torch.zeros(2, B, 7, S, dtype=torch.bool)
        for b in range(B):
            for i in range(7):
                for j, lands in declared(x.spans, S, b, head, i):
                    seen[b, i, j] = True
                    if lands >= 0:
                        used[b, i, lands] = True
        group = slice(2 * head, 2 * head + 2)
        of_k = influence(lambda k: both(x.q, k, x.v, x.spans)[1][:, group].unsqueeze(-1), x.k)  # noqa: B023
        of_v = influence(lambda v: span_attention(x.q, x.k, v, x.spans)[:, group], x.v)  # noqa: B023
        assert torch.equal(of_k, seen)
        assert torch.equal(of_v, used)


@pytest.mark.parametrize("garbage", [float("nan"), inf, -inf])
@pytest.mark.parametrize("name", SPANS)
def test_poison_reaches_only_what_sees_it(name, garbage):
    x = small_inputs(name, softcap=2.0, sink_logits=True)
    B, HK, S = x.k.shape[:3]
    bad = torch.rand(B, 1, S, generator=torch.Generator().manual_seed(1)) < 0.2
    # keys that sinks name: a row that sends nothing there must not notice
    bad[0, 0, 8], bad[0, 0, 4], bad[1, 0, 3] = True, True, True
    clean = forward_and_backward(both, x)
    for what in ("k", "v"):
        hit = torch.zeros(B, HK, 7, dtype=torch.bool)
        seen, used = torch.zeros(2, B, HK, S, dtype=torch.bool)
        for b, head, i in torch.cartesian_prod(torch.arange(B), torch.arange(HK), torch.arange(7)).tolist():
            keys = list(declared(x.spans, S, b, head, i))
            if any(bad[b, 0, j if what == "k" else lands] for j, lands in keys if what == "k" or lands >= 0):
                hit[b, head, i] = True
                for j, lands in keys:
                    seen[b, head, j] = True
                    if lands >= 0:
                        used[b, head, lands] = True
        o, lse, dq, dk, dv, _ = forward_and_backward(both, replace(x, **{what: poison(getattr(x, what), bad, garbage)}))
        rows_hit = hit.repeat_interleave(2, 1)
        for ours, expected in ((o, clean[0]), (lse, clean[1]), (dq, clean[2])):
            assert torch.equal(ours[~rows_hit], expected[~rows_hit])
        if what == "v" or garbage != garbage:
            # an infinite key can be a legal score under a softcap
            assert bool(o[rows_hit].isnan().all())
        # and only what such a row sees or uses gets its gradient
        assert torch.equal(dk[~seen], clean[3][~seen])
        assert torch.equal(dv[~used], clean[4][~used])


def test_values_that_are_dropped_may_be_anything():
    x = make_inputs(Case(**{**SMALL, "S": 9}, mask="random", dtype=FP64))
    bounds = int32([[0, 3], [3, 6]]).expand(2, 7, 2, 2)
    dropped = torch.zeros(2, 1, 9, dtype=torch.bool)
    dropped[:, :, 3:6] = True
    for sp in (
        Spans(bounds, (ATTEND, MASS)),
        Spans(bounds, (ATTEND, SINK), sink_key=int32([[-1, 1], [-1, 2]])),
        Spans(bounds, (ATTEND, SINK), sink_key=int32([[-1, 9], [-1, -7]])),
    ):
        clean = forward_and_backward(both, replace(x, spans=sp))
        dirty = forward_and_backward(both, replace(x, spans=sp, v=poison(x.v, dropped)))
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_rows_that_see_nothing_leak_nothing():
    x = make_inputs(Case(**SMALL, mask="random", dtype=FP64, sink_logits=True))
    bounds = spans.bottom_right([7, 7], [9, 9]).bounds.clone()
    bounds[:, 2] = 0
    x = replace(x, spans=Spans(bounds))
    q, do, dlse = x.q.clone(), x.do.clone(), x.dlse.clone()
    q[:, :, 2], do[:, :, 2], dlse[:, :, 2] = float("nan"), float("nan"), float("nan")
    o, lse = both(q, x.k, x.v, x.spans, sink_logits=x.sink_logits)
    assert bool((o[:, :, 2] == 0).all()) and bool((lse[:, :, 2] == -inf).all())
    options = (*(None,) * 7, x.sink_logits, None, None, 0.3, 0.0, "reference")
    grads = torch.ops.streamkernels.span_attention_backward(do, dlse, q, x.k, x.v, o, lse, bounds, [0], *options)
    clean_q = q.nan_to_num(0.0)
    o, lse = both(clean_q, x.k, x.v, x.spans, sink_logits=x.sink_logits)
    grads_clean = torch.ops.streamkernels.span_attention_backward(
        x.do, x.dlse, clean_q, x.k, x.v, o, lse, bounds, [0], *options
    )
    assert bool((grads[0][:, :, 2] == 0).all())
    for a, b in zip(grads, grads_clean, strict=True):
        assert torch.equal(a, b)


def test_a_bad_gradient_stays_in_its_row_and_what_it_sees():
    x = make_inputs(Case(1, 2, 1, 6, 6, 8, "causal", dtype=FP64))
    do = x.do.clone()
    do[:, 0, 3, 2] = float("nan")
    clean, dirty = (forward_and_backward(both, replace(x, do=g)) for g in (x.do, do))
    assert bool(dirty[3][:, :, :4].isnan().all()) and torch.equal(dirty[3][:, :, 4:], clean[3][:, :, 4:])
    assert bool(dirty[4][:, :, :4].isnan().all()) and torch.equal(dirty[4][:, :, 4:], clean[4][:, :, 4:])
    keep = torch.ones(1, 2, 6, dtype=torch.bool)
    keep[0, 0, 3] = False
    assert torch.equal(dirty[2][keep], clean[2][keep]) and bool(dirty[2][~keep].isnan().all())


@pytest.mark.parametrize("T, S", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(T, S):
    x = make_inputs(Case(2, 2, 1, T, S, 8, "empty", dtype=FP64, layout="bhtd"))
    o, lse, dq, dk, dv = forward_and_backward(both, x)
    assert o.shape == (2, 2, T, 8) and bool((o == 0).all()) and bool((lse == -inf).all())
    assert dk.shape == dv.shape == (2, 1, S, 8) and not bool(dk.any()) and not bool(dq.any())


def test_rows_in_chunks_equal_rows_at_once(monkeypatch):
    x = small_inputs("classes and rules", softcap=2.0, sink_logits=True)
    whole = forward_and_backward(both, x)
    monkeypatch.setitem(rows.CHUNK_ELEMENTS, "cpu", 2 * 2 * 4 * 9)
    for name, a, b in zip(NAMES, forward_and_backward(both, x), whole, strict=True):
        assert_exact(name, a, b)


def test_lse_is_the_natural_log_and_leaves_the_sink_out():
    x = make_inputs(Case(1, 2, 2, 5, 5, 8, "causal", dtype=FP64, sink_logits=True))
    lse = both(x.q, x.k, x.v, x.spans, scale=x.scale, sink_logits=x.sink_logits)[1]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    assert_exact("lse", lse, (x.q @ x.k.mT * x.scale).masked_fill(~mask, -inf).logsumexp(-1))


def test_a_sink_that_is_switched_off_changes_nothing():
    x = make_inputs(Case(1, 2, 2, 5, 5, 8, "causal", dtype=FP64))
    bounds = x.spans.bounds.clone()
    bounds[:, 1] = 0
    off = torch.full((2,), -inf, dtype=FP64)
    assert torch.equal(span_attention(x.q, x.k, x.v, bounds), span_attention(x.q, x.k, x.v, bounds, sink_logits=off))
