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

_INTERFACE = 1  # MOE_LORA_INTERFACE in moe_lora.h
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in moe_lora.h

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


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    if _C is None:
        return _MISSING
    return None if _C.instructions() else "the processor has none of the instruction sets of moe_lora._C"


def refuses(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in _CODES:
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
    few = _few_rows(x, weights, plan)
    call = _Call(x, weights, biases or [None] * len(weights), lora_as, lora_bs, plan, few)
    ys = [torch.empty((call.T, weight.shape[0]), dtype=call.dtype) for weight in weights]
    width = plan.experts.shape[1] * lora_as[0].shape[2]
    hs = [torch.empty((call.T, width), dtype=call.dtype) for _ in weights]
    if call.T:
        _C.forward(*call.arguments, _C.FEW_ROWS if few else _C.TILES, _pointers(ys), _pointers(hs))
    if call.dtype != x.dtype:
        ys, hs = [y.to(x.dtype) for y in ys], [h.to(x.dtype) for h in hs]
    if x.dim() != 2:
        ys = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
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
    parameters = [*lora_as, *lora_bs]
    if x.numel() == 0:
        inputs = (x, plan.gates, *parameters)
        dx, dgates, *rest = (_zeros(tensor) if need else None for tensor, need in zip(inputs, needs, strict=True))
        return dx, rest[:members], rest[members:], dgates
    call = _Call(x, weights, [None] * members, lora_as, lora_bs, plan, False)
    drows, kept = [_rows(dy, call.dtype) for dy in dys], [h.to(call.dtype).contiguous() for h in hs]
    dx = torch.empty((call.T, x.shape[-1]), dtype=call.dtype) if needs[0] else None
    dgates = torch.empty(plan.gates.shape, dtype=torch.float64) if needs[1] else None
    most = min(lora_as[0].shape[0], plan.experts.numel())  # experts that can be in use
    sums = [
        torch.empty((most, *parameter.shape[1:]), dtype=torch.float32) if need else None
        for parameter, need in zip(parameters, needs[2:], strict=True)
    ]
    dy_pointers = tuple((rows.data_ptr(), rows.stride(0)) for rows in drows)
    das, dbs = _pointers(sums[:members]), _pointers(sums[members:])
    _C.backward(*call.arguments, dy_pointers, _pointers(kept), _pointers([dx, dgates]), das, dbs)
    used = _C.used(call.routing) if any(needs[2:]) else []
    grads = [_spread(sum, parameter, used) for sum, parameter in zip(sums, parameters, strict=True)]
    if dx is not None:
        dx = dx.to(x.dtype).view(x.shape)
    return dx, grads[:members], grads[members:], None if dgates is None else dgates.to(plan.gates.dtype)


def threads() -> int:
    """How many threads the kernels' loops run on, counted."""
    return _C.threads(torch.get_num_threads())


class _Call:
    """The arguments of the C interface (`csrc/cpu/moe_lora.h`), and the tensors that they point to."""

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        lora_as: Sequence[Tensor],
        lora_bs: Sequence[Tensor],
        plan: Plan,
        few: bool,
    ):
        (E, D, R), (N, K) = lora_as[0].shape, plan.experts.shape
        self.dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and _C.has_bf16() else torch.float32
        rows = _rows(x, self.dtype)
        self.T = rows.shape[0]
        gates = plan.gates if plan.gates.dtype == torch.float32 else plan.gates.float()
        offsets = None if plan.offsets is None else plan.offsets.contiguous()
        self.kept: list[Tensor | None] = [rows, gates, offsets]
        pointer = 0 if offsets is None else offsets.data_ptr()
        self.routing = (plan.experts.data_ptr(), *plan.experts.stride(), pointer, N, K, E, self.T)
        members = []
        for weight, bias, lora_a, lora_b in zip(weights, biases, lora_as, lora_bs, strict=True):
            if 1 not in weight.stride():
                weight = weight.contiguous()
            if bias is not None:
                bias = bias.to(self.dtype).contiguous()
            self.kept += (weight, bias)
            base = (weight.shape[0], weight.data_ptr(), *weight.stride(), _CODES[weight.dtype])
            pointer = 0 if bias is None else bias.data_ptr()
            members.append((*base, pointer, *self._experts(lora_a, few), *self._experts(lora_b, few)))
        seed = 0
        if plan.dropout:
            assert plan.seed is not None, "dropout needs a seed"
            seed = int(plan.seed)
        first = (_CODES[self.dtype], torch.get_num_threads(), rows.data_ptr(), rows.stride(0), D, R)
        gate_rows = (gates.data_ptr(), *gates.stride())
        self.arguments = (first, tuple(members), self.routing, gate_rows, plan.scale, plan.dropout, seed)

    def _experts(self, parameter: Tensor, last_adjacent: bool) -> tuple[int, ...]:
        """The parameter where it lies, or a copy of the experts in use if its layout or dtype has no kernel."""
        code, (_, rows, columns) = _CODES.get(parameter.dtype), parameter.stride()
        in_place = code is not None and (columns == 1 or (rows == 1 and not last_adjacent))
        if not in_place:
            used = torch.tensor(_C.used(self.routing) if self.T else [])
            parameter = parameter.index_select(0, used.long())
            parameter = parameter.to(torch.float32 if code is None else parameter.dtype).contiguous()
            self.kept.append(parameter)
        return parameter.data_ptr(), *parameter.stride(), _CODES[parameter.dtype], not in_place


def _few_rows(x: Tensor, weights: Sequence[Tensor], plan: Plan) -> bool:
    """Whether the forward reads the weights once, where they lie."""
    return x.shape[:-1].numel() <= _C.few_rows and not plan.dropout and all(w.stride(1) == 1 for w in weights)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] as rows [T, D] with adjacent elements."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)


def _pointers(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _spread(sums: Tensor | None, parameter: Tensor, used: list[int]) -> Tensor | None:
    """The gradient of a parameter from the sums [used, ...] of its experts in use."""
    if sums is None:
        return None
    if len(used) == parameter.shape[0]:
        return sums.to(parameter.dtype)
    return _zeros(parameter).index_copy_(0, torch.tensor(used), sums[: len(used)].to(parameter.dtype))
