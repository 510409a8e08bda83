"""What the Triton backend would launch on GPUs that are not here, compiled for them: registers, shared memory, spills.

`python -m tests.support.aot [TARGET...]` writes the table that `test_aot.py` compares with. A launch goes the usual
way, down to a driver that tells the target and runs nothing, so that the tile sizes are those which that GPU gets.
"""

import csv
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import moe_lora
import torch
import triton
from moe_lora.backend import dispatch
from moe_lora.ops import Plan
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as active
from triton.runtime.cache import get_cache_manager

TABLE = Path(__file__).parents[1] / "data" / "aot.csv"


class Target(NamedTuple):
    """What Triton asks a device, and tensor-core instructions to expect for few rows and for many."""

    gpu: GPUTarget
    shared: int
    processors: int
    few: str
    many: str


def _cuda(capability: int, shared: int, processors: int, many: str = "mma.sync") -> Target:
    return Target(GPUTarget("cuda", capability, 32), shared, processors, "mma.sync", many)


def _hip(name: str, warp: int, shared: int, processors: int, instruction: str) -> Target:
    return Target(GPUTarget("hip", name, warp), shared, processors, instruction, instruction)


TARGETS = {
    "sm_80": _cuda(80, 166912, 108),  # A100
    "sm_86": _cuda(86, 101376, 82),  # RTX 3090
    "sm_89": _cuda(89, 101376, 128),  # RTX 4090
    "sm_90": _cuda(90, 232448, 132, "wgmma"),  # H100
    "sm_100": _cuda(100, 232448, 148, "tcgen05"),  # B200
    "sm_103": _cuda(103, 232448, 148, "tcgen05"),  # B300
    "sm_120": _cuda(120, 101376, 170),  # RTX 5090
    "gfx942": _hip("gfx942", 64, 65536, 304, "v_mfma"),  # MI300X
    "gfx950": _hip("gfx950", 64, 163840, 256, "v_mfma"),  # MI355X
    "gfx1100": _hip("gfx1100", 32, 65536, 96, "v_wmma"),  # RX 7900 XTX
    "gfx1201": _hip("gfx1201", 32, 65536, 64, "v_wmma"),  # RX 9070 XT
}


class Case(NamedTuple):
    """Forward and backward of one linear, or of one and `others` together; each instance of `rows` rows.

    `form` is how: "own" makes base products itself, in one launch where that can be, else in two.
    """

    instances: int
    rows: int
    D: int
    F: int
    dtype: torch.dtype
    dropout: float = 0.0
    packed: bool = False
    others: tuple[int, ...] = ()  # their F
    rank: int = 32
    form: str = "own"

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("-packed" if self.packed else "")
        widths = "+".join(map(str, (self.F, *self.others)))
        rank = f"-R{self.rank}" if self.rank != 32 else ""
        form = f"-{self.form}" if self.form != "own" else ""
        return f"{self.instances}x{self.rows}-{self.D}-{widths}-{kind}-p{self.dropout}{rank}{form}"


CASES = (
    Case(8, 1024, 4096, 4096, torch.bfloat16, 0.1),
    Case(8, 1024, 4096, 4096, torch.bfloat16),
    Case(8, 2048, 576, 512, torch.bfloat16, rank=64),
    Case(2, 512, 1024, 128, torch.float16, rank=64),
    Case(16, 110, 576, 1536, torch.float16, 0.0, packed=True),
    Case(8, 1, 4096, 4096, torch.bfloat16),
    Case(8, 64, 576, 576, torch.float32, 0.1),
    Case(8, 1024, 4096, 4096, torch.bfloat16, 0.1, others=(4096, 4096)),
    Case(16, 110, 576, 576, torch.float16, packed=True, others=(192, 192)),
    Case(8, 64, 576, 1536, torch.bfloat16, 0.1, others=(1536,)),
    Case(8, 1024, 4096, 4096, torch.bfloat16, 0.1, form="split"),
    Case(8, 1024, 4096, 4096, torch.bfloat16, form="two-narrow"),
)


# every case on these; on the others, of a like architecture, the two with most work and with most irregular sizes
_EVERY = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
_MOST = (CASES[0], CASES[4])
PAIRS = tuple((target, case) for target in TARGETS for case in (CASES if target in _EVERY else _MOST))
PAIRS = tuple(pair for pair in PAIRS if pair != ("gfx950", CASES[4]))  # whose compilation takes many minutes


