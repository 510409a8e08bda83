"""The launches of the Triton kernels: for a call's sizes and a device, the tiles, the grids and the arguments.

The kernels are in `kernels.py`. triton is imported at the first launch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lora.dropout import keep_scale, threshold
from moe_lora.routing import Plan

_FUSED_COLUMNS = 128  # of the rank space; 230 take an H100 as long as another read of x, by its data sheet


@dataclass(frozen=True)
class Device:
    """What the tile sizes depend on; type None is any device."""

    type: str | None
    backend: str
    capability: int
    shared: int
    processors: int


@dataclass(frozen=True)
class Tile:
    BLOCK_T: int
    BLOCK_F: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


class FusedGrid(NamedTuple):
    """Of `fused`: its tile, and how many tiles of each row of tiles shrink, each for C columns of the rank space."""

    tile: Tile
    C: int
    parts: int
    programs: int


class Grid(NamedTuple):
    """Programs of a shrink (tiles of rows) or of an expert gradient (blocks of columns), and their block sizes."""

    programs: int
    groups: int
    splits: int
    C: int
    BLOCK_T: int
    BLOCK_D: int


class Call:
    """One call's sizes and routing, and the launches of its kernels."""

    def __init__(self, rows: Tensor, lora_a: Tensor, plan: Plan, device: Device | None = None):
        self.T, self.D = rows.shape
        self.N, self.K = plan.experts.shape
        self.E, _, self.R = lora_a.shape
        self.plan, self.dtype, self.device = plan, rows.dtype, device or device_of(rows.device)
        self.packed = plan.offsets is not None
        self.L = self.T // max(self.N, 1)
        self.rank = max(16, _power_of_2(self.R))
        # columns of rank space that a program works on at a time
        self.columns = max(self.rank, min(self._half_or(128, 64), _power_of_2(self.E) * self.rank))
        self.scale = plan.scale * keep_scale(plan.dropout)
        self.experts, self.gates = plan.experts.contiguous(), plan.gates.contiguous()
        self.offsets = plan.offsets.contiguous() if plan.offsets is not None else self.experts
        self.form, self.why = self._form(lora_a.shape[1])
        self.instance = self.form == "instance"
        # of the expand, whole experts where rows have their own; more at a time would spill beside the accumulators
        self.step = 32 if self.instance else max(self.rank, 32)

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

    def expand_tile(self, F: int, D: int, members: int = 1) -> Tile:
        """Of the kernel that writes F columns from sums over D."""
        block_t, half = self._block_t(), self.dtype != torch.float32
        if block_t <= 32:
            return self._staged(Tile(block_t, 32, 128 if half else 64, 4, 5))
        if not half:
            return self._staged(Tile(min(block_t, 64), 64, 16, 4 if self.device.backend == "cuda" else 8, 2))
        if not self._hopper():
            narrow = members > 1 and self.device.backend == "hip"  # the wide one would spill on gfx1100
            return self._staged(Tile(block_t, 64 if narrow else 128, 64, 8, 3))
        wide = block_t == 128 and 128 * 256 * self.device.processors <= self.T * F and self.device.shared > 1 << 17
        return self._staged(Tile(block_t, 256 if wide else 128, 64, 8, 4))

    def _staged(self, tile: Tile) -> Tile:
        """With no more stages than fit in shared memory."""
        stage = (tile.BLOCK_T + tile.BLOCK_F) * tile.BLOCK_D * self.dtype.itemsize
        stages = 2 if self.device.backend == "hip" else max(1, min(tile.num_stages, self.device.shared // stage))
        return Tile(tile.BLOCK_T, tile.BLOCK_F, tile.BLOCK_D, tile.num_warps, stages)

    def shrink(self, x: Tensor, loras: Sequence[Tensor], dropout: bool) -> list[Tensor]:
        """h [T, K·R] of x [T, D] and each lora [E, D, R], or ds of dy and B transposed."""
        hs = [x.new_empty(self.T, self.K * self.R) for _ in loras]
        if not hs[0].numel():
            return hs
        D, lora = x.shape[1], loras[0]
        grid = self.shrink_grid(D, len(loras))
        outs = hs if grid.splits == 1 else [x.new_empty(grid.splits, *h.shape, dtype=torch.float32) for h in hs]
        _kernels().shrink_kernel[grid[:3]](
            x, *_three(loras), *_three(outs), self.experts, self.offsets, *self._seed(dropout),
            self.T, self.N, self.L, self.N.bit_length(), D, self.E, grid.splits,
            x.stride(0), lora.stride(0), lora.stride(2), lora.stride(1),
            C=grid.C, INSTANCE=self.instance, EVEN_D=D % grid.BLOCK_D == 0, PRECISION=self._precision(),
            **self._sizes(), **self._dropout(dropout, D), BLOCK_T=grid.BLOCK_T, BLOCK_D=grid.BLOCK_D,
            num_warps=8 if grid.BLOCK_T == 64 and (grid.C > 64 or self.wide(grid.C, len(loras))) else 4,
            num_stages=self._stages(self._shrink_stages(grid, loras)),
        )  # fmt: skip
        return hs if grid.splits == 1 else [self._summed(out, h) for out, h in zip(outs, hs, strict=True)]

    def _shrink_stages(self, grid: Grid, loras: Sequence[Tensor]) -> int:
        """As many as fit in shared memory, of a group; 3 or 2."""
        most = self._half_or(3, 2)
        if len(loras) == 1:
            return most
        stage = grid.BLOCK_D * (grid.BLOCK_T * self.dtype.itemsize + grid.C * len(loras) * loras[0].itemsize)
        return max(1, min(most, self.device.shared // stage))

    def shrink_grid(self, D: int, members: int = 1) -> Grid:
        slots = self.K if self.instance else self.E
        most = self._narrow() if members > 1 and self._ampere() else self.columns
        columns = min(most, _power_of_2(slots) * self.rank)
        wide = self._hopper() and columns <= 64
        block_t, block_d = min(self._half_or(64, 32), self._block_t()), self._half_or(128 if wide else 64, 16)
        if members > 1:  # more loads and sums at a time
            block_d = self._half_or(64 if wide else 32, 16)
        tiles, groups = self.tiles(block_t), _cdiv(slots * self.rank, columns)
        splits = max(1, min(self.device.processors // (tiles * groups), D // (4 * block_d)))
        return Grid(tiles, groups, splits, columns, block_t, block_d)

    def expand(
        self,
        xs: Sequence[Tensor],
        weights: Sequence[Tensor],
        bias: Tensor | None,
        loras: Sequence[Tensor],
        hs: Sequence[Tensor],
        y: Tensor,
        dropout: bool,
    ) -> None:
        """Writes y [T, F] of x [T, D], weight [D, F], lora [E, R, F] and h; or dx, the sum over dy, W, A transposed and
        ds of each member."""
        Ds, F = [weight.shape[0] for weight in weights], weights[0].shape[1]
        if not y.numel():
            return
        tile, lora = self.expand_tile(F, sum(Ds), len(xs)), loras[0]
        tiles, groups = self.tiles(tile.BLOCK_T), _cdiv((self.K if self.instance else self.E) * self.rank, self.step)
        _kernels().expand_kernel[(tiles * _cdiv(F, tile.BLOCK_F),)](
            *_three(xs), *_three(weights), bias if bias is not None else xs[0], *_three(loras), *_three(hs), y,
            self.experts, self.gates, self.offsets, *self._seed(dropout), self.scale,
            self.T, self.N, self.L, self.N.bit_length(), *_three(Ds), F, self.E, tiles, groups,
            *_three([x.stride(0) for x in xs]), *weights[0].stride(), *lora.stride(),
            MEMBERS=len(xs), C=self.step, INSTANCE=self.instance, BIAS=bias is not None,
            EVEN_D=all(D % tile.BLOCK_D == 0 for D in Ds), PRECISION=self._precision(),
            **self._sizes(), **self._dropout(dropout, F), BAND=8, **vars(tile),
            **(self._registers() if len(xs) > 1 and tile.BLOCK_F < 256 else {}),
        )  # fmt: skip

    def fused_grid(self, x: Tensor, weight: Tensor, F: int, dropout: float) -> FusedGrid | None:
        """How one launch can make F columns of y, and h, of x and weight (either way round); None if two should.

        It needs rows that start at multiples of 16 bytes, for tensor maps, and saves a read of x for work of the tensor
        cores: with more columns than these that would take longer. Of x's dropout only Blackwell has the registers.
        """
        half = self.dtype != torch.float32 and self.instance and self._block_t() == 128
        masked = dropout and not self._blackwell()
        columns = self.K * self.rank
        if not half or masked or not self._hopper() or self.device.capability >= 120 or columns > _FUSED_COLUMNS:
            return None
        for tensor in (x, weight):
            if tensor.stride(1) != 1 or tensor.stride(0) < tensor.shape[1]:
                return None
            if tensor.stride(0) * tensor.itemsize % 16 or tensor.data_ptr() % 16:
                return None
        tile, P = self.expand_tile(F, x.shape[1]), self.device.processors
        if (C := _part(columns, _cdiv(F, tile.BLOCK_F), P)) > 32 and tile.BLOCK_F > 128:  # no registers for both
            tile = replace(tile, BLOCK_F=128)
            C = _part(columns, _cdiv(F, tile.BLOCK_F), P)
        stage = (tile.BLOCK_T + tile.BLOCK_F) * tile.BLOCK_D * self.dtype.itemsize
        part = tile.BLOCK_D * C * (3 * 4 + 2)  # of A in float32, as it is loaded, and in half precision
        stages = min(tile.num_stages, (self.device.shared - part - 1024) // stage)
        if stages < 3:
            return None
        tile, tiles = replace(tile, num_stages=stages), self.tiles(tile.BLOCK_T) * _cdiv(F, tile.BLOCK_F)
        return FusedGrid(tile, C, _cdiv(columns, C), min(P, tiles))

    def fused(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shrink: Tensor,
        lora: Tensor,
        y: Tensor,
        grid: FusedGrid,
        dropout: bool,
    ) -> Tensor:
        """Writes y [T, F] of x [T, D], weight [D, F] and lora [E, R, F]; returns h of x and shrink [E, D, R]."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        h = x.new_empty(self.T, self.K * self.R)
        (D, F), tile, tiles = weight.shape, grid.tile, self.tiles(grid.tile.BLOCK_T)
        rows, transposed = (weight.t(), True) if weight.stride(0) == 1 else (weight, False)
        box = [tile.BLOCK_F, tile.BLOCK_D] if transposed else [tile.BLOCK_D, tile.BLOCK_F]
        ready = torch.zeros(tiles, dtype=torch.int32, device=x.device)
        _kernels().fused_kernel[(grid.programs,)](
            TensorDescriptor.from_tensor(x, [tile.BLOCK_T, tile.BLOCK_D]), TensorDescriptor.from_tensor(rows, box),
            bias if bias is not None else x, shrink, lora, h, y, ready,
            self.experts, self.gates, self.offsets, *self._seed(dropout), self.scale,
            self.T, self.N, self.L, self.N.bit_length(), D, F, self.E, tiles, _cdiv(self.K * self.rank, self.step),
            shrink.stride(0), shrink.stride(2), shrink.stride(1), *lora.stride(),
            C=grid.C, PARTS=grid.parts, STEP=self.step, BIAS=bias is not None,
            TRANSPOSED=transposed, EVEN_D=D % tile.BLOCK_D == 0, PRECISION=self._precision(),
            **self._sizes(), **self._dropout(dropout, D), BAND=8, **vars(tile), launch_cooperative_grid=True,
        )  # fmt: skip
        return h

    def expert_grads(self, hs: Sequence[Tensor], x: Tensor, loras: Sequence[Tensor], transposed: bool) -> list[Tensor]:
        """dB like lora [E, R, D] of h and dy; transposed, dA like lora [E, D, R] of ds and x, of each member."""
        D = x.shape[1]
        grads = [torch.empty(lora.shape, dtype=lora.dtype, device=lora.device) for lora in loras]
        members = len(loras)
        grid = self.grad_grid(D, members)
        outs = grads
        if grid.splits > 1:
            outs = [x.new_empty(grid.splits, *grad.shape, dtype=torch.float32) for grad in grads]
        stride_e, stride_r, stride_d = grads[0].stride(0), *grads[0].stride()[1:][:: -1 if transposed else 1]
        _kernels().expert_grad_kernel[grid[:3]](
            *_three(hs), x, *_three(outs), self.experts, self.gates, self.offsets, *self._seed(transposed), self.scale,
            self.T, self.N, self.L, self.N.bit_length(), D, self.E, grid.splits,
            x.stride(0), stride_e, stride_r, stride_d,
            C=grid.C, INSTANCE=self.instance, PRECISION=self._precision(),
            **self._sizes(), **self._dropout(transposed, D), BLOCK_T=grid.BLOCK_T, BLOCK_D=grid.BLOCK_D,
            num_warps=4 if self._ampere() and not self.wide(grid.C, members) else 8,
            num_stages=self._stages(2 if members > 1 else 4 if self._hopper() else 3), **self._registers(members),
        )  # fmt: skip
        return grads if grid.splits == 1 else [self._summed(out, grad) for out, grad in zip(outs, grads, strict=True)]

    def grad_grid(self, D: int, members: int = 1) -> Grid:
        block_t, block_d = self._half_or(64 if self._hopper() else 32, 32), self._half_or(64, 32)
        columns = self._narrow() if members > 1 and not self._hopper() else self.columns
        blocks, groups = _cdiv(D, block_d), _cdiv(self.E * self.rank, columns)
        longest = self.L if self.instance and not self.packed else self.T
        splits = max(1, min(self.device.processors // (blocks * groups), longest // (4 * block_t)))
        return Grid(blocks, groups, splits, columns, block_t, block_d)

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
        """Of rows, no table needed: packed ones as `_rows` in kernels.py counts them."""
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

    def _blackwell(self) -> bool:
        """Sums in tensor memory, not in registers; 12.0, of the same name, has none."""
        return self._hopper() and 100 <= self.device.capability < 120

    def _ampere(self) -> bool:
        """Tensor cores that each warp feeds by itself."""
        return self.device.backend == "cuda" and not self._hopper() and self.dtype != torch.float32

    def wide(self, columns: int, members: int) -> bool:
        """Whether the sums of a group's 64 rows take eight warps. Ampere's then make all products twice, so not there
        if four have the registers.
        """
        return members > 1 and (columns * members > 192 or not self._ampere())

    def _narrow(self) -> int:
        """Columns at a time of a group's members, where the registers have no room for the sums of more."""
        return max(self.rank, min(self.columns, 64))

    def _registers(self, members: int = 1) -> dict[str, int]:
        """Where ptxas would keep to fewer and spill: Blackwell, and a group's gradients on Ampere."""
        if self.dtype == torch.float32:
            return {}
        if self._blackwell():
            return {"maxnreg": 160}
        return {"maxnreg": 255} if members > 1 and self._ampere() else {}

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


@cache
def _kernels() -> ModuleType:
    from moe_lora.backend.triton import kernels  # imports triton

    return kernels


def interpreted() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


def device_of(device: torch.device) -> Device:
    from triton.runtime import driver

    if interpreted():
        return Device(None, "interpreter", 80, 1 << 30, 1)
    active: Any = driver.active
    with on(device):
        return _properties(active, active.get_current_device())


@cache
def _properties(active: Any, index: int) -> Device:
    target, properties = active.get_current_target(), active.utils.get_device_properties(index)
    return Device(
        active.get_active_torch_device().type,
        target.backend,
        target.arch if isinstance(target.arch, int) else 80,  # AMD's are names; all that triton knows have bfloat16
        properties["max_shared_mem"],
        properties["multiprocessor_count"],
    )


def on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _three(values: Sequence[Any]) -> list[Any]:
    """A launch's arguments for each of three members; None for those that are not."""
    return [*values, None, None][:3]


def _part(columns: int, tiles: int, processors: int) -> int:
    """Columns of each part of a rank space, the fewest whose parts are no more than the tiles, and begin together."""
    sizes = (size for size in (16, 32, 64) if (parts := _cdiv(columns, size)) <= tiles and processors % parts == 0)
    return next(sizes, _power_of_2(columns))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The next that is not smaller."""
    return 1 << (n - 1).bit_length()
