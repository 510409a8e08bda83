"""Single instructions on edge cases and random bits against exact arithmetic in Python's integers and fractions."""

from fractions import Fraction

import numpy as np
import pytest
from ptxemu import Unknown, launch_ptx

EDGES = [0, 1, 2, 0x7F, 0x80, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x3F800000, 0xBF800000]
FLOATS = [0x00000001, 0x007FFFFF, 0x00800000, 0x33800000, 0x4B7FFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]
PRECISION = {"f32": (24, -126, 127), "bf16": (8, -126, 127), "f16": (11, -14, 15), "e5m2": (3, -14, 15)}


def run(statement: str, count: int, *inputs: np.ndarray) -> np.ndarray:
    """One instruction in 32-bit registers a, b, c to d; `count` results of 32 bits."""
    loads = "".join(
        f"ld.param.u64 %rd1, [p{i}]; add.s64 %rd1, %rd1, %rd9; ld.global.b32 %{'abc'[i]}, [%rd1];"
        for i in range(len(inputs))
    )
    params = ", ".join(f".param .u64 p{i}" for i in range(len(inputs) + 1))
    text = f"""
    .version 8.0
    .target sm_90
    .address_size 64
    .visible .entry k({params}) {{
      .reg .b64 %rd<10>; .reg .b32 %r<9>; .reg .pred %p<3>; .reg .b32 %a; .reg .b32 %b; .reg .b32 %c; .reg .b32 %d;
      .reg .b16 %h<3>; .reg .b64 %q;
      mov.u32 %r1, %tid.x; mul.wide.u32 %rd9, %r1, 4;
      {loads}
      {statement}
      ld.param.u64 %rd1, [p{len(inputs)}]; add.s64 %rd1, %rd1, %rd9; st.global.b32 [%rd1], %d;
      ret;
    }}"""
    out = np.zeros(count, "u4")
    launch_ptx(text, None, (1,), (count,), *inputs, out)
    return out


def words(seed: int, extra=EDGES, count: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 1 << 32, count, dtype=np.uint64).astype("u4")
    x[rng.permutation(count)[: len(extra)]] = extra
    return x


def near_floats(seed: int, count: int = 256) -> np.ndarray:
    """float32 of like size, so that sums cancel and round onto midpoints, and edges."""
    rng = np.random.default_rng(seed)
    x = (rng.integers(-(2**12), 2**12, count) * 2.0 ** rng.integers(-14, 2, count)).astype("f4").view("u4")
    x[rng.permutation(count)[: len(FLOATS)]] = FLOATS
    return x


