"""The native CPU backend against the float64 oracle: every kernel, every instruction set that runs here."""

import os
import subprocess
import sys
import threading

import moe_lora
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lora.backend import cpu, installation
from moe_lora.backend.reference import oracle
from moe_lora.routing import Plan
from moe_lora.verify import Case, gradients, make

from tests.support import groups
from tests.support.tolerance import assert_right

needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
INSTRUCTIONS = cpu._C.all_instructions() if cpu._C else ["none"]
CASES = (
    Case((5, 5, 5), 13, 9, 4, 2, 3),
    Case((91, 91), 70, 130, 4, 2, 32),
    Case((91, 91), 71, 130, 4, 2, 32, dropout=0.3),
    Case((50,), 600, 65, 4, 2, 17, bias=False),
    Case((1,), 600, 65, 4, 2, 17),
    Case((1,) * 14, 1100, 17, 4, 2, 40),
    Case((1,) * 31, 1100, 17, 4, 2, 40),
    Case((1,) * 100, 64, 64, 8, 2, 8),
    Case((1,) * 8, 1100, 130, 4, 2, 33),
    Case((1,) * 9, 2090, 70, 4, 2, 5),
    Case((2,) * 23, 261, 101, 6, 3, 16),
    Case((60,), 2051, 97, 4, 2, 17),
    Case((1,) * 70, 1100, 70, 40, 2, 20),
    Case((33, 1, 2), 1100, 301, 4, 2, 12, packed=True),
    Case((33, 40), 1100, 301, 4, 2, 12, dropout=0.2, packed=True),
    Case((1,) * 40, 33, 20, 32, 8, 1, dropout=0.1),
    Case((300,), 20, 16, 1, 1, 4),
    Case((4, 4), 8, 8, 4, 2, 2, experts=((1, 1), (1, 1))),
    Case((90, 90), 8, 8, 4, 2, 2, experts=((3, 3), (3, 3))),
    Case((3, 0, 60, 1), 40, 90, 4, 2, 5, packed=True),
    Case((0, 20, 0), 13, 9, 4, 2, 3, dropout=0.3, packed=True),
)
GROUPS = (
    (Case((91, 91), 70, 130, 4, 2, 32), (65, 300)),
    (Case((91, 91), 71, 130, 4, 2, 17, dropout=0.3), (33,)),
    (Case((1,) * 14, 1100, 17, 4, 2, 40), (120, 5)),
    (Case((1,) * 40, 33, 20, 32, 8, 1, dropout=0.1), (20, 20, 7)),
    (Case((3, 0, 60, 1), 40, 90, 4, 2, 5, packed=True), (90,)),
)
SHARED = (  # by all threads: more tasks than threads in every loop of the driver
    Case((91, 91), 700, 530, 4, 2, 32),
    Case((50, 150), 520, 800, 4, 2, 17, dropout=0.3, packed=True),
    Case((1,) * 30, 3000, 700, 6, 2, 20),
    Case((2,) * 3, 2100, 500, 4, 2, 5),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(case, inputs, **change):
    return moe_lora.linear(*inputs._replace(**change)[:6], 0.7, case.dropout, inputs.seed, "cpu")


def outputs(case, inputs):
    y = call(case, inputs)
    return [y, *torch.autograd.grad(y, list(inputs.leaves().values()), inputs.dy)]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    before = cpu._C.instructions()
    cpu._C.use_instructions(request.param)
    yield request.param
    cpu._C.use_instructions(before)


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_and_gradients_match_oracle(case, dtype, instructions, nan_empty):
    assert_right(case, make(case, dtype), "cpu")


LONG_SUMS = (  # over D, over F, over the rows; by each kernel
    (Case((35, 35), 4096, 64, 4, 2, 8), 1),
    (Case((35, 35), 64, 4096, 4, 2, 8), 1),
    (Case((1500, 500), 32, 48, 4, 2, 8), 1),
    (Case((1,) * 4, 4096, 64, 4, 2, 8), 1),
    (Case((1,) * 30, 4096, 64, 4, 2, 8), 1),
    (Case((35, 35), 16384, 96, 4, 2, 8), 4),
    (Case((1,) * 30, 16384, 96, 4, 2, 8), 4),
)


@needs_native
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (times > 1)) for case, times in LONG_SUMS],
    ids=str,
)
def test_cpu_float32_sums_are_as_exact_as_pytorchs_at_any_depth(case, instructions):
    inputs = make(case, torch.float32)
    plan = Plan(inputs.routing.experts, inputs.routing.gates, None, 0.7, 0.0, inputs.seed)
    doubles = make(case, torch.float64)
    doubles = doubles._replace(**{name: getattr(inputs, name).detach().double() for name in ("weight", "bias", "dy")})
    for name, tensor in doubles.leaves().items():
        tensor.data = inputs.leaves()[name].detach().double()
    y, truth = call(case, inputs), oracle(*doubles[:5], plan._replace(gates=doubles.routing.gates))
    theirs = moe_lora.linear(*inputs[:6], 0.7, 0.0, inputs.seed, "reference")
    results = [
        [out, *gradients(out, of.leaves(), of.dy)] for out, of in ((y, inputs), (theirs, inputs), (truth, doubles))
    ]
    for name, ours, pytorchs, true in zip(("y", "dx", "da", "db", "dgates"), *results, strict=True):
        error, allowed = ((got.double() - true).square().mean().sqrt() for got in (ours, pytorchs))
        if true.numel() >= 64:  # of a few gates, the mean error is chance
            assert error <= 1.5 * allowed, f"{name}: {error / allowed:.2f} of PyTorch's rms error"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case, widths", GROUPS, ids=str)
