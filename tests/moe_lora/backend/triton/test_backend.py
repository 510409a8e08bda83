"""The Triton backend: compiled for NVIDIA GPUs and executed by the PTX emulator; and under Triton's interpreter."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import moe_lora
import pytest
import torch
from moe_lora import dropout, ops
from moe_lora.backend import reference
from moe_lora.backend.triton import backend, launch
from moe_lora.verify import Case, make
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import groups
from tests.support.tolerance import assert_right

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from moe_lora.backend.triton import dropout as triton_dropout  # noqa: E402
from ptxemu import Fault  # noqa: E402
from ptxemu.driver import Emulator, Launcher, Utils  # noqa: E402

CASES = (
    Case((5, 5, 5), 13, 9, 4, 2, 3),
    Case((1,), 13, 9, 4, 2, 3, dropout=0.3),
    Case((3, 0, 7, 1), 16, 24, 4, 2, 8, packed=True),
    Case((1,) * 9, 64, 40, 6, 2, 16),
    Case((1,) * 6, 32, 8, 4, 4, 2, bias=False),
    Case((40, 40), 72, 136, 4, 1, 16, dropout=0.2),
    Case((150, 0, 90), 34, 70, 9, 2, 20, dropout=0.2, packed=True),
    Case((4, 4), 16, 16, 4, 2, 2, experts=((1, 1), (1, 1))),
    Case((3,) * 4, 40, 24, 5, 2, 40, dropout=0.1, experts=((3, 3), (3, 0), (0, 3), (3, 3))),
)
GROUPS = (
    (Case((40, 40), 72, 136, 4, 1, 16, dropout=0.2), (24, 40)),
    (Case((30, 0, 70), 34, 70, 9, 2, 20, packed=True), (9,)),
    (Case((1,) * 9, 64, 40, 6, 2, 16), (8, 64)),
)
FUSED = (  # shrink and expand in one launch
    Case((100, 100), 72, 136, 4, 2, 16),
    Case((150, 0, 1, 90), 40, 264, 9, 2, 20, packed=True),
    Case((100, 70), 64, 1032, 4, 3, 8, packed=True, experts=((3, 0, 1), (1, 3, 0))),
    Case((130,), 48, 8, 4, 1, 32),
    Case((80, 80), 72, 520, 4, 2, 32, dropout=0.2),
)
WIDE = Case((700, 1, 579), 256, 4224, 4, 2, 32, dropout=0.1, packed=True)
FORMS = ("instance", "masked")

ROOT = Path(__file__).parents[4]


@pytest.fixture
def form(request, monkeypatch):
    """Whole tiles for each instance, or all experts for each tile, whatever the rule says."""
    monkeypatch.setattr(launch.Call, "_form", lambda *_: (request.param, "asked for"))
    return request.param


@pytest.fixture
def processors(monkeypatch):
    """Four, so that up to four tiles of a row of tiles shrink."""
    limits = Utils.get_device_properties
    monkeypatch.setattr(Utils, "get_device_properties", lambda *a: limits(*a) | {"multiprocessor_count": 4})


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_matches_oracle(case, form, nan_empty):
    number = CASES.index(case)
    dtype, target = (torch.bfloat16, torch.float16)[number // 2 % 2], (80, 90, 100)[(number + FORMS.index(form)) % 3]
    with Emulator(target):
        assert_right(case, make(case, dtype), "triton")


@pytest.mark.parametrize("form", ["instance"], indirect=True)
@pytest.mark.parametrize("target", [90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_one_launch_matches_oracle(case, target, form, processors, nan_empty):
    dtype = (torch.bfloat16, torch.float16)[FUSED.index(case) % 2]
    with Emulator(target) as emulator:
        assert_right(case, make(case, dtype), "triton")
    forward, *backward = [profile.kernel for profile in emulator.profiles]
    assert (forward == "fused_kernel") == (not case.dropout or target == 100)
    assert ("fused_kernel" in backward) == (not case.dropout)


SPLIT = (  # the base's product is the library's; ragged, so that nothing is a multiple of a tile
    (Case((40, 41), 72, 144, 4, 2, 16, dropout=0.2, packed=True), 80, "instance"),
    (Case((100, 30), 34, 208, 5, 2, 20, packed=True), 120, "masked"),
)


@pytest.mark.parametrize("case, target, form", SPLIT, ids=str, indirect=["form"])
def test_low_rank_part_round_the_librarys_product_matches_oracle(case, target, form, nan_empty, monkeypatch):
    products, addmm = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *call: products.append(1) or addmm(*call))
    inputs = make(case, (torch.bfloat16, torch.float16)[target == 120])
    with Emulator(target) as emulator:
        assert_right(case, inputs, "triton/split")
        launches = [profile.kernel for profile in emulator.profiles]
        assert launches[:2] == ["shrink_kernel", "ranks_kernel"] and launches.count("ranks_kernel") == 2
        assert not {"expand_kernel", "fused_kernel"} & set(launches)
    assert len(products) == 2  # so three launches forward, with the library's
    rows, F = sum(case.lengths), case.F
    stored = emulator.profiles[1].stores("y_ptr").sectors
    assert stored <= 1.02 * rows * F * 2 / 32


def test_split_group_matches_oracle(nan_empty):
    case, widths = Case((40, 40), 72, 136, 4, 1, 16, dropout=0.2), (24,)
    with Emulator(90) as emulator:
        groups.assert_group_right(case, groups.make(case, widths, torch.bfloat16), "triton/split")
    launches = [profile.kernel for profile in emulator.profiles]
    assert launches.count("shrink_kernel") == 1 + 2 and launches.count("ranks_kernel") == 2 + 1


def test_schedules_of_warps_give_one_launch_the_same_bits(processors):
    case, found = FUSED[0], []
    inputs = make(case, torch.bfloat16)
    for seed in (None, 1, 2):
        with Emulator(90, seed=seed) as emulator:
            found.append(outputs(case, inputs))
    assert emulator.profiles[0].kernel == "fused_kernel"
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_one_launch_whose_programs_do_not_wait_is_found(processors):
    waits = re.compile(r"ld\.global\.gpu\.acquire\.b32 (%r\d+), .*;")
    inputs = make(FUSED[0], torch.bfloat16)
    for seed in (1, 2):
        emulator = Emulator(90, seed=seed, rewrite=lambda text: waits.sub(r"mov.b32 \1, 99;", text))
        with emulator, pytest.raises(Fault, match="h_ptr") as caught:
            outputs(FUSED[0], inputs)
        assert caught.value.kind == "blocks"


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("case, widths", GROUPS, ids=str)
def test_compiled_groups_match_oracle(case, widths, form, nan_empty):
    number = GROUPS.index((case, widths))
    dtype, target = (torch.bfloat16, torch.float16)[number % 2], (80, 90, 100)[(2 * number + FORMS.index(form)) % 3]
    with Emulator(target) as emulator:
        groups.assert_group_right(case, groups.make(case, widths, dtype), "triton")
    members, launches = 1 + len(widths), [profile.kernel for profile in emulator.profiles]
    assert launches.count("shrink_kernel") == 1 + members
    assert launches.count("expand_kernel") == members + 1
    assert launches.count("expert_grad_kernel") == members + 1


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100], ids="sm_{}".format)
def test_compiled_matches_oracle_in_wide_tiles_and_splits(target, monkeypatch, nan_empty):
    tiles, sums = [], []
    expand_tile, summed = launch.Call.expand_tile, launch.Call._summed
    monkeypatch.setattr(launch.Call, "expand_tile", lambda *call: tiles.append(expand_tile(*call)) or tiles[-1])
    monkeypatch.setattr(launch.Call, "_summed", lambda *call: sums.append(1) or summed(*call))
    with Emulator(target):
        for case in (
            Case((128, 128), 64, 264, 4, 2, 16, dropout=0.1),
            Case((12, 0, 40), 1100, 48, 3, 2, 8, packed=True),
        ):
            assert_right(case, make(case, torch.bfloat16), "triton")
    assert sums and max(tile.BLOCK_F for tile in tiles) == (128 if target == 80 else 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", [80, 90, 100], ids="sm_{}".format)
def test_compiled_matches_oracle_in_each_dtype(target, dtype):
    case = Case((3, 0, 7, 1), 16, 24, 4, 2, 8, dropout=0.2, packed=True)
    with Emulator(target):
        for master in (torch.float32, dtype):
            assert_right(case, make(case, dtype, master), "triton")


def test_interpreted_matches_oracle():
    """In a process of its own: triton decides at its import whether it interprets."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests/support/interpreted.py"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def outputs(case, inputs, backend="triton"):
    y = moe_lora.linear(*inputs[:6], 0.7, case.dropout, inputs.seed, backend)
    return [y, *torch.autograd.grad(y, list(inputs.leaves().values()), inputs.dy)]


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_schedules_of_warps_give_the_same_bits(form):
    case = Case((70, 3, 0, 9), 34, 40, 4, 2, 16, dropout=0.2, packed=True)
    inputs, found = make(case, torch.bfloat16), []
    for seed in (None, 1, 2):
        with Emulator(80, seed=seed):
            found.append(outputs(case, inputs))
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_schedules_of_warps_give_a_group_the_same_bits():
    case, widths = GROUPS[0]
    group, found = groups.make(case, widths, torch.bfloat16), []
    for seed in (None, 1):
        with Emulator(90, seed=seed):
            found.append(groups.outputs(case, group, "triton"))
    assert all(torch.equal(got, found[1][name]) for name, got in found[0].items())


