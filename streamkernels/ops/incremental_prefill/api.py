"""`incremental_prefill`: checks, the choice of a backend, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.cache import SOURCE, Staged, StreamCache
from ...core.chunk import check_chunk
from ...core.shapes import check_int, check_number, refuse
from ...core.staging import watched
from ..known import Known, look_of, wants_gradient
from .autograd import IncrementalPrefill, Options, attend
from .schema import OP, plan_of, run_again


def incremental_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: StreamCache,
    layer: int,
    *,
    role: Tensor | int,
    source_limit: Tensor | None = None,
    source_begin: Tensor | None = None,
    target_begin: Tensor | None = None,
    sinks: int | tuple[int, int] = 0,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One layer's streaming step: rotate q and k, write k and v to the segments that `role` names, attend over what
    each row sees.

    A source row sees the source up to itself. A target row sees the first `source_limit` source rows and the target up
    to itself. Row t gets the stream index committed length + the number of earlier rows of its role in the call, per
    session, and all visibility is by stream index: a target row also sees source rows of its own call, even those
    placed after it. A call may mix sessions that read with sessions that write, and both kinds of row in one session.
    This is streaming attention with group positions ("LLM as Effective Streaming Processor", arXiv 2505.16983): nothing
    is encoded twice, and any cut of a stream into calls gives the same result.

    Args:
        q: [B, H, T, D], H a multiple of HK; the cache's dtype (bf16, fp16, fp32; fp64: reference), on the layer's
            device, any strides, last stride 1.
        k, v: [B, HK, T, D], as q.
        cos, sin: [B or 1, T, rotary_dim / 2], fp32 or q's dtype, rotary_dim <= D, constants: the angles of each row's
            own position; both None for q and k that are already rotated.
        cache: mutated as by `rotate_append`: slots behind the committed lengths of layer `layer` and what is remembered
            as staged, until `cache.commit()` or `cache.discard()`.
        role: SOURCE or TARGET for every row, or int8 [B, T] with SOURCE, TARGET or PADDING (o = 0, lse = -inf, written
            nowhere; its q, k, v may hold anything), on the layer's device or on the CPU; not to be changed before the
            commit.
        source_limit: int32 [B, T], how many source rows a target row sees, clipped to [0, all of them with this
            call's]; default all. Ignored for source rows.
        source_begin, target_begin: int32 [B, T], the first stream index that a row, source or target, sees of each
            segment; default 0.
        sinks: keys [0, sinks) of a segment are seen as well, up to the row's end of it; an int or (source, target). In
            a bounded cache a segment with a window shows its own sinks, and this may not be more.
        sink_logits: [H], one learned logit per head that joins the softmax denominator and has no value (gpt-oss, arXiv
            2508.10925, section 2.2); q's dtype or fp32.
        scale: default 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        return_lse: also return lse.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        o [B, H, T, D] in q's dtype, stored [B, T, H, D]; with `return_lse` also lse [B, H, T] in fp32 (fp64 for fp64),
        the natural log of the sum of exp(score) over the visible keys, without sink_logits. A row that sees nothing has
        o = 0 and lse = -inf. Differentiable once in this call's q, k, v and in sink_logits, through o and lse; rows of
        earlier calls are constants. Later calls may come before the backward, and so may growth; a cache that was
        rearranged since (its `epoch` moved) makes the backward raise RuntimeError.

    Raises:
        TypeError, ValueError: an argument that does not fit, a full fixed segment, more than `max_chunk` rows in
            bounded mode. Nothing has changed then. Under torch.compile and in CUDA graphs, where room cannot be
            checked, a full segment drops the write, and the cache's status word says so.
        NotImplementedError: a gradient through a bounded cache or inside torch.compile (call under torch.no_grad()); a
            named backend that cannot run the call.
        RuntimeError: a call from inside a backward, as gradient checkpointing makes: the cache has moved on, it cannot
            be repeated.
    """
    look = None
    if sink_logits is None and type(sinks) is int and sinks == 0:
        limits = (source_limit, source_begin, target_begin)
        look = _look_of(q, k, v, cos, sin, limits, cache, layer, role, scale, softcap, interleaved, backend)
        if (known := _known.get(look)) is not None:
            T, numbers, plan, options = known
            staged = cache.stage(layer, role, T)
            if plan is not None and not watched():
                o, lse = run_again(plan, staged, (q, k, v, cos, sin, *limits), numbers, return_lse)
            else:
                o, lse = attend(q, k, v, cos, sin, None, staged, Options(*limits, *options))
            return (o, lse) if return_lse else o
    shapes = check_chunk(OP, k, v, cos, sin, cache, layer, role)
    shapes.tensor("q", q, "B H T D", dtype=cache.dtype, unit_last_stride=True)
    shapes.heads()
    for name, x in (("source_limit", source_limit), ("source_begin", source_begin), ("target_begin", target_begin)):
        if x is not None:
            shapes.tensor(name, x, "B T", dtype=torch.int32)
    if sink_logits is not None:
        shapes.tensor("sink_logits", sink_logits, "H", dtype=(q.dtype, torch.float32))
    scale = 1.0 / shapes["D"] ** 0.5 if scale is None else check_number(OP, "scale", scale)
    softcap = 0.0 if softcap is None else check_number(OP, "softcap", softcap, positive=True)
    first = _sinks(sinks, cache)
    backward = _check_backward(cache, q, k, v, sink_logits)
    used = {
        "roles": isinstance(role, Tensor),
        "limits": source_limit is not None,
        "begins": source_begin is not None or target_begin is not None,
        "sinks": any(first),
        "bounded": cache.bounded,
        "sink_logits": sink_logits is not None,
        "softcap": softcap != 0.0,
        "scale": scale <= 0,
        "interleaved": interleaved,
        "rotated": cos is None,
        "backward": backward,
    }
    call = Call(OP, q.device, q.dtype, dict(shapes.sizes), frozenset(name for name, on in used.items() if on))
    chosen = choose(call, backend)
    staged = cache.stage(layer, role, shapes["T"])
    begins = (_held(source_begin, staged, 0, shapes["T"]), _held(target_begin, staged, 1, shapes["T"]))
    options = Options(source_limit, *begins, first, float(scale), float(softcap), interleaved, chosen)
    if backward:
        o, lse = IncrementalPrefill.apply(q, k, v, sink_logits, cos, sin, cache, layer, staged, options)
    else:
        o, lse = attend(q, k, v, cos, sin, sink_logits, staged, options)
        # another call of this look has other limits
        numbers = (options.scale, options.softcap, interleaved)
        _known.keep(look, (shapes["T"], numbers, plan_of(q, k, v, chosen), options[3:]))
    return (o, lse) if return_lse else o


