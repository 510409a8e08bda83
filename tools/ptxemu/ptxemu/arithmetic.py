"""Instructions that calculate: sums, products, quotients, extremes, transcendental functions."""

from collections.abc import Callable

import numpy as np

from ptxemu.bitwise import bit_length, reverse_bits
from ptxemu.fault import Unknown
from ptxemu.formats import (
    DTYPE,
    divide,
    fma_f32,
    multiply_high,
    narrow,
    to_bf16,
    to_odd_sum,
)
from ptxemu.operands import alu, halves, reader, typed, writer
from ptxemu.parse import Instruction, Program, bits
from ptxemu.table import finished, instruction, is_float, rounding, types


def exact_sum(type: str, mode: str) -> Callable:
    """a·b + c in one rounding: float32 in `fma_f32`; others, and directed roundings, from the sum rounded to odd."""
    half = halves(type) or type
    if half == "f32" and mode == "rn":
        return fma_f32
    if half == "f64":
        return fma_f64

    def fma(a, b, c):
        p, c = np.broadcast_arrays(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
        total = to_odd_sum(p, c, p + c)
        return typed(to_bf16(total), "bf16") if half == "bf16" else narrow(total, half, mode)

    return fma


def fma_f64(a, b, c):
    """Exactly rounded through rational numbers: slow, and rare in kernels."""
    from fractions import Fraction

    def one(x, y, z):
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            return x * y + z
        total = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        return float(total) if total else x * y + z

    return np.vectorize(one, otypes=[np.float64])(a, b, c)


def saturate_s32(function: Callable) -> Callable:
    return lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(1 << 31), (1 << 31) - 1)


@instruction("add", "sub", "mul")
def sum_or_product(ins: Instruction, program: Program):
    (type, *narrow_type), name = types(ins), ins.name
    if name == "mul" and not is_float(type):
        return integer_product(ins, program)
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    if (mode := rounding(ins)) != "rn" and is_float(type):
        fma = exact_sum(type, mode)
        one = np.ones((), DTYPE[halves(type) or type])
        function = {
            "add": lambda a, b: fma(a, one, b),
            "sub": lambda a, b: fma(a, one, -b),
            "mul": lambda a, b: fma(a, b, -0 * one),
        }[name]
    if "sat" in ins.mods and type == "s32":
        function = saturate_s32(function)
    if "cc" in ins.mods:
        return with_carry(ins, program)
    return alu(ins, program, type, [*narrow_type, type, type][:2], finished(ins, function))


def integer_product(ins: Instruction, program: Program):
    type = ins.type
    if "wide" in ins.mods:
        wide = f"{type[0]}{2 * bits(type)}"
        dtype = DTYPE[wide]
        return alu(ins, program, wide, [type, type], lambda a, b: a.astype(dtype) * b.astype(dtype))
    return alu(ins, program, type, [type, type], multiply_high if "hi" in ins.mods else np.multiply)


@instruction("mad", "fma")
def multiply_add(ins: Instruction, program: Program):
    type, *narrow_type = types(ins)
    if is_float(type):
        sources = [*(2 * narrow_type), type, type, type][:3]
        return alu(ins, program, type, sources, finished(ins, exact_sum(type, rounding(ins))))
    if "cc" in ins.mods:
        return with_carry(ins, program)
    if "wide" in ins.mods:
        wide = f"{type[0]}{2 * bits(type)}"
        dtype = DTYPE[wide]
        return alu(ins, program, wide, [type, type, wide], lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c)
    product = multiply_high if "hi" in ins.mods else np.multiply
    return alu(ins, program, type, [type] * 3, lambda a, b, c: product(a, b) + c)


@instruction("addc", "subc", "madc")
def with_carry(ins: Instruction, program: Program):
    """Multi-word arithmetic: `.cc` writes the carry (of a subtraction: the borrow), addc, subc and madc read it."""
    if bits(ins.type) != 32:
        raise Unknown("carry of 64 bits")
    reads = [reader(program, text, "u32") for text in ins.operands[1:]]
    write, name, uses = writer(program, ins.operands[0], "u32"), ins.name[:3], ins.name[-1] == "c"

    def execute(s, m):
        args = [read(s).astype(np.uint64) for read in reads]
        carry = s.carry.astype(np.uint64) if uses else np.uint64(0)
        if name == "mad":
            product = args[0] * args[1]
            args = [product >> np.uint64(32) if "hi" in ins.mods else product & np.uint64(0xFFFFFFFF), args[2]]
            if ins.type[0] == "s" and "hi" in ins.mods:
                raise Unknown("signed high product with carry")
        total = np.broadcast_to(args[0] - args[1] - carry if name == "sub" else args[0] + args[1] + carry, s.n)
        write(s, total.astype(np.uint32), m)
        if "cc" in ins.mods:
            out = total >> np.uint64(32) != 0
            s.carry = out if m is None else np.where(m, out, s.carry)

    return execute


