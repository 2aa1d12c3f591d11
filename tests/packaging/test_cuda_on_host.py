"""The CUDA kernel's own source, run on the host: bindings, plan, indexing and arithmetic, where there is no GPU.

A stand-in header gives g++ what nvcc has built in (tests/packaging/cuda_on_host). Tensors go the whole way: from
`backends.cuda` through the real bindings to the kernel. Misaligned 16-byte accesses and integer overflow trap; memory
around every tensor is NaN and must stay so. What this cannot see: races and speed.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, fields
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from streamkernels import _ext
from streamkernels.backends import cuda
from streamkernels.core.slots import slot
from streamkernels.reference import rotate_append as reference
from streamkernels.testing.compare import assert_accurate


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
