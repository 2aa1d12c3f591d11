"""Launch span_attention and its backward: allocation of outputs and statistics only, no synchronisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..device.launch import Box, Launch, on_device_of, signature
from ..device.memory import Memory, packed, remembered, rows_first
from . import tiles
from .backward import dkdv_kernel, dq_kernel
from .forward import gather_kept_kernel, span_attention_kernel

LOG2E = 1.4426950408889634
# key tiles x heads that keep a GPU busy; below, the query heads of a key head are split over programs, and the last of
# them sums up. Each part is written and read once more in fp32: on an H200 the backward of 28 heads on 4 took 207 us at
# 2048 tokens in 4 parts, 223 in 7 and 252 in 3; at 4096 tokens 622 us in 3 parts, 704 in 4 and 690 in 2
ENOUGH_PROGRAMS = 640
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
    lists = (sink_key, kept, kept_count, key_class, row_class, class_rules, class_sink)
    key = (tuple(rules), scale, softcap, signature(q, k, v, bounds, row_blocks, *lists, sink_logits))
    plan = FORWARD.get(key)
    if plan is None:
        B, H, T, D = q.shape
        if q.numel() == 0 or k.shape[2] == 0:
            o = q.new_zeros((B, T, H, D)).transpose(1, 2)
            return o, torch.full((B, H, T), -math.inf, dtype=torch.float32, device=q.device)
        spans = _Spans(bounds, rules, *lists, row_blocks, key_blocks)
        plan = remembered(FORWARD, key, lambda: _Forward(q, k, v, spans, sink_logits is not None, scale, softcap))
    if not plan.as_given:
        q, k, v = (_rows(x) for x in (q, k, v))
    if not plan.solid:
        bounds, row_blocks, *lists = (x if x is None else x.contiguous() for x in (bounds, row_blocks, *lists))
    empty = plan.memory.here()
    o, lse = empty(*plan.o, q.dtype), empty(*plan.lse, torch.float32)
    with on_device_of(q):
        gathered = (None, None) if plan.gather is None else plan.gathered(k, v, *lists[1:3])
        plan.launch(
            q, k, v, k, v, *gathered, o, lse, bounds, row_blocks, *[bounds if x is None else x for x in lists],
            lse if sink_logits is None else sink_logits.contiguous(),
        )  # fmt: skip
    return o, lse


class _Plan:
    """What calls of one signature have in common: whether their rows are copied first (not `as_given`), and whether
    their spans are (not `solid`)."""

    def __init__(self, spans: _Spans, *given: Tensor) -> None:
        self.as_given = all(_rows(x) is x for x in given)
        self.solid = spans.solid
        self.memory = Memory(given[0].device)


class _Forward(_Plan):
    """A forward's launches, and its outputs' sizes and strides."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, spans: _Spans, sink_logits: bool, scale: float, softcap: float
    ) -> None:
        super().__init__(spans, q, k, v)
        q, k, v = (_rows(x) for x in (q, k, v))
        B, H, T, D = q.shape
        HK, S = k.shape[1:3]
        self.o, self.lse = rows_first(B, H, T, D), packed(B, H, T)
        capability = _capability(q.device)
        long = tiles.long_walks(B * H * T, S)
        choice = tiles.tile(
            "forward", capability, D, q.element_size(), spans.plain(softcap), spans.has_classes, long
        )  # fmt: skip
        columns = tiles.block_d(D)
        boxes = [Box(q, choice.block_t, columns), *(Box(x, choice.block_s, columns) for x in (k, v))]
        self.gather = None
        if spans.has_kept and spans.K and not spans.has_classes and T >= GATHER_ROWS:
            self.gather = Launch(
                gather_kept_kernel, (triton.cdiv(spans.K, 32), B * HK),
                (S, spans.K, HK, *k.stride()[:3], *v.stride()[:3]), D=D, BLOCK_K=32, BLOCK_D=columns, num_warps=4,
            )  # fmt: skip
            self.list_shape = (B, HK, spans.K, D)
            listed = k.new_empty(self.list_shape)
            boxes += [None, None, *(Box(listed, choice.block_s, columns) for _ in "kv")]
        self.launch = Launch(
            span_attention_kernel, _row_grid(B, H, T, k, choice.block_t, TOGETHER // 2 if long else TOGETHER),
            (
                *_factors(scale, softcap, q.dtype), T, S, H, HK, spans.row_blocks, spans.K, *spans.table,
                *k.stride()[:3], *v.stride()[:3], *self.o[1][:3],
            ),
            tuple(boxes), SINK_LOGITS=sink_logits, **_meta(choice, D, spans, softcap, q.dtype, spans.table[1]),
        )  # fmt: skip

    def gathered(self, k: Tensor, v: Tensor, kept: Tensor | None, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of k and v that the kept list names, side by side: most rows of q see all of them."""
        kept_k, kept_v = k.new_empty(self.list_shape), k.new_empty(self.list_shape)
        self.gather(k, v, kept, count, kept_k, kept_v)  # type: ignore[misc]
        return kept_k, kept_v


def span_attention_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None, kept_count: Tensor | None,
    key_class: Tensor | None, row_class: Tensor | None, class_rules: Tensor | None, class_sink: Tensor | None,
    sink_logits: Tensor | None, row_blocks: Tensor, key_blocks: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv as q, k, v (stored rows first), d sink_logits [H] (None without); dlse None: zeros."""
    lists = (sink_key, kept, kept_count, key_class, row_class, class_rules, class_sink)
    tensors = (do, dlse, q, k, v, o, lse, bounds, row_blocks, key_blocks, *lists, sink_logits)
    key = (tuple(rules), scale, softcap, signature(*tensors))
    plan = BACKWARD.get(key)
    if plan is None:
        spans = _Spans(bounds, rules, *lists, row_blocks, key_blocks)
        if q.numel() == 0 or k.numel() == 0:
            zeros = (x.new_empty_strided(*rows_first(*x.shape)).zero_() for x in (q, k, v))
            return (*zeros, None if sink_logits is None else torch.zeros_like(sink_logits))
        plan = remembered(
            BACKWARD, key,
            lambda: _Backward(q, k, v, o, do, dlse, spans, sink_logits is not None, scale, softcap),
        )  # fmt: skip
    if not plan.as_given:
        q, k, v, do = (_rows(x) for x in (q, k, v, do))
    if not plan.solid:
        given = (bounds, row_blocks, key_blocks, *lists)
        bounds, row_blocks, key_blocks, *lists = (x if x is None else x.contiguous() for x in given)
    empty, dtype, fp32 = plan.memory.here(), q.dtype, torch.float32
    dq, dk, dv = empty(*plan.as_q, dtype), empty(*plan.as_k, dtype), empty(*plan.as_k, dtype)
    work = empty(*plan.work, fp32)
    share = work if sink_logits is None else torch.empty_like(lse)
    mass = empty(*plan.masses, fp32) if plan.masses else work
    logits = lse if sink_logits is None else sink_logits.contiguous()
    seen = [bounds if x is None else x for x in lists]
    with on_device_of(q):
        rows = (o, lse, lse if dlse is None else dlse)
        plan.dq(q, k, v, do, k, v, *rows, dq, work, share, mass, bounds, row_blocks, *seen, logits)
        seen[1:3] = [seen[1] if plan.listed is None else _listed(*plan.listed, *seen[1:3])]
        plan.dkdv(q, k, v, do, v, dk, dv, work, bounds, row_blocks, key_blocks, *seen)
    for slot, at in plan.sinks:
        _add_to_sink(dv, mass[slot], do, class_sink if at is None else sink_key[:, at])  # type: ignore[index,arg-type]
    return dq, dk, dv, None if sink_logits is None else share.sum((0, 2)).to(sink_logits.dtype)


class _Backward(_Plan):
    """A backward's launches, how dk and dv are split, and the sizes and strides of what it makes."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, dlse: Tensor | None, spans: _Spans,
        sink_logits: bool, scale: float, softcap: float,
    ) -> None:  # fmt: skip
        super().__init__(spans, q, k, v, do)
        q, k, v, do = (_rows(x) for x in (q, k, v, do))
        B, H, T, D = q.shape
        HK, S = k.shape[1:3]
        size, capability, columns = q.element_size(), _capability(q.device), tiles.block_d(D)
        self.as_q, self.as_k = rows_first(B, H, T, D), rows_first(B, HK, S, D)
        self.masses = packed(spans.N + 1, B, H, T) if spans.sinks else None
        self.sinks = spans.sinks
        self.listed = (B, HK, S) if spans.has_kept else None
        # dk and dv: the query heads of a key head in parts
        choice = tiles.tile("dkdv", capability, D, size, spans.plain(softcap), classes=spans.has_classes)
        key_tiles = triton.cdiv(S, choice.block_s)
        parts = min(H // HK, max(1, triton.cdiv(ENOUGH_PROGRAMS, key_tiles * HK * B)))
        each = triton.cdiv(H // HK, parts)
        parts = triton.cdiv(H // HK, each)
        heads = B * HK * parts
        together = _together(heads, 2 * T * D * size, TOGETHER // 2 if heads >= MANY_HEADS else TOGETHER)
        # beside the outputs: two numbers of each row; of each tile that is joined a count, and its sums
        padded = 64 * triton.cdiv(T, 64)
        rows, joins = 2 * B * H * padded, B * HK * key_tiles if parts > 1 else 0
        sums = joins * parts * 2 * choice.block_s * columns
        joins = 64 * triton.cdiv(joins, 64)
        self.work = packed(rows + joins + sums)
        factors = (*_factors(scale, softcap, q.dtype), scale)
        lengths = (T, S, H, HK, spans.row_blocks)
        self.dkdv = Launch(
            dkdv_kernel, (together * key_tiles, heads // together),
            (
                *factors, *lengths, spans.key_blocks, each, *spans.table, *v.stride()[:3], *self.as_k[1][:3],
                rows, joins,
            ),
            self._boxes(choice, columns, q, k, v, do), HAS_KEPT=spans.has_kept, JOIN=parts > 1,
            **_meta(choice, D, spans, softcap, q.dtype, spans.table[0]),
        )  # fmt: skip
        choice = tiles.tile("dq", capability, D, size, classes=spans.has_classes)
        self.dq = Launch(
            dq_kernel, _row_grid(B, H, padded, k, choice.block_t, TOGETHER),
            (
                *factors, *lengths, spans.K, *spans.table, *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
                *((0, 0, 0) if dlse is None else dlse.stride()), *self.as_q[1][:3], B * H * T, rows, joins,
                int(dlse is not None),
            ),
            self._boxes(choice, columns, q, k, v, do), SINK_LOGITS=sink_logits,
            **_meta(choice, D, spans, softcap, q.dtype, spans.table[1]),
        )  # fmt: skip

    @staticmethod
    def _boxes(choice: tiles.Tile, columns: int, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Box, ...]:
        blocks = (choice.block_t, choice.block_s, choice.block_s, choice.block_t)
        return tuple(Box(x, block, columns) for x, block in zip((q, k, v, do), blocks, strict=True))


class _Spans:
    """What the spans of calls of one signature have in common."""

    def __init__(
        self, bounds: Tensor, rules: Sequence[int], sink_key: Tensor | None, kept: Tensor | None,
        kept_count: Tensor | None, key_class: Tensor | None, row_class: Tensor | None, class_rules: Tensor | None,
        class_sink: Tensor | None, row_blocks: Tensor, key_blocks: Tensor,
    ) -> None:  # fmt: skip
        given = (bounds, row_blocks, key_blocks, sink_key, kept, kept_count, key_class, row_class, class_rules)
        self.solid = all(x is None or x.is_contiguous() for x in (*given, class_sink))
        self.N = bounds.shape[2]
        self.row_blocks, self.key_blocks = row_blocks.shape[1], key_blocks.shape[1]
        self.code = sum(rule << (2 * slot) for slot, rule in enumerate(rules))
        self.has_kept = kept is not None and 3 in rules
        self.K = kept.shape[2] if kept is not None else 0
        self.has_classes, self.class_sink = class_rules is not None, class_sink is not None
        # row classes and key classes of the table
        self.table = (1, 1) if class_rules is None else tuple(class_rules.shape)
        # what lands elsewhere: the place of its mass, slots first, and the slot whose sink key it lands on (None: the
        # sample's)
        self.sinks: list[tuple[int, int | None]] = [(slot, slot) for slot, rule in enumerate(rules) if rule == 2]
        if self.class_sink:
            self.sinks.append((self.N, None))

    def plain(self, softcap: float) -> bool:
        """Whether these are the spans of most masks: at most two slots, all ATTEND, no classes and no softcap."""
        return self.N <= 2 and self.code == 0 and not softcap and not self.has_classes


def _listed(B: int, HK: int, S: int, kept: Tensor, count: Tensor) -> Tensor:
    """int8 [B, HK, S]: 1 for the keys of the kept list."""
    real = torch.arange(kept.shape[2], device=kept.device) < count[..., None]
    real &= (kept >= 0) & (kept < S)
    out = torch.zeros((B, HK, S + 1), dtype=torch.int8, device=kept.device)
    return out.scatter_(2, kept.long().masked_fill(~real, S), 1)[..., :S].contiguous()


def _row_grid(B: int, H: int, rows: int, k: Tensor, block_t: int, room: int) -> tuple[int, int]:
    """(heads that run together * row tiles, groups of such heads): as many key heads as have their keys and values in
    `room` bytes together, with all their query heads."""
    HK, S, D = k.shape[1:]
    together = _together(B * HK, 2 * S * D * k.element_size(), room) * (H // HK)
    return together * triton.cdiv(rows, block_t), B * H // together


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
