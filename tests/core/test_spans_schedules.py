"""Schedules: limits of wait-k and of any phi against the training mask built step by step, and the spans of each."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

from streamkernels.core import spans as build
from streamkernels.core.spans import Spans

torch.set_num_threads(1)


def check(spans: Spans, expected: list[list[set[int]]], S: int) -> None:
    """The spans show exactly these keys: one list of key sets per sample; rows beyond it see nothing."""
    begin, end = spans.bounds.unbind(-1)
    assert bool((begin >= 0).all() and (end >= begin).all())
    visible = spans.validate(S).visible(S)
    assert visible.shape == (len(expected), 1, spans.T, S)
    for b, seen in enumerate(expected):
        wanted = torch.zeros(spans.T, S, dtype=torch.bool)
        for t, keys in enumerate(seen):
            wanted[t, sorted(keys)] = True
        assert torch.equal(visible[b, 0], wanted), b


def training_mask(source: list[int], target: list[int], k: int, shift: bool = True) -> Tensor:
    """The training mask as arXiv 2505.16983's code defines it, step by step and dense: bool [L, L], True = blocked."""
    S, T, n_seg = sum(source), sum(target), len(source)
    # 1. causal
    blocked = torch.ones(S + T, S + T, dtype=torch.bool).triu(1)
    # 2. target segment j sees min(k + j, n_seg) source segments
    row = S
    for j, length in enumerate(target):
        for _ in range(length):
            blocked[row, sum(source[: min(k + j, n_seg)]) : S] = True
            row += 1
    # 3. within the source's columns, row r takes row r + 1's mask; the last row keeps its own
    if shift:
        before = blocked.clone()
        for r in range(S, S + T - 1):
            blocked[r, :S] = before[r + 1, :S]
    # 4. source rows are causal inside the source, target rows among each other: step 1 left it so
    return blocked


def draw_lengths(draw: random.Random, empty: bool) -> tuple[list[int], list[int]]:
    low = 0 if empty else 1
    source = [draw.randint(low, 4) for _ in range(draw.randint(1, 6))]
    target = [draw.randint(low, 3) for _ in range(draw.randint(1, 6))]
    return source, target


def test_the_worked_example() -> None:
    source, target = [10, 1, 2, 1, 3, 2], [3, 2, 1, 2, 2]
    limits = [13, 13, 14, 14, 17, 19, 19, 19, 19, 19]
    assert build.wait_k_limits(source, target, 3) == limits
    assert build.limits_from_visible(source, target, lambda s: min(3 + s, 6)) == limits
    spans = build.wait_k(source, target, 3)
    assert torch.equal(spans.visible(29)[0, 0], ~training_mask(source, target, 3))
    # unshifted: the header's three rows, then each word's, see what was read when they were written
    assert build.wait_k_limits(source, target, 3, shift=False) == [13, 13, 13, 14, 14, 17, 19, 19, 19, 19]


def test_2000_random_cases_equal_the_training_mask() -> None:
    draw = random.Random(0)
    for case in range(2000):
        source, target = draw_lengths(draw, empty=case % 4 == 0)
        k, shift = draw.randint(1, 8), case % 5 != 0
        S, T = sum(source), sum(target)
        limits = build.wait_k_limits(source, target, k, shift=shift)
        allowed = ~training_mask(source, target, k, shift)
        assert limits == allowed[S:, :S].sum(1).tolist(), (source, target, k)
        visible = build.from_limits(limits, S).visible(S + T)[0, 0]
        assert torch.equal(visible, allowed), (source, target, k)


@pytest.mark.parametrize(
    ("target_segment", "k", "segments", "expected"),
    [(0, 1, 9, 1), (1, 1, 9, 2), (2, 3, 9, 5), (0, 99, 9, 9), (99, 1, 9, 9), (0, None, 9, 9), (3, None, 0, 0)],
)
def test_visible_segments(target_segment: int, k: int | None, segments: int, expected: int) -> None:
    assert build.visible_segments(target_segment, k, segments) == expected


@pytest.mark.parametrize("k", [6, 99, None])
def test_a_large_k_and_none_read_everything(k: int | None) -> None:
    assert build.wait_k_limits([10, 1, 2, 1, 3, 2], [3, 2], k) == [19] * 5
    assert build.wait_k_limits([], [3], k) == [0] * 3
    assert build.wait_k_limits([4], [], k) == []


