"""The Triton kernels of incremental_prefill against the reference in fp64, through the registered op: the interpreter
on a CPU, compiled on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamkernels.testing.compare import assert_accurate, influence
from streamkernels.testing.inputs import spread

from .prefill_calls import CALLS, DEVICE, GPU, LONG, NAN, Call, gradients, make, raw, run, wide

if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
# triton's interpreter computes bf16 on raw bits: bf16 only runs on a GPU
HALF = [torch.float16] + ([torch.bfloat16] if GPU else [])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_forward(name, dtype):
    arguments = make(CALLS[name], dtype)
    exact = [wide(x) for x in arguments]
    want_o, want_lse, want_segments, want_status = run(exact, "reference")
    ours_o, ours_lse, segments, status = run(arguments, "triton")
    plain_o, plain_lse, *_ = run(arguments, "reference")
    assert_accurate("o", ours_o, plain_o, want_o)
    assert_accurate("lse", ours_lse, plain_lse, want_lse)
    assert status.item() == want_status.item()
    for x, y in zip(segments, want_segments, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        if x.numel():
            bound = 2 * torch.finfo(dtype).eps * y.nan_to_num(0).abs().max()
            assert (x.double() - y).nan_to_num(0).abs().max() <= bound


UNBOUNDED = [name for name, call in CALLS.items() if not any(call.windows)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", UNBOUNDED)
def test_backward(name, dtype):
    arguments = make(CALLS[name], dtype)
    exact = [wide(x) for x in arguments]
    want = gradients(exact, exact, "reference")
    ours, plain = (gradients(arguments, exact, backend) for backend in ("triton", "reference"))
    for label, a, b, c in zip(("dq", "dk", "dv", "dsink_logits"), ours, plain, want, strict=True):
        if label == "dsink_logits":
            assert a.shape == c.shape and (a - c).abs().sum() <= 1e-2 * c.abs().sum().clamp(min=1.0)
        else:
            # a sum over rows and heads of terms that were rounded to the dtype, which may cancel
            assert_accurate(label, a, b, c, terms=c.abs().amax().expand_as(c))
    role = arguments[11]
    if role is not None:
        assert (ours[0].transpose(1, 2)[role < 0] == 0).all() and (ours[1].transpose(1, 2)[role < 0] == 0).all()


def test_options_of_any_strides():
    arguments = make(replace(LONG, T=5, begin=(40, 30), sink_logits=True), torch.float16)
    loose = list(arguments)
    for place in (9, *range(11, 16), -3):
        if isinstance(loose[place], Tensor):
            loose[place] = spread(loose[place])
    assert not loose[-3].is_contiguous() and not loose[9].is_contiguous()
    for x, y in zip(run(arguments, "triton")[:2], run(loose, "triton")[:2], strict=True):
        assert torch.equal(x, y)
    exact = [wide(x) for x in arguments]
    for x, y in zip(gradients(arguments, exact, "triton"), gradients(loose, exact, "triton"), strict=True):
        assert torch.equal(x, y)


def test_padding_may_hold_anything():
    arguments = make(replace(LONG, T=5), torch.float16)
    dirty = list(arguments)
    padding = (arguments[11] < 0)[:, None, :, None]
    dirty[:3] = [x.masked_fill(padding, NAN) for x in arguments[:3]]
    for x, y in zip(run(arguments, "triton")[:2], run(dirty, "triton")[:2], strict=True):
        assert torch.equal(x, y)
    exact = [wide(x) for x in arguments]
    for x, y in zip(gradients(arguments, exact, "triton"), gradients(dirty, exact, "triton"), strict=True):
        assert torch.equal(x, y)


def test_keys_that_no_row_sees_may_be_nan():
    """Keys before every begin and behind every limit, in both segments."""
    call = replace(LONG, T=3, role="target", limit=0)
    arguments = make(call, torch.float16)
    row = lambda n: torch.full((2, 3), n, dtype=torch.int32, device=DEVICE)  # noqa: E731
    arguments[13:16] = [row(25), row(10), row(65)]
    before = run(arguments, "triton")
    for first, seen, x in zip((0, 0, 0, 0), ((10, 25),) * 2 + ((65, 140),) * 2, arguments[5:9], strict=True):
        x[:, :, first : seen[0]] = NAN
        x[:, :, seen[1] :] = NAN
    after = run(arguments, "triton")
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_influence_is_what_the_reference_says():
    call = Call(B=1, H=2, HK=1, T=5, D=8, length=((4, 3),), role="mixed", limit=7, begin=(3, 2))
    arguments = make(call, torch.float32)
    flows = []
    for backend in ("triton", "reference"):
        for place in (2, 6, 8):

            def through(x: Tensor, place: int = place, backend: str = backend) -> Tensor:
                changed = list(arguments)
                changed[place] = x
                return run(changed, backend)[0]

            flows.append(influence(through, arguments[place]))
    for ours, reference in zip(flows[:3], flows[3:], strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("length", [[[-4, -4], [2**31 - 3, 2**31 - 3]], [[-(2**31), 9], [10**9, 10**9]]])
@pytest.mark.parametrize("windows", [(0, 0), (5, 6)])
def test_garbage_lengths_stay_inside_the_buffers(length, windows):
    sinks = (0, 0, 2) if any(windows) else (0, 0, 0)
    arguments = make(Call(role="mixed", T=9, windows=windows, sinks=sinks, limit=30), torch.float32)
    guarded = [torch.full((4, 2, 14, 16), 7.0, device=DEVICE) for _ in range(4)]
    for s in guarded:
        s[1:3] = 1.0
    arguments[5:9] = [s[1:3] for s in guarded]
    arguments[9] = torch.tensor(length, dtype=torch.int32, device=DEVICE)
    arguments[-1] = "triton"
    o, _ = raw(*arguments)
    assert all((s[0] == 7).all() and (s[3] == 7).all() for s in guarded)
    assert o.isfinite().all()


def test_two_calls_equal_one():
    """However a stream is cut into calls: 5 target rows at once, or 2 and then 3."""
    whole = make(Call(T=5, rotary=16, length=((9, 30), (40, 3)), capacity=(50, 50)), torch.float32)
    o, lse, *_ = run(whole, "triton")
    parts, segments, length = [], whole[5:9], whole[9]
    for rows in (slice(0, 2), slice(2, 5)):
        cut = list(whole)
        cut[:3] = [x[:, :, rows] for x in whole[:3]]
        cut[3:5] = [x[:, rows] for x in whole[3:5]]
        cut[5:9], cut[9] = segments, length
        *out, segments, _ = run(cut, "triton")
        parts.append(out)
        length = length + torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device=DEVICE)
    assert (torch.cat([p[0] for p in parts], 2) - o).abs().max() < 1e-6
    assert (torch.cat([p[1] for p in parts], 2) - lse).abs().max() < 1e-6


def test_long_mixed_chunks_are_counted_ahead():
    """More rows than are counted at once, 1024."""
    call = Call(B=1, H=1, HK=1, T=1100, D=8, length=((3, 5),), capacity=(1200, 1200), role="mixed")
    arguments = make(call, torch.float16)
    want_o, want_lse, *_ = run([wide(x) for x in arguments], "reference")
    o, lse, *_ = run(arguments, "triton")
    assert (o - want_o).abs().max() < 3e-3 and (lse - want_lse).nan_to_num(0, neginf=0).abs().max() < 1e-3
