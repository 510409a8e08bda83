"""Compiled GPU kernels on the CPU: an emulator of PTX with bounds checks, race detection and a profiler's counters.

`launch` runs Triton kernels (it needs triton and torch), `launch_ptx` the PTX of any compiler (it needs numpy alone).
"""

from typing import TYPE_CHECKING

from ptxemu.counters import Profile
from ptxemu.fault import Fault, Unknown
from ptxemu.module import launch_ptx

if TYPE_CHECKING:
    from ptxemu.driver import Emulator, launch

__all__ = ["Emulator", "Fault", "Profile", "Unknown", "launch", "launch_ptx"]


def __getattr__(name: str):
    if name in ("Emulator", "launch"):
        from ptxemu import driver  # imports triton

        return getattr(driver, name)
    raise AttributeError(f"module ptx has no attribute {name}")
