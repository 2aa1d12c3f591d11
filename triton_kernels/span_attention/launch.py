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
from .forward import gather_kept_kernel, span_attention_kernel

LOG2E = 1.4426950408889634
# key tiles x heads that keep a GPU busy; below, the query heads of a key head are split over programs and summed
# afterwards
ENOUGH_PROGRAMS = 1000
# bytes that programs which run at the same time read: half of an H200's L2. There dk and dv of 28 heads on 4 key heads
# took 5.5 ms at 16384 tokens and 21.6 at 32768, with a quarter 5.9 and 22.2. A quarter was better for long forwards
# (11.67 ms instead of 11.78 at 32768) and for dk and dv of 32 heads with keys of their own (1539 us instead of 1566)
TOGETHER = 32 << 20
MANY_HEADS = 16
# from so many rows on the listed keys of KEPT slots are copied side by side first: a tenth of 16384 keys of 32 heads
# under 512 rows took an H200 52 us, gathered tile by tile 78
GATHER_ROWS = 64
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
    plan = remembered(FORWARD, key, lambda: _Forward(q, k, v, spans, sink_logits is not None, softcap))
    q, k, v = plan.rows(q, k, v)
    with torch.cuda.device_of(q):
        plan.launch(
            plan.q.over(q), plan.k.over(k), plan.v.over(v), k, v, *plan.gathered(k, v, spans, HK),
            o, lse, spans.bounds, spans.row_blocks, *spans.lists, lse if sink_logits is None else sink_logits,
            *_factors(scale, softcap, q.dtype), T, S, H, HK, row_blocks.shape[1], spans.K, *spans.table,
            *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        )  # fmt: skip
    return o, lse


class _Plan:
    """What calls of one signature have in common: whether their rows are copied first."""

    def __init__(self, *given: Tensor) -> None:
        self.as_given = all(_rows(x) is x for x in given)

    def rows(self, *given: Tensor) -> tuple[Tensor, ...]:
        return given if self.as_given else tuple(_rows(x) for x in given)


