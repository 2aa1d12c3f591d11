"""Spans of layers that treat vision keys by rule: by slots for few images, by classes for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ragged import batch_size, integers, listed, same_batch, samples, sizes
from .shapes import describe, refuse
from .span_builders import Lengths, Nested, bottom_right, ends, stack_slots
from .span_table import ATTEND, CLASS_RULES, KEPT, SINK, SKIP, SLOT_RULES, SLOTS, Rule, Spans, as_rule

Interval = tuple[int, int]
TEXT, VISION, SECOND_HALF = 0, 1, 2


def vision_intervals(mask: Tensor) -> list[list[Interval]]:
    """The runs of True in a mask bool `[B, S]` or `[S]` (`input_ids == image_token_id`): one list of (begin, end) per
    sample."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (1, 2):
        refuse("vision_intervals", "mask", "a bool tensor [B, S] or [S]", mask, TypeError)
    rows = mask.reshape(-1, mask.shape[-1]).cpu().to(torch.int8)
    edges = torch.nn.functional.pad(rows, (1, 1)).diff(dim=1)
    pairs = zip(edges, (-edges).clamp(min=0), strict=True)
    return [
        list(zip((up == 1).nonzero()[:, 0].tolist(), down.nonzero()[:, 0].tolist(), strict=True)) for up, down in pairs
    ]


def _images(op: str, images: Any, keys: Sequence[int]) -> list[list[Interval]]:
    """Sorted, disjoint, non-empty intervals per sample."""
    if isinstance(images, Tensor) and images.dtype == torch.bool:
        batch: list[Any] = list(vision_intervals(images))
    else:
        given = listed(op, "images", images)
        flat = all(isinstance(pair, Sequence) and len(pair) == 2 and hasattr(pair[0], "__index__") for pair in given)
        batch = [given] if flat else given
        sound = all(isinstance(sample, Sequence) for sample in batch)
        if not sound or not all(isinstance(pair, Sequence) for sample in batch for pair in sample):
            refuse(op, "images", "(begin, end) pairs, or one list of such pairs per sample", images, TypeError)
    same_batch(op, "images", batch, "lengths", keys)
    out = []
    for b, (intervals, S) in enumerate(zip(batch, keys, strict=True)):
        found: list[Interval] = []
        for pair in sorted(integers(op, f"images[{b}]", pair) for pair in intervals):
            if len(pair) != 2 or not pair[0] <= pair[1] <= S:
                refuse(op, f"images[{b}]", f"(begin, end) with 0 <= begin <= end <= {S}", tuple(pair))
            if found and pair[0] < found[-1][1]:
                refuse(op, f"images[{b}]", "disjoint intervals", f"{found[-1]} and {tuple(pair)}")
            if pair[0] < pair[1]:
                found.append((pair[0], pair[1]))
        out.append(found)
    return out


def _halves(images: Sequence[Interval]) -> tuple[list[Interval], list[Interval]]:
    # the first half of all the vision tokens of a sample, rounded down, and the rest
    left = sum(end - begin for begin, end in images) // 2
    first: list[Interval] = []
    second: list[Interval] = []
    for begin, end in images:
        middle = begin + min(left, end - begin)
        left -= middle - begin
        first += [(begin, middle)] if begin < middle else []
        second += [(middle, end)] if middle < end else []
    return first, second


def _pieces(S: int, ruled: Sequence[tuple[Interval, Rule]]) -> dict[Rule, list[Interval]]:
    """`[0, S)` cut by rule, ATTEND wherever `ruled` (sorted) says nothing; neighbours under one rule are one piece."""
    cuts: list[tuple[int, int, Rule]] = []
    at = 0
    for (begin, end), rule in [*ruled, ((S, S), ATTEND)]:
        for piece in ((at, begin, ATTEND), (begin, end, rule)):
            if piece[0] == piece[1]:
                continue
            if cuts and cuts[-1][2] == piece[2]:
                cuts[-1] = (cuts[-1][0], piece[1], piece[2])
            else:
                cuts.append(piece)
        at = end
    out: dict[Rule, list[Interval]] = {}
    for begin, end, rule in cuts:
        out.setdefault(rule, []).append((begin, end))
    return out


