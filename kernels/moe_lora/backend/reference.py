"""The plain PyTorch backend: any device, any dtype, and the oracle that every backend is measured against.

    h_t = drop(x_t) A_e  for the K experts e of t's instance                              [T, K·R], kept for backward
    y_t = x_t Wᵀ + bias + Σ_k s g_k h_{t,k} B_e
    ds = dy Bᵀ,  dg_k = s Σ_t <ds_{t,k}, h_{t,k}>,  dh_{t,k} = s g_k ds_{t,k}
    dx = dy W + drop(dh Aᵀ),  dA_e = Σ drop(x)ᵀ dh,  dB_e = Σ (s g h)ᵀ dy

The rank-space products have three forms: `_Gather`, `_Concat` and `_Loop`; `forms` lists them, the cheaper by its rule
first. All are deterministic on every device. h is saved without gates and scale: folded in, the gate gradient would
need a division by a gate that may be 0. The 1 / (1 - p) of dropout is part of s. A NaN in one instance stays in that
instance's rows and in its experts' gradients, a NaN in an expert with the instances that use it: `_Concat` multiplies
unused experts by zero, so where its results are not finite they are computed anew by a form that does not.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.backend.triton import backend as triton
from moe_lora.backend.triton.launch import dropped
from moe_lora.dropout import keep_mask, keep_scale
from moe_lora.routing import Plan

# Up to here a call is bound by overheads and by copies of parameters, not by work.
_FEW_ROWS = 16
# What copying costs, in rows of GEMM of one expert: A and B of one pick of one instance; all A once (CPU, measured).
_COPIES_FEW, _COPIES_FORWARD, _COPIES_BACKWARD = (7, 20), (28, 28), (150, 150)
# The loop: of each row of each pick a copy in and a sum out; of each expert some calls (CPU, measured).
_LOOP_ROW, _LOOP_EXPERT = 2.5, 40
_FAR = 4  # a form that the rule takes for so many times dearer than the cheapest is not worth timing

FORMS = ("gather", "concat", "loop")

Group = Sequence[Tensor]


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    return None


def refuses(x: Tensor, weights: Group, lora_as: Group, plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    return "it runs one linear at a time" if len(weights) > 1 else None


def forms(x: Tensor, weights: Group, lora_as: Group, plan: Plan, needs: Sequence[bool] | None = None) -> list[str]:
    """The forms that may run this call, that of the rule first."""
    costs = _costs(x, lora_as[0], plan, needs is not None)
    return [name for name, cost in costs.items() if cost <= _FAR * min(costs.values())]


def describe(x: Tensor, weights: Group, lora_as: Group, plan: Plan, form: str) -> tuple[str, str]:
    """The form that would run, and why."""
    T, (N, K), E = x.shape[:-1].numel(), plan.experts.shape, lora_as[0].shape[0]
    packed = " (packed: each row an instance)" if plan.offsets is not None else ""
    back = next(iter(_costs(x, lora_as[0], plan, True)))
    why = f"for T = {T}, N = {N}{packed}, K = {K}, E = {E}"
    return form, why if back == form else f"{why}; backward by its rule {back}"


def _costs(x: Tensor, lora_a: Tensor, plan: Plan, backward: bool) -> dict[str, float]:
    """Rows of GEMM of one expert, with what is copied, that each form takes for; the cheapest first."""
    T, (N, K), E = x.shape[:-1].numel(), plan.experts.shape, lora_a.shape[0]
    N = T if plan.offsets is not None else N
    pick, every = _COPIES_BACKWARD if backward else _COPIES_FEW if T <= _FEW_ROWS else _COPIES_FORWARD
    costs: dict[str, float] = {"gather": K * (T + pick * N), "concat": E * (T + every)}
    if x.device.type == "cpu":  # it reads the routing on the host
        costs["loop"] = _LOOP_ROW * K * T + _LOOP_EXPERT * min(E, N * K)
    elif x.is_cuda and torch.cuda.is_current_stream_capturing():
        del costs["concat"]  # it asks on the host whether its results are finite
    return dict(sorted(costs.items(), key=lambda item: item[1]))


def forward(
    x: Tensor,
    weights: Group,
    biases: Sequence[Tensor | None],
    lora_as: Group,
    lora_bs: Group,
    plan: Plan,
    form: str = "",
) -> tuple[list[Tensor], list[Tensor]]:
    """y [..., F] and h [T, K·R], both in x's dtype, for x [..., D] and a group of one."""
    (weight,), (bias,), (lora_a,), (lora_b,) = weights, biases, lora_as, lora_bs
    form = form or forms(x, weights, lora_as, plan)[0]
    rows = x.reshape(-1, x.shape[-1])
    y, shape = F.linear(rows, weight, bias), (*x.shape[:-1], weight.shape[0])
    if not rows.shape[0]:
        return [y.view(shape)], [x.new_empty(0, plan.experts.shape[1] * lora_a.shape[2])]
    if plan.dropout:
        rows = _dropped(rows, plan)
    products = _products(form, rows, lora_a, plan)
    h = products.shrink(rows, lora_a)
    products.expand_onto(y, products.fold(h), lora_b)
    if form == "concat" and not (_finite(h) and _finite(min(y, lora_b, key=Tensor.numel))):
        return forward(x, weights, biases, lora_as, lora_bs, plan, _apart(x))
    return [y.view(shape)], [h.to(x.dtype)]


