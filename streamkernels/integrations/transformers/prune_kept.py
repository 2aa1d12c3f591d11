"""Pruning without compaction: the cache stays whole, and each prompt attends to the vision keys that it selects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.shapes import refuse
from ...core.spans import ATTEND, KEPT, Spans
from ...ops.prepare import prepare
from ...pruning.keys import SLOTS, Block, Keys, bounds_of
from ...pruning.layout import VisionLayout
from ...pruning.stages import Rows, Stages
from .prune_forward import Pass, Table
from .prune_ledger import ledger_of
from .prune_models import OP


class KeptPass(Pass):
    """A prompt that selects among all vision keys of its cache: its stages are over keys, not over rows."""

    def __init__(self, *args: Any, sees: bool) -> None:
        """sees: whether this prompt brings vision tokens. The rest is as in Pass."""
        super().__init__(*args)
        self._sees = sees
        self.asks: Stages | None = None
        self.begun: Rows | None = None  # what the stages begin with: all keys that mean something
        self.lists: list[Rows | None] = []  # of each layer that has begun
        self._made: dict[int, Keys] = {}

    @property
    def selects(self) -> Stages | None:
        """The stages over keys."""
        return self.asks

    def left(self, layer: int) -> Rows | None:
        """The keys that the layer's text rows see."""
        return self.lists[layer]

    def open(self, cache: Any) -> None:
        """Before layer 0: the keys, whatever earlier prompts selected."""
        super().open(cache)
        if self.stages is None or cache is None:
            return
        whole = ledger_of(cache).whole.and_open(self.past)
        self.keys = [whole] * self.layers

    def before(self, layer: int, hidden: Tensor, tables: Table, position_ids: Tensor | None) -> tuple[Tensor, Table]:
        """Before a layer: its rows, all of them; and the keys that are left."""
        out = super().before(layer, hidden, tables, position_ids)
        if layer == 0 and self.stages is not None:
            self._ask(self.stages)
        elif self.asks is not None:
            self.asks.take()
        self.lists.append(None if self.asks is None else self.asks.rows)
        return out

    def _ask(self, stages: Stages) -> None:
        whole, rows = self.keys[0], stages.rows
        earlier = None if self.cache is None else ledger_of(self.cache).vision
        if earlier is None and not self._sees:
            return
        B, device = self.B, rows.origin.device
        before = torch.zeros((B, 0), dtype=torch.bool, device=device) if earlier is None else earlier[:, : whole.width]
        before = pad(before, (0, whole.width - before.shape[1]))
        own = torch.arange(rows.width, device=device) < rows.count[:, None]
        vision = torch.cat([before, rows.is_vision], 1)
        live = torch.cat([whole.live(B, device), own], 1)
        layout = VisionLayout(vision, live)
        if self.config.reads_layout:
            layout = VisionLayout.read(vision, live)
            self.cache_reads += 1
        self.asks = Stages(self.config, self.layers, layout)
        self.asks.start()
        self.begun = self.asks.rows

    def vision_keys(self, layer: int) -> Tensor:
        """int32 [B, K]: the vision keys that are left, then -1."""
        rows = self.lists[layer]
        if rows is None:
            raise RuntimeError("streamkernels: a forward without vision keys asks for none")
        listed = rows.origin.gather(1, rows.vision.clamp(min=0).long())
        return listed.masked_fill(rows.vision < 0, -1)

    def prompt_spans(self, layer: int, q: Tensor, k: Tensor) -> tuple[Spans, Table]:
        """As in Pass until something is dropped; then text rows see what is left, vision rows all before them."""
        rows, left = self.rows[layer], self.lists[layer]
        if rows is None or left is None or left is self.begun:
            return super().prompt_spans(layer, q, k)
        keys = self.keys[layer]
        same = (id(keys), id(left), None)
        if same not in self._prepared:
            at = torch.arange(rows.width, dtype=torch.int32, device=q.device)[None]
            end = at + (keys.width + 1)
            columns = [(torch.zeros_like(end), end.masked_fill(rows.is_vision, 0))]
            runs = [(begin, until[:, None]) for begin, until in keys.runs] + [(keys.begin, end)]
            if len(runs) + 1 > SLOTS[-1]:
                expected = f"a cache of fewer prompts than {SLOTS[-1] - 1} with padding"
                refuse(OP, "past_key_values", expected, f"{len(runs)} runs of keys", NotImplementedError)
            for begin, until in runs:
                columns.append((torch.full_like(end, begin), torch.where(rows.is_vision, until, 0)))
            bounds = bounds_of(columns, self.B, at < rows.count[:, None])
            HK = k.shape[1]
            spans = Spans(
                bounds,
                rules=(KEPT,) + (ATTEND,) * (bounds.shape[2] - 1),
                kept=left.origin[:, None].expand(-1, HK, -1).contiguous(),
                kept_count=left.count[:, None].expand(-1, HK).contiguous(),
            )
            self._prepared[same] = spans, prepare(spans, k.shape[2])
        return self._prepared[same]

    def _is_causal(self, layer: int, q: Tensor, k: Tensor) -> bool:
        left = self.lists[layer]
        return (left is None or left is self.begun) and super()._is_causal(layer, q, k)

    def close(self, hidden: Tensor) -> Tensor:
        """After the last layer: the ledger learns what the cache got and what each layer's later rows see of it."""
        if self.stages is None or self.first is None:
            return super().close(hidden)
        cache, rows, guesses = self.forget(), self.first, self.stages.guesses
        if cache is not None:
            ledger = ledger_of(cache)
            whole = self.keys[0].and_rows(rows, guesses=guesses)
            self.cached = [rows.width] * self.layers
            ledger.whole, ledger.keys = whole, [self._seen(layer, whole) for layer in range(self.layers)]
            if self.asks is not None:
                ledger.vision = self.asks.layout.vision[:, : whole.width]
        return hidden if rows.whole else rows.back(hidden, self.T)

    def _seen(self, layer: int, whole: Keys) -> Keys:
        left = self.lists[layer]
        if left is None or left is self.begun:
            return whole
        if id(left) not in self._made:
            S = whole.width
            hidden = torch.ones((self.B, S + 1), dtype=torch.bool, device=left.origin.device)
            hidden.scatter_(1, torch.where(left.origin < 0, S, left.origin.clamp(max=S)).long(), False)
            self._made[id(left)] = Keys((Block(S, None, hidden[:, :S]),))
        return self._made[id(left)]
