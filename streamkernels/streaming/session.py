"""One streaming session: read source words as they come, write until a word ends, read on.

The loop knows words, tokens and limits; attention, positions and the cache are the model's (`StreamModel`), text is
the codec's. Source segments are [prompt, word 1, ..., end marker], target segments [header, word 1, ..., end], and
target rows get the limits of `core.spans.limits_from_visible`: the row that predicts the first token of target
segment s is the last row of segment s - 1 and sees what has been read when s is begun; the rows before it see what
segment s - 1 has read. Under `WaitK` they are those of `core.spans.wait_k_limits`: a session computes what training
saw.

What it costs, and what it never does:
- A source token is projected once. Source rows never depend on target rows, so a READ and the WRITE after it are one
  forward over [source chunk ; last target token]. A chunk that still waits when the next word is read goes in a
  forward of its own.
- A boundary that shows in a word's last token (`Codec.closes`) costs nothing: the token is fed once, with what was
  read after it.
- Where only the next token shows it (`Codec.opens`, or the end of the text), the last token has been fed with the old
  limit. If more is read now, its row is popped and fed again: one extra forward per word. If not, the prediction
  stands and nothing is paid.
- A boundary is asked for once, and punctuation is none: no second read, no prediction dropped after the source has
  ended.
The loop released with GPE (github.com/EIT-NLP/StreamingLLM, generation/generate.py) pays a forward per read and a
dropped prediction per word, and reads twice at punctuation.

A boundary that was acted on stands: if the row that was fed again now predicts the rest of the word, that rest is a
segment of its own, glued to the text before it (`Session.delays` counts both as one word).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ..core.shapes import check_int, refuse
from .loop import END, Loop, SessionMark
from .policies import Policy
from .protocols import Codec, Decoder, StreamModel
from .state import Settings, Stream, token_ids
from .trace import Counts, Event, event_record, re_encoding_cost

__all__ = ["Codec", "Session", "StreamModel"]


class Session:
    """Streams one text through a model, reading and writing as a policy says.

    model: a `StreamModel`; it is reset, and nobody else steps it meanwhile. policy: see `streaming.policies`. header:
    the target tokens before the text, at least one: its last row predicts the first token. prompt, source_end: source
    tokens before the first and after the last word. sample: logits [vocab] -> token, default greedy. decoder: chooses
    tokens instead, stops the text and hears of every token (`Decoder`).
    max_target_tokens: the text is cut there. max_word_tokens: a word is closed there, so that a model that writes no
    boundary reads on. clock: seconds.

    Live: `read(word)` and `end()` hand the source over, `write()` writes as far as the policy goes; each returns the
    events since the last call. Or `run(words)`. A word is read when the policy wants it; one that comes earlier waits
    in line. After an exception (NaN logits, a failing model, policy or sampler) nothing is half done: the step is
    discarded, and the next call tries it again.
    """

    def __init__(
        self,
        model: StreamModel,
        codec: Codec,
        policy: Policy,
        *,
        header: Sequence[int],
        prompt: Sequence[int] = (),
        source_end: Sequence[int] = (),
        sample: Callable[[torch.Tensor], int] | None = None,
        decoder: Decoder | None = None,
        max_target_tokens: int = 1024,
        max_word_tokens: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not callable(policy):
            refuse("Session", "policy", "a callable from State to Action", policy, TypeError)
        self._settings = Settings(
            header=token_ids("Session", "header", header),
            prompt=token_ids("Session", "prompt", prompt),
            source_end=token_ids("Session", "source_end", source_end),
            sample=sample,
            decoder=decoder,
            max_target_tokens=check_int("Session", "max_target_tokens", max_target_tokens, minimum=1),
            max_word_tokens=check_int("Session", "max_word_tokens", max_word_tokens, minimum=1),
            clock=clock,
        )
        if sample is not None and decoder is not None:
            refuse("Session", "sample", "None beside a decoder, which chooses the tokens", sample)
        if not self._settings.header:
            refuse("Session", "header", "at least one token, whose row predicts the first word", "none")
        self.model, self.codec, self.policy = model, codec, policy
        self.reset()

    def reset(self) -> None:
        """Forget everything, the model's state included, and begin anew."""
        self.model.reset()
        self._loop = Loop(self.model, self.codec, self.policy, self._settings)

    def read(self, word: str, *, flush: bool = False) -> list[Event]:
        """Hand over one source word (any text that is not blank). It is read at once if the policy waits for it.

        flush: project what has been read now, not with the next write (should that forward fail, the word has been
        read all the same). Raises ValueError for a blank word, after `end()` and after the text has ended; TypeError
        for anything but a string.
        """
        self._loop.drive(self._loop.hand_over(word, flush))
        return list(self._deliver())

    def end(self, *, flush: bool = False) -> list[Event]:
        """Say that no word follows. Raises ValueError when said twice, and after the text has ended."""
        self._loop.drive(self._loop.hand_over(END, flush))
        return list(self._deliver())

    def write(self) -> list[Event]:
        """Write until the policy wants a word that has not come, or the text ends.

        Raises ValueError before the first `read()` or `end()`, and for logits that are not finite.
        """
        if not self._stream.handed:
            refuse("Session.write", "source", "a word, or end(), before anything is written", "none")
        while self._loop.drive(self._loop.advance()):
            pass
        return list(self._deliver())

    def run(self, words: Iterable[str], *, flush: bool = False) -> Iterator[Event]:
        """Stream the words, each taken from the iterable when the policy wants it; its end is the end of the source.

        Events come as they happen. Words that are left when the text ends are not taken. `flush` as in `read`.
        """
        source = iter(words)
        while not self._stream.done:
            while self._loop.drive(self._loop.advance()):
                yield from self._deliver()
            if not self._stream.done:
                self._loop.drive(self._loop.hand_over(next(source, END), flush))
            yield from self._deliver()

    def cancel(self) -> list[Event]:
        """End the text here: what was handed over and not read is dropped, the cache stays as it is until `reset()`."""
        self._loop.cancel()
        return list(self._deliver())

    def mark(self) -> SessionMark:
        """A point to `rollback` to: O(tokens) on the host, nothing on the device."""
        return self._loop.mark()

    def rollback(self, mark: SessionMark) -> None:
        """Forget everything since the mark, which stays usable; the source words handed over since are to come again.

        The last target token that was fed then is fed again. Counts go on. Raises ValueError for a mark of another
        text, or one made after a mark that was rolled back to.
        """
        self._loop.rollback(mark)

    @property
    def text(self) -> str:
        """The text written so far, its open word included."""
        return self.codec.decode(self._stream.tokens)

    @property
    def tokens(self) -> list[int]:
        """The target tokens so far, without header and end token."""
        return list(self._stream.tokens)

    @property
    def ended(self) -> bool:
        """Whether the text has ended."""
        return self._stream.done

    @property
    def source_lengths(self) -> list[int]:
        """Tokens of each source segment read: prompt, words, end marker."""
        return list(self._stream.source_lengths)

    @property
    def target_lengths(self) -> list[int]:
        """Tokens of each target segment: header, words, and 1 for the end token once it was predicted."""
        open_word = [len(self._stream.word)] if self._stream.word else []
        return self._stream.target_lengths + open_word

    @property
    def visible(self) -> list[int]:
        """How many source segments each target segment sees, header first."""
        return list(self._stream.visible)

    @property
    def limits(self) -> list[int]:
        """How many source tokens each target row in the cache sees.

        Once the text has ended: `limits_from_visible(source_lengths, target_lengths, visible.__getitem__)` but the last
        one, since the row of the last token (the end token, or where the text was cut) is never fed.
        """
        return list(self._stream.limits)

    @property
    def delays(self) -> list[int]:
        """For each word of the text, split at spaces: source words read when it was finished."""
        return [read for read, _ in self._stream.written]

    @property
    def elapsed(self) -> list[float]:
        """For each word of the text: seconds spent inside the session until it was finished, without waiting for words.

        `metrics.elapsed` makes computation-aware delays of them.
        """
        return [spent for _, spent in self._stream.written]

    @property
    def counts(self) -> Counts:
        """Forwards and tokens so far, beside what re-encoding would have projected (a copy)."""
        source, target = re_encoding_cost(self._stream.limits, len(self._settings.header))
        return replace(self._stream.counts, re_encoded_source_tokens=source, re_encoded_target_tokens=target)

    @property
    def trace(self) -> dict[str, Any]:
        """All of it as JSON-able data: events, text, delays, elapsed, counts, segment lengths, visible and limits."""
        names = ("text", "ended", "delays", "elapsed", "source_lengths", "target_lengths", "visible", "limits")
        record = {"policy": repr(self.policy), "events": [event_record(event) for event in self._stream.events]}
        return record | {name: getattr(self, name) for name in names} | {"counts": asdict(self.counts)}

    def _deliver(self) -> Iterator[Event]:
        s = self._stream
        while s.delivered < len(s.events):
            s.delivered += 1
            yield s.events[s.delivered - 1]

    @property
    def _stream(self) -> Stream:
        return self._loop.stream
