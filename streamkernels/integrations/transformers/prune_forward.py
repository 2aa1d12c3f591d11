"""One forward of a pruned model's language model: what its hooks and its attention share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...core.shapes import refuse
from ...core.spans import ATTEND, MASS, SINK, SKIP, Spans
from ...core.spans import vision as vision_spans
from ...ops.compact import compact
from ...ops.prepare import prepare
from ...ops.span_attention import span_attention
from ...pruning.config import VisionPruning
from ...pruning.keys import Keys, behind
from ...pruning.scores import Probe
from ...pruning.stages import Rows, Stages, taken, where
from .prune_models import OP, check_cache, static_length

RULES = {"attend": ATTEND, "skip": SKIP, "mass": MASS, "sink": SINK, "mass_first_half": MASS}
_LEDGER = "_streamkernels_pruning"
Table = tuple[Tensor, Tensor]


@dataclass
class Ledger:
    """What a cache holds: the keys of each layer, of `batch` samples. Kept on the cache object."""

    batch: int
    keys: list[Keys]
    # how long the cache is, as layer 0 has it, if nobody cropped it since
    length: int = -1
    # without compaction: the keys whatever was selected, the same in all layers, and which of them are vision tokens
    whole: Keys = field(default_factory=Keys)
    vision: Tensor | None = None


class Pass:
    """One forward: T rows of B samples through L layers.

    `stages` None: a plain forward (a generated token, a text without padding). `rotary(hidden, position_ids)` gives the
    model's cos and sin.
    """

    def __init__(
        self, config: VisionPruning, layers: int, B: int, T: int, rotary: Callable[..., Any], stages: Stages | None
    ) -> None:
        self.config, self.layers, self.B, self.T, self.rotary, self.stages = config, layers, B, T, rotary, stages
        self.cache: Any = None
        self.cache_reads = 0
        self.past = 0
        # whether this is a generated token whose row and tables are the call's in every layer
        self.passes_through = False
        self.keys: list[Keys] = []
        self.first: Rows | None = None  # the rows of layer 0: padding is behind
        self.rows: list[Rows | None] = []  # of each layer that has begun
        self.cached: list[int] = []  # keys that each layer's cache got
        # what layers share, by the ids of keys and rows, which this object keeps alive
        self._spans: dict[int, Spans] = {}
        self._prepared: dict[tuple[int, int, tuple[str, str] | None], tuple[Spans, Table]] = {}
        self._tables: dict[tuple[int, int], Table] = {}

    @property
    def selects(self) -> Stages | None:
        """The stages that score and drop."""
        return self.stages

    def left(self, layer: int) -> Rows | None:
        """The rows whose vision tokens the layer's text sees."""
        return self.rows[layer]

    def open(self, cache: Any) -> None:
        """Before layer 0: what the cache holds. Makes the ledger of an empty one."""
        self.cache = cache
        if cache is None:
            self.keys = [Keys()] * self.layers
            return
        check_cache(cache)
        ledger: Ledger | None = cache.__dict__.get(_LEDGER)
        length = cache.get_seq_length()
        if isinstance(length, Tensor):
            if ledger is not None and self.T == 1:
                # a generated token: nothing about a static cache is read, so that this step can be captured
                self.keys = _of_batch(ledger, self.B)
                return
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                expected = "a DynamicCache, or none, while a CUDA graph is captured"
                refuse(OP, "past_key_values", expected, "a StaticCache, whose length must be read")
            length = int(length.item())
            self.cache_reads += 1
        self.past = length
        if length == 0:
            ledger = cache.__dict__[_LEDGER] = Ledger(self.B, [Keys()] * self.layers)
        if ledger is None:
            got = f"one of {length} keys that it did not see come in"
            refuse(OP, "past_key_values", "a cache that the pruned model has filled from its beginning", got)
        known = _of_batch(ledger, self.B)
        if torch.compiler.is_compiling():
            self._settle(cache, known, length)
            return
        plain = self.T == 1 and self.stages is None
        if plain and length == ledger.length:
            self.keys = known
        else:
            self._settle(cache, known, length)
        ledger.length = length + self.T
        self.passes_through = plain and all(keys.shift is None for keys in dict.fromkeys(self.keys))

    def _settle(self, cache: Any, known: list[Keys], length: int) -> None:
        """The keys of every layer of a cache that may have been cropped, and in which a prompt may follow."""
        made: dict[tuple[int, int], Keys] = {}
        for layer, keys in enumerate(known):
            own = keys.width + length - known[0].width
            if length:
                _crop(cache.layers[layer], own)
            same = (id(keys), own)
            if same not in made:
                # what was generated since the last prompt is a block once another one follows
                made[same] = keys.and_open(own) if self.T > 1 or own < keys.width else keys
            self.keys.append(made[same])

    def before(self, layer: int, hidden: Tensor, tables: Table, position_ids: Tensor | None) -> tuple[Tensor, Table]:
        """Before a layer: its rows of `hidden` [B, rows of the layer before, C], and their cos and sin."""
        if self.stages is None:
            rows = None
        else:
            move = self.stages.start() if layer == 0 else self.stages.take()
            if move is not None:
                hidden = taken(hidden, *move, self.stages.rows.full)
            rows = self.stages.rows
        if layer == 0:
            self.first = rows
        self.rows.append(rows)
        return hidden, self._tables_of(layer, rows, hidden, tables, position_ids)

    def _tables_of(
        self, layer: int, rows: Rows | None, hidden: Tensor, tables: Table, position_ids: Tensor | None
    ) -> Table:
        keys = self.keys[layer]
        if keys.shift is None and (rows is None or rows.whole):
            return tables
        same = (id(rows), id(keys) if keys.shift is not None else 0)
        if same not in self._tables:
            if self.config.positions == "renumbered":
                positions = self._renumbered(keys, rows, position_ids)
                cos, sin = self.rotary(hidden, position_ids=positions)
            elif rows is not None:
                cos, sin = (_rows_of(x, rows, self.B) for x in tables)
            self._tables[same] = (cos, sin)
        return self._tables[same]

    def _renumbered(self, keys: Keys, rows: Rows | None, position_ids: Tensor | None) -> Tensor:
        """[B, rows]: the places of the rows among what is left."""
        if position_ids is None:
            refuse(OP, "position_ids", "positions, to renumber", position_ids)
        positions = position_ids.expand(self.B, -1)
        if rows is not None and self.first is not None:
            begin = compact(positions, self.first.origin[:, :1].contiguous(), rows.count.clamp(max=1))
            positions = begin + torch.arange(rows.width, device=positions.device)
        return positions if keys.shift is None else positions - keys.shift[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """The layer's attention, q [B, H, T, D] over the cache's k, v [B, HK, S, D]; scores and selects where due."""
        if self.T == 1 and self.stages is None:
            if self._sees_all(layer):
                return _plain(q, k, v, scale, causal=False)
            spans = self._decode_spans(layer, k)
            o: Any = span_attention(q, k, v, spans, scale=scale)
            return o
        rows = self.rows[layer]
        stages = self.selects
        probes = stages is not None and stages.probes(layer)
        if stages is None or rows is None or not probes or not stages.needs_scores(layer):
            if stages is not None and probes:
                stages.decide(layer, None)
            if self._is_causal(layer, q, k):
                return _plain(q, k, v, scale, causal=True)
            spans, prepared = self.prompt_spans(layer, q, k)
            o = span_attention(q, k, v, spans, scale=scale, prepared=prepared)
            return o
        spans, prepared = self.prompt_spans(layer, q, k)
        o, lse = span_attention(q, k, v, spans, scale=scale, prepared=prepared, return_lse=True)
        guesses = 0 if self.stages is None else self.stages.guesses
        if rows.full:
            last_row = slice(rows.width - 1 - guesses, rows.width - guesses)
            q_last, o_last, lse_last = q[:, :, last_row], o[:, :, last_row], lse[:, :, last_row]
        else:
            samples, last = torch.arange(self.B, device=q.device), (rows.count - (1 + guesses)).long()
            q_last, o_last = (x[samples, :, last][:, :, None] for x in (q, o))
            lse_last = lse[samples, :, last][:, :, None]
        listed = self.vision_keys(layer)
        stages.decide(layer, Probe(layer, q_last, k, v, o_last, lse_last, listed, stages.rows.vision_count, scale))
        return o

    def vision_keys(self, layer: int) -> Tensor:
        """int32 [B, K]: the keys of the layer's buffer that are the vision rows left, then -1."""
        rows = self.rows[layer]
        if rows is None:
            raise RuntimeError("streamkernels: a plain forward has no vision rows")
        width = self.keys[layer].width
        return torch.where(rows.vision >= 0, rows.vision + width, -1) if width else rows.vision

    def _sees_all(self, layer: int) -> bool:
        """Whether a generated token sees the layer's whole buffer."""
        return self.keys[layer].plain and (self.cache is None or static_length(self.cache.layers[layer]) is None)

    def _is_causal(self, layer: int, q: Tensor, k: Tensor) -> bool:
        """Whether a prompt's rows see the rows before them and nothing else, so that PyTorch's own attention, which
        knows that mask best, computes what the spans say. Empty rows are behind a sample's own, which never see them,
        and what they compute is dropped."""
        return not self.keys[layer].width and q.shape[2] == k.shape[2] and self._stage(layer) is None

    def _decode_spans(self, layer: int, k: Tensor) -> Spans:
        keys = self.keys[layer]
        same = id(keys)
        if same not in self._spans:
            length = None if self.cache is None else static_length(self.cache.layers[layer])
            if length is None:
                end = torch.full((1, 1), k.shape[2], dtype=torch.int32, device=k.device)
            else:
                end = length.to(torch.int32).reshape(1, 1)
            self._spans[same] = keys.spans(end, None, self.B, k.shape[1])
        return self._spans[same]

    def prompt_spans(self, layer: int, q: Tensor, k: Tensor) -> tuple[Spans, Table]:
        """The visibility of a prompt's rows, and `prepare` of it, shared by the layers that have the same."""
        keys, rows = self.keys[layer], self.rows[layer]
        stage = self._stage(layer)
        same = (id(keys), id(rows), stage)
        if same not in self._prepared:
            if stage is not None:
                spans = self._ruled(stage, keys, q, k)
            else:
                at = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)[None]
                own = None if rows is None or rows.whole else at < rows.count[:, None]
                spans = keys.spans(at + (keys.width + 1), own, self.B, k.shape[1])
            self._prepared[same] = spans, prepare(spans, k.shape[2])
        return self._prepared[same]

    def _stage(self, layer: int) -> tuple[str, str] | None:
        if self.stages is None or not self.stages.drops_any or layer >= len(self.config.shallow):
            return None
        stage = self.config.shallow[layer]
        return None if stage == ("attend", "attend") else stage

    def _ruled(self, stage: tuple[str, str], keys: Keys, q: Tensor, k: Tensor) -> Spans:
        layout = self.stages.layout if self.stages is not None else None
        if layout is None or layout.counts is None or layout.host is None:
            refuse(OP, "vision_mask", "a layout made by the handle, with masks, for shallow stages", layout)
        real, vision = layout.host
        packed = torch.zeros((self.B, q.shape[2]), dtype=torch.bool)
        for b, (count, _) in enumerate(layout.counts):
            packed[b, :count] = vision[b][real[b]]
        text_rule, vision_rule = stage
        counts = [count for count, _ in layout.counts]
        spans = vision_spans(
            counts,
            packed,
            text_to_vision=RULES[text_rule],
            vision_to_vision=RULES[vision_rule],
            first_half=text_rule == "mass_first_half",
            device=q.device,
        )
        return behind(keys, spans, counts, k.shape[2], k.shape[1])

    def close(self, hidden: Tensor) -> Tensor:
        """After the last layer: the ledger learns what the cache got; hidden [B, rows, C] -> [B, T, C], 0 where a token
        was dropped."""
        # the report keeps this object, but not what it worked with
        cache = self.forget()
        if self.stages is None or self.first is None:
            return hidden
        if cache is not None:
            text = self._leave_vision_out(cache)
            made: dict[tuple[int, int, bool], Keys] = {}
            after = []
            for layer, (keys, rows) in enumerate(zip(self.keys, self.rows, strict=True)):
                hide = layer == 0 and self._hides(0)
                rows = text if text is not None and layer and self._hides(layer) else rows
                same = (id(keys), id(rows), hide)
                if same not in made and rows is not None:
                    shift = self._shift(keys, rows)
                    made[same] = keys.and_rows(rows, hide_vision=hide, shift=shift, guesses=self.stages.guesses)
                after.append(made[same])
                self.cached.append(made[same].width - keys.width + self.stages.guesses)
            ledger_of(cache).keys = after
        rows = self.stages.rows
        return hidden if rows.whole else rows.back(hidden, self.T)

    def _hides(self, layer: int) -> bool:
        return self._stage(layer) is not None and not self.config.decode_sees_shallow

    def _leave_vision_out(self, cache: Any) -> Rows | None:
        """Take the vision keys that no later row sees out of the cache: the rows that are left of such layers. Layer 0
        keeps them, hidden: the length of its cache is what transformers takes for the number of tokens so far."""
        layers = [layer for layer in range(1, self.layers) if self._hides(layer)]
        rows, counts = self.first, None if self.stages is None else self.stages.layout.counts
        if not layers or rows is None or counts is None:
            return None
        own = torch.arange(rows.width, device=rows.origin.device) < rows.count[:, None]
        index, count = where(own & ~rows.is_vision, max(n - v for n, v in counts))
        for layer in layers:
            _replace(cache.layers[layer], self.keys[layer].width, rows.width, index, count)
        return rows.keep(index, count, 0)

    def forget(self) -> Any:
        """Let go of the cache, which is returned, and of what layers shared."""
        cache, self.cache = self.cache, None
        self._spans, self._prepared, self._tables = {}, {}, {}
        return cache

    def _shift(self, keys: Keys, rows: Rows) -> Tensor | None:
        if self.config.positions != "renumbered" or self.first is None:
            return None
        shift = self.first.count - rows.count
        return shift if keys.shift is None else keys.shift + shift


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, causal: bool) -> Tensor:
    """PyTorch's attention, as the dense model calls it."""
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def ledger_of(cache: Any) -> Ledger:
    """The ledger of a cache that has one."""
    ledger: Ledger = cache.__dict__[_LEDGER]
    return ledger


