"""Tiles of span_attention as data: keyed by kernel, kind of GPU, head dim and element size; a length is never a key."""

from dataclasses import dataclass

KERNELS = ("forward", "dq", "dkdv")
# KiB of shared memory that a block may use: compute capability 9.0 and 10.0, 8.0, and the smaller 8.6, 8.9, 12.0
SHARED = {"large": 227, "medium": 163, "small": 99}


@dataclass(frozen=True)
class Tile:
    """BLOCK_T rows by BLOCK_S keys, warps, stages of the software pipeline, and the registers that a thread may use (0:
    what the compiler likes)."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles a tile with beside its sizes."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found | {"maxnreg": self.registers} if self.registers else found


def gpu_kind(capability: int) -> str:
    """The row of SHARED of a compute capability (10 * major + minor)."""
    if capability in (90, 100, 103):
        return "large"
    return "medium" if capability in (80, 87) else "small"


def block_d(D: int) -> int:
    """D padded inside the kernel: 64, 128 or 256."""
    return 64 if D <= 64 else 128 if D <= 128 else 256


def long_walks(rows: int, S: int) -> bool:
    """Whether a forward of B * H * T rows over S keys is one of those that run for milliseconds."""
    return rows >= 1 << 17 and S > 8192


def tile(
    kernel: str,
    capability: int,
    D: int,
    element_size: int,
    plain: bool = True,
    classes: bool = False,
    long: bool = False,
) -> Tile:
    """The tile of one kernel; every (kernel, kind, padded D, element size) has a row.

    `plain`: at most two slots, all ATTEND, no softcap. What the others add to dk and dv needs more warps' registers.
    `classes`: under a class table. `long`: `long_walks` of a forward.
    """
    key = (kernel, gpu_kind(capability), block_d(D), element_size)
    if classes:
        return WITH_CLASSES.get(key, TABLE[key])
    if not plain:
        return WITH_RULES.get(key, TABLE[key])
    return LONG_WALKS.get(key, TABLE[key]) if long else TABLE[key]


TABLE = {
    # measured on an H200: the fastest of those tried. At D = 128 two programs on a multiprocessor, one in its softmax
    # while the other multiplies: under a wait-k mask of 28 heads the forward took 710 us instead of 794 at 8192 tokens
    # with 8 warps on 128 x 128, dq 926 us instead of 1021; at D = 64 the forward 292 us, with 128 rows 306
    ("forward", "large", 64, 2): Tile(64, 64, 4, 3),
    ("forward", "large", 128, 2): Tile(64, 64, 4, 3),
    ("forward", "large", 256, 2): Tile(128, 64, 8, 2),
    ("dq", "large", 64, 2): Tile(128, 64, 4, 3),
    ("dq", "large", 128, 2): Tile(64, 64, 4, 2),
    # 687 us, where 64 x 64 with 4 warps spilled more and took 972
    ("dq", "large", 256, 2): Tile(128, 32, 8, 2),
    ("dkdv", "large", 64, 2): Tile(64, 64, 4, 3),
    ("dkdv", "large", 128, 2): Tile(64, 64, 4, 2),
    ("dkdv", "large", 256, 2): Tile(64, 64, 8, 1),
    # not measured: sized to compile without spills and within shared memory
    ("forward", "medium", 64, 2): Tile(128, 32, 8, 2),
    ("forward", "medium", 128, 2): Tile(64, 32, 8, 2),
    ("forward", "medium", 256, 2): Tile(64, 16, 8, 1),
    ("dq", "medium", 64, 2): Tile(128, 32, 8, 2),
    ("dq", "medium", 128, 2): Tile(32, 32, 8, 1),
    ("dq", "medium", 256, 2): Tile(32, 16, 8, 1),
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

# what runs for long runs at the limit of the GPU's power, where a tile that reads shared memory and the L2 less often
# keeps a higher clock (1.85 GHz, not 1.71): on an H200 after 0.3 s of wait-k masks 2946 us instead of 3080 at 16384
# tokens, 11.5 ms instead of 12.0 at 32768; at 8192 783 us instead of 806, but 744 instead of 718 before the clock falls
LONG_WALKS = {("forward", "large", 128, 2): Tile(128, 64, 8, 2, 128)}

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