_known = Known()


def _look_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    limits: tuple[Tensor | None, ...],
    cache: StreamCache,
    layer: int,
    role: Tensor | int,
    *options: Any,
) -> Any:
    """The look of a call without sinks and gradients over a cache that keeps every key; else None."""
    if type(cache) is not StreamCache or cache.bounded or type(layer) is not int or not 0 <= layer < cache.layers:
        return None
    # what the rows are checked against; its look changes when the segment grows
    held = cache._segments.pairs[layer][SOURCE][0]
    roles = role if isinstance(role, Tensor) else None
    look = look_of((q, k, v, cos, sin, *limits, held, roles), (layer, role if roles is None else None, *options))
    return None if look is None or wants_gradient(q, k, v, cos, sin) else look


def _sinks(sinks: int | tuple[int, int], cache: StreamCache) -> tuple[int, int]:
    pair = sinks if isinstance(sinks, tuple) else (sinks, sinks)
    if len(pair) != 2:
        refuse(OP, "sinks", "an int or (source, target)", sinks)
    for n, window in zip(pair, cache.windows, strict=True):
        # others may have left the ring
        check_int(OP, "sinks", n, maximum=None if window is None else cache.sinks)
    return pair


def _check_backward(cache: StreamCache, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None) -> bool:
    """Whether the call needs a gradient; refuses where there is none."""
    if not wants_gradient(q, k, v, sink_logits):
        return False
    hint = "a call without gradients (torch.no_grad())"
    if cache.bounded:
        why = ", since later rows overwrite the keys of a bounded cache"
        refuse(OP, "cache", hint + why, "a gradient", NotImplementedError)
    if torch.compiler.is_compiling():
        why = " inside torch.compile, which cannot watch the cache"
        refuse(OP, "q", hint + why, "a gradient", NotImplementedError)
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{OP}: cache: expected a call outside of a backward, got a recomputation (gradient checkpointing): "
            "rows may have been committed since, so a repeated call would write and see other rows"
        )
    return True


def _held(begin: Tensor | None, staged: Staged, r: int, T: int) -> Tensor | None:
    """The begins of one segment, no earlier than what pops and discards left readable in its ring."""
    if staged.oldest is None or staged.windows[r] is None:
        return begin
    oldest = staged.oldest[:, r, None].expand(-1, T)
    return oldest if begin is None else torch.maximum(begin, oldest)
