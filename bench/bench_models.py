"""A wait-k word through Qwen2.5-7B and Llama-3-8B shapes, random weights: every way of streaming in one run.

`pytest -s bench/bench_models.py`; STREAMKERNELS_BENCH=compile adds (f'), which compiles for a minute per model. On a
CPU the loops run through a tiny model instead, and must write the same tokens.

Predictions for an H200, batch 1 (a word: two tokens read, two written). Weights and KV once: Qwen2.5-7B 14.1 GB of
weights that a token reads (15.2 less the embedding table) and 0.47 GB of KV at 8k, at 4.2 TB/s: 3.5 ms; Llama-3-8B
15.0 GB and 1.07 GB: 3.8 ms. (f) needs two forwards a word, so 7 ms and what 28 or 32 layers of launches inside the
graph cost; (c') needs three, so at least 10 ms, and reads the whole buffer through repeated keys; (c), (d) and (e) wait
for the host, 20 to 30 ms a forward; (a) has four forwards, fp32 scores and copies of all keys: more than 100 ms.

Where a write step's time goes, by a profile of two Qwen layers at 8k in a graph (us a layer; weights and KV alone take
111): in (f) 230, 45 kernels: cuBLAS reads gate, up and down in 110, q, k, v in 25 and o in 11, where 94, 8 and 6 would
do; norms and the other elementwise launches take 50, our two 16, gaps between kernels the rest. (f') with inductor's
defaults fuses the elementwise ones: 185. With `coordinate_descent_tuning` alone gate and up are one reduction at full
bandwidth (63), but down computes SiLU again and again in front of its own (42): 174, with q, k and v at cuBLAS.
`STEP_OPTIONS` makes what a product reads before it, so that a layer is six kernels beside ours, the same in all: norm
(3), q, k and v (10), o with the residual (8), norm (3), gate with up and SiLU (65), down with the residual (34), ours
(16) and 8 for launches that follow one another: 147 predicted, with the head 4.4 ms, 1.29 times reading once. Measured
then, all 28 layers: 4.42 ms, 1.298 times, 42 s to compile.
"""

from __future__ import annotations

import os
import statistics
import time
from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers")

import record  # noqa: E402
from baselines import read_time  # noqa: E402
from streaming_loops import (  # noqa: E402
    READ,
    WRITE,
    Context,
    GroupedDynamic,
    GroupedStatic,
    Ours,
    PaperLoop,
    ReEncoding,
)

from streamkernels import STEP_OPTIONS  # noqa: E402
from streamkernels.streaming import Step  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="7B shapes need a GPU")
SHAPES = {
    "Qwen2.5-7B": (
        "Qwen2",
        dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28),
        dict(num_attention_heads=28, num_key_value_heads=4),
    ),
    "Llama-3-8B": (
        "Llama",
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
        dict(num_attention_heads=32, num_key_value_heads=8),
    ),
}
TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
_models: dict[str, object] = {}


def build(name: str, *, tiny: bool = False):
    """A model of this shape with random weights, in bf16 on the GPU; one at a time."""
    if name not in _models:
        _models.clear()
        family, sizes, heads = SHAPES[name]
        if tiny:
            sizes, heads = TINY, dict(num_attention_heads=4, num_key_value_heads=2)
        config = getattr(transformers, f"{family}Config")(**sizes, **heads, max_position_embeddings=1 << 17)
        torch.manual_seed(0)
        dtype, device = (torch.float32, "cpu") if tiny else (torch.bfloat16, "cuda")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(transformers, f"{family}ForCausalLM")(config)
        finally:
            torch.set_default_dtype(before)
        _models[name] = model.eval().requires_grad_(False)
    return _models[name]


def floor_ms(model, context: Context, bandwidth: float) -> float:
    """Time to read once what a target token needs: all weights but the embedding table, and the context's KV."""
    table = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p is not table)
    if model.config.tie_word_embeddings:
        weights += table.numel() * table.element_size()
    return (weights + context.nbytes) / bandwidth / 1e6


@torch.inference_mode()
def word_ms(model, make, words: int, warm: int = 2) -> float:
    """Median milliseconds of one word, host included, tokens read."""
    if make.func.attention:
        model.set_attn_implementation(make.func.attention)
    loop = make()
    times = []
    try:
        for n in range(warm + words):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            loop.word()
            torch.cuda.synchronize()
            if n >= warm:
                times.append((time.perf_counter() - begin) * 1e3)
    finally:
        if hasattr(loop, "close"):
            loop.close()
    return statistics.median(times)


def variants(context_tokens: int, sessions: int):
    """(column, loop class, options, words to time)."""
    ours = [
        ("(d) tier 1", Ours, {"fused": False}, 6),
        ("(e) fused", Ours, {"fused": True}, 6),
        ("(f) fused, graphs", Ours, {"fused": True, "graphs": True}, 12),
    ]
    if sessions > 1:
        return ours
    others = [("(c) SDPA, grouped cache", GroupedDynamic, {}, 6), ("(c') the same in graphs", GroupedStatic, {}, 12)]
    if context_tokens <= 8192:
        others = [("(a) paper's loop", PaperLoop, {}, 4), ("(b) SDPA, re-encoding", ReEncoding, {}, 3), *others]
    return others + ours


CASES = [(1, 1024), (1, 4096), (1, 8192), (1, 65536), (32, 4096)]


