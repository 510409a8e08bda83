"""The kernels with tile instructions: under an emulator on every processor with AVX512-BF16, and beside PyTorch's."""

import moe_lora
import pytest
import torch
import torch.nn.functional as F
from moe_lora.backend import cpu
from moe_lora.routing import Routing

from tests.support import amx

needs_emulator = pytest.mark.skipif(
    (cpu.unavailable() or amx.missing()) is not None, reason=str(cpu.unavailable() or amx.missing())
)
needs_amx = pytest.mark.skipif(
    cpu.unavailable() is not None or "amx" not in cpu._C.all_instructions(), reason="the processor has no AMX"
)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return amx.build(tmp_path_factory.mktemp("amx"))


@needs_emulator
def test_amx_emulated_is_right_executes_the_fewest_products_and_every_planted_fault_is_seen(emulator):
    lines = amx.run(emulator, "-m", "tests.support.amx", timeout=300).splitlines()
    values = {name: rest for name, *rest in map(str.split, lines)}
    tiles_of_rows, tiles_of_columns, depth, ranks = 128 // 16, 64 // 16, 96 // 32, 2
    shrink, expand = tiles_of_rows * (2 * 32 // 16) * depth, tiles_of_rows * tiles_of_columns * (depth + ranks)
    assert values["products"] == [str(shrink + expand)], lines
    assert int(values["configurations"][0]) <= 2, lines  # one for each kernel call
    assert values["wrong"] == [], lines
    assert values["faults"] == ["20", "20"], lines


@needs_emulator
@pytest.mark.slow
def test_amx_emulated_passes_the_cpu_backends_tests(emulator):
    tests = "tests/moe_lora/backend/test_cpu.py"
    out = amx.run(emulator, "-m", "pytest", "-q", tests, "-k", "amx and (bfloat16 or threads)", timeout=1800)
    assert " passed" in out and "failed" not in out, out[-2000:]


@needs_amx
@pytest.mark.parametrize("D", [64, 4096])
def test_amx_base_is_as_near_to_the_truth_as_pytorchs(D):
    torch.manual_seed(0)
    x, weight = torch.randn(80, D).bfloat16(), (torch.randn(96, D) / D**0.5).bfloat16()
    routing = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    experts = torch.zeros(1, D, 4, dtype=torch.bfloat16), torch.zeros(1, 4, 96, dtype=torch.bfloat16)
    truth = x.double() @ weight.double().t()
    ours = moe_lora.linear(x[None], weight, None, *experts, routing, backend="cpu")[0]
    theirs = F.linear(x, weight)
    assert (ours - truth).square().mean() <= 1.1 * (theirs - truth).square().mean()
