"""The op `moe_lora::linear_group`: linears that share x, the routing and the dropout mask, in one call.

    y_{m,t} = x_t W_mᵀ + bias_m + s Σ_k g_{i,k} drop(x_t) A_{m,e(i,k)} B_{m,e(i,k)},  m a member of the group

A backend that takes the group reads and drops x once for all members, and makes dx as one sum; where that does not
pay, each member runs by its own choice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lora.backend import run
from moe_lora.dropout import as_seed
from moe_lora.ops import autocast_dtype, below_autograd, check, derivative, no_autocast, no_view
from moe_lora.routing import Plan, Routing

_LIBRARY = torch.library.Library("moe_lora", "FRAGMENT")
_LIBRARY.define(
    "linear_group(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_as, Tensor[] lora_bs, Tensor experts, "
    "Tensor gates, Tensor? offsets, float scale, float dropout, Tensor? seed, str backend) "
    "-> (Tensor[] ys, Tensor[] hs)"
)
_LIBRARY.define(
    "linear_group_backward(Tensor[] dys, Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, Tensor[] hs, "
    "Tensor experts, Tensor gates, Tensor? offsets, float scale, float dropout, Tensor? seed, str backend, "
    "bool[] needs) -> (Tensor dx, Tensor[] das, Tensor[] dbs, Tensor dgates)"
)


def linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    routing: Routing,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Several `linear` of the same x, as q, k and v are, or gate and up; the same result, computed together.

    Args:
        x: [..., D]
        weights, biases, lora_as, lora_bs: of each member what `linear` takes; F, E and R may differ.
        routing, scale, dropout, seed, backend: as in `linear`; one dropout mask for all members.
    Returns:
        The members' outputs, [..., F_m] in x's dtype.
    Raises:
        ValueError, TypeError: as `linear`, or the lists differ in length.
    """
    lists = {"weights": weights, "biases": biases, "lora_as": lora_as, "lora_bs": lora_bs}
    for name, each in lists.items():
        if not isinstance(each, Sequence):
            raise TypeError(f"{name} must be a list with one item for each member, got {type(each).__name__}")
    if not weights or any(len(each) != len(weights) for each in lists.values()):
        got = ", ".join(f"{len(each)} {name}" for name, each in lists.items())
        raise ValueError(f"a group needs as many weights, biases, lora_as and lora_bs, at least one, got {got}")
    for member in zip(weights, biases, lora_as, lora_bs, strict=True):
        check(x, *member, routing, dropout)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    seed = as_seed(seed, x.device) if dropout else None
    plan = (routing.experts, routing.gates, routing.offsets, scale, dropout, seed)
    lists = (list(weights), list(biases), list(lora_as), list(lora_bs))
    ys, _ = torch.ops.moe_lora.linear_group(x, *lists, *plan, backend)
    return tuple(ys)


def _forward(x, weights, biases, lora_as, lora_bs, experts, gates, offsets, scale, dropout, seed, backend):
    plan = Plan(experts, gates, offsets, scale, dropout, seed)
    with no_autocast(x):
        ys, hs = run.forward(backend, x, weights, biases, lora_as, lora_bs, plan)
    return [no_view(y) for y in ys], list(hs)


def _backward(
    dys, x, weights, lora_as, lora_bs, hs, experts, gates, offsets, scale, dropout, seed, backend, needs
):  # the schema's order
    plan = Plan(experts, gates, offsets, scale, dropout, seed)
    with no_autocast(x):
        dx, das, dbs, dgates = run.backward(backend, dys, x, weights, lora_as, lora_bs, hs, plan, needs)

    def filled(grad: Tensor | None) -> Tensor:
        return x.new_empty(0) if grad is None else grad

    return filled(dx), [filled(da) for da in das], [filled(db) for db in dbs], filled(dgates)


def _fake_forward(x, weights, biases, lora_as, lora_bs, experts, gates, offsets, scale, dropout, seed, backend):
    T = 1
    for size in x.shape[:-1]:
        T *= size
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return ys, [x.new_empty(T, experts.shape[1] * a.shape[2]) for a in lora_as]


def _fake_backward(
    dys, x, weights, lora_as, lora_bs, hs, experts, gates, offsets, scale, dropout, seed, backend, needs
):
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for tensor, need in zip((x, gates, *lora_as, *lora_bs), needs, strict=True)
    ]
    members = len(weights)
    return grads[0], grads[2 : 2 + members], grads[2 + members :], grads[1]


