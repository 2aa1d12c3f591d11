"""A sliding window laid over spans that say who is seen: what a windowed layer of a model leaves of them.

A window has two meanings once positions are not indices. By position a row sees the keys of its spans that are less
than `window` positions behind it; that does not change when more source arrives. By index it sees the last `window`
keys of its spans, which is what a model does that is handed its visible keys as one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import Shapes, check_int, check_number, refuse
from .span_builders import NUMBERS


def windowed_by_position(bounds: Tensor, positions: Tensor, window: float, *, check: bool = True) -> Tensor:
    """int32 [B, T, N, 2]: `bounds` without the keys that are `window` positions or more behind the row.

    bounds: int32 [B, T, N, 2] over a buffer of T keys, the rows' own. positions: ints or floats [B, T], of rows and
    keys alike. Every span must lie in one run of keys whose positions increase, as the source and the target of a
    streaming sample do, or a packed document; ValueError otherwise (check=False skips that test, which synchronises).
    """
    op, shapes = "windowed_by_position", Shapes("windowed_by_position")
    check_number(op, "window", window, positive=True)
    shapes.tensor("bounds", bounds, "B T N 2", dtype=torch.int32)
    shapes.tensor("positions", positions, "B T", dtype=NUMBERS)
    B, T, N = shapes["B"], shapes["T"], shapes["N"]
    if not T:
        return bounds
    at = positions.double()
    at = at - at.amin(dim=1, keepdim=True)
    # one rising number per key: runs behind each other, further apart than any two positions of a run
    run = torch.nn.functional.pad(at[:, 1:] <= at[:, :-1], (1, 0)).cumsum(1)
    apart = at.amax(dim=1, keepdim=True) + 2
    begin, end = bounds.clamp(0, T).long().unbind(-1)
    first = run.gather(1, begin.flatten(1).clamp(max=T - 1))
    if check:
        last = run.gather(1, (end.flatten(1) - 1).clamp(min=0))
        crossing = (end > begin).flatten(1) & (first != last)
        if bool(crossing.any()):
            b, row = crossing.nonzero()[0].tolist()
            got = f"a span of row {row // N} in sample {b} over which they fall"
            refuse(op, "positions", "positions that increase inside every span (else a window is no index range)", got)
    behind = (at[:, :, None] - window).expand(B, T, N).flatten(1).clamp(min=-1)
    inside = torch.searchsorted(at + run * apart, behind + first * apart, right=True).view(B, T, N)
    return _from(bounds, inside)


def windowed_by_index(bounds: Tensor, window: int) -> Tensor:
    """int32 [B, T, N, 2]: of the keys of a row's spans (disjoint, in any order of slots), the last `window`."""
    check_int("windowed_by_index", "window", window, minimum=1)
    Shapes("windowed_by_index").tensor("bounds", bounds, "B T N 2", dtype=torch.int32)
    begin, end = bounds.unbind(-1)
    size = (end - begin).clamp(min=0)
    behind = (begin[:, :, None, :] >= end[:, :, :, None]) & (size > 0)[:, :, None, :]
    # [B, T, N]: keys of the row that come after the slot's
    after = (behind * size[:, :, None, :]).sum(-1)
    return _from(bounds, end - (window - after).clamp(min=0))


def _from(bounds: Tensor, first: Tensor) -> Tensor:
    begin, end = bounds.unbind(-1)
    begin = torch.minimum(torch.maximum(begin, first.to(torch.int32)), torch.maximum(begin, end))
    return torch.stack((begin, end), -1)
