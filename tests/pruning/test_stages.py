"""Which rows stay, against the formulas written out, with ties, none kept, all kept, and batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from streamkernels import VisionPruning, compact, span_attention, spans
from streamkernels.ops.token_scores import TokenScores
from streamkernels.pruning.layout import VisionLayout
from streamkernels.pruning.scores import Probe
from streamkernels.pruning.stages import Rows, Stages, len_left, share

H, HK, D = 4, 2, 8


def probe_of(layer, stages, seed=0, scale=1.0):
    """A layer's random q, k, v over the rows that the stages have, and its literal contributions."""
    rows, random = stages.rows, torch.Generator().manual_seed(seed + 31 * layer)
    B, W = rows.origin.shape
    q = torch.randn(B, H, W, D, generator=random, dtype=torch.float64)
    k, v = (torch.randn(B, HK, W, D, generator=random, dtype=torch.float64) for _ in range(2))
    v = v * scale
    o, lse = span_attention(q, k, v, spans.bottom_right(rows.count.tolist(), rows.count.tolist()), return_lse=True)
    last = (rows.count - 1).long()
    at = torch.arange(B)
    q1, o1, lse1 = q[at, :, last][:, :, None], o[at, :, last][:, :, None], lse[at, :, last][:, :, None]
    probe = Probe(layer, q1, k, v, o1, lse1, rows.vision, rows.vision_count, None)
    literal = []
    for b in range(B):
        n = int(rows.count[b])
        weights = (q[b, :, n - 1, None] @ k[b, :, :n].repeat_interleave(2, 0).mT / D**0.5).softmax(-1)[:, 0]
        contributions = (weights[..., None] * v[b, :, :n].repeat_interleave(2, 0)).transpose(0, 1).flatten(1)
        whole = contributions.sum(0)
        cosine = F.cosine_similarity(whole - contributions, whole.expand(n, -1), dim=-1)
        literal.append((cosine, contributions.norm(dim=-1), weights.mean(0)))
    return probe, literal


def origins(rows):
    return [row[: int(n)].tolist() for row, n in zip(rows.origin, rows.count, strict=True)]


