"""`SessionBatch`: many streaming sessions in one forward of a Hugging Face model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...core.cache import PADDING, SOURCE, TARGET
from ...core.shapes import check_number, refuse
from ...streaming import Codec, Policy
from ...streaming.batch import Sessions
from ...streaming.protocols import Decoder, Step
from .cache import GroupedCache
from .codec import Tokens, codec_for, ends_of, tokens_of
from .graphs import StepGraphs
from .model import base_of, causal_lm_of, forward_of
from .patch import borrow


class PatchedBatch:
    """The forwards that sessions share: a patched CausalLM and a GroupedCache with one row per session.

    A session's rows stand at the end of its line, [padding ; source chunk ; target rows], so that what it predicts is
    in the last column whatever the others do. Lengths are counted here too: no step waits for the device, and the only
    thing that is read back is the tokens. Positions count source and target apart, as in `PatchedModel`.

    graphs: step by replaying CUDA graphs (`StepGraphs`); the cache must be fixed and unbounded then.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: GroupedCache,
        *,
        offset: float = 0,
        active: Callable[[], bool] = lambda: True,
        graphs: bool = False,
    ) -> None:
        self._lm, self._base = forward_of("SessionBatch", model, cache.stream), base_of("SessionBatch", model)
        self.cache, self.offset = cache, check_number("SessionBatch", "offset", offset)
        self.rows, self._active = cache.stream.batch, active
        self.lengths = [[0, 0] for _ in range(self.rows)]
        # rows of each session's segments that are forgotten with the next forward
        self._dropped = [[0, 0] for _ in range(self.rows)]
        self._last: dict[int, tuple[int, int]] = {}
        self._device = self._base.embed_tokens.weight.device
        self._graphs = StepGraphs(self._run, cache, self._device) if graphs else None

    @torch.inference_mode()
    def step(self, steps: Mapping[int, Step]) -> dict[int, Tensor | Exception]:
        """One forward for the sessions in `steps`; see `BatchModel`."""
        if not self._active():
            raise RuntimeError("SessionBatch: the batch is closed, or the model's patch was undone")
        self._forget()
        answers: dict[int, Tensor | Exception] = {}
        sizes = {row: (len(step.source), len(step.target)) for row, step in steps.items()}
        answers.update(self._without_room(sizes))
        going = {row: step for row, step in steps.items() if row not in answers}
        self._last = {}
        if going:
            logits = self._forward(going)
            for row in going:
                self._last[row] = sizes[row]
                for role in (SOURCE, TARGET):
                    self.lengths[row][role] += sizes[row][role]
                answers[row] = logits[row, None]
        return answers

    def drop(self, row: int) -> None:
        """Forget what the last step wrote for this session."""
        for role, n in enumerate(self._last.pop(row)):
            self._drop(row, role, n)

    def pop(self, row: int, n: int) -> None:
        """Forget the last n target rows of a session."""
        self._drop(row, TARGET, n)

    def truncate(self, row: int, source: int, target: int) -> None:
        """Keep the first rows of a session."""
        if self.cache.stream.bounded:
            got = "a bounded cache, whose ring may have lost what stood there"
            refuse("SessionBatch.rollback", "cache", "an unbounded cache", got, NotImplementedError)
        counts = [have - keep for have, keep in zip(self.lengths[row], (source, target), strict=True)]
        if min(counts) < 0:
            refuse("SessionBatch.truncate", "source, target", f"at most {self.lengths[row]}", f"{source}, {target}")
        for role, n in enumerate(counts):
            self._drop(row, role, n)

    def reset(self, row: int) -> None:
        """Forget everything of a session."""
        self._forget()
        self.cache.reset(row)
        self.lengths[row] = [0, 0]

    def _drop(self, row: int, role: int, n: int) -> None:
        self.lengths[row][role] -= n
        self._dropped[row][role] += n

    def _forget(self) -> None:
        """Take back what sessions gave up since the last forward: one operation for all of them."""
        for role in (SOURCE, TARGET):
            counts = [dropped[role] for dropped in self._dropped]
            if any(counts):
                self.cache.stream.pop(counts, role)
        self._dropped = [[0, 0] for _ in range(self.rows)]

    def _without_room(self, sizes: Mapping[int, tuple[int, int]]) -> dict[int, Exception]:
        """The sessions whose rows do not fit, with the reason, once the cache has grown as far as it can."""
        stream = self.cache.stream
        errors: dict[int, Exception] = {}
        if stream.bounded:
            for row, counts in sizes.items():
                if sum(counts) > stream.max_chunk:
                    text = f"{sum(counts)} rows of a step, where max_chunk of the bounded cache is {stream.max_chunk}"
                    errors[row] = ValueError(f"SessionBatch: session {row}: expected fewer rows, got {text}")
            return errors
        full: dict[int, list[int]] = {}
        for role in (SOURCE, TARGET):
            room = min(stream.capacity(layer, role) for layer in (0, stream.layers - 1))
            for row, counts in sizes.items():
                if self.lengths[row][role] + counts[role] > room:
                    full.setdefault(row, []).append(role)
        try:
            if full and not stream.fixed:
                need = [max(self.lengths[row][role] + sizes[row][role] for row in sizes) for role in (SOURCE, TARGET)]
                have = [stream.longest(role) for role in (SOURCE, TARGET)]
                self.cache.reserve(*(max(0, n - h) for n, h in zip(need, have, strict=True)))
                full = {}
        except (torch.OutOfMemoryError, MemoryError) as error:
            for row in full:
                errors[row] = _chained(MemoryError(f"SessionBatch: session {row}: no memory to grow the cache"), error)
            return errors
        for row, roles in full.items():
            names = " and ".join(("source", "target")[role] for role in roles)
            text = f"SessionBatch: session {row}: expected rows that fit the fixed cache, got a full {names} segment"
            errors[row] = ValueError(text)
        return errors

    def _forward(self, steps: Mapping[int, Step]) -> Tensor:
        """Logits [rows, vocab] of the last column; what the steps wrote is committed."""
        longest = max(len(step.source) + len(step.target) for step in steps.values())
        writes = any(step.target for step in steps.values())
        T = longest if self._graphs is None else self._graphs.bucket(longest)
        packed = self._pack(steps, T or longest)
        if self._graphs is not None and T:
            logits = self._graphs.replay(packed, writes)
            counts = [[len(s.source), len(s.target)] for s in (steps.get(r, _NOTHING) for r in range(self.rows))]
            self.cache.stream.replayed(*([row[role] for row in counts] for role in (SOURCE, TARGET)))
            return logits
        try:
            # on the CPU the cache counts roles exactly, without waiting for a device
            logits = self._run(packed.to(self._device, non_blocking=True), writes, packed[2].to(torch.int8))
        except BaseException:
            self.cache.discard()
            raise
        self.cache.commit()
        return logits

    def _pack(self, steps: Mapping[int, Step], T: int) -> Tensor:
        """int64 [4, rows, T] on the CPU: tokens, positions, roles, limits; offsets not yet added."""
        packed = torch.zeros(4, self.rows, T, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        packed[2] = PADDING
        for row, step in steps.items():
            n, m = len(step.source), len(step.target)
            read, written = self.lengths[row]
            packed[0, row, T - n - m :] = torch.tensor([*step.source, *step.target])
            packed[1, row, T - n - m :] = torch.tensor([*range(read, read + n), *range(written, written + m)])
            packed[2, row, T - n - m :] = torch.tensor([SOURCE] * n + [TARGET] * m)
            packed[3, row, T - m :] = torch.tensor(list(step.limits))
        return packed

    def _run(self, packed: Tensor, writes: bool, role: Tensor | None = None) -> Tensor:
        """The forward of packed rows on the device, staged; without target rows the head is left out."""
        ids, positions, roles, limits = packed.unbind(0)
        if self.offset:
            whole = self.offset == int(self.offset)
            moved = positions + int(self.offset) if whole else positions.float() + self.offset
            positions = torch.where(roles == TARGET, moved, positions.to(moved.dtype))
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            "past_key_values": self.cache,
            "role": roles.to(torch.int8) if role is None else role,
            "source_limit": limits.to(torch.int32),
            "use_cache": True,
        }
        if not writes:
            self._base(**inputs)
            return torch.empty(self.rows, self._lm.config.vocab_size, device=packed.device)
        logits: Tensor = self._lm(**inputs, logits_to_keep=1).logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()


