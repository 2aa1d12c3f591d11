"""The two products of attention on tiles, in fp32 summed in short chains.

fp32 has no IEEE tensor cores: `tl.dot` becomes one chain of fused multiply-adds per result, whose rounding grows with
its length. A score of 256 dims in one chain is 2 to 3 times less accurate than plain PyTorch's, which adds
partial sums.
"""

import triton
import triton.language as tl

CHAIN = tl.constexpr(64)


@triton.jit
def scores(q, keys, PRECISION: tl.constexpr):
    """q keys^T [ROWS, KEYS] of q [ROWS, BLOCK_D], keys [KEYS, BLOCK_D]."""
    if PRECISION == "ieee" and q.shape[1] > CHAIN:
        CHAINS: tl.constexpr = q.shape[1] // CHAIN
        a = tl.permute(tl.reshape(q, [q.shape[0], CHAINS, CHAIN]), [1, 0, 2])
        b = tl.permute(tl.reshape(keys, [keys.shape[0], CHAINS, CHAIN]), [1, 2, 0])
        return tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        return tl.dot(q, keys.T, input_precision=PRECISION)


@triton.jit
def add_weighted(acc, p, values, PRECISION: tl.constexpr):
    """acc [ROWS, BLOCK_D] + p values, p [ROWS, KEYS] rounded to the dtype of values [KEYS, BLOCK_D]."""
    if PRECISION == "ieee":
        return acc + tl.dot(p, values, input_precision=PRECISION)
    else:
        return tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
