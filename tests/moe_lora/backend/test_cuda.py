"""The CUDA backend: nvcc's PTX executed by the emulator against the oracle; spills; and what its library says here."""

import re
from pathlib import Path

import moe_lora
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lora.backend import cuda
from moe_lora.routing import Plan
from moe_lora.verify import Case, make

from tests.support.tolerance import assert_right

pytest.importorskip("triton")

from tests.support import decode

TARGETS = ("sm_80", "sm_90a", "sm_100a")
CASES = (
    Case((1,) * 3, 136, 45, 4, 2, 5),  # odd F and R, a warp whose lanes have unlike shares of D; token routing
    Case((3, 0, 4, 1), 24, 33, 5, 1, 16, packed=True, experts=((4,), (0,), (1,), (4,))),  # unused experts
    Case((1,), 1032, 32, 3, 2, 33, bias=False),  # D in parts
    Case((7, 7), 40, 70, 4, 4, 3, experts=((0, 1, 2, 3), (3, 2, 1, 0))),  # all experts
    Case((4, 4), 16, 16, 4, 2, 200, experts=((1, 1), (2, 1))),  # more of B than shared memory holds, an expert twice
    Case((1,) * 64, 72, 137, 6, 2, 5),  # the most rows; blocks that take columns in turns
    Case((11, 0, 6, 1), 1032, 32, 5, 2, 16, packed=True, experts=((4, 0),) * 3 + ((0, 2),)),  # 18 rows, D in parts
    Case((5, 5, 5), 24, 33, 3, 1, 33, bias=False),
    Case((10,) * 4, 40, 16, 3, 3, 100),  # more of B than shared memory holds, for 40 rows
)


def forward(case: Case, inputs, **options) -> tuple[list[torch.Tensor], decode.Emulated]:
    x, weight, bias, lora_a, lora_b, routing, *_ = inputs
    plan = Plan(routing.experts, routing.gates, routing.offsets, 0.7, 0.0, None)
    with torch.no_grad(), decode.emulated(**options) as device:
        (y,), (h,) = cuda.forward(x, [weight], [bias], [lora_a], [lora_b], plan)
        return [y, h], device


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_matches_oracle(case, nan_empty):
    number = CASES.index(case)
    dtype, target = (torch.bfloat16, torch.float16)[number % 2], TARGETS[number % 2]
    with decode.emulated(target, held=4):
        assert_right(case, make(case, dtype, (torch.float32, dtype)[number // 2 % 2]), "cuda")


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_compiled_matches_oracle_on_random_routings(data):
    E = data.draw(st.integers(1, 5))
    K, N = data.draw(st.integers(1, min(E, 3))), data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=N, max_size=N).filter(any))
    experts = data.draw(st.lists(st.tuples(*[st.integers(0, E - 1)] * K), min_size=N, max_size=N))
    D, F, R = 8 * data.draw(st.integers(1, 4)), data.draw(st.integers(8, 40)), data.draw(st.integers(1, 9))
    case = Case(tuple(lengths), D, F, E, K, R, packed=True, experts=tuple(experts))
    with decode.emulated(held=data.draw(st.integers(1, 3))):
        assert_right(case, make(case, torch.bfloat16), "cuda")


@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=str)
def test_schedules_give_the_same_bits_without_a_race(case):
    inputs = make(case, torch.bfloat16)
    first, _ = forward(case, inputs)
    for seed in (1, 2):
        other, _ = forward(case, inputs, seed=seed)
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_h_is_that_of_the_reference():
    case = CASES[1]
    x, _, _, lora_a, _, routing, *_ = inputs = make(case, torch.bfloat16)
    (_, h), _ = forward(case, inputs)
    instance = torch.repeat_interleave(torch.arange(4), torch.tensor(case.lengths))
    want = torch.einsum("td,tdr->tr", x.double(), lora_a.double()[routing.experts[instance, 0].long()])
    assert (h.double() - want).abs().max() < 2**-7 * want.abs().max()