@pytest.mark.parametrize("seed", range(30))
def test_any_schedule(seed: int) -> None:
    draw = random.Random(seed)
    source, target = draw_lengths(draw, empty=True)
    read = sorted(draw.randint(0, 9) for _ in target)
    asked: list[int] = []

    def visible(s: int) -> int:
        asked.append(s)
        return read[s]

    for shift in (True, False):
        asked.clear()
        got = build.limits_from_visible(source, target, visible, shift=shift)
        assert asked == list(range(len(target)))
        segment_of = [s for s, n in enumerate(target) for _ in range(n)]
        expected = []
        for r in range(len(segment_of)):
            s = segment_of[min(r + 1, len(segment_of) - 1)] if shift else segment_of[r]
            expected.append(sum(source[: read[s]]))
        assert got == expected


def grouped_sets(limits: list[int], S: int) -> list[set[int]]:
    rows = [set(range(i + 1)) for i in range(S)]
    return rows + [set(range(limit)) | set(range(S, S + j + 1)) for j, limit in enumerate(limits)]


@pytest.mark.parametrize("seed", range(20))
def test_ragged_batches(seed: int) -> None:
    draw = random.Random(seed)
    B = draw.randint(2, 4)
    pairs = [draw_lengths(draw, empty=True) for _ in range(B)]
    pairs[draw.randrange(B)] = ([], [])
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    ks = [draw.choice([1, 2, 5, None]) for _ in range(B)]
    k = draw.choice([2, None])
    for given, each in ((ks, ks), (k, [k] * B)):
        spans = build.wait_k(sources, targets, given)
        limits = [build.wait_k_limits(s, t, one) for s, t, one in zip(sources, targets, each, strict=True)]
        expected = [grouped_sets(limit, sum(s)) for limit, s in zip(limits, sources, strict=True)]
        longest = max(map(len, expected))
        assert spans.T == longest
        check(spans, expected, longest + 2)
        check(build.wait_k(sources, targets, given, T=longest + 5), expected, longest + 5)
        again = build.from_limits(limits, [sum(s) for s in sources])
        assert torch.equal(again.bounds, spans.bounds)


def test_limits_may_go_down_and_come_as_tensors() -> None:
    check(build.from_limits([3, 0, 2], 3), [grouped_sets([3, 0, 2], 3)], 6)
    batch = build.from_limits(torch.tensor([[3, 0], [1, 1]]), 3)
    check(batch, [grouped_sets([3, 0], 3), grouped_sets([1, 1], 3)], 5)
    ragged = build.from_limits([torch.tensor([1]), torch.tensor([], dtype=torch.long)], torch.tensor([1, 4]))
    check(ragged, [grouped_sets([1], 1), grouped_sets([], 4)], 5)


def arrival(limits: list[int], S: int) -> list[int]:
    """Tokens in the order in which they arrive: a target row comes once its limit of source tokens has been read."""
    order, j = [], 0
    for i in range(S + 1):
        while j < len(limits) and limits[j] <= i:
            order.append(S + j)
            j += 1
        if i < S:
            order.append(i)
    return order


@pytest.mark.parametrize("seed", range(40))
def test_interleaved_is_causal_in_order_of_arrival(seed: int) -> None:
    draw = random.Random(seed)
    B = draw.randint(1, 3)
    lengths = [draw.choice([0, 1, 5, 9]) for _ in range(B)]
    limits = [sorted(draw.randint(0, S) for _ in range(draw.choice([0, 1, 6]))) for S in lengths]
    expected = []
    for limit, S in zip(limits, lengths, strict=True):
        order = arrival(limit, S)
        assert build.arrival_order(limit, S) == order
        expected.append([set(order[: order.index(row) + 1]) for row in range(len(order))])
    longest = max(map(len, expected))
    check(build.interleaved(limits, lengths, T=longest + 1), expected, longest + 1)
    # a target row sees the same as in group streaming: only source rows see more
    grouped = build.from_limits(limits, lengths)
    mixed = build.interleaved(limits, lengths)
    for b, S in enumerate(lengths):
        assert torch.equal(grouped.bounds[b, S:], mixed.bounds[b, S:])


def test_interleaved_wait_k_without_shift_reads_before_it_writes() -> None:
    # prompt of 2, three words; wait-1 writes the header, reads a word, writes word 1, reads, ...
    source, target = [2, 1, 1, 1], [1, 1, 1, 1]
    limits = build.wait_k_limits(source, target, 1, shift=False)
    assert build.arrival_order(limits, 5) == [0, 1, 5, 2, 6, 3, 7, 4, 8]
    shifted = build.wait_k_limits(source, target, 1)
    assert build.arrival_order(shifted, 5) == [0, 1, 2, 5, 3, 6, 4, 7, 8]


