"""The README's code runs as it stands, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import streamkernels

README = Path(__file__).parents[1] / "README.md"


def test_the_code_blocks_run(capsys):
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 4
    namespace: dict = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {i + 1}", "exec"), namespace)
    assert namespace["o"].shape == (1, 8, 32, 64) and namespace["lse"].shape == (1, 8, 32)
    assert namespace["spans"].bounds.shape == (1, 32, 2, 2)
    printed = capsys.readouterr().out
    assert "Read" in printed and "Write" in printed and "span_attention: reference" in printed
    assert namespace["model"].get_input_embeddings().weight.grad.abs().max() > 0
    assert namespace["model"].config._attn_implementation != "streamkernels"


def test_public_names_exist():
    pytest.importorskip("transformers")
    for name in streamkernels.__all__:
        assert getattr(streamkernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        streamkernels.nothing  # noqa: B018


def test_commands_exist_in_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    for command in re.findall(r"^make (\S+)", README.read_text(), re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command
