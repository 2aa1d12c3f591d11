"""How incremental_prefill's CUDA kernels plan, share out and weigh, run on the host: their own source, see
`test_cuda_on_host.py`.
"""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch
from torch import Tensor

from streamkernels.core.slots import stream_index
from streamkernels.reference import incremental_prefill as prefill


def prefill_sessions() -> list[tuple[dict[str, int | tuple[int, int]], Tensor]]:
    """Random sessions of `incremental_prefill`: sizes, and rows [T, 4] of (role, limit, source begin, target begin)."""
    random = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    found = []
    for i in range(400):
        T = draw(1, 40)
        length = (draw(0, 300), draw(0, 300))
        ring = i % 3 == 0
        window = (draw(1, 60) if ring else 0, draw(1, 60) if ring and i % 2 else 0)
        ring_sinks = draw(0, 5) if ring else 0
        sinks = tuple(draw(0, ring_sinks + 1 if w else 70) for w in window)
        capacity = tuple(
            ring_sinks + w + T - 1 + draw(0, 9) if w else max(0, n + draw(-3, T + 9))
            for w, n in zip(window, length, strict=True)
        )
        roles = torch.randint(-1, 2, (T,), generator=random) if i % 4 else torch.full((T,), draw(0, 2))
        far = draw(0, 2) * 2**31
        columns = [torch.randint(-5 - far, 330 + far, (T,), generator=random).clamp(-(2**31), 2**31 - 1) for _ in "lbb"]
        rows = torch.stack([roles, *columns], 1).int()
        sizes = dict(T=T, length=length, window=window, ring_sinks=ring_sinks, sinks=sinks, capacity=capacity)
        found.append((sizes, rows))
    return found


