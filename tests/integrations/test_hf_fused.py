"""The fused forward: the same numbers through one op, known by its text, LoRA-safe, and gone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import streamkernels as sk
from streamkernels import SOURCE, TARGET
from streamkernels.integrations.transformers import GroupedCache
from streamkernels.integrations.transformers import fused as home

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"]


def state_of(model):
    """All that a patch could touch."""
    return [
        (id(m.__dict__.get("config")), sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks), type(m))
        for m in model.modules()
    ]


def steps(model, ids, cache, offset=3):
    """A read, a merged step, and two writes: their logits."""
    out = []
    for begin, end, n in ((0, 5, 5), (5, 8, 2), (8, 9, 0), (9, 11, 0)):
        role = torch.full((ids.shape[0], end - begin), TARGET, dtype=torch.int8)
        role[:, :n] = SOURCE
        read, written = cache.stream.longest(SOURCE), cache.stream.longest(TARGET)
        positions = torch.tensor([[*range(read, read + n), *(offset + written + j for j in range(end - begin - n))]])
        out.append(model(ids[:, begin:end], past_key_values=cache, role=role, position_ids=positions).logits)
        cache.commit()
    return torch.cat(out, 1)


def called(monkeypatch):
    """The arguments of every call of the op, from both tiers."""
    from streamkernels.integrations.transformers import attention

    calls = []
    for place, tier in ((home, "fused"), (attention, "plain")):
        op = place.incremental_prefill

        def spy(q, k, v, cos, sin, *args, _op=op, _tier=tier, **kwargs):
            calls.append((_tier, cos))
            return _op(q, k, v, cos, sin, *args, **kwargs)

        monkeypatch.setattr(place, "incremental_prefill", spy)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_one_op_per_layer_with_the_angles(tiny, random_ids, family, monkeypatch, close):
    model, ids = tiny(family), random_ids(2, 11)
    calls = called(monkeypatch)
    with torch.no_grad():
        with sk.patch(model) as handle:
            assert not handle.fused and "not asked" in handle.why_not_fused
            want = steps(model, ids, GroupedCache.for_model(model, 2))
        assert calls == [("plain", None)] * 8
        calls.clear()
        with sk.patch(model, fused=True) as handle:
            assert handle.fused and handle.why_not_fused is None
            close(steps(model, ids, GroupedCache.for_model(model, 2)), want)
    turned = model.model.rotary_emb.inv_freq.numel()
    assert len(calls) == 8 and all(tier == "fused" and cos.shape[-1] == turned for tier, cos in calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_is_exact_and_other_models_stay_apart(tiny, random_ids, family):
    one = tiny(family)
    two = tiny(family, config=one.config)
    ids, before = random_ids(1, 7), state_of(one)
    with torch.no_grad():
        stock = two(ids).logits
        with sk.patch(one, fused=True):
            assert all("forward" in layer.self_attn.__dict__ for layer in one.model.layers)
            # other norms, and layers with something between, keep theirs
            own = [layer for layer in one.model.layers if "forward" in layer.__dict__]
            assert len(own) == (0 if family in ("gemma2", "phi3") else len(one.model.layers))
            assert ("forward" in one.model.norm.__dict__) == (family != "gemma2")
            assert not any("forward" in layer.self_attn.__dict__ for layer in two.model.layers)
            assert torch.equal(two(ids).logits, stock)
            twin = copy.deepcopy(one)
            assert all(layer.self_attn.forward.__self__ is layer.self_attn for layer in twin.model.layers)
        assert state_of(one) == before and torch.equal(one(ids).logits, stock)
        with pytest.raises(RuntimeError, match="boom"), sk.patch(one, fused=True):
            raise RuntimeError("boom")
        assert state_of(one) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_routes_are_untouched(tiny, random_ids, family, close):
    model, ids = tiny(family), random_ids(2, 9)
    spans, positions = sk.spans.causal(9, B=2).bounds, torch.arange(9)[None]
    with sk.patch(model):
        want = model(ids).logits, model(ids, spans=spans, position_ids=positions, use_cache=False).logits
    with sk.patch(model, fused=True):
        got = model(ids).logits, model(ids, spans=spans, position_ids=positions, use_cache=False).logits
    for a, b in zip(got, want, strict=True):
        close(a, b, 0)


INSIDE = ["", "self_attn", "mlp", "post_attention_layernorm", "mlp.up_proj", "self_attn.o_proj"]


@pytest.mark.parametrize("name", INSIDE)
def test_hooks_inside_a_layer_are_called(tiny, random_ids, name, close):
    model, ids, seen = tiny("qwen2"), random_ids(2, 11), []
    with torch.no_grad(), sk.patch(model, fused=True):
        want = steps(model, ids, GroupedCache.for_model(model, 2))
        hook = model.model.layers[1].get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
        close(steps(model, ids, GroupedCache.for_model(model, 2)), want)
        hook.remove()
        assert seen and set(seen) == {name}
        n = len(seen)
        steps(model, ids, GroupedCache.for_model(model, 2))
        assert len(seen) == n


class Adapter(nn.Module):
    """What a LoRA layer is to its surroundings: a module that calls the one it replaced, and has no weight of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.randn(2, inner.in_features, dtype=torch.float64) * 0.2)
        self.up = nn.Parameter(torch.randn(inner.out_features, 2, dtype=torch.float64) * 0.2)

    def forward(self, x):
        return self.inner(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", [True, False])
def test_adapters_take_part_and_get_gradients(tiny, random_ids, family, before, close):
    model, ids = tiny(family), random_ids(1, 6)
    torch.manual_seed(1)
    names = ("qkv_proj",) if family == "phi3" else ("q_proj", "k_proj", "v_proj")

    def wrap():
        for layer in model.model.layers:
            for name in names + ("o_proj",):
                setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
        return [p for n, p in model.named_parameters() if n.endswith((".down", ".up"))]

    def run():
        cache = GroupedCache.for_model(model)
        role = torch.tensor([[0, 0, 0, 0, 1, 1]], dtype=torch.int8)
        positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
        out = model(ids, past_key_values=cache, role=role, position_ids=positions).logits
        return out, torch.autograd.grad(out.square().sum(), adapters)

    plain = tiny(family)
    adapters = wrap() if before else None
    with sk.patch(model, fused=True):
        adapters = adapters or wrap()
        got, gradients = run()
    with sk.patch(model):
        want, expected = run()
    close(got, want)
    for a, b in zip(gradients, expected, strict=True):
        close(a, b, 1e-9)
        assert a.abs().max() > 0
    with sk.patch(plain), torch.no_grad():
        role = torch.tensor([[0, 0, 0, 0, 1, 1]], dtype=torch.int8)
        cache, positions = GroupedCache.for_model(plain), torch.tensor([[0, 1, 2, 3, 2, 3]])
        without = plain(ids, past_key_values=cache, role=role, position_ids=positions).logits
    assert (without - want).abs().max() > 0.01  # the adapters matter


def test_autocast(tiny, random_ids, close):
    for family in ("qwen3", "llama"):
        model, ids = tiny(family, dtype=torch.float32, sharpen=1), random_ids(1, 11)
        outs = []
        for fused in (False, True):
            with sk.patch(model, fused=fused), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                outs.append(steps(model, ids, GroupedCache.for_model(model, dtype=torch.bfloat16)).float())
        close(outs[1], outs[0], 0.03)


def replaced(monkeypatch, model, what):
    """Change what the fused forward stands for, as a new release or another library would."""
    attention = type(model.model.layers[1].self_attn)
    scope = attention.forward.__globals__

    def rotate_half(x):
        return x

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    if what == "rotate_half":
        monkeypatch.setitem(scope, "rotate_half", rotate_half)
    elif what == "apply_rotary_pos_emb":
        monkeypatch.setitem(scope, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    elif what == "no source":
        monkeypatch.setitem(scope, "rotate_half", len)
    elif what == "angles":
        forward = type(model.model.rotary_emb).forward
        monkeypatch.setattr(type(model.model.rotary_emb), "forward", lambda *args, **kwargs: forward(*args, **kwargs))
    elif what == "forward":
        forward = attention.forward

        def changed(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

        changed.__globals__["apply_rotary_pos_emb"] = scope["apply_rotary_pos_emb"]
        monkeypatch.setattr(attention, "forward", changed)
    else:
        module = model.model.layers[1].self_attn if what == "instance" else model.model.rotary_emb
        module.forward = module.forward


REASONS = {
    "rotate_half": "rotate_half is not the one of the tested releases",
    "apply_rotary_pos_emb": "apply_rotary_pos_emb is not the one",
    "no source": "rotate_half has no source",
    "angles": "LlamaRotaryEmbedding.forward is not the one",
    "forward": "LlamaAttention.forward is not the one",
    "instance": "layer 1's attention was replaced on the instance",
    "rotary instance": "rotary module was replaced on the instance",
}


@pytest.mark.parametrize("what", REASONS)
def test_what_is_not_known_is_refused_or_left_alone(tiny, random_ids, what, monkeypatch, close):
    model = tiny("llama")
    replaced(monkeypatch, model, what)
    before = state_of(model)
    with pytest.raises(NotImplementedError, match=REASONS[what]):
        sk.patch(model, fused=True)
    assert state_of(model) == before
    with sk.patch(model, fused="auto") as handle, torch.no_grad():
        assert not handle.fused and REASONS[what] in handle.why_not_fused
        steps(model, random_ids(1, 11), GroupedCache.for_model(model))
    with pytest.raises(ValueError, match="fused: expected"):
        sk.patch(model, fused="always")


def test_auto_is_fused_where_it_is_known(tiny):
    for family in FAMILIES:
        with sk.patch(tiny(family), fused="auto") as handle:
            assert handle.fused


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3"])
def test_a_session_compiles_to_two_graphs(tiny, random_ids, family, close):
    """Reads of one length and writes of one token: two graphs, no break, also for the next session."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, ids = tiny(family, dtype=torch.float32), random_ids(1, 24)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def session(step):
        cache = GroupedCache.for_model(model, capacity=(64, 64))
        cache.key_positions()
        out = []
        for n in range(3):
            read = torch.arange(4 * n, 4 * n + 4)[None]
            cache.reserve(4, 1)
            step(ids[:, 4 * n : 4 * n + 4], past_key_values=cache, role=SOURCE, position_ids=read)
            cache.commit()
            for j in range(2 * n, 2 * n + 2):
                cache.reserve(4, 1)
                at = torch.tensor([[j + 5]])
                token = ids[:, 12 + j : 13 + j]
                out.append(step(token, past_key_values=cache, role=TARGET, position_ids=at).logits)
                cache.commit()
        return torch.cat(out, 1)

    with sk.patch(model, fused=True), torch.no_grad():
        want = session(model)
        for _ in range(2):
            close(session(compiled), want, 1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize("T, hooked", [(1, False), (1, True), (2, False)])
def test_a_compiled_token_adds_the_bias_apart(tiny, random_ids, close, T, hooked):
    """One row's projections are products without a bias in the traced graph, unless a hook wants to see the module."""
    torch._dynamo.reset()
    model, ids = tiny("qwen2", dtype=torch.float32), random_ids(1, T)
    projection = model.model.layers[0].self_attn.q_proj
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            nn.init.normal_(getattr(layer.self_attn, name).bias)
    if hooked:
        projection.register_forward_hook(lambda module, given, out: 2 * out)
    biased = []

    def backend(graph, _):
        linears = [node for node in graph.graph.nodes if node.target is nn.functional.linear]
        biased.append(sum(len(node.args) > 2 and node.args[2] is not None for node in linears))
        return graph

    def run(step):
        cache = GroupedCache.for_model(model, capacity=(8, 8))
        return step(ids, past_key_values=cache, role=TARGET, position_ids=torch.arange(T)[None]).logits

    with sk.patch(model, fused=True), torch.no_grad():
        close(run(torch.compile(model, backend=backend, fullgraph=True)), run(model), 1e-5)
    whole = 3 * len(model.model.layers)
    assert biased == [whole if T > 1 else int(hooked)]


def step_of(model, ids, T=1):
    """Logits of T target rows after six source rows, as they came from `model`, on its device."""

    def run(step):
        cache = GroupedCache.for_model(model, capacity=(8, 8), fixed=True)
        device = ids.device
        model(ids[:, :6], past_key_values=cache, role=SOURCE, position_ids=torch.arange(6, device=device)[None])
        cache.commit()
        at = torch.arange(T, device=device)[None]
        return step(ids[:, 6 : 6 + T], past_key_values=cache, role=TARGET, position_ids=at).logits

    return run


@pytest.mark.parametrize("T", [1, 2])
def test_step_options_are_inductors_and_change_no_logits(tiny, random_ids, close, T):
    torch._dynamo.reset()
    assert set(sk.STEP_OPTIONS) <= set(torch._inductor.list_options())
    model = tiny("qwen2", dtype=torch.float32)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            nn.init.normal_(getattr(layer.self_attn, name).bias)
    run = step_of(model, random_ids(1, 8), T)
    with sk.patch(model, fused=True), torch.no_grad():
        want = run(model)
        close(run(torch.compile(model, fullgraph=True, options=sk.STEP_OPTIONS)), want, 1e-5)
