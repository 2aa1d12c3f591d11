"""Every architecture: a streamed session, and a grouped cache, equal one stock forward under a dense additive mask.

The reference is the unmodified eager model in fp32, with a mask of T x S numbers and explicit grouped positions; its
window is written out here from positions, or from ranks of the keys that are seen.
"""

from __future__ import annotations

import random

import pytest
import torch
from transformers import ByT5Tokenizer, DynamicCache

import streamkernels as sk
from streamkernels import PADDING, SOURCE, TARGET, StreamSession, WaitK
from streamkernels.integrations.transformers import GroupedCache
from streamkernels.integrations.transformers.model import windows

WORDS = "the meeting is on the twenty third of march at five thirty pm".split()
CASES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {}),
}
WINDOWED = ["qwen2 with a window", "mistral", "gemma2", "phi3"]


def build(tiny, case, **options):
    family, special = CASES[case]
    # three times as sharp, fp32 itself errs by more than 1e-5 here
    return tiny(family, dtype=torch.float32, **{**special, "attention": "eager", "sharpen": 2, **options})


def dense(model, source, target, limits, offset=0.0, meaning="position", wider=0):
    """Logits of [source | target] in one stock forward; `wider` widens every window, to see that it matters."""
    S, T = len(source), len(target)
    positions = torch.cat([torch.arange(S).double(), torch.arange(T) + float(offset)])
    seen = torch.zeros(S + T, S + T, dtype=torch.bool)
    for i in range(S):
        seen[i, : i + 1] = True
    for j, limit in enumerate(limits):
        seen[S + j, :limit] = True
        seen[S + j, S : S + j + 1] = True
    masks = {}
    for kind, window in zip(kinds(model), windows(model.model), strict=True):
        visible = seen
        if window is not None and meaning == "position":
            visible = seen & (positions[:, None] - positions[None] < window + wider)
        elif window is not None:
            rank = seen.flip(1).cumsum(1).flip(1)
            visible = seen & (rank <= window + wider)
        lowest = torch.finfo(torch.float32).min
        masks[kind] = torch.zeros(1, 1, S + T, S + T).masked_fill(~visible, lowest)
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    if model.config.model_type in ("qwen2", "qwen3", "gemma2"):
        mask = masks | {"sliding_attention": masks.get("sliding_attention")}
    ids = torch.tensor([[*source, *target]])
    with torch.no_grad():
        out = model(ids, position_ids=positions[None].float(), attention_mask=mask, use_cache=False).logits[0]
    return out


def kinds(model):
    types = getattr(model.config, "layer_types", None)
    return types if types is not None else ["full_attention"] * len(model.model.layers)


def streamed(model, policy, offset, meaning, recorded, words=WORDS, **options):
    """(source, target, limits, logits of the target rows) of one session."""
    with sk.patch(model, window=meaning, **options):
        session = StreamSession(
            model,
            ByT5Tokenizer(),
            policy,
            prompt=[4, 5, 6],
            header=[7, 8],
            source_end=[9],
            offset=offset,
            sample=lambda logits: int(logits[2:].argmax()) + 2,
            max_target_tokens=30,
            max_word_tokens=4,
        )
        with session:
            rows = recorded(session)
            list(session.run(words))
            encoded = [session.codec.encode(word, i == 0) for i, word in enumerate(words)]
            source = [4, 5, 6, *(t for word in encoded for t in word), 9][: sum(session.source_lengths)]
            target = [7, 8, *session.tokens][: len(rows)]
            return source, target, session.limits, torch.stack(rows)


def scale(logits):
    return 1e-5 * max(1.0, logits.abs().max().item())


