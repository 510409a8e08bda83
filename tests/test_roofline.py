"""The cost model's operations and bytes are those of the compiled kernels: the emulator counts them."""

import moe_lora
import pytest
import torch

pytest.importorskip("triton")

from moe_lora import triton_backend
from ptx.driver import Emulator

from benchmarks.roofline import GPUS, SHAPES, Shape, decode, launches, predict
from tests.decode import emulated

CASES = (
    Shape(2, 256, 192, 128, E=4, R=16),  # whole tiles for each instance
    Shape(
        2, 200, 192, 128, E=3, R=16, dtype=torch.float16, master=torch.float16
    ),  # tiles with rows of many instances, of all experts
    Shape(12, 1, 512, 64, E=4, R=16),  # decode: the shrink is split
    Shape(2, 256, 192, 128, E=4, R=16, members=3),
    Shape(2, 200, 128, 192, E=3, R=16, dtype=torch.float16, members=2),
)


def profiles(shape, target):
    """Of each launch of a forward and backward; and the device."""
    N, L, D, F, E, K, R, dtype, master, members = vars(shape).values()
    x, weights = torch.randn(N, L, D).to(dtype).requires_grad_(), [torch.randn(F, D).to(dtype) for _ in range(members)]
    lora_as = [torch.randn(E, D, R).to(master).requires_grad_() for _ in range(members)]
    lora_bs = [torch.randn(E, R, F).to(master).requires_grad_() for _ in range(members)]
    experts = torch.arange(N * K).view(N, K) % E
    routing = moe_lora.Routing(experts, torch.rand(N, K).requires_grad_())
    with Emulator(target, races=False) as emulator:
        device = triton_backend._device(x.device)
        ys = moe_lora.linear_group(x, weights, [None] * members, lora_as, lora_bs, routing, backend="triton")
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    return emulator.profiles, device


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_model_counts_what_the_kernels_do(shape, target):
    found, device = profiles(shape, target)
    wanted = [*launches(shape, device, False), *launches(shape, device, True)]
    assert [profile.kernel for profile in found] == [launch.kernel for launch in wanted]
    for profile, launch in zip(found, wanted, strict=True):
        operations = sum(count for name, count in profile.flops.items() if "mma" in name)
        assert operations == pytest.approx(launch.flops, rel=0.02), launch
        for name, size in launch.requested.items():
            counted = profile.loads(name).bytes + profile.stores(name).bytes
            assert counted == pytest.approx(size, rel=0.02), (launch.kernel, name, launch)


@pytest.mark.parametrize("held", [2, 8], ids="{} blocks".format)
def test_model_counts_what_decode_does(held):
    shape = Shape(8, 1, 1024, 64, E=4, R=32, master=torch.bfloat16)
    experts = torch.tensor([[0, 1], [2, 3]] * 4)
    x, weight = (torch.randn(size).bfloat16() for size in ((8, 1, shape.D), (shape.F, shape.D)))
    lora_a, lora_b = (torch.randn(size).bfloat16() for size in ((4, shape.D, 32), (4, 32, shape.F)))
    with emulated(held=held, races=False) as device:
        moe_lora.linear(x, weight, None, lora_a, lora_b, moe_lora.Routing(experts, torch.rand(8, 2)), backend="cuda")
    (profile,), wanted = device.profiles, decode(shape, held)
    assert profile.flops["bf16 mma"] == wanted.flops
    for name, size in wanted.requested.items():
        assert profile.loads(name).bytes + profile.stores(name).bytes == pytest.approx(size, rel=0.02), name
    assert wanted.requested["weight"] == 32 * profile.loads("weight").sectors


def test_decode_is_predicted_near_the_frozen_linear():
    """The best that bytes allow: A and B in bfloat16 are 6 % of W here, in float32 they would be 12 %."""
    for gpu in ("A100", "H100", "B200"):
        found = predict(Shape(8, 1, 4096, 4096, master=torch.bfloat16), GPUS[gpu])
        assert found["forward_kernel"] == "cuda" and 1.05 < found["forward_ratio"] <= 1.10


@pytest.mark.parametrize("gpu", GPUS)
def test_predictions_are_sane(gpu):
    for shape in SHAPES:
        found = predict(shape, GPUS[gpu])
        assert 1 < found["forward_ratio"] < 2.5 and 1 < found["both_ratio"] < 4
    assert predict(SHAPES[1], GPUS[gpu])["both_ratio"] < predict(SHAPES[2], GPUS[gpu])["both_ratio"]


def test_group_of_three_costs_little_more_than_frozen_ones():
    found = predict(Shape(8, 1024, 4096, 4096, members=3), GPUS["H100"])
    assert found["both_ratio"] <= 1.07 < found["product_ratio"] < predict(SHAPES[0], GPUS["H100"])["both_ratio"]
