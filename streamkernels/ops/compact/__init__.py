"""Gather the listed rows of a tensor into a shorter one."""

from .api import compact

__all__ = ["compact"]
