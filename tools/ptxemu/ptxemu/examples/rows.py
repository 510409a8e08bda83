"""Kernels along a row or column: reductions, scans, sorts, histograms, atomics."""

import numpy as np
import torch
import triton
import triton.language as tl

from ptxemu.examples.example import exact, floats


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
def gather_in_block_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.gather(tl.load(x_ptr + i), tl.load(index_ptr + i), 0))


def gather_in_block(rng):
    x, index = floats(rng, 256), torch.from_numpy(rng.integers(0, 256, 256).astype("i4"))
    return (1,), (x, index, torch.zeros(256)), {2: exact(x)[index.numpy()]}


@triton.jit
def arg_max_kernel(x_ptr, value_ptr, index_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    value, index = tl.max(tl.load(x_ptr + row * n + i, i < n, float("-inf")), 0, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
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
