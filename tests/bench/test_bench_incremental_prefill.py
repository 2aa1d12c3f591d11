"""bench_incremental_prefill in small on the CPU: every contender computes what the reference does, and every test runs
to its rows. FlashAttention-3 is stood for by what its documentation says."""

from __future__ import annotations

import math
import types

import bench_incremental_prefill as bench
import pytest
import step_peers
import torch

from streamkernels.core.positions import apply_rotary


def turned(x, cos, sin):
    """x [T, H, D]"""
    return apply_rotary(x.transpose(0, 1)[None], cos, sin, False)[0].transpose(0, 1)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, *, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    causal=False, rotary_interleaved=True, return_softmax_lse=False,
):  # fmt: skip
    """FA3's, session by session: rotary and append at cache_seqlens, bottom-right causal, [B, T, H, D]."""
    assert cache_seqlens.dtype == torch.int32 and not rotary_interleaved or rotary_cos is None
    B, T, H, _ = q.shape
    outs, lses = [], []
    for b in range(B):
        slot = b if cache_batch_idx is None else int(cache_batch_idx[b])
        S = int(cache_seqlens[b])
        rows = q[b]
        if rotary_cos is not None:
            assert causal, "FA3 rotates all of q by one position unless causal"
            cos, sin = (x[None, S : S + T] for x in (rotary_cos, rotary_sin))
            rows = turned(rows, cos, sin)
        if k is not None:
            k_cache[slot, S : S + T], v_cache[slot, S : S + T] = turned(k[b], cos, sin), v[b]
            S += T
        keys, values = (x[slot, :S].repeat_interleave(H // k_cache.shape[2], 1) for x in (k_cache, v_cache))
        scores = torch.einsum("thd,shd->hts", rows, keys) * q.shape[3] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -math.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), values))
    out, lse = torch.stack(outs), torch.stack(lses)
    return (out, lse) if return_softmax_lse else out


def rotate_rows(x, cos, sin):
    return apply_rotary(x.transpose(1, 2), cos, sin, False).transpose(1, 2).contiguous()


def merge_two(a, lse_a, b, lse_b, out):
    weight = torch.sigmoid(lse_a - lse_b).transpose(1, 2)[..., None]
    return out.copy_(weight * a + (1 - weight) * b)


@pytest.fixture
def small(monkeypatch):
    """The file on the CPU in fp32, with stand-ins for what needs a GPU; 1 us per call."""
    library = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setattr(step_peers, "fa3", lambda: library)
    stand_in = types.ModuleType("peer_kernels")
    stand_in.rotate_rows, stand_in.merge_two = rotate_rows, merge_two
    monkeypatch.setitem(__import__("sys").modules, "peer_kernels", stand_in)
    flex = step_peers.flex
    monkeypatch.setattr(step_peers, "flex", lambda step, backend: flex(step, backend, compile=False))
    values = {"DEVICE": "cpu", "DTYPE": torch.float32, "matmul_rate": lambda: 1e6, "read_time": lambda n: n / 1e6}
    values |= {"graph_time": lambda calls: float(calls[0]() is not None)}
    values |= {"host_time": lambda call, **_: float(call() is not None)}
    for name, value in values.items():
        monkeypatch.setattr(bench, name, value)
    bench.single_call.cache_clear()


def rows_of(test, *arguments):
    found = []

    def show(rows, call):
        found.extend(rows)
        call()

    test(*arguments, show)
    return found


ALL = {name: 0.5 for name in bench.PEERS}


@pytest.mark.parametrize("S, T, H, HK, D", [(40, 1, 4, 2, 16), (41, 8, 4, 1, 16), (7, 17, 2, 2, 32)])
def test_every_contender_computes_the_step(small, S, T, H, HK, D):
    steps = bench.cold(bench.Case(S, T, H, HK, D).step, 1)
    with torch.no_grad():
        found = bench.contenders(steps, bench.PEERS)
        assert set(found) == {"reference", *bench.PEERS}
        want = found["reference"][1]()
        for name, calls in found.items():
            for _ in range(2):  # a graph's replays append to the same slots again
                torch.testing.assert_close(calls[1](), want, msg=lambda m, name=name: f"{name}: {m}")


