"""What pruning costs and saves on a device, from measurements that are committed here, never from timing in a call.

An entry says how long a decoder layer takes for so many rows, as a straight line, what the host takes to launch one in
eager mode, and what probing one layer adds there (scores, selection, the read by the host, the launches that wait for
it). `verdict` compares what the rows that vanish save at best with what finding them costs at least: "yes" means
possible; "no" is certain where the host is not much faster than the one of the measurement. In a CUDA graph the host
costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import VisionPruning
from .report import ModelShape
from .stages import len_left


@dataclass(frozen=True)
class Cost:
    """Microseconds, measured on `device` for a layer of `macs` multiply-accumulates a row: a layer of n rows takes
    max(`least`, `per_row` * n) there, and no less than `launch` in eager mode, where probing a layer adds `probe`.
    commit: of the measurement (`bench/bench_pruned_models.py`)."""

    device: str
    macs: int
    least: float
    per_row: float
    probe: float
    commit: str
    launch: float = 0.0

    def layer(self, rows: int, shape: ModelShape, captured: bool = False) -> float:
        """Microseconds of one layer of `shape` for so many rows, in eager mode or captured in a CUDA graph."""
        least = self.least if captured else max(self.least, self.launch)
        return max(least, self.per_row * rows * shape.row_macs() / self.macs)


@dataclass(frozen=True)
class Verdict:
    """profitable: True, False or, without an entry for the device, None. text: why."""

    profitable: bool | None
    text: str


LAUNCHES = "; the host's launches take that time, in a CUDA graph pruning may pay"
# by the name that torch.cuda.get_device_name gives. H200: LLaVA-1.5-7B's shape, torch 2.11, as `prune_vision` leaves
# it; captured prefills of 624 and 64 rows; the host, a virtual machine: an eager prefill of 64 rows, and what 16 probes
# added to one of 576 vision tokens
COSTS: Mapping[str, Cost] = {
    "NVIDIA H200": Cost("NVIDIA H200", 202_375_168, 176.0, 0.87, 417.0, "0bdf90c", launch=414.0),
}


def verdict(
    config: VisionPruning,
    shape: ModelShape,
    device: str,
    batch: int,
    tokens: int,
    vision: int,
    *,
    captured: bool = False,
) -> Verdict:
    """Whether pruning `vision` of the `tokens` rows of each of `batch` samples can pay on the device of that name, in
    eager mode or `captured` in a CUDA graph."""
    cost = COSTS.get(device)
    if cost is None:
        return Verdict(None, f"unknown, no committed costs for {device!r}")

    def layer(rows: int) -> float:
        return cost.layer(batch * rows, shape, captured)

    dense, probe = shape.layers * layer(tokens), 0.0 if captured else cost.probe
    if config.schedule is None:
        # at best the first probed layer filters and the exit follows as soon as it may
        probes = config.first_probe_layer + 1
        ours = probes * layer(tokens) + probe + (shape.layers - probes) * layer(tokens - vision)
    else:
        left = [len_left(config, index, vision) for index in range(shape.layers)]
        ours = sum(layer(tokens - vision + n) for n in left) + len(config.schedule) * probe
    saved = (dense - ours) / 1000
    where = f"on {device!r} (costs of commit {cost.commit})"
    if saved > 0:
        text = f"{saved:.2f} ms of a prefill {'at best' if config.schedule is None else ''}".strip()
        return Verdict(True, f"yes, {text} saved {where}")
    text = f"no, {-saved:.2f} ms of a prefill lost at least {where}"
    in_a_graph = not captured and verdict(config, shape, device, batch, tokens, vision, captured=True).profitable
    return Verdict(False, text + (LAUNCHES if in_a_graph else ""))
