"""Builds the packages moe_lora (in kernels/) and octavius, and from csrc/ the native moe_lora._C and moe_lora._cuda.

MOE_LORA_BUILD=auto  what the compilers and torch at hand can build; a failed compile only warns (default)
MOE_LORA_BUILD=none  nothing
MOE_LORA_BUILD=cpu   moe_lora._C, or fail
MOE_LORA_BUILD=cuda  both, or fail: needs nvcc and a torch for CUDA
"""

import os
from pathlib import Path

from setuptools import find_packages, setup


def native_extensions():
    build = os.environ.get("MOE_LORA_BUILD", "auto")
    if build not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"MOE_LORA_BUILD must be auto, none, cpu or cuda, got {build!r}")
    if build == "none":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ModuleNotFoundError:
        if build != "auto":
            raise
        print("moe_lora: no torch in the build environment, so no native code; use --no-build-isolation")
        return {}
    sources = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    if not sources:
        raise SystemExit("csrc/cpu must hold the sources of moe_lora._C, found none")
    # GCC 12 warns of its own AVX-512 headers
    flags = ["-O3", "-g0", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    extensions = [
        CppExtension(
            "moe_lora._C",
            sources,
            depends=sorted(map(str, Path("csrc/cpu").glob("*.h"))),
            extra_compile_args=flags,
            optional=build == "auto",
        )
    ]
    able = torch.version.cuda is not None and CUDA_HOME is not None
    if build == "cuda" and not able:
        found = f"torch {torch.__version__} and {f'CUDA in {CUDA_HOME}' if CUDA_HOME else 'no nvcc'}"
        raise SystemExit(f"MOE_LORA_BUILD=cuda needs nvcc and a torch for CUDA, found {found}")
    if able and build != "cpu":  # a plain library, opened by its path: moe_lora/cuda.py
        flags = {"cxx": [], "nvcc": ["-O3"]}
        kernels = ["csrc/cuda/decode.cu"]
        extensions.append(CUDAExtension("moe_lora._cuda", kernels, extra_compile_args=flags, optional=build == "auto"))
    # with ninja, torch's BuildExtension would not honour `optional`
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


setup(
    name="octavius-moe-lora",
    version="0.1.0",
    description="LoRA experts routed once per instance, in one op, and the multimodal model that needs them",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": ".", "moe_lora": "kernels/moe_lora"},
    packages=find_packages("kernels") + find_packages(".", include=["octavius*"]),
    package_data={"octavius": ["configs/*.yaml", "report/*.jinja"]},
    install_requires=["torch>=2.10", "safetensors"],
    extras_require={
        "octavius": [
            "accelerate",
            "efficientnet-lite-pytorch",
            "gguf",
            "jinja2",
            "matplotlib",
            "numpy",
            "pillow",
            "pycocoevalcap",
            "pyyaml",
            "resvg-py",
            "rich",
            "scikit-learn",
            "scipy",
            "tensorboard",
            "transformers>=5",
            "trimesh",
            "typer",
        ],
        "dev": ["hypothesis", "peft", "pyright", "pytest", "ruff", "triton; platform_system == 'Linux'"],
    },
    entry_points={"console_scripts": ["octavius = octavius.cli:main"]},
    **native_extensions(),
)