def test_cpu_groups_match_oracle(case, widths, dtype, instructions, nan_empty):
    groups.assert_group_right(case, groups.make(case, widths, dtype), "cpu")


@needs_native
@pytest.mark.parametrize("case, widths", GROUPS, ids=str)
def test_cpu_members_of_a_group_get_the_bits_that_each_gets_alone(case, widths, torch_threads):
    group, found = groups.make(case, widths, torch.bfloat16), []
    want = groups.apart(case, group, "cpu")
    for count in (1, 3):
        torch_threads(count)
        found.append(groups.outputs(case, group, "cpu"))
    for name, got in found[0].items():
        assert torch.equal(got, found[1][name]), name
        if name not in ("dx", "dgates"):  # sums over the members, rounded once instead of each time
            assert torch.equal(got, want[name]), name


@needs_native
def test_cpu_group_without_rows_and_with_a_transposed_weight():
    case, widths = GROUPS[2]
    group = groups.make(case, widths, torch.bfloat16)
    group.weights[1] = group.weights[1].t().contiguous().t()
    groups.assert_group_right(case, group, "cpu")
    routing = moe_lora.Routing(group.routing.experts[:0], group.routing.gates[:0])
    x = torch.zeros(0, 3, 1100, dtype=torch.bfloat16, requires_grad=True)
    ys = moe_lora.linear_group(x, *group[1:5], routing, backend="cpu")
    assert [y.shape for y in ys] == [(0, 3, 17), (0, 3, 120), (0, 3, 5)]
    sum(y.sum() for y in ys).backward()
    assert all((tensor.grad == 0).all() for tensor in (*group.lora_as, *group.lora_bs))


@needs_native
@pytest.mark.parametrize("master", [torch.bfloat16, torch.float64], ids=str)
def test_cpu_takes_any_master_dtype(master):
    for case in (CASES[1], CASES[4]):
        inputs = make(case, torch.bfloat16, master)
        _, _, da, db, _ = outputs(case, inputs)
        assert da.dtype == db.dtype == master
        assert_right(case, inputs, "cpu")


@needs_native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_cpu_gives_the_same_bits_for_every_thread_count(case, dtype, instructions, torch_threads):
    inputs = make(case, dtype)
    torch_threads(1)
    want = outputs(case, inputs)
    for count in (2, 3, 5, 8):
        torch_threads(count)
        for _ in range(3):
            assert all(map(torch.equal, outputs(case, inputs), want)), count


