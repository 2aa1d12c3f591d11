"""Caches on disk: what is written comes back exactly, nothing else is written, and damage is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamkernels.core import cache_file
from streamkernels.core.cache import SOURCE, TARGET, StreamCache
from streamkernels.core.positions import Rotary

safetensors = pytest.importorskip("safetensors.torch")
torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def make(**changes: Any) -> StreamCache:
    """A cache with ragged sessions, pruned layers, a rotation of its own per layer, and secrets in unused slots."""
    given: dict[str, Any] = dict(
        layers=2, batch=2, kv_heads=[1, 2], head_dim=[8, 16], dtype=torch.bfloat16, device="cpu"
    )
    given["rotary"] = [None, Rotary.from_theta(16, 1e6, sections=(4, 2, 2), section_layout="interleaved")]
    cache = StreamCache(**{**given, "capacity": (4, 2), **changes})
    role = torch.tensor([[SOURCE, SOURCE, TARGET], [SOURCE, -1, -1]], dtype=torch.int8)
    cache.stage(0, role, 3), cache.stage(1, role[:, :2].contiguous(), 2)
    for layer in range(2):
        for r in (SOURCE, TARGET):
            for buffer in cache.segment(layer, r):
                buffer.copy_(torch.randn(buffer.shape))
    cache.commit()
    return cache


def same(a: StreamCache, b: StreamCache) -> bool:
    if not torch.equal(a.length(), b.length()) or a.form != b.form:
        return False
    for layer in range(a.layers):
        for r in (SOURCE, TARGET):
            for x, y in zip(a.segment(layer, r), b.segment(layer, r), strict=True):
                for row in range(a.batch):
                    n = int(a.length(layer)[row, r])
                    if x.shape != y.shape or not torch.equal(x[row, :, :n], y[row, :, :n]):
                        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"fixed": True}, {"window": (3, None), "sinks": 1, "max_chunk": 3}])
def test_a_file_brings_the_cache_back(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    cache = make(dtype=dtype, **changes)
    cache.save(tmp_path / "cache")
    for loaded in (StreamCache.load(tmp_path / "cache"), StreamCache.load(str(tmp_path / "cache"), like=cache)):
        assert same(cache, loaded) and loaded.epoch == 0 and loaded.longest(SOURCE) == 2
        loaded.stage(0, SOURCE, 1), loaded.stage(1, SOURCE, 1)
        loaded.commit()
        assert loaded.length(1).tolist() == [[3, 0], [2, 0]]
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_an_empty_cache_comes_back(tmp_path: Path) -> None:
    cache = make()
    cache.reset()
    cache.save(tmp_path / "cache")
    assert same(cache, StreamCache.load(tmp_path / "cache"))


def test_unused_slots_and_staged_rows_stay_at_home(tmp_path: Path) -> None:
    cache = make()
    cache.stage(0, SOURCE, 2), cache.stage(1, SOURCE, 2)
    cache.save(tmp_path / "cache")
    written = safetensors.load_file(tmp_path / "cache")
    for name in "kv":
        held = written[f"layer.0.source.{name}"]
        assert held.shape == (2, 1, 2, 8) and bool((held[1, :, 1:] == 0).all()) and bool((held[1, :, 0] != 0).all())
        assert written[f"layer.1.target.{name}"].shape[2] == 0
    cache.commit()
    cache.pop(2, SOURCE), cache.save(tmp_path / "again")
    # the digests are over all that was written
    found = []
    for name in ("cache", "again"):
        with safetensors.safe_open(tmp_path / name, framework="pt") as file:
            found.append(file.metadata())
    assert found[0] == found[1]


def test_a_ring_comes_back_with_what_it_has_lost(tmp_path: Path) -> None:
    cache = StreamCache(
        layers=1,
        batch=1,
        kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device="cpu",
        capacity=1,
        window=2,
        sinks=1,
        max_chunk=4,
    )
    for _ in range(3):
        cache.stage(0, SOURCE, 4)
        for buffer in cache.segment(0, SOURCE):
            buffer.copy_(torch.randn(buffer.shape))
        cache.commit()
    cache.pop(3, SOURCE)
    cache.save(tmp_path / "cache")
    loaded = StreamCache.load(tmp_path / "cache")
    staged, expected = loaded.stage(0, SOURCE, 1), cache.stage(0, SOURCE, 1)
    assert staged.oldest is not None and expected.oldest is not None
    assert staged.oldest.tolist() == expected.oldest.tolist() == [[7, 0]]
    # slots of 0, 7 and 8; the others held popped rows
    assert staged.source_k[0, 0, :, 0].ne(0).tolist() == [True, False, True, True, False, False]
    loaded.discard()
    with pytest.raises(ValueError, match="the ring holds"):
        loaded.pop(2, SOURCE)


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    make().save(path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for at in range(8 + size, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="SHA-256"):
            StreamCache.load(path)
    for end in (0, 7, 8 + size // 2, 8 + size, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="load: path: expected a whole safetensors file"):
            StreamCache.load(path)
    path.write_bytes(whole.replace(b'\\"sinks\\": 0', b'\\"sinks\\": 1'))
    with pytest.raises(ValueError, match="SHA-256"):
        StreamCache.load(path)
    path.write_bytes(whole)
    assert StreamCache.load(path).length(0).tolist() == [[2, 1], [1, 0]]
    with pytest.raises(FileNotFoundError):
        StreamCache.load(tmp_path / "nothing")


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="schema None"):
        StreamCache.load(tmp_path / "plain")
    with monkeypatch.context() as other:
        other.setattr(cache_file, "SCHEMA", "streamkernels.StreamCache/2")
        make().save(tmp_path / "newer")
    with pytest.raises(
        ValueError, match="a file of schema streamkernels.StreamCache/1, got schema streamkernels.StreamCache/2"
    ):
        StreamCache.load(tmp_path / "newer")
    # a digest that fits a file which does not make sense
    form = json.dumps({"layers": 1})
    metadata = {"schema": cache_file.SCHEMA, "form": form, "sha256": cache_file._digest(form, {"x": torch.zeros(1)})}
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "odd", metadata=metadata)
    with pytest.raises(ValueError, match="load: path: expected a file that StreamCache.save wrote"):
        StreamCache.load(tmp_path / "odd")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(kv_heads=[2, 2]), r"kv_heads \[2, 2\]"),
        (dict(head_dim=[16, 16]), "head_dim"),
        (dict(dtype=torch.float16), "dtype float16"),
        (dict(window=3), "window"),
        (dict(window=3, max_chunk=2), "window"),
        (dict(rotary=None), "rotary"),
    ],
)
def test_a_file_that_does_not_match_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    make().save(tmp_path / "cache")
    like = StreamCache(
        **{
            **dict(layers=2, batch=3, kv_heads=[1, 2], head_dim=[8, 16], dtype=torch.bfloat16, device="cpu"),
            **dict(rotary=make().form.rotaries),
            **changes,
        }
    )
    with pytest.raises(ValueError, match=f"load: path: .*{text}"):
        StreamCache.load(tmp_path / "cache", like=like)
    assert like.batch == 3 and like.length().sum() == 0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    make().save(path)
    old = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make().save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["cache"]
