"""`patch` and its undoing: one model, to the bit; and refusals without effect."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import streamkernels as sk
from streamkernels.integrations.transformers import GroupedCache
from streamkernels.integrations.transformers.patch import handle_of


def state_of(model):
    """All that a patch could touch: configs by identity and content, hooks, attributes."""
    modules = list(model.modules())
    return [
        (
            id(m.__dict__.get("config")),
            sorted(m.__dict__),
            len(m._forward_pre_hooks),
            len(m._forward_hooks),
            id(type(m)),
        )
        for m in modules
    ] + [repr(sorted((k, repr(v)) for k, v in vars(model.config).items()))]


# one model, and back


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_undo_is_exact(tiny, random_ids, family, close):
    model, ids = tiny(family, dtype=torch.float32), random_ids(2, 9)
    before, logits = state_of(model), model(ids).logits
    config = model.config
    handle = sk.patch(model)
    assert handle.active and model.config is not config and config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "streamkernels"
    model(ids)
    handle.undo()
    handle.undo()
    assert not handle.active and model.config is config
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(RuntimeError, match="boom"), sk.patch(model):
        raise RuntimeError("boom")
    assert state_of(model) == before
    with sk.patch(model.model):  # the base model alone
        close(model.model(ids).last_hidden_state, model.model(ids).last_hidden_state, 0)
    assert state_of(model) == before


def test_a_patch_that_fails_half_way_changes_nothing(tiny, monkeypatch):
    model = tiny()
    before = state_of(model)

    def broken(*args, **kwargs):
        raise RuntimeError("no hooks today")

    monkeypatch.setattr(type(model.model), "register_forward_pre_hook", broken)
    with pytest.raises(RuntimeError, match="no hooks"):
        sk.patch(model)
    monkeypatch.undo()
    assert state_of(model) == before
    sk.patch(model).undo()


def test_models_that_share_a_config_are_patched_one_by_one(tiny, random_ids):
    one = tiny()
    two = tiny(config=one.config)
    assert one.config is two.config
    ids, positions = random_ids(1, 7), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    stock = two(ids, position_ids=positions, use_cache=False).logits
    with sk.patch(one):
        assert torch.equal(two(ids, position_ids=positions, use_cache=False).logits, stock)
        ours = one(ids, position_ids=positions, use_cache=False).logits
        assert (ours - stock).abs().max() > 0.1  # stock packs, we do not
        with sk.patch(two):
            assert torch.equal(two(ids, position_ids=positions, use_cache=False).logits, ours)
        assert torch.equal(two(ids, position_ids=positions, use_cache=False).logits, stock)
    assert one.config is two.config and torch.equal(one(ids, position_ids=positions, use_cache=False).logits, stock)


def test_settings_changed_while_patched_survive(tiny):
    model = tiny()
    config = model.config
    with sk.patch(model):
        model.config.use_cache = False
        model.resize_token_embeddings(80)
    assert model.config is config and config.use_cache is False and config.vocab_size == 80
    assert config._attn_implementation == "sdpa"


def test_deep_copies_carry_their_own_handle(tiny, random_ids, close):
    model, ids = tiny(), random_ids(1, 5)
    want = model(ids).logits
    with sk.patch(model):
        other = copy.deepcopy(model)
        assert handle_of(other) is not handle_of(model)
        handle_of(other).undo()
        assert torch.equal(other(ids).logits, want) and other.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "streamkernels" and handle_of(model).active
        close(model(ids, spans=sk.spans.causal(5).bounds).logits, want)


class Wrapped(nn.Module):
    """What matters of a PeftModel: a config of its own, and `get_base_model`."""

    def __init__(self, inner):
        super().__init__()
        self.base_model, self.config = inner, inner.config

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize("wrap_first", [True, False])
def test_wrappers_with_get_base_model(tiny, random_ids, wrap_first, close):
    model, ids = tiny(), random_ids(1, 7)
    config, before = model.config, state_of(model)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    want = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    wrapper = Wrapped(model) if wrap_first else None
    handle = sk.patch(wrapper or model)
    wrapper = wrapper or Wrapped(model)
    with pytest.raises(ValueError, match="not patched yet"):
        sk.patch(wrapper)
    close(wrapper(ids, position_ids=positions, use_cache=False).logits, want)
    handle.undo()
    assert state_of(model) == before and model.config is config and wrapper.config._attn_implementation == "sdpa"


# refusals


def test_patch_refuses(tiny, monkeypatch):
    def refused(model, error, text):
        before = state_of(model)
        with pytest.raises(error, match=text):
            sk.patch(model)
        assert state_of(model) == before

    sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    gemma = GemmaForCausalLM(GemmaConfig(**sizes, num_key_value_heads=1, head_dim=8, pad_token_id=0))
    refused(gemma, NotImplementedError, "GemmaForCausalLM")
    with pytest.raises(NotImplementedError, match="Linear"):
        sk.patch(nn.Linear(2, 2))
    for rope, more in (
        ("dynamic", {"factor": 2.0}),
        (
            "longrope",
            {
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
                "factor": 2.0,
            },
        ),
    ):
        refused(
            tiny("llama", rope_parameters={"rope_type": rope, "rope_theta": 1e4, **more}),
            NotImplementedError,
            f"'{rope}'",
        )
    turned = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    refused(tiny("llama", rope_parameters=turned), NotImplementedError, "half as many rotary frequencies")
    with pytest.raises(ValueError, match="window: expected 'position' or 'index'"):
        sk.patch(tiny(), window="tokens")
    refused(tiny("llama", head_dim=12), NotImplementedError, "head dim that is a multiple of 8")

    class Own(LlamaForCausalLM):
        pass

    own = Own(
        LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    sk.patch(own).undo()  # a subclass that changes nothing is fine

    class OwnAttention(type(own.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    own.model.layers[0].self_attn.__class__ = OwnAttention
    refused(own, NotImplementedError, "OwnAttention in layer 0")
    model = tiny()
    with sk.patch(model):
        refused(model, ValueError, "undo its handle first")
    for version in ("5.3.9", "6.0.0", "4.57.6"):
        monkeypatch.setattr(transformers, "__version__", version)
        refused(model, NotImplementedError, version)


def grouped_inputs(model, **change):
    given = {"past_key_values": GroupedCache.for_model(model), "role": 0, "position_ids": torch.arange(5)[None]}
    return given | change


def grouped_with(**options):
    """The same inputs with a cache built otherwise."""
    return lambda model: grouped_inputs(model, past_key_values=GroupedCache.for_model(model, **options))


def grouped_but(**change):
    """The same inputs but for some."""
    return lambda model: grouped_inputs(model, **change)


def just(**inputs):
    """These inputs, whatever the model."""
    return lambda model: inputs


BOUNDS = torch.zeros(1, 5, 1, 2, dtype=torch.int32)
BYTES, INTS = torch.zeros(1, 5, dtype=torch.int8), torch.zeros(1, 5, dtype=torch.int32)
MISSING, WRONG = NotImplementedError, ValueError
REFUSED = {
    "output_attentions": (just(output_attentions=True), MISSING, "output_attentions: expected False"),
    "4-D mask": (just(attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool)), MISSING, "2-D padding mask"),
    "mask length": (just(attention_mask=torch.ones(1, 4)), WRONG, "attention_mask: expected shape"),
    "packing": (just(cu_seq_lens_q=torch.tensor([0, 5])), MISSING, "cu_seq_lens_q"),
    "half positions": (just(position_ids=torch.arange(5)[None].bfloat16()), TypeError, "position_ids"),
    "position shape": (just(position_ids=torch.arange(4)[None]), WRONG, "position_ids"),
    "static cache": (lambda m: {"past_key_values": StaticCache(m.config, max_cache_len=16)}, MISSING, "StaticCache"),
    "foreign cache": (lambda m: {"past_key_values": Foreign()}, MISSING, "Foreign"),
    "role alone": (just(role=0), WRONG, "role: expected None"),
    "limit alone": (just(source_limit=INTS), WRONG, "source_limit: expected None"),
    "spans dtype": (just(spans=BOUNDS.long()), TypeError, "spans: expected int32"),
    "spans rows": (just(spans=BOUNDS[:, :4]), WRONG, "spans: expected shape"),
    "spans slots": (just(spans=BOUNDS.expand(1, 5, 3, 2)), WRONG, "3 slots"),
    "spans object": (just(spans=sk.Spans(BOUNDS)), TypeError, "spans: expected a tensor"),
    "no role": (grouped_but(role=None), WRONG, "role: expected"),
    "role value": (grouped_but(role=2), WRONG, "role: expected"),
    "role dtype": (grouped_but(role=INTS), TypeError, "role: expected int8"),
    "role shape": (grouped_but(role=BYTES[:, :4]), WRONG, "role: expected shape"),
    "limit dtype": (grouped_but(source_limit=BYTES), TypeError, "source_limit: expected int32"),
    "no positions": (grouped_but(position_ids=None), WRONG, "position_ids: expected explicit positions"),
    "grouped mask length": (grouped_but(attention_mask=torch.ones(1, 8)), WRONG, "attention_mask"),
    "grouped spans": (grouped_but(spans=BOUNDS), WRONG, "spans: expected None"),
    "cache rows": (grouped_with(batch=2), WRONG, "2 rows"),
    "cache dtype": (grouped_with(dtype=torch.float32), (WRONG, TypeError), "float"),
    "full cache": (grouped_with(capacity=4, fixed=True), WRONG, "expected"),
}


class Foreign(DynamicCache):
    """A cache of somebody else's, about which nothing is known."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_forward_changes_nothing(tiny, random_ids, case):
    build, error, text = REFUSED[case]
    model, ids = tiny(), random_ids(1, 5)
    with sk.patch(model):
        want, before = model(ids).logits, state_of(model)
        inputs = build(model)
        cache = inputs.get("past_key_values")
        grouped = isinstance(cache, GroupedCache)
        if grouped:
            lengths, held = cache.stream.length().clone(), [cache.stream.segment(0, r)[0].clone() for r in (0, 1)]
        with pytest.raises(error, match=text):
            model(ids, **inputs)
        if grouped:
            assert torch.equal(cache.stream.length(), lengths)
            for r in (0, 1):
                assert torch.equal(cache.stream.segment(0, r)[0].view(torch.uint8), held[r].view(torch.uint8))
            with pytest.raises(RuntimeError):
                cache.commit()  # nothing is staged
        elif cache is not None:
            assert int(cache.get_seq_length()) == 0
        assert state_of(model) == before
        assert torch.equal(model(ids).logits, want)


