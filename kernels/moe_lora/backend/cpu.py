"""The CPU backend: shrink, base and expand in native kernels (`csrc/cpu`), for bf16, fp16 and float32.

    z = drop(x) A_e of the experts e that x's row uses;  h = z,  s = s g z                 [T, K·R], rounded once
    y = s B + x Wᵀ + bias      in the same float32 accumulators, 64 columns of W packed at a time, one rounding
    dx = drop(dh Aᵀ) + dy W,   dA_e = Σ drop(x)ᵀ dh,  dB_e = Σ sᵀ dy over the rows of each expert, in their order

Up to 64 rows without dropout read W once, where it lies. bf16 is multiplied as it is where the processor can, else in
float32, as fp16 always is: weights are converted as they are read, x and y as a whole. Each output element is summed in
one order, whatever the threads.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lora.backend import installation
from moe_lora.routing import Plan

_INTERFACE = 2  # MOE_LORA_INTERFACE in moe_lora.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_C: Any = None
_MISSING: str | None = None
try:
    import moe_lora._C as _C
except ImportError as error:
    _MISSING = installation.missing("moe_lora._C", error)
    if not installation.left_out():
        warnings.warn(
            f"plain PyTorch runs in place of the native CPU kernels: {_MISSING}", RuntimeWarning, stacklevel=2
        )
else:
    if getattr(_C, "INTERFACE", 0) != _INTERFACE:
        _C, _MISSING = None, f"moe_lora._C was built from other sources; {installation.remedy()}"
    else:
        _C.set_dtypes(*_DTYPES, torch.float64, torch.int32)


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    if _C is None:
        return _MISSING
    return None if _C.instructions() else "the processor has none of the instruction sets of moe_lora._C"


def refuses(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if plan.dropout and x.numel() >= 1 << 33:
        return "dropout on 2**33 elements or more"
    if len({(lora_a.shape[0], lora_a.shape[2]) for lora_a in lora_as}) > 1:
        return "the members differ in E or R"
    return None


def describe(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan, form: str) -> tuple[str, str]:
    """The kernel that would run, and why."""
    T, most = x.shape[:-1].numel(), _C.few_rows
    reasons = {
        f"T = {T} > {most}": most < T,
        "dropout": bool(plan.dropout),
        "a weight is transposed": any(weight.stride(1) != 1 for weight in weights),
    }
    against = [reason for reason, holds in reasons.items() if holds]
    name = "tiles" if against else "few_rows"
    return f"{name} ({_C.instructions()})", " and ".join(against) or f"T = {T} <= {most}"


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    plan: Plan,
    form: str = "",
) -> tuple[list[Tensor], list[Tensor]]:
    """y [..., F] and h [T, K·R] of each member."""
    code, dtype = _arithmetic(x)
    rows = _rows(x, dtype, lora_as[0])
    seed = int(plan.seed) if plan.seed is not None else 0
    kernel = _C.FEW_ROWS if _few_rows(x, weights, plan) else _C.TILES
    new, lead, width = rows[0].new_empty, x.shape[:-1], plan.experts.shape[1] * lora_as[0].shape[2]
    ys = [new(*lead, weight.shape[0]) for weight in weights]  # sizes one by one: a tuple takes twice as long
    hs = [new(rows[1], width) for _ in weights]
    if rows[1]:
        first, last = (code, torch.get_num_threads(), rows), (seed, kernel, ys, hs)
        if not _C.forward(*first, weights, biases or None, lora_as, lora_bs, False, plan, *last):
            weights, lora_as, lora_bs, plan = _readable(rows, weights, lora_as, lora_bs, plan)
            ready = [bias if bias is None else bias.to(dtype).contiguous() for bias in biases]
            done = _C.forward(*first, weights, ready or None, lora_as, lora_bs, True, plan, *last)
            assert done, "the kernels must be able to read copies"
    if dtype != x.dtype:
        ys, hs = [y.to(x.dtype) for y in ys], [h.to(x.dtype) for h in hs]
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
    form: str = "",
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """dx, dA and dB of each member, dgates; None where `needs` (of x, the gates, each A, each B) says so."""
    members = len(weights)
    parameters = [*lora_as, *lora_bs]
    if x.numel() == 0:
        inputs = (x, plan.gates, *parameters)
        dx, dgates, *rest = (_zeros(tensor) if need else None for tensor, need in zip(inputs, needs, strict=True))
        return dx, rest[:members], rest[members:], dgates
    code, dtype = _arithmetic(x)
    rows = _rows(x, dtype, lora_as[0])
    seed = int(plan.seed) if plan.seed is not None else 0
    drows = [_rows(dy, dtype, lora_as[0]) for dy in dys]
    kept = [h if h.dtype == dtype and h.is_contiguous() else h.to(dtype).contiguous() for h in hs]
    dx = rows[0].new_empty(*x.shape) if needs[0] else None
    inputs = (plan.gates, *parameters)
    dgates, *grads = (_gradient(tensor) if need else None for tensor, need in zip(inputs, needs[1:], strict=True))
    das, dbs = grads[:members], grads[members:]
    first, last = (code, torch.get_num_threads(), rows), (seed, drows, kept, dx, dgates, das, dbs)
    if not _C.backward(*first, weights, lora_as, lora_bs, False, plan, *last):
        weights, lora_as, lora_bs, plan = _readable(rows, weights, lora_as, lora_bs, plan)
        done = _C.backward(*first, weights, lora_as, lora_bs, True, plan, *last)
        assert done, "the kernels must be able to read copies"
    dx, dgates, *grads = map(_as, (dx, dgates, *das, *dbs), (x, *inputs))
    return dx, grads[:members], grads[members:], dgates


def threads() -> int:
    """How many threads the kernels' loops run on, counted."""
    return _C.threads(torch.get_num_threads())