def test_the_ragged_batch_in_two_calls(small):
    lengths = [(5, 9), (12, 3), (1, 1), (7, 11), (8, 2)]
    step = step_peers.make_step(4, 2, 16, 3, lengths, [True, False] * 2 + [True], dtype=torch.float32, device="cpu")
    with torch.no_grad():
        found = bench.contenders([step], ("FA3 2seg",))
        torch.testing.assert_close(found["FA3 2seg"][0](), found["reference"][0]())


def test_a_contender_that_computes_something_else_is_found(small, monkeypatch):
    make = step_peers.eager
    monkeypatch.setattr(step_peers, "eager", lambda step: lambda: 1.1 * make(step)())
    with torch.no_grad(), pytest.raises(AssertionError, match="eager differs from reference"):
        bench.contenders([bench.Case(9, 2, 2, 1, 16).step()], ("eager",))


def test_a_contender_that_cannot_run_is_left_out(small, monkeypatch, capsys):
    def fa3():
        raise ImportError("No module named 'fa3_fwd_interface'")

    monkeypatch.setattr(step_peers, "fa3", fa3)
    found = bench.contenders([bench.Case(9, 2, 2, 1, 16).step()], ("FA3+append", "eager"))
    assert set(found) == {"reference", "eager"} and "no FA3+append column" in capsys.readouterr().out


def test_every_row(small, monkeypatch):
    case = bench.Case(40, 2, 2, 1, 16, goals=ALL, others=bench.PEERS[1:])
    (row,) = rows_of(bench.test_step, case)
    assert row["met"] == "yes" and row["measured us"] == 1.0 and row["backend"] == "reference"
    assert row["ratios"].count("1.00") == len(bench.PEERS)
    (row,) = rows_of(bench.test_step, bench.Case(40, 2, 2, 1, 16, goals={"FA3+append": 1.5}))
    assert row["met"] == "no"
    monkeypatch.setattr(bench, "MAIN", bench.Case(24, 2, 2, 1, 16))
    (row,) = rows_of(bench.test_layers_in_one_graph)
    assert row["measured us"] == 28.0 and row["met"] == "yes"


def test_rows_of_the_cases_that_are_fixed_in_size(small, monkeypatch):
    rows = rows_of(bench.test_host_visible)
    assert [row["met"] for row in rows] == ["no", "yes"]
    make = bench.make_step

    def less(H, HK, D, T, lengths, reads, **rest):
        return make(2, 1, 16, 2, [(s // 1000 + 1, t // 1000 + 1) for s, t in lengths], reads, **rest)

    monkeypatch.setattr(bench, "make_step", less)
    (row,) = rows_of(bench.test_ragged_batch, 8)
    assert row["met"] == "no" and row["FA3 2seg us"] == 1.0


def test_bytes_and_flops():
    step = bench.make_step(28, 4, 128, 8, [(2048, 2048)], [False], dtype=torch.bfloat16, device="cpu")
    assert bench.step_bytes(step) == 2 * (2 * 4096 * 4 * 128 + 2 * 8 * 28 * 128 + 4 * 8 * 4 * 128)
    assert bench.step_flops(step) == 4 * 128 * 28 * (4096 * 8 + 36)
    reads = bench.make_step(28, 4, 128, 8, [(2048, 100)], [True], dtype=torch.bfloat16, device="cpu")
    assert bench.step_flops(reads) == 4 * 128 * 28 * (2048 * 8 + 36)


def test_a_graph_of_another_length(small, monkeypatch):
    seen = []

    class Graph:
        def __init__(self, calls):
            self.calls = calls

    def replay(graph):
        seen.extend(call().isfinite().all() for call in graph.calls)
        return 2.0

    monkeypatch.setattr(bench, "capture", Graph)
    monkeypatch.setattr(bench, "replay_time", replay)
    monkeypatch.setattr(bench.Case, "step", lambda case: bench.make_step(
        2, 1, 16, case.T, [(case.S // 2, case.S // 2)], [False], dtype=torch.float32, device="cpu"
    ))  # fmt: skip
    assert bench.replayed_at("reference", 16, 64, 64) == 1.0 and all(seen)