class _Group(torch.autograd.Function):
    """The derivative of `linear_group`; of its lists the members follow each other: autograd sees no lists."""

    @staticmethod
    def forward(ctx: Any, keys: Any, members: int, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        lists = [list(flat[i * members : (i + 1) * members]) for i in range(4)]
        experts, gates, offsets, ctx.scale, ctx.dropout, seed, ctx.backend = plan = flat[4 * members :]
        ys, hs = below_autograd(torch.ops.moe_lora.linear_group.default, keys, (x, *lists, *plan))
        ctx.members = members
        weights, _, lora_as, lora_bs = lists
        ctx.save_for_backward(x, *weights, *lora_as, *lora_bs, *hs, experts, gates, offsets, seed)
        ctx.mark_non_differentiable(*hs)
        ctx.set_materialize_grads(False)
        return (*ys, *hs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, *lists, experts, gates, offsets, seed = ctx.saved_tensors
        members, wanted = ctx.members, ctx.needs_input_grad[2:]  # without keys and members
        weights, lora_as, lora_bs, hs = (lists[i * members : (i + 1) * members] for i in range(4))
        need_das, need_dbs = (wanted[1 + i * members : 1 + (i + 1) * members] for i in (2, 3))
        needs = [wanted[0], wanted[2 + 4 * members], *need_das, *need_dbs]
        filled = [
            x.new_zeros(*x.shape[:-1], weight.shape[0]) if dy is None else dy
            for dy, weight in zip(grads[:members], weights, strict=True)
        ]
        plan = (experts, gates, offsets, ctx.scale, ctx.dropout, seed)
        dx, das, dbs, dgates = torch.ops.moe_lora.linear_group_backward.default(
            filled, x, weights, lora_as, lora_bs, hs, *plan, ctx.backend, needs
        )
        das = [grad if need else None for grad, need in zip(das, need_das, strict=True)]
        dbs = [grad if need else None for grad, need in zip(dbs, need_dbs, strict=True)]
        frozen = [None] * (2 * members)
        dx, dgates = dx if needs[0] else None, dgates if needs[1] else None
        return None, None, dx, *frozen, *das, *dbs, None, dgates, None, None, None, None, None


def _apply(keys: Any, x: Tensor, *call: Any) -> tuple[list[Tensor], list[Tensor]]:
    lists, plan = call[:4], call[4:]
    members = len(lists[0])
    found = _Group.apply(keys, members, x, *[tensor for each in lists for tensor in each], *plan)
    return list(found[:members]), list(found[members:])


class _GroupBackward(torch.autograd.Function):
    """There is no second derivative."""

    @staticmethod
    def forward(ctx: Any, keys: Any, lists: tuple, *flat: Any) -> tuple[Tensor, ...]:
        members, rest = lists
        parts = [list(flat[1 + i * members : 1 + (i + 1) * members]) for i in range(5)]
        call = (parts[0], flat[0], *parts[1:], *flat[1 + 5 * members :], *rest)
        dx, das, dbs, dgates = below_autograd(torch.ops.moe_lora.linear_group_backward.default, keys, call)
        return (dx, *das, *dbs, dgates)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError("moe_lora.linear_group has no second derivative; do not use create_graph=True through it")


def _apply_backward(keys: Any, dys: Sequence[Tensor], x: Tensor, *call: Any) -> tuple:
    lists, plan, rest = (dys, *call[:4]), call[4:10], call[10:]
    members = len(dys)
    flat = [tensor for each in lists for tensor in each]
    dx, *grads, dgates = _GroupBackward.apply(keys, (members, rest), x, *flat, *plan)
    return dx, grads[:members], grads[members:], dgates


_LIBRARY.impl("linear_group", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_group_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("moe_lora::linear_group", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("moe_lora::linear_group_backward", _fake_backward, lib=_LIBRARY)
for _op, _applied in (
    (torch.ops.moe_lora.linear_group.default, _apply),
    (torch.ops.moe_lora.linear_group_backward.default, _apply_backward),
):
    _LIBRARY.impl(_op, derivative(_op, _applied), "Autograd", with_keyset=True)
