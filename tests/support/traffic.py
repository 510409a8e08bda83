"""What the GPU kernels do to memory, as the emulator counts it: sectors and bank conflicts by kernel and target.

`python -m tests.support.traffic` writes the table that `test_traffic.py` holds the kernels to.
"""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import moe_lora
import torch
from moe_lora.backend.triton import launch
from moe_lora.backend.triton.tiles import Device
from ptxemu.counters import Profile
from ptxemu.driver import Emulator

from benchmarks.roofline import Shape
from tests.support import decode

TABLE = Path(__file__).parents[1] / "data" / "traffic.csv"
TARGETS = ("sm_80", "sm_90", "sm_100")
CUDA = ("sm_80", "sm_90a")


class Variant(NamedTuple):
    """Forward and backward of the Triton kernels; float32 has the same code for all targets."""

    shape: Shape
    dropout: float = 0.0
    packed: bool = False
    targets: tuple[str, ...] = TARGETS

    def __str__(self) -> str:
        return _name(self.shape) + " packed" * self.packed + " dropout" * (self.dropout > 0)


VARIANTS = (
    Variant(Shape(2, 256, 192, 128, E=4, R=16), dropout=0.1),  # whole tiles for each instance
    Variant(Shape(2, 200, 192, 128, E=3, R=16, dtype=torch.float16, master=torch.float16)),  # sm_90 on: one launch
    Variant(Shape(12, 1, 512, 64, E=4, R=16)),  # decode: the shrink is split
    Variant(Shape(2, 256, 192, 128, E=4, R=16, members=3)),
    Variant(Shape(2, 200, 128, 192, E=3, R=16, dtype=torch.float16, members=2), targets=TARGETS[:2]),
    Variant(Shape(2, 64, 64, 128, E=4, R=16, dtype=torch.float32), packed=True, targets=TARGETS[:1]),
    # tiles with rows of many instances, of all experts
    Variant(Shape(16, 25, 192, 128, E=3, R=16, dtype=torch.float16, master=torch.float16), targets=TARGETS[:2]),
)
DECODE = tuple(
    Shape(T, 1, 256, 64, dtype=dtype, master=master)
    for dtype in (torch.bfloat16, torch.float16)
    for master in (dtype, torch.float32)
    for T in (8, 24)
)


class Row(NamedTuple):
    """A launch: sectors of 32 bytes loaded and stored, bytes asked for, passes of shared memory and those too many."""

    target: str
    case: str
    kernel: str
    loaded: int
    load_bytes: int
    stored: int
    store_bytes: int
    passes: int
    conflicts: int

    def worse(self, than: "Row") -> list[str]:
        """The figures that are."""
        return [name for name in ("loaded", "stored", "conflicts") if getattr(self, name) > getattr(than, name)]


@cache
def profiles(variant: Variant, target: str) -> tuple[list[Profile], Device]:
    """Of each launch of a forward and backward; and the device."""
    shape, dropout, packed, _ = variant
    N, L, D, F, E, K, R, dtype, master, members = vars(shape).values()
    x = torch.randn(N * L, D).to(dtype).requires_grad_()
    weights = [torch.randn(F, D).to(dtype) for _ in range(members)]
    lora_as = [torch.randn(E, D, R).to(master).requires_grad_() for _ in range(members)]
    lora_bs = [torch.randn(E, R, F).to(master).requires_grad_() for _ in range(members)]
    offsets = torch.arange(N + 1, dtype=torch.int32) * L if packed else None
    routing = moe_lora.Routing(torch.arange(N * K).view(N, K) % E, torch.rand(N, K).requires_grad_(), offsets)
    rows, settings = x if packed else x.view(N, L, D), (routing, 1.0, dropout, 5, "triton")
    with Emulator(int(target[3:]), races=False) as emulator:
        device = launch.device_of(x.device)
        if members > 1:
            ys = moe_lora.linear_group(rows, weights, [None] * members, lora_as, lora_bs, *settings)
        else:
            ys = [moe_lora.linear(rows, weights[0], None, lora_as[0], lora_bs[0], *settings)]
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    return emulator.profiles, device


@cache
def decode_profile(shape: Shape, target: str, held: int) -> Profile:
    """Of the CUDA kernel on a device of `held` blocks, all experts used by each eight rows."""
    (N, _, D, F, E, K, R, dtype, master, _) = vars(shape).values()
    x, weight = (torch.randn(size).to(dtype) for size in ((N, 1, D), (F, D)))
    lora_a, lora_b = (torch.randn(size).to(master) for size in ((E, D, R), (E, R, F)))
    routing = moe_lora.Routing(torch.arange(N * K).view(N, K) % E, torch.rand(N, K))
    with decode.emulated(target, held, races=False) as device:
        moe_lora.linear(x, weight, None, lora_a, lora_b, routing, backend="cuda")
    return device.profiles[0]


def rows(variant: Variant, target: str) -> list[Row]:
    """In the order of the launches, without those that do as the one before."""
    found = [_row(target, str(variant), profile) for profile in profiles(variant, target)[0]]
    return [row for row, before in zip(found, [None, *found], strict=False) if row != before]


def decode_row(shape: Shape, target: str) -> Row:
    return _row(target, _name(shape), decode_profile(shape, target, 4))


def read() -> list[Row]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [Row(*line[:3], *map(int, line[3:])) for line in list(csv.reader(file))[1:]]


def write() -> None:
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for variant in VARIANTS:
            for target in variant.targets:
                writer.writerows(rows(variant, target))
        writer.writerows(decode_row(shape, target) for shape in DECODE for target in CUDA)


def _row(target: str, case: str, profile: Profile) -> Row:
    loads, stores, shared = profile.loads(), profile.stores(), profile.shared()
    memory = (loads.sectors, loads.bytes, stores.sectors, stores.bytes, shared.wavefronts, shared.conflicts)
    return Row(target, case, profile.kernel, *memory)


def _name(shape: Shape) -> str:
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (shape.dtype, shape.master)]
    times = f" x{shape.members}" if shape.members > 1 else ""
    return f"{shape.N}x{shape.L} {shape.D}->{shape.F}{times} {' '.join(dict.fromkeys(dtypes))}"


if __name__ == "__main__":
    write()
