"""Operands of an instruction, resolved once: closures that read and write the registers of the running lanes.

A register is an unsigned array with one entry per lane (bool for predicates). It is replaced, never changed in place,
so arrays may be shared. Types of two numbers (`bf16x2`, `f32x2`) are read as [lanes, 2].
"""

import re
from collections.abc import Callable

import numpy as np

from ptxemu.fault import Unknown
from ptxemu.formats import DTYPE, U, from_bf16, to_bf16
from ptxemu.parse import Instruction, Program, bits, split

SHARED_WINDOW, PARAM_WINDOW, LOCAL_WINDOW, GLOBAL_BASE = (
    1 << 24,
    1 << 39,
    1 << 40,
    1 << 41,
)  # generic addresses of the spaces
SPECIAL = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%clock", "%clock64", "%globaltimer", "%smid", "%nsmid", "%gridid"),
    *("%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt"),
    *("%cluster_ctarank", "%cluster_nctarank", "%dynamic_smem_size", "%envreg1", "%envreg2"),
)  # fmt: skip
Read = Callable[..., np.ndarray]


def halves(type: str) -> str | None:
    """The type of one of two packed numbers, None for a plain type."""
    return type[:-2] if type.endswith("x2") else None


def constant(text: str, type: str) -> np.ndarray | None:
    """An immediate as an array of no dimensions in the unsigned type of `type`; None if it is not one."""
    if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        raw = U[32 if text[1] in "fF" else 64](int(m[1], 16))
        if type == "f64" and text[1] in "fF":
            raw = np.float64(raw.view(np.float32)).view(np.uint64)
        return np.asarray(raw)
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        return None
    value = int(text.rstrip("U"), 0) if not re.fullmatch(r"-?0\d+U?", text) else int(text.rstrip("U"), 8)
    if type == "pred":
        return np.asarray(value != 0)
    width = bits(type)
    return np.asarray(U[width](value & ((1 << width) - 1)))


def typed(raw: np.ndarray, type: str) -> np.ndarray:
    """Raw bits seen as numbers of a type: bf16 as float32, packed pairs as a last axis of two."""
    if half := halves(type):
        raw = np.ascontiguousarray(raw).reshape(*raw.shape, 1).view(U[bits(half)])
        return typed(raw, half)
    if type == "bf16":
        return from_bf16(raw)
    if type in DTYPE and raw.dtype != DTYPE[type]:
        return raw.view(DTYPE[type])
    return raw


def untyped(value: np.ndarray, type: str) -> np.ndarray:
    """The inverse of `typed`."""
    if half := halves(type):
        raw = np.ascontiguousarray(untyped(value, half))
        return raw.view(U[bits(type)]).reshape(raw.shape[:-1])
    if type == "bf16" and value.dtype.kind == "f":
        return to_bf16(value)
    if type in DTYPE:
        value = np.asarray(value, DTYPE[type])
    return value if value.dtype.kind in "ub" else value.view(f"u{value.dtype.itemsize}")


def raw_reader(program: Program, text: str, type: str) -> Read:
    if text in program.registers:
        index, width = program.registers[text]
        want = bits(type)
        if type == "pred" or width == want:
            return lambda s: s.R[index]
        if type[0] == "s" and width < want:
            small, big, out = np.dtype(f"i{width // 8}"), np.dtype(f"i{want // 8}"), U[want]
            return lambda s: s.R[index].view(small).astype(big).view(out)
        out = U[want]
        return lambda s: s.R[index].astype(out)
    if text in SPECIAL:
        out = U[bits(type)]
        return lambda s: s.special[text].astype(out)
    if text[0] == "!":
        inner = raw_reader(program, text[1:], type)
        return lambda s: ~inner(s)
    if text[0] == "{":
        parts = [raw_reader(program, part, f"b{bits(type) // len(split(text[1:-1]))}") for part in split(text[1:-1])]
        out, each = U[bits(type)], bits(type) // len(parts)

        def pack(s):
            total = parts[0](s).astype(out)
            for i, part in enumerate(parts[1:], 1):
                total = total | part(s).astype(out) << out(i * each)
            return total

        return pack
    if (value := constant(text, type)) is not None:
        if value.dtype != bool and value.dtype != U[bits(type)]:
            value = value.astype(U[bits(type)])
        return lambda s: value
    name, _, plus = text.partition("+")
    if name in program.variables:
        space, out, extra = program.variables[name].space, U[bits(type)], int(plus or 0)
        if space in ("shared", "local"):
            return lambda s: np.asarray(s.offset(name) + extra, np.int64).astype(out)
        return lambda s: np.asarray(s.launch.addresses[name] + extra, np.int64).astype(out)
    if name in program.params:
        offset = np.asarray(program.params[name][0] + int(plus or 0), U[bits(type)])
        return lambda s: offset
    raise Unknown(f"operand {text}")


