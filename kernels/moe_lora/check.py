"""Is a backend right on this machine? Its output and gradients against the float64 oracle.

The tolerance, one rule for everything: err(backend) <= 2 · err(PyTorch in the same dtype) + floor · max |truth|, both
errors the largest absolute difference from the oracle in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.dispatch import differentiable
from moe_lora.dropout import as_seed
from moe_lora.ops import linear
from moe_lora.reference import oracle
from moe_lora.routing import Plan, Routing

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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
    """(error, allowed) of y, and of each gradient if the backend has a backward."""
    x, weight, bias, lora_a, lora_b, routing, dy, seed = inputs
    plan = Plan(routing.experts, routing.gates, routing.offsets, SCALE, case.dropout, seed)
    y = linear(x, weight, bias, lora_a, lora_b, routing, SCALE, case.dropout, seed, backend)
    truth, torchs = (oracle(x, weight, bias, lora_a, lora_b, plan, dtype) for dtype in (torch.float64, x.dtype))
    rows, leaves = {"y": (y, truth, torchs)}, inputs.leaves() if differentiable(backend) else {}
    grads = [
        torch.autograd.grad(out, list(leaves.values()), dy.to(out.dtype), allow_unused=True, materialize_grads=True)
        for out in (y, truth, torchs)
        if leaves
    ]
    rows |= {"d" + name: each for name, each in zip(leaves, zip(*grads, strict=True), strict=True)}
    return {name: measured(*each, x.dtype) for name, each in rows.items()}


def measured(got: Tensor, want: Tensor, torchs: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(error, allowed) of what a backend got, where `want` is the truth and `torchs` PyTorch's in this dtype."""
    return _error(got, want), _allowed(torchs, want, dtype)


def _error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want.double()).abs().max().item() if want.numel() else 0.0


def _allowed(torchs: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    largest = want.double().abs().max().item() if want.numel() else 0.0
    return 2 * _error(torchs, want) + FLOOR[dtype] * largest
