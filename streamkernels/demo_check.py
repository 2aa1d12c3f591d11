"""The demo's proof: what a session computed step by step, beside one forward over the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .core.spans import from_limits
from .streaming import StreamModel


class Recorder:
    """A `StreamModel` that passes every call on and keeps the tokens, limits and logits of the rows that stayed."""

    def __init__(self, model: StreamModel) -> None:
        self.model = model
        self._forget()

    def _forget(self) -> None:
        self.source: list[int] = []
        self.target: list[int] = []
        self.limits: list[int] = []
        self.logits: list[Tensor] = []  # one [vocab] per target row
        self._staged: tuple[list[int], list[int], list[int], list[Tensor]] = ([], [], [], [])

    def step(self, source: Sequence[int], target: Sequence[int], limits: Sequence[int]) -> Tensor:
        """As `StreamModel.step`."""
        logits = self.model.step(source, target, limits)
        self._staged = (list(source), list(target), list(limits), list(logits))
        return logits

    def commit(self) -> None:
        """As `StreamModel.commit`."""
        self.model.commit()
        source, target, limits, logits = self._staged
        self.source += source
        self.target += target
        self.limits += limits
        self.logits += logits
        self._staged = ([], [], [], [])

    def discard(self) -> None:
        """As `StreamModel.discard`."""
        self.model.discard()
        self._staged = ([], [], [], [])

    def pop(self, n: int) -> None:
        """As `StreamModel.pop`."""
        self.model.pop(n)
        for rows in (self.target, self.limits, self.logits):
            del rows[len(rows) - n :]

    def reset(self) -> None:
        """As `StreamModel.reset`."""
        self.model.reset()
        self._forget()

    @torch.inference_mode()
    def one_shot_difference(self, model: Any) -> float:
        """The largest difference between the recorded logits and those of one forward over [source | target].

        model: the patched model that was recorded, with target positions from 0. The forward sees the same tokens
        under the same spans (`spans.from_limits`), through `span_attention` and without a cache: another code path.
        """
        if not self.logits:
            return 0.0
        S, T = len(self.source), len(self.target)
        device = self.logits[0].device
        positions = torch.cat([torch.arange(S), torch.arange(T)])[None].to(device)
        ids = torch.tensor([self.source + self.target], device=device)
        spans = from_limits(self.limits, S, device=device).bounds
        logits = model(input_ids=ids, position_ids=positions, spans=spans, use_cache=False, logits_to_keep=T).logits[0]
        streamed = torch.stack(self.logits)
        return (streamed - logits.to(streamed.dtype)).abs().max().item()
