"""Device time of a call: a CUDA graph over rotating inputs, replayed and timed by events; medians.

Timed inputs rotate through more than twice the L2, so that each call finds its inputs in HBM ("cold").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def copies_for_cold_l2(bytes_per_call: int, device: torch.device | str = "cuda") -> int:
    """How many input sets a timed loop must rotate through to read more than twice the L2 between two uses of one
    set."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-2 * l2 // max(bytes_per_call, 1)) + 1)


def graph_time(calls: Sequence[Callable[[], object]], *, replays: int = 20) -> float:
    """Median device microseconds of one call: all `calls` captured in one graph in turn, the graph replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def host_time(call: Callable[[], object], *, calls: int = 200, repeats: int = 7) -> float:
    """Median host-visible microseconds of one eager call: back-to-back calls, then one synchronisation."""
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
