"""Few rows of a prompt behind nothing, as most layers of a pruned prompt have: one op rotates them, writes their keys
where generated tokens find room behind them, and attends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ...core.segments import allocate
from ...core.staging import SOURCE, Staged
from ...ops.incremental_prefill import Options, attend
from ...ops.rotate import rotate
from .fused import half, linear
from .prune_forward import Pass

# tokens that fit behind the keys before they are moved; then as many as were generated
ROOM = 128
# rows from which on PyTorch's attention and transformers' operations take the GPU longer than the host
FEW = 128


class Halves:
    """cos and sin as the op takes them, made once for all layers that are given the same."""

    def __init__(self, text: Any, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._given: Any = None
        self._made: tuple[Tensor, Tensor] | None = None
        sections = getattr(text.rotary_emb, "mrope_section", None) or text.config.rope_parameters.get("mrope_section")
        self._sections: list[int] = list(sections or ())

    def of(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[1 or B, T, D / 2] each."""
        if self._made is None or angles is not self._given:
            cos, sin = (half(self._joined(table), self._dtype) for table in angles)
            self._given, self._made = angles, (cos, sin)
        return self._made

    def _joined(self, table: Tensor) -> Tensor:
        """cos or sin [1 or B, T, D]; M-RoPE's [3, 1 or B, T, D] before transformers 5.17, put together."""
        if table.dim() == 3:
            return table
        parts = table.split(self._sections * 2, dim=-1)
        return torch.cat([part[n % 3] for n, part in enumerate(parts)], dim=-1)


class Fresh:
    """The layers of few rows of one prompt on an empty DynamicCache."""

    def __init__(self, text: Any, cache: Any, backend: str) -> None:
        first, device = text.layers[0].self_attn, text.device
        self._text, self._cache, self._backend, self._dtype = text, cache, backend, text.dtype
        self._heads = (text.config.num_key_value_heads, first.head_dim)
        self._halves = Halves(text, text.dtype)
        self._status = torch.zeros(1, dtype=torch.int32, device=device)
        self._nothing: Tensor | None = None

    def takes(self, step: Pass, layer: int, rows: int) -> bool:
        """Whether a layer of so many rows is one that this can compute."""
        return rows <= FEW and step.is_plain_prompt(layer) and layer <= len(self._cache.layers)

    def attend(self, step: Pass, module: Any, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The attention of one layer for x [B, T, C], before its output projection: [B, T, H * D]; scores and selects
        where due. The cache's layer holds the keys then."""
        (B, T, _), (HK, D), layer = x.shape, self._heads, module.layer_idx
        parts = module._modules
        q, k, v = (linear(parts[n], x).view(B, T, -1, D).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
        cos, sin = self._halves.of(angles)
        if self._nothing is None:
            self._nothing = torch.zeros((B, 2), dtype=torch.int32, device=x.device)
        buffers = allocate((2, B, HK, T + ROOM, D), self._dtype, x.device).unbind(0)
        (source_k, target_k), (source_v, target_v) = ((b[:, :, :T], b[:, :, T:]) for b in buffers)
        rings = (None, None)
        staged = Staged(
            source_k, source_v, target_k, target_v, self._nothing, self._status, None, SOURCE, False, 0, rings, None
        )
        options = Options(None, None, None, (0, 0), float(module.scaling), 0.0, False, self._backend)
        o, lse = attend(q, k, v, cos, sin, None, staged, options)
        self._keep(layer, source_k, source_v)
        step.made[layer] = source_k, source_v, buffers
        stages = step.selects
        if stages is not None and stages.probes(layer):
            if stages.needs_scores(layer):
                q_last = rotate(step.last(layer, q), step.last_of(layer, cos), step.last_of(layer, sin))
                step.score(layer, q_last, source_k, source_v, o, lse, module.scaling)
            else:
                stages.decide(layer, None)
        return o.transpose(1, 2).reshape(B, T, -1)

    def _keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """What `DynamicCache.update` does to a layer without keys, but for copying them."""
        layers = self._cache.layers
        if layer == len(layers):
            layers.append(DynamicLayer())
        own = layers[layer]
        own.dtype, own.device = keys.dtype, keys.device
        own.keys, own.values, own.is_initialized = keys, values, True
