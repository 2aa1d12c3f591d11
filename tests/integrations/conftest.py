"""Tiny Hugging Face models whose logits really depend on positions and visibility."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from streamkernels.core.spans import from_limits
from streamkernels.testing.compare import EXACT

VOCAB = 67
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def make(
    family="qwen2", *, layers=2, dtype=torch.float64, attention="sdpa", config=None, vocab=VOCAB, sharpen=3, **options
):
    """A random model in eval mode. Query and key weights are tripled: nearly uniform attention would hide wrong masks
    and positions.

    `sharpen=1` for tests of influence, in which every visible key must weigh more than a rounding error.
    """
    kind, model_class = FAMILIES[family]
    if config is None:
        config = kind(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=None,
            attn_implementation=attention,
            **options,
        )
    torch.manual_seed(0)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= sharpen
            layer.self_attn.k_proj.weight *= sharpen
    return model


def tokens(*shape, seed=0, vocab=VOCAB):
    """Random ids that are neither end nor padding."""
    return torch.randint(2, vocab, shape, generator=torch.Generator().manual_seed(seed))


def agree(a, b, tolerance=EXACT):
    """Assert that `a` is `b` up to `tolerance`, of b's largest value where that is above 1."""
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


@pytest.fixture
def close():
    return agree


@pytest.fixture
def one_shot():
    """Logits (of the source rows, of the target rows) of one sample [source | target] in one stock forward.

    Under streaming spans with these limits (a 4-D mask, which stock attention takes as it is) and grouped positions.
    """

    def forward(model, source, target, limits, offset=0):
        S, T = len(source), len(target)
        visible = from_limits(list(limits), S).visible(S + T)
        positions = torch.cat([torch.arange(S).float(), torch.arange(T).float() + offset])[None]
        ids = torch.tensor([[*source, *target]])
        logits = model(ids, position_ids=positions, attention_mask=visible, use_cache=False).logits[0]
        return logits[:S], logits[S:]

    return forward


@pytest.fixture
def tiny():
    return make


@pytest.fixture
def random_ids():
    return tokens
