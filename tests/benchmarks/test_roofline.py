"""The cost model's operations and bytes are those of the compiled kernels: the emulator counts them."""

import pytest
import torch

pytest.importorskip("triton")

from moe_lora.backend import autotune, dispatch
from moe_lora.backend.triton import backend, launch
from moe_lora.ops import Plan

from benchmarks.roofline import GPUS, SHAPES, Shape, break_even, decode, durations, launches, predict
from tests.support import traffic


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("variant", traffic.VARIANTS[:5], ids=str)
def test_model_counts_what_the_kernels_do(variant, target):
    shape, (found, device) = variant.shape, traffic.profiles(variant, f"sm_{target}")
    wanted = [one for back in (False, True) for one in launches(shape, device, back, variant.dropout > 0)]
    assert [profile.kernel for profile in found] == [one.kernel for one in wanted]
    for profile, one in zip(found, wanted, strict=True):
        operations = sum(count for name, count in profile.flops.items() if "mma" in name)
        assert operations == pytest.approx(one.flops, rel=0.02), one
        for name, size in one.requested.items():
            counted = profile.loads(name).bytes + profile.stores(name).bytes
            assert counted == pytest.approx(size, rel=0.02), (one.kernel, name, one)


@pytest.mark.parametrize("held", [2, 8], ids="{} blocks".format)
def test_model_counts_what_decode_does(held):
    shape = Shape(8, 1, 1024, 64, E=4, R=32, master=torch.bfloat16)
    profile, wanted = traffic.decode_profile(shape, "sm_80", held), decode(shape, held)
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


def test_linears_cost_little_more_than_frozen_ones():
    found = predict(Shape(8, 1024, 4096, 4096, members=3), GPUS["H100"])
    assert found["both_ratio"] <= 1.07 < predict(SHAPES[0], GPUS["H100"])["both_ratio"] <= 1.10


@pytest.mark.parametrize("q, forward, backward", [(0.85, "split", "split"), (1.0, "fused", "fused")], ids=str)
def test_choice_on_an_h100_depends_on_what_a_triton_product_reaches(q, forward, backward, monkeypatch, tmp_path):
    """The clock is the cost model: at 85 % of the library's rate the product is left to it, at 100 % it is not."""
    gpu, shape = GPUS["H100"], SHAPES[0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOE_LORA_BACKEND", raising=False)
    monkeypatch.setattr(autotune, "_state", autotune.State())
    monkeypatch.setattr(autotune, "applies", lambda device: True)
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    for module in (backend, launch):
        monkeypatch.setattr(module, "device_of", lambda device: gpu.device)
    x, weight = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((8, 1024, 4096), (4096, 4096)))
    lora_a, experts = torch.empty(4, 4096, 32, device="meta"), torch.zeros(8, 2, dtype=torch.int32, device="meta")
    plan = Plan(experts, torch.ones(8, 2, device="meta"), None, 1.0, 0.0, None)
    for needs, wanted in ((None, forward), ((True,) * 4, backward)):
        call = dispatch.Call("auto", x, [weight], [lora_a], plan, needs)
        times = durations(shape, gpu, needs is not None, q=q)
        able = [candidate for candidate in call.ordered() if candidate.startswith("triton/")]
        assert {name.partition("/")[2].partition("-")[0] for name in able} == {"fused", "two", "split"}
        times["two"] = times.get("two", 1.05 * times["fused"])
        clock = dict.fromkeys(call.ordered(), 10 * times["split"])  # plain PyTorch's
        clock |= {name: times[name[7:].partition("-")[0]] + 0.01 * ("-" in name) for name in able}
        runs = {name: (lambda name=name: name) for name in clock}
        monkeypatch.setattr(autotune, "milliseconds", lambda run, device, clock=clock: clock[run()])
        autotune.time_all(call.bucket(), x.device, runs)
        assert call.ordered()[0] == f"triton/{wanted}"


def test_products_of_our_own_pay_from_a_share_of_the_librarys_rate_on():
    for gpu in ("A100", "H100", "B200"):
        even = break_even(SHAPES[0], GPUS[gpu])
        assert even is not None and 0.9 < even <= 1.0
        ratios = [predict(SHAPES[0], GPUS[gpu], q=q)["both_ratio"] for q in (1.0, 0.9, 0.8, 0.5)]
        assert ratios == sorted(ratios) and ratios[-1] < 1.2  # never much behind, whatever a Triton product reaches
