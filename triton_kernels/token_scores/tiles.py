"""Tiles of token_scores as data, keyed by padded head dim and element size: a length is never a key.

One table serves all architectures: the kernel only reads. HEADS x BLOCK_K rows of K and as many of V are in flight per
program, 16 KiB each.
"""

from dataclasses import dataclass

# more key heads than this are walked in chunks; fewer leave room for more keys
MOST_HEADS = 32
# per multiprocessor: enough to fill it, few enough that what a program reads of q and o stays small beside K and V
PROGRAMS = 8


@dataclass(frozen=True)
class Tile:
    """HEADS key heads by BLOCK_K keys of one step, warps, and stages of the software pipeline over steps."""

    heads: int
    block_k: int
    num_warps: int
    num_stages: int


def block_d(D: int) -> int:
    """D padded inside the kernel: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


def tile(HK: int, D: int, element_size: int) -> Tile:
    """The tile for HK key heads of head dim D."""
    rows, num_warps, num_stages = TABLE[block_d(D), element_size]
    heads = min(MOST_HEADS, 1 << (HK - 1).bit_length(), rows)
    return Tile(heads, rows // heads, num_warps, num_stages)


# padded head dim, element size -> rows (heads x keys), warps, stages
TABLE = {
    (16, 2): (256, 4, 1),
    (32, 2): (128, 4, 1),
    (64, 2): (128, 8, 1),
    (128, 2): (64, 8, 1),
    (256, 2): (32, 8, 1),
    (16, 4): (128, 4, 1),
    (32, 4): (64, 4, 1),
    (64, 4): (64, 8, 1),
    (128, 4): (32, 8, 1),
    (256, 4): (16, 8, 1),
}
