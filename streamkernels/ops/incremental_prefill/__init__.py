"""The streaming step of one layer: rotate, write, and attend over source, target and the new chunk."""

from __future__ import annotations

from .api import incremental_prefill
from .autograd import Options, attend

# the last two for a caller that keeps buffers of its own and says so in a `Staged`: nothing is checked
__all__ = ["Options", "attend", "incremental_prefill"]
