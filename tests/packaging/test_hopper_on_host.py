"""span_attention's CUDA kernel for many rows, run on the host: its own source but for a page of Hopper's instructions,
whose copies and products come about at once, as late as they may, or any time between, with warps in any order. Memory
that nothing was written to is NaN. See `test_cuda_on_host.py`; the same calls run on a GPU in tests/cuda.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from streamkernels import Spans, _ext, span_attention
from streamkernels.backends import cuda_span_attention, triton
from streamkernels.backends.room import Held
from streamkernels.reference.prepare import prepare as reference_prepare
from streamkernels.testing.cases import Case
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.dense import dense_attention
from streamkernels.testing.gradients import assert_all_accurate, forward_and_backward
from streamkernels.testing.inputs import Inputs, make_inputs, random_spans, spread_options

NAN = float("nan")
AT_ONCE, LATE, ANY_TIME = range(3)


class Host:
    """The kernel on CPU tensors, and the tickets that its launches left."""

    def __init__(self, extension: ModuleType, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.native = ctypes.CDLL(str(library))
        self.pace(AT_ONCE)
        self.held: Held[Tensor] = Held()

        def many(*arguments) -> None:
            # CPU tensors have neither a device index nor a stream
            *given, _device, tickets, _stream = arguments
            extension.span_attention_many(*given, 0, tickets, 0)

        def many_backward(*arguments) -> None:
            *given, _device, work, tickets, counters, _stream = arguments
            extension.span_attention_many_backward(*given, 0, work, tickets, counters, 0)

        stand_in = SimpleNamespace(
            span_attention_many=many, span_attention_many_backward=many_backward, capture_id=lambda stream: 0,
            span_attention_many_work=lambda *sizes: extension.span_attention_many_work(*sizes[:-1], 0),
        )  # fmt: skip
        monkeypatch.setattr(_ext, "load", lambda: stand_in)
        monkeypatch.setattr(cuda_span_attention, "_has_many", lambda index: True)
        monkeypatch.setattr(triton, "prepare", reference_prepare)
        monkeypatch.setattr(cuda_span_attention, "stream_of", lambda device: 0)
        monkeypatch.setattr(cuda_span_attention, "_tickets", self.held)

    def pace(self, how: int, seed: int = 0) -> None:
        self.native.set_pace(how, seed)

    def run(self, x: Inputs) -> tuple[Tensor, Tensor]:
        o, lse = cuda_span_attention.span_attention(
            x.q, x.k, x.v, x.spans.bounds, tuple(int(rule) for rule in x.spans.rules), *[None] * 7, x.sink_logits,
            None, None, x.scale, 0.0,
        )  # fmt: skip
        self.check_counters()
        return o, lse

    def check_counters(self) -> None:
        (held,) = self.held.things.values()
        assert held.count_nonzero() == 0

    def run_backward(self, x: Inputs, o: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, ...]:
        gradients = cuda_span_attention.span_attention_backward(
            x.do, dlse, x.q, x.k, x.v, o, lse, x.spans.bounds, tuple(int(rule) for rule in x.spans.rules), *[None] * 7,
            x.sink_logits, None, None, x.scale, 0.0,
        )  # fmt: skip
        self.check_counters()
        assert (gradients[3] is None) == (x.sink_logits is None)
        return tuple(gradient for gradient in gradients if gradient is not None)

    def check_backward(self, x: Inputs, with_dlse: bool = True) -> tuple[Tensor, ...]:
        """Accurate, whatever keys and values that nobody sees are."""
        dirty = spoiled(x)
        o, lse = self.run(dirty)
        found = self.run_backward(dirty, o, lse, x.dlse if with_dlse else None)
        if not with_dlse:
            x = replace(x, dlse=torch.zeros_like(x.dlse))
        plain = forward_and_backward(dense_attention, x)
        exact = forward_and_backward(dense_attention, x.to(torch.float64))
        assert_all_accurate(x, (o, lse, *found), plain, exact)
        return found

    def check(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Accurate, whatever keys and values that nobody sees are."""
        found = self.run(spoiled(x))
        wide = replace(x, sink_logits=None if x.sink_logits is None else x.sink_logits.float())
        plain, exact = dense(wide), dense(wide.to(torch.float64))
        for name, a, b, c in zip(("o", "lse"), found, plain, exact, strict=True):
            assert_accurate(name, a, b, c)
        return found


