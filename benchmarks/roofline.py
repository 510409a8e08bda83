"""What the GPU kernels cost, and the times that predicts on GPUs: operations and bytes against data-sheet figures.

Nothing is measured here. Each launch takes the longer of its tensor-core operations and its bytes of device memory,
every tensor moved once, at stated shares of the data sheet's peaks. A launch adds nothing, unless --launch says so.
Tiles with rows of many instances are taken to use all experts. The forward of at most 64 rows is the CUDA kernel's or
Triton's, whichever is predicted faster, as the dispatcher would take it.
Operations and the bytes that programs ask for (`requested`, which caches answer in part) are those which the PTX
emulator counts when it runs the compiled kernels: `tests/test_roofline.py` holds both to within 2 %. `roofline_cpu.py`
is the same for the CPU engine, with measured ceilings.

Usage: python benchmarks/roofline.py [--launch MICROSECONDS] [--dropout] [--csv FILE] [--plot FILE.png]
       python benchmarks/roofline.py --launches    what each launch of the first shape adds on an H100
"""

import argparse
import csv
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from moe_lora.backend import cuda
from moe_lora.backend.triton.launch import Call
from moe_lora.backend.triton.tiles import Device, FusedGrid, Grid, Tile
from moe_lora.routing import Plan


class Ceilings(NamedTuple):
    """Operations and bytes a second that kernels reach."""

    operations: float
    bandwidth: float


class Gpu(NamedTuple):
    """Dense bf16 operations and bytes a second, and what the tile sizes depend on."""

    operations: float
    bandwidth: float
    device: Device

    @property
    def reached(self) -> Ceilings:
        return Ceilings(self.operations * TENSOR_SHARE, self.bandwidth * BANDWIDTH_SHARE)


GPUS = {  # data sheets of A100 SXM 80 GB, H100 SXM, B200 (one of a DGX B200), Instinct MI300X
    "A100": Gpu(312e12, 2.039e12, Device(None, "cuda", 80, 166912, 108)),
    "H100": Gpu(989e12, 3.35e12, Device(None, "cuda", 90, 232448, 132)),
    "B200": Gpu(2250e12, 8.0e12, Device(None, "cuda", 100, 232448, 148)),
    "MI300X": Gpu(1307e12, 5.3e12, Device(None, "hip", 80, 65536, 304)),
}
TENSOR_SHARE, BANDWIDTH_SHARE = 0.7, 0.9  # of the peaks that a good kernel reaches: assumed, alike for base and ours


@dataclass(frozen=True)
class Shape:
    """N instances of L rows through `members` linears of one x; A and B in float32 over a half-precision base."""

    N: int
    L: int
    D: int
    F: int
    E: int = 4
    K: int = 2
    R: int = 32
    dtype: torch.dtype = torch.bfloat16
    master: torch.dtype = torch.float32
    members: int = 1

    def __str__(self) -> str:
        times = f" x{self.members}" if self.members > 1 else ""
        lora = "" if self.master == torch.float32 else " A,B " + str(self.master).removeprefix("torch.")
        return f"{self.N}x{self.L} {self.D}->{self.F}{times} E{self.E} K{self.K} R{self.R}{lora}"


