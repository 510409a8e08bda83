"""Launches Triton kernels on CPU tensors: compiled by Triton for a real target, executed by the emulator.

from ptxemu.driver import launch
profile = launch(kernel, grid, x, y, n, target=90, num_warps=4, BLOCK=128)
"""

import ctypes
from collections.abc import Iterable

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from ptxemu.bulk import TF32, TensorMap
from ptxemu.counters import Profile
from ptxemu.machine import Settings, run
from ptxemu.memory import Buffer
from ptxemu.module import program_of


def buffer(name: str, x: torch.Tensor, uninitialised: bool = False) -> Buffer:
    """A CPU tensor's storage, of which the tensor's own extent may be touched."""
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be a CPU tensor, got one on {x.device}")
    storage, size = x.untyped_storage(), x.element_size()
    raw = np.zeros(0, np.uint8)
    if storage.nbytes():
        raw = np.ctypeslib.as_array((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr()))
    first = int(x.storage_offset()) * size
    elements = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return Buffer(name, raw, first, (first, first + int(elements) * size), uninitialised)


def descriptor(name: str, x: TensorDescriptor, meta: dict | None) -> list:
    """A tensor map, or for targets without TMA the tensor; then shape and strides."""
    sizes = [*x.shape, *x.strides]
    if meta is None:
        return [buffer(name, x.base), *sizes, x.padding == "nan", x.round_f32_to_tf32, *sizes]
    elemtype = TF32 if x.round_f32_to_tf32 else meta["elem_type"]
    strides = tuple(n * meta["elem_size"] for n in x.strides[-2::-1])
    box = tuple(meta["block_size"][::-1])
    fill = int(x.padding == "nan")
    return [
        TensorMap(buffer(name, x.base), tuple(x.shape[::-1]), strides, box, elemtype, meta["swizzle"], fill),
        *sizes,
    ]


class Launcher:
    """What Triton calls for each launch."""

    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        assert path is not None
        with open(path, encoding="utf-8") as file:
            self.text = file.read()

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        driver, values = triton_driver.active, []
        assert isinstance(driver, Driver)
        emulator = driver.emulator
        program, steps = program_of(emulator.rewrite(self.text) if emulator.rewrite else self.text, self.metadata.name)
        maps = iter(self.metadata.tensordesc_meta or ())
        for (name, type), arg in zip(self.src.signature.items(), args, strict=True):
            if type == "constexpr":
                continue
            if isinstance(arg, torch.Tensor):
                values.append(buffer(name, arg, any(arg is t for t in emulator.uninitialised)))
            elif isinstance(arg, TensorDescriptor):
                values += descriptor(name, arg, next(maps, None))
            elif isinstance(arg, bool | int | float):
                values.append(float(arg) if type in ("fp32", "fp64", "fp16", "bf16") else int(arg))
            else:
                raise TypeError(f"argument {name} of {self.metadata.name} is a {arg.__class__.__name__}: not supported")
        if x * y * z:
            if self.metadata.global_scratch_size:
                values.append(Buffer("scratch", np.zeros(x * y * z * self.metadata.global_scratch_size, np.uint8)))
            launch = ((x, y, z), (program.threads,), values, self.metadata.shared)
            together = self.metadata.launch_cooperative_grid
            emulator.profiles.append(run(program, steps, emulator.settings, *launch, together))


class Utils:
    """Limits of a device."""

    def __init__(self, target: int):
        self.shared = {80: 166912, 86: 101376, 89: 101376, 120: 101376, 121: 101376}.get(target, 232448)

    def get_device_properties(self, device: int) -> dict:
        limits = {"max_shared_mem": self.shared, "multiprocessor_count": 2, "warpSize": 32, "max_num_regs": 65536}
        return limits | {"sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int):
        return object(), object(), 0, 0, 1024

    def unload_module(self, module) -> None:
        pass


class Driver(DriverBase):
    """Triton's view of the emulated device; its number is the target, so that compiled kernels are kept apart."""

    def __init__(self, target: int, emulator: "Emulator"):
        self.target, self.emulator = target, emulator
        self.utils, self.launcher_cls = Utils(target), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # only inside `Emulator`, never chosen by Triton

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
        target: compute capability: 80, 90, 100 or 120; others of these generations run as those do.
        uninitialised: tensors that must not be read before they are written.
        rewrite: changes the PTX text before it runs, to plant faults.
        settings: `races`, `seed` and `schedules`, see `Settings`.

    Attributes:
        profiles: the counters of every launch.
    """

    def __init__(self, target: int = 80, uninitialised: Iterable[torch.Tensor] = (), rewrite=None, **settings):
        self.uninitialised, self.rewrite, self.settings = tuple(uninitialised), rewrite, Settings(**settings)
        self.driver, self.profiles = Driver(target, self), list[Profile]()

    @property
    def profile(self) -> Profile:
        """The counters of the last launch."""
        if not self.profiles:
            raise ValueError("nothing was launched, or only empty grids")
        return self.profiles[-1]

    def __enter__(self) -> "Emulator":
        self.before = triton_driver._active
        triton_driver.set_active(self.driver)
        return self

    def __exit__(self, *exception) -> None:
        triton_driver._active = self.before


def launch(kernel, grid, *args, target: int = 80, emulator: dict | None = None, **options) -> Profile:
    """Compile a Triton kernel for a GPU and run it on CPU tensors.

    Args:
        grid: blocks in x, y, z, or a function of the arguments, as in `kernel[grid]`.
        args: of the kernel.
        target: compute capability.
        emulator: further arguments of `Emulator`: `dict(seed=1)`.
        options: the kernel's constants, and `num_warps` and `num_stages` of its compilation.

    Returns:
        the counters of the launch.

    Raises:
        Fault: the kernel made a mistake.
        Unknown: the kernel uses an instruction that the emulator does not know.
    """
    with Emulator(target, **(emulator or {})) as running:
        kernel[grid](*args, **options)
    return running.profile
