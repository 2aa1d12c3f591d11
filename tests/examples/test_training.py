"""A training batch is what the library's wait-k says, the loss sees what it should, exact match needs no decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("num2words")
pytest.importorskip("transformers")
import batches  # noqa: E402
import train  # noqa: E402
from generator import Sample, samples  # noqa: E402
from layout import HEADER, HEADER_ID, PROMPT, PROMPT_ID, SOURCE_END, segments, word_tokens  # noqa: E402
from scoring import exact  # noqa: E402
from transformers import ByT5Tokenizer  # noqa: E402
from writing import write  # noqa: E402

import streamkernels  # noqa: E402
from streamkernels.core.spans import wait_k_limits  # noqa: E402
from streamkernels.integrations.transformers import codec_for  # noqa: E402

torch.set_num_threads(1)


def rows(count: int, seed: str = "test") -> list[Sample]:
    return list(itertools.islice(samples(seed, held_out=False), count))


def test_tokens_are_the_tokenizer_s() -> None:
    tokenizer = ByT5Tokenizer()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    assert word_tokens("€20.50") == encode("€20.50 ")
    sample = rows(1)[0]
    flat = list(itertools.chain(*segments(sample.spoken, PROMPT_ID)))
    assert flat == encode(PROMPT) + encode(" ".join(sample.spoken) + " ") + encode(SOURCE_END)
    assert encode(HEADER) == [HEADER_ID]
    codec = codec_for(tokenizer)
    assert codec.encode("twenty", first=True) == codec.encode("twenty", first=False) == word_tokens("twenty")


def test_batch_is_wait_k() -> None:
    drawn = rows(9)
    ks = [1, 2, 3, 4, 5, 6, 8, 10, None]
    batch = batches.collate(drawn, ks)
    B, T = batch["input_ids"].shape
    assert batch["spans"].shape == (B, T, 2, 2) and batch["spans"].dtype == torch.int32
    for b, (sample, k) in enumerate(zip(drawn, ks, strict=True)):
        source, target = segments(sample.spoken, PROMPT_ID), segments(sample.written, HEADER_ID)
        limits = wait_k_limits([len(s) for s in source], [len(t) for t in target], k)
        flat, written = list(itertools.chain(*source)), list(itertools.chain(*target))
        S, n = len(flat), len(flat) + len(written)
        assert batch["input_ids"][b].tolist() == flat + written + [0] * (T - n)
        assert batch["position_ids"][b, :n].tolist() == [*range(S), *range(n - S)]
        for row in range(T):
            keys = {key for begin, end in batch["spans"][b, row].tolist() for key in range(begin, end)}
            if row < S:
                assert keys == set(range(row + 1))
            elif row < n:
                assert keys == {*range(limits[row - S]), *range(S, row + 1)}
            else:
                assert not keys
        labels = [batches.IGNORED] * S + written[1:] + [batches.IGNORED] * (T - n + 1)
        assert batch["labels"][b].tolist() == labels
        assert ((batch["weights"][b] > 0) == (batch["labels"][b] >= 0)).all()


def test_only_unknowable_words_are_guesses() -> None:
    words = tuple("the cat left at five thirty".split())
    written, needed = write(words)
    sample = Sample(words, tuple(written), (*needed, 7))
    weights = batches.collate([sample], [3])["weights"][0]
    segments_of = [1, *(len(word) + 1 for word in written), 1]
    begin = sum(len(word) + 1 for word in words) + 2
    per_word = [weights[begin + sum(segments_of[1 : 1 + j])].item() for j in range(len(written) + 1)]
    # at k=3 the word 5:30 has 7 segments but the end marker read only when the schedule gets there
    expected = [1.0 if min(3 + j, 7) >= n else batches.GUESS_WEIGHT for j, n in enumerate(sample.needed)]
    assert per_word == pytest.approx(expected)
    at_one = batches.collate([sample], [1])["weights"].unique().tolist()
    assert at_one == pytest.approx([0.0, batches.GUESS_WEIGHT, 1.0])


def test_batches_hold_their_budget() -> None:
    stream = iter(batches.Training("budget", tokens=2000, most=16, pool=64))
    for batch in itertools.islice(stream, 6):
        B, T = batch["input_ids"].shape
        assert B <= 16 and B * (T - 7) <= 2000
    assert sum(map(len, batches.by_length(rows(100), 1500))) == 100


def test_loss_ignores_what_is_not_read() -> None:
    """Through the patched model: a source word changes no logit of a row that has not read it."""
    model = train.new_model(hidden=32, layers=2, intermediate=32, head_dim=16).eval()
    sample = next(s for s in rows(50) if len(s.spoken) > 8 and len(s.written) > 6)
    inputs = batches.collate([sample], [2])
    names = ("input_ids", "position_ids", "spans")
    source = segments(sample.spoken, PROMPT_ID)
    target = segments(sample.written, HEADER_ID)
    S = sum(map(len, source))
    fourth = sum(map(len, source[:4]))  # after prompt and three words
    with streamkernels.patch(model), torch.inference_mode():
        before = model(**{name: inputs[name] for name in names}).logits
        inputs["input_ids"][0, fourth] += 1
        after = model(**{name: inputs[name] for name in names}).logits
    changed = (before != after).any(-1)[0]
    # at k=2 the second written word has read three words, the third one four
    third = S + sum(map(len, target[:3])) - 1
    assert not changed[S:third].any()
    assert changed[third]


def test_training_learns_and_streams_what_it_learned() -> None:
    """A small vocabulary is learned in a few seconds; the session writes exactly the samples that `exact` says."""
    rng = Random(0)
    phrases = "cat dog sun at five".split() + ["five thirty", "ten percent"]

    def draw() -> Sample:
        spoken = tuple(" ".join(rng.choices(phrases, k=rng.randint(1, 3))).split())
        written, needed = write(spoken)
        return Sample(spoken, tuple(written), (*needed, len(spoken) + 1))

    model = train.new_model(hidden=64, layers=2, intermediate=128, head_dim=32)
    optimizer = train.new_optimizer(model, 8e-3)
    losses = []
    handle = streamkernels.patch(model)
    for _ in range(110):
        drawn = [draw() for _ in range(16)]
        loss = train.loss_of(model, batches.collate(drawn, rng.choices(batches.WAITS, k=16)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    # in fp64 no two tokens are so close that a batch and a session, which sum in another order, choose differently
    model.eval().double()
    check = list({sample.spoken: sample for sample in (draw() for _ in range(40))}.values())[:6]
    # wrong whatever was learned: the right text is that of other words
    check += [replace(check[0], written=check[0].written[:-1] + ("eleven",))]
    outcomes = []
    for k in (1, 3, None):
        right, _ = exact(model, check, k)
        for sample, good in zip(check, right, strict=True):
            policy = streamkernels.WaitK(k) if k else streamkernels.ReadAll()
            ids = {"prompt": PROMPT, "header": HEADER, "source_end": SOURCE_END}
            session = streamkernels.StreamSession(model, ByT5Tokenizer(), policy, **ids, max_target_tokens=80)
            *_, last = session.run(sample.spoken)
            # tokens, not text: "cat" without its space, or with two, reads the same and is wrong
            wanted = [token for word in sample.written for token in word_tokens(word)]
            assert (session.tokens == wanted and last.reason == "end") == good
            outcomes.append(good)
    assert any(outcomes) and not all(outcomes)
    handle.undo()


@pytest.fixture
def same_precision() -> Iterator[None]:
    """Training may multiply in tf32; the tests that run in this process after it may not."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("same_precision")
def test_smoke_run_saves_what_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Qwen2ForCausalLM

    options = "--steps 2 --tokens 400 --batch 4 --workers 0 --device cpu --checked 4 --out".split()
    train.train(train.arguments().parse_args([*options, str(tmp_path / "a"), "--state"]))
    assert "exact match/ceiling" in capsys.readouterr().out
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert (tmp_path / "a" / "model.safetensors").stat().st_size <= 8_000_000
    assert all(file.stat().st_size < 16_000_000 for file in (tmp_path / "a").iterdir())
    assert model.generation_config.eos_token_id == 1
    assert ByT5Tokenizer.from_pretrained(tmp_path / "a").encode("a</s>", add_special_tokens=False) == [100, 1]
    train.train(train.arguments().parse_args([*options, str(tmp_path / "b"), "--resume", str(tmp_path / "a")]))
