"""Triton kernels of every common kind, each with inputs and what numpy gives in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Example:
    """A kernel, a function that makes its inputs and the expected values, and a tolerance.

    Args:
        make: a generator to (grid, arguments, {tensor: expected}).
        tolerance: greatest absolute difference, over the greatest expected value.
    """

    name: str
    kernel: Callable
    make: Callable
    tolerance: float = 0.0
    meta: dict = field(default_factory=dict)
    targets: tuple[int, ...] = (80, 90)

    def run(self, launch, target: int, **options) -> tuple[dict[str, float], object]:
        """Launch; returns the error of each output over its tolerance's scale, and the profile."""
        grid, args, expected = self.make(np.random.default_rng(0))
        profile = launch(self.kernel, grid, *args, target=target, **self.meta, **options)
        errors = {}
        for i, want in expected.items():
            got = args[i].double().numpy() if args[i].is_floating_point() else args[i].numpy()
            want = np.asarray(want, np.float64)
            wrong = np.isfinite(want) != np.isfinite(got)
            errors[i] = math.inf if wrong.any() else float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
        return errors, profile


def floats(rng, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype("f4")).to(dtype)


def exact(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


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
def softmax_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, i < n, float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + i, e / tl.sum(e, 0), i < n)


@triton.jit
def online_softmax_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + row * n + start + i, start + i < n, float("-inf"))
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + row * n + start + i, start + i < n, float("-inf"))
        tl.store(out_ptr + row * n + start + i, tl.exp(x - top) / total, start + i < n)


def softmax(rng):
    x = floats(rng, 5, 200)
    e = np.exp(exact(x) - exact(x).max(1, keepdims=True))
    return (5,), (x, torch.zeros(5, 200), 200), {1: e / e.sum(1, keepdims=True)}


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    pid, rows, columns = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    m = (first + pid % (GROUP * columns) % height) * BM + tl.arange(0, BM)
    n = pid % (GROUP * columns) // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), c_ptr.dtype.element_ty)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :], (m < M)[:, None] & (start + k < K)[None, :], 0.0)
        b_at = b_ptr + (start + k)[:, None] * stride_bk + n[None, :] * stride_bn
        b = tl.load(b_at, (start + k < K)[:, None] & (n < N)[None, :], 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc, (m < M)[:, None] & (n < N)[None, :])


def matmul(M, N, K, dtype=torch.bfloat16, transposed=False, tf32=False, BM=64, BN=64):
    def make(rng):
        if dtype == torch.int8:
            a, b = (torch.from_numpy(rng.integers(-128, 128, shape).astype("i1")) for shape in ((M, K), (K, N)))
            c = torch.zeros(M, N, dtype=torch.int32)
        else:
            a, b = floats(rng, M, K).to(dtype), floats(rng, K, N).to(dtype)
            c = torch.zeros(M, N)
        if tf32:  # operands that tf32 holds exactly
            a, b = ((x.view(torch.int32) & -8192).view(torch.float32) for x in (a, b))
        b = b.t().contiguous().t() if transposed else b
        grid = (triton.cdiv(M, BM) * triton.cdiv(N, BN),)
        return grid, (a, b, c, M, N, K, *b.stride()), {2: exact(a) @ exact(b)}

    return make


def matmul_meta(BM=64, BN=64, BK=32, STAGES=1, PRECISION="tf32", GROUP=1, **options):
    return {"BM": BM, "BN": BN, "BK": BK, "STAGES": STAGES, "PRECISION": PRECISION, "GROUP": GROUP} | options


@triton.jit
def persistent_matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    columns = tl.cdiv(N, BN)
    k = tl.arange(0, BK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * columns, tl.num_programs(0), flatten=True):
        m, n = tile // columns * BM + tl.arange(0, BM), tile % columns * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :], (m < M)[:, None] & (start + k < K)[None, :], 0)
            b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :], (start + k < K)[:, None] & (n < N)[None, :], 0)
            acc = tl.dot(a, b, acc)
        tl.store(c_ptr + m[:, None] * N + n[None, :], acc, (m < M)[:, None] & (n < N)[None, :])


