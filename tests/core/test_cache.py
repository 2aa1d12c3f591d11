"""The cache's contract: lengths, growth, room, rings, status."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamkernels.core import segments, staging
from streamkernels.core.cache import PADDING, SOURCE, TARGET, slot, stream_index
from streamkernels.core.lengths import Lengths
from streamkernels.core.positions import Rotary, apply_rotary

from .cache_cases import fill, make, refused, snapshot, values

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def test_rows_stay_invisible_until_the_commit() -> None:
    cache = make()
    role = torch.tensor([[SOURCE, TARGET, SOURCE], [PADDING, TARGET, TARGET]], dtype=torch.int8)
    fill(cache, role, 3, commit=False)
    assert cache.length().tolist() == [[[0, 0]] * 2] * 2
    cache.commit()
    assert cache.length(0).tolist() == cache.length(1).tolist() == [[2, 1], [0, 2]]
    assert cache.length().dtype == torch.int32 and cache.length(1).data_ptr() != cache.length(0).data_ptr()
    fill(cache, TARGET, 1, commit=False)
    cache.discard()
    assert cache.length(0).tolist() == [[2, 1], [0, 2]]
    fill(cache, TARGET, 1)
    assert values(cache, 1, TARGET, 1) == [100.0, 101.0, 102.0] and cache.epoch == 0


def test_live_views() -> None:
    cache = make()
    staged = cache.stage(0, SOURCE, 2)
    assert staged.source_k is cache.segment(0, SOURCE)[0] and staged.target_v is cache.segment(0, TARGET)[1]
    assert (staged.role, staged.segment, staged.bounded, staged.sinks, staged.windows) == (
        None,
        0,
        False,
        0,
        (None, None),
    )
    cache.stage(1, SOURCE, 2)
    cache.commit()
    assert staged.length.tolist() == [[2, 0], [2, 0]] and staged.oldest is None
    staged.status.fill_(2)
    with pytest.raises(RuntimeError, match="the target segment was full"):
        cache.check()
    cache.check()


def test_layers_may_hold_different_numbers_of_rows() -> None:
    cache = make(layers=3, kv_heads=[1, 2, 4], head_dim=[8, 16, 8])
    assert [cache.segment(i, SOURCE)[0].shape for i in range(3)] == [(2, 1, 4, 8), (2, 2, 4, 16), (2, 4, 4, 8)]
    full = torch.zeros(2, 3, dtype=torch.int8)
    pruned = torch.tensor([[SOURCE], [PADDING]], dtype=torch.int8)
    cache.stage(0, full, 3), cache.stage(1, full, 3), cache.stage(2, pruned, 1)
    cache.commit()
    assert cache.length().tolist() == [[[3, 0]] * 2, [[3, 0]] * 2, [[1, 0], [0, 0]]]
    cache.stage(0, TARGET, 1), cache.stage(1, TARGET, 1), cache.stage(2, TARGET, 1)
    cache.commit()
    cache.pop(1)
    assert cache.length().tolist() == [[[3, 0]] * 2, [[3, 0]] * 2, [[1, 0], [0, 0]]]


def test_devices_are_grouped() -> None:
    cache = make(layers=3, device=["cpu", "cpu:0", "cpu"])
    assert len(cache._lengths.groups) == 2 and cache.status.tolist() == [0, 0]
    role = torch.tensor([[SOURCE, SOURCE], [TARGET, PADDING]], dtype=torch.int8)
    fill(cache, role, 2)
    assert cache.length().tolist() == [[[2, 0], [0, 1]]] * 3
    mark = cache.mark()
    fill(cache, TARGET, 5)
    cache.rollback(mark)
    cache.evict(0, 1, SOURCE)
    assert cache.length().tolist() == [[[1, 0], [0, 1]]] * 3


def test_growth_doubles_one_layer_and_segment_at_a_time() -> None:
    cache = make(capacity=(2, 4))
    small = cache.nbytes
    fill(cache, SOURCE, 2)
    k = cache.segment(0, SOURCE)[0]
    cache.stage(0, SOURCE, 7)
    assert [cache.capacity(layer, r) for layer in (0, 1) for r in (0, 1)] == [16, 4, 2, 4]
    assert cache.segment(0, SOURCE)[0] is not k and torch.equal(cache.segment(0, SOURCE)[0][:, :, :2], k)
    cache.discard()
    # k and v: 14 more slots of 2 sessions, 2 heads, 8 dims, 4 bytes
    assert cache.nbytes - small == 2 * 14 * 2 * 2 * 8 * 4
    state = 2 * (2 * 2 * 2 * 4) + 4 + 2
    assert small == 2 * 2 * (2 + 4) * 2 * 2 * 8 * 4 + state
    assert values(cache, 0, SOURCE, 1) == [100.0, 101.0] and cache.epoch == 0


def test_bounds_are_tightened_before_anything_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A role whose counts the host does not know costs T rows of both segments, until that would matter."""
    cache = make(fixed=True, capacity=(8, 3))
    role = torch.tensor([[SOURCE, TARGET], [SOURCE, PADDING]], dtype=torch.int8)
    reads = []

    def describe(step: staging.Step, role: Tensor, T: int, batch: int, device: torch.device) -> staging.Rows:
        # what a role on another device looks like: not counted when it is staged
        if device not in step.shared or step.shared[device].role is not role:
            step.shared[device] = staging.Rows(role, T)
        return step.shared[device]

    def counted(role: Tensor) -> Tensor:
        reads.append("roles")
        return count(role)

    def tighten(lengths: Lengths) -> None:
        reads.append("lengths")
        read(lengths)

    count, read = staging.count_roles, Lengths.tighten
    monkeypatch.setattr(staging.Step, "describe", describe)
    monkeypatch.setattr(staging, "count_roles", counted)
    monkeypatch.setattr(Lengths, "tighten", tighten)
    # two rows of each segment are thinkable, one is true: from the second step on what is thinkable does not fit
    for n, expected in enumerate([[], ["lengths", "roles"], ["lengths", "roles", "roles"]]):
        for layer in range(2):
            cache.stage(layer, role, 2)
        cache.commit()
        assert reads == expected
        assert cache.length(0).tolist() == [[n + 1, n + 1], [n + 1, 0]]
    refused(cache, ValueError, "3 slots of layer 0's target segment", lambda: cache.stage(0, role, 2))
    only_source = torch.zeros(2, 5, dtype=torch.int8)
    cache.stage(0, only_source, 5), cache.stage(1, only_source, 5)
    cache.commit()
    assert cache.length(1).tolist() == [[8, 3], [8, 0]] and cache.longest(SOURCE) == 8


