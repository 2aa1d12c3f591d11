"""Exact match without a decoding loop.

Greedy decoding writes exactly the right text if and only if, along the right text, every prediction is right: as long
as no token has differed, the session has fed what teacher forcing feeds, and under a schedule that counts words the
limits are the same too. So one forward per batch under the wait-k spans tells which samples come out exactly.
`tests/examples` holds it against `StreamSession`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batches import IGNORED, by_length, collate
from generator import Sample
from torch import nn


@torch.inference_mode()
def exact(
    model: nn.Module, samples: Sequence[Sample], k: int | None, *, tokens: int = 32_768
) -> tuple[list[bool], float]:
    """Which samples a patched model writes exactly under wait-k (k=None: batch mode), and the share of right tokens.

    tokens: how many to put in one forward.
    """
    device = next(model.parameters()).device
    right: dict[int, bool] = {}
    hits = total = 0
    for batch in by_length(samples, tokens):
        inputs = {name: x.to(device) for name, x in collate(batch, [k] * len(batch)).items()}
        labels = inputs["labels"]
        rows = {name: inputs[name] for name in ("input_ids", "position_ids", "spans")}
        logits: Any = model(**rows, use_cache=False).logits
        hit = logits.argmax(-1) == labels
        hits += int(hit.sum())
        total += int((labels != IGNORED).sum())
        whole = (hit | (labels == IGNORED)).all(-1).tolist()
        right |= {id(sample): good for sample, good in zip(batch, whole, strict=True)}
    return [right[id(sample)] for sample in samples], hits / total