def persistent_matmul(rng):
    a, b = floats(rng, 130, 64).bfloat16(), floats(rng, 64, 100).bfloat16()
    return (3,), (a, b, torch.zeros(130, 100), 130, 100, 64), {2: exact(a) @ exact(b)}


@triton.jit
def split_k_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0)
    b = tl.load(b_ptr + k[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :], 0)
    tl.atomic_add(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b), (m < M)[:, None] & (n < N)[None, :])


def split_k(rng):
    a, b = floats(rng, 20, 100).half(), floats(rng, 100, 60).half()
    return (2, 4), (a, b, torch.zeros(20, 60), 20, 60, 100), {2: exact(a) @ exact(b)}


@triton.jit
def routed_matmul_kernel(
    x_ptr, w_ptr, y_ptr, rows_ptr, offsets_ptr, gates_ptr, D, F, BT: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr
):
    expert, f, d = tl.program_id(0), tl.program_id(1) * BF + tl.arange(0, BF), tl.arange(0, BD)
    low, high = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    for start in range(low, high, BT):
        t = start + tl.arange(0, BT)
        row = tl.load(rows_ptr + t, t < high, 0)
        acc = tl.zeros((BT, BF), tl.float32)
        for k in range(0, D, BD):
            x = tl.load(x_ptr + row[:, None] * D + (k + d)[None, :], (t < high)[:, None] & (k + d < D)[None, :], 0)
            w_at = w_ptr + expert * D * F + (k + d)[:, None] * F + f[None, :]
            acc = tl.dot(x, tl.load(w_at, (k + d < D)[:, None] & (f < F)[None, :], 0), acc)
        acc *= tl.load(gates_ptr + t, t < high, 0)[:, None]
        tl.atomic_add(y_ptr + row[:, None] * F + f[None, :], acc, (t < high)[:, None] & (f < F)[None, :])


