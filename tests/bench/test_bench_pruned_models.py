"""bench_pruned_models in small on the CPU: every contender computes the same logits, and drops what the script says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import bench_pruned_models as bench  # noqa: E402
from pruning_loops import Dense, Paper, Prompt, Pruned, Script, dynamic, fixed, scripted  # noqa: E402

from streamkernels import prune_vision  # noqa: E402

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
SCRIPT, VISION = Script(filter=3, kept=5, exit=5, first_probe=2), 21


@pytest.fixture(params=["LLaVA-1.5-7B", "Qwen2.5-VL-7B"])
def name(request):
    yield request.param
    bench._models.clear()


def logits_of(contender):
    with torch.inference_mode():
        out = [contender.prefill()]
        for _ in range(3):
            out.append(contender.step(int(out[-1].argmax())))
    return torch.cat(out)


def test_all_contenders_compute_the_same(name):
    model = bench.build(name, SIZES)
    prompt = Prompt(model, 1, VISION)
    dense = logits_of(Dense(model, prompt))
    found, reports = {}, {}
    for config in (dynamic(SCRIPT), fixed(SCRIPT, score=chosen)):
        with prune_vision(model, config) as handle, scripted(SCRIPT, VISION):
            contender = Pruned(model, prompt)
            found[config.name] = logits_of(contender)
            reports[config.name] = report = handle.report()
        assert report.filter_layer == (3,) and report.exit_layer == (5,)
        assert report.width == [prompt.T] * 4 + [prompt.T - VISION + 5] * 2 + [prompt.T - VISION] * 2
        steps = 3 * 8 * 2 * 2 * 16 * 4
        assert contender.kv_bytes() == report.kv_bytes() + steps
    assert reports["fast"].probe_reads == 4 and reports["fixed"].probe_reads == 0
    if name.startswith("LLaVA"):
        paper = Paper(model, prompt, SCRIPT)
        found["paper"] = logits_of(paper)
        assert paper.kv_bytes() == reports["fast"].kv_bytes() + steps
    for other in found.values():
        torch.testing.assert_close(other, found["fast"], rtol=1e-4, atol=1e-4 * dense.abs().max().item())
    assert (found["fast"] - dense).abs().max() > 0.1 * dense.abs().max(), "nothing was dropped"


def chosen(probe):
    """Of a schedule: the script's tokens."""
    _, norm = SCRIPT.scores(probe.layer, VISION, probe.index.shape[1], probe.index.device)
    return norm[None].expand(probe.index.shape)


def test_without_drops_the_paper_s_code_is_the_dense_model():
    model = bench.build("LLaVA-1.5-7B", SIZES)
    prompt, never = Prompt(model, 1, VISION), Script(99, 5, 99, first_probe=200)
    paper, dense = logits_of(Paper(model, prompt, never)), logits_of(Dense(model, prompt))
    torch.testing.assert_close(paper, dense, rtol=1e-4, atol=1e-4)
    bench._models.clear()


def test_a_captured_prefill_is_the_request_s(name):
    model = bench.build(name, SIZES)
    prompt = Prompt(model, 2, VISION)
    with torch.inference_mode():
        dense = bench.captured_prefill(model, prompt)()
        torch.testing.assert_close(dense, Dense(model, prompt).prefill())
        with prune_vision(model, fixed(SCRIPT)) as handle:
            ours = bench.captured_prefill(model, prompt, handle.layout(prompt.mask))()
            report = handle.report()
            torch.testing.assert_close(ours, Pruned(model, prompt).prefill())
    assert report.reads == 0 and report.width[-1] == prompt.T - VISION
    assert (ours - dense).abs().max() > 0.1 * dense.abs().max()


def test_predictions_of_the_shapes():
    """What the docstring says is what the functions say."""
    from streamkernels.pruning.report import ModelShape

    llava, qwen = ModelShape(32, 4096, 11008, 32, 32, 128), ModelShape(28, 3584, 18944, 28, 4, 128)
    found = {}
    for name, vision, batch in bench.CAPTURED:
        shape, script, text = llava if name.startswith("LLaVA") else qwen, bench.SCRIPTS[name], 48
        left = [vision if i <= script.filter else script.kept if i <= script.exit else 0 for i in range(shape.layers)]
        ours = sum(bench.layer_us(shape, batch, text + n) for n in left) + 100
        found[name, vision, batch] = (shape.layers * bench.layer_us(shape, batch, text + vision) + 100) / ours
    assert [round(x, 2) for x in found.values()] == [1.57, 1.84, 1.9, 1.97, 2.11], found
