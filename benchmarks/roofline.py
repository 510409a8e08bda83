"""What the Triton kernels cost, and the times that predicts on GPUs: operations and bytes against data-sheet figures.

Nothing is measured here. Each launch takes the longer of its tensor-core operations and its bytes of device memory,
every tensor moved once, at stated shares of the data sheet's peaks. A launch adds nothing, unless --launch says so.
Tiles with rows of many instances are taken to use all experts.
Operations and the bytes that programs ask for (`requested`, which caches answer in part) are those which the PTX
emulator counts when it runs the compiled kernels: `tests/test_roofline.py` holds both to within 2 %.

Usage: python benchmarks/roofline.py [--launch MICROSECONDS] [--csv FILE] [--plot FILE.png]
"""

import argparse
import csv
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from moe_lora.routing import Plan
from moe_lora.triton_backend import _Call, _Device, _Grid


class Gpu(NamedTuple):
    """Dense bf16 operations and bytes a second, and what the tile sizes depend on."""

    operations: float
    bandwidth: float
    device: _Device


GPUS = {  # data sheets of A100 SXM 80 GB, H100 SXM, B200 (one of a DGX B200), Instinct MI300X
    "A100": Gpu(312e12, 2.039e12, _Device(None, "cuda", 80, 166912, 108)),
    "H100": Gpu(989e12, 3.35e12, _Device(None, "cuda", 90, 232448, 132)),
    "B200": Gpu(2250e12, 8.0e12, _Device(None, "cuda", 100, 232448, 148)),
    "MI300X": Gpu(1307e12, 5.3e12, _Device(None, "hip", 80, 65536, 304)),
}
TENSOR_SHARE, BANDWIDTH_SHARE = 0.7, 0.9  # of the peaks that a good kernel reaches: assumed, alike for base and ours


@dataclass(frozen=True)
class Shape:
    """N instances of L rows; A and B in float32 over a half-precision base."""

    N: int
    L: int
    D: int
    F: int
    E: int = 4
    K: int = 2
    R: int = 32
    dtype: torch.dtype = torch.bfloat16
    master: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.N}x{self.L} {self.D}->{self.F} E{self.E} K{self.K} R{self.R}"


