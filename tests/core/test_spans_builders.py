"""Builders without a schedule against Python loops: causal, chunks, windows, packed documents, window begins."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

from streamkernels.core import spans as build
from streamkernels.core.spans import Spans

torch.set_num_threads(1)


def matrix(seen: list[set[int]], T: int, S: int) -> Tensor:
    out = torch.zeros(T, S, dtype=torch.bool)
    for t, keys in enumerate(seen):
        out[t, sorted(keys)] = True
    return out


def check(spans: Spans, expected: list[list[set[int]]], S: int) -> None:
    """The spans show exactly these keys: one list of key sets per sample; rows beyond it see nothing."""
    assert spans.bounds.dtype == torch.int32 and spans.N in (1, 2, 4, 8)
    begin, end = spans.bounds.unbind(-1)
    assert bool((begin >= 0).all() and (end >= begin).all())
    visible = spans.validate(S).visible(S)
    assert visible.shape == (len(expected), 1, max(spans.T, 0), S)
    for b, seen in enumerate(expected):
        assert torch.equal(visible[b, 0], matrix(seen, spans.T, S)), b


LENGTHS = [[1], [17], [0], [3, 0, 63], [5, 5], [2, 7, 1, 4]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_causal(lengths: list[int]) -> None:
    S = max(lengths) + 2
    check(build.causal(lengths), [[set(range(i + 1)) for i in range(n)] for n in lengths], S)
    if len(lengths) == 1:
        assert torch.equal(build.causal(lengths[0], B=3).bounds, build.causal(lengths * 3).bounds)
        assert torch.equal(build.causal(lengths[0]).bounds, build.causal(torch.tensor(lengths)).bounds)


@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.parametrize("T", [0, 1, 4, 20])
def test_bottom_right(keys: list[int], T: int) -> None:
    rows = [[set(range(max(0, s - T + i + 1))) for i in range(T)] for s in keys]
    check(build.bottom_right(T, keys), rows, max(keys) + 1)
    ragged = [max(0, T - b) for b in range(len(keys))]
    rows = [[set(range(max(0, s - t + i + 1))) for i in range(t)] for t, s in zip(ragged, keys, strict=True)]
    check(build.bottom_right(ragged, keys), rows, max(keys) + 1)


def test_bottom_right_of_all_rows_is_causal() -> None:
    assert torch.equal(build.bottom_right(9, 9, B=2).bounds, build.causal(9, B=2).bounds)
    assert torch.equal(build.bottom_right([3, 9], [3, 9]).bounds, build.causal([3, 9]).bounds)
    assert build.bottom_right([1, 2], 4).bounds[:, :, 0, 1].tolist() == [[4, 0], [3, 4]]


@pytest.mark.parametrize("window", [1, 2, 5, 99])
@pytest.mark.parametrize("sinks", [0, 1, 4, 99])
@pytest.mark.parametrize(("T", "S"), [([7], [7]), ([3], [9]), ([1, 6, 0], [11, 6, 2]), ([5], [3])])
def test_sliding_window(window: int, sinks: int, T: list[int], S: list[int]) -> None:
    expected = []
    for t, s in zip(T, S, strict=True):
        at = [s - t + i for i in range(t)]
        expected.append([{j for j in range(me + 1) if me - j < window or j < sinks} for me in at])
    check(build.sliding_window(T, window, sinks=sinks, S=S), expected, max(S) + 1)
    if T == S and len(T) == 1:
        check(build.sliding_window(T[0], window, sinks=sinks), expected, S[0])


@pytest.mark.parametrize("documents", [[[3, 1, 4]], [[]], [[0, 2, 0], [5], [1, 1, 1, 1]], [[2], []]])
def test_packed(documents: list[list[int]]) -> None:
    expected = []
    for lengths in documents:
        seen, begin = [], 0
        for n in lengths:
            seen += [set(range(begin, begin + i + 1)) for i in range(n)]
            begin += n
        expected.append(seen)
    T = max(map(len, expected))
    check(build.packed(documents), expected, T + 1)
    longer = build.packed(documents, T=T + 3)
    assert longer.T == T + 3
    check(longer, expected, T + 3)
    if len(documents) == 1:
        assert torch.equal(build.packed(documents[0]).bounds, build.packed(documents).bounds)


def window_sets(q: list, k: list, window: float, sinks: int) -> list[set[int]]:
    first = len(k) - len(q)
    return [{j for j in range(min(first + i + 1, len(k))) if q[i] - k[j] < window or j < sinks} for i in range(len(q))]


@pytest.mark.parametrize("seed", range(40))
def test_sliding_window_by_position(seed: int) -> None:
    draw = random.Random(seed)
    batch_q, batch_k = [], []
    step = draw.choice([[1], [1, 2, 9], [0.5, 1.0, 0.25]])
    for _ in range(draw.choice([1, 3])):
        n = draw.choice([0, 1, 6, 17])
        k: list = [draw.choice([0, 3, -5, 10**6])]
        for _ in range(n - 1):
            k.append(k[-1] + draw.choice(step))
        k = k[:n]
        rows = draw.randint(0, n)
        # queries may stand anywhere, in any order: only causality is by index
        q = k[n - rows :] if draw.random() < 0.5 else [draw.choice(k) + draw.choice([0, 1, 7]) for _ in range(rows)]
        batch_q.append(q)
        batch_k.append(k)
    window, sinks = draw.choice([1, 2, 4, 2.5, 99]), draw.choice([0, 1, 4])
    expected = [window_sets(q, k, window, sinks) for q, k in zip(batch_q, batch_k, strict=True)]
    S = max(map(len, batch_k)) + 1
    check(build.sliding_window_by_position(batch_q, batch_k, window, sinks=sinks), expected, S)


def test_sliding_window_by_position_without_gaps_is_the_one_by_index() -> None:
    at = torch.arange(9) + 100
    spans = build.sliding_window_by_position(at[4:], at, 3, sinks=2)
    assert torch.equal(spans.bounds, build.sliding_window(5, 3, sinks=2, S=9).bounds)
    both = build.sliding_window_by_position(at.expand(2, 9), at.expand(2, 9), 3)
    assert torch.equal(both.bounds, build.sliding_window(9, 3, B=2).bounds)


def test_large_integer_positions_are_not_rounded() -> None:
    at = 2**60 + torch.arange(6)
    spans = build.sliding_window_by_position(at, at, 2)
    assert torch.equal(spans.bounds, build.sliding_window(6, 2).bounds)


@pytest.mark.parametrize("seed", range(20))
def test_window_begins(seed: int) -> None:
    draw = random.Random(seed)
    B, T, S = draw.randint(1, 3), draw.choice([1, 5]), draw.choice([1, 8])
    dtype = draw.choice([torch.int64, torch.int32, torch.float32])
    k = torch.tensor([sorted(draw.sample(range(-9, 40), S)) for _ in range(B)]).to(dtype)
    q = torch.tensor([[draw.randint(-9, 60) for _ in range(T)] for _ in range(B)]).to(dtype)
    count = torch.tensor([draw.randint(0, S) for _ in range(B)], dtype=torch.int32)
    for b in range(B):
        k[b, int(count[b]) :] = draw.choice([0, -3])
    window = draw.choice([1, 4, 30])
    begins = build.window_begins(q, k, window, k_count=count)
    assert begins.dtype == torch.int32 and begins.shape == (B, T)
    for b in range(B):
        n = int(count[b])
        for t in range(T):
            outside = [j for j in range(n) if q[b, t] - k[b, j] >= window]
            assert int(begins[b, t]) == len(outside)
    assert torch.equal(build.window_begins(q, k, window, k_count=count, check=False), begins)


def test_windows_of_a_grouped_stream_by_position_and_by_index() -> None:
    # source positions 0..9, target 0..3: what is near by position does not depend on how much has been read
    source, target = torch.arange(10)[None], torch.arange(4)[None]
    assert build.window_begins(target, source, 3).tolist() == [[0, 0, 0, 1]]
    assert build.window_begins(target, target, 3).tolist() == [[0, 0, 0, 1]]
    assert build.window_begins(target + 8, source, 3).tolist() == [[6, 7, 8, 9]]
    for limits in ([4, 5, 6, 7], [10, 10, 10, 10]):
        by_source, by_target = build.window_begins_by_index(target, torch.tensor([limits]), 3)
        for j, limit in enumerate(limits):
            order = [("s", i) for i in range(limit)] + [("t", i) for i in range(j + 1)]
            near = order[-3:]
            assert [i for kind, i in near if kind == "s"] == list(range(int(by_source[0, j]), limit))
            assert [i for kind, i in near if kind == "t"] == list(range(int(by_target[0, j]), j + 1))


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "causal: T: expected an int", lambda: build.causal(True)),
        (TypeError, "causal: T: expected ints", lambda: build.causal([3, 2.0])),
        (TypeError, "causal: T: expected an int, or one int per sample", lambda: build.causal("12")),
        (TypeError, "causal: T: expected ints", lambda: build.causal(torch.tensor([1.0]))),
        (ValueError, "causal: T: expected an int >= 0, got -1", lambda: build.causal(-1)),
        (ValueError, "causal: T: expected ints >= 0, got -2 at index 1", lambda: build.causal([3, -2])),
        (ValueError, "causal: T: expected 3 samples, got 2", lambda: build.causal([3, 2], B=3)),
        (ValueError, "causal: B", lambda: build.causal(3, B=0)),
        (ValueError, "causal: T: expected at least one sample", lambda: build.causal([])),
        (ValueError, "bottom_right: S: expected 2 samples", lambda: build.bottom_right([1, 2], [3])),
        (ValueError, "sliding_window: window", lambda: build.sliding_window(3, 0)),
        (TypeError, "sliding_window: window", lambda: build.sliding_window(3, 1.5)),
        (ValueError, "sliding_window: sinks", lambda: build.sliding_window(3, 1, sinks=-1)),
        (ValueError, r"packed: document_lengths\[1\]", lambda: build.packed([[1], [2, -1]])),
        (TypeError, "packed: document_lengths", lambda: build.packed([[1], 2])),
        (ValueError, "packed: T: expected an int >= 4", lambda: build.packed([1, 3], T=3)),
        (ValueError, "k_positions: .*increase.*, got 4 then 4 at key 2", lambda: by_position([0], [1, 4, 4])),
        (ValueError, "k_positions: .*got 4 then 1 at key 1", lambda: by_position([[0], [0]], [[0, 1], [4, 1]])),
        (ValueError, "q_positions: .*one axis", lambda: by_position(torch.zeros(3, 1, 5), torch.zeros(1, 5))),
        (ValueError, "k_positions: expected finite", lambda: by_position([0.0], [0.0, float("nan")])),
        (ValueError, "k_positions: expected 2 samples", lambda: by_position([[0], [0]], [[0]])),
        (TypeError, "q_positions", lambda: by_position("ab", [0])),
        (ValueError, "window: expected a number > 0", lambda: build.sliding_window_by_position([0], [0], 0)),
        (ValueError, "window_begins: k_positions: .*got 2 then 1", lambda: begins([[2, 1]])),
        (ValueError, r"window_begins: k_positions: expected shape \[B, S\] with B=1", lambda: begins([[1], [2]])),
    ],
)
def test_bad_input_is_refused_by_name(error: type[Exception], text: str, call) -> None:
    with pytest.raises(error, match=text):
        call()


def by_position(q: object, k: object) -> Spans:
    return build.sliding_window_by_position(q, k, 2)


def begins(k: list) -> Tensor:
    return build.window_begins(torch.tensor([[5]]), torch.tensor(k), 2)


def test_long_sequences_take_milliseconds() -> None:
    at = torch.arange(32768)
    for call in (
        lambda: build.causal(32768),
        lambda: build.sliding_window(32768, 4096, sinks=4),
        lambda: build.sliding_window_by_position(at, at, 4096),
        lambda: build.packed([64] * 512),
    ):
        start = time.process_time()
        call()
        # a loop over rows takes longer than this by an order of magnitude
        assert time.process_time() - start < 0.25
