"""Calls of `incremental_prefill` as raw arguments on a GPU, and what the reference makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NAN = float("nan")
DEVICE = torch.device("cuda", 0)
BUFFERS = slice(5, 9)
STATUS = 10
RISING = 16.0  # of queries' first column, where scores are to grow


@dataclass(frozen=True)
class Case:
    B: int = 1
    H: int = 8
    HK: int = 2
    T: int = 7
    D: int = 128
    dtype: torch.dtype = torch.bfloat16
    length: tuple[int, int] = (100, 37)  # at most, per session, when ragged
    ragged: bool = False
    capacity: tuple[int, int] | None = None  # default: room for all
    role: str = "target"  # source, target, mixed, padded, garbage
    limits: str = "none"  # none, random, garbage
    begins: bool = False
    sinks: tuple[int, int] = (0, 0)
    window: tuple[int, int] = (0, 0)
    ring_sinks: int = 0
    sink_logits: bool = False
    softcap: float = 0.0
    scale: float = 0.0  # default: 1 / sqrt(D)
    rotary_dim: int = -1  # default: D; 0: already rotated
    interleaved: bool = False
    angles_fp32: bool = True
    angles_batch: bool = True
    layout: str = "bthd"  # bhtd, fused, odd
    sharp: float = 1.0
    rise: float = 0.0  # bits by which scores grow over 64 keys of a segment; keys and queries are not turned then

    def __str__(self) -> str:
        odd = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={value}" for name, value in odd).replace("torch.", "").replace(" ", "") or "plain"


def heads_of(case: Case, heads: int, random: torch.Generator, layout: str) -> Tensor:
    """[B, heads, T, D], laid out as models hand it over, NaN around it."""
    B, T, D = case.B, case.T, case.D
    x = torch.randn(B, heads, T, D, generator=random, device=DEVICE)
    if layout == "bhtd":
        room = torch.full((B, heads, T, D), NAN, dtype=case.dtype, device=DEVICE)
    elif layout == "fused":
        room = torch.full((B, T + 1, 3, heads, D), NAN, dtype=case.dtype, device=DEVICE)[:, 1:, 1].transpose(1, 2)
    elif layout == "odd":
        room = torch.full((B, T, heads, D + 3), NAN, dtype=case.dtype, device=DEVICE)[..., 1:-2].transpose(1, 2)
    else:
        room = torch.full((B, T, heads, D), NAN, dtype=case.dtype, device=DEVICE).transpose(1, 2)
    return room.copy_(x)


def roles_of(case: Case, random: torch.Generator) -> tuple[Tensor | None, int]:
    shape = (case.B, case.T)
    if case.role in ("source", "target"):
        return None, int(case.role == "target")
    low, high = {"mixed": (0, 2), "padded": (-1, 2), "garbage": (-128, 128)}[case.role]
    role = torch.randint(low, high, shape, generator=random, device=DEVICE)
    if case.role == "garbage":
        role = role // 32
    return role.to(torch.int8), 0


def make_call(case: Case, seed: int = 0) -> list[object]:
    """The raw arguments of one call; slots that hold no key are NaN."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    B, H, HK, T, D = case.B, case.H, case.HK, case.T, case.D
    q = heads_of(case, H, random, case.layout).mul_(case.sharp)
    k, v = (heads_of(case, HK, random, case.layout) for _ in "kv")
    rotary_dim = 0 if case.rise else D if case.rotary_dim < 0 else case.rotary_dim
    scale = case.scale or D**-0.5
    if case.rise:
        q[..., 0] = RISING
    cos = sin = None
    if rotary_dim:
        angle = torch.rand(B if case.angles_batch else 1, T, rotary_dim // 2, generator=random, device=DEVICE) * 6.28
        cos, sin = ((x if case.angles_fp32 else x.to(case.dtype)) for x in (angle.cos(), angle.sin()))
    most = torch.tensor(case.length, device=DEVICE)
    length = most.expand(B, 2).clone()
    if case.ragged:
        length = (torch.rand(B, 2, generator=random, device=DEVICE) * (most + 1)).long()
    buffers = []
    for s in (0, 1):
        C = case.length[s] + T if case.capacity is None else case.capacity[s]
        for _ in "kv":
            x = torch.randn(B, HK, C, D, generator=random, device=DEVICE).to(case.dtype)
            empty = torch.arange(C, device=DEVICE)[None] >= length[:, s, None]
            if case.rise and len(buffers) % 2 == 0:
                x[..., 0] = torch.arange(C, device=DEVICE) * (case.rise / 64 * math.log(2) / scale / RISING)
            buffers.append(x.masked_fill_(empty[:, None, :, None], NAN))
    role, segment = roles_of(case, random)

    def column(kind: str, top: int) -> Tensor | None:
        if kind == "none":
            return None
        if kind == "garbage":
            return torch.randint(-(2**31), 2**31, (B, T), generator=random, device=DEVICE).int()
        return torch.randint(-3, top + T + 3, (B, T), generator=random, device=DEVICE, dtype=torch.int32)

    limit = column(case.limits, case.length[0])
    begins = [column("random" if case.begins else "none", n) for n in case.length]
    logits = torch.randn(H, generator=random, device=DEVICE) if case.sink_logits else None
    return [
        q, k, v, cos, sin, *buffers, length.int(), torch.zeros(1, dtype=torch.int32, device=DEVICE), role, segment,
        limit, *begins, *case.sinks, case.ring_sinks, any(case.window), *case.window,
        scale, case.softcap, logits, case.interleaved,
    ]  # fmt: skip


def copy_of(call: list[object], dtype: torch.dtype | None = None) -> list[object]:
    """The same call on fresh tensors; floating ones in `dtype`."""
    out: list[object] = []
    for x in call:
        if not isinstance(x, Tensor):
            out.append(x)
        elif x.is_floating_point() and dtype is not None:
            out.append(x.to(dtype))
        else:
            out.append(x.clone())
    return out
