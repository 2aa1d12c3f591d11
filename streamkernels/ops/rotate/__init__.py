"""Rotary position embedding of queries or keys."""

from __future__ import annotations

from .api import rotate

__all__ = ["rotate"]
