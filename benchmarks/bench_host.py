"""What the host does for a call, in microseconds: kernels are compiled for a GPU, and their launches do nothing.

Everything up to the launch is as on a GPU: the op, its checks, the choice, the plan, the arguments; the launcher of the
driver is left out. `F.linear` beside it has one row of eight numbers, so that it is host time too; the products that
"split" leaves to the library are made. Processor time of the thread, interleaved rounds in one process, 20th
percentiles; the ratio is to F.linear's own, forward, or forward and backward.

Usage: python benchmarks/bench_host.py [--target 90] [--rounds 40] [--csv FILE]
"""

import argparse
import csv
import ctypes
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import moe_lora
import torch
from moe_lora.backend import cuda
from torch.nn import functional
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver

CALLS = 20  # of one kind in a row, in each round
WIDTH, RANK, EXPERTS, PICKS = 128, 16, 4, 2


class Launcher:
    """In the place of Triton's launcher."""

    def __init__(self, src: Any, metadata: Any):
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class Driver(DriverBase):
    """A device whose launches do nothing; its number keeps what is compiled here apart."""

    launcher_cls = Launcher

    def __init__(self, target: int):
        self.capability, self.target, self.utils = target, GPUTarget("cuda", target, 32), self

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by Triton

    def map_python_to_cpp_type(self, type: str) -> str:
        return type

    def get_benchmarker(self) -> Any:
        raise RuntimeError("there is nothing to time")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 2000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448 if 90 <= self.capability < 120 else 101376, "multiprocessor_count": 132}

    def load_binary(self, *_: Any) -> tuple:
        return object(), object(), 0, 0, 1024


class Library(cuda.Library):
    """The CUDA library of a device whose launches do nothing."""

    device = "cpu"

    def __init__(self) -> None:
        self.functions = SimpleNamespace(moe_lora_decode=lambda *_: 0)

    def blocks(self, index: int | None, kernel: int, shared: int) -> int:
        return 264

    def stream(self, device: torch.device) -> ctypes.c_void_p:
        return ctypes.c_void_p(0)


def calls(dropout: float) -> dict[str, tuple[Callable[[], object], str]]:
    """What is timed, and beside what."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(torch.bfloat16)

    def routing(N: int) -> moe_lora.Routing:
        return moe_lora.Routing(torch.zeros(N, PICKS, dtype=torch.int32), torch.rand(N, PICKS).requires_grad_())

    few, rows, weight = randn(8, 1, WIDTH), randn(2, 128, WIDTH).requires_grad_(), randn(WIDTH, WIDTH)
    lora_a = torch.zeros(EXPERTS, WIDTH, RANK).requires_grad_()
    lora_b = torch.zeros(EXPERTS, RANK, WIDTH).requires_grad_()
    decode, train, dy = routing(8), routing(2), randn(2, 128, WIDTH)
    leaves = [rows, lora_a, lora_b, train.gates]
    one, small, gradient = torch.ones(1, 8), torch.ones(8, 8), torch.ones(1, 8)
    learnt = one.clone().requires_grad_()

    def forward(backend: str) -> Callable[[], object]:
        return lambda: moe_lora.linear(few, weight, None, lora_a, lora_b, decode, backend=backend)

    def both(backend: str, dropout: float = 0.0) -> Callable[[], object]:
        def run() -> object:
            seed = 2**40 if dropout else None
            y = moe_lora.linear(rows, weight, None, lora_a, lora_b, train, 1.0, dropout, seed, backend)
            return torch.autograd.grad(y, leaves, dy)

        return run

    def group() -> object:
        lists = [weight] * 3, [None] * 3, [lora_a] * 3, [lora_b] * 3
        ys = moe_lora.linear_group(rows, *lists, train, backend="triton/two")
        return torch.autograd.grad(ys, leaves, [dy] * 3)

    return {
        "F.linear, forward": (lambda: functional.linear(one, small), "F.linear, forward"),
        "F.linear, both": (
            lambda: torch.autograd.grad(functional.linear(learnt, small), learnt, gradient),
            "F.linear, both",
        ),
        "decode forward, cuda": (forward("cuda"), "F.linear, forward"),
        "decode forward, triton": (forward("triton"), "F.linear, forward"),
        "decode forward, auto": (forward("auto"), "F.linear, forward"),
        "forward and backward, two": (both("triton/two"), "F.linear, both"),
        "forward and backward, fused": (both("triton/fused"), "F.linear, both"),
        "forward and backward, split": (both("triton/split"), "F.linear, both"),
        "forward and backward, two, dropout": (both("triton/two", dropout), "F.linear, both"),
        "group of three, both": (group, "F.linear, both"),
    }


def measure(rounds: int, dropout: float = 0.1) -> list[dict[str, Any]]:
    timed = calls(dropout)
    found: dict[str, list[float]] = {name: [] for name in timed}

    def once(name: str) -> float:
        run = timed[name][0]
        with torch.set_grad_enabled("forward" not in name or "backward" in name):
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            return (time.thread_time() - start) / CALLS * 1e6

    for name in timed:
        once(name)
    for _ in range(rounds):
        for name in timed:
            found[name].append(once(name))
    middle = {name: statistics.quantiles(times, n=5)[0] for name, times in found.items()}
    return [{"call": name, "us": middle[name], "ratio": middle[name] / middle[timed[name][1]]} for name in timed]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    library = Library()
    cuda.library = lambda: library
    triton_driver.set_active(Driver(arguments.target))
    table = measure(arguments.rounds)
    print(
        f"host time of one call, sm_{arguments.target}'s launches left out, 20th percentile, torch {torch.__version__}"
    )
    for row in table:
        print(f"{row['call']:<36} {row['us']:>8.1f} us {row['ratio']:>7.1f} x F.linear")
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
