"""Vision pruning on 7B shapes, random weights, bf16: a prefill in CUDA graphs, and whole requests in eager mode.

`pytest -s bench/bench_pruned_models.py`. On a CPU, tests/bench runs the same contenders through tiny models.

The language model is fed with embeddings of 48 text tokens around the vision tokens; the vision tower, which pruning
does not change, is left out. Weights are random, so scores are computed and then a script says which tokens they chose
(`pruning_loops.py`): the layers and numbers that VisiPruner reports.

Predictions for an H200. A layer of n rows takes the larger of its arithmetic at 600 TFLOP/s and reading its weights at
4.2 TB/s, causal attention at 400 TFLOP/s, what Hugging Face's elementwise operations move (norms in fp32, rotation,
SiLU: 150 bytes a row and hidden unit, 10 a row and intermediate unit) at 3.3 TB/s, and at least 25 launches of 2.2 us.
LLaVA, 576: 16 of 32 layers have 58 rows or fewer and take 151 us, for their weights and launches, instead of 566:
1.57 x; 2880: 1.9 x; at batch 8 the launches weigh less, 1.84 and 1.97 x. Qwen2.5-VL, 8k: 13 of 28 layers are whole,
2.11 x.

A request in eager mode is bound by the host. transformers makes 40 launches of a layer with one row, 0.74 ms on a slow
host, 23.6 ms a token of 32 layers, pruned or not, so that 31 tokens are most of a request and no prefill alone can make
one of 2880 vision tokens more than 1.15 times faster. A token of a pruned model makes 14: a norm is one instead of
eight, and rotation, the cache's concatenations and attention are one instead of thirteen: predicted 0.35 ms a layer,
11 to 12.5 ms a token, and a request of 576 vision tokens in 420 ms instead of 755, of 2880 in 450 instead of 834, the
latter with 60 ms of prefill. So do the layers of a prompt that are left with few rows: a prefill of 576 in 27 ms with
dynamic selection and 18 by schedule, where they took 31 and 23 with transformers' launches. "nothing dropped" is the
same code with a schedule that keeps all: what that is without pruning. The paper's code makes as many launches as
transformers, stores fp32 scores, 1.1 GB a layer at 2928 rows, and reads the device twice a layer.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import record  # noqa: E402
from kernel_time import capture, replay_time  # noqa: E402
from pruning_loops import Dense, Paper, Prompt, Pruned, Script, dynamic, fixed, keeping, scripted  # noqa: E402
from record import Goal, compared  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from streamkernels import prune_vision  # noqa: E402
from streamkernels.pruning import Report, Times  # noqa: E402
from streamkernels.pruning.report import ModelShape  # noqa: E402
from streamkernels.pruning.stages import Stages  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="7B shapes need a GPU")
LLAVA = dict(
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
QWEN = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
SCRIPTS = {"LLaVA-1.5-7B": Script(15, 10, 24), "Qwen2.5-VL-7B": Script(12, 10, 20)}
# (model, vision tokens, batch): how many times as fast as dense SDPA, both captured
CAPTURED = {
    ("LLaVA-1.5-7B", 576, 1): 1.35,
    ("LLaVA-1.5-7B", 576, 8): 1.35,
    ("LLaVA-1.5-7B", 2880, 1): 1.7,
    ("LLaVA-1.5-7B", 2880, 8): 1.7,
    ("Qwen2.5-VL-7B", 8192, 1): 1.7,
}
# (model, vision tokens): the same of a whole request in eager mode
REQUESTS = {("LLaVA-1.5-7B", 576): 1.0, ("LLaVA-1.5-7B", 2880): 1.3, ("Qwen2.5-VL-7B", 8192): 1.3}
TOKENS = 32  # of a request: one from the prefill, 31 steps
_models: dict[str, Any] = {}


def build(name: str, sizes: dict[str, int] | None = None) -> Any:
    """A vision-language model of this shape, random weights, bf16 on the GPU; one at a time. sizes: instead of the
    shape's, in fp32 on the CPU."""
    if name in _models:
        return _models[name]
    _models.clear()
    gc.collect()
    text = dict((LLAVA if name.startswith("LLaVA") else QWEN) if sizes is None else sizes)
    text |= {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    image = text["vocab_size"] - 1
    if name.startswith("LLaVA"):
        tower = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
        )
        text_config = transformers.LlamaConfig(**text)
        config = transformers.LlavaConfig(vision_config=tower, text_config=text_config, image_token_id=image)
        kind = transformers.LlavaForConditionalGeneration
    else:
        D = text["hidden_size"] // text["num_attention_heads"]
        sections = [D // 2 - 2 * (3 * D // 16), 3 * D // 16, 3 * D // 16]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        tower_sizes = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=tower_sizes | {"out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [0]},
            image_token_id=image,
            video_token_id=image - 1,
            vision_start_token_id=image - 2,
            vision_end_token_id=image - 3,
        )
        kind = transformers.Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    dtype, device = (torch.bfloat16, "cuda") if sizes is None else (torch.float32, "cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    _models[name] = model.eval().requires_grad_(False)
    return _models[name]


def layer_us(shape: ModelShape, batch: int, rows: int) -> float:
    """Predicted device time of a decoder layer of so many rows a sample."""
    n = batch * rows
    product = 2 * n * shape.row_macs() / 600e6
    weights = 2 * shape.row_macs() / 4.2e6
    attention = 2 * batch * rows * (rows + 1) / 2 * shape.pair_macs() / 400e6
    elementwise = n * (150 * shape.hidden + 10 * shape.intermediate) / 3.3e6
    return max(product, weights) + max(attention + elementwise, 25 * 2.2)


def predicted_us(report: Report, dense: bool) -> float:
    """Of a prefill: its layers, by the rows that the report counted, and the head's weights."""
    shape = report.model
    rows = [report.tokens] * shape.layers if dense else report.width
    return sum(layer_us(shape, report.batch, n) for n in rows) + 100


def captured_prefill(model: Any, prompt: Prompt, layout: Any = None) -> Any:
    """The language model's prefill with its head on the last token, as one call for a graph."""
    text, more = model.model.language_model, {} if layout is None else {"vision_mask": layout}

    def call() -> torch.Tensor:
        out = text(inputs_embeds=prompt.embeds, past_key_values=DynamicCache(), use_cache=True, **more)
        return model.lm_head(out.last_hidden_state[:, -1])

    return call


def device_us(call: Any) -> float:
    """Device time of a call in a CUDA graph; the graph's memory is given back."""
    graph = capture([call])
    us = replay_time(graph)
    del graph
    torch.cuda.empty_cache()
    return us


@gpu
@pytest.mark.parametrize("name, vision, batch", CAPTURED)
@torch.inference_mode()
def test_captured_prefill(name, vision, batch, rows):
    """Device time of a prefill under the fixed schedule, and of dense SDPA."""
    model = build(name)
    prompt = Prompt(model, batch, vision)
    dense = device_us(captured_prefill(model, prompt))
    with prune_vision(model, fixed(SCRIPTS[name])) as handle:
        ours = device_us(captured_prefill(model, prompt, handle.layout(prompt.mask)))
        report = handle.report()
    assert report.reads == 0 and report.width[-1] == prompt.T - vision
    work = f"{name}, {vision} vision tokens, batch {batch}"
    goal = Goal(at_least=CAPTURED[name, vision, batch])
    row = compared(work, "prefill, captured", predicted_us(report, False), ours, "dense SDPA", dense, goal)
    keep(rows, row | {"peer predicted us": predicted_us(report, True)})


@torch.inference_mode()
def request(contender: Any, steps: int = TOKENS - 1) -> tuple[float, float, float]:
    """Milliseconds of the prefill, of a later token, median, and of all of it; each token is read by the host."""
    times = []
    # a collection takes longer than a token
    gc.collect()
    gc.disable()
    try:
        synchronize()
        token = None
        for _ in range(1 + steps):
            begin = time.perf_counter()
            token = int((contender.prefill() if token is None else contender.step(token)).argmax())
            times.append((time.perf_counter() - begin) * 1e3)
    finally:
        gc.enable()
    return times[0], statistics.median(times[1:]), sum(times)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def selection_share(contender: Any) -> tuple[float, float]:
    """Device microseconds of scores and decisions in one prefill, and of everything."""
    honest = Stages.decide

    def decide(*given: Any) -> None:
        with torch.profiler.record_function("selection"):
            honest(*given)

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with pytest.MonkeyPatch.context() as patch, torch.profiler.profile(activities=activities) as profile:
        patch.setattr(Stages, "decide", decide)
        contender.prefill()
        synchronize()

    def kernels(event: Any) -> float:
        return sum(k.duration for k in event.kernels) + sum(kernels(child) for child in event.cpu_children)

    events = profile.events()
    chosen = sum(kernels(e) for e in events if e.name == "selection" and e.device_type.name == "CPU")
    return chosen, sum(k.duration for e in events for k in e.kernels)


@gpu
@pytest.mark.parametrize("name, vision", REQUESTS)
@torch.inference_mode()
def test_a_request(name, vision, rows):
    """Prefill and 31 tokens in eager mode: dense, pruned by what is found meanwhile or a schedule, the paper's code."""
    model, script = build(name), SCRIPTS[name]
    prompt = Prompt(model, 1, vision)
    found: dict[str, list[tuple[float, float, float]]] = {}
    report, share, kv = None, (0.0, 1.0), {}
    configs = {"dynamic": dynamic(script), "schedule": fixed(script), "nothing dropped": keeping(script)}
    paper = name.startswith("LLaVA")
    for again in range(5):  # the first round warms up
        for label in ["dense SDPA", *configs, *(["paper's eager"] if paper else [])]:
            if label in configs:
                with prune_vision(model, configs[label]) as handle, scripted(script, vision):
                    contender = Pruned(model, prompt)
                    times = request(contender)
                    if label == "dynamic":
                        report = handle.report()
                        if again == 1:
                            share = selection_share(contender)
            else:
                contender = Paper(model, prompt, script) if label[0] == "p" else Dense(model, prompt)
                times = request(contender)
            kv[label] = contender.kv_bytes()
            if again:
                found.setdefault(label, []).append(times)
            del contender
    assert report is not None and report.filter_layer == (script.filter,) and report.exit_layer == (script.exit,)
    ms = {label: [statistics.median(x) for x in zip(*times, strict=True)] for label, times in found.items()}
    total = {label: each[2] for label, each in ms.items()}
    for label in ms:
        row = {"request": f"{name}, {vision}", "contender": label, "prefill ms": ms[label][0]}
        row |= {"ms a token": ms[label][1], f"{TOKENS} tokens ms": total[label], "KV MB": kv[label] / 1e6}
        keep(rows, row)
    work, dense = f"{name}, {vision} vision tokens, eager", "dense SDPA"
    nan = float("nan")

    def goal(part: str, a: str, x: float, b: str, y: float, at_least: float) -> None:
        keep(rows, compared(work, f"{part}, {a}", nan, 1e3 * x, b, 1e3 * y, Goal(at_least=at_least)))

    for label in configs:
        goal("request", label, total[label], dense, total[dense], REQUESTS[name, vision])
        goal("prefill", label, ms[label][0], dense, ms[dense][0], REQUESTS[name, vision])
        goal("a token", label, ms[label][1], dense, ms[dense][1], 1.0)
        if paper:
            goal("request", label, total[label], "paper's eager", total["paper's eager"], 2.0)
            goal("prefill", label, ms[label][0], "paper's eager", ms["paper's eager"][0], 2.0)
    limit = Goal(at_most=0.03)
    keep(rows, compared(work, "selection, device", nan, share[0], "the prefill's kernels", share[1], limit))
    # the cache holds the prompt's and the tokens' keys
    steps = (TOKENS - 1) * 2 * report.model.kv_heads * report.model.head_dim * 2 * report.model.layers
    assert kv["dynamic"] == report.kv_bytes() + steps and kv[dense] == report.kv_bytes(dense=True) + steps
    both = zip(ms["dynamic"][:2], ms[dense][:2], strict=True)
    print(report.with_times(Times(*(x for pair in both for x in pair))), flush=True)


@gpu
@torch.inference_mode()
def test_costs(rows):
    """What `streamkernels/pruning/costs.py` holds: microseconds of a captured layer by its rows, of an eager one's
    launches, and of a probe; of the model as `prune_vision` leaves it, which drops nothing here."""
    name = "LLaVA-1.5-7B"
    model, script = build(name), SCRIPTS[name]
    layers = model.model.language_model.config.num_hidden_layers
    us = {}
    for vision in (16, 576, 2880):
        prompt = Prompt(model, 1, vision)
        with prune_vision(model, keeping(script)) as handle:
            us[prompt.T] = device_us(captured_prefill(model, prompt, handle.layout(prompt.mask))) / layers
            if vision == 16:
                eager = statistics.median([request(Pruned(model, prompt), 1)[0] for _ in range(8)][2:])
                keep(rows, {"costs": name, "rows": prompt.T, "eager us a layer": 1e3 * eager / layers})
        keep(rows, {"costs": name, "rows": prompt.T, "us a layer": us[prompt.T], "us a row": us[prompt.T] / prompt.T})
    # what the probes before the filter layer add, on the host's clock: their launches and reads stop the device
    prompt = Prompt(model, 1, 576)
    prefill = []
    for first in (script.filter, FIRST):
        late = Script(script.filter, script.kept, script.exit, first)
        with prune_vision(model, dynamic(late)), scripted(late, 576):
            contender = Pruned(model, prompt)
            times = [request(contender, 2)[0] for _ in range(8)]
        prefill.append(statistics.median(times[2:]))
    probe = (prefill[1] - prefill[0]) / (script.filter - FIRST) * 1e3
    keep(rows, {"costs": name, "a probe us": probe, "prefill ms, one probe": prefill[0], "nine": prefill[1]})


FIRST = 7


def keep(rows: list[dict], row: dict) -> None:
    """Record a row, on disk at once: a run that is cut off keeps it."""
    rows.append(row)
    print(record.tables([row]), flush=True)
    record.save("bench_pruned_models", rows)
