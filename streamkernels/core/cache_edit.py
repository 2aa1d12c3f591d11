"""Going back in a cache, and moving its keys: the bodies of those methods of `StreamCache`.

Each function checks all its arguments before it changes anything. `cache` is settled: nothing is traced or captured, no
rows are staged (but in `rollback` and `reset`), and lengths are exact on the host where the method asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lengths import Group
from .rotary import Rotary, apply_rotary
from .segments import blocks
from .shapes import check_int, check_number, refuse
from .slots import stream_index
from .staging import check_role

if TYPE_CHECKING:
    from .cache import StreamCache


@dataclass(eq=False)
class Mark:
    """A point in a cache's stream to roll back to. Made by `StreamCache.mark`; its fields are the cache's business."""

    owner: StreamCache
    arrangement: int
    committed: list[Tensor]
    upper: list[Tensor]
    exact: bool
    # per device the smallest lengths since, once rows were popped
    lowest: list[Tensor] | None = None


def mark(cache: StreamCache) -> Mark:
    groups = cache._lengths.groups
    committed, upper = [g.committed.clone() for g in groups], [g.upper.clone() for g in groups]
    made = Mark(cache, cache._arrangement, committed, upper, cache._lengths.exact)
    cache._marks.add(made)
    return made


def rollback(cache: StreamCache, mark: Mark) -> None:
    if mark.lowest is not None and any(
        bool((low < at).any()) for low, at in zip(mark.lowest, mark.committed, strict=True)
    ):
        raise RuntimeError("rollback: rows before the mark were popped since")
    if cache.bounded:
        cache._lengths.tighten()
        _check_history(cache, "rollback", "mark", [at.cpu().long() for at in mark.committed])
    cache.discard()
    if cache.bounded:
        cache._lose()
    for group, committed, upper in zip(cache._lengths.groups, mark.committed, mark.upper, strict=True):
        group.committed.copy_(committed)
        group.upper.copy_(upper)
    cache._lengths.exact = mark.exact
    cache._lengths.measure()
    _note_low(cache)


def pop(cache: StreamCache, counts: list[int], role: int) -> None:
    n = torch.tensor(counts)
    after = [g.upper.clone() for g in cache._lengths.groups]
    for group, lengths in zip(cache._lengths.groups, after, strict=True):
        lengths[..., role] -= n
        if bool((lengths < 0).any()):
            place, b, _ = (lengths < 0).nonzero()[0].tolist()
            had = int(group.upper[place, b, role])
            refuse("pop", "n", f"at most the {had} rows of session {b} in layer {group.layers[place]}", counts[b])
    if cache.bounded:
        _check_history(cache, "pop", "n", after)
        cache._lose()
    for group, lengths in zip(cache._lengths.groups, after, strict=True):
        group.committed[..., role].sub_(n.to(torch.int32).to(group.device, non_blocking=True))
        group.upper.copy_(lengths)
    cache._lengths.measure()
    _note_low(cache)


def _check_history(cache: StreamCache, op: str, argument: str, after: list[Tensor]) -> None:
    """Refuse lengths `after`, int64 [Ld, B, 2] per group, if a ring does not hold the window of the next row then."""
    # what the ring has lost, staged rows included
    seen = cache._lengths.clone()
    seen.lose(cache._rings(), cache._step.rows)
    for group, new in zip(seen.groups, after, strict=True):
        oldest = group.oldest.cpu().long()
        for segment, window in enumerate(cache.windows):
            if window is None:
                continue
            then, held = new[..., segment], oldest[..., segment]
            lost = (then != group.upper[..., segment]) & (held > (then + 1 - window).clamp(min=cache.sinks))
            if bool(lost.any()):
                place, b = lost.nonzero()[0].tolist()
                name, layer = ("source", "target")[segment], group.layers[place]
                refuse(
                    op,
                    argument,
                    f"a {name} length whose window of {window} keys the ring holds (from {int(held[place, b])} on)",
                    f"length {int(then[place, b])} for session {b} in layer {layer}",
                )


def _note_low(cache: StreamCache) -> None:
    # the lengths fell: a later rollback must not raise them again above what is still there
    for mark in cache._marks:
        if mark.arrangement == cache._arrangement:
            lowest = mark.committed if mark.lowest is None else mark.lowest
            now = [g.committed for g in cache._lengths.groups]
            mark.lowest = [torch.minimum(low, n) for low, n in zip(lowest, now, strict=True)]


def reset(cache: StreamCache, row: int | None) -> None:
    rows = slice(None) if row is None else slice(row, row + 1)
    for group in cache._lengths.groups:
        for state in (group.committed, group.upper, group.oldest):
            state[:, rows] = 0
        group.anchored[:, rows] = -1
        if row is None:
            group.status.zero_()
    if row is None:
        cache._step.clear()
        cache._lengths.exact, cache._lost = True, False
    cache._lengths.measure()


def evict(
    cache: StreamCache, begin: int | Sequence[int], end: int | Sequence[int], role: int, layer: int | None
) -> None:
    role, layers = _endless(cache, "evict", role), _layers(cache, "evict", layer)
    begins, ends = per_session(cache, "evict", "begin", begin), per_session(cache, "evict", "end", end)
    longest = max(cache._lengths.longest[i][role] for i in layers)
    ranges = list(zip(begins, ends, strict=True))
    for first, last in ranges:
        check_int("evict", "end", last, minimum=first, maximum=max(longest, first))
    # one move for all sessions, or one for each
    rows = [slice(None)] if len(set(ranges)) == 1 else [slice(b, b + 1) for b in range(cache.batch)]
    for i in layers:
        for row, (first, last) in zip(rows, ranges, strict=False):
            cache._segments.close_gap(i, role, row, first, last, cache._lengths.longest[i][role])
    for group, places in cache._lengths.of(layers):
        for state in (group.committed, group.upper):
            low, high = (torch.tensor(x, dtype=state.dtype, device=state.device) for x in (begins, ends))
            length = state[places, :, role]
            state[places, :, role] = length - torch.minimum(length, high) + torch.minimum(length, low)
    cache._lengths.measure()


def keep(
    cache: StreamCache, index: Tensor | Sequence[int], count: Tensor | int | None, role: int, layer: int | None
) -> None:
    role, layers, B = _endless(cache, "keep", role), _layers(cache, "keep", layer), cache.batch
    if not isinstance(index, Tensor):
        index = torch.tensor(list(index), dtype=torch.int64)
    if index.dtype not in (torch.int32, torch.int64):
        refuse("keep", "index", "int32 or int64", index, TypeError)
    if index.dim() not in (1, 2) or (index.dim() == 2 and index.shape[0] != B):
        refuse("keep", "index", f"shape [K] or [{B}, K]", index)
    index = index.expand(B, index.shape[-1])
    K = index.shape[1]
    if not isinstance(count, Tensor):
        count = torch.full((B,), check_int("keep", "count", K if count is None else count, maximum=K))
    elif tuple(count.shape) != (B,) or count.dtype not in (torch.int32, torch.int64):
        refuse("keep", "count", f"an int, or int32 or int64 [{B}]", count)
    on_host = count.device.type == "cpu"
    if on_host and index.device.type == "cpu":
        if not cache._lengths.exact:
            cache._lengths.tighten()
        _check_kept(cache, index, count, role, layers)
    room = min(cache._segments.capacity(layer, role) for layer in layers)
    if room < K:
        refuse("keep", "index", f"at most {room} entries, the slots of the segment", f"{K} entries")
    for layer in layers:
        cache._segments.gather(layer, role, index.to(cache.form.devices[layer], torch.int64))
    for group, places in cache._lengths.of(layers):
        group.committed[places, :, role] = count.to(group.device, torch.int32)
        group.upper[places, :, role] = count.long() if on_host else K
    cache._lengths.exact = cache._lengths.exact and on_host
    cache._lengths.measure()


def _check_kept(cache: StreamCache, index: Tensor, count: Tensor, role: int, layers: Sequence[int]) -> None:
    """Refuse lists on the host that do not ascend, or that name a key which a session does not hold in every layer."""
    K = index.shape[1]
    if bool(((count < 0) | (count > K)).any()):
        refuse("keep", "count", f"counts in [0, {K}]", str(count.tolist()))
    listed = torch.arange(K) < count[:, None]
    if bool((listed[:, 1:] & (index[:, 1:] <= index[:, :-1])).any()):
        refuse("keep", "index", "ascending and unique indices", "indices that are not")
    lengths = torch.stack([cache._lengths.bound(layer)[:, role] for layer in layers]).amin(dim=0)
    bad = listed & ((index < 0) | (index >= lengths[:, None]))
    if bool(bad.any()):
        b, j = bad.nonzero()[0].tolist()
        refuse("keep", "index", f"indices in [0, {int(lengths[b])}) for session {b}", int(index[b, j]))


def reanchor(cache: StreamCache, delta: float | Sequence[float] | Tensor, role: int, begin: int | None) -> None:
    B, window = cache.batch, cache.windows[check_role("reanchor", role)]
    first = (0 if window is None else cache.sinks) if begin is None else check_int("reanchor", "begin", begin)
    rotaries = [rotary for rotary in cache.form.rotaries if rotary is not None]
    if len(rotaries) < cache.layers:
        refuse("reanchor", "rotary", "a Rotary for every layer, given when the cache is made", None)
    axes = all(rotary.sections is not None for rotary in rotaries)
    if isinstance(delta, (int, float)):
        shift = torch.full((B,), float(check_number("reanchor", "delta", delta)), dtype=torch.float64)
    else:
        shift = torch.as_tensor(delta).to("cpu", torch.float64)
    if tuple(shift.shape) != (B,) and not (axes and tuple(shift.shape) == (3, B)):
        refuse("reanchor", "delta", f"a number or [{B}] numbers" + (f", or [3, {B}]" if axes else ""), shift)
    if not bool(shift.isfinite().all()):
        refuse("reanchor", "delta", "finite numbers", str(shift.tolist()))
    moving = (shift != 0).reshape(-1, B).any(dim=0)
    for group in cache._lengths.groups if window is not None else ():
        new, before = group.upper[..., role] - group.anchored[..., role], group.anchored[..., role] >= 0
        early = moving & before & (new < (window or 0))
        if bool(early.any()):
            place, b = early.nonzero()[0].tolist()
            got = int(new[place, b])
            raise RuntimeError(f"reanchor: session {b} has {got} new tokens since the last move, {window} are needed")
    for layer, rotary in enumerate(rotaries):
        _rotate(cache, layer, role, rotary, shift, first)
    for group in cache._lengths.groups:
        group.anchored[..., role] = torch.where(moving, group.upper[..., role], group.anchored[..., role])


def _rotate(cache: StreamCache, layer: int, role: int, rotary: Rotary, shift: Tensor, first: int) -> None:
    k, device = cache._segments.pairs[layer][role][0], cache.form.devices[layer]
    capacity, bounded = k.shape[2], cache.windows[role] is not None
    # [B, 1, rotary_dim / 2]; a session whose shift is 0 keeps its keys, bit for bit
    cos, sin = rotary.reanchor_cos_sin(shift, dtype=torch.float64 if k.dtype == torch.float64 else torch.float32)
    cos, sin = cos.to(device), sin.to(device)
    total = cache._lengths.at(layer)[:, role, None]
    for part in blocks(0, min(capacity, cache._lengths.longest[layer][role])):
        held = torch.arange(part.start, part.stop, device=device)[None]
        moves = stream_index(held, total, capacity, cache.sinks, bounded) >= first
        turned = apply_rotary(k[:, :, part], cos, sin, rotary.interleaved)
        k[:, :, part] = torch.where(moves[:, None, :, None], turned, k[:, :, part])


def take(cache: StreamCache, op: str, rows: Sequence[int] | Tensor, *, fresh: bool) -> None:
    values = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    if not isinstance(values, list) or not values or (not fresh and len(values) != cache.batch):
        refuse(op, "rows", "at least one row" if fresh else f"{cache.batch} rows, one per session", f"{values}")
    host = torch.tensor([check_int(op, "rows", row, maximum=cache.batch - 1) for row in values])
    for layer, device in enumerate(cache.form.devices):
        for segment in (0, 1):
            used = min(cache._lengths.longest[layer][segment], cache._segments.capacity(layer, segment))
            cache._segments.take(layer, segment, host.to(device), used, fresh=fresh)
    with torch.inference_mode(False):
        for group in cache._lengths.groups:
            _take_lengths(group, host, fresh)
    if fresh:
        cache.batch = len(values)
        cache.form = cache._segments.form = replace(cache.form, batch=cache.batch)
    cache._lengths.measure()


def _take_lengths(group: Group, rows: Tensor, fresh: bool) -> None:
    for name in ("committed", "oldest", "upper", "anchored"):
        state = getattr(group, name)
        taken = state.index_select(1, rows.to(state.device))
        if fresh:
            setattr(group, name, taken)
        else:
            state.copy_(taken)


def fork(cache: StreamCache) -> StreamCache:
    twin = object.__new__(type(cache))
    with torch.inference_mode(False):
        twin._start(cache.form, cache._lengths.clone(), cache._segments.copy(cache._lengths.longest))
    twin.epoch, twin._lost = cache.epoch, cache._lost
    return twin


def per_session(cache: StreamCache, op: str, name: str, x: int | Sequence[int]) -> list[int]:
    """One count >= 0 per session."""
    values = [x] * cache.batch if isinstance(x, int) else list(x)
    if len(values) != cache.batch:
        refuse(op, name, f"an int, or {cache.batch} ints, one per session", f"{len(values)} values")
    return [check_int(op, name, n) for n in values]


def _layers(cache: StreamCache, op: str, layer: int | None) -> Sequence[int]:
    return range(cache.layers) if layer is None else [check_int(op, "layer", layer, maximum=cache.layers - 1)]


def _endless(cache: StreamCache, op: str, role: int) -> int:
    if cache.windows[check_role(op, role)] is not None:
        refuse(op, "role", "a segment without a window", f"{role}, which evicts by itself", NotImplementedError)
    return role
