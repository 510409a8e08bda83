"""`moe_lora.linear` against the float64 oracle, and as an op: autograd, compile, export, AMP, checkpointing."""

import moe_lora
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lora.backend import reference
from moe_lora.verify import Case, make
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from tests.support.tolerance import assert_right

CASES = (
    Case((5, 5, 5), 13, 9, 4, 2, 3),
    Case((7, 7), 13, 9, 4, 2, 3, dropout=0.3),
    Case((1,), 13, 9, 4, 2, 3),
    Case((1,) * 9, 16, 8, 4, 1, 4),
    Case((3,) * 8, 16, 8, 4, 4, 4, bias=False),
    Case((70, 70), 17, 33, 8, 2, 4),
    Case((70, 70), 17, 33, 8, 2, 4, dropout=0.3),
    Case((50,), 8, 8, 16, 2, 1),
    Case((4, 4), 8, 8, 4, 2, 2, experts=((1, 1), (1, 1))),
    Case((90, 90), 8, 8, 4, 2, 2, experts=((3, 3), (3, 3))),
    Case((2, 2), 8, 8, 4, 2, 2, experts=((0, 1), (1, 0))),
    Case((3, 0, 6, 1), 13, 9, 4, 2, 3, packed=True),
    Case((0, 20, 0), 13, 9, 4, 2, 3, dropout=0.3, packed=True),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def call(case, inputs, **change):
    arguments = inputs._replace(**change)
    return moe_lora.linear(*arguments[:6], 0.7, case.dropout, inputs.seed)


def grads(case, inputs):
    return torch.autograd.grad(call(case, inputs), list(inputs.leaves().values()), inputs.dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_and_gradients_match_oracle(case, dtype, nan_empty):
    assert_right(case, make(case, dtype))


@pytest.mark.parametrize("form", reference.FORMS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.packed], ids=str)
def test_linear_forms_agree(case, form, monkeypatch, nan_empty):
    monkeypatch.setenv("MOE_LORA_BACKEND", f"reference/{form}")
    assert_right(case, make(case, torch.float64))


def test_linear_master_weights_keep_their_dtype():
    case = CASES[0]
    for master in (torch.float32, torch.bfloat16, torch.float64):
        inputs = make(case, torch.bfloat16, master)
        dx, da, db, dgates = grads(case, inputs)
        assert (dx.dtype, da.dtype, db.dtype, dgates.dtype) == (torch.bfloat16, master, master, torch.float32)
        assert_right(case, inputs)


def test_linear_half_gates_get_half_gradients():
    inputs = make(CASES[0], torch.bfloat16)
    gates = inputs.routing.gates.detach().bfloat16().requires_grad_()
    call(CASES[0], inputs, routing=moe_lora.Routing(inputs.routing.experts, gates)).sum().backward()
    assert gates.grad is not None and gates.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("form", reference.FORMS)
def test_linear_unused_expert_has_zero_gradient(form, monkeypatch):
    monkeypatch.setenv("MOE_LORA_BACKEND", f"reference/{form}")
    case = Case((6, 6), 13, 9, 4, 2, 3, experts=((0, 2), (2, 0)))
    _, da, db, _ = grads(case, make(case, torch.float32))
    for grad in (da, db):
        assert (grad[[1, 3]] == 0).all()
        assert (grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("shape", [(12, 13), (2, 6, 13), (2, 2, 3, 13), (1, 12, 13)], ids=str)
def test_linear_any_leading_shape_is_the_same_rows(shape):
    case = Case((6, 6), 13, 9, 4, 2, 3)
    inputs = make(case, torch.float64)
    x = inputs.x.detach().reshape(shape)
    if shape[0] == 1:
        with pytest.raises(ValueError, match="first dimensions"):
            call(case, inputs, x=x)
    else:
        assert torch.equal(call(case, inputs, x=x).reshape(2, 6, 9), call(case, inputs))


def test_linear_one_row_without_leading_dimension():
    case = Case((1,), 13, 9, 4, 2, 3)
    inputs = make(case, torch.float64)
    assert torch.equal(call(case, inputs, x=inputs.x[0, 0]), call(case, inputs)[0, 0])


def test_linear_token_routing_is_one_instance_per_row():
    inputs = make(Case((1,) * 12, 13, 9, 4, 2, 3), torch.float64)
    rows = call(CASES[0], inputs, x=inputs.x.detach().view(3, 4, 13))
    assert torch.equal(rows.view(12, 9), call(CASES[0], inputs).view(12, 9))


@pytest.mark.parametrize("lengths", [(5, 5, 5), (60, 60, 60)], ids=str)
def test_linear_expanded_batch_needs_no_new_routing(lengths):
    case = Case(lengths, 13, 9, 4, 2, 3)
    inputs = make(case, torch.float64)
    x = inputs.x.detach().repeat_interleave(3, 0)
    once = call(case, inputs, x=x)
    torch.testing.assert_close(once, call(case, inputs).repeat_interleave(3, 0))
    torch.testing.assert_close(once, call(case, inputs, x=x, routing=inputs.routing.expand(3)))


def test_linear_packed_equals_padded():
    case = Case((5, 5, 5), 13, 9, 4, 2, 3)
    inputs = make(case, torch.float64)
    routing = moe_lora.Routing(inputs.routing.experts, inputs.routing.gates, torch.tensor([0, 5, 10, 15]))
    packed = call(case, inputs, x=inputs.x.view(15, 13), routing=routing)
    torch.testing.assert_close(packed.view(3, 5, 9), call(case, inputs))


def test_linear_strided_tensors():
    case = CASES[0]
    inputs = make(case, torch.float64)
    x = inputs.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    lora_a = inputs.lora_a.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    lora_b = inputs.lora_b.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    weight = inputs.weight.t().contiguous().t()
    y = call(case, inputs, x=x, lora_a=lora_a, lora_b=lora_b, weight=weight)
    torch.testing.assert_close(y, call(case, inputs))
    found = torch.autograd.grad(y, (x, lora_a, lora_b), inputs.dy.transpose(0, 1).contiguous().transpose(0, 1))
    for got, want in zip(found, grads(case, inputs), strict=False):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 5, 13), (3, 0, 13)], ids=str)