def routed_matmul(rng):
    E, F, D, T = 4, 40, 48, 50
    x, w = floats(rng, T, D).bfloat16(), floats(rng, E, D, F).bfloat16()
    expert = np.stack([rng.permutation(E)[:2] for _ in range(T)]).ravel()
    order = np.argsort(expert, kind="stable")
    rows, gates = torch.from_numpy((order // 2).astype("i4")), floats(rng, 2 * T)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(np.bincount(expert, minlength=E))]).astype("i4"))
    want = np.zeros((T, F))
    for e in range(E):
        for i in range(offsets[e], offsets[e + 1]):
            want[rows[i]] += float(gates[i]) * (exact(x[rows[i]]) @ exact(w[e]))
    return (E, 2), (x, w, torch.zeros(T, F), rows, offsets, gates, D, F), {2: want}


@triton.jit
def low_rank_kernel(
    x_ptr, a_ptr, b_ptr, y_ptr, T, D, F, R: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr
):
    t, f = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BF + tl.arange(0, BF)
    r, d = tl.arange(0, R), tl.arange(0, BD)
    s = tl.zeros((BT, R), tl.float32)
    for k in tl.range(0, D, BD, num_stages=3):
        x = tl.load(x_ptr + t[:, None] * D + (k + d)[None, :], (t < T)[:, None] & (k + d < D)[None, :], 0)
        s = tl.dot(x, tl.load(a_ptr + (k + d)[:, None] * R + r[None, :], (k + d < D)[:, None], 0), s)
    b = tl.load(b_ptr + r[:, None] * F + f[None, :], (f < F)[None, :], 0)
    y = tl.dot(s.to(b.dtype), b)
    tl.store(y_ptr + t[:, None] * F + f[None, :], y.to(y_ptr.dtype.element_ty), (t < T)[:, None] & (f < F)[None, :])


def low_rank(rng):
    x, a, b = floats(rng, 50, 96).bfloat16(), floats(rng, 96, 16).bfloat16(), floats(rng, 16, 70).bfloat16()
    s = torch.from_numpy(exact(x) @ exact(a)).bfloat16()
    return (2, 2), (x, a, b, torch.zeros(50, 70), 50, 96, 70), {3: exact(s) @ exact(b)}


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, S, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :], (m < S)[:, None], 0)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    end = min((tl.program_id(0) + 1) * BM, S) if CAUSAL else S
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN)
        k = tl.load(k_ptr + n[:, None] * D + d[None, :], (n < S)[:, None], 0)
        v = tl.load(v_ptr + n[:, None] * D + d[None, :], (n < S)[:, None], 0)
        keep = (n < S)[None, :] & ((m[:, None] >= n[None, :]) | (not CAUSAL))
        s = tl.where(keep, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp(s - new[:, None]), tl.exp(top - new)
        total, top = total * shrink + tl.sum(p, 1), new
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    tl.store(o_ptr + m[:, None] * D + d[None, :], acc / total[:, None], (m < S)[:, None])


def attention(S, D, dtype, causal):
    def make(rng):
        q, k, v = (floats(rng, S, D).to(dtype) for _ in range(3))
        s = exact(q) @ exact(k).T * 0.2
        s[np.triu_indices(S, 1) if causal else ([], [])] = -np.inf
        p = np.exp(s - s.max(1, keepdims=True))
        want = p / p.sum(1, keepdims=True) @ exact(v)
        return (triton.cdiv(S, 64 if causal else 32),), (q, k, v, torch.zeros(S, D), S, 0.2), {3: want}

    return make


@triton.jit
def layer_norm_kernel(x_ptr, w_ptr, b_ptr, y_ptr, n, eps, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, i < n, 0).to(tl.float32)
    mean = tl.sum(x, 0) / n
    centred = tl.where(i < n, x - mean, 0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / n + eps)
    y = centred * scale * tl.load(w_ptr + i, i < n) + tl.load(b_ptr + i, i < n)
    tl.store(y_ptr + row * n + i, y, i < n)


def layer_norm(rng):
    x, w, b = floats(rng, 6, 300), floats(rng, 300), floats(rng, 300)
    want = (exact(x) - exact(x).mean(1, keepdims=True)) / np.sqrt(exact(x).var(1, keepdims=True) + 1e-5)
    return (6,), (x, w, b, torch.zeros(6, 300), 300, 1e-5), {3: want * exact(w) + exact(b)}


@triton.jit
def column_sum_kernel(x_ptr, out_ptr, lock_ptr, rows, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i, r = tl.arange(0, BLOCK), tl.program_id(0) * STEP + tl.arange(0, STEP)
    part = tl.sum(tl.load(x_ptr + r[:, None] * n + i[None, :], (r < rows)[:, None] & (i < n)[None, :], 0), 0)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(out_ptr + i, tl.load(out_ptr + i, i < n) + part, i < n)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def column_sum(rng):
    x = floats(rng, 50, 60)
    return (4,), (x, torch.zeros(60), torch.zeros(1, dtype=torch.int32), 50, 60), {1: exact(x).sum(0)}


@triton.jit
def scan_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))


@triton.jit
def decay(a, x, b, y):
    return a * b, x * b + y


@triton.jit
def recurrence_kernel(a_ptr, x_ptr, out_ptr, L: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, L)[:, None] * C + tl.arange(0, C)[None, :]
    _, h = tl.associative_scan((tl.load(a_ptr + at), tl.load(x_ptr + at)), 0, decay)
    tl.store(out_ptr + at, h)


def recurrence(rng):
    a, x = torch.sigmoid(floats(rng, 64, 16)), floats(rng, 64, 16)
    h, want = np.zeros(16), []
    for i in range(64):
        h = exact(a[i]) * h + exact(x[i])
        want.append(h)
    return (1,), (a, x, torch.zeros(64, 16)), {2: np.stack(want)}


@triton.jit
def sort_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DOWN: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, tl.sort(tl.load(x_ptr + at), 1, DOWN))


@triton.jit
def top_k_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, K)
    row = tl.program_id(0)
    tl.store(out_ptr + row * K + k, tl.topk(tl.load(x_ptr + row * BLOCK + i), K))


def top_k(rng):
    x = floats(rng, 3, 64)
    return (3,), (x, torch.zeros(3, 4)), {1: -np.sort(-exact(x), 1)[:, :4]}


@triton.jit
def histogram_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i, bins = tl.arange(0, BLOCK), tl.arange(0, BINS)
    tl.store(out_ptr + bins, tl.histogram(tl.load(x_ptr + i, i < n, 0), BINS, mask=i < n))


