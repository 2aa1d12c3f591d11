"""Ways to stream a wait-k word (two tokens read, two written) through one Hugging Face model, ours and what exists.

Every loop starts from the same filled context and writes the same tokens; `word()` runs one word and reads each token
back, as a session must. Context keys and values are random: only their number matters for time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from streamkernels import SOURCE, TARGET, GroupedCache, SessionBatch, WaitK

READ = WRITE = 2  # tokens of a word
CHUNK = [11, 12]
FIRST = 13


class Context:
    """Keys and values per layer: source [B, HK, S, D] and target [B, HK, T, D]; lengths per session."""

    def __init__(self, model: Any, lengths: list[tuple[int, int]], seed: int = 0) -> None:
        config, device = model.config, next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.lengths, self.B = lengths, len(lengths)
        self.S, self.T = (max(pair[i] for pair in lengths) for i in (0, 1))
        self.layers = []
        for _ in range(config.num_hidden_layers):
            shape = (self.B, config.num_key_value_heads)
            made = [
                torch.empty(*shape, n, D, dtype=model.dtype, device=device).normal_(generator=generator)
                for n in (self.S, self.S, self.T, self.T)
            ]
            self.layers.append(made)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that the sessions hold, without padding."""
        each = sum(2 * layer[0].shape[1] * layer[0].shape[3] * layer[0].element_size() for layer in self.layers)
        return each * sum(map(sum, self.lengths))


class Loop:
    """What the loops of others share: one session, tokens counted on the host."""

    def __init__(self, model: Any, context: Context) -> None:
        self.model, self.device = model, next(model.parameters()).device
        (self.read, self.written), self.token = context.lengths[0], FIRST

    def ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.device)

    def at(self, begin: int, n: int) -> Tensor:
        return torch.arange(begin, begin + n, device=self.device)[None]

    def forward(self, tokens: list[int], begin: int, cache: Any, **more: Any) -> Tensor:
        ids, positions = self.ids(tokens), self.at(begin, len(tokens))
        return self.model(ids, position_ids=positions, past_key_values=cache, use_cache=True, **more).logits

    def word(self) -> list[int]:
        raise NotImplementedError


