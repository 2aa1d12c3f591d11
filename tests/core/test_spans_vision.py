"""Vision rules and class tables against loops over single keys: who sees what, and where each probability goes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from streamkernels.core import spans as build
from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK, SKIP, Rule, Spans

torch.set_num_threads(1)
Images = list[tuple[int, int]]
GARBAGE = 2**31 - 1


def expected(
    S: int, T: int, images: Images, t2v: Rule, v2v: Rule, sink: int | None = None, half: bool = False, kept: tuple = ()
) -> tuple[Tensor, Tensor]:
    """(visible, destination) [T, S] of the last T rows, key by key."""
    vision = [j for j in range(S) if any(begin <= j < end for begin, end in images)]
    first_half = vision[: len(vision) // 2]
    sink = vision[0] if sink is None and vision else sink
    visible, destination = torch.zeros(T, S, dtype=torch.bool), torch.full((T, S), -1)
    for t in range(T):
        row = S - T + t
        for j in range(row + 1):
            rule = ATTEND
            if j in vision:
                rule = v2v if row in vision else t2v
                if half and row not in vision and j not in first_half:
                    rule = ATTEND
            if rule == SKIP or (rule == KEPT and j not in kept):
                continue
            visible[t, j] = True
            destination[t, j] = -1 if rule == MASS else sink if rule == SINK else j
    return visible, destination


def check(spans: Spans, samples: list[tuple[int, int, Images]], t2v: Rule, v2v: Rule, **options) -> None:
    S = max(max(s for s, _, _ in samples), 1)
    spans.validate(S)
    begin, end = spans.bounds.unbind(-1)
    assert bool((begin >= 0).all() and (end >= begin).all())
    visible, destination, weight = spans.visible(S), spans.destination(S), spans.value_weight(S)
    assert torch.equal(weight.long() * (torch.arange(S) + 1), torch.where(weight, destination + 1, 0))
    for b, (s, t, images) in enumerate(samples):
        seen, goes = expected(s, t, images, t2v, v2v, **options)
        assert torch.equal(visible[b, 0, :t, :s], seen), b
        assert torch.equal(destination[b, 0, :t, :s], goes), b
        assert not visible[b, 0, t:].any() and not visible[b, 0, :, s:].any()


RULES = (ATTEND, SKIP, MASS, SINK)
BATCHES: list[list[tuple[int, int, Images]]] = [
    [(12, 12, [(3, 7)])],
    [(12, 3, [(3, 7)]), (9, 9, []), (17, 8, [(0, 17)]), (5, 0, [(1, 2)])],
    [(20, 20, [(2, 5), (8, 9), (9, 12)]), (20, 20, [(0, 1), (19, 20)]), (1, 1, [(0, 1)])],
    # more images than eight slots hold: classes take over
    [(31, 31, [(i, i + 2) for i in range(1, 29, 3)]), (31, 17, [(4, 6)]), (7, 7, [])],
]


@pytest.mark.parametrize("batch", range(len(BATCHES)))
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("t2v", "v2v"), list(itertools.product(RULES, RULES)))
def test_every_pair_of_rules(batch: int, half: bool, t2v: Rule, v2v: Rule) -> None:
    samples = BATCHES[batch]
    lengths, rows, images = ([sample[i] for sample in samples] for i in range(3))
    spans = build.vision(lengths, images, text_to_vision=t2v, vision_to_vision=v2v, first_half=half, rows=rows)
    check(spans, samples, t2v, v2v, half=half)
    assert spans.B == len(samples) and max(rows) == spans.T


@pytest.mark.parametrize("seed", range(30))
def test_random_images(seed: int) -> None:
    draw = random.Random(seed)
    samples = []
    for _ in range(draw.randint(1, 3)):
        S = draw.choice([1, 17, 40])
        cuts = sorted(draw.sample(range(S + 1), min(S + 1, 2 * draw.randint(0, 6)) // 2 * 2))
        samples.append((S, draw.randint(0, S), list(zip(cuts[::2], cuts[1::2], strict=True))))
    t2v, v2v = draw.choice(RULES), draw.choice(RULES)
    lengths, rows, images = ([sample[i] for sample in samples] for i in range(3))
    for own in images:
        draw.shuffle(own)
    spans = build.vision(lengths, images, text_to_vision=t2v, vision_to_vision=v2v, rows=rows)
    check(spans, samples, t2v, v2v)
    # the same from a mask over the ids, and from one sample at a time
    mask = torch.zeros(len(samples), max(lengths), dtype=torch.bool)
    for b, own in enumerate(images):
        for begin, end in own:
            mask[b, begin:end] = True
    again = build.vision(lengths, mask, text_to_vision=t2v, vision_to_vision=v2v, rows=rows)
    assert torch.equal(again.bounds, spans.bounds) and again.rules == spans.rules
    for b, (S, T, own) in enumerate(samples):
        one = build.vision(S, own, text_to_vision=t2v, vision_to_vision=v2v, rows=T)
        check(one, [(S, T, own)], t2v, v2v)
        got = spans.destination(max(lengths))[b, 0, :T, :S]
        assert torch.equal(one.destination(S)[0, 0], got)


def test_vision_intervals() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    assert build.vision_intervals(mask) == [[(1, 3), (4, 5)], [(0, 5)], []]
    assert build.vision_intervals(mask[0]) == [[(1, 3), (4, 5)]]


def visipruner_code(layer: int, size: str, images: int, n: int, per_image: int, begin: int) -> tuple[Tensor, Tensor]:
    """What the released code does after the softmax in shallow layers: (value share [n, n], share moved to `begin`)."""
    end = begin + per_image * images
    half = begin + per_image // 2 * images
    own = torch.ones(n, n).tril()
    to_sink = torch.zeros(n, n)
    if layer == 0 and size == "7b":
        own[begin:, begin:end] = 0
        to_sink[end:, begin:end] = 1
    elif layer == 0 and size == "13b":
        own[begin:end, begin:end] = 0
        own[end:, begin:half] = 0
    elif 0 < layer < 6:
        own[end:, begin:end] = 0
    return own, to_sink


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    ("layer", "size", "rules", "half"),
    [
        (0, "7b", (SINK, MASS), False),
        (0, "13b", (MASS, MASS), True),
        (1, "7b", (MASS, ATTEND), False),
        (6, "7b", None, False),
    ],
)
def test_the_shallow_layers_of_visipruner(images: int, layer: int, size: str, rules: tuple | None, half: bool) -> None:
    begin, per_image, n = 5, 6, 23
    end = begin + per_image * images
    own, to_sink = visipruner_code(layer, size, images, n, per_image, begin)
    t2v, v2v = rules or (ATTEND, ATTEND)
    separately = [(begin + per_image * i, begin + per_image * (i + 1)) for i in range(images)]
    spans = build.vision(n, separately, text_to_vision=t2v, vision_to_vision=v2v, first_half=half)
    # the softmax is over all causal keys: nothing is renormalised
    assert torch.equal(spans.visible(n)[0, 0], torch.ones(n, n).tril().bool())
    assert torch.equal(spans.value_weight(n)[0, 0].float(), own)
    destination = spans.destination(n)[0, 0]
    moved = (destination == begin) & (torch.arange(n) != begin)
    moved[:, begin] = (destination[:, begin] == begin) & ~spans.value_weight(n)[0, 0, :, begin]
    assert torch.equal(moved.float(), to_sink)
    together = build.vision(n, [(begin, end)], text_to_vision=t2v, vision_to_vision=v2v, first_half=half)
    assert torch.equal(together.bounds, spans.bounds) and together.rules == spans.rules
    assert spans.N <= 4


def test_the_table_of_the_design() -> None:
    assert build.vision(9, [(2, 5)]).bounds[0, 6].tolist() == [[0, 2], [5, 7]]
    assert build.vision(9, [(2, 5)]).bounds[0, 3].tolist() == [[0, 4], [0, 0]]
    shallow = build.vision(9, [(2, 5)], text_to_vision=MASS)
    assert shallow.rules == (ATTEND, ATTEND, MASS, ATTEND)
    assert shallow.bounds[0, 6].tolist() == [[0, 2], [5, 7], [2, 5], [0, 0]]
    assert build.vision(9, [(2, 5)], rows=1).bounds.tolist() == [[[[0, 2], [5, 9]]]]
    assert build.vision(4, [], text_to_vision=SINK).rules == (ATTEND,)


@pytest.mark.parametrize("v2v", [ATTEND, KEPT, SKIP])
def test_kept(v2v: Rule) -> None:
    kept = torch.tensor([[[3, 6, GARBAGE], [5, GARBAGE, GARBAGE]], [[2, 4, 9], [GARBAGE, 0, 0]]]).int()
    count = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32)
    images = [[(3, 7)], [(2, 5), (8, 10)]]
    spans = build.vision([12, 11], images, text_to_vision=KEPT, vision_to_vision=v2v, kept=kept, kept_count=count)
    visible = spans.validate(12).visible(12)
    assert spans.HK == 2
    for b, S in enumerate((12, 11)):
        for h in range(2):
            own = tuple(kept[b, h, : int(count[b, h])].tolist())
            seen, _ = expected(S, S, images[b], KEPT, v2v, kept=own)
            assert torch.equal(visible[b, h, :S, :S], seen)


def test_sink_keys() -> None:
    # any vision token may be the sink of text rows: the paper tries first, middle and last
    for sink in (3, 5, 6):
        spans = build.vision(12, [(3, 7)], text_to_vision=SINK, vision_to_vision=MASS, sink_key=sink)
        check(spans, [(12, 12, [(3, 7)])], SINK, MASS, sink=sink)
    each = build.vision([12, 12, 4], [[(3, 7)], [(1, 4)], []], text_to_vision=SINK, sink_key=[6, 0, 0])
    assert each.sink_key[:, 0].tolist() == [6, 0, -1]
    # text between two images may not wait for the second
    with pytest.raises(ValueError, match="a key that no row uses before it exists: at most 5 in sample 0, got 6"):
        build.vision(12, [(3, 5), (6, 9)], text_to_vision=SINK, sink_key=6)
    with pytest.raises(ValueError, match="at most 3 in sample 0, got 4"):
        build.vision(12, [(3, 7)], vision_to_vision=SINK, sink_key=4)
    # a chunk of late rows may
    build.vision(12, [(3, 5), (6, 9)], text_to_vision=SINK, sink_key=6, rows=3).validate(12)


TABLE = [[ATTEND, MASS, SINK], [ATTEND, SKIP, ATTEND]]


@pytest.mark.parametrize("seed", range(20))
def test_classes(seed: int) -> None:
    draw = random.Random(seed)
    R, C = draw.randint(1, 3), draw.randint(1, 4)
    table = [[draw.choice([ATTEND, MASS, SINK, SKIP]) for _ in range(C)] for _ in range(R)]
    keys = [[draw.randrange(C) for _ in range(draw.choice([1, 5, 17]))] for _ in range(draw.randint(1, 3))]
    rows = [[draw.randrange(R) for _ in range(draw.randint(0, len(own)))] for own in keys]
    has_sink = any(SINK in row for row in table)
    spans = build.classes(keys, table, row_class=rows, sink_key=[0] * len(keys) if has_sink else None, S=20)
    visible, destination = spans.validate(20).visible(20), spans.destination(20)
    for b in range(len(keys)):
        S, T = len(keys[b]), len(rows[b])
        for t, j in itertools.product(range(spans.T), range(20)):
            seen = t < T and j <= S - T + t and table[rows[b][t]][keys[b][j]] != SKIP
            assert bool(visible[b, 0, t, j]) == seen
            goes = {ATTEND: j, MASS: -1, SINK: 0}[table[rows[b][t]][keys[b][j]]] if seen else -1
            assert int(destination[b, 0, t, j]) == goes


def test_a_class_sink_may_come_after_rows_that_do_not_use_it() -> None:
    assert build.classes([0, 0, 2], TABLE, row_class=[0, 0, 0], sink_key=2).class_sink.tolist() == [2]
    assert build.classes([0, 2, 2], TABLE, row_class=[1, 1, 0], sink_key=2).class_sink.tolist() == [2]
    assert build.classes([[0], []], TABLE, sink_key=0).B == 2


def test_classes_of_the_rows_own_keys_and_of_tensors() -> None:
    keys = [0, 1, 1, 0]
    table = [[ATTEND, MASS], [ATTEND, SKIP]]
    spans = build.classes(keys, table)
    assert torch.equal(spans.row_class, spans.key_class)
    again = build.classes(torch.tensor([keys]), torch.tensor(table), row_class=torch.tensor([keys]))
    assert torch.equal(again.destination(4), spans.destination(4))
    assert spans.destination(4)[0, 0].tolist() == [[0, -1, -1, -1], [0, -1, -1, -1], [0, -1, -1, -1], [0, -1, -1, 3]]


K = {"kept": torch.zeros(1, 1, 1, dtype=torch.int32), "kept_count": torch.zeros(1, 1, dtype=torch.int32)}
MANY = [(i, i + 1) for i in range(0, 18, 2)]


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, "text_to_vision: expected one of", lambda: build.vision(9, [(1, 2)], text_to_vision=7)),
        (ValueError, "vision_to_vision", lambda: build.vision(9, [(1, 2)], vision_to_vision="mass")),
        (ValueError, r"images\[0\]: expected .begin, end.*<= 9, got", lambda: build.vision(9, [(1, 10)])),
        (ValueError, r"images\[0\]", lambda: build.vision(9, [(4, 2)])),
        (ValueError, r"images\[0\]", lambda: build.vision(9, [[(4, 5, 6)]])),
        (ValueError, r"images\[0\]: expected ints >= 0", lambda: build.vision(9, [(-1, 2)])),
        (TypeError, r"images\[0\]: expected ints", lambda: build.vision(9, [[(1.0, 2)]])),
        (TypeError, "images: expected .begin, end. pairs", lambda: build.vision(9, [3, 4])),
        (ValueError, r"images\[0\]: expected disjoint intervals, got \(1, 4\) and \(3, 5\)", lambda: overlap()),
        (ValueError, "images: expected 2 samples, as in lengths", lambda: build.vision([9, 9], [[(1, 2)]])),
        (ValueError, "rows: expected at most", lambda: build.vision(9, [(1, 2)], rows=10)),
        (ValueError, "kept: expected kept and kept_count", lambda: build.vision(9, [(1, 2)], text_to_vision=KEPT)),
        (ValueError, "kept: expected None", lambda: build.vision(9, [(1, 2)], **K)),
        (ValueError, "images: expected images that fit", lambda: build.vision(20, MANY, text_to_vision=KEPT, **K)),
        (ValueError, "sink_key: expected None", lambda: build.vision(9, [(1, 2)], sink_key=1)),
        (ValueError, "sink_key: expected an int >= 0", lambda: table([0], sink_key=-1)),
        (TypeError, "vision_intervals: mask", lambda: build.vision_intervals(torch.ones(3))),
        (ValueError, r"rules\[0\]\[1\]: expected one of ATTEND", lambda: build.classes([0], [[0, KEPT]])),
        (ValueError, "rules: expected a rectangular table", lambda: build.classes([0], [[0, 1], [0]])),
        (ValueError, "rules: expected a rectangular table", lambda: build.classes([0], [])),
        (ValueError, "key_class: expected classes below 3.*got 3 in sample 0 at index 1", lambda: table([0, 3])),
        (ValueError, "row_class: expected classes below 2", lambda: table([0, 2])),
        (ValueError, "row_class: expected at most the 1 keys", lambda: table([0], row_class=[0, 0])),
        (ValueError, "sink_key: expected a key exactly if", lambda: build.classes([0], TABLE)),
        (ValueError, "sink_key: .* at most 1 in sample 0, got 2", lambda: table([0, 2, 0], row_class=[0, 0])),
        (ValueError, "S: expected an int >= 2", lambda: table([0, 0], S=1)),
    ],
)
def test_bad_input_is_refused_by_name(error: type[Exception], text: str, call) -> None:
    with pytest.raises(error, match=text):
        call()


def overlap() -> Spans:
    return build.vision(9, [(3, 5), (1, 4)])


def table(key_class: list[int], **options) -> Spans:
    return build.classes(key_class, TABLE, **{"sink_key": 2 if len(key_class) == 3 else 0, **options})
