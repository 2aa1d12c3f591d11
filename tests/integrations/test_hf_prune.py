"""A pruned model equals one that computes everything and masks what was dropped."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from streamkernels import VisionPruning, prune_vision

from .prune_literal import Turn, never_dropping
from .prune_models import LAYERS, MAKERS, make_vlm, prompt_of

VISION_TOKENS = [80, 81, 82, 83]
TOLERANCE = 1e-5  # of the largest logit, fp32
_models: dict = {}


def model_of(name, layers=LAYERS):
    if (name, layers) not in _models:
        _models[name, layers] = make_vlm(name, layers=layers, sharpen=1.6 if layers == LAYERS else 1.4)
    return _models[name, layers]


def extended(prompt, sequences):
    """The inputs of one forward over the prompt and what was generated."""
    inputs, more = dict(prompt.inputs), sequences.shape[1] - prompt.vision.shape[1]
    ones = torch.ones(len(sequences), more, dtype=torch.long)
    inputs["input_ids"] = sequences
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones.int()], 1)
    return inputs


def turn_of(prompt, S):
    vision = torch.nn.functional.pad(prompt.vision, (0, S - prompt.vision.shape[1]))
    T = prompt.vision.shape[1]
    last = [int(row.nonzero()[-1]) for row in prompt.inputs["attention_mask"]]
    return Turn(0, T, vision, last)


def check(model, prompt, config, *, steps=4, drops=True, **options):
    """Greedy generation of the pruned model against the never-dropping one, all logits; returns (report, plan)."""
    with prune_vision(model, config) as handle:
        made = model.generate(
            **prompt.inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=VISION_TOKENS,
            **options,
        )
        with torch.no_grad():
            full = model(**prompt.inputs).logits
        report = handle.report()
    ours = torch.stack(made.logits, 1)
    T = prompt.vision.shape[1]
    S = made.sequences.shape[1] - 1
    expected, plan = never_dropping(model, extended(prompt, made.sequences[:, :S]), config, [turn_of(prompt, S)])
    scale = float(expected.abs().max())
    assert (ours - expected[:, T - 1 :]).abs().max() <= TOLERANCE * scale
    left = prompt.inputs["attention_mask"].bool() & ~plan.dropped[:, :T]
    assert (full - expected[:, :T])[left].abs().max() <= TOLERANCE * scale
    assert not full[~left].any()
    for layer, gone in enumerate(plan.dropped_at):
        there = prompt.vision & prompt.inputs["attention_mask"].bool() & ~gone[:, :T]
        assert report.vision_rows[layer] == tuple(there.sum(1).tolist())
    assert min([1.0, *plan.cosines, *plan.norms]) > 1e-5, "a threshold so near that rounding decides"
    if drops:
        assert bool(plan.dropped.any()), "nothing was dropped: the test would be blind"
        with torch.no_grad():
            dense = model(**prompt.inputs).logits
        assert (dense - expected[:, :T])[left].abs().max() > 100 * TOLERANCE * scale
    return report, plan


FAST = dict(first_probe_layer=1, layer_threshold=0.98, token_threshold=0.9, exit_threshold=0.9)
ONE = [[3, "image", 5]]


@pytest.mark.parametrize("name", MAKERS)
def test_fast(name):
    report, _ = check(model_of(name), prompt_of(name, ONE), VisionPruning.fast(**FAST))
    assert report.probe_reads <= LAYERS - 2 and report.layout_reads <= 1


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("score", ["norm", "attention"])
def test_fixed_schedule(name, score):
    config = VisionPruning.fixed({1: 4, 3: 0.25, 4: 0}, score=score)
    report, _ = check(model_of(name), prompt_of(name, ONE), config)
    assert report.probe_reads == 0


PRESETS = {
    "reference_code 7B": VisionPruning.reference_code("7B", token_threshold=0.9),
    "reference_code 13B": VisionPruning.reference_code("13B", layer_threshold=0.98, token_threshold=0.5),
    "paper": VisionPruning.paper(layer_threshold=0.98, token_threshold=0.5, exit_threshold=0.9),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_with_a_shallow_stage(name, preset):
    prompt = prompt_of(name, [[3, "image", 4, "image", 2]])
    report, _ = check(model_of(name, 10), prompt, PRESETS[preset])
    assert report.layout_reads == 1


MIXED = [[3, "image", 5], [2, "image", 4, "image", 3], [7], ["image", 9]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_batch_with_a_filter_layer_for_each_sample(name, side):
    options = FAST | {"layer_threshold": 0.9, "exit_count": 1}
    prompt = prompt_of(name, MIXED, side=side)
    if side == "right":  # generate continues behind the padding: only the prompt is compared
        check_prompt(model_of(name), prompt, VisionPruning.fast(**options))
        return
    report, _ = check(model_of(name), prompt, VisionPruning.fast(**options))
    stages = set(zip(report.filter_layer, report.exit_layer, strict=True))
    assert len(stages) > (name == "llava") + 1, "the samples should differ"


@pytest.mark.parametrize("score", ["norm", "attention"])
def test_batch_with_a_schedule(score):
    config = VisionPruning.fixed({0: 12, 2: 0.34, 4: 1}, score=score)
    check(model_of("llava"), prompt_of("llava", MIXED), config)


@pytest.mark.parametrize("preset", PRESETS)
def test_batch_with_a_shallow_stage(preset):
    check(model_of("llava", 10), prompt_of("llava", MIXED), PRESETS[preset])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_video_frames_and_images(name):
    prompt = prompt_of(name, [[2, "video", 3, "image", 4]])
    check(model_of(name), prompt, VisionPruning.fast(**FAST))


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_renumbered_positions(name, dynamic):
    more = {"positions": "renumbered"}
    config = VisionPruning.fast(**FAST, **more) if dynamic else VisionPruning.fixed({1: 4, 3: 0.1}, **more)
    check(model_of(name), prompt_of(name, MIXED), config)
    check(model_of(name), prompt_of(name, ONE), config, cache_implementation="static")


def test_a_function_as_score():
    seen = []

    def backwards(probe):
        seen.append((probe.layer, probe.k.shape[2]))
        return -probe.index.float()

    config = VisionPruning.fixed({1: 2}, score=backwards)
    prompt = prompt_of("llava", ONE)
    with prune_vision(model_of("llava"), config) as handle, torch.no_grad():
        full = model_of("llava")(**prompt.inputs).logits
        assert handle.report().vision_rows == [(9,)] * 2 + [(2,)] * 4
    assert seen == [(1, 17)]
    assert [bool(row.any()) for row in full[0]] == [True] * 5 + [False] * 7 + [True] * 5


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "batch"])
def test_static_cache(name, samples):
    check(model_of(name), prompt_of(name, samples), VisionPruning.fast(**FAST), cache_implementation="static")


def test_beams():
    model, prompt = model_of("llava"), prompt_of("llava", [[3, "image", 5], [2, "image", 4]])
    config = VisionPruning.fast(**FAST)
    options = dict(suppress_tokens=VISION_TOKENS, max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False)
    with prune_vision(model, config):
        made = model.generate(**prompt.inputs, **options, output_scores=True, return_dict_in_generate=True)
    S = made.sequences.shape[1] - 1
    expected, _ = never_dropping(model, extended(prompt, made.sequences[:, :S]), config, [turn_of(prompt, S)])
    T = prompt.vision.shape[1]
    chosen = expected[:, T - 1 :].log_softmax(-1).gather(2, made.sequences[:, T:, None])[..., 0]
    assert (chosen.sum(1) / chosen.shape[1] - made.sequences_scores).abs().max() < 1e-5


def test_prompt_lookup_equals_greedy(monkeypatch):
    """Guesses are checked in chunks of several tokens, and wrong ones cropped from caches of different lengths."""
    from transformers.cache_utils import DynamicCache

    crops, crop = [], DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda self, n: (crops.append(n), crop(self, n))[1])
    model = model_of("llava")
    options = dict(suppress_tokens=VISION_TOKENS, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    with prune_vision(model, VisionPruning.fast(**FAST)):
        for seed in range(4):
            prompt = prompt_of("llava", ONE, seed=seed)
            greedy = model.generate(**prompt.inputs, **options)
            ids = prompt.inputs["input_ids"]
            # the text before the image holds what the model will say, with a wrong end
            ids[0, :3] = torch.tensor([greedy[0, 18], greedy[0, 19], 2])
            greedy = model.generate(**prompt.inputs, **options)
            lookup = model.generate(**prompt.inputs, **options, prompt_lookup_num_tokens=3)
            assert torch.equal(lookup, greedy)
    assert crops


@pytest.mark.parametrize("samples", [[[3, "image", 5]], [[3, "image", 5], [9], [1, "image", 2, "image", 2]]])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["fast", "fixed", "renumbered", "reference", "paper"])
def test_second_prompt_with_a_new_image(kind, static, samples):
    """By hand: prompt, two tokens, another prompt with another image on the same cache, two more tokens."""
    configs = {
        "fast": VisionPruning.fast(**FAST),
        "fixed": VisionPruning.fixed({1: 4, 3: 2}),
        "renumbered": VisionPruning.fixed({1: 4, 3: 2}, positions="renumbered"),
        "reference": PRESETS["reference_code 7B"],
        "paper": PRESETS["paper"],
    }
    layers = 10 if kind in ("reference", "paper") else LAYERS
    model, config = model_of("llava", layers), configs[kind]
    first = prompt_of("llava", samples)
    second = prompt_of("llava", [[2, "image", 3]] + [[4], ["image", 5]][: len(samples) - 1], seed=1)
    parts = [first.inputs["input_ids"], second.inputs["input_ids"]]
    ids = [parts[0], _text(len(samples), 2), parts[1], _text(len(samples), 2)]
    masks = [first.inputs["attention_mask"], torch.ones_like(ids[1]), second.inputs["attention_mask"], ids[3] * 0 + 1]
    every, mask = torch.cat(ids, 1), torch.cat(masks, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    singly = [[(t[:, None], None) for t in part.T] for part in (ids[1], ids[3])]
    pieces = [(ids[0], first), *singly[0], (ids[2], second), *singly[1]]
    cache, ours, at = _cache(model, static), [], 0
    with prune_vision(model, config), torch.no_grad():
        for piece, prompt in pieces:
            pixels = {} if prompt is None else {"pixel_values": prompt.inputs["pixel_values"]}
            end = at + piece.shape[1]
            out = model(
                input_ids=piece,
                attention_mask=mask[:, :end],
                position_ids=positions[:, at:end],
                past_key_values=cache,
                **pixels,
            )
            ours.append(out.logits)
            at = end
    ours = torch.cat(ours, 1)
    T, middle = ids[0].shape[1], ids[0].shape[1] + 2
    vision = (every == 80) & mask.bool()
    turns = []
    for begin, length in ((0, T), (middle, ids[2].shape[1])):
        own = torch.zeros_like(vision)
        own[:, begin : begin + length] = vision[:, begin : begin + length]
        last = [int(row[: begin + length].nonzero()[-1]) for row in mask]
        turns.append(Turn(begin, begin + length, own, last))
    inputs = {
        "input_ids": every,
        "attention_mask": mask,
        "pixel_values": torch.cat([first.inputs["pixel_values"], second.inputs["pixel_values"]])[
            _order(first, second, len(samples))
        ],
    }
    expected, plan = never_dropping(model, inputs, config, turns)
    left = mask.bool() & ~plan.dropped
    scale = float(expected.abs().max())
    assert plan.dropped[:, :T].any() and plan.dropped[:, middle:].any()
    assert (ours - expected)[left].abs().max() <= TOLERANCE * scale


def _text(B, T):
    return torch.randint(2, 80, (B, T), generator=torch.Generator().manual_seed(9))


def _cache(model, static):
    from transformers import DynamicCache, StaticCache

    config = model.config.get_text_config()
    return StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)


def _order(first, second, B):
    """Pixels of one forward come sample by sample."""
    counts = [[int(p.vision[b].sum()) // 9 for b in range(B)] for p in (first, second)]
    out, at = [], [0, sum(counts[0])]
    for b in range(B):
        for n in (0, 1):
            out += range(at[n], at[n] + counts[n][b])
            at[n] += counts[n][b]
    return out


def check_prompt(model, prompt, config):
    """The prompt's logits alone, for padding behind it."""
    with prune_vision(model, config), torch.no_grad():
        full = model(**prompt.inputs).logits
    T = prompt.vision.shape[1]
    expected, plan = never_dropping(model, prompt.inputs, config, [turn_of(prompt, T)])
    left = prompt.inputs["attention_mask"].bool() & ~plan.dropped
    assert plan.dropped.any()
    assert (full - expected)[left].abs().max() <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_bf16_is_as_good_as_eager(name):
    """At most twice the error of the never-dropping eager model in bf16, both against it in fp32."""
    config = VisionPruning.fixed({1: 4, 3: 2, 4: 0}, score=lambda probe: -probe.index.float())
    full, half = model_of(name), make_vlm(name, sharpen=1.6, dtype=torch.bfloat16)
    prompt = prompt_of(name, MIXED)
    left, exact, eager = None, [], []
    T = prompt.vision.shape[1]
    for model, out in ((full, exact), (half, eager)):
        logits, plan = never_dropping(model, prompt.inputs, config, [turn_of(prompt, T)])
        out.append(logits.float())
        left = prompt.inputs["attention_mask"].bool() & ~plan.dropped
    assert plan.dropped.any()
    with prune_vision(half, config), torch.no_grad():
        ours = half(**prompt.inputs).logits.float()
    error, allowed = ((x - exact[0])[left].abs() for x in (ours, eager[0]))
    assert error.max() <= 2 * allowed.max() and error.square().mean() <= 4 * allowed.square().mean()