def reader(program: Program, text: str, type: str) -> Read:
    """Numbers of `type` from a register, an immediate, a special register or the address of a variable."""
    raw = raw_reader(program, text, type)
    if type == "pred" or (type not in ("bf16",) and not halves(type) and DTYPE.get(type, np.dtype("u4")).kind == "u"):
        return raw
    if text not in program.registers and (value := constant(text, type)) is not None:
        fixed = typed(raw(None) if value is not None else value, type)
        return lambda s: fixed
    return lambda s: typed(raw(s), type)


def writer(program: Program, text: str, type: str) -> Callable[..., None]:
    """Store numbers of `type` in the lanes of a mask; `_` drops them, `{a, b}` takes parts, low part first."""
    if text == "_":
        return lambda s, value, m: None
    if text[0] == "{":
        names = split(text[1:-1])
        each = bits(type) // len(names)
        parts = [writer(program, name, f"b{each}") for name in names]
        out = U[each]

        def unpack(s, value, m):
            raw = untyped(value, type)
            for i, part in enumerate(parts):
                part(s, (raw >> raw.dtype.type(i * each)).astype(out), m)

        return unpack
    if text not in program.registers:
        raise Unknown(f"destination {text}")
    index, width = program.registers[text]
    want = bits(type)
    extend = width != want and type != "pred"
    signed = type[0] == "s"
    raw_type = type in DTYPE and DTYPE[type].kind in "ub"

    def write(s, value, m):
        raw = value if raw_type and value.dtype == DTYPE[type] else untyped(value, type)
        if extend:
            raw = raw.view(f"i{want // 8}").astype(f"i{width // 8}").view(U[width]) if signed else raw.astype(U[width])
        if m is not None:
            raw = np.where(m, raw, s.R[index])
        elif raw.ndim == 0:
            raw = np.full(s.n, raw)
        s.R[index] = raw

    return write


def address(program: Program, text: str) -> Read:
    """`[register + offset]`, `[variable + offset]` or `[number]` as int64, one per lane."""
    m = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
    if not m:
        raise Unknown(f"address {text}")
    extra = np.int64(int(m[2] or "0", 0))
    if m[1] in program.registers:
        index, width = program.registers[m[1]]
        if width == 64:
            return lambda s: s.R[index].view(np.int64) + extra
        return lambda s: s.R[index].astype(np.int64) + extra
    base = raw_reader(program, m[1], "b64")
    return lambda s: np.broadcast_to(base(s).astype(np.int64) + extra, s.n)


def shared_address(ins: Instruction, program: Program, text: str) -> Read:
    """An address in shared memory; a generic one if the instruction does not name the space."""
    where = address(program, text)
    if any(mod.startswith("shared") for mod in ins.mods):
        return where
    return lambda s: where(s) - SHARED_WINDOW


def alu(ins: Instruction, program: Program, dst: str, sources: list[str], function: Callable, first: int = 1):
    """An instruction that maps source operands, lane by lane, to its first operand."""
    write = writer(program, ins.operands[0], dst)
    reads = [reader(program, ins.operands[first + i], type) for i, type in enumerate(sources)]
    if len(reads) == 1:
        (a,) = reads
        return lambda s, m: write(s, function(a(s)), m)
    if len(reads) == 2:
        a, b = reads
        return lambda s, m: write(s, function(a(s), b(s)), m)
    return lambda s, m: write(s, function(*[read(s) for read in reads]), m)
