"""compact: gather the listed tokens of every sample; a token's row is read once and written once.

Rows are copied as integers of their element size, so one kernel serves every dtype.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S", "K", "Q", "P", "x_b", "x_p", "x_s", "index_b", "index_k", "count_b"],
            do_not_specialize_on_alignment=["index", "count"])  # fmt: skip
def compact_kernel(
    x,  # [B, P, S, Q]: the dims before and behind the token axis as one each, last stride 1
    index,  # int32 [B, K]
    count,  # int32 [B]
    out,  # [B, P, K, Q]
    P, S, K, Q, x_b, x_p, x_s, index_b, index_k, count_b,
    # what Q and the strides of x count: they are not specialised, since some grow with the length, and this is what a
    # load may know of them
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    Q = Q * STEP
    chunks = tl.cdiv(Q, BLOCK_Q)
    p = (tl.program_id(0) % P).to(tl.int64)
    tile = tl.program_id(0) // P
    i = (tile // chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = (tile % chunks) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    listed = i < tl.minimum(tl.load(count + b * count_b), K)
    j = tl.load(index + b * index_b + i.to(tl.int64) * index_k, mask=listed, other=-1)
    listed = (j >= 0) & (j < S)
    inside = c < Q
    at = x + b * x_b * STEP + p * x_p * STEP + tl.where(listed, j, 0).to(tl.int64)[:, None] * x_s * STEP + c
    row = tl.load(at, mask=listed[:, None] & inside, other=0)
    to = out + ((b * P + p) * K + i.to(tl.int64))[:, None] * Q + c
    tl.store(to, row, mask=(i < K)[:, None] & inside)
