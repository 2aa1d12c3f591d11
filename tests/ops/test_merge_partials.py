"""merge_partials: any split of the keys is the whole, in any order and grouping, and empty parts are nothing."""

from __future__ import annotations

from math import inf

import pytest
import torch

from streamkernels import merge_partials, span_attention
from streamkernels.testing.cases import Case
from streamkernels.testing.compare import assert_accurate, assert_exact
from streamkernels.testing.inputs import make_inputs, random_spans

CASE = Case(2, 4, 2, 17, 23, 8, "random", dtype=torch.float64)


def split(x):
    """The attention of each slot of the spans on its own: disjoint key sets, many of them empty."""
    return [span_attention(x.q, x.k, x.v, x.spans.bounds[:, :, n : n + 1], return_lse=True) for n in range(x.spans.N)]


def test_the_parts_make_the_whole():
    x = make_inputs(CASE)
    parts = split(x)
    assert any(bool((lse == -inf).any()) for _, lse in parts)
    for ours, whole in zip(merge_partials(parts), span_attention(x.q, x.k, x.v, x.spans, return_lse=True), strict=True):
        assert_exact("merged", ours, whole)


def test_any_grouping_and_order():
    parts = split(make_inputs(CASE))
    whole = merge_partials(parts)
    a, b, c, d = parts
    for other in ([d, c, b, a], [merge_partials([a, b]), merge_partials([c, d])], [a, merge_partials([b, c, d])]):
        for ours, expected in zip(merge_partials(other), whole, strict=True):
            assert_exact("merged", ours, expected)


def test_an_empty_part_is_the_identity_whatever_its_output_holds():
    (o, lse), *_ = split(make_inputs(CASE))
    o, lse = torch.randn_like(o), torch.randn_like(lse)
    nothing = (torch.full_like(o, float("nan")), torch.full_like(lse, -inf))
    for parts in ([(o, lse), nothing], [nothing, (o, lse), nothing], [(o, lse)]):
        merged = merge_partials(parts)
        assert torch.equal(merged[0], o) and torch.equal(merged[1], lse)
    merged = merge_partials([nothing, nothing])
    assert bool((merged[0] == 0).all()) and torch.equal(merged[1], nothing[1])


def test_gradients():
    random = torch.Generator().manual_seed(0)
    shape = (1, 2, 3, 4)
    leaves = [torch.randn(s, generator=random, dtype=torch.float64) for s in (shape, shape[:3], shape, shape[:3])]
    leaves[3][0, 0, 0], leaves[1][0, 1, 2], leaves[3][0, 1, 2] = -inf, -inf, -inf
    for x in leaves:
        x.requires_grad_()
    o, lse = merge_partials([(leaves[0], leaves[1]), (leaves[2], leaves[3])])
    grads = torch.autograd.grad(o.sum() + lse[lse > -inf].sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert not bool(grads[2][0, 0, 0].any()) and not bool(grads[0][0, 1, 2].any())
    finite = [x.detach().nan_to_num(neginf=-2.0).requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda a, b, c, d: merge_partials([(a, b), (c, d)]), finite)


def test_gradients_flow_through_the_parts():
    x = make_inputs(CASE)
    results = []
    for parts_of in (lambda y: [span_attention(*y, x.spans, return_lse=True)], None):
        q, k, v = leaves = x.leaves()
        if parts_of is None:
            bounds = x.spans.bounds
            parts = [span_attention(q, k, v, bounds[:, :, n : n + 1], return_lse=True) for n in range(4)]
        else:
            parts = parts_of(leaves)
        o, lse = merge_partials(parts)
        results.append(torch.autograd.grad((o * x.do).sum() + (lse * x.dlse)[lse > -inf].sum(), leaves))
    for a, b in zip(*results, strict=True):
        assert_exact("gradient", a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    random = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(2, 2, 9, 8, generator=random).to(dtype), torch.randn(2, 2, 9, generator=random)) for _ in range(3)
    ]
    o, lse = merge_partials(parts)
    exact = merge_partials([(o.double(), lse.double()) for o, lse in parts])
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert_accurate("o", o, exact[0].to(dtype), exact[0])
    assert_accurate("lse", lse, exact[1].float(), exact[1])


def test_large_logs_do_not_overflow():
    o = torch.randn(1, 1, 2, 8)
    lse = torch.tensor([[[3e4, -3e4]]])
    merged = merge_partials([(o, lse), (o, lse)])
    assert torch.allclose(merged[0], o) and torch.allclose(merged[1], lse + torch.tensor(2.0).log())


OUT, LSE = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3)
REFUSED = [
    ([], ValueError, "parts: expected at least one"),
    (OUT, TypeError, "parts: expected a sequence"),
    ([OUT], TypeError, r"parts\[0\]: expected a pair"),
    ([(OUT, LSE), (OUT, LSE, LSE)], TypeError, r"parts\[1\]: expected a pair"),
    ([(OUT, LSE.half())], TypeError, r"parts\[0\]\[1\]: expected float32 or float64"),
    ([(OUT, LSE[..., :2])], ValueError, r"parts\[0\]\[1\]: expected shape \[B, H, T\] with B=1, H=2, T=3"),
    ([(OUT, LSE), (OUT.half(), LSE)], TypeError, r"parts\[1\]\[0\]: expected float32"),
    ([(OUT, LSE), (OUT, LSE.double())], TypeError, r"parts\[1\]\[1\]: expected float32"),
    ([(OUT, LSE), (OUT[:, :1], LSE[:, :1])], ValueError, r"parts\[1\]\[0\]: expected shape .* H=2"),
]


@pytest.mark.parametrize("parts, error, message", REFUSED, ids=range(len(REFUSED)))
def test_refuses(parts, error, message):
    with pytest.raises(error, match="merge_partials: " + message):
        merge_partials(parts)


def test_compiles():
    torch._dynamo.reset()
    x = make_inputs(CASE)
    spans = random_spans(2, 17, 23, 2, torch.Generator().manual_seed(0)).bounds

    def fn(q, k, v):
        parts = [span_attention(q, k, v, spans[:, :, n : n + 1], return_lse=True) for n in range(2)]
        return merge_partials(parts)

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(compiled(x.q, x.k, x.v), fn(x.q, x.k, x.v), strict=True):
        assert_exact("merged", a, b)
