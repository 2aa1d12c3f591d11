"""Whether rows fit a cache, and making room for them: decided on the host's bounds, read from the device if need be.

The bodies of those methods of `StreamCache`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .cache_edit import per_session
from .cache_form import UNLIMITED
from .segments import Pair
from .shapes import check_int, refuse
from .staging import SOURCE, TARGET, Rows, Staged, rows_of_one_role, watched

if TYPE_CHECKING:
    from .cache import StreamCache


class Ready(NamedTuple):
    """What the `Staged` of a layer that keeps every key have in common while it keeps these buffers and lengths."""

    source: Pair
    target: Pair
    committed: Tensor
    capacities: tuple[int, int]
    staged: tuple[Staged, Staged]  # for rows that are all of one role


def stage(cache: StreamCache, layer: int, role: Tensor | int, T: int) -> Staged:
    ready = not cache.bounded and not torch.compiler.is_compiling()
    if ready and (again := _stage_again(cache, layer, role, T)) is not None:
        return again
    device = cache.form.devices[cache._layer("stage", layer)]
    check_int("stage", "T", T)
    if cache.bounded and T > cache.max_chunk:
        refuse("stage", "T", f"at most max_chunk = {cache.max_chunk} rows in bounded mode", T)
    rows = cache._step.describe(role, T, cache.batch, device)
    if cache._blind():
        cache._step.unchecked = True
    else:
        rows, capacities = fit(cache, "stage", layer, rows)
        cache._step.learn(device, rows)
        grow(cache, layer, capacities)
    before = cache._step.rows[layer]
    if cache.bounded and before is not None:
        cache._lose([before if i == layer else None for i in range(cache.layers)])
    cache._step.rows[layer] = rows
    staged = Staged(
        *cache._segments.pairs[layer][SOURCE],
        *cache._segments.pairs[layer][TARGET],
        length=cache._lengths.at(layer),
        status=cache._lengths.status(layer),
        role=rows.role if isinstance(rows.role, Tensor) else None,
        segment=rows.role if isinstance(rows.role, int) else SOURCE,
        bounded=cache.bounded,
        sinks=cache.sinks,
        windows=cache.windows,
        oldest=cache._lengths.oldest(layer) if cache.bounded and (cache._blind() or cache._lost) else None,
    )
    # a mode may have put something else in the place of tensors
    if ready and not watched():
        _remember(cache, layer, staged)
    return staged


def _remember(cache: StreamCache, layer: int, staged: Staged) -> None:
    source, target = cache._segments.pairs[layer]
    each = (staged._replace(role=None, segment=SOURCE), staged._replace(role=None, segment=TARGET))
    capacities = (source[0].shape[2], target[0].shape[2])
    cache._ready[layer] = Ready(source, target, cache._lengths.of_layer(layer).committed, capacities, each)


def _stage_again(cache: StreamCache, layer: int, role: Tensor | int, T: int) -> Staged | None:
    """`stage` where the layer was staged before and the host's bounds leave room; None for any other call. A graph
    capture changes nothing in that: what it could not check, the bounds, are good enough."""
    if type(layer) is not int or type(T) is not int or not 0 <= layer < cache.layers or T < 0:
        return None
    ready, lengths = cache._ready[layer], cache._lengths
    if ready is None or not lengths.known:
        return None
    source, target = cache._segments.pairs[layer]
    group = lengths.of_layer(layer)
    if ready.source is not source or ready.target is not target or ready.committed is not group.committed:
        return None
    roles = None
    if isinstance(role, Tensor):
        # another layer staged these very roles since the last commit, and they were looked at then
        rows = cache._step.shared.get(group.device) if cache._step.role is role else None
        if rows is None or rows.n != T or not isinstance(rows.role, Tensor):
            return None
        roles = rows.role
    elif type(role) is int and role in (SOURCE, TARGET):
        rows = rows_of_one_role(role, T)
    else:
        return None
    most, longest, capacities = rows.most, lengths.longest[layer], ready.capacities
    if longest[0] + most[0] > capacities[0] or longest[1] + most[1] > capacities[1]:
        return None
    cache._step.rows[layer] = rows
    return ready.staged[role] if roles is None else ready.staged[SOURCE]._replace(role=roles)  # type: ignore[index]


def fit(cache: StreamCache, op: str, layer: int, rows: Rows) -> tuple[Rows, list[int]]:
    """The capacities that hold `rows`, and the rows, counted if that was needed to tell. Refuses what cannot fit."""
    lengths = cache._lengths
    if not lengths.known:
        lengths.tighten()
    capacities = [cache._segments.capacity(layer, segment) for segment in (0, 1)]
    limits = [size if w is None else UNLIMITED for size, w in zip(capacities, cache.windows, strict=True)]
    most, longest = rows.most, lengths.longest[layer]
    if longest[0] + most[0] <= limits[0] and longest[1] + most[1] <= limits[1]:
        return rows, capacities
    if not lengths.exact:
        lengths.tighten()
    rows = rows.counted()
    reach = lengths.reach(layer, rows)
    for segment, name in enumerate(("source", "target")):
        if reach[segment] <= limits[segment]:
            continue
        if cache.fixed or reach[segment] > UNLIMITED:
            room = f"rows that fit the {capacities[segment]} slots of layer {layer}'s {name} segment"
            refuse(op, "rows", room, f"{reach[segment]} with those that it holds")
        while capacities[segment] < reach[segment]:
            capacities[segment] *= 2
    return rows, capacities


def grow(cache: StreamCache, layer: int, capacities: Sequence[int]) -> None:
    """Give the two segments of a layer these capacities, if they have less."""
    for segment, capacity in enumerate(capacities):
        cache._segments.grow(layer, segment, capacity)


def overran(cache: StreamCache) -> bool:
    """Whether rows that were staged unchecked may have been more than a segment holds."""
    if not cache._lengths.known:
        return True
    for layer, rows in enumerate(cache._step.rows):
        for segment, most in enumerate((0, 0) if rows is None else rows.most):
            room = cache._segments.capacity(layer, segment) - cache._lengths.longest[layer][segment]
            if cache.windows[segment] is None and most > room:
                return True
    return False


def reserve(cache: StreamCache, source: int, target: int) -> None:
    more = [Rows(SOURCE, source), Rows(TARGET, target)]
    fits = [[fit(cache, "reserve", layer, rows)[1] for rows in more] for layer in range(cache.layers)]
    for layer, capacities in enumerate(fits):
        for sizes in capacities:
            grow(cache, layer, sizes)


def replayed(cache: StreamCache, source: int | Sequence[int], target: int | Sequence[int]) -> None:
    counts = [source, target]
    each = []
    for name, n in zip(("source", "target"), counts, strict=True):
        if isinstance(n, int):
            each.append([check_int("replayed", name, n)] * cache.batch)
        else:
            each.append(per_session(cache, "replayed", name, n))
    for group in cache._lengths.groups:
        group.upper.add_(torch.tensor(each).T)
    # one count for all sessions is an upper bound
    cache._lengths.exact = cache._lengths.exact and not any(isinstance(n, int) for n in counts)
    cache._lengths.measure()


@contextlib.contextmanager
def unchanged_bounds(cache: StreamCache) -> Iterator[None]:
    """Leave the host's bounds as they were: for a step that is only captured, or that had padding alone."""
    lengths = cache._lengths
    kept = [g.upper.clone() for g in lengths.groups], lengths.exact, lengths.known
    try:
        yield
    finally:
        cache._step.clear()
        for group, upper in zip(lengths.groups, kept[0], strict=True):
            group.upper.copy_(upper)
        lengths.exact, lengths.known = kept[1:]
        lengths.measure()


def check(cache: StreamCache) -> None:
    dropped = 0
    for group in cache._lengths.groups:
        dropped |= int(group.status)
    if dropped:
        for group in cache._lengths.groups:
            group.status.zero_()
        names = " and ".join(name for bit, name in ((1, "source"), (2, "target")) if dropped & bit)
        raise RuntimeError(f"check: the {names} segment was full and dropped rows: discard or roll back, and reserve")
