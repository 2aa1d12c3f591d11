"""The CUDA kernel's own source, run on the host: bindings, plan, indexing and arithmetic, where there is no GPU.

A stand-in header gives g++ what nvcc has built in (tests/packaging/cuda_on_host). Tensors go the whole way: from
`backends.cuda` through the real bindings to the kernel. Misaligned 16-byte accesses and integer overflow trap; memory
around every tensor is NaN and must stay so. What this cannot see: races and speed.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from streamkernels import _ext
from streamkernels.backends import cuda
from streamkernels.core.slots import slot, stream_index
from streamkernels.reference import incremental_prefill as prefill
from streamkernels.reference import rotate_append as reference
from streamkernels.testing.compare import assert_accurate


@pytest.fixture(scope="module")
def native(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.slot_of.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    return lib


@pytest.fixture
def on_host(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`backends.cuda` on CPU tensors, which have neither a device index nor a stream."""
    stand_in = SimpleNamespace(rotate_append=lambda *a: extension.rotate_append(*a[:-2], 0, 0))
    monkeypatch.setattr(_ext, "load", lambda: stand_in)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    B: int = 2
    HK: int = 2
    T: int = 17
    D: int = 64
    rotary_dim: int = 64  # 0: cos and sin are None
    interleaved: bool = False
    angles_fp32: bool = True
    angles_batch: bool = True
    role: str = "uniform"  # uniform, mixed, strided, garbage
    capacity: tuple[int, int] = (64, 64)
    length: tuple[int, int] = (5, 3)
    sinks: int = 0
    bounded: bool = False
    layout: str = "bthd"  # bhtd, bthd (a transposed projection), fused (columns of a wider row), odd (2-byte borders)
    processors: int = 132
    segment: int = 0
    odd: str = ""  # the one tensor whose rows are off their 16-byte borders

    def __str__(self) -> str:
        """What differs from the plain case."""
        odd = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={value}" for name, value in odd).replace("torch.", "") or "plain"


