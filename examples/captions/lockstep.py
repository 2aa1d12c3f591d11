"""Many streaming sessions over one model and one cache: every session keeps its own loop, their steps go together.

A session (`streamkernels.Session`) asks its model for one step at a time. Here its model is a `Row` of a batch, whose
`step` waits until all sessions that run have asked, and one forward answers many of them: rows of a GroupedCache are
independent, their lengths differ, and a row that has nothing to do in a forward is padding (role -1). What a session
reads, writes and takes back is decided by the same code as when it runs alone. When one ends, the next begins in its
row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from streamkernels.core.cache import PADDING, SOURCE, TARGET
from streamkernels.integrations.transformers import GroupedCache, patch

Result = TypeVar("Result")
PATIENCE = 8  # forwards of single tokens in a row, about a word's length


class Row:
    """One row of the batch, as the `StreamModel` of one session at a time."""

    def __init__(self, batch: Lockstep, index: int) -> None:
        self.batch, self.index = batch, index
        self.lengths = [0, 0]
        self.answers: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.source: Sequence[int] = ()
        self.target: Sequence[int] = ()
        self.limits: Sequence[int] = ()

    def step(self, source: Sequence[int], target: Sequence[int], limits: Sequence[int]) -> Tensor:
        """Wait for the forward that takes these rows along; it commits them. Returns logits [len(target), vocab]."""
        self.source, self.target, self.limits = source, target, limits
        self.batch.requests.put(self)
        logits = self.answers.get()
        if logits is None:
            raise RuntimeError("Row.step: the batch was stopped")
        self.lengths[SOURCE] += len(source)
        self.lengths[TARGET] += len(target)
        return logits

    def commit(self) -> None:
        """Nothing: the forward of all sessions was committed as a whole."""

    def discard(self) -> None:
        """Nothing: only a session that fails asks for it, and that stops the batch."""

    def pop(self, n: int) -> None:
        """Forget the last n target rows."""
        self.batch.pop(self.index, n)
        self.lengths[TARGET] -= n

    def reset(self) -> None:
        """Forget everything."""
        self.batch.reset(self.index)
        self.lengths = [0, 0]


class Lockstep:
    """Runs jobs, each of which streams one session over the `Row` it is given, `sessions` of them at a time.

    model: a patched model. `forwards` counts the forwards of the batch.
    """

    def __init__(self, model: nn.Module, sessions: int = 64) -> None:
        self.model = model
        self.cache = GroupedCache.for_model(model, sessions, capacity=128)
        self.requests: queue.SimpleQueue[Row | BaseException | None] = queue.SimpleQueue()
        self.forwards = 0
        self._rows = [Row(self, index) for index in range(sessions)]
        # sessions change their own row of the cache between two forwards, in threads of their own
        self._cache_lock = threading.Lock()

    def run(self, jobs: Sequence[Callable[[Row], Result]]) -> list[Result]:
        """The results of the jobs, in their order. An exception of one stops all and is raised."""
        results: dict[int, Result] = {}
        todo = iter(enumerate(jobs))
        lock = threading.Lock()

        def work(row: Row) -> None:
            try:
                while True:
                    with lock:
                        index, job = next(todo, (-1, None))
                    if job is None:
                        break
                    results[index] = job(row)
            except BaseException as error:
                self.requests.put(error)
            else:
                self.requests.put(None)

        threads = [threading.Thread(target=work, args=(row,), daemon=True) for row in self._rows[: len(jobs)]]
        for thread in threads:
            thread.start()
        try:
            self._answer(len(threads))
        finally:
            for row in self._rows:
                row.answers.put(None)
            for thread in threads:
                thread.join()
            for row in self._rows:
                row.answers = queue.SimpleQueue()
        return [results[index] for index in range(len(jobs))]

    def _answer(self, running: int) -> None:
        """One forward after the other, each when all sessions that run have asked for it."""
        waiting: list[Row] = []
        patience = PATIENCE
        while running:
            while len(waiting) < running:
                request = self.requests.get()
                if isinstance(request, BaseException):
                    raise request
                if request is None:
                    running -= 1
                else:
                    waiting.append(request)
            if not waiting:
                return
            # a chunk of source makes the forward wide for all: rows that have one wait for others, but not for long
            narrow = [row for row in waiting if not row.source and len(row.target) == 1]
            is_wide = patience == 0 or 2 * len(narrow) <= len(waiting)
            patience = PATIENCE if is_wide else patience - 1
            taken = waiting if is_wide else narrow
            self._forward(taken)
            waiting = [row for row in waiting if row not in taken]

    @torch.inference_mode()
    def _forward(self, rows: list[Row]) -> None:
        B, T = len(self._rows), max(len(row.source) + len(row.target) for row in rows)
        ids, positions = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)
        role, limits = torch.full((B, T), PADDING, dtype=torch.int8), torch.zeros(B, T, dtype=torch.int32)
        for row in rows:
            b, n, m = row.index, len(row.source), len(row.target)
            ids[b, : n + m] = torch.tensor([*row.source, *row.target])
            positions[b, :n] = torch.arange(n) + row.lengths[SOURCE]
            positions[b, n : n + m] = torch.arange(m) + row.lengths[TARGET]
            role[b, :n], role[b, n : n + m] = SOURCE, TARGET
            limits[b, n : n + m] = torch.tensor(row.limits)
        logits: Any = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            role=role,
            source_limit=limits,
            use_cache=True,
        ).logits
        self.cache.commit()
        self.forwards += 1
        for row in rows:
            n, m = len(row.source), len(row.target)
            row.answers.put(logits[row.index, n : n + m])

    @torch.inference_mode()
    def pop(self, index: int, n: int) -> None:
        """Forget the last n target rows of one session."""
        with self._cache_lock:
            self.cache.stream.pop([n * (b == index) for b in range(len(self._rows))], TARGET)

    @torch.inference_mode()
    def reset(self, index: int) -> None:
        """Empty one row."""
        with self._cache_lock:
            self.cache.stream.reset(index)


def stream_all(
    model: nn.Module, jobs: Sequence[Callable[[Row], Result]], sessions: int = 64
) -> tuple[list[Result], int]:
    """Run the jobs over a model that is not patched. Returns their results and the number of forwards."""
    with patch(model):
        batch = Lockstep(model, min(sessions, max(len(jobs), 1)))
        return batch.run(jobs), batch.forwards
