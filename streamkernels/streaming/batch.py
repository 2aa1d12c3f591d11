"""Many sessions over one model: each with its own policy, at its own point, all in one forward at a time.

Every session is a `Session` of its own. Whatever each of them wants next, a source chunk, a target token or both, goes
into one forward (`BatchModel.step`), and one transfer brings all their tokens to the host. A session that fails keeps
its own state and stops nobody: what the others wanted is done first, then `RowErrors` tells of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..core.shapes import check_int, refuse
from .loop import END, Loop, Work
from .policies import Policy
from .protocols import BatchModel, Codec, Decoder, Step
from .replies import Reply, read_replies
from .session import Session
from .trace import Event


class RowErrors(RuntimeError):
    """What went wrong in some sessions of a batch; the others went on. `errors`: session number -> its exception.

    Such a session is as it was before the step that failed and tries again with the next call, unless it is cancelled
    or reset. Events that were made meanwhile come with the next call.
    """

    def __init__(self, errors: Mapping[int, Exception]) -> None:
        self.errors = dict(errors)
        super().__init__("; ".join(f"session {row}: {error}" for row, error in sorted(self.errors.items())))


class Row:
    """One session's part of a BatchModel, as a `StreamModel`: what `Session` needs when it works alone."""

    def __init__(self, model: BatchModel, row: int) -> None:
        self.model, self.row = model, row
        # whether the last forward wrote rows that nobody has kept or dropped yet
        self.fed = False

    def step(self, source: Sequence[int], target: Sequence[int], limits: Sequence[int]) -> torch.Tensor:
        """A forward for this session alone."""
        answer = self.model.step({self.row: Step(source, target, limits)})[self.row]
        if isinstance(answer, Exception):
            raise answer
        self.fed = True
        return answer

    def commit(self) -> None:
        """Keep what the last forward wrote."""
        self.fed = False

    def discard(self) -> None:
        """Take it back, if there was one."""
        if self.fed:
            self.model.drop(self.row)
        self.fed = False

    def pop(self, n: int) -> None:
        """Forget the last n target rows."""
        self.model.pop(self.row, n)

    def truncate(self, source: int, target: int) -> None:
        """Keep the first rows."""
        self.model.truncate(self.row, source, target)

    def reset(self) -> None:
        """Forget everything."""
        self.fed = False
        self.model.reset(self.row)


