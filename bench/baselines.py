"""The limits of the machine and what users would call instead, measured in the same run as our kernels."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_time import capture_stream, copies_for_cold_l2, graph_time
from torch import Tensor

import streamkernels as sk


def copy_bandwidth(nbytes: int) -> float:
    """GB/s of the better of torch's two device-to-device copies (memcpy, elementwise kernel) that move `nbytes` in
    all, cold L2."""
    n = min(copies_for_cold_l2(nbytes), 64)
    sources = [torch.randn(nbytes // 4 // 2, device="cuda") for _ in range(n)]
    outs = [torch.empty_like(a) for a in sources]
    memcpy = graph_time([lambda a=a, o=o: o.copy_(a) for a, o in zip(sources, outs, strict=True)])
    kernel = graph_time([lambda a=a, o=o: torch.neg(a, out=o) for a, o in zip(sources, outs, strict=True)])
    return nbytes / min(memcpy, kernel) / 1e3


@functools.cache
def read_time(nbytes: int) -> float:
    """Microseconds to read `nbytes`, cold L2: the fastest of three reductions (whole; rows of 4 KiB and of 64 KiB)."""
    n = min(copies_for_cold_l2(nbytes), 64)
    size = -(-nbytes // 65536) * 16384
    sources = [torch.randn(size, device="cuda") for _ in range(n)]
    times = [graph_time([lambda a=a: a.sum() for a in sources])]
    for row in (1024, 16384):
        times.append(graph_time([lambda a=a, row=row: a.view(-1, row).sum(1) for a in sources]))
    return min(times) * nbytes / (4 * size)


@functools.cache
def matmul_rate(n: int = 8192) -> float:
    """FLOP per microsecond of a bf16 matrix product n^3, random data."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * n**3 / graph_time([lambda: a @ b])


def eager_rotate_append(k, v, cos, sin, buffer_k, buffer_v, start: int) -> None:
    """What a Hugging Face model and a preallocated cache do: rotate in torch, then copy into the buffers."""
    T, half = k.shape[2], k.shape[3] // 2
    rotated = (
        k * torch.cat((cos, cos), -1)[:, None]
        + torch.cat((-k[..., half:], k[..., :half]), -1) * torch.cat((sin, sin), -1)[:, None]
    )
    buffer_k[:, :, start : start + T].copy_(rotated)
    buffer_v[:, :, start : start + T].copy_(v)


@dataclass(frozen=True)
class Peer:
    """A one-shot attention of some input sets: `forwards` and `backwards` are calls, one per set, and may be captured;
    `attend(q, k, v)` is what a user calls."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    forwards: list[Callable[[], object]]
    backwards: list[Callable[[], object]]
    first: tuple[Tensor, ...]  # o, dq, dk, dv of the first set


def peer(name: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor], sets: list[tuple[Tensor, ...]]) -> Peer:
    """A differentiable `attend` over sets of (q, k, v, do), its forwards kept for the backwards.

    The forward is timed with gradients on, which is how training calls it: it saves o and lse, and nothing more.
    """
    with capture_stream():
        outs = [attend(*x[:3]) for x in sets]

        def backward(i: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outs[i], sets[i][:3], sets[i][3], retain_graph=True)

        first = (outs[0].detach(), *backward(0))
    forwards = [lambda x=x: attend(*x[:3]) for x in sets]
    return Peer(name, attend, forwards, [lambda i=i: backward(i) for i in range(len(sets))], first)


def flex_visible(spans: sk.Spans) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod for at most two ATTEND slots, the first of which begins at 0."""
    bounds = spans.bounds[0]
    if bounds.shape[1] == 1:
        limit = bounds[:, 0, 1].contiguous()
        return lambda b, h, i, j: j < limit[i]
    limit, begin, end = (x.contiguous() for x in (bounds[:, 0, 1], bounds[:, 1, 0], bounds[:, 1, 1]))
    return lambda b, h, i, j: (j < limit[i]) | ((j >= begin[i]) & (j < end[i]))


def flex_attend(spans: sk.Spans, L: int, *, backend: str | None = None, compile: bool = True) -> Callable[..., Tensor]:
    """FlexAttention under `spans` over L keys: its Triton kernels, or `backend` "FLASH" for FlashAttention-4's."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # the backward is repeated
    mask = create_block_mask(flex_visible(spans), None, None, spans.bounds.shape[1], L, device=spans.bounds.device)
    call: Any = torch.compile(flex_attention, dynamic=False) if compile else flex_attention
    options: dict[str, Any] = {} if backend is None else {"kernel_options": {"BACKEND": backend}}
    return lambda q, k, v: call(q, k, v, block_mask=mask, enable_gqa=True, **options)


def flash_attention_4_missing() -> str | None:
    """None if FlexAttention can use FlashAttention-4, else one sentence."""
    try:
        if importlib.util.find_spec("flash_attn.cute") is not None:
            return None
    except ImportError:
        pass
    return "no column for FlexAttention on FlashAttention-4: flash-attn-4 is not installed"


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal SDPA on cuDNN (on a CPU: what torch has there)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
