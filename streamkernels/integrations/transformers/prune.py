"""`prune_vision(model, config)`: vision tokens of a Hugging Face model dropped while the prompt runs, and the way back.

A pruned model differs from a stock one in four reversible ways: its modules hold a copy of their config that names our
attention for the language model, forward hooks sit on the head, the base, the language model and its layers, an
attribute remembers the handle, and, unless that is declined, the attention modules and norms of the language model have
forwards of their own, for generated tokens. Weights, classes, the model's forward, `generate` and every other model,
also one built from the same config object, stay as they are.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from ...core.shapes import refuse
from ...pruning.config import VisionPruning
from ...pruning.costs import verdict
from ...pruning.layout import VisionLayout
from ...pruning.report import Report
from ...pruning.stages import Stages
from .fused import bind, norm, norms_of, unbind, why_not
from .fused_layer import layers_of
from .prune_decode import Fuse, attention, layer
from .prune_forward import Pass
from .prune_hooks import NAME, PASS, LayerHook, after_text, before_head, empty, frozen, real_rows
from .prune_kept import KeptPass
from .prune_models import OP, Parts, of_generate, parts_of, reads_vision, shape_of
from .prune_report import report_of

_HANDLE = "_streamkernels_pruning"
DECODES = ("auto", "fused", "hf")


def prune_vision(model: nn.Module, config: VisionPruning | None = None, *, decode: str = "auto") -> PruneHandle:
    """Let `model` drop vision tokens while it reads a prompt, until the handle is undone.

    model: LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, Qwen2VLForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration, InternVLForConditionalGeneration, their bases (LlavaModel, ...), or a wrapper
    with `get_base_model()`, of transformers >= 5.4, < 6, in eval mode, on one device. config: default
    `VisionPruning.fast()`.

    A forward with `pixel_values` or `pixel_values_videos`, as `generate` makes its first, prunes: vision tokens are
    the tokens of `input_ids` that are the config's image (or video) token, wherever they stand. Callers with
    `inputs_embeds` pass `vision_mask=`, bool [B, T]. Dropped tokens are not computed any more, and the caches of later
    layers never hold them. Logits have the shape they had; those of dropped tokens are those of a zero hidden state.
    Batches, padding on any side, beams, DynamicCache and StaticCache, prompt lookup and further prompts on the same
    cache work as without.

    decode: how generated tokens are computed. "hf": as transformers does, through hooks alone. "fused": each layer
    rotates, appends and attends in one op of ours over what its cache kept, as do the layers of a first prompt that are
    left with at most 128 rows, and an RMS norm is one operation everywhere; a layer makes 14 launches instead of 40,
    which is what a token in eager mode costs. The cache remains a DynamicCache, with room for 128 more tokens (then for
    as many as were generated) behind its keys. Tokens that this cannot compute (static caches, autograd, autocast,
    graphs, prompts without compaction or with hidden keys, several prompts of samples of different lengths) are
    computed as under "hf", and the report says why. It refuses a model whose attention is not the one of the tested
    releases. "auto": "fused" where a kernel runs it and the model is known, else "hf".

    Returns a PruneHandle: a context manager with `undo()`, `report()` and `layout()`. Raises NotImplementedError for a
    model or release that is not supported, ValueError for one that is pruned already or in training mode or for a
    config that asks for layers which the model does not have; nothing is changed then. A forward raises for `labels`,
    `output_hidden_states`, `output_attentions`, 4-D masks, prompts with images in chunks, images without a cache, and
    for caches other than those two or not filled by the pruned model from their beginning; the cache is not to be used
    after such an error.
    """
    if config is None:
        config = VisionPruning()
    if not isinstance(config, VisionPruning):
        refuse(OP, "config", "a VisionPruning", config, TypeError)
    parts = parts_of(model)
    if _HANDLE in parts.text.__dict__:
        refuse(OP, "model", "a model that is not pruned yet", "one whose handle is not undone")
    if parts.text.training:
        refuse(OP, "model", "a model in eval mode (pruning is for inference)", "one in training mode")
    config.check_layers(OP, len(parts.text.layers))
    if config.positions == "renumbered" and parts.mrope:
        got = "'renumbered' for a model with M-RoPE, whose positions are not consecutive"
        refuse(OP, "config", "positions 'kept'", got, NotImplementedError)
    if decode not in DECODES:
        refuse(OP, "decode", " or ".join(map(repr, DECODES)), repr(decode))
    reason = "prune_vision was asked to (decode='hf')" if decode == "hf" else why_not(parts.text)
    if decode == "fused" and reason is not None:
        refuse(OP, "decode", "an attention that is known to the last letter", reason, NotImplementedError)
    return PruneHandle(model, parts, config, reason, decode == "fused")


class PruneHandle:
    """A pruned model's way back, and its report. As a context manager it undoes itself, also after an exception."""

    def __init__(
        self, model: nn.Module, parts: Parts, config: VisionPruning, why_not_fused: str | None, always: bool
    ) -> None:
        """why_not_fused: why generated tokens go the way of transformers; None if they need not. always: not even
        where no kernel runs them."""
        self.config = config
        self.why_not_fused = why_not_fused
        self._fuse = Fuse(parts.text, always) if why_not_fused is None else None
        self._fused: list[nn.Module] = []
        self._token: Pass | None = None
        self._parts: Parts | None = parts
        self._shape = shape_of(parts.text)
        self._hooks: list[RemovableHandle] = []
        self._configs: list[tuple[nn.Module, PreTrainedConfig, PreTrainedConfig]] = []
        self._copies: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = []
        # layouts on their way from the base's hook to the language model's, by thread
        self._waiting: dict[int, tuple[VisionLayout, int]] = {}
        self._last: tuple[Pass, int, str, int] | None = None
        self._warned = False
        self._names = {part: list(inspect.signature(part.forward).parameters) for part in (parts.base, parts.text)}
        try:
            self._name_attention(model)
            if self._fuse is not None:
                self._fused = bind((each.self_attn for each in parts.text.layers), attention)
                self._fused += bind(norms_of(parts.text), norm) + bind(layers_of(parts.text), layer)
            self._add_hooks()
            parts.text.__dict__[_HANDLE] = self
        except BaseException:
            self._restore()
            raise

    @property
    def active(self) -> bool:
        """Whether the model is still pruned by this handle."""
        return self._parts is not None

    def undo(self) -> None:
        """Take it all back: hooks and attribute are gone, every module holds its original config object. A second call
        does nothing. Settings changed on `model.config` meanwhile are carried over."""
        if self._parts is None:
            return
        try:
            for original, ours, before in self._copies:
                _carry_over(original, ours, before)
        finally:
            self._restore()

    def report(self) -> Report:
        """What the last prompt with vision tokens cost and saved. Copies a few numbers from the device. Raises
        ValueError if there was none yet."""
        if self._last is None or self._last[0].selects is None:
            refuse(OP, "report", "a forward with vision tokens before it", "none yet")
        decode = self._token.decoded if self._token is not None else "no token yet"
        return report_of(self._shape, self.config, *self._last, decode)

    def layout(self, vision_mask: Tensor, attention_mask: Tensor | None = None) -> VisionLayout:
        """The layout of a prompt, read from the device once, to be passed as `vision_mask=` to the language model (or
        the base) any number of times: forwards of the same layout under a fixed schedule then read nothing at all,
        and the language model's can be captured in a CUDA graph.

        vision_mask: bool [B, T]. attention_mask: [B, T], 0 at padding, or None.
        """
        real = None if attention_mask is None else attention_mask.bool()
        return VisionLayout.read(vision_mask, real, masks=bool(self.config.shallow))

    def __enter__(self) -> PruneHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"PruneHandle({type(self._parts.base).__name__ if self._parts is not None else 'undone'})"

    def _name_attention(self, model: nn.Module) -> None:
        """Every module of the model gets a copy of its config; the language model's copy names our attention."""
        parts = self._parts
        if parts is None:
            return
        memo: dict[int, Any] = {}
        owners = [m for m in dict.fromkeys([*model.modules(), *parts.base.modules()])
                  if isinstance(m.__dict__.get("config"), PreTrainedConfig)]
        for module in owners:
            original = module.__dict__["config"]
            # one memo: the copy of the whole config holds the very copy that the language model holds
            ours = copy.deepcopy(original, memo)
            if not any(known is original for known, _, _ in self._copies):
                self._copies.append((original, ours, copy.deepcopy(vars(ours))))
            self._configs.append((module, original, ours))
            module.__dict__["config"] = ours
        parts.text.config._attn_implementation_internal = NAME

    def _add_hooks(self) -> None:
        parts = self._parts
        if parts is None:
            return
        if parts.head is not None:
            self._hooks.append(parts.head.register_forward_pre_hook(before_head, with_kwargs=True))
        self._hooks.append(parts.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        self._hooks.append(parts.base.register_forward_hook(self._after_base, always_call=True))
        self._hooks.append(parts.text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        self._hooks.append(parts.text.register_forward_hook(after_text, with_kwargs=True))
        for index, each in enumerate(parts.text.layers):
            if each not in self._fused:  # else its forward does that
                self._hooks.append(each.register_forward_pre_hook(LayerHook(index), with_kwargs=True))

    def _restore(self) -> None:
        for hook in self._hooks:
            hook.remove()
        unbind(self._fused, attention, norm, layer)
        for module, original, ours in self._configs:
            if module.__dict__.get("config") is ours:
                module.__dict__["config"] = original
        for original, ours, _ in self._copies:
            # a copy that somebody else still holds must not name us any more
            ours._attn_implementation_internal = original._attn_implementation_internal
        if self._parts is not None:
            self._parts.text.__dict__.pop(_HANDLE, None)
        self._parts, self._hooks, self._configs, self._copies, self._waiting = None, [], [], [], {}
        self._names, self._fused, self._fuse = {}, [], None

    def _before_base(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {**dict(zip(self._names[module], args, strict=False)), **kwargs}
        given, ids = named.pop("vision_mask", None), named.get("input_ids")
        sees = reads_vision(named)
        embeds = named.get("inputs_embeds")
        like = ids if ids is not None else embeds
        if like is None or (like.shape[1] == 1 and not sees and given is None):
            return (), named
        if given is None and ids is not None and self._parts is not None:
            given = torch.isin(ids, torch.tensor(self._parts.token_ids, device=ids.device))
            if not sees:
                # generate's chunks come without pixels before transformers 5.23; prompt lookup may guess image tokens
                if not frozen() and empty(named.get("past_key_values")) and bool(given.any()):
                    expected = "a prompt with its pixel_values in one call (no prefill_chunk_size)"
                    refuse(OP, "input_ids", expected, "image tokens without pixel_values", NotImplementedError)
                return (), named
        if given is None and sees:
            refuse(OP, "vision_mask", "bool [B, T] beside inputs_embeds without input_ids", given)
        if given is None:
            return (), named
        chunk, guesses = (None, 0) if torch.compiler.is_compiling() else of_generate()
        if chunk is not None:
            got = f"{chunk}: the last token of the prompt selects for all of it"
            refuse(OP, "prefill_chunk_size", "None", got, NotImplementedError)
        if named.get("use_cache") is False:
            got = "use_cache=False, with which every generated token would select anew"
            refuse(OP, "use_cache", "a cache", got, NotImplementedError)
        layout = given if isinstance(given, VisionLayout) else VisionLayout(given)
        self._waiting[threading.get_ident()] = layout, guesses
        return (), named

    def _after_base(self, module: Any, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled step generates a token and leaves nothing waiting
            self._waiting.pop(threading.get_ident(), None)

    def _before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {**dict(zip(self._names[module], args, strict=False)), **kwargs}
        if module.training:
            refuse(OP, "model", "a model in eval mode (pruning is for inference)", "one in training mode")
        if module.config._attn_implementation != NAME:
            got = f"{module.config._attn_implementation!r}, set meanwhile"
            refuse(OP, "model", "the attention that prune_vision set, until its handle is undone", got)
        embeds = named.get("inputs_embeds")
        like = embeds if embeds is not None else named.get("input_ids")
        if like is None:
            return (), named
        B, T = like.shape[:2]
        given, guesses = named.pop("vision_mask", None), 0
        if given is None and T > 1:
            given, guesses = self._waiting.pop(threading.get_ident(), (None, 0))
        elif isinstance(given, Tensor):
            given = VisionLayout(given)
        real = real_rows(named.get("attention_mask"), T) if T > 1 or given is not None else None
        for option in ("output_hidden_states", "output_attentions"):
            if named.get(option):
                refuse(OP, option, "False: layers differ in their rows and keep no weights", True, NotImplementedError)
        if guesses and real is not None:
            if not bool(real.all()):
                got = "padding, in a prompt that comes with guesses (assisted decoding, prompt lookup)"
                refuse(OP, "attention_mask", "a mask of ones", got, NotImplementedError)
            real = None
        step, reads, text = self._pass(module.rotary_emb, given, real, B, T, like.device, guesses)
        step.fuse = self._fuse
        if not isinstance(named.get("attention_mask"), dict):
            # a 4-D mask goes through transformers as it is: no search for packed sequences, which reads the device
            named["attention_mask"] = torch.empty((0, 0, 0, 0), device=like.device)
        if given is not None or isinstance(step, KeptPass):
            self._last, self._token = (step, reads, text, module.dtype.itemsize), None
        elif T == 1:
            self._token = step
            # `Fuse` says it better where it is asked
            step.decoded = f"as in transformers: {self.why_not_fused or 'a StaticCache, or a traced step'}"
        return (), {**named, PASS: step}

    def _pass(
        self,
        rotary: Any,
        given: VisionLayout | None,
        real: Tensor | None,
        B: int,
        T: int,
        device: torch.device,
        guesses: int,
    ) -> tuple[Pass, int, str]:
        """What this forward is, how often the device was read for that, and what the cost table said."""
        config, layers, reads, text = self.config, self._shape.layers, 0, "not asked"
        stages: Stages | None = None
        # guesses that assisted decoding has checked are no prompt
        kept = not config.compaction and T > 1 and (given is not None or frozen() or not of_generate()[1])
        if given is None and T > 1 and (kept or (real is not None and (frozen() or not bool(real.all())))):
            given = VisionLayout(torch.zeros((B, T), dtype=torch.bool, device=device), real)
            stages = Stages(config, layers, given, False)
            sees = False
        elif given is not None:
            sees, active = True, False
            layout, reads = self._layout(given, real, B, T)
            if not kept:
                active, text = self._decide(layout, device, B, T)
            stages = Stages(config, layers, layout, active, guesses)
        if kept:
            return KeptPass(config, layers, B, T, rotary, stages, sees=sees), reads, text
        return Pass(config, layers, B, T, rotary, stages), reads, text

    def _layout(self, given: VisionLayout, real: Tensor | None, B: int, T: int) -> tuple[VisionLayout, int]:
        """The layout with what the host must know of it, and how often the device was read for that."""
        if tuple(given.vision.shape) != (B, T):
            refuse(OP, "vision_mask", f"bool [{B}, {T}], one for each row of the call", given.vision)
        if given.counts is not None:
            return given, 0
        if given.real is None and real is not None:
            given = VisionLayout(given.vision, real.to(given.vision.device))
        if not self.config.reads_layout or not self.config.compaction:
            if given.real is None or frozen() or not bool(given.real.all()):
                return given, int(given.real is not None and not frozen())
            # a mask of ones, as generate brings it, would make every layer look for empty rows
            return VisionLayout(given.vision), 1
        if frozen():
            got = "a mask while a CUDA graph is captured, which cannot be read"
            refuse(OP, "vision_mask", "a layout from handle.layout(...)", got)
        return VisionLayout.read(given.vision, given.real, masks=bool(self.config.shallow)), 1

    def _decide(self, layout: VisionLayout, device: torch.device, B: int, T: int) -> tuple[bool, str]:
        """Whether to prune, by the cost table, and what it said."""
        if self.config.when_unprofitable == "ignore":
            return True, "not asked"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        most = T if layout.counts is None else max((v for _, v in layout.counts), default=0)
        said = verdict(self.config, self._shape, name, B, T, most, captured=frozen())
        if said.profitable is not False:
            return True, said.text
        if self.config.when_unprofitable == "off":
            return False, f"{said.text}; ran dense"
        if not self._warned:
            warnings.warn(f"{OP}: pruning this prompt does not pay: {said.text}", stacklevel=2)
            self._warned = True
        return True, said.text


def _carry_over(original: PreTrainedConfig, ours: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Write to `original` what was changed on our copy since `before`."""
    for name, value in vars(ours).items():
        if isinstance(value, PreTrainedConfig) or name == "_attn_implementation_internal":
            continue
        if name not in before or before[name] != value:
            original.__dict__[name] = value
    for name in before.keys() - vars(ours).keys():
        original.__dict__.pop(name, None)
