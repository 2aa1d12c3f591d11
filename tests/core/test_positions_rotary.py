"""cos, sin and the rotation, against loops over single pairs in Python's floats, and against Hugging Face's tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from streamkernels.core.positions import Rotary, apply_rotary, grouped_positions

torch.set_num_threads(1)
torch.manual_seed(0)


def loop_axis(i: int, sections: tuple[int, int, int], layout: str) -> int:
    """Which axis turns pair i: runs of pairs, or dealt t, h, w while h and w have pairs left."""
    if layout == "chunked":
        return 0 if i < sections[0] else 1 if i < sections[0] + sections[1] else 2
    left = {1: sections[1], 2: sections[2]}
    for at in range(i + 1):
        axis = at % 3
        if axis and left[axis]:
            left[axis] -= 1
        else:
            axis = 0
    return axis


def loop_rotate(x: Tensor, angles: list[list[float]], scale: float, interleaved: bool) -> Tensor:
    """x: [T, D] in fp64; angles[t][i] in Python floats."""
    out = x.clone()
    for t, row in enumerate(angles):
        n = len(row)
        for i, angle in enumerate(row):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
            c, s = math.cos(angle) * scale, math.sin(angle) * scale
            out[t, a] = float(x[t, a]) * c - float(x[t, b]) * s
            out[t, b] = float(x[t, b]) * c + float(x[t, a]) * s
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("D", "rotary_dim"), [(8, 8), (24, 16), (16, 2)])
def test_rotation_equals_the_loop(interleaved: bool, D: int, rotary_dim: int) -> None:
    rotary = Rotary.from_theta(D, 100.0, rotary_dim, interleaved=interleaved)
    rotary = Rotary(rotary_dim, rotary.inverse_frequency, attention_scaling=1.25, interleaved=interleaved)
    positions = torch.tensor([[0, 1, 5, 5, 3, 10**6, 17]])
    cos, sin = rotary.cos_sin(positions, dtype=torch.float64)
    assert cos.shape == (1, 7, rotary_dim // 2)
    # strided heads, last stride 1
    x = torch.randn(2, 7, 3, D, dtype=torch.float64).transpose(1, 2)
    got = apply_rotary(x, cos, sin, interleaved)
    angles = [[p * f for f in rotary.inverse_frequency] for p in positions[0].tolist()]
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(got[b, h], loop_rotate(x[b, h], angles, 1.25, interleaved), rtol=0, atol=1e-9)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    cos, sin = Rotary.from_theta(16).cos_sin(torch.arange(17)[None])
    x = torch.randn(1, 2, 17, 16).to(dtype)
    exact = apply_rotary(x.double(), cos, sin)
    got = apply_rotary(x, cos, sin)
    assert got.dtype == dtype
    # fp32 arithmetic may sit on the other side of a tie, but never further than that
    ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert bool(((got.double() - exact).abs() <= 0.5 * ulp + 1e-6).all())


def test_rotation_has_gradients() -> None:
    cos, sin = Rotary.from_theta(8, rotary_dim=4).cos_sin(torch.tensor([[3, 1]]), dtype=torch.float64)
    x = torch.randn(1, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: apply_rotary(y, cos, sin), x)
    assert torch.autograd.gradcheck(lambda y: apply_rotary(y, cos, sin, True), x)


def test_a_fractional_offset_moves_the_target_rows_alone() -> None:
    rotary = Rotary.from_theta(8)
    p = grouped_positions([[2, 1], [1]], [[2], [2]], offset=100.5)
    cos, sin = rotary.cos_sin(p.ids, offset=p.offset, target_rows=p.target_rows, dtype=torch.float64)
    for b, row in enumerate([[0, 1, 2, 100.5, 101.5], [0, 100.5, 101.5, 102.5, 103.5]]):
        for t, position in enumerate(row):
            for i, f in enumerate(rotary.inverse_frequency):
                assert float(cos[b, t, i]) == pytest.approx(math.cos(position * f), abs=1e-12)
                assert float(sin[b, t, i]) == pytest.approx(math.sin(position * f), abs=1e-12)
    everywhere, _ = rotary.cos_sin(torch.tensor([[1]]), offset=0.5, dtype=torch.float64)
    assert float(everywhere[0, 0, 0]) == pytest.approx(math.cos(1.5), abs=1e-12)


@pytest.mark.parametrize(
    ("layout", "sections"), [("chunked", (2, 3, 3)), ("interleaved", (4, 2, 2)), ("interleaved", (3, 3, 2))]
)
def test_mrope_gives_each_pair_its_axis(layout: str, sections: tuple[int, int, int]) -> None:
    rotary = Rotary.from_theta(16, 100.0, sections=sections, section_layout=layout)
    positions = torch.randint(0, 50, (3, 2, 5))
    cos, sin = rotary.cos_sin(positions, dtype=torch.float64)
    for b in range(2):
        for t in range(5):
            for i, f in enumerate(rotary.inverse_frequency):
                angle = int(positions[loop_axis(i, sections, layout), b, t]) * f
                assert float(cos[b, t, i]) == pytest.approx(math.cos(angle), abs=1e-12)
                assert float(sin[b, t, i]) == pytest.approx(math.sin(angle), abs=1e-12)
    # one number per token stands for all three axes
    same = torch.arange(4)[None]
    assert torch.equal(rotary.cos_sin(same)[0], rotary.cos_sin(same.expand(3, 1, 4))[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("delta", [1.0, -3.0, 0.5, -1e6])
def test_reanchoring_is_a_fresh_rotation_elsewhere(delta: float, interleaved: bool) -> None:
    """With a position scale of 1.3, which must not be applied a second time."""
    rotary = Rotary(8, Rotary.from_theta(8).inverse_frequency, 1.3, interleaved)
    x, positions = (
        torch.randn(2, 1, 4, 16, dtype=torch.float64),
        torch.tensor([[5.0, 0.0, 2.5, 1e6]], dtype=torch.float64),
    )
    key = apply_rotary(x, *rotary.cos_sin(positions, dtype=torch.float64), interleaved)
    per_session = torch.tensor([delta, 0.0])
    moved = apply_rotary(key, *rotary.reanchor_cos_sin(per_session, dtype=torch.float64), interleaved)
    fresh = apply_rotary(x, *rotary.cos_sin(positions + delta, dtype=torch.float64), interleaved)
    torch.testing.assert_close(moved[0], fresh[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(moved[1], key[1], rtol=0, atol=1e-12)
    assert rotary.reanchor_cos_sin(delta)[0].shape == (1, 1, 4)


def test_reanchoring_on_three_axes() -> None:
    rotary = Rotary.from_theta(16, sections=(2, 3, 3))
    x, at = torch.randn(2, 1, 4, 16, dtype=torch.float64), torch.randint(0, 9, (3, 2, 4))
    delta = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [10.0, 7.0]], dtype=torch.float64)
    moved = apply_rotary(
        apply_rotary(x, *rotary.cos_sin(at, dtype=torch.float64)), *rotary.reanchor_cos_sin(delta, dtype=torch.float64)
    )
    fresh = apply_rotary(x, *rotary.cos_sin(at + delta[..., None], dtype=torch.float64))
    torch.testing.assert_close(moved, fresh, rtol=0, atol=1e-9)


def test_a_million_positions_on_the_phase_between_neighbours_is_as_good_as_at_the_start() -> None:
    rotary = Rotary.from_theta(64)
    x = torch.randn(1, 1, 2, 64, dtype=torch.float64)

    def score(at: int, exact: bool) -> float:
        q, k = apply_rotary(x, *rotary.cos_sin(torch.tensor([[at + 3, at]]), exact=exact))[0, 0]
        return float(q @ k)

    truth = score(0, True)
    assert abs(score(10**6, True) - truth) < 1e-5
    # what the flag costs: fp32 angles are noisy there
    assert abs(score(10**6, False) - truth) > 1e-4


def test_small_positions_agree_with_fp32_angles() -> None:
    rotary, positions = Rotary.from_theta(64), torch.arange(512)[None]
    for exact, fp32 in zip(rotary.cos_sin(positions), rotary.cos_sin(positions, exact=False), strict=True):
        assert 0 < float((exact - fp32).abs().max()) < 3e-5


class TestHuggingFace:
    """Bit for bit with exact=False; imports transformers, which the core does not."""

    @pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}])
    def test_llama_tables(self, rope: dict[str, Any]) -> None:
        pytest.importorskip("transformers")
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

        theta = 5000.0
        config = LlamaConfig(
            hidden_size=64, num_attention_heads=2, rope_parameters={"rope_theta": theta, **rope}, num_hidden_layers=1
        )
        theirs, rotary = (
            LlamaRotaryEmbedding(config),
            Rotary.from_theta(32, theta, linear_factor=rope.get("factor", 1.0)),
        )
        ids = torch.tensor([[0, 1, 2, 3, 1000, 77], [9, 9, 8, 131071, 5, 0]])
        cos, sin = theirs(torch.zeros(1), ids)
        ours = rotary.cos_sin(ids, exact=False)
        assert torch.equal(ours[0], cos[..., :16]) and torch.equal(ours[1], sin[..., :16])
        q = torch.randn(2, 3, 6, 32)
        expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
        torch.testing.assert_close(apply_rotary(q, *ours), expected, rtol=0, atol=1e-6)

    def test_yarn_tables_from_outside(self) -> None:
        pytest.importorskip("transformers")
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
        config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=yarn)
        theirs = LlamaRotaryEmbedding(config)
        rotary = Rotary(32, theirs.inv_freq, theirs.attention_scaling)  # type: ignore[arg-type]
        assert rotary.attention_scaling > 1
        ids = torch.arange(200)[None]
        cos, sin = theirs(torch.zeros(1), ids)
        ours = rotary.cos_sin(ids, exact=False)
        assert torch.equal(ours[0], cos[..., :16]) and torch.equal(ours[1], sin[..., :16])

    @pytest.mark.parametrize(
        ("family", "layout", "sections"), [("qwen2_vl", "chunked", (4, 6, 6)), ("qwen3_vl", "interleaved", (6, 5, 5))]
    )
    def test_mrope_tables(self, family: str, layout: str, sections: tuple[int, int, int]) -> None:
        transformers = pytest.importorskip("transformers")
        name = {"qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VLText"}[family]
        try:
            module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
            made = getattr(module, f"{name}RotaryEmbedding")
            config_type = getattr(
                transformers, {"qwen2_vl": "Qwen2VLTextConfig", "qwen3_vl": "Qwen3VLTextConfig"}[family]
            )
        except (ImportError, AttributeError) as error:
            pytest.skip(f"this transformers has no {name}: {error}")
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
        config = config_type(
            hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32, rope_parameters=rope
        )
        ids = torch.randint(0, 300, (3, 2, 7))
        cos, sin = made(config)(torch.zeros(1), ids)
        if cos.dim() == 4:
            pytest.skip("this transformers leaves the three axes to its attention")
        ours = Rotary.from_theta(32, sections=sections, section_layout=layout).cos_sin(ids, exact=False)
        assert torch.equal(ours[0], cos[..., :16]) and torch.equal(ours[1], sin[..., :16])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Rotary(7, (1.0,) * 3), ValueError, "rotary_dim"),
        (lambda: Rotary(8, (1.0,) * 3), ValueError, "inverse_frequency"),
        (lambda: Rotary(2, (float("inf"),)), ValueError, "inverse_frequency"),
        (lambda: Rotary(2, (1.0,), 0.0), ValueError, "attention_scaling"),
        (lambda: Rotary(8, (1.0,) * 4, sections=(1, 1, 1)), ValueError, "sections"),
        (lambda: Rotary(8, (1.0,) * 4, sections=(0, 2, 2), section_layout="interleaved"), ValueError, "sections"),
        (lambda: Rotary(2, (1.0,), section_layout="mixed"), ValueError, "section_layout"),
        (lambda: Rotary.from_theta(8, rotary_dim=16), ValueError, "rotary_dim"),
        (lambda: Rotary.from_theta(8).cos_sin(torch.zeros(1, 2, dtype=torch.bfloat16)), TypeError, "positions"),
        (lambda: Rotary.from_theta(8).cos_sin(torch.zeros(3, 1, 2)), ValueError, "no M-RoPE sections"),
        (lambda: Rotary.from_theta(8).cos_sin(torch.zeros(2)), ValueError, "positions"),
        (lambda: Rotary.from_theta(8).cos_sin(torch.zeros(1, 2), dtype=torch.int32), TypeError, "dtype"),
        (
            lambda: Rotary.from_theta(8).cos_sin(torch.zeros(1, 2), target_rows=torch.ones(2, 2).bool()),
            ValueError,
            "target_rows",
        ),
        (lambda: Rotary.from_theta(8).reanchor_cos_sin(torch.zeros(3, 2)), ValueError, "delta"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_rotary_is_a_value() -> None:
    given = Rotary(4, torch.tensor([1.0, 0.1]))  # type: ignore[arg-type]
    assert given == Rotary(4, (1.0, float(torch.tensor(0.1)))) and hash(given) == hash(
        Rotary(4, given.inverse_frequency)
    )


def test_traced_by_torch_compile() -> None:
    rotary = Rotary.from_theta(16, sections=(2, 3, 3))

    def rotate(x: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        return apply_rotary(x, *rotary.cos_sin(ids, offset=0.5, target_rows=rows))

    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    for T in (3, 5):
        x, ids, rows = torch.randn(1, 2, T, 16), torch.randint(0, 9, (3, 1, T)), torch.arange(T)[None] > 1
        torch.testing.assert_close(compiled(x, ids, rows), rotate(x, ids, rows))


def test_kept_frequencies_are_no_inference_tensors() -> None:
    rotary = Rotary.from_theta(24, 31.0)
    with torch.inference_mode():
        rotary.cos_sin(torch.arange(3)[None])
    x = torch.randn(1, 1, 3, 24, requires_grad=True)
    apply_rotary(x, *rotary.cos_sin(torch.arange(3)[None])).sum().backward()
    assert x.grad is not None
