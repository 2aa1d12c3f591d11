"""The state machine of one session: what is read, fed, kept and taken back. `session.py` says what it promises."""

from __future__ import annotations

import contextlib
import copy
import operator
import sys
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

from ..core.shapes import check_int, refuse
from ..core.spans import limits_from_visible
from .policies import Action, Policy, State
from .protocols import Codec, Step, StreamModel
from .replies import Answered, Reply, read_replies
from .state import Held, Settings, Stream, token_ids
from .trace import End, Read, Write

END = object()  # handed over in place of a word: no word follows
T = TypeVar("T")
# work of a loop: it asks for steps, is sent replies, and ends with a result; whoever drives it may share forwards
Work = Generator[Step, Reply, T]


@dataclass(eq=False)
class SessionMark:
    """A point of a session to roll back to, made by `Session.mark`; its fields are the session's business."""

    loop: Loop
    serial: int
    stream: Stream
    fed: bool


class Loop:
    """Moves one `Stream` on, one read or one token at a time. The model is told of nothing but steps.

    Methods that may need a forward are generators (`Work`); `drive` runs one with forwards of its own.
    """

    def __init__(self, model: StreamModel, codec: Codec, policy: Policy, settings: Settings) -> None:
        self.model, self.codec, self.policy, self.settings = model, codec, policy, settings
        prompt, header = list(settings.prompt), list(settings.header)
        self.stream = Stream([len(prompt)], prompt, header, len(prompt), target_lengths=[len(header)])
        self._marks: weakref.WeakSet[SessionMark] = weakref.WeakSet()
        self._serial = 0
        if settings.decoder is not None:
            settings.decoder.begin(header)

    def drive(self, work: Work[T]) -> T:
        """Do the work with this model alone."""
        try:
            step = next(work)
            while True:
                try:
                    logits = self.model.step(step.source, step.target, step.limits)
                    (reply,) = read_replies([self.answered(step, logits)])
                    if isinstance(reply, Exception):
                        raise reply
                except BaseException as error:
                    step = work.throw(error)
                else:
                    step = work.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result

    def answered(self, step: Step, logits: torch.Tensor) -> Answered:
        """A step's logits, with what `read_replies` must know of this session."""
        return self.settings.decoder, self.stream.tokens, step, logits

    def hand_over(self, word: object, flush: bool) -> Work[None]:
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
                while s.inbox and s.boundary and (yield from self._wants_to_read()):
                    yield from self._take()
            except BaseException:
                # it is last in line, so what failed came before it was read: withdrawn
                if s.inbox:
                    s.inbox.pop()
                    s.handed -= 1
                    s.closed = False
                raise
            if flush:
                yield from self._flush()

    def _encode(self, word: object) -> tuple[str, list[int]]:
        if not isinstance(word, str):
            refuse("Session.read", "word", "a string", word, TypeError)
        if not word.strip():
            refuse("Session.read", "word", "a word that is not blank", repr(word))
        tokens = token_ids("Session.read", "codec.encode(word)", self.codec.encode(word, self.stream.handed == 0))
        if not tokens:
            refuse("Session.read", "word", "a word with at least one token", repr(word))
        return word, tokens

    def _take(self) -> Work[None]:
        """Read the next segment in line; its tokens wait for the next write, or for the next read."""
        s = self.stream
        word, tokens = s.inbox[0]
        if s.waiting and tokens:
            yield from self._flush()
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

    def _wants_to_read(self) -> Work[bool]:
        """At a boundary: whether to read. The policy is asked once per state, and only when there is a choice."""
        s = self.stream
        if s.source_ended:
            return False
        if len(s.source_lengths) == 1:
            return True
        if s.decision is None:
            if getattr(self.policy, "predicts", False):
                yield from self._prediction()
            s.decision = self._ask()
        return s.decision is Action.READ

    def _ask(self) -> Action:
        s, asking = self.stream, True

        def prediction() -> Held:
            if not asking:
                refuse("State", "logits, ending", "use while the policy decides", "use after it")
            return self.drive(self._prediction())

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

    def advance(self) -> Work[bool]:
        """One piece of work: a read, or a token. False when a word is wanted that has not come, and at the end."""
        s = self.stream
        if s.done:
            return False
        with self._working():
            if not (s.boundary and (yield from self._wants_to_read())):
                yield from self._write_token()
                return True
            if s.inbox:
                yield from self._take()
                return True
            return False

    def _write_token(self) -> Work[None]:
        s = self.stream
        token = self._sample((yield from self._prediction()))
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

    def _prediction(self) -> Work[Held]:
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
            reply = yield from self._step(s.unfed, limits)
            if reply.logits is None:
                refuse("Session", "model.step(...)", "logits for target rows", None)
            s.visible, s.held = visible, Held(s.read_tokens, reply.logits, reply.token)
        return s.held

    def _header_sees(self) -> int:
        """Source segments that the header's rows see, all but the last row."""
        s, rule = self.stream, getattr(self.policy, "visible", None)
        read = len(s.source_lengths)
        return read if rule is None else min(rule(0, read if s.source_ended else sys.maxsize), read)

    def _step(self, target: list[int], limits: list[int]) -> Work[Reply]:
        """One forward over what is pending and these target rows; not kept if anything is wrong with it."""
        s = self.stream
        try:
            reply = yield Step(s.pending, target, limits)
        except BaseException:
            self.model.discard()
            raise
        self.model.commit()
        s.counts.add(len(s.pending), len(target))
        s.limits += limits
        s.pending, s.waiting = [], False
        return reply

    def _flush(self) -> Work[None]:
        if self.stream.pending:
            yield from self._step([], [])

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
        decoder, held = self.settings.decoder, s.held
        s.unfed, s.held = [token], None
        if decoder is not None:
            decoder.put(token)
        if len(s.tokens) == self.settings.max_target_tokens:
            self._close_word()
            self._finish("length")
        elif decoder is not None and held is not None and decoder.stops(s.tokens, held.logits):
            self._close_word()
            self._finish("stop")
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
        if self.settings.decoder is not None:
            self.settings.decoder.end()

    def cancel(self) -> None:
        """End the text here, whatever it was about to do."""
        if not self.stream.done:
            if self.stream.word:
                self._close_word()
            self._finish("cancelled")

    def mark(self) -> SessionMark:
        """All that `stream` is now, but for what its last row predicts."""
        s = self.stream
        kept = Stream(**{f.name: copy.copy(getattr(s, f.name)) for f in fields(s)})
        kept.held = None
        self._serial += 1
        made = SessionMark(self, self._serial, kept, s.held is not None)
        self._marks.add(made)
        return made

    def rollback(self, mark: SessionMark) -> None:
        """Be what the mark remembers. The row that was fed last then is fed again, since it may have been fed since
        with more source in sight; counts go on counting."""
        if mark not in self._marks:
            refuse("Session.rollback", "mark", "a mark of this text, not after one that was rolled back to", mark)
        truncate = getattr(self.model, "truncate", None)
        if truncate is None:
            refuse("Session.rollback", "model", "a model with truncate(source, target)", type(self.model).__name__)
        kept, now = mark.stream, self.stream
        s = Stream(**{f.name: copy.copy(getattr(kept, f.name)) for f in fields(kept)})
        again = mark.fed and not kept.done
        if again:
            s.limits.pop()
            s.unfed = (s.tokens or self.settings.header)[-1:]
        truncate(s.read_tokens - len(s.pending), len(s.limits))
        s.counts, s.spent = now.counts, now.spent
        s.counts.extra_forwards += again
        self.stream = s
        self._marks = weakref.WeakSet(m for m in self._marks if m.serial <= mark.serial)

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
