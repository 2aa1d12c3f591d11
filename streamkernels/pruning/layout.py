"""Which tokens of a prompt are vision, as a mask and, where the host must know, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.shapes import refuse

OP = "VisionLayout"


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """The vision tokens of one call's rows.

    vision: bool [B, T], True at vision tokens; any number of images, frames and texts between them. real: bool [B, T],
    False at padding, or None where there is none. counts: per sample how many tokens are real and how many of those
    are vision, once `read` has asked the device. host: the two masks on the CPU, likewise.
    """

    vision: Tensor
    real: Tensor | None = None
    counts: tuple[tuple[int, int], ...] | None = None
    host: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vision, Tensor) or self.vision.dtype != torch.bool or self.vision.dim() != 2:
            refuse(OP, "vision", "a bool tensor [B, T]", self.vision, TypeError)
        if self.real is None:
            return
        if not isinstance(self.real, Tensor) or self.real.dtype != torch.bool:
            refuse(OP, "real", "a bool tensor [B, T] or None", self.real, TypeError)
        if self.real.shape != self.vision.shape or self.real.device != self.vision.device:
            refuse(OP, "real", f"bool{list(self.vision.shape)} on {self.vision.device}", self.real)

    @classmethod
    def read(cls, vision: Tensor, real: Tensor | None = None, *, masks: bool = False) -> VisionLayout:
        """The layout with `counts`, by one read from the device: 8 bytes a sample, or the masks (2 T bytes a sample),
        which is what shallow stages need. A mask of ones is dropped."""
        mine = cls(vision, real)
        own = torch.ones_like(vision) if real is None else real
        pair = torch.stack([own, vision & own])
        if masks:
            both = pair.cpu()
            counts = both.sum(2, dtype=torch.int32).T.tolist()
            host = (both[0], both[1])
        else:
            counts, host = pair.sum(2, dtype=torch.int32).T.tolist(), None
        whole = all(real_count == vision.shape[1] for real_count, _ in counts)
        return cls(mine.vision, None if whole else real, tuple((n, v) for n, v in counts), host)