def backward(
    dys: Group,
    x: Tensor,
    weights: Group,
    lora_as: Group,
    lora_bs: Group,
    hs: Group,
    plan: Plan,
    needs: Sequence[bool],
    form: str = "",
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """dx, [dA], [dB] and dgates of a group of one, each in its tensor's dtype, or None where `needs` says so."""
    (dy,), (weight,), (lora_a,), (lora_b,), (h,) = dys, weights, lora_as, lora_bs, hs
    need_dx, need_dgates, need_da, need_db = needs
    if not h.shape[0]:
        inputs = ((x, need_dx), (lora_a, need_da), (lora_b, need_db), (plan.gates, need_dgates))
        dx, da, db, dgates = (torch.zeros_like(tensor) if need else None for tensor, need in inputs)
        return dx, [da], [db], dgates
    form = form or forms(x, weights, lora_as, plan, needs)[0]
    dy, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    # without a kernel for it, one mask for dx and dA; with one, each makes its own, which is one pass
    kernel = plan.dropout and triton.drops(rows)
    keep = _keep(rows, plan) if plan.dropout and not kernel and (need_dx or need_da) else None
    products = _products(form, rows, lora_a, plan)
    dx = da = db = dgates = None
    if need_db:
        db = products.db(products.fold(h), dy, lora_b)
    if need_dx or need_da or need_dgates:
        ds = products.shrink_dy(dy, lora_b)
        if need_dgates:
            dgates = products.dgates(ds, h, plan)
        if need_dx or need_da:
            dh = products.fold(ds)
        if need_dx:
            dx = products.expand_dh(dh, lora_a).to(x.dtype)
            dx = dropped(dx, plan, in_place=True) if kernel else dx if keep is None else dx.mul_(keep)
            dx = dx.addmm_(dy, weight).view(x.shape)
        if need_da:
            rows = dropped(rows, plan) if kernel else rows if keep is None else rows * keep
            da = products.da(rows, dh, lora_a)
    if form == "concat" and not all(_finite(tensor) for tensor in (da, db, lora_a) if tensor is not None):
        return backward(dys, x, weights, lora_as, lora_bs, hs, plan, needs, _apart(x))
    return dx, [da], [db], dgates


def _products(form: str, rows: Tensor, lora_a: Tensor, plan: Plan) -> "_Gather | _Concat | _Loop":
    if form not in _FORMS:
        raise ValueError(f"form must be one of {', '.join(_FORMS)}, got {form!r}")
    return _FORMS[form](rows, lora_a, plan)


def _finite(tensor: Tensor) -> bool:
    """Whether the sum of the elements is finite, hence all of them."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=wide).item())


def _apart(x: Tensor) -> str:
    """The form that touches no expert which an instance does not use."""
    return "loop" if x.device.type == "cpu" else "gather"


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    plan: Plan,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The equation row by row, all in one dtype and under PyTorch's own autograd; slow, to compare with.

    In float64 it is the truth; in a backend's dtype it is the error that PyTorch itself makes there.
    """
    rows = x.reshape(-1, x.shape[-1])
    scale = plan.scale * keep_scale(plan.dropout)
    dropped = (rows * _keep(rows, plan) if plan.dropout else rows).to(dtype)
    rows, weight, lora_a, lora_b = rows.to(dtype), weight.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    N, T = plan.experts.shape[0], rows.shape[0]
    ends = [(i + 1) * T // N for i in range(N)] if plan.offsets is None else plan.offsets.tolist()[1:]
    out, i = [], 0
    for t in range(T):
        while t >= ends[i]:
            i += 1
        y = weight @ rows[t] if bias is None else weight @ rows[t] + bias.to(dtype)
        for k, e in enumerate(plan.experts[i].tolist()):
            y = y + scale * plan.gates[i, k].to(dtype) * (dropped[t] @ lora_a[e] @ lora_b[e])
        out.append(y)
    y = torch.stack(out) if out else rows @ weight.t()
    return y.view(*x.shape[:-1], weight.shape[0])


def _dropped(rows: Tensor, plan: Plan) -> Tensor:
    """Rows where dropout keeps them, else 0; by one kernel where there is one."""
    return dropped(rows, plan) if triton.drops(rows) else rows * _keep(rows, plan)


def _keep(rows: Tensor, plan: Plan) -> Tensor:
    assert plan.seed is not None, "dropout needs a seed"
    return keep_mask(plan.seed, rows, plan.dropout)


class _Products:
    """What both forms share: N equal runs of T rows, and gates·s spread over the rank.

    Computed in x's dtype; few rows in float32 at least, which the overheads of a GEMM in bf16 would not repay.
    """

    def __init__(self, rows: Tensor, lora_a: Tensor, plan: Plan):
        self.T, self.dtype = rows.shape[0], rows.dtype
        if self.T <= _FEW_ROWS:
            self.dtype = torch.promote_types(rows.dtype, torch.float32)
        self.E, _, self.R = lora_a.shape
        self.experts, gates = plan.experts, plan.gates
        if plan.offsets is not None:  # every row becomes its own instance
            row = torch.arange(self.T, dtype=torch.int32, device=rows.device)
            instance = torch.searchsorted(plan.offsets[1:], row, right=True)
            self.experts, gates = self.experts[instance], gates[instance]
        self.N, self.K = self.experts.shape
        self.scale = plan.scale * keep_scale(plan.dropout)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.gates = gates.to(wide) * self.scale  # [N, K]

    def scaled(self, h: Tensor, gates: Tensor) -> Tensor:
        """gates [N, K] times h or ds [T, K·R]."""
        gates = gates.repeat_interleave(self.R, 1)[:, None]  # [N, 1, K·R]
        return (h.view(self.N, -1, self.K * self.R) * gates).to(self.dtype).view(self.T, -1)

    def dgates(self, ds: Tensor, h: Tensor, plan: Plan) -> Tensor:
        product = (ds.to(self.gates.dtype) * h).view(self.N, -1, self.K * self.R).sum(1)
        dgates = product.view(self.N, self.K, self.R).sum(-1) * self.scale
        if plan.offsets is not None:
            dgates = torch.segment_reduce(dgates, "sum", offsets=plan.offsets.long(), unsafe=True)
        return dgates.to(plan.gates.dtype)


class _Gather(_Products):
    """A and B of each instance's K experts copied to [N, D, K·R] and [N, K·R, F], then one bmm per product.

    T·K·R work per feature, but N·K·R copied.
    """

    def __init__(self, rows: Tensor, lora_a: Tensor, plan: Plan):
        super().__init__(rows, lora_a, plan)
        self.flat = self.experts.flatten()
        self.select_first = self.flat.numel() < self.E

    def shrink(self, rows: Tensor, lora_a: Tensor) -> Tensor:
        if self.T <= _FEW_ROWS:  # bringing A into one block per instance would cost more than repeating the rows
            a = lora_a.index_select(0, self.flat).to(self.dtype)  # [N·K, D, R]
            h = torch.bmm(self.runs(rows).repeat_interleave(self.K, 0), a)
            return h.view(self.N, self.K, -1, self.R).transpose(1, 2).reshape(self.T, -1)
        return torch.bmm(self.runs(rows), self.gather_a(lora_a)).view(self.T, -1)

    def shrink_dy(self, dy: Tensor, lora_b: Tensor) -> Tensor:
        return torch.bmm(self.runs(dy), self.gather_b(lora_b).transpose(1, 2)).view(self.T, -1)

    def fold(self, h: Tensor) -> Tensor:
        return self.scaled(h, self.gates)

    def expand_onto(self, y: Tensor, s: Tensor, lora_b: Tensor) -> None:
        y, s, b = y.view(self.N, -1, y.shape[-1]), self.runs(s), self.gather_b(lora_b)
        y.baddbmm_(s, b) if y.dtype == self.dtype else y.add_(torch.bmm(s, b))

    def expand_dh(self, dh: Tensor, lora_a: Tensor) -> Tensor:
        return torch.bmm(self.runs(dh), self.gather_a(lora_a).transpose(1, 2)).view(self.T, -1)

    def da(self, rows: Tensor, dh: Tensor, lora_a: Tensor) -> Tensor:
        pairs = torch.bmm(self.runs(rows).transpose(1, 2), self.runs(dh))  # [N, D, K·R]
        return self.grouped(pairs.view(self.N, -1, self.K, self.R).transpose(1, 2), lora_a)

    def db(self, s: Tensor, dy: Tensor, lora_b: Tensor) -> Tensor:
        pairs = torch.bmm(self.runs(s).transpose(1, 2), self.runs(dy))  # [N, K·R, F]
        return self.grouped(pairs.view(self.N, self.K, self.R, -1), lora_b)

    def gather_a(self, lora_a: Tensor) -> Tensor:
        if self.select_first:
            a = _side_by_side(lora_a.index_select(0, self.flat), self.dtype)
        else:
            a = _side_by_side(lora_a, self.dtype).index_select(1, self.flat)
        return a.view(-1, self.N, self.K * self.R).transpose(0, 1)  # from [D, N·K, R]

    def gather_b(self, lora_b: Tensor) -> Tensor:
        if self.select_first:
            b = lora_b.index_select(0, self.flat).to(self.dtype)
        else:
            b = lora_b.to(self.dtype).index_select(0, self.flat)
        return b.view(self.N, self.K * self.R, -1)

    def grouped(self, pairs: Tensor, like: Tensor) -> Tensor:
        """Sum of [N, K, *, *] over the pairs of each expert."""
        wide = torch.empty(pairs.shape, dtype=self.gates.dtype, device=pairs.device).copy_(pairs)
        wide = wide.view(-1, *like.shape[1:])
        out = torch.zeros(like.shape, dtype=wide.dtype, device=wide.device)
        if out.device.type == "cpu":
            out.index_add_(0, self.flat, wide)
        else:  # sorts first; index_add_ would add by atomics, in any order
            out.index_put_((self.flat,), wide, accumulate=True)
        return out.to(like.dtype)

    def runs(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype).view(self.N, -1, rows.shape[-1])


class _Concat(_Products):
    """One GEMM with all E experts' A, of which K are picked; one with all B stacked, on zeros and the picked.

    No copy per instance, but T·E·R work per feature.
    """

    def __init__(self, rows: Tensor, lora_a: Tensor, plan: Plan):
        super().__init__(rows, lora_a, plan)
        # an expert picked twice by one instance has one place among E: both picks carry the sum of their gates there
        same = self.experts[:, :, None] == self.experts[:, None]  # [N, K, K]
        self.total = (same * self.gates[:, None]).sum(-1)
        row = torch.arange(self.T, device=rows.device).view(self.N, -1, 1)
        self.places = (row * self.E + self.experts[:, None]).flatten()  # of [T, K] in [T·E]

    def shrink(self, rows: Tensor, lora_a: Tensor) -> Tensor:
        rows = rows.to(self.dtype)
        if self.T <= _FEW_ROWS:  # a copy of A would cost more than reading the rows E times
            h = torch.bmm(rows.expand(self.E, -1, -1), lora_a.to(self.dtype)).transpose(0, 1)
        else:
            h = rows @ self.all_a(lora_a)
        return self.pick(h)

    def shrink_dy(self, dy: Tensor, lora_b: Tensor) -> Tensor:
        return self.pick(dy.to(self.dtype) @ self.all_b(lora_b).t())

    def fold(self, h: Tensor) -> Tensor:
        s = self.scaled(h, self.total).view(-1, self.R)
        return s.new_zeros(self.T * self.E, self.R).index_copy_(0, self.places, s).view(self.T, -1)

    def pick(self, h: Tensor) -> Tensor:
        """[T, K·R] of [T, E·R]."""
        return h.reshape(-1, self.R).index_select(0, self.places).view(self.T, -1)

    def expand_onto(self, y: Tensor, s: Tensor, lora_b: Tensor) -> None:
        b = self.all_b(lora_b)
        y.addmm_(s, b) if y.dtype == self.dtype else y.add_(s @ b)

    def expand_dh(self, dh: Tensor, lora_a: Tensor) -> Tensor:
        return dh @ self.all_a(lora_a).t()

    def da(self, rows: Tensor, dh: Tensor, lora_a: Tensor) -> Tensor:
        pairs = (dh.t() @ rows.to(self.dtype)).view(self.E, self.R, -1).transpose(1, 2)
        return torch.empty(lora_a.shape, dtype=lora_a.dtype, device=rows.device).copy_(pairs)

    def db(self, s: Tensor, dy: Tensor, lora_b: Tensor) -> Tensor:
        return (s.t() @ dy.to(self.dtype)).view(lora_b.shape).to(lora_b.dtype)

    def all_a(self, lora_a: Tensor) -> Tensor:
        return _side_by_side(lora_a, self.dtype).view(-1, self.E * self.R)

    def all_b(self, lora_b: Tensor) -> Tensor:
        return lora_b.to(self.dtype).reshape(self.E * self.R, -1)


class _Loop(_Products):
    """Expert by expert, the rows that use it copied out and its part summed in.

    T·K·R work per feature and no copy of an expert, but a copy of every row for each of its picks.
    """

    def __init__(self, rows: Tensor, lora_a: Tensor, plan: Plan):
        super().__init__(rows, lora_a, plan)
        picks = self.experts.long().repeat_interleave(self.T // max(self.N, 1), 0).flatten()  # [T·K]
        self.order = picks.argsort(stable=True)
        self.rows_of = self.order // self.K
        ends = picks.bincount(minlength=self.E).cumsum(0).tolist()
        runs = zip(range(self.E), [0, *ends[:-1]], ends, strict=True)
        self.runs_of = [(expert, start, end) for expert, start, end in runs if start < end]

    def by_expert(self, tensor: Tensor) -> Tensor:
        """[T, K·R] as [T·K, R] in the order of the experts."""
        return tensor.reshape(-1, self.R).index_select(0, self.order)

    def by_row(self, parts: list[Tensor]) -> Tensor:
        """Back again, to [T, K·R]."""
        flat = torch.cat(parts)
        return torch.empty_like(flat).index_copy_(0, self.order, flat).view(self.T, -1)

    def shrink(self, rows: Tensor, lora_a: Tensor) -> Tensor:
        return self.by_row([self.picked(rows, *run) @ lora_a[expert].to(self.dtype) for expert, *run in self.runs_of])

    def shrink_dy(self, dy: Tensor, lora_b: Tensor) -> Tensor:
        return self.by_row([self.picked(dy, *run) @ lora_b[expert].to(self.dtype).t() for expert, *run in self.runs_of])

    def fold(self, h: Tensor) -> Tensor:
        return self.scaled(h, self.gates)

    def expand_onto(self, y: Tensor, s: Tensor, lora_b: Tensor) -> None:
        s = self.by_expert(s)
        for expert, start, end in self.runs_of:
            part = s[start:end] @ lora_b[expert].to(self.dtype)
            y.index_add_(0, self.rows_of[start:end], part.to(y.dtype))

    def expand_dh(self, dh: Tensor, lora_a: Tensor) -> Tensor:
        out, dh = dh.new_zeros(self.T, lora_a.shape[1]), self.by_expert(dh)
        for expert, start, end in self.runs_of:
            out.index_add_(0, self.rows_of[start:end], dh[start:end] @ lora_a[expert].to(self.dtype).t())
        return out

    def da(self, rows: Tensor, dh: Tensor, lora_a: Tensor) -> Tensor:
        out, dh = torch.zeros_like(lora_a, memory_format=torch.contiguous_format), self.by_expert(dh)
        for expert, start, end in self.runs_of:
            out[expert] = self.picked(rows, start, end).t() @ dh[start:end]
        return out

    def db(self, s: Tensor, dy: Tensor, lora_b: Tensor) -> Tensor:
        out, s = torch.zeros_like(lora_b, memory_format=torch.contiguous_format), self.by_expert(s)
        for expert, start, end in self.runs_of:
            out[expert] = s[start:end].t() @ self.picked(dy, start, end)
        return out

    def picked(self, rows: Tensor, start: int, end: int) -> Tensor:
        return rows.index_select(0, self.rows_of[start:end]).to(self.dtype)


_FORMS = {"gather": _Gather, "concat": _Concat, "loop": _Loop}


def _side_by_side(lora_a: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, D, R] as [D, E, R] in the given dtype, in one copy."""
    E, D, R = lora_a.shape
    return torch.empty(D, E, R, dtype=dtype, device=lora_a.device).copy_(lora_a.permute(1, 0, 2))
