"""The only tolerances of the project, and the influence test.

A result in a low precision is measured against the truth in fp64, with what plain PyTorch makes of the same inputs in
the same precision as the yardstick: in no row may it be further off than twice the largest error of plain PyTorch, or 4
units in the last place of the row's largest value where that is more; and over the whole tensor, root mean square, not
further than twice plain PyTorch, or 2 such units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ERROR_RATIO = 2.0
ROW_ULPS = 4.0
RMS_ULPS = 2.0
EXACT = 1e-10


def assert_accurate(
    name: str,
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    terms: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise AssertionError unless `ours` is as accurate as the rule demands. `exact` is fp64, rows are the last dim.

    Where `exact` is not finite (lse = -inf), `ours` must be the same. `terms`, shaped as `exact`: for a sum whose terms
    cancel, the sum of their absolute values; the units in the last place are then those of its row's largest. `dtype`:
    that of the summed numbers, if it is not that of the sum.
    """
    if exact.dtype != torch.float64:
        raise TypeError(f"assert_accurate: exact: expected float64, got {exact.dtype}")
    if ours.shape != exact.shape or plain.shape != exact.shape:
        raise AssertionError(
            f"{name}: shapes differ: {list(ours.shape)}, plain {list(plain.shape)}, exact {list(exact.shape)}"
        )
    if not exact.numel():
        return
    finite = torch.isfinite(exact)
    _same_where_not_finite(name, ours, exact, finite)
    truth = exact.where(finite, 0.0)
    error = (ours.double().where(finite, 0.0) - truth).abs()
    plain_error = (plain.double().where(finite, 0.0) - truth).abs()
    row_ulp = ulp((truth if terms is None else terms).abs().amax(-1), dtype or ours.dtype)
    limit = (ROW_ULPS * row_ulp).clamp(min=ERROR_RATIO * float(plain_error.max()))
    row_error = error.amax(-1)
    worst = int((row_error / limit).argmax())
    if not bool((row_error <= limit).all()):
        at = [int(i) for i in torch.unravel_index(torch.tensor(worst), row_error.shape)]
        got, allowed = float(row_error.flatten()[worst]), float(limit.flatten()[worst])
        largest = float(plain_error.max())
        raise AssertionError(f"{name}: row {at}: error {got:.3g}, allowed {allowed:.3g} (plain PyTorch {largest:.3g})")
    rms, allowed = _rms(error), max(ERROR_RATIO * _rms(plain_error), RMS_ULPS * _rms(row_ulp))
    if not rms <= allowed:
        raise AssertionError(f"{name}: root mean square error {rms:.3g}, allowed {allowed:.3g}")


def assert_exact(name: str, ours: Tensor, exact: Tensor) -> None:
    """Raise AssertionError unless two fp64 results agree to 1e-10 (relative where above 1), -inf at the same places."""
    if ours.dtype != torch.float64 or exact.dtype != torch.float64 or ours.shape != exact.shape:
        raise AssertionError(f"{name}: {ours.dtype} {list(ours.shape)}, expected {exact.dtype} {list(exact.shape)}")
    if not exact.numel():
        return
    finite = torch.isfinite(exact)
    _same_where_not_finite(name, ours, exact, finite)
    truth = exact.where(finite, 0.0)
    error = float(((ours.where(finite, 0.0) - truth).abs() / truth.abs().clamp(min=1.0)).max())
    if not error <= EXACT:
        raise AssertionError(f"{name}: error {error:.3g}, allowed {EXACT:g}")


def influence(
    fn: Callable[[Tensor], Tensor], x: Tensor, *, token_dim: int = -2, row_dim: int = -2, seed: int = 0
) -> Tensor:
    """bool [B, rows, tokens]: does changing token j of x change row i of fn(x), at all?

    The first dim of x and of fn(x) is the batch. One call of `fn` per token; every number of the token is replaced.
    Rows are compared bit by bit, NaN equal to NaN, so a False means that nothing flows.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = fn(x).movedim(row_dim, 1).flatten(2)
        columns = []
        for j in range(x.shape[token_dim]):
            other = x.clone()
            token = other.select(token_dim, j)
            token.add_(1.0 + torch.rand(token.shape, generator=random).to(token))
            after = fn(other).movedim(row_dim, 1).flatten(2)
            same = (after == before) | (after.isnan() & before.isnan())
            columns.append(~same.all(-1))
    return torch.stack(columns, -1) if columns else before.new_zeros((*before.shape[:2], 0), dtype=torch.bool)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from |x| to the next larger number of `dtype`, in fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


def _same_where_not_finite(name: str, ours: Tensor, exact: Tensor, finite: Tensor) -> None:
    odd = ours.double()[~finite]
    same = (odd == exact[~finite]) | (odd.isnan() & exact[~finite].isnan())
    if not bool(same.all()) or not bool(torch.isfinite(ours[finite]).all()):
        raise AssertionError(f"{name}: NaN or infinity at other places than expected")


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
