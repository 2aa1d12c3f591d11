"""What tests of the cache share."""

from __future__ import annotations

import pytest

from streamkernels.core import segments


@pytest.fixture
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = segments.allocate
    monkeypatch.setattr(segments, "allocate", lambda *a: empty(*a).fill_(float("nan")))