SHAPES = (
    Shape(8, 1024, 4096, 4096),
    Shape(8, 1024, 4096, 11008),
    Shape(8, 1024, 2048, 2048),
    Shape(16, 110, 2048, 2048),
    Shape(8, 1024, 576, 576),
    Shape(64, 1, 4096, 4096, master=torch.bfloat16),
    Shape(8, 1, 4096, 4096, master=torch.bfloat16),
    Shape(8, 1, 4096, 4096),
    Shape(1, 1, 4096, 4096, master=torch.bfloat16),
    Shape(8, 1024, 4096, 4096, members=3),
    Shape(8, 1024, 4096, 11008, members=2),
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


def launches(shape: Shape, device: Device, backward: bool, dropout: bool = False, split: bool = False) -> list[Launch]:
    """What the forward launches, or the backward with all gradients; `split` leaves base products to the library."""
    call, members = _call(shape, device), shape.members
    D, F, rank_space = shape.D, shape.F, call.T * shape.K * shape.R * shape.dtype.itemsize
    sizes = ((call.T, D), (call.T, F), (F, D))
    x, dy, weight = (torch.empty(size, dtype=shape.dtype, device="meta") for size in sizes)
    if split and not backward:
        return [*_shrink(shape, call, D, members), *[_ranks(shape, call, F), _product(shape, D, F)] * members]
    if not backward:
        if members == 1 and (grid := call.fused_grid(x, weight, F, float(dropout))):
            return [_fused(shape, call, D, F, grid)]
        return [*_shrink(shape, call, D, members), *[_expand(shape, call, D, F)] * members]
    gates = Launch("gate_grad_kernel", 0, {"ds_ptr": rank_space, "h_ptr": rank_space}, 2 * rank_space)
    if split:
        dx = [*_shrink(shape, call, F) * members, *[gates] * members]
        dx += [_ranks(shape, call, D, members), *[_product(shape, F, D)] * members]
    elif members == 1 and not dropout and (grid := call.fused_grid(dy, weight, D, 0.0)):
        dx = [_fused(shape, call, F, D, grid), gates]
    else:
        dx = [*_shrink(shape, call, F) * members, *[gates] * members, _expand(shape, call, F, D, members)]
    return [*_grad(shape, call, F) * members, *dx, *_grad(shape, call, D, members)]


def _each(name: str, size: int, members: int) -> dict[str, int]:
    """The same bytes by each member's argument: x_ptr, x1_ptr, x2_ptr."""
    return {f"{name}{m or ''}_ptr": size for m in range(members)}


def decode(shape: Shape, blocks: int) -> Launch:
    """The CUDA kernel's one launch on a device that holds so many of its blocks; every expert in use by eight rows."""
    N, L, D, F, E, K, R = (getattr(shape, name) for name in ["N", "L", "D", "F", "E", "K", "R"])
    T, b, m, used = N * L, shape.dtype.itemsize, shape.master.itemsize, _experts(shape)
    call = cuda.divide(0, cuda.Sizes(T, D, F, N, L, E, K, R, D), 1.0, 0, blocks)
    sizes, tiles, few = call.sizes, -(-F // 32), T <= 8
    step = 128 if few else 64  # of D that a warp takes at a time, the block's four along D in turns
    lengths = [min(sizes.span, D - split * sizes.span) for split in range(sizes.splits)]
    turns = sum(-(-max(length - step * deep, 0) // (4 * step)) for length in lengths for deep in range(4))
    rank_space = T * K * R
    requested = {
        "x": T * D * b * (2 * tiles + used),
        "weight": D * F * b,
        "lora_a": used * -(-T // 8) * D * R * m,
        "lora_b": used * R * F * m * sizes.splits,
        "y": T * F * b,
        "h": rank_space * b,
        "parts": 4 * sizes.slabs * rank_space * (1 + tiles) + (8 * sizes.splits * T * F if sizes.splits > 1 else 0),
    }
    moved = (T * D + D * F + T * F + rank_space) * b + used * R * (D + F) * m + 4 * call.workspace
    return Launch("decode", 2 * tiles * 32 * turns * step * 8 * -(-T // 8), requested, moved)


def _call(shape: Shape, device: Device) -> Call:
    plan = Plan(torch.zeros(shape.N, shape.K, dtype=torch.int32), torch.ones(shape.N, shape.K), None, 1.0, 0.0, None)
    x = torch.empty(shape.N * shape.L, shape.D, dtype=shape.dtype, device="meta")
    return Call(x, torch.empty(shape.E, shape.D, shape.R, device="meta"), plan, device)


def _shrink(shape: Shape, call: Call, D: int, members: int = 1) -> list[Launch]:
    grid, T, b, m = call.shrink_grid(D, members), call.T, shape.dtype.itemsize, shape.master.itemsize
    columns = (shape.K if call.instance else shape.E) * shape.R  # that exist
    flops = (
        2
        * _twice(call, grid.BLOCK_T, grid.C, members)
        * members
        * grid.programs
        * grid.groups
        * grid.BLOCK_T
        * _up(D, grid.BLOCK_D)
        * grid.C
    )
    out = T * shape.K * shape.R * (b if grid.splits == 1 else 4 * grid.splits)
    requested = {"x_ptr": T * D * b * grid.groups, **_each("h", out, members)}
    requested |= _each("lora", grid.programs * columns * D * m, members)
    moved = T * D * b + members * (_experts(shape) * D * shape.R * m + out)
    first = Launch("shrink_kernel", flops, requested, moved)
    return [first, *_sum(T * shape.K * shape.R, grid, b) * members]


def _twice(call: Call, rows: int, columns: int, members: int) -> int:
    """2 where two of a group's eight warps, of sixteen rows each, make the same products; wgmma shares them out."""
    return 2 if rows == 64 and call._ampere() and call.wide(columns, members) else 1


def _expand(shape: Shape, call: Call, D: int, F: int, members: int = 1, fused: Tile | None = None) -> Launch:
    tile, T = fused or call.expand_tile(F, D * members, members), call.T
    b, m = shape.dtype.itemsize, shape.master.itemsize
    slots = shape.K if call.instance else shape.E
    rows, columns = call.tiles(tile.BLOCK_T), -(-F // tile.BLOCK_F)
    work = members * (_up(D, tile.BLOCK_D) + _up(slots * call.rank, call.step))
    rank_space = T * shape.K * shape.R * b
    requested = {
        **_each("x", T * D * b * columns, members),
        **_each("weight", D * F * b * rows, members),
        **_each("lora", rows * slots * shape.R * F * m, members),
        **_each("h", rank_space * columns, members),
        "y_ptr": T * F * b,
    }
    moved = T * F * b + members * ((T * D + D * F) * b + rank_space + _experts(shape) * shape.R * F * m)
    return Launch("expand_kernel", 2 * rows * tile.BLOCK_T * columns * tile.BLOCK_F * work, requested, moved)


def _ranks(shape: Shape, call: Call, F: int, members: int = 1) -> Launch:
    """The expand without the base's product."""
    tile, T, b, m = call.rank_tile(), call.T, shape.dtype.itemsize, shape.master.itemsize
    slots, rank_space = shape.K if call.instance else shape.E, T * shape.K * shape.R * b
    rows, columns = call.tiles(tile.BLOCK_T), -(-F // tile.BLOCK_F)
    requested = {
        **_each("lora", rows * slots * shape.R * F * m, members),
        **_each("h", rank_space * columns, members),
        "y_ptr": T * F * b,
    }
    moved = T * F * b + members * (rank_space + _experts(shape) * shape.R * F * m)
    work = members * _up(slots * call.rank, call.step)
    return Launch("ranks_kernel", 2 * rows * tile.BLOCK_T * columns * tile.BLOCK_F * work, requested, moved)


def _product(shape: Shape, D: int, F: int) -> Launch:
    """The library's product, which accumulates: it reads y and writes it."""
    T, b = shape.N * shape.L, shape.dtype.itemsize
    return Launch("library", 2 * T * D * F, {}, (T * D + D * F + 2 * T * F) * b)


def _fused(shape: Shape, call: Call, D: int, F: int, grid: FusedGrid) -> Launch:
    """The expand, and the shrink in its first columns of tiles, without another read of x."""
    tile, expand, m = grid.tile, _expand(shape, call, D, F, fused=grid.tile), shape.master.itemsize
    rows, rank_space = call.tiles(tile.BLOCK_T), call.T * shape.K * shape.R * shape.dtype.itemsize
    columns = grid.parts * grid.C
    asked, firsts = expand.requested, (i * shape.L + t for i in range(shape.N) for t in range(0, shape.L, tile.BLOCK_T))
    loaded = sum(min(tile.BLOCK_T, call.T - first) for first in firsts)  # whole tiles, with rows of the next instance
    requested = {
        "x_desc": asked["x_ptr"] * loaded // call.T,
        "weight_desc": asked["weight_ptr"],
        "y_ptr": asked["y_ptr"],
    }
    requested |= {"lora_ptr": asked["lora_ptr"], "h_ptr": asked["h_ptr"] + rank_space}
    requested |= {"shrink_ptr": rows * shape.K * shape.R * D * m}
    moved = expand.moved + _experts(shape) * D * shape.R * m
    flops = expand.flops + 2 * rows * tile.BLOCK_T * columns * _up(D, tile.BLOCK_D)
    return Launch("fused_kernel", flops, requested, moved)


def _grad(shape: Shape, call: Call, D: int, members: int = 1) -> list[Launch]:
    grid, T, b, m = call.grad_grid(D, members), call.T, shape.dtype.itemsize, shape.master.itemsize
    if call.instance:
        tiles = sum(
            -(-min(_up(-(-shape.L // grid.splits), grid.BLOCK_T), rest) // grid.BLOCK_T) for rest in _parts(shape, grid)
        )
        tiles *= shape.N * min(grid.groups, shape.K)
    else:
        tiles = -(-T // grid.BLOCK_T) * grid.groups
    size = shape.E * shape.R * D
    rank_space, out = T * shape.K * shape.R * b, size * (m if grid.splits == 1 else 4 * grid.splits)
    requested = {
        "x_ptr": T * D * b * (min(grid.groups, shape.K) if call.instance else grid.groups),
        **_each("h", rank_space * grid.programs, members),
        **_each("out", out, members),
    }
    moved = T * D * b + members * (rank_space + out)
    flops = (
        2
        * _twice(call, grid.BLOCK_D, grid.C, members)
        * members
        * grid.programs
        * grid.BLOCK_D
        * tiles
        * grid.BLOCK_T
        * grid.C
    )
    return [Launch("expert_grad_kernel", flops, requested, moved), *_sum(size, grid, m) * members]


def _parts(shape: Shape, grid: Grid) -> list[int]:
    """Rows of an instance that are left for each split and those after it."""
    part = _up(-(-shape.L // grid.splits), grid.BLOCK_T)
    return [max(shape.L - split * part, 0) for split in range(grid.splits)]


def _sum(count: int, grid: Grid, size: int) -> list[Launch]:
    if grid.splits == 1:
        return []
    requested = {"parts_ptr": 4 * count * grid.splits, "out_ptr": count * size}
    return [Launch("sum_kernel", 0, requested, sum(requested.values()))]


def _experts(shape: Shape) -> int:
    return min(shape.E, shape.N * shape.K)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def microseconds(flops: float, moved: float, reached: Ceilings) -> float:
    return max(flops / reached.operations, moved / reached.bandwidth) * 1e6


def seconds(each: Launch, gpu: Gpu, q: float = 1.0) -> float:
    """Microseconds of one launch, if a base product of our own reaches the share q of the library's rate."""
    own = each.kernel in ("expand_kernel", "fused_kernel")
    return microseconds(each.flops / (q if own else 1.0), each.moved, gpu.reached)


def durations(
    shape: Shape, gpu: Gpu, backward: bool, launch: float = 0.0, dropout: bool = False, q: float = 1.0
) -> dict[str, float]:
    """Microseconds of each way to run one direction: "fused" or "two" launches, "split", and "cuda" for few rows."""
    found = {}
    for split in (False, True):
        kernels = launches(shape, gpu.device, backward, dropout, split)
        fused = any(each.kernel == "fused_kernel" for each in kernels)
        form = "split" if split else "fused" if fused else "two"
        found[form] = sum(seconds(each, gpu, q) + launch for each in kernels)
    few = shape.N * shape.L <= 64 and shape.members == 1 and gpu.device.backend == "cuda"
    if few and not dropout and not backward:
        one = decode(shape, 2 * gpu.device.processors)
        found["cuda"] = microseconds(one.flops, one.moved, gpu.reached) + launch
    return found


def predict(shape: Shape, gpu: Gpu, launch: float = 0.0, dropout: bool = False, q: float = 1.0) -> dict[str, Any]:
    """Microseconds of the frozen linears and of ours, forward and forward + backward, each its fastest way, and ratios.

    The base's backward is dx alone; of several members, which autograd adds up one after the other: `both_ratio`.
    `product_ratio` leaves those additions out. `q` as in `seconds`.
    """
    T, D, F, members, size = shape.N * shape.L, shape.D, shape.F, shape.members, shape.dtype.itemsize
    base = microseconds(2 * T * D * F, (T * D + D * F + T * F) * size, gpu.reached) + launch
    additions = (members - 1) * (microseconds(0, 3 * T * D * size, gpu.reached) + launch)
    ways = [durations(shape, gpu, backward, launch, dropout, q) for backward in (False, True)]
    kernels = [min(way, key=way.__getitem__) for way in ways]
    forward, backward = (way[kernel] for way, kernel in zip(ways, kernels, strict=True))
    return {
        "base": members * base,
        "forward_kernel": kernels[0],
        "backward_kernel": kernels[1],
        "forward": forward,
        "both": forward + backward,
        "forward_ratio": forward / (members * base),
        "both_ratio": (forward + backward) / (2 * members * base + additions),
        "product_ratio": (forward + backward) / (2 * members * base),
    }


def break_even(shape: Shape, gpu: Gpu, dropout: bool = False) -> float | None:
    """The least q, in steps of 0.005, from which base products of our own are no slower than the library's."""

    def total(q: float, split: bool) -> float:
        ways = [durations(shape, gpu, backward, 0.0, dropout, q) for backward in (False, True)]
        return sum(min(time for way, time in each.items() if (way == "split") == split) for each in ways)

    shares = [step / 200 for step in range(100, 201)]
    return next((q for q in shares if total(q, False) <= total(q, True)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--launch", type=float, default=0.0, help="microseconds that each launch adds")
    parser.add_argument("--dropout", action="store_true", help="which takes more launches; its masks are free here")
    parser.add_argument("--csv")
    parser.add_argument("--plot")
    parser.add_argument("--launches", action="store_true")
    arguments = parser.parse_args()
    if arguments.launches:
        return print_launches(SHAPES[0], GPUS["H100"])
    table = []
    for name, gpu in GPUS.items():
        for shape in SHAPES:
            row = {"gpu": name, "shape": str(shape), **predict(shape, gpu, arguments.launch, arguments.dropout)}
            for q in (0.9, 0.8):
                found = predict(shape, gpu, arguments.launch, arguments.dropout, q)
                row |= {f"both_ratio_{q}": found["both_ratio"], f"backward_kernel_{q}": found["backward_kernel"]}
            table.append(row | {"break_even": break_even(shape, gpu, arguments.dropout)})
    print(f"predicted, not measured: bf16, launch {arguments.launch} us, {TENSOR_SHARE:.0%} of peak operations and ")
    print(
        f"{BANDWIDTH_SHARE:.0%} of peak bandwidth; microseconds, then ratios to the frozen linears, whose dx autograd"
    )
    print(
        "adds up for xN linears of one x. q: share of the library's rate that a Triton base product reaches; q = 1 is"
    )
    print(
        "an upper bound. Of the forms (fused, two, split, cuda) the fastest; from the break-even on that is not split"
    )
    print(f"{'gpu':<7} {'shape':<40} {'base fwd':>9} {'ours fwd':>16} {'ratio':>6} {'fwd+bwd, q':>11} 1, .9, .8, even")
    for row in table:
        forward = f"{row['base']:>9.1f} {row['forward_kernel']:>6} {row['forward']:>9.1f} {row['forward_ratio']:>6.2f}"
        shares = f"{row['both_ratio']:>6.3f} {row['both_ratio_0.9']:>6.3f} {row['both_ratio_0.8']:>6.3f}"
        even = f"{row['break_even']:>6.3f}" if row["break_even"] else "   none"
        print(f"{row['gpu']:<7} {row['shape']:<40} {forward} {row['both']:>9.1f} {shares} {even}")
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    if arguments.plot:
        plot(arguments.plot, arguments.launch)


def print_launches(shape: Shape, gpu: Gpu) -> None:
    """Times by operations and by bytes; the longer counts, of the expands only what the base would not take."""
    T, F = shape.N * shape.L, shape.F
    base = predict(shape, gpu)["base"]
    print(f"{shape}, base {base:.1f} us each way: us by operations, us by bytes, added to forward + backward")
    for each in (*launches(shape, gpu.device, False), *launches(shape, gpu.device, True)):
        by = microseconds(each.flops, 0, gpu.reached), microseconds(0, each.moved, gpu.reached)
        added = (max(by) - base * (each.kernel in ("expand_kernel", "fused_kernel"))) / (2 * base)
        print(f"{each.kernel:<20} {by[0]:>7.1f} {by[1]:>7.1f} {added:>7.1%}")
    # shrink of dy and dB in one pass: blocks of r rows and c columns, at least one a processor, leave partial sums
    pieces = gpu.device.processors
    partial = min(8 * shape.K * shape.R * (a * T + pieces / a * F) for a in range(1, pieces))
    print(
        f"ds and dB in one pass: saves {T * F * shape.dtype.itemsize / 1e6:.0f} MB, partial sums {partial / 1e6:.0f} MB"
    )


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
