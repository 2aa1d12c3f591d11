"""What pruning did to one prompt, in numbers that can be checked: rows, pairs, multiplications, bytes, reads, times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..core.shapes import check_number, refuse

OP = "Report"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model with gated MLPs (three matrices)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def row_macs(self) -> int:
        """Multiply-accumulates of one row in the matrices of one layer."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden * wide + 2 * self.hidden * narrow + 3 * self.hidden * self.intermediate

    def pair_macs(self) -> int:
        """Multiply-accumulates of one (query, key) pair over all heads, scores and values."""
        return 2 * self.heads * self.head_dim

    def paper_macs(self, n: int) -> int:
        """VisiPruner's count for one layer and n vision tokens: 4 n d^2 + 2 n^2 d + 3 n d m, which its tables give as
        FLOPs: text tokens, causality and shared key heads left out (arXiv 2510.17205, Table 5: 3.82 T for LLaVA-1.5
        7B)."""
        return 4 * n * self.hidden**2 + 2 * n * n * self.hidden + 3 * n * self.hidden * self.intermediate


@dataclass(frozen=True)
class Times:
    """Milliseconds of one prompt's prefill and of one later token, ours and those of the dense model (PyTorch's SDPA),
    measured in one process. None: not measured."""

    prefill: float | None = None
    dense_prefill: float | None = None
    decode: float | None = None
    dense_decode: float | None = None

    def __post_init__(self) -> None:
        for name in ("prefill", "dense_prefill", "decode", "dense_decode"):
            if getattr(self, name) is not None:
                check_number("Times", name, getattr(self, name), positive=True)

    def speedup(self, what: str = "prefill") -> float:
        """Dense time by ours, of "prefill" or "decode". Raises ValueError unless both were measured."""
        if what not in ("prefill", "decode"):
            refuse("Times", "what", "'prefill' or 'decode'", what)
        ours, dense = getattr(self, what), getattr(self, f"dense_{what}")
        if ours is None or dense is None:
            absent = f"dense_{what}" if dense is None else what
            refuse("Times", absent, f"the {what} time of both, measured in the same process", None)
        return float(dense / ours)

    def break_even(self) -> float | None:
        """After how many generated tokens a request is no slower than dense: 0 if the prefill already is not, None if
        never. Raises ValueError unless all four were measured."""
        self.speedup("prefill"), self.speedup("decode")
        lost = (self.prefill or 0.0) - (self.dense_prefill or 0.0)
        won = (self.dense_decode or 0.0) - (self.decode or 0.0)
        if lost <= 0:
            return 0.0
        return lost / won if won > 0 else None


