"""span_attention (Triton) under a wait-k training mask beside FlexAttention, and plain causal beside cuDNN: device
time.

`pytest -s bench/bench_span_attention.py`. TFLOP/s count the arithmetic of visible pairs, 4 D per pair and head
forward, 2.5 times that
backward (FlashAttention's convention). Inputs of all but the smallest case exceed the L2 together.
"""

from __future__ import annotations

import pytest
import torch
from kernel_time import graph_time

import streamkernels as sk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="device time needs a GPU")
WAIT_K = [
    (2048, 28, 4, 128),
    (8192, 28, 4, 128),
    (16384, 28, 4, 128),
    (32768, 28, 4, 128),
    (8192, 16, 8, 64),
    (8192, 8, 4, 256),
    (8192, 32, 32, 128),
]  # L, H, HK, D


def _inputs(L: int, H: int, HK: int, D: int):
    make = lambda heads: torch.randn(1, L, heads, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
    return make(H).requires_grad_(), make(HK).requires_grad_(), make(HK).requires_grad_(), make(H)


def _wait_k(L: int) -> sk.Spans:
    words = [4] * (L // 8)
    return sk.spans.wait_k([words], [words], k=5, device="cuda")


def _ours(q, k, v, do, spans):
    prepared = sk.prepare(spans, k.shape[2])
    o, lse = sk.span_attention(q, k, v, spans, prepared=prepared, return_lse=True, backend="triton")
    options = (*[None] * 7, None, *prepared, q.shape[-1] ** -0.5, 0.0, "triton")
    rules = [int(rule) for rule in spans.rules]
    saved = [x.detach() for x in (q, k, v, o, lse)]
    zero = torch.zeros_like(lse)
    forward = torch.ops.streamkernels.span_attention
    backward = torch.ops.streamkernels.span_attention_backward

    def run_forward():
        with torch.no_grad():
            forward(*saved[:3], spans.bounds, rules, *options)

    def run_backward():
        backward(do, zero, *saved, spans.bounds, rules, *options)

    return run_forward, run_backward, o


def _flex(q, k, v, do, spans, check):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False
    bounds = spans.bounds[0]
    limit, begin, end = (x.contiguous() for x in (bounds[:, 0, 1], bounds[:, 1, 0], bounds[:, 1, 1]))

    def visible(b, h, i, j):
        return (j < limit[i]) | ((j >= begin[i]) & (j < end[i]))

    L = q.shape[2]
    mask = create_block_mask(visible, 1, None, L, L, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)
    o = compiled(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(o, check, atol=2e-2, rtol=2e-2)

    def run_forward():
        with torch.no_grad():
            compiled(q, k, v, block_mask=mask, enable_gqa=True)

    return run_forward, lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)


def _event_time(call, repeats: int = 9) -> float:
    """Median microseconds between events around one eager call, queued behind a sleep so that the host is not part of
    it."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def _row(name, L, H, HK, D, flops, times, peer_times):
    row = {"mask": name, "L": L, "H": H, "HK": HK, "D": D}
    for part, factor, ours, peer in zip(("forward", "backward"), (1, 2.5), times, peer_times, strict=True):
        row[f"{part} us"] = ours
        row[f"{part} TFLOP/s"] = factor * flops / ours / 1e6
        row[f"peer {part} us"] = peer
        row[f"{part} / peer"] = peer / ours
    return row


@pytest.mark.parametrize("L, H, HK, D", WAIT_K)
def test_wait_k_beside_flex_attention(L, H, HK, D, rows):
    q, k, v, do = _inputs(L, H, HK, D)
    spans = _wait_k(L)
    pairs = int((spans.bounds[..., 1] - spans.bounds[..., 0]).clamp(min=0).sum())
    forward, backward, o = _ours(q, k, v, do, spans)
    peers = _flex(q, k, v, do, spans, o.detach())
    times = [_event_time(call) for call in (forward, backward)]
    rows.append(_row("wait-k 5 / flex", L, H, HK, D, 4 * pairs * H * D, times, [_event_time(call) for call in peers]))


@pytest.mark.parametrize("L, H, HK, D", [(8192, 28, 4, 128)])
def test_causal_beside_cudnn(L, H, HK, D, rows):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, do = _inputs(L, H, HK, D)
    spans = sk.spans.causal(L, device="cuda")
    forward, backward, o = _ours(q, k, v, do, spans)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attention = lambda: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
            q, k, v, is_causal=True, enable_gqa=True
        )
        theirs = attention()
        torch.testing.assert_close(theirs, o.detach(), atol=2e-2, rtol=2e-2)

        def peer_forward():
            with torch.no_grad():
                attention()

        peers = [
            _event_time(peer_forward),
            _event_time(lambda: torch.autograd.grad(theirs, (q, k, v), do, retain_graph=True)),
        ]
    times = [_event_time(call) for call in (forward, backward)]
    rows.append(_row("causal / cuDNN", L, H, HK, D, 4 * L * (L + 1) // 2 * H * D, times, peers))


def test_rules(rows):
    """Text rows over vision keys under each rule, beside ATTEND: MASS and SINK need no product with the values."""
    from streamkernels.core.spans import ATTEND, MASS, SINK

    H, T, S, D = 32, 512, 16384, 128
    q, k, v = (torch.randn(1, H, n, D, device="cuda", dtype=torch.bfloat16) for n in (T, S, S))
    bounds = torch.zeros(1, T, 2, 2, dtype=torch.int32, device="cuda")
    bounds[:, :, 1, 1] = S - T
    bounds[:, :, 0, 0] = S - T
    bounds[:, :, 0, 1] = S - T + 1 + torch.arange(T, device="cuda")
    sink = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    times = {}
    for rule in (ATTEND, MASS, SINK):
        spans = sk.Spans(bounds, (ATTEND, rule), sink if rule == SINK else None)
        prepared = sk.prepare(spans, S)
        call = lambda s=spans, p=prepared: sk.span_attention(q, k, v, s, prepared=p, backend="triton")  # noqa: E731
        times[rule] = graph_time([call])
        compared = [times[rule]] * 2, [times[ATTEND]] * 2
        rows.append(_row(f"{rule.name} / ATTEND, T=512 S=16k", S, H, H, D, 4 * T * S * H * D, *compared))


def test_removed_keys(rows):
    """90 % of the keys hidden by spans or by a kept list, T = 512, S = 16k, beside all of them."""
    from streamkernels.core.spans import ATTEND, KEPT

    H, T, S, D = 32, 512, 16384, 128
    q, k, v = (torch.randn(1, H, n, D, device="cuda", dtype=torch.bfloat16) for n in (T, S, S))
    whole = torch.tensor([0, S], dtype=torch.int32, device="cuda").expand(1, T, 1, 2).contiguous()
    tenth = torch.tensor([S - S // 10, S], dtype=torch.int32, device="cuda").expand(1, T, 1, 2).contiguous()
    kept = torch.arange(0, S, 10, dtype=torch.int32, device="cuda").expand(1, H, -1).contiguous()
    count = torch.full((1, H), kept.shape[2], dtype=torch.int32, device="cuda")
    times = {}
    for name, spans in (
        ("all keys", sk.Spans(whole, (ATTEND,))),
        ("10 % by spans", sk.Spans(tenth, (ATTEND,))),
        ("10 % by a kept list", sk.Spans(whole, (KEPT,), None, kept, count)),
    ):
        prepared = sk.prepare(spans, S)
        call = lambda s=spans, p=prepared: sk.span_attention(q, k, v, s, prepared=p, backend="triton")  # noqa: E731
        times[name] = graph_time([call])
        dense = times["all keys"]
        row = _row(f"{name}, T=512 S=16k", S, H, H, D, 4 * T * S * H * D, [times[name]] * 2, [dense] * 2)
        rows.append(row)
