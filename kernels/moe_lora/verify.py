"""Is a backend right on this machine? Its output and gradients against the float64 oracle.

The tolerance, one rule for each element of everything:

    |backend - truth| <= 2 · max |PyTorch in the same dtype - truth| + floor · max(|truth|, sqrt(Σ term²))

The truth is the oracle in float64. The terms are the products that an element sums, as x_td W_fd or s g x_td A_dr B_rf:
the op is linear in each of its tensors, so the same op on their squares sums the terms' squares. Random terms sum up to
about that root; when they cancel, it stays, as their rounding errors do.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.backend.dispatch import differentiable
from moe_lora.backend.reference import oracle
from moe_lora.dropout import as_seed, keep_scale
from moe_lora.ops import linear
from moe_lora.routing import Plan, Routing

FLOOR = {torch.float64: 1e-12, torch.float32: 5e-7, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """One call. `lengths` has the tokens of each instance; unequal or packed ones are given with offsets.

    `experts` fixes who uses what; None draws K different ones per instance.
    """

    lengths: tuple[int, ...]
    D: int
    F: int
    E: int
    K: int
    R: int
    dropout: float = 0.0
    packed: bool = False
    bias: bool = True
    experts: tuple[tuple[int, ...], ...] | None = None

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths)) if self.packed else f"{len(self.lengths)}x{self.lengths[0]}"
        extra = (f"-p{self.dropout}" if self.dropout else "") + ("" if self.bias else "-nobias")
        return f"T{lengths}-D{self.D}-F{self.F}-E{self.E}-K{self.K}-R{self.R}{extra}"


CASES = (
    Case((5, 5, 5), 13, 9, 4, 2, 3),
    Case((40, 40), 17, 33, 8, 2, 4, dropout=0.3),
    Case((3, 0, 7, 1), 16, 24, 4, 2, 8, packed=True),
    Case((1,) * 6, 32, 8, 4, 4, 2, bias=False),
)


class Inputs(NamedTuple):
    """What a case is made of; x, lora_a, lora_b and gates require grad."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    routing: Routing
    dy: Tensor
    seed: Tensor

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "lora_a": self.lora_a, "lora_b": self.lora_b, "gates": self.routing.gates}


SCALE = 0.7


def make(case: Case, dtype: torch.dtype, master: torch.dtype | None = None, device: str = "cpu") -> Inputs:
    """The tensors of a case; lora_a and lora_b in `master`, which defaults to float32, or float64 over float64."""
    master = master or torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)

    lengths, D, F, E, K, R = case[:6]
    N, T = len(lengths), sum(lengths)
    lead = (T,) if case.packed else (N, lengths[0])
    scores = torch.rand(N, E, generator=generator)
    experts = scores.topk(K).indices if case.experts is None else torch.tensor(case.experts)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device) if case.packed else None
    gates = torch.rand(N, K, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    inputs = Inputs(
        randn(*lead, D),
        randn(F, D) / D**0.5,
        randn(F) if case.bias else None,
        randn(E, D, R, dtype=master) / D**0.5,
        randn(E, R, F, dtype=master) / R**0.5,
        Routing(experts.to(device), gates, offsets),
        randn(*lead, F),
        as_seed(5),
    )
    for tensor in inputs.leaves().values():
        tensor.requires_grad_()
    return inputs


def errors(case: Case, inputs: Inputs, backend: str = "auto") -> dict[str, tuple[float, float]]:
    """(error, allowed) of y, and of each gradient if the backend has a backward: where the error exceeds most."""
    routing = inputs.routing
    plan = Plan(routing.experts, routing.gates, routing.offsets, SCALE, case.dropout, inputs.seed)
    plan_of_squares = squared_plan(plan)
    squares = inputs._replace(
        routing=replace(routing, gates=plan_of_squares.gates),
        bias=None if inputs.bias is None else squared(inputs.bias),
        **{name: squared(getattr(inputs, name)) for name in ("x", "weight", "lora_a", "lora_b", "dy")},
    )
    outs = (
        (linear(*inputs[:6], SCALE, case.dropout, inputs.seed, backend), inputs),
        (oracle(*inputs[:5], plan), inputs),
        (oracle(*inputs[:5], plan, inputs.x.dtype), inputs),
        (oracle(*squares[:5], plan_of_squares), squares),
    )
    rows = {"y": tuple(y for y, _ in outs)}
    if differentiable(backend):
        grads = zip(*(gradients(y, of.leaves(), of.dy) for y, of in outs), strict=True)
        rows |= {"d" + name: each for name, each in zip(inputs.leaves(), grads, strict=True)}
    return {name: measured(*each, dtype=inputs.x.dtype) for name, each in rows.items()}


def gradients(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """Gradient of each leaf, zeros where y does not depend on it."""
    return torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True, materialize_grads=True)


def squared(tensor: Tensor) -> Tensor:
    """A leaf of a tensor's squares, in float64."""
    return tensor.detach().double().square().requires_grad_()


def squared_plan(plan: Plan) -> Plan:
    """The plan by which squared tensors make the sums of squared terms; picks of one expert are one term."""
    gates = plan.gates.detach().double()
    same = plan.experts[:, :, None] == plan.experts[:, None]  # [N, K, K]
    gates = gates * (same * gates[:, None]).sum(-1)
    return plan._replace(gates=gates.requires_grad_(), scale=plan.scale**2 * keep_scale(plan.dropout))


def measured(got: Tensor, want: Tensor, torchs: Tensor, squares: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(error, allowed) of what a backend got, at the element where the error exceeds what is allowed most.

    Args:
        want: the truth.
        torchs: PyTorch's in this dtype.
        squares: the sums of squared terms.
    """
    if not want.numel():
        return 0.0, 0.0
    got, want, torchs, squares = (tensor.double() for tensor in (got, want, torchs, squares))
    error = (got - want).abs()
    allowed = 2 * (torchs - want).abs().max() + FLOOR[dtype] * want.abs().maximum(squares.sqrt())
    worst = (error - allowed).argmax()  # a NaN, if there is one
    return error.flatten()[worst].item(), allowed.flatten()[worst].item()