class Row(NamedTuple):
    """A compiled kernel. `scratch`: bytes a thread keeps outside registers; 0 means that nothing spills."""

    target: str
    case: str
    kernel: str
    grid: str
    warps: int
    stages: int
    registers: int
    shared: int
    scratch: int
    tensor_cores: str


class _Launcher:
    def __init__(self, src, metadata):
        self.metadata = metadata

    def __call__(self, x, y, z, *_):
        active.active.launches.append((self.metadata, f"{x}x{y}x{z}"))


class _Driver:
    """Its device number is the target's, so that Triton keeps what it compiled for different targets apart."""

    launcher_cls = _Launcher

    def __init__(self, name: str):
        self.name, self.target, self.launches, self.utils = name, TARGETS[name], [], self

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared, "multiprocessor_count": self.target.processors}

    def load_binary(self, *_):
        return object(), object(), 0, 0, 1024

    def unload_module(self, module) -> None:
        pass


@contextmanager
def recorded(target: str) -> Iterator[list]:
    """Launches are compiled for the target and recorded, not run."""
    before, driver = active._active, _Driver(target)
    active.set_active(driver)
    try:
        yield driver.launches
    finally:
        active._active = before


def rows(target: str, case: Case) -> list[Row]:
    """The kernels of a case's forward and backward, in the order of their launches."""
    N, L, D, F, dtype, dropout, packed, others, R, form = case
    x = torch.empty(N * L, D, dtype=dtype).requires_grad_()
    widths = (F, *others)
    lora_as = [torch.empty(4, D, R).requires_grad_() for _ in widths]
    lora_bs = [torch.empty(4, R, width).requires_grad_() for width in widths]
    weights = [torch.empty(width, D, dtype=dtype) for width in widths]
    offsets = torch.arange(N + 1, dtype=torch.int32) * L if packed else None
    routing = moe_lora.Routing(torch.zeros(N, 2, dtype=torch.int32), torch.ones(N, 2).requires_grad_(), offsets)
    with recorded(target) as launches:
        if form == "own":
            plan = Plan(routing.experts, routing.gates, offsets, 1.0, dropout, torch.tensor(2**40))
            able = dispatch.forms_of("triton", x, weights[0], lora_as[0], plan)
            form = "fused" if "triton/fused" in able and not others else "two"
        settings = (routing, 1.0, dropout, 2**40, f"triton/{form}")
        if others:
            ys = moe_lora.linear_group(x, weights, [None] * len(widths), lora_as, lora_bs, *settings)
        else:
            ys = (moe_lora.linear(x, weights[0], None, lora_as[0], lora_bs[0], *settings),)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    return [_row(target, case, *launch) for launch in launches]


def _row(target: str, case: Case, metadata, grid: str) -> Row:
    def text(kind: str) -> str:
        return Path(str(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.{kind}"))).read_text("utf-8")

    if TARGETS[target].gpu.backend == "hip":
        code = text("amdgcn")
        registers, scratch = (_number(rf"\.{n}:\s+(\d+)", code) for n in ("vgpr_count", "private_segment_fixed_size"))
        found = re.findall(r"v_(?:mfma|wmma)_\w+", code)
    else:
        cubin = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.cubin")
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        registers, scratch = (
            _number(r"REG:(\d+)", usage),
            _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        )
        found = re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", text("ptx"))
    sizes = (metadata.num_warps, metadata.num_stages, registers, metadata.shared, scratch)
    return Row(target, str(case), metadata.name, grid, *sizes, " ".join(sorted(set(found))))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def read() -> list[Row]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    return [Row(*line[:4], *map(int, line[4:9]), line[9]) for line in lines]


def write(targets: Sequence[str] = tuple(TARGETS)) -> None:
    """The table, with these targets' rows made anew."""
    kept = [row for row in read() if row.target not in targets]
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for target in TARGETS:
            writer.writerows(row for row in kept if row.target == target)
            for case in [case for of, case in PAIRS if of == target and target in targets]:
                writer.writerows(rows(target, case))
                file.flush()


if __name__ == "__main__":
    write(sys.argv[1:] or tuple(TARGETS))
