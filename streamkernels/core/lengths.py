"""The committed lengths of a cache: exact on the devices, an upper bound on the host.

Kernels read lengths from device memory, so that a new length compiles nothing and a CUDA graph can be replayed. The
host must know, without reading the device, whether a chunk still fits: it keeps an upper bound for every layer, row and
segment, exact as long as it knows how many rows of each role went in, and reads the devices once (`tighten`) when the
bound is not good enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .staging import Rows


@dataclass
class Group:
    """The layers of one device; `Ld` is their number."""

    device: torch.device
    layers: list[int]
    # int32 [Ld, B, 2] on the device: committed (source, target) lengths
    committed: Tensor
    # int64 [Ld, B, 2] on the CPU: upper bounds of them
    upper: Tensor
    # int32 [Ld, B, 2] on the device: see `Lengths.lose`
    oldest: Tensor
    # int64 [Ld, B, 2] on the CPU: the length at the last re-anchoring, -1 for never
    anchored: Tensor
    # int32 [1] on the device: bit `segment` is set when a write to a full segment was dropped
    status: Tensor
    # int8 [2] on the device: the roles 0 and 1, to count both in one reduction
    roles: Tensor

    @classmethod
    def empty(cls, device: torch.device, layers: list[int], batch: int) -> Group:
        shape = (len(layers), batch, 2)
        return cls(
            device,
            layers,
            committed=torch.zeros(shape, dtype=torch.int32, device=device),
            upper=torch.zeros(shape, dtype=torch.int64),
            oldest=torch.zeros(shape, dtype=torch.int32, device=device),
            anchored=torch.full(shape, -1, dtype=torch.int64),
            status=torch.zeros(1, dtype=torch.int32, device=device),
            roles=torch.arange(2, dtype=torch.int8, device=device),
        )

    def clone(self) -> Group:
        state = (self.committed, self.upper, self.oldest, self.anchored, self.status, self.roles)
        return Group(self.device, list(self.layers), *(t.clone() for t in state))

    def on_device(self) -> tuple[Tensor, ...]:
        return self.committed, self.oldest, self.status, self.roles

    def count(self, rows: Rows) -> Tensor:
        """int32 [B, 2], or [2]: the rows of each role, counted on the device."""
        if isinstance(rows.role, int):
            return (self.roles == rows.role).int() * rows.n
        return (rows.role[:, :, None] == self.roles).sum(dim=1, dtype=torch.int32)


class Lengths:
    """Lengths of all layers, rows and segments, grouped by device so that a commit is one addition per device."""

    def __init__(self, batch: int, devices: Sequence[torch.device]) -> None:
        distinct = list(dict.fromkeys(devices))
        members = [[layer for layer, d in enumerate(devices) if d == device] for device in distinct]
        self.groups = [Group.empty(d, layers, batch) for d, layers in zip(distinct, members, strict=True)]
        self.place = [(distinct.index(d), members[distinct.index(d)].index(i)) for i, d in enumerate(devices)]
        # per layer the largest bound of each segment over the rows
        self.longest = [[0, 0] for _ in devices]
        self.exact = True
        # false once a traced step moved the lengths behind the host's back: then the bounds say nothing
        self.known = True

    def clone(self) -> Lengths:
        copy = object.__new__(Lengths)
        copy.groups = [g.clone() for g in self.groups]
        copy.place = list(self.place)
        copy.longest = [list(pair) for pair in self.longest]
        copy.exact, copy.known = self.exact, self.known
        return copy

    def of_layer(self, layer: int) -> Group:
        return self.groups[self.place[layer][0]]

    def at(self, layer: int) -> Tensor:
        """int32 [B, 2]: a view of one layer's committed lengths."""
        g, row = self.place[layer]
        return self.groups[g].committed[row]

    def oldest(self, layer: int) -> Tensor:
        """int32 [B, 2]: a view of one layer's part of `oldest`."""
        g, row = self.place[layer]
        return self.groups[g].oldest[row]

    def bound(self, layer: int) -> Tensor:
        """int64 [B, 2] on the CPU: a view of one layer's upper bounds."""
        g, row = self.place[layer]
        return self.groups[g].upper[row]

    def status(self, layer: int) -> Tensor:
        return self.of_layer(layer).status

    def all(self) -> Tensor:
        """int32 [layers, B, 2]: the tensor itself if there is one device, else a copy on the first layer's device."""
        if len(self.groups) == 1:
            return self.groups[0].committed
        device = self.groups[self.place[0][0]].device
        return torch.stack([self.at(layer).to(device) for layer in range(len(self.place))])

    def of(self, layers: Sequence[int]) -> list[tuple[Group, list[int]]]:
        """Per device that holds any of `layers`: its group and their places in it."""
        found = [(g, [i for i, layer in enumerate(g.layers) if layer in layers]) for g in self.groups]
        return [(g, places) for g, places in found if places]

    def reach(self, layer: int, rows: Rows) -> list[int]:
        """The largest bound of each segment over the batch, should `rows` be committed."""
        if rows.counts is not None:
            return (self.bound(layer) + rows.counts).amax(dim=0).tolist()
        return [longest + most for longest, most in zip(self.longest[layer], rows.most, strict=True)]

    def runs(self, staged: Sequence[Rows | None]) -> Iterator[tuple[Group, int, int, Rows]]:
        """(group, first, last, rows) for each run of a group's layers that staged the same rows."""
        for group in self.groups:
            first = 0
            while first < len(group.layers):
                rows, last = staged[group.layers[first]], first + 1
                if rows is not None:
                    while last < len(group.layers) and rows.same(staged[group.layers[last]]):
                        last += 1
                    yield group, first, last, rows
                first = last

    def advance(self, staged: Sequence[Rows | None]) -> None:
        """Add the staged rows to the committed lengths and to the bounds. No synchronisation."""
        if torch.compiler.is_compiling():
            # bounds that change with every step would be compiled into the graph
            for group, first, last, rows in self.runs(staged):
                group.committed[first:last].add_(group.count(rows))
            self.exact = self.known = False
            return
        mixed = False
        for group, first, last, rows in self.runs(staged):
            if isinstance(rows.role, int):
                group.committed[first:last, :, rows.role].add_(rows.n)
                group.upper[first:last, :, rows.role].add_(rows.n)
                for layer in group.layers[first:last]:
                    self.longest[layer][rows.role] += rows.n
                continue
            mixed = True
            group.committed[first:last].add_(group.count(rows))
            group.upper[first:last].add_(rows.n if rows.counts is None else rows.counts)
            self.exact = self.exact and rows.counts is not None
        if mixed:
            self.measure()

    def measure(self) -> None:
        """Set `longest` from the bounds."""
        for group in self.groups:
            for layer, pair in zip(group.layers, group.upper.amax(dim=1).tolist(), strict=True):
                self.longest[layer] = pair

    def tighten(self) -> None:
        """Make the bounds exact: reads every device's lengths (a synchronisation)."""
        for group in self.groups:
            group.upper.copy_(group.committed)
        self.exact = self.known = True
        self.measure()

    def lose(self, rings: tuple[int, int], staged: Sequence[Rows | None]) -> None:
        """Note what bounded segments have overwritten, before written rows are forgotten by a pop or a discard.

        A ring of R slots that was written up to index h holds no index below h - R, also when h is forgotten later:
        `oldest` is the largest h - R so far. rings: R per segment. staged: rows written beyond the committed lengths.
        """
        for group in self.groups:
            for segment, ring in enumerate(rings):
                oldest = group.oldest[..., segment]
                oldest.copy_(torch.maximum(oldest, group.committed[..., segment] - ring))
        for group, first, last, rows in self.runs(staged):
            written = group.committed[first:last] + group.count(rows)
            for segment, ring in enumerate(rings):
                oldest = group.oldest[first:last, :, segment]
                oldest.copy_(torch.maximum(oldest, written[..., segment] - ring))
