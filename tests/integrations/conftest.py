"""Tiny Hugging Face models whose logits really depend on positions and visibility."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from streamkernels.core.spans import from_limits
from streamkernels.testing.compare import EXACT

VOCAB = 67
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3")
# what is special about each: windows that cut, a scale and a softcap that bite, a head that is turned in part
SPECIAL = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 6},
    "gemma2": {
        "sliding_window": 5,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 3,
        "head_dim": 16,
        "attn_implementation": "eager",  # the newest releases refuse to drop its softcap
    },
    "phi3": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "sliding_window": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


def classes(family):
    """(config class, CausalLM class) of one architecture."""
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma2": "Gemma2"}
    name = name.get(family, "Phi3")
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


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
    kind, model_class = classes(family)
    if config is None:
        plain = dict(
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
        )
        config = kind(**{**plain, **SPECIAL[family], **options})
    torch.manual_seed(0)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in queries_and_keys(layer.self_attn):
                weight *= sharpen
    return model


def queries_and_keys(attention):
    """The weights that make scores sharp: of the norms behind the projections where there are any."""
    if hasattr(attention, "q_norm"):
        return attention.q_norm.weight, attention.k_norm.weight
    if hasattr(attention, "qkv_proj"):
        both = attention.config.num_attention_heads + attention.config.num_key_value_heads
        return (attention.qkv_proj.weight[: both * attention.head_dim],)
    return attention.q_proj.weight, attention.k_proj.weight


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
def recorded():
    """Keep the logits of every committed target row of a session, as the session's model returned them."""

    def record(session):
        model, rows, staged = session.model, [], []
        step, commit, pop = model.step, model.commit, model.pop

        def record_step(source, target, limits):
            staged[:] = step(source, target, limits)
            return torch.stack(staged) if staged else torch.empty(0)

        def record_commit():
            commit()
            rows.extend(staged)

        def record_pop(n):
            pop(n)
            del rows[len(rows) - n :]

        model.step, model.commit, model.pop = record_step, record_commit, record_pop
        return rows

    return record


@pytest.fixture
def tiny():
    return make


@pytest.fixture
def random_ids():
    return tokens