def test_reset_of_one_session_frees_its_row() -> None:
    cache = make(fixed=True, capacity=3)
    fill(cache, TARGET, 3)
    refused(cache, ValueError, "target", lambda: cache.stage(0, torch.tensor([[1], [-1]], dtype=torch.int8), 1))
    cache.reset(0)
    assert cache.length(1).tolist() == [[0, 0], [0, 3]]
    fill(cache, torch.tensor([[1, 1, 1], [-1, -1, -1]], dtype=torch.int8), 3)
    assert values(cache, 0, TARGET, 0) == [0.0, 1.0, 2.0] and values(cache, 0, TARGET, 1) == [100.0, 101.0, 102.0]
    cache.reset()
    assert cache.length().sum() == 0 and cache.longest(TARGET) == 0


@pytest.mark.parametrize(("sinks", "window", "chunk"), [(0, 1, 1), (2, 3, 1), (0, 5, 4), (1, 2, 6), (3, 1, 2)])
def test_a_ring_of_the_promised_size_holds_what_a_chunk_sees(sinks: int, window: int, chunk: int) -> None:
    """Also in the worst case, that a step of max_chunk rows was written and discarded before."""
    cache = make(layers=1, batch=1, capacity=1, window=window, sinks=sinks, max_chunk=chunk)
    C = cache.capacity(0, TARGET)
    assert C == sinks + window + chunk - 1
    for step in range(12):
        T = chunk if step % 2 else 1
        fill(cache, TARGET, chunk, commit=False)
        cache.discard()
        n = int(cache.length(0)[0, 1])
        fill(cache, TARGET, T, commit=False)
        held = cache.segment(0, TARGET)[1][0, 0, :, 0]
        index = stream_index(torch.arange(C), n + T, C, sinks, True)
        staged = cache.stage(0, TARGET, T)
        assert staged.oldest is not None
        for end in range(n + 1, n + T + 1):
            seen = {*range(min(sinks, end)), *range(max(0, end - window), end)}
            assert seen <= set(index.tolist())
            assert all(float(held[slot(torch.tensor(i), C, sinks, True)]) == i for i in seen)
            assert int(staged.oldest[0, 1]) <= max(sinks, end - window)
        cache.commit()
    assert cache.capacity(0, TARGET) == C


