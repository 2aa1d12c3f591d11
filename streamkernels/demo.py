"""`streamkernels demo`: text that arrives word by word through a model, and what that cost, measured as it runs."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import torch

from .demo_check import Recorder
from .demo_view import Columns, Opening, Summary, Trace, View
from .streaming import Action, Counts, Policy, ReadAll, State, Threshold, WaitK, metrics

EXAMPLE = Path("examples", "captions")
POLICIES = "wait-k:K (K >= 1), read-all or threshold:P (0 < P <= 1)"
SMALL = 50_000_000  # parameters: below, more than one thread costs more than it gains in steps of a few tokens


class DemoError(Exception):
    """A user's mistake, in one sentence."""


@dataclass(frozen=True)
class Options:
    """The command line of the demo; None stands for what the checkpoint or the example says."""

    model: Path | None = None
    text: str | None = None
    policy: str | None = None
    trace: bool = False
    rate: float | None = None
    prompt: str | None = None
    header: str | None = None
    source_end: str | None = None
    max_tokens: int = 256
    early_end: bool = False
    device: str = "auto"
    dtype: str = "float32"

    def place(self) -> str:
        """The device, "auto" resolved: the GPU where there is one."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


class HoldOn:
    """A policy that does what another one says, but does not let the text end before the source has.

    Under wait-k a model whose target is shorter than its source is asked for the end of the text while words still
    come, and what it has not heard it cannot caption. So where the text would end here, one more word is read instead.
    This costs a forward for each such word (`Counts.extra_forwards`) and nothing where the text goes on.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        rule = getattr(policy, "visible", None)
        if rule is not None:
            self.visible = rule  # the header's rows see what they see without us

    def __call__(self, state: State) -> Action:
        action = self.policy(state)
        return Action.READ if action is Action.WRITE and not state.source_ended and state.ending else action

    def __repr__(self) -> str:
        return f"{self.policy!r}, holding on until the source has ended"


def policy_of(text: str) -> Policy:
    """The policy that `--policy` names.

    A threshold is on the largest probability of the next word's first token. It never writes more words than were read:
    with nothing left to go on a model may be sure of anything.
    """
    name, _, number = text.partition(":")
    try:
        if name == "wait-k":
            return WaitK(int(number))
        if name == "threshold" and 0 < float(number) <= 1:
            return Threshold(_confidence, float(number))
        if text == "read-all":
            return ReadAll()
    except ValueError:
        pass
    raise DemoError(f"--policy: expected {POLICIES}, got {text!r}")


def _confidence(state: State) -> float:
    return state.logits.softmax(-1).max().item() if state.target_words < state.source_words else 0.0


def example_file(name: str) -> Path | None:
    """A file or folder of the captions example: of the checkout that this package runs from, else under the current
    directory."""
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    return next((place / EXAMPLE / name for place in places if (place / EXAMPLE / name).exists()), None)