@needs_native
def test_cpu_rows_do_not_depend_on_their_neighbours():
    case = Case((40, 40), 100, 70, 4, 2, 8, experts=((0, 1), (1, 2)))
    inputs = make(case, torch.bfloat16)
    clean = outputs(case, inputs)
    with torch.no_grad():
        inputs.x[0, 3, 2] = float("nan")
        inputs.x[0, 39, 2] = float("inf")
    y, dx, da, _, dgates = outputs(case, inputs)
    assert y[0, 3].isnan().all() and torch.equal(y[0, 4:39], clean[0][0, 4:39]) and torch.equal(y[1], clean[0][1])
    assert torch.equal(dx[1], clean[1][1]) and torch.equal(dgates[1], clean[4][1]) and da[2:].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(1,) * 7, (3,) * 14, (1,) * 80, (5,) * 40], ids=lambda lengths: str(sum(lengths)))
def test_cpu_experts_reach_only_rows_that_use_them(dtype, lengths, instructions):
    N = len(lengths)
    case = Case(lengths, 70, 90, 600, 2, 5, experts=tuple((500 + i % 3, 502 + i % 2) for i in range(N)))
    inputs = make(case, dtype)
    clean = outputs(case, inputs)
    with torch.no_grad():
        inputs.lora_a[[501, 7]] = float("nan")
        inputs.lora_b[501] = float("inf")
    y, dx, da, db, dgates = outputs(case, inputs)
    clear = torch.tensor([501 not in pair for pair in case.experts])
    for got, want in ((y, clean[0]), (dx, clean[1]), (dgates, clean[4])):
        assert torch.equal(got[clear], want[clear]) and not got[~clear].isfinite().all()
    used = [500, 502, 503]
    assert torch.equal(db[used], clean[3][used]) and torch.equal(da[used], clean[2][used])
    unused = torch.ones(600, dtype=torch.bool)
    unused[500:504] = False
    assert not da[unused].any() and not db[unused].any()


