"""Hugging Face transformers: `patch` a model, stream it with `StreamSession`, or drive a `GroupedCache` by hand."""

from __future__ import annotations

from . import _release as _release  # first: refuses other releases
from .cache import GroupedCache
from .codec import ByteCodec, LeadingSpaceCodec, codec_for
from .patch import Handle, patch
from .stream import StreamSession

__all__ = ["ByteCodec", "GroupedCache", "Handle", "LeadingSpaceCodec", "StreamSession", "codec_for", "patch"]
