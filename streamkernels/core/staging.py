"""A step of a cache: the rows that its layers staged, between two commits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import refuse

SOURCE, TARGET, PADDING = 0, 1, -1


class Staged(NamedTuple):
    """What an op needs to write and read one layer. The tensors are the cache's own: buffers, lengths and status.

    source_k, source_v, target_k, target_v: [B, HK, capacity, D]. length: int32 [B, 2], the committed (source, target)
    lengths; an op that saves it for backward saves a copy. status: int32 [1]; a kernel that drops a write because the
    segment is full sets bit `segment`. role: int8 [B, T] on the layer's device, or None if every row has the role
    `segment`. bounded, sinks, windows: see `StreamCache`; a segment whose window is None is no ring and never wraps.
    oldest: int32 [B, 2], or None for all zero: besides the sinks, no key of a ring may be read at a smaller stream
    index (pops and discards let slots be overwritten by rows that are no longer counted).
    """

    source_k: Tensor
    source_v: Tensor
    target_k: Tensor
    target_v: Tensor
    length: Tensor
    status: Tensor
    role: Tensor | None
    segment: int
    bounded: bool
    sinks: int
    windows: tuple[int | None, int | None]
    oldest: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Rows of one call: `n` rows of the int `role`, or roles int8 [B, T] with n = T.

    counts: int64 [B, 2] on the CPU, how many there are of each role, if the host knows.
    """

    role: Tensor | int
    n: int
    counts: Tensor | None = None

    @property
    def most(self) -> tuple[int, int]:
        """At most that many rows of each role in any session, without reading a device."""
        if isinstance(self.role, int):
            return (self.n, 0) if self.role == SOURCE else (0, self.n)
        return self.n, self.n

    def same(self, other: Rows | None) -> bool:
        return other is not None and self.role is other.role and self.n == other.n

    def counted(self) -> Rows:
        """With counts, read from the device if need be."""
        if self.counts is not None or not isinstance(self.role, Tensor):
            return self
        return Rows(self.role, self.n, count_roles(self.role.cpu()))


def watched() -> bool:
    """Whether a tracer, a mode or a function transform could see what is done to tensors now."""
    if torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()  # type: ignore[attr-defined]
    return bool(modes) or torch._C._functorch.peek_interpreter_stack() is not None


@functools.lru_cache(maxsize=4096)
def rows_of_one_role(role: int, n: int) -> Rows:
    return Rows(role, n)


class Step:
    """Per layer the rows staged since the last commit or discard; None where nothing was."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.clear()

    def clear(self) -> None:
        self.rows: list[Rows | None] = [None] * self.layers
        self.role: Tensor | None = None
        self.shared: dict[torch.device, Rows] = {}
        # staged while nothing could be checked: traced or captured
        self.unchecked = False

    def any(self) -> bool:
        return any(rows is not None for rows in self.rows)

    def describe(self, role: Tensor | int, T: int, batch: int, device: torch.device) -> Rows:
        """Check a role; layers of one device that stage the same role tensor share one `Rows`."""
        if not isinstance(role, Tensor):
            return Rows(check_role("stage", role), T)
        if role.dtype != torch.int8:
            refuse("stage", "role", "int8 or one int", role, TypeError)
        if tuple(role.shape) != (batch, T):
            refuse("stage", "role", f"shape [{batch}, {T}]", role)
        if role.device != device and role.device.type != "cpu":
            refuse("stage", "role", f"a tensor on {device} or on the CPU", role)
        if torch.compiler.is_compiling():
            return Rows(role.to(device), T)
        if self.role is not role:
            self.role, self.shared = role, {}
        if device not in self.shared:
            counts = count_roles(role) if role.device.type == "cpu" else None
            # a copy that waits for the device would be a synchronisation in the middle of a step
            self.shared[device] = Rows(role.to(device, non_blocking=True), T, counts)
        return self.shared[device]

    def learn(self, device: torch.device, rows: Rows) -> None:
        """What was counted for one layer holds for the others that stage the same role tensor."""
        if device in self.shared and self.shared[device].role is rows.role:
            self.shared[device] = rows


def check_role(op: str, role: object) -> int:
    """A segment's role as an int."""
    if isinstance(role, bool) or not isinstance(role, int) or role not in (SOURCE, TARGET):
        refuse(op, "role", "SOURCE (0) or TARGET (1)", role)
    return role


def count_roles(role: Tensor) -> Tensor:
    """int64 [B, 2]: source and target rows of a role tensor [B, T] on the CPU. Refuses roles other than 0, 1 and -1."""
    counts = torch.stack([(role == SOURCE).sum(dim=1), (role == TARGET).sum(dim=1)], dim=1)
    if int(counts.sum()) + int((role == PADDING).sum()) != role.numel():
        values = role.unique().tolist()[:8]
        refuse("stage", "role", "values 0 (source), 1 (target) or -1 (padding)", f"values {values}")
    return counts
