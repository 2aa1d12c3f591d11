"""What the compile check compiles: every tile row with plain causal-like spans, then each feature once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import tiles
from .backward import dkdv_kernel, dq_kernel
from .forward import gather_kept_kernel, span_attention_kernel

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
INT32 = ("bounds", "row_blocks", "key_blocks", "sink_key", "kept", "kept_count", "class_sink")
INT8 = ("listed", "key_class", "row_class", "class_rules")
FP32 = ("lse", "dlse", "work", "mass", "sink_gradient", "sink_logits")
FEATURES: dict[str, dict[str, Any]] = {
    "one slot": {"N": 1},
    "eight slots": {"N": 8},
    "mass": {"RULES": 0b0100},
    "sink": {"RULES": 0b1000},
    "kept": {"RULES": 0b1100, "HAS_KEPT": True},
    "kept, gathered": {"RULES": 0b1100, "HAS_KEPT": True, "GATHERED": True},
    "softcap": {"SOFTCAP": True},
    "sink logits": {"SINK_LOGITS": True},
    "D=80": {"D": 80},
    "one part": {"JOIN": False},
}
CLASSES: dict[str, dict[str, Any]] = {
    "classes": {"CLASSES": 1},
    "classes, many": {"CLASSES": 2},
    "classes, every rule": {"N": 4, "RULES": 0b11100100, "HAS_KEPT": True, "CLASSES": 1, "CLASS_SINK": True},
}


def compile_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) for one compute capability."""
    for D in (64, 128, 256):
        yield from _kernels(f"D={D} bf16", capability, D, "bf16", {})
        yield from _kernels(f"D={D} bf16 classes", capability, D, "bf16", CLASSES["classes"])
    if capability != 90:
        return
    arguments = dict.fromkeys(("k", "v", "kept_k", "kept_v"), "*bf16") | {"kept": "*i32", "kept_count": "*i32"}
    constants = {"D": 128, "BLOCK_K": 32, "BLOCK_D": 128}
    arguments |= dict.fromkeys(constants, "constexpr")
    gather = {name: arguments.get(name, "i32") for name in gather_kept_kernel.arg_names}
    yield from _kernels("long walks", capability, 128, "bf16", {}, long=True)
    yield "gather kept", gather_kept_kernel, gather, constants, {"num_warps": 4}
    # fp32, fp16 and the features once: what they change is the same code everywhere
    for D in (64, 128, 256):
        yield from _kernels(f"D={D} fp32", capability, D, "fp32", {})
    yield from _kernels("fp16", capability, 128, "fp16", {})
    for name, feature in {**FEATURES, **CLASSES}.items():
        yield from _kernels(name, capability, feature.get("D", 128), "bf16", feature)


def local_allowed(name: str) -> int:
    """Bytes of local memory per thread that a kernel may use: a few for the tiles that were the fastest on an H200 in
    spite of them, any for fp32, whose multiply-add products keep whole operands in registers, and for the rarer
    rules."""
    if "fp32" in name or name.endswith(("every rule", "many", *FEATURES)):
        return 1 << 16
    return 640 if "D=256" in name else 128


def _kernels(
    name: str, capability: int, D: int, dtype: str, feature: dict[str, Any], long: bool = False
) -> Iterator[tuple[Any, ...]]:
    size = 4 if dtype == "fp32" else 2
    for room, kernel in zip(tiles.KERNELS, (span_attention_kernel, dq_kernel, dkdv_kernel), strict=True):
        plain = not {"N", "RULES", "SOFTCAP", "CLASSES"} & set(feature) or feature == {"N": 1}
        choice = tiles.tile(room, capability, D, size, plain, "CLASSES" in feature, long)
        values = {
            "N": 2, "RULES": 0, "HAS_KEPT": False, "D": D, "SOFTCAP": False, "SINK_LOGITS": False,
            "CLASSES": 0, "CLASS_SINK": False, "JOIN": True, "kept_k": None, "kept_v": None,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "BLOCK_T": choice.block_t, "BLOCK_S": choice.block_s, "BLOCK_D": tiles.block_d(D), **feature,
        }  # fmt: skip
        if "GATHERED" in feature:
            del values["kept_k"], values["kept_v"]
        constexprs = {key: value for key, value in values.items() if key in kernel.arg_names}
        signature = {n: _type(n, dtype, constexprs, choice, D) for n in kernel.arg_names}
        yield (
            f"{room} {name}",
            kernel,
            signature,
            constexprs,
            choice.options,
        )


def _type(argument: str, dtype: str, constexprs: dict[str, Any], choice: tiles.Tile, D: int) -> str:
    if argument in constexprs:
        return "constexpr"
    if argument in ("q", "do", "k", "v", "kept_k", "kept_v"):
        rows = choice.block_t if argument in ("q", "do") else choice.block_s
        return f"tensordesc<{dtype}[1,1,{rows},{tiles.block_d(D)}]>"
    if argument in ("k_rows", "v_rows", "o", "dq", "dk", "dv"):
        return POINTERS[dtype]
    if argument in INT32:
        return "*i32"
    if argument in INT8:
        return "*i8"
    if argument in FP32:
        return "*fp32"
    return "fp32" if argument in ("inner", "outer", "scale") else "i32"
