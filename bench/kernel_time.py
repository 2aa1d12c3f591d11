"""Device time of a call: a CUDA graph over rotating inputs, replayed and timed by events; medians.

Timed inputs rotate through more than twice the L2, so that each call finds its inputs in HBM ("cold").
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

# set by conftest.py's --compile-only: every call runs once, so that all kernels are compiled, and nothing is timed
compile_only = False


def copies_for_cold_l2(bytes_per_call: int, device: torch.device | str = "cuda") -> int:
    """How many input sets a timed loop must rotate through to read more than twice the L2 between two uses of one
    set."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-2 * l2 // max(bytes_per_call, 1)) + 1)


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextlib.contextmanager
def capture_stream() -> Iterator[None]:
    """The stream that graphs are captured on: a backward runs on the stream of its forward, so a forward whose backward
    is to be captured must run here. Nothing changes without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All `calls` in one graph, in turn, after each has run once."""
    with capture_stream():
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_stream()):
            for call in calls:
                call()
    return graph


def replay_time(graph: torch.cuda.CUDAGraph, *, replays: int = 20, seconds: float = 0.25) -> float:
    """Median device microseconds of one replay: `replays` of them, fewer (at least 5) if they take longer than
    `seconds` together."""
    graph.replay()
    times: list[float] = []
    while len(times) < replays and (len(times) < 5 or sum(times) < seconds * 1e6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def graph_time(calls: Sequence[Callable[[], object]], *, replays: int = 20) -> float:
    """Median device microseconds of one call: all `calls` captured in one graph in turn, the graph replayed."""
    if compile_only:
        calls[0]()
        torch.cuda.synchronize()
        return math.nan
    return replay_time(capture(calls), replays=replays) / len(calls)


def host_time(call: Callable[[], object], *, calls: int = 200, repeats: int = 7) -> float:
    """Median host-visible microseconds of one eager call: back-to-back calls, then one synchronisation."""
    if compile_only:
        call()
        return math.nan
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6 / calls)
    return statistics.median(times)
