"""A streaming step as CUDA graphs: one per length of the longest chunk, rounded up, with and without target rows.

The graph reads tokens, positions, roles and limits from one static buffer, and lengths from the cache's memory, where
it also advances them: a new length captures nothing. Rows that a step does not need are padding, which is written
nowhere; warming up and capturing go through a step of padding only, so that they leave the cache as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.cache import PADDING, SOURCE, TARGET
from ...core.cache_room import unchanged_bounds
from ...core.shapes import refuse
from .cache import GroupedCache

BUCKETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Captured:
    """One graph with the memory that it reads and writes."""

    graph: Any
    packed: Tensor
    logits: Tensor


def capture(run: Callable[[], Tensor], pool: Any, device: torch.device) -> tuple[Any, Tensor]:
    """(the graph, its output) of one call of `run`, which must not wait for the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
        out = run()
    return graph, out


class StepGraphs:
    """Captures steps when they are first needed, and replays them.

    run: (packed int64 [4, B, T] on the device, whether logits are wanted) -> logits [B, vocab], staged. cache: fixed
    and unbounded, on one CUDA device.
    """

    def __init__(self, run: Callable[[Tensor, bool], Tensor], cache: GroupedCache, device: torch.device) -> None:
        stream = cache.stream
        if not stream.fixed or stream.bounded:
            got = "one that grows" if not stream.fixed else "a bounded one"
            refuse("graphs", "cache", "a fixed, unbounded cache (GroupedCache.for_model(..., fixed=True))", got)
        if len(set(stream.form.devices)) != 1 or not self.possible(device):
            expected = "a model and a cache on one CUDA device"
            refuse("graphs", "model", expected, ", ".join(sorted({str(d) for d in stream.form.devices})))
        self._run, self._cache, self._device = run, cache, device
        self._captured: dict[tuple[int, bool], Captured] = {}
        self._where = self._memory()
        self._pool: Any = None

    def _memory(self) -> tuple[int, ...]:
        return tuple(self._cache.stream.segment(0, role)[0].data_ptr() for role in (SOURCE, TARGET))

    @staticmethod
    def possible(device: torch.device) -> bool:
        """Whether graphs can be captured there."""
        return device.type == "cuda"

    def bucket(self, T: int) -> int:
        """The length at which a step of T rows is replayed; 0 if it is too long for any."""
        return next((n for n in BUCKETS if n >= T), 0)

    def replay(self, packed: Tensor, writes: bool) -> Tensor:
        """Run a step of a bucket's length: logits [B, vocab], a copy. The cache's device lengths have advanced then;
        tell the host (`StreamCache.replayed`)."""
        place, memory = (packed.shape[2], writes), self._memory()
        if memory != self._where:
            # select() gave the cache other buffers
            self._captured.clear()
            self._where = memory
        if place not in self._captured:
            self._captured[place] = self._capture(*place)
        found = self._captured[place]
        found.packed.copy_(packed, non_blocking=True)
        found.graph.replay()
        return found.logits.clone()

    def _capture(self, T: int, writes: bool) -> Captured:
        stream = self._cache.stream
        with torch.inference_mode(False):
            packed = torch.zeros(4, stream.batch, T, dtype=torch.int64, device=self._device)
        packed[2] = PADDING

        def step() -> Tensor:
            logits = self._run(packed, writes)
            self._cache.commit()
            return logits

        with unchanged_bounds(stream):
            self._warm(packed, writes)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
            graph, logits = capture(step, self._pool, self._device)
        return Captured(graph, packed, logits)

    def _warm(self, packed: Tensor, writes: bool) -> None:
        """Compile kernels and fill caches outside of the capture, on a stream of its own."""
        if self._device.type != "cuda":
            return
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(packed, writes)
                self._cache.discard()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
