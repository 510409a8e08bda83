"""Which backend runs a call: the one named, or for "auto" the first that can; on a GPU the fastest, see `autotune.py`.

A backend is a module with
    unavailable() -> None or the reason why it cannot run on this machine
    refuses(x, weight, lora_a, plan) -> None or the reason why it cannot run this call
    kernel(x, weight, lora_a, plan) -> (name of the kernel it would run, why that one)
    forward(x, weight, bias, lora_a, lora_b, plan) -> y, h
    backward(dy, x, weight, lora_a, lora_b, h, plan, needs) -> [dx, dA, dB, dgates], None where not needed
with h [T, K·R] as `reference` defines it. "auto" takes one without `backward` for the
forward alone. A backend that can run a group of linears of one x together also has
    refuses_group(x, weights, lora_as, plan) -> None or the reason why it cannot, or why that would not pay
    forward_group(x, weights, biases, lora_as, lora_bs, plan) -> ys, hs
    backward_group(dys, x, weights, lora_as, lora_bs, hs, plan, needs) -> dx, [dA], [dB], dgates
with `needs` for x, the gates, each A, each B.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from torch import Tensor

from moe_lora.backend import autotune, cpu, cuda, reference
from moe_lora.backend.triton import backend
from moe_lora.routing import Plan, Routing

# In the order in which "auto" asks them, where none was timed.
_BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "triton": backend,
    "cpu": cpu,
    "reference": reference,
}


@dataclass(frozen=True)
class Explanation:
    """The backend and kernel of one call, and why."""

    backend: str
    kernel: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.kernel}: {self.why}"


def backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run on this machine, or the reason why not.

    In the order in which "auto" asks them. One that can run here may still refuse a call: see `explain`.
    """
    return {name: module.unavailable() for name, module in _BACKENDS.items()}


def explain(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    lora_a: Tensor | Sequence[Tensor],
    routing: Routing,
    backend: str = "auto",
) -> Explanation:
    """Which backend and kernel the forward of `linear` would run for this call, and why; of lists, `linear_group`.

    Nothing is run. Of tensors as they are, without autocast and dropout.

    Args:
        x, weight, lora_a, routing: as in `linear`; lists of weight and lora_a as in `linear_group`.
        backend: "auto", or a name in `backends()`.
    Returns:
        An `Explanation` with backend, kernel and why; prints as one line.
    Raises:
        ValueError, TypeError: arguments disagree, there is no such backend, or it cannot run this call (says why).
    """
    if isinstance(weight, Sequence) and isinstance(lora_a, Sequence):
        if not weight or len(weight) != len(lora_a):
            raise ValueError(
                f"a group needs as many weights and lora_as, at least one, got {len(weight)} and {len(lora_a)}"
            )
        for each, a in zip(weight, lora_a, strict=True):
            _check(x, each, a, routing)
        return _explain_group(x, weight, lora_a, routing, backend)
    _check(x, weight, lora_a, routing)
    assert isinstance(weight, Tensor) and isinstance(lora_a, Tensor)
    plan = Plan(routing.experts, routing.gates, routing.offsets, 1.0, 0.0, None)
    module = choose(backend, x, weight, lora_a, plan)
    names = list(_BACKENDS)
    found = names[list(_BACKENDS.values()).index(module)]
    name, asked = _resolve(backend)
    if name != "auto":
        reasons = [f"{asked} asks for {name}"]
    elif times := _known(x, weight, lora_a, plan):
        reasons = ["forward timed here in ms: " + ", ".join(f"{each} {time:g}" for each, time in times.items())]
    else:
        before = names[: names.index(found)]
        reasons = ["the first that can run", *(f"not {key}: {_reason(key, x, weight, lora_a, plan)}" for key in before)]
    kernel, why = module.kernel(x, weight, lora_a, plan)
    return Explanation(found, kernel, "; ".join([*reasons, why]))