def dense(x: Inputs) -> tuple[Tensor, Tensor]:
    return dense_attention(x.q, x.k, x.v, x.spans, scale=x.scale, sink_logits=x.sink_logits)


@pytest.fixture
def host(extension: ModuleType, library: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(extension, library, monkeypatch)


def spoiled(x: Inputs) -> Inputs:
    """NaN for the keys and values that nobody sees."""
    seen = x.spans.visible(x.k.shape[2]).any(2)[:, :1].expand(*x.k.shape[:3])
    hidden = ~seen.unsqueeze(-1)
    return replace(x, k=x.k.masked_fill(hidden, NAN), v=x.v.masked_fill(hidden, NAN))


CASES = [
    Case(1, 2, 1, 300, 300, 64, "wait_k", torch.bfloat16),
    Case(2, 2, 2, 130, 130, 64, "causal", torch.float16, sharp=8.0, sink_logits=True, layout="packed_qkv"),
    Case(1, 4, 2, 66, 450, 128, "bottom_right", torch.bfloat16),
]


@pytest.mark.parametrize("pace", [AT_ONCE, LATE, ANY_TIME])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accurate_at_any_pace(host: Host, case: Case, pace: int) -> None:
    x = make_inputs(case)
    host.pace(AT_ONCE)
    first = host.check(x)
    for seed in range(2 if pace == ANY_TIME else 1):
        host.pace(pace, seed)
        assert all(torch.equal(a, b) for a, b in zip(first, host.run(spoiled(x)), strict=True))


@pytest.mark.parametrize("pace", [AT_ONCE, LATE, ANY_TIME])
@pytest.mark.parametrize("case", [
    Case(1, 6, 2, 300, 300, 64, "wait_k", torch.bfloat16),
    Case(2, 2, 2, 130, 130, 64, "causal", torch.float16, sharp=8.0, sink_logits=True, layout="packed_qkv"),
    Case(1, 4, 2, 66, 450, 128, "bottom_right", torch.bfloat16, sink_logits=True),
], ids=str)  # fmt: skip
def test_gradients_at_any_pace(host: Host, case: Case, pace: int) -> None:
    x = make_inputs(case)
    first = host.check_backward(x)
    o, lse = host.run(x)
    for seed in range(2 if pace == ANY_TIME else 1):
        host.pace(pace, seed)
        again = host.run_backward(spoiled(x), o, lse, x.dlse)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("H", [1, 7])
def test_gradients_of_any_spans(host: Host, N: int, H: int) -> None:
    T, S = 200, 330
    x = make_inputs(Case(2, H, 1, T, S, 64, "bottom_right", torch.bfloat16))
    bounds = random_spans(2, T, S, N, torch.Generator().manual_seed(N)).bounds.clone()
    bounds[0, 128:].clamp_(min=150)
    host.pace(ANY_TIME, N)
    host.check_backward(replace(x, spans=Spans(bounds)), with_dlse=H > 1)


def test_gradients_that_are_left_to_triton(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "span_attention_backward", lambda *a: (None, None, None, None))
    x = make_inputs(Case(1, 2, 1, 64, 64, 64, "causal", torch.bfloat16))
    tensors = (x.do, None, x.q, x.k, x.v, x.q, torch.zeros(1, 2, 64), x.spans.bounds)
    found = cuda_span_attention.span_attention_backward(*tensors, (0,), *[None] * 10, x.scale, 0.0)
    assert found == (None, None, None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_sink_logits(host: Host, dtype: torch.dtype) -> None:
    """Sinks that take nearly everything, nearly nothing, and half, of rows some of which see nothing."""
    x = make_inputs(Case(2, 4, 2, 100, 140, 64, "bottom_right", torch.bfloat16, sink_logits=True))
    bounds = random_spans(2, 100, 140, 1, torch.Generator().manual_seed(3)).bounds
    logits = torch.tensor([30.0, -60.0, 5.0, 0.0], dtype=dtype)
    host.check_backward(replace(x, spans=Spans(bounds), sink_logits=logits))


def test_options_of_any_strides(host: Host) -> None:
    x = make_inputs(Case(1, 4, 2, 70, 90, 64, "bottom_right", torch.bfloat16, sink_logits=True))
    found = []
    for y in (x, spread_options(x)):
        o, lse = host.run(y)
        found.append((o, lse, *host.run_backward(y, o, lse, y.dlse)))
    assert len(found[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("sinks", [False, True])
def test_lse_of_rows_that_see_nothing_has_no_gradient(host: Host, sinks: bool) -> None:
    """Whoever goes on with lse = -inf may well get NaN back for it."""
    x = make_inputs(Case(1, 2, 1, 70, 90, 64, "bottom_right", torch.bfloat16, sink_logits=sinks))
    x.spans.bounds[:, 5:40:3] = 0
    o, lse = host.run(x)
    blind = lse.isinf()
    assert blind.any()
    clean, odd = (host.run_backward(x, o, lse, x.dlse.masked_fill(blind, value)) for value in (0.0, NAN))
    assert all(torch.equal(a, b) for a, b in zip(clean, odd, strict=True))


def test_overlapping_slots_count_twice(host: Host) -> None:
    x = make_inputs(Case(1, 4, 2, 150, 170, 64, "bottom_right", torch.bfloat16))
    bounds = torch.tensor([[0, 150], [20, 170]], dtype=torch.int32).repeat(1, 150, 1, 1)
    bounds[:, 70:, 0, 1] = torch.arange(60, 140)
    x = replace(x, spans=Spans(bounds))
    wide = x.to(torch.float64)
    leaves = wide.q.requires_grad_(), wide.k.requires_grad_(), wide.v.requires_grad_()
    o, lse = span_attention(*leaves, x.spans, scale=x.scale, return_lse=True, backend="reference")
    exact = (o, lse, *torch.autograd.grad((o, lse), leaves, (wide.do, wide.dlse)))
    found = host.run(x)
    found += host.run_backward(x, *found, x.dlse)
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), found, exact, strict=True):
        assert (a.double() - b).norm() < 4e-3 * b.norm(), name


def test_gradients_where_little_is_seen(host: Host) -> None:
    """Keys and rows without gradients get zeros."""
    x = make_inputs(Case(1, 2, 1, 260, 300, 64, "bottom_right", torch.bfloat16))
    bounds = torch.zeros(1, 260, 1, 2, dtype=torch.int32)
    bounds[0, 130, 0] = torch.tensor([17, 18])
    bounds[0, 131:140, 0] = torch.tensor([140, 290])
    dq, dk, dv = host.check_backward(replace(x, spans=Spans(bounds)))
    assert dq[:, :, :130].count_nonzero() == 0 and dk[:, :, :17].count_nonzero() == 0
    assert dv[:, :, 18:140].count_nonzero() == 0 and dv[:, :, 290:].count_nonzero() == 0


@pytest.mark.parametrize("N", [1, 2])
def test_any_spans(host: Host, N: int) -> None:
    """Holes, rows that see nothing, spans that begin and end anywhere, far outside too."""
    T, S = 200, 330
    x = make_inputs(Case(2, 2, 1, T, S, 64, "bottom_right", torch.bfloat16, sink_logits=True))
    bounds = random_spans(2, T, S, N, torch.Generator().manual_seed(N)).bounds.clone()
    bounds[0, 128:].clamp_(min=150)
    bounds[1, 128:, 0, 0] -= 2**31 - 400
    x = replace(x, spans=Spans(bounds))
    host.check(x)
    host.pace(ANY_TIME, 5)
    host.check(x)


def test_rows_that_see_nothing_among_those_that_see_all(host: Host) -> None:
    x = make_inputs(Case(1, 1, 1, 150, 400, 64, "bottom_right", torch.float16))
    bounds = torch.tensor([[7, 390]], dtype=torch.int32).repeat(1, 150, 1, 1)
    bounds[:, [3, 64, 149]] = 5
    o, lse = host.check(replace(x, spans=Spans(bounds)))
    assert (lse[0, 0] == float("-inf")).nonzero().flatten().tolist() == [3, 64, 149]
    assert o[0, 0, [3, 64, 149]].count_nonzero() == 0


def test_one_row_sees_something(host: Host) -> None:
    """Blocks of rows that see nothing, or one key: a tile is walked all the same, and nothing of it counts."""
    x = make_inputs(Case(1, 1, 1, 260, 40, 64, "empty", torch.float16))
    bounds = torch.zeros(1, 260, 1, 2, dtype=torch.int32)
    bounds[0, 130, 0] = torch.tensor([17, 18])
    x = replace(x, spans=Spans(bounds))
    o, lse = host.check(x)
    assert o[0, 0].any(-1).nonzero().tolist() == [[130]] and lse.isfinite().sum() == 1


def test_scores_that_rise_and_fall(host: Host) -> None:
    """Weights by the maxima so far must be noticed when they are too large, in one row of many as in all."""
    T, S = 128, 640
    x = make_inputs(Case(1, 1, 1, T, S, 64, "bottom_right", torch.float16))
    direction = torch.ones(64, dtype=torch.float16)
    late = torch.tensor([140, S], dtype=torch.int32).repeat(1, T, 1, 1)
    late[:, ::2] = torch.tensor([3, 600], dtype=torch.int32)
    for heights in ([0, 60, 120, 0, 180], [300, 0, -300, 40, 300], [-300, 0, -5, 9, 3]):
        height = torch.tensor(heights, dtype=torch.float16).repeat_interleave(128)
        height[270:275] += 90
        k = (height[:, None] * direction / 64).expand_as(x.k) + x.k * 0.01
        q = direction.expand_as(x.q) * (1 + x.q * 0.01)
        q[:, :, 7] = 0
        host.check(replace(x, q=q.contiguous(), k=k.contiguous(), spans=Spans(late), scale=1.0))


def test_nan_reaches_those_who_see_it(host: Host) -> None:
    """In a key exactly those; in a value the rows beside them too, but no block of rows that does not see it."""
    x = make_inputs(Case(1, 1, 1, 200, 200, 64, "causal", torch.bfloat16))
    clean, _ = host.run(x)
    for name, first in (("k", 150), ("v", 128)):
        other = getattr(x, name).clone()
        other[:, :, 150] = NAN
        o, _ = host.run(replace(x, **{name: other}))
        assert o[:, :, 150:].isnan().all() and torch.equal(o[:, :, :first], clean[:, :, :first]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sink_logits(host: Host, dtype: torch.dtype) -> None:
    x = make_inputs(Case(1, 4, 2, 70, 70, 128, "causal", torch.bfloat16, sink_logits=True))
    host.check(replace(x, sink_logits=x.sink_logits.to(dtype)))  # type: ignore[union-attr]


def test_copies_what_maps_cannot_describe(host: Host) -> None:
    x = make_inputs(Case(2, 2, 2, 70, 40, 64, "empty", torch.bfloat16))
    x = replace(x, spans=random_spans(2, 70, 40, 2, torch.Generator().manual_seed(0)))
    one = replace(x, k=x.k[:, :1].expand(2, 2, 40, 64), v=x.v[:1].expand(2, 2, 40, 64))
    host.check(one)
    wide = torch.full((2, 2, 70, 67), NAN, dtype=torch.bfloat16)
    host.check(replace(one, q=wide[..., 1:-2].copy_(x.q)))