def vision(
    lengths: Lengths,
    images: Sequence[Any] | Tensor,
    *,
    text_to_vision: Rule | int = SKIP,
    vision_to_vision: Rule | int = ATTEND,
    first_half: bool = False,
    sink_key: int | Sequence[int] | None = None,
    kept: Tensor | None = None,
    kept_count: Tensor | None = None,
    rows: Lengths | None = None,
    device: torch.device | str | None = None,
) -> Spans:
    """Causal attention in which vision keys follow one rule for text rows and one for vision rows.

    `lengths`: keys of the sequence, an int or one per sample. `images`: the vision intervals [(begin, end), ...] of
    one sample, or one such list per sample (any number of images, none too), or a bool mask `[B, S]`. `rows`: the
    rows are the last `rows` of the sequence (default all of it; 1 is a decode step).

    A vision row is one whose own key is vision, every other row is a text row; what a row may see ends at itself. Text
    keys are attended by all. Vision keys follow `text_to_vision` or `vision_to_vision`: SKIP (not seen), MASS, SINK,
    KEPT or ATTEND, as `Rule` says; for vision rows that includes the row's own key (an image at key 0 under SKIP leaves
    its rows nothing to see). Rows before the first image see no vision key anyway, so "text rows" means rows after
    vision begins. `first_half=True` applies `text_to_vision` to the first half of the sample's vision tokens (all
    images counted together, rounded down) and attends the rest.

    SINK sends the mass to `sink_key` (an int, or one per sample; default the sample's first vision token). It must
    not lie after a row that uses it. KEPT shows the keys of `kept` int32 `[B, HK, K]` with `kept_count` `[B, HK]`
    (checked for shape only, see `Spans.validate`); kept keys that are not vision are ignored.

    VisiPruner's released code (arXiv 2510.17205, `custom_modeling_llama.py`), layers from 0, prefill rows, no
    renormalisation: layer 0 of the 7B model is (SINK, MASS), of the 13B model (MASS, MASS, first_half=True), layers
    1..5 are (MASS, ATTEND). Its paper (section 3.6) skips: layer 0 (SINK, SKIP), then (SKIP, SKIP).

    At most eight slots; more images use the class table (one causal slot, text = class 0, vision = class 1, and 2 for
    the attended second half). Raises ValueError for intervals that overlap or leave the sequence, for SINK after its
    row, for KEPT without `kept` or with so many images that slots do not suffice, and TypeError for what is no int.
    """
    op = "vision"
    t2v = as_rule(op, "text_to_vision", text_to_vision, (*SLOT_RULES, SKIP))
    v2v = as_rule(op, "vision_to_vision", vision_to_vision, (*SLOT_RULES, SKIP))
    keys = sizes(op, "lengths", lengths)
    count = keys if rows is None else sizes(op, "rows", rows, len(keys))
    if any(t > s for t, s in zip(count, keys, strict=True)):
        refuse(op, "rows", "at most as many rows as keys", rows)
    intervals = _images(op, images, keys)
    if KEPT in (t2v, v2v) and (kept is None or kept_count is None):
        refuse(op, "kept" if kept is None else "kept_count", "kept and kept_count, because a rule is KEPT", None)
    if KEPT not in (t2v, v2v) and (kept is not None or kept_count is not None):
        refuse(op, "kept", "None, because no rule is KEPT", kept)
    halves = [_halves(own) if first_half else (own, []) for own in intervals]
    ruled = [sorted([(i, t2v) for i in first] + [(i, ATTEND) for i in second]) for first, second in halves]
    for_text = [_pieces(S, own) for S, own in zip(keys, ruled, strict=True)]
    for_vision = [_pieces(S, [(i, v2v) for i in own]) for S, own in zip(keys, intervals, strict=True)]
    is_vision = _row_kinds(intervals, keys, count)
    sinks = _sink_keys(op, sink_key, intervals, keys, count, is_vision, (t2v, v2v))
    most = {rule: max(len(pieces.get(rule, ())) for pieces in [*for_text, *for_vision]) for rule in SLOT_RULES}
    slots = [(rule, n) for rule in SLOT_RULES for n in range(most[rule])] or [(ATTEND, 0)]
    if len(slots) > SLOTS[-1]:
        if KEPT in (t2v, v2v):
            refuse(op, "images", f"images that fit into {SLOTS[-1]} slots under KEPT", f"{len(slots)} slots")
        return _by_classes(keys, count, halves, (t2v, v2v), is_vision, sinks, device)
    end = ends(count, keys, is_vision.shape[1])
    columns = [_column(rule, n, for_text, for_vision, is_vision, end) for rule, n in slots]
    bounds = stack_slots(columns, kept.device if kept is not None and device is None else device)
    rules = [rule for rule, _ in slots] + [ATTEND] * (bounds.shape[2] - len(slots))
    to = bounds.device
    return Spans(
        bounds,
        tuple(rules),
        sink_key=sinks[:, None].repeat(1, len(rules)).to(to) if SINK in rules else None,
        kept=kept.to(to) if KEPT in rules and kept is not None else None,
        kept_count=kept_count.to(to) if KEPT in rules and kept_count is not None else None,
    )