@triton.jit
def kept_kernel(out_ptr, seed, threshold, first_row, first_d, D, PAIRED: tl.constexpr, WIDE: tl.constexpr):
    rows = first_row + tl.arange(0, 4)
    kept = triton_dropout.kept(seed, threshold, rows, first_d, D, 4, 32, PAIRED, WIDE)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :], kept.to(tl.int32))


@pytest.mark.parametrize("seed", [0, -1, 5, 123456789123456789], ids=str)
@pytest.mark.parametrize("first_row, D", [(0, 32), (7, 46), (7, 45), (2**31 - 5, 46), (190000000, 45)], ids=str)
def test_mask_is_the_documented_function(seed, first_row, D):
    wide = (first_row + 4) * D > 2**33
    out = torch.empty(4, 32, dtype=torch.int32)
    with Emulator(80):
        kept_kernel[(1,)](out, seed, dropout.threshold(0.4), first_row, 2, D, D % 2 == 0, wide)
    for row in range(4):
        c = (first_row + row) * D + 2
        words = dropout._random_words(seed, 18, out.device, c // 2).view(torch.int16)[c % 2 :][:32]
        assert torch.equal(out[row].bool(), words >= dropout.threshold(0.4) - 32768)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("D", [32, 31])
def test_mask_is_the_same_forward_and_backward(D, form):
    """The mask itself is h, dx and dA where A, B and dy are ones and identities."""
    T = R = F = 32
    eye = torch.eye(32, dtype=torch.float16)
    x, weight = torch.ones(T, D, dtype=torch.float16), torch.zeros(F, D, dtype=torch.float16)
    routing = moe_lora.Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    plan = ops.Plan(routing.experts, routing.gates, None, 1 / dropout.keep_scale(0.4), 0.4, torch.tensor(2**40 + 3))
    mask = dropout.keep_mask(plan.seed, x, 0.4)
    with Emulator(80):
        _, (h,) = backend.forward(x, [weight], [None], [eye[None, :D]], [eye[None]], plan)
        assert torch.equal(h[:, :D], mask)
        lora_as, needs = [torch.ones(1, D, R).half() / R], [True, False, True, False]
        dx, (da,), _, _ = backend.backward([eye], x, [weight], lora_as, [eye[None]], [h], plan, needs)
    assert torch.equal(dx * R, mask)
    assert torch.equal(da[0].t(), mask)


def test_unused_expert_has_zero_gradient():
    case = Case((6, 6), 13, 9, 4, 2, 3, experts=((0, 2), (2, 0)))
    with Emulator(80):
        _, _, da, db, _ = outputs(case, make(case, torch.bfloat16))
    for grad in (da, db):
        assert (grad[[1, 3]] == 0).all() and (grad[[0, 2]] != 0).any()


@pytest.mark.parametrize(
    "form, target, D, F", [("instance", 80, 13, 9), ("masked", 80, 13, 9), ("instance", 90, 16, 24)], indirect=["form"]
)
def test_nan_stays_in_its_instance(form, target, D, F):
    case = Case((40, 40), D, F, 4, 2, 3, experts=((0, 1), (1, 2)))
    inputs = make(case, torch.float16)
    with torch.no_grad():
        inputs.x[0, 3, 2], inputs.x[0, 4, 2] = float("nan"), float("inf")
    with Emulator(target):
        y, dx, _, _, dgates = outputs(case, inputs)
    assert y[0, 3].isnan().all() and y[1].isfinite().all() and y[0, 5:].isfinite().all()
    assert dx[1].isfinite().all() and dgates[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 13), (3, 0, 13)], ids=str)
