"""`patch(model)`: our attention in one Hugging Face model, and its exact undoing.

A patched model differs from a stock one in three reversible ways: its modules hold a copy of their config that names
our attention, its base model has one forward pre-hook, and an attribute remembers the handle; in a fourth when it is
fused: each attention module has a forward of its own. Weights, classes and every other model, also one built from the
same config object, stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from ...core.shapes import refuse
from .attention import NAME
from .fused import attention, bind, norm, norms_of, unbind, why_not
from .fused_layer import layer, layers_of
from .model import base_of, check_supported
from .request import admit
from .windows import MEANINGS

_HANDLE = "_streamkernels_handle"


def patch(
    model: nn.Module, *, fused: bool | str = False, window: str = "position", require_spans: bool = False
) -> Handle:
    """Let `model` attend through streamkernels until the handle is undone.

    model: a CausalLM of Llama, Qwen2 (and 2.5), Qwen3, Mistral, Gemma2 or Phi3, its base model, or a wrapper with
    `get_base_model()` (PEFT), of transformers >= 5.4, < 6; wrap it in PEFT before or after. Only this instance changes.
    Its forward then takes

    - `spans=` int32 [B, T, N, 2], N in 1, 2, 4, 8: the half-open key intervals that each token sees, over the one
      buffer of this call's keys (after those of a DynamicCache, if there is one). Differentiable; a padding mask
      hides keys on top of it.
    - `past_key_values=GroupedCache`, with `role=` (int8 [B, T] of SOURCE, TARGET, PADDING, or one int),
      `position_ids=` (required) and `source_limit=` (int32 [B, T], how much of the source a target token sees): one
      streaming step, to be committed or discarded. A 2-D `attention_mask` [B, T] turns its zeros into PADDING.
    - neither: plain causal attention as the stock model's, sliding windows included, with DynamicCache or none, with
      2-D padding masks of any shape.

    `position_ids` reach RoPE and nothing else: restarting, offset or gapped positions never act as packing.
    Fractional ones may be fp32.

    fused: in a streaming step hand unrotated q, k, v with cos, sin and the cache to one op that rotates, writes and
    attends, by a forward of our own on each attention module (its projections and norms are called as modules, so
    adapters work). Outside of autograd and torch.compile an RMS norm is one operation then, and a step goes through its
    layers without the calls of modules that nobody watches. True refuses a model whose forward or rotation is not the
    one of the tested releases; "auto" then goes without, and `handle.why_not_fused` says why.

    require_spans: refuse a forward in training that has neither spans nor a GroupedCache, as when the Hugging Face
    Trainer drops a column that the model's forward does not name.

    window: what a sliding window of the model means under spans and with a GroupedCache: "position", keys less than the
    window behind by position id, or "index", the last keys of those that a token sees. By position, the positions of
    each segment must increase from key to key (a GroupedCache on a GPU takes that on trust, since looking would wait
    for the device). Plain causal attention counts keys, as the stock model does.

    Returns a Handle (a context manager with `undo()`). Raises NotImplementedError for a model, release or option that
    is not supported and ValueError for a model that is patched already; nothing is changed then.
    """
    base = base_of("patch", model)
    if _HANDLE in base.__dict__:
        by_session = base.__dict__[_HANDLE].borrowers is not None
        way_out = "an open StreamSession: close it first" if by_session else "patch: undo its handle first"
        refuse("patch", "model", "a model that is not patched yet", f"one patched by {way_out}")
    if window not in MEANINGS:
        refuse("patch", "window", " or ".join(map(repr, MEANINGS)), repr(window))
    if fused not in (True, False, "auto"):
        refuse("patch", "fused", "True, False or 'auto'", repr(fused))
    check_supported("patch", base)
    reason = why_not(base) if fused else "patch was not asked to (fused=True)"
    if fused is True and reason is not None:
        refuse("patch", "fused", "an attention that is known to the last letter", reason, NotImplementedError)
    return Handle(model, base, require_spans, window, reason)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a patched model, or None."""
    handle: Handle | None = base_of("handle_of", model).__dict__.get(_HANDLE)
    return handle


