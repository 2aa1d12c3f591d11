"""The limits of the machine and what users would call instead, measured in the same run as our kernels."""

from __future__ import annotations

import torch
from kernel_time import copies_for_cold_l2, graph_time


def copy_bandwidth(nbytes: int) -> float:
    """GB/s of the better of torch's two device-to-device copies (memcpy, elementwise kernel) that move `nbytes` in
    all, cold L2."""
    n = min(copies_for_cold_l2(nbytes), 64)
    sources = [torch.randn(nbytes // 4 // 2, device="cuda") for _ in range(n)]
    outs = [torch.empty_like(a) for a in sources]
    memcpy = graph_time([lambda a=a, o=o: o.copy_(a) for a, o in zip(sources, outs, strict=True)])
    kernel = graph_time([lambda a=a, o=o: torch.neg(a, out=o) for a, o in zip(sources, outs, strict=True)])
    return nbytes / min(memcpy, kernel) / 1e3


def eager_rotate_append(k, v, cos, sin, buffer_k, buffer_v, start: int) -> None:
    """What a Hugging Face model and a preallocated cache do: rotate in torch, then copy into the buffers."""
    T, half = k.shape[2], k.shape[3] // 2
    rotated = (
        k * torch.cat((cos, cos), -1)[:, None]
        + torch.cat((-k[..., half:], k[..., :half]), -1) * torch.cat((sin, sin), -1)[:, None]
    )
    buffer_k[:, :, start : start + T].copy_(rotated)
    buffer_v[:, :, start : start + T].copy_(v)