def test_linear_without_rows(shape):
    inputs = make(CASES[0], torch.float32)
    N = shape[0]
    routing = moe_lora.Routing(inputs.routing.experts[:N], inputs.routing.gates[:N])
    y = call(CASES[0], inputs, x=torch.zeros(shape, requires_grad=True), routing=routing)
    assert y.shape == (*shape[:-1], 9)
    y.sum().backward()
    assert (inputs.lora_a.grad == 0).all() and (inputs.lora_b.grad == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_is_deterministic(case):
    inputs = make(case, torch.bfloat16)
    first, second = (torch.cat([g.flatten().double() for g in grads(case, inputs)]) for _ in range(2))
    assert torch.equal(call(case, inputs), call(case, inputs))
    assert torch.equal(first, second)


@pytest.mark.parametrize("form", reference.FORMS)
def test_linear_nan_stays_in_its_instance(form, monkeypatch):
    monkeypatch.setenv("MOE_LORA_BACKEND", f"reference/{form}")
    case = Case((40, 40), 13, 9, 4, 2, 3, experts=((0, 1), (1, 2)))
    inputs = make(case, torch.float32)
    with torch.no_grad():
        inputs.x[0, 3, 2] = float("nan")
        inputs.x[0, 4, 2] = float("inf")
    dx, da, _, dgates = grads(case, inputs)
    y = call(case, inputs)
    assert y[0, 3].isnan().all() and y[1].isfinite().all() and y[0, 5:].isfinite().all()
    assert dx[1].isfinite().all() and dgates[1].isfinite().all()
    assert da[2:].isfinite().all()


def test_linear_saves_no_large_tensor():
    case = Case((30, 30), 16, 24, 8, 2, 4, dropout=0.1)
    inputs, saved = make(case, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call(case, inputs)
    own = {id(tensor) for tensor in inputs if isinstance(tensor, torch.Tensor)}
    storages = {
        tensor.untyped_storage().data_ptr() for tensor in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    }
    assert own
    extra = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in storages]
    assert sorted(tensor.numel() for tensor in extra) == [1, 4, 4, 60 * 2 * 4]  # seed, experts, gates, h


def test_linear_skips_gradients_nobody_wants():
    case = CASES[0]
    inputs = make(case, torch.float32)
    y = call(case, inputs, x=inputs.x.detach(), lora_b=inputs.lora_b.detach())
    assert len(torch.autograd.grad(y, (inputs.lora_a, inputs.routing.gates), inputs.dy)) == 2
    assert not call(case, make(case, torch.float32), x=inputs.x.detach()).isnan().any()


@pytest.mark.parametrize("case", [Case((3, 3), 5, 4, 3, 2, 2, dropout=0.2), Case((9,), 3, 4, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("form", reference.FORMS)
def test_linear_gradcheck(case, form, monkeypatch):
    monkeypatch.setenv("MOE_LORA_BACKEND", f"reference/{form}")
    inputs = make(case, torch.float64)

    def function(x, lora_a, lora_b, gates):
        routing = moe_lora.Routing(inputs.routing.experts, gates)
        return call(case, inputs, x=x, lora_a=lora_a, lora_b=lora_b, routing=routing)

    assert torch.autograd.gradcheck(function, list(inputs.leaves().values()))


def test_linear_second_derivative_is_refused():
    inputs = make(CASES[0], torch.float64)
    (dx,) = torch.autograd.grad(call(CASES[0], inputs).sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[-2]], ids=str)
def test_linear_opcheck(case):
    x, weight, bias, lora_a, lora_b, routing, dy, seed = make(case, torch.float32)
    plan = (routing.experts, routing.gates, routing.offsets, 0.7, case.dropout, seed if case.dropout else None, "auto")
    opcheck(torch.ops.moe_lora.linear.default, (x, weight, bias, lora_a, lora_b, *plan[:3], *plan[3:]))
    with torch.no_grad():
        _, h = torch.ops.moe_lora.linear(x, weight, bias, lora_a, lora_b, *plan)
        needs = [True, True, False, True]
        detached = [tensor.detach() for tensor in (x, weight, lora_a, lora_b)]
        opcheck(
            torch.ops.moe_lora.linear_backward.default,
            (dy, *detached, h, plan[0], plan[1].detach(), *plan[2:], needs),
        )


def test_linear_compiles_whole_and_not_per_seed():
    case = Case((5, 5, 5), 13, 9, 4, 2, 3, dropout=0.3)
    inputs, graphs = make(case, torch.float32), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, routing, seed: call(case, inputs._replace(seed=seed), x=x, routing=routing),
        backend=count,
        fullgraph=True,
    )
    for seed in (1, 2, 3):
        again = inputs._replace(seed=torch.tensor(seed))
        assert torch.equal(compiled(inputs.x, inputs.routing, again.seed), call(case, again))
    assert len(graphs) == 1


def test_linear_compiles_with_gradients():
    case = CASES[1]
    inputs = make(case, torch.float32)
    compiled = torch.compile(
        lambda *leaves: call(case, inputs._replace(x=leaves[0], lora_a=leaves[1], lora_b=leaves[2])),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = (inputs.x, inputs.lora_a, inputs.lora_b)
    found = torch.autograd.grad(compiled(*leaves), leaves, inputs.dy)
    for got, want in zip(found, grads(case, inputs), strict=False):
        assert torch.equal(got, want)


class _Export(torch.nn.Module):
    def __init__(self, case, inputs):
        super().__init__()
        self.case, self.inputs = case, inputs

    def forward(self, x, routing):
        return call(self.case, self.inputs, x=x, routing=routing)


def test_linear_exports_with_any_batch():
    case = CASES[0]
    inputs = make(case, torch.float32)._replace(lora_a=torch.randn(4, 13, 3), lora_b=torch.randn(4, 3, 9))
    module = _Export(case, inputs)
    dims = {0: torch.export.Dim("N"), 1: torch.export.Dim("L")}
    routing = moe_lora.Routing(inputs.routing.experts, inputs.routing.gates.detach())
    program = torch.export.export(
        module, (inputs.x.detach(), routing), dynamic_shapes=(dims, [{0: dims[0]}, {0: dims[0]}])
    )
    other = moe_lora.Routing(torch.tensor([[0, 1], [3, 2]]), torch.rand(2, 2))
    x = torch.randn(2, 8, 13)
    assert torch.equal(program.module()(x, other), module(x, other))


def test_linear_under_autocast_is_like_f_linear():
    case = CASES[0]
    inputs = make(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, inputs)
    assert y.dtype == torch.nn.functional.linear(inputs.x.bfloat16(), inputs.weight.bfloat16()).dtype
    found = torch.autograd.grad(y, list(inputs.leaves().values()), inputs.dy.bfloat16())
    assert all(grad.dtype == torch.float32 for grad in found)
    low = inputs._replace(x=inputs.x.bfloat16(), weight=inputs.weight.bfloat16(), bias=inputs.bias.bfloat16())
    assert torch.equal(y, call(case, low))
    double = make(case, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(case, double).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_linear_checkpointed_replays_its_dropout(reentrant):
    case = Case((5, 5, 5), 13, 9, 4, 2, 3, dropout=0.5)
    inputs = make(case, torch.float32)

    def function(x):
        return moe_lora.linear(x, *inputs[1:6], 0.7, 0.5)

    torch.manual_seed(3)
    (want,) = torch.autograd.grad(function(inputs.x), inputs.x, inputs.dy)
    torch.manual_seed(3)
    inputs.x.grad = None
    checkpoint(function, inputs.x, use_reentrant=reentrant).backward(inputs.dy)
    assert torch.equal(inputs.x.grad, want)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_linear_random_shapes_match_oracle(data):
    E = data.draw(st.integers(1, 6))
    K = data.draw(st.integers(1, E))
    packed = data.draw(st.booleans())
    N = data.draw(st.integers(1, 4))
    lengths = (
        data.draw(st.lists(st.integers(0, 6), min_size=N, max_size=N))
        if packed
        else [data.draw(st.integers(1, 24))] * N
    )
    sizes = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    experts = data.draw(st.lists(st.tuples(*[st.integers(0, E - 1)] * K), min_size=N, max_size=N))
    case = Case(
        tuple(lengths),
        sizes[0],
        sizes[1],
        E,
        K,
        sizes[2],
        data.draw(st.sampled_from([0.0, 0.4])),
        packed,
        experts=tuple(experts),
    )
    assert_right(case, make(case, torch.float64))


def _bad(**change):
    case = CASES[0]
    inputs = make(case, torch.float32)
    return lambda: moe_lora.linear(**({name: getattr(inputs, name) for name in inputs._fields[:6]} | change))


BAD = (
    ({"x": torch.zeros(3, 5, 12)}, ValueError, r"weight must be \[F, D\] with D = 12 like x, got \(9, 13\)"),
    ({"x": torch.zeros(3, 5, 13, dtype=torch.long)}, ValueError, "x must be floating point"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be floating point \[..., D\], got \(\)"),
    ({"weight": torch.zeros(9)}, ValueError, r"weight must be \[F, D\]"),
    (
        {"weight": torch.zeros(9, 13, dtype=torch.bfloat16)},
        TypeError,
        "weight must be torch.float32 like x, got torch.bfloat16",
    ),
    ({"weight": torch.zeros(9, 13, requires_grad=True)}, ValueError, "weight must be frozen, got requires_grad=True"),
    ({"bias": torch.zeros(9, requires_grad=True)}, ValueError, "bias must be frozen"),
    ({"bias": torch.zeros(8)}, ValueError, r"bias must be \[F\] with F = 9 like weight, got \(8,\)"),
    ({"bias": torch.zeros(9, dtype=torch.float64)}, TypeError, "bias must be torch.float32 like x"),
    (
        {"lora_a": torch.zeros(4, 12, 3)},
        ValueError,
        r"lora_a must be \[E, D, R\] with D = 13 like x, got \(4, 12, 3\)",
    ),
    ({"lora_b": torch.zeros(4, 9, 3)}, ValueError, r"lora_b must be \[E, R, F\] = \(4, 3, 9\) .* got \(4, 9, 3\)"),
    ({"lora_b": torch.zeros(4, 3, 9, dtype=torch.int)}, TypeError, "lora_b must be floating point, got torch.int32"),
    ({"weight": torch.zeros(9, 13, device="meta")}, ValueError, "weight must be on cpu like x, got meta"),
    ({"bias": torch.zeros(9, device="meta")}, ValueError, "bias must be on cpu like x, got meta"),
    ({"lora_a": torch.zeros(4, 13, 0), "lora_b": torch.zeros(4, 0, 9)}, ValueError, "D, F and R must be at least 1"),
    ({"lora_a": torch.zeros(1, 13, 3), "lora_b": torch.zeros(1, 3, 9)}, ValueError, "K <= E = 1, got K = 2"),
    ({"x": torch.zeros(4, 6, 13)}, ValueError, "3 instances must be x's first dimensions or divide the first"),
    ({"routing": None}, TypeError, "routing must be a moe_lora.Routing, got NoneType"),
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"weight": torch.nn.Linear(13, 9)}, TypeError, "weight must be a tensor, got Linear"),
    ({"bias": 3}, TypeError, "bias must be a tensor, got int"),
    ({"lora_a": None}, TypeError, "lora_a must be a tensor, got NoneType"),
    ({"dropout": "0.1"}, ValueError, r"dropout must be in \[0, 1\), got '0.1'"),
    ({"dropout": 0.1, "seed": 1.5}, TypeError, "seed must be None, an integer or a 0-dim int64 tensor, got 1.5"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\)"),
    ({"dropout": 0.1, "seed": torch.zeros(2)}, ValueError, "seed must be a 0-dim int64 tensor"),
    ({"dropout": 0.1, "seed": 2**63}, ValueError, "seed must fit in a signed 64-bit integer"),
    ({"backend": "warp"}, ValueError, "backend must be auto, rule or one of .*reference, got 'warp'"),
)


@pytest.mark.parametrize("change, kind, message", BAD, ids=[message for _, _, message in BAD])
def test_linear_bad_input_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        _bad(**change)()


def test_linear_under_autocast_refuses_a_quantised_weight():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"weight must be .* got torch\.int8"):
        _bad(weight=torch.zeros(9, 13, dtype=torch.int8))()


def test_linear_of_frozen_base_with_grad_is_fine_without_grad_mode():
    with torch.no_grad():
        _bad(weight=torch.zeros(9, 13, requires_grad=True))()
