"""Tiles of span_attention as data: keyed by kernel, kind of GPU, head dim and element size; a length is never a key."""

from dataclasses import dataclass

KERNELS = ("forward", "dq", "dkdv")
# KiB of shared memory that a block may use: compute capability 9.0 and 10.0, 8.0, and the smaller 8.6, 8.9, 12.0
SHARED = {"large": 227, "medium": 163, "small": 99}


@dataclass(frozen=True)
class Tile:
    """BLOCK_T rows by BLOCK_S keys, warps, and stages of the software pipeline."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


def gpu_kind(capability: int) -> str:
    """The row of SHARED of a compute capability (10 * major + minor)."""
    if capability in (90, 100, 103):
        return "large"
    return "medium" if capability in (80, 87) else "small"


def block_d(D: int) -> int:
    """D padded inside the kernel: 64, 128 or 256."""
    return 64 if D <= 64 else 128 if D <= 128 else 256


def few_rows(rows: int) -> bool:
    """Whether B * H * T rows are so few that tiles of 128 leave a large GPU idle at the end: less than five such
    tiles for each of 132 multiprocessors."""
    return rows < 5 * 132 * 128


def tile(
    kernel: str,
    capability: int,
    D: int,
    element_size: int,
    plain: bool = True,
    few: bool = False,
    classes: bool = False,
) -> Tile:
    """The tile of one kernel; every (kernel, kind, padded D, element size) has a row.

    `plain`: at most two slots, all ATTEND, no softcap. What the others add to dk and dv needs more warps' registers.
    `few`: `few_rows` of the call. `classes`: under a class table.
    """
    key = (kernel, gpu_kind(capability), block_d(D), element_size)
    if classes:
        return WITH_CLASSES.get(key, TABLE[key])
    if not plain:
        return WITH_RULES.get(key, TABLE[key])
    return FEW_ROWS.get(key, TABLE[key]) if few else TABLE[key]


TABLE = {
    # measured on an H200: the fastest of those tried
    ("forward", "large", 64, 2): Tile(128, 64, 4, 3),
    ("forward", "large", 128, 2): Tile(128, 128, 8, 2),
    ("forward", "large", 256, 2): Tile(128, 64, 8, 2),
    ("dq", "large", 64, 2): Tile(128, 64, 4, 3),
    ("dq", "large", 128, 2): Tile(128, 64, 8, 3),
    ("dq", "large", 256, 2): Tile(64, 64, 4, 1),
    ("dkdv", "large", 64, 2): Tile(64, 64, 4, 3),
    ("dkdv", "large", 128, 2): Tile(64, 64, 4, 2),
    ("dkdv", "large", 256, 2): Tile(64, 64, 8, 1),
    # not measured: sized to compile without spills and within shared memory
    ("forward", "medium", 64, 2): Tile(128, 32, 8, 2),
    ("forward", "medium", 128, 2): Tile(64, 32, 8, 2),
    ("forward", "medium", 256, 2): Tile(64, 16, 8, 1),
    ("dq", "medium", 64, 2): Tile(128, 32, 8, 2),
    ("dq", "medium", 128, 2): Tile(32, 32, 8, 1),
    ("dq", "medium", 256, 2): Tile(32, 16, 4, 1),
    ("dkdv", "medium", 64, 2): Tile(32, 64, 8, 1),
    ("dkdv", "medium", 128, 2): Tile(32, 64, 8, 1),
    ("dkdv", "medium", 256, 2): Tile(32, 32, 8, 1),
    ("forward", "small", 64, 2): Tile(128, 64, 8, 2),
    ("forward", "small", 128, 2): Tile(128, 64, 8, 2),
    ("forward", "small", 256, 2): Tile(64, 32, 8, 1),
    ("dq", "small", 64, 2): Tile(128, 32, 8, 2),
    ("dq", "small", 128, 2): Tile(32, 32, 4, 1),
    ("dq", "small", 256, 2): Tile(16, 32, 8, 1),
    ("dkdv", "small", 64, 2): Tile(64, 32, 8, 1),
    ("dkdv", "small", 128, 2): Tile(64, 64, 8, 2),
    ("dkdv", "small", 256, 2): Tile(64, 32, 8, 1),
    # fp32 has no IEEE tensor cores: the multiply-add units keep whole operands in registers, and even small tiles spill
    **{(kernel, kind, D, 4): Tile(32, 16, 8, 1) for kernel in KERNELS for kind in SHARED for D in (64, 128, 256)},
}

WITH_RULES = {
    ("dkdv", "large", 64, 2): Tile(64, 64, 8, 2),
    ("dkdv", "large", 128, 2): Tile(64, 64, 8, 2),
}

# measured on an H200 at 2048 rows of 28 heads: forward 65 us instead of 75, backward 271 us instead of 280
FEW_ROWS = {
    ("forward", "large", 128, 2): Tile(64, 64, 4, 3),
    ("dq", "large", 128, 2): Tile(64, 64, 4, 2),
}

# not measured: sized to compile without spills beside the masks of every tile
WITH_CLASSES = {
    ("forward", "large", 64, 2): Tile(64, 64, 8, 2),
    ("forward", "large", 128, 2): Tile(64, 64, 8, 2),
    ("forward", "large", 256, 2): Tile(64, 32, 8, 1),
    ("dq", "large", 64, 2): Tile(64, 64, 8, 2),
    ("dq", "large", 128, 2): Tile(64, 64, 8, 2),
    ("dq", "large", 256, 2): Tile(64, 32, 8, 1),
    ("dkdv", "large", 64, 2): Tile(32, 64, 8, 2),
    ("dkdv", "large", 128, 2): Tile(32, 64, 8, 2),
    ("dkdv", "large", 256, 2): Tile(32, 32, 8, 1),
    ("forward", "small", 64, 2): Tile(64, 32, 8, 1),
    ("forward", "small", 128, 2): Tile(32, 32, 8, 1),
    ("forward", "small", 256, 2): Tile(32, 32, 8, 1),
}
