"""What a patched model computes: plain causal attention as stock does, declared spans exactly, on every route."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import streamkernels as sk
from streamkernels.integrations.transformers import GroupedCache
from streamkernels.integrations.transformers.rotary import rotary_of
from streamkernels.testing.compare import EXACT, influence

MASKS = {
    "none": None,
    "ones": [[1] * 9] * 2,
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "holes": [[1, 1, 0, 1, 0, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1, 0, 1]],
}


def mask_of(name):
    return None if MASKS[name] is None else torch.tensor(MASKS[name])


# plain causal


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mask", MASKS)
def test_plain_causal_equals_stock(tiny, random_ids, family, mask, close):
    ids, mask = random_ids(2, 9), mask_of(mask)
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
    # eager's softmax is fp32, and its fp64 mask value overflows in it
    for stock, dtype, tolerance in (("sdpa", torch.float64, EXACT), ("eager", torch.float32, 1e-5)):
        model = tiny(family, attention=stock, dtype=dtype)
        want = model(ids, attention_mask=mask).logits
        with sk.patch(model):
            for use_cache in (True, False):
                got = model(ids, attention_mask=mask, use_cache=use_cache).logits
                close(got[real], want[real], tolerance)
                assert got.isfinite().all()


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_chunks_over_a_dynamic_cache_equal_one_shot(tiny, random_ids, mask, close):
    model, ids, mask = tiny(), random_ids(2, 9), mask_of(mask)
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
    want = model(ids, attention_mask=mask).logits
    with sk.patch(model):
        cache, parts, begin = DynamicCache(), [], 0
        for n in (4, 1, 3, 1):
            part = None if mask is None else mask[:, : begin + n]
            parts.append(model(ids[:, begin : begin + n], attention_mask=part, past_key_values=cache).logits)
            begin += n
    close(torch.cat(parts, 1)[real], want[real])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_generate_equals_stock(tiny, random_ids, family, close):
    model, ids = tiny(family), random_ids(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = dict(
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    want = model.generate(ids, **options)
    blind = model.generate(ids, **options | {"attention_mask": torch.ones_like(mask)})
    with sk.patch(model):
        got = model.generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores, strict=True):
        close(a, b)
    assert (blind.scores[0] - want.scores[0]).abs().max() > 0.01  # the padding matters


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_static_rope_types(tiny, random_ids, rope, close):
    parameters = {"rope_type": rope, "rope_theta": 10000.0}
    if rope != "default":
        parameters |= {"factor": 4.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    if rope == "yarn":
        parameters |= {"original_max_position_embeddings": 128}
    model = tiny("llama", rope_parameters=parameters)
    plain = tiny("llama")(random_ids(1, 9)).logits
    want = model(random_ids(1, 9)).logits
    assert rope == "default" or (plain - want).abs().max() > 1e-3
    with sk.patch(model):
        close(model(random_ids(1, 9)).logits, want)
    positions = torch.tensor([[0, 3, 100, 511]])
    cos, sin = rotary_of(model.model).cos_sin(positions, offset=2.5)
    hf = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), position_ids=positions.float() + 2.5)
    for ours, theirs in zip((cos, sin), hf, strict=True):
        close(ours, theirs[..., : ours.shape[-1]], 2e-5)  # an ulp of the angle in fp32


def test_autocast(tiny, random_ids, close):
    model, ids = tiny(dtype=torch.float32), random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(ids).logits
        with sk.patch(model):
            got = model(ids).logits
    assert got.dtype == want.dtype
    close(got.float(), want.float(), 0.03)


def test_bidirectional_modules_are_left_to_pytorch(tiny, random_ids, close):
    model, ids, mask = tiny(), random_ids(2, 9), mask_of("holes")
    explicit = mask.bool()[:, None, None, :].expand(2, 1, 9, 9)
    want = model(ids, attention_mask=explicit).logits
    causal = model(ids, attention_mask=mask).logits
    assert (want - causal).abs().max() > 0.1
    with sk.patch(model):
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        close(model(ids, attention_mask=mask).logits, want)
        with pytest.raises(ValueError, match="spans: expected a causal model"):
            model(ids, spans=sk.spans.causal(9, B=2).bounds)


# declared spans


def grouped(B):
    """Spans and positions of one or two samples under group streaming: positions restart, the mask is a staircase."""
    lengths, limits = [6, 5][:B], [[2, 3, 3, 6, 6], [1, 1, 4, 4, 5, 5]][:B]
    positions = [[*range(n), *range(len(limit))] for n, limit in zip(lengths, limits, strict=True)]
    return sk.spans.from_limits(limits, lengths), torch.tensor(positions)


def reach(model, B, T, inputs):
    """bool [B, T, T]: whether the embedding of token j changes the logits of token i, bit by bit."""
    embeds = torch.randn(B, T, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return influence(lambda x: model(inputs_embeds=x, **inputs()).logits, embeds)


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("mask", ["none", "ones"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "grouped"])
def test_influence_is_the_declared_spans(tiny, B, mask, cache):
    model = tiny(layers=1, sharpen=1)
    spans, positions = grouped(B)
    T = spans.T
    attention_mask = torch.ones(B, T, dtype=torch.long) if mask == "ones" else None

    def inputs():
        given = {"position_ids": positions, "attention_mask": attention_mask}
        if cache != "grouped":
            return given | {"spans": spans.bounds, "use_cache": cache == "dynamic"}
        role = (spans.bounds[:, :, 1, 1] > spans.bounds[:, :, 1, 0]).to(torch.int8)
        return given | {
            "past_key_values": GroupedCache.for_model(model, B),
            "role": role,
            "source_limit": spans.bounds[:, :, 0, 1].contiguous(),
        }

    with sk.patch(model):
        got = reach(model, B, T, inputs)
    # a token always reaches its own output through the residual; with one layer there are no indirect ways
    assert torch.equal(got, spans.visible(T)[:, 0] | torch.eye(T, dtype=torch.bool))


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("mask", ["none", "ones"])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "positions", [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 7, 8, 9, 10], [0, 2, 1, 5, 5, 4, 3]], ids=["restart", "gap", "any"]
)
def test_positions_are_no_packing_signal(tiny, B, mask, cache, positions):
    model = tiny(layers=1, sharpen=1)
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(B, 7, 7)

    def inputs():
        attention_mask = torch.ones(B, 7, dtype=torch.long) if mask == "ones" else None
        return {
            "position_ids": torch.tensor([positions]).expand(B, 7),
            "attention_mask": attention_mask,
            "use_cache": cache,
        }

    stock = reach(model, B, 7, inputs)
    with sk.patch(model):
        assert torch.equal(reach(model, B, 7, inputs), causal)
    # stock transformers cuts the sequence where the positions jump, on just this route: the test can fail
    assert torch.equal(stock, causal) == (mask == "ones" or cache)


def test_spans_after_a_dynamic_cache_and_under_a_padding_mask(tiny, random_ids, close):
    model, ids = tiny(), random_ids(1, 9)
    spans, hidden = sk.spans.sliding_window(9, 4).bounds, torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1]])
    visible = sk.Spans(spans).visible(9) & hidden.bool()[:, None, None]
    want = model(ids, attention_mask=visible).logits
    assert (want - model(ids, attention_mask=sk.Spans(spans).visible(9)).logits).abs().max() > 0.1
    real = hidden.bool()
    with sk.patch(model):
        close(model(ids, spans=spans, attention_mask=hidden).logits[real], want[real])
        cache = DynamicCache()
        first = model(ids[:, :5], spans=spans[:, :5], attention_mask=hidden[:, :5], past_key_values=cache).logits
        second = model(ids[:, 5:], spans=spans[:, 5:], attention_mask=hidden, past_key_values=cache).logits
        close(torch.cat([first, second], 1)[real], want[real])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model, ids, **inputs):
    model.zero_grad()
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_under_spans_equal_an_explicit_mask(tiny, random_ids, family, checkpointing, close):
    model = tiny(family).train()
    spans, positions = grouped(2)
    ids = random_ids(2, spans.T)
    want_loss, want = loss_of(
        model, ids, position_ids=positions, attention_mask=spans.visible(spans.T), use_cache=False
    )
    other = spans.bounds.clone()
    other[:, 7, 0, 1] -= 1
    with sk.patch(model):
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        for mask in (None, torch.ones_like(ids)):
            loss, got = loss_of(
                model, ids, position_ids=positions, attention_mask=mask, spans=spans.bounds, use_cache=False
            )
            close(loss, want_loss)
            assert got.keys() == want.keys()
            for name in want:
                close(got[name], want[name], 1e-9)
        assert all(got[name].abs().max() > 0 for name in got if "layers.0.self_attn" in name and "bias" not in name)
        loss, got = loss_of(model, ids, position_ids=positions, spans=other, use_cache=False)
        assert (loss - want_loss).abs() > 1e-6  # one key fewer in one row shows


def test_a_step_compiles_without_a_graph_break(tiny, random_ids, close):
    model, ids = tiny(layers=1), random_ids(1, 9)
    with sk.patch(model), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        caches = GroupedCache.for_model(model), GroupedCache.for_model(model)
        for begin, end, role in ((0, 4, 0), (4, 6, 1), (6, 9, 1)):
            step = {"role": role, "position_ids": torch.arange(begin, end)[None]}
            both = [
                f(ids[:, begin:end], past_key_values=c, **step).logits
                for f, c in zip((compiled, model), caches, strict=True)
            ]
            close(*both)
            for cache in caches:
                cache.commit()
