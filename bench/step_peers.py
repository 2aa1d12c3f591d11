"""One streaming step of one layer as users would make it today, beside `incremental_prefill`: the same rows, the same
keys, each in the layout that the peer likes best.

A `Step` has all that a call needs: q, k, v of the new rows, the angles of their own positions, and the keys of earlier
rows in a source and a target segment. `out` of every contender is [B, T, H, D].
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from baselines import flex_attend
from torch import Tensor

import streamkernels as sk
from streamkernels.core.positions import apply_rotary
from streamkernels.ops import rotate_append as _register  # noqa: F401  (registers torch.ops.streamkernels.rotate_append)

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Step:
    """The new rows of B sessions and what they find: `lengths` [(source, target)] per session, `reads`: which sessions
    read (source rows), the others write (target rows). Row t of a session has the position (its segment's length + t).
    """

    q: Tensor  # [B, H, T, D], stored rows first
    k: Tensor  # [B, HK, T, D], likewise
    v: Tensor
    source: tuple[Tensor, Tensor]  # K, V [B, HK, longest source, D]
    target: tuple[Tensor, Tensor]
    lengths: tuple[tuple[int, int], ...]
    reads: tuple[bool, ...]

    @property
    def own(self) -> list[int]:
        """Length of the segment that each session's new rows go to."""
        return [s if reads else t for (s, t), reads in zip(self.lengths, self.reads, strict=True)]

    def angles(self, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """cos, sin [length, D / 2] of the positions first, first + 1, ..., in q's dtype, as models have them."""
        D, device = self.q.shape[3], self.q.device
        positions = torch.arange(first, first + length, device=device)[None]
        cos, sin = sk.Rotary.from_theta(D).cos_sin(positions)
        return cos[0].to(self.q.dtype), sin[0].to(self.q.dtype)

    @functools.cached_property
    def row_angles(self) -> tuple[Tensor, Tensor]:
        """cos, sin [B, T, D / 2] of the new rows."""
        found = [self.angles(self.q.shape[2], first) for first in self.own]
        return torch.stack([c for c, _ in found]), torch.stack([s for _, s in found])


def make_step(H: int, HK: int, D: int, T: int, lengths, reads, *, dtype: torch.dtype, device: str) -> Step:
    """Random rows and keys; segments as long as the longest session's."""
    B = len(lengths)
    draw = lambda h: torch.randn(B, T, h, D, dtype=dtype, device=device).transpose(1, 2)  # noqa: E731
    longest = [max(pair[r] for pair in lengths) for r in (0, 1)]
    segments = [tuple(torch.randn(B, HK, n, D, dtype=dtype, device=device) for _ in "kv") for n in longest]
    return Step(draw(H), draw(HK), draw(HK), segments[0], segments[1], tuple(lengths), tuple(reads))


def ours(steps: list[Step], backend: str, *, room: int = 0) -> tuple[list[Call], sk.StreamCache]:
    """One layer per step in one fixed cache with `room` spare slots; lengths staged and committed, keys filled in."""
    first = steps[0]
    B, HK, T, D = first.k.shape
    device, dtype = first.q.device, first.q.dtype
    longest = [max(pair[r] for pair in first.lengths) for r in (0, 1)]
    capacity = (longest[0] + T + room, longest[1] + T + room)
    form = {"batch": B, "kv_heads": HK, "head_dim": D, "dtype": dtype, "device": device, "capacity": capacity}
    cache = sk.StreamCache(layers=len(steps), fixed=True, **form)
    commit_lengths(cache, first.lengths)
    for layer, step in enumerate(steps):
        for role, held in enumerate((step.source, step.target)):
            for buffer, x in zip(cache.segment(layer, role), held, strict=True):
                buffer[:, :, : x.shape[2]].copy_(x)
    kinds = set(first.reads)
    roles = [sk.SOURCE if reads else sk.TARGET for reads in first.reads]
    role: Any = roles[0]
    if len(kinds) > 1:
        role = torch.tensor(roles, dtype=torch.int8, device=device)[:, None].expand(B, T).contiguous()

    def call(layer: int, step: Step) -> Tensor:
        cos, sin = step.row_angles
        o = sk.incremental_prefill(step.q, step.k, step.v, cos, sin, cache, layer, role=role, backend=backend)
        return o.transpose(1, 2)

    return [functools.partial(call, layer, step) for layer, step in enumerate(steps)], cache


def commit_lengths(cache: sk.StreamCache, lengths) -> None:
    """Bring an empty cache to these (source, target) lengths, without writing keys."""
    for role in (sk.SOURCE, sk.TARGET):
        counts = [pair[role] for pair in lengths]
        longest = max(counts)
        rows: Any = role
        if min(counts) < longest:
            there = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
            rows = torch.where(there, role, sk.PADDING).to(torch.int8)
        for layer in range(cache.layers):
            cache.stage(layer, rows, longest)
        cache.commit()


def fa3() -> Any:
    """The wheel `fa3-fwd`; ImportError without it."""
    return importlib.import_module("fa3_fwd_interface")


def one_segment(step: Step) -> tuple[Tensor, Tensor]:
    """K and V [B, S + T, HK, D] of one session with source and target in one buffer, and room for the new rows."""
    (S0, S1), T = step.lengths[0], step.q.shape[2]
    room = torch.zeros_like(step.k)
    joined = (
        torch.cat((a[:, :, :S0], b[:, :, :S1], room[:, :, :T]), 2)
        for a, b in zip(step.source, step.target, strict=True)
    )
    keys, values = (x.transpose(1, 2).contiguous() for x in joined)
    return keys, values


def fa3_append(step: Step) -> Call:
    """What one call does for someone who keeps one segment: rotary, append and attention; q at the end of the cache."""
    lib, (S0, S1), T = fa3(), step.lengths[0], step.q.shape[2]
    K, V = one_segment(step)
    # FA3 rotates by the index in the cache: a table in which index S0 + S1 + t has the angle of S1 + t
    cos, sin = (x.contiguous() for x in step.angles(S0 + S1 + T, -S0))
    length = torch.tensor([S0 + S1], dtype=torch.int32, device=step.q.device)
    q, k, v = (x.transpose(1, 2) for x in (step.q, step.k, step.v))
    return lambda: lib.flash_attn_with_kvcache(
        q, K, V, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=length, causal=True, rotary_interleaved=False
    )


def fa3_two_segments(step: Step) -> Call:
    """Two calls and a merge, for any batch of sessions that read or write; four launches besides FA3's own.

    All segments are rows of one pool [2 B, capacity, HK, D], so the first call takes every session at once: its new
    rows are rotated, appended to the segment of their role (`cache_batch_idx`) and attend over it. Sessions that write
    also see their source: a rotation of their q, a second call, and a merge by lse.
    """
    from peer_kernels import merge_two, rotate_rows

    lib, device = fa3(), step.q.device
    B, HK, T, D = step.k.shape
    capacity = max(max(pair) for pair in step.lengths) + T
    K, V = (torch.zeros(2 * B, capacity, HK, D, dtype=step.q.dtype, device=device) for _ in "kv")
    for r, held in enumerate((step.source, step.target)):
        for pool, x in zip((K, V), held, strict=True):
            pool[r * B : (r + 1) * B, : x.shape[2]].copy_(x.transpose(1, 2))
    number = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    writers = [b for b in range(B) if not step.reads[b]]
    pick = slice(writers[0], None, writers[1] - writers[0] if len(writers) > 1 else None)
    segment = number([b if step.reads[b] else B + b for b in range(B)])
    length, source_length = number(step.own), number([step.lengths[b][0] for b in writers])
    source_rows = number(writers)
    cos, sin = (x.contiguous() for x in step.angles(capacity))
    q, k, v = (x.transpose(1, 2) for x in (step.q, step.k, step.v))
    row_cos, row_sin = (x[pick].contiguous() for x in step.row_angles)

    def call() -> Tensor:
        out, lse, *_ = lib.flash_attn_with_kvcache(
            q, K, V, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=length, cache_batch_idx=segment, causal=True,
            rotary_interleaved=False, return_softmax_lse=True,
        )  # fmt: skip
        rotated = rotate_rows(q[pick], row_cos, row_sin)
        source, source_lse, *_ = lib.flash_attn_with_kvcache(
            rotated, K, V, cache_seqlens=source_length, cache_batch_idx=source_rows, return_softmax_lse=True
        )
        merge_two(source, source_lse, out[pick], lse[pick], out[pick])
        return out

    return call


def rotate_and_append(step: Step, backend: str) -> tuple[Tensor, Tensor, Call]:
    """K, V [1, HK, S + T, D] of one segment, and a call that writes the new rows and returns rotated q, in two
    launches."""
    from peer_kernels import rotate_rows

    (S0, S1), device = step.lengths[0], step.q.device
    K, V = (x.transpose(1, 2).contiguous() for x in one_segment(step))
    none = torch.empty_like(K[:, :, :1])
    length = torch.tensor([[0, S0 + S1]], dtype=torch.int32, device=device)
    status = torch.zeros(1, dtype=torch.int32, device=device)
    (cos, sin), q = step.row_angles, step.q.transpose(1, 2)
    append = torch.ops.streamkernels.rotate_append
    buffers = (none, none, K, V)

    def call() -> Tensor:
        append(step.k, step.v, cos, sin, *buffers, length, status, None, sk.TARGET, None, 0, False, False, backend)
        return rotate_rows(q, cos, sin).transpose(1, 2)

    return K, V, call


def cudnn(step: Step, backend: str) -> Call:
    """cuDNN's attention over one segment, behind our rotate and append."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    K, V, rotated = rotate_and_append(step, backend)
    T, keys = step.q.shape[2], K.shape[2]
    bias = None
    if T > 1:
        later = torch.ones(T, keys, dtype=torch.bool, device=K.device).triu(keys - T + 1)
        bias = torch.zeros(1, 1, T, keys, dtype=K.dtype, device=K.device).masked_fill(later, float("-inf"))
    kind = SDPBackend.CUDNN_ATTENTION if K.is_cuda else SDPBackend.MATH

    def call() -> Tensor:
        with sdpa_kernel(kind):
            o = torch.nn.functional.scaled_dot_product_attention(rotated(), K, V, attn_mask=bias, enable_gqa=True)
        return o.transpose(1, 2)

    return call


def flex(step: Step, backend: str, *, compile: bool = True) -> Call:
    """Compiled FlexAttention over one segment, behind our rotate and append."""
    K, V, rotated = rotate_and_append(step, backend)
    attend = flex_attend(
        sk.spans.bottom_right(step.q.shape[2], K.shape[2], device=K.device), K.shape[2], compile=compile
    )
    return lambda: attend(rotated(), K, V).transpose(1, 2)


def eager(step: Step) -> Call:
    """The papers' code on Hugging Face's eager attention: rotate, concatenate both caches and the new rows, repeat K
    and V, and a softmax over a dense fp32 score matrix."""
    (S0, S1), T = step.lengths[0], step.q.shape[2]
    (source_k, source_v), (target_k, target_v) = step.source, step.target
    cos, sin = step.row_angles
    repeats, scale = step.q.shape[1] // step.k.shape[1], step.q.shape[3] ** -0.5
    later = torch.ones(T, S0 + S1 + T, dtype=torch.bool, device=step.q.device).triu(S0 + S1 + 1)
    bias = torch.zeros(later.shape, dtype=step.q.dtype, device=step.q.device).masked_fill(later, float("-inf"))

    def call() -> Tensor:
        q, k = apply_rotary(step.q, cos, sin, False), apply_rotary(step.k, cos, sin, False)
        keys = torch.cat((source_k, torch.cat((target_k, k), 2)), 2).repeat_interleave(repeats, 1)
        values = torch.cat((source_v, torch.cat((target_v, step.v), 2)), 2).repeat_interleave(repeats, 1)
        weights = torch.softmax(q @ keys.transpose(2, 3) * scale + bias, -1, dtype=torch.float32).to(q.dtype)
        return (weights @ values).transpose(1, 2)

    return call
