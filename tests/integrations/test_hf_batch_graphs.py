"""`SessionBatch` compiled and in CUDA graphs: on the CPU the machinery, with a graph that is replayed by calling it."""

from __future__ import annotations

import pytest
import torch
from transformers import ByT5Tokenizer

import streamkernels as sk
from streamkernels import ReadAll, SessionBatch, StreamSession, WaitK
from streamkernels.core import cache_room
from streamkernels.integrations.transformers import GroupedCache, graphs
from streamkernels.integrations.transformers.batch import PatchedBatch
from streamkernels.integrations.transformers.patch import handle_of
from streamkernels.streaming import Step

from .batch_sessions import OPTIONS, SOURCES, alone, never_end, policies, recording, same


def test_a_compiled_model(tiny):
    """Sessions call what torch.compile returned: few graphs, no break, the same texts, and the same error when full."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = tiny("qwen2", vocab=384)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    sk.patch(compiled).undo()
    more = {"fused": True, **OPTIONS}
    with pytest.raises(ValueError, match="cache: expected a fixed cache for a compiled model"):
        StreamSession(compiled, ByT5Tokenizer(), WaitK(1), **more)
    assert handle_of(model) is None
    cache = GroupedCache.for_model(compiled, 4, capacity=(128, 64), fixed=True)
    with SessionBatch(
        compiled, ByT5Tokenizer(), policies(), cache=cache, sample=lambda row: never_end, **more
    ) as batch:
        list(batch.run(SOURCES))
    # one row, several rows, and what a second call of either finds changed
    assert 1 <= counter.frame_count <= 4 and sum(s.counts.forwards for s in batch) > 40
    for row, session in enumerate(batch):
        same(session, alone(model, row)[0])
    frames, cache = counter.frame_count, GroupedCache.for_model(model, capacity=(24, 64), fixed=True)
    with StreamSession(compiled, ByT5Tokenizer(), WaitK(1), cache=cache, sample=never_end, **more) as session:
        with pytest.raises(ValueError, match="source"):
            list(session.run(SOURCES[2]))
        assert counter.frame_count > frames and len(session.tokens) > 4


class Replayed:
    """What a captured graph does: the same work again, in the same memory, without telling the host."""

    def __init__(self, run, stream):
        self.run, self.stream = run, stream
        self.out = run()

    def replay(self):
        with cache_room.unchanged_bounds(self.stream):
            self.out.copy_(self.run())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_graphs_of_a_batch(tiny, family, monkeypatch):
    model = tiny(family, vocab=384)
    captured = []
    cache = GroupedCache.for_model(model, 4, capacity=(64, 32), fixed=True)

    def capture(run, pool, device):
        captured.append(run)
        graph = Replayed(run, cache.stream)
        return graph, graph.out

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs.StepGraphs, "possible", staticmethod(lambda device: True))
    with SessionBatch(
        model,
        ByT5Tokenizer(),
        policies(),
        cache=cache,
        offset=2.5,
        fused=True,
        graphs=True,
        sample=lambda row: never_end,
        **OPTIONS,
    ) as batch:
        exact, kept = [], []
        step = batch._model.step

        def watched(steps):
            answers = step(steps)
            exact.append(cache.stream._lengths.exact)
            kept.extend((a, a.clone()) for row, a in answers.items() if steps[row].target)
            return answers

        batch._model.step = watched
        list(batch.run(SOURCES))
        # no later replay writes over logits that a session may still look at
        assert all(torch.equal(a, b) for a, b in kept)
        assert all(exact) and 2 < len(captured) <= 2 * len(graphs.BUCKETS)
        assert cache.stream.length(0).tolist() == batch._model.lengths
        assert [cache.stream.longest(r) for r in (0, 1)] == [max(n[r] for n in batch._model.lengths) for r in (0, 1)]
        for row, session in enumerate(batch):
            same(session, alone(model, row, offset=2.5)[0])
        assert captured
        before = len(captured)
        # a chunk beyond the largest bucket goes without a graph
        batch.reset(0, policy=ReadAll())
        batch.read({0: "a" * 40}, flush=True)
        assert len(captured) == before + 1
    single = GroupedCache.for_model(model, capacity=(64, 32), fixed=True)
    cache = single
    with StreamSession(
        model, ByT5Tokenizer(), WaitK(1), cache=single, graphs=True, fused="auto", sample=never_end, **OPTIONS
    ) as session:
        list(session.run(SOURCES[0]))
    same(session, alone(model, 0)[0])
    assert len(captured) > before + 1
    with pytest.raises(ValueError, match="graphs: cache: expected a fixed, unbounded cache"):
        StreamSession(model, ByT5Tokenizer(), WaitK(1), header=[7], graphs=True)
    assert handle_of(model) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("offset", [0, 2.5])
def test_cuda_graphs(tiny, family, offset):
    model = tiny(family, vocab=384, dtype=torch.float32).cuda()
    want = []
    with SessionBatch(
        model, ByT5Tokenizer(), policies(), offset=offset, fused=True, sample=lambda row: never_end, **OPTIONS
    ) as batch:
        kept = recording(batch)
        list(batch.run(SOURCES))
        want = [(s.tokens, s.limits) for s in batch]
    cache = GroupedCache.for_model(model, 4, capacity=(128, 64), fixed=True)
    for _ in range(2):
        with SessionBatch(
            model,
            ByT5Tokenizer(),
            policies(),
            cache=cache,
            offset=offset,
            fused=True,
            graphs=True,
            sample=lambda row: never_end,
            **OPTIONS,
        ) as batch:
            replayed = recording(batch)
            list(batch.run(SOURCES))
            assert cache.stream.length(0).tolist() == batch._model.lengths
            cache.stream.check()
            for row in range(4):
                assert (batch[row].tokens, batch[row].limits) == want[row]
                for a, b in zip(replayed[row], kept[row], strict=True):
                    assert a is None or (a - b).abs().max() <= 1e-4 * max(1.0, b.abs().max().item())
            for row in range(4):
                batch[row].reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronisation is a GPU's affair")
@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_step_reads_nothing_but_its_tokens(tiny, family, use_graphs):
    model = tiny(family, vocab=384, dtype=torch.bfloat16).cuda()
    cache = GroupedCache.for_model(model, 2, capacity=(128, 128), fixed=True)
    with sk.patch(model, fused=True):
        batch = PatchedBatch(model, cache, graphs=use_graphs)
        for _ in range(2):
            batch.step({0: Step([5, 6], [7], [2]), 1: Step([], [8], [0])})
        torch.cuda.set_sync_debug_mode("error")
        try:
            for n in range(5):
                batch.step({0: Step([5, 6], [7], [2 * n + 6]), 1: Step([], [8], [0])})
                batch.drop(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