def histogram(rng):
    x = rng.integers(0, 16, 500).astype("i4")
    return (1,), (torch.from_numpy(x), torch.zeros(16, dtype=torch.int32), 500), {1: np.bincount(x, minlength=16)}


@triton.jit
def atomics_kernel(x_ptr, sum_ptr, max_ptr, count_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, 0)
    tl.atomic_add(sum_ptr + i % 7, x, i < n)
    tl.atomic_max(max_ptr + i % 5, x, i < n)
    tl.atomic_or(count_ptr, (x & 63).to(tl.int32).sum(0))
    tl.atomic_add(count_ptr + 1, tl.sum((i < n).to(tl.int32), 0))


def atomics(rng):
    x = rng.integers(-99, 99, 900).astype("i4")
    i = np.arange(900)
    bits = np.bitwise_or.reduce([(x[k : k + 256] & 63).sum() for k in range(0, 900, 256)])
    sums, tops = torch.zeros(7, dtype=torch.int32), torch.full((5,), -(2**31), dtype=torch.int32)
    want = {1: np.bincount(i % 7, x), 2: [x[i % 5 == j].max() for j in range(5)], 3: [bits, 900]}
    return (4,), (torch.from_numpy(x), sums, tops, torch.zeros(2, dtype=torch.int32), 900), want


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
def gather_in_block_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.gather(tl.load(x_ptr + i), tl.load(index_ptr + i), 0))


def gather_in_block(rng):
    x, index = floats(rng, 256), torch.from_numpy(rng.integers(0, 256, 256).astype("i4"))
    return (1,), (x, index, torch.zeros(256)), {2: exact(x)[index.numpy()]}