def test_call_without_rows(shape):
    inputs, N = make(CASES[0], torch.float16), shape[0]
    routing = moe_lora.Routing(inputs.routing.experts[:N], inputs.routing.gates[:N])
    x = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
    with Emulator(80):
        y = moe_lora.linear(x, *inputs[1:5], routing, backend="triton")
        assert y.shape == (*shape[:-1], 9)
        y.sum().backward()
    assert (inputs.lora_a.grad == 0).all() and (inputs.lora_b.grad == 0).all()


def test_strided_tensors():
    case = CASES[0]
    inputs = make(case, torch.float16)
    x = torch.randn(3, 5, 40).half()[..., 7:20]
    other = inputs._replace(
        x=x.requires_grad_(),
        weight=inputs.weight.t().contiguous().t(),
        lora_a=inputs.lora_a.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        lora_b=inputs.lora_b.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
        dy=inputs.dy.transpose(0, 1).contiguous().transpose(0, 1),
    )
    with Emulator(80):
        assert_right(case, other, "triton")


def test_small_model_trains_with_the_losses_of_the_reference():
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(4, 8, 32, generator=generator), torch.randn(4, 8, 16, generator=generator)
    weights = torch.randn(48, 32, generator=generator) / 6, torch.randn(16, 48, generator=generator) / 7
    start = [torch.randn(*size, generator=generator) / 6 for size in ((3, 32, 4), (3, 4, 48), (3, 48, 4), (3, 4, 16))]
    gate = torch.randn(4, 3, generator=generator)

    def losses(backend):
        found, leaves = [], [tensor.clone().requires_grad_() for tensor in (*start, gate)]
        a1, b1, a2, b2, logits = leaves
        for step in range(4):
            gates, experts = logits.softmax(-1).topk(2)
            routing = moe_lora.Routing(experts, gates)
            hidden = moe_lora.linear(x.half(), weights[0].half(), None, a1, b1, routing, 2.0, 0.1, step, backend)
            y = moe_lora.linear(hidden.relu(), weights[1].half(), None, a2, b2, routing, 2.0, 0.1, step, backend)
            loss = functional.mse_loss(y.float(), target)
            found.append(loss.item())
            with torch.no_grad():
                for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                    leaf -= 2.0 * grad
        return found

    with Emulator(80):
        ours = losses("triton")
    assert ours == pytest.approx(losses("reference"), rel=2e-3)
    assert ours[-1] < 0.9 * ours[0]


