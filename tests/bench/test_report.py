"""Recorded runs come back as tables."""

from __future__ import annotations

import json

from report import main


def test_a_recorded_run(tmp_path, capsys):
    rows = [
        {"work": "first", "measured us": 1.5, "goal": ">= 1", "met": "yes"},
        {"work": "second", "measured us": float("nan"), "goal": ">= 2", "met": "no"},
        {"work": "third", "measured us": 12345.6, "goal": "aim >= 2", "met": "no"},
        {"kernel": "other columns"},
    ]
    path = tmp_path / "bench_something.json"
    path.write_text(json.dumps({"machine": {"gpu": "some GPU", "commit": "abc"}, "rows": rows}))
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "## bench_something\ngpu some GPU, commit abc\n1 of 2 goals met, not met:\n- second: >= 2" in text
    assert "| first | 1.5 | >= 1 | yes |" in text and "| second | - |" in text and "| third | 12346 |" in text
    assert "| kernel |" in text