def bools(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


VISION = bools("011101100", "001100000", "000000000", "111111110")


@pytest.mark.parametrize("rows", [slice(None), [0], [1], [3]], ids=["batch", "first alone", "second", "fourth"])
@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("exit_threshold", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("token_threshold", [0.5, -1.0, 1e9], ids=["some", "all", "none"])
def test_dynamic_selection_is_the_literal_one(token_threshold, exit_threshold, consecutive, rows):
    given, B = VISION[rows], len(VISION[rows])
    layers = 12
    config = VisionPruning.fast(
        first_probe_layer=2,
        layer_threshold=0.9,
        token_threshold=token_threshold,
        exit_threshold=exit_threshold,
        consecutive=consecutive,
    )
    stages = Stages(config, layers, VisionLayout(given))
    kept = [row.nonzero()[:, 0].tolist() for row in given]
    phase, hits, seen = ["search"] * B, [0] * B, {tuple(map(len, kept))}
    assert stages.start() is None
    for layer in range(layers):
        if layer:
            stages.take()
        text = [(~row).nonzero()[:, 0].tolist() for row in given]
        assert origins(stages.rows) == [sorted(a + b) for a, b in zip(text, kept, strict=True)]
        assert not stages.rows.full or stages.rows.count.tolist() == [stages.rows.width] * B
        assert stages.rows.full or B > 1
        if not stages.probes(layer):
            assert layer in (0, 1, layers - 1) or not any(kept)
            continue
        before = origins(stages.rows)
        probe, literal = probe_of(layer, stages)
        stages.decide(layer, probe)
        for b, (cosine, norm, _) in enumerate(literal):
            at = [before[b].index(i) for i in kept[b]]
            if not at:
                continue
            if phase[b] == "search":
                if any(cosine[i] < 0.9 for i in at):
                    phase[b] = "filtered"
                    kept[b] = [i for i, j in zip(kept[b], at, strict=True) if norm[j] > token_threshold]
            else:
                quiet = all(cosine[i] >= exit_threshold for i in at)
                hits[b] = hits[b] + 1 if quiet else 0 if consecutive else hits[b]
                if hits[b] == 2:
                    kept[b] = []
        seen.add(tuple(map(len, kept)))
    changed = any(p == "filtered" for p in phase)
    assert [layer >= 0 for layer in stages.filter_layer.tolist()] == [p == "filtered" for p in phase]
    still = not changed if B == 1 else token_threshold < 0 and exit_threshold > 0.9
    assert len(seen) > 1 or still or token_threshold < 0, "nothing changed: the test would be blind"


class Said:
    """A probe whose scores are given: (cosine, norm) of every vision token alike; as of no token behind the count."""

    def __init__(self, stages, cosine, norm, dtype=torch.float32):
        index, count = stages.rows.vision, stages.rows.vision_count
        listed = torch.arange(index.shape[1]) < count[:, None]
        both = (torch.where(listed, x, nothing).to(dtype) for x, nothing in ((cosine, 1.0), (norm, 0.0)))
        self.given = TokenScores(*both, torch.zeros(index.shape, dtype=dtype))

    def scores(self):
        return self.given


@pytest.mark.parametrize(("consecutive", "gone_after"), [(False, 4), (True, 5)])
def test_exits_add_up_or_follow_one_another(consecutive, gone_after):
    config = VisionPruning.fast(first_probe_layer=1, consecutive=consecutive)
    stages = Stages(config, 9, VisionLayout(VISION[:1]))
    # the filter layer itself does not count; thresholds: below 0.995 filters, from 0.999 on is quiet, above 0.2 stays
    said = [(0.9, 1.0), (0.9, 0.3), (0.999, 0.0), (0.998, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)]
    for layer, (cosine, norm) in enumerate(said):
        stages.take()
        if layer and stages.probes(layer):
            stages.decide(layer, Said(stages, cosine, norm))
    stages.take()
    assert stages.filter_layer.tolist() == [1] and stages.exit_layer.tolist() == [gone_after]
    assert stages.reads == gone_after and origins(stages.rows) == [[0, 4, 7, 8]]


@pytest.mark.parametrize(("cosine", "norm", "left"), [(0.995, 0.0, 5), (0.994, 0.2, 0), (0.994, 0.21, 5)])
def test_thresholds_are_strict(cosine, norm, left):
    """Filters below 0.995, not at it; what stays is above 0.2, not at it."""
    stages = Stages(VisionPruning.fast(first_probe_layer=0), 4, VisionLayout(VISION[:1]))
    stages.decide(0, Said(stages, torch.tensor(cosine, dtype=torch.float64), torch.tensor(norm, dtype=torch.float64),
                          torch.float64))
    stages.take()
    assert stages.rows.vision_count.tolist() == [left]


@pytest.mark.parametrize("score", ["norm", "attention"])
def test_schedules_keep_the_best(score):
    config = VisionPruning.fixed({0: 4, 2: 0.4, 3: 0}, score=score)
    layout = VisionLayout.read(VISION)
    stages = Stages(config, 6, layout)
    kept = [row.nonzero()[:, 0].tolist() for row in VISION]
    for layer in range(5):
        if layer:
            stages.take()
        before = origins(stages.rows)
        assert [[i for i in row if VISION[b, i]] for b, row in enumerate(before)] == kept
        assert stages.rows.width == max(map(len, before))
        if not stages.probes(layer):
            continue
        assert stages.needs_scores(layer) == (layer != 3)
        probe, literal = probe_of(layer, stages) if stages.needs_scores(layer) else (None, None)
        stages.decide(layer, probe)
        for b in range(4):
            k = share(config.schedule[layer], int(VISION[b].sum()))
            if k == 0:
                kept[b] = []
                continue
            values = literal[b][1 if score == "norm" else 2]
            ranked = sorted(kept[b], key=lambda i, b=b, values=values: (-float(values[before[b].index(i)]), i))
            kept[b] = sorted(ranked[:k])
    assert kept == [[]] * 4 and stages.reads == 0


@pytest.mark.parametrize("k", [3, 0.5])
def test_ties_go_to_the_earlier_token(k):
    config = VisionPruning.fixed({0: k}, score=lambda probe: torch.ones(probe.index.shape))
    stages = Stages(config, 3, VisionLayout.read(VISION))
    probe, _ = probe_of(0, stages)
    stages.decide(0, probe)
    stages.take()
    vision = [[i for i in row if VISION[b, i]] for b, row in enumerate(origins(stages.rows))]
    assert vision == [[1, 2, 3][: share(k, 5)], [2, 3][: share(k, 2)], [], [0, 1, 2, 3][: share(k, 8)]]


def test_a_nan_is_dropped_first():
    def score(probe):
        out = torch.arange(float(probe.index.shape[1])).expand(probe.index.shape).clone()
        return out.index_fill_(1, torch.tensor([7, 4]), float("nan"))

    for k, expected in ((2, [5, 6]), (0.25, [5, 6])):
        stages = Stages(VisionPruning.fixed({0: k}, score=score), 3, VisionLayout.read(VISION[3:]))
        stages.decide(0, probe_of(0, stages)[0])
        stages.take()
        assert origins(stages.rows) == [[*expected, 8]]


def test_padding_goes_behind_wherever_it_was():
    real = bools("001111111", "111110000", "010101011", "111111111")
    places = [row.nonzero()[:, 0].tolist() for row in real]
    for layout in (VisionLayout(VISION, real), VisionLayout.read(VISION, real)):
        stages = Stages(VisionPruning.fixed({0: 1}), 3, layout)
        index, count = stages.start()
        assert [row[: int(n)].tolist() for row, n in zip(index, count, strict=True)] == places
        assert origins(stages.rows) == places
        x = torch.arange(9.0)[None, :, None].expand(4, 9, 2).contiguous()
        moved = compact(x, index, count)
        moved[torch.arange(moved.shape[1]) >= count[:, None]] = float("nan")  # nobody may read these
        back = stages.rows.back(moved, 9)
        assert torch.equal(back, x * real[..., None])


def test_rows_of_everything_and_of_nothing():
    rows = Rows.all(VISION)
    assert rows.whole and origins(rows) == [list(range(9))] * 4 and rows.vision_count.tolist() == [5, 2, 0, 8]
    none = rows.keep(torch.full((4, 3), -1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
    assert not none.whole and origins(none) == [[]] * 4 and not none.is_vision.any()
    assert none.origin.tolist() == [[-1] * 3] * 4


def test_layouts():
    layout = VisionLayout.read(VISION, torch.ones_like(VISION))
    assert layout.real is None and layout.counts == ((9, 5), (9, 2), (9, 0), (9, 8)) and layout.host is None
    assert VisionLayout.read(VISION, masks=True).host[1].equal(VISION)
    with pytest.raises(TypeError, match="VisionLayout: vision: expected a bool tensor"):
        VisionLayout(VISION.int())
    with pytest.raises(ValueError, match="VisionLayout: real: expected bool"):
        VisionLayout(VISION, VISION[:2])


def test_what_a_schedule_has_left():
    config = VisionPruning.fixed({1: 10, 3: 0.25, 5: 0})
    assert [len_left(config, layer, 20) for layer in range(7)] == [20, 20, 10, 10, 5, 5, 0]
    assert share(0.34, 9) == 3 and share(4, 3) == 3


def test_scores_that_are_no_scores():
    stages = Stages(VisionPruning.fixed({0: 1}, score=lambda probe: probe.index), 3, VisionLayout.read(VISION))
    with pytest.raises(ValueError, match="VisionPruning: score: expected a function that returns floats"):
        stages.decide(0, probe_of(0, stages)[0])
