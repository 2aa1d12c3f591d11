"""Which keys of a layer's cache mean something, and the spans by which later rows see them.

A layer's cache is a row of blocks, one for each prompt that it has seen, as wide as the layer's rows were, and between
and behind them what was generated. A sample's own rows are at the front of a block; behind them is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.shapes import refuse
from ..core.spans import ATTEND, KEPT, Spans
from .stages import Rows, where

OP = "streamkernels.prune_vision"
SLOTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Block:
    """`width` keys, of which the first count[b] of sample b mean something (None: all, and all tokens of the prompt).
    hidden: bool [B, width], those that later rows do not see all the same. full: whether count is known to be the
    width everywhere."""

    width: int
    count: Tensor | None = None
    hidden: Tensor | None = None
    full: bool = False


@dataclass(frozen=True, eq=False)
class Keys:
    """The blocks of one layer's cache; layers that hold the same share one object.

    shift: int32 [B], by how much later positions are smaller than those of the call, where positions are renumbered.
    runs: (begin, end [B]) of the runs of meaningful keys that do not reach to the end of the blocks. begin: of the run
    that does; whatever comes behind the blocks belongs to it. kept: where runs do not say it, the keys that later rows
    see, int32 [B, width] and [B].
    """

    blocks: tuple[Block, ...] = ()
    shift: Tensor | None = None
    runs: tuple[tuple[int, Tensor], ...] = field(init=False)
    begin: int = field(init=False)
    kept: tuple[Tensor, Tensor] | None = field(init=False)

    def __post_init__(self) -> None:
        runs, begin, at = [], 0, 0
        for block in self.blocks:
            if block.count is not None and not block.full:
                runs.append((begin, block.count + at))
                begin = at + block.width
            at += block.width
        kept = None
        if len(runs) >= SLOTS[-1] or any(block.hidden is not None for block in self.blocks):
            like = next(x for block in self.blocks for x in (block.count, block.hidden) if x is not None)
            kept = where(self.live(like.shape[0], like.device))
        for name, value in (("runs", tuple(runs)), ("begin", begin), ("kept", kept)):
            object.__setattr__(self, name, value)

    @property
    def plain(self) -> bool:
        """Whether later rows see every key."""
        return self.begin == 0 and not self.runs and self.kept is None

    @property
    def width(self) -> int:
        """Keys in all blocks. What lies behind them in the buffer was generated, and all of it counts."""
        return sum(block.width for block in self.blocks)

    def and_open(self, length: int) -> Keys:
        """The same with what was generated behind the blocks, up to `length`, as a block; or less of the last ones if
        the cache was cropped. Refuses a crop into a block that only part of the samples fill."""
        if length == self.width:
            return self
        if length > self.width:
            return replace(self, blocks=(*self.blocks, Block(length - self.width)))
        blocks = list(self.blocks)
        while blocks and sum(b.width for b in blocks) > length:
            last = blocks.pop()
            if last.count is not None or last.hidden is not None:
                expected = f"at least the {self.width} keys of the prompts that it has seen"
                refuse(OP, "past_key_values", expected, f"a cache cropped to {length}")
            left = length - sum(b.width for b in blocks)
            if left > 0:
                blocks.append(replace(last, width=left))
        return replace(self, blocks=tuple(blocks))

    def and_rows(
        self, rows: Rows, *, hide_vision: bool = False, shift: Tensor | None = None, guesses: int = 0
    ) -> Keys:
        """The same with the rows of one more prompt behind them, and another shift. Its last `guesses` rows may be
        cropped again and count as generated."""
        width = rows.width - guesses
        count = None if rows.whole else rows.count - guesses
        block = Block(width, count, rows.is_vision[:, :width] if hide_vision else None, rows.full and not rows.whole)
        return Keys((*self.blocks, block), shift)

    def live(self, B: int, device: torch.device) -> Tensor:
        """bool [B, width]: the keys of the blocks that later rows see."""
        blocks = [_seen(block, B, device) for block in self.blocks]
        return torch.cat([torch.zeros((B, 0), dtype=torch.bool, device=device), *blocks], 1)

    def listed(self, HK: int) -> dict[str, Tensor]:
        """`kept` as a Spans has it, for so many heads; empty where runs say it."""
        if self.kept is None:
            return {}
        index, count = self.kept
        return {
            "kept": index[:, None].expand(-1, HK, -1).contiguous(),
            "kept_count": count[:, None].expand(-1, HK).contiguous(),
        }

    def spans(self, end: Tensor, own: Tensor | None, B: int, HK: int) -> Spans:
        """The Spans of T rows that stand behind these keys and what was generated since. end: int32 [1 or B, T], where
        causality ends each row; own: bool [B, T], which rows mean anything (None: all), the others see nothing."""
        listed = self.listed(HK)
        if listed:
            zero, width = torch.zeros_like(end), torch.full_like(end, self.width)
            return Spans(bounds_of([(zero, width), (width, end)], B, own), rules=(KEPT, ATTEND), **listed)
        columns = [(torch.full_like(end, b), until[:, None]) for b, until in self.runs]
        return Spans(bounds_of([*columns, (torch.full_like(end, self.begin), end)], B, own))


def bounds_of(columns: list[tuple[Tensor, Tensor]], B: int, own: Tensor | None) -> Tensor:
    """int32 [B, T, N, 2] of (begin, end) columns that broadcast to [B, T], filled up with empty slots; rows that are
    not in `own` get empty ones too."""
    T = max(begin.shape[1] for begin, _ in columns)
    N = next(n for n in SLOTS if n >= len(columns))
    bounds = torch.zeros((B, T, N, 2), dtype=torch.int32, device=columns[0][0].device)
    for n, (begin, end) in enumerate(columns):
        bounds[:, :, n, 0] = begin
        bounds[:, :, n, 1] = end
    return bounds if own is None else bounds * own[:, :, None, None]


def behind(keys: Keys, spans: Spans, counts: Sequence[int], S: int, HK: int) -> Spans:
    """Spans over a call's own rows -> over a buffer of S in which they stand right behind `keys`, which text and vision
    rows see alike. counts: rows of each sample. HK: key/value heads."""
    start = keys.width
    B, T = spans.B, spans.T
    if not start and S == T:
        return spans
    real = (spans.bounds[..., 1] > spans.bounds[..., 0])[..., None]
    bounds = (spans.bounds + start) * real
    zero = torch.zeros((1, 1), dtype=torch.int32, device=bounds.device)
    listed = keys.listed(HK)
    if listed:
        past = [(zero, zero + start)]
    else:
        past = [(zero + b, until[:, None]) for b, until in keys.runs]
        past += [(zero + keys.begin, zero + start)] if keys.begin < start else []
    used = [n for n, rule in enumerate(spans.rules) if rule != ATTEND or n == 0 or bool(real[:, :, n].any())]
    width = len(past) + len(used)
    if width > SLOTS[-1]:
        refuse(OP, "past_key_values", "a cache and images that fit into 8 slots", f"{width} slots", NotImplementedError)
    N = next(n for n in SLOTS if n >= width)
    wide = torch.zeros((B, T, N, 2), dtype=torch.int32, device=bounds.device)
    wide[:, :, len(past) : width] = bounds[:, :, used]
    if past:
        # not by what they see of their own: under "skip" that may be nothing
        own = torch.tensor([[i < n for i in range(T)] for n in counts], device=bounds.device)
        columns = [(b.expand(1, T), e) for b, e in past]
        wide[:, :, : len(past)] = bounds_of(columns, B, own)[:, :, : len(past)]
    rules = (KEPT if listed else ATTEND,) * len(past) + tuple(spans.rules[n] for n in used) + (ATTEND,) * (N - width)
    sinks, classes, class_sink = spans.sink_key, spans.key_class, spans.class_sink
    if sinks is not None:
        moved = torch.full((B, N), -1, dtype=torch.int32, device=bounds.device)
        moved[:, len(past) : width] = torch.where(sinks >= 0, sinks + start, -1)[:, used]
        sinks = moved
    if classes is not None:
        classes = torch.nn.functional.pad(classes, (start, S - start - classes.shape[1]))
    if class_sink is not None:
        class_sink = torch.where(class_sink >= 0, class_sink + start, -1).to(torch.int32)
    return replace(spans, bounds=wide, rules=rules, sink_key=sinks, key_class=classes, class_sink=class_sink, **listed)


def _seen(block: Block, B: int, device: torch.device) -> Tensor:
    at = torch.arange(block.width, device=device)
    out = (at < (block.width if block.count is None else block.count[:, None])).expand(B, -1)
    return out if block.hidden is None else out & ~block.hidden
