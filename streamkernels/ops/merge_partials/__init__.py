"""Join the attention of disjoint key sets."""

from .api import merge_partials

__all__ = ["merge_partials"]
