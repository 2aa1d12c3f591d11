"""Tiles of rotate_append as data, keyed by the bytes of a row (D * element size): a length is never a key.

One table serves all architectures: the kernel only copies, and 4 KiB of K and as much of V in flight per program
saturate HBM.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """BLOCK_T rows of one program, and its warps."""

    block_t: int
    num_warps: int


# a mixed call of more rows counts the roles of every so many rows in a launch of its own first: on an H200, counting
# all earlier rows in each program took 1.2 times as long at 16384 rows and 3 times at 65536
COUNT = 2048


def tile(row_bytes: int) -> Tile:
    """The tile for rows of `row_bytes`, at most 1024."""
    return next(choice for limit, choice in TABLE.items() if row_bytes <= limit)


# largest row in bytes -> tile; on an H200, 32 rows of 256 bytes ran mixed calls 7 % slower, 8 rows 4 % slower
TABLE = {
    128: Tile(block_t=32, num_warps=4),
    256: Tile(block_t=16, num_warps=4),
    512: Tile(block_t=8, num_warps=4),
    1024: Tile(block_t=8, num_warps=4),
}
