"""Attention for streaming language models: group position encoding, and vision-token pruning by value.

`import streamkernels` loads neither triton nor the CUDA extension nor transformers: kernels load when first used,
Hugging Face support when `patch` or `StreamSession` is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from ._ext import CudaError, cuda_status
    from .backends.select import explain
    from .backends.triton import warmup
    from .core import positions, spans
    from .core.cache import PADDING, SOURCE, TARGET, StreamCache
    from .core.positions import Rotary
    from .core.spans import Rule, Spans
    from .integrations.transformers import STEP_OPTIONS, GroupedCache, SessionBatch, StreamSession
    from .integrations.transformers.patch import patch
    from .integrations.transformers.prune import prune_vision
    from .ops.compact import compact
    from .ops.incremental_prefill import incremental_prefill
    from .ops.merge_partials import merge_partials
    from .ops.prepare import prepare
    from .ops.pruned_attention import pruned_attention
    from .ops.reanchor import reanchor
    from .ops.rotate import rotate
    from .ops.rotate_append import rotate_append
    from .ops.select_tokens import select_tokens, visipruner_exit, visipruner_select
    from .ops.span_attention import span_attention
    from .ops.token_scores import token_scores
    from .pruning import VisionPruning
    from .streaming import ReadAll, Session, Threshold, WaitK

_HOMES = {
    "CudaError": "._ext",
    "cuda_status": "._ext",
    "explain": ".backends.select",
    "warmup": ".backends.triton",
    "PADDING": ".core.cache",
    "SOURCE": ".core.cache",
    "TARGET": ".core.cache",
    "StreamCache": ".core.cache",
    "Rotary": ".core.positions",
    "Rule": ".core.spans",
    "Spans": ".core.spans",
    "GroupedCache": ".integrations.transformers",
    "SessionBatch": ".integrations.transformers",
    "STEP_OPTIONS": ".integrations.transformers",
    "StreamSession": ".integrations.transformers",
    "patch": ".integrations.transformers",
    "prune_vision": ".integrations.transformers.prune",
    "compact": ".ops.compact",
    "incremental_prefill": ".ops.incremental_prefill",
    "merge_partials": ".ops.merge_partials",
    "prepare": ".ops.prepare",
    "pruned_attention": ".ops.pruned_attention",
    "reanchor": ".ops.reanchor",
    "rotate": ".ops.rotate",
    "rotate_append": ".ops.rotate_append",
    "select_tokens": ".ops.select_tokens",
    "visipruner_exit": ".ops.select_tokens",
    "visipruner_select": ".ops.select_tokens",
    "span_attention": ".ops.span_attention",
    "token_scores": ".ops.token_scores",
    "VisionPruning": ".pruning",
    "ReadAll": ".streaming",
    "Session": ".streaming",
    "Threshold": ".streaming",
    "WaitK": ".streaming",
}
_MODULES = {"spans": ".core.spans", "positions": ".core.positions"}

__all__ = [
    "__version__",
    "compact",
    "cuda_status",
    "CudaError",
    "explain",
    "GroupedCache",
    "incremental_prefill",
    "merge_partials",
    "PADDING",
    "patch",
    "positions",
    "prepare",
    "prune_vision",
    "pruned_attention",
    "ReadAll",
    "reanchor",
    "Rotary",
    "rotate",
    "rotate_append",
    "Rule",
    "select_tokens",
    "Session",
    "SessionBatch",
    "SOURCE",
    "span_attention",
    "Spans",
    "spans",
    "STEP_OPTIONS",
    "StreamCache",
    "StreamSession",
    "TARGET",
    "Threshold",
    "token_scores",
    "visipruner_exit",
    "visipruner_select",
    "VisionPruning",
    "WaitK",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name], __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module 'streamkernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