def test_one_segment_may_be_bounded() -> None:
    cache = make(window=(2, None), sinks=1, max_chunk=3, capacity=2)
    assert (cache.bounded, cache.capacity(0, SOURCE), cache.capacity(0, TARGET)) == (True, 5, 2)
    for _ in range(4):
        fill(cache, SOURCE, 3)
        fill(cache, TARGET, 3)
    assert (cache.capacity(0, SOURCE), cache.capacity(0, TARGET)) == (5, 16)
    assert values(cache, 1, TARGET, 0) == [float(i) for i in range(12)]
    refused(cache, ValueError, "max_chunk = 3", lambda: cache.stage(0, SOURCE, 4))


def test_slots_walk_round_the_ring_and_back() -> None:
    for capacity, sinks in [(1, 0), (5, 0), (5, 2), (3, 2), (7, 3)]:
        at, memory, walked = -1, {}, []
        for i in range(40):
            at = at + 1 if at + 1 < capacity else sinks
            walked.append(at)
            memory[at] = i
            assert slot(torch.arange(i + 1), capacity, sinks, True).tolist() == walked
            got = stream_index(torch.arange(capacity), i + 1, capacity, sinks, True)
            assert got.tolist() == [memory.get(s, -1) for s in range(capacity)]
    total = torch.tensor([[0], [2], [9]])
    got = stream_index(torch.arange(4, dtype=torch.int32)[None], total, 4, 1, True)
    assert got.tolist() == [[-1] * 4, [0, 1, -1, -1], [0, 7, 8, 6]] and got.dtype == torch.int32
    assert slot(torch.tensor([0, 9]), 4, 0, False).tolist() == [0, 9]
    assert stream_index(torch.arange(4), 2, 4, 0, False).tolist() == [0, 1, -1, -1]


def test_reanchored_keys_equal_fresh_ones_in_half_precision_without_a_second_scale() -> None:
    rotary = Rotary(8, Rotary.from_theta(8).inverse_frequency, attention_scaling=1.5)
    cache = make(batch=1, layers=1, dtype=torch.bfloat16, rotary=rotary)
    x = torch.randn(1, 2, 3, 8)
    staged = cache.stage(0, SOURCE, 3)
    staged.source_k[:, :, :3] = apply_rotary(x, *rotary.cos_sin(torch.tensor([[10, 11, 12]]))).bfloat16()
    cache.commit()
    garbage = cache.segment(0, SOURCE)[0][:, :, 3:].clone()
    cache.reanchor(-10, begin=1)
    fresh = apply_rotary(x, *rotary.cos_sin(torch.tensor([[10, 1, 2]])))
    torch.testing.assert_close(cache.segment(0, SOURCE)[0][:, :, :3].float(), fresh, rtol=0.02, atol=0.02)
    assert torch.equal(cache.segment(0, SOURCE)[0][:, :, 3:].isnan(), garbage.isnan())


def test_marks_survive_pops_above_them() -> None:
    cache = make()
    fill(cache, TARGET, 3)
    low, again = cache.mark(), cache.mark()
    fill(cache, TARGET, 4)
    cache.pop(2)
    fill(cache, SOURCE, 1)
    cache.rollback(low)
    assert cache.length(0).tolist() == [[0, 3]] * 2
    fill(cache, TARGET, 1)
    cache.rollback(low)
    cache.pop(1)
    refused(cache, RuntimeError, "popped", lambda: cache.rollback(again))
    low = cache.mark()
    fill(cache, TARGET, 2)
    high = cache.mark()
    cache.rollback(low)
    refused(cache, RuntimeError, "popped", lambda: cache.rollback(high))
    fresh = cache.mark()
    cache.evict(0, 1, TARGET)
    refused(cache, RuntimeError, "rearranged", lambda: cache.rollback(fresh))
    refused(cache, ValueError, "made by this cache", lambda: cache.rollback(make().mark()))


