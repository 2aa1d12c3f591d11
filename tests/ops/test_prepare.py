"""prepare summarises spans by blocks: against literal loops over rows and keys."""

from __future__ import annotations

import pytest
import torch

from streamkernels import Spans, explain, prepare, spans
from streamkernels.reference import prepare as reference
from streamkernels.testing.inputs import random_spans


def by_loops(bounds: torch.Tensor, S: int) -> tuple[list, list]:
    B, T, N, _ = bounds.shape
    row_blocks = [
        [[[S, 0, S, 0] for _ in range(N)] for _ in range(0, T, 64)] for _ in range(B)
    ]  # smallest begin, largest begin, smallest end, largest end
    reaching = [[set() for _ in range(0, S, 64)] for _ in range(B)]
    for b in range(B):
        for t, row in enumerate(bounds[b].tolist()):
            for n, (begin, end) in enumerate(row):
                begin, end = max(0, min(S, begin)), max(0, min(S, end))
                if end <= begin:
                    begin, end = S, 0
                block = row_blocks[b][t // 64][n]
                block[:] = [min(block[0], begin), max(block[1], begin), min(block[2], end), max(block[3], end)]
        for i, blocks in enumerate(row_blocks[b]):
            for begin, _, _, end in blocks:
                for j in range(begin, end):
                    reaching[b][j // 64].add(i)
    return row_blocks, [[two_runs(sorted(blocks)) for blocks in sample] for sample in reaching]


def two_runs(blocks: list[int]) -> list[int]:
    if not blocks:
        return [0, 0, 0, 0]
    gaps = [b - a for a, b in zip(blocks, blocks[1:], strict=False)]
    if max(gaps, default=1) == 1:
        return [blocks[0], blocks[-1] + 1, 0, 0]
    i = gaps.index(max(gaps))
    return [blocks[0], blocks[i] + 1, blocks[i + 1], blocks[-1] + 1]


def shapes():
    random = torch.Generator().manual_seed(0)
    yield "causal", spans.causal([200, 131]).bounds, 200
    yield "window", spans.sliding_window([200], 30, sinks=3).bounds, 200
    yield "wait_k", spans.wait_k([[70, 60, 1]], [[5, 90]], 1).bounds, 226
    for B, T, S, N in ((2, 1, 1, 1), (1, 63, 65, 2), (2, 64, 64, 4), (3, 129, 77, 8)):
        yield f"random {T} {S}", random_spans(B, T, S, N, random).bounds, S
    yield "gaps", (torch.arange(500)[:, None] // 64 % 3 * 100 + torch.tensor([0, 40])).int()[None, :, None], 300
    yield "garbage", torch.randint(-(2**31), 2**31 - 1, (2, 70, 2, 2), generator=random).to(torch.int32), 100
    yield "nothing", torch.zeros(1, 70, 1, 2, dtype=torch.int32), 100
    yield "no keys", torch.ones(1, 70, 1, 2, dtype=torch.int32), 0
    yield "no rows", torch.ones(1, 0, 1, 2, dtype=torch.int32), 70


@pytest.mark.parametrize("bounds, S", [pytest.param(*rest, id=name) for name, *rest in shapes()])
def test_equals_loops(bounds, S, monkeypatch):
    row_blocks, key_blocks = by_loops(bounds, S)
    B, T, N, _ = bounds.shape
    for pairs in (reference.PAIRS, 1):
        monkeypatch.setattr(reference, "PAIRS", pairs)
        ours = prepare(bounds, S)
        assert ours[0].dtype == ours[1].dtype == torch.int32
        assert ours[0].shape == (B, -(-T // 64), N, 4) and ours[1].shape == (B, -(-S // 64), 4)
        assert ours[0].tolist() == row_blocks
        assert ours[1].tolist() == key_blocks


def test_a_block_touches_and_fills_what_it_says():
    S = 300
    sp = random_spans(1, 150, S, 2, torch.Generator().manual_seed(1), empty=0.0)
    blocks = prepare(sp, S)[0][0].tolist()
    inside = [[set(range(*span)) for span in row] for row in sp.bounds[0].tolist()]
    for i, block in enumerate(blocks):
        rows = inside[64 * i : 64 * i + 64]
        for n, (least_begin, most_begin, least_end, most_end) in enumerate(block):
            assert set().union(*(row[n] for row in rows)) <= set(range(least_begin, most_end))
            assert set(range(most_begin, least_end)) <= set.intersection(*(row[n] for row in rows))


def test_a_spans_object_gives_its_bounds():
    sp = spans.causal(70)
    assert all(torch.equal(a, b) for a, b in zip(prepare(sp, 70), prepare(sp.bounds, 70), strict=True))
    assert explain(prepare, sp, 70).backend == "reference"


def test_opcheck():
    for T, S in ((1, 1), (70, 130)):
        bounds = random_spans(2, T, S, 2, torch.Generator().manual_seed(0)).bounds
        torch.library.opcheck(torch.ops.streamkernels.prepare.default, (bounds, S, "reference"))


REFUSED = [
    ({"spans": torch.zeros(1, 5, 2, 2)}, TypeError, "spans: expected int32, got float32"),
    ({"spans": torch.zeros(1, 5, 2, 3, dtype=torch.int32)}, ValueError, r"spans: expected shape \[B, T, N, 2\]"),
    ({"spans": [[0, 1]]}, TypeError, "spans: expected a tensor"),
    ({"S": -1}, ValueError, "S: expected an int >= 0, got -1"),
    ({"S": 5.0}, TypeError, "S: expected an int, got 5.0"),
    ({"backend": "triton"}, NotImplementedError, "backend='triton' cannot run this call"),
]


@pytest.mark.parametrize("change, error, message", REFUSED, ids=range(len(REFUSED)))
def test_refuses(change, error, message):
    arguments = {"spans": Spans(torch.zeros(1, 5, 2, 2, dtype=torch.int32)), "S": 5} | change
    with pytest.raises(error, match="prepare: " + message):
        prepare(**arguments)
