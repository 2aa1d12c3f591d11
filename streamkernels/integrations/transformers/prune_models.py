"""Which vision-language models `prune_vision` knows, as data, and the checks on one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration, InternVLModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLTextModel,
)

from ...core.shapes import MAX_HEAD_DIM, refuse
from ...pruning.report import ModelShape
from ._release import check_release
from .attention import NAME as PATCHED
from .rotary import STATIC_ROPE

OP = "prune_vision"
# what a forward that reads images or videos has; the last one since transformers 5.23, a dict by kind
PIXELS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


@dataclass(frozen=True)
class Family:
    """A model with its head, the base inside it, and the config's names of its vision tokens."""

    head: type[nn.Module]
    base: type[nn.Module]
    tokens: tuple[str, ...] = ("image_token_id",)


FAMILIES = (
    Family(LlavaForConditionalGeneration, LlavaModel),
    Family(LlavaNextForConditionalGeneration, LlavaNextModel),
    Family(Qwen2VLForConditionalGeneration, Qwen2VLModel, ("image_token_id", "video_token_id")),
    Family(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, ("image_token_id", "video_token_id")),
    Family(InternVLForConditionalGeneration, InternVLModel),
)
# the language models that they may hold: causal, full attention, one rotary table, nothing added between layers
TEXTS = {
    LlamaModel: LlamaAttention,
    MistralModel: MistralAttention,
    Qwen2Model: Qwen2Attention,
    Qwen2VLTextModel: Qwen2VLAttention,
    Qwen2_5_VLTextModel: Qwen2_5_VLAttention,
}
MROPE = (Qwen2VLTextModel, Qwen2_5_VLTextModel)
# why a class that somebody may well try is not among them
REASONS = {
    "Gemma3": "its image tokens attend in both directions, under masks that differ by layer",
    "PaliGemma": "its prompt attends in both directions",
    "Qwen3VL": "its first layers add vision features to rows of the whole prompt (deepstack)",
    "Qwen3Omni": "its first layers add vision features to rows of the whole prompt (deepstack)",
    "Granite4Vision": "its layers add vision features to rows of the whole prompt (deepstack)",
}


@dataclass(frozen=True)
class Parts:
    """head: the model with logits, or None; base: the vision-language model; text: its language model."""

    head: Any
    base: Any
    text: Any
    token_ids: tuple[int, ...]

    @property
    def mrope(self) -> bool:
        """Whether positions have three axes."""
        return isinstance(self.text, MROPE)


def parts_of(model: Any) -> Parts:
    """The parts of a model that `prune_vision` can prune. Raises NotImplementedError, with the reason, for others."""
    check_release(OP)
    inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    family = next((f for f in FAMILIES if isinstance(inner, (f.head, f.base))), None)
    name = type(inner).__name__
    if family is None:
        known = ", ".join(f.head.__name__ for f in FAMILIES)
        reason = next((f": {why}" for start, why in REASONS.items() if name.startswith(start)), "")
        refuse(OP, "model", f"one of {known}, or a wrapper of one with get_base_model()", name + reason,
               NotImplementedError)
    head = inner if isinstance(inner, family.head) else None
    base = inner.model if head is not None else inner
    for part, kind in ((head, family.head), (base, family.base)):
        if part is not None and (not isinstance(part, kind) or type(part).forward is not kind.forward):
            refuse(OP, "model", f"a {kind.__name__} with its own forward", type(part).__name__, NotImplementedError)
    text = base.language_model
    _check_text(text)
    ids = tuple(getattr(base.config, token) for token in family.tokens)
    return Parts(head, base, text, tuple(i for i in ids if i is not None))


def _check_text(text: Any) -> None:
    family = next((t for t in TEXTS if isinstance(text, t) and type(text).forward is t.forward), None)
    if family is None:
        known = ", ".join(t.__name__ for t in TEXTS)
        refuse(OP, "model", f"a language model out of {known}", type(text).__name__, NotImplementedError)
    attention = TEXTS[family]
    for index, layer in enumerate(text.layers):
        own = layer.self_attn
        if not isinstance(own, attention) or type(own).forward is not attention.forward:
            got = f"{type(own).__name__} in layer {index}"
            refuse(OP, "model", f"{attention.__name__} in every layer", got, NotImplementedError)
        window = getattr(own, "sliding_window", None)
        if family is MistralModel:
            window = getattr(own.config, "sliding_window", None)
        if window is not None:
            got = f"a window of {window} in layer {index}"
            refuse(OP, "model", "full attention in every layer (no sliding windows)", got, NotImplementedError)
        D = own.head_dim
        if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
            expected = f"a head dim that is a multiple of 8, at most {MAX_HEAD_DIM}"
            refuse(OP, "model", expected, f"{D}", NotImplementedError)
    if text.rotary_emb.rope_type not in STATIC_ROPE:
        expected = f"a rope type with fixed frequencies ({', '.join(STATIC_ROPE)})"
        refuse(OP, "model", expected, f"{text.rotary_emb.rope_type!r}", NotImplementedError)
    if text.config._attn_implementation == PATCHED:
        refuse(OP, "model", "a model that streamkernels.patch has not changed: undo that first", "a patched one")
    if len({p.device for layer in text.layers for p in layer.parameters()}) > 1:
        refuse(OP, "model", "all layers on one device", "layers on several", NotImplementedError)


def shape_of(text: Any) -> ModelShape:
    """The sizes from which the report counts multiplications and bytes."""
    config = text.config
    return ModelShape(
        layers=len(text.layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=text.layers[0].self_attn.head_dim,
    )


def reads_vision(named: dict[str, Any]) -> bool:
    """Whether a forward with these arguments reads images or videos."""
    given = [named.get(name) for name in PIXELS]
    return any(any(part is not None for part in x.values()) if isinstance(x, dict) else x is not None for x in given)


def of_generate() -> tuple[int | None, int]:
    """Of the `generate` that makes this forward, if any: its prefill_chunk_size, and how many tokens at the end of the
    prompt are guesses of assisted decoding or prompt lookup. Nothing in the arguments of a forward tells."""
    frame: Any = sys._getframe(1)
    chunk, guesses = None, 0
    while frame is not None:
        name, names = frame.f_code.co_name, frame.f_locals
        if name == "_prefill" and "generation_config" in names:
            chunk = names["generation_config"].prefill_chunk_size
        if name == "_assisted_decoding" and "candidate_length" in names:
            guesses = int(names["candidate_length"])
        frame = frame.f_back
    return chunk, guesses


def check_cache(cache: Any) -> None:
    """Refuse a cache whose layers do not keep keys in their order: windows, quantised keys, foreign classes."""
    if isinstance(cache, (DynamicCache, StaticCache)):
        odd = next((layer for layer in cache.layers if type(layer) not in (DynamicLayer, StaticLayer)), None)
        if odd is None:
            return
        got = f"one with a {type(odd).__name__}"
    else:
        got = type(cache).__name__
    refuse(OP, "past_key_values", "a DynamicCache or StaticCache of full layers", got, NotImplementedError)


def static_length(layer: Any) -> Any:
    """A 0-d tensor, the keys that a layer of a StaticCache holds; None for one of a DynamicCache."""
    return layer.cumulative_length.reshape(()) if isinstance(layer, StaticLayer) else None
