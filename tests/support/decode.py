"""The CUDA library without a device: nvcc compiles `csrc/cuda/decode.cu`, the emulator launches it on CPU tensors."""

import re
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from moe_lora.backend import cuda
from ptxemu.counters import Profile
from ptxemu.driver import buffer
from ptxemu.module import launch_ptx

SOURCE = Path(__file__).parents[2] / "csrc/cuda/decode.cu"
NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "experts", "gates", "offsets", "y", "h", "parts")


def nvcc(*arguments: str, output: str) -> str:
    """What nvcc says; the test is skipped where there is none."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    command = ["nvcc", "-std=c++17", "-O3", *arguments, str(SOURCE), "-o", output]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@cache
def ptx(target: str) -> dict[str, str]:
    """The PTX of each kernel by name."""
    with TemporaryDirectory() as folder:
        nvcc("-ptx", f"-arch={target}", output=f"{folder}/decode.ptx")
        text = Path(folder, "decode.ptx").read_text("utf-8")
    head, *parts = re.split(r"(?=\.visible \.entry)", text)
    return {re.match(r"\.visible \.entry (\w+)", part)[1]: head + part for part in parts}


class Emulated(cuda.Library):
    """A device of `held` blocks at a time that the emulator plays, for PTX of a target."""

    device = "cpu"

    def __init__(self, target: str = "sm_80", held: int = 4, **settings):
        self.target, self.held, self.settings, self.profiles = target, held, settings, list[Profile]()

    def blocks(self, index, kernel, shared):
        return self.held

    def launch(self, kernel, tensors, sizes, grid, shared):
        name = cuda.KERNELS[kernel]
        written = ("y", "h", "parts")
        arguments = [
            buffer(each, tensor, each in written) if tensor is not None else 0
            for each, tensor in zip(NAMES, tensors, strict=True)
        ]
        text = ptx(self.target)[name]
        self.profiles.append(
            launch_ptx(text, name, (grid,), (256,), *arguments, bytes(sizes), shared=shared, **self.settings)
        )


@contextmanager
def emulated(*arguments, **options):
    """`cuda` takes the emulator for its device."""
    before, found = cuda.library, Emulated(*arguments, **options)
    cuda.library = lambda: found
    try:
        yield found
    finally:
        cuda.library = before