@pytest.mark.parametrize("case, meaning", [(c, "position") for c in CASES] + [(c, "index") for c in WINDOWED])
@pytest.mark.parametrize(
    "k, offset, fused", [(1, 0, False), (3, 7, False), (2, 2.5, False), (1, 5, True), (3, 0.5, True)]
)
def test_a_session_equals_a_dense_mask_on_the_stock_model(tiny, case, meaning, k, offset, fused, recorded):
    model = build(tiny, case, vocab=384)
    source, target, limits, got = streamed(model, WaitK(k), offset, meaning, recorded, fused=fused)
    S = len(source)
    want = dense(model, source, target, limits, offset, meaning)[S:]
    tolerance = scale(want)
    assert len(got) > 20 and S > 20
    assert (got - want).abs().max() <= tolerance
    # a wrong position, limit, window or meaning of it shows, a hundredfold
    wrong = {
        "offset": dense(model, source, target, limits, offset + 1, meaning),
        "limits": dense(model, source, target, [max(n - 1, 0) for n in limits], offset, meaning),
    }
    if case in WINDOWED:
        other = "index" if meaning == "position" else "position"
        wrong |= {
            "window": dense(model, source, target, limits, offset, meaning, wider=1),
            "narrower": dense(model, source, target, limits, offset, meaning, wider=-1),
            "meaning": dense(model, source, target, limits, offset, other),
        }
    for name, logits in wrong.items():
        assert (logits[S:] - want).abs().max() > 100 * tolerance, name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bf16_errs_no_more_than_twice_what_eager_does(tiny, case, fused, recorded):
    model = build(tiny, case, vocab=384, sharpen=1)
    half = build(tiny, case, vocab=384, sharpen=1).bfloat16()
    # the frequencies are fp32 in a model that is loaded in bf16
    half.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    source, target, limits, got = streamed(half, WaitK(2), 3, "position", recorded, fused=fused)
    S = len(source)
    want, eager = (dense(m, source, target, limits, 3)[S:].float() for m in (model, half))
    ours, theirs = ((x - want).square().mean().sqrt() for x in (got, eager))
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("case", CASES)
def test_what_is_special_about_a_model_matters(tiny, case, recorded):
    """The reference changes with the scale, the softcap, the norms and the part of a head that is turned."""
    model = build(tiny, case, vocab=384)
    source, target, limits, _ = streamed(model, WaitK(2), 3, "position", recorded, WORDS[:5])
    want = dense(model, source, target, limits, 3)
    attention = model.model.layers[-1].self_attn
    changed = []
    scaling, attention.scaling = attention.scaling, attention.head_dim**-0.5 * 1.1
    changed.append(dense(model, source, target, limits, 3))
    attention.scaling = scaling
    if case == "gemma2":
        assert scaling != attention.head_dim**-0.5
        attention.attn_logit_softcapping, kept = None, attention.attn_logit_softcapping
        changed.append(dense(model, source, target, limits, 3))
        attention.attn_logit_softcapping = kept
    if case == "qwen3":
        attention.q_norm.weight.data[3] *= 1.5
        changed.append(dense(model, source, target, limits, 3))
    if case == "phi3":
        rotary = model.model.rotary_emb
        assert 2 * rotary.inv_freq.numel() == attention.head_dim // 2
        rotary.inv_freq = torch.cat([rotary.inv_freq, rotary.inv_freq / 2])
        changed.append(dense(model, source, target, limits, 3))
    for logits in changed:
        assert (logits - want).abs().max() > 100 * scale(want)


# a grouped cache by hand: ragged rows, any schedule, beams


class Row:
    """One session of a batch: tokens, limits, and how much of it was fed."""

    def __init__(self, rng, S, T):
        self.source, self.target = [rng.randrange(2, 67) for _ in range(S)], [rng.randrange(2, 67) for _ in range(T)]
        self.limits = sorted(rng.randint(1, S) for _ in range(T))
        self.read, self.written = 0, 0

    def chunk(self, rng):
        n = min(rng.randint(0, 3), len(self.source) - self.read)
        rows = [(self.source[i], i, SOURCE, 0) for i in range(self.read, self.read + n)]
        self.read += n
        for _ in range(rng.randint(0, 2)):
            j = self.written
            if j < len(self.target) and self.limits[j] <= self.read:
                rows.append((self.target[j], j, TARGET, self.limits[j]))
                self.written += 1
        return rows

    @property
    def done(self):
        return self.read == len(self.source) and self.written == len(self.target)


def call(model, cache, chunks, offset=0):
    width = max(map(len, chunks))
    filled = [rows + [(5, 0, PADDING, 0)] * (width - len(rows)) for rows in chunks]
    ids, positions, role, limit = (torch.tensor([[row[i] for row in rows] for rows in filled]) for i in range(4))
    logits = model(
        ids,
        past_key_values=cache,
        position_ids=torch.where(role == TARGET, positions + offset, positions),
        role=role.to(torch.int8),
        source_limit=limit.int(),
    ).logits
    return [logits[b, : len(rows)] for b, rows in enumerate(chunks)]