_NOTHING = Step((), (), ())


def _chained(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


class SessionBatch(Sessions):
    """Streaming sessions side by side in one forward of a Hugging Face model, each with its own policy and pace.

    `batch[row]` is a `Session`; `read({row: word})`, `end([row])`, `write()`, `run(sources)`, `cancel(row)` and
    `reset(row)` move them together. A source chunk that one session has read goes into the same forward as the token
    that another writes.

    model (compiled or not), tokenizer, header, prompt, source_end, offset, codec: as for `StreamSession`. policy: one
    per session, or one without state for all. rows: sessions, if there is one policy. cache: a GroupedCache of that
    many rows. decoder: a function that makes a session's decoder (`Decoding`) from its number. fused: as for `patch`,
    if the model is not patched yet. graphs: replay CUDA graphs, one per length of a step's longest chunk (1, 2, 4, ...
    64); longer chunks go without. Other options: see `Session`. Raises what `patch` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        policy: Policy | Sequence[Policy],
        *,
        rows: int | None = None,
        header: Tokens,
        prompt: Tokens = (),
        source_end: Tokens = (),
        offset: float = 0,
        codec: Codec | None = None,
        cache: GroupedCache | None = None,
        decoder: Callable[[int], Decoder] | None = None,
        fused: bool | str = False,
        graphs: bool = False,
        **options: Any,
    ) -> None:
        lm = causal_lm_of("SessionBatch", model)
        count = rows if rows is not None else len(policy) if isinstance(policy, Sequence) else None
        if count is None:
            refuse("SessionBatch", "rows", "a number of sessions, or a policy for each", None)
        if cache is not None and (not isinstance(cache, GroupedCache) or cache.stream.batch != count):
            refuse("SessionBatch", "cache", f"a GroupedCache of {count} rows", cache)
        texts = {"prompt": prompt, "header": header, "source_end": source_end}
        ids = {name: tokens_of("SessionBatch", tokenizer, name, text) for name, text in texts.items()}
        codec = codec or codec_for(tokenizer, ends_of(lm, tokenizer))
        cache = cache or GroupedCache.for_model(model, count)
        active, release = borrow(model, fused)
        self._release = weakref.finalize(self, release)
        self._release.atexit = False
        self.cache = cache
        try:
            patched = PatchedBatch(model, cache, offset=offset, active=active, graphs=graphs)
            options = {**options, **ids}
            super().__init__(patched, codec, policy, decoder=decoder, **options)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the model back: undoes the patch if no other session needs it. A second call does nothing."""
        self._release()

    def __enter__(self) -> SessionBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
