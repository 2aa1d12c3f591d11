"""The Triton kernels of span_attention and prepare against the reference's truth: the interpreter on a CPU, compiled
on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU: fp32 and fp16, small cases. On a GPU: the whole table
with bf16.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamkernels import Spans, prepare, span_attention, spans
from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK, SKIP
from streamkernels.testing.cases import CPU_CASES, GPU_CASES, Case
from streamkernels.testing.compare import assert_accurate, influence
from streamkernels.testing.dense import dense_attention
from streamkernels.testing.gradients import NAMES, assert_all_accurate, forward_and_backward
from streamkernels.testing.inputs import make_inputs, random_kept, random_spans, spread_options

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
FP64 = torch.float64


def supported(cases):
    """With one key the gradients of q and k are exactly 0, and what is left of them is the rounding of two sums taken
    in different orders."""
    return tuple(case for case in cases if case.S > 1)


SMALL = supported(replace(case, B=min(case.B, 2), H=2 * case.HK if case.HK < 3 else case.HK) for case in CPU_CASES) + (
    Case(1, 2, 1, 70, 150, 16, "random"),
    Case(1, 3, 1, 130, 130, 32, "wait_k"),
    Case(1, 1, 1, 600, 600, 16, "wait_k"),  # two runs of rows with a gap between them
)
GRADIENTS = tuple(case for case in supported(GPU_CASES) if case.dtype != torch.float32)
FP32 = tuple(case for case in supported(GPU_CASES) if case.dtype == torch.float32)
if not GPU:
    GRADIENTS, FP32 = tuple(replace(case, dtype=torch.float16) for case in SMALL), SMALL


def both(*args, **kwargs) -> tuple[Tensor, Tensor]:
    return span_attention(*args, return_lse=True, **kwargs)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_accurate(case):
    x = make_inputs(case, DEVICE)
    ours = forward_and_backward(both, x, backend="triton")
    plain = forward_and_backward(dense_attention, x)
    exact = forward_and_backward(dense_attention, x.to(FP64))
    assert_all_accurate(x, ours, plain, exact)


@pytest.mark.parametrize("case", FP32, ids=str)
def test_forward_in_fp32(case):
    x = make_inputs(case, DEVICE)
    arguments = {"scale": x.scale, "softcap": x.softcap, "sink_logits": x.sink_logits}
    wide = x.to(FP64)
    exact = dense_attention(wide.q, wide.k, wide.v, x.spans, **arguments | {"sink_logits": wide.sink_logits})
    ours = both(x.q, x.k, x.v, x.spans, **arguments, backend="triton")
    plain = dense_attention(x.q, x.k, x.v, x.spans, **arguments)
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=False):
        assert_accurate(f"{name} of {case}", a, b, c)


@pytest.mark.parametrize("S, T, N", [(1, 1, 1), (150, 130, 2), (64, 64, 4), (321, 70, 8), (40, 700, 2), (0, 5, 1)])
def test_prepare_equals_the_reference(S, T, N):
    random = torch.Generator().manual_seed(S + T)
    bounds = torch.randint(-9, S + 9, (2, T, N, 2), generator=random, dtype=torch.int32).to(DEVICE)
    for a, b in zip(prepare(bounds, S, backend="triton"), prepare(bounds, S, backend="reference"), strict=True):
        assert torch.equal(a, b)


def test_the_gap_of_a_wait_k_mask_is_not_walked():
    """Source keys are seen by later source rows and, after a gap, by later target rows: two runs."""
    sp = spans.wait_k([[1] * 400], [[1] * 400], k=3, device=DEVICE)
    _, key_blocks = prepare(sp, 800, backend="triton")
    begin, end, begin2, end2 = key_blocks[0, 4].tolist()
    assert begin == 4 and end == 7 and begin2 > end and end2 == 13


def test_overlapping_slots_count_twice():
    x = make_inputs(Case(1, 2, 1, 70, 70, 16, "causal", torch.float16), DEVICE)
    twice = torch.tensor([[0, 70], [3, 66]], dtype=torch.int32, device=DEVICE).expand(1, 70, 2, 2)
    x = replace(x, spans=Spans(twice))
    ours = forward_and_backward(both, x, backend="triton")
    reference = forward_and_backward(both, x.to(FP64), backend="reference")
    for name, a, b in zip(NAMES, ours, reference, strict=False):
        assert (a - b).abs().max() < 1e-2, name


def every_rule(T: int, S: int) -> Spans:
    random = torch.Generator().manual_seed(1)
    kept, count = random_kept(1, 1, S, S // 2, random)
    sink_key = torch.tensor([[0, 0, 0, 5, 0, 0, 0, 2 * S]], dtype=torch.int32)
    rules = (ATTEND, KEPT, MASS, SINK, ATTEND, KEPT, ATTEND, SINK)
    return Spans(random_spans(1, T, S, 8, random).bounds, rules, sink_key, kept, count).to(DEVICE)


def test_every_rule_at_once():
    case = Case(1, 2, 1, 67, 131, 16, "causal", torch.float16, sink_logits=True)
    x = replace(make_inputs(case, DEVICE), spans=every_rule(67, 131))
    ours = forward_and_backward(both, x, backend="triton")
    plain = forward_and_backward(dense_attention, x)
    exact = forward_and_backward(dense_attention, x.to(FP64))
    assert_all_accurate(x, ours, plain, exact)


@pytest.mark.parametrize("mask", ["kept", "sink", "classes"])
def test_options_of_any_strides(mask):
    x = make_inputs(Case(2, 4, 2, 40, 70, 16, mask, torch.float16, sink_logits=True), DEVICE)
    packed, spread = (forward_and_backward(both, y, backend="triton") for y in (x, spread_options(x)))
    assert all(torch.equal(a, b) for a, b in zip(packed, spread, strict=True))


def test_lse_of_rows_that_see_nothing_has_no_gradient():
    """Whoever goes on with lse = -inf may well get NaN back for it."""
    x = make_inputs(Case(1, 2, 1, 70, 70, 16, "causal", torch.float16, sink_logits=True), DEVICE)
    x.spans.bounds[:, 5:40:3] = 0
    found = []
    for value in (0.0, float("nan")):
        leaves = x.leaves()
        o, lse = both(*leaves[:3], x.spans, scale=x.scale, sink_logits=leaves[3], backend="triton")
        dlse = x.dlse.masked_fill(lse.isinf(), value)
        found.append(torch.autograd.grad((o, lse), leaves, (x.do, dlse)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def every_class_rule(T: int, S: int, classes: int, rules: tuple[int, ...], class_sink: bool = True) -> Spans:
    """Random classes, some outside the table, over slots of the given rules, for two samples."""
    random = torch.Generator().manual_seed(classes)
    bounds = random_spans(2, T, S, len(rules), random).bounds
    kept, count = random_kept(2, 1, S, S // 2, random) if KEPT in rules else (None, None)
    sink_key = torch.tensor([[5] * len(rules), [2 * S] * len(rules)], dtype=torch.int32) if SINK in rules else None
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=random)  # noqa: E731
    key_class, row_class = (draw(-1, classes + 2, 2, n).to(torch.int8) for n in (S, T))
    key_class[0, ::7], row_class[1, ::5] = -128, 127
    table = draw(-1, 3, classes, classes).to(torch.int8)
    sink = torch.tensor([S - 3, -1], dtype=torch.int32) if class_sink else None
    return Spans(bounds, rules, sink_key, kept, count, key_class, row_class, table, sink).to(DEVICE)


@pytest.mark.parametrize(
    "classes, rules, class_sink, softcap",
    [
        (3, (ATTEND, KEPT, MASS, SINK), True, 5.0),
        (16, (ATTEND, SINK), True, 0.0),
        (20, (KEPT, MASS), True, 0.0),
        (4, (ATTEND,), False, 0.0),
    ],
)
def test_classes_beside_every_rule(classes, rules, class_sink, softcap):
    case = Case(2, 2, 1, 35, 70, 16, "causal", torch.float16, sink_logits=True, softcap=softcap)
    x = replace(make_inputs(case, DEVICE), spans=every_class_rule(35, 70, classes, rules, class_sink))
    ours = forward_and_backward(both, x, backend="triton")
    plain = forward_and_backward(dense_attention, x)
    exact = forward_and_backward(dense_attention, x.to(FP64))
    assert_all_accurate(x, ours, plain, exact)


@pytest.mark.parametrize("classes, softcap", [(3, 0.0), (20, 5.0)])
def test_what_classes_hide_or_drop_may_be_nan(classes, softcap):
    case = Case(2, 1, 1, 35, 70, 16, "causal", torch.float16, softcap=softcap)
    sp = every_class_rule(35, 70, classes, (ATTEND, MASS))
    # three kinds of keys: attended to or not seen, dropped or not seen, never seen
    sp.class_rules.copy_(torch.tensor([ATTEND, MASS, SKIP] + [SKIP] * (classes - 3)).expand(classes, classes))
    sp.class_rules[0, :2] = SKIP
    x = replace(make_inputs(case, DEVICE), spans=sp)
    seen = sp.visible(70).any(2)[:, 0]
    own = sp.value_weight(70).any(2)[:, 0]
    assert bool((seen & ~own).any()) and bool((~seen).any())
    k, v = (torch.where(keep[:, None, :, None], t, float("nan")) for keep, t in ((seen, x.k), (own, x.v)))
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    before = forward_and_backward(both, x, backend="triton")
    after = forward_and_backward(both, replace(x, k=k, v=v), backend="triton")
    for name, a, b in zip(NAMES, before, after, strict=False):
        assert torch.equal(a, b), name


def test_keys_that_nobody_sees_may_be_nan():
    """Holes inside, before and after what a tile of rows sees; and unused values under MASS."""
    case = Case(1, 2, 1, 66, 200, 16, "causal", torch.float16)
    x = make_inputs(case, DEVICE)
    bounds = torch.zeros(1, 66, 2, 2, dtype=torch.int32)
    bounds[:, :, 0] = torch.tensor([7, 40])
    bounds[:, 33:, 0] = torch.tensor([50, 61])
    bounds[:, :, 1] = torch.tensor([70, 150])
    for rules in ((ATTEND, ATTEND), (ATTEND, MASS)):
        clean = replace(x, spans=Spans(bounds.to(DEVICE), rules))
        seen = clean.spans.visible(200).any(2)[0, 0]
        own = clean.spans.value_weight(200).any(2)[0, 0]
        k, v = x.k.clone(), x.v.clone()
        k[:, :, ~seen] = float("nan")
        v[:, :, ~own] = float("nan")
        before = forward_and_backward(both, clean, backend="triton")
        after = forward_and_backward(both, replace(clean, k=k, v=v), backend="triton")
        for name, a, b in zip(NAMES, before, after, strict=False):
            assert torch.equal(a, b), (name, rules)


@pytest.mark.parametrize("partly", [False, True])
def test_a_kept_list_is_read_side_by_side(partly):
    """From 64 rows on, where all rows of a tile see the whole list; tiles of which some rows do not, and lists of no
    keys. What is not listed may be NaN."""
    case = Case(2, 4, 2, 130, 150, 16, "causal", torch.float16)
    kept, count = random_kept(2, 2, 150, 91, torch.Generator().manual_seed(2))
    count[0, 0] = 0
    bounds = torch.tensor([0, 150], dtype=torch.int32).expand(2, 130, 1, 2).clone()
    if partly:
        bounds[0, 70:80, :, 1] = 75
        bounds[1, 3:9, :, 0] = 60
    clean = replace(make_inputs(case, DEVICE), spans=Spans(bounds, (KEPT,), None, kept, count).to(DEVICE))
    plain = forward_and_backward(dense_attention, clean)
    exact = forward_and_backward(dense_attention, clean.to(FP64))
    seen = clean.spans.visible(150).any(2)[..., None]
    dirty = replace(clean, k=clean.k.masked_fill(~seen, float("nan")), v=clean.v.masked_fill(~seen, float("nan")))
    ours = forward_and_backward(both, dirty, backend="triton")
    assert_all_accurate(clean, ours, plain, exact)


def test_a_sink_that_a_row_does_not_use_may_be_nan():
    """One tile of rows, of which every other one has an empty SINK slot."""
    x = make_inputs(Case(1, 2, 1, 20, 60, 16, "causal", torch.float16), DEVICE)
    bounds = torch.zeros(1, 20, 2, 2, dtype=torch.int32)
    bounds[:, :, 0] = torch.tensor([10, 30])
    bounds[:, ::2, 1] = torch.tensor([31, 50])
    sink = torch.tensor([[0, 3]], dtype=torch.int32, device=DEVICE)
    clean = replace(x, spans=Spans(bounds.to(DEVICE), (ATTEND, SINK), sink))
    v = x.v.clone()
    v[:, :, 3] = float("nan")
    before = forward_and_backward(both, clean, backend="triton")
    after = forward_and_backward(both, replace(clean, v=v), backend="triton")
    for name, a, b in zip(NAMES[:3], before, after, strict=False):
        if a.dim() > 2 and a.shape[2] == 20:
            assert torch.equal(a[:, :, 1::2], b[:, :, 1::2]), name
            assert name == "lse" or b[:, :, ::2].isnan().any(), name


def test_influence_is_what_the_spans_declare():
    x = make_inputs(Case(1, 1, 1, 21, 21, 8, "wait_k"), DEVICE)
    flows = influence(lambda v: span_attention(x.q, x.k, v, x.spans, backend="triton"), x.v)
    assert torch.equal(flows[0].cpu(), x.spans.visible(21)[0, 0].cpu())


def test_fp32_gradients_are_refused_with_the_reason():
    x = make_inputs(Case(1, 2, 1, 9, 9, 8, "causal"), DEVICE)
    with pytest.raises(NotImplementedError, match="fp32 gradients would be less accurate"):
        forward_and_backward(both, x, backend="triton")


@pytest.mark.parametrize("T, S, H, HK, D", [(3, 450, 4, 1, 16), (70, 67, 2, 1, 128), (67, 70, 2, 2, 16)])
def test_memory_may_hold_anything_before_a_backward(T, S, H, HK, D, monkeypatch):
    """More tiles of keys than programs of rows; tiles without a mask that end beyond the rows; sums of several programs
    and of one."""
    from streamkernels.triton_kernels.device.memory import Memory

    x = make_inputs(Case(1, H, HK, T, S, D, "random", torch.float16, sink_logits=True), DEVICE)
    everything = torch.tensor([0, S], dtype=torch.int32, device=DEVICE).expand(1, T, 1, 2)
    x = replace(x, spans=Spans(everything.contiguous()))
    before = forward_and_backward(both, x, backend="triton")

    def full(self: Memory, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(sizes, strides, dtype=dtype, device=self.device).fill_(float("nan"))

    monkeypatch.setattr(Memory, "here", lambda self: functools.partial(full, self))
    again = forward_and_backward(both, x, backend="triton")
    for name, a, b in zip(NAMES, before, again, strict=False):
        assert torch.equal(a, b), name


@pytest.mark.skipif(not GPU, reason="the interpreter is sequential")
def test_a_hundred_repeats_are_bit_equal():
    x = make_inputs(Case(2, 8, 2, 777, 777, 128, "wait_k", torch.bfloat16), DEVICE)
    first = forward_and_backward(both, x, backend="triton")
    for _ in range(100):
        again = forward_and_backward(both, x, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not GPU, reason="head dims of models, in bf16")
@pytest.mark.parametrize("D", [64, 80, 96, 112, 128, 192, 256])
def test_every_head_dim_on_ragged_batches(D):
    """T != S, samples of different lengths, gradients through o and lse."""
    T, S = 111, 176
    x = make_inputs(Case(3, 4, 2, T, S, D, "causal", torch.bfloat16), DEVICE)
    ragged = spans.bottom_right([T, T - 17, 1], [S, S - 63, 1], device=DEVICE)
    x = replace(x, spans=ragged)
    ours = forward_and_backward(both, x, backend="triton")
    plain = forward_and_backward(dense_attention, x)
    exact = forward_and_backward(dense_attention, x.to(FP64))
    assert_all_accurate(x, ours, plain, exact)
    assert bool((ours[0][2, :, 1:] == 0).all()) and bool((ours[1][2, :, 1:] == -torch.inf).all())