@gpu
@pytest.mark.parametrize("name", SHAPES)
def test_a_word(name, rows):
    """One row per case: milliseconds a word of every variant, and what (f) gains."""
    model, bandwidth = build(name), (1 << 30) / read_time(1 << 30) / 1e3
    alone: dict[int, float] = {}
    for sessions, tokens in CASES:
        # ragged around the mean: a half to one and a half of it
        spread = [tokens // 2 + tokens * i // max(sessions - 1, 1) if sessions > 1 else tokens for i in range(sessions)]
        context = Context(model, [(n - n // 2, n // 2) for n in spread])
        row = {
            "model": name,
            "sessions": sessions,
            "context": tokens,
            "read once ms": floor_ms(model, context, bandwidth),
        }
        for column, make, options, words in variants(tokens, sessions):
            try:
                row[column] = word_ms(model, partial(make, model, context, **options), words)
            except (RuntimeError, NotImplementedError) as error:
                # one variant that fails must not cost the others their numbers
                row[column] = f"{type(error).__name__}: {str(error)[:60]}"
            torch.cuda.empty_cache()
        best = row["(f) fused, graphs"]
        for column in (
            "(a) paper's loop",
            "(b) SDPA, re-encoding",
            "(c) SDPA, grouped cache",
            "(c') the same in graphs",
        ):
            ours = isinstance(best, float) and isinstance(row.get(column), float)
            row[f"{column[:4].strip()} / (f)"] = row[column] / best if ours else "-"
            row.setdefault(column, "-")
        if sessions == 1 and isinstance(best, float):
            alone[tokens] = best
        one = alone.get(tokens)
        row["tokens/s"] = sessions * WRITE / best * 1e3 if isinstance(best, float) else "-"
        row["x one session"] = sessions * one / best if one and isinstance(best, float) else "-"
        keep(rows, {key: row[key] for key in COLUMNS})
        del context
        torch.cuda.empty_cache()


COLUMNS = [
    "model",
    "sessions",
    "context",
    "read once ms",
    "(a) paper's loop",
    "(b) SDPA, re-encoding",
    "(c) SDPA, grouped cache",
    "(c') the same in graphs",
    "(d) tier 1",
    "(e) fused",
    "(f) fused, graphs",
    "(a) / (f)",
    "(b) / (f)",
    "(c) / (f)",
    "(c') / (f)",
    "tokens/s",
    "x one session",
]


@gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["graphs", "compile and graphs"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_write_step(name, compiled, rows):
    """Device time of one token's step at 8k, (f) and (f'), beside reading weights and KV once."""
    if compiled and os.environ.get("STREAMKERNELS_BENCH") != "compile":
        pytest.skip("compiling takes a minute: STREAMKERNELS_BENCH=compile")
    model, bandwidth = build(name), (1 << 30) / read_time(1 << 30) / 1e3
    context = Context(model, [(4096, 4096)])
    ms, want = step_ms(model, context)
    label, more, error = "(f) fused, graphs", {}, 0.0
    if compiled:
        begin = time.perf_counter()
        ms, got = step_ms(torch.compile(model, fullgraph=True, dynamic=False, options=STEP_OPTIONS), context)
        error = float((got - want).norm() / want.norm())
        label, more = "(f') compiled, graphs", {"compile s": time.perf_counter() - begin, "logits off by": error}
    least = floor_ms(model, context, bandwidth)
    row = {"model": name, "a write step": label, "context": 8192, "read once ms": least, "ms": ms}
    keep(rows, row | {"ms / read once": ms / least} | more)
    # two orders of rounding in bf16; another function would be off by more than 1
    assert error < 0.1


@torch.inference_mode()
def step_ms(called, context: Context) -> tuple[float, torch.Tensor]:
    """(median milliseconds of replaying one token's step in a graph, its logits) of a model, compiled or not."""
    ours = Ours(called, context, graphs=True)
    try:
        step = ours.batch._model
        logits = step.step({0: Step([], [13], [4096])})[0]
        (graph,) = [c.graph for (T, _), c in step._graphs._captured.items() if T == 1]
        graph.replay()
        times = []
        for _ in range(20):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    finally:
        ours.close()
    return statistics.median(times), logits


def keep(rows: list[dict], row: dict) -> None:
    """Record a row, on disk at once: a run that is cut off keeps it."""
    rows.append(row)
    print(record.tables([row]), flush=True)
    record.save("bench_models", rows)


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_all_loops_write_the_same_tokens(name):
    """On a CPU, tiny: what is timed above computes the same, from the same context."""
    if torch.cuda.is_available():
        pytest.skip("the tiny model is for CPUs")
    model = build(name, tiny=True)
    _models.clear()
    context = Context(model, [(9, 6)])
    written = {}
    for make, options in (
        (PaperLoop, {}),
        (GroupedDynamic, {}),
        (GroupedStatic, {}),
        (Ours, {"fused": False}),
        (Ours, {"fused": True}),
    ):
        loop = make(model, context, **options)
        if loop.attention:
            model.set_attn_implementation(loop.attention)
        written[make.__name__ + str(options)] = [loop.word() for _ in range(6)]
        if hasattr(loop, "close"):
            loop.close()
    first = next(iter(written.values()))
    assert all(tokens == first for tokens in written.values()), written
    assert len({t for word in first for t in word}) > 1 and all(len(word) == WRITE == READ for word in first)
    again = ReEncoding(model, context)
    model.set_attn_implementation("sdpa")
    assert len(again.word()) == WRITE
    ragged = Context(model, [(9, 6), (4, 8)])
    loop = Ours(model, ragged)
    for _ in range(3):
        assert len(loop.word()) == WRITE
    assert loop.batch._model.lengths == [[15, 12], [10, 14]]
    loop.close()
