"""The two-segment key/value cache of streaming sessions: the home of roles, lengths and stream indices.

Every layer has two segments, source and target, each a pair of buffers `k, v: [B, HK, capacity, D]`. A row of the batch
is one independent session. Keys enter in two steps: an op *stages* rows, which writes K and V beyond the committed
length, and `commit` advances all layers at once; `discard` forgets them, so that an exception in layer 13 leaves
nothing half done. A key is addressed by its stream index, the number of rows of its role before it in its session.
Positions (RoPE) are none of the cache's business, except that `reanchor` can move them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cache_edit, cache_file, cache_room
from .cache_edit import Mark
from .cache_form import UNLIMITED, CacheForm
from .lengths import Lengths
from .rotary import Rotary
from .segments import Pair, Segments
from .shapes import check_int, refuse
from .slots import slot, stream_index
from .staging import PADDING, SOURCE, TARGET, Rows, Staged, Step, check_role

__all__ = ["PADDING", "SOURCE", "TARGET", "Mark", "Staged", "StreamCache", "slot", "stream_index"]


class StreamCache:
    """Keys and values of `batch` independent sessions in `layers` layers, split into a source and a target segment.

    layers, batch: counts >= 1. kv_heads, head_dim, device, rotary: one value, or a list with one per layer. dtype:
    float16, bfloat16, float32 or float64. capacity: slots per segment, an int or (source, target); a segment that is
    full doubles, layer by layer. fixed: never grow (addresses stay, for CUDA graphs); a call that does not fit is
    refused. rotary: how the keys were rotated, which only `reanchor` needs.

    Bounded mode: a `window` W (an int, or (source, target) with None for a segment without) makes a segment hold its
    first `sinks` keys and a ring of the most recent ones; a row that sees it up to index e sees `[0, sinks)` and
    `[e - W, e)`. It gets at least `sinks + W + max_chunk - 1` slots, so that a chunk of at most `max_chunk` rows never
    overwrites a key that one of its rows still sees, and it never grows. Memory is not initialised.

    Attributes: layers, batch, dtype, fixed, bounded, sinks, windows, max_chunk, form (all of them, per layer), and
    epoch, the number of changes that move or drop committed rows: pop, evict, keep, reanchor, reset, rollback, select,
    reorder. Gradients of earlier calls, which read the cache again, are impossible after one. In bounded mode every
    step overwrites keys as well, so there is no gradient through a bounded cache at all.

    Raises ValueError or TypeError for arguments that are out of range or do not fit together. All methods that raise
    leave the cache as it was.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        dtype: torch.dtype,
        device: str | torch.device | Sequence[str | torch.device],
        capacity: int | tuple[int, int] = (256, 256),
        fixed: bool = False,
        window: int | tuple[int | None, int | None] | None = None,
        sinks: int = 0,
        max_chunk: int = 1,
        rotary: Rotary | Sequence[Rotary | None] | None = None,
    ) -> None:
        each: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim, "device": device, "rotary": rotary}
        form = CacheForm.of(
            "StreamCache",
            layers,
            batch,
            dtype,
            per_layer=each,
            capacity=capacity,
            window=window,
            sinks=sinks,
            max_chunk=max_chunk,
            fixed=fixed,
        )
        with torch.inference_mode(False):
            self._start(form, Lengths(batch, form.devices), Segments(form))

    def _start(self, form: CacheForm, lengths: Lengths, segments: Segments) -> None:
        self.form = form
        self.layers, self.batch, self.dtype, self.fixed = form.layers, form.batch, form.dtype, form.fixed
        self.sinks, self.windows, self.max_chunk = form.sinks, form.windows, form.max_chunk
        self.bounded = form.windows != (None, None)
        self.epoch = 0
        self._lengths, self._segments = lengths, segments
        self._step = Step(form.layers)
        self._ready: list[cache_room.Ready | None] = [None] * form.layers
        self._on_cuda = any(d.type == "cuda" for d in form.devices)
        # bounded mode: a pop or a discard may have lost history (see Lengths.lose)
        self._lost = False
        self._arrangement = 0
        self._marks: weakref.WeakSet[Mark] = weakref.WeakSet()

    # what it holds

    def segment(self, layer: int, role: int) -> Pair:
        """(k, v), the live buffers [B, HK, capacity, D] of one segment. Growth and `select` replace them."""
        return self._segments.pairs[self._layer("segment", layer)][check_role("segment", role)]

    def capacity(self, layer: int, role: int) -> int:
        """Slots of one segment."""
        return self._segments.capacity(self._layer("capacity", layer), check_role("capacity", role))

    def length(self, layer: int | None = None) -> Tensor:
        """Committed (source, target) lengths in tokens, on the device.

        int32 [B, 2], a live view, of one layer; [layers, B, 2] for None, live if all layers share a device, else a copy
        on the first layer's device.
        """
        return self._lengths.all() if layer is None else self._lengths.at(self._layer("length", layer))

    def longest(self, role: int, layer: int = 0) -> int:
        """An upper bound of the committed tokens of one segment over all sessions, without reading the device.

        (It is read once after a step that committed inside torch.compile.)
        """
        if not self._lengths.known:
            self._lengths.tighten()
        return self._lengths.longest[self._layer("longest", layer)][check_role("longest", role)]

    @property
    def status(self) -> Tensor:
        """int32 [devices], live if there is one: bit `segment` is set when a full segment dropped a write."""
        words = [g.status for g in self._lengths.groups]
        return words[0] if len(words) == 1 else torch.cat([w.to(words[0].device) for w in words])

    @property
    def nbytes(self) -> int:
        """Bytes of all device memory that the cache holds: buffers, lengths and status words."""
        state = [t for g in self._lengths.groups for t in g.on_device()]
        return self._segments.nbytes() + sum(t.numel() * t.element_size() for t in state)

    # one step

    def stage(self, layer: int, role: Tensor | int, T: int) -> Staged:
        """Make room for T rows of one layer, and remember their roles until `commit` or `discard`. Called by ops.

        role: int8 [B, T] of SOURCE, TARGET or PADDING, not to be changed before the commit, or one int for all rows. A
        role on the CPU is counted and copied to the layer's device. Staging a layer again replaces what it staged.

        Grows a segment that is too small. The only synchronisation is one read of the lengths, and of the roles, when
        the host's bounds alone would force growth or a refusal. While torch.compile traces or a CUDA graph is captured
        nothing is checked and nothing grows: call `reserve` before. Raises TypeError or ValueError: rows that do not
        fit a fixed segment, more than max_chunk rows in bounded mode, roles out of range.
        """
        return cache_room.stage(self, layer, role, T)

    def commit(self) -> None:
        """Advance all layers by the rows they staged: one addition per device and no synchronisation.

        Works inside torch.compile too, but then the next call that needs to know what fits reads the lengths.

        Layers may have staged different rows, as pruned layers do. Raises RuntimeError if a layer staged nothing since
        the last commit or discard, or if a compiled step overran a segment (then discard, reserve and repeat it).
        """
        missing = [layer for layer, rows in enumerate(self._step.rows) if rows is None]
        if missing:
            some = ", ".join(map(str, missing[:8]))
            raise RuntimeError(
                f"commit: every layer must have staged rows since the last commit; layers {some} have not"
            )
        if self._step.unchecked and not self._blind() and cache_room.overran(self):
            self.check()
        self._lengths.advance(self._step.rows)
        self._step.clear()

    def discard(self) -> None:
        """Forget the staged rows. No device work, except that bounded mode notes which slots they overwrote."""
        if self.bounded and self._step.any():
            self._lose(self._step.rows)
        self._step.clear()

    def reserve(self, source: int = 0, target: int = 0) -> None:
        """Make room in every layer for that many more rows per session: before a compiled step or a graph replay.

        Reads the lengths once if the host's bounds say that it does not fit. Raises ValueError if a fixed segment is
        too small.
        """
        self._settle("reserve", staged=True)
        cache_room.reserve(self, check_int("reserve", "source", source), check_int("reserve", "target", target))

    def replayed(self, source: int | Sequence[int] = 0, target: int | Sequence[int] = 0) -> None:
        """Tell the host what the device committed by itself in a graph replay: rows per session, an int for at most."""
        cache_room.replayed(self, source, target)

    def check(self) -> None:
        """Read the status words (a synchronisation). Raises RuntimeError, and clears them, if a write was dropped."""
        cache_room.check(self)

    # going back

    def mark(self) -> Mark:
        """The committed lengths as of now, to `rollback` to: a few bytes per layer and session, no keys, no read."""
        self._settle("mark", staged=True)
        return cache_edit.mark(self)

    def rollback(self, mark: Mark) -> None:
        """Forget all rows staged or committed since `mark`, which stays usable.

        One device copy; it reads the device only in bounded mode and if rows were popped since. Raises ValueError for
        another cache's mark, or if a ring no longer holds the window of the row after the mark; RuntimeError if the
        cache was rearranged since (evict, keep, reanchor, reset, select, reorder) or rows before the mark were popped.
        """
        if not isinstance(mark, Mark) or mark.owner is not self:
            refuse("rollback", "mark", "a Mark made by this cache", mark)
        if mark.arrangement != self._arrangement:
            raise RuntimeError("rollback: the cache was rearranged since the mark")
        self._settle("rollback", staged=True)
        cache_edit.rollback(self, mark)
        self.epoch += 1

    def pop(self, n: int | Sequence[int], role: int = TARGET) -> None:
        """Forget the last n committed rows of one segment in every layer: O(1), the keys stay until overwritten.

        n: a count, or one per session. Reads the lengths if the host does not know them exactly, and in bounded mode.
        Raises ValueError if a layer has fewer rows, or a ring no longer holds the window of the next row; RuntimeError
        while rows are staged.
        """
        self._settle("pop", exact=True)
        counts = cache_edit.per_session(self, "pop", "n", n)
        if check_role("pop", role) in (SOURCE, TARGET) and any(counts):
            cache_edit.pop(self, counts, role)
            self.epoch += 1

    def reset(self, row: int | None = None) -> None:
        """Empty one session, or all (None: then staged rows are forgotten and the status cleared too). Keeps memory.

        Raises ValueError for a row outside the batch; RuntimeError for one session while rows are staged.
        """
        if row is not None:
            check_int("reset", "row", row, maximum=self.batch - 1)
        self._settle("reset", staged=row is None)
        cache_edit.reset(self, row)
        self._rearranged()

    # rearranging

    def evict(self, begin: int | Sequence[int], end: int | Sequence[int], role: int, layer: int | None = None) -> None:
        """Remove the stream indices [begin, end) of one segment. The keys behind move down, with the rotation they
        have.

        begin, end: a value, or one per session; clipped to a session's length, but no end may exceed the longest one.
        layer: one layer, or None for all. O(keys moved). Raises ValueError, NotImplementedError for a bounded segment
        (it evicts by itself), RuntimeError while rows are staged.
        """
        self._settle("evict", exact=True)
        cache_edit.evict(self, begin, end, role, layer)
        self._rearranged()

    def keep(
        self,
        index: Tensor | Sequence[int],
        count: Tensor | int | None = None,
        role: int = SOURCE,
        layer: int | None = None,
    ) -> None:
        """Keep only the listed stream indices of one segment: entry j moves to stream index j, `count` is the new
        length.

        index: integers [K] or [B, K], ascending and unique up to count. count: an int, integers [B], or None for K.
        Both may lie on a device, as `select_tokens` returns them. layer: one layer, or None for all. Values on the CPU
        are checked against the lengths; values on a device are trusted, since nothing is read back. Raises as `evict`.
        """
        self._settle("keep")
        cache_edit.keep(self, index, count, role, layer)
        self._rearranged()

    def reanchor(
        self, delta: float | Sequence[float] | Tensor, role: int = SOURCE, *, begin: int | None = None
    ) -> None:
        """Move the positions of a segment's cached keys by `delta`: a rotation in place, with no scale applied twice.

        delta: a number, one per session, or [3, B] for the axes of M-RoPE. begin: the first stream index that moves;
        the default is 0, and in a bounded segment the first one behind the sinks. Every layer needs its Rotary. A call
        rounds each moved key once; a bounded segment may therefore move only once per `window` new tokens of a session
        (where delta is not 0). Raises TypeError, ValueError, or RuntimeError when it is too early or rows are staged.
        """
        self._settle("reanchor", exact=True)
        cache_edit.reanchor(self, delta, role, begin)
        self._rearranged()

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Keep only these sessions, in this order, repeats allowed: the batch becomes len(rows), in new buffers.

        rows: ints in [0, batch), read to the host if they are on a device. Raises TypeError, ValueError, RuntimeError
        while rows are staged.
        """
        self._settle("select")
        cache_edit.take(self, "select", rows, fresh=True)
        self._rearranged()

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Session b becomes a copy of session rows[b], as beam search needs; the buffers stay where they are.

        rows: as many ints in [0, batch) as there are sessions; otherwise as `select`.
        """
        self._settle("reorder")
        cache_edit.take(self, "reorder", rows, fresh=False)
        self._rearranged()

    def fork(self) -> StreamCache:
        """A deep copy of equal capacity. Copies the used memory; staged rows and marks stay with the original."""
        self._settle("fork", staged=True)
        return cache_edit.fork(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the committed keys to one safetensors file, with a schema version and a SHA-256 digest of everything.

        Slots that hold no key of a session are written as zeros. The file appears whole or not at all. Raises
        ImportError without the safetensors package.
        """
        self._settle("save", exact=True, staged=True)
        cache_file.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        like: StreamCache | None = None,
    ) -> StreamCache:
        """A new cache from a file that `save` wrote, on `device` (default: the CPU, or the devices of `like`).

        like: a cache that the file must match in layers, kv_heads, head_dim, dtype, windows, sinks, max_chunk and
        rotary; it is not touched. Raises ValueError for a file that is truncated or altered, of another schema version,
        or that does not match. The digest finds accidents; it is no signature.
        """
        return cache_file.load(cls, path, device, like)

    # inside

    def _blind(self) -> bool:
        """Whether Python must not look at values now: torch.compile traces, or a CUDA graph is being captured."""
        if torch.compiler.is_compiling():
            return True
        return self._on_cuda and torch.cuda.is_current_stream_capturing()

    def _settle(self, op: str, *, exact: bool = False, staged: bool = False) -> None:
        """What rearranging needs: no tracing or capture, no staged rows unless allowed, exact lengths if asked for."""
        if self._blind():
            raise RuntimeError(f"{op}: cannot be traced by torch.compile or captured in a CUDA graph")
        if not staged and self._step.any():
            raise RuntimeError(f"{op}: rows are staged: commit or discard them first")
        if not self._lengths.known or (exact and not self._lengths.exact):
            self._lengths.tighten()

    def _rearranged(self) -> None:
        self._arrangement += 1
        self.epoch += 1

    def _lose(self, staged: Sequence[Rows | None] | None = None) -> None:
        """Bounded mode: note what written rows overwrote, before `staged` and popped rows are forgotten."""
        self._lengths.lose(self._rings(), [None] * self.layers if staged is None else staged)
        self._lost = True

    def _rings(self) -> tuple[int, int]:
        """Slots of each segment's ring; endless for a segment without window."""
        source, target = (self._segments.capacity(0, s) - self.sinks for s in (SOURCE, TARGET))
        return source if self.windows[0] else UNLIMITED, target if self.windows[1] else UNLIMITED

    def _layer(self, op: str, layer: int) -> int:
        return check_int(op, "layer", layer, maximum=self.layers - 1)
