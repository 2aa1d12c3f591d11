"""What pruning costs and saves on a device, from measurements that are committed here, never from timing in a call.

An entry says how long a decoder layer takes for so many rows, as a straight line, and what probing one layer adds to it
(scores, selection, the read by the host, the launches that wait for it). `verdict` compares what the rows that vanish
save at best with what finding them costs at least: "no" is therefore certain, "yes" means possible.
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
    max(`least`, `per_row` * n), probing a layer adds `probe`. commit: of the measurement."""

    device: str
    macs: int
    least: float
    per_row: float
    probe: float
    commit: str

    def layer(self, rows: int, shape: ModelShape) -> float:
        """Microseconds of one layer of `shape` for so many rows."""
        return max(self.least, self.per_row * rows * shape.row_macs() / self.macs)


@dataclass(frozen=True)
class Verdict:
    """profitable: True, False or, without an entry for the device, None. text: why."""

    profitable: bool | None
    text: str


# by the name that torch.cuda.get_device_name gives; none has been measured and committed yet
COSTS: Mapping[str, Cost] = {}


def verdict(config: VisionPruning, shape: ModelShape, device: str, batch: int, tokens: int, vision: int) -> Verdict:
    """Whether pruning `vision` of the `tokens` rows of each of `batch` samples can pay on the device of that name."""
    cost = COSTS.get(device)
    if cost is None:
        return Verdict(None, f"unknown, no committed costs for {device!r}")
    dense = shape.layers * cost.layer(batch * tokens, shape)
    if config.schedule is None:
        # at best the first probed layer filters and the exit follows as soon as it may
        probes = config.first_probe_layer + 1
        ours = probes * cost.layer(batch * tokens, shape) + cost.probe
        ours += (shape.layers - probes) * cost.layer(batch * (tokens - vision), shape)
    else:
        left = [len_left(config, layer, vision) for layer in range(shape.layers)]
        ours = sum(cost.layer(batch * (tokens - vision + n), shape) for n in left) + len(config.schedule) * cost.probe
    saved = (dense - ours) / 1000
    text = f"{saved:.2f} ms of a prefill {'at best' if config.schedule is None else ''}".strip()
    if saved > 0:
        return Verdict(True, f"yes, {text} saved on {device!r} (costs of commit {cost.commit})")
    lost = f"{-saved:.2f} ms of a prefill lost at least"
    return Verdict(False, f"no, {lost} on {device!r} (costs of commit {cost.commit})")