def _arithmetic(x: Tensor) -> tuple[int, torch.dtype]:
    """The type of rows and results inside the kernels: its code and torch's name."""
    if x.dtype == torch.bfloat16 and _C.has_bf16():
        return _C.BF16, torch.bfloat16
    return _C.FLOAT, torch.float32


def _few_rows(x: Tensor, weights: Sequence[Tensor], plan: Plan) -> bool:
    """Whether the forward reads the weights once, where they lie."""
    if plan.dropout or x.numel() > _C.few_rows * x.shape[-1]:
        return False
    return all(weight.stride()[1] == 1 for weight in weights)


def _rows(x: Tensor, dtype: torch.dtype, lora_a: Tensor) -> tuple[Tensor, int, int, int]:
    """[..., D] as rows of adjacent elements: a tensor that holds them, their number, their distance; and E."""
    D, E = x.shape[-1], lora_a.shape[0]
    if x.dtype == dtype and x.is_contiguous():  # most calls; each operation of torch would take microseconds
        return x, x.numel() // D, D, E
    rows = x.reshape(-1, D).to(dtype)
    if rows.stride(1) != 1 and D != 1:
        rows = rows.contiguous()
    return rows, rows.shape[0], rows.stride(0), E


def _readable(
    rows: tuple[Tensor, int, int, int],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    plan: Plan,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Plan]:
    """Copies for the kernels, where dtype or layout is none of theirs: of the parameters only the experts in use."""
    offsets = None if plan.offsets is None else plan.offsets.contiguous()
    plan = plan._replace(gates=plan.gates.float(), offsets=offsets)
    used = torch.tensor(_C.used(plan, rows[3], rows[1]))
    weights = [weight if 1 in weight.stride() else weight.contiguous() for weight in weights]
    copies = []
    for parameter in (*lora_as, *lora_bs):
        copy = parameter.index_select(0, used)
        copies.append(copy.to(copy.dtype if copy.dtype in _DTYPES else torch.float32).contiguous())
    return weights, copies[: len(lora_as)], copies[len(lora_as) :], plan


def _gradient(like: Tensor) -> Tensor:
    """Memory for a gradient, in its tensor's dtype if the kernels write that."""
    if like.dtype in (torch.float32, torch.bfloat16, torch.float64):
        return like.new_empty(*like.shape)
    return like.new_empty(*like.shape, dtype=torch.float32)


def _as(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return grad if grad is None or grad.dtype == like.dtype else grad.to(like.dtype)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)