@pytest.mark.parametrize(("source", "target"), [(5, 3), ([5, 0, 2], [3, 4, 0]), ([1, 7], 2), (3, [0, 1])])
def test_re_encoded_steps(source: int | list[int], target: int | list[int]) -> None:
    B = max(len(x) if isinstance(x, list) else 1 for x in (source, target))
    sources, targets = (x if isinstance(x, list) else [x] * B for x in (source, target))
    expected = [
        [set(range(i + 1)) for i in range(S)] + [set(range(S)) | set(range(S, S + j + 1)) for j in range(n)]
        for S, n in zip(sources, targets, strict=True)
    ]
    longest = max(map(len, expected))
    check(build.re_encoded(source, target), expected, longest + 1)
    assert build.re_encoded(source, target, T=longest + 2).T == longest + 2
    # every target row sees all that has been read: more than it saw when it was written
    all_read = build.from_limits([[S] * n for S, n in zip(sources, targets, strict=True)], sources)
    assert torch.equal(all_read.visible(longest), build.re_encoded(source, target).visible(longest))


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, "wait_k: k: expected an int >= 1, got 0", lambda: build.wait_k([1], [1], 0)),
        (TypeError, "wait_k: k: expected an int, got 1.5", lambda: build.wait_k_limits([1], [1], 1.5)),
        (TypeError, "wait_k: k: expected an int, got True", lambda: build.wait_k_limits([1], [1], True)),
        (ValueError, "wait_k: k: expected 2 samples", lambda: build.wait_k([[1], [1]], [[1], [1]], [1])),
        (ValueError, "visible_segments: k", lambda: build.visible_segments(0, 0, 3)),
        (ValueError, "visible_segments: target_segment", lambda: build.visible_segments(-1, 1, 3)),
        (ValueError, "wait_k: target_lengths: expected 2 samples", lambda: build.wait_k([[1], [1]], [[1]], 1)),
        (ValueError, r"wait_k: source_lengths\[1\]: .*-1 at index 0", lambda: build.wait_k([[1], [-1]], [[1], [1]], 1)),
        (TypeError, r"wait_k: target_lengths: expected ints", lambda: build.wait_k([1], [0.5], 1)),
        (TypeError, "wait_k: source_lengths", lambda: build.wait_k(7, [1], 1)),
        (ValueError, "wait_k: T|from_limits: T", lambda: build.wait_k([2], [2], 1, T=3)),
        (ValueError, r"limits_from_visible: visible\(1\)", lambda: from_visible(lambda s: -s)),
        (TypeError, r"visible\(0\): expected an int", lambda: from_visible(lambda s: 0.5)),
        (ValueError, "limits: expected limits <= source_length 3, got 4 at", lambda: build.from_limits([0, 4], 3)),
        (ValueError, r"limits\[1\]: .*<= source_length 2", lambda: build.from_limits([[3], [3]], [3, 2])),
        (ValueError, "limits: expected ints >= 0, got -1", lambda: build.from_limits([0, -1], 3)),
        (TypeError, "limits", lambda: build.from_limits(torch.tensor([0.5]), 3)),
        (ValueError, "source_length: expected 1 samples", lambda: build.from_limits([0], [1, 2])),
        (ValueError, "interleaved: limits: .*got 2 then 1 at row 1", lambda: build.interleaved([2, 1], 3)),
        (ValueError, "re_encoded: target_length: expected 2", lambda: build.re_encoded([1, 2], [1])),
        (ValueError, "re_encoded: source_length", lambda: build.re_encoded(-1, 1)),
    ],
)
def test_bad_input_is_refused_by_name(error: type[Exception], text: str, call) -> None:
    with pytest.raises(error, match=text):
        call()


def from_visible(visible) -> list[int]:
    return build.limits_from_visible([1], [1, 1], visible)


def test_wait_k_for_long_inputs_takes_milliseconds() -> None:
    source, target = [20] + [16] * 1024 + [3], [3] + [16] * 1024 + [1]
    build.wait_k([1], [1], 1)
    start = time.process_time()
    spans = build.wait_k(source, target, 5)
    assert time.process_time() - start < 0.25
    assert spans.T == sum(source) + sum(target)