def poison(cache):
    for layer in range(cache.stream.layers):
        for role in (SOURCE, TARGET):
            for buffer in cache.stream.segment(layer, role):
                buffer.fill_(float("nan"))


@pytest.mark.parametrize("case, meaning", [(c, "position") for c in CASES] + [(c, "index") for c in WINDOWED])
@pytest.mark.parametrize("fused", [False, True])
def test_any_schedule_of_a_batch_equals_a_dense_mask(tiny, case, meaning, fused):
    model = build(tiny, case)
    for seed, offset in ((0, 6), (1, 2.5)):
        rng = random.Random(seed)
        rows = [Row(rng, 13, 11), Row(rng, 7, 15)]
        want = [dense(model, r.source, r.target, r.limits, offset, meaning) for r in rows]
        got = [([], []) for _ in rows]
        cache = GroupedCache.for_model(model, 2, capacity=(3, 2))
        poison(cache)
        with sk.patch(model, window=meaning, fused=fused), torch.no_grad():
            while not all(r.done for r in rows):
                chunks = [r.chunk(rng) for r in rows]
                if not any(chunks):
                    continue
                mark = cache.stream.mark()
                for again in range(rng.randint(0, 2)):
                    # thrown away, or taken back
                    call(model, cache, chunks, offset)
                    if again:
                        cache.commit()
                        cache.stream.rollback(mark)
                    else:
                        cache.discard()
                for b, logits in enumerate(call(model, cache, chunks, offset)):
                    for row, out in zip(chunks[b], logits, strict=True):
                        got[b][row[2]].append(out)
                cache.commit()
        for b, row in enumerate(rows):
            for role, expected in ((SOURCE, want[b][: len(row.source)]), (TARGET, want[b][len(row.source) :])):
                assert (torch.stack(got[b][role]) - expected).abs().max() <= scale(expected)


@pytest.mark.parametrize("case", CASES)
def test_crop_beams_and_selection(tiny, case):
    model, rng = build(tiny, case), random.Random(3)
    rows = [Row(rng, 9, 8), Row(rng, 6, 11)]
    for r in rows:
        r.limits = [len(r.source)] * len(r.target)

    def expected(rows, token=9):
        return torch.stack(
            [dense(model, r.source, [*r.target, token], [len(r.source)] * (len(r.target) + 1), 2)[-1] for r in rows]
        )

    cache = GroupedCache.for_model(model, 2)
    poison(cache)
    with torch.no_grad():
        with sk.patch(model):
            chunks = [
                [(t, i, SOURCE, 0) for i, t in enumerate(r.source)]
                + [(t, j, TARGET, n) for j, (t, n) in enumerate(zip(r.target, r.limits, strict=True))]
                for r in rows
            ]
            call(model, cache, chunks, 2)
            cache.commit()

        def agree(rows):
            want = expected(rows)
            with sk.patch(model):
                out = call(model, cache, [[(9, len(r.target), TARGET, len(r.source))] for r in rows], 2)
            cache.discard()
            assert (torch.cat(out) - want).abs().max() <= scale(want)

        agree(rows)
        cache.reorder_cache(torch.tensor([1, 0]))
        agree(rows[::-1])
        cache.crop(-2)
        for r in rows:
            r.target = r.target[:-2]
        agree(rows[::-1])
        cache.batch_repeat_interleave(2)
        agree([rows[1], rows[1], rows[0], rows[0]])
        cache.batch_select_indices(torch.tensor([3, 1]))
        agree(rows)
        cache.reset()
        assert cache.get_seq_length() == 0


# the routes over one buffer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", [None, "left"])
def test_plain_causal_and_generate_equal_stock(tiny, random_ids, case, mask):
    model, ids = build(tiny, case), random_ids(2, 13)
    padding = torch.ones(2, 13, dtype=torch.long)
    if mask is not None:
        padding[0, :4] = 0
    real = padding.bool()
    options = dict(max_new_tokens=9, do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0)
    with torch.no_grad():
        want = model(ids, attention_mask=padding).logits
        generated = model.generate(ids, attention_mask=padding, **options)
        with sk.patch(model):
            got = model(ids, attention_mask=padding).logits
            ours = model.generate(ids, attention_mask=padding, **options)
    assert (got - want)[real].abs().max() <= scale(want)
    assert torch.equal(ours.sequences, generated.sequences)
    for a, b in zip(ours.scores, generated.scores, strict=True):
        assert (a - b)[b.isfinite()].abs().max() <= scale(b)


