"""Moving cached keys to other positions, in place."""

from __future__ import annotations

from .api import reanchor

__all__ = ["reanchor"]
