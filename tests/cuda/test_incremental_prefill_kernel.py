"""The CUDA kernel of `incremental_prefill` against the fp64 reference, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from streamkernels.backends import cuda
from streamkernels.backends.select import Call
from streamkernels.reference import incremental_prefill as reference
from streamkernels.testing.compare import assert_accurate, ulp
from streamkernels.testing.inputs import spread

from .prefill_cases import BUFFERS, DEVICE, NAN, STATUS, Case, copy_of, make_call

WHY = "no GPU"
if torch.cuda.is_available():
    WHY = cuda.reason(Call("incremental_prefill", DEVICE, torch.bfloat16, {"D": 64, "T": 1, "B": 1})) or ""
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [
    Case(T=T, D=D, dtype=dtype, length=(S, S // 3))
    for (T, S), D, dtype in zip(
        itertools.product((1, 2, 8, 17, 32, 63, 128), (0, 1, 17, 63, 111, 1000)),
        itertools.cycle((64, 96, 128, 256)),
        itertools.cycle((BF16, FP16, BF16)),
        strict=False,
    )
]
GROUPS = [Case(H=2 * R, HK=2, T=T, D=D) for R in (1, 2, 3, 5, 7, 8, 12, 16) for T, D in ((1, 128), (9, 64), (40, 128))]
LARGE = [
    Case(H=28, HK=4, T=1, length=(4097, 500)),
    Case(H=28, HK=4, T=8, length=(4097, 500), limits="random"),
    Case(H=28, HK=4, T=32, length=(4097, 500), role="mixed"),
    Case(H=28, HK=4, T=8, length=(70000, 3000)),
    Case(H=28, HK=4, T=1, length=(500, 9000), dtype=FP16),
    Case(H=28, HK=4, T=9, length=(9000, 9001), D=64),
    *(Case(H=28, HK=4, T=32, length=(4000, 97 + 64 * n)) for n in range(4)),
    Case(H=28, HK=4, T=33, length=(20000, 300), role="source"),
    Case(H=28, HK=4, T=64, length=(3000, 3000), softcap=20.0, sink_logits=True),
    Case(H=32, HK=32, T=40, length=(600, 70), D=64, capacity=(600, 90)),
    Case(H=14, HK=2, T=128, length=(9000, 500)),
    Case(H=14, HK=2, T=511, length=(1500, 500), role="mixed", limits="random"),
    Case(H=14, HK=2, T=512, length=(1500, 500), D=64),
    Case(H=4, HK=2, T=512, length=(700, 50), D=256, role="padded", limits="random", begins=True),
    Case(H=32, HK=32, T=8, length=(2000, 200)),
    Case(B=3, H=28, HK=4, T=1, length=(3000, 300), ragged=True),
    Case(B=8, H=28, HK=4, T=4, length=(3000, 300), ragged=True, role="mixed"),
    Case(B=64, H=8, HK=2, T=2, length=(900, 90), ragged=True, role="padded", limits="random"),
    Case(B=300, H=2, HK=1, T=3, length=(90, 40), ragged=True, role="mixed", D=64),
    Case(B=5, H=8, HK=2, T=100, length=(500, 500), ragged=True, role="padded", limits="random", begins=True),
]
# maxima are raised where the sums of weights show that they must be; 150 bits are more than a float's exponents
RISING = [
    *(
        Case(H=28, HK=4, T=T, D=D, dtype=dtype, length=(length, 700), rise=rise)
        for rise in (0.3, 5.0, 20.0, 150.0, -20.0)
        for T, D, dtype, length in (
            (1, 128, BF16, 3000),
            (8, 128, FP16, 3000),
            (32, 128, BF16, 20000),
            (32, 64, FP16, 20000),
        )
    ),
    *(Case(H=8, HK=4, T=8, D=256, length=(3000, 700), rise=rise) for rise in (5.0, 150.0)),
]
OPTIONS = [
    Case(role="source"),
    Case(role="mixed", limits="random"),
    Case(role="padded", limits="random", begins=True, sinks=(2, 3), T=17),
    Case(role="garbage", limits="garbage", T=33),
    Case(limits="garbage"),
    Case(B=2, begins=True, limits="random", length=(700, 500), sinks=(70, 5), role="mixed", T=13),
    Case(sink_logits=True),
    Case(sink_logits=True, softcap=3.0, dtype=FP16),
    Case(softcap=30.0, sharp=8.0),
    Case(scale=-0.3),
    Case(scale=1e-30),
    Case(sharp=30.0, T=33, length=(500, 50)),
    Case(rotary_dim=0),
    Case(rotary_dim=64),
    Case(rotary_dim=20, T=9),
    Case(interleaved=True),
    Case(interleaved=True, rotary_dim=20, D=64, T=21),
    Case(angles_fp32=False, angles_batch=False, B=2),
    Case(angles_fp32=False, interleaved=True, D=64),
    *(Case(layout=layout, T=T, B=2, role="mixed") for layout in ("bhtd", "fused", "odd") for T in (1, 19)),
    Case(layout="odd", D=256, interleaved=True),
    Case(capacity=(100, 200)),
    Case(capacity=(104, 40), role="mixed", T=17),
    Case(capacity=(0, 64), length=(0, 3), role="mixed"),
    Case(capacity=(64, 0), length=(9, 0), role="source"),
    Case(length=(0, 0), role="source"),
    Case(length=(0, 0), role="mixed", limits="random", T=40),
    Case(B=2, window=(64, 32), ring_sinks=4, capacity=(64 + 4 + 7, 32 + 4 + 7), length=(1000, 500), role="mixed"),
    Case(B=2, window=(64, 32), ring_sinks=4, capacity=(75, 43), length=(30, 20), role="mixed", limits="random"),
    Case(B=2, window=(300, 0), capacity=(340, 600), length=(900, 500), role="padded", T=33, limits="random"),
    Case(window=(20, 20), ring_sinks=4, capacity=(200, 200), length=(5000, 5000), T=1, D=64),
]


def run(case: Case, seed: int = 0) -> None:
    call = make_call(case, seed)
    ours, plain, exact = copy_of(call), copy_of(call), copy_of(call, torch.float64)
    for x, y in zip(ours[:3], call[:3], strict=True):
        assert x.shape == y.shape
    ours[:3] = call[:3]  # with their strides
    o, lse = cuda.incremental_prefill(*ours)
    plain_o, plain_lse = reference.incremental_prefill(*plain)
    exact_o, exact_lse = reference.incremental_prefill(*exact)
    torch.cuda.synchronize()
    assert_accurate("o", o, plain_o, exact_o)
    if case.rise:
        # products cut off what they add: a unit in the last place for each 16 columns of scores, and the rest
        assert ((lse - exact_lse).abs() <= (case.D / 16 + 4) * ulp(exact_lse, lse.dtype)).all()
    else:
        assert_accurate("lse", lse[..., None], plain_lse[..., None], exact_lse[..., None])
    assert o.transpose(1, 2).is_contiguous()
    assert int(ours[STATUS]) == int(plain[STATUS])
    for name, x, y in zip(("source_k", "source_v", "target_k", "target_v"), ours[BUFFERS], plain[BUFFERS], strict=True):
        if name.endswith("v"):
            assert torch.equal(x.nan_to_num(nan=9.5), y.nan_to_num(nan=9.5)), name
        else:
            assert torch.allclose(x, y, rtol=2**-7, atol=1e-3, equal_nan=True), name


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_groups(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("role", ["target", "mixed"])
def test_options_of_any_strides(role: str) -> None:
    case = Case(B=2, T=9, role=role, limits="random", begins=True, sink_logits=True)
    call, loose = make_call(case), make_call(case)
    for place in (9, *range(11, 16), -2):
        if isinstance(loose[place], torch.Tensor):
            loose[place] = spread(loose[place])
    assert not loose[-2].is_contiguous()
    found = [cuda.incremental_prefill(*arguments) for arguments in (call, loose)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", RISING, ids=str)
def test_scores_that_rise(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("case", [LARGE[0], LARGE[2], LARGE[5], LARGE[10]], ids=str)
def test_repeats_give_the_same_bits(case: Case) -> None:
    call = make_call(case)
    first = cuda.incremental_prefill(*copy_of(call))
    for _ in range(20):
        again = cuda.incremental_prefill(*copy_of(call))
        assert all(torch.equal(x.view(torch.int8), y.view(torch.int8)) for x, y in zip(again, first, strict=True))


def test_garbage_lengths_read_nothing_outside() -> None:
    for lengths in ((2**31 - 1, -(2**31)), (-5, 2**31 - 1), (10**6, 10**6)):
        for window in ((0, 0), (16, 16)):
            call = make_call(Case(B=2, role="mixed", T=9, window=window, capacity=(64, 64), length=(20, 20)))
            call[9] = torch.tensor([lengths, (20, 20)], dtype=torch.int32, device=DEVICE)
            o, _ = cuda.incremental_prefill(*call)
            torch.cuda.synchronize()
            assert torch.isfinite(o[1]).all()


@pytest.mark.parametrize("T", [1, 9, 40])
@pytest.mark.parametrize("segment", [0, 1])
def test_plain_calls_agree_with_calls_that_say_so_by_roles(T: int, segment: int) -> None:
    """A session whose rows are all of one segment has a kernel of its own on Hopper, for any lengths."""
    for lengths in ((0, 0), (5, -3), (-5, 20), (-(2**31), 64), (2**31 - 1, 30), (30, 2**31 - 1), (64, 65), (103, 99)):
        call = make_call(Case(T=T, H=14, HK=2, capacity=(104, 130), length=(20, 20)))
        for x in call[BUFFERS]:
            x.copy_(torch.randn_like(x))
        call[9] = torch.tensor([lengths], dtype=torch.int32, device=DEVICE)
        call[12] = segment
        ours, theirs = copy_of(call), copy_of(call)
        theirs[11] = torch.full((1, T), segment, dtype=torch.int8, device=DEVICE)
        o, lse = cuda.incremental_prefill(*ours)
        other_o, other_lse = cuda.incremental_prefill(*theirs)
        torch.testing.assert_close(o, other_o, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, other_lse, rtol=1e-3, atol=1e-3)
        for x, y in zip(ours[5:STATUS + 1], theirs[5:STATUS + 1], strict=True):
            assert torch.equal(x, y), lengths


INFLUENCE = [
    Case(B=1, T=11, role="mixed", limits="random", begins=True, sinks=(1, 2), length=(150, 90)),
    Case(B=1, T=11, length=(150, 90)),
    Case(B=1, T=33, role="source", length=(150, 90)),
]


@pytest.mark.parametrize("case", INFLUENCE, ids=str)
def test_influence(case: Case) -> None:
    """A key that is changed changes the rows that see it, and no other."""
    call = make_call(case)
    before, _ = cuda.incremental_prefill(*copy_of(call))
    placed = reference.place_rows(call[9], call[11], call[12], case.T)
    sights = reference.sights(placed, call[13], (call[14], call[15]), case.sinks)
    for s, at in ((0, 0), (0, 63), (0, 64), (0, 149), (1, 0), (1, 1), (1, 89)):
        other = copy_of(call)
        other[5 + 2 * s + 1][:, :, at] += 1.0
        after, _ = cuda.incremental_prefill(*other)
        changed = (after != before).any(-1).all(1)
        sees = sights[s].sees(torch.tensor([[at]], device=DEVICE), slice(0, case.T))[..., 0]
        assert torch.equal(changed, sees), (s, at)


def assert_as_eager(call: list[object], o: torch.Tensor, lse: torch.Tensor) -> None:
    """`o` and `lse`, of a replay, are what the call gives by itself, to the bit."""
    eager_o, eager_lse = cuda.incremental_prefill(*call)
    assert torch.equal(o, eager_o) and torch.equal(lse, eager_lse)
    want, _ = reference.incremental_prefill(*copy_of(call))
    assert (o.float() - want.float()).abs().max() < 0.05


def test_a_graph_follows_lengths_and_roles() -> None:
    case = Case(B=2, H=28, HK=4, T=4, length=(1000, 200), role="padded", limits="random", capacity=(9000, 4000))
    call = make_call(case)
    for x in call[BUFFERS]:
        x.copy_(torch.randn_like(x))
    static = copy_of(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cuda.incremental_prefill(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = cuda.incremental_prefill(*static)
    random = torch.Generator(DEVICE).manual_seed(3)
    for i in range(1000):
        length = torch.randint(0, 3900, (2, 2), generator=random, device=DEVICE, dtype=torch.int32)
        role = torch.randint(-1, 2, (2, 4), generator=random, device=DEVICE, dtype=torch.int8)
        static[9].copy_(length)
        static[11].copy_(role)
        graph.replay()
        if i % 100 == 0:
            assert_as_eager(static, o, lse)


def test_a_graph_of_a_plain_session_follows_lengths() -> None:
    static = make_call(Case(H=28, HK=4, T=8, length=(1000, 200), capacity=(4000, 9000)))
    for x in static[BUFFERS]:
        x.copy_(torch.randn_like(x))
    cuda.incremental_prefill(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = cuda.incremental_prefill(*static)
    random = torch.Generator(DEVICE).manual_seed(3)
    for i in range(1000):
        static[9].copy_(torch.randint(0, 3900 if i % 2 else 300, (1, 2), generator=random, device=DEVICE))
        graph.replay()
        if i % 50 < 2:
            assert_as_eager(static, o, lse)


def test_a_full_segment_sets_the_status_word() -> None:
    call = make_call(Case(role="source", T=8, capacity=(104, 64), length=(100, 3)))
    static = copy_of(call)
    cuda.incremental_prefill(*static)
    assert int(static[STATUS]) == 1
    assert not static[5][:, :, 100:].isnan().any() and static[7][:, :, 3:].isnan().all()


@pytest.mark.parametrize("case", LARGE[2:4], ids=str)
def test_two_streams_at_once(case: Case) -> None:
    calls = [make_call(case, seed) for seed in (0, 1)]
    want = [cuda.incremental_prefill(*copy_of(call)) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    inputs = [[copy_of(call) for call in calls] for _ in range(20)]
    torch.cuda.synchronize()
    got = []
    for pair in inputs:
        for stream, call in zip(streams, pair, strict=True):
            with torch.cuda.stream(stream):
                got.append(cuda.incremental_prefill(*call))
    torch.cuda.synchronize()
    for i, (o, lse) in enumerate(got):
        assert torch.equal(o, want[i % 2][0]) and torch.equal(lse, want[i % 2][1])


def test_blocks_that_start_late() -> None:
    """Blocks wait a while for others of their item, which a busy GPU may not have room for: nobody hangs, and who joins
    which rows changes nothing."""
    side, soon = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE, priority=-1)
    x = torch.randn(8192, 8192, dtype=BF16, device=DEVICE)
    for case in (LARGE[9], LARGE[10]):
        call = make_call(case)
        calls = [copy_of(call) for _ in range(20)]
        first = cuda.incremental_prefill(*call)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            products = [x @ x for _ in range(10)]
        with torch.cuda.stream(soon):
            results = [cuda.incremental_prefill(*again) for again in calls]
        torch.cuda.synchronize()
        for result in results:
            assert all(torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(result, first, strict=True))
        assert torch.equal(products[0], products[-1])


def test_rows_that_see_nothing_and_poison() -> None:
    """Padding rows may hold anything; slots behind the length are NaN already (make_call)."""
    call = make_call(Case(T=6, length=(0, 0), capacity=(40, 40)))
    call[11] = torch.tensor([[-1, 0, 1, -1, 1, 0]], dtype=torch.int8, device=DEVICE)
    for x in call[:3]:
        x[:, :, [0, 3]] = NAN
    call[13] = torch.zeros(1, 6, dtype=torch.int32, device=DEVICE)
    o, lse = cuda.incremental_prefill(*call)
    assert (o[:, :, [0, 3]] == 0).all() and (lse[..., [0, 3]] == -torch.inf).all()
    assert torch.isfinite(o).all() and torch.isfinite(lse[..., [1, 2, 4, 5]]).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    call = make_call(Case(T=3))
    there = [x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in copy_of(call)]
    here, _ = cuda.incremental_prefill(*call)
    o, _ = cuda.incremental_prefill(*there)
    assert torch.equal(o.cpu(), here.cpu())
