"""incremental_prefill's Triton kernels in the dispatcher, the public call, CUDA graphs, and as they are compiled."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamkernels.backends.select import explain
from streamkernels.core.cache import SOURCE, TARGET, StreamCache
from streamkernels.ops.incremental_prefill import incremental_prefill

from .prefill_calls import CALLS, DEVICE, GPU, NAN, Call, gradients, make, raw, run, wide

if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


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
