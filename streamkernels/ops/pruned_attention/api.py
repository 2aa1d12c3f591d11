"""`pruned_attention`: vision intervals and a layer's stage become spans; the attention is `span_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ...core.shapes import Shapes, refuse
from ...core.spans import ATTEND, KEPT, MASS, SINK, SKIP, Spans
from ...core.spans import vision as build_spans
from ..span_attention import span_attention

OP = "pruned_attention"
RULES = {"attend": ATTEND, "skip": SKIP, "mass": MASS, "sink": SINK, "kept": KEPT, "mass_first_half": MASS}


def pruned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vision: Sequence[Any] | Tensor,
    stage: tuple[str, str],
    *,
    lengths: Sequence[int] | None = None,
    sink_key: int | Sequence[int] | None = None,
    kept: Tensor | None = None,
    kept_count: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which a layer's stage says what text rows and vision rows do with vision keys.

    The spans are built on the host in each call. A model that runs many layers under one stage builds them once with
    `streamkernels.spans.vision` and calls `span_attention`, which is all that this function does.

    Args:
        q: [B, H, T, D]; k, v: [B, HK, S, D], as in `span_attention`. The rows of sample b are the last
            min(T, lengths[b]) of its keys: T = S is a prefill, T = 1 a decode step.
        vision: the vision keys. Per sample a list of (begin, end), any number of images, none too; or one (begin, end)
            per sample; or a bool mask [B, S].
        stage: the rules (text to vision, vision to vision). Each is one of "attend", "skip" (not seen), "mass" (in the
            denominator, the values dropped), "sink" (as mass, which then goes to the value of one key) and "kept" (only
            the keys of `kept`); text to vision may also be "mass_first_half": mass for the first half of a sample's
            vision keys, attend for the second.
        lengths: keys of each sample, default S. Rows and keys behind them are padding; such rows see nothing.
        sink_key: where the mass of "sink" goes, one for all or one per sample; default the first vision key.
        kept: int32 [B, HK, K], ascending and unique, with the rule "kept" and only with it.
        kept_count: int32 [B, HK]: how many entries of `kept` count.
        scale, softcap, sink_logits, return_lse, backend: as in `span_attention`.

    Returns:
        What `span_attention` returns. Differentiable in q, k, v and sink_logits. Nothing is mutated.

    Raises:
        TypeError, ValueError: as `span_attention` and `streamkernels.spans.vision`, and for an unknown stage.

    Source: VisiPruner, arXiv 2510.17205, sections 3.6 and 4.3. `spans.vision` tells what its code does in each layer.
    """
    shapes = Shapes(OP)
    shapes.tensor("q", q, "B H T D")
    shapes.tensor("k", k, "B HK S D")
    B, T, S = shapes["B"], shapes["T"], shapes["S"]
    if T > S:
        refuse(OP, "q", f"at most as many rows as keys ({S})", f"{T} rows")
    text_rule, vision_rule = _check_stage(stage)
    keys = [S] * B if lengths is None else _check_lengths(lengths, B, S)
    spans = build_spans(
        keys,
        _per_sample(vision, B),
        text_to_vision=RULES[text_rule],
        vision_to_vision=RULES[vision_rule],
        first_half=text_rule == "mass_first_half",
        sink_key=sink_key,
        kept=kept,
        kept_count=kept_count,
        rows=[min(T, n) for n in keys],
        device=q.device,
    )
    return span_attention(
        q,
        k,
        v,
        _padded(spans, T, S),
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        return_lse=return_lse,
        backend=backend,
    )


def _check_stage(stage: object) -> tuple[str, str]:
    if not isinstance(stage, (tuple, list)) or len(stage) != 2:
        refuse(OP, "stage", "a pair of rules (text to vision, vision to vision)", stage, TypeError)
    for rule, names in ((stage[0], list(RULES)), (stage[1], list(RULES)[:-1])):
        if rule not in names:
            refuse(OP, "stage", f"rules out of {', '.join(names)}", stage)
    return stage[0], stage[1]


def _check_lengths(lengths: Sequence[int], B: int, S: int) -> list[int]:
    numbers = list(lengths) if isinstance(lengths, Sequence) else []
    if len(numbers) != B or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= S for n in numbers):
        refuse(OP, "lengths", f"{B} ints in [0, {S}]", lengths)
    return numbers


def _per_sample(vision: Sequence[Any] | Tensor, B: int) -> Sequence[Any] | Tensor:
    # one (begin, end) for each of several samples -> a list of one image each
    if isinstance(vision, Tensor) or B == 1 or not isinstance(vision, Sequence):
        return vision
    flat = len(vision) == B and all(isinstance(x, Sequence) and len(x) == 2 and isinstance(x[0], int) for x in vision)
    return [[pair] for pair in vision] if flat else vision


def _padded(spans: Spans, T: int, S: int) -> Spans:
    # the builder stops at the longest sample; the tensors may be longer
    bounds = pad(spans.bounds, (0, 0, 0, 0, 0, T - spans.T))
    if spans.key_class is None or spans.row_class is None:
        return replace(spans, bounds=bounds)
    key_class = pad(spans.key_class, (0, S - spans.key_class.shape[1]))
    return replace(spans, bounds=bounds, key_class=key_class, row_class=pad(spans.row_class, (0, T - spans.T)))