def test_compiled_decode_in_one_graph():
    """torch.compile(fullgraph=True) of generated tokens on a static cache, samples of different lengths."""
    import torch._dynamo.testing

    model, prompt = model_of("llava", 3), prompt_of("llava", MIXED[:2])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def run(call):
        cache, out = _cache(model, static=True), []
        model(**prompt.inputs, past_key_values=cache)
        positions = prompt.inputs["attention_mask"].sum(1, keepdim=True)
        for step in range(3):
            ids = torch.tensor([[5 + step], [7 + step]])
            out.append(call(input_ids=ids, position_ids=positions + step, past_key_values=cache).logits)
        return torch.cat(out, 1)

    config = VisionPruning.fast(first_probe_layer=1, layer_threshold=0.98, token_threshold=0.9)
    with prune_vision(model, config), torch.no_grad():
        assert torch.equal(run(compiled), run(model)) and counter.frame_count == 1


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("samples", [ONE, MIXED[:3]], ids=["one", "batch"])
@pytest.mark.parametrize("kind", ["fast", "fixed"])
def test_a_whole_cache_and_three_questions(kind, samples, static):
    """Without compaction: a prompt, a question without an image, one with; each selects among all vision tokens."""
    more = dict(FAST, compaction=False) if kind == "fast" else dict(compaction=False)
    config = VisionPruning.fast(**more) if kind == "fast" else VisionPruning.fixed({1: 4, 3: 0.2, 4: 0}, **more)
    model, B = model_of("llava"), len(samples)
    first, second = prompt_of("llava", samples), prompt_of("llava", [[2, "image", 3]] + [[4]] * (B - 1), seed=1)
    question = prompt_of("llava", [[5]] + [[3]] * (B - 1), seed=2)
    prompts = [first, question, second]
    ids, masks = [], []
    for prompt in prompts:
        ids += [prompt.inputs["input_ids"], *_text(B, 2).split(1, 1)]
        masks += [prompt.inputs["attention_mask"], *torch.ones(B, 2, dtype=torch.long).split(1, 1)]
    every, mask = torch.cat(ids, 1), torch.cat(masks, 1)
    positions, cache, ours, at = (mask.cumsum(1) - 1).clamp(min=0), _cache(model, static), [], 0
    turns, reports = [], []
    with prune_vision(model, config) as handle, torch.no_grad():
        for n, piece in enumerate(ids):
            end, inputs = at + piece.shape[1], prompts[n // 3].inputs
            pixels = {"pixel_values": inputs["pixel_values"]} if n % 3 == 0 and "pixel_values" in inputs else {}
            row = dict(input_ids=piece, attention_mask=mask[:, :end], position_ids=positions[:, at:end])
            ours.append(model(**row, past_key_values=cache, **pixels).logits)
            if n % 3 == 0:
                own = torch.zeros_like(mask, dtype=torch.bool)
                own[:, at:end] = (every == 80)[:, at:end]
                turns.append(Turn(at, end, own, [int(r[:end].nonzero()[-1]) for r in mask]))
                reports.append(handle.report())
            at = end
    order = _order(first, second, B)
    pixels = torch.cat([first.inputs["pixel_values"], second.inputs["pixel_values"]])[order]
    inputs = {"input_ids": every, "attention_mask": mask, "pixel_values": pixels}
    expected, plan = never_dropping(model, inputs, config, turns)
    assert all(dropped.any() for dropped in plan.dropped_by)
    assert (torch.cat(ours, 1) - expected)[mask.bool()].abs().max() <= TOLERANCE * float(expected.abs().max())
    for n, report in enumerate(reports):
        seen = torch.stack([turn.vision for turn in turns[: n + 1]]).any(0)
        assert report.vision_rows[-1] == tuple((seen & ~plan.dropped_by[n]).sum(1).tolist())
        assert report.width == [report.tokens] * LAYERS