BUFFERS = ("source_k", "source_v", "target_k", "target_v")
ARITHMETIC = [
    Case(dtype=d, D=D, rotary_dim=r, interleaved=i, angles_fp32=f, angles_batch=b, layout=layout)
    for (d, f), (D, r), i, (b, layout) in itertools.product(
        [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True)],
        [(8, 8), (24, 16), (64, 64), (80, 20), (80, 32), (128, 64), (256, 256), (64, 0)],
        [False, True],
        [(True, "bthd"), (False, "odd")],
    )
]
PLACES = [
    Case(role="mixed", T=63),
    Case(role="mixed", T=700, D=8, rotary_dim=8, HK=1, B=1, capacity=(512, 512), processors=1),
    Case(role="mixed", T=700, D=8, rotary_dim=8, HK=3, B=2, capacity=(512, 512), processors=1, layout="fused"),
    Case(role="strided", T=130, D=8, rotary_dim=8, capacity=(128, 128)),
    Case(role="garbage", T=63),
    Case(role="garbage", T=1),
    Case(role="mixed", T=63, capacity=(20, 9)),
    Case(role="mixed", T=40, capacity=(0, 64)),
    Case(T=63, capacity=(40, 0)),
    Case(T=63, capacity=(5, 7)),
    Case(T=17, segment=1, HK=5, D=128, rotary_dim=128, processors=1),
    Case(T=17, HK=7, D=128, rotary_dim=128, processors=2),
    Case(T=24, bounded=True, sinks=4, capacity=(40, 28), length=(100, 27), role="mixed", layout="fused"),
    Case(T=24, bounded=True, sinks=4, capacity=(28, 28), length=(2**31 - 1, 2**31 - 5)),
    Case(T=17, bounded=True, sinks=9, capacity=(9, 4), length=(3, 1), role="mixed"),
    Case(T=17, length=(2**31 - 1, -(2**31)), role="mixed"),
    Case(T=17, length=(-5, -1), role="mixed", capacity=(8, 64)),
    Case(T=17, length=(-5, -1), role="mixed", bounded=True, sinks=2, capacity=(20, 20)),
    *(Case(odd=name, role="mixed") for name in ("k", "v", "cos", "sin", *BUFFERS)),
    Case(T=0),
    Case(B=0),
]


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def strided(B: int, HK: int, rows: int, D: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(storage full of NaN, view [B, HK, rows, D] inside of it, with NaN before, between and after the rows)."""
    if layout == "bhtd":
        storage = nan(B + 2, HK, rows, D, dtype=dtype)
        return storage, storage[1:-1]
    if layout == "odd":
        storage = nan(B, HK, rows + 2, D + 3, dtype=dtype)
        return storage, storage[:, :, 1:-1, 1:-2]
    if layout == "fused":
        storage = nan(B, rows + 2, 3, HK, D, dtype=dtype)
        return storage, storage[:, 1:-1, 1].transpose(1, 2)
    storage = nan(B, rows + 2, HK, D, dtype=dtype)
    return storage, storage[:, 1:-1].transpose(1, 2)


def roles(case: Case) -> Tensor | None:
    random = torch.Generator().manual_seed(1)
    draw = torch.randint(-1, 2, (case.B, 2 * case.T + 3), generator=random, dtype=torch.int8)
    if case.role == "uniform":
        return None
    if case.role == "strided":
        return draw[:, 1 : 1 + 2 * case.T : 2]
    if case.role == "garbage":
        return torch.randint(-128, 128, (case.B, case.T), generator=random, dtype=torch.int8) // 32
    return draw[:, 3 : 3 + case.T]


def run(case: Case, append, dtype: torch.dtype) -> tuple[list[Tensor], int]:  # type: ignore[no-untyped-def]
    """The storages of source_k, source_v, target_k, target_v after one call, and the status word."""
    random = torch.Generator().manual_seed(0)
    B, HK, T, D = case.B, case.HK, case.T, case.D
    layout = {case.odd: "odd"}
    chunk = []
    for name in "kv":
        _, x = strided(B, HK, T, D, layout.get(name, case.layout), dtype)
        chunk.append(x.copy_(torch.randn(B, HK, T, D, generator=random).to(case.dtype)))
    angles: list[Tensor | None] = [None, None]
    if case.rotary_dim:
        rows = B if case.angles_batch else 1
        table = torch.rand(rows, T, case.rotary_dim // 2, generator=random) * 6.28
        for i, (name, x) in enumerate((("cos", table.cos()), ("sin", table.sin()))):
            wide = nan(rows, T, D + 4, dtype=torch.float32 if case.angles_fp32 else case.dtype)
            begin = 1 if case.odd == name else 0
            view = wide[..., begin : begin + case.rotary_dim // 2].copy_(x)
            angles[i] = view.double() if dtype == torch.float64 else view
    capacities = (case.capacity[0],) * 2 + (case.capacity[1],) * 2
    buffers = [
        strided(B, HK, C, D, layout.get(name, case.layout), dtype) for name, C in zip(BUFFERS, capacities, strict=True)
    ]
    lengths = torch.full((3, B, 2), 10**6, dtype=torch.int32)
    lengths[1] = torch.tensor(case.length)
    lengths[1, :, 0] += 0 if max(map(abs, case.length)) > 1000 else torch.arange(B, dtype=torch.int32)
    status = torch.zeros(1, dtype=torch.int32)
    append(*chunk, *angles, *(view for _, view in buffers), lengths[1], status, roles(case), case.segment,
           case.sinks, case.bounded, case.interleaved)  # fmt: skip
    return [storage for storage, _ in buffers], int(status)


@pytest.mark.parametrize("case", [*ARITHMETIC, *PLACES], ids=str)
def test_kernel_equals_the_reference(case: Case, on_host: None, native: ctypes.CDLL) -> None:
    native.set_processors(case.processors)
    ours, status = run(case, cuda.rotate_append, case.dtype)
    plain, plain_status = run(case, reference.rotate_append, case.dtype)
    exact, _ = run(case, reference.rotate_append, torch.float64)
    assert status == plain_status
    for name, x, y, truth in zip(BUFFERS, ours, plain, exact, strict=True):
        if name.endswith("v"):
            assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num()), name
        else:
            assert_accurate(name, x, y, truth)


def test_every_path_gives_the_same_bits(on_host: None) -> None:
    """The 16-byte path and the element path round alike, so alignment never changes a result."""
    results = []
    for layout in ("bthd", "odd", "fused", "bhtd"):
        case = Case(T=33, layout=layout, D=80, rotary_dim=32)
        storages, _ = run(case, cuda.rotate_append, case.dtype)
        results.append([s[s.isfinite()].sort().values for s in storages])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_slots_are_those_of_python(native: ctypes.CDLL) -> None:
    """csrc's slot_of and core.slots.slot are one predicate; where Python answers a slot outside, CUDA says no slot."""
    indices = [*range(-3, 70), 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1, -(2**31)]
    index = torch.tensor(indices)
    for capacity, sinks, bounded in itertools.product((0, 1, 7, 16, 64), (0, 1, 4, 16), (False, True)):
        expected = slot(index, capacity, sinks, bounded)
        expected = expected.where((expected >= 0) & (expected < capacity), -1)
        got = [native.slot_of(i, capacity, sinks, bounded) for i in indices]
        assert got == expected.tolist(), (capacity, sinks, bounded)


def test_plans_cover_every_row_and_keep_counting_cheap(native: ctypes.CDLL) -> None:
    native.set_processors(132)
    out = (ctypes.c_int64 * 6)()
    for B, HK, T, D, width, has_role in itertools.product(
        (1, 3, 64), (1, 8, 5), (1, 17, 63, 8192, 65536), (8, 80, 128, 256), (1, 8), (False, True)
    ):
        native.plan_of(B, HK, T, D, width, 2, has_role, out)
        threads, rows, heads, tiles, groups, blocks = out
        assert 32 <= threads <= 128 and threads % 32 == 0
        assert 1 <= rows <= 1024 and tiles == -(-T // rows) and groups == -(-HK // heads)
        assert blocks == B * tiles * groups
        if B * T * HK >= 65536 and D >= 128:
            assert blocks >= 3 * 132
        if has_role and width == 8 and D == 128 and HK == 8 and T >= 8192:
            # a block reads at most one byte of roles for every 16 bytes that it moves
            assert T * 16 <= 4 * rows * heads * D * 2


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
def test_prefill_plans_see_what_the_reference_sees(native: ctypes.CDLL, keys: int) -> None:
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


def test_prefill_shares_cover_every_step(native: ctypes.CDLL) -> None:
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
def test_prefill_parts_tile_their_range(native: ctypes.CDLL, fresh: bool) -> None:
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


def test_prefill_cuts_a_range_for_any_number_of_blocks(native: ctypes.CDLL) -> None:
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


def test_prefill_shares_out_rows_among_blocks_that_may_come_late(native: ctypes.CDLL) -> None:
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
def test_prefill_weighs_what_blocks_have_of_a_row(native: ctypes.CDLL, blocks: int, sinks: bool, parts: int) -> None:
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


def test_prefill_plans_plain_sessions_alike(native: ctypes.CDLL) -> None:
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


def test_bindings_name_what_is_wrong(extension: ModuleType) -> None:
    def call(**changed: int) -> None:
        names = extension.rotate_append.__doc__.split("(", 1)[1].split(")")[0]
        arguments = {part.split(":")[0].strip(): 0 for part in names.split(",")}
        arguments.update(D=64, bounded=False, interleaved=False)  # type: ignore[arg-type]
        extension.rotate_append(**(arguments | changed))

    call()
    for changed, text in [
        ({"D": 12}, "multiple of 8"),
        ({"D": 512}, "at most 256"),
        ({"rotary_dim": 66}, "rotary_dim <= D"),
        ({"rotary_dim": 7}, "even rotary_dim"),
        ({"segment": 2}, "segment: expected 0 or 1"),
        ({"dtype": 3}, "dtype code"),
        ({"dtype": 2, "angles_dtype": 1}, "float32 or k's dtype"),
        ({"sinks": -1}, "sinks"),
        ({"B": 1, "HK": 1, "T": 1}, "no null pointer"),
    ]:
        with pytest.raises(ValueError, match=text):
            call(**changed)
    with pytest.raises(TypeError, match="k_batch"):
        extension.rotate_append("k")
