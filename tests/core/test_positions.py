"""Position builders against Python loops: every scheme, one and three axes, ragged batches, and what is refused."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from streamkernels.core.positions import SCHEMES, grouped_positions, interleaved_positions, mrope_positions

torch.set_num_threads(1)
Point = tuple[int, int, int]


def loop_segment(x: Any, step: float, start: int) -> list[Point]:
    """Points of one segment, patch by patch, from `start` on."""
    if isinstance(x, int):
        return [(start + i,) * 3 for i in range(x)]
    frames, height, width = x
    points = []
    for f in range(frames):
        for row in range(height):
            for column in range(width):
                points.append((start + math.floor(step * f), start + row, start + column))
    return points


def loop_positions(
    source: list[Any],
    target: list[int],
    scheme: str,
    *,
    phi: float = 0,
    gap: int = 10000,
    slot: int = 16,
    lead: int = 1,
    step: float = 1.0,
) -> list[tuple[float, float, float]]:
    """One sample, token by token: every scheme as its paper tells it, with a running `last` position."""
    points: list[Any] = []
    if scheme == "overlap":
        parts: dict[int, list[Point]] = {}
        written: list[Point] = []
        end = -1
        for i in range(min(lead, len(source))):
            parts[i] = loop_segment(source[i], step, end + 1)
            end = max([end, *(max(p) for p in parts[i])])
        target_parts, i, j = [], lead, 0
        while i < len(source) or j < len(target):
            both: list[Point] = []
            if i < len(source):
                parts[i] = loop_segment(source[i], step, end + 1)
                both += parts[i]
            if j < len(target):
                target_parts.append(loop_segment(target[j], step, end + 1))
                both += target_parts[-1]
            end = max([end, *(max(p) for p in both)])
            i, j = i + 1, j + 1
        for n in range(len(source)):
            points += parts[n]
        for part in target_parts:
            written += part
        return points + written
    last = -1
    first_end = -1
    for n, x in enumerate(source):
        segment = loop_segment(x, step, last + 1)
        points += segment
        last = max([last, *(max(p) for p in segment)])
        first_end = last if n == 0 else first_end
    start = {"group": phi, "gap": gap + phi, "slots": first_end + 1 + slot, "sequential": last + 1}[scheme]
    return points + [(start + j,) * 3 for j in range(sum(target))]


def random_case(draw: random.Random, vision: bool) -> tuple[list[Any], list[int]]:
    source: list[Any] = [draw.randint(0, 4) for _ in range(draw.randint(0, 5))]
    if vision:
        source = [
            (draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 4)) if draw.random() < 0.4 else n for n in source
        ]
    return source, [draw.randint(0, 4) for _ in range(draw.randint(0, 4))]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("vision", [False, True])
def test_schemes_equal_the_loops(scheme: str, vision: bool) -> None:
    draw = random.Random(f"{scheme}{vision}")
    for _ in range(60):
        batch = [random_case(draw, vision) for _ in range(draw.randint(1, 3))]
        phi = draw.choice([0, 3, 128, 0.5, 2.25]) if scheme in ("group", "gap") else 0
        step, lead, slot, gap = draw.choice([1.0, 2.0, 0.7]), draw.randint(1, 3), 64, draw.choice([0, 10000])
        options: dict[str, Any] = dict(scheme=scheme, offset=phi, gap=gap, slot=slot, lead=lead)
        extra = draw.randint(0, 3)
        expected = [loop_positions(s, t, scheme, phi=phi, gap=gap, slot=slot, lead=lead, step=step) for s, t in batch]
        T = max(map(len, expected)) + extra
        if vision:
            got = mrope_positions([s for s, _ in batch], [t for _, t in batch], temporal_step=step, T=T, **options)
            assert got.ids.shape == (3, len(batch), T)
        else:
            got = grouped_positions([s for s, _ in batch], [t for _, t in batch], T=T, **options)
            assert got.ids.shape == (len(batch), T)
        assert got.ids.dtype == torch.int64 and 0 <= got.offset < 1
        for b, points in enumerate(expected):
            S = sum(n if isinstance(n, int) else math.prod(n) for n in batch[b][0])
            assert got.target_rows[b].tolist() == [t >= S for t in range(T)]
            whole = got.ids.double() + got.offset * got.target_rows
            for axis in range(3):
                row = whole[axis, b] if vision else whole[b]
                assert row[: len(points)].tolist() == [p[axis] for p in points]
                # padding continues the count of the last target segment
                if batch[b][1] and batch[b][1][-1]:
                    assert row[len(points) :].tolist() == [points[-1][axis] + 1 + i for i in range(T - len(points))]


def test_group_positions_of_the_paper() -> None:
    """Source token i at i, target token j at phi + j: nothing depends on how long the source gets."""
    short, long = grouped_positions([10, 1, 2], [3, 2]), grouped_positions([10, 1, 2, 1, 3, 2], [3, 2])
    assert short.ids[0, 13:].tolist() == long.ids[0, 19:].tolist() == [0, 1, 2, 3, 4]
    half = grouped_positions([4], [2], offset=0.5)
    assert half.ids.tolist() == [[0, 1, 2, 3, 0, 1]] and half.offset == 0.5
    assert half.target_rows.tolist() == [[False] * 4 + [True] * 2]
    assert grouped_positions([2], [1], scheme="gap").ids.tolist() == [[0, 1, 10000]]


def test_overlap_by_hand() -> None:
    """V1 = 0..2; then A1 and V2 both start at 3, the longer one ends at 6; A2 and V3 start at 7; A3 has no partner."""
    got = grouped_positions([3, 4, 1], [2, 2, 2], scheme="overlap").ids[0].tolist()
    assert got == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 7, 8, 9, 10]


def test_vision_patches_by_hand() -> None:
    """One prompt token, two frames of 1 x 2 patches with a step of 2, one token; the target group restarts at 0."""
    got = mrope_positions([1, (2, 1, 2), 1], [2], temporal_step=2.0).ids[:, 0]
    assert got.tolist() == [[0, 1, 1, 3, 3, 4, 0, 1], [0, 1, 1, 1, 1, 4, 0, 1], [0, 1, 2, 1, 2, 4, 0, 1]]
    after = mrope_positions([1, (2, 1, 2), 1], [2], temporal_step=2.0, scheme="sequential").ids[:, 0]
    assert after[:, -2:].tolist() == [[5, 6]] * 3
    shifted = mrope_positions([(1, 1, 1)], [1], offset=7)
    assert shifted.ids[:, 0, -1].tolist() == [7, 7, 7]


def test_interleaved_positions_follow_the_arrival() -> None:
    draw = random.Random(0)
    for _ in range(100):
        S = draw.randint(0, 8)
        limits = sorted(draw.randint(0, S) for _ in range(draw.randint(0, 8)))
        arrived: list[tuple[str, int]] = []
        j = 0
        for i in range(S + 1):
            while j < len(limits) and limits[j] == i:
                arrived.append(("target", j))
                j += 1
            if i < S:
                arrived.append(("source", i))
        place = {token: n for n, token in enumerate(arrived)}
        expected = [place["source", i] for i in range(S)] + [place["target", n] for n in range(len(limits))]
        got = interleaved_positions(limits, S, T=S + len(limits) + 2)
        assert got.ids[0].tolist() == expected + [S + len(limits), S + len(limits) + 1]
    ragged = interleaved_positions([[0, 2], [1]], [2, 1])
    assert ragged.ids.tolist() == [[1, 2, 0, 3], [0, 1, 2, 3]]


def test_sequential_positions_are_those_of_transformers() -> None:
    """An image and a video between texts; transformers does not count the video's frames for what follows."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    sizes = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    tokens = dict(bos_token_id=0, eos_token_id=0)
    config = transformers.Qwen2VLConfig(
        text_config=dict(num_hidden_layers=1, vocab_size=200, rope_parameters=rope, **sizes, **tokens),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2),
        image_token_id=100,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    model, grids = Qwen2VLModel(config), {100: torch.tensor([[1, 4, 6]]), 101: torch.tensor([[3, 4, 4]])}

    def theirs(tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens])
        kinds = (ids == 100) + 2 * (ids == 101)
        given = {"image_grid_thw": grids[100], "video_grid_thw": grids[101] if 101 in tokens else None}
        return model.get_rope_index(input_ids=ids, mm_token_type_ids=kinds, **given)[0]

    image = [1, 2, 3, 102, *[100] * 6, 103, 5, 6]
    assert torch.equal(mrope_positions([4, (1, 2, 3)], [3], scheme="sequential").ids, theirs(image))
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
        pytest.skip("transformers 5.4 mixes up the axes of a video's patches")
    video = [*image, 102, *[101] * 12, 103, 6, 7, 8]
    source = [4, (1, 2, 3), 4, (3, 2, 2)]
    assert torch.equal(mrope_positions(source, [4], scheme="sequential", advance="spatial").ids, theirs(video))
    assert not torch.equal(mrope_positions(source, [4], scheme="sequential").ids, theirs(video))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: grouped_positions([2], [1], scheme="shifted"), ValueError, "scheme"),
        (lambda: grouped_positions([2], [1], scheme="overlap", offset=1), ValueError, "offset"),
        (lambda: grouped_positions([2], [1], offset=float("nan")), ValueError, "offset"),
        (lambda: grouped_positions([2], [1], offset=torch.tensor(1.0)), TypeError, "offset"),
        (lambda: grouped_positions([2, 17], [1], scheme="slots"), ValueError, "slot: .*17 positions"),
        (lambda: grouped_positions([2], [1], scheme="overlap", lead=0), ValueError, "lead"),
        (lambda: grouped_positions([-1], [1]), ValueError, "source_lengths"),
        (lambda: grouped_positions([1.5], [1]), TypeError, "source_lengths"),
        (lambda: grouped_positions([[1], [1]], [[1]]), ValueError, "target_lengths"),
        (lambda: grouped_positions([3], [1], T=3), ValueError, "T"),
        (lambda: mrope_positions([(1, 2)], [1]), ValueError, "frames, height, width"),
        (lambda: mrope_positions([(1, 0, 2)], [1]), ValueError, "source"),
        (lambda: mrope_positions([1], [1], temporal_step=-1.0), ValueError, "temporal_step"),
        (lambda: mrope_positions([1], [1], advance="temporal"), ValueError, "advance"),
        (lambda: interleaved_positions([2, 1], 3), ValueError, "limits"),
        (lambda: interleaved_positions([4], 3), ValueError, "limits"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
