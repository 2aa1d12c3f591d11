"""`rotate_append`: checks, the choice of a backend, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.cache import PADDING, SOURCE, TARGET, Staged, StreamCache
from ...core.chunk import check_chunk
from .schema import OP


def rotate_append(
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: StreamCache,
    layer: int,
    *,
    role: Tensor | int,
    interleaved: bool = False,
    backend: str = "auto",
) -> None:
    """Rotate new keys by their own positions and write them, with their values, behind the committed rows of their
    segments.

    Row t of a session goes to the segment that its role names, at stream index committed length + the number of earlier
    rows of that role in the call. Committed lengths do not move: `cache.commit()` makes the rows of all layers part of
    the cache at once, `cache.discard()` forgets them, and calling again for the same layer replaces them. Rotation as
    in `rotate`.

    Args:
        k, v: [B, HK, T, D], the cache's dtype, on the layer's device, any strides, last stride 1. Constants: no
            gradient flows.
        cos, sin: [B or 1, T, rotary_dim / 2], fp32 or k's dtype, rotary_dim <= D; both None for keys that are already
            rotated.
        cache: mutated: slots behind the committed lengths of layer `layer`, and what it remembers as staged; a segment
            that is full and not fixed is replaced by one of twice the size.
        role: SOURCE or TARGET for every row, or int8 [B, T] with SOURCE, TARGET or PADDING (written nowhere), on the
            layer's device or on the CPU; not to be changed before the commit.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        backend: "auto", "reference", "triton" or "cuda".

    Raises TypeError or ValueError for arguments that do not fit the cache, a full fixed segment, or more than
    `max_chunk` rows in bounded mode; NotImplementedError for a named backend that cannot run the call. Nothing has
    changed then. Under torch.compile and in CUDA graphs, where room cannot be checked, a full segment drops the write
    and sets the cache's status word.
    """
    shapes = check_chunk(OP, k, v, cos, sin, cache, layer, role)
    used = {
        "roles": isinstance(role, Tensor),
        "bounded": cache.bounded,
        "interleaved": interleaved,
        "rotated": cos is None,
    }
    call = Call(OP, k.device, k.dtype, dict(shapes.sizes), frozenset(name for name, on in used.items() if on))
    chosen = choose(call, backend)
    staged = cache.stage(layer, role, shapes["T"])
    for rows, ring in _writes(staged):
        torch.ops.streamkernels.rotate_append(
            k, v, cos, sin,
            staged.source_k, staged.source_v, staged.target_k, staged.target_v,
            staged.length, staged.status, rows, staged.segment,
            None, staged.sinks, ring, interleaved, chosen,
        )  # fmt: skip


def _writes(staged: Staged) -> list[tuple[Tensor | None, bool]]:
    """(role, bounded) of each launch: one, or one per segment if roles are mixed and only one segment is a ring."""
    rings = [window is not None for window in staged.windows]
    if staged.role is None:
        return [(None, rings[staged.segment])]
    if rings[SOURCE] == rings[TARGET]:
        return [(staged.role, staged.bounded)]
    return [(torch.where(staged.role == r, staged.role, PADDING), rings[r]) for r in (SOURCE, TARGET)]
