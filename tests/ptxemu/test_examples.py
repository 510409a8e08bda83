"""Compiled Triton kernels of every common kind agree with float64, in any order of their warps, and none is accused."""

import random

import pytest

triton = pytest.importorskip("triton")

from ptxemu import launch  # noqa: E402
from ptxemu.examples import EXAMPLES, Example  # noqa: E402
from ptxemu.examples.matmul import matmul, matmul_kernel, matmul_meta  # noqa: E402

torch = pytest.importorskip("torch")
CASES = [(example, target) for example in EXAMPLES for target in example.targets]


@pytest.mark.parametrize("example, target", CASES, ids=[f"{e.name} sm_{t}" for e, t in CASES])
def test_example_agrees_with_float64(example, target):
    for seed in (None, 1):  # all warps in step; warps alone in an order drawn from the seed
        errors, _ = example.run(launch, target, emulator={"seed": seed})
        assert max(errors.values()) <= example.tolerance, errors


@pytest.mark.parametrize("seed", range(20))
def test_layouts_of_random_matmuls_are_those_of_the_compiler(seed):
    """Tiles, types, stages, warps and targets at random: every fragment, swizzle and descriptor has to fit."""
    rng = random.Random(seed)
    dtype = rng.choice((torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e5m2))
    BM, BN, BK = rng.choice((16, 32, 64, 128)), rng.choice((16, 32, 64, 128)), rng.choice((32, 64))
    M, N, K = (rng.randrange(1, 2) * tile + rng.randrange(tile) for tile in (BM, BN, BK))
    tf32, precision = dtype == torch.float32, "ieee" if dtype == torch.int8 else "tf32"
    meta = matmul_meta(BM, BN, BK, rng.choice((1, 2, 3)), precision, num_warps=rng.choice((1, 2, 4, 8)))
    make = matmul(M, N, K, dtype, rng.random() < 0.5, tf32, BM, BN)
    errors, _ = Example("", matmul_kernel, make, 0, meta).run(launch, rng.choice((80, 90, 100)))
    assert errors[2] <= 2e-6, (dtype, M, N, K, meta)
