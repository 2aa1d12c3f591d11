"""Launch select_tokens: one kernel, no synchronisation."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..device.launch import Launch, on_device_of, signature
from ..device.memory import remembered
from .forward import select_tokens_kernel

# entries of one step: a row of an image fits in one, and more threads would wait for each other longer
BLOCK, WARPS = 4096, 16

# by the signature of a call
PLANS: dict[Any, Launch] = {}


def select_tokens(
    scores: Tensor, index: Tensor | None, count: Tensor | None, threshold: float | None, limit: int, width: int,
    largest: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """int32 [B, width] with -1 behind the kept, int32 [B]; the op's raw arguments, already checked."""
    B = scores.shape[0]
    kept = torch.empty((B, width), dtype=torch.int32, device=scores.device)
    kept_count = torch.empty((B,), dtype=torch.int32, device=scores.device)
    if B:
        key = (threshold, limit, width, largest, signature(scores, index, count))
        launch = remembered(PLANS, key, lambda: _plan(scores, index, count, threshold, limit, width, largest))
        with on_device_of(scores):
            launch(scores, kept if index is None else index, kept if count is None else count, kept, kept_count)
    return kept, kept_count


def _plan(
    scores: Tensor, index: Tensor | None, count: Tensor | None, threshold: float | None, limit: int, width: int,
    largest: bool,
) -> Launch:  # fmt: skip
    B, K = scores.shape
    # the reference compares in the dtype of the scores: the threshold is rounded to it, on the host
    cut = 0.0 if threshold is None else float(torch.tensor(threshold).to(scores.dtype))
    numbers = (
        cut, K, limit, width, *scores.stride(), *((0, 0) if index is None else index.stride()),
        0 if count is None else count.stride(0),
    )  # fmt: skip
    return Launch(
        select_tokens_kernel, (max(1, triton.cdiv(K, BLOCK)), B), numbers,
        THRESHOLD=threshold is not None, LIMIT=limit < K, LARGEST=largest, HAS_INDEX=index is not None,
        HAS_COUNT=count is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
