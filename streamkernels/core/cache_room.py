"""Whether rows fit a cache, and making room for them: decided on the host's bounds, read from the device if need be.

The bodies of those methods of `StreamCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .cache_form import UNLIMITED
from .shapes import refuse
from .staging import SOURCE, TARGET, Rows

if TYPE_CHECKING:
    from .cache import StreamCache


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


def replayed(cache: StreamCache, source: int, target: int) -> None:
    for group in cache._lengths.groups:
        group.upper.add_(torch.tensor([source, target]))
    cache._lengths.exact = False
    cache._lengths.measure()


def check(cache: StreamCache) -> None:
    dropped = 0
    for group in cache._lengths.groups:
        dropped |= int(group.status)
    if dropped:
        for group in cache._lengths.groups:
            group.status.zero_()
        names = " and ".join(name for bit, name in ((1, "source"), (2, "target")) if dropped & bit)
        raise RuntimeError(f"check: the {names} segment was full and dropped rows: discard or roll back, and reserve")