def test_refusals_say_why():
    x, weight, lora_a = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(2, 8, 4)
    routing = moe_lora.Routing(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))

    def reason(**change):
        arguments = {"x": x, "weight": weight, "lora_a": lora_a, "routing": routing} | change
        with Emulator(80), pytest.raises(ValueError) as caught:
            moe_lora.explain(**arguments, backend="triton")
        return str(caught.value)

    assert "x must be float16, bfloat16 or float32, got torch.float64" in reason(x=x.double())
    assert "lora_a must be float16, bfloat16 or float32, got torch.float64" in reason(lora_a=lora_a.double())
    assert "the rank must be at most 256, got 300" in reason(lora_a=torch.zeros(2, 8, 300))
    assert "x must be on a cpu device, got meta" in reason(x=x.to("meta"))


@pytest.mark.parametrize(
    "target, D, wanted", [(90, 64, "one launch"), (90, 63, "two launches"), (80, 64, "two launches")]
)
def test_explain_says_how_many_launches(target, D, wanted):
    routing = moe_lora.Routing(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    x, weight, lora_a = torch.zeros(2, 80, D).half(), torch.zeros(40, D).half(), torch.zeros(2, D, 4)
    with Emulator(target):
        assert wanted in moe_lora.explain(x, weight, lora_a, routing, backend="triton").why


def test_one_launch_is_not_for_rows_that_overlap_or_lie_askew():
    routing = moe_lora.Routing(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    weight, lora_a, row = torch.zeros(40, 64).half(), torch.zeros(2, 64, 4), torch.zeros(20000).half()
    same, windows, askew = row[:64].expand(160, 64), row.unfold(0, 64, 16)[:160], row[1:10241].view(160, 64)
    with Emulator(90):
        assert "one launch" in moe_lora.explain(row[:10240].view(160, 64), weight, lora_a, routing, "triton").why
        for x in (same, windows, askew):
            assert "two launches" in moe_lora.explain(x, weight, lora_a, routing, "triton").why


def test_groups_that_do_not_fit_run_one_by_one():
    case, widths = GROUPS[0]

    def why(group):
        with Emulator(80):
            found = moe_lora.explain(group.x, group.weights, group.lora_as, group.routing, "triton")
        return f"{found.kernel}: {found.why}"

    group = groups.make(case, widths, torch.float16)
    assert why(group).startswith("3 together, ")
    four = why(groups.make(case, (8, 8, 8), torch.float16))
    assert four.startswith("one by one: ") and "a group has at most 3 members here, got 4" in four
    assert "float32 leaves no registers" in why(groups.make(case, widths, torch.float32))
    group.lora_as[1] = torch.zeros(4, 72, 8)
    assert "lora_a must have one shape, got (4, 72, 16), (4, 72, 8)" in why(group)
    group = groups.make(case, widths, torch.float16)
    group.weights[2] = group.weights[2].t().contiguous().t()
    assert "weights and lora_a must be contiguous" in why(group)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_without_gpu(monkeypatch):
    assert "no GPU" in moe_lora.backends()["triton"]
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert moe_lora.backends()["triton"] == "triton is not installed"


@pytest.mark.parametrize(
    "N, L, E, form",
    [
        (8, 1024, 4, "instance"),
        (16, 110, 4, "masked"),
        (8, 1, 4, "masked"),
        (512, 1, 64, "masked"),
        (1, 5000, 4, "instance"),
    ],
    ids=str,
)
def test_rule_takes_the_form_with_less_work(N, L, E, form):
    x, weight, lora_a = (
        torch.zeros(size, dtype=torch.bfloat16) for size in ((N, L, 4096), (4096, 4096), (E, 4096, 32))
    )
    routing = moe_lora.Routing(torch.zeros(N, 2, dtype=torch.int32), torch.ones(N, 2))
    with Emulator(90):
        found = moe_lora.explain(x, weight, lora_a, routing)
    assert (found.backend, found.kernel) == ("triton", form)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *FUSED, WIDE, WIDE._replace(dropout=0.0)], ids=str)
