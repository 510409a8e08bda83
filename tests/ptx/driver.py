"""Launches Triton kernels on CPU tensors: compiled by Triton for a real target, executed by the emulator.

from ptx.driver import launch
profile = launch(kernel, grid, x, y, n, target=90, num_warps=4, BLOCK=128)
"""

import ctypes
import types
from collections.abc import Iterable

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager

from ptx.counters import Profile
from ptx.machine import Launch
from ptx.memory import Buffer
from ptx.module import program_of


def buffer(name: str, x: torch.Tensor, uninitialised: bool = False) -> Buffer:
    """A CPU tensor's storage, of which the tensor's own extent may be touched."""
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be a CPU tensor, got one on {x.device}")
    storage, size = x.untyped_storage(), x.element_size()
    raw = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr()) if storage.nbytes() else b""
    first = x.storage_offset() * size
    last = (
        first + (sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1) * size
        if x.numel()
        else first
    )
    return Buffer(name, np.frombuffer(raw, np.uint8), first, (first, last), uninitialised)


class Options(types.SimpleNamespace):
    """How launches run, and what the last one did."""

    races: bool = True
    seed: int | None = None
    uninitialised: tuple[torch.Tensor, ...] = ()
    profile: Profile | None = None


class Launcher:
    """What Triton calls for each launch."""

    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        with open(path, encoding="utf-8") as file:
            self.program, self.steps = program_of(file.read(), metadata.name)

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        options, values = triton_driver.active.options, []
        for (name, type), arg in zip(self.src.signature.items(), args, strict=True):
            if type == "constexpr":
                continue
            if isinstance(arg, torch.Tensor):
                values.append(buffer(name, arg, any(arg is t for t in options.uninitialised)))
            elif isinstance(arg, bool | int | float):
                values.append(float(arg) if type in ("fp32", "fp64", "fp16", "bf16") else int(arg))
            else:
                raise TypeError(f"argument {name} of {self.metadata.name} is a {arg.__class__.__name__}: not supported")
        grid = (x, y, z)
        if 0 in grid:
            return
        threads = self.program.threads
        run = Launch(self.program, grid, (threads,), values, self.metadata.shared, options.races, options.seed)
        options.profile = run.run(self.steps)


class Utils:
    """Limits of a device."""

    def __init__(self, target: int):
        self.shared = {80: 166912, 89: 101376, 120: 101376}.get(target, 232448)

    def get_device_properties(self, device: int) -> dict:
        limits = dict(max_shared_mem=self.shared, multiprocessor_count=2, warpSize=32, max_num_regs=65536)
        return limits | dict(sm_clock_rate=1, mem_clock_rate=1, mem_bus_width=1)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int):
        return object(), object(), 0, 0, 1024

    def unload_module(self, module) -> None:
        pass


class Driver:
    """Triton's view of the emulated device; its number is the target, so that compiled kernels are kept apart."""

    def __init__(self, target: int, options: Options):
        self.target, self.options = target, options
        self.utils, self.launcher_cls = Utils(target), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type: str) -> str:
        return type

    def get_benchmarker(self):
        raise RuntimeError("the emulator has no clock: autotuning cannot run here, give the kernel one configuration")


class Emulator:
    """A context in which `kernel[grid](...)` on CPU tensors runs in the emulator.

    Args:
        target: compute capability: 80, 90 or 100.
        races: look for races and uninitialised memory.
        seed: None runs all warps in step; a number runs warps alone, in an order drawn from it.
        uninitialised: tensors that must not be read before they are written.
    """

    def __init__(
        self, target: int = 80, races: bool = True, seed: int | None = None, uninitialised: Iterable[torch.Tensor] = ()
    ):
        self.options = Options(races=races, seed=seed, uninitialised=tuple(uninitialised), profile=None)
        self.driver = Driver(target, self.options)

    @property
    def profile(self) -> Profile:
        """Of the last launch."""
        assert self.options.profile is not None, "nothing was launched"
        return self.options.profile

    def __enter__(self) -> "Emulator":
        self.before = triton_driver._active
        triton_driver.set_active(self.driver)
        return self

    def __exit__(self, *exception) -> None:
        triton_driver._active = self.before


def launch(
    kernel,
    grid,
    *args,
    target: int = 80,
    num_warps: int = 4,
    num_stages: int = 2,
    races: bool = True,
    seed=None,
    uninitialised=(),
    **constexprs,
) -> Profile:
    """Compile a Triton kernel for a GPU and run it on CPU tensors.

    Args:
        grid: blocks in x, y, z, or a function of the arguments, as in `kernel[grid]`.
        args, constexprs: of the kernel.
        target, races, seed, uninitialised: as in `Emulator`.

    Returns:
        the counters of the launch.

    Raises:
        Fault: the kernel made a mistake.
        Unknown: the kernel uses an instruction that the emulator does not know.
    """
    with Emulator(target, races, seed, uninitialised) as emulator:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
    return emulator.profile
