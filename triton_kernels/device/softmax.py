"""Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), and Gemma 2's soft-capped scores."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# log2(e) is LOG2E rounded to fp32, plus this
LOG2E_REST = tl.constexpr(1.925963033500e-8)
LN2 = tl.constexpr(0.6931471805599453)
# a maximum to begin with, below every score: differences to it stay finite, those to -inf would have to be looked at
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def cap(s, inner, SOFTCAP: tl.constexpr):
    """Raw products to what `outer` scales to the exponent of `power`: tanh(s * inner) under a softcap, else s
    itself."""
    if SOFTCAP:
        return 1.0 - 2.0 / (tl.exp2(s * (inner * 2.0 * LOG2E)) + 1.0)
    else:
        return s


@triton.jit
def power(x, PRECISION: tl.constexpr):
    """The exponential that scores are scaled for: base 2, which is one multiplication less; base e for fp32, where
    scaling a log by log2(e) and back would lose digits that plain PyTorch keeps."""
    if PRECISION == "ieee":
        # the GPU's exp is exp2(x log2(e)) with a rounded product: what the rounding lost comes back as a factor
        x = tl.where(x < -150.0, -150.0, x)
        y = x * LOG2E
        lost = tl.fma(x, LOG2E, -y) + x * LOG2E_REST
        return tl.exp2(y) * (1.0 + lost * LN2)
    else:
        return tl.exp2(x)


@triton.jit
def natural_log(m, norm, PRECISION: tl.constexpr):
    """The natural log of norm times the power of m."""
    if PRECISION == "ieee":
        return m + tl.log(norm)
    else:
        return (m + tl.log2(norm)) * LN2


@triton.jit
def from_natural(x, PRECISION: tl.constexpr):
    """A natural log in the unit of `power`."""
    if PRECISION == "ieee":
        return x
    else:
        return x * LOG2E


@triton.jit
def online_softmax(m, norm, s, outer, PRECISION: tl.constexpr, FINITE: tl.constexpr = False):
    """One tile of scores s [BLOCK_T, BLOCK_S], -inf where unseen -> the new running maximum and sum, probabilities, and
    the factor of what was accumulated before. A row that has seen nothing keeps its m, -inf or LOWEST, and norm = 0.
    FINITE: m began with LOWEST."""
    m_new = tl.maximum(m, tl.max(s, 1) * outer)
    shift = m_new
    if not FINITE:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = power(s * outer - shift[:, None], PRECISION)
    alpha = power(m - shift, PRECISION)
    return m_new, norm * alpha + tl.sum(p, 1), p, alpha
