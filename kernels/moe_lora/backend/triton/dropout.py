"""Dropout in the Triton kernels: the function of `dropout.py`, bit for bit."""

# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def kept(
    seed, threshold, rows, first_d, D,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Which of rows × (first_d, first_d + 1, ...) dropout keeps, [BLOCK_T, BLOCK_D]: the function in `dropout.py`.

    PAIRED (D even, so that a row starts with a pair) makes each random word once for its two elements. Without WIDE
    all pairs have numbers below 2^32.
    """
    if PAIRED:
        j = rows.to(tl.int64)[:, None] * (D // 2) + (first_d // 2 + tl.arange(0, BLOCK_D // 2))[None, :]
        z = _word(seed, j, WIDE)
        word = tl.reshape(tl.join(z << 16, z), (BLOCK_T, BLOCK_D))
    else:
        c = rows.to(tl.int64)[:, None] * D + (first_d + tl.arange(0, BLOCK_D))[None, :]
        z = _word(seed, c >> 1, WIDE)
        word = tl.where((c & 1) == 0, z << 16, z)
    return word.to(tl.int32, bitcast=True) >= (threshold - 32768) << 16


@triton.jit(do_not_specialize=("seed", "threshold", "T"))
def drop_kernel(
    x_ptr, out_ptr, seed, threshold, T, D, stride_xt, stride_xd,
    PAIRED: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [T, D] = x where dropout keeps it, else 0. Grid: tiles of rows, tiles of columns."""
    first_d = tl.program_id(1) * BLOCK_D
    rows, columns = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), first_d + tl.arange(0, BLOCK_D)
    mask = (rows < T)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_xt + columns.to(tl.int64)[None, :] * stride_xd
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    x = tl.where(kept(seed, threshold, rows, first_d, D, BLOCK_T, BLOCK_D, PAIRED, WIDE), x, 0.0)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], x, mask=mask)


@triton.jit
def _word(seed, j, WIDE: tl.constexpr):
    """The random word of pair j, uint32."""
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    seed = seed.to(tl.int64)
    a, b = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    a ^= _mix(b + 0x9E3779B9)
    b ^= _mix(a + 0x85EBCA6B)
    a ^= _mix(b + 0xC2B2AE35)
    if WIDE:
        b = b ^ _mix((j >> 32).to(tl.uint32) + 0x27D4EB2F)
    else:
        b ^= _mix(b * 0 + 0x27D4EB2F)
    z = j.to(tl.uint32) + a
    z ^= z >> 16
    z *= 0x7FEB352D
    z ^= z >> 15
    z += b
    z *= 0x846CA68B
    return z ^ (z >> 16)


@triton.jit
def _mix(z):
    z ^= z >> 16
    z *= 0x7FEB352D
    z ^= z >> 15
    z *= 0x846CA68B
    return z ^ (z >> 16)
