"""What to tell torch.compile, so that a step of one token reads the weights at nearly the memory's speed."""

from __future__ import annotations

# `torch.compile(model, fullgraph=True, options=STEP_OPTIONS)`: six kernels a layer beside our attention, the same in
# every layer, so that many layers take hardly longer to compile than two
STEP_OPTIONS: dict[str, bool | int] = {
    # a product with one row is a reduction that takes what follows along (bias, SiLU, residual), its tiles searched for
    "coordinate_descent_tuning": True,
    # what a product reads is computed before it, once: not anew in front of every row of weights
    "realize_opcount_threshold": 3,
    # the projections of q, k and v are one launch
    "combo_kernels": True,
    # a kernel starts while the one before it ends; without effect before Hopper
    "triton.enable_pdl": True,
}
