"""Rotary position embedding: frequencies, cos and sin of positions, and the one definition of the rotation.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864, section 3.4.2): pair i of
a head is turned by the angle `position * inverse_frequency[i]`. M-RoPE (Wang et al., "Qwen2-VL", arXiv 2409.12191,
section 2.1) has three positions per token (temporal, height, width) and gives each pair one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .shapes import FLOATS, check_int, check_number, refuse

LAYOUTS = ("chunked", "interleaved")


@dataclass(frozen=True)
class Rotary:
    """How the positions of a model turn its queries and keys. Immutable and hashable.

    rotary_dim: even number of leading head dims that are rotated, the rest passes through. inverse_frequency:
    rotary_dim / 2 numbers (radians per position), given as any sequence or tensor; linear, llama3 or YaRN scaling is
    whatever these numbers already contain. attention_scaling: factor on cos and sin (YaRN, Peng et al., arXiv
    2309.00071, section 3.4), applied once, when a key is first rotated. interleaved: pairs are (2i, 2i+1) instead of
    (i, i + rotary_dim/2). sections: pairs per axis (temporal, height, width), summing to rotary_dim / 2, for M-RoPE;
    section_layout "chunked" gives the axes consecutive runs of pairs (Qwen2-VL, Qwen2.5-VL), "interleaved" deals pairs
    out t h w t h w ... as long as h and w have pairs left, the rest to t (Qwen3-VL).

    Raises ValueError or TypeError for values that do not fit together.
    """

    rotary_dim: int
    inverse_frequency: tuple[float, ...]
    attention_scaling: float = 1.0
    interleaved: bool = False
    sections: tuple[int, ...] | None = None
    section_layout: str = "chunked"

    def __post_init__(self) -> None:
        op = "Rotary"
        check_int(op, "rotary_dim", self.rotary_dim, minimum=2)
        if self.rotary_dim % 2:
            refuse(op, "rotary_dim", "an even number", self.rotary_dim)
        given: object = self.inverse_frequency
        values = given.detach().double().cpu().tolist() if isinstance(given, Tensor) else list(self.inverse_frequency)
        if len(values) != self.rotary_dim // 2:
            refuse(op, "inverse_frequency", f"{self.rotary_dim // 2} numbers", f"{len(values)} numbers")
        object.__setattr__(
            self, "inverse_frequency", tuple(float(check_number(op, "inverse_frequency", f)) for f in values)
        )
        check_number(op, "attention_scaling", self.attention_scaling, positive=True)
        if self.section_layout not in LAYOUTS:
            refuse(op, "section_layout", " or ".join(LAYOUTS), self.section_layout)
        if self.sections is not None:
            sections = tuple(check_int(op, "sections", n) for n in self.sections)
            if len(sections) != 3 or sum(sections) != self.rotary_dim // 2:
                refuse(op, "sections", f"three counts that sum to rotary_dim / 2 = {self.rotary_dim // 2}", sections)
            object.__setattr__(self, "sections", sections)
            if (
                self.section_layout == "interleaved"
                and max(3 * sections[1] - 2, 3 * sections[2] - 1) >= self.rotary_dim // 2
            ):
                refuse(op, "sections", "h and w sections that fit, every third pair, into rotary_dim / 2", sections)

    @classmethod
    def from_theta(
        cls,
        head_dim: int,
        theta: float = 10000.0,
        rotary_dim: int | None = None,
        *,
        linear_factor: float = 1.0,
        interleaved: bool = False,
        sections: Sequence[int] | None = None,
        section_layout: str = "chunked",
    ) -> Rotary:
        """The usual frequencies `theta ** (-2 i / rotary_dim)`, divided by `linear_factor` (position interpolation,
        Chen et al., arXiv 2306.15595). rotary_dim defaults to head_dim. Computed in fp32 as Hugging Face does: models
        are trained with the rounded numbers.
        """
        check_int("Rotary.from_theta", "head_dim", head_dim, minimum=2)
        n = head_dim if rotary_dim is None else rotary_dim
        check_int("Rotary.from_theta", "rotary_dim", n, minimum=2, maximum=head_dim)
        check_number("Rotary.from_theta", "theta", theta, positive=True)
        check_number("Rotary.from_theta", "linear_factor", linear_factor, positive=True)
        exponents = torch.arange(0, n, 2, dtype=torch.int64).float() / n
        frequencies = 1.0 / (theta**exponents) / linear_factor
        axes = None if sections is None else tuple(sections)
        return cls(n, tuple(frequencies.tolist()), 1.0, interleaved, axes, section_layout)

    def cos_sin(
        self,
        positions: Tensor,
        *,
        offset: float = 0.0,
        target_rows: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        exact: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles of `positions`, times attention_scaling: two tensors [B, T, rotary_dim / 2] of
        `dtype`.

        positions: integers, fp32 or fp64, [B, T], or [3, B, T] (t, h, w) if there are sections; [B, T] then counts for
        all three axes. offset: a number added to the positions, possibly fractional (phi = 0.5), of the rows where
        `target_rows` (bool [B, T] or [1, T]) is true, of all rows if it is None. Ids stay integers up to here, since a
        position tensor in bf16 would lose them.

        exact=True (the default) forms the angle in fp64 and rounds cos and sin once, so that the phase between two
        neighbours is the same at position 3 and at position a million, and moving a cached key (`reanchor_cos_sin`) is
        the same as rotating it afresh. exact=False forms the angle in fp32, as Hugging Face does, and equals its tables
        bit for bit; that rounds the angle by up to 2**-25 of the next power of two: 3e-5 rad at position 1000, 0.03 rad
        at a million, where it is noise in every phase. At small positions the two agree to that error. dtype fp64 is
        always exact. A device without fp64 (mps) needs exact=False.
        """
        op = "Rotary.cos_sin"
        axes = self._check(op, positions)
        if dtype not in FLOATS:
            refuse(op, "dtype", "float16, bfloat16, float32 or float64", str(dtype), TypeError)
        check_number(op, "offset", offset)
        if target_rows is not None and (
            target_rows.dtype != torch.bool
            or tuple(target_rows.shape) not in (tuple(axes.shape[-2:]), (1, axes.shape[-1]))
        ):
            refuse(op, "target_rows", f"bool[{axes.shape[-2]} or 1, {axes.shape[-1]}]", target_rows)
        work = torch.float64 if exact or dtype == torch.float64 else torch.float32
        at = axes.to(work)
        if offset:
            at = at + offset if target_rows is None else torch.where(target_rows, at + offset, at)
        angle = self._angles(at)
        return (angle.cos() * self.attention_scaling).to(dtype), (angle.sin() * self.attention_scaling).to(dtype)

    def reanchor_cos_sin(
        self, delta: float | Sequence[float] | Tensor, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, rotary_dim / 2] of a move by `delta` positions: a pure rotation, without
        attention_scaling, which the cached key already contains. Rotating a key of position p by it gives the key of
        position p + delta, since the rotations of a plane add up.

        delta: a number (B = 1), [B] numbers, or [3, B] with sections. Angles are fp64; the result lies on delta's
        device.
        """
        op = "Rotary.reanchor_cos_sin"
        by = delta if isinstance(delta, Tensor) else torch.tensor(delta, dtype=torch.float64)
        by = by[None] if by.dim() == 0 else by
        self._check(op, by[..., None], "delta")
        angle = self._angles(by[..., None].double())
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _check(self, op: str, positions: Tensor, name: str = "positions") -> Tensor:
        kinds = (torch.int64, torch.int32, torch.float32, torch.float64)
        if not isinstance(positions, Tensor) or positions.dtype not in kinds:
            refuse(
                op,
                name,
                "int64, int32, float32 or float64 (half precision cannot hold positions)",
                positions,
                TypeError,
            )
        three = positions.dim() == 3 and positions.shape[0] == 3 and self.sections is not None
        if positions.dim() != 2 and not three:
            refuse(
                op,
                name,
                "shape [B, T]" + (" or [3, B, T]" if self.sections else ", there are no M-RoPE sections"),
                positions,
            )
        return positions

    def _angles(self, at: Tensor) -> Tensor:
        # [B, T, rotary_dim / 2]
        frequency = _tensor(self.inverse_frequency, at.dtype, at.device)
        angle = at[..., None] * frequency
        if at.dim() == 2:
            return angle
        axis = _tensor(self._axis_of_pair(), torch.int64, at.device)
        return angle.gather(0, axis.expand(1, *angle.shape[1:]))[0]

    def _axis_of_pair(self) -> tuple[int, ...]:
        """Which of the three positions turns pair i."""
        t, h, w = self.sections or (self.rotary_dim // 2, 0, 0)
        if self.section_layout == "chunked":
            return (0,) * t + (1,) * h + (2,) * w
        return tuple(i % 3 if i < 3 * (0, h, w)[i % 3] else 0 for i in range(t + h + w))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the leading dims of each head: the one definition of the rotation that all backends are held to.

    x: [B, H, T, D]; cos, sin: [B or 1, T or 1, rotary_dim / 2], rotary_dim <= D, fp32 or x's dtype. Pair (a, b) becomes
    `(a cos - b sin, b cos + a sin)`; a pair is (i, i + rotary_dim/2), or (2i, 2i+1) if interleaved; dims from
    rotary_dim on are copied. fp32 arithmetic with one rounding to x's dtype; fp64 stays fp64. Returns a new tensor of
    x's shape and dtype; differentiable.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim].to(work), x[..., rotary_dim:]
    # [B or 1, 1, T or 1, rotary_dim / 2]
    c, s = cos[:, None].to(work), sin[:, None].to(work)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    first, second = a * c - b * s, b * c + a * s
    out = torch.stack((first, second), dim=-1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1) if rest.shape[-1] else out.to(x.dtype)


def _tensor(values: tuple[float, ...] | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept_tensor(values, dtype, device)


@lru_cache(maxsize=64)
def _kept_tensor(values: tuple[float, ...] | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # one copy per device; not an inference tensor, whatever mode the first caller is in
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