def borrow(model: nn.Module, fused: bool | str = False) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Have `model` patched until released: (whether it still is, release). A patch that exists is shared, fused or not;
    one made here is undone by its last borrower's release."""
    handle = handle_of(model)
    if handle is None:
        handle = patch(model, fused=fused)
        handle.borrowers = 0
    if handle.borrowers is not None:
        handle.borrowers += 1
    return (lambda: handle.active), _Release(handle)


class _Release:
    """Gives a borrowed patch back, once."""

    def __init__(self, handle: Handle) -> None:
        self._handle: Handle | None = handle

    def __call__(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None and handle.borrowers is not None:
            handle.borrowers -= 1
            if not handle.borrowers:
                handle.undo()


class Handle:
    """A patched model's way back. As a context manager it undoes itself at the end, also after an exception."""

    def __init__(
        self,
        model: nn.Module,
        base: Any,
        require_spans: bool = False,
        window: str = "position",
        why_not_fused: str | None = "",
    ) -> None:
        self.borrowers: int | None = None  # sessions that share it, if a session made it
        self._base: Any | None = base
        self._require_spans, self.window = require_spans, window
        self.why_not_fused = why_not_fused  # None when it is fused
        self._fused: list[nn.Module] = []
        self._hook: RemovableHandle | None = None
        self._parameters = list(inspect.signature(base.forward).parameters)
        # (module, its config, our copy); and per config (it, our copy, the copy's first state)
        self._modules: list[tuple[nn.Module, PreTrainedConfig, PreTrainedConfig]] = []
        self._pairs: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = []
        copies: dict[int, PreTrainedConfig] = {}
        try:
            for module in _owners(model, base):
                original = module.__dict__["config"]
                if id(original) not in copies:
                    ours = copies[id(original)] = copy.deepcopy(original)
                    self._pairs.append((original, ours, copy.deepcopy(vars(ours))))
                    ours._attn_implementation = NAME
                self._modules.append((module, original, copies[id(original)]))
                module.__dict__["config"] = copies[id(original)]
            if why_not_fused is None:
                self._fused = bind((each.self_attn for each in base.layers), attention)
                self._fused += bind(norms_of(base), norm) + bind(layers_of(base), layer)
            self._hook = base.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            base.__dict__[_HANDLE] = self
        except BaseException:
            self._restore()
            raise

    @property
    def fused(self) -> bool:
        """Whether streaming steps rotate, write and attend in one op."""
        return self.why_not_fused is None

    @property
    def active(self) -> bool:
        """Whether the model is still patched by this handle."""
        return self._base is not None

    def undo(self) -> None:
        """Take the patch back: every module holds its original config object, hook and attribute are gone. A second
        call does nothing. Settings that were changed on `model.config` meanwhile (not the attention implementation)
        are carried over to the original config, as they would have been on a stock model.
        """
        if self._base is None:
            return
        try:
            for original, ours, before in self._pairs:
                _carry_over(original, ours, before)
        finally:
            self._restore()

    def _restore(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        unbind(self._fused, attention, norm, layer)
        for module, original, ours in self._modules:
            if module.__dict__.get("config") is ours:
                module.__dict__["config"] = original
        for original, ours, _ in self._pairs:
            # a copy that somebody else still holds (a wrapper made while patched) must not name us any more
            ours._attn_implementation_internal = original._attn_implementation_internal
        if self._base is not None:
            self._base.__dict__.pop(_HANDLE, None)
        self._base, self._hook, self._modules, self._pairs, self._fused = None, None, [], [], []

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Handle({type(self._base).__name__ if self._base is not None else 'undone'})"

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        return (), admit(module, named, require_spans=self._require_spans, window=self.window)


def _owners(model: nn.Module, base: Any) -> list[nn.Module]:
    """The modules that hold a config of the base model: its own, and those of the heads and wrappers around it."""
    configs = {
        id(m.__dict__["config"]) for m in base.modules() if isinstance(m.__dict__.get("config"), PreTrainedConfig)
    }
    seen = dict.fromkeys([*model.modules(), *base.modules()])
    return [m for m in seen if id(m.__dict__.get("config")) in configs]


def _carry_over(original: PreTrainedConfig, ours: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Write to `original` what was changed on our copy since `before`."""
    for name, value in vars(ours).items():
        if name != "_attn_implementation_internal" and (name not in before or before[name] != value):
            original.__dict__[name] = value
    for name in before.keys() - vars(ours).keys():
        original.__dict__.pop(name, None)
