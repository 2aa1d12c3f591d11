"""What the compile check compiles: every tile row with source and target segments, then each feature once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import tiles
from .backward import dkdv_kernel, dq_kernel, place_kernel, rotate_kernel, row_statistics_kernel
from .forward import attend_kernel
from .merge import merge_few_kernel, merge_kernel
from .sight import count_chunks_kernel

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
BOXES = ("source_k_box", "source_v_box", "target_k_box", "target_v_box")
INT32 = ("length", "status", "counts", "source_limit", "source_begin", "target_begin", "sight", "placed", "kept")
FP32 = (
    "cos",
    "sin",
    "sink_logits",
    "lse",
    "dlse",
    "part_o",
    "part_dq",
    "part_m",
    "part_norm",
    "total",
    "delta",
    "share",
    "dk",
)
PLAIN = {
    "R": 7, "INTERLEAVED": False, "HAS_ROLE": False, "HAS_COUNTS": False, "SEGMENT": 1, "HAS_LIMIT": True,
    "HAS_SOURCE_BEGIN": False,
    "HAS_TARGET_BEGIN": False, "SINKS": False, "RINGS": 0, "SOFTCAP": False, "SINK_LOGITS": False, "CHUNK": True,
    "SPLIT": True, "THROUGH_MEMORY": False, "MOST": tiles.MOST_SPLITS, "BLOCK_P": 16,
    "BACK": True, "HAS_DLSE": True, "BLOCK_T": 32,
}  # fmt: skip
FEATURES: dict[str, dict[str, Any]] = {
    "no split": {"SPLIT": False},
    "roles": {"HAS_ROLE": True, "HAS_COUNTS": True, "SEGMENT": 0},
    "rings": {"SINKS": True, "RINGS": 3},
    "begins": {"HAS_SOURCE_BEGIN": True, "HAS_TARGET_BEGIN": True},
    "softcap": {"SOFTCAP": True},
    "sink logits": {"SINK_LOGITS": True, "SPLIT": False},
    "interleaved": {"INTERLEAVED": True},
    "far": {"THROUGH_MEMORY": True},
    "D=80": {"D": 80, "ROTARY": 80},
}


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) for one compute capability."""
    for D in (64, 128, 256):
        for kind in tiles.KINDS:
            # many rows come with long chunks, which are written before
            feature = {"CHUNK": False, "SPLIT": False, "THROUGH_MEMORY": True} if kind == "many" else {}
            yield _case(f"{kind} D={D} bf16", attend_kernel, kind, capability, D, "bf16", feature)
        yield _case(f"dq D={D} bf16", dq_kernel, "dq", capability, D, "bf16", {})
        yield _case(f"dkdv D={D} bf16", dkdv_kernel, "dkdv", capability, D, "bf16", {})
    if capability != 90:
        return
    # fp32, fp16 and the features once: what they change is the same code everywhere
    for D in (64, 128, 256):
        yield _case(f"few D={D} fp32", attend_kernel, "few", capability, D, "fp32", {})
    yield _case("some fp16", attend_kernel, "some", capability, 128, "fp16", {})
    yield _case("many chunk", attend_kernel, "many", capability, 128, "bf16", {})
    small = {
        "merge": merge_kernel, "merge few": merge_few_kernel, "count": count_chunks_kernel, "place": place_kernel,
        "rotate": rotate_kernel, "statistics": row_statistics_kernel,
    }  # fmt: skip
    for name, kernel in small.items():
        feature = {"MOST": tiles.FEW_PARTS, "BLOCK_P": 8} if name == "merge few" else {}
        yield _case(name, kernel, "few", capability, 128, "bf16", feature)
    for name, feature in FEATURES.items():
        yield _case(f"some {name}", attend_kernel, "some", capability, 128, "bf16", feature)


def local_allowed(name: str) -> int:
    """Bytes of local memory per thread that a kernel may use: a few words, which one version of triton spills where the
    other does not, and any for fp32, whose multiply-add products keep whole operands in registers."""
    return 1 << 16 if "fp32" in name else 64


def _case(
    name: str, kernel: Any, room: str, capability: int, D: int, dtype: str, feature: dict[str, Any]
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]:
    holes = bool({"SINKS", "HAS_SOURCE_BEGIN"} & set(feature))
    choice = tiles.tile(room, capability, D, 4 if dtype == "fp32" else 2, holes)
    values = {
        **PLAIN, "D": D, "ROTARY": D, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_M": choice.block_m, "BLOCK_S": choice.block_s, "BLOCK_C": choice.block_c, "BLOCK_D": tiles.block_d(D),
        "STAGES": choice.num_stages, **feature,
    }  # fmt: skip
    values["BOXES"] = choice.boxes and not holes and not values["RINGS"]
    box = "constexpr"
    if values["BOXES"]:
        box = f"tensordesc<{POINTERS[dtype][1:]}[1,1,{choice.block_s},{tiles.block_d(D)}]>"
    else:
        values |= dict.fromkeys(BOXES)
    constexprs = {key: value for key, value in values.items() if key in kernel.arg_names}
    signature = {n: box if n in BOXES else _type(n, dtype, constexprs) for n in kernel.arg_names}
    return name, kernel, signature, constexprs, {"num_warps": choice.num_warps, "num_stages": choice.num_stages}


def _type(argument: str, dtype: str, constexprs: dict[str, Any]) -> str:
    if argument in constexprs:
        return "constexpr"
    if argument in ("inner", "outer", "scale"):
        return "fp32"
    if argument in INT32:
        return "*i32"
    if argument in FP32:
        return "*fp32"
    if argument == "role":
        return "*i8"
    rows = ("q", "k", "v", "o", "do", "dv", "x", "y", "source_k", "source_v", "target_k", "target_v")
    return POINTERS[dtype] if argument in rows else "i32"
