"""The Triton kernels of incremental_prefill against the reference in fp64, through the registered op: the interpreter
on a CPU, compiled on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from streamkernels.backends.select import explain
from streamkernels.core.cache import SOURCE, TARGET, StreamCache
from streamkernels.ops.incremental_prefill import incremental_prefill
from streamkernels.testing.compare import assert_accurate, influence
from streamkernels.testing.inputs import spread

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
# triton's interpreter computes bf16 on raw bits: bf16 only runs on a GPU
HALF = [torch.float16] + ([torch.bfloat16] if GPU else [])
NAN = float("nan")
raw = torch.ops.streamkernels.incremental_prefill.default
raw_backward = torch.ops.streamkernels.incremental_prefill_backward.default


@dataclass(frozen=True)
class Call:
    """One raw call: committed `length` per sample, what the rows are, and the options. `limit`, `begin`: rows draw
    theirs below it."""

    B: int = 2
    H: int = 4
    HK: int = 2
    T: int = 5
    D: int = 16
    length: tuple[tuple[int, int], ...] = ((3, 2), (0, 4))
    capacity: tuple[int, int] = (14, 14)
    role: str = "target"  # source, target, mixed
    rotary: int = 0
    interleaved: bool = False
    limit: int = 0
    begin: tuple[int, int] = (0, 0)
    sinks: tuple[int, int, int] = (0, 0, 0)
    windows: tuple[int, int] = (0, 0)
    softcap: float = 0.0
    sink_logits: bool = False
    strided: bool = False
    sharp: float = 1.0


LONG = Call(H=6, T=11, capacity=(120, 140), length=((110, 70), (30, 130)), role="mixed", limit=120, rotary=16)
CALLS = {
    "target": Call(rotary=16),
    "source": Call(role="source", rotary=16),
    "one row": Call(B=1, H=7, HK=1, T=1, D=64, length=((130, 17),), capacity=(150, 20), rotary=64),
    "empty": Call(length=((0, 0), (0, 0)), capacity=(0, 9)),
    "no rotation": Call(role="mixed", T=9, limit=9),
    "partial rotation": Call(D=24, rotary=8),
    "interleaved": Call(D=40, rotary=24, interleaved=True, role="mixed"),
    "interleaved whole": Call(rotary=16, interleaved=True),
    "odd head dim": Call(D=80, rotary=80, T=3),
    "smallest head dim": Call(D=8, rotary=8, strided=True),
    "long": LONG,
    "tile edges": Call(B=3, H=6, HK=1, T=3, length=((64, 128), (63, 65), (0, 64)), capacity=(64, 131), rotary=16),
    "edges, sources": Call(B=3, H=6, HK=1, T=3, length=((64, 1), (63, 0), (0, 9)), capacity=(130, 9), role="source"),
    "uneven parts": Call(B=3, H=2, HK=1, T=40, length=((600, 500), (64, 0), (63, 700)), capacity=(640, 740), rotary=16),
    "begins": replace(LONG, begin=(100, 100)),
    "sinks": replace(LONG, begin=(100, 140), sinks=(3, 70, 0), T=7),
    "softcap": Call(softcap=2.0, sink_logits=True, rotary=16, sharp=4.0),
    "sink logits": replace(LONG, sink_logits=True, T=5, sharp=8.0),
    "full": Call(capacity=(6, 6), role="mixed", T=9, rotary=16),
    "full target": Call(capacity=(6, 6), T=9),
    "strided": replace(LONG, T=7, strided=True, rotary=8),
    "rings": Call(role="mixed", sinks=(0, 0, 2), windows=(3, 4), length=((13, 2), (100, 14))),
    "one ring": Call(role="mixed", sinks=(0, 0, 2), windows=(0, 4), length=((3, 2), (6, 140))),
    "ring of sources": Call(role="source", sinks=(0, 0, 2), windows=(5, 0), length=((13, 2), (60, 0)), T=3),
    "written first": Call(B=1, H=1, HK=1, D=8, T=260, capacity=(300, 300), length=((10, 3),), role="mixed", limit=250),
}
GPU_CALLS = {
    **{
        f"D={D} R={R} T={T}": Call(
            B=2, H=2 * R, HK=2, T=T, D=D, rotary=D, length=((1500, 333), (64, 2001)), capacity=(2300, 2600),
            role="mixed", limit=1700,
        )
        for D, R, T in ((64, 1, 1), (64, 4, 8), (96, 7, 5), (112, 16, 3), (128, 7, 1), (128, 7, 32), (128, 7, 300),
                        (192, 2, 17), (256, 2, 1), (256, 2, 63), (256, 8, 40))
    },
    "2000 rows": Call(B=1, H=14, HK=2, T=2000, D=128, rotary=128, length=((700, 5),), capacity=(2800, 2800),
                      role="mixed", limit=2500),
    "rings of a model": Call(H=14, HK=2, T=33, D=128, rotary=128, role="mixed", sinks=(0, 0, 4), windows=(256, 300),
                             length=((4000, 100), (271, 999)), capacity=(300, 340)),
}  # fmt: skip
if GPU:
    CALLS |= GPU_CALLS


def make(call: Call, dtype: torch.dtype, seed: int = 0) -> list:
    """Raw arguments; memory that holds no key is NaN."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda heads, n: torch.randn(call.B, heads, n, call.D, generator=g)  # noqa: E731
    shapes = ((call.H, call.T), (call.HK, call.T), (call.HK, call.T))
    q, k, v = (draw(*shape).to(DEVICE, dtype).transpose(1, 2).contiguous().transpose(1, 2) for shape in shapes)
    if call.strided:
        wide = torch.full((call.B, call.T, call.H + 2 * call.HK, call.D + 8), NAN, device=DEVICE, dtype=dtype)
        parts = wide[..., : call.D].transpose(1, 2).split([call.H, call.HK, call.HK], 1)
        q, k, v = (part.copy_(x) for part, x in zip(parts, (q, k, v), strict=True))
    cos = sin = None
    if call.rotary:
        angles = torch.rand(1, call.T, call.rotary // 2, generator=g) * 6
        cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    segments = []
    for r in (SOURCE, TARGET):
        for _ in "kv":
            x = draw(call.HK, call.capacity[r])
            for b in range(call.B):
                x[b, :, max(0, call.length[b][r]) :] = NAN
            segments.append(x.to(DEVICE, dtype))
    length = torch.tensor(call.length, dtype=torch.int32, device=DEVICE)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def draw_rows(low: int, high: int, kind: torch.dtype) -> Tensor:
        return torch.randint(low, high, (call.B, call.T), generator=g, dtype=kind).to(DEVICE)

    role = draw_rows(-1, 2, torch.int8) if call.role == "mixed" else None
    rows = [draw_rows(-2, n, torch.int32) if n else None for n in (call.limit, *call.begin)]
    logits = torch.randn(call.H, generator=g).to(DEVICE) if call.sink_logits else None
    return [
        q, k, v, cos, sin, *segments, length, status, role, SOURCE if call.role == "source" else TARGET, *rows, None,
        *call.sinks, any(call.windows), *call.windows, call.sharp * call.D**-0.5, call.softcap, logits,
        call.interleaved, "reference",
    ]  # fmt: skip


def wide(x, dtype: torch.dtype = torch.float64):
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def run(arguments: list, backend: str) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """o, lse, the segments after the writes, the status word; the arguments stay as they are."""
    arguments = list(arguments)
    arguments[5:9] = [x.clone() for x in arguments[5:9]]
    arguments[10], arguments[-1] = arguments[10].clone(), backend
    o, lse = raw(*arguments)
    return o, lse, arguments[5:9], arguments[10]


def gradients(arguments: list, exact: list, backend: str) -> tuple[Tensor, ...]:
    """dq, dk, dv, d sink_logits for the o and lse of the fp64 reference."""
    o, lse = raw(*[x.clone() if isinstance(x, Tensor) else x for x in exact])
    dtype = arguments[0].dtype
    g = torch.Generator().manual_seed(5)
    do = torch.randn(o.transpose(1, 2).shape, generator=g).to(DEVICE, dtype).transpose(1, 2)
    dlse = torch.randn(lse.shape, generator=g).to(DEVICE)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    call = [do, wide(dlse, kind), *arguments[:3], o.to(dtype), lse.to(kind), *arguments[3:10], *arguments[11:19]]
    return raw_backward(*call, *arguments[23:-1], backend)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_forward(name, dtype):
    arguments = make(CALLS[name], dtype)
    exact = [wide(x) for x in arguments]
    want_o, want_lse, want_segments, want_status = run(exact, "reference")
    ours_o, ours_lse, segments, status = run(arguments, "triton")
    plain_o, plain_lse, *_ = run(arguments, "reference")
    assert_accurate("o", ours_o, plain_o, want_o)
    assert_accurate("lse", ours_lse, plain_lse, want_lse)
    assert status.item() == want_status.item()
    for x, y in zip(segments, want_segments, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        if x.numel():
            bound = 2 * torch.finfo(dtype).eps * y.nan_to_num(0).abs().max()
            assert (x.double() - y).nan_to_num(0).abs().max() <= bound


UNBOUNDED = [name for name, call in CALLS.items() if not any(call.windows)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", UNBOUNDED)
def test_backward(name, dtype):
    arguments = make(CALLS[name], dtype)
    exact = [wide(x) for x in arguments]
    want = gradients(exact, exact, "reference")
    ours, plain = (gradients(arguments, exact, backend) for backend in ("triton", "reference"))
    for label, a, b, c in zip(("dq", "dk", "dv", "dsink_logits"), ours, plain, want, strict=True):
        if label == "dsink_logits":
            assert a.shape == c.shape and (a - c).abs().sum() <= 1e-2 * c.abs().sum().clamp(min=1.0)
        else:
            # a sum over rows and heads of terms that were rounded to the dtype, which may cancel
            assert_accurate(label, a, b, c, terms=c.abs().amax().expand_as(c))
    role = arguments[11]
    if role is not None:
        assert (ours[0].transpose(1, 2)[role < 0] == 0).all() and (ours[1].transpose(1, 2)[role < 0] == 0).all()


def test_options_of_any_strides():
    arguments = make(replace(LONG, T=5, begin=(40, 30), sink_logits=True), torch.float16)
    loose = list(arguments)
    for place in (9, *range(11, 16), -3):
        if isinstance(loose[place], Tensor):
            loose[place] = spread(loose[place])
    assert not loose[-3].is_contiguous() and not loose[9].is_contiguous()
    for x, y in zip(run(arguments, "triton")[:2], run(loose, "triton")[:2], strict=True):
        assert torch.equal(x, y)
    exact = [wide(x) for x in arguments]
    for x, y in zip(gradients(arguments, exact, "triton"), gradients(loose, exact, "triton"), strict=True):
        assert torch.equal(x, y)


def test_padding_may_hold_anything():
    arguments = make(replace(LONG, T=5), torch.float16)
    dirty = list(arguments)
    padding = (arguments[11] < 0)[:, None, :, None]
    dirty[:3] = [x.masked_fill(padding, NAN) for x in arguments[:3]]
    for x, y in zip(run(arguments, "triton")[:2], run(dirty, "triton")[:2], strict=True):
        assert torch.equal(x, y)
    exact = [wide(x) for x in arguments]
    for x, y in zip(gradients(arguments, exact, "triton"), gradients(dirty, exact, "triton"), strict=True):
        assert torch.equal(x, y)


def test_keys_that_no_row_sees_may_be_nan():
    """Keys before every begin and behind every limit, in both segments."""
    call = replace(LONG, T=3, role="target", limit=0)
    arguments = make(call, torch.float16)
    row = lambda n: torch.full((2, 3), n, dtype=torch.int32, device=DEVICE)  # noqa: E731
    arguments[13:16] = [row(25), row(10), row(65)]
    before = run(arguments, "triton")
    for first, seen, x in zip((0, 0, 0, 0), ((10, 25),) * 2 + ((65, 140),) * 2, arguments[5:9], strict=True):
        x[:, :, first : seen[0]] = NAN
        x[:, :, seen[1] :] = NAN
    after = run(arguments, "triton")
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_influence_is_what_the_reference_says():
    call = Call(B=1, H=2, HK=1, T=5, D=8, length=((4, 3),), role="mixed", limit=7, begin=(3, 2))
    arguments = make(call, torch.float32)
    flows = []
    for backend in ("triton", "reference"):
        for place in (2, 6, 8):

            def through(x: Tensor, place: int = place, backend: str = backend) -> Tensor:
                changed = list(arguments)
                changed[place] = x
                return run(changed, backend)[0]

            flows.append(influence(through, arguments[place]))
    for ours, reference in zip(flows[:3], flows[3:], strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("length", [[[-4, -4], [2**31 - 3, 2**31 - 3]], [[-(2**31), 9], [10**9, 10**9]]])
@pytest.mark.parametrize("windows", [(0, 0), (5, 6)])
def test_garbage_lengths_stay_inside_the_buffers(length, windows):
    sinks = (0, 0, 2) if any(windows) else (0, 0, 0)
    arguments = make(Call(role="mixed", T=9, windows=windows, sinks=sinks, limit=30), torch.float32)
    guarded = [torch.full((4, 2, 14, 16), 7.0, device=DEVICE) for _ in range(4)]
    for s in guarded:
        s[1:3] = 1.0
    arguments[5:9] = [s[1:3] for s in guarded]
    arguments[9] = torch.tensor(length, dtype=torch.int32, device=DEVICE)
    arguments[-1] = "triton"
    o, _ = raw(*arguments)
    assert all((s[0] == 7).all() and (s[3] == 7).all() for s in guarded)
    assert o.isfinite().all()


def test_two_calls_equal_one():
    """However a stream is cut into calls: 5 target rows at once, or 2 and then 3."""
    whole = make(Call(T=5, rotary=16, length=((9, 30), (40, 3)), capacity=(50, 50)), torch.float32)
    o, lse, *_ = run(whole, "triton")
    parts, segments, length = [], whole[5:9], whole[9]
    for rows in (slice(0, 2), slice(2, 5)):
        cut = list(whole)
        cut[:3] = [x[:, :, rows] for x in whole[:3]]
        cut[3:5] = [x[:, rows] for x in whole[3:5]]
        cut[5:9], cut[9] = segments, length
        *out, segments, _ = run(cut, "triton")
        parts.append(out)
        length = length + torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device=DEVICE)
    assert (torch.cat([p[0] for p in parts], 2) - o).abs().max() < 1e-6
    assert (torch.cat([p[1] for p in parts], 2) - lse).abs().max() < 1e-6


def test_long_mixed_chunks_are_counted_ahead():
    """More rows than are counted at once, 1024."""
    call = Call(B=1, H=1, HK=1, T=1100, D=8, length=((3, 5),), capacity=(1200, 1200), role="mixed")
    arguments = make(call, torch.float16)
    want_o, want_lse, *_ = run([wide(x) for x in arguments], "reference")
    o, lse, *_ = run(arguments, "triton")
    assert (o - want_o).abs().max() < 3e-3 and (lse - want_lse).nan_to_num(0, neginf=0).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["target", "begins", "rings", "softcap"])
def test_opcheck(name):
    call = CALLS[name] if name != "begins" else Call(role="mixed", T=4, limit=5, begin=(3, 3), rotary=16)
    arguments = make(call, torch.float16)
    arguments[5:9] = [x.nan_to_num(0) for x in arguments[5:9]]
    arguments[-1] = "triton"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(raw, arguments, test_utils=checks)


def test_through_the_public_call_with_gradients():
    def session(backend: str, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        cache = StreamCache(layers=1, batch=1, kv_heads=2, head_dim=16, dtype=dtype, device=DEVICE, capacity=8)
        out = []
        for role in (SOURCE, TARGET, TARGET):
            q, k, v = (torch.randn(1, n, 6, 16, generator=g).to(DEVICE, dtype).requires_grad_() for n in (4, 2, 2))
            o = incremental_prefill(q, k, v, None, None, cache, 0, role=role, backend=backend)
            cache.commit()
            out += [o, *torch.autograd.grad(o.square().sum(), (q, k, v))]
        return [x.detach().double() for x in out]

    for x, y in zip(session("triton", torch.float16), session("reference", torch.float64), strict=True):
        assert (x - y).abs().max() < 0.03


def test_refusals():
    cache = StreamCache(layers=1, batch=1, kv_heads=2, head_dim=16, dtype=torch.float32, device=DEVICE)
    q, k = torch.zeros(1, 4, 2, 16, device=DEVICE), torch.zeros(1, 2, 2, 16, device=DEVICE)
    with pytest.raises(NotImplementedError, match="the Triton kernels need a scale > 0"):
        incremental_prefill(q, k, k, None, None, cache, 0, role=TARGET, scale=-1.0, backend="triton")
    with pytest.raises(NotImplementedError, match="fp32 gradients would be less accurate"):
        incremental_prefill(q.requires_grad_(), k, k, None, None, cache, 0, role=TARGET, backend="triton")
    said = explain(incremental_prefill, q.detach(), k, k, None, None, cache, 0, role=TARGET)
    assert said.reasons["triton"] == "ok"


@pytest.mark.skipif(not GPU, reason="the interpreter is sequential")
def test_twenty_repeats_are_bit_equal():
    call = Call(B=2, H=14, HK=2, T=40, D=128, rotary=128, length=((3000, 500), (17, 2048)), capacity=(3100, 2100),
                role="mixed", limit=3000)  # fmt: skip
    arguments = make(call, torch.bfloat16)
    exact = [wide(x) for x in arguments]
    first = [*run(arguments, "triton")[:2], *gradients(arguments, exact, "triton")]
    for _ in range(20):
        again = [*run(arguments, "triton")[:2], *gradients(arguments, exact, "triton")]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("T", [1, 9, 300])
def test_captured_once_for_all_lengths(T):
    call = Call(B=2, H=14, HK=2, T=T, D=128, rotary=128, length=((3, 1), (0, 2)), capacity=(6000, 6000), limit=6000)
    arguments = make(call, torch.bfloat16)
    arguments[5:9] = [torch.randn_like(x) for x in arguments[5:9]]
    arguments[-1] = "triton"
    raw(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = raw(*arguments)
    for length in ([[5000, 400], [1, 5600]], [[0, 0], [0, 0]], [[64, 63], [4096, 1]]):
        arguments[9].copy_(torch.tensor(length, dtype=torch.int32))
        want_o, want_lse, want_segments, _ = run(arguments, "triton")
        o.fill_(NAN)
        graph.replay()
        assert torch.equal(o, want_o) and torch.equal(lse, want_lse)
        assert all(torch.equal(x, y) for x, y in zip(arguments[5:9], want_segments, strict=True))


def test_parts_fill_the_gpu(monkeypatch):
    """The parts of all items together hold every share once, in no more waves of programs than they need."""
    from streamkernels.triton_kernels.incremental_prefill import launch, tiles

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    choice = tiles.tile("some", 90, 128, 2)
    for items in (1, 4, 16, 56, 100, 224, 264, 300, 448, 5000):
        for keys in (1, 64, 1000, 10_000, 200_000):
            even, weight, shares = launch.share_out(torch.device("cpu"), items, choice, keys)
            assert even >= 1 and weight >= 1 and 0 <= shares - even * weight <= 1
            assert even <= tiles.MOST_SPLITS and (items * even <= 264 or even == 1)
            if shares > even * weight:
                # the small parts end with the even ones
                idle = -items * even % 264
                assert weight * idle >= items and -(-keys // choice.block_s) >= 4 * shares
    assert launch.share_out(torch.device("cpu"), 224, choice, 65536) == (1, 6, 7)
    assert launch.share_out(torch.device("cpu"), 224, choice, 1024) == (1, 1, 1)


@pytest.mark.skipif(not GPU, reason="the interpreter compiles nothing")
def test_lengths_compile_nothing():
    from streamkernels.triton_kernels.incremental_prefill.forward import attend_kernel

    def compiled() -> int:
        return sum(len(kept[0]) for kept in attend_kernel.device_caches.values())

    call = Call(B=1, H=14, HK=2, T=2, D=128, rotary=128, length=((3, 1),), capacity=(64, 64), limit=60)
    run(make(call, torch.bfloat16), "triton")
    run(make(replace(call, capacity=(6000, 6000)), torch.bfloat16), "triton")
    before = compiled()
    for n in (1, 16, 17, 48, 500):
        run(make(replace(call, length=((n, n),), capacity=(n + 16, 2 * n + 5000)), torch.bfloat16), "triton")
    assert compiled() == before
