"""Sliding windows of a model's layers, as begins of a streaming step and as spans over one buffer.

A windowed layer of a stock model counts the window in keys of the one sequence that it is handed. In a grouped stream
there is no such sequence: more source may arrive between two target tokens. The window then means distance in
position ids (`window="position"`, the default), which does not change with what arrives later and equals the stock
meaning where positions are indices; or distance by index over [visible source | target] (`window="index"`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.cache import SOURCE, TARGET, StreamCache
from ...core.shapes import refuse
from ...core.spans import (
    sliding_window,
    window_begins,
    window_begins_by_index,
    windowed_by_index,
    windowed_by_position,
)

MEANINGS = ("position", "index")
Begins = tuple[Tensor, Tensor]


class KeyPositions:
    """The positions of a stream cache's keys, float64 [B, slots] per segment, entry i for stream index i: what a window
    by position needs to know. The row of a key is written before the key is committed, like the key itself."""

    def __init__(self, stream: StreamCache) -> None:
        if stream.longest(SOURCE) or stream.longest(TARGET):
            refuse(
                "GroupedCache",
                "past_key_values",
                "an empty cache at the first forward of a model with a sliding window",
                "keys whose positions are not known",
            )
        self.stream, self.arrangement = stream, stream._arrangement
        # the last entry takes what is written nowhere
        self._tables = [self._empty(1 + stream.capacity(0, role)) for role in (SOURCE, TARGET)]

    def _empty(self, n: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(self.stream.batch, n, dtype=torch.float64, device=self.stream.form.devices[0])

    def fit(self, T: int) -> None:
        """Have room for T more rows. Not while a graph is traced or captured: then the room that is there must do."""
        stream = self.stream
        blind = stream._blind()
        for role in (SOURCE, TARGET):
            room = self._tables[role].shape[1] - 1
            need = stream.capacity(0, role)
            endless = stream.windows[role] is not None
            # a fixed segment takes no more than it has slots, and graphs hold on to this memory
            if not blind and (endless or not stream.fixed):
                need = max(need, stream.longest(role) + T)
            elif blind and endless:
                text = "a bounded cache, whose positions have no end, in a captured or compiled step"
                refuse("GroupedCache", "past_key_values", "an unbounded cache", text, NotImplementedError)
            if need > room:
                if blind:
                    expected = "GroupedCache.reserve() before a captured or compiled step"
                    refuse("GroupedCache", "past_key_values", expected, f"{room} places for {need} slots")
                grown = self._empty(1 + max(need, 2 * room))
                grown[:, :room] = self._tables[role][:, :room]
                self._tables[role] = grown

    def check(self) -> None:
        """Refuse keys that were moved behind our back."""
        stream = self.stream
        if stream._arrangement != self.arrangement and (stream.longest(SOURCE) or stream.longest(TARGET)):
            expected = "a cache rearranged by GroupedCache's own methods, since a window by position follows the keys"
            refuse("GroupedCache", "past_key_values", expected, "one whose StreamCache was rearranged")
        self.arrangement = stream._arrangement

    def take(self, rows: Tensor) -> None:
        """Session b becomes what rows[b] was; as many sessions stay in the memory where they are."""
        with torch.inference_mode(False):
            taken = [table.index_select(0, rows.to(table.device)) for table in self._tables]
            if taken[0].shape[0] == self._tables[0].shape[0]:
                for table, new in zip(self._tables, taken, strict=True):
                    table.copy_(new)
            else:
                self._tables = taken
        self.arrangement = self.stream._arrangement

    def write(self, positions: Tensor, index: Tensor, role: Tensor) -> None:
        """Note the positions [B, T] of rows with these stream indices and roles int8 [B, T]."""
        for segment in (SOURCE, TARGET):
            table = self._tables[segment]
            at = index.masked_fill(role != segment, table.shape[1]).clamp(max=table.shape[1] - 1)
            table.scatter_(1, at, positions.to(torch.float64))

    def begins(self, positions: Tensor, window: float, total: Tensor, check: bool) -> Begins:
        """int32 [B, T] each: the first source and target key less than `window` positions behind each row, once the
        segments hold `total` [B, 2] keys."""
        q = positions.to(torch.float64)
        found = [
            window_begins(q, table, window, k_count=total[:, role].contiguous(), check=check)
            for role, table in enumerate(self._tables)
        ]
        return found[0], found[1]


def step_begins(
    keys: KeyPositions | None,
    stream: StreamCache,
    positions: Tensor,
    role: Tensor | int,
    source_limit: Tensor | None,
    windows: set[int],
) -> dict[int, Begins]:
    """Per window the begins (source, target), int32 [B, T], of a step's rows; by index if `keys` is None.

    positions: [1 or B, T]; role, source_limit: the step's.
    """
    B, T = stream.batch, positions.shape[1]
    length = stream.length(0).long()
    device = length.device
    if not isinstance(role, Tensor):
        role = torch.full((B, T), role, dtype=torch.int8, device=device)
    role = role.to(device, non_blocking=True)
    ranks = torch.stack([(role == r).long().cumsum(1) for r in (SOURCE, TARGET)], -1)
    total = length + ranks[:, -1]
    index = (ranks - 1 + length[:, None]).gather(2, role.clamp(min=0).long()[..., None])[..., 0]
    if keys is not None:
        keys.fit(T)
        positions = positions.to(device).expand(B, T)
        keys.write(positions, index, role)
        # free on a CPU; elsewhere it would wait for the device
        check = device.type == "cpu" and not torch.compiler.is_compiling()
        return {window: keys.begins(positions, window, total, check) for window in windows}
    limit = total[:, :1].expand(B, T)
    if source_limit is not None:
        limit = torch.minimum(source_limit.to(device).long().clamp(min=0), limit)
    return {window: _begins_by_index(role, index, limit, window) for window in windows}


def _begins_by_index(role: Tensor, index: Tensor, limit: Tensor, window: int) -> Begins:
    source, target = window_begins_by_index(index, limit, window)
    return torch.where(role == SOURCE, target, source), target


def buffer_spans(
    declared: Tensor | None, positions: Tensor, window: int, meaning: str, shape: tuple[int, int, int]
) -> Tensor:
    """Bounds int32 [B, T, N, 2] of a windowed layer over one buffer of S keys whose last T are the rows'.

    declared: the caller's spans, or None for causal attention, whose window counts keys, as in the stock model.
    positions: [1 or B, T], on the device of the keys. shape: (B, T, S).
    """
    B, T, S = shape
    if declared is None:
        return sliding_window(T, window, S=S, B=B, device=positions.device).bounds
    if meaning == "index":
        return windowed_by_index(declared, window)
    traced = torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    return windowed_by_position(declared, positions.expand(B, T), window, check=not traced)
