"""The op `moe_lora::linear`: checks at the door, dispatch, autograd.

    y_t = x_t Wᵀ + bias + s Σ_k g_{i,k} drop(x_t) A_{e(i,k)} B_{e(i,k)},  t a row of instance i

Saved for backward: x itself, h [T, K·R], the parameters, the routing and the seed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from moe_lora.backend import run
from moe_lora.dropout import as_seed
from moe_lora.routing import Plan, Routing
from moe_lora.weight import QuantizedWeight, dequantize

_LIBRARY = torch.library.Library("moe_lora", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor experts, Tensor gates, "
    "Tensor? offsets, float scale, float dropout, Tensor? seed, str backend, Tensor? scales=None) "
    "-> (Tensor y, Tensor h)"
)
_LIBRARY.define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h, Tensor experts, "
    "Tensor gates, Tensor? offsets, float scale, float dropout, Tensor? seed, str backend, bool[] needs, "
    "Tensor? scales=None) -> (Tensor dx, Tensor da, Tensor db, Tensor dgates)"
)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    routing: Routing,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A frozen linear plus the chosen experts' low-rank updates of each row.

        y_t = x_t Wᵀ + bias + scale Σ_k g_{i,k} drop(x_t) A_{e(i,k)} B_{e(i,k)},  t a row of instance i

    Args:
        x: [..., D]; `Routing` says which rows belong to which instance.
        weight, bias: [F, D] and [F] or None, frozen, in x's dtype; under autocast cast like in F.linear. A
            `QuantizedWeight` is unpacked to x's dtype in each call, and kept for the backward as it is.
        lora_a, lora_b: [E, D, R], [E, R, F], in any floating dtype; computed in x's, gradients in their own.
        routing: which experts each row uses, with which weights.
        scale: s, alpha / R in LoRA's terms; the chosen experts' sum is multiplied by it.
        dropout: probability, applied to x before A only; the mask is a function of the seed, see `dropout.py`.
        seed: None draws one from the generator of x's device, with no word to the host; or an int; or a 0-dim int64
            tensor. One on x's device is read by the kernels, so that a captured graph may be replayed with another.
        backend: "auto" or a name in `backends()`; a named one runs or raises.
    Returns:
        [..., F] in x's dtype.
    Raises:
        ValueError, TypeError: arguments disagree, weight or bias require grad, or the backend cannot run this call.
    """
    check(x, weight, bias, lora_a, lora_b, routing, dropout)
    weight, scales = (weight, None) if isinstance(weight, Tensor) else (weight.data, weight.scales)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight if scales is not None else weight.to(dtype)
    plan = Plan(
        routing.experts, routing.gates, routing.offsets, scale, dropout, as_seed(seed, x.device) if dropout else None
    )
    y, _ = torch.ops.moe_lora.linear(x, weight, bias, lora_a, lora_b, *plan, backend, scales)
    return y


def check(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    routing: Routing,
    dropout: float,
) -> None:
    """Raises what `linear` raises for arguments that disagree."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a moe_lora.Routing, got {type(routing).__name__}")
    base = weight.data if isinstance(weight, QuantizedWeight) else weight
    tensors = {"x": x, "weight": base, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    if not torch.compiler.is_compiling():
        _check_transforms([x, lora_a, lora_b, routing.gates])
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., D], got {tuple(x.shape)} {x.dtype}")
    D = x.shape[-1]
    if base.dim() != 2 or weight.shape[1] != D:
        raise ValueError(f"weight must be [F, D] with D = {D} like x, got {tuple(weight.shape)}")
    F = weight.shape[0]
    if bias is not None and bias.shape != (F,):
        raise ValueError(f"bias must be [F] with F = {F} like weight, got {tuple(bias.shape)}")
    if lora_a.dim() != 3 or lora_a.shape[1] != D:
        raise ValueError(f"lora_a must be [E, D, R] with D = {D} like x, got {tuple(lora_a.shape)}")
    E, _, R = lora_a.shape
    if lora_b.shape != (E, R, F):
        raise ValueError(f"lora_b must be [E, R, F] = {(E, R, F)} like lora_a and weight, got {tuple(lora_b.shape)}")
    casts = autocast_dtype(x) is not None
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or isinstance(tensor, QuantizedWeight):
            continue
        if tensor.dtype != x.dtype and not (casts and tensor.is_floating_point()):
            raise TypeError(f"{name} must be {x.dtype} like x, got {tensor.dtype}; cast one, or use torch.autocast")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must be frozen, got requires_grad=True; call {name}.requires_grad_(False)")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not D or not F or not R:
        raise ValueError(
            f"D, F and R must be at least 1, got weight {tuple(weight.shape)}, lora_a {tuple(lora_a.shape)}"
        )
    for name, tensor in (tensors | {"routing": routing.experts}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if isinstance(dropout, str) or dropout is None or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    routing.check(x.shape, E)


def _check_transforms(tensors: list[Any]) -> None:
    """Refuses what would be silently zero, or fail deep inside: tangents, and the transforms of torch.func."""
    if _functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "moe_lora has no rule for torch.func transforms (grad, vmap, jvp); use backward() or torch.autograd.grad"
        )
    if forward_ad._current_level >= 0 and any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError("moe_lora has no forward-mode derivative; use backward() or torch.autograd.grad")


def _forward(x, weight, bias, lora_a, lora_b, experts, gates, offsets, scale, dropout, seed, backend, scales=None):
    plan = Plan(experts, gates, offsets, scale, dropout, seed)
    weight = weight if scales is None else dequantize(weight, scales, x.dtype)
    with no_autocast(x):
        (y,), (h,) = run.forward(backend, x, [weight], [bias], [lora_a], [lora_b], plan)
    return no_view(y), h


def no_view(y: Tensor) -> Tensor:
    """The same memory as a tensor that may be changed in place: autograd forbids that of a view made in an op."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _backward(
    dy, x, weight, lora_a, lora_b, h, experts, gates, offsets, scale, dropout, seed, backend, needs, scales=None
):  # the schema's order
    plan = Plan(experts, gates, offsets, scale, dropout, seed)
    weight = weight if scales is None else dequantize(weight, scales, x.dtype)
    with no_autocast(x):
        dx, (da,), (db,), dgates = run.backward(backend, [dy], x, [weight], [lora_a], [lora_b], [h], plan, needs)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, da, db, dgates))


