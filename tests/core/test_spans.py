"""`Spans`: what each rule shows and where values go, against loops over single keys; and what `validate` finds."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK, SKIP, Rule, Spans

torch.set_num_threads(1)
GARBAGE = 2**31 - 1


def random_spans(seed: int) -> tuple[Spans, int]:
    """Disjoint intervals in shuffled slots, some empty or outside the buffer; every rule, kept lists and classes."""
    draw = random.Random(seed)
    B, T, S, N = draw.randint(1, 3), draw.choice([1, 4, 7]), draw.choice([1, 6, 17]), draw.choice([1, 2, 4, 8])
    HK, K = 2, 5
    bounds = torch.zeros(B, T, N, 2, dtype=torch.int32)
    for b in range(B):
        for t in range(T):
            cuts = sorted(draw.randint(-3, S + 3) for _ in range(2 * N))
            order = draw.sample(range(N), N)
            for n in range(N):
                begin, end = cuts[2 * n], cuts[2 * n + 1]
                bounds[b, t, order[n]] = torch.tensor([end, begin] if draw.random() < 0.2 else [begin, end])
    rules = tuple(draw.choice([ATTEND, MASS, SINK, KEPT]) for _ in range(N))
    fields: dict[str, Tensor] = {}
    if SINK in rules:
        fields["sink_key"] = torch.randint(-2, S + 2, (B, N), dtype=torch.int32)
    if KEPT in rules:
        kept, count = torch.full((B, HK, K), GARBAGE), torch.zeros(B, HK)
        for b in range(B):
            for h in range(HK):
                own = sorted(draw.sample(range(S), draw.randint(0, min(S, K))))
                kept[b, h, : len(own)], count[b, h] = torch.tensor(own), len(own)
        fields |= {"kept": kept.int(), "kept_count": count.int()}
    if draw.random() < 0.6:
        fields["key_class"] = torch.randint(-1, 5, (B, S), dtype=torch.int8)
        fields["row_class"] = torch.randint(-1, 4, (B, T), dtype=torch.int8)
        fields["class_rules"] = torch.tensor(draw.choices([0, 1, 2, -1], k=12), dtype=torch.int8).view(3, 4)
        if draw.random() < 0.7:
            fields["class_sink"] = torch.randint(-2, S + 2, (B,), dtype=torch.int32)
    return Spans(bounds, rules, **fields), S


def one_key(spans: Spans, b: int, h: int, t: int, j: int, S: int) -> tuple[bool, bool, int]:
    """(visible, own value counts, key whose value gets the mass or -1), by the words of the contract."""
    rule = ATTEND
    if spans.class_rules is not None:
        R, C = spans.class_rules.shape
        row = min(max(int(spans.row_class[b, t]), 0), R - 1)
        key = min(max(int(spans.key_class[b, j]), 0), C - 1)
        rule = Rule(int(spans.class_rules[row, key]))
    for n, slot in enumerate(spans.rules):
        begin, end = spans.bounds[b, t, n].tolist()
        if not begin <= j < end or rule == SKIP:
            continue
        if slot == KEPT and j not in spans.kept[b, h, : int(spans.kept_count[b, h])].tolist():
            continue
        if slot == MASS or rule == MASS:
            return True, False, -1
        if slot == SINK:
            to = int(spans.sink_key[b, n])
        elif rule == SINK:
            to = -1 if spans.class_sink is None else int(spans.class_sink[b])
        else:
            return True, True, j
        return True, False, to if 0 <= to < S else -1
    return False, False, -1


@pytest.mark.parametrize("seed", range(60))
def test_every_rule_against_loops_over_single_keys(seed: int) -> None:
    torch.manual_seed(seed)
    spans, S = random_spans(seed)
    visible, weight, destination = spans.visible(S), spans.value_weight(S), spans.destination(S)
    assert visible.shape == weight.shape == destination.shape == (spans.B, spans.HK, spans.T, S)
    for b in range(spans.B):
        for h in range(spans.HK):
            for t in range(spans.T):
                for j in range(S):
                    got = (bool(visible[b, h, t, j]), bool(weight[b, h, t, j]), int(destination[b, h, t, j]))
                    assert got == one_key(spans, b, h, t, j, S), (b, h, t, j)
    wide = spans.pad(8)
    assert wide.N == 8 and len(wide.rules) == 8
    assert torch.equal(wide.visible(S), visible) and torch.equal(wide.destination(S), destination)


def bounds(*rows: list[list[int]]) -> Tensor:
    return torch.tensor([rows], dtype=torch.int32)


def test_defaults_and_letters() -> None:
    spans = Spans(bounds([[0, 1], [2, 3]], [[0, 2], [4, 4]], [[0, 0], [0, 0]]))
    assert (spans.B, spans.T, spans.N, spans.HK) == (1, 3, 2, 1)
    assert spans.rules == (ATTEND, ATTEND)
    assert Spans(spans.bounds, [0, 1]).rules == (ATTEND, MASS)
    assert spans.visible(4)[0, 0].tolist() == [[True, False, True, False], [True, True, False, False], [False] * 4]
    assert spans.pad(2) is spans
    assert spans.to("cpu").rules == spans.rules
    with pytest.raises(dataclasses.FrozenInstanceError):
        spans.rules = ()  # type: ignore[misc]


def test_spans_move_with_all_their_tensors() -> None:
    spans, _ = random_spans(3)
    moved = spans.to("meta")
    for field in dataclasses.fields(Spans):
        x = getattr(spans, field.name)
        assert not isinstance(x, Tensor) or getattr(moved, field.name).device.type == "meta"


I32, I8 = torch.int32, torch.int8
GOOD = torch.zeros(2, 3, 2, 2, dtype=I32)
TABLE = {
    "key_class": torch.zeros(2, 5, dtype=I8),
    "row_class": torch.zeros(2, 3, dtype=I8),
    "class_rules": torch.zeros(1, 1, dtype=I8),
}


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "bounds", {"bounds": GOOD.long()}),
        (TypeError, "bounds", {"bounds": GOOD.tolist()}),
        (ValueError, "bounds", {"bounds": GOOD[0]}),
        (ValueError, "bounds", {"bounds": torch.zeros(2, 3, 3, 2, dtype=I32)}),
        (ValueError, "bounds", {"bounds": torch.zeros(2, 3, 2, 3, dtype=I32)}),
        (ValueError, "rules", {"rules": (ATTEND,)}),
        (ValueError, "rules", {"rules": 3}),
        (ValueError, r"rules\[1\]", {"rules": (ATTEND, SKIP)}),
        (ValueError, r"rules\[0\]", {"rules": (True, ATTEND)}),
        (ValueError, r"rules\[0\]", {"rules": ("attend", ATTEND)}),
        (ValueError, "sink_key", {"rules": (SINK, ATTEND)}),
        (ValueError, "sink_key", {"sink_key": torch.zeros(2, 2, dtype=I32)}),
        (ValueError, "sink_key", {"rules": (SINK, ATTEND), "sink_key": torch.zeros(2, 3, dtype=I32)}),
        (ValueError, "kept", {"rules": (KEPT, ATTEND)}),
        (ValueError, "kept", {"kept": torch.zeros(2, 1, 4, dtype=I32), "kept_count": torch.zeros(2, 1, dtype=I32)}),
        (ValueError, "kept_count", {"rules": (KEPT, ATTEND), "kept": torch.zeros(2, 1, 4, dtype=I32)}),
        (ValueError, "class_rules", {k: v for k, v in TABLE.items() if k != "class_rules"}),
        (ValueError, "key_class", {"class_sink": torch.zeros(2, dtype=I32)}),
        (ValueError, "class_rules", {**TABLE, "class_rules": torch.zeros(0, 2, dtype=I8)}),
        (ValueError, "row_class", {**TABLE, "row_class": torch.zeros(2, 4, dtype=I8)}),
        (TypeError, "key_class", {**TABLE, "key_class": torch.zeros(2, 5)}),
        (ValueError, "class_sink", {**TABLE, "class_sink": torch.zeros(3, dtype=I32)}),
        (ValueError, "sink_key", {"rules": (SINK, ATTEND), "sink_key": torch.zeros(2, 2, dtype=I32, device="meta")}),
    ],
)
def test_metadata_is_refused_by_name(error: type[Exception], name: str, arguments: dict) -> None:
    with pytest.raises(error, match=rf"^Spans: {name}: expected .*, got "):
        Spans(**{"bounds": GOOD, **arguments})


def test_pad_and_dense_views_refuse() -> None:
    spans = Spans(GOOD, **TABLE)
    with pytest.raises(ValueError, match="Spans.pad: N"):
        spans.pad(1)
    with pytest.raises(ValueError, match="Spans.pad: N"):
        spans.pad(3)
    with pytest.raises(ValueError, match="Spans: S: expected the 5 keys"):
        spans.visible(6)


@pytest.mark.parametrize(
    "rows",
    [
        [[[0, 3], [3, 5]]],
        [[[3, 5], [0, 3]]],
        [[[0, 5], [4, 2]]],
        [[[-7, 2], [2, 99]]],
        [[[7, 9], [7, 8]]],
        [[[0, 0], [0, 0]]],
        [[[-4, 0], [-3, 0]]],
    ],
)
def test_validate_accepts_empty_clipped_and_touching_spans(rows: list) -> None:
    spans = Spans(bounds(*rows))
    assert spans.validate(6) is spans


def test_validate_finds_overlaps_and_names_the_first_row() -> None:
    rows = [[[0, 3], [3, 5]], [[2, 9], [0, 3]], [[0, 9], [0, 9]]]
    with pytest.raises(ValueError, match=r"bounds: .*sample 0, row 1: slot 0 \[2, 9\) and slot 1 \[0, 3\) overlap"):
        Spans(bounds(*rows)).validate(6)
    inside = Spans(torch.tensor([[[[0, 8], [9, 9], [3, 4], [9, 9]]]], dtype=I32))
    with pytest.raises(ValueError, match="slot 0 .* and slot 2"):
        inside.validate(10)
    # one span contains two others: neighbours after sorting still meet
    nested = Spans(torch.tensor([[[[0, 2], [0, 9], [4, 5], [6, 7]]]], dtype=I32))
    with pytest.raises(ValueError, match="slot 0 .* and slot 1"):
        nested.validate(10)
    # what overlaps outside the buffer only, shows no key twice
    Spans(bounds([[0, 9], [6, 8]])).validate(6)


@pytest.mark.parametrize(
    ("kept", "count", "message"),
    [
        ([0, 2, 1, GARBAGE], 3, "1 at entry 2 of sample 0, head 0"),
        ([0, 2, 2, GARBAGE], 3, "2 at entry 2"),
        ([-1, 2, 3, GARBAGE], 3, "-1 at entry 0"),
        ([0, 2, 6, GARBAGE], 3, "6 at entry 2"),
        ([0, 1, 2, 3], 5, "kept_count: expected counts in .0, 4., got 5"),
        ([0, 1, 2, 3], -1, "kept_count"),
    ],
)
def test_validate_finds_bad_kept_lists(kept: list[int], count: int, message: str) -> None:
    def spans(kept: list[int], count: int) -> Spans:
        lists = {"kept": torch.tensor([[kept]]).int(), "kept_count": torch.tensor([[count]]).int()}
        return Spans(bounds([[0, 6]]), (KEPT,), **lists)

    with pytest.raises(ValueError, match=message):
        spans(kept, count).validate(6)
    spans([0, 5, GARBAGE], 2).validate(6)


def test_validate_finds_bad_sinks_only_where_they_are_used() -> None:
    sinks = torch.tensor([[6, -5]], dtype=I32)
    with pytest.raises(ValueError, match=r"sink_key: expected a key in \[0, 6\), got 6 for slot 0, sample 0, row 1"):
        Spans(bounds([[3, 3], [0, 1]], [[0, 1], [1, 2]]), (SINK, ATTEND), sinks).validate(6)
    Spans(bounds([[3, 3], [0, 1]]), (SINK, ATTEND), sinks).validate(6)


def test_validate_finds_bad_classes() -> None:
    table = {"key_class": torch.tensor([[0, 1, 1]], dtype=I8), "row_class": torch.zeros(1, 1, dtype=I8)}
    row = bounds([[0, 3]])

    def spans(**changes: Tensor) -> Spans:
        return Spans(row, **{**table, "class_rules": torch.tensor([[0, 2]], dtype=I8), **changes})

    spans(class_sink=torch.tensor([0], dtype=I32)).validate(3)
    with pytest.raises(ValueError, match="class_sink: expected a key per sample"):
        spans().validate(3)
    with pytest.raises(ValueError, match=r"class_sink: expected a key in \[0, 3\), got 3 in sample 0"):
        spans(class_sink=torch.tensor([3], dtype=I32)).validate(3)
    with pytest.raises(ValueError, match=r"key_class: expected classes in \[0, 2\), got 2 in sample 0, key 1"):
        spans(key_class=torch.tensor([[0, 2, 1]], dtype=I8)).validate(3)
    with pytest.raises(ValueError, match="row_class: .* got -1 in sample 0, row 0"):
        spans(row_class=torch.tensor([[-1]], dtype=I8)).validate(3)
    with pytest.raises(ValueError, match="class_rules: .* got 3 for row class 0, key class 1"):
        spans(class_rules=torch.tensor([[0, 3]], dtype=I8)).validate(3)
    with pytest.raises(ValueError, match="key_class: expected one class for each of 4 keys"):
        spans().validate(4)
    # a sink that no key needs may be anything
    spans(key_class=torch.zeros(1, 3, dtype=I8), class_sink=torch.tensor([-1], dtype=I32)).validate(3)


def test_spans_go_through_a_compiled_forward() -> None:
    from streamkernels.core.spans import bottom_right, causal, sliding_window

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T = x.shape
        window = sliding_window(T, 3, sinks=1, B=B)
        chunk = Spans(bottom_right(T, T + 2, B=B).bounds, rules=(MASS,))
        return causal(T, B=B).bounds, window.bounds, chunk.bounds

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5), (3, 9)):
        for got, want in zip(compiled(torch.zeros(shape)), forward(torch.zeros(shape)), strict=True):
            assert torch.equal(got, want)
