"""The stages of one prompt: which rows each layer computes, and what is dropped between two layers.

Nothing here knows a model. Rows of a sample are its tokens in their order, packed to the front; behind a sample's count
are empty rows, so that a batch whose samples keep different numbers is as wide as its longest. A change of rows is a
list (index int32 [B, W], count int32 [B]) for `compact`.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.compact import compact
from ..ops.select_tokens import select_tokens, visipruner_exit, visipruner_select
from ..ops.token_scores import TokenScores
from .config import VisionPruning
from .layout import VisionLayout
from .scores import Probe

Move = tuple[Tensor, Tensor]
# one int64 to the host: rows, vision tokens, whether anything changed
_BITS = 31
SEARCHING, FILTERED, GONE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a layer computes.

    origin: int32 [B, W], the token of the call that each row is, -1 behind the count. count: int32 [B]. is_vision: bool
    [B, W]. vision: int32 [B, K], the rows that are vision tokens, ascending, then -1; vision_count: int32 [B]. whole:
    whether they are all the tokens of the call, in place. full: whether every sample is known to fill the width, so
    that there are no empty rows.
    """

    origin: Tensor
    count: Tensor
    is_vision: Tensor
    vision: Tensor
    vision_count: Tensor
    whole: bool = False
    full: bool = False

    @property
    def width(self) -> int:
        """W."""
        return self.origin.shape[1]

    @classmethod
    def all(cls, vision: Tensor, most: int | None = None) -> Rows:
        """Every token of a call with the vision mask bool [B, T]; `most`: vision tokens of a sample, if known."""
        B, T = vision.shape
        every = torch.arange(T, dtype=torch.int32, device=vision.device).expand(B, T)
        count = torch.full((B,), T, dtype=torch.int32, device=vision.device)
        listed, vision_count = where(vision, most)
        return cls(every, count, vision, listed, vision_count, whole=True, full=True)

    def keep(self, index: Tensor, count: Tensor, most: int | None = None, full: bool = False) -> Rows:
        """Only the rows of the list (index [B, W], count [B]), the one that `compact` gets."""
        origin = taken(self.origin, index, count, full)
        if not full:
            behind = torch.arange(index.shape[1], device=index.device) >= count[:, None]
            origin = origin.masked_fill(behind, -1)
        is_vision = taken(self.is_vision, index, count, full)
        return Rows(origin, count, is_vision, *where(is_vision, most), full=full)

    def back(self, x: Tensor, T: int) -> Tensor:
        """x [B, W, C] of these rows -> [B, T, C] in the places of the call, 0 where a token has no row."""
        B, W = self.origin.shape
        if B == 1 and self.full:
            return x.new_zeros((1, T, x.shape[2])).index_copy_(1, self.origin[0].long(), x)
        at = torch.full((B, T + 1), -1, dtype=torch.int32, device=x.device)
        own = torch.arange(W, dtype=torch.int32, device=x.device).expand(B, W)
        at = at.scatter(1, self.origin.long().where(self.origin >= 0, T), own)[:, :T].contiguous()
        return compact(x, at, torch.full((B,), T, dtype=torch.int32, device=x.device))


def taken(x: Tensor, index: Tensor, count: Tensor, full: bool, dim: int = 1) -> Tensor:
    """`compact`; for one sample that fills the width (`full`) PyTorch's own gather, a small part of the launch."""
    if full and x.shape[0] == 1:
        return x.index_select(dim, index[0])
    return compact(x, index, count, dim=dim)


def where(mask: Tensor, most: int | None = None) -> Move:
    """The places of True in each row of bool [B, W]: int32 [B, `most` or W], ascending, then -1, and int32 [B]."""
    return select_tokens(mask.to(torch.float32), threshold=0.5, max_keep=most)


