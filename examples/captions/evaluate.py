"""What the caption model gets exactly right while it streams, beside what its schedule allows it to know.

    python examples/captions/evaluate.py                      # both sets, all waits
    python examples/captions/evaluate.py --limit 100          # the first 100 of each set
    python examples/captions/evaluate.py --json results.json --cross-check

Every sample is decoded freely, word by word under wait-k, by `streamkernels.Session`; `lockstep.py` lets many sessions
share a forward. A sample counts if all its tokens are right, the end included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from generator import Sample, from_tsv
from layout import END_ID, HEADER_ID, PROMPT_ID, ceiling, seen, segments
from lockstep import stream_all
from scoring import exact

import streamkernels
from streamkernels.integrations.transformers import ByteCodec, patch
from streamkernels.integrations.transformers.checkpoint import load_checkpoint
from streamkernels.streaming import ReadAll, Session, StreamModel, WaitK, metrics

HERE = Path(__file__).resolve().parent
WAITS = (1, 2, 3, 5, 8, None)
SETS = {"held-out set": "held_out.tsv", "transcript": "transcript.tsv"}
SHOWN = (5, None)  # waits whose misses go into the JSON
# longer than any written text: what goes on for so long is wrong
MAX_TOKENS = 160


@dataclass(frozen=True)
class Caption:
    """One sample as a session wrote it. delays: spoken words read at each written word."""

    text: str
    right: bool
    delays: list[int]


@dataclass(frozen=True)
class Score:
    """One set at one wait (k None: batch mode). AL and LAAL in spoken words, against the right text's length.

    exact: share of samples written exactly; it may exceed the ceiling by guesses that come true. exact_within: the same
    among the samples below the ceiling, those that need no guess.
    """

    set: str
    k: int | None
    samples: int
    exact: float
    ceiling: float
    exact_within: float
    AL: float
    LAAL: float
    seconds: float
    cpu_seconds: float
    forwards: int
    cross_check: float | None = None


def caption(sample: Sample, k: int | None, tokenizer: Any, row: StreamModel) -> Caption:
    """Stream one sample through a model of one session."""
    policy = ReadAll() if k is None else WaitK(k)
    ids: dict[str, Any] = {"prompt": [PROMPT_ID], "header": [HEADER_ID], "source_end": [END_ID]}
    session = Session(row, ByteCodec(tokenizer), policy, **ids, max_target_tokens=MAX_TOKENS)
    for _ in session.run(sample.spoken):
        pass
    right = [*session.tokens, END_ID] == list(chain(*segments(sample.written, HEADER_ID)[1:]))
    return Caption(session.text, right, session.delays)


def captions(
    model: Any, tokenizer: Any, samples: Sequence[Sample], k: int | None, sessions: int = 64
) -> tuple[list[Caption], int]:
    """All samples under one wait, and the forwards it took. The longest first: the last to end are the shortest."""
    order = sorted(range(len(samples)), key=lambda i: -sum(map(len, samples[i].spoken)))
    jobs: list[Callable[..., Caption]] = [partial(caption, samples[i], k, tokenizer) for i in order]
    results, forwards = stream_all(model, jobs, sessions)
    found = dict(zip(order, results, strict=True))
    return [found[i] for i in range(len(samples))], forwards


def score(
    model: Any, tokenizer: Any, name: str, samples: Sequence[Sample], k: int | None, sessions: int, cross_check: bool
) -> tuple[Score, list[Caption]]:
    """One cell of the table, and what was written."""
    begin, busy = time.monotonic(), time.process_time()
    written, forwards = captions(model, tokenizer, samples, k, sessions)
    spent = (time.monotonic() - begin, time.process_time() - busy)
    lags = metrics.corpus(
        metrics.Sentence(one.delays, len(sample.spoken), len(sample.written))
        for one, sample in zip(written, samples, strict=True)
    )
    checked = None
    if cross_check:
        with patch(model):
            checked = sum(exact(model, samples, k, tokens=8192)[0]) / len(samples)
    share = sum(one.right for one in written) / len(samples)
    within = [one.right for one, sample in zip(written, samples, strict=True) if all(seen(sample, k))]
    shares = (share, ceiling(samples, k), sum(within) / max(len(within), 1))
    cell = Score(name, k, len(samples), *shares, lags["AL"], lags["LAAL"], *spent, forwards, checked)
    return cell, written


def table(scores: Sequence[Score]) -> str:
    """A Markdown table, one row per set and quantity, one column per wait."""
    waits = list(dict.fromkeys(s.k for s in scores))
    head = ["", *("batch" if k is None else f"k={k}" for k in waits)]
    rows = [head, ["---"] * len(head)]
    for name in dict.fromkeys(s.set for s in scores):
        cells = {s.k: s for s in scores if s.set == name}
        count = next(iter(cells.values())).samples
        rows.append([f"{name} ({count}): exact match", *(f"{cells[k].exact:.3f}" for k in waits)])
        rows.append(["ceiling", *(f"{cells[k].ceiling:.3f}" for k in waits)])
        rows.append(["exact match where no guess is needed", *(f"{cells[k].exact_within:.3f}" for k in waits)])
        rows.append(["AL / LAAL, words", *(f"{cells[k].AL:.2f} / {cells[k].LAAL:.2f}" for k in waits)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def evaluate(args: argparse.Namespace) -> list[Score]:
    checkpoint = load_checkpoint(args.model)
    scores, missed = [], []
    for name, file in SETS.items():
        samples = from_tsv(HERE / file)[: args.limit]
        for k in args.waits:
            cell, written = score(
                checkpoint.model, checkpoint.tokenizer, name, samples, k, args.sessions, args.cross_check
            )
            scores.append(cell)
            wait = "batch" if k is None else f"k={k}"
            print(f"{name} {wait}: {cell.exact:.3f} of {cell.ceiling:.3f}, {cell.seconds:.0f} s", flush=True)
            missed += [
                {
                    "set": name,
                    "k": k,
                    "within_ceiling": all(seen(sample, k)),
                    "right": " ".join(sample.written),
                    "wrote": one.text.rstrip(),
                }
                for one, sample in zip(written, samples, strict=True)
                if k in SHOWN and not one.right
            ]
    print(table(scores))
    if args.json:
        record = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{os.cpu_count()} CPU cores",
            "torch": torch.__version__,
            "streamkernels": streamkernels.__version__,
            "scores": [asdict(cell) for cell in scores],
            "missed": missed,
        }
        args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return scores


def _wait(text: str) -> int | None:
    return None if text == "batch" else int(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder of the model")
    parser.add_argument("--waits", type=_wait, nargs="+", default=WAITS, metavar="K", help="1 2 3 5 8 batch, or others")
    parser.add_argument("--limit", type=int, help="at most this many samples of each set")
    parser.add_argument("--sessions", type=int, default=64, help="sessions that share a forward")
    parser.add_argument("--cross-check", action="store_true", help="also score without decoding (scoring.exact)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser


if __name__ == "__main__":
    evaluate(arguments().parse_args())
