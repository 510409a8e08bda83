"""Runs Python under the emulator of AMX instructions (`amxemu.c`), on any processor that has AVX512-BF16."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import moe_lora
import torch

SOURCE = Path(__file__).parent / "amxemu.c"
COUNTS = ("loads", "stores", "zeros", "products", "configurations")
FAULTS = {"stride": 1, "rows": 2, "no zeroing": 3, "depth": 4}


def missing() -> str | None:
    """Why the emulator cannot run here."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" not in flags:
        return "the processor has no AVX512-BF16, which the kernels around the tile instructions need"
    return None if shutil.which("cc") else "no C compiler (cc) to build the emulator with"


def build(folder: Path) -> Path:
    """Compile the emulator into a folder."""
    library = folder / "amxemu.so"
    flags = [
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-ftls-model=initial-exec",
    ]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(library), "-lm"], check=True)
    return library


def run(library: Path, *arguments: str, timeout: float) -> str:
    """Output of Python with these arguments under the emulator.

    PyTorch is held to AVX-512: it would ask Linux for tile registers, and then nothing would be emulated.
    """
    path = os.pathsep.join(path for path in sys.path if path)
    more = {"LD_PRELOAD": str(library), "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def counts() -> dict[str, int]:
    """Instructions that this process executed in the emulator so far, by kind."""
    emulator = ctypes.CDLL(None)
    emulator.amxemu_count.restype = ctypes.c_long
    return {name: emulator.amxemu_count(i) for i, name in enumerate(COUNTS)}


def plant(fault: str | None, tile: int = 0) -> None:
    """Let instructions on one tile register go wrong; None ends that."""
    ctypes.CDLL(None).amxemu_fault(0 if fault is None else FAULTS[fault], tile)


def main() -> None:
    """Print what tests/moe_lora/backend/test_amx.py compares: counts, faults seen, and the results' bits."""
    from moe_lora.backend import cpu
    from moe_lora.verify import Case, errors, make

    assert cpu._C.instructions() == "amx", cpu._C.instructions()
    torch.set_num_threads(1)
    case = Case((64, 64), 96, 64, 4, 2, 32)
    inputs = make(case, torch.bfloat16)
    before = counts()
    with torch.no_grad():
        moe_lora.linear(*inputs[:6], 0.7, 0.0, None, "cpu")
    after = counts()
    print("products", after["products"] - before["products"])
    print("configurations", after["configurations"] - before["configurations"])
    wrong = [name for name, (error, allowed) in errors(case, inputs, "cpu").items() if error > allowed]
    print("wrong", *wrong)
    places = [("stride", t) for t in (0, 1, 2, 3, 4, 5, 6, 7)] + [("rows", t) for t in (0, 1, 2, 3, 4, 5, 6)]
    places += [("no zeroing", 3), *(("depth", t) for t in (4, 5, 6, 7))]
    seen = 0
    for fault, tile in places:
        plant(fault, tile)
        caught = any(not error <= allowed for error, allowed in errors(case, inputs, "cpu").values())
        plant(None)
        seen += caught
        if not caught:
            print("missed", fault, tile)
    print("faults", seen, len(places))


if __name__ == "__main__":
    main()
