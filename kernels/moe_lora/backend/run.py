"""Runs a call of the op by the candidate that `dispatch` decides on; a group apart where that is faster."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lora.backend.dispatch import APART, Call, named
from moe_lora.routing import Plan

Grads = tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None], Tensor | None]


def forward(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    plan: Plan,
) -> tuple[list[Tensor], list[Tensor]]:
    """y [..., F] and h [T, K·R] of each member."""

    def attempt(candidate: str) -> tuple[list[Tensor], list[Tensor]]:
        if candidate != APART:
            module, form = named(candidate)
            return module.forward(x, weights, biases, lora_as, lora_bs, plan, form)
        ys, hs = [], []
        for weight, bias, a, b in zip(weights, biases, lora_as, lora_bs, strict=True):
            (y,), (h,) = forward(backend, x, [weight], [bias], [a], [b], plan)
            ys.append(y)
            hs.append(h)
        return ys, hs

    def wrong(outputs: tuple[list[Tensor], list[Tensor]]) -> str | None:
        T, K = x.shape[:-1].numel(), plan.experts.shape[1]
        for y, h, weight, lora_a in zip(*outputs, weights, lora_as, strict=True):
            reason = _not_like(y, (*x.shape[:-1], weight.shape[0]), x.dtype, "y")
            if reason := reason or _not_like(h, (T, K * lora_a.shape[2]), x.dtype, "h"):
                return reason
        return None

    return Call(backend, x, weights, lora_as, plan).run(attempt, wrong)


def backward(
    backend: str,
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hs: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
) -> Grads:
    """dx, dA and dB of each member, dgates; None where `needs` (of x, the gates, each A, each B) says so."""
    needs = tuple(needs)

    def attempt(candidate: str) -> Grads:
        if candidate != APART:
            module, form = named(candidate)
            return module.backward(dys, x, weights, lora_as, lora_bs, hs, plan, needs, form)
        members = len(weights)
        dxs, das, dbs, dgates = [], [], [], []
        for m, (weight, a, b, h) in enumerate(zip(weights, lora_as, lora_bs, hs, strict=True)):
            own = (needs[0], needs[1], needs[2 + m], needs[2 + members + m])
            dx, (da,), (db,), dg = backward(backend, [dys[m]], x, [weight], [a], [b], [h], plan, own)
            for grads, grad in zip((dxs, das, dbs, dgates), (dx, da, db, dg), strict=True):
                grads.append(grad)
        return _sum(dxs), das, dbs, _sum(dgates)

    def wrong(grads: Grads) -> str | None:
        dx, das, dbs, dgates = grads
        inputs = {"dx": x, "dgates": plan.gates}
        inputs |= {f"dA of member {m}": tensor for m, tensor in enumerate(lora_as)}
        inputs |= {f"dB of member {m}": tensor for m, tensor in enumerate(lora_bs)}
        pairs = zip((dx, dgates, *das, *dbs), inputs.items(), needs, strict=True)
        reasons = (_not_like(grad, tensor.shape, tensor.dtype, name) for grad, (name, tensor), need in pairs if need)
        return next(filter(None, reasons), None)

    return Call(backend, x, weights, lora_as, plan, needs).run(attempt, wrong)


def _not_like(tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> str | None:
    """What is wrong with a tensor that a backend returned."""
    if isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype == dtype:
        return None
    got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
    return f"{name} that must be {tuple(shape)} {dtype}, got {got}"


def _sum(grads: Sequence[Tensor | None]) -> Tensor | None:
    total = grads[0]
    for grad in grads[1:]:
        if total is not None and grad is not None:
            total += grad
    return total