def test_device_matches_oracle(case, dtype, form):
    inputs = make(case, dtype, device="cuda")
    assert_right(case, inputs, "triton")
    for first, second in zip(outputs(case, inputs), outputs(case, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("case, widths", GROUPS, ids=str)
def test_device_groups_match_oracle(case, widths):
    groups.assert_group_right(case, groups.make(case, widths, torch.bfloat16, device="cuda"), "triton")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("case", [CASES[5], FUSED[0]], ids=str)
def test_device_replays_a_graph_with_another_seed(case):
    inputs = make(case, torch.float16, device="cuda")
    seed = inputs.seed.cuda()
    captured = inputs._replace(seed=seed)
    outputs(case, captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outputs(case, captured)
    seed.fill_(7)
    graph.replay()
    graph.replay()
    for got, want in zip(found, outputs(case, inputs._replace(seed=torch.tensor(7))), strict=True):
        assert torch.equal(got, want)


class Counted(TorchDispatchMode):
    """Counts PyTorch's operations, views left out, and those that touch a tensor of x's size: passes over x."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.operations, self.passes = size, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.operations += 1
            tensors = [one for one in (*args, result) if isinstance(one, torch.Tensor)]
            moved = "empty" not in str(function) and any(one.numel() == self.size for one in tensors)
            self.passes += moved
        return result


def test_reference_drops_in_few_passes():
    case = Case((200, 200), 96, 40, 4, 2, 8, dropout=0.2)
    inputs = make(case, torch.float16)
    plan = ops.Plan(inputs.routing.experts, inputs.routing.gates.detach(), None, 0.7, 0.2, torch.tensor(5))
    x, weight, bias, lora_a, lora_b = (tensor.detach() for tensor in inputs[:5])
    found = {}
    for kernels in (False, True):
        with Emulator(80) if kernels else nullcontext() as emulator, Counted(x.numel()) as counted:
            lists = [weight], [lora_a], [lora_b]
            (y,), hs = reference.forward(x, [weight], [bias], *lists[1:], plan, "gather")
            dx, das, dbs, dgates = reference.backward([inputs.dy], x, *lists, hs, plan, [True] * 4, "gather")
        found[kernels] = (y, dx, *das, *dbs, dgates)
    launches = [profile.kernel for profile in emulator.profiles]
    assert launches == ["drop_kernel"] * 3
    assert counted.operations + len(launches) <= 50 and counted.passes + len(launches) <= 8
    assert all(torch.equal(one, two) for one, two in zip(*found.values(), strict=True))


def test_replays_of_a_capture_draw_other_masks(monkeypatch):
    """The launches of a training step, with a seed on the device, repeated as a CUDA graph repeats them."""
    case = Case((40, 40), 24, 40, 4, 2, 8, dropout=0.4)
    inputs, seed, captured = make(case, torch.float16), torch.tensor(1), []
    run = Launcher.__call__
    monkeypatch.setattr(launch, "_seed", lambda plan, _: (plan.seed, "pointer"))  # as one on the device
    monkeypatch.setattr(Launcher, "__call__", lambda self, *call: captured.append((self, call)) or run(self, *call))
    settings = (0.7, 0.4)
    with Emulator(80):
        y = moe_lora.linear(*inputs[:6], *settings, seed, "triton/two")
        grads = torch.autograd.grad(y, list(inputs.leaves().values()), inputs.dy)
        launches, seen = list(captured), []
        for number in (2, 3):
            seed.fill_(number)
            for launcher, call in launches:
                run(launcher, *call)
            seen.append([tensor.clone() for tensor in (y.detach(), *grads)])
            wanted = moe_lora.linear(*inputs[:6], *settings, torch.tensor(number), "triton/two")
            wanted = [wanted, *torch.autograd.grad(wanted, list(inputs.leaves().values()), inputs.dy)]
            assert all(torch.equal(one, two) for one, two in zip(seen[-1], wanted, strict=True))
    assert not torch.equal(seen[0][0], seen[1][0])
