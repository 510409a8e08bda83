"""The Triton backend: NVIDIA and AMD GPUs; float16, bfloat16 and float32 with float32 sums.

    shrink   h = drop(x) A                               one read of x, [T, K·R] written
    expand   y = x Wᵀ + bias + (s g h) B                 one kernel, the low-rank part one step more of its sum over D
    split    y = bias + (s g h) B, then y += x Wᵀ        by the library's product, which accumulates
    backward ds = dy Bᵀ, dx = dy W + drop((s g ds) Aᵀ)   the same two kernels on the transposed tensors
             dA_e = Σ drop(x)ᵀ (s g ds), dB_e = Σ (s g h)ᵀ dy, dg = s Σ <ds, h>

Two or three linears of one x share its shrink, their dx is one expand over all of them, and their dA one pass over x.

The kernels are in `kernels.py`, tiles in `tiles.py`, launches in `launch.py`. The first call imports triton.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from moe_lora.backend.triton.launch import Call, Route, device_of, interpreted, on, prepared
from moe_lora.backend.triton.launch import generation as generation  # dispatch asks
from moe_lora.routing import Plan

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_RANK = 256
_MAX_GROUP = 3
_FEW_ROWS, _LARGE = 64, 1024  # more rows, and features of both sides: the rule leaves the product to the library
_LAUNCHES = {
    "fused": "one launch",
    "two": "two launches",
    "split": "two launches for the low-rank part, on which the library's product accumulates",
}


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton.runtime import driver

    # `_active` is what a launch uses; asking for `active` looks for devices anew each time that there is none
    return None if interpreted() or driver._active is not None else _why_no_gpu()


def drops(x: Tensor) -> bool:
    """Whether dropout of x can be made by a kernel here."""
    if unavailable() is not None or x.dtype not in _DTYPES:
        return False
    return device_of(x.device).type in (None, x.device.type)


def refuses(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    device = device_of(x.device)
    if x.dtype not in _DTYPES:
        return f"x must be float16, bfloat16 or float32, got {x.dtype}"
    if device.capability < 80:
        return f"the kernels need compute capability 8.0 or newer, this device has {device.capability / 10}"
    for lora_a in lora_as:
        if lora_a.dtype not in _DTYPES:
            return f"lora_a must be float16, bfloat16 or float32, got {lora_a.dtype}"
        if lora_a.shape[2] > _MAX_RANK:
            return f"the rank must be at most {_MAX_RANK}, got {lora_a.shape[2]}"
    if device.type is not None and x.device.type != device.type:
        return f"x must be on a {device.type} device, got {x.device}"
    return _refuses_group(x, weights, lora_as) if len(weights) > 1 else None


def describe(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan, form: str = "two"
) -> tuple[str, str]:
    """How rows meet their experts, and why; and the launches."""
    weight, lora_a = weights[0], lora_as[0]
    call = Call(_rows(x), lora_a, plan, narrow=form.endswith("narrow"))
    tile, launches = call.expand_tile(*weight.shape), _LAUNCHES[form.partition("-")[0]]
    tiles = f"tiles of {tile.BLOCK_T} x {tile.BLOCK_F} x {tile.BLOCK_D}"
    return call.form, f"{call.why}; {launches}" + ("" if form == "split" else f"; {tiles}")


def _refuses_group(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor]) -> str | None:
    """Why these linears of one x cannot run together."""
    if len(weights) > _MAX_GROUP:
        return f"a group has at most {_MAX_GROUP} members here, got {len(weights)}"
    if x.dtype == torch.float32:
        return "float32 leaves no registers for the sums of more than one"
    if len({lora_a.shape for lora_a in lora_as}) > 1:
        return f"lora_a must have one shape, got {', '.join(str(tuple(lora_a.shape)) for lora_a in lora_as)}"
    if not all(tensor.is_contiguous() for tensor in (*weights, *lora_as)):
        return "weights and lora_a must be contiguous"
    return None


def forms(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan, needs: Sequence[bool] | None = None
) -> tuple[str, ...]:
    """The forms of this call, the rule's first: "fused", "two" and "split" launches, some with "narrow" tiles.

    Where base products are large, the rule leaves them to the library: by published figures Triton's reach 65 to 97 %
    of its speed, and by our cost model the forms break even at 92 to 99 %.
    """
    if needs is not None and not needs[0]:
        return ("two",)  # no product with the weight
    weight, lora_a = weights[0], lora_as[0]
    F, D = weight.shape if needs is None else weight.shape[::-1]
    call, columns = Call(_rows(x), lora_a, plan), F if needs is None else weight.shape[1]
    own = ["two", "two-narrow"] if call.has_narrow(columns, D) else ["two"]
    # dropout of dx would need a second sum, of what it is for
    one = len(weights) == 1 and (needs is None or not plan.dropout)
    if one and _fused_grid(call, x, weight, plan, needs):
        own.insert(0, "fused")
        if call.expand_tile(columns, D).BLOCK_F == 256:
            own.insert(1, "fused-narrow")
    large = call.T > _FEW_ROWS and min(D, F) >= _LARGE
    return ("split", *own) if large else (*own, "split")


def _fused_grid(call: Call, x: Tensor, weight: Tensor, plan: Plan, needs: Sequence[bool] | None) -> bool:
    """Whether one launch could do it."""
    if needs is None:
        return call.fused_grid(_rows(x), weight, weight.shape[0], plan.dropout) is not None
    # dy is as autograd makes it: contiguous and aligned
    dy = torch.empty(call.T, weight.shape[0], dtype=x.dtype, device="meta")
    return call.fused_grid(dy, weight, weight.shape[1], 0.0) is not None


def _descriptive(dy: Tensor) -> bool:
    """Whether dy, which no choice has seen, can have a tensor map."""
    rows = _rows(dy)
    return rows.stride(0) >= rows.shape[1] and not (rows.stride(0) * rows.itemsize % 16 or rows.data_ptr() % 16)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    plan: Plan,
    form: str = "two",
) -> tuple[list[Tensor], list[Tensor]]:
    """y [..., F] and h [T, K·R] of each member."""
    rows = _rows(x)
    with on(x.device):
        call, route = prepared("forward " + form, rows, lora_as[0], plan, [*weights, *biases, *lora_as, *lora_bs])
        ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
        if form.startswith("fused"):
            F = weights[0].shape[0]
            grid = call.kept("grid", call.fused_grid, rows, weights[0], F, plan.dropout)
            loras = (lora_as[0], lora_bs[0])
            return ys, [call.fused("fused", rows, weights[0].t(), biases[0], loras, ys[0], grid, route, dropout=True)]
        hs = call.shrink("shrink", rows, lora_as, route, dropout=True)
        for m, (weight, bias, b, h, y) in enumerate(zip(weights, biases, lora_bs, hs, ys, strict=True)):
            if form == "split":
                call.ranks(f"ranks {m}", bias, [b], [h], y, route, dropout=False)
                y.view(-1, y.shape[-1]).addmm_(rows, weight.t())
            else:
                call.expand(f"expand {m}", [rows], [weight.t()], bias, [b], [h], y, route, dropout=False)
    return ys, hs


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hs: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
    form: str = "two",
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """dx, dA and dB of each member, dgates; None where `needs` (of x, the gates, each A, each B) says so."""
    members = len(weights)
    need_dx, need_dgates, need_das, need_dbs = needs[0], needs[1], needs[2 : 2 + members], needs[2 + members :]
    if form.startswith("fused") and (plan.dropout or not _descriptive(dys[0])):
        form = "two"
    rows, drows = _rows(x), [_rows(dy) for dy in dys]
    dx = dgates = None
    das: list[Tensor | None] = [None] * members
    dbs: list[Tensor | None] = [None] * members
    with on(x.device):
        tensors = [*drows, *weights, *lora_as, *lora_bs, *hs]
        call, route = prepared(f"backward {form}", rows, lora_as[0], plan, tensors)
        for m in range(members):
            if need_dbs[m]:
                (dbs[m],) = call.expert_grads(f"db {m}", [hs[m]], drows[m], [lora_bs[m]], route, transposed=False)
        if need_dx or need_dgates or any(need_das):
            if need_dx:
                dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            downs, ups = ([lora.transpose(1, 2) for lora in loras] for loras in (lora_as, lora_bs))
            grid = None
            if form.startswith("fused") and dx is not None:
                grid = call.kept("grid", call.fused_grid, drows[0], weights[0], weights[0].shape[1], 0.0)
            if grid and dx is not None:
                loras = (ups[0], downs[0])
                dss = [call.fused("fused", drows[0], weights[0], None, loras, dx, grid, route, dropout=False)]
            else:
                pairs = enumerate(zip(drows, ups, strict=True))
                dss = [call.shrink(f"ds {m}", dy, [up], route, dropout=False)[0] for m, (dy, up) in pairs]
            if need_dgates:
                dgates, *others = [
                    call.gate_grad(f"dgates {m}", ds, h, route) for m, (ds, h) in enumerate(zip(dss, hs, strict=True))
                ]
                for other in others:
                    dgates += other
            if dx is not None and not grid:
                _write_dx(call, route, form, drows, weights, downs, dss, dx)
            if any(need_das):
                grads = call.expert_grads("da", dss, rows, lora_as, route, transposed=True)
                das = [da if need else None for da, need in zip(grads, need_das, strict=True)]
    return dx, das, dbs, dgates


def _write_dx(
    call: Call,
    route: Route,
    form: str,
    drows: Sequence[Tensor],
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    dss: Sequence[Tensor],
    dx: Tensor,
) -> None:
    """dx of all members' dy, W, A transposed and ds."""
    if form == "split":
        call.ranks("ranks", None, downs, dss, dx, route, dropout=True)
        for dy, weight in zip(drows, weights, strict=True):
            dx.view(-1, dx.shape[-1]).addmm_(dy, weight)
    else:
        call.expand("expand", drows, weights, None, downs, dss, dx, route, dropout=True)


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
