"""How an op of `torch.library` gets its gradient.

`torch.library.register_autograd` does the same and costs more: it compares every argument with the schema's default,
at a price that grows with the square of their number (90 us a call for the 18 arguments of span_attention, more than
the kernel launch). Our schemas have no defaults and no keyword-only arguments, so there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_gradient(
    library: torch.library.Library,
    op: str,
    backward: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
) -> None:
    """Make `streamkernels::op`, whose schema has neither defaults nor keyword-only arguments, differentiable.

    `save(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs, which returns one gradient or None per
    argument of the op. Gradients of outputs that nothing depends on arrive as zeros.
    """
    overload = getattr(torch.ops.streamkernels, op).default

    def run(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    # the key set comes last, so that ctx.needs_input_grad counts as the op's arguments do
    def forward(ctx: Any, *inputs: Any) -> Any:
        *arguments, keyset = inputs
        output = run(keyset, tuple(arguments))
        if save is not None:
            save(ctx, tuple(arguments), output)
        return output

    def gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (*backward(ctx, *grads), None)

    function: Any = type(
        f"{op}_gradient",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(gradients)},
    )

    def dispatch(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments, keyset)
        return run(keyset, arguments)

    library.impl(op, dispatch, "Autograd", with_keyset=True)
