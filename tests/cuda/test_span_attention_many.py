"""The CUDA kernel of span_attention for many query rows, on a Hopper GPU, against plain attention in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamkernels import Spans, span_attention, spans
from streamkernels.backends import cuda_span_attention
from streamkernels.backends.select import explain
from streamkernels.core.spans import ATTEND, MASS
from streamkernels.testing.cases import Case
from streamkernels.testing.compare import influence
from streamkernels.testing.dense import dense_attention
from streamkernels.testing.gradients import assert_all_accurate, forward_and_backward
from streamkernels.testing.graphs import assert_step_is_replayed
from streamkernels.testing.inputs import make_inputs, random_spans, spread_options

from .span_calls import both, check, check_repeated, off_borders, run

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
NAN = float("nan")
BF16, FP16 = torch.bfloat16, torch.float16

CASES = [
    Case(2, 8, 2, 777, 777, 128, "wait_k", BF16),
    Case(2, 8, 2, 777, 777, 128, "wait_k", FP16, sharp=8.0),
    Case(1, 28, 4, 65, 4161, 128, "bottom_right", BF16),
    Case(1, 28, 4, 512, 4608, 64, "bottom_right", FP16),
    Case(2, 14, 2, 1023, 1023, 64, "window", BF16),
    Case(8, 64, 8, 333, 333, 64, "window", BF16, sink_logits=True),
    Case(3, 6, 3, 300, 300, 128, "packed", BF16, layout="packed_qkv"),
    Case(2, 4, 4, 128, 128, 128, "causal", FP16, layout="bhtd"),
    Case(2, 4, 4, 129, 129, 64, "causal", FP16, layout="packed_qkv", sharp=4.0),
    Case(2, 2, 2, 70, 9, 128, "empty", BF16, sink_logits=True),
    Case(1, 2, 1, 65, 1, 128, "bottom_right", BF16),
    Case(1, 1, 1, 2048, 2048, 128, "wait_k", FP16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accurate(case: Case) -> None:
    check_repeated(make_inputs(case, "cuda"))


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("T, S", [(70, 700), (300, 65), (513, 700), (128, 4096)])
@pytest.mark.parametrize("D", [64, 128])
def test_any_spans(N: int, T: int, S: int, D: int) -> None:
    """Holes everywhere, rows that see nothing; the values of keys that nobody sees are NaN."""
    x = make_inputs(Case(2, 4, 2, T, S, D, "bottom_right" if S >= T else "empty", BF16, sink_logits=True), "cuda")
    bounds = random_spans(2, T, S, N, torch.Generator().manual_seed(T + N)).to("cuda")
    bounds.bounds[:, : T // 2].clamp_(max=S // 3)  # and keys that only rows of later blocks see
    seen = bounds.visible(S).any(2)[:, :1].expand(2, 2, S)
    x = replace(x, spans=bounds)
    check(x)
    spoiled = replace(x, k=x.k.masked_fill(~seen.unsqueeze(-1), NAN), v=x.v.masked_fill(~seen.unsqueeze(-1), NAN))
    assert all(torch.equal(a, b) for a, b in zip(run(x), run(spoiled), strict=True))


def test_bounds_far_outside_are_clipped() -> None:
    x = make_inputs(Case(1, 2, 1, 200, 190, 128, "empty", BF16), "cuda")
    far = torch.tensor([[-(2**31), 70], [150, 2**31 - 1]], dtype=torch.int32, device="cuda").repeat(1, 200, 1, 1)
    far[:, ::3, 1] = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    check(replace(x, spans=Spans(far)))


def test_scores_that_rise_and_fall() -> None:
    """Maxima that grow by far from tile to tile and in the middle of one, that shrink, and rows that see their first
    key late: weights by the maxima so far must be noticed when they are too large."""
    T, S = 256, 1024
    x = make_inputs(Case(1, 2, 1, T, S, 128, "bottom_right", FP16), "cuda")
    direction = torch.randn(128, device="cuda").sign().half()
    for heights in ([0, 30, 60, 90, 120, 150, 180, 210], [200, 0, -200, 40, 300, 0, 0, 10], [-300, 0, -5, 9] * 2):
        height = torch.tensor(heights, device="cuda").repeat_interleave(128).half()
        height[700:710] += 100
        k = (height[:, None] * direction / 128)[None, None].expand_as(x.k) + x.k * 0.01
        q = direction.expand_as(x.q) * (1 + x.q * 0.01)
        late = torch.tensor([500, S], dtype=torch.int32, device="cuda").repeat(1, T, 1, 1)
        late[:, ::2] = torch.tensor([3, 900], dtype=torch.int32, device="cuda")
        check(replace(x, q=q, k=k, spans=Spans(late), scale=1.0))


def test_nan_reaches_those_who_see_it() -> None:
    """In a key exactly those; in a value the rows beside them too, but no block of rows that does not see it."""
    x = make_inputs(Case(1, 2, 1, 300, 300, 64, "causal", BF16), "cuda")
    clean, _ = run(x)
    for name, value, first in (("k", NAN, 170), ("v", NAN, 128), ("v", float("inf"), 128)):
        other = getattr(x, name).clone()
        other[:, :, 170] = value
        o, _ = run(replace(x, **{name: other}))
        assert not o[:, :, 170:].isfinite().any() and torch.equal(o[:, :, :first], clean[:, :, :first]), (name, value)


def test_influence_is_what_the_spans_declare() -> None:
    x = make_inputs(Case(1, 2, 1, 150, 150, 64, "wait_k", BF16), "cuda")
    flows = influence(lambda v: span_attention(x.q, x.k, v, x.spans, backend="cuda"), x.v)
    assert torch.equal(flows[0].cpu(), x.spans.visible(150)[0, 0].cpu())


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sink_logits_in_both_dtypes(dtype: torch.dtype) -> None:
    x = make_inputs(Case(2, 8, 4, 100, 100, 128, "causal", dtype, sink_logits=True), "cuda")
    own = replace(x, sink_logits=x.sink_logits.to(dtype))
    check(own)
    wide = run(replace(x, sink_logits=own.sink_logits.float()))
    assert all(torch.equal(a, b) for a, b in zip(run(own), wide, strict=True))


GRADIENTS = [
    CASES[0],
    Case(2, 8, 2, 777, 777, 128, "wait_k", BF16, sharp=8.0),
    Case(1, 28, 4, 65, 4161, 128, "bottom_right", BF16),
    Case(2, 14, 2, 1023, 1023, 64, "window", BF16),
    Case(3, 6, 3, 300, 300, 128, "packed", BF16, layout="packed_qkv"),
    Case(2, 4, 4, 128, 128, 64, "causal", BF16, layout="bhtd"),
    Case(1, 32, 32, 2048, 2048, 128, "wait_k", BF16),
    CASES[5],
    Case(2, 4, 2, 200, 200, 64, "packed", FP16),
    Case(1, 8, 4, 333, 333, 128, "window", FP16, sharp=4.0, sink_logits=True),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(case: Case) -> None:
    x = make_inputs(case, "cuda")
    ours = forward_and_backward(both, x, backend="cuda")
    plain = forward_and_backward(dense_attention, x)
    exact = forward_and_backward(dense_attention, x.to(torch.float64))
    assert_all_accurate(x, ours, plain, exact)
    for _ in range(10):
        again = forward_and_backward(both, x, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("T, S, H", [(70, 700, 7), (300, 65, 2), (513, 700, 14)])
def test_gradients_of_any_spans(N: int, T: int, S: int, H: int) -> None:
    """Holes everywhere, rows that see nothing; the keys and values that nobody sees are NaN."""
    x = make_inputs(Case(2, H, 1, T, S, 128, "empty", BF16), "cuda")
    x = replace(x, spans=random_spans(2, T, S, N, torch.Generator().manual_seed(T + N)).to("cuda"))
    seen = x.spans.visible(S).any(2)[:, :1].expand(2, 1, S).unsqueeze(-1)
    spoiled = replace(x, k=x.k.masked_fill(~seen, NAN), v=x.v.masked_fill(~seen, NAN))
    plain = forward_and_backward(dense_attention, x)
    exact = forward_and_backward(dense_attention, x.to(torch.float64))
    assert_all_accurate(x, forward_and_backward(both, spoiled, backend="cuda"), plain, exact)


def test_options_of_any_strides() -> None:
    x = make_inputs(Case(2, 8, 2, 90, 150, 64, "bottom_right", BF16, sink_logits=True), "cuda")
    packed, spread = (forward_and_backward(both, y, backend="cuda") for y in (x, spread_options(x)))
    assert all(torch.equal(a, b) for a, b in zip(packed, spread, strict=True))


def test_lse_of_rows_that_see_nothing_has_no_gradient() -> None:
    """Whoever goes on with lse = -inf may well get NaN back for it."""
    x = make_inputs(Case(1, 4, 2, 200, 200, 128, "causal", BF16, sink_logits=True), "cuda")
    x.spans.bounds[:, 5:140:3] = 0
    found = []
    for value in (0.0, NAN):
        leaves = x.leaves()
        o, lse = both(*leaves[:3], x.spans, scale=x.scale, sink_logits=leaves[3])
        dlse = x.dlse.masked_fill(lse.isinf(), value)
        found.append(torch.autograd.grad((o, lse), leaves, (x.do, dlse)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_that_maps_cannot_describe_are_copied() -> None:
    x = make_inputs(Case(2, 8, 2, 90, 70, 64, "empty", BF16), "cuda")
    x = replace(x, spans=random_spans(2, 90, 70, 2, torch.Generator().manual_seed(0)).to("cuda"))
    assert all(torch.equal(a, b) for a, b in zip(run(x), run(off_borders(x)), strict=True))
    one = replace(x, k=x.k[:, :1].expand(2, 2, 70, 64), v=x.v[:1].expand(2, 2, 70, 64))
    same = replace(one, k=one.k.contiguous(), v=one.v.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(run(one), run(same), strict=True))


def test_captured_once_for_all_spans() -> None:
    T = 700
    x = make_inputs(Case(1, 28, 4, T, T, 128, "causal", BF16), "cuda")
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    for window in (T, 100, 3):
        x.spans.bounds.copy_(spans.sliding_window([T], window).bounds[:, :, : x.spans.bounds.shape[2]])
        for t in captured:
            t.fill_(NAN)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(x), strict=True))


def test_a_training_step_captured_in_a_cuda_graph() -> None:
    assert_step_is_replayed(Case(1, 28, 4, 700, 700, 128, "wait_k", BF16), "cuda")


def test_streams_at_once() -> None:
    """Each has tickets of its own, and they are zero behind every launch."""
    cases = [make_inputs(Case(1, 28, 4, T, T, 128, "wait_k", BF16), "cuda", seed=T) for T in (600, 900, 1200)]
    alone = [run(x) for x in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(30):
        found = []
        for x, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(x))
        torch.cuda.synchronize()
        for a, b in zip(alone, found, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    held = cuda_span_attention._tickets.things
    assert len(held) > 3 and all(int(tickets.count_nonzero()) == 0 for tickets in held.values())


def test_no_keys_and_no_rows() -> None:
    q = torch.randn(2, 4, 80, 64, device="cuda", dtype=BF16)
    none = torch.empty(2, 2, 0, 64, device="cuda", dtype=BF16)
    o, lse = both(q, none, none, torch.zeros(2, 80, 1, 2, dtype=torch.int32, device="cuda"))
    assert o.count_nonzero() == 0 and bool((lse == float("-inf")).all())
    o, lse = both(q[:0], none[:0], none[:0], torch.zeros(0, 80, 1, 2, dtype=torch.int32, device="cuda"))
    assert o.shape == (0, 4, 80, 64) and lse.shape == (0, 4, 80)


def test_what_it_does_not_take() -> None:
    x = make_inputs(Case(1, 2, 1, 65, 70, 128, "bottom_right", BF16), "cuda")

    def why(bounds: Tensor = x.spans.bounds, D: int = 128, rules=None, **options) -> str:
        q, k, v = (t[..., :D].contiguous() for t in (x.q, x.k, x.v))
        return explain(span_attention, q, k, v, bounds, rules=rules, **options).reasons["cuda"]

    slots = x.spans.bounds.repeat(1, 1, 4, 1)
    assert why().startswith("ok") and why(slots[:, :, :2]).startswith("ok")
    assert "at most 2 slots" in why(slots)
    assert "no MASS" in why(slots[:, :, :2], rules=(ATTEND, MASS))
    assert "not 32" in why(D=32)
    assert "no softcap" in why(softcap=3.0)
    with pytest.raises(NotImplementedError, match="no softcap"):
        run(replace(x, softcap=2.0))