@pytest.mark.parametrize("keys", [32, 128])
def test_plans_see_what_the_reference_sees(native: ctypes.CDLL, keys: int) -> None:
    """What each row sees is what the reference says, and every old key that a row sees lies in exactly one tile."""
    for sizes, rows in prefill_sessions():
        T, length, window, ring = sizes["T"], sizes["length"], sizes["window"], sizes["ring_sinks"]
        flat = [x for s in (0, 1) for x in (sizes["capacity"][s], sizes["sinks"][s], window[s])]
        inputs = (ctypes.c_int * 11)(*flat, ring, *length, T, keys)
        out, sights = (ctypes.c_int * 17)(), (ctypes.c_int * (4 * T))()
        native.session_of(inputs, (ctypes.c_int * (4 * T))(*rows.flatten().tolist()), out, sights)
        role, limit, *begins = rows[None].unbind(-1)
        placed = prefill.place_rows(torch.tensor([length]), role.to(torch.int8), 0, T)
        least = [max(n, ring if w else 0) for n, w in zip(sizes["sinks"], window, strict=True)]
        want = prefill.sights(placed, limit, (begins[0], begins[1]), (least[0], least[1]), window)
        steps = 0
        for s in (0, 1):
            total, held, _, _, sinks, sink_tiles, first, tiles = out[8 * s : 8 * s + 8]
            steps += sink_tiles + tiles
            C = sizes["capacity"][s]
            slots = torch.arange(C)
            index = stream_index(slots, placed.total[s][:, None], C, ring, window[s] > 0)
            seen = torch.zeros(T, total + keys, dtype=torch.bool)
            visible = want[s].sees(index, slice(0, T))[0]
            held_here = index[0] >= 0
            seen[:, index[0, held_here]] = visible[:, held_here]
            j = torch.arange(total + keys)
            got = torch.tensor([sights[4 * t + 2 * s : 4 * t + 2 * s + 2] for t in range(T)])
            ours = (j < got[:, 1:]) & ((j >= got[:, :1]) | (j < sinks))
            assert torch.equal(ours, seen), (sizes, s)
            covered = torch.zeros(total + 2 * keys, dtype=torch.int)
            for tile in [*range(sink_tiles), *range(first, first + tiles)]:
                covered[tile * keys : (tile + 1) * keys] += 1
            assert (covered <= 1).all() and covered[: held].bool()[seen[:, :held].any(0)].all(), (sizes, s)
        assert out[16] == max(1, steps + (0 if T <= 32 else -(-T // keys)))


def test_shares_cover_every_step(native: ctypes.CDLL) -> None:
    out = (ctypes.c_int * 2)()
    for items, steps, workers, smallest, blocks in itertools.product(
        (1, 4, 8, 28, 112, 900), (1, 2, 7, 9, 33, 512, 16384), (14, 30, 66, 132), (0, 1, 3), (1, 8)
    ):
        native.shares_of(items, steps, workers, smallest, blocks, out)
        each, share = out
        assert share >= 1 and share * workers >= items * (each or steps) and each % share == 0
        assert each == 0 or steps <= each < steps + share
        # of a worker's blocks, no one has more than a few steps more than it has to have
        assert share <= max(-(-items * steps // workers), 2 << smallest) + 4 * blocks, (items, steps, workers)


@pytest.mark.parametrize("fresh", [False, True])
def test_parts_tile_their_range(native: ctypes.CDLL, fresh: bool) -> None:
    """Beside the call's new rows, which cost two steps, part 0 gets fewer."""
    out = (ctypes.c_int * 2)()
    for begin, size, log in itertools.product((0, 7, 10**6), (0, 1, 5, 8, 17, 4103, 100000), range(fresh, 4)):
        at, sizes = begin, []
        for i in range(2**log):
            native.part_of(begin, begin + size, i, log, fresh, out)
            assert out[0] == at
            at = out[1]
            sizes.append(out[1] - out[0])
        assert at == begin + size
        others = sizes[1:] if fresh else sizes
        assert max(others, default=0) - min(others, default=0) <= 1
        if fresh:
            assert sizes[0] <= max(0, max(others) - 1)
            assert max(others) <= -(-(size + 2) // 2**log) + 1


def test_cuts_a_range_for_any_number_of_blocks(native: ctypes.CDLL) -> None:
    """Beside the call's new rows, which are a tile, part 0 gets one less."""
    out = (ctypes.c_int * 2)()
    for begin, size, n, fresh in itertools.product((0, 7, 10**4), (0, 1, 5, 17, 4103), (2, 3, 11, 16), (False, True)):
        at, sizes = begin, []
        for i in range(n):
            native.cut_of(begin, begin + size, i, n, fresh, out)
            assert out[0] == at
            at = out[1]
            sizes.append(out[1] - out[0])
        assert at == begin + size
        sizes[0] += fresh
        if size + fresh >= n:
            assert max(sizes) - min(sizes) <= 1


def test_shares_out_rows_among_blocks_that_may_come_late(native: ctypes.CDLL) -> None:
    """Every share is taken once and the counter is zero again, whoever waits or leaves; who waits long enough for
    blocks that do run takes one share, and the last block all that were left."""
    native.share_out.restype = ctypes.c_int64
    cases = itertools.product((1, 2, 3, 8, 17, 66), (1, 2, 3, 8), (0, 3, 40, 10**4), (0, 1, 2), range(10))
    seen = set()
    for parts, shares, patience, late, seed in cases:
        if shares > parts or late >= parts or (late and patience == 10**4):
            continue
        taken = (ctypes.c_uint32 * parts)()
        assert native.share_out(parts, shares, patience, late, seed, taken) == 0
        assert sum(taken) == 2**shares - 1 and all(a & b == 0 for a, b in itertools.combinations(taken, 2))
        takers = sum(own > 0 for own in taken)
        if patience == 10**4:
            assert takers == shares
        seen.add((shares, takers))
    assert {takers for shares, takers in seen if shares == 8} >= {1, 4, 8}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("blocks", [2, 3, 6, 8, 11, 16])
def test_weighs_what_blocks_have_of_a_row(native: ctypes.CDLL, blocks: int, sinks: bool, parts: int) -> None:
    """Of rows that no block, or not every block, saw anything for, and where blocks join few rows, or none."""
    nothing, random = float("nan"), torch.Generator().manual_seed(blocks)
    for T, R in ((1, 7), (8, 7), (32, 2), (64, 1), (9, 1)):
        valid = T * R
        own = -(-valid // blocks)
        tops = torch.randn(blocks, blocks, own, generator=random) * 20
        sums = torch.rand(blocks, blocks, own, generator=random) + 0.5
        hidden = torch.rand(blocks, blocks, own, generator=random) < 0.2
        hidden[:, :, 0] |= torch.rand(blocks, 1, generator=random) < 0.3
        tops, sums = tops.masked_fill(hidden, -float("inf")), sums.masked_fill(hidden, 0)
        logits = torch.randn(2 * R, generator=random) * 5
        lse, left = torch.full((2 * R, T), nothing), torch.full((64, 2), nothing)
        for block in range(blocks):
            statistics = torch.stack((tops[block], sums[block]), -1).contiguous()
            weights = torch.full((own, blocks), nothing)
            written = torch.empty(64, 2)
            pointers = [None if x is None else x.data_ptr() for x in (statistics, logits if sinks else None, weights)]
            native.weigh(
                block, blocks, own, valid, R, T, parts // 2, parts,
                *map(ctypes.c_void_p, (*pointers, lse.data_ptr(), written.data_ptr())),
            )  # fmt: skip
            left = torch.where(written.isnan(), left, written)
            mine = range(block * own, min(valid, (block + 1) * own))
            m, total = tops[block].double(), sums[block].double()
            whole = torch.logsumexp(m * math.log(2) + total.log(), 0)
            for i, row in enumerate(mine):
                head = R + row % R
                if parts > 1:  # of what other clusters have nothing is known yet
                    want = torch.exp2(m[:, i] - m[:, i].max())
                    assert left[row, 0] == tops[block, :, i].max()
                    assert left[row, 1] == pytest.approx(float((want * total[:, i]).nan_to_num().sum()), rel=1e-5)
                else:
                    want = torch.exp(m[:, i] * math.log(2) - whole[i])
                    if sinks:
                        want = want * torch.sigmoid(whole[i] - logits[head].double())
                    assert lse[head, row // R] == pytest.approx(float(whole[i]), rel=1e-5, abs=1e-5)
                # a row that nobody saw anything for
                want = want.nan_to_num()
                assert weights[i].tolist() == pytest.approx(want.tolist(), rel=1e-4, abs=1e-30), (block, row)
            assert weights[len(mine):].isnan().all()
        # rows of this key head, and no others
        assert bool(lse[:R].isnan().all()) and bool(lse[R:].isnan().all()) == (parts > 1)
        assert bool(left[valid:].isnan().all()) and bool(left.isnan().all()) == (parts == 1)


def test_plans_plain_sessions_alike(native: ctypes.CDLL) -> None:
    """The short way for one session whose rows see all before them finds what the long way finds."""
    short, long = (ctypes.c_int * 17)(), (ctypes.c_int * 17)()
    lengths = itertools.product((-(2**31), -3, 0, 1, 127, 128, 300, 2**31 - 1), repeat=2)
    for length, segment, capacity, T, keys in itertools.product(lengths, (0, 1), (0, 130, 4096), (1, 8, 33), (32, 128)):
        rows = (ctypes.c_int * (4 * T))(*[segment, 2**31 - 1, 0, 0] * T)
        inputs = (ctypes.c_int * 11)(capacity, 0, 0, capacity, 3, 0, 0, *length, T, keys)
        native.plain_session_of(inputs, segment, short)
        native.session_of(inputs, rows, long, (ctypes.c_int * (4 * T))())
        for s in (0, 1):
            *view, sinks, first, tiles = long[8 * s : 8 * s + 8]
            assert short[8 * s : 8 * s + 5] == view
            assert short[8 * s + 5 : 8 * s + 8] == [0, 0, sinks + tiles] and first in (0, sinks)
        assert short[16] == long[16]
