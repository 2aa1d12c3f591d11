"""pruned_attention: every stage against its literal definition on a dense probability matrix."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor

from streamkernels import pruned_attention, span_attention, spans
from streamkernels.testing.cases import Case
from streamkernels.testing.compare import assert_exact
from streamkernels.testing.inputs import make_inputs, random_kept

RULES = ("attend", "skip", "mass", "sink", "kept")
S = 13
IMAGES = {
    "one": [[(3, 8)], [(2, 9)]],
    "several": [[(1, 4), (6, 7), (9, 12)], [(2, 5)]],
    "many": [[(i, i + 1) for i in range(1, 13, 2)], []],
    "none": [[], []],
}


def inputs(T: int = S):
    return make_inputs(Case(2, 4, 2, T, S, 8, "bottom_right", dtype=torch.float64, softcap=2.0, sink_logits=True))


def literal(x, images, stage, lengths, sink_keys, kept) -> tuple[Tensor, Tensor]:
    """Softmax over what is seen, then the probabilities of vision keys are dropped or moved, one row at a time."""
    B, H, T, D = x.q.shape
    o, lse = torch.zeros(B, H, T, D, dtype=torch.float64), torch.full((B, H, T), -inf, dtype=torch.float64)
    for b in range(B):
        vision = [j for begin, end in images[b] for j in range(begin, end)]
        first_half = vision[: len(vision) // 2]
        for h in range(H):
            k, v = x.k[b, h // 2], x.v[b, h // 2]
            rows = min(T, lengths[b])
            for t in range(rows):
                own = lengths[b] - rows + t
                rule = stage[1] if own in vision else stage[0]
                listed = [] if kept is None else kept[0][b, h // 2, : kept[1][b, h // 2]].tolist()
                sees, drops, moves = [], [], []
                for j in range(own + 1):
                    if j not in vision or rule == "attend" or (rule == "mass_first_half" and j not in first_half):
                        sees.append(j)
                    elif rule == "kept":
                        sees += [j] if j in listed else []
                    elif rule in ("mass", "sink", "mass_first_half"):
                        sees.append(j)
                        (moves if rule == "sink" else drops).append(j)
                if not sees:
                    continue
                s = 2.0 * torch.tanh(k[sees] @ x.q[b, h, t] / D**0.5 / 2.0)
                lse[b, h, t] = s.logsumexp(0)
                p = dict(zip(sees, (torch.exp(s) / (s.exp().sum() + x.sink_logits[h].exp())).tolist(), strict=True))
                moved = sum(p[j] for j in moves)
                for j in drops + moves:
                    p[j] = 0.0
                o[b, h, t] = sum(weight * v[j] for j, weight in p.items())
                if moves:
                    o[b, h, t] += moved * v[sink_keys[b]]
    return o, lse


def check(x, images, stage, *, lengths=(S, S), sink_key=None, kept=None, given=None):
    options = {"softcap": 2.0, "sink_logits": x.sink_logits, "return_lse": True}
    if kept is not None:
        options |= {"kept": kept[0], "kept_count": kept[1]}
    vision = images if given is None else given
    ours = pruned_attention(x.q, x.k, x.v, vision, stage, lengths=list(lengths), sink_key=sink_key, **options)
    sinks = [min((i for i, _ in own), default=-1) for own in images] if sink_key is None else [sink_key] * 2
    for name, a, b in zip(("o", "lse"), ours, literal(x, images, stage, lengths, sinks, kept), strict=True):
        assert_exact(name, a, b)


@pytest.mark.parametrize("images", ["one", "several", "none"])
@pytest.mark.parametrize("vision_rule", RULES)
@pytest.mark.parametrize("text_rule", [*RULES, "mass_first_half"])
def test_every_pair_of_rules(text_rule, vision_rule, images):
    stage = (text_rule, vision_rule)
    kept = random_kept(2, 2, S, 6, torch.Generator().manual_seed(0)) if "kept" in stage else None
    if images == "several" and set(stage) in ({"kept", "mass"}, {"kept", "sink"}):
        # three images under two rules beside the text between them: ten slots, and classes know no kept list
        with pytest.raises(ValueError, match="images: expected images that fit into 8 slots under KEPT, got 10 slots"):
            check(inputs(), IMAGES[images], stage, kept=kept)
    else:
        check(inputs(), IMAGES[images], stage, kept=kept)


@pytest.mark.parametrize("stage", [("mass", "attend"), ("sink", "mass"), ("mass_first_half", "mass"), ("skip", "sink")])
def test_more_images_than_slots(stage):
    check(inputs(), IMAGES["many"], stage)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("stage", [("mass", "attend"), ("sink", "skip"), ("skip", "skip")])
def test_decode_and_chunks(stage, T):
    check(inputs(T), IMAGES["several"], stage)


@pytest.mark.parametrize("images", ["one", "many"])
def test_ragged_batches_in_longer_buffers(images):
    inside = [[pair for pair in own if pair[1] <= n] for own, n in zip(IMAGES[images], (11, 9), strict=True)]
    check(inputs(), inside, ("sink", "mass"), lengths=(11, 9))
    check(inputs(4), inside, ("mass", "attend"), lengths=(11, 2) if images == "many" else (11, 9))


def test_the_sink_can_be_another_key():
    check(inputs(), IMAGES["one"], ("sink", "mass"), sink_key=1)


def test_ways_to_name_the_vision_keys():
    x, images = inputs(), IMAGES["one"]
    mask = torch.zeros(2, S, dtype=torch.bool)
    for b, own in enumerate(images):
        for begin, end in own:
            mask[b, begin:end] = True
    check(x, images, ("mass", "attend"), given=mask)
    check(x, images, ("mass", "attend"), given=[own[0] for own in images])


def test_one_sample_takes_a_list_of_images():
    x = make_inputs(Case(1, 2, 2, S, S, 8, "causal"))
    a = pruned_attention(x.q, x.k, x.v, [(1, 4), (6, 7)], ("mass", "attend"))
    assert torch.equal(a, pruned_attention(x.q, x.k, x.v, [[(1, 4), (6, 7)]], ("mass", "attend")))


def test_attend_is_plain_causal_attention_and_skip_is_removal():
    x = make_inputs(Case(1, 2, 2, S, S, 8, "causal", dtype=torch.float64))
    plain = span_attention(x.q, x.k, x.v, spans.causal(S))
    assert torch.equal(pruned_attention(x.q, x.k, x.v, [(3, 8)], ("attend", "attend")), plain)
    text = [*range(3), *range(8, S)]
    skipped = pruned_attention(x.q, x.k, x.v, [(3, 8)], ("skip", "attend"))
    removed = span_attention(x.q[:, :, text], x.k[:, :, text], x.v[:, :, text], spans.causal(8))
    assert_exact("text rows", skipped[:, :, text], removed)


def test_gradients_reach_what_is_used_and_nothing_else():
    x = inputs()
    q, k, v, _ = x.leaves()
    o = pruned_attention(q, k, v, IMAGES["one"], ("mass", "skip"))
    dv = torch.autograd.grad(o[:, :, 9:].sum(), (q, k, v))[2]
    assert not bool(dv[0, :, 3:8].any()) and bool(dv[0, :, :3].any())


X = make_inputs(Case(2, 4, 2, 5, 5, 8, "causal"))
KEPT = torch.zeros(2, 2, 3, dtype=torch.int32)
REFUSED = [
    ({"stage": "mass"}, TypeError, "stage: expected a pair of rules"),
    (
        {"stage": ("mass", "mass_first_half")},
        ValueError,
        "stage: expected rules out of attend, skip, mass, sink, kept, got",
    ),
    ({"stage": ("none", "mass")}, ValueError, "stage: expected rules out of .*mass_first_half, got"),
    ({"q": X.q[0]}, ValueError, "q: expected shape"),
    ({"k": X.k[:, :, :4]}, ValueError, r"q: expected at most as many rows as keys \(4\), got 5 rows"),
    ({"lengths": [5]}, ValueError, r"lengths: expected 2 ints in \[0, 5\]"),
    ({"lengths": [5, 6]}, ValueError, r"lengths: expected 2 ints in \[0, 5\], got \[5, 6\]"),
]
FROM_THE_BUILDER = [
    ({"vision": [[(1, 6)], []]}, ValueError, r"vision: images\[0\]: expected \(begin, end\)"),
    ({"vision": [[(1, 3), (2, 4)], []]}, ValueError, "vision: .*disjoint"),
    ({"stage": ("kept", "attend")}, ValueError, "vision: kept: expected"),
    ({"kept": KEPT, "kept_count": KEPT[..., 0]}, ValueError, "vision: kept: expected None"),
    ({"v": X.v.half()}, TypeError, "span_attention: v: expected float32"),
]


@pytest.mark.parametrize(
    "change, error, message", REFUSED + FROM_THE_BUILDER, ids=range(len(REFUSED + FROM_THE_BUILDER))
)
def test_refuses(change, error, message):
    arguments = {"q": X.q, "k": X.k, "v": X.v, "vision": [[(1, 3)], []], "stage": ("mass", "attend")} | change
    prefix = "" if (change, error, message) in FROM_THE_BUILDER else "pruned_attention: "
    with pytest.raises(error, match=prefix + message):
        pruned_attention(**arguments)
