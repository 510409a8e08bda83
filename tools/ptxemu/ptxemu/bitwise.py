"""Instructions on bits: logic, shifts, fields, permutations."""

import numpy as np

from ptxemu.fault import Unknown
from ptxemu.formats import (
    DTYPE,
    U,
)
from ptxemu.operands import alu
from ptxemu.parse import Instruction, Program, bits
from ptxemu.table import instruction

BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def bit_length(a: np.ndarray) -> np.ndarray:
    n = np.zeros(a.shape, np.int64)
    for shift in (32, 16, 8, 4, 2, 1):
        if shift < 8 * a.dtype.itemsize:
            high = a >> a.dtype.type(shift)
            n, a = np.where(high != 0, n + shift, n), np.where(high != 0, high, a)
    return n + (a != 0)


def reverse_bits(a: np.ndarray, w: int) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(w):
        out |= (a >> a.dtype.type(i) & a.dtype.type(1)) << a.dtype.type(w - 1 - i)
    return out


@instruction("and", "or", "xor")
def logic(ins: Instruction, program: Program):
    return alu(ins, program, ins.type, [ins.type] * 2, (BOOLEAN if ins.type == "pred" else BITWISE)[ins.name])


@instruction("lop3")
def lookup(ins: Instruction, program: Program):
    table = int(ins.operands[4], 0)

    def function(a, b, c):
        r = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for i in range(8):
            if table >> i & 1:
                r |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return r

    return alu(ins, program, "b32", ["b32"] * 3, function)


@instruction("shl", "shr")
def shift(ins: Instruction, program: Program):
    """Amounts beyond the width give 0, or copies of the sign."""
    type = ins.type
    w, dtype = bits(type), DTYPE[type]

    def function(a, b):
        amount = np.minimum(b, w - 1).astype(dtype)
        r = a << amount if ins.name == "shl" else a >> amount
        return r if type[0] == "s" and ins.name == "shr" else np.where(b >= w, dtype.type(0), r)

    return alu(ins, program, type, [type, "u32"], function)


@instruction("shf")
def funnel_shift(ins: Instruction, program: Program):
    wrap, left = "wrap" in ins.mods, "l" in ins.mods

    def function(low, high, amount):
        amount = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return (both << amount >> np.uint64(32) if left else both >> amount).astype(np.uint32)

    return alu(ins, program, "b32", ["b32", "b32", "u32"], function)


@instruction("bfe")
def extract(ins: Instruction, program: Program):
    type = ins.type
    w, signed = bits(type), type[0] == "s"

    def function(a, start, length):
        start, length = np.minimum(start & 255, 64).astype(np.int64), np.minimum(length & 255, w).astype(np.int64)
        r = np.where(start >= w, 0, a >> np.minimum(start, w - 1).astype(a.dtype)).astype(a.dtype)
        mask = np.where(length >= w, U[w](~U[w](0)), (U[w](1) << np.minimum(length, w - 1).astype(U[w])) - U[w](1))
        if not signed:
            return r & mask
        sign = a >> np.minimum(start + np.maximum(length, 1) - 1, w - 1).astype(a.dtype) & a.dtype.type(1)
        raw = r.view(U[w])
        return np.where((sign != 0) & (length > 0), raw | ~mask, raw & mask).astype(U[w]).view(a.dtype)

    return alu(ins, program, type, [type, "u32", "u32"], function)


@instruction("bfi")
def insert(ins: Instruction, program: Program):
    w = bits(ins.type)
    one = U[w](1)

    def function(a, b, start, length):
        start, length = np.minimum(start & 255, w), np.minimum(length & 255, w)
        ones = np.where(length >= w, ~U[w](0), (one << np.minimum(length, w - 1).astype(U[w])) - one).astype(U[w])
        by = np.minimum(start, w - 1).astype(U[w])
        mask = np.where(start >= w, U[w](0), ones << by)
        return a << by & mask | b & ~mask

    return alu(ins, program, ins.type, [ins.type, ins.type, "u32", "u32"], function)


@instruction("prmt")
def permute(ins: Instruction, program: Program):
    if ins.type != "b32":
        raise Unknown(str(ins))

    def function(a, b, selector):
        both = (b.astype(np.uint64) << np.uint64(32) | a).astype(np.uint64)
        r = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) << np.uint64(3)) & np.uint64(255)).astype(
                np.uint32
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            r |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return r

    return alu(ins, program, "b32", ["b32", "b32", "b32"], function)
