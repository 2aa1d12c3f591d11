"""Generated tokens of a pruned model: each layer is one op over what its cache kept, instead of a rotation, two
concatenations and an attention.

The keys stay in the DynamicCache, whose tensors become views of buffers with room behind them: `incremental_prefill`
writes a token's key there and attends, and the view gets longer by one. What happens to the cache between two tokens
(beams reordered, guesses cropped, another prompt) leaves other tensors in it, which are moved to new buffers then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...backends.select import Call, choose
from ...core.segments import allocate
from ...core.shapes import refuse
from ...core.staging import TARGET, Staged
from ...ops.incremental_prefill import Options, attend
from ...pruning.keys import Keys
from .fused import linear
from .fused_layer import through
from .prune_forward import Pass
from .prune_fresh import FEW, ROOM, Fresh, Halves
from .prune_hooks import PASS, before_layer, frozen
from .prune_models import OP


class Decode:
    """The buffers of one cache, for tokens that every sample of it generates.

    A layer's keys are [prompt ; generated]: prompt keys are the op's source segment, of which a sample has
    lengths[layer, b, 0], what is behind them its target segment; both lie in one buffer [B, HK, room, D].
    """

    def __init__(
        self, text: Any, cache: Any, known: list[Keys], backend: str, room: int, made: dict[int, Any]
    ) -> None:
        """known: the keys of each layer, as `Fuse` has approved them. made: layers whose keys have room already."""
        first = cache.layers[0].keys
        self.device, self.dtype, self.backend = first.device, first.dtype, backend
        self.left = self.room = room
        self.begun = False
        self._halves = Halves(text, first.dtype)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths = _lengths(cache, known)
        status = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._staged, self._buffers, self._options = [], [], []
        for layer, (own, keys) in enumerate(zip(cache.layers, known, strict=True)):
            B, HK, S, D = own.keys.shape
            k, v, buffers = made.get(layer, (None, None, ()))
            if own.keys is not k or own.values is not v or buffers[0].shape[2] != S + room:
                buffers = allocate((2, B, HK, S + room, D), self.dtype, self.device).unbind(0)
                for buffer, held in zip(buffers, (own.keys, own.values), strict=True):
                    buffer[:, :, :S].copy_(held)
            begin = _prompt(keys, S)
            (source_k, target_k), (source_v, target_v) = ((b[:, :, :begin], b[:, :, begin:]) for b in buffers)
            length, rings = self._lengths[layer], (None, None)
            self._staged.append(
                Staged(source_k, source_v, target_k, target_v, length, status, None, TARGET, False, 0, rings, None)
            )
            scale = text.layers[layer].self_attn.scaling
            self._options.append(Options(None, None, None, (0, 0), float(scale), 0.0, False, backend))
            self._buffers.append(buffers)
            self._keys.append(own.keys)
            self._values.append(own.values)
            self._grow(own, layer, S)

    def _grow(self, own: Any, layer: int, length: int) -> None:
        """What the cache's layer holds, now so many keys."""
        k, v = self._buffers[layer]
        own.keys = self._keys[layer] = k.narrow(2, 0, length)
        own.values = self._values[layer] = v.narrow(2, 0, length)

    def begin(self, cache: Any) -> bool:
        """Whether one more token fits behind what the cache holds, and that is what the last token left."""
        held = zip(cache.layers, self._keys, self._values, strict=True)
        if not all(own.keys is k and own.values is v for own, k, v in held):
            return False
        if self.begun:
            got = "one in which a token has failed half way"
            refuse(OP, "past_key_values", "a cache whose layers have all seen the same calls", got)
        self.begun = self.left > 0
        return self.begun

    def attend(self, module: Any, cache: Any, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The attention of one layer for x [B, 1, C], before its output projection: [B, 1, H * D]."""
        cos, sin = self._halves.of(angles)
        layer, B, D = module.layer_idx, x.shape[0], module.head_dim
        # one row: the heads of [B, 1, H * D] are [B, H, 1, D] as they are
        parts = module._modules
        q, k, v = (linear(parts[name], x).view(B, -1, 1, D) for name in ("q_proj", "k_proj", "v_proj"))
        o, _ = attend(q, k, v, cos, sin, None, self._staged[layer], self._options[layer])
        self._grow(cache.layers[layer], layer, self._keys[layer].shape[2] + 1)
        return o.view(B, 1, -1)

    def commit(self) -> None:
        """After the last layer: the token belongs to all of them."""
        self._lengths[:, :, TARGET].add_(1)
        self.left -= 1
        self.begun = False


def attention(self: Any, *args: Any, **kwargs: Any) -> Any:
    """One layer's attention of a pruned model; every call that is no generated token goes to the class's own
    forward."""
    step: Pass | None = kwargs.get(PASS)
    angles = kwargs.get("position_embeddings")
    if step is None or step.decode is None or angles is None:
        return type(self).forward(self, *args, **kwargs)
    x = args[0] if args else kwargs["hidden_states"]
    return linear(self.o_proj, step.decode.attend(self, step.cache, x, angles)), None


def layer(self: Any, *args: Any, **kwargs: Any) -> Any:
    """One decoder layer of a pruned model: `before_layer`, and a generated token or few rows go `through`."""
    index = self._modules["self_attn"].layer_idx
    changed = before_layer(index, args, kwargs)
    if changed is not None:
        args, kwargs = changed
    step: Pass | None = kwargs.get(PASS)
    if step is not None and len(args) == 1:
        angles, out = kwargs["position_embeddings"], None
        if step.decode is not None:
            out = through(self, args[0], lambda own, x: step.decode.attend(own, step.cache, x, angles), attention)
        elif step.fresh is not None and step.fresh.takes(step, index, args[0].shape[1]):
            out = through(self, args[0], lambda own, x: step.fresh.attend(step, own, x, angles), attention)
        if out is not None:
            return out
    return type(self).forward(self, *args, **kwargs)


class Fuse:
    """What a pruned model's generated tokens ask before their first layer."""

    def __init__(self, text: Any, always: bool) -> None:
        """always: also where only the reference would run."""
        self._text, self._always = text, always

    def __call__(self, ledger: Any, cache: Any, known: list[Keys]) -> tuple[Decode | None, str]:
        """The buffers for this token, or None and why it goes the way of transformers."""
        if frozen():
            return None, "as in transformers: a CUDA graph is captured, or torch.compile traces"
        if torch.is_grad_enabled():
            return None, "as in transformers: autograd is on (torch.no_grad() turns it off)"
        decode: Decode | None = ledger.decode
        if decode is None or torch.is_autocast_enabled(decode.device.type) or not decode.begin(cache):
            reason, backend = self._look(cache, known)
            if reason is not None:
                ledger.decode = None
                return None, f"as in transformers: {reason}"
            room = ROOM if decode is None or decode.left else 2 * decode.room
            decode = ledger.decode = Decode(self._text, cache, known, backend, room, ledger.made)
            ledger.made = {}
            decode.begin(cache)
        return decode, f"fused ({decode.backend})"

    def prompt(self, step: Pass, cache: Any) -> Fresh | None:
        """For the layers of few rows of a prompt on an empty cache; None where transformers computes them all."""
        text = self._text
        if step.stages is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            return None
        kinds: set[Any] = {type(layer) for layer in cache.layers}
        if (kinds or {getattr(cache, "layer_class_to_replicate", None)}) != {DynamicLayer}:
            return None
        if torch.is_autocast_enabled(text.device.type):
            return None
        own, config = text.layers[0].self_attn, text.config
        sizes = {"B": step.B, "H": config.num_attention_heads, "HK": config.num_key_value_heads, "T": FEW}
        call = Call("incremental_prefill", text.device, text.dtype, sizes | {"D": own.head_dim})
        try:
            # its launch is the shorter one, also where Triton's kernel is the faster one
            backend = choose(call, "cuda")
        except NotImplementedError:
            backend = choose(call, "auto")
        return None if backend == "reference" and not self._always else Fresh(text, cache, backend)

    def _look(self, cache: Any, known: list[Keys]) -> tuple[str | None, str]:
        """Why not, if so, and which backend."""
        if any(type(layer) is not DynamicLayer for layer in cache.layers) or getattr(cache, "offloading", False):
            return "the cache is no DynamicCache that stays on its device", ""
        for keys in dict.fromkeys(known):
            if keys.kept is not None:
                return "the cache holds keys that generated tokens do not see", ""
            if len(keys.runs) > 1 or (keys.runs and keys.runs[0][0]):
                return "the cache holds several prompts of samples of different lengths", ""
        text, first = self._text, cache.layers[0].keys
        if torch.is_autocast_enabled(first.device.type):
            return "autocast is on", ""
        held = {(layer.keys.dtype, layer.keys.device) for layer in cache.layers}
        if held != {(text.dtype, text.device)}:
            return f"the cache holds {first.dtype} on {first.device}, the model is {text.dtype} on {text.device}", ""
        (B, HK, _, D), H = first.shape, text.config.num_attention_heads
        call = Call("incremental_prefill", first.device, first.dtype, {"B": B, "H": H, "HK": HK, "T": 1, "D": D})
        backend = choose(call, "auto")
        if backend == "reference" and not self._always:
            return f"no kernel of streamkernels runs it ({first.dtype} on {first.device}, head dim {D})", ""
        return None, backend


def _prompt(keys: Keys, S: int) -> int:
    """The keys of the source segment: the one block that samples fill differently, or all there are."""
    return keys.begin if keys.runs else S


def _lengths(cache: Any, known: list[Keys]) -> Tensor:
    """int32 [layers, B, 2]."""
    first, table = cache.layers[0].keys, torch.zeros((len(known), 2), dtype=torch.int32)
    for layer, (own, keys) in enumerate(zip(cache.layers, known, strict=True)):
        S = own.keys.shape[2]
        begin = _prompt(keys, S)
        table[layer, 0], table[layer, 1] = begin, S - begin
    with torch.inference_mode(False):
        lengths = table.to(first.device)[:, None].repeat(1, first.shape[0], 1)
    for keys in dict.fromkeys(known):
        if keys.runs:
            same = [layer for layer, other in enumerate(known) if other is keys]
            lengths[same, :, 0] = keys.runs[0][1].to(torch.int32)
    return lengths
