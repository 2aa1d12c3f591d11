"""The state machine of one session: what is read, fed, kept and taken back. `session.py` says what it promises."""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..core.shapes import check_int, refuse
from ..core.spans import limits_from_visible
from .policies import Action, Policy, State
from .protocols import Codec, StreamModel
from .trace import Counts, End, Event, Read, Write

END = object()  # handed over in place of a word: no word follows


@dataclass(frozen=True)
class Settings:
    """What a session is told once; see `Session`."""

    header: list[int]
    prompt: list[int]
    source_end: list[int]
    sample: Callable[[torch.Tensor], int] | None
    max_target_tokens: int
    max_word_tokens: int
    clock: Callable[[], float]


@dataclass
class Held:
    """What the last row that was fed predicts, and how much source it saw."""

    limit: int
    logits: torch.Tensor  # [vocab]
    best: int
    token: int | None = None  # sampled from logits, at most once


@dataclass
class Stream:
    """All that one session knows, apart from its model and settings."""

    source_lengths: list[int]  # of the segments read
    pending: list[int]  # source tokens read, not yet projected
    unfed: list[int]  # target tokens whose rows come next: the header, then one token at a time
    read_tokens: int
    waiting: bool = False  # whether pending holds more than the prompt
    inbox: deque[tuple[str, list[int]]] = field(default_factory=deque)  # handed over, not read; '' is the end marker
    handed: int = 0
    closed: bool = False  # end() was called
    words_read: int = 0
    source_ended: bool = False  # and the end marker read
    tokens: list[int] = field(default_factory=list)
    word: list[int] = field(default_factory=list)  # the open word
    before: list[int] = field(default_factory=list)  # the word before it
    target_lengths: list[int] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)  # source segments that each target segment sees
    limits: list[int] = field(default_factory=list)  # one per target row in the cache
    boundary: bool = True  # the next prediction begins a word: the policy is to be asked
    decision: Action | None = None
    held: Held | None = None
    in_word: bool = False  # the text so far ends inside a word
    written: list[tuple[int, float]] = field(default_factory=list)  # per word of the text: words read, seconds spent
    done: bool = False
    counts: Counts = field(default_factory=Counts)
    events: list[Event] = field(default_factory=list)
    delivered: int = 0
    started: float = 0.0
    spent: float = 0.0
    entered: float = 0.0


