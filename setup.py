"""Builds moe_lora._C from csrc/cpu and moe_lora._cuda from csrc/cuda; all else is in pyproject.toml.

MOE_LORA_BUILD=auto  moe_lora._C, and moe_lora._cuda where nvcc and an NVIDIA driver are; failures only warn (default)
MOE_LORA_BUILD=none  nothing
MOE_LORA_BUILD=cpu   moe_lora._C, or fail
MOE_LORA_BUILD=cuda  both, or fail

Neither needs torch. Where moe_lora._C is missing, moe_lora/_build.txt says why, and `moe_lora.backends()` shows it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("MOE_LORA_BUILD", "auto")
# GCC 12 warns of its own AVX-512 headers.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
ARCHITECTURES = ("80", "90", "100", "120")  # of those, the ones that nvcc knows


def nvcc() -> str | None:
    """Path of NVIDIA's compiler: in CUDA_HOME, on PATH, or where it is usually installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def extensions() -> list[Extension]:
    """Extensions to try in this mode."""
    if MODE not in MODES:
        raise SystemExit(f"MOE_LORA_BUILD must be auto, none, cpu or cuda, got {MODE!r}")
    if MODE == "none":
        return []
    cpu, cuda = sorted(Path("csrc/cpu").glob("*.cpp")), Path("csrc/cuda/decode.cu")
    if not cpu or not cuda.exists():
        raise SystemExit("csrc/cpu and csrc/cuda must hold the sources of the native kernels, found none")
    headers = sorted(map(str, Path("csrc/cpu").glob("*.h")))
    native = Extension("moe_lora._C", [*map(str, cpu)], depends=headers, extra_compile_args=FLAGS, language="c++")
    if MODE == "cuda" or (MODE == "auto" and nvcc() and Path("/proc/driver/nvidia").exists()):
        return [native, Extension("moe_lora._cuda", [str(cuda)])]
    return [native]


def record(command: Command, reason: str | None) -> None:
    """Write moe_lora/_build.txt, why there is no moe_lora._C, or remove it."""
    inplace = command.editable_mode or getattr(command, "inplace", False)
    path = Path("kernels" if inplace else command.build_lib, "moe_lora", "_build.txt")
    if reason is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reason + "\n")


class BuildPackages(build_py):
    """Copies the packages; a build without native kernels says so in them."""

    def run(self) -> None:
        """Copy, and record that nothing native was asked for."""
        super().run()
        if MODE == "none":
            record(self, "MOE_LORA_BUILD=none left the native kernels out")


class BuildNative(build_ext):
    """Builds what can be built; in mode auto a failure becomes a warning and a line of moe_lora/_build.txt."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension with the compiler that it needs."""
        if ext.name == "moe_lora._C":
            record(self, None)
        try:
            self._build_cuda(ext) if ext.name == "moe_lora._cuda" else self._build_cpu(ext)
        except Exception as error:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # an older one would not fit these sources
            if MODE != "auto":
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"WARNING: {ext.name} is not built: {reason}", file=sys.stderr)
            if ext.name == "moe_lora._C":
                record(self, reason)

    def copy_extensions_to_source(self) -> None:
        """Copy what was built beside the sources, for an editable installation."""
        built = [ext for ext in self.extensions if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()]
        self.extensions, every = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = every

    def _build_cpu(self, ext: Extension) -> None:
        try:
            import pybind11
        except ModuleNotFoundError:
            raise RuntimeError("pybind11 is not in the build environment: pip install pybind11") from None
        ext.include_dirs.append(pybind11.get_include())
        command = getattr(self.compiler, "compiler_cxx", None) or getattr(self.compiler, "compiler", None) or ["cl"]
        if command[0] != "cl" and shutil.which(command[0]) is None:
            raise RuntimeError(f"no C++ compiler: {command[0]} was not found")
        super().build_extension(ext)

    def _build_cuda(self, ext: Extension) -> None:
        compiler = nvcc()
        if compiler is None:
            raise RuntimeError("MOE_LORA_BUILD=cuda needs nvcc, in CUDA_HOME or on PATH, found none")
        listed = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        known = [number for number in ARCHITECTURES if f"sm_{number}" in listed.split()]
        targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
        targets.append(f"-gencode=arch=compute_{known[0]},code=compute_{known[0]}")  # PTX for what comes later
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-shared", "-Xcompiler", "-fPIC", "--threads", "0"]
        subprocess.run([compiler, *flags, *targets, *ext.sources, "-o", str(output)], check=True)


commands = {"build_ext": BuildNative, "build_py": BuildPackages}
setup(ext_modules=extensions(), cmdclass=commands)
