"""Attention of query rows over one key/value buffer, each row seeing a few intervals of keys."""

from .api import span_attention

__all__ = ["span_attention"]
