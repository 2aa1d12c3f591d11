"""Launch span_attention and its backward: allocation of outputs and statistics only, no synchronisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..device.launch import Box, Launch, remembered, signature
from . import tiles
from .backward import dkdv_kernel, dq_kernel, join_parts_kernel, row_statistics_kernel
from .forward import span_attention_kernel

LOG2E = 1.4426950408889634
# key tiles x heads that keep a GPU busy; below, the query heads of a key head are split over programs and summed
# afterwards
ENOUGH_PROGRAMS = 1000
# bytes of keys and values that programs which run at the same time read: half of an H200's L2. There, in a run beside
# other work, a quarter made the backward of 32 heads with keys of their own 18 % slower at 8192 keys, and all heads
# together cost 2 % of a forward at 32768
TOGETHER = 32 << 20
# classes whose rules fit into 32 bits
PACKED = 16


# by the signature of a call
FORWARD: dict[Any, _Forward] = {}
BACKWARD: dict[Any, _Backward] = {}


def span_attention(
    q: Tensor, k: Tensor, v: Tensor,
    bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None, kept_count: Tensor | None,
    key_class: Tensor | None, row_class: Tensor | None, class_rules: Tensor | None, class_sink: Tensor | None,
    sink_logits: Tensor | None, row_blocks: Tensor, key_blocks: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, H, T, D] stored [B, T, H, D], lse fp32 [B, H, T]; the op's raw arguments, already checked."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    o = q.new_empty((B, T, H, D)).transpose(1, 2)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel() == 0 or S == 0:
        return o.zero_(), lse.fill_(-math.inf)
    lists = (sink_key, kept, kept_count, key_class, row_class, class_rules, class_sink)
    tensors = (q, k, v, bounds, row_blocks, *lists, sink_logits)
    key = (q.device, tuple(rules), softcap != 0.0, *signature(*tensors))
    spans = _Spans(bounds, rules, *lists, row_blocks, key_blocks)
    q, k, v = _rows(q), _rows(k), _rows(v)
    plan = remembered(FORWARD, key, lambda: _Forward(q, k, v, spans, sink_logits is not None, softcap))
    with torch.cuda.device_of(q):
        plan.launch(
            plan.q.over(q), plan.k.over(k), plan.v.over(v), k, v,
            o, lse, spans.bounds, spans.row_blocks, *spans.lists, lse if sink_logits is None else sink_logits,
            *_factors(scale, softcap, q.dtype), T, S, H, HK, row_blocks.shape[1], spans.K, *spans.table,
            *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        )  # fmt: skip
    return o, lse


class _Forward:
    """What the forward of calls of one signature has in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spans: _Spans, sink_logits: bool, softcap: float) -> None:
        B, H, T, D = q.shape
        capability = _capability(q.device)
        near = tiles.near_keys(k.shape[2], D, q.element_size()) and spans.plain(softcap)
        choice = tiles.tile("forward", capability, D, q.element_size(), few=near, classes=spans.has_classes)
        columns = tiles.block_d(D)
        self.q = Box(q, choice.block_t, columns)
        self.k, self.v = Box(k, choice.block_s, columns), Box(v, choice.block_s, columns)
        self.launch = Launch(
            span_attention_kernel, _row_grid(q, k, choice.block_t), SINK_LOGITS=sink_logits,
            **_meta(choice, D, spans, softcap, q.dtype, spans.table[1]),
        )  # fmt: skip


