"""Octavius: one LLM decoder, several modalities, low-rank experts chosen once per instance (arXiv 2311.02684).

`Octavius` is the model, `load_config` reads a run's configuration, `train`, `evaluate` and `chat` do what the commands
of those names do. `Benchmark`, `register_benchmark` and `register_tower` add parts by name. Each is imported when it is
first used, so that `import octavius` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavius.config import load_config
    from octavius.evaluation.benchmarks import Benchmark, register_benchmark
    from octavius.evaluation.evaluate import evaluate
    from octavius.model.octavius import Octavius
    from octavius.session import chat
    from octavius.training.train import train
    from octavius.vision.towers import register_tower

__all__ = [
    "Benchmark",
    "Octavius",
    "chat",
    "evaluate",
    "load_config",
    "register_benchmark",
    "register_tower",
    "train",
]

_MODULES = {
    "Benchmark": "octavius.evaluation.benchmarks",
    "register_benchmark": "octavius.evaluation.benchmarks",
    "register_tower": "octavius.vision.towers",
    "Octavius": "octavius.model.octavius",
    "chat": "octavius.session",
    "evaluate": "octavius.evaluation.evaluate",
    "load_config": "octavius.config",
    "train": "octavius.training.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("moe_lora").__version__
    if name not in _MODULES:
        raise AttributeError(f"module 'octavius' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