def _crop(layer: Any, length: int) -> None:
    """Make a dynamic layer as long as layer 0 implies. transformers before 5.14 crops to one length for all layers,
    which leaves what was to go in a layer that is shorter than that."""
    if static_length(layer) is not None:
        return
    more = layer.get_seq_length() - length
    if more < 0:
        got = f"one of {length + more} keys where {length} were expected, as after a forward that failed"
        refuse(OP, "past_key_values", "a cache whose layers have all seen the same calls", got)
    if more:
        layer.crop(-more)


def _replace(layer: Any, begin: int, width: int, index: Tensor, count: Tensor) -> None:
    """Instead of the `width` keys from `begin` on, the last ones that the layer holds, those of the list."""
    length, K = static_length(layer), index.shape[1]
    for name in ("keys", "values"):
        buffer = getattr(layer, name)
        moved = compact(buffer[:, :, begin : begin + width], index, count, dim=2)
        if length is None:
            setattr(layer, name, torch.cat([buffer[:, :, :begin], moved], 2))
        else:
            buffer[:, :, begin : begin + K] = moved
    if length is not None:
        layer.cumulative_length.sub_(width - K)


def _of_batch(ledger: Ledger, B: int) -> list[Keys]:
    if ledger.batch != B:
        refuse(OP, "past_key_values", f"a cache of {B} samples", f"one of {ledger.batch}")
    return ledger.keys


def _rows_of(table: Tensor, rows: Rows, B: int) -> Tensor:
    """cos or sin [1 or B, T, D], or [3, 1 or B, T, D] before transformers 5.17's M-RoPE, at the rows' tokens."""
    if table.dim() == 3:
        return taken(table.expand(B, -1, -1), rows.origin, rows.count, rows.full)
    axes = table.expand(-1, B, -1, -1).movedim(1, 0)
    return taken(axes, rows.origin, rows.count, rows.full, 2).movedim(0, 1)
