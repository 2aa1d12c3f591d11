"""The report of one pass, from the numbers that it left on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...pruning.config import VisionPruning
from ...pruning.keys import Keys
from ...pruning.report import ModelShape, Report
from .prune_forward import Pass


def report_of(
    shape: ModelShape,
    config: VisionPruning,
    step: Pass,
    layout_reads: int,
    verdict: str,
    element_size: int,
    decode: str,
) -> Report:
    """What `step` did. Copies counts from the device, once."""
    stages, first = step.selects, step.first
    layers = [rows for rows in step.rows if rows is not None]
    left = [rows for layer in range(len(layers)) if (rows := step.left(layer)) is not None]
    if stages is None or first is None or len(layers) < shape.layers:
        raise RuntimeError("streamkernels: a report of a forward that pruned nothing")
    distinct = {id(rows): rows for rows in [first, *layers, *left]}
    table = torch.stack([x for rows in distinct.values() for x in (rows.count, rows.vision_count)]).tolist()
    numbers = {key: (tuple(table[2 * n]), tuple(table[2 * n + 1])) for n, key in enumerate(distinct)}
    seen = {id(keys): _seen(keys, step.B) for keys in step.keys}
    ends = torch.stack([stages.filter_layer, stages.exit_layer]).tolist()
    return Report(
        model=shape,
        config=config.name,
        tokens=step.T,
        past=step.past,
        vision=numbers[id(first)][1],
        real=numbers[id(first)][0],
        width=[rows.width for rows in layers],
        cached=list(step.cached),
        rows=[numbers[id(rows)][0] for rows in layers],
        vision_rows=[numbers[id(rows)][1] for rows in left],
        seen=[seen[id(keys)] for keys in step.keys],
        filter_layer=tuple(ends[0]),
        exit_layer=tuple(ends[1]),
        probe_reads=stages.reads,
        layout_reads=layout_reads + step.cache_reads,
        element_size=element_size,
        verdict=verdict,
        decode=decode,
    )


def _seen(keys: Keys, B: int) -> tuple[int, ...]:
    total: Any = torch.zeros(B, dtype=torch.int64)
    for block in keys.blocks:
        count: Tensor | int = block.width if block.count is None else block.count.cpu()
        total = total + count
    return tuple(total.tolist())