def span_attention_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None, kept_count: Tensor | None,
    key_class: Tensor | None, row_class: Tensor | None, class_rules: Tensor | None, class_sink: Tensor | None,
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
    lists = (sink_key, kept, kept_count, key_class, row_class, class_rules, class_sink)
    tensors = (do, dlse, q, k, v, o, lse, bounds, row_blocks, key_blocks, *lists, sink_logits)
    key = (q.device, tuple(rules), softcap != 0.0, *signature(*tensors))
    spans = _Spans(bounds, rules, *lists, row_blocks, key_blocks)
    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    plan = remembered(BACKWARD, key, lambda: _Backward(q, k, v, do, spans, sink_logits is not None, softcap))
    total, delta, share = torch.empty((3, *lse.shape), dtype=torch.float32, device=q.device)
    mass = total.new_empty((len(rules) + 1, *lse.shape)) if spans.sinks else total
    dk, dv = (torch.empty(plan.shape, dtype=plan.dtype, device=q.device).transpose(2, 3) for _ in "kv")
    factors = (*_factors(scale, softcap, q.dtype), scale)
    with torch.cuda.device_of(q):
        plan.statistics(
            o, do, lse, dlse, lse if sink_logits is None else sink_logits, total, delta, share, T, H,
            *o.stride()[:3], *do.stride()[:3], *dlse.stride(),
        )  # fmt: skip
        plan.dq(
            *(box.over(x) for box, x in zip(plan.dq_boxes, (q, k, v, do), strict=True)), k, v, dq, total, delta, mass,
            spans.bounds, spans.row_blocks, *spans.lists, *factors, T, S, H, HK, row_blocks.shape[1], spans.K,
            *spans.table, *k.stride()[:3], *v.stride()[:3], *dq.stride()[:3], total.numel(),
        )  # fmt: skip
        plan.dkdv(
            *(box.over(x) for box, x in zip(plan.dkdv_boxes, (q, k, v, do), strict=True)),
            v, dk, dv, total, delta, spans.bounds, spans.row_blocks, spans.key_blocks, spans.lists[0],
            spans.listed(HK, S), *spans.lists[3:], *factors, T, S, H, HK, row_blocks.shape[1], key_blocks.shape[1],
            plan.heads, *spans.table, *v.stride()[:3], *dk.stride()[:4],
        )  # fmt: skip
        if plan.join is None:
            dk, dv = dk[0], dv[0]
        else:
            parts = (dk, dv)
            dk, dv = (torch.empty((B, S, HK, D), dtype=x.dtype, device=x.device).transpose(1, 2) for x in (k, v))
            plan.join(*parts, dk, dv, dk.numel(), plan.shape[0])
    for slot, key in spans.sinks.items():
        _add_to_sink(dv, mass[slot], do, key)
    if sink_logits is not None:
        dsink = share.sum((0, 2)).to(sink_logits.dtype)
    return dq, dk, dv, dsink