def _first_use(table: Sequence[Sequence[Rule]], row_class: Sequence[int], key_class: Sequence[int]) -> int:
    # the first key whose row sends mass to the sink; the last key if none does
    rows, keys = torch.tensor(row_class, dtype=torch.long), torch.tensor(key_class, dtype=torch.long)
    sends = torch.tensor(table) == SINK
    never = len(keys)
    first_sent = torch.tensor([int(at[0]) if len(at := row[keys].nonzero()) else never for row in sends])
    own = torch.arange(never - len(rows), never)
    users = own[own >= first_sent[rows]]
    return int(users[0]) if len(users) else never - 1


def _row_kinds(intervals: Sequence[Sequence[Interval]], keys: Sequence[int], rows: Sequence[int]) -> Tensor:
    # bool [B, T]: which rows are vision rows
    out = torch.zeros(len(keys), max(rows), dtype=torch.bool)
    for b, own in enumerate(intervals):
        first = keys[b] - rows[b]
        for begin, end in own:
            out[b, max(begin - first, 0) : max(end - first, 0)] = True
    return out


def _sink_keys(
    op: str,
    sink_key: object,
    intervals: Sequence[Sequence[Interval]],
    keys: Sequence[int],
    rows: Sequence[int],
    is_vision: Tensor,
    rules: tuple[Rule, Rule],
) -> Tensor:
    """int32 `[B]`, -1 for samples without vision. Refuses a sink in the future of a row that sends mass to it."""
    if SINK not in rules:
        if sink_key is not None:
            refuse(op, "sink_key", "None, because no rule is SINK", sink_key)
        return torch.full((len(keys),), -1, dtype=torch.int32)
    given = [own[0][0] if own else -1 for own in intervals]
    if sink_key is not None:
        named = sizes(op, "sink_key", sink_key, len(keys))
        given = [key if own else -1 for key, own in zip(named, intervals, strict=True)]
    for b, own in enumerate(intervals):
        if not own:
            continue
        first = keys[b] - rows[b]
        at = torch.arange(rows[b]) + first
        kind = is_vision[b, : rows[b]]
        users = (at >= own[0][0]) & ((kind & (rules[1] == SINK)) | (~kind & (rules[0] == SINK)))
        earliest = int(at[users].min()) if bool(users.any()) else keys[b] - 1
        if given[b] > earliest:
            expected = f"a key that no row uses before it exists: at most {earliest} in sample {b}"
            refuse(op, "sink_key", expected, given[b])
    return torch.tensor(given, dtype=torch.int32)


def _column(
    rule: Rule,
    n: int,
    for_text: Sequence[dict[Rule, list[Interval]]],
    for_vision: Sequence[dict[Rule, list[Interval]]],
    is_vision: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor]:
    """begin and end `[B, T]` of one slot: the n-th piece under `rule`, cut at the row itself, or an empty one."""
    begins, until = torch.zeros_like(end), torch.zeros_like(end)
    for b in range(len(end)):
        for pieces, mine in ((for_text[b], ~is_vision[b]), (for_vision[b], is_vision[b])):
            own = pieces.get(rule, [])
            if n < len(own):
                begins[b, mine], until[b, mine] = own[n][0], own[n][1]
    return begins, torch.minimum(until, end)


