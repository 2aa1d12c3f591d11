"""What `prune_vision` touches, what it reads, what it refuses, and that it goes away without a trace."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")
from torch.utils._python_dispatch import TorchDispatchMode

import streamkernels
from streamkernels import VisionPruning, prune_vision

from .prune_models import MAKERS, make_vlm, prompt_of, text_of

FIXED = VisionPruning.fixed({1: 3, 3: 0})
FAST = VisionPruning.fast(first_probe_layer=1, layer_threshold=0.98, token_threshold=0.9)
ONE = [[3, "image", 5]]
_models: dict = {}


def model_of(name="llava"):
    if name not in _models:
        _models[name] = make_vlm(name)
    return _models[name]


def logits(model, prompt, **more):
    with torch.no_grad():
        return model(**prompt.inputs, **more).logits


def hooks_of(model):
    """Every hook of every module (transformers keeps some of its own)."""
    return [(*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in model.modules()]


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number read, a copy to the CPU, a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MAKERS)
def test_undo_is_exact_and_complete(name):
    model, prompt = model_of(name), prompt_of(name, ONE)
    config, stock = copy.deepcopy(model.config.to_dict()), logits(model, prompt)
    before = {module: dict(vars(module)) for module in model.modules()}
    hooks = hooks_of(model)
    with prune_vision(model, FIXED) as handle:
        assert handle.active and not torch.equal(logits(model, prompt), stock)
    assert not handle.active and repr(handle) == "PruneHandle(undone)"
    assert torch.equal(logits(model, prompt), stock)
    assert model.config.to_dict() == config
    for module, own in before.items():
        assert set(vars(module)) == set(own)
        assert vars(module).get("config") is own.get("config")
    assert hooks_of(model) == hooks
    handle.undo()


def test_undo_after_an_exception_and_settings_made_meanwhile():
    model, prompt = model_of(), prompt_of("llava", ONE)
    stock = logits(model, prompt)
    with pytest.raises(RuntimeError, match="mine"), prune_vision(model, FIXED):
        model.config.some_setting = 3
        raise RuntimeError("mine")
    assert torch.equal(logits(model, prompt), stock)
    assert model.config.__dict__.pop("some_setting") == 3


def test_models_that_share_a_config_stay_apart():
    model, prompt = model_of(), prompt_of("llava", ONE)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    stock = logits(other, prompt)
    with prune_vision(model, FIXED) as handle:
        ours = logits(model, prompt)
        assert torch.equal(logits(other, prompt), stock) and not torch.equal(ours, stock)
        with prune_vision(other, FAST) as second:
            logits(other, prompt)
            assert torch.equal(logits(model, prompt), ours)
            assert handle.report().config == "fixed" and second.report().config == "fast"
        assert torch.equal(logits(other, prompt), stock) and torch.equal(logits(model, prompt), ours)
    vision = model.model.vision_tower.config
    assert vision._attn_implementation == "eager" and model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_without_images_is_as_before(name, side):
    model, prompt = model_of(name), prompt_of(name, [[3], [7]], side=side)
    prompt.inputs.pop("mm_token_type_ids", None)
    stock, real = logits(model, prompt), prompt.inputs["attention_mask"].bool()
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    texts = model.generate(**prompt.inputs, **options)
    with prune_vision(model, FAST) as handle:
        # of the largest logit, as everywhere
        assert (logits(model, prompt) - stock)[real].abs().max() < 1e-5 * stock[real].abs().max()
        if side == "left":
            assert torch.equal(model.generate(**prompt.inputs, **options), texts)
        with pytest.raises(ValueError, match="report: expected a forward with vision tokens"):
            handle.report()


def test_nothing_dropped_is_the_dense_model():
    model, prompt = model_of(), prompt_of("llava", ONE)
    with prune_vision(model, VisionPruning.fixed({1: 1.0, 2: 99})) as handle:
        assert (logits(model, prompt) - logits_of_stock(prompt)).abs().max() < 1e-4
        report = handle.report()
    assert report.filter_layer == (-1,) and report.macs() == report.macs(dense=True)
    assert report.pairs() == report.pairs(dense=True) and report.kv_bytes() == report.kv_bytes(dense=True)


def logits_of_stock(prompt):
    if "other" not in _models:
        _models["other"] = make_vlm("llava")
    return logits(_models["other"], prompt)


def test_reads_are_counted_and_few():
    """A probed layer reads once; a fixed schedule reads before the language model and not at all with a layout."""
    model, prompt = model_of(), prompt_of("llava", ONE)
    text, vision = text_of(model), prompt.vision
    embeds = torch.randn(1, vision.shape[1], 32)
    with prune_vision(model, FAST) as handle, torch.no_grad():
        with Reads() as reads:
            text(inputs_embeds=embeds, vision_mask=vision, use_cache=False)
        report = handle.report()
        assert reads.names == ["_local_scalar_dense"] * report.probe_reads and 1 <= report.probe_reads <= 4
        assert report.layout_reads == 0
    with prune_vision(model, FIXED) as handle, torch.no_grad():
        layout = handle.layout(vision)
        with Reads() as reads:
            made = text(inputs_embeds=embeds, vision_mask=layout, use_cache=False).last_hidden_state
        assert reads.names == [] and handle.report().reads == 0
        again = text(inputs_embeds=embeds, vision_mask=vision, use_cache=False).last_hidden_state
        assert torch.equal(made, again) and handle.report().layout_reads == 1
        assert handle.report().vision_rows == [(9,)] * 2 + [(3,)] * 2 + [(0,)] * 2


HIDING = VisionPruning.paper(shallow=(("sink", "skip"), ("skip", "skip")), first_probe_layer=2, token_threshold=0.9)


@pytest.mark.parametrize("config", [FAST, FIXED, HIDING], ids=["fast", "fixed", "paper"])
def test_the_cache_holds_what_is_kept_and_the_rest_is_not_read(config):
    model, prompt = model_of(), prompt_of("llava", [[3, "image", 5], [2, "image", 4, "image", 3], [7]])
    B, T = prompt.vision.shape
    with prune_vision(model, config) as handle, torch.no_grad():
        outs = []
        for poison in (False, True):
            cache = model(**prompt.inputs).past_key_values
            report = handle.report()
            assert [layer.keys.shape[2] for layer in cache.layers] == report.cached
            assert (report.cached == report.width) == (config is not HIDING) and sum(report.cached) < 6 * T
            text = prompt.inputs["attention_mask"].sum(1) - prompt.vision.sum(1)
            assert config is not HIDING or report.cached[1] == text.max()
            used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            assert used == report.kv_bytes() < report.kv_bytes(dense=True)
            if poison:
                for at, (layer, rows) in enumerate(zip(cache.layers, report.rows, strict=True)):
                    for b, n in enumerate(text.tolist() if config is HIDING and at == 1 else rows):
                        layer.keys[b, :, n:] = float("nan")
                        layer.values[b, :, n:] = float("nan")
            mask = torch.cat([prompt.inputs["attention_mask"], torch.ones(B, 1, dtype=torch.long)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            ids = torch.full((B, 1), 7)
            more = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            outs.append(model(input_ids=ids, **more).logits)
    assert torch.equal(*outs) and outs[0].isfinite().all()


def test_when_unprofitable(monkeypatch):
    from streamkernels.pruning import costs

    model, prompt = model_of(), prompt_of("llava", ONE)
    with prune_vision(model, FIXED) as handle:
        pruned = logits(model, prompt)
        assert handle.report().verdict == "unknown, no committed costs for 'cpu'"
    monkeypatch.setattr(costs, "COSTS", {"cpu": costs.Cost("cpu", 1000, 50.0, 0.001, 10.0, "0000000")})
    with prune_vision(model, FIXED) as handle:
        with pytest.warns(UserWarning, match="does not pay: no, 0.02 ms of a prefill lost at least"):
            assert torch.equal(logits(model, prompt), pruned)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(model, prompt)
    with prune_vision(model, VisionPruning.fixed({1: 3, 3: 0}, when_unprofitable="off")) as handle:
        assert (logits(model, prompt) - logits_of_stock(prompt)).abs().max() < 1e-4
        assert handle.report().verdict.endswith("; ran dense") and handle.report().vision_rows == [(9,)] * 6
    with prune_vision(model, VisionPruning.fixed({1: 3, 3: 0}, when_unprofitable="ignore")) as handle:
        assert torch.equal(logits(model, prompt), pruned) and handle.report().verdict == "not asked"
    monkeypatch.setattr(costs, "COSTS", {"cpu": costs.Cost("cpu", 1000, 1.0, 10.0, 10.0, "0000000")})
    with prune_vision(model, FIXED) as handle:
        logits(model, prompt)
        assert handle.report().verdict.startswith("yes, ")


def test_vision_mask_for_embeddings():
    model, prompt = model_of(), prompt_of("llava", ONE)
    with prune_vision(model, FIXED):
        expected = logits(model, prompt)
        with torch.no_grad():
            features = model.model.get_image_features(prompt.inputs["pixel_values"], return_dict=True)
            embeds = model.get_input_embeddings()(prompt.inputs["input_ids"])
            embeds[prompt.vision] = torch.cat(list(getattr(features, "pooler_output", features)))
            given = model(inputs_embeds=embeds, vision_mask=prompt.vision).logits
            explicit = model(**prompt.inputs, vision_mask=prompt.vision).logits
    assert torch.equal(given, expected) and torch.equal(explicit, expected)


REFUSED = [
    (dict(labels=True), NotImplementedError, "labels: expected None"),
    (dict(output_hidden_states=True), NotImplementedError, "output_hidden_states: expected False"),
    (dict(output_attentions=True), NotImplementedError, "output_attentions: expected False"),
    (dict(use_cache=False), NotImplementedError, "use_cache: expected a cache"),
    (dict(attention_mask=torch.zeros(1, 1, 17, 17)), NotImplementedError, "attention_mask: expected a 2-D padding"),
    (dict(vision_mask=torch.zeros(1, 9, dtype=torch.bool)), ValueError, r"vision_mask: expected bool \[1, 17\]"),
]


@pytest.mark.parametrize(("more", "error", "text"), REFUSED)
def test_forwards_that_are_refused(more, error, text):
    model, prompt = model_of(), prompt_of("llava", ONE)
    stock = logits(model, prompt)
    inputs = {**prompt.inputs, **more}
    if "labels" in more:
        inputs["labels"] = prompt.inputs["input_ids"]
    with prune_vision(model, FAST), torch.no_grad():
        with pytest.raises(error, match=text):
            model(**inputs)
    assert torch.equal(logits(model, prompt), stock)


def test_another_attention_is_noticed():
    model, prompt = make_vlm("llava"), prompt_of("llava", ONE)
    stock = logits(model, prompt)
    with prune_vision(model, FIXED):
        model.set_attn_implementation({"text_config": "sdpa"})
        with pytest.raises(ValueError, match="got 'sdpa', set meanwhile"):
            logits(model, prompt)
    with prune_vision(model, FIXED), streamkernels.patch(text_of(model)):
        with pytest.raises(ValueError, match="got 'streamkernels', set meanwhile"):
            logits(model, prompt)
    assert model.config.text_config._attn_implementation == "eager"
    assert torch.equal(logits(model, prompt), stock)


def test_wrappers_and_bases():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def get_base_model(self):
            return self.inner

    model, prompt = model_of(), prompt_of("llava", ONE)
    with prune_vision(model, FIXED):
        expected = logits(model, prompt)
    wrapper = Wrapper(model)
    with prune_vision(wrapper, FIXED):
        assert torch.equal(logits(model, prompt), expected) and wrapper.config is model.config
    assert wrapper.config is model.config
    with prune_vision(model.model, FIXED), torch.no_grad():
        assert torch.equal(model.lm_head(model.model(**prompt.inputs).last_hidden_state), expected)
    assert not torch.equal(logits(model, prompt), expected)


def test_chunked_prefill_is_refused():
    model, prompt = model_of(), prompt_of("llava", ONE)
    with prune_vision(model, FAST):
        with pytest.raises((NotImplementedError, ValueError), match="prefill_chunk_size"):
            model.generate(**prompt.inputs, max_new_tokens=2, prefill_chunk_size=6)


def test_caches_that_are_refused():
    from transformers import DynamicCache

    model, prompt = model_of(), prompt_of("llava", ONE)
    with torch.no_grad():
        foreign = model(**prompt_of("llava", [[4]]).inputs).past_key_values
    with prune_vision(model, FIXED), torch.no_grad():
        with pytest.raises(ValueError, match="filled from its beginning, got one of 4 keys"):
            model(input_ids=torch.tensor([[5]]), past_key_values=foreign)
        sliding = DynamicCache(config=_sliding(model))
        with pytest.raises(NotImplementedError, match="got one with a DynamicSlidingWindowLayer"):
            model(**prompt.inputs, past_key_values=sliding)
        batch = prompt_of("llava", [[3, "image", 5], [2, "image", 4, "image", 3]])
        cache = model(**batch.inputs).past_key_values
        with pytest.raises(ValueError, match="a cache of 1 samples, got one of 2"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache.crop(-3)
        with pytest.raises(ValueError, match="got a cache cropped to"):
            model(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)


def _sliding(model):
    config = copy.deepcopy(model.config.text_config)
    config.sliding_window, config.layer_types = 8, ["sliding_attention"] * 6
    return config


def test_models_that_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=2)
    with pytest.raises(NotImplementedError, match="model: expected one of LlavaFor.*got LlamaForCausalLM"):
        prune_vision(LlamaForCausalLM(LlamaConfig(**small)))

    class Gemma3ForConditionalGeneration(torch.nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="Gemma3.*: its image tokens attend in both directions"):
        prune_vision(Gemma3ForConditionalGeneration())
    model = model_of()
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match="first_probe_layer of at most 4 for a model of 6 layers"):
        prune_vision(model)
    with pytest.raises(ValueError, match=r"a schedule of layers in \[0, 4\], got layer 5"):
        prune_vision(model, VisionPruning.fixed({5: 1}))
    with pytest.raises(TypeError, match="config: expected a VisionPruning"):
        prune_vision(model, {"layer": 1})
    with pytest.raises(NotImplementedError, match="M-RoPE"):
        prune_vision(model_of("qwen2_vl"), VisionPruning.fixed({1: 1}, positions="renumbered"))
    with prune_vision(model, FIXED):
        with pytest.raises(ValueError, match="a model that is not pruned yet"):
            prune_vision(model, FIXED)
    with streamkernels.patch(text_of(model)):
        with pytest.raises(ValueError, match="streamkernels.patch has not changed"):
            prune_vision(model, FIXED)
    model.train()
    with pytest.raises(ValueError, match="a model in eval mode"):
        prune_vision(model, FIXED)
    model.eval()
    assert hooks_of(model) == hooks
