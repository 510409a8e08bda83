"""Numbers as PTX has them: which numpy type holds a PTX type, and the roundings that numpy lacks."""

import numpy as np

U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPE = {f"{k}{w}": np.dtype(f"{c}{w // 8}") for k, c in (("u", "u"), ("b", "u"), ("s", "i")) for w in U}
DTYPE |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
MANTISSA = {"f16": 10, "bf16": 7, "tf32": 10, "e4m3": 3, "e5m2": 2}  # bits that are stored


def from_bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """The nearest bf16 (ties to even) as uint16; `x` in float32, or in float64, which is rounded once."""
    if x.dtype == np.float64:
        x = to_odd_f32(x)
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rz":
        raw = (u >> np.uint32(16)).astype(np.uint16)
    else:
        raw = ((u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), raw)


def to_tf32(raw: np.ndarray) -> np.ndarray:
    """float32 bits rounded to 10 bits of mantissa, ties away from zero (`cvt.rna.tf32.f32`)."""
    return (raw + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def to_odd_f32(x: np.ndarray) -> np.ndarray:
    """float64 to float32 by truncation, the last bit set where something was cut off: may be rounded again, exactly."""
    y = x.astype(np.float32)
    back = y.astype(np.float64)
    over = np.abs(back) > np.abs(x)
    y = np.where(over, np.nextafter(y, np.float32(0)), y)
    u = np.ascontiguousarray(y).view(np.uint32)
    inexact = (y.astype(np.float64) != x) & ~np.isnan(x)
    return np.where(inexact, u | np.uint32(1), u).astype(np.uint32).view(np.float32)


def from_fp8(raw: np.ndarray, kind: str) -> np.ndarray:
    """e4m3 (no infinity, NaN is S.1111.111) or e5m2 (as IEEE) to float32."""
    raw = raw.astype(np.uint8)
    if kind == "e5m2":
        return (raw.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    e, m = (raw >> 3 & 15).astype(np.int32), (raw & 7).astype(np.float32)
    value = np.where(e > 0, np.ldexp(1 + m / 8, e - 7), np.ldexp(m / 8, -6))
    value = np.where(raw & 0x7F == 0x7F, np.float32(np.nan), value)
    return np.where(raw & 0x80, -value, value).astype(np.float32)


def to_fp8(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 to fp8, ties to even, saturating at the largest finite number (`.satfinite`)."""
    x = np.asarray(x, np.float64)
    bias, mantissa, largest = (7, 3, 448.0) if kind == "e4m3" else (15, 2, 57344.0)
    a = np.abs(np.where(np.isnan(x), 0, x))
    e = np.maximum(np.frexp(np.where(a == 0, 1e-30, a))[1] - 1, 1 - bias)
    a = np.minimum(np.ldexp(np.rint(np.ldexp(a, mantissa - e)), e - mantissa), largest)
    e = np.maximum(np.frexp(np.where(a == 0, 1e-30, a))[1] - 1, 1 - bias)
    steps = np.ldexp(a, mantissa - e).astype(np.int64)  # with the hidden bit
    raw = steps + ((e + bias - 1) << mantissa)  # a subnormal has e = 1 - bias and no hidden bit
    raw = np.where(np.isnan(x), 0x7F, raw)
    return (raw | np.signbit(x) << 7).astype(np.uint8)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c rounded once to float32: exact in float64 but where that sum itself was rounded onto a midpoint."""
    p = a.astype(np.float64) * b.astype(np.float64)  # exact: 24 + 24 bits
    s = p + c
    u = np.asarray(s).view(np.uint64) & np.uint64(0x1FFFFFFF)
    if (u == np.uint64(0x10000000)).any() or ((np.abs(s) < 2.0**-126) & (s != 0)).any():
        s = to_odd_sum(p, np.broadcast_to(c, p.shape).astype(np.float64), s)
    return s.astype(np.float32)


def to_odd_sum(a: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """s = fl(a + b) moved to the neighbour with odd last bit where the sum was rounded (TwoSum, then round to odd)."""
    bb = s - a
    error = (a - (s - bb)) + (b - bb)
    u = np.asarray(s).view(np.int64)
    wrong = (error != 0) & np.isfinite(error) & np.isfinite(s) & (u & 1 == 0)
    away = (error > 0) == (s > 0)  # the exact sum is further from zero
    return np.where(wrong, u + np.where(away, 1, -1), u).view(np.float64)


def narrow(x: np.ndarray, type: str, mode: str) -> np.ndarray:
    """An exact float64 to a PTX float type in rounding mode rn, rz, rm or rp."""
    dtype = DTYPE[type]
    y = x.astype(dtype)
    if mode == "rn" or dtype == np.float64:
        return y
    back = y.astype(np.float64)
    zero, down, up = dtype.type(0), dtype.type(-np.inf), dtype.type(np.inf)
    if mode == "rz":
        return np.where(np.abs(back) > np.abs(x), np.nextafter(y, zero), y)
    if mode == "rm":
        return np.where(back > x, np.nextafter(y, down), y)
    assert mode == "rp", mode
    return np.where(back < x, np.nextafter(y, up), y)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of the same sign (`.ftz`)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division that truncates; by zero all bits are set, as devices do."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    if a.dtype.kind == "u":
        return np.where(b == 0, a.dtype.type(np.iinfo(a.dtype).max), a // np.where(b == 0, 1, b).astype(a.dtype))
    q = np.abs(a).view(unsigned) // np.where(b == 0, 1, np.abs(b)).astype(a.dtype).view(unsigned)
    q = np.where((a < 0) ^ (b < 0), -q.view(a.dtype), q.view(a.dtype))
    return np.where(b == 0, a.dtype.type(-1), q)


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two integers."""
    w = 8 * a.dtype.itemsize
    if w < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(w)).astype(a.dtype)
    mask = (1 << 64) - 1
    out = [(int(x) * int(y) >> 64) & mask for x, y in np.broadcast(a, b)]
    return np.array(out, np.uint64).view(a.dtype).reshape(np.broadcast_shapes(a.shape, b.shape))