def test_dropout_in_training_is_refused_before_the_cache_is_touched(tiny, random_ids):
    model, ids, cache = tiny(attention_dropout=0.1), random_ids(1, 5), DynamicCache()
    with sk.patch(model):
        model(ids, past_key_values=DynamicCache())  # eval has no dropout
        model.train()
        with pytest.raises(NotImplementedError, match="attention_dropout: expected 0 in training"):
            model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_grouped_cache_under_gradient_checkpointing_is_refused(tiny, random_ids):
    model, ids = tiny().train(), random_ids(1, 5)
    model.gradient_checkpointing_enable()
    with sk.patch(model), pytest.raises(NotImplementedError, match="gradient checkpointing"):
        model(ids, **grouped_inputs(model))


def test_another_attention_chosen_while_patched_is_refused(tiny, random_ids):
    model, ids = tiny(), random_ids(1, 5)
    with sk.patch(model):
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="undo the handle"):
            model(ids)
    assert model.config._attn_implementation == "sdpa"


def test_a_grouped_cache_needs_a_patched_model(tiny, random_ids):
    model, ids = tiny(), random_ids(1, 5)
    cache = GroupedCache.for_model(model)
    inputs = grouped_inputs(model, past_key_values=cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="a model patched by streamkernels.patch"):
            model(ids, past_key_values=cache)
        with sk.patch(model):
            model(ids, **inputs)
            cache.discard()
    model.set_attn_implementation("streamkernels")  # the name without the patch
    with pytest.raises(ValueError, match="patched by streamkernels.patch"):
        model(ids)


def test_spans_that_training_asked_for_must_come(tiny, random_ids):
    model, ids, cache = tiny(), random_ids(1, 5), DynamicCache()
    with sk.patch(model, require_spans=True):
        model(ids)  # evaluation is free
        model.train()
        model(ids, spans=sk.spans.causal(5).bounds)
        with pytest.raises(ValueError, match="remove_unused_columns"):
            model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


LAZY = """
import sys, types, streamkernels as sk
dir(sk), sk.__version__
assert "transformers" not in sys.modules, "eager import"
for release, error, text in ((None, ImportError, "pip install"), ("4.57.6", NotImplementedError, "got 4.57.6")):
    sys.modules["transformers"] = release and types.ModuleType("transformers")
    if release:
        sys.modules["transformers"].__version__ = release
    try:
        sk.patch
    except error as e:
        assert text in str(e), e
    else:
        raise AssertionError("not refused")
"""


def test_import_is_lazy_and_says_what_is_missing():
    subprocess.run([sys.executable, "-c", LAZY], check=True)
