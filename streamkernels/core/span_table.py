"""`Spans`: which keys a query row sees, as data, and what each rule means."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .shapes import Shapes, check_int, refuse

SLOTS = (1, 2, 4, 8)


class Rule(enum.IntEnum):
    """What the keys of a slot, or of a pair of classes, do for the rows that see them.

    - `ATTEND`: ordinary attention.
    - `MASS`: the key counts in the softmax denominator, its value is dropped (zeroing after the softmax).
    - `SINK`: as `MASS`, and the dropped probability goes to the value of one other key.
    - `KEPT`: only the keys of a list are seen. A slot's rule only, never a class rule.
    - `SKIP`: the key is not seen. A class rule only (a slot says it with an empty span).
    """

    ATTEND = 0
    MASS = 1
    SINK = 2
    KEPT = 3
    SKIP = -1


ATTEND, MASS, SINK, KEPT, SKIP = Rule.ATTEND, Rule.MASS, Rule.SINK, Rule.KEPT, Rule.SKIP
SLOT_RULES = (ATTEND, MASS, SINK, KEPT)
CLASS_RULES = (ATTEND, MASS, SINK, SKIP)


def as_rule(op: str, name: str, x: object, allowed: Sequence[Rule]) -> Rule:
    """`x` (a Rule or its int) as a Rule out of `allowed`."""
    if isinstance(x, bool) or not isinstance(x, int) or x not in allowed:
        refuse(op, name, "one of " + ", ".join(rule.name for rule in allowed), x)
    return Rule(x)


@dataclass(frozen=True, eq=False)
class Spans:
    """Visibility of `T` query rows over one key buffer `[0, S)`, as O(T) numbers.

    - `bounds` int32 `[B, T, N, 2]`: N half-open key intervals (begin, end) per row, N one of 1, 2, 4, 8. `end <= begin`
      is empty, and what lies outside the buffer is clipped. A row's intervals must be disjoint: a key in two of them
      counts twice, on every backend alike (`validate` finds it).
    - `rules`: one `Rule` per slot, the same for all rows; () stands for ATTEND everywhere.
    - `sink_key` int32 `[B, N]`, iff a slot is SINK: where that slot's mass goes; entries of other slots are ignored.
    - `kept` int32 `[B, HK, K]`, ascending and unique, and `kept_count` int32 `[B, HK]`, iff a slot is KEPT: the keys
      (buffer indices) that it shows, per key/value head; entries from the count on are ignored.
    - `key_class` int8 `[B, S]`, `row_class` int8 `[B, T]`, `class_rules` int8 `[row classes, key classes]` of ATTEND,
      MASS, SINK, SKIP, all or none: rules by class, for more intervals than fit into eight slots. Classes outside
      the table are clamped into it. `class_sink` int32 `[B]`: where the mass of a class SINK goes; without it nowhere.

    A row sees a key iff the key lies in one of the row's intervals, is in `kept` if that slot is KEPT, and its class
    rule is not SKIP. The key's own value counts iff the slot is ATTEND or KEPT and the class rule is ATTEND.
    Otherwise:

    | slot \\ class | ATTEND | MASS | SINK |
    |---|---|---|---|
    | ATTEND, KEPT | own value | dropped | `class_sink[b]` |
    | SINK | `sink_key[b, slot]` | dropped | `sink_key[b, slot]` |
    | MASS | dropped | dropped | dropped |

    A sink key outside `[0, S)` drops the mass. A sink key need not be visible itself.

    Raises TypeError for wrong dtypes, ValueError for wrong shapes, devices, rules or missing companions. It reads
    metadata only; `validate` checks the numbers. Nothing is copied or changed.
    """

    bounds: Tensor
    rules: tuple[Rule, ...] = ()
    sink_key: Tensor | None = None
    kept: Tensor | None = None
    kept_count: Tensor | None = None
    key_class: Tensor | None = None
    row_class: Tensor | None = None
    class_rules: Tensor | None = None
    class_sink: Tensor | None = None

    def __post_init__(self) -> None:
        op, shapes = "Spans", Shapes("Spans")
        N = shapes.tensor("bounds", self.bounds, "B T N 2", dtype=torch.int32).shape[2]
        if N not in SLOTS:
            refuse(op, "bounds", "1, 2, 4 or 8 slots (fill up with empty ones)", f"{N} slots")
        if not isinstance(self.rules, (tuple, list)) or len(self.rules) not in (0, N):
            refuse(op, "rules", f"{N} rules, one per slot", self.rules)
        rules = tuple(as_rule(op, f"rules[{n}]", rule, SLOT_RULES) for n, rule in enumerate(self.rules))
        object.__setattr__(self, "rules", rules or (ATTEND,) * N)
        for name, letters, dtype in (
            ("sink_key", "B N", torch.int32),
            ("kept", "B HK K", torch.int32),
            ("kept_count", "B HK", torch.int32),
            ("key_class", "B S", torch.int8),
            ("row_class", "B T", torch.int8),
            ("class_rules", "R C", torch.int8),
            ("class_sink", "B", torch.int32),
        ):
            if getattr(self, name) is not None:
                shapes.tensor(name, getattr(self, name), letters, dtype=dtype)
        # a companion that no slot uses would change nothing in silence
        for name, rule in (("sink_key", SINK), ("kept", KEPT), ("kept_count", KEPT)):
            if (getattr(self, name) is not None) != (rule in self.rules):
                expected = "a tensor, because a" if rule in self.rules else "None, because no"
                refuse(op, name, f"{expected} slot has the rule {rule.name}", getattr(self, name))
        table = {"key_class": self.key_class, "row_class": self.row_class, "class_rules": self.class_rules}
        absent = [name for name, x in table.items() if x is None]
        if absent and (len(absent) < len(table) or self.class_sink is not None):
            refuse(op, absent[0], "key_class, row_class and class_rules together", None)
        if self.class_rules is not None and not self.class_rules.numel():
            refuse(op, "class_rules", "at least one row class and one key class", self.class_rules)

    @property
    def B(self) -> int:
        """Samples of the batch."""
        return self.bounds.shape[0]

    @property
    def T(self) -> int:
        """Query rows."""
        return self.bounds.shape[1]

    @property
    def N(self) -> int:
        """Slots: intervals per row."""
        return self.bounds.shape[2]

    @property
    def HK(self) -> int:
        """Key/value heads that `visible` tells apart: those of `kept` if a slot is KEPT, else 1."""
        return 1 if self.kept is None else self.kept.shape[1]

    def to(self, device: torch.device | str) -> Spans:
        """The same spans with every tensor on `device`."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in own.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def pad(self, N: int) -> Spans:
        """The same visibility in `N` slots (1, 2, 4 or 8, not fewer than now); the new ones are empty ATTEND slots."""
        if check_int("Spans.pad", "N", N, minimum=self.N) not in SLOTS:
            refuse("Spans.pad", "N", "1, 2, 4 or 8", N)
        more = N - self.N
        if not more:
            return self
        bounds = torch.cat([self.bounds, self.bounds.new_zeros(self.B, self.T, more, 2)], 2)
        sinks = self.sink_key
        if sinks is not None:
            sinks = torch.cat([sinks, sinks.new_full((self.B, more), -1)], 1)
        return replace(self, bounds=bounds, rules=self.rules + (ATTEND,) * more, sink_key=sinks)

    def visible(self, S: int) -> Tensor:
        """bool `[B, HK or 1, T, S]`: which keys of a buffer of `S` each row sees. Dense: for small inputs and tests."""
        return self._in_slots(S, range(self.N))

    def value_weight(self, S: int) -> Tensor:
        """bool `[B, HK or 1, T, S]`: the visible keys whose own value enters the output by their rule. Dense."""
        out = self._in_slots(S, [n for n, rule in enumerate(self.rules) if rule in (ATTEND, KEPT)])
        rule = self._class_rule(S)
        return out if rule is None else out & (rule == ATTEND)

    def destination(self, S: int) -> Tensor:
        """int64 `[B, HK or 1, T, S]`: the key whose value receives each key's probability, by the table above. Dense.

        It is the key itself, a sink key, or -1 where the probability is dropped and where the key is not seen. With
        the probabilities p, `o[t] = sum over j with destination[t, j] >= 0 of p[t, j] v[destination[t, j]]`.
        """
        j = torch.arange(S, device=self.bounds.device)
        out = torch.full((self.B, self.HK, self.T, S), -1, device=self.bounds.device)
        cls = self._class_rule(S)
        for n, rule in enumerate(self.rules):
            seen = self._in_slot(S, n)
            if rule == SINK and self.sink_key is not None:
                goes = self._in_buffer(self.sink_key[:, n], S).expand(self.B, 1, self.T, S)
            elif rule == MASS:
                goes = out.new_full((1, 1, 1, 1), -1)
            else:
                goes = j.expand(self.B, 1, self.T, S)
                if cls is not None and self.class_sink is not None:
                    goes = torch.where(cls == SINK, self._in_buffer(self.class_sink, S), goes)
                elif cls is not None:
                    goes = goes.masked_fill(cls == SINK, -1)
            if cls is not None:
                goes = goes.masked_fill(cls == MASS, -1)
            out = torch.where(seen, goes, out)
        return out

    def validate(self, S: int) -> Spans:
        """Check the numbers for a buffer of `S` keys; returns itself. Copies everything to the host.

        Refused, with the first offending sample and row: overlapping intervals of a row; a kept list that is not
        ascending and unique, leaves `[0, S)` or has a count outside `[0, K]`; a sink key outside `[0, S)` that a row
        needs; classes outside the table; a class table with other rules than its four, or with SINK and no
        `class_sink`. Intervals that are empty or reach outside the buffer are legal, here as everywhere. Raises
        ValueError.
        """
        validate(self, S)
        return self

    def _in_slots(self, S: int, slots: Iterable[int]) -> Tensor:
        out = torch.zeros(self.B, self.HK, self.T, S, dtype=torch.bool, device=self.bounds.device)
        for n in slots:
            out |= self._in_slot(S, n)
        return out

    def _in_slot(self, S: int, n: int) -> Tensor:
        # bool [B, HK or 1, T, S]: what slot n shows, classes included
        j = torch.arange(S, device=self.bounds.device)
        begin, end = self.bounds[:, None, :, n, 0, None], self.bounds[:, None, :, n, 1, None]
        inside = (begin <= j) & (j < end)
        if self.rules[n] == KEPT:
            inside = inside & self._kept(S)[:, :, None]
        rule = self._class_rule(S)
        return inside if rule is None else inside & (rule != SKIP)

    def _kept(self, S: int) -> Tensor:
        # bool [B, HK, S]; what is out of range lands in one extra column that is cut off
        if self.kept is None or self.kept_count is None:
            refuse("Spans", "kept", "a list of kept keys, because a slot has the rule KEPT", None)
        K = self.kept.shape[2]
        listed = torch.arange(K, device=self.kept.device) < self.kept_count[..., None]
        listed &= (self.kept >= 0) & (self.kept < S)
        out = torch.zeros(*self.kept.shape[:2], S + 1, dtype=torch.bool, device=self.kept.device)
        return out.scatter(2, self.kept.long().masked_fill(~listed, S), True)[..., :S]

    def _class_rule(self, S: int) -> Tensor | None:
        # int8 [B, 1, T, S]
        if self.class_rules is None or self.row_class is None or self.key_class is None:
            return None
        if self.key_class.shape[1] != S:
            refuse("Spans", "S", f"the {self.key_class.shape[1]} keys that key_class names", S)
        rows, keys = self.class_rules.shape
        row = self.row_class.long().clamp(0, rows - 1)
        key = self.key_class.long().clamp(0, keys - 1)
        return self.class_rules[row[:, :, None], key[:, None, :]][:, None]

    def _in_buffer(self, key: Tensor, S: int) -> Tensor:
        return key.long().masked_fill((key < 0) | (key >= S), -1)[:, None, None, None]