class Sessions:
    """A batch of sessions over one `BatchModel`: `batch[row]` is a `Session`, the methods here move many at once.

    model: `rows` sessions. codec, header, ...: as for `Session`, shared by all. policy: one for all (it must then hold
    no state of its own), or one per session. sample, decoder: a function of the session's number that makes one, or
    None.
    """

    def __init__(
        self,
        model: BatchModel,
        codec: Codec,
        policy: Policy | Sequence[Policy],
        *,
        sample: Callable[[int], Callable[[torch.Tensor], int]] | None = None,
        decoder: Callable[[int], Decoder] | None = None,
        **options: Any,
    ) -> None:
        policies = list(policy) if isinstance(policy, Sequence) else [policy] * model.rows
        if len(policies) != model.rows:
            refuse("SessionBatch", "policy", f"one policy, or {model.rows}, one per session", f"{len(policies)}")
        self._rows = [Row(model, row) for row in range(model.rows)]
        self._model = model
        self._sessions = [
            Session(
                row,
                codec,
                policies[row.row],
                sample=None if sample is None else sample(row.row),
                decoder=None if decoder is None else decoder(row.row),
                **options,
            )
            for row in self._rows
        ]

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, row: int) -> Session:
        return self._sessions[check_int("SessionBatch", "row", row, maximum=len(self) - 1)]

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    def read(self, words: Mapping[int, str], *, flush: bool = False) -> dict[int, list[Event]]:
        """Hand a word to each of these sessions (`Session.read`); forwards that this needs are shared."""
        self._work({row: self[row]._loop.hand_over(word, flush) for row, word in words.items()})
        return self._events()

    def end(self, rows: Iterable[int], *, flush: bool = False) -> dict[int, list[Event]]:
        """Say that no word follows for these sessions."""
        self._work({row: self[row]._loop.hand_over(END, flush) for row in rows})
        return self._events()

    def write(self, rows: Iterable[int] | None = None) -> dict[int, list[Event]]:
        """Let sessions (default: all that were handed anything) write until each wants a word or has ended.

        Returns the events by session, those of the others included. Raises RowErrors after all is done.
        """
        if rows is None:
            rows = [row for row, session in enumerate(self) if session._stream.handed and not session.ended]
        works = {}
        for row in rows:
            if not self[row]._stream.handed:
                refuse("SessionBatch.write", f"session {row}", "a word, or end(), before anything is written", "none")
            works[row] = _writing(self[row]._loop)
        self._work(works)
        return self._events()

    def run(self, sources: Sequence[Iterable[str]], *, flush: bool = False) -> Iterator[tuple[int, Event]]:
        """Stream each session's words, every one taken when its policy wants it; (session, event) as they happen.

        A session that fails is left where it is; RowErrors tells of it once the others have ended. Between two events a
        session may be cancelled; one that is reset or rolled back there is no longer part of the run.
        """
        if len(sources) != len(self):
            refuse("SessionBatch.run", "sources", f"{len(self)} iterables of words, one per session", f"{len(sources)}")
        works = {
            row: _streaming(self[row]._loop, iter(words), flush)
            for row, words in enumerate(sources)
            if not self[row].ended
        }
        for _ in self._rounds(works):
            for row, events in self._events().items():
                yield from ((row, event) for event in events)

    def cancel(self, row: int) -> None:
        """End a session's text here and free its part of the cache; the others do not notice."""
        self[row]._loop.cancel()
        self._model.reset(row)

    def reset(self, row: int, *, policy: Policy | None = None) -> None:
        """Begin anew in one session, with another policy if one is given."""
        session = self[row]
        if policy is not None:
            session.policy = policy
        session.reset()

    def _events(self) -> dict[int, list[Event]]:
        found = {row: list(session._deliver()) for row, session in enumerate(self)}
        return {row: events for row, events in found.items() if events}

    def _work(self, works: Mapping[int, Work[Any]]) -> None:
        for _ in self._rounds(works):
            pass

    def _rounds(self, works: Mapping[int, Work[Any]]) -> Iterator[None]:
        """Move all the works on, a forward for all at a time; yields after each, raises RowErrors at the end."""
        errors: dict[int, Exception] = {}
        answers: dict[int, Reply | Exception | None] = dict.fromkeys(works)
        try:
            while answers:
                steps: dict[int, Step] = {}
                for row, answer in answers.items():
                    try:
                        if isinstance(answer, Exception):
                            steps[row] = works[row].throw(answer)
                        else:
                            # the first answer starts the work and must be None
                            steps[row] = works[row].send(answer)  # type: ignore[arg-type]
                    except StopIteration:
                        pass
                    except Exception as error:
                        errors[row] = error
                asked = {row: self[row]._stream for row in steps}
                yield
                # sessions that were cancelled, reset or rolled back meanwhile want it no more
                steps = {r: step for r, step in steps.items() if self[r]._stream is asked[r] and not asked[r].done}
                answers = dict(self._forward(steps)) if steps else {}
        finally:
            for work in works.values():
                work.close()
        if errors:
            raise RowErrors(errors)

    def _forward(self, steps: dict[int, Step]) -> dict[int, Reply | Exception]:
        answers = self._model.step(steps)
        replies: dict[int, Reply | Exception] = {r: a for r, a in answers.items() if isinstance(a, Exception)}
        good = {r: a for r, a in answers.items() if isinstance(a, torch.Tensor)}
        for row in good:
            self._rows[row].fed = True
        found = read_replies([self[row]._loop.answered(steps[row], logits) for row, logits in good.items()])
        return replies | dict(zip(good, found, strict=True))


def _writing(loop: Loop) -> Work[None]:
    while (yield from loop.advance()):
        pass


def _streaming(loop: Loop, words: Iterator[str], flush: bool) -> Work[None]:
    while not loop.stream.done:
        yield from _writing(loop)
        if not loop.stream.done:
            yield from loop.hand_over(next(words, END), flush)