def filled(pairs: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for layer, (k, v) in enumerate(pairs):
        cache.update(k.clone(), v.clone(), layer)
    return cache


class PaperLoop(Loop):
    """(a) The loop released with GPE (github.com/EIT-NLP/StreamingLLM, generation/generate.py), in eager attention.

    Source and target live in one merged cache, which is cut in two before each forward and put together by torch.cat
    after each read; reads compute all their logits; a word costs a forward for every token and one more, whose
    prediction is dropped and whose entry is popped by rebuilding every layer.
    """

    attention = "eager"

    def __init__(self, model: Any, context: Context) -> None:
        super().__init__(model, context)
        pairs = [(torch.cat((sk, tk), 2), torch.cat((sv, tv), 2)) for sk, sv, tk, tv in context.layers]
        self.past = filled(pairs)

    def separate(self) -> tuple[list, list]:
        """Views of the source's and of the target's entries, in every layer."""
        S, layers = self.read, self.past.layers
        source = [(x.keys[:, :, :S], x.values[:, :, :S]) for x in layers]
        target = [(x.keys[:, :, S:], x.values[:, :, S:]) for x in layers]
        return source, target

    def word(self) -> list[int]:
        source, target = self.separate()
        cache = DynamicCache()
        for layer, (k, v) in enumerate(source):
            cache.update(k, v, layer)
        n, S = len(CHUNK), self.read
        # the released code builds this mask in fp32, by a loop over samples, in every forward
        mask = torch.full((1, 1, n, S + n), torch.finfo(torch.float32).min, device=self.device).triu(S + 1)
        self.forward(CHUNK, S, cache, attention_mask=mask)
        self.read += n
        merged = DynamicCache()
        for layer, (x, (k, v)) in enumerate(zip(cache.layers, target, strict=True)):
            merged.update(torch.cat((x.keys, k), 2), torch.cat((x.values, v), 2), layer)
        self.past = merged
        tokens = []
        for _ in range(WRITE + 1):
            self.separate()
            L = self.read + self.written + 1
            mask = torch.zeros(1, 1, 1, L, device=self.device, dtype=self.model.dtype)
            logits = self.forward([self.token], self.written, self.past, attention_mask=mask)
            self.written += 1
            tokens.append(int(logits[0, -1].argmax()))
            self.token = tokens[-1]
        # the last token's prediction is dropped, its entry popped, and it is fed again with what is read next
        self.token = tokens[WRITE - 1]
        self.written -= 1
        for layer in self.past.layers:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        return tokens[:WRITE]


class ReEncoding(Loop):
    """(b) SDPA with re-encoding: whenever source arrives, everything read and written so far is encoded again."""

    attention = "sdpa"

    def word(self) -> list[int]:
        self.read += READ
        cache, total = DynamicCache(), self.read + self.written + 1
        out = self.forward([FIRST] * total, 0, cache, logits_to_keep=1)
        self.written += 1
        tokens = [int(out[0, -1].argmax())]
        while len(tokens) < WRITE:
            out = self.forward(tokens[-1:], self.read + self.written, cache, logits_to_keep=1)
            self.written += 1
            tokens.append(int(out[0, -1].argmax()))
        return tokens


class Grouped(CacheLayerMixin):
    """A layer of (c): source and target grow by torch.cat; a target row is handed both."""

    def __init__(self, sk: Tensor, sv: Tensor, tk: Tensor, tv: Tensor) -> None:
        super().__init__()
        self.source, self.target, self.reading, self.is_initialized = (sk, sv), (tk, tv), True, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, old = (key_states, value_states), self.source if self.reading else self.target
        grown = torch.cat((old[0], new[0]), 2), torch.cat((old[1], new[1]), 2)
        if self.reading:
            self.source = grown
            return grown
        self.target = grown
        return torch.cat((self.source[0], grown[0]), 2), torch.cat((self.source[1], grown[1]), 2)

    def get_seq_length(self) -> int:
        return self.source[0].shape[2] + (0 if self.reading else self.target[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class GroupedDynamic(Loop):
    """(c) SDPA with a grouped dynamic cache: nothing is encoded twice, reads and writes are forwards of their own."""

    attention = "sdpa"

    def __init__(self, model: Any, context: Context) -> None:
        super().__init__(model, context)
        self.cache = Cache(layers=[Grouped(*(t.clone() for t in layer)) for layer in context.layers])

    def reading(self, on: bool) -> None:
        for layer in self.cache.layers:
            layer.reading = on

    def word(self) -> list[int]:
        self.reading(True)
        self.forward(CHUNK, self.read, self.cache, logits_to_keep=1)
        self.read += READ
        self.reading(False)
        tokens = []
        for _ in range(WRITE):
            out = self.forward([self.token], self.written, self.cache, logits_to_keep=1)
            self.written += 1
            self.token = int(out[0, -1].argmax())
            tokens.append(self.token)
        return tokens


class Static(CacheLayerMixin):
    """A layer of (c'): one buffer [source | target] of fixed size, written at device indices, read whole."""

    def __init__(self, layer: list[Tensor], room: int, places: dict[str, Tensor]) -> None:
        super().__init__()
        sk, sv, tk, tv = layer
        self.places, self.is_initialized = places, True
        self.at = sk.shape[2] + room
        self.buffers = []
        for s, t in ((sk, tk), (sv, tv)):
            B, HK, S, D = s.shape
            buffer = s.new_zeros(B, HK, S + t.shape[2] + 2 * room, D)
            buffer[:, :, :S], buffer[:, :, self.at : self.at + t.shape[2]] = s, t
            self.buffers.append(buffer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.places["slots"], new)
        return self.buffers[0], self.buffers[1]

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.buffers[0].shape[2], 0

    def get_max_length(self) -> int:
        return int(self.buffers[0].shape[2])

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()


class GroupedStatic(Loop):
    """(c') The same in CUDA graphs: a static buffer under a mask, one graph for reads and one for writes (on a CPU the
    same work is simply called)."""

    attention = "sdpa"

    def __init__(self, model: Any, context: Context, room: int = 64) -> None:
        super().__init__(model, context)
        self.places: dict[str, Tensor] = {}
        self.cache = Cache(layers=[Static(layer, room, self.places) for layer in context.layers])
        self.gap, size = self.read + room, self.cache.layers[0].get_max_length()
        self.size, self.room = size, room
        self.index = torch.arange(size, device=self.device)
        self.steps = {n: self.make(n, reads) for n, reads in ((READ, True), (1, False))}

    def make(self, n: int, reads: bool) -> dict[str, Any]:
        fixed = {name: torch.zeros(n, dtype=torch.int64, device=self.device) for name in ("ids", "slots", "at")}
        fixed["ends"] = torch.zeros(2, dtype=torch.int64, device=self.device)

        def run() -> Tensor:
            self.places["slots"] = fixed["slots"]
            source, target = fixed["ends"].unbind(0)
            if reads:
                mask = self.index[None] <= fixed["slots"][:, None]
            else:
                own = (self.index >= self.gap) & (self.index < self.gap + target)
                mask = ((self.index < source) | own)[None]
            return (
                self.model(
                    fixed["ids"][None],
                    position_ids=fixed["at"][None],
                    past_key_values=self.cache,
                    attention_mask=mask[None, None],
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[0, -1]
                .argmax()
            )

        step: dict[str, Any] = {"fixed": fixed, "run": run}
        if self.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # a slot that no row sees yet
                fixed["slots"].fill_(self.size - 1)
                run()
            torch.cuda.current_stream().wait_stream(side)
            step["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(step["graph"]):
                step["out"] = run()
        return step

    def replay(self, tokens: list[int], slot: int, begin: int, ends: tuple[int, int]) -> Tensor:
        n = len(tokens)
        step = self.steps[n]
        values = {"ids": tokens, "slots": range(slot, slot + n), "at": range(begin, begin + n), "ends": ends}
        for name, value in values.items():
            step["fixed"][name].copy_(torch.tensor(list(value)), non_blocking=True)
        if "graph" not in step:
            return step["run"]()
        step["graph"].replay()
        return step["out"]

    def word(self) -> list[int]:
        self.replay(CHUNK, self.read, self.read, (self.read + READ, self.written))
        self.read += READ
        tokens = []
        for _ in range(WRITE):
            out = self.replay([self.token], self.gap + self.written, self.written, (self.read, self.written + 1))
            self.written += 1
            self.token = int(out)
            tokens.append(self.token)
        return tokens


class Codec:
    """Words are two tokens, whatever they are."""

    end: frozenset[int] = frozenset()

    def encode(self, word: str, first: bool) -> list[int]:
        return CHUNK

    def decode(self, tokens: Any) -> str:
        return "x" * len(list(tokens))

    def closes(self, token: int) -> bool:
        return False

    def opens(self, token: int) -> bool:
        return False


class Ours:
    """(d) tier 1, (e) fused, (f) fused in CUDA graphs: a `SessionBatch`, with all that it does on the host."""

    attention = None

    def __init__(
        self, model: Any, context: Context, *, fused: bool = True, graphs: bool = False, room: int = 64
    ) -> None:
        B, self.rows = context.B, range(context.B)
        cache = GroupedCache.for_model(model, B, capacity=(context.S + room, context.T + room), fixed=graphs)
        self.batch = SessionBatch(
            model,
            None,
            WaitK(1),
            rows=B,
            header=[FIRST],
            codec=Codec(),
            cache=cache,
            fused=fused,
            graphs=graphs,
            max_target_tokens=10**9,
            max_word_tokens=WRITE,
        )
        place(self.batch, cache, context)

    def word(self) -> list[int]:
        before = [len(session._stream.tokens) for session in self.batch]
        self.batch.read({row: "w" for row in self.rows})
        self.batch.write()
        return self.batch[0].tokens[before[0] :]

    def close(self) -> None:
        self.batch.close()


def place(batch: SessionBatch, cache: GroupedCache, context: Context) -> None:
    """Put the sessions where the context leaves off, without computing it."""
    for role, size in ((SOURCE, context.S), (TARGET, context.T)):
        rows = torch.tensor([pair[role] for pair in context.lengths])
        roles = torch.where(torch.arange(size) < rows[:, None], role, -1).to(torch.int8)
        for layer, made in enumerate(context.layers):
            cache.stream.stage(layer, roles, size)
            for buffer, values in zip(cache.stream.segment(layer, role), made[2 * role : 2 * role + 2], strict=True):
                buffer[:, :, :size] = values
        cache.commit()
    for session, model_lengths, (S, T) in zip(batch, batch._model.lengths, context.lengths, strict=True):
        model_lengths[:] = [S, T]
        stream = session._stream
        stream.source_lengths, stream.read_tokens, stream.limits, stream.visible = [S], S, [S] * T, [1]
