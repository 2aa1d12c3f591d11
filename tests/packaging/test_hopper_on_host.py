"""span_attention's CUDA kernel for many rows, run on the host: its own source but for a page of Hopper's instructions,
whose copies and products come about at once, as late as they may, or any time between, with warps in any order. Memory
that nothing was written to is NaN. See `test_cuda_on_host.py`; the same calls run on a GPU in tests/cuda.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from streamkernels import Spans, span_attention
from streamkernels.backends import cuda_span_attention
from streamkernels.backends.room import Held
from streamkernels.testing.cases import Case
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.dense import dense_attention
from streamkernels.testing.inputs import Inputs, make_inputs, random_spans, spread_options

NAN = float("nan")
AT_ONCE, LATE, ANY_TIME = range(3)


class Host:
    """The kernel on CPU tensors, and the tickets that its launches left."""

    def __init__(self, extension: ModuleType, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.native = ctypes.CDLL(str(library))
        self.pace(AT_ONCE)
        self.held: Held[Tensor] = Held()
        assert extension.read_tensors(Tensor.__dlpack_c_exchange_api__, Tensor, torch.nn.Parameter)
        stand_ins = {"needed_reader": lambda: extension, "stream_of": lambda device: 0}
        for name, stand_in in (stand_ins | {"_tickets": self.held, "_plans": {}}).items():
            monkeypatch.setattr(cuda_span_attention, name, stand_in)

    def pace(self, how: int, seed: int = 0) -> None:
        self.native.set_pace(how, seed)

    def run(self, x: Inputs) -> tuple[Tensor, Tensor]:
        o, lse = cuda_span_attention.span_attention(
            x.q, x.k, x.v, x.spans.bounds, tuple(int(rule) for rule in x.spans.rules), *[None] * 7, x.sink_logits,
            None, None, x.scale, 0.0,
        )  # fmt: skip
        (tickets,) = self.held.things.values()
        assert tickets.count_nonzero() == 0
        return o, lse

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


def test_options_of_any_strides(host: Host) -> None:
    x = make_inputs(Case(1, 4, 2, 70, 90, 64, "bottom_right", torch.bfloat16, sink_logits=True))
    loose = spread_options(x)
    want = host.run(x)
    for y in (loose, replace(x, sink_logits=loose.sink_logits), replace(x, spans=loose.spans)):
        assert all(torch.equal(a, b) for a, b in zip(want, host.run(y), strict=True))


def test_calls_of_one_look_share_a_plan(host: Host) -> None:
    """And calls that differ in anything do not: sizes, strides, a slot more, sink logits, where rows begin."""
    x = make_inputs(Case(1, 2, 1, 70, 90, 64, "bottom_right", torch.bfloat16, sink_logits=True))
    wide = torch.empty(1, 2, 70, 72, dtype=torch.bfloat16)
    two = Spans(x.spans.bounds.repeat(1, 1, 2, 1))
    two.bounds[:, :, 1] = 0
    others = [
        replace(x, sink_logits=None),
        replace(x, sink_logits=x.sink_logits.bfloat16()),  # type: ignore[union-attr]
        replace(x, q=wide[..., :64].copy_(x.q)),
        replace(x, q=wide[..., 3:67].copy_(x.q)),
        replace(x, k=x.k[:, :, :80], v=x.v[:, :, :80]),
        replace(x, spans=two),
    ]
    for n, y in enumerate([x, *others]):
        for _ in range(2):
            host.check(y)
        assert len(cuda_span_attention._plans) == n + 1


@pytest.mark.parametrize(("shape", "keys"), [((2, 2, 70, 64), 0), ((0, 2, 70, 64), 9)])
def test_no_keys_and_no_rows(host: Host, shape: tuple[int, ...], keys: int) -> None:
    q, k = torch.ones(shape, dtype=torch.bfloat16), torch.ones(shape[0], 1, keys, 64, dtype=torch.bfloat16)
    bounds = torch.zeros(shape[0], 70, 1, 2, dtype=torch.int32)
    o, lse = cuda_span_attention.span_attention(q, k, k, bounds, (0,), *[None] * 10, 0.125, 0.0)
    assert o.shape == shape and o.count_nonzero() == 0 and bool((lse == -float("inf")).all())


def test_overlapping_slots_count_twice(host: Host) -> None:
    x = make_inputs(Case(1, 4, 2, 150, 170, 64, "bottom_right", torch.bfloat16))
    bounds = torch.tensor([[0, 150], [20, 170]], dtype=torch.int32).repeat(1, 150, 1, 1)
    bounds[:, 70:, 0, 1] = torch.arange(60, 140)
    x = replace(x, spans=Spans(bounds))
    wide = x.to(torch.float64)
    exact = span_attention(wide.q, wide.k, wide.v, x.spans, scale=x.scale, return_lse=True, backend="reference")
    for name, a, b in zip(("o", "lse"), host.run(x), exact, strict=True):
        assert (a.double() - b).norm() < 4e-3 * b.norm(), name


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


def test_quotients(host: Host) -> None:
    most = 2**31 - 1
    near = {n + i for n in (0, 2**16, 2**30, most) for i in (-2, -1, 0, 1)}
    numbers = sorted(n for n in near | {int(1.37**i) for i in range(69)} if 0 <= n <= most)
    for d in filter(None, numbers):
        for n in {*numbers, *(max(0, most // d * d - i) for i in range(3))}:
            assert host.native.divide(n, d) == n // d, (n, d)


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