def _fake_forward(x, weight, bias, lora_a, lora_b, experts, gates, offsets, scale, dropout, seed, backend, scales=None):
    T = 1
    for size in x.shape[:-1]:
        T *= size
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(T, experts.shape[1] * lora_a.shape[2])


def _fake_backward(
    dy, x, weight, lora_a, lora_b, h, experts, gates, offsets, scale, dropout, seed, backend, needs, scales=None
):
    inputs = ((x, needs[0]), (lora_a, needs[2]), (lora_b, needs[3]), (gates, needs[1]))
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for tensor, need in inputs
    )


class _Linear(torch.autograd.Function):
    """The derivative of `linear`."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *call: Any) -> tuple[Tensor, Tensor]:
        x, weight, _, lora_a, lora_b, experts, gates, offsets, ctx.scale, ctx.dropout, seed, ctx.backend, *scales = call
        y, h = below_autograd(torch.ops.moe_lora.linear.default, keys, call)
        ctx.save_for_backward(x, weight, lora_a, lora_b, h, experts, gates, offsets, seed, *scales)
        ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple:
        x, weight, lora_a, lora_b, h, experts, gates, offsets, seed, *scales = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = [wanted[1], wanted[7], wanted[4], wanted[5]]  # of x, the gates, A, B
        plan = Plan(experts, gates, offsets, ctx.scale, ctx.dropout, seed)
        grads = torch.ops.moe_lora.linear_backward.default(
            dy, x, weight, lora_a, lora_b, h, *plan, ctx.backend, needs, *scales
        )
        dx, da, db, dgates = (grad if wanted[i] else None for grad, i in zip(grads, (1, 4, 5, 7), strict=True))
        return None, dx, None, None, da, db, None, dgates, None, None, None, None, None, *[None] * len(scales)


class _LinearBackward(torch.autograd.Function):
    """There is no second derivative."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *call: Any) -> tuple[Tensor, ...]:
        return below_autograd(torch.ops.moe_lora.linear_backward.default, keys, call)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError("moe_lora.linear has no second derivative; do not use create_graph=True through it")


def below_autograd(op: Any, keys: Any, call: tuple) -> Any:
    """The op without its derivative, for these dispatch keys."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *call)


def derivative(op: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
    """What runs for the op's Autograd key: `apply` where a gradient is wanted, else the op alone.

    In the place of `torch.library.register_autograd`, which takes ten times as long for a call.
    """

    def run(keys: Any, *call: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*call):
            return apply(keys, *call)
        return below_autograd(op, keys, call)

    return run


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to; None where it is off or, as for float64, leaves x alone."""
    if not _autocasts(x) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def no_autocast(x: Tensor):
    """The backends choose their dtypes themselves; autocast would cast their fp32 sums once more."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def _autocasts(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # of meta, torch knows no autocast


_LIBRARY.impl("linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("moe_lora::linear", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("moe_lora::linear_backward", _fake_backward, lib=_LIBRARY)
for _op, _function in (
    (torch.ops.moe_lora.linear.default, _Linear),
    (torch.ops.moe_lora.linear_backward.default, _LinearBackward),
):
    _LIBRARY.impl(_op, derivative(_op, _function.apply), "Autograd", with_keyset=True)