class Read:
    """A number on its way to the host. On a GPU it is copied behind what has been launched, so that whatever is
    launched until it is asked for keeps the device busy meanwhile."""

    def __init__(self, number: Tensor) -> None:
        self._number, self._event = number, None
        if number.is_cuda:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(number.device))

    def __call__(self) -> float:
        """The number; waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._number.item()


@dataclass(eq=False)
class Drop:
    """What one layer decided, for the report: the rows that are left after it."""

    layer: int
    rows: Rows


@dataclass(eq=False)
class Stages:
    """One prompt's way through the layers.

    The owner asks `start()` before layer 0 and `take()` before every later one, and moves the rows if they return a
    list; after the attention of a layer for which `probes(layer)` holds it calls `decide(layer, probe)`. What the host
    must know of that is read by `take()`, behind the rest of the layer. Without
    `drops_any` only padding moves. `guesses`: tokens at the end of every sample that are not the prompt's but a guess
    how it goes on (assisted decoding); the last one before them is scored.
    """

    config: VisionPruning
    layers: int
    layout: VisionLayout
    drops_any: bool = True
    guesses: int = 0
    rows: Rows = field(init=False)
    reads: int = 0
    drops: list[Drop] = field(default_factory=list)

    def __post_init__(self) -> None:
        vision, B = self.layout.vision, self.layout.vision.shape[0]
        counts = self.layout.counts
        self._most = None if counts is None else max((v for _, v in counts), default=0)
        self.rows = Rows.all(vision, self._most)
        self._pending: tuple[Rows, Move] | None = None
        # what is left to do once the host knows what the last probe found
        self._asked: Callable[[], None] | None = None
        self._done = not self.drops_any or self._most == 0
        device = vision.device
        self.phase = torch.full((B,), SEARCHING, dtype=torch.int32, device=device)
        self._hits = torch.zeros((B,), dtype=torch.int32, device=device)
        # of a single sample: whether it was filtered, what it kept, how many layers were quiet since
        self._found, self._held, self._quiet = False, 0, 0
        # the layers after which the tokens were filtered and all dropped, -1 for never
        self.filter_layer = torch.full((B,), -1, dtype=torch.int32, device=device)
        self.exit_layer = torch.full((B,), -1, dtype=torch.int32, device=device)

    def start(self) -> Move | None:
        """Padding to the back, wherever it was; None without padding."""
        if self.layout.real is None:
            return None
        counts = self.layout.counts
        index, count = where(self.layout.real, None if counts is None else max(n for n, _ in counts))
        full = counts is not None and len({n for n, _ in counts}) == 1
        self.rows = self.rows.keep(index, count, self._most, full)
        return index, count

    def probes(self, layer: int) -> bool:
        """Whether `decide` wants this layer; one that drops everything, or the last one, needs no scores."""
        if self._done or layer > self.layers - 2:
            return False
        if self.config.schedule is None:
            return layer >= self.config.first_probe_layer
        return layer in self.config.schedule

    def needs_scores(self, layer: int) -> bool:
        """Whether the probe of this layer must hold tensors: not where a schedule drops all."""
        return self.config.schedule is None or self.config.schedule[layer] != 0

    def take(self) -> Move | None:
        """The list by which the rows change before the next layer, once; None if they stay."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            asked()
        if self._pending is None:
            return None
        (self.rows, move), self._pending = self._pending, None
        return move

    def decide(self, layer: int, probe: Probe | None) -> None:
        """Score the vision rows of this layer and plan what `take` returns. probe.index are `rows.vision` as keys of
        the layer's buffer; None if `needs_scores` is False."""
        if self.config.schedule is None and probe is not None:
            (self._alone if len(self.rows.count) == 1 else self._dynamic)(layer, probe)
        else:
            self._scheduled(layer, probe)

    def _alone(self, layer: int, probe: Probe) -> None:
        """`_dynamic` of one sample, of which the host knows the phase: what it need not ask is not computed. A layer
        that changes nothing, as nearly all do, costs the scores, a few launches and the read."""
        scores = probe.scores()
        self.reads += 1
        if self._found:
            # entries behind the count have the cosine 1
            read = Read((scores.cosine >= self.config.exit_threshold).all())
        else:
            read = _found_and_left(
                scores,
                self.rows.vision_count,
                layer_threshold=self.config.layer_threshold,
                token_threshold=self.config.token_threshold,
            )
        self._asked = lambda: self._answered(layer, scores, read)

    def _answered(self, layer: int, scores: TokenScores, read: Read) -> None:
        """What follows for one sample."""
        config, rows = self.config, self.rows
        if self._found:
            quiet = bool(read())
            self._quiet = self._quiet + 1 if quiet else 0 if config.consecutive else self._quiet
            if not quiet or self._quiet < config.exit_count:
                return
            self._done, left, lost = True, 0, self._held
            kept, kept_count = rows.vision, torch.zeros_like(rows.vision_count)
            self.exit_layer = torch.full_like(self.exit_layer, layer)
        else:
            left, own = struct.unpack("=2i", int(read()).to_bytes(8, sys.byteorder, signed=True))
            self._done = own == 0
            if left < 0:
                return
            self._found, self._held, self._done, lost = True, left, left == 0, own - left
            self.filter_layer = torch.full_like(self.filter_layer, layer)
            kept, kept_count = select_tokens(
                scores.norm, threshold=config.token_threshold, index=rows.vision, count=rows.vision_count
            )
        if lost:
            index, count = self._without(kept, kept_count)
            self._plan(layer, index[:, : rows.width - lost].contiguous(), count, left, rows.full)

    def _dynamic(self, layer: int, probe: Probe) -> None:
        config, rows = self.config, self.rows
        scores, own = probe.scores(), rows.vision_count
        found, kept, kept_count = visipruner_select(
            scores,
            layer_threshold=config.layer_threshold,
            token_threshold=config.token_threshold,
            index=rows.vision,
            count=own,
        )
        filters = found & (self.phase == SEARCHING)
        quiet = visipruner_exit(scores, exit_threshold=config.exit_threshold, count=own) & (self.phase == FILTERED)
        otherwise = torch.zeros_like(self._hits) if config.consecutive else self._hits
        self._hits = torch.where(quiet, self._hits + 1, otherwise)
        leaves = quiet & (self._hits >= config.exit_count)
        kept = torch.where(filters[:, None], kept, rows.vision)
        kept_count = torch.where(filters, kept_count, own).masked_fill(leaves, 0)
        self.filter_layer = torch.where(filters, layer, self.filter_layer)
        self.exit_layer = torch.where(leaves, layer, self.exit_layer)
        self.phase = torch.where(filters, FILTERED, self.phase).masked_fill(leaves, GONE)
        index, count = self._without(kept, kept_count)
        changed = (kept_count != own).any()
        packed = count.max().long() | kept_count.max().long() << _BITS | changed.long() << 2 * _BITS
        self.reads += 1
        read = Read(packed)
        self._asked = lambda: self._moved(layer, int(read()), index, count)

    def _moved(self, layer: int, number: int, index: Tensor, count: Tensor) -> None:
        """What follows for a batch: rows, vision tokens, and whether anything changed, in one number."""
        width, most = number & (1 << _BITS) - 1, number >> _BITS & (1 << _BITS) - 1
        self._done = most == 0
        if number >> 2 * _BITS:
            self._plan(layer, index[:, :width].contiguous(), count, most)

    def _scheduled(self, layer: int, probe: Probe | None) -> None:
        schedule, counts = self.config.schedule or {}, self.layout.counts or ()
        k = schedule[layer]
        before = [len_left(self.config, layer, v) for _, v in counts]
        wanted = [min(n, share(k, v)) for n, (_, v) in zip(before, counts, strict=True)]
        if wanted == before:
            return
        most, width = max(wanted), max(n - v + left for (n, v), left in zip(counts, wanted, strict=True))
        self._done = most == 0
        rows = self.rows
        if probe is None:
            kept, kept_count = rows.vision, torch.zeros_like(rows.vision_count)
        else:
            score = probe.by(self.config.score)
            if len(set(wanted)) > 1 and isinstance(k, float):
                score = _cut(score, rows.vision_count, torch.floor(self._originally() * k))
            kept, kept_count = select_tokens(score, k=most, index=rows.vision, count=rows.vision_count)
        first = self.filter_layer < 0
        self.filter_layer = torch.where(first, layer, self.filter_layer)
        if most == 0:
            self.exit_layer = torch.full_like(self.exit_layer, layer)
        index, count = self._without(kept, kept_count)
        # empty rows behind a sample's own: those of samples that had fewer, or kept more
        full = rows.full and len({n - v + left for (n, v), left in zip(counts, wanted, strict=True)}) == 1
        self._plan(layer, index[:, :width].contiguous(), count, most, full)

    def _originally(self) -> Tensor:
        own = self.layout.vision if self.layout.real is None else self.layout.vision & self.layout.real
        return own.sum(1).double()

    def _without(self, kept: Tensor, kept_count: Tensor) -> Move:
        """All rows but the vision rows that are not in the list."""
        rows = self.rows
        W, K = rows.width, kept.shape[1]
        listed = torch.arange(K, device=kept.device) < kept_count[:, None]
        stays = torch.zeros((kept.shape[0], W + 1), dtype=torch.bool, device=kept.device)
        stays.scatter_(1, kept.long().where(listed, W), listed)
        text = ~rows.is_vision & (torch.arange(W, device=kept.device) < rows.count[:, None])
        return where(stays[:, :W] | text)

    def _plan(self, layer: int, index: Tensor, count: Tensor, most: int, full: bool = False) -> None:
        rows = self.rows.keep(index, count, most, full)
        self._pending = rows, (index, count)
        self.drops.append(Drop(layer, rows))


