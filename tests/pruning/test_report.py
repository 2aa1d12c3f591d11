"""Counts against numbers worked out by hand or printed in the paper; no speed-up without a dense time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streamkernels import VisionPruning
from streamkernels.pruning import Times, costs
from streamkernels.pruning.report import ModelShape, Report

LLAVA_7B = ModelShape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128)
LLAVA_13B = ModelShape(layers=40, hidden=5120, intermediate=13824, heads=40, kv_heads=40, head_dim=128)


def report_of(model=LLAVA_7B, vision=576, text=48, after=15, left=10, exit_layer=24):
    tokens = vision + text
    kept = [vision if at <= after else left if at <= exit_layer else 0 for at in range(model.layers)]
    rows = [text + n for n in kept]
    return Report(
        model=model,
        config="fixed",
        tokens=tokens,
        past=0,
        vision=(vision,),
        real=(tokens,),
        width=rows,
        cached=rows,
        rows=[(n,) for n in rows],
        vision_rows=[(n,) for n in kept],
        seen=[(0,)] * model.layers,
        filter_layer=(after,),
        exit_layer=(exit_layer,),
        probe_reads=0,
        layout_reads=1,
        element_size=2,
        verdict="not asked",
    )


def test_the_papers_accounting():
    """3.82 T and 7.44 T in Table 5 of arXiv 2510.17205; 1.76 T is what a filter near layer 15 of 32 gives."""
    assert round(report_of().paper_macs(dense=True) / 1e12, 2) == 3.82
    assert round(report_of(LLAVA_13B).paper_macs(dense=True) / 1e12, 2) == 7.44
    assert round(report_of(after=14).paper_macs() / 1e12, 2) in (1.79, 1.80, 1.81)


def test_counts_by_hand():
    small = ModelShape(layers=3, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4)
    report = report_of(small, vision=4, text=2, after=0, left=1, exit_layer=1)
    assert report.width == [6, 3, 2] and report.vision_rows == [(4,), (1,), (0,)]
    assert report.pairs() == 21 + 6 + 3 and report.pairs(dense=True) == 3 * 21
    row = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16
    assert report.macs() == 11 * row + 30 * 2 * 8 and report.macs(dense=True) == 18 * row + 63 * 2 * 8
    assert report.kv_bytes() == 11 * 2 * 4 * 2 and report.kv_bytes(dense=True) == 18 * 2 * 4 * 2
    later = replace(report, past=5, seen=[(5,), (5,), (3,)])
    assert later.pairs() == 30 + 6 * 5 + 3 * 5 + 2 * 3 and later.pairs(dense=True) == 3 * (21 + 30)
    assert "vision tokens left by layer: 0: 4, 1: 1, 2: 0" in str(report)
    assert "0 of 8 bytes while the layers ran, 1 before" in str(report)


def test_no_speed_up_without_a_dense_time():
    report = report_of().with_times(Times(prefill=5.0, decode=2.0))
    with pytest.raises(ValueError, match="Times: dense_prefill: expected the prefill time of both"):
        report.times.speedup()
    assert "prefill: 5.00 ms, dense not measured" in str(report) and " x" not in str(report).split("prefill")[-1]
    both = Times(prefill=6.0, dense_prefill=5.0, decode=2.0, dense_decode=2.5)
    assert both.speedup("decode") == 1.25 and both.break_even() == 2.0
    assert "prefill: 6.00 ms, dense 5.00 ms: 0.83 x" in str(report.with_times(both))
    assert str(report.with_times(both)).endswith("no slower than dense from 2 tokens on")
    assert replace(both, prefill=5.0).break_even() == 0.0
    assert replace(both, decode=2.5).break_even() is None
    with pytest.raises(ValueError, match="Times: decode: expected a number > 0"):
        Times(decode=0.0)


def test_costs_say_no_only_when_it_is_certain(monkeypatch):
    fast = VisionPruning()
    args = (LLAVA_7B, "a GPU", 1, 624, 576)
    assert costs.verdict(fast, *args).profitable is None
    macs = LLAVA_7B.row_macs()
    for least, probe, expected in ((0.0, 100.0, True), (0.0, 1e6, False), (1e4, 1.0, False)):
        monkeypatch.setattr(costs, "COSTS", {"a GPU": costs.Cost("a GPU", macs, least, 2.0, probe, "abc")})
        assert costs.verdict(fast, *args).profitable is expected
        assert costs.verdict(VisionPruning.fixed({15: 10, 24: 0}), *args).profitable is expected
    # 32 layers of 1248 us dense; at best 8 of them, one probe, then 24 layers of 48 rows
    monkeypatch.setattr(costs, "COSTS", {"a GPU": costs.Cost("a GPU", macs, 0.0, 2.0, 100.0, "abc")})
    saved = (24 * 2 * 576 - 100) / 1000
    text = f"yes, {saved:.2f} ms of a prefill at best saved on 'a GPU' (costs of commit abc)"
    assert costs.verdict(fast, *args).text == text


@pytest.mark.parametrize("batch, vision, captured, expected", [
    (1, 280, False, False), (1, 576, False, True), (1, 576, True, True), (8, 576, False, True),
    (1, 2880, False, True), (1, 2880, True, True), (1, 16, True, False),
])  # fmt: skip
def test_the_committed_costs_say_what_was_measured(batch, vision, captured, expected):
    """On the H200 an eager layer of 328 rows waits for the host; captured, or with more rows, it need not."""
    for config in (VisionPruning(), VisionPruning.fixed({15: 10, 24: 0})):
        said = costs.verdict(config, LLAVA_7B, "NVIDIA H200", batch, 48 + vision, vision, captured=captured)
        assert said.profitable is expected, said
        assert ("in a CUDA graph pruning may pay" in said.text) == (not captured and not expected)


def test_the_host_bounds_an_eager_layer():
    cost = costs.Cost("a GPU", LLAVA_7B.row_macs(), 10.0, 1.0, 5.0, "abc", launch=100.0)
    assert [cost.layer(n, LLAVA_7B) for n in (1, 50, 200)] == [100.0, 100.0, 200.0]
    assert [cost.layer(n, LLAVA_7B, captured=True) for n in (1, 50, 200)] == [10.0, 50.0, 200.0]
