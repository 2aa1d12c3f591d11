"""The memory of a cache: per layer and segment two buffers [B, HK, capacity, D], and how keys move in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .cache_form import CacheForm

Pair = tuple[Tensor, Tensor]
# slots moved at once: bounds the temporary memory of a move
BLOCK = 1024


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. Never an inference tensor: one made in inference mode could not be written outside."""
    with torch.inference_mode(False):
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def blocks(begin: int, end: int) -> Iterator[slice]:
    """[begin, end) in ascending pieces of at most BLOCK."""
    return (slice(at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK))


class Segments:
    """`pairs[layer][segment]` is (k, v). A buffer is replaced when it grows, never resized."""

    def __init__(self, form: CacheForm, capacities: Sequence[tuple[int, int]] | None = None) -> None:
        self.form = form
        sizes = [form.capacity] * form.layers if capacities is None else capacities
        self.pairs = [[self._pair(layer, size[s], form.batch) for s in (0, 1)] for layer, size in enumerate(sizes)]

    def _pair(self, layer: int, capacity: int, batch: int) -> Pair:
        form = self.form
        shape = (batch, form.kv_heads[layer], capacity, form.head_dims[layer])
        return allocate(shape, form.dtype, form.devices[layer]), allocate(shape, form.dtype, form.devices[layer])

    def capacity(self, layer: int, segment: int) -> int:
        return self.pairs[layer][segment][0].shape[2]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.pairs for pair in layer for t in pair)

    def grow(self, layer: int, segment: int, capacity: int) -> None:
        """Replace a pair by a larger one with the same content."""
        old = self.pairs[layer][segment]
        have = old[0].shape[2]
        if capacity > have:
            new = self._pair(layer, capacity, old[0].shape[0])
            for to, source in zip(new, old, strict=True):
                to[:, :, :have].copy_(source)
            self.pairs[layer][segment] = new

    def close_gap(self, layer: int, segment: int, row: slice, begin: int, end: int, used: int) -> None:
        """Move the slots [end, used) of these rows down to begin."""
        for buffer in self.pairs[layer][segment]:
            # the destination lies below the source: ascending blocks never overwrite what is still to move
            for part in blocks(end, used):
                moved = buffer[row, :, part].clone()
                buffer[row, :, part.start - end + begin : part.stop - end + begin] = moved

    def gather(self, layer: int, segment: int, index: Tensor) -> None:
        """Slot j gets what slot index[b, j] holds; index: int64 [B, K] on the layer's device, ascending."""
        for buffer in self.pairs[layer][segment]:
            B, HK, capacity, D = buffer.shape
            for part in blocks(0, index.shape[1]):
                # an ascending index reads at or behind the slot it writes: nothing is overwritten before it is read
                at = index[:, part].clamp(0, capacity - 1)[:, None, :, None].expand(B, HK, -1, D)
                buffer[:, :, part] = buffer.gather(2, at)

    def take(self, layer: int, segment: int, rows: Tensor, used: int, *, fresh: bool) -> None:
        """Row b becomes row rows[b]: in place, or in a pair for len(rows) sessions."""
        old = self.pairs[layer][segment]
        new = self._pair(layer, old[0].shape[2], len(rows)) if fresh else old
        for to, source in zip(new, old, strict=True):
            for part in blocks(0, used):
                to[:, :, part] = source[:, :, part].index_select(0, rows)
        self.pairs[layer][segment] = new

    def copy(self, used: Sequence[Sequence[int]]) -> Segments:
        """A deep copy of the first used[layer][segment] slots, with the same capacities."""
        twin = object.__new__(Segments)
        twin.form = self.form
        twin.pairs = []
        for layer, pairs in enumerate(self.pairs):
            fresh = [self._pair(layer, k.shape[2], k.shape[0]) for k, _ in pairs]
            for segment, (new, old) in enumerate(zip(fresh, pairs, strict=True)):
                n = min(used[layer][segment], old[0].shape[2])
                for to, source in zip(new, old, strict=True):
                    to[:, :, :n].copy_(source[:, :, :n])
            twin.pairs.append(fresh)
        return twin
