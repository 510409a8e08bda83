"""The Triton backend: NVIDIA and AMD GPUs; float16, bfloat16 and float32 with float32 sums.

    shrink   h = drop(x) A                               one read of x, [T, K·R] written
    expand   y = x Wᵀ + bias + (s g h) B                 one kernel, the low-rank part one step more of its sum over D
    backward ds = dy Bᵀ, dx = dy W + drop((s g ds) Aᵀ)   the same two kernels on the transposed tensors
             dA_e = Σ drop(x)ᵀ (s g ds), dB_e = Σ (s g h)ᵀ dy, dg = s Σ <ds, h>

Two or three linears of one x share its shrink, their dx is one expand over all of them, and their dA one pass over x.

The kernels are in `triton_kernels.py`, their shapes in `triton_launch.py`. triton is imported at the first call.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from moe_lora.backend.triton.launch import Call, device_of, interpreted, on
from moe_lora.routing import Plan

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_RANK = 256
_MAX_GROUP = 3


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton.runtime import driver

    # `_active` is what a launch uses; asking for `active` looks for devices anew each time that there is none
    return None if interpreted() or driver._active is not None else _why_no_gpu()


def refuses(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    device = device_of(x.device)
    if x.dtype not in _DTYPES:
        return f"x must be float16, bfloat16 or float32, got {x.dtype}"
    if x.dtype == torch.bfloat16 and device.capability < 80:
        return f"bfloat16 needs compute capability 8.0, this device has {device.capability / 10}"
    if lora_a.dtype not in _DTYPES:
        return f"lora_a must be float16, bfloat16 or float32, got {lora_a.dtype}"
    if lora_a.shape[2] > _MAX_RANK:
        return f"the rank must be at most {_MAX_RANK}, got {lora_a.shape[2]}"
    if device.type is not None and x.device.type != device.type:
        return f"x must be on a {device.type} device, got {x.device}"
    return None


def kernel(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> tuple[str, str]:
    """The form that would run, and why."""
    rows = _rows(x)
    call = Call(rows, lora_a, plan)
    tile = call.expand_tile(*weight.shape)
    launches = "one launch" if call.fused_grid(rows, weight, weight.shape[0], plan.dropout) else "two launches"
    tiles = f"tiles of {tile.BLOCK_T} x {tile.BLOCK_F} x {tile.BLOCK_D}"
    return call.form, f"{call.why}; a linear by itself takes {launches}; {tiles}"


def refuses_group(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan) -> str | None:
    """Why these linears of one x cannot run together."""
    if not 1 < len(weights) <= _MAX_GROUP:
        return f"a group has 2 to {_MAX_GROUP} members here, got {len(weights)}"
    if x.dtype == torch.float32:
        return "float32 leaves no registers for the sums of more than one"
    if len({lora_a.shape for lora_a in lora_as}) > 1:
        return f"lora_a must have one shape, got {', '.join(str(tuple(lora_a.shape)) for lora_a in lora_as)}"
    if not all(tensor.is_contiguous() for tensor in (*weights, *lora_as)):
        return "weights and lora_a must be contiguous"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """y [..., F] and h [T, K·R], both in x's dtype, for x [..., D]."""
    (y,), (h,) = forward_group(x, [weight], [bias], [lora_a], [lora_b], plan)
    return y, h


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, h: Tensor, plan: Plan, needs: list[bool]
) -> list[Tensor | None]:
    """dx, dA, dB and dgates, each in its tensor's dtype, or None where `needs` says so."""
    need_dx, need_da, need_db, need_dgates = needs
    needs = [need_dx, need_dgates, need_da, need_db]
    dx, (da,), (db,), dgates = backward_group([dy], x, [weight], [lora_a], [lora_b], [h], plan, needs)
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
    rows = _rows(x)
    call = Call(rows, lora_as[0], plan)
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    with on(x.device):
        grid = call.fused_grid(rows, weights[0], weights[0].shape[0], plan.dropout) if len(weights) == 1 else None
        if grid:
            hs = [call.fused(rows, weights[0].t(), biases[0], lora_as[0], lora_bs[0], ys[0], grid, dropout=True)]
            return ys, hs
        hs = call.shrink(rows, lora_as, dropout=True)
        for weight, bias, b, h, y in zip(weights, biases, lora_bs, hs, ys, strict=True):
            call.expand([rows], [weight.t()], bias, [b], [h], y, dropout=False)
    return ys, hs


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
    members = len(weights)
    need_dx, need_dgates, need_das, need_dbs = needs[0], needs[1], needs[2 : 2 + members], needs[2 + members :]
    rows, drows = _rows(x), [_rows(dy) for dy in dys]
    call = Call(rows, lora_as[0], plan)
    dx = dgates = None
    das: list[Tensor | None] = [None] * members
    dbs: list[Tensor | None] = [None] * members
    with on(x.device):
        for m in range(members):
            if need_dbs[m]:
                (dbs[m],) = call.expert_grads([hs[m]], drows[m], [lora_bs[m]], transposed=False)
        if need_dx or need_dgates or any(need_das):
            ups, downs = ([lora.transpose(1, 2) for lora in loras] for loras in (lora_bs, lora_as))
            if need_dx:
                dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            # dropout would need a second sum, of what it is for
            alone = need_dx and members == 1 and not plan.dropout
            grid = call.fused_grid(drows[0], weights[0], weights[0].shape[1], 0.0) if alone else None
            if grid:
                assert dx is not None
                dss = [call.fused(drows[0], weights[0], None, ups[0], downs[0], dx, grid, dropout=False)]
            else:
                dss = [call.shrink(dy, [up], dropout=False)[0] for dy, up in zip(drows, ups, strict=True)]
            if need_dgates:
                dgates, *others = [call.gate_grad(ds, h) for ds, h in zip(dss, hs, strict=True)]
                for other in others:
                    dgates += other
            if dx is not None and not grid:
                call.expand(drows, weights, None, downs, dss, dx, dropout=True)
            if any(need_das):
                found = call.expert_grads(dss, rows, lora_as, transposed=True)
                das = [da if need else None for da, need in zip(found, need_das, strict=True)]
    return dx, das, dbs, dgates


@cache
def _why_no_gpu() -> str | None:
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except RuntimeError as error:
        return f"triton finds no GPU: {error}"
    return None


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
