"""What `streamkernels demo` shows: two columns for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

from .streaming import Counts, End, Event, Read, Write
from .streaming.trace import event_record

_TIME = 10
_DIM, _BOLD, _GREEN, _CYAN = "2", "1", "32", "36"


@dataclass(frozen=True)
class Opening:
    """What is known before the first word."""

    model: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    fused: bool
    policy: str
    prompt: str
    header: str
    source_end: str


@dataclass(frozen=True)
class Summary:
    """One line of text, or all of them (then without text). Latency in source words, NaN where nothing was written."""

    lines: int
    source_words: int
    target_words: int
    latency: dict[str, float]
    counts: Counts
    seconds: float
    one_shot_difference: float


class View(Protocol):
    """Shows a demo while it runs."""

    def begin(self, opening: Opening) -> None: ...
    def event(self, event: Event) -> None: ...
    def line(self, trace: dict[str, Any], summary: Summary) -> None: ...
    def total(self, summary: Summary) -> None: ...


class Trace:
    """JSON Lines: 'begin', then for each line of text its 'read', 'write' and 'end' events and its 'summary', then
    'total'. `line` counts lines of text from 0; numbers that do not exist are null."""

    def __init__(self, out: TextIO) -> None:
        self.out, self._line = out, 0

    def begin(self, opening: Opening) -> None:
        self._print({"event": "begin"} | asdict(opening))

    def event(self, event: Event) -> None:
        self._print({"line": self._line} | event_record(event))

    def line(self, trace: dict[str, Any], summary: Summary) -> None:
        record = {name: value for name, value in trace.items() if name not in ("events", "counts")}
        self._print({"line": self._line, "event": "summary"} | record | asdict(summary))
        self._line += 1

    def total(self, summary: Summary) -> None:
        self._print({"event": "total"} | asdict(summary))

    def _print(self, record: dict[str, Any]) -> None:
        print(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False), file=self.out, flush=True)


class Columns:
    """Time, what was read, what was written: a new row whenever a word is read after one was written."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.colour = out.isatty()
        width = shutil.get_terminal_size().columns if self.colour else 96
        self.width = max(16, min(48, (width - _TIME - 3) // 2))
        self._used, self._writing, self._open = 0, False, False

    def begin(self, opening: Opening) -> None:
        size = f"{opening.parameters / 1e6:.1f} M parameters"
        attention = "fused" if opening.fused else "not fused"
        what = f"{opening.architecture}, {size}, {opening.dtype} on {opening.device}, {attention}"
        self._line_of(f"{opening.model} ({what})")
        self._line_of(opening.policy)
        self._line_of()
        self._line_of(self._paint(f"{'time':<{_TIME}}{'READ':<{self.width}} | WRITE", _BOLD))

    def event(self, event: Event) -> None:
        if isinstance(event, Read):
            text = event.text or "(end)"
            if not self._open or self._writing or self._used + len(text) >= self.width:
                self._row(event.time)
            self._cell(f"{text} ", _CYAN if event.text else _DIM)
        elif isinstance(event, Write):
            if not self._open or (self._writing and self._used + len(event.text.rstrip()) > self.width):
                self._row(event.time)
            if not self._writing:
                self._write(" " * (self.width - self._used) + " | ")
                self._writing, self._used = True, 0
            # the space that begins a word, or ends it, stays: words come glued together otherwise
            self._cell(event.text.replace("\n", " "), _GREEN)
        elif isinstance(event, End) and event.reason == "length":
            self._cell("[cut: --max-tokens]", _DIM)

    def line(self, trace: dict[str, Any], summary: Summary) -> None:
        self._close()
        self._line_of(self._paint(" ".join(trace["text"].split()) or "(nothing written)", _BOLD))
        counts = summary.counts
        facts = (
            f"{_latency(summary)}; source tokens projected {counts.source_tokens_projected:,} "
            f"(re-encoding: {counts.re_encoded_source_tokens:,}); "
            f"one-shot difference {summary.one_shot_difference:.1e}"
        )
        self._line_of(self._paint(facts, _DIM))
        self._line_of()

    def total(self, summary: Summary) -> None:
        counts = summary.counts
        times = counts.re_encoded_source_tokens / max(counts.source_tokens_projected, 1)
        kinds = ("read", "write", "merged")
        forwards = ", ".join(f"{kind} {getattr(counts, f'{kind}_forwards'):,}" for kind in kinds)
        rows = [
            ("lines", f"{summary.lines}: {summary.source_words} words read, {summary.target_words} written"),
            ("latency", f"{_latency(summary)} (mean of the lines)"),
            ("forwards", f"{counts.forwards:,}: {forwards}; of these extra {counts.extra_forwards:,}"),
            (
                "source tokens",
                f"{counts.source_tokens_projected:,} projected, each once; re-encoding would have projected "
                f"{counts.re_encoded_source_tokens:,} ({times:.1f} times as many)",
            ),
            (
                "target tokens",
                f"{counts.target_tokens_projected:,} projected; re-encoding: {counts.re_encoded_target_tokens:,}",
            ),
            ("one-shot", f"{summary.one_shot_difference:.1e}, the largest difference between the session's logits and"),
            ("", "those of one forward over the whole text under the same spans"),
            ("computing", f"{summary.seconds:.1f} s"),
        ]
        for name, text in rows:
            self._line_of(f"{self._paint(f'{name:<15}', _BOLD)}{text}")

    def _row(self, time: float) -> None:
        self._close()
        self._write(self._paint(f"{f'{time:.2f} s':<{_TIME}}", _DIM))
        self._used, self._writing, self._open = 0, False, True

    def _cell(self, text: str, colour: str) -> None:
        self._write(self._paint(text, colour))
        self._used += len(text)

    def _close(self) -> None:
        if self._open:
            self._line_of()
        self._open = False

    def _paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self.colour else text

    def _write(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)

    def _line_of(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)


def _latency(summary: Summary) -> str:
    if math.isnan(summary.latency["AL"]):
        return "no latency: nothing was written"
    return f"AL {summary.latency['AL']:.2f}, LAAL {summary.latency['LAAL']:.2f} words"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
