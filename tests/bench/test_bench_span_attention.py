"""bench_span_attention in small on the CPU: every test runs to its rows, and every baseline computes what we do."""

from __future__ import annotations

import math

import bench_span_attention as bench
import pytest
import torch
from baselines import flash_attention_4_missing, flex_attend, flex_visible, sdpa_attend
from record import Goal, compared, tables


def dense(spans, L, backend=None):
    """FlexAttention's own mask_mod as a dense mask: FlexAttention has no backward on a CPU."""
    from torch.nn.attention.flex_attention import create_mask

    mask = create_mask(flex_visible(spans), 1, 1, L, L, device="cpu")
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.fixture
def small(monkeypatch):
    """The file's tests on the CPU, fp32, tiny; 1 us per call."""
    case = bench.Case(64, 4, 2, 16, 1.2, 1.2, flash=True, best=True)
    sizes = {"H": 2, "T": 16, "S": 160, "D": 16, "CASES": [case], "CAUSAL": case}
    place = {"DEVICE": "cpu", "DTYPE": torch.float32, "BACKEND": "reference", "RULES_BACKEND": "reference"}
    timers = {"graph_time": lambda calls: float(calls[0]() is not None), "matmul_rate": lambda: 1.0}
    timers |= {"host_time": lambda call, **_: float(call() is not None)}
    peers = {"flex_attend": dense, "flash_attention_4_missing": lambda: None}
    for name, value in (sizes | place | timers | peers).items():
        monkeypatch.setattr(bench, name, value)
    caches = (bench.contenders, bench.causal_contenders, bench.long_inputs, bench.time_of)
    for cache in caches:
        cache.cache_clear()
    yield case
    for cache in caches:
        cache.cache_clear()


def rows_of(test, *arguments):
    found = []

    def show(rows, call):
        found.extend(rows)
        assert call() is not None

    test(*arguments, show)
    assert all(row["measured us"] == 1.0 and row["predicted us"] > 0 for row in found)
    return found


def test_every_row_of_wait_k(small):
    for part in ("forward", "backward"):
        assert [row["peer"] for row in rows_of(bench.test_wait_k, small, part)] == ["flex Triton", "flex FA4"]
    for part in ("forward", "forward + backward"):
        goals = [row["goal"] for row in rows_of(bench.test_host_visible, part)]
        assert sorted(goals) == [">= 2", "aim >= 2"]


def test_rows_of_the_cuda_kernel(small, monkeypatch):
    monkeypatch.setattr(bench, "cuda_runs", lambda sets, spans: True)
    plain = bench.ours
    monkeypatch.setattr(bench, "ours", lambda sets, spans, backend: plain(sets, spans))
    for S in (0, 200):
        (row,) = rows_of(bench.test_cuda_for_many_rows, "some rows", small, S)
        assert (row["part"], row["peer"]) == ("forward", "Triton")


def test_every_other_row(small):
    for part in ("forward", "backward"):
        assert [row["met"] for row in rows_of(bench.test_causal, part)] == ["yes", "yes"]
    for rule in ("MASS", "SINK"):
        assert [row["met"] for row in rows_of(bench.test_rules, rule)] == ["no", "no"]
    for kind in ("10 % by spans", "10 % by KEPT"):
        assert len(rows_of(bench.test_removed_keys, kind)) == 2


def test_a_baseline_that_computes_something_else_is_found(small, monkeypatch):
    def causal_only(spans, L, backend=None):
        return sdpa_attend

    monkeypatch.setattr(bench, "flex_attend", causal_only)
    with pytest.raises(AssertionError, match="o of flex Triton differs from ours"):
        bench.contenders(small)


def test_flex_attention_itself_forward():
    spans = bench.sk.spans.wait_k([[4] * 8], [[4] * 8], k=5)
    q, k, v = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    o = flex_attend(spans, 64, compile=False)(q, k, v)
    torch.testing.assert_close(o, bench.sk.span_attention(q, k, v, spans))


def test_rules_see_what_they_are_compared_with(small):
    counted = {name: bench.long_spans(name).visible(bench.S).sum(-1) for name in ("ATTEND", "MASS", "SINK", "all keys")}
    assert torch.equal(counted["ATTEND"], counted["MASS"]) and torch.equal(counted["ATTEND"], counted["SINK"])
    for name in ("10 % by spans", "10 % by KEPT"):
        assert (bench.long_spans(name).visible(bench.S).sum(-1) == bench.S // 10).all()


def test_rows_and_goals():
    row = compared("w", "forward", 1.0, 2.0, "peer", 3.0, Goal(at_least=1.2))
    assert row["ratio"] == 1.5 and row["met"] == "yes" and row["goal"] == ">= 1.2"
    over = compared("w", "forward", 1.0, 2.0, "peer", 3.0, Goal(at_most=0.5, aim=True))
    assert over["ratio"] == pytest.approx(2 / 3) and over["met"] == "no" and over["goal"] == "aim <= 0.5"
    assert compared("w", "forward", 1.0, math.nan, "peer", 3.0, Goal(at_least=1.2))["met"] == "-"
    text = tables([row, {"other": 1}, row])
    assert text.count("| work |") == 1 and "| other |" in text and text.count("| w |") == 2


def test_flash_attention_4_is_missed_with_a_sentence():
    why = flash_attention_4_missing()
    assert why is None or "flash-attn-4" in why
