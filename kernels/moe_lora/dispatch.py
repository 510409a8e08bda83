"""Which backend runs a call: the one named, or for "auto" the first that can.

A backend is a module with
    unavailable() -> None or the reason why it cannot run on this machine
    refuses(x, weight, lora_a, plan) -> None or the reason why it cannot run this call
    kernel(x, weight, lora_a, plan) -> (name of the kernel it would run, why that one)
    forward(x, weight, bias, lora_a, lora_b, plan) -> y, h
    backward(dy, x, weight, lora_a, lora_b, h, plan, needs) -> [dx, dA, dB, dgates], None where not needed
with h [T, K·R] as `reference` defines it.
"""

import os
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from moe_lora import cpu, reference
from moe_lora.routing import Plan, Routing

# In the order in which "auto" asks them.
_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}


@dataclass(frozen=True)
class Explanation:
    """The backend and kernel of one call, and why."""

    backend: str
    kernel: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.kernel}: {self.why}"


def backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run on this machine, or the reason why not."""
    return {name: module.unavailable() for name, module in _BACKENDS.items()}


def explain(x: Tensor, weight: Tensor, lora_a: Tensor, routing: Routing, backend: str = "auto") -> Explanation:
    """Which backend and kernel `linear` would run for this call, and why.

    Raises:
        ValueError: no such backend, or it cannot run this call (says why).
    """
    plan = Plan(routing.experts, routing.gates, routing.offsets, 1.0, 0.0, None)
    module = choose(backend, x, weight, lora_a, plan)
    names = list(_BACKENDS)
    found = names[list(_BACKENDS.values()).index(module)]
    name, asked = _resolve(backend)
    if name == "auto":
        before = names[: names.index(found)]
        reasons = ["the first that can run", *(f"not {key}: {_reason(key, x, weight, lora_a, plan)}" for key in before)]
    else:
        reasons = [f"{asked} asks for {name}"]
    kernel, why = module.kernel(x, weight, lora_a, plan)
    return Explanation(found, kernel, "; ".join([*reasons, why]))


def choose(backend: str, x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> ModuleType:
    """The backend's module; ValueError if a named one does not exist or cannot run this call."""
    name, asked = _resolve(backend)
    if name != "auto":
        if name not in _BACKENDS:
            raise ValueError(f"{asked} must be auto or one of {', '.join(_BACKENDS)}, got {name!r}")
        reason = _reason(name, x, weight, lora_a, plan)
        if reason is not None:
            raise ValueError(f"backend {name} cannot run this call: {reason}")
        return _BACKENDS[name]
    for module in _BACKENDS.values():
        if module.unavailable() is None and module.refuses(x, weight, lora_a, plan) is None:
            return module
    raise AssertionError("the reference runs everywhere")


def _resolve(backend: str) -> tuple[str, str]:
    """The name asked for, and by whom: the argument, or for "auto" the environment."""
    if backend != "auto":
        return backend, "backend"
    return os.environ.get("MOE_LORA_BACKEND", "auto"), "MOE_LORA_BACKEND"


def _reason(name: str, x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> str | None:
    return _BACKENDS[name].unavailable() or _BACKENDS[name].refuses(x, weight, lora_a, plan)
