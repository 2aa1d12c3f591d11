"""From scores to a compact list of kept tokens, on the device."""

from .api import select_tokens
from .visipruner import visipruner_exit, visipruner_select

__all__ = ["select_tokens", "visipruner_exit", "visipruner_select"]