class Utterances:
    """The lines of a text that have words, each an iterator that gives a word as soon as the white space after it has
    come. A line is used up before the next one is begun."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Iterator[str]]:
        more = True
        while more:
            words = self._words()
            first = next(words, None)
            if first is not None:
                yield itertools.chain([first], words)
            for _ in words:
                pass
            more = not self._over

    def _words(self) -> Iterator[str]:
        self._over, word = False, ""
        while True:
            # one character at a time: what is piped in word by word is read word by word
            character = self._stream.read(1)
            if character.strip():
                word += character
                continue
            if word:
                yield word
            word = ""
            if character in ("", "\n"):
                self._over = not character
                return


def paced(words: Iterator[str], rate: float | None) -> Iterator[str]:
    """The words, no faster than `rate` a second."""
    begin = time.monotonic()
    for i, word in enumerate(words):
        if rate is not None:
            time.sleep(max(0.0, begin + i / rate - time.monotonic()))
        yield word


class Counted:
    """An iterator that knows how many words it has given."""

    def __init__(self, words: Iterator[str]) -> None:
        self._words, self.count = words, 0

    def __iter__(self) -> Iterator[str]:
        for word in self._words:
            self.count += 1
            yield word


@contextlib.contextmanager
def _opened(text: str | None) -> Iterator[TextIO]:
    if text == "-":
        if sys.stdin.isatty():
            print("one utterance a line, end with ctrl-D", file=sys.stderr)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield sys.stdin
        return
    path = Path(text) if text is not None else example_file("demo.txt")
    if path is None:
        raise DemoError(f"no text: {EXAMPLE / 'demo.txt'} is not here; give --text FILE, or --text - for stdin")
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise DemoError(f"--text {path}: {error.strerror}") from error
    with file:
        yield file


def _load(options: Options) -> tuple[Path, Any]:
    path = options.model or example_file("model")
    if path is None:
        raise DemoError(
            f"no model: run from a checkout of streamkernels, which has {EXAMPLE / 'model'} "
            f"({EXAMPLE / 'train.py'} trains it), or give --model PATH, a folder with a Llama or Qwen2 checkpoint"
        )
    if not path.is_dir():
        raise DemoError(f"--model {path}: no such folder; give a folder with a Llama or Qwen2 checkpoint")
    try:
        from .integrations.transformers.checkpoint import load_checkpoint

        return path, load_checkpoint(path, dtype=getattr(torch, options.dtype), device=options.place())
    except Exception as error:  # transformers, safetensors and torch raise all sorts for what is wrong with a folder
        raise DemoError(f"--model {path}: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def demo(options: Options, out: TextIO) -> None:
    """Stream the text and show it. Raises DemoError for a user's mistake, before anything is shown if it can be."""
    if options.policy is not None:
        policy_of(options.policy)
    if options.rate is not None and not options.rate > 0:
        raise DemoError(f"--rate: expected words per second > 0, got {options.rate}")
    if options.max_tokens < 1:
        raise DemoError(f"--max-tokens: expected at least 1, got {options.max_tokens}")
    with _opened(options.text) as stream:
        path, checkpoint = _load(options)
        named = policy_of(options.policy or checkpoint.policy or "wait-k:5")
        policy = named if options.early_end or isinstance(named, ReadAll) else HoldOn(named)
        from .integrations.transformers import StreamSession
        from .integrations.transformers.patch import handle_of

        texts = {name: getattr(options, name) for name in ("prompt", "header", "source_end")}
        texts = {name: getattr(checkpoint, name) if text is None else text for name, text in texts.items()}
        try:
            # rotate, write and attend in one op: where that is one kernel on a GPU, the step is what it saves
            more = {"fused": "auto", "max_target_tokens": options.max_tokens, **texts}
            session = StreamSession(checkpoint.model, checkpoint.tokenizer, policy, **more)
        except (ValueError, NotImplementedError) as error:
            raise DemoError(f"--model {path}: {_sentence(error)}") from error
        view: View = Trace(out) if options.trace else Columns(out)
        count = sum(p.numel() for p in checkpoint.model.parameters())
        kind = type(checkpoint.model).__name__
        handle = handle_of(checkpoint.model)
        fused = handle is not None and handle.fused
        opening = Opening(str(path), kind, count, options.dtype, options.place(), fused, repr(policy), **texts)
        with session, _threads(count):
            try:
                _stream(session, checkpoint.model, Utterances(stream), options, view, opening)
            except (ValueError, NotImplementedError) as error:
                raise DemoError(_sentence(error)) from error


@contextlib.contextmanager
def _threads(parameters: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream(session: Any, model: Any, lines: Utterances, options: Options, view: View, opening: Opening) -> None:
    session.model = recorder = Recorder(session.model)
    sentences: list[metrics.Sentence] = []
    summaries: list[Summary] = []
    for words in lines:
        if not summaries:
            view.begin(opening)
        session.reset()
        source = Counted(words)
        for event in session.run(paced(iter(source), options.rate)):
            view.event(event)
        # words that came after the text had ended
        for _ in source:
            pass
        trace = session.trace
        sentences.append(metrics.Sentence(trace["delays"], source.count))
        difference = recorder.one_shot_difference(model)
        seconds = trace["elapsed"][-1] if trace["elapsed"] else 0.0
        latency = metrics.latency(sentences[-1])
        written = len(trace["delays"])
        summaries.append(Summary(1, source.count, written, latency, session.counts, seconds, difference))
        view.line(trace, summaries[-1])
    if not summaries:
        raise DemoError(f"--text {options.text or 'demo.txt'}: expected words, got an empty text")
    view.total(_total(sentences, summaries))


def _total(sentences: list[metrics.Sentence], summaries: list[Summary]) -> Summary:
    means = metrics.corpus(sentences)
    counts = Counts(**{f.name: sum(getattr(s.counts, f.name) for s in summaries) for f in fields(Counts)})
    return Summary(
        lines=len(summaries),
        source_words=sum(s.source_words for s in summaries),
        target_words=sum(s.target_words for s in summaries),
        latency={name: means[name] for name in metrics.METRICS},
        counts=counts,
        seconds=sum(s.seconds for s in summaries),
        one_shot_difference=max(s.one_shot_difference for s in summaries),
    )
