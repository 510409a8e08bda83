"""Instructions that compare, select, move and convert."""

from collections.abc import Callable

import numpy as np

from ptxemu.fault import Unknown
from ptxemu.formats import (
    DTYPE,
    U,
    flush,
    from_fp8,
    narrow,
    to_bf16,
    to_fp8,
    to_tf32,
)
from ptxemu.operands import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, alu, reader, writer
from ptxemu.parse import Instruction, Program, bits
from ptxemu.table import finished, instruction, is_float, rounding

COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARE |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(name: str, type: str) -> Callable:
    if name in COMPARE:
        if name == "ne" and is_float(type):
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
        return COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    ordered = COMPARE[name[:-1]]
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


@instruction("setp", "set")
def set_predicate(ins: Instruction, program: Program):
    """`setp.lt.and.s32 p|q, a, b, c`: p = (a < b) and c, q = not (a < b) and c."""
    type = ins.type
    name, combine = ins.mods[0], next((BOOLEAN[mod] for mod in ins.mods[1:-1] if mod in BOOLEAN), None)
    function = compare(name, type)
    a, b = (reader(program, text, type) for text in ins.operands[1:3])
    c = reader(program, ins.operands[3], "pred") if combine else None
    if ins.name == "set":
        dst = ins.mods[-2]
        write = writer(program, ins.operands[0], dst)
        true = np.asarray(1.0, np.float32) if dst == "f32" else np.asarray(0xFFFFFFFF, np.uint32).view(DTYPE[dst])
        return lambda s, m: write(s, np.where(function(a(s), b(s)), true, np.zeros_like(true)), m)
    first, _, second = ins.operands[0].partition("|")
    write, write_not = writer(program, first, "pred"), writer(program, second or "_", "pred")

    def execute(s, m):
        r = np.asarray(function(a(s), b(s)))
        if r.ndim == 2:  # packed pairs: each predicate takes one half
            write(s, r[:, 0], m)
            return write_not(s, r[:, 1], m)
        other = c(s) if c else None
        write(s, combine(r, other) if combine else r, m)
        return write_not(s, combine(~r, other) if combine else ~r, m)

    return execute


@instruction("selp")
def select(ins: Instruction, program: Program):
    raw = f"b{bits(ins.type)}" if ins.type != "pred" else "pred"
    return alu(ins, program, raw, [raw, raw, "pred"], lambda a, b, p: np.where(p, a, b))


@instruction("slct")
def select_by_sign(ins: Instruction, program: Program):
    raw = f"b{bits(ins.mods[-2])}"
    return alu(ins, program, raw, [raw, raw, ins.type], lambda a, b, c: np.where(c >= 0, a, b))


@instruction("mov")
def move(ins: Instruction, program: Program):
    raw = "pred" if ins.type == "pred" else f"b{bits(ins.type)}"
    return alu(ins, program, raw, [raw], lambda a: a)


@instruction("cvta")
def convert_address(ins: Instruction, program: Program):
    """Generic addresses of shared and local memory lie in windows of their own."""
    space = ins.mods[1] if ins.mods[0] == "to" else ins.mods[0]
    offset = np.uint64(
        {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space.partition("::")[0], 0)
    )
    if ins.mods[0] == "to":
        return alu(ins, program, "u64", ["u64"], lambda a: a - offset)
    return alu(ins, program, "u64", ["u64"], lambda a: a + offset)


@instruction("cvt")
def convert(ins: Instruction, program: Program):
    dst, src = ins.mods[-2:]
    if dst.endswith("x2") and src == "f32":
        half = dst[:-2]
        pack = halfway(half, ins)
        high, low = (reader(program, text, "f32") for text in ins.operands[1:3])
        write = writer(program, ins.operands[0], f"b{bits(dst)}")

        def execute(s, m):
            h, lo = np.broadcast_arrays(pack(high(s)), pack(low(s)))
            raw = np.stack([lo, h], -1)
            write(s, np.ascontiguousarray(raw).view(U[bits(dst)])[..., 0], m)

        return execute
    if src in ("e4m3x2", "e5m2x2"):
        kind = src[:-2]

        def widen(a):
            raw = np.ascontiguousarray(a).reshape(*a.shape, 1).view(np.uint8)
            return from_fp8(raw, kind).astype(np.float16)

        return alu(ins, program, "f16x2", ["b16"], widen)
    if dst.startswith("tf32"):
        to_nearest = "rn" in ins.mods
        return alu(ins, program, "b32", ["b32"], round_tf32 if to_nearest else to_tf32)
    if dst == "bf16":
        return alu(ins, program, "b16", [src], finished(ins, lambda a: to_bf16(np.asarray(a), rounding(ins))))
    if is_float(src) and not is_float(dst):
        return alu(ins, program, dst, [src], float_to_integer(ins, dst))
    if is_float(dst):
        return alu(ins, program, dst, [src], finished(ins, to_float(ins, dst, src)))
    if "sat" in ins.mods:
        info = np.iinfo(DTYPE[dst])
        return alu(
            ins,
            program,
            dst,
            [src],
            lambda a: np.clip(a, max(info.min, np.iinfo(a.dtype).min), min(info.max, np.iinfo(a.dtype).max)),
        )
    return alu(ins, program, dst, [src], lambda a: a.astype(DTYPE[dst]))


def round_tf32(raw: np.ndarray) -> np.ndarray:
    return (raw + np.uint32(0xFFF) + (raw >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)


def halfway(half: str, ins: Instruction) -> Callable:
    """float32 to one of two packed numbers, as raw bits."""
    if half == "bf16":
        return finished(ins, lambda a: to_bf16(a, rounding(ins)))
    if half == "f16":
        return lambda a: narrow(a.astype(np.float64), "f16", rounding(ins)).view(np.uint16)
    return lambda a: to_fp8(a, half)


def float_to_integer(ins: Instruction, dst: str) -> Callable:
    round_to = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    function = next(round_to[mod] for mod in ins.mods if mod in round_to)
    info = np.iinfo(DTYPE[dst])

    def convert(a):
        a = flush(a) if "ftz" in ins.mods else a
        r = function(np.nan_to_num(a.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
        inside = (r > info.min) & (r < float(info.max))
        value = np.where(inside, r, 0).astype(DTYPE[dst])
        return np.where(inside, value, np.where(r > 0, DTYPE[dst].type(info.max), DTYPE[dst].type(info.min)))

    return convert


def to_float(ins: Instruction, dst: str, src: str) -> Callable:
    dtype = DTYPE[dst]
    if (mode := rounding(ins)) == "rn":
        if integral := {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(ins.mods[0]):
            return lambda a: integral(a).astype(dtype)
        return lambda a: a.astype(dtype)
    if bits(src) == 64 and not is_float(src):
        raise Unknown(str(ins))
    return lambda a: narrow(a.astype(np.float64), dst, mode)
