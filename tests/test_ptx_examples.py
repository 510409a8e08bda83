"""Compiled Triton kernels of every common kind agree with float64, in any order of their warps, and none is accused."""

import pytest

triton = pytest.importorskip("triton")

from ptx import launch  # noqa: E402
from ptx.examples import EXAMPLES  # noqa: E402

CASES = [(example, target) for example in EXAMPLES for target in example.targets]


@pytest.mark.parametrize("example, target", CASES, ids=[f"{e.name} sm_{t}" for e, t in CASES])
def test_example_agrees_with_float64(example, target):
    for seed in (None, 1):  # all warps in step; warps alone in an order drawn from the seed
        errors, _ = example.run(launch, target, emulator={"seed": seed})
        assert max(errors.values()) <= example.tolerance, errors
