"""The two kernels that stand for what users of one-segment attention write: right, or the comparison is worth
nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from streamkernels.core.positions import apply_rotary
from streamkernels.reference.merge_partials import merge_partials

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from peer_kernels import merge_two, rotate_rows  # noqa: E402


@pytest.mark.parametrize("H", [1, 28])
@pytest.mark.parametrize("angle_batch", [1, 3])
def test_rotate_rows(H, angle_batch):
    x = torch.randn(3, 5, 2 * H, 32, device=DEVICE)[:, :, H:]
    angles = torch.rand(angle_batch, 5, 16, device=DEVICE)
    want = apply_rotary(x.transpose(1, 2), angles.cos(), angles.sin(), False).transpose(1, 2)
    torch.testing.assert_close(rotate_rows(x, angles.cos(), angles.sin()), want)


def test_merge_two_in_place_of_every_other_session():
    all_b, lse_all = torch.randn(6, 5, 3, 32, device=DEVICE), torch.randn(6, 3, 5, device=DEVICE)
    a, lse_a = torch.randn(3, 5, 3, 32, device=DEVICE), torch.randn(3, 3, 5, device=DEVICE)
    kept, b, lse_b = all_b[::2].clone(), all_b[1::2], lse_all[1::2]
    want, _ = merge_partials([(a.transpose(1, 2), lse_a), (b.transpose(1, 2), lse_b)])
    merge_two(a, lse_a, b, lse_b, b)
    torch.testing.assert_close(all_b[1::2], want.transpose(1, 2))
    assert torch.equal(all_b[::2], kept)
