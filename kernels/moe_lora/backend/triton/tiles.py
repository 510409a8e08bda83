"""How the Triton kernels divide a call: for its sizes and a device the tiles, grids, warps and stages."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_FUSED_COLUMNS = 128  # largest K·R of the fused kernel; break-even with another read of x: 230 on an H100 (data sheet)
_SPARE = 1024  # bytes of shared memory that kernels take beside what is counted here


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
    """Tile of `fused`, and how many tiles of each row of tiles shrink, each for C columns of the rank space."""

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


class Sizes(NamedTuple):
    """Rows, instances, experts of a row, experts, rank, features that A reads; whether there are offsets."""

    T: int
    N: int
    K: int
    E: int
    R: int
    D: int
    packed: bool


class Tiling:
    """One call's division into tiles; `narrow` takes smaller ones where there is a choice."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: Device, narrow: bool = False):
        self.T, self.N, self.K, self.E, self.R, self.D, self.packed = sizes
        self.dtype, self.device, self.narrow = dtype, device, narrow
        self.L = self.T // max(self.N, 1)
        self.rank = max(16, power_of_2(self.R))
        # columns of rank space that a program works on at a time
        self.columns = max(self.rank, min(self._half_or(128, 64), power_of_2(self.E) * self.rank))
        self.form, self.why = self._form(self.D)
        self.instance = self.form == "instance"
        # of the expand, whole experts where rows have their own; more at a time would spill beside the accumulators
        self.step = 32 if self.instance else max(self.rank, 32)

    def _form(self, D: int) -> tuple[str, str]:
        """Whether whole tiles for each instance, or all experts for each tile, wastes less tensor-core work."""
        block = self._block_t()
        tiles = self.T / block + self.N / 2 if self.packed else self.N * cdiv(self.L, block)
        padding = max(tiles / max(cdiv(self.T, block), 1) - 1, 0.0)
        unused = (self.E - self.K) * self.rank / D
        share = f"rows {padding:.1%} more, all experts {unused:.1%} more work"
        return ("instance" if padding <= unused else "masked"), f"tiles of one instance cost {share}"

    def _block_t(self) -> int:
        return min(128, max(16, power_of_2(self.T)))

    def expand_tile(self, F: int, D: int, members: int = 1) -> Tile:
        """Tile of the kernel that writes F columns from sums over D."""
        block_t, half = self._block_t(), self.dtype != torch.float32
        if block_t <= 32:
            return self._staged(Tile(block_t, 32, 128 if half else 64, 4, 5))
        if not half:
            return self._staged(Tile(min(block_t, 64), 64, 16, 4 if self.device.backend == "cuda" else 8, 2))
        if not self._hopper():
            narrow = self.narrow or (members > 1 and self.device.backend == "hip")  # the wide one spills on gfx1100
            return self._staged(Tile(block_t, 64 if narrow else 128, 64, 8, 3))
        wide = block_t == 128 and 128 * 256 * self.device.processors <= self.T * F and self.device.shared > 1 << 17
        return self._staged(Tile(block_t, 256 if wide and not self.narrow else 128, 64, 8, 4))

    def has_narrow(self, F: int, D: int) -> bool:
        """Whether there is a smaller tile of the expand to try."""
        tile, block_t = self.expand_tile(F, D), self._block_t()
        return tile.BLOCK_F == 256 or (block_t == 128 and tile.BLOCK_F == 128 and not self._hopper())

    def _staged(self, tile: Tile) -> Tile:
        stage = (tile.BLOCK_T + tile.BLOCK_F) * tile.BLOCK_D * self.dtype.itemsize
        return replace(tile, num_stages=self._fitting(tile.num_stages, stage))

    def _fitting(self, most: int, stage: int, beside: int = 0) -> int:
        """No more stages, of so many bytes each, than fit in shared memory."""
        if self.device.backend == "hip":  # which keeps one stage in registers
            return max(1, min(most, 2, self.device.shared // stage + 1))
        return max(1, min(most, (self.device.shared - _SPARE - beside) // stage))

    def rank_tile(self) -> Tile:
        """Tile of the kernel that writes the low-rank part alone: its bytes count, not its products."""
        block_t = min(64, self._block_t())
        return Tile(block_t, 128 if self.dtype != torch.float32 else 64, 0, 4, 1)

    def shrink_grid(self, D: int, members: int = 1) -> Grid:
        slots = self.K if self.instance else self.E
        most = self._narrow() if members > 1 and self._ampere() else self.columns
        columns = min(most, power_of_2(slots) * self.rank)
        wide = self._hopper() and columns <= 64
        block_t, block_d = min(self._half_or(64, 32), self._block_t()), self._half_or(128 if wide else 64, 16)
        if members > 1:  # more loads and sums at a time
            block_d = self._half_or(64 if wide else 32, 16)
        tiles, groups = self.tiles(block_t), cdiv(slots * self.rank, columns)
        splits = max(1, min(self.device.processors // (tiles * groups), D // (4 * block_d)))
        return Grid(tiles, groups, splits, columns, block_t, block_d)

    def shrink_options(self, grid: Grid, members: int, lora_size: int) -> dict[str, int]:
        """Warps and stages; `lora_size` is the bytes of a number of A, which is copied as it is, then rounded."""
        warps = 8 if grid.BLOCK_T == 64 and (grid.C > 64 or self.wide(grid.C, members)) else 4
        size = self.dtype.itemsize
        stage = grid.BLOCK_D * (grid.BLOCK_T * size + grid.C * members * lora_size)
        beside = grid.BLOCK_D * (grid.BLOCK_T + grid.C) * size
        stages = self._fitting(self._half_or(3, 2), stage, beside)
        if self.device.backend == "hip" and members > 1:  # both stages in shared memory
            stages = max(1, min(stages, self.device.shared // stage))
        return {"num_warps": warps, "num_stages": stages, **(self.registers() if self._consumer() else {})}

    def grad_grid(self, D: int, members: int = 1) -> Grid:
        block_t, block_d = self._half_or(64 if self._hopper() else 32, 32), self._half_or(64, 32)
        columns = self._narrow(32 if self._consumer() else 64) if members > 1 and not self._hopper() else self.columns
        blocks, groups = cdiv(D, block_d), cdiv(self.E * self.rank, columns)
        longest = self.L if self.instance and not self.packed else self.T
        splits = max(1, min(self.device.processors // (blocks * groups), longest // (4 * block_t)))
        return Grid(blocks, groups, splits, columns, block_t, block_d)

    def grad_options(self, grid: Grid, members: int) -> dict[str, int]:
        """Warps, stages and registers."""
        warps = 4 if self._ampere() and not self.wide(grid.C, members) else 8
        size = self.dtype.itemsize
        stage = grid.BLOCK_T * (grid.BLOCK_D + grid.C * members) * size
        beside = grid.BLOCK_T * (grid.BLOCK_D + grid.C) * size
        stages = self._fitting(2 if members > 1 else 4 if self._hopper() else 3, stage, beside)
        return {"num_warps": warps, "num_stages": stages, **self.registers(members)}

    def gate_rows(self) -> int:
        """Rows at a time of the gates' gradient; no tile smaller than its threads, which would load bytes twice."""
        return max(cdiv(128, self.rank), min(power_of_2(self.L), 8192 // self.rank))

    def fused_grid(self, x: Tensor, weight: Tensor, F: int, dropout: float) -> FusedGrid | None:
        """How one launch can make F columns of y, and h, of x and weight (either way round); None if two should.

        It needs rows that start at multiples of 16 bytes, for tensor maps, and saves a read of x for work of the tensor
        cores: with more columns than these that would take longer. Of x's dropout only Blackwell has the registers.
        """
        half = self.dtype != torch.float32 and self.instance and self._block_t() == 128
        masked = dropout and not self._blackwell()
        columns = self.K * self.rank
        if not half or masked or not self._hopper() or columns > _FUSED_COLUMNS:
            return None
        for tensor in (x, weight):
            if tensor.stride(1) != 1 or tensor.stride(0) < tensor.shape[1]:
                return None
            if tensor.stride(0) * tensor.itemsize % 16 or tensor.data_ptr() % 16:
                return None
        tile, P = self.expand_tile(F, x.shape[1]), self.device.processors
        if (C := _part(columns, cdiv(F, tile.BLOCK_F), P)) > 32 and tile.BLOCK_F > 128:  # no registers for both
            tile = replace(tile, BLOCK_F=128)
            C = _part(columns, cdiv(F, tile.BLOCK_F), P)
        stage = (tile.BLOCK_T + tile.BLOCK_F) * tile.BLOCK_D * self.dtype.itemsize
        part = tile.BLOCK_D * C * (3 * 4 + 2)  # of A in float32, as it is loaded, and in half precision
        stages = min(tile.num_stages, (self.device.shared - part - _SPARE) // stage)
        if stages < 3:
            return None
        tile, tiles = replace(tile, num_stages=stages), self.tiles(tile.BLOCK_T) * cdiv(F, tile.BLOCK_F)
        return FusedGrid(tile, C, cdiv(columns, C), min(P, tiles))

    def tiles(self, block_t: int) -> int:
        """Tiles of rows, no table needed: packed ones as `_rows` in kernels.py counts them."""
        if not self.instance:
            return cdiv(self.T, block_t)
        return self.T // block_t + self.N if self.packed else self.N * cdiv(self.L, block_t)

    def groups(self) -> int:
        """Steps over the rank space when expanding."""
        return cdiv((self.K if self.instance else self.E) * self.rank, self.step)

    def wide(self, columns: int, members: int) -> bool:
        """Whether the sums of a group's 64 rows take eight warps. Ampere's then make all products twice, so not there
        if four have the registers.
        """
        return members > 1 and (columns * members > 192 or not self._ampere())

    def registers(self, members: int = 1) -> dict[str, int]:
        """Where ptxas would keep to fewer and spill: Blackwell, 12.x, and a group's gradients on Ampere."""
        if self._consumer():
            return {"maxnreg": 255}
        if self.dtype == torch.float32:
            return {}
        if self._blackwell():
            return {"maxnreg": 160}
        return {"maxnreg": 255} if members > 1 and self._ampere() else {}

    def _hopper(self) -> bool:
        """Shared memory and registers for the bytes in flight that this bandwidth needs; 12.x has those of Ada."""
        return self.device.backend == "cuda" and 90 <= self.device.capability < 120

    def _blackwell(self) -> bool:
        """Sums in tensor memory, not in registers; 12.x, of the same name, has none."""
        return self._hopper() and self.device.capability >= 100

    def _consumer(self) -> bool:
        """12.x: Ampere's way to feed tensor cores, and a ptxas that prefers occupancy to registers."""
        return self.device.backend == "cuda" and self.device.capability >= 120

    def _ampere(self) -> bool:
        """Tensor cores that each warp feeds by itself."""
        return self.device.backend == "cuda" and not self._hopper() and self.dtype != torch.float32

    def _narrow(self, most: int = 64) -> int:
        """Columns at a time of a group's members, where the registers have no room for the sums of more."""
        return max(self.rank, min(self.columns, most))

    def _half_or(self, half: int, single: int) -> int:
        return single if self.dtype == torch.float32 else half


def _part(columns: int, tiles: int, processors: int) -> int:
    """Columns of each part of a rank space, the fewest whose parts are no more than the tiles, and begin together."""
    sizes = (size for size in (16, 32, 64) if (parts := cdiv(columns, size)) <= tiles and processors % parts == 0)
    return next(sizes, power_of_2(columns))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next that is not smaller."""
    return 1 << (n - 1).bit_length()
