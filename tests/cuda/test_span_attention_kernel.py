"""The CUDA kernel of span_attention on a GPU: few query rows, every rule, against plain attention in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamkernels import Spans, span_attention
from streamkernels.backends.select import explain
from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK
from streamkernels.testing.cases import Case
from streamkernels.testing.compare import influence
from streamkernels.testing.inputs import make_inputs, random_kept, random_spans, spread_options

from .span_calls import both, check, check_repeated, off_borders, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAN = float("nan")
BF16, FP16 = torch.bfloat16, torch.float16

CASES = [
    Case(1, 32, 32, 1, 4096, 128, "bottom_right", BF16),
    Case(2, 28, 4, 8, 4111, 128, "bottom_right", BF16),
    Case(1, 16, 1, 64, 700, 128, "bottom_right", FP16, layout="packed_qkv"),
    Case(1, 1, 1, 1, 1, 64, "causal", FP16),
    Case(3, 4, 2, 17, 63, 96, "random", BF16),
    Case(2, 8, 2, 64, 64, 64, "causal", FP16, layout="bhtd"),
    Case(2, 6, 3, 63, 63, 256, "wait_k", BF16, sharp=4.0),
    Case(2, 4, 4, 5, 301, 256, "random", FP16, softcap=5.0),
    Case(2, 8, 1, 33, 33, 128, "window", BF16, sink_logits=True),
    Case(2, 4, 2, 64, 64, 64, "packed", BF16),
    Case(2, 8, 4, 31, 331, 128, "mass", BF16),
    Case(2, 8, 4, 31, 331, 64, "sink", FP16, sink_logits=True),
    Case(1, 4, 4, 1, 331, 256, "sink", BF16),
    Case(2, 8, 4, 17, 3331, 128, "kept", BF16, softcap=20.0),
    Case(1, 8, 8, 1, 9001, 96, "kept", FP16),
    Case(2, 14, 2, 64, 1025, 128, "kept", FP16, sink_logits=True),
    Case(2, 2, 2, 7, 9, 64, "empty", BF16, sink_logits=True),
    Case(2, 2, 2, 17, 19, 128, "outside", FP16),
    Case(8, 8, 8, 3, 200, 128, "random", BF16),
    Case(64, 32, 8, 2, 77, 64, "bottom_right", BF16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accurate(case: Case) -> None:
    check_repeated(make_inputs(case, "cuda"))


@pytest.mark.parametrize("mask", ["bottom_right", "kept", "sink"])
def test_options_of_any_strides(mask: str) -> None:
    x = make_inputs(Case(2, 8, 4, 9, 300, 64, mask, BF16, sink_logits=True), "cuda")
    assert all(torch.equal(a, b) for a, b in zip(run(x), run(spread_options(x)), strict=True))


def every_rule(T: int, S: int) -> Spans:
    random = torch.Generator().manual_seed(1)
    kept, count = random_kept(1, 1, S, S // 2, random)
    sink_key = torch.tensor([[0, 0, 0, 5, 0, 0, 0, 2 * S]], dtype=torch.int32)
    rules = (ATTEND, KEPT, MASS, SINK, ATTEND, KEPT, ATTEND, SINK)
    return Spans(random_spans(1, T, S, 8, random).bounds, rules, sink_key, kept, count).to("cuda")


@pytest.mark.parametrize("T, S", [(1, 131), (5, 2000), (64, 131)])
def test_every_rule_at_once(T: int, S: int) -> None:
    x = make_inputs(Case(1, 2, 1, T, S, 128, "causal", FP16, sink_logits=True), "cuda")
    check(replace(x, spans=every_rule(T, S)))


def test_overlapping_slots_count_twice() -> None:
    x = make_inputs(Case(1, 2, 1, 64, 70, 64, "causal", FP16), "cuda")
    twice = torch.tensor([[0, 70], [3, 66]], dtype=torch.int32, device="cuda").expand(1, 64, 2, 2)
    x = replace(x, spans=Spans(twice))
    exact = x.to(torch.float64)
    reference = run(exact, lambda *a, **k: both(*a, backend="reference", **k))
    for a, b in zip(run(x), reference, strict=True):
        assert (a - b).abs().max() < 1e-2


def kept_of(lists: list[list[int]], K: int) -> tuple[Tensor, Tensor]:
    kept = torch.full((1, len(lists), K), 2**31 - 1, dtype=torch.int32)
    for h, row in enumerate(lists):
        kept[0, h, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return kept.cuda(), torch.tensor([[len(row) for row in lists]], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("T", [1, 40])
def test_kept_lists(T: int) -> None:
    """None kept, all kept, out-of-range entries at both ends, and a span that holds a part of the list."""
    S = 1000
    x = make_inputs(Case(1, 4, 4, T, S, 128, "causal", BF16), "cuda")
    lists = [[], list(range(S)), [-9, -1, 0, 3, 999, 1000, 2**31 - 1], list(range(0, S, 7))]
    kept, count = kept_of(lists, S + 7)
    for begin, end in ((0, S), (100, 517), (-5, 2**31 - 1), (3, 4), (7, 7)):
        bounds = torch.tensor([begin, end], dtype=torch.int32, device="cuda").expand(1, T, 1, 2)
        y = replace(x, spans=Spans(bounds.contiguous(), (KEPT,), kept=kept, kept_count=count))
        check(y)
        o, lse = run(y)
        assert o[:, 0].count_nonzero() == 0 and bool((lse[:, 0] == float("-inf")).all())


def test_garbage_lists_read_nothing_outside() -> None:
    x = make_inputs(Case(1, 4, 2, 3, 500, 128, "causal", BF16), "cuda")
    random = torch.Generator().manual_seed(0)
    kept = torch.randint(-(2**31), 2**31 - 1, (1, 2, 300), generator=random).int().cuda()
    kept[:, :, ::3] = torch.randint(0, 500, (1, 2, 100), generator=random).int().cuda()
    bounds = torch.tensor([10, 400], dtype=torch.int32, device="cuda").expand(1, 3, 1, 2).contiguous()
    count = torch.tensor([[2**31 - 1, -7]], dtype=torch.int32, device="cuda")
    o, _ = run(replace(x, spans=Spans(bounds, (KEPT,), kept=kept, kept_count=count)))
    assert bool(o.isfinite().all()) and o[:, 2:].count_nonzero() == 0


@pytest.mark.parametrize("T", [1, 16, 33])
def test_keys_that_nobody_sees_may_be_nan(T: int) -> None:
    """Holes inside, before and after what rows see; what is not kept; values under MASS."""
    S = 300
    x = make_inputs(Case(1, 4, 2, T, S, 128, "causal", FP16), "cuda")
    bounds = torch.zeros(1, T, 2, 2, dtype=torch.int32)
    bounds[:, :, 0], bounds[:, :, 1] = torch.tensor([7, 40]), torch.tensor([70, 250])
    bounds[:, T // 2 :, 0] = torch.tensor([50, 61])
    kept, count = kept_of([list(range(71, 200, 3)), [75, 240]], 60)
    for rules in ((ATTEND, ATTEND), (ATTEND, MASS), (KEPT, KEPT), (ATTEND, KEPT)):
        lists = {"kept": kept, "kept_count": count} if KEPT in rules else {}
        clean = replace(x, spans=Spans(bounds.cuda(), rules, **lists))
        seen = clean.spans.visible(S).any(2).expand(1, 2, S)
        own = clean.spans.value_weight(S).any(2).expand(1, 2, S)
        spoiled = replace(
            clean, k=x.k.masked_fill(~seen.unsqueeze(-1), NAN), v=x.v.masked_fill(~own.unsqueeze(-1), NAN)
        )
        for a, b in zip(run(clean), run(spoiled), strict=True):
            assert torch.equal(a, b), rules


def test_influence_is_what_the_spans_declare() -> None:
    x = make_inputs(Case(1, 2, 1, 21, 21, 64, "wait_k", BF16), "cuda")
    flows = influence(lambda v: span_attention(x.q, x.k, v, x.spans, backend="cuda"), x.v)
    assert torch.equal(flows[0].cpu(), x.spans.visible(21)[0, 0].cpu())
    x.k[:, :, 5] = NAN
    hit = run(x)[0].isnan().any(-1)[0, 0]
    assert torch.equal(hit.cpu(), x.spans.visible(21)[0, 0, :, 5].cpu())


def test_rows_off_their_borders_are_copied() -> None:
    x = make_inputs(Case(2, 8, 2, 9, 70, 64, "random", BF16), "cuda")
    assert all(torch.equal(a, b) for a, b in zip(run(x), run(off_borders(x)), strict=True))


def test_captured_once_for_all_spans_and_lists() -> None:
    S = 5000
    x = make_inputs(Case(1, 8, 4, 2, S, 128, "causal", BF16), "cuda")
    kept, count = random_kept(1, 4, S, 400, torch.Generator().manual_seed(0))
    bounds = torch.tensor([[0, S], [0, 0]], dtype=torch.int32, device="cuda").repeat(1, 2, 1, 1)
    x = replace(x, spans=Spans(bounds, (KEPT, ATTEND), kept=kept.cuda(), kept_count=count.cuda()))
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    for begin, end, some in ((0, 0, 3), (17, 4999, 400), (0, 900, 0)):
        bounds[:, :, 1] = torch.tensor([begin, end], device="cuda")
        x.spans.kept_count.fill_(some).clamp_(max=int(count.min()) if some else 0)
        for t in captured:
            t.fill_(NAN)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(x), strict=True))


def test_what_it_does_not_take() -> None:
    x = make_inputs(Case(1, 2, 1, 65, 70, 64, "causal", BF16), "cuda")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    # few pairs of rows and keys are Triton's
    many = explain(span_attention, x.q, x.k, x.v, x.spans)
    assert many.backend == "triton" and ("faster" if hopper else "at most 64 query rows") in many.reasons["cuda"]
    q = x.q[:, :, :64]
    spans = Spans(x.spans.bounds[:, :64].contiguous())
    assert explain(span_attention, q, x.k, x.v, spans).reasons["cuda"] == "ok"
    assert "backward" in explain(span_attention, q.requires_grad_(), x.k, x.v, spans).reasons["cuda"]
    wide = torch.zeros(1, 2, 4, 80, dtype=BF16, device="cuda")
    few = torch.zeros(1, 4, 1, 2, dtype=torch.int32, device="cuda")
    assert "not 80" in explain(span_attention, wide, wide, wide, few).reasons["cuda"]