class Loop:
    """Moves one `Stream` on, one read or one token at a time. The model is told of nothing but steps."""

    def __init__(self, model: StreamModel, codec: Codec, policy: Policy, settings: Settings) -> None:
        self.model, self.codec, self.policy, self.settings = model, codec, policy, settings
        prompt, header = list(settings.prompt), list(settings.header)
        self.stream = Stream([len(prompt)], prompt, header, len(prompt), target_lengths=[len(header)])

    def hand_over(self, word: object, flush: bool) -> None:
        """A word, or END, has come: read it at once if the policy waits for it."""
        s = self.stream
        op, got = ("Session.end", "end()") if word is END else ("Session.read", repr(word))
        if s.done:
            refuse(op, "source", "nothing more: the text has ended, call reset()", got)
        if s.closed:
            refuse(op, "source", "nothing more after end()", got)
        with self._working():
            segment = ("", self.settings.source_end) if word is END else self._encode(word)
            if not s.handed:
                s.started = s.entered
            s.inbox.append(segment)
            s.handed += 1
            s.closed = word is END
            try:
                while s.inbox and s.boundary and self._wants_to_read():
                    self._take()
            except BaseException:
                # it is last in line, so what failed came before it was read: withdrawn
                if s.inbox:
                    s.inbox.pop()
                    s.handed -= 1
                    s.closed = False
                raise
            if flush:
                self._flush()

    def _encode(self, word: object) -> tuple[str, list[int]]:
        if not isinstance(word, str):
            refuse("Session.read", "word", "a string", word, TypeError)
        if not word.strip():
            refuse("Session.read", "word", "a word that is not blank", repr(word))
        tokens = token_ids("Session.read", "codec.encode(word)", self.codec.encode(word, self.stream.handed == 0))
        if not tokens:
            refuse("Session.read", "word", "a word with at least one token", repr(word))
        return word, tokens

    def _take(self) -> None:
        """Read the next segment in line; its tokens wait for the next write, or for the next read."""
        s = self.stream
        word, tokens = s.inbox[0]
        if s.waiting and tokens:
            self._flush()
        s.inbox.popleft()
        s.source_lengths.append(len(tokens))
        s.read_tokens += len(tokens)
        s.pending = s.pending + tokens
        s.waiting = s.waiting or bool(tokens)
        s.decision = None
        s.events.append(Read(s.words_read, word, self._time()))
        # words are never blank: this is the end marker
        s.source_ended = word == ""
        s.words_read += not s.source_ended

    def _wants_to_read(self) -> bool:
        """At a boundary: whether to read. The policy is asked once per state, and only when there is a choice."""
        s = self.stream
        if s.source_ended:
            return False
        if len(s.source_lengths) == 1:
            return True
        if s.decision is None:
            s.decision = self._ask()
        return s.decision is Action.READ

    def _ask(self) -> Action:
        s, asking = self.stream, True

        def prediction() -> Held:
            if not asking:
                refuse("State", "logits, ending", "use while the policy decides", "use after it")
            return self._prediction()

        state = State(
            source_words=s.words_read,
            source_segments=len(s.source_lengths),
            source_ended=s.source_ended,
            target_words=len(s.target_lengths) - 1,
            _tokens=lambda: tuple(s.tokens),
            _text=lambda: self.codec.decode(s.tokens),
            _logits=lambda: prediction().logits,
            _ending=lambda: self._sample(prediction()) in self.codec.end,
        )
        try:
            action = self.policy(state)
        finally:
            asking = False
        if not isinstance(action, Action):
            refuse("Session", "policy(state)", "Action.READ or Action.WRITE", repr(action), TypeError)
        return action

    def advance(self) -> bool:
        """One piece of work: a read, or a token. False when a word is wanted that has not come, and at the end."""
        s = self.stream
        if s.done:
            return False
        with self._working():
            if not (s.boundary and self._wants_to_read()):
                self._write_token()
                return True
            if s.inbox:
                self._take()
                return True
            return False

    def _write_token(self) -> None:
        s = self.stream
        token = self._sample(self._prediction())
        ends = token in self.codec.end
        if s.boundary:
            s.boundary, s.decision = False, None
            s.visible.append(len(s.source_lengths))
            if ends:
                s.target_lengths.append(1)
                self._finish("end")
            else:
                self._accept(token)
        elif ends or (self.codec.opens(token) and self._word_has_text()):
            self._close_word()
        else:
            self._accept(token)

    def _prediction(self) -> Held:
        """What the last target token predicts, given all that was read; its row is fed, or fed again, if need be."""
        s = self.stream
        if s.held is not None and s.held.limit != s.read_tokens:
            self.model.pop(1)
            s.limits.pop()
            s.counts.extra_forwards += 1
            s.unfed, s.held = (s.tokens or self.settings.header)[-1:], None
        if s.held is None:
            visible = s.visible or [self._header_sees()]
            limits = [s.read_tokens] * len(s.unfed)
            if not s.visible:
                read = len(s.source_lengths)
                limits = limits_from_visible(s.source_lengths, [len(limits), 1], [*visible, read].__getitem__)[:-1]
            with self._step(s.unfed, limits) as logits:
                best = _best(logits, len(s.unfed))
            s.visible, s.held = visible, Held(s.read_tokens, logits[-1], best)
        return s.held

    def _header_sees(self) -> int:
        """Source segments that the header's rows see, all but the last row."""
        s, rule = self.stream, getattr(self.policy, "visible", None)
        read = len(s.source_lengths)
        return read if rule is None else min(rule(0, read if s.source_ended else sys.maxsize), read)

    @contextlib.contextmanager
    def _step(self, target: list[int], limits: list[int]) -> Iterator[torch.Tensor]:
        """One forward over what is pending and these target rows; not kept if it, or the block it yields to, raises."""
        s = self.stream
        try:
            yield self.model.step(s.pending, target, limits)
        except BaseException:
            self.model.discard()
            raise
        self.model.commit()
        s.counts.add(len(s.pending), len(target))
        s.limits += limits
        s.pending, s.waiting = [], False

    def _flush(self) -> None:
        if self.stream.pending:
            with self._step([], []):
                pass

    def _sample(self, held: Held) -> int:
        sample, vocab = self.settings.sample, held.logits.shape[0]
        if sample is None:
            return held.best
        if held.token is None:
            token = sample(held.logits)
            if not hasattr(token, "__index__"):
                refuse("Session", "sample(logits)", f"a token, an int below {vocab}", token, TypeError)
            held.token = check_int("Session", "sample(logits)", operator.index(token), maximum=vocab - 1)
        return held.token

    def _accept(self, token: int) -> None:
        """The text goes on with this token, which is fed next."""
        s = self.stream
        s.tokens.append(token)
        s.word.append(token)
        s.unfed, s.held = [token], None
        if len(s.tokens) == self.settings.max_target_tokens:
            self._close_word()
            self._finish("length")
        elif len(s.word) == self.settings.max_word_tokens or (self.codec.closes(token) and self._word_has_text()):
            self._close_word()

    def _word_has_text(self) -> bool:
        # a run of spaces is no word: the policy is not asked for it
        return bool(self.codec.decode(self.stream.word).strip())

    def _close_word(self) -> None:
        s = self.stream
        # decoded behind the word before it, since some tokenizers strip the space that begins a text
        before = self.codec.decode(s.before)
        text = self.codec.decode(s.before + s.word)
        text = text[len(before) :] if text.startswith(before) else self.codec.decode(s.word)
        words = len(text.split())
        if words:
            glued = s.in_word and not text[0].isspace()
            now = (s.words_read, s.spent + self.settings.clock() - s.entered)
            s.written[len(s.written) - glued :] = [now] * words
        if text:
            s.in_word = not text[-1].isspace()
        s.target_lengths.append(len(s.word))
        s.events.append(Write(text, tuple(s.word), s.words_read, self._time()))
        s.before, s.word, s.boundary, s.decision = s.word, [], True, None

    def _finish(self, reason: str) -> None:
        self.stream.done = True
        self.stream.events.append(End(reason, self._time()))

    def _time(self) -> float:
        return self.settings.clock() - self.stream.started

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        s = self.stream
        s.entered = self.settings.clock()
        try:
            yield
        finally:
            s.spent += self.settings.clock() - s.entered


def _best(logits: torch.Tensor, rows: int) -> int:
    """The likeliest token of the last row, once the logits are seen to be logits."""
    fits = isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.dim() == 2 and len(logits) == rows
    if not fits:
        refuse("Session", "model.step(...)", f"float logits [{rows}, vocab]", logits)
    # one transfer; max finds a NaN wherever it stands
    largest, best = torch.stack([x.float() for x in logits[-1].detach().max(-1)]).tolist()
    if not math.isfinite(largest):
        refuse("Session", "model.step(...)", "finite logits", f"{largest}: the step was discarded")
    return int(best)


def token_ids(op: str, name: str, tokens: Sequence[int]) -> list[int]:
    """Token ids as a list of Python ints >= 0, checked."""
    ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    return [check_int(op, f"{name}[{i}]", token) for i, token in enumerate(ids)]
