"""Kernels that treat each element alone, or move it."""

import math

import numpy as np
import torch
import triton
import triton.language as tl

from ptxemu.examples.example import exact, floats


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask) + tl.load(y_ptr + i, mask), mask)


def add(dtype, n):
    def make(rng):
        x, y = floats(rng, n).to(dtype), floats(rng, n).to(dtype)
        return (triton.cdiv(n, 256),), (x, y, torch.zeros(n, dtype=dtype), n), {2: (x + y).double().numpy()}

    return make


@triton.jit
def activation_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < n, 0)
        y = (
            x * tl.sigmoid(x)
            + tl.exp2(x)
            + tl.sqrt(tl.abs(x))
            + tl.log(tl.abs(x) + 1)
            + tl.sin(x) * tl.cos(x)
            + tl.erf(x)
        )
        tl.store(out_ptr + i, y, i < n)


def activation(rng):
    x = floats(rng, 1000)
    v = exact(x)
    erf = np.vectorize(math.erf)(v)
    want = v / (1 + np.exp(-v)) + 2**v + np.sqrt(abs(v)) + np.log(abs(v) + 1) + np.sin(v) * np.cos(v) + erf
    return (3,), (x, torch.zeros(1000), 1000), {1: want}


@triton.jit
def integers_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, i < n, 1), tl.load(y_ptr + i, i < n, 1)
    tl.store(out_ptr + i, x // y, i < n)
    tl.store(out_ptr + n + i, x % y, i < n)
    tl.store(out_ptr + 2 * n + i, (x << (y & 31)) ^ (x >> 3) | (y & x), i < n)
    tl.store(
        out_ptr + 3 * n + i,
        tl.umulhi(x.to(tl.uint32, bitcast=True), y.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True),
        i < n,
    )
    tl.store(out_ptr + 4 * n + i, tl.maximum(x, y) - tl.minimum(tl.abs(x), y), i < n)


def integers(rng):
    x, y = rng.integers(-(2**31), 2**31, 200).astype("i4"), rng.integers(1, 1000, 200).astype("i4")
    X, Y = x.astype("i8"), y.astype("i8")
    truncated = np.trunc(X / Y).astype("i8")
    high = ((X & 0xFFFFFFFF) * Y >> 32).astype("i4")
    want = [
        truncated,
        X - truncated * Y,
        (x << (y & 31)) ^ (x >> 3) | (y & x),
        high,
        np.maximum(x, y) - np.minimum(np.abs(x), y),
    ]
    return (
        (1,),
        (torch.from_numpy(x), torch.from_numpy(y), torch.zeros(5, 200, dtype=torch.int32), 200),
        {2: np.stack(want)},
    )


@triton.jit
def collatz_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    steps = tl.zeros_like(x)
    while tl.max(x, 0) > 1:
        steps += (x > 1).to(tl.int32)
        x = tl.where(x > 1, tl.where(x % 2 == 0, x // 2, 3 * x + 1), x)
    tl.store(out_ptr + i, steps)


def collatz(rng):
    x, want = rng.integers(1, 100, 128).astype("i4"), []
    for v in x:
        steps = 0
        while v > 1:
            v, steps = v // 2 if v % 2 == 0 else 3 * v + 1, steps + 1
        want.append(steps)
    return (4,), (torch.from_numpy(x), torch.zeros(128, dtype=torch.int32)), {1: want}


@triton.jit
def transpose_kernel(x_ptr, out_ptr, M, N, B: tl.constexpr):
    m, n = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :])
    tl.store(out_ptr + n[:, None] * M + m[None, :], tl.trans(x), (n < N)[:, None] & (m < M)[None, :])


def transpose(dtype):
    def make(rng):
        x = floats(rng, 64, 96).to(dtype)
        return (2, 3), (x, torch.zeros(96, 64, dtype=dtype), 64, 96), {1: exact(x).T}

    return make


@triton.jit
def gather_kernel(table_ptr, index_ptr, out_ptr, n, D: tl.constexpr, BLOCK: tl.constexpr):
    i, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    row = tl.load(index_ptr + i, i < n, 0)
    tl.store(
        out_ptr + i[:, None] * D + d[None, :], tl.load(table_ptr + row[:, None] * D + d[None, :]), (i < n)[:, None]
    )


def gather(rng):
    table, index = floats(rng, 20, 32).half(), torch.from_numpy(rng.integers(0, 20, 70))
    return (3,), (table, index, torch.zeros(70, 32).half(), 70), {2: exact(table)[index.numpy()]}


@triton.jit
def dropout_kernel(x_ptr, out_ptr, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(seed, i) > p
    tl.store(out_ptr + i, tl.where(keep, tl.load(x_ptr + i, i < n, 0) / (1 - p), 0), i < n)


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """The first word of ten rounds of Philox-4x32 (Salmon and others, 2011)."""
    c = [counter.astype(np.uint64), *(np.zeros(len(counter), np.uint64) for _ in range(3))]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        c = [b >> high ^ c[1] ^ np.uint64(k0), b & low, a >> high ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c[0].astype(np.uint32)


def dropout(rng):
    x = floats(rng, 500)
    raw = philox(1234, np.arange(500)).view(np.int32)
    uniform = np.where(raw < 0, -raw.astype("i8") - 1, raw) * np.float32(4.6566127342e-10)
    want = np.where(uniform > np.float32(0.25), exact(x) / 0.75, 0)
    return (2,), (x, torch.zeros(500), 500, 0.25, 1234), {1: want}


@triton.jit
def rotary_kernel(x_ptr, angle_ptr, out_ptr, HALF: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, HALF)
    a, b = tl.split(tl.load(x_ptr + row * 2 * HALF + tl.arange(0, 2 * HALF)).reshape(HALF, 2))
    angle = tl.load(angle_ptr + row * HALF + i)
    out = tl.interleave(a * tl.cos(angle) - b * tl.sin(angle), a * tl.sin(angle) + b * tl.cos(angle))
    tl.store(out_ptr + row * 2 * HALF + tl.arange(0, 2 * HALF), out)


def rotary(rng):
    x, angle = floats(rng, 4, 64), floats(rng, 4, 32)
    z = (exact(x)[:, 0::2] + 1j * exact(x)[:, 1::2]) * np.exp(1j * exact(angle))
    return (4,), (x, angle, torch.zeros(4, 64)), {2: np.stack([z.real, z.imag], -1).reshape(4, 64)}


@triton.jit
def swiglu_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    a = tl.load(x_ptr + row * 2 * n + i, i < n, 0).to(tl.float32)
    b = tl.load(x_ptr + row * 2 * n + n + i, i < n, 0)
    tl.store(out_ptr + row * n + i, (a * tl.sigmoid(a)).to(b.dtype) * b, i < n)


def swiglu(rng):
    x = floats(rng, 5, 200).bfloat16()
    a, b = exact(x)[:, :100], exact(x)[:, 100:]
    return (5,), (x, torch.zeros(5, 100).bfloat16(), 100), {1: a / (1 + np.exp(-a)) * b}


@triton.jit
def cast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n).to(out_ptr.dtype.element_ty), i < n)


def cast(source, to):
    def make(rng):
        x = (4 * floats(rng, 1000)).to(source)
        x[:8] = torch.tensor([0.0, 1e-3, -1e-3, 5.96e-8, 60.0, -55.5, 0.0625, 1.0]).to(source)
        want = x.to(to)
        return (4,), (x, torch.zeros(1000, dtype=to), 1000), {1: want.double().numpy()}

    return make
