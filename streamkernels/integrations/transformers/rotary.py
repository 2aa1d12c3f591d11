"""The rotary description of a Hugging Face model, taken from the module that computes its cos and sin."""

from __future__ import annotations

from typing import Any

from ...core.positions import Rotary
from ...core.shapes import refuse

# the others choose frequencies by the largest position of a call
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_rope(op: str, base: Any, *, partial: bool = False) -> None:
    """Refuse a model whose rotary frequencies change from call to call, or that do not cover the whole head, unless
    `partial`: then the first dims of a head may be enough."""
    rotary = base.rotary_emb
    if rotary.rope_type not in STATIC_ROPE:
        refuse(
            op,
            "model",
            f"a rope type with fixed frequencies ({', '.join(STATIC_ROPE)})",
            f"{rotary.rope_type!r}, whose frequencies change with the largest position of each call, so that cached "
            "keys and later queries would disagree",
            NotImplementedError,
        )
    for index, layer in enumerate(base.layers):
        turned, D = 2 * rotary.inv_freq.numel(), layer.self_attn.head_dim
        if turned > D or (turned < D and not partial):
            got = f"{rotary.inv_freq.numel()} frequencies for a head dim of {D} in layer {index}"
            refuse(op, "model", "half as many rotary frequencies as the head dim", got, NotImplementedError)


def rotary_of(base: Any) -> Rotary:
    """How `base` (a base model that `patch` accepts) rotates its keys.

    The inverse frequencies and the attention scaling come from the model's own `rotary_emb`, so every static rope
    type (default, linear, llama3, yarn) is described exactly; the frequencies are read in fp32, as the model's
    forward reads them. Raises NotImplementedError for rope types whose frequencies change from call to call.
    """
    check_rope("rotary_of", base, partial=True)
    rotary = base.rotary_emb
    frequencies = tuple(rotary.inv_freq.detach().float().cpu().tolist())
    return Rotary(
        rotary_dim=2 * len(frequencies),
        inverse_frequency=frequencies,
        attention_scaling=float(rotary.attention_scaling),
        interleaved=False,
    )
