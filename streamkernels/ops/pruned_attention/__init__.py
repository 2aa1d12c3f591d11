"""Causal attention with vision keys skipped, pooled or kept by layer."""

from .api import pruned_attention

__all__ = ["pruned_attention"]
