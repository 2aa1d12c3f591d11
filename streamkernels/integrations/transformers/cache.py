"""The two-segment cache in the shape that Hugging Face models take: `past_key_values=GroupedCache(...)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ...core.cache import SOURCE, TARGET, StreamCache
from ...core.shapes import refuse
from .model import base_of, check_supported, devices, head_dims, kv_heads
from .rotary import rotary_of
from .windows import KeyPositions


@dataclass
class Turns:
    """How many layers may still pass their keys on: none outside a patched forward, where nobody would write them."""

    left: int = 0


class GroupedLayer(CacheLayerMixin):
    """One layer as Hugging Face sees it. Our attention function writes keys, so `update` passes them on untouched."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, stream: StreamCache, index: int, turns: Turns) -> None:
        super().__init__()
        self.stream, self.index, self.turns = stream, index, turns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the StreamCache is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values on; the attention function of the same layer writes them."""
        if self.turns.left < 1:
            refuse(
                "GroupedCache.update",
                "model",
                "a model patched by streamkernels.patch",
                "one that is not (or no longer) patched",
            )
        self.turns.left -= 1
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Committed source and target tokens of the longest row (an upper bound that needs no device read).

        0 while torch.compile traces: a length would be compiled into the graph, and only masks that nobody builds and
        positions that are always given ask for it there."""
        if torch.compiler.is_compiling():
            return 0
        return sum(self.stream.longest(role, self.index) for role in (SOURCE, TARGET))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys of both segments with this call's, offset 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Source plus target capacity of a fixed cache, else -1."""
        return sum(self.stream.capacity(self.index, role) for role in (SOURCE, TARGET)) if self.stream.fixed else -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` before transformers 5.13."""
        return self.get_max_length()

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.stream.batch

    def _whole(self, *args: Any) -> None:
        raise NotImplementedError(
            "GroupedCache: layers: change the cache as a whole (cache.crop, cache.reset, ...), not one layer"
        )

    crop = reset = reorder_cache = batch_select_indices = batch_repeat_interleave = offload = prefetch = _whole


class GroupedCache(Cache):
    """A `StreamCache` (source and target segments) behind Hugging Face's cache interface, for patched models only.

    A forward of a patched model with `past_key_values=cache, role=..., position_ids=...` writes the new keys beyond
    the committed length and attends; `cache.commit()` then makes them part of the cache, `cache.discard()` forgets
    them. Positions are the caller's: count source and target apart. `generate()` is not supported; `StreamSession` is
    the loop.

    stream: the StreamCache, one layer per decoder layer of the model.
    """

    def __init__(self, stream: StreamCache) -> None:
        self._turns = Turns()
        super().__init__(layers=[GroupedLayer(stream, index, self._turns) for index in range(stream.layers)])
        self.stream = stream
        self._keys: KeyPositions | None = None

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        batch: int = 1,
        *,
        capacity: int | tuple[int, int] = (256, 256),
        fixed: bool = False,
        window: int | tuple[int | None, int | None] | None = None,
        sinks: int = 0,
        max_chunk: int = 1,
        dtype: torch.dtype | None = None,
    ) -> GroupedCache:
        """An empty cache that fits `model`: heads, head dim, device of every layer, and how its keys are rotated.

        model: a model that `patch` accepts, patched or not. batch: rows. dtype: of the keys, default the model's
        (give the autocast dtype under autocast). The other arguments are `StreamCache`'s. Raises what `patch` raises
        for the model.
        """
        base = base_of("GroupedCache.for_model", model)
        check_supported("GroupedCache.for_model", base)
        stream = StreamCache(
            layers=len(base.layers),
            batch=batch,
            kv_heads=kv_heads(base),
            head_dim=head_dims(base),
            dtype=dtype or base.dtype,
            device=devices(base),
            capacity=capacity,
            fixed=fixed,
            window=window,
            sinks=sinks,
            max_chunk=max_chunk,
            rotary=rotary_of(base),
        )
        return cls(stream)

    def commit(self) -> None:
        """Make the last forward's keys part of the cache (`StreamCache.commit`)."""
        self._turns.left = 0
        self.stream.commit()

    def discard(self) -> None:
        """Forget the last forward (`StreamCache.discard`)."""
        self._turns.left = 0
        self.stream.discard()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` target tokens of every row. Zero is nothing; a positive count is refused,
        since transformers changed its meaning between releases."""
        if tokens_to_remove > 0:
            refuse(
                "GroupedCache.crop",
                "tokens_to_remove",
                "a count <= 0: minus the number of target tokens to drop",
                tokens_to_remove,
            )
        if tokens_to_remove < 0:
            self.stream.pop(-tokens_to_remove, TARGET)

    def reset(self, row: int | None = None) -> None:
        """Empty both segments of every row, or of one."""
        self._settle_positions()
        if row is None:
            self._turns.left = 0
        self.stream.reset(row)
        if self._keys is not None:
            self._keys.arrangement = self.stream._arrangement

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` (int64 [B]) was."""
        self._settle_positions()
        self.stream.reorder(beam_idx)
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows `indices` (int64), in that order."""
        self._settle_positions()
        self.stream.select(indices)
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self.batch_select_indices(torch.arange(self.stream.batch).repeat_interleave(repeats))

    def reserve(self, source: int = 0, target: int = 0) -> None:
        """Make room for that many more rows per session (`StreamCache.reserve`): before a compiled or captured step."""
        self.stream.reserve(source, target)
        if self._keys is not None:
            self._keys.fit(max(source, target))

    def key_positions(self) -> KeyPositions:
        """Where the cached keys stand, which only a sliding window by position needs: kept from the first call on."""
        if self._keys is None:
            self._keys = KeyPositions(self.stream)
        if not torch.compiler.is_compiling():
            self._keys.check()
        return self._keys

    def _settle_positions(self) -> None:
        if self._keys is not None:
            self._keys.check()

    def _take(self, rows: Tensor) -> None:
        if self._keys is not None:
            self._keys.take(rows)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError("GroupedCache: offloading to the CPU is not supported")

    def grant(self, turns: int) -> None:
        """Let the next `turns` layers pass their keys on: the pre-hook's leave for one forward of a patched model."""
        self._turns.left = turns
