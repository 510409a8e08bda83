"""The Triton backend: NVIDIA and AMD GPUs; float16, bfloat16 and float32 with float32 sums.

    shrink   h = drop(x) A                               one read of x, [T, K·R] written
    expand   y = x Wᵀ + bias + (s g h) B                 one kernel, the low-rank part one step more of its sum over D
    backward ds = dy Bᵀ, dx = dy W + drop((s g ds) Aᵀ)   the same two kernels on the transposed tensors
             dA_e = Σ drop(x)ᵀ (s g ds), dB_e = Σ (s g h)ᵀ dy, dg = s Σ <ds, h>

The kernels are in `triton_kernels.py`; here are their shapes. triton is imported at the first call that needs it.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lora.dropout import keep_scale, threshold
from moe_lora.routing import Plan

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_RANK = 256


def unavailable() -> str | None:
    """Why this backend cannot run on this machine."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton.runtime import driver

    # `_active` is what a launch uses; asking for `active` looks for devices anew each time that there is none
    return None if _interpreted() or driver._active is not None else _why_no_gpu()


def refuses(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> str | None:
    """Why this backend cannot run this call."""
    device = _device(x.device)
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
    call = _Call(x.reshape(-1, x.shape[-1]), lora_a, plan)
    tile = call.expand_tile(*weight.shape)
    return call.form, f"{call.why}; tiles of {tile.BLOCK_T} x {tile.BLOCK_F} x {tile.BLOCK_D}"


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """y [..., F] and h [T, K·R], both in x's dtype, for x [..., D]."""
    rows = _rows(x)
    call = _Call(rows, lora_a, plan)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    with _on(x.device):
        h = call.shrink(rows, lora_a, dropout=True)
        call.expand(rows, weight.t(), bias, lora_b, h, y, dropout=False)
    return y, h


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, h: Tensor, plan: Plan, needs: list[bool]
) -> list[Tensor | None]:
    """dx, dA, dB and dgates, each in its tensor's dtype, or None where `needs` says so."""
    need_dx, need_da, need_db, need_dgates = needs
    rows, drows = _rows(x), _rows(dy)
    call = _Call(rows, lora_a, plan)
    dx = da = db = dgates = None
    with _on(x.device):
        if need_db:
            db = call.expert_grad(h, drows, lora_b, transposed=False)
        if need_dx or need_da or need_dgates:
            ds = call.shrink(drows, lora_b.transpose(1, 2), dropout=False)
            if need_dgates:
                dgates = call.gate_grad(ds, h)
            if need_dx:
                dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                call.expand(drows, weight, None, lora_a.transpose(1, 2), ds, dx, dropout=True)
            if need_da:
                da = call.expert_grad(ds, rows, lora_a, transposed=True)
    return [dx, da, db, dgates]


@dataclass(frozen=True)
class _Device:
    """What the tile sizes depend on; type None is any device."""

    type: str | None
    backend: str
    capability: int
    shared: int
    processors: int


@dataclass(frozen=True)
class _Tile:
    BLOCK_T: int
    BLOCK_F: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


class _Grid(NamedTuple):
    """Programs of a shrink (tiles of rows) or of an expert gradient (blocks of columns), and their block sizes."""

    programs: int
    groups: int
    splits: int
    C: int
    BLOCK_T: int
    BLOCK_D: int


@cache
def _kernels() -> ModuleType:
    from moe_lora import triton_kernels

    return triton_kernels


def _interpreted() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


@cache
def _why_no_gpu() -> str | None:
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except RuntimeError as error:
        return f"triton finds no GPU: {error}"
    return None


def _device(device: torch.device) -> _Device:
    from triton.runtime import driver

    if _interpreted():
        return _Device(None, "interpreter", 80, 1 << 30, 1)
    active: Any = driver.active
    with _on(device):
        return _properties(active, active.get_current_device())