@triton.jit
def arg_max_kernel(x_ptr, value_ptr, index_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    value, index = tl.max(tl.load(x_ptr + row * n + i, i < n, float("-inf")), 0, return_indices=True)
    tl.store(value_ptr + row, value)
    tl.store(index_ptr + row, index)


def arg_max(rng):
    x = floats(rng, 7, 200)
    out = torch.zeros(7, dtype=torch.int32)
    return (7,), (x, torch.zeros(7), out, 200), {1: exact(x).max(1), 2: exact(x).argmax(1)}


@triton.jit
def cross_entropy_kernel(x_ptr, label_ptr, loss_ptr, grad_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x, label = tl.load(x_ptr + row * n + i, i < n, float("-inf")), tl.load(label_ptr + row)
    top = tl.max(x, 0)
    log_sum = tl.log(tl.sum(tl.exp(x - top), 0)) + top
    tl.store(loss_ptr + row, log_sum - tl.load(x_ptr + row * n + label))
    tl.store(grad_ptr + row * n + i, tl.exp(x - log_sum) - (i == label).to(tl.float32), i < n)


def cross_entropy(rng):
    x, label = floats(rng, 5, 90), torch.from_numpy(rng.integers(0, 90, 5))
    log_sum = np.log(np.exp(exact(x)).sum(1))
    grad = np.exp(exact(x) - log_sum[:, None])
    grad[np.arange(5), label] -= 1
    loss = log_sum - exact(x)[np.arange(5), label]
    return (5,), (x, label, torch.zeros(5), torch.zeros(5, 90), 90), {2: loss, 3: grad}


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
def convolution_kernel(x_ptr, w_ptr, out_ptr, L, C: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    t, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, C)
    acc = tl.zeros((BLOCK, C), tl.float32)
    for j in tl.static_range(W):
        at = t - (W - 1) + j
        x = tl.load(x_ptr + at[:, None] * C + c[None, :], ((at >= 0) & (at < L))[:, None], 0)
        acc += x * tl.load(w_ptr + c * W + j)[None, :]
    tl.store(out_ptr + t[:, None] * C + c[None, :], acc, (t < L)[:, None])


def convolution(rng):
    x, w = floats(rng, 45, 16), floats(rng, 16, 4)
    padded = np.concatenate([np.zeros((3, 16)), exact(x)])
    want = sum(padded[j : j + 45] * exact(w)[:, j] for j in range(4))
    return (3,), (x, w, torch.zeros(45, 16), 45), {2: want}


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


@triton.jit
def block_pointer_kernel(x_ptr, out_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (tl.program_id(0) * BM, 0), (BM, BN), (1, 0))
    acc = tl.zeros((BM,), tl.float32)
    for _ in range(0, N, BN):
        acc += tl.sum(tl.load(x, boundary_check=(0, 1), padding_option="zero"), 1)
        x = tl.advance(x, (0, BN))
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    tl.store(out_ptr + m, acc, m < M)


def block_pointer(rng):
    x = floats(rng, 45, 70)
    return (3,), (x, torch.zeros(45), 45, 70), {1: exact(x).sum(1)}


@triton.jit
def welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    n = n_a + n_b
    delta = mean_b - mean_a
    return mean_a + delta * n_b / n, m2_a + m2_b + delta * delta * n_a * n_b / n, n


@triton.jit
def variance_kernel(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    x = tl.load(x_ptr + at)
    _, m2, n = tl.reduce((x, tl.zeros_like(x), tl.full((R, C), 1.0, tl.float32)), 0, welford)
    tl.store(out_ptr + tl.arange(0, C), m2 / n)


def variance(rng):
    x = floats(rng, 64, 32)
    return (1,), (x, torch.zeros(32)), {1: exact(x).var(0)}


def ordered(kind):
    def make(rng):
        x = torch.from_numpy(rng.integers(-50, 50, 256).astype("i4")) if kind == "scan" else floats(rng, 4, 64)
        want = np.cumsum(x.numpy()) if kind == "scan" else np.sort(exact(x), 1)
        want = want[:, ::-1] if kind == "down" else want
        return (1,), (x, torch.zeros_like(x)), {1: want}

    return make


bf16, f16, f32, f64, i8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8
e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
FULL = {"D": 32, "BM": 32, "BN": 32, "CAUSAL": False}
CAUSAL = {"D": 64, "BM": 64, "BN": 32, "CAUSAL": True}
WIDE = matmul_meta(128, 256, num_warps=8)
SUM = 2e-6  # sums in float32, in another order
EXAMPLES = (
    *(Example(f"add {str(t)[6:]}", add_kernel, add(t, 1000), 0.0, {"BLOCK": 256}) for t in (f32, bf16, f16, f64)),
    Example("softmax", softmax_kernel, softmax, SUM, {"BLOCK": 256}),
    Example("softmax online", online_softmax_kernel, softmax, SUM, {"BLOCK": 64}),
    Example("matmul fp16", matmul_kernel, matmul(70, 50, 45, f16), SUM, matmul_meta()),
    Example("matmul bf16", matmul_kernel, matmul(70, 50, 45), SUM, matmul_meta()),
    Example("matmul tf32", matmul_kernel, matmul(70, 50, 45, f32, tf32=True), SUM, matmul_meta()),
    Example("matmul fp32", matmul_kernel, matmul(40, 36, 20, f32), SUM, matmul_meta(PRECISION="ieee")),
    Example("matmul int8", matmul_kernel, matmul(70, 64, 64, i8), 0.0, matmul_meta(BK=64, PRECISION="ieee")),
    Example("matmul e4m3", matmul_kernel, matmul(64, 64, 64, e4m3), SUM, matmul_meta(BK=64), (90,)),
    Example("matmul e5m2", matmul_kernel, matmul(64, 64, 64, e5m2), SUM, matmul_meta(BK=64)),
    *(
        Example(f"matmul {s} stages", matmul_kernel, matmul(128, 128, 128), SUM, matmul_meta(STAGES=s))
        for s in (2, 3, 4)
    ),
    Example("matmul fp16 stages", matmul_kernel, matmul(64, 64, 128, f16), SUM, matmul_meta(STAGES=3)),
    Example("matmul tf32 stages", matmul_kernel, matmul(64, 64, 128, f32, tf32=True), SUM, matmul_meta(STAGES=3)),
    Example("matmul transposed", matmul_kernel, matmul(64, 64, 96, transposed=True), SUM, matmul_meta(STAGES=2)),
    Example("matmul 8 warps", matmul_kernel, matmul(127, 125, 123), SUM, matmul_meta(STAGES=3, num_warps=8)),
    Example("matmul 1 warp", matmul_kernel, matmul(32, 32, 64, BM=16, BN=16), SUM, matmul_meta(16, 16, num_warps=1)),
    Example("matmul wide", matmul_kernel, matmul(128, 256, 64, BM=128, BN=256), SUM, WIDE),
    Example("matmul grouped order", matmul_kernel, matmul(200, 100, 64), SUM, matmul_meta(GROUP=2)),
    Example("matmul persistent", persistent_matmul_kernel, persistent_matmul, SUM, {"BM": 64, "BN": 64, "BK": 32}),
    Example("matmul split k", split_k_kernel, split_k, SUM, {"BM": 32, "BN": 32, "BK": 32}),
    Example("matmul routed", routed_matmul_kernel, routed_matmul, SUM, {"BT": 16, "BF": 32, "BD": 32}),
    Example("low rank", low_rank_kernel, low_rank, 1e-2, {"R": 16, "BT": 32, "BF": 64, "BD": 32}),
    Example("attention", attention_kernel, attention(70, 32, f16, False), 2e-3, FULL),
    Example("attention causal", attention_kernel, attention(100, 64, bf16, True), 1e-2, CAUSAL),
    Example("layer norm", layer_norm_kernel, layer_norm, SUM, {"BLOCK": 512}),
    Example("column sum with a lock", column_sum_kernel, column_sum, SUM, {"STEP": 16, "BLOCK": 64}),
    Example("scan", scan_kernel, ordered("scan"), 0.0, {"BLOCK": 256}),
    Example("recurrence", recurrence_kernel, recurrence, SUM, {"L": 64, "C": 16}),
    Example("sort", sort_kernel, ordered("up"), 0.0, {"ROWS": 4, "BLOCK": 64, "DOWN": False}),
    Example("sort down", sort_kernel, ordered("down"), 0.0, {"ROWS": 4, "BLOCK": 64, "DOWN": True}),
    Example("top k", top_k_kernel, top_k, 0.0, {"BLOCK": 64, "K": 4}),
    Example("histogram", histogram_kernel, histogram, 0.0, {"BLOCK": 512, "BINS": 16}),
    Example("atomics", atomics_kernel, atomics, 0.0, {"BLOCK": 256}),
    Example("activations", activation_kernel, activation, 2e-6, {"BLOCK": 128}),
    Example("integers", integers_kernel, integers, 0.0, {"BLOCK": 256}),
    Example("collatz", collatz_kernel, collatz, 0.0, {"BLOCK": 32}),
    Example("transpose f32", transpose_kernel, transpose(f32), 0.0, {"B": 32}),
    Example("transpose f16", transpose_kernel, transpose(f16), 0.0, {"B": 32}),
    Example("gather rows", gather_kernel, gather, 0.0, {"D": 32, "BLOCK": 32}),
    Example("gather in block", gather_in_block_kernel, gather_in_block, 0.0, {"BLOCK": 256}),
    Example("arg max", arg_max_kernel, arg_max, 0.0, {"BLOCK": 256}),
    Example("cross entropy", cross_entropy_kernel, cross_entropy, SUM, {"BLOCK": 128}),
    Example("dropout", dropout_kernel, dropout, 1e-7, {"BLOCK": 256}),
    Example("rotary", rotary_kernel, rotary, SUM, {"HALF": 32}),
    Example("swiglu", swiglu_kernel, swiglu, 1e-2, {"BLOCK": 128}),
    Example("convolution", convolution_kernel, convolution, SUM, {"C": 16, "W": 4, "BLOCK": 16}),
    Example("cast f32 to e5m2", cast_kernel, cast(f32, e5m2), 0.0, {"BLOCK": 256}),
    Example("cast f32 to e4m3", cast_kernel, cast(f32, e4m3), 0.0, {"BLOCK": 256}, (90,)),
    Example("cast e5m2 to f16", cast_kernel, cast(e5m2, f16), 0.0, {"BLOCK": 256}),
    Example("cast f32 to bf16", cast_kernel, cast(f32, bf16), 0.0, {"BLOCK": 256}),
    Example("block pointer", block_pointer_kernel, block_pointer, SUM, {"BM": 16, "BN": 32}),
    Example("variance", variance_kernel, variance, SUM, {"R": 64, "C": 32}),
)  # fmt: skip