def _first(bad: Tensor) -> list[int] | None:
    where = bad.nonzero()
    return where[0].tolist() if len(where) else None


def validate(spans: Spans, S: int) -> None:
    """`Spans.validate` as a function."""
    op = "Spans.validate"
    check_int(op, "S", S)
    spans = spans.to("cpu")
    begin, end = spans.bounds.long().clamp(0, S).unbind(-1)
    empty = end <= begin
    begin, order = begin.masked_fill(empty, S).sort(dim=-1, stable=True)
    end = end.masked_fill(empty, S).gather(-1, order)
    hit = _first(end[..., :-1] > begin[..., 1:])
    if hit:
        b, t, n = hit
        slots = [int(order[b, t, i]) for i in (n, n + 1)]
        texts = [f"slot {i} [{', '.join(map(str, spans.bounds[b, t, i].tolist()))})" for i in sorted(slots)]
        refuse(op, "bounds", "disjoint spans in every row", f"sample {b}, row {t}: {texts[0]} and {texts[1]} overlap")
    _validate_kept(spans, S)
    _validate_classes(spans, S)
    if spans.sink_key is None:
        return
    is_sink = torch.tensor([rule == SINK for rule in spans.rules])
    outside = (spans.sink_key < 0) | (spans.sink_key >= S)
    hit = _first(~empty & (is_sink & outside)[:, None])
    if hit:
        b, t, n = hit
        refuse(op, "sink_key", f"a key in [0, {S})", f"{int(spans.sink_key[b, n])} for slot {n}, sample {b}, row {t}")


