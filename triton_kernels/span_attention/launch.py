"""Launch span_attention and its backward: allocation of outputs and statistics only, no synchronisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .backward import dkdv_kernel, dq_kernel, row_statistics_kernel
from .forward import span_attention_kernel

LOG2E = 1.4426950408889634
# key tiles x heads that keep a GPU busy; below, the query heads of a key head are split over programs and summed
# afterwards
ENOUGH_PROGRAMS = 1000


def span_attention(
    q: Tensor, k: Tensor, v: Tensor,
    bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None, kept_count: Tensor | None,
    sink_logits: Tensor | None, row_blocks: Tensor, key_blocks: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, H, T, D] stored [B, T, H, D], lse fp32 [B, H, T]; the op's raw arguments, already checked."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    o = q.new_empty((B, T, H, D)).transpose(1, 2)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel() == 0 or S == 0:
        return o.zero_(), lse.fill_(-math.inf)
    choice = tiles.tile("forward", _capability(q.device), D, q.element_size())
    spans = _Spans(bounds, rules, sink_key, kept, kept_count, row_blocks, key_blocks)
    k_rows, v_rows = _rows(k), _rows(v)
    with torch.cuda.device_of(q):
        span_attention_kernel[(B * H, triton.cdiv(T, choice.block_t))](
            _descriptor(q, choice.block_t), _descriptor(k, choice.block_s), _descriptor(v, choice.block_s), k_rows,
            v_rows,
            o, lse, spans.bounds, spans.row_blocks, *spans.lists, lse if sink_logits is None else sink_logits,
            *_factors(scale, softcap, q.dtype), T, S, H, HK, spans.row_blocks.shape[1], spans.K,
            *k_rows.stride()[:3], *v_rows.stride()[:3], *o.stride()[:3],
            SINK_LOGITS=sink_logits is not None, **_meta(choice, D, bounds.shape[2], spans.code, softcap, q.dtype),
        )  # fmt: skip
    return o, lse


def span_attention_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None, kept_count: Tensor | None,
    sink_logits: Tensor | None, row_blocks: Tensor, key_blocks: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v (stored rows first), d sink_logits [H] (empty without)."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    dq = q.new_empty((B, T, H, D)).transpose(1, 2)
    dsink = q.new_empty(0) if sink_logits is None else torch.zeros_like(sink_logits)
    if o.numel() == 0 or k.numel() == 0:
        empty = [k.new_zeros((B, S, HK, D)).transpose(1, 2) for _ in "kv"]
        return dq.zero_(), empty[0], empty[1], dsink
    spans = _Spans(bounds, rules, sink_key, kept, kept_count, row_blocks, key_blocks)
    total, delta, share = (torch.empty_like(lse) for _ in range(3))
    mass = torch.empty((len(rules) if spans.sinks else 0, *lse.shape), dtype=torch.float32, device=q.device)
    do = _rows(do)
    rows = dict(N=bounds.shape[2], spans=spans, factors=(*_factors(scale, softcap, q.dtype), scale), softcap=softcap)
    with torch.cuda.device_of(q):
        row_statistics_kernel[(B * H, triton.cdiv(T, 32))](
            o, do, lse, dlse, lse if sink_logits is None else sink_logits, total, delta, share, T, H,
            *o.stride()[:3], *do.stride()[:3], *dlse.stride(),
            D=D, SINK_LOGITS=sink_logits is not None, PRECISION=_precision(q.dtype), BLOCK_T=32,
            BLOCK_D=tiles.block_d(D), num_warps=4,
        )  # fmt: skip
        _dq(q, k, v, do, dq, total, delta, mass, **rows)
        dk, dv = _dkdv(q, k, v, do, total, delta, **rows)
    for slot in spans.sinks:
        _add_to_sink(dv, mass[slot], do, spans.sink_key[:, slot])
    if sink_logits is not None:
        dsink = share.sum((0, 2)).to(sink_logits.dtype)
    return dq, dk, dv, dsink


def _dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, total: Tensor, delta: Tensor, mass: Tensor,
    *, N: int, spans: _Spans, factors: tuple[float, float, float], softcap: float,
) -> None:  # fmt: skip
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    choice = tiles.tile("dq", _capability(q.device), D, q.element_size())
    k_rows, v_rows = _rows(k), _rows(v)
    dq_kernel[(B * H, triton.cdiv(T, choice.block_t))](
        _descriptor(q, choice.block_t), _descriptor(k, choice.block_s), _descriptor(v, choice.block_s),
        _descriptor(do, choice.block_t), k_rows, v_rows, dq, total, delta, mass if spans.sinks else total,
        spans.bounds, spans.row_blocks, *spans.lists, *factors, T, S, H, HK, spans.row_blocks.shape[1], spans.K,
        *k_rows.stride()[:3], *v_rows.stride()[:3], *dq.stride()[:3], total.numel(),
        **_meta(choice, D, N, spans.code, softcap, q.dtype),
    )  # fmt: skip


def _dkdv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, total: Tensor, delta: Tensor,
    *, N: int, spans: _Spans, factors: tuple[float, float, float], softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    plain = N <= 2 and spans.code == 0 and not softcap
    choice = tiles.tile("dkdv", _capability(q.device), D, q.element_size(), plain)
    key_tiles = triton.cdiv(S, choice.block_s)
    parts = min(H // HK, max(1, triton.cdiv(ENOUGH_PROGRAMS, key_tiles * HK * B)))
    heads = triton.cdiv(H // HK, parts)
    parts = triton.cdiv(H // HK, heads)
    shape = (parts, B, S, HK, D)
    dtype = k.dtype if parts == 1 else torch.float32
    dk, dv = (torch.empty(shape, dtype=dtype, device=k.device).transpose(2, 3) for _ in "kv")
    v_rows = _rows(v)
    dkdv_kernel[(key_tiles, HK * parts, B)](
        _descriptor(q, choice.block_t), _descriptor(k, choice.block_s), _descriptor(v, choice.block_s),
        _descriptor(do, choice.block_t),
        v_rows, dk, dv, total, delta, spans.bounds, spans.row_blocks, spans.key_blocks, spans.lists[0],
        spans.listed(k.shape[1], S),
        *factors, T, S, H, HK, spans.row_blocks.shape[1], spans.key_blocks.shape[1], heads,
        *v_rows.stride()[:3], *dk.stride()[:4],
        HAS_KEPT=spans.has_kept, **_meta(choice, D, N, spans.code, softcap, q.dtype),
    )  # fmt: skip
    if parts == 1:
        return dk[0], dv[0]
    # a fixed order of additions: the sum over the query heads of a key head is deterministic
    return dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


class _Spans:
    """The spans of one call as the kernels take them; absent lists are stood for by a tensor that is never read."""

    def __init__(
        self, bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None,
        kept_count: Tensor | None,
        row_blocks: Tensor, key_blocks: Tensor,
    ) -> None:  # fmt: skip
        self.bounds = bounds.contiguous()
        self.code = sum(rule << (2 * slot) for slot, rule in enumerate(rules))
        self.sinks = [slot for slot, rule in enumerate(rules) if rule == 2]
        self.has_kept = kept is not None and 3 in rules
        self.K = kept.shape[2] if kept is not None else 0
        self.row_blocks = row_blocks.contiguous()
        self.key_blocks = key_blocks.contiguous()
        absent = self.bounds
        self.sink_key = absent if sink_key is None else sink_key.contiguous()
        self.kept = absent if kept is None else kept.contiguous()
        self.kept_count = absent if kept_count is None else kept_count.contiguous()
        self.lists = (self.sink_key, self.kept, self.kept_count)

    def listed(self, HK: int, S: int) -> Tensor:
        """int8 [B, HK, S]: 1 for the keys of the kept list."""
        if not self.has_kept:
            return self.bounds
        B, _, K = self.kept.shape
        real = torch.arange(K, device=self.kept.device) < self.kept_count[..., None]
        real &= (self.kept >= 0) & (self.kept < S)
        out = torch.zeros((B, HK, S + 1), dtype=torch.int8, device=self.kept.device)
        return out.scatter_(2, self.kept.long().masked_fill(~real, S), 1)[..., :S].contiguous()


def _add_to_sink(dv: Tensor, mass: Tensor, do: Tensor, sink_key: Tensor) -> None:
    """dv[b, :, sink_key[b]] += sum over rows and query heads of mass do; nothing for a sink key outside the buffer."""
    B, HK, S, D = dv.shape
    moved = torch.einsum("bht,bhtd->bhd", mass, do.float()).unflatten(1, (HK, -1)).sum(2)
    there = (sink_key >= 0) & (sink_key < S)
    at = sink_key.long().clamp(0, S - 1)[:, None, None, None].expand(B, HK, 1, D)
    moved = moved.masked_fill(~there[:, None, None], 0.0)[:, :, None]
    dv.scatter_(2, at, (dv.gather(2, at).float() + moved).to(dv.dtype))


def _factors(scale: float, softcap: float, dtype: torch.dtype) -> tuple[float, float]:
    # what is applied inside the tanh, and what scales the result to the exponent's unit
    unit = 1.0 if _precision(dtype) == "ieee" else LOG2E
    return (scale / softcap, softcap * unit) if softcap else (1.0, scale * unit)


def _meta(choice: tiles.Tile, D: int, N: int, code: int, softcap: float, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "N": N, "RULES": code, "D": D, "SOFTCAP": softcap != 0.0, "PRECISION": _precision(dtype),
        "BLOCK_T": choice.block_t, "BLOCK_S": choice.block_s, "BLOCK_D": tiles.block_d(D),
        "num_warps": choice.num_warps, "num_stages": choice.num_stages,
    }  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    # of products; nothing to choose for bf16 and fp16
    return "ieee" if dtype == torch.float32 else "tf32"


def _rows(x: Tensor) -> Tensor:
    """x [B, H, L, D] as the tensor-memory copies need it: last stride 1, the others and the address multiples of 16
    bytes."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    plain = x.stride(-1) == 1 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    return x if plain and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    x = _rows(x)
    # the stride of a dim of size 1 is never used but must be valid
    strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, tiles.block_d(x.shape[-1])])


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
