"""Kernels that move boxes of tensors through descriptors: bulk copies and mbarriers on sm_90."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ptxemu.examples.example import exact, floats


@triton.jit
def descriptor_matmul_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc)


def descriptor_matmul(M, N, K, dtype):
    def make(rng):
        a, b, c = floats(rng, M, K, dtype=dtype), floats(rng, K, N, dtype=dtype), torch.zeros(M, N)
        args = [TensorDescriptor.from_tensor(x, block) for x, block in ((a, [64, 32]), (b, [32, 64]), (c, [64, 64]))]
        return (-(-M // 64), -(-N // 64)), (*args, K), {2: exact(a) @ exact(b)}

    return make


@triton.jit
def descriptor_in_kernel(x_ptr, out_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BM, BN])  # pyright: ignore[reportArgumentType]
    out = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BM, BN])  # pyright: ignore[reportArgumentType]
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    out.store([m, n], 2 * x.load([m, n]))


def descriptor_in(rng):
    x = floats(rng, 45, 40)
    return (3, 2), (x, torch.zeros(45, 40), 45, 40), {1: 2 * exact(x)}
