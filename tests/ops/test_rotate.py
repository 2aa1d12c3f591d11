"""`rotate` and `reanchor`: against the textbook, gradients, registration, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from streamkernels.core.positions import Rotary
from streamkernels.ops.reanchor import reanchor
from streamkernels.ops.rotate import rotate
from streamkernels.testing.compare import assert_exact

B, H, T, D = 2, 3, 17, 16
ops = torch.ops.streamkernels


def draw(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(rotary_dim: int = D, rows: int = 1, dtype=torch.float64, T: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(rows)[:, None] * 3 + torch.arange(T)
    return Rotary.from_theta(D, rotary_dim=rotary_dim).cos_sin(ids, dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, D])
def test_each_pair_turns_by_its_angle(rotary_dim, interleaved):
    x = draw(B, H, T, D)
    out = rotate(x, *angles(rotary_dim, B), interleaved=interleaved)
    for b, h, t, i in [(0, 0, 0, 0), (1, 2, 16, 0), (1, 1, 5, rotary_dim // 2 - 1)]:
        angle = (3 * b + t) * float(torch.tensor(10000.0) ** (-2 * i / rotary_dim))
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary_dim // 2)
        turned = complex(x[b, h, t, first], x[b, h, t, second]) * complex(math.cos(angle), math.sin(angle))
        assert abs(turned - complex(out[b, h, t, first], out[b, h, t, second])) < 1e-6
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])
    assert_exact("lengths stay", out.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding(dtype):
    x = draw(B, H, T, D, dtype=dtype)
    wide = angles(dtype=torch.float32)
    out = rotate(x, *wide)
    assert out.dtype == dtype and out.is_contiguous()
    want = rotate(x.float(), *wide)
    assert torch.equal(out, want.to(dtype))
    narrow = [a.to(dtype) for a in wide]
    assert torch.equal(rotate(x, *narrow), rotate(x.float(), *(a.float() for a in narrow)).to(dtype))


def test_strided_inputs():
    wide = torch.full((B, T, 2 * H, D + 8), float("nan"), dtype=torch.float64)
    x = wide[:, :, 1::2, :D].transpose(1, 2)
    x.copy_(draw(B, H, T, D))
    cos, sin = (torch.stack([a, a], 1)[:, 1] for a in angles(rows=B))
    assert torch.equal(rotate(x, cos, sin), rotate(x.contiguous(), *angles(rows=B)))
    assert rotate(x[:, :, :0], cos[:, :0], sin[:, :0]).shape == (B, H, 0, D)


def test_gradients():
    x = draw(1, 2, 3, 8).requires_grad_()
    cos, sin = Rotary.from_theta(8, rotary_dim=6).cos_sin(torch.arange(3)[None] + 2, dtype=torch.float64)
    for interleaved in (False, True):
        # a scale in cos and sin, as YaRN has, is part of the map
        fn = lambda x, i=interleaved: rotate(x, 1.3 * cos, 1.3 * sin, interleaved=i)  # noqa: E731
        assert torch.autograd.gradcheck(fn, x)
        assert torch.autograd.gradgradcheck(fn, x)
    with pytest.raises(NotImplementedError, match="rotate: cos: expected a constant"):
        rotate(x, cos.clone().requires_grad_(), sin)
    with pytest.raises(NotImplementedError, match="rotate: cos, sin: expected constants"):
        ops.rotate(x, cos.clone().requires_grad_(), sin, False, "reference")


def test_rotate_is_registered():
    x = draw(B, H, T, D, dtype=torch.float32).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(ops.rotate.default, (x, *angles(6, dtype=torch.float32), True, "reference"))


def test_compiles_once_for_two_lengths_and_can_be_checkpointed():
    step = torch.compile(lambda x, c, s: rotate(x, c, s).square(), fullgraph=True, backend="aot_eager", dynamic=True)
    policy = lambda ctx, op, *a, **k: (  # noqa: E731
        CheckpointPolicy.MUST_SAVE if op == ops.rotate.default else CheckpointPolicy.PREFER_RECOMPUTE
    )
    for n in (5, 9):
        x = draw(B, H, n, D).requires_grad_()
        cos, sin = angles(T=n)
        plain = torch.autograd.grad(rotate(x, cos, sin).square().sum(), x)[0]
        assert_exact("compiled", torch.autograd.grad(step(x, cos, sin).sum(), x)[0], plain)
        out = checkpoint(
            lambda x, c=cos, s=sin: rotate(x, c, s).square(), x, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip
        assert_exact("checkpointed", torch.autograd.grad(out.sum(), x)[0], plain)


@pytest.mark.parametrize("interleaved", [False, True])
def test_reanchoring_equals_a_fresh_rotation(interleaved):
    rotary = Rotary(6, (1.0, 0.3, 0.01), attention_scaling=1.2, interleaved=interleaved)
    x, ids = draw(B, H, T, D), torch.arange(T)[None].expand(B, T)
    keys = rotate(x, *rotary.cos_sin(ids, dtype=torch.float64), interleaved=interleaved)
    delta = torch.tensor([-4.0, 1000.5])
    out = reanchor(keys, *rotary.reanchor_cos_sin(delta, dtype=torch.float64), interleaved=interleaved)
    assert out is None
    moved = rotary.cos_sin(ids + delta[:, None].double(), dtype=torch.float64)
    assert_exact("moved", keys, rotate(x, *moved, interleaved=interleaved))


def test_reanchor_in_pieces_on_a_slice(monkeypatch):
    import streamkernels.reference.attend_rows as attend

    keys, cos_sin = draw(B, H, T, D), angles()
    want = rotate(keys[:, :, 4:], *(a[:, 4:] for a in cos_sin))
    before = keys.clone()
    monkeypatch.setattr(attend, "CHUNK_ELEMENTS", {"cpu": 3 * B * H * D})
    version = keys._version
    reanchor(keys[:, :, 4:], *(a[:, 4:] for a in cos_sin))
    assert torch.equal(keys[:, :, 4:], want) and torch.equal(keys[:, :, :4], before[:, :, :4])
    assert keys._version > version


def test_reanchor_is_registered():
    torch.library.opcheck(ops.reanchor.default, (draw(B, H, T, D), *angles(), False, "reference"))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def move(x, cos, sin):
        reanchor(x, cos, sin)
        return x + 1

    x, y = draw(B, H, T, D), draw(B, H, T, D)
    out = move(x, *angles())
    reanchor(y, *angles())
    assert torch.equal(x, y) and torch.equal(out, y + 1)


X = draw(B, H, T, D)
BAD = {
    "x_type": (dict(x=[1.0]), TypeError, "x: expected a tensor"),
    "x_shape": (dict(x=X[0]), ValueError, "x: expected shape"),
    "x_dtype": (dict(x=X.long()), TypeError, "x: expected float16 or"),
    "x_stride": (dict(x=draw(B, H, D, T).mT), ValueError, "x: expected last stride 1"),
    "x_head_dim": (dict(x=draw(B, H, T, 12)), ValueError, "x: expected a head dim D that is a multiple of 8"),
    "cos_rows": (dict(cos=angles(T=5)[0]), ValueError, r"cos: expected shape \[1\|B, T, A\]"),
    "cos_batch": (dict(cos=angles(rows=3)[0]), ValueError, "cos: expected shape"),
    "cos_wide": (dict(cos=draw(1, T, D), sin=draw(1, T, D)), ValueError, "an even rotary_dim in"),
    "cos_empty": (dict(cos=draw(1, T, 0), sin=draw(1, T, 0)), ValueError, "an even rotary_dim in"),
    "cos_dtype": (dict(cos=angles(dtype=torch.bfloat16)[0]), TypeError, "cos: expected float32 or float64"),
    "sin_width": (dict(sin=angles(4)[1]), ValueError, "sin: expected shape"),
    "sin_dtype": (dict(sin=angles(dtype=torch.float32)[1]), ValueError, "sin: expected the shape and dtype of cos"),
    "sin_batch": (dict(sin=angles(rows=B)[1]), ValueError, "sin: expected the shape and dtype of cos"),
    "sin_device": (dict(sin=angles()[1].to("meta")), ValueError, "sin: expected a tensor on cpu"),
    "sin_none": (dict(sin=None), TypeError, "sin: expected a tensor"),
    "backend": (dict(backend="fast"), ValueError, "backend: expected one of"),
    "cuda": (dict(backend="cuda"), NotImplementedError, "backend='cuda' cannot run this call"),
}


@pytest.mark.parametrize("op", [rotate, reanchor])
@pytest.mark.parametrize("case", BAD)
def test_errors(case, op):
    changes, error, text = BAD[case]
    cos, sin = angles()
    call = {"x": X.clone(), "cos": cos, "sin": sin, **changes}
    before = call["x"].clone() if isinstance(call["x"], torch.Tensor) else None
    with pytest.raises(error, match=text) as raised:
        op(call["x"], call["cos"], call["sin"], backend=call.get("backend", "auto"))
    assert str(raised.value).startswith(op.__name__ + ": ")
    assert before is None or torch.equal(call["x"], before)


def test_reanchor_refuses_keys_with_a_gradient():
    with pytest.raises(ValueError, match="reanchor: x: expected keys without a gradient"):
        reanchor(X.clone().requires_grad_(), *angles())