@cache
def _properties(active: Any, index: int) -> _Device:
    target, properties = active.get_current_target(), active.utils.get_device_properties(index)
    return _Device(
        active.get_active_torch_device().type,
        target.backend,
        target.arch if isinstance(target.arch, int) else 80,  # AMD's are names; all that triton knows have bfloat16
        properties["max_shared_mem"],
        properties["multiprocessor_count"],
    )


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The next that is not smaller."""
    return 1 << (n - 1).bit_length()


class _Call:
    """One call's sizes and routing, and the launches of its kernels."""

    def __init__(self, rows: Tensor, lora_a: Tensor, plan: Plan, device: _Device | None = None):
        self.T, self.D = rows.shape
        self.N, self.K = plan.experts.shape
        self.E, _, self.R = lora_a.shape
        self.plan, self.dtype, self.device = plan, rows.dtype, device or _device(rows.device)
        self.packed = plan.offsets is not None
        self.L = self.T // max(self.N, 1)
        self.rank = max(16, _power_of_2(self.R))
        # columns of rank space that a program works on at a time
        self.columns = max(self.rank, min(self._half_or(128, 64), _power_of_2(self.E) * self.rank))
        self.step = max(self.rank, 32)  # of the expand: more at a time would spill beside the accumulators
        self.scale = plan.scale * keep_scale(plan.dropout)
        self.experts, self.gates = plan.experts.contiguous(), plan.gates.contiguous()
        self.offsets = plan.offsets.contiguous() if plan.offsets is not None else self.experts
        self.form, self.why = self._form(lora_a.shape[1])
        self.instance = self.form == "instance"

    def _form(self, D: int) -> tuple[str, str]:
        """Whether whole tiles for each instance, or all experts for each tile, wastes less tensor-core work."""
        block = self._block_t()
        tiles = self.T / block + self.N / 2 if self.packed else self.N * _cdiv(self.L, block)
        padding = max(tiles / max(_cdiv(self.T, block), 1) - 1, 0.0)
        unused = (self.E - self.K) * self.rank / D
        share = f"rows {padding:.1%} more, all experts {unused:.1%} more work"
        return ("instance" if padding <= unused else "masked"), f"tiles of one instance cost {share}"

    def _block_t(self) -> int:
        return min(128, max(16, _power_of_2(self.T)))

    def expand_tile(self, F: int, D: int) -> _Tile:
        """Of the kernel that writes F columns from sums over D."""
        block_t, half = self._block_t(), self.dtype != torch.float32
        if block_t <= 32:
            return self._staged(_Tile(block_t, 32, 128 if half else 64, 4, 5))
        if not half:
            return self._staged(_Tile(min(block_t, 64), 64, 16, 4 if self.device.backend == "cuda" else 8, 2))
        if not self._hopper():
            return self._staged(_Tile(block_t, 128, 64, 8, 3))
        wide = block_t == 128 and 128 * 256 * self.device.processors <= self.T * F and self.device.shared > 1 << 17
        return self._staged(_Tile(block_t, 256 if wide else 128, 64, 8, 4))

    def _staged(self, tile: _Tile) -> _Tile:
        """With no more stages than fit in shared memory."""
        stage = (tile.BLOCK_T + tile.BLOCK_F) * tile.BLOCK_D * self.dtype.itemsize
        stages = 2 if self.device.backend == "hip" else max(1, min(tile.num_stages, self.device.shared // stage))
        return _Tile(tile.BLOCK_T, tile.BLOCK_F, tile.BLOCK_D, tile.num_warps, stages)

    def shrink(self, x: Tensor, lora: Tensor, dropout: bool) -> Tensor:
        """h [T, K·R] of x [T, D] and lora [E, D, R], or ds of dy and B transposed."""
        h = x.new_empty(self.T, self.K * self.R)
        if not h.numel():
            return h
        D = x.shape[1]
        grid = self.shrink_grid(D)
        out = h if grid.splits == 1 else x.new_empty(grid.splits, *h.shape, dtype=torch.float32)
        _kernels().shrink_kernel[grid[:3]](
            x, lora, out, self.experts, self.offsets, *self._seed(dropout),
            self.T, self.N, self.L, self.N.bit_length(), D, self.E, grid.splits,
            x.stride(0), lora.stride(0), lora.stride(2), lora.stride(1),
            C=grid.C, INSTANCE=self.instance, EVEN_D=D % grid.BLOCK_D == 0, PRECISION=self._precision(),
            **self._sizes(), **self._dropout(dropout, D), BLOCK_T=grid.BLOCK_T, BLOCK_D=grid.BLOCK_D,
            num_warps=8 if grid.C > 64 and grid.BLOCK_T == 64 else 4, num_stages=self._stages(self._half_or(3, 2)),
        )  # fmt: skip
        return h if grid.splits == 1 else self._summed(out, h)

    def shrink_grid(self, D: int) -> _Grid:
        slots = self.K if self.instance else self.E
        columns = min(self.columns, _power_of_2(slots) * self.rank)
        wide = self._hopper() and columns <= 64
        block_t, block_d = min(self._half_or(64, 32), self._block_t()), self._half_or(128 if wide else 64, 16)
        tiles, groups = self.tiles(block_t), _cdiv(slots * self.rank, columns)
        splits = max(1, min(self.device.processors // (tiles * groups), D // (4 * block_d)))
        return _Grid(tiles, groups, splits, columns, block_t, block_d)

    def expand(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, lora: Tensor, h: Tensor, y: Tensor, dropout: bool
    ) -> None:
        """Writes y [T, F] of x [T, D], weight [D, F], lora [E, R, F] and h; or dx of dy, W, A transposed and ds."""
        D, F = weight.shape
        if not y.numel():
            return
        tile = self.expand_tile(F, D)
        tiles, groups = self.tiles(tile.BLOCK_T), _cdiv((self.K if self.instance else self.E) * self.rank, self.step)
        _kernels().expand_kernel[(tiles * _cdiv(F, tile.BLOCK_F),)](
            x, weight, bias if bias is not None else x, lora, h, y, self.experts, self.gates, self.offsets,
            *self._seed(dropout), self.scale,
            self.T, self.N, self.L, self.N.bit_length(), D, F, self.E, tiles, groups,
            x.stride(0), weight.stride(0), weight.stride(1), lora.stride(0), lora.stride(1), lora.stride(2),
            C=self.step, INSTANCE=self.instance, BIAS=bias is not None, EVEN_D=D % tile.BLOCK_D == 0,
            PRECISION=self._precision(), **self._sizes(), **self._dropout(dropout, F), BAND=8, **vars(tile),
        )  # fmt: skip

    def expert_grad(self, h: Tensor, x: Tensor, lora: Tensor, transposed: bool) -> Tensor:
        """dB like lora [E, R, D] of h and dy; transposed, dA like lora [E, D, R] of ds and x."""
        D = x.shape[1]
        grad = torch.empty(lora.shape, dtype=lora.dtype, device=lora.device)
        grid = self.grad_grid(D)
        out = grad if grid.splits == 1 else x.new_empty(grid.splits, *grad.shape, dtype=torch.float32)
        stride_e, stride_r, stride_d = grad.stride(0), *grad.stride()[1:][:: -1 if transposed else 1]
        _kernels().expert_grad_kernel[grid[:3]](
            h, x, out, self.experts, self.gates, self.offsets, *self._seed(transposed), self.scale,
            self.T, self.N, self.L, self.N.bit_length(), D, self.E, grid.splits,
            x.stride(0), stride_e, stride_r, stride_d,
            C=grid.C, INSTANCE=self.instance, PRECISION=self._precision(),
            **self._sizes(), **self._dropout(transposed, D), BLOCK_T=grid.BLOCK_T, BLOCK_D=grid.BLOCK_D,
            num_warps=4 if self.dtype != torch.float32 and not self._hopper() and self.device.backend == "cuda" else 8,
            num_stages=self._stages(4 if self._hopper() else 3), **self._registers(),
        )  # fmt: skip
        return grad if grid.splits == 1 else self._summed(out, grad)

    def grad_grid(self, D: int) -> _Grid:
        block_t, block_d = self._half_or(64 if self._hopper() else 32, 32), self._half_or(64, 32)
        blocks, groups = _cdiv(D, block_d), _cdiv(self.E * self.rank, self.columns)
        longest = self.L if self.instance and not self.packed else self.T
        splits = max(1, min(self.device.processors // (blocks * groups), longest // (4 * block_t)))
        return _Grid(blocks, groups, splits, self.columns, block_t, block_d)

    def gate_grad(self, ds: Tensor, h: Tensor) -> Tensor:
        dgates = torch.empty(self.gates.shape, dtype=self.gates.dtype, device=self.gates.device)
        # no tile smaller than its threads: they would load the same bytes twice
        block_t = max(_cdiv(128, self.rank), min(_power_of_2(self.L), 8192 // self.rank))
        if self.N:
            _kernels().gate_grad_kernel[(self.N, self.K)](
                ds, h, dgates, self.offsets, self.scale, self.L,
                **self._sizes(), BLOCK_T=block_t, num_warps=4,
            )  # fmt: skip
        return dgates

    def tiles(self, block_t: int) -> int:
        """Of rows, no table needed: packed ones as `_rows` in triton_kernels.py counts them."""
        if not self.instance:
            return _cdiv(self.T, block_t)
        return self.T // block_t + self.N if self.packed else self.N * _cdiv(self.L, block_t)

    def _summed(self, parts: Tensor, out: Tensor) -> Tensor:
        block = 1024
        _kernels().sum_kernel[(_cdiv(out.numel(), block),)](parts, out, out.numel(), parts.shape[0], BLOCK=block)
        return out

    def _hopper(self) -> bool:
        """Shared memory and registers for the bytes in flight that this bandwidth needs."""
        return self.device.backend == "cuda" and self.device.capability >= 90

    def _registers(self) -> dict[str, int]:
        """For Blackwell, where ptxas would keep to 64 and spill."""
        blackwell = self._hopper() and self.device.capability >= 100
        return {"maxnreg": 160} if blackwell and self.dtype != torch.float32 else {}

    def _half_or(self, half: int, single: int) -> int:
        return single if self.dtype == torch.float32 else half

    def _sizes(self) -> dict[str, int | bool]:
        return {"K": self.K, "R": self.R, "RANK": self.rank, "PACKED": self.packed}

    def _seed(self, dropout: bool) -> tuple[Tensor | int, int]:
        """Seed and threshold; a seed on the CPU goes as a number, without a copy to the device."""
        seed = self.plan.seed
        if seed is None or not dropout:
            return 0, 0
        return (int(seed.item()) if seed.device.type == "cpu" else seed), threshold(self.plan.dropout)

    def _dropout(self, dropout: bool, D: int) -> dict[str, bool]:
        dropout = dropout and self.plan.dropout > 0
        return {"DROPOUT": dropout, "PAIRED": D % 2 == 0, "WIDE": dropout and self.T * D > 2**33}

    def _precision(self) -> str:
        exact = torch.get_float32_matmul_precision() == "highest" or self.device.backend == "hip"
        return "ieee" if exact else "tf32"

    def _stages(self, stages: int) -> int:
        return min(stages, 2) if self.device.backend == "hip" else stages
