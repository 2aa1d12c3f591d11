"""The tolerances accept what they should and refuse what they should: a test must be able to fail."""

from __future__ import annotations

import pytest
import torch

from streamkernels.testing.cases import CPU_CASES, GPU_CASES, HALF_CASES, MASKS
from streamkernels.testing.compare import assert_accurate, assert_exact, influence, ulp
from streamkernels.testing.inputs import fresh, make_inputs, poison, strided_like


def test_ulp():
    assert float(ulp(torch.tensor(1.0), torch.bfloat16)) == 2**-7
    assert float(ulp(torch.tensor(1.999), torch.float16)) == 2**-10
    assert float(ulp(torch.tensor(-4.0), torch.float32)) == 2**-21
    assert float(ulp(torch.tensor(0.0), torch.float32)) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accuracy_is_measured_in_units_of_the_dtype(dtype):
    exact = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = exact.to(dtype)
    assert_accurate("rounded", rounded, rounded, exact)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_accurate(
            "all off by three units", (exact + 3 * ulp(exact, dtype).amax(-1, keepdim=True)).to(dtype), rounded, exact
        )
    one_off = rounded.clone()
    one_off[17, 3] += float(6 * ulp(exact[17].abs().max(), dtype))
    with pytest.raises(AssertionError, match=r"one: row \[17\]"):
        assert_accurate("one", one_off, rounded, exact)
    assert_accurate("as bad as plain", one_off, one_off, exact)


def test_what_is_not_finite_must_be_the_same():
    exact = torch.tensor([[0.5], [float("-inf")]], dtype=torch.float64)
    assert_accurate("lse", exact.float(), exact.float(), exact)
    assert_exact("lse", exact, exact)
    for wrong in (
        [[0.5], [-1e30]],
        [[float("nan")], [float("-inf")]],
        [[0.5], [float("inf")]],
        [[0.5], [float("nan")]],
    ):
        with pytest.raises(AssertionError, match="NaN or infinity"):
            assert_accurate("lse", torch.tensor(wrong), exact.float(), exact)
        with pytest.raises(AssertionError, match="NaN or infinity"):
            assert_exact("lse", torch.tensor(wrong, dtype=torch.float64), exact)


def test_exact_means_ten_digits():
    exact = torch.tensor([1e6, 1e-3], dtype=torch.float64)
    assert_exact("x", exact * (1 + 9e-11), exact)
    with pytest.raises(AssertionError, match="x: error"):
        assert_exact("x", exact * (1 + 2e-10), exact)
    with pytest.raises(AssertionError):
        assert_exact("x", exact.float(), exact)
    with pytest.raises(AssertionError):
        assert_exact("x", exact[:1], exact)


def test_influence():
    x = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    causal = influence(lambda x: x.cumsum(-2), x)
    assert torch.equal(causal, torch.ones(2, 6, 6, dtype=torch.bool).tril())
    assert not influence(lambda x: x * 0, x).any()
    assert influence(lambda x: x[:, :, :2].sum(-2, keepdim=True), x).tolist() == [[[True, True] + [False] * 4]] * 2


@pytest.mark.parametrize("case", [*CPU_CASES, *HALF_CASES], ids=str)
def test_the_cases_make_valid_inputs(case):
    x = make_inputs(case)
    assert x.q.shape == (case.B, case.H, case.T, case.D) and x.k.shape == x.v.shape == (case.B, case.HK, case.S, case.D)
    assert x.q.dtype == case.dtype and x.q.stride(-1) == x.k.stride(-1) == 1
    assert (x.q.is_contiguous() or case.T == 1) == (case.layout == "bhtd")
    assert all(bool(t.isfinite().all()) for t in (x.q, x.k, x.v, x.do, x.dlse))
    x.spans.validate(case.S)
    assert torch.equal(make_inputs(case).q, x.q) and not torch.equal(make_inputs(case, seed=1).q, x.q)


def test_the_table_has_every_mask_and_no_case_twice():
    assert {case.mask for case in CPU_CASES} == set(MASKS)
    assert len({str(case) for case in GPU_CASES}) == len(GPU_CASES)


def test_memory_between_elements_is_nan():
    x = fresh((2, 6), torch.float32)[:, :3].fill_(1.0)
    y = strided_like(x)
    assert y.stride() == x.stride() and torch.equal(x, y)
    assert y.as_strided((9,), (1,)).isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    marked = poison(torch.zeros(1, 2, 3, 4), torch.tensor([[[True, False, False]]]))
    assert marked.isnan().sum() == 8 and bool(marked[:, :, 0].isnan().all())
