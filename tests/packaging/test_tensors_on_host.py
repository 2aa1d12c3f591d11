"""The extension's own reading of tensors, run on the host: what a step's kernel is launched with."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamkernels import SOURCE, TARGET, StreamCache, _ext, incremental_prefill
from streamkernels.backends import cuda_incremental_prefill, tensors
from streamkernels.backends.room import Held
from streamkernels.ops.incremental_prefill import api
from streamkernels.ops.known import Known, look_of

LAYERS, B, H, HK, T, D = 3, 2, 4, 2, 3, 64


class Rows(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch", "head", "row")]


class Column(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch", "row")]


class Segment(ctypes.Structure):
    _fields_ = [("k", Rows), ("v", Rows), ("begin", Column)]
    _fields_ += [(name, ctypes.c_int) for name in ("capacity", "sinks", "window")]


class Launched(ctypes.Structure):
    """csrc/incremental_prefill/params.h, and where it went."""

    _fields_ = [("q", Rows), ("k", Rows), ("v", Rows), ("cosine", Column), ("sine", Column)]
    _fields_ += [("segments", Segment * 2), ("length", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_int64) for name in ("length_batch", "length_segment", "status", "role")]
    _fields_ += [("role_batch", ctypes.c_int64), ("role_row", ctypes.c_int64), ("limit", Column)]
    _fields_ += [(name, ctypes.c_int64) for name in ("sink_logits", "o", "lse", "counters", "partials")]
    _fields_ += [(name, ctypes.c_int) for name in ("B", "H", "HK", "T", "D", "rotary_dim", "segment", "ring_sinks")]
    _fields_ += [("scale", ctypes.c_float), ("softcap", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_bool) for name in ("interleaved", "angles_fp32", "sink_logits_fp32")]
    _fields_ += [("dtype", ctypes.c_int), ("device", ctypes.c_int), ("stream", ctypes.c_int64)]


@pytest.fixture(scope="module")
def extension(extension: ModuleType) -> ModuleType:
    assert extension.read_tensors(Tensor.__dlpack_c_exchange_api__, Tensor, torch.nn.Parameter)
    return extension


class Host:
    """Where calls go: the current stream, the graph capture, and the last launch."""

    def __init__(self, library: Path) -> None:
        self.stream = self.capture = self.looked = 0
        native = ctypes.CDLL(str(library))
        native.last_prefill.restype = ctypes.c_void_p
        self._last = Launched.from_address(native.last_prefill())

    def last(self) -> Launched:
        """The last launch, which is forgotten then."""
        found = Launched.from_buffer_copy(self._last)
        ctypes.memset(ctypes.addressof(self._last), 0, ctypes.sizeof(self._last))
        return found


@pytest.fixture
def host(extension: ModuleType, library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """`auto` takes the CUDA backend, on CPU tensors."""
    it = Host(library)

    def clear() -> None:
        tensors.reader.cache_clear()
        cuda_incremental_prefill.plan_of.cache_clear()

    clear()
    monkeypatch.setattr(_ext, "_find", lambda: (extension, ""))
    monkeypatch.setattr(api, "choose", lambda call, backend: "cuda")
    monkeypatch.setattr(api, "_known", Known())
    monkeypatch.setattr(cuda_incremental_prefill, "_held", Held())
    monkeypatch.setattr(cuda_incremental_prefill, "stream_of", lambda device: it.stream)
    init = cuda_incremental_prefill.Plan.__init__

    def with_capture(plan, *arguments) -> None:
        init(plan, *arguments)
        plan.capture_id = lambda stream: it.capture

    monkeypatch.setattr(cuda_incremental_prefill.Plan, "__init__", with_capture)
    check = api.check_chunk

    def counted(*arguments):
        it.looked += 1
        return check(*arguments)

    monkeypatch.setattr(api, "check_chunk", counted)
    yield it
    monkeypatch.undo()
    clear()


def cache_of(**options) -> StreamCache:
    form = {"layers": LAYERS, "batch": B, "kv_heads": HK, "head_dim": D, "dtype": torch.bfloat16, "device": "cpu"}
    return StreamCache(**form | {"capacity": (16, 16)} | options)


def chunk(rows: int = T, dtype: torch.dtype = torch.bfloat16, batch: int = B) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(batch, rows, heads, D).to(dtype).transpose(1, 2) for heads in (H, HK, HK))
    cos, sin = torch.rand(1, rows, D // 2), torch.rand(1, rows, D // 2)
    return q, k, v, cos, sin


def rows_of(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def fields(x: ctypes.Structure) -> tuple[int, ...]:
    return tuple(getattr(x, name) for name, *_ in x._fields_)


def check_launch(last: Launched, cache: StreamCache, layer: int, rows: tuple[Tensor, ...], o: Tensor) -> None:
    """The last launch was of these rows over that layer."""
    q, k, v, cos, sin = rows
    assert (last.o, last.B, last.H, last.HK, last.T, last.D) == (o.data_ptr(), *q.shape[:2], HK, q.shape[2], D)
    assert o.shape == q.shape and o.transpose(1, 2).is_contiguous()
    for found, x in ((last.q, q), (last.k, k), (last.v, v)):
        assert fields(found) == rows_of(x)
    for found, x in ((last.cosine, cos), (last.sine, sin)):
        assert fields(found) == (x.data_ptr(), x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))
    assert last.rotary_dim == D and last.angles_fp32 == (cos.dtype == torch.float32)
    for role, segment in enumerate(last.segments):
        held = cache.segment(layer, role)
        assert (fields(segment.k), fields(segment.v)) == (rows_of(held[0]), rows_of(held[1]))
        assert (segment.capacity, segment.window) == (cache.capacity(layer, role), 0)
    length = cache.length(layer)
    assert (last.length, last.length_batch, last.length_segment) == (length.data_ptr(), *length.stride())
    assert last.status == cache.status.data_ptr()


def test_looks_of_the_two_ways_agree(extension: ModuleType, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    both = torch.zeros(2, 3), torch.zeros(3, 2)
    calls = [((x, y), (a, "auto")) for x in both for y in (None, x) for a in (1, True)]
    native = [look_of(*call) for call in calls]
    monkeypatch.setattr(_ext, "_find", lambda: (None, ""))
    tensors.reader.cache_clear()
    plain = [look_of(*call) for call in calls]
    assert all(type(look) is bytes for look in native) and all(type(look) is tuple for look in plain)
    assert [native.index(look) for look in native] == [plain.index(look) for look in plain]


def test_known_calls_launch_what_checked_ones_do(host: Host) -> None:
    cache = cache_of()
    for n in range(5):
        for layer in range(LAYERS):
            rows = chunk()
            o, lse = incremental_prefill(*rows, cache, layer, role=TARGET, return_lse=True)
            last = host.last()
            check_launch(last, cache, layer, rows, o)
            assert last.segment == TARGET and last.lse == lse.data_ptr() and lse.shape == (B, H, T)
            assert abs(last.scale - D**-0.5) < 1e-7 and last.role == last.limit.data == 0
        cache.commit()
        # of the first step every layer is looked at, and again once the target has grown
        assert host.looked == (LAYERS if n < 5 else 2 * LAYERS)
        assert cache.longest(TARGET) == (n + 1) * T
    assert [cache.length(layer)[:, 1].tolist() for layer in range(LAYERS)] == [[15, 15]] * LAYERS


CHANGES = {
    "rows": lambda q, k, v, cos, sin: (chunk(5), {}),
    "dtype of the angles": lambda q, k, v, cos, sin: ((q, k, v, cos.bfloat16(), sin.bfloat16()), {}),
    "angles of each session": lambda q, k, v, cos, sin: (
        (q, k, v, cos.repeat(B, 1, 1), sin.repeat(B, 1, 1)),
        {},
    ),
    "contiguous q": lambda q, k, v, cos, sin: ((q.contiguous(), k, v, cos, sin), {}),
    "role": lambda q, k, v, cos, sin: ((q, k, v, cos, sin), {"role": SOURCE}),
    "scale": lambda q, k, v, cos, sin: ((q, k, v, cos, sin), {"scale": 0.5}),
    "interleaved": lambda q, k, v, cos, sin: ((q, k, v, cos, sin), {"interleaved": True}),
    "softcap": lambda q, k, v, cos, sin: ((q, k, v, cos, sin), {"softcap": 3.0}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_look_is_looked_at(host: Host, change: str) -> None:
    cache = cache_of()
    rows = chunk()
    for _ in range(2):
        incremental_prefill(*rows, cache, 1, role=TARGET)
    assert host.looked == 1
    others, options = CHANGES[change](*rows)
    for looked in (2, 2):
        o = incremental_prefill(*others, cache, 1, **{"role": TARGET, **options})
        last = host.last()
        check_launch(last, cache, 1, others, o)
        assert host.looked == looked and last.segment == options.get("role", TARGET)
        assert last.interleaved == options.get("interleaved", False) and last.softcap == options.get("softcap", 0.0)
        assert abs(last.scale - options.get("scale", D**-0.5)) < 1e-7


def test_roles_and_limits_are_those_of_the_call(host: Host) -> None:
    cache = cache_of()
    for n in range(3):
        role = torch.tensor([[0, 1, -1], [1, 1, 0]], dtype=torch.int8)
        limit = torch.full((B, 2 * T), n, dtype=torch.int32)[:, ::2]
        for layer in range(LAYERS):
            rows = chunk()
            o = incremental_prefill(*rows, cache, layer, role=role, source_limit=limit, target_begin=limit)
            last = host.last()
            check_launch(last, cache, layer, rows, o)
            assert (last.role, last.role_batch, last.role_row) == (role.data_ptr(), T, 1)
            assert fields(last.limit) == fields(last.segments[1].begin) == (limit.data_ptr(), 2 * T, 2)
            assert last.segments[0].begin.data == 0
        cache.commit()
        assert host.looked == LAYERS
    assert cache.length(1).tolist() == [[3, 3], [3, 6]]


def test_what_does_not_fit_is_refused_once_known(host: Host) -> None:
    cache = cache_of(fixed=True, capacity=(8, 8))
    for _ in range(2):
        for layer in range(LAYERS):
            incremental_prefill(*chunk(), cache, layer, role=TARGET)
        cache.commit()
    host.last()
    before = cache.length().clone()
    with pytest.raises(ValueError, match="8 slots of layer 0's target segment"):
        incremental_prefill(*chunk(), cache, 0, role=TARGET)
    q, k, v, cos, sin = chunk()
    bad = [(q.float(), k, v, cos, sin), (q, k[:, :1], v, cos, sin), (q, k, v, cos, None), (q, k, v, cos[:, :1], sin)]
    for rows in bad:
        with pytest.raises((TypeError, ValueError), match="incremental_prefill: "):
            incremental_prefill(*rows, cache, 0, role=SOURCE)
    for role in (True, 2, 1.0, "1", None):
        with pytest.raises((TypeError, ValueError), match="role"):
            incremental_prefill(q, k, v, cos, sin, cache, 0, role=role)
    with pytest.raises((TypeError, ValueError), match="layer"):
        incremental_prefill(q, k, v, cos, sin, cache, LAYERS, role=SOURCE)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        incremental_prefill(3, k, v, cos, sin, cache, 0, role=SOURCE)
    assert host.last().o == 0 and torch.equal(cache.length(), before) and not cache._step.any()


def test_a_cache_that_changed_is_the_one_that_is_read(host: Host) -> None:
    def step(cache: StreamCache) -> None:
        for layer in range(LAYERS):
            rows = chunk(batch=cache.batch)
            o = incremental_prefill(*rows, cache, layer, role=TARGET)
            check_launch(host.last(), cache, layer, rows, o)
        cache.commit()

    cache = cache_of(capacity=(4, 4))
    for _ in range(4):
        step(cache)
    assert cache.capacity(0, TARGET) == 16
    mark = cache.mark()
    step(cache)
    cache.rollback(mark)
    step(cache)
    fork, twin = cache.fork(), copy.deepcopy(cache)
    for other in (fork, twin, cache, fork, twin):
        step(other)
    assert cache.longest(TARGET) == 18 and fork.longest(TARGET) == twin.longest(TARGET) == 21
    assert cache.length(0).tolist() == [[0, 18]] * B and twin.length(2).tolist() == [[0, 21]] * B
    cache.select([1])
    step(cache)
    cache.reset()
    step(cache)
    assert cache.length(1).tolist() == [[0, 3]]


def test_streams_and_captures_have_room_of_their_own(host: Host) -> None:
    cache = cache_of()

    def room() -> tuple[int, ...]:
        incremental_prefill(*chunk(), cache, 0, role=TARGET)
        last = host.last()
        return last.counters, last.partials, last.lse, last.stream

    # a checked call has an lse of its own
    incremental_prefill(*chunk(), cache, 0, role=TARGET)
    first = room()
    assert room() == first
    host.stream = 7
    second = room()
    assert not set(first) & set(second) and second[3] == 7
    host.capture = 5
    captured = room()
    assert not set(captured[:3]) & {*first, *second}
    host.capture, host.stream = 0, 0
    assert room() == first


def test_room_grows(host: Host) -> None:
    small, large = cache_of(), cache_of(batch=300)
    q = chunk()
    incremental_prefill(*q, small, 0, role=TARGET)
    first = host.last()
    incremental_prefill(*chunk(batch=300), large, 0, role=TARGET)
    assert host.last().lse != first.lse
    held = next(iter(cuda_incremental_prefill._held.things.values()))
    assert held.lse.numel() >= 300 * H * T and held.holds(1, 1, 300 * H * T)


def test_known_calls_are_seen_by_who_watches(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    short: list[int] = []
    run_again = api.run_again
    monkeypatch.setattr(api, "run_again", lambda *a: short.append(1) or run_again(*a))
    cache = cache_of()
    q, k, v, cos, sin = chunk()

    def step(q: Tensor) -> Tensor:
        o = incremental_prefill(q, k, v, cos, sin, cache, 0, role=TARGET)
        check_launch(host.last(), cache, 0, (q, k, v, cos, sin), o)
        return o

    step(q), step(q)
    assert len(short) == 1 and not seen
    with Watch():
        step(q)
    assert "streamkernels::incremental_prefill" in seen and len(short) == 1
    # a parameter is a subclass, and a gradient is kept for whoever asks for one
    with torch.no_grad():
        for _ in range(3):
            step(torch.nn.Parameter(q))
    leaf = q.clone().requires_grad_()
    assert step(leaf).grad_fn is not None and not step(q).requires_grad and len(short) == 2
    with torch.no_grad():
        assert step(leaf).grad_fn is None and len(short) == 3
    with torch.inference_mode():
        assert step(q).is_inference() and len(short) == 4


def test_writes_are_counted_and_lse_is_fresh(host: Host) -> None:
    cache = cache_of()
    k, status = cache.segment(0, TARGET)[0], cache.status
    results = []
    for _ in range(3):
        versions = k._version, status._version
        results.append(incremental_prefill(*chunk(), cache, 0, role=TARGET, return_lse=True))
        assert (k._version, status._version) == (versions[0] + 1, versions[1] + 1)
    assert len({x.data_ptr() for pair in results for x in pair}) == 6


def test_wrong_arguments_of_the_extension(host: Host, extension: ModuleType) -> None:
    with pytest.raises(ValueError, match="20 tensors and 11 numbers"):
        extension.incremental_prefill(1, 2)
    q, k, v, cos, sin = chunk()
    held = torch.zeros(B, HK, 4, D, dtype=torch.bfloat16)
    length, status = torch.zeros(B, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def call(*first: object, segment: object = 0) -> None:
        rest = (held, held, held, held, length, status, None, None, None, None, None, q, q, q, q)
        extension.incremental_prefill(*first, *rest, segment, 0, 0, 0, False, 0, 0, 1.0, 0.0, False, 0)

    call(q, k, v, cos, sin)
    for first in ((3, k, v, cos, sin), (q[0], k, v, cos, sin), (q, k, v, cos[0], sin), (q.float(), k, v, cos, sin)):
        with pytest.raises(ValueError, match="incremental_prefill: "):
            call(*first)
    with pytest.raises(TypeError):
        call(q, k, v, cos, sin, segment="x")
