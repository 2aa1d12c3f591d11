"""Summaries of spans per block of rows and of keys, from which kernels skip tiles."""

from .api import prepare

__all__ = ["prepare"]
