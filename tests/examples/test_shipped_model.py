"""The model that is shipped: what it was trained for it still does, through the streaming path and the command line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("num2words")
pytest.importorskip("transformers")
import evaluate  # noqa: E402
from generator import HERE, from_tsv  # noqa: E402
from layout import HEADER, PROMPT, SOURCE_END, ceiling, seen  # noqa: E402
from scoring import exact  # noqa: E402
from writing import write  # noqa: E402

import streamkernels  # noqa: E402
from streamkernels.cli import main  # noqa: E402
from streamkernels.demo import policy_of  # noqa: E402
from streamkernels.integrations.transformers.checkpoint import Checkpoint, load_checkpoint  # noqa: E402

MODEL = HERE / "model"
pytestmark = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the weights are not here")
SPOKEN = "the meeting is on the twenty third of march at five thirty pm"
WRITTEN = "the meeting is on 23 March at 5:30 pm"
TRANSCRIPT = from_tsv(HERE / "transcript.tsv")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return load_checkpoint(MODEL)


def streamed(capsys: Any, monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["demo", "--text", "-", "--trace", "json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_is_small(shipped: Checkpoint) -> None:
    assert sum(p.numel() for p in shipped.model.parameters()) <= 4_000_000
    assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000
    assert (shipped.prompt, shipped.header, shipped.source_end) == (PROMPT, HEADER, SOURCE_END)
    assert repr(policy_of(shipped.policy or "")) == "WaitK(5)"


def test_the_sentence(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batch mode, from any directory; and the session computed what one forward computes."""
    monkeypatch.chdir("/")
    records = streamed(capsys, monkeypatch, SPOKEN + "\n", "--policy", "read-all")
    summary = next(r for r in records if r["event"] == "summary")
    assert summary["text"].rstrip() == WRITTEN
    assert summary["one_shot_difference"] < 1e-3
    assert records[-1]["counts"]["source_tokens_projected"] == len(SPOKEN.encode()) + 3


def test_transcript_lines_at_five(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [sample for sample in TRANSCRIPT if all(seen(sample, 5))][:3]
    records = streamed(capsys, monkeypatch, "".join(f"{' '.join(sample.spoken)}\n" for sample in lines))
    summaries = [r for r in records if r["event"] == "summary"]
    assert [s["text"].rstrip() for s in summaries] == [" ".join(sample.written) for sample in lines]
    total = records[-1]
    assert total["one_shot_difference"] < 1e-3
    assert total["counts"]["re_encoded_source_tokens"] > 3 * total["counts"]["source_tokens_projected"]
    assert 3 < total["latency"]["AL"] < 5.5


def test_the_demo_s_lines_can_be_known_in_time() -> None:
    """The demo shows lines for which a wait of 5 is enough; the others are in the evaluation."""
    known = {" ".join(sample.spoken): sample for sample in TRANSCRIPT}
    first, *others = (HERE / "demo.txt").read_text(encoding="utf-8").splitlines()
    assert first == SPOKEN and " ".join(write(first.split())[0]) == WRITTEN
    assert others and all(all(seen(known[line], 5)) for line in others)


def sample_of_all() -> list[Any]:
    held_out = from_tsv(HERE / "held_out.tsv")
    # the first ones beyond the ceiling too: what is wrong must be wrong in the same way
    short = [s for s in held_out if len(s.spoken) < 8]
    return [*TRANSCRIPT[:2], *[s for s in short if not all(seen(s, 2))][:4]]


@pytest.mark.parametrize("k", [2, None])
def test_sessions_in_lockstep_are_sessions(shipped: Checkpoint, k: int | None) -> None:
    """Texts, delays and verdicts of the batched evaluation: StreamSession's, and the verdicts those of `exact`.

    Three rows for six samples: rows are used again.
    """
    samples = sample_of_all()
    batched, forwards = evaluate.captions(shipped.model, shipped.tokenizer, samples, k, sessions=3)
    policy = streamkernels.ReadAll() if k is None else streamkernels.WaitK(k)
    texts = {"prompt": PROMPT, "header": HEADER, "source_end": SOURCE_END}
    alone = 0
    session = streamkernels.StreamSession(
        shipped.model, shipped.tokenizer, policy, **texts, max_target_tokens=evaluate.MAX_TOKENS
    )
    with session:
        for sample, one in zip(samples, batched, strict=True):
            session.reset()
            for _ in session.run(sample.spoken):
                pass
            assert (one.text, one.delays) == (session.text, session.delays)
            assert not one.right or session.text.split() == list(sample.written)
            alone += session.counts.forwards
    assert forwards < alone
    with streamkernels.patch(shipped.model):
        assert [one.right for one in batched] == exact(shipped.model, samples, k)[0]
    if k:
        assert {one.right for one in batched} == {True, False}


def test_a_failing_session_stops_the_batch(shipped: Checkpoint) -> None:
    def fail(row: Any) -> None:
        row.reset()
        row.step([259], [], [])
        raise RuntimeError("on purpose")

    def wait(row: Any) -> None:
        row.reset()
        for _ in range(3):
            row.step([259], [], [])

    with pytest.raises(RuntimeError, match="on purpose"):
        evaluate.stream_all(shipped.model, [wait, fail, wait], 3)
    assert shipped.model.config._attn_implementation != "streamkernels"


def test_evaluation_prints_a_table(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "results.json"
    options = ["--limit", "1", "--waits", "3", "batch", "--json", str(file), "--cross-check"]
    scores = evaluate.evaluate(evaluate.arguments().parse_args(options))
    out = capsys.readouterr().out
    assert "|  | k=3 | batch |" in out and "transcript (1): exact match" in out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert len(record["scores"]) == len(scores) == 4
    assert all(s["cross_check"] == s["exact"] for s in record["scores"])
    assert all(s["ceiling"] == 1 for s in record["scores"] if s["k"] is None)


def test_the_results_that_are_shown() -> None:
    """results.json belongs to these sets, and the README shows its table."""
    record = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    scores = [evaluate.Score(**s) for s in record["scores"]]
    for s in scores:
        samples = from_tsv(HERE / evaluate.SETS[s.set])
        assert (s.samples, s.ceiling) == (len(samples), ceiling(samples, s.k))
    assert {(s.set, s.k) for s in scores} == {(name, k) for name in evaluate.SETS for k in evaluate.WAITS}
    assert evaluate.table(scores) in (HERE / "README.md").read_text(encoding="utf-8")
