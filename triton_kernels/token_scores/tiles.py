"""Tiles of token_scores as data, keyed by padded head dim and element size: a length is never a key.

One table serves all architectures: the kernel only reads. A warp owns its keys and walks the key heads HEADS at a time,
so that nothing crosses warps.
"""

from dataclasses import dataclass

# per multiprocessor: enough to fill it
PROGRAMS = 64


@dataclass(frozen=True)
class Tile:
    """HEADS key heads by BLOCK_K keys of one step, warps, and stages of the software pipeline over heads."""

    heads: int
    block_k: int
    num_warps: int
    num_stages: int


def block_d(D: int) -> int:
    """D padded inside the kernel: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


def tile(HK: int, R: int, D: int, element_size: int) -> Tile:
    """The tile for HK key heads of head dim D, each with R query heads."""
    rows, keys, num_warps, num_stages = TABLE[block_d(D), element_size]
    # what the query heads of a key head add to registers takes the room of half the rows
    heads = min(max(rows // keys // (1 if R == 1 else 2), 1), 1 << (HK - 1).bit_length())
    return Tile(heads, keys * num_warps, num_warps, num_stages)


# padded head dim, element size -> rows (heads x keys) and keys of a warp, warps, stages
TABLE = {
    (16, 2): (128, 32, 1, 1),
    (32, 2): (32, 8, 1, 1),
    (64, 2): (16, 4, 1, 1),
    (128, 2): (8, 4, 1, 1),
    (256, 2): (4, 2, 1, 1),
    (16, 4): (64, 32, 1, 1),
    (32, 4): (32, 16, 1, 1),
    (64, 4): (8, 4, 1, 1),
    (128, 4): (8, 4, 1, 1),
    (256, 4): (4, 2, 1, 1),
}
