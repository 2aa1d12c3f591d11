"""Rotating new keys and writing them, with their values, to the segments of a cache."""

from __future__ import annotations

from .api import rotate_append

__all__ = ["rotate_append"]
