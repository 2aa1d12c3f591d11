"""The streaming step of one layer: rotate, write, and attend over source, target and the new chunk."""

from __future__ import annotations

from .api import incremental_prefill

__all__ = ["incremental_prefill"]
