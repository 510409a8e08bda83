"""Groups of linears to test `linear_group` with: a case of `moe_lora.verify` with further members of other widths."""

from typing import NamedTuple

import moe_lora
import torch
from moe_lora import verify
from moe_lora.backend.reference import oracle
from moe_lora.routing import Plan, Routing
from moe_lora.verify import Case
from torch import Tensor


class Group(NamedTuple):
    """x, the routing's gates, and all members' A and B require grad."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    routing: Routing
    dys: list[Tensor]
    seed: Tensor

    def leaves(self) -> dict[str, Tensor]:
        found = {"x": self.x, "gates": self.routing.gates}
        for name, tensors in (("a", self.lora_as), ("b", self.lora_bs)):
            found |= {f"{name}{m}": tensor for m, tensor in enumerate(tensors)}
        return found


def make(
    case: Case, widths: tuple[int, ...], dtype: torch.dtype, master: torch.dtype | None = None, device: str = "cpu"
) -> Group:
    """The first member is the case; `widths` are the F of the others, every second of which has no bias."""
    first = verify.make(case, dtype, master, device)
    x, weight, bias, lora_a, lora_b, routing, dy, seed = first
    members = [(weight, bias, lora_a, lora_b, dy)]
    for number, F in enumerate(widths):
        other = verify.make(case._replace(F=F, bias=number % 2 == 1), dtype, master, device)
        # other numbers than the first member's, which come from the same seed
        lora_a = other.lora_a.detach().flip(0, 1).contiguous().requires_grad_()
        members.append((other.weight.flip(1).contiguous(), other.bias, lora_a, other.lora_b, other.dy))
    weights, biases, lora_as, lora_bs, dys = (list(each) for each in zip(*members, strict=True))
    return Group(x, weights, biases, lora_as, lora_bs, routing, dys, seed)


def outputs(case: Case, group: Group, backend: str = "auto") -> dict[str, Tensor]:
    """The members' y, and all gradients."""
    ys = moe_lora.linear_group(*group[:6], verify.SCALE, case.dropout, group.seed, backend)
    return _with_gradients(group, ys)


def apart(case: Case, group: Group, backend: str = "auto") -> dict[str, Tensor]:
    """The same of one `linear` for each member."""
    members = zip(group.weights, group.biases, group.lora_as, group.lora_bs, strict=True)
    ys = [
        moe_lora.linear(group.x, *each, group.routing, verify.SCALE, case.dropout, group.seed, backend)
        for each in members
    ]
    return _with_gradients(group, ys)


def assert_group_right(case: Case, group: Group, backend: str = "auto") -> None:
    """All outputs and gradients are within the tolerance of `moe_lora.verify`."""
    routing = group.routing
    plan = Plan(routing.experts, routing.gates, routing.offsets, verify.SCALE, case.dropout, group.seed)
    squares, plan_of_squares = _squared(group, plan)
    truth, torchs, terms = (
        _with_gradients(of, [oracle(of.x, *each, by, dtype) for each in zip(*of[1:5], strict=True)])
        for of, by, dtype in (
            (group, plan, torch.float64),
            (group, plan, group.x.dtype),
            (squares, plan_of_squares, torch.float64),
        )
    )
    for name, got in outputs(case, group, backend).items():
        error, limit = verify.measured(got, truth[name], torchs[name], terms[name], group.x.dtype)
        assert error <= limit, f"{name} of {case}: error {error:.3e}, allowed {limit:.3e}"


def _squared(group: Group, plan: Plan) -> tuple[Group, Plan]:
    plan = verify.squared_plan(plan)
    lists = {
        name: [None if tensor is None else verify.squared(tensor) for tensor in getattr(group, name)]
        for name in ("weights", "biases", "lora_as", "lora_bs", "dys")
    }
    routing = Routing(plan.experts, plan.gates, plan.offsets)
    return group._replace(x=verify.squared(group.x), routing=routing, **lists), plan


def _with_gradients(group: Group, ys) -> dict[str, Tensor]:
    leaves = group.leaves()
    dys = [dy.to(y.dtype) for dy, y in zip(group.dys, ys, strict=True)]
    grads = torch.autograd.grad(ys, list(leaves.values()), dys, allow_unused=True, materialize_grads=True)
    found = {f"y{m}": y.detach() for m, y in enumerate(ys)}
    return found | {"d" + name: grad for name, grad in zip(leaves, grads, strict=True)}