SHAPES = (
    Shape(8, 1024, 4096, 4096),
    Shape(8, 1024, 4096, 11008),
    Shape(8, 1024, 2048, 2048),
    Shape(16, 110, 2048, 2048),
    Shape(8, 1024, 576, 576),
    Shape(64, 1, 4096, 4096),
    Shape(8, 1, 4096, 4096),
    Shape(1, 1, 4096, 4096),
)


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        flops: of the tensor cores, padding included.
        requested: bytes that the programs load or store, by the kernel's argument.
        moved: bytes to and from device memory if every tensor is moved once.
    """

    kernel: str
    flops: int
    requested: dict[str, int]
    moved: int


def launches(shape: Shape, device: _Device, backward: bool) -> list[Launch]:
    """What the forward launches, or the backward with all gradients."""
    call = _call(shape, device)
    D, F, rank_space = shape.D, shape.F, call.T * shape.K * shape.R * shape.dtype.itemsize
    if not backward:
        return [*_shrink(shape, call, D), _expand(shape, call, D, F)]
    gates = Launch("gate_grad_kernel", 0, {"ds_ptr": rank_space, "h_ptr": rank_space}, 2 * rank_space)
    dx = [*_shrink(shape, call, F), gates, _expand(shape, call, F, D)]
    return [*_grad(shape, call, F), *dx, *_grad(shape, call, D)]


def _call(shape: Shape, device: _Device) -> _Call:
    plan = Plan(torch.zeros(shape.N, shape.K, dtype=torch.int32), torch.ones(shape.N, shape.K), None, 1.0, 0.0, None)
    x = torch.empty(shape.N * shape.L, shape.D, dtype=shape.dtype, device="meta")
    return _Call(x, torch.empty(shape.E, shape.D, shape.R, device="meta"), plan, device)


def _shrink(shape: Shape, call: _Call, D: int) -> list[Launch]:
    grid, T, b, m = call.shrink_grid(D), call.T, shape.dtype.itemsize, shape.master.itemsize
    columns = (shape.K if call.instance else shape.E) * shape.R  # that exist
    flops = 2 * grid.programs * grid.groups * grid.BLOCK_T * _up(D, grid.BLOCK_D) * grid.C
    out = T * shape.K * shape.R * (b if grid.splits == 1 else 4 * grid.splits)
    requested = {"x_ptr": T * D * b * grid.groups, "lora_ptr": grid.programs * columns * D * m, "h_ptr": out}
    moved = T * D * b + _experts(shape) * D * shape.R * m + out
    first = Launch("shrink_kernel", flops, requested, moved)
    return [first, *_sum(T * shape.K * shape.R, grid, b)]


def _expand(shape: Shape, call: _Call, D: int, F: int) -> Launch:
    tile, T, b, m = call.expand_tile(F, D), call.T, shape.dtype.itemsize, shape.master.itemsize
    slots = shape.K if call.instance else shape.E
    rows, columns = call.tiles(tile.BLOCK_T), -(-F // tile.BLOCK_F)
    work = _up(D, tile.BLOCK_D) + _up(slots * call.rank, call.step)
    rank_space = T * shape.K * shape.R * b
    requested = {
        "x_ptr": T * D * b * columns,
        "weight_ptr": D * F * b * rows,
        "lora_ptr": rows * slots * shape.R * F * m,
        "h_ptr": rank_space * columns,
        "y_ptr": T * F * b,
    }
    moved = (T * D + D * F + T * F) * b + rank_space + _experts(shape) * shape.R * F * m
    return Launch("expand_kernel", 2 * rows * tile.BLOCK_T * columns * tile.BLOCK_F * work, requested, moved)


def _grad(shape: Shape, call: _Call, D: int) -> list[Launch]:
    grid, T, b, m = call.grad_grid(D), call.T, shape.dtype.itemsize, shape.master.itemsize
    if call.instance:
        tiles = sum(
            -(-min(_up(-(-shape.L // grid.splits), grid.BLOCK_T), rest) // grid.BLOCK_T) for rest in _parts(shape, grid)
        )
        tiles *= shape.N * min(grid.groups, shape.K)
    else:
        tiles = -(-T // grid.BLOCK_T) * grid.groups
    size = shape.E * shape.R * D
    requested = {
        "h_ptr": T * shape.K * shape.R * b * grid.programs,
        "x_ptr": T * D * b * (min(grid.groups, shape.K) if call.instance else grid.groups),
        "out_ptr": size * (m if grid.splits == 1 else 4 * grid.splits),
    }
    moved = T * D * b + T * shape.K * shape.R * b + requested["out_ptr"]
    flops = 2 * grid.programs * grid.BLOCK_D * tiles * grid.BLOCK_T * grid.C
    return [Launch("expert_grad_kernel", flops, requested, moved), *_sum(size, grid, m)]


def _parts(shape: Shape, grid: _Grid) -> list[int]:
    """Rows of an instance that are left for each split and those after it."""
    part = _up(-(-shape.L // grid.splits), grid.BLOCK_T)
    return [max(shape.L - split * part, 0) for split in range(grid.splits)]


def _sum(count: int, grid: _Grid, size: int) -> list[Launch]:
    if grid.splits == 1:
        return []
    requested = {"parts_ptr": 4 * count * grid.splits, "out_ptr": count * size}
    return [Launch("sum_kernel", 0, requested, sum(requested.values()))]


def _experts(shape: Shape) -> int:
    return min(shape.E, shape.N * shape.K)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def microseconds(flops: float, moved: float, gpu: Gpu) -> float:
    return max(flops / gpu.operations / TENSOR_SHARE, moved / gpu.bandwidth / BANDWIDTH_SHARE) * 1e6


def predict(shape: Shape, gpu: Gpu, launch: float = 0.0) -> dict[str, float]:
    """Microseconds of the frozen linear and of ours, forward and forward + backward (base: dx alone), and ratios."""
    T, D, F = shape.N * shape.L, shape.D, shape.F
    base = microseconds(2 * T * D * F, (T * D + D * F + T * F) * shape.dtype.itemsize, gpu) + launch
    forward, backward = (
        sum(microseconds(each.flops, each.moved, gpu) + launch for each in launches(shape, gpu.device, direction))
        for direction in (False, True)
    )
    return {
        "base": base,
        "forward": forward,
        "both": forward + backward,
        "forward_ratio": forward / base,
        "both_ratio": (forward + backward) / (2 * base),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--launch", type=float, default=0.0, help="microseconds that each launch adds")
    parser.add_argument("--csv")
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    table = [
        {"gpu": name, "shape": str(shape), **predict(shape, gpu, arguments.launch)}
        for name, gpu in GPUS.items()
        for shape in SHAPES
    ]
    print(f"predicted, not measured: bf16, launch {arguments.launch} us, {TENSOR_SHARE:.0%} of peak operations and ")
    print(f"{BANDWIDTH_SHARE:.0%} of peak bandwidth; microseconds, then ratios to the frozen linear")
    print(f"{'gpu':<7} {'shape':<32} {'base fwd':>9} {'ours fwd':>9} {'ratio':>6} {'fwd+bwd':>9} {'ratio':>6}")
    for row in table:
        forward = f"{row['base']:>9.1f} {row['forward']:>9.1f} {row['forward_ratio']:>6.2f}"
        print(f"{row['gpu']:<7} {row['shape']:<32} {forward} {row['both']:>9.1f} {row['both_ratio']:>6.2f}")
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    if arguments.plot:
        plot(arguments.plot, arguments.launch)


def plot(path: str, launch: float) -> None:
    """Ratio of forward + backward over the width of a square linear, 8 x 1024 rows."""
    from matplotlib import pyplot

    widths = [256 * i for i in range(1, 33)]
    for name, gpu in GPUS.items():
        ratios = [predict(replace(SHAPES[0], D=width, F=width), gpu, launch)["both_ratio"] for width in widths]
        pyplot.plot(widths, ratios, label=name)
    pyplot.xlabel(f"D = F; predicted, not measured: 8 x 1024 rows, bf16, E 4, K 2, R 32, launch {launch} us")
    pyplot.ylabel("forward + backward over that of the frozen linear")
    pyplot.legend()
    pyplot.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