def test_epoch_counts_what_moves_committed_rows() -> None:
    cache = make(rotary=Rotary.from_theta(8))
    fill(cache, SOURCE, 3), fill(cache, TARGET, 3)
    mark = cache.mark()
    assert cache.epoch == 0
    moves = [
        lambda: cache.pop(1),
        lambda: cache.rollback(mark) if int(cache.length(0)[0, 1]) == 3 else cache.evict(0, 0, TARGET),
        lambda: cache.evict(0, 1, SOURCE),
        lambda: cache.keep([0], role=SOURCE),
        lambda: cache.reanchor(1.0),
        lambda: cache.reorder([1, 0]),
        lambda: cache.select([0]),
        lambda: cache.reset(0),
        lambda: cache.reset(),
    ]
    for n, move in enumerate(moves, start=1):
        move()
        assert cache.epoch == n
    cache.pop(0)
    assert cache.epoch == len(moves)


def test_replays_are_accounted_for() -> None:
    """What a CUDA graph does: the device moves on, Python does not run."""
    cache = make(fixed=True, capacity=4)
    fill(cache, TARGET, 1)
    for _ in range(3):
        cache.reserve(target=1)
        cache._lengths.groups[0].committed[..., TARGET] += 1
        cache.replayed(target=1)
    assert cache.longest(TARGET) == 4
    refused(cache, ValueError, "4 slots of layer 0's target", lambda: cache.reserve(target=1))
    cache.reserve(source=4)
    cache.pop(4)
    assert cache.length(0).tolist() == [[0, 0]] * 2


def test_reserve_grows_all_layers_or_none() -> None:
    cache = make()
    cache.reserve(source=5, target=3)
    assert [cache.capacity(layer, r) for layer in (0, 1) for r in (0, 1)] == [8, 4, 8, 4]
    fixed = make(fixed=True)
    refused(fixed, ValueError, "source segment", lambda: fixed.reserve(source=5))


def test_a_cache_made_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        cache = make(rotary=Rotary.from_theta(8))
        fill(cache, TARGET, 9)
        mark = cache.mark()
        cache.rollback(mark)
        cache.select([1, 0, 0])
    fill(cache, TARGET, 9)
    fork = cache.fork()
    for c in (cache, fork):
        c.reanchor(2.0, TARGET)
        c.pop(3), c.reorder([0, 0, 1]), c.evict(0, 2, TARGET), c.keep([0, 1], role=TARGET), c.reset(1)
        assert c.length(0).tolist() == [[0, 2], [0, 0], [0, 2]]


def test_long_segments_move_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "BLOCK", 5)
    cache = make()
    fill(cache, SOURCE, 40), fill(cache, TARGET, 17)
    cache.evict(3, 5, SOURCE)
    assert values(cache, 0, SOURCE, 0) == [float(i) for i in range(40) if not 3 <= i < 5]
    cache.evict([0, 2], [1, 9], SOURCE, layer=1)
    assert values(cache, 1, SOURCE, 0) == [float(i) for i in range(1, 40) if not 3 <= i < 5]
    assert values(cache, 1, SOURCE, 1) == [100.0 + i for i in (0, 1, *range(11, 40))]
    assert values(cache, 0, SOURCE, 1) == [100.0 + i for i in range(40) if not 3 <= i < 5]
    odd = torch.arange(1, 38, 2)
    cache.keep(odd, role=SOURCE, layer=0)
    assert values(cache, 0, SOURCE, 1) == [100.0 + [i for i in range(40) if not 3 <= i < 5][n] for n in odd]
    cache.reorder([1, 0])
    assert values(cache, 0, TARGET, 0) == [100.0 + i for i in range(17)]
    assert values(cache, 1, TARGET, 1) == [float(i) for i in range(17)]


def test_a_fork_shares_nothing() -> None:
    cache = make()
    fill(cache, SOURCE, 3)
    fork, before = cache.fork(), snapshot(cache)
    assert values(fork, 1, SOURCE, 1) == [100.0, 101.0, 102.0] and fork.capacity(0, SOURCE) == 4
    fill(fork, SOURCE, 9)
    fork.segment(0, TARGET)[0].fill_(3)
    fork.reset(0)
    assert snapshot(cache) == before


def test_trusted_device_lists_are_not_read_back() -> None:
    """`keep` with a list that the host has not seen: the meta device would raise if it were read."""
    cache = make()
    fill(cache, SOURCE, 4)
    with pytest.raises(NotImplementedError, match="[Mm]eta"):
        cache.keep(torch.zeros(2, 3, dtype=torch.int64, device="meta"), role=SOURCE)
    assert cache._lengths.exact
