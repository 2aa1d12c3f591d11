"""What a forward answers: logits become tokens here, for all sessions of a batch in one transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.shapes import refuse
from .protocols import Decoder, Step


@dataclass(frozen=True)
class Reply:
    """What a step answers: the logits [vocab] of its last target row and the token it means; None, -1 without one."""

    logits: torch.Tensor | None
    token: int


# a session's decoder, the tokens of its text, its step and that step's logits
Answered = tuple[Decoder | None, Sequence[int], Step, torch.Tensor]


def read_replies(answers: Sequence[Answered]) -> list[Reply | Exception]:
    """What each step's logits say, in one transfer for all; an exception where they are no logits, or not finite."""
    replies: list[Reply | Exception] = [Reply(None, -1)] * len(answers)
    rows: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for i, (decoder, tokens, step, logits) in enumerate(answers):
        if not step.target:
            continue
        try:
            last = _last(logits, len(step.target))
            largest, best = last.max(-1)
            if decoder is not None:
                best = decoder.choose(last, tokens)
        except Exception as error:
            replies[i] = error
        else:
            rows.append((i, last, largest, best))
    if not rows:
        return replies
    # max finds a NaN wherever it stands
    numbers = torch.stack([torch.stack([a.double(), b.double()]) for _, _, a, b in rows]).tolist()
    for (i, last, _, _), (largest, best) in zip(rows, numbers, strict=True):
        replies[i] = Reply(last, int(best))
        if not math.isfinite(largest):
            try:
                refuse("Session", "model.step(...)", "finite logits", f"{largest}: the step was discarded")
            except ValueError as error:
                replies[i] = error
    return replies


def _last(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """The last row, once the logits are seen to be logits."""
    fits = isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.dim() == 2
    if not fits or len(logits) not in (1, rows):
        refuse("Session", "model.step(...)", f"float logits [{rows}, vocab]", logits)
    return logits[-1].detach()