@dataclass(frozen=True)
class Report:
    """One prompt under `prune_vision`. Layers count from 0; lists have one entry per layer, tuples one per sample.

    tokens: rows of the prompt (padding with it). past: keys that the cache held before. vision, real: vision tokens
    and all tokens of each sample. width: rows that each layer computed for each sample, empty ones with it; cached:
    keys that its cache got. rows, vision_rows: those of each sample that mean something. seen: keys of each sample's
    cache, before this prompt, that the layer saw. filter_layer, exit_layer: after which layer a sample's tokens were
    first dropped, and after which all were gone (-1: never). probe_reads: reads of 8 bytes, one for each probed
    layer; layout_reads: reads before the first layer; verdict: what the cost table said; decode: how the last token was
    generated, and why not in one op a layer, if so.
    """

    model: ModelShape
    config: str
    tokens: int
    past: int
    vision: tuple[int, ...]
    real: tuple[int, ...]
    width: list[int]
    cached: list[int]
    rows: list[tuple[int, ...]]
    vision_rows: list[tuple[int, ...]]
    seen: list[tuple[int, ...]]
    filter_layer: tuple[int, ...]
    exit_layer: tuple[int, ...]
    probe_reads: int
    layout_reads: int
    element_size: int
    verdict: str
    decode: str = "no token yet"
    times: Times = field(default_factory=Times)

    @property
    def batch(self) -> int:
        """Samples."""
        return len(self.vision)

    def pairs(self, dense: bool = False) -> int:
        """(query, key) pairs that causal attention computes per head, over all layers and samples; or those of the
        dense model."""
        if dense:
            return self.model.layers * sum(_causal(n, self.past) for n in self.real)
        layers = zip(self.rows, self.seen, strict=True)
        return sum(_causal(n, past) for rows, seen in layers for n, past in zip(rows, seen, strict=True))

    def macs(self, dense: bool = False) -> int:
        """Multiply-accumulates of all decoder layers over all rows computed, text and vision (embedding, vision tower
        and output head, which do not change, left out)."""
        rows = self.tokens * self.model.layers if dense else sum(self.width)
        return rows * self.batch * self.model.row_macs() + self.pairs(dense) * self.model.pair_macs()

    def paper_macs(self, dense: bool = False) -> int:
        """The paper's count, over vision tokens only; see `ModelShape.paper_macs`. Not what the clock follows."""
        kept: Sequence[tuple[int, ...]] = [self.vision] * self.model.layers if dense else self.vision_rows
        return sum(self.model.paper_macs(n) for layer in kept for n in layer)

    def kv_bytes(self, dense: bool = False) -> int:
        """Bytes of the keys and values that this prompt put into the cache."""
        each = 2 * self.model.kv_heads * self.model.head_dim * self.element_size
        return (self.tokens * self.model.layers if dense else sum(self.cached)) * self.batch * each

    @property
    def reads(self) -> int:
        """Reads of the host from the device."""
        return self.probe_reads + self.layout_reads

    def with_times(self, times: Times) -> Report:
        """The same with measured times."""
        return replace(self, times=times)

    def __str__(self) -> str:
        lines = [
            f"vision pruning ({self.config}): {self.batch} x {self.tokens} tokens, {sum(self.vision)} of them vision",
            f"  filter after layer {_each(self.filter_layer)}, all gone after layer {_each(self.exit_layer)}",
            f"  vision tokens left by layer: {_runs(self.vision_rows)}",
            f"  rows of the decoder layers: {_share(sum(self.width), self.tokens * self.model.layers)}",
            f"  attention pairs per head: {_share(self.pairs(), self.pairs(dense=True))}",
            f"  MACs, decoder layers, all rows: {_share(self.macs(), self.macs(dense=True))}",
            f"  MACs, the paper's count (vision rows only): {_share(self.paper_macs(), self.paper_macs(dense=True))}",
            f"  KV cache bytes: {_share(self.kv_bytes(), self.kv_bytes(dense=True))}",
            f"  host reads: {self.probe_reads} of 8 bytes while the layers ran, {self.layout_reads} before",
            f"  profitable: {self.verdict}",
            f"  generated tokens: {self.decode}",
        ]
        for what in ("prefill", "decode"):
            ours, dense = getattr(self.times, what), getattr(self.times, f"dense_{what}")
            if ours is not None and dense is not None:
                lines.append(f"  {what}: {ours:.2f} ms, dense {dense:.2f} ms: {self.times.speedup(what):.2f} x")
            elif ours is not None:
                lines.append(f"  {what}: {ours:.2f} ms, dense not measured")
        measured = (self.times.prefill, self.times.dense_prefill, self.times.decode, self.times.dense_decode)
        if None not in measured:
            tokens = self.times.break_even()
            lines.append("  no slower than dense " + ("never" if tokens is None else f"from {tokens:.0f} tokens on"))
        return "\n".join(lines)


def _causal(n: int, past: int) -> int:
    return n * past + n * (n + 1) // 2


def _share(ours: int, dense: int) -> str:
    return f"{ours:,} of {dense:,}" + (f" ({100 * ours / dense:.1f} %)" if dense else "")


def _each(layers: tuple[int, ...]) -> str:
    names = ["none" if layer < 0 else str(layer) for layer in layers]
    return names[0] if len(set(names)) == 1 else ", ".join(names)


def _runs(rows: list[tuple[int, ...]]) -> str:
    out: list[str] = []
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[begin]:
            at = f"{begin}" if i - begin == 1 else f"{begin}-{i - 1}"
            out.append(f"{at}: {'/'.join(str(n) for n in rows[begin])}")
            begin = i
    return ", ".join(out)
