"""Launches kernels of a PTX module, as nvcc writes it, on arrays."""

import functools

import numpy as np

from ptxemu.counters import Profile
from ptxemu.machine import Settings, run
from ptxemu.memory import Buffer
from ptxemu.parse import Program, parse
from ptxemu.step import Step, prepare


@functools.lru_cache(maxsize=256)
def program_of(text: str, entry: str | None = None) -> tuple[Program, list[Step]]:
    program = parse(text, entry)
    return program, prepare(program)


def array_buffer(name: str, x: np.ndarray) -> Buffer:
    """An array's own memory; a view that is not contiguous may be touched from its first to its last byte."""
    low, high = np.lib.array_utils.byte_bounds(x)
    owner = x
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if not owner.flags.c_contiguous:
        raise ValueError(f"{name} must be a view of a contiguous array")
    start = owner.ctypes.data
    raw = owner.reshape(-1).view(np.uint8)
    return Buffer(name, raw, x.ctypes.data - start, (low - start, high - start))


def launch_ptx(
    text: str,
    entry: str | None,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *args,
    shared: int = 0,
    **settings,
) -> Profile:
    """Run one kernel of a PTX module.

    Args:
        text: the module.
        entry: name of the kernel; None if there is one.
        grid, block: sizes in x, y, z.
        args: arrays, `Buffer`s, numbers, or the bytes of a struct.
        shared: bytes of dynamic shared memory.
        settings: `races`, `seed` and `schedules`, see `Settings`.

    Returns:
        the counters of the launch.
    """
    program, steps = program_of(text, entry)
    names = [name.removeprefix(f"{program.name}_") for name in program.params]
    values = [
        array_buffer(n, a) if isinstance(a, np.ndarray) and a.ndim else a for n, a in zip(names, args, strict=False)
    ]
    return run(program, steps, Settings(**settings), grid, block, values, shared)
