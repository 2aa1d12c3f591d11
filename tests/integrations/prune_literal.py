"""The never-dropping model: every row computed in every layer, dropping emulated by explicit masks, selection literal.

The Hugging Face model is unmodified and runs its own eager attention over the whole sequence without a cache. A key
that was dropped is masked for every row of the layers behind; the rules of shallow layers change the eager weights
after the softmax, as VisiPruner's code does; contributions are materialised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from streamkernels import VisionPruning

NAME = "literal_reference"


@dataclass
class Turn:
    """One prompt in the sequence: its rows [begin, end), the sample's vision tokens in it and its last real row."""

    begin: int
    end: int
    vision: Tensor  # bool [B, S]
    last: list[int]


class Literal:
    """One forward's plan and state."""

    def __init__(self, config: VisionPruning, layers: int, real: Tensor, turns: list[Turn]) -> None:
        self.config, self.layers, self.real, self.turns = config, layers, real, turns
        B = real.shape[0]
        self.dropped = torch.zeros_like(real)
        self.dropped_by = [self.dropped.clone() for _ in turns]  # by each prompt
        self.dropped_at = [self.dropped.clone() for _ in range(layers)]  # before each layer
        self.hits = [[0] * B for _ in turns]
        self.filtered = [[False] * B for _ in turns]
        self.cosines: list[float] = []
        self.norms: list[float] = []
        self.kept: list[tuple[int, int, int, list[int]]] = []  # (turn, layer, sample, kept keys)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        layer, (B, _, S, _) = module.layer_idx, q.shape
        self.dropped_at[layer] = self.dropped.clone()
        visible = torch.ones(S, S, dtype=torch.bool).tril() & self.real[:, None] & ~self._hidden()
        visible = visible | torch.eye(S, dtype=torch.bool)  # padding rows, whatever they give
        shallow = self.config.shallow[layer] if layer < len(self.config.shallow) else ("attend", "attend")
        skip = self._skipped(shallow, visible)
        mask = torch.zeros(B, 1, S, S, dtype=q.dtype).masked_fill(~(visible & ~skip)[:, None], torch.finfo(q.dtype).min)
        _, weights = eager_attention_forward(module, q, k, v, mask, scaling=scale)
        empty = ~(visible & ~skip).any(-1)  # a vision row that sees nothing gives 0
        weights = weights.masked_fill(empty[:, None, :, None], 0.0)
        weights = self._ruled(shallow, weights)
        values = repeat_kv(v, module.num_key_value_groups)
        for n, turn in enumerate(self.turns):
            for b in range(B):
                self._select(n, turn, b, layer, weights[b, :, turn.last[b]], values[b])
        return (weights @ values).transpose(1, 2).contiguous()

    def _hidden(self) -> Tensor:
        """bool [B, S or 1, S]: keys that were dropped; without compaction for the text since the latest prompt only."""
        if self.config.compaction:
            return self.dropped[:, None]
        B, S = self.real.shape
        out = torch.zeros(B, S, S, dtype=torch.bool)
        every = torch.stack([turn.vision for turn in self.turns]).any(0)
        for n, turn in enumerate(self.turns):
            end = self.turns[n + 1].begin if n + 1 < len(self.turns) else S
            out[:, turn.begin : end] = self.dropped_by[n][:, None] & ~every[:, turn.begin : end, None]
        return out

    def _rows(self, turn: Turn, b: int) -> tuple[Tensor, Tensor]:
        """bool [S]: the turn's own text rows, and its vision rows."""
        own = torch.zeros(self.real.shape[1], dtype=torch.bool)
        own[turn.begin : turn.end] = True
        return own & ~turn.vision[b], own & turn.vision[b]

    def _skipped(self, shallow: tuple[str, str], visible: Tensor) -> Tensor:
        skip = torch.zeros_like(visible)
        if shallow == ("attend", "attend"):
            return skip
        for turn in self.turns:
            for b in range(len(visible)):
                for rule, rows in zip(shallow, self._rows(turn, b), strict=True):
                    if rule == "skip":
                        skip[b] |= rows[:, None] & turn.vision[b]
                if not self.config.decode_sees_shallow:
                    later = torch.arange(visible.shape[1]) >= turn.end
                    skip[b] |= later[:, None] & turn.vision[b]
        return skip

    def _ruled(self, shallow: tuple[str, str], weights: Tensor) -> Tensor:
        weights = weights.clone()
        for turn in self.turns:
            for b in range(len(weights)):
                keys = turn.vision[b].nonzero()[:, 0]
                if not len(keys):
                    continue
                for rule, rows in zip(shallow, self._rows(turn, b), strict=True):
                    at = rows.nonzero()[:, 0]
                    ruled = keys[: len(keys) // 2] if rule == "mass_first_half" else keys
                    if rule in ("mass", "mass_first_half", "sink"):
                        gone = weights[b][:, at[:, None], ruled[None]].sum(-1)
                        weights[b][:, at[:, None], ruled[None]] = 0.0
                        if rule == "sink":
                            weights[b][:, at, keys[0]] = gone
        return weights

    def _select(self, n: int, turn: Turn, b: int, layer: int, weights: Tensor, values: Tensor) -> None:
        config = self.config
        vision = turn.vision[b]
        if not config.compaction:
            vision = torch.stack([t.vision[b] for t in self.turns[: n + 1]]).any(0)
        dropped = self.dropped[b] if config.compaction else self.dropped_by[n][b]
        keys = (vision & ~dropped).nonzero()[:, 0]
        if layer > self.layers - 2 or not vision.any():
            return
        contribution = (weights[:, :, None] * values).transpose(0, 1).flatten(1)  # [S, H D]
        o = contribution.sum(0)
        cosine = F.cosine_similarity(o - contribution[keys], o.expand(len(keys), -1), dim=-1)
        norm = contribution[keys].norm(dim=-1)
        if config.schedule is not None:
            if layer not in config.schedule:
                return
            k = config.schedule[layer]
            k = k if isinstance(k, int) else int(int(vision.sum()) * k)
            score = norm if config.score == "norm" else weights[:, keys].mean(0)
            if callable(config.score):  # the tests' only one: the first tokens stay
                score = -keys.float()
            best = sorted(range(len(keys)), key=lambda i: (-float(score[i]), i))[:k]
            self._keep(n, layer, b, keys, sorted(int(keys[i]) for i in best))
            return
        if layer < config.first_probe_layer or not len(keys):
            return
        if not self.filtered[n][b]:
            self.cosines += (cosine - config.layer_threshold).abs().tolist()
            if bool((cosine < config.layer_threshold).any()):
                self.norms += (norm - config.token_threshold).abs().tolist()
                self.filtered[n][b] = True
                self._keep(n, layer, b, keys, keys[norm > config.token_threshold].tolist())
            return
        self.cosines += (cosine - config.exit_threshold).abs().tolist()
        quiet = bool((cosine >= config.exit_threshold).all())
        self.hits[n][b] = self.hits[n][b] + 1 if quiet else 0 if config.consecutive else self.hits[n][b]
        if quiet and self.hits[n][b] >= config.exit_count:
            self._keep(n, layer, b, keys, [])

    def _keep(self, n: int, layer: int, b: int, keys: Tensor, kept: list[int]) -> None:
        for dropped in (self.dropped, self.dropped_by[n]):
            dropped[b, keys] = True
            dropped[b, kept] = False
        self.kept.append((n, layer, b, kept))


_current: list[Literal] = []


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    return _current[-1].attend(module, query, key, value, scaling), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@torch.no_grad()
def never_dropping(
    model: Any, inputs: dict[str, Any], config: VisionPruning, turns: list[Turn]
) -> tuple[Tensor, Literal]:
    """Logits [B, S, V] of the whole sequence, and what was dropped where."""
    text = model.model.language_model
    inputs = dict(inputs)
    real = inputs["attention_mask"].bool()
    if "mm_token_type_ids" not in inputs:
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    plan = Literal(config, len(text.layers), real, turns)
    before = text.config._attn_implementation_internal
    text.config._attn_implementation_internal = NAME
    _current.append(plan)
    hooks = []
    if config.positions == "renumbered":
        hooks = [layer.register_forward_pre_hook(_renumber(text, plan), with_kwargs=True) for layer in text.layers]
    try:
        return model(**inputs, use_cache=False).logits, plan
    finally:
        for hook in hooks:
            hook.remove()
        _current.pop()
        text.config._attn_implementation_internal = before


def _renumber(text: Any, plan: Literal) -> Any:
    """A row's position in a layer: how many tokens before it the layer still has."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        positions = ((plan.real & ~plan.dropped).long().cumsum(1) - 1).clamp(min=0)
        return args, {**kwargs, "position_embeddings": text.rotary_emb(args[0], position_ids=positions)}

    return hook