@needs_native
def test_explain_names_the_kernel_of_a_call():
    inputs = make(Case((8,), 16, 24, 4, 2, 2), torch.float32)
    name = f"({cpu._C.instructions()})"
    assert moe_lora.explain(inputs.x, inputs.weight, inputs.lora_a, inputs.routing, "cpu").kernel == f"few_rows {name}"
    turned = inputs.weight.t().contiguous().t()
    found = moe_lora.explain(inputs.x, turned, inputs.lora_a, inputs.routing, "cpu")
    assert found.kernel == f"tiles {name}" and "a weight is transposed" in found.why
    many = inputs.x.repeat(1, 9, 1)
    found = moe_lora.explain(many, inputs.weight, inputs.lora_a, inputs.routing, "cpu")
    assert found.kernel == f"tiles {name}" and "T = 72 > 64" in found.why


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(2, 2), (30, 30), (50, 50)], ids=str)
def test_cpu_strided_tensors(dtype, lengths):
    case = Case(lengths, 37, 21, 4, 2, 3)
    inputs = make(case, dtype)
    want = outputs(case, inputs)
    wide = torch.full((2, lengths[0], 50), float("nan"), dtype=dtype)
    wide[..., 5:42] = inputs.x.detach()
    changed = inputs._replace(
        x=wide[..., 5:42].requires_grad_(),
        weight=inputs.weight.t().contiguous().t(),
        lora_a=inputs.lora_a.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        lora_b=inputs.lora_b.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
        dy=inputs.dy.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for got, expected in zip(outputs(case, changed), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-2)


@needs_native
@pytest.mark.parametrize("count", [1, 2, 3])
def test_cpu_runs_on_torchs_threads(count, torch_threads):
    torch_threads(count)
    assert cpu.threads() == count


@needs_native
def test_cpu_called_by_many_threads_at_once(instructions, torch_threads):
    calls = [(case, make(case, torch.bfloat16)) for case in SHARED]
    torch_threads(1)
    wants, found = [outputs(*each) for each in calls], []
    torch_threads(2)
    start = threading.Barrier(len(calls))

    def work(number):
        start.wait()
        for _ in range(10):
            same = all(map(torch.equal, outputs(*calls[number]), wants[number]))
            found.append((same, cpu.threads()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(True, 2)] * 10 * len(calls)


@needs_native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cpu_random_shapes_match_oracle(data):
    E = data.draw(st.integers(1, 6))
    K = data.draw(st.integers(1, E))
    packed = data.draw(st.booleans())
    N = data.draw(st.integers(1, 4))
    some = st.lists(st.integers(0, 20), min_size=N, max_size=N)
    lengths = data.draw(some) if packed else [data.draw(st.integers(1, 24))] * N
    D, F, R = data.draw(st.tuples(st.integers(1, 80), st.integers(1, 80), st.integers(1, 20)))
    experts = data.draw(st.lists(st.tuples(*[st.integers(0, E - 1)] * K), min_size=N, max_size=N))
    dropout = data.draw(st.sampled_from([0.0, 0.4]))
    case = Case(tuple(lengths), D, F, E, K, R, dropout, packed, experts=tuple(experts))
    assert_right(case, make(case, data.draw(st.sampled_from(DTYPES))), "cpu")


@needs_native
@pytest.mark.threads
def test_cpu_after_fork():
    code = """
import os, torch, moe_lora
from moe_lora.routing import Plan
from moe_lora.verify import Case, gradients, make
torch.set_num_threads(2)
case = Case((91, 91), 70, 130, 4, 2, 32)
inputs = make(case, torch.bfloat16)
run = lambda: moe_lora.linear(*inputs[:6], backend="cpu")
want = run()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(run(), want) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ | {"PYTHONPATH": _path()})


def _path():
    return os.pathsep.join(path for path in sys.path if path)


@needs_native
def test_cpu_refuses_what_it_cannot_run():
    x, weight, bias, lora_a, lora_b, routing = make(CASES[0], torch.float64)[:6]
    with pytest.raises(ValueError, match=r"cannot run this call: x is torch\.float64"):
        moe_lora.linear(x, weight, bias, lora_a, lora_b, routing, backend="cpu")
    assert moe_lora.explain(x, weight, lora_a, routing).backend == "reference"


def test_cpu_without_extension_or_instructions_leaves_it_to_the_reference(monkeypatch):
    x, weight, bias, lora_a, lora_b, routing = make(CASES[0], torch.bfloat16)[:6]
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_MISSING", installation.missing("moe_lora._C", ImportError("no module")))
    reason = moe_lora.backends()["cpu"]
    assert reason is not None and "(no module); run: " in reason
    assert moe_lora.linear(x, weight, bias, lora_a, lora_b, routing).isfinite().all()
    monkeypatch.setattr(cpu, "_C", type("C", (), {"instructions": staticmethod(lambda: None)}))
    reason = moe_lora.backends()["cpu"]
    assert reason is not None and "instruction sets" in reason
    assert moe_lora.explain(x, weight, lora_a, routing).backend == "reference"


@needs_native
@pytest.mark.parametrize(("lengths", "wrong"), [((20,), -1), ((20,), 4), ((2,), 9)], ids=str)
def test_cpu_checks_experts_that_changed_after_the_first_call(lengths, wrong):
    inputs = make(Case(lengths, 16, 8, 4, 2, 3), torch.float32)
    moe_lora.linear(*inputs[:6], backend="cpu")
    inputs.routing.experts[0, 0] = wrong
    with pytest.raises(RuntimeError, match=r"experts must be in 0\.\.3, got"):
        moe_lora.linear(*inputs[:6], backend="cpu")


@needs_native
def test_cpu_checks_offsets_that_changed_after_the_first_call():
    inputs = make(Case((3, 17), 16, 8, 4, 2, 3, packed=True), torch.float32)
    moe_lora.linear(*inputs[:6], backend="cpu")
    inputs.routing.offsets[2] = 10
    with pytest.raises(RuntimeError, match="offsets must rise from 0 to x's 20 rows"):
        moe_lora.linear(*inputs[:6], backend="cpu")