class _Backward:
    """What the backward of calls of one signature has in common: its launches, and how dk and dv are split."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, spans: _Spans, sink_logits: bool, softcap: float
    ) -> None:
        B, H, T, D = q.shape
        HK, S = k.shape[1:3]
        size, capability, columns = q.element_size(), _capability(q.device), tiles.block_d(D)
        self.statistics = Launch(
            row_statistics_kernel, (B * H, triton.cdiv(T, 32)),
            D=D, SINK_LOGITS=sink_logits, PRECISION=_precision(q.dtype), BLOCK_T=32, BLOCK_D=columns, num_warps=4,
        )  # fmt: skip
        plain = spans.plain(softcap)
        classes = spans.has_classes
        choice = tiles.tile("dq", capability, D, size, few=plain and tiles.few_rows(B * H * T), classes=classes)
        self.dq_boxes = self._boxes(choice, columns, q, k, v, do)
        meta = _meta(choice, D, spans, softcap, q.dtype, spans.table[1])
        self.dq = Launch(dq_kernel, _row_grid(q, k, choice.block_t), **meta)
        choice = tiles.tile("dkdv", capability, D, size, plain, classes=classes)
        key_tiles = triton.cdiv(S, choice.block_s)
        parts = min(H // HK, max(1, triton.cdiv(ENOUGH_PROGRAMS, key_tiles * HK * B)))
        self.heads = triton.cdiv(H // HK, parts)
        parts = triton.cdiv(H // HK, self.heads)
        self.shape = (parts, B, S, HK, D)
        self.dtype = k.dtype if parts == 1 else torch.float32
        self.dkdv_boxes = self._boxes(choice, columns, q, k, v, do)
        meta = _meta(choice, D, spans, softcap, q.dtype, spans.table[0])
        self.dkdv = Launch(dkdv_kernel, (key_tiles, HK * parts, B), HAS_KEPT=spans.has_kept, **meta)
        self.join = None
        if parts > 1:
            self.join = Launch(join_parts_kernel, (triton.cdiv(k.numel(), 1024), 2), BLOCK=1024, num_warps=4)

    @staticmethod
    def _boxes(choice: tiles.Tile, columns: int, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Box]:
        blocks = (choice.block_t, choice.block_s, choice.block_s, choice.block_t)
        return [Box(x, block, columns) for x, block in zip((q, k, v, do), blocks, strict=True)]


class _Spans:
    """The spans of one call as the kernels take them; absent lists are stood for by a tensor that is never read."""

    def __init__(
        self, bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None,
        kept_count: Tensor | None, key_class: Tensor | None, row_class: Tensor | None, class_rules: Tensor | None,
        class_sink: Tensor | None, row_blocks: Tensor, key_blocks: Tensor,
    ) -> None:  # fmt: skip
        self.N = bounds.shape[2]
        self.bounds = bounds.contiguous()
        self.code = sum(rule << (2 * slot) for slot, rule in enumerate(rules))
        self.has_kept = kept is not None and 3 in rules
        self.K = kept.shape[2] if kept is not None else 0
        self.row_blocks = row_blocks.contiguous()
        self.key_blocks = key_blocks.contiguous()
        absent = self.bounds
        self.sink_key = absent if sink_key is None else sink_key.contiguous()
        self.kept = absent if kept is None else kept.contiguous()
        self.kept_count = absent if kept_count is None else kept_count.contiguous()
        self.has_classes, self.class_sink = class_rules is not None, class_sink is not None
        classes = (absent if x is None else x.contiguous() for x in (key_class, row_class, class_rules, class_sink))
        self.lists = (self.sink_key, self.kept, self.kept_count, *classes)
        # row classes and key classes of the table
        self.table = (1, 1) if class_rules is None else tuple(class_rules.shape)
        # what lands elsewhere: by the place of its mass, slots first, the sample's key
        self.sinks = {slot: self.sink_key[:, slot] for slot, rule in enumerate(rules) if rule == 2}
        if class_sink is not None:
            self.sinks[self.N] = class_sink

    def plain(self, softcap: float) -> bool:
        """Whether these are the spans of most masks: at most two slots, all ATTEND, no classes and no softcap."""
        return self.N <= 2 and self.code == 0 and not softcap and not self.has_classes

    def listed(self, HK: int, S: int) -> Tensor:
        """int8 [B, HK, S]: 1 for the keys of the kept list."""
        if not self.has_kept:
            return self.bounds
        B, _, K = self.kept.shape
        real = torch.arange(K, device=self.kept.device) < self.kept_count[..., None]
        real &= (self.kept >= 0) & (self.kept < S)
        out = torch.zeros((B, HK, S + 1), dtype=torch.int8, device=self.kept.device)
        return out.scatter_(2, self.kept.long().masked_fill(~real, S), 1)[..., :S].contiguous()


def _row_grid(q: Tensor, k: Tensor, block_t: int) -> tuple[int, int]:
    """(heads that run together * row tiles, groups of such heads): as many key heads as have their keys and values in
    the L2 together, with all their query heads."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    most = max(1, TOGETHER // (2 * S * D * k.element_size()))
    together = max(n for n in range(1, min(most, B * HK) + 1) if B * HK % n == 0) * (H // HK)
    return together * triton.cdiv(T, block_t), B * H // together


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


def _meta(
    choice: tiles.Tile, D: int, spans: _Spans, softcap: float, dtype: torch.dtype, others: int
) -> dict[str, Any]:
    """The kernels' constants; `others`: classes that a row (or a key, for dk and dv) has rules towards."""
    return {
        "N": spans.N, "RULES": spans.code, "D": D, "SOFTCAP": softcap != 0.0, "PRECISION": _precision(dtype),
        "CLASSES": (1 if others <= PACKED else 2) if spans.has_classes else 0, "CLASS_SINK": spans.class_sink,
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


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