@instruction("mul24", "mad24")
def product_24(ins: Instruction, program: Program):
    if "hi" in ins.mods:
        raise Unknown(str(ins))
    mask = DTYPE[ins.type].type(0xFFFFFF)
    shift = DTYPE[ins.type].type(8)

    def low(a, b):
        return ((a & mask) << shift >> shift) * ((b & mask) << shift >> shift)

    if ins.name == "mul24":
        return alu(ins, program, ins.type, [ins.type] * 2, low)
    return alu(ins, program, ins.type, [ins.type] * 3, lambda a, b, c: low(a, b) + c)


@instruction("div", "rem")
def quotient(ins: Instruction, program: Program):
    type = ins.type
    if is_float(type):
        function = finished(ins, np.divide)
        if (mode := rounding(ins)) != "rn":
            raise Unknown(f"rounding {mode} of {ins}")
    elif ins.name == "div":
        function = divide
    else:

        def function(a, b):
            return a - np.where(b == 0, 0, divide(a, b)).astype(a.dtype) * b

    return alu(ins, program, type, [type, type], function)


@instruction("min", "max")
def extreme(ins: Instruction, program: Program):
    type = ins.type
    if not is_float(type):
        return alu(ins, program, type, [type, type], {"min": np.minimum, "max": np.maximum}[ins.name])
    propagate = {"min": np.minimum, "max": np.maximum}[ins.name]
    ignore = {"min": np.fmin, "max": np.fmax}[ins.name]
    function = propagate if "NaN" in ins.mods else ignore
    count = len(ins.operands) - 1  # sm_100 has three
    return alu(ins, program, type, [type] * count, finished(ins, lambda *args: reduce(function, args)))


def reduce(function: Callable, args):
    total = args[0]
    for a in args[1:]:
        total = function(total, a)
    return total


@instruction("neg", "abs", "not", "popc", "clz", "brev", "bfind", "cnot")
def unary(ins: Instruction, program: Program):
    type = ins.type
    if type == "pred":
        return alu(ins, program, type, [type], np.logical_not)
    w = bits(type)
    if ins.name == "bfind" and (type[0] == "s" or "shiftamt" in ins.mods):
        raise Unknown(str(ins))
    function, dst = {
        "neg": (np.negative, type),
        "abs": (np.abs, type),
        "not": (np.invert, type),
        "cnot": (lambda a: (a == 0).astype(a.dtype), type),
        "popc": (lambda a: np.bitwise_count(a).astype(np.uint32), "u32"),
        "clz": (lambda a: (w - bit_length(a)).astype(np.uint32), "u32"),
        "bfind": (lambda a: (bit_length(a) - 1).astype(np.int64).astype(np.uint32), "u32"),
        "brev": (lambda a: reverse_bits(a, w), type),
    }[ins.name]
    return alu(ins, program, dst, [type], finished(ins, function))


def in_double(function: Callable) -> Callable:
    """Evaluated in float64 and rounded: at least as near as the documented bound of the approximate instruction."""
    return lambda a: (
        typed(to_bf16(function(a.astype(np.float64))), "bf16")
        if a.dtype == np.uint16
        else function(a.astype(np.float64)).astype(a.dtype)
    )


@instruction("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh")
def transcendental(ins: Instruction, program: Program):
    function = {
        "sqrt": np.sqrt,
        "rsqrt": in_double(lambda a: 1 / np.sqrt(a)),
        "rcp": lambda a: a.dtype.type(1) / a,
        "ex2": in_double(np.exp2),
        "lg2": in_double(np.log2),
        "sin": in_double(np.sin),
        "cos": in_double(np.cos),
        "tanh": in_double(np.tanh),
    }[ins.name]
    if rounding(ins) != "rn":
        raise Unknown(str(ins))
    return alu(ins, program, ins.type, [ins.type], finished(ins, function))


@instruction("copysign")
def copysign(ins: Instruction, program: Program):
    return alu(ins, program, ins.type, [ins.type] * 2, lambda a, b: np.copysign(b, a))


@instruction("testp")
def test_property(ins: Instruction, program: Program):
    tiny = np.finfo(DTYPE[ins.type]).tiny
    function = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }[ins.mods[0]]
    return alu(ins, program, "pred", [ins.type], function)


@instruction("dp4a")
def dot_4(ins: Instruction, program: Program):
    ta, tb = ins.mods[-2:]

    def quads(x, type):
        return np.ascontiguousarray(x).reshape(*x.shape, 1).view("i1" if type == "s32" else "u1").astype(np.int64)

    def function(a, b, c):
        return (np.sum(quads(a, ta) * quads(b, tb), -1) + c.astype(np.int64)).astype(DTYPE["s32"])

    return alu(ins, program, "s32", ["b32", "b32", "s32" if "s32" in (ta, tb) else "u32"], function)
