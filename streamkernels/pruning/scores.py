"""What a layer knows when its vision tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.shapes import refuse
from ..ops.token_scores import TokenScores, token_scores


@dataclass(frozen=True, eq=False)
class Probe:
    """One layer at the prompt's last token, for scoring the vision tokens that are left.

    layer: from 0. q, o: [B, H, 1, D], the last token's rotated query and its attention output (before the output
    projection). lse: [B, H, 1]. k, v: [B, HK, S, D], the layer's keys, which may have a tail that means nothing.
    index: int32 [B, K], the keys that are vision tokens of this prompt, ascending, then -1; count: int32 [B]. scale: of
    the scores.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    index: Tensor
    count: Tensor
    scale: float | None

    def scores(self) -> TokenScores:
        """`token_scores` of the listed keys: cosine, norm and mass, each [B, K]."""
        given = (self.q, self.k, self.v, self.o, self.lse, self.index, self.count)
        return token_scores(*given, scale=self.scale)

    def by(self, score: object) -> Tensor:
        """[B, K] by "norm", "attention" or a function of this probe; high is good."""
        if score == "norm":
            return self.scores().norm
        if score == "attention":
            return self.scores().mass / self.q.shape[1]
        if not callable(score):
            refuse("Probe.by", "score", "'norm', 'attention' or a function", score, TypeError)
        given = score(self)
        if not isinstance(given, Tensor) or given.shape != self.index.shape or not torch.is_floating_point(given):
            expected = f"a function that returns floats {list(self.index.shape)}, one for each entry of probe.index"
            refuse("VisionPruning", "score", expected, given)
        return given
