"""Hugging Face transformers: `patch` a model, stream it with `StreamSession`, or drive a `GroupedCache` by hand."""

from __future__ import annotations

from . import _release as _release  # first: refuses other releases
from .batch import SessionBatch
from .cache import GroupedCache
from .codec import ByteCodec, LeadingSpaceCodec, codec_for
from .compiling import STEP_OPTIONS
from .decoding import Decoding
from .patch import Handle, patch
from .stream import StreamSession

__all__ = [
    "ByteCodec",
    "Decoding",
    "GroupedCache",
    "Handle",
    "LeadingSpaceCodec",
    "STEP_OPTIONS",
    "SessionBatch",
    "StreamSession",
    "codec_for",
    "patch",
]
