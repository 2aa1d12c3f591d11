"""Dropping vision tokens by what they contribute: the configuration, the stages of one prefill, the report."""

from __future__ import annotations

from .config import VisionPruning
from .layout import VisionLayout
from .report import Report, Times
from .scores import Probe

__all__ = ["Probe", "Report", "Times", "VisionLayout", "VisionPruning"]
