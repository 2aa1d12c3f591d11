"""A sliding window laid over spans, against loops over rows and keys."""

from __future__ import annotations

import random

import pytest
import torch

from streamkernels import spans as builders
from streamkernels.core.spans import Spans, windowed_by_index, windowed_by_position


def loops(bounds, keep):
    """What of the spans' keys `keep(b, t, keys)` leaves, as bool [B, T, S]."""
    B, T = bounds.shape[:2]
    out = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            keys = sorted({s for begin, end in bounds[b, t].tolist() for s in range(max(begin, 0), min(end, T))})
            for s in keep(b, t, keys):
                out[b, t, s] = True
    return out


@pytest.mark.parametrize("window", [1, 3, 2.5, 100])
def test_by_position(window):
    rng = random.Random(1)
    for _ in range(20):
        lengths = [[rng.randint(1, 6), rng.randint(1, 6)] for _ in range(2)]
        limits = [sorted(rng.randint(0, s) for _ in range(t)) for s, t in lengths]
        spans = builders.from_limits(limits, [s for s, _ in lengths])
        T = spans.T
        offset = rng.choice([0, 4, 0.5, -3])
        positions = torch.tensor(
            [[*range(10, 10 + 2 * s, 2), *(offset + 10 + j for j in range(T - s))] for s, _ in lengths]
        )
        got = Spans(windowed_by_position(spans.bounds, positions, window)).visible(T)[:, 0]
        want = loops(
            spans.bounds, lambda b, t, keys, p=positions: [s for s in keys if float(p[b, t] - p[b, s]) < window]
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_by_index(window):
    rng = random.Random(2)
    for _ in range(20):
        T, N = rng.randint(1, 9), rng.choice([1, 2, 4])
        bounds = torch.zeros(2, T, N, 2, dtype=torch.int32)
        for b in range(2):
            for t in range(T):
                cuts = sorted(rng.sample(range(T + 9), 2 * N))
                slots = [(c, d) if rng.random() < 0.8 else (d, c) for c, d in zip(cuts[::2], cuts[1::2], strict=True)]
                slots = [(min(c, T), min(d, T)) for c, d in slots]
                rng.shuffle(slots)
                bounds[b, t] = torch.tensor(slots)
        got = Spans(windowed_by_index(bounds, window)).visible(T)[:, 0]
        assert torch.equal(got, loops(bounds, lambda b, t, keys: keys[-window:]))


def test_packed_documents_have_positions_of_their_own():
    spans, positions = builders.packed([3, 4]), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    got = windowed_by_position(spans.bounds, positions, 2)
    assert got[0, :, 0].tolist() == [[0, 1], [0, 2], [1, 3], [3, 4], [3, 5], [4, 6], [5, 7]]


def test_refusals():
    bounds, positions = builders.causal(5).bounds, torch.tensor([[0, 1, 2, 1, 2]])
    with pytest.raises(ValueError, match="row 3 in sample 0"):
        windowed_by_position(bounds, positions, 2)
    assert windowed_by_position(bounds, positions, 2, check=False).shape == bounds.shape
    assert windowed_by_position(bounds[:, :0], positions[:, :0], 2).shape == (1, 0, 1, 2)
    for bad in (0, -1.0):
        with pytest.raises(ValueError, match="window"):
            windowed_by_position(bounds, positions, bad)
    with pytest.raises((ValueError, TypeError), match="window"):
        windowed_by_index(bounds, 0)
    with pytest.raises(TypeError, match="bounds"):
        windowed_by_index(bounds.long(), 2)
