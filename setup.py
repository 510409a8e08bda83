"""Builds the packages moe_lora (in kernels/) and octavius."""

from setuptools import find_packages, setup

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
        "dev": ["hypothesis", "peft", "pyright", "pytest", "ruff"],
    },
    entry_points={"console_scripts": ["octavius = octavius.cli:main"]},
)
