"""Kernels of matrix products: plain, persistent, split, routed, low rank, attention."""

import numpy as np
import torch
import triton
import triton.language as tl

from ptxemu.examples.example import exact, floats


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