@pytest.mark.parametrize("case, meaning", [(c, "position") for c in CASES] + [(c, "index") for c in WINDOWED])
def test_gradients_under_spans_equal_a_dense_mask(tiny, case, meaning):
    """Training sees what streaming sees, windows included."""
    model, rng = build(tiny, case).train(), random.Random(5)
    row = Row(rng, 12, 11)
    ids = torch.tensor([[*row.source, *row.target]])
    positions = torch.cat([torch.arange(12), torch.arange(11) + 4])[None]
    want = dense(model, row.source, row.target, row.limits, 4, meaning)
    spans = sk.spans.from_limits(row.limits, 12).bounds
    with sk.patch(model, window=meaning):
        got = model(ids, position_ids=positions, spans=spans, use_cache=False).logits[0]
        assert (got - want).abs().max() <= scale(want)
        got.square().sum().backward()
    weights = [w for layer in model.model.layers for w in layer.self_attn.parameters() if w.dim() == 2]
    assert all(w.grad.isfinite().all() and w.grad.abs().max() > 0 for w in weights)


def test_what_windows_refuse(tiny, random_ids):
    model, ids = build(tiny, "mistral"), random_ids(1, 9)
    with sk.patch(model), torch.no_grad():
        # causal spans over positions that restart: the window by position is no interval of keys
        positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
        with pytest.raises(ValueError, match="positions that increase inside every span"):
            model(ids, spans=sk.spans.causal(9).bounds, position_ids=positions, use_cache=False)
        past = DynamicCache()
        model(ids, past_key_values=past)
        with pytest.raises(NotImplementedError, match="no cached keys beside spans"):
            model(ids, spans=sk.spans.causal(9).bounds, past_key_values=past)
        cache = GroupedCache.for_model(model)
        step = {"past_key_values": cache, "role": SOURCE}
        model(ids, position_ids=torch.arange(9)[None], **step)
        cache.commit()
        with pytest.raises(ValueError, match="increase"):
            model(ids[:, :1], position_ids=torch.tensor([[3]]), **step)
        cache.stream.evict(0, 2, SOURCE)
        with pytest.raises(ValueError, match="rearranged by GroupedCache's own methods"):
            model(ids[:, :1], position_ids=torch.tensor([[9]]), **step)
        with pytest.raises(ValueError, match="whose positions are not known"):
            step["past_key_values"] = GroupedCache(cache.stream)
            model(ids[:, :1], position_ids=torch.tensor([[9]]), **step)


@pytest.mark.parametrize("fixed", [False, True])
def test_windows_over_a_bounded_cache(tiny, fixed, recorded):
    """A ring for the target that holds what the windows show changes nothing, and the positions outlive the ring."""
    model = build(tiny, "mistral", vocab=384)
    outs = []
    for options in ({}, {"window": (None, 9), "max_chunk": 16, "capacity": (64, 8), "fixed": fixed}):
        cache = GroupedCache.for_model(model, **options)
        header = {"header": [7], "cache": cache, "sample": lambda logits: int(logits[2:].argmax()) + 2}
        with StreamSession(model, ByT5Tokenizer(), WaitK(2), max_target_tokens=40, max_word_tokens=4, **header) as s:
            rows = recorded(s)
            list(s.run(WORDS))
            outs.append((s.tokens, torch.stack(rows)))
    assert outs[0][0] == outs[1][0] and len(outs[0][0]) > 20
    assert (outs[0][1] - outs[1][1]).abs().max() <= scale(outs[0][1])


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_changing_frequencies_are_refused(tiny, case):
    if case == "phi3":
        n = tiny("phi3").model.layers[0].self_attn.head_dim // 2
        factors = {"short_factor": [1.0] * n, "long_factor": [2.0] * n, "original_max_position_embeddings": 64}
        rope = {"rope_type": "longrope", "partial_rotary_factor": 1.0, **factors}
    else:
        rope = {"rope_type": "dynamic", "factor": 2.0}
        with sk.patch(
            build(tiny, case, rope_parameters={"rope_theta": 1e4, **rope, "rope_type": "linear"}), fused=True
        ):
            pass
    with pytest.raises(NotImplementedError, match=f"'{rope['rope_type']}', whose frequencies change"):
        sk.patch(build(tiny, case, rope_parameters={"rope_theta": 1e4, **rope}))
