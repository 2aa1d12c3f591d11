"""Ways to prefill and decode a prompt with vision tokens: dense, pruned by us, and the paper's scheme in eager torch.

Weights are random, so what they would select means nothing. Every contender computes its scores in full, and then a
`Script` says what they were: the layers and the number of tokens that VisiPruner reports on average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu
from transformers.cache_utils import DynamicCache

from streamkernels import VisionPruning
from streamkernels.ops.token_scores import TokenScores
from streamkernels.pruning.scores import Probe

BEFORE, AFTER = 35, 13  # text tokens around the image: LLaVA-1.5's template and a short question
FIRST_PROBE, LAYER_THRESHOLD, TOKEN_THRESHOLD, EXIT_THRESHOLD = 7, 0.995, 0.2, 0.999


@dataclass(frozen=True)
class Script:
    """After layer `filter` so many vision tokens are `kept`, after layer `exit` none."""

    filter: int
    kept: int
    exit: int
    first_probe: int = FIRST_PROBE

    def schedule(self) -> dict[int, int]:
        return {self.filter: self.kept, self.exit: 0}

    def places(self, vision: int) -> list[int]:
        """Which of the vision tokens are kept: some from everywhere."""
        return [i * vision // self.kept for i in range(self.kept)]

    def scores(self, layer: int, listed: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cosine, norm) [width] of `listed` vision tokens, by which the thresholds decide as scripted."""
        cosine, norm = torch.ones(width, device=device), torch.zeros(width, device=device)
        if layer == self.filter:
            at = self.places(listed)
            cosine[at], norm[at] = 0.0, 1.0
        # two quiet layers: the second one is the exit
        if self.filter < layer < self.exit - 1:
            cosine[:listed] = 0.0
        return cosine, norm


@contextlib.contextmanager
def scripted(script: Script, vision: int) -> Iterator[None]:
    """Our scores are computed, and the script's are what is decided by. They exist beforehand: no launch is added."""
    honest, made = Probe.scores, {}

    def scores(probe: Probe) -> TokenScores:
        found = honest(probe)
        place = (probe.layer, probe.index.shape[1])
        if place not in made:
            listed = vision if probe.layer <= script.filter else script.kept
            cosine, norm = script.scores(probe.layer, listed, place[1], probe.index.device)
            made[place] = TokenScores(cosine[None], norm[None], found.mass)
        return made[place]

    with mock.patch.object(Probe, "scores", scores):
        yield


class Prompt:
    """Embeddings [B, T, C] of text around one image, and which tokens are vision."""

    def __init__(self, model: Any, batch: int, vision: int, seed: int = 0) -> None:
        table = model.get_input_embeddings().weight
        self.vision, self.T = vision, BEFORE + vision + AFTER
        generator = torch.Generator(table.device).manual_seed(seed)
        shape = (batch, self.T, table.shape[1])
        embeds = torch.empty(shape, dtype=table.dtype, device=table.device).normal_(generator=generator)
        self.embeds = embeds * table.std()
        self.mask = torch.zeros((batch, self.T), dtype=torch.bool, device=table.device)
        self.mask[:, BEFORE : BEFORE + vision] = True


class Dense:
    """The Hugging Face model, through its own forward, SDPA."""

    pruned = False

    def __init__(self, model: Any, prompt: Prompt) -> None:
        self.model, self.prompt, self.cache = model, prompt, DynamicCache()

    def prefill(self) -> Tensor:
        self.cache = DynamicCache()
        more = {"vision_mask": self.prompt.mask} if self.pruned else {}
        out = self.model(
            inputs_embeds=self.prompt.embeds, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **more
        )
        return out.logits[:, -1]

    def step(self, token: int) -> Tensor:
        ids = torch.tensor([[token]], device=self.prompt.embeds.device)
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def kv_bytes(self) -> int:
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))


class Pruned(Dense):
    """The same calls on a model whose vision tokens `prune_vision` drops."""

    pruned = True


