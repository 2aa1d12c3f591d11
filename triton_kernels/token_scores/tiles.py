"""Tiles of token_scores as data, keyed by padded head dim, element size and whether keys are few.

One table serves all architectures: the kernel only reads. With many keys a warp owns its keys and walks the heads, and
nothing crosses warps: on an H200 1.02 of the time to read K and V at 46080 keys of 32 heads. With few keys that walk
would be all there is (26 us at 576): there the warps of a program share the heads of two keys (7 us).
"""

from dataclasses import dataclass

# per multiprocessor: enough to fill it
PROGRAMS = 64
# rows of K (keys x heads of all samples) below which keys are few
FEW_ROWS = 1 << 17


@dataclass(frozen=True)
class Tile:
    """HEADS key heads by BLOCK_K keys of one step, and warps."""

    heads: int
    block_k: int
    num_warps: int


def block_d(D: int) -> int:
    """D padded inside the kernel: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


def few_rows(rows: int) -> bool:
    """Whether B * HK * K rows of K are few: the one thing about a call's lengths that a tile depends on."""
    return rows < FEW_ROWS


def tile(HK: int, R: int, D: int, element_size: int, few: bool) -> Tile:
    """The tile for HK key heads of head dim D, each with R query heads."""
    key = (block_d(D), element_size, few)
    heads, keys, num_warps = ONE_QUERY_HEAD.get(key, TABLE[key]) if R == 1 else TABLE[key]
    if R > 1:
        # what the query heads of a key head need takes the registers of half the rows
        heads = max(1, heads // 2)
    least = 1 << (HK - 1).bit_length()
    if not few or least >= heads:
        return Tile(min(heads, least), keys, num_warps)
    return Tile(least, keys, max(1, num_warps * least // heads))


# padded head dim, element size, few keys -> heads, keys, warps; without many heads, `few` takes fewer warps
TABLE = {
    (16, 2, False): (4, 32, 1),
    (32, 2, False): (2, 16, 1),
    (64, 2, False): (2, 4, 1),
    (128, 2, False): (1, 4, 1),
    (256, 2, False): (1, 2, 1),
    (16, 4, False): (2, 32, 1),
    (32, 4, False): (2, 16, 1),
    (64, 4, False): (1, 8, 1),
    (128, 4, False): (1, 4, 1),
    (256, 4, False): (1, 2, 1),
    (16, 2, True): (32, 16, 8),
    (32, 2, True): (16, 8, 8),
    (64, 2, True): (32, 4, 8),
    (128, 2, True): (32, 2, 8),
    (256, 2, True): (16, 2, 8),
    (16, 4, True): (32, 8, 8),
    (32, 4, True): (32, 4, 8),
    (64, 4, True): (32, 2, 8),
    (128, 4, True): (16, 2, 8),
    (256, 4, True): (8, 2, 8),
}

# where every query head has keys of its own: on an H200, 7.2 us instead of 8.8 for 576 keys of 32 heads, and 21.5
# instead of 25.2 for 2880
ONE_QUERY_HEAD = {(128, 2, True): (16, 2, 8)}
