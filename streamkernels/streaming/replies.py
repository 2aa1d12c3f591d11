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
    lasts: dict[int, torch.Tensor] = {}
    chosen: dict[int, torch.Tensor] = {}
    for i, (decoder, tokens, step, logits) in enumerate(answers):
        if not step.target:
            continue
        try:
            last = _last(logits, len(step.target))
            if decoder is not None:
                chosen[i] = decoder.choose(last, tokens)
            lasts[i] = last
        except Exception as error:
            replies[i] = error
    if not lasts:
        return replies
    # max finds a NaN wherever it stands
    largest, best = torch.stack(list(lasts.values())).max(-1)
    if chosen:
        best = torch.stack([chosen.get(i, best[n]) for n, i in enumerate(lasts)])
    numbers = torch.stack([largest.double(), best.double()]).tolist()
    for (i, last), top, token in zip(lasts.items(), *numbers, strict=True):
        replies[i] = Reply(last, int(token))
        if not math.isfinite(top):
            text = f"Session: model.step(...): expected finite logits, got {top}: the step was discarded"
            replies[i] = ValueError(text)
    return replies


def _last(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """The last row, once the logits are seen to be logits."""
    fits = isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.dim() == 2
    if not fits or len(logits) not in (1, rows):
        refuse("Session", "model.step(...)", f"float logits [{rows}, vocab]", logits)
    return logits[-1].detach()