class Paper:
    """VisiPruner as it was released (`custom_modeling_llama.py` of github.com/EIT-NLP/VisiPruner), middle and deep
    stages, which its command line uses: what it launches, copies and reads from the device, over a LLaMA's modules.

    Every layer has its full matrix of scores with an fp32 softmax. From layer 7 on, each layer of a prompt stores the
    contribution of every token, permuted and contiguous, and asks the host whether a cosine is below the threshold
    (`torch.any(...).item()`). The rotary tables are cut by the last position, which is read in every layer, as is the
    comparison that tells a prompt from a later token. Rows are dropped before the next layer, by an index on the hidden
    state and on the positions; the mask keeps its upper left corner. Keys grow by torch.cat. One sample.
    """

    def __init__(self, model: Any, prompt: Prompt, script: Script) -> None:
        self.text, self.head, self.prompt, self.script = model.model.language_model, model.lm_head, prompt, script
        config = self.text.config
        self.H, self.HK = config.num_attention_heads, config.num_key_value_heads
        device, dtype = prompt.embeds.device, prompt.embeds.dtype
        # transformers 4.37 keeps tables for all positions
        at = torch.arange(prompt.T + 4096, device=device)[None]
        self.cos, self.sin = (x[0] for x in self.text.rotary_emb(prompt.embeds, at))
        self.said = {
            layer: [x.to(dtype) for x in script.scores(layer, n, n, device)]
            for layer in range(script.first_probe, script.exit + 1)
            for n in [prompt.vision if layer <= script.filter else script.kept]
        }

    def prefill(self) -> Tensor:
        self.keys: list[tuple[Tensor, Tensor] | None] = [None] * len(self.text.layers)
        self.seen, self.kept, self.quiet = 0, None, 0
        return self.forward(self.prompt.embeds)

    def step(self, token: int) -> Tensor:
        ids = torch.tensor([[token]], device=self.prompt.embeds.device)
        return self.forward(self.text.embed_tokens(ids))

    def kv_bytes(self) -> int:
        return sum(x.nbytes for pair in self.keys if pair is not None for x in pair)

    def forward(self, hidden: Tensor) -> Tensor:
        n = hidden.shape[1]
        positions = torch.arange(self.seen, self.seen + n, device=hidden.device)[None]
        self.seen += n
        mask = torch.full((n, self.seen), torch.finfo(hidden.dtype).min, device=hidden.device, dtype=hidden.dtype)
        mask = mask.triu(self.seen - n + 1)[None, None]
        self.drop: Tensor | None = None
        for index, layer in enumerate(self.text.layers):
            if self.drop is not None:
                hidden, positions = hidden[:, self.drop], positions[:, self.drop]
                self.drop = None
            residual = hidden
            hidden = residual + self.attend(index, layer.self_attn, layer.input_layernorm(hidden), positions, mask)
            residual, mlp = hidden, layer.mlp
            hidden = layer.post_attention_layernorm(hidden)
            hidden = residual + mlp.down_proj(silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        return self.head(self.text.norm(hidden)).float()[:, -1]

    def attend(self, index: int, own: Any, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        B, n, _ = x.shape
        D = own.head_dim
        q = own.q_proj(x).view(B, n, self.H, D).transpose(1, 2)
        k = own.k_proj(x).view(B, n, self.HK, D).transpose(1, 2)
        v = own.v_proj(x).view(B, n, self.HK, D).transpose(1, 2)
        length = int(positions[0, -1].item()) + 1
        cos, sin = (table[:length][positions].unsqueeze(1) for table in (self.cos, self.sin))
        q, k = ((y * cos) + (half_turned(y) * sin) for y in (q, k))
        before = self.keys[index]
        if before is not None:
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        self.keys[index] = k, v
        k, v = (y.repeat_interleave(self.H // self.HK, 1) if self.H > self.HK else y for y in (k, v))
        weights = torch.matmul(q, k.transpose(2, 3)) / D**0.5
        weights = weights + mask[:, :, :n, : k.shape[2]]
        weights = weights.softmax(-1, dtype=torch.float32).to(q.dtype)
        if index >= self.script.first_probe:
            if bool(n == positions[0, -1] + 1) and self.kept is None:
                self.middle(index, weights, v)
            elif n > 1 and bool(n != positions[0, -1] + 1) and self.kept is not None and self.quiet < 2:
                self.deep(index, weights, v)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return own.o_proj(out.reshape(B, n, -1))

    def contributions(self, weights: Tensor, v: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """(cosine, norm) of the tokens [begin, end) to the last row's output, by what every token adds to it."""
        B, H, S, D = v.shape
        each = weights[:, :, -1, :, None] * v
        each = each.permute(0, 2, 1, 3).contiguous().view(B, S, H * D)
        whole = each.sum(1, keepdim=True)
        some = each[:, begin:end]
        return cosine_similarity(whole - some, whole, dim=-1), some.norm(dim=-1)

    def middle(self, index: int, weights: Tensor, v: Tensor) -> None:
        end = BEFORE + self.prompt.vision
        cosine, norm = self.contributions(weights, v, BEFORE, end)
        cosine, norm = self.replaced(index, cosine, norm)
        if torch.any(cosine < LAYER_THRESHOLD).item():
            self.kept = torch.where(norm.squeeze(0) > TOKEN_THRESHOLD)[0] + BEFORE
            n = weights.shape[2]
            text = [torch.arange(BEFORE, device=v.device), torch.arange(end, n, device=v.device)]
            self.drop = torch.cat([text[0], self.kept, text[1]])

    def deep(self, index: int, weights: Tensor, v: Tensor) -> None:
        kept = self.kept.shape[0]
        cosine, norm = self.contributions(weights, v, BEFORE, BEFORE + kept)
        cosine, norm = self.replaced(index, cosine, norm)
        if torch.all(cosine >= EXIT_THRESHOLD).item():
            self.quiet += 1
        if self.quiet == 2:
            rows = torch.arange(weights.shape[2], device=v.device)
            self.drop = torch.cat([rows[:BEFORE], rows[BEFORE + kept :]])

    def replaced(self, index: int, cosine: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        said = self.said[index]
        return said[0][None].expand_as(cosine), said[1][None].expand_as(norm)


def half_turned(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1), the halves of the last axis."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def dynamic(script: Script) -> VisionPruning:
    """The preset `fast` with the script's first probe."""
    return VisionPruning.fast(first_probe_layer=script.first_probe, when_unprofitable="ignore")


def fixed(script: Script, **options: Any) -> VisionPruning:
    """The same layers and numbers as a schedule."""
    return VisionPruning.fixed(script.schedule(), when_unprofitable="ignore", **options)


def keeping(script: Script, **options: Any) -> VisionPruning:
    """A schedule that drops nothing."""
    return VisionPruning.fixed({script.filter: 1.0}, when_unprofitable="ignore", **options)