def _found_and_left(
    scores: TokenScores, own: Tensor, *, layer_threshold: float, token_threshold: float
) -> Read:
    """Of one sample with `own` [1] listed tokens: how many `visipruner_select` keeps, -1 where it finds nothing, and
    how many there are, as two int32 in 8 bytes."""
    # entries behind the count have the cosine 1 and the norm 0
    stays = scores.norm > token_threshold
    if token_threshold < 0:
        stays &= torch.arange(stays.shape[1], device=own.device) < own[:, None]
    found = (scores.cosine < layer_threshold).any(1)
    left = torch.where(found, stays.sum(1, dtype=torch.int32), -1)
    return Read(torch.cat([left, own]).view(torch.int64))


def share(k: int | float, vision: int) -> int:
    """How many of a sample's `vision` tokens a schedule's entry leaves."""
    return min(k, vision) if isinstance(k, int) else int(vision * k)


def len_left(config: VisionPruning, layer: int, vision: int) -> int:
    """How many of a sample's `vision` tokens a schedule has left when `layer` runs."""
    return min([vision, *(share(k, vision) for at, k in (config.schedule or {}).items() if at < layer)])


def _cut(score: Tensor, count: Tensor, limit: Tensor) -> Tensor:
    """Scores [B, K] with NaN, which is never kept, at all but the `limit` [B] best of a sample, ties to the lower."""
    candidate = (torch.arange(score.shape[1], device=score.device) < count[:, None]) & ~score.isnan()
    order = score.masked_fill(~candidate, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, (~candidate).gather(1, order).to(torch.int8).sort(dim=1, stable=True).indices)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return score.masked_fill(place >= limit[:, None], float("nan"))