def _check(x: object, weight: object, lora_a: object, routing: object) -> None:
    """Raises what `linear` raises for arguments of which nothing could be explained."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a moe_lora.Routing, got {type(routing).__name__}")
    for name, tensor in (("x", x), ("weight", weight), ("lora_a", lora_a)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    assert isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(lora_a, Tensor)
    if x.dim() == 0 or weight.dim() != 2 or lora_a.dim() != 3 or not x.shape[-1] == weight.shape[1] == lora_a.shape[1]:
        raise ValueError(
            "x must be [..., D], weight [F, D] and lora_a [E, D, R], got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(lora_a.shape)}"
        )
    routing.check(x.shape, lora_a.shape[0])


def _explain_group(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], routing: Routing, backend: str
) -> Explanation:
    plan = Plan(routing.experts, routing.gates, routing.offsets, 1.0, 0.0, None)
    module = choose_group(backend, x, weights, lora_as, plan)
    found, kernel, why = vars(explain(x, weights[0], lora_as[0], routing, backend)).values()
    if module is None:
        reason = _reason_group(found, x, weights, lora_as, plan) or "timed here, that is faster"
        return Explanation(found, "one by one", f"{reason}; the first: {kernel}, {why}")
    found = list(_BACKENDS)[list(_BACKENDS.values()).index(module)]
    kernel, why = module.kernel(x, weights[0], lora_as[0], plan)
    return Explanation(found, f"{len(weights)} together, {kernel}", why)


def choose(
    backend: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    plan: Plan,
    needs: tuple[bool, ...] | None = None,
    run: Callable[[ModuleType], object] | None = None,
) -> ModuleType:
    """The backend's module; ValueError if a named one does not exist or cannot run this call.

    `needs` is None for a forward. With `run`, which runs the call on a module, "auto" may time those that can.
    """
    name, asked = _resolve(backend)
    if name != "auto":
        if name not in _BACKENDS:
            raise ValueError(f"{asked} must be auto or one of {', '.join(_BACKENDS)}, got {name!r}")
        reason = _reason(name, x, weight, lora_a, plan)
        if reason is not None:
            of = "" if asked == "backend" else f" of {asked}"
            raise ValueError(f"backend {name}{of} cannot run this call: {reason}")
        if needs is not None and not differentiable(name):
            raise ValueError(f"backend {name} has no backward: use backend='auto', or torch.no_grad()")
        return _BACKENDS[name]
    able = _able(x, weight, lora_a, plan, needs)
    if len(able) == 1 or not autotune.applies(x.device):
        return _BACKENDS[able[0]]
    times = _known(x, weight, lora_a, plan, needs)
    if not times and run is not None and autotune.may_time(x.device):
        runs = {each: partial(run, _BACKENDS[each]) for each in able}
        times = autotune.time_all(autotune.bucket(x, weight, lora_a, plan, needs), x.device, runs)
    return _BACKENDS[next(iter(times)) if times else able[0]]


def choose_group(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    plan: Plan,
    needs: tuple[bool, ...] | None = None,
    run: Callable[[ModuleType | None], object] | None = None,
) -> ModuleType | None:
    """The backend that runs these linears of one x together; None if each is to run by its own choice."""
    name, _ = _resolve(backend)
    for each in _BACKENDS if name == "auto" else (name,):
        if _reason_group(each, x, weights, lora_as, plan) is None:
            break
    else:
        return None
    if name != "auto" or not autotune.applies(x.device):
        return _BACKENDS[each]
    members = zip(weights, lora_as, strict=True)
    bucket = "+".join(autotune.bucket(x, weight, lora_a, plan, needs) for weight, lora_a in members)
    times = autotune.known(bucket, x.device, ["together", "apart"])
    if not times and run is not None and autotune.may_time(x.device):
        runs = {"together": partial(run, _BACKENDS[each]), "apart": partial(run, None)}
        times = autotune.time_all(bucket, x.device, runs)
    return None if times and next(iter(times)) == "apart" else _BACKENDS[each]


def _reason_group(name: str, x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], plan: Plan) -> str | None:
    """Why this backend does not run the group together."""
    module = _BACKENDS.get(name)
    if module is None or not hasattr(module, "forward_group"):
        return "it runs the members one after the other"
    for weight, lora_a in zip(weights, lora_as, strict=True):
        if reason := _reason(name, x, weight, lora_a, plan):
            return reason
    return module.refuses_group(x, weights, lora_as, plan)


def differentiable(name: str) -> bool:
    """Whether a backend has a backward; "auto" always finds one."""
    return name == "auto" or hasattr(_BACKENDS[name], "backward")


def _able(x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan, needs: tuple[bool, ...] | None = None) -> list[str]:
    able = [name for name in _BACKENDS if _reason(name, x, weight, lora_a, plan) is None]
    return [name for name in able if needs is None or differentiable(name)]


def _known(
    x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan, needs: tuple[bool, ...] | None = None
) -> dict[str, float] | None:
    """Times of all that can run the call, fastest first, if all were timed."""
    if not autotune.applies(x.device):
        return None
    able = _able(x, weight, lora_a, plan, needs)
    return autotune.known(autotune.bucket(x, weight, lora_a, plan, needs), x.device, able)


def _resolve(backend: str) -> tuple[str, str]:
    """The name asked for, and by whom: the argument, or for "auto" the environment."""
    if backend != "auto":
        return backend, "backend"
    return os.environ.get("MOE_LORA_BACKEND", "auto"), "MOE_LORA_BACKEND"


def _reason(name: str, x: Tensor, weight: Tensor, lora_a: Tensor, plan: Plan) -> str | None:
    return _BACKENDS[name].unavailable() or _BACKENDS[name].refuses(x, weight, lora_a, plan)
