"""Tiles of rotate_append as data: keyed by architecture, bytes of a row and element size; a length is never a key."""

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100, 120)
ELEMENT_BYTES = (2, 4)


@dataclass(frozen=True)
class Tile:
    """BLOCK_T rows per step of one program, its warps, and how many roles one counting step reads."""

    block_t: int
    num_warps: int
    count: int = 2048


def tile(architecture: int, row_bytes: int) -> Tile:
    """The tile for rows of `row_bytes` (D * element size): about 8 KiB of K and as much of V in flight per step."""
    del (
        architecture
    )  # one table serves all: the kernel only copies, and 8 KiB a step saturates HBM from sm_80 to sm_120
    for limit, choice in _TABLE:
        if row_bytes <= limit:
            return choice
    return _TABLE[-1][1]


_TABLE = (
    (64, Tile(block_t=64, num_warps=4)),
    (128, Tile(block_t=64, num_warps=4)),
    (256, Tile(block_t=32, num_warps=4)),
    (512, Tile(block_t=16, num_warps=4)),
    (1024, Tile(block_t=8, num_warps=4)),
)


def rows() -> tuple[Tile, ...]:
    """Every row of the table once, for the compile check."""
    return tuple(choice for _, choice in _TABLE)
