"""The CPU backend: shrink, base and expand in native kernels (`csrc/cpu`), for bf16, fp16 and float32.

    z = drop(x) A_e of the experts e that x's row uses;  h = z,  s = s g z                 [T, K·R], rounded once
    y = s B + x Wᵀ + bias      in the same float32 accumulators, 64 columns of W packed at a time, one rounding
    dx = drop(dh Aᵀ) + dy W,   dA_e = Σ drop(x)ᵀ dh,  dB_e = Σ sᵀ dy over the rows of each expert, in their order

Up to 64 rows without dropout read W once, where it lies. bf16 is multiplied as it is where the processor can, else in
float32, as fp16 always is: weights are converted as they are read, x and y as a whole. Each output element is summed in
one order, whatever the threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lora.routing import Plan

_C: Any = None
try:
    import moe_lora._C as _C
except ImportError as error:
    _MISSING = str(error)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    if _C is None:
        return f"moe_lora._C is not built ({_MISSING}); install with MOE_LORA_BUILD=cpu"
    return None if _C.instructions() else "the processor has none of the instruction sets of moe_lora._C"


def refuses(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if plan.dropout and x.numel() >= 1 << 33:
        return "dropout on 2**33 elements or more"
    return None


def kernel(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> tuple[str, str]:
    """The kernel that would run, and why."""
    T, most = x.shape[:-1].numel(), _C.few_rows
    reasons = {
        f"T = {T} > {most}": most < T,
        "dropout": bool(plan.dropout),
        "the weight is transposed": weight.stride(1) != 1,
    }
    against = [reason for reason, holds in reasons.items() if holds]
    name = "tiles" if against else "few_rows"
    return f"{name} ({_C.instructions()})", " and ".join(against) or f"T = {T} <= {most}"


def refuses_group(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan) -> str | None:
    """Why these linears of one x cannot run together."""
    if len({(lora_a.shape[0], lora_a.shape[2]) for lora_a in lora_as}) > 1:
        return "the members differ in E or R"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """y [..., F] and h [T, K·R], both in x's dtype, for x [..., D]."""
    (y,), (h,) = _C.forward(x, [weight], [bias], [lora_a], [lora_b], *plan)
    return y, h


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, h: Tensor, plan: Plan, needs: list[bool]
) -> list[Tensor | None]:
    """dx, dA, dB and dgates, each in its tensor's dtype, or None where `needs` says so."""
    need_dx, need_da, need_db, need_dgates = needs
    needs = [need_dx, need_dgates, need_da, need_db]
    dx, dgates, da, db = _C.backward([dy], x, [weight], [lora_a], [lora_b], [h], *plan, needs)
    return [dx, da, db, dgates]


def forward_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    plan: Plan,
) -> tuple[list[Tensor], list[Tensor]]:
    """y [..., F] and h [T, K·R] of each member."""
    return _C.forward(x, weights, biases, lora_as, lora_bs, *plan)


def backward_group(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hs: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """dx, dA and dB of each member, dgates; None where `needs` (of x, the gates, each A, each B) says so."""
    dx, dgates, *rest = _C.backward(dys, x, weights, lora_as, lora_bs, hs, *plan, needs)
    return dx, rest[: len(weights)], rest[len(weights) :], dgates