def nearest(x: Fraction, type: str, mode: str = "rn") -> float:
    """A fraction rounded to a float format."""
    mantissa, low, high = PRECISION[type]
    if x == 0:
        return 0.0
    e = max(abs(x.numerator).bit_length() - x.denominator.bit_length(), low - 1)
    while abs(x) >= Fraction(2) ** (e + 1):
        e += 1
    while e > low and abs(x) < Fraction(2) ** e:
        e -= 1
    unit = Fraction(2) ** (max(e, low) - mantissa + 1)
    steps = x / unit
    down = steps.numerator // steps.denominator
    chosen = {"rm": down, "rp": -(-steps.numerator // steps.denominator), "rz": int(steps), "rn": round(steps)}[mode]
    value = chosen * unit
    if abs(value) >= Fraction(2) ** (high + 1):
        return float("inf") * (1 if value > 0 else -1)
    return float(value)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_is_rounded_once(mode):
    a, b, c = near_floats(1), near_floats(2), near_floats(3)
    c[:64] = (-(a[:64].view("f4").astype("f8") * b[:64].view("f4")).astype("f4")).view(
        "u4"
    )  # what is left of the product
    near = 2.0**-12 * np.array([1 + 2.0**-23, 1 - 2.0**-23], "f4")
    a[64:66], b[64:66] = (near[0] * np.array([1, -1], "f4")).view("u4"), near[1:].view("u4")
    c[64:66] = np.array([1 + 2.0**-23, -1 - 2.0**-23], "f4").view("u4")  # float64 rounds these sums onto a midpoint
    got = run(f"fma.{mode}.f32 %d, %a, %b, %c;", 256, a, b, c).view("f4")
    for g, x, y, z in zip(got, *(v.view("f4") for v in (a, b, c)), strict=True):
        if not np.isfinite([x, y, z]).all():
            continue
        want = nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "f32", mode)
        if mode == "rn" or np.isfinite(want):
            assert float(g) == want, (x, y, z)


@pytest.mark.parametrize("type", ["bf16", "f16"])
def test_narrow_operands_of_float32_are_rounded_once(type):
    a, b, c = words(1, []) & 0x3FFF, words(2, []) & 0x3FFF, near_floats(3)
    narrow = [(v << 16).view("f4") if type == "bf16" else v.astype("u2").view("f2") for v in (a, b)]
    halves = "cvt.u16.u32 %h0, %a; cvt.u16.u32 %h1, %b; "
    got = run(f"{halves}fma.rn.f32.{type} %d, %h0, %h1, %c;", 256, a, b, c).view("f4")
    less = run(f"{halves}sub.f32.{type} %d, %h0, %c;", 256, a, b, c).view("f4")
    for g, d, x, y, z in zip(got, less, *narrow, c.view("f4"), strict=True):
        if np.isfinite(z):
            x, y, z = (Fraction(float(v)) for v in (x, y, z))
            assert (float(g), float(d)) == (nearest(x * y + z, "f32"), nearest(x - z, "f32"))


@pytest.mark.parametrize("text", ["mul.f32.bf16 %d, %a, %b;", "max.xorsign.abs.f32 %d, %a, %b;"])
def test_unknown_types_and_modifiers_are_refused(text):
    with pytest.raises(Unknown, match=r"line \d+"):
        run(text, 32, words(1, count=32, extra=[]), words(2, count=32, extra=[]))


CONVERSIONS = {
    "f16": ("cvt.rn.f16.f32 %h0, %a;", lambda raw: raw.astype("u2").view("f2")),
    "bf16": ("cvt.rn.bf16.f32 %h0, %a;", lambda raw: (raw << 16).view("f4")),
    "e5m2": ("cvt.rn.satfinite.e5m2x2.f32 %h0, 0f00000000, %a;", lambda raw: (raw << 8).astype("u2").view("f2")),
}


@pytest.mark.parametrize("type", CONVERSIONS)
def test_conversion_is_to_nearest_even(type):
    a = near_floats(4)
    a[:100] = np.linspace(-7e4, 7e4, 100, dtype="f4").view("u4")
    statement, value = CONVERSIONS[type]
    got = value(run(f"{statement} cvt.u32.u16 %d, %h0;", 256, a)).astype("f8")
    for g, x in zip(got, a.view("f4"), strict=True):
        if np.isfinite(x):
            want = nearest(Fraction(float(x)), type)
            assert g == (np.clip(want, -57344, 57344) if type == "e5m2" else want), x


def signed(u) -> int:
    return int(u) - (1 << 32) * (int(u) >> 31)


def truncated(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1


INTEGERS = {
    "mul.lo.s32 %d, %a, %b;": lambda a, b, c: a * b,
    "mul.hi.u32 %d, %a, %b;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %d, %a, %b;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.wide.s32 %q, %a, %b, 9; mov.b64 {%r2, %d}, %q;": lambda a, b, c: signed(a) * signed(b) + 9 >> 32,
    "mad.lo.cc.u32 %r2, %a, %b, %c; madc.hi.u32 %d, %a, %b, 0;": lambda a, b, c: a * b + c >> 32,
    "add.cc.u32 %r2, %a, %b; addc.u32 %d, %c, 0;": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 %r2, %a, %b; subc.u32 %d, %c, 0;": lambda a, b, c: c - (a < b),
    "div.s32 %d, %a, %b;": lambda a, b, c: truncated(signed(a), signed(b)),
    "rem.s32 %d, %a, %b;": lambda a, b, c: signed(a) - truncated(signed(a), signed(b)) * signed(b) if b else a,
    "div.u32 %d, %a, %b;": lambda a, b, c: a // b if b else 0xFFFFFFFF,
    "shl.b32 %d, %a, %b;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %d, %a, %b;": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %d, %a, %b;": lambda a, b, c: signed(a) >> min(b, 31),
    "and.b32 %r2, %b, 31; shr.s32 %d, %a, %r2;": lambda a, b, c: signed(a) >> b % 32,
    "and.b32 %r2, %b, 63; and.b32 %r3, %c, 31; bfe.u32 %d, %a, %r2, %r3;": lambda a, b, c: a >> b % 64 & low(c),
    "and.b32 %r2, %b, 31; and.b32 %r3, %c, 31; bfe.s32 %d, %a, %r2, %r3;": lambda a, b, c: field(a, b % 32, c % 32),
    "and.b32 %r2, %c, 15; bfi.b32 %d, %a, %b, %r2, 9;": lambda a, b, c: (a & 511) << c % 16 | b & ~(511 << c % 16),
    "prmt.b32 %d, %a, %b, %c;": lambda a, b, c: permuted(a | b << 32, c),
    "lop3.b32 %d, %a, %b, %c, 0xca;": lambda a, b, c: a & b | ~a & c,
    "shf.l.wrap.b32 %d, %a, %b, %c;": lambda a, b, c: (b << 32 | a) << c % 32 >> 32,
    "shf.r.clamp.b32 %d, %a, %b, %c;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "popc.b32 %d, %a;": lambda a, b, c: a.bit_count(),
    "clz.b32 %d, %a;": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32 %d, %a;": lambda a, b, c: a.bit_length() - 1,
    "brev.b32 %d, %a;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "min.s32 %d, %a, %b;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %d, %a, %b;": lambda a, b, c: max(a, b),
    "abs.s32 %d, %a;": lambda a, b, c: abs(signed(a)),
    "cvt.u32.u64 %d, 4294967301;": lambda a, b, c: 5,
    "cvt.u16.u32 %h0, %a; cvt.s32.s16 %d, %h0;": lambda a, b, c: (a & 0xFFFF) - (a & 0x8000) * 2,
    "setp.lt.s32 %p0|%p1, %a, %b; selp.b32 %d, %b, %c, %p1;": lambda a, b, c: b if signed(a) >= signed(b) else c,
    "setp.hs.and.u32 %p0, %a, %b, 1; selp.u32 %d, 1, 0, %p0;": lambda a, b, c: a >= b,
    "mov.b64 %q, {%a, %b}; mov.b64 {%r2, %d}, %q;": lambda a, b, c: b,
    "add.sat.s32 %d, %a, %b;": lambda a, b, c: max(min(signed(a) + signed(b), 2**31 - 1), -(2**31)),
}  # fmt: skip


def low(length: int) -> int:
    return (1 << length % 32) - 1


def field(a: int, start: int, length: int) -> int:
    value = (signed(a) >> start) & (1 << length) - 1
    return value - (1 << length) * (value >> length - 1) if length else 0


def permuted(both: int, selector: int) -> int:
    out = 0
    for i in range(4):
        k = selector >> 4 * i & 15
        byte = both >> 8 * (k & 7) & 255
        out |= (255 * (byte >> 7) if k & 8 else byte) << 8 * i
    return out


@pytest.mark.parametrize("statement", INTEGERS)
def test_integer_instruction(statement):
    a, b, c = words(1), words(2), words(3)
    b[::3] &= 31
    got = run(statement, 256, a, b, c)
    want = [int(INTEGERS[statement](int(x), int(y), int(z))) & 0xFFFFFFFF for x, y, z in zip(a, b, c, strict=True)]
    assert (got == want).all(), [
        (hex(x), hex(y), hex(z)) for x, y, z, g, w in zip(a, b, c, got, want, strict=True) if g != w
    ][:3]


def test_comparisons_and_extremes_with_nan():
    nan, one, two = 0x7FC00000, 0x3F800000, 0x40000000
    a, b = (np.array(v * 8, "u4") for v in ([nan, one, nan, two], [one, nan, nan, one]))
    for name, want in {
        "lt": [0, 0, 0, 0],
        "ltu": [1, 1, 1, 0],
        "ne": [0, 0, 0, 1],
        "neu": [1, 1, 1, 1],
        "num": [0, 0, 0, 1],
        "nan": [1, 1, 1, 0],
        "ge": [0, 0, 0, 1],
    }.items():
        assert list(run(f"setp.{name}.f32 %p0, %a, %b; selp.u32 %d, 1, 0, %p0;", 32, a, b)[:4]) == want, name
    assert list(run("max.f32 %d, %a, %b;", 32, a, b)[[0, 1, 3]]) == [one, one, two]
    assert np.isnan(run("max.NaN.f32 %d, %a, %b;", 32, a, b).view("f4")[:3]).all()
    assert list(
        run("cvt.rzi.s32.f32 %d, %a;", 32, np.array([nan, 0x4F800000, 0xCF800000, 0xBFC00000] * 8, "u4"))[:4]
    ) == [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def test_flush_to_zero_and_saturation():
    tiny, two = 0x00000007, 0x40000000
    a = np.array([tiny, two] * 16, "u4")
    assert list(run("add.ftz.f32 %d, %a, 0f00000000;", 32, a)[:2]) == [0, two]
    assert list(run("add.f32 %d, %a, 0f00000000;", 32, a)[:2]) == [tiny, two]
    assert list(run("add.sat.f32 %d, %a, 0f00000000;", 32, a)[:2]) == [tiny, 0x3F800000]


def test_packed_pairs():
    a, b = words(1, []), words(2, [])
    a, b = a & 0x3FFF3FFF, b & 0x3FFF3FFF  # positive and finite
    got = run("mul.rn.f16x2 %d, %a, %b;", 256, a, b).view("f2")
    assert (got == a.view("f2") * b.view("f2")).all()
    got = run("add.rn.bf16x2 %d, %a, %b;", 256, a, b)
    for shift in (0, 16):
        x, y = (((v >> shift & 0xFFFF) << 16).astype("u4").view("f4") for v in (a, b))
        want = [nearest(Fraction(float(p)) + Fraction(float(q)), "bf16") for p, q in zip(x, y, strict=True)]
        assert (((got >> shift & 0xFFFF) << 16).astype("u4").view("f4") == np.array(want, "f4")).all()
    text = "mov.b64 %q, {%a, %b}; fma.rn.f32x2 %q, %q, %q, %q; mov.b64 {%r2, %d}, %q;"
    y = b.view("f4").astype("f8")
    assert (run(text, 256, a, b).view("f4") == (y * y + y).astype("f4")).all()


APPROXIMATE = {  # the function and the bound of the PTX manual, relative or absolute, whichever is larger
    "ex2.approx": (np.exp2, 2**-22),
    "lg2.approx": (np.log2, 2**-22),
    "rcp.approx": (lambda v: 1 / v, 2**-23),
    "rsqrt.approx": (lambda v: 1 / np.sqrt(v), 2**-22.4),
    "sin.approx": (np.sin, 2**-20.5),
    "tanh.approx": (np.tanh, 2**-11),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximation_is_within_the_documented_bound(name):
    function, bound = APPROXIMATE[name]
    x = np.random.default_rng(0).uniform(0.5, 2, 256).astype("f4")
    got = run(f"{name}.f32 %d, %a;", 256, x.view("u4")).view("f4")
    want = function(x.astype("f8"))
    assert (np.abs(got - want) <= bound * np.maximum(np.abs(want), 1)).all()