def _by_classes(
    keys: Sequence[int],
    rows: Sequence[int],
    halves: Sequence[tuple[list[Interval], list[Interval]]],
    rules: tuple[Rule, Rule],
    is_vision: Tensor,
    sinks: Tensor,
    device: torch.device | str | None,
) -> Spans:
    key_class = torch.zeros(len(keys), max(keys), dtype=torch.int8)
    for b, parts in enumerate(halves):
        for name, part in zip((VISION, SECOND_HALF), parts, strict=True):
            for begin, end in part:
                key_class[b, begin:end] = name
    table = [[ATTEND, rules[0], ATTEND], [ATTEND, rules[1], rules[1]]]
    spans = bottom_right(list(rows), list(keys))
    out = Spans(
        spans.bounds,
        key_class=key_class,
        row_class=is_vision.to(torch.int8),
        class_rules=torch.tensor(table, dtype=torch.int8),
        class_sink=sinks if SINK in rules else None,
    )
    return out if device is None else out.to(device)


def classes(
    key_class: Nested,
    rules: Sequence[Sequence[Rule | int]] | Tensor,
    *,
    row_class: Nested | None = None,
    sink_key: int | Sequence[int] | None = None,
    S: int | None = None,
    device: torch.device | str | None = None,
) -> Spans:
    """Causal attention with a rule per (row class, key class), for any number of images, turns or speakers.

    `key_class`: the class of every key of a sample (ints from 0), one list or one per sample. `row_class`: that of
    the last T rows, default the rows' own keys, so T = S. `rules[row class][key class]` is ATTEND, MASS, SINK or
    SKIP. `sink_key` (an int or one per sample), given iff a rule is SINK, is where its mass goes. The key buffer is
    padded to `S` (default the longest sample) with class 0, which no row sees.

    Raises ValueError for classes outside the table, KEPT in the table, SINK without `sink_key` or with one that lies
    after a row which uses it; TypeError for what is no int.
    """
    op = "classes"
    table = [
        [as_rule(op, f"rules[{r}][{c}]", rule, CLASS_RULES) for c, rule in enumerate(listed(op, f"rules[{r}]", row))]
        for r, row in enumerate(listed(op, "rules", rules))
    ]
    widths = {len(row) for row in table}
    if len(widths) != 1 or not 1 <= max(widths) <= 127 or len(table) > 127:
        refuse(op, "rules", "a rectangular table of 1 to 127 row classes and key classes", describe(rules))
    key_batch = samples(op, "key_class", key_class)
    row_batch = key_batch if row_class is None else samples(op, "row_class", row_class)
    same_batch(op, "row_class", row_batch, "key_class", key_batch)
    keys, rows = list(map(len, key_batch)), list(map(len, row_batch))
    for b, (t, s) in enumerate(zip(rows, keys, strict=True)):
        if t > s:
            refuse(op, "row_class", f"at most the {s} keys of sample {b}", f"{t} rows")
    for name, batch, size in (("key_class", key_batch, len(table[0])), ("row_class", row_batch, len(table))):
        for b, values in enumerate(batch):
            if values and max(values) >= size:
                where = f"{max(values)} in sample {b} at index {values.index(max(values))}"
                refuse(op, name, f"classes below {size}, the size of the table", where)
    has_sink = any(SINK in row for row in table)
    if has_sink != (sink_key is not None):
        refuse(op, "sink_key", "a key exactly if a rule is SINK", sink_key)
    sinks = sizes(op, "sink_key", sink_key, len(keys)) if has_sink else []
    for b, sink in enumerate(sinks):
        earliest = max(_first_use(table, row_batch[b], key_batch[b]), 0)
        if sink > earliest:
            refuse(op, "sink_key", f"a key that no row uses before it exists: at most {earliest} in sample {b}", sink)
    bounds = bottom_right(rows, keys).bounds
    padded_keys, padded_rows = torch.zeros(len(keys), batch_size(op, "S", S, keys)), torch.zeros(len(rows), max(rows))
    for b in range(len(keys)):
        padded_keys[b, : keys[b]] = torch.tensor(key_batch[b])
        padded_rows[b, : rows[b]] = torch.tensor(row_batch[b])
    out = Spans(
        bounds,
        key_class=padded_keys.to(torch.int8),
        row_class=padded_rows.to(torch.int8),
        class_rules=torch.tensor(table, dtype=torch.int8),
        class_sink=torch.tensor(sinks, dtype=torch.int32) if has_sink else None,
    )
    return out if device is None else out.to(device)
