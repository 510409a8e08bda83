"""Builds the packages moe_lora (in kernels/) and octavius, and from csrc/ the native extension moe_lora._C.

MOE_LORA_BUILD=auto  the extension if a compiler and torch are at hand; a failed compile only warns (default)
MOE_LORA_BUILD=none  no extension
MOE_LORA_BUILD=cpu   the extension, or fail
"""

import os
from pathlib import Path

from setuptools import find_packages, setup


def native_extension():
    build = os.environ.get("MOE_LORA_BUILD", "auto")
    if build not in ("auto", "none", "cpu"):
        raise SystemExit(f"MOE_LORA_BUILD must be auto, none or cpu, got {build!r}")
    if build == "none":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError:
        if build == "cpu":
            raise
        print("moe_lora: no torch in the build environment, so no moe_lora._C; use --no-build-isolation")
        return {}
    sources = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    if not sources:
        raise SystemExit("csrc/cpu must hold the sources of moe_lora._C, found none")
    # GCC 12 warns of its own AVX-512 headers
    flags = ["-O3", "-g0", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    extension = CppExtension(
        "moe_lora._C",
        sources,
        depends=sorted(map(str, Path("csrc/cpu").glob("*.h"))),
        extra_compile_args=flags,
        optional=build == "auto",
    )
    # with ninja, torch's BuildExtension would not honour `optional`
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


setup(
    name="octavius-moe-lora",
    version="0.1.0",
    description="LoRA experts routed once per instance, in one op, and the multimodal model that needs them",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": ".", "moe_lora": "kernels/moe_lora"},
    packages=find_packages("kernels") + find_packages(".", include=["octavius*"]),
    package_data={"octavius": ["configs/*.yaml", "*.jinja"]},
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
    **native_extension(),
)
