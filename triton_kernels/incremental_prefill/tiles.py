"""Tiles of incremental_prefill as data: keyed by kernel, kind of GPU, head dim and element size; a length is never a
key."""

from dataclasses import dataclass

# KiB of shared memory that a block may use: compute capability 9.0 and 10.0, 8.0, and the smaller 8.6, 8.9, 12.0
SHARED = {"large": 227, "medium": 163, "small": 99}
# rows of a key head (T times R) up to which a kind of forward is meant
KINDS = {"few": 16, "some": 1024, "many": 1 << 62}
# the most splits of a launch
MOST_SPLITS = 128
# up to so many parts are joined row by row of several
FEW_PARTS = 4
# keys from which row tiles that almost fill a GPU are cut in two, which costs a launch
WORTH_CUTTING = 8192
# key tiles of a program from which its rows go through memory first: on an H200 32 rows of 28 heads against 65536 keys
# then took 85.5 us instead of 89.8, against 4096 keys 18.9 instead of 18.2
FAR = 16
# from so many rows on a chunk is written by rotate_append first, and its keys are read from the segments: on an H200
# the kernel takes about 2 us per 16 rows that it rotates itself, a launch about 3 us
LONG_CHUNK = 64


@dataclass(frozen=True)
class Tile:
    """BLOCK_M rows (row, query head) by BLOCK_S keys, BLOCK_C keys of the chunk, warps, stages of the software
    pipeline, programs that one multiprocessor holds, and whether keys come through descriptors where nothing hides keys
    from rows that see later ones."""

    block_m: int
    block_s: int
    block_c: int
    num_warps: int
    num_stages: int
    resident: int = 1
    boxes: bool = False


def gpu_kind(capability: int) -> str:
    """The row of SHARED of a compute capability (10 * major + minor)."""
    if capability in (90, 100, 103):
        return "large"
    return "medium" if capability in (80, 87) else "small"


def block_d(D: int) -> int:
    """D padded inside the kernel: 64, 128 or 256. Not less: a product over 16 dims came out wrong on an H200 (triton
    3.6.0), whose operands are laid out for the int8 of the roles that mask them."""
    return 64 if D <= 64 else 128 if D <= 128 else 256


def tile(kernel: str, capability: int, D: int, element_size: int, holes: bool = False) -> Tile:
    """The tile of a kernel: "few", "some" or "many" (forwards by their number of rows), "dq" or "dkdv".

    `holes`: something hides keys from rows that see later ones, so that the forward tests every key and row.
    """
    key = (kernel, gpu_kind(capability), block_d(D), element_size)
    return WITH_HOLES.get(key, TABLE[key]) if holes else TABLE[key]


def forward_kind(rows: int) -> str:
    """The forward for `rows` rows of a key head."""
    return next(kind for kind, most in KINDS.items() if rows <= most)


# two programs of 64 rows on a multiprocessor, one in its softmax while the other multiplies: on an H200 512 rows of 28
# heads against 65536 keys took 931 us, in tiles of 128 x 64 with 8 warps 1260, of 128 x 128 1219
TABLE = {
    ("few", "large", 64, 2): Tile(16, 128, 16, 4, 3, 2),
    ("few", "large", 128, 2): Tile(16, 64, 16, 4, 3, 2),
    ("few", "large", 256, 2): Tile(16, 32, 16, 8, 2, 1),
    ("some", "large", 64, 2): Tile(64, 64, 16, 4, 3, 2, True),
    ("some", "large", 128, 2): Tile(64, 64, 16, 4, 3, 2, True),
    ("some", "large", 256, 2): Tile(64, 32, 16, 8, 3, 1),
    ("many", "large", 64, 2): Tile(64, 64, 16, 4, 3, 2, True),
    ("many", "large", 128, 2): Tile(64, 64, 16, 4, 3, 2, True),
    ("many", "large", 256, 2): Tile(64, 64, 16, 8, 2, 1),
    ("dq", "large", 64, 2): Tile(64, 32, 32, 8, 2, 1),
    ("dq", "large", 128, 2): Tile(64, 32, 32, 8, 2, 1),
    ("dq", "large", 256, 2): Tile(32, 32, 32, 8, 1, 1),
    ("dkdv", "large", 64, 2): Tile(64, 64, 64, 4, 2, 1),
    ("dkdv", "large", 128, 2): Tile(64, 64, 64, 8, 1, 1),
    ("dkdv", "large", 256, 2): Tile(32, 32, 32, 8, 1, 1),
}
for kind in ("medium", "small"):
    TABLE |= {
        ("few", kind, 64, 2): Tile(16, 64, 16, 4, 3, 2),
        ("few", kind, 128, 2): Tile(16, 64, 16, 4, 2, 1),
        ("few", kind, 256, 2): Tile(16, 32, 16, 8, 2, 1),
        ("some", kind, 64, 2): Tile(64, 64, 16, 8, 2, 1),
        ("some", kind, 128, 2): Tile(32, 64, 16, 8, 2, 1),
        ("some", kind, 256, 2): Tile(16, 32, 16, 8, 2, 1),
        ("many", kind, 64, 2): Tile(128, 64, 16, 8, 2, 1),
        ("many", kind, 128, 2): Tile(64, 64, 16, 8, 2, 1),
        ("many", kind, 256, 2): Tile(64, 32, 16, 8, 1, 1),
        ("dq", kind, 64, 2): Tile(64, 32, 32, 8, 2, 1),
        ("dq", kind, 128, 2): Tile(32, 32, 32, 8, 1, 1),
        ("dq", kind, 256, 2): Tile(16, 32, 32, 8, 1, 1),
        ("dkdv", kind, 64, 2): Tile(32, 32, 32, 8, 1, 1),
        ("dkdv", kind, 128, 2): Tile(32, 32, 32, 8, 1, 1),
        ("dkdv", kind, 256, 2): Tile(32, 32, 32, 8, 1, 1),
    }
# fp32 has no IEEE tensor cores: the multiply-add units keep whole operands in registers
for kind in SHARED:
    TABLE |= {
        (kernel, kind, D, 4): Tile(16, 32, 16, 4, 1, 2) for kernel in ("few", "some", "many") for D in (64, 128, 256)
    }
    TABLE |= {(kernel, kind, D, 4): Tile(32, 16, 16, 8, 1, 1) for kernel in ("dq", "dkdv") for D in (64, 128, 256)}

WITH_HOLES = {
    ("some", "large", 64, 2): Tile(64, 32, 16, 8, 3, 1),
    ("some", "large", 128, 2): Tile(64, 32, 16, 8, 3, 1),
    ("many", "large", 64, 2): Tile(64, 64, 16, 8, 3, 1),
    ("many", "large", 128, 2): Tile(64, 64, 16, 8, 3, 1),
}
