"""`StreamSession`: the read and write loop of `streamkernels.streaming` over a Hugging Face model."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...core.cache import SOURCE, TARGET
from ...core.shapes import check_number, refuse
from ...streaming import Codec, Policy, Session, StreamModel
from ...streaming.batch import Row
from ...streaming.protocols import Decoder
from .batch import PatchedBatch
from .cache import GroupedCache
from .codec import Tokens, codec_for, ends_of, tokens_of
from .model import base_of, causal_lm_of, forward_of, is_compiled
from .patch import borrow


class PatchedModel:
    """The four methods that a `Session` needs of a model, over a patched CausalLM and a GroupedCache of one row.

    One step is one forward over the rows [source chunk ; target tokens]. Positions count source and target apart:
    source token i is at i, target token j at `offset + j` (group position encoding, arXiv 2505.16983). An integer
    offset travels as int64; a fraction is added in fp32, in which the model's rotary module computes its angles
    anyway.

    model: the patched model, or a wrapper of it. cache: the row's cache; lengths are counted here too, so that no
    step waits for the device. active: says whether the model may still be used.
    """

    def __init__(
        self, model: nn.Module, cache: GroupedCache, *, offset: float = 0, active: Callable[[], bool] = lambda: True
    ) -> None:
        self._lm, self._base = forward_of("StreamSession", model, cache.stream), base_of("StreamSession", model)
        self._compiled = is_compiled(model)
        self.cache, self.offset = cache, check_number("StreamSession", "offset", offset)
        self._active = active
        self._lengths, self._staged = [0, 0], (0, 0)

    @torch.inference_mode()
    def step(self, source: Sequence[int], target: Sequence[int], limits: Sequence[int]) -> Tensor:
        """One forward, staged. Target row j sees the first `limits[j]` source tokens. Returns logits [len(target),
        vocab], fp32 (fp64 for an fp64 model)."""
        if not self._active():
            raise RuntimeError("StreamSession: the session is closed, or the model's patch was undone")
        n, m = len(source), len(target)
        if self._compiled and not self.cache.stream.bounded:
            # a compiled step cannot refuse: what does not fit would not be written
            self.cache.reserve(n, m)
        device = self._base.embed_tokens.weight.device
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[*source, *target]]).to(device, non_blocking=True),
            "position_ids": self._positions(n, m).to(device, non_blocking=True),
            "past_key_values": self.cache,
            "role": SOURCE if not m else TARGET,
            "use_cache": True,
        }
        if n and m:
            # on the CPU the cache counts it exactly, without waiting for a device
            inputs["role"] = torch.tensor([[SOURCE] * n + [TARGET] * m], dtype=torch.int8)
        if m:
            seen = torch.tensor([[0] * n + list(limits)], dtype=torch.int32)
            inputs["source_limit"] = seen.to(device, non_blocking=True)
            logits = self._lm(**inputs, logits_to_keep=m).logits[0]
        else:
            self._base(**inputs)
            logits = torch.empty(0, self._lm.config.vocab_size, device=device)
        self._staged = (n, m)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _positions(self, n: int, m: int) -> Tensor:
        source = torch.arange(self._lengths[SOURCE], self._lengths[SOURCE] + n)
        target = torch.arange(self._lengths[TARGET], self._lengths[TARGET] + m)
        if self.offset == int(self.offset):
            return torch.cat([source, target + int(self.offset)])[None]
        return torch.cat([source.float(), target.float() + self.offset])[None]

    def commit(self) -> None:
        """Keep the staged rows."""
        self.cache.commit()
        self._lengths = [a + b for a, b in zip(self._lengths, self._staged, strict=True)]
        self._staged = (0, 0)

    def discard(self) -> None:
        """Forget the staged rows, if any."""
        self.cache.discard()
        self._staged = (0, 0)

    def pop(self, n: int) -> None:
        """Forget the last n committed target rows."""
        self.cache.stream.pop(n, TARGET)
        self._lengths[TARGET] -= n

    def truncate(self, source: int, target: int) -> None:
        """Keep the first rows of each segment."""
        if self.cache.stream.bounded:
            got = "a bounded cache, whose ring may have lost what stood there"
            refuse("Session.rollback", "cache", "an unbounded cache", got, NotImplementedError)
        for role, keep in ((SOURCE, source), (TARGET, target)):
            self.cache.stream.pop(self._lengths[role] - keep, role)
            self._lengths[role] = keep

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self._lengths, self._staged = [0, 0], (0, 0)


class StreamSession(Session):
    """A `streamkernels.Session` over a Hugging Face model: `read(word)`, `end()`, `write()`, or `run(words)`.

    model: a CausalLM that `patch` accepts (or a PEFT wrapper of one), patched or not; one that is not is patched until
    `close()`, the end of a `with` block, or until the session is garbage. What torch.compile(model, fullgraph=True)
    returned runs compiled wherever logits are wanted, with `graphs` inside the CUDA graphs; it needs a fixed cache.
    tokenizer: a Hugging Face tokenizer; None with a `codec` and prompt, header and source_end as ids. policy: any of
    `streamkernels.streaming.policies`. prompt, header, source_end: tokens before the source, before the target (at
    least one token; its last predicts the first word) and after the source: text, in which special tokens count as such
    (a chat template's pieces), or ids. offset: position of the first target token, any number (the scheme of arXiv
    2505.16983; 0 by default). codec: the text border, by default `codec_for(tokenizer)` with the end tokens of the
    model's generation config and of the tokenizer. cache: a GroupedCache of one row, say a bounded one; by default a
    growing one. decoder: say a `Decoding`, for logits processors, stopping criteria, sampling and streamers. fused: as
    for `patch`, if the model is not patched yet. graphs: replay CUDA graphs, as in `SessionBatch`; needs a fixed cache.
    sample, max_target_tokens, max_word_tokens, clock: see `Session`.

    Every step runs in inference mode. Raises what `patch` raises, and ValueError for a cache of more than one row.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        policy: Policy,
        *,
        header: Tokens,
        prompt: Tokens = (),
        source_end: Tokens = (),
        offset: float = 0,
        codec: Codec | None = None,
        cache: GroupedCache | None = None,
        sample: Callable[[Tensor], int] | None = None,
        decoder: Decoder | None = None,
        fused: bool | str = False,
        graphs: bool = False,
        max_target_tokens: int = 1024,
        max_word_tokens: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        lm = causal_lm_of("StreamSession", model)
        if cache is not None and (not isinstance(cache, GroupedCache) or cache.stream.batch != 1):
            refuse("StreamSession", "cache", "a GroupedCache of one row", cache)
        texts = {"prompt": prompt, "header": header, "source_end": source_end}
        ids = {name: tokens_of("StreamSession", tokenizer, name, text) for name, text in texts.items()}
        codec = codec or codec_for(tokenizer, ends_of(lm, tokenizer))
        cache = cache or GroupedCache.for_model(model)
        active, release = borrow(model, fused)
        self._release = weakref.finalize(self, release)
        self._release.atexit = False
        self.cache = cache
        try:
            patched: StreamModel = PatchedModel(model, cache, offset=offset, active=active)
            if graphs:
                patched = Row(PatchedBatch(model, cache, offset=offset, active=active, graphs=True), 0)
            super().__init__(
                patched,
                codec,
                policy,
                header=ids["header"],
                prompt=ids["prompt"],
                source_end=ids["source_end"],
                sample=sample,
                decoder=decoder,
                max_target_tokens=max_target_tokens,
                max_word_tokens=max_word_tokens,
                clock=clock,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the model back: undoes the patch if no other session needs it. A second call does nothing."""
        self._release()

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