class _Forward(_Plan):
    """A forward's launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spans: _Spans, sink_logits: bool, softcap: float) -> None:
        super().__init__(q, k, v)
        q, k, v = self.rows(q, k, v)
        B, H, T, D = q.shape
        capability = _capability(q.device)
        long = tiles.long_walks(B * H * T, k.shape[2])
        choice = tiles.tile(
            "forward", capability, D, q.element_size(), spans.plain(softcap), spans.has_classes, long
        )  # fmt: skip
        columns = tiles.block_d(D)
        self.q = Box(q, choice.block_t, columns)
        self.k, self.v = Box(k, choice.block_s, columns), Box(v, choice.block_s, columns)
        self.gather = None
        if spans.has_kept and spans.K and not spans.has_classes and T >= GATHER_ROWS:
            self.gather = Launch(
                gather_kept_kernel, (triton.cdiv(spans.K, 32), B * k.shape[1]), D=D, BLOCK_K=32, BLOCK_D=columns,
                num_warps=4,
            )  # fmt: skip
            self.list_shape = (B, k.shape[1], spans.K, D)
            self.list = Box(k.new_empty(self.list_shape), choice.block_s, columns)
        self.launch = Launch(
            span_attention_kernel, _row_grid(q, k, choice.block_t, TOGETHER // 2 if long else TOGETHER),
            SINK_LOGITS=sink_logits,
            **_meta(choice, D, spans, softcap, q.dtype, spans.table[1]),
        )  # fmt: skip

    def gathered(self, k: Tensor, v: Tensor, spans: _Spans, HK: int) -> tuple[Any, Any]:
        """The rows of k and v that the kept list names, side by side: most rows of q see all of them."""
        if self.gather is None:
            return None, None
        kept_k, kept_v = k.new_empty((2, *self.list_shape))
        self.gather(
            k, v, spans.kept, spans.kept_count, kept_k, kept_v, k.shape[2], spans.K, HK,
            *k.stride()[:3], *v.stride()[:3],
        )  # fmt: skip
        return self.list.over(kept_k), self.list.over(kept_v)


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
    plan = remembered(BACKWARD, key, lambda: _Backward(q, k, v, do, spans, sink_logits is not None, softcap))
    q, k, v, do = plan.rows(q, k, v, do)
    total, delta = torch.empty((2, B, H, 64 * triton.cdiv(T, 64)), dtype=torch.float32, device=q.device)
    share = total if sink_logits is None else torch.empty_like(lse)
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
            *spans.table, *k.stride()[:3], *v.stride()[:3], *dq.stride()[:3], lse.numel(),
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


class _Backward(_Plan):
    """A backward's launches, and how dk and dv are split."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, spans: _Spans, sink_logits: bool, softcap: float
    ) -> None:
        super().__init__(q, k, v, do)
        q, k, v, do = self.rows(q, k, v, do)
        B, H, T, D = q.shape
        HK, S = k.shape[1:3]
        size, capability, columns = q.element_size(), _capability(q.device), tiles.block_d(D)
        self.statistics = Launch(
            row_statistics_kernel, (B * H, 2 * triton.cdiv(T, 64)),
            D=D, SINK_LOGITS=sink_logits, PRECISION=_precision(q.dtype), BLOCK_T=32, BLOCK_D=columns, num_warps=4,
        )  # fmt: skip
        plain = spans.plain(softcap)
        classes = spans.has_classes
        choice = tiles.tile("dq", capability, D, size, classes=classes)
        self.dq_boxes = self._boxes(choice, columns, q, k, v, do)
        meta = _meta(choice, D, spans, softcap, q.dtype, spans.table[1])
        self.dq = Launch(dq_kernel, _row_grid(q, k, choice.block_t, TOGETHER), **meta)
        choice = tiles.tile("dkdv", capability, D, size, plain, classes=classes)
        key_tiles = triton.cdiv(S, choice.block_s)
        parts = min(H // HK, max(1, triton.cdiv(ENOUGH_PROGRAMS, key_tiles * HK * B)))
        self.heads = triton.cdiv(H // HK, parts)
        parts = triton.cdiv(H // HK, self.heads)
        self.shape = (parts, B, S, HK, D)
        self.dtype = k.dtype if parts == 1 else torch.float32
        self.dkdv_boxes = self._boxes(choice, columns, q, k, v, do)
        meta = _meta(choice, D, spans, softcap, q.dtype, spans.table[0])
        heads = B * HK * parts
        together = _together(heads, 2 * T * D * size, TOGETHER // 2 if heads >= MANY_HEADS else TOGETHER)
        self.dkdv = Launch(dkdv_kernel, (together * key_tiles, heads // together), HAS_KEPT=spans.has_kept, **meta)
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


def _row_grid(q: Tensor, k: Tensor, block_t: int, room: int) -> tuple[int, int]:
    """(heads that run together * row tiles, groups of such heads): as many key heads as have their keys and values in
    `room` bytes together, with all their query heads."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    together = _together(B * HK, 2 * S * D * k.element_size(), room) * (H // HK)
    return together * triton.cdiv(T, block_t), B * H // together


def _together(heads: int, size: int, room: int) -> int:
    """How many of `heads` run together that read `size` bytes each: a divisor."""
    most = max(1, room // size)
    return max(n for n in range(1, min(most, heads) + 1) if heads % n == 0)


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


def _meta(choice: tiles.Tile, D: int, spans: _Spans, softcap: float, dtype: torch.dtype, others: int) -> dict[str, Any]:
    """The kernels' constants; `others`: classes that a row (or a key, for dk and dv) has rules towards."""
    return {
        "N": spans.N, "RULES": spans.code, "D": D, "SOFTCAP": softcap != 0.0, "PRECISION": _precision(dtype),
        "CLASSES": (1 if others <= PACKED else 2) if spans.has_classes else 0, "CLASS_SINK": spans.class_sink,
        "BLOCK_T": choice.block_t, "BLOCK_S": choice.block_s, "BLOCK_D": tiles.block_d(D),
        **choice.options,
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