def _validate_kept(spans: Spans, S: int) -> None:
    op, kept, count = "Spans.validate", spans.kept, spans.kept_count
    if kept is None or count is None:
        return
    hit = _first((count < 0) | (count > kept.shape[2]))
    if hit:
        b, h = hit
        refuse(op, "kept_count", f"counts in [0, {kept.shape[2]}]", f"{int(count[b, h])} in sample {b}, head {h}")
    listed = torch.arange(kept.shape[2]) < count[..., None]
    before = torch.nn.functional.pad(kept, (1, 0), value=-1)[..., :-1]
    hit = _first(listed & ((kept <= before) | (kept >= S)))
    if hit:
        b, h, i = hit
        entry = f"{int(kept[b, h, i])} at entry {i} of sample {b}, head {h}"
        refuse(op, "kept", f"ascending, unique keys in [0, {S})", entry)


def _validate_classes(spans: Spans, S: int) -> None:
    op, table = "Spans.validate", spans.class_rules
    if table is None or spans.key_class is None or spans.row_class is None:
        return
    if spans.key_class.shape[1] != S:
        refuse(op, "key_class", f"one class for each of {S} keys", spans.key_class)
    R, C = table.shape
    for name, x, size in (("row_class", spans.row_class, R), ("key_class", spans.key_class, C)):
        hit = _first((x < 0) | (x >= size))
        if hit:
            where = f"{int(x[tuple(hit)])} in sample {hit[0]}, {name.split('_')[0]} {hit[1]}"
            refuse(op, name, f"classes in [0, {size})", where)
    hit = _first(~torch.isin(table, torch.tensor(CLASS_RULES, dtype=torch.int8)))
    if hit:
        expected = "ATTEND, MASS, SINK or SKIP"
        refuse(op, "class_rules", expected, f"{int(table[tuple(hit)])} for row class {hit[0]}, key class {hit[1]}")
    if not bool((table == SINK).any()):
        return
    if spans.class_sink is None:
        refuse(op, "class_sink", "a key per sample, because class_rules has a SINK", None)
    for b, sink in enumerate(spans.class_sink.tolist()):
        used = table[list(set(spans.row_class[b].tolist()))][:, list(set(spans.key_class[b].tolist()))]
        if not 0 <= sink < S and bool((used == SINK).any()):
            refuse(op, "class_sink", f"a key in [0, {S})", f"{sink} in sample {b}")
