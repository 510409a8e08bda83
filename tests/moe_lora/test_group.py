"""`moe_lora.linear_group` against the float64 oracle and against its members apart; as an op."""

import moe_lora
import pytest
import torch
from moe_lora.verify import Case
from torch.library import opcheck

from tests.support.groups import apart, assert_group_right, make, outputs

CASES = (
    (Case((5, 5, 5), 13, 9, 4, 2, 3), (4, 6)),
    (Case((7, 7), 13, 9, 4, 2, 3, dropout=0.3), (9,)),
    (Case((1,), 13, 9, 4, 2, 3), (1, 30)),
    (Case((70, 70), 17, 33, 8, 2, 4, dropout=0.3), (8, 8, 70)),
    (Case((4, 4), 8, 8, 4, 2, 2, experts=((1, 1), (1, 1))), (8,)),
    (Case((3, 0, 6, 1), 13, 9, 4, 2, 3, packed=True), (9, 5)),
    (Case((3, 3), 13, 9, 4, 2, 3), ()),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case, widths", CASES, ids=str)
def test_group_and_gradients_match_oracle(case, widths, dtype, nan_empty):
    assert_group_right(case, make(case, widths, dtype))


@pytest.mark.parametrize("case, widths", CASES, ids=str)
def test_group_is_its_members(case, widths):
    group = make(case, widths, torch.float64)
    want = apart(case, group, "reference")
    for name, got in outputs(case, group, "reference").items():
        torch.testing.assert_close(got, want[name])


def test_group_members_may_differ_in_experts_and_rank():
    case, other = Case((5, 5), 13, 9, 4, 2, 3), Case((5, 5), 13, 6, 6, 2, 5)
    one, two = make(case, (), torch.float64), make(other, (), torch.float64)
    lists = [[*first, *second] for first, second in zip(one[1:5], two[1:5], strict=True)]
    group = one._replace(
        weights=lists[0], biases=lists[1], lora_as=lists[2], lora_bs=lists[3], dys=[*one.dys, *two.dys]
    )
    assert_group_right(case, group)


@pytest.mark.parametrize("case, widths", [CASES[0], CASES[1]], ids=str)
def test_group_opcheck(case, widths):
    x, weights, biases, lora_as, lora_bs, routing, dys, seed = make(case, widths, torch.float32)
    plan = (routing.experts, routing.gates, routing.offsets, 0.7, case.dropout, seed if case.dropout else None, "auto")
    opcheck(torch.ops.moe_lora.linear_group.default, (x, weights, biases, lora_as, lora_bs, *plan))
    with torch.no_grad():
        _, hs = torch.ops.moe_lora.linear_group(x, weights, biases, lora_as, lora_bs, *plan)
        lists = [[tensor.detach() for tensor in each] for each in (weights, lora_as, lora_bs)]
        needs = [True, False, True, *[False] * len(widths), *[True] * (1 + len(widths))]
        arguments = (dys, x.detach(), *lists, hs, plan[0], plan[1].detach(), *plan[2:], needs)
        opcheck(torch.ops.moe_lora.linear_group_backward.default, arguments)


def test_group_compiles_whole():
    case, widths = CASES[1]
    group = make(case, widths, torch.float32)
    compiled = torch.compile(outputs, fullgraph=False, backend="aot_eager")
    want = outputs(case, group)
    whole = torch.compile(lambda x: moe_lora.linear_group(x, *group[1:6], 0.7), fullgraph=True, backend="aot_eager")
    for got, expected in zip(whole(group.x), moe_lora.linear_group(*group[:6], 0.7), strict=True):
        torch.testing.assert_close(got, expected)
    for name, got in compiled(case, group).items():
        torch.testing.assert_close(got, want[name])


def test_group_saves_x_once():
    case, widths = CASES[0]
    group, saved = make(case, widths, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        moe_lora.linear_group(*group[:6])
    own = {tensor.untyped_storage().data_ptr() for tensor in (*group.weights, *group.lora_as, *group.lora_bs, group.x)}
    extra = [tensor.numel() for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    assert sorted(extra) == [6, 6, 90, 90, 90]  # experts, gates, h of each


def test_group_with_an_output_nobody_uses():
    case, widths = CASES[0]
    group = make(case, widths, torch.float64)
    leaves = (group.x, group.lora_as[0], group.lora_as[1])
    y, *_ = moe_lora.linear_group(*group[:6])
    found = torch.autograd.grad(y, leaves, group.dys[0])
    x, weights, biases, lora_as, lora_bs, routing = group[:6]
    alone = moe_lora.linear(x, weights[0], biases[0], lora_as[0], lora_bs[0], routing)
    for got, want in zip(found, torch.autograd.grad(alone, leaves[:2], group.dys[0]), strict=False):
        torch.testing.assert_close(got, want)
    assert (found[2] == 0).all()


def test_group_under_autocast():
    case, widths = CASES[0]
    group = make(case, widths, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ys = moe_lora.linear_group(*group[:6])
    assert {y.dtype for y in ys} == {torch.bfloat16}


def test_group_second_derivative_is_refused():
    case, widths = CASES[0]
    group = make(case, widths, torch.float64)
    y, *_ = moe_lora.linear_group(*group[:6])
    (dx,) = torch.autograd.grad(y.sum(), group.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_group_bad_input_is_refused():
    case, widths = CASES[0]
    x, weights, biases, lora_as, lora_bs, routing = make(case, widths, torch.float32)[:6]
    with pytest.raises(ValueError, match="got 3 weights, 2 biases, 3 lora_as, 3 lora_bs"):
        moe_lora.linear_group(x, weights, biases[:2], lora_as, lora_bs, routing)
    with pytest.raises(TypeError, match="weights must be a list with one item for each member, got Tensor"):
        moe_lora.linear_group(x, weights[0], biases, lora_as, lora_bs, routing)
    with pytest.raises(ValueError, match="at least one, got 0 weights"):
        moe_lora.linear_group(x, [], [], [], [], routing)
    with pytest.raises(ValueError, match=r"lora_b must be \[E, R, F\] = \(4, 3, 4\)"):
        moe_lora.linear_group(x, weights, biases, lora_as, [lora_bs[0], *lora_bs[:2]], routing)


def test_group_explained():
    case, widths = CASES[0]
    x, weights, _, lora_as, _, routing = make(case, widths, torch.float32)[:6]
    apart = moe_lora.explain(x, weights, lora_as, routing, "reference")
    assert (apart.backend, apart.kernel) == ("reference", "one by one") and "it runs one linear at a time" in apart.why
    found = moe_lora.explain(x, weights, lora_as, routing)
    assert found.kernel.startswith("3 together" if found.backend == "cpu" else "one by one")