def test_weight_is_read_once_in_whole_sectors():
    case = Case((1,) * 8, 256, 64, 4, 2, 32, experts=((0, 1), (2, 3)) * 4)
    _, device = forward(case, make(case, torch.bfloat16, torch.bfloat16))
    (profile,) = device.profiles
    weight = profile.loads("weight")
    assert weight.bytes == 256 * 64 * 2 and weight.sectors == weight.bytes // 32 and weight.sectors_per_request == 16
    assert profile.shared().conflicts == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_do_not_spill(target, tmp_path):
    report = decode.nvcc("-cubin", f"-arch={target}", "-Xptxas", "-v", output=str(tmp_path / "decode.cubin"))
    assert set(re.findall(r"entry function '(\w+)'", report)) == set(cuda.KERNELS)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(stacks) == len(cuda.KERNELS) and set(stacks) == {("0", "0", "0")}, report


def test_refusals_say_why():
    x, weight, lora_a = torch.zeros(2, 3, 16).half(), torch.zeros(4, 16).half(), torch.zeros(2, 16, 4)
    routing = moe_lora.Routing(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))

    def reason(**change):
        arguments = {"x": x, "weight": weight, "lora_a": lora_a, "routing": routing} | change
        with decode.emulated(), pytest.raises(ValueError) as caught:
            moe_lora.explain(**arguments, backend="cuda")
        return str(caught.value)

    assert "x must be float16 or bfloat16, got torch.float32" in reason(x=x.float())
    assert "lora_a must be torch.float16 like x or float32, got torch.float64" in reason(lora_a=lora_a.double())
    assert "it is for 1 to 64 rows, got 66" in reason(x=torch.zeros(2, 33, 16).half())
    odd = {"x": torch.zeros(2, 3, 12).half(), "weight": torch.zeros(4, 12).half(), "lora_a": torch.zeros(2, 12, 4)}
    assert "its rows multiples of 16 bytes, got D = 12" in reason(**odd)
    assert "it is for at most rank 256" in reason(lora_a=torch.zeros(2, 16, 300))
    assert "x is on meta, not on a cpu device" in reason(x=x.to("meta"))


def test_explain_names_the_kernel():
    x, weight, lora_a = torch.zeros(8, 1, 4096).half(), torch.zeros(4096, 4096).half(), torch.zeros(4, 4096, 32)
    routing = moe_lora.Routing(torch.zeros(8, 2, dtype=torch.int32), torch.ones(8, 2))
    with decode.emulated(held=264):
        found = moe_lora.explain(x, weight, lora_a, routing)
    assert (found.backend, found.kernel) == ("cuda", "decode_f16_f32_8") and "128 blocks" in found.why


def test_sizes_and_limits_are_those_of_the_source():
    source = decode.SOURCE.read_text("utf-8")
    struct = re.search(r"struct Sizes \{(.*?)\};", source, re.S)[1]
    names = re.findall(r"\w+(?=[,;])", re.sub(r"//.*", "", struct))
    assert names == [name for name, _ in cuda.Sizes._fields_]
    assert re.findall(r"^KERNEL\((\w+)", source, re.M) == sorted(cuda.KERNELS, key=cuda.KERNELS.index)
    constants = dict(re.findall(r"(\w+) = (\d+)[,;]", source))
    assert (constants["RANKS"], constants["THREADS"]) == (str(cuda._RANKS), "256") and cuda._COLUMNS == 16 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_without_the_library_or_a_gpu(monkeypatch):
    cuda.library.cache_clear()
    assert "moe_lora._cuda is not built" in moe_lora.backends()["cuda"]
    monkeypatch.setattr(cuda, "find_spec", lambda name: type("Spec", (), {"origin": str(Path(__file__))}))
    cuda.library.cache_clear()
    assert moe_lora.backends()["cuda"] == "torch finds no CUDA device"
    cuda.library.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case((1,) * 64, 4096, 4100, 4, 2, 32)], ids=str)
def test_device_matches_oracle(case, dtype):
    if reason := cuda.unavailable():
        pytest.skip(reason)
    inputs = make(case, dtype, device="cuda")
    assert_right(case, inputs, "cuda")
    x, weight, bias, lora_a, lora_b, routing, *_ = inputs
    with torch.no_grad():
        wanted = moe_lora.linear(x, weight, bias, lora_a, lora_b, routing, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = moe_lora.linear(x, weight, bias, lora_a, lora_b, routing, backend="cuda")
        found.zero_()
        graph.replay()
    assert torch.equal(found, wanted)
