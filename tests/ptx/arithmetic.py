"""The table of instructions that compute in registers: name, types of the operands, meaning.

`@instruction("name", ...)` registers a function that turns a parsed instruction into a closure `execute(s, m)`: `s` are
the running lanes, `m` the mask of those that take part (None: all). A new instruction is usually one call of `alu`.
"""

from collections.abc import Callable

import numpy as np

from ptx.fault import Unknown
from ptx.formats import (
    DTYPE,
    U,
    divide,
    flush,
    fma_f32,
    from_fp8,
    multiply_high,
    narrow,
    to_bf16,
    to_fp8,
    to_odd_sum,
    to_tf32,
)
from ptx.operands import alu, halves, reader, typed, writer
from ptx.parse import Instruction, Program, bits

TABLE: dict[str, Callable] = {}
ROUNDINGS = ("rn", "rz", "rm", "rp")
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARE |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def instruction(*names: str):
    def register(decode):
        for name in names:
            assert name not in TABLE, name
            TABLE[name] = decode
        return decode

    return register


def is_float(type: str) -> bool:
    return type[0] == "f" or type.startswith("bf16")


def rounding(ins: Instruction) -> str:
    return next((mod for mod in ins.mods if mod in ROUNDINGS), "rn")


def finished(ins: Instruction, function: Callable) -> Callable:
    """`.ftz` flushes subnormal inputs and results, `.sat` clamps to [0, 1], `.relu` to at least 0."""
    if "ftz" in ins.mods and "f32" in ins.type:
        inner = function

        def function(*args):
            return flush(inner(*[flush(a) if a.dtype == np.float32 else a for a in args]))

    if "sat" in ins.mods and is_float(ins.type):
        exact = function

        def function(*args):
            r = exact(*args)
            return np.where(np.isnan(r), r.dtype.type(0), np.clip(r, 0, 1).astype(r.dtype))

    if "relu" in ins.mods:
        signed = function

        def function(*args):
            r = signed(*args)
            return np.where(r > 0, r, np.where(np.isnan(r), r, r.dtype.type(0)))

    return function


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
    type, name = ins.type, ins.name
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
    return alu(ins, program, type, [type, type], finished(ins, function))


def integer_product(ins: Instruction, program: Program):
    type = ins.type
    if "wide" in ins.mods:
        wide = f"{type[0]}{2 * bits(type)}"
        dtype = DTYPE[wide]
        return alu(ins, program, wide, [type, type], lambda a, b: a.astype(dtype) * b.astype(dtype))
    return alu(ins, program, type, [type, type], multiply_high if "hi" in ins.mods else np.multiply)


@instruction("mad", "fma")
def multiply_add(ins: Instruction, program: Program):
    type = ins.type
    if is_float(type):
        return alu(ins, program, type, [type] * 3, finished(ins, exact_sum(type, rounding(ins))))
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
    if "xorsign" in ins.mods:
        raise Unknown(str(ins))
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


@instruction("dp4a")
def dot_4(ins: Instruction, program: Program):
    ta, tb = ins.mods[-2:]

    def quads(x, type):
        return np.ascontiguousarray(x).reshape(*x.shape, 1).view("i1" if type == "s32" else "u1").astype(np.int64)

    def function(a, b, c):
        return (np.sum(quads(a, ta) * quads(b, tb), -1) + c.astype(np.int64)).astype(DTYPE["s32"])

    return alu(ins, program, "s32", ["b32", "b32", "s32" if "s32" in (ta, tb) else "u32"], function)


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
        write(s, combine(r, other) if c else r, m)
        return write_not(s, combine(~r, other) if c else ~r, m)

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
    from ptx.operands import LOCAL_WINDOW, SHARED_WINDOW

    space = ins.mods[1] if ins.mods[0] == "to" else ins.mods[0]
    offset = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space.partition("::")[0], 0))
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


@instruction(
    "griddepcontrol",
    "prefetch",
    "prefetchu",
    "setmaxnreg",
    "nanosleep",
    "discard",
    "applypriority",
    "createpolicy",
    "pmevent",
)
def ignored(ins: Instruction, program: Program):
    """No meaning for values: one instruction is done before the next begins. The race detector has its own rules."""
    if ins.name == "createpolicy":
        return alu(ins, program, "b64", [], lambda: np.zeros((), np.uint64))
    return lambda s, m: None
