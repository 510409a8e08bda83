"""What an example is: a kernel, its inputs, and what numpy gives in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Example:
    """A kernel, a function that makes its inputs and the expected values, and a tolerance.

    Args:
        make: a generator to (grid, arguments, {tensor: expected}).
        tolerance: greatest absolute difference, over the greatest expected value.
    """

    name: str
    kernel: Callable
    make: Callable
    tolerance: float = 0.0
    meta: dict = field(default_factory=dict)
    targets: tuple[int, ...] = (80, 90, 100)

    def run(self, launch, target: int, **options) -> tuple[dict[int, float], object]:
        """Launch; returns the error of each output over its tolerance's scale, and the profile."""
        grid, args, expected = self.make(np.random.default_rng(0))
        profile = launch(self.kernel, grid, *args, target=target, **self.meta, **options)
        errors = {}
        for i, want in expected.items():
            out = getattr(args[i], "base", args[i])  # of a tensor descriptor
            got = out.double().numpy() if out.is_floating_point() else out.numpy()
            want = np.asarray(want, np.float64)
            wrong = np.isfinite(want) != np.isfinite(got)
            errors[i] = math.inf if wrong.any() else float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
        return errors, profile


def floats(rng, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype("f4")).to(dtype)


def exact(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()
