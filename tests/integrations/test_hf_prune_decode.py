"""Generated tokens of a pruned model in one op a layer: the same logits, and transformers' way where it must be."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from streamkernels import VisionPruning, prune_vision
from streamkernels.integrations.transformers import fused, prune_decode, prune_fresh

from . import prune_models
from . import test_hf_prune as prompts
from .prune_models import LAYERS, MAKERS, make_vlm, prompt_of, text_of
from .test_hf_prune import FAST, MIXED, ONE, model_of

CONFIG = VisionPruning.fast(**FAST)
PLAIN = VisionPruning.fixed({1: 4, 3: 2})


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """The tests of the prompts, with tokens in one op a layer though there is no kernel."""
    monkeypatch.setattr(prompts, "prune_vision", partial(prune_vision, decode="fused"))


@pytest.fixture
def made(monkeypatch):
    """How often buffers were filled and a layer was one op, of tokens and of prompts."""
    counts = Counter()

    def counted(kind, method, name):
        honest = getattr(kind, method)

        def call(self, *args):
            counts[name] += 1
            return honest(self, *args)

        monkeypatch.setattr(kind, method, call)

    counted(prune_decode.Decode, "attend", "token")
    counted(prune_decode.Decode, "__init__", "buffers")
    counted(prune_fresh.Fresh, "attend", "prompt")
    return counts


BATCHES = [*((name, ONE) for name in MAKERS), ("llava", MIXED), ("qwen2_5_vl", MIXED)]


@pytest.mark.parametrize(("name", "samples"), BATCHES)
def test_logits_are_those_of_the_never_dropping_model(name, samples, made):
    prompts.check(model_of(name), prompt_of(name, samples), CONFIG)
    assert made == {"token": 3 * LAYERS, "buffers": 1, "prompt": 2 * LAYERS}


def test_a_schedule_and_video_frames(made):
    prompts.check(model_of("qwen2_vl"), prompt_of("qwen2_vl", [[2, "video", 3, "image", 4]]), PLAIN)
    assert made == {"token": 3 * LAYERS, "buffers": 1, "prompt": 2 * LAYERS}


@pytest.mark.parametrize("preset", prompts.PRESETS)
def test_layers_behind_a_shallow_stage(preset, made):
    prompts.check(model_of("llava", 10), prompt_of("llava", MIXED), prompts.PRESETS[preset])
    # 6 shallow ones; paper hides the keys of its shallow stage from tokens
    assert made["prompt"] == 2 * (10 - len(prompts.PRESETS[preset].shallow))
    assert made["token"] == (0 if preset == "paper" else 30)


@pytest.mark.parametrize("few, layers", [(0, 0), (11, 2), (12, 4), (16, 4), (17, 6)])
def test_only_layers_of_few_rows(monkeypatch, made, few, layers):
    """17 rows in 2 layers, then 12, then 10."""
    monkeypatch.setattr(prune_fresh, "FEW", few)
    prompts.check(model_of("llava"), prompt_of("llava", ONE), PLAIN)
    assert made == {key: n for key, n in {"token": 18, "buffers": 1, "prompt": 2 * layers}.items() if n}


def test_tokens_go_on_in_the_prompt_s_buffers(monkeypatch):
    monkeypatch.setattr(prune_fresh, "FEW", 12)
    model = model_of("llava")
    with prune_vision(model, PLAIN, decode="fused"):
        cache = filled(model)
        before = [layer.keys.data_ptr() for layer in cache.layers]
        steps(model, cache, 1)
        after = [layer.keys.data_ptr() for layer in cache.layers]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] * 2 + [True] * 4


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_renumbered_positions(name, made):
    config = VisionPruning.fixed({1: 4, 3: 0.1}, positions="renumbered")
    prompts.check(model_of(name), prompt_of(name, MIXED), config)
    assert made["token"] == 3 * LAYERS


def test_beams_move_the_keys_to_new_buffers(made):
    prompts.test_beams()
    assert made["token"] == 4 * LAYERS and made["buffers"] > 1


def test_prompt_lookup_crops_what_was_guessed_wrong(monkeypatch, made):
    prompts.test_prompt_lookup_equals_greedy(monkeypatch)
    assert made["token"] > 0


@pytest.mark.parametrize("kind", ["fast", "fixed", "renumbered"])
def test_a_second_prompt_behind_generated_tokens(kind, made):
    prompts.test_second_prompt_with_a_new_image(kind, False, [[3, "image", 5]])
    assert made == {"token": 4 * LAYERS, "buffers": 2, "prompt": LAYERS}


def test_two_ragged_prompts_go_the_way_of_transformers(made):
    prompts.test_second_prompt_with_a_new_image("fast", False, [[3, "image", 5], [9], [1, "image", 2, "image", 2]])
    assert made == {"token": 2 * LAYERS, "buffers": 1, "prompt": LAYERS}


@pytest.mark.parametrize("change", ["reorder", "other keys"])
def test_a_cache_that_changes_before_its_first_token(change):
    model, found = model_of("llava"), []
    prompt = prompt_of("llava", [[3, "image", 5], [2, "image", 6]])
    for decode in ("hf", "fused"):
        cache = DynamicCache()
        with prune_vision(model, PLAIN, decode=decode), torch.no_grad():
            model(**prompt.inputs, past_key_values=cache)
            if change == "reorder":
                cache.reorder_cache(torch.tensor([1, 0]))
            else:
                for layer in cache.layers:
                    layer.keys, layer.values = 2 * layer.keys, -layer.values
            place = torch.full((2, 1), 17)
            found.append(model(input_ids=torch.tensor([[5], [6]]), position_ids=place, past_key_values=cache).logits)
    close(*found)


def steps(model, cache, n, first=40, position=17):
    """Logits [n, vocab] of n tokens on a cache."""
    out = []
    with torch.no_grad():
        for i in range(n):
            ids, place = torch.tensor([[first + i]]), torch.tensor([[position + i]])
            out.append(model(input_ids=ids, position_ids=place, past_key_values=cache).logits[0, -1])
    return torch.stack(out)


def filled(model, **more):
    """A cache with ONE prompt in it."""
    cache = DynamicCache()
    with torch.no_grad():
        model(**prompt_of("llava", ONE).inputs, past_key_values=cache, **more)
    return cache


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_room_runs_out_and_is_made(monkeypatch, made):
    monkeypatch.setattr(prune_decode, "ROOM", 2)
    monkeypatch.setattr(prune_fresh, "ROOM", 2)
    model = model_of("llava")
    with prune_vision(model, PLAIN, decode="hf"):
        want = steps(model, filled(model), 9)
    with prune_vision(model, PLAIN, decode="fused"):
        cache = filled(model)
        before = [layer.keys.shape[2] for layer in cache.layers]
        close(steps(model, cache, 9), want)
        assert [layer.keys.shape[2] for layer in cache.layers] == [n + 9 for n in before]
    # 2 tokens, then 4, then 8
    assert made == {"token": 9 * LAYERS, "buffers": 3, "prompt": LAYERS}


def test_the_cache_stays_a_cache():
    """Copied, cropped and reordered between tokens, and read by the model once it is not pruned any more."""
    model = model_of("llava")
    with prune_vision(model, PLAIN, decode="hf"):
        want = steps(model, filled(model), 4)
    with prune_vision(model, PLAIN, decode="fused"):
        cache = filled(model)
        close(steps(model, cache, 2), want[:2])
        twin = copy.deepcopy(cache)
        steps(model, cache, 2, first=60, position=19)
        close(steps(model, twin, 2, first=42, position=19), want[2:])
        cache.crop(-2)
        close(steps(model, cache, 2, first=42, position=19), want[2:])
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([0]))
        close(steps(model, cache, 1, first=42, position=19), want[2:3])
    assert type(cache.layers[0]).__name__ == "DynamicLayer"
    with torch.no_grad():
        ids, mask = torch.tensor([[43]]), torch.ones(1, cache.layers[0].keys.shape[2] + 1)
    # layers of one length, as the dense model expects them
    with prune_vision(model, VisionPruning.fixed({1: 1.0}), decode="fused"):
        cache = filled(model)
        ours = steps(model, cache, 1)
    with torch.no_grad():
        place = torch.tensor([[18]])
        after = model(input_ids=ids, attention_mask=mask[:, :19], position_ids=place, past_key_values=cache).logits
    assert ours.isfinite().all() and after.isfinite().all() and cache.layers[0].keys.shape[2] == 19


def test_a_failure_in_a_layer_is_noticed_by_the_next_token():
    model = make_vlm("llava")
    with prune_vision(model, PLAIN, decode="fused"):
        cache, other = filled(model), filled(model)
        want = steps(model, other, 1)
        hook = text_of(model).layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steps(model, cache, 1)
        hook.remove()
        with pytest.raises(ValueError, match="a cache whose layers have all seen the same calls"):
            steps(model, cache, 1)
        assert torch.equal(steps(model, filled(model), 1), want)


def test_few_operations_a_layer():
    model, ops = model_of("llava"), Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops[func.overloadpacket.__name__] += not func.is_view
            return func(*args, **(kwargs or {}))

    with prune_vision(model, PLAIN, decode="fused"), torch.inference_mode():
        cache = filled(model)
        steps(model, cache, 1)
        with Count():
            steps(model, cache, 1)
    each = {name: n for name, n in ops.items() if n >= LAYERS}
    assert each.pop("linear", 0) + each.pop("mm", 0) + each.pop("addmm", 0) >= 7 * LAYERS
    assert each.pop("incremental_prefill") == LAYERS and each.pop("silu") == LAYERS
    assert "cat" not in each and "neg" not in each and "scaled_dot_product_attention" not in each


def test_what_others_put_on_modules_is_called(made):
    """Hooks on every kind of module, and an adapter in the place of a projection."""
    model, seen = make_vlm("llava", sharpen=1.6), Counter()

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            seen["adapter"] += 1
            return self.inner(x) + 0.1 * x

    layer = text_of(model).layers[2]
    layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    with prune_vision(model, PLAIN, decode="hf"):
        want = steps(model, filled(model), 2)
    for name in ("self_attn", "mlp", "input_layernorm", "self_attn.k_proj", "mlp.act_fn", "mlp.down_proj"):
        with prune_vision(model, PLAIN, decode="fused"):
            cache = filled(model)
            hook = layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.update([name]))
            before = dict(seen)
            close(steps(model, cache, 2), want)
            hook.remove()
        assert seen[name] == 2 and seen["adapter"] - before["adapter"] == 2
    assert made["token"] == 12 * LAYERS


def reason(model, config, cache=None, decode="fused", context=torch.no_grad, **more):
    prompt = prompt_of("llava", ONE)
    with prune_vision(model, config, decode=decode) as handle:
        cache = DynamicCache() if cache is None else cache
        with torch.no_grad():
            model(**prompt.inputs, past_key_values=cache)
        assert handle.report().decode == "no token yet"
        with context():
            model(input_ids=torch.tensor([[5]]), past_key_values=cache, **more)
        return handle.report().decode


@contextlib.contextmanager
def autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


def test_the_report_says_how_and_why_not():
    model = model_of("llava")
    assert reason(model, PLAIN) == "fused (reference)"
    assert "no kernel of streamkernels runs it (torch.float32 on cpu" in reason(model, PLAIN, decode="auto")
    assert "asked to (decode='hf')" in reason(model, PLAIN, decode="hf")
    assert "autograd is on" in reason(model, PLAIN, context=torch.enable_grad)
    assert "autocast is on" in reason(model, PLAIN, context=autocast)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    assert "a StaticCache" in reason(model, PLAIN, cache=static)
    whole = VisionPruning.fixed({1: 4}, compaction=False)
    assert "keys that generated tokens do not see" in reason(model, whole)
    for text in (reason(model, PLAIN), reason(model, PLAIN, decode="hf")):
        assert text.startswith(("fused", "as in transformers: "))


def test_a_forward_that_is_not_known(monkeypatch):
    model = make_vlm("llava")
    monkeypatch.setattr(fused, "FORWARDS", {**fused.FORWARDS, "LlamaAttention": ("0" * 16,)})
    with pytest.raises(NotImplementedError, match="decode: expected an attention .*LlamaAttention.forward"):
        prune_vision(model, PLAIN, decode="fused")
    with prune_vision(model, PLAIN) as handle:
        assert "LlamaAttention.forward is not the one" in handle.why_not_fused
        assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(ValueError, match="decode: expected 'auto' or 'fused' or 'hf', got 'graphs'"):
        prune_vision(model, PLAIN, decode="graphs")


def test_forwards_are_given_and_taken_back():
    model = make_vlm("llava")
    text = text_of(model)
    with prune_vision(model, PLAIN):
        for layer in text.layers:
            parts = (layer, layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm)
            assert all("forward" in part.__dict__ for part in parts) and not layer._forward_pre_hooks
        assert "forward" in text.norm.__dict__ and "forward" not in text.__dict__
        text.layers[1].input_layernorm.__dict__["forward"] = mine = lambda x: x
    assert [m for m in model.modules() if "forward" in m.__dict__] == [text.layers[1].input_layernorm]
    assert text.layers[1].input_layernorm.__dict__["forward"] is mine
    with prune_vision(model, PLAIN, decode="hf"):
        assert len([m for m in model.modules() if "forward" in m.__dict__]) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels need a GPU")
@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "batch"])
@pytest.mark.parametrize(("name", "D"), [*((name, 8) for name in MAKERS), ("llava", 64)])
def test_kernels_are_as_good_as_transformers(name, D, samples, monkeypatch, made):
    """bf16 on a GPU, 12 tokens: at most twice the error of what transformers computes, against fp32 there."""
    errors, logits = {}, {}
    monkeypatch.setitem(prune_models.TEXT, "hidden_size", 4 * D)
    full = make_vlm(name, sharpen=1.6).cuda()
    half = copy.deepcopy(full).bfloat16()
    prompt = prompt_of(name, samples)
    inputs = {key: x.cuda() for key, x in prompt.inputs.items()}
    config = VisionPruning.fixed({1: 4, 3: 2, 4: 0}, score=lambda probe: -probe.index.float())
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    options |= dict(output_logits=True, suppress_tokens=prompts.VISION_TOKENS)
    ids: list = []
    for label, model, decode in (("exact", full, "hf"), ("hf", half, "hf"), ("fused", half, "auto")):
        given = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        with prune_vision(model, config, decode=decode) as handle:
            # the same tokens for all: those of the first one
            forced = (lambda b, so_far, ids=ids[0]: [int(ids[b, so_far.shape[0]])]) if ids else None
            out = model.generate(**given, **options, prefix_allowed_tokens_fn=forced)
            assert handle.report().decode.startswith("fused (" if decode == "auto" else "as in transformers")
        ids.append(out.sequences)
        logits[label] = torch.stack(out.logits, 1).float()
    for label in ("hf", "fused"):
        errors[label] = (logits[label] - logits["exact"]).abs()
    assert made == {"token": 11 * LAYERS, "buffers": 1, "prompt": LAYERS}
    assert errors["fused"].max() <= 2 * errors["hf"].max() and errors["fused"].mean() <= 1.5 * errors["hf"].mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "batch"])
@pytest.mark.parametrize("consecutive", [False, True])
def test_decisions_that_a_gpu_s_host_reads_late(samples, consecutive):
    """The same layers, rows and reads as on a CPU, where every number is there at once."""
    model, prompt, found = model_of("llava"), prompt_of("llava", samples), []
    config = VisionPruning.fast(**FAST, consecutive=consecutive)
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(model).to(device)
        inputs = {key: x.to(device) for key, x in prompt.inputs.items()}
        with prune_vision(model, config) as handle, torch.no_grad():
            logits = model(**inputs).logits.cpu()
            report = handle.report()
        found.append((logits, report.rows, report.vision_rows, report.filter_layer, report.exit_layer, report.reads))
    assert found[0][1:] == found[1][1:] and max(found[0][3]) >= 0
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-4 * found[0][0].abs().max()


def test_a_norm_is_one_operation_and_no_worse():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    own = LlamaRMSNorm(64).bfloat16()
    own.weight.data.normal_()
    x = torch.randn(5, 7, 64, dtype=torch.bfloat16) * 3
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + own.variance_epsilon) * own.weight.double()
    with torch.no_grad():
        ours, theirs = fused.norm(own, x), own(x)
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() and ours.dtype == torch.bfloat16
        for other in (x.float(), x.double()):
            assert torch.equal(fused.norm(own, other), own(other))
    x.requires_grad_(True)
    assert torch.equal(fused.norm(own, x), own(x))
